//! A first sync of some hundred activities while its processes are killed again and again.

use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::{Value, json};
use wearsync::model::SyncRequest;
use wearsync::simulator::{Options, parse_fault};

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
}

fn kills() -> u64 {
    std::env::var("CRASH_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(60)
}

fn seed() -> u64 {
    let seed = std::env::var("CRASH_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(rand::random);
    println!("CRASH_SEED={seed}");
    seed
}

async fn first_sync(shape: Shape) {
    let mut rng = StdRng::seed_from_u64(seed());
    let kills = kills();
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
    let mut processes: Vec<Process> = commands.iter().map(|args| scene.start(args, &[])).collect();
    let mut idle: i64 = 0;
    for _ in 0..kills {
        scene.until_not_parked_next(first).await;
        let at = rng.random_range(0..processes.len());
        if rng.random_range(0..3) == 0 {
            // At a named point; one that is not come by in time is followed by a plain kill.
            let point = format!("{}:{}", POINTS[rng.random_range(0..POINTS.len())], rng.random_range(1..4));
            processes[at].kill();
            processes[at] = scene.start(&commands[at], &[("WEARSYNC_FAILPOINT", &point)]);
            processes[at].wait_at_most(Duration::from_millis(rng.random_range(500..2500))).await;
        } else {
            tokio::time::sleep(Duration::from_millis(rng.random_range(50..900))).await;
        }
        processes[at].kill();
        processes[at] = scene.start(&commands[at], &[]);
        if scene.run(first).await.run_state().is_final() {
            // Done early: more work, so that the next kills hit something.
            idle += 1;
            let start = scene.engine.clock.now() - chrono::Duration::hours(idle);
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
    let repeated: u64 = ["streams", "gear"]
        .iter()
        .filter_map(|name| ledger["by_id"][*name].as_object())
        .flat_map(|ids| ids.values().filter_map(Value::as_u64).map(|n| n - 1))
        .sum();
    let syncs = idle.unsigned_abs() + 2;
    // A page of the first sync brings 199 new rows, because its keyset repeats one; an empty page ends each list.
    let lists = u64::from(activities - 1) / 199 + 2 + (syncs - 1) * 2;
    let extra = repeated + called("athlete").saturating_sub(syncs) + called("list").saturating_sub(lists);
    let refreshes = ledger["tokens"]["refresh_attempts"].as_u64().unwrap_or(0);
    println!(
        "{shape:?}: {kills} kills in {:.0} s, {} calls beyond the least, {refreshes} refreshes, {syncs} syncs: {}",
        started.elapsed().as_secs_f64(),
        extra,
        ledger["calls"],
    );
    assert!(called("streams") > 50, "the simulator was not used: {ledger}");
    assert!(extra <= kills, "{extra} calls beyond the least after {kills} kills");
    assert!(refreshes <= kills + commands.len() as u64, "{refreshes} refreshes after {kills} kills");
    for process in &mut processes {
        process.stop().await;
    }
}
