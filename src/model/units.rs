//! Quantities with their unit in the type. Only finite numbers exist; conversions are written once, here.

use std::time::Duration;

use serde::Serialize;

macro_rules! quantity {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, PartialOrd, Serialize)]
        #[serde(transparent)]
        pub struct $name(f64);

        impl $name {
            /// `None` when the number is not finite.
            #[must_use]
            pub fn new(value: f64) -> Option<Self> {
                value.is_finite().then_some(Self(value))
            }

            /// The number in this unit.
            #[must_use]
            pub fn get(self) -> f64 {
                self.0
            }
        }
    )*};
}

quantity!(
    /// Metres.
    Metres,
    /// Seconds.
    Seconds,
    /// Metres per second.
    MetresPerSecond,
    /// Beats per minute.
    BeatsPerMinute,
    /// Per minute: steps on foot, else revolutions.
    Cadence,
    /// Watts.
    Watts,
    /// Kilojoules of mechanical work.
    Kilojoules,
    /// Kilocalories burned.
    Kilocalories,
    /// Degrees Celsius.
    Celsius,
    /// Degrees of latitude or longitude.
    Degrees,
    /// Kilograms.
    Kilograms,
);

/// Share of burned energy that becomes mechanical work on a bike; the usual range is 0.20 to 0.25.
const GROSS_EFFICIENCY: f64 = 0.24;
/// One kilocalorie in kilojoules (thermochemical).
const KILOJOULES_PER_KILOCALORIE: f64 = 4.184;

impl Kilojoules {
    /// The energy a body burns for this much mechanical work: an estimate, about one kilocalorie per kilojoule.
    #[must_use]
    pub fn burned(self) -> Kilocalories {
        Kilocalories(self.0 / KILOJOULES_PER_KILOCALORIE / GROSS_EFFICIENCY)
    }
}

/// Reads `500ms`, `2s`, `10m`, `1h`, `1d`, or plain seconds; at most a year.
#[must_use]
pub fn duration(text: &str) -> Option<Duration> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    let seconds = match unit.trim() {
        "ms" => return Some(Duration::from_millis(number)),
        "" | "s" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return None,
    };
    // More than a year is a slip, and would overflow sums of instants.
    number.checked_mul(seconds).filter(|s| *s <= 366 * 86_400).map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_finite_numbers_exist() {
        assert!(Metres::new(f64::NAN).is_none());
        assert!(Metres::new(f64::INFINITY).is_none());
        assert_eq!(Metres::new(-3.5).map(Metres::get), Some(-3.5));
    }

    #[test]
    fn work_becomes_about_as_many_kilocalories() {
        let burned = Kilojoules(725.1).burned().get();
        assert!((burned - 722.1).abs() < 0.1, "{burned}");
    }
}
