//! Accept, then kill: a 200 is a row, whatever happens next.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::Rng as _;
use serde_json::Value;
use wearsync::model::{RunId, RunState};
use wearsync::simulator::Options;

use crate::both;
use crate::scene::{Api, Scene};
use crate::support::Shape;

const KILLS: usize = 40;
const ACCEPTS: usize = 2000;
const CLIENTS: usize = 16;
/// Of all accepted runs these many are executed at the end, the others cancelled.
const EXECUTED: usize = 40;

both! {
    accept_then_kill => accept_then_kill;
}

async fn accept_then_kill(shape: Shape) {
    let mut rng = crate::chance();
    let options = Options { athletes: 4, activities: 6, stream_points: 20, ..Options::default() };
    let scene = Arc::new(Scene::new(shape, options).await);
    let mut api = Api::of_shape(&scene).await;
    let started = Instant::now();

    let accepted: Arc<Mutex<Vec<String>>> = Arc::default();
    let stop = Arc::new(AtomicBool::new(false));
    let counter = Arc::new(AtomicI64::new(0));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|n| {
            let (scene, accepted, stop, counter) = (scene.clone(), accepted.clone(), stop.clone(), counter.clone());
            let (url, key) = (api.url.clone(), api.key.clone());
            tokio::spawn(async move {
                let now = scene.engine.clock.now().timestamp();
                let mut refused = 0;
                while !stop.load(Ordering::Relaxed) {
                    // Every request asks for another range, so that each is a run of its own.
                    let since = now - 60 * counter.fetch_add(1, Ordering::Relaxed);
                    let user = scene.people[n % scene.people.len()].user;
                    let call = scene.http.post(format!("{url}/api/v1/strava/users/{user}/sync?since={since}"));
                    let Ok(answer) = call.header("x-api-key", &key).send().await else {
                        refused += 1;
                        tokio::time::sleep(Duration::from_millis(10)).await;
                        continue;
                    };
                    let status = answer.status().as_u16();
                    // The head of an answer without its body told the caller nothing.
                    let Ok(body) = answer.json::<Value>().await else { continue };
                    assert_eq!(status, 200, "{body}");
                    accepted.lock().expect("locks").push(body["task_id"].as_str().expect("an id").to_owned());
                    // Requests are to be in flight at every kill, not to be as many as possible.
                    tokio::time::sleep(Duration::from_millis(30)).await;
                }
                refused
            })
        })
        .collect();
    let count = || accepted.lock().expect("locks").len();
    let mut before = 0;
    for n in 1..=KILLS {
        let waiting = Instant::now();
        // An even share between two kills, and some by chance.
        while count() < (ACCEPTS * n / KILLS).max(before + 10) {
            assert!(waiting.elapsed() < Duration::from_secs(30), "nothing is accepted: {}", api.process.said());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tokio::time::sleep(Duration::from_micros(rng.random_range(0..60_000))).await;
        api.kill_and_start(&scene);
        before = count();
    }
    stop.store(true, Ordering::Relaxed);
    let mut refused = 0;
    for client in clients {
        refused += client.await.expect("a client");
    }
    api.until_up(&scene).await;
    let accepted = std::mem::take(&mut *accepted.lock().expect("locks"));
    let took = started.elapsed();

    let distinct: BTreeSet<&str> = accepted.iter().map(String::as_str).collect();
    assert_eq!(distinct.len(), accepted.len(), "two requests for different ranges got one task");
    let ids: Vec<RunId> = accepted.iter().map(|id| RunId(id.parse().expect("a UUID"))).collect();
    for id in &ids {
        assert!(scene.engine.db.find_run(*id).await.expect("reads").is_some(), "{id} was answered 200 and is no row");
    }

    // What is there can be ended or is done.
    let keep: BTreeSet<RunId> = ids.iter().rev().step_by(ids.len() / EXECUTED).copied().collect();
    for id in ids.iter().filter(|id| !keep.contains(id)) {
        let call = scene.http.delete(format!("{}/api/v1/tasks/{id}", api.url)).header("x-api-key", &api.key);
        let answer = call.send().await.expect("answers");
        assert!(answer.status().is_success(), "{id}: {}", answer.status());
    }
    let mut workers = if shape == Shape::Postgres { scene.start_all() } else { Vec::new() };
    let (mut done, mut cancelled, mut parked) = (0, 0, 0);
    for id in &ids {
        let run = scene.until_final(*id).await;
        match run.run_state() {
            RunState::Success => done += 1,
            RunState::Cancelled if !keep.contains(id) => cancelled += 1,
            // Three kills in a row hit it before its first page: it says so.
            RunState::Failed if run.reason.as_deref().is_some_and(|why| why.contains("died")) => parked += 1,
            _ => panic!("{run:?}"),
        }
    }
    println!(
        "{shape:?}: {KILLS} kills in {:.0} s, {} accepted, {refused} requests cut or refused; {done} executed, {cancelled} \
         cancelled, {parked} parked, 0 lost",
        took.as_secs_f64(),
        ids.len(),
    );
    assert!(ids.len() >= ACCEPTS && done >= EXECUTED - parked, "{} accepted, {done} done", ids.len());
    api.process.stop().await;
    for worker in &mut workers {
        worker.stop().await;
    }
}
