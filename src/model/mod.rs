//! Plain types that every room speaks: ids, providers, records, samples, parts, windows, runs, quotas, units.
//!
//! May name nothing else of this crate, and does no IO. What must always hold: a value of these types is
//! valid as soon as it exists (units are finite, chunks are sorted, bounds are ordered).

mod chunk;
mod event;
mod ids;
mod job;
mod part;
pub mod quota;
mod record;
mod report;
mod request;
mod run;
mod schedule;
pub mod series;
pub mod units;
mod window;

pub use chunk::{Chunk, MAX_CHUNK_SAMPLES, SampleSet, chunks};
pub use event::{Step, SyncStatus};
pub use ids::{AccountId, ConnectionId, DeliveryId, PartId, RecordId, RunId, UserId, WindowId};
pub use job::Job;
pub use part::{PartName, PartState};
pub use record::{Details, Kind, Lap, Normalized, Record, Source, Wanted, Workout, ZoneTime};
pub use report::{PartReport, Progress, Rebuilt, RunReport, StreamReport};
pub use request::{DataType, NamedItem, SyncRequest};
pub use run::{Class, RunSource, RunState};
pub use schedule::Schedule;
pub use series::SeriesType;
pub use window::{BEGINNING_MS, Purpose, Window, WindowState};

use serde::Serialize;

/// The name of a provider in paths, tables, settings and labels: lower case ASCII, for example `strava`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct ProviderName(pub &'static str);

impl std::fmt::Display for ProviderName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

/// One kind of data of a provider that can be listed, for example `activities`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct StreamName(pub &'static str);

impl std::fmt::Display for StreamName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}
