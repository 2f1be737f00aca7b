//! Whole syncs: activities alone, activities with streams, and the second sync that finds nothing new.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::PathBuf;
use std::time::SystemTime;

use serde_json::Value;
use sqlx::Connection as _;

use crate::Size;
use crate::rig::{Rig, Took};
use crate::support::{Count, Shape, files, query};
use crate::table::{Table, Target};

const SHAPES: [(&str, Shape); 2] = [("SQLite", Shape::Sqlite), ("Postgres", Shape::Postgres)];
/// What a second sync must leave alone.
const KEPT: [&str; 4] = ["records", "workouts", "parts", "sample_chunks"];
/// Provider calls of a second sync that finds nothing new: the profile, the head of the list, and its empty end.
const LEAST_CALLS: u64 = 3;

/// 2 000 activities without streams, then the second sync.
pub(crate) async fn activities(size: Size, table: &mut Table) {
    let n = size.of(2000, 600);
    // Removed at the end, not in between: ext4 looks long for inodes right after many were freed.
    let mut places = Vec::new();
    for (name, shape) in SHAPES {
        let mut rig = Rig::new(shape, n, 0, "none").await;
        let took = rig.sync().await;
        let what = format!("sync of {n} activities, {name}");
        table.add(&what, f64::from(n) / took.seconds, "activities/s", Target::AtLeast(4500.0));
        tell(table, &what, &took, f64::from(n), "activity");
        second(&mut rig, name, table).await;
        places.push(rig);
    }
}

/// Where the time went: processor time of both sides, and the wait for each step.
fn tell(table: &mut Table, what: &str, took: &Took, n: f64, one: &str) {
    table.add(format!("{what}: CPU of wearsync"), took.cpu_ms / n, &format!("ms/{one}"), Target::None);
    if took.backends_ms > 0.0 {
        table.add(format!("{what}: CPU of Postgres"), took.backends_ms / n, &format!("ms/{one}"), Target::None);
    }
    let mut rest = took.seconds;
    for (step, seconds) in &took.steps {
        table.add(format!("{what}: {step}"), seconds * 1000.0 / n, &format!("ms/{one}"), Target::None);
        rest -= seconds;
    }
    table.add(format!("{what}: between the steps"), rest * 1000.0 / n, &format!("ms/{one}"), Target::None);
}

/// Syncs again, with kudos having grown meanwhile.
async fn second(rig: &mut Rig, name: &str, table: &mut Table) {
    let before = Writes::count(rig).await;
    rig.reopen("none").await;
    let stamps = stamps(rig);
    // Bounds of windows are whole seconds: within the same one there is nothing to ask for.
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    let took = rig.sync().await;
    rig.reopen("none").await;
    let written = Writes::count(rig).await.0 - before.0;
    let what = format!("second sync, {name}");
    table.add(format!("{what}: rows written"), written as f64, "", Target::AtMost(0.0));
    let touched = stamps_differ(&stamps, &self::stamps(rig));
    table.add(format!("{what}: files touched"), touched as f64, "", Target::AtMost(0.0));
    let more = took.report.calls as f64 - LEAST_CALLS as f64;
    table.add(format!("{what}: provider calls beyond the minimum"), more, "", Target::AtMost(2.0));
}

/// Rows inserted, updated and deleted so far in the tables that hold data.
struct Writes(i64);

impl Writes {
    /// Counts from the first call on (SQLite) or from the beginning (Postgres).
    async fn count(rig: &mut Rig) -> Self {
        rig.engine.db.close().await;
        let count = match rig.place.shape {
            Shape::Postgres => {
                let mut admin = sqlx::PgConnection::connect(&rig.place.database).await.expect("connects");
                // Whoever disconnects hands its counts in; it takes a moment.
                tokio::time::sleep(std::time::Duration::from_millis(500)).await;
                let tables: Vec<String> = KEPT.iter().map(|table| (*table).to_owned()).collect();
                let (n,): (i64,) = sqlx::query_as(
                    "select coalesce(sum(n_tup_ins + n_tup_upd + n_tup_del), 0)::bigint
                        from pg_stat_user_tables where relname = any($1)",
                )
                .bind(tables)
                .fetch_one(&mut admin)
                .await
                .expect("reads");
                n
            }
            Shape::Sqlite => {
                let path = rig.place.data_dir().join("state/wearsync.db");
                let url = format!("sqlite:{}", path.display());
                let mut own = sqlx::SqliteConnection::connect(&url).await.expect("connects");
                let mut script = "create table if not exists bench_writes (n integer not null);".to_owned();
                for table in KEPT {
                    for verb in ["insert", "update", "delete"] {
                        script.push_str(&format!(
                            "create trigger if not exists bench_{table}_{verb} after {verb} on {table}
                                begin insert into bench_writes values (1); end;"
                        ));
                    }
                }
                sqlx::raw_sql(&script).execute(&mut own).await.expect("makes triggers");
                let (n,): (i64,) =
                    sqlx::query_as("select count(*) from bench_writes").fetch_one(&mut own).await.expect("reads");
                own.close().await.expect("closes");
                n
            }
        };
        Self(count)
    }
}

fn stamps(rig: &Rig) -> BTreeMap<PathBuf, SystemTime> {
    let stamp = |path: &PathBuf| std::fs::metadata(path).and_then(|data| data.modified()).expect("a time");
    files(&rig.place.export_dir()).into_iter().map(|path| (path.clone(), stamp(&path))).collect()
}

fn stamps_differ(before: &BTreeMap<PathBuf, SystemTime>, after: &BTreeMap<PathBuf, SystemTime>) -> usize {
    let changed = after.iter().filter(|(path, stamp)| before.get(*path) != Some(*stamp)).count();
    changed + before.keys().filter(|path| !after.contains_key(*path)).count()
}

/// 709 activities with an hour of streams.
pub(crate) async fn streams(size: Size, table: &mut Table) {
    let n = size.of(709, 80);
    let mut places = Vec::new();
    for (name, shape) in SHAPES {
        let rig = Rig::new(shape, n, 3600, "streams").await;
        let took = rig.sync().await;
        let samples = took.report.samples as f64;
        let what = format!("sync of {n} activities with streams, {name}");
        eprintln!("  {samples} samples in {:.1} s", took.seconds);
        let cpu_s = (took.cpu_ms + took.backends_ms) / 1000.0;
        table.add(&what, samples / took.seconds, "samples/s", Target::None);
        table.add(format!("{what}: per core"), samples / cpu_s, "samples/CPU s", Target::AtLeast(1.0e6));
        tell(table, &what, &took, f64::from(n), "activity");
        let (bytes, most) = (chunk_bytes(&rig).await, if shape == Shape::Postgres { 5.0 } else { 14.0 });
        table.add(format!("chunks and their indexes, {name}"), bytes / samples, "bytes/sample", Target::AtMost(most));
        if shape == Shape::Sqlite {
            table.add("stored answers", part_bytes(&rig).await, "bytes/value", Target::AtMost(3.0));
        }
        places.push(rig);
    }
}

async fn chunk_bytes(rig: &Rig) -> f64 {
    let sql = match rig.place.shape {
        Shape::Postgres => "select pg_total_relation_size('sample_chunks') as n where $1::uuid is not null",
        Shape::Sqlite => {
            "select sum(pgsize) as n from dbstat where name in (select name from sqlite_schema
                where tbl_name = 'sample_chunks') and $1 is not null"
        }
    };
    query::<Count>(&rig.engine.db, sql, rig.connection).await[0].n as f64
}

/// Bytes kept per value received, over some answers.
async fn part_bytes(rig: &Rig) -> f64 {
    #[derive(sqlx::FromRow)]
    struct Body {
        body: Vec<u8>,
    }
    let sql = "select body from parts where connection_id = $1 and part = 'streams' and body is not null limit 40";
    let (mut bytes, mut values) = (0, 0);
    for row in query::<Body>(&rig.engine.db, sql, rig.connection).await {
        bytes += row.body.len();
        let mut text = String::new();
        zstd::stream::read::Decoder::new(row.body.as_slice()).expect("zstd").read_to_string(&mut text).expect("zstd");
        let answer: BTreeMap<String, Value> = serde_json::from_str(&text).expect("JSON");
        for stream in answer.values() {
            let data = stream["data"].as_array().expect("data");
            values += data.iter().map(|value| value.as_array().map_or(1, Vec::len)).sum::<usize>();
        }
    }
    bytes as f64 / values as f64
}
