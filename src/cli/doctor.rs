//! `wearsync doctor`: looks at everything that a sync stands on, and tries it for real.

use std::fs;
use std::path::Path;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;
use uuid::Uuid;

use super::exit::{self, Exit, Outcome};
use super::output::{count, iso, time};
use super::{Log, Session, start_log, warnings};
use crate::app::{App, Role};
use crate::clock::Clock;
use crate::config::{Config, Database};
use crate::model::{AccountId, Schedule};
use crate::storage::ConnectionView;
use crate::sync::{self, Engine, ProviderSetup, TokenFailure};

/// A clock that is off by more makes tokens and quotas wrong.
const SKEW_MS: i64 = 5_000;
/// A provider that does not answer in this time counts as not reachable.
const PATIENCE: Duration = Duration::from_secs(10);
/// A history of years takes about 1 GiB.
const ROOM: u64 = 1 << 30;

/// How a check ended; the worst decides the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
enum Grade {
    Ok,
    Warning,
    Reauthorize,
    Broken,
}

#[derive(Debug, Serialize)]
struct Check {
    check: String,
    grade: Grade,
    detail: String,
}

#[derive(Default)]
struct Checks(Vec<Check>);

impl Checks {
    fn add(&mut self, grade: Grade, check: &str, detail: impl Into<String>) {
        self.0.push(Check { check: check.to_owned(), grade, detail: detail.into() });
    }

    fn finish(self, session: &Session) -> Outcome {
        let text = || {
            let width = self.0.iter().map(|check| check.check.chars().count()).max().unwrap_or(0);
            let lines = self.0.iter().map(|check| {
                let word = match check.grade {
                    Grade::Ok => "ok",
                    Grade::Warning => "warning",
                    Grade::Reauthorize => "reauth",
                    Grade::Broken => "BROKEN",
                };
                format!("{word:<7}  {:<width$}  {}\n", check.check, check.detail)
            });
            lines.collect::<String>()
        };
        session.out.show(&self.0, text)?;
        Ok(match self.0.iter().map(|check| check.grade).max() {
            Some(Grade::Broken) => Exit::Failed,
            Some(Grade::Reauthorize) => Exit::Reauthorize,
            _ => Exit::Done,
        })
    }
}

pub(crate) async fn run(session: &Session) -> Outcome {
    let mut checks = Checks::default();
    let config = match Config::from_process(session.file.as_deref()) {
        Ok(config) => config,
        Err(error) => {
            checks.add(Grade::Broken, "settings", error.to_string());
            return checks.finish(session);
        }
    };
    start_log(&config, Log::Remarks)?;
    let odd = warnings(&config);
    for warning in &odd {
        checks.add(Grade::Warning, "settings", warning);
    }
    if odd.is_empty() {
        checks.add(Grade::Ok, "settings", shape(&config));
    }
    let holds_secrets = matches!(config.database, Database::Sqlite(_)) || config.secret_key.is_none();
    check_folder(&mut checks, "data folder", &config.data_dir, holds_secrets);
    check_folder(&mut checks, "export folder", &config.export_dir, false);
    if let Database::Sqlite(file) = &config.database
        && !file.exists()
    {
        let detail =
            format!("{} is not there yet: the first `wearsync serve` or `wearsync sync` makes it", file.display());
        checks.add(Grade::Warning, "database", detail);
        return checks.finish(session);
    }
    match App::open(config, Role::Command).await {
        Ok(app) => {
            check_database(&mut checks, &app.engine).await;
            check_redis(&mut checks, &app.engine).await;
            check_providers(&mut checks, &app.engine).await;
            app.close().await;
        }
        Err(error) => checks.add(Grade::Broken, "database", exit::words(&error)),
    }
    checks.finish(session)
}

fn shape(config: &Config) -> String {
    match (&config.database, &config.redis_url) {
        (Database::Sqlite(file), _) => format!("one process, SQLite in {}", file.display()),
        (Database::Postgres(url), None) => format!("one working process, {url}"),
        (Database::Postgres(url), Some(redis)) => format!("several processes, {url} and {redis}"),
    }
}

fn check_folder(checks: &mut Checks, name: &str, folder: &Path, secret: bool) {
    let state = folder.join("state");
    let shown = folder.display();
    if !folder.exists() {
        return checks.add(Grade::Ok, name, format!("{shown} is not there yet and will be made"));
    }
    if secret && state.exists() && others_can_look(&state) {
        let detail = format!("others can look into {}: chmod 700 it", state.display());
        checks.add(Grade::Broken, name, detail);
    }
    let probe = folder.join(format!(".wearsync-doctor-{}", Uuid::new_v4().simple()));
    let tried = fs::write(&probe, b"").and_then(|()| fs::remove_file(&probe));
    match (tried, free_space(folder)) {
        (Err(error), _) => checks.add(Grade::Broken, name, format!("{shown} cannot be written: {error}")),
        (Ok(()), Some(free)) => {
            let grade = if free < ROOM { Grade::Warning } else { Grade::Ok };
            checks.add(grade, name, format!("{shown} can be written, {} MiB free", free >> 20));
        }
        (Ok(()), None) => checks.add(Grade::Ok, name, format!("{shown} can be written")),
    }
}

#[cfg(unix)]
fn others_can_look(folder: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    fs::metadata(folder).is_ok_and(|meta| meta.permissions().mode() & 0o077 != 0)
}

#[cfg(not(unix))]
fn others_can_look(_: &Path) -> bool {
    false
}

/// Bytes that we may still write there.
#[cfg(target_os = "linux")]
fn free_space(folder: &Path) -> Option<u64> {
    let disk = rustix::fs::statvfs(folder).ok()?;
    Some(disk.f_bavail.saturating_mul(disk.f_frsize))
}

#[cfg(not(target_os = "linux"))]
fn free_space(_: &Path) -> Option<u64> {
    None
}

async fn check_database(checks: &mut Checks, engine: &Engine) {
    let db = &engine.db;
    if let Err(error) = db.ping().await {
        return checks.add(Grade::Broken, "database", exit::words(&error.into()));
    }
    match db.is_migrated().await {
        Ok(true) => {}
        Ok(false) => return checks.add(Grade::Broken, "database", "it is not up to date: run `wearsync migrate`"),
        Err(error) => return checks.add(Grade::Broken, "database", exit::words(&error.into())),
    }
    // A write that changes no row still needs the right and the lock to write.
    match db.touch_api_key(Uuid::nil(), engine.clock.now()).await {
        Ok(()) => checks.add(Grade::Ok, "database", format!("{} answers, is up to date and can be written", db.kind())),
        Err(error) => checks.add(Grade::Broken, "database", exit::words(&error.into())),
    }
    match db.server_time_ms().await {
        Ok(Some(theirs)) => check_clock(checks, "the database", theirs),
        Ok(None) => {}
        Err(error) => checks.add(Grade::Broken, "clock", exit::words(&error.into())),
    }
}

fn check_clock(checks: &mut Checks, whose: &str, theirs_ms: i64) {
    // The engine's own clock follows the database; the machine's is the one to look at.
    let off = Clock::system().now_ms() - theirs_ms;
    if off.abs() > SKEW_MS {
        let seconds = off as f64 / 1000.0;
        checks.add(Grade::Warning, "clock", format!("{seconds:+.1} s against {whose}: set this machine's clock"));
    } else {
        checks.add(Grade::Ok, "clock", format!("as {whose} has it"));
    }
}

async fn check_redis(checks: &mut Checks, engine: &Engine) {
    let Some(url) = &engine.config.redis_url else { return };
    match engine.shared.ping().await {
        Ok(()) => checks.add(Grade::Ok, "redis", format!("{url} answers")),
        Err(error) => {
            checks.add(Grade::Broken, "redis", format!("{url} does not answer: {error}; runs go on, more slowly"))
        }
    }
}

async fn check_providers(checks: &mut Checks, engine: &Engine) {
    let connections = match engine.db.list_connections(None).await {
        Ok(connections) => connections,
        Err(error) => return checks.add(Grade::Broken, "connections", exit::words(&error.into())),
    };
    for setup in engine.providers.values() {
        let name = setup.spec().name.0;
        let mine: Vec<&ConnectionView> = connections
            .iter()
            .filter(|view| view.connection.provider == name && view.connection.status == "active")
            .collect();
        if let Err(error) = sync::app(setup) {
            let grade = if mine.is_empty() { Grade::Warning } else { Grade::Broken };
            checks.add(grade, name, error.to_string());
            continue;
        }
        check_reachable(checks, engine, setup).await;
        check_webhooks(checks, engine, setup).await;
        if mine.is_empty() {
            checks.add(Grade::Warning, name, format!("nobody is connected: `wearsync connect {name}` connects a user"));
        }
        for view in mine {
            check_connection(checks, engine, setup, view).await;
        }
        check_quota(checks, engine, setup).await;
        check_schedule(checks, engine, setup).await;
    }
}

/// Whether its events come in; without them, polling finds everything, later.
async fn check_webhooks(checks: &mut Checks, engine: &Engine, setup: &ProviderSetup) {
    let (spec, Ok(app)) = (setup.spec(), sync::app(setup)) else { return };
    if spec.webhooks.is_none_or(|webhooks| webhooks.subscriptions.is_none()) {
        return;
    }
    let name = spec.name.0;
    match engine.db.list_subscriptions(name, &app.client_id).await {
        Ok(rows) if rows.is_empty() => {
            let detail = format!("no webhooks: `wearsync subscriptions create {name} --url https://…` has them sent");
            checks.add(Grade::Ok, name, detail);
        }
        Ok(rows) => {
            let (url, ours) = (&rows[0].callback_url, &engine.config.public_url);
            let is_here = url.strip_prefix(ours).is_some_and(|rest| rest.starts_with('/'));
            let again = format!("`wearsync subscriptions create {name}` subscribes anew");
            match sync::is_believed(engine, setup, url) {
                Ok(true) if !is_here && !engine.config.is_local() => {
                    let why = format!("webhooks: they go to {}, and public_url is {ours}", origin(url));
                    checks.add(Grade::Warning, name, format!("{why}: if they do not arrive there, {again}"));
                }
                Ok(true) => checks.add(Grade::Ok, name, format!("webhooks: subscription {}", rows[0].external_id)),
                Ok(false) => {
                    let why = "webhooks: all are refused: their address was made with another secret key, or by hand";
                    checks.add(Grade::Warning, name, format!("{why}; {again}"));
                }
                Err(error) => checks.add(Grade::Broken, name, error.to_string()),
            }
        }
        Err(error) => checks.add(Grade::Broken, name, exit::words(&error.into())),
    }
}

/// An address without its secret end.
fn origin(url: &str) -> String {
    url::Url::parse(url).map(|url| url.origin().ascii_serialization()).unwrap_or_default()
}

/// Any answer will do; its `Date` is a clock that is known to be right.
async fn check_reachable(checks: &mut Checks, engine: &Engine, setup: &ProviderSetup) {
    let (name, url) = (setup.spec().name.0, setup.base_url.as_str());
    match tokio::time::timeout(PATIENCE, engine.http.client().head(url).send()).await {
        Ok(Ok(answer)) => {
            checks.add(Grade::Ok, name, format!("{url} answers"));
            let date = answer.headers().get(reqwest::header::DATE).and_then(|date| date.to_str().ok());
            if let Some(date) = date.and_then(|date| DateTime::parse_from_rfc2822(date).ok()) {
                check_clock(checks, setup.spec().title, date.timestamp_millis());
            }
        }
        _ => {
            checks.add(Grade::Broken, name, format!("{url} does not answer: look at this machine's network and proxy"))
        }
    }
}

async fn check_connection(checks: &mut Checks, engine: &Engine, setup: &ProviderSetup, view: &ConnectionView) {
    let account: AccountId = view.connection.account_id;
    let name = format!("{} of user {}", setup.spec().name, view.connection.user_id);
    match sync::probe(engine, setup, account).await {
        Ok(probe) => {
            let failed: Vec<String> = probe
                .streams
                .iter()
                .filter_map(|(stream, read)| Some(format!("{stream}: {}", read.as_ref().err()?)))
                .collect();
            let until = time(probe.token.expires_at);
            if failed.is_empty() {
                let streams: Vec<&str> = probe.streams.iter().map(|(stream, _)| stream.0).collect();
                let detail = format!("token refreshed, good until {until}; can read {}", streams.join(", "));
                checks.add(Grade::Ok, &name, detail);
            } else {
                let missing = probe.streams.iter().any(|(_, read)| {
                    matches!(
                        read,
                        Err(crate::providers::FetchError::MissingScope { .. }
                            | crate::providers::FetchError::Unauthorized { .. })
                    )
                });
                // A spent quota is the usual state of a long first sync.
                let waits = probe
                    .streams
                    .iter()
                    .filter_map(|(_, read)| read.as_ref().err())
                    .all(|error| matches!(error, crate::providers::FetchError::Quota { .. }));
                let grade = match (missing, waits) {
                    (true, _) => Grade::Reauthorize,
                    (_, true) => Grade::Warning,
                    _ => Grade::Broken,
                };
                checks.add(grade, &name, format!("token refreshed, but {}", failed.join("; ")));
            }
        }
        Err(TokenFailure::Reauthorize(why)) => {
            checks.add(Grade::Reauthorize, &name, format!("has to be connected again: {why}"));
        }
        Err(error) => checks.add(Grade::Broken, &name, exit::words(&error.into())),
    }
}

/// Whether what is due by the clock begins in time, and whether pushes still come.
async fn check_schedule(checks: &mut Checks, engine: &Engine, setup: &ProviderSetup) {
    let name = format!("{} schedule", setup.spec().name);
    let default = sync::default_schedule(engine, setup);
    let off = *default == Schedule::Off;
    let counts = match engine.db.count_schedules(setup.spec().name.0, off, engine.clock.now()).await {
        Ok(counts) => counts,
        Err(error) => return checks.add(Grade::Broken, &name, exit::words(&error.into())),
    };
    let connections = count(counts.on.unsigned_abs(), "connection");
    let mut told = vec![format!("{connections} read by the clock (default: {default})")];
    let odd = [
        (counts.late, "due for more than an hour: does a server or worker run, and is the quota large enough?"),
        (counts.sweep_late, "without the daily sweep for more than a day: the quota's share for it is too small"),
        (counts.quiet, "no longer pushed and asked instead: look at the subscription at the provider"),
    ];
    told.extend(odd.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}")));
    let grade = if told.len() > 1 { Grade::Warning } else { Grade::Ok };
    checks.add(grade, &name, told.join("; "));
}

async fn check_quota(checks: &mut Checks, engine: &Engine, setup: &ProviderSetup) {
    let name = format!("{} quota", setup.spec().name);
    if setup.quotas.is_empty() {
        return checks.add(Grade::Ok, &name, "none");
    }
    let known = match engine.db.load_quota(&setup.quota_key()).await {
        Ok(known) => known,
        Err(error) => return checks.add(Grade::Broken, &name, exit::words(&error.into())),
    };
    let now_ms = engine.clock.now_ms();
    let windows: Vec<String> = setup
        .quotas
        .iter()
        .map(|quota| {
            let stored = known.iter().find(|(stored, _)| *stored == quota.name).map(|(_, window)| *window);
            let window = crate::model::quota::current(quota, stored, now_ms);
            let resets = DateTime::<Utc>::from_timestamp_millis(window.resets_at_ms).map(iso).unwrap_or_default();
            format!("{}: {} of {} until {resets}", quota.name, window.used, count(window.limit, "call"))
        })
        .collect();
    checks.add(Grade::Ok, &name, windows.join("; "));
}
