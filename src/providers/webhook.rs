//! What a provider's webhooks are: who may be believed, what a delivery says, how they are subscribed to.
//!
//! Everything here but [`Subscriptions`] is pure: the engine reads the body, keeps the journal and does the work. One form
//! serves all: a thin signed or unsigned event names one item; a body for several accounts makes several notices;
//! a handshake or a probe is answered by [`WebhookSpec::handshake`], by `GET`, `HEAD` or a `POST` with a body of its own;
//! a form body is read like a JSON one. What signs is the client secret, a secret that the provider tells when it is
//! subscribed to, or one that is set at both ends; [`is_signed`] compares.
//!
//! A provider that names a window, sends the data itself, or tells of permissions adds its variant of [`Notice`] or
//! [`Lifecycle`]: [`Notice::account`] and the engine's one function from notices to requests are the only places that
//! look into them. Subscriptions are the application's; where they are a person's, made with the person's token, they
//! come and go with the connection, by a function of [`super::Provider`] beside `fetch_owner` and `deregister`.

use std::time::Duration;

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use reqwest::header::HeaderMap;
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::Sha256;

use super::http::Http;
use super::oauth::App;
use crate::model::Kind;

/// A provider's webhooks, as data and pure functions.
pub struct WebhookSpec {
    /// The largest body that is read, bytes.
    pub body_limit: usize,
    /// A call is answered within this: somewhat less than the provider waits.
    pub answer_within: Duration,
    /// The secret of its signatures is set at the provider and in our settings; without it nothing is taken.
    pub needs_secret: bool,
    /// Headers kept with a delivery, in lower case.
    pub headers: &'static [&'static str],
    /// Answers what is no delivery: the validation of a new subscription, a probe. Asked first, before anything is
    /// verified, for every method.
    pub handshake: fn(&Inbound<'_>, &Trust<'_>) -> Option<Handshake>,
    /// Whether the sender is the provider, by the raw body. Compares secrets in constant time.
    pub verify: fn(&Inbound<'_>, &Trust<'_>) -> Result<(), Untrusted>,
    /// The provider's own name of the event: equal ones are one delivery. `None`: it has none, and equal bodies within ten
    /// minutes are one.
    pub dedup_key: fn(&Inbound<'_>) -> Result<Option<String>, BadBody>,
    /// What a delivery says. Pure: the same delivery says the same, also when it is replayed.
    pub read_delivery: fn(&[u8]) -> Result<Vec<Notice>, BadBody>,
    /// Manages subscriptions, where the provider has an interface for it.
    pub subscriptions: Option<&'static dyn Subscriptions>,
}

/// A request as it came in.
#[derive(Clone, Copy, Debug)]
pub struct Inbound<'a> {
    /// `GET`, `HEAD` or `POST`.
    pub method: &'a str,
    /// Headers.
    pub headers: &'a HeaderMap,
    /// The query, as sent.
    pub query: &'a str,
    /// The body, as sent.
    pub body: &'a [u8],
}

impl Inbound<'_> {
    /// A header's text; empty where it is missing or no text.
    #[must_use]
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }
}

/// What a sender is held against.
#[derive(Clone, Copy)]
pub struct Trust<'a> {
    /// Our application; its secret signs at some providers.
    pub app: &'a App,
    /// The secret of its signatures, as set; there is one where [`WebhookSpec::needs_secret`].
    pub secret: Option<&'a SecretString>,
    /// Our subscriptions, with what was agreed on for them.
    pub subscriptions: &'a [Known],
    /// The path ended in the token that only the provider was told.
    pub path_token: bool,
    /// A setting says that signatures are needed.
    pub signature_required: bool,
    /// Now, milliseconds.
    pub now_ms: i64,
}

/// One of our subscriptions.
#[derive(Clone, Debug)]
pub struct Known {
    /// The provider's id of it; [`PENDING`] while it is being made.
    pub external_id: String,
    /// Verify token or signing key.
    pub secret: Option<SecretString>,
}

/// The id of a subscription that the provider has not named yet.
pub const PENDING: &str = "pending";

/// The answer to what is no delivery.
#[derive(Clone, Debug, PartialEq)]
pub enum Handshake {
    /// 200 with this.
    Answer(Value),
    /// 400 with this text.
    Invalid(&'static str),
    /// 403 with this text.
    Forbidden(&'static str),
}

/// The sender may be anybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Untrusted(pub &'static str);

/// The body cannot be read; never quotes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadBody(pub &'static str);

/// How a digest is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Digits {
    /// 64 hex digits, of either case.
    Hex,
    /// Base64 with its padding.
    Base64,
}

/// Whether `told` is the HMAC-SHA256 of the pieces, one after the other, by this key. In constant time.
#[must_use]
pub fn is_signed(key: &SecretString, pieces: &[&[u8]], told: &str, digits: Digits) -> bool {
    let told = match digits {
        Digits::Hex => from_hex(told),
        Digits::Base64 => STANDARD.decode(told).ok(),
    };
    let Ok(mac) = Hmac::<Sha256>::new_from_slice(key.expose_secret().as_bytes()) else { return false };
    let mac = pieces.iter().fold(mac, |mac, piece| mac.chain_update(piece));
    told.is_some_and(|told| mac.verify_slice(&told).is_ok())
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    if digits.len() != 64 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    (0..32).map(|n| u8::from_str_radix(text.get(2 * n..2 * n + 2)?, 16).ok()).collect()
}

/// One thing that a delivery says of one account.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "notice")]
pub enum Notice {
    /// An item is new or changed: to be fetched.
    Changed {
        /// The provider's id of the person.
        account: String,
        /// What the item is.
        kind: Kind,
        /// The provider's id of it.
        external_id: String,
    },
    /// An item is said to be gone: to be confirmed.
    Gone {
        /// The provider's id of the person.
        account: String,
        /// What the item is.
        kind: Kind,
        /// The provider's id of it.
        external_id: String,
    },
    /// The grant is said to have changed: to be confirmed.
    Lifecycle {
        /// The provider's id of the person.
        account: String,
        /// What happened to it.
        event: Lifecycle,
    },
    /// Something that we have no use for: noted, so that the delivery goes when the person's data does.
    Other {
        /// The provider's id of the person.
        account: String,
    },
}

impl Notice {
    /// Of whom it speaks.
    #[must_use]
    pub fn account(&self) -> &str {
        match self {
            Self::Changed { account, .. }
            | Self::Gone { account, .. }
            | Self::Lifecycle { account, .. }
            | Self::Other { account } => account,
        }
    }
}

/// What happened to a grant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lifecycle {
    /// The person took it back.
    Deauthorized,
}

/// A subscription as the provider tells it.
#[derive(Clone, Debug, PartialEq)]
pub struct Subscription {
    /// Its id there.
    pub external_id: String,
    /// Where deliveries go.
    pub callback_url: String,
    /// The provider's own words, as a whole.
    pub told: Value,
}

/// A subscription that was made just now.
#[derive(Clone, Debug)]
pub struct Made {
    /// As the provider tells it, without the secret.
    pub subscription: Subscription,
    /// What it signs with, where it tells that, once: kept instead of ours.
    pub secret: Option<SecretString>,
}

/// Why a call about subscriptions failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubscriptionError {
    /// There is one already: list, then decide.
    #[error("the application has a subscription already")]
    Exists,
    /// The provider said no, or nothing.
    #[error("{0}")]
    Failed(String),
}

/// The provider's interface for subscriptions. Calls are the application's own, not a person's.
#[async_trait]
pub trait Subscriptions: Send + Sync {
    /// All of the application.
    async fn list(&self, calls: &AppCalls<'_>) -> Result<Vec<Subscription>, SubscriptionError>;

    /// Makes one; the provider may validate the address before it answers. `secret` comes back in the handshake, where
    /// there is one.
    async fn create(
        &self,
        calls: &AppCalls<'_>,
        callback_url: &str,
        secret: &SecretString,
    ) -> Result<Made, SubscriptionError>;

    /// Ends one. One that is gone already is no failure.
    async fn delete(&self, calls: &AppCalls<'_>, external_id: &str) -> Result<(), SubscriptionError>;
}

/// The application's own way to a provider.
#[derive(Clone, Copy)]
pub struct AppCalls<'a> {
    /// The shared client.
    pub http: &'a Http,
    /// The application.
    pub app: &'a App,
    /// Prefix of every path; no slash at its end.
    pub base_url: &'a str,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One byte off, in each piece, the key and the digest.
    fn check(key: &str, pieces: &[&str], told: &str, digits: Digits) {
        let holds = |key: &str, pieces: &[&str], told: &str| {
            let pieces: Vec<&[u8]> = pieces.iter().map(|piece| piece.as_bytes()).collect();
            is_signed(&SecretString::from(key.to_owned()), &pieces, told, digits)
        };
        let off = |text: &str, n: usize| {
            let mut bytes = text.as_bytes().to_vec();
            bytes[n] = if bytes[n] == b'1' { b'2' } else { b'1' };
            String::from_utf8(bytes).unwrap()
        };
        assert!(holds(key, pieces, told));
        assert!(holds(key, &[&pieces.concat()], told), "where a piece ends is no part of it");
        for n in [0, key.len() / 2, key.len() - 1] {
            assert!(!holds(&off(key, n), pieces, told), "key, byte {n}");
        }
        for (i, piece) in pieces.iter().enumerate() {
            for n in [0, piece.len() / 2, piece.len() - 1] {
                let changed = off(piece, n);
                let mut pieces = pieces.to_vec();
                pieces[i] = &changed;
                assert!(!holds(key, &pieces, told), "piece {i}, byte {n}");
            }
        }
        for n in 0..told.len() {
            assert!(!holds(key, pieces, &off(told, n)), "digest, byte {n}");
        }
        for other in ["", " ", &told[..told.len() - 1], &format!("{told}0"), &format!(" {told}"), "é", &"g".repeat(64)]
        {
            assert!(!holds(key, pieces, other), "{other}");
        }
    }

    /// The examples of the providers' documents.
    #[test]
    fn digests_of_polar_suunto_and_whoop() {
        let exercise = r#"{"event":"EXERCISE","user_id":60214377,"entity_id":"q7RkZp2","timestamp":"2026-03-21T06:52:12Z","url":"https://www.polaraccesslink.com/v3/exercises/q7RkZp2"}"#;
        let polar = "1f23d56283b332fa077d4ad6df3bbaa353171745af4023176cf9092bc0820643";
        check("0f9d7c11-6a52-4a5f-a3a0-4c1a2bb3c4d5", &[exercise], polar, Digits::Hex);
        let recovery = r#"{"type":"SUUNTO_247_RECOVERY_CREATED","username":"nordic.runner","samples":[]}"#;
        let suunto = "34d6b6694a5c3522f80202d9a54b3413ec28cb14789dd728f8bfab35151aad62";
        check("suunto-demo-secret", &[recovery], suunto, Digits::Hex);
        let sleep = r#"{"user_id":7310042,"id":"5d0f6c0a-8b0a-4a37-9c22-1f6a3f0e9b10","type":"sleep.updated","trace_id":"c0a8012e-11aa-4e0e-9f1d-6a1f0d7f3b21"}"#;
        let whoop = "f0DjpPjufVgrfLW9+wBeetzgI2magIECoXow37HVfOw=";
        check("whoop-demo-secret", &["1774080000123", sleep], whoop, Digits::Base64);
    }
}
