//! Accepting work: a request becomes a run row, and the ready list hears of it.

use chrono::{DateTime, Utc};
use sha2::{Digest, Sha256};

use super::connect::{Bring, store_grant};
use super::{Engine, Error, ProviderSetup};
use crate::model::{AccountId, BEGINNING_MS, Class, ConnectionId, DataType, RunSource, SyncRequest, UserId};
use crate::providers::{AccessToken, DataPart, ProviderSpec, oauth};
use crate::storage::{Accepted, NewAccount, NewRun};
use crate::telemetry;

/// Why a request is refused before anything is written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The provider has none of what was asked for.
    #[error("{0}")]
    Unsupported(String),
    /// A bound makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The connection is not active (any more).
    #[error("No active connection found for provider")]
    NoConnection,
}

/// Whether a provider has what is asked for; the mirrored API's texts.
///
/// # Errors
/// [`Refused::Unsupported`].
pub fn check_support(spec: &ProviderSpec, data_type: DataType) -> Result<(), Refused> {
    let (workouts, daily) = (spec.supports(DataPart::Workouts), spec.supports(DataPart::Daily));
    let name = spec.name;
    let text = match data_type {
        DataType::Workouts if !workouts => format!("Provider '{name}' does not support workouts"),
        DataType::Daily if !daily => {
            format!("Provider '{name}' does not support 247 data (sleep/recovery/activity)")
        }
        DataType::All if !workouts && !daily => format!("Provider '{name}' does not support any requested data types"),
        _ => return Ok(()),
    };
    Err(Refused::Unsupported(text))
}

/// A Unix time as people write it: below 10^11 seconds, else milliseconds. 0 is the beginning.
///
/// # Errors
/// [`Refused::Invalid`] for negative times and for those beyond the year 2200.
pub fn since_ms(value: i64) -> Result<i64, Refused> {
    if value < 0 {
        return Err(Refused::Invalid("Input should be greater than or equal to 0".to_owned()));
    }
    if value == 0 {
        return Ok(BEGINNING_MS);
    }
    let ms = if value < 100_000_000_000 { value.saturating_mul(1000) } else { value };
    // The first instant of the year 2200.
    if ms >= 7_258_118_400_000 {
        return Err(Refused::Invalid("since lies beyond the year 2200; write Unix seconds or milliseconds".to_owned()));
    }
    Ok(ms)
}

/// Checks the bounds of a request against each other and the clock, and what the provider has.
///
/// # Errors
/// [`Refused`].
pub fn parse_request(spec: &ProviderSpec, request: &SyncRequest, now: DateTime<Utc>) -> Result<(), Refused> {
    check_support(spec, request.data_type)?;
    if let (Some(since), Some(until)) = (request.since_ms, request.until_ms)
        && until <= since
    {
        return Err(Refused::Invalid("the end of the range lies before its start".to_owned()));
    }
    if request.since_ms.is_some_and(|since| since > now.timestamp_millis()) {
        return Err(Refused::Invalid("the start of the range lies in the future".to_owned()));
    }
    Ok(())
}

/// Equal work has an equal key: connection, data, bounds and flags.
#[must_use]
pub fn request_key(connection: ConnectionId, request: &SyncRequest) -> String {
    let text = serde_json::to_string(request).unwrap_or_default();
    let digest = Sha256::new().chain_update(connection.0.as_bytes()).chain_update(text).finalize();
    digest[..16].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Accepts a run: on disk when this answers. `once`: API key, idempotency key and digest of the HTTP request.
///
/// # Errors
/// [`Error`]; `Ok(None)`: the connection is not active.
pub async fn submit(
    engine: &Engine,
    setup: &ProviderSetup,
    connection: ConnectionId,
    request: &SyncRequest,
    class: Class,
    source: RunSource,
    once: Option<(uuid::Uuid, &str, &[u8])>,
) -> Result<Option<Accepted>, Error> {
    let now = engine.now();
    let new = NewRun {
        connection,
        class,
        source,
        request: serde_json::to_string(request).map_err(|error| Error::Corrupt(error.to_string()))?,
        request_key: request_key(connection, request),
    };
    let accepted = match once {
        None => engine.db.insert_run(new, now).await?,
        Some((key_id, key, hash)) => engine.db.insert_run_once(new, key_id, key, hash, now).await?,
    };
    let Some(accepted) = accepted else { return Ok(None) };
    if accepted.is_new {
        telemetry::run_accepted(accepted.id, setup.spec().name, class, source);
    }
    // The row is the truth; a lost push costs one sweep.
    if let Err(error) = engine.shared.push(accepted.id, accepted.class, now.timestamp_millis()).await {
        telemetry::redis_down(&error);
    }
    Ok(Some(accepted))
}

/// Makes a user's connection from a refresh token that a person brought. Where the connection has a working grant, the
/// token is tried before that one is given up.
///
/// # Errors
/// [`Error::NotTaken`]: the token is not good, or could not be tried, and everything is as it was. When the provider is not
/// set up here, or the database fails.
pub async fn connect_with_grant(
    engine: &Engine,
    setup: &ProviderSetup,
    user: UserId,
    refresh_token: &secrecy::SecretString,
    provider_user_id: Option<&str>,
    imported_hash: Option<Vec<u8>>,
) -> Result<ConnectionId, Error> {
    let spec = setup.spec();
    let app = app(setup)?;
    let now = engine.now();
    let id = AccountId::new();
    let bring = Bring { refresh_token, owner: None, access: None };
    if provider_user_id.is_none()
        && let Some(known) = account_of(engine, user, spec.name.0, &app.client_id).await?
    {
        // A pasted token does not say whose it is. Who has a connection most likely gives it a new grant: records and
        // windows stay. The first profile that is read with it tells if it is another person's after all.
        let grant = engine.try_token(setup, app, known, refresh_token).await?;
        let bring = match &grant {
            Some(grant) => Bring {
                refresh_token: grant.refresh_token.as_ref().unwrap_or(refresh_token),
                owner: None,
                access: Some(AccessToken {
                    secret: grant.access_token.clone(),
                    version: 0,
                    expires_at: grant.expires_at,
                }),
            },
            None => bring,
        };
        let connection = store_grant(engine, setup, user, known, bring).await?;
        if let Some(hash) = imported_hash {
            engine.db.note_imported(known, hash).await?;
        }
        return Ok(connection);
    }
    let account = engine
        .db
        .upsert_account(
            NewAccount {
                id,
                provider: spec.name.0.to_owned(),
                client_id: app.client_id.clone(),
                provider_user_id: provider_user_id.map_or_else(|| format!("pending:{id}"), str::to_owned),
                imported_hash,
            },
            now,
        )
        .await?;
    store_grant(engine, setup, user, account.id, bring).await
}

/// The account that a user's connection to a provider reads with, if it is one of this application.
async fn account_of(
    engine: &Engine,
    user: UserId,
    provider: &str,
    client_id: &str,
) -> Result<Option<AccountId>, Error> {
    let connections = engine.db.list_connections(Some(user)).await?;
    let Some(view) = connections.iter().find(|view| view.connection.provider == provider) else { return Ok(None) };
    let account = engine.db.find_account(view.connection.account_id).await?;
    Ok(account.filter(|account| account.client_id == client_id).map(|account| account.id))
}

/// Our application at a provider.
///
/// # Errors
/// When it is not set up, in words that say what to set.
pub fn app(setup: &ProviderSetup) -> Result<&oauth::App, Error> {
    setup.app.as_ref().ok_or_else(|| {
        let upper = setup.spec().name.0.to_uppercase();
        Error::Settings(format!(
            "{} is not set up: set WEARSYNC_PROVIDERS__{upper}__CLIENT_ID and WEARSYNC_PROVIDERS__{upper}__CLIENT_SECRET",
            setup.spec().title
        ))
    })
}
