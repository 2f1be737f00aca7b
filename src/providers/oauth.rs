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
pub(super) fn without(text: &str, secrets: &[&str]) -> String {
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

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use axum::extract::State;
    use axum::http::{HeaderMap, StatusCode};
    use axum::routing::post;
    use serde_json::json;

    use super::super::{Dead, Leave, Scope, ScopesTold};
    use super::*;

    /// The standard form of a token answer, and of a refusal.
    fn refusal(status: u16, body: &[u8]) -> Option<Refusal> {
        // An envelope tells its failures with 200, as one provider does.
        let told = serde_json::from_slice::<Value>(body).ok().and_then(|body| body.get("status")?.as_i64());
        match (status, told) {
            (_, Some(601)) => Some(Refusal::Later),
            (_, Some(1..)) => Some(Refusal::Grant),
            (400.., _) => Some(Refusal::Grant),
            _ => None,
        }
    }

    const SPEC: OAuthSpec = OAuthSpec {
        authorize_url: "https://provider.example/authorize",
        authorize_params: &[("access", "offline")],
        token_url: "",
        token_params: &[("action", "requesttoken")],
        refresh_params: &[("scope", "offline")],
        scopes: &[Scope { name: "a", lets: "a" }, Scope { name: "b", lets: "b" }],
        scope_separator: " ",
        scopes_told: ScopesTold::Grant,
        reads_with: &["b"],
        client_auth: ClientAuth::Basic,
        pkce: true,
        redirect_in_exchange: true,
        code_settles: None,
        grant_at: "/body",
        owner_in_grant: |grant| Owner {
            id: grant.get("access_token").and_then(Value::as_str).and_then(|token| jwt_claim(token, "sub")),
            ..Owner::default()
        },
        refreshes: true,
        idle_limit: None,
        dead: Dead::Once,
        read_refusal: refusal,
        leave: Leave::Never,
    };

    type Seen = Arc<Mutex<Vec<(String, String)>>>;

    /// A token endpoint that answers this, and what it was asked.
    async fn endpoint(oauth: OAuthSpec, status: u16, body: &'static str) -> (App, Seen) {
        let seen = Seen::default();
        let answer = move |State(seen): State<Seen>, headers: HeaderMap, form: String| async move {
            let client = headers.get("authorization").map(|value| value.to_str().unwrap().to_owned());
            seen.lock().unwrap().push((client.unwrap_or_default(), form));
            (StatusCode::from_u16(status).unwrap(), body)
        };
        let router = axum::Router::new().route("/token", post(answer)).with_state(seen.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/token", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        let app = App {
            oauth: Box::leak(Box::new(oauth)),
            client_id: "id".to_owned(),
            client_secret: SecretString::from("hidden".to_owned()),
            authorize_url: oauth.authorize_url.to_owned(),
            token_url: url.clone(),
            revoke_url: Some(url),
        };
        (app, seen)
    }

    fn code() -> Code {
        Code {
            code: SecretString::from("c0de".to_owned()),
            verifier: Some(SecretString::from("v3rifier".to_owned())),
            callback_url: Some("https://wear.example/cb".to_owned()),
        }
    }

    // {"sub":"ines","user":"x"}
    const GRANTED: &str = r#"{"status":0,"body":{"access_token":"h.eyJzdWIiOiJpbmVzIiwidXNlciI6IngifQ.s",
        "refresh_token":"r","expires_in":60,"scope":"b,a b"}}"#;

    #[tokio::test]
    async fn whatever_a_provider_wants_is_said_once() {
        let http = Http::new().unwrap();
        let now = DateTime::from_timestamp(1_770_000_000, 0).unwrap();
        let (app, seen) = endpoint(SPEC, 200, GRANTED).await;
        let grant = exchange(&http, &app, &code(), now).await.unwrap();
        let owner = Owner { id: Some("ines".to_owned()), username: None, scopes: Some(vec!["a".into(), "b".into()]) };
        assert_eq!((grant.owner, grant.expires_at), (owner, now + Duration::seconds(60)));
        refresh(&http, &app, &SecretString::from("old".to_owned()), now).await.unwrap();
        revoke(&http, &app, app.revoke_url.as_deref().unwrap(), &SecretString::from("old".to_owned())).await.unwrap();
        let seen = seen.lock().unwrap().clone();
        let basic = "Basic aWQ6aGlkZGVu";
        let expected = [
            "grant_type=authorization_code&code=c0de&code_verifier=v3rifier&redirect_uri=https%3A%2F%2Fwear.example%2Fcb&action=requesttoken",
            "grant_type=refresh_token&refresh_token=old&scope=offline&action=requesttoken",
            "token=old&token_type_hint=refresh_token",
        ];
        assert_eq!(seen, expected.map(|form| (basic.to_owned(), form.to_owned())));

        // The other way round: credentials in the body, no PKCE, no address, no refresh tokens.
        let plain = OAuthSpec {
            client_auth: ClientAuth::Body,
            redirect_in_exchange: false,
            refreshes: false,
            token_params: &[],
            ..SPEC
        };
        let (app, seen) = endpoint(plain, 200, GRANTED).await;
        let grant = exchange(&http, &app, &Code { verifier: None, ..code() }, now).await.unwrap();
        let kept = grant.refresh_token.unwrap();
        assert_eq!(kept.expose_secret(), grant.access_token.expose_secret(), "it is the grant");
        let again = refresh(&http, &app, &kept, now).await.unwrap();
        assert_eq!(again.access_token.expose_secret(), kept.expose_secret());
        let seen = seen.lock().unwrap().clone();
        let form = "grant_type=authorization_code&code=c0de&client_id=id&client_secret=hidden".to_owned();
        assert_eq!(seen, [(String::new(), form)], "nothing is asked to refresh it");
    }

    #[tokio::test]
    async fn refusals_quote_no_secret() {
        let http = Http::new().unwrap();
        let now = DateTime::from_timestamp(1_770_000_000, 0).unwrap();
        let body = r#"{"error":"invalid_grant","error_description":"bad c0de for hidden, v3rifier"}"#;
        let (app, _) = endpoint(SPEC, 400, body).await;
        let error = exchange(&http, &app, &code(), now).await.unwrap_err().to_string();
        assert!(error.contains("bad [left out] for [left out], [left out]"), "{error}");
        let error =
            revoke(&http, &app, app.revoke_url.as_deref().unwrap(), &SecretString::from("c0de".to_owned())).await;
        let error = error.unwrap_err().to_string();
        assert!(error.contains("bad [left out] for [left out]"), "{error}");
        let (app, _) = endpoint(SPEC, 200, r#"{"status":601,"error":"too often"}"#).await;
        let error = exchange(&http, &app, &code(), now).await.unwrap_err();
        assert!(matches!(error, TokenError::Transient { spent: false, .. }), "{error}");
        let (app, _) = endpoint(SPEC, 200, r#"{"status":293,"body":{}}"#).await;
        let error = exchange(&http, &app, &code(), now).await.unwrap_err();
        assert!(matches!(error, TokenError::Refused { refusal: Refusal::Grant, .. }), "{error}");
    }

    #[tokio::test]
    async fn a_code_that_has_to_settle_is_tried_once_more() {
        let http = Http::new().unwrap();
        let now = DateTime::from_timestamp(1_770_000_000, 0).unwrap();
        let settles = OAuthSpec { code_settles: Some(std::time::Duration::from_millis(1)), ..SPEC };
        let (app, seen) = endpoint(settles, 400, "{}").await;
        assert!(exchange(&http, &app, &code(), now).await.is_err());
        assert_eq!(seen.lock().unwrap().len(), 2);
    }

    #[test]
    fn the_consent_page_is_asked_as_the_provider_wants() {
        let app = App {
            oauth: &SPEC,
            client_id: "i d".to_owned(),
            client_secret: SecretString::from("hidden".to_owned()),
            authorize_url: "https://provider.example/authorize?fixed=1".to_owned(),
            token_url: String::new(),
            revoke_url: None,
        };
        let (state, verifier) = (SecretString::from("s".to_owned()), random_secret());
        let url = authorize_url(&app, "https://wear.example/cb?x=1", &state, Some(&verifier)).unwrap();
        let pairs: Vec<(String, String)> = url.query_pairs().into_owned().collect();
        let challenge = URL_SAFE_NO_PAD.encode(Sha256::digest(verifier.expose_secret().as_bytes()));
        let expected = json!([
            ["fixed", "1"],
            ["response_type", "code"],
            ["client_id", "i d"],
            ["redirect_uri", "https://wear.example/cb?x=1"],
            ["state", "s"],
            ["code_challenge", challenge],
            ["code_challenge_method", "S256"],
            ["scope", "a b"],
            ["access", "offline"],
        ]);
        assert_eq!(json!(pairs), expected);
        assert!(!url.as_str().contains(verifier.expose_secret()) && !url.as_str().contains("hidden"));
        assert_eq!(verifier.expose_secret().len(), 43);
        let missing: Vec<&str> = SPEC.missing(&["b".to_owned()]).iter().map(|scope| scope.name).collect();
        assert!(missing == ["a"] && SPEC.can_read(&["b".to_owned()]) && !SPEC.can_read(&["a".to_owned()]));
    }

    #[test]
    fn claims_are_read_of_jwts_alone() {
        assert_eq!(jwt_claim("h.eyJzdWIiOiJpbmVzIn0.s", "sub").as_deref(), Some("ines"));
        for text in ["", "x", "a.b.c", "h.eyJzdWIiOjF9.s"] {
            assert_eq!(jwt_claim(text, "sub"), None, "{text}");
        }
    }
}
