//! Strava's API as a server: paging, quotas, tokens, consent, error bodies. Written from the provider's documents and
//! recordings; it names neither `wire` nor `normalize`, so that a wrong field name cannot be wrong on both sides.
//!
//! Below `/_simulator` lies what tests drive it with: edit, delete, upload, grant, revoke, truth.

mod body;
mod push;
mod world;

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use axum::body::Bytes;
use axum::extract::{Query, RawQuery, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use base64::Engine;
use chrono::DateTime;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use url::{Url, form_urlencoded};

use crate::providers::simulation::{FaultKind, Hit, ListCall, Refused, Rng, Shared, locked, proves, refused};
use world::{Facts, Visibility, World};

const SCOPES: [&str; 7] =
    ["read", "read_all", "profile:read_all", "profile:write", "activity:read", "activity:read_all", "activity:write"];
/// With less than this left, a refresh brings a new access token.
const RENEW_BELOW_MS: i64 = 3_600_000;
const CODE_LIFE_MS: i64 = 600_000;
const QUARTER_MS: i64 = 900_000;
const DAY_MS: i64 = 86_400_000;

/// The whole provider, to be mounted at the root: `/api/v3/…` (also without that prefix), `/oauth/…`, `/_simulator/…`.
pub fn router(shared: &Shared) -> Router {
    let strava = Arc::new(Strava {
        world: Mutex::new(World::new(shared.options(), shared.epoch())),
        auth: Mutex::default(),
        usage: Mutex::default(),
        listings: AtomicU64::new(0),
        push: Mutex::default(),
        counts: push::Counts::default(),
        shared: shared.clone(),
    });
    Router::new()
        .route("/oauth/authorize", get(show_consent).post(answer_consent))
        .route("/oauth/mobile/authorize", get(show_consent))
        .route("/oauth/token", post(token))
        .route("/api/v3/oauth/token", post(token))
        .route("/oauth/deauthorize", post(deauthorize))
        .route("/oauth/revoke", post(revoke))
        .route("/api/v3/push_subscriptions", get(push::view).post(push::create))
        .route("/api/v3/push_subscriptions/{id}", axum::routing::delete(push::delete))
        .route("/_simulator/event", post(push::tell_event))
        .route("/_simulator/truth", get(show_truth))
        .route("/_simulator/edit", post(edit_activity))
        .route("/_simulator/delete", post(delete_activity))
        .route("/_simulator/upload", post(upload_activities))
        .route("/_simulator/grant", post(make_grant))
        .route("/_simulator/revoke", post(end_grant))
        .route("/_simulator/secrets", get(show_secrets))
        .fallback(api)
        .with_state(strava)
}

struct Strava {
    shared: Shared,
    world: Mutex<World>,
    auth: Mutex<Auth>,
    usage: Mutex<HashMap<String, Usage>>,
    /// List calls so far: what volatile counts have grown by.
    listings: AtomicU64,
    push: Mutex<push::Push>,
    counts: push::Counts,
}

/// Grants and tokens.
#[derive(Default)]
struct Auth {
    grants: Vec<Grant>,
    access: HashMap<String, Access>,
    /// Every refresh token there ever was; only a grant's newest is good.
    refresh: HashMap<String, usize>,
    codes: HashMap<String, Code>,
    /// Every code there ever was, and every verifier that came.
    spent: Vec<String>,
    verifiers: Vec<String>,
    minted: u64,
}

/// One person's permission for one application.
struct Grant {
    client: String,
    person: usize,
    scopes: BTreeSet<String>,
    access: String,
    refresh: String,
    alive: bool,
}

struct Access {
    grant: usize,
    expires_ms: i64,
    calls: u64,
}

struct Code {
    client: String,
    person: usize,
    scopes: BTreeSet<String>,
    made_ms: i64,
    challenge: Option<String>,
}

/// Who calls, and what they may see.
struct Caller {
    person: usize,
    scopes: BTreeSet<String>,
}

impl Caller {
    fn may(&self, scope: &str) -> bool {
        self.scopes.contains(scope)
    }

    fn may_read(&self) -> bool {
        self.may("activity:read") || self.may("activity:read_all")
    }

    fn sees(&self, only_me: bool) -> bool {
        !only_me || self.may("activity:read_all")
    }
}

/// Calls of one application: overall and read, in the running quarter hour and day.
#[derive(Clone, Copy, Default)]
struct Usage {
    quarter: i64,
    day: i64,
    /// Overall a quarter hour, overall a day, reads a quarter hour, reads a day.
    used: [u64; 4],
}

impl Strava {
    fn now_ms(&self) -> i64 {
        self.shared.clock().now_ms()
    }

    fn world(&self) -> MutexGuard<'_, World> {
        locked(&self.world)
    }

    fn auth(&self) -> MutexGuard<'_, Auth> {
        locked(&self.auth)
    }

    fn mint(&self, auth: &mut Auth) -> String {
        auth.minted += 1;
        Rng::of(&[self.shared.options().seed, 0x70c3, auth.minted]).hex(40)
    }

    /// The grant of this person for this application: a new one, or the old one with these scopes.
    fn grant(&self, auth: &mut Auth, client: &str, person: usize, scopes: BTreeSet<String>) -> usize {
        let known =
            auth.grants.iter().position(|grant| grant.alive && grant.client == client && grant.person == person);
        if let Some(known) = known {
            auth.grants[known].scopes = scopes;
            return known;
        }
        let refresh = self.mint(auth);
        let grant = auth.grants.len();
        auth.refresh.insert(refresh.clone(), grant);
        let client = client.to_owned();
        auth.grants.push(Grant { client, person, scopes, access: String::new(), refresh, alive: true });
        grant
    }

    /// The tokens of a grant as an answer: the same access token while it has more than an hour.
    fn tokens(&self, auth: &mut Auth, grant: usize, rotate: bool) -> Map<String, Value> {
        let now = self.now_ms();
        let left = auth.access.get(&auth.grants[grant].access).map_or(0, |access| access.expires_ms - now);
        if left <= RENEW_BELOW_MS {
            let access = self.mint(auth);
            let expires_ms = now + self.shared.options().token_life_seconds * 1000;
            auth.access.insert(access.clone(), Access { grant, expires_ms, calls: 0 });
            auth.grants[grant].access = access;
            self.shared.ledger().tokens.issued += 1;
        }
        if rotate {
            let refresh = self.mint(auth);
            auth.refresh.insert(refresh.clone(), grant);
            auth.grants[grant].refresh = refresh;
        }
        let (access, refresh) = (auth.grants[grant].access.clone(), auth.grants[grant].refresh.clone());
        let expires_ms = auth.access.get(&access).map_or(now, |access| access.expires_ms);
        Map::from_iter([
            ("token_type".to_owned(), json!("Bearer")),
            ("access_token".to_owned(), json!(access)),
            ("expires_at".to_owned(), json!(expires_ms / 1000)),
            ("expires_in".to_owned(), json!((expires_ms - now) / 1000)),
            ("refresh_token".to_owned(), json!(refresh)),
        ])
    }

    fn end(&self, auth: &mut Auth, grant: usize) {
        if std::mem::replace(&mut auth.grants[grant].alive, false) {
            self.shared.ledger().tokens.revoked += 1;
        }
    }

    fn code(
        &self,
        auth: &mut Auth,
        client: &str,
        person: usize,
        scopes: BTreeSet<String>,
        challenge: Option<&str>,
    ) -> String {
        let code = self.mint(auth);
        let (client, challenge) = (client.to_owned(), challenge.map(str::to_owned));
        auth.spent.push(code.clone());
        auth.codes.insert(code.clone(), Code { client, person, scopes, made_ms: self.now_ms(), challenge });
        self.shared.ledger().tokens.codes += 1;
        code
    }

    /// Takes one call off the token and says whose it is.
    fn authorise(&self, bearer: Option<&str>) -> Result<Caller, Refusal> {
        let mut auth = self.auth();
        let now = self.now_ms();
        let limit = self.shared.options().expire_after_calls;
        let known = bearer.and_then(|token| auth.access.get_mut(token)).map(|access| {
            access.calls += 1;
            if limit.is_some_and(|limit| access.calls > limit) {
                access.expires_ms = access.expires_ms.min(now);
            }
            (access.grant, access.expires_ms > now)
        });
        if let Some((grant, true)) = known {
            let grant = &auth.grants[grant];
            if grant.alive {
                return Ok(Caller { person: grant.person, scopes: grant.scopes.clone() });
            }
        }
        let revoked = known.is_some_and(|(grant, _)| !auth.grants[grant].alive);
        {
            let tokens = &mut self.shared.ledger().tokens;
            tokens.dead_calls += 1;
            tokens.revoked_calls += u64::from(revoked);
        }
        // Both forms were recorded.
        let (resource, field) = if known.is_some() { ("Athlete", "access_token") } else { ("Application", "") };
        Err(Refusal { status: 401, message: "Authorization Error", resource, field, code: "invalid" })
    }

    /// Counts a read of the application that this token belongs to: headers, and what is exceeded.
    fn count(&self, bearer: Option<&str>) -> Option<(Usage, Option<&'static str>)> {
        let options = self.shared.options();
        if !options.quota {
            return None;
        }
        let client = {
            let auth = self.auth();
            let access = auth.access.get(bearer?)?;
            auth.grants[access.grant].client.clone()
        };
        let now = self.now_ms();
        let mut usage = locked(&self.usage);
        let usage = usage.entry(client).or_default();
        let (quarter, day) = (now.div_euclid(QUARTER_MS), now.div_euclid(DAY_MS));
        if usage.quarter != quarter {
            (usage.used[0], usage.used[2]) = (0, 0);
        }
        if usage.day != day {
            (usage.used[1], usage.used[3]) = (0, 0);
        }
        (usage.quarter, usage.day) = (quarter, day);
        // A refused call counts as well: who keeps knocking loses the day.
        usage.used.iter_mut().for_each(|used| *used += 1);
        let over = |n: usize| usage.used[n] > options.limits[n];
        let exceeded = match (over(0) || over(1), over(2) || over(3)) {
            (true, _) => Some("overall rate limit"),
            (false, true) => Some("read rate limit"),
            _ => None,
        };
        Some((*usage, exceeded))
    }

    fn add_usage(&self, response: &mut Response, usage: &Usage) {
        let limits = self.shared.options().limits;
        let headers = response.headers_mut();
        for (name, pair) in [
            ("x-ratelimit-limit", [limits[0], limits[1]]),
            ("x-ratelimit-usage", [usage.used[0], usage.used[1]]),
            ("x-readratelimit-limit", [limits[2], limits[3]]),
            ("x-readratelimit-usage", [usage.used[2], usage.used[3]]),
        ] {
            if let Ok(value) = HeaderValue::from_str(&format!("{},{}", pair[0], pair[1])) {
                headers.insert(name, value);
            }
        }
    }

    fn grown(&self) -> u64 {
        if self.shared.options().volatile { self.listings.load(Ordering::SeqCst) } else { 0 }
    }

    fn answer(&self, route: &Route<'_>, caller: &Caller, query: &HashMap<String, String>, whole: bool) -> Response {
        let seed = self.shared.options().seed;
        let person = caller.person;
        if matches!(route.endpoint, "list" | "detail" | "streams" | "laps" | "zones") && !caller.may_read() {
            return missing_scope("activity:read_permission");
        }
        let facts = match route.endpoint {
            "detail" | "streams" | "laps" | "zones" => match self.find(caller, route.id) {
                // Seen with a body and without one.
                None if route.id.ends_with('5') => return StatusCode::NOT_FOUND.into_response(),
                None => return not_found(),
                found => found,
            },
            _ => None,
        };
        let id = facts.as_ref().map(|facts| facts.id);
        let response = match (route.endpoint, facts) {
            ("athlete", _) if caller.may("profile:read_all") || caller.may("read") => {
                let detail = caller.may("profile:read_all");
                let id = self.world().athletes().nth(person).unwrap_or_default();
                json_text(body::athlete(id, person, self.grown(), detail))
            }
            ("athlete", _) => missing_scope("profile:read_permission"),
            ("athlete_zones", _) if caller.may("profile:read_all") => json_text(body::athlete_zones(person)),
            ("athlete_zones", _) => missing_scope("profile:read_permission"),
            ("stats", _) => {
                let own = self.world().athletes().nth(person);
                match route.id.parse::<u64>().ok() == own {
                    true => json_text(body::stats(person)),
                    false => not_found(),
                }
            }
            ("gear", _) if body::GEAR.contains(&route.id) => {
                json_text(body::gear(route.id, self.grown(), seed.is_multiple_of(2), true))
            }
            ("list", _) => self.list(caller, query, whole),
            ("detail", Some(facts)) => json_text(body::activity(&facts, seed, self.grown(), true)),
            ("laps", Some(facts)) => json_text(body::laps(&facts, seed)),
            ("zones", Some(facts)) => json_text(body::zones(&facts)),
            ("streams", Some(facts)) if !facts.manual => streams(&facts, seed, query),
            ("streams", Some(_)) => error(404, "Record Not Found", "Activity", "id", "invalid"),
            _ => not_found(),
        };
        if let (Some(id), true) = (id, whole && response.status().is_success()) {
            self.shared.ledger().answered(route.endpoint, id);
        }
        response
    }

    fn find(&self, caller: &Caller, id: &str) -> Option<Facts> {
        let found = self.world().find(caller.person, id.parse().ok()?);
        found.filter(|facts| caller.sees(facts.visibility == Visibility::OnlyMe))
    }

    fn list(&self, caller: &Caller, query: &HashMap<String, String>, whole: bool) -> Response {
        let mut numbers = [None; 4];
        for (place, key) in ["before", "after", "page", "per_page"].into_iter().enumerate() {
            let Some(text) = query.get(key) else { continue };
            match text.parse::<i64>() {
                Ok(number) => numbers[place] = Some(number),
                Err(_) => return error(400, "Bad Request", "Application", key, "invalid"),
            }
        }
        let [before, after, page, per_page] = numbers;
        let now_ms = self.now_ms();
        if after.is_some_and(|after| after > now_ms / 1000) {
            return error(400, "Bad Request", "Application", "after", "future");
        }
        let page = page.unwrap_or(1).max(1).unsigned_abs();
        let per_page = per_page.unwrap_or(30).clamp(1, 200).unsigned_abs();
        let (skip, take) = self.slice(page, per_page, before.is_some());
        let rows: Vec<Facts> = {
            let world = self.world();
            let entries = world.between(caller.person, after.unwrap_or(i64::MIN), before.unwrap_or(i64::MAX));
            let seen = entries.iter().filter(|entry| caller.sees(entry.only_me));
            let chosen: Vec<u64> = if after.is_some() && before.is_none() {
                seen.skip(skip).take(take).map(|entry| entry.id).collect()
            } else {
                seen.rev().skip(skip).take(take).map(|entry| entry.id).collect()
            };
            chosen.into_iter().filter_map(|id| world.facts(caller.person, id)).collect()
        };
        let grown = self.grown();
        self.listings.fetch_add(1, Ordering::SeqCst);
        let seed = self.shared.options().seed;
        let mut text = String::with_capacity(rows.len() * 2000 + 2);
        text.push('[');
        for (place, facts) in rows.iter().enumerate() {
            if place > 0 {
                text.push(',');
            }
            text.push_str(&body::activity(facts, seed, grown, false));
        }
        text.push(']');
        let athlete = self.world().athletes().nth(caller.person).unwrap_or_default();
        let call = ListCall { at_ms: now_ms, athlete, before, after, page, per_page, rows: rows.len(), whole };
        self.shared.ledger().list(call);
        json_text(text)
    }

    /// Rows to skip and to answer: every other page may be short, none may be lost.
    fn slice(&self, page: u64, per_page: u64, bounded: bool) -> (usize, usize) {
        let missing = if self.shared.options().short_pages { 3.min(per_page / 2) } else { 0 };
        // With an upper bound the first page is a short one, for clients that only ever ask for that.
        let short_before = |page: u64| if bounded { page.div_ceil(2) } else { page / 2 };
        let rows_before = |page: u64| page * per_page - short_before(page) * missing;
        let skip = rows_before(page - 1);
        (skip as usize, (rows_before(page) - skip) as usize)
    }

    fn client(&self, id: &str, secret: &str) -> bool {
        self.shared.options().clients.iter().any(|client| client.id == id && client.secret == secret)
    }
}

/// Which call of the API a path is.
struct Route<'a> {
    endpoint: &'static str,
    id: &'a str,
}

fn route(path: &str) -> Route<'_> {
    let path = path.strip_prefix("/api/v3").unwrap_or(path);
    let mut pieces = [""; 4];
    for (place, piece) in path.trim_matches('/').splitn(4, '/').enumerate() {
        pieces[place] = piece;
    }
    let (endpoint, id) = match pieces {
        ["athlete", "", "", ""] => ("athlete", ""),
        ["athlete", "activities", "", ""] => ("list", ""),
        ["athlete", "zones", "", ""] => ("athlete_zones", ""),
        ["activities", id, "", ""] => ("detail", id),
        ["activities", id, "streams", ""] => ("streams", id),
        ["activities", id, "zones", ""] => ("zones", id),
        ["activities", id, "laps", ""] => ("laps", id),
        ["athletes", id, "stats", ""] => ("stats", id),
        ["gear", id, "", ""] => ("gear", id),
        _ => ("other", ""),
    };
    Route { endpoint, id }
}

async fn api(State(strava): State<Arc<Strava>>, method: Method, uri: Uri, headers: HeaderMap) -> Response {
    let mut route = route(uri.path());
    if method != Method::GET {
        route.endpoint = "other";
    }
    let bearer = bearer(&headers);
    let counted = strava.count(bearer);
    let query: HashMap<String, String> =
        form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes()).into_owned().collect();
    let exceeded = counted.and_then(|(_, exceeded)| exceeded);
    let mut response = strava
        .shared
        .pass(route.endpoint, refuse, |whole| {
            if let Some(field) = exceeded {
                strava.shared.ledger().over_quota += 1;
                return error(429, "Rate Limit Exceeded", "Application", field, "exceeded");
            }
            match strava.authorise(bearer) {
                Ok(caller) => strava.answer(&route, &caller, &query, whole),
                Err(refusal) => refusal.into_response(),
            }
        })
        .await;
    let bare = route.endpoint == "streams" && strava.shared.options().streams_without_headers;
    if let Some((usage, _)) = counted.filter(|_| !bare) {
        strava.add_usage(&mut response, &usage);
    }
    response
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    headers.get(header::AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer ")
}

fn json_text(text: String) -> Response {
    ([(header::CONTENT_TYPE, "application/json; charset=utf-8")], text).into_response()
}

/// The provider's one form of error.
struct Refusal {
    status: u16,
    message: &'static str,
    resource: &'static str,
    field: &'static str,
    code: &'static str,
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let Self { status, message, resource, field, code } = self;
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let errors = json!([{ "resource": resource, "field": field, "code": code }]);
        (status, Json(json!({ "message": message, "errors": errors }))).into_response()
    }
}

fn error(
    status: u16,
    message: &'static str,
    resource: &'static str,
    field: &'static str,
    code: &'static str,
) -> Response {
    Refusal { status, message, resource, field, code }.into_response()
}

fn not_found() -> Response {
    error(404, "Resource Not Found", "resource", "path", "invalid")
}

fn missing_scope(permission: &'static str) -> Response {
    error(401, "Authorization Error", "AccessToken", permission, "missing")
}

/// The provider's own bodies for faults.
fn refuse(hit: Hit) -> Response {
    match hit.kind {
        FaultKind::TooMany => error(429, "Rate Limit Exceeded", "Application", "rate limit", "exceeded"),
        FaultKind::NotFound => not_found(),
        FaultKind::Inactive => error(403, "Forbidden", "Application", "Status", "Inactive"),
        FaultKind::BadGateway => {
            let page = "<!DOCTYPE html><html><head><title>Strava is temporarily unavailable</title></head></html>";
            (StatusCode::BAD_GATEWAY, Html(page)).into_response()
        }
        FaultKind::Unavailable => StatusCode::SERVICE_UNAVAILABLE.into_response(),
        _ => (StatusCode::INTERNAL_SERVER_ERROR, Json(json!({ "message": "error" }))).into_response(),
    }
}

fn streams(facts: &Facts, seed: u64, query: &HashMap<String, String>) -> Response {
    let text = |key: &str| query.get(key).map_or("", String::as_str);
    let (resolution, at_most) = match text("resolution") {
        "" | "high" => ("high", None),
        "medium" => ("medium", Some(1000)),
        "low" => ("low", Some(100)),
        _ => return error(400, "Bad Request", "Stream", "resolution", "invalid"),
    };
    let wanted = body::Wanted {
        keys: text("keys").split(',').collect(),
        by_key: text("key_by_type") == "true",
        at_most,
        resolution,
        series_type: if text("series_type") == "time" { "time" } else { "distance" },
    };
    json_text(body::streams(facts, seed, &wanted))
}

// Consent and tokens.

#[derive(Deserialize)]
struct Authorize {
    #[serde(default)]
    client_id: String,
    #[serde(default)]
    redirect_uri: String,
    #[serde(default)]
    response_type: String,
    #[serde(default)]
    scope: String,
    state: Option<String>,
    code_challenge: Option<String>,
    #[serde(default)]
    code_challenge_method: String,
    /// Not the provider's: who consents, with `auto_approve`; an id, or a number counted from 0.
    #[serde(default)]
    athlete: u64,
}

async fn show_consent(State(strava): State<Arc<Strava>>, Query(asked): Query<Authorize>) -> Response {
    let options = strava.shared.options();
    if !options.clients.iter().any(|client| client.id == asked.client_id) {
        return error(400, "Bad Request", "Application", "client_id", "invalid");
    }
    if Url::parse(&asked.redirect_uri).is_err() {
        return error(400, "Bad Request", "Application", "redirect_uri", "invalid");
    }
    if asked.response_type != "code" {
        return error(400, "Bad Request", "Authorize", "response_type", "invalid");
    }
    // Not the provider's: for clients that have to be able to.
    let proves = asked.code_challenge.is_some() && asked.code_challenge_method == "S256";
    if (options.require_pkce || asked.code_challenge.is_some()) && !proves {
        return error(400, "Bad Request", "Authorize", "code_challenge", "invalid");
    }
    let scopes: Vec<&str> = asked.scope.split([',', ' ']).collect();
    if scopes.iter().any(|scope| !SCOPES.contains(scope)) {
        return error(400, "Bad Request", "Authorize", "scope", "invalid");
    }
    let granted: Vec<String> = scopes
        .iter()
        .filter(|scope| !options.unticked_scopes.iter().any(|unticked| unticked == *scope))
        .map(|scope| (*scope).to_owned())
        .collect();
    if options.auto_approve {
        let person = strava.world().person(asked.athlete).filter(|_| !options.refuse_consent);
        let back = Back {
            client: &asked.client_id,
            address: &asked.redirect_uri,
            state: asked.state.as_deref(),
            challenge: asked.code_challenge.as_deref(),
        };
        return go_back(&strava, &back, person, &granted);
    }
    Html(consent_page(&strava, &asked, &scopes, &granted)).into_response()
}

fn consent_page(strava: &Strava, asked: &Authorize, scopes: &[&str], ticked: &[String]) -> String {
    let hidden =
        |name: &str, value: &str| format!("<input type=\"hidden\" name=\"{name}\" value=\"{}\">", escape(value));
    let people: String = strava.world().athletes().map(|id| format!("<option value=\"{id}\">{id}</option>")).collect();
    let boxes: String = scopes
        .iter()
        .map(|scope| {
            let checked = if ticked.iter().any(|ticked| ticked == scope) { " checked" } else { "" };
            format!("<p><label><input type=\"checkbox\" name=\"scope\" value=\"{scope}\"{checked}> {scope}</label></p>")
        })
        .collect();
    let kept = [("state", &asked.state), ("code_challenge", &asked.code_challenge)];
    let state: String = kept.iter().filter_map(|(name, text)| Some(hidden(name, text.as_deref()?))).collect();
    format!(
        "<!DOCTYPE html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>Authorize (simulator)</title></head><body>\
         <h1>Strava simulator</h1><form method=\"post\" action=\"/oauth/authorize\">{}{}{state}\
         <p><label>Athlete <select name=\"athlete\">{people}</select></label></p>{boxes}\
         <button name=\"answer\" value=\"allow\">Allow</button> <button name=\"answer\" value=\"cancel\">Cancel</button>\
         </form></body></html>",
        hidden("client_id", &asked.client_id),
        hidden("redirect_uri", &asked.redirect_uri),
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('"', "&quot;").replace('<', "&lt;").replace('>', "&gt;")
}

async fn answer_consent(State(strava): State<Arc<Strava>>, form: Bytes) -> Response {
    let pairs: Vec<(String, String)> = form_urlencoded::parse(&form).into_owned().collect();
    let field = |name: &str| pairs.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
    let granted: Vec<String> = pairs.iter().filter(|(key, _)| key == "scope").map(|(_, scope)| scope.clone()).collect();
    let athlete = field("athlete").and_then(|id| id.parse().ok()).unwrap_or(0);
    let person = strava.world().person(athlete).filter(|_| field("answer") == Some("allow"));
    let back = Back {
        client: field("client_id").unwrap_or_default(),
        address: field("redirect_uri").unwrap_or_default(),
        state: field("state"),
        challenge: field("code_challenge"),
    };
    go_back(&strava, &back, person, &granted)
}

/// Where a browser goes back to, and what it takes along.
struct Back<'a> {
    client: &'a str,
    address: &'a str,
    state: Option<&'a str>,
    challenge: Option<&'a str>,
}

/// Sends the browser back, with a code or with the refusal.
fn go_back(strava: &Strava, to: &Back<'_>, person: Option<usize>, granted: &[String]) -> Response {
    let Ok(mut back) = Url::parse(to.address) else {
        return error(400, "Bad Request", "Application", "redirect_uri", "invalid");
    };
    {
        let mut query = back.query_pairs_mut();
        if let Some(state) = to.state {
            query.append_pair("state", state);
        }
        match person {
            Some(person) => {
                let scopes = granted.iter().cloned().collect();
                let code = strava.code(&mut strava.auth(), to.client, person, scopes, to.challenge);
                query.append_pair("code", &code).append_pair("scope", &granted.join(","));
            }
            None => {
                query.append_pair("error", "access_denied");
            }
        }
    }
    (StatusCode::FOUND, [(header::LOCATION, back.to_string())]).into_response()
}

/// Form fields, wherever they were sent.
fn fields(query: Option<&str>, body: &[u8]) -> HashMap<String, String> {
    let from_query = form_urlencoded::parse(query.unwrap_or_default().as_bytes()).into_owned();
    from_query.chain(form_urlencoded::parse(body).into_owned()).collect()
}

async fn token(State(strava): State<Arc<Strava>>, RawQuery(query): RawQuery, body: Bytes) -> Response {
    let fields = fields(query.as_deref(), &body);
    strava.shared.pass("token", refuse, |_| take_token(&strava, &fields)).await
}

fn take_token(strava: &Strava, fields: &HashMap<String, String>) -> Response {
    let field = |name: &str| fields.get(name).map_or("", String::as_str);
    let client = field("client_id");
    if !strava.client(client, field("client_secret")) {
        return error(400, "Bad Request", "Application", "client_id", "invalid");
    }
    let rotate = strava.shared.options().rotate;
    let mut auth = strava.auth();
    match field("grant_type") {
        "authorization_code" => {
            let (now, settles) = (strava.now_ms(), strava.shared.options().code_settles_ms);
            let fresh = auth.codes.get(field("code")).is_some_and(|code| now - code.made_ms < settles);
            let code = if fresh { None } else { auth.codes.remove(field("code")) };
            let good = code.filter(|code| code.client == client && code.made_ms + CODE_LIFE_MS > now);
            auth.verifiers.extend(fields.get("code_verifier").cloned());
            let good = good.filter(|code| proves(code.challenge.as_deref(), field("code_verifier")));
            let Some(code) = good else {
                return error(400, "Bad Request", "AuthorizationCode", "code", "invalid");
            };
            let grant = strava.grant(&mut auth, client, code.person, code.scopes);
            let mut tokens = strava.tokens(&mut auth, grant, rotate);
            strava.shared.ledger().tokens.exchanges += 1;
            let id = strava.world().athletes().nth(code.person).unwrap_or_default();
            let athlete = body::athlete(id, code.person, strava.grown(), false);
            tokens.insert("athlete".into(), serde_json::from_str(&athlete).unwrap_or_default());
            Json(tokens).into_response()
        }
        "refresh_token" => {
            strava.shared.ledger().tokens.refresh_attempts += 1;
            let token = field("refresh_token");
            let grant = auth.refresh.get(token).copied().filter(|grant| {
                let grant = &auth.grants[*grant];
                grant.alive && grant.refresh == token && grant.client == client
            });
            match grant {
                Some(grant) => Json(strava.tokens(&mut auth, grant, rotate)).into_response(),
                None => {
                    strava.shared.ledger().tokens.refresh_refused += 1;
                    error(400, "Bad Request", "RefreshToken", "refresh_token", "invalid")
                }
            }
        }
        _ => error(400, "Bad Request", "Authorize", "grant_type", "invalid"),
    }
}

async fn deauthorize(State(strava): State<Arc<Strava>>, headers: HeaderMap, body: Bytes) -> Response {
    let fields = fields(None, &body);
    let token = bearer(&headers).or_else(|| fields.get("access_token").map(String::as_str)).map(str::to_owned);
    strava
        .shared
        .pass("deauthorize", refuse, |_| {
            if let Err(refusal) = strava.authorise(token.as_deref()) {
                return refusal.into_response();
            }
            let mut auth = strava.auth();
            let grant = token.as_deref().and_then(|token| auth.access.get(token)).map(|access| access.grant);
            if let Some(grant) = grant {
                strava.end(&mut auth, grant);
                let (person, client) = (auth.grants[grant].person, auth.grants[grant].client.clone());
                drop(auth);
                tell_end(&strava, person, &client);
            }
            Json(json!({ "access_token": token })).into_response()
        })
        .await
}

async fn revoke(State(strava): State<Arc<Strava>>, headers: HeaderMap, body: Bytes) -> Response {
    let fields = fields(None, &body);
    strava
        .shared
        .pass("revoke", refuse, |_| {
            let Some(client) = basic(&headers).filter(|(id, secret)| strava.client(id, secret)).map(|(id, _)| id)
            else {
                return error(401, "Authorization Error", "Application", "client_id", "invalid");
            };
            let token = fields.get("token").map_or("", String::as_str);
            let mut auth = strava.auth();
            let by_access = auth.access.get(token).map(|access| access.grant);
            let grant = by_access.or_else(|| auth.refresh.get(token).copied());
            if let Some(grant) = grant.filter(|grant| auth.grants[*grant].client == client) {
                strava.end(&mut auth, grant);
            }
            // As RFC 7009 has it: an unknown token is as good as revoked.
            Json(json!({})).into_response()
        })
        .await
}

fn basic(headers: &HeaderMap) -> Option<(String, String)> {
    let encoded = headers.get(header::AUTHORIZATION)?.to_str().ok()?.strip_prefix("Basic ")?;
    let decoded = String::from_utf8(base64::engine::general_purpose::STANDARD.decode(encoded).ok()?).ok()?;
    let (id, secret) = decoded.split_once(':')?;
    Some((id.to_owned(), secret.to_owned()))
}

// What tests drive.

/// The body as an object, and whose world it speaks of (`athlete`: an id, or a number counted from 0).
fn asked(strava: &Strava, body: &Bytes) -> Result<(Map<String, Value>, usize), Refused> {
    let mut fields: Map<String, Value> = if body.is_empty() {
        Map::new()
    } else {
        serde_json::from_slice(body).map_err(|error| refused(format!("not a JSON object: {error}")))?
    };
    let athlete = fields.remove("athlete").unwrap_or(json!(0));
    let person = athlete.as_u64().and_then(|athlete| strava.world().person(athlete));
    Ok((fields, person.ok_or_else(|| refused(format!("no athlete {athlete}")))?))
}

fn taken_id(fields: &mut Map<String, Value>) -> Result<u64, Refused> {
    let id = fields.remove("id").unwrap_or_default();
    let text = id.as_str().and_then(|id| id.parse().ok());
    id.as_u64().or(text).ok_or_else(|| refused("`id` must be the id of an activity"))
}

/// `{athlete, id, …fields}`: `name`, `distance`, `elapsed_time`, `start_date`, `visibility`, or any field at all.
async fn edit_activity(State(strava): State<Arc<Strava>>, body: Bytes) -> Result<Response, Refused> {
    let (mut fields, person) = asked(&strava, &body)?;
    let id = taken_id(&mut fields)?;
    let now = strava.now_ms();
    let announced = push::announced(&fields);
    let edited = strava.world().edit(person, id, fields, now);
    if let Some(updates) = announced.filter(|_| edited) {
        push::tell(&strava, person, ("activity", id, "update"), &updates, None);
    }
    done(edited, id)
}

/// `{athlete, id}`
async fn delete_activity(State(strava): State<Arc<Strava>>, body: Bytes) -> Result<Response, Refused> {
    let (mut fields, person) = asked(&strava, &body)?;
    let id = taken_id(&mut fields)?;
    let now = strava.now_ms();
    let deleted = strava.world().delete(person, id, now);
    if deleted {
        push::tell(&strava, person, ("activity", id, "delete"), &Map::new(), None);
    }
    done(deleted, id)
}

fn done(found: bool, id: u64) -> Result<Response, Refused> {
    if found { Ok(Json(json!({ "id": id })).into_response()) } else { Err(refused(format!("no activity {id}"))) }
}

/// `{athlete, start, count, spacing_seconds, id, …fields}`: `start` as RFC 3339 or epoch seconds, now if left out; `id`
/// only for a single one.
async fn upload_activities(State(strava): State<Arc<Strava>>, body: Bytes) -> Result<Response, Refused> {
    let (mut fields, person) = asked(&strava, &body)?;
    let now = strava.now_ms();
    let start = match fields.remove("start").or_else(|| fields.remove("start_date")) {
        Some(start) => world::instant(&start).ok_or_else(|| refused("`start` is no instant"))?,
        None => now / 1000,
    };
    let count = fields.remove("count").and_then(|count| count.as_i64()).unwrap_or(1);
    let spacing = fields.remove("spacing_seconds").and_then(|spacing| spacing.as_i64()).unwrap_or(60);
    let id = if fields.contains_key("id") { Some(taken_id(&mut fields)?) } else { None };
    if id.is_some_and(|id| count != 1 || strava.world().find(person, id).is_some()) {
        return Err(refused("`id` is for one new activity"));
    }
    let mut world = strava.world();
    let ids: Vec<u64> = (0..count)
        .map(|n| {
            let mut fields = fields.clone();
            fields.insert("start".into(), json!(start + n * spacing));
            world.upload(person, id, fields, now)
        })
        .collect();
    drop(world);
    for id in &ids {
        push::tell(&strava, person, ("activity", *id, "create"), &Map::new(), None);
    }
    Ok(Json(json!({ "id": ids.first(), "ids": ids })).into_response())
}

/// `{athlete, client_id, scopes, code: true}`: a consent without a browser. Answers `refresh_token`, or a `code`.
async fn make_grant(State(strava): State<Arc<Strava>>, body: Bytes) -> Result<Response, Refused> {
    let (mut fields, person) = asked(&strava, &body)?;
    let options = strava.shared.options();
    let client = match fields.remove("client_id") {
        Some(Value::String(client)) => client,
        _ => options.clients.first().map(|client| client.id.clone()).unwrap_or_default(),
    };
    if !options.clients.iter().any(|known| known.id == client) {
        return Err(refused(format!("no client {client}")));
    }
    let scopes: BTreeSet<String> = match fields.remove("scopes") {
        Some(Value::Array(scopes)) => scopes.iter().filter_map(|scope| scope.as_str().map(str::to_owned)).collect(),
        _ => SCOPES.iter().map(|scope| (*scope).to_owned()).collect(),
    };
    let athlete = strava.world().athletes().nth(person);
    let mut auth = strava.auth();
    if fields.remove("code") == Some(json!(true)) {
        let code = strava.code(&mut auth, &client, person, scopes, None);
        return Ok(Json(json!({ "athlete": athlete, "code": code })).into_response());
    }
    let grant = strava.grant(&mut auth, &client, person, scopes);
    Ok(Json(json!({ "athlete": athlete, "refresh_token": auth.grants[grant].refresh })).into_response())
}

/// `{athlete}` ends all grants of a person; with `access_only: true` only their access tokens.
async fn end_grant(State(strava): State<Arc<Strava>>, body: Bytes) -> Result<Response, Refused> {
    let (mut fields, person) = asked(&strava, &body)?;
    let access_only = fields.remove("access_only") == Some(json!(true));
    let now = strava.now_ms();
    let mut auth = strava.auth();
    let mine: Vec<usize> = (0..auth.grants.len()).filter(|grant| auth.grants[*grant].person == person).collect();
    if access_only {
        for access in auth.access.values_mut().filter(|access| mine.contains(&access.grant)) {
            access.expires_ms = access.expires_ms.min(now);
        }
    } else {
        for grant in &mine {
            strava.end(&mut auth, *grant);
        }
    }
    let clients: BTreeSet<String> = mine.iter().map(|grant| auth.grants[*grant].client.clone()).collect();
    drop(auth);
    if !access_only {
        clients.iter().for_each(|client| tell_end(&strava, person, client));
    }
    Ok(Json(json!({ "grants": mine.len() })).into_response())
}

/// Everything that must not be found anywhere else.
async fn show_secrets(State(strava): State<Arc<Strava>>) -> Json<Value> {
    let auth = strava.auth();
    Json(json!({
        "access": auth.access.keys().collect::<Vec<_>>(),
        "refresh": auth.refresh.keys().collect::<Vec<_>>(),
        "codes": auth.spent,
        "verifiers": auth.verifiers,
    }))
}

/// The application hears that it was shut out.
fn tell_end(strava: &Arc<Strava>, person: usize, client: &str) {
    let updates = Map::from_iter([("authorized".to_owned(), json!("false"))]);
    let athlete = strava.world().athletes().nth(person).unwrap_or_default();
    push::tell(strava, person, ("athlete", athlete, "update"), &updates, Some(client));
}

#[derive(Deserialize)]
struct Truth {
    #[serde(default)]
    athlete: u64,
    /// With what decides an activity's answers, as a list row.
    #[serde(default)]
    full: bool,
}

/// `?athlete=`: every activity there ever was, newest first, deleted ones too; instants in epoch milliseconds.
async fn show_truth(State(strava): State<Arc<Strava>>, Query(asked): Query<Truth>) -> Result<Response, Refused> {
    let world = strava.world();
    let person = world.person(asked.athlete).ok_or_else(|| refused("no such athlete"))?;
    let epoch_ms = strava.shared.epoch().timestamp_millis();
    let rows: Vec<Value> = world
        .truth(person)
        .into_iter()
        .map(|(entry, change)| {
            let mut row = json!({
                "id": entry.id,
                "start_ms": entry.start * 1000,
                "start": DateTime::from_timestamp(entry.start, 0),
                "manual": entry.manual,
                "only_me": entry.only_me,
                "listable_at_ms": change.and_then(|change| change.listable_at).unwrap_or(epoch_ms),
                "changed_at_ms": change.and_then(|change| change.changed_at),
                "deleted_at_ms": change.and_then(|change| change.deleted.as_ref()).map(|(at, _)| at),
            });
            if asked.full
                && let Some(facts) = world.facts(person, entry.id)
            {
                let summary = body::activity(&facts, strava.shared.options().seed, strava.grown(), false);
                row["summary"] = serde_json::from_str(&summary).unwrap_or_default();
            }
            row
        })
        .collect();
    let athletes: Vec<u64> = world.athletes().collect();
    Ok(Json(json!({ "athlete": athletes[person], "athletes": athletes, "activities": rows })).into_response())
}
