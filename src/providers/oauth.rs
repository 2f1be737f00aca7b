//! The two token calls of OAuth 2.0, by hand: three form fields more or less per provider, and no second HTTP stack.
//! Whether a refusal kills a grant is the engine's decision; this only says what was answered.

use chrono::{DateTime, Duration, Utc};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::Value;

use super::http::{Http, excerpt, read_body, transient};
use super::{ClientAuth, OAuthSpec};

/// Our application at a provider.
#[derive(Clone, Debug)]
pub struct App {
    /// Public.
    pub client_id: String,
    /// Secret.
    pub client_secret: SecretString,
    /// Where tokens are exchanged.
    pub token_url: String,
}

/// What the token endpoint gave.
#[derive(Clone, Debug)]
pub struct Grant {
    /// Lives for hours; never stored in the database.
    pub access_token: SecretString,
    /// When it ends.
    pub expires_at: DateTime<Utc>,
    /// Replaces the stored one; absent: the stored one stays.
    pub refresh_token: Option<SecretString>,
    /// The account, where the answer names it.
    pub provider_user_id: Option<String>,
}

/// What a refusal of the token endpoint means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The refresh token or code is not (or no longer) good.
    Grant,
    /// Client id or secret are wrong: says nothing about the grant.
    Client,
    /// The application is switched off: says nothing about the grant.
    AppDisabled,
    /// Something else: says nothing about the grant.
    Other,
}

/// Why no token came.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TokenError {
    /// The endpoint answered no.
    #[error("the provider refused the token request: {detail}")]
    Refused {
        /// What it means.
        refusal: Refusal,
        /// Its words, cut short; never holds a token of ours.
        detail: String,
    },
    /// Worth trying again.
    #[error("{detail}")]
    Transient {
        /// What happened.
        detail: String,
        /// The provider may have taken the token: the call was sent, and no whole answer came.
        spent: bool,
    },
}

#[derive(Deserialize)]
struct TokenAnswer {
    access_token: SecretString,
    #[serde(default)]
    refresh_token: Option<SecretString>,
    /// Seconds since 1970 (Strava).
    #[serde(default)]
    expires_at: Option<i64>,
    /// Seconds from now.
    #[serde(default)]
    expires_in: Option<i64>,
}

/// Trades the stored refresh token for an access token.
///
/// # Errors
/// [`TokenError`], see there.
pub async fn refresh(
    http: &Http,
    spec: &OAuthSpec,
    app: &App,
    refresh_token: &SecretString,
    now: DateTime<Utc>,
) -> Result<Grant, TokenError> {
    let fields = [("grant_type", "refresh_token"), ("refresh_token", refresh_token.expose_secret())];
    request(http, spec, app, &fields, now).await
}

/// Trades an authorization code for a grant.
///
/// # Errors
/// [`TokenError`], see there.
pub async fn exchange(
    http: &Http,
    spec: &OAuthSpec,
    app: &App,
    code: &SecretString,
    now: DateTime<Utc>,
) -> Result<Grant, TokenError> {
    let fields = [("grant_type", "authorization_code"), ("code", code.expose_secret())];
    request(http, spec, app, &fields, now).await
}

async fn request(
    http: &Http,
    spec: &OAuthSpec,
    app: &App,
    fields: &[(&str, &str)],
    now: DateTime<Utc>,
) -> Result<Grant, TokenError> {
    let mut form = fields.to_vec();
    let mut call = http.client().post(&app.token_url);
    match spec.client_auth {
        ClientAuth::Body => {
            form.push(("client_id", &app.client_id));
            form.push(("client_secret", app.client_secret.expose_secret()));
        }
        ClientAuth::Basic => call = call.basic_auth(&app.client_id, Some(app.client_secret.expose_secret())),
    }
    let response = call
        .form(&form)
        .send()
        .await
        .map_err(|error| TokenError::Transient { detail: transient(&error).to_string(), spent: !error.is_connect() })?;
    let status = response.status().as_u16();
    let body = read_body(response)
        .await
        .map_err(|error| TokenError::Transient { detail: error.to_string(), spent: status < 400 })?;
    if status >= 500 || status == 429 {
        return Err(TokenError::Transient { detail: format!("the token endpoint answered {status}"), spent: false });
    }
    if status >= 400 {
        return Err(TokenError::Refused { refusal: (spec.read_refusal)(status, &body), detail: excerpt(&body) });
    }
    // The body holds tokens: no error may quote it.
    let unreadable =
        || TokenError::Transient { detail: "the token endpoint's answer cannot be read".to_owned(), spent: true };
    let answer: TokenAnswer = serde_json::from_slice(&body).map_err(|_| unreadable())?;
    let whole: Value = serde_json::from_slice(&body).map_err(|_| unreadable())?;
    let expires_at = match (answer.expires_at, answer.expires_in) {
        // The life left is told against our clock, the instant against theirs: ours is the one we compare with.
        (_, Some(seconds)) => now + Duration::seconds(seconds.clamp(0, 10 * 365 * 86_400)),
        (Some(at), None) => DateTime::from_timestamp(at, 0).ok_or_else(unreadable)?,
        (None, None) => now + Duration::hours(1),
    };
    Ok(Grant {
        access_token: answer.access_token,
        expires_at,
        refresh_token: answer.refresh_token,
        provider_user_id: (spec.account_in_grant)(&whole),
    })
}
