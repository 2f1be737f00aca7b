//! The service itself: whether it lives, whether it can work, what it counts.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{FromRequestParts, State};
use axum::http::header;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use super::App;
use super::error::{Error, not_ready};
use super::extract::{Caller, MayRead};

/// A dependency that does not answer within this time is away.
const PATIENCE: Duration = Duration::from_secs(2);

/// A greeting.
#[derive(Serialize, ToSchema)]
pub(super) struct Greeting {
    /// Always the same.
    message: &'static str,
}

/// Greet
///
/// Answers when the server runs.
#[utoipa::path(
    get,
    path = "/",
    operation_id = "get_root",
    tag = "service",
    security(()),
    responses((status = 200, description = "It runs", body = Greeting, example = json!({"message": "Server is running!"})))
)]
pub(super) async fn get_root() -> Json<Greeting> {
    Json(Greeting { message: "Server is running!" })
}

/// Whether the process lives.
#[derive(Serialize, ToSchema)]
pub(super) struct Alive {
    /// Always `alive`.
    status: &'static str,
}

/// Check that it lives
///
/// Answers when the process does, whatever else is away: restart it when this fails.
#[utoipa::path(
    get,
    path = "/health/live",
    operation_id = "get_liveness",
    tag = "service",
    security(()),
    responses((status = 200, description = "It lives", body = Alive, example = json!({"status": "alive"})))
)]
pub(super) async fn get_liveness() -> Json<Alive> {
    Json(Alive { status: "alive" })
}

/// Whether requests can be answered, and what stands in the way.
#[derive(Serialize, ToSchema)]
pub(super) struct Readiness {
    /// `ready` or `not_ready`.
    status: &'static str,
    /// `ok` or `away`.
    database: &'static str,
    /// `ok`, `old` (run `wearsync migrate`) or `unknown`.
    schema: &'static str,
    /// `ok` or `away`; `ok` where none is used.
    redis: &'static str,
}

/// Check that it can work
///
/// Asks the database, the version of its schema, and Redis: send requests elsewhere while this fails.
#[utoipa::path(
    get,
    path = "/health/ready",
    operation_id = "get_readiness",
    tag = "service",
    security(()),
    responses(
        (status = 200, description = "It can work", body = Readiness,
            example = json!({"status": "ready", "database": "ok", "schema": "ok", "redis": "ok"})),
        (status = 503, description = "Something is away", body = Readiness,
            example = json!({"status": "not_ready", "database": "away", "schema": "unknown", "redis": "ok"})),
    )
)]
pub(super) async fn get_readiness(State(app): State<Arc<App>>) -> Response {
    let engine = &app.state.engine;
    let database = async {
        match tokio::time::timeout(PATIENCE, engine.db.is_migrated()).await {
            Ok(Ok(true)) => ("ok", "ok"),
            // A database without our table looks the same as one that refuses the statement: ask it something simpler.
            Ok(Ok(false)) => match tokio::time::timeout(PATIENCE, engine.db.ping()).await {
                Ok(Ok(())) => ("ok", "old"),
                _ => ("away", "unknown"),
            },
            _ => ("away", "unknown"),
        }
    };
    let redis = async {
        match tokio::time::timeout(PATIENCE, engine.shared.ping()).await {
            Ok(Ok(())) => "ok",
            _ => "away",
        }
    };
    let ((database, schema), redis) = tokio::join!(database, redis);
    let ready = [database, schema, redis].iter().all(|word| *word == "ok");
    if ready {
        Json(Readiness { status: "ready", database, schema, redis }).into_response()
    } else {
        not_ready(Readiness { status: "not_ready", database, schema, redis })
    }
}

/// Lets everybody see the metrics where only this machine can ask; elsewhere it takes a key.
pub(super) struct MayMeasure;

impl FromRequestParts<Arc<App>> for MayMeasure {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Error> {
        if app.state.metrics_need_key {
            Caller::<MayRead>::from_request_parts(parts, app).await?;
        }
        Ok(Self)
    }
}

/// Get metrics
///
/// Counters and histograms in the text format of Prometheus. Needs the scope `read` unless the server listens on this
/// machine only.
#[utoipa::path(
    get,
    path = "/metrics",
    operation_id = "get_metrics",
    tag = "service",
    responses((status = 200, description = "The metrics", content_type = "text/plain", body = String,
        example = json!("# TYPE wearsync_runs_accepted_total counter\nwearsync_runs_accepted_total{provider=\"strava\",class=\"interactive\",source=\"pull\"} 3\n")))
)]
pub(super) async fn get_metrics(_: MayMeasure, State(app): State<Arc<App>>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], app.state.metrics.render()).into_response()
}

/// Get this document
///
/// The OpenAPI document of this service. `/docs` shows it as a page.
#[utoipa::path(
    get,
    path = "/openapi.json",
    operation_id = "get_openapi",
    tag = "service",
    security(()),
    responses((status = 200, description = "The document", content_type = "application/json", body = Object,
        example = json!({"openapi": "3.1.0", "info": {"title": "wearsync"}})))
)]
pub(super) async fn get_openapi(State(app): State<Arc<App>>) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], app.document.clone()).into_response()
}
