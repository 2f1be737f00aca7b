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
        let pages = if shape == Shape::Postgres { size.of(8, 2) } else { size.of(16, 4) };
        let place = Place::new(shape).await;
        let db = place.db().await;
        db.migrate().await.expect("migrates");
        let claim = claim(&db).await;
        let mut rows = Rows::open(&place).await;
        let (mut chunked, mut plain) = (Duration::ZERO, Duration::ZERO);
        // In turns, so that whatever else the machine does meets both.
        for page in 0..pages {
            chunked += write_chunks(&db, &claim, page).await;
            plain += rows.write(page).await;
        }
        db.close().await;
        let samples = (pages * PAGE * POINTS * SERIES.len() as i64) as f64;
        let (chunked, plain) = (samples / chunked.as_secs_f64(), samples / plain.as_secs_f64());
        table.add(format!("samples as chunks, {name}"), chunked, "samples/s", Target::None);
        table.add(format!("samples as rows, {name}"), plain, "samples/s", Target::None);
        table.add(format!("samples: ratio, {name}"), chunked / plain, "", Target::AtLeast(least));
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

/// Cut, digest, one page.
async fn write_chunks(db: &Db, claim: &Claim, page: i64) -> Duration {
    let now = Clock::system().now();
    let records: Vec<_> = (page * PAGE..(page + 1) * PAGE).map(|n| (n, record(n))).collect();
    let begun = Instant::now();
    let page_seq = db.load_page_state(claim.fence.connection, &Default::default()).await.expect("reads").page_seq;
    let mut write = PageWrite { page_seq, ..PageWrite::default() };
    for (n, sets) in records {
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
    begun.elapsed()
}

fn record_write(id: RecordId, n: i64) -> RecordWrite {
    let at = DateTime::from_timestamp_millis(1_700_000_000_000 + n * 90_000_000).expect("in range");
    RecordWrite {
        id,
        is_new: true,
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

/// The table with a row per sample.
enum Rows {
    Postgres(sqlx::PgConnection),
    Sqlite(sqlx::SqliteConnection),
}

impl Rows {
    async fn open(place: &Place) -> Self {
        match place.shape {
            Shape::Postgres => {
                let mut own = sqlx::PgConnection::connect(&place.database).await.expect("connects");
                let sql = "create table bench_rows (source int, series int, at bigint, value double precision,
                    primary key (source, series, at))";
                own.execute(sql).await.expect("makes the table");
                Self::Postgres(own)
            }
            Shape::Sqlite => {
                // A file of its own: neither pays for the other's checkpoints.
                let url = format!("sqlite:{}?mode=rwc", place.dir.path().join("rows.db").display());
                let mut own = sqlx::SqliteConnection::connect(&url).await.expect("connects");
                let sql = "pragma journal_mode = wal; pragma synchronous = full;
                    create table bench_rows (source integer not null, series integer not null, at integer not null,
                        value real not null, primary key (source, series, at)) without rowid, strict";
                own.execute(sql).await.expect("makes the table");
                Self::Sqlite(own)
            }
        }
    }

    /// One transaction with the records of a page.
    async fn write(&mut self, page: i64) -> Duration {
        let sets: Vec<_> = (page * PAGE..(page + 1) * PAGE).flat_map(record).collect();
        let begun = Instant::now();
        match self {
            Self::Postgres(own) => {
                let sql = "insert into bench_rows select $1, $2, * from unnest($3::bigint[], $4::double precision[])
                    on conflict (source, series, at) do update set value = excluded.value
                    where bench_rows.value is distinct from excluded.value";
                let mut tx = own.begin().await.expect("begins");
                for set in sets {
                    let (at, values): (Vec<i64>, Vec<f64>) = set.samples.into_iter().unzip();
                    let series = i32::try_from(set.series.id).expect("is small");
                    let query = sqlx::query(sql).bind(1_i32).bind(series).bind(at).bind(values);
                    query.execute(&mut *tx).await.expect("inserts");
                }
                tx.commit().await.expect("commits");
            }
            Self::Sqlite(own) => {
                let mut tx = own.begin_with("BEGIN IMMEDIATE").await.expect("begins");
                for set in sets {
                    // The same text each time: it is prepared once.
                    let head = "insert into bench_rows (source, series, at, value) ";
                    let mut query = QueryBuilder::<sqlx::Sqlite>::new(head);
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
            }
        }
        begun.elapsed()
    }
}
