//! Push subscriptions, with their real validation, and the events that go out to them: in the wire format, up to three
//! tries, two seconds each; twice or out of order by option.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, RawQuery, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use hmac::{Hmac, KeyInit as _, Mac as _};
use serde_json::{Map, Value, json};
use sha2::Sha256;

use super::{Refused, Strava, asked, error, fields, refuse, refused};
use crate::providers::Http;
use crate::providers::simulation::{Rng, locked};

/// The provider waits for so long.
const PATIENCE: Duration = Duration::from_secs(2);
const TRIES: u64 = 3;
const FIRST_ID: u64 = 318_842;

/// What is subscribed to.
#[derive(Default)]
pub(super) struct Push {
    /// By application: one each.
    subscriptions: HashMap<String, Subscription>,
    made: u64,
}

#[derive(Clone)]
struct Subscription {
    id: u64,
    callback_url: String,
    created_at: String,
}

/// Numbers events, so that chance is the same each time.
#[derive(Default)]
pub(super) struct Counts {
    events: AtomicU64,
}

fn no_client() -> Response {
    error(401, "Authorization Error", "Application", "client_id", "invalid")
}

/// Who asks, if the secret is right.
fn client<'a>(strava: &Strava, fields: &'a HashMap<String, String>) -> Option<&'a str> {
    let field = |name: &str| fields.get(name).map_or("", String::as_str);
    strava.client(field("client_id"), field("client_secret")).then(|| field("client_id"))
}

fn shown(client: &str, subscription: &Subscription) -> Value {
    json!({
        "id": subscription.id,
        "resource_state": 2,
        "application_id": client.parse::<u64>().unwrap_or_default(),
        "callback_url": subscription.callback_url,
        "created_at": subscription.created_at,
        "updated_at": subscription.created_at,
    })
}

/// `GET /push_subscriptions`
pub(super) async fn view(State(strava): State<Arc<Strava>>, RawQuery(query): RawQuery) -> Response {
    let fields = fields(query.as_deref(), b"");
    let answer = |_| match client(&strava, &fields) {
        None => no_client(),
        Some(client) => {
            let push = locked(&strava.push);
            let own: Vec<Value> = push.subscriptions.get(client).iter().map(|one| shown(client, one)).collect();
            Json(own).into_response()
        }
    };
    strava.shared.pass("push_subscriptions", refuse, answer).await
}

/// `POST /push_subscriptions`
pub(super) async fn create(State(strava): State<Arc<Strava>>, RawQuery(query): RawQuery, body: Bytes) -> Response {
    let fields = fields(query.as_deref(), &body);
    let bad = |code| error(400, "Bad Request", "PushSubscription", "callback url", code);
    let Some(client) = client(&strava, &fields) else { return no_client() };
    let callback = fields.get("callback_url").map_or("", String::as_str);
    let exists = || locked(&strava.push).subscriptions.contains_key(client);
    let verdict = if exists() {
        Some(error(400, "Bad Request", "PushSubscription", "", "already exists"))
    } else if callback.len() > 255 {
        Some(bad("too long"))
    } else {
        validate(&strava, callback, fields.get("verify_token").map_or("", String::as_str)).await.map(bad)
    };
    let answer = |_| {
        if let Some(verdict) = verdict {
            return verdict;
        }
        let mut push = locked(&strava.push);
        push.made += 1;
        let id = FIRST_ID + push.made - 1;
        let created_at = strava.shared.clock().now().format("%FT%TZ").to_string();
        let callback_url = callback.to_owned();
        push.subscriptions.insert(client.to_owned(), Subscription { id, callback_url, created_at });
        (StatusCode::CREATED, Json(json!({ "id": id }))).into_response()
    };
    strava.shared.pass("push_subscriptions", refuse, answer).await
}

/// Asks the callback for the challenge; the provider's code of what is wrong.
async fn validate(strava: &Strava, callback: &str, verify_token: &str) -> Option<&'static str> {
    let challenge = Rng::of(&[strava.shared.options().seed, 0xc4a1, strava.counts.events.load(Ordering::SeqCst)]).hex(32);
    let query = [("hub.mode", "subscribe"), ("hub.challenge", &challenge), ("hub.verify_token", verify_token)];
    let Ok(http) = Http::new() else { return Some("not verifiable") };
    let answer = http.client().get(callback).query(&query).timeout(PATIENCE).send().await;
    let Ok(answer) = answer else { return Some("not verifiable") };
    if answer.status() != 200 {
        return Some("GET to callback URL does not return 200");
    }
    let echoed: Value = answer.json().await.unwrap_or_default();
    if echoed["hub.challenge"] == *challenge { None } else { Some("not verifiable") }
}

/// `DELETE /push_subscriptions/{id}`
pub(super) async fn delete(
    State(strava): State<Arc<Strava>>,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
) -> Response {
    let fields = fields(query.as_deref(), b"");
    let answer = |_| {
        let Some(client) = client(&strava, &fields) else { return no_client() };
        let mut push = locked(&strava.push);
        if push.subscriptions.get(client).is_some_and(|one| one.id.to_string() == id) {
            push.subscriptions.remove(client);
            StatusCode::NO_CONTENT.into_response()
        } else {
            error(404, "Resource Not Found", "PushSubscription", "id", "invalid")
        }
    };
    strava.shared.pass("push_subscriptions", refuse, answer).await
}

/// Tells all applications that this person let in; `only` one of them.
pub(super) fn tell(
    strava: &Arc<Strava>,
    person: usize,
    (object, id, aspect): (&str, u64, &str),
    updates: &Map<String, Value>,
    only: Option<&str>,
) {
    let owner = strava.world().athletes().nth(person).unwrap_or_default();
    let subscriptions = locked(&strava.push).subscriptions.clone();
    for (client, subscription) in subscriptions {
        if only.is_some_and(|only| only != client) {
            continue;
        }
        let (let_in, all) = {
            let auth = strava.auth();
            let own = || auth.grants.iter().filter(|grant| grant.client == client && grant.person == person);
            (own().any(|grant| grant.alive), own().any(|grant| grant.alive && grant.scopes.contains("activity:read_all")))
        };
        if object == "activity" && !let_in {
            continue;
        }
        // Who may not see what is private is told that it is gone, and of its return as of something new.
        let (aspect, updates) = match updates.get("private").and_then(Value::as_str) {
            Some("true") if !all => ("delete", Map::new()),
            Some(_) if !all => ("create", Map::new()),
            _ => (aspect, updates.clone()),
        };
        let event = json!({
            "object_type": object,
            "object_id": id,
            "aspect_type": aspect,
            "updates": updates,
            "owner_id": owner,
            "subscription_id": subscription.id,
            "event_time": strava.now_ms() / 1000,
        });
        send(strava, &client, &subscription.callback_url, event.to_string());
    }
}

/// Sends one event on its way.
fn send(strava: &Arc<Strava>, client: &str, callback: &str, body: String) {
    let options = strava.shared.options();
    let n = strava.counts.events.fetch_add(1, Ordering::SeqCst);
    let mut rng = Rng::of(&[options.seed, 0xe7e7, n]);
    let copies = 1 + u64::from(rng.chance(options.duplicate_events));
    for _ in 0..copies {
        let held_back = if rng.chance(options.late_events) { 50 + rng.below(200) } else { 0 };
        strava.shared.ledger().events.due += 1;
        let secret = options.clients.iter().find(|known| known.id == client).map(|known| known.secret.clone());
        let secret = secret.filter(|_| options.sign_events);
        let (strava, callback, body) = (strava.clone(), callback.to_owned(), body.clone());
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(held_back)).await;
            let taken = deliver(&strava, &callback, &body, secret.as_deref()).await;
            let mut ledger = strava.shared.ledger();
            ledger.events.due -= 1;
            if taken {
                ledger.events.acknowledged += 1;
            } else {
                ledger.events.given_up += 1;
            }
        });
    }
}

/// Up to three tries. Whether one of them was answered in time, with 200.
async fn deliver(strava: &Strava, callback: &str, body: &str, secret: Option<&str>) -> bool {
    let Ok(http) = Http::new() else { return false };
    for n in 0..TRIES {
        if n > 0 {
            tokio::time::sleep(Duration::from_millis(strava.shared.options().event_retry_ms)).await;
        }
        let mut call = http.client().post(callback).header("content-type", "application/json").timeout(PATIENCE);
        if let Some(secret) = secret {
            call = call.header("x-strava-signature", signature(secret, strava.now_ms() / 1000, body));
        }
        strava.shared.ledger().events.sent += 1;
        match call.body(body.to_owned()).send().await {
            Ok(answer) if answer.status() == 200 => return true,
            _ => {}
        }
    }
    false
}

fn signature(secret: &str, at: i64, body: &str) -> String {
    let Ok(mac) = Hmac::<Sha256>::new_from_slice(secret.as_bytes()) else { return String::new() };
    let digest = mac.chain_update(format!("{at}.{body}")).finalize().into_bytes();
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("t={at},v1={hex}")
}

/// What an edit is announced as; nothing where the provider announces no such edit.
pub(super) fn announced(edit: &Map<String, Value>) -> Option<Map<String, Value>> {
    let mut updates = Map::new();
    for (field, name) in [("name", "title"), ("sport_type", "type"), ("type", "type")] {
        if let Some(value) = edit.get(field) {
            updates.insert(name.to_owned(), value.clone());
        }
    }
    if let Some(private) = edit.get("private").and_then(Value::as_bool) {
        updates.insert("private".to_owned(), json!(private.to_string()));
    }
    if let Some(visibility) = edit.get("visibility").and_then(Value::as_str) {
        updates.insert("private".to_owned(), json!((visibility == "only_me").to_string()));
    }
    (!updates.is_empty()).then_some(updates)
}

/// `{athlete, object_type, object_id, aspect_type, updates}`: an event as told, true or not.
pub(super) async fn tell_event(State(strava): State<Arc<Strava>>, body: Bytes) -> Result<Response, Refused> {
    let (fields, person) = asked(&strava, &body)?;
    let text = |name: &str| fields.get(name).and_then(Value::as_str).unwrap_or_default();
    let id = fields.get("object_id").and_then(Value::as_u64);
    let id = id.or_else(|| strava.world().athletes().nth(person)).ok_or_else(|| refused("no `object_id`"))?;
    let updates = fields.get("updates").and_then(Value::as_object).cloned().unwrap_or_default();
    tell(&strava, person, (text("object_type"), id, text("aspect_type")), &updates, None);
    Ok(Json(json!({ "object_id": id })).into_response())
}
