//! Claim → renew → engine → settle. Workers and inline calls come through here alike.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use chrono::{DateTime, Utc};

use super::engine::{Stop, Work, backoff, failed_streams};
use super::{Engine, Error, ProviderSetup, failpoint};
use crate::model::{Class, RunId, RunReport, RunState};
use crate::storage::{self, Claim, Run, Settle};
use crate::telemetry;

/// Claims in a row that ended by a crash without a page: then the run is parked, it may be what crashes us.
pub(super) const CRASHES: i64 = 3;
/// Put-backs after failures in a row before a run is given up.
const ATTEMPTS: i64 = 5;
/// A page in hand has this long to end when the process is told to; then it is dropped, and the run given back in time
/// (the worker waits for ten seconds).
const LAST_PAGE: std::time::Duration = std::time::Duration::from_secs(7);
/// How often an inline call looks after a run that another worker has.
const FOLLOW: std::time::Duration = std::time::Duration::from_millis(100);
/// Runs put on the ready list by one sweep; the next one finds the rest.
const SWEEP: i64 = 1000;

/// What became of a run that was to be executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Executed {
    /// It could not be claimed: not due, taken, or behind another run of its connection.
    NotTaken,
    /// It is final.
    Final(RunState),
    /// It was put back and is due again then.
    PutBack(DateTime<Utc>),
    /// It was taken from us; whoever has it now goes on.
    Lost,
}

/// Claims a run and works on it until it is final, put back, or lost.
///
/// # Errors
/// When the database fails for longer than the lease; the run is then claimed again by whoever comes first.
pub async fn execute(engine: &Arc<Engine>, id: RunId) -> Result<Executed, Error> {
    let until = engine.after(engine.config.lease);
    let Some(claim) = engine.db.claim_run(id, &engine.owner, engine.now(), until).await? else {
        return Ok(Executed::NotTaken);
    };
    failpoint::hit("claimed");
    engine.tell(claim.told.as_ref()).await;
    let executed = claimed(engine, &claim).await;
    // The connection's slot is free: the next run need not wait for the sweep.
    if let Ok(Some((next, class, due))) = engine.db.find_next_run(claim.run.connection_id).await
        && let Err(error) = engine.shared.push(next, class, due.timestamp_millis()).await
    {
        telemetry::redis_down(&error);
    }
    executed
}

async fn claimed(engine: &Arc<Engine>, claim: &Claim) -> Result<Executed, Error> {
    let Some(setup) = engine.provider(&claim.run.provider) else {
        return Err(Error::Corrupt(format!("runs.provider: nothing is called {}", claim.run.provider)));
    };
    let name = setup.spec().name;
    telemetry::run_claimed(claim.run.id, name, claim.run.run_class(), claim.run.epoch);
    let started = std::time::Instant::now();
    let cancel = AtomicBool::new(claim.run.cancel_requested);
    let mut work = Work::new(engine, setup, claim, &cancel)?;
    let ended = if claim.run.crashes >= CRASHES {
        let why = format!("{CRASHES} workers in a row died working on it without storing a page");
        Err(Stop::Fatal(why))
    } else {
        tokio::select! {
            ended = work.run() => ended,
            () = keep(engine, claim, &cancel) => Err(Stop::Fenced),
            () = async {
                engine.stop.cancelled().await;
                tokio::time::sleep(LAST_PAGE).await;
            } => Err(Stop::Shutdown),
        }
    };
    failpoint::hit("before-settle");
    let (class, report) = (work.class(), work.report);
    let settled = settle(engine, setup, claim, ended, class, report).await?;
    failpoint::hit("settled");
    match settled {
        Executed::Final(state) => telemetry::run_settled(claim.run.id, name, state, started.elapsed().as_secs_f64()),
        Executed::Lost => telemetry::lease_lost(claim.run.id),
        Executed::PutBack(_) | Executed::NotTaken => {}
    }
    Ok(settled)
}

/// Renews the lease beside the work. Ends when the run is no longer ours.
async fn keep(engine: &Engine, claim: &Claim, cancel: &AtomicBool) {
    loop {
        // Real time, not the clock's: a lease is about processes that live and die.
        tokio::time::sleep(engine.config.renew).await;
        match engine.db.renew_run(&claim.fence, engine.after(engine.config.lease)).await {
            Ok(None) => return,
            Ok(Some(asked)) => cancel.store(asked, Ordering::Relaxed),
            // The database is away. The fence protects it from us when it is back and another holds the run.
            Err(error) => tracing::warn!(run = %claim.run.id, %error, "the lease could not be renewed"),
        }
    }
}

async fn settle(
    engine: &Engine,
    setup: &ProviderSetup,
    claim: &Claim,
    ended: Result<(), Stop>,
    class: crate::model::Class,
    mut report: RunReport,
) -> Result<Executed, Error> {
    let name = setup.spec().name;
    let run = &claim.run;
    let wait = |due, reason: &str, waiting_on, attempt, report: &RunReport| Settle::Wait {
        due,
        reason: reason.chars().take(500).collect(),
        waiting_on,
        class,
        attempt,
        report: json(report),
    };
    let last = |state, reason: Option<String>, report: &RunReport| Settle::Final {
        state,
        report: json(report),
        reason: reason.map(|reason| reason.chars().take(500).collect()),
    };
    let (settle, put_back) = match ended {
        Ok(()) => {
            let request: crate::model::SyncRequest = serde_json::from_str(&run.request).unwrap_or_default();
            if !request.ignored.is_empty() {
                let note = format!("{name} has no use for: {}", request.ignored.join(", "));
                if !report.notes.contains(&note) {
                    report.notes.push(note);
                }
            }
            let failed = failed_streams(&report);
            let given_up: u64 = report.parts.values().map(|part| part.failed).sum();
            let state = match failed.len() {
                0 if given_up == 0 => RunState::Success,
                n if n > 0 && n == report.streams.len() => RunState::Failed,
                _ => RunState::Partial,
            };
            let mut reasons: Vec<String> = failed.iter().map(|(name, error)| format!("{name}: {error}")).collect();
            if given_up > 0 {
                reasons
                    .push(format!("{given_up} answers about single records could not be had; a later sync asks again"));
            }
            let reason = reasons.join("; ");
            (last(state, (!reason.is_empty()).then_some(reason), &report), None)
        }
        Err(Stop::Fenced) => return Ok(Executed::Lost),
        Err(Stop::Cancelled) => (last(RunState::Cancelled, Some("cancelled on request".to_owned()), &report), None),
        Err(Stop::Shutdown) => (Settle::Release { report: json(&report) }, Some(engine.now())),
        Err(Stop::GiveWay) => {
            let due = engine.now();
            telemetry::run_put_back(run.id, name, "gave_way", due);
            (wait(due, "a more urgent run of this connection goes first", None, false, &report), Some(due))
        }
        Err(Stop::Quota(until)) => {
            telemetry::quota_wait(run.id, name, until);
            telemetry::run_put_back(run.id, name, "quota", until);
            let reason = format!("the quota of {} is spent until {}", setup.spec().title, until.format("%FT%TZ"));
            (wait(until, &reason, Some(setup.quota_key()), false, &report), Some(until))
        }
        Err(Stop::PartsLater(due)) => {
            telemetry::run_put_back(run.id, name, "retry", due);
            (wait(due, "an answer that failed is tried again", None, false, &report), Some(due))
        }
        Err(Stop::Retry { detail, after }) => {
            if run.attempts + 1 >= ATTEMPTS {
                (last(RunState::Failed, Some(detail), &report), None)
            } else {
                let due = engine.after(after.unwrap_or_else(|| backoff(run.attempts)));
                telemetry::run_put_back(run.id, name, "retry", due);
                (wait(due, &detail, None, true, &report), Some(due))
            }
        }
        Err(Stop::Stream(detail) | Stop::Fatal(detail)) => (last(RunState::Failed, Some(detail), &report), None),
        Err(Stop::Internal(error @ (Error::Storage(storage::Error::Unavailable(_)) | Error::Coordination(_)))) => {
            return Err(error);
        }
        Err(Stop::Internal(error)) => {
            tracing::error!(run = %run.id, %error, "run failed for a reason of ours");
            if run.attempts + 1 >= ATTEMPTS {
                (last(RunState::Failed, Some(error.to_string()), &report), None)
            } else {
                let due = engine.after(backoff(run.attempts));
                telemetry::run_put_back(run.id, name, "retry", due);
                (wait(due, &error.to_string(), None, true, &report), Some(due))
            }
        }
    };
    let held = matches!(&settle, Settle::Wait { waiting_on: Some(_), .. });
    let state = match &settle {
        Settle::Final { state, .. } => Some(*state),
        _ => None,
    };
    match engine.db.settle_run(&claim.fence, settle, engine.now()).await {
        Ok(true) => {}
        // Somebody asked again in the last moment: the run goes on, as one that is due now.
        Ok(false) => {
            let due = engine.now();
            let settle = wait(due, "it was asked for again", None, false, &report);
            engine.db.settle_run(&claim.fence, settle, due).await?;
            push(engine, run, due).await;
            return Ok(Executed::PutBack(due));
        }
        Err(storage::Error::Fenced) => return Ok(Executed::Lost),
        Err(error) => return Err(error.into()),
    }
    if let Some(due) = put_back {
        // Who waits on a quota is let go by the schedule: only as many as there are permits.
        if !held {
            push(engine, run, due).await;
        }
        return Ok(Executed::PutBack(due));
    }
    engine.tell_last(run.id).await;
    let state = state.unwrap_or(RunState::Failed);
    if state == RunState::Success {
        engine.db.touch_connection(run.connection_id, engine.now()).await?;
    }
    Ok(Executed::Final(state))
}

async fn push(engine: &Engine, run: &Run, due: DateTime<Utc>) {
    if let Err(error) = engine.shared.push(run.id, run.run_class(), due.timestamp_millis()).await {
        telemetry::redis_down(&error);
    }
}

fn json(report: &RunReport) -> String {
    serde_json::to_string(report).unwrap_or_default()
}

/// Executes an accepted run here and answers its row: final, or not yet when it was put back, is behind another run of its
/// connection, or the time for inline calls is over. The work goes on when the caller leaves.
///
/// # Errors
/// When the database fails.
pub async fn run_inline(engine: &Arc<Engine>, id: RunId) -> Result<Run, Error> {
    let work = tokio::spawn({
        let engine = engine.clone();
        async move { execute(&engine, id).await }
    });
    let end = tokio::time::Instant::now() + engine.config.inline_timeout;
    match tokio::time::timeout_at(end, work).await {
        Ok(Ok(result)) => {
            result?;
        }
        Ok(Err(panic)) => return Err(Error::Corrupt(format!("the run's work ended in a panic: {panic}"))),
        Err(_) => {}
    }
    loop {
        let run = engine.db.find_run(id).await?;
        let run = run.ok_or_else(|| Error::Corrupt("the run is gone: its user was erased".to_owned()))?;
        // The ready list told a worker of it, too; where that one was faster, its end is as good as ours.
        if run.run_state() != RunState::InProgress || tokio::time::Instant::now() >= end {
            return Ok(run);
        }
        tokio::time::sleep(FOLLOW).await;
    }
}

/// Puts runs and deliveries on the ready list that nobody was told of, or whose holder died.
///
/// # Errors
/// When the database or Redis fails; the next sweep finds them.
pub async fn sweep(engine: &Engine) -> Result<usize, Error> {
    let ready = engine.db.list_ready(engine.now(), SWEEP).await?;
    for (id, class, due) in &ready {
        engine.shared.push(*id, *class, due.timestamp_millis()).await?;
    }
    let deliveries = engine.db.list_ready_deliveries(engine.now(), SWEEP).await?;
    for (id, due) in &deliveries {
        engine.shared.push(*id, Class::Webhook, due.timestamp_millis()).await?;
    }
    let found = ready.len() + deliveries.len();
    telemetry::sweep(0, found as u64);
    Ok(found)
}
