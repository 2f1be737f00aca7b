//! Queued `POST …/sync`: how many a second, how long each takes, and what each costs the database and Redis.
//!
//! The server is the whole router on a loopback socket in this process, so that its statements can be counted; the
//! clients are on a thread of their own. The references send the program's own SQL, cut out of its sources.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use redis::AsyncCommands as _;
use sqlx::{Connection as _, Executor as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use wearsync::app::{App, Role};
use wearsync::config::Config;
use wearsync::model::UserId;
use wearsync::storage::NewApiKey;
use wearsync::vault;

use crate::Size;
use crate::support::{Place, Shape};
use crate::table::{Table, Target};

const KEY: &str = "ws_benchmark";
/// Users to spread requests over.
pub(crate) const USERS: u32 = 500;

const FIND_ACCESS: &str = include_str!("../../src/storage/connections.rs");
const INSERT_RUN: &str = include_str!("../../src/storage/runs.rs");

pub(crate) async fn run(size: Size, table: &mut Table) {
    postgres(size, table).await;
    sqlite(size, table).await;
}

async fn postgres(size: Size, table: &mut Table) {
    let place = Place::new(Shape::Postgres).await;
    prepare(&place).await;
    let server = Server::start(&place).await;
    let mut rate_64 = 0.0;
    for connections in [1, 16, 64, 256] {
        server.load(connections, Duration::from_millis(300)).await;
        let (statements, calls) = (server.app.engine.db.statements(), redis_calls(&place).await);
        let load = server.load(connections, size.of(Duration::from_secs(4), Duration::from_secs(1))).await;
        let statements = server.app.engine.db.statements() - statements;
        let calls = redis_calls(&place).await - calls;
        let what = format!("accept, Postgres + Redis, {connections} connections");
        load.tell(&what, table, if connections == 64 { Target::AtMost(50.0) } else { Target::None });
        if connections == 64 {
            rate_64 = load.rate();
            let n = load.latencies.len() as f64;
            table.add("accept: statements per request", statements as f64 / n, "", Target::AtMost(2.0));
            table.add("accept: Redis calls per request", calls as f64 / n, "", Target::AtMost(1.0));
        }
    }
    server.stop().await;
    match accepts(&place, size.of(4, 1)) {
        Ok(rate) => {
            table.add("accept: pgbench, the same statements, 64 clients", rate, "/s", Target::None);
            table.add("accept: ratio to pgbench at 64", rate_64 / rate, "", Target::AtLeast(0.5));
        }
        Err(why) => eprintln!("  no pgbench ({why}): no ratio to it"),
    }
}

async fn sqlite(size: Size, table: &mut Table) {
    let place = Place::new(Shape::Sqlite).await;
    prepare(&place).await;
    let server = Server::start(&place).await;
    let time = size.of(Duration::from_secs(4), Duration::from_secs(1));
    server.load(64, Duration::from_millis(300)).await;
    let load = server.load(64, time).await;
    load.tell("accept, SQLite, 64 connections", table, Target::None);
    server.stop().await;
    let clock = wearsync::clock::Clock::system();
    let sql = statement(INSERT_RUN, "insert into runs");
    let rate = grouped(&place, time, &sql, |sql, n| {
        sqlx::query(sql)
            .bind(uuid::Uuid::now_v7())
            .bind(user(n))
            .bind(0_i64)
            .bind("pull")
            .bind("{\"data_type\":\"all\",\"since_ms\":1000000000000}")
            .bind(format!("{n:032x}"))
            .bind(clock.now())
    })
    .await;
    table.add("accept: SQLite inserts in groups of 64 without HTTP", rate, "/s", Target::None);
    table.add("accept: ratio to these inserts", load.rate() / rate, "", Target::AtLeast(0.5));
}

/// Schema, one key, and users with a connection each; ids are numbers, so that pgbench can name them.
pub(crate) async fn prepare(place: &Place) {
    let db = place.db().await;
    db.migrate().await.expect("migrates");
    let key = NewApiKey {
        hash: vault::hash_secret(KEY),
        prefix: "ws_bench".to_owned(),
        name: "bench".to_owned(),
        scopes: "sync".to_owned(),
        created_by: None,
        expires_at: None,
    };
    db.insert_api_key(key, wearsync::clock::Clock::system().now()).await.expect("a key");
    db.close().await;
    let (numbers, id, now, blob) = match place.shape {
        Shape::Postgres => {
            (format!("generate_series(1, {USERS}) as n (i)"), "lpad(to_hex(i), 32, '0')::uuid", "now()", "null::bytea")
        }
        Shape::Sqlite => (
            format!(
                "(with recursive n (i) as (select 1 union all select i + 1 from n where i < {USERS}) select i from n)"
            ),
            "unhex(printf('%032x', i))",
            "'2026-11-20T00:00:00.000+00:00'",
            "null",
        ),
    };
    let script = format!(
        "insert into users (id, created_at) select {id}, {now} from {numbers};
        insert into accounts (id, provider, client_id, provider_user_id, status, refresh_token, created_at, updated_at)
            select {id}, 'strava', '90417', cast(i as text), 'active', {blob}, {now}, {now} from {numbers};
        insert into connections (id, user_id, account_id, provider, status, created_at, updated_at)
            select {id}, {id}, {id}, 'strava', 'active', {now}, {now} from {numbers};"
    );
    let script = sqlx::raw_sql(&script);
    match place.shape {
        Shape::Postgres => {
            let mut own = sqlx::PgConnection::connect(&place.database).await.expect("connects");
            own.execute(script).await.expect("inserts");
        }
        Shape::Sqlite => {
            let mut own = sqlx::SqliteConnection::connect(&sqlite_url(place)).await.expect("connects");
            own.execute(script).await.expect("inserts");
        }
    }
}

pub(crate) fn sqlite_url(place: &Place) -> String {
    format!("sqlite:{}", place.data_dir().join("state/wearsync.db").display())
}

fn user(i: u32) -> UserId {
    UserId(uuid::Uuid::from_u128(u128::from(i % USERS + 1)))
}

struct Server {
    app: Arc<App>,
    address: std::net::SocketAddr,
    served: tokio::task::JoinHandle<()>,
    /// Numbers requests, so that no two are the same.
    next: Arc<AtomicU64>,
}

impl Server {
    async fn start(place: &Place) -> Self {
        let mut env = place.env("http://127.0.0.1:1");
        env.remove("WEARSYNC_DATABASE_CONNECTIONS");
        let config = Config::load(None, env).expect("settings");
        let app = Arc::new(App::open(config, Role::Server { worker: false }).await.expect("opens"));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let serving = app.clone();
        let served = tokio::spawn(async move { serving.serve(listener).await.expect("serves") });
        Self { app, address, served, next: Arc::default() }
    }

    async fn stop(self) {
        self.app.engine.stop.cancel();
        let _ = self.served.await;
        self.app.close().await;
    }

    /// So many connections, each asking as soon as it is answered.
    async fn load(&self, connections: u32, time: Duration) -> Load {
        let (address, next) = (self.address, self.next.clone());
        tokio::task::spawn_blocking(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let begun = Instant::now();
                let clients = (0..connections).map(|_| tokio::task::spawn(client(address, next.clone(), begun + time)));
                let mut load = Load { latencies: Vec::new(), errors: 0, seconds: 0.0 };
                for client in clients.collect::<Vec<_>>() {
                    let (latencies, errors) = client.await.expect("ends");
                    load.latencies.extend(latencies);
                    load.errors += errors;
                }
                load.seconds = begun.elapsed().as_secs_f64();
                load.latencies.sort_by(f64::total_cmp);
                load
            })
        })
        .await
        .expect("ends")
    }
}

struct Load {
    /// Milliseconds, sorted.
    latencies: Vec<f64>,
    errors: u64,
    seconds: f64,
}

impl Load {
    fn rate(&self) -> f64 {
        self.latencies.len() as f64 / self.seconds
    }

    fn tell(&self, what: &str, table: &mut Table, p99: Target) {
        let at = |share: f64| self.latencies[((self.latencies.len() - 1) as f64 * share) as usize];
        table.add(what, self.rate(), "requests/s", Target::None);
        table.add(format!("{what}: p50"), at(0.5), "ms", Target::None);
        table.add(format!("{what}: p99"), at(0.99), "ms", p99);
        table.add(format!("{what}: slowest"), at(1.0), "ms", Target::AtMost(1000.0));
        table.add(format!("{what}: errors"), self.errors as f64, "", Target::AtMost(0.0));
    }
}

/// One connection that stays open.
async fn client(address: std::net::SocketAddr, next: Arc<AtomicU64>, until: Instant) -> (Vec<f64>, u64) {
    let mut stream = TcpStream::connect(address).await.expect("connects");
    stream.set_nodelay(true).expect("can be set");
    let (mut latencies, mut errors) = (Vec::new(), 0);
    let mut answer = Vec::with_capacity(2048);
    while Instant::now() < until {
        let n = next.fetch_add(1, Ordering::Relaxed);
        let request = format!(
            "POST /api/v1/strava/users/{}/sync?since={} HTTP/1.1\r\nhost: bench\r\nx-api-key: {KEY}\r\ncontent-length: 0\r\n\r\n",
            user(n as u32),
            1_000_000_000 + n
        );
        let begun = Instant::now();
        stream.write_all(request.as_bytes()).await.expect("writes");
        if !read_answer(&mut stream, &mut answer).await {
            errors += 1;
        }
        latencies.push(begun.elapsed().as_secs_f64() * 1000.0);
    }
    (latencies, errors)
}

/// Reads one answer; whether it is a 200 with a task.
async fn read_answer(stream: &mut TcpStream, answer: &mut Vec<u8>) -> bool {
    answer.clear();
    loop {
        if stream.read_buf(answer).await.expect("reads") == 0 {
            return false;
        }
        let Some(head) = answer.windows(4).position(|four| four == b"\r\n\r\n") else { continue };
        let text = String::from_utf8_lossy(&answer[..head]).to_ascii_lowercase();
        let length = text.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok());
        if answer.len() >= head + 4 + length.expect("a length") {
            return text.starts_with("http/1.1 200") && answer.windows(9).any(|nine| nine == b"\"task_id\"");
        }
    }
}

/// Calls that Redis has answered to clients: everything of ours is a script, and what a script calls is no call of ours.
async fn redis_calls(place: &Place) -> u64 {
    let (url, _) = place.redis.as_ref().expect("has Redis");
    let client = redis::Client::open(url.as_str()).expect("an address");
    let mut connection = client.get_multiplexed_async_connection().await.expect("connects");
    let _: () = connection.ping().await.expect("answers");
    let text: String = redis::cmd("INFO").arg("commandstats").query_async(&mut connection).await.expect("answers");
    let scripts = text.lines().filter_map(|line| {
        let rest = line.strip_prefix("cmdstat_evalsha:calls=").or_else(|| line.strip_prefix("cmdstat_eval:calls="))?;
        rest.split(',').next()?.parse::<u64>().ok()
    });
    scripts.sum()
}

/// A statement as it stands in a source: from its first words to the closing quote.
pub(crate) fn statement(source: &str, first: &str) -> String {
    let from = source.find(first).expect("the statement is still there");
    let end = source[from..].find("\";").expect("it ends");
    source[from..from + end].to_owned()
}

/// A statement with these values in the place of its parameters, on one line.
pub(crate) fn fill(text: String, values: &[&str]) -> String {
    let filled = values.iter().enumerate().rev().fold(text, |text, (i, v)| text.replace(&format!("${}", i + 1), v));
    filled.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Transactions a second of pgbench with both statements of an accept.
fn accepts(place: &Place, seconds: u32) -> Result<f64, String> {
    let hash: String = vault::hash_secret(KEY).iter().map(|byte| format!("{byte:02x}")).collect();
    let hash = format!("'\\x{hash}'::bytea");
    let user = "lpad(to_hex((:u)::bigint), 32, '0')::uuid";
    let access = fill(
        statement(FIND_ACCESS, "select d.id is not null"),
        &[&hash, user, "'strava'", "null::uuid", "null::timestamptz"],
    );
    // Ids in the order of time, as ours are.
    let id = "(lpad(to_hex((extract(epoch from clock_timestamp()) * 1000)::bigint), 12, '0')
        || substr(md5(random()::text), 1, 20))::uuid";
    let request = "'{\"data_type\":\"all\",\"since_ms\":1000000000000}'";
    let key = "md5(random()::text || clock_timestamp()::text)";
    let insert =
        fill(statement(INSERT_RUN, "insert into runs"), &[id, user, "0", "'pull'", request, key, "clock_timestamp()"]);
    pgbench(place, &format!("\\set u random(1, {USERS})\n{access};\n{insert};\n"), seconds)
}

/// Transactions a second of pgbench with this script, 64 clients.
pub(crate) fn pgbench(place: &Place, text: &str, seconds: u32) -> Result<f64, String> {
    let script = place.dir.path().join("pgbench.sql");
    std::fs::write(&script, text).expect("writes");
    let url = url::Url::parse(&place.database).expect("an address");
    let program = programs("pgbench").ok_or("it is not installed")?;
    let output = Command::new(program)
        .args(["--no-vacuum", "--protocol", "prepared", "--client", "64", "--jobs", "2"])
        .args(["--time", &seconds.to_string(), "--file"])
        .arg(&script)
        .arg(url.path().trim_start_matches('/'))
        .env("PGHOST", url.host_str().unwrap_or("127.0.0.1"))
        .env("PGPORT", url.port().unwrap_or(5432).to_string())
        .env("PGUSER", url.username())
        .env("PGPASSWORD", url.password().unwrap_or_default())
        .output()
        .map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let rate = text.lines().find_map(|line| line.strip_prefix("tps = ")?.split(' ').next()?.parse().ok());
    rate.ok_or_else(|| format!("{text}{}", String::from_utf8_lossy(&output.stderr)))
}

/// A program of PostgreSQL: in the path, or where Debian keeps it.
fn programs(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let debian = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let folders = std::env::split_paths(&path).chain(debian.map(|entry| entry.path().join("bin")));
    folders.map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// An insert, 64 to a transaction, each transaction on disk before the next: nothing else.
pub(crate) async fn grouped<'q>(
    place: &Place,
    time: Duration,
    sql: &'q str,
    bind: impl Fn(&'q str, u32) -> sqlx::query::Query<'q, sqlx::Sqlite, sqlx::sqlite::SqliteArguments<'q>>,
) -> f64 {
    let mut own = sqlx::SqliteConnection::connect(&sqlite_url(place)).await.expect("connects");
    own.execute("pragma journal_mode = wal; pragma synchronous = full; pragma foreign_keys = on").await.expect("set");
    let (begun, mut n) = (Instant::now(), 0_u32);
    while begun.elapsed() < time {
        let mut tx = own.begin_with("BEGIN IMMEDIATE").await.expect("begins");
        for _ in 0..64 {
            n += 1;
            bind(sql, n).execute(&mut *tx).await.expect("inserts");
        }
        tx.commit().await.expect("commits");
    }
    f64::from(n) / begun.elapsed().as_secs_f64()
}
