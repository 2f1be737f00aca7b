//! Processes that begin what is due by the clock are killed while they do: each due time begins one run, and none is
//! lost.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rand::Rng as _;
use sqlx::Connection as _;
use wearsync::model::{ConnectionId, RunState};
use wearsync::simulator::Options;
use wearsync::storage::RunFilter;

use crate::both;
use crate::process::Process;
use crate::scene::Scene;
use crate::support::Shape;

both! {
    a_killed_scheduler_loses_no_due_time_and_doubles_none => due_times;
}

/// In the transaction that begins what is due, and right after it.
const POINTS: &[&str] = &["schedule-due", "schedule-begun"];

/// Nothing is due but what the test makes due.
const SETTINGS: &[(&str, &str)] = &[("WEARSYNC_SCHEDULE", "28d"), ("WEARSYNC_RECONCILE_SHARE", "0")];

async fn due_times(shape: Shape) {
    let mut rng = crate::chance();
    let rounds = crate::kills(16);
    let options = Options { activities: 8, stream_points: 20, athletes: 5, ..Options::default() };
    let scene = Scene::new(shape, options).await;
    let commands = scene.commands();
    let mut processes: Vec<Process> = commands.iter().map(|args| scene.start(args, SETTINGS)).collect();
    let mut deaths = 0;
    for round in 1..=rounds {
        let before = scene.engine.clock.now();
        // The first round is due by itself: who is connected is due at once.
        if round > 1 {
            make_due(&scene, "update schedules set next_at = '2026-01-01T00:00:00+00:00'").await;
        }
        let at = rng.random_range(0..processes.len());
        if rng.random_range(0..2) == 0 {
            processes[at].kill();
            let point = format!("{}:1", POINTS[rng.random_range(0..POINTS.len())]);
            let settings = [SETTINGS, &[("WEARSYNC_FAILPOINT", &point)]].concat();
            processes[at] = scene.start(&commands[at], &settings);
            processes[at].wait_at_most(Duration::from_millis(2000)).await;
        } else {
            tokio::time::sleep(Duration::from_millis(rng.random_range(0..900))).await;
        }
        processes[at].kill();
        deaths += 1;
        processes[at] = scene.start(&commands[at], SETTINGS);
        let runs = until_over(&scene, round).await;
        for person in &scene.people {
            let of = runs.get(&person.connection).copied().unwrap_or(0);
            assert_eq!(of, round, "{:?} has {of} runs after {round} due times", person.connection);
            let row = scene.engine.db.find_schedule(person.connection).await.expect("reads").expect("is there");
            assert!(row.next_at > before && row.last_at >= Some(before), "{row:?}");
        }
    }
    println!("{shape:?}: {deaths} kills, {rounds} due times of {} connections", scene.people.len());
    scene.check().await;
    for process in &mut processes {
        process.stop().await;
    }
}

async fn make_due(scene: &Scene, sql: &str) {
    match scene.place.shape {
        Shape::Postgres => {
            let mut own = sqlx::PgConnection::connect(&scene.place.database).await.expect("connects");
            sqlx::query(sql).execute(&mut own).await.expect("writes");
        }
        Shape::Sqlite => {
            let mut own = sqlx::SqliteConnection::connect(&scene.place.database).await.expect("connects");
            sqlx::query(sql).execute(&mut own).await.expect("writes");
        }
    }
}

/// Runs of each connection, when every connection has as many as due times and all of them are over.
async fn until_over(scene: &Scene, round: u64) -> BTreeMap<ConnectionId, u64> {
    let started = Instant::now();
    loop {
        let filter = RunFilter { limit: 100_000, ..RunFilter::default() };
        let runs = scene.engine.db.list_runs(&filter).await.expect("lists");
        let mut of: BTreeMap<ConnectionId, u64> = BTreeMap::new();
        for run in &runs {
            assert_eq!(run.source, "schedule", "{run:?}");
            *of.entry(run.connection_id).or_default() += 1;
        }
        let over = runs.iter().all(|run| run.run_state().is_final());
        if over && of.len() == scene.people.len() && of.values().all(|n| *n >= round) {
            assert!(runs.iter().all(|run| run.run_state() == RunState::Success), "{runs:#?}");
            return of;
        }
        assert!(started.elapsed() < Duration::from_secs(60), "a due time begins nothing: {of:?} in round {round}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
