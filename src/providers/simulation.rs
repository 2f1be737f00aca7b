//! What every provider's `simulator.rs` shares: options, repeatable chance, faults, and the ledger that tests hold
//! their results against.
//!
//! It lives in this room and not in `simulator/`, because a provider may not name a room above its own.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{DateTime, Utc};
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::clock::Clock;

/// How the simulated providers behave. The default is a small, friendly, complete world.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Port on 127.0.0.1; 0 takes a free one.
    pub port: u16,
    /// The same seed, epoch and calls give the same bytes.
    pub seed: u64,
    /// The instant the world was made at: the newest activity is just before it. None: the clock's now.
    pub epoch: Option<DateTime<Utc>>,
    /// People with an account at the provider.
    pub athletes: u32,
    /// Activities of each, about one a day backwards from the epoch.
    pub activities: u32,
    /// Points of each stream; 0 varies between 300 and 7200.
    pub stream_points: u32,
    /// Share of activities entered by hand (no streams), 0 to 1.
    pub manual_share: f64,
    /// Share of activities only their owner may see, 0 to 1.
    pub private_share: f64,
    /// Rows that break careless clients: unknown sports, hidden starts, odd zones, zero lengths, missing keys.
    pub awkward: bool,
    /// One ride of 13 days with 45 000 points for each athlete.
    pub very_long: bool,
    /// Every other page is up to 3 rows short without being the last.
    pub short_pages: bool,
    /// Kudos, followers and gear distances grow with the number of calls.
    pub volatile: bool,
    /// Whether calls are counted and refused.
    pub quota: bool,
    /// Calls allowed: overall a quarter hour, overall a day, reads a quarter hour, reads a day.
    pub limits: [u64; 4],
    /// Streams answer without quota headers, as some recorded ones did.
    pub streams_without_headers: bool,
    /// Life of an access token, seconds.
    pub token_life_seconds: i64,
    /// Every refresh answers a new refresh token and the old one is dead at once.
    pub rotate: bool,
    /// An access token dies after so many calls.
    pub expire_after_calls: Option<u64>,
    /// Applications known to the provider.
    pub clients: Vec<Client>,
    /// The consent page answers itself.
    pub auto_approve: bool,
    /// The person presses Cancel (with `auto_approve`).
    pub refuse_consent: bool,
    /// Scopes that the person unticks.
    pub unticked_scopes: Vec<String>,
    /// A visit without a PKCE challenge (S256) is refused, and a code without its verifier. One that comes is always
    /// checked.
    pub require_pkce: bool,
    /// A code is refused for so many milliseconds after it was made.
    pub code_settles_ms: i64,
    /// Events carry a signature.
    pub sign_events: bool,
    /// Share of events that are sent twice, 0 to 1.
    pub duplicate_events: f64,
    /// Share of events that are held back a little, so that later ones overtake them, 0 to 1.
    pub late_events: f64,
    /// Between two tries of one event, milliseconds of real time.
    pub event_retry_ms: u64,
    /// What goes wrong.
    pub faults: Vec<Fault>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            port: 0,
            seed: 1,
            epoch: None,
            athletes: 2,
            activities: 400,
            stream_points: 0,
            manual_share: 0.05,
            private_share: 0.05,
            awkward: true,
            very_long: false,
            short_pages: false,
            volatile: true,
            quota: false,
            limits: [200, 2000, 100, 1000],
            streams_without_headers: false,
            token_life_seconds: 21_600,
            rotate: false,
            expire_after_calls: None,
            clients: vec![Client { id: "90417".into(), secret: "simulated-secret".into() }],
            auto_approve: false,
            refuse_consent: false,
            unticked_scopes: Vec::new(),
            require_pkce: false,
            code_settles_ms: 0,
            sign_events: false,
            duplicate_events: 0.0,
            late_events: 0.0,
            event_retry_ms: 1000,
            faults: Vec::new(),
        }
    }
}

/// An application registered at the provider.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Client {
    /// Public id.
    pub id: String,
    /// Its secret.
    pub secret: String,
}

/// Repeatable chance: the same parts give the same numbers, on every machine.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// Numbers that depend on all parts.
    #[must_use]
    pub fn of(parts: &[u64]) -> Self {
        let mut rng = Self(0x9e37_79b9_7f4a_7c15);
        for part in parts {
            rng.0 ^= *part;
            rng.0 = rng.next();
        }
        rng
    }

    /// The next number (splitmix64).
    #[expect(clippy::should_implement_trait, reason = "an endless source is no iterator to anybody here")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A whole number in 0..n; 0 when n is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        if n == 0 { 0 } else { self.next() % n }
    }

    /// A number in [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// A number in [low, high).
    pub fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.unit()
    }

    /// Whether a thing of this share (0 to 1) happens.
    pub fn chance(&mut self, share: f64) -> bool {
        self.unit() < share
    }

    /// So many lower-case hex characters.
    pub fn hex(&mut self, length: usize) -> String {
        let mut text = String::with_capacity(length + 16);
        while text.len() < length {
            text.push_str(&format!("{:016x}", self.next()));
        }
        text.truncate(length);
        text
    }
}

/// What can go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultKind {
    /// 429 without `Retry-After`; with a value, that many seconds in `Retry-After`.
    #[serde(rename = "429")]
    TooMany,
    /// 404 for something that was listed.
    #[serde(rename = "404")]
    NotFound,
    /// 500 with a JSON body.
    #[serde(rename = "500")]
    Internal,
    /// 502 with an HTML page.
    #[serde(rename = "502")]
    BadGateway,
    /// 503 with an empty body; with a value, that many seconds in `Retry-After`.
    #[serde(rename = "503")]
    Unavailable,
    /// The application was switched off: 403.
    Inactive,
    /// The answer waits; value in milliseconds, 2000 by default. Real time, also with a mock clock.
    Slow,
    /// The connection breaks in the middle of the body, after the work was done.
    Cut,
    /// A whole body that is no JSON.
    BrokenJson,
    /// A body of so many MiB (value, 70 by default), sent in pieces.
    Huge,
    /// The `Date` header is off by so many seconds (value, 300 by default).
    Skew,
}

const FAULT_KINDS: [(&str, FaultKind); 11] = [
    ("429", FaultKind::TooMany),
    ("404", FaultKind::NotFound),
    ("500", FaultKind::Internal),
    ("502", FaultKind::BadGateway),
    ("503", FaultKind::Unavailable),
    ("inactive", FaultKind::Inactive),
    ("slow", FaultKind::Slow),
    ("cut", FaultKind::Cut),
    ("broken-json", FaultKind::BrokenJson),
    ("huge", FaultKind::Huge),
    ("skew", FaultKind::Skew),
];

impl FaultKind {
    /// The word used in options.
    #[must_use]
    pub fn name(self) -> &'static str {
        FAULT_KINDS.iter().find(|(_, kind)| *kind == self).map_or("", |(name, _)| name)
    }
}

/// One thing that goes wrong, and how often. As text `name[@endpoint]=rule[:value][*times]`, for example `429=0.02`,
/// `503=1/50`, `slow=0.1:1500`, `cut@streams=1/3`, `500@token=1*2`, `skew=1:-300`.
#[derive(Clone, Debug, PartialEq)]
pub struct Fault {
    /// What.
    pub kind: FaultKind,
    /// Where only; None: every call of the API, but not the token endpoint, which must be named (`token`).
    pub endpoint: Option<String>,
    /// How often.
    pub rule: Rule,
    /// What it needs besides: seconds, milliseconds or MiB; see [`FaultKind`].
    pub value: Option<i64>,
    /// Ends after so many times.
    pub times: Option<u64>,
}

/// How often a fault happens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// With this probability, drawn from the seed.
    Share(f64),
    /// At every n-th call.
    Every(u64),
}

/// Reads `name[@endpoint]=rule[:value][*times]`.
///
/// # Errors
/// What is wrong with the text, in words.
pub fn parse_fault(text: &str) -> Result<Fault, String> {
    let form = "name[@endpoint]=share or 1/n, then :value and *times if wanted; for example 429=0.02 or cut@list=1/3*2";
    let (head, rest) = text.split_once('=').ok_or_else(|| format!("fault `{text}` has no `=`; write {form}"))?;
    let (name, endpoint) = match head.trim().split_once('@') {
        Some((name, endpoint)) => (name, Some(endpoint.to_owned())),
        None => (head.trim(), None),
    };
    let kind = FAULT_KINDS.iter().find(|(known, _)| *known == name).map(|(_, kind)| *kind).ok_or_else(|| {
        let known: Vec<&str> = FAULT_KINDS.iter().map(|(known, _)| *known).collect();
        format!("no fault is called `{name}`; known are {}", known.join(", "))
    })?;
    let (rest, times) = match rest.split_once('*') {
        Some((rest, times)) => (rest, Some(number::<u64>(text, "times", times)?)),
        None => (rest, None),
    };
    let (rule, value) = match rest.split_once(':') {
        Some((rule, value)) => (rule, Some(number::<i64>(text, "value", value)?)),
        None => (rest, None),
    };
    let rule = match rule.trim().strip_prefix("1/") {
        Some(n) => match number::<u64>(text, "n of 1/n", n)? {
            0 => return Err(format!("fault `{text}`: 1/0 is never; leave it out instead")),
            n => Rule::Every(n),
        },
        None => Rule::Share(number::<f64>(text, "share", rule)?),
    };
    match rule {
        Rule::Share(share) if !(0.0..=1.0).contains(&share) => {
            Err(format!("fault `{text}`: a share lies between 0 and 1"))
        }
        _ => Ok(Fault { kind, endpoint, rule, value, times }),
    }
}

fn number<T: FromStr>(text: &str, what: &str, digits: &str) -> Result<T, String> {
    digits.trim().parse().map_err(|_| format!("fault `{text}`: {what} `{}` is no number", digits.trim()))
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        parse_fault(text)
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.kind.name())?;
        if let Some(endpoint) = &self.endpoint {
            write!(f, "@{endpoint}")?;
        }
        match self.rule {
            Rule::Share(share) => write!(f, "={share}")?,
            Rule::Every(n) => write!(f, "=1/{n}")?,
        }
        if let Some(value) = self.value {
            write!(f, ":{value}")?;
        }
        if let Some(times) = self.times {
            write!(f, "*{times}")?;
        }
        Ok(())
    }
}

impl Serialize for Fault {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Fault {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        parse_fault(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// A fault that happens to this call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    /// What.
    pub kind: FaultKind,
    /// See [`Fault::value`].
    pub value: Option<i64>,
}

struct Armed {
    fault: Fault,
    seen: u64,
    hits: u64,
}

/// A list call, as the ledger keeps it.
#[derive(Clone, Debug, Serialize)]
pub struct ListCall {
    /// When, milliseconds since 1970.
    pub at_ms: i64,
    /// Whose list.
    pub athlete: u64,
    /// Upper bound as sent, epoch seconds, outside.
    pub before: Option<i64>,
    /// Lower bound as sent, epoch seconds, outside.
    pub after: Option<i64>,
    /// Page, from 1.
    pub page: u64,
    /// Page size after clamping.
    pub per_page: u64,
    /// Rows answered.
    pub rows: usize,
    /// Whether the answer left unharmed: a cut or broken one told the caller nothing.
    pub whole: bool,
}

/// What happened to tokens.
#[derive(Clone, Debug, Default, Serialize)]
pub struct TokenLedger {
    /// Codes given out.
    pub codes: u64,
    /// Codes taken for tokens.
    pub exchanges: u64,
    /// New access tokens made.
    pub issued: u64,
    /// Refresh calls with a known client.
    pub refresh_attempts: u64,
    /// Refresh calls with a dead or unknown token.
    pub refresh_refused: u64,
    /// API calls with an expired, revoked or unknown token.
    pub dead_calls: u64,
    /// Those of them whose whole grant had been revoked.
    pub revoked_calls: u64,
    /// Grants that were revoked.
    pub revoked: u64,
}

/// What happened to events.
#[derive(Clone, Debug, Default, Serialize)]
pub struct EventLedger {
    /// On their way.
    pub due: u64,
    /// Calls made, repeated ones included.
    pub sent: u64,
    /// Answered in time with 200.
    pub acknowledged: u64,
    /// Given up after the last try.
    pub given_up: u64,
}

/// What the provider did and was asked: the oracle of tests.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Ledger {
    /// Calls by endpoint, refused ones included.
    pub calls: BTreeMap<&'static str, u64>,
    /// Answers by endpoint and status; a cut answer counts with the status it began with.
    pub answers: BTreeMap<&'static str, BTreeMap<u16, u64>>,
    /// Good answers by endpoint and id, broken and cut ones left out.
    pub by_id: BTreeMap<&'static str, BTreeMap<u64, u64>>,
    /// List calls that were answered, oldest first; the last 100 000.
    pub lists: Vec<ListCall>,
    /// Tokens.
    pub tokens: TokenLedger,
    /// Events.
    pub events: EventLedger,
    /// Faults that happened.
    pub faults: BTreeMap<&'static str, u64>,
    /// Calls refused by the quota (not by the fault 429).
    pub over_quota: u64,
}

impl Ledger {
    /// Keeps a list call.
    pub fn list(&mut self, call: ListCall) {
        if self.lists.len() >= 100_000 {
            self.lists.drain(..50_000);
        }
        self.lists.push(call);
    }

    /// Counts a good answer about one id.
    pub fn answered(&mut self, endpoint: &'static str, id: u64) {
        *self.by_id.entry(endpoint).or_default().entry(id).or_default() += 1;
    }
}

/// What the parts of one simulated provider share.
#[derive(Clone)]
pub struct Shared(Arc<Inner>);

struct Inner {
    options: Options,
    clock: Clock,
    epoch: DateTime<Utc>,
    armed: Mutex<Vec<Armed>>,
    ledger: Mutex<Ledger>,
}

impl Shared {
    /// A new world.
    #[must_use]
    pub fn new(options: Options, clock: Clock) -> Self {
        let epoch = options.epoch.unwrap_or_else(|| clock.now());
        let armed = Mutex::new(arm(options.faults.clone()));
        Self(Arc::new(Inner { options, clock, epoch, armed, ledger: Mutex::default() }))
    }

    /// As started.
    #[must_use]
    pub fn options(&self) -> &Options {
        &self.0.options
    }

    /// The time that tokens, quotas and headers go by.
    #[must_use]
    pub fn clock(&self) -> &Clock {
        &self.0.clock
    }

    /// When the world was made.
    #[must_use]
    pub fn epoch(&self) -> DateTime<Utc> {
        self.0.epoch
    }

    /// The ledger, locked: hold it briefly.
    pub fn ledger(&self) -> MutexGuard<'_, Ledger> {
        locked(&self.0.ledger)
    }

    /// Replaces all faults.
    pub fn set_faults(&self, faults: Vec<Fault>) {
        *locked(&self.0.armed) = arm(faults);
    }

    fn draw(&self, endpoint: &str) -> Vec<Hit> {
        let mut hits = Vec::new();
        for (place, armed) in locked(&self.0.armed).iter_mut().enumerate() {
            let here = match &armed.fault.endpoint {
                Some(only) => only == endpoint,
                None => endpoint != "token",
            };
            if !here || armed.fault.times.is_some_and(|times| armed.hits >= times) {
                continue;
            }
            armed.seen += 1;
            let hit = match armed.fault.rule {
                Rule::Every(n) => armed.seen % n == 0,
                Rule::Share(share) => Rng::of(&[self.0.options.seed, 0xfa17, place as u64, armed.seen]).chance(share),
            };
            if hit {
                armed.hits += 1;
                hits.push(Hit { kind: armed.fault.kind, value: armed.fault.value });
            }
        }
        hits
    }

    /// Answers one call: counts it, lets faults happen around the provider's own answer, and dates it by the clock.
    /// `refuse` gives the provider's own body for the faults that have one; a refused call does no work. `handle` is
    /// told whether its answer will leave unharmed.
    pub async fn pass(
        &self,
        endpoint: &'static str,
        refuse: fn(Hit) -> Response,
        handle: impl FnOnce(bool) -> Response,
    ) -> Response {
        let hits = self.draw(endpoint);
        {
            let mut ledger = self.ledger();
            *ledger.calls.entry(endpoint).or_default() += 1;
            for hit in &hits {
                *ledger.faults.entry(hit.kind.name()).or_default() += 1;
            }
        }
        for hit in &hits {
            if hit.kind == FaultKind::Slow {
                tokio::time::sleep(Duration::from_millis(hit.value.unwrap_or(2000).max(0).unsigned_abs())).await;
            }
        }
        let refused = hits.iter().find(|hit| {
            use FaultKind::{BadGateway, Inactive, Internal, NotFound, TooMany, Unavailable};
            matches!(hit.kind, TooMany | NotFound | Internal | BadGateway | Unavailable | Inactive)
        });
        let mut response = match refused {
            Some(hit) => {
                let mut response = refuse(*hit);
                if let (FaultKind::TooMany | FaultKind::Unavailable, Some(seconds)) = (hit.kind, hit.value) {
                    response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
                }
                response
            }
            None => {
                use FaultKind::{BrokenJson, Cut, Huge};
                handle(!hits.iter().any(|hit| matches!(hit.kind, Cut | BrokenJson | Huge)))
            }
        };
        let mut skew = 0;
        for hit in &hits {
            match hit.kind {
                FaultKind::Cut => response = cut(response).await,
                FaultKind::BrokenJson => response = broken(response).await,
                FaultKind::Huge => response = huge(hit.value.unwrap_or(70).max(1).unsigned_abs()),
                FaultKind::Skew => skew = hit.value.unwrap_or(300),
                _ => {}
            }
        }
        self.date(&mut response, skew);
        let status = response.status().as_u16();
        *self.ledger().answers.entry(endpoint).or_default().entry(status).or_default() += 1;
        response
    }

    /// Sets `Date` by the clock, off by so many seconds.
    fn date(&self, response: &mut Response, skew_s: i64) {
        let at = self.clock().now() + chrono::TimeDelta::seconds(skew_s);
        if let Ok(value) = HeaderValue::from_str(&at.format("%a, %d %b %Y %H:%M:%S GMT").to_string()) {
            response.headers_mut().insert(header::DATE, value);
        }
    }
}

fn arm(faults: Vec<Fault>) -> Vec<Armed> {
    faults.into_iter().map(|fault| Armed { fault, seen: 0, hits: 0 }).collect()
}

/// A lock that outlives a panic elsewhere: a test that fails must not fail the next one.
pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The parts and whole body of an answer we made ourselves.
async fn taken(response: Response) -> (axum::http::response::Parts, Bytes) {
    let (mut parts, body) = response.into_parts();
    parts.headers.remove(header::CONTENT_LENGTH);
    (parts, axum::body::to_bytes(body, usize::MAX).await.unwrap_or_default())
}

async fn cut(response: Response) -> Response {
    let (parts, body) = taken(response).await;
    let half = body.slice(..body.len() / 2);
    // The pause lets the first half leave before the connection is thrown away.
    let pieces = futures::stream::once(async move { Ok(half) }).chain(futures::stream::once(async {
        tokio::time::sleep(Duration::from_millis(5)).await;
        Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset))
    }));
    Response::from_parts(parts, Body::from_stream(pieces))
}

async fn broken(response: Response) -> Response {
    let (parts, body) = taken(response).await;
    Response::from_parts(parts, Body::from(body.slice(..body.len() / 2)))
}

fn huge(mib: u64) -> Response {
    let piece = Bytes::from(vec![b' '; 1 << 20]);
    let pieces = futures::stream::iter((0..mib).map(move |_| Ok::<_, Infallible>(piece.clone())));
    ([(header::CONTENT_TYPE, "application/json")], Body::from_stream(pieces)).into_response()
}

/// Whether a PKCE verifier is the one of a challenge (S256). Without a challenge no verifier is wanted.
#[must_use]
pub fn proves(challenge: Option<&str>, verifier: &str) -> bool {
    let Some(challenge) = challenge else { return verifier.is_empty() };
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    let shaped = (43..=128).contains(&verifier.len()) && verifier.bytes().all(allowed);
    shaped && URL_SAFE_NO_PAD.encode(Sha256::digest(verifier.as_bytes())) == challenge
}

/// Controls that are the same for every provider, below `/_simulator`.
pub fn controls(shared: &Shared) -> Router {
    Router::new()
        .route("/_simulator/ledger", get(show_ledger))
        .route("/_simulator/fault", post(set_faults))
        .route("/_simulator/clock", get(show_clock).post(move_clock))
        .with_state(shared.clone())
}

async fn show_ledger(State(shared): State<Shared>) -> Json<Value> {
    let ledger = shared.ledger().clone();
    Json(json!({
        "now": shared.clock().now(),
        "epoch": shared.epoch(),
        "ledger": serde_json::to_value(ledger).unwrap_or_default(),
    }))
}

#[derive(Deserialize)]
struct SetFaults {
    faults: Vec<Fault>,
}

/// `{"faults": ["429=1/3"]}` replaces all faults.
async fn set_faults(State(shared): State<Shared>, body: Bytes) -> Result<Json<Value>, Refused> {
    let wanted: SetFaults = serde_json::from_slice(&body).map_err(|error| refused(error.to_string()))?;
    let answer = json!({ "faults": wanted.faults });
    shared.set_faults(wanted.faults);
    Ok(Json(answer))
}

async fn show_clock(State(shared): State<Shared>) -> Json<Value> {
    Json(json!({ "now": shared.clock().now() }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MoveClock {
    set: Option<DateTime<Utc>>,
    advance_seconds: Option<i64>,
}

/// `{"set": "2026-05-03T05:12:44Z"}` or `{"advance_seconds": 900}`; only a mock clock moves.
async fn move_clock(State(shared): State<Shared>, body: Bytes) -> Result<Json<Value>, Refused> {
    let wanted: MoveClock = serde_json::from_slice(&body).map_err(|error| refused(error.to_string()))?;
    if matches!(shared.clock(), Clock::System(_)) {
        return Err(refused("the simulator runs on the machine's clock, which does not move"));
    }
    let from = wanted.set.unwrap_or_else(|| shared.clock().now());
    shared.clock().set(from + chrono::TimeDelta::seconds(wanted.advance_seconds.unwrap_or(0)));
    Ok(show_clock(State(shared)).await)
}

/// A control call that made no sense: 400 with these words.
#[derive(Debug)]
pub struct Refused(String);

/// Refuses a control call, in words.
pub fn refused(why: impl Into<String>) -> Refused {
    Refused(why.into())
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        (StatusCode::BAD_REQUEST, Json(json!({ "error": self.0 }))).into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_read_as_written() {
        for text in ["429=0.02", "503=1/50:30", "slow=0.1:1500", "cut@streams=1/3*2", "500@token=1*2", "skew=1:-300"] {
            let fault = parse_fault(text).unwrap();
            assert_eq!(fault.to_string(), text);
        }
        let fault = parse_fault("429@list=1/3:60*2").unwrap();
        assert_eq!(fault.endpoint.as_deref(), Some("list"));
        assert_eq!((fault.rule, fault.value, fault.times), (Rule::Every(3), Some(60), Some(2)));
    }

    #[test]
    fn bad_faults_are_refused_in_words() {
        assert!(parse_fault("429").unwrap_err().contains("no `=`"));
        assert!(parse_fault("418=0.1").unwrap_err().contains("no fault is called `418`; known are 429"));
        assert!(parse_fault("429=2").unwrap_err().contains("between 0 and 1"));
        assert!(parse_fault("429=often").unwrap_err().contains("share `often` is no number"));
        assert!(parse_fault("429=1/0").unwrap_err().contains("never"));
        assert!(parse_fault("slow=1:long").unwrap_err().contains("value `long` is no number"));
    }

    #[test]
    fn a_verifier_proves_its_challenge_alone() {
        // The pair of RFC 7636, appendix B.
        let (verifier, challenge) =
            ("dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk", "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM");
        assert!(proves(Some(challenge), verifier) && proves(None, ""));
        assert!(!proves(Some(challenge), "") && !proves(None, verifier) && !proves(Some(verifier), verifier));
        assert!(!proves(Some(challenge), &verifier.replace('d', "e")));
    }

    #[test]
    fn chance_is_the_same_everywhere_and_fair() {
        assert_eq!(Rng::of(&[1, 2]).next(), Rng::of(&[1, 2]).next());
        assert_ne!(Rng::of(&[1, 2]).next(), Rng::of(&[2, 1]).next());
        let mut rng = Rng::of(&[7]);
        let hits = (0..10_000).filter(|_| rng.chance(0.1)).count();
        assert!((900..1100).contains(&hits), "{hits}");
        assert_eq!(Rng::of(&[3]).hex(40).len(), 40);
    }
}
