//! `wearsync rebuild`: rows and files made again from the raw answers.

use clap::Args;
use serde_json::json;

use super::Session;
use super::connections::find_provider;
use super::exit::{Exit, Outcome};
use super::output::{count, remark};
use super::users::Whose;
use crate::sync;

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
    let engine = &app.engine;
    if let Some(name) = &arguments.provider {
        find_provider(engine, name)?;
    }
    let user = arguments.whose.named(&engine.db).await?;
    let connections = engine.db.list_connections(user.map(|user| user.id)).await?;
    let chosen = connections.into_iter().map(|view| view.connection);
    let chosen =
        chosen.filter(|connection| arguments.provider.as_ref().is_none_or(|name| *name == connection.provider));
    let (mut records, mut changed, mut marked) = (0, 0, 0);
    for connection in chosen {
        let rebuilt = sync::rebuild(engine, connection.id).await?;
        records += rebuilt.records;
        changed += rebuilt.changed;
        if arguments.files {
            marked += engine.db.mark_all_exports(connection.id).await?;
        }
        sync::drain(engine, connection.id).await?;
    }
    let writes = engine.exporter.is_some();
    app.close().await;
    session.out.show(&json!({ "records": records, "rows_changed": changed, "files_marked": marked }), || {
        let mut text = format!("{} rebuilt, {} changed", count(records, "record"), count(changed, "row"));
        if arguments.files {
            text.push_str(&format!(", {} written again", count(marked, "file")));
        }
        text
    })?;
    if arguments.files && !writes {
        remark("the files are written by the process that owns the export folder");
    }
    Ok(Exit::Done)
}
