//! Webhooks and kill -9: what was answered with 2xx is a row and has its effect, whatever dies in between.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::Rng as _;
use serde_json::json;
use wearsync::model::{Kind, RunState};
use wearsync::simulator::Options;
use wearsync::storage::{Delivery, DeliveryFilter, RunFilter, SubscriptionRow};
use wearsync::sync;

use crate::both;
use crate::scene::{Api, Scene};
use crate::support::{Shape, truth};

const KILLS: u64 = 12;
const CLIENTS: usize = 8;

both! {
    a_delivery_outlives_every_death => every_death;
    deliver_then_kill => deliver_then_kill;
}

/// People whose accounts are named already, and a subscription; answers their ids at the provider.
async fn subscribed(scene: &Scene) -> Vec<u64> {
    let engine = &scene.engine;
    let row = SubscriptionRow { external_id: "318842".to_owned(), callback_url: String::new(), secret: None };
    engine.db.store_subscription("strava", "90417", &row, engine.clock.now()).await.expect("stores");
    let mut athletes = Vec::new();
    for person in &scene.people {
        let url = format!("{}/_simulator/truth?athlete={}", scene.sim.url(), person.athlete);
        let athlete = crate::support::get(&scene.http, &url).await["athlete"].as_u64().expect("an id");
        let account = engine.db.find_connection(person.connection).await.expect("reads").expect("is there").account_id;
        engine.db.name_account(account, &athlete.to_string(), engine.clock.now()).await.expect("names");
        athletes.push(athlete);
    }
    athletes
}

fn event(id: &str, owner: u64, n: u64) -> String {
    let id: u64 = id.parse().expect("a number");
    json!({"object_type": "activity", "object_id": id, "aspect_type": "update", "updates": {"title": "x"},
        "owner_id": owner, "subscription_id": 318_842, "event_time": n})
    .to_string()
}

fn callback(scene: &Scene, api: &Api) -> String {
    let setup = scene.engine.provider("strava").expect("strava");
    sync::callback_url(&scene.engine, setup, &api.url).expect("an address")
}

async fn deliveries(scene: &Scene) -> Vec<Delivery> {
    let filter = DeliveryFilter { limit: 100_000, ..DeliveryFilter::default() };
    scene.engine.db.list_deliveries(&filter).await.expect("lists")
}

/// Waits until every delivery and every run is at its end.
async fn until_done(scene: &Scene) {
    let started = Instant::now();
    loop {
        let open =
            deliveries(scene).await.iter().filter(|one| !matches!(one.state.as_str(), "done" | "failed")).count();
        let filter = RunFilter { limit: 100_000, ..RunFilter::default() };
        let runs = scene.engine.db.list_runs(&filter).await.expect("lists");
        let running = runs.iter().filter(|run| !run.run_state().is_final()).count();
        if open + running == 0 {
            return;
        }
        assert!(started.elapsed() < Duration::from_secs(120), "{open} deliveries and {running} runs do not end");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn is_stored(scene: &Scene, person: usize, id: &str) -> bool {
    let connection = scene.people[person].connection;
    scene.engine.db.find_start(connection, Kind::Workout, id).await.expect("reads").is_some()
}

async fn every_death(shape: Shape) {
    let options = Options { athletes: 1, activities: 6, stream_points: 20, awkward: false, ..Options::default() };
    let scene = Scene::new(shape, options).await;
    let athlete = subscribed(&scene).await[0];
    let ids: Vec<String> = truth(&scene.http, &scene.sim.url(), 0).await.into_keys().collect();
    for (n, point) in ["delivery-kept", "delivery-claimed", "delivery-settled"].into_iter().enumerate() {
        let failpoint = format!("{point}:1");
        let mut api = Api::of_shape(&scene).await;
        let url = callback(&scene, &api);
        let body = event(&ids[n], athlete, n as u64);
        let dies_answering = point == "delivery-kept";
        // Whoever is to die: the one that answers, or the one that works.
        let mut victim = if dies_answering || shape == Shape::Sqlite {
            api.process.stop().await;
            let bind = api.url.strip_prefix("http://").expect("an address").to_owned();
            let args = if shape == Shape::Sqlite { vec!["serve"] } else { vec!["serve", "--no-worker"] };
            let process = scene.start(&args, &[("WEARSYNC_FAILPOINT", &failpoint), ("WEARSYNC_BIND", &bind)]);
            api.until_up(&scene).await;
            process
        } else {
            scene.start(&["worker"], &[("WEARSYNC_FAILPOINT", &failpoint)])
        };
        let answer = scene.http.post(&url).body(body.clone()).send().await;
        let status = answer.ok().map(|answer| answer.status().as_u16());
        assert!(dies_answering || status == Some(200), "{point}: {status:?}");
        assert!(victim.wait_at_most(Duration::from_secs(20)).await, "{point}: nothing died: {}", victim.said());
        assert_eq!(deliveries(&scene).await.len(), n + 1, "{point}: it is a row");
        let mut others = if shape == Shape::Postgres { scene.start_all() } else { Vec::new() };
        api.kill_and_start(&scene);
        api.until_up(&scene).await;
        if dies_answering {
            // No answer came: the provider says it again.
            let again = scene.http.post(&url).body(body).send().await.expect("answers");
            assert_eq!(again.status(), 200);
            assert_eq!(deliveries(&scene).await.len(), n + 1, "{point}: it is one");
        }
        until_done(&scene).await;
        assert!(is_stored(&scene, 0, &ids[n]).await, "{point}: it had no effect");
        api.process.stop().await;
        for other in &mut others {
            other.stop().await;
        }
    }
    assert!(deliveries(&scene).await.iter().all(|one| one.state == "done"));
}

async fn deliver_then_kill(shape: Shape) {
    let mut rng = crate::chance();
    let options = Options { athletes: 3, activities: 40, stream_points: 20, awkward: false, ..Options::default() };
    let scene = Arc::new(Scene::new(shape, options).await);
    let athletes = subscribed(&scene).await;
    let mut named: Vec<(usize, u64, String)> = Vec::new();
    for (person, athlete) in athletes.iter().enumerate() {
        let ids = truth(&scene.http, &scene.sim.url(), scene.people[person].athlete).await.into_keys();
        named.extend(ids.map(|id| (person, *athlete, id)));
    }
    let named = Arc::new(named);
    let mut api = Api::of_shape(&scene).await;
    let mut workers = if shape == Shape::Postgres { scene.start_all() } else { Vec::new() };
    let url = callback(&scene, &api);
    let (stop, next) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let (scene, stop, next, named, url) =
                (scene.clone(), stop.clone(), next.clone(), named.clone(), url.clone());
            tokio::spawn(async move {
                let mut accepted = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    // Every third one is sent before, or after, or at the same time by somebody else.
                    let n = n - n % 3 / 2;
                    let (_, athlete, id) = &named[n as usize % named.len()];
                    let Ok(answer) = scene.http.post(&url).body(event(id, *athlete, n)).send().await else {
                        tokio::time::sleep(Duration::from_millis(10)).await;
                        continue;
                    };
                    let status = answer.status().as_u16();
                    assert_eq!(status, 200, "{}", answer.text().await.unwrap_or_default());
                    accepted.push(n);
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                accepted
            })
        })
        .collect();
    for _ in 0..crate::kills(KILLS) {
        tokio::time::sleep(Duration::from_millis(rng.random_range(300..900))).await;
        let victim = rng.random_range(0..=workers.len());
        if victim == workers.len() {
            api.kill_and_start(&scene);
            api.until_up(&scene).await;
        } else {
            workers[victim].kill();
            workers[victim] = scene.start(&scene.commands()[victim], &[]);
        }
    }
    stop.store(true, Ordering::Relaxed);
    let mut accepted = BTreeSet::new();
    let mut answers = 0;
    for client in clients {
        let own = client.await.expect("a client");
        answers += own.len();
        accepted.extend(own);
    }
    until_done(&scene).await;
    let kept = deliveries(&scene).await;
    let keys: BTreeSet<&str> = kept.iter().map(|one| one.dedup_key.as_str()).collect();
    assert_eq!(keys.len(), kept.len(), "one event is two deliveries");
    for n in &accepted {
        let (person, _, id) = &named[*n as usize % named.len()];
        let key = format!("activity:{id}:update:{n}:");
        let row = kept.iter().find(|one| one.dedup_key.starts_with(&key));
        let row = row.unwrap_or_else(|| panic!("{key} was answered 200 and is no row"));
        // Three deaths in a row by chance: it says so, and can be replayed.
        let parked = row.state == "failed" && row.reason.as_deref().is_some_and(|why| why.contains("died"));
        assert!(row.state == "done" || parked, "{row:?}");
        if parked {
            assert!(sync::replay(&scene.engine, row.id).await.expect("replays"));
            until_done(&scene).await;
        }
        if !is_stored(&scene, *person, id).await {
            let items = scene.engine.db.list_delivery_items(row.id).await.expect("lists");
            let run = scene.run(items[0].run_id.expect("a run")).await;
            assert!(
                run.run_state() == RunState::Failed && run.reason.as_deref().is_some_and(|why| why.contains("died")),
                "{run:?}"
            );
        }
    }
    println!("{shape:?}: {answers} answers, {} events, {} deliveries, 0 lost", accepted.len(), kept.len());
    assert!(accepted.len() > 50, "there was something to lose");
    api.process.stop().await;
    for worker in &mut workers {
        worker.stop().await;
    }
}
