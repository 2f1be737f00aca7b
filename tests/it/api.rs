//! The API over both shapes: what depends on the database, on the engine behind it, or on workers beside it.

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};
use tower::ServiceExt as _;
use wearsync::api::{self, ApiState};
use wearsync::clock::Clock;
use wearsync::model::UserId;
use wearsync::simulator::Options;
use wearsync::storage::NewApiKey;
use wearsync::{telemetry, vault, worker};

use crate::both;
use crate::support::{Shape, World};

both! {
    inline_answers_the_result => inline;
    inline_answers_the_result_beside_a_worker => inline_beside_a_worker;
    inline_goes_on_when_its_time_is_over => inline_too_short;
    queued_takes_two_statements_and_is_done_by_a_worker => queued;
    users_tasks_and_gaps => tour;
}

struct Client {
    router: Router,
    key: String,
}

impl Client {
    async fn new(world: &World) -> Self {
        let key = vault::new_api_key();
        let new = NewApiKey {
            hash: vault::hash_secret(key.expose_secret()),
            prefix: "ws_test".to_owned(),
            name: "test".to_owned(),
            scopes: "admin".to_owned(),
            created_by: None,
            expires_at: None,
        };
        world.engine.db.insert_api_key(new, world.clock.now()).await.expect("a key");
        let metrics = telemetry::install_metrics();
        let router = api::router(ApiState { engine: world.engine.clone(), metrics, metrics_need_key: false });
        Self { router, key: key.expose_secret().to_owned() }
    }

    async fn call(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let request = Request::builder().method(method).uri(path).header("X-API-Key", &self.key);
        let request = request.body(Body::from(body.to_string())).expect("a request");
        let response = self.router.clone().oneshot(request).await.expect("an answer");
        let status = response.status().as_u16();
        let bytes = axum::body::to_bytes(response.into_body(), usize::MAX).await.expect("a body");
        (status, serde_json::from_slice(&bytes).expect("JSON"))
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        self.call("GET", path, &Value::Null).await
    }

    async fn post(&self, path: &str) -> (u16, Value) {
        self.call("POST", path, &Value::Null).await
    }

    /// The task when it is over.
    async fn end_of(&self, task: &Value) -> Value {
        for _ in 0..600 {
            let (_, body) = self.get(&format!("/api/v1/tasks/{}", task.as_str().expect("an id"))).await;
            if body["terminal"] == true {
                return body;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        panic!("the task does not end");
    }
}

fn small() -> Options {
    Options { activities: 30, stream_points: 20, athletes: 1, ..Options::default() }
}

fn sync_of(user: UserId) -> String {
    format!("/api/v1/strava/users/{user}/sync")
}

async fn inline(shape: Shape) {
    let world = World::new(shape, small()).await;
    let client = Client::new(&world).await;
    let path = format!("{}?async=false", sync_of(world.user));
    let (status, body) = client.post(&path).await;
    assert_eq!(status, 200, "{body}");
    assert_eq!((&body["success"], &body["details"]), (&json!(true), &json!({"workouts": true})));
    assert_eq!(body["counts"]["streams"]["activities"]["inserted"], 30, "{body}");
    world.check().await;
    let (status, body) = client.post(&path).await;
    assert_eq!((status, &body["success"], &body["details"]), (200, &json!(true), &json!({"workouts": true})));
    assert_eq!(body["counts"]["streams"]["activities"]["inserted"], 0, "nothing new is a success");
}

/// The worker hears of the run as well; whoever is faster, the caller gets the result.
async fn inline_beside_a_worker(shape: Shape) {
    let world = World::new(shape, small()).await;
    let client = Client::new(&world).await;
    let working = tokio::spawn(worker::work(world.engine.clone()));
    for _ in 0..10 {
        let (status, body) = client.post(&format!("{}?async=false", sync_of(world.user))).await;
        assert_eq!((status, &body["success"]), (200, &json!(true)), "{body}");
    }
    world.engine.stop.cancel();
    working.await.expect("ends").expect("ends well");
}

async fn inline_too_short(shape: Shape) {
    let settings = [("WEARSYNC_INLINE_TIMEOUT", "1ms")];
    let world = World::with(shape, small(), Clock::system(), &settings).await;
    let client = Client::new(&world).await;
    let (status, body) = client.post(&format!("{}?async=false", sync_of(world.user))).await;
    assert_eq!((status, &body["async"], body.get("details")), (202, &json!(true), None), "{body}");
    // No worker is there: the work of the call itself goes on.
    let task = client.end_of(&body["task_id"]).await;
    assert_eq!((&task["status"], &task["details"]), (&json!("success"), &json!({"workouts": true})), "{task}");
}

async fn queued(shape: Shape) {
    let world = World::new(shape, small()).await;
    let client = Client::new(&world).await;
    client.get("/api/v1/tasks").await;
    while world.engine.db.list_api_keys().await.expect("reads")[0].last_used_at.is_none() {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    let before = world.engine.db.statements();
    let (status, body) = client.post(&sync_of(world.user)).await;
    assert_eq!((status, world.engine.db.statements() - before), (200, 2), "{body}");
    let working = tokio::spawn(worker::work(world.engine.clone()));
    let task = client.end_of(&body["task_id"]).await;
    assert_eq!((&task["status"], &task["details"]), (&json!("success"), &json!({"workouts": true})), "{task}");
    let (_, gaps) = client.get(&format!("/api/v1/users/{}/gaps", world.user)).await;
    assert_eq!(gaps, json!({"items": []}));
    let (_, users) = client.get("/api/v1/users?sort_by=last_synced_at").await;
    let user = &users["items"][0];
    assert_eq!((&user["last_synced_provider"], &user["has_active_connection"]), (&json!("strava"), &json!(true)));
    world.engine.stop.cancel();
    working.await.expect("ends").expect("ends well");
}

async fn tour(shape: Shape) {
    let world = World::new(shape, small()).await;
    let client = Client::new(&world).await;
    let ada = json!({"first_name": "Ada", "email": "ada@example.com", "external_user_id": "7"});
    let (status, user) = client.call("POST", "/api/v1/users", &ada).await;
    assert_eq!((status, &user["last_name"]), (201, &Value::Null), "{user}");
    let (status, same) = client.call("POST", "/api/v1/users", &json!({"external_user_id": "7"})).await;
    assert_eq!((status, &same["id"]), (201, &user["id"]));
    let (status, body) = client.call("POST", "/api/v1/users", &json!({"email": "ada@example.com"})).await;
    assert_eq!((status, &body["code"]), (409, &json!("duplicate_email")));
    let path = format!("/api/v1/users/{}", user["id"].as_str().expect("an id"));
    let (_, body) = client.call("PATCH", &path, &json!({"last_name": "Byron"})).await;
    assert_eq!((&body["first_name"], &body["last_name"]), (&json!("Ada"), &json!("Byron")));
    let other = json!({"external_user_id": "8"});
    client.call("POST", "/api/v1/users", &other).await;
    let (status, body) = client.call("PATCH", &path, &other).await;
    assert_eq!((status, &body["code"]), (409, &json!("duplicate_external_user_id")));
    for query in ["search=byr", "email=ada@example.com", "external_user_id=7", "search=ADA&sort_by=email"] {
        let (_, page) = client.get(&format!("/api/v1/users?{query}")).await;
        assert_eq!((&page["total"], &page["items"][0]["id"]), (&json!(1), &user["id"]), "{query}: {page}");
    }
    let (status, body) = client.get("/api/v1/users?search=a%00b").await;
    assert_eq!(status, 400, "{body}");
    let (status, _) = client.call("DELETE", &path, &Value::Null).await;
    assert_eq!((status, client.get(&path).await.0), (200, 404));

    for since in 1..=3 {
        client.post(&format!("{}?since={since}", sync_of(world.user))).await;
    }
    let list = format!("/api/v1/tasks?user_id={}&provider=strava&status=queued&limit=2", world.user);
    let (_, first) = client.get(&list).await;
    let cursor = first["next_cursor"].as_str().expect("a second page");
    let (_, second) = client.get(&format!("{list}&cursor={cursor}")).await;
    assert_eq!((second["items"].as_array().map(Vec::len), &second["next_cursor"]), (Some(1), &Value::Null));
    let task = format!("/api/v1/tasks/{}", first["items"][0]["task_id"].as_str().expect("an id"));
    let (_, cancelled) = client.call("DELETE", &task, &Value::Null).await;
    assert_eq!((&cancelled["status"], &cancelled["terminal"]), (&json!("cancelled"), &json!(true)));

    let (_, gaps) = client.get(&format!("/api/v1/users/{}/gaps", world.user)).await;
    assert_eq!((&gaps["items"][0]["state"], &gaps["items"][0]["from"]), (&json!("unread"), &Value::Null), "{gaps}");
    let (_, connections) = client.get(&format!("/api/v1/users/{}/connections", world.user)).await;
    assert_eq!((&connections[0]["id"], &connections[0]["status"]), (&json!(world.connection), &json!("active")));
    let (status, ready) = client.get("/health/ready").await;
    assert_eq!((status, &ready["redis"]), (200, &json!("ok")), "{ready}");
}
