//! What the suites share: a mock clock that moves while work waits, dumps of all tables, and short words for the ledger.
#![allow(dead_code, unreachable_pub, reason = "words for all suites")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::{Map, Value};
use wearsync::clock::Clock;
use wearsync::model::{RunId, SyncRequest};
use wearsync::simulator::Options;
use wearsync::storage::{Db, Run};
use wearsync::sync::{self, Engine, Executed};

use crate::support::{self, Shape, World};

/// The instant at which the tests' worlds begin.
pub fn t0() -> DateTime<Utc> {
    "2026-05-03T05:12:44Z".parse().expect("an instant")
}

/// A small world that costs a page of ten or so.
pub fn tiny(activities: u32) -> Options {
    Options { activities, stream_points: 20, athletes: 1, ..Options::default() }
}

/// A world whose time stands still unless work waits.
pub async fn world(shape: Shape, options: Options, settings: &[(&str, &str)]) -> World {
    World::with(shape, options, Clock::mock(t0()), settings).await
}

/// Pages of ten, so that a small world has many.
pub fn tens() -> SyncRequest {
    SyncRequest { limit: Some(10), ..SyncRequest::default() }
}

/// Executes a run once; a mock clock moves twenty times as fast as real time meanwhile, so that short waits are short.
pub async fn execute(engine: &Arc<Engine>, id: RunId) -> Executed {
    let clock = engine.clock.clone();
    let work = tokio::spawn({
        let engine = engine.clone();
        async move { sync::execute(&engine, id).await }
    });
    tokio::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done.expect("no panic").expect("executes"),
            () = tokio::time::sleep(Duration::from_millis(1)) => {
                clock.set(clock.now() + chrono::Duration::milliseconds(20));
            }
        }
    }
}

/// Moves a mock clock forward to an instant, never back.
pub fn forward(clock: &Clock, at: DateTime<Utc>) {
    if at > clock.now() {
        clock.set(at);
    }
}

/// Executes a run until it is final, whatever it has to wait for.
pub async fn finish(engine: &Arc<Engine>, id: RunId) -> Run {
    for _ in 0..300 {
        execute(engine, id).await;
        let run = engine.db.find_run(id).await.expect("reads").expect("is there");
        if run.run_state().is_final() {
            return run;
        }
        forward(&engine.clock, run.due_at + chrono::Duration::milliseconds(1));
    }
    let others = engine.db.list_runs(&wearsync::storage::RunFilter { limit: 20, ..Default::default() }).await;
    panic!("the run {id} does not end at {}: {others:#?}", engine.clock.now());
}

/// Accepts and finishes.
pub async fn sync_with(world: &World, request: &SyncRequest) -> Run {
    let id = world.accept(request).await;
    finish(&world.engine, id).await
}

/// Sets the faults of the simulator; none heals it.
pub async fn faults(world: &World, faults: &[&str]) {
    world.control("fault", serde_json::json!({ "faults": faults })).await;
}

/// The ledger.
pub async fn ledger(world: &World) -> Value {
    world.ask("ledger").await["ledger"].clone()
}

/// Calls of one endpoint so far.
pub fn calls(ledger: &Value, endpoint: &str) -> u64 {
    ledger["calls"][endpoint].as_u64().unwrap_or(0)
}

/// List calls whose answers left unharmed.
pub fn whole_lists(ledger: &Value) -> usize {
    ledger["lists"].as_array().map_or(0, |lists| lists.iter().filter(|list| list["whole"] == true).count())
}

/// Rows as JSON, one text column each.
pub async fn rows(db: &Db, sql: String) -> Vec<String> {
    let rows: Vec<(String,)> = match db {
        Db::Postgres(db) => sqlx::query_as(&sql).fetch_all(db.pool()).await.expect("reads"),
        Db::Sqlite(db) => sqlx::query_as(&sql).fetch_all(db.pool()).await.expect("reads"),
    };
    rows.into_iter().map(|(text,)| text).collect()
}

/// One number.
pub async fn number(db: &Db, sql: &str) -> i64 {
    let text = match db {
        Db::Postgres(_) => format!("select cast(({sql}) as text)"),
        Db::Sqlite(_) => format!("select cast(({sql}) as text)"),
    };
    rows(db, text).await[0].parse().expect("a number")
}

/// All tables that hold data of people.
pub const TABLES: [&str; 12] = [
    "users",
    "accounts",
    "connections",
    "windows",
    "runs",
    "data_sources",
    "records",
    "workouts",
    "parts",
    "sample_chunks",
    "quota_windows",
    "idempotency",
];

/// What a sync stores.
pub const CONTENT: [&str; 5] = ["data_sources", "records", "workouts", "parts", "sample_chunks"];

pub type Dump = BTreeMap<String, Vec<Map<String, Value>>>;

/// Every row of these tables with every column, in an order of their own.
pub async fn dump(db: &Db, tables: &[&str]) -> Dump {
    let mut out = Dump::new();
    for table in tables {
        let sql = match db {
            Db::Postgres(_) => format!("select to_jsonb(t)::text from {table} t"),
            Db::Sqlite(_) => {
                let columns =
                    rows(db, format!("select name || ' ' || lower(type) from pragma_table_info('{table}')")).await;
                let columns = columns.iter().map(|column| {
                    let (name, kind) = column.split_once(' ').expect("two words");
                    if kind == "blob" { format!("'{name}', hex({name})") } else { format!("'{name}', {name}") }
                });
                format!("select json_object({}) from {table}", columns.collect::<Vec<_>>().join(", "))
            }
        };
        let mut texts = rows(db, sql).await;
        texts.sort();
        let list = texts.iter().map(|text| match serde_json::from_str(text) {
            Ok(Value::Object(row)) => row,
            other => panic!("no row: {other:?}"),
        });
        out.insert((*table).to_owned(), list.collect());
    }
    out
}

/// The youngest transaction that wrote to what is stored; 0 where the database cannot tell.
pub async fn youngest_write(db: &Db) -> i64 {
    if matches!(db, Db::Sqlite(_)) {
        return 0;
    }
    let each = CONTENT.iter().map(|table| format!("select coalesce(max(xmin::text::bigint), 0) as x from {table}"));
    number(db, &format!("select max(x) from ({}) t", each.collect::<Vec<_>>().join(" union all "))).await
}

/// Says where two dumps differ, shortly.
pub fn assert_same(what: &str, left: &Dump, right: &Dump) {
    for (table, rows) in left {
        let other = &right[table];
        if rows != other {
            let only_left: Vec<_> = rows.iter().filter(|row| !other.contains(row)).take(3).map(brief).collect();
            let only_right: Vec<_> = other.iter().filter(|row| !rows.contains(row)).take(3).map(brief).collect();
            panic!(
                "{what}: {table} differs ({} and {} rows)\n  left:  {only_left:#?}\n  right: {only_right:#?}",
                rows.len(),
                other.len()
            );
        }
    }
}

fn brief(row: &Map<String, Value>) -> String {
    let short = row.iter().filter(|(name, _)| !matches!(name.as_str(), "body" | "vals" | "deltas"));
    let text = short.map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ");
    text.chars().take(900).collect()
}

/// Another process on the same database: a new engine, nothing in memory.
pub async fn another(world: &World, settings: &[(&str, &str)]) -> Arc<Engine> {
    support::engine(&world.place, &world.sim.url(), world.clock.clone(), settings).await
}
