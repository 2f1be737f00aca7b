//! The API in process, against SQLite in a scratch folder.

use axum::body::Body;
use axum::http::StatusCode;
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Value, json};
use tower::ServiceExt as _;

use super::*;
use crate::clock::Clock;
use crate::config::Config;
use crate::coordination::Coordination;
use crate::model::{AccountId, ConnectionId, Purpose, RunId, RunReport, RunState, StreamReport, SyncRequest, UserId};
use crate::storage::{Db, NewAccount, NewApiKey, NewUser, NewWindow, Run, Settle};
use crate::vault::{self, Vault};

/// 2026-03-10T12:00:00Z
const NOW: i64 = 1_773_144_000_000;

struct Api {
    router: Router,
    engine: Arc<Engine>,
    key: String,
    _folder: tempfile::TempDir,
}

/// An answer as a client sees it.
struct Answer {
    status: u16,
    headers: HeaderMap,
    text: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|_| panic!("no JSON: {}", self.text))
    }

    /// Status, detail, code.
    fn failure(&self) -> (u16, String, String) {
        let body = self.json();
        assert_eq!(body["request_id"], self.headers["x-request-id"].to_str().unwrap(), "{body}");
        let member = |name: &str| body[name].as_str().unwrap_or_default().to_owned();
        (self.status, member("detail"), member("code"))
    }
}

impl Api {
    async fn start() -> Self {
        Self::with(false).await
    }

    async fn with(metrics_need_key: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let env = [("WEARSYNC_DATA_DIR", folder.path().to_str().unwrap()), ("WEARSYNC_INLINE_TIMEOUT", "1s")];
        let config = Config::load(None, env.map(|(name, value)| (name.to_owned(), value.to_owned()))).unwrap();
        let db = Db::sqlite(&folder.path().join("test.db")).await.unwrap();
        db.migrate().await.unwrap();
        let vault = Vault::new(&SecretString::from("42".repeat(32)), &[]).unwrap();
        let clock = Clock::mock(DateTime::from_timestamp_millis(NOW).unwrap());
        // reqwest is built without a default provider of TLS; a second installation is refused, which is fine.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let engine = Engine::new(config, db, Coordination::local(), vault, clock, None).unwrap();
        let metrics = telemetry::install_metrics();
        let router = router(ApiState { engine: engine.clone(), metrics, metrics_need_key });
        let mut api = Self { router, engine, key: String::new(), _folder: folder };
        api.key = api.make_key("admin", None).await;
        api
    }

    fn now(&self) -> DateTime<Utc> {
        self.engine.clock.now()
    }

    async fn make_key(&self, scopes: &str, expires_at: Option<DateTime<Utc>>) -> String {
        let key = vault::new_api_key();
        let new = NewApiKey {
            hash: vault::hash_secret(key.expose_secret()),
            prefix: key.expose_secret()[..7].to_owned(),
            name: "test".to_owned(),
            scopes: scopes.to_owned(),
            created_by: None,
            expires_at,
        };
        self.engine.db.insert_api_key(new, self.now()).await.unwrap();
        key.expose_secret().to_owned()
    }

    async fn user(&self) -> UserId {
        self.engine.db.insert_user(NewUser::default(), self.now()).await.unwrap().id
    }

    async fn connected(&self) -> (UserId, AccountId, ConnectionId) {
        let user = self.user().await;
        let new = NewAccount {
            id: AccountId::new(),
            provider: "strava".to_owned(),
            client_id: "1".to_owned(),
            provider_user_id: user.to_string(),
            imported_hash: None,
        };
        let account = self.engine.db.upsert_account(new, self.now()).await.unwrap().id;
        let connection = self.engine.db.connect(user, account, "strava", self.now()).await.unwrap();
        (user, account, connection)
    }

    async fn send(&self, request: Request) -> Answer {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = axum::body::to_bytes(body, usize::MAX).await.unwrap();
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        Answer { status: parts.status.as_u16(), headers: parts.headers, text }
    }

    async fn call(&self, method: &str, path: &str, key: &str, body: &str) -> Answer {
        let mut request = Request::builder().method(method).uri(path);
        if !key.is_empty() {
            request = request.header("X-API-Key", key);
        }
        self.send(request.body(Body::from(body.to_owned())).unwrap()).await
    }

    async fn get(&self, path: &str) -> Answer {
        self.call("GET", path, &self.key, "").await
    }

    async fn post(&self, path: &str) -> Answer {
        self.call("POST", path, &self.key, "").await
    }

    async fn run(&self, answer: &Answer) -> Run {
        let id = answer.json()["task_id"].as_str().unwrap().parse().unwrap();
        self.engine.db.find_run(RunId(id)).await.unwrap().unwrap()
    }

    async fn settle(&self, id: RunId, settle: Settle) {
        let until = self.now() + chrono::Duration::seconds(30);
        let claim = self.engine.db.claim_run(id, "test", self.now(), until).await.unwrap().unwrap();
        assert!(self.engine.db.settle_run(&claim.fence, settle, self.now()).await.unwrap());
    }
}

fn at(ms: i64) -> DateTime<Utc> {
    DateTime::from_timestamp_millis(ms).unwrap()
}

fn own(text: &str) -> String {
    text.to_owned()
}

// ---- the trigger --------------------------------------------------------------------------------------------------

#[tokio::test]
async fn a_queued_sync_is_a_row_and_answered_as_documented_on_all_paths() {
    let api = Api::start().await;
    let (user, ..) = api.connected().await;
    let mut tasks = Vec::new();
    for path in ["/api/v1/strava", "/api/v1/providers/strava", "/strava"] {
        let answer = api.post(&format!("{path}/users/{user}/sync")).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        let run = api.run(&answer).await;
        assert_eq!(
            answer.text,
            format!(
                "{{\"success\":true,\"async\":true,\"task_id\":\"{}\",\"message\":\"Sync task queued for strava. \
                Check task status for results.\"}}",
                run.id
            )
        );
        assert_eq!(run.state, "queued");
        assert_eq!(answer.headers["cache-control"], "no-store");
        assert_eq!(answer.headers["x-content-type-options"], "nosniff");
        tasks.push(run.id);
    }
    assert_eq!((tasks[1], tasks[2]), (tasks[0], tasks[0]), "the same sync asked for twice is one task");
    assert_eq!(api.engine.shared.pop(NOW).await.unwrap(), Some(tasks[0].into()));
}

#[tokio::test]
async fn a_queued_sync_takes_two_statements() {
    let api = Api::start().await;
    let (user, ..) = api.connected().await;
    let path = format!("/api/v1/strava/users/{user}/sync");
    api.post(&path).await;
    // The note of the key's use goes its own way, once a minute.
    while api.engine.db.list_api_keys().await.unwrap()[0].last_used_at.is_none() {
        tokio::task::yield_now().await;
    }
    let before = api.engine.db.statements();
    for _ in 0..5 {
        assert_eq!(api.post(&path).await.status, 200);
    }
    assert_eq!(api.engine.db.statements() - before, 10);
}

#[tokio::test]
async fn both_headers_carry_a_key() {
    let api = Api::start().await;
    let (user, ..) = api.connected().await;
    for header in ["X-API-Key", "X-Open-Wearables-API-Key"] {
        let request = Request::post(format!("/api/v1/strava/users/{user}/sync")).header(header, &api.key);
        assert_eq!(api.send(request.body(Body::empty()).unwrap()).await.status, 200);
    }
}

#[tokio::test]
async fn every_parameter_reaches_the_run() {
    let api = Api::start().await;
    let (user, ..) = api.connected().await;
    let path = format!("/api/v1/strava/users/{user}/sync");
    let query = "data_type=workouts&async=Yes&since=1700000000&limit=100&offset=3&filter_by_modification_time=off\
        &samples=1&zones=T&route=y&summary_start_time=2026-01-01&summary_end_time=1770000000&unknown=1";
    let answer = api.post(&format!("{path}?{query}")).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let request: SyncRequest = serde_json::from_str(&api.run(&answer).await.request).unwrap();
    let expected = SyncRequest {
        data_type: crate::model::DataType::Workouts,
        since_ms: Some(1_700_000_000_000),
        limit: Some(100),
        offset: 3,
        zones: true,
        ignored: ["summary_start_time", "summary_end_time", "filter_by_modification_time", "samples", "route"]
            .map(own)
            .to_vec(),
        ..SyncRequest::default()
    };
    assert_eq!(request, expected);
    let answer = api.post(&format!("{path}?since=0")).await;
    let request: SyncRequest = serde_json::from_str(&api.run(&answer).await.request).unwrap();
    assert_eq!(request.since_ms, Some(crate::model::BEGINNING_MS));
}

#[tokio::test]
async fn bad_input_is_answered_with_the_documented_text() {
    let api = Api::start().await;
    let (user, ..) = api.connected().await;
    let number = "Input should be a valid integer, unable to parse string as an integer";
    let huge = "Unable to parse input string as an integer, exceeded maximum size";
    let boolean = "Input should be a valid boolean, unable to interpret input";
    let date = "Invalid datetime format: 'soon'. Expected ISO 8601 format or Unix timestamp.";
    for (query, text) in [
        ("data_type=sleep", "Input should be 'workouts', '247' or 'all'"),
        ("data_type=", "Input should be 'workouts', '247' or 'all'"),
        ("async=maybe", boolean),
        ("samples=2", boolean),
        ("zones=", boolean),
        ("route=maybe", boolean),
        ("filter_by_modification_time=maybe", boolean),
        ("limit=0", "Input should be greater than or equal to 1"),
        ("limit=101", "Input should be less than or equal to 100"),
        ("limit=ten", number),
        ("limit=", number),
        ("limit=99999999999999999999", huge),
        ("offset=-1", "Input should be greater than or equal to 0"),
        ("offset=1.5", number),
        ("since=-1", "Input should be greater than or equal to 0"),
        ("since=yesterday", number),
        ("since=99999999999999999999", huge),
        ("since=99999999999999999", "since lies beyond the year 2200; write Unix seconds or milliseconds"),
        ("since=1900000000", "the start of the range lies in the future"),
        ("summary_start_time=soon", date),
        ("summary_end_time=soon", date),
        ("summary_start_time=nan", "Invalid datetime format: 'nan'. Expected ISO 8601 format or Unix timestamp."),
        (
            "summary_start_time=2026-02-01&summary_end_time=2026-01-01",
            "summary_end_time must be after summary_start_time",
        ),
        ("summary_start_time=%00", "Value error, text holds a null character"),
    ] {
        for path in ["/api/v1", "/api/v1/providers", ""] {
            let answer = api.post(&format!("{path}/strava/users/{user}/sync?{query}")).await;
            assert_eq!(answer.failure(), (400, own(text), own("invalid_request")), "{query}");
        }
    }
    for id in ["not-a-uuid", "1234", "550e8400-e29b-41d4-a716-44665544000g"] {
        let (status, detail, _) = api.post(&format!("/api/v1/strava/users/{id}/sync")).await.failure();
        assert_eq!(status, 400);
        let reason = uuid::Uuid::parse_str(id).unwrap_err();
        assert_eq!(detail, format!("Input should be a valid UUID, {reason} - {reason}"));
    }
    for provider in ["fitbit", "unknown", "internal", "STRAVA", "tasks", "users", "providers"] {
        for path in ["/api/v1", "/api/v1/providers", ""] {
            let answer = api.post(&format!("{path}/{provider}/users/{user}/sync")).await;
            let text = own("Input should be 'strava'");
            assert_eq!(answer.failure(), (400, text, own("invalid_request")), "{path}/{provider}");
        }
    }
}

#[tokio::test]
async fn a_user_id_may_come_without_dashes() {
    let api = Api::start().await;
    let (user, ..) = api.connected().await;
    let answer = api.post(&format!("/api/v1/strava/users/{}/sync", user.0.simple().to_string().to_uppercase())).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
}

#[tokio::test]
async fn what_the_provider_does_not_have_is_501_before_the_connection_is_looked_at() {
    let api = Api::start().await;
    let nobody = UserId::new();
    for path in ["/api/v1", "/api/v1/providers"] {
        let answer = api.post(&format!("{path}/strava/users/{nobody}/sync?data_type=247")).await;
        let text = own("Provider 'strava' does not support 247 data (sleep/recovery/activity)");
        assert_eq!(answer.failure(), (501, text, own("unsupported")));
    }
}

#[tokio::test]
async fn four_reasons_for_no_connection_share_a_text() {
    let api = Api::start().await;
    let unconnected = api.user().await;
    let (revoked, ..) = api.connected().await;
    api.engine.db.disconnect(revoked, "strava", api.now()).await.unwrap();
    let (refused, account, _) = api.connected().await;
    let version = api.engine.db.find_account(account).await.unwrap().unwrap().token_version;
    let until = api.now() + chrono::Duration::seconds(30);
    api.engine.db.take_refresh_lease(account, version, "test", api.now(), until).await.unwrap().unwrap();
    api.engine
        .db
        .fail_refresh(account, version, "test", crate::storage::RefreshFailure::Dead("refused"), api.now())
        .await
        .unwrap();
    for (user, code) in [
        (UserId::new(), "unknown_user"),
        (unconnected, "no_connection"),
        (revoked, "revoked"),
        (refused, "reauthorization_required"),
    ] {
        for query in ["", "?async=false"] {
            for path in ["/api/v1", "/api/v1/providers", ""] {
                let answer = api.post(&format!("{path}/strava/users/{user}/sync{query}")).await;
                let expected = (404, own("No active connection found for provider"), own(code));
                assert_eq!(answer.failure(), expected, "{path} {query}");
            }
        }
    }
}

#[tokio::test]
async fn an_idempotency_key_is_one_task_and_one_request() {
    let api = Api::start().await;
    let (user, ..) = api.connected().await;
    let send = async |query: &str, word: &str| {
        let path = format!("/api/v1/strava/users/{user}/sync?{query}");
        let request = Request::post(path).header("X-API-Key", &api.key).header("Idempotency-Key", word);
        api.send(request.body(Body::empty()).unwrap()).await
    };
    let first = send("", "abc").await;
    let run = api.run(&first).await;
    // Also after the run is over, when the same request would be a new one.
    let settle = Settle::Final { state: RunState::Success, report: own("{}"), reason: None };
    api.settle(run.id, settle).await;
    assert_eq!(send("", "abc").await.text, first.text);
    assert_ne!(send("", "abd").await.text, first.text);
    let text = own("Idempotency-Key was used for another request");
    assert_eq!(send("since=0", "abc").await.failure(), (409, text, own("idempotency_key_reused")));
    for word in [own(""), own("two words"), "x".repeat(256)] {
        let text = own("Idempotency-Key should have 1 to 255 visible characters");
        assert_eq!(send("", &word).await.failure(), (400, text, own("invalid_request")));
    }
    assert_eq!(send("", &"x".repeat(255)).await.status, 200);
}

#[tokio::test]
async fn an_inline_sync_that_is_over_is_answered_with_booleans_and_counts() {
    let api = Api::start().await;
    let (user, ..) = api.connected().await;
    let send = async || {
        let path = format!("/api/v1/strava/users/{user}/sync?async=false");
        let request = Request::post(path).header("X-API-Key", &api.key).header("Idempotency-Key", "once");
        api.send(request.body(Body::empty()).unwrap()).await
    };
    let asked = {
        let path = format!("/api/v1/strava/users/{user}/sync");
        api.run(&api.post(&path).await).await
    };
    let stream = StreamReport { listed: 3, inserted: 2, ..StreamReport::default() };
    let report = RunReport { streams: [(own("activities"), stream)].into(), calls: 4, ..RunReport::default() };
    let report = serde_json::to_string(&report).unwrap();
    // Somebody else's worker holds the slot: the sync goes on without this caller.
    let until = api.now() + chrono::Duration::seconds(30);
    let claim = api.engine.db.claim_run(asked.id, "test", api.now(), until).await.unwrap().unwrap();
    let answer = send().await;
    assert_eq!(answer.status, 202, "{}", answer.text);
    assert!(answer.headers.contains_key("retry-after"));
    let message = "Sync task queued for strava. Check task status for results.";
    let queued = json!({"success": true, "async": true, "task_id": asked.id, "message": message});
    assert_eq!(answer.json(), queued);
    api.engine.db.take_again(&claim.fence, "{}").await.unwrap();
    let settle = Settle::Final { state: RunState::Success, report, reason: None };
    assert!(api.engine.db.settle_run(&claim.fence, settle, api.now()).await.unwrap());
    let answer = send().await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    assert!(
        answer.text.starts_with("{\"success\":true,\"details\":{\"workouts\":true},\"task_id\":"),
        "{}",
        answer.text
    );
    let expected = json!({
        "streams": {"activities": {"listed": 3, "inserted": 2, "updated": 0, "deleted": 0}},
        "parts": {}, "samples": 0, "files": 0, "calls": 4
    });
    assert_eq!(answer.json()["counts"], expected);
    assert_eq!(answer.json().get("reason"), None);
}

#[test]
fn a_part_is_true_when_each_of_its_streams_ended_without_error() {
    let spec = crate::providers::find("strava").unwrap().spec();
    let details = |state, error: Option<&str>, data_type| {
        let stream = StreamReport { error: error.map(own), ..StreamReport::default() };
        let report = RunReport { streams: [(own("activities"), stream)].into(), ..RunReport::default() };
        serde_json::to_value(tasks::details(spec, state, &report, data_type)).unwrap()
    };
    use crate::model::DataType::{All, Daily, Workouts};
    assert_eq!(details(RunState::Success, None, All), json!({"workouts": true}));
    assert_eq!(details(RunState::Success, None, Workouts), json!({"workouts": true}));
    assert_eq!(details(RunState::Success, None, Daily), json!({}));
    assert_eq!(details(RunState::Partial, None, All), json!({"workouts": true}));
    assert_eq!(details(RunState::Partial, Some("gone"), All), json!({"workouts": false}));
    assert_eq!(details(RunState::Failed, None, All), json!({"workouts": false}));
    assert_eq!(details(RunState::Cancelled, None, All), json!({"workouts": false}));
    let nothing = RunReport::default();
    let of = |state| serde_json::to_value(tasks::details(spec, state, &nothing, All)).unwrap();
    assert_eq!(of(RunState::Success), json!({"workouts": true}), "nothing new is no failure");
    assert_eq!(of(RunState::Partial), json!({"workouts": false}));
}

// ---- keys ---------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn keys_that_do_not_work_learn_nothing_else() {
    let api = Api::start().await;
    let (user, ..) = api.connected().await;
    let expired = api.make_key("admin", Some(at(NOW))).await;
    let revoked = api.make_key("admin", None).await;
    let id = api.engine.db.find_api_key(&vault::hash_secret(&revoked)).await.unwrap().unwrap().id;
    api.engine.db.revoke_api_key(id, api.now()).await.unwrap();
    let bad = "Invalid or missing API key";
    let none = "Authentication required: provide JWT token or API key";
    let developer = "Could not validate credentials";
    for (method, path, missing) in [
        ("POST", format!("/api/v1/strava/users/{user}/sync"), bad),
        ("POST", own("/api/v1/strava/users/no-uuid/sync?limit=0"), bad),
        ("POST", own("/api/v1/unknown/users/no-uuid/sync"), bad),
        ("POST", format!("/strava/users/{user}/sync"), bad),
        ("POST", format!("/api/v1/providers/strava/users/{user}/sync"), none),
        ("POST", own("/api/v1/providers/strava/users/no-uuid/sync"), none),
        ("GET", own("/api/v1/tasks"), none),
        ("GET", own("/api/v1/tasks?limit=0"), none),
        ("GET", own("/api/v1/tasks/no-uuid"), none),
        ("DELETE", own("/api/v1/tasks/no-uuid"), none),
        ("GET", own("/api/v1/users"), none),
        ("POST", own("/api/v1/users"), none),
        ("GET", own("/api/v1/users/no-uuid"), none),
        ("PATCH", own("/api/v1/users/no-uuid"), developer),
        ("DELETE", own("/api/v1/users/no-uuid"), developer),
        ("GET", own("/api/v1/users/no-uuid/gaps"), none),
        ("GET", own("/api/v1/users/no-uuid/connections"), none),
    ] {
        let answer = api.call(method, &path, "", "").await;
        assert_eq!(answer.failure(), (401, own(missing), own("unauthorized")), "{method} {path}");
        for key in ["ws_unknown", &expired, &revoked] {
            let answer = api.call(method, &path, key, "").await;
            let text = if missing == developer { developer } else { bad };
            assert_eq!(answer.failure(), (401, own(text), own("unauthorized")), "{method} {path}");
        }
    }
}

#[tokio::test]
async fn scopes_bound_what_a_key_may_do() {
    let api = Api::start().await;
    let (user, ..) = api.connected().await;
    let task = api.run(&api.post(&format!("/api/v1/strava/users/{user}/sync")).await).await.id;
    let read = api.make_key("read", None).await;
    let sync = api.make_key("sync", None).await;
    for (method, path, scope) in [
        ("POST", format!("/api/v1/strava/users/{user}/sync"), "sync"),
        ("POST", own("/api/v1/strava/users/no-uuid/sync"), "sync"),
        ("DELETE", format!("/api/v1/tasks/{task}"), "sync"),
        ("POST", own("/api/v1/users"), "sync"),
        ("GET", format!("/api/v1/tasks/{task}"), "read"),
        ("GET", own("/api/v1/tasks"), "read"),
        ("GET", own("/api/v1/users"), "read"),
        ("GET", format!("/api/v1/users/{user}"), "read"),
        ("GET", format!("/api/v1/users/{user}/gaps"), "read"),
        ("GET", format!("/api/v1/users/{user}/connections"), "read"),
        ("PATCH", format!("/api/v1/users/{user}"), "admin"),
        ("DELETE", format!("/api/v1/users/{user}"), "admin"),
    ] {
        for (key, has) in [(&read, "read"), (&sync, "sync")] {
            let answer = api.call(method, &path, key, "{}").await;
            if has == scope {
                assert_ne!(answer.status, 403, "{method} {path} with {has}");
            } else {
                let text = format!("API key lacks the scope '{scope}'");
                assert_eq!(answer.failure(), (403, text, own("insufficient_scope")), "{method} {path} with {has}");
            }
        }
    }
    let both = api.make_key("read,sync", None).await;
    assert_eq!(api.call("GET", "/api/v1/tasks", &both, "").await.status, 200);
    assert_eq!(api.call("POST", "/api/v1/users", &both, "{}").await.status, 201);
}

#[tokio::test]
async fn the_use_of_a_key_is_noted_once_a_minute() {
    let api = Api::start().await;
    let used = async || api.engine.db.list_api_keys().await.unwrap()[0].last_used_at;
    api.get("/api/v1/tasks").await;
    while used().await.is_none() {
        tokio::task::yield_now().await;
    }
    api.engine.clock.set(at(NOW + 59_000));
    api.get("/api/v1/tasks").await;
    assert_eq!(used().await, Some(at(NOW)));
    api.engine.clock.set(at(NOW + 60_000));
    api.get("/api/v1/tasks").await;
    while used().await != Some(at(NOW + 60_000)) {
        tokio::task::yield_now().await;
    }
}

// ---- tasks --------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn a_task_tells_where_it_stands() {
    let api = Api::start().await;
    let (user, ..) = api.connected().await;
    let run = api.run(&api.post(&format!("/api/v1/strava/users/{user}/sync")).await).await;
    let path = format!("/api/v1/tasks/{}", run.id);
    let answer = api.get(&path).await;
    assert_eq!((answer.status, answer.headers["retry-after"].to_str().unwrap()), (200, "1"));
    let expected = json!({
        "task_id": run.id, "user_id": user, "provider": "strava", "status": "queued", "terminal": false,
        "due_at": "2026-03-10T12:00:00Z", "cancel_requested": false, "source": "pull", "class": "interactive",
        "request": {"data_type": "all"}, "attempts": 0, "created_at": "2026-03-10T12:00:00Z"
    });
    assert_eq!(answer.json(), expected);

    let wait = Settle::Wait {
        due: at(NOW + 90_500),
        reason: own("quota spent"),
        waiting_on: Some(own("15m")),
        class: crate::model::Class::Backfill,
        attempt: false,
        report: own("{\"calls\":7}"),
    };
    api.settle(run.id, wait).await;
    let answer = api.get(&path).await;
    assert_eq!(answer.headers["retry-after"], "91");
    let body = answer.json();
    assert_eq!(body["status"], "waiting");
    assert_eq!((&body["reason"], &body["due_at"]), (&json!("quota spent"), &json!("2026-03-10T12:01:30.500Z")));
    assert_eq!(body["report"]["counts"]["calls"], 7);
    assert_eq!(body.get("details"), None, "details exist only in final reports");

    api.engine.clock.set(at(NOW + 91_000));
    let stream = StreamReport { error: Some(own("no answer")), ..StreamReport::default() };
    let streams = [(own("activities"), stream)].into();
    let report = RunReport { streams, notes: vec![own("route was ignored")], ..RunReport::default() };
    let report = serde_json::to_string(&report).unwrap();
    api.settle(run.id, Settle::Final { state: RunState::Partial, report, reason: Some(own("activities: no answer")) })
        .await;
    let answer = api.get(&path).await;
    assert!(!answer.headers.contains_key("retry-after"));
    let body = answer.json();
    assert_eq!((&body["status"], &body["terminal"]), (&json!("partial"), &json!(true)));
    assert_eq!(body["details"], json!({"workouts": false}));
    assert_eq!(body["report"]["errors"], json!({"activities": "no answer"}));
    assert_eq!(body["report"]["notes"], json!(["route was ignored"]));
    assert_eq!(body["ended_at"], "2026-03-10T12:01:31Z");
    assert_eq!(body.get("due_at"), None);
}

#[tokio::test]
async fn a_cancelled_task_stays_cancelled() {
    let api = Api::start().await;
    let (user, ..) = api.connected().await;
    let run = api.run(&api.post(&format!("/api/v1/strava/users/{user}/sync")).await).await;
    let path = format!("/api/v1/tasks/{}", run.id);
    for _ in 0..2 {
        let answer = api.call("DELETE", &path, &api.key, "").await;
        assert_eq!(answer.status, 200);
        let body = answer.json();
        assert_eq!((&body["status"], &body["terminal"]), (&json!("cancelled"), &json!(true)));
    }
    // One that is worked on ends at its next page.
    let run = api.run(&api.post(&format!("/api/v1/strava/users/{user}/sync")).await).await;
    let until = api.now() + chrono::Duration::seconds(30);
    api.engine.db.claim_run(run.id, "test", api.now(), until).await.unwrap().unwrap();
    let answer = api.call("DELETE", &format!("/api/v1/tasks/{}", run.id), &api.key, "").await;
    let body = answer.json();
    assert_eq!((&body["status"], &body["cancel_requested"]), (&json!("in_progress"), &json!(true)));
    assert_eq!(answer.headers["retry-after"], "2");
}

#[tokio::test]
async fn unknown_tasks_are_404() {
    let api = Api::start().await;
    let id = "550e8400-e29b-41d4-a716-446655440000";
    for method in ["GET", "DELETE"] {
        let answer = api.call(method, &format!("/api/v1/tasks/{id}"), &api.key, "").await;
        assert_eq!(answer.failure(), (404, format!("Task with ID: {id} not found."), own("unknown_task")));
        let answer = api.call(method, "/api/v1/tasks/x", &api.key, "").await;
        assert!(answer.failure().1.starts_with("Input should be a valid UUID, "), "{}", answer.text);
    }
}

#[tokio::test]
async fn tasks_come_in_pages_that_stay_put() {
    let api = Api::start().await;
    let (user, ..) = api.connected().await;
    let mut all = Vec::new();
    for since in 1..=5 {
        all.push(api.run(&api.post(&format!("/api/v1/strava/users/{user}/sync?since={since}")).await).await.id);
    }
    let (other, ..) = api.connected().await;
    api.post(&format!("/api/v1/strava/users/{other}/sync")).await;
    all.reverse();
    let mut seen = Vec::new();
    let mut cursor = String::new();
    loop {
        let body = api.get(&format!("/api/v1/tasks?user_id={user}&provider=strava&limit=2{cursor}")).await.json();
        for item in body["items"].as_array().unwrap() {
            seen.push(RunId(item["task_id"].as_str().unwrap().parse().unwrap()));
        }
        let Some(next) = body["next_cursor"].as_str() else { break };
        cursor = format!("&cursor={next}");
    }
    assert_eq!(seen, all);
    assert_eq!(api.get("/api/v1/tasks").await.json()["items"].as_array().unwrap().len(), 6);
    assert_eq!(api.get("/api/v1/tasks?status=success").await.json(), json!({"items": [], "next_cursor": null}));
    let states = "Input should be 'queued', 'in_progress', 'waiting', 'success', 'partial', 'failed' or 'cancelled'";
    for (query, text) in [
        ("limit=0", "Input should be greater than or equal to 1"),
        ("limit=101", "Input should be less than or equal to 100"),
        ("status=done", states),
        ("provider=fitbit", "Input should be 'strava'"),
        ("cursor=%2B", "Invalid cursor format: '+'. Expected the next_cursor of another page."),
    ] {
        let answer = api.get(&format!("/api/v1/tasks?{query}")).await;
        assert_eq!(answer.failure(), (400, own(text), own("invalid_request")));
    }
    assert!(api.get("/api/v1/tasks?user_id=x").await.failure().1.starts_with("Input should be a valid UUID, "));
}

// ---- users --------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn users_are_made_read_changed_and_erased() {
    let api = Api::start().await;
    let body = r#"{"first_name":"Ada","email":"ada@example.com","external_user_id":"7","nickname":1}"#;
    let made = api.call("POST", "/api/v1/users", &api.key, body).await;
    assert_eq!(made.status, 201, "{}", made.text);
    let id = made.json()["id"].as_str().unwrap().to_owned();
    let expected = json!({
        "id": id, "created_at": "2026-03-10T12:00:00Z", "first_name": "Ada", "last_name": null,
        "email": "ada@example.com", "external_user_id": "7", "last_synced_at": null, "last_synced_provider": null,
        "has_active_connection": false
    });
    assert_eq!(made.json(), expected);
    let path = format!("/api/v1/users/{id}");
    assert_eq!(api.get(&path).await.json(), expected);

    let again = api.call("POST", "/api/v1/users", &api.key, r#"{"external_user_id":"7","last_name":"X"}"#).await;
    assert_eq!((again.status, again.json()), (201, expected), "the one who has it, unchanged");
    let taken = api.call("POST", "/api/v1/users", &api.key, r#"{"email":"ada@example.com"}"#).await;
    let text = own("User with this email already exists.");
    assert_eq!(taken.failure(), (409, text, own("duplicate_email")));

    let changed = api.call("PATCH", &path, &api.key, r#"{"last_name":"Byron","first_name":null}"#).await;
    assert_eq!((&changed.json()["first_name"], &changed.json()["last_name"]), (&json!("Ada"), &json!("Byron")));
    let gone = api.call("DELETE", &path, &api.key, "").await;
    assert_eq!((gone.status, &gone.json()["id"]), (200, &json!(id)));
    for method in ["GET", "PATCH", "DELETE"] {
        let answer = api.call(method, &path, &api.key, "{}").await;
        assert_eq!(answer.failure(), (404, format!("User with ID: {id} not found."), own("unknown_user")));
    }
}

#[tokio::test]
async fn bad_bodies_are_answered_with_the_documented_text() {
    let api = Api::start().await;
    let long = format!("{{\"first_name\":\"{}\"}}", "é".repeat(101));
    let email = "value is not a valid email address: ";
    for (body, text) in [
        ("", own("Field required")),
        ("[]", own("Input should be a valid dictionary")),
        ("7", own("Input should be a valid dictionary")),
        (r#"{"first_name":7}"#, own("Input should be a valid string")),
        (&long, own("String should have at most 100 characters")),
        (r#"{"email":"ada"}"#, format!("{email}An email address must have an @-sign.")),
        (r#"{"email":"@x.org"}"#, format!("{email}There must be something before the @-sign.")),
        (r#"{"email":"ada@"}"#, format!("{email}There must be something after the @-sign.")),
        (r#"{"email":"ada@home"}"#, format!("{email}The part after the @-sign is not valid. It should have a period.")),
        (r#"{"last_name":"a\u0000b"}"#, own("Value error, text holds a null character")),
    ] {
        let answer = api.call("POST", "/api/v1/users", &api.key, body).await;
        assert_eq!(answer.failure(), (400, text, own("invalid_request")), "{body}");
    }
    let answer = api.call("POST", "/api/v1/users", &api.key, "{").await;
    assert!(answer.failure().1.starts_with("JSON decode error - EOF while parsing"), "{}", answer.text);
}

#[tokio::test]
async fn users_are_listed_in_pages() {
    let api = Api::start().await;
    assert_eq!(
        api.get("/api/v1/users").await.json(),
        json!({"items": [], "total": 0, "page": 1, "limit": 20, "pages": 0, "has_next": false, "has_prev": false})
    );
    for name in ["b_c", "bxc", "a"] {
        let body = json!({"first_name": name, "email": format!("{name}@example.com")}).to_string();
        api.call("POST", "/api/v1/users", &api.key, &body).await;
    }
    api.connected().await;
    let names = async |query: &str| {
        let body = api.get(&format!("/api/v1/users?{query}")).await.json();
        let items = body["items"].as_array().unwrap().clone();
        items.iter().map(|item| item["first_name"].as_str().unwrap_or("-").to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(names("search=B_C").await, ["b_c"], "_ is a letter");
    assert_eq!(names("email=a@example.com").await, ["a"]);
    assert_eq!(names("sort_by=first_name&sort_order=asc&limit=2&page=2").await, ["b_c", "bxc"]);
    let body = api.get("/api/v1/users?limit=3&page=1").await.json();
    assert_eq!((&body["pages"], &body["has_next"], &body["has_prev"]), (&json!(2), &json!(true), &json!(false)));
    let connected = body["items"].as_array().unwrap().iter().filter(|u| u["has_active_connection"] == true).count();
    assert!(connected <= 1);
    for (query, text) in [
        ("page=0", "Input should be greater than or equal to 1"),
        ("limit=0", "Input should be greater than or equal to 1"),
        ("limit=101", "Input should be less than or equal to 100"),
        ("sort_order=up", "Input should be 'asc' or 'desc'"),
        ("sort_by=id", "Input should be 'created_at', 'email', 'first_name', 'last_name' or 'last_synced_at'"),
    ] {
        let answer = api.get(&format!("/api/v1/users?{query}")).await;
        assert_eq!(answer.failure(), (400, own(text), own("invalid_request")));
    }
    assert_eq!(api.get("/api/v1/users?page=9223372036854775807&limit=100").await.status, 200);
}

#[tokio::test]
async fn connections_and_gaps_are_told() {
    let api = Api::start().await;
    let (user, _, connection) = api.connected().await;
    let body = api.get(&format!("/api/v1/users/{user}/connections")).await.json();
    assert_eq!(body[0]["id"], json!(connection));
    assert_eq!((&body[0]["status"], &body[0]["live_sync_mode"]), (&json!("active"), &json!("pull")));
    assert_eq!(api.get(&format!("/api/v1/users/{}/connections", UserId::new())).await.json(), json!([]));

    let path = format!("/api/v1/users/{user}/gaps");
    let gap = |state: &str| {
        json!({"items": [{"provider": "strava", "stream": "activities", "from": null, "from_ms": null,
            "to": "2026-03-10T12:00:00Z", "to_ms": NOW, "state": state}]})
    };
    assert_eq!(api.get(&path).await.json(), gap("unread"));
    let run = api.run(&api.post(&format!("/api/v1/strava/users/{user}/sync")).await).await;
    let until = api.now() + chrono::Duration::seconds(30);
    let claim = api.engine.db.claim_run(run.id, "test", api.now(), until).await.unwrap().unwrap();
    let (lo, hi) = (crate::model::BEGINNING_MS, NOW);
    let new = NewWindow { stream: "activities", purpose: Purpose::Cover, lo, hi };
    api.engine.db.open_window(&claim.fence, new, None).await.unwrap();
    assert_eq!(api.get(&path).await.json(), gap("open"));
    // A connection that is read no more says so with each gap.
    let account = api.engine.db.find_connection(connection).await.unwrap().unwrap().account_id;
    api.engine.db.drop_grant(account, "access was taken back", api.now()).await.unwrap();
    let error = api.get(&path).await.json()["items"][0]["error"].clone();
    assert_eq!(error, json!("the account has to be connected again: access was taken back"));
    let nobody = UserId::new();
    let answer = api.get(&format!("/api/v1/users/{nobody}/gaps")).await;
    assert_eq!(answer.failure(), (404, format!("User with ID: {nobody} not found."), own("unknown_user")));
}

// ---- the service --------------------------------------------------------------------------------------------------

#[tokio::test]
async fn the_service_tells_of_itself_without_a_key() {
    let api = Api::start().await;
    for (path, body) in [
        ("/", json!({"message": "Server is running!"})),
        ("/health/live", json!({"status": "alive"})),
        ("/health/ready", json!({"status": "ready", "database": "ok", "schema": "ok", "redis": "ok"})),
    ] {
        let answer = api.call("GET", path, "", "").await;
        assert_eq!((answer.status, answer.json()), (200, body));
    }
    assert_eq!(api.call("GET", "/openapi.json", "", "").await.text, document_json());
    let answer = api.call("GET", "/metrics", "", "").await;
    assert!(answer.text.contains("wearsync_http_requests_total{method=\"GET\",route=\"/health/live\",status=\"200\"}"));
    assert_eq!(answer.headers["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    let docs = api.call("GET", "/docs/", "", "").await;
    assert_eq!(docs.status, 200);
    assert!(!docs.text.contains("https://"), "the page loads nothing from elsewhere");
    let initializer = api.call("GET", "/docs/swagger-initializer.js", "", "").await;
    assert!(initializer.text.contains("/openapi.json"), "{}", initializer.text);
}

#[tokio::test]
async fn metrics_may_need_a_key() {
    let api = Api::with(true).await;
    let answer = api.call("GET", "/metrics", "", "").await;
    let text = own("Authentication required: provide JWT token or API key");
    assert_eq!(answer.failure(), (401, text, own("unauthorized")));
    let sync = api.make_key("sync", None).await;
    assert_eq!(api.call("GET", "/metrics", &sync, "").await.status, 403);
    assert_eq!(api.get("/metrics").await.status, 200);
}

#[tokio::test]
async fn unknown_paths_and_methods_are_json() {
    let api = Api::start().await;
    for path in ["/nowhere", "/api/v1", "/api/v1/strava", "//evil.example/sync/"] {
        assert_eq!(api.get(path).await.failure(), (404, own("Not Found"), own("unknown_path")), "{path}");
    }
    for (method, path, allow) in [
        ("GET", "/api/v1/strava/users/x/sync", "POST"),
        ("PUT", "/api/v1/users", "GET,HEAD,POST"),
        ("POST", "/api/v1/tasks/x", "GET,HEAD,DELETE"),
        ("DELETE", "/health/live", "GET,HEAD"),
    ] {
        let answer = api.call(method, path, "", "").await;
        assert_eq!(answer.failure(), (405, own("Method Not Allowed"), own("method_not_allowed")), "{method} {path}");
        assert_eq!(answer.headers["allow"], allow, "{method} {path}");
    }
    let answer = api.post("/api/v1/strava/users/x/sync/?limit=1").await;
    assert_eq!(
        (answer.status, answer.headers["location"].to_str().unwrap()),
        (307, "/api/v1/strava/users/x/sync?limit=1")
    );
}

#[tokio::test]
async fn large_bodies_are_refused_announced_or_not() {
    let api = Api::start().await;
    let large = "x".repeat(BODY_LIMIT + 1);
    let text = own("Request body is larger than 1 MiB");
    for path in ["/api/v1/users", "/api/v1/strava/users/x/sync"] {
        let request = Request::post(path).header("X-API-Key", &api.key).header("Content-Length", large.len());
        let answer = api.send(request.body(Body::from(large.clone())).unwrap()).await;
        assert_eq!(answer.failure(), (413, text.clone(), own("body_too_large")));
    }
    let chunks = futures::stream::iter(vec![Ok::<_, std::io::Error>("x".repeat(BODY_LIMIT)), Ok(own("xx"))]);
    let request = Request::post("/api/v1/users").header("X-API-Key", &api.key);
    let answer = api.send(request.body(Body::from_stream(chunks)).unwrap()).await;
    assert_eq!(answer.failure(), (413, text, own("body_too_large")));
}

#[tokio::test]
async fn a_database_that_is_away_is_503() {
    let api = Api::start().await;
    let (user, ..) = api.connected().await;
    api.engine.db.close().await;
    for (method, path) in [
        ("POST", format!("/api/v1/strava/users/{user}/sync")),
        ("POST", own("/api/v1/strava/users/x/sync")),
        ("GET", own("/api/v1/tasks")),
        ("GET", own("/api/v1/users")),
    ] {
        let answer = api.call(method, &path, &api.key, "").await;
        let text = own("The database is not available");
        assert_eq!(answer.failure(), (503, text, own("database_unavailable")), "{method} {path}");
        assert_eq!(answer.headers["retry-after"], "5");
    }
    let answer = api.get("/health/ready").await;
    let away = json!({"status": "not_ready", "database": "away", "schema": "unknown", "redis": "ok"});
    assert_eq!((answer.status, answer.json()), (503, away));
    assert_eq!(api.get("/health/live").await.status, 200);
}

#[tokio::test]
async fn request_ids_are_kept_when_they_are_sane() {
    let api = Api::start().await;
    let send = async |id: &str| {
        let request = Request::get("/nowhere").header("X-Request-Id", id).body(Body::empty()).unwrap();
        let answer = api.send(request).await;
        assert_eq!(answer.json()["request_id"], answer.headers["x-request-id"].to_str().unwrap());
        answer.headers["x-request-id"].to_str().unwrap().to_owned()
    };
    assert_eq!(send("trace-1:a.b_c").await, "trace-1:a.b_c");
    for odd in ["", "two words", "<script>", &"x".repeat(129)] {
        assert!(send(odd).await.parse::<Uuid>().is_ok(), "{odd}");
    }
}

#[tokio::test]
async fn a_panic_is_500_with_a_fixed_text() {
    let api = Api::start().await;
    async fn panics() -> StatusCode {
        panic!("secret")
    }
    let state = ApiState { engine: api.engine.clone(), metrics: telemetry::install_metrics(), metrics_need_key: false };
    let app = Arc::new(App::new(state));
    let router: Router =
        Router::new().route("/boom", axum::routing::get(panics)).layer(middleware::from_fn_with_state(app, outermost));
    let api = Api { router, ..api };
    let answer = api.get("/boom").await;
    assert_eq!(answer.failure(), (500, own("Internal Server Error"), own("internal_error")));
    assert!(!answer.text.contains("secret"));
}

#[test]
fn instants_are_read_as_people_write_them() {
    let read = |text: &str| extract::instant_ms(text).ok();
    for (text, ms) in [
        ("1767225600", 1_767_225_600_000),
        ("1767225600.5", 1_767_225_600_500),
        ("1767225600000", 1_767_225_600_000),
        ("-5", -5000),
        ("2026-01-01", 1_767_225_600_000),
        ("2026-01-01T00:00:00Z", 1_767_225_600_000),
        ("2026-01-01T01:00:00+01:00", 1_767_225_600_000),
        ("2026-01-01T01:00+01:00", 1_767_225_600_000),
        ("2026-01-01 00:00", 1_767_225_600_000),
        ("2026-01-01T00:00:00", 1_767_225_600_000),
        ("2026-01-01T00:00:00.250", 1_767_225_600_250),
        ("2026-01-01T00:00Z", 1_767_225_600_000),
    ] {
        assert_eq!(read(text), Some(ms), "{text}");
    }
    for text in ["", "soon", "nan", "inf", "1e300", "2026-13-01", "2026-01-01T25:00:00Z", "é", "Z", "9999-01-01"] {
        assert_eq!(read(text), None, "{text}");
    }
}

// ---- schedules and the past ---------------------------------------------------------------------------------------

#[tokio::test]
async fn a_schedule_is_told_and_set() {
    let api = Api::start().await;
    let (user, _, connection) = api.connected().await;
    let path = format!("/api/v1/users/{user}/connections/strava/schedule");
    let put = async |body: &str| api.call("PUT", &path, &api.key, body).await;
    let told = api.get(&path).await.json();
    assert_eq!((&told["schedule"], &told["is_default"]), (&json!("6h"), &json!(true)));
    assert_eq!((&told["next_at"], &told["last_at"]), (&json!("2026-03-10T12:00:00Z"), &Value::Null), "due at once");
    let told = put(r#"{"schedule": "0 6 * * *"}"#).await;
    assert_eq!(told.status, 200, "{}", told.text);
    assert_eq!(told.json()["next_at"], "2026-03-11T06:00:00Z");
    assert_eq!(api.get(&path).await.json(), told.json());
    let told = put(r#"{"schedule": "0 6 * * *", "time_zone": "Asia/Tokyo"}"#).await.json();
    assert_eq!((&told["next_at"], &told["time_zone"]), (&json!("2026-03-10T21:00:00Z"), &json!("Asia/Tokyo")));
    let told = put(r#"{"schedule": "90m"}"#).await.json();
    let ahead = told["next_at"].as_str().unwrap().parse::<DateTime<Utc>>().unwrap() - api.now();
    assert!((81..=99).contains(&ahead.num_minutes()) && told["is_default"] == false, "{told}");
    let told = put(r#"{"schedule": "off"}"#).await.json();
    assert_eq!(
        (&told["schedule"], &told["next_at"], &told["reconcile_at"]),
        (&json!("off"), &Value::Null, &Value::Null)
    );
    let told = put(r#"{"schedule": null}"#).await.json();
    assert_eq!((&told["schedule"], &told["is_default"]), (&json!("6h"), &json!(true)));
    for (body, text) in [
        ("{}", "Field required"),
        (r#"{"schedule": "6h", "time_zone": "Bern"}"#, "`Bern` is no time zone; write one as IANA does: Europe/Zurich"),
        (r#"{"schedule": 6}"#, "Input should be a valid string"),
        (r#"{"schedule": "5s"}"#, "`5s` is too short or too long; an interval has 1m to 28d"),
        (
            r#"{"schedule": "hourly"}"#,
            "`hourly` is no schedule; write an interval (6h, 30m), five fields of cron, or off",
        ),
    ] {
        assert_eq!(put(body).await.failure(), (400, own(text), own("invalid_request")), "{body}");
    }
    for (path, code) in [
        (format!("/api/v1/users/{}/connections/strava/schedule", Uuid::nil()), "unknown_user"),
        (format!("/api/v1/users/{}/connections/strava/schedule", api.user().await), "no_connection"),
    ] {
        assert_eq!(api.get(&path).await.failure().2, code);
        assert_eq!(api.call("PUT", &path, &api.key, r#"{"schedule": "off"}"#).await.failure().2, code);
    }
    assert_eq!(api.get(&path.replace("strava", "acme")).await.status, 400);
    let (reader, writer) = (api.make_key("read", None).await, api.make_key("sync", None).await);
    assert_eq!(api.call("GET", &path, &reader, "").await.status, 200);
    assert_eq!(api.call("PUT", &path, &reader, r#"{"schedule": "off"}"#).await.status, 403);
    assert_eq!(api.call("PUT", &path, &writer, r#"{"schedule": "off"}"#).await.status, 200);
    assert_eq!(api.call("PUT", &path, "", r#"{"schedule": "off"}"#).await.status, 401);
    api.engine.db.disconnect(user, "strava", api.now()).await.unwrap();
    assert_eq!(api.get(&path).await.failure().2, "revoked");
    assert!(api.engine.db.find_schedule(connection).await.unwrap().is_some(), "who comes back has it still");
}

#[tokio::test]
async fn the_past_is_read_again_in_the_background() {
    let api = Api::start().await;
    let (user, ..) = api.connected().await;
    let path = format!("/api/v1/providers/strava/users/{user}/sync/historical");
    let answer = api.post(&path).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let run = api.run(&answer).await;
    let expected = json!({
        "success": true, "provider": "strava", "user_id": user.to_string(), "method": "pull_api",
        "task_id": run.id.to_string(), "message": "Historical sync queued for 90 days of strava data.", "days": 90,
        "start_date": "2025-12-10T12:00:00.000+00:00", "end_date": "2026-03-10T12:00:00.000+00:00"
    });
    assert_eq!(answer.json(), expected);
    assert_eq!((run.class, run.source.as_str(), run.state.as_str()), (3, "backfill", "queued"));
    let request: SyncRequest = serde_json::from_str(&run.request).unwrap();
    assert_eq!(request, SyncRequest { since_ms: Some(NOW - 90 * 86_400_000), ..SyncRequest::default() });
    assert_eq!(api.post(&path).await.json()["task_id"], expected["task_id"], "asked for twice it is one task");
    let one = api.post(&format!("{path}?days=1")).await.json();
    assert_eq!((&one["days"], &one["start_date"]), (&json!(1), &json!("2026-03-09T12:00:00.000+00:00")));
    for (query, text) in [
        ("days=0", "Input should be greater than or equal to 1"),
        ("days=366", "Input should be less than or equal to 365"),
        ("days=x", "Input should be a valid integer, unable to parse string as an integer"),
    ] {
        assert_eq!(api.post(&format!("{path}?{query}")).await.failure(), (400, own(text), own("invalid_request")));
    }
    let other = api.user().await;
    let failure = api.post(&path.replace(&user.to_string(), &other.to_string())).await.failure();
    assert_eq!(failure, (404, own("No active connection found for provider"), own("no_connection")));
    let failure = api.post(&path.replace(&user.to_string(), &Uuid::nil().to_string())).await.failure();
    assert_eq!((failure.0, failure.2.as_str()), (404, "unknown_user"));
    assert_eq!(api.post(&path.replace("strava", "acme")).await.status, 400);
    assert_eq!(api.call("POST", &path, "", "").await.status, 401);
    let reader = api.make_key("read", None).await;
    assert_eq!(api.call("POST", &path, &reader, "").await.status, 403);
    api.engine.db.disconnect(user, "strava", api.now()).await.unwrap();
    assert_eq!(api.post(&path).await.failure().2, "revoked");
}
