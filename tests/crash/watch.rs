//! Who watches syncs while the processes that work, or the one that is listened to, die.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand::Rng as _;
use wearsync::model::{Step, SyncRequest};
use wearsync::simulator::{Options, parse_fault};

use crate::both;
use crate::process::Process;
use crate::scene::{Api, Scene};
use crate::support::Shape;
use crate::support::stream::{Stream, event_id, event_in};

both! {
    events_survive_kills => kills;
    listeners_are_counted_freed_and_let_go => listeners;
}

/// Where a process dies around the events.
const POINTS: [&str; 6] =
    ["claimed", "event-committed", "page-committed", "before-settle", "settled", "part-committed"];

/// Listens until it is told to stop, connecting again as often as it must; answers the ids heard.
pub(crate) fn listen(scene: &Scene, api: &Api, done: &Arc<AtomicBool>) -> tokio::task::JoinHandle<Vec<String>> {
    let (url, key, user) = (api.url.clone(), api.key.clone(), scene.people[0].user);
    let done = done.clone();
    tokio::spawn(async move {
        let http = reqwest::Client::builder().build().expect("a client");
        let mut heard: Vec<String> = Vec::new();
        loop {
            let last = heard.last().map_or("", String::as_str);
            let stream = Stream::open(&http, &url, &key, user, "?replay=200", Some(last)).await;
            let Ok(mut stream) = stream else {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            loop {
                match tokio::time::timeout(Duration::from_millis(500), stream.try_frame()).await {
                    Ok(Ok(Some(frame))) => heard.extend(event_in(&frame).as_ref().map(event_id)),
                    Ok(_) => break,
                    // Silence: everything has been heard, or will be.
                    Err(_) if done.load(Ordering::SeqCst) => return heard,
                    Err(_) => {}
                }
            }
        }
    })
}

/// What nobody told of because he died is found in the rows with the next heartbeat.
pub(crate) async fn until_heartbeat() {
    tokio::time::sleep(Duration::from_secs(3)).await;
}

/// What was heard is what is written, which is what each run went through, once.
pub(crate) async fn check(scene: &Scene, heard: &[String]) {
    let rows = scene.engine.db.list_run_events_after(scene.people[0].user, 0, 10_000).await.expect("reads");
    let written: Vec<String> = rows.iter().map(|row| row.id.to_string()).collect();
    assert_eq!(heard, written, "heard and written differ");
    let mut runs: BTreeMap<_, Vec<Step>> = BTreeMap::new();
    for row in &rows {
        runs.entry(row.run_id.0).or_default().push(row.step());
    }
    for (run, steps) in runs {
        let numbers: Vec<i64> = steps.iter().map(|step| step.number()).collect();
        assert!(numbers.is_sorted_by(|a, b| a < b), "{run}: each once, in their order: {steps:?}");
        assert_eq!(steps.last(), Some(&Step::Ended), "{run}");
    }
}

async fn kills(shape: Shape) {
    let mut rng = crate::chance();
    let faults = vec![parse_fault("slow=1/1:25").expect("a fault")];
    let options = Options { activities: 30, stream_points: 20, athletes: 1, faults, ..Options::default() };
    let scene = Scene::new(shape, options).await;
    let mut api = Api::of_shape(&scene).await;
    // On SQLite the process that is listened to is the one that works, and dies.
    let mut worker = (shape == Shape::Postgres).then(|| scene.start(&["worker", "--export"], &[]));
    let done = Arc::new(AtomicBool::new(false));
    let listening = listen(&scene, &api, &done);
    let mut runs = Vec::new();
    for n in 0..crate::kills(60) / 4 {
        let since_ms = (n > 0).then(|| 1_600_000_000_000 + i64::try_from(n).expect("few"));
        let id = scene.accept(&SyncRequest { since_ms, ..SyncRequest::default() }).await;
        runs.push(id);
        scene.until_not_parked_next(id).await;
        let point = format!("{}:{}", POINTS[rng.random_range(0..POINTS.len())], rng.random_range(1..4));
        let settings = [("WEARSYNC_FAILPOINT", point.as_str())];
        let patience = Duration::from_millis(rng.random_range(200..2000));
        match &mut worker {
            Some(process) => {
                process.kill();
                *process = scene.start(&["worker", "--export"], &settings);
                process.wait_at_most(patience).await;
                process.kill();
                *process = scene.start(&["worker", "--export"], &[]);
            }
            None => {
                api.restart_at(&scene, &settings);
                api.process.wait_at_most(patience).await;
                api.kill_and_start(&scene);
            }
        }
    }
    for id in runs {
        // Workers that die again and again park a run, and that is told as well.
        scene.until_final(id).await;
    }
    let last = scene.accept(&SyncRequest::default()).await;
    scene.until_success(last).await;
    until_heartbeat().await;
    done.store(true, Ordering::SeqCst);
    check(&scene, &listening.await.expect("listens")).await;
    for mut process in [Some(api.process), worker].into_iter().flatten() {
        process.stop().await;
    }
}

async fn counted(scene: &Scene, api: &Api, n: usize) {
    let begun = Instant::now();
    loop {
        let answer = scene.http.get(format!("{}/metrics", api.url)).header("x-api-key", &api.key).send().await;
        let text = answer.expect("answers").text().await.expect("is text");
        if text.lines().any(|line| line == format!("wearsync_listeners {n}")) {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(5), "not {n} listeners: {text}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn listeners(shape: Shape) {
    let scene = Scene::new(shape, Options { activities: 1, athletes: 1, ..Options::default() }).await;
    let mut api = Api::of_shape(&scene).await;
    let http = reqwest::Client::builder().build().expect("a client");
    let mut streams = Vec::new();
    for _ in 0..20 {
        let stream = Stream::open(&http, &api.url, &api.key, scene.people[0].user, "", None).await;
        let mut stream = stream.expect("opens");
        assert_eq!(stream.frame().await.as_deref(), Some(": connected"));
        streams.push(stream);
    }
    counted(&scene, &api, 20).await;
    // A client that goes away is noticed at once, not with the next event.
    streams.truncate(5);
    counted(&scene, &api, 5).await;
    let begun = Instant::now();
    api.process.signal("TERM");
    for stream in &mut streams {
        while let Some(frame) = stream.frame().await {
            assert_eq!(frame, ": heartbeat");
        }
    }
    let process: &mut Process = &mut api.process;
    assert!(process.wait_at_most(Duration::from_secs(5)).await, "open streams held it: {}", process.said());
    println!("{shape:?}: it ended {:.1} s after SIGTERM, with 5 listeners", begun.elapsed().as_secs_f64());
}
