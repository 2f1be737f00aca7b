//! Developers: who logs in, and who is logged in.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{FromRequest, Request, State};
use chrono::{DateTime, SubsecRound as _, Utc};
use secrecy::{ExposeSecret as _, SecretString};
use serde::Serialize;
use tokio::sync::Semaphore;
use utoipa::ToSchema;
use uuid::Uuid;

use super::App;
use super::error::Error;
use super::extract::{Caller, JsonBody, MayAdmin, Myself, email, invalid};
use super::token;
use crate::storage::{Developer, DeveloperChange, TokenOwner};
use crate::{telemetry, vault};

/// Passwords that are looked at at a time: each takes 19 MiB and a core for some 20 ms.
const AT_A_TIME: usize = 2;

/// How long a password waits for its turn.
const PATIENCE: Duration = Duration::from_secs(5);

/// Characters that a password of a developer has at least.
pub const PASSWORD_LEAST: usize = 8;

const WRONG: Error = Error::BadToken { detail: "Incorrect email or password" };

// ---- passwords ----------------------------------------------------------------------------------------------------

/// Where passwords wait for their turn.
pub(super) struct Passwords(Arc<Semaphore>);

impl Default for Passwords {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(AT_A_TIME)))
    }
}

impl Passwords {
    /// Runs one of the slow functions beside everything else, a few at a time, also when the caller has gone.
    async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Error> {
        let turn = tokio::time::timeout(PATIENCE, self.0.clone().acquire_owned()).await;
        let Ok(Ok(turn)) = turn else { return Err(Error::TimedOut) };
        let done = tokio::task::spawn_blocking(move || {
            let answer = work();
            drop(turn);
            answer
        });
        done.await.map_err(|_| Error::Internal)
    }

    async fn fits(&self, password: SecretString, kept: Option<String>) -> Result<bool, Error> {
        self.run(move || vault::is_password(&password, kept.as_deref())).await
    }
}

// ---- login --------------------------------------------------------------------------------------------------------

/// The form of a login.
#[derive(ToSchema)]
#[expect(dead_code, reason = "documents what `Login` reads")]
pub(super) struct LoginForm {
    /// E-mail.
    username: String,
    /// Password.
    #[schema(format = "password")]
    password: String,
}

/// What a login shows; a member that is missing is as wrong as a wrong one.
pub(super) struct Login {
    email: String,
    password: SecretString,
}

impl FromRequest<Arc<App>> for Login {
    type Rejection = Error;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, Error> {
        let bytes = Bytes::from_request(request, app).await?;
        let (mut email, mut password) = (None, None);
        for (name, value) in url::form_urlencoded::parse(&bytes) {
            match name.as_ref() {
                "username" => email = Some(plain(&value)),
                "password" => password = Some(SecretString::from(value.into_owned())),
                _ => {}
            }
        }
        // Postgres takes no null characters, and nobody has one in an address.
        let email = email.filter(|text| !text.is_empty() && !text.contains('\0'));
        Ok(Self { email: email.ok_or(WRONG)?, password: password.ok_or(WRONG)? })
    }
}

/// The form in which addresses of developers are kept and compared.
fn plain(email: &str) -> String {
    email.trim().to_lowercase()
}

/// A way in.
#[derive(Serialize, ToSchema)]
pub(super) struct LoggedIn {
    /// Goes into `Authorization: Bearer`.
    access_token: String,
    /// Always `bearer`.
    token_type: &'static str,
    /// Goes into `POST /api/v1/token/refresh`, once.
    refresh_token: String,
    /// Seconds that the access token works.
    expires_in: i64,
    /// Who logged in.
    developer_id: Uuid,
}

/// Log in
///
/// Answers a token for an hour, and one that gets the next. An unknown e-mail, a wrong password and a missing field are
/// answered alike, after the same time. `wearsync developers create` makes the first developer.
#[utoipa::path(
    post,
    path = "/api/v1/auth/login",
    operation_id = "login",
    tag = "developers",
    security(()),
    request_body(content = LoginForm, content_type = "application/x-www-form-urlencoded",
        example = json!({"username": "ada@example.com", "password": "correct horse battery"})),
    responses(
        (status = 200, description = "The tokens", body = LoggedIn, example = json!({
            "access_token": "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.…", "token_type": "bearer",
            "refresh_token": "rt-…", "expires_in": 3600, "developer_id": "0198c0de-5a0e-7a39-9d0c-2f8e1f0f4c77"
        })),
        (status = 401, description = "Wrong e-mail or password", body = super::error::Body),
        (status = 413, description = "The body is larger than 1 MiB", body = super::error::Body),
        (status = 503, description = "Too many logins at once, or the database is away", body = super::error::Body),
    )
)]
pub(super) async fn login(State(app): State<Arc<App>>, login: Login) -> Result<Json<LoggedIn>, Error> {
    let engine = &app.state.engine;
    let (developer, kept) = engine.db.find_password(&login.email).await?.unzip();
    let fits = app.passwords.fits(login.password, kept).await?;
    telemetry::login(fits);
    let developer = developer.filter(|_| fits).ok_or(WRONG)?;
    let tokens = token::issue_both(engine, &TokenOwner::Developer(developer)).await?;
    Ok(Json(LoggedIn {
        access_token: tokens.access_token,
        token_type: tokens.token_type,
        refresh_token: tokens.refresh_token,
        expires_in: tokens.expires_in,
        developer_id: developer,
    }))
}

/// What was done.
#[derive(Serialize, ToSchema)]
pub(super) struct Message {
    /// In plain words.
    message: &'static str,
}

/// Log out
///
/// Forget the token: it ends by itself within the hour. `POST /api/v1/token/revoke` ends the refresh token. Needs the
/// scope `admin`.
#[utoipa::path(
    post,
    path = "/api/v1/auth/logout",
    operation_id = "logout",
    tag = "developers",
    responses((status = 200, description = "Done", body = Message,
        example = json!({"message": "Successfully logged out"})))
)]
pub(super) async fn logout(_: Caller<MayAdmin>) -> Json<Message> {
    Json(Message { message: "Successfully logged out" })
}

/// What changes a password.
#[derive(ToSchema)]
#[expect(dead_code, reason = "documents what `change_password` reads")]
pub(super) struct PasswordChange {
    /// The one that works now.
    #[schema(format = "password")]
    current_password: String,
    /// The next one.
    #[schema(format = "password", min_length = 8)]
    new_password: String,
    /// The next one again.
    #[schema(format = "password", min_length = 8)]
    confirm_password: String,
}

/// Change the password
///
/// Ends every token that was given out before, this one as well: log in again. Needs a developer's token: it is about
/// a person, and no key stands for one, not even one with the scope for everything.
#[utoipa::path(
    post,
    path = "/api/v1/auth/change-password",
    operation_id = "change_password",
    tag = "developers",
    security(("developer_token" = [])),
    request_body(content = PasswordChange, example = json!({"current_password": "correct horse battery",
        "new_password": "staple and battery", "confirm_password": "staple and battery"})),
    responses(
        (status = 200, description = "Changed", body = Message, example = json!({"message": "Password changed"})),
        (status = 413, description = "The body is larger than 1 MiB", body = super::error::Body),
    )
)]
pub(super) async fn change_password(
    Myself(developer): Myself,
    State(app): State<Arc<App>>,
    mut body: JsonBody,
) -> Result<Json<Message>, Error> {
    let current = body.secret("current_password", 0)?;
    let new = body.secret("new_password", PASSWORD_LEAST)?;
    let again = body.secret("confirm_password", PASSWORD_LEAST)?;
    if new.expose_secret() != again.expose_secret() {
        return Err(invalid("New passwords do not match"));
    }
    let db = &app.state.engine.db;
    let incorrect = || invalid("Incorrect current password");
    let (id, kept) = db.find_password(&developer.email).await?.ok_or_else(incorrect)?;
    if id != developer.id || !app.passwords.fits(current, Some(kept.clone())).await? {
        return Err(incorrect());
    }
    let hash = app.passwords.run(move || vault::hash_password(&new)).await?;
    // Tokens tell whole seconds: one given out right after this must work.
    let now = app.state.engine.clock.now().trunc_subsecs(0);
    if !db.change_password(id, &kept, &hash, now).await? {
        return Err(incorrect());
    }
    telemetry::password_changed(id);
    Ok(Json(Message { message: "Password changed" }))
}

// ---- me -----------------------------------------------------------------------------------------------------------

/// A developer.
#[derive(Serialize, ToSchema)]
pub(super) struct DeveloperRead {
    /// Its id.
    id: Uuid,
    /// First name.
    #[schema(required)]
    first_name: Option<String>,
    /// Last name.
    #[schema(required)]
    last_name: Option<String>,
    /// E-mail, in lower case; unique.
    #[schema(format = "email")]
    email: String,
    /// When it was made.
    created_at: DateTime<Utc>,
    /// When it last changed.
    updated_at: DateTime<Utc>,
}

impl From<Developer> for DeveloperRead {
    fn from(it: Developer) -> Self {
        let Developer { id, email, first_name, last_name, created_at, updated_at } = it;
        Self { id, first_name, last_name, email, created_at, updated_at }
    }
}

/// Get me
///
/// The developer whose token this is. Needs a developer's token: it is about a person, and no key stands for one.
#[utoipa::path(
    get,
    path = "/api/v1/auth/me",
    operation_id = "get_me",
    tag = "developers",
    security(("developer_token" = [])),
    responses((status = 200, description = "The developer", body = DeveloperRead, example = json!({
        "id": "0198c0de-5a0e-7a39-9d0c-2f8e1f0f4c77", "first_name": "Ada", "last_name": null,
        "email": "ada@example.com", "created_at": "2026-03-01T08:00:00Z", "updated_at": "2026-03-01T08:00:00Z"
    })))
)]
pub(super) async fn get_me(Myself(developer): Myself) -> Json<DeveloperRead> {
    Json(developer.into())
}

/// What changes a developer: members that are null or left out stay as they are.
#[derive(ToSchema)]
#[expect(dead_code, reason = "documents what `update_me` reads")]
pub(super) struct DeveloperUpdate {
    /// First name.
    #[schema(max_length = 100)]
    first_name: Option<String>,
    /// Last name.
    #[schema(max_length = 100)]
    last_name: Option<String>,
    /// E-mail; unique.
    #[schema(format = "email")]
    email: Option<String>,
}

/// Change me
///
/// Changes the members that are given and not null. A `password` is refused: `POST /api/v1/auth/change-password` asks for
/// the current one. Needs a developer's token: it is about a person, and no key stands for one.
#[utoipa::path(
    patch,
    path = "/api/v1/auth/me",
    operation_id = "update_me",
    tag = "developers",
    security(("developer_token" = [])),
    request_body(content = DeveloperUpdate, example = json!({"first_name": "Ada"})),
    responses(
        (status = 200, description = "The developer as it is now", body = DeveloperRead, example = json!({
            "id": "0198c0de-5a0e-7a39-9d0c-2f8e1f0f4c77", "first_name": "Ada", "last_name": null,
            "email": "ada@example.com", "created_at": "2026-03-01T08:00:00Z", "updated_at": "2026-03-10T12:00:00Z"
        })),
        (status = 409, description = "The e-mail is taken", body = super::error::Body),
        (status = 413, description = "The body is larger than 1 MiB", body = super::error::Body),
    )
)]
pub(super) async fn update_me(
    Myself(developer): Myself,
    State(app): State<Arc<App>>,
    mut body: JsonBody,
) -> Result<Json<DeveloperRead>, Error> {
    let change = DeveloperChange {
        first_name: body.text("first_name", 100)?,
        last_name: body.text("last_name", 100)?,
        email: body.email("email")?.map(|email| plain(&email)),
    };
    if body.text("password", usize::MAX)?.is_some() {
        return Err(invalid("POST /api/v1/auth/change-password changes the password: it asks for the current one"));
    }
    let engine = &app.state.engine;
    let changed = engine.db.update_developer(developer.id, change, engine.clock.now()).await?;
    Ok(Json(changed.unwrap_or(developer).into()))
}

/// The address in the form that is kept, if it is one.
///
/// # Errors
/// What is wrong with it.
pub fn developer_email(text: &str) -> Result<String, String> {
    let plain = plain(text);
    match email(&plain) {
        Err(Error::Invalid(why)) => Err(why),
        _ => Ok(plain),
    }
}
