//! Strava's JSON as they send it, as far as we read it. Every field may be absent or null, whole numbers and
//! decimals alternate for one field, codes are open sets, and fields that we do not name are ignored.

use std::fmt;

use chrono::{DateTime, NaiveDateTime, Utc};
use serde::de::{self, Deserializer, IgnoredAny, SeqAccess, Visitor};
use serde::Deserialize;

/// The integers below this are exact in a double.
const EXACT: f64 = 9_007_199_254_740_992.0;

/// A number that may come as `0`, `0.0` or `"0"`. Not finite where the text says so (`"NaN"`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Number(pub(super) f64);

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Numbers;
        impl Visitor<'_> for Numbers {
            type Value = Number;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number")
            }
            fn visit_i64<E>(self, value: i64) -> Result<Number, E> {
                Ok(Number(value as f64))
            }
            fn visit_u64<E>(self, value: u64) -> Result<Number, E> {
                Ok(Number(value as f64))
            }
            fn visit_f64<E>(self, value: f64) -> Result<Number, E> {
                Ok(Number(value))
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<Number, E> {
                value.trim().parse().map(Number).map_err(|_| E::custom("no number"))
            }
        }
        deserializer.deserialize_any(Numbers)
    }
}

/// An id as text; it may come as a whole number, as text, or as a decimal without a fraction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Id(pub(super) String);

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Ids;
        impl Visitor<'_> for Ids {
            type Value = Id;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an id")
            }
            fn visit_i64<E>(self, value: i64) -> Result<Id, E> {
                Ok(Id(value.to_string()))
            }
            fn visit_u64<E>(self, value: u64) -> Result<Id, E> {
                Ok(Id(value.to_string()))
            }
            fn visit_f64<E: de::Error>(self, value: f64) -> Result<Id, E> {
                if value.fract() == 0.0 && value.abs() < EXACT {
                    Ok(Id(format!("{value:.0}")))
                } else {
                    Err(E::custom("no id"))
                }
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<Id, E> {
                let value = value.trim();
                if value.is_empty() { Err(E::custom("no id")) } else { Ok(Id(value.to_owned())) }
            }
        }
        deserializer.deserialize_any(Ids)
    }
}

/// `[latitude, longitude]`; `[]` and `[null, null]` are no place.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct LatLng(pub(super) Option<(f64, f64)>);

impl<'de> Deserialize<'de> for LatLng {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = LatLng;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a pair of degrees")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<LatLng, A::Error> {
                let latitude: Option<Number> = seq.next_element()?.flatten();
                let longitude: Option<Number> = seq.next_element()?.flatten();
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(LatLng(latitude.zip(longitude).map(|(latitude, longitude)| (latitude.0, longitude.0))))
            }
        }
        deserializer.deserialize_seq(Pairs)
    }
}

/// What the listing reads of a row; the rest is the normaliser's.
#[derive(Debug, Deserialize)]
pub(super) struct Row {
    pub(super) id: Option<Id>,
    pub(super) start_date: Option<String>,
}

macro_rules! activity {
    ($($(#[$doc:meta])* $field:ident: $type:ty),* $(,)?) => {
        /// `SummaryActivity` and `DetailedActivity`: the second is the first with more fields.
        #[derive(Debug, Default, Deserialize)]
        #[serde(default)]
        pub(super) struct Activity {
            $($(#[$doc])* pub(super) $field: Option<$type>,)*
        }

        impl Activity {
            /// This one; what it lacks comes from the other.
            pub(super) fn or(self, other: Self) -> Self {
                Self { $($field: self.$field.or(other.$field),)* }
            }
        }
    };
}

activity! {
    name: String,
    /// Absent in old records.
    sport_type: String,
    /// Deprecated; coarser than `sport_type`.
    r#type: String,
    /// UTC. Midnight plus one second where the person hides the start.
    start_date: String,
    /// Wall-clock time with a misleading `Z`.
    start_date_local: String,
    /// `(GMT+01:00) Europe/Zurich`; the offset in it is the standard one even in summer.
    timezone: String,
    /// Seconds, of that moment.
    utc_offset: Number,
    elapsed_time: Number,
    moving_time: Number,
    distance: Number,
    total_elevation_gain: Number,
    elev_high: Number,
    elev_low: Number,
    average_speed: Number,
    max_speed: Number,
    average_heartrate: Number,
    max_heartrate: Number,
    /// On foot: of one leg.
    average_cadence: Number,
    average_watts: Number,
    max_watts: Number,
    weighted_average_watts: Number,
    device_watts: bool,
    /// Mechanical work, not energy burned.
    kilojoules: Number,
    /// Kilocalories; 0 when unknown. Detail only.
    calories: Number,
    average_temp: Number,
    start_latlng: LatLng,
    gear_id: Id,
    manual: bool,
    /// Null for what was typed in.
    upload_id: Id,
    device_name: String,
    /// Detail only.
    laps: Vec<Lap>,
}

/// One lap of a detail.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Lap {
    pub(super) lap_index: Option<Number>,
    pub(super) start_date: Option<String>,
    pub(super) elapsed_time: Option<Number>,
    pub(super) moving_time: Option<Number>,
    pub(super) distance: Option<Number>,
    pub(super) total_elevation_gain: Option<Number>,
    pub(super) average_speed: Option<Number>,
    pub(super) average_heartrate: Option<Number>,
    pub(super) max_heartrate: Option<Number>,
    pub(super) average_watts: Option<Number>,
}

/// The streams of an activity, by key. `distance`, `moving` and `grade_smooth` stay in the stored answer only.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Streams {
    /// Seconds since the start.
    pub(super) time: Option<Stream<Number>>,
    pub(super) heartrate: Option<Stream<Number>>,
    pub(super) velocity_smooth: Option<Stream<Number>>,
    pub(super) cadence: Option<Stream<Number>>,
    pub(super) watts: Option<Stream<Number>>,
    pub(super) altitude: Option<Stream<Number>>,
    pub(super) temp: Option<Stream<Number>>,
    pub(super) latlng: Option<Stream<LatLng>>,
}

/// One stream.
#[derive(Debug, Deserialize)]
pub(super) struct Stream<T> {
    pub(super) data: Option<Vec<Option<T>>>,
}

/// Time in the zones of one sort.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Zones {
    /// `heartrate`, `power`, `pace`, and what may come.
    pub(super) r#type: Option<String>,
    pub(super) distribution_buckets: Option<Vec<Bucket>>,
}

/// One zone.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Bucket {
    pub(super) min: Option<Number>,
    /// -1 is open.
    pub(super) max: Option<Number>,
    /// Seconds.
    pub(super) time: Option<Number>,
}

/// The person.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Athlete {
    pub(super) id: Option<Id>,
    pub(super) username: Option<String>,
    pub(super) firstname: Option<String>,
    pub(super) lastname: Option<String>,
    pub(super) created_at: Option<String>,
    pub(super) updated_at: Option<String>,
    pub(super) bikes: Option<Vec<Gear>>,
    pub(super) shoes: Option<Vec<Gear>>,
}

/// A bike or a shoe.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Gear {
    pub(super) id: Option<Id>,
    pub(super) name: Option<String>,
}

/// An instant as they write it, in whole milliseconds. `None` when it cannot be read.
pub(super) fn instant(text: &str) -> Option<DateTime<Utc>> {
    let text = text.trim();
    let at = match DateTime::parse_from_rfc3339(text) {
        Ok(at) => at.to_utc(),
        Err(_) => NaiveDateTime::parse_from_str(text, "%Y-%m-%dT%H:%M:%S%.f").ok()?.and_utc(),
    };
    DateTime::from_timestamp_millis(at.timestamp_millis())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_comes_in_three_ways() {
        for text in ["0", "0.0", "\"0\"", "-0"] {
            assert_eq!(serde_json::from_str::<Number>(text).unwrap().0, 0.0, "{text}");
        }
        assert!(serde_json::from_str::<Number>("\"NaN\"").unwrap().0.is_nan());
        assert!(serde_json::from_str::<Number>("\"fast\"").is_err());
        assert!(serde_json::from_str::<Number>("true").is_err());
    }

    #[test]
    fn ids_keep_every_digit() {
        for (text, id) in [
            ("18234567890", "18234567890"),
            ("3412345678901234567", "3412345678901234567"),
            ("18234567890.0", "18234567890"),
            ("\" b9012345 \"", "b9012345"),
        ] {
            assert_eq!(serde_json::from_str::<Id>(text).unwrap().0, id, "{text}");
        }
        for text in ["\"\"", "1.5", "1e300", "{}"] {
            assert!(serde_json::from_str::<Id>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_place_may_be_missing_in_four_ways() {
        for text in ["[]", "[null,null]", "[46.9]", "[46.9,null,1]"] {
            assert_eq!(serde_json::from_str::<LatLng>(text).unwrap().0, None, "{text}");
        }
        assert_eq!(serde_json::from_str::<Option<LatLng>>("null").unwrap(), None);
        assert_eq!(serde_json::from_str::<LatLng>("[-11, 166.9]").unwrap().0, Some((-11.0, 166.9)));
    }

    #[test]
    fn instants_are_read_with_and_without_zone() {
        let at = instant("2026-05-03T05:12:44Z").unwrap();
        assert_eq!(at.timestamp(), 1_777_785_164);
        assert_eq!(instant("2026-05-03T05:12:44"), Some(at));
        assert_eq!(instant("2026-05-03T07:12:44+02:00"), Some(at));
        assert_eq!(instant("yesterday"), None);
    }
}
