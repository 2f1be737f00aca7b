//! When a connection is read without anybody asking. Pure: time and chance are given.

use std::fmt;
use std::str::FromStr;

use chrono::{DateTime, Duration, Utc};
use chrono_tz::Tz;
use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};

use super::units::duration;

/// Shorter intervals would only spend the quota: providers need minutes to have something new.
const LEAST_S: i64 = 60;
/// Longer ones lose data: some providers keep what nobody fetched for four weeks.
const MOST_S: i64 = 28 * 86_400;
/// An interval is longer or shorter by up to this share, so that connections made together drift apart.
const JITTER: f64 = 0.1;

/// How often a connection is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Schedule {
    /// Never, unless somebody asks.
    Off,
    /// Again so many seconds after the last time.
    Every(i64),
    /// By a cron expression of five fields, in the user's zone.
    Cron(String),
}

impl Schedule {
    /// The first due time after `after`; `None`: there is none. `chance` lies in [-1, 1] and moves intervals, but not
    /// cron expressions: who names an hour means it. Where clocks change, a fixed time that does not exist is made up
    /// for right after the gap, and one that comes twice counts once.
    #[must_use]
    pub fn next(&self, after: DateTime<Utc>, zone: Tz, chance: f64) -> Option<DateTime<Utc>> {
        match self {
            Self::Off => None,
            Self::Every(seconds) => {
                let ms = *seconds as f64 * 1000.0 * (1.0 + JITTER * chance.clamp(-1.0, 1.0));
                after.checked_add_signed(Duration::milliseconds(ms as i64))
            }
            Self::Cron(text) => {
                let next = parse_cron(text).ok()?.find_next_occurrence(&after.with_timezone(&zone), false);
                next.ok().map(|next| next.to_utc()).filter(|next| *next > after)
            }
        }
    }
}

fn parse_cron(text: &str) -> Result<Cron, String> {
    let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
    parser.parse(text).map_err(|error| format!("`{text}` is no cron expression: {error}"))
}

impl FromStr for Schedule {
    type Err = String;

    /// Reads `6h`, `30m`, `1d`, plain seconds, `0 6 * * *` (cron: minute, hour, day, month, weekday), or `off`.
    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text == "off" {
            return Ok(Self::Off);
        }
        if text.split_whitespace().nth(1).is_some() {
            parse_cron(text)?;
            let cron = Self::Cron(text.to_owned());
            // Any leap year will do: the 30th of February comes in none.
            let never = cron.next(DateTime::UNIX_EPOCH, Tz::UTC, 0.0).is_none();
            return if never { Err(format!("`{text}` never comes")) } else { Ok(cron) };
        }
        let seconds = duration(text).and_then(|time| i64::try_from(time.as_secs()).ok());
        match seconds {
            Some(seconds) if (LEAST_S..=MOST_S).contains(&seconds) => Ok(Self::Every(seconds)),
            Some(_) => Err(format!("`{text}` is too short or too long; an interval has 1m to 28d")),
            None => Err(format!("`{text}` is no schedule; write an interval (6h, 30m), five fields of cron, or off")),
        }
    }
}

/// As it is read.
impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::Cron(text) => f.write_str(text),
            Self::Every(seconds) => {
                let units = [(86_400, "d"), (3600, "h"), (60, "m"), (1, "s")];
                let (length, unit) = units.into_iter().find(|(length, _)| seconds % length == 0).unwrap_or((1, "s"));
                write!(f, "{}{unit}", seconds / length)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use chrono::{Datelike, NaiveDateTime, TimeZone, Timelike};
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Schedule {
        text.parse().unwrap()
    }

    fn at(text: &str) -> DateTime<Utc> {
        text.parse().unwrap()
    }

    #[test]
    fn schedules_are_read_and_written_or_refused_in_words() {
        for text in ["6h", "30m", "1d", "28d", "61s", "off", "0 6 * * *", "*/15 8-20 * * MON-FRI"] {
            assert_eq!(parse(text).to_string(), text);
        }
        assert_eq!(parse("21600"), Schedule::Every(21_600));
        for bad in
            ["", "often", "59s", "29d", "-1h", "0 6 * *", "0 0 6 * * *", "61 * * * *", "0 0 30 2 *", "* * * * * *"]
        {
            assert!(bad.parse::<Schedule>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_time_that_is_missing_or_comes_twice_counts_once() {
        let zurich = Tz::Europe__Zurich;
        let times = |text: &str, from: &str, n: usize| {
            let schedule = parse(text);
            let mut now = at(from);
            (0..n)
                .map(|_| {
                    now = schedule.next(now, zurich, 1.0).unwrap();
                    now
                })
                .collect::<Vec<_>>()
        };
        // 2026-03-29: 02:00 to 03:00 do not exist.
        let spring = times("30 2 * * *", "2026-03-28T00:00:00Z", 3);
        assert_eq!(spring, ["2026-03-28T01:30:00Z", "2026-03-29T01:00:00Z", "2026-03-30T00:30:00Z"].map(at));
        // 2026-10-25: 02:00 to 03:00 come twice.
        let autumn = times("30 2 * * *", "2026-10-24T00:00:00Z", 4);
        let expected = ["2026-10-24T00:30:00Z", "2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z", "2026-10-27T01:30:00Z"];
        assert_eq!(autumn, expected.map(at));
        let hourly = times("0 * * * *", "2026-10-24T23:30:00Z", 4);
        let expected = ["2026-10-25T00:00:00Z", "2026-10-25T01:00:00Z", "2026-10-25T02:00:00Z", "2026-10-25T03:00:00Z"];
        assert_eq!(hourly, expected.map(at));
    }

    /// A cron expression of plain parts: minute, hour (none: each), weekday from Monday (none: each).
    #[derive(Clone, Copy, Debug)]
    struct Plain {
        minute: u32,
        hour: Option<u32>,
        weekday: Option<u32>,
    }

    impl Plain {
        fn text(self) -> String {
            let field = |value: Option<u32>| value.map_or("*".to_owned(), |value| value.to_string());
            format!("{} {} * * {}", self.minute, field(self.hour), field(self.weekday.map(|day| (day + 1) % 7)))
        }

        fn is_day(self, local: NaiveDateTime) -> bool {
            self.weekday.is_none_or(|day| local.weekday().num_days_from_monday() == day)
        }

        /// All due times in a range, minute by minute: what the walk has to find.
        fn all(self, zone: Tz, from: DateTime<Utc>, to: DateTime<Utc>) -> Vec<DateTime<Utc>> {
            let mut out = Vec::new();
            let mut now = from;
            let mut last: Option<NaiveDateTime> = None;
            while now <= to {
                let local = now.with_timezone(&zone).naive_local();
                let before = (now - Duration::minutes(1)).with_timezone(&zone).naive_local();
                let matches = |local: NaiveDateTime| {
                    self.is_day(local) && local.minute() == self.minute && self.hour.is_none_or(|h| local.hour() == h)
                };
                let skipped = || {
                    let mut missing = before + Duration::minutes(1);
                    let mut found = false;
                    while missing < local {
                        found |= matches(missing);
                        missing += Duration::minutes(1);
                    }
                    found
                };
                let due = match self.hour {
                    // Each hour that there is, also the one that comes twice.
                    None => matches(local),
                    // Once a day: the first of two, or right after the gap.
                    Some(_) => (matches(local) && last != Some(local)) || (skipped() && self.is_day(local)),
                };
                if due {
                    last = Some(local);
                    out.push(now);
                }
                now += Duration::minutes(1);
            }
            out
        }
    }

    fn plain() -> impl Strategy<Value = Plain> {
        (0..60u32, proptest::option::of(0..24u32), proptest::option::of(0..7u32))
            .prop_map(|(minute, hour, weekday)| Plain { minute, hour, weekday })
    }

    /// Zones with every sort of change, and a day at which each changes.
    fn zone_and_day() -> impl Strategy<Value = (Tz, DateTime<Utc>)> {
        let cases = [
            (Tz::UTC, "2026-03-29T00:00:00Z"),
            (Tz::Europe__Zurich, "2026-03-29T00:00:00Z"),
            (Tz::Europe__Zurich, "2026-10-25T00:00:00Z"),
            (Tz::America__New_York, "2026-03-08T06:00:00Z"),
            (Tz::America__New_York, "2026-11-01T05:00:00Z"),
            (Tz::Australia__Lord_Howe, "2026-04-04T14:00:00Z"),
            (Tz::Australia__Lord_Howe, "2026-10-03T15:00:00Z"),
            (Tz::America__St_Johns, "2026-03-08T05:00:00Z"),
            (Tz::Asia__Katmandu, "2026-06-01T00:00:00Z"),
            (Tz::Africa__Casablanca, "2026-02-15T02:00:00Z"),
            (Tz::America__Santiago, "2026-09-06T04:00:00Z"),
            (Tz::America__Santiago, "2026-04-05T03:00:00Z"),
        ];
        proptest::sample::select(cases.to_vec()).prop_map(|(zone, day)| (zone, at(day)))
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

        #[test]
        fn no_due_time_is_left_out_or_comes_twice(plain in plain(), (zone, day) in zone_and_day(), offset in 0..86_400_000i64) {
            let (from, to) = (day - Duration::milliseconds(offset), day + Duration::days(8));
            let whole = from.with_nanosecond(0).unwrap().with_second(0).unwrap();
            let expected: Vec<_> = plain.all(zone, whole, to).into_iter().filter(|due| *due > from).collect();
            let schedule = parse(&plain.text());
            let mut found = Vec::new();
            let mut now = from;
            while let Some(next) = schedule.next(now, zone, 0.7).filter(|next| *next <= to) {
                prop_assert!(next > now);
                found.push(next);
                now = next;
            }
            prop_assert_eq!(found, expected, "{} in {}", plain.text(), zone);
        }

        #[test]
        fn an_interval_is_off_by_a_tenth_at_most(
            seconds in LEAST_S..=MOST_S, ms in 0..4_000_000_000_000i64, chance in -1.0..=1.0f64,
        ) {
            let after = Utc.timestamp_millis_opt(ms).unwrap();
            let next = Schedule::Every(seconds).next(after, Tz::UTC, chance).unwrap();
            let took = (next - after).num_milliseconds();
            prop_assert!(took >= seconds * 900 - 1 && took <= seconds * 1100, "{took} of {seconds}");
        }

        #[test]
        fn any_expression_is_read_or_refused_and_then_moves_on(text in "[0-9*/,-]{1,6}( [0-9*/,L#-]{1,5}){4}", (zone, day) in zone_and_day()) {
            if let Ok(schedule) = text.parse::<Schedule>() {
                let mut now = day;
                for _ in 0..5 {
                    let Some(next) = schedule.next(now, zone, 0.0) else { break };
                    prop_assert!(next > now, "{text}");
                    now = next;
                }
            }
        }
    }
}
