//! The storage of samples alone: chunks through `commit_page` against a row per sample, the same data in one run.
//!
//! The row table is the best that could be thought of: the narrowest columns, instants as integers, no secondary index,
//! large upserts (arrays in Postgres, as many rows as binds allow in SQLite) that leave equal values alone, one
//! transaction per page of records as the chunks have.

use std::time::{Duration, Instant};

use chrono::DateTime;
use sqlx::{Connection as _, Executor as _, QueryBuilder};
use wearsync::clock::Clock;
use wearsync::model::{
    Class, Details, Kind, Record, RecordId, RunSource, SampleSet, SeriesType, Source, Workout, chunks, series,
};
use wearsync::storage::{ChunkWrite, Claim, Db, NewRun, NewUser, PageWrite, RecordWrite};

use crate::Size;
use crate::support::{Place, Shape};
use crate::table::{Table, Target};

const POINTS: i64 = 3600;
/// Records of one transaction, either way: less than 4 MiB of arrays.
const PAGE: i64 = 8;
const SERIES: [SeriesType; 8] = [
    series::HEART_RATE,
    series::SPEED,
    series::CADENCE,
    series::POWER,
    series::ELEVATION,
    series::LATITUDE,
    series::LONGITUDE,
    series::AIR_TEMPERATURE,
];

pub(crate) async fn run(size: Size, table: &mut Table) {
    for (name, shape, least) in [("Postgres", Shape::Postgres, 20.0), ("SQLite", Shape::Sqlite, 8.0)] {
        let place = Place::new(shape).await;
        let db = place.db().await;
        db.migrate().await.expect("migrates");
        let chunked = as_chunks(&db, size.of(160, 40)).await;
        db.close().await;
        // Fewer records suffice for the slow way; the more there are, the slower it gets.
        let rows = match shape {
            Shape::Postgres => as_postgres_rows(&place, size.of(24, 8)).await,
            Shape::Sqlite => as_sqlite_rows(&place, size.of(80, 24)).await,
        };
        table.add(format!("samples as chunks, {name}"), chunked, "samples/s", Target::None);
        table.add(format!("samples as rows, {name}"), rows, "samples/s", Target::None);
        table.add(format!("samples: ratio, {name}"), chunked / rows, "", Target::AtLeast(least));
    }
}

/// An hour of eight series, one value a second, with the digits that providers send.
fn record(n: i64) -> Vec<SampleSet> {
    let start = 1_700_000_000_000 + n * 90_000_000;
    let start = start - start.rem_euclid(86_400_000) + 3_600_000;
    SERIES
        .into_iter()
        .map(|series| {
            let value = |i: i64| {
                let wave = ((i + n) as f64 / 60.0).sin();
                let noise = ((i * 7919 + n * 104_729) % 1000) as f64 / 1000.0;
                match series {
                    series::HEART_RATE => (140.0 + 20.0 * wave + 3.0 * noise).round(),
                    series::SPEED => ((3.0 + wave + 0.2 * noise) * 1000.0).round() / 1000.0,
                    series::CADENCE => (85.0 + 4.0 * wave + 2.0 * noise).round(),
                    series::POWER => (220.0 + 60.0 * wave + 40.0 * noise).round(),
                    series::ELEVATION => ((500.0 + 30.0 * wave) * 10.0).round() / 10.0,
                    series::LATITUDE => ((47.0 + i as f64 * 2.3e-5 + noise * 1e-5) * 1e6).round() / 1e6,
                    series::LONGITUDE => ((7.4 + i as f64 * 1.7e-5 + noise * 1e-5) * 1e6).round() / 1e6,
                    _ => 18.0 + (i / 600) as f64,
                }
            };
            let samples = (0..POINTS).map(|i| (start + i * 1000, value(i))).collect();
            SampleSet { series, total: false, utc_offset: None, samples }
        })
        .collect()
}

/// Samples a second: cut, digest, one page per record.
async fn as_chunks(db: &Db, records: i64) -> f64 {
    let claim = claim(db).await;
    let now = Clock::system().now();
    let mut spent = Duration::ZERO;
    for page in 0..records / PAGE {
        let sets: Vec<_> = (0..PAGE).map(|n| (page * PAGE + n, record(page * PAGE + n))).collect();
        let begun = Instant::now();
        let page_seq = db.load_page_state(claim.fence.connection, &Default::default()).await.expect("reads").page_seq;
        let mut write = PageWrite { page_seq, ..PageWrite::default() };
        for (n, sets) in sets {
            let id = RecordId::new();
            let list = sets.into_iter().flat_map(chunks).map(|chunk| {
                let hash = chunk.hash();
                (chunk, hash)
            });
            write.records.push(record_write(id, n));
            let (source, chunks) = (Source::default(), list.collect());
            write.chunks.push(ChunkWrite { record: id, source, is_new: true, chunks });
        }
        db.commit_page(&claim.fence, &write, now, now + chrono::Duration::hours(1)).await.expect("commits");
        spent += begun.elapsed();
    }
    (records * POINTS * SERIES.len() as i64) as f64 / spent.as_secs_f64()
}

fn record_write(id: RecordId, n: i64) -> RecordWrite {
    let at = DateTime::from_timestamp_millis(1_700_000_000_000 + n * 90_000_000).expect("in range");
    RecordWrite {
        id,
        record: Record {
            kind: Kind::Workout,
            external_id: n.to_string(),
            source: Source::default(),
            provider_type: "run".to_owned(),
            title: None,
            start_at: at,
            end_at: None,
            utc_offset: None,
            zone: None,
            local_day: at.date_naive(),
            updated_at: None,
            details: Details::Workout(Box::new(Workout { workout_type: "running", ..Workout::default() })),
        },
        hash: vec![0; 16],
        shape: 0,
        revision: 1,
        provisional: false,
        stem: format!("{n}"),
        stored_at: at,
    }
}

/// A run in hand, for somebody new.
async fn claim(db: &Db) -> Claim {
    let now = Clock::system().now();
    let user = db.insert_user(NewUser::default(), now).await.expect("a user").id;
    let account = wearsync::storage::NewAccount {
        id: wearsync::model::AccountId::new(),
        provider: "strava".to_owned(),
        client_id: "1".to_owned(),
        provider_user_id: "1".to_owned(),
        imported_hash: None,
    };
    let account = db.upsert_account(account, now).await.expect("an account").id;
    let connection = db.connect(user, account, "strava", now).await.expect("connects");
    let new = NewRun {
        connection,
        class: Class::Interactive,
        source: RunSource::Pull,
        request: "{}".to_owned(),
        request_key: "bench".to_owned(),
    };
    let run = db.insert_run(new, now).await.expect("accepts").expect("is active").id;
    let until = now + chrono::Duration::hours(1);
    db.claim_run(run, "bench", now, until).await.expect("claims").expect("is free")
}

async fn as_postgres_rows(place: &Place, records: i64) -> f64 {
    let mut own = sqlx::PgConnection::connect(&place.database).await.expect("connects");
    own.execute(
        "create table bench_rows (source int, series int, at bigint, value double precision,
            primary key (source, series, at))",
    )
    .await
    .expect("makes the table");
    let sql = "insert into bench_rows select $1, $2, * from unnest($3::bigint[], $4::double precision[])
        on conflict (source, series, at) do update set value = excluded.value
        where bench_rows.value is distinct from excluded.value";
    let mut spent = Duration::ZERO;
    for page in 0..records / PAGE {
        let sets: Vec<_> = (0..PAGE).flat_map(|n| record(page * PAGE + n)).collect();
        let begun = Instant::now();
        let mut tx = own.begin().await.expect("begins");
        for set in sets {
            let (at, values): (Vec<i64>, Vec<f64>) = set.samples.into_iter().unzip();
            let series = i32::try_from(set.series.id).expect("is small");
            sqlx::query(sql).bind(1_i32).bind(series).bind(at).bind(values).execute(&mut *tx).await.expect("inserts");
        }
        tx.commit().await.expect("commits");
        spent += begun.elapsed();
    }
    (records * POINTS * SERIES.len() as i64) as f64 / spent.as_secs_f64()
}

async fn as_sqlite_rows(place: &Place, records: i64) -> f64 {
    let url = format!("sqlite:{}", place.data_dir().join("state/wearsync.db").display());
    let mut own = sqlx::SqliteConnection::connect(&url).await.expect("connects");
    own.execute(
        "pragma journal_mode = wal; pragma synchronous = full;
        create table bench_rows (source integer not null, series integer not null, at integer not null,
            value real not null, primary key (source, series, at)) without rowid, strict",
    )
    .await
    .expect("makes the table");
    let mut spent = Duration::ZERO;
    for page in 0..records / PAGE {
        let sets: Vec<_> = (0..PAGE).flat_map(|n| record(page * PAGE + n)).collect();
        let begun = Instant::now();
        let mut tx = own.begin_with("BEGIN IMMEDIATE").await.expect("begins");
        for set in sets {
            // The same text each time: it is prepared once.
            let mut query = QueryBuilder::<sqlx::Sqlite>::new("insert into bench_rows (source, series, at, value) ");
            query.push_values(&set.samples, |mut row, (at, value)| {
                row.push_bind(1_i64).push_bind(set.series.id).push_bind(at).push_bind(value);
            });
            query.push(
                " on conflict (source, series, at) do update set value = excluded.value
                    where bench_rows.value is not excluded.value",
            );
            query.build().execute(&mut *tx).await.expect("inserts");
        }
        tx.commit().await.expect("commits");
        spent += begun.elapsed();
    }
    (records * POINTS * SERIES.len() as i64) as f64 / spent.as_secs_f64()
}
