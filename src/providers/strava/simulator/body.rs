//! The answers as JSON text, field for field as the provider's documents and recordings have them. Written straight
//! into a string: a list of 200 rows or an hour of eleven streams is made in a few milliseconds.

use std::f64::consts::TAU;
use std::fmt::Write;

use chrono::DateTime;
use serde_json::{Map, Value};

use super::world::{Facts, PLACES, Style, Visibility, offsets};
use crate::providers::simulation::Rng;

/// The streams that exist, in the provider's order.
const STREAMS: [&str; 11] = [
    "time",
    "distance",
    "latlng",
    "altitude",
    "velocity_smooth",
    "heartrate",
    "cadence",
    "watts",
    "temp",
    "moving",
    "grade_smooth",
];

/// A JSON object being written.
struct Object(String);

impl Object {
    fn new() -> Self {
        Self(String::from("{"))
    }

    fn key(&mut self, key: &str) -> &mut String {
        if self.0.len() > 1 {
            self.0.push(',');
        }
        self.0.push('"');
        self.0.push_str(key);
        self.0.push_str("\":");
        &mut self.0
    }

    fn raw(&mut self, key: &str, json: &str) -> &mut Self {
        self.key(key).push_str(json);
        self
    }

    fn text(&mut self, key: &str, text: &str) -> &mut Self {
        let quoted = quote(text);
        self.raw(key, &quoted)
    }

    fn maybe(&mut self, key: &str, text: Option<&str>) -> &mut Self {
        match text {
            Some(text) => self.text(key, text),
            None => self.raw(key, "null"),
        }
    }

    fn int(&mut self, key: &str, n: impl Into<i128>) -> &mut Self {
        let n: i128 = n.into();
        let _ = write!(self.key(key), "{n}");
        self
    }

    fn flag(&mut self, key: &str, flag: bool) -> &mut Self {
        self.raw(key, if flag { "true" } else { "false" })
    }

    /// A number with its point, always: `9.0`.
    fn float(&mut self, key: &str, n: f64) -> &mut Self {
        let _ = write!(self.key(key), "{n:?}");
        self
    }

    /// A number that the provider sends with or without a point when it is whole.
    fn number(&mut self, key: &str, n: f64, whole_as_int: bool) -> &mut Self {
        if whole_as_int {
            let _ = write!(self.key(key), "{n}");
            self
        } else {
            self.float(key, n)
        }
    }

    fn end(mut self) -> String {
        self.0.push('}');
        self.0
    }
}

fn quote(text: &str) -> String {
    serde_json::to_string(text).unwrap_or_else(|_| "\"\"".into())
}

fn round(n: f64, digits: i32) -> f64 {
    let scale = 10_f64.powi(digits);
    (n * scale).round() / scale
}

fn utc(at: i64) -> String {
    DateTime::from_timestamp(at, 0).unwrap_or_default().format("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// What an activity's numbers are drawn from, apart from its facts: independent of edits.
fn chance(seed: u64, id: u64, what: u64) -> Rng {
    Rng::of(&[seed, id, what])
}

/// The averages shown in list, detail and laps.
struct Averages {
    heart_rate: Option<f64>,
    max_heart_rate: f64,
    watts: Option<f64>,
    cadence: Option<f64>,
    temperature: Option<i64>,
    speed: f64,
}

fn averages(facts: &Facts, seed: u64) -> Averages {
    let mut rng = chance(seed, facts.id, 3);
    let heart_rate = rng.between(95.0, 168.0);
    let watts = rng.between(110.0, 290.0);
    let cadence = if facts.style() == Style::Bike { rng.between(62.0, 95.0) } else { rng.between(76.0, 92.0) };
    let temperature = rng.below(45) as i64 - 10;
    let cadenced = matches!(facts.style(), Style::Bike | Style::Foot) && !facts.manual && !facts.bare;
    Averages {
        heart_rate: facts.heart_rate.then_some(round(heart_rate, 1)),
        max_heart_rate: (heart_rate + 22.0).round(),
        watts: (facts.style() == Style::Bike && !facts.manual && !facts.bare).then_some(round(watts, 1)),
        cadence: (cadenced && rng.chance(0.7)).then_some(round(cadence, 1)),
        temperature: facts.temperature.then_some(temperature),
        speed: if facts.span() == 0 { 0.0 } else { round(facts.distance / facts.span() as f64, 3) },
    }
}

fn has_position(facts: &Facts) -> bool {
    !facts.manual && !facts.indoor && facts.distance > 0.0
}

/// Where the activity is after this share (0 to 1) of its way: a loop that ends near its start.
fn position(facts: &Facts, share: f64) -> (f64, f64) {
    // A virtual ride goes round an island far from home.
    let (lat, lng) = if facts.virtual_ride {
        (-11.635_82, 166.972_13)
    } else {
        let (_, _, lat, lng, _) = PLACES[facts.place];
        (lat, lng)
    };
    let radius = (facts.distance / TAU).min(30_000.0) / 111_320.0;
    let angle = share * TAU * 0.998;
    (lat + radius * (1.0 - angle.cos()), lng + radius * angle.sin() / lat.to_radians().cos())
}

fn altitude(facts: &Facts, share: f64) -> f64 {
    let base = if facts.virtual_ride { 12.8 } else { PLACES[facts.place].4 };
    base + facts.gain / 2.0 * (1.0 - (share * TAU).cos())
}

/// Google's encoded polyline, precision 5.
fn polyline(facts: &Facts, points: u32) -> String {
    let mut text = String::new();
    let mut last = (0_i64, 0_i64);
    for i in 0..points {
        let (lat, lng) = position(facts, f64::from(i) / f64::from(points - 1));
        let here = ((lat * 1e5).round() as i64, (lng * 1e5).round() as i64);
        for delta in [here.0 - last.0, here.1 - last.1] {
            let mut n = if delta < 0 { !(delta << 1) } else { delta << 1 } as u64;
            while n >= 0x20 {
                text.push(((0x20 | (n & 0x1f)) as u8 + 63) as char);
                n >>= 5;
            }
            text.push((n as u8 + 63) as char);
        }
        last = here;
    }
    text
}

fn latlng(facts: &Facts, share: f64) -> String {
    if !has_position(facts) || facts.hidden_start {
        return "[]".into();
    }
    let (lat, lng) = position(facts, share);
    format!("[{lat:.5},{lng:.5}]")
}

/// A list row, or with `detail` the whole activity. `kudos` is what volatile counts have grown by.
pub(super) fn activity(facts: &Facts, seed: u64, kudos: u64, detail: bool) -> String {
    let mut rng = chance(seed, facts.id, 4);
    let averages = averages(facts, seed);
    let whole = facts.whole_as_int;
    let (offset, standard) = offsets(facts.place, facts.start);
    let state = if detail { 3 } else { 2 };
    let mut out = Object::new();
    out.int("resource_state", state)
        .raw("athlete", &format!("{{\"id\":{},\"resource_state\":1}}", facts.athlete))
        .text("name", &facts.name)
        .number("distance", facts.distance, whole)
        .int("moving_time", facts.moving)
        .int("elapsed_time", facts.elapsed)
        .number("total_elevation_gain", facts.gain, whole);
    match facts.sport() {
        Some((sport, legacy, ..)) => {
            out.text("type", legacy);
            if !facts.old {
                out.text("sport_type", sport);
            }
        }
        None => {
            out.text("type", "Workout").text("sport_type", &facts.sport);
        }
    }
    // Absent, null or a number.
    match (rng.below(4), facts.style()) {
        (0, _) => {}
        (1, _) => drop(out.raw("workout_type", "null")),
        (n, Style::Bike) => drop(out.int("workout_type", 8 + n)),
        (n, _) => drop(out.int("workout_type", n - 2)),
    }
    let local = if facts.hidden_start { facts.start } else { facts.start + offset };
    let sign = if standard < 0 { '-' } else { '+' };
    let (hours, minutes) = (standard.abs() / 3600, standard.abs() % 3600 / 60);
    let social = u64::from(!facts.manual && facts.visibility != Visibility::OnlyMe);
    out.int("id", facts.id)
        .text("start_date", &utc(facts.start))
        .text("start_date_local", &utc(local))
        .text("timezone", &format!("(GMT{sign}{hours:02}:{minutes:02}) {}", PLACES[facts.place].1))
        .float("utc_offset", offset as f64)
        .raw("location_city", "null")
        .raw("location_state", "null")
        .raw("location_country", "null")
        .int("achievement_count", rng.below(4) * social)
        .int("kudos_count", (rng.below(12) + kudos) * social)
        .int("comment_count", rng.below(3) * social)
        .int("athlete_count", 1 + if rng.chance(0.1) { rng.below(37) } else { 0 })
        .int("photo_count", 0);
    let mut map = Object::new();
    map.text("id", &format!("a{}", facts.id));
    let mapped = has_position(facts) && !facts.hidden_start;
    if detail {
        map.text("polyline", &if mapped { polyline(facts, 60) } else { String::new() }).int("resource_state", 3);
    }
    match (mapped, facts.hidden_start) {
        (true, _) => map.text("summary_polyline", &polyline(facts, 12)),
        (false, true) => map.raw("summary_polyline", "null"),
        (false, false) => map.text("summary_polyline", ""),
    };
    if !detail {
        map.int("resource_state", 2);
    }
    out.raw("map", &map.end())
        .flag("trainer", facts.virtual_ride || facts.style() == Style::Still)
        .flag("commute", rng.chance(0.05))
        .flag("manual", facts.manual)
        .flag("private", facts.visibility == Visibility::OnlyMe)
        .text("visibility", facts.visibility.word())
        .flag("flagged", rng.chance(0.01))
        .maybe("gear_id", facts.gear.as_deref())
        .raw("start_latlng", &latlng(facts, 0.0))
        .raw("end_latlng", &latlng(facts, 1.0))
        .number("average_speed", averages.speed, whole)
        .number("max_speed", round(averages.speed * rng.between(0.97, 1.8), 3), whole);
    if let Some(cadence) = averages.cadence {
        out.float("average_cadence", cadence);
    }
    if let Some(watts) = averages.watts {
        out.float("average_watts", watts);
        if facts.power_meter {
            out.int("max_watts", (watts * 2.4) as i64).int("weighted_average_watts", (watts * 1.06) as i64);
        }
        out.flag("device_watts", facts.power_meter).float("kilojoules", round(watts * facts.span() as f64 / 1000.0, 1));
    }
    if let Some(temperature) = averages.temperature {
        out.int("average_temp", temperature);
    }
    out.flag("has_heartrate", averages.heart_rate.is_some());
    if let Some(heart_rate) = averages.heart_rate {
        out.float("average_heartrate", heart_rate).float("max_heartrate", averages.max_heart_rate);
    }
    out.flag("heartrate_opt_out", false).flag("display_hide_heartrate_option", averages.heart_rate.is_some());
    if has_position(facts) {
        out.float("elev_high", round(altitude(facts, 0.5), 1)).float("elev_low", round(altitude(facts, 0.0), 1));
    }
    let upload = 19_455_000_000 + facts.id % 10_000_000_000 / 3;
    if facts.manual {
        out.raw("upload_id", "null").raw("external_id", "null");
    } else {
        let external = match rng.below(3) {
            0 => format!("garmin_ping_{}", 500_000_000_000 + facts.id),
            1 if facts.virtual_ride => format!("zwift-activity-18990001112{}.fit", facts.id),
            1 => "watch_upload.tcx".to_owned(),
            _ => format!("C0FFEE11-2233-4455-8899-{:012X}-activity.fit", facts.id),
        };
        out.int("upload_id", upload).text("upload_id_str", &upload.to_string()).text("external_id", &external);
        if rng.chance(0.8) {
            out.text("device_name", "Garmin Forerunner 965");
        }
    }
    out.flag("from_accepted_tag", false)
        .int("pr_count", rng.below(2) * social)
        .int("total_photo_count", rng.below(3) * social)
        .flag("has_kudoed", false);
    if let Some(heart_rate) = averages.heart_rate {
        if rng.chance(0.8) {
            out.number("suffer_score", (heart_rate / 2.0).round(), whole);
        } else {
            out.raw("suffer_score", "null");
        }
    }
    if detail {
        add_detail(&mut out, facts, seed, &averages, kudos);
    }
    overlaid(out.end(), &facts.extra)
}

fn add_detail(out: &mut Object, facts: &Facts, seed: u64, averages: &Averages, kudos: u64) {
    let mut rng = chance(seed, facts.id, 5);
    let energy = if facts.bare { 0.0 } else { round(facts.span() as f64 * rng.between(0.08, 0.24), 1) };
    out.maybe("description", facts.description.as_deref())
        .text("private_note", "")
        .number("calories", energy, false)
        .raw("perceived_exertion", if rng.chance(0.3) { "7" } else { "null" })
        .raw("prefer_perceived_exertion", if rng.chance(0.3) { "false" } else { "null" })
        .flag("hide_from_home", false)
        .flag("segment_leaderboard_opt_out", false)
        .flag("leaderboard_opt_out", false)
        .raw("partner_brand_tag", "null")
        .text("embed_token", &rng.hex(40));
    let mut available = Vec::new();
    if averages.heart_rate.is_some() {
        available.push("\"heartrate\"");
    }
    if facts.style() == Style::Foot && facts.distance > 0.0 {
        available.push("\"pace\"");
    }
    if facts.power_meter {
        available.push("\"power\"");
    }
    out.raw("available_zones", &format!("[{}]", available.join(",")));
    out.raw(
        "stats_visibility",
        "[{\"type\":\"heart_rate\",\"visibility\":\"everyone\"},{\"type\":\"power\",\"visibility\":\"only_me\"}]",
    );
    if let Some(id) = &facts.gear {
        out.raw("gear", &gear(id, kudos, facts.whole_as_int, false));
    }
    out.raw("photos", "{\"primary\":null,\"use_primary_photo\":false,\"count\":0}");
    if facts.style() == Style::Foot && !facts.manual && facts.distance >= 1000.0 {
        out.raw("splits_metric", &splits(facts, averages, 1000.0))
            .raw("splits_standard", &splits(facts, averages, 1609.344))
            .raw("best_efforts", &best_effort(facts));
    }
    out.raw("segment_efforts", &segment_effort(facts)).raw("laps", &laps(facts, seed));
}

fn overlaid(body: String, extra: &Map<String, Value>) -> String {
    if extra.is_empty() {
        return body;
    }
    let Ok(mut object) = serde_json::from_str::<Map<String, Value>>(&body) else { return body };
    object.extend(extra.clone());
    serde_json::to_string(&object).unwrap_or(body)
}

fn splits(facts: &Facts, averages: &Averages, length: f64) -> String {
    let count = ((facts.distance / length) as i64).clamp(1, 100);
    let seconds = facts.span() / count;
    let rows = (1..=count).map(|split| {
        let mut row = Object::new();
        row.float("distance", round(facts.distance / count as f64, 1))
            .int("elapsed_time", seconds)
            .raw("elevation_difference", if facts.indoor { "null" } else { "-2.8" })
            .int("moving_time", seconds)
            .int("split", split)
            .float("average_speed", averages.speed)
            .int("pace_zone", split % 5);
        if let Some(heart_rate) = averages.heart_rate {
            row.float("average_heartrate", round(heart_rate + split as f64 / 10.0, 2));
        }
        row.end()
    });
    format!("[{}]", rows.collect::<Vec<_>>().join(","))
}

/// Opens an object as laps and efforts begin.
fn piece(facts: &Facts, id: u64, name: &str, from: i64, seconds: i64, distance: f64) -> Object {
    let (offset, _) = offsets(facts.place, facts.start);
    let mut out = Object::new();
    out.int("id", id)
        .int("resource_state", 2)
        .text("name", name)
        .raw(
            "activity",
            &format!("{{\"id\":{},\"visibility\":\"{}\",\"resource_state\":1}}", facts.id, facts.visibility.word()),
        )
        .raw("athlete", &format!("{{\"id\":{},\"resource_state\":1}}", facts.athlete))
        .int("elapsed_time", seconds)
        .int("moving_time", seconds)
        .text("start_date", &utc(facts.start + from))
        .text("start_date_local", &utc(facts.start + offset + from))
        .number("distance", round(distance, 1), facts.whole_as_int);
    out
}

fn best_effort(facts: &Facts) -> String {
    let seconds = (facts.span() as f64 * 1000.0 / facts.distance.max(1.0)) as i64;
    let mut effort = piece(facts, 40_112_000_000 + facts.id % 1_000_000_000, "1K", 0, seconds, 1000.0);
    effort.raw("pr_rank", "null").raw("achievements", "[]").int("start_index", 0).int("end_index", facts.points / 2);
    format!("[{}]", effort.end())
}

fn segment_effort(facts: &Facts) -> String {
    if !has_position(facts) || facts.hidden_start || !facts.id.is_multiple_of(3) {
        return "[]".into();
    }
    // Above 2^53: who reads it as a float loses it.
    let mut effort = piece(facts, 3_370_112_000_000_000_000 + facts.id, "Marzili-Rampe", 60, 96, 287.1);
    let segment = "{\"id\":31245678,\"resource_state\":2,\"name\":\"Marzili-Rampe\",\"activity_type\":\"Run\",\
        \"distance\":287.1,\"average_grade\":8.9,\"maximum_grade\":15.3,\"elevation_high\":539.8,\
        \"elevation_low\":514.2,\"start_latlng\":[46.9452,7.4421],\"end_latlng\":[46.9468,7.4433],\
        \"elevation_profile\":null,\"climb_category\":0,\"city\":\"Bern\",\"state\":\"BE\",\
        \"country\":\"Switzerland\",\"private\":false,\"hazardous\":false,\"starred\":true}";
    effort
        .int("start_index", 0)
        .int("end_index", facts.points / 3)
        .flag("device_watts", facts.power_meter)
        .raw("segment", segment)
        .int("pr_rank", 1)
        .raw("achievements", "[{\"type_id\":3,\"type\":\"pr\",\"rank\":1}]")
        .text("visibility", facts.visibility.word())
        .raw("kom_rank", "null")
        .flag("hidden", false);
    format!("[{}]", effort.end())
}

/// The laps of an activity.
pub(super) fn laps(facts: &Facts, seed: u64) -> String {
    if facts.manual {
        return "[]".into();
    }
    let averages = averages(facts, seed);
    let count = ((facts.distance / 5000.0) as i64 + 1).min(20);
    let seconds = facts.span() / count;
    let points = i64::from(facts.points) / count;
    let rows = (1..=count).map(|lap| {
        let id = 64_100_000_000 + facts.id % 100_000_000 * 20 + lap as u64;
        let from = (lap - 1) * seconds;
        let mut row = piece(facts, id, &format!("Lap {lap}"), from, seconds, facts.distance / count as f64);
        row.number("average_speed", averages.speed, facts.whole_as_int)
            .number("max_speed", round(averages.speed * 1.2, 2), facts.whole_as_int)
            .int("lap_index", lap)
            .int("split", lap)
            .int("start_index", (lap - 1) * points)
            .int("end_index", (lap * points - 1).max(0))
            .number("total_elevation_gain", round(facts.gain / count as f64, 1), facts.whole_as_int)
            .flag("device_watts", facts.power_meter);
        if let Some(cadence) = averages.cadence {
            row.float("average_cadence", cadence);
        }
        if let Some(watts) = averages.watts {
            row.float("average_watts", watts);
        }
        if let Some(heart_rate) = averages.heart_rate {
            row.float("average_heartrate", heart_rate).float("max_heartrate", averages.max_heart_rate);
        }
        row.end()
    });
    format!("[{}]", rows.collect::<Vec<_>>().join(","))
}

/// Zone distributions of an activity.
pub(super) fn zones(facts: &Facts) -> String {
    let mut zones = Vec::new();
    let span = facts.span() as f64;
    if facts.heart_rate {
        let edges = [0, 118, 147, 161, 176, -1];
        let buckets: Vec<String> = edges
            .windows(2)
            .zip([0.1, 0.3, 0.35, 0.2, 0.05])
            .map(|(edge, share)| {
                format!("{{\"min\":{},\"max\":{},\"time\":{:?}}}", edge[0], edge[1], (span * share).round())
            })
            .collect();
        zones.push(format!(
            "{{\"score\":74.0,\"distribution_buckets\":[{}],\"type\":\"heartrate\",\"resource_state\":3,\
             \"sensor_based\":true,\"points\":58,\"custom_zones\":false}}",
            buckets.join(",")
        ));
    }
    if facts.style() == Style::Foot && facts.distance > 0.0 {
        let fast = (span * 0.9) as i64;
        zones.push(format!(
            "{{\"score\":12,\"distribution_buckets\":[{{\"max\":2.41,\"min\":0,\"time\":{}}},\
             {{\"max\":-1,\"min\":2.41,\"time\":{fast}}}],\"type\":\"pace\",\"resource_state\":3,\
             \"sensor_based\":true}}",
            facts.span() - fast
        ));
    }
    format!("[{}]", zones.join(","))
}

/// Which streams are asked for, and how they are to look.
pub(super) struct Wanted<'a> {
    pub(super) keys: Vec<&'a str>,
    pub(super) by_key: bool,
    /// Thinned to about so many points.
    pub(super) at_most: Option<u32>,
    pub(super) resolution: &'a str,
    pub(super) series_type: &'a str,
}

/// Appends a number of `scaled / 10^digits`, with its digits.
fn push_fixed(out: &mut String, scaled: i64, digits: u32) {
    let scale = 10_i64.pow(digits);
    if scaled < 0 {
        out.push('-');
    }
    let _ = write!(out, "{}.", scaled.abs() / scale);
    let mut rest = scaled.abs() % scale;
    // As JSON writers do: no zeros at the end, but one digit always.
    let mut place = scale / 10;
    loop {
        out.push((b'0' + (rest / place) as u8) as char);
        rest %= place;
        place /= 10;
        if rest == 0 || place == 0 {
            return;
        }
    }
}

/// The stream set of an activity that is not manual.
pub(super) fn streams(facts: &Facts, seed: u64, wanted: &Wanted<'_>) -> String {
    let averages = averages(facts, seed);
    let points = i64::from(facts.points.max(1));
    let count = wanted.at_most.map_or(points, |most| points.min(i64::from(most)));
    let last = (points - 1).max(1);
    let (span, pause) = (facts.span(), facts.elapsed - facts.span());
    let noise = |i: i64, what: u64, width: u64| {
        let mut z = (i as u64 ^ facts.id.rotate_left(17) ^ seed.rotate_left(41) ^ what << 56)
            .wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z ^= z >> 29;
        (z.wrapping_mul(0x94d0_49bb_1331_11eb) >> 33) as i64 % width.max(1) as i64
    };
    // One point stands still: where the pause ends.
    let rest = |i: i64| i == 0 || (pause > 0 && i == points / 2 + 1);
    let mut sets = Vec::new();
    for key in STREAMS {
        let there = match key {
            "time" => true,
            "distance" => true,
            "latlng" | "altitude" | "grade_smooth" => has_position(facts),
            "velocity_smooth" | "moving" => facts.distance > 0.0 && !facts.bare,
            "heartrate" => averages.heart_rate.is_some(),
            "cadence" => averages.cadence.is_some(),
            "watts" => facts.power_meter,
            "temp" => averages.temperature.is_some(),
            _ => false,
        };
        // The distance comes whether it was asked for or not.
        if !there || (key != "distance" && !wanted.keys.contains(&key)) {
            continue;
        }
        let mut out = String::with_capacity(count as usize * 8 + 120);
        out.push('[');
        for k in 0..count {
            let i = if count > 1 { k * (points - 1) / (count - 1) } else { 0 };
            let share = i as f64 / last as f64;
            if k > 0 {
                out.push(',');
            }
            match key {
                "time" => {
                    let late = if i > points / 2 { pause } else { 0 };
                    // A single point lies at the start.
                    let _ = write!(out, "{}", i * span / last + if points > 1 { late } else { 0 });
                }
                "distance" => push_fixed(&mut out, (facts.distance * share * 10.0).round() as i64, 1),
                "latlng" => {
                    let (lat, lng) = position(facts, share);
                    out.push('[');
                    push_fixed(&mut out, (lat * 1e6) as i64, 6);
                    out.push(',');
                    push_fixed(&mut out, (lng * 1e6) as i64, 6);
                    out.push(']');
                }
                "altitude" => push_fixed(&mut out, (altitude(facts, share) * 10.0) as i64 / 2 * 2, 1),
                "velocity_smooth" => {
                    let speed = (averages.speed * 100.0) as i64;
                    push_fixed(&mut out, if rest(i) { 0 } else { speed * (90 + noise(i, 1, 21)) / 100 }, 2);
                }
                "heartrate" => {
                    let middle = averages.heart_rate.unwrap_or_default() as i64;
                    let warm = (600 - i.min(600)) / 30;
                    let _ = write!(out, "{}", middle - warm + noise(i / 7, 2, 13) + noise(i, 3, 3) - 6);
                }
                "cadence" => {
                    let middle = averages.cadence.unwrap_or_default() as i64;
                    let _ = write!(out, "{}", if rest(i) { 0 } else { middle - 3 + noise(i, 4, 7) });
                }
                // The meter drops out now and then.
                "watts" if noise(i / 4, 5, 90) == 0 => out.push_str("null"),
                "watts" => {
                    let middle = averages.watts.unwrap_or_default() as i64;
                    let _ = write!(out, "{}", if rest(i) { 0 } else { middle - 40 + noise(i, 6, 81) });
                }
                "temp" => {
                    let _ = write!(out, "{}", averages.temperature.unwrap_or_default() + noise(i / 600, 7, 2));
                }
                "moving" => out.push_str(if rest(i) { "false" } else { "true" }),
                _ => push_fixed(&mut out, ((share * TAU).sin() * 40.0) as i64 + noise(i, 8, 5), 1),
            }
        }
        out.push(']');
        let about = format!(
            "\"series_type\":\"{}\",\"original_size\":{points},\"resolution\":\"{}\"",
            wanted.series_type, wanted.resolution
        );
        sets.push(match wanted.by_key {
            true => format!("\"{key}\":{{\"data\":{out},{about}}}"),
            false => format!("{{\"type\":\"{key}\",\"data\":{out},{about}}}"),
        });
    }
    let joined = sets.join(",");
    if wanted.by_key { format!("{{{joined}}}") } else { format!("[{joined}]") }
}

/// A bike or a pair of shoes; one's own are those of [`GEAR`].
pub(super) fn gear(id: &str, grown: u64, whole_as_int: bool, detail: bool) -> String {
    let bike = id.starts_with('b');
    let (name, nickname) = if bike { ("Canyon", "Canyon") } else { ("Asics Novablast 5", "") };
    let distance = if bike { 5_123_400.0 } else { 412_877.0 } + grown as f64 * 10.0;
    let mut out = Object::new();
    out.text("id", id)
        .flag("primary", id.ends_with('5') || id.ends_with('7'))
        .text("name", name)
        .text("nickname", nickname)
        .int("resource_state", if detail { 3 } else { 2 })
        .flag("retired", false)
        .number("distance", distance, whole_as_int)
        .float("converted_distance", round(distance / 1000.0, 1));
    if detail {
        out.text("brand_name", if bike { "Canyon" } else { "Asics" })
            .text("model_name", if bike { "Endurace CF" } else { "Novablast 5" })
            .raw("description", "null");
        if bike {
            out.int("frame_type", 3).float("weight", 8.1);
        } else {
            out.int("notification_distance", 700_000);
        }
    }
    out.end()
}

/// What every person owns.
pub(super) const GEAR: [&str; 4] = ["b9012345", "b9012346", "g21004417", "g21004418"];

const PEOPLE: [(&str, &str, &str); 6] = [
    ("Inês", "Müller", "F"),
    ("Jonas", "Køster", "M"),
    ("Zoë 🦊", "O'Brien", "F"),
    ("陽子", "田中", "F"),
    ("Łukasz", "Żak", "M"),
    ("أمينة", "حداد", "F"),
];

/// A person; with `detail` everything a `profile:read_all` scope shows.
pub(super) fn athlete(id: u64, person: usize, grown: u64, detail: bool) -> String {
    let (first, last, sex) = PEOPLE[person % PEOPLE.len()];
    let mut out = Object::new();
    out.int("id", id);
    match person % 2 {
        0 => out.raw("username", "null"),
        _ => out.text("username", &format!("athlete_{id}")),
    };
    out.int("resource_state", if detail { 3 } else { 2 })
        .text("firstname", first)
        .text("lastname", last)
        .maybe("bio", person.is_multiple_of(3).then_some("läuft & fährt"))
        .text("city", "Bern")
        .text("state", "BE")
        .text("country", "Switzerland")
        .text("sex", sex)
        .flag("premium", true)
        .flag("summit", true)
        .text("created_at", "2020-10-05T07:11:09Z")
        .text("updated_at", "2026-04-30T18:02:51Z")
        .int("badge_type_id", 1);
    match person % 3 {
        0 => out.float("weight", 61.5),
        1 => out.float("weight", 0.0),
        _ => out.raw("weight", "null"),
    };
    out.text("profile_medium", &format!("https://cdn.example/athletes/{id}/medium.jpg"))
        .text("profile", &format!("https://cdn.example/athletes/{id}/large.jpg"))
        .raw("friend", "null")
        .raw("follower", "null");
    if detail {
        let owned = |letter: char| {
            let mine: Vec<String> = GEAR
                .iter()
                .filter(|id| id.starts_with(letter))
                .map(|id| gear(id, grown, letter == 'g', false))
                .collect();
            format!("[{}]", mine.join(","))
        };
        out.flag("blocked", false)
            .flag("can_follow", true)
            .int("follower_count", 84 + grown)
            .int("friend_count", 91)
            .int("mutual_friend_count", 0)
            .int("athlete_type", (person % 2) as u64)
            .text("date_preference", "%d/%m/%Y")
            .text("measurement_preference", "meters")
            .raw("clubs", "[]")
            .int("postable_clubs_count", 0)
            .raw("ftp", if person.is_multiple_of(2) { "null" } else { "245" })
            .raw("bikes", &owned('b'))
            .raw("shoes", &owned('g'));
    }
    out.end()
}

/// Heart rate and, with a known threshold power, power zones of a person.
pub(super) fn athlete_zones(person: usize) -> String {
    let heart = "\"heart_rate\":{\"custom_zones\":true,\"zones\":[{\"min\":0,\"max\":118},{\"min\":118,\"max\":147},\
        {\"min\":147,\"max\":161},{\"min\":161,\"max\":176},{\"min\":176,\"max\":-1}]}";
    if person.is_multiple_of(2) {
        return format!("{{{heart}}}");
    }
    format!(
        "{{{heart},\"power\":{{\"zones\":[{{\"min\":0,\"max\":137}},{{\"min\":138,\"max\":187}},{{\"min\":188,\"max\":-1}}]}}}}"
    )
}

/// Totals of a person; plausible, and not the sum of the activities.
pub(super) fn stats(person: usize) -> String {
    let mut out = Object::new();
    out.float("biggest_ride_distance", 181_220.0).raw("biggest_climb_elevation_gain", "null");
    for (what, share) in [("recent", 1_u64), ("all", 200), ("ytd", 20)] {
        for (sport, distance) in [("ride", 29_373.4), ("run", 9_219.1), ("swim", 0.0)] {
            let count = if distance == 0.0 { 0 } else { share * (3 + person as u64) };
            let mut total = Object::new();
            total
                .int("count", count)
                .number("distance", distance * count as f64, true)
                .int("moving_time", count * 4303)
                .int("elapsed_time", count * 4667)
                .number("elevation_gain", count as f64 * 300.7, sport == "run");
            if what == "recent" {
                total.int("achievement_count", count / 2);
            }
            out.raw(&format!("{what}_{sport}_totals"), &total.end());
        }
    }
    out.end()
}
