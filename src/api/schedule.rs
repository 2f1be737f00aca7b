//! When a connection is read without anybody asking.

use std::sync::Arc;

use axum::Json;
use axum::extract::{RawPathParams, State};
use chrono::{DateTime, Utc};
use chrono_tz::Tz;
use serde::Serialize;
use utoipa::ToSchema;

use super::App;
use super::error::{Error, no_connection};
use super::extract::{self, Caller, JsonBody, MayRead, MaySync, PathParams, invalid, one_of};
use crate::model::{ConnectionId, Schedule, UserId};
use crate::storage::ScheduleRow;
use crate::sync::{self, ProviderSetup};

/// When a connection is read without anybody asking.
#[derive(Serialize, ToSchema)]
pub(super) struct ScheduleRead {
    /// An interval (`6h`, `30m`, `1d`; a tenth more or less each time), five fields of cron, or `off`.
    schedule: String,
    /// Whether it is that of the settings; else it was set for this connection.
    is_default: bool,
    /// The user's zone, in which cron is read.
    time_zone: String,
    /// When the connection is due; it begins when the provider's quota has room. Null when it is off.
    #[schema(required)]
    next_at: Option<DateTime<Utc>>,
    /// When the clock last began to read it; null: never yet.
    #[schema(required)]
    last_at: Option<DateTime<Utc>>,
    /// When the daily sweep for late uploads, edits and deletes is due; null when the schedule is off.
    #[schema(required)]
    reconcile_at: Option<DateTime<Utc>>,
    /// When that sweep last began; null: never yet.
    #[schema(required)]
    reconciled_at: Option<DateTime<Utc>>,
    /// When the provider last sent something about the connection, where that is so long ago that it is asked again;
    /// null: it sends, or is not expected to.
    #[schema(required)]
    quiet_since: Option<DateTime<Utc>>,
}

impl ScheduleRead {
    fn new(app: &App, setup: &ProviderSetup, row: ScheduleRow) -> Self {
        let own = row.own();
        let schedule = own.as_ref().unwrap_or_else(|| sync::default_schedule(&app.state.engine, setup));
        let is_on = *schedule != Schedule::Off;
        Self {
            schedule: schedule.to_string(),
            is_default: own.is_none(),
            time_zone: row.time_zone,
            next_at: is_on.then_some(row.next_at),
            last_at: row.last_at,
            reconcile_at: is_on.then_some(row.reconcile_at),
            reconciled_at: row.reconciled_at,
            quiet_since: row.quiet_since,
        }
    }
}

/// What to set.
#[derive(ToSchema)]
#[expect(dead_code, reason = "documents what the handler reads")]
pub(super) struct ScheduleUpdate {
    /// An interval from `1m` to `28d`, five fields of cron in the user's zone, or `off`; null: that of the settings.
    #[schema(required, example = "0 6 * * *")]
    schedule: Option<String>,
    /// The user's zone from now on, as IANA names it; left out or null: as it is.
    #[schema(example = "Europe/Zurich")]
    time_zone: Option<String>,
}

/// The provider and the active connection that a path names.
async fn target<'a>(app: &'a App, path: &RawPathParams) -> Result<(&'a ProviderSetup, ConnectionId), Error> {
    let param = |name| path.iter().find(|(have, _)| *have == name).map_or("", |(_, value)| value);
    let user = UserId(extract::uuid(param("user_id"))?);
    let engine = &app.state.engine;
    let setup =
        engine.provider(param("provider")).ok_or_else(|| one_of(crate::providers::names().map(|name| name.0)))?;
    let access = engine.db.find_access(None, None, user, setup.spec().name.0).await?;
    Ok((setup, super::sync::connection(&access)?))
}

fn time_zone(text: &str) -> Result<Tz, Error> {
    text.parse().map_err(|_| Error::Invalid(format!("`{text}` is no time zone; write one as IANA does: Europe/Zurich")))
}

/// Get a schedule
///
/// When a user's connection is read without anybody asking. Needs the scope `read`.
#[utoipa::path(
    get,
    path = "/api/v1/users/{user_id}/connections/{provider}/schedule",
    operation_id = "get_schedule",
    tag = "connections",
    params(
        ("user_id" = Uuid, Path, description = "UUID of the user"),
        ("provider" = String, Path, description = "Provider name", example = "strava"),
    ),
    responses(
        (status = 200, description = "The schedule", body = ScheduleRead, example = json!({
            "schedule": "6h", "is_default": true, "time_zone": "Europe/Zurich", "next_at": "2026-03-10T17:41:08.312Z",
            "last_at": "2026-03-10T11:52:40.100Z", "reconcile_at": "2026-03-11T02:10:00Z",
            "reconciled_at": "2026-03-10T04:10:00Z", "quiet_since": null
        })),
        (status = 404, description = "No such user, or no connection that works; `code` is `unknown_user`, `no_connection`, `reauthorization_required` or `revoked`", body = super::error::Body),
    )
)]
pub(super) async fn get_schedule(
    _: Caller<MayRead>,
    State(app): State<Arc<App>>,
    PathParams(path): PathParams,
) -> Result<Json<ScheduleRead>, Error> {
    let (setup, connection) = target(&app, &path).await?;
    let row = app.state.engine.db.find_schedule(connection).await?;
    let row = row.ok_or_else(|| no_connection("no_connection"))?;
    Ok(Json(ScheduleRead::new(&app, setup, row)))
}

/// Set a schedule
///
/// How often a user's connection is read without anybody asking: by an interval, by cron in the user's zone, never
/// (`off`), or (null) as the settings say. `off` ends the daily sweep, too. Needs the scope `sync`.
#[utoipa::path(
    put,
    path = "/api/v1/users/{user_id}/connections/{provider}/schedule",
    operation_id = "set_schedule",
    tag = "connections",
    params(
        ("user_id" = Uuid, Path, description = "UUID of the user"),
        ("provider" = String, Path, description = "Provider name", example = "strava"),
    ),
    request_body(content = ScheduleUpdate, example = json!({"schedule": "0 6 * * *", "time_zone": "Europe/Zurich"})),
    responses(
        (status = 200, description = "The schedule as it is now", body = ScheduleRead, example = json!({
            "schedule": "0 6 * * *", "is_default": false, "time_zone": "Europe/Zurich",
            "next_at": "2026-03-11T05:00:00Z", "last_at": null, "reconcile_at": "2026-03-11T02:10:00Z",
            "reconciled_at": null, "quiet_since": null
        })),
        (status = 404, description = "No such user, or no connection that works; `code` is `unknown_user`, `no_connection`, `reauthorization_required` or `revoked`", body = super::error::Body),
        (status = 413, description = "The body is larger than 1 MiB", body = super::error::Body),
    )
)]
pub(super) async fn set_schedule(
    _: Caller<MaySync>,
    State(app): State<Arc<App>>,
    PathParams(path): PathParams,
    mut body: JsonBody,
) -> Result<Json<ScheduleRead>, Error> {
    if !body.contains("schedule") {
        return Err(invalid("Field required"));
    }
    let own: Option<Schedule> =
        body.text("schedule", 200)?.map(|text| text.parse()).transpose().map_err(Error::Invalid)?;
    let zone = body.text("time_zone", 100)?.map(|text| time_zone(&text)).transpose()?;
    let (setup, connection) = target(&app, &path).await?;
    let row = sync::set_schedule(&app.state.engine, setup, connection, own.as_ref(), zone).await?;
    let row = row.ok_or_else(|| no_connection("no_connection"))?;
    Ok(Json(ScheduleRead::new(&app, setup, row)))
}
