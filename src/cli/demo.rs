//! `wearsync demo`: a simulated Strava, a server and a first sync, with nothing installed and nothing left behind.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context as _;
use clap::Args;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::exit::{Exit, Outcome};
use super::keys::{self, Scope};
use super::output::{count, facts, remark};
use super::runs::{report, result};
use super::{Log, Session, follow, signals, simulator, start_log};
use crate::app::{App, Role};
use crate::clock::Clock;
use crate::config::Config;
use crate::model::{Class, RunSource, RunState, SyncRequest, UserId};
use crate::simulator::{Client, Options, Running, start};
use crate::storage::NewUser;
use crate::sync::{self, NewGrant};

#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Keep database and files in this folder; without it they are removed at the end
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// Port of the server on 127.0.0.1; 0 takes a free one
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// Activities that the simulated person has
    #[arg(long, default_value_t = 120, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    activities: u32,
    /// End after the summary instead of serving on
    #[arg(long)]
    once: bool,
}

/// The scratch folder; removed with everything in it unless it is to be kept.
struct Scratch {
    path: PathBuf,
    keep: bool,
}

impl Scratch {
    fn new(keep: Option<PathBuf>) -> anyhow::Result<Self> {
        let keep_it = keep.is_some();
        let path = keep
            .unwrap_or_else(|| std::env::temp_dir().join(format!("wearsync-demo-{}", uuid::Uuid::new_v4().simple())));
        let path = std::path::absolute(path)?;
        let made = if keep_it { std::fs::create_dir_all(&path) } else { std::fs::create_dir(&path) };
        made.with_context(|| format!("the folder {} cannot be made", path.display()))?;
        Ok(Self { path, keep: keep_it })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.keep
            && let Err(error) = std::fs::remove_dir_all(&self.path)
        {
            remark(&format!("{} could not be removed: {error}", self.path.display()));
        }
    }
}

pub(crate) async fn run(session: &Session, arguments: Demo) -> Outcome {
    let scratch = Scratch::new(arguments.keep)?;
    let options = Options { athletes: 1, activities: arguments.activities, ..Options::default() };
    let client = options.clients.first().cloned().context("the simulator knows no application")?;
    let simulator = start(options, Clock::system()).await.context("the simulator cannot listen on 127.0.0.1")?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, arguments.port))
        .await
        .with_context(|| format!("cannot listen on 127.0.0.1:{}: choose another port with --port", arguments.port))?;
    let url = format!("http://{}", listener.local_addr()?);
    let config = settings(&scratch.path, &simulator, &client)?;
    start_log(&config, Log::Remarks)?;

    let app = App::open(config, Role::Server { worker: true }).await?;
    let stop = app.engine.stop.clone();
    signals::stop_on_signal(stop.clone())?;
    let shown = async {
        let shown = first_sync(session, &app, &simulator, &url).await;
        if arguments.once || shown.is_err() {
            stop.cancel();
        } else if !stop.is_cancelled() {
            remark(if scratch.keep {
                "serving; Ctrl-C ends it"
            } else {
                "serving; Ctrl-C ends it and removes the folder"
            });
        }
        shown
    };
    let (served, shown) = tokio::join!(
        async {
            let served = app.serve(listener).await;
            // Otherwise the other half would wait for a server that is gone.
            stop.cancel();
            served
        },
        shown
    );
    app.close().await;
    simulator.shutdown().await;
    served?;
    shown
}

/// Settings of its own: the demo neither reads nor changes what is set on this machine.
fn settings(folder: &Path, simulator: &Running, client: &Client) -> anyhow::Result<Config> {
    let folder = folder.to_str().context("the folder's name is no UTF-8: choose another with --keep")?;
    let own = [("WEARSYNC_DATA_DIR", folder), ("WEARSYNC_PROVIDERS__STRAVA__QUOTA", "off")];
    let own = own.map(|(name, value)| (name, value.to_owned()));
    let env = own.into_iter().chain(simulator::settings(simulator, client));
    Ok(Config::load(None, env.map(|(name, value)| (name.to_owned(), value)))?)
}

/// A refresh token of the simulated person, as if it had agreed on the consent page.
async fn mint_grant(app: &App, simulator: &Running) -> anyhow::Result<NewGrant> {
    let address = format!("{}/_simulator/grant", simulator.url());
    let answer = app.engine.http.client().post(address).json(&json!({ "athlete": 0 })).send().await?;
    let answer: Value = answer.error_for_status()?.json().await?;
    let token = answer["refresh_token"].as_str().context("the simulator gave no refresh token")?;
    Ok(NewGrant::RefreshToken(sync::secret(token)))
}

async fn first_sync(session: &Session, app: &App, simulator: &Running, url: &str) -> Outcome {
    let engine = &app.engine;
    let begun = Instant::now();
    let new = NewUser {
        external_user_id: Some("demo".to_owned()),
        first_name: Some("Demo".to_owned()),
        ..NewUser::default()
    };
    let user = engine.db.insert_user(new, engine.clock.now()).await?;
    let (_, key) = keys::make(&engine.db, &engine.clock, "demo", &Scope::ALL, None).await?;
    let setup = super::connections::find_provider(engine, "strava")?;
    let connection = sync::connect(engine, setup, user.id, &mint_grant(app, simulator).await?, None).await?;
    remark(&format!("a simulated Strava at {}, a server at {url}; first sync:", simulator.url()));

    let (class, source) = (Class::Interactive, RunSource::Pull);
    let accepted = sync::submit(engine, setup, connection, &SyncRequest::default(), class, source, None).await?;
    let accepted = accepted.context("the connection is gone")?;
    // The worker of this very process works on it.
    let run = follow::watch(app, accepted.id).await?;
    let seconds = begun.elapsed().as_secs_f64();
    let report = report(&run);
    if run.run_state() != RunState::Success {
        let why = run.reason.as_deref().unwrap_or("it was stopped");
        if engine.stop.is_cancelled() {
            return Ok(Exit::Done);
        }
        anyhow::bail!("the first sync ended as {}: {why}; stored: {}", run.state, result(&report));
    }

    let counts = engine.db.count_all(None).await?;
    let exports = engine.config.export_dir.clone();
    let files = count_files(&exports);
    let answer = json!({
        "url": url,
        "simulator_url": simulator.url(),
        "api_key": key,
        "user_id": user.id,
        "task_id": run.id,
        "records": counts.records,
        "samples": counts.samples,
        "answers": counts.parts,
        "files": files,
        "seconds": (seconds * 1000.0).round() / 1000.0,
        "data_dir": engine.config.data_dir,
        "export_dir": exports,
    });
    session.out.show(&answer, || {
        let number = |number: i64, thing: &str| count(number.unsigned_abs(), thing);
        let table = facts(&[
            (
                "stored",
                Some(format!(
                    "{}, {}, {} kept as received",
                    number(counts.records, "record"),
                    number(counts.samples, "sample"),
                    number(counts.parts, "answer"),
                )),
            ),
            ("took", Some(format!("{seconds:.1} s, {}", count(report.calls, "call")))),
            ("files", Some(format!("{} in {}", count(files, "file"), exports.display()))),
            ("database", Some(engine.config.state_dir().join("wearsync.db").display().to_string())),
            ("documentation", Some(format!("{url}/docs"))),
        ]);
        format!("{table}\ntry:\n{}", commands(url, &key, user.id, run.id, &exports))
    })?;
    Ok(Exit::Done)
}

/// What can be tried, ready to be pasted.
fn commands(url: &str, key: &str, user: UserId, run: crate::model::RunId, exports: &Path) -> String {
    let call = |method: &str, path: String| format!("  curl {method}'{url}{path}' -H 'X-API-Key: {key}'");
    [
        call("-X POST ", format!("/api/v1/strava/users/{user}/sync")),
        call("-X POST ", format!("/api/v1/strava/users/{user}/sync?async=false")),
        call("", format!("/api/v1/tasks/{run}")),
        call("", format!("/api/v1/users/{user}/gaps")),
        format!("  ls {0} {0}/strava/activities", exports.display()),
    ]
    .join("\n")
}

/// Files below a folder, hidden ones left out; what cannot be read counts as nothing.
fn count_files(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter(|entry| !entry.file_name().to_string_lossy().starts_with('.'))
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => count_files(&entry.path()),
            Ok(_) => 1,
            Err(_) => 0,
        })
        .sum()
}
