//! `wearsync deliveries`: what providers sent by themselves, and what became of it.

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use uuid::Uuid;

use super::Session;
use super::exit::{Exit, Outcome, usage};
use super::output::{dash, facts, iso, remark, table, time, time_or_dash};
use crate::app::App;
use crate::model::DeliveryId;
use crate::storage::{Delivery, DeliveryFilter, DeliveryItem};
use crate::sync;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List deliveries, the newest first
    List(List),
    /// Everything about one delivery
    Show {
        /// Its id, as listed
        id: Uuid,
        /// Print its body, too: it says whose data changed
        #[arg(long)]
        body: bool,
    },
    /// Work on a delivery once more; what is stored already stays as it is
    Replay {
        /// Its id, as listed
        id: Uuid,
    },
}

#[derive(Debug, Args)]
pub(crate) struct List {
    /// Of this provider only
    #[arg(long)]
    provider: Option<String>,
    /// In this state only: queued, `in_progress`, waiting, done, failed
    #[arg(long)]
    status: Option<String>,
    /// How many
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(i64).range(1..=1000))]
    limit: i64,
    /// Older than this delivery
    #[arg(long, value_name = "ID")]
    before: Option<Uuid>,
}

pub(crate) async fn run(session: &Session, command: Command) -> Outcome {
    let app = session.open().await?;
    let db = &app.engine.db;
    match command {
        Command::List(list) => {
            let filter = DeliveryFilter {
                provider: list.provider,
                state: list.status,
                before: list.before.map(DeliveryId),
                limit: list.limit,
            };
            let found = db.list_deliveries(&filter).await?;
            session.out.show(&found.iter().map(delivery_json).collect::<Vec<_>>(), || {
                let rows: Vec<Vec<String>> = found.iter().map(row).collect();
                let head = ["ID", "PROVIDER", "STATE", "RECEIVED", "ENDED", "EVENT", ""];
                table(&head, &rows, "no deliveries: `wearsync subscriptions create` asks a provider for them")
            })?;
        }
        Command::Show { id, body } => {
            let id = DeliveryId(id);
            let found = find(&app, id).await?;
            let items = db.list_delivery_items(id).await?;
            let text = if body { sync::delivery_body(&app.engine, id).await? } else { None };
            let text = text.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
            let mut answer = delivery_json(&found);
            answer["items"] = items.iter().map(item_json).collect();
            if body {
                answer["body"] = json!(text);
            }
            session.out.show(&answer, || describe(&found, &items, text.as_deref()))?;
        }
        Command::Replay { id } => {
            let id = DeliveryId(id);
            find(&app, id).await?;
            if !sync::replay(&app.engine, id).await? {
                anyhow::bail!("{id} cannot be replayed: its body was dropped, or somebody works on it right now");
            }
            session.out.show(&json!({ "id": id, "status": "queued" }), || "queued".to_owned())?;
            remark("a running server or worker takes it within seconds");
        }
    }
    app.close().await;
    Ok(Exit::Done)
}

async fn find(app: &App, id: DeliveryId) -> anyhow::Result<Delivery> {
    let found = app.engine.db.find_delivery(id).await?;
    found.ok_or_else(|| usage(format!("no delivery has the id {id}: `wearsync deliveries list` shows them")))
}

fn row(one: &Delivery) -> Vec<String> {
    vec![
        one.id.to_string(),
        one.provider.clone(),
        one.state.clone(),
        time(one.received_at),
        time_or_dash(one.ended_at),
        one.dedup_key.clone(),
        one.reason.clone().unwrap_or_default(),
    ]
}

fn describe(one: &Delivery, items: &[DeliveryItem], body: Option<&str>) -> String {
    let waits = matches!(one.state.as_str(), "queued" | "waiting");
    let mut text = facts(&[
        ("id", Some(one.id.to_string())),
        ("provider", Some(one.provider.clone())),
        ("event", Some(one.dedup_key.clone())),
        ("state", Some(one.state.clone())),
        ("reason", one.reason.clone()),
        ("due", waits.then(|| time(one.due_at))),
        ("received", Some(time(one.received_at))),
        ("ended", one.ended_at.map(time)),
        ("crashes", (one.crashes > 0).then(|| one.crashes.to_string())),
        ("headers", Some(one.headers.clone())),
        ("body", Some(body.unwrap_or(if one.has_body { "kept (--body prints it)" } else { "dropped" }).to_owned())),
    ]);
    for item in items {
        let run = item.run_id.map_or_else(dash, |id| id.to_string());
        text.push_str(&format!("  - {} {}: run {run}\n", item.state, item.notice));
    }
    text
}

/// A delivery for programs.
fn delivery_json(one: &Delivery) -> Value {
    json!({
        "id": one.id,
        "provider": one.provider,
        "event": one.dedup_key,
        "status": one.state,
        "reason": one.reason,
        "due_at": iso(one.due_at),
        "attempts": one.attempts,
        "crashes": one.crashes,
        "received_at": iso(one.received_at),
        "ended_at": one.ended_at.map(iso),
        "headers": serde_json::from_str::<Value>(&one.headers).unwrap_or_default(),
        "has_body": one.has_body,
    })
}

fn item_json(item: &DeliveryItem) -> Value {
    json!({
        "notice": serde_json::from_str::<Value>(&item.notice).unwrap_or_default(),
        "status": item.state,
        "connection_id": item.connection_id,
        "run_id": item.run_id,
    })
}
