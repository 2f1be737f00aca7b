//! Connecting with real processes: from a terminal, and with every log line there is, none of which may hold a secret.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::Duration;

use reqwest::redirect::Policy;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStderr, Command};
use wearsync::model::SyncRequest;
use wearsync::simulator::Options;
use wearsync::storage::{Db, DeliveryFilter};

use crate::both;
use crate::scene::{Api, Scene};
use crate::support::{Shape, files};

both! {
    no_secret_leaves_a_trace => canaries;
    a_terminal_and_a_browser => terminal;
    a_terminal_says_what_is_wrong => refusals;
}

fn options() -> Options {
    Options { activities: 6, stream_points: 20, athletes: 3, auto_approve: true, rotate: true, ..Options::default() }
}

/// A browser that stops at each redirect.
fn browser() -> reqwest::Client {
    reqwest::Client::builder().redirect(Policy::none()).timeout(Duration::from_secs(30)).build().expect("a client")
}

async fn location(http: &reqwest::Client, address: &str) -> String {
    let answer = http.get(address).send().await.expect("answers");
    let to = answer.headers().get("location").map(|to| to.to_str().expect("text").to_owned());
    to.unwrap_or_else(|| panic!("{address}: {}", answer.status()))
}

/// Everything that was answered: status line, headers and body.
#[derive(Default)]
struct Heard(Vec<String>);

impl Heard {
    async fn call(&mut self, call: reqwest::RequestBuilder) -> (u16, String, Option<String>) {
        let answer = call.send().await.expect("answers");
        let status = answer.status().as_u16();
        let to = answer.headers().get("location").and_then(|to| to.to_str().ok()).map(str::to_owned);
        let headers = format!("{:?}", answer.headers());
        let text = answer.text().await.expect("text");
        self.0.push(format!("{status} {headers}\n{text}"));
        (status, text, to)
    }
}

async fn canaries(shape: Shape) {
    let scene = Scene::new(shape, options()).await;
    let trace = [("WEARSYNC_LOG", "trace")];
    let mut processes: Vec<_> = match shape {
        Shape::Sqlite => Vec::new(),
        Shape::Postgres => scene.commands().iter().map(|args| scene.start(args, &trace)).collect(),
    };
    let port = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("a port").port();
    let bind = format!("127.0.0.1:{port}");
    let serve: &[&str] = if shape == Shape::Sqlite { &["serve"] } else { &["serve", "--no-worker"] };
    processes.push(scene.start(serve, &[trace[0], ("WEARSYNC_BIND", &bind)]));
    let url = format!("http://{bind}");
    let (http, key) = (browser(), scene.api_key().await);
    let started = std::time::Instant::now();
    while http.get(format!("{url}/health/ready")).send().await.is_err() {
        assert!(started.elapsed() < Duration::from_secs(20), "it does not come up");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    // Its first profile tells that the pasted grant is the account that is connected below.
    let first = scene.people[0];
    scene.until_success(scene.accept_for(first.connection, &SyncRequest::default()).await).await;
    let (mut heard, mut states) = (Heard::default(), Vec::new());
    let person = scene.user().await;
    let authorize = format!("{url}/api/v1/oauth/strava/authorize?user_id={person}");
    let mut visit = async || {
        let answer: Value = http.get(&authorize).send().await.expect("answers").json().await.expect("JSON");
        states.push(answer["state"].as_str().expect("a state").to_owned());
        let back = location(&http, answer["authorization_url"].as_str().expect("an address")).await;
        (states.last().expect("one").clone(), back)
    };
    // The good way, the same again, and whatever goes wrong: failures are told in more places.
    let (state, back) = visit().await;
    let (status, ..) = heard.call(http.get(&back)).await;
    assert_eq!(status, 303);
    heard.call(http.get(&back)).await;
    heard.call(http.get(&back).header("accept", "text/html")).await;
    let (other, back) = visit().await;
    heard.call(http.get(format!("{url}/api/v1/oauth/strava/callback?error=access_denied&state={other}"))).await;
    heard.call(http.get(&back)).await;
    let (third, _) = visit().await;
    let forged = "c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00";
    let (status, ..) =
        heard.call(http.get(format!("{url}/api/v1/oauth/strava/callback?code={forged}&state={third}"))).await;
    assert_eq!(status, 400);
    scene.control("fault", json!({ "faults": ["broken-json@token=1"] })).await;
    let (_, back) = visit().await;
    heard.call(http.get(&back)).await;
    scene.control("fault", json!({ "faults": ["cut@token=1"] })).await;
    let (_, back) = visit().await;
    heard.call(http.get(&back)).await;
    scene.control("fault", json!({ "faults": [] })).await;
    // What was cut off had been given: the grant before it is dead at the provider. Once more, then.
    let (_, back) = visit().await;
    let (status, ..) = heard.call(http.get(&back)).await;
    assert_eq!(status, 303);
    let keyed = |call: reqwest::RequestBuilder| call.header("x-api-key", &key);
    let users = format!("{url}/api/v1/users");
    for path in [
        format!("{users}/{person}/connections"),
        format!("{url}/api/v1/tasks"),
        users.clone(),
        format!("{url}/metrics"),
    ] {
        heard.call(keyed(http.get(path))).await;
    }
    // The first sync ends; a refresh is refused; everything is left and erased.
    let connection = scene.engine.db.list_connections(Some(person)).await.expect("reads").remove(0).connection.id;
    scene.until_success(scene.accept_for(connection, &SyncRequest::default()).await).await;
    heard.call(keyed(http.get(format!("{url}/api/v1/tasks")))).await;
    let [path_token, verify_token] = pushed(&scene, &url, &key, &mut heard).await;
    let mut kept = everything_kept(&scene).await;
    assert!(
        shape == Shape::Sqlite || kept.iter().any(|(place, _)| place.contains(":token:")),
        "tokens are shared, sealed"
    );
    // What is taken back below is to be found out by a call.
    let subscription =
        scene.engine.db.list_subscriptions("strava", "90417").await.expect("lists").remove(0).external_id;
    let subscriptions = format!("{url}/api/v1/providers/strava/webhooks/subscriptions");
    heard.call(keyed(http.delete(format!("{subscriptions}/{subscription}")))).await;
    heard.call(keyed(http.delete(format!("{users}/{}/connections/strava", scene.people[1].user)))).await;
    heard.call(keyed(http.delete(format!("{users}/{}/connections/strava/data", scene.people[2].user)))).await;
    scene.control("revoke", json!({ "athlete": first.athlete })).await;
    let run = scene.accept_for(first.connection, &SyncRequest { since_ms: Some(0), ..SyncRequest::default() }).await;
    scene.until_final(run).await;
    heard.call(keyed(http.get(format!("{url}/api/v1/tasks/{run}")))).await;
    visit().await;

    let mut secrets = vec![
        ("key", key.clone()),
        ("client secret", "simulated-secret".to_owned()),
        ("secret key", crate::support::SECRET_KEY.to_owned()),
        ("forged code", forged.to_owned()),
        ("path token", path_token),
        ("verify token", verify_token),
    ];
    secrets.extend(states.iter().map(|state| ("state", state.clone())));
    let answer: Value = http
        .get(format!("{}/_simulator/secrets", scene.sim.url()))
        .send()
        .await
        .expect("answers")
        .json()
        .await
        .expect("JSON");
    for what in ["access", "refresh", "codes"] {
        let list = answer[what].as_array().expect("a list");
        assert!(!list.is_empty(), "{what}");
        let name: &'static str = what.to_owned().leak();
        secrets.extend(list.iter().map(|text| (name, text.as_str().expect("text").to_owned())));
    }
    assert!(secrets.len() > 12, "{}", secrets.len());
    let search = |place: &str, bytes: &[u8]| {
        for (what, secret) in &secrets {
            // Where deliveries go is kept as whoever subscribes is shown it.
            if *what == "path token" && (place == "table subscriptions" || place.contains("/state/wearsync.db")) {
                continue;
            }
            let hex: String = secret.bytes().map(|byte| format!("{byte:02x}")).collect();
            for form in [secret.as_bytes(), hex.as_bytes()] {
                let found = bytes.windows(form.len()).any(|window| window == form);
                assert!(!found, "{shape:?}: a {what} is in {place}");
            }
        }
    };
    assert!(state.len() == 43);
    for answer in &heard.0 {
        search(&format!("an answer: {}", &answer[..answer.len().min(200)]), answer.as_bytes());
    }
    kept.extend(everything_kept(&scene).await);
    for (place, text) in kept {
        search(&place, text.as_bytes());
    }
    let mut traced = 0;
    for process in &mut processes {
        process.stop().await;
        let said = process.said();
        assert!(said.len() > 10_000, "it logs: {} bytes", said.len());
        traced += usize::from(said.contains("TRACE"));
        search("a log", said.as_bytes());
    }
    // Calls to the provider are what is traced, and of two workers one may have made none.
    assert!(traced >= if shape == Shape::Sqlite { 1 } else { 2 }, "{traced} trace");
    for path in files(&scene.place.data_dir()) {
        let bytes = std::fs::read(&path).expect("reads");
        search(&path.display().to_string(), &bytes);
    }
}

/// A subscription, an event, and whatever goes wrong with both. Answers the end of the address, which whoever subscribes
/// is shown and nobody else, and what the provider shows when it validates.
async fn pushed(scene: &Scene, url: &str, key: &str, heard: &mut Heard) -> [String; 2] {
    let http = browser();
    let manage = format!("{url}/api/v1/providers/strava/webhooks/subscriptions");
    let subscribe = http.post(format!("{manage}?callback_url={url}")).header("x-api-key", key);
    let made: Value = subscribe.send().await.expect("answers").json().await.expect("JSON");
    assert_eq!(made["subscriptions"][0]["status"], "created", "{made}");
    let callback = made["subscriptions"][0]["callback_url"].as_str().expect("an address");
    let path_token = callback.rsplit('/').next().expect("an end").to_owned();
    assert!(path_token.len() > 30, "{callback}");
    let rows = scene.engine.db.list_subscriptions("strava", "90417").await.expect("lists");
    let sealed = rows[0].secret.as_deref().expect("a secret");
    let verify_token = scene.engine.vault.open(b"subscription:strava", sealed).expect("opens");
    let verify_token = secrecy::ExposeSecret::expose_secret(&verify_token).to_owned();
    assert_eq!(verify_token.len(), 48);

    // Taken, and worked on.
    scene.control("upload", json!({ "athlete": scene.people[0].athlete })).await;
    let started = std::time::Instant::now();
    loop {
        let filter = DeliveryFilter { limit: 10, ..DeliveryFilter::default() };
        let kept = scene.engine.db.list_deliveries(&filter).await.expect("lists");
        if let [delivery] = kept.as_slice()
            && delivery.state == "done"
        {
            heard.call(http.get(format!("{url}/api/v1/deliveries/{}", delivery.id)).header("x-api-key", key)).await;
            break;
        }
        assert!(started.elapsed() < Duration::from_secs(20), "no event was worked on: {kept:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    heard.call(http.get(format!("{url}/api/v1/deliveries")).header("x-api-key", key)).await;
    let query =
        |mode: &str, token: &str| format!("{callback}?hub.mode={mode}&hub.challenge=15f7&hub.verify_token={token}");
    let of_another = json!({"object_type": "athlete", "object_id": 1, "aspect_type": "update", "updates": {},
        "owner_id": 1, "subscription_id": 1, "event_time": 1})
    .to_string();
    for (call, expected) in [
        (http.get(query("subscribe", &verify_token)), 200),
        (http.get(query("nonsense", &verify_token)), 400),
        (http.get(query("subscribe", &verify_token[1..])), 403),
        (http.put(query("subscribe", &verify_token)), 405),
        (http.post(callback).body("{"), 400),
        (http.post(callback).body(of_another.clone()), 401),
        // By a client of its own: the connection ends with it.
        (browser().post(callback).body(" ".repeat((1 << 20) + 1)), 413),
        (http.post(format!("{callback}/more?{verify_token}")).body(of_another), 404),
    ] {
        let (status, text, _) = heard.call(call).await;
        assert_eq!(status, expected, "{text}");
    }
    for fault in ["500@push_subscriptions=1", "cut@push_subscriptions=1", "broken-json@push_subscriptions=1"] {
        scene.control("fault", json!({ "faults": [fault] })).await;
        heard.call(http.get(&manage).header("x-api-key", key)).await;
        let again = http.post(format!("{manage}?callback_url={url}")).header("x-api-key", key);
        let told: Value = again.send().await.expect("answers").json().await.expect("JSON");
        heard.0.push(told["subscriptions"][0]["error"].as_str().expect("an error").to_owned());
    }
    scene.control("fault", json!({ "faults": [] })).await;
    [path_token, verify_token]
}

/// Every row of every table, and everything in Redis.
async fn everything_kept(scene: &Scene) -> Vec<(String, String)> {
    // SQLite's file is searched as it is.
    let Db::Postgres(db) = &scene.engine.db else { return Vec::new() };
    let mut out = Vec::new();
    let tables: Vec<(String,)> = sqlx::query_as(
        "select table_name::text from information_schema.tables where table_schema = 'public' and table_type = 'BASE TABLE'",
    )
    .fetch_all(db.pool())
    .await
    .expect("reads");
    assert!(tables.len() > 20);
    for (table,) in tables {
        let rows: Vec<(String,)> = sqlx::query_as(&format!("select to_jsonb(t)::text from {table} t"))
            .fetch_all(db.pool())
            .await
            .expect("reads");
        out.extend(rows.into_iter().map(|(row,)| (format!("table {table}"), row)));
    }
    let (url, prefix) = scene.place.redis.as_ref().expect("has Redis");
    let mut redis = redis::Client::open(url.as_str())
        .expect("an address")
        .get_multiplexed_async_connection()
        .await
        .expect("answers");
    let keys: Vec<String> = redis::cmd("KEYS").arg(format!("*{prefix}*")).query_async(&mut redis).await.expect("lists");
    for key in keys {
        let kind: String = redis::cmd("TYPE").arg(&key).query_async(&mut redis).await.unwrap_or_default();
        let (command, more): (&str, &[&str]) = match kind.as_str() {
            "string" => ("GET", &[]),
            "hash" => ("HGETALL", &[]),
            "zset" => ("ZRANGE", &["0", "-1"]),
            "list" => ("LRANGE", &["0", "-1"]),
            "set" => ("SMEMBERS", &[]),
            "none" => continue,
            other => panic!("{key} is a {other}: say how it is read"),
        };
        let value: redis::Value = redis::cmd(command).arg(&key).arg(more).query_async(&mut redis).await.expect("reads");
        let bytes = |value: &redis::Value| match value {
            redis::Value::BulkString(bytes) => String::from_utf8_lossy(bytes).into_owned(),
            other => format!("{other:?}"),
        };
        let text = match &value {
            redis::Value::Array(items) => items.iter().map(bytes).collect::<Vec<_>>().join("\n"),
            value => bytes(value),
        };
        out.push((format!("Redis {key}"), text));
    }
    out
}

/// `wearsync connect` in a terminal.
struct Terminal {
    child: Child,
    stderr: Lines<BufReader<ChildStderr>>,
    said: String,
}

impl Terminal {
    fn start(env: &BTreeMap<String, String>, args: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_wearsync"))
            .args(args)
            .env_clear()
            .envs(env)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("the program starts");
        let stderr = BufReader::new(child.stderr.take().expect("piped")).lines();
        Self { child, stderr, said: String::new() }
    }

    /// The address to open.
    async fn address(&mut self) -> String {
        loop {
            let line =
                self.stderr.next_line().await.expect("reads").unwrap_or_else(|| panic!("no address: {}", self.said));
            self.said += &format!("{line}\n");
            if line.trim().starts_with("http") {
                return line.trim().to_owned();
            }
        }
    }

    /// Code, stdout, stderr.
    async fn end(mut self) -> (i32, String, String) {
        let mut out = String::new();
        self.child.stdout.take().expect("piped").read_to_string(&mut out).await.expect("reads");
        while let Some(line) = self.stderr.next_line().await.expect("reads") {
            self.said += &format!("{line}\n");
        }
        let status =
            tokio::time::timeout(Duration::from_secs(30), self.child.wait()).await.expect("ends").expect("ends");
        (status.code().expect("no signal"), out, self.said)
    }
}

async fn terminal(shape: Shape) {
    let scene = Scene::new(shape, options()).await;
    let user = scene.user().await;
    let name = user.to_string();
    let http = browser();
    let env = scene.place.env(&scene.sim.url());
    let args = ["--json", "connect", "strava", "--no-browser", "--user", &name];
    let mut terminal = Terminal::start(&env, &args);
    let address = terminal.address().await;
    assert!(address.contains("redirect_uri=http%3A%2F%2F127.0.0.1%3A"), "{address}");
    // Meanwhile a server starts: whoever thinks over whether to agree holds nothing.
    let mut api = Api::of_shape(&scene).await;
    let mut workers = if shape == Shape::Postgres { scene.start_all() } else { Vec::new() };
    // Somebody else knocks: told so, and the right one is waited for.
    let back = location(&http, &format!("{address}&athlete=2")).await;
    let answer = http.get(back.replacen("state=", "state=x", 1)).send().await.expect("answers");
    assert_eq!(answer.status(), 400);
    let answer = http.get(&back).send().await.expect("answers");
    assert_eq!(
        (answer.status().as_u16(), answer.headers()["referrer-policy"].to_str().ok()),
        (200, Some("no-referrer"))
    );
    let page = answer.text().await.expect("text");
    assert!(page.contains("<h1>Connected</h1>"), "{page}");
    let (code, out, said) = terminal.end().await;
    assert_eq!(code, 0, "{said}");
    assert!(
        said.contains("a state that is not ours; still waiting") && said.contains("first sync is queued"),
        "{said}"
    );
    let answer: Value = serde_json::from_str(&out).unwrap_or_else(|_| panic!("no JSON: {out}"));
    assert_eq!((&answer["user_id"], &answer["missing_scopes"]), (&json!(user), &json!([])), "{answer}");
    assert!(answer["scopes"].as_array().is_some_and(|scopes| scopes.contains(&json!("activity:read_all"))), "{answer}");
    let task = answer["task_id"].as_str().expect("a run").parse().expect("an id");
    scene.until_success(wearsync::model::RunId(task)).await;
    api.process.stop().await;
    for worker in &mut workers {
        worker.stop().await;
    }
}

async fn refusals(shape: Shape) {
    let scene = Scene::new(shape, Options { refuse_consent: true, ..options() }).await;
    let http = browser();
    let mut env = scene.place.env(&scene.sim.url());
    let user = scene.user().await.to_string();
    let args = ["connect", "strava", "--no-browser", "--user", &user];
    let mut terminal = Terminal::start(&env, &args);
    let back = location(&http, &terminal.address().await).await;
    let page = http.get(&back).send().await.expect("answers").text().await.expect("text");
    assert!(page.contains("you did not agree at Strava"), "{page}");
    let (code, out, said) = terminal.end().await;
    assert!(code == 1 && out.is_empty() && said.contains("you did not agree at Strava: nothing was changed"), "{said}");

    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("a port").port().to_string();
    let (code, _, said) = Terminal::start(&env, &[&args[..], &["--port", &port]].concat()).end().await;
    assert!(code == 2 && said.contains("choose another with --port"), "{said}");

    env.insert("WEARSYNC_OAUTH_STATE_LIFE".to_owned(), "1s".to_owned());
    if shape == Shape::Sqlite {
        // Where there is nobody yet, nobody is made either by looking at the consent page.
        let mut alone = env.clone();
        let folder = scene.place.dir.path().join("alone");
        alone.insert("DATABASE_URL".to_owned(), format!("sqlite:{}", folder.join("state/wearsync.db").display()));
        alone.insert("WEARSYNC_DATA_DIR".to_owned(), folder.display().to_string());
        let (code, ..) = Terminal::start(&alone, &["connect", "strava", "--no-browser"]).end().await;
        let (_, users, _) = Terminal::start(&alone, &["--json", "users", "list"]).end().await;
        assert_eq!((code, users.trim()), (1, "[]"));
    }
    let (code, _, said) = Terminal::start(&env, &args).end().await;
    assert!(code == 1 && said.contains("nobody agreed within"), "{said}");
    let (code, _, said) = Terminal::start(&env, &["connect", "strava", "--no-browser"]).end().await;
    assert!(code == 2 && said.contains("say which with --user"), "{said}");
    let (code, _, said) = Terminal::start(&env, &["connect", "fitness", "--no-browser"]).end().await;
    assert!(code == 2 && said.contains("known are strava"), "{said}");
    env.remove("WEARSYNC_PROVIDERS__STRAVA__CLIENT_SECRET");
    let (code, _, said) = Terminal::start(&env, &args).end().await;
    assert!(code == 2 && said.contains("Strava is not set up"), "{said}");
    assert!(
        scene
            .engine
            .db
            .list_connections(Some(wearsync::model::UserId(user.parse().expect("an id"))))
            .await
            .expect("reads")
            .is_empty()
    );
}
