//! What is not covered: the complement of the done windows of each stream, up to now.

use crate::model::{BEGINNING_MS, UserId};
use crate::providers::{self, Axis};
use crate::storage::{Gap, WindowRow};

use super::{Engine, Error};

/// The gaps of the active connections of one user, or of all; oldest first per stream. Streams without an axis have none:
/// they are read whole every time.
///
/// # Errors
/// When the database fails.
pub async fn list_gaps(engine: &Engine, user: Option<UserId>) -> Result<Vec<Gap>, Error> {
    let now_ms = engine.clock.now_ms();
    let mut gaps = Vec::new();
    for view in engine.db.list_connections(user).await? {
        let connection = view.connection;
        let Some(provider) = providers::find(&connection.provider).filter(|_| connection.status == "active") else {
            continue;
        };
        // Nothing of it gets on before a person has connected it again.
        let lapsed = (view.account_status != "active").then(|| {
            let why = view.account_reason.as_deref().unwrap_or("the grant is no longer good");
            format!("the account has to be connected again: {why}")
        });
        let windows = engine.db.list_windows(connection.id).await?;
        for stream in provider.spec().streams.iter().filter(|stream| stream.axis != Axis::None) {
            let name = stream.name.0;
            let cover: Vec<&WindowRow> =
                windows.iter().filter(|window| window.stream == name && window.purpose == "cover").collect();
            let until_ms = until(&cover, now_ms, stream.overlap_ms);
            gaps.extend(missing(&cover, until_ms).into_iter().map(|piece| Gap {
                connection_id: connection.id,
                provider: connection.provider.clone(),
                stream: name.to_owned(),
                lo: piece.lo,
                hi: piece.hi,
                state: piece.state,
                last_error: lapsed.clone().or(piece.last_error),
            }));
        }
    }
    Ok(gaps)
}

/// Up to where a stream should be covered: to now, but not beyond its newest reading while that is so new that the next
/// sync reads back over it anyway. Otherwise everything would have a gap a second after each sync.
fn until(cover: &[&WindowRow], now_ms: i64, overlap_ms: i64) -> i64 {
    let newest = cover.iter().map(|window| window.hi).max();
    newest.filter(|newest| now_ms - newest <= overlap_ms).unwrap_or(now_ms)
}

#[derive(Debug, PartialEq, Eq)]
struct Piece {
    lo: i64,
    hi: i64,
    state: &'static str,
    last_error: Option<String>,
}

/// The pieces of `[beginning, until)` that no done window covers. Where an open window lies over a piece, it says why.
fn missing(windows: &[&WindowRow], until_ms: i64) -> Vec<Piece> {
    let mut bounds: Vec<i64> = windows.iter().flat_map(|w| [w.lo, w.hi]).chain([BEGINNING_MS, until_ms]).collect();
    bounds.retain(|bound| (BEGINNING_MS..=until_ms).contains(bound));
    bounds.sort_unstable();
    bounds.dedup();
    let mut pieces: Vec<Piece> = Vec::new();
    for pair in bounds.windows(2) {
        let (lo, hi) = (pair[0], pair[1]);
        let over = |state: &str| windows.iter().find(|w| w.state == state && w.lo <= lo && hi <= w.hi);
        if over("done").is_some() {
            continue;
        }
        let (state, window) = match (over("open"), over("asked")) {
            (Some(window), _) => ("open", Some(window)),
            (None, Some(window)) => ("asked", Some(window)),
            (None, None) => ("unread", None),
        };
        let last_error = window.and_then(|window| window.last_error.clone());
        match pieces.last_mut() {
            Some(last) if last.hi == lo && last.state == state && last.last_error == last_error => last.hi = hi,
            _ => pieces.push(Piece { lo, hi, state, last_error }),
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::WindowId;

    fn window(lo: i64, hi: i64, state: &str) -> WindowRow {
        WindowRow {
            id: WindowId::new(),
            stream: "activities".to_owned(),
            purpose: "cover".to_owned(),
            lo,
            hi,
            state: state.to_owned(),
            position: None,
            verified_at: None,
            last_error: (state == "open").then(|| "no answer".to_owned()),
        }
    }

    fn pieces(windows: &[WindowRow]) -> Vec<(i64, i64, &'static str)> {
        let windows: Vec<&WindowRow> = windows.iter().collect();
        missing(&windows, 1000).into_iter().map(|piece| (piece.lo, piece.hi, piece.state)).collect()
    }

    #[test]
    fn nothing_read_is_one_gap() {
        assert_eq!(pieces(&[]), [(BEGINNING_MS, 1000, "unread")]);
    }

    #[test]
    fn done_windows_leave_what_they_do_not_cover() {
        assert_eq!(pieces(&[window(BEGINNING_MS, 1000, "done")]), []);
        assert_eq!(pieces(&[window(BEGINNING_MS, 1500, "done")]), []);
        let windows = [window(100, 400, "done"), window(300, 500, "done"), window(700, 900, "done")];
        assert_eq!(pieces(&windows), [(BEGINNING_MS, 100, "unread"), (500, 700, "unread"), (900, 1000, "unread")]);
    }

    #[test]
    fn a_fresh_reading_leaves_nothing_stale() {
        let window = window(BEGINNING_MS, 1000, "done");
        assert_eq!(
            (until(&[&window], 1500, 700), until(&[&window], 9000, 700), until(&[], 9000, 700)),
            (1000, 9000, 9000)
        );
    }

    #[test]
    fn open_and_asked_windows_say_what_happens_to_a_gap() {
        let windows = [window(BEGINNING_MS, 600, "open"), window(500, 800, "done"), window(800, 900, "asked")];
        let expected = [(BEGINNING_MS, 500, "open"), (800, 900, "asked"), (900, 1000, "unread")];
        assert_eq!(pieces(&windows), expected);
        let windows: Vec<&WindowRow> = windows.iter().collect();
        assert_eq!(missing(&windows, 1000)[0].last_error.as_deref(), Some("no answer"));
    }
}
