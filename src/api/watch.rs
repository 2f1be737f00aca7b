//! Watching: events of runs as they happen and as they were, and where the runs of the mirrored API stand.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::Response;
use chrono::{DateTime, Utc};
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use serde::Serialize;
use serde_json::{Map, Value};
use tokio::time::Instant;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::App;
use super::error::{Error, no_user, set};
use super::extract::{Caller, Credentials, FromQuery, IdPath, MayRead, Query, QueryPairs, uuid};
use super::token;
use crate::model::UserId;
use crate::storage::{RunEvent, RunEventFilter};
use crate::sync::{Engine, Event, EventLine};
use crate::telemetry;

/// A listener that is behind takes this many events from the rows at a time.
const PAGE: i64 = 50;

/// While the database is away, a listener that is behind asks it this often.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// Something that a sync went through.
#[derive(ToSchema)]
#[schema(example = json!({
    "event_id": "0198c0de-7e99-7a39-9d0c-2f8e1f0f4c77", "run_id": "0198c0de-7e57-7a39-9d0c-2f8e1f0f4c77",
    "user_id": "b2b6c1de-5a0e-4a39-9d0c-2f8e1f0f4c77", "provider": "strava", "source": "pull", "stage": "completed",
    "status": "success", "message": "Sync from strava completed · 57600 new, 0 updated", "progress": 1.0,
    "items_processed": 57600, "items_total": null, "error": null, "primary_user_id": null,
    "metadata": {
        "task_id": "0198c0de-7e57-7a39-9d0c-2f8e1f0f4c77", "is_historical": false,
        "params": {"workouts": {"success": true, "inserted": 2, "updated": 0}}, "inserted": 57600, "updated": 0
    },
    "started_at": null, "ended_at": "2026-03-10T12:01:04.100Z", "timestamp": "2026-03-10T12:01:04.100Z"
}))]
#[expect(dead_code, reason = "documents what `sync::Event` writes")]
pub(super) struct SyncStatusEvent {
    /// Its id.
    event_id: Uuid,
    /// The sync; the `task_id` that it was answered with.
    run_id: String,
    /// Whose data.
    user_id: Uuid,
    /// From where.
    provider: String,
    /// Who asked: `pull` (a call or the clock), `webhook`, `backfill`, …
    source: String,
    /// `started`, `fetching`, `completed`, `failed` or `cancelled`.
    stage: String,
    /// `in_progress`, then for good `success`, `partial`, `failed`, `cancelled` or `skipped`.
    status: String,
    /// In plain words.
    #[schema(required)]
    message: Option<String>,
    /// From 0 to 1.
    #[schema(required)]
    progress: Option<f64>,
    /// Samples stored.
    #[schema(required)]
    items_processed: Option<u64>,
    /// Not known in advance.
    #[schema(required)]
    items_total: Option<u64>,
    /// Why nothing could be read; `metadata.reason` says more.
    #[schema(required)]
    error: Option<String>,
    /// Always null: of users who share an account, each is synced for itself.
    #[schema(required)]
    primary_user_id: Option<Uuid>,
    /// Always `task_id`; at the end counts per part, and why it ended as it did.
    metadata: Map<String, Value>,
    /// When it began; in its first event only.
    #[schema(required)]
    started_at: Option<DateTime<Utc>>,
    /// When it ended.
    #[schema(required)]
    ended_at: Option<DateTime<Utc>>,
    /// When this happened.
    timestamp: DateTime<Utc>,
}

/// Where a sync stands.
#[derive(Serialize, ToSchema)]
pub(super) struct SyncRunSummary {
    /// The sync; the `task_id` that it was answered with.
    run_id: String,
    /// Whose data.
    user_id: Uuid,
    /// From where.
    provider: String,
    /// Who asked: `pull` (a call or the clock), `webhook`, `backfill`, …
    source: String,
    /// `started`, `fetching`, `completed`, `failed` or `cancelled`.
    stage: String,
    /// `in_progress`, then for good `success`, `partial`, `failed`, `cancelled` or `skipped`.
    status: String,
    /// In plain words.
    #[schema(required)]
    message: Option<String>,
    /// From 0 to 1.
    #[schema(required)]
    progress: Option<f64>,
    /// Samples stored.
    #[schema(required)]
    items_processed: Option<u64>,
    /// Not known in advance.
    #[schema(required)]
    items_total: Option<u64>,
    /// Why nothing could be read.
    #[schema(required)]
    error: Option<String>,
    /// Always null: of users who share an account, each is synced for itself.
    #[schema(required)]
    primary_user_id: Option<Uuid>,
    /// When it began.
    #[schema(required)]
    started_at: Option<DateTime<Utc>>,
    /// When it ended.
    #[schema(required)]
    ended_at: Option<DateTime<Utc>>,
    /// When it last got on.
    last_update: DateTime<Utc>,
}

impl From<&RunEvent> for SyncRunSummary {
    fn from(row: &RunEvent) -> Self {
        let event = Event::from(row);
        Self {
            run_id: event.run_id.to_string(),
            user_id: event.user_id.0,
            provider: event.provider,
            source: event.source,
            stage: event.stage,
            status: event.status,
            message: event.message,
            progress: event.progress,
            items_processed: event.items_processed,
            items_total: event.items_total,
            error: event.error,
            primary_user_id: event.primary_user_id.map(|user| user.0),
            started_at: event.started_at.or(row.started_at),
            ended_at: event.ended_at,
            last_update: event.timestamp,
        }
    }
}

/// How many events to list.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct EventQuery {
    /// At most so many.
    #[param(minimum = 1, maximum = 200, default = 50, value_type = Option<i64>)]
    limit: i64,
}

impl FromQuery for EventQuery {
    fn read(query: &QueryPairs) -> Result<Self, Error> {
        Ok(Self { limit: query.integer("limit", 1, 200)?.unwrap_or(50) })
    }
}

/// List recent sync events
///
/// What the syncs of a user went through, newest first: of the last 24 hours, 200 at most. Needs the scope `read`.
#[utoipa::path(
    get,
    path = "/api/v1/users/{user_id}/sync/recent",
    operation_id = "list_sync_events",
    tag = "sync status",
    params(("user_id" = Uuid, Path, description = "UUID of the user"), EventQuery),
    responses(
        (status = 200, description = "The events", body = [SyncStatusEvent], example = json!([{
            "event_id": "0198c0de-7e99-7a39-9d0c-2f8e1f0f4c77", "run_id": "0198c0de-7e57-7a39-9d0c-2f8e1f0f4c77",
            "user_id": "b2b6c1de-5a0e-4a39-9d0c-2f8e1f0f4c77", "provider": "strava", "source": "pull",
            "stage": "fetching", "status": "in_progress", "message": "Fetching workouts from strava", "progress": null,
            "items_processed": null, "items_total": null, "error": null, "primary_user_id": null,
            "metadata": {"task_id": "0198c0de-7e57-7a39-9d0c-2f8e1f0f4c77"}, "started_at": null, "ended_at": null,
            "timestamp": "2026-03-10T12:01:00.060Z"
        }])),
        (status = 404, description = "No such user", body = super::error::Body),
    )
)]
pub(super) async fn list_sync_events(
    _: Caller<MayRead>,
    State(app): State<Arc<App>>,
    IdPath(id): IdPath,
    Query(query): Query<EventQuery>,
) -> Result<Json<Vec<Event>>, Error> {
    let engine = &app.state.engine;
    let rows = engine.db.list_run_events(UserId(id), query.limit).await?;
    if rows.is_empty() {
        known(engine, UserId(id)).await?;
    }
    Ok(Json(rows.iter().map(Event::from).collect()))
}

/// How many runs of a user to list.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct UserRunQuery {
    /// At most so many.
    #[param(minimum = 1, maximum = 200, default = 20, value_type = Option<i64>)]
    limit: i64,
}

impl FromQuery for UserRunQuery {
    fn read(query: &QueryPairs) -> Result<Self, Error> {
        Ok(Self { limit: query.integer("limit", 1, 200)?.unwrap_or(20) })
    }
}

/// List a user's sync runs
///
/// Where each sync of a user stands, by its last event, newest first. A sync appears when its work begins; before that
/// it is a task. Needs the scope `read`.
#[utoipa::path(
    get,
    path = "/api/v1/users/{user_id}/sync/runs",
    operation_id = "list_user_sync_runs",
    tag = "sync status",
    params(("user_id" = Uuid, Path, description = "UUID of the user"), UserRunQuery),
    responses(
        (status = 200, description = "The runs", body = [SyncRunSummary], example = json!([{
            "run_id": "0198c0de-7e57-7a39-9d0c-2f8e1f0f4c77", "user_id": "b2b6c1de-5a0e-4a39-9d0c-2f8e1f0f4c77",
            "provider": "strava", "source": "pull", "stage": "completed", "status": "success",
            "message": "Sync from strava completed · 57600 new, 0 updated", "progress": 1.0, "items_processed": 57600,
            "items_total": null, "error": null, "primary_user_id": null, "started_at": "2026-03-10T12:01:00.040Z",
            "ended_at": "2026-03-10T12:01:04.100Z", "last_update": "2026-03-10T12:01:04.100Z"
        }])),
        (status = 404, description = "No such user", body = super::error::Body),
    )
)]
pub(super) async fn list_user_sync_runs(
    _: Caller<MayRead>,
    State(app): State<Arc<App>>,
    IdPath(id): IdPath,
    Query(query): Query<UserRunQuery>,
) -> Result<Json<Vec<SyncRunSummary>>, Error> {
    let engine = &app.state.engine;
    let filter = RunEventFilter { user: Some(UserId(id)), limit: query.limit, ..RunEventFilter::default() };
    let rows = engine.db.list_last_run_events(&filter).await?;
    if rows.is_empty() {
        known(engine, UserId(id)).await?;
    }
    Ok(Json(rows.iter().map(SyncRunSummary::from).collect()))
}

/// Which runs to list. A word that nothing has finds nothing.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct RunQuery {
    /// At most so many.
    #[param(minimum = 1, maximum = 10_000, default = 50, value_type = Option<i64>)]
    limit: i64,
    /// Only of this user.
    user_id: Option<Uuid>,
    /// Only of this provider.
    provider: Option<String>,
    /// Only with this status.
    status: Option<String>,
    /// Only asked for by this source.
    source: Option<String>,
}

impl FromQuery for RunQuery {
    fn read(query: &QueryPairs) -> Result<Self, Error> {
        let word = |name: &str| query.text(name).map(str::to_owned);
        Ok(Self {
            limit: query.integer("limit", 1, 10_000)?.unwrap_or(50),
            user_id: query.parsed("user_id", uuid)?,
            provider: word("provider"),
            status: word("status"),
            source: word("source"),
        })
    }
}

/// List sync runs
///
/// Where each sync of all users stands, by its last event, newest first. Needs the scope `read`.
#[utoipa::path(
    get,
    path = "/api/v1/sync/runs",
    operation_id = "list_sync_runs",
    tag = "sync status",
    params(RunQuery),
    responses((status = 200, description = "The runs", body = [SyncRunSummary], example = json!([{
        "run_id": "0198c0de-7e57-7a39-9d0c-2f8e1f0f4c77", "user_id": "b2b6c1de-5a0e-4a39-9d0c-2f8e1f0f4c77",
        "provider": "strava", "source": "pull", "stage": "failed", "status": "failed",
        "message": "Sync from strava failed", "progress": null, "items_processed": null, "items_total": null,
        "error": "All sync sub-tasks failed", "primary_user_id": null, "started_at": "2026-03-10T12:01:00.040Z",
        "ended_at": "2026-03-10T12:01:04.100Z", "last_update": "2026-03-10T12:01:04.100Z"
    }])))
)]
pub(super) async fn list_sync_runs(
    _: Caller<MayRead>,
    State(app): State<Arc<App>>,
    Query(query): Query<RunQuery>,
) -> Result<Json<Vec<SyncRunSummary>>, Error> {
    let RunQuery { limit, user_id, provider, status, source } = query;
    let filter = RunEventFilter { user: user_id.map(UserId), provider, status, source, limit };
    let rows = app.state.engine.db.list_last_run_events(&filter).await?;
    Ok(Json(rows.iter().map(SyncRunSummary::from).collect()))
}

async fn known(engine: &Engine, user: UserId) -> Result<(), Error> {
    engine.db.find_user(user).await?.map(|_| ()).ok_or_else(no_user)
}

/// Where to begin.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct StreamQuery {
    /// Events from before that are sent first, oldest first.
    #[param(minimum = 1, maximum = 200, default = 20, value_type = Option<i64>)]
    replay: i64,
}

impl FromQuery for StreamQuery {
    fn read(query: &QueryPairs) -> Result<Self, Error> {
        Ok(Self { replay: query.integer("replay", 1, 200)?.unwrap_or(20) })
    }
}

/// Stream sync events
///
/// Server-sent events: the comment `connected`, the last `replay` events, oldest first, then each event as it happens,
/// whichever process works on it; the comment `heartbeat` after 15 seconds without one. Each event is named
/// `sync.status`, and its data is one line of JSON: a `SyncStatusEvent`. It ends when the user is erased, or the key or
/// token no longer works; that is looked at as often.
///
/// Who sends the header `Last-Event-ID` (the `event_id` of an event, or empty to begin with) gets an `id:` line with each
/// event, and after a reconnect exactly the events that came after the one named, while it is kept. Needs the scope
/// `read`.
#[utoipa::path(
    get,
    path = "/api/v1/users/{user_id}/sync/stream",
    operation_id = "stream_sync_events",
    tag = "sync status",
    params(
        ("user_id" = Uuid, Path, description = "UUID of the user"),
        StreamQuery,
        ("Last-Event-ID" = Option<String>, Header, description = "`event_id` of the last event that was seen"),
    ),
    responses(
        (status = 200, description = "The events, until the client or the server ends it",
            content_type = "text/event-stream", body = String,
            headers(("X-Accel-Buffering" = String, description = "`no`: proxies hand on each event at once")),
            example = json!(": connected\n\nevent: sync.status\ndata: {\"event_id\":\"0198c0de-7e99-7a39-9d0c-2f8e1f0f4c77\"}\n\n: heartbeat\n\n")),
        (status = 404, description = "No such user", body = super::error::Body),
    )
)]
pub(super) async fn stream_sync_events(
    _: Caller<MayRead>,
    State(app): State<Arc<App>>,
    IdPath(id): IdPath,
    Query(query): Query<StreamQuery>,
    headers: HeaderMap,
) -> Result<Response, Error> {
    let engine = app.state.engine.clone();
    let user = UserId(id);
    known(&engine, user).await?;
    let last = headers.get("last-event-id");
    // Before the rows are read: what happens in between is heard, and known by its number.
    let told = engine.shared.subscribe(user);
    let last_id = last.and_then(|value| Uuid::parse_str(value.to_str().ok()?.trim()).ok());
    let seen = match last_id {
        Some(id) => engine.db.find_run_event_seq(user, id).await?,
        None => None,
    };
    let mut backlog = VecDeque::from([Bytes::from_static(b": connected\n\n")]);
    let with_ids = last.is_some();
    let seq = match seen {
        Some(seq) => seq,
        None => {
            let rows = engine.db.list_run_events(user, query.replay).await?;
            backlog.extend(rows.iter().rev().map(|row| written(&EventLine::from(row), with_ids)));
            rows.first().map_or(0, |row| row.seq)
        }
    };
    let heartbeat = engine.config.event_heartbeat;
    let listener = Listener {
        engine,
        shown: Credentials::read(&app, &headers),
        user,
        told,
        seq,
        behind: seen.is_some(),
        with_ids,
        backlog,
        heartbeat,
        silent_since: Instant::now(),
        looked_at: Instant::now(),
        _counted: telemetry::listener(),
    };
    let stream = stream::unfold(listener, |mut listener| async move {
        let bytes = listener.next().await?;
        Some((Ok::<_, std::convert::Infallible>(bytes), listener))
    });
    let mut response = Response::new(Body::from_stream(stream));
    set(&mut response, header::CONTENT_TYPE, "text/event-stream; charset=utf-8");
    set(&mut response, header::CACHE_CONTROL, "no-cache, no-transform");
    set(&mut response, header::CONNECTION, "keep-alive");
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

/// An event as it is sent.
fn written(line: &EventLine, with_id: bool) -> Bytes {
    let EventLine { id, json, .. } = line;
    let id = if with_id { format!("id: {id}\n") } else { String::new() };
    Bytes::from(format!("{id}event: sync.status\ndata: {json}\n\n"))
}

/// One who listens. It holds a page of events at most: asked for the next bytes only when the last ones were taken, it
/// reads from the rows whatever it was too slow to hear, or was not told.
struct Listener {
    engine: Arc<Engine>,
    shown: Credentials,
    user: UserId,
    told: BoxStream<'static, String>,
    /// The number of the last event that was sent.
    seq: i64,
    /// There may be rows beyond it that were not heard of.
    behind: bool,
    with_ids: bool,
    backlog: VecDeque<Bytes>,
    heartbeat: Duration,
    silent_since: Instant,
    /// When it was last asked whether the listener may go on.
    looked_at: Instant,
    _counted: telemetry::Listening,
}

impl Listener {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if self.engine.stop.is_cancelled() {
                return None;
            }
            // One that is never silent has no heartbeats.
            if self.looked_at.elapsed() >= self.heartbeat && !self.may_go_on().await {
                return None;
            }
            if let Some(bytes) = self.backlog.pop_front() {
                self.silent_since = Instant::now();
                return Some(bytes);
            }
            if self.behind {
                match self.catch_up().await {
                    Ok(()) => continue,
                    Err(error) => tracing::debug!(user = %self.user, %error, "events could not be read"),
                }
            }
            tokio::select! {
                told = self.told.next(), if !self.behind => match EventLine::parse(&told?) {
                    Some(line) if line.seq == self.seq + 1 => {
                        self.seq = line.seq;
                        self.backlog.push_back(written(&line, self.with_ids));
                    }
                    Some(line) if line.seq <= self.seq => {}
                    _ => self.behind = true,
                },
                () = tokio::time::sleep(TRY_AGAIN), if self.behind => {}
                () = tokio::time::sleep_until(self.silent_since + self.heartbeat) => {
                    self.silent_since = Instant::now();
                    if !self.may_go_on().await {
                        return None;
                    }
                    if !self.behind {
                        return Some(Bytes::from_static(b": heartbeat\n\n"));
                    }
                }
                () = self.engine.stop.cancelled() => return None,
            }
        }
    }

    /// Whether the user is still there and what was shown still works, as far as the database tells; and whether there
    /// are events that nobody told of, because Redis or the teller was away.
    async fn may_go_on(&mut self) -> bool {
        self.looked_at = Instant::now();
        let now = self.engine.clock.now();
        let bearer = self.shown.bearer.filter(|bearer| now < token::ends_at(*bearer));
        let key_hash = self.shown.key_hash.as_deref();
        match self.engine.db.newest_seq_for_listener(self.user, bearer, key_hash, now).await {
            Ok(Some(newest)) => {
                self.behind |= newest > self.seq;
                // Smaller only if all rows were erased: the numbers began anew.
                self.seq = self.seq.min(newest);
                true
            }
            Ok(None) => false,
            Err(error) => {
                tracing::debug!(user = %self.user, %error, "events could not be looked for");
                true
            }
        }
    }

    /// Reads the rows beyond the last event that was sent, a page of them.
    async fn catch_up(&mut self) -> Result<(), crate::storage::Error> {
        let newest = self.engine.db.newest_run_event_seq(self.user).await?;
        let rows = self.engine.db.list_run_events_after(self.user, self.seq, PAGE).await?;
        self.behind = i64::try_from(rows.len()).is_ok_and(|n| n == PAGE);
        // Events whose run was erased are not shown, and their numbers are passed over.
        self.seq = rows.last().map_or(newest.max(self.seq), |row| row.seq);
        self.backlog.extend(rows.iter().map(|row| written(&EventLine::from(row), self.with_ids)));
        Ok(())
    }
}
