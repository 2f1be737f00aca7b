//! `wearsync schedule`: when a connection is read without anybody asking.

use chrono_tz::Tz;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::Session;
use super::connections::find_provider;
use super::exit::{Exit, Outcome, usage};
use super::output::{dash, iso, remark, table, time, time_or_dash};
use super::users::Whose;
use crate::model::Schedule;
use crate::storage::{ConnectionView, ScheduleRow};
use crate::sync::{self, Engine, ProviderSetup};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show the schedules of active connections
    Show(Whose),
    /// Read a connection by this schedule
    Set {
        /// 6h, 30m, 1d; five fields of cron in the user's zone, in quotes: "0 6 * * *"; `default`: as the settings say
        schedule: Wanted,
        /// The user's zone from now on, for example `Europe/Zurich`
        #[arg(long, value_name = "ZONE")]
        time_zone: Option<Tz>,
        #[command(flatten)]
        which: Which,
    },
    /// Read a connection only when somebody asks
    Off(Which),
}

#[derive(Debug, Args)]
pub(crate) struct Which {
    #[command(flatten)]
    whose: Whose,
    /// Provider, for example `strava`
    #[arg(long)]
    provider: String,
}

/// A schedule of a connection's own; none: that of the settings.
#[derive(Clone, Debug)]
pub(crate) struct Wanted(Option<Schedule>);

impl std::str::FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "default" { Ok(Self(None)) } else { text.parse().map(|schedule| Self(Some(schedule))) }
    }
}

pub(crate) async fn run(session: &Session, command: Command) -> Outcome {
    match command {
        Command::Show(whose) => show(session, whose).await,
        Command::Set { schedule, time_zone, which } => set(session, which, schedule.0, time_zone).await,
        Command::Off(which) => set(session, which, Some(Schedule::Off), None).await,
    }
}

/// A connection with its schedule.
struct Line<'a> {
    view: ConnectionView,
    setup: &'a ProviderSetup,
    row: ScheduleRow,
}

async fn lines(engine: &Engine, views: Vec<ConnectionView>) -> anyhow::Result<Vec<Line<'_>>> {
    let mut lines = Vec::new();
    for view in views {
        let Some(setup) = engine.provider(&view.connection.provider) else { continue };
        if view.connection.status == "active"
            && let Some(row) = engine.db.find_schedule(view.connection.id).await?
        {
            lines.push(Line { view, setup, row });
        }
    }
    Ok(lines)
}

async fn show(session: &Session, whose: Whose) -> Outcome {
    let app = session.open().await?;
    let engine = &app.engine;
    let user = whose.named(&engine.db).await?.map(|user| user.id);
    let lines = lines(engine, engine.db.list_connections(user).await?).await?;
    app.close().await;
    session.out.show(&lines.iter().map(|line| line_json(engine, line)).collect::<Vec<_>>(), || {
        let rows: Vec<Vec<String>> = lines.iter().map(|line| line_row(engine, line)).collect();
        let head = ["USER", "PROVIDER", "SCHEDULE", "NEXT", "LAST", "NEXT SWEEP", "QUIET SINCE"];
        table(&head, &rows, "there is no active connection: nothing is read by the clock")
    })?;
    Ok(Exit::Done)
}

async fn set(session: &Session, which: Which, own: Option<Schedule>, zone: Option<Tz>) -> Outcome {
    let app = session.open().await?;
    let engine = &app.engine;
    let setup = find_provider(engine, &which.provider)?;
    let user = which.whose.find(&engine.db).await?;
    let views = engine.db.list_connections(Some(user.id)).await?;
    let name = setup.spec().name.0;
    let view = views.into_iter().find(|v| v.connection.provider == name && v.connection.status == "active");
    let Some(view) = view else {
        return Err(usage(format!("user {} has no active connection to {}", user.id, setup.spec().title)));
    };
    let row = sync::set_schedule(engine, setup, view.connection.id, own.as_ref(), zone).await?;
    app.close().await;
    let Some(row) = row else { anyhow::bail!("the connection was removed just now") };
    let line = Line { view, setup, row };
    session.out.show(&line_json(engine, &line), || match effective(engine, &line) {
        Schedule::Off => "it is read only when somebody asks".to_owned(),
        schedule => format!("{schedule} ({}), next {}", line.row.time_zone, time(line.row.next_at)),
    })?;
    remark("a server or worker has to run for it: `wearsync serve`");
    Ok(Exit::Done)
}

fn effective(engine: &Engine, line: &Line<'_>) -> Schedule {
    line.row.own().unwrap_or_else(|| sync::default_schedule(engine, line.setup).clone())
}

fn line_row(engine: &Engine, line: &Line<'_>) -> Vec<String> {
    let (schedule, row) = (effective(engine, line), &line.row);
    let is_on = schedule != Schedule::Off;
    let at = |at| if is_on { time(at) } else { dash() };
    vec![
        line.view.connection.user_id.to_string(),
        row.provider.clone(),
        if row.own().is_none() { format!("{schedule} (default)") } else { schedule.to_string() },
        at(row.next_at),
        time_or_dash(row.last_at),
        at(row.reconcile_at),
        time_or_dash(row.quiet_since),
    ]
}

/// The members of the API's answer, and whose it is.
fn line_json(engine: &Engine, line: &Line<'_>) -> Value {
    let (schedule, row) = (effective(engine, line), &line.row);
    let is_on = schedule != Schedule::Off;
    json!({
        "user_id": line.view.connection.user_id,
        "connection_id": row.connection_id,
        "provider": row.provider,
        "schedule": schedule.to_string(),
        "is_default": row.own().is_none(),
        "time_zone": row.time_zone,
        "next_at": is_on.then(|| iso(row.next_at)),
        "last_at": row.last_at.map(iso),
        "reconcile_at": is_on.then(|| iso(row.reconcile_at)),
        "reconciled_at": row.reconciled_at.map(iso),
        "quiet_since": row.quiet_since.map(iso),
    })
}
