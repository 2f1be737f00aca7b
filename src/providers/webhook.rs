//! What a provider's webhooks are: who may be believed, what a delivery says, how they are subscribed to.
//!
//! Everything here but [`Subscriptions`] is pure: the engine reads the body, keeps the journal and does the work. One form
//! serves all: a thin signed or unsigned event names one item; a body for several accounts makes several notices;
//! a handshake or a probe is answered by [`WebhookSpec::handshake`], by `GET`, `HEAD` or a `POST` with a body of its own;
//! a form body is read like a JSON one. A provider that sends a window or the data itself adds its kind of [`Notice`].

use async_trait::async_trait;
use reqwest::header::HeaderMap;
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::http::Http;
use super::oauth::App;
use crate::model::Kind;

/// A provider's webhooks, as data and pure functions.
pub struct WebhookSpec {
    /// The largest body that is read, bytes.
    pub body_limit: usize,
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
}

impl Notice {
    /// Of whom it speaks.
    #[must_use]
    pub fn account(&self) -> &str {
        match self {
            Self::Changed { account, .. } | Self::Gone { account, .. } | Self::Lifecycle { account, .. } => account,
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

    /// Makes one; the provider may validate the address before it answers. `secret` comes back in the handshake.
    async fn create(
        &self,
        calls: &AppCalls<'_>,
        callback_url: &str,
        secret: &SecretString,
    ) -> Result<Subscription, SubscriptionError>;

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
