//! `wearsync serve` as people run it, on SQLite: memory at rest and at work, and how soon it answers.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use wearsync::clock::Clock;
use wearsync::storage::NewApiKey;
use wearsync::vault;

use crate::Size;
use crate::machine::memory_mib;
use crate::rig::{Process, Rig};
use crate::support::{self, Place, Shape};
use crate::table::{Table, Target};

const KEY: &str = "ws_benchmark";

pub(crate) async fn run(size: Size, table: &mut Table) {
    idle(table).await;
    let n = size.of(20_000, 2_000);
    peak(table, n, 0, "none", &format!("{n} activities")).await;
    let n = size.of(300, 60);
    peak(table, n, 3600, "streams", &format!("{n} activities with an hour of streams")).await;
}

async fn idle(table: &mut Table) {
    let place = Place::new(Shape::Sqlite).await;
    let mut env = place.env("http://127.0.0.1:1");
    let url = bind(&mut env);
    let http = support::client();
    // The first start makes the database, the second finds it.
    let first = Process::start(&["serve"], &env, Stdio::null());
    first_answer(&http, &url).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    table.add("memory of `serve` at rest", memory_mib(first.pid(), "VmRSS"), "MiB", Target::AtMost(40.0));
    drop(first);
    let mut times = Vec::new();
    for _ in 0..5 {
        let begun = Instant::now();
        let process = Process::start(&["serve"], &env, Stdio::null());
        first_answer(&http, &url).await;
        times.push(begun.elapsed().as_secs_f64());
        drop(process);
    }
    times.sort_by(f64::total_cmp);
    table.add("start to first answer, slowest of 5", times[4], "s", Target::AtMost(0.3));
}

/// The most that `serve` holds while it syncs.
async fn peak(table: &mut Table, activities: u32, points: u32, parts: &str, what: &str) {
    let rig = Rig::new(Shape::Sqlite, activities, points, parts).await;
    let key = NewApiKey {
        hash: vault::hash_secret(KEY),
        prefix: "ws_bench".to_owned(),
        name: "bench".to_owned(),
        scopes: "sync,read".to_owned(),
        created_by: None,
        expires_at: None,
    };
    rig.engine.db.insert_api_key(key, Clock::system().now()).await.expect("a key");
    rig.engine.db.close().await;
    let mut env = rig.place.env(&rig.sim.url);
    env.insert("WEARSYNC_PROVIDERS__STRAVA__PARTS".to_owned(), parts.to_owned());
    let url = bind(&mut env);
    let process = Process::start(&["serve"], &env, Stdio::null());
    let http = support::client();
    first_answer(&http, &url).await;
    let begun = Instant::now();
    let address = format!("{url}/api/v1/strava/users/{}/sync", rig.user);
    let task = call(&http, http.post(address)).await["task_id"].as_str().expect("a task").to_owned();
    loop {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let task = call(&http, http.get(format!("{url}/api/v1/tasks/{task}"))).await;
        if task["terminal"] == json!(true) {
            assert_eq!(task["status"], "success", "{task}");
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(300), "no end: {task}");
    }
    eprintln!("  {what}: {:.1} s", begun.elapsed().as_secs_f64());
    let most = memory_mib(process.pid(), "VmHWM");
    table.add(format!("most memory in a sync of {what}"), most, "MiB", Target::AtMost(150.0));
}

async fn call(http: &reqwest::Client, request: reqwest::RequestBuilder) -> Value {
    let answer = http.execute(request.header("x-api-key", KEY).build().expect("a request")).await.expect("answers");
    assert!(answer.status().is_success(), "{}", answer.status());
    answer.json().await.expect("is JSON")
}

/// A port of its own.
fn bind(env: &mut BTreeMap<String, String>) -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    env.insert("WEARSYNC_BIND".to_owned(), address.clone());
    format!("http://{address}")
}

async fn first_answer(http: &reqwest::Client, url: &str) {
    let begun = Instant::now();
    while !http.get(format!("{url}/health/live")).send().await.is_ok_and(|answer| answer.status().is_success()) {
        assert!(begun.elapsed() < Duration::from_secs(20), "it does not answer");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
