//! Deliveries: kept before they are acknowledged, worked on from the journal, under the same claim as runs. What they say
//! becomes runs, in the transaction that ends the delivery; everything after that is the runs' own business.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use rand::RngCore as _;
use reqwest::header::HeaderMap;
use secrecy::SecretString;
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use super::accept::app;
use super::execute::CRASHES;
use super::{Engine, Error, ProviderSetup, failpoint, request_key, secret};
use crate::model::{Class, DeliveryId, NamedItem, RunSource, SyncRequest};
use crate::providers::oauth::App;
use crate::providers::webhook::{
    AppCalls, BadBody, Handshake, Inbound, Known, Lifecycle, Made, Notice, PENDING, Subscription, SubscriptionError,
    Subscriptions, Trust, WebhookSpec,
};
use crate::storage::{self, Act, DeliveryClaim, DeliveryEnd, NewDelivery, NewItem, NewRun, SubscriptionRow};
use crate::telemetry::{self, Received};

/// What is known of our subscriptions is looked at again after this time.
const FRESH: Duration = Duration::from_secs(60);
/// And whenever somebody cannot be believed by it, since another process may have subscribed just now; but not sooner
/// than this after the last look: a flood of forged calls is no flood of statements.
const APART: Duration = Duration::from_millis(50);
/// Equal bodies of a provider that does not name its events are one delivery within this time, milliseconds.
const SAME_MS: i64 = 600_000;
/// Notices of unknown accounts are kept for this long: a person may be connecting just now.
const STRANGERS: chrono::Duration = chrono::Duration::hours(24);
/// The shortest and the longest wait before an unknown account is looked for again.
const LOOK_AGAIN: (chrono::Duration, chrono::Duration) = (chrono::Duration::seconds(10), chrono::Duration::hours(1));
/// What providers take as an address.
const LONGEST_URL: usize = 255;

/// Why a call to a webhook's address is refused. Nothing of it was kept.
#[derive(Debug, thiserror::Error)]
pub enum Unwelcome {
    /// The provider has no webhooks.
    #[error("the provider has no webhooks")]
    None,
    /// The provider validates no subscriptions by this method.
    #[error("the provider does not validate subscriptions by this method")]
    NoHandshake,
    /// Nothing is set up that a delivery could be believed by; what to do about it.
    #[error("{0}")]
    Off(&'static str),
    /// The sender may be anybody.
    #[error("the sender may be anybody")]
    Untrusted,
    /// The body cannot be read.
    #[error("the body cannot be read")]
    BadBody,
    /// The validation is malformed, in the mirrored API's words.
    #[error("{0}")]
    Invalid(&'static str),
    /// The validation shows a wrong secret, in the mirrored API's words.
    #[error("{0}")]
    Forbidden(&'static str),
    /// Ours.
    #[error(transparent)]
    Internal(#[from] Error),
}

impl From<storage::Error> for Unwelcome {
    fn from(error: storage::Error) -> Self {
        Self::Internal(error.into())
    }
}

/// Our subscriptions as this process last saw them, by provider.
#[derive(Debug, Default)]
pub struct SubscriptionCache {
    seen: Mutex<HashMap<&'static str, Seen>>,
    /// Held by who looks.
    looks: tokio::sync::Mutex<()>,
}

/// When, and what.
type Seen = (Instant, Arc<Vec<Known>>);

impl Engine {
    /// Our subscriptions at a provider, and since when they are known; `since`: looked up not before that.
    async fn known(&self, setup: &ProviderSetup, app: &App, since: Option<Instant>) -> Result<Seen, Error> {
        let name = setup.spec().name.0;
        let last = || self.subscriptions.seen.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned();
        let will_do = |(at, _): &Seen| since.map_or(at.elapsed() < FRESH, |since| *at >= since);
        if let Some(seen) = last().filter(will_do) {
            return Ok(seen);
        }
        // One looks, and whoever waits for it takes what it finds.
        let _looks = self.subscriptions.looks.lock().await;
        if let Some(seen) = last() {
            if will_do(&seen) {
                return Ok(seen);
            }
            tokio::time::sleep(APART.saturating_sub(seen.0.elapsed())).await;
        }
        let at = Instant::now();
        let rows = self.db.list_subscriptions(name, &app.client_id).await?;
        let known = rows.into_iter().map(|row| {
            let opened = row.secret.map(|sealed| self.vault.open(&secret_aad(setup), &sealed)).transpose();
            if let Err(error) = &opened {
                tracing::warn!(provider = name, %error, "the secret of a subscription cannot be read");
            }
            Known { external_id: row.external_id, secret: opened.ok().flatten() }
        });
        let known: Arc<Vec<Known>> = Arc::new(known.collect());
        let seen = (at, known);
        self.subscriptions.seen.lock().unwrap_or_else(PoisonError::into_inner).insert(name, seen.clone());
        Ok(seen)
    }

    fn forget_known(&self, setup: &ProviderSetup) {
        self.subscriptions.seen.lock().unwrap_or_else(PoisonError::into_inner).remove(setup.spec().name.0);
    }
}

fn secret_aad(setup: &ProviderSetup) -> Vec<u8> {
    format!("subscription:{}", setup.spec().name).into_bytes()
}

fn body_aad(id: DeliveryId) -> Vec<u8> {
    format!("delivery:{id}").into_bytes()
}

/// The end of the address that only the provider is told; the newest one first.
fn path_tokens(engine: &Engine, setup: &ProviderSetup, app: &App) -> Vec<String> {
    engine.vault.derive(&format!("webhook:{}:{}", setup.spec().name, app.client_id))
}

/// Whether an address ends in our token.
fn is_path_token(engine: &Engine, setup: &ProviderSetup, app: &App, end: &str) -> bool {
    let tokens = path_tokens(engine, setup, app);
    // All are compared, so that the time tells nothing.
    tokens.iter().filter(|token| bool::from(token.as_bytes().ct_eq(end.as_bytes()))).count() > 0
}

/// Answers a call to a webhook's address: a validation, or a delivery, which is on disk when this answers. The value is the
/// body of a 200. `token`: what the path ended in.
///
/// # Errors
/// [`Unwelcome`].
pub async fn receive(
    engine: &Engine,
    setup: &ProviderSetup,
    inbound: &Inbound<'_>,
    token: Option<&str>,
) -> Result<Value, Unwelcome> {
    let provider = setup.spec().name;
    let answer = match webhooks(setup) {
        Ok((spec, app)) => receive_with(engine, setup, spec, app, inbound, token).await,
        Err(unwelcome) => Err(unwelcome),
    };
    match &answer {
        Err(Unwelcome::Off(why)) => telemetry::delivery_received(provider, Received::Off, why),
        Err(Unwelcome::Untrusted) => telemetry::delivery_received(provider, Received::Untrusted, ""),
        Err(Unwelcome::BadBody) => telemetry::delivery_received(provider, Received::Unreadable, ""),
        _ => {}
    }
    answer
}

fn webhooks(setup: &ProviderSetup) -> Result<(&'static WebhookSpec, &App), Unwelcome> {
    let spec = setup.spec().webhooks.ok_or(Unwelcome::None)?;
    let app = setup.app.as_ref().ok_or(Unwelcome::Off("the provider's application is not set up"))?;
    Ok((spec, app))
}

async fn receive_with(
    engine: &Engine,
    setup: &ProviderSetup,
    spec: &WebhookSpec,
    app: &App,
    inbound: &Inbound<'_>,
    token: Option<&str>,
) -> Result<Value, Unwelcome> {
    let secret = setup.config.webhook_secret.as_ref();
    if spec.needs_secret && secret.is_none() {
        return Err(Unwelcome::Off("set the provider's `webhook_secret` to what signs its notifications there"));
    }
    let path_token = is_path_token(engine, setup, app, token.unwrap_or_default());
    let now = engine.now();
    let came = Instant::now();
    let mut since = None;
    loop {
        let (at, known) = engine.known(setup, app, since).await?;
        let trust = Trust {
            app,
            secret,
            subscriptions: &known,
            path_token,
            signature_required: setup.config.webhook_signature,
            now_ms: now.timestamp_millis(),
        };
        let again = at < came;
        since = Some(came);
        match (spec.handshake)(inbound, &trust) {
            Some(Handshake::Answer(answer)) => return Ok(answer),
            Some(Handshake::Forbidden(_)) if again => continue,
            Some(Handshake::Forbidden(text)) => return Err(Unwelcome::Forbidden(text)),
            Some(Handshake::Invalid(text)) => return Err(Unwelcome::Invalid(text)),
            None if inbound.method != "POST" => return Err(Unwelcome::NoHandshake),
            None => {}
        }
        let off = spec.subscriptions.is_some() && known.iter().all(|one| one.external_id == PENDING);
        let verified = (spec.verify)(inbound, &trust);
        if again && (off || verified.is_err()) {
            continue;
        }
        if off {
            return Err(Unwelcome::Off("nothing is subscribed to: `wearsync subscriptions create` does"));
        }
        verified.map_err(|why| {
            tracing::debug!(provider = %setup.spec().name, %why, "a delivery was refused");
            Unwelcome::Untrusted
        })?;
        break;
    }
    let key = (spec.dedup_key)(inbound).map_err(|_| Unwelcome::BadBody)?;
    let key = key.unwrap_or_else(|| {
        let digest: String = Sha256::digest(inbound.body)[..16].iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{digest}:{}", now.timestamp_millis().div_euclid(SAME_MS))
    });
    let id = DeliveryId::new();
    let new = NewDelivery {
        id,
        provider: setup.spec().name.0,
        dedup_key: key,
        headers: kept_headers(spec, inbound.headers),
        body: engine.vault.seal_bytes(&body_aad(id), inbound.body),
    };
    let is_new = engine.db.insert_delivery(new, now).await?;
    failpoint::hit("delivery-kept");
    if is_new {
        telemetry::delivery_received(setup.spec().name, Received::Accepted, "");
        // The row is the truth; a lost push costs one sweep.
        if let Err(error) = engine.shared.push(id, Class::Webhook, now.timestamp_millis()).await {
            telemetry::redis_down(&error);
        }
    } else {
        telemetry::delivery_received(setup.spec().name, Received::Duplicate, "");
    }
    Ok(serde_json::json!({ "status": "accepted" }))
}

/// The headers that the provider's table names, as JSON; never a credential.
fn kept_headers(spec: &WebhookSpec, headers: &HeaderMap) -> String {
    let kept: Map<String, Value> = spec
        .headers
        .iter()
        .filter_map(|name| {
            let text = headers.get(*name)?.to_str().ok()?;
            Some(((*name).to_owned(), Value::String(text.chars().take(500).collect())))
        })
        .collect();
    Value::Object(kept).to_string()
}

/// What became of a delivery that was to be worked on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivered {
    /// It could not be claimed: not due, done, or taken.
    NotTaken,
    /// Everything in it has its run, or none.
    Done,
    /// It was put back and is due again then.
    PutBack(DateTime<Utc>),
    /// It cannot be worked on.
    Failed,
    /// It was taken from us; whoever has it now goes on.
    Lost,
}

/// Claims a delivery, and makes runs of what it says.
///
/// # Errors
/// When the database fails; the delivery is then claimed again.
pub async fn deliver(engine: &Engine, id: DeliveryId) -> Result<Delivered, Error> {
    let until = engine.after(engine.config.lease);
    let Some(claim) = engine.db.claim_delivery(id, &engine.owner, engine.now(), until).await? else {
        return Ok(Delivered::NotTaken);
    };
    failpoint::hit("delivery-claimed");
    let (items, end) = match understand(engine, &claim) {
        Ok((setup, notices)) => decide(engine, setup, &claim, notices).await?,
        Err(why) => (Vec::new(), DeliveryEnd::Failed(why)),
    };
    let settled = engine.db.settle_delivery(&claim, &items, &end, engine.now()).await;
    failpoint::hit("delivery-settled");
    let runs = match settled {
        Ok(runs) => runs,
        Err(storage::Error::Fenced) => return Ok(Delivered::Lost),
        Err(error) => return Err(error.into()),
    };
    let now_ms = engine.clock.now_ms();
    for (run, _) in &runs {
        if let Some(setup) = engine.provider(&claim.provider).filter(|_| run.is_new) {
            telemetry::run_accepted(run.id, setup.spec().name, Class::Webhook, RunSource::Webhook);
        }
        if let Err(error) = engine.shared.push(run.id, run.class, now_ms).await {
            telemetry::redis_down(&error);
        }
    }
    Ok(match end {
        DeliveryEnd::Done => Delivered::Done,
        DeliveryEnd::Wait(due, _) => {
            if let Err(error) = engine.shared.push(id, Class::Webhook, due.timestamp_millis()).await {
                telemetry::redis_down(&error);
            }
            Delivered::PutBack(due)
        }
        DeliveryEnd::Failed(why) => {
            tracing::warn!(delivery = %id, provider = %claim.provider, why, "a delivery cannot be worked on");
            Delivered::Failed
        }
    })
}

/// What a delivery says; or why that cannot be told, in words.
fn understand<'a>(engine: &'a Engine, claim: &DeliveryClaim) -> Result<(&'a ProviderSetup, Vec<Notice>), String> {
    if claim.crashes >= CRASHES {
        return Err(format!("{CRASHES} workers in a row died working on it"));
    }
    let setup = engine.provider(&claim.provider).ok_or("its provider is gone")?;
    let spec = setup.spec().webhooks.ok_or("its provider has no webhooks")?;
    let body = open_body(engine, claim.id, claim.body.as_deref()).map_err(|error| error.to_string())?;
    let notices = (spec.read_delivery)(&body).map_err(|BadBody(why)| why.to_owned())?;
    Ok((setup, notices))
}

fn open_body(engine: &Engine, id: DeliveryId, sealed: Option<&[u8]>) -> Result<Vec<u8>, Error> {
    let sealed = sealed.ok_or_else(|| Error::Corrupt("deliveries.body: it was dropped".to_owned()))?;
    Ok(engine.vault.open_bytes(&body_aad(id), sealed)?)
}

/// Finds the connections that the notices are for, and what is to be done for each.
async fn decide(
    engine: &Engine,
    setup: &ProviderSetup,
    claim: &DeliveryClaim,
    notices: Vec<Notice>,
) -> Result<(Vec<NewItem>, DeliveryEnd), Error> {
    let mut seen: HashSet<String> = HashSet::new();
    if claim.attempts > 0 {
        seen.extend(engine.db.list_settled_notices(claim.id).await?);
    }
    let accounts: BTreeSet<&str> = notices.iter().map(Notice::account).collect();
    let client_id = setup.app.as_ref().map_or("", |app| app.client_id.as_str());
    let addressees = engine.db.list_addressees(&claim.provider, client_id, &accounts).await?;
    let now = engine.now();
    let age = now - claim.received_at;
    let mut items = Vec::new();
    let mut waits = false;
    for notice in &notices {
        let text = serde_json::to_string(notice).map_err(|error| Error::Corrupt(error.to_string()))?;
        // Said twice in one body is said once.
        if !seen.insert(text.clone()) {
            continue;
        }
        let mut known = addressees.iter().filter(|one| one.provider_user_id == notice.account()).peekable();
        if known.peek().is_none() {
            let act = if age < STRANGERS && wanted(notice).is_some() { Act::Wait } else { Act::Drop };
            waits |= matches!(act, Act::Wait);
            items.push(NewItem { notice: text, account: None, act });
            continue;
        }
        for one in known {
            let act = match one.connection_id.zip(wanted(notice)) {
                Some((connection, request)) => Act::Run(NewRun {
                    connection,
                    class: Class::Webhook,
                    source: RunSource::Webhook,
                    request: serde_json::to_string(&request).map_err(|error| Error::Corrupt(error.to_string()))?,
                    request_key: request_key(connection, &request),
                }),
                // Nothing is to be done; or providers go on for a while about people who are no longer connected.
                None => Act::Drop,
            };
            items.push(NewItem { notice: text.clone(), account: Some(one.account_id), act });
        }
    }
    let end = if waits {
        let wait = (age / 2).clamp(LOOK_AGAIN.0, LOOK_AGAIN.1);
        DeliveryEnd::Wait(now + wait, "its account is not known (yet)")
    } else {
        DeliveryEnd::Done
    };
    Ok((items, end))
}

/// What is to be read because of a notice, if anything.
fn wanted(notice: &Notice) -> Option<SyncRequest> {
    let item = |kind, external_id: &str, gone| NamedItem { kind, external_id: external_id.to_owned(), gone };
    match notice {
        Notice::Changed { kind, external_id, .. } => {
            Some(SyncRequest { items: vec![item(*kind, external_id, false)], ..SyncRequest::default() })
        }
        Notice::Gone { kind, external_id, .. } => {
            Some(SyncRequest { items: vec![item(*kind, external_id, true)], ..SyncRequest::default() })
        }
        Notice::Lifecycle { event: Lifecycle::Deauthorized, .. } => {
            Some(SyncRequest { check_grant: true, ..SyncRequest::default() })
        }
        Notice::Other { .. } => None,
    }
}

/// The body of a delivery, as received; `None` when it was dropped.
///
/// # Errors
/// When the database fails, or the key that it was sealed with is gone.
pub async fn delivery_body(engine: &Engine, id: DeliveryId) -> Result<Option<Vec<u8>>, Error> {
    match engine.db.find_delivery_body(id).await? {
        Some(sealed) => Ok(Some(open_body(engine, id, Some(&sealed))?)),
        None => Ok(None),
    }
}

/// Has a delivery worked on once more. `false`: see [`crate::storage::Db::replay_delivery`].
///
/// # Errors
/// When the database fails.
pub async fn replay(engine: &Engine, id: DeliveryId) -> Result<bool, Error> {
    let now = engine.now();
    if !engine.db.replay_delivery(id, now).await? {
        return Ok(false);
    }
    if let Err(error) = engine.shared.push(id, Class::Webhook, now.timestamp_millis()).await {
        telemetry::redis_down(&error);
    }
    Ok(true)
}

/// Drops bodies and deliveries that have outlived their use, by the settings.
///
/// # Errors
/// When the database fails.
pub async fn clean_up_deliveries(engine: &Engine) -> Result<(), Error> {
    let before =
        |kept: Duration| engine.now() - chrono::Duration::from_std(kept).unwrap_or(chrono::Duration::days(366));
    let (bodies, rows) = (engine.config.delivery_bodies_kept, engine.config.deliveries_kept);
    Ok(engine.db.clean_up_deliveries(before(bodies), before(rows)).await?)
}

// ---- subscriptions ------------------------------------------------------------------------------------------------

/// Why nothing could be done about subscriptions.
#[derive(Debug, thiserror::Error)]
pub enum SubscribeError {
    /// The provider has no interface for them.
    #[error("Provider does not support webhook subscription management")]
    Unsupported,
    /// The address cannot be used.
    #[error("{0}")]
    Invalid(String),
    /// The provider said no, or nothing.
    #[error("{0}")]
    Provider(String),
    /// Ours.
    #[error(transparent)]
    Internal(#[from] Error),
}

impl From<storage::Error> for SubscribeError {
    fn from(error: storage::Error) -> Self {
        Self::Internal(error.into())
    }
}

impl From<SubscriptionError> for SubscribeError {
    fn from(error: SubscriptionError) -> Self {
        Self::Provider(error.to_string())
    }
}

/// What was done about a subscription; the words are the mirrored API's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subscribed {
    /// There was none.
    Created,
    /// It took the place of another one.
    Updated,
    /// It was there already.
    Skipped,
}

impl Subscribed {
    /// The word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Updated => "updated",
            Self::Skipped => "skipped",
        }
    }
}

fn manager<'a>(
    engine: &'a Engine,
    setup: &'a ProviderSetup,
) -> Result<(&'static dyn Subscriptions, AppCalls<'a>), SubscribeError> {
    let spec = setup.spec().webhooks.and_then(|webhooks| webhooks.subscriptions);
    let subscriptions = spec.ok_or(SubscribeError::Unsupported)?;
    let app = app(setup)?;
    Ok((subscriptions, AppCalls { http: &engine.http, app, base_url: &setup.base_url }))
}

/// What the provider has of us.
///
/// # Errors
/// [`SubscribeError`].
pub async fn list_subscriptions(engine: &Engine, setup: &ProviderSetup) -> Result<Vec<Subscription>, SubscribeError> {
    let (subscriptions, calls) = manager(engine, setup)?;
    Ok(subscriptions.list(&calls).await?)
}

/// The whole address for deliveries: `base` is where this service can be reached, or the address itself, with or without
/// the token at its end.
///
/// # Errors
/// [`SubscribeError::Invalid`] in words.
pub fn callback_url(engine: &Engine, setup: &ProviderSetup, base: &str) -> Result<String, SubscribeError> {
    if setup.spec().webhooks.is_none() {
        return Err(SubscribeError::Unsupported);
    }
    let bad = |why: &str| SubscribeError::Invalid(format!("callback_url {why}"));
    let mut url = url::Url::parse(base).map_err(|_| bad("is no address"))?;
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        return Err(bad("must begin with https://"));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(bad("must end with its path"));
    }
    let token = path_tokens(engine, setup, app(setup)?).into_iter().next().unwrap_or_default();
    let mut path = url.path().trim_end_matches('/').to_owned();
    if path.is_empty() {
        path = format!("/api/v1/providers/{}/webhooks", setup.spec().name);
    }
    if !path.ends_with(&format!("/{token}")) {
        path = format!("{path}/{token}");
    }
    url.set_path(&path);
    let url = url.to_string();
    if url.len() > LONGEST_URL {
        return Err(SubscribeError::Invalid(format!("callback_url is longer than {LONGEST_URL} characters")));
    }
    Ok(url)
}

/// Whether what the provider sends to this address of ours can be believed: its end comes from our key, and a signature
/// may stand in for it.
///
/// # Errors
/// When the provider's application is not set up.
pub fn is_believed(engine: &Engine, setup: &ProviderSetup, callback_url: &str) -> Result<bool, Error> {
    let end = callback_url.rsplit('/').next().unwrap_or_default();
    Ok(setup.config.webhook_signature || is_path_token(engine, setup, app(setup)?, end))
}

/// Subscribes, so that there is exactly one subscription, with this address: looks first, ends what is stale, then makes
/// a new one. The service has to be reachable under the address while this runs. Where that fails, what was ended is made
/// again: providers allow one at a time, so the new address can be tried in no other way.
///
/// # Errors
/// [`SubscribeError`].
pub async fn subscribe(
    engine: &Engine,
    setup: &ProviderSetup,
    callback_url: &str,
) -> Result<(Subscribed, Subscription), SubscribeError> {
    let (subscriptions, calls) = manager(engine, setup)?;
    let (name, client_id) = (setup.spec().name.0, calls.app.client_id.as_str());
    let there = subscriptions.list(&calls).await?;
    if let Some(same) = there.iter().find(|one| one.callback_url == callback_url) {
        // Made by us before we could note it, or by hand.
        engine.db.store_subscription(name, client_id, &row(same, None), engine.now()).await?;
        engine.forget_known(setup);
        return Ok((Subscribed::Skipped, same.clone()));
    }
    for stale in &there {
        subscriptions.delete(&calls, &stale.external_id).await?;
        engine.db.delete_subscription(name, client_id, &stale.external_id).await?;
    }
    let made = match make(engine, setup, callback_url).await {
        Ok(made) => made,
        Err(SubscribeError::Provider(why)) if !there.is_empty() => {
            let mut told = why;
            for old in &there {
                told += &match make(engine, setup, &old.callback_url).await {
                    Ok(_) => format!("; events go to {} as before", old.callback_url),
                    Err(why) => format!("; and {} could not be subscribed again: {why}", old.callback_url),
                };
            }
            return Err(SubscribeError::Provider(told));
        }
        Err(error) => return Err(error),
    };
    // Rows of subscriptions that the provider no longer knows would let their ids pass.
    for old in engine.db.list_subscriptions(name, client_id).await? {
        if old.external_id != made.external_id {
            engine.db.delete_subscription(name, client_id, &old.external_id).await?;
        }
    }
    engine.forget_known(setup);
    let done = if there.is_empty() { Subscribed::Created } else { Subscribed::Updated };
    Ok((done, made))
}

fn row(subscription: &Subscription, secret: Option<Vec<u8>>) -> SubscriptionRow {
    let Subscription { external_id, callback_url, .. } = subscription.clone();
    SubscriptionRow { external_id, callback_url, secret }
}

/// Makes one subscription, and keeps it with its secret.
async fn make(engine: &Engine, setup: &ProviderSetup, callback_url: &str) -> Result<Subscription, SubscribeError> {
    let (subscriptions, calls) = manager(engine, setup)?;
    let (name, client_id) = (setup.spec().name.0, calls.app.client_id.as_str());
    let seal = |secret: &SecretString| engine.vault.seal(&secret_aad(setup), secret);
    // On disk before the provider asks for it, in whichever process it asks.
    let token = verify_token();
    let sealed = seal(&token);
    let pending = SubscriptionRow {
        external_id: PENDING.to_owned(),
        callback_url: callback_url.to_owned(),
        secret: Some(sealed.clone()),
    };
    engine.db.store_subscription(name, client_id, &pending, engine.now()).await?;
    engine.forget_known(setup);
    let made = subscriptions.create(&calls, callback_url, &token).await;
    if let Ok(Made { subscription, secret }) = &made {
        let sealed = secret.as_ref().map_or(sealed, seal);
        engine.db.store_subscription(name, client_id, &row(subscription, Some(sealed)), engine.now()).await?;
    }
    engine.db.delete_subscription(name, client_id, PENDING).await?;
    engine.forget_known(setup);
    Ok(made?.subscription)
}

/// Subscribes with our public address, beside whatever asked for it: that neither waits nor fails. Nothing happens where
/// the provider has no interface for subscriptions.
pub fn subscribe_soon(engine: &Arc<Engine>, provider: &'static str) {
    let engine = engine.clone();
    tokio::spawn(async move {
        let Some(setup) = engine.provider(provider) else { return };
        match subscribe_here(&engine, setup).await {
            Ok(done) => telemetry::subscribed(setup.spec().name, done.as_str(), None),
            Err(SubscribeError::Unsupported) => {}
            Err(error) => telemetry::subscribed(setup.spec().name, "error", Some(&error.to_string())),
        }
    });
}

async fn subscribe_here(engine: &Engine, setup: &ProviderSetup) -> Result<Subscribed, SubscribeError> {
    // Who says nowhere how we are reached has subscribed with an address that is: it is not given up for ours.
    if engine.config.is_local() {
        for one in list_subscriptions(engine, setup).await? {
            if is_believed(engine, setup, &one.callback_url)? {
                return Ok(Subscribed::Skipped);
            }
        }
    }
    let url = callback_url(engine, setup, &engine.config.public_url)?;
    Ok(subscribe(engine, setup, &url).await?.0)
}

/// Ends a subscription, at the provider and here.
///
/// # Errors
/// [`SubscribeError`].
pub async fn unsubscribe(engine: &Engine, setup: &ProviderSetup, external_id: &str) -> Result<(), SubscribeError> {
    let (subscriptions, calls) = manager(engine, setup)?;
    subscriptions.delete(&calls, external_id).await?;
    engine.db.delete_subscription(setup.spec().name.0, &calls.app.client_id, external_id).await?;
    engine.forget_known(setup);
    Ok(())
}

/// What the provider shows when it validates: 48 hex digits.
fn verify_token() -> SecretString {
    let mut bytes = [0_u8; 24];
    rand::rng().fill_bytes(&mut bytes);
    let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    secret(&text)
}
