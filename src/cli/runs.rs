//! `wearsync runs`: what was asked for, and what became of it.

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use uuid::Uuid;

use super::Session;
use super::exit::{Exit, Outcome, usage};
use super::output::{count, dash, facts, iso, remark, span, table, time, time_or_dash};
use super::users::Whose;
use crate::app::App;
use crate::model::{Progress, RunId, RunReport, RunState};
use crate::storage::{Run, RunFilter};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List runs, the newest first
    List(List),
    /// Everything about one run
    Show {
        /// Its id, as listed; the API's `task_id`
        id: Uuid,
    },
    /// End a run: at once when nobody works on it, else after the page in hand; what is stored stays
    Cancel {
        /// Its id, as listed; the API's `task_id`
        id: Uuid,
    },
}

#[derive(Debug, Args)]
pub(crate) struct List {
    #[command(flatten)]
    whose: Whose,
    /// Of this provider only
    #[arg(long)]
    provider: Option<String>,
    /// In this state only
    #[arg(long, value_parser = parse_state)]
    status: Option<RunState>,
    /// How many
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(i64).range(1..=1000))]
    limit: i64,
    /// Older than this run
    #[arg(long, value_name = "ID")]
    before: Option<Uuid>,
}

fn parse_state(text: &str) -> Result<RunState, String> {
    RunState::parse(text).ok_or_else(|| {
        let known = RunState::ALL.map(RunState::as_str);
        format!("known are {}", known.join(", "))
    })
}

pub(crate) async fn run(session: &Session, command: Command) -> Outcome {
    let app = session.open().await?;
    let db = &app.engine.db;
    match command {
        Command::List(list) => {
            let user = list.whose.named(db).await?;
            let filter = RunFilter {
                user: user.map(|user| user.id),
                provider: list.provider,
                state: list.status,
                before: list.before.map(RunId),
                limit: list.limit,
            };
            let runs = db.list_runs(&filter).await?;
            session.out.show(&runs.iter().map(run_json).collect::<Vec<_>>(), || {
                let rows: Vec<Vec<String>> = runs.iter().map(row).collect();
                let head = ["ID", "PROVIDER", "STATE", "CREATED", "ENDED", "RESULT"];
                table(&head, &rows, "no runs: `wearsync sync strava` starts one")
            })?;
        }
        Command::Show { id } => {
            let run = find(&app, RunId(id)).await?;
            session.out.show(&run_json(&run), || describe(&run))?;
        }
        Command::Cancel { id } => {
            find(&app, RunId(id)).await?;
            let run = db.cancel_run(RunId(id), app.engine.clock.now()).await?;
            let run = run.ok_or_else(|| unknown(RunId(id)))?;
            app.engine.tell_last(run.id).await;
            session.out.show(&run_json(&run), || run.state.clone())?;
            match run.run_state() {
                RunState::Cancelled => remark("what is stored stays; the next sync goes on from there"),
                RunState::InProgress => remark("it ends after the page in hand"),
                _ => remark("it had ended before: nothing was changed"),
            }
        }
    }
    app.close().await;
    Ok(Exit::Done)
}

fn unknown(id: RunId) -> anyhow::Error {
    usage(format!("no run has the id {id}: `wearsync runs list` shows them"))
}

/// A run that must be there.
pub(crate) async fn find(app: &App, id: RunId) -> anyhow::Result<Run> {
    app.engine.db.find_run(id).await?.ok_or_else(|| unknown(id))
}

/// How far it is; nothing known of it: the beginning.
pub(crate) fn progress(run: &Run) -> Progress {
    run.progress.as_deref().and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
}

/// What it came to so far.
pub(crate) fn report(run: &Run) -> RunReport {
    run.report.as_deref().and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
}

/// One line: what was stored.
pub(crate) fn result(report: &RunReport) -> String {
    let sum = |of: fn(&crate::model::StreamReport) -> u64| report.streams.values().map(of).sum::<u64>();
    let mut pieces = vec![format!("{} new", sum(|stream| stream.inserted))];
    for (number, word) in [(sum(|stream| stream.updated), "changed"), (sum(|stream| stream.deleted), "deleted")] {
        if number > 0 {
            pieces.push(format!("{number} {word}"));
        }
    }
    // A part called summary makes a record of its own (gear), and no person asked for it by that name.
    for (name, part) in report.parts.iter().filter(|(name, _)| *name != "summary") {
        if part.stored > 0 {
            pieces.push(format!("{} {name}", part.stored));
        }
        if part.failed > 0 {
            pieces.push(format!("{} {name} failed", part.failed));
        }
    }
    if report.samples > 0 {
        pieces.push(count(report.samples, "sample"));
    }
    if report.files > 0 {
        pieces.push(count(report.files, "file"));
    }
    pieces.push(count(report.calls, "call"));
    pieces.join(", ")
}

/// What went wrong or is worth knowing, a line each.
pub(crate) fn remarks(report: &RunReport) -> Vec<String> {
    let errors = report.streams.iter().filter_map(|(name, stream)| Some(format!("{name}: {}", stream.error.as_ref()?)));
    errors.chain(report.notes.iter().cloned()).collect()
}

fn row(run: &Run) -> Vec<String> {
    let result = match (run.run_state(), &run.reason) {
        (RunState::Success, _) => result(&report(run)),
        (RunState::Waiting, Some(reason)) => format!("until {}: {reason}", time(run.due_at)),
        (_, Some(reason)) => reason.clone(),
        (RunState::InProgress, None) => progress_text(&progress(run)),
        _ => dash(),
    };
    let state = run.state.clone();
    vec![run.id.to_string(), run.provider.clone(), state, time(run.created_at), time_or_dash(run.ended_at), result]
}

/// One line: stream, n of m, quota left, time left.
pub(crate) fn progress_text(progress: &Progress) -> String {
    if progress.stream.is_empty() {
        return "starting".to_owned();
    }
    let mut text = format!("{}: {}", progress.stream, progress.done);
    if let Some(total) = progress.total {
        text.push_str(&format!(" of {total}"));
    }
    if let Some(left) = progress.quota_left {
        text.push_str(&format!(", {} left", count(left, "call")));
    }
    if let Some(seconds) = progress.eta_seconds.filter(|seconds| *seconds > 0) {
        text.push_str(&format!(", about {} to go", span(seconds)));
    }
    text
}

fn describe(run: &Run) -> String {
    let report = report(run);
    let waits = matches!(run.run_state(), RunState::Queued | RunState::Waiting);
    let mut text = facts(&[
        ("id", Some(run.id.to_string())),
        ("user", Some(run.user_id.to_string())),
        ("provider", Some(run.provider.clone())),
        ("asked by", Some(run.source.clone())),
        ("request", Some(run.request.clone())),
        ("state", Some(run.state.clone())),
        ("reason", run.reason.clone()),
        ("due", waits.then(|| time(run.due_at))),
        ("progress", (run.run_state() == RunState::InProgress).then(|| progress_text(&progress(run)))),
        ("created", Some(time(run.created_at))),
        ("started", run.started_at.map(time)),
        ("ended", run.ended_at.map(time)),
        ("attempts", (run.attempts > 0).then(|| run.attempts.to_string())),
        ("crashes", (run.crashes > 0).then(|| run.crashes.to_string())),
        ("result", run.report.as_ref().map(|_| result(&report))),
    ]);
    for remark in remarks(&report) {
        text.push_str(&format!("  - {remark}\n"));
    }
    text
}

/// A run for programs.
pub(crate) fn run_json(run: &Run) -> Value {
    let parsed = |text: &Option<String>| text.as_deref().and_then(|text| serde_json::from_str::<Value>(text).ok());
    json!({
        "id": run.id,
        "connection_id": run.connection_id,
        "user_id": run.user_id,
        "provider": run.provider,
        "source": run.source,
        "class": run.run_class(),
        "request": parsed(&Some(run.request.clone())),
        "status": run.state,
        "terminal": run.run_state().is_final(),
        "reason": run.reason,
        "due_at": iso(run.due_at),
        "waiting_on": run.waiting_on,
        "attempts": run.attempts,
        "crashes": run.crashes,
        "cancel_requested": run.cancel_requested,
        "progress": parsed(&run.progress),
        "report": parsed(&run.report),
        "created_at": iso(run.created_at),
        "started_at": run.started_at.map(iso),
        "ended_at": run.ended_at.map(iso),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{PartReport, StreamReport};

    #[test]
    fn progress_in_one_line() {
        assert_eq!(progress_text(&Progress::default()), "starting");
        let progress = Progress {
            stream: "streams".to_owned(),
            done: 12,
            total: Some(709),
            quota_left: Some(88),
            eta_seconds: Some(7500),
            calls: 13,
        };
        assert_eq!(progress_text(&progress), "streams: 12 of 709, 88 calls left, about 2 h 5 min to go");
    }

    #[test]
    fn results_in_one_line() {
        let mut report = RunReport { samples: 1_234_567, files: 231, calls: 1, ..RunReport::default() };
        let stream =
            StreamReport { inserted: 120, updated: 1, error: Some("broken".to_owned()), ..StreamReport::default() };
        report.streams.insert("activities".to_owned(), stream);
        report.parts.insert("streams".to_owned(), PartReport { stored: 110, none: 9, failed: 1 });
        assert_eq!(
            result(&report),
            "120 new, 1 changed, 110 streams, 1 streams failed, 1 234 567 samples, 231 files, 1 call"
        );
        assert_eq!(remarks(&report), ["activities: broken"]);
    }
}
