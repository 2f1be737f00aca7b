//! API keys: made, listed, renamed, rotated, revoked. What the mirrored API shows as a key's id, its text, is shown here
//! once, by the call that makes it; the id is public.

use std::sync::Arc;

use axum::Json;
use axum::extract::{FromRequestParts, State};
use axum::http::StatusCode;
use axum::http::request::Parts;
use chrono::{DateTime, Duration, Utc};
use secrecy::ExposeSecret as _;
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;
use uuid::Uuid;

use super::App;
use super::error::Error;
use super::extract::{Caller, JsonBody, MayAdmin, MaybeBody, argument, invalid, one_of, raw_path};
use crate::storage::{ApiKey, NewApiKey, NextApiKey};
use crate::vault;

/// Seconds that a rotated key goes on working when nobody says otherwise.
pub const OVERLAP_S: i64 = 86_400;

/// The longest that a rotated key goes on working: 30 days.
pub const OVERLAP_MOST_S: i64 = 30 * 86_400;

/// The longest name of a key.
const NAME_MOST: usize = 100;

/// What a key is for, as the command line takes it.
///
/// # Errors
/// What is wrong with it.
pub fn key_name(text: &str) -> Result<String, String> {
    argument(text, NAME_MOST)
}

const SCOPES: [&str; 3] = ["sync", "read", "admin"];

/// The longest life of a key that ends: ten years.
const LIFE_MOST_S: i64 = 3650 * 86_400;

/// A key. The secret is not kept and cannot be shown.
#[derive(Serialize, ToSchema)]
pub(super) struct ApiKeyRead {
    /// Its public id.
    id: Uuid,
    /// What it is for.
    name: String,
    /// The developer who made it; null: made otherwise.
    #[schema(required)]
    created_by: Option<Uuid>,
    /// When it was made.
    created_at: DateTime<Utc>,
    /// The first characters of the secret, to tell keys apart.
    prefix: String,
    /// What it may do: `sync`, `read`, `admin`.
    scopes: Vec<String>,
    /// When it stops working.
    #[schema(required)]
    expires_at: Option<DateTime<Utc>>,
    /// When it stops working because another key has taken its place.
    #[schema(required)]
    retires_at: Option<DateTime<Utc>>,
    /// When it was last used, to the minute.
    #[schema(required)]
    last_used_at: Option<DateTime<Utc>>,
}

impl From<ApiKey> for ApiKeyRead {
    fn from(it: ApiKey) -> Self {
        Self {
            id: it.id,
            name: it.name,
            created_by: it.created_by,
            created_at: it.created_at,
            prefix: it.prefix,
            scopes: it.scopes.split(',').map(str::to_owned).collect(),
            expires_at: it.expires_at,
            retires_at: it.retires_at,
            last_used_at: it.last_used_at,
        }
    }
}

/// A new key with its secret.
#[derive(Serialize, ToSchema)]
pub(super) struct ApiKeyMade {
    #[serde(flatten)]
    read: ApiKeyRead,
    /// The secret: goes into `X-API-Key`. It is shown this once.
    key: String,
}

/// The key in the path. Its text is quoted only if it is an id: it could be a secret.
pub(super) struct KeyPath(Uuid);

impl<S: Send + Sync> FromRequestParts<S> for KeyPath {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Error> {
        let params = raw_path(parts, state).await?;
        let (_, text) = params.iter().next().ok_or(Error::NoRoute)?;
        Uuid::parse_str(text).map(Self).map_err(|_| {
            let shown: String = text.chars().take(8).collect();
            unknown(&format!("{shown}…"))
        })
    }
}

fn unknown(id: &str) -> Error {
    let hint = Some("GET /api/v1/developer/api-keys lists the ids");
    Error::NotFound { detail: format!("Apikey with ID: {id} not found."), code: "unknown_key", hint }
}

/// List keys
///
/// All keys that are not revoked, newest first. Needs the scope `admin`.
#[utoipa::path(
    get,
    path = "/api/v1/developer/api-keys",
    operation_id = "list_keys",
    tag = "keys",
    responses((status = 200, description = "The keys", body = [ApiKeyRead], example = json!([{
        "id": "0198c0de-7e57-7a39-9d0c-2f8e1f0f4c77", "name": "Default", "created_by": null,
        "created_at": "2026-03-01T08:00:00Z", "prefix": "ws_AbCdEfG", "scopes": ["sync", "read"], "expires_at": null,
        "retires_at": null, "last_used_at": "2026-03-10T12:01:00Z"
    }])))
)]
pub(super) async fn list_keys(
    _: Caller<MayAdmin>,
    State(app): State<Arc<App>>,
) -> Result<Json<Vec<ApiKeyRead>>, Error> {
    let keys = app.state.engine.db.list_api_keys().await?;
    Ok(Json(keys.into_iter().filter(|key| key.revoked_at.is_none()).map(ApiKeyRead::from).collect()))
}

/// What makes a key.
#[derive(ToSchema)]
#[expect(dead_code, reason = "documents what `create_key` reads")]
pub(super) struct ApiKeyCreate {
    /// What it is for.
    #[schema(max_length = 100, default = "Default")]
    name: Option<String>,
    /// What it may do: `sync`, `read`, `admin`. Left out: `sync` and `read`.
    scopes: Option<Vec<String>>,
    /// Seconds that it works; left out: for ever.
    #[schema(minimum = 1, maximum = 315_360_000)]
    expires_in: Option<i64>,
}

/// Create a key
///
/// Answers the secret, this once. The body may be left out. Needs the scope `admin`.
#[utoipa::path(
    post,
    path = "/api/v1/developer/api-keys",
    operation_id = "create_key",
    tag = "keys",
    request_body(content = Option<ApiKeyCreate>, example = json!({"name": "dashboard", "scopes": ["read"]})),
    responses(
        (status = 201, description = "The key with its secret", body = ApiKeyMade, example = json!({
            "id": "0198c0de-7e57-7a39-9d0c-2f8e1f0f4c77", "name": "dashboard",
            "created_by": "0198c0de-5a0e-7a39-9d0c-2f8e1f0f4c77", "created_at": "2026-03-10T12:00:00Z",
            "prefix": "ws_AbCdEfG", "scopes": ["read"], "expires_at": null, "retires_at": null, "last_used_at": null,
            "key": "ws_AbCdEfG…"
        })),
        (status = 413, description = "The body is larger than 1 MiB", body = super::error::Body),
    )
)]
pub(super) async fn create_key(
    caller: Caller<MayAdmin>,
    State(app): State<Arc<App>>,
    MaybeBody(mut body): MaybeBody,
) -> Result<(StatusCode, Json<ApiKeyMade>), Error> {
    let name = body.text("name", NAME_MOST)?.unwrap_or_else(|| "Default".to_owned());
    let scopes = scopes(&mut body)?;
    let life = body.integer("expires_in", 1, LIFE_MOST_S)?;
    let engine = &app.state.engine;
    let now = engine.clock.now();
    let secret = vault::new_api_key();
    let new = NewApiKey {
        hash: vault::hash_secret(secret.expose_secret()),
        prefix: vault::key_prefix(&secret),
        name,
        scopes,
        created_by: caller.developer,
        expires_at: life.map(|life| now + Duration::seconds(life)),
    };
    let read = engine.db.insert_api_key(new, now).await?.into();
    Ok((StatusCode::CREATED, Json(ApiKeyMade { read, key: secret.expose_secret().to_owned() })))
}

fn scopes(body: &mut JsonBody) -> Result<String, Error> {
    let words = match body.take("scopes") {
        None | Some(Value::Null) => return Ok("sync,read".to_owned()),
        Some(Value::Array(words)) => words,
        Some(_) => return Err(invalid("Input should be a valid list")),
    };
    if let Some(stranger) = words.iter().find(|word| !word.as_str().is_some_and(|word| SCOPES.contains(&word))) {
        return Err(if stranger.is_string() { one_of(SCOPES) } else { invalid("Input should be a valid string") });
    }
    if words.is_empty() {
        return Err(invalid("List should have at least 1 item after validation, not 0"));
    }
    let has = |scope: &&str| words.iter().any(|word| word.as_str() == Some(scope));
    Ok(SCOPES.into_iter().filter(has).collect::<Vec<_>>().join(","))
}

/// What changes a key: a name that is null or left out stays.
#[derive(ToSchema)]
#[expect(dead_code, reason = "documents what `rename_key` reads")]
pub(super) struct ApiKeyUpdate {
    /// What it is for.
    #[schema(max_length = 100)]
    name: Option<String>,
}

/// Rename a key
///
/// The key goes on working. Needs the scope `admin`.
#[utoipa::path(
    patch,
    path = "/api/v1/developer/api-keys/{key_id}",
    operation_id = "rename_key",
    tag = "keys",
    params(("key_id" = Uuid, Path, description = "Public id of the key")),
    request_body(content = ApiKeyUpdate, example = json!({"name": "dashboard"})),
    responses(
        (status = 200, description = "The key", body = ApiKeyRead, example = json!({
            "id": "0198c0de-7e57-7a39-9d0c-2f8e1f0f4c77", "name": "dashboard", "created_by": null,
            "created_at": "2026-03-01T08:00:00Z", "prefix": "ws_AbCdEfG", "scopes": ["sync", "read"],
            "expires_at": null, "retires_at": null, "last_used_at": "2026-03-10T12:01:00Z"
        })),
        (status = 404, description = "No such key, or a revoked one", body = super::error::Body),
        (status = 413, description = "The body is larger than 1 MiB", body = super::error::Body),
    )
)]
pub(super) async fn rename_key(
    _: Caller<MayAdmin>,
    State(app): State<Arc<App>>,
    KeyPath(id): KeyPath,
    mut body: JsonBody,
) -> Result<Json<ApiKeyRead>, Error> {
    let name = body.text("name", NAME_MOST)?;
    let key = app.state.engine.db.rename_api_key(id, name).await?;
    Ok(Json(key.ok_or_else(|| unknown(&id.to_string()))?.into()))
}

/// Revoke a key
///
/// It ends at once, and is no longer listed. Needs the scope `admin`.
#[utoipa::path(
    delete,
    path = "/api/v1/developer/api-keys/{key_id}",
    operation_id = "revoke_key",
    tag = "keys",
    params(("key_id" = Uuid, Path, description = "Public id of the key")),
    responses(
        (status = 200, description = "The key that was", body = ApiKeyRead, example = json!({
            "id": "0198c0de-7e57-7a39-9d0c-2f8e1f0f4c77", "name": "dashboard", "created_by": null,
            "created_at": "2026-03-01T08:00:00Z", "prefix": "ws_AbCdEfG", "scopes": ["sync", "read"],
            "expires_at": null, "retires_at": null, "last_used_at": "2026-03-10T12:01:00Z"
        })),
        (status = 404, description = "No such key, or a revoked one", body = super::error::Body),
    )
)]
pub(super) async fn revoke_key(
    _: Caller<MayAdmin>,
    State(app): State<Arc<App>>,
    KeyPath(id): KeyPath,
) -> Result<Json<ApiKeyRead>, Error> {
    let engine = &app.state.engine;
    let key = engine.db.revoke_api_key(id, engine.clock.now()).await?;
    Ok(Json(key.ok_or_else(|| unknown(&id.to_string()))?.into()))
}

/// How a key is rotated.
#[derive(ToSchema)]
#[expect(dead_code, reason = "documents what `rotate_key` reads")]
pub(super) struct ApiKeyRotate {
    /// Seconds that the old key goes on working; 0: it ends at once.
    #[schema(minimum = 0, maximum = 2_592_000, default = 86_400)]
    overlap: Option<i64>,
}

/// Rotate a key
///
/// Answers a new key with the same name and scopes, and its secret, this once. The old one goes on working for a day, or
/// as long as `overlap` says. A key that expires is followed by one with as long a life. Needs the scope `admin`.
#[utoipa::path(
    post,
    path = "/api/v1/developer/api-keys/{key_id}/rotate",
    operation_id = "rotate_key",
    tag = "keys",
    params(("key_id" = Uuid, Path, description = "Public id of the key")),
    request_body(content = Option<ApiKeyRotate>, example = json!({"overlap": 3600})),
    responses(
        (status = 201, description = "The new key with its secret", body = ApiKeyMade, example = json!({
            "id": "0198c0de-8000-7a39-9d0c-2f8e1f0f4c77", "name": "dashboard", "created_by": null,
            "created_at": "2026-03-10T12:00:00Z", "prefix": "ws_HiJkLmN", "scopes": ["sync", "read"],
            "expires_at": null, "retires_at": null, "last_used_at": null, "key": "ws_HiJkLmN…"
        })),
        (status = 404, description = "No such key, or one that works no longer", body = super::error::Body),
        (status = 413, description = "The body is larger than 1 MiB", body = super::error::Body),
    )
)]
pub(super) async fn rotate_key(
    caller: Caller<MayAdmin>,
    State(app): State<Arc<App>>,
    KeyPath(id): KeyPath,
    MaybeBody(mut body): MaybeBody,
) -> Result<(StatusCode, Json<ApiKeyMade>), Error> {
    let overlap = body.integer("overlap", 0, OVERLAP_MOST_S)?.unwrap_or(OVERLAP_S);
    let engine = &app.state.engine;
    let now = engine.clock.now();
    let secret = vault::new_api_key();
    let next = NextApiKey {
        hash: vault::hash_secret(secret.expose_secret()),
        prefix: vault::key_prefix(&secret),
        created_by: caller.developer,
        old_until: now + Duration::seconds(overlap),
    };
    let (key, _) = engine.db.rotate_api_key(id, next, now).await?.ok_or_else(|| unknown(&id.to_string()))?;
    Ok((StatusCode::CREATED, Json(ApiKeyMade { read: key.into(), key: secret.expose_secret().to_owned() })))
}
