use chrono::{DateTime, NaiveDate, Utc};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::model::units::{Metres, Seconds};
use crate::model::{BEGINNING_MS, Details, Kind, Lap, Record, Source, WindowState, Workout};

fn at(text: &str) -> DateTime<Utc> {
    text.parse().unwrap()
}

fn seed_activity(raw: &[u8]) -> EntityFile<'_> {
    EntityFile {
        id_raw: "123456",
        timestamp: at("2026-02-05T08:30:00Z"),
        local_time: None,
        provider_type: "run",
        workout_type: None,
        extracted: &[],
        raw,
        calculated: None,
        synced_at: at("2026-02-05T14:22:15Z"),
        revision: 1,
        updated_at: None,
    }
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap()
}

#[track_caller]
fn assert_valid(schema: &str, file: &[u8]) {
    let schema = match schema {
        "entity" => include_str!("../../docs/schemas/entity.schema.json"),
        "activity" => include_str!("../../docs/schemas/activity.schema.json"),
        "summary" => include_str!("../../docs/schemas/summary.schema.json"),
        "last_sync" => include_str!("../../docs/schemas/last_sync.schema.json"),
        "deleted" => include_str!("../../docs/schemas/deleted.schema.json"),
        other => panic!("no schema {other}"),
    };
    let schema: Value = serde_json::from_str(schema).unwrap();
    jsonschema::draft202012::meta::validate(&schema).unwrap();
    let validator = jsonschema::draft202012::new(&schema).unwrap();
    let file: Value = serde_json::from_slice(file).unwrap();
    let errors: Vec<_> = validator.iter_errors(&file).map(|e| format!("{} at {}", e, e.instance_path())).collect();
    assert!(errors.is_empty(), "{errors:?}");
    // The schema is no rubber stamp.
    assert!(!validator.is_valid(&json!({})));
}

/// The example of the convention: its members have exactly these values and this order.
#[test]
fn activity_file_of_the_convention() {
    let calculated = [("pace_s_per_km", json!(312.5))];
    let file = render(&EntityFile { calculated: Some(&calculated), ..seed_activity(br#"{"id":123456}"#) }).unwrap();
    assert_valid("entity", &file);
    assert_valid("activity", &file);
    assert_eq!(
        text(file),
        r#"{
  "id": 123456,
  "timestamp": "2026-02-05T08:30:00Z",
  "type": "run",
  "raw": {"id":123456},
  "calculated": {
    "pace_s_per_km": 312.5
  },
  "synced_at": "2026-02-05T14:22:15Z",
  "revision": 1,
  "format": 1
}
"#
    );
}

#[test]
fn every_member_in_its_place() {
    let record = Record {
        kind: Kind::Workout,
        external_id: "123456".into(),
        source: Source { device: Some("Watch".into()), ..Source::default() },
        provider_type: "run".into(),
        title: Some("Morning \"Run\"".into()),
        start_at: at("2026-02-05T08:30:00Z"),
        end_at: Some(at("2026-02-05T09:00:00.25Z")),
        utc_offset: chrono::FixedOffset::east_opt(3600),
        zone: Some("Europe/Berlin".into()),
        local_day: NaiveDate::from_ymd_opt(2026, 2, 5).unwrap(),
        updated_at: Some(at("2026-02-05T10:00:00Z")),
        details: Details::Workout(Box::new(Workout {
            workout_type: "running",
            elapsed: Seconds::new(1800.0),
            distance: Metres::new(5012.3),
            manual: Some(false),
            laps: vec![Lap { index: 1, elapsed_s: Some(1800.0), ..Lap::default() }],
            ..Workout::default()
        })),
    };
    let raw = b"{\n\t\"b\": 1.50, \"a\": 1e2,\r\n \"a\": 12345678901234567890123}";
    let extracted = fields(&record);
    let file = render(&EntityFile {
        id_raw: "\"b-1\"",
        local_time: record.local_start(),
        workout_type: Some("running"),
        extracted: &extracted,
        calculated: Some(&[]),
        revision: 2,
        updated_at: record.updated_at,
        ..seed_activity(raw)
    });
    let file = file.unwrap();
    assert_valid("activity", &file);
    let file = text(file);
    assert!(file.contains(&format!("\n  \"raw\": {},\n  \"calculated\": {{}},\n", std::str::from_utf8(raw).unwrap())));
    let (before, after) = file.split_once("  \"raw\"").unwrap();
    assert_eq!(
        before,
        r#"{
  "id": "b-1",
  "timestamp": "2026-02-05T08:30:00Z",
  "local_time": "2026-02-05T09:30:00",
  "type": "run",
  "workout_type": "running",
  "title": "Morning \"Run\"",
  "end": "2026-02-05T09:00:00.250Z",
  "utc_offset_s": 3600,
  "time_zone": "Europe/Berlin",
  "device": "Watch",
  "elapsed_s": 1800.0,
  "distance_m": 5012.3,
  "manual": false,
  "laps": [
    {
      "elapsed_s": 1800.0,
      "index": 1
    }
  ],
"#
    );
    let tail = "\"synced_at\": \"2026-02-05T14:22:15Z\",\n  \"revision\": 2,\n  \"updated_at\": \"2026-02-05T10:00:00Z\",\n  \"format\": 1\n}\n";
    assert!(after.ends_with(tail), "{after}");
}

#[test]
fn what_is_not_json_is_refused() {
    for raw in [&b""[..], b"\x0e\x10FIT", b"{\"a\":1", b"{} {}", b"\"\xff\"", b"{'a':1}", b"NaN"] {
        assert!(matches!(render(&seed_activity(raw)), Err(RenderError::NotJson(_))), "{raw:?}");
    }
    for id_raw in ["", "b123", "{}", "null", "1,2"] {
        let file = EntityFile { id_raw, ..seed_activity(b"{}") };
        assert!(matches!(render(&file), Err(RenderError::Id(_))), "{id_raw}");
    }
    let repeated = [("raw", json!(1))];
    assert!(render(&EntityFile { extracted: &repeated, ..seed_activity(b"{}") }).is_err());
}

#[test]
fn deleted_file_is_small() {
    let file = render_deleted(&DeletedFile {
        id_raw: "123456",
        timestamp: at("2026-02-05T08:30:00Z"),
        provider_type: "run",
        deleted_at: at("2026-03-01T00:00:00Z"),
    });
    let file = file.unwrap();
    assert_valid("deleted", &file);
    assert_eq!(
        text(file),
        r#"{
  "id": 123456,
  "timestamp": "2026-02-05T08:30:00Z",
  "type": "run",
  "deleted_at": "2026-03-01T00:00:00Z",
  "format": 1
}
"#
    );
}

#[test]
fn summary_of_the_convention() {
    let file = render_summary(&Summary {
        totals: &[("activities", 847)],
        distance_m: Some(3_241_480.0),
        dates: NaiveDate::from_ymd_opt(2020, 3, 15).zip(NaiveDate::from_ymd_opt(2026, 2, 6)),
        by_type: vec![("walk".into(), 26), ("run".into(), 523), ("ride".into(), 298)],
        last_sync: at("2026-02-06T14:22:15Z"),
    });
    let file = file.unwrap();
    assert_valid("summary", &file);
    assert_eq!(
        text(file),
        r#"{
  "total_activities": 847,
  "total_distance_km": 3241.5,
  "date_range": {
    "first": "2020-03-15",
    "last": "2026-02-06"
  },
  "by_type": {
    "run": 523,
    "ride": 298,
    "walk": 26
  },
  "last_sync": "2026-02-06T14:22:15Z"
}
"#
    );
}

#[test]
fn summary_of_nothing_and_of_more() {
    let empty = Summary {
        totals: &[("activities", 0), ("streams", 0)],
        distance_m: Some(0.0),
        dates: None,
        by_type: vec![("run".into(), 1), ("hike".into(), 1)],
        last_sync: at("2026-02-06T14:22:15Z"),
    };
    let file = render_summary(&empty).unwrap();
    assert_valid("summary", &file);
    assert_eq!(
        text(file),
        r#"{
  "total_activities": 0,
  "total_distance_km": 0.0,
  "by_type": {
    "hike": 1,
    "run": 1
  },
  "last_sync": "2026-02-06T14:22:15Z",
  "total_streams": 0
}
"#
    );
}

#[test]
fn last_sync_tells_how_far_every_stream_is() {
    use WindowState::{Done, Open};
    let head = at("2026-02-06T14:22:15Z").timestamp_millis();
    let middle = at("2026-01-01T00:00:00Z").timestamp_millis();
    let synced_at = at("2026-02-06T14:22:15Z");
    let render = |streams: &[(&str, &[CoverWindow])]| {
        let file = render_last_sync(&LastSync { synced_at, streams }).unwrap();
        assert_valid("last_sync", &file);
        text(file)
    };
    let done: &[_] = &[(middle - 1, head, Done), (BEGINNING_MS, middle, Done)];
    assert_eq!(
        render(&[("activities", done)]),
        r#"{
  "timestamp": 1770387735,
  "synced_at": "2026-02-06T14:22:15Z",
  "streams": {
    "activities": {
      "windows": [
        {
          "from": null,
          "to": "2026-01-01T00:00:00Z",
          "state": "done"
        },
        {
          "from": "2025-12-31T23:59:59.999Z",
          "to": "2026-02-06T14:22:15Z",
          "state": "done"
        }
      ]
    }
  }
}
"#
    );
    let timestamp = |streams: &[(&str, &[CoverWindow])]| {
        serde_json::from_str::<Value>(&render(streams)).unwrap()["timestamp"].clone()
    };
    assert_eq!(timestamp(&[("a", done), ("b", &[(BEGINNING_MS, middle, Done)])]), middle / 1000);
    assert_eq!(timestamp(&[("a", done), ("b", &[])]), 0);
    assert_eq!(timestamp(&[("a", &[(BEGINNING_MS, head, Open)])]), 0);
    assert_eq!(timestamp(&[]), synced_at.timestamp());
    // A gap ends what is complete.
    assert_eq!(complete_until(&[(BEGINNING_MS, 10, Done), (11, 20, Done)]), Some(10));
    assert_eq!(complete_until(&[(BEGINNING_MS, 10, Done), (5, 20, Done), (20, 30, Open)]), Some(20));
    assert_eq!(complete_until(&[(5, 20, Done)]), None);
}

/// JSON texts as providers might write them: odd numbers, repeated keys, escapes, white space.
fn json_text() -> impl Strategy<Value = String> {
    let string = "(\\PC|\\\\n|\\\\u00e9|\\\\ud83d){0,6}".prop_map(|s| s.replace('"', "\\\"").replace("\\ ", "_ "));
    let string = string.prop_filter_map("not a string", |s| {
        let text = format!("\"{s}\"");
        serde_json::from_str::<&serde_json::value::RawValue>(&text).is_ok().then_some(text)
    });
    let number = "-?(0|[1-9][0-9]{0,25})(\\.[0-9]{1,20})?([eE][+-]?[0-9]{1,4})?";
    let scalar = prop_oneof![Just("null".to_owned()), Just("true".to_owned()), number, string.clone()];
    let space = "[ \t\r\n]{0,3}";
    scalar.prop_recursive(4, 40, 5, move |inner| {
        let member = (string.clone(), space, inner.clone()).prop_map(|(k, s, v)| format!("{k}{s}:{s}{v}"));
        prop_oneof![
            (prop::collection::vec(inner, 0..5), space)
                .prop_map(|(v, s)| format!("[{s}{}{s}]", v.join(&format!("{s},")))),
            (prop::collection::vec(member, 0..5), space)
                .prop_map(|(v, s)| format!("{{{s}{}{s}}}", v.join(&format!(",{s}")))),
        ]
    })
}

proptest! {
    #[test]
    fn raw_is_byte_for_byte(raw in json_text(), before in "[ \r\n\t]{0,2}", after in "[ \r\n\t]{0,2}") {
        let received = format!("{before}{raw}{after}");
        let file = text(render(&seed_activity(received.as_bytes())).unwrap());
        prop_assert_eq!(
            file,
            format!(
                "{{\n  \"id\": 123456,\n  \"timestamp\": \"2026-02-05T08:30:00Z\",\n  \"type\": \"run\",\n  \"raw\": {raw},\n  \
                 \"synced_at\": \"2026-02-05T14:22:15Z\",\n  \"revision\": 1,\n  \"format\": 1\n}}\n"
            )
        );
    }
}

/// The examples of the documentation are what we write.
#[test]
fn examples_in_the_documentation_are_valid() {
    let page = include_str!("../../docs/files.md");
    let examples: Vec<&str> = page.split("```json\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert_eq!(examples.len(), 4);
    for (example, schema) in examples.into_iter().zip(["activity", "deleted", "summary", "last_sync"]) {
        assert_valid(schema, example.as_bytes());
    }
}
