//! What exists: people and their activities, made from (seed, person, index) when asked for. Only a small index of
//! starts and what tests changed are kept, so twenty thousand activities cost half a megabyte.

use std::collections::{BTreeMap, HashMap};

use chrono::{DateTime, Datelike, NaiveDate, Offset, TimeZone, Utc};
use chrono_tz::{OffsetComponents, Tz};
use serde_json::{Map, Value};

use crate::providers::simulation::{Options, Rng};

/// The first person; the others follow in steps of 7.
const FIRST_ATHLETE: u64 = 70_412_355;
/// The newest activity of the beginning; older ones lie `step` below.
const FIRST_ACTIVITY: u64 = 18_000_000_000;
/// What is uploaded later lies above.
const FIRST_UPLOAD: u64 = 18_100_000_000;
const DAY: i64 = 86_400;

/// Where people live and travel: zone, its name at Strava, latitude, longitude, height in metres.
pub(super) static PLACES: &[(Tz, &str, f64, f64, f64)] = &[
    (Tz::Europe__Zurich, "Europe/Zurich", 46.948_12, 7.447_41, 540.0),
    (Tz::America__New_York, "America/New_York", 40.785_09, -73.968_28, 22.0),
    (Tz::Asia__Tokyo, "Asia/Tokyo", 35.685_17, 139.752_79, 31.0),
    (Tz::Europe__London, "Europe/London", 51.507_35, -0.165_71, 18.0),
    (Tz::America__Los_Angeles, "America/Los_Angeles", 37.769_42, -122.486_21, 76.0),
    (Tz::Pacific__Auckland, "Pacific/Auckland", -36.848_46, 174.763_33, 12.0),
    (Tz::Australia__Lord_Howe, "Australia/Lord_Howe", -31.555_01, 159.082_11, 9.0),
    (Tz::Asia__Katmandu, "Asia/Katmandu", 27.717_25, 85.323_96, 1324.0),
    (Tz::America__St_Johns, "America/St_Johns", 47.561_51, -52.712_58, 41.0),
    (Tz::Asia__Jerusalem, "Asia/Jerusalem", 31.451_02, 35.383_21, -380.0),
];
const ZURICH: usize = 0;
const KATHMANDU: usize = 7;
const ST_JOHNS: usize = 8;
const JERUSALEM: usize = 9;

/// How a sport moves; decides which sensors and which fields there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    Foot,
    Bike,
    Water,
    Glide,
    Still,
}

/// Sport, its legacy type, style, usual speed in m/s.
type Sport = (&'static str, &'static str, Style, f64);

static SPORTS: &[Sport] = &[
    ("Run", "Run", Style::Foot, 3.0),
    ("Ride", "Ride", Style::Bike, 7.2),
    ("Swim", "Swim", Style::Water, 1.1),
    ("Walk", "Walk", Style::Foot, 1.4),
    ("Hike", "Hike", Style::Foot, 1.1),
    ("TrailRun", "Run", Style::Foot, 2.4),
    ("VirtualRun", "VirtualRun", Style::Foot, 3.0),
    ("VirtualRide", "VirtualRide", Style::Bike, 8.1),
    ("GravelRide", "Ride", Style::Bike, 6.3),
    ("MountainBikeRide", "Ride", Style::Bike, 4.4),
    ("EBikeRide", "EBikeRide", Style::Bike, 6.9),
    ("EMountainBikeRide", "EBikeRide", Style::Bike, 5.2),
    ("Handcycle", "Handcycle", Style::Bike, 4.8),
    ("Velomobile", "Velomobile", Style::Bike, 9.4),
    ("AlpineSki", "AlpineSki", Style::Glide, 6.0),
    ("BackcountrySki", "BackcountrySki", Style::Glide, 1.6),
    ("NordicSki", "NordicSki", Style::Glide, 3.4),
    ("RollerSki", "RollerSki", Style::Glide, 4.1),
    ("Snowboard", "Snowboard", Style::Glide, 5.5),
    ("Snowshoe", "Snowshoe", Style::Foot, 0.9),
    ("IceSkate", "IceSkate", Style::Glide, 4.0),
    ("InlineSkate", "InlineSkate", Style::Glide, 4.6),
    ("Skateboard", "Skateboard", Style::Glide, 2.2),
    ("Rowing", "Rowing", Style::Water, 2.9),
    ("VirtualRow", "VirtualRow", Style::Water, 3.3),
    ("Kayaking", "Kayaking", Style::Water, 1.7),
    ("Canoeing", "Canoeing", Style::Water, 1.5),
    ("StandUpPaddling", "StandUpPaddling", Style::Water, 1.3),
    ("Surfing", "Surfing", Style::Water, 0.8),
    ("Kitesurf", "Kitesurf", Style::Water, 5.0),
    ("Windsurf", "Windsurf", Style::Water, 4.7),
    ("Sail", "Sail", Style::Water, 3.1),
    ("Crossfit", "Crossfit", Style::Still, 0.0),
    ("HighIntensityIntervalTraining", "Workout", Style::Still, 0.0),
    ("Elliptical", "Elliptical", Style::Still, 0.0),
    ("StairStepper", "StairStepper", Style::Still, 0.0),
    ("WeightTraining", "WeightTraining", Style::Still, 0.0),
    ("Yoga", "Yoga", Style::Still, 0.0),
    ("Pilates", "Workout", Style::Still, 0.0),
    ("Badminton", "Workout", Style::Still, 0.0),
    ("Pickleball", "Workout", Style::Still, 0.0),
    ("Racquetball", "Workout", Style::Still, 0.0),
    ("Squash", "Workout", Style::Still, 0.0),
    ("TableTennis", "Workout", Style::Still, 0.0),
    ("Tennis", "Workout", Style::Still, 0.0),
    ("Soccer", "Soccer", Style::Foot, 1.9),
    ("Golf", "Golf", Style::Foot, 0.7),
    ("RockClimbing", "RockClimbing", Style::Still, 0.0),
    ("Wheelchair", "Wheelchair", Style::Foot, 2.3),
    ("Workout", "Workout", Style::Still, 0.0),
    ("Basketball", "Workout", Style::Still, 0.0),
    ("Cricket", "Workout", Style::Still, 0.0),
    ("Dance", "Workout", Style::Still, 0.0),
    ("Padel", "Workout", Style::Still, 0.0),
    ("Volleyball", "Workout", Style::Still, 0.0),
    ("PhysicalTherapy", "Workout", Style::Still, 0.0),
];

const NAMES: [&str; 14] = [
    "Morning",
    "Evening",
    "Aareschlaufe 🌊 – Tempo 3×1 km",
    "Feierabendrunde",
    "दौड़ / ラン / جري",
    "Čerchov přes \"Zelenou\" chatu",
    "朝の河川敷",
    "Intervals\t6×800",
    "Söndagspass med Åsa & Örjan",
    "Бег до моста",
    "L'après-midi à l'étang",
    "family 👨‍👩‍👧‍👦 outing",
    "easy\\recovery",
    "Commute",
];

/// Everything that decides an activity's answers.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    pub(super) id: u64,
    pub(super) athlete: u64,
    pub(super) name: String,
    pub(super) sport: String,
    /// Seconds since 1970, as reported: midnight and a second where the start is hidden.
    pub(super) start: i64,
    pub(super) place: usize,
    pub(super) moving: i64,
    pub(super) elapsed: i64,
    pub(super) distance: f64,
    pub(super) gain: f64,
    pub(super) points: u32,
    pub(super) manual: bool,
    pub(super) visibility: Visibility,
    pub(super) hidden_start: bool,
    /// Without position: in a hall, or without a receiver.
    pub(super) indoor: bool,
    pub(super) virtual_ride: bool,
    /// Nothing but time and the compulsory distance.
    pub(super) bare: bool,
    pub(super) heart_rate: bool,
    pub(super) power_meter: bool,
    pub(super) temperature: bool,
    /// An old record: only the legacy type is there.
    pub(super) old: bool,
    /// Zero comes as `0` and whole numbers without a point.
    pub(super) whole_as_int: bool,
    pub(super) gear: Option<String>,
    pub(super) description: Option<String>,
    /// Fields that tests set and the above does not know; they win over everything.
    pub(super) extra: Map<String, Value>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Visibility {
    Everyone,
    Followers,
    OnlyMe,
}

impl Visibility {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Everyone => "everyone",
            Self::Followers => "followers_only",
            Self::OnlyMe => "only_me",
        }
    }
}

impl Facts {
    pub(super) fn sport(&self) -> Option<&'static Sport> {
        SPORTS.iter().find(|(name, ..)| *name == self.sport)
    }

    pub(super) fn style(&self) -> Style {
        self.sport().map_or(Style::Foot, |(_, _, style, _)| *style)
    }

    /// Seconds that points are spread over, pause left out.
    pub(super) fn span(&self) -> i64 {
        if self.moving > 0 { self.moving } else { self.elapsed }
    }

    /// Sets fields as a person editing the activity would; unknown ones are answered as given.
    fn edit(&mut self, fields: &Map<String, Value>) {
        for (key, value) in fields {
            match (key.as_str(), value) {
                ("name", Value::String(text)) => self.name.clone_from(text),
                ("sport_type", Value::String(text)) => self.sport.clone_from(text),
                ("description", Value::String(text)) => self.description = Some(text.clone()),
                ("gear_id", Value::String(text)) => self.gear = Some(text.clone()),
                ("gear_id", Value::Null) => self.gear = None,
                ("distance", Value::Number(n)) => self.distance = n.as_f64().unwrap_or(self.distance),
                ("total_elevation_gain", Value::Number(n)) => self.gain = n.as_f64().unwrap_or(self.gain),
                ("moving_time", Value::Number(n)) => {
                    self.moving = n.as_i64().unwrap_or(self.moving);
                    self.elapsed = self.elapsed.max(self.moving);
                }
                ("elapsed_time", Value::Number(n)) => {
                    self.elapsed = n.as_i64().unwrap_or(self.elapsed);
                    self.moving = self.moving.min(self.elapsed);
                }
                ("manual", Value::Bool(manual)) => self.manual = *manual,
                ("private", Value::Bool(true)) => self.visibility = Visibility::OnlyMe,
                ("private", Value::Bool(false)) => self.visibility = Visibility::Everyone,
                ("visibility", Value::String(text)) => {
                    self.visibility = match text.as_str() {
                        "only_me" => Visibility::OnlyMe,
                        "followers_only" => Visibility::Followers,
                        _ => Visibility::Everyone,
                    }
                }
                ("start" | "start_date", value) => {
                    if let Some(start) = instant(value) {
                        self.start = start;
                        self.hidden_start = false;
                    }
                }
                _ => {
                    self.extra.insert(key.clone(), value.clone());
                }
            }
        }
        self.points = self.points.min(u32::try_from(self.span() + 1).unwrap_or(1)).max(1);
    }
}

/// Seconds since 1970 from a number or an RFC 3339 text.
pub(super) fn instant(value: &Value) -> Option<i64> {
    match value {
        Value::Number(n) => n.as_i64(),
        Value::String(text) => Some(DateTime::parse_from_rfc3339(text).ok()?.timestamp()),
        _ => None,
    }
}

/// The offset in force at an instant and the standard one, both in seconds.
pub(super) fn offsets(place: usize, at: i64) -> (i64, i64) {
    let zone = PLACES[place].0;
    let offset = zone.offset_from_utc_datetime(&DateTime::from_timestamp(at, 0).unwrap_or_default().naive_utc());
    (i64::from(offset.fix().local_minus_utc()), offset.base_utc_offset().num_seconds())
}

/// An activity's place in the list.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) start: i64,
    pub(super) id: u64,
    pub(super) only_me: bool,
    pub(super) manual: bool,
}

/// What happened to one activity since the beginning, by the simulator's clock in milliseconds.
#[derive(Clone, Debug, Default)]
pub(super) struct Change {
    pub(super) fields: Map<String, Value>,
    /// None: since the world was made.
    pub(super) listable_at: Option<i64>,
    pub(super) changed_at: Option<i64>,
    pub(super) deleted: Option<(i64, Entry)>,
}

struct Person {
    /// Oldest first; equal starts by id.
    entries: Vec<Entry>,
    changes: BTreeMap<u64, Change>,
    uploads: u64,
}

/// All people and their activities.
pub(super) struct World {
    seed: u64,
    options: Options,
    epoch: i64,
    step: u64,
    people: Vec<Person>,
    by_athlete: HashMap<u64, usize>,
}

impl World {
    pub(super) fn new(options: &Options, epoch: DateTime<Utc>) -> Self {
        let step = u64::from(options.athletes).next_multiple_of(1000).max(1000);
        let mut world = Self {
            seed: options.seed,
            options: options.clone(),
            epoch: epoch.timestamp(),
            step,
            people: Vec::new(),
            by_athlete: HashMap::new(),
        };
        for person in 0..options.athletes as usize {
            let mut entries: Vec<Entry> = (0..options.activities)
                .map(|index| {
                    let facts = world.base(person, u64::from(index));
                    Entry {
                        start: facts.start,
                        id: facts.id,
                        only_me: facts.visibility == Visibility::OnlyMe,
                        manual: facts.manual,
                    }
                })
                .collect();
            entries.sort_unstable_by_key(|entry| (entry.start, entry.id));
            world.people.push(Person { entries, changes: BTreeMap::new(), uploads: 0 });
            world.by_athlete.insert(athlete_id(person), person);
        }
        world
    }

    /// The ids of all people.
    pub(super) fn athletes(&self) -> impl Iterator<Item = u64> + '_ {
        (0..self.people.len()).map(athlete_id)
    }

    /// Whose id this is; small numbers count people from 0.
    pub(super) fn person(&self, athlete: u64) -> Option<usize> {
        let counted = usize::try_from(athlete).ok().filter(|person| *person < self.people.len());
        self.by_athlete.get(&athlete).copied().or(counted)
    }

    /// Entries with `after < start < before`, oldest first.
    pub(super) fn between(&self, person: usize, after: i64, before: i64) -> &[Entry] {
        let entries = &self.people[person].entries;
        let low = entries.partition_point(|entry| entry.start <= after);
        let high = entries.partition_point(|entry| entry.start < before);
        &entries[low..high.max(low)]
    }

    /// One's own activity, unless it was deleted.
    pub(super) fn find(&self, person: usize, id: u64) -> Option<Facts> {
        let facts = self.facts(person, id)?;
        let deleted = self.people[person].changes.get(&id).is_some_and(|change| change.deleted.is_some());
        (!deleted).then_some(facts)
    }

    /// Facts of an activity, deleted or not.
    pub(super) fn facts(&self, person: usize, id: u64) -> Option<Facts> {
        let change = self.people.get(person)?.changes.get(&id);
        // Uploads exist only as changes.
        let uploaded = change.is_some_and(|change| change.listable_at.is_some());
        let mut facts = if id > FIRST_ACTIVITY || uploaded {
            change?;
            self.make(person, id, id, self.epoch)
        } else {
            let below = FIRST_ACTIVITY.checked_sub(id)?;
            let (index, owner) = (below / self.step, below % self.step);
            if owner != person as u64 || index >= u64::from(self.options.activities) {
                return None;
            }
            self.base(person, index)
        };
        if let Some(change) = change {
            facts.edit(&change.fields);
        }
        Some(facts)
    }

    /// Changes fields of an activity; false when there is none.
    pub(super) fn edit(&mut self, person: usize, id: u64, fields: Map<String, Value>, now_ms: i64) -> bool {
        if self.find(person, id).is_none() {
            return false;
        }
        self.remove(person, id);
        let change = self.people[person].changes.entry(id).or_default();
        change.fields.extend(fields);
        change.changed_at = Some(now_ms);
        self.insert(person, id);
        true
    }

    /// Deletes an activity; false when there is none.
    pub(super) fn delete(&mut self, person: usize, id: u64, now_ms: i64) -> bool {
        if self.find(person, id).is_none() {
            return false;
        }
        if let Some(entry) = self.remove(person, id) {
            self.people[person].changes.entry(id).or_default().deleted = Some((now_ms, entry));
        }
        true
    }

    /// A late or back-dated upload; its id, which is the next one unless `id` is given (and nobody's yet).
    pub(super) fn upload(&mut self, person: usize, id: Option<u64>, fields: Map<String, Value>, now_ms: i64) -> u64 {
        let id = id.unwrap_or(FIRST_UPLOAD + self.people[person].uploads * self.step + person as u64);
        self.people[person].uploads += 1;
        let change = Change { fields, listable_at: Some(now_ms), ..Change::default() };
        self.people[person].changes.insert(id, change);
        self.insert(person, id);
        id
    }

    fn remove(&mut self, person: usize, id: u64) -> Option<Entry> {
        let place = self.people[person].entries.iter().position(|entry| entry.id == id)?;
        Some(self.people[person].entries.remove(place))
    }

    fn insert(&mut self, person: usize, id: u64) {
        let Some(facts) = self.facts(person, id) else { return };
        let only_me = facts.visibility == Visibility::OnlyMe;
        let entry = Entry { start: facts.start, id, only_me, manual: facts.manual };
        let entries = &mut self.people[person].entries;
        let place = entries.partition_point(|other| (other.start, other.id) < (entry.start, id));
        entries.insert(place, entry);
    }

    /// Everything that ever was: entries, deleted ones too, newest first, with what happened to each.
    pub(super) fn truth(&self, person: usize) -> Vec<(Entry, Option<&Change>)> {
        let person = &self.people[person];
        let deleted = person.changes.values().filter_map(|change| Some((change.deleted.as_ref()?.1, Some(change))));
        let living = person.entries.iter().map(|entry| (*entry, person.changes.get(&entry.id)));
        let mut all: Vec<_> = living.chain(deleted).collect();
        all.sort_unstable_by_key(|(entry, _)| std::cmp::Reverse((entry.start, entry.id)));
        all
    }

    fn base(&self, person: usize, index: u64) -> Facts {
        // Some pairs begin at the same second: no keyset on the start alone may lose one.
        let at = if self.options.awkward && index % 50 == 49 { index - 1 } else { index };
        let jitter = Rng::of(&[self.seed, person as u64, at, 1]).below(60_000) as i64;
        let start = self.epoch - 4 * 3600 - at as i64 * DAY - jitter;
        let id = FIRST_ACTIVITY - index * self.step - person as u64;
        let mut facts = self.make(person, id, index, start);
        if self.options.awkward {
            self.make_awkward(&mut facts, index);
        }
        if self.options.very_long && index == 14 {
            facts.name = "Transkontinental 🚲 13 Tage".into();
            facts.sport = "Ride".into();
            (facts.elapsed, facts.moving, facts.points) = (1_100_000, 412_000, 45_000);
            (facts.distance, facts.gain) = (2_412_337.5, 31_870.0);
            (facts.manual, facts.indoor, facts.bare) = (false, false, false);
        }
        facts
    }

    fn make(&self, person: usize, id: u64, salt: u64, start: i64) -> Facts {
        let mut rng = Rng::of(&[self.seed, person as u64, salt, 2]);
        let sport = match rng.below(100) {
            0..34 => SPORTS[0],
            34..58 => SPORTS[1],
            58..66 => SPORTS[2],
            66..74 => SPORTS[3],
            _ => SPORTS[rng.below(SPORTS.len() as u64) as usize],
        };
        let (sport_type, _, style, speed) = sport;
        let moving = match self.options.stream_points {
            0 => 300 + rng.below(6900) as i64,
            // An hour or more, or as long as the points need at one a second.
            points => i64::from(points).max(600 + rng.below(6600) as i64),
        };
        let points = if self.options.stream_points == 0 { moving as u32 } else { self.options.stream_points };
        let pause = if rng.chance(0.6) { rng.below(900) as i64 } else { 0 };
        let distance = (speed * rng.between(0.85, 1.15) * moving as f64 * 10.0).round() / 10.0;
        let home = person % 7;
        let place = if rng.chance(0.9) { home } else { rng.below(PLACES.len() as u64) as usize };
        let manual = rng.chance(self.options.manual_share);
        let virtual_ride = sport_type == "VirtualRide";
        let indoor = manual || style == Style::Still || sport_type == "Swim" || rng.chance(0.04);
        let visibility = match rng.unit() {
            share if share < self.options.private_share => Visibility::OnlyMe,
            share if share < 0.5 => Visibility::Followers,
            _ => Visibility::Everyone,
        };
        let name = match NAMES[rng.below(NAMES.len() as u64) as usize] {
            plain @ ("Morning" | "Evening") => format!("{plain} {sport_type}"),
            name => name.to_owned(),
        };
        let gear = match style {
            Style::Bike => Some(format!("b{}", 9_012_345 + rng.below(2))),
            Style::Foot if rng.chance(0.8) => Some(format!("g{}", 21_004_417 + rng.below(2))),
            _ => None,
        };
        let described = rng.chance(0.3);
        Facts {
            id,
            athlete: athlete_id(person),
            name,
            sport: sport_type.to_owned(),
            start,
            place,
            moving,
            elapsed: moving + if manual { 0 } else { pause },
            distance,
            gain: if indoor && !virtual_ride { 0.0 } else { (distance * rng.between(0.0, 0.02)).round() },
            points,
            manual,
            visibility,
            hidden_start: false,
            indoor: indoor && !virtual_ride,
            virtual_ride,
            bare: false,
            heart_rate: !manual && rng.chance(0.85),
            power_meter: !manual && style == Style::Bike && rng.chance(0.5),
            temperature: !manual && !indoor && rng.chance(0.7),
            old: false,
            whole_as_int: rng.chance(0.5),
            gear,
            description: described.then(|| "3×1 km @ 4:05, dazwischen 400 m locker.\n\nBeine müde.".to_owned()),
            extra: Map::new(),
        }
    }

    fn make_awkward(&self, facts: &mut Facts, index: u64) {
        match index % 40 {
            7 => {
                facts.name = "Zwift - Climb Portal".into();
                facts.sport = "VirtualRide".into();
                (facts.indoor, facts.virtual_ride, facts.heart_rate) = (false, true, false);
            }
            11 => {
                facts.name = "Ein Gedi Nature Walk".into();
                facts.sport = "Walk".into();
                facts.place = JERUSALEM;
                facts.hidden_start = true;
                let local = facts.start + offsets(JERUSALEM, facts.start).0;
                facts.start = local.div_euclid(DAY) * DAY + 1;
                if self.options.private_share > 0.0 {
                    facts.visibility = Visibility::OnlyMe;
                }
            }
            13 => {
                facts.sport = "UnderwaterHockey".into();
                facts.place = KATHMANDU;
                // Time without movement, although there is a distance.
                (facts.distance, facts.moving, facts.elapsed) = (5010.0, 0, 1800);
                (facts.indoor, facts.points) = (true, facts.points.min(1800));
            }
            17 => facts.place = ST_JOHNS,
            19 => {
                (facts.elapsed, facts.moving, facts.distance, facts.gain, facts.points) = (0, 0, 0.0, 0.0, 1);
                facts.whole_as_int = index % 80 == 19;
            }
            23 => {
                facts.old = true;
                facts.sport = "Ride".into();
            }
            29 => {
                facts.bare = true;
                (facts.indoor, facts.heart_rate, facts.power_meter, facts.temperature) = (true, false, false, false);
                (facts.distance, facts.gain) = (0.0, 0.0);
            }
            31 => {
                let piece = "Lange Rede 🏔️,\n\t\"kurzer\" Sinn \\ اليوم جميل جدا – ";
                facts.description = Some(piece.chars().cycle().take(10_000).collect());
            }
            37 if index == 37 => {
                facts.sport = "Ride".into();
                facts.place = ZURICH;
                facts.indoor = false;
                facts.start = autumn_change(facts.start) - 5400;
                (facts.moving, facts.elapsed) = (10_000, 10_800);
                facts.points = facts.points.min(10_000);
            }
            _ => {}
        }
    }
}

fn athlete_id(person: usize) -> u64 {
    FIRST_ATHLETE + person as u64 * 7
}

/// The last European change to winter time (01:00 UTC) before an instant.
fn autumn_change(before: i64) -> i64 {
    let year = DateTime::from_timestamp(before, 0).unwrap_or_default().year();
    let change = |year: i32| {
        let last = NaiveDate::from_ymd_opt(year, 10, 31).unwrap_or_default();
        let sunday = last - chrono::Days::new(u64::from(last.weekday().num_days_from_sunday()));
        sunday.and_hms_opt(1, 0, 0).unwrap_or_default().and_utc().timestamp()
    };
    if change(year) < before { change(year) } else { change(year - 1) }
}
