//! `wearsync rebuild`: rows and files made again from the raw answers.

use clap::Args;
use serde_json::json;

use super::connections::find_provider;
use super::exit::{Exit, Outcome};
use super::output::{count, remark};
use super::users::Whose;
use super::{Session, follow, runs, signals};
use crate::app::App;
use crate::model::{Class, ConnectionId, Rebuilt, RunSource, RunState, SyncRequest};
use crate::sync::{self, Engine};

#[derive(Debug, Args)]
pub(crate) struct Rebuild {
    #[command(flatten)]
    whose: Whose,
    /// Of this provider only
    #[arg(long)]
    provider: Option<String>,
    /// Write all files again, too
    #[arg(long)]
    files: bool,
}

pub(crate) async fn run(session: &Session, arguments: Rebuild) -> Outcome {
    let app = session.open().await?;
    signals::stop_on_signal(app.engine.stop.clone())?;
    let outcome = rebuild(session, &app, arguments).await;
    app.close().await;
    outcome
}

/// Writes the files of a connection that no run reads any more; where another process owns their folder, that one does.
async fn write_again(engine: &Engine, connection: ConnectionId) -> anyhow::Result<u64> {
    engine.db.mark_all_exports(connection).await?;
    Ok(sync::drain(engine, connection).await?.files)
}

async fn rebuild(session: &Session, app: &App, arguments: Rebuild) -> Outcome {
    let engine = &app.engine;
    if let Some(name) = &arguments.provider {
        find_provider(engine, name)?;
    }
    let user = arguments.whose.named(&engine.db).await?;
    let mut exit = Exit::Done;
    let mut all = Rebuilt::default();
    let mut files = 0;
    if arguments.files {
        // Before the others: what is connected now has the summaries.
        for connection in engine.db.list_replaced(user.as_ref().map(|user| user.id)).await? {
            if arguments.provider.as_ref().is_none_or(|name| *name == connection.provider) {
                files += write_again(engine, connection.id).await?;
            }
        }
    }
    for view in engine.db.list_connections(user.as_ref().map(|user| user.id)).await? {
        let connection = view.connection;
        if arguments.provider.as_ref().is_some_and(|name| *name != connection.provider) {
            continue;
        }
        if connection.status != "active" || view.account_status != "active" {
            remark(&format!(
                "{} of user {} is not connected any more: its rows were left out",
                connection.provider, connection.user_id
            ));
            if arguments.files {
                files += write_again(engine, connection.id).await?;
            }
            continue;
        }
        // Before the run: it writes the files at its end, in whichever process works.
        if arguments.files {
            engine.db.mark_all_exports(connection.id).await?;
        }
        let setup = find_provider(engine, &connection.provider)?;
        let (class, source) = (Class::Interactive, RunSource::Pull);
        let request = SyncRequest { rebuild: true, ..SyncRequest::default() };
        let accepted = sync::submit(engine, setup, connection.id, &request, class, source, None).await?;
        let Some(accepted) = accepted else { continue };
        let run = follow::settled(app, accepted.id).await?;
        let report = runs::report(&run);
        let rebuilt = report.rebuilt.unwrap_or_default();
        all.records += rebuilt.records;
        all.changed += rebuilt.changed;
        files += report.files;
        if run.run_state() != RunState::Success {
            let why = run.reason.as_deref().unwrap_or("it was stopped");
            remark(&format!("{} of user {}: {}: {why}", connection.provider, connection.user_id, run.state));
            exit = Exit::Failed;
        }
    }
    session
        .out
        .show(&json!({ "records": all.records, "rows_changed": all.changed, "files_written": files }), || {
            format!("{} read, {} changed, {} written", count(all.records, "record"), all.changed, count(files, "file"))
        })?;
    Ok(exit)
}
