//! HTTP in, calls out, and nothing more: router, one file per resource, extractors, failures, the OpenAPI document.
//!
//! May name sync and everything below it. What must always hold: only `error.rs` knows the status code of a failure;
//! who shows no key that works learns nothing else; a 2xx to a sync is on disk; no answer and no log line quotes a
//! secret or an inner error.

mod applications;
mod auth;
mod connections;
mod deliveries;
mod error;
mod extract;
mod historical;
mod keys;
mod oauth;
mod openapi;
mod providers;
mod schedule;
mod service;
mod sync;
mod tasks;
mod token;
mod users;
mod watch;
mod webhooks;

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{BodyDataStream, Bytes};
use axum::extract::{DefaultBodyLimit, MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::{get, post};
use chrono::{DateTime, Utc};
use futures::{FutureExt as _, StreamExt as _};
use metrics_exporter_prometheus::PrometheusHandle;
use tower_http::cors::{AllowHeaders, CorsLayer};
use utoipa::OpenApi as _;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use utoipa_swagger_ui::SwaggerUi;
use uuid::Uuid;

use crate::sync::Engine;
use crate::telemetry;
pub use auth::{PASSWORD_LEAST, developer_email};
use error::Error;
pub use keys::{OVERLAP_MOST_S, OVERLAP_S, key_name};
pub use users::{external_user_id, person_name, user_email};

/// Bodies beyond this are refused.
const BODY_LIMIT: usize = 1 << 20;

/// How long an answer may take. A sync that is waited for has its own time besides.
const TIME_LIMIT: Duration = Duration::from_secs(30);

/// What the API stands on.
#[derive(Clone)]
pub struct ApiState {
    /// Does the work.
    pub engine: Arc<Engine>,
    /// Renders `/metrics`.
    pub metrics: PrometheusHandle,
    /// Whether `/metrics` takes a key: set it wherever other machines can ask.
    pub metrics_need_key: bool,
}

/// What the handlers share.
struct App {
    state: ApiState,
    /// When this process last noted the use of a key.
    touched: Mutex<HashMap<Uuid, DateTime<Utc>>>,
    /// Passwords that are being looked at.
    passwords: auth::Passwords,
    /// The document, as served.
    document: Bytes,
}

impl App {
    fn new(state: ApiState) -> Self {
        let (touched, passwords) = (Mutex::default(), auth::Passwords::default());
        Self { state, touched, passwords, document: document_json().into() }
    }
}

fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::with_openapi(openapi::Document::openapi())
        .routes(routes!(sync::sync_user_data))
        .routes(routes!(sync::sync_provider_user_data))
        .routes(routes!(historical::start_historical_sync))
        .routes(routes!(tasks::list_tasks))
        .routes(routes!(tasks::get_task, tasks::cancel_task))
        .routes(routes!(users::list_users, users::create_user))
        .routes(routes!(users::get_user, users::update_user, users::delete_user))
        .routes(routes!(connections::list_connections))
        .routes(routes!(connections::list_gaps))
        .routes(routes!(watch::stream_sync_events))
        .routes(routes!(watch::list_sync_events))
        .routes(routes!(watch::list_user_sync_runs))
        .routes(routes!(watch::list_sync_runs))
        .routes(routes!(auth::login))
        .routes(routes!(auth::logout))
        .routes(routes!(auth::change_password))
        .routes(routes!(auth::get_me, auth::update_me))
        .routes(routes!(keys::list_keys, keys::create_key))
        .routes(routes!(keys::rename_key, keys::revoke_key))
        .routes(routes!(keys::rotate_key))
        .routes(routes!(applications::list_applications, applications::create_application))
        .routes(routes!(applications::delete_application))
        .routes(routes!(applications::rotate_application_secret))
        .routes(routes!(applications::create_user_token))
        .routes(routes!(applications::refresh_token))
        .routes(routes!(applications::revoke_token))
        .routes(routes!(providers::list_providers, providers::update_providers))
        .routes(routes!(providers::update_provider))
        .routes(routes!(providers::get_coverage))
        .routes(routes!(providers::get_provider_icon))
        .routes(routes!(connections::delete_connection))
        .routes(routes!(connections::delete_connection_data))
        .routes(routes!(oauth::authorize_provider))
        .routes(routes!(oauth::finish_authorization))
        .routes(routes!(oauth::show_oauth_success))
        .routes(routes!(oauth::show_oauth_error))
        .routes(routes!(schedule::get_schedule, schedule::set_schedule))
        .routes(routes!(webhooks::receive_webhook, webhooks::verify_webhook))
        .routes(routes!(webhooks::receive_webhook_by_token, webhooks::verify_webhook_by_token))
        .routes(routes!(webhooks::list_subscriptions, webhooks::create_subscription))
        .routes(routes!(webhooks::renew_subscriptions))
        .routes(routes!(webhooks::get_subscription, webhooks::update_subscription, webhooks::delete_subscription))
        .routes(routes!(webhooks::receive_strava_webhook, webhooks::verify_strava_webhook))
        .routes(routes!(webhooks::get_strava_webhook_health))
        .routes(routes!(deliveries::list_deliveries))
        .routes(routes!(deliveries::get_delivery))
        .routes(routes!(deliveries::replay_delivery))
        .routes(routes!(service::get_root))
        .routes(routes!(service::get_liveness))
        .routes(routes!(service::get_readiness))
        .routes(routes!(service::get_metrics))
        .routes(routes!(service::get_openapi))
}

/// The OpenAPI document (3.1).
#[must_use]
pub fn document() -> utoipa::openapi::OpenApi {
    openapi::finish(routes().into_openapi())
}

/// The OpenAPI document as text, as it is checked in and served: two-space indent, newline at the end.
#[must_use]
pub fn document_json() -> String {
    let Ok(text) = serde_json::to_string_pretty(&document()) else {
        unreachable!("a document holds nothing that JSON cannot say")
    };
    text + "\n"
}

/// The whole service, ready to be served.
pub fn router(state: ApiState) -> Router {
    let cors = cors(&state.engine.config.cors_origins);
    let app = Arc::new(App::new(state));
    let (router, _) = routes().split_for_parts();
    let docs: Router = SwaggerUi::new("/docs").config(utoipa_swagger_ui::Config::from("/openapi.json")).into();
    let router = router
        // The seed's own form, as it is written there. Served, not listed.
        .route("/{provider}/users/{user_id}/sync", post(sync::sync_user_data))
        // Older paths still, with and without the token at their end.
        .route("/api/v1/strava/webhook", post(webhooks::receive_strava_webhook).get(webhooks::verify_strava_webhook))
        .route("/api/v1/strava/webhook/health", get(webhooks::get_strava_webhook_health))
        .route(
            "/api/v1/strava/webhook/{token}",
            post(webhooks::receive_strava_webhook).get(webhooks::verify_strava_webhook),
        )
        .route(
            "/api/v1/strava/webhooks/{token}",
            post(webhooks::receive_strava_webhook).get(webhooks::verify_strava_webhook),
        )
        .with_state(app.clone())
        .merge(docs)
        .fallback(no_route)
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .layer(middleware::from_fn_with_state(app, outermost));
    // Around everything, so that pages may read failures as well.
    match cors {
        Some(cors) => router.layer(cors),
        None => router,
    }
}

/// Lets pages of these origins call us; none: no page may.
fn cors(origins: &[String]) -> Option<CorsLayer> {
    let origins: Vec<HeaderValue> = origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok()).collect();
    let methods = [Method::GET, Method::POST, Method::PUT, Method::PATCH, Method::DELETE];
    (!origins.is_empty()).then(|| {
        CorsLayer::new()
            .allow_origin(origins)
            .allow_credentials(true)
            .allow_methods(methods)
            .allow_headers(AllowHeaders::mirror_request())
            .expose_headers([HeaderName::from_static("x-request-id"), header::RETRY_AFTER])
            .max_age(Duration::from_secs(600))
    })
}

/// An unknown path; a known one with a slash too many is sent to the right place.
async fn no_route(uri: Uri) -> Response {
    let path = uri.path();
    let bare = path.trim_end_matches('/');
    // `//elsewhere/` would send people to another host.
    if bare.len() + 1 == path.len() && bare.ends_with("/sync") && !path.starts_with("//") && !path.contains('\\') {
        let query = uri.query().map_or_else(String::new, |query| format!("?{query}"));
        return Redirect::temporary(&format!("{bare}{query}")).into_response();
    }
    Error::NoRoute.into_response()
}

/// Around every request: its id, its time, its end (also when a handler panics), and one event.
async fn outermost(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let id = request_id(request.headers());
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let route = route.unwrap_or_else(|| "unknown".to_owned());
    let limit = if route.ends_with("/sync") { TIME_LIMIT + app.state.engine.config.inline_timeout } else { TIME_LIMIT };

    // Providers may send more than people; the handler knows how much.
    let room = if route.contains("/webhook") { webhooks::body_limit() } else { BODY_LIMIT };

    let mut response = if announces_too_much(request.headers(), room) {
        // Who asked first sends nothing.
        if !request.headers().contains_key(header::EXPECT) {
            drain(&mut request.into_body().into_data_stream()).await;
        }
        Error::TooLarge.into_response()
    } else {
        match AssertUnwindSafe(tokio::time::timeout(limit, next.run(request))).catch_unwind().await {
            Ok(Ok(response)) => response,
            Ok(Err(_)) => Error::TimedOut.into_response(),
            Err(_) => {
                tracing::error!(request_id = %id, route, "a handler panicked");
                Error::Internal.into_response()
            }
        }
    };

    if let Some(failure) = error::failure_of(&mut response) {
        let mut rendered = failure.render(&id);
        if let Some(allow) = response.headers_mut().remove(header::ALLOW) {
            rendered.headers_mut().insert(header::ALLOW, allow);
        }
        response = rendered;
    }
    if response.status().is_server_error() {
        tracing::warn!(request_id = %id, route, "request failed");
    }
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert("x-request-id", value);
    }
    error::set(&mut response, header::X_CONTENT_TYPE_OPTIONS, "nosniff");
    error::set(&mut response, header::X_FRAME_OPTIONS, "DENY");
    error::set(&mut response, header::REFERRER_POLICY, "no-referrer");
    if !route.starts_with("/docs") && !response.headers().contains_key(header::CACHE_CONTROL) {
        error::set(&mut response, header::CACHE_CONTROL, "no-store");
    }
    telemetry::http_request(method.as_str(), &route, response.status().as_u16(), begun.elapsed().as_secs_f64());
    response
}

/// The caller's own id when it is short and plain, else a new one: it ends up in our log.
fn request_id(headers: &HeaderMap) -> String {
    let told = headers.get("x-request-id").and_then(|value| value.to_str().ok());
    let sane = |id: &&str| {
        (1..=128).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:".contains(&b))
    };
    told.filter(sane).map_or_else(|| Uuid::now_v7().to_string(), str::to_owned)
}

/// Refuses a large body before it is read, also on paths that read none.
/// Takes what is too much, for a moment, and drops it: a sender that is still writing when its connection is closed never
/// reads the answer.
async fn drain(pieces: &mut BodyDataStream) {
    let (most, mut taken) = (16 << 20, 0);
    let all = async {
        while let Some(Ok(piece)) = pieces.next().await {
            taken += piece.len();
            if taken > most {
                break;
            }
        }
    };
    let _ = tokio::time::timeout(Duration::from_secs(1), all).await;
}

fn announces_too_much(headers: &HeaderMap, room: usize) -> bool {
    let length = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    length.is_some_and(|length| length > room as u64)
}

#[cfg(test)]
mod tests;
