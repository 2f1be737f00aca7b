//! Deliveries: what providers sent by themselves, and what became of it.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::App;
use super::error::{Error, missing};
use super::extract::{Caller, FromQuery, IdPath, MayAdmin, Query, QueryPairs, one_of, uuid};
use crate::model::DeliveryId;
use crate::storage::{Delivery, DeliveryFilter, DeliveryItem};
use crate::sync;

/// Words of the state.
const STATES: [&str; 5] = ["queued", "in_progress", "waiting", "done", "failed"];

/// What a provider sent, without its body.
#[derive(Serialize, ToSchema)]
pub(super) struct DeliveryRead {
    /// Its id.
    id: Uuid,
    /// From where.
    provider: String,
    /// The provider's name of the event: equal ones are one delivery.
    event: String,
    /// `queued`, `in_progress`, `waiting` (due again later), then `done` or `failed`.
    #[schema(example = "done")]
    status: String,
    /// Why it waits or failed.
    #[schema(required)]
    reason: Option<String>,
    /// When it is due.
    due_at: DateTime<Utc>,
    /// Times that it was put back.
    attempts: i64,
    /// When it came.
    received_at: DateTime<Utc>,
    /// When it was done.
    #[schema(required)]
    ended_at: Option<DateTime<Utc>>,
    /// The headers that are kept.
    #[schema(value_type = Object)]
    headers: Value,
    /// Whether its body is still there, so that it can be replayed.
    has_body: bool,
}

impl From<Delivery> for DeliveryRead {
    fn from(one: Delivery) -> Self {
        Self {
            id: one.id.0,
            provider: one.provider,
            event: one.dedup_key,
            status: one.state,
            reason: one.reason,
            due_at: one.due_at,
            attempts: one.attempts,
            received_at: one.received_at,
            ended_at: one.ended_at,
            headers: serde_json::from_str(&one.headers).unwrap_or_default(),
            has_body: one.has_body,
        }
    }
}

/// What became of one thing that a delivery says, for one connection.
#[derive(Serialize, ToSchema)]
pub(super) struct DeliveryItemRead {
    /// What it says.
    #[schema(value_type = Object)]
    notice: Value,
    /// `waiting` (its account is unknown), `accepted` or `dropped`.
    status: String,
    /// For which connection.
    #[schema(required)]
    connection_id: Option<Uuid>,
    /// The task that acts on it.
    #[schema(required)]
    task_id: Option<Uuid>,
}

impl From<DeliveryItem> for DeliveryItemRead {
    fn from(item: DeliveryItem) -> Self {
        Self {
            notice: serde_json::from_str(&item.notice).unwrap_or_default(),
            status: item.state,
            connection_id: item.connection_id.map(|id| id.0),
            task_id: item.run_id.map(|id| id.0),
        }
    }
}

/// Deliveries.
#[derive(Serialize, ToSchema)]
pub(super) struct DeliveryList {
    /// The newest first.
    items: Vec<DeliveryRead>,
    /// `before` of the next page; null on the last one.
    #[schema(required)]
    next_before: Option<Uuid>,
}

/// A delivery and what became of it.
#[derive(Serialize, ToSchema)]
pub(super) struct DeliveryDetail {
    /// The delivery.
    delivery: DeliveryRead,
    /// Per notice and connection.
    items: Vec<DeliveryItemRead>,
}

/// Which deliveries.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct DeliveryParams {
    /// Of this provider only.
    provider: Option<String>,
    /// In this state only: `queued`, `in_progress`, `waiting`, `done` or `failed`.
    #[param(example = "failed")]
    state: Option<String>,
    /// How many.
    #[param(minimum = 1, maximum = 100, default = 50)]
    limit: Option<i64>,
    /// Older than this delivery.
    before: Option<Uuid>,
}

impl FromQuery for DeliveryParams {
    fn read(query: &QueryPairs) -> Result<Self, Error> {
        let state = query.parsed("state", |text| {
            STATES.into_iter().find(|known| *known == text).map(str::to_owned).ok_or_else(|| one_of(STATES))
        })?;
        let provider = query.parsed("provider", |text| {
            let mut names = crate::providers::names().map(|name| name.0);
            names
                .find(|name| *name == text)
                .map(str::to_owned)
                .ok_or_else(|| one_of(crate::providers::names().map(|name| name.0)))
        })?;
        Ok(Self { provider, state, limit: query.integer("limit", 1, 100)?, before: query.parsed("before", uuid)? })
    }
}

/// List deliveries
///
/// What providers sent by themselves, the newest first. Needs the scope `admin`.
#[utoipa::path(
    get,
    path = "/api/v1/deliveries",
    operation_id = "list_deliveries",
    tag = "provider webhooks",
    params(DeliveryParams),
    responses((status = 200, description = "The deliveries", body = DeliveryList, example = json!({"items": [{
        "id": "0198c0de-7e57-7a39-9d0c-2f8e1f0f4c77", "provider": "strava",
        "event": "activity:18234567890:create:1777785630:70412355:44136fa355b3", "status": "done", "reason": null,
        "due_at": "2026-05-03T05:20:31Z", "attempts": 0, "received_at": "2026-05-03T05:20:31Z",
        "ended_at": "2026-05-03T05:20:31.120Z", "headers": {"content-type": "application/json"}, "has_body": true
    }], "next_before": null})))
)]
pub(super) async fn list_deliveries(
    _: Caller<MayAdmin>,
    State(app): State<Arc<App>>,
    Query(params): Query<DeliveryParams>,
) -> Result<Json<DeliveryList>, Error> {
    let limit = params.limit.unwrap_or(50);
    let filter = DeliveryFilter {
        provider: params.provider,
        state: params.state,
        before: params.before.map(DeliveryId),
        limit: limit + 1,
    };
    let mut found = app.state.engine.db.list_deliveries(&filter).await?;
    let more = found.len() as i64 > limit;
    found.truncate(usize::try_from(limit).unwrap_or(0));
    let next_before = found.last().filter(|_| more).map(|one| one.id.0);
    Ok(Json(DeliveryList { items: found.into_iter().map(DeliveryRead::from).collect(), next_before }))
}

/// Get a delivery
///
/// A delivery and what became of each thing that it says. Its body is not told: `wearsync deliveries show --body` prints
/// it. Needs the scope `admin`.
#[utoipa::path(
    get,
    path = "/api/v1/deliveries/{delivery_id}",
    operation_id = "get_delivery",
    tag = "provider webhooks",
    params(("delivery_id" = Uuid, Path, description = "Its id, as listed")),
    responses(
        (status = 200, description = "The delivery", body = DeliveryDetail, example = json!({"delivery": {
            "id": "0198c0de-7e57-7a39-9d0c-2f8e1f0f4c77", "provider": "strava",
            "event": "activity:18234567890:create:1777785630:70412355:44136fa355b3", "status": "done", "reason": null,
            "due_at": "2026-05-03T05:20:31Z", "attempts": 0, "received_at": "2026-05-03T05:20:31Z",
            "ended_at": "2026-05-03T05:20:31.120Z", "headers": {"content-type": "application/json"}, "has_body": true
        }, "items": [{"notice": {"notice": "changed", "account": "70412355", "kind": "workout", "external_id": "18234567890"},
            "status": "accepted", "connection_id": "7a1f9d52-0c44-4f0a-9b58-0d2f6f1f7a11", "task_id": "0198c0de-7e57-7a39-9d0c-2f8e1f0f4c78"}]})),
        (status = 404, description = "No such delivery", body = super::error::Body),
    )
)]
pub(super) async fn get_delivery(
    _: Caller<MayAdmin>,
    State(app): State<Arc<App>>,
    IdPath(id): IdPath,
) -> Result<Json<DeliveryDetail>, Error> {
    let db = &app.state.engine.db;
    let found = db.find_delivery(DeliveryId(id)).await?.ok_or_else(|| missing("Delivery", id))?;
    let items = db.list_delivery_items(DeliveryId(id)).await?;
    Ok(Json(DeliveryDetail { delivery: found.into(), items: items.into_iter().map(DeliveryItemRead::from).collect() }))
}

/// Replay a delivery
///
/// Has it worked on once more, from its body. What is stored already stays as it is. Needs the scope `admin`.
#[utoipa::path(
    post,
    path = "/api/v1/deliveries/{delivery_id}/replay",
    operation_id = "replay_delivery",
    tag = "provider webhooks",
    params(("delivery_id" = Uuid, Path, description = "Its id, as listed")),
    responses(
        (status = 200, description = "It is queued", body = Object, example = json!({"id": "0198c0de-7e57-7a39-9d0c-2f8e1f0f4c77", "status": "queued"})),
        (status = 404, description = "No such delivery", body = super::error::Body),
        (status = 409, description = "Its body was dropped, or somebody works on it right now", body = super::error::Body),
    )
)]
pub(super) async fn replay_delivery(
    _: Caller<MayAdmin>,
    State(app): State<Arc<App>>,
    IdPath(id): IdPath,
) -> Result<Json<Value>, Error> {
    let engine = &app.state.engine;
    engine.db.find_delivery(DeliveryId(id)).await?.ok_or_else(|| missing("Delivery", id))?;
    if !sync::replay(engine, DeliveryId(id)).await? {
        return Err(Error::Conflict {
            detail: "The delivery cannot be replayed: its body was dropped, or somebody works on it right now",
            code: "not_replayable",
        });
    }
    Ok(Json(json!({"id": id, "status": "queued"})))
}
