use chrono::{DateTime, Duration, FixedOffset, NaiveDate, NaiveDateTime, Utc};
use serde::{Deserialize, Serialize};

use super::units::{
    BeatsPerMinute, Cadence, Celsius, Degrees, Kilocalories, Kilojoules, Metres, MetresPerSecond, Seconds, Watts,
};
use super::{PartName, SampleSet};

/// What sort of thing a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A run, ride, swim …: has a row in `workouts`.
    Workout,
    /// The person's own profile at the provider; one per connection.
    Athlete,
    /// A shoe, a bike.
    Gear,
}

impl Kind {
    /// The word in the database and in answers.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Workout => "workout",
            Self::Athlete => "athlete",
            Self::Gear => "gear",
        }
    }

    /// The reverse of [`Kind::as_str`].
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Workout, Self::Athlete, Self::Gear].into_iter().find(|k| k.as_str() == text)
    }
}

/// What measured or wrote a record.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Source {
    /// The device model as the provider names it.
    pub device: Option<String>,
    /// The application that wrote the record, where the provider tells it.
    pub writer: Option<String>,
    /// Firmware or application version; a change makes no new source.
    pub software: Option<String>,
}

/// One thing in the world, in our terms. A pure function of its parts.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// What it is.
    pub kind: Kind,
    /// The provider's id, as text.
    pub external_id: String,
    /// What measured it.
    pub source: Source,
    /// The provider's own type in kebab case (`run`, `virtual-ride`); for kinds without types the kind's name.
    pub provider_type: String,
    /// The person's title for it.
    pub title: Option<String>,
    /// When it began.
    pub start_at: DateTime<Utc>,
    /// When it ended, where that is known.
    pub end_at: Option<DateTime<Utc>>,
    /// Offset of local time from UTC at the start, where the provider tells it.
    pub utc_offset: Option<FixedOffset>,
    /// IANA zone, where the provider tells it.
    pub zone: Option<String>,
    /// The local calendar day of the start. Without an offset of its own, the UTC day.
    pub local_day: NaiveDate,
    /// When the provider says that it was last changed.
    pub updated_at: Option<DateTime<Utc>>,
    /// The columns of its kind.
    pub details: Details,
}

impl Record {
    /// Wall-clock time at the start, where the offset is known.
    #[must_use]
    pub fn local_start(&self) -> Option<NaiveDateTime> {
        self.utc_offset.map(|offset| self.start_at.naive_utc() + Duration::seconds(i64::from(offset.local_minus_utc())))
    }
}

/// The columns that only one kind has.
#[derive(Clone, Debug, PartialEq)]
pub enum Details {
    /// A workout.
    Workout(Box<Workout>),
    /// Kinds whose content stays in their parts (athlete, gear).
    None,
}

/// The measured values of a workout. `None` means that the provider did not tell.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Workout {
    /// The unified type, one of `contract` workout types (`running`, `other`, …).
    pub workout_type: &'static str,
    /// From start to end, pauses included.
    pub elapsed: Option<Seconds>,
    /// Time in motion.
    pub moving: Option<Seconds>,
    /// Distance covered.
    pub distance: Option<Metres>,
    /// Sum of all climbs.
    pub ascent: Option<Metres>,
    /// Highest point.
    pub elevation_high: Option<Metres>,
    /// Lowest point; below sea level is negative.
    pub elevation_low: Option<Metres>,
    /// Mean speed.
    pub average_speed: Option<MetresPerSecond>,
    /// Highest speed.
    pub max_speed: Option<MetresPerSecond>,
    /// Mean heart rate.
    pub average_heart_rate: Option<BeatsPerMinute>,
    /// Highest heart rate.
    pub max_heart_rate: Option<BeatsPerMinute>,
    /// Mean cadence: steps per minute on foot, else revolutions per minute.
    pub average_cadence: Option<Cadence>,
    /// Mean power.
    pub average_power: Option<Watts>,
    /// Highest power.
    pub max_power: Option<Watts>,
    /// Power weighted for its changes, as the provider computes it.
    pub weighted_power: Option<Watts>,
    /// Whether a power meter measured it (`false`: the provider's estimate).
    pub power_measured: Option<bool>,
    /// Mechanical work.
    pub work: Option<Kilojoules>,
    /// Energy burned.
    pub energy: Option<Kilocalories>,
    /// Whether `energy` was derived by us from the work done.
    pub energy_estimated: bool,
    /// Mean air temperature.
    pub average_temperature: Option<Celsius>,
    /// Where it began.
    pub start_latitude: Option<Degrees>,
    /// Where it began.
    pub start_longitude: Option<Degrees>,
    /// The provider's id of the gear used.
    pub gear_id: Option<String>,
    /// Typed in by hand, not measured.
    pub manual: Option<bool>,
    /// Laps in their order.
    pub laps: Vec<Lap>,
    /// Time in heart rate zones.
    pub heart_rate_zones: Vec<ZoneTime>,
    /// Time in power zones.
    pub power_zones: Vec<ZoneTime>,
    /// Time in pace zones (bounds in m/s).
    pub pace_zones: Vec<ZoneTime>,
}

/// One lap. SI units: seconds, metres, metres per second, beats per minute, watts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Lap {
    /// From 1.
    pub index: i64,
    /// When it began.
    pub start_at: Option<DateTime<Utc>>,
    /// Seconds, pauses included.
    pub elapsed_s: Option<f64>,
    /// Seconds in motion.
    pub moving_s: Option<f64>,
    /// Metres.
    pub distance_m: Option<f64>,
    /// Metres climbed.
    pub ascent_m: Option<f64>,
    /// Metres per second.
    pub average_speed_m_per_s: Option<f64>,
    /// Beats per minute.
    pub average_heart_rate_bpm: Option<f64>,
    /// Beats per minute.
    pub max_heart_rate_bpm: Option<f64>,
    /// Watts.
    pub average_power_w: Option<f64>,
}

/// Time spent in one zone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ZoneTime {
    /// From 1.
    pub zone: i64,
    /// Lower bound, in the unit of the zone's sort.
    pub min: f64,
    /// Upper bound; `None` is open.
    pub max: Option<f64>,
    /// Seconds.
    pub seconds: f64,
}

/// What the normaliser makes of all parts of one record.
#[derive(Clone, Debug, PartialEq)]
pub struct Normalized {
    /// The record.
    pub record: Record,
    /// Its samples, one set per series; possibly unsorted, duplicates allowed (the last one wins).
    pub samples: Vec<SampleSet>,
    /// Further answers that exist for it (or for what it names) and are worth a call.
    pub wants: Vec<Wanted>,
    /// A digest of what the big parts (streams) depend on: when it changes, they are asked for again.
    pub shape: i64,
    /// Not final yet: kept out of files until it is settled.
    pub provisional: bool,
    /// Values that were dropped because they are not numbers (NaN, infinite) or out of any range.
    pub dropped: u64,
}

/// A further answer worth a call.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Wanted {
    /// Kind of the record it belongs to.
    pub kind: Kind,
    /// The provider's id of the record it belongs to.
    pub external_id: String,
    /// Which answer.
    pub part: PartName,
}
