//! `wearsync gaps`: what is not covered yet.

use chrono::DateTime;
use clap::Args;
use serde_json::{Value, json};

use super::Session;
use super::exit::{Exit, Outcome};
use super::output::{count, iso, remark, table, time};
use super::users::Whose;
use crate::model::BEGINNING_MS;
use crate::providers::{self, Axis};
use crate::storage::{Gap, WindowRow};

#[derive(Debug, Args)]
pub(crate) struct Gaps {
    #[command(flatten)]
    whose: Whose,
}

pub(crate) async fn run(session: &Session, arguments: Gaps) -> Outcome {
    let app = session.open().await?;
    let db = &app.engine.db;
    let now = app.engine.clock.now();
    let user = arguments.whose.named(db).await?;
    let mut gaps = Vec::new();
    let mut wanted = Vec::new();
    for view in db.list_connections(user.map(|user| user.id)).await? {
        let connection = view.connection;
        let Some(provider) = providers::find(&connection.provider).filter(|_| connection.status == "active") else {
            continue;
        };
        let windows = db.list_windows(connection.id).await?;
        for stream in provider.spec().streams.iter().filter(|stream| stream.axis != Axis::None) {
            let name = stream.name.0;
            let cover: Vec<&WindowRow> =
                windows.iter().filter(|window| window.stream == name && window.purpose == "cover").collect();
            let until = until(&cover, now.timestamp_millis(), stream.overlap_ms);
            gaps.extend(uncovered(&cover, until).into_iter().map(|(lo, hi, state, last_error)| Gap {
                connection_id: connection.id,
                provider: connection.provider.clone(),
                stream: name.to_owned(),
                lo,
                hi,
                state,
                last_error,
            }));
        }
        let (number, due) = db.count_wanted(connection.id, now).await?;
        if number > 0 {
            wanted.push((connection.id, connection.provider, number, due));
        }
    }
    app.close().await;
    let answer = json!({
        "gaps": gaps.iter().map(gap_json).collect::<Vec<_>>(),
        "parts_wanted": wanted.iter().map(|(connection, provider, number, _)| {
            json!({ "connection_id": connection, "provider": provider, "count": number })
        }).collect::<Vec<_>>(),
    });
    session.out.show(&answer, || {
        let rows: Vec<Vec<String>> = gaps
            .iter()
            .map(|gap| {
                let why =
                    gap.last_error.as_ref().map_or_else(|| gap.state.to_owned(), |why| format!("{}: {why}", gap.state));
                vec![gap.provider.clone(), gap.stream.clone(), bound(gap.lo), bound(gap.hi), why]
            })
            .collect();
        table(&["PROVIDER", "STREAM", "FROM", "TO", "STATE"], &rows, "no gaps: everything is covered")
    })?;
    for (_, provider, number, _) in &wanted {
        let parts = count(number.unsigned_abs(), "answer");
        remark(&format!("{provider}: {parts} about known records still to fetch; the next syncs do"));
    }
    Ok(if gaps.is_empty() { Exit::Done } else { Exit::Stale })
}

/// Up to where a stream should be covered: to its newest reading; where that is longer ago than a sync reads back, to
/// there. Otherwise everything would be stale a second after each sync.
fn until(cover: &[&WindowRow], now_ms: i64, overlap_ms: i64) -> i64 {
    let newest = cover.iter().map(|window| window.hi).max().unwrap_or(BEGINNING_MS);
    newest.max(now_ms - overlap_ms)
}

type Range = (i64, i64, &'static str, Option<String>);

/// What done windows leave of everything before `until`, newest first; each piece with the state of the window over it.
fn uncovered(cover: &[&WindowRow], until: i64) -> Vec<Range> {
    let mut done: Vec<(i64, i64)> =
        cover.iter().filter(|window| window.state == "done").map(|window| (window.lo, window.hi)).collect();
    done.sort_unstable();
    let mut holes = Vec::new();
    let mut reached = BEGINNING_MS;
    for (lo, hi) in done.into_iter().chain([(until, until)]) {
        if lo.min(until) > reached {
            holes.push((reached, lo.min(until)));
        }
        reached = reached.max(hi);
    }
    let mut pieces = Vec::new();
    for (lo, hi) in holes {
        let mut cuts: Vec<i64> =
            cover.iter().flat_map(|window| [window.lo, window.hi]).filter(|cut| lo < *cut && *cut < hi).collect();
        cuts.extend([lo, hi]);
        cuts.sort_unstable();
        cuts.dedup();
        for pair in cuts.windows(2) {
            let over =
                cover.iter().find(|window| window.state != "done" && window.lo <= pair[0] && pair[1] <= window.hi);
            let (state, error) = match over {
                Some(window) if window.state == "asked" => ("asked", window.last_error.clone()),
                Some(window) => ("open", window.last_error.clone()),
                None => ("unread", None),
            };
            match pieces.last_mut() {
                // Windows overlap; one piece per state and reason is enough.
                Some((_, end, before, why)) if *end == pair[0] && *before == state && *why == error => *end = pair[1],
                _ => pieces.push((pair[0], pair[1], state, error)),
            }
        }
    }
    pieces.reverse();
    pieces
}

fn bound(ms: i64) -> String {
    match DateTime::from_timestamp_millis(ms) {
        Some(at) if ms > BEGINNING_MS => time(at),
        _ => "the beginning".to_owned(),
    }
}

fn gap_json(gap: &Gap) -> Value {
    let at = |ms: i64| DateTime::from_timestamp_millis(ms).filter(|_| ms > BEGINNING_MS).map(iso);
    json!({
        "connection_id": gap.connection_id,
        "provider": gap.provider,
        "stream": gap.stream,
        // null: the beginning.
        "from": at(gap.lo),
        "to": at(gap.hi),
        "state": gap.state,
        "last_error": gap.last_error,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::WindowId;

    fn cover(lo: i64, hi: i64, state: &str) -> WindowRow {
        WindowRow {
            id: WindowId::new(),
            stream: "activities".to_owned(),
            purpose: "cover".to_owned(),
            lo,
            hi,
            state: state.to_owned(),
            position: None,
            verified_at: None,
            last_error: (state == "open").then(|| "no connection".to_owned()),
        }
    }

    fn holes(windows: &[WindowRow], until: i64) -> Vec<(i64, i64, &'static str)> {
        let windows: Vec<&WindowRow> = windows.iter().collect();
        uncovered(&windows, until).into_iter().map(|(lo, hi, state, _)| (lo, hi, state)).collect()
    }

    #[test]
    fn the_complement_of_what_is_done() {
        assert_eq!(holes(&[], 100), [(BEGINNING_MS, 100, "unread")]);
        assert_eq!(holes(&[cover(BEGINNING_MS, 100, "done")], 100), []);
        assert_eq!(holes(&[cover(BEGINNING_MS, 100, "open")], 100), [(BEGINNING_MS, 100, "open")]);
        let two = [cover(BEGINNING_MS, 100, "done"), cover(90, 200, "open")];
        assert_eq!(holes(&two, 200), [(100, 200, "open")]);
        let three = [cover(BEGINNING_MS, 100, "open"), cover(90, 200, "done"), cover(190, 300, "done")];
        assert_eq!(holes(&three, 300), [(BEGINNING_MS, 90, "open")]);
        assert_eq!(holes(&three, 400), [(300, 400, "unread"), (BEGINNING_MS, 90, "open")]);
    }

    #[test]
    fn a_fresh_sync_leaves_nothing_stale_and_an_old_one_does() {
        let window = cover(BEGINNING_MS, 1000, "done");
        assert_eq!(
            (until(&[&window], 1500, 700), until(&[&window], 9000, 700), until(&[], 9000, 700)),
            (1000, 8300, 8300)
        );
    }
}
