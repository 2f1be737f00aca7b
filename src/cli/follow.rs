//! Staying with one run until it is final or put back for long: working on it, or looking at its row.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};

use super::connections;
use super::exit::{Exit, Outcome};
use super::output::{Live, Output, remark, span, time};
use super::runs::{self, progress_text, remarks, report, result, run_json};
use crate::app::App;
use crate::model::{RunId, RunState};
use crate::storage::Run;
use crate::sync::{self, Engine};

/// How often the row is looked at.
const POLL: Duration = Duration::from_millis(250);
/// Who is put back for longer is told so and need not stay.
const PATIENCE_SECONDS: i64 = 60;

/// Follows a run, prints what became of it, and says how that ends the command.
pub(crate) async fn follow(out: Output, app: &App, id: RunId, wait: bool) -> Outcome {
    let run = until_rest(app, id, app.works(), wait).await?;
    let report = report(&run);
    for remark_ in remarks(&report) {
        remark(&remark_);
    }
    out.show(&run_json(&run), || sentence(&run, app.engine.clock.now()))?;
    match run.run_state() {
        RunState::Success | RunState::Waiting | RunState::Queued | RunState::InProgress => Ok(Exit::Done),
        RunState::Cancelled => Ok(Exit::Failed),
        RunState::Partial | RunState::Failed => {
            let connections = app.engine.db.list_connections(Some(run.user_id)).await?;
            let lost = connections
                .into_iter()
                .any(|view| view.connection.id == run.connection_id && view.account_status != "active");
            if lost {
                remark(&format!("connect again: {}", connections::add_command(run.user_id, &run.provider)));
            }
            Ok(if lost { Exit::Reauthorize } else { Exit::Failed })
        }
    }
}

/// Looks on until the run is final or this process is to stop.
#[cfg(feature = "simulator")]
pub(crate) async fn watch(app: &App, id: RunId) -> anyhow::Result<Run> {
    until_rest(app, id, false, true).await
}

/// Works on the run, or looks on, until it is final or this process is to stop.
pub(crate) async fn settled(app: &App, id: RunId) -> anyhow::Result<Run> {
    until_rest(app, id, app.works(), true).await
}

/// The run when it is final, or (unless `wait`) at rest for longer than somebody stays, or when this process is to stop.
async fn until_rest(app: &App, id: RunId, works: bool, wait: bool) -> anyhow::Result<Run> {
    let engine = &app.engine;
    let mut live = Live::new();
    let begun = engine.clock.now();
    loop {
        let run = runs::find(app, id).await?;
        let now = engine.clock.now();
        live.set(format!("{} {}", run.provider, state_text(&run, now)));
        let resting = match run.run_state() {
            state if state.is_final() => true,
            RunState::Waiting => (run.due_at - now).num_seconds() > PATIENCE_SECONDS,
            // Somebody else is to work on it, and nobody does.
            RunState::Queued => !works && (now - begun).num_seconds() > PATIENCE_SECONDS,
            _ => false,
        };
        if run.run_state().is_final() || (resting && !wait) || engine.stop.is_cancelled() {
            return Ok(run);
        }
        if works && run.due_at <= now {
            work(engine, &run, &mut live).await?;
        } else {
            pause(engine, POLL).await;
        }
    }
}

/// Works on the run, and shows how far it is meanwhile.
async fn work(engine: &Arc<Engine>, run: &Run, live: &mut Live) -> anyhow::Result<()> {
    let mut done = std::pin::pin!(step(engine, run));
    loop {
        tokio::select! {
            done = &mut done => return done,
            () = tokio::time::sleep(POLL) => {
                if let Some(run) = engine.db.find_run(run.id).await? {
                    live.set(format!("{} {}", run.provider, state_text(&run, engine.clock.now())));
                }
            }
        }
    }
}

/// One attempt at the run; where another run of its connection goes first, one at that.
async fn step(engine: &Arc<Engine>, run: &Run) -> anyhow::Result<()> {
    sync::execute(engine, run.id).await?;
    let now = engine.clock.now();
    let untouched = engine.db.find_run(run.id).await?.is_some_and(|after| after.epoch == run.epoch);
    if !untouched {
        return Ok(());
    }
    if let Some(first) = engine.db.find_first_run(run.connection_id, now).await?
        && first != run.id
    {
        sync::execute(engine, first).await?;
    }
    // Whoever else holds the connection's slot needs time, not questions.
    pause(engine, POLL).await;
    Ok(())
}

async fn pause(engine: &Engine, time: Duration) {
    tokio::select! {
        () = engine.stop.cancelled() => {}
        () = tokio::time::sleep(time) => {}
    }
}

fn state_text(run: &Run, now: DateTime<Utc>) -> String {
    match run.run_state() {
        RunState::Queued => "queued".to_owned(),
        RunState::Waiting => {
            let reason = run.reason.as_deref().unwrap_or("put back");
            format!("waits {}: {reason}", left(run.due_at, now))
        }
        RunState::InProgress => progress_text(&runs::progress(run)),
        state => state.as_str().to_owned(),
    }
}

fn left(due: DateTime<Utc>, now: DateTime<Utc>) -> String {
    span((due - now).num_seconds().max(0).unsigned_abs())
}

/// What became of it, for people.
fn sentence(run: &Run, now: DateTime<Utc>) -> String {
    let result = result(&report(run));
    let reason = run.reason.as_deref().unwrap_or("no reason was told");
    match run.run_state() {
        RunState::Success => format!("success: {result}"),
        RunState::Waiting => format!(
            "put back until {} (in {}): {reason}\nso far: {result}\nthe next `wearsync sync {}` goes on from there; --wait stays to the end",
            time(run.due_at),
            left(run.due_at, now),
            run.provider
        ),
        RunState::Queued | RunState::InProgress => {
            format!("{}: run {} is kept and goes on later; so far: {result}", run.state, run.id)
        }
        state => format!("{}: {reason}\nwhat was stored: {result}", state.as_str()),
    }
}
