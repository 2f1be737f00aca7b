//! Webhooks: how many a second, how soon they are answered at half of that, and what is left when workers are killed in
//! between: a row and one effect for every 2xx, nothing of what was forged.
//!
//! Every connection has a run in progress that nobody works on, so that the runs which the deliveries ask for wait: what
//! is measured is receiving, not reading. The effect of a delivery is then its item and its run.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _};
use sqlx::{Connection as _, Executor as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use wearsync::storage::{DeliveryFilter, SubscriptionRow};
use wearsync::sync::{self, Engine};

use crate::Size;
use crate::accept::{USERS, fill, grouped, pgbench, prepare, sqlite_url, statement};
use crate::machine::memory_mib;
use crate::rig::Process;
use crate::support::{self, Place, Shape};
use crate::table::{Table, Target};

const KEEP: &str = include_str!("../../src/storage/deliveries.rs");
/// Things that change, per user: several events of one are one run while it waits.
const ITEMS: u64 = 4;
const CONNECTIONS: usize = 64;

pub(crate) async fn run(size: Size, table: &mut Table) {
    for shape in [Shape::Postgres, Shape::Sqlite] {
        measure(shape, size, table).await;
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sort {
    Good,
    Forged,
    Oversized,
}

/// One call of a provider, or of somebody who would like to be taken for it.
struct Call {
    sort: Sort,
    /// Numbers the event; copies have the same.
    event: u64,
    request: Vec<u8>,
}

async fn measure(shape: Shape, size: Size, table: &mut Table) {
    let place = Place::new(shape).await;
    prepare(&place).await;
    let engine = support::engine_without_files(&place, "http://127.0.0.1:1").await;
    let row = SubscriptionRow { external_id: "318842".to_owned(), callback_url: String::new(), secret: None };
    engine.db.store_subscription("strava", "90417", &row, engine.clock.now()).await.expect("stores");
    let setup = engine.provider("strava").expect("strava");
    let url = sync::callback_url(&engine, setup, "http://bench").expect("an address");
    let path = url.strip_prefix("http://bench").expect("ours").to_owned();
    let name = match shape {
        Shape::Postgres => "receive, Postgres + Redis",
        Shape::Sqlite => "receive, SQLite",
    };

    let mut env = place.env("http://127.0.0.1:1");
    env.remove("WEARSYNC_DATABASE_CONNECTIONS");
    let address = free_address();
    env.insert("WEARSYNC_BIND".to_owned(), address.to_string());
    for (name, value) in [("LEASE", "2s"), ("RENEW", "500ms"), ("SWEEP", "500ms")] {
        env.insert(format!("WEARSYNC_{name}"), value.to_owned());
    }
    let n = size.of(100_000, 4_000);
    let n = if shape == Shape::Sqlite { n / 4 } else { n };
    let mut server = Process::start(&["serve", "--no-worker"], &env, Stdio::null());
    until_up(address).await;
    // Receiving alone, to be held against the insert alone.
    let alone = Arc::new(corpus(&path, n / 5, 2_000_000_000));
    let warm_up = load(address, alone.clone(), 0..n / 50, None).await;
    let receiving = load(address, alone.clone(), n / 50..n / 5, None).await;
    table.add(format!("{name}: receiving alone"), receiving.rate(), "calls/s", Target::None);
    if shape == Shape::Sqlite {
        drop(server);
        // It would work on them before the slots are held.
        execute(&place, "delete from deliveries").await;
        server = Process::start(&["serve"], &env, Stdio::null());
        until_up(address).await;
    }
    // After the start, which takes leases of other processes for those of the dead.
    hold_slots(&place).await;

    let calls = Arc::new(corpus(&path, n, 0));
    let killer = (shape == Shape::Postgres).then(|| {
        let env = env.clone();
        tokio::spawn(async move {
            let mut killed = 0_u64;
            loop {
                let worker = Process::start(&["worker"], &env, Stdio::null());
                tokio::time::sleep(Duration::from_millis(1500)).await;
                // kill -9, on drop.
                drop(worker);
                killed += 1;
                if killed >= 1000 {
                    return;
                }
            }
        })
    });
    let before = memory_mib(server.pid(), "VmRSS");
    let tenth = load(address, calls.clone(), 0..n / 10, None).await;
    let warm = memory_mib(server.pid(), "VmRSS");
    let rest = load(address, calls.clone(), n / 10..n, None).await;
    let end = memory_mib(server.pid(), "VmRSS");
    let rate = rest.rate();
    table.add(format!("{name}: receiving and working"), rate, "calls/s", Target::None);
    table.add(format!("{name}: memory at rest"), before, "MiB", Target::None);
    table.add(format!("{name}: memory grown after the first tenth"), end - warm, "MiB", Target::AtMost(20.0));
    if let Some(killer) = killer {
        killer.abort();
        // Its worker ends with it.
        let _ = killer.await;
    }

    let mut answers = tenth.answers;
    answers.extend(rest.answers);
    let mut first_answers = Vec::new();
    if shape == Shape::Postgres {
        first_answers.extend(warm_up.answers.iter().chain(&receiving.answers).copied());
    }
    let mut worker = (shape == Shape::Postgres).then(|| Process::start(&["worker"], &env, Stdio::null()));
    // At half of that rate, measured from when each call was due.
    let seconds = size.of(5.0, 1.0);
    let m = (rate / 2.0 * seconds) as usize;
    let half = Arc::new(corpus(&path, m.max(100), 1_000_000_000));
    let paced = load(address, half.clone(), 0..half.len(), Some(rate / 2.0)).await;
    table.add(format!("{name}: p50 at half that rate"), paced.at(0.5), "ms", Target::None);
    table.add(format!("{name}: p99 at half that rate"), paced.at(0.99), "ms", Target::AtMost(50.0));
    let drained = until_drained(&engine).await;
    table.add(format!("{name}: drained after the last answer"), drained, "s", Target::None);
    worker.take();

    let mut wanted: BTreeSet<u64> = BTreeSet::new();
    let mut wrong = 0_u64;
    for (calls, answers) in [(&alone, &first_answers), (&calls, &answers), (&half, &paced.answers)] {
        for (call, status) in answers {
            let call = &calls[*call];
            let right = match call.sort {
                Sort::Good => 200,
                Sort::Forged => 401,
                Sort::Oversized => 413,
            };
            wrong += u64::from(*status != right);
            if call.sort == Sort::Good && *status == 200 {
                wanted.insert(call.event);
            }
        }
    }
    table.add(format!("{name}: wrong answers"), wrong as f64, "", Target::AtMost(0.0));
    check(&engine, name, &wanted, table).await;
    drop(server);
    engine.db.close().await;

    match shape {
        Shape::Postgres => {
            let id = "(lpad(to_hex((extract(epoch from clock_timestamp()) * 1000)::bigint), 12, '0')
                || substr(md5(random()::text), 1, 20))::uuid";
            let key = "md5(random()::text || clock_timestamp()::text)";
            let body = "decode(repeat('5a', 240), 'hex')";
            let headers = "'{\"content-type\":\"application/json\"}'";
            let values = [id, "'strava'", key, "clock_timestamp()", headers, body];
            let insert = fill(statement(KEEP, "insert into deliveries"), &values);
            match pgbench(&place, &format!("{insert};\n"), size.of(4, 1)) {
                Ok(reference) => {
                    table.add("receive: pgbench, the same insert, 64 clients", reference, "/s", Target::None);
                    table.add("receive: ratio to pgbench", receiving.rate() / reference, "", Target::AtLeast(0.5));
                }
                Err(why) => eprintln!("  no pgbench ({why}): no ratio to it"),
            }
        }
        Shape::Sqlite => {
            let sql = statement(KEEP, "insert into deliveries");
            let clock = wearsync::clock::Clock::system();
            let reference = grouped(&place, size.of(Duration::from_secs(4), Duration::from_secs(1)), &sql, |sql, n| {
                sqlx::query(sql)
                    .bind(uuid::Uuid::now_v7())
                    .bind("strava")
                    .bind(format!("reference:{n}"))
                    .bind(clock.now())
                    .bind("{\"content-type\":\"application/json\"}")
                    .bind(vec![0x5a_u8; 240])
            })
            .await;
            table.add("receive: SQLite inserts in groups of 64 without HTTP", reference, "/s", Target::None);
            table.add("receive: ratio to these inserts", receiving.rate() / reference, "", Target::AtLeast(0.5));
        }
    }
}

/// Calls in any order: of a hundred, thirty are copies, five forged, one too large.
fn corpus(path: &str, n: usize, first: u64) -> Vec<Call> {
    let mut rng = rand::rngs::StdRng::seed_from_u64(first + 7);
    let mut calls = Vec::with_capacity(n);
    let mut event = first;
    for i in 0..n {
        let sort = match i % 100 {
            0..5 => Sort::Forged,
            5 => Sort::Oversized,
            _ => Sort::Good,
        };
        let copied = sort == Sort::Good && i % 100 >= 70 && event > first;
        let event = if copied {
            rng.random_range(first..event)
        } else {
            event += 1;
            event - 1
        };
        calls.push(Call { sort, event, request: request(path, sort, event, i) });
    }
    calls.shuffle(&mut rng);
    calls
}

fn request(path: &str, sort: Sort, event: u64, i: usize) -> Vec<u8> {
    let subscription = if sort == Sort::Forged && i.is_multiple_of(2) { 1 } else { 318_842 };
    let path = if sort == Sort::Forged && !i.is_multiple_of(2) { &path[..path.len() - 1] } else { path };
    let owner = event % u64::from(USERS) + 1;
    let body = format!(
        "{{\"object_type\":\"activity\",\"object_id\":{},\"aspect_type\":\"update\",\"updates\":{{\"title\":\"{event}\"}},\
         \"owner_id\":{owner},\"subscription_id\":{subscription},\"event_time\":{}}}",
        event / u64::from(USERS) % ITEMS + 1,
        1_777_000_000 + event
    );
    let body = if sort == Sort::Oversized { " ".repeat((1 << 20) + 1) } else { body };
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )
    .into_bytes()
}

struct Load {
    /// Place among the calls, and the status.
    answers: Vec<(usize, u16)>,
    /// Milliseconds, sorted.
    latencies: Vec<f64>,
    seconds: f64,
}

impl Load {
    fn rate(&self) -> f64 {
        self.answers.len() as f64 / self.seconds
    }

    fn at(&self, share: f64) -> f64 {
        self.latencies[((self.latencies.len() - 1) as f64 * share) as usize]
    }
}

/// Sends these calls over open connections, as fast as they are answered, or so many a second.
async fn load(address: SocketAddr, calls: Arc<Vec<Call>>, range: std::ops::Range<usize>, rate: Option<f64>) -> Load {
    tokio::task::spawn_blocking(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let next = Arc::new(AtomicUsize::new(range.start));
            let begun = Instant::now();
            let clients = (0..CONNECTIONS).map(|_| {
                let (calls, next, range) = (calls.clone(), next.clone(), range.clone());
                tokio::task::spawn(async move {
                    let (mut answers, mut latencies) = (Vec::new(), Vec::new());
                    let mut stream = connect(address).await;
                    loop {
                        let n = next.fetch_add(1, Ordering::Relaxed);
                        if n >= range.end {
                            return (answers, latencies);
                        }
                        let mut due = Instant::now();
                        if let Some(rate) = rate {
                            due = begun + Duration::from_secs_f64((n - range.start) as f64 / rate);
                            tokio::time::sleep_until(due.into()).await;
                        }
                        let status = ask(&mut stream, &calls[n].request).await;
                        if calls[n].sort == Sort::Good {
                            latencies.push(due.elapsed().as_secs_f64() * 1000.0);
                        }
                        if !matches!(status, 200 | 401) {
                            // What was not read to its end stands in the way.
                            stream = connect(address).await;
                        }
                        answers.push((n, status));
                    }
                })
            });
            let mut load = Load { answers: Vec::new(), latencies: Vec::new(), seconds: 0.0 };
            for client in clients.collect::<Vec<_>>() {
                let (answers, latencies) = client.await.expect("ends");
                load.answers.extend(answers);
                load.latencies.extend(latencies);
            }
            load.seconds = begun.elapsed().as_secs_f64();
            load.latencies.sort_by(f64::total_cmp);
            load
        })
    })
    .await
    .expect("ends")
}

async fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).await.expect("connects");
    stream.set_nodelay(true).expect("can be set");
    stream
}

/// One call; 0 where no answer came.
async fn ask(stream: &mut TcpStream, request: &[u8]) -> u16 {
    // Who sends too much may be cut off before it is all sent; the answer is there all the same.
    let (mut read, mut write) = stream.split();
    let sent = async {
        let _ = write.write_all(request).await;
        std::future::pending::<()>().await;
    };
    let answered = async {
        let mut answer = Vec::with_capacity(1024);
        loop {
            match read.read_buf(&mut answer).await {
                Ok(0) | Err(_) => return 0,
                Ok(_) => {}
            }
            let Some(head) = answer.windows(4).position(|four| four == b"\r\n\r\n") else { continue };
            let text = String::from_utf8_lossy(&answer[..head]).to_ascii_lowercase();
            let length = text.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok());
            if answer.len() >= head + 4 + length.unwrap_or(0) {
                return text.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
            }
        }
    };
    tokio::select! {
        status = answered => status,
        () = sent => 0,
    }
}

fn free_address() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address")
}

async fn until_up(address: SocketAddr) {
    for _ in 0..500 {
        // It listens before it is ready, and frees leases in between.
        if let Ok(mut stream) = TcpStream::connect(address).await
            && ask(&mut stream, b"GET /health/ready HTTP/1.1\r\nhost: bench\r\n\r\n").await == 200
        {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the server does not come up");
}

/// Seconds until every delivery is done.
async fn until_drained(engine: &Engine) -> f64 {
    let begun = Instant::now();
    loop {
        let open = engine.db.list_ready_deliveries(engine.clock.now() + chrono::Duration::hours(1), 1).await;
        let held = DeliveryFilter { state: Some("in_progress".to_owned()), limit: 1, ..DeliveryFilter::default() };
        let held = engine.db.list_deliveries(&held).await.expect("lists");
        if open.expect("lists").is_empty() && held.is_empty() {
            return begun.elapsed().as_secs_f64();
        }
        assert!(begun.elapsed() < Duration::from_secs(900), "the deliveries are not worked off");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Every event that was answered 200 is one delivery with one item and one run; nothing else is there.
async fn check(engine: &Engine, name: &str, wanted: &BTreeSet<u64>, table: &mut Table) {
    let mut kept: BTreeMap<u64, u64> = BTreeMap::new();
    let (mut before, mut not_once, mut stranger) = (None, 0_u64, 0_u64);
    loop {
        let filter = DeliveryFilter { before, limit: 5_000, ..DeliveryFilter::default() };
        let page = engine.db.list_deliveries(&filter).await.expect("lists");
        let Some(last) = page.last() else { break };
        before = Some(last.id);
        for (n, one) in page.iter().enumerate() {
            let time: u64 = one.dedup_key.split(':').nth(3).and_then(|text| text.parse().ok()).unwrap_or(0);
            let event = time.saturating_sub(1_777_000_000);
            *kept.entry(event).or_default() += 1;
            stranger += u64::from(!wanted.contains(&event));
            not_once += u64::from(one.state != "done");
            // The items of a twentieth: each is a query.
            if n.is_multiple_of(20) {
                let items = engine.db.list_delivery_items(one.id).await.expect("lists");
                let once = items.len() == 1 && items[0].state == "accepted" && items[0].run_id.is_some();
                not_once += u64::from(!once);
            }
        }
    }
    let lost = wanted.iter().filter(|event| !kept.contains_key(event)).count();
    let twice = kept.values().filter(|times| **times > 1).count();
    table.add(format!("{name}: events answered 200"), wanted.len() as f64, "", Target::None);
    table.add(format!("{name}: of these lost"), lost as f64, "", Target::AtMost(0.0));
    table.add(
        format!("{name}: kept twice, or without one effect"),
        (twice as u64 + not_once) as f64,
        "",
        Target::AtMost(0.0),
    );
    table.add(format!("{name}: kept without a 200 to a good call"), stranger as f64, "", Target::AtMost(0.0));
}

/// A run in progress for each connection, held for longer than this takes.
async fn hold_slots(place: &Place) {
    let (far, now) = match place.shape {
        Shape::Postgres => ("now() + interval '1 day'", "now()"),
        Shape::Sqlite => ("'2099-01-01T00:00:00.000+00:00'", "'2026-11-20T00:00:00.000+00:00'"),
    };
    let script = format!(
        "insert into runs (id, connection_id, user_id, provider, class, source, request, request_key, state, epoch, owner,
            lease_until, due_at, created_at)
        select id, id, user_id, 'strava', 0, 'pull', '{{\"data_type\":\"all\"}}', cast(id as text), 'in_progress', 1, 'bench',
            {far}, {now}, {now} from connections"
    );
    let script = if place.shape == Shape::Sqlite { script.replace("cast(id as text)", "hex(id)") } else { script };
    execute(place, &script).await;
}

async fn execute(place: &Place, script: &str) {
    match place.shape {
        Shape::Postgres => {
            let mut own = sqlx::PgConnection::connect(&place.database).await.expect("connects");
            own.execute(sqlx::raw_sql(script)).await.expect("is executed");
        }
        Shape::Sqlite => {
            let mut own = sqlx::SqliteConnection::connect(&sqlite_url(place)).await.expect("connects");
            own.execute(sqlx::raw_sql(script)).await.expect("is executed");
        }
    }
}
