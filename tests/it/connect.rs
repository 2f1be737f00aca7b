//! Connecting, disconnecting, purging: the whole way through the provider's consent page, and everything that people try
//! instead.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Request};
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};
use tower::ServiceExt as _;
use url::Url;
use wearsync::api::{self, ApiState};
use wearsync::clock::Clock;
use wearsync::model::{Class, RunSource, RunState, SyncRequest, UserId};
use wearsync::providers::OAuthSpec;
use wearsync::simulator::Options;
use wearsync::storage::{Account, ConnectionView, Db, NewApiKey, NewUser, OAuthState};
use wearsync::sync::{self, Engine};
use wearsync::{telemetry, vault};

use crate::both;
use crate::oracle::{self, assert_same, calls, dump, faults, ledger, number, t0, tiny};
use crate::support::{Shape, World, client, tree};

both! {
    the_way_to_the_consent_page => authorize;
    a_page_of_each_users_own_is_on_the_list => own_pages;
    an_address_with_a_path => below_a_path;
    a_person_agrees => agrees;
    what_comes_back_is_checked => attacks;
    two_callbacks_with_one_state => twice;
    a_code_without_its_verifier_is_nothing => pkce;
    scopes_are_checked => scopes;
    a_provider_that_does_not_answer => away;
    two_users_of_one_account => shared;
    the_same_account_again => same_again;
    another_account => another;
    a_purge_leaves_nothing => purge;
    a_purge_of_files_without_levels => purge_flat;
    access_taken_back_at_the_provider => deauthorized;
    access_taken_back_without_a_notice => found_out;
    an_erased_user_leaves_the_provider => erased;
    idle_grants_are_kept => idle;
}

const REDIRECT: &str = "https://app.example.org/connected?from=wear";

/// The API in process, as browsers and programs see it.
struct Web {
    router: Router,
    key: String,
}

struct Answer {
    status: u16,
    headers: HeaderMap,
    text: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|_| panic!("no JSON: {}", self.text))
    }

    fn location(&self) -> &str {
        assert_eq!(self.status, 303, "{}", self.text);
        self.headers["location"].to_str().unwrap()
    }

    fn detail(&self) -> (u16, String) {
        (self.status, self.json()["detail"].as_str().unwrap_or_default().to_owned())
    }
}

impl Web {
    async fn new(engine: &Arc<Engine>) -> Self {
        let key = vault::new_api_key();
        let new = NewApiKey {
            hash: vault::hash_secret(key.expose_secret()),
            prefix: "ws_test".to_owned(),
            name: "test".to_owned(),
            scopes: "admin".to_owned(),
            expires_at: None,
            created_by: None,
        };
        engine.db.insert_api_key(new, engine.clock.now()).await.unwrap();
        let metrics = telemetry::install_metrics();
        let router = api::router(ApiState { engine: engine.clone(), metrics, metrics_need_key: false });
        Self { router, key: key.expose_secret().to_owned() }
    }

    async fn send(&self, method: &str, path: &str, headers: &[(&str, &str)]) -> Answer {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = self.router.clone().oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = axum::body::to_bytes(body, usize::MAX).await.unwrap();
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        Answer { status: parts.status.as_u16(), headers: parts.headers, text }
    }

    /// Without a key.
    async fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[]).await
    }

    async fn browse(&self, path: &str) -> Answer {
        self.send("GET", path, &[("accept", "text/html,application/xhtml+xml,*/*;q=0.8")]).await
    }

    async fn delete(&self, path: &str) -> Answer {
        self.send("DELETE", path, &[("x-api-key", &self.key)]).await
    }

    async fn visit(&self, user: UserId, more: &str) -> Value {
        let answer = self.get(&format!("/api/v1/oauth/strava/authorize?user_id={user}{more}")).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        answer.json()
    }

    /// The person's browser at the provider: the path and query it comes back with.
    async fn agree(&self, visit: &Value, athlete: u32) -> String {
        let address = visit["authorization_url"].as_str().unwrap();
        back(&format!("{address}&athlete={athlete}")).await
    }

    /// The whole way; where the person ends.
    async fn connect(&self, user: UserId, athlete: u32) -> String {
        let visit = self.visit(user, "").await;
        let back = self.agree(&visit, athlete).await;
        self.get(&back).await.location().to_owned()
    }
}

/// Follows the consent page back.
async fn back(address: &str) -> String {
    let http = reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).build().unwrap();
    let answer = http.get(address).send().await.unwrap();
    assert_eq!(answer.status(), 302, "{}", answer.text().await.unwrap());
    let url = Url::parse(answer.headers()["location"].to_str().unwrap()).unwrap();
    format!("{}?{}", url.path(), url.query().unwrap())
}

fn param(address: &str, name: &str) -> Option<String> {
    let url = Url::parse(address).or_else(|_| Url::parse(&format!("http://here{address}"))).unwrap();
    url.query_pairs().find(|(have, _)| have == name).map(|(_, value)| value.into_owned())
}

fn options(athletes: u32) -> Options {
    Options { athletes, auto_approve: true, ..tiny(12) }
}

async fn place(shape: Shape, options: Options, settings: &[(&str, &str)]) -> (World, Web) {
    let _ = client();
    let more = [("WEARSYNC_REDIRECT_URIS", REDIRECT), ("WEARSYNC_PUBLIC_URL", "https://wear.example.org")];
    let settings: Vec<_> = more.iter().chain(settings).copied().collect();
    let world = World::with(shape, options, Clock::mock(t0()), &settings).await;
    let web = Web::new(&world.engine).await;
    (world, web)
}

async fn user(world: &World) -> UserId {
    world.engine.db.insert_user(NewUser::default(), world.clock.now()).await.unwrap().id
}

async fn connections(world: &World, user: UserId) -> Vec<ConnectionView> {
    world.engine.db.list_connections(Some(user)).await.unwrap()
}

async fn account(world: &World, user: UserId) -> Account {
    let views = connections(world, user).await;
    world.engine.db.find_account(views[0].connection.account_id).await.unwrap().unwrap()
}

async fn runs(world: &World, user: UserId) -> Vec<wearsync::storage::Run> {
    let filter = wearsync::storage::RunFilter { user: Some(user), limit: 10, ..Default::default() };
    world.engine.db.list_runs(&filter).await.unwrap()
}

async fn states(world: &World) -> i64 {
    number(&world.engine.db, "select count(*) from oauth_states").await
}

async fn authorize(shape: Shape) {
    let (world, web) = place(shape, options(1), &[]).await;
    let visit = web.visit(world.user, "").await;
    let address = visit["authorization_url"].as_str().unwrap();
    let state = visit["state"].as_str().unwrap();
    assert!(address.starts_with(&format!("{}/oauth/authorize?", world.sim.url())), "{address}");
    assert!(state.len() == 43 && state.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b)), "{state}");
    for (name, value) in [
        ("state", state),
        ("response_type", "code"),
        ("client_id", "90417"),
        ("redirect_uri", "https://wear.example.org/api/v1/oauth/strava/callback"),
        ("scope", "read,read_all,profile:read_all,activity:read_all"),
    ] {
        assert_eq!(param(address, name).as_deref(), Some(value), "{address}");
    }
    assert_eq!(visit.as_object().unwrap().len(), 2, "as the mirrored API has it: {visit}");

    let path = |query: &str| format!("/api/v1/oauth/strava/authorize?{query}");
    let me = world.user;
    for (path, expected) in [
        (format!("/api/v1/oauth/fitness/authorize?user_id={me}"), (400, "Input should be 'strava'")),
        (path(""), (400, "Field required")),
        (path("user_id=1"), (400, "Input should be a valid UUID, ")),
        (path(&format!("user_id={}", UserId::new())), (404, "User with ID: ")),
    ] {
        let (status, detail) = web.get(&path).await.detail();
        assert!(status == expected.0 && detail.starts_with(expected.1), "{path}: {status} {detail}");
    }
    // Exactly what is on the list, and our own page.
    let kept = states(&world).await;
    let encoded = |uri: &str| url::form_urlencoded::byte_serialize(uri.as_bytes()).collect::<String>();
    for evil in [
        "https://app.example.org/connected",
        "https://app.example.org/connected?from=wear&x=1",
        "https://app.example.org/connected?from=wear#",
        "https://app.example.org/connected?from=wear/../evil",
        "https://app.example.org@evil.example/connected?from=wear",
        "https://APP.example.org/connected?from=wear",
        "//app.example.org/connected?from=wear",
        "https://evil.example",
        "javascript:alert(1)",
        "/api/v1/oauth/success",
        "",
    ] {
        let answer = web.get(&path(&format!("user_id={me}&redirect_uri={}", encoded(evil)))).await;
        assert_eq!(answer.status, 400, "{evil}");
        assert!(answer.text.contains("redirect_uri is not among"), "{}", answer.text);
    }
    assert_eq!(states(&world).await, kept, "a refused visit leaves nothing behind");
    for good in [REDIRECT, "https://wear.example.org/api/v1/oauth/success"] {
        web.visit(me, &format!("&redirect_uri={}", encoded(good))).await;
    }
    // What is stored is a digest.
    let rows = dump(&world.engine.db, &["oauth_states"]).await;
    assert!(!format!("{rows:?}").contains(state));

    let bare = oracle::another(&world, &[("WEARSYNC_PROVIDERS__STRAVA__CLIENT_SECRET", "")]).await;
    let answer = Web::new(&bare).await.get(&path(&format!("user_id={me}"))).await;
    assert_eq!((answer.status, answer.json()["code"].as_str()), (400, Some("provider_not_set_up")), "{}", answer.text);
}

async fn own_pages(shape: Shape) {
    let portal = "https://portal.example.org/users/{user_id}/pair/success";
    let (world, web) = place(shape, options(1), &[("WEARSYNC_REDIRECT_URIS", portal)]).await;
    let (me, other) = (world.user, user(&world).await);
    let path = |user: UserId, uri: &str| {
        let uri: String = url::form_urlencoded::byte_serialize(uri.as_bytes()).collect();
        format!("/api/v1/oauth/strava/authorize?user_id={user}&redirect_uri={uri}")
    };
    let filled = |text: &str| portal.replace("{user_id}", text);
    let own = filled(&me.to_string());
    for evil in [
        portal.to_owned(),
        filled("%7Buser_id%7D"),
        filled(&other.to_string()),
        filled(&me.to_string().to_uppercase()),
        filled(&me.0.simple().to_string()),
        filled(""),
        filled("*"),
        filled(&format!("{other}/../{me}")),
        filled(&format!("{me}/../{other}")),
        filled(&format!("..%2f{me}")),
        own.replacen("https://", "https://portal.example.org@evil.example/", 1),
        own.replacen("https://", &format!("https://{me}@"), 1),
        own.replacen("portal", "PORTAL", 1),
        own.replacen("https", "http", 1),
        own.replacen("success", "..", 1),
        format!("{own}/"),
        format!("{own}?next=https://evil.example"),
        format!("{own}/../../../../evil"),
    ] {
        let answer = web.get(&path(me, &evil)).await;
        assert_eq!(answer.status, 400, "{evil}");
        assert!(answer.text.contains("redirect_uri is not among"), "{}", answer.text);
    }
    assert_eq!(web.get(&path(other, &own)).await.status, 400, "somebody else's visit does not end there");
    assert_eq!(states(&world).await, 0);
    let visit = web.get(&path(me, &own)).await;
    assert_eq!(visit.status, 200, "{}", visit.text);
    let back = web.agree(&visit.json(), 0).await;
    assert_eq!(web.get(&back).await.location(), own);
}

/// As behind a proxy that answers below a path and hands on what comes after it.
async fn below_a_path(shape: Shape) {
    let (world, web) = place(shape, options(2), &[("WEARSYNC_PUBLIC_URL", "https://example.org/wear/")]).await;
    let visit = web.visit(world.user, "").await;
    let address = visit["authorization_url"].as_str().unwrap();
    let expected = "https://example.org/wear/api/v1/oauth/strava/callback";
    assert_eq!(param(address, "redirect_uri").as_deref(), Some(expected));
    let back = web.agree(&visit, 0).await;
    let answer = web.get(back.strip_prefix("/wear").unwrap()).await;
    let success = format!("/wear/api/v1/oauth/success?provider=strava&user_id={}", world.user);
    assert_eq!(answer.location(), success);
    assert_eq!(web.get(success.strip_prefix("/wear").unwrap()).await.status, 200);
    for query in ["error=access_denied", "code=1"] {
        let answer = web.get(&format!("/api/v1/oauth/strava/callback?{query}")).await;
        assert!(answer.location().starts_with("/wear/api/v1/oauth/error?message="), "{}", answer.location());
    }
}

async fn agrees(shape: Shape) {
    let (world, web) = place(shape, options(3), &[]).await;
    let ann = user(&world).await;
    let visit = web.visit(ann, "").await;
    let back = web.agree(&visit, 1).await;
    let answer = web.get(&back).await;
    assert_eq!(answer.location(), format!("/api/v1/oauth/success?provider=strava&user_id={ann}"));
    for (name, value) in [("referrer-policy", "no-referrer"), ("cache-control", "no-store")] {
        assert_eq!(answer.headers[name], value);
    }
    let account = account(&world, ann).await;
    assert_eq!(account.scopes.as_deref(), Some("activity:read_all profile:read_all read read_all"));
    assert!(!account.provider_user_id.starts_with("pending") && account.username.is_some(), "{account:?}");
    assert_eq!(states(&world).await, 0, "good once");

    // A first sync waits, behind what people ask for; it needs no refresh of what was given a moment ago.
    let runs = runs(&world, ann).await;
    let [run] = runs.as_slice() else { panic!("one run: {runs:?}") };
    assert_eq!((run.source.as_str(), run.class, run.run_state()), ("backfill", 2, RunState::Queued));
    let run = oracle::finish(&world.engine, run.id).await;
    assert_eq!(run.run_state(), RunState::Success, "{run:?}");
    let tokens = ledger(&world).await["tokens"].clone();
    assert_eq!((&tokens["exchanges"], &tokens["refresh_attempts"]), (&json!(1), &json!(0)), "{tokens}");

    // To where the caller wants the person, and nothing added.
    let encoded: String = url::form_urlencoded::byte_serialize(REDIRECT.as_bytes()).collect();
    let ben = user(&world).await;
    let visit = web.visit(ben, &format!("&redirect_uri={encoded}")).await;
    let back = web.agree(&visit, 2).await;
    assert_eq!(web.browse(&back).await.location(), REDIRECT);

    // Pages: HTML for browsers, JSON for programs; nothing that runs, nothing unescaped.
    let success = format!("/api/v1/oauth/success?provider=strava&user_id={ann}&missing=read_all,%3Cb%3E");
    let page = web.browse(&success).await;
    assert!(page.status == 200 && page.headers["content-type"].to_str().unwrap().starts_with("text/html"));
    assert!(page.text.contains("Connected to Strava") && page.text.contains("your private routes"), "{}", page.text);
    let policy = page.headers["content-security-policy"].to_str().unwrap();
    assert!(policy.starts_with("default-src 'none'") && !page.text.contains("<script") && !page.text.contains("<b>"));
    assert_eq!(
        web.get(&success).await.json(),
        json!({"success": true, "message": "Connected to Strava", "user_id": ann, "provider": "strava"})
    );
    assert_eq!(web.get("/api/v1/oauth/success?provider=strava").await.detail(), (400, "Field required".to_owned()));
    let evil = "/api/v1/oauth/error?message=%3Cscript%3Ealert(1)%3C/script%3E%22%27%26";
    let page = web.browse(evil).await;
    assert!(page.text.contains("&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#39;&amp;"), "{}", page.text);
    let evil = web.browse("/api/v1/oauth/success?provider=%3Cimg%20src=x%3E&user_id=1").await;
    assert!(evil.text.contains("&lt;img src=x&gt;") && !evil.text.contains("<img"), "{}", evil.text);
    assert_eq!(
        web.get("/api/v1/oauth/error").await.json(),
        json!({"success": false, "message": "OAuth authentication failed"})
    );

    // Without the setting nothing is queued.
    let quiet = oracle::another(&world, &[("WEARSYNC_SYNC_ON_CONNECT", "false")]).await;
    let cid = user(&world).await;
    Web::new(&quiet).await.connect(cid, 0).await;
    assert!(self::runs(&world, cid).await.is_empty());
}

async fn attacks(shape: Shape) {
    let (world, web) = place(shape, options(2), &[]).await;
    let ann = user(&world).await;
    let callback = |query: &str| format!("/api/v1/oauth/strava/callback?{query}");
    let gone = (400, "Invalid or expired state parameter".to_owned());

    // Words of others lead to our page and nowhere else.
    for (query, to) in [
        ("error=access_denied", "access_denied:+Unknown+error"),
        ("error=access_denied&error_description=not+now", "access_denied:+not+now"),
        (
            "error=a%0d%0aSet-Cookie:x=1&error_description=%3Cb%3E%26message=2",
            "a%0D%0ASet-Cookie%3Ax%3D1:+%3Cb%3E%26message%3D2",
        ),
        ("", "Missing+OAuth+parameters"),
        ("code=1", "Missing+OAuth+parameters"),
        ("state=1&code=", "Missing+OAuth+parameters"),
    ] {
        let answer = web.get(&callback(query)).await;
        assert_eq!(answer.location(), format!("/api/v1/oauth/error?message={to}"), "{query}");
        assert!(answer.headers.get("set-cookie").is_none());
    }
    let long = web.get(&callback(&format!("error={}", "x".repeat(5000)))).await;
    assert!(long.location().len() < 300);

    // Refusing at the provider spends the state: the code that comes later is nobody's.
    let visit = web.visit(ann, "").await;
    let good = web.agree(&visit, 1).await;
    let state = visit["state"].as_str().unwrap();
    web.get(&callback(&format!("error=access_denied&state={state}"))).await.location();
    assert_eq!(web.get(&good).await.detail(), gone);

    // Forged, reused, expired.
    for forged in ["x".repeat(43), state.to_lowercase(), state[..42].to_owned(), format!("{state}A"), "%00".to_owned()]
    {
        let (status, detail) = web.get(&callback(&format!("code=1&state={forged}"))).await.detail();
        assert!(status == 400 && (detail == gone.1 || detail.contains("null character")), "{forged}: {detail}");
    }
    let digest: String = vault::hash_secret(state).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(web.get(&callback(&format!("code=1&state={digest}"))).await.detail(), gone);
    let visit = web.visit(ann, "").await;
    let good = web.agree(&visit, 1).await;
    web.get(&good).await.location();
    assert_eq!(web.get(&good).await.detail(), gone, "reused");
    let page = web.browse(&good).await;
    assert!(page.status == 400 && page.text.contains("<h1>Not connected</h1>"), "words for a person: {}", page.text);
    let visit = web.visit(ann, "").await;
    let good = web.agree(&visit, 1).await;
    world.clock.set(world.clock.now() + chrono::Duration::seconds(900));
    assert_eq!(web.get(&good).await.detail(), gone, "expired");
    assert_eq!(states(&world).await, 0);
    web.visit(ann, "").await;
    world.clock.set(world.clock.now() + chrono::Duration::seconds(901));
    world.engine.db.clean_up(world.clock.now()).await.unwrap();
    assert_eq!(states(&world).await, 0, "visits that led to nothing are dropped");

    // A state of another provider is spent here, and good for neither.
    let (hash, now) = (vault::hash_secret("another"), world.clock.now());
    let row = OAuthState {
        provider: "garmin".to_owned(),
        user_id: ann,
        redirect_uri: None,
        callback_url: "https://wear.example.org/api/v1/oauth/garmin/callback".to_owned(),
        verifier: None,
        expires_at: now + chrono::Duration::seconds(900),
    };
    world.engine.db.insert_oauth_state(hash, row, now).await.unwrap();
    let mixed = callback("code=1&state=another");
    assert_eq!(web.get(&mixed).await.detail(), (400, "Provider mismatch in state".to_owned()));
    assert_eq!(web.get(&mixed).await.detail(), gone);

    // A state leads to the user it was made for, whoever brings it: a visit cannot be turned to somebody else.
    let ben = user(&world).await;
    let visit = web.visit(ben, "").await;
    let good = format!("{}&user_id={ann}&provider=garmin", web.agree(&visit, 1).await);
    assert!(web.get(&good).await.location().ends_with(&format!("user_id={ben}")));

    // A code that is none, or was used.
    let spent = param(&good, "code").unwrap();
    let count = connections(&world, ann).await.len();
    for code in ["nonsense", &spent, "a%26grant_type%3Drefresh_token"] {
        let state = web.visit(ann, "").await["state"].as_str().unwrap().to_owned();
        let answer = web.get(&callback(&format!("code={code}&state={state}"))).await;
        let (status, detail) = answer.detail();
        assert!(status == 400 && detail.starts_with("Failed to exchange authorization code: "), "{detail}");
        assert!(!answer.text.contains(&spent), "{detail}");
    }
    assert_eq!(connections(&world, ann).await.len(), count);
    // A user who is erased takes the visits along.
    let cid = user(&world).await;
    let visit = web.visit(cid, "").await;
    let good = web.agree(&visit, 1).await;
    sync::erase_user(&world.engine, cid).await.unwrap();
    assert_eq!(web.get(&good).await.detail(), gone);
}

async fn twice(shape: Shape) {
    let (world, web) = place(shape, options(2), &[]).await;
    for _ in 0..5 {
        let ann = user(&world).await;
        let visit = web.visit(ann, "").await;
        // Two codes, one state: as if somebody had looked over the shoulder.
        let (one, two) = (web.agree(&visit, 0).await, web.agree(&visit, 1).await);
        let (one, two) = tokio::join!(web.get(&one), web.get(&two));
        let mut answers = [one.status, two.status];
        answers.sort_unstable();
        assert_eq!(answers, [303, 400]);
        assert_eq!(connections(&world, ann).await.len(), 1);
    }
}

/// As if the provider took PKCE: the simulator insists.
async fn pkce(shape: Shape) {
    let options = Options { require_pkce: true, ..options(2) };
    let (mut world, web) = place(shape, options, &[]).await;
    drop(web);
    let ann = user(&world).await;
    {
        let engine = Arc::get_mut(&mut world.engine).expect("nobody else holds it");
        let app = engine.providers.get_mut("strava").unwrap().app.as_mut().unwrap();
        let settles = std::time::Duration::from_millis(1);
        app.oauth = Box::leak(Box::new(OAuthSpec { pkce: true, code_settles: Some(settles), ..*app.oauth }));
    }
    let web = Web::new(&world.engine).await;
    let visit = web.visit(ann, "").await;
    let address = visit["authorization_url"].as_str().unwrap();
    assert_eq!(param(address, "code_challenge_method").as_deref(), Some("S256"));
    assert_eq!(param(address, "code_challenge").map(|text| text.len()), Some(43));
    let kept = format!("{:?}", dump(&world.engine.db, &["oauth_states"]).await).to_lowercase();
    let good = web.agree(&visit, 1).await;
    web.get(&good).await.location();
    let secrets = world.ask("secrets").await;
    let verifier = secrets["verifiers"][0].as_str().unwrap().to_owned();
    assert!(!visit.to_string().contains(&verifier) && !good.contains(&verifier), "only its digest is shown");
    let hex: String = verifier.bytes().map(|byte| format!("{byte:02x}")).collect();
    assert!(kept.contains("verifier") && !kept.contains(&hex) && !kept.contains(&verifier.to_lowercase()), "sealed");
    assert_eq!(connections(&world, ann).await.len(), 1);

    // A code of another visit has another verifier: what was overheard cannot be brought in.
    let ben = user(&world).await;
    let theirs = web.visit(ann, "").await;
    let code = param(&web.agree(&theirs, 0).await, "code").unwrap();
    let mine = web.visit(ben, "").await;
    let mixed = format!(
        "/api/v1/oauth/strava/callback?code={code}&scope=activity:read_all&state={}",
        mine["state"].as_str().unwrap()
    );
    let (status, detail) = web.get(&mixed).await.detail();
    assert!(status == 400 && detail.starts_with("Failed to exchange"), "{detail}");
    // Without a verifier, and with one that was put in by somebody who has the database but not the key.
    for change in ["null", "'\\x00'"] {
        let visit = web.visit(ben, "").await;
        let good = web.agree(&visit, 0).await;
        execute(
            &world.engine.db,
            &world,
            &format!(
                "update oauth_states set verifier = {}",
                match (shape, change) {
                    (_, "null") => "null",
                    (Shape::Sqlite, _) => "x'00112233'",
                    (Shape::Postgres, _) => "'\\x00112233'",
                }
            ),
        )
        .await;
        let status = web.get(&good).await.status;
        assert_eq!(status, if change == "null" { 400 } else { 500 });
    }
    assert!(connections(&world, ben).await.is_empty());
}

/// A statement that no function of ours would send.
async fn execute(db: &Db, world: &World, sql: &str) {
    match db {
        Db::Postgres(db) => {
            sqlx::query(sql).execute(db.pool()).await.unwrap();
        }
        Db::Sqlite(_) => {
            let path = world.place.data_dir().join("state/wearsync.db");
            let options = sqlx::sqlite::SqliteConnectOptions::new().filename(path);
            let mut connection = <sqlx::SqliteConnection as sqlx::Connection>::connect_with(&options).await.unwrap();
            sqlx::query(sql).execute(&mut connection).await.unwrap();
        }
    }
}

async fn scopes(shape: Shape) {
    let unticked = |names: &[&str]| Options {
        unticked_scopes: names.iter().map(|name| (*name).to_owned()).collect(),
        ..options(2)
    };
    // Something is missing, and the rest is read.
    let (world, web) = place(shape, unticked(&["read_all", "profile:read_all"]), &[]).await;
    let ann = user(&world).await;
    let to = web.connect(ann, 1).await;
    assert!(to.ends_with("&missing=read_all,profile%3Aread_all"), "{to}");
    let page = web.browse(&to).await.text;
    assert!(page.contains("your private routes and segments; your whole profile, with weight and zones"), "{page}");
    assert_eq!(account(&world, ann).await.scopes.as_deref(), Some("activity:read_all read"));

    // Nothing can be read: nobody is connected, and no code is exchanged, so that the provider gives no grant.
    let (world, web) = place(shape, unticked(&["activity:read_all"]), &[]).await;
    let ann = user(&world).await;
    let to = web.connect(ann, 1).await;
    let page = web.get(&to).await.json();
    let message = page["message"].as_str().unwrap();
    assert!(message.contains("activity:read_all or activity:read ticked"), "{message}");
    assert!(connections(&world, ann).await.is_empty() && runs(&world, ann).await.is_empty());
    assert_eq!(ledger(&world).await["tokens"]["exchanges"], 0);

    // Cancel.
    let (world, web) = place(shape, Options { refuse_consent: true, ..options(2) }, &[]).await;
    let ann = user(&world).await;
    let to = web.connect(ann, 1).await;
    assert_eq!(to, "/api/v1/oauth/error?message=access_denied:+Unknown+error");
    assert!(web.browse(&to).await.text.contains("You did not agree at the provider."));
    assert_eq!(states(&world).await, 0);
}

async fn away(shape: Shape) {
    let (world, web) = place(shape, options(2), &[]).await;
    let ann = user(&world).await;
    faults(&world, &["500@token=1"]).await;
    let visit = web.visit(ann, "").await;
    let good = web.agree(&visit, 1).await;
    let answer = web.get(&good).await;
    assert_eq!(answer.detail(), (500, "Token exchange failed: the token endpoint answered 500".to_owned()));
    assert_eq!(answer.json()["code"], "provider_unavailable");
    faults(&world, &["inactive@token=1"]).await;
    let visit = web.visit(ann, "").await;
    let good = web.agree(&visit, 1).await;
    let (status, detail) = web.get(&good).await.detail();
    assert!(status == 400 && detail.contains("Inactive"), "{detail}");
    assert!(connections(&world, ann).await.is_empty());

    // It cannot be told that we leave: people leave all the same.
    faults(&world, &[]).await;
    web.connect(ann, 1).await;
    faults(&world, &["503@revoke=1"]).await;
    assert_eq!(web.delete(&format!("/api/v1/users/{ann}/connections/strava")).await.status, 204);
    assert_eq!(account(&world, ann).await.refresh_token, None);
    assert_eq!(connections(&world, ann).await[0].connection.status, "revoked");
}

async fn shared(shape: Shape) {
    let (world, web) = place(shape, options(2), &[]).await;
    let (ann, ben) = (user(&world).await, user(&world).await);
    web.connect(ann, 1).await;
    web.connect(ben, 1).await;
    assert_eq!(account(&world, ann).await.id, account(&world, ben).await.id, "one account, one grant");
    let path = |user| format!("/api/v1/users/{user}/connections/strava");
    let answer = web.delete(&path(ann)).await;
    assert_eq!((answer.status, answer.text.as_str()), (204, ""));
    assert!(account(&world, ben).await.refresh_token.is_some());
    assert_eq!(calls(&ledger(&world).await, "revoke"), 0, "somebody still uses it");
    let run = runs(&world, ben).await[0].id;
    assert_eq!(oracle::finish(&world.engine, run).await.run_state(), RunState::Success);
    assert_eq!(runs(&world, ann).await[0].run_state(), RunState::Cancelled);

    // Both at once: the one who comes last takes the grant along.
    web.connect(ann, 1).await;
    let (one, two) = (path(ann), path(ben));
    let (one, two) = tokio::join!(web.delete(&one), web.delete(&two));
    assert_eq!((one.status, two.status), (204, 204));
    let ledger = ledger(&world).await;
    assert_eq!((calls(&ledger, "revoke"), &ledger["tokens"]["revoked"]), (1, &json!(1)));
    assert_eq!(account(&world, ann).await.refresh_token, None);
    assert_eq!(web.delete(&path(ann)).await.status, 204, "it has ended already");
    let stranger = user(&world).await;
    for nobody in [stranger, UserId::new()] {
        let expected = (404, format!("Connection with ID: {nobody} not found."));
        assert_eq!(web.delete(&path(nobody)).await.detail(), expected);
        assert_eq!(web.delete(&format!("{}/data", path(nobody))).await.detail(), expected);
    }
    let (status, detail) = web.delete(&format!("/api/v1/users/{ann}/connections/fitness")).await.detail();
    assert_eq!((status, detail.as_str()), (400, "Input should be 'strava'"));
    assert_eq!(web.send("DELETE", "/api/v1/users/1/connections/x", &[]).await.status, 401, "who asks comes first");
}

async fn same_again(shape: Shape) {
    let (world, web) = place(shape, options(2), &[]).await;
    let ann = user(&world).await;
    web.connect(ann, 1).await;
    oracle::finish(&world.engine, runs(&world, ann).await[0].id).await;
    let first = connections(&world, ann).await.remove(0).connection;
    web.delete(&format!("/api/v1/users/{ann}/connections/strava")).await;
    let kept = dump(&world.engine.db, &["records", "parts", "windows", "sample_chunks"]).await;
    assert!(!kept["records"].is_empty() && !kept["windows"].is_empty());
    web.connect(ann, 1).await;
    let again = connections(&world, ann).await.remove(0).connection;
    assert_eq!((again.id, again.status.as_str()), (first.id, "active"));
    assert!(again.epoch > first.epoch);
    assert_same("a reconnect", &kept, &dump(&world.engine.db, &["records", "parts", "windows", "sample_chunks"]).await);
    let before = calls(&ledger(&world).await, "streams");
    let run = oracle::finish(&world.engine, runs(&world, ann).await[0].id).await;
    assert_eq!(run.run_state(), RunState::Success, "{run:?}");
    assert_eq!(calls(&ledger(&world).await, "streams"), before, "it goes on where it was");
    // While it is active, too.
    web.connect(ann, 1).await;
    assert_eq!(connections(&world, ann).await[0].connection.id, first.id);
    assert_eq!(number(&world.engine.db, "select count(*) from connections where status = 'replaced'").await, 0);
}

async fn another(shape: Shape) {
    let (world, web) = place(shape, options(3), &[]).await;
    let ann = user(&world).await;
    web.connect(ann, 1).await;
    oracle::finish(&world.engine, runs(&world, ann).await[0].id).await;
    let (old, first) = (account(&world, ann).await, connections(&world, ann).await.remove(0).connection);
    let records = number(&world.engine.db, "select count(*) from records").await;
    web.connect(ann, 2).await;
    let (new, second) = (account(&world, ann).await, connections(&world, ann).await.remove(0).connection);
    assert!(old.id != new.id && old.provider_user_id != new.provider_user_id && first.id != second.id);
    let replaced = world.engine.db.find_connection(first.id).await.unwrap().unwrap();
    assert_eq!(replaced.status, "replaced");
    assert_eq!(number(&world.engine.db, "select count(*) from records").await, records, "its data stays");
    // Nobody uses the first account any more: its grant goes, and the provider is told.
    assert_eq!(world.engine.db.find_account(old.id).await.unwrap().unwrap().refresh_token, None);
    assert_eq!(calls(&ledger(&world).await, "revoke"), 1);
    let run = oracle::finish(&world.engine, runs(&world, ann).await[0].id).await;
    assert_eq!(run.run_state(), RunState::Success, "the new one works: {run:?}");
    assert!(number(&world.engine.db, "select count(*) from records").await > records);
    // A purge takes both along.
    web.delete(&format!("/api/v1/users/{ann}/connections/strava/data")).await;
    assert_eq!(number(&world.engine.db, "select count(*) from records").await, 0);
    assert_eq!(number(&world.engine.db, "select count(*) from connections where status = 'replaced'").await, 0);
    assert_eq!(world.engine.db.find_account(old.id).await.unwrap(), None);
}

/// Rows that are of a user's data of one provider, by table. What stays is the user, an ended connection and its account.
async fn left(world: &World, user: UserId) -> Vec<(&'static str, i64)> {
    let whose = match world.place.shape {
        Shape::Sqlite => format!("x'{}'", user.0.simple()),
        Shape::Postgres => format!("'{user}'"),
    };
    let connections = format!("(select id from connections where user_id = {whose})");
    let by_connection = ["windows", "runs", "records", "parts", "delivery_items"];
    let by_user = ["run_events", "data_sources", "oauth_states"];
    let records = format!("(select id from records where connection_id in {connections})");
    let mut out = Vec::new();
    for table in by_connection {
        let sql = format!("select count(*) from {table} where connection_id in {connections}");
        out.push((table, number(&world.engine.db, &sql).await));
    }
    for table in by_user {
        let sql = format!("select count(*) from {table} where user_id = {whose}");
        out.push((table, number(&world.engine.db, &sql).await));
    }
    for table in ["workouts", "sample_chunks"] {
        let sql = format!("select count(*) from {table} where record_id in {records}");
        out.push((table, number(&world.engine.db, &sql).await));
    }
    out
}

async fn total(world: &World, table: &str) -> i64 {
    number(&world.engine.db, &format!("select count(*) from {table}")).await
}

async fn purge(shape: Shape) {
    let (world, web) = place(shape, options(3), &[]).await;
    // The oldest user's files lie without a level of their own until somebody else has some.
    world.sync().await;
    let root = world.place.export_dir();
    assert!(root.join("strava").is_dir());
    let (ann, ben) = (user(&world).await, user(&world).await);
    for (athlete, user) in [(1, ann), (2, ben)] {
        web.connect(user, athlete).await;
        oracle::finish(&world.engine, runs(&world, user).await[0].id).await;
    }
    let folder = |user: UserId| root.join(wearsync::export::user_folder(None, user));
    assert!(folder(ann).join("strava").is_dir() && folder(ben).join("strava").is_dir());
    let theirs = |tree: std::collections::BTreeMap<std::path::PathBuf, Vec<u8>>, user: UserId| {
        let mut tree = tree;
        tree.retain(|path, _| !path.starts_with(wearsync::export::user_folder(None, user)));
        tree
    };
    let (files, others) = (theirs(tree(&root), ann), left(&world, ben).await);
    let all = [total(&world, "records").await, total(&world, "parts").await];
    web.visit(ann, "").await;
    sync::first_sync(
        &world.engine,
        world.engine.provider("strava").unwrap(),
        connections(&world, ann).await[0].connection.id,
    )
    .await
    .unwrap();
    let mine = left(&world, ann).await;
    for (table, count) in &mine {
        assert!(*count > 0 || matches!(*table, "delivery_items" | "run_events"), "{table} is empty: nothing is shown");
    }

    let path = format!("/api/v1/users/{ann}/connections/strava/data");
    let answer = web.delete(&path).await;
    assert_eq!((answer.status, answer.text.as_str()), (204, ""));
    for (table, count) in left(&world, ann).await {
        // The newest event of a user stays, without its run and unseen: the next one's number goes on from it.
        assert_eq!(count, i64::from(table == "run_events"), "{table}");
    }
    assert!(!folder(ann).exists(), "files");
    assert_eq!(left(&world, ben).await, others);
    assert_eq!(theirs(tree(&root), ann), files, "nobody else's files are touched");
    assert!(total(&world, "records").await < all[0] && total(&world, "parts").await < all[1]);
    assert_eq!(total(&world, "erased_folders").await, 0);
    let view = connections(&world, ann).await.remove(0);
    assert_eq!((view.connection.status.as_str(), view.connection.last_success_at), ("revoked", None));
    assert_eq!(account(&world, ann).await.refresh_token, None);
    assert_eq!(calls(&ledger(&world).await, "revoke"), 1);
    assert_eq!(web.delete(&path).await.status, 204);
    world.check_user(ben, 2, &folder(ben)).await;

    // Connected again, everything comes again, files too.
    web.connect(ann, 1).await;
    oracle::finish(&world.engine, runs(&world, ann).await[0].id).await;
    world.check_user(ann, 1, &folder(ann)).await;
    // The oldest one's files are found wherever they lie.
    web.delete(&format!("/api/v1/users/{}/connections/strava/data", world.user)).await;
    assert!(!root.join("strava").exists() && !folder(world.user).exists());
    for (table, count) in left(&world, world.user).await {
        assert_eq!(count, i64::from(table == "run_events"), "{table}");
    }
    world.check_user(ben, 2, &folder(ben)).await;
}

impl World {
    /// Rows and files of a user are exactly what the simulator issued for an athlete.
    async fn check_user(&self, user: UserId, athlete: u32, folder: &std::path::Path) {
        let truth = crate::support::truth(&client(), &self.sim.url(), athlete).await;
        let connection = connections(self, user).await[0].connection.id;
        crate::support::check(&self.engine.db, connection, &truth, folder).await;
    }
}

async fn purge_flat(shape: Shape) {
    let (world, web) = place(shape, options(1), &[("WEARSYNC_EXPORT_FLAT", "true")]).await;
    world.sync().await;
    let root = world.place.export_dir();
    assert!(root.join("activities").is_dir() && root.join("athlete.json").is_file());
    std::fs::write(root.join("notes.txt"), "mine").unwrap();
    assert_eq!(web.delete(&format!("/api/v1/users/{}/connections/strava/data", world.user)).await.status, 204);
    let left: Vec<_> = tree(&root).into_keys().collect();
    assert_eq!(left, [std::path::PathBuf::from("notes.txt")]);
}

async fn deauthorized(shape: Shape) {
    for (keep, settings) in
        [(true, [("WEARSYNC_ON_DEAUTHORIZE", "keep")]), (false, [("WEARSYNC_ON_DEAUTHORIZE", "delete")])]
    {
        let (world, web) = place(shape, options(2), &settings).await;
        world.sync().await;
        let (ann, ben) = (user(&world).await, user(&world).await);
        for user in [ann, ben] {
            web.connect(user, 1).await;
            oracle::finish(&world.engine, runs(&world, user).await[0].id).await;
        }
        // What the delivery of a provider's word leads to: a run for each connection of the account.
        world.control("revoke", json!({"athlete": 1})).await;
        let setup = world.engine.provider("strava").unwrap();
        let request = SyncRequest { check_grant: true, ..SyncRequest::default() };
        let mut asked = Vec::new();
        for user in [ann, ben] {
            let connection = connections(&world, user).await[0].connection.id;
            let run =
                sync::submit(&world.engine, setup, connection, &request, Class::Webhook, RunSource::Webhook, None)
                    .await;
            asked.push(run.unwrap().unwrap().id);
        }
        for run in asked {
            sync::execute(&world.engine, run).await.unwrap();
        }
        for user in [ann, ben] {
            assert_eq!(connections(&world, user).await[0].connection.status, "revoked");
            let records = left(&world, user).await.into_iter().find(|(table, _)| *table == "records").unwrap().1;
            assert_eq!(records > 0, keep, "{records}");
        }
        assert_eq!(account(&world, ann).await.refresh_token, None);
        assert_eq!(calls(&ledger(&world).await, "revoke"), 0, "the provider knows");
        let folder = wearsync::export::user_folder(None, world.user);
        world.check_user(world.user, 0, &world.place.export_dir().join(folder)).await;
    }
}

/// Nobody sends a notice: a sync finds it out, or the refresh of an idle grant.
async fn found_out(shape: Shape) {
    for (deletes, setting) in [(false, "keep"), (true, "delete")] {
        let (world, web) = place(shape, options(3), &[("WEARSYNC_ON_DEAUTHORIZE", setting)]).await;
        let engine = &world.engine;
        world.sync().await;
        let (ann, ben) = (user(&world).await, user(&world).await);
        for (athlete, user) in [(1, ann), (2, ben)] {
            web.connect(user, athlete).await;
            oracle::finish(engine, runs(&world, user).await[0].id).await;
        }
        let folder = |user| world.place.export_dir().join(wearsync::export::user_folder(None, user)).join("strava");
        let check = async |user: UserId, runs_left: i64| {
            let view = connections(&world, user).await.remove(0);
            let status = if deletes { "revoked" } else { "active" };
            assert_eq!((view.connection.status.as_str(), view.account_status.as_str()), (status, "reauth"));
            assert_eq!(folder(user).exists(), !deletes, "files");
            for (table, count) in left(&world, user).await {
                match table {
                    "runs" => assert!(!deletes || count == runs_left, "{count} runs"),
                    // The number of the next event goes on from the newest; a run in hand tells of its end besides.
                    "run_events" => assert!(!deletes || count <= 1 + runs_left, "{count} events"),
                    "delivery_items" | "oauth_states" => assert_eq!(count, 0),
                    _ => assert_eq!(count == 0, deletes, "{count} in {table}"),
                }
            }
            let path = format!("/api/v1/strava/users/{user}/sync");
            let answer = web.send("POST", &path, &[("x-api-key", &web.key)]).await;
            let code = if deletes { "revoked" } else { "reauthorization_required" };
            assert_eq!((answer.status, answer.json()["code"].as_str()), (404, Some(code)));
        };

        world.control("revoke", json!({"athlete": 1})).await;
        let setup = engine.provider("strava").unwrap();
        let connection = connections(&world, ann).await[0].connection.id;
        let request = SyncRequest::default();
        let accepted = sync::submit(engine, setup, connection, &request, Class::Interactive, RunSource::Pull, None);
        let run = oracle::finish(engine, accepted.await.unwrap().unwrap().id).await;
        assert_eq!(run.run_state(), RunState::Failed, "{run:?}");
        assert!(run.reason.as_deref().is_some_and(|why| why.contains("access was taken back")), "{run:?}");
        check(ann, 1).await;

        world.control("revoke", json!({"athlete": 2})).await;
        world.clock.set(t0() + chrono::Duration::days(180));
        assert_eq!(sync::keep_grants(engine).await.unwrap(), 1, "the third one's");
        check(ben, 0).await;
        // Whoever found it out may have ended before it was acted on.
        let late = oracle::another(&world, &[("WEARSYNC_ON_DEAUTHORIZE", "delete")]).await;
        sync::keep_grants(&late).await.unwrap();
        for user in [ann, ben] {
            assert_eq!(connections(&world, user).await[0].connection.status, "revoked");
            assert!(!folder(user).exists());
        }
        assert_eq!(calls(&ledger(&world).await, "revoke"), 0, "the provider knows");
        world.check_user(world.user, 0, folder(world.user).parent().unwrap()).await;

        // Connected again, everything comes again.
        web.connect(ann, 1).await;
        oracle::finish(engine, runs(&world, ann).await[0].id).await;
        world.check_user(ann, 1, folder(ann).parent().unwrap()).await;
    }
}

async fn erased(shape: Shape) {
    let (world, web) = place(shape, options(2), &[]).await;
    let (ann, ben) = (user(&world).await, user(&world).await);
    web.connect(ann, 1).await;
    web.connect(ben, 1).await;
    assert_eq!(web.delete(&format!("/api/v1/users/{ann}")).await.status, 200);
    assert_eq!(calls(&ledger(&world).await, "revoke"), 0, "Ben uses the account");
    assert_eq!(web.delete(&format!("/api/v1/users/{ben}")).await.status, 200);
    assert_eq!(calls(&ledger(&world).await, "revoke"), 1);
    assert_eq!(total(&world, "accounts").await, 1, "the first user's alone is left");
}

async fn idle(shape: Shape) {
    let (world, web) = place(shape, options(3), &[]).await;
    let mut people = vec![world.user];
    for athlete in [1, 2] {
        let user = user(&world).await;
        web.connect(user, athlete).await;
        people.push(user);
    }
    // One has left: its grant is nobody's any more.
    web.delete(&format!("/api/v1/users/{}/connections/strava", people[2])).await;
    let engine = &world.engine;
    let limit = chrono::Duration::days(180);
    assert_eq!(sync::keep_grants(engine).await.unwrap(), 0, "nothing is due");
    world.clock.set(t0() + limit * 2 / 5 - chrono::Duration::hours(1));
    assert_eq!(sync::keep_grants(engine).await.unwrap(), 0, "not before two fifths of the limit");
    // Several processes look at once; each grant is refreshed by one of them.
    world.clock.set(t0() + limit * 3 / 5);
    let before = ledger(&world).await["tokens"]["refresh_attempts"].as_u64().unwrap();
    let second = oracle::another(&world, &[]).await;
    let (one, two) = tokio::join!(sync::keep_grants(engine), sync::keep_grants(&second));
    assert_eq!(one.unwrap() + two.unwrap(), 2);
    let after = ledger(&world).await["tokens"]["refresh_attempts"].as_u64().unwrap();
    assert_eq!(after - before, 2, "one refresh for each");
    assert_eq!(sync::keep_grants(engine).await.unwrap(), 0);

    // A provider that does not answer is asked again later, and nothing is lost.
    world.clock.set(t0() + limit * 6 / 5);
    faults(&world, &["503@token=1"]).await;
    assert_eq!(sync::keep_grants(engine).await.unwrap(), 0);
    faults(&world, &[]).await;
    assert_eq!(sync::keep_grants(engine).await.unwrap(), 0, "not at once");
    world.clock.set(world.clock.now() + chrono::Duration::seconds(3601));
    assert_eq!(sync::keep_grants(engine).await.unwrap(), 2);
    // A grant that is used needs no keeping.
    world.clock.set(world.clock.now() + limit * 2 / 5 - chrono::Duration::hours(1));
    assert_eq!(oracle::sync_with(&world, &SyncRequest::default()).await.run_state(), RunState::Success);
    world.clock.set(world.clock.now() + limit / 5 + chrono::Duration::hours(2));
    assert_eq!(sync::keep_grants(engine).await.unwrap(), 1, "the other one");
    // Taken back at the provider: noticed, and not tried again and again.
    world.clock.set(world.clock.now() + limit);
    world.control("revoke", json!({ "athlete": 1 })).await;
    assert_eq!(sync::keep_grants(engine).await.unwrap(), 1);
    assert_eq!(account(&world, people[1]).await.status, "reauth");
    world.clock.set(world.clock.now() + limit / 3);
    assert_eq!(sync::keep_grants(engine).await.unwrap(), 0);
}
