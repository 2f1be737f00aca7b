//! Fifty thousand connections due at once on one quota: what the clock itself costs, and who waits for how long.
//!
//! Time is simulated, and so is the work: each run that begins takes its four calls from the quota and ends. What is
//! measured is the looking for what is due, in this process and in the database's server.

use std::time::Instant;

use sqlx::{Connection as _, Executor as _};
use wearsync::clock::Clock;
use wearsync::coordination::Taken;
use wearsync::model::{Class, quota};
use wearsync::sync;

use crate::Size;
use crate::machine;
use crate::support::{self, Place, Shape};
use crate::table::{Table, Target};

/// Calls of a run that finds nothing new.
const CALLS: u64 = 4;

pub(crate) async fn run(size: Size, table: &mut Table) {
    for shape in [Shape::Postgres, Shape::Sqlite] {
        one(shape, size, table).await;
    }
}

/// All are due from the beginning, and again an hour later: more than the quota can bear, for three rounds and a bit.
async fn one(shape: Shape, size: Size, table: &mut Table) {
    let connections: u64 = size.of(50_000, 2_000);
    // A round takes some twenty windows.
    let limit = connections * CALLS / 18;
    let place = Place::new(shape).await;
    let start = "2026-11-20T12:00:00Z".parse().expect("an instant");
    let clock = Clock::mock(start);
    let quota = format!("{limit}/15m");
    let settings = [
        ("WEARSYNC_SCHEDULE", "1h"),
        ("WEARSYNC_RECONCILE_SHARE", "0"),
        ("WEARSYNC_PROVIDERS__STRAVA__QUOTA", quota.as_str()),
    ];
    let engine = support::engine(&place, "http://127.0.0.1:1", clock.clone(), &settings).await;
    prepare(&place, connections).await;
    let setup = engine.provider("strava").expect("strava");
    let (key, quotas) = (setup.quota_key(), setup.quotas.clone());
    let database = place.redis.as_ref().map_or("", |(_, name)| name);
    let backends = || if database.is_empty() { 0.0 } else { machine::backends_cpu_ms(database) };

    // From the first look to the first push, which is what a worker waits for.
    let told = engine.shared.ready_notify();
    // Redis tells once that it is listened to.
    let _ = tokio::time::timeout(std::time::Duration::from_millis(500), told.notified()).await;
    let begun = Instant::now();
    let look = tokio::spawn({
        let engine = engine.clone();
        async move { sync::tick(&engine).await.expect("looks") }
    });
    told.notified().await;
    let first_ms = begun.elapsed().as_secs_f64() * 1000.0;
    let mut stepped = look.await.expect("ends");

    let (mut cpu_ms, mut backends_ms, mut statements) = (0.0, 0.0, 0);
    let (mut started, mut put_back, mut most, mut windows) = (0, 0_u64, 0, 0);
    let rounds = 3;
    while started < connections * rounds + connections / 4 {
        windows += 1;
        let mut now = 0;
        loop {
            for _ in &stepped.new {
                let taken = engine.shared.take(&key, &quotas, Class::Schedule, CALLS, engine.clock.now_ms()).await;
                put_back += u64::from(!matches!(taken, Ok(Taken::Granted { .. })));
            }
            now += stepped.new.len() as u64;
            end_all(&place).await;
            let (cpu, served, sent) = (machine::own_cpu_ms(), backends(), engine.db.statements());
            stepped = sync::tick(&engine).await.expect("looks");
            cpu_ms += machine::own_cpu_ms() - cpu;
            backends_ms += backends() - served;
            statements += engine.db.statements() - sent;
            if stepped.new.is_empty() {
                break;
            }
        }
        started += now;
        most = most.max(now);
        clock.set(clock.now() + chrono::Duration::minutes(15));
    }
    let n = started as f64;
    let what = format!("schedule, {shape:?}, {connections} due at once");
    table.add(format!("{what}: from the first look to the first run"), first_ms, "ms", Target::AtMost(1000.0));
    table.add(format!("{what}: CPU of this process for each that began"), cpu_ms * 1000.0 / n, "µs", Target::None);
    if backends_ms > 0.0 {
        table.add(format!("{what}: CPU of the server for each"), backends_ms * 1000.0 / n, "µs", Target::None);
    }
    table.add(format!("{what}: statements for each"), statements as f64 / n, "", Target::AtMost(0.1));
    let bearable = quota::share(limit, Class::Schedule) / CALLS;
    table.add(format!("{what}: begun in a window at most"), most as f64, "", Target::AtMost(bearable as f64));
    table.add(format!("{what}: put back for want of quota"), put_back as f64, "", Target::AtMost(0.0));
    let (least, greatest) = served(&place).await;
    let ratio = greatest as f64 / (least as f64).max(f64::MIN_POSITIVE);
    table.add(format!("{what}: most served to least served user, {windows} windows"), ratio, "", Target::AtMost(1.5));
}

/// Users with a connection each, due since before the beginning.
async fn prepare(place: &Place, connections: u64) {
    let (numbers, id, at) = match place.shape {
        Shape::Postgres => (
            format!("generate_series(1, {connections}) as n (i)"),
            "lpad(to_hex(i), 32, '0')::uuid",
            "'2026-11-20T00:00:00Z'::timestamptz",
        ),
        Shape::Sqlite => (
            format!(
                "(with recursive n (i) as (select 1 union all select i + 1 from n where i < {connections}) select i from n)"
            ),
            "unhex(printf('%032x', i))",
            "'2026-11-20T00:00:00+00:00'",
        ),
    };
    let script = format!(
        "insert into users (id, created_at) select {id}, {at} from {numbers};
        insert into accounts (id, provider, client_id, provider_user_id, status, created_at, updated_at)
            select {id}, 'strava', '90417', cast(i as text), 'active', {at}, {at} from {numbers};
        insert into connections (id, user_id, account_id, provider, status, created_at, updated_at)
            select {id}, {id}, {id}, 'strava', 'active', {at}, {at} from {numbers};
        insert into schedules (connection_id, provider, next_at, reconcile_at, updated_at)
            select {id}, 'strava', {at}, {at}, {at} from {numbers};"
    );
    execute(place, &script).await;
    let analyze = if place.shape == Shape::Postgres { "vacuum analyze" } else { "analyze" };
    execute(place, analyze).await;
}

/// The runs that began are over.
async fn end_all(place: &Place) {
    execute(place, "update runs set state = 'success', ended_at = due_at where state = 'queued'").await;
}

/// Runs of the user who got the fewest, and of the one who got the most.
async fn served(place: &Place) -> (i64, i64) {
    let sql = "select min(n), max(n) from (select count(r.id) as n from connections c
        left join runs r on r.connection_id = c.id group by c.id) q";
    match place.shape {
        Shape::Postgres => {
            let mut own = sqlx::PgConnection::connect(&place.database).await.expect("connects");
            sqlx::query_as(sql).fetch_one(&mut own).await.expect("reads")
        }
        Shape::Sqlite => {
            let mut own = sqlx::SqliteConnection::connect(&place.database).await.expect("connects");
            sqlx::query_as(sql).fetch_one(&mut own).await.expect("reads")
        }
    }
}

async fn execute(place: &Place, script: &str) {
    match place.shape {
        Shape::Postgres => {
            let mut own = sqlx::PgConnection::connect(&place.database).await.expect("connects");
            own.execute(sqlx::raw_sql(script)).await.expect("is done");
        }
        Shape::Sqlite => {
            let mut own = sqlx::SqliteConnection::connect(&place.database).await.expect("connects");
            own.execute(sqlx::raw_sql(script)).await.expect("is done");
        }
    }
}
