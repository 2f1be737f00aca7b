//! Webhooks over both shapes: what is believed, what is kept, and what becomes of it. The simulator sends its events over
//! real HTTP, in their real form.

use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use secrecy::SecretString;
use serde_json::{Value, json};
use sqlx::Connection as _;
use wearsync::api::{self, ApiState};
use wearsync::clock::Clock;
use wearsync::config::ProviderConfig;
use wearsync::model::{ConnectionId, Job, Kind, Normalized, PartName, ProviderName, RunId, RunState};
use wearsync::providers::webhook::{
    AppCalls, Digits, Handshake, Inbound, Made, Subscription, SubscriptionError, Subscriptions, Trust, Untrusted,
    WebhookSpec, is_signed,
};
use wearsync::providers::{
    Api, Coverage, FetchError, FetchedItem, FetchedPage, FetchedPart, LiveSpec, NormalizeError, PageRequest, PartBody,
    Provider, ProviderSpec,
};
use wearsync::simulator::Options;
use wearsync::storage::{Delivery, DeliveryFilter, NewApiKey, NewUser, Run, RunFilter};
use wearsync::sync::{self, Delivered, ProviderSetup, SubscribeError, Unwelcome};
use wearsync::{telemetry, vault};

use crate::both;
use crate::manage::{command, program};
use crate::oracle::{number, rows};
use crate::support::{Count, Place, Shape, World, client, query, truth};

both! {
    subscriptions_are_made_replaced_and_ended => subscriptions;
    what_is_not_believed_is_not_kept => forged;
    events_of_no_known_kind_are_acknowledged => unheard_of;
    what_another_process_subscribed_to_is_believed_at_once => elsewhere;
    signatures_where_a_setting_asks_for_them => signed;
    an_event_fetches_exactly_what_it_names => exact;
    twice_and_out_of_order_have_their_effect_once => shuffled;
    a_deauthorisation_is_confirmed_first => deauthorised;
    a_stranger_may_connect_within_a_day => stranger;
    what_is_not_there_yet_is_asked_for_again => not_yet;
    deliveries_are_replayed_and_grow_old => replayed;
    whoever_is_erased_is_in_no_delivery => erased;
    deliveries_over_the_api => over_the_api;
    a_delivery_that_kills_its_workers_is_parked => parked;
    the_sweep_finds_what_nobody_was_told_of => swept;
    a_new_address_that_fails_leaves_the_old_one => restored;
    who_wants_pushes_is_subscribed => switched;
    other_providers_have_other_secrets => others;
    an_answer_comes_in_time_or_is_a_refusal => in_time;
    two_users_of_one_account_have_an_event_each => shared;
    what_becomes_public_again_comes_back => privacy;
    an_import_of_one_user_keeps_nobody_waiting => import;
    all_of_it_by_command => commands;
}

const NOW: &str = "2026-05-05T12:00:00Z";

/// A world whose API is served, so that the simulator can call it.
struct Service {
    world: World,
    url: String,
    key: String,
    http: reqwest::Client,
    served: tokio::task::JoinHandle<()>,
}

impl Drop for Service {
    fn drop(&mut self) {
        self.served.abort();
    }
}

fn small() -> Options {
    Options {
        activities: 12,
        stream_points: 20,
        athletes: 2,
        manual_share: 0.0,
        private_share: 0.0,
        awkward: false,
        event_retry_ms: 20,
        ..Options::default()
    }
}

impl Service {
    async fn new(shape: Shape, options: Options, clock: Clock, settings: &[(&str, &str)]) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let settings = [settings, &[("WEARSYNC_PUBLIC_URL", url.as_str())]].concat();
        let world = World::with(shape, options, clock, &settings).await;
        let secret = vault::new_api_key();
        let secret = secrecy::ExposeSecret::expose_secret(&secret);
        let key = NewApiKey {
            hash: vault::hash_secret(secret),
            prefix: "ws_test".to_owned(),
            name: "test".to_owned(),
            scopes: "admin".to_owned(),
            expires_at: None,
            created_by: None,
        };
        world.engine.db.insert_api_key(key, world.clock.now()).await.expect("a key");
        let metrics = telemetry::install_metrics();
        let router = api::router(ApiState { engine: world.engine.clone(), metrics, metrics_need_key: false });
        let served = tokio::spawn(async move { axum::serve(listener, router).await.expect("serves") });
        Self { world, url, key: secret.to_owned(), http: client(), served }
    }

    async fn call(&self, method: &str, path: &str) -> (u16, Value) {
        let method = method.parse().expect("a method");
        let call = self.http.request(method, format!("{}{path}", self.url)).header("x-api-key", &self.key);
        let answer = call.send().await.expect("answers");
        (answer.status().as_u16(), answer.json().await.expect("JSON"))
    }

    async fn set_mode(&self, mode: &str) -> (u16, Value) {
        let url = format!("{}/api/v1/oauth/providers/strava", self.url);
        let call = self.http.put(url).header("x-api-key", &self.key).json(&json!({"live_sync_mode": mode}));
        let answer = call.send().await.expect("answers");
        (answer.status().as_u16(), answer.json().await.expect("JSON"))
    }

    /// Where the provider sends its events.
    async fn addresses(&self) -> Vec<String> {
        let (_, listed) = self.call("GET", "/api/v1/providers/strava/webhooks/subscriptions").await;
        let listed = listed["subscriptions"].as_array().expect("a list");
        listed.iter().map(|one| one["callback_url"].as_str().expect("an address").to_owned()).collect()
    }

    async fn has(&self, connection: ConnectionId, id: u64) -> bool {
        let found = self.world.engine.db.find_start(connection, Kind::Workout, &id.to_string()).await.expect("reads");
        found.is_some_and(|(_, deleted)| !deleted)
    }

    /// Subscribes; answers the path of the callback.
    async fn subscribe(&self) -> String {
        let path = format!("/api/v1/providers/strava/webhooks/subscriptions?callback_url={}", self.url);
        let (status, body) = self.call("POST", &path).await;
        assert_eq!((status, &body["subscriptions"][0]["status"]), (200, &json!("created")), "{body}");
        let callback = body["subscriptions"][0]["callback_url"].as_str().expect("an address");
        callback.strip_prefix(&self.url).expect("ours").to_owned()
    }

    async fn post(&self, path: &str, body: impl Into<reqwest::Body>, signature: Option<&str>) -> (u16, Value) {
        let mut call = self.http.post(format!("{}{path}", self.url)).header("content-type", "application/json");
        if let Some(signature) = signature {
            call = call.header("X-Strava-Signature", signature);
        }
        let answer = call.body(body).send().await.expect("answers");
        (answer.status().as_u16(), answer.json().await.expect("JSON"))
    }

    async fn deliveries(&self) -> Vec<Delivery> {
        let filter = DeliveryFilter { limit: 10_000, ..DeliveryFilter::default() };
        self.world.engine.db.list_deliveries(&filter).await.expect("lists")
    }

    async fn runs(&self) -> Vec<Run> {
        self.world.engine.db.list_runs(&RunFilter { limit: 10_000, ..RunFilter::default() }).await.expect("lists")
    }

    /// Waits until the simulator has sent all that it has to send.
    async fn until_sent(&self) -> Value {
        loop {
            let ledger = self.world.ask("ledger").await;
            if ledger["ledger"]["events"]["due"] == 0 {
                return ledger["ledger"]["events"].clone();
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }

    /// Works until nothing is due any more.
    async fn work(&self) {
        let engine = &self.world.engine;
        for _ in 0..1000 {
            sync::sweep(engine).await.expect("sweeps");
            let mut worked = false;
            while let Some(job) = engine.shared.pop(engine.clock.now_ms()).await.expect("pops") {
                worked |= match job {
                    Job::Run(id) => sync::execute(engine, id).await.expect("executes") != sync::Executed::NotTaken,
                    Job::Delivery(id) => sync::deliver(engine, id).await.expect("delivers") != Delivered::NotTaken,
                };
            }
            if !worked {
                return;
            }
        }
        panic!("there is always something to do");
    }

    /// Calls of the API so far, by endpoint.
    async fn calls(&self) -> [u64; 3] {
        let ledger = self.world.ask("ledger").await;
        ["list", "detail", "streams"].map(|name| ledger["ledger"]["calls"][name].as_u64().unwrap_or(0))
    }

    async fn calls_of(&self, what: impl Future<Output = Value>) -> [u64; 3] {
        let before = self.calls().await;
        what.await;
        self.until_sent().await;
        self.work().await;
        self.later();
        let after = self.calls().await;
        std::array::from_fn(|n| after[n] - before[n])
    }

    /// Events are told apart by the second.
    fn later(&self) {
        self.world.clock.set(self.world.clock.now() + chrono::Duration::seconds(5));
    }

    async fn newest(&self) -> u64 {
        let truth = truth(&self.http, &self.world.sim.url(), 0).await;
        let newest = truth.iter().filter(|(_, t)| !t.deleted).max_by_key(|(_, t)| t.start).expect("one");
        newest.0.parse().expect("a number")
    }
}

fn event(object: &str, id: u64, aspect: &str, owner: u64, time: u64) -> String {
    json!({"object_type": object, "object_id": id, "aspect_type": aspect, "updates": {}, "owner_id": owner,
        "subscription_id": 318_842, "event_time": time})
    .to_string()
}

async fn subscriptions(shape: Shape) {
    let service = Service::new(shape, small(), Clock::system(), &[]).await;
    let base = "/api/v1/providers/strava/webhooks";
    let (status, body) = service.call("GET", &format!("{base}/subscriptions")).await;
    assert_eq!((status, body), (200, json!({"subscriptions": []})));
    let (status, body) = service.call("POST", &format!("{base}/subscriptions")).await;
    assert_eq!((status, &body["detail"]), (400, &json!("Field required")));
    let (status, body) = service.call("POST", &format!("{base}/subscriptions?callback_url=nowhere")).await;
    assert_eq!(status, 400, "{body}");

    let callback = service.subscribe().await;
    assert!(callback.starts_with(&format!("{base}/")) && callback.len() > base.len() + 30, "{callback}");
    let (_, listed) = service.call("GET", &format!("{base}/subscriptions")).await;
    assert_eq!(listed["subscriptions"][0]["callback_url"], json!(format!("{}{callback}", service.url)));
    // The token at the end, or the whole address: the same.
    for address in [service.url.clone(), format!("{}{callback}", service.url), format!("{}{base}/", service.url)] {
        let (_, body) = service.call("POST", &format!("{base}/subscriptions?callback_url={address}")).await;
        assert_eq!(body["subscriptions"][0]["status"], "skipped", "{address}: {body}");
    }
    let old = format!("{}/api/v1/strava/webhook", service.url);
    let (_, body) = service.call("POST", &format!("{base}/subscriptions?callback_url={old}")).await;
    assert_eq!(body["subscriptions"][0]["status"], "updated", "{body}");
    assert_eq!(body["subscriptions"][0]["id"], "318843");
    // An address that answers no challenge.
    let nobody = "http://127.0.0.1:9";
    let (status, body) = service.call("POST", &format!("{base}/subscriptions?callback_url={nobody}")).await;
    assert_eq!((status, &body["subscriptions"][0]["status"]), (200, &json!("error")), "{body}");
    let why = body["subscriptions"][0]["error"].as_str().unwrap_or_default();
    assert!(why.contains("not verifiable") && why.contains("as before"), "{body}");

    for (method, path, expected, detail) in [
        ("GET", "strava/webhooks/subscriptions/1", 501, "Provider 'strava' does not support"),
        ("PUT", "strava/webhooks/subscriptions/1?callback_url=x", 501, "Provider 'strava' does not support"),
        ("PUT", "strava/webhooks/subscriptions/1", 400, "Field required"),
        ("POST", "strava/webhooks/subscriptions/renew", 501, "Provider 'strava' does not support"),
        ("GET", "nobody/webhooks/subscriptions", 404, "Unknown provider: 'nobody'"),
        ("GET", "nobody/webhooks", 404, "Unknown provider: 'nobody'"),
        ("POST", "nobody/webhooks", 404, "Unknown provider: 'nobody'"),
        ("DELETE", "strava/webhooks", 405, "Method Not Allowed"),
        ("GET", "strava/webhooks", 400, "Invalid hub.mode"),
        ("GET", "strava/webhooks?hub.mode=subscribe&hub.verify_token=x&hub.challenge=1", 403, "Invalid verify token"),
    ] {
        let (status, body) = service.call(method, &format!("/api/v1/providers/{path}")).await;
        let told = body["detail"].as_str().unwrap_or_default();
        assert!(status == expected && told.starts_with(detail), "{method} {path}: {status} {body}");
    }
    let (status, health) = service.call("GET", "/api/v1/strava/webhooks/health").await;
    assert_eq!((status, &health), (200, &json!({"status": "ok", "service": "strava-webhooks"})));
    assert_eq!(service.call("GET", "/api/v1/strava/webhook/health").await, (200, health));
    for path in ["/api/v1/strava/webhooks", "/api/v1/strava/webhook", "/api/v1/strava/webhooks/x"] {
        let (status, body) = service.call("GET", path).await;
        assert_eq!((status, &body["detail"]), (400, &json!("Invalid hub.mode")), "{path}");
    }

    let callback = {
        let path = format!("{base}/subscriptions?callback_url={}", service.url);
        let (_, body) = service.call("POST", &path).await;
        assert_eq!(body["subscriptions"][0]["status"], "updated", "the one before it was made again: {body}");
        body["subscriptions"][0]["id"].as_str().expect("an id").to_owned()
    };
    let (status, body) = service.call("DELETE", &format!("{base}/subscriptions/{callback}")).await;
    assert_eq!((status, body), (200, json!({"deleted": {"id": callback, "status": "deleted"}})));
    let (_, listed) = service.call("GET", &format!("{base}/subscriptions")).await;
    assert_eq!(listed, json!({"subscriptions": []}));
}

async fn forged(shape: Shape) {
    let service = Service::new(shape, small(), Clock::system(), &[]).await;
    let plain = "/api/v1/providers/strava/webhooks";
    let good = event("activity", 1, "create", 70_412_355, 5);
    let (status, body) = service.post(plain, good.clone(), None).await;
    assert_eq!((status, &body["code"]), (404, &json!("webhooks_off")), "nothing is subscribed to: {body}");
    let callback = service.subscribe().await;
    let wrong = format!("{}A", &callback[..callback.len() - 1]);
    let other = good.replace("318842", "318843");
    let without = good.replace("\"subscription_id\":318842,", "");
    for (path, body, expected, detail) in [
        (plain, good.clone(), 401, "Invalid webhook signature"),
        ("/api/v1/strava/webhooks", good.clone(), 401, "Invalid webhook signature"),
        (&wrong, good.clone(), 401, "Invalid webhook signature"),
        (&callback, other, 401, "Invalid webhook signature"),
        (&callback, without, 401, "Invalid webhook signature"),
        (&callback, "{".to_owned(), 400, "Invalid JSON body"),
        (&callback, String::new(), 400, "Invalid JSON body"),
        (&callback, "[]".to_owned(), 400, "Invalid JSON body"),
        (&wrong, "{".to_owned(), 401, "Invalid webhook signature"),
        (&callback, " ".repeat((1 << 20) + 1), 413, "Request body is larger"),
    ] {
        let (status, answer) = service.post(path, body.clone(), None).await;
        let told = answer["detail"].as_str().unwrap_or_default();
        assert!(status == expected && told.starts_with(detail), "{path} {status} {answer}");
    }
    // In pieces, so that no length is announced.
    let pieces = futures::stream::iter((0..20).map(|_| Ok::<_, std::io::Error>(vec![b' '; 100_000])));
    let (status, _) = service.post(&callback, reqwest::Body::wrap_stream(pieces), None).await;
    assert_eq!(status, 413);
    // No ids of Strava's: they would become parts of a path.
    for id in ["\"a\\u0000b\"", "\"../../oauth/token\"", "-5", "0", "\"\"", "[]"] {
        for member in ["\"object_id\":1,", "\"owner_id\":70412355,"] {
            let name = member.split(':').next().expect("a name");
            let body = good.replace(member, &format!("{name}:{id},"));
            assert!(body != good);
            let (status, answer) = service.post(&callback, body.clone(), None).await;
            assert_eq!((status, &answer["detail"]), (400, &json!("Invalid JSON body")), "{body}");
        }
    }
    assert!(service.deliveries().await.is_empty(), "something forged was kept");
    for _ in 0..3 {
        let (status, body) = service.post(&callback, good.clone(), None).await;
        assert_eq!((status, body), (200, json!({"status": "accepted"})));
    }
    let kept = service.deliveries().await;
    assert_eq!(kept.len(), 1);
    assert_eq!(kept[0].headers, json!({"content-type": "application/json"}).to_string());
    let sealed = service.world.engine.db.find_delivery_body(kept[0].id).await.expect("reads").expect("is there");
    assert!(!sealed.windows(8).any(|window| window == b"70412355"), "the body is not sealed");
    let body = sync::delivery_body(&service.world.engine, kept[0].id).await.expect("opens");
    assert_eq!(body.as_deref(), Some(good.as_bytes()));
}

/// What Strava may send one day is acknowledged, and nothing is fetched for it.
async fn unheard_of(shape: Shape) {
    let service = Service::new(shape, small(), Clock::mock(NOW.parse().expect("an instant")), &[]).await;
    service.world.sync().await;
    let callback = service.subscribe().await;
    let runs = service.runs().await.len();
    let before = service.calls().await;
    let sent = [
        event("activity", 1, "foo", 70_412_355, 1),
        event("a\0b", 1, "create", 70_412_355, 2),
        event("activity", 1, &"x".repeat(10_000), 70_412_355, 3),
        // Nor does a person whom we do not know have to be waited for.
        event("route", 1, "create", 5, 4),
    ];
    for body in &sent {
        for _ in 0..2 {
            assert_eq!(service.post(&callback, body.clone(), None).await.0, 200);
        }
    }
    service.work().await;
    let kept = service.deliveries().await;
    assert!(kept.len() == sent.len() && kept.iter().all(|one| one.state == "done"), "{kept:?}");
    assert_eq!((service.runs().await.len(), service.calls().await), (runs, before));
}

/// Another process subscribes: what this one saw a moment ago does not keep it from answering the challenge, or from
/// believing the events that come.
async fn elsewhere(shape: Shape) {
    let service = Service::new(shape, small(), Clock::system(), &[]).await;
    let engine = &service.world.engine;
    let other = crate::support::engine(&service.world.place, &service.world.sim.url(), Clock::system(), &[]).await;
    let setup = other.provider("strava").expect("strava");
    let address = sync::callback_url(&other, setup, &service.url).expect("an address");
    let path = address.strip_prefix(&service.url).expect("ours").to_owned();
    let told = |n| event("activity", 1, "create", 70_412_355, n).replace("318842", &(318_841 + n).to_string());
    for n in 1..6 {
        assert_eq!(service.post(&path, told(n), None).await.0, 404, "nothing is subscribed to, {n}");
        let made = sync::subscribe(&other, setup, &address).await;
        let (_, made) = made.unwrap_or_else(|why| panic!("{n}: {why}"));
        assert_eq!(made.external_id, (318_841 + n).to_string());
        assert_eq!(service.post(&path, told(n), None).await.0, 200, "{n}");
        // Made anew, under another id.
        let strava = engine.provider("strava").expect("strava");
        if n % 2 == 1 {
            sync::unsubscribe(&other, setup, &made.external_id).await.expect("ends it");
        } else {
            sync::unsubscribe(engine, strava, &made.external_id).await.expect("ends it");
        }
    }
    // Many who are not believed wait for one look together: one each 50 ms, however long it takes to ask.
    let (begun, before) = (Instant::now(), engine.db.statements());
    let forged = (0..200).map(|_| service.post("/api/v1/providers/strava/webhooks", told(9), None));
    let answers = futures::future::join_all(forged).await;
    assert!(answers.iter().all(|(status, _)| matches!(status, 401 | 404)), "{answers:?}");
    let (took, looks) = (begun.elapsed(), engine.db.statements() - before);
    assert!(u128::from(looks) <= took.as_millis() / 50 + 2, "{looks} looks in {took:?}");
    assert!(looks < 100, "each waited for its own look: {looks} in {took:?}");
}

async fn signed(shape: Shape) {
    let settings = [("WEARSYNC_PROVIDERS__STRAVA__WEBHOOK_SIGNATURE", "true")];
    let service = Service::new(shape, Options { sign_events: true, ..small() }, Clock::system(), &settings).await;
    let callback = service.subscribe().await;
    service.world.sync().await;
    service.world.control("upload", json!({"athlete": 0})).await;
    let events = service.until_sent().await;
    assert_eq!((&events["acknowledged"], &events["given_up"]), (&json!(1), &json!(0)), "{events}");
    assert_eq!(service.deliveries().await.len(), 1);
    let good = event("activity", 1, "create", 70_412_355, 5);
    for signature in [None, Some("t=1,v1=00"), Some("nonsense")] {
        let (status, _) = service.post(&callback, good.clone(), signature).await;
        assert_eq!(status, 401, "{signature:?}");
    }
    assert_eq!(service.deliveries().await.len(), 1);
    service.work().await;
    service.world.check().await;
}

async fn exact(shape: Shape) {
    let service = Service::new(shape, small(), Clock::mock(NOW.parse().expect("an instant")), &[]).await;
    let world = &service.world;
    world.sync().await;
    service.subscribe().await;
    // Its start, its row, its streams.
    let calls = service.calls_of(world.control("upload", json!({"athlete": 0, "manual": false}))).await;
    assert_eq!(calls, [1, 1, 1], "list, detail, streams of an upload");
    world.check().await;
    let id = service.newest().await;
    let calls = service.calls_of(world.control("edit", json!({"athlete": 0, "id": id, "name": "Abendrunde 🌙"}))).await;
    assert_eq!(calls, [1, 0, 0], "of a new title");
    world.check().await;
    let calls = service.calls_of(world.control("edit", json!({"athlete": 0, "id": id, "private": true}))).await;
    assert_eq!(calls, [1, 0, 0], "of a new privacy, with the right to see it");
    // Said to be gone, and there.
    let lie = json!({"athlete": 0, "object_type": "activity", "object_id": id, "aspect_type": "delete"});
    assert_eq!(service.calls_of(world.control("event", lie)).await, [0, 1, 0], "of a delete that is none");
    world.check().await;
    let calls = service.calls_of(world.control("delete", json!({"athlete": 0, "id": id}))).await;
    assert_eq!(calls, [0, 1, 0], "of a delete");
    world.check().await;
    // An update of what is deleted comes late: nothing is there, and nothing comes back.
    let late = json!({"athlete": 0, "object_type": "activity", "object_id": id, "aspect_type": "update",
        "updates": {"title": "late"}});
    assert_eq!(service.calls_of(world.control("event", late)).await, [1, 1, 0], "of an update after the delete");
    world.check().await;
    // The other athlete is nobody of ours.
    let strange = json!({"athlete": 1, "object_type": "athlete", "aspect_type": "update"});
    assert_eq!(service.calls_of(world.control("event", strange)).await, [0, 0, 0]);
    for delivery in service.deliveries().await {
        assert_eq!(delivery.state, "done", "{delivery:?}");
    }
    for run in service.runs().await {
        assert_eq!(run.run_state(), RunState::Success, "{run:?}");
    }
    let calls = service.calls_of(world.control("upload", json!({"athlete": 0, "manual": true}))).await;
    assert_eq!(calls, [1, 1, 0], "of what was typed in by hand");
    world.check().await;
    let told =
        world.engine.db.list_deliveries(&DeliveryFilter { limit: 1, ..Default::default() }).await.expect("lists");
    let items = world.engine.db.list_delivery_items(told[0].id).await.expect("lists");
    assert_eq!((items.len(), items[0].state.as_str(), items[0].connection_id), (1, "accepted", Some(world.connection)));
    let run = world.run(items[0].run_id.expect("a run")).await;
    assert_eq!((run.source.as_str(), run.class), ("webhook", 1));
}

async fn shuffled(shape: Shape) {
    let options = Options { duplicate_events: 0.5, late_events: 0.5, ..small() };
    let service = Service::new(shape, options, Clock::system(), &[]).await;
    let world = &service.world;
    world.sync().await;
    service.subscribe().await;
    let working = tokio::spawn(wearsync::worker::work(world.engine.clone()));
    let start = world.clock.now() - chrono::Duration::hours(20);
    let mut events = 0;
    for n in 0..8 {
        let at = (start + chrono::Duration::minutes(30 * n)).to_rfc3339();
        let made = world.control("upload", json!({"athlete": 0, "start": at, "elapsed_time": 60})).await;
        events += 1;
        if n % 2 == 0 {
            world.control("edit", json!({"athlete": 0, "id": made["id"], "name": format!("Title {n}")})).await;
            events += 1;
        }
        if n % 4 == 0 {
            world.control("delete", json!({"athlete": 0, "id": made["id"]})).await;
            events += 1;
        }
    }
    let told = service.until_sent().await;
    assert!(told["sent"].as_u64().expect("a number") > events, "no event was sent twice: {told}");
    assert_eq!(told["given_up"], 0, "{told}");
    assert_eq!(service.deliveries().await.len() as u64, events);
    // An upload that is gone before it is looked for waits for some minutes: nothing else may be left.
    let waits = |run: &Run| run.run_state() == RunState::Waiting && run.committed == 0;
    for _ in 0..1000 {
        let open = service.runs().await.into_iter().filter(|run| !run.run_state().is_final() && !waits(run)).count();
        let queued = service.deliveries().await.iter().filter(|delivery| delivery.state != "done").count();
        if open + queued == 0 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    world.engine.stop.cancel();
    working.await.expect("ends").expect("ends well");
    world.check().await;
}

async fn deauthorised(shape: Shape) {
    let service = Service::new(shape, small(), Clock::mock(NOW.parse().expect("an instant")), &[]).await;
    let world = &service.world;
    world.sync().await;
    service.subscribe().await;
    let status = async || {
        let views = world.engine.db.list_connections(Some(world.user)).await.expect("lists");
        (views[0].connection.status.clone(), views[0].account_status.clone())
    };
    let refreshes =
        async || world.ask("ledger").await["ledger"]["tokens"]["refresh_attempts"].as_u64().expect("a number");
    let before = refreshes().await;
    // Lies, in every form: a refresh tells so.
    for (aspect, updates) in
        [("update", json!({"authorized": "false"})), ("update", json!({"authorized": false})), ("delete", json!({}))]
    {
        let lie = json!({"athlete": 0, "object_type": "athlete", "aspect_type": aspect, "updates": updates});
        world.control("event", lie).await;
        service.until_sent().await;
        service.work().await;
        assert_eq!(status().await, ("active".to_owned(), "active".to_owned()));
        service.later();
    }
    assert_eq!(refreshes().await - before, 3, "each is confirmed by one refresh");
    world.sync().await;
    world.check().await;

    world.control("revoke", json!({"athlete": 0})).await;
    service.until_sent().await;
    service.work().await;
    assert_eq!(status().await, ("revoked".to_owned(), "reauth".to_owned()));
    let runs = service.runs().await;
    assert!(runs[0].reason.as_deref().is_some_and(|why| why.contains("took back")), "{:?}", runs[0]);
    // Events may go on for a while.
    service.later();
    let late = json!({"athlete": 0, "object_type": "athlete", "aspect_type": "delete"});
    world.control("event", late).await;
    service.until_sent().await;
    service.work().await;
    assert_eq!(service.runs().await.len(), runs.len(), "nobody acts on it");
    let views = world.engine.db.list_connections(Some(world.user)).await.expect("lists");
    assert_eq!(views.len(), 1);
    world.connect(world.user, 0).await;
    assert_eq!(status().await, ("active".to_owned(), "active".to_owned()));
    let run = world.sync().await;
    assert_eq!(run.run_state(), RunState::Success, "{run:?}");
}

async fn stranger(shape: Shape) {
    let clock = Clock::mock(NOW.parse().expect("an instant"));
    let service = Service::new(shape, small(), clock, &[]).await;
    let world = &service.world;
    let callback = service.subscribe().await;
    let athlete = world.ask("truth?athlete=1").await["athlete"].as_u64().expect("an id");
    let (id, _) = truth(&service.http, &world.sim.url(), 1).await.pop_first().expect("an activity");
    let id: u64 = id.parse().expect("a number");
    service.post(&callback, event("activity", id, "create", athlete, 5), None).await;
    service.post(&callback, event("activity", id, "create", 12_345, 5), None).await;
    service.work().await;
    let kept = service.deliveries().await;
    assert!(kept.iter().all(|delivery| delivery.state == "waiting" && delivery.due_at > world.clock.now()), "{kept:?}");

    // Connected, and named by the first call that is made with the grant.
    let user = world.engine.db.insert_user(NewUser::default(), world.clock.now()).await.expect("a user").id;
    let connection = world.connect(user, 1).await;
    let setup = world.engine.provider("strava").expect("strava");
    let token = world.engine.db.find_connection(connection).await.expect("reads").expect("is there").account_id;
    world.engine.db.name_account(token, &athlete.to_string(), world.clock.now()).await.expect("names");
    assert_eq!(setup.spec().name.0, "strava");
    world.clock.set(world.clock.now() + chrono::Duration::hours(1));
    service.work().await;
    let stored = world.engine.db.find_start(connection, wearsync::model::Kind::Workout, &id.to_string()).await;
    assert!(stored.expect("reads").is_some(), "the event came first, and was not lost");
    let states = |kept: &[Delivery]| kept.iter().map(|delivery| delivery.state.clone()).collect::<Vec<_>>();
    assert_eq!(states(&service.deliveries().await), ["waiting", "done"], "newest first");

    world.clock.set(world.clock.now() + chrono::Duration::hours(24));
    service.work().await;
    let kept = service.deliveries().await;
    assert_eq!(states(&kept), ["done", "done"]);
    let items = world.engine.db.list_delivery_items(kept[0].id).await.expect("lists");
    assert_eq!((items.len(), items[0].state.as_str()), (1, "dropped"));
    assert!(kept[0].attempts < 40, "it was looked for {} times", kept[0].attempts);
    // What speaks of nobody here goes with its body; of the other, the row stays for a month.
    let (stranger, known) = (kept[0].id, kept[1].id);
    for (hours, left) in [(71, vec![stranger, known]), (73, vec![known])] {
        world.clock.set(kept[0].ended_at.expect("is done") + chrono::Duration::hours(hours));
        sync::clean_up_deliveries(&world.engine).await.expect("cleans up");
        assert_eq!(service.deliveries().await.iter().map(|it| it.id).collect::<Vec<_>>(), left, "{hours} h");
    }
}

async fn not_yet(shape: Shape) {
    let clock = Clock::mock(NOW.parse().expect("an instant"));
    let service = Service::new(shape, small(), clock, &[]).await;
    let world = &service.world;
    world.sync().await;
    let callback = service.subscribe().await;
    let start = (world.clock.now() - chrono::Duration::hours(2)).to_rfc3339();
    world.control("fault", json!({"faults": ["404@detail=1*2"]})).await;
    world.control("upload", json!({"athlete": 0, "start": start})).await;
    service.until_sent().await;
    service.work().await;
    let begun = world.clock.now();
    let run = service.runs().await.remove(0);
    assert_eq!(run.run_state(), RunState::Waiting, "{run:?}");
    let run = world.finish(run.id).await;
    assert_eq!(run.run_state(), RunState::Success, "{run:?}");
    assert!(world.clock.now() - begun < chrono::Duration::minutes(1));
    world.check().await;

    // One that never comes is left alone, after some minutes and few calls.
    let before = service.calls().await;
    service.post(&callback, event("activity", 99, "create", 70_412_355, 6), None).await;
    service.work().await;
    let begun = world.clock.now();
    let run = world.finish(service.runs().await[0].id).await;
    assert_eq!(run.run_state(), RunState::Success, "{run:?}");
    assert!(run.report.as_deref().is_some_and(|report| report.contains("the next sync looks for it")), "{run:?}");
    let took = world.clock.now() - begun;
    assert!(took > chrono::Duration::minutes(5) && took < chrono::Duration::minutes(21), "{took}");
    let calls = service.calls().await[1] - before[1];
    assert!((4..10).contains(&calls), "{calls} calls");
    world.check().await;
}

async fn replayed(shape: Shape) {
    let clock = Clock::mock(NOW.parse().expect("an instant"));
    let service = Service::new(shape, small(), clock, &[]).await;
    let world = &service.world;
    world.sync().await;
    let callback = service.subscribe().await;
    let id = service.newest().await;
    service.post(&callback, event("activity", id, "update", 70_412_355, 5), None).await;
    service.work().await;
    let delivery = service.deliveries().await.remove(0);
    let first = world.engine.db.list_delivery_items(delivery.id).await.expect("lists")[0].run_id;
    assert!(sync::replay(&world.engine, delivery.id).await.expect("replays"));
    service.work().await;
    let items = world.engine.db.list_delivery_items(delivery.id).await.expect("lists");
    assert!(items.len() == 1 && items[0].run_id != first, "{items:?}");
    let run = world.run(items[0].run_id.expect("a run")).await;
    assert_eq!(run.run_state(), RunState::Success);
    assert!(run.report.as_deref().is_some_and(|report| report.contains("\"updated\":0")), "it writes nothing: {run:?}");
    world.check().await;

    // Its body outlives its work by three days, and the row goes after thirty.
    let connection = world.engine.db.find_connection(world.connection).await.expect("reads").expect("is there");
    assert_eq!(connection.status, "active");
    let later = async |hours: i64| {
        world.clock.set(delivery.received_at + chrono::Duration::hours(hours));
        sync::clean_up_deliveries(&world.engine).await.expect("cleans up");
        world.engine.db.find_delivery(delivery.id).await.expect("reads").map(|delivery| delivery.has_body)
    };
    assert_eq!(later(71).await, Some(true));
    assert_eq!(later(73).await, Some(false));
    assert!(!sync::replay(&world.engine, delivery.id).await.expect("answers"), "nothing is left to replay");
    assert_eq!(later(29 * 24).await, Some(false));
    assert_eq!(later(30 * 24 + 1).await, None);
}

async fn erased(shape: Shape) {
    let service = Service::new(shape, small(), Clock::mock(NOW.parse().expect("an instant")), &[]).await;
    let world = &service.world;
    world.sync().await;
    let callback = service.subscribe().await;
    let db = &world.engine.db;
    let ben = db.insert_user(NewUser::default(), world.clock.now()).await.expect("a user").id;
    let connection = world.connect(ben, 1).await;
    let mut owners = Vec::new();
    for athlete in 0..2 {
        let owner = world.ask(&format!("truth?athlete={athlete}")).await["athlete"].as_u64().expect("an id");
        owners.push(owner);
    }
    let account = db.find_connection(connection).await.expect("reads").expect("is there").account_id;
    db.name_account(account, &owners[1].to_string(), world.clock.now()).await.expect("names");
    // Of each, while connected and afterwards: providers go on for a while.
    for (user, owner) in [(world.user, owners[0]), (ben, owners[1])] {
        service.post(&callback, event("activity", owner + 1, "delete", owner, 1), None).await;
        service.post(&callback, event("activity", owner + 1, "foo", owner, 3), None).await;
        service.work().await;
        sync::disconnect(&world.engine, user, "strava").await.expect("disconnects");
        service.post(&callback, event("activity", owner + 1, "delete", owner, 2), None).await;
        service.post(&callback, event("activity", owner + 1, "foo", owner, 4), None).await;
        service.work().await;
    }
    let kept = service.deliveries().await;
    assert!(kept.len() == 8 && kept.iter().all(|it| it.state == "done"), "{kept:?}");
    let told = async || {
        let rows = crate::oracle::dump(db, &["deliveries", "delivery_items", "runs"]).await;
        owners.iter().map(|owner| format!("{rows:?}").contains(&owner.to_string())).collect::<Vec<_>>()
    };
    assert_eq!(told().await, [true, true]);
    sync::purge(&world.engine, ben, "strava").await.expect("purges");
    assert_eq!((service.deliveries().await.len(), told().await), (4, vec![true, false]));
    sync::erase_user(&world.engine, world.user).await.expect("erases");
    assert_eq!((service.deliveries().await.len(), told().await), (0, vec![false, false]));
}

async fn over_the_api(shape: Shape) {
    let service = Service::new(shape, small(), Clock::mock(NOW.parse().expect("an instant")), &[]).await;
    let world = &service.world;
    world.sync().await;
    let callback = service.subscribe().await;
    let id = service.newest().await;
    for n in 0..3 {
        service.post(&callback, event("activity", id, "update", 70_412_355, n), None).await;
    }
    let (status, page) = service.call("GET", "/api/v1/deliveries?limit=2&state=queued&provider=strava").await;
    assert_eq!((status, page["items"].as_array().map(Vec::len)), (200, Some(2)), "{page}");
    let before = page["next_before"].as_str().expect("a second page");
    let (_, page) = service.call("GET", &format!("/api/v1/deliveries?limit=2&before={before}")).await;
    assert_eq!((page["items"].as_array().map(Vec::len), &page["next_before"]), (Some(1), &Value::Null), "{page}");
    for delivery in service.deliveries().await {
        assert_eq!(sync::deliver(&world.engine, delivery.id).await.expect("delivers"), Delivered::Done);
    }
    service.work().await;
    let path = format!("/api/v1/deliveries/{}", page["items"][0]["id"].as_str().expect("an id"));
    let (_, one) = service.call("GET", &path).await;
    assert_eq!((&one["delivery"]["status"], &one["items"][0]["status"]), (&json!("done"), &json!("accepted")), "{one}");
    assert_eq!(one["items"][0]["notice"]["external_id"], json!(id.to_string()));
    assert!(!one.to_string().contains("aspect_type"), "the body is not told: {one}");
    // Three notices of one thing, before anybody worked on it, are one run.
    assert_eq!(service.runs().await.iter().filter(|run| run.source == "webhook").count(), 1);
    let (status, body) = service.call("POST", &format!("{path}/replay")).await;
    assert_eq!((status, &body["status"]), (200, &json!("queued")), "{body}");
    let (_, one) = service.call("GET", &path).await;
    assert_eq!((&one["delivery"]["status"], &one["items"]), (&json!("queued"), &json!([])), "{one}");
    service.work().await;
    world.clock.set(world.clock.now() + chrono::Duration::hours(80));
    sync::clean_up_deliveries(&world.engine).await.expect("cleans up");
    let (status, body) = service.call("POST", &format!("{path}/replay")).await;
    assert_eq!((status, &body["code"]), (409, &json!("not_replayable")), "{body}");
    let nobody = "/api/v1/deliveries/0198c0de-7e57-7a39-9d0c-2f8e1f0f4c77";
    for (method, path, expected) in [
        ("GET", nobody.to_owned(), 404),
        ("POST", format!("{nobody}/replay"), 404),
        ("GET", "/api/v1/deliveries/1".to_owned(), 400),
        ("GET", "/api/v1/deliveries?state=lost".to_owned(), 400),
        ("GET", "/api/v1/deliveries?provider=nobody".to_owned(), 400),
        ("GET", "/api/v1/deliveries?limit=0".to_owned(), 400),
    ] {
        let (status, body) = service.call(method, &path).await;
        assert_eq!(status, expected, "{method} {path}: {body}");
    }
    for (method, path) in [
        ("GET", "/api/v1/deliveries"),
        ("GET", nobody),
        ("GET", "/api/v1/providers/strava/webhooks/subscriptions"),
        ("POST", "/api/v1/providers/strava/webhooks/subscriptions?callback_url=x"),
        ("DELETE", "/api/v1/providers/strava/webhooks/subscriptions/1"),
    ] {
        let answer = service.http.request(method.parse().expect("a method"), format!("{}{path}", service.url));
        assert_eq!(answer.send().await.expect("answers").status(), 401, "{method} {path}");
    }
}

async fn parked(shape: Shape) {
    let clock = Clock::mock(NOW.parse().expect("an instant"));
    let service = Service::new(shape, small(), clock, &[]).await;
    let world = &service.world;
    let callback = service.subscribe().await;
    service.post(&callback, event("activity", 7, "update", 70_412_355, 5), None).await;
    let id = service.deliveries().await[0].id;
    let db = &world.engine.db;
    let mut last = None;
    for _ in 0..3 {
        let now = world.clock.now();
        let claim = db.claim_delivery(id, "dies", now, now + chrono::Duration::seconds(30)).await.expect("claims");
        let taken = db.claim_delivery(id, "other", now, now + chrono::Duration::seconds(30)).await.expect("answers");
        assert!(taken.is_none(), "two have it");
        last = claim;
        world.clock.set(now + chrono::Duration::seconds(31));
    }
    assert_eq!(sync::deliver(&world.engine, id).await.expect("answers"), Delivered::Failed);
    let delivery = db.find_delivery(id).await.expect("reads").expect("is there");
    assert!(delivery.state == "failed" && delivery.reason.is_some_and(|why| why.contains("died")));
    // Who comes back from the dead writes nothing.
    let end = wearsync::storage::DeliveryEnd::Done;
    let late = db.settle_delivery(&last.expect("a claim"), &[], &end, world.clock.now()).await;
    assert!(matches!(late, Err(wearsync::storage::Error::Fenced)), "{late:?}");
    assert!(sync::replay(&world.engine, id).await.expect("replays"));
    assert_eq!(
        sync::deliver(&world.engine, id).await.expect("answers"),
        Delivered::PutBack(world.clock.now() + chrono::Duration::milliseconds(46_500))
    );
}

async fn swept(shape: Shape) {
    let service = Service::new(shape, small(), Clock::system(), &[]).await;
    let world = &service.world;
    let callback = service.subscribe().await;
    service.post(&callback, event("activity", 7, "update", 70_412_355, 5), None).await;
    let engine = Arc::clone(&world.engine);
    let id = service.deliveries().await[0].id;
    assert_eq!(engine.shared.pop(engine.clock.now_ms()).await.expect("pops"), Some(Job::Delivery(id)));
    assert_eq!(engine.shared.pop(engine.clock.now_ms()).await.expect("pops"), None);
    assert_eq!(sync::sweep(&engine).await.expect("sweeps"), 1);
    assert_eq!(engine.shared.pop(engine.clock.now_ms()).await.expect("pops"), Some(Job::Delivery(id)));
    assert!(sync::deliver(&engine, id).await.is_ok());
    assert_eq!(sync::deliver(&engine, id).await.expect("answers"), Delivered::NotTaken);
    let unknown: Option<RunId> = service.runs().await.first().map(|run| run.id);
    assert_eq!(unknown, None, "an account that is pending is nobody yet");
}

async fn restored(shape: Shape) {
    let service = Service::new(shape, small(), Clock::system(), &[]).await;
    let world = &service.world;
    world.sync().await;
    let callback = format!("{}{}", service.url, service.subscribe().await);
    let other =
        format!("/api/v1/providers/strava/webhooks/subscriptions?callback_url={}/api/v1/strava/webhook", service.url);
    // List, end, and the third call, which makes the new one.
    world.control("fault", json!({"faults": ["500@push_subscriptions=1/3*1"]})).await;
    let (_, body) = service.call("POST", &other).await;
    let told = &body["subscriptions"][0];
    assert_eq!(told["status"], "error", "{body}");
    assert!(
        told["error"].as_str().is_some_and(|why| why.contains(&format!("events go to {callback} as before"))),
        "{body}"
    );
    assert_eq!(service.addresses().await, std::slice::from_ref(&callback));
    world.control("upload", json!({"athlete": 0})).await;
    assert_eq!(service.until_sent().await["acknowledged"], 1, "and they are believed");
    service.work().await;
    world.check().await;

    let faults = ["500@push_subscriptions=1/3*1", "503@push_subscriptions=1/4*1"];
    world.control("fault", json!({ "faults": faults })).await;
    let (_, body) = service.call("POST", &other).await;
    let why = body["subscriptions"][0]["error"].as_str().unwrap_or_default();
    assert!(why.contains("could not be subscribed again: Strava answered 503"), "{body}");
    assert_eq!(service.addresses().await, [""; 0]);
    let event = event("activity", 1, "create", 70_412_355, 5);
    let (status, body) = service.post(callback.strip_prefix(&service.url).expect("ours"), event, None).await;
    assert_eq!((status, &body["code"]), (404, &json!("webhooks_off")), "{body}");
}

async fn switched(shape: Shape) {
    let service = Service::new(shape, small(), Clock::system(), &[]).await;
    assert_eq!(service.set_mode("pull").await.0, 200);
    // It waits for nobody.
    service.world.control("fault", json!({"faults": ["slow@push_subscriptions=1:3000*1"]})).await;
    let begun = Instant::now();
    let (status, body) = service.set_mode("webhook").await;
    assert_eq!((status, &body["live_sync_mode"]), (200, &json!("webhook")), "{body}");
    assert!(begun.elapsed() < Duration::from_secs(2));
    let base = format!("{}/api/v1/providers/strava/webhooks/", service.url);
    for _ in 0..1000 {
        if let [callback] = service.addresses().await.as_slice() {
            assert!(callback.starts_with(&base) && callback.len() > base.len() + 30, "{callback}");
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(service.addresses().await.len(), 1);
    service.world.control("upload", json!({"athlete": 0})).await;
    assert_eq!(service.until_sent().await["acknowledged"], 1);
    // What is there and works is not given up for an address of this machine.
    let old = format!("{}/api/v1/strava/webhook", service.url);
    let create = format!("/api/v1/providers/strava/webhooks/subscriptions?callback_url={old}");
    service.call("POST", &create).await;
    assert_eq!(service.set_mode("webhook").await.0, 200);
    let told = r#"wearsync_subscriptions_total{provider="strava",outcome="skipped"}"#;
    for _ in 0..1000 {
        if telemetry::install_metrics().render().contains(told) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(telemetry::install_metrics().render().contains(told));
    let addresses = service.addresses().await;
    assert!(addresses.len() == 1 && addresses[0].starts_with(&old), "{addresses:?}");
    // Neither does it fail with the provider.
    service.world.control("fault", json!({"faults": ["500@push_subscriptions=1"]})).await;
    assert_eq!(service.set_mode("webhook").await.0, 200);
}

/// A provider that sends, and nothing else.
struct Sender(&'static ProviderSpec);

#[async_trait::async_trait]
impl Provider for Sender {
    fn spec(&self) -> &'static ProviderSpec {
        self.0
    }

    async fn fetch_page(&self, _: &Api<'_>, _: &PageRequest<'_>) -> Result<FetchedPage, FetchError> {
        Err(FetchError::Gone)
    }

    async fn fetch_part(&self, _: &Api<'_>, _: Kind, _: &str, _: PartName) -> Result<FetchedPart, FetchError> {
        Err(FetchError::Gone)
    }

    async fn fetch_item(
        &self,
        _: &Api<'_>,
        _: Kind,
        _: &str,
        _: Option<chrono::DateTime<chrono::Utc>>,
    ) -> Result<FetchedItem, FetchError> {
        Err(FetchError::Gone)
    }

    fn normalize(&self, _: Kind, _: &str, _: &[PartBody]) -> Result<Normalized, NormalizeError> {
        unreachable!("it brings no data")
    }
}

/// An installation of one that is like Strava, but for its name and its webhooks.
fn sender(service: &Service, name: &'static str, secret: &str, webhooks: Option<WebhookSpec>) -> ProviderSetup {
    let strava = service.world.engine.provider("strava").expect("strava");
    let known = strava.spec();
    let spec = ProviderSpec {
        name: ProviderName(name),
        title: known.title,
        api_base_url: known.api_base_url,
        oauth: known.oauth,
        quotas: known.quotas,
        read_quotas: known.read_quotas,
        rhythm: known.rhythm,
        streams: known.streams,
        parts: known.parts,
        live: LiveSpec { rest_pull: true, webhooks: &[], max_historical_days: None },
        coverage: Coverage {
            series: &[],
            workout_fields: &[],
            sleep_fields: &[],
            menstrual_cycle_fields: &[],
            health_scores: &[],
        },
        webhooks: webhooks.map(|spec| &*Box::leak(Box::new(spec))),
    };
    let mut app = strava.app.clone().expect("is set up");
    app.client_secret = SecretString::from(secret.to_owned());
    ProviderSetup {
        provider: Box::leak(Box::new(Sender(Box::leak(Box::new(spec))))),
        app: Some(app),
        base_url: String::new(),
        quotas: Vec::new(),
        parts: Vec::new(),
        config: ProviderConfig::default(),
    }
}

/// Takes no handshake, names no event, has nothing to say.
const PLAIN: WebhookSpec = WebhookSpec {
    body_limit: 1000,
    answer_within: Duration::from_secs(1),
    needs_secret: false,
    headers: &[],
    handshake: |_, _| None,
    verify: |_, _| Err(Untrusted("nobody is believed")),
    dedup_key: |_| Ok(None),
    read_delivery: |_| Ok(Vec::new()),
    subscriptions: None,
};

/// Tells what it signs with when it is subscribed to, once.
struct Telling;

const TOLD: &str = "0f9d7c11-6a52-4a5f-a3a0-4c1a2bb3c4d5";

#[async_trait::async_trait]
impl Subscriptions for Telling {
    async fn list(&self, _: &AppCalls<'_>) -> Result<Vec<Subscription>, SubscriptionError> {
        Ok(Vec::new())
    }

    async fn create(&self, _: &AppCalls<'_>, url: &str, _: &SecretString) -> Result<Made, SubscriptionError> {
        let subscription =
            Subscription { external_id: "7".to_owned(), callback_url: url.to_owned(), told: json!({"id": "7"}) };
        Ok(Made { subscription, secret: Some(SecretString::from(TOLD.to_owned())) })
    }

    async fn delete(&self, _: &AppCalls<'_>, _: &str) -> Result<(), SubscriptionError> {
        Ok(())
    }
}

fn polar_verify(inbound: &Inbound<'_>, trust: &Trust<'_>) -> Result<(), Untrusted> {
    let mut keys = trust.subscriptions.iter().filter_map(|known| known.secret.as_ref());
    let told = inbound.header("polar-webhook-signature");
    let is_good = keys.any(|key| is_signed(key, &[inbound.body], told, Digits::Hex));
    is_good.then_some(()).ok_or(Untrusted("the signature is another one"))
}

fn polar_ping(inbound: &Inbound<'_>, _: &Trust<'_>) -> Option<Handshake> {
    let body: Value = serde_json::from_slice(inbound.body).ok()?;
    (body["event"] == "PING").then(|| Handshake::Answer(json!({"status": "ok"})))
}

fn suunto_verify(inbound: &Inbound<'_>, trust: &Trust<'_>) -> Result<(), Untrusted> {
    let told = inbound.header("x-hmac-sha256-signature");
    let is_good = trust.secret.is_some_and(|key| is_signed(key, &[inbound.body], told, Digits::Hex));
    is_good.then_some(()).ok_or(Untrusted("the signature is another one"))
}

fn whoop_verify(inbound: &Inbound<'_>, trust: &Trust<'_>) -> Result<(), Untrusted> {
    let (at, told) = (inbound.header("x-whoop-signature-timestamp"), inbound.header("x-whoop-signature"));
    let is_recent = at.parse::<i64>().is_ok_and(|at| at.abs_diff(trust.now_ms) <= 300_000);
    let is_good = is_signed(&trust.app.client_secret, &[at.as_bytes(), inbound.body], told, Digits::Base64);
    (is_recent && is_good).then_some(()).ok_or(Untrusted("the signature is another one"))
}

/// Three that sign, each with a secret from another place, by the examples of their documents.
async fn others(shape: Shape) {
    let clock = Clock::mock(chrono::DateTime::from_timestamp_millis(1_774_080_000_123).expect("an instant"));
    let service = Service::new(shape, small(), clock.clone(), &[]).await;
    let engine = &service.world.engine;
    let send = async |setup: &ProviderSetup, headers: &[(&'static str, &str)], body: &str| {
        let headers: HeaderMap = headers
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_str(value).expect("a header")))
            .collect();
        let inbound = Inbound { method: "POST", headers: &headers, query: "", body: body.as_bytes() };
        sync::receive(engine, setup, &inbound, None).await
    };
    let accepted = |answer: &Result<Value, Unwelcome>| matches!(answer, Ok(body) if body["status"] == "accepted");

    let spec = WebhookSpec { handshake: polar_ping, verify: polar_verify, subscriptions: Some(&Telling), ..PLAIN };
    let polar = sender(&service, "polar", "unused", Some(spec));
    let body = r#"{"event":"EXERCISE","user_id":60214377,"entity_id":"q7RkZp2","timestamp":"2026-03-21T06:52:12Z","url":"https://www.polaraccesslink.com/v3/exercises/q7RkZp2"}"#;
    let signed = [("polar-webhook-signature", "1f23d56283b332fa077d4ad6df3bbaa353171745af4023176cf9092bc0820643")];
    // Before the key is known, while it subscribes.
    let ping = send(&polar, &[], r#"{"timestamp":"2026-03-21T06:52:12Z","event":"PING"}"#).await;
    assert_eq!(ping.expect("answers"), json!({"status": "ok"}));
    assert!(matches!(send(&polar, &signed, body).await, Err(Unwelcome::Off(_))));
    let url = sync::callback_url(engine, &polar, "https://wear.example.org").expect("an address");
    assert!(url.starts_with("https://wear.example.org/api/v1/providers/polar/webhooks/"), "{url}");
    sync::subscribe(engine, &polar, &url).await.expect("subscribes");
    assert!(accepted(&send(&polar, &signed, body).await), "the secret that it told is the one");
    assert!(matches!(send(&polar, &signed, &body.replace("q7R", "q7S")).await, Err(Unwelcome::Untrusted)));
    let kept = engine.db.list_subscriptions("polar", "90417").await.expect("lists");
    assert!(!String::from_utf8_lossy(kept[0].secret.as_deref().expect("a secret")).contains("0f9d7c11"), "not sealed");

    let spec = WebhookSpec { verify: suunto_verify, needs_secret: true, ..PLAIN };
    let mut suunto = sender(&service, "suunto", "unused", Some(spec));
    let body = r#"{"type":"SUUNTO_247_RECOVERY_CREATED","username":"nordic.runner","samples":[]}"#;
    let signed = [("x-hmac-sha256-signature", "34d6b6694a5c3522f80202d9a54b3413ec28cb14789dd728f8bfab35151aad62")];
    let off = send(&suunto, &signed, body).await;
    assert!(matches!(off, Err(Unwelcome::Off(why)) if why.contains("webhook_secret")), "{off:?}");
    suunto.config.webhook_secret = Some(SecretString::from("suunto-demo-secret".to_owned()));
    assert!(accepted(&send(&suunto, &signed, body).await));
    assert!(matches!(send(&suunto, &[], body).await, Err(Unwelcome::Untrusted)));
    let url = sync::callback_url(engine, &suunto, "https://wear.example.org").expect("an address");
    let made = sync::subscribe(engine, &suunto, &url).await;
    assert!(matches!(made, Err(SubscribeError::Unsupported)), "its address is entered by hand: {made:?}");

    let whoop = sender(&service, "whoop", "whoop-demo-secret", Some(WebhookSpec { verify: whoop_verify, ..PLAIN }));
    let body = r#"{"user_id":7310042,"id":"5d0f6c0a-8b0a-4a37-9c22-1f6a3f0e9b10","type":"sleep.updated","trace_id":"c0a8012e-11aa-4e0e-9f1d-6a1f0d7f3b21"}"#;
    let signed = [
        ("x-whoop-signature-timestamp", "1774080000123"),
        ("x-whoop-signature", "f0DjpPjufVgrfLW9+wBeetzgI2magIECoXow37HVfOw="),
    ];
    assert!(accepted(&send(&whoop, &signed, body).await));
    clock.set(clock.now() + chrono::Duration::milliseconds(300_001));
    assert!(matches!(send(&whoop, &signed, body).await, Err(Unwelcome::Untrusted)), "it is too old");

    let none = sender(&service, "lastfm", "unused", None);
    let url = sync::callback_url(engine, &none, "https://wear.example.org");
    assert!(matches!(url, Err(SubscribeError::Unsupported)), "{url:?}");
    let kept: Vec<String> = service.deliveries().await.into_iter().map(|delivery| delivery.provider).collect();
    assert_eq!(kept, ["whoop", "suunto", "polar"]);
}

/// Keeps others from writing deliveries until it is let go.
enum Held {
    Postgres(sqlx::PgConnection),
    Sqlite(sqlx::SqliteConnection),
}

impl Held {
    async fn new(place: &Place) -> Self {
        match place.shape {
            Shape::Postgres => {
                let mut own = sqlx::PgConnection::connect(&place.database).await.expect("connects");
                let sql = "begin; lock table deliveries in exclusive mode";
                sqlx::raw_sql(sql).execute(&mut own).await.expect("locks");
                Self::Postgres(own)
            }
            Shape::Sqlite => {
                let mut own = sqlx::SqliteConnection::connect(&place.database).await.expect("connects");
                sqlx::raw_sql("begin immediate").execute(&mut own).await.expect("locks");
                Self::Sqlite(own)
            }
        }
    }

    async fn let_go(self) {
        match self {
            Self::Postgres(mut own) => sqlx::raw_sql("rollback").execute(&mut own).await.map(drop),
            Self::Sqlite(mut own) => sqlx::raw_sql("rollback").execute(&mut own).await.map(drop),
        }
        .expect("unlocks");
    }
}

async fn in_time(shape: Shape) {
    let service = Service::new(shape, small(), Clock::system(), &[]).await;
    let world = &service.world;
    world.sync().await;
    let callback = service.subscribe().await;
    let told = event("activity", service.newest().await, "update", 70_412_355, 5);
    let held = Held::new(&world.place).await;
    let begun = Instant::now();
    let call = service.http.post(format!("{}{callback}", service.url)).header("content-type", "application/json");
    let answer = call.body(told.clone()).send().await.expect("answers");
    let took = begun.elapsed();
    assert_eq!(answer.status(), 503);
    assert!(answer.headers().contains_key("retry-after"));
    assert!(took > Duration::from_millis(1500) && took < Duration::from_secs(2), "{took:?}");
    held.let_go().await;
    // It comes again, and was kept meanwhile or was not.
    for _ in 0..2 {
        assert_eq!(service.post(&callback, told.clone(), None).await.0, 200);
    }
    assert_eq!(service.deliveries().await.len(), 1);
    service.work().await;
    assert_eq!(service.deliveries().await[0].state, "done");
    assert_eq!(service.runs().await.iter().filter(|run| run.source == "webhook").count(), 1);
    world.check().await;
}

async fn shared(shape: Shape) {
    let service = Service::new(shape, small(), Clock::mock(NOW.parse().expect("an instant")), &[]).await;
    let world = &service.world;
    world.sync().await;
    let grant = world.control("grant", json!({"athlete": 0})).await;
    let token = sync::secret(grant["refresh_token"].as_str().expect("a token"));
    let setup = world.engine.provider("strava").expect("strava");
    let ben = world.engine.db.insert_user(NewUser::default(), world.clock.now()).await.expect("a user").id;
    let athlete = grant["athlete"].to_string();
    let ben =
        sync::connect_with_grant(&world.engine, setup, ben, &token, Some(&athlete), None).await.expect("connects");
    let account = async |id| world.engine.db.find_connection(id).await.expect("reads").expect("is there").account_id;
    assert_eq!(account(world.connection).await, account(ben).await, "one account, one grant");
    service.subscribe().await;
    let both = [world.connection, ben];

    let calls = service.calls_of(world.control("upload", json!({"athlete": 0, "manual": false}))).await;
    assert_eq!(calls, [2, 2, 2], "list, detail, streams, for each");
    let id = service.newest().await;
    let kept = service.deliveries().await;
    assert_eq!((kept.len(), kept[0].state.as_str()), (1, "done"));
    let items = world.engine.db.list_delivery_items(kept[0].id).await.expect("lists");
    let mut of: Vec<_> = items.iter().map(|item| item.connection_id.expect("a connection")).collect();
    of.sort_unstable();
    let mut expected = both;
    expected.sort_unstable();
    assert_eq!(of, expected, "{items:?}");
    for item in &items {
        let run = world.run(item.run_id.expect("a run")).await;
        assert_eq!((Some(run.connection_id), run.run_state()), (item.connection_id, RunState::Success));
    }
    let db = &world.engine.db;
    let records = format!("select count(*) from records where external_id = '{id}' and revision = 1");
    assert_eq!(number(db, &records).await, 2, "one record for each");
    // Once more: nothing is done twice.
    assert!(sync::replay(&world.engine, kept[0].id).await.expect("replays"));
    service.work().await;
    assert_eq!(number(db, &records).await, 2);
    let parts = format!("select count(*) from parts where external_id = '{id}' and version > 1");
    assert_eq!(number(db, &parts).await, 0);
    for connection in both {
        assert!(service.has(connection, id).await);
    }
    service.calls_of(world.control("delete", json!({"athlete": 0, "id": id}))).await;
    for connection in both {
        assert!(!service.has(connection, id).await, "it is gone for both");
    }
}

async fn privacy(shape: Shape) {
    let service = Service::new(shape, small(), Clock::mock(NOW.parse().expect("an instant")), &[]).await;
    let world = &service.world;
    // Without the right to see what only its owner may see.
    world.control("revoke", json!({"athlete": 0})).await;
    let scopes = ["read", "profile:read_all", "activity:read"];
    let grant = world.control("grant", json!({"athlete": 0, "scopes": scopes})).await;
    let token = sync::secret(grant["refresh_token"].as_str().expect("a token"));
    let setup = world.engine.provider("strava").expect("strava");
    let same = sync::connect_with_grant(&world.engine, setup, world.user, &token, None, None).await.expect("connects");
    assert_eq!(same, world.connection);
    assert_eq!(world.sync().await.run_state(), RunState::Success);
    service.subscribe().await;
    let id = service.newest().await;
    let edit = |private: bool| world.control("edit", json!({"athlete": 0, "id": id, "private": private}));
    let revision = async || {
        let sql = format!("select cast(revision as text) from records where external_id = '{id}'");
        rows(&world.engine.db, sql).await[0].parse::<i64>().expect("a number")
    };
    let first = revision().await;
    assert!(service.has(world.connection, id).await);
    assert_eq!(service.calls_of(edit(true)).await, [0, 1, 0], "it is said to be gone");
    assert!(!service.has(world.connection, id).await);
    let gone = revision().await;
    // Somebody may ask meanwhile: a list that lacks it brings nothing back.
    world.sync().await;
    assert!(!service.has(world.connection, id).await);

    let calls = service.calls_of(edit(false)).await;
    assert_eq!(calls[..2], [1, 0], "it is said to be new, and its place is known");
    assert!(service.has(world.connection, id).await);
    assert!(revision().await > gone && gone >= first, "{first}, {gone}, {}", revision().await);
    let told: Vec<String> = rows(&world.engine.db, "select dedup_key from deliveries order by id".to_owned()).await;
    assert!(told.len() == 2 && told[0].contains(":delete:") && told[1].contains(":create:"), "{told:?}");
    assert!(service.runs().await.iter().all(|run| run.run_state() == RunState::Success));
    world.check().await;
}

async fn import(shape: Shape) {
    let settings = [
        ("WEARSYNC_SCHEDULE", "6h"),
        ("WEARSYNC_RECONCILE_SHARE", "0"),
        ("WEARSYNC_PROVIDERS__STRAVA__QUOTA", "100/15m"),
    ];
    let service = Service::new(shape, small(), Clock::mock(NOW.parse().expect("an instant")), &settings).await;
    let world = &service.world;
    world.sync().await;
    let callback = service.subscribe().await;
    world.clock.set(world.clock.now() + chrono::Duration::minutes(15));
    let (engine, callback, service) = (&world.engine, &callback, &service);
    futures::stream::iter(1..=1500)
        .for_each_concurrent(32, async |n| {
            let (status, body) = service.post(callback, event("activity", n, "create", 70_412_355, n), None).await;
            assert_eq!(status, 200, "{body}");
        })
        .await;
    futures::stream::iter(service.deliveries().await)
        .for_each_concurrent(8, async |one| {
            assert_eq!(sync::deliver(engine, one.id).await.expect("delivers"), Delivered::Done);
        })
        .await;
    let waiting = "select count(*) from runs where state = 'queued' and class = 1";
    assert_eq!(number(&engine.db, waiting).await, 1500);

    let user = engine.db.insert_user(NewUser::default(), world.clock.now()).await.expect("a user").id;
    let other = world.connect(user, 1).await;
    let begun = sync::tick(engine).await.expect("ticks").new;
    let mut of = Vec::new();
    for (id, _) in &begun {
        of.push((world.run(*id).await.connection_id, *id));
    }
    let (_, run) = of.iter().find(|(connection, _)| *connection == other).expect("the other user's turn comes");
    // It need not wait for the others, either.
    assert_ne!(sync::execute(engine, *run).await.expect("executes"), sync::Executed::NotTaken);
    let sql = "select count(*) as n from records where connection_id = $1";
    assert!(query::<Count>(&engine.db, sql, other).await[0].n > 0);
    assert_eq!(number(&engine.db, waiting).await, 1500);
}

/// A process that serves, ended with its test.
struct Serving {
    child: Child,
    url: String,
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Serving {
    async fn new(env: &std::collections::BTreeMap<String, String>) -> Self {
        let mut child = program(env, &["--json", "serve"]).stdin(Stdio::null()).spawn().expect("the program starts");
        let stdout = child.stdout.take().expect("a pipe");
        let stderr = child.stderr.take().expect("a pipe");
        std::thread::spawn(move || std::io::copy(&mut { stderr }, &mut std::io::sink()));
        let url = tokio::task::spawn_blocking(move || {
            let mut lines = String::new();
            for line in std::io::BufRead::lines(std::io::BufReader::new(stdout)) {
                lines += &line.expect("reads");
                if let Ok(told) = serde_json::from_str::<Value>(&lines) {
                    return told["url"].as_str().expect("an address").to_owned();
                }
            }
            panic!("it does not serve: {lines}");
        });
        let url = url.await.expect("serves");
        Self { child, url }
    }
}

/// Everything of this that can be done at a terminal, beside a process that serves.
async fn commands(shape: Shape) {
    let place = Place::new(shape).await;
    let sim = wearsync::simulator::start(small(), Clock::system()).await.expect("the simulator starts");
    let mut env = place.env(&sim.url());
    env.insert("WEARSYNC_SWEEP".to_owned(), "200ms".to_owned());
    if shape == Shape::Postgres {
        assert_eq!(command(&env, &["migrate"], "").0, 0);
    }
    let run = async |env: &std::collections::BTreeMap<String, String>, arguments: &[&str], stdin: &str| {
        let (env, arguments) = (env.clone(), arguments.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>());
        let stdin = stdin.to_owned();
        let done = tokio::task::spawn_blocking(move || {
            let arguments: Vec<&str> = ["--json"].into_iter().chain(arguments.iter().map(String::as_str)).collect();
            command(&env, &arguments, &stdin)
        });
        done.await.expect("ends")
    };
    let json = async |arguments: &[&str], stdin: &str| {
        let (code, answer, remarks) = run(&env, arguments, stdin).await;
        assert_eq!(code, 0, "{arguments:?}: {answer}{remarks}");
        serde_json::from_str::<Value>(&answer).unwrap_or_else(|_| panic!("{arguments:?}: no JSON: {answer}"))
    };
    let http = client();
    let control = async |path: &str, body: Value| {
        crate::support::post(&http, &format!("{}/_simulator/{path}", sim.url()), &body).await
    };
    let user = json(&["users", "create"], "").await["id"].as_str().expect("an id").to_owned();
    let grant = control("grant", json!({"athlete": 0})).await;
    let token = grant["refresh_token"].as_str().expect("a token");
    let add = ["connections", "add", "--provider", "strava", "--refresh-token-stdin"];
    json(&add, token).await;
    let serving = Serving::new(&env).await;

    // What a provider is asked to send.
    let base = format!("{}/api/v1/providers/strava/webhooks/", serving.url);
    let address = json(&["subscriptions", "address", "strava", "--url", &serving.url], "").await;
    let address = address["callback_url"].as_str().expect("an address").to_owned();
    assert!(address.starts_with(&base) && address.len() > base.len() + 30, "{address}");
    assert_eq!(json(&["subscriptions", "list", "strava"], "").await, json!([]));
    let made = json(&["subscriptions", "create", "strava", "--url", &serving.url], "").await;
    assert_eq!(made, json!({"id": "318842", "callback_url": address, "status": "created"}));
    let listed = json(&["subscriptions", "list", "strava"], "").await;
    assert_eq!((&listed[0]["id"], &listed[0]["callback_url"]), (&json!(318_842), &json!(address)));
    assert_eq!(run(&env, &["subscriptions", "create", "strava", "--url", "nowhere"], "").await.0, 1);
    assert_eq!(run(&env, &["subscriptions", "address", "nobody"], "").await.0, 2);

    // When it is read.
    let shown = json(&["schedule", "show"], "").await;
    let told = (shown[0]["user_id"].as_str(), &shown[0]["schedule"], &shown[0]["is_default"]);
    assert_eq!(told, (Some(user.as_str()), &json!("off"), &json!(true)), "{shown}");
    let set = ["schedule", "set", "0 6 * * *", "--time-zone", "Europe/Zurich", "--provider", "strava"];
    let told = json(&set, "").await;
    assert_eq!((&told["schedule"], &told["time_zone"]), (&json!("0 6 * * *"), &json!("Europe/Zurich")), "{told}");
    assert!(told["next_at"].is_string(), "{told}");
    assert_eq!(json(&["schedule", "show"], "").await, json!([told]));
    let off = json(&["schedule", "off", "--provider", "strava"], "").await;
    assert_eq!((&off["schedule"], &off["next_at"]), (&json!("off"), &Value::Null), "{off}");

    // What happens, as it happens.
    json(&["sync", "strava"], "").await;
    let mut watching = program(&env, &["--json", "watch"]).stdin(Stdio::null()).spawn().expect("the program starts");
    let stdout = watching.stdout.take().expect("a pipe");
    let (lines, mut seen) = tokio::sync::mpsc::unbounded_channel::<Value>();
    std::thread::spawn(move || {
        for line in std::io::BufRead::lines(std::io::BufReader::new(stdout)) {
            let Ok(event) = serde_json::from_str(&line.unwrap_or_default()) else { break };
            if lines.send(event).is_err() {
                break;
            }
        }
    });
    control("upload", json!({"athlete": 0})).await;
    let ended = tokio::time::timeout(Duration::from_secs(60), async {
        loop {
            let event = seen.recv().await.expect("an event");
            if event["source"] == "webhook" && event["status"] == "success" {
                return event;
            }
        }
    });
    let task = ended.await.expect("the push is seen")["metadata"]["task_id"].clone();
    let stopped = std::process::Command::new("kill").args(["-INT", &watching.id().to_string()]).status();
    assert!(stopped.expect("kill runs").success());
    let ended = tokio::task::spawn_blocking(move || watching.wait_with_output()).await.expect("waits").expect("ends");
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));

    // What was sent, and what became of it.
    let listed = json(&["deliveries", "list", "--provider", "strava", "--status", "done"], "").await;
    let one = listed[0]["id"].as_str().expect("an id").to_owned();
    assert_eq!((listed.as_array().map(Vec::len), &listed[0]["has_body"]), (Some(1), &json!(true)), "{listed}");
    let shown = json(&["deliveries", "show", &one], "").await;
    assert_eq!((&shown["items"][0]["run_id"], &shown["items"][0]["status"]), (&task, &json!("accepted")), "{shown}");
    assert!(shown.get("body").is_none());
    let shown = json(&["deliveries", "show", &one, "--body"], "").await;
    assert!(shown["body"].as_str().is_some_and(|body| body.contains("aspect_type")), "{shown}");
    assert_eq!(json(&["deliveries", "replay", &one], "").await, json!({"id": one, "status": "queued"}));
    let again = tokio::time::timeout(Duration::from_secs(60), async {
        loop {
            let shown = json(&["deliveries", "show", &one], "").await;
            if shown["status"] == "done" && shown["items"][0]["run_id"] != task {
                return;
            }
        }
    });
    again.await.expect("the serving process takes it");
    assert_eq!(run(&env, &["deliveries", "show", &uuid::Uuid::now_v7().to_string()], "").await.0, 2);

    // What is wrong with it.
    let webhooks = async |env: &std::collections::BTreeMap<String, String>| {
        let (_, answer, remarks) = run(env, &["doctor"], "").await;
        let checks: Value = serde_json::from_str(&answer).unwrap_or_else(|_| panic!("no JSON: {answer}{remarks}"));
        let checks = checks.as_array().expect("a list").clone();
        let one = checks.iter().find(|one| one["detail"].as_str().is_some_and(|text| text.starts_with("webhooks: ")));
        let one = one.unwrap_or_else(|| panic!("nothing of webhooks: {checks:?}"));
        (one["grade"].as_str().expect("a grade").to_owned(), one["detail"].as_str().expect("words").to_owned())
    };
    assert_eq!(webhooks(&env).await, ("ok".to_owned(), "webhooks: subscription 318842".to_owned()));
    let mut moved = env.clone();
    moved.insert("WEARSYNC_PUBLIC_URL".to_owned(), "https://wear.example.org".to_owned());
    let (grade, detail) = webhooks(&moved).await;
    assert!(grade == "warning" && detail.contains(&serving.url) && detail.contains("wear.example.org"), "{detail}");
    assert!(!detail.contains(&address), "the end of the address is told: {detail}");
    let mut rekeyed = env.clone();
    // A key file that is still there is still good.
    rekeyed.insert("WEARSYNC_DATA_DIR".to_owned(), place.dir.path().join("other").display().to_string());
    rekeyed.insert("WEARSYNC_SECRET_KEY".to_owned(), "/wAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=".to_owned());
    let (grade, detail) = webhooks(&rekeyed).await;
    assert!(grade == "warning" && detail.contains("another secret key"), "{detail}");
    assert!(detail.contains("`wearsync subscriptions create strava`"), "{detail}");

    let ended = json(&["subscriptions", "delete", "strava", "318842"], "").await;
    assert_eq!(ended, json!({"id": "318842", "status": "deleted"}));
    assert_eq!(json(&["subscriptions", "list", "strava"], "").await, json!([]));
}
