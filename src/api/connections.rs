//! What a user is connected to, and how complete it is.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use chrono::{DateTime, Utc};
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::App;
use super::error::{Error, missing};
use super::extract::{Caller, IdPath, MayEnd, MayRead, PathParams};
use super::providers::{icon_url, live_mode};
use crate::model::{BEGINNING_MS, ConnectionId, UserId};
use crate::providers::WebhookKind;
use crate::storage::{ConnectionView, Gap, ProviderSetting};
use crate::sync;

/// A user's connection to a provider, and what the provider can do.
#[derive(Serialize, ToSchema)]
pub(super) struct ConnectionRead {
    /// Its id.
    id: Uuid,
    /// Whose.
    user_id: Uuid,
    /// Provider name.
    provider: String,
    /// The provider's id of the person; null until it is known.
    #[schema(required)]
    provider_user_id: Option<String>,
    /// The provider's name of the person; null until it is known.
    #[schema(required)]
    provider_username: Option<String>,
    /// What the person agreed to, in the provider's words; null: never told.
    #[schema(required)]
    scope: Option<String>,
    /// `active`; `revoked` when the user was disconnected; `expired` when the provider refused the grant.
    status: &'static str,
    /// The latest sync that read everything it was asked for.
    #[schema(required)]
    last_synced_at: Option<DateTime<Utc>>,
    /// When it was made.
    created_at: DateTime<Utc>,
    /// When it last changed.
    updated_at: DateTime<Utc>,
    /// The provider's picture, on this server.
    #[schema(required)]
    icon_url: Option<String>,
    /// Null: as far back as the provider has data.
    #[schema(required)]
    max_historical_days: Option<u32>,
    /// Whether data can be asked for.
    rest_pull: bool,
    /// Whether the provider sends data by itself.
    webhook_stream: bool,
    /// Whether the provider sends notices by itself.
    webhook_ping: bool,
    /// Whether the provider answers a request by a webhook.
    webhook_callback: bool,
    /// How new data comes in: `pull` (we ask) or `webhook` (it tells); null: neither.
    #[schema(required)]
    live_sync_mode: Option<&'static str>,
    /// Other users who are connected to the same account at the provider.
    linked_user_ids: Vec<Uuid>,
    /// When the provider last sent something about it, where that is so long ago that it is asked again; absent while it
    /// sends, or is not expected to.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    quiet_since: Option<DateTime<Utc>>,
}

impl ConnectionRead {
    fn new(
        view: ConnectionView,
        linked: &[(ConnectionId, UserId)],
        settings: &BTreeMap<String, ProviderSetting>,
    ) -> Self {
        let ConnectionView {
            connection,
            account_status,
            account_reason: _,
            provider_user_id,
            username,
            scopes,
            quiet_since,
        } = view;
        let spec = crate::providers::find(&connection.provider).map(|provider| provider.spec());
        let live = spec.map(|spec| &spec.live);
        let sends = |kind| live.is_some_and(|live| live.webhooks.contains(&kind));
        let linked = linked.iter().filter(|(id, _)| *id == connection.id).map(|(_, user)| user.0).collect();
        Self {
            id: connection.id.0,
            user_id: connection.user_id.0,
            // A pasted grant has a place-holder until its first call names the person.
            provider_user_id: Some(provider_user_id).filter(|id| !id.starts_with("pending:")),
            provider_username: username,
            scope: scopes,
            status: match (connection.status.as_str(), account_status.as_str()) {
                ("active", "active") => "active",
                ("active", _) => "expired",
                _ => "revoked",
            },
            last_synced_at: connection.last_success_at,
            created_at: connection.created_at,
            updated_at: connection.updated_at,
            icon_url: spec.map(|spec| icon_url(spec.name.0)),
            max_historical_days: live.and_then(|live| live.max_historical_days),
            rest_pull: live.is_some_and(|live| live.rest_pull),
            webhook_stream: sends(WebhookKind::Stream),
            webhook_ping: sends(WebhookKind::Ping),
            webhook_callback: sends(WebhookKind::Callback),
            live_sync_mode: spec.and_then(|spec| live_mode(spec, settings.get(&connection.provider))),
            linked_user_ids: linked,
            provider: connection.provider,
            quiet_since,
        }
    }
}

/// List connections
///
/// A user's connections, newest first; an unknown user has none. Needs the scope `read`.
#[utoipa::path(
    get,
    path = "/api/v1/users/{user_id}/connections",
    operation_id = "list_connections",
    tag = "connections",
    params(("user_id" = Uuid, Path, description = "UUID of the user")),
    responses((status = 200, description = "The connections", body = [ConnectionRead], example = json!([{
        "id": "7a1f9d52-0c44-4f0a-9b58-0d2f6f1f7a11", "user_id": "b2b6c1de-5a0e-4a39-9d0c-2f8e1f0f4c77",
        "provider": "strava", "provider_user_id": "134815", "provider_username": "ada", "scope": "read activity:read_all",
        "status": "active", "last_synced_at": "2026-03-10T12:01:04.100Z", "created_at": "2026-03-01T08:05:00Z",
        "updated_at": "2026-03-01T08:05:00Z", "icon_url": "/static/provider-icons/strava.svg", "max_historical_days": null, "rest_pull": true,
        "webhook_stream": false, "webhook_ping": true, "webhook_callback": false, "live_sync_mode": "pull",
        "linked_user_ids": []
    }])))
)]
pub(super) async fn list_connections(
    _: Caller<MayRead>,
    State(app): State<Arc<App>>,
    IdPath(id): IdPath,
) -> Result<Json<Vec<ConnectionRead>>, Error> {
    let (db, user) = (&app.state.engine.db, UserId(id));
    let (views, linked, settings) =
        tokio::try_join!(db.list_connections(Some(user)), db.list_linked_users(user), db.list_provider_settings())?;
    Ok(Json(views.into_iter().map(|view| ConnectionRead::new(view, &linked, &settings)).collect()))
}

/// A range of a stream that is not stored to its end.
#[derive(Serialize, ToSchema)]
pub(super) struct GapRead {
    /// Provider name.
    provider: String,
    /// Which of its streams.
    stream: String,
    /// From when on; null: from the beginning.
    #[schema(required)]
    from: Option<DateTime<Utc>>,
    /// The same in milliseconds since 1970.
    #[schema(required)]
    from_ms: Option<i64>,
    /// Up to when.
    to: DateTime<Utc>,
    /// The same in milliseconds since 1970.
    to_ms: i64,
    /// `open`: a sync has begun to read it; `asked`: the provider was asked to send it; `unread`: nobody has begun.
    state: &'static str,
    /// Why it does not get on; absent when nothing is known to be wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    error: Option<String>,
}

impl From<Gap> for GapRead {
    fn from(gap: Gap) -> Self {
        let lo = (gap.lo > BEGINNING_MS).then_some(gap.lo);
        Self {
            provider: gap.provider,
            stream: gap.stream,
            from: lo.and_then(DateTime::from_timestamp_millis),
            from_ms: lo,
            to: DateTime::from_timestamp_millis(gap.hi).unwrap_or_default(),
            to_ms: gap.hi,
            state: gap.state,
            error: gap.last_error,
        }
    }
}

/// What is missing of a user's data.
#[derive(Serialize, ToSchema)]
pub(super) struct GapList {
    /// The gaps, oldest first per stream; empty: everything is stored.
    items: Vec<GapRead>,
}

/// List gaps
///
/// The ranges that are not stored to their end, per stream of each active connection. What is newer than the latest
/// sync counts once that sync is longer ago than the next one reads back. Needs the scope `read`.
#[utoipa::path(
    get,
    path = "/api/v1/users/{user_id}/gaps",
    operation_id = "list_gaps",
    tag = "connections",
    params(("user_id" = Uuid, Path, description = "UUID of the user")),
    responses(
        (status = 200, description = "The gaps", body = GapList, example = json!({"items": [
            {"provider": "strava", "stream": "activities", "from": null, "from_ms": null,
             "to": "2026-03-10T12:01:00Z", "to_ms": 1_773_144_060_000_i64, "state": "open", "error": "no answer"}
        ]})),
        (status = 404, description = "No such user", body = super::error::Body),
    )
)]
pub(super) async fn list_gaps(
    _: Caller<MayRead>,
    State(app): State<Arc<App>>,
    IdPath(id): IdPath,
) -> Result<Json<GapList>, Error> {
    let engine = &app.state.engine;
    engine.db.find_user(UserId(id)).await?.ok_or_else(|| missing("User", id))?;
    let gaps = sync::list_gaps(engine, Some(UserId(id))).await?;
    Ok(Json(GapList { items: gaps.into_iter().map(GapRead::from).collect() }))
}

/// The user and the provider of the path.
fn named(app: &App, path: &axum::extract::RawPathParams) -> Result<(UserId, &'static str), Error> {
    let param = |name| path.iter().find(|(have, _)| *have == name).map_or("", |(_, value)| value);
    let user = super::extract::uuid(param("user_id"))?;
    let setup = app
        .state
        .engine
        .provider(param("provider"))
        .ok_or_else(|| super::extract::one_of(crate::providers::names().map(|name| name.0)))?;
    Ok((UserId(user), setup.spec().name.0))
}

/// The mirrored API names the user here.
fn no_connection_of(user: UserId) -> Error {
    let hint = Some("GET /api/v1/users/{user_id}/connections lists what there is");
    Error::NotFound { detail: format!("Connection with ID: {user} not found."), code: "no_connection", hint }
}

/// Disconnect
///
/// Ends a user's connection to a provider: runs of it are cancelled, its tokens are gone, and the provider is told if
/// nobody else here uses the account. What is stored stays. A connection that has ended already is no failure. Needs the
/// scope `admin`: only the person can undo it. Keys for less are answered 403.
#[utoipa::path(
    delete,
    path = "/api/v1/users/{user_id}/connections/{provider}",
    operation_id = "delete_connection",
    tag = "connections",
    params(
        ("user_id" = Uuid, Path, description = "UUID of the user"),
        ("provider" = String, Path, description = "Provider name", example = "strava"),
    ),
    responses(
        (status = 204, description = "It has ended"),
        (status = 404, description = "There never was one", body = super::error::Body),
    )
)]
pub(super) async fn delete_connection(
    _: Caller<MayEnd>,
    State(app): State<Arc<App>>,
    PathParams(path): PathParams,
) -> Result<axum::http::StatusCode, Error> {
    let (user, provider) = named(&app, &path)?;
    // A task of its own: what was begun is finished, and the provider told, though whoever asked has left.
    let engine = app.state.engine.clone();
    let ended = tokio::spawn(async move { sync::disconnect(&engine, user, provider).await }).await;
    let ended = ended.map_err(|_| Error::Internal)??;
    ended.map(|_| axum::http::StatusCode::NO_CONTENT).ok_or_else(|| no_connection_of(user))
}

/// Disconnect and erase
///
/// The same, and everything that is stored of the user from this provider goes: records, samples, the answers as received,
/// runs and files. Nobody else's data is touched. Needs the scope `admin`: nothing can undo it. Keys for less are answered
/// 403.
#[utoipa::path(
    delete,
    path = "/api/v1/users/{user_id}/connections/{provider}/data",
    operation_id = "delete_connection_data",
    tag = "connections",
    params(
        ("user_id" = Uuid, Path, description = "UUID of the user"),
        ("provider" = String, Path, description = "Provider name", example = "strava"),
    ),
    responses(
        (status = 204, description = "It is gone; files at the latest with the next sweep of the process that owns them"),
        (status = 404, description = "There never was one", body = super::error::Body),
    )
)]
pub(super) async fn delete_connection_data(
    _: Caller<MayEnd>,
    State(app): State<Arc<App>>,
    PathParams(path): PathParams,
) -> Result<axum::http::StatusCode, Error> {
    let (user, provider) = named(&app, &path)?;
    // As above; and a long one takes longer than an answer may.
    let engine = app.state.engine.clone();
    let ended = tokio::spawn(async move { sync::purge(&engine, user, provider).await }).await;
    let ended = ended.map_err(|_| Error::Internal)??;
    ended.map(|_| axum::http::StatusCode::NO_CONTENT).ok_or_else(|| no_connection_of(user))
}
