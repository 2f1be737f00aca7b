//! SQL that people may rely on: the queries of docs/data-model.md, and the view of samples.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use serde_json::json;
use sqlx::{Column as _, Connection as _, Row as _};
use wearsync::clock::Clock;
use wearsync::model::{RecordId, RunState};
use wearsync::simulator::Options;
use wearsync::storage::Db;

use crate::both;
use crate::support::{Shape, World, truth};

const DOCUMENT: &str = include_str!("../../docs/data-model.md");

both! {
    documented_queries_answer => queries;
    documented_tables_are_all_there_are => tables;
    samples_are_what_the_chunks_hold => samples;
    filters_reach_the_chunks => pushed_down;
}

/// A synced world that ends with the day before 2026-02-06, with an edit, a deletion and answers that do not exist.
async fn world(shape: Shape) -> World {
    let now: DateTime<Utc> = "2026-02-06T00:00:00Z".parse().expect("an instant");
    let options = Options {
        epoch: Some(now),
        activities: 60,
        stream_points: 120,
        athletes: 1,
        faults: vec!["404@streams=1/9*3".parse().expect("a fault")],
        ..Options::default()
    };
    let parts = [("WEARSYNC_PROVIDERS__STRAVA__PARTS", "streams,zones")];
    let world = World::with(shape, options, Clock::mock(now), &parts).await;
    let start = "2026-02-05T11:00:00Z";
    let upload = json!({"start": start, "sport_type": "Run", "name": "Lunch Run", "manual": false, "private": false});
    world.control("upload", upload).await;
    let run = world.sync().await;
    assert_eq!(run.run_state(), RunState::Success, "{run:?}");
    let truth = truth(&crate::support::client(), &world.sim.url(), 0).await;
    let mut newest: Vec<_> = truth.iter().filter(|(_, t)| !t.manual).collect();
    newest.sort_by_key(|(_, t)| std::cmp::Reverse(t.start));
    world.clock.set(now + chrono::Duration::hours(1));
    world.control("edit", json!({"id": newest[1].0, "name": "A new name"})).await;
    world.control("delete", json!({"id": newest[2].0})).await;
    let run = world.sync().await;
    assert_eq!(run.run_state(), RunState::Success, "{run:?}");
    world
}

/// Heading and dialect to query.
fn documented() -> BTreeMap<(&'static str, &'static str), &'static str> {
    let mut out = BTreeMap::new();
    for section in DOCUMENT.split("\n### ").skip(1) {
        let heading = section.lines().next().expect("a heading");
        for block in section.split("\n```sql ").skip(1) {
            let (dialect, rest) = block.split_once('\n').expect("a dialect");
            let (sql, _) = rest.split_once("\n```").expect("an end");
            let dialects: &[&str] = match dialect {
                "both" => &["sqlite", "postgres"],
                "sqlite" => &["sqlite"],
                "postgres" => &["postgres"],
                other => panic!("{heading}: unknown dialect {other}"),
            };
            for dialect in dialects {
                assert_eq!(out.insert((heading, *dialect), sql), None, "{heading}: two queries for {dialect}");
            }
        }
    }
    out
}

/// Column names and number of rows.
async fn run_sql(db: &Db, sql: &str) -> Result<(Vec<String>, usize), sqlx::Error> {
    macro_rules! run {
        ($pool:expr) => {{
            let rows = sqlx::query(&sql).fetch_all($pool).await?;
            let names = rows.first().map(|row| row.columns().iter().map(|c| c.name().to_owned()).collect());
            Ok((names.unwrap_or_default(), rows.len()))
        }};
    }
    match db {
        Db::Postgres(db) => run!(db.pool()),
        Db::Sqlite(db) => run!(db.pool()),
    }
}

async fn queries(shape: Shape) {
    let all = documented();
    let headings: BTreeSet<_> = all.keys().map(|(heading, _)| *heading).collect();
    assert_eq!(headings.len(), 10, "{headings:?}");
    assert_eq!(all.len(), 20, "a query lacks a dialect");
    let world = world(shape).await;
    let kind = world.engine.db.kind();
    for ((heading, dialect), sql) in &all {
        if *dialect != kind {
            continue;
        }
        let (names, rows) = run_sql(&world.engine.db, sql).await.unwrap_or_else(|e| panic!("{heading}: {e}\n{sql}"));
        assert!(rows > 0, "{heading}: no rows");
        // Both dialects answer the same columns: those that the query names, in its own words.
        for name in &names {
            let other = all[&(*heading, if kind == "sqlite" { "postgres" } else { "sqlite" })];
            assert!(!name.contains(['?', '(']) && other.contains(name.as_str()), "{heading}: column {name}");
        }
    }
}

async fn tables(shape: Shape) {
    let place = crate::support::Place::new(shape).await;
    let db = place.db().await;
    db.migrate().await.expect("migrates");
    let names: Vec<(String,)> = match &db {
        Db::Postgres(db) => {
            sqlx::query_as("select table_name::text from information_schema.tables where table_schema = 'public'")
                .fetch_all(db.pool())
                .await
                .expect("reads")
        }
        Db::Sqlite(db) => sqlx::query_as(
            "select name from sqlite_schema where type in ('table', 'view') and name not like 'sqlite_%'",
        )
        .fetch_all(db.pool())
        .await
        .expect("reads"),
    };
    let real: BTreeSet<&str> =
        names.iter().map(|(name,)| name.as_str()).filter(|name| *name != "_sqlx_migrations").collect();
    let told: BTreeSet<&str> =
        DOCUMENT.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`').map(|(name, _)| name)).collect();
    assert_eq!(real, told);
}

type Sample = (RecordId, String, i64, u64);
/// Record, series, first instant, deltas and values.
type Stored<D, V> = (RecordId, String, i64, D, V);

async fn samples(shape: Shape) {
    let world = world(shape).await;
    if let Db::Sqlite(_) = &world.engine.db {
        awkward_chunk(&world).await;
    } else {
        awkward_chunk_postgres(&world).await;
    }
    let mut expected: Vec<Sample> = Vec::new();
    let mut push = |record: RecordId, series: &str, first_at: i64, deltas: Vec<i32>, values: Vec<f64>| {
        assert_eq!(deltas.len(), values.len());
        let mut at = first_at;
        for (delta, value) in deltas.into_iter().zip(values) {
            at += i64::from(delta);
            expected.push((record, series.to_owned(), at, value.to_bits()));
        }
    };
    let chunks = "select c.record_id, t.name, c.first_at, c.deltas, c.vals from sample_chunks c
        join series_types t on t.id = c.series_type_id";
    let view = "select record_id, series, recorded_at, value from samples";
    let rows: Vec<(RecordId, String, DateTime<Utc>, f64)> = match &world.engine.db {
        Db::Postgres(db) => {
            let chunks: Vec<Stored<Vec<i32>, Vec<f64>>> =
                sqlx::query_as(chunks).fetch_all(db.pool()).await.expect("reads");
            chunks
                .into_iter()
                .for_each(|(record, series, at, deltas, values)| push(record, &series, at, deltas, values));
            sqlx::query_as(view).fetch_all(db.pool()).await.expect("reads")
        }
        Db::Sqlite(db) => {
            // Not serde_json: without its feature `float_roundtrip` it may be off by one in the last place.
            fn numbers<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> Vec<T> {
                text.trim_matches(['[', ']']).split(',').map(|n| n.parse().expect("a number")).collect()
            }
            let chunks: Vec<Stored<String, String>> = sqlx::query_as(chunks).fetch_all(db.pool()).await.expect("reads");
            chunks.into_iter().for_each(|(record, series, at, deltas, values)| {
                push(record, &series, at, numbers(&deltas), numbers(&values))
            });
            sqlx::query_as(view).fetch_all(db.pool()).await.expect("reads")
        }
    };
    let mut found: Vec<Sample> = rows
        .into_iter()
        .map(|(record, series, at, value)| {
            assert_eq!(at.timestamp_subsec_nanos() % 1_000_000, 0, "{at} is no whole millisecond");
            (record, series, at.timestamp_millis(), value.to_bits())
        })
        .collect();
    assert!(expected.len() > 20_000, "{}", expected.len());
    expected.sort();
    found.sort();
    assert_eq!(expected.len(), found.len());
    for (expected, found) in expected.iter().zip(&found) {
        assert_eq!(expected, found, "{} and {}", f64::from_bits(expected.3), f64::from_bits(found.3));
    }
}

/// Instants of every kind of millisecond, values with all their digits, before and after 1970.
fn awkward() -> impl Iterator<Item = (i64, Vec<i32>, Vec<f64>)> {
    [-86_399_877_i64, 1_770_249_600_001].into_iter().map(|first| {
        let deltas: Vec<i32> = (0..1500).map(|i| if i == 0 { 0 } else { 1 + i * 7 % 113 }).collect();
        let mut values: Vec<f64> = (0..1496).map(|i| (f64::from(i) * 0.731).sin() * 10f64.powi(i % 40 - 20)).collect();
        values.extend([0.0, 0.1 + 0.2, 1.0 / 3.0, 4.0f64.sqrt() / 7.0]);
        (first, deltas, values)
    })
}

async fn awkward_chunk(world: &World) {
    let path = world.place.data_dir().join("state/wearsync.db");
    let mut db = sqlx::SqliteConnection::connect(&format!("sqlite:{}", path.display())).await.expect("opens");
    for (first, deltas, values) in awkward() {
        sqlx::query(
            "insert into sample_chunks select id, 507, 0, $1, data_source_id, $1, null, 1500, 0, 0, 0, x'00', $2, $3
                from records where kind = 'workout' limit 1",
        )
        .bind(first)
        .bind(serde_json::to_string(&deltas).expect("JSON"))
        .bind(serde_json::to_string(&values).expect("JSON"))
        .execute(&mut db)
        .await
        .expect("inserts");
    }
}

async fn awkward_chunk_postgres(world: &World) {
    let Db::Postgres(db) = &world.engine.db else { return };
    for (first, deltas, values) in awkward() {
        sqlx::query(
            "insert into sample_chunks select id, 507, false, $1, data_source_id, $1, null, 1500, 0, 0, 0, '\\x00', $2, $3
                from records where kind = 'workout' limit 1",
        )
        .bind(first)
        .bind(deltas)
        .bind(values)
        .execute(db.pool())
        .await
        .expect("inserts");
    }
}

/// A filter or a join on what the view says of whole chunks is applied before anything is unpacked.
async fn pushed_down(shape: Shape) {
    let world = world(shape).await;
    let user = match shape {
        Shape::Sqlite => format!("x'{}'", world.user.0.simple()),
        Shape::Postgres => format!("'{}'", world.user.0),
    };
    let filters = [
        format!(
            "user_id = {user} and series = 'heart_rate' and chunk_first_at >= '2026-02-05T00:00:00.000Z'
            and chunk_first_at < '2026-02-06T00:00:00.000Z'"
        ),
        "record_id = (select id from records where kind = 'workout' order by start_at desc limit 1)".to_owned(),
    ];
    for filter in filters {
        let sql = format!("select recorded_at, value from samples where {filter}");
        let (_, rows) = run_sql(&world.engine.db, &sql).await.expect("reads");
        assert!(rows > 0, "{filter}: no rows");
        match &world.engine.db {
            Db::Sqlite(db) => {
                let plan: Vec<(i64, i64, i64, String)> =
                    sqlx::query_as(&format!("explain query plan {sql}")).fetch_all(db.pool()).await.expect("plans");
                let at =
                    |what: &str| plan.iter().position(|(_, parent, _, text)| *parent == 0 && text.starts_with(what));
                let (chunks, unpacked) = (at("SEARCH c USING"), at("SCAN e VIRTUAL TABLE"));
                assert!(chunks.is_some() && chunks < unpacked, "{filter}: {plan:#?}");
            }
            Db::Postgres(db) => {
                let sql = format!("explain (analyze, costs off, timing off, format text) {sql}");
                let plan: Vec<(String,)> = sqlx::query_as(&sql).fetch_all(db.pool()).await.expect("plans");
                let text = plan.iter().map(|(line,)| line.as_str()).collect::<Vec<_>>().join("\n");
                // `loops` of the unpacking is the number of chunks that were let through.
                let line =
                    plan.iter().map(|(line,)| line).find(|line| line.contains("Function Scan on u")).expect("unpacks");
                let loops: usize =
                    line.rsplit_once("loops=").and_then(|(_, n)| n.trim_end_matches(')').parse().ok()).expect("loops");
                assert!(loops <= 12, "{filter}: {text}");
            }
        }
    }
}
