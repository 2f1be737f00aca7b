//! `wearsync sync`: accepts a run as the API does, then works on it or follows whoever does.

use chrono::{DateTime, NaiveDate, Utc};
use clap::{Args, ValueEnum};

use super::connections::{add_command, find_provider};
use super::exit::{Outcome, reauthorize};
use super::output::remark;
use super::users::Whose;
use super::{Log, Session, follow, serve, signals};
use crate::app::{App, Role};
use crate::model::{Class, DataType, RunSource, SyncRequest};
use crate::sync;

#[derive(Debug, Args)]
pub(crate) struct Sync {
    /// Provider, for example `strava`
    provider: String,
    #[command(flatten)]
    whose: Whose,
    /// Read again from here: Unix time, 2026-02-05, or 2026-02-05T08:30:00Z; 0 reads everything again
    #[arg(long, value_name = "TIME", value_parser = parse_since)]
    since: Option<Since>,
    /// Read the last so many days again, in the background: whatever is more urgent goes first
    #[arg(long, value_name = "DAYS", conflicts_with = "since", value_parser = clap::value_parser!(i64).range(1..=365))]
    days: Option<i64>,
    /// Which data
    #[arg(long, value_enum, default_value_t = Data::All)]
    data_type: Data,
    /// Stay to the end, however long the provider's quota makes it wait
    #[arg(long)]
    wait: bool,
}

/// Milliseconds, as a type of its own for clap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Since(i64);

/// The mirrored API's words.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Data {
    /// Activities and exercises
    Workouts,
    /// Sleep, recovery, activity samples
    #[value(name = "247")]
    Daily,
    /// Everything that the provider has
    All,
}

impl From<Data> for DataType {
    fn from(data: Data) -> Self {
        match data {
            Data::Workouts => Self::Workouts,
            Data::Daily => Self::Daily,
            Data::All => Self::All,
        }
    }
}

fn parse_since(text: &str) -> Result<Since, String> {
    let form = || format!("`{text}` is no time: write Unix seconds, 2026-02-05 or 2026-02-05T08:30:00Z");
    if let Ok(number) = text.parse::<i64>() {
        return sync::since_ms(number).map(Since).map_err(|error| error.to_string());
    }
    let at = match DateTime::parse_from_rfc3339(text) {
        Ok(at) => at.to_utc(),
        Err(_) => {
            let day: NaiveDate = text.parse().map_err(|_| form())?;
            day.and_hms_opt(0, 0, 0).ok_or_else(form)?.and_utc()
        }
    };
    if at < DateTime::<Utc>::UNIX_EPOCH { Err(form()) } else { Ok(Since(at.timestamp_millis())) }
}

pub(crate) async fn run(session: &Session, arguments: Sync) -> Outcome {
    let app = App::open(session.config(Log::Remarks)?, Role::Command).await?;
    signals::stop_on_signal(app.engine.stop.clone())?;
    let outcome = accept_and_follow(session, &app, arguments).await;
    app.close().await;
    outcome
}

async fn accept_and_follow(session: &Session, app: &App, arguments: Sync) -> Outcome {
    let engine = &app.engine;
    serve::import(engine).await?;
    let setup = find_provider(engine, &arguments.provider)?;
    let (name, title) = (setup.spec().name.0, setup.spec().title);
    let user = arguments.whose.find(&engine.db).await?;
    let add = add_command(user.id, name);
    let connections = engine.db.list_connections(Some(user.id)).await?;
    let connection = connections.into_iter().find(|view| view.connection.provider == name);
    let Some(view) = connection else {
        anyhow::bail!("No active connection found for provider {title}: make one with `{add}`");
    };
    if view.connection.status != "active" {
        return Err(reauthorize(format!("{title} was disconnected; connect it again: `{add}`")));
    }
    if view.account_status != "active" {
        let why = view.account_reason.unwrap_or_else(|| "the grant is no longer good".to_owned());
        return Err(reauthorize(format!("{title} has to be connected again ({why}): `{add}`")));
    }
    let request = SyncRequest {
        data_type: arguments.data_type.into(),
        since_ms: match arguments.days {
            Some(days) => Some(engine.clock.now_ms() - days * 86_400_000),
            None => arguments.since.map(|since| since.0),
        },
        ..SyncRequest::default()
    };
    sync::parse_request(setup.spec(), &request, engine.clock.now())?;
    let (class, source) = match arguments.days {
        Some(_) => (Class::Backfill, RunSource::Backfill),
        None => (Class::Interactive, RunSource::Pull),
    };
    let accepted = sync::submit(engine, setup, view.connection.id, &request, class, source, None).await?;
    let Some(accepted) = accepted else {
        anyhow::bail!("No active connection found for provider {title}: it was removed just now");
    };
    if !app.works() {
        remark(&format!("run {} is handed to the process that works here", accepted.id));
    }
    follow::follow(session.out, app, accepted.id, arguments.wait).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::BEGINNING_MS;

    #[test]
    fn since_is_read_in_every_form() {
        for (text, ms) in [
            ("0", BEGINNING_MS),
            ("1770301335", 1_770_301_335_000),
            ("1770301335000", 1_770_301_335_000),
            ("2026-02-05", 1_770_249_600_000),
            ("2026-02-05T14:22:15Z", 1_770_301_335_000),
            ("2026-02-05T15:22:15+01:00", 1_770_301_335_000),
        ] {
            assert_eq!(parse_since(text), Ok(Since(ms)), "{text}");
        }
        for text in ["", "yesterday", "-5", "1969-01-01", "2026-13-01", "99999999999999"] {
            assert!(parse_since(text).is_err(), "{text}");
        }
    }
}
