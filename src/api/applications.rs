//! Applications, and the tokens that they give out for users.

use std::sync::Arc;

use axum::Json;
use axum::extract::{FromRequestParts, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode};
use chrono::{DateTime, Utc};
use secrecy::{ExposeSecret as _, SecretString};
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::App;
use super::error::{Error, missing};
use super::extract::{Caller, Credentials, IdPath, JsonBody, MayAdmin, MaybeBody, allow, invalid, raw_path};
use super::token::{self, Tokens};
use crate::model::UserId;
use crate::storage::{Application, TokenOwner};
use crate::vault;

/// An application.
#[derive(Serialize, ToSchema)]
pub(super) struct ApplicationRead {
    /// Our id of it.
    id: Uuid,
    /// The id it names itself by.
    app_id: String,
    /// What it is.
    name: String,
    /// When it was made.
    created_at: DateTime<Utc>,
}

impl From<Application> for ApplicationRead {
    fn from(it: Application) -> Self {
        let Application { id, app_id, name, created_at } = it;
        Self { id, app_id, name, created_at }
    }
}

/// An application with its secret.
#[derive(Serialize, ToSchema)]
pub(super) struct ApplicationMade {
    #[serde(flatten)]
    read: ApplicationRead,
    /// The secret. It is shown this once.
    app_secret: String,
}

/// The application in the path.
pub(super) struct AppPath(String);

impl<S: Send + Sync> FromRequestParts<S> for AppPath {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Error> {
        let params = raw_path(parts, state).await?;
        let (_, text) = params.iter().next().ok_or(Error::NoRoute)?;
        if text.contains('\0') { Err(unknown()) } else { Ok(Self(text.to_owned())) }
    }
}

fn unknown() -> Error {
    let hint = Some("GET /api/v1/applications lists your own");
    Error::NotFound { detail: "Application not found".to_owned(), code: "unknown_application", hint }
}

/// List applications
///
/// The developer's own, newest first. A key stands for the developer who made it; one from the command line, which no
/// developer made, for all of them. Needs the scope `admin`.
#[utoipa::path(
    get,
    path = "/api/v1/applications",
    operation_id = "list_applications",
    tag = "applications",
    responses((status = 200, description = "The applications", body = [ApplicationRead], example = json!([{
        "id": "0198c0de-7e57-7a39-9d0c-2f8e1f0f4c77", "app_id": "app_0f1e2d3c4b5a69788796a5b4c3d2e1f0",
        "name": "telephone", "created_at": "2026-03-01T08:00:00Z"
    }])))
)]
pub(super) async fn list_applications(
    caller: Caller<MayAdmin>,
    State(app): State<Arc<App>>,
) -> Result<Json<Vec<ApplicationRead>>, Error> {
    let found = app.state.engine.db.list_applications(caller.developer).await?;
    Ok(Json(found.into_iter().map(ApplicationRead::from).collect()))
}

/// What makes an application.
#[derive(ToSchema)]
#[expect(dead_code, reason = "documents what `create_application` reads")]
pub(super) struct ApplicationCreate {
    /// What it is.
    #[schema(max_length = 100)]
    name: String,
}

/// Create an application
///
/// Answers the secret, this once. A key makes it for the developer who made the key; one from the command line for the
/// first developer. Needs the scope `admin`.
#[utoipa::path(
    post,
    path = "/api/v1/applications",
    operation_id = "create_application",
    tag = "applications",
    request_body(content = ApplicationCreate, example = json!({"name": "telephone"})),
    responses(
        (status = 201, description = "The application with its secret", body = ApplicationMade, example = json!({
            "id": "0198c0de-7e57-7a39-9d0c-2f8e1f0f4c77", "app_id": "app_0f1e2d3c4b5a69788796a5b4c3d2e1f0",
            "name": "telephone", "created_at": "2026-03-10T12:00:00Z", "app_secret": "secret_…"
        })),
        (status = 413, description = "The body is larger than 1 MiB", body = super::error::Body),
    )
)]
pub(super) async fn create_application(
    caller: Caller<MayAdmin>,
    State(app): State<Arc<App>>,
    mut body: JsonBody,
) -> Result<(StatusCode, Json<ApplicationMade>), Error> {
    let name = body.required("name", 100)?;
    let engine = &app.state.engine;
    let app_id = vault::new_secret("app_", 16).expose_secret().to_owned();
    let (secret, hash) = new_secret();
    let made = engine.db.insert_application(caller.developer, app_id, hash, name, engine.clock.now()).await?;
    let made = made.ok_or_else(|| invalid("there is no developer yet: `wearsync developers create` makes one"))?;
    Ok((
        StatusCode::CREATED,
        Json(ApplicationMade { read: made.into(), app_secret: secret.expose_secret().to_owned() }),
    ))
}

fn new_secret() -> (SecretString, Vec<u8>) {
    let secret = vault::new_secret("secret_", 32);
    let hash = vault::hash_secret(secret.expose_secret());
    (secret, hash)
}

/// Delete an application
///
/// It can give out no more tokens; those it gave out end by themselves. Needs the scope `admin`.
#[utoipa::path(
    delete,
    path = "/api/v1/applications/{app_id}",
    operation_id = "delete_application",
    tag = "applications",
    params(("app_id" = String, Path, description = "The id that the application names itself by")),
    responses(
        (status = 204, description = "Deleted"),
        (status = 404, description = "There is no such application, or it is another developer's", body = super::error::Body),
    )
)]
pub(super) async fn delete_application(
    caller: Caller<MayAdmin>,
    State(app): State<Arc<App>>,
    AppPath(app_id): AppPath,
) -> Result<StatusCode, Error> {
    let gone = app.state.engine.db.delete_application(caller.developer, app_id).await?;
    if gone { Ok(StatusCode::NO_CONTENT) } else { Err(unknown()) }
}

/// Rotate an application's secret
///
/// Answers the new secret, this once; the old one ends. Needs the scope `admin`.
#[utoipa::path(
    post,
    path = "/api/v1/applications/{app_id}/rotate-secret",
    operation_id = "rotate_application_secret",
    tag = "applications",
    params(("app_id" = String, Path, description = "The id that the application names itself by")),
    responses(
        (status = 200, description = "The application with its new secret", body = ApplicationMade, example = json!({
            "id": "0198c0de-7e57-7a39-9d0c-2f8e1f0f4c77", "app_id": "app_0f1e2d3c4b5a69788796a5b4c3d2e1f0",
            "name": "telephone", "created_at": "2026-03-01T08:00:00Z", "app_secret": "secret_…"
        })),
        (status = 404, description = "There is no such application, or it is another developer's", body = super::error::Body),
    )
)]
pub(super) async fn rotate_application_secret(
    caller: Caller<MayAdmin>,
    State(app): State<Arc<App>>,
    AppPath(app_id): AppPath,
) -> Result<Json<ApplicationMade>, Error> {
    let engine = &app.state.engine;
    let (secret, hash) = new_secret();
    let found = engine.db.update_application_secret(caller.developer, app_id, hash, engine.clock.now()).await?;
    let read = found.ok_or_else(unknown)?.into();
    Ok(Json(ApplicationMade { read, app_secret: secret.expose_secret().to_owned() }))
}

// ---- tokens of users ----------------------------------------------------------------------------------------------

/// An application that names itself.
#[derive(ToSchema)]
#[expect(dead_code, reason = "documents what `create_user_token` reads")]
pub(super) struct UserTokenRequest {
    /// Its id.
    app_id: Option<String>,
    /// Its secret.
    #[schema(format = "password")]
    app_secret: Option<String>,
}

/// Create a user's token
///
/// Tokens for what a telephone sends of one user. An application names itself in the body; without a body a developer's
/// token, or a key with the scope `admin`, stands for one.
#[utoipa::path(
    post,
    path = "/api/v1/users/{user_id}/token",
    operation_id = "create_user_token",
    tag = "applications",
    security((), ("developer_token" = []), ("api_key" = ["admin"]), ("open_wearables_api_key" = ["admin"])),
    params(("user_id" = Uuid, Path, description = "UUID of the user")),
    request_body(content = Option<UserTokenRequest>,
        example = json!({"app_id": "app_0f1e2d3c4b5a69788796a5b4c3d2e1f0", "app_secret": "secret_…"})),
    responses(
        (status = 200, description = "The tokens", body = Tokens, example = json!({
            "access_token": "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.…", "token_type": "bearer",
            "refresh_token": "rt-…", "expires_in": 3600
        })),
        (status = 404, description = "No such user", body = super::error::Body),
        (status = 413, description = "The body is larger than 1 MiB", body = super::error::Body),
    )
)]
pub(super) async fn create_user_token(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    // Looked at after the caller, who stands in the body.
    id: Result<IdPath, Error>,
    MaybeBody(mut body): MaybeBody,
) -> Result<Json<Tokens>, Error> {
    let engine = &app.state.engine;
    let app_id = grantor(&app, &headers, &mut body).await?;
    let IdPath(id) = id?;
    engine.db.find_user(UserId(id)).await?.ok_or_else(|| missing("User", id))?;
    Ok(Json(token::issue_both(engine, &TokenOwner::User { user: UserId(id), app_id }).await?))
}

/// On whose word a token is given.
async fn grantor(app: &Arc<App>, headers: &HeaderMap, body: &mut JsonBody) -> Result<String, Error> {
    let db = &app.state.engine.db;
    if let (Some(id), Some(secret)) = (body.text("app_id", 4096)?, body.text("app_secret", 4096)?) {
        let known = db.is_application(&id, &vault::hash_secret(&secret)).await?;
        return if known { Ok(id) } else { Err(Error::BadToken { detail: "Invalid app credentials" }) };
    }
    let shown = Credentials::read(app, headers);
    if let Some(developer) = shown.developer(app).await? {
        return Ok(format!("admin:{}", developer.id));
    }
    let Some(hash) = &shown.key_hash else {
        return Err(invalid(
            "Either app credentials (app_id, app_secret) or admin authentication (Bearer token) is required",
        ));
    };
    let key = allow(app, db.find_api_key(hash).await?, "admin")?;
    Ok(format!("key:{}", key.id))
}

/// A refresh token.
#[derive(ToSchema)]
#[expect(dead_code, reason = "documents what `refresh_token` reads")]
pub(super) struct RefreshTokenRequest {
    /// As it was handed out.
    #[schema(format = "password")]
    refresh_token: String,
}

/// Refresh a token
///
/// Answers the next pair for a developer's or a user's refresh token. A refresh token is good for one use.
#[utoipa::path(
    post,
    path = "/api/v1/token/refresh",
    operation_id = "refresh_token",
    tag = "applications",
    security(()),
    request_body(content = RefreshTokenRequest, example = json!({"refresh_token": "rt-…"})),
    responses(
        (status = 200, description = "The next pair", body = Tokens, example = json!({
            "access_token": "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.…", "token_type": "bearer",
            "refresh_token": "rt-…", "expires_in": 3600
        })),
        (status = 401, description = "Unknown, used or revoked", body = super::error::Body),
        (status = 413, description = "The body is larger than 1 MiB", body = super::error::Body),
        (status = 503, description = "The database is away, or the answer took too long", body = super::error::Body),
    )
)]
pub(super) async fn refresh_token(State(app): State<Arc<App>>, mut body: JsonBody) -> Result<Json<Tokens>, Error> {
    let shown = body.secret("refresh_token", 0)?;
    let tokens = token::refresh(&app.state.engine, &shown).await?;
    Ok(Json(tokens.ok_or(Error::BadToken { detail: "Invalid or revoked refresh token" })?))
}

/// Revoke a refresh token
///
/// Ends a developer's or a user's refresh token. The access token that came with it ends by itself within the hour.
#[utoipa::path(
    post,
    path = "/api/v1/token/revoke",
    operation_id = "revoke_token",
    tag = "applications",
    security(()),
    request_body(content = RefreshTokenRequest, example = json!({"refresh_token": "rt-…"})),
    responses(
        (status = 204, description = "Revoked"),
        (status = 404, description = "Unknown, used or revoked", body = super::error::Body),
        (status = 413, description = "The body is larger than 1 MiB", body = super::error::Body),
        (status = 503, description = "The database is away, or the answer took too long", body = super::error::Body),
    )
)]
pub(super) async fn revoke_token(State(app): State<Arc<App>>, mut body: JsonBody) -> Result<StatusCode, Error> {
    let shown = body.secret("refresh_token", 0)?;
    if app.state.engine.db.delete_refresh_token(&vault::hash_secret(shown.expose_secret())).await? {
        return Ok(StatusCode::NO_CONTENT);
    }
    let detail = "Refresh token not found".to_owned();
    Err(Error::NotFound { detail, code: "unknown_refresh_token", hint: None })
}
