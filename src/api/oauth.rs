//! Connecting in a browser: where a person agrees, and what comes back. Nobody shows a key here: what counts is the state,
//! which is random, good once, for a short time, and for one provider and user.

use std::sync::Arc;

use axum::Json;
use axum::extract::{RawPathParams, RawQuery, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use secrecy::ExposeSecret as _;
use serde::Serialize;
use url::form_urlencoded::byte_serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::App;
use super::error::{Error, missing};
use super::extract::{self, FromQuery, PathParams, Query, QueryPairs, one_of};
use crate::model::UserId;
use crate::providers::{self, ProviderSpec};
use crate::sync::{self, ConnectError, Engine, ProviderSetup};

/// Words of others are shown up to here.
const MOST_WORDS: usize = 200;

/// Where a person agrees.
#[derive(Serialize, ToSchema)]
pub(super) struct AuthorizationUrl {
    /// Send the person's browser there.
    authorization_url: String,
    /// Comes back with the person; it is part of the address already.
    state: String,
}

/// Who is to be connected, and where the person goes afterwards.
pub(super) struct Authorize {
    user_id: Uuid,
    redirect_uri: Option<String>,
}

impl FromQuery for Authorize {
    fn read(query: &QueryPairs) -> Result<Self, Error> {
        let user_id = query.text("user_id").ok_or_else(|| extract::invalid("Field required"))?;
        Ok(Self { user_id: extract::uuid(user_id)?, redirect_uri: query.text("redirect_uri").map(str::to_owned) })
    }
}

/// The provider of the path, if people can connect with it here.
fn provider<'a>(app: &'a App, path: &RawPathParams) -> Result<&'a ProviderSetup, Error> {
    let name = path.iter().next().map_or("", |(_, name)| name);
    let setup = app.state.engine.provider(name).ok_or_else(|| one_of(providers::names().map(|name| name.0)))?;
    if setup.spec().oauth.is_none() {
        return Err(Error::Invalid(format!("Provider '{name}' does not support OAuth")));
    }
    Ok(setup)
}

/// Begin to connect
///
/// Answers the address of the provider's consent page for this user. The person agrees there and is sent back to the
/// callback; after that to `redirect_uri`, which has to be among the addresses set for it, or else to a page of ours. The
/// address is good once, for 15 minutes unless set otherwise. Needs no key: it tells nothing, and only a person who agrees
/// at the provider makes it a connection.
#[utoipa::path(
    get,
    path = "/api/v1/oauth/{provider}/authorize",
    operation_id = "authorize_provider",
    tag = "oauth",
    security(()),
    params(
        ("provider" = String, Path, description = "Provider name", example = "strava"),
        ("user_id" = Uuid, Query, description = "UUID of the user to be connected"),
        ("redirect_uri" = Option<String>, Query, description = "Where the person goes afterwards, letter by letter as set; `{user_id}` there stands for this user's id"),
    ),
    responses(
        (status = 200, description = "Where the person agrees", body = AuthorizationUrl, example = json!({
            "authorization_url": "https://www.strava.com/oauth/authorize?response_type=code&client_id=90417&state=kQ…",
            "state": "kQ0c1tqvHq9k7Yd3wqv2m6Pq4rXn8s5t1uBv0wCzDyE"
        })),
        (status = 404, description = "No such user", body = super::error::Body),
    )
)]
pub(super) async fn authorize_provider(
    State(app): State<Arc<App>>,
    PathParams(path): PathParams,
    Query(asked): Query<Authorize>,
) -> Result<Json<AuthorizationUrl>, Error> {
    let setup = provider(&app, &path)?;
    if setup.app.is_none() {
        return Err(Error::NotSetUp { title: setup.spec().title });
    }
    let engine = &app.state.engine;
    let user = engine.db.find_user(UserId(asked.user_id)).await?.ok_or_else(|| missing("User", asked.user_id))?;
    let visit = sync::begin_visit(engine, setup, user.id, asked.redirect_uri.as_deref()).await?;
    let state = visit.state.expose_secret().to_owned();
    Ok(Json(AuthorizationUrl { authorization_url: visit.authorization_url, state }))
}

/// What a provider sends a person back with.
#[derive(Default)]
pub(super) struct Callback {
    code: Option<String>,
    state: Option<String>,
    scope: Option<String>,
    error: Option<String>,
    error_description: Option<String>,
}

/// Come back from the provider
///
/// Where providers send people back to: exchanges the code, connects the user, queues the first sync where that is set,
/// and sends the person on. Which scopes were granted is checked; what is missing is told on the page.
#[utoipa::path(
    get,
    path = "/api/v1/oauth/{provider}/callback",
    operation_id = "finish_authorization",
    tag = "oauth",
    security(()),
    params(
        ("provider" = String, Path, description = "Provider name", example = "strava"),
        ("code" = Option<String>, Query, description = "Good once"),
        ("state" = Option<String>, Query, description = "As it was sent out"),
        ("scope" = Option<String>, Query, description = "What the person allowed, where the provider tells it here"),
        ("error" = Option<String>, Query, description = "Why the person comes back without a code"),
        ("error_description" = Option<String>, Query, description = "The same in words"),
    ),
    responses(
        (status = 303, description = "On to the page that says how it went, or to `redirect_uri`",
            headers(("Location" = String, description = "Where to"))),
        (status = 400, description = "The state is not (or no longer) good, or the provider refused the code",
            body = super::error::Body),
        (status = 500, description = "The provider could not be asked", body = super::error::Body),
    )
)]
pub(super) async fn finish_authorization(
    State(app): State<Arc<App>>,
    PathParams(path): PathParams,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Response {
    match finish(app, &path, query.as_deref().unwrap_or_default()).await {
        Ok(to) => see_other(&to),
        // A person with a browser gets words, a program what it expects.
        Err(error) if wants_html(&headers) => {
            let status = error.status();
            let page = page("Not connected", &[error.detail(), AGAIN.to_owned()]);
            (status, page).into_response()
        }
        Err(error) => error.into_response(),
    }
}

const AGAIN: &str = "Nothing was changed. Go back to where you came from and connect again.";

async fn finish(app: Arc<App>, path: &RawPathParams, query: &str) -> Result<String, Error> {
    let name = provider(&app, path)?.spec().name.0;
    let query = QueryPairs::new(query)?;
    let text = |name: &str| query.text(name).filter(|text| !text.is_empty()).map(str::to_owned);
    let came = Callback {
        code: text("code"),
        state: text("state"),
        scope: text("scope"),
        error: text("error"),
        error_description: text("error_description"),
    };
    let engine = app.state.engine.clone();
    if let Some(error) = came.error {
        if let Some(state) = &came.state {
            sync::end_visit(&engine, &sync::secret(state)).await?;
        }
        let why = came.error_description.as_deref().unwrap_or("Unknown error");
        return Ok(error_page(&engine, &format!("{}:+{}", encoded(&error), encoded(why))));
    }
    let (Some(code), Some(state)) = (came.code, came.state) else {
        return Ok(error_page(&engine, "Missing+OAuth+parameters"));
    };
    let scope = came.scope;
    // A task of its own: the person may close the window, but what the provider gave has to be stored.
    let at_work = engine.clone();
    let done = tokio::spawn(async move {
        let engine = at_work;
        let setup = engine.provider(name).ok_or(ConnectError::WrongProvider)?;
        sync::finish_visit(&engine, setup, &sync::secret(&state), sync::secret(&code), scope.as_deref()).await
    });
    let done = done.await.map_err(|panic| {
        tracing::error!(%panic, "connecting ended in a panic");
        Error::Internal
    })?;
    match done {
        Ok((_, Some(uri))) => Ok(uri),
        Ok((connected, None)) => {
            let missing: Vec<String> = connected.missing.iter().map(|scope| encoded(scope.name)).collect();
            let missing = if missing.is_empty() { String::new() } else { format!("&missing={}", missing.join(",")) };
            let user = connected.user;
            Ok(own_page(&engine, &format!("success?provider={name}&user_id={user}{missing}")))
        }
        Err(ConnectError::NothingToRead(why)) => Ok(error_page(&engine, &encoded(&why))),
        Err(error) => Err(error.into()),
    }
}

fn encoded(text: &str) -> String {
    let text: String = text.chars().take(MOST_WORDS).collect();
    byte_serialize(text.as_bytes()).collect()
}

fn error_page(engine: &Engine, message: &str) -> String {
    own_page(engine, &format!("error?message={message}"))
}

/// A page of ours as the browser reaches it: on the host it came to, below the path that our address may have.
fn own_page(engine: &Engine, page: &str) -> String {
    let base = url::Url::parse(&engine.config.public_url).map(|url| url.path().trim_end_matches('/').to_owned());
    format!("{}/api/v1/oauth/{page}", base.unwrap_or_default())
}

fn see_other(to: &str) -> Response {
    match HeaderValue::from_str(to) {
        Ok(to) => (StatusCode::SEE_OTHER, [(header::LOCATION, to)]).into_response(),
        Err(_) => Error::Internal.into_response(),
    }
}

/// Somebody is connected.
#[derive(Serialize, ToSchema)]
pub(super) struct OAuthSuccess {
    /// Always true.
    success: bool,
    /// In plain words.
    message: String,
    /// Who.
    user_id: String,
    /// With what.
    provider: String,
}

/// What the page says.
pub(super) struct Success {
    provider: String,
    user_id: String,
    missing: Vec<String>,
}

impl FromQuery for Success {
    fn read(query: &QueryPairs) -> Result<Self, Error> {
        let needed = |name: &str| {
            let text = query.text(name).ok_or_else(|| extract::invalid("Field required"))?;
            Ok::<_, Error>(text.chars().take(MOST_WORDS).collect())
        };
        let missing = query.text("missing").unwrap_or_default().split(',').map(str::to_owned).collect();
        Ok(Self { provider: needed("provider")?, user_id: needed("user_id")?, missing })
    }
}

/// Show that it went well
///
/// The page after connecting: HTML for a browser, JSON for everybody else. It looks nothing up.
#[utoipa::path(
    get,
    path = "/api/v1/oauth/success",
    operation_id = "show_oauth_success",
    tag = "oauth",
    security(()),
    params(
        ("provider" = String, Query, description = "With what"),
        ("user_id" = String, Query, description = "Who"),
        ("missing" = Option<String>, Query, description = "Scopes that were not granted, comma between"),
    ),
    responses((status = 200, description = "It went well", content(
        (OAuthSuccess = "application/json", example = json!({
            "success": true, "message": "Connected to Strava", "user_id": "b2b6c1de-5a0e-4a39-9d0c-2f8e1f0f4c77",
            "provider": "strava"
        })),
        (String = "text/html"),
    )))
)]
pub(super) async fn show_oauth_success(headers: HeaderMap, Query(asked): Query<Success>) -> Response {
    let spec = providers::find(&asked.provider).map(|provider| provider.spec());
    let title = spec.map_or(asked.provider.as_str(), |spec| spec.title);
    let message = format!("Connected to {title}");
    if wants_html(&headers) {
        let mut words = vec![format!("{title} sends your data here from now on. You can close this window.")];
        words.extend(spec.and_then(|spec| told_missing(spec, &asked.missing)));
        return page(&message, &words);
    }
    let Success { provider, user_id, .. } = asked;
    Json(OAuthSuccess { success: true, message, user_id, provider }).into_response()
}

/// What was not allowed, in plain words. Names that are no scopes of the provider are nobody's words of ours.
fn told_missing(spec: &ProviderSpec, names: &[String]) -> Option<String> {
    let oauth = spec.oauth.as_ref()?;
    let lets: Vec<&str> = oauth
        .scopes
        .iter()
        .filter(|scope| names.iter().any(|name| name == scope.name))
        .map(|scope| scope.lets)
        .collect();
    (!lets.is_empty()).then(|| {
        format!(
            "You did not allow us to read: {}. Everything else is read all the same; to allow it, connect again and leave \
             all boxes ticked.",
            lets.join("; ")
        )
    })
}

/// Nobody was connected.
#[derive(Serialize, ToSchema)]
pub(super) struct OAuthFailure {
    /// Always false.
    success: bool,
    /// Why, in plain words.
    message: String,
}

/// What the page says.
pub(super) struct Failure {
    message: String,
}

impl FromQuery for Failure {
    fn read(query: &QueryPairs) -> Result<Self, Error> {
        let message = query.text("message").unwrap_or("OAuth authentication failed");
        Ok(Self { message: message.chars().take(2 * MOST_WORDS).collect() })
    }
}

/// Show that it did not go well
///
/// The page after connecting in vain: HTML for a browser, JSON for everybody else.
#[utoipa::path(
    get,
    path = "/api/v1/oauth/error",
    operation_id = "show_oauth_error",
    tag = "oauth",
    security(()),
    params(("message" = Option<String>, Query, description = "Why")),
    responses((status = 200, description = "It did not go well", content(
        (OAuthFailure = "application/json", example = json!({
            "success": false, "message": "access_denied: Unknown error"
        })),
        (String = "text/html"),
    )))
)]
pub(super) async fn show_oauth_error(headers: HeaderMap, Query(Failure { message }): Query<Failure>) -> Response {
    if !wants_html(&headers) {
        return Json(OAuthFailure { success: false, message }).into_response();
    }
    if message.starts_with("access_denied") {
        return page("Not connected", &["You did not agree at the provider.".to_owned(), AGAIN.to_owned()]);
    }
    page("Not connected", &[message, AGAIN.to_owned()])
}

fn wants_html(headers: &HeaderMap) -> bool {
    headers
        .get(header::ACCEPT)
        .and_then(|accept| accept.to_str().ok())
        .is_some_and(|accept| accept.contains("text/html"))
}

/// A page that loads nothing, runs nothing and says nothing about where it came from.
fn page(title: &str, words: &[String]) -> Response {
    let mut response = Html(sync::result_page(title, words)).into_response();
    let policy = HeaderValue::from_static(sync::PAGE_POLICY);
    response.headers_mut().insert(HeaderName::from_static("content-security-policy"), policy);
    response
}

impl From<ConnectError> for Error {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::Internal(sync::Error::Settings(detail)) => Self::Invalid(detail),
            ConnectError::Internal(error) => error.into(),
            ConnectError::Unreachable(_) => Self::Provider { detail: error.to_string() },
            ConnectError::UnknownState
            | ConnectError::WrongProvider
            | ConnectError::UnknownUser
            | ConnectError::Redirect
            | ConnectError::Refused(_)
            | ConnectError::NothingToRead(_) => Self::Invalid(error.to_string()),
        }
    }
}
