use chrono::{DateTime, NaiveDateTime, SecondsFormat, Utc};
use serde::ser::{Error as _, SerializeMap};
use serde::{Serialize, Serializer};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::model::{Details, Record, Workout};

/// The version of the file format, in the member `format`. Rises when a member changes its meaning, not when one is
/// added.
pub const FORMAT: u32 = 1;

/// What one entity file says. Members are written in this order; those that are `None` are absent.
#[derive(Clone, Debug)]
pub struct EntityFile<'a> {
    /// The provider's id as a JSON token, as sent: `123456` or `"b123"`.
    pub id_raw: &'a str,
    /// When it happened.
    pub timestamp: DateTime<Utc>,
    /// The same on the wall clock of the place.
    pub local_time: Option<NaiveDateTime>,
    /// The provider's own type in kebab case (`run`).
    pub provider_type: &'a str,
    /// The unified type (`running`).
    pub workout_type: Option<&'a str>,
    /// Fields extracted for convenience, for example by [`fields`]; names apart from the members of the file.
    pub extracted: &'a [(&'a str, Value)],
    /// The part's text as received. White space around the value is not part of it.
    pub raw: &'a [u8],
    /// Values computed from this record alone.
    pub calculated: Option<&'a [(&'a str, Value)]>,
    /// When this revision was first stored.
    pub synced_at: DateTime<Utc>,
    /// From 1.
    pub revision: i64,
    /// When the provider says that it was last changed.
    pub updated_at: Option<DateTime<Utc>>,
}

/// What the file of a deleted record says.
#[derive(Clone, Debug)]
pub struct DeletedFile<'a> {
    /// The provider's id as a JSON token, as sent.
    pub id_raw: &'a str,
    /// When it happened.
    pub timestamp: DateTime<Utc>,
    /// The provider's own type in kebab case.
    pub provider_type: &'a str,
    /// When we knew that it is gone.
    pub deleted_at: DateTime<Utc>,
}

/// Why a file cannot be rendered.
#[derive(Debug, thiserror::Error)]
pub enum RenderError {
    /// The id is not a JSON number or string.
    #[error("the id {0:?} is not a JSON number or string")]
    Id(String),
    /// The part is not JSON in UTF-8: such parts are kept as files of their own sort.
    #[error("the answer is not JSON: {0}")]
    NotJson(#[source] serde_json::Error),
    /// A member could not be written.
    #[error("cannot write the file's text: {0}")]
    Write(#[source] serde_json::Error),
}

/// The bytes of an entity file: two-space indent, the raw text verbatim, a newline at the end.
///
/// # Errors
/// If the id is no JSON number or string, or the part no JSON.
pub fn render(file: &EntityFile<'_>) -> Result<Vec<u8>, RenderError> {
    let raw: &RawValue = serde_json::from_slice(file.raw).map_err(RenderError::NotJson)?;
    let body = Body { id: id(file.id_raw)?, raw, file };
    // Everything but `raw` is about 1 KiB for an activity; one allocation holds it all.
    pretty(&body, file.raw.len() + 2048).map_err(RenderError::Write)
}

/// The bytes of the file that says that a record is gone.
///
/// # Errors
/// If the id is no JSON number or string.
pub fn render_deleted(file: &DeletedFile<'_>) -> Result<Vec<u8>, RenderError> {
    #[derive(Serialize)]
    struct Body<'a> {
        id: &'a RawValue,
        timestamp: Iso,
        r#type: &'a str,
        deleted_at: Iso,
        format: u32,
    }
    let body = Body {
        id: id(file.id_raw)?,
        timestamp: Iso(file.timestamp),
        r#type: file.provider_type,
        deleted_at: Iso(file.deleted_at),
        format: FORMAT,
    };
    pretty(&body, 256).map_err(RenderError::Write)
}

/// The fields of a record that its file shows beside the raw text, units in their names. What the provider did not
/// tell is absent.
#[must_use]
pub fn fields(record: &Record) -> Vec<(&'static str, Value)> {
    let mut out = Fields(Vec::with_capacity(32));
    out.add("title", record.title.as_deref());
    out.add("end", record.end_at.map(Iso));
    out.add("utc_offset_s", record.utc_offset.map(|offset| offset.local_minus_utc()));
    out.add("time_zone", record.zone.as_deref());
    out.add("device", record.source.device.as_deref());
    out.add("writer", record.source.writer.as_deref());
    if let Details::Workout(workout) = &record.details {
        out.workout(workout);
    }
    out.0
}

struct Fields(Vec<(&'static str, Value)>);

impl Fields {
    fn add(&mut self, name: &'static str, value: Option<impl Serialize>) {
        // Text and finite numbers always become values.
        if let Some(Ok(value)) = value.map(serde_json::to_value) {
            self.0.push((name, value));
        }
    }

    /// What is not told is absent inside as well.
    fn list<T: Serialize>(&mut self, name: &'static str, items: &[T]) {
        let mut items: Vec<Value> = items.iter().filter_map(|item| serde_json::to_value(item).ok()).collect();
        for item in items.iter_mut().filter_map(Value::as_object_mut) {
            item.retain(|_, value| !value.is_null());
        }
        if !items.is_empty() {
            self.0.push((name, items.into()));
        }
    }

    fn workout(&mut self, w: &Workout) {
        self.add("elapsed_s", w.elapsed);
        self.add("moving_s", w.moving);
        self.add("distance_m", w.distance);
        self.add("ascent_m", w.ascent);
        self.add("elevation_high_m", w.elevation_high);
        self.add("elevation_low_m", w.elevation_low);
        self.add("average_speed_m_per_s", w.average_speed);
        self.add("max_speed_m_per_s", w.max_speed);
        self.add("average_heart_rate_bpm", w.average_heart_rate);
        self.add("max_heart_rate_bpm", w.max_heart_rate);
        self.add("average_cadence_per_min", w.average_cadence);
        self.add("average_power_w", w.average_power);
        self.add("max_power_w", w.max_power);
        self.add("weighted_power_w", w.weighted_power);
        self.add("power_measured", w.power_measured);
        self.add("work_kj", w.work);
        self.add("energy_kcal", w.energy);
        self.add("energy_estimated", (w.energy.is_some() && w.energy_estimated).then_some(true));
        self.add("average_temperature_c", w.average_temperature);
        self.add("start_latitude", w.start_latitude);
        self.add("start_longitude", w.start_longitude);
        self.add("gear_id", w.gear_id.as_deref());
        self.add("manual", w.manual);
        self.list("laps", &w.laps);
        self.list("heart_rate_zones", &w.heart_rate_zones);
        self.list("power_zones", &w.power_zones);
        self.list("pace_zones", &w.pace_zones);
    }
}

fn id(token: &str) -> Result<&RawValue, RenderError> {
    let wrong = || RenderError::Id(token.chars().take(80).collect());
    let id: &RawValue = serde_json::from_str(token).map_err(|_| wrong())?;
    let simple = id.get().starts_with(|c: char| c == '"' || c == '-' || c.is_ascii_digit());
    if simple { Ok(id) } else { Err(wrong()) }
}

/// Two-space indent and a newline at the end. Raw values are written as they are.
pub(super) fn pretty(value: &impl Serialize, capacity: usize) -> Result<Vec<u8>, serde_json::Error> {
    let mut out = Vec::with_capacity(capacity);
    serde_json::to_writer_pretty(&mut out, value)?;
    out.push(b'\n');
    Ok(out)
}

/// `2026-02-05T08:30:00Z`; a fraction only when it is not zero.
pub(super) struct Iso(pub(super) DateTime<Utc>);

impl Serialize for Iso {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0.to_rfc3339_opts(SecondsFormat::AutoSi, true))
    }
}

/// Names and values in the order given.
pub(super) struct Members<'a>(pub(super) &'a [(&'a str, Value)]);

impl Serialize for Members<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}

struct Body<'a> {
    id: &'a RawValue,
    raw: &'a RawValue,
    file: &'a EntityFile<'a>,
}

/// The members of the file itself, which extracted fields must not repeat.
const MEMBERS: [&str; 11] = [
    "id",
    "timestamp",
    "local_time",
    "type",
    "workout_type",
    "raw",
    "calculated",
    "synced_at",
    "revision",
    "updated_at",
    "format",
];

impl Serialize for Body<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let file = self.file;
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("id", self.id)?;
        map.serialize_entry("timestamp", &Iso(file.timestamp))?;
        if let Some(local) = file.local_time {
            map.serialize_entry("local_time", &local)?;
        }
        map.serialize_entry("type", file.provider_type)?;
        if let Some(workout_type) = file.workout_type {
            map.serialize_entry("workout_type", workout_type)?;
        }
        for (name, value) in file.extracted {
            if MEMBERS.contains(name) {
                return Err(S::Error::custom(format_args!("extracted field {name} repeats a member of the file")));
            }
            map.serialize_entry(name, value)?;
        }
        map.serialize_entry("raw", self.raw)?;
        if let Some(calculated) = file.calculated {
            map.serialize_entry("calculated", &Members(calculated))?;
        }
        map.serialize_entry("synced_at", &Iso(file.synced_at))?;
        map.serialize_entry("revision", &file.revision)?;
        if let Some(updated) = file.updated_at {
            map.serialize_entry("updated_at", &Iso(updated))?;
        }
        map.serialize_entry("format", &FORMAT)?;
        map.end()
    }
}
