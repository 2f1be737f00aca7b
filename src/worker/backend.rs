//! The ready list as an apalis backend.
//!
//! apalis-core's `Persisted` drives a `Persistence`; ours only pops ids. Claim, lease and result are the engine's, in the
//! run's row, so heartbeat, acknowledgement and recovery have nothing to do here. A fetch waits until there is an id:
//! an empty answer would leave the worker without a waker.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use apalis::prelude::*;
use apalis_codec::json::JsonCodec;
use apalis_core::backend::finalize::Durable;
use apalis_core::backend::persistence::{Persisted, Persistence, TaskEvent, TaskPersistLayer};
use apalis_core::backend::{BackendConfig, WireFormatBackend};
use futures::Sink;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use crate::model::{self, Class};
use crate::sync::Engine;
use crate::telemetry;

/// How often the ready list is asked while nothing is pushed here: due times come, and other processes push.
const POLL: Duration = Duration::from_millis(100);
/// Nothing is renewed through apalis; it only wants an interval.
const HEARTBEAT: Duration = Duration::from_secs(30);
/// Between two tries while Redis is away.
const AWAY: Duration = Duration::from_millis(500);
/// Room for events of tasks; must exceed what ends between two fetches.
const EVENTS: usize = 64;

/// One job off the ready list.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Job(pub(super) model::Job);

/// What apalis is never told: an error would end the worker.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Refused(String);

#[derive(Clone)]
struct Pop {
    engine: Arc<Engine>,
}

impl Persistence for Pop {
    type Compact = Vec<u8>;
    type Response = Value;
    type Error = Refused;

    async fn register(&mut self, _: &WorkerContext) -> Result<(), Refused> {
        Ok(())
    }

    async fn heartbeat(&mut self, _: &WorkerContext) -> Result<(), Refused> {
        Ok(())
    }

    async fn fetch_next(&mut self, _: &WorkerContext) -> Result<Vec<Task<Vec<u8>>>, Refused> {
        let engine = &self.engine;
        let pushed = engine.shared.ready_notify();
        while !engine.stop.is_cancelled() {
            match engine.shared.pop(engine.clock.now_ms()).await {
                Ok(Some(job)) => {
                    let payload = serde_json::to_vec(&Job(job)).map_err(|error| Refused(error.to_string()))?;
                    return Ok(vec![TaskBuilder::new(payload).task_id(TaskId::from_uuid(job.id())).build()]);
                }
                Ok(None) => {
                    tokio::select! {
                        () = pushed.notified() => {}
                        () = tokio::time::sleep(POLL) => {}
                        () = engine.stop.cancelled() => {}
                    }
                }
                Err(error) => {
                    telemetry::redis_down(&error);
                    tokio::time::sleep(AWAY).await;
                }
            }
        }
        // Nothing is begun any more; the worker is ended from outside.
        std::future::pending().await
    }

    async fn reenqueue_abandoned(&mut self, tasks: Vec<Task<Vec<u8>>>, _: &WorkerContext) -> Result<u64, Refused> {
        // Popped and not begun: back on the list. What is lost here is found by the sweep.
        let mut count = 0;
        for task in tasks {
            let (payload, ..) = task.take();
            if let Ok(Job(job)) = serde_json::from_slice::<Job>(&payload)
                && self.engine.shared.push(job, Class::Schedule, self.engine.clock.now_ms()).await.is_ok()
            {
                count += 1;
            }
        }
        Ok(count)
    }

    async fn handle_events(&mut self, _: Vec<TaskEvent<Value>>, _: &WorkerContext) -> Result<(), Refused> {
        Ok(())
    }

    async fn push_tasks(&mut self, _: Vec<Task<Vec<u8>>>) -> Result<(), Refused> {
        Err(Refused("runs are accepted by the engine, not pushed through the worker".to_owned()))
    }
}

/// The backend that a worker is built on.
pub(super) struct Ready {
    inner: Persisted<Pop>,
    codec: JsonCodec,
}

impl Clone for Ready {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), codec: self.codec.clone() }
    }
}

impl Ready {
    pub(super) fn new(engine: Arc<Engine>) -> Self {
        Self { inner: Persisted::new(Pop { engine }), codec: JsonCodec::default() }
    }
}

impl Backend for Ready {
    type Task = Task<Vec<u8>>;
    type Error = Refused;

    fn poll_ready(&mut self, cx: &mut Context<'_>, worker: &WorkerContext) -> Poll<Result<(), Refused>> {
        self.inner.poll_ready(cx, worker, HEARTBEAT)
    }

    fn poll_next(&mut self, cx: &mut Context<'_>, worker: &WorkerContext) -> Poll<Option<Result<Self::Task, Refused>>> {
        self.inner.poll_next(cx, worker)
    }

    fn poll_close(&mut self, cx: &mut Context<'_>, worker: &WorkerContext) -> Poll<Result<(), Refused>> {
        self.inner.poll_close(cx, worker)
    }
}

impl BackendConfig for Ready {
    type Args = Job;
    type Id = Uuid;
    type Kind = Durable;
    type Config = ();
    type Layer = TaskPersistLayer<JsonCodec<Value>, Value>;

    fn config(&self) -> &() {
        &()
    }

    fn middleware(&mut self, _: &mut WorkerContext) -> Self::Layer {
        self.inner.layer(JsonCodec::<Value>::default(), EVENTS).persist_results(false)
    }
}

impl WireFormatBackend for Ready {
    type Codec = JsonCodec;
    type Compact = Vec<u8>;

    fn codec(&self) -> &JsonCodec {
        &self.codec
    }
}

impl Sink<Task<Vec<u8>>> for Ready {
    type Error = Refused;

    fn poll_ready(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Refused>> {
        Sink::poll_ready(Pin::new(&mut self.get_mut().inner), cx)
    }

    fn start_send(self: Pin<&mut Self>, task: Task<Vec<u8>>) -> Result<(), Refused> {
        Sink::start_send(Pin::new(&mut self.get_mut().inner), task)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Refused>> {
        Sink::poll_flush(Pin::new(&mut self.get_mut().inner), cx)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Refused>> {
        Sink::poll_close(Pin::new(&mut self.get_mut().inner), cx)
    }
}
