//! The series types of the mirrored API: `src/model/series-types.csv` is the one list, and the database table
//! `series_types` is filled from it.

use serde::Serialize;

/// One series type: its id in the database, its name and its unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct SeriesType {
    /// The number that stands in `sample_chunks`.
    pub id: i64,
    /// The name on the wire, for example `heart_rate`.
    pub name: &'static str,
    /// The unit on the wire, for example `bpm`.
    pub unit: &'static str,
}

/// The sorts of series, in the order in which they are shown.
pub const CATEGORIES: [&str; 13] = [
    "Heart & Cardiovascular",
    "Blood & Respiratory",
    "Body Composition",
    "Fitness Metrics",
    "Activity - Basic",
    "Activity - Distance",
    "Activity - Walking",
    "Activity - Running",
    "Activity - Swimming",
    "Activity - Generic",
    "Environmental",
    "Provider-Specific",
    "Other",
];

impl SeriesType {
    /// Which sort it is, one of [`CATEGORIES`].
    #[must_use]
    pub fn category(self) -> &'static str {
        let line = TABLE.lines().skip(1).map(|line| line.split(',')).find(|fields| {
            let mut fields = fields.clone();
            fields.nth(1) == Some(self.name)
        });
        line.and_then(|mut fields| fields.nth(3)).unwrap_or("Other")
    }
}

/// Beats per minute.
pub const HEART_RATE: SeriesType = SeriesType { id: 1, name: "heart_rate", unit: "bpm" };
/// Kilograms.
pub const WEIGHT: SeriesType = SeriesType { id: 41, name: "weight", unit: "kg" };
/// Revolutions (on foot: strides of one leg) per minute.
pub const CADENCE: SeriesType = SeriesType { id: 180, name: "cadence", unit: "rpm" };
/// Watts.
pub const POWER: SeriesType = SeriesType { id: 181, name: "power", unit: "watts" };
/// Metres per second.
pub const SPEED: SeriesType = SeriesType { id: 182, name: "speed", unit: "m_per_s" };
/// Metres above sea level.
pub const ELEVATION: SeriesType = SeriesType { id: 209, name: "elevation", unit: "meters" };
/// Degrees north.
pub const LATITUDE: SeriesType = SeriesType { id: 210, name: "latitude", unit: "degrees" };
/// Degrees east.
pub const LONGITUDE: SeriesType = SeriesType { id: 211, name: "longitude", unit: "degrees" };
/// Degrees Celsius.
pub const AIR_TEMPERATURE: SeriesType = SeriesType { id: 212, name: "air_temperature", unit: "celsius" };

/// `id,name,unit,category` of every series type, as text.
pub const TABLE: &str = include_str!("series-types.csv");

/// Every series type, in the order of the list.
pub fn all() -> impl Iterator<Item = SeriesType> {
    TABLE.lines().skip(1).filter_map(|line| {
        let mut fields = line.split(',');
        Some(SeriesType { id: fields.next()?.parse().ok()?, name: fields.next()?, unit: fields.next()? })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_series_has_a_category_and_every_category_a_series() {
        let found: std::collections::BTreeSet<_> = all().map(SeriesType::category).collect();
        assert_eq!(found, CATEGORIES.into_iter().collect());
        let fields = TABLE.lines().all(|line| line.split(',').count() == 4);
        assert!(fields && HEART_RATE.category() == CATEGORIES[0] && LATITUDE.category() != "Other");
    }

    #[test]
    fn the_constants_are_rows_of_the_list() {
        let all: Vec<_> = all().collect();
        for constant in [HEART_RATE, WEIGHT, CADENCE, POWER, SPEED, ELEVATION, LATITUDE, LONGITUDE, AIR_TEMPERATURE] {
            assert!(all.contains(&constant), "{constant:?} differs from the list");
        }
    }
}
