//! What providers send, and how they are asked to.

use std::sync::Arc;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{RawPathParams, RawQuery, Request, State};
use axum::http::header;
use bytes::BytesMut;
use futures::StreamExt as _;
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::App;
use super::error::Error;
use super::extract::{Caller, MayAdmin, PathParams, QueryPairs, invalid};
use crate::providers::webhook::Inbound;
use crate::sync::{self, ProviderSetup, SubscribeError, Unwelcome};

/// The provider of this name.
fn provider<'a>(app: &'a App, path: &RawPathParams) -> Result<&'a ProviderSetup, Error> {
    let name = param(path, "provider").unwrap_or("strava");
    let shown: String = name.chars().take(50).collect();
    app.state.engine.provider(name).ok_or_else(|| Error::NotFound {
        detail: format!("Unknown provider: '{shown}'"),
        code: "unknown_provider",
        hint: None,
    })
}

fn param<'a>(path: &'a RawPathParams, name: &str) -> Option<&'a str> {
    path.iter().find(|(have, _)| *have == name).map(|(_, value)| value)
}

/// The largest body that any provider may send.
pub(super) fn body_limit() -> usize {
    let limits = crate::providers::REGISTRY.iter().filter_map(|provider| Some(provider.spec().webhooks?.body_limit));
    limits.max().unwrap_or(super::BODY_LIMIT)
}

async fn receive(app: &App, path: &RawPathParams, request: Request) -> Result<Json<Value>, Error> {
    let setup = provider(app, path)?;
    let (parts, body) = request.into_parts();
    let limit = setup.spec().webhooks.map_or(0, |spec| spec.body_limit);
    let body = if limit == 0 { Bytes::new() } else { read_body(&parts.headers, body, limit).await? };
    let inbound = Inbound {
        method: parts.method.as_str(),
        headers: &parts.headers,
        query: parts.uri.query().unwrap_or_default(),
        body: &body,
    };
    let answer = sync::receive(&app.state.engine, setup, &inbound, param(path, "token"));
    let answer = match setup.spec().webhooks {
        // Who is told in time comes again. What is kept after all is known by its key then.
        Some(spec) => tokio::time::timeout(spec.answer_within, answer).await.map_err(|_| Error::TimedOut)?,
        None => answer.await,
    };
    let name = setup.spec().name;
    answer.map(Json).map_err(|unwelcome| match unwelcome {
        Unwelcome::None => Error::NotOffered(format!("Provider '{name}' does not support webhooks.")),
        Unwelcome::NoHandshake => {
            Error::NotOffered(format!("Provider '{name}' does not support webhook subscription verification via GET."))
        }
        Unwelcome::Off(todo) => {
            Error::NotFound { detail: "Not Found".to_owned(), code: "webhooks_off", hint: Some(todo) }
        }
        Unwelcome::Untrusted => Error::Untrusted,
        Unwelcome::BadBody => invalid("Invalid JSON body"),
        Unwelcome::Invalid(text) => invalid(text),
        Unwelcome::Forbidden(text) => Error::WrongToken(text),
        Unwelcome::Internal(error) => error.into(),
    })
}

/// Reads a body to its end, or to the provider's limit.
async fn read_body(headers: &header::HeaderMap, body: Body, limit: usize) -> Result<Bytes, Error> {
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|length| length > limit) {
        return Err(Error::TooLarge);
    }
    let mut read = BytesMut::new();
    let mut pieces = body.into_data_stream();
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(|_| invalid("the body ended early"))?;
        if read.len() + piece.len() > limit {
            super::drain(&mut pieces).await;
            return Err(Error::TooLarge);
        }
        read.extend_from_slice(&piece);
    }
    Ok(read.freeze())
}

/// The event is kept.
#[derive(Serialize, ToSchema)]
pub(super) struct WebhookAck {
    /// `accepted`; another word where a provider's handshake wants it.
    #[schema(example = "accepted")]
    status: String,
}

/// The provider's challenge.
#[derive(Serialize, ToSchema)]
pub(super) struct WebhookChallenge {
    /// As it came in the query.
    #[serde(rename = "hub.challenge")]
    #[schema(example = "8c0e4b7a2f9d4165b3e1d07c5a92f648")]
    challenge: String,
}

/// Receive a provider's event
///
/// For providers, not for people: takes what a provider sends by itself. It is verified by its raw body, kept, and
/// answered; the work comes after. The same event sent twice is kept once. Where a provider signs nothing, the address
/// ends in a token that only the provider is told: see the operation with `{token}`.
#[utoipa::path(
    post,
    path = "/api/v1/providers/{provider}/webhooks",
    operation_id = "receive_webhook",
    tag = "provider webhooks",
    security(()),
    params(("provider" = String, Path, description = "Provider name", example = "strava")),
    request_body(content = Object, description = "As the provider sends it", content_type = "application/json",
        example = json!({"object_type": "activity", "object_id": 18_234_567_890_u64, "aspect_type": "create", "updates": {}, "owner_id": 70_412_355, "subscription_id": 318_842, "event_time": 1_777_785_630})),
    responses(
        (status = 200, description = "Kept, or kept before", body = WebhookAck, example = json!({"status": "accepted"})),
        (status = 401, description = "The sender may be anybody", body = super::error::Body),
        (status = 404, description = "No such provider (`unknown_provider`), or nothing is subscribed to (`webhooks_off`)", body = super::error::Body),
        (status = 413, description = "The body is larger than this provider's events are", body = super::error::Body),
        (status = 501, description = "The provider sends nothing", body = super::error::Body),
        (status = 503, description = "The database is away or slow: send it again", body = super::error::Body),
    )
)]
pub(super) async fn receive_webhook(
    State(app): State<Arc<App>>,
    PathParams(path): PathParams,
    request: Request,
) -> Result<Json<Value>, Error> {
    receive(&app, &path, request).await
}

/// Answer a provider's validation
///
/// For providers, not for people: echoes the challenge of a new subscription, if the provider shows the token that it was
/// told.
#[utoipa::path(
    get,
    path = "/api/v1/providers/{provider}/webhooks",
    operation_id = "verify_webhook",
    tag = "provider webhooks",
    security(()),
    params(
        ("provider" = String, Path, description = "Provider name", example = "strava"),
        ("hub.mode" = Option<String>, Query, description = "Strava: `subscribe`"),
        ("hub.verify_token" = Option<String>, Query, description = "Strava: the token it was told"),
        ("hub.challenge" = Option<String>, Query, description = "Strava: echoed"),
    ),
    responses(
        (status = 200, description = "The challenge", body = WebhookChallenge, example = json!({"hub.challenge": "8c0e4b7a2f9d4165b3e1d07c5a92f648"})),
        (status = 403, description = "Another token than the one that the provider was told", body = super::error::Body),
        (status = 404, description = "No such provider (`unknown_provider`), or its application is not set up (`webhooks_off`)", body = super::error::Body),
        (status = 501, description = "The provider validates nothing by GET", body = super::error::Body),
        (status = 503, description = "The database is away or slow", body = super::error::Body),
    )
)]
pub(super) async fn verify_webhook(
    State(app): State<Arc<App>>,
    PathParams(path): PathParams,
    request: Request,
) -> Result<Json<Value>, Error> {
    receive(&app, &path, request).await
}

/// Receive a provider's event, at an address that nobody can guess
///
/// The same as without `{token}`, and the one that subscriptions are made with.
#[utoipa::path(
    post,
    path = "/api/v1/providers/{provider}/webhooks/{token}",
    operation_id = "receive_webhook_by_token",
    tag = "provider webhooks",
    security(()),
    params(
        ("provider" = String, Path, description = "Provider name", example = "strava"),
        ("token" = String, Path, description = "The end of the address that only the provider was told"),
    ),
    request_body(content = Object, description = "As the provider sends it", content_type = "application/json",
        example = json!({"object_type": "activity", "object_id": 18_234_567_890_u64, "aspect_type": "create", "updates": {}, "owner_id": 70_412_355, "subscription_id": 318_842, "event_time": 1_777_785_630})),
    responses(
        (status = 200, description = "Kept, or kept before", body = WebhookAck, example = json!({"status": "accepted"})),
        (status = 401, description = "The sender may be anybody", body = super::error::Body),
        (status = 404, description = "No such provider (`unknown_provider`), or nothing is subscribed to (`webhooks_off`)", body = super::error::Body),
        (status = 413, description = "The body is larger than this provider's events are", body = super::error::Body),
        (status = 501, description = "The provider sends nothing", body = super::error::Body),
        (status = 503, description = "The database is away or slow: send it again", body = super::error::Body),
    )
)]
pub(super) async fn receive_webhook_by_token(
    State(app): State<Arc<App>>,
    PathParams(path): PathParams,
    request: Request,
) -> Result<Json<Value>, Error> {
    receive(&app, &path, request).await
}

/// Answer a provider's validation, at an address that nobody can guess
///
/// The same as without `{token}`.
#[utoipa::path(
    get,
    path = "/api/v1/providers/{provider}/webhooks/{token}",
    operation_id = "verify_webhook_by_token",
    tag = "provider webhooks",
    security(()),
    params(
        ("provider" = String, Path, description = "Provider name", example = "strava"),
        ("token" = String, Path, description = "The end of the address that only the provider was told"),
        ("hub.mode" = Option<String>, Query, description = "Strava: `subscribe`"),
        ("hub.verify_token" = Option<String>, Query, description = "Strava: the token it was told"),
        ("hub.challenge" = Option<String>, Query, description = "Strava: echoed"),
    ),
    responses(
        (status = 200, description = "The challenge", body = WebhookChallenge, example = json!({"hub.challenge": "8c0e4b7a2f9d4165b3e1d07c5a92f648"})),
        (status = 403, description = "Another token than the one that the provider was told", body = super::error::Body),
        (status = 404, description = "No such provider (`unknown_provider`), or its application is not set up (`webhooks_off`)", body = super::error::Body),
        (status = 501, description = "The provider validates nothing by GET", body = super::error::Body),
        (status = 503, description = "The database is away or slow", body = super::error::Body),
    )
)]
pub(super) async fn verify_webhook_by_token(
    State(app): State<Arc<App>>,
    PathParams(path): PathParams,
    request: Request,
) -> Result<Json<Value>, Error> {
    receive(&app, &path, request).await
}

/// Receive an event of Strava (old path)
///
/// The same as `POST /api/v1/providers/strava/webhooks`, under the path of earlier versions of the mirrored system.
#[utoipa::path(
    post,
    path = "/api/v1/strava/webhooks",
    operation_id = "receive_strava_webhook",
    tag = "provider webhooks",
    security(()),
    request_body(content = Object, description = "As the provider sends it", content_type = "application/json",
        example = json!({"object_type": "activity", "object_id": 18_234_567_890_u64, "aspect_type": "create", "updates": {}, "owner_id": 70_412_355, "subscription_id": 318_842, "event_time": 1_777_785_630})),
    responses(
        (status = 200, description = "Kept, or kept before", body = WebhookAck, example = json!({"status": "accepted"})),
        (status = 401, description = "The sender may be anybody", body = super::error::Body),
        (status = 404, description = "Nothing is subscribed to (`webhooks_off`)", body = super::error::Body),
        (status = 413, description = "The body is larger than this provider's events are", body = super::error::Body),
        (status = 503, description = "The database is away or slow: send it again", body = super::error::Body),
    )
)]
pub(super) async fn receive_strava_webhook(
    State(app): State<Arc<App>>,
    PathParams(path): PathParams,
    request: Request,
) -> Result<Json<Value>, Error> {
    receive(&app, &path, request).await
}

/// Answer a validation of Strava (old path)
///
/// The same as `GET /api/v1/providers/strava/webhooks`.
#[utoipa::path(
    get,
    path = "/api/v1/strava/webhooks",
    operation_id = "verify_strava_webhook",
    tag = "provider webhooks",
    security(()),
    params(
        ("hub.mode" = Option<String>, Query, description = "`subscribe`"),
        ("hub.verify_token" = Option<String>, Query, description = "The token it was told"),
        ("hub.challenge" = Option<String>, Query, description = "Echoed"),
    ),
    responses(
        (status = 200, description = "The challenge", body = WebhookChallenge, example = json!({"hub.challenge": "8c0e4b7a2f9d4165b3e1d07c5a92f648"})),
        (status = 403, description = "Another token than the one that the provider was told", body = super::error::Body),
        (status = 404, description = "Its application is not set up (`webhooks_off`)", body = super::error::Body),
        (status = 503, description = "The database is away or slow", body = super::error::Body),
    )
)]
pub(super) async fn verify_strava_webhook(
    State(app): State<Arc<App>>,
    PathParams(path): PathParams,
    request: Request,
) -> Result<Json<Value>, Error> {
    receive(&app, &path, request).await
}

/// It answers.
#[derive(Serialize, ToSchema)]
pub(super) struct WebhookHealth {
    /// Always `ok`.
    status: &'static str,
    /// Always `strava-webhooks`.
    service: &'static str,
}

/// Check that events of Strava can come in
///
/// Answers when the server runs.
#[utoipa::path(
    get,
    path = "/api/v1/strava/webhooks/health",
    operation_id = "get_strava_webhook_health",
    tag = "provider webhooks",
    security(()),
    responses((status = 200, description = "It answers", body = WebhookHealth, example = json!({"status": "ok", "service": "strava-webhooks"})))
)]
pub(super) async fn get_strava_webhook_health() -> Json<WebhookHealth> {
    Json(WebhookHealth { status: "ok", service: "strava-webhooks" })
}

// ---- subscriptions ------------------------------------------------------------------------------------------------

impl From<SubscribeError> for Error {
    fn from(error: SubscribeError) -> Self {
        match error {
            SubscribeError::Unsupported => Self::NotOffered(error.to_string()),
            SubscribeError::Invalid(text) => Self::Invalid(text),
            SubscribeError::Internal(sync::Error::Settings(text)) => Self::Invalid(text),
            SubscribeError::Provider(text) => Self::ProviderFailed(text),
            SubscribeError::Internal(error) => error.into(),
        }
    }
}

/// A provider's subscriptions of ours.
#[derive(Serialize, ToSchema)]
pub(super) struct SubscriptionList {
    /// As the provider tells them.
    subscriptions: Vec<Value>,
}

/// List subscriptions
///
/// What the provider has of us, asked just now. Needs the scope `admin`.
#[utoipa::path(
    get,
    path = "/api/v1/providers/{provider}/webhooks/subscriptions",
    operation_id = "list_subscriptions",
    tag = "provider webhooks",
    params(("provider" = String, Path, description = "Provider name", example = "strava")),
    responses(
        (status = 200, description = "The subscriptions", body = SubscriptionList, example = json!({"subscriptions": [{"id": 318_842, "resource_state": 2, "application_id": 90_417, "callback_url": "https://sync.example.org/api/v1/providers/strava/webhooks/…", "created_at": "2026-02-11T09:30:12Z", "updated_at": "2026-02-11T09:30:12Z"}]})),
        (status = 404, description = "No such provider", body = super::error::Body),
        (status = 501, description = "The provider has no interface for subscriptions", body = super::error::Body),
        (status = 502, description = "The provider said no, or nothing", body = super::error::Body),
    )
)]
pub(super) async fn list_subscriptions(
    _: Caller<MayAdmin>,
    State(app): State<Arc<App>>,
    PathParams(path): PathParams,
) -> Result<Json<SubscriptionList>, Error> {
    let setup = provider(&app, &path)?;
    let found = sync::list_subscriptions(&app.state.engine, setup).await?;
    Ok(Json(SubscriptionList { subscriptions: found.into_iter().map(|one| one.told).collect() }))
}

/// Make a subscription
///
/// Makes sure that the provider has exactly one subscription of ours, with this address: a stale one is ended first.
/// `callback_url` is where this service can be reached from outside, or the whole address; the token that makes it
/// unguessable is put at its end. The provider calls it before this answers. Needs the scope `admin`.
#[utoipa::path(
    post,
    path = "/api/v1/providers/{provider}/webhooks/subscriptions",
    operation_id = "create_subscription",
    tag = "provider webhooks",
    params(
        ("provider" = String, Path, description = "Provider name", example = "strava"),
        ("callback_url" = String, Query, description = "Where the provider can reach this service", example = "https://sync.example.org"),
    ),
    responses(
        (status = 200, description = "What was done: `created`, `updated` (another one was ended first), `skipped` (it was there), or `error`", body = SubscriptionList, example = json!({"subscriptions": [{"id": "318842", "callback_url": "https://sync.example.org/api/v1/providers/strava/webhooks/…", "status": "created"}]})),
        (status = 404, description = "No such provider", body = super::error::Body),
        (status = 501, description = "The provider has no interface for subscriptions", body = super::error::Body),
    )
)]
pub(super) async fn create_subscription(
    _: Caller<MayAdmin>,
    State(app): State<Arc<App>>,
    PathParams(path): PathParams,
    RawQuery(query): RawQuery,
) -> Result<Json<SubscriptionList>, Error> {
    let setup = provider(&app, &path)?;
    let engine = &app.state.engine;
    if setup.spec().webhooks.is_none_or(|webhooks| webhooks.subscriptions.is_none()) {
        return Err(SubscribeError::Unsupported.into());
    }
    let url = callback(&app, setup, query.as_deref())?;
    let done = match sync::subscribe(engine, setup, &url).await {
        Ok((done, made)) => {
            json!({"id": made.external_id, "callback_url": made.callback_url, "status": done.as_str()})
        }
        Err(SubscribeError::Provider(why)) => json!({"callback_url": url, "status": "error", "error": why}),
        Err(error) => return Err(error.into()),
    };
    Ok(Json(SubscriptionList { subscriptions: vec![done] }))
}

fn callback(app: &App, setup: &ProviderSetup, query: Option<&str>) -> Result<String, Error> {
    let query = QueryPairs::new(query.unwrap_or_default())?;
    let base = query.text("callback_url").ok_or_else(|| invalid("Field required"))?;
    Ok(sync::callback_url(&app.state.engine, setup, base)?)
}

/// A subscription that was ended.
#[derive(Serialize, ToSchema)]
pub(super) struct SubscriptionDeleted {
    /// Its id and `status`: `deleted`, or `error` with the provider's words.
    deleted: Value,
}

/// End a subscription
///
/// Ends it at the provider, and forgets it here. One that is gone already is no failure. Needs the scope `admin`.
#[utoipa::path(
    delete,
    path = "/api/v1/providers/{provider}/webhooks/subscriptions/{subscription_id}",
    operation_id = "delete_subscription",
    tag = "provider webhooks",
    params(
        ("provider" = String, Path, description = "Provider name", example = "strava"),
        ("subscription_id" = String, Path, description = "The provider's id of it", example = "318842"),
    ),
    responses(
        (status = 200, description = "It is ended, or the provider said no", body = SubscriptionDeleted, example = json!({"deleted": {"id": "318842", "status": "deleted"}})),
        (status = 404, description = "No such provider", body = super::error::Body),
        (status = 501, description = "The provider has no interface for subscriptions", body = super::error::Body),
    )
)]
pub(super) async fn delete_subscription(
    _: Caller<MayAdmin>,
    State(app): State<Arc<App>>,
    PathParams(path): PathParams,
) -> Result<Json<SubscriptionDeleted>, Error> {
    let setup = provider(&app, &path)?;
    let id = param(&path, "subscription_id").unwrap_or_default();
    super::extract::no_null(id)?;
    let deleted = match sync::unsubscribe(&app.state.engine, setup, id).await {
        Ok(()) => json!({"id": id, "status": "deleted"}),
        Err(SubscribeError::Provider(why)) => json!({"id": id, "status": "error", "error": why}),
        Err(error) => return Err(error.into()),
    };
    Ok(Json(SubscriptionDeleted { deleted }))
}

fn not_offered(setup: &ProviderSetup, what: &str) -> Error {
    match setup.spec().webhooks.and_then(|webhooks| webhooks.subscriptions) {
        Some(_) => Error::NotOffered(format!(
            "Provider '{}' does not support {what} of webhook subscriptions",
            setup.spec().name
        )),
        None => SubscribeError::Unsupported.into(),
    }
}

/// Get a subscription
///
/// No provider here tells one by itself: list them. Needs the scope `admin`.
#[utoipa::path(
    get,
    path = "/api/v1/providers/{provider}/webhooks/subscriptions/{subscription_id}",
    operation_id = "get_subscription",
    tag = "provider webhooks",
    params(
        ("provider" = String, Path, description = "Provider name", example = "strava"),
        ("subscription_id" = String, Path, description = "The provider's id of it", example = "318842"),
    ),
    responses(
        (status = 200, description = "The subscription, where a provider tells one by itself", body = Object, example = json!({"subscription": null})),
        (status = 404, description = "No such provider", body = super::error::Body),
        (status = 501, description = "The provider does not tell one by itself", body = super::error::Body),
    )
)]
pub(super) async fn get_subscription(
    _: Caller<MayAdmin>,
    State(app): State<Arc<App>>,
    PathParams(path): PathParams,
) -> Result<Json<Value>, Error> {
    Err(not_offered(provider(&app, &path)?, "the reading"))
}

/// Change a subscription
///
/// No provider here changes one: make it anew. Needs the scope `admin`.
#[utoipa::path(
    put,
    path = "/api/v1/providers/{provider}/webhooks/subscriptions/{subscription_id}",
    operation_id = "update_subscription",
    tag = "provider webhooks",
    params(
        ("provider" = String, Path, description = "Provider name", example = "strava"),
        ("subscription_id" = String, Path, description = "The provider's id of it", example = "318842"),
        ("callback_url" = String, Query, description = "Where the provider can reach this service", example = "https://sync.example.org"),
    ),
    responses(
        (status = 200, description = "What was done, where a provider changes one", body = Object, example = json!({"updated": {"id": "318842", "status": "updated"}})),
        (status = 404, description = "No such provider", body = super::error::Body),
        (status = 501, description = "The provider does not change one", body = super::error::Body),
    )
)]
pub(super) async fn update_subscription(
    _: Caller<MayAdmin>,
    State(app): State<Arc<App>>,
    PathParams(path): PathParams,
    RawQuery(query): RawQuery,
) -> Result<Json<Value>, Error> {
    let setup = provider(&app, &path)?;
    let query = QueryPairs::new(query.as_deref().unwrap_or_default())?;
    query.text("callback_url").ok_or_else(|| invalid("Field required"))?;
    Err(not_offered(setup, "changes"))
}

/// Renew subscriptions
///
/// No provider here has subscriptions that end by themselves. Needs the scope `admin`.
#[utoipa::path(
    post,
    path = "/api/v1/providers/{provider}/webhooks/subscriptions/renew",
    operation_id = "renew_subscriptions",
    tag = "provider webhooks",
    params(("provider" = String, Path, description = "Provider name", example = "strava")),
    responses(
        (status = 200, description = "What was done, where subscriptions end by themselves", body = Object, example = json!({"renewed": []})),
        (status = 404, description = "No such provider", body = super::error::Body),
        (status = 501, description = "Subscriptions of this provider do not end by themselves", body = super::error::Body),
    )
)]
pub(super) async fn renew_subscriptions(
    _: Caller<MayAdmin>,
    State(app): State<Arc<App>>,
    PathParams(path): PathParams,
) -> Result<Json<Value>, Error> {
    Err(not_offered(provider(&app, &path)?, "the renewal"))
}
