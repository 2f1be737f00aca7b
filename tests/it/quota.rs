//! Strava's real limits in simulated time.

use std::collections::BTreeMap;

use serde_json::Value;
use wearsync::coordination::Coordination;
use wearsync::model::quota::share;
use wearsync::model::{Class, RunId, RunState, SyncRequest};
use wearsync::simulator::Options;
use wearsync::storage::NewUser;
use wearsync::sync::{self, Executed};

use crate::both;
use crate::oracle::{another, calls, dump, faults, forward, ledger, number, t0, tiny, world};
use crate::support::{Shape, World};

both! {
    a_first_sync_over_days_uses_what_it_may => first_sync;
    two_people_share_one_quota => sharing;
    whoever_waits_in_person_has_a_tenth => kept_tenth;
    a_refusal_is_believed => refusal;
}

/// Strava's own quotas hold on both sides.
const REAL: &[(&str, &str)] = &[("WEARSYNC_PROVIDERS__STRAVA__QUOTA", "")];

fn limited(activities: u32) -> Options {
    Options { quota: true, manual_share: 0.0, stream_points: 5, ..tiny(activities) }
}

/// API calls so far, refused ones included.
fn total(ledger: &Value) -> u64 {
    ["list", "athlete", "gear", "streams", "detail", "zones"].iter().map(|endpoint| calls(ledger, endpoint)).sum()
}

async fn submit(world: &World, connection: wearsync::model::ConnectionId, class: Class) -> RunId {
    let setup = world.engine.provider("strava").unwrap();
    let source = wearsync::model::RunSource::Pull;
    let request = SyncRequest::default();
    sync::submit(&world.engine, setup, connection, &request, class, source, None).await.unwrap().unwrap().id
}

async fn first_sync(shape: Shape) {
    let world = world(shape, limited(1000), REAL).await;
    let id = submit(&world, world.connection, Class::Interactive).await;
    let mut engine = world.engine.clone();
    let mut quarters: BTreeMap<i64, u64> = BTreeMap::new();
    let mut restarted = false;
    let started = std::time::Instant::now();
    let mut put_back = 0;
    loop {
        let before = total(&ledger(&world).await);
        if !restarted && before >= 450 {
            // In the middle of a quarter hour: a process that knows nothing, on the same database.
            restarted = true;
            let stop = engine.stop.clone();
            let work = tokio::spawn({
                let engine = engine.clone();
                async move { sync::execute(&engine, id).await.unwrap() }
            });
            while total(&ledger(&world).await) < before + 40 && !work.is_finished() {
                tokio::time::sleep(std::time::Duration::from_millis(2)).await;
            }
            stop.cancel();
            work.await.unwrap();
            engine = another(&world, REAL).await;
            if let Coordination::Redis(_) = &engine.shared {
                // Redis keeps the truth beyond one process; it, too, may lose everything.
                let (url, prefix) = world.place.redis.clone().unwrap();
                forget(&url, &prefix).await;
            }
        }
        let window = world.clock.now_ms().div_euclid(900_000);
        let executed = sync::execute(&engine, id).await.unwrap();
        *quarters.entry(window).or_default() += total(&ledger(&world).await) - before;
        match executed {
            Executed::Final(state) => {
                assert_eq!(state, RunState::Success);
                break;
            }
            Executed::PutBack(due) => {
                put_back += 1;
                let again = std::time::Instant::now();
                assert_eq!(sync::execute(&engine, id).await.unwrap(), Executed::NotTaken, "a waiting run holds nobody");
                assert!(again.elapsed().as_millis() < 500);
                let run = world.run(id).await;
                assert_eq!((run.attempts, run.run_state()), (0, RunState::Waiting), "{run:?}");
                if due > world.clock.now() {
                    assert!(run.waiting_on.is_some(), "{run:?}");
                }
                forward(&world.clock, due);
            }
            other => panic!("{other:?}"),
        }
        assert!(put_back < 100 && started.elapsed().as_secs() < 120, "it does not end");
    }
    assert!(restarted);
    world.check().await;
    let ledger = ledger(&world).await;
    assert_eq!(ledger["over_quota"], 0, "no 429");
    // Full are all days but the last, and in them all quarter hours but the one that ends with the day's quota.
    let spent: Vec<(i64, u64)> = quarters.into_iter().filter(|(_, calls)| *calls > 0).collect();
    let may = share(100, Class::Backfill);
    let mut by_day: BTreeMap<i64, Vec<u64>> = BTreeMap::new();
    for (quarter, calls) in &spent {
        by_day.entry(quarter.div_euclid(96)).or_default().push(*calls);
    }
    let days: Vec<&Vec<u64>> = by_day.values().collect();
    assert!(days.len() >= 2, "more than one day's quota: {by_day:?}");
    let limit = share(1000, Class::Backfill);
    for day in &days[..days.len() - 1] {
        let used: u64 = day.iter().sum();
        assert!(used * 100 >= limit * 95, "a day used {used} of {limit}: {day:?}");
        for quarter in &day[..day.len() - 1] {
            assert!(quarter * 100 >= may * 95, "a quarter hour used {quarter} of {may}: {day:?}");
        }
    }
}

async fn forget(url: &str, prefix: &str) {
    let client = redis::Client::open(url).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let keys: Vec<String> = redis::cmd("KEYS").arg(format!("{{{prefix}*")).query_async(&mut connection).await.unwrap();
    let more: Vec<String> = redis::cmd("KEYS").arg(format!("{prefix}*")).query_async(&mut connection).await.unwrap();
    for key in keys.into_iter().chain(more) {
        let _: () = redis::cmd("DEL").arg(key).query_async(&mut connection).await.unwrap();
    }
}

/// Two first syncs, one application: both move on in each quarter hour or two, neither starves.
async fn sharing(shape: Shape) {
    let world = world(shape, Options { athletes: 2, ..limited(230) }, REAL).await;
    let user = world.engine.db.insert_user(NewUser::default(), t0()).await.unwrap().id;
    let other = world.connect(user, 1).await;
    let ids = [submit(&world, world.connection, Class::Backfill).await, submit(&world, other, Class::Backfill).await];
    let progress = async |connection: wearsync::model::ConnectionId| {
        let db = &world.engine.db;
        let rows = crate::support::query::<crate::support::Count>(
            db,
            "select count(*) as n from parts where connection_id = $1 and part = 'streams' and state in ('stored', 'none')",
            connection,
        );
        rows.await[0].n
    };
    let mut rounds = 0;
    let mut behind = [0; 2];
    let mut last = [0; 2];
    loop {
        let work = ids.map(|id| {
            let engine = world.engine.clone();
            tokio::spawn(async move { sync::execute(&engine, id).await.unwrap() })
        });
        for work in work {
            work.await.unwrap();
        }
        let runs = [world.run(ids[0]).await, world.run(ids[1]).await];
        let now = [progress(world.connection).await, progress(other).await];
        for n in 0..2 {
            behind[n] = if now[n] == last[n] && !runs[n].run_state().is_final() { behind[n] + 1 } else { 0 };
            assert!(behind[n] < 4, "person {n} starves: {now:?} after {rounds} rounds");
        }
        last = now;
        if runs.iter().all(|run| run.run_state().is_final()) {
            assert!(runs.iter().all(|run| run.run_state() == RunState::Success), "{runs:?}");
            break;
        }
        let due = runs.iter().filter(|run| !run.run_state().is_final()).map(|run| run.due_at).max().unwrap();
        forward(&world.clock, due);
        rounds += 1;
        assert!(rounds < 60, "it does not end");
    }
    assert_eq!(ledger(&world).await["over_quota"], 0);
    assert_eq!(number(&world.engine.db, "select count(*) from records where kind = 'workout'").await, 460);
}

/// A first sync in the background leaves a tenth to whoever asks in person.
async fn kept_tenth(shape: Shape) {
    let world = world(shape, Options { athletes: 2, ..limited(150) }, REAL).await;
    let id = submit(&world, world.connection, Class::Backfill).await;
    let executed = sync::execute(&world.engine, id).await.unwrap();
    let Executed::PutBack(due) = executed else { panic!("{executed:?}") };
    assert!(due > world.clock.now());
    assert_eq!(total(&ledger(&world).await), share(100, Class::Backfill));
    let user = world.engine.db.insert_user(NewUser::default(), t0()).await.unwrap().id;
    let other = world.connect(user, 1).await;
    let id = submit(&world, other, Class::Interactive).await;
    sync::execute(&world.engine, id).await.unwrap();
    let listed = "select count(*) from records where kind = 'workout'";
    assert_eq!(number(&world.engine.db, listed).await, 300, "the list is there at once");
    let run = world.run(id).await;
    assert_eq!(
        (run.run_state(), run.run_class()),
        (RunState::Waiting, Class::Backfill),
        "the rest waits with the others"
    );
    assert_eq!(ledger(&world).await["over_quota"], 0);
}

/// Somebody else uses the same application: a refusal nobody could foresee closes the window, and is no attempt.
async fn refusal(shape: Shape) {
    let world = world(shape, limited(40), REAL).await;
    faults(&world, &["429@streams=1/10*1"]).await;
    let id = submit(&world, world.connection, Class::Interactive).await;
    let executed = sync::execute(&world.engine, id).await.unwrap();
    let Executed::PutBack(due) = executed else { panic!("{executed:?}") };
    let quarter = (world.clock.now_ms().div_euclid(900_000) + 1) * 900_000;
    assert!((quarter..quarter + 1100).contains(&due.timestamp_millis()), "the next quarter hour: {due}");
    assert_eq!(world.run(id).await.attempts, 0);
    let before = total(&ledger(&world).await);
    // Nobody knocks meanwhile, not even for somebody who waits.
    let user = world.engine.db.insert_user(NewUser::default(), t0()).await.unwrap().id;
    let other = world.connect(user, 0).await;
    let second = submit(&world, other, Class::Interactive).await;
    assert!(matches!(sync::execute(&world.engine, second).await.unwrap(), Executed::PutBack(_)));
    assert_eq!(total(&ledger(&world).await), before);
    let snapshot = dump(&world.engine.db, &["quota_windows"]).await;
    assert!(!snapshot["quota_windows"].is_empty());
    forward(&world.clock, due);
    assert_eq!(sync::execute(&world.engine, id).await.unwrap(), Executed::Final(RunState::Success));
}
