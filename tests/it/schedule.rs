//! The clock: each due time begins one run, as many as the quota has room for, and nothing of a day's changes is missed.
//! All in simulated time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use chrono::{DateTime, Duration, Utc};
use serde_json::{Value, json};
use sqlx::Connection as _;
use wearsync::model::{AccountId, Class, ConnectionId, RunId, RunSource, RunState, Schedule, SyncRequest, UserId};
use wearsync::providers::simulation::Rng;
use wearsync::simulator::Options;
use wearsync::storage::{Clockwork, Due, NewAccount, NewUser, Queue, Run, RunFilter, Settle, Step, SweepDue, Turn};
use wearsync::sync::{self, Engine};

use crate::both;
use crate::oracle::{another, ledger, number, rows, t0, tiny, world};
use crate::support::{Shape, World};

both! {
    each_due_time_begins_one_run_however_many_look => racing;
    missed_times_are_made_up_for_once => downtime;
    a_clock_that_jumps_begins_nothing_twice_and_loses_nothing => jumps;
    a_cron_expression_begins_each_of_its_times_once => cron;
    no_more_begin_than_the_quota_has_room_for => room;
    who_waits_on_a_quota_goes_on_in_turn => turns;
    a_restart_in_mid_window_begins_no_more => restart;
    who_is_not_connected_is_not_due => disconnected;
    a_first_sync_over_days_still_reads_the_news => news;
    a_day_finds_late_uploads_edits_and_deletes => changes;
    two_days_of_silence_are_noticed_and_made_up_for => silence;
    who_is_pushed_by_default_is_not_asked => pushed;
    a_sweep_that_is_cut_in_two_begins_anew => cut;
    sweeps_stay_within_their_share => sweeps;
}

const HOURS: [(&str, &str); 1] = [("WEARSYNC_SCHEDULE", "6h")];

/// Without the sweep: what begins is what the schedule begins.
const NO_SWEEP: [(&str, &str); 2] = [("WEARSYNC_SCHEDULE", "6h"), ("WEARSYNC_RECONCILE_SHARE", "0")];

/// So many users with a connection each, to accounts that nobody reads.
async fn crowd(engine: &Engine, n: u32) -> Vec<(UserId, ConnectionId)> {
    let (db, now) = (&engine.db, engine.clock.now());
    let mut out = Vec::new();
    for i in 0..n {
        let user = db.insert_user(NewUser::default(), now).await.unwrap().id;
        let new = NewAccount {
            id: AccountId::new(),
            provider: "strava".to_owned(),
            client_id: "90417".to_owned(),
            provider_user_id: format!("crowd {i} {user}"),
            imported_hash: None,
        };
        let account = db.upsert_account(new, now).await.unwrap();
        out.push((user, db.connect(user, account.id, "strava", now).await.unwrap()));
    }
    out
}

/// A world of which only its crowd is due.
async fn crowded(shape: Shape, n: u32, settings: &[(&str, &str)]) -> (World, Vec<(UserId, ConnectionId)>) {
    let world = world(shape, tiny(3), settings).await;
    world.engine.db.disconnect(world.user, "strava", t0()).await.unwrap();
    let crowd = crowd(&world.engine, n).await;
    (world, crowd)
}

fn after(world: &World, time: Duration) {
    world.clock.set(world.clock.now() + time);
}

/// A statement on a connection of one's own, as another program would send it.
async fn exec(world: &World, sql: &str) {
    match world.place.shape {
        Shape::Postgres => {
            let mut own = sqlx::PgConnection::connect(&world.place.database).await.unwrap();
            sqlx::query(sql).execute(&mut own).await.unwrap();
        }
        Shape::Sqlite => {
            let mut own = sqlx::SqliteConnection::connect(&world.place.database).await.unwrap();
            sqlx::query(sql).execute(&mut own).await.unwrap();
        }
    }
}

/// Runs that are not final, oldest first.
async fn open_runs(engine: &Engine) -> Vec<Run> {
    let mut runs = engine.db.list_runs(&RunFilter { limit: 10_000, ..RunFilter::default() }).await.unwrap();
    runs.retain(|run| !run.run_state().is_final());
    runs.reverse();
    runs
}

/// Ends every run that is there, as if it had been worked on.
async fn end_all(engine: &Engine) -> Vec<Run> {
    let runs = open_runs(engine).await;
    for run in &runs {
        engine.db.cancel_run(run.id, engine.clock.now()).await.unwrap();
    }
    runs
}

/// Works on whatever is ready until nothing is.
async fn work(engine: &Arc<Engine>) {
    for _ in 0..200 {
        let ready = engine.db.list_ready(engine.clock.now(), 100).await.unwrap();
        if ready.is_empty() {
            return;
        }
        for (id, ..) in ready {
            sync::execute(engine, id).await.unwrap();
        }
    }
    panic!("it does not end: {:#?}", open_runs(engine).await);
}

async fn next_at(engine: &Engine, connection: ConnectionId) -> DateTime<Utc> {
    engine.db.find_schedule(connection).await.unwrap().unwrap().next_at
}

async fn racing(shape: Shape) {
    let (world, crowd) = crowded(shape, 30, &NO_SWEEP).await;
    let mut engines = vec![world.engine.clone()];
    for _ in 0..4 {
        engines.push(another(&world, &NO_SWEEP).await);
    }
    for round in 1..=3 {
        let looks = engines.iter().cycle().take(20).map(|engine| {
            let engine = engine.clone();
            tokio::spawn(async move { sync::tick(&engine).await.unwrap().new.len() })
        });
        let mut begun = 0;
        for look in looks.collect::<Vec<_>>() {
            begun += look.await.unwrap();
        }
        assert_eq!(begun, crowd.len(), "round {round}");
        let runs = end_all(&world.engine).await;
        let of: BTreeSet<_> = runs.iter().map(|run| run.connection_id).collect();
        assert_eq!((runs.len(), of.len()), (crowd.len(), crowd.len()), "round {round}");
        let schedule = |run: &Run| (run.class, run.source.clone()) == (2, "schedule".to_owned());
        assert!(runs.iter().all(schedule), "{runs:?}");
        let now = world.clock.now();
        let mut moved = BTreeSet::new();
        for (_, connection) in &crowd {
            let ahead = (next_at(&world.engine, *connection).await - now).num_seconds();
            assert!((19_440..=23_760).contains(&ahead), "{ahead}");
            moved.insert(ahead);
        }
        assert!(moved.len() > 10, "they drift apart: {moved:?}");
        assert!(sync::tick(&world.engine).await.unwrap().begun.is_empty(), "nothing is due any more");
        after(&world, Duration::hours(7));
    }
}

async fn downtime(shape: Shape) {
    let (world, crowd) = crowded(shape, 5, &NO_SWEEP).await;
    sync::tick(&world.engine).await.unwrap();
    assert_eq!(end_all(&world.engine).await.len(), crowd.len());
    after(&world, Duration::days(10));
    for _ in 0..5 {
        sync::tick(&world.engine).await.unwrap();
    }
    assert_eq!(end_all(&world.engine).await.len(), crowd.len());
    assert!(sync::tick(&world.engine).await.unwrap().begun.is_empty());
    // A run that is still there is the one meant.
    after(&world, Duration::hours(7));
    assert_eq!(sync::tick(&world.engine).await.unwrap().new.len(), crowd.len());
    after(&world, Duration::hours(7));
    assert_eq!(sync::tick(&world.engine).await.unwrap().new.len(), 0);
    assert_eq!(open_runs(&world.engine).await.len(), crowd.len());
}

async fn jumps(shape: Shape) {
    let (world, crowd) = crowded(shape, 4, &[("WEARSYNC_SCHEDULE", "1h"), ("WEARSYNC_RECONCILE_SHARE", "0")]).await;
    let mut rng = Rng::of(&[7, 1]);
    let mut begun: BTreeMap<ConnectionId, Vec<DateTime<Utc>>> = BTreeMap::new();
    while world.clock.now() < t0() + Duration::hours(40) {
        after(
            &world,
            Duration::minutes(match rng.below(6) {
                0 => 10,
                1 => -10,
                _ => 5,
            }),
        );
        sync::tick(&world.engine).await.unwrap();
        for run in end_all(&world.engine).await {
            begun.entry(run.connection_id).or_default().push(world.clock.now());
        }
    }
    for (_, connection) in &crowd {
        let times = &begun[connection];
        for pair in times.windows(2) {
            let minutes = (pair[1] - pair[0]).num_minutes();
            assert!((54..=66 + 10).contains(&minutes), "{minutes}: {times:?}");
        }
    }
}

async fn cron(shape: Shape) {
    let (world, crowd) = crowded(shape, 2, &NO_SWEEP).await;
    let (user, connection) = crowd[0];
    let setup = world.engine.provider("strava").unwrap();
    let own: Schedule = "15 * * * *".parse().unwrap();
    let row = sync::set_schedule(&world.engine, setup, connection, Some(&own), Some(chrono_tz::America::St_Johns))
        .await
        .unwrap()
        .unwrap();
    assert_eq!((row.own(), row.time_zone.as_str()), (Some(own), "America/St_Johns"));
    sync::set_schedule(&world.engine, setup, crowd[1].1, Some(&Schedule::Off), None).await.unwrap().unwrap();
    let mut rng = Rng::of(&[7, 2]);
    let mut times = vec![row.next_at];
    while world.clock.now() < t0() + Duration::hours(30) {
        after(
            &world,
            Duration::minutes(match rng.below(5) {
                0 => 10,
                1 => -10,
                _ => 5,
            }),
        );
        let due = next_at(&world.engine, connection).await;
        sync::tick(&world.engine).await.unwrap();
        let runs = end_all(&world.engine).await;
        assert!(runs.iter().all(|run| run.user_id == user) && runs.len() < 2, "{runs:?}");
        if !runs.is_empty() {
            assert_eq!(times.last(), Some(&due));
            times.push(next_at(&world.engine, connection).await);
        }
    }
    // Newfoundland is half an hour off: every hour at a quarter to.
    assert_eq!(times[0], "2026-05-03T05:45:00Z".parse::<DateTime<Utc>>().unwrap());
    assert!(times.windows(2).all(|pair| pair[1] - pair[0] == Duration::hours(1)), "{times:?}");
    assert!(times.len() > 28, "{}", times.len());
}

/// Spends permits as runs at work would.
async fn spend(engine: &Engine, class: Class, calls: u64) {
    let setup = engine.provider("strava").unwrap();
    for _ in 0..calls {
        let now_ms = engine.clock.now_ms();
        engine.shared.take(&setup.quota_key(), &setup.quotas, class, 1, now_ms).await.unwrap();
    }
}

/// Fifty calls a quarter hour, of which forty-five are for the clock: eleven runs of four calls.
const FIFTY: [(&str, &str); 3] =
    [("WEARSYNC_SCHEDULE", "6h"), ("WEARSYNC_RECONCILE_SHARE", "0"), ("WEARSYNC_PROVIDERS__STRAVA__QUOTA", "50/15m")];

async fn room(shape: Shape) {
    let (world, crowd) = crowded(shape, 40, &FIFTY).await;
    let setup = world.engine.provider("strava").unwrap();
    // The last connected has waited longest.
    for (n, (_, connection)) in crowd.iter().enumerate() {
        let due = t0() - Duration::seconds(n as i64);
        world.engine.db.set_schedule(*connection, None, due, t0()).await.unwrap();
    }
    let other = another(&world, &FIFTY).await;
    let mut order = Vec::new();
    let mut windows = 0;
    while order.len() < crowd.len() {
        windows += 1;
        for engine in [&world.engine, &other, &world.engine] {
            sync::tick(engine).await.unwrap();
        }
        let runs = open_runs(&world.engine).await;
        let expected = 11.min(crowd.len() - order.len());
        assert_eq!(runs.len(), expected, "no more than fit, and none later while these are there");
        order.extend(runs.iter().map(|run| run.connection_id));
        for engine in [&world.engine, &other] {
            if windows == 1 || matches!(shape, Shape::Sqlite) {
                spend(engine, Class::Schedule, 4 * expected as u64).await;
            }
        }
        if matches!(shape, Shape::Postgres) && windows > 1 {
            spend(&world.engine, Class::Schedule, 4 * expected as u64).await;
        }
        end_all(&world.engine).await;
        assert!(sync::tick(&world.engine).await.unwrap().begun.is_empty(), "the window is spent");
        let waiting = number(&world.engine.db, "select count(*) from schedules where last_at is null").await;
        assert_eq!(waiting as usize, crowd.len() + 1 - order.len(), "the others stay due");
        after(&world, Duration::minutes(15));
    }
    assert_eq!(windows, 4);
    let longest: Vec<_> = crowd.iter().rev().map(|(_, connection)| *connection).collect();
    assert_eq!(order, longest, "who has waited longest goes first");
    assert!(setup.quotas.len() == 1);
}

async fn turns(shape: Shape) {
    let settings = [("WEARSYNC_SCHEDULE", "off"), FIFTY[2]];
    let (world, crowd) = crowded(shape, 30, &settings).await;
    let db = &world.engine.db;
    let window = t0() + Duration::minutes(15);
    let mut ids = Vec::new();
    for (n, (_, connection)) in crowd.iter().enumerate() {
        let setup = world.engine.provider("strava").unwrap();
        let (class, source) = (Class::Schedule, RunSource::Schedule);
        let request = SyncRequest { since_ms: Some(n as i64), ..SyncRequest::default() };
        let new =
            sync::submit(&world.engine, setup, *connection, &request, class, source, None).await.unwrap().unwrap();
        let now = t0() + Duration::seconds((n as i64 * 7) % 30);
        let claim = db.claim_run(new.id, "a", now, now + Duration::hours(1)).await.unwrap().unwrap();
        let wait = Settle::Wait {
            due: window,
            reason: "the quota is spent".to_owned(),
            waiting_on: Some(setup.quota_key()),
            class,
            attempt: false,
            report: "{}".to_owned(),
        };
        db.settle_run(&claim.fence, wait, now).await.unwrap();
        ids.push((now, new.id));
    }
    ids.sort_unstable();
    assert!(sync::tick(&world.engine).await.unwrap().released.is_empty(), "the window is closed");
    world.clock.set(window);
    assert!(db.list_ready(window, 100).await.unwrap().is_empty(), "nobody runs ahead");
    let mut served: Vec<RunId> = Vec::new();
    for round in 0..3 {
        let mut let_go: Vec<RunId> =
            sync::tick(&world.engine).await.unwrap().released.iter().map(|(id, _)| *id).collect();
        assert!(sync::tick(&world.engine).await.unwrap().released.is_empty(), "only as many as there are permits");
        let ready: BTreeSet<RunId> =
            db.list_ready(world.clock.now(), 100).await.unwrap().into_iter().map(|(id, ..)| id).collect();
        assert_eq!(ready, let_go.iter().copied().collect(), "round {round}");
        let expected: BTreeSet<RunId> = ids[served.len()..].iter().take(11).map(|(_, id)| *id).collect();
        assert_eq!(ready, expected, "round {round}: who was put back first goes first");
        spend(&world.engine, Class::Schedule, 44).await;
        for id in &let_go {
            db.cancel_run(*id, world.clock.now()).await.unwrap();
        }
        served.append(&mut let_go);
        after(&world, Duration::minutes(15));
    }
    assert_eq!(served.len(), 30);
}

async fn restart(shape: Shape) {
    let (world, _) = crowded(shape, 40, &FIFTY).await;
    let setup = world.engine.provider("strava").unwrap();
    sync::tick(&world.engine).await.unwrap();
    assert_eq!(end_all(&world.engine).await.len(), 11);
    // Twenty calls were made, as the last snapshot tells.
    spend(&world.engine, Class::Schedule, 20).await;
    let now_ms = world.clock.now_ms();
    let windows = world.engine.shared.windows(&setup.quota_key(), &setup.quotas, now_ms).await.unwrap();
    world.engine.db.save_quota(&setup.quota_key(), &[("15m".to_owned(), windows[0])], t0()).await.unwrap();
    let other = another(&world, &FIFTY).await;
    assert_eq!(sync::tick(&other).await.unwrap().new.len(), 6, "25 calls are left");
}

async fn disconnected(shape: Shape) {
    let (world, crowd) = crowded(shape, 3, &HOURS).await;
    let db = &world.engine.db;
    db.disconnect(crowd[0].0, "strava", t0()).await.unwrap();
    exec(&world, "update accounts set status = 'reauth' where provider_user_id like 'crowd 1 %'").await;
    for _ in 0..8 {
        for run in sync::tick(&world.engine).await.unwrap().new {
            assert_eq!(world.run(run.0).await.connection_id, crowd[2].1);
        }
        end_all(&world.engine).await;
        after(&world, Duration::hours(6));
    }
    sync::tick(&world.engine).await.unwrap();
    end_all(&world.engine).await;
    // A connection that an earlier version made has no row.
    exec(&world, "delete from schedules").await;
    assert_eq!(db.add_missing_schedules(world.clock.now()).await.unwrap(), 2);
    assert_eq!(db.add_missing_schedules(world.clock.now()).await.unwrap(), 0);
    assert_eq!(sync::tick(&world.engine).await.unwrap().new.len(), 1);
    end_all(&world.engine).await;
    // Who connects again is read at once.
    let account = db.find_connection(crowd[0].1).await.unwrap().unwrap().account_id;
    db.connect(crowd[0].0, account, "strava", world.clock.now()).await.unwrap();
    let begun = sync::tick(&world.engine).await.unwrap().new;
    assert_eq!(begun.len(), 1);
    assert_eq!(world.run(begun[0].0).await.connection_id, crowd[0].1);
}

/// Strava's own quotas: a first sync takes days, and what is uploaded meanwhile is there within hours.
async fn news(shape: Shape) {
    let settings = [("WEARSYNC_SCHEDULE", "6h"), ("WEARSYNC_PROVIDERS__STRAVA__QUOTA", "20/15m,100/1d")];
    let options = Options { manual_share: 0.0, stream_points: 5, ..tiny(400) };
    let world = world(shape, options, &settings).await;
    let mut uploaded = None;
    for step in 0..96 {
        sync::tick(&world.engine).await.unwrap();
        work(&world.engine).await;
        if step == 40 {
            let open = open_runs(&world.engine).await;
            assert_eq!(open.len(), 1, "{open:?}");
            assert_eq!((open[0].run_class(), open[0].run_state()), (Class::Backfill, RunState::Waiting));
            uploaded = Some(upload(&world, world.clock.now() - Duration::hours(1)).await);
        }
        after(&world, Duration::minutes(15));
    }
    let stored = stored(&world).await;
    assert!(stored.contains_key(&uploaded.unwrap()), "a new activity waits for the old ones");
    assert!(!open_runs(&world.engine).await.is_empty(), "the first sync is not over yet");
    let streams = "select count(*) from parts where part = 'streams' and state = 'stored'";
    assert!(number(&world.engine.db, streams).await < 300);
    assert_eq!(ledger(&world).await["over_quota"], 0);
}

/// Title of each stored workout; `None`: it is deleted.
async fn stored(world: &World) -> BTreeMap<u64, Option<String>> {
    let sql = "select external_id || ' ' || case when deleted_at is null then '+' else '-' end || coalesce(title, '')
        from records where kind = 'workout'";
    let rows = rows(&world.engine.db, sql.to_owned()).await;
    rows.iter()
        .map(|row| {
            let (id, title) = row.split_once(' ').unwrap();
            (id.parse().unwrap(), title.strip_prefix('+').map(str::to_owned))
        })
        .collect()
}

async fn upload(world: &World, start: DateTime<Utc>) -> u64 {
    let body = json!({"athlete": 0, "start": start.to_rfc3339(), "manual": false, "private": false});
    let answer = world.control("upload", body).await;
    let id = answer["ids"][0].as_u64().or_else(|| answer["id"].as_u64());
    id.unwrap_or_else(|| panic!("no id in {answer}"))
}

/// What has to be found.
#[derive(Debug)]
enum Change {
    Uploaded(u64),
    Edited(u64, String),
    Deleted(u64),
}

impl Change {
    fn is_found(&self, stored: &BTreeMap<u64, Option<String>>) -> bool {
        match self {
            Self::Uploaded(id) => stored.get(id).is_some_and(Option::is_some),
            Self::Edited(id, title) => stored.get(id).is_some_and(|have| have.as_ref() == Some(title)),
            Self::Deleted(id) => stored.get(id).is_none_or(Option::is_none),
        }
    }
}

/// Lives through so many hours with a change of a random sort in most of them; answers the longest time that one took to
/// be found, in hours, and what was never found.
async fn live(world: &World, rng: &mut Rng, hours: u64, quiet: bool) -> (i64, usize) {
    let truth = crate::support::truth(&crate::support::client(), &world.sim.url(), 0).await;
    let mut untouched: Vec<u64> = truth.keys().map(|id| id.parse().unwrap()).collect();
    let mut open: Vec<(DateTime<Utc>, Change)> = Vec::new();
    let mut longest = 0;
    for hour in 0..hours + 25 {
        let now = world.clock.now();
        if hour < hours && rng.chance(0.6) {
            let sort = rng.below(4);
            let at = rng.below(untouched.len() as u64) as usize;
            open.push((
                now,
                match sort {
                    // Of the last three days, as watches bring them.
                    0 => Change::Uploaded(upload(world, now - Duration::minutes(rng.below(72 * 60) as i64 + 1)).await),
                    1 => Change::Uploaded(upload(world, now - Duration::minutes(rng.below(400 * 1440) as i64)).await),
                    2 => {
                        let (id, title) = (untouched.swap_remove(at), format!("edited in hour {hour}"));
                        world.control("edit", json!({"athlete": 0, "id": id, "name": title})).await;
                        Change::Edited(id, title)
                    }
                    _ => {
                        let id = untouched.swap_remove(at);
                        world.control("delete", json!({"athlete": 0, "id": id})).await;
                        Change::Deleted(id)
                    }
                },
            ));
        }
        if !quiet {
            exec(world, &format!("update connections set delivered_at = '{}'", world.clock.now().to_rfc3339())).await;
        }
        for _ in 0..4 {
            sync::find_silence(&world.engine).await.unwrap();
            sync::tick(&world.engine).await.unwrap();
            work(&world.engine).await;
            after(world, Duration::minutes(15));
        }
        let stored = stored(world).await;
        open.retain(|(since, change)| {
            let found = change.is_found(&stored);
            if found {
                longest = longest.max((world.clock.now() - *since).num_hours());
            } else {
                let waited = world.clock.now() - *since;
                assert!(waited <= Duration::hours(25), "{change:?} is not found after {waited}");
            }
            !found
        });
    }
    (longest, open.len())
}

async fn changes(shape: Shape) {
    let world = world(shape, Options { manual_share: 0.0, ..tiny(120) }, &HOURS).await;
    sync::tick(&world.engine).await.unwrap();
    work(&world.engine).await;
    let (longest, missed) = live(&world, &mut Rng::of(&[7, 3]), 60, true).await;
    assert_eq!(missed, 0);
    assert!(longest <= 24, "{longest} hours");
    world.check().await;
    let class = |class: i64| format!("select count(*) from runs where class = {class} and source = 'schedule'");
    let (polls, sweeps) = (number(&world.engine.db, &class(2)).await, number(&world.engine.db, &class(3)).await);
    assert!((12..=17).contains(&polls), "{polls} polls in 85 hours");
    assert!((3..=4).contains(&sweeps), "{sweeps} sweeps in 85 hours");
}

async fn silence(shape: Shape) {
    let world = world(shape, Options { manual_share: 0.0, ..tiny(60) }, &HOURS).await;
    exec(
        &world,
        "insert into provider_settings (provider, is_enabled, live_sync_mode, data_granularity, updated_at)
            values ('strava', true, 'webhook', 'raw', '2026-05-01T00:00:00Z')",
    )
    .await;
    sync::tick(&world.engine).await.unwrap();
    work(&world.engine).await;
    let polls = async || number(&world.engine.db, "select count(*) from runs where class = 2").await;
    let quiet = async || world.engine.db.find_schedule(world.connection).await.unwrap().unwrap().quiet_since;
    // While pushes come nobody asks, but for the sweep, and that finds what no push told.
    exec(&world, &format!("update connections set delivered_at = '{}'", t0().to_rfc3339())).await;
    let before = polls().await;
    let mut rng = Rng::of(&[7, 4]);
    let (_, missed) = live(&world, &mut rng, 24, false).await;
    assert_eq!((missed, polls().await, quiet().await), (0, before, None));
    // Then nothing is pushed for two days, and the day after.
    let since = world.clock.now();
    let (longest, missed) = live(&world, &mut rng, 48, true).await;
    assert_eq!(missed, 0);
    assert!(longest <= 24, "{longest} hours");
    let told = quiet().await.expect("the silence is noticed");
    assert!(since - told <= Duration::hours(1), "since the last delivery: {told}");
    let asked = polls().await - before;
    assert!((3..=6).contains(&asked), "asked again every six hours: {asked}");
    // A delivery ends it.
    exec(&world, &format!("update connections set delivered_at = '{}'", world.clock.now().to_rfc3339())).await;
    sync::find_silence(&world.engine).await.unwrap();
    assert_eq!(quiet().await, None);
    let before = polls().await;
    after(&world, Duration::hours(20));
    sync::tick(&world.engine).await.unwrap();
    assert_eq!(polls().await, before);
}

/// Looks at what is due, and begins nothing.
#[derive(Default)]
struct Look(std::sync::Mutex<Vec<Due>>);

impl Clockwork for Look {
    fn release(&self, _: &Queue) -> [u64; 4] {
        [0; 4]
    }

    fn may_begin(&self, _: &Queue, class: Class) -> bool {
        class == Class::Schedule
    }

    fn begin(&self, _: &Queue, due: &[Due]) -> Vec<Turn> {
        self.0.lock().unwrap().extend_from_slice(due);
        Vec::new()
    }

    fn sweep(&self, _: &Queue, _: &[u64], _: &[SweepDue]) -> Vec<Turn> {
        Vec::new()
    }
}

async fn pushed(shape: Shape) {
    let world = world(shape, tiny(1), &NO_SWEEP).await;
    exec(&world, &format!("update connections set delivered_at = '{}'", t0().to_rfc3339())).await;
    let is_pushed = async |default_pushed: bool| {
        let step =
            Step { provider: "strava", kind: "workout", now: t0(), default_off: false, default_pushed, windows: &[] };
        let look = Look::default();
        world.engine.db.schedule_step(&step, &look).await.unwrap().unwrap();
        let due = look.0.into_inner().unwrap();
        assert_eq!(due.len(), 1);
        due[0].is_pushed
    };
    assert_eq!((is_pushed(false).await, is_pushed(true).await), (false, true), "nothing is set at all");
    exec(
        &world,
        "insert into provider_settings (provider, is_enabled, data_granularity, updated_at)
            values ('strava', true, 'raw', '2026-05-01T00:00:00Z')",
    )
    .await;
    assert_eq!((is_pushed(false).await, is_pushed(true).await), (false, true), "something else is set");
    for (mode, expected) in [("pull", false), ("webhook", true)] {
        exec(&world, &format!("update provider_settings set live_sync_mode = '{mode}'")).await;
        assert_eq!((is_pushed(false).await, is_pushed(true).await), (expected, expected), "{mode}");
    }
}

/// A sweep that has to give way in the middle of its list lists everything once more: a part of it proves no delete.
async fn cut(shape: Shape) {
    let world = world(shape, Options { manual_share: 0.0, ..tiny(60) }, &HOURS).await;
    sync::tick(&world.engine).await.unwrap();
    work(&world.engine).await;
    let truth = crate::support::truth(&crate::support::client(), &world.sim.url(), 0).await;
    let mut ids: Vec<_> = truth.iter().map(|(id, truth)| (truth.start, id.parse::<u64>().unwrap())).collect();
    ids.sort_unstable();
    let (oldest, newest) = (ids[0].1, ids[ids.len() - 1].1);
    world.control("delete", json!({"athlete": 0, "id": newest})).await;
    let setup = world.engine.provider("strava").unwrap();
    let request = SyncRequest {
        since_ms: Some(wearsync::model::BEGINNING_MS),
        limit: Some(10),
        reconcile: true,
        ..SyncRequest::default()
    };
    let accept = async |class, source, request: &SyncRequest| {
        let new = sync::submit(&world.engine, setup, world.connection, request, class, source, None).await;
        new.unwrap().unwrap().id
    };
    let sweep = accept(Class::Backfill, RunSource::Schedule, &request).await;
    crate::oracle::faults(&world, &["slow@list=1/3:300*1"]).await;
    let work_on = tokio::spawn({
        let engine = world.engine.clone();
        async move { sync::execute(&engine, sweep).await.unwrap() }
    });
    while ledger(&world).await["faults"]["slow"].is_null() && !work_on.is_finished() {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    let urgent = accept(Class::Interactive, RunSource::Pull, &SyncRequest::default()).await;
    let executed = work_on.await.unwrap();
    assert!(matches!(executed, sync::Executed::PutBack(_)), "{executed:?}");
    world.control("delete", json!({"athlete": 0, "id": oldest})).await;
    sync::execute(&world.engine, urgent).await.unwrap();
    sync::execute(&world.engine, sweep).await.unwrap();
    assert_eq!(world.run(sweep).await.run_state(), RunState::Success);
    let stored = stored(&world).await;
    assert_eq!((&stored[&oldest], &stored[&newest]), (&None, &None), "both deletes are found");
    let profile = "select count(*) from windows where purpose = 'reread'";
    assert_eq!(number(&world.engine.db, profile).await, 0, "nothing is left open");
}

async fn sweeps(shape: Shape) {
    let settings = [("WEARSYNC_SCHEDULE", "off"), ("WEARSYNC_PROVIDERS__STRAVA__QUOTA", "100/15m,200/1d")];
    let (world, crowd) = crowded(shape, 30, &settings).await;
    let setup = world.engine.provider("strava").unwrap();
    let own = Schedule::Every(28 * 86_400);
    for (_, connection) in &crowd {
        world.engine.db.touch_connection(*connection, t0()).await.unwrap();
        sync::set_schedule(&world.engine, setup, *connection, Some(&own), None).await.unwrap();
    }
    let midnight: DateTime<Utc> = "2026-05-05T00:00:00Z".parse().unwrap();
    world.clock.set(midnight);
    let mut begun = 0;
    for _ in 0..96 {
        sync::tick(&world.engine).await.unwrap();
        let runs = end_all(&world.engine).await;
        let sweep = |run: &Run| {
            let request: Value = serde_json::from_str(&run.request).unwrap();
            (run.class, request["reconcile"].as_bool()) == (3, Some(true))
        };
        assert!(runs.iter().all(sweep), "{runs:?}");
        begun += runs.len();
        after(&world, Duration::minutes(15));
    }
    // A tenth of 200 calls, two each.
    assert_eq!(begun, 10);
}
