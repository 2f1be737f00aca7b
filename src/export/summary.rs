use chrono::{DateTime, NaiveDate, Utc};
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use super::entity::{Iso, pretty};
use crate::model::{BEGINNING_MS, WindowState};

/// What `summary.json` says, filled from one grouped query.
#[derive(Clone, Debug)]
pub struct Summary<'a> {
    /// Collection and number of its records. The first is the one that distance, dates and types are about.
    pub totals: &'a [(&'a str, u64)],
    /// Metres, where the first collection has distances.
    pub distance_m: Option<f64>,
    /// First and last local day of the first collection; `None` while it is empty.
    pub dates: Option<(NaiveDate, NaiveDate)>,
    /// Records of the first collection by the provider's type, in any order.
    pub by_type: Vec<(String, u64)>,
    /// When the sync that it reflects stored its last page.
    pub last_sync: DateTime<Utc>,
}

/// A `cover` window of a stream: lower bound (inside) and upper bound (outside) in milliseconds, and where it stands.
pub type CoverWindow = (i64, i64, WindowState);

/// What `last_sync.json` says.
#[derive(Clone, Debug)]
pub struct LastSync<'a> {
    /// When the sync stored its last page.
    pub synced_at: DateTime<Utc>,
    /// Every stream that has an axis, with its windows. A stream without windows counts as not begun; streams that are
    /// read whole every time are left out.
    pub streams: &'a [(&'a str, &'a [CoverWindow])],
}

/// The bytes of `summary.json`.
///
/// # Errors
/// None in practice: every value can be written as JSON.
pub fn render_summary(summary: &Summary<'_>) -> Result<Vec<u8>, serde_json::Error> {
    pretty(summary, 1024)
}

/// The bytes of `last_sync.json`. Its `timestamp` is the point up to which every stream is complete (Unix seconds; 0:
/// some stream has not been read from its beginning).
///
/// # Errors
/// None in practice: every value can be written as JSON.
pub fn render_last_sync(last: &LastSync<'_>) -> Result<Vec<u8>, serde_json::Error> {
    pretty(last, 1024)
}

/// The point (milliseconds) up to which done windows cover a stream from its beginning without a gap.
#[must_use]
pub fn complete_until(windows: &[CoverWindow]) -> Option<i64> {
    let mut done: Vec<_> = windows.iter().filter(|(_, _, state)| *state == WindowState::Done).collect();
    done.sort_unstable_by_key(|(lo, _, _)| *lo);
    let reached = done
        .into_iter()
        .fold(BEGINNING_MS, |reached, (lo, hi, _)| if *lo <= reached { reached.max(*hi) } else { reached });
    (reached > BEGINNING_MS).then_some(reached)
}

impl Serialize for Summary<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        let mut totals = self.totals.iter();
        if let Some((collection, total)) = totals.next() {
            map.serialize_entry(&format!("total_{collection}"), total)?;
        }
        if let Some(metres) = self.distance_m {
            map.serialize_entry("total_distance_km", &((metres / 100.0).round() / 10.0))?;
        }
        if let Some((first, last)) = self.dates {
            #[derive(Serialize)]
            struct Range {
                first: NaiveDate,
                last: NaiveDate,
            }
            map.serialize_entry("date_range", &Range { first, last })?;
        }
        let mut types: Vec<_> = self.by_type.iter().map(|(name, count)| (name, count)).collect();
        types.sort_unstable_by(|(name, count), (other, more)| more.cmp(count).then(name.cmp(other)));
        map.serialize_entry("by_type", &Ordered(types))?;
        map.serialize_entry("last_sync", &Iso(self.last_sync))?;
        for (collection, total) in totals {
            map.serialize_entry(&format!("total_{collection}"), total)?;
        }
        map.end()
    }
}

impl Serialize for LastSync<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let timestamp =
            self.streams.iter().map(|(_, windows)| complete_until(windows).unwrap_or(0).div_euclid(1000)).min();
        let streams = self.streams.iter().map(|(name, windows)| (name, Coverage(windows))).collect();
        let mut map = serializer.serialize_map(Some(3))?;
        // Without any such stream everything was read whole just now.
        map.serialize_entry("timestamp", &timestamp.unwrap_or_else(|| self.synced_at.timestamp()))?;
        map.serialize_entry("synced_at", &Iso(self.synced_at))?;
        map.serialize_entry("streams", &Ordered(streams))?;
        map.end()
    }
}

/// A map in the order given.
struct Ordered<K, V>(Vec<(K, V)>);

impl<K: Serialize, V: Serialize> Serialize for Ordered<K, V> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(key, value)| (key, value)))
    }
}

struct Coverage<'a>(&'a [CoverWindow]);

impl Serialize for Coverage<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Range {
            /// `null`: the beginning.
            from: Option<Iso>,
            to: Option<Iso>,
            state: &'static str,
        }
        let mut windows = self.0.to_vec();
        windows.sort_unstable_by_key(|(lo, hi, _)| (*lo, *hi));
        let at = |ms: i64| DateTime::from_timestamp_millis(ms).map(Iso);
        let windows: Vec<_> = windows
            .into_iter()
            .map(|(lo, hi, state)| Range {
                from: if lo > BEGINNING_MS { at(lo) } else { None },
                to: at(hi),
                state: state.as_str(),
            })
            .collect();
        let mut map = serializer.serialize_map(Some(1))?;
        map.serialize_entry("windows", &windows)?;
        map.end()
    }
}
