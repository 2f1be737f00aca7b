//! What tests stand on: a fresh database per test on either back end, the simulator, an engine, and the oracle that
//! compares rows and files with what the simulator issued.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part of it")]

pub mod stream;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use sqlx::Connection as _;
use tempfile::TempDir;
use wearsync::clock::Clock;
use wearsync::config::{Config, Database};
use wearsync::coordination::Coordination;
use wearsync::export::Folder;
use wearsync::model::{Class, ConnectionId, RunId, RunSource, SyncRequest, UserId};
use wearsync::simulator::{self, Options, Running};
use wearsync::storage::{Db, NewUser, Run};
use wearsync::sync::{self, Engine, Exporter};
use wearsync::vault::Vault;

/// One of the two shapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// SQLite, everything in one process.
    Sqlite,
    /// Postgres and Redis.
    Postgres,
}

pub const SECRET_KEY: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";

/// Runs one async test body on both shapes, as two tests.
#[macro_export]
macro_rules! both {
    ($($(#[$meta:meta])* $name:ident => $body:path;)*) => {$(
        mod $name {
            use super::*;

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            $(#[$meta])*
            async fn sqlite() {
                $body($crate::support::Shape::Sqlite).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            $(#[$meta])*
            async fn postgres() {
                $body($crate::support::Shape::Postgres).await;
            }
        }
    )*};
}

fn needed(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run the tests with scripts/test, which sets it"))
}

/// Databases and Redis keys of one test; gone when it ends.
pub struct Place {
    pub shape: Shape,
    pub dir: TempDir,
    pub database: String,
    pub redis: Option<(String, String)>,
}

impl Place {
    pub async fn new(shape: Shape) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let (database, redis) = match shape {
            Shape::Sqlite => (format!("sqlite:{}", dir.path().join("data/state/wearsync.db").display()), None),
            Shape::Postgres => {
                let base = needed("TEST_DATABASE_URL");
                let name = format!("ws_test_{}", uuid::Uuid::now_v7().simple());
                let mut admin = sqlx::PgConnection::connect(&base).await.expect("TEST_DATABASE_URL answers");
                sqlx::query(&format!("create database {name}"))
                    .execute(&mut admin)
                    .await
                    .expect("may create databases");
                let mut url = url::Url::parse(&base).expect("TEST_DATABASE_URL is an address");
                url.set_path(&name);
                (url.to_string(), Some((needed("TEST_REDIS_URL"), name)))
            }
        };
        Self { shape, dir, database, redis }
    }

    pub fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub fn export_dir(&self) -> PathBuf {
        self.data_dir().join("exports")
    }

    /// The environment of a process of this place, reading from a simulator.
    pub fn env(&self, simulator: &str) -> BTreeMap<String, String> {
        let mut env = BTreeMap::from([
            ("DATABASE_URL".to_owned(), self.database.clone()),
            ("WEARSYNC_DATA_DIR".to_owned(), self.data_dir().display().to_string()),
            ("WEARSYNC_BIND".to_owned(), "127.0.0.1:0".to_owned()),
            ("WEARSYNC_PROVIDERS__STRAVA__CLIENT_ID".to_owned(), "90417".to_owned()),
            ("WEARSYNC_PROVIDERS__STRAVA__CLIENT_SECRET".to_owned(), "simulated-secret".to_owned()),
            ("WEARSYNC_PROVIDERS__STRAVA__API_BASE_URL".to_owned(), format!("{simulator}/api/v3")),
            ("WEARSYNC_PROVIDERS__STRAVA__AUTHORIZE_URL".to_owned(), format!("{simulator}/oauth/authorize")),
            ("WEARSYNC_PROVIDERS__STRAVA__TOKEN_URL".to_owned(), format!("{simulator}/oauth/token")),
            ("WEARSYNC_PROVIDERS__STRAVA__QUOTA".to_owned(), "off".to_owned()),
            // Tests that want the clock to begin something say so.
            ("WEARSYNC_SCHEDULE".to_owned(), "off".to_owned()),
            ("WEARSYNC_LOG".to_owned(), "warn".to_owned()),
        ]);
        // A small pool per process: many tests share one server.
        env.insert("WEARSYNC_DATABASE_CONNECTIONS".to_owned(), "4".to_owned());
        if let Some((url, prefix)) = &self.redis {
            env.insert("REDIS_URL".to_owned(), url.clone());
            env.insert("WEARSYNC_REDIS_PREFIX".to_owned(), prefix.clone());
            env.insert("WEARSYNC_SECRET_KEY".to_owned(), SECRET_KEY.to_owned());
        }
        env
    }

    pub async fn db(&self) -> Db {
        match self.shape {
            Shape::Sqlite => {
                let path = self.data_dir().join("state/wearsync.db");
                std::fs::create_dir_all(path.parent().expect("has a parent")).expect("can be made");
                Db::sqlite(&path).await.expect("opens")
            }
            Shape::Postgres => Db::postgres(&self.database, 4).await.expect("opens"),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some((_, name)) = &self.redis else { return };
        let (base, name) = (needed("TEST_DATABASE_URL"), name.clone());
        // A thread of its own: the test's runtime may be gone.
        let _ = std::thread::spawn(move || {
            let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
            runtime.block_on(async {
                if let Ok(mut admin) = sqlx::PgConnection::connect(&base).await {
                    let drop = format!("drop database if exists {name} with (force)");
                    let _ = sqlx::query(&drop).execute(&mut admin).await;
                }
            });
        })
        .join();
    }
}

/// A simulator, an engine beside it, and one connected user.
pub struct World {
    pub engine: Arc<Engine>,
    pub sim: Running,
    pub clock: Clock,
    pub user: UserId,
    pub connection: ConnectionId,
    pub place: Place,
    http: reqwest::Client,
}

impl World {
    pub async fn new(shape: Shape, options: Options) -> Self {
        Self::with(shape, options, Clock::system(), &[]).await
    }

    pub async fn with(shape: Shape, options: Options, clock: Clock, settings: &[(&str, &str)]) -> Self {
        let place = Place::new(shape).await;
        let sim = simulator::start(options, clock.clone()).await.expect("the simulator starts");
        let engine = engine(&place, &sim.url(), clock.clone(), settings).await;
        let user = engine.db.insert_user(NewUser::default(), clock.now()).await.expect("a user").id;
        let mut world = Self { engine, sim, clock, user, connection: ConnectionId::new(), place, http: client() };
        world.connection = world.connect(user, 0).await;
        world
    }

    pub async fn connect(&self, user: UserId, athlete: u32) -> ConnectionId {
        let grant = self.control("grant", json!({ "athlete": athlete })).await;
        let token = sync::secret(grant["refresh_token"].as_str().expect("a token"));
        let setup = self.engine.provider("strava").expect("strava");
        sync::connect_with_grant(&self.engine, setup, user, &token, None, None).await.expect("connects")
    }

    pub async fn control(&self, path: &str, body: Value) -> Value {
        post(&self.http, &format!("{}/_simulator/{path}", self.sim.url()), &body).await
    }

    pub async fn ask(&self, path: &str) -> Value {
        get(&self.http, &format!("{}/_simulator/{path}", self.sim.url())).await
    }

    pub async fn accept(&self, request: &SyncRequest) -> RunId {
        let setup = self.engine.provider("strava").expect("strava");
        let class = Class::Interactive;
        let accepted = sync::submit(&self.engine, setup, self.connection, request, class, RunSource::Pull, None)
            .await
            .expect("accepts");
        accepted.expect("is active").id
    }

    /// Executes one run to its end; waits for put-backs by the clock.
    pub async fn sync_with(&self, request: &SyncRequest) -> Run {
        let id = self.accept(request).await;
        self.finish(id).await
    }

    pub async fn sync(&self) -> Run {
        self.sync_with(&SyncRequest::default()).await
    }

    pub async fn finish(&self, id: RunId) -> Run {
        for _ in 0..200 {
            sync::execute(&self.engine, id).await.expect("executes");
            let run = self.run(id).await;
            if run.run_state().is_final() {
                return run;
            }
            if matches!(self.clock, Clock::Mock(_)) {
                self.clock.set(run.due_at + chrono::Duration::milliseconds(1));
            } else {
                self.clock.sleep_until(run.due_at).await;
            }
        }
        panic!("the run does not end: {:?}", self.run(id).await);
    }

    pub async fn run(&self, id: RunId) -> Run {
        self.engine.db.find_run(id).await.expect("reads").expect("is there")
    }

    /// Rows and files are exactly what the simulator issued.
    pub async fn check(&self) {
        let truth = truth(&self.http, &self.sim.url(), 0).await;
        check(&self.engine.db, self.connection, &truth, &self.place.export_dir()).await;
    }
}

pub fn client() -> reqwest::Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().timeout(std::time::Duration::from_secs(30)).build().expect("a client")
}

pub async fn post(http: &reqwest::Client, url: &str, body: &Value) -> Value {
    let answer = http.post(url).json(body).send().await.expect("answers");
    let status = answer.status();
    let text = answer.text().await.expect("has a body");
    assert!(status.is_success(), "{url}: {status} {text}");
    serde_json::from_str(&text).unwrap_or(Value::Null)
}

pub async fn get(http: &reqwest::Client, url: &str) -> Value {
    let answer = http.get(url).send().await.expect("answers");
    let status = answer.status();
    let text = answer.text().await.expect("has a body");
    assert!(status.is_success(), "{url}: {status} {text}");
    serde_json::from_str(&text).expect("is JSON")
}

pub async fn engine(place: &Place, simulator: &str, clock: Clock, settings: &[(&str, &str)]) -> Arc<Engine> {
    build(place, simulator, clock, settings, true).await
}

/// An engine that accepts and never writes a file: beside processes that work.
pub async fn engine_without_files(place: &Place, simulator: &str) -> Arc<Engine> {
    build(place, simulator, Clock::system(), &[], false).await
}

async fn build(place: &Place, simulator: &str, clock: Clock, settings: &[(&str, &str)], files: bool) -> Arc<Engine> {
    let mut env = place.env(simulator);
    for (name, value) in settings {
        env.insert((*name).to_owned(), (*value).to_owned());
    }
    let config = Config::load(None, env).expect("settings");
    wearsync::vault::prepare_state_folder(&config.state_dir()).expect("a state folder");
    let db = place.db().await;
    db.migrate().await.expect("migrates");
    let shared = match (&config.redis_url, &config.database) {
        (Some(url), Database::Postgres(_)) => Coordination::redis(url, &config.redis_prefix).expect("an address"),
        _ => Coordination::local(),
    };
    let vault = Vault::from_config(&config).expect("a key");
    let exporter = files.then(|| {
        let lock = config.state_dir().join(format!("export-{}.lock", uuid::Uuid::now_v7()));
        Exporter::new(Folder::open(&config.export_dir, &lock).expect("a folder"))
    });
    Engine::new(config, db, shared, vault, clock, exporter).expect("an engine")
}

/// What the simulator says exists, by id.
#[derive(Clone, Debug)]
pub struct Truth {
    pub start: DateTime<Utc>,
    pub manual: bool,
    pub deleted: bool,
}

pub async fn truth(http: &reqwest::Client, simulator: &str, athlete: u32) -> BTreeMap<String, Truth> {
    let answer = get(http, &format!("{simulator}/_simulator/truth?athlete={athlete}")).await;
    let ids = answer["activities"].as_array().expect("a list of activities");
    ids.iter()
        .map(|row| {
            let start = row["start_ms"].as_i64().expect("a start");
            let truth = Truth {
                start: DateTime::from_timestamp_millis(start).expect("in range"),
                manual: row["manual"].as_bool().expect("manual"),
                deleted: !row["deleted_at_ms"].is_null(),
            };
            (row["id"].to_string(), truth)
        })
        .collect()
}

/// What is stored of workouts.
#[derive(Clone, Debug, sqlx::FromRow)]
struct StoredWorkout {
    external_id: String,
    deleted: bool,
    details: i64,
}

/// Rows and files hold every id that was issued, once, and nothing else; files equal the database.
pub async fn check(db: &Db, connection: ConnectionId, truth: &BTreeMap<String, Truth>, exports: &Path) {
    let sql = "select r.external_id, r.deleted_at is not null as deleted,
            (select count(*) from workouts w where w.record_id = r.id) as details
        from records r where r.connection_id = $1 and r.kind = 'workout'";
    let rows: Vec<StoredWorkout> = query(db, sql, connection).await;
    let stored: BTreeSet<&str> = rows.iter().filter(|row| !row.deleted).map(|row| row.external_id.as_str()).collect();
    let live: BTreeSet<&str> = truth.iter().filter(|(_, t)| !t.deleted).map(|(id, _)| id.as_str()).collect();
    let lost: Vec<_> = live.difference(&stored).collect();
    let extra: Vec<_> = stored.difference(&live).collect();
    assert!(lost.is_empty() && extra.is_empty(), "lost {lost:?}, extra {extra:?}");
    assert!(rows.iter().all(|row| row.details == 1), "a workout without its row");

    // Every recorded activity has streams or the word that there are none.
    #[derive(sqlx::FromRow)]
    struct Part {
        external_id: String,
        part: String,
        state: String,
        version: i64,
        n: i64,
    }
    let sql = "select external_id, part, state, version, count(*) over (partition by external_id, part) as n from parts
        where connection_id = $1 and kind = 'workout' and superseded_at is null";
    let parts: Vec<Part> = query(db, sql, connection).await;
    assert!(parts.iter().all(|part| part.n == 1), "two current versions of one answer");
    let with_streams: BTreeSet<&str> = parts
        .iter()
        .filter(|part| part.part == "streams" && matches!(part.state.as_str(), "stored" | "none"))
        .map(|part| part.external_id.as_str())
        .collect();
    for (id, truth) in truth.iter().filter(|(_, truth)| !truth.deleted) {
        assert!(truth.manual || with_streams.contains(id.as_str()), "no streams of {id}");
    }

    // Files: one per stored version of each answer, whole, with the bytes of the database.
    let mut expected = 0;
    for part in &parts {
        if part.state == "stored" && stored.contains(part.external_id.as_str()) {
            expected += part.version;
        }
    }
    let mut found = 0;
    for collection in ["activities", "streams", "details", "zones"] {
        for path in files(&exports.join("strava").join(collection)) {
            let name = path.file_name().and_then(|name| name.to_str()).expect("a name").to_owned();
            assert!(!name.contains(".tmp") && name.ends_with(".json"), "a file that is no entity file: {name}");
            let text = std::fs::read(&path).expect("reads");
            let value: Value = serde_json::from_slice(&text).unwrap_or_else(|e| panic!("{name} is torn: {e}"));
            if name.ends_with(".deleted.json") {
                continue;
            }
            let id = value["id"].to_string();
            let truth = truth.get(&id).unwrap_or_else(|| panic!("{name} is of nothing that was issued"));
            if !truth.deleted {
                found += 1;
            }
        }
    }
    assert_eq!(found, expected, "files and stored versions differ in number");
    let due: Vec<Count> =
        query(db, "select count(*) as n from parts where connection_id = $1 and export_due", connection).await;
    assert_eq!(due[0].n, 0, "something stored has no file");
}

#[derive(sqlx::FromRow)]
pub struct Count {
    pub n: i64,
}

/// A query of a test, on whichever database.
pub async fn query<T>(db: &Db, sql: &'static str, connection: ConnectionId) -> Vec<T>
where
    T: Send
        + Unpin
        + for<'r> sqlx::FromRow<'r, sqlx::postgres::PgRow>
        + for<'r> sqlx::FromRow<'r, sqlx::sqlite::SqliteRow>,
{
    match db {
        Db::Postgres(db) => sqlx::query_as(sql).bind(connection).fetch_all(db.pool()).await.expect("reads"),
        Db::Sqlite(db) => sqlx::query_as(sql).bind(connection).fetch_all(db.pool()).await.expect("reads"),
    }
}

pub fn files(folder: &Path) -> Vec<PathBuf> {
    let mut out = Vec::new();
    let Ok(entries) = std::fs::read_dir(folder) else { return out };
    for entry in entries {
        let path = entry.expect("reads").path();
        if path.is_dir() {
            out.extend(files(&path));
        } else {
            out.push(path);
        }
    }
    out.sort();
    out
}

/// Every file below a folder with its bytes.
pub fn tree(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    files(folder)
        .into_iter()
        .map(|path| {
            let bytes = std::fs::read(&path).expect("reads");
            (path.strip_prefix(folder).expect("below").to_owned(), bytes)
        })
        .collect()
}
