//! The sync trigger, on all its paths.

use std::sync::Arc;

use axum::Json;
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use sha2::{Digest, Sha256};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::App;
use super::error::{Error, no_connection, retry_after};
use super::extract::{
    self, Credentials, PathParams, QueryPairs, allow, instant_ms, integer, invalid, missing_key, one_of,
};
use super::tasks::{Counts, Details, details};
use crate::model::{Class, DataType, RunReport, RunSource, RunState, SyncRequest, UserId};
use crate::providers::{Axis, ProviderSpec};
use crate::storage::{Access, Run};
use crate::sync::{self, ProviderSetup};

/// Every parameter of the trigger. All are accepted for every provider, queued and inline.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "documents what `Asked::read` reads")]
pub(super) struct SyncParams {
    /// Which data to sync: `workouts` (activities and exercises), `247` (sleep, recovery, activity samples) or `all`.
    #[param(default = "all", example = "all")]
    data_type: Option<String>,
    /// Answer at once and sync in the background; `false` waits for the end and answers the result.
    #[param(default = true)]
    r#async: Option<bool>,
    /// Read again from this Unix time on (seconds; from 10^11 on milliseconds). 0 reads everything again. Left out: only
    /// what is not stored yet.
    #[param(minimum = 0, example = 1_767_225_600)]
    since: Option<i64>,
    /// Items per call to the provider, never a limit of the result. Left out: as many as suits the provider.
    #[param(minimum = 1, maximum = 100, example = 50)]
    limit: Option<i64>,
    /// Items to skip. A sync with an offset above 0 proves nothing about what is complete.
    #[param(minimum = 0, default = 0)]
    offset: Option<i64>,
    /// Suunto: filter by modification time instead of creation time.
    #[param(default = true)]
    filter_by_modification_time: Option<bool>,
    /// Polar: also fetch samples (heart rate, speed, …).
    #[param(default = false)]
    samples: Option<bool>,
    /// Polar, Strava: also fetch heart rate zones.
    #[param(default = false)]
    zones: Option<bool>,
    /// Polar: also fetch the route.
    #[param(default = false)]
    route: Option<bool>,
    /// Garmin: start of the range, Unix time or ISO 8601.
    #[param(example = "2026-01-01T00:00:00Z")]
    summary_start_time: Option<String>,
    /// Garmin: end of the range, Unix time or ISO 8601.
    #[param(example = "2026-02-01T00:00:00Z")]
    summary_end_time: Option<String>,
}

/// A sync is accepted: it is on disk, and will be done.
#[derive(Serialize, ToSchema)]
pub(super) struct SyncQueued {
    /// Always true.
    success: bool,
    /// Always true.
    r#async: bool,
    /// Ask `GET /api/v1/tasks/{task_id}` how far it is.
    task_id: String,
    /// In plain words.
    message: String,
}

/// A sync is over.
#[derive(Serialize, ToSchema)]
pub(super) struct SyncDone {
    /// Whether every part is true.
    success: bool,
    /// Per part asked for: whether all of it was read.
    details: Details,
    /// The task that this was.
    task_id: String,
    /// What came of it, in numbers.
    counts: Counts,
    /// Why it is no success; absent when it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    reason: Option<String>,
}

/// A checked request.
struct Asked<'a> {
    setup: &'a ProviderSetup,
    user: UserId,
    request: SyncRequest,
    inline: bool,
    once: Option<String>,
}

/// Sync data
///
/// Syncs a user's data from a provider. By default the sync is queued: the answer comes at once with a `task_id`, and
/// the sync is on disk before it is answered. With `async=false` the answer waits for the result; if the sync has to wait
/// for the provider's quota, or takes too long, it goes on by itself and the answer is 202 with the queued body. The same
/// sync asked for twice is one task. Needs the scope `sync`.
#[utoipa::path(
    post,
    path = "/api/v1/{provider}/users/{user_id}/sync",
    operation_id = "sync_user_data",
    tag = "sync",
    params(
        ("provider" = String, Path, description = "Provider name", example = "strava"),
        ("user_id" = uuid::Uuid, Path, description = "UUID of the user to sync data for"),
        SyncParams,
        ("Idempotency-Key" = Option<String>, Header, description = "1 to 255 visible characters: the same key with the same request is one task for a day. Needs an API key"),
    ),
    responses(
        (status = 200, description = "Queued (`async=true`), or the result (`async=false`)", content_type = "application/json", body = SyncAnswer,
            examples(
                ("queued" = (summary = "async=true", value = json!({"success": true, "async": true, "task_id": "0198c0de-7e57-7a39-9d0c-2f8e1f0f4c77", "message": "Sync task queued for strava. Check task status for results."}))),
                ("inline" = (summary = "async=false", value = json!({"success": true, "details": {"workouts": true}, "task_id": "0198c0de-7e57-7a39-9d0c-2f8e1f0f4c77", "counts": {"streams": {"activities": {"listed": 12, "inserted": 2, "updated": 0, "deleted": 0}}, "parts": {"streams": {"stored": 2, "none": 0, "failed": 0}}, "samples": 57600, "files": 4, "calls": 5}}))),
            )),
        (status = 202, description = "`async=false`, but the sync goes on in the background: the queued body", body = SyncQueued,
            headers(("Retry-After" = i64, description = "Seconds after which to ask for the task")),
            example = json!({"success": true, "async": true, "task_id": "0198c0de-7e57-7a39-9d0c-2f8e1f0f4c77", "message": "Sync task queued for strava. Check task status for results."})),
        (status = 404, description = "No such user, or no connection that works; `code` is `unknown_user`, `no_connection`, `reauthorization_required` or `revoked`", body = super::error::Body),
        (status = 409, description = "The Idempotency-Key was used for another request", body = super::error::Body),
        (status = 501, description = "The provider does not have this kind of data", body = super::error::Body),
    )
)]
pub(super) async fn sync_user_data(
    State(app): State<Arc<App>>,
    path: Result<PathParams, Error>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, Error> {
    trigger(&app, path, query.as_deref(), &headers, false).await
}

/// Sync data (path of the mirrored system)
///
/// The same as `POST /api/v1/{provider}/users/{user_id}/sync`, under the path that existing clients of the mirrored
/// system call. Needs the scope `sync`.
#[utoipa::path(
    post,
    path = "/api/v1/providers/{provider}/users/{user_id}/sync",
    operation_id = "sync_provider_user_data",
    tag = "sync",
    params(
        ("provider" = String, Path, description = "Provider name", example = "strava"),
        ("user_id" = uuid::Uuid, Path, description = "UUID of the user to sync data for"),
        SyncParams,
        ("Idempotency-Key" = Option<String>, Header, description = "1 to 255 visible characters: the same key with the same request is one task for a day. Needs an API key"),
    ),
    responses(
        (status = 200, description = "Queued (`async=true`), or the result (`async=false`)", body = SyncAnswer,
            example = json!({"success": true, "async": true, "task_id": "0198c0de-7e57-7a39-9d0c-2f8e1f0f4c77", "message": "Sync task queued for strava. Check task status for results."})),
        (status = 202, description = "`async=false`, but the sync goes on in the background: the queued body", body = SyncQueued,
            headers(("Retry-After" = i64, description = "Seconds after which to ask for the task"))),
        (status = 404, description = "No such user, or no connection that works; `code` is `unknown_user`, `no_connection`, `reauthorization_required` or `revoked`", body = super::error::Body),
        (status = 409, description = "The Idempotency-Key was used for another request", body = super::error::Body),
        (status = 501, description = "The provider does not have this kind of data", body = super::error::Body),
    )
)]
pub(super) async fn sync_provider_user_data(
    State(app): State<Arc<App>>,
    path: Result<PathParams, Error>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, Error> {
    trigger(&app, path, query.as_deref(), &headers, true).await
}

/// One of the two bodies.
#[derive(ToSchema)]
#[schema(as = SyncAnswer)]
#[serde(untagged)]
#[expect(dead_code, reason = "documents that the answer has two forms")]
pub(super) enum SyncAnswer {
    /// `async=true`
    Queued(SyncQueued),
    /// `async=false`
    Done(SyncDone),
}

/// Two statements and one push: who asks and for what in one, the run in the other.
async fn trigger(
    app: &Arc<App>,
    path: Result<PathParams, Error>,
    query: Option<&str>,
    headers: &HeaderMap,
    mirrored: bool,
) -> Result<Response, Error> {
    let engine = &app.state.engine;
    let shown = Credentials::read(app, headers);
    if shown.bearer.is_none() && shown.key_hash.is_none() {
        return Err(missing_key(mirrored));
    }
    let asked = path.and_then(|path| Asked::read(app, &path, query.unwrap_or_default(), headers));
    // Who may not ask does not learn what is wrong with the question.
    let (user, provider) = asked.as_ref().map_or((UserId(Uuid::nil()), ""), |it| (it.user, it.setup.spec().name.0));
    let access = engine.db.find_access(shown.bearer, shown.key_hash.as_deref(), user, provider).await?;
    if !access.is_developer {
        if shown.key_hash.is_none() {
            return Err(missing_key(mirrored));
        }
        allow(app, access.key.clone(), "sync")?;
    }
    let asked = asked?;
    let spec = asked.setup.spec();
    let digest = asked.once.as_ref().map(|_| asked.digest());
    let once = match (asked.once.as_deref(), digest.as_deref()) {
        (Some(word), Some(digest)) => {
            let key = access
                .key
                .as_ref()
                .filter(|key| key.is_valid(engine.clock.now()))
                .ok_or_else(|| invalid("Idempotency-Key needs an API key"))?;
            Some((key.id, word, digest))
        }
        _ => None,
    };
    let connection = connection(&access)?;
    let (class, source) = (Class::Interactive, RunSource::Pull);
    let accepted = sync::submit(engine, asked.setup, connection, &asked.request, class, source, once).await?;
    let accepted = accepted.ok_or_else(|| no_connection("no_connection"))?;
    let queued = || {
        Json(SyncQueued {
            success: true,
            r#async: true,
            task_id: accepted.id.to_string(),
            message: format!("Sync task queued for {}. Check task status for results.", spec.name),
        })
    };
    if !asked.inline {
        return Ok(queued().into_response());
    }
    let run = sync::run_inline(engine, accepted.id).await?;
    if !run.run_state().is_final() {
        let mut response = (StatusCode::ACCEPTED, queued()).into_response();
        retry_after(&mut response, super::tasks::come_back_s(&run, engine.clock.now()));
        return Ok(response);
    }
    Ok(Json(done(spec, &run, &asked.request)).into_response())
}

fn done(spec: &ProviderSpec, run: &Run, request: &SyncRequest) -> SyncDone {
    let report: RunReport = run.report.as_deref().and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    let details = details(spec, run.run_state(), &report, request.data_type);
    SyncDone {
        success: details.all() && run.run_state() != RunState::Failed,
        details,
        task_id: run.id.to_string(),
        counts: Counts::from(&report),
        reason: run.reason.clone(),
    }
}

/// The connection that a request is for, or which of four reasons there is for none.
pub(super) fn connection(access: &Access) -> Result<crate::model::ConnectionId, Error> {
    match &access.target {
        _ if !access.user_exists => Err(no_connection("unknown_user")),
        None => Err(no_connection("no_connection")),
        Some(target) if target.status != "active" => Err(no_connection("revoked")),
        Some(target) if target.account_status != "active" => Err(no_connection("reauthorization_required")),
        Some(target) => Ok(target.connection_id),
    }
}

impl<'a> Asked<'a> {
    /// Checks, in this order: provider, user id, query, header, what the provider has. No look at the database.
    fn read(app: &'a App, PathParams(path): &PathParams, query: &str, headers: &HeaderMap) -> Result<Self, Error> {
        let engine = &app.state.engine;
        let param = |name| path.iter().find(|(have, _)| *have == name).map_or("", |(_, value)| value);
        let setup =
            engine.provider(param("provider")).ok_or_else(|| one_of(crate::providers::names().map(|name| name.0)))?;
        let user = UserId(extract::uuid(param("user_id"))?);
        let (request, inline) = read_query(setup.spec(), query)?;
        let once = headers.get("idempotency-key").map(|value| idempotency_key(value.as_bytes())).transpose()?;
        sync::parse_request(setup.spec(), &request, engine.clock.now())?;
        Ok(Self { setup, user, request, inline, once })
    }

    /// Equal for requests that ask for the same.
    fn digest(&self) -> Vec<u8> {
        let request = serde_json::to_string(&self.request).unwrap_or_default();
        let text = format!("{}\n{}\n{}\n{request}", self.setup.spec().name, self.user, self.inline);
        Sha256::digest(text.as_bytes()).to_vec()
    }
}

fn idempotency_key(bytes: &[u8]) -> Result<String, Error> {
    let good = (1..=255).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic);
    let text = std::str::from_utf8(bytes).ok().filter(|_| good);
    text.map(str::to_owned).ok_or_else(|| invalid("Idempotency-Key should have 1 to 255 visible characters"))
}

/// The request, and whether the answer waits for its end.
fn read_query(spec: &ProviderSpec, query: &str) -> Result<(SyncRequest, bool), Error> {
    let query = QueryPairs::new(query)?;
    let data_type = query
        .parsed("data_type", |text| {
            let found = DataType::ALL.into_iter().find(|data_type| data_type.as_str() == text);
            found.ok_or_else(|| one_of(DataType::ALL.map(DataType::as_str)))
        })?
        .unwrap_or_default();
    let inline = !query.boolean("async")?.unwrap_or(true);
    let since = query.parsed("since", |text| Ok(sync::since_ms(integer(text)?)?))?;
    let limit = query.integer("limit", 1, 100)?;
    let offset = query.integer("offset", 0, i64::from(u32::MAX))?;
    let by_creation_time = !query.boolean("filter_by_modification_time")?.unwrap_or(true);
    let [samples, zones, route] =
        ["samples", "zones", "route"].map(|name| query.boolean(name).map(Option::unwrap_or_default));
    let [samples, zones, route] = [samples?, zones?, route?];
    let start = query.parsed("summary_start_time", instant_ms)?;
    let end = query.parsed("summary_end_time", instant_ms)?;
    if let (Some(start), Some(end)) = (start, end)
        && end <= start
    {
        return Err(invalid("summary_end_time must be after summary_start_time"));
    }

    // One provider's parameters sent to another are checked, then left out and named in the report.
    let mut ignored = Vec::new();
    let mut takes = |name: &str, sent: bool, takes: bool| {
        if sent && !takes {
            ignored.push(name.to_owned());
        }
        sent && takes
    };
    let ranges = spec.streams.iter().any(|stream| stream.axis != Axis::None);
    let has_part = |name: &str| spec.parts.iter().any(|part| !part.primary && part.name.0 == name);
    let summaries = spec.name.0 == "garmin";
    let request = SyncRequest {
        data_type,
        since_ms: since
            .filter(|_| takes("since", true, ranges))
            .or(start.filter(|_| takes("summary_start_time", true, summaries))),
        until_ms: end.filter(|_| takes("summary_end_time", true, summaries)),
        limit: limit.and_then(|limit| u32::try_from(limit).ok()).filter(|_| takes("limit", true, ranges)),
        offset: offset
            .and_then(|offset| u32::try_from(offset).ok())
            .filter(|offset| takes("offset", *offset > 0, ranges))
            .unwrap_or(0),
        by_creation_time: takes("filter_by_modification_time", by_creation_time, spec.name.0 == "suunto"),
        samples: takes("samples", samples, has_part("samples")),
        zones: takes("zones", zones, has_part("zones")),
        route: takes("route", route, has_part("route")),
        reconcile: false,
        items: Vec::new(),
        check_grant: false,
        rebuild: false,
        ignored,
    };
    Ok((request, inline))
}
