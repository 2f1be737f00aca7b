//! The `calculated` values of a record: pace, speed, climb. Pure functions of the record alone.
//!
//! May name model. What must always hold: no clock and no IO inside, so the same record gives the same values on any
//! machine; a value that cannot be computed is absent, never 0, NaN or infinite; a change of any formula raises
//! [`FORMULA_VERSION`].

use serde_json::{Map, Number, Value};

use crate::model::Workout;

/// Version of the formulas, written beside the values.
pub const FORMULA_VERSION: i64 = 1;

const METRES_PER_KM: f64 = 1000.0;
const METRES_PER_MILE: f64 = 1609.344;

/// What follows from a workout's own values, sorted by name. Numbers are rounded to four decimals. A value is absent
/// when what it needs is missing or zero. Times are time in motion, elapsed time where that is not told.
#[must_use]
pub fn workout(workout: &Workout) -> Map<String, Value> {
    let distance_m = workout.distance.map(|distance| distance.get()).filter(|metres| *metres > 0.0);
    let seconds = workout.moving.or(workout.elapsed).map(|time| time.get());
    let mut values = Map::new();
    values.insert("formula_version".to_owned(), FORMULA_VERSION.into());
    let mut put = |name: &str, value: Option<f64>| {
        if let Some(number) = value.and_then(|value| Number::from_f64(round(value))) {
            values.insert(name.to_owned(), number.into());
        }
    };

    put("distance_km", distance_m.map(|metres| metres / METRES_PER_KM));
    let climb = workout.ascent.map(|ascent| ascent.get()).filter(|metres| *metres > 0.0);
    put("ascent_m_per_km", climb.zip(distance_m).map(|(climb, metres)| climb / (metres / METRES_PER_KM)));
    let times = workout.moving.zip(workout.elapsed).map(|(moving, elapsed)| (moving.get(), elapsed.get()));
    // More motion than time is a mistake at the source: no ratio then.
    let times = times.filter(|(moving, elapsed)| *moving > 0.0 && moving <= elapsed);
    put("moving_ratio", times.map(|(moving, elapsed)| moving / elapsed));

    let Some((metres, seconds)) = distance_m.zip(seconds) else { return values };
    let speed = speed_m_per_s(metres, seconds);
    put("speed_m_per_s", speed);
    put("speed_km_per_h", speed.map(|speed| speed * 3.6));
    let swims = workout.workout_type.ends_with("swimming");
    let paces = [("km", METRES_PER_KM), ("mile", METRES_PER_MILE), ("100m", 100.0)];
    let paces = &paces[..if swims { 3 } else { 2 }];
    for (unit, length) in paces {
        put(&format!("pace_s_per_{unit}"), pace_s(metres, seconds, *length));
    }
    for (unit, length) in paces {
        if let Some(pace) = pace_s(metres, seconds, *length) {
            values.insert(format!("pace_per_{unit}"), minutes_text(pace).into());
        }
    }
    values
}

/// Metres per second; 0 for no distance. `None` without time.
#[must_use]
pub fn speed_m_per_s(metres: f64, seconds: f64) -> Option<f64> {
    (seconds > 0.0 && metres >= 0.0).then(|| metres / seconds).filter(|speed| speed.is_finite())
}

/// Seconds for each `length` metres. `None` without distance or time.
#[must_use]
pub fn pace_s(metres: f64, seconds: f64, length: f64) -> Option<f64> {
    (metres > 0.0 && seconds > 0.0).then(|| seconds / (metres / length)).filter(|pace| pace.is_finite())
}

/// Seconds as `m:ss`: rounded to whole seconds, half up, before they are split, so that `4:60` cannot appear.
#[must_use]
pub fn minutes_text(seconds: f64) -> String {
    let whole = (seconds + 0.5).floor() as u64;
    format!("{}:{:02}", whole / 60, whole % 60)
}

/// Four decimals, half to even.
fn round(value: f64) -> f64 {
    (value * 1e4).round_ties_even() / 1e4
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::units::{Metres, Seconds};

    fn of(metres: Option<f64>, moving: Option<f64>, elapsed: Option<f64>) -> Workout {
        Workout {
            distance: metres.and_then(Metres::new),
            moving: moving.and_then(Seconds::new),
            elapsed: elapsed.and_then(Seconds::new),
            ..Workout::default()
        }
    }

    #[test]
    fn paces_and_speeds() {
        for (metres, seconds, per_km, text, per_mile, mile_text, speed) in [
            (10_000.0, 2700.0, 270.0, "4:30", 434.5229, "7:15", 3.7037),
            (5012.3, 1499.0, 299.0643, "4:59", 481.2973, "8:01", 3.3438),
            (42_195.0, 12_599.0, 298.5899, "4:59", 480.5338, "8:01", 3.3491),
            (21_097.5, 5399.6, 255.9355, "4:16", 411.8883, "6:52", 3.9072),
        ] {
            let values = workout(&of(Some(metres), Some(seconds), None));
            assert_eq!(values["pace_s_per_km"], per_km, "{metres}");
            assert_eq!(values["pace_per_km"], text, "{metres}");
            assert_eq!(values["pace_s_per_mile"], per_mile, "{metres}");
            assert_eq!(values["pace_per_mile"], mile_text, "{metres}");
            assert_eq!(values["speed_m_per_s"], speed, "{metres}");
        }
        let swim = Workout { workout_type: "pool_swimming", ..of(Some(1500.0), Some(1620.0), None) };
        let values = workout(&swim);
        assert_eq!((&values["pace_s_per_100m"], &values["pace_per_100m"]), (&108.0.into(), &"1:48".into()));
        assert_eq!((pace_s(0.0, 600.0, METRES_PER_KM), speed_m_per_s(0.0, 600.0)), (None, Some(0.0)));
    }

    #[test]
    fn seconds_are_rounded_before_they_are_split() {
        assert_eq!(minutes_text(299.5), "5:00");
        assert_eq!(minutes_text(299.4999), "4:59");
        assert_eq!(minutes_text(0.0), "0:00");
        assert_eq!(minutes_text(3661.0), "61:01");
    }

    #[test]
    fn a_run_in_full() {
        let run = Workout { ascent: Metres::new(96.4), ..of(Some(8214.6), Some(2581.0), Some(2713.0)) };
        // 2581 / 8.2146 = 314.19667; 96.4 / 8.2146 = 11.73520; 2581 / 2713 = 0.95135; 8214.6 / 2581 = 3.18272.
        let expected = serde_json::json!({
            "ascent_m_per_km": 11.7352, "distance_km": 8.2146, "formula_version": 1, "moving_ratio": 0.9513,
            "pace_per_km": "5:14", "pace_per_mile": "8:26", "pace_s_per_km": 314.1967, "pace_s_per_mile": 505.6505,
            "speed_km_per_h": 11.4578, "speed_m_per_s": 3.1827
        });
        assert_eq!(Value::Object(workout(&run)), expected);
    }

    #[test]
    fn what_cannot_be_computed_is_absent() {
        for (metres, moving, elapsed, names) in [
            (None, None, None, vec!["formula_version"]),
            (Some(0.0), Some(2700.0), Some(2700.0), vec!["formula_version", "moving_ratio"]),
            // No motion told as 0 is an answer, not a missing one: elapsed time does not stand in.
            (Some(5010.0), Some(0.0), Some(1800.0), vec!["distance_km", "formula_version"]),
            (Some(-5.0), Some(10.0), Some(5.0), vec!["formula_version"]),
        ] {
            let values = workout(&of(metres, moving, elapsed));
            assert_eq!(values.keys().collect::<Vec<_>>(), names);
        }
        let elapsed_only = workout(&of(Some(1000.0), None, Some(300.0)));
        assert_eq!(elapsed_only["pace_per_km"], "5:00");
    }

    #[test]
    fn no_value_is_ever_not_a_number() {
        let extremes = [f64::MIN_POSITIVE, 1e-300, 1.0, 1e300, f64::MAX];
        for metres in extremes {
            for seconds in extremes {
                let values = workout(&of(Some(metres), Some(seconds), Some(seconds)));
                assert!(values.values().all(|value| !value.is_null()), "{metres} {seconds}");
            }
        }
    }
}
