//! `wearsync serve` and `wearsync worker`: the processes that stay.

use anyhow::Context as _;
use clap::Args;
use serde_json::json;
use tokio::net::TcpListener;

use super::exit::{Exit, Outcome};
use super::keys::{self, Scope};
use super::output::{facts, remark};
use super::{Log, Session, signals};
use crate::app::{App, Role};
use crate::sync::{self, Engine};

#[derive(Debug, Args)]
pub(crate) struct Serve {
    /// The API alone: other processes work
    #[arg(long)]
    no_worker: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Worker {
    /// This is the one that owns the export folder and writes the files
    #[arg(long)]
    export: bool,
}

pub(crate) async fn serve(session: &Session, arguments: Serve) -> Outcome {
    let config = session.config(Log::Service)?;
    let bind = config.bind;
    // First of all: whoever calls while the rest is being opened waits a moment and is not refused.
    let listener = TcpListener::bind(bind).await.with_context(|| {
        format!("cannot listen on {bind}: another program has it, or it is no address of this machine; WEARSYNC_BIND chooses another")
    })?;
    let address = listener.local_addr()?;
    let app = App::open(config, Role::Server { worker: !arguments.no_worker }).await?;
    signals::stop_on_signal(app.engine.stop.clone())?;
    if let Err(error) = import(&app.engine).await {
        // The API must come up: through it the connection can be mended.
        tracing::warn!(%error, "the grant in the settings could not be taken");
    }
    welcome(session, &app, &format!("http://{address}")).await?;
    let served = app.serve(listener).await;
    app.close().await;
    served.map(|()| Exit::Done)
}

pub(crate) async fn work(session: &Session, arguments: Worker) -> Outcome {
    let config = session.config(Log::Service)?;
    let alone = config.redis_url.is_none();
    let app = App::open(config, Role::Worker { export: arguments.export }).await?;
    signals::stop_on_signal(app.engine.stop.clone())?;
    // Of several workers that start at once each would spend the same code; there the API does it.
    if alone && let Err(error) = import(&app.engine).await {
        tracing::warn!(%error, "the grant in the settings could not be taken");
    }
    let worked = app.work().await;
    app.close().await;
    worked.map(|()| Exit::Done)
}

/// Takes in the grants that stand in the settings, and says what came of it.
pub(crate) async fn import(engine: &Engine) -> Result<(), sync::Error> {
    for told in sync::import_plain_settings(engine).await? {
        remark(&told);
    }
    Ok(())
}

/// The first start makes a key and says what to do with it; a later one only says where it listens.
async fn welcome(session: &Session, app: &App, url: &str) -> anyhow::Result<()> {
    let engine = &app.engine;
    let folder = std::path::absolute(&engine.config.data_dir).unwrap_or_else(|_| engine.config.data_dir.clone());
    let folder = folder.display().to_string();
    let secret = if engine.db.list_api_keys().await?.is_empty() {
        Some(keys::make(&engine.db, &engine.clock, "first", &Scope::ALL, None).await?.1)
    } else {
        None
    };
    let clock =
        if app.works() { format!("{} by default", engine.config.schedule) } else { "by other processes".to_owned() };
    let answer = json!({ "url": url, "api_key": secret, "data_dir": folder, "schedule": clock });
    let Some(key) = &secret else {
        return session
            .out
            .show(&answer, || format!("serving at {url} (documentation: {url}/docs); schedules: {clock}"));
    };
    let connected = engine.db.list_connections(None).await?.into_iter().next().map(|view| view.connection);
    let next = match connected {
        Some(it) => {
            format!("curl -X POST {url}/api/v1/{}/users/{}/sync -H 'X-API-Key: {key}'", it.provider, it.user_id)
        }
        None => "wearsync connect strava".to_owned(),
    };
    session.out.show(&answer, || {
        facts(&[
            ("address", Some(format!("{url} (documentation: {url}/docs)"))),
            ("API key", Some(format!("{key} (shown this once)"))),
            ("data folder", Some(folder.clone())),
            ("schedule", Some(clock.clone())),
            ("next", Some(next)),
        ])
    })
}
