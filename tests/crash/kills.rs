//! A first sync of some hundred activities while its processes are killed again and again.

use std::time::{Duration, Instant};

use rand::Rng as _;
use rand::rngs::StdRng;
use serde_json::{Value, json};
use wearsync::model::{RunState, SyncRequest};
use wearsync::simulator::{Options, parse_fault};
use wearsync::storage::RunFilter;

use crate::both;
use crate::process::Process;
use crate::scene::Scene;
use crate::support::Shape;

/// Where a process can be made to die by itself.
const POINTS: &[&str] = &[
    "claimed",
    "window-opened",
    "page-fetched",
    "page-prepared",
    "page-committed",
    "part-fetched",
    "part-committed",
    "files-written",
    "marks-cleared",
    "before-settle",
    "settled",
    "refresh-leased",
    "refresh-stored",
];

both! {
    first_sync_survives_kills => first_sync;
    two_connections_and_rereads_survive_kills => two_connections;
}

async fn first_sync(shape: Shape) {
    let mut rng = crate::chance();
    let kills = crate::kills(60);
    // Enough work that most kills hit it: some ten calls between two kills, each of twenty-five milliseconds.
    let activities = u32::try_from(kills * 8).expect("few").max(100);
    let options = Options {
        activities,
        stream_points: 120,
        athletes: 1,
        faults: vec![parse_fault("slow=1/1:25").expect("a fault")],
        ..Options::default()
    };
    let scene = Scene::new(shape, options).await;
    let first = scene.accept(&SyncRequest::default()).await;
    let started = Instant::now();
    let commands = scene.commands();
    let mut processes = scene.start_all();
    let (mut idle, mut deaths) = (0_i64, 0);
    for _ in 0..kills {
        scene.until_not_parked_next(first).await;
        deaths += kill_one(&scene, &commands, &mut processes, &mut rng).await;
        if scene.run(first).await.run_state().is_final() {
            // Done early: more work, so that the next kills hit something; inside the overlap, or no sync would find it.
            idle += 1;
            let start = scene.engine.clock.now() - chrono::Duration::minutes(idle * 5);
            let start = start.to_rfc3339();
            scene
                .control("upload", json!({"athlete": 0, "start": start, "manual": false, "private": false, "count": 5}))
                .await;
            scene.accept(&SyncRequest::default()).await;
        }
    }
    scene.until_success(first).await;
    let last = scene.accept(&SyncRequest::default()).await;
    scene.until_success(last).await;
    scene.check().await;

    // What was called beyond the least that these syncs need: at most one page and one token for each kill.
    let ledger = scene.ledger().await;
    let called = |name: &str| ledger["calls"][name].as_u64().unwrap_or(0);
    let repeated = repeated(&ledger);
    let syncs = idle.unsigned_abs() + 2;
    // A page of the first sync brings 199 new rows, because its keyset repeats one; an empty page ends each list.
    let lists = u64::from(activities - 1) / 199 + 2 + (syncs - 1) * 2;
    let extra = repeated + called("athlete").saturating_sub(syncs) + called("list").saturating_sub(lists);
    let refreshes = ledger["tokens"]["refresh_attempts"].as_u64().unwrap_or(0);
    println!(
        "{shape:?}: {deaths} kills in {:.0} s, {} calls beyond the least, {refreshes} refreshes, {syncs} syncs: {}",
        started.elapsed().as_secs_f64(),
        extra,
        ledger["calls"],
    );
    assert!(called("streams") > 50, "the simulator was not used: {ledger}");
    assert!(extra <= deaths, "{extra} calls beyond the least after {deaths} kills");
    assert!(refreshes <= deaths + commands.len() as u64, "{refreshes} refreshes after {deaths} kills");
    for process in &mut processes {
        process.stop().await;
    }
    scene.check_projection().await;
}

/// Kills one process, at a random moment or at a named point, and starts it again. Answers how often one died: to be
/// killed at a point it is started anew.
async fn kill_one(scene: &Scene, commands: &[Vec<&str>], processes: &mut [Process], rng: &mut StdRng) -> u64 {
    let mut deaths = 1;
    let at = rng.random_range(0..processes.len());
    if rng.random_range(0..3) == 0 {
        // At a named point; one that is not come by in time is followed by a plain kill.
        let point = format!("{}:{}", POINTS[rng.random_range(0..POINTS.len())], rng.random_range(1..4));
        deaths += 1;
        processes[at].kill();
        processes[at] = scene.start(&commands[at], &[("WEARSYNC_FAILPOINT", &point)]);
        processes[at].wait_at_most(Duration::from_millis(rng.random_range(500..2500))).await;
    } else {
        tokio::time::sleep(Duration::from_millis(rng.random_range(50..900))).await;
    }
    processes[at].kill();
    processes[at] = scene.start(&commands[at], &[]);
    deaths
}

/// Answers about one thing that were asked for again although they had come.
fn repeated(ledger: &Value) -> u64 {
    ["streams", "gear"]
        .iter()
        .filter_map(|name| ledger["by_id"][*name].as_object())
        .flat_map(|ids| ids.values().filter_map(Value::as_u64).map(|n| n - 1))
        .sum()
}

/// Two people at once, each with rereads of ranges waiting behind the first sync.
async fn two_connections(shape: Shape) {
    let mut rng = crate::chance();
    let kills = (crate::kills(60) / 3).max(1);
    let options = Options {
        activities: u32::try_from(kills * 6).expect("few").max(80),
        stream_points: 60,
        athletes: 2,
        faults: vec![parse_fault("slow=1/1:25").expect("a fault")],
        ..Options::default()
    };
    let scene = Scene::new(shape, options).await;
    let started = Instant::now();
    let commands = scene.commands();
    let mut runs = Vec::new();
    for person in &scene.people {
        runs.push(scene.accept_for(person.connection, &SyncRequest::default()).await);
    }
    let mut processes = scene.start_all();
    let (mut rereads, mut deaths) = (0, 0);
    for n in 0..kills {
        for run in &runs {
            scene.until_not_parked_next(*run).await;
        }
        deaths += kill_one(&scene, &commands, &mut processes, &mut rng).await;
        for (person, run) in scene.people.iter().zip(&mut runs) {
            if n % 5 == 0 || scene.run(*run).await.run_state().is_final() {
                let since = scene.engine.clock.now() - chrono::Duration::days(rng.random_range(2..200));
                let request = SyncRequest { since_ms: Some(since.timestamp_millis()), ..SyncRequest::default() };
                let id = scene.accept_for(person.connection, &request).await;
                rereads += 1;
                if scene.run(*run).await.run_state().is_final() {
                    *run = id;
                }
            }
        }
    }
    for person in &scene.people {
        let last = scene.accept_for(person.connection, &SyncRequest::default()).await;
        scene.until_success(last).await;
        // Rereads that wait behind it, too.
        let filter = RunFilter { user: Some(person.user), limit: 1000, ..RunFilter::default() };
        for run in scene.engine.db.list_runs(&filter).await.expect("lists") {
            let run = scene.until_final(run.id).await;
            let parked = run.reason.as_deref().is_some_and(|why| why.contains("died working on it"));
            assert!(run.run_state() == RunState::Success || (parked && run.request.contains("since")), "{run:?}");
        }
    }
    scene.check().await;
    let ledger = scene.ledger().await;
    let (repeated, refreshes) = (repeated(&ledger), ledger["tokens"]["refresh_attempts"].as_u64().unwrap_or(0));
    println!(
        "{shape:?}, two connections: {deaths} kills in {:.0} s, {rereads} rereads, {repeated} answers read twice, {refreshes} \
         refreshes: {}",
        started.elapsed().as_secs_f64(),
        ledger["calls"],
    );
    // One page and one token of each connection is in flight when a process dies.
    assert!(repeated <= 2 * deaths, "{repeated} answers read twice after {deaths} kills");
    assert!(refreshes <= 2 * (deaths + commands.len() as u64), "{refreshes} refreshes after {deaths} kills");
    for process in &mut processes {
        process.stop().await;
    }
    scene.check_projection().await;
}
