//! Event streams: what a listener costs, and how long an event takes from its commit to whoever listens.
//!
//! `wearsync serve --no-worker` on Postgres and Redis is listened to; the events are written and told by the engine of
//! this process, as a worker does it. Once each listener has a user of its own, once all listen to one.

use std::collections::HashMap;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use wearsync::clock::Clock;
use wearsync::model::{AccountId, Class, ConnectionId, RunSource, RunState, UserId};
use wearsync::storage::{NewAccount, NewApiKey, NewRun, NewUser, Settle};
use wearsync::sync::Engine;
use wearsync::vault;

use crate::Size;
use crate::machine::memory_mib;
use crate::rig::Process;
use crate::support::{self, Place, Shape};
use crate::table::{Table, Target};

const KEY: &str = "ws_benchmark";

/// An event: the id of its run, and whether it is the last one.
type Key = (String, bool);
/// When each event was known to be on disk.
type Committed = Arc<Mutex<HashMap<Key, Instant>>>;
/// Each time that a listener had an event.
type Received = Arc<Mutex<Vec<(Key, Instant)>>>;

pub(crate) async fn run(size: Size, table: &mut Table) {
    let listeners = size.of(1000, 100);
    let place = Place::new(Shape::Postgres).await;
    let engine = support::engine_without_files(&place, "http://127.0.0.1:1").await;
    let key = NewApiKey {
        hash: vault::hash_secret(KEY),
        prefix: "ws_bench".to_owned(),
        name: "bench".to_owned(),
        scopes: "read".to_owned(),
        expires_at: None,
        created_by: None,
    };
    engine.db.insert_api_key(key, Clock::system().now()).await.expect("a key");
    let mut users = Vec::new();
    for _ in 0..listeners {
        users.push(user(&engine).await);
    }
    let mut env = place.env("http://127.0.0.1:1");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    drop(listener);
    env.insert("WEARSYNC_BIND".to_owned(), address.clone());
    let server = Process::start(&["serve", "--no-worker"], &env, Stdio::null());
    let http = support::client();
    let begun = Instant::now();
    while http.get(format!("http://{address}/health/ready")).send().await.is_err() {
        assert!(begun.elapsed() < Duration::from_secs(20), "it does not answer");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    // A first round is for whatever is set up once and stays.
    for (name, warm) in [("warm", true), ("a user each", false), ("one user", false)] {
        let before = memory_mib(server.pid(), "VmRSS");
        let committed: Committed = Arc::default();
        let received: Received = Arc::default();
        let mut tasks = Vec::new();
        for n in 0..listeners {
            let (user, _) = users[if name == "one user" { 0 } else { n }];
            let stream = connect(&address, user).await;
            tasks.push(tokio::spawn(listen(stream, received.clone())));
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
        let kib = (memory_mib(server.pid(), "VmRSS") - before) * 1024.0 / listeners as f64;
        let runs = size.of(500, 50);
        for n in 0..runs {
            // To one user everybody listens: an event is as many receipts as there are listeners.
            let at = if name == "one user" { 0 } else { n * 7 % listeners };
            tell(&engine, users[at].1, &committed).await;
            tokio::time::sleep(Duration::from_millis(if name == "one user" { 100 } else { 10 })).await;
        }
        let expected = runs * 2 * if name == "one user" { listeners } else { 1 };
        let waiting = Instant::now();
        let mut delays: Vec<f64> = Vec::new();
        while delays.len() < expected && waiting.elapsed() < Duration::from_secs(20) {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let (committed, received) = (committed.lock().expect("locks"), received.lock().expect("locks"));
            // One of an earlier round, which is replayed, has no place in this one. Who reads the rows may have an event
            // before its writer knows that it is on disk.
            let delay = |(key, at): &(Key, Instant)| {
                Some(at.saturating_duration_since(*committed.get(key)?).as_secs_f64() * 1000.0)
            };
            delays = received.iter().filter_map(delay).collect();
        }
        for task in tasks {
            task.abort();
        }
        assert_eq!(delays.len(), expected, "{name}: events were lost or told twice");
        if warm {
            continue;
        }
        delays.sort_by(f64::total_cmp);
        let at = |share: f64| delays[((delays.len() - 1) as f64 * share) as usize];
        let what = format!("{listeners} listeners, {name}");
        if name != "one user" {
            table.add(format!("{what}: memory of the server per listener"), kib, "KiB", Target::None);
        }
        table.add(format!("{what}: from commit to receipt, median"), at(0.5), "ms", Target::None);
        table.add(format!("{what}: from commit to receipt, p99"), at(0.99), "ms", Target::None);
    }
}

async fn user(engine: &Engine) -> (UserId, ConnectionId) {
    let now = engine.clock.now();
    let user = engine.db.insert_user(NewUser::default(), now).await.expect("a user").id;
    let new = NewAccount {
        id: AccountId::new(),
        provider: "strava".to_owned(),
        client_id: "1".to_owned(),
        provider_user_id: user.to_string(),
        imported_hash: None,
    };
    let account = engine.db.upsert_account(new, now).await.expect("an account").id;
    (user, engine.db.connect(user, account, "strava", now).await.expect("connects"))
}

/// A run that starts and ends: two events.
async fn tell(engine: &Engine, connection: ConnectionId, committed: &Committed) {
    let now = engine.clock.now();
    let new = NewRun {
        connection,
        class: Class::Interactive,
        source: RunSource::Pull,
        request: "{\"data_type\":\"all\"}".to_owned(),
        request_key: uuid::Uuid::now_v7().to_string(),
    };
    let id = engine.db.insert_run(new, now).await.expect("inserts").expect("is active").id;
    let note = |ended| committed.lock().expect("locks").insert((id.to_string(), ended), Instant::now());
    let claim = engine.db.claim_run(id, "bench", now, now + chrono::Duration::seconds(30)).await.expect("claims");
    note(false);
    engine.tell_last(id).await;
    let settle = Settle::Final { state: RunState::Success, report: "{}".to_owned(), reason: None };
    engine.db.settle_run(&claim.expect("is free").fence, settle, now).await.expect("settles");
    note(true);
    engine.tell_last(id).await;
}

async fn connect(address: &str, user: UserId) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.expect("connects");
    let request = format!(
        "GET /api/v1/users/{user}/sync/stream?replay=1 HTTP/1.1\r\nHost: {address}\r\nX-API-Key: {KEY}\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.expect("asks");
    stream
}

/// Reads events and notes when each came.
async fn listen(mut stream: TcpStream, received: Received) {
    let (mut text, mut piece) = (String::new(), vec![0; 8192]);
    loop {
        let n = stream.read(&mut piece).await.expect("reads");
        assert!(n > 0, "the server ended the stream");
        let now = Instant::now();
        text.push_str(&String::from_utf8_lossy(&piece[..n]));
        while let Some(end) = text.find("\n\n") {
            let frame: String = text.drain(..end + 2).collect();
            let Some((_, data)) = frame.split_once("data: ") else { continue };
            let event: serde_json::Value = serde_json::from_str(data).expect("is JSON");
            let ended = event["stage"] == "completed";
            let key = (event["run_id"].as_str().expect("an id").to_owned(), ended);
            received.lock().expect("locks").push((key, now));
        }
    }
}
