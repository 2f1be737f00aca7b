//! Strava's push subscription: thin events for all athletes of an application, one subscription each.
//!
//! The documents know no signature; code of others checks one. So the token in the path and the id of the subscription
//! are what a sender is believed by, unless a setting asks for the signature. Events are hints either way: whatever they
//! say is fetched, or confirmed by a call, before anything changes.

use std::collections::HashMap;
use std::time::Duration;

use async_trait::async_trait;
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use url::form_urlencoded;

use super::wire::Id;
use crate::model::Kind;
use crate::providers::http::{excerpt, read_body, transient};
use crate::providers::oauth::without;
use crate::providers::webhook::{
    AppCalls, BadBody, Digits, Handshake, Inbound, Lifecycle, Made, Notice, PENDING, Subscription, SubscriptionError,
    Subscriptions, Trust, Untrusted, WebhookSpec, is_signed,
};

/// What Strava sends, and how it is subscribed to.
pub(super) static SPEC: WebhookSpec = WebhookSpec {
    body_limit: 1 << 20,
    // It waits two seconds.
    answer_within: Duration::from_millis(1800),
    needs_secret: false,
    headers: &["content-type", "user-agent", SIGNATURE],
    handshake,
    verify,
    dedup_key,
    read_delivery,
    subscriptions: Some(&Push),
};

const SIGNATURE: &str = "x-strava-signature";
/// A signature is good for so long, seconds.
const TOLERANCE_S: i64 = 300;
/// What events are about, and what happened to it.
const WORDS: [&str; 5] = ["activity", "athlete", "create", "update", "delete"];

/// An event, as sent. Ids and flags come as numbers or texts.
#[derive(Deserialize)]
struct Event {
    object_type: String,
    object_id: Id,
    aspect_type: String,
    #[serde(default)]
    updates: Map<String, Value>,
    owner_id: Id,
    #[serde(default)]
    subscription_id: Option<Id>,
    event_time: Id,
}

fn read(body: &[u8]) -> Result<Event, BadBody> {
    let mut event: Event = serde_json::from_slice(body).map_err(|_| BadBody("the body is no event of Strava"))?;
    // They become parts of paths and of keys: numbers, written in one way.
    for (id, least) in [(&mut event.object_id, 1), (&mut event.owner_id, 1), (&mut event.event_time, 0)] {
        let number = id.0.parse().ok().filter(|number: &u64| *number >= least);
        id.0 = number.ok_or(BadBody("ids of Strava are positive numbers"))?.to_string();
    }
    Ok(event)
}

fn handshake(inbound: &Inbound<'_>, trust: &Trust<'_>) -> Option<Handshake> {
    if inbound.method == "POST" {
        return None;
    }
    let query: HashMap<String, String> = form_urlencoded::parse(inbound.query.as_bytes()).into_owned().collect();
    let field = |name: &str| query.get(name).map_or("", String::as_str);
    if field("hub.mode") != "subscribe" {
        return Some(Handshake::Invalid("Invalid hub.mode"));
    }
    let told = field("hub.verify_token").as_bytes();
    // All are looked at, so that the time tells nothing.
    let known = trust.subscriptions.iter().filter_map(|subscription| subscription.secret.as_ref());
    if known.filter(|secret| bool::from(secret.expose_secret().as_bytes().ct_eq(told))).count() == 0 {
        return Some(Handshake::Forbidden("Invalid verify token"));
    }
    match query.get("hub.challenge") {
        Some(challenge) => Some(Handshake::Answer(json!({ "hub.challenge": challenge }))),
        None => Some(Handshake::Invalid("Field required")),
    }
}

fn verify(inbound: &Inbound<'_>, trust: &Trust<'_>) -> Result<(), Untrusted> {
    if trust.signature_required {
        check_signature(inbound, trust)?;
    } else if !trust.path_token {
        return Err(Untrusted("the address does not end in our token"));
    }
    // A body that cannot be read is refused as such, later.
    let Ok(event) = read(inbound.body) else { return Ok(()) };
    let told = event.subscription_id.map(|id| id.0).unwrap_or_default();
    let mut known = trust.subscriptions.iter().filter(|subscription| subscription.external_id != PENDING);
    if known.any(|subscription| subscription.external_id == told) {
        Ok(())
    } else {
        Err(Untrusted("the event names another subscription"))
    }
}

/// `t=<seconds>,v1=<hex>`: HMAC-SHA256 by the client secret over `<seconds>.<raw body>`.
fn check_signature(inbound: &Inbound<'_>, trust: &Trust<'_>) -> Result<(), Untrusted> {
    let malformed = Untrusted("the signature is missing or malformed");
    let mut fields = HashMap::new();
    for field in inbound.header(SIGNATURE).split(',') {
        let (name, value) = field.trim().split_once('=').ok_or(malformed)?;
        if fields.insert(name, value).is_some() {
            return Err(malformed);
        }
    }
    let (Some(time), Some(digest)) = (fields.get("t"), fields.get("v1")) else { return Err(malformed) };
    let at: i64 = time.parse().map_err(|_| malformed)?;
    if (trust.now_ms.div_euclid(1000)).abs_diff(at) > TOLERANCE_S.unsigned_abs() {
        return Err(Untrusted("the signature is too old, or of the future"));
    }
    let pieces = [time.as_bytes(), b".", inbound.body];
    if is_signed(&trust.app.client_secret, &pieces, digest, Digits::Hex) {
        Ok(())
    } else {
        Err(Untrusted("the signature is another one"))
    }
}

/// Strava numbers no events. What changed is part of the key: two changes within one second are two events. Texts are
/// part of it by their digest: they may hold anything, at any length.
fn dedup_key(inbound: &Inbound<'_>) -> Result<Option<String>, BadBody> {
    let event = read(inbound.body)?;
    let digest = Sha256::digest(json!([event.object_type, event.aspect_type, event.updates]).to_string());
    let digest: String = digest[..6].iter().map(|byte| format!("{byte:02x}")).collect();
    let known = |word: &str| WORDS.into_iter().find(|known| *known == word).unwrap_or("other");
    let (object, aspect) = (known(&event.object_type), known(&event.aspect_type));
    let (id, time, owner) = (event.object_id.0, event.event_time.0, event.owner_id.0);
    Ok(Some(format!("{object}:{id}:{aspect}:{time}:{owner}:{digest}")))
}

fn read_delivery(body: &[u8]) -> Result<Vec<Notice>, BadBody> {
    let event = read(body)?;
    let (account, id) = (event.owner_id.0, event.object_id.0);
    let notice = match (event.object_type.as_str(), event.aspect_type.as_str()) {
        // A privacy change without the right to see it comes as `delete`, and as `create` when it is undone.
        ("activity", "delete") => Notice::Gone { account, kind: Kind::Workout, external_id: id },
        ("activity", "create" | "update") => Notice::Changed { account, kind: Kind::Workout, external_id: id },
        ("athlete", "delete") => Notice::Lifecycle { account: id, event: Lifecycle::Deauthorized },
        ("athlete", "update") if event.updates.get("authorized").is_some_and(is_false) => {
            Notice::Lifecycle { account: id, event: Lifecycle::Deauthorized }
        }
        // What is new in their interface is no failure of ours.
        _ => Notice::Other { account },
    };
    Ok(vec![notice])
}

/// Flags come as `"false"`, some have seen `false`.
fn is_false(value: &Value) -> bool {
    match value {
        Value::Bool(flag) => !flag,
        Value::String(text) => text.eq_ignore_ascii_case("false"),
        _ => false,
    }
}

/// `/push_subscriptions`
struct Push;

impl Push {
    async fn call(&self, call: reqwest::RequestBuilder) -> Result<(u16, Vec<u8>), SubscriptionError> {
        let failed = |error: crate::providers::FetchError| SubscriptionError::Failed(error.to_string());
        let response = call.send().await.map_err(|error| failed(transient(&error)))?;
        let status = response.status().as_u16();
        let body = read_body(response).await.map_err(failed)?;
        Ok((status, body.to_vec()))
    }
}

/// What an answer refuses. It may quote what it refuses, so without these secrets.
fn refused(status: u16, body: &[u8], secrets: &[&SecretString]) -> SubscriptionError {
    let secrets: Vec<&str> = secrets.iter().map(|secret| secret.expose_secret()).collect();
    let told = without(&excerpt(body), &secrets);
    if status == 409 || told.contains("already exists") {
        return SubscriptionError::Exists;
    }
    SubscriptionError::Failed(format!("Strava answered {status}: {told}"))
}

fn subscription(told: Value) -> Option<Subscription> {
    let external_id = Id::deserialize(told.get("id")?).ok()?.0;
    let callback_url = told.get("callback_url").and_then(Value::as_str).unwrap_or_default().to_owned();
    Some(Subscription { external_id, callback_url, told })
}

fn unreadable() -> SubscriptionError {
    SubscriptionError::Failed("the answer of Strava about subscriptions cannot be read".to_owned())
}

#[async_trait]
impl Subscriptions for Push {
    async fn list(&self, calls: &AppCalls<'_>) -> Result<Vec<Subscription>, SubscriptionError> {
        let credentials =
            [("client_id", calls.app.client_id.as_str()), ("client_secret", calls.app.client_secret.expose_secret())];
        let call = calls.http.client().get(format!("{}/push_subscriptions", calls.base_url)).query(&credentials);
        let (status, body) = self.call(call).await?;
        if status != 200 {
            return Err(refused(status, &body, &[&calls.app.client_secret]));
        }
        let told: Vec<Value> = serde_json::from_slice(&body).map_err(|_| unreadable())?;
        told.into_iter().map(|one| subscription(one).ok_or_else(unreadable)).collect()
    }

    async fn create(
        &self,
        calls: &AppCalls<'_>,
        callback_url: &str,
        secret: &SecretString,
    ) -> Result<Made, SubscriptionError> {
        let form = [
            ("client_id", calls.app.client_id.as_str()),
            ("client_secret", calls.app.client_secret.expose_secret()),
            ("callback_url", callback_url),
            ("verify_token", secret.expose_secret()),
        ];
        let call = calls.http.client().post(format!("{}/push_subscriptions", calls.base_url)).form(&form);
        let (status, body) = self.call(call).await?;
        if !(200..300).contains(&status) {
            return Err(refused(status, &body, &[&calls.app.client_secret, secret]));
        }
        let told: Value = serde_json::from_slice(&body).map_err(|_| unreadable())?;
        let mut subscription = subscription(told).ok_or_else(unreadable)?;
        // The answer holds the id, and nothing else for sure.
        callback_url.clone_into(&mut subscription.callback_url);
        Ok(Made { subscription, secret: None })
    }

    async fn delete(&self, calls: &AppCalls<'_>, external_id: &str) -> Result<(), SubscriptionError> {
        let credentials =
            [("client_id", calls.app.client_id.as_str()), ("client_secret", calls.app.client_secret.expose_secret())];
        let id = percent_encoding::utf8_percent_encode(external_id, percent_encoding::NON_ALPHANUMERIC);
        let call = calls.http.client().delete(format!("{}/push_subscriptions/{id}", calls.base_url)).query(&credentials);
        match self.call(call).await? {
            (200..300 | 404, _) => Ok(()),
            (status, body) => Err(refused(status, &body, &[&calls.app.client_secret])),
        }
    }
}

#[cfg(test)]
mod tests {
    use reqwest::header::{HeaderMap, HeaderValue};

    use super::*;
    use crate::providers::oauth::App;
    use crate::providers::webhook::Known;

    const BODY: &str = r#"{ "object_type": "activity", "object_id": 18234567890, "aspect_type": "create", "updates": {}, "owner_id": 70412355, "subscription_id": 318842, "event_time": 1777785630 }"#;
    /// printf '%s' "1777785631.$BODY" | openssl dgst -sha256 -hmac simulated-secret
    const DIGEST: &str = "342700d2de41c5bb3345dafee6d154d5984c360d5595d2608de727db68a161a3";
    const AT: i64 = 1_777_785_631;

    fn app() -> App {
        App {
            oauth: crate::providers::Provider::spec(&crate::providers::strava::PROVIDER).oauth.as_ref().unwrap(),
            client_id: "90417".to_owned(),
            client_secret: "simulated-secret".into(),
            authorize_url: String::new(),
            token_url: String::new(),
            revoke_url: None,
        }
    }

    fn known() -> Vec<Known> {
        vec![Known { external_id: "318842".to_owned(), secret: Some("told-only-to-strava".into()) }]
    }

    struct Case {
        header: Option<String>,
        body: &'static str,
        now_s: i64,
        path_token: bool,
        signature_required: bool,
    }

    impl Case {
        fn signed(header: &str) -> Self {
            Self { header: Some(header.to_owned()), body: BODY, now_s: AT, path_token: true, signature_required: true }
        }

        fn verify(&self) -> Result<(), &'static str> {
            let mut headers = HeaderMap::new();
            if let Some(header) = &self.header {
                headers.insert(SIGNATURE, HeaderValue::from_str(header).unwrap());
            }
            let inbound = Inbound { method: "POST", headers: &headers, query: "", body: self.body.as_bytes() };
            let (app, subscriptions) = (app(), known());
            let trust = Trust {
                app: &app,
                secret: None,
                subscriptions: &subscriptions,
                path_token: self.path_token,
                signature_required: self.signature_required,
                now_ms: self.now_s * 1000 + 999,
            };
            verify(&inbound, &trust).map_err(|untrusted| untrusted.0)
        }
    }

    #[test]
    fn signatures_made_with_another_tool() {
        let good = format!("t={AT},v1={DIGEST}");
        assert_eq!(Case::signed(&good).verify(), Ok(()));
        assert_eq!(Case::signed(&format!("v1={}, t={AT}", DIGEST.to_uppercase())).verify(), Ok(()));
        for late in [AT - 300, AT + 300] {
            assert_eq!(Case { now_s: late, ..Case::signed(&good) }.verify(), Ok(()), "{late}");
        }
        for late in [AT - 301, AT + 301] {
            assert!(Case { now_s: late, ..Case::signed(&good) }.verify().is_err(), "{late}");
        }
        // With the signature, the path needs no token.
        assert_eq!(Case { path_token: false, ..Case::signed(&good) }.verify(), Ok(()));
        let changed = r#"{ "object_type": "activity", "object_id": 18234567891, "aspect_type": "create", "updates": {}, "owner_id": 70412355, "subscription_id": 318842, "event_time": 1777785630 }"#;
        assert_eq!(Case { body: changed, ..Case::signed(&good) }.verify(), Err("the signature is another one"));
        let wrong = format!("t={AT},v1={}", DIGEST.replace(['0', '1', '2'], "3"));
        assert_eq!(Case::signed(&wrong).verify(), Err("the signature is another one"));
        let later = format!("t={},v1={DIGEST}", AT + 1);
        assert_eq!(Case::signed(&later).verify(), Err("the signature is another one"));
        for malformed in [
            String::new(),
            "nonsense".to_owned(),
            DIGEST.to_owned(),
            format!("t={AT}"),
            format!("v1={DIGEST}"),
            format!("t=soon,v1={DIGEST}"),
            format!("t={AT},v1={}", &DIGEST[..62]),
            format!("t={AT},v1={}", DIGEST.replace('a', "g").replace('b', "é")),
            format!("t={AT},t={AT},v1={DIGEST}"),
            format!("t={},v1={DIGEST}", i64::MIN),
        ] {
            assert!(Case::signed(&malformed).verify().is_err(), "{malformed}");
        }
        assert!(Case { header: None, ..Case::signed("") }.verify().is_err());
    }

    #[test]
    fn without_a_signature_path_and_subscription_decide() {
        let plain = || Case { header: None, signature_required: false, ..Case::signed("") };
        assert_eq!(plain().verify(), Ok(()));
        assert_eq!(Case { header: Some("t=1,v1=nonsense".to_owned()), ..plain() }.verify(), Ok(()));
        assert!(Case { path_token: false, ..plain() }.verify().is_err());
        let text = r#"{"object_type":"activity","object_id":1,"aspect_type":"create","owner_id":2,"subscription_id":"318842","event_time":3}"#;
        assert_eq!(Case { body: text, ..plain() }.verify(), Ok(()), "an id may be a text");
        for other in [
            r#"{"object_type":"activity","object_id":1,"aspect_type":"create","owner_id":2,"subscription_id":318843,"event_time":3}"#,
            r#"{"object_type":"activity","object_id":1,"aspect_type":"create","owner_id":2,"subscription_id":"pending","event_time":3}"#,
            r#"{"object_type":"activity","object_id":1,"aspect_type":"create","owner_id":2,"event_time":3}"#,
        ] {
            assert!(Case { body: other, ..plain() }.verify().is_err(), "{other}");
        }
    }

    fn shake(query: &str) -> Option<Handshake> {
        let (app, subscriptions) = (app(), known());
        let trust = Trust {
            app: &app,
            secret: None,
            subscriptions: &subscriptions,
            path_token: false,
            signature_required: false,
            now_ms: 0,
        };
        handshake(&Inbound { method: "GET", headers: &HeaderMap::new(), query, body: b"" }, &trust)
    }

    #[test]
    fn the_challenge_goes_back_to_who_knows_the_token() {
        let good = "hub.mode=subscribe&hub.challenge=8c0e%264b&hub.verify_token=told-only-to-strava";
        assert_eq!(shake(good), Some(Handshake::Answer(json!({ "hub.challenge": "8c0e&4b" }))));
        assert_eq!(shake(""), Some(Handshake::Invalid("Invalid hub.mode")));
        assert_eq!(shake(&good.replace("subscribe", "unsubscribe")), Some(Handshake::Invalid("Invalid hub.mode")));
        for token in ["told-only-to-strav", "told-only-to-strava1", ""] {
            let bad = format!("hub.mode=subscribe&hub.challenge=1&hub.verify_token={token}");
            assert_eq!(shake(&bad), Some(Handshake::Forbidden("Invalid verify token")), "{token}");
        }
        let without = "hub.mode=subscribe&hub.verify_token=told-only-to-strava";
        assert_eq!(shake(without), Some(Handshake::Invalid("Field required")));
    }

    #[test]
    fn a_refusal_quotes_no_secret() {
        let secrets = [SecretString::from("short secret".to_owned()), SecretString::from("f00d".repeat(12))];
        let body = format!("no: 'short secret', '{}' at {}", "f00d".repeat(12), "/path");
        let told = refused(400, body.as_bytes(), &secrets.each_ref()).to_string();
        assert_eq!(told, "Strava answered 400: no: '[left out]', '[left out]' at /path");
        for (status, body) in [(409, ""), (400, r#"{"errors":[{"code":"already exists"}]}"#)] {
            assert_eq!(refused(status, body.as_bytes(), &[]), SubscriptionError::Exists);
        }
    }

    fn notices(object: &str, aspect: &str, updates: &str) -> Vec<Notice> {
        let body = format!(
            r#"{{"object_type":"{object}","object_id":7,"aspect_type":"{aspect}","updates":{updates},"owner_id":7,"subscription_id":1,"event_time":5}}"#
        );
        read_delivery(body.as_bytes()).unwrap()
    }

    #[test]
    fn every_form_of_event_is_read() {
        let changed = vec![Notice::Changed { account: "7".into(), kind: Kind::Workout, external_id: "7".into() }];
        let gone = vec![Notice::Gone { account: "7".into(), kind: Kind::Workout, external_id: "7".into() }];
        let ended = vec![Notice::Lifecycle { account: "7".into(), event: Lifecycle::Deauthorized }];
        assert_eq!(notices("activity", "create", "{}"), changed);
        assert_eq!(notices("activity", "update", r#"{"title":"Abendrunde 🌙","type":"TrailRun","private":"true"}"#), changed);
        assert_eq!(notices("activity", "update", r#"{"private":false}"#), changed);
        assert_eq!(notices("activity", "delete", "{}"), gone);
        assert_eq!(notices("athlete", "update", r#"{"authorized":"false"}"#), ended);
        assert_eq!(notices("athlete", "update", r#"{"authorized":false}"#), ended);
        assert_eq!(notices("athlete", "update", r#"{"authorized":"False"}"#), ended);
        assert_eq!(notices("athlete", "delete", "{}"), ended);
        let none = vec![Notice::Other { account: "7".into() }];
        for other in ["{}", r#"{"authorized":"true"}"#, r#"{"authorized":null}"#, r#"{"weight":"70"}"#] {
            assert_eq!(notices("athlete", "update", other), none, "{other}");
        }
        for (object, aspect) in [("route", "create"), ("activity", "foo"), ("activity\\u0000", "create"), ("", "")] {
            assert_eq!(notices(object, aspect, "{}"), none, "{object} {aspect}");
        }
        for bad in ["", "{}", "[]", "null", r#"{"object_type":"activity"}"#, "{\"object_type\":\"activity\",\"object_id\":{}}"] {
            assert!(read_delivery(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn equal_events_have_one_key_and_others_have_others() {
        let key = |body: &str| {
            dedup_key(&Inbound { method: "POST", headers: &HeaderMap::new(), query: "", body: body.as_bytes() })
        };
        let event = |id: &str, aspect: &str, updates: &str, time: &str| {
            format!(
                r#"{{"object_type":"activity","object_id":{id},"aspect_type":"{aspect}","updates":{updates},"owner_id":7,"subscription_id":1,"event_time":{time}}}"#
            )
        };
        let first = key(&event("1", "update", r#"{"title":"a","type":"Run"}"#, "5")).unwrap();
        assert_eq!(first, key(&event("\"1\"", "update", r#"{"type":"Run", "title":"a"}"#, "5")).unwrap());
        for other in [
            event("2", "update", r#"{"title":"a","type":"Run"}"#, "5"),
            event("1", "create", r#"{"title":"a","type":"Run"}"#, "5"),
            event("1", "update", r#"{"title":"b","type":"Run"}"#, "5"),
            event("1", "update", r#"{"title":"a","type":"Run"}"#, "6"),
        ] {
            assert_ne!(first, key(&other).unwrap(), "{other}");
        }
        let named = |body: &str| key(body).unwrap().unwrap();
        assert!(named(&event("1", "create", "{}", "5")).starts_with("activity:1:create:5:7:"));
        let strange = ["x".repeat(300), "a\\u0000b".to_owned()].map(|aspect| named(&event("1", &aspect, "{}", "5")));
        assert!(strange.iter().all(|key| key.len() < 60 && key.starts_with("activity:1:other:5:7:")), "{strange:?}");
        assert_ne!(strange[0], strange[1]);
        let numbers = ["0", "-5", "1.5", "\"\"", "\"../../oauth/token\"", "\"a\\u0000b\"", "\"1 2\"", "1e30", "null", "{}"];
        for bad in numbers {
            let owned = event("1", "create", "{}", "5").replace("\"owner_id\":7", &format!("\"owner_id\":{bad}"));
            for body in [event(bad, "create", "{}", "5"), owned] {
                assert!(key(&body).is_err() && read_delivery(body.as_bytes()).is_err(), "{body}");
            }
        }
        for time in ["-1", "\"\\u0000\"", "1.5"] {
            assert!(key(&event("1", "create", "{}", time)).is_err(), "{time}");
        }
    }
}
