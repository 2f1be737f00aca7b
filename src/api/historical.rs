//! Reading a range of the past again, in the background.

use std::sync::Arc;

use axum::Json;
use axum::extract::{RawQuery, State};
use chrono::{Duration, SecondsFormat};
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::App;
use super::error::{Error, no_connection};
use super::extract::{self, Caller, MaySync, PathParams, QueryPairs, one_of};
use crate::model::{Class, RunSource, SyncRequest, UserId};
use crate::providers::Axis;
use crate::sync;

/// Days that are read when nobody says how many.
const DAYS: i64 = 90;

/// A historical sync is accepted: it is on disk, and will be done.
#[derive(Serialize, ToSchema)]
pub(super) struct HistoricalSyncStarted {
    /// Always true.
    success: bool,
    /// Provider name.
    provider: String,
    /// Whose data.
    user_id: Uuid,
    /// Always `pull_api`: the provider is asked.
    method: &'static str,
    /// Ask `GET /api/v1/tasks/{task_id}` how far it is.
    task_id: String,
    /// In plain words.
    message: String,
    /// So many days back.
    days: i64,
    /// From when on, UTC.
    start_date: String,
    /// Up to when, UTC.
    end_date: String,
}

/// Sync the past
///
/// Reads the last days of a user's data from a provider again, in the background and with what the provider's quota leaves:
/// whatever is due by the clock, or asked for in person, goes first. Needs the scope `sync`.
#[utoipa::path(
    post,
    path = "/api/v1/providers/{provider}/users/{user_id}/sync/historical",
    operation_id = "start_historical_sync",
    tag = "sync",
    params(
        ("provider" = String, Path, description = "Provider name", example = "strava"),
        ("user_id" = Uuid, Path, description = "UUID of the user to sync data for"),
        ("days" = Option<i64>, Query, minimum = 1, maximum = 365, description = "Days back from now; 90 when left out", example = 90),
    ),
    responses(
        (status = 200, description = "Queued", body = HistoricalSyncStarted, example = json!({
            "success": true, "provider": "strava", "user_id": "b2b6c1de-5a0e-4a39-9d0c-2f8e1f0f4c77",
            "method": "pull_api", "task_id": "0198c0de-7e57-7a39-9d0c-2f8e1f0f4c77",
            "message": "Historical sync queued for 90 days of strava data.", "days": 90,
            "start_date": "2025-12-10T12:00:00.000+00:00", "end_date": "2026-03-10T12:00:00.000+00:00"
        })),
        (status = 404, description = "No such user, or no connection that works; `code` is `unknown_user`, `no_connection`, `reauthorization_required` or `revoked`", body = super::error::Body),
    )
)]
pub(super) async fn start_historical_sync(
    _: Caller<MaySync>,
    State(app): State<Arc<App>>,
    PathParams(path): PathParams,
    RawQuery(query): RawQuery,
) -> Result<Json<HistoricalSyncStarted>, Error> {
    let engine = &app.state.engine;
    let param = |name| path.iter().find(|(have, _)| *have == name).map_or("", |(_, value)| value);
    let setup =
        engine.provider(param("provider")).ok_or_else(|| one_of(crate::providers::names().map(|name| name.0)))?;
    let user = UserId(extract::uuid(param("user_id"))?);
    let days = QueryPairs::new(query.as_deref().unwrap_or_default())?.integer("days", 1, 365)?.unwrap_or(DAYS);
    let name = setup.spec().name;
    if setup.spec().streams.iter().all(|stream| stream.axis == Axis::None) {
        return Err(Error::Invalid(format!("Provider '{name}' does not support historical sync.")));
    }
    let access = engine.db.find_access(None, None, user, name.0).await?;
    let connection = super::sync::connection(&access)?;
    let end = engine.clock.now();
    let start = end - Duration::days(days);
    let request = SyncRequest { since_ms: Some(start.timestamp_millis()), ..SyncRequest::default() };
    let (class, source) = (Class::Backfill, RunSource::Backfill);
    let accepted = sync::submit(engine, setup, connection, &request, class, source, None).await?;
    let accepted = accepted.ok_or_else(|| no_connection("no_connection"))?;
    let date = |at: chrono::DateTime<chrono::Utc>| at.to_rfc3339_opts(SecondsFormat::Millis, false);
    Ok(Json(HistoricalSyncStarted {
        success: true,
        provider: name.0.to_owned(),
        user_id: user.0,
        method: "pull_api",
        task_id: accepted.id.to_string(),
        message: format!("Historical sync queued for {days} days of {name} data."),
        days,
        start_date: date(start),
        end_date: date(end),
    }))
}
