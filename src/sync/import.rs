//! The plain settings of people's scripts (`STRAVA_REFRESH_TOKEN`, …) become a user and a connection.

use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest, Sha256};

use super::accept::connect_with_grant;
use super::connect::{ConnectError, connect_with_code};
use super::{Engine, Error, ProviderSetup};
use crate::model::{ConnectionId, UserId};
use crate::providers::oauth::Code;
use crate::storage::{NewUser, User, UserFilter};

/// The user that is made when there is none.
const ONLY_USER: &str = "me";

/// What a person brings.
#[derive(Clone, Debug)]
pub enum NewGrant {
    /// A refresh token.
    RefreshToken(SecretString),
    /// An authorization code, good once.
    AuthorizationCode(SecretString),
}

/// Connects a user with what a person brought.
///
/// # Errors
/// In plain words: the provider refused the code or the token, or is not set up.
pub async fn connect(
    engine: &Engine,
    setup: &ProviderSetup,
    user: UserId,
    grant: &NewGrant,
    imported_hash: Option<Vec<u8>>,
) -> Result<ConnectionId, Error> {
    match grant {
        NewGrant::RefreshToken(token) => connect_with_grant(engine, setup, user, token, None, imported_hash).await,
        NewGrant::AuthorizationCode(code) => {
            let code = Code { code: code.clone(), verifier: None, callback_url: None };
            match connect_with_code(engine, setup, user, &code, None, imported_hash).await {
                Ok(connected) => Ok(connected.connection),
                Err(ConnectError::Internal(error)) => Err(error),
                Err(error) => Err(Error::Settings(format!("{}: {error}", setup.spec().title))),
            }
        }
    }
}

/// Takes in what the plain settings hold, once per pasted secret: the stored, rotated token is the newer one from then
/// on. Without any user it makes `me`; with several users it asks for `connections add` instead.
///
/// # Errors
/// When the database fails, or a provider refuses what was pasted.
pub async fn import_plain_settings(engine: &Engine) -> Result<Vec<String>, Error> {
    let mut told = Vec::new();
    for setup in engine.providers.values() {
        let grant = match (&setup.config.refresh_token, &setup.config.authorization_code) {
            (Some(token), _) => NewGrant::RefreshToken(token.clone()),
            (None, Some(code)) => NewGrant::AuthorizationCode(code.clone()),
            (None, None) => continue,
        };
        let pasted = match &grant {
            NewGrant::RefreshToken(secret) | NewGrant::AuthorizationCode(secret) => secret,
        };
        let hash = Sha256::digest(pasted.expose_secret().as_bytes()).to_vec();
        let name = setup.spec().name.0;
        if engine.db.is_imported(name, &hash).await? {
            continue;
        }
        let users =
            engine.db.list_users(&UserFilter { sort_by: "created_at", limit: 2, ..UserFilter::default() }).await?;
        let user = match users.rows.as_slice() {
            [] => {
                let user = make_only_user(engine).await?;
                told.push(format!("made user `{ONLY_USER}` ({})", user.id));
                user
            }
            [only] => only.user.clone(),
            _ => {
                told.push(format!(
                    "a token for {name} is set, but there are several users: use `wearsync connections add --user …`"
                ));
                continue;
            }
        };
        match connect(engine, setup, user.id, &grant, Some(hash)).await {
            Ok(_) => told.push(format!("connected {name} with the token from the settings")),
            // What is stored works: no reason to stop.
            Err(Error::NotTaken(why)) => told.push(format!("the token from the settings was not taken: {why}")),
            Err(error) => return Err(error),
        }
    }
    Ok(told)
}

/// The user of an installation that has one, made if there is none yet; `None` with several.
///
/// # Errors
/// When the database fails.
pub async fn only_user(engine: &Engine) -> Result<Option<User>, Error> {
    let filter = UserFilter { sort_by: "created_at", limit: 2, ..UserFilter::default() };
    let mut rows = engine.db.list_users(&filter).await?.rows;
    Ok(match (rows.pop(), rows.is_empty()) {
        (None, _) => Some(make_only_user(engine).await?),
        (Some(only), true) => Some(only.user),
        (Some(_), false) => None,
    })
}

async fn make_only_user(engine: &Engine) -> Result<User, Error> {
    let new = NewUser { external_user_id: Some(ONLY_USER.to_owned()), ..NewUser::default() };
    Ok(engine.db.insert_user(new, engine.now()).await?)
}
