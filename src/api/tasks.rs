//! Tasks: what became of a sync.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{DateTime, Utc};
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::App;
use super::error::{Error, missing, retry_after};
use super::extract::{Caller, FromQuery, IdPath, MayRead, MaySync, Query, QueryPairs, one_of, uuid};
use crate::model::{Class, DataType, Progress, RunId, RunReport, RunState, UserId};
use crate::providers::{self, ProviderSpec};
use crate::storage::{Run, RunFilter};
use crate::sync::part_outcomes;

/// How soon to ask again for a task that is being worked on, seconds.
const WORKING_S: i64 = 2;

/// What became of a sync.
#[derive(Serialize, ToSchema)]
pub(super) struct Task {
    /// The id that the sync was answered with.
    task_id: Uuid,
    /// Whose data.
    user_id: Uuid,
    /// From where.
    provider: String,
    /// `queued`, `in_progress`, `waiting` (put back: due again later), then for good `success`, `partial`, `failed` or
    /// `cancelled`.
    #[schema(value_type = String, example = "in_progress")]
    status: RunState,
    /// Whether the status is final.
    terminal: bool,
    /// Why it waits, failed, is partial or was cancelled; absent when there is nothing to say.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    reason: Option<String>,
    /// When it goes on; only while it is queued or waiting.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    due_at: Option<DateTime<Utc>>,
    /// Whether it was asked to end.
    cancel_requested: bool,
    /// Who asked for it: `pull`, `webhook`, `schedule` or `backfill`.
    source: String,
    /// How urgent it is: `interactive`, `webhook`, `schedule` or `backfill`.
    #[schema(value_type = String, example = "interactive")]
    class: Class,
    /// What was asked for.
    #[schema(value_type = Object)]
    request: serde_json::Value,
    /// Failed attempts since it last got on.
    attempts: i64,
    /// When it was accepted.
    created_at: DateTime<Utc>,
    /// When the work began; absent before.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    started_at: Option<DateTime<Utc>>,
    /// When it became final; absent before.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    ended_at: Option<DateTime<Utc>>,
    /// How far it is; absent before its first page.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    progress: Option<TaskProgress>,
    /// Per part asked for: whether all of it was read. Only when final.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    details: Option<Details>,
    /// What has come of it so far; absent before the first time it ended or was put back.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    report: Option<Report>,
}

/// How far a task is.
#[derive(Serialize, ToSchema)]
pub(super) struct TaskProgress {
    /// The stream or part being read.
    stream: String,
    /// Items of it done by this task.
    done: u64,
    /// Items of it in all, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    total: Option<u64>,
    /// Calls left in the tightest quota of the provider.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    quota_left: Option<u64>,
    /// Seconds until the task is thought to end, waits for quota included.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    eta_seconds: Option<u64>,
    /// Calls made so far.
    calls: u64,
}

/// Per part of the data: whether all of it was read. A part that was not asked for, or that the provider does not have,
/// is absent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub(super) struct Details {
    /// Activities and exercises.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    workouts: Option<bool>,
    /// Sleep, recovery, activity samples.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    data_247: Option<bool>,
}

impl Details {
    pub(super) fn all(&self) -> bool {
        [self.workouts, self.data_247].into_iter().flatten().all(|part| part)
    }
}

/// What came of a sync, in numbers.
#[derive(Serialize, ToSchema)]
pub(super) struct Counts {
    /// Per stream.
    streams: BTreeMap<String, StreamCounts>,
    /// Per kind of further answer about a record (detail, streams, …).
    parts: BTreeMap<String, PartCounts>,
    /// Samples stored.
    samples: u64,
    /// Files written.
    files: u64,
    /// Calls to the provider.
    calls: u64,
}

/// A stream, in numbers.
#[derive(Serialize, ToSchema)]
pub(super) struct StreamCounts {
    /// Items that the provider listed.
    listed: u64,
    /// Records new to us.
    inserted: u64,
    /// Records that changed.
    updated: u64,
    /// Records found deleted.
    deleted: u64,
}

/// Further answers, in numbers.
#[derive(Serialize, ToSchema)]
pub(super) struct PartCounts {
    /// Stored.
    stored: u64,
    /// The provider has none.
    none: u64,
    /// Given up.
    failed: u64,
}

/// Counts, and what went wrong.
#[derive(Serialize, ToSchema)]
pub(super) struct Report {
    /// The numbers.
    counts: Counts,
    /// Per stream: what went wrong. Streams without trouble are absent.
    errors: BTreeMap<String, String>,
    /// Things worth knowing: ignored parameters, dropped values.
    notes: Vec<String>,
}

impl From<&RunReport> for Counts {
    fn from(report: &RunReport) -> Self {
        let streams = report.streams.iter().map(|(name, stream)| {
            let (listed, inserted) = (stream.listed, stream.inserted);
            (name.clone(), StreamCounts { listed, inserted, updated: stream.updated, deleted: stream.deleted })
        });
        let parts = report.parts.iter().map(|(name, part)| {
            (name.clone(), PartCounts { stored: part.stored, none: part.none, failed: part.failed })
        });
        let (samples, files, calls) = (report.samples, report.files, report.calls);
        Self { streams: streams.collect(), parts: parts.collect(), samples, files, calls }
    }
}

impl From<RunReport> for Report {
    fn from(report: RunReport) -> Self {
        let counts = Counts::from(&report);
        let errors = report.streams.into_iter().filter_map(|(name, stream)| Some((name, stream.error?)));
        Self { counts, errors: errors.collect(), notes: report.notes }
    }
}

impl From<Progress> for TaskProgress {
    fn from(progress: Progress) -> Self {
        let Progress { stream, done, total, quota_left, eta_seconds, calls } = progress;
        Self { stream, done, total, quota_left, eta_seconds, calls }
    }
}

/// What became of each part of the data.
pub(super) fn details(spec: &ProviderSpec, state: RunState, report: &RunReport, asked: DataType) -> Details {
    let outcomes = part_outcomes(spec, state, report, asked);
    let part = |name: &str| outcomes.iter().find(|(part, _)| *part == name).map(|(_, whole)| *whole);
    Details { workouts: part("workouts"), data_247: part("data_247") }
}

/// Seconds until it is worth asking again.
pub(super) fn come_back_s(run: &Run, now: DateTime<Utc>) -> i64 {
    match run.run_state() {
        RunState::Queued | RunState::Waiting => ((run.due_at - now).num_milliseconds() + 999).div_euclid(1000).max(1),
        _ => WORKING_S,
    }
}

impl From<Run> for Task {
    fn from(run: Run) -> Self {
        let state = run.run_state();
        let terminal = state.is_final();
        let request: serde_json::Value = serde_json::from_str(&run.request).unwrap_or_default();
        let report: Option<RunReport> = run.report.as_deref().and_then(|text| serde_json::from_str(text).ok());
        let progress: Option<Progress> = run.progress.as_deref().and_then(|text| serde_json::from_str(text).ok());
        let asked = serde_json::from_value(request["data_type"].clone()).unwrap_or_default();
        let details = providers::find(&run.provider)
            .filter(|_| terminal)
            .map(|provider| details(provider.spec(), state, report.as_ref().unwrap_or(&RunReport::default()), asked));
        Self {
            task_id: run.id.0,
            user_id: run.user_id.0,
            status: state,
            terminal,
            due_at: matches!(state, RunState::Queued | RunState::Waiting).then_some(run.due_at),
            class: run.run_class(),
            cancel_requested: run.cancel_requested,
            request,
            attempts: run.attempts,
            created_at: run.created_at,
            started_at: run.started_at,
            ended_at: run.ended_at,
            progress: progress.map(TaskProgress::from),
            details,
            report: report.map(Report::from),
            provider: run.provider,
            reason: run.reason,
            source: run.source,
        }
    }
}

fn answer(run: Run, now: DateTime<Utc>) -> Response {
    let wait = (!run.run_state().is_final()).then(|| come_back_s(&run, now));
    let mut response = Json(Task::from(run)).into_response();
    if let Some(seconds) = wait {
        retry_after(&mut response, seconds);
    }
    response
}

/// Get a task
///
/// How far a sync is, and in the end what came of it. While it is not terminal, the header `Retry-After` says when to
/// ask again. Final tasks are kept for 90 days, and always the last 20 of a connection. Needs the scope `read`.
#[utoipa::path(
    get,
    path = "/api/v1/tasks/{task_id}",
    operation_id = "get_task",
    tag = "tasks",
    params(("task_id" = Uuid, Path, description = "The id that the sync was answered with")),
    responses(
        (status = 200, description = "The task", body = Task,
            headers(("Retry-After" = Option<i64>, description = "Seconds after which to ask again; absent when terminal")),
            example = json!({
                "task_id": "0198c0de-7e57-7a39-9d0c-2f8e1f0f4c77", "user_id": "b2b6c1de-5a0e-4a39-9d0c-2f8e1f0f4c77",
                "provider": "strava", "status": "waiting", "terminal": false, "reason": "quota spent",
                "due_at": "2026-03-10T12:15:00Z", "cancel_requested": false, "source": "pull", "class": "backfill",
                "request": {"data_type": "all"}, "attempts": 0, "created_at": "2026-03-10T12:01:00Z",
                "started_at": "2026-03-10T12:01:00.040Z",
                "progress": {"stream": "streams", "done": 98, "total": 709, "quota_left": 0, "eta_seconds": 6300, "calls": 104}
            })),
        (status = 404, description = "No such task", body = super::error::Body),
    )
)]
pub(super) async fn get_task(
    _: Caller<MayRead>,
    State(app): State<Arc<App>>,
    IdPath(id): IdPath,
) -> Result<Response, Error> {
    let engine = &app.state.engine;
    let run = engine.db.find_run(RunId(id)).await?.ok_or_else(|| missing("Task", id))?;
    Ok(answer(run, engine.clock.now()))
}

/// Cancel a task
///
/// Ends a sync for everybody who holds its id: at once when it is queued or waiting, at the next page when it is being
/// worked on (then the answer is not terminal yet). What is stored stays. A final task stays as it is. Needs the scope
/// `sync`.
#[utoipa::path(
    delete,
    path = "/api/v1/tasks/{task_id}",
    operation_id = "cancel_task",
    tag = "tasks",
    params(("task_id" = Uuid, Path, description = "The id that the sync was answered with")),
    responses(
        (status = 200, description = "The task as it is now", body = Task,
            headers(("Retry-After" = Option<i64>, description = "Seconds after which to ask again; absent when terminal")),
            example = json!({
                "task_id": "0198c0de-7e57-7a39-9d0c-2f8e1f0f4c77", "user_id": "b2b6c1de-5a0e-4a39-9d0c-2f8e1f0f4c77",
                "provider": "strava", "status": "cancelled", "terminal": true, "reason": "cancelled on request",
                "cancel_requested": false, "source": "pull", "class": "interactive", "request": {"data_type": "all"},
                "attempts": 0, "created_at": "2026-03-10T12:01:00Z", "ended_at": "2026-03-10T12:01:09.200Z",
                "details": {"workouts": false}
            })),
        (status = 404, description = "No such task", body = super::error::Body),
    )
)]
pub(super) async fn cancel_task(
    _: Caller<MaySync>,
    State(app): State<Arc<App>>,
    IdPath(id): IdPath,
) -> Result<Response, Error> {
    let engine = &app.state.engine;
    let now = engine.clock.now();
    let run = engine.db.cancel_run(RunId(id), now).await?.ok_or_else(|| missing("Task", id))?;
    if run.run_state().is_final() {
        engine.tell_last(run.id).await;
    }
    Ok(answer(run, now))
}

/// Which tasks to list.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct TaskQuery {
    /// Only of this user.
    user_id: Option<Uuid>,
    /// Only of this provider.
    provider: Option<String>,
    /// Only in this state.
    #[param(value_type = Option<String>)]
    status: Option<RunState>,
    /// Tasks a page.
    #[param(minimum = 1, maximum = 100, default = 50, value_type = Option<i64>)]
    limit: i64,
    /// `next_cursor` of the page before.
    #[param(value_type = Option<String>)]
    cursor: Option<RunId>,
}

impl FromQuery for TaskQuery {
    fn read(query: &QueryPairs) -> Result<Self, Error> {
        Ok(Self {
            user_id: query.parsed("user_id", uuid)?,
            provider: query.parsed("provider", |text| {
                let found = providers::find(text).map(|provider| provider.spec().name.0.to_owned());
                found.ok_or_else(|| one_of(providers::names().map(|name| name.0)))
            })?,
            status: query.parsed("status", |text| {
                RunState::parse(text).ok_or_else(|| one_of(RunState::ALL.map(RunState::as_str)))
            })?,
            limit: query.integer("limit", 1, 100)?.unwrap_or(50),
            cursor: query.parsed("cursor", read_cursor)?,
        })
    }
}

/// A page of tasks, newest first.
#[derive(Serialize, ToSchema)]
pub(super) struct TaskPage {
    /// The tasks.
    items: Vec<Task>,
    /// Ask with this `cursor` for the next page; null on the last one.
    #[schema(required)]
    next_cursor: Option<String>,
}

/// List tasks
///
/// Tasks, newest first, in pages that stay put while new tasks come in. Needs the scope `read`.
#[utoipa::path(
    get,
    path = "/api/v1/tasks",
    operation_id = "list_tasks",
    tag = "tasks",
    params(TaskQuery),
    responses((status = 200, description = "A page of tasks", body = TaskPage, example = json!({
        "items": [{
            "task_id": "0198c0de-7e57-7a39-9d0c-2f8e1f0f4c77", "user_id": "b2b6c1de-5a0e-4a39-9d0c-2f8e1f0f4c77",
            "provider": "strava", "status": "success", "terminal": true, "cancel_requested": false, "source": "pull",
            "class": "interactive", "request": {"data_type": "all"}, "attempts": 0,
            "created_at": "2026-03-10T12:01:00Z", "started_at": "2026-03-10T12:01:00.040Z",
            "ended_at": "2026-03-10T12:01:04.100Z", "details": {"workouts": true},
            "report": {
                "counts": {"streams": {"activities": {"listed": 12, "inserted": 2, "updated": 0, "deleted": 0}},
                    "parts": {"streams": {"stored": 2, "none": 0, "failed": 0}}, "samples": 57600, "files": 4, "calls": 5},
                "errors": {}, "notes": []
            }
        }],
        "next_cursor": null
    })))
)]
pub(super) async fn list_tasks(
    _: Caller<MayRead>,
    State(app): State<Arc<App>>,
    Query(query): Query<TaskQuery>,
) -> Result<Json<TaskPage>, Error> {
    let TaskQuery { user_id, provider, status, limit, cursor } = query;
    let filter = RunFilter { user: user_id.map(UserId), provider, state: status, before: cursor, limit: limit + 1 };
    let mut runs = app.state.engine.db.list_runs(&filter).await?;
    let size = usize::try_from(limit).unwrap_or(usize::MAX);
    let more = runs.len() > size;
    runs.truncate(size);
    let next_cursor = runs.last().filter(|_| more).map(|run| URL_SAFE_NO_PAD.encode(run.id.0.as_bytes()));
    Ok(Json(TaskPage { items: runs.into_iter().map(Task::from).collect(), next_cursor }))
}

fn read_cursor(text: &str) -> Result<RunId, Error> {
    let id = URL_SAFE_NO_PAD.decode(text).ok().and_then(|bytes| Uuid::from_slice(&bytes).ok());
    id.map(RunId).ok_or_else(|| {
        let shown: String = text.chars().take(100).collect();
        Error::Invalid(format!("Invalid cursor format: '{shown}'. Expected the next_cursor of another page."))
    })
}
