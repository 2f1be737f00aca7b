//! SIGTERM in the middle of a page, and a worker that sleeps past its lease.

use std::time::{Duration, Instant};

use wearsync::model::{RunState, SyncRequest};
use wearsync::simulator::{Options, parse_fault};

use crate::both;
use crate::scene::Scene;
use crate::support::Shape;

both! {
    sigterm_mid_page => sigterm;
    sigterm_in_an_endless_call => endless;
}

fn options(activities: u32, fault: &str) -> Options {
    let faults = vec![parse_fault(fault).expect("a fault")];
    Options { activities, stream_points: 60, athletes: 1, faults, ..Options::default() }
}

/// The page in hand is finished, the run given back, and the next start goes on.
async fn sigterm(shape: Shape) {
    let scene = Scene::new(shape, options(60, "slow=1/1:250")).await;
    let id = scene.accept(&SyncRequest::default()).await;
    let mut slowest = Duration::ZERO;
    for (round, endpoint) in ["list", "streams", "streams", "streams"].into_iter().enumerate() {
        let mut processes = scene.start_all();
        let before = scene.calls(endpoint).await;
        scene.until_calls(endpoint, before + 1).await;
        let told = Instant::now();
        for process in &processes {
            process.signal("TERM");
        }
        for process in &mut processes {
            assert!(process.wait_at_most(Duration::from_secs(11)).await, "it does not end: {}", process.said());
            slowest = slowest.max(told.elapsed());
            let status = process.ended().expect("has ended");
            assert!(status.success(), "{status}: {}", process.said());
        }
        let run = scene.run(id).await;
        assert_eq!(run.run_state(), RunState::Queued, "round {round}: not given back: {run:?}");
        assert_eq!((run.attempts, run.crashes), (0, 0), "round {round}: an orderly end cost an attempt: {run:?}");
    }
    let mut processes = scene.start_all();
    scene.until_success(id).await;
    scene.check().await;
    let ledger = scene.ledger().await;
    let repeated = ledger["by_id"]["streams"].as_object().expect("counts").values().filter(|n| **n != 1).count();
    println!("{shape:?}: the slowest end took {:.1} s, {repeated} streams were read twice", slowest.as_secs_f64());
    assert_eq!(repeated, 0, "a page in hand was thrown away: {ledger}");
    for process in &mut processes {
        process.stop().await;
    }
}

/// A call that would take longer than there is: the page is rolled back, the run given back all the same.
async fn endless(shape: Shape) {
    let scene = Scene::new(shape, options(20, "slow@list=1/1:40000*1")).await;
    let id = scene.accept(&SyncRequest::default()).await;
    let mut processes = scene.start_all();
    scene.until_calls("list", 1).await;
    let told = Instant::now();
    for process in &processes {
        process.signal("TERM");
    }
    for process in &mut processes {
        assert!(process.wait_at_most(Duration::from_secs(11)).await, "it does not end: {}", process.said());
    }
    println!("{shape:?}: ended {:.1} s after SIGTERM, a call still under way", told.elapsed().as_secs_f64());
    let run = scene.run(id).await;
    assert_eq!(run.run_state(), RunState::Queued, "not given back: {run:?}");
    assert_eq!((run.attempts, run.crashes), (0, 0), "an orderly end cost an attempt: {run:?}");
    let mut processes = scene.start_all();
    scene.until_success(id).await;
    scene.check().await;
    for process in &mut processes {
        process.stop().await;
    }
}

/// A worker stops in the middle of a call and wakes up when another has its run: what it brings is refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn paused_past_its_lease() {
    // Who sleeps: the one that only works, then the one that writes the files as well.
    for sleeper in [&["worker"][..], &["worker", "--export"][..]] {
        let other = if sleeper.len() == 1 { &["worker", "--export"][..] } else { &["worker"][..] };
        let scene = Scene::new(Shape::Postgres, options(40, "slow=1/1:300")).await;
        let id = scene.accept(&SyncRequest::default()).await;
        let mut paused = scene.start(sleeper, &[]);
        scene.until_calls("streams", 3).await;
        paused.signal("STOP");
        let held = scene.run(id).await;
        let mut second = scene.start(other, &[]);
        let started = Instant::now();
        let taken = loop {
            let run = scene.run(id).await;
            if run.epoch > held.epoch && run.committed > held.committed + 2 {
                break run;
            }
            assert!(started.elapsed() < Duration::from_secs(30), "nobody takes over: {run:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        assert_eq!(taken.epoch, held.epoch + 1, "{taken:?}");
        paused.signal("CONT");
        scene.until_success(id).await;
        let run = scene.run(id).await;
        assert_eq!(run.epoch, taken.epoch, "the sleeper took it back: {run:?}");
        scene.check().await;
        if std::env::var("CRASH_LOG").is_err() {
            assert!(paused.said().contains("lease lost"), "the sleeper's page was not refused: {}", paused.said());
        }
        let ledger = scene.ledger().await;
        let calls: u64 = ledger["by_id"]["streams"]
            .as_object()
            .expect("counts")
            .values()
            .filter_map(serde_json::Value::as_u64)
            .sum();
        let ids = ledger["by_id"]["streams"].as_object().expect("counts").len() as u64;
        println!("{sleeper:?} paused: taken over after its lease, its page refused, {} calls repeated", calls - ids);
        assert!(calls - ids <= 1, "{ledger}");
        assert!(!paused.has_ended() && !second.has_ended());
        paused.stop().await;
        second.stop().await;
    }
}
