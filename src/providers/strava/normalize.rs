//! Parts of Strava → record and samples. Pure: the same parts give the same record.
//!
//! The summary's values win; a detail only fills what the summary lacks, since the detail may be older than an edit
//! that the list already shows.

use chrono::{DateTime, Duration, FixedOffset, Utc};
use serde::de::DeserializeOwned;
use serde_json::error::Category;
use sha2::{Digest, Sha256};

use super::wire::{self, Activity, Athlete, Gear, LatLng, Number, Stream, Streams, Zones};
use super::{DETAIL, STREAMS, SUMMARY, ZONES};
use crate::model::units::{
    BeatsPerMinute, Cadence, Celsius, Degrees, Kilocalories, Kilojoules, Metres, MetresPerSecond, Seconds, Watts,
};
use crate::model::{
    Details, Kind, Lap, Normalized, PartName, Record, SampleSet, SeriesType, Source, Wanted, Workout, ZoneTime, series,
};
use crate::providers::{NormalizeError, PartBody};

/// No record is longer, no sample farther from its start: a hundred years, in seconds.
const LONGEST_S: f64 = 3.2e9;

/// All stored parts of one record, made into the record and its samples.
pub(super) fn normalize(kind: Kind, external_id: &str, parts: &[PartBody]) -> Result<Normalized, NormalizeError> {
    let parts = Parts { kind, external_id, parts };
    match kind {
        Kind::Workout => workout(&parts),
        Kind::Athlete => athlete(&parts),
        Kind::Gear => gear(&parts),
    }
}

/// The parts of one record.
struct Parts<'a> {
    kind: Kind,
    external_id: &'a str,
    parts: &'a [PartBody],
}

impl Parts<'_> {
    fn error(&self, part: PartName, why: String) -> NormalizeError {
        NormalizeError { kind: self.kind.as_str(), external_id: self.external_id.to_owned(), part, why }
    }

    fn read<T: DeserializeOwned>(&self, part: PartName) -> Result<Option<T>, NormalizeError> {
        let Some(stored) = self.parts.iter().find(|stored| stored.part == part) else { return Ok(None) };
        serde_json::from_slice(&stored.body).map(Some).map_err(|error| {
            // The error's own words quote the content.
            let what = match error.classify() {
                Category::Eof => "it ends too early",
                Category::Data => "a value is of the wrong sort",
                Category::Syntax | Category::Io => "it is no JSON",
            };
            self.error(part, format!("{what} (line {}, column {})", error.line(), error.column()))
        })
    }

    fn summary<T: DeserializeOwned>(&self) -> Result<T, NormalizeError> {
        self.read(SUMMARY)?.ok_or_else(|| self.error(SUMMARY, "it is missing".to_owned()))
    }

    fn want(&self, part: PartName) -> Wanted {
        Wanted { kind: self.kind, external_id: self.external_id.to_owned(), part }
    }
}

/// Takes numbers into units and counts those that do not fit.
#[derive(Default)]
struct Intake {
    dropped: u64,
}

impl Intake {
    fn take<T>(&mut self, number: Option<Number>, unit: fn(f64) -> Option<T>) -> Option<T> {
        let made = unit(number?.0);
        self.dropped += u64::from(made.is_none());
        made
    }

    fn plain(&mut self, number: Option<Number>) -> Option<f64> {
        self.take(number, |value| Some(value).filter(|value| value.is_finite()))
    }

    /// Elapsed and moving time.
    fn duration(&mut self, number: Option<Number>) -> Option<Seconds> {
        self.take(number, |value| Seconds::new(value).filter(|_| (0.0..=LONGEST_S).contains(&value)))
    }
}

fn workout(parts: &Parts<'_>) -> Result<Normalized, NormalizeError> {
    let summary: Activity = parts.summary()?;
    let shape = shape(&summary);
    let activity = match parts.read::<Activity>(DETAIL)? {
        Some(detail) => summary.or(detail),
        None => summary,
    };
    let start_at = activity.start_date.as_deref().and_then(wire::instant);
    let start_at = start_at.ok_or_else(|| parts.error(SUMMARY, "it has no readable start_date".to_owned()))?;

    let mut intake = Intake::default();
    let utc_offset = intake.take(activity.utc_offset, |seconds| {
        FixedOffset::east_opt(Some(seconds).filter(|seconds| seconds.abs() < 86_400.0)?.round() as i32)
    });
    let sport = [&activity.sport_type, &activity.r#type]
        .into_iter()
        .flatten()
        .map(String::as_str)
        .find(|code| !code.trim().is_empty())
        .unwrap_or_default();
    let elapsed = intake.duration(activity.elapsed_time);
    let end_at = elapsed
        .and_then(|elapsed| start_at.checked_add_signed(Duration::milliseconds((elapsed.get() * 1000.0).round() as i64)));

    let wants = workout_wants(parts, &activity);
    let mut workout = measured(&mut intake, &activity, unified(sport));
    workout.elapsed = elapsed;
    for zones in parts.read::<Vec<Zones>>(ZONES)?.unwrap_or_default() {
        let times = zone_times(&mut intake, &zones);
        match zones.r#type.as_deref() {
            Some("heartrate") => workout.heart_rate_zones = times,
            Some("power") => workout.power_zones = times,
            Some("pace") => workout.pace_zones = times,
            _ => {}
        }
    }
    let samples = match parts.read::<Streams>(STREAMS)? {
        Some(streams) => samples(&mut intake, streams, start_at, utc_offset),
        None => Vec::new(),
    };

    // The day as the person saw it. A hidden start has it right in local time only: its UTC is midnight of that same
    // day, which the offset would move to the day before.
    let told_day = activity.start_date_local.as_deref().and_then(wire::instant).map(|local| local.date_naive());
    let local_day = told_day.unwrap_or_else(|| match utc_offset {
        Some(offset) => start_at.with_timezone(&offset).date_naive(),
        None => start_at.date_naive(),
    });
    let record = Record {
        kind: Kind::Workout,
        external_id: parts.external_id.to_owned(),
        source: Source { device: text(activity.device_name), writer: None, software: None },
        provider_type: kebab(sport),
        title: text(activity.name),
        start_at,
        end_at,
        utc_offset,
        zone: activity.timezone.as_deref().and_then(|zone| text(Some(zone.rsplit_once(") ")?.1.to_owned()))),
        local_day,
        updated_at: None,
        details: Details::Workout(Box::new(workout)),
    };
    Ok(Normalized { record, samples, wants, shape, provisional: false, dropped: intake.dropped })
}

/// The typed columns, elapsed time and zones apart.
fn measured(intake: &mut Intake, activity: &Activity, workout_type: &'static str) -> Workout {
    let work = intake.take(activity.kilojoules, Kilojoules::new);
    // 0 is how a detail says unknown.
    let told = intake.take(activity.calories, Kilocalories::new).filter(|energy| energy.get() > 0.0);
    let estimated = work.filter(|work| work.get() > 0.0).map(Kilojoules::burned);
    let start = activity.start_latlng.and_then(|place| place.0).filter(|place| {
        let known = on_earth(*place);
        intake.dropped += u64::from(!known);
        known
    });
    // Strava counts the strides of one leg.
    let cadence = |value: f64| Cadence::new(if on_foot(workout_type) { value * 2.0 } else { value });
    let laps = activity.laps.as_deref().unwrap_or_default();
    Workout {
        workout_type,
        elapsed: None,
        moving: intake.duration(activity.moving_time),
        distance: intake.take(activity.distance, Metres::new),
        ascent: intake.take(activity.total_elevation_gain, Metres::new),
        elevation_high: intake.take(activity.elev_high, Metres::new),
        elevation_low: intake.take(activity.elev_low, Metres::new),
        average_speed: intake.take(activity.average_speed, MetresPerSecond::new),
        max_speed: intake.take(activity.max_speed, MetresPerSecond::new),
        average_heart_rate: intake.take(activity.average_heartrate, BeatsPerMinute::new),
        max_heart_rate: intake.take(activity.max_heartrate, |value| BeatsPerMinute::new(value.round())),
        average_cadence: intake.plain(activity.average_cadence).and_then(cadence),
        average_power: intake.take(activity.average_watts, Watts::new),
        max_power: intake.take(activity.max_watts, Watts::new),
        weighted_power: intake.take(activity.weighted_average_watts, Watts::new),
        power_measured: activity.device_watts,
        work,
        energy: told.or(estimated),
        energy_estimated: told.is_none() && estimated.is_some(),
        average_temperature: intake.take(activity.average_temp, Celsius::new),
        start_latitude: start.and_then(|place| Degrees::new(place.0)),
        start_longitude: start.and_then(|place| Degrees::new(place.1)),
        gear_id: activity.gear_id.as_ref().map(|id| id.0.clone()),
        manual: activity.manual,
        laps: laps.iter().zip(1..).map(|(told, place)| lap(intake, told, place)).collect(),
        heart_rate_zones: Vec::new(),
        power_zones: Vec::new(),
        pace_zones: Vec::new(),
    }
}

fn lap(intake: &mut Intake, lap: &wire::Lap, place: i64) -> Lap {
    Lap {
        index: intake.plain(lap.lap_index).map_or(place, |index| index as i64),
        start_at: lap.start_date.as_deref().and_then(wire::instant),
        elapsed_s: intake.plain(lap.elapsed_time),
        moving_s: intake.plain(lap.moving_time),
        distance_m: intake.plain(lap.distance),
        ascent_m: intake.plain(lap.total_elevation_gain),
        average_speed_m_per_s: intake.plain(lap.average_speed),
        average_heart_rate_bpm: intake.plain(lap.average_heartrate),
        max_heart_rate_bpm: intake.plain(lap.max_heartrate),
        average_power_w: intake.plain(lap.average_watts),
    }
}

fn zone_times(intake: &mut Intake, zones: &Zones) -> Vec<ZoneTime> {
    let buckets = zones.distribution_buckets.as_deref().unwrap_or_default();
    let times = buckets.iter().zip(1..).filter_map(|(bucket, zone)| {
        let (min, seconds) = intake.plain(bucket.min).zip(intake.plain(bucket.time))?;
        // -1 is an open end.
        let max = intake.plain(bucket.max).filter(|max| *max >= 0.0);
        Some(ZoneTime { zone, min, max, seconds })
    });
    times.collect()
}

fn workout_wants(parts: &Parts<'_>, activity: &Activity) -> Vec<Wanted> {
    let mut wants = vec![parts.want(DETAIL), parts.want(ZONES)];
    // What was typed in has no streams: asking would cost a call for a 404.
    if activity.manual != Some(true) && activity.upload_id.is_some() {
        wants.push(parts.want(STREAMS));
    }
    wants.extend(activity.gear_id.iter().map(|id| gear_wanted(&id.0)));
    wants
}

fn gear_wanted(id: &str) -> Wanted {
    Wanted { kind: Kind::Gear, external_id: id.to_owned(), part: SUMMARY }
}

/// A digest of what streams and zones depend on; the same for `0` and `0.0`.
fn shape(summary: &Activity) -> i64 {
    let number = |number: Option<Number>| number.map(|number| number.0 + 0.0);
    let text = format!(
        "{:?} {:?} {:?} {:?} {:?}",
        summary.start_date.as_deref().and_then(wire::instant).map(|at| at.timestamp_millis()),
        number(summary.elapsed_time),
        number(summary.distance),
        summary.manual,
        summary.upload_id.as_ref().map(|id| &id.0),
    );
    let digest = Sha256::digest(text.as_bytes());
    digest.iter().take(8).fold(0, |sum, byte| (sum << 8) | i64::from(*byte))
}

/// The samples of an activity. Without a `time` stream there are none: one sample a second is not promised.
///
/// The `cadence` series stays as sent, on foot strides of one leg per minute; only the record's average is in steps.
fn samples(
    intake: &mut Intake,
    streams: Streams,
    start_at: DateTime<Utc>,
    utc_offset: Option<FixedOffset>,
) -> Vec<SampleSet> {
    let start_ms = start_at.timestamp_millis();
    let seconds = streams.time.and_then(|time| time.data).unwrap_or_default();
    let mut times = Vec::with_capacity(seconds.len());
    for second in &seconds {
        // Also false for NaN.
        let at = second.filter(|second| second.0.abs() <= LONGEST_S);
        intake.dropped += u64::from(at.is_none());
        times.push(at.map(|second| start_ms + (second.0 * 1000.0).round() as i64));
    }
    let mut sets = Vec::new();
    let mut add = |series: SeriesType, samples: Vec<(i64, f64)>| {
        if !samples.is_empty() {
            sets.push(SampleSet { series, total: false, utc_offset, samples });
        }
    };
    add(series::HEART_RATE, numbers(intake, &times, streams.heartrate, |beats| beats != 0.0));
    add(series::SPEED, numbers(intake, &times, streams.velocity_smooth, |_| true));
    add(series::CADENCE, numbers(intake, &times, streams.cadence, |_| true));
    add(series::POWER, numbers(intake, &times, streams.watts, |_| true));
    add(series::ELEVATION, numbers(intake, &times, streams.altitude, |_| true));
    let (latitudes, longitudes) = places(intake, &times, streams.latlng);
    add(series::LATITUDE, latitudes);
    add(series::LONGITUDE, longitudes);
    add(series::AIR_TEMPERATURE, numbers(intake, &times, streams.temp, |_| true));
    sets
}

/// One stream against its times, as far as both reach. Nulls are gaps.
fn numbers(
    intake: &mut Intake,
    times: &[Option<i64>],
    stream: Option<Stream<Number>>,
    keep: fn(f64) -> bool,
) -> Vec<(i64, f64)> {
    let data = stream.and_then(|stream| stream.data).unwrap_or_default();
    let mut samples = Vec::with_capacity(data.len().min(times.len()));
    for (at, value) in times.iter().zip(&data) {
        let (Some(at), Some(Number(value))) = (at, value) else { continue };
        if !value.is_finite() {
            intake.dropped += 1;
        } else if keep(*value) {
            samples.push((*at, *value));
        }
    }
    samples
}

type Samples = Vec<(i64, f64)>;

fn places(intake: &mut Intake, times: &[Option<i64>], stream: Option<Stream<LatLng>>) -> (Samples, Samples) {
    let data = stream.and_then(|stream| stream.data).unwrap_or_default();
    let room = data.len().min(times.len());
    let (mut latitudes, mut longitudes) = (Vec::with_capacity(room), Vec::with_capacity(room));
    for (at, place) in times.iter().zip(&data) {
        let (Some(at), Some(LatLng(Some(place)))) = (at, place) else { continue };
        if on_earth(*place) {
            latitudes.push((*at, place.0));
            longitudes.push((*at, place.1));
        } else {
            intake.dropped += 1;
        }
    }
    (latitudes, longitudes)
}

/// Also false for NaN.
fn on_earth((latitude, longitude): (f64, f64)) -> bool {
    latitude.abs() <= 90.0 && longitude.abs() <= 180.0
}

fn athlete(parts: &Parts<'_>) -> Result<Normalized, NormalizeError> {
    let athlete: Athlete = parts.summary()?;
    let names = [text(athlete.firstname), text(athlete.lastname)];
    let full_name = names.into_iter().flatten().collect::<Vec<_>>().join(" ");
    let title = text(Some(full_name)).or_else(|| text(athlete.username));
    let mut wants: Vec<Wanted> = Vec::new();
    for id in athlete.bikes.into_iter().chain(athlete.shoes).flatten().filter_map(|gear| gear.id) {
        let wanted = gear_wanted(&id.0);
        if !wants.contains(&wanted) {
            wants.push(wanted);
        }
    }
    let start_at = athlete.created_at.as_deref().and_then(wire::instant).unwrap_or_default();
    let updated_at = athlete.updated_at.as_deref().and_then(wire::instant);
    Ok(Normalized { wants, ..plain(parts, title, start_at, updated_at) })
}

fn gear(parts: &Parts<'_>) -> Result<Normalized, NormalizeError> {
    let gear: Gear = parts.summary()?;
    // Strava does not tell when it was bought.
    Ok(plain(parts, text(gear.name), DateTime::UNIX_EPOCH, None))
}

/// A record whose content stays in its part.
fn plain(
    parts: &Parts<'_>,
    title: Option<String>,
    start_at: DateTime<Utc>,
    updated_at: Option<DateTime<Utc>>,
) -> Normalized {
    let record = Record {
        kind: parts.kind,
        external_id: parts.external_id.to_owned(),
        source: Source::default(),
        provider_type: parts.kind.as_str().to_owned(),
        title,
        start_at,
        end_at: None,
        utc_offset: None,
        zone: None,
        local_day: start_at.date_naive(),
        updated_at,
        details: Details::None,
    };
    Normalized { record, samples: Vec::new(), wants: Vec::new(), shape: 0, provisional: false, dropped: 0 }
}

/// Trimmed; `None` when nothing is left.
fn text(text: Option<String>) -> Option<String> {
    let text = text?;
    let trimmed = text.trim();
    if trimmed.is_empty() {
        None
    } else if trimmed.len() == text.len() {
        Some(text)
    } else {
        Some(trimmed.to_owned())
    }
}

/// `EBikeRide` → `e-bike-ride`. Anything but letters and digits becomes a dash; no type at all is a `workout`.
fn kebab(code: &str) -> String {
    let letters: Vec<char> = code.chars().collect();
    let mut out = String::with_capacity(code.len() + 4);
    for (i, letter) in letters.iter().enumerate() {
        if !letter.is_alphanumeric() {
            if !out.is_empty() && !out.ends_with('-') {
                out.push('-');
            }
            continue;
        }
        let before = i.checked_sub(1).and_then(|i| letters.get(i));
        let after = letters.get(i + 1);
        // A word begins at a capital after a small letter or digit, and at the last capital of several.
        let begins = letter.is_uppercase()
            && before.is_some_and(|b| {
                b.is_lowercase() || b.is_numeric() || (b.is_uppercase() && after.is_some_and(|a| a.is_lowercase()))
            });
        if begins && !out.ends_with('-') {
            out.push('-');
        }
        out.extend(letter.to_lowercase());
    }
    let kebab = out.trim_end_matches('-');
    if kebab.is_empty() { "workout".to_owned() } else { kebab.to_owned() }
}

/// Where cadence means steps.
fn on_foot(workout_type: &str) -> bool {
    matches!(workout_type, "running" | "trail_running" | "walking" | "hiking" | "snowshoeing")
}

/// The unified type of a sport type. New sport types appear without notice: they are `other`.
fn unified(sport: &str) -> &'static str {
    match sport {
        "Run" | "VirtualRun" => "running",
        "TrailRun" => "trail_running",
        "Walk" => "walking",
        "Hike" => "hiking",
        "Ride" | "GravelRide" | "Handcycle" | "Velomobile" => "cycling",
        "MountainBikeRide" => "mountain_biking",
        "EBikeRide" | "EMountainBikeRide" => "e_biking",
        "VirtualRide" => "indoor_cycling",
        "Swim" => "swimming",
        "AlpineSki" => "alpine_skiing",
        "BackcountrySki" => "backcountry_skiing",
        "NordicSki" | "RollerSki" => "cross_country_skiing",
        "Snowboard" => "snowboarding",
        "Snowshoe" => "snowshoeing",
        "IceSkate" => "ice_skating",
        "InlineSkate" => "inline_skating",
        "Skateboard" => "skateboarding",
        "Rowing" => "rowing",
        "VirtualRow" => "rowing_machine",
        "Kayaking" => "kayaking",
        "Canoeing" => "canoeing",
        "StandUpPaddling" => "stand_up_paddleboarding",
        "Surfing" => "surfing",
        "Kitesurf" => "kitesurfing",
        "Windsurf" => "windsurfing",
        "Sail" => "sailing",
        "WeightTraining" => "strength_training",
        "Crossfit" | "HighIntensityIntervalTraining" => "cardio_training",
        "Elliptical" => "elliptical",
        "StairStepper" => "stair_climbing",
        "Yoga" => "yoga",
        "Pilates" => "pilates",
        "Badminton" => "badminton",
        "Pickleball" => "pickleball",
        "Racquetball" => "racquetball",
        "Squash" => "squash",
        "TableTennis" => "table_tennis",
        "Tennis" => "tennis",
        "Padel" => "padel",
        "Soccer" => "soccer",
        "Basketball" => "basketball",
        "Volleyball" => "volleyball",
        "Cricket" => "cricket",
        "Golf" => "golf",
        "RockClimbing" => "rock_climbing",
        "Wheelchair" => "wheelchair",
        "Dance" => "dance",
        "PhysicalTherapy" => "recovery",
        "Workout" => "generic",
        _ => "other",
    }
}
