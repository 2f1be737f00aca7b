//! Watching syncs: what is told, to whom, in which form, and that nothing is lost or told twice on the way.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use chrono::DateTime;
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use wearsync::api::{self, ApiState};
use wearsync::clock::Clock;
use wearsync::model::{AccountId, Class, ConnectionId, RunId, RunSource, RunState, SyncRequest, UserId};
use wearsync::simulator::Options;
use wearsync::storage::{NewAccount, NewApiKey, NewDeveloper, NewRun, NewUser, NextApiKey, Settle};
use wearsync::sync::{self, Engine};
use wearsync::{telemetry, vault};

use crate::both;
use crate::support::stream::{Stream, event_id};
use crate::support::{self, Shape, World};

both! {
    operations_check_in_the_contracts_order => checks;
    a_whole_sync_is_told_in_the_contracts_words => whole_sync;
    partial_and_failed_runs_say_so => partial_and_failed;
    cancelled_runs_are_told_also_those_nobody_worked_on => cancelled;
    what_a_delivery_asked_for_is_told_once => of_webhook;
    a_run_that_is_put_back_is_told_once_and_goes_on => put_back;
    lists_filter_and_limit => lists;
    streams_hear_of_other_processes => across;
    streams_without_redis_read_the_rows => without_redis;
    reconnecting_loses_and_repeats_nothing => reconnect;
    a_slow_reader_catches_up_from_the_rows => slow_reader;
    what_happens_while_a_stream_begins_is_in_it => beginning;
    streams_beat_and_end_with_the_server => heartbeat;
    streams_end_with_what_they_need => ends;
    old_events_go_and_last_ones_stay => growth;
    the_numbers_go_on_when_a_run_is_erased => erased_run;
}

fn small() -> Options {
    Options { activities: 12, stream_points: 20, athletes: 1, manual_share: 0.0, ..Options::default() }
}

/// The API of an engine on a socket.
struct Server {
    url: String,
    key: String,
    http: reqwest::Client,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    async fn start(engine: &Arc<Engine>) -> Self {
        let key = vault::new_api_key();
        let key = key.expose_secret();
        let new = NewApiKey {
            hash: vault::hash_secret(key),
            prefix: "ws_test".to_owned(),
            name: "test".to_owned(),
            scopes: "read,sync".to_owned(),
            expires_at: None,
            created_by: None,
        };
        engine.db.insert_api_key(new, engine.clock.now()).await.expect("a key");
        let metrics = telemetry::install_metrics();
        let router = api::router(ApiState { engine: engine.clone(), metrics, metrics_need_key: false });
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let stop = engine.stop.clone();
        let task = tokio::spawn(async move {
            let served = axum::serve(listener, router).with_graceful_shutdown(async move { stop.cancelled().await });
            served.await.expect("serves");
        });
        // A stream has no end: no time limit for whole answers.
        let http = reqwest::Client::builder().build().expect("a client");
        Self { url, key: key.to_owned(), http, task }
    }

    async fn get(&self, path: &str, key: &str) -> (u16, Value) {
        let answer = self.http.get(format!("{}/api/v1{path}", self.url)).header("X-API-Key", key);
        let answer = answer.send().await.expect("answers");
        (answer.status().as_u16(), answer.json().await.expect("is JSON"))
    }

    async fn list(&self, path: &str) -> Vec<Value> {
        let (status, body) = self.get(path, &self.key).await;
        assert_eq!(status, 200, "{body}");
        body.as_array().expect("a list").clone()
    }

    async fn listen(&self, user: UserId, query: &str, last: Option<&str>) -> Stream {
        let stream = Stream::open(&self.http, &self.url, &self.key, user, query, last).await;
        let mut stream = stream.expect("opens");
        assert_eq!(stream.frame().await.as_deref(), Some(": connected"));
        stream
    }
}

fn ids(events: &[Value]) -> Vec<String> {
    events.iter().map(event_id).collect()
}

/// Stage, status and message of each.
fn words(events: &[Value]) -> Vec<(String, String, String)> {
    let word = |event: &Value, name: &str| event[name].as_str().unwrap_or("-").to_owned();
    events.iter().map(|event| (word(event, "stage"), word(event, "status"), word(event, "message"))).collect()
}

fn own(words: &[(&str, &str, &str)]) -> Vec<(String, String, String)> {
    words.iter().map(|(a, b, c)| ((*a).to_owned(), (*b).to_owned(), (*c).to_owned())).collect()
}

fn members(value: &Value) -> Vec<&str> {
    value.as_object().expect("an object").keys().map(String::as_str).collect()
}

/// Events of a user, oldest first.
async fn told(server: &Server, user: UserId) -> Vec<Value> {
    let mut events = server.list(&format!("/users/{user}/sync/recent?limit=200")).await;
    events.reverse();
    events
}

async fn accept(engine: &Engine, connection: ConnectionId, since_ms: i64, source: RunSource) -> RunId {
    let request = SyncRequest { since_ms: Some(since_ms), ..SyncRequest::default() };
    let setup = engine.provider("strava").expect("strava");
    let accepted = sync::submit(engine, setup, connection, &request, Class::Interactive, source, None).await;
    accepted.expect("accepts").expect("is active").id
}

/// A connection that is only rows.
async fn connection(engine: &Engine, user: UserId, provider: &str) -> ConnectionId {
    let now = engine.clock.now();
    let new = NewAccount {
        id: AccountId::new(),
        provider: provider.to_owned(),
        client_id: "1".to_owned(),
        provider_user_id: uuid::Uuid::now_v7().to_string(),
        imported_hash: None,
    };
    let account = engine.db.upsert_account(new, now).await.expect("an account").id;
    engine.db.connect(user, account, provider, now).await.expect("connects")
}

/// A run from accept to end that is only rows: two events.
async fn short_run(engine: &Engine, connection: ConnectionId, report: &str) -> RunId {
    let now = engine.clock.now();
    let new = NewRun {
        connection,
        class: Class::Interactive,
        source: RunSource::Pull,
        request: "{\"data_type\":\"all\"}".to_owned(),
        request_key: uuid::Uuid::now_v7().to_string(),
    };
    let id = engine.db.insert_run(new, now).await.expect("inserts").expect("is active").id;
    let claim = engine.db.claim_run(id, "test", now, now + chrono::Duration::seconds(30)).await.expect("claims");
    let claim = claim.expect("is free");
    engine.tell_last(id).await;
    let settle = Settle::Final { state: RunState::Success, report: report.to_owned(), reason: None };
    assert!(engine.db.settle_run(&claim.fence, settle, now).await.expect("settles"));
    engine.tell_last(id).await;
    id
}

async fn checks(shape: Shape) {
    let world = World::new(shape, small()).await;
    let server = Server::start(&world.engine).await;
    let user = world.user;
    for path in ["stream", "recent", "runs"] {
        let path_of = |user: &str, query: &str| format!("/users/{user}/sync/{path}{query}");
        // Who asks comes before what is asked.
        let (status, body) = server.get(&path_of("x", "?limit=0&replay=0"), "ws_wrong").await;
        assert_eq!((status, &body["detail"]), (401, &json!("Invalid or missing API key")), "{path}");
        let bare = server.http.get(format!("{}/api/v1{}", server.url, path_of("x", ""))).send().await.expect("answers");
        assert_eq!(bare.status().as_u16(), 401);
        assert!(!bare.headers().contains_key("www-authenticate"));
        let body: Value = bare.json().await.expect("is JSON");
        assert_eq!(body["detail"], "Authentication required: provide JWT token or API key");
        let (status, body) = server.get(&path_of("x", ""), &server.key).await;
        assert!(
            status == 400 && body["detail"].as_str().is_some_and(|t| t.starts_with("Input should be a valid UUID"))
        );
        let name = if path == "stream" { "replay" } else { "limit" };
        let low = "Input should be greater than or equal to 1";
        let high = "Input should be less than or equal to 200";
        let word = "Input should be a valid integer, unable to parse string as an integer";
        // The question is checked before it is looked for.
        let nobody = UserId::new().to_string();
        for (value, text) in [("0", low), ("-1", low), ("201", high), ("x", word)] {
            let (status, body) = server.get(&path_of(&nobody, &format!("?{name}={value}")), &server.key).await;
            assert_eq!((status, &body["detail"]), (400, &json!(text)), "{path} {value}");
        }
        let (status, body) = server.get(&path_of(&nobody, ""), &server.key).await;
        assert_eq!((status, &body["detail"], &body["code"]), (404, &json!("User not found"), &json!("unknown_user")));
    }
    for (value, text) in [("0", "greater than or equal to 1"), ("10001", "less than or equal to 10000")] {
        let (status, body) = server.get(&format!("/sync/runs?limit={value}"), &server.key).await;
        assert_eq!((status, &body["detail"]), (400, &json!(format!("Input should be {text}"))));
    }
    let (status, body) = server.get("/sync/runs?user_id=x", &server.key).await;
    assert!(status == 400 && body["detail"].as_str().is_some_and(|t| t.starts_with("Input should be a valid UUID")));
    let (status, body) = server.get("/sync/runs", "ws_wrong").await;
    assert_eq!((status, &body["detail"]), (401, &json!("Invalid or missing API key")));
    for path in [format!("/users/{user}/sync/recent"), format!("/users/{user}/sync/runs"), "/sync/runs".to_owned()] {
        assert!(server.list(&path).await.is_empty(), "{path}");
    }
    // Who may only start syncs may not watch them.
    let key = vault::new_api_key();
    let new = NewApiKey {
        hash: vault::hash_secret(key.expose_secret()),
        prefix: "ws_test".to_owned(),
        name: "sync".to_owned(),
        scopes: "sync".to_owned(),
        expires_at: None,
        created_by: None,
    };
    world.engine.db.insert_api_key(new, world.clock.now()).await.expect("a key");
    for path in [format!("/users/{user}/sync/stream"), format!("/users/{user}/sync/recent"), "/sync/runs".to_owned()] {
        assert_eq!(server.get(&path, key.expose_secret()).await.0, 403, "{path}");
    }
    let stream = server.listen(user, "?replay=200", None).await;
    let header = |name: &str| stream.response.headers().get(name).map(|value| value.to_str().expect("text").to_owned());
    let expected = [
        ("content-type", "text/event-stream; charset=utf-8"),
        ("cache-control", "no-cache, no-transform"),
        ("x-accel-buffering", "no"),
        ("connection", "keep-alive"),
    ];
    for (name, value) in expected {
        assert_eq!(header(name).as_deref(), Some(value), "{name}");
    }
    assert_eq!(header("content-encoding"), None);
}

async fn whole_sync(shape: Shape) {
    let world = World::new(shape, small()).await;
    let server = Server::start(&world.engine).await;
    let mut stream = server.listen(world.user, "", None).await;
    let before = world.engine.clock.now();
    let id = world.accept(&SyncRequest::default()).await;
    let run = world.finish(id).await;
    let events = stream.events(3).await;
    let report: Value = serde_json::from_str(run.report.as_deref().expect("a report")).expect("is JSON");
    let samples = report["samples"].as_u64().expect("a number");
    assert!(samples > 0, "{report}");
    let completed = format!("Sync from strava completed · {samples} new, 0 updated");
    let expected = own(&[
        ("started", "in_progress", "Live sync from strava started"),
        ("fetching", "in_progress", "Fetching workouts from strava"),
        ("completed", "success", &completed),
    ]);
    assert_eq!(words(&events), expected);
    let fields = "event_id run_id user_id provider source stage status message progress items_processed items_total error \
        primary_user_id metadata started_at ended_at timestamp";
    let mut fields: Vec<&str> = fields.split_whitespace().collect();
    for event in &events {
        assert_eq!(members(event).into_iter().collect::<BTreeSet<_>>(), fields.iter().copied().collect());
        assert_eq!(event["run_id"], json!(id));
        assert_eq!(event["metadata"]["task_id"], json!(id), "{event}");
        assert_eq!((&event["user_id"], &event["provider"]), (&json!(world.user), &json!("strava")));
        assert_eq!((&event["source"], &event["error"]), (&json!("pull"), &Value::Null));
        assert_eq!((&event["items_total"], &event["primary_user_id"]), (&Value::Null, &Value::Null));
        let at: DateTime<chrono::Utc> = event["timestamp"].as_str().expect("a time").parse().expect("an instant");
        assert!(at >= before && event["timestamp"].as_str().is_some_and(|text| text.ends_with('Z')), "{event}");
    }
    let [started, fetching, ended] = events.as_slice() else { unreachable!() };
    assert_eq!(started["started_at"], started["timestamp"]);
    let metadata = json!({"task_id": id, "trace_id": id, "is_historical": false, "start_date": null, "end_date": null});
    assert_eq!(started["metadata"], metadata);
    for name in ["progress", "items_processed", "started_at", "ended_at"] {
        assert_eq!(fetching[name], Value::Null, "{name}");
    }
    assert_eq!((&ended["progress"], &ended["items_processed"]), (&json!(1.0), &json!(samples)));
    assert_eq!((&ended["started_at"], &ended["ended_at"]), (&Value::Null, &ended["timestamp"]));
    let params = json!({"workouts": {"success": true, "inserted": 12, "updated": 0}});
    let metadata = json!({"task_id": id, "is_historical": false, "params": params, "inserted": samples, "updated": 0});
    assert_eq!(ended["metadata"], metadata);

    // What was told is what is listed, and what is listed is replayed: the last N, oldest first.
    assert_eq!(told(&server, world.user).await, events);
    let newest = server.list(&format!("/users/{}/sync/recent?limit=2", world.user)).await;
    assert_eq!(newest, [ended.clone(), fetching.clone()]);
    let mut replayed = server.listen(world.user, "?replay=2", None).await;
    assert_eq!(replayed.events(2).await, events[1..]);
    let runs = server.list(&format!("/users/{}/sync/runs", world.user)).await;
    assert_eq!(runs, server.list("/sync/runs").await);
    fields.retain(|name| !["event_id", "metadata", "timestamp"].contains(name));
    fields.push("last_update");
    assert_eq!(members(&runs[0]).into_iter().collect::<BTreeSet<_>>(), fields.iter().copied().collect());
    assert_eq!((&runs[0]["run_id"], &runs[0]["stage"]), (&json!(id), &json!("completed")));
    assert_eq!((&runs[0]["message"], &runs[0]["status"]), (&ended["message"], &json!("success")));
    assert_eq!((&runs[0]["started_at"], &runs[0]["ended_at"]), (&started["started_at"], &ended["ended_at"]));
    assert_eq!(runs[0]["last_update"], ended["timestamp"]);

    // A historical one, with bounds, that finds nothing new.
    let since = 1_700_000_000_000;
    let id = accept(&world.engine, world.connection, since, RunSource::Backfill).await;
    world.finish(id).await;
    let events = stream.events(3).await;
    let expected = own(&[
        ("started", "in_progress", "Historical sync from strava started"),
        ("fetching", "in_progress", "Fetching workouts from strava"),
        ("completed", "success", "Sync from strava completed"),
    ]);
    assert_eq!(words(&events), expected);
    assert_eq!((&events[0]["source"], &events[0]["metadata"]["is_historical"]), (&json!("backfill"), &json!(true)));
    assert_eq!(events[0]["metadata"]["start_date"], "2023-11-14T22:13:20Z");
    assert_eq!((&events[2]["items_processed"], events[2]["metadata"].get("inserted")), (&json!(0), None));
    let id = accept(&world.engine, world.connection, since, RunSource::Schedule).await;
    world.finish(id).await;
    let events = stream.events(3).await;
    assert_eq!(
        (&events[0]["source"], &events[0]["message"]),
        (&json!("pull"), &json!("Live sync from strava started"))
    );
}

async fn partial_and_failed(shape: Shape) {
    let world = World::new(shape, small()).await;
    let server = Server::start(&world.engine).await;
    let mut stream = server.listen(world.user, "", None).await;
    world.control("fault", json!({"faults": ["404@list=1"]})).await;
    let run = world.sync().await;
    assert_eq!(run.run_state(), RunState::Partial, "{run:?}");
    let events = stream.events(3).await;
    assert_eq!(words(&events[2..]), own(&[("completed", "partial", "Sync from strava completed with errors")]));
    let ended = &events[2];
    assert_eq!(
        (&ended["progress"], &ended["items_processed"], &ended["error"]),
        (&json!(1.0), &json!(0), &Value::Null)
    );
    let part = &ended["metadata"]["params"]["workouts"];
    assert_eq!(part["success"], false);
    assert!(part["error"].as_str().is_some_and(|error| error.starts_with("activities: ")), "{part}");
    assert_eq!(ended["metadata"]["reason"].as_str(), run.reason.as_deref());

    world.control("fault", json!({"faults": ["inactive=1"]})).await;
    let run = world.sync().await;
    assert_eq!(run.run_state(), RunState::Failed, "{run:?}");
    let mut failed = stream.event().await;
    while failed["status"] == "in_progress" {
        failed = stream.event().await;
    }
    assert_eq!(words(std::slice::from_ref(&failed)), own(&[("failed", "failed", "Sync from strava failed")]));
    assert_eq!((&failed["error"], &failed["progress"]), (&json!("All sync sub-tasks failed"), &Value::Null));
    assert_eq!(failed["ended_at"], failed["timestamp"]);
    assert_eq!(failed["metadata"]["params"]["workouts"]["success"], false);
    assert_eq!(failed["metadata"]["reason"].as_str(), run.reason.as_deref());
    let failed = server.list("/sync/runs?status=failed").await;
    assert_eq!((failed.len(), &failed[0]["error"]), (1, &json!("All sync sub-tasks failed")));
}

async fn cancelled(shape: Shape) {
    let world = World::new(shape, small()).await;
    let server = Server::start(&world.engine).await;
    let mut stream = server.listen(world.user, "", None).await;
    let id = world.accept(&SyncRequest::default()).await;
    for _ in 0..2 {
        // The second time changes nothing, and tells nothing.
        let path = format!("{}/api/v1/tasks/{id}", server.url);
        let answer = server.http.delete(path).header("X-API-Key", &server.key).send().await.expect("answers");
        assert_eq!(answer.status().as_u16(), 200);
    }
    let event = stream.event().await;
    assert_eq!(words(std::slice::from_ref(&event)), own(&[("cancelled", "cancelled", "Sync from strava cancelled")]));
    assert_eq!((&event["run_id"], &event["ended_at"]), (&json!(id), &event["timestamp"]));
    assert_eq!(event["metadata"], json!({"task_id": id, "is_historical": false, "reason": "cancelled on request"}));

    // One that is being worked on ends at a page boundary.
    let id = world.accept(&SyncRequest::default()).await;
    let now = world.engine.clock.now();
    world.engine.db.claim_run(id, "test", now, now).await.expect("claims").expect("is free");
    world.engine.db.cancel_run(id, now).await.expect("cancels");
    assert_eq!(told(&server, world.user).await.len(), 2, "it is not cancelled yet");
    tokio::time::sleep(Duration::from_millis(5)).await;
    let run = world.finish(id).await;
    assert_eq!(run.run_state(), RunState::Cancelled, "{run:?}");

    // Whoever is disconnected hears it of all runs.
    let ids = [
        accept(&world.engine, world.connection, 1, RunSource::Pull).await,
        accept(&world.engine, world.connection, 2, RunSource::Pull).await,
    ];
    world.engine.db.disconnect(world.user, "strava", world.clock.now()).await.expect("disconnects");
    world.engine.tell_news(world.user).await;
    let events = told(&server, world.user).await;
    let of = |run: RunId| -> Vec<&str> {
        let own = events.iter().filter(|event| event["run_id"] == json!(run));
        own.map(|event| event["stage"].as_str().expect("a stage")).collect()
    };
    assert_eq!(of(id).last(), Some(&"cancelled"), "{events:?}");
    assert_eq!(of(id).iter().filter(|stage| **stage == "started").count(), 1);
    for id in ids {
        assert_eq!(of(id), ["cancelled"]);
    }
    let heard = [vec![event], stream.events(events.len() - 1).await].concat();
    assert_eq!(heard, events, "heard is what is written");
    assert_eq!(events.last().expect("one")["metadata"]["reason"], "disconnected");
}

async fn of_webhook(shape: Shape) {
    let world = World::new(shape, small()).await;
    let server = Server::start(&world.engine).await;
    for (since, message, status) in
        [(1, "webhook 13 new, 0 updated", "success"), (2, "skipped: nothing new", "skipped")]
    {
        let id = accept(&world.engine, world.connection, since, RunSource::Webhook).await;
        world.finish(id).await;
        let events = told(&server, world.user).await;
        let own_events: Vec<Value> = events.into_iter().filter(|event| event["run_id"] == json!(id)).collect();
        assert_eq!(words(&own_events).len(), 1, "{own_events:?}");
        let event = &own_events[0];
        let (records, rest) = message.split_once(" new").unwrap_or((message, ""));
        let text = event["message"].as_str().expect("a message");
        // Gear comes along with the activities: how much of it there is, is the simulator's business.
        if status == "success" {
            assert!(text.starts_with("webhook ") && text.ends_with(rest) && !records.is_empty(), "{text}");
            assert!(event["metadata"]["inserted"].as_u64().is_some_and(|n| n >= 13), "{event}");
        } else {
            assert_eq!(text, message);
        }
        assert_eq!((&event["stage"], &event["status"]), (&json!("completed"), &json!(status)), "{event}");
        assert_eq!((&event["started_at"], &event["ended_at"]), (&event["timestamp"], &event["timestamp"]));
        assert_eq!(event["source"], "webhook");
    }
    assert_eq!(server.list("/sync/runs?source=webhook&status=skipped").await.len(), 1);
    world.control("fault", json!({"faults": ["inactive=1"]})).await;
    let id = accept(&world.engine, world.connection, 3, RunSource::Webhook).await;
    let run = world.finish(id).await;
    let events = told(&server, world.user).await;
    let event = events.last().expect("one");
    assert_eq!((&event["stage"], &event["status"]), (&json!("failed"), &json!("failed")), "{event}");
    assert_eq!((event["error"].as_str(), events.len()), (run.reason.as_deref(), 3));
}

async fn put_back(shape: Shape) {
    let now: DateTime<chrono::Utc> = "2026-02-06T00:00:00Z".parse().expect("an instant");
    let quota = [("WEARSYNC_PROVIDERS__STRAVA__QUOTA", "6/15m")];
    let options = Options { epoch: Some(now), ..small() };
    let world = World::with(shape, options, Clock::mock(now), &quota).await;
    let server = Server::start(&world.engine).await;
    let id = world.accept(&SyncRequest::default()).await;
    sync::execute(&world.engine, id).await.expect("executes");
    assert_eq!(world.run(id).await.run_state(), RunState::Waiting);
    let runs = server.list("/sync/runs").await;
    assert_eq!((&runs[0]["stage"], &runs[0]["status"]), (&json!("fetching"), &json!("in_progress")));
    assert_eq!(server.list("/sync/runs?status=in_progress").await.len(), 1);
    let run = world.finish(id).await;
    assert!(run.epoch > 1, "{run:?}");
    let stages: Vec<String> = words(&told(&server, world.user).await).into_iter().map(|(stage, ..)| stage).collect();
    assert_eq!(stages, ["started", "fetching", "completed"], "each is told once, however often it is claimed");
}

async fn lists(shape: Shape) {
    let world = World::new(shape, small()).await;
    let engine = &world.engine;
    let server = Server::start(engine).await;
    let other = engine.db.insert_user(NewUser::default(), engine.clock.now()).await.expect("a user").id;
    let (mine, theirs) = (connection(engine, world.user, "polar").await, connection(engine, other, "polar").await);
    let mut ids = Vec::new();
    for n in 0..6 {
        ids.push(short_run(engine, if n % 2 == 0 { mine } else { theirs }, "{}").await);
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    ids.reverse();
    let found = async |query: String| -> Vec<Value> {
        server.list(&query).await.iter().map(|run| run["run_id"].clone()).collect()
    };
    assert_eq!(found("/sync/runs".to_owned()).await, ids.iter().map(|id| json!(id)).collect::<Vec<_>>());
    assert_eq!(found("/sync/runs?limit=2".to_owned()).await, [json!(ids[0]), json!(ids[1])]);
    let of_user = found(format!("/sync/runs?user_id={other}")).await;
    assert_eq!(of_user, [json!(ids[0]), json!(ids[2]), json!(ids[4])]);
    assert_eq!(found(format!("/users/{other}/sync/runs?limit=2")).await, of_user[..2]);
    assert_eq!(server.list(&format!("/users/{other}/sync/recent?limit=5")).await.len(), 5);
    for (query, n) in [
        ("provider=polar", 6),
        ("provider=polar&status=success&source=pull", 6),
        ("provider=strava", 0),
        ("provider=nonsense", 0),
        ("status=failed", 0),
        ("status=nonsense", 0),
        ("source=sdk", 0),
        ("source=nonsense", 0),
        ("user_id=00000000-0000-0000-0000-000000000000", 0),
    ] {
        assert_eq!(found(format!("/sync/runs?{query}")).await.len(), n, "{query}");
    }
    // One query each, besides the key's.
    for path in [format!("/users/{other}/sync/recent"), format!("/users/{other}/sync/runs"), "/sync/runs".to_owned()] {
        let before = engine.db.statements();
        server.list(&path).await;
        assert_eq!(engine.db.statements() - before, 2, "{path}");
    }
}

/// A second process on the same place.
async fn second(world: &World, settings: &[(&str, &str)]) -> Arc<Engine> {
    support::engine(&world.place, &world.sim.url(), world.clock.clone(), settings).await
}

async fn across(shape: Shape) {
    let world = World::new(shape, small()).await;
    // Without Redis the other process is not heard, and its rows are found with the next heartbeat.
    let beat = if shape == Shape::Sqlite { "200ms" } else { "15s" };
    let listening = second(&world, &[("WEARSYNC_EVENT_HEARTBEAT", beat)]).await;
    let server = Server::start(&listening).await;
    let mut streams = [server.listen(world.user, "", None).await, server.listen(world.user, "", None).await];
    if shape == Shape::Postgres {
        until_heard(&listening, world.user).await;
    }
    let id = world.accept(&SyncRequest::default()).await;
    let begun = std::time::Instant::now();
    world.finish(id).await;
    for stream in &mut streams {
        let events = stream.events(3).await;
        assert_eq!(events, told(&server, world.user).await);
    }
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}: by the heartbeat, not by Redis", begun.elapsed());
}

/// Waits until what is published comes back through Redis.
async fn until_heard(engine: &Engine, user: UserId) {
    use futures::StreamExt as _;
    let mut told = engine.shared.subscribe(user);
    for _ in 0..100 {
        engine.tell_news(user).await;
        if tokio::time::timeout(Duration::from_millis(100), told.next()).await.is_ok() {
            return;
        }
    }
    panic!("Redis does not tell");
}

async fn without_redis(shape: Shape) {
    let world = World::new(shape, small()).await;
    let mut settings = vec![("WEARSYNC_EVENT_HEARTBEAT", "200ms")];
    if shape == Shape::Postgres {
        settings.push(("REDIS_URL", "redis://127.0.0.1:1"));
    }
    let listening = second(&world, &settings).await;
    let server = Server::start(&listening).await;
    let mut stream = server.listen(world.user, "", None).await;
    for since in 1..=3 {
        let id = accept(&world.engine, world.connection, since, RunSource::Pull).await;
        world.finish(id).await;
    }
    let heard = stream.events(9).await;
    assert_eq!(heard, told(&server, world.user).await);
}

/// Runs of two connections of one user, by two processes at once: their numbers cross all the time.
async fn produce(world: &World, other: &Arc<Engine>, runs: usize) -> Vec<tokio::task::JoinHandle<()>> {
    let mut tasks = Vec::new();
    for (engine, provider) in [(&world.engine, "polar"), (other, "suunto")] {
        let connection = connection(engine, world.user, provider).await;
        let engine = engine.clone();
        tasks.push(tokio::spawn(async move {
            for _ in 0..runs {
                short_run(&engine, connection, "{}").await;
            }
        }));
    }
    tasks
}

async fn reconnect(shape: Shape) {
    let world = World::new(shape, small()).await;
    let other = second(&world, &[("WEARSYNC_EVENT_HEARTBEAT", "300ms")]).await;
    let server = Server::start(&other).await;
    let runs = 80;
    let producing = produce(&world, &other, runs).await;
    let mut heard: Vec<String> = Vec::new();
    let mut connects = 0;
    while heard.len() < runs * 4 {
        // Nothing was seen yet: from the very beginning.
        let last = heard.last().map_or("", String::as_str);
        let mut stream = server.listen(world.user, "?replay=200", Some(last)).await;
        connects += 1;
        for _ in 0..(7 + connects % 20).min(runs * 4 - heard.len()) {
            heard.extend(ids(&[stream.event().await]));
        }
    }
    for task in producing {
        task.await.expect("produces");
    }
    let mut written = Vec::new();
    for row in world.engine.db.list_run_events_after(world.user, 0, 10_000).await.expect("reads") {
        assert_eq!(row.seq, i64::try_from(written.len()).expect("few") + 1, "without gaps");
        written.push(row.id.to_string());
    }
    assert_eq!(heard, written, "{connects} connects");
    assert!(connects > 10);
    // An id that nobody knows is no place to go on from: the replay is.
    let mut stream = server.listen(world.user, "?replay=2", Some("01980000-0000-7000-8000-000000000000")).await;
    assert_eq!(ids(&stream.events(2).await), written[written.len() - 2..]);
}

async fn beginning(shape: Shape) {
    let world = World::new(shape, small()).await;
    let other = second(&world, &[("WEARSYNC_EVENT_HEARTBEAT", "300ms")]).await;
    let server = Server::start(&other).await;
    let producing = produce(&world, &other, 60).await;
    let done = Arc::new(AtomicBool::new(false));
    let mut streams = Vec::new();
    for _ in 0..10 {
        let mut stream = server.listen(world.user, "?replay=5", None).await;
        let done = done.clone();
        streams.push(tokio::spawn(async move {
            let mut heard = ids(&[stream.event().await]);
            while !done.load(Ordering::SeqCst) {
                heard.extend(ids(&[stream.event().await]));
                if heard.len() > 3 && done.load(Ordering::SeqCst) {
                    break;
                }
            }
            heard
        }));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for task in producing {
        task.await.expect("produces");
    }
    done.store(true, Ordering::SeqCst);
    let rows = world.engine.db.list_run_events_after(world.user, 0, 10_000).await.expect("reads");
    let written: Vec<String> = rows.iter().map(|row| row.id.to_string()).collect();
    // One more wakes whoever has read everything.
    let wake = connection(&world.engine, world.user, "whoop").await;
    short_run(&world.engine, wake, "{}").await;
    for stream in streams {
        let heard = stream.await.expect("listens");
        let from = written.iter().position(|id| *id == heard[0]).expect("is written");
        let n = heard.len().min(written.len() - from);
        assert_eq!(heard[..n], written[from..from + n]);
        assert!(n >= 4, "{n}");
    }
}

async fn slow_reader(shape: Shape) {
    let world = World::new(shape, small()).await;
    let server = Server::start(&world.engine).await;
    let mut stream = server.listen(world.user, "", None).await;
    let connection = connection(&world.engine, world.user, "polar").await;
    // Far more than sockets and channel hold, because each event says what went wrong at length.
    let streams =
        json!({"activities": {"listed": 0, "inserted": 0, "updated": 0, "deleted": 0, "error": "x".repeat(200_000)}});
    let report = json!({ "streams": streams }).to_string();
    let runs = 60;
    for _ in 0..runs {
        short_run(&world.engine, connection, &report).await;
    }
    let heard = stream.events(runs * 2).await;
    let rows = world.engine.db.list_run_events_after(world.user, 0, 10_000).await.expect("reads");
    assert_eq!(ids(&heard), rows.iter().map(|row| row.id.to_string()).collect::<Vec<_>>());
}

async fn heartbeat(shape: Shape) {
    let world = World::with(shape, small(), Clock::system(), &[("WEARSYNC_EVENT_HEARTBEAT", "200ms")]).await;
    let mut server = Server::start(&world.engine).await;
    let mut stream = server.listen(world.user, "", None).await;
    for _ in 0..3 {
        assert_eq!(stream.frame().await.as_deref(), Some(": heartbeat"));
    }
    let began = std::time::Instant::now();
    world.engine.stop.cancel();
    assert_eq!(stream.frame().await, None, "the stream ends whole");
    (&mut server.task).await.expect("the server ends");
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
}

async fn ends(shape: Shape) {
    let clock = Clock::mock(DateTime::from_timestamp(1_773_100_800, 0).expect("an instant"));
    let world = World::with(shape, small(), clock, &[("WEARSYNC_EVENT_HEARTBEAT", "200ms")]).await;
    let (server, db, now) = (Server::start(&world.engine).await, &world.engine.db, || world.clock.now());
    let key = async |expires_at| {
        let secret = vault::new_api_key();
        let new = NewApiKey {
            hash: vault::hash_secret(secret.expose_secret()),
            prefix: "ws_test".to_owned(),
            name: "test".to_owned(),
            scopes: "read".to_owned(),
            expires_at,
            created_by: None,
        };
        (db.insert_api_key(new, now()).await.expect("a key").id, secret)
    };
    let begin = async |response: reqwest::Response| {
        let mut stream = Stream::new(response.error_for_status().expect("opens"));
        assert_eq!(stream.frame().await.as_deref(), Some(": connected"));
        assert_eq!(stream.frame().await.as_deref(), Some(": heartbeat"), "it goes on until then");
        stream
    };
    let url = format!("{}/api/v1/users/{}/sync/stream", server.url, world.user);
    let listen = async |name: &str, value: &str| {
        begin(server.http.get(&url).header(name, value).send().await.expect("answers")).await
    };
    // After what was on its way.
    let ended = async |mut stream: Stream| {
        let rest = async { while stream.frame().await.is_some() {} };
        tokio::time::timeout(Duration::from_secs(10), rest).await.expect("the stream ends");
    };
    let (revoked, secret) = key(None).await;
    let of_revoked = listen("X-API-Key", secret.expose_secret()).await;
    let (retired, secret) = key(None).await;
    let of_retired = listen("X-API-Key", secret.expose_secret()).await;
    let (_, secret) = key(Some(now() + chrono::Duration::minutes(10))).await;
    let of_expired = listen("X-API-Key", secret.expose_secret()).await;
    let password = secrecy::SecretString::from("correct horse battery".to_owned());
    let new = NewDeveloper {
        email: "ada@example.com".to_owned(),
        first_name: None,
        last_name: None,
        password_hash: vault::hash_password(&password),
    };
    db.insert_developer(new, now()).await.expect("a developer");
    let form = [("username", "ada@example.com"), ("password", password.expose_secret())];
    let login = server.http.post(format!("{}/api/v1/auth/login", server.url)).form(&form).send().await;
    let login: Value = login.expect("answers").json().await.expect("JSON");
    let bearer = format!("Bearer {}", login["access_token"].as_str().expect("a token"));
    let of_developer = listen("Authorization", &bearer).await;
    let mut stays = server.listen(world.user, "", None).await;

    db.revoke_api_key(revoked, now()).await.expect("revokes").expect("is there");
    ended(of_revoked).await;
    let next = NextApiKey {
        hash: vec![7; 32],
        prefix: "ws_next".to_owned(),
        created_by: None,
        old_until: now() + chrono::Duration::minutes(5),
    };
    db.rotate_api_key(retired, next, now()).await.expect("rotates").expect("is there");
    world.clock.set(now() + chrono::Duration::minutes(5));
    ended(of_retired).await;
    world.clock.set(now() + chrono::Duration::minutes(5));
    ended(of_expired).await;
    world.clock.set(now() + chrono::Duration::minutes(50));
    ended(of_developer).await;
    assert_eq!(stays.frame().await.as_deref(), Some(": heartbeat"), "others are not in it");

    // One who always has something to read is looked at, too.
    let (id, secret) = key(None).await;
    let mut busy = listen("X-API-Key", secret.expose_secret()).await;
    db.revoke_api_key(id, now()).await.expect("revokes").expect("is there");
    let stop = AtomicBool::new(false);
    let events = async {
        for since in 1.. {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let run = accept(&world.engine, world.connection, since, RunSource::Pull).await;
            db.cancel_run(run, now()).await.expect("cancels");
            world.engine.tell_news(world.user).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let reads = async {
        let read = async { while busy.frame().await.is_some() {} };
        let read = tokio::time::timeout(Duration::from_secs(10), read).await;
        stop.store(true, Ordering::Relaxed);
        read.expect("the stream ends");
    };
    tokio::join!(events, reads);

    sync::erase_user(&world.engine, world.user).await.expect("erases").expect("was there");
    ended(stays).await;
}

async fn growth(shape: Shape) {
    let now: DateTime<chrono::Utc> = "2026-02-06T00:00:00Z".parse().expect("an instant");
    let world = World::with(shape, small(), Clock::mock(now), &[]).await;
    let engine = &world.engine;
    let server = Server::start(engine).await;
    let connection = connection(engine, world.user, "polar").await;
    // One that waits for long, and many after it.
    let waiting = world.accept(&SyncRequest::default()).await;
    engine.db.claim_run(waiting, "test", now, now + chrono::Duration::days(9)).await.expect("claims").expect("is free");
    for _ in 0..10 {
        short_run(engine, connection, "{}").await;
    }
    let count = async || engine.db.list_run_events(world.user, 1000).await.expect("reads").len();
    assert_eq!(count().await, 21);
    let day = chrono::Duration::days(1);
    assert_eq!(engine.db.drop_run_events(now - day, 200).await.expect("drops"), 0);
    assert_eq!(
        engine.db.drop_run_events(now - day, 10).await.expect("drops"),
        5,
        "beyond the newest ten, not the last of a run"
    );
    assert_eq!(server.list("/sync/runs").await.len(), 11, "every run is still there");
    world.clock.set(now + day * 2);
    assert_eq!(engine.db.drop_run_events(now + day, 200).await.expect("drops"), 5);
    assert_eq!(count().await, 11);
    assert_eq!(server.list("/sync/runs").await.len(), 11);
    // The newest event is the place where the numbers go on.
    short_run(engine, connection, "{}").await;
    let newest = engine.db.newest_run_event_seq(world.user).await.expect("reads");
    assert_eq!(newest, 23);
}

async fn erased_run(shape: Shape) {
    let world = World::with(shape, small(), Clock::system(), &[("WEARSYNC_EVENT_HEARTBEAT", "200ms")]).await;
    let engine = &world.engine;
    let server = Server::start(engine).await;
    let connection = connection(engine, world.user, "polar").await;
    let mut stream = server.listen(world.user, "", Some("")).await;
    let first = short_run(engine, connection, "{}").await;
    assert_eq!(stream.events(2).await.len(), 2);
    let erase = "delete from runs where id = $1";
    match &engine.db {
        wearsync::storage::Db::Postgres(db) => {
            sqlx::query(erase).bind(first).execute(db.pool()).await.expect("erases");
        }
        wearsync::storage::Db::Sqlite(_) => {
            use sqlx::Connection as _;
            let mut own = sqlx::SqliteConnection::connect(&world.place.database).await.expect("opens");
            sqlx::query(erase).bind(first).execute(&mut own).await.expect("erases");
        }
    }
    assert!(told(&server, world.user).await.is_empty());
    // Who begins to listen now has missed nothing that is still there, and hears what comes.
    let mut late = server.listen(world.user, "", None).await;
    let second = short_run(engine, connection, "{}").await;
    for stream in [&mut stream, &mut late] {
        let events = stream.events(2).await;
        assert!(events.iter().all(|event| event["run_id"] == json!(second)), "{events:?}");
    }
    assert_eq!(engine.db.newest_run_event_seq(world.user).await.expect("reads"), 4);
}
