//! The command line: one file per command.
//!
//! May name everything below it. What must always hold: answers go to stdout and nothing else does; every command ends
//! with a code of `exit::Exit`; a secret is printed only by the command that made it, and only once.

mod connect;
mod connections;
mod deliveries;
#[cfg(feature = "simulator")]
mod demo;
mod developers;
mod doctor;
mod exit;
mod follow;
mod gaps;
mod init;
mod keys;
mod output;
mod rebuild;
mod runs;
mod schedule;
mod serve;
mod signals;
#[cfg(feature = "simulator")]
mod simulator;
mod subscriptions;
mod sync;
mod users;
mod watch;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, Subcommand};

use crate::app::{self, App, Role};
use crate::config::Config;
use crate::{api, providers, telemetry};
use exit::{Exit, Outcome};
use output::{Output, line, remark};

/// Mirrors your data from Strava into your own database and into plain JSON files
#[derive(Debug, Parser)]
#[command(
    name = "wearsync",
    version,
    propagate_version = false,
    arg_required_else_help = true,
    after_help = "Exit codes: 0 success, or put back; 1 failed, partial or cancelled; 2 wrong usage; 3 stale; \
        4 the connection needs to be authorised again."
)]
struct Cli {
    /// Settings; without it `wearsync.toml` in the working directory, if there is one
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print data as JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Simulator, server and a first sync in a scratch folder
    #[cfg(feature = "simulator")]
    Demo(demo::Demo),
    /// Ask for what is needed, write the settings, say the next command
    Init,
    /// API and worker
    Serve(serve::Serve),
    /// A worker alone
    Worker(serve::Worker),
    /// Sync now, with progress; beside a running server it hands the run over and follows it
    Sync(sync::Sync),
    /// Connect a user in the browser: agree there, and the first sync is queued
    Connect(connect::Connect),
    /// Whom data belongs to
    #[command(subcommand)]
    Users(users::Command),
    /// Who may call the API
    #[command(subcommand)]
    Keys(keys::Command),
    /// Who runs this service and may log in
    #[command(subcommand)]
    Developers(developers::Command),
    /// Which provider a user's data comes from
    #[command(subcommand)]
    Connections(connections::Command),
    /// When a connection is read without anybody asking
    #[command(subcommand)]
    Schedule(schedule::Command),
    /// What a provider is asked to send by itself
    #[command(subcommand)]
    Subscriptions(subscriptions::Command),
    /// What providers sent by themselves, and what became of it
    #[command(subcommand)]
    Deliveries(deliveries::Command),
    /// What was synced, and what is waiting
    #[command(subcommand)]
    Runs(runs::Command),
    /// What syncs go through, as it happens, until Ctrl-C
    Watch(watch::Watch),
    /// What is not covered yet; ends with 3 when there is something
    Gaps(gaps::Gaps),
    /// Everything normalised and calculated again from the raw answers, offline
    Rebuild(rebuild::Rebuild),
    /// Settings, database, Redis, clock, rights, and one real token refresh per connection
    Doctor,
    /// Bring the database up to date
    Migrate,
    /// The simulated provider alone
    #[cfg(feature = "simulator")]
    Simulator(simulator::Simulator),
    /// Print the API document
    Openapi,
}

/// Reads the arguments of this process and does what they say.
#[must_use]
pub fn main() -> ExitCode {
    // Ends the process itself for `--help` and for wrong arguments, the latter with code 2.
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            remark(&format!("wearsync: no threads can be started: {error}"));
            return Exit::Failed.into();
        }
    };
    let outcome = runtime.block_on(run(cli));
    // A thread that still reads from a terminal would hold the process.
    runtime.shutdown_timeout(Duration::from_millis(100));
    match outcome {
        Ok(exit) => exit.into(),
        Err(error) => {
            remark(&format!("wearsync: {}", exit::words(&error)));
            exit::code(&error).into()
        }
    }
}

async fn run(cli: Cli) -> Outcome {
    let session = Session { file: cli.config, out: Output { json: cli.json } };
    match cli.command {
        #[cfg(feature = "simulator")]
        Command::Demo(demo) => demo::run(&session, demo).await,
        Command::Init => init::run(&session).await,
        Command::Serve(serve) => serve::serve(&session, serve).await,
        Command::Worker(worker) => serve::work(&session, worker).await,
        Command::Sync(sync) => sync::run(&session, sync).await,
        Command::Connect(connect) => connect::run(&session, connect).await,
        Command::Users(command) => users::run(&session, command).await,
        Command::Keys(command) => keys::run(&session, command).await,
        Command::Developers(command) => developers::run(&session, command).await,
        Command::Connections(command) => connections::run(&session, command).await,
        Command::Schedule(command) => schedule::run(&session, command).await,
        Command::Subscriptions(command) => subscriptions::run(&session, command).await,
        Command::Deliveries(command) => deliveries::run(&session, command).await,
        Command::Runs(command) => runs::run(&session, command).await,
        Command::Watch(watch) => watch::run(&session, watch).await,
        Command::Gaps(gaps) => gaps::run(&session, gaps).await,
        Command::Rebuild(rebuild) => rebuild::run(&session, rebuild).await,
        Command::Doctor => doctor::run(&session).await,
        Command::Migrate => migrate(&session).await,
        #[cfg(feature = "simulator")]
        Command::Simulator(simulator) => simulator::run(&session, simulator).await,
        Command::Openapi => openapi(),
    }
}

async fn migrate(session: &Session) -> Outcome {
    let config = session.config(Log::Remarks)?;
    app::migrate(&config).await.context("the database could not be brought up to date")?;
    remark("the database is up to date");
    Ok(Exit::Done)
}

fn openapi() -> Outcome {
    let document = serde_json::to_string_pretty(&api::document())?;
    line(&document)?;
    Ok(Exit::Done)
}

/// How much a command logs when the settings do not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Log {
    /// Everything of interest: the log is what a service says.
    Service,
    /// Warnings only: the command says the rest itself.
    Remarks,
}

/// What all commands are called with.
#[derive(Debug)]
struct Session {
    file: Option<PathBuf>,
    out: Output,
}

impl Session {
    /// The settings; begins to log, and logs what is odd about them.
    fn config(&self, log: Log) -> anyhow::Result<Config> {
        let config = Config::from_process(self.file.as_deref())?;
        start_log(&config, log)?;
        for warning in warnings(&config) {
            tracing::warn!("{warning}");
        }
        Ok(config)
    }

    /// Everything that a command needs to look or to write something down.
    async fn open(&self) -> anyhow::Result<App> {
        App::open(self.config(Log::Remarks)?, Role::Command).await
    }
}

fn start_log(config: &Config, log: Log) -> anyhow::Result<()> {
    // `info` is the default; who wants it from a command writes `wearsync=info`.
    let filter = if log == Log::Remarks && config.log == "info" { "warn" } else { &config.log };
    telemetry::init(config.log_json, filter).map_err(exit::usage)
}

/// What is odd about the settings without stopping anything.
fn warnings(config: &Config) -> Vec<String> {
    let known: Vec<&str> = providers::names().map(|name| name.0).collect();
    let strangers = config.providers.keys().filter(|name| !known.contains(&name.as_str())).map(|name| {
        format!("there are settings for `{name}`, which is no provider and is ignored; known are {}", known.join(", "))
    });
    config.warnings.iter().cloned().chain(strangers).collect()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;
    use clap::error::ErrorKind;

    use super::*;

    fn wrong(arguments: &[&str]) -> ErrorKind {
        let error = Cli::try_parse_from([&["wearsync"], arguments].concat()).unwrap_err();
        assert_eq!(error.exit_code(), Exit::Usage as i32, "{arguments:?}");
        error.kind()
    }

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn wrong_arguments_end_with_2() {
        assert_eq!(wrong(&["snyc"]), ErrorKind::InvalidSubcommand);
        assert_eq!(wrong(&["sync"]), ErrorKind::MissingRequiredArgument);
        assert_eq!(wrong(&["sync", "strava", "--data-type", "sleep"]), ErrorKind::InvalidValue);
        assert_eq!(wrong(&["sync", "strava", "--since", "yesterday"]), ErrorKind::ValueValidation);
        assert_eq!(wrong(&["keys", "create"]), ErrorKind::MissingRequiredArgument);
        assert_eq!(wrong(&["keys", "create", "--name", "x", "--scopes", "write"]), ErrorKind::InvalidValue);
        assert_eq!(wrong(&["keys", "revoke", "1"]), ErrorKind::ValueValidation);
        assert_eq!(
            wrong(&["keys", "rename", "550e8400-e29b-41d4-a716-446655440000"]),
            ErrorKind::MissingRequiredArgument
        );
        assert_eq!(wrong(&["developers", "create", "--email", "ada"]), ErrorKind::ValueValidation);
        assert_eq!(wrong(&["developers", "create"]), ErrorKind::MissingRequiredArgument);
        assert_eq!(wrong(&["runs", "show", "1"]), ErrorKind::ValueValidation);
        assert_eq!(wrong(&["schedule", "set", "often", "--provider", "strava"]), ErrorKind::ValueValidation);
        assert_eq!(wrong(&["schedule", "off"]), ErrorKind::MissingRequiredArgument);
        assert_eq!(wrong(&["sync", "strava", "--days", "366"]), ErrorKind::ValueValidation);
        assert_eq!(wrong(&["sync", "strava", "--days", "3", "--since", "0"]), ErrorKind::ArgumentConflict);
        assert_eq!(wrong(&["connections", "add", "--provider", "strava"]), ErrorKind::MissingRequiredArgument);
        let both =
            ["connections", "add", "--provider", "strava", "--refresh-token-stdin", "--authorization-code-stdin"];
        assert_eq!(wrong(&both), ErrorKind::ArgumentConflict);
        #[cfg(feature = "simulator")]
        assert_eq!(wrong(&["simulator", "--fault", "nonsense=1"]), ErrorKind::ValueValidation);
    }

    #[test]
    fn options_of_all_commands_may_stand_anywhere() {
        for arguments in [["--json", "users", "list"], ["users", "--json", "list"], ["users", "list", "--json"]] {
            assert!(Cli::try_parse_from([&["wearsync"][..], &arguments].concat()).unwrap().json);
        }
    }

    #[test]
    fn settings_of_strangers_are_named() {
        let env = [("WEARSYNC_PROVIDERS__STRAWA__CLIENT_ID", "1"), ("STRAVA_CLIENT_ID", "2"), ("WEARSYNC_LAESE", "1s")];
        let config = Config::load(None, env.map(|(k, v)| (k.to_owned(), v.to_owned()))).unwrap();
        let warnings = warnings(&config);
        assert_eq!(warnings.len(), 2, "{warnings:?}");
        assert!(warnings[0].contains("WEARSYNC_LEASE") && warnings[1].contains("`strawa`"));
    }
}
