//! Works on runs: apalis takes ids off the ready list and calls the engine.
//!
//! May name sync and everything below. What must always hold: a run is executed only behind its claim, so an id may be
//! popped twice or never; the sweep finds what the ready list lost. apalis supplies the worker, its concurrency and its
//! graceful end; storage and ready list are ours (`docs/adr/0001-apalis-over-our-own-storage.md` says why).

mod backend;

use std::sync::Arc;
use std::time::{Duration, Instant};

use apalis::prelude::*;

use crate::model;
use crate::sync::{self, Engine};
use backend::{Job, Ready};

/// Runs end within this time when the process is told to: the page in hand is finished.
const GRACE: Duration = Duration::from_secs(10);
/// The database server's time is looked at this often.
const FOLLOW: Duration = Duration::from_secs(30);
/// Whether connections that used to be pushed fell quiet is looked at this often.
const LISTEN: Duration = Duration::from_secs(60);
/// What has outlived its use is dropped this often.
const CLEAN_UP: Duration = Duration::from_secs(3600);
/// Idle grants are looked for this often.
const KEEP_GRANTS: Duration = Duration::from_secs(60);

/// Works until the engine is told to stop; then finishes the pages in hand.
///
/// # Errors
/// When the worker cannot be set up.
pub async fn work(engine: Arc<Engine>) -> anyhow::Result<()> {
    let keeper = tokio::spawn(keep(engine.clone()));
    let grants = tokio::spawn(keep_grants(engine.clone()));
    let stop = engine.stop.clone();
    let register = move |restart: usize| {
        WorkerBuilder::new(format!("{}-{restart}", engine.owner))
            .backend(Ready::new(engine.clone()))
            .concurrency(engine.config.concurrency)
            .parallelize(tokio::spawn)
            .catch_panic()
            .data(engine.clone())
            .build(handle)
    };
    Monitor::new()
        .register(register)
        // The backend answers no errors; whatever else ends a worker must not end the work.
        .should_restart(|_, error| {
            tracing::error!(%error, "worker ended, and is started again");
            true
        })
        .shutdown_timeout(GRACE)
        .run_with_signal(async move {
            stop.cancelled().await;
            Ok(())
        })
        .await?;
    keeper.abort();
    // A refresh in flight is a task of its own, and ends well.
    grants.abort();
    Ok(())
}

/// The outcome is in the run's row: apalis is told that all is well, so that none of its own retry rules applies.
async fn handle(job: Job, engine: Data<Arc<Engine>>) -> Result<(), BoxDynError> {
    let done = match job.0 {
        model::Job::Run(id) => sync::execute(&engine, id).await.map(|_| ()),
        model::Job::Delivery(id) => sync::deliver(&engine, id).await.map(|_| ()),
    };
    if let Err(error) = done {
        tracing::warn!(job = %job.0, %error, "a job was left to be claimed again");
    }
    Ok(())
}

/// What has to be done now and then: the sweep, what is due by the clock, the files of other processes' runs, the clock, old rows.
async fn keep(engine: Arc<Engine>) {
    let mut cleaned: Option<Instant> = None;
    let mut followed: Option<Instant> = None;
    let mut listened: Option<Instant> = None;
    loop {
        if let Err(error) = sync::sweep(&engine).await {
            tracing::warn!(%error, "the sweep failed");
        }
        if let Err(error) = sync::tick(&engine).await {
            tracing::warn!(%error, "nothing could be begun by the clock");
        }
        if listened.is_none_or(|at| at.elapsed() >= LISTEN) {
            listened = Some(Instant::now());
            if let Err(error) = sync::find_silence(&engine).await {
                tracing::warn!(%error, "nobody could look for silence");
            }
        }
        if let Err(error) = export_others(&engine).await {
            tracing::warn!(%error, "files could not be written");
        }
        if followed.is_none_or(|at| at.elapsed() >= FOLLOW) {
            followed = Some(Instant::now());
            if let Ok(Some(ms)) = engine.db.server_time_ms().await {
                engine.clock.follow(ms);
            }
        }
        if cleaned.is_none_or(|at| at.elapsed() >= CLEAN_UP) {
            cleaned = Some(Instant::now());
            if let Err(error) = engine.db.add_missing_schedules(engine.clock.now()).await {
                tracing::warn!(%error, "connections without a schedule could not be given one");
            }
            if let Err(error) = clean_up(&engine).await {
                tracing::warn!(%error, "old rows could not be dropped");
            }
            let age = chrono::Duration::from_std(engine.config.event_age).unwrap_or(chrono::Duration::days(366));
            let (before, keep) = (engine.clock.now() - age, i64::from(engine.config.events_per_user));
            if let Err(error) = engine.db.drop_run_events(before, keep).await {
                tracing::warn!(%error, "old events could not be dropped");
            }
        }
        tokio::select! {
            () = tokio::time::sleep(engine.config.sweep) => {}
            () = engine.stop.cancelled() => return,
        }
    }
}

/// Grants that nobody uses stay alive. Apart from the rest: a provider that answers slowly must not keep the sweep.
async fn keep_grants(engine: Arc<Engine>) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(KEEP_GRANTS) => {}
            () = engine.stop.cancelled() => return,
        }
        if let Err(error) = sync::keep_grants(&engine).await {
            tracing::warn!(%error, "idle grants could not be looked for");
        }
    }
}

async fn clean_up(engine: &Engine) -> Result<(), sync::Error> {
    engine.db.clean_up(engine.clock.now()).await?;
    sync::clean_up_deliveries(engine).await
}

/// Where several processes work, one owns the export folder and writes the files of all.
async fn export_others(engine: &Engine) -> Result<(), sync::Error> {
    if engine.exporter.is_none() {
        return Ok(());
    }
    sync::remove_erased(engine).await?;
    for connection in engine.db.list_export_due().await? {
        sync::drain(engine, connection).await?;
    }
    Ok(())
}
