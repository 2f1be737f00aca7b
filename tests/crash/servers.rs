//! Redis and PostgreSQL go away in the middle of a run and come back. The servers are the test's own.

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sqlx::Connection as _;
use tempfile::TempDir;
use wearsync::model::SyncRequest;
use wearsync::simulator::{Options, parse_fault};

use crate::process::Process;
use crate::scene::{Api, Scene};
use crate::support::{Place, Shape};
use crate::watch;

const NO_POSTGRES: &str = "no PostgreSQL 15 or later is installed, and this test starts one of its own. Debian, Ubuntu: \
                           apt-get install postgresql; macOS: brew install postgresql@16";
const NO_REDIS: &str = "no redis-server is installed, and this test starts one of its own. Debian, Ubuntu: apt-get install \
                        redis-server; macOS: brew install redis";

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("a port").port()
}

fn out(command: &mut Command) -> Option<String> {
    let out = command.stdin(Stdio::null()).output().ok()?;
    out.status.success().then(|| String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

fn in_path(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|folder| folder.join(name)).find(|path| path.is_file())
}

/// A Redis that forgets everything when it ends.
struct Redis {
    child: Child,
    port: u16,
}

impl Redis {
    fn run(port: u16) -> Child {
        let program = in_path("redis-server").expect(NO_REDIS);
        let mut child = Command::new(program)
            .arg("-")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("redis-server starts");
        let settings = format!("bind 127.0.0.1\nport {port}\nsave \"\"\nappendonly no\n");
        child.stdin.take().expect("a pipe").write_all(settings.as_bytes()).expect("settings are read");
        child
    }

    async fn start() -> Self {
        let port = free_port();
        let mut redis = Self { child: Self::run(port), port };
        redis.until_up().await;
        redis
    }

    fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    async fn until_up(&mut self) {
        let started = Instant::now();
        loop {
            assert!(self.child.try_wait().expect("can be asked").is_none(), "redis-server ended at once");
            if self.ask("PING").await {
                return;
            }
            assert!(started.elapsed() < Duration::from_secs(10), "redis-server does not answer");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn ask(&self, command: &str) -> bool {
        let Ok(client) = redis::Client::open(self.url()) else { return false };
        let Ok(mut connection) = client.get_multiplexed_async_connection().await else { return false };
        redis::cmd(command).exec_async(&mut connection).await.is_ok()
    }

    fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    async fn start_again(&mut self) {
        self.child = Self::run(self.port);
        self.until_up().await;
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A PostgreSQL with a cluster of its own.
struct Postgres {
    bin: PathBuf,
    dir: TempDir,
    account: Option<String>,
    port: u16,
}

impl Postgres {
    /// The newest of those that are installed.
    fn find() -> PathBuf {
        let mut folders: Vec<PathBuf> = Vec::new();
        if let Some(path) = in_path("initdb").and_then(|path| path.canonicalize().ok()) {
            folders.extend(path.parent().map(Path::to_owned));
        }
        for (above, below) in
            [("/usr/lib/postgresql", "bin"), ("/opt/homebrew/opt", "bin"), ("/usr/local/opt", "bin"), ("/usr", "bin")]
        {
            let entries = std::fs::read_dir(above).into_iter().flatten().flatten();
            folders.extend(entries.map(|entry| entry.path().join(below)));
        }
        let version = |folder: &PathBuf| -> Option<u32> {
            let complete = ["initdb", "postgres", "pg_ctl"].iter().all(|name| folder.join(name).is_file());
            let text =
                out(Command::new(folder.join("postgres")).arg("--version").current_dir("/")).filter(|_| complete)?;
            let digits = text.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit);
            digits.collect::<String>().parse().ok().filter(|version| *version >= 15)
        };
        let found = folders.into_iter().filter_map(|folder| Some((version(&folder)?, folder))).max();
        found.expect(NO_POSTGRES).1
    }

    async fn start() -> Self {
        let bin = Self::find();
        let dir = tempfile::Builder::new().prefix("wearsync-pg").tempdir().expect("a folder");
        // PostgreSQL refuses to run as root: then the account that owns its files on this machine does it.
        let root = out(Command::new("id").arg("-u")).as_deref() == Some("0");
        let known = |name: &&&str| out(Command::new("id").args(["-u", **name])).is_some();
        let account = root.then(|| (*["postgres", "nobody"].iter().find(known).expect("an account")).to_owned());
        let postgres = Self { bin, dir, account, port: free_port() };
        std::fs::set_permissions(postgres.dir.path(), PermissionsExt::from_mode(0o711)).expect("permissions");
        let own = postgres.dir.path().join("own");
        std::fs::create_dir(&own).expect("a folder");
        if let Some(account) = &postgres.account {
            let owned = Command::new("chown").args([account.as_str(), &own.display().to_string()]).status();
            assert!(owned.expect("chown runs").success());
        }
        postgres.run("initdb", &["-U", "wearsync", "-A", "trust", "-E", "UTF8", "--locale", "C", "--no-sync"]);
        postgres.up();
        postgres
    }

    fn run(&self, program: &str, args: &[&str]) {
        let program = self.bin.join(program);
        let mut command = match &self.account {
            None => Command::new(program),
            Some(account) => {
                let mut command = Command::new("runuser");
                command.args(["-u", account, "--"]).arg(program);
                command
            }
        };
        let own = self.dir.path().join("own");
        // Into a file: a server that inherits a pipe would keep it open for ever.
        let log = std::fs::File::options().create(true).append(true).open(self.dir.path().join("log")).expect("a log");
        command.arg("-D").arg(own.join("data")).args(args).current_dir(&own);
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a log")).stderr(log);
        let status = command.status().expect("it runs");
        let said = || std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
        assert!(status.success(), "{command:?}: {}", said());
    }

    fn up(&self) {
        let options =
            format!("-c listen_addresses=127.0.0.1 -c port={} -c unix_socket_directories='' -c fsync=on", self.port);
        self.run("pg_ctl", &["start", "-w", "-s", "-l", "server.log", "-o", &options]);
    }

    /// `fast` ends it in order, `immediate` is a crash.
    fn down(&self, mode: &str) {
        self.run("pg_ctl", &["stop", "-w", "-s", "-m", mode]);
    }

    async fn database(&self) -> String {
        let url = format!("postgres://wearsync@127.0.0.1:{}", self.port);
        let mut admin = sqlx::PgConnection::connect(&format!("{url}/postgres")).await.expect("answers");
        sqlx::query("create database crash").execute(&mut admin).await.expect("may create databases");
        format!("{url}/crash")
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // By the id that the server left in its folder; nothing to stop when it is down.
        let pid = std::fs::read_to_string(self.dir.path().join("own/data/postmaster.pid"));
        if let Some(pid) = pid.ok().and_then(|text| text.lines().next().map(str::to_owned)) {
            let _ = Command::new("kill").args(["-QUIT", &pid]).status();
            for _ in 0..100 {
                if out(Command::new("kill").args(["-0", &pid])).is_none() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

async fn scene(postgres: &Postgres, redis: &Redis) -> Scene {
    let place = Place {
        shape: Shape::Postgres,
        dir: tempfile::tempdir().expect("a temporary folder"),
        database: postgres.database().await,
        // A name that no database of the shared server has: the place drops it there when it goes.
        redis: Some((redis.url(), format!("ws_test_{}", uuid::Uuid::now_v7().simple()))),
    };
    let faults = vec![parse_fault("slow=1/1:60").expect("a fault")];
    Scene::at(place, Options { activities: 120, stream_points: 60, athletes: 2, faults, ..Options::default() }).await
}

/// Nothing twice: every answer was taken once, but for the ones in flight at an outage.
async fn twice(scene: &Scene) -> u64 {
    let ledger = scene.ledger().await;
    let ids = ledger["by_id"]["streams"].as_object().expect("counts");
    ids.values().filter_map(serde_json::Value::as_u64).map(|n| n - 1).sum()
}

async fn end(processes: Vec<Process>) {
    for mut process in processes {
        assert!(!process.has_ended(), "a process ended by itself: {}", process.said());
        process.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_is_flushed_and_restarted() {
    let (postgres, mut redis) = (Postgres::start().await, Redis::start().await);
    let scene = scene(&postgres, &redis).await;
    let api = Api::of_shape(&scene).await;
    let processes = scene.start_all();
    let started = Instant::now();
    let mut runs = Vec::new();
    for person in &scene.people {
        runs.push(scene.accept_for(person.connection, &SyncRequest::default()).await);
    }
    scene.until_calls("streams", 20).await;
    assert!(redis.ask("FLUSHALL").await);
    scene.until_calls("streams", 60).await;
    redis.kill();
    // Without Redis: what runs goes on, and what is accepted is on disk.
    let before = scene.calls("streams").await;
    let call =
        scene.http.post(format!("{}/api/v1/strava/users/{}/sync?since=1700000000", api.url, scene.people[0].user));
    let answer = call.header("x-api-key", &api.key).send().await.expect("answers");
    assert_eq!(answer.status().as_u16(), 200, "accepting does not need Redis");
    let body: serde_json::Value = answer.json().await.expect("is JSON");
    scene.until_calls("streams", before + 10).await;
    redis.start_again().await;
    runs.push(wearsync::model::RunId(body["task_id"].as_str().expect("an id").parse().expect("a UUID")));
    for run in runs {
        scene.until_success(run).await;
    }
    scene.check().await;
    let twice = twice(&scene).await;
    println!(
        "Redis flushed, then killed and restarted: {:.0} s, {twice} answers read twice",
        started.elapsed().as_secs_f64()
    );
    assert_eq!(twice, 0);
    end(processes).await;
    end(vec![api.process]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn listeners_miss_nothing_while_redis_is_away() {
    let (postgres, mut redis) = (Postgres::start().await, Redis::start().await);
    let scene = scene(&postgres, &redis).await;
    let api = Api::of_shape(&scene).await;
    let processes = scene.start_all();
    let done = Arc::new(AtomicBool::new(false));
    let listening = watch::listen(&scene, &api, &done);
    let connection = scene.people[0].connection;
    let long = scene.accept_for(connection, &SyncRequest::default()).await;
    scene.until_calls("streams", 10).await;
    assert!(redis.ask("FLUSHALL").await);
    scene.until_calls("streams", 20).await;
    redis.kill();
    // Told to nobody: only the rows have how these end.
    scene.until_success(long).await;
    let again = |since_ms| SyncRequest { since_ms: Some(since_ms), ..SyncRequest::default() };
    let queued = scene.accept_for(connection, &again(1_600_000_000_000)).await;
    scene.engine.db.cancel_run(queued, scene.engine.clock.now()).await.expect("cancels");
    redis.start_again().await;
    scene.until_success(scene.accept_for(connection, &again(1_600_000_000_001)).await).await;
    watch::until_heartbeat().await;
    done.store(true, Ordering::SeqCst);
    let heard = listening.await.expect("listens");
    assert_eq!(heard.len(), 7, "two syncs, and one that was cancelled");
    watch::check(&scene, &heard).await;
    end(processes).await;
    end(vec![api.process]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_is_restarted() {
    let (postgres, redis) = (Postgres::start().await, Redis::start().await);
    let scene = scene(&postgres, &redis).await;
    let mut api = Api::of_shape(&scene).await;
    let processes = scene.start_all();
    let started = Instant::now();
    let mut runs = Vec::new();
    for person in &scene.people {
        runs.push(scene.accept_for(person.connection, &SyncRequest::default()).await);
    }
    for (mode, calls) in [("fast", 20), ("immediate", 80)] {
        scene.until_calls("streams", calls).await;
        postgres.down(mode);
        let away = Instant::now();
        let path = format!("{}/api/v1/strava/users/{}/sync", api.url, scene.people[0].user);
        let answer = scene.http.post(path).header("x-api-key", &api.key).send().await.expect("answers");
        assert_eq!(answer.status().as_u16(), 503, "{mode}");
        assert!(answer.headers().contains_key("retry-after"), "{:?}", answer.headers());
        println!("PostgreSQL away ({mode}): 503 after {:.1} s", away.elapsed().as_secs_f64());
        assert!(away.elapsed() < Duration::from_secs(15));
        // Longer than a lease.
        tokio::time::sleep(Duration::from_millis(2500)).await;
        postgres.up();
        api.until_up(&scene).await;
    }
    for run in runs {
        scene.until_success(run).await;
    }
    scene.check().await;
    let twice = twice(&scene).await;
    println!("PostgreSQL restarted twice: {:.0} s, {twice} answers read twice", started.elapsed().as_secs_f64());
    assert!(twice <= 4, "more than what was in flight: {twice}");
    end(processes).await;
    end(vec![api.process]).await;
}
