//! `wearsync watch`: what syncs go through, as it happens.

use std::time::Duration;

use clap::Args;

use super::exit::{Exit, Outcome};
use super::output::{line, remark, time};
use super::users::Whose;
use super::{Session, signals};
use crate::storage::RunEvent;
use crate::sync::{Event, EventLine};

/// How often the rows are looked at.
const POLL: Duration = Duration::from_millis(500);
/// Events from before that are shown first.
const REPLAY: i64 = 20;
/// Events read at a time.
const PAGE: i64 = 100;

#[derive(Debug, Args)]
pub(crate) struct Watch {
    #[command(flatten)]
    whose: Whose,
}

/// Prints the last events and each new one, whichever process works, until it is interrupted.
pub(crate) async fn run(session: &Session, arguments: Watch) -> Outcome {
    let app = session.open().await?;
    let engine = &app.engine;
    signals::stop_on_signal(engine.stop.clone())?;
    let user = arguments.whose.find(&engine.db).await?.id;
    let mut rows = engine.db.list_run_events(user, REPLAY).await?;
    rows.reverse();
    let mut seen = rows.last().map_or(0, |row| row.seq);
    if rows.is_empty() {
        remark("nothing has happened yet; Ctrl-C ends this");
    }
    loop {
        for row in &rows {
            line(&if session.out.json { EventLine::from(row).json } else { sentence(row) })?;
        }
        if rows.len() < usize::try_from(PAGE).unwrap_or(usize::MAX) {
            tokio::select! {
                () = tokio::time::sleep(POLL) => {}
                () = engine.stop.cancelled() => break,
            }
        }
        rows = engine.db.list_run_events_after(user, seen, PAGE).await?;
        seen = rows.last().map_or(seen, |row| row.seq);
    }
    app.close().await;
    Ok(Exit::Done)
}

/// An event for people.
fn sentence(row: &RunEvent) -> String {
    let event = Event::from(row);
    let message = event.message.unwrap_or_else(|| event.stage.clone());
    let reason = row.reason.as_deref().map_or_else(String::new, |reason| format!(": {reason}"));
    format!("{}  {}  {:<11}  {message}{reason}", time(row.at), row.run_id, row.status)
}
