//! Who may call what, and what is managed by those who may: developers, keys, applications, tokens, providers.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Request};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{DateTime, Duration, Utc};
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Value, json};
use tower::ServiceExt as _;
use wearsync::api::{self, ApiState};
use wearsync::clock::Clock;
use wearsync::simulator::Options;
use wearsync::storage::{NewApiKey, NewDeveloper};
use wearsync::{telemetry, vault};

use crate::both;
use crate::support::{Place, Shape, World};

both! {
    every_route_takes_the_credentials_it_documents_and_no_other => matrix;
    what_is_no_text_in_a_path_is_an_error_like_others => no_text;
    a_sync_by_a_developer_takes_two_statements => hot_path;
    developers_log_in => logins;
    logins_do_not_tell_who_exists => login_times;
    passwords_change_and_old_tokens_end => passwords;
    keys_are_made_renamed_rotated_and_revoked => keys;
    applications_are_their_developers_own => applications;
    tokens_of_users_are_good_for_one_use => tokens;
    providers_are_listed_and_set => providers;
    coverage_and_pictures_need_nobody => coverage;
    connections_tell_what_the_provider_can => connections;
    users_are_found_by_any_part_of_a_name => search;
    pages_of_listed_origins_may_call => cors;
    secrets_are_shown_once_and_nowhere_else => canary;
    no_log_and_no_command_tells_a_secret => processes;
}

/// 2026-03-10T12:00:00Z
const NOW: i64 = 1_773_144_000;
const PASSWORD: &str = "correct horse battery";

struct Client {
    world: World,
    router: Router,
    admin: String,
}

struct Answer {
    status: u16,
    headers: HeaderMap,
    text: String,
    json: Value,
}

impl Answer {
    fn failure(&self) -> (u16, &str) {
        (self.status, self.json["detail"].as_str().unwrap_or_default())
    }
}

/// A header, or none.
type Shown<'a> = &'a [(&'a str, &'a str)];

impl Client {
    async fn new(shape: Shape) -> Self {
        let clock = Clock::mock(DateTime::from_timestamp(NOW, 0).expect("an instant"));
        Self::with(shape, clock).await
    }

    async fn with(shape: Shape, clock: Clock) -> Self {
        Self::set(shape, clock, &[]).await
    }

    async fn set(shape: Shape, clock: Clock, settings: &[(&str, &str)]) -> Self {
        let options = Options { activities: 3, stream_points: 5, athletes: 2, ..Options::default() };
        let world = World::with(shape, options, clock, settings).await;
        let metrics = telemetry::install_metrics();
        let router = api::router(ApiState { engine: world.engine.clone(), metrics, metrics_need_key: true });
        let mut client = Self { world, router, admin: String::new() };
        client.admin = client.key("admin", None).await;
        client
    }

    fn now(&self) -> DateTime<Utc> {
        self.world.clock.now()
    }

    /// Time goes by.
    fn wait(&self, seconds: i64) {
        self.world.clock.set(self.now() + Duration::seconds(seconds));
    }

    async fn key(&self, scopes: &str, expires_at: Option<DateTime<Utc>>) -> String {
        let key = vault::new_api_key();
        let new = NewApiKey {
            hash: vault::hash_secret(key.expose_secret()),
            prefix: vault::key_prefix(&key),
            name: scopes.to_owned(),
            scopes: scopes.to_owned(),
            created_by: None,
            expires_at,
        };
        self.world.engine.db.insert_api_key(new, self.now()).await.expect("a key");
        key.expose_secret().to_owned()
    }

    async fn developer(&self, email: &str) -> uuid::Uuid {
        let password = SecretString::from(PASSWORD.to_owned());
        let new = NewDeveloper {
            email: email.to_owned(),
            first_name: None,
            last_name: None,
            password_hash: vault::hash_password(&password),
        };
        self.world.engine.db.insert_developer(new, self.now()).await.expect("a developer").id
    }

    async fn send(&self, method: &str, path: &str, shown: Shown<'_>, body: &str) -> Answer {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in shown {
            request = request.header(*name, *value);
        }
        let response = self.router.clone().oneshot(request.body(Body::from(body.to_owned())).expect("a request")).await;
        let (parts, body) = response.expect("an answer").into_parts();
        let bytes = axum::body::to_bytes(body, usize::MAX).await.expect("a body");
        let text = String::from_utf8(bytes.to_vec()).expect("is text");
        let json = serde_json::from_str(&text).unwrap_or(Value::Null);
        Answer { status: parts.status.as_u16(), headers: parts.headers, text, json }
    }

    /// As somebody with a key that may do everything.
    async fn admin(&self, method: &str, path: &str, body: &Value) -> Answer {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        self.send(method, path, &[("X-API-Key", &self.admin)], &body).await
    }

    async fn bearer(&self, method: &str, path: &str, token: &str, body: &Value) -> Answer {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        self.send(method, path, &[("Authorization", &format!("Bearer {token}"))], &body).await
    }

    async fn login(&self, email: &str, password: &str) -> Answer {
        let form = url::form_urlencoded::Serializer::new(String::new())
            .append_pair("grant_type", "password")
            .append_pair("username", email)
            .append_pair("password", password)
            .finish();
        let shown = [("Content-Type", "application/x-www-form-urlencoded")];
        self.send("POST", "/api/v1/auth/login", &shown, &form).await
    }

    async fn token(&self, email: &str) -> String {
        let answer = self.login(email, PASSWORD).await;
        answer.json["access_token"].as_str().unwrap_or_else(|| panic!("{}", answer.text)).to_owned()
    }

    /// Signed as we sign, saying whatever.
    fn signed(&self, claims: &Value) -> String {
        let part = |value: &str| URL_SAFE_NO_PAD.encode(value);
        let message = format!("{}.{}", part(r#"{"alg":"HS256","typ":"JWT"}"#), part(&claims.to_string()));
        let signature = self.world.engine.vault.sign("access token", message.as_bytes());
        format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}"))
}

// ---- who may call -------------------------------------------------------------------------------------------------

/// An operation and what its document says of it.
struct Operation {
    name: String,
    method: String,
    path: String,
    /// The scope of keys, if keys are taken.
    scope: Option<String>,
    developers: bool,
    public: bool,
}

/// Every operation of the document; the path's parameters are filled with what no check but that of the caller lets by.
fn operations() -> Vec<Operation> {
    let document: Value = serde_json::from_str(&api::document_json()).expect("the document is JSON");
    let mut found = Vec::new();
    for (path, item) in document["paths"].as_object().expect("paths") {
        for (method, operation) in item.as_object().expect("a path item") {
            let security = operation["security"].as_array().unwrap_or_else(|| panic!("{method} {path}: no security"));
            let names = || security.iter().filter_map(Value::as_object);
            let mut filled = String::new();
            for piece in path.split('/').skip(1) {
                filled.push('/');
                filled.push_str(if piece.starts_with('{') { "no-such-thing" } else { piece });
            }
            found.push(Operation {
                name: format!("{} {path}", method.to_uppercase()),
                method: method.to_uppercase(),
                path: filled,
                scope: names().find_map(|it| it.get("api_key")?[0].as_str().map(str::to_owned)),
                developers: names().any(|it| it.contains_key("developer_token")),
                public: names().any(serde_json::Map::is_empty),
            });
        }
    }
    assert!(found.len() > 30, "{}", found.len());
    found
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// Nothing that anybody takes.
    Nobody,
    /// A user's token.
    User,
    /// A key that works, with one scope.
    Key(&'static str),
    /// A developer.
    Developer,
}

/// The mirrored API takes any key for these; ours are for `admin`, and who shows nothing that works is answered as there.
const TAKE_ANY_KEY: [&str; 2] = [
    "DELETE /api/v1/users/{user_id}/connections/{provider}",
    "DELETE /api/v1/users/{user_id}/connections/{provider}/data",
];

/// What it is, its headers, and who that is.
type Credential<'a> = (&'a str, Vec<(&'a str, &'a str)>, Seen);

async fn matrix(shape: Shape) {
    let client = Client::new(shape).await;
    let developer = client.developer("ada@example.com").await;
    let token = client.token("ada@example.com").await;
    let hour = NOW + 3600;
    let read = client.key("read", None).await;
    let sync = client.key("sync", None).await;
    let over = client.key("admin", Some(client.now())).await;
    let revoked = client.key("admin", None).await;
    let db = &client.world.engine.db;
    let id = db.find_api_key(&vault::hash_secret(&revoked)).await.expect("reads").expect("is there").id;
    db.revoke_api_key(id, client.now()).await.expect("revokes");
    let bearer = |token: &str| format!("Bearer {token}");
    let good = bearer(&token);
    let expired = bearer(&client.signed(&json!({"sub": developer, "exp": NOW})));
    let sdk = bearer(&client.signed(&json!({"sub": developer, "exp": hour, "scope": "sdk", "app_id": "app_1"})));
    let scoped = bearer(&client.signed(&json!({"sub": developer, "exp": hour, "scope": "other"})));
    let unknown = bearer(&client.signed(&json!({"sub": uuid::Uuid::now_v7(), "exp": hour})));
    let endless = bearer(&client.signed(&json!({"sub": developer})));
    let earlier = bearer(&client.signed(&json!({"sub": developer, "exp": hour - 1})));
    let forged = {
        let claims = URL_SAFE_NO_PAD.encode(json!({"sub": developer, "exp": hour + 3600}).to_string());
        let pieces: Vec<&str> = token.split('.').collect();
        bearer(&format!("{}.{claims}.{}", pieces[0], pieces[2]))
    };
    let unsigned = {
        let pieces: Vec<&str> = token.split('.').collect();
        bearer(&format!("{}.{}.", URL_SAFE_NO_PAD.encode(r#"{"alg":"none","typ":"JWT"}"#), pieces[1]))
    };
    let (basic, bare) = (format!("Basic {token}"), token.clone());
    let (authorization, key, other) = ("Authorization", "X-API-Key", "X-Open-Wearables-API-Key");
    let credentials: Vec<Credential<'_>> = vec![
        ("nothing", vec![], Seen::Nobody),
        ("an empty key", vec![(key, "")], Seen::Nobody),
        ("an unknown key", vec![(key, "ws_unknown")], Seen::Nobody),
        ("an unknown key, other header", vec![(other, "sk-0123456789abcdef0123456789abcdef")], Seen::Nobody),
        ("a key that is over", vec![(key, &over)], Seen::Nobody),
        ("a revoked key", vec![(key, &revoked)], Seen::Nobody),
        ("a token as key", vec![(key, &token)], Seen::Nobody),
        ("a reading key", vec![(key, &read)], Seen::Key("read")),
        ("a syncing key, other header", vec![(other, &sync)], Seen::Key("sync")),
        ("a key for all", vec![(key, &client.admin)], Seen::Key("admin")),
        ("a developer", vec![(authorization, &good)], Seen::Developer),
        ("a developer and a bad key", vec![(authorization, &good), (key, &revoked)], Seen::Developer),
        ("a developer and a lesser key", vec![(authorization, &good), (key, &read)], Seen::Developer),
        ("an expired token", vec![(authorization, &expired)], Seen::Nobody),
        ("an expired token and a key", vec![(authorization, &expired), (key, &read)], Seen::Key("read")),
        ("a forged token", vec![(authorization, &forged)], Seen::Nobody),
        ("a forged token and a key", vec![(authorization, &forged), (key, &sync)], Seen::Key("sync")),
        ("an unsigned token", vec![(authorization, &unsigned)], Seen::Nobody),
        ("a token without an end", vec![(authorization, &endless)], Seen::Nobody),
        ("a token from before the password", vec![(authorization, &earlier)], Seen::Nobody),
        ("a token of nobody", vec![(authorization, &unknown)], Seen::Nobody),
        ("a token for something else", vec![(authorization, &scoped)], Seen::Nobody),
        ("a user's token", vec![(authorization, &sdk)], Seen::User),
        ("a user's token and a key", vec![(authorization, &sdk), (key, &client.admin)], Seen::Key("admin")),
        ("a key as token", vec![(authorization, &client.admin)], Seen::Nobody),
        ("a token by another scheme", vec![(authorization, &basic)], Seen::Nobody),
        ("a token without a scheme", vec![(authorization, &bare)], Seen::Nobody),
    ];
    // What is about a developer's own person takes no key. All else that takes a developer takes a key for everything.
    let operations = operations();
    let personal = operations.iter().filter(|it| it.developers && it.scope.is_none() && !it.public);
    assert_eq!(
        personal.map(|it| it.name.as_str()).collect::<Vec<_>>(),
        ["POST /api/v1/auth/change-password", "GET /api/v1/auth/me", "PATCH /api/v1/auth/me"]
    );
    for operation in operations {
        let plain = client.send(&operation.method, &operation.path, &[], "").await.status;
        for (what, shown, seen) in &credentials {
            let answer = client.send(&operation.method, &operation.path, shown, "").await;
            let place = format!("{} with {what}: {} {}", operation.name, answer.status, answer.text);
            assert!(answer.status < 500 || answer.status == 501, "{place}");
            let scope = operation.scope.as_deref();
            if operation.public {
                // What stands in the body decides, if anything.
                let key_for_less = matches!(seen, Seen::Key(have) if scope.is_some_and(|need| need != *have));
                assert!(scope.is_some() || answer.status == plain, "{place}");
                assert!(!key_for_less || *seen == Seen::Key("admin") || answer.status == 403, "{place}");
                continue;
            }
            let expected = match seen {
                Seen::Developer if operation.developers => None,
                Seen::Key(have) => match scope {
                    None => Some(401),
                    Some(need) if *have == need || *have == "admin" => None,
                    Some(_) => Some(403),
                },
                _ => Some(401),
            };
            match expected {
                Some(status) => assert_eq!(answer.status, status, "{place}"),
                None => assert!(!matches!(answer.status, 401 | 403), "{place}"),
            }
            let strict = scope.is_none_or(|scope| scope == "admin") && !TAKE_ANY_KEY.contains(&operation.name.as_str());
            let detail = match (expected, seen) {
                (Some(403), _) => format!("API key lacks the scope '{}'", scope.unwrap_or_default()),
                (Some(_), _) if strict && what.starts_with("a user's token") => {
                    "SDK tokens cannot access this endpoint".to_owned()
                }
                (Some(_), _) if strict => "Could not validate credentials".to_owned(),
                (Some(_), _) if shown.iter().any(|(name, value)| *name != authorization && !value.is_empty()) => {
                    "Invalid or missing API key".to_owned()
                }
                (Some(_), _) if operation.name == "POST /api/v1/{provider}/users/{user_id}/sync" => {
                    "Invalid or missing API key".to_owned()
                }
                (Some(_), _) => "Authentication required: provide JWT token or API key".to_owned(),
                (None, _) => continue,
            };
            assert_eq!(answer.json["detail"], json!(detail), "{place}");
            let challenge = answer.headers.get("www-authenticate").map(|value| value.to_str().expect("text"));
            assert_eq!(challenge, (strict && answer.status == 401).then_some("Bearer"), "{place}");
        }
    }
}

async fn no_text(shape: Shape) {
    let client = Client::new(shape).await;
    client.developer("ada@example.com").await;
    let good = format!("Bearer {}", client.token("ada@example.com").await);
    let mut seen = 0;
    for operation in operations().iter().filter(|it| it.path.contains("no-such-thing")) {
        // Each alone, the others being what a check of them would let by, and all.
        let pieces: Vec<&str> = operation.path.split('/').collect();
        let places: Vec<usize> = (0..pieces.len()).filter(|n| pieces[*n] == "no-such-thing").collect();
        for broken in places.iter().map(|n| vec![*n]).chain([places.clone()]) {
            let filled = pieces.iter().enumerate().map(|(n, piece)| match *piece {
                _ if broken.contains(&n) => "%ff",
                "no-such-thing" if n > 0 && pieces[n - 1] == "users" => "b2b6c1de-5a0e-4a39-9d0c-2f8e1f0f4c77",
                "no-such-thing" => "strava",
                piece => piece,
            });
            let path = filled.collect::<Vec<_>>().join("/");
            let answer = client.send(&operation.method, &path, &[("Authorization", &good)], "{}").await;
            let place = format!("{} as {path}: {} {}", operation.name, answer.status, answer.text);
            assert_eq!(answer.failure(), (400, "path is not valid UTF-8"), "{place}");
            if !operation.public {
                assert_eq!(client.send(&operation.method, &path, &[], "{}").await.status, 401, "{place}");
            }
            seen += 1;
        }
    }
    assert!(seen > 40, "{seen}");
}

async fn hot_path(shape: Shape) {
    let client = Client::new(shape).await;
    client.developer("ada@example.com").await;
    let token = client.token("ada@example.com").await;
    let path = format!("/api/v1/strava/users/{}/sync", client.world.user);
    let before = client.world.engine.db.statements();
    let answer = client.bearer("POST", &path, &token, &Value::Null).await;
    assert_eq!((answer.status, client.world.engine.db.statements() - before), (200, 2), "{}", answer.text);
    // An Idempotency-Key is remembered for a key.
    let bearer = format!("Bearer {token}");
    let shown = [("Authorization", bearer.as_str()), ("Idempotency-Key", "once")];
    let answer = client.send("POST", &path, &shown, "").await;
    assert_eq!(answer.failure(), (400, "Idempotency-Key needs an API key"));
    let with_key = [shown[0], shown[1], ("X-API-Key", client.admin.as_str())];
    assert_eq!(client.send("POST", &path, &with_key, "").await.status, 200);
}

// ---- developers ---------------------------------------------------------------------------------------------------

async fn logins(shape: Shape) {
    let client = Client::new(shape).await;
    let id = client.developer("ada@example.com").await;
    let answer = client.login(" Ada@Example.COM ", PASSWORD).await;
    let members = ["access_token", "token_type", "refresh_token", "expires_in", "developer_id"];
    let object = answer.json.as_object().expect("an object");
    assert_eq!(object.keys().map(String::as_str).collect::<Vec<_>>().len(), members.len(), "{}", answer.text);
    assert!(members.iter().all(|name| object.contains_key(*name)), "{}", answer.text);
    assert_eq!((&answer.json["token_type"], &answer.json["expires_in"]), (&json!("bearer"), &json!(3600)));
    assert_eq!(answer.json["developer_id"], json!(id));
    let refresh = text(&answer.json["refresh_token"]);
    assert!(refresh.len() == 35 && refresh.starts_with("rt-"), "{refresh}");
    let token = text(&answer.json["access_token"]);

    let me = client.bearer("GET", "/api/v1/auth/me", token, &Value::Null).await;
    let expected = json!({
        "id": id, "first_name": null, "last_name": null, "email": "ada@example.com",
        "created_at": "2026-03-10T12:00:00Z", "updated_at": "2026-03-10T12:00:00Z"
    });
    assert_eq!((me.status, &me.json), (200, &expected));
    let out = client.bearer("POST", "/api/v1/auth/logout", token, &Value::Null).await;
    assert_eq!((out.status, &out.json), (200, &json!({"message": "Successfully logged out"})));

    let change = json!({"first_name": "Ada", "last_name": null, "email": "Byron@example.com"});
    let me = client.bearer("PATCH", "/api/v1/auth/me", token, &change).await;
    assert_eq!(
        (me.status, &me.json["email"], &me.json["first_name"]),
        (200, &json!("byron@example.com"), &json!("Ada"))
    );
    client.developer("grace@example.com").await;
    let taken = client.bearer("PATCH", "/api/v1/auth/me", token, &json!({"email": "grace@example.com"})).await;
    assert_eq!(taken.failure(), (409, "A developer with this email already exists"));
    for (body, detail) in [
        (json!({"first_name": "x".repeat(101)}), "String should have at most 100 characters"),
        (json!({"email": "ada"}), "value is not a valid email address: An email address must have an @-sign."),
        (
            json!({"password": "another one"}),
            "POST /api/v1/auth/change-password changes the password: it asks for the current one",
        ),
    ] {
        let answer = client.bearer("PATCH", "/api/v1/auth/me", token, &body).await;
        assert_eq!(answer.failure(), (400, detail));
    }

    let wrong = (401, "Incorrect email or password");
    for (email, password) in [("byron@example.com", "wrong"), ("nobody@example.com", PASSWORD), ("", ""), ("a\0b", "x")]
    {
        let answer = client.login(email, password).await;
        assert_eq!(answer.failure(), wrong, "{email}");
        assert_eq!(answer.headers["www-authenticate"], "Bearer");
    }
    for form in ["", "username=byron@example.com", "password=x", "{}", "%00=%ff&&="] {
        assert_eq!(client.send("POST", "/api/v1/auth/login", &[], form).await.failure(), wrong, "{form}");
    }

    // An hour later the token is over, and the refresh token gets the next one, once.
    client.wait(3600);
    assert_eq!(client.bearer("GET", "/api/v1/auth/me", token, &Value::Null).await.status, 401);
    let next = client.send("POST", "/api/v1/token/refresh", &[], &json!({"refresh_token": refresh}).to_string()).await;
    assert_eq!(next.status, 200, "{}", next.text);
    let token = text(&next.json["access_token"]);
    assert_eq!(client.bearer("GET", "/api/v1/auth/me", token, &Value::Null).await.json["id"], json!(id));
}

/// The quickest of several: what else the machine does makes none quicker.
async fn login_times(shape: Shape) {
    let client = Client::with(shape, Clock::system()).await;
    client.developer("ada@example.com").await;
    let quickest = async |email: &str| {
        let mut best = f64::MAX;
        for _ in 0..5 {
            let begun = std::time::Instant::now();
            assert_eq!(client.login(email, "not the password").await.status, 401);
            best = best.min(begun.elapsed().as_secs_f64());
        }
        best
    };
    let (known, unknown) = (quickest("ada@example.com").await, quickest("nobody@example.com").await);
    assert!((0.25..4.0).contains(&(known / unknown)), "{known} s and {unknown} s");
    // Many at once take turns, and all of them are answered.
    let many = futures::future::join_all((0..12).map(|_| client.login("ada@example.com", PASSWORD))).await;
    assert!(many.iter().all(|answer| matches!(answer.status, 200 | 503)), "an answer of another kind");
    assert!(many.iter().any(|answer| answer.status == 200));
}

async fn passwords(shape: Shape) {
    let client = Client::new(shape).await;
    client.developer("ada@example.com").await;
    let answer = client.login("ada@example.com", PASSWORD).await;
    let (token, refresh) = (text(&answer.json["access_token"]), text(&answer.json["refresh_token"]));
    let path = "/api/v1/auth/change-password";
    let body = |current: &str, new: &str, again: &str| json!({"current_password": current, "new_password": new, "confirm_password": again});
    for (body, detail) in [
        (json!({}), "Field required"),
        (json!({"current_password": PASSWORD, "new_password": "long enough"}), "Field required"),
        (
            json!({"current_password": null, "new_password": "x", "confirm_password": "x"}),
            "Input should be a valid string",
        ),
        (body(PASSWORD, "short", "short"), "String should have at least 8 characters"),
        (body(PASSWORD, "long enough", "long enouhg"), "New passwords do not match"),
        (body("wrong", "long enough", "long enough"), "Incorrect current password"),
    ] {
        assert_eq!(client.bearer("POST", path, token, &body).await.failure(), (400, detail), "{body}");
    }
    client.wait(60);
    let answer = client.bearer("POST", path, token, &body(PASSWORD, "long enough", "long enough")).await;
    assert_eq!((answer.status, &answer.json), (200, &json!({"message": "Password changed"})));
    assert_eq!(client.login("ada@example.com", PASSWORD).await.status, 401);
    let old = client.bearer("GET", "/api/v1/auth/me", token, &Value::Null).await;
    assert_eq!(old.failure(), (401, "Could not validate credentials"), "a token from before");
    let old = client.send("POST", "/api/v1/token/refresh", &[], &json!({"refresh_token": refresh}).to_string()).await;
    assert_eq!(old.failure(), (401, "Invalid or revoked refresh token"));
    let sync = format!("/api/v1/strava/users/{}/sync", client.world.user);
    assert_eq!(client.bearer("POST", &sync, token, &Value::Null).await.failure(), (401, "Invalid or missing API key"));
    let answer = client.login("ada@example.com", "long enough").await;
    let token = text(&answer.json["access_token"]);
    assert_eq!(client.bearer("GET", "/api/v1/auth/me", token, &Value::Null).await.status, 200, "one from right after");
}

// ---- keys ---------------------------------------------------------------------------------------------------------

async fn keys(shape: Shape) {
    let client = Client::new(shape).await;
    let developer = client.developer("ada@example.com").await;
    let token = client.token("ada@example.com").await;
    let list = "/api/v1/developer/api-keys";
    let works = async |key: &str| client.send("GET", "/api/v1/users", &[("X-API-Key", key)], "").await.status == 200;

    let made = client.bearer("POST", list, &token, &Value::Null).await;
    assert_eq!(made.status, 201, "{}", made.text);
    let id = text(&made.json["id"]).to_owned();
    let first = text(&made.json["key"]).to_owned();
    let mut expected = json!({
        "id": id, "name": "Default", "created_by": developer, "created_at": "2026-03-10T12:00:00Z",
        "prefix": first[..10], "scopes": ["sync", "read"], "expires_at": null, "retires_at": null,
        "last_used_at": null, "key": first
    });
    assert_eq!(made.json, expected);
    assert!(works(&first).await);
    expected.as_object_mut().expect("an object").remove("key");

    client.wait(1);
    let body = json!({"name": "reader", "scopes": ["admin", "read", "read"], "expires_in": 1000});
    let other = client.admin("POST", list, &body).await;
    assert_eq!((&other.json["scopes"], &other.json["created_by"]), (&json!(["read", "admin"]), &Value::Null));
    assert_eq!(other.json["expires_at"], "2026-03-10T12:16:41Z");
    let all = client.admin("GET", list, &Value::Null).await;
    assert_eq!((all.status, all.json.as_array().map(Vec::len), &all.json[0]["name"]), (200, Some(3), &json!("reader")));
    assert!(
        !all.text.contains(&first) && all.json.as_array().expect("a list").iter().all(|it| it.get("key").is_none())
    );

    for (body, detail) in [
        (json!([]), "Input should be a valid dictionary"),
        (json!({"name": 7}), "Input should be a valid string"),
        (json!({"name": "x".repeat(101)}), "String should have at most 100 characters"),
        (json!({"scopes": "read"}), "Input should be a valid list"),
        (json!({"scopes": []}), "List should have at least 1 item after validation, not 0"),
        (json!({"scopes": ["write"]}), "Input should be 'sync', 'read' or 'admin'"),
        (json!({"scopes": [1]}), "Input should be a valid string"),
        (json!({"expires_in": 0}), "Input should be greater than or equal to 1"),
        (json!({"expires_in": "soon"}), "Input should be a valid integer"),
    ] {
        assert_eq!(client.admin("POST", list, &body).await.failure(), (400, detail), "{body}");
    }

    let path = format!("{list}/{id}");
    let renamed = client.admin("PATCH", &path, &json!({"name": "dashboard"})).await;
    assert_eq!((renamed.status, &renamed.json["name"]), (200, &json!("dashboard")));
    assert_eq!(client.admin("PATCH", &path, &json!({"name": null})).await.json["name"], "dashboard");

    // Rotated: the name stays, and both work for a day.
    let rotated = client.admin("POST", &format!("{path}/rotate"), &Value::Null).await;
    assert_eq!((rotated.status, &rotated.json["name"]), (201, &json!("dashboard")), "{}", rotated.text);
    assert_eq!((&rotated.json["scopes"], &rotated.json["expires_at"]), (&json!(["sync", "read"]), &Value::Null));
    let second = text(&rotated.json["key"]).to_owned();
    assert!(rotated.json["id"] != json!(id) && second != first && works(&first).await && works(&second).await);
    let retires = |all: &Answer, id: &str| {
        let rows = all.json.as_array().expect("a list").clone();
        rows.into_iter().find(|row| row["id"] == json!(id)).expect("is listed")["retires_at"].clone()
    };
    let all = client.admin("GET", list, &Value::Null).await;
    assert_eq!(retires(&all, &id), "2026-03-11T12:00:01Z");
    // Asked for once more with a longer overlap, the old key does not live longer, and the new one has no end.
    let again = client.admin("POST", &format!("{path}/rotate"), &json!({"overlap": 2_592_000})).await;
    assert_eq!((again.status, &again.json["expires_at"]), (201, &Value::Null));
    assert_eq!(retires(&client.admin("GET", list, &Value::Null).await, &id), "2026-03-11T12:00:01Z");
    // At once, and a key with an end is followed by one with as long a life.
    let end = text(&other.json["id"]);
    let next = client.admin("POST", &format!("{list}/{end}/rotate"), &json!({"overlap": 0})).await;
    assert_eq!(next.json["expires_at"], "2026-03-10T12:16:41Z");
    client.wait(86_399);
    assert!(works(&first).await);
    client.wait(1);
    assert!(!works(&first).await && works(&second).await);
    // What works no longer has no further heir: retired a moment ago or long before, or at its end.
    let heirs = client.admin("GET", list, &Value::Null).await.json.as_array().map(Vec::len);
    let over = client.key("read", Some(client.now())).await;
    let over = client.world.engine.db.find_api_key(&vault::hash_secret(&over)).await.expect("reads").expect("is there");
    for dead in [end, id.as_str(), &over.id.to_string()] {
        let answer = client.admin("POST", &format!("{list}/{dead}/rotate"), &Value::Null).await;
        assert_eq!(answer.failure(), (404, format!("Apikey with ID: {dead} not found.").as_str()));
    }
    let after = client.admin("GET", list, &Value::Null).await.json.as_array().map(Vec::len);
    assert_eq!(after, heirs.map(|n| n + 1), "only the one made here");
    for overlap in [-1, 2_592_001] {
        let answer = client.admin("POST", &format!("{path}/rotate"), &json!({"overlap": overlap})).await;
        assert_eq!(answer.status, 400);
    }

    let second_path = format!("{list}/{}", text(&rotated.json["id"]));
    let gone = client.admin("DELETE", &second_path, &Value::Null).await;
    assert_eq!((gone.status, &gone.json["name"], gone.json.get("key")), (200, &json!("dashboard"), None));
    assert!(!works(&second).await);
    assert!(!client.admin("GET", list, &Value::Null).await.text.contains(text(&rotated.json["id"])));
    let nobody = format!("{list}/{}", uuid::Uuid::now_v7());
    for (method, path, body) in [
        ("DELETE", second_path.clone(), Value::Null),
        ("PATCH", second_path.clone(), json!({"name": "x"})),
        ("POST", format!("{second_path}/rotate"), Value::Null),
        ("DELETE", nobody.clone(), Value::Null),
        ("PATCH", nobody, json!({})),
    ] {
        let answer = client.admin(method, &path, &body).await;
        let id = path.trim_end_matches("/rotate").rsplit('/').next().expect("an id");
        assert_eq!(answer.failure(), (404, format!("Apikey with ID: {id} not found.").as_str()), "{method}");
    }
    // Whoever takes the secret for the id does not find it in the answer.
    let answer = client.admin("DELETE", &format!("{list}/{second}"), &Value::Null).await;
    assert!(answer.status == 404 && !answer.text.contains(&second[..12]), "{}", answer.text);
}

// ---- applications and tokens --------------------------------------------------------------------------------------

async fn applications(shape: Shape) {
    let client = Client::new(shape).await;
    let answer = client.admin("POST", "/api/v1/applications", &json!({"name": "x"})).await;
    assert_eq!(answer.failure(), (400, "there is no developer yet: `wearsync developers create` makes one"));
    client.developer("ada@example.com").await;
    client.developer("grace@example.com").await;
    let (ada, grace) = (client.token("ada@example.com").await, client.token("grace@example.com").await);
    let list = "/api/v1/applications";
    let made = client.bearer("POST", list, &ada, &json!({"name": "telephone"})).await;
    assert_eq!(made.status, 201, "{}", made.text);
    let (app_id, secret) = (text(&made.json["app_id"]).to_owned(), text(&made.json["app_secret"]).to_owned());
    assert!(app_id.len() == 36 && app_id.starts_with("app_") && secret.len() == 71 && secret.starts_with("secret_"));
    assert_eq!(client.bearer("POST", list, &ada, &json!({"name": ""})).await.status, 201, "a name may be empty");
    for (body, detail) in [
        (json!({}), "Field required"),
        (json!({"name": null}), "Input should be a valid string"),
        (json!({"name": "x".repeat(101)}), "String should have at most 100 characters"),
    ] {
        assert_eq!(client.bearer("POST", list, &ada, &body).await.failure(), (400, detail));
    }
    let all = client.bearer("GET", list, &ada, &Value::Null).await;
    assert_eq!((all.json.as_array().map(Vec::len), &all.json[1]["name"]), (Some(2), &json!("telephone")));
    assert!(!all.text.contains("secret"), "{}", all.text);
    assert_eq!(client.bearer("GET", list, &grace, &Value::Null).await.json, json!([]));

    let path = format!("{list}/{app_id}");
    for (method, path) in
        [("DELETE", path.clone()), ("POST", format!("{path}/rotate-secret")), ("DELETE", format!("{list}/app_%00"))]
    {
        let answer = client.bearer(method, &path, &grace, &Value::Null).await;
        assert_eq!(answer.failure(), (404, "Application not found"), "somebody else's");
    }
    let token = format!("/api/v1/users/{}/token", client.world.user);
    let give = async |secret: &str| {
        let body = json!({"app_id": app_id, "app_secret": secret}).to_string();
        client.send("POST", &token, &[], &body).await
    };
    assert_eq!(give(&secret).await.status, 200);
    let rotated = client.bearer("POST", &format!("{path}/rotate-secret"), &ada, &Value::Null).await;
    assert_eq!((rotated.status, &rotated.json["name"]), (200, &json!("telephone")));
    let refused = give(&secret).await;
    assert_eq!(refused.failure(), (401, "Invalid app credentials"));
    assert_eq!(refused.headers["www-authenticate"], "Bearer");
    let secret = text(&rotated.json["app_secret"]);
    assert_eq!(give(secret).await.status, 200);
    assert_eq!(client.bearer("DELETE", &path, &ada, &Value::Null).await.status, 204);
    assert_eq!(give(secret).await.status, 401);
    assert_eq!(client.bearer("DELETE", &path, &ada, &Value::Null).await.status, 404);

    // A key stands for the developer who made it.
    let keys = "/api/v1/developer/api-keys";
    let key = client.bearer("POST", keys, &ada, &json!({"scopes": ["admin"]})).await;
    let key = text(&key.json["key"]).to_owned();
    let by_key = async |method: &str, path: &str, body: &str| {
        client.send(method, path, &[("X-API-Key", key.as_str())], body).await
    };
    assert_eq!(by_key("POST", list, r#"{"name": "by key"}"#).await.status, 201);
    let theirs = client.bearer("POST", list, &grace, &json!({"name": "theirs"})).await;
    let theirs = format!("{list}/{}", text(&theirs.json["app_id"]));
    let names = |answer: &Answer| {
        let all = answer.json.as_array().expect("a list").clone();
        all.iter().map(|it| text(&it["name"]).to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(names(&by_key("GET", list, "").await), ["by key", ""]);
    assert_eq!(names(&client.bearer("GET", list, &ada, &Value::Null).await), ["by key", ""]);
    for (method, path) in [("DELETE", theirs.clone()), ("POST", format!("{theirs}/rotate-secret"))] {
        assert_eq!(by_key(method, &path, "").await.failure(), (404, "Application not found"));
    }
    assert_eq!(
        by_key("POST", keys, "{}").await.json["created_by"],
        client.bearer("GET", "/api/v1/auth/me", &ada, &Value::Null).await.json["id"]
    );
    // One from the command line stands for all, and makes what the first one has.
    assert_eq!(client.admin("POST", list, &json!({"name": "by nobody"})).await.status, 201);
    assert_eq!(names(&client.admin("GET", list, &Value::Null).await), ["by nobody", "theirs", "by key", ""]);
    assert_eq!(names(&client.bearer("GET", list, &ada, &Value::Null).await), ["by nobody", "by key", ""]);
    let rotated = client.admin("POST", &format!("{theirs}/rotate-secret"), &Value::Null).await;
    assert_eq!((rotated.status, &rotated.json["name"]), (200, &json!("theirs")));
    assert_eq!(client.admin("DELETE", &theirs, &Value::Null).await.status, 204);
    assert_eq!(client.bearer("GET", list, &grace, &Value::Null).await.json, json!([]));
}

async fn tokens(shape: Shape) {
    let client = Client::new(shape).await;
    let developer = client.developer("ada@example.com").await;
    let token = client.token("ada@example.com").await;
    let user = client.world.user;
    let path = format!("/api/v1/users/{user}/token");
    let given = client.bearer("POST", &path, &token, &Value::Null).await;
    assert_eq!(given.status, 200, "{}", given.text);
    assert_eq!((&given.json["token_type"], &given.json["expires_in"]), (&json!("bearer"), &json!(3600)));
    let claims = text(&given.json["access_token"]).split('.').nth(1).expect("claims");
    let claims: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).expect("base64")).expect("JSON");
    let expected = json!({"sub": user, "exp": NOW + 3600, "scope": "sdk", "app_id": format!("admin:{developer}")});
    assert_eq!(claims, expected);
    assert_eq!(client.admin("POST", &path, &Value::Null).await.status, 200, "a key for all stands for a developer");

    // Who asks comes first.
    let either = "Either app credentials (app_id, app_secret) or admin authentication (Bearer token) is required";
    for body in ["", "null", "{}", r#"{"app_id":"app_1"}"#] {
        for path in [path.as_str(), "/api/v1/users/no-uuid/token"] {
            assert_eq!(client.send("POST", path, &[], body).await.failure(), (400, either), "{body}");
        }
    }
    let nobody = uuid::Uuid::now_v7();
    let answer = client.bearer("POST", &format!("/api/v1/users/{nobody}/token"), &token, &Value::Null).await;
    assert_eq!(answer.failure(), (404, format!("User with ID: {nobody} not found.").as_str()));
    let answer = client.bearer("POST", "/api/v1/users/no-uuid/token", &token, &Value::Null).await;
    assert!(answer.status == 400 && answer.text.contains("Input should be a valid UUID"), "{}", answer.text);

    // Used once; of many at the same time one wins.
    let post = async |path: &str, refresh: &str| {
        let body = json!({"refresh_token": refresh}).to_string();
        client.send("POST", &format!("/api/v1/token/{path}"), &[], &body).await
    };
    let first = text(&given.json["refresh_token"]).to_owned();
    let many = futures::future::join_all((0..8).map(|_| post("refresh", &first))).await;
    let won: Vec<&Answer> = many.iter().filter(|answer| answer.status == 200).collect();
    assert_eq!(won.len(), 1);
    let spent = post("refresh", &first).await;
    assert_eq!(spent.failure(), (401, "Invalid or revoked refresh token"));
    assert_eq!(spent.headers["www-authenticate"], "Bearer");
    let second = text(&won[0].json["refresh_token"]);
    let claims = text(&won[0].json["access_token"]).split('.').nth(1).expect("claims");
    let claims: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).expect("base64")).expect("JSON");
    assert_eq!(claims, expected, "whose it is, and on whose word, stays");
    assert_eq!(post("revoke", &first).await.failure(), (404, "Refresh token not found"));
    assert_eq!(post("revoke", second).await.status, 204);
    assert_eq!(post("revoke", second).await.status, 404);
    assert_eq!(post("refresh", second).await.status, 401);
    for path in ["refresh", "revoke"] {
        let answer = client.send("POST", &format!("/api/v1/token/{path}"), &[], "{}").await;
        assert_eq!(answer.failure(), (400, "Field required"));
    }
    // They do not pile up, and they end with the user.
    let mut last = String::new();
    for _ in 0..60 {
        last = text(&client.bearer("POST", &path, &token, &Value::Null).await.json["refresh_token"]).to_owned();
        client.wait(1);
    }
    assert_eq!(count(&client, "select count(*) from refresh_tokens where user_id is not null").await, 50);
    client.admin("DELETE", &format!("/api/v1/users/{user}"), &Value::Null).await;
    assert_eq!(post("refresh", &last).await.status, 401);
}

async fn count(client: &Client, sql: &'static str) -> i64 {
    match &client.world.engine.db {
        wearsync::storage::Db::Postgres(db) => sqlx::query_scalar(sql).fetch_one(db.pool()).await.expect("counts"),
        wearsync::storage::Db::Sqlite(db) => sqlx::query_scalar(sql).fetch_one(db.pool()).await.expect("counts"),
    }
}

// ---- providers and connections -----------------------------------------------------------------------------------

async fn providers(shape: Shape) {
    let client = Client::new(shape).await;
    let list = "/api/v1/oauth/providers";
    let get = async |query: &str| client.send("GET", &format!("{list}?{query}"), &[], "").await.json;
    let strava = json!({
        "provider": "strava", "name": "Strava", "has_cloud_api": true, "is_enabled": true,
        "icon_url": "/static/provider-icons/strava.svg", "live_sync_mode": "pull", "live_sync_configurable": true,
        "data_granularity": "raw"
    });
    let names: Vec<&str> = wearsync::providers::names().map(|name| name.0).collect();
    let all = get("").await;
    let listed: Vec<&str> = all.as_array().expect("a list").iter().map(|it| text(&it["provider"])).collect();
    assert_eq!(listed, names);
    let find = |all: &Value| all.as_array().expect("a list").iter().find(|it| it["provider"] == "strava").cloned();
    assert_eq!(find(&all), Some(strava.clone()));
    assert_eq!(client.send("GET", &format!("{list}?cloud_only=maybe"), &[], "").await.status, 400);

    let path = format!("{list}/strava");
    let boolean = "Input should be a valid boolean";
    for (path, body, detail) in [
        (path.as_str(), json!({"is_enabled": "no"}), boolean),
        (&path, json!({"live_sync_mode": null}), "Input should be 'pull' or 'webhook'"),
        (&path, json!({"live_sync_mode": "push"}), "Input should be 'pull' or 'webhook'"),
        (&path, json!({"data_granularity": 1}), "Input should be 'daily', 'hourly' or 'raw'"),
        ("/api/v1/oauth/providers/internal", json!({"is_enabled": false}), "Unknown provider: internal"),
        (list, json!({}), "Field required"),
        (list, json!({"providers": []}), "Input should be a valid dictionary"),
        (list, json!({"providers": {"strava": 1}}), boolean),
        (list, json!({"providers": {"strava": false, "unknown": false}}), "Unknown provider: unknown"),
    ] {
        assert_eq!(client.admin("PUT", path, &body).await.failure(), (400, detail), "{body}");
    }
    assert_eq!(get("").await, all, "nothing of what was refused was done");

    let changed = client.admin("PUT", &path, &json!({"live_sync_mode": "webhook", "is_enabled": null})).await;
    assert_eq!((changed.status, &changed.json["live_sync_mode"]), (200, &json!("webhook")), "{}", changed.text);
    assert_eq!(&changed.json["is_enabled"], &json!(true));
    let changed = client.admin("PUT", &path, &json!({"data_granularity": "daily"})).await;
    let told = (&changed.json["data_granularity"], &changed.json["live_sync_mode"]);
    assert_eq!(told, (&json!("daily"), &json!("webhook")));
    let changed = client.admin("PUT", list, &json!({"providers": {"strava": false}})).await;
    assert_eq!(changed.status, 200);
    assert_eq!(find(&changed.json).expect("is listed")["is_enabled"], false);
    assert_eq!(find(&get("enabled_only=true").await), None);
    assert!(find(&get("cloud_only=1&enabled_only=no").await).is_some());
    let path = format!("/api/v1/users/{}", client.world.user);
    let connections = client.admin("GET", &format!("{path}/connections"), &Value::Null).await;
    assert_eq!(connections.json[0]["live_sync_mode"], "webhook");
    // What is not offered still works.
    let sync = format!("/api/v1/strava/users/{}/sync", client.world.user);
    assert_eq!(client.admin("POST", &sync, &Value::Null).await.status, 200);
}

async fn coverage(shape: Shape) {
    let client = Client::new(shape).await;
    let answer = client.send("GET", "/api/v1/meta/coverage", &[], "").await;
    assert_eq!(answer.status, 200);
    let mut names: Vec<&str> = wearsync::providers::names().map(|name| name.0).collect();
    names.sort_unstable();
    assert_eq!(answer.json["providers"], json!(names));
    let mut metrics = 0;
    for category in answer.json["timeseries"].as_array().expect("categories") {
        let codes: Vec<&str> =
            category["metrics"].as_array().expect("metrics").iter().map(|it| text(&it["code"])).collect();
        assert!(!codes.is_empty() && codes.is_sorted(), "{category}");
        metrics += codes.len();
    }
    assert!(metrics >= 8, "{metrics}");
    let heart = &answer.json["timeseries"][0];
    assert_eq!(heart["name"], "Heart & Cardiovascular");
    let rate = heart["metrics"].as_array().expect("metrics").iter().find(|it| it["code"] == "heart_rate");
    let rate = rate.expect("heart_rate");
    assert!(rate["unit"] == "bpm" && rate["providers"].as_array().expect("names").contains(&json!("strava")));
    let distance = answer.json["workout_fields"].as_array().expect("fields").iter().find(|it| it["code"] == "distance");
    assert!(distance.expect("distance")["providers"].as_array().expect("names").contains(&json!("strava")));

    for name in names {
        let icon = client.send("GET", &format!("/static/provider-icons/{name}.svg"), &[], "").await;
        assert_eq!(
            (icon.status, &icon.headers["content-type"]),
            (200, &"image/svg+xml; charset=utf-8".parse().unwrap())
        );
        assert_eq!(icon.headers["cache-control"], "public, max-age=86400");
        assert!(icon.text.starts_with("<svg ") && icon.text.ends_with("</svg>\n") && !icon.text.contains("script"));
    }
    for file in ["strava", "nobody.svg", "strava.svg.svg", "%2e%2e", ".svg"] {
        assert_eq!(client.send("GET", &format!("/static/provider-icons/{file}"), &[], "").await.status, 404, "{file}");
    }
}

async fn connections(shape: Shape) {
    let client = Client::new(shape).await;
    let db = &client.world.engine.db;
    let user = async |name: &str| {
        let new = wearsync::storage::NewUser { first_name: Some(name.to_owned()), ..Default::default() };
        db.insert_user(new, client.now()).await.expect("a user").id
    };
    let account = |person: &str| wearsync::storage::NewAccount {
        id: wearsync::model::AccountId::new(),
        provider: "strava".to_owned(),
        client_id: "90417".to_owned(),
        provider_user_id: person.to_owned(),
        imported_hash: None,
    };
    let shared = db.upsert_account(account("134815"), client.now()).await.expect("an account").id;
    let (ada, grace, alone) = (user("Ada").await, user("Grace").await, user("Edsger").await);
    for user in [ada, grace] {
        db.connect(user, shared, "strava", client.now()).await.expect("connects");
    }
    let own = db.upsert_account(account("7"), client.now()).await.expect("an account").id;
    db.connect(alone, own, "strava", client.now()).await.expect("connects");
    let get = async |user| client.admin("GET", &format!("/api/v1/users/{user}/connections"), &Value::Null).await.json;
    let connection = &get(ada).await[0];
    let expected = json!({
        "id": connection["id"], "user_id": ada, "provider": "strava", "provider_user_id": "134815",
        "provider_username": null, "scope": null, "status": "active", "last_synced_at": null,
        "created_at": "2026-03-10T12:00:00Z", "updated_at": "2026-03-10T12:00:00Z",
        "icon_url": "/static/provider-icons/strava.svg", "max_historical_days": null, "rest_pull": true,
        "webhook_stream": false, "webhook_ping": true, "webhook_callback": false, "live_sync_mode": "pull",
        "linked_user_ids": [grace]
    });
    assert_eq!(connection, &expected);
    assert_eq!(get(grace).await[0]["linked_user_ids"], json!([ada]));
    assert_eq!(get(alone).await[0]["linked_user_ids"], json!([]));
    assert_eq!(get(wearsync::model::UserId::new()).await, json!([]), "an unknown user has none");
    // Active ones alone are linked, from both sides.
    db.disconnect(grace, "strava", client.now()).await.expect("disconnects");
    assert_eq!(get(ada).await[0]["linked_user_ids"], json!([]));
    let revoked = &get(grace).await[0];
    assert_eq!((&revoked["status"], &revoked["linked_user_ids"]), (&json!("revoked"), &json!([])));
}

async fn search(shape: Shape) {
    let client = Client::new(shape).await;
    for (first, last) in [("Élodie", "100%"), ("elodie", "a_b"), ("Zoë", "A\\B")] {
        client.admin("POST", "/api/v1/users", &json!({"first_name": first, "last_name": last})).await;
        client.wait(1);
    }
    let names = async |query: &str| {
        let query = url::form_urlencoded::Serializer::new(String::new()).append_pair("search", query).finish();
        let path = format!("/api/v1/users?{query}&sort_by=first_name&sort_order=asc");
        let page = client.admin("GET", &path, &Value::Null).await.json;
        let items = page["items"].as_array().expect("a list").clone();
        items.iter().map(|it| text(&it["last_name"]).to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(names("Élodie").await, ["100%"], "as it is written");
    assert_eq!(names("LODIE").await.len(), 2);
    assert_eq!(names("%").await, ["100%"]);
    assert_eq!(names("A_").await, ["a_b"]);
    assert_eq!(names("a\\").await, ["A\\B"]);
    // Who never synced comes first upwards and last downwards; equals are in the order of their ids.
    client.world.sync().await;
    let order = async |order: &str| {
        let path = format!("/api/v1/users?sort_by=last_synced_at&sort_order={order}");
        let page = client.admin("GET", &path, &Value::Null).await.json;
        let items = page["items"].as_array().expect("a list").clone();
        items.iter().map(|it| it["id"].clone()).collect::<Vec<_>>()
    };
    let (up, down) = (order("asc").await, order("desc").await);
    let synced = json!(client.world.user);
    assert_eq!((up.len(), up.last(), down.first()), (4, Some(&synced), Some(&synced)));
    assert_eq!(up[..3], down[1..]);
}

async fn cors(shape: Shape) {
    let client = Client::new(shape).await;
    let preflight = [("Origin", "https://app.example.com"), ("Access-Control-Request-Method", "PATCH")];
    let answer = client.send("OPTIONS", "/api/v1/users", &preflight, "").await;
    assert_eq!((answer.status, answer.headers.get("access-control-allow-origin")), (405, None), "closed by default");

    let clock = Clock::mock(DateTime::from_timestamp(NOW, 0).expect("an instant"));
    let origins = [("WEARSYNC_CORS_ORIGINS", "https://app.example.com, http://localhost:3000")];
    let client = Client::set(shape, clock, &origins).await;
    let asked =
        [preflight[0], preflight[1], ("Access-Control-Request-Headers", "authorization,x-api-key,content-type")];
    let answer = client.send("OPTIONS", "/api/v1/users", &asked, "").await;
    let header = |answer: &Answer, name: &str| answer.headers.get(name).map(|it| it.to_str().expect("text").to_owned());
    assert_eq!(answer.status, 200);
    assert_eq!(header(&answer, "access-control-allow-origin").as_deref(), Some("https://app.example.com"));
    assert_eq!(header(&answer, "access-control-allow-credentials").as_deref(), Some("true"));
    assert!(header(&answer, "access-control-allow-methods").expect("methods").contains("PATCH"));
    assert!(header(&answer, "access-control-allow-headers").expect("headers").contains("authorization"));
    // A page may read a failure too; another's may read nothing.
    let answer = client.send("GET", "/api/v1/users", &[("Origin", "http://localhost:3000")], "").await;
    assert_eq!(answer.status, 401);
    assert_eq!(header(&answer, "access-control-allow-origin").as_deref(), Some("http://localhost:3000"));
    for origin in ["https://evil.example", "https://app.example.com.evil.example", "http://app.example.com", "null"] {
        let answer = client.send("GET", "/api/v1/users", &[("Origin", origin)], "").await;
        assert_eq!(header(&answer, "access-control-allow-origin"), None, "{origin}");
    }
}

// ---- secrets ------------------------------------------------------------------------------------------------------

/// Every secret is in the answer that hands it out, and in no other answer, header or row.
async fn canary(shape: Shape) {
    let client = Client::new(shape).await;
    client.developer("ada@example.com").await;
    let mut seen: Vec<(String, String)> = Vec::new();
    let mut secrets: BTreeMap<String, usize> = BTreeMap::from([(PASSWORD.to_owned(), usize::MAX)]);
    let note = |seen: &mut Vec<(String, String)>, secrets: &mut BTreeMap<String, usize>, answer: Answer| {
        for name in ["access_token", "refresh_token", "key", "app_secret"] {
            if let Some(secret) = answer.json[name].as_str() {
                assert!(secrets.insert(secret.to_owned(), seen.len()).is_none(), "the same secret twice");
            }
        }
        seen.push((answer.text, format!("{:?}", answer.headers)));
        answer.json
    };
    let login = note(&mut seen, &mut secrets, client.login("ada@example.com", PASSWORD).await);
    let token = text(&login["access_token"]).to_owned();
    let key = client.bearer("POST", "/api/v1/developer/api-keys", &token, &Value::Null).await;
    let key = note(&mut seen, &mut secrets, key);
    let key_path = format!("/api/v1/developer/api-keys/{}", text(&key["id"]));
    let app = client.bearer("POST", "/api/v1/applications", &token, &json!({"name": "x"})).await;
    let app = note(&mut seen, &mut secrets, app);
    let app_path = format!("/api/v1/applications/{}", text(&app["app_id"]));
    let user = format!("/api/v1/users/{}/token", client.world.user);
    let refresh = json!({"refresh_token": login["refresh_token"]});
    let credentials = json!({"app_id": app["app_id"], "app_secret": app["app_secret"]});
    let change = json!({"current_password": "wrong", "new_password": PASSWORD, "confirm_password": PASSWORD});
    for (method, path, body) in [
        ("GET", "/api/v1/developer/api-keys", Value::Null),
        ("GET", "/api/v1/applications", Value::Null),
        ("GET", "/api/v1/auth/me", Value::Null),
        ("POST", &user, credentials.clone()),
        ("POST", &format!("{key_path}/rotate"), Value::Null),
        ("PATCH", &key_path, json!({"name": "y"})),
        ("DELETE", &key_path, Value::Null),
        ("DELETE", &format!("/api/v1/developer/api-keys/{}", text(&key["key"])), Value::Null),
        ("POST", &format!("{app_path}/rotate-secret"), Value::Null),
        ("POST", &user, credentials),
        ("DELETE", &format!("/api/v1/applications/{}", text(&app["app_secret"])), Value::Null),
        ("POST", "/api/v1/token/refresh", refresh.clone()),
        ("POST", "/api/v1/token/refresh", refresh.clone()),
        ("POST", "/api/v1/token/revoke", refresh),
        ("POST", "/api/v1/auth/change-password", change),
        ("PATCH", "/api/v1/auth/me", json!({"password": PASSWORD})),
        ("GET", "/metrics", Value::Null),
    ] {
        // Tokens that are given out at the same second say the same.
        client.wait(1);
        let answer = client.bearer(method, path, &token, &body).await;
        note(&mut seen, &mut secrets, answer);
    }
    assert!(secrets.len() >= 9, "{}", secrets.len());
    for (secret, home) in &secrets {
        for (place, (text, headers)) in seen.iter().enumerate() {
            assert!(!headers.contains(secret.as_str()), "a secret in the headers of answer {place}");
            assert!(place == *home || !text.contains(secret.as_str()), "a secret of answer {home} in answer {place}");
        }
    }
    // Nor in the database, in whatever column: SQLite's is a file.
    if shape == Shape::Sqlite {
        for path in crate::support::files(&client.world.place.data_dir()) {
            let bytes = std::fs::read(&path).expect("reads");
            for secret in secrets.keys() {
                let found = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
                assert!(!found, "a secret in {}", path.display());
            }
        }
    }
}

/// A command of ours: its code, what it answered and what it remarked.
pub(crate) fn command(env: &BTreeMap<String, String>, arguments: &[&str], stdin: &str) -> (i32, String, String) {
    use std::io::Write as _;
    let mut child = program(env, arguments).stdin(Stdio::piped()).spawn().expect("the program starts");
    // One that refuses its arguments reads nothing.
    let _ = child.stdin.take().expect("a pipe").write_all(stdin.as_bytes());
    let output = child.wait_with_output().expect("ends");
    let text = |bytes| String::from_utf8(bytes).expect("is text");
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

pub(crate) fn program(env: &BTreeMap<String, String>, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_wearsync"));
    command.args(arguments).env_clear().envs(env).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// The program itself, with everything in its log that it can log.
async fn processes(shape: Shape) {
    let place = Place::new(shape).await;
    let mut env = place.env("http://127.0.0.1:9");
    env.insert("WEARSYNC_LOG".to_owned(), "trace".to_owned());
    if shape == Shape::Postgres {
        assert_eq!(command(&env, &["migrate"], "").0, 0);
    }
    let create = ["developers", "create", "--email", "Ada@Example.com", "--first-name", "Ada", "--password-stdin"];
    let (code, _, remarks) = command(&env, &create, "short\n");
    assert!(code == 2 && remarks.contains("at least 8 characters"), "{remarks}");
    let (code, id, remarks) = command(&env, &create, &format!("{PASSWORD}\n"));
    assert_eq!(code, 0, "{remarks}");
    let mut said = remarks;
    let (code, _, remarks) = command(&env, &create, PASSWORD);
    assert!(code == 2 && remarks.contains("has this e-mail already"), "{remarks}");
    said += &remarks;
    let (_, list, remarks) = command(&env, &["developers", "list", "--json"], "");
    let list: Value = serde_json::from_str(&list).expect("JSON");
    assert_eq!((&list[0]["id"], &list[0]["email"]), (&json!(id.trim()), &json!("ada@example.com")));
    said += &format!("{list}{remarks}");

    let (_, first, remarks) = command(&env, &["keys", "create", "--name", "x", "--scopes", "admin"], "");
    said += &remarks;
    let keys = |said: &mut String| {
        let (code, list, remarks) = command(&env, &["keys", "list", "--json"], "");
        assert_eq!(code, 0, "{remarks}");
        *said += &format!("{list}{remarks}");
        serde_json::from_str::<Value>(&list).expect("JSON")
    };
    let id = text(&keys(&mut said)[0]["id"]).to_owned();
    for arguments in [&["keys", "rename", &id, "--name", "dashboard"][..], &["keys", "list"], &["developers", "list"]] {
        let (code, answer, remarks) = command(&env, arguments, "");
        assert_eq!(code, 0, "{remarks}");
        said += &format!("{answer}{remarks}");
    }
    let (code, second, remarks) = command(&env, &["keys", "rotate", &id, "--overlap", "1h"], "");
    assert_eq!(code, 0, "{remarks}");
    said += &remarks;
    let list = keys(&mut said);
    assert_eq!((&list[0]["name"], &list[1]["name"]), (&json!("dashboard"), &json!("dashboard")));
    assert!(list[0]["retires_at"].is_null() && list[1]["retires_at"].is_string(), "{list}");
    // A key that retires stays at its time, whatever overlap is asked for; one that expires does, too.
    let mut next = |arguments: &[&str]| {
        let (code, key, remarks) = command(&env, arguments, "");
        assert_eq!(code, 0, "{remarks}");
        said += &remarks;
        (key, remarks)
    };
    let until = |at: &Value| format!("the old key works until {}", text(at)[..16].replace('T', " "));
    let (third, remarks) = next(&["keys", "rotate", &id, "--overlap", "20d"]);
    assert!(remarks.contains(&until(&list[1]["retires_at"])), "{remarks}");
    let (made, _) = next(&["keys", "create", "--name", "y", "--expires-in", "1h", "--json"]);
    let made: Value = serde_json::from_str(&made).expect("JSON");
    let (fourth, ends) = (text(&made["key"]).to_owned(), text(&made["id"]));
    let (fifth, remarks) = next(&["keys", "rotate", ends, "--overlap", "20d"]);
    assert!(remarks.contains(&until(&made["expires_at"])), "{remarks}");
    let (sixth, remarks) = next(&["keys", "rotate", ends, "--overlap", "0s"]);
    assert!(remarks.contains("the old key works no longer"), "{remarks}");
    let nobody = uuid::Uuid::now_v7().to_string();
    assert_eq!(command(&env, &["keys", "rotate", &nobody], "").0, 2);
    let (code, key, remarks) = command(&env, &["keys", "rotate", ends], "");
    assert!(code == 2 && key.is_empty() && remarks.contains("no key that works"), "{key}{remarks}");

    // What the API would not take.
    let long = "x".repeat(400);
    for arguments in [
        &["keys", "create", "--name", ""][..],
        &["keys", "create", "--name", &long[..101]],
        &["keys", "rename", &id, "--name", ""],
        &["users", "create", "--external-id", ""],
        &["users", "create", "--external-id", &long[..256]],
        &["users", "create", "--email", "x"],
        &["users", "create", "--first-name", &long[..101]],
        &["developers", "create", "--email", "eve@example.com", "--password-stdin", "--last-name", &long],
    ] {
        let (code, answer, remarks) = command(&env, arguments, "correct horse battery");
        assert!(code == 2 && answer.is_empty() && !remarks.is_empty(), "{arguments:?}: {answer}{remarks}");
    }
    // What others wrote is no order to a terminal, and the same for programs.
    let odd = "a\u{1b}[2J\nb\tc";
    assert_eq!(command(&env, &["users", "create", "--external-id", odd, "--first-name", &long[..100]], "").0, 0);
    let (_, listed, _) = command(&env, &["users", "list"], "");
    assert!(listed.contains("a\u{fffd}[2J\u{fffd}b\u{fffd}c") && !listed.contains('\u{1b}'), "{listed}");
    let (_, listed, _) = command(&env, &["users", "list", "--json"], "");
    let listed: Value = serde_json::from_str(&listed).expect("JSON");
    assert!(listed.as_array().expect("a list").iter().any(|user| user["external_user_id"] == json!(odd)), "{listed}");

    // What the service says while all of it is used, rightly and wrongly.
    let mut serving = program(&env, &["--json", "serve"]).stdin(Stdio::null()).spawn().expect("the program starts");
    let stdout = serving.stdout.take().expect("a pipe");
    let stderr = serving.stderr.take().expect("a pipe");
    let log = std::thread::spawn(move || std::io::read_to_string(stderr).unwrap_or_default());
    let url = tokio::task::spawn_blocking(move || {
        let mut lines = String::new();
        for line in std::io::BufRead::lines(std::io::BufReader::new(stdout)) {
            lines += &line.expect("reads");
            if let Ok(told) = serde_json::from_str::<Value>(&lines) {
                return text(&told["url"]).to_owned();
            }
        }
        panic!("it does not serve: {lines}");
    });
    let url = url.await.expect("serves");
    let http = crate::support::client();
    let send = async |method: &str, path: &str, token: &str, body: String| {
        let method = reqwest::Method::from_bytes(method.as_bytes()).expect("a method");
        let request = http.request(method, format!("{url}{path}")).bearer_auth(token).body(body);
        let answer = request.header("X-API-Key", token).send().await.expect("answers");
        serde_json::from_str::<Value>(&answer.text().await.expect("a body")).unwrap_or(Value::Null)
    };
    let mut secrets = vec![PASSWORD.to_owned()];
    secrets.extend([&first, &second, &third, &fourth, &fifth, &sixth].iter().map(|key| key.trim().to_owned()));
    let form = |password: &str| format!("username=ada%40example.com&password={}", password.replace(' ', "+"));
    let login = send("POST", "/api/v1/auth/login", "", form(PASSWORD)).await;
    let token = text(&login["access_token"]).to_owned();
    send("POST", "/api/v1/auth/login", "", form("another wrong password")).await;
    secrets.push("another wrong password".to_owned());
    let user = send("POST", "/api/v1/users", &token, "{}".to_owned()).await;
    let app = send("POST", "/api/v1/applications", &token, json!({"name": "x"}).to_string()).await;
    let named = json!({"app_id": app["app_id"], "app_secret": app["app_secret"]}).to_string();
    let path = format!("/api/v1/users/{}/token", text(&user["id"]));
    let given = send("POST", &path, "", named.clone()).await;
    let refresh = json!({"refresh_token": given["refresh_token"]}).to_string();
    let next = send("POST", "/api/v1/token/refresh", "", refresh.clone()).await;
    let made = send("POST", "/api/v1/developer/api-keys", first.trim(), String::new()).await;
    for answer in [&login, &app, &given, &next, &made] {
        for name in ["access_token", "refresh_token", "app_secret", "key"] {
            secrets.extend(answer[name].as_str().map(str::to_owned));
        }
    }
    assert_eq!(secrets.len(), 16);
    for secret in secrets.clone() {
        for path in ["/api/v1/users", "/api/v1/auth/me", "/api/v1/developer/api-keys", "/api/v1/strava/users/x/sync"] {
            send("GET", path, &secret, String::new()).await;
        }
        let path = format!("/api/v1/developer/api-keys/{}", url_encoded(&secret));
        send("DELETE", &path, &token, named.clone()).await;
        send("POST", "/api/v1/token/revoke", &secret, json!({"refresh_token": secret}).to_string()).await;
        send("POST", "/api/v1/token/refresh", &secret, json!({"refresh_token": [secret]}).to_string()).await;
        send("PATCH", "/api/v1/auth/me", &token, json!({"password": secret}).to_string()).await;
        send("POST", "/api/v1/auth/change-password", &token, json!({"current_password": secret}).to_string()).await;
    }
    let ended = Command::new("kill").args(["-TERM", &serving.id().to_string()]).status().expect("kill runs");
    assert!(ended.success());
    tokio::task::spawn_blocking(move || serving.wait()).await.expect("waits").expect("ends");
    let log = log.join().expect("reads");
    assert!(log.contains("login") && log.lines().count() > 20, "the log is empty: {log}");
    said += &log;
    for secret in secrets {
        let place = said.find(&secret).map(|at| said[at.saturating_sub(200)..at].to_owned());
        assert_eq!(place, None, "a secret was told after this");
    }
}

fn url_encoded(text: &str) -> String {
    url::form_urlencoded::byte_serialize(text.as_bytes()).collect()
}
