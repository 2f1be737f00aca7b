//! What a run has to read: request + capabilities + windows → streams and windows, in order.

use chrono::{DateTime, Utc};

use crate::model::{BEGINNING_MS, DataType, Purpose, SyncRequest};
use crate::providers::{Axis, DataPart, ProviderSpec, StreamSpec};
use crate::storage::{NewWindow, WindowRow};

/// The streams of a request, in the provider's order.
pub(crate) fn streams(spec: &'static ProviderSpec, request: &SyncRequest) -> Vec<&'static StreamSpec> {
    spec.streams
        .iter()
        // The profile is read whole by every other run.
        .filter(|stream| !(request.reconcile && stream.axis == Axis::None))
        .filter(|stream| match stream.data {
            DataPart::Profile => true,
            DataPart::Workouts => request.data_type != DataType::Daily,
            DataPart::Daily => request.data_type != DataType::Workouts,
        })
        .collect()
}

/// Bounds lie on whole seconds: the upper one is rounded up, so that what begins in this very second is inside.
fn ceil_second(at: DateTime<Utc>) -> i64 {
    (at.timestamp_millis() + 999).div_euclid(1000) * 1000
}

/// The window that a run has to open for a stream before it reads what is open: `None` when it has `opened` it already.
/// Asked `again`, a run looks at the newest data, whatever its request was.
pub(crate) fn window_to_open<'a>(
    stream: &'a StreamSpec,
    request: &SyncRequest,
    accepted_at: DateTime<Utc>,
    now: DateTime<Utc>,
    opened: bool,
    again: bool,
    windows: &[WindowRow],
) -> Option<NewWindow<'a>> {
    if stream.axis == Axis::None {
        return None;
    }
    let name = stream.name.0;
    let head = |lo: i64, hi: i64| NewWindow { stream: name, purpose: Purpose::Cover, lo, hi };
    let newest = windows.iter().filter(|w| w.stream == name && w.purpose == "cover").map(|w| w.hi).max();
    if (request.since_ms.is_some() || request.until_ms.is_some() || request.offset > 0) && !again {
        // Its upper bound is fixed by the request's own time, so that a run that comes back finds the same window.
        let hi = request.until_ms.unwrap_or_else(|| ceil_second(accepted_at)).min(ceil_second(accepted_at));
        let lo = request.since_ms.unwrap_or(BEGINNING_MS).min(hi - 1);
        return Some(NewWindow { stream: name, purpose: Purpose::Reread, lo, hi });
    }
    let hi = ceil_second(now);
    match newest {
        _ if opened => None,
        None => Some(head(BEGINNING_MS, hi)),
        Some(newest) => Some(head((newest - stream.overlap_ms).min(hi - 1), hi)),
    }
}

/// Ranges below `until` that no cover window lies over, open or done. A run without bounds reads them too: a range that was
/// read by `since` before the first sync of everything leaves all that is older to nobody else.
pub(crate) fn unread(stream: &StreamSpec, windows: &[WindowRow], until: i64) -> Vec<(i64, i64)> {
    let mut cover: Vec<(i64, i64)> = windows
        .iter()
        .filter(|window| window.stream == stream.name.0 && window.purpose == "cover")
        .map(|window| (window.lo, window.hi))
        .collect();
    cover.sort_unstable();
    let mut out = Vec::new();
    let mut reached = BEGINNING_MS;
    for (lo, hi) in cover.into_iter().chain([(until, until)]) {
        if reached < lo.min(until) {
            out.push((reached, lo.min(until)));
        }
        reached = reached.max(hi);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::WindowId;

    const DAY: i64 = 86_400_000;

    fn strava() -> &'static StreamSpec {
        crate::providers::find("strava").unwrap().spec().stream("activities").unwrap()
    }

    fn at(ms: i64) -> DateTime<Utc> {
        DateTime::from_timestamp_millis(ms).unwrap()
    }

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
            last_error: None,
        }
    }

    #[test]
    fn the_first_sync_takes_everything() {
        let open =
            window_to_open(strava(), &SyncRequest::default(), at(100 * DAY + 1), at(100 * DAY + 1), false, false, &[]);
        let open = open.unwrap();
        assert_eq!((open.purpose, open.lo, open.hi), (Purpose::Cover, BEGINNING_MS, 100 * DAY + 1000));
    }

    #[test]
    fn later_syncs_read_the_overlap_whether_the_window_before_is_done_or_open() {
        for state in ["done", "open"] {
            let windows = [cover(BEGINNING_MS, 100 * DAY, state)];
            let open =
                window_to_open(strava(), &SyncRequest::default(), at(101 * DAY), at(101 * DAY), false, false, &windows)
                    .unwrap();
            assert_eq!((open.lo, open.hi), (93 * DAY, 101 * DAY));
        }
    }

    #[test]
    fn a_run_that_comes_back_does_not_open_its_window_twice() {
        let windows = [cover(93 * DAY, 101 * DAY, "done")];
        let request = SyncRequest::default();
        assert_eq!(window_to_open(strava(), &request, at(101 * DAY - 5), at(102 * DAY), true, false, &windows), None);
        assert!(window_to_open(strava(), &request, at(101 * DAY - 5), at(102 * DAY), false, true, &windows).is_some());
    }

    #[test]
    fn what_nobody_has_opened_is_unread() {
        let none: [WindowRow; 0] = [];
        assert_eq!(unread(strava(), &none, BEGINNING_MS), []);
        let windows = [cover(50 * DAY, 60 * DAY, "done"), cover(70 * DAY, 100 * DAY, "open")];
        assert_eq!(unread(strava(), &windows, 93 * DAY), [(BEGINNING_MS, 50 * DAY), (60 * DAY, 70 * DAY)]);
        assert_eq!(unread(strava(), &[cover(BEGINNING_MS, 100 * DAY, "open")], 93 * DAY), []);
    }

    #[test]
    fn a_written_since_reads_again_up_to_the_time_of_the_request() {
        let request = SyncRequest { since_ms: Some(50 * DAY), ..SyncRequest::default() };
        let windows = [cover(BEGINNING_MS, 100 * DAY, "done")];
        let open = window_to_open(strava(), &request, at(100 * DAY + 5), at(105 * DAY), true, false, &windows).unwrap();
        assert_eq!((open.purpose, open.lo, open.hi), (Purpose::Reread, 50 * DAY, 100 * DAY + 1000));
    }
}
