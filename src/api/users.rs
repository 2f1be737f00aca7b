//! Users.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use chrono::{DateTime, Utc};
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::App;
use super::error::{Error, missing};
use super::extract::{
    Caller, FromQuery, IdPath, JsonBody, MayAdmin, MayRead, MaySync, Query, QueryPairs, argument, email, one_of,
};
use crate::model::UserId;
use crate::storage::{NewUser, User, UserFilter, UserRow};

/// One of our users.
#[derive(Serialize, ToSchema)]
pub(super) struct UserRead {
    /// Its id.
    id: Uuid,
    /// When it was made.
    created_at: DateTime<Utc>,
    /// First name.
    #[schema(required)]
    first_name: Option<String>,
    /// Last name.
    #[schema(required)]
    last_name: Option<String>,
    /// E-mail; unique.
    #[schema(required, format = "email")]
    email: Option<String>,
    /// The id that your own system gives it; unique.
    #[schema(required)]
    external_user_id: Option<String>,
    /// The latest complete sync of any provider. Filled in lists only.
    #[schema(required)]
    last_synced_at: Option<DateTime<Utc>>,
    /// The provider of that sync. Filled in lists only.
    #[schema(required)]
    last_synced_provider: Option<String>,
    /// Whether a connection works. Filled in lists only.
    has_active_connection: bool,
}

impl From<User> for UserRead {
    fn from(user: User) -> Self {
        let User { id, external_user_id, first_name, last_name, email, time_zone: _, created_at } = user;
        Self {
            id: id.0,
            created_at,
            first_name,
            last_name,
            email,
            external_user_id,
            last_synced_at: None,
            last_synced_provider: None,
            has_active_connection: false,
        }
    }
}

impl From<UserRow> for UserRead {
    fn from(row: UserRow) -> Self {
        Self {
            last_synced_at: row.last_synced_at,
            last_synced_provider: row.last_synced_provider,
            has_active_connection: row.has_active_connection,
            ..Self::from(row.user)
        }
    }
}

/// What makes or changes a user: members that are null or left out stay empty, or as they are.
#[derive(ToSchema)]
#[expect(dead_code, reason = "documents what `read_user` reads")]
pub(super) struct UserCreate {
    /// First name.
    #[schema(max_length = 100)]
    first_name: Option<String>,
    /// Last name.
    #[schema(max_length = 100)]
    last_name: Option<String>,
    /// E-mail; unique.
    #[schema(format = "email")]
    email: Option<String>,
    /// The id that your own system gives it; unique.
    #[schema(max_length = 255)]
    external_user_id: Option<String>,
}

fn read_user(mut body: JsonBody) -> Result<NewUser, Error> {
    Ok(NewUser {
        first_name: body.text("first_name", NAME_MOST)?,
        last_name: body.text("last_name", NAME_MOST)?,
        email: body.email("email")?,
        external_user_id: body.text("external_user_id", EXTERNAL_ID_MOST)?,
    })
}

/// The longest first or last name.
const NAME_MOST: usize = 100;
/// The longest id of another system.
const EXTERNAL_ID_MOST: usize = 255;

/// A first or last name, as the command line takes it.
///
/// # Errors
/// What is wrong with it.
pub fn person_name(text: &str) -> Result<String, String> {
    argument(text, NAME_MOST)
}

/// The id that another system gives a user, as the command line takes it.
///
/// # Errors
/// What is wrong with it.
pub fn external_user_id(text: &str) -> Result<String, String> {
    argument(text, EXTERNAL_ID_MOST)
}

/// A user's e-mail, as the command line takes it.
///
/// # Errors
/// What is wrong with it.
pub fn user_email(text: &str) -> Result<String, String> {
    match email(text) {
        Err(Error::Invalid(why)) => Err(why),
        _ => Ok(text.to_owned()),
    }
}

/// Which users to list.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct UserQuery {
    /// Page, from 1 on.
    #[param(minimum = 1, default = 1, value_type = Option<i64>)]
    page: i64,
    /// Users a page.
    #[param(minimum = 1, maximum = 100, default = 20, value_type = Option<i64>)]
    limit: i64,
    /// `created_at`, `email`, `first_name`, `last_name` or `last_synced_at`.
    #[param(default = "created_at", value_type = Option<String>)]
    sort_by: &'static str,
    /// `asc` or `desc`.
    #[param(default = "desc", value_type = Option<String>)]
    sort_order: &'static str,
    /// Part of e-mail, first or last name, any case.
    search: Option<String>,
    /// Exactly this e-mail.
    email: Option<String>,
    /// Exactly this id of your own system.
    external_user_id: Option<String>,
}

pub(super) const SORT_BY: [&str; 5] = ["created_at", "email", "first_name", "last_name", "last_synced_at"];
pub(super) const SORT_ORDER: [&str; 2] = ["asc", "desc"];

impl FromQuery for UserQuery {
    fn read(query: &QueryPairs) -> Result<Self, Error> {
        let word = |name: &str, words: &[&'static str]| {
            query.parsed(name, |text| {
                words.iter().copied().find(|word| *word == text).ok_or_else(|| one_of(words.iter().copied()))
            })
        };
        Ok(Self {
            page: query.integer("page", 1, i64::MAX)?.unwrap_or(1),
            limit: query.integer("limit", 1, 100)?.unwrap_or(20),
            sort_by: word("sort_by", &SORT_BY)?.unwrap_or("created_at"),
            sort_order: word("sort_order", &SORT_ORDER)?.unwrap_or("desc"),
            search: query.text("search").map(str::to_owned),
            email: query.parsed("email", |text| email(text).map(|()| text.to_owned()))?,
            external_user_id: query.text("external_user_id").map(str::to_owned),
        })
    }
}

/// A page of users.
#[derive(Serialize, ToSchema)]
pub(super) struct UserPage {
    /// The users.
    items: Vec<UserRead>,
    /// Users in all.
    total: i64,
    /// This page.
    page: i64,
    /// Users a page.
    limit: i64,
    /// Pages in all; 0 when there are no users.
    pages: i64,
    /// Whether there is a page after this one.
    has_next: bool,
    /// Whether there is a page before this one.
    has_prev: bool,
}

/// List users
///
/// Users with what their connections tell. Needs the scope `read`.
#[utoipa::path(
    get,
    path = "/api/v1/users",
    operation_id = "list_users",
    tag = "users",
    params(UserQuery),
    responses((status = 200, description = "A page of users", body = UserPage, example = json!({
        "items": [{
            "id": "b2b6c1de-5a0e-4a39-9d0c-2f8e1f0f4c77", "created_at": "2026-03-01T08:00:00Z", "first_name": "Ada",
            "last_name": "Byron", "email": "ada@example.com", "external_user_id": "customer-7",
            "last_synced_at": "2026-03-10T12:01:04.100Z", "last_synced_provider": "strava", "has_active_connection": true
        }],
        "total": 1, "page": 1, "limit": 20, "pages": 1, "has_next": false, "has_prev": false
    })))
)]
pub(super) async fn list_users(
    _: Caller<MayRead>,
    State(app): State<Arc<App>>,
    Query(query): Query<UserQuery>,
) -> Result<Json<UserPage>, Error> {
    let UserQuery { page, limit, sort_by, sort_order, search, email, external_user_id } = query;
    let filter = UserFilter {
        search: search.filter(|text| !text.is_empty()),
        email,
        external_user_id,
        sort_by,
        descending: sort_order == "desc",
        limit,
        offset: (page - 1).saturating_mul(limit),
    };
    let found = app.state.engine.db.list_users(&filter).await?;
    let pages = (found.total + limit - 1) / limit;
    Ok(Json(UserPage {
        items: found.rows.into_iter().map(UserRead::from).collect(),
        total: found.total,
        page,
        limit,
        pages,
        has_next: page < pages,
        has_prev: page > 1,
    }))
}

/// Create a user
///
/// All fields may be left out. An `external_user_id` that exists already answers the user who has it, unchanged. Needs
/// the scope `sync`.
#[utoipa::path(
    post,
    path = "/api/v1/users",
    operation_id = "create_user",
    tag = "users",
    request_body(content = UserCreate, example = json!({"first_name": "Ada", "email": "ada@example.com"})),
    responses(
        (status = 201, description = "The user, new or found", body = UserRead, example = json!({
            "id": "b2b6c1de-5a0e-4a39-9d0c-2f8e1f0f4c77", "created_at": "2026-03-01T08:00:00Z", "first_name": "Ada",
            "last_name": null, "email": "ada@example.com", "external_user_id": null, "last_synced_at": null,
            "last_synced_provider": null, "has_active_connection": false
        })),
        (status = 409, description = "The e-mail is taken", body = super::error::Body),
        (status = 413, description = "The body is larger than 1 MiB", body = super::error::Body),
    )
)]
pub(super) async fn create_user(
    _: Caller<MaySync>,
    State(app): State<Arc<App>>,
    body: JsonBody,
) -> Result<(StatusCode, Json<UserRead>), Error> {
    let engine = &app.state.engine;
    let user = engine.db.insert_user(read_user(body)?, engine.clock.now()).await?;
    Ok((StatusCode::CREATED, Json(user.into())))
}

/// Get a user
///
/// One user by id. Needs the scope `read`.
#[utoipa::path(
    get,
    path = "/api/v1/users/{user_id}",
    operation_id = "get_user",
    tag = "users",
    params(("user_id" = Uuid, Path, description = "UUID of the user")),
    responses(
        (status = 200, description = "The user", body = UserRead, example = json!({
            "id": "b2b6c1de-5a0e-4a39-9d0c-2f8e1f0f4c77", "created_at": "2026-03-01T08:00:00Z", "first_name": "Ada",
            "last_name": "Byron", "email": "ada@example.com", "external_user_id": null, "last_synced_at": null,
            "last_synced_provider": null, "has_active_connection": false
        })),
        (status = 404, description = "No such user", body = super::error::Body),
    )
)]
pub(super) async fn get_user(
    _: Caller<MayRead>,
    State(app): State<Arc<App>>,
    IdPath(id): IdPath,
) -> Result<Json<UserRead>, Error> {
    let user = app.state.engine.db.find_user(UserId(id)).await?.ok_or_else(|| missing("User", id))?;
    Ok(Json(user.into()))
}

/// Change a user
///
/// Changes the members that are given and not null; a field cannot be emptied. Needs the scope `admin`.
#[utoipa::path(
    patch,
    path = "/api/v1/users/{user_id}",
    operation_id = "update_user",
    tag = "users",
    params(("user_id" = Uuid, Path, description = "UUID of the user")),
    request_body(content = UserCreate, example = json!({"last_name": "Byron"})),
    responses(
        (status = 200, description = "The user as it is now", body = UserRead, example = json!({
            "id": "b2b6c1de-5a0e-4a39-9d0c-2f8e1f0f4c77", "created_at": "2026-03-01T08:00:00Z", "first_name": "Ada",
            "last_name": "Byron", "email": "ada@example.com", "external_user_id": null, "last_synced_at": null,
            "last_synced_provider": null, "has_active_connection": false
        })),
        (status = 404, description = "No such user", body = super::error::Body),
        (status = 409, description = "The e-mail or the external id is taken", body = super::error::Body),
        (status = 413, description = "The body is larger than 1 MiB", body = super::error::Body),
    )
)]
pub(super) async fn update_user(
    _: Caller<MayAdmin>,
    State(app): State<Arc<App>>,
    IdPath(id): IdPath,
    body: JsonBody,
) -> Result<Json<UserRead>, Error> {
    let user = app.state.engine.db.update_user(UserId(id), read_user(body)?).await?;
    Ok(Json(user.ok_or_else(|| missing("User", id))?.into()))
}

/// Delete a user
///
/// Erases a user with connections, records, samples and tasks from the database, for good. Needs the scope `admin`.
#[utoipa::path(
    delete,
    path = "/api/v1/users/{user_id}",
    operation_id = "delete_user",
    tag = "users",
    params(("user_id" = Uuid, Path, description = "UUID of the user")),
    responses(
        (status = 200, description = "The user that was", body = UserRead, example = json!({
            "id": "b2b6c1de-5a0e-4a39-9d0c-2f8e1f0f4c77", "created_at": "2026-03-01T08:00:00Z", "first_name": "Ada",
            "last_name": "Byron", "email": "ada@example.com", "external_user_id": null, "last_synced_at": null,
            "last_synced_provider": null, "has_active_connection": false
        })),
        (status = 404, description = "No such user", body = super::error::Body),
    )
)]
pub(super) async fn delete_user(
    _: Caller<MayAdmin>,
    State(app): State<Arc<App>>,
    IdPath(id): IdPath,
) -> Result<Json<UserRead>, Error> {
    let user = crate::sync::erase_user(&app.state.engine, UserId(id)).await?.ok_or_else(|| missing("User", id))?;
    Ok(Json(user.into()))
}
