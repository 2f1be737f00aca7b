//! `wearsync gaps`: what is not covered yet.

use chrono::DateTime;
use clap::Args;
use serde_json::{Value, json};

use super::Session;
use super::connections;
use super::exit::{Exit, Outcome};
use super::output::{count, iso, remark, table, time};
use super::users::Whose;
use crate::model::BEGINNING_MS;
use crate::storage::Gap;
use crate::sync;

#[derive(Debug, Args)]
pub(crate) struct Gaps {
    #[command(flatten)]
    whose: Whose,
}

pub(crate) async fn run(session: &Session, arguments: Gaps) -> Outcome {
    let app = session.open().await?;
    let engine = &app.engine;
    let user = arguments.whose.named(&engine.db).await?.map(|user| user.id);
    let gaps = sync::list_gaps(engine, user).await?;
    let mut wanted = Vec::new();
    let mut quiet = Vec::new();
    let mut lapsed = Vec::new();
    let mut active = false;
    for view in engine.db.list_connections(user).await? {
        let (number, _) = engine.db.count_wanted(view.connection.id, engine.clock.now()).await?;
        let failed = engine.db.count_failed(view.connection.id).await?;
        active |= view.connection.status == "active";
        if view.connection.status == "active" && view.account_status != "active" {
            let why = view.account_reason.unwrap_or_else(|| "the grant is no longer good".to_owned());
            lapsed.push((view.connection.clone(), why));
        }
        if let Some(since) = view.quiet_since {
            quiet.push((view.connection.clone(), since));
        }
        if number + failed > 0 && view.connection.status == "active" {
            wanted.push((view.connection, number.unsigned_abs(), failed.unsigned_abs()));
        }
    }
    app.close().await;
    let parts = wanted.iter().map(|(connection, number, failed)| {
        json!({ "connection_id": connection.id, "provider": connection.provider, "count": number, "failed": failed })
    });
    let silences = quiet.iter().map(|(connection, since)| {
        json!({ "connection_id": connection.id, "provider": connection.provider, "since": iso(*since) })
    });
    let grants = lapsed.iter().map(
        |(connection, why)| json!({ "connection_id": connection.id, "provider": connection.provider, "reason": why }),
    );
    let answer = json!({
        "gaps": gaps.iter().map(gap_json).collect::<Vec<_>>(),
        "parts_wanted": parts.collect::<Vec<_>>(),
        "quiet": silences.collect::<Vec<_>>(),
        "reauthorize": grants.collect::<Vec<_>>(),
    });
    session.out.show(&answer, || {
        let rows: Vec<Vec<String>> = gaps.iter().map(gap_row).collect();
        let none = match (active, wanted.is_empty() && lapsed.is_empty()) {
            (false, _) => "there is no active connection: nothing is covered, and nothing is missing",
            (true, true) => "no gaps: everything is covered",
            (true, false) => "every list is covered",
        };
        table(&["PROVIDER", "STREAM", "FROM", "TO", "STATE"], &rows, none)
    })?;
    for (connection, number, failed) in &wanted {
        let parts = count(*number, "answer");
        remark(&format!("{}: {parts} about known records still to fetch; the next syncs do", connection.provider));
        if *failed > 0 {
            let parts = count(*failed, "answer");
            remark(&format!("{}: {parts} could not be had; a sync after some hours asks again", connection.provider));
        }
    }
    for (connection, since) in &quiet {
        remark(&format!("{} of user {}: {}", connection.provider, connection.user_id, connections::quiet(*since)));
    }
    for (connection, why) in &lapsed {
        let (id, provider, user) = (connection.id, &connection.provider, connection.user_id);
        let again = connections::add_command(user, provider);
        remark(&format!("connection {id} ({provider} of user {user}) is read no more ({why}): `{again}`"));
    }
    if !lapsed.is_empty() {
        return Ok(Exit::Reauthorize);
    }
    Ok(if gaps.is_empty() && wanted.is_empty() { Exit::Done } else { Exit::Stale })
}

fn gap_row(gap: &Gap) -> Vec<String> {
    let state = match &gap.last_error {
        Some(why) => format!("{}: {why}", gap.state),
        None => gap.state.to_owned(),
    };
    let from = if gap.lo == BEGINNING_MS { "the beginning".to_owned() } else { bound(gap.lo) };
    vec![gap.provider.clone(), gap.stream.clone(), from, bound(gap.hi), state]
}

fn bound(ms: i64) -> String {
    DateTime::from_timestamp_millis(ms).map_or_else(|| ms.to_string(), time)
}

/// The members of the API's answer; no `from` is the beginning.
fn gap_json(gap: &Gap) -> Value {
    let lo = (gap.lo > BEGINNING_MS).then_some(gap.lo);
    json!({
        "connection_id": gap.connection_id,
        "provider": gap.provider,
        "stream": gap.stream,
        "from": lo.and_then(DateTime::from_timestamp_millis).map(iso),
        "from_ms": lo,
        "to": DateTime::from_timestamp_millis(gap.hi).map(iso),
        "to_ms": gap.hi,
        "state": gap.state,
        "error": gap.last_error,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ConnectionId;

    #[test]
    fn a_gap_in_both_forms() {
        let gap = Gap {
            connection_id: ConnectionId::new(),
            provider: "strava".to_owned(),
            stream: "activities".to_owned(),
            lo: BEGINNING_MS,
            hi: 1_770_301_335_000,
            state: "open",
            last_error: Some("no answer".to_owned()),
        };
        let row = ["strava", "activities", "the beginning", "2026-02-05 14:22:15 UTC", "open: no answer"];
        assert_eq!(gap_row(&gap), row);
        let json = gap_json(&gap);
        assert!(json["from"].is_null() && json["from_ms"].is_null());
        assert_eq!((&json["to"], &json["to_ms"]), (&json!("2026-02-05T14:22:15Z"), &json!(1_770_301_335_000_i64)));
    }
}
