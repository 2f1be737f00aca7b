//! Calls to providers: permits first, time-outs, size limits, no redirects. Errors carry what the engine needs to
//! decide, and never a token.

use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use chrono::{DateTime, Utc};
use futures::StreamExt;
use reqwest::header::{HeaderMap, RETRY_AFTER};
use secrecy::{ExposeSecret, SecretString};

use crate::model::quota::Seen;
use crate::providers::ProviderSpec;
use crate::telemetry;

/// The largest body that is read: forty thousand points of eleven streams take about 8 MiB.
const MAX_BODY: usize = 64 << 20;
/// The longest that one call may take, its body included.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Shorter than any token we know; longer than any word of an error text.
const SHORTEST_TOKEN: usize = 24;

/// The client all providers share.
#[derive(Clone, Debug)]
pub struct Http {
    client: reqwest::Client,
}

impl Http {
    /// A client with our limits.
    ///
    /// # Errors
    /// When the TLS set-up of the machine cannot be read.
    pub fn new() -> Result<Self, reqwest::Error> {
        // Installing twice is refused and harmless: the first one stays.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(CALL_TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("wearsync/", env!("CARGO_PKG_VERSION")))
            .build()?;
        Ok(Self { client })
    }

    pub(crate) fn client(&self) -> &reqwest::Client {
        &self.client
    }
}

/// An access token and the version of the grant it came from: a 401 invalidates that version only.
#[derive(Clone, Debug)]
pub struct AccessToken {
    /// The secret.
    pub secret: SecretString,
    /// Version of the account's token.
    pub version: i64,
    /// When it ends.
    pub expires_at: DateTime<Utc>,
}

/// Hands out permits for calls, and takes in what answers tell of the quotas.
#[async_trait]
pub trait Gate: Send + Sync {
    /// Takes one permit, or says when to come back.
    async fn take(&self) -> Result<(), DateTime<Utc>>;
    /// Takes in what a response told.
    async fn observe(&self, seen: &[Seen]);
    /// The provider refused a call for its rate: says when to come back, not before the provider's own word if it gave
    /// one.
    async fn refused(&self, retry_after: Option<Duration>) -> DateTime<Utc>;
}

/// Why a fetch brought nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    /// The access token of this version was refused.
    #[error("the provider refused the access token")]
    Unauthorized {
        /// Version of the token that was used.
        version: i64,
    },
    /// No quota is left until then; no attempt is used.
    #[error("the provider's quota is spent until {until}")]
    Quota {
        /// When to come back.
        until: DateTime<Utc>,
    },
    /// Worth trying again: 5xx, broken connection, time-out.
    #[error("{detail}")]
    Transient {
        /// What happened, in plain words.
        detail: String,
        /// The provider's own word on when to come back.
        retry_after: Option<Duration>,
    },
    /// The grant lacks a scope; trying again does not help until the person connects again.
    #[error("the grant lacks the permission {scope}; connect again and allow it")]
    MissingScope {
        /// As the provider names it.
        scope: String,
    },
    /// The provider has switched the application off for everybody.
    #[error("the provider has switched this application off: {detail}")]
    AppDisabled {
        /// Its words.
        detail: String,
    },
    /// It is not there (404, 410).
    #[error("the provider does not have it")]
    Gone,
    /// The answer cannot be read: broken or oversized.
    #[error("{detail}")]
    Unreadable {
        /// What is wrong with it; never quotes the content.
        detail: String,
    },
    /// The provider refused the call itself; the same call would be refused again.
    #[error("the provider answered {status}: {detail}")]
    Rejected {
        /// HTTP status.
        status: u16,
        /// Its words, cut short.
        detail: String,
    },
}

/// An answer of any status.
#[derive(Clone, Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// Headers.
    pub headers: HeaderMap,
    /// The whole body.
    pub body: Bytes,
}

impl Answer {
    /// `Retry-After` in seconds, where the provider sends one.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        let seconds: u64 = self.headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
        // A day is longer than any quota we know; more is a mistake.
        Some(Duration::from_secs(seconds.min(86_400)))
    }

    /// The start of the body as text, for error messages: at most 500 characters, one line.
    #[must_use]
    pub fn excerpt(&self) -> String {
        excerpt(&self.body)
    }
}

/// The start of a body as text: at most 500 characters, control characters as blanks, and whatever could be a token
/// left out, because error texts are stored and logged.
#[must_use]
pub fn excerpt(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(&body[..body.len().min(2048)]);
    let mut out = String::new();
    let mut word = String::new();
    for c in text.chars().chain([' ']) {
        if c.is_ascii_alphanumeric() || "_-.~+/=".contains(c) {
            word.push(c);
            continue;
        }
        // No word of a sentence is as long as the shortest token.
        out.push_str(if word.len() < SHORTEST_TOKEN { &word } else { "[left out]" });
        word.clear();
        out.push(if c.is_control() { ' ' } else { c });
    }
    out.trim().chars().take(500).collect()
}

/// One account's way to one provider.
pub struct Api<'a> {
    /// The shared client.
    pub http: &'a Http,
    /// The provider, as data.
    pub spec: &'static ProviderSpec,
    /// Prefix of every path; no slash at its end.
    pub base_url: &'a str,
    /// Whose data.
    pub token: &'a AccessToken,
    /// The quotas.
    pub gate: &'a dyn Gate,
}

impl Api<'_> {
    /// `GET base_url + path` with the account's token. Any status is an answer, except those that mean the same for
    /// every provider: 401 of the token itself is left to the provider's client, which knows its bodies.
    ///
    /// # Errors
    /// [`FetchError::Quota`] before anything is sent; [`FetchError::Transient`] when no whole answer came;
    /// [`FetchError::Unreadable`] when it is too large.
    pub async fn get(&self, path: &str, query: &[(&str, String)]) -> Result<Answer, FetchError> {
        self.gate.take().await.map_err(|until| FetchError::Quota { until })?;
        let request = self
            .http
            .client
            .get(format!("{}{path}", self.base_url))
            .query(query)
            .bearer_auth(self.token.secret.expose_secret());
        let begun = Instant::now();
        let answer = self.receive(request).await;
        let status = answer.as_ref().map_or(0, |answer| answer.status);
        telemetry::call(self.spec.name, status, begun.elapsed().as_secs_f64());
        answer
    }

    async fn receive(&self, request: reqwest::RequestBuilder) -> Result<Answer, FetchError> {
        let response = request.send().await.map_err(|error| transient(&error))?;
        let status = response.status().as_u16();
        let headers = response.headers().clone();
        self.gate.observe(&(self.spec.read_quotas)(&headers)).await;
        let body = read_body(response).await?;
        Ok(Answer { status, headers, body })
    }
}

/// Reads a body to its end, or to our limit.
pub(crate) async fn read_body(response: reqwest::Response) -> Result<Bytes, FetchError> {
    let oversized = || FetchError::Unreadable { detail: format!("the answer is larger than {} MiB", MAX_BODY >> 20) };
    if response.content_length().is_some_and(|length| length > MAX_BODY as u64) {
        return Err(oversized());
    }
    let mut body = BytesMut::new();
    let mut stream = response.bytes_stream();
    while let Some(piece) = stream.next().await {
        let piece = piece.map_err(|error| transient(&error))?;
        if body.len() + piece.len() > MAX_BODY {
            return Err(oversized());
        }
        body.extend_from_slice(&piece);
    }
    Ok(body.freeze())
}

/// What a failed call means, without the address: addresses can carry secrets.
pub(crate) fn transient(error: &reqwest::Error) -> FetchError {
    let what = if error.is_timeout() {
        "the provider did not answer in time"
    } else if error.is_connect() {
        "no connection to the provider"
    } else {
        "the connection to the provider broke"
    };
    FetchError::Transient { detail: what.to_owned(), retry_after: None }
}

#[cfg(test)]
mod tests {
    use super::excerpt;

    #[test]
    fn an_excerpt_is_short_and_holds_no_token() {
        let token = "5d0c6be1f1f84c1a9b7e20f0a3fbb2d19a6c7e44";
        let text = excerpt(format!("{{\"message\":\"Bad\nRequest\",\"refresh_token\":\"{token}\"}}").as_bytes());
        assert_eq!(text, r#"{"message":"Bad Request","refresh_token":"[left out]"}"#);
        assert_eq!(excerpt("x".repeat(200).as_bytes()), "[left out]");
        assert_eq!(excerpt("ä b ".repeat(1000).as_bytes()).chars().count(), 500);
    }
}
