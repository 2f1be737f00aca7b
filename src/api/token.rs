//! Access tokens: JSON Web Tokens (HS256) that we give out and check ourselves. The key is derived from the vault's and
//! stored nowhere. Written out because we take only what we made: one header, one algorithm, nothing to negotiate.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{DateTime, Duration, Utc};
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::error::Error;
use crate::storage::{Bearer, TokenOwner};
use crate::sync::Engine;
use crate::vault::{self, Vault};

/// Seconds that an access token works.
pub(super) const LIFE_S: i64 = 3600;

const PURPOSE: &str = "access token";
const HEADER: &str = r#"{"alg":"HS256","typ":"JWT"}"#;
const SDK: &str = "sdk";

#[derive(Serialize, Deserialize)]
struct Claims {
    sub: Uuid,
    exp: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    scope: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    app_id: Option<String>,
}

/// What a token that we signed and that is not over says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Token {
    /// A developer's.
    Developer(Bearer),
    /// A user's, for what a telephone sends.
    Sdk,
}

/// A new access token.
pub(super) fn issue(vault: &Vault, owner: &TokenOwner, now: DateTime<Utc>) -> String {
    let exp = now.timestamp() + LIFE_S;
    let claims = match owner {
        TokenOwner::Developer(id) => Claims { sub: *id, exp, scope: None, app_id: None },
        TokenOwner::User { user, app_id } => {
            Claims { sub: user.0, exp, scope: Some(SDK.to_owned()), app_id: Some(app_id.clone()) }
        }
    };
    let claims = serde_json::to_vec(&claims).unwrap_or_default();
    let message = format!("{}.{}", URL_SAFE_NO_PAD.encode(HEADER), URL_SAFE_NO_PAD.encode(claims));
    let signature = vault.sign(PURPOSE, message.as_bytes());
    format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature))
}

/// An access token and the refresh token that gets the next one.
#[derive(Serialize, ToSchema)]
pub(super) struct Tokens {
    /// Goes into `Authorization: Bearer`.
    pub(super) access_token: String,
    /// Always `bearer`.
    pub(super) token_type: &'static str,
    /// Goes into `POST /api/v1/token/refresh`, once.
    pub(super) refresh_token: String,
    /// Seconds that the access token works.
    pub(super) expires_in: i64,
}

impl Tokens {
    fn new(engine: &Engine, owner: &TokenOwner, refresh: &SecretString) -> Self {
        Self {
            access_token: issue(&engine.vault, owner, engine.clock.now()),
            token_type: "bearer",
            refresh_token: refresh.expose_secret().to_owned(),
            expires_in: LIFE_S,
        }
    }
}

fn new_refresh_token() -> (SecretString, Vec<u8>) {
    let secret = vault::new_secret("rt-", 16);
    let hash = vault::hash_secret(secret.expose_secret());
    (secret, hash)
}

/// Gives out a new pair of tokens.
pub(super) async fn issue_both(engine: &Engine, owner: &TokenOwner) -> Result<Tokens, Error> {
    let (secret, hash) = new_refresh_token();
    engine.db.insert_refresh_token(&hash, owner, engine.clock.now()).await?;
    Ok(Tokens::new(engine, owner, &secret))
}

/// Gives out the next pair for a refresh token, which ends. `None`: it has ended before, or never was.
pub(super) async fn refresh(engine: &Engine, shown: &SecretString) -> Result<Option<Tokens>, Error> {
    let (secret, hash) = new_refresh_token();
    let old = vault::hash_secret(shown.expose_secret());
    let owner = engine.db.replace_refresh_token(&old, &hash, engine.clock.now()).await?;
    Ok(owner.map(|owner| Tokens::new(engine, &owner, &secret)))
}

/// When a developer's token ends.
pub(super) fn ends_at(bearer: Bearer) -> DateTime<Utc> {
    bearer.issued_at + Duration::seconds(LIFE_S)
}

/// What this text is, if we made it and it still works.
pub(super) fn read(vault: &Vault, text: &str, now: DateTime<Utc>) -> Option<Token> {
    let (message, signature) = text.rsplit_once('.')?;
    let (header, claims) = message.split_once('.')?;
    if URL_SAFE_NO_PAD.decode(header).ok()? != HEADER.as_bytes()
        || !vault.is_signed(PURPOSE, message.as_bytes(), &URL_SAFE_NO_PAD.decode(signature).ok()?)
    {
        return None;
    }
    let claims: Claims = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).ok()?).ok()?;
    if claims.exp <= now.timestamp() {
        return None;
    }
    match claims.scope.as_deref() {
        None => {
            let issued_at = DateTime::from_timestamp(claims.exp, 0)? - Duration::seconds(LIFE_S);
            Some(Token::Developer(Bearer { developer: claims.sub, issued_at }))
        }
        Some(SDK) => Some(Token::Sdk),
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::UserId;

    fn vault(fill: &str) -> Vault {
        Vault::new(&SecretString::from(fill.repeat(32)), &[]).unwrap()
    }

    fn at(s: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(s, 0).unwrap()
    }

    #[test]
    fn a_token_works_for_an_hour_and_with_its_key() {
        let (vault, other) = (vault("41"), self::vault("42"));
        let id = Uuid::now_v7();
        let token = issue(&vault, &TokenOwner::Developer(id), at(1000));
        let bearer = Token::Developer(Bearer { developer: id, issued_at: at(1000) });
        assert_eq!(read(&vault, &token, at(1000 + LIFE_S - 1)), Some(bearer));
        assert_eq!(read(&vault, &token, at(1000 + LIFE_S)), None);
        assert_eq!(read(&other, &token, at(1000)), None);
        let owner = TokenOwner::User { user: UserId::new(), app_id: "app_1".to_owned() };
        assert_eq!(read(&vault, &issue(&vault, &owner, at(0)), at(0)), Some(Token::Sdk));
    }

    /// Anybody's library reads them: RFC 7515 with the algorithm named.
    #[test]
    fn a_token_has_the_claims_of_the_contract() {
        let id = Uuid::now_v7();
        let part = |token: &str, n| {
            let text = URL_SAFE_NO_PAD.decode(token.split('.').nth(n).unwrap()).unwrap();
            serde_json::from_slice::<serde_json::Value>(&text).unwrap()
        };
        let token = issue(&vault("41"), &TokenOwner::Developer(id), at(0));
        assert_eq!(part(&token, 0), serde_json::json!({"alg": "HS256", "typ": "JWT"}));
        assert_eq!(part(&token, 1), serde_json::json!({"sub": id, "exp": LIFE_S}));
        let owner = TokenOwner::User { user: UserId(id), app_id: "app_1".to_owned() };
        let expected = serde_json::json!({"sub": id, "exp": LIFE_S, "scope": "sdk", "app_id": "app_1"});
        assert_eq!(part(&issue(&vault("41"), &owner, at(0)), 1), expected);
    }

    #[test]
    fn nothing_else_is_taken() {
        let vault = vault("41");
        let token = issue(&vault, &TokenOwner::Developer(Uuid::now_v7()), at(0));
        let parts: Vec<&str> = token.split('.').collect();
        let forged = |header: &str, claims: &str| {
            format!("{}.{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims), parts[2])
        };
        let other = format!("{{\"sub\":\"{}\",\"exp\":99999999999}}", Uuid::now_v7());
        let unsigned = format!("{}.{}.", URL_SAFE_NO_PAD.encode(r#"{"alg":"none"}"#), parts[1]);
        let signed = |header: &str, claims: &str| {
            let message = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
            let signature = URL_SAFE_NO_PAD.encode(vault.sign(PURPOSE, message.as_bytes()));
            format!("{message}.{signature}")
        };
        for text in [
            String::new(),
            "..".to_owned(),
            "é.é.é".to_owned(),
            token[..token.len() - 1].to_owned(),
            format!("{token}."),
            forged(HEADER, &other),
            unsigned,
            signed(r#"{"alg":"none"}"#, &other),
            signed(HEADER, r#"{"sub":"x","exp":99999999999}"#),
            signed(HEADER, &format!("{{\"sub\":\"{}\"}}", Uuid::now_v7())),
            signed(HEADER, &format!("{{\"sub\":\"{}\",\"exp\":99999999999,\"scope\":\"x\"}}", Uuid::now_v7())),
        ] {
            assert_eq!(read(&vault, &text, at(0)), None, "{text}");
        }
        assert!(read(&vault, &signed(HEADER, &other), at(0)).is_some());
    }
}
