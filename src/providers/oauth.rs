//! The calls of OAuth 2.0, by hand: three form fields more or less per provider, and no second HTTP stack.
//! Whether a refusal kills a grant is the engine's decision; this only says what was answered.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{DateTime, Duration, Utc};
use rand::RngCore as _;
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};
use url::Url;

use super::http::{Http, excerpt, read_body, transient};
use super::{ClientAuth, OAuthSpec};

/// The access token of a grant that cannot be refreshed is taken from its sealed row this often.
const LONG_LIVED_S: i64 = 3600;

/// Our application at a provider.
#[derive(Clone)]
pub struct App {
    /// How the provider's OAuth works.
    pub oauth: &'static OAuthSpec,
    /// Public.
    pub client_id: String,
    /// Secret.
    pub client_secret: SecretString,
    /// Where people agree.
    pub authorize_url: String,
    /// Where tokens are exchanged.
    pub token_url: String,
    /// Where grants are given back, with [`super::Leave::Revoke`].
    pub revoke_url: Option<String>,
}

/// Whose grant it is, as far as known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// The provider's id of the person.
    pub id: Option<String>,
    /// The name that the person has there.
    pub username: Option<String>,
    /// What was granted, in the provider's words; `None`: not told.
    pub scopes: Option<Vec<String>>,
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
    /// Whose it is, where the answer tells.
    pub owner: Owner,
}

/// What a callback brought, and what we kept for it.
#[derive(Clone, Debug)]
pub struct Code {
    /// Good once.
    pub code: SecretString,
    /// Ours, where the provider takes PKCE.
    pub verifier: Option<SecretString>,
    /// The address that the person was sent back to; `None` for a code that was pasted.
    pub callback_url: Option<String>,
}

/// 32 random bytes as 43 letters that need no escaping in an address: a state, or a verifier.
#[must_use]
pub fn random_secret() -> SecretString {
    let mut bytes = [0; 32];
    rand::rng().fill_bytes(&mut bytes);
    SecretString::from(URL_SAFE_NO_PAD.encode(bytes))
}

/// Where the person agrees. `verifier` is only hashed here; it is left out where the provider takes none.
///
/// # Errors
/// When the address set for it is none.
pub fn authorize_url(
    app: &App,
    callback_url: &str,
    state: &SecretString,
    verifier: Option<&SecretString>,
) -> Result<Url, url::ParseError> {
    let spec = app.oauth;
    let mut url = Url::parse(&app.authorize_url)?;
    {
        let mut query = url.query_pairs_mut();
        query
            .append_pair("response_type", "code")
            .append_pair("client_id", &app.client_id)
            .append_pair("redirect_uri", callback_url)
            .append_pair("state", state.expose_secret());
        if let Some(verifier) = verifier {
            let challenge = URL_SAFE_NO_PAD.encode(Sha256::digest(verifier.expose_secret().as_bytes()));
            query.append_pair("code_challenge", &challenge).append_pair("code_challenge_method", "S256");
        }
        if !spec.scopes.is_empty() {
            let names: Vec<&str> = spec.scopes.iter().map(|scope| scope.name).collect();
            query.append_pair("scope", &names.join(spec.scope_separator));
        }
        query.extend_pairs(spec.authorize_params);
    }
    Ok(url)
}

/// Scopes as told: with blanks or commas between.
#[must_use]
pub fn split_scopes(text: &str) -> Vec<String> {
    let mut scopes: Vec<String> = text.split([' ', ',']).filter(|scope| !scope.is_empty()).map(str::to_owned).collect();
    scopes.sort_unstable();
    scopes.dedup();
    scopes
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
    /// Asked too often, or not working just now: worth trying again.
    Later,
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
    app: &App,
    refresh_token: &SecretString,
    now: DateTime<Utc>,
) -> Result<Grant, TokenError> {
    if !app.oauth.refreshes {
        return Ok(Grant {
            access_token: refresh_token.clone(),
            expires_at: now + Duration::seconds(LONG_LIVED_S),
            refresh_token: None,
            owner: Owner::default(),
        });
    }
    let mut fields = vec![("grant_type", "refresh_token"), ("refresh_token", refresh_token.expose_secret())];
    fields.extend(app.oauth.refresh_params);
    request(http, app, fields, now).await
}

/// Trades an authorization code for a grant.
///
/// # Errors
/// [`TokenError`], see there.
pub async fn exchange(http: &Http, app: &App, code: &Code, now: DateTime<Utc>) -> Result<Grant, TokenError> {
    let mut fields = vec![("grant_type", "authorization_code"), ("code", code.code.expose_secret())];
    if let Some(verifier) = &code.verifier {
        fields.push(("code_verifier", verifier.expose_secret()));
    }
    if let Some(callback) = code.callback_url.as_deref().filter(|_| app.oauth.redirect_in_exchange) {
        fields.push(("redirect_uri", callback));
    }
    let mut grant = match (request(http, app, fields.clone(), now).await, app.oauth.code_settles) {
        (Err(TokenError::Refused { refusal: Refusal::Grant, .. }), Some(pause)) => {
            tokio::time::sleep(pause).await;
            request(http, app, fields, now).await?
        }
        (first, _) => first?,
    };
    if !app.oauth.refreshes {
        grant.refresh_token = Some(grant.access_token.clone());
    }
    Ok(grant)
}

/// Gives a grant back at the provider, as RFC 7009 has it. A token that is unknown there is as good as given back.
///
/// # Errors
/// [`TokenError`], see there.
pub async fn revoke(http: &Http, app: &App, url: &str, token: &SecretString) -> Result<(), TokenError> {
    let call = http
        .client()
        .post(url)
        .basic_auth(&app.client_id, Some(app.client_secret.expose_secret()))
        .form(&[("token", token.expose_secret()), ("token_type_hint", "refresh_token")]);
    let (status, body) = answer(call).await?;
    if status >= 400 {
        let detail = without(&excerpt(&body), &[token.expose_secret(), app.client_secret.expose_secret()]);
        return Err(TokenError::Refused { refusal: Refusal::Other, detail: format!("{status} {detail}") });
    }
    Ok(())
}

/// A text without any of these secrets: some providers quote what they refuse.
fn without(text: &str, secrets: &[&str]) -> String {
    let mut text = text.to_owned();
    for secret in secrets.iter().filter(|secret| !secret.is_empty()) {
        text = text.replace(secret, "[left out]");
    }
    text
}

/// Sends a call whose body is a secret; 5xx and 429 are worth another try.
async fn answer(call: reqwest::RequestBuilder) -> Result<(u16, bytes::Bytes), TokenError> {
    let response =
        call.header(reqwest::header::ACCEPT, "application/json").send().await.map_err(|error| {
            TokenError::Transient { detail: transient(&error).to_string(), spent: !error.is_connect() }
        })?;
    let status = response.status().as_u16();
    let body = read_body(response)
        .await
        .map_err(|error| TokenError::Transient { detail: error.to_string(), spent: status < 400 })?;
    if status >= 500 || status == 429 {
        return Err(TokenError::Transient { detail: format!("the token endpoint answered {status}"), spent: false });
    }
    Ok((status, body))
}

async fn request(http: &Http, app: &App, mut form: Vec<(&str, &str)>, now: DateTime<Utc>) -> Result<Grant, TokenError> {
    let spec = app.oauth;
    let secrets: Vec<&str> = form
        .iter()
        .filter(|(name, _)| matches!(*name, "code" | "code_verifier" | "refresh_token"))
        .map(|(_, value)| *value)
        .chain([app.client_secret.expose_secret()])
        .collect();
    form.extend(spec.token_params);
    let mut call = http.client().post(&app.token_url);
    match spec.client_auth {
        ClientAuth::Body => {
            form.push(("client_id", &app.client_id));
            form.push(("client_secret", app.client_secret.expose_secret()));
        }
        ClientAuth::Basic => call = call.basic_auth(&app.client_id, Some(app.client_secret.expose_secret())),
    }
    let (status, body) = answer(call.form(&form)).await?;
    if let Some(refusal) = (spec.read_refusal)(status, &body) {
        let detail = without(&excerpt(&body), &secrets);
        return Err(if refusal == Refusal::Later {
            TokenError::Transient { detail: format!("the token endpoint asks for patience: {detail}"), spent: false }
        } else {
            TokenError::Refused { refusal, detail }
        });
    }
    // The body holds tokens: no error may quote it.
    let unreadable =
        || TokenError::Transient { detail: "the token endpoint's answer cannot be read".to_owned(), spent: true };
    let whole: Value = serde_json::from_slice(&body).map_err(|_| unreadable())?;
    let inner = whole.pointer(spec.grant_at).ok_or_else(unreadable)?;
    let answer = TokenAnswer::deserialize(inner).map_err(|_| unreadable())?;
    let expires_at = match (answer.expires_at, answer.expires_in) {
        // The life left is told against our clock, the instant against theirs: ours is the one we compare with.
        (_, Some(seconds)) => now + Duration::seconds(seconds.clamp(0, 10 * 365 * 86_400)),
        (Some(at), None) => DateTime::from_timestamp(at, 0).ok_or_else(unreadable)?,
        (None, None) => now + Duration::hours(1),
    };
    let mut owner = (spec.owner_in_grant)(inner);
    if spec.scopes_told == super::ScopesTold::Grant {
        owner.scopes = inner.get("scope").and_then(Value::as_str).map(split_scopes);
    }
    Ok(Grant { access_token: answer.access_token, expires_at, refresh_token: answer.refresh_token, owner })
}

/// A claim of a token that is a JWT. Its signature is not looked at: it came from the provider itself, by TLS.
#[must_use]
pub fn jwt_claim(token: &str, name: &str) -> Option<String> {
    let payload = token.split('.').nth(1)?;
    let payload: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload.trim_end_matches('=')).ok()?).ok()?;
    payload.get(name)?.as_str().map(str::to_owned)
}
