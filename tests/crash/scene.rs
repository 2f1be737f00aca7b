//! The simulator, an engine that accepts and never works, connected users, and the processes that do work.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use secrecy::ExposeSecret as _;
use serde_json::{Value, json};
use wearsync::clock::Clock;
use wearsync::model::{Class, ConnectionId, RunId, RunSource, RunState, SyncRequest, UserId};
use wearsync::simulator::{self, Options, Running};
use wearsync::storage::{NewApiKey, NewUser, Run};
use wearsync::sync::{self, Engine};
use wearsync::{export, vault};

use crate::process::Process;
use crate::support::{self, Place, Shape, client, get, post, truth};

/// One user with a connection to one athlete of the simulator.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Person {
    pub(crate) user: UserId,
    pub(crate) connection: ConnectionId,
    pub(crate) athlete: u32,
}

pub(crate) struct Scene {
    pub(crate) place: Place,
    pub(crate) sim: Running,
    pub(crate) engine: Arc<Engine>,
    pub(crate) people: Vec<Person>,
    pub(crate) http: reqwest::Client,
}

impl Scene {
    /// One user for each athlete of the simulator.
    pub(crate) async fn new(shape: Shape, options: Options) -> Self {
        Self::at(Place::new(shape).await, options).await
    }

    pub(crate) async fn at(place: Place, options: Options) -> Self {
        let athletes = options.athletes;
        let sim = simulator::start(options, Clock::system()).await.expect("the simulator starts");
        let engine = support::engine_without_files(&place, &sim.url()).await;
        let mut scene = Self { place, sim, engine, people: Vec::new(), http: client() };
        for athlete in 0..athletes {
            let user = scene.user().await;
            let connection = scene.connect(user, athlete).await;
            scene.people.push(Person { user, connection, athlete });
        }
        scene
    }

    pub(crate) async fn user(&self) -> UserId {
        self.engine.db.insert_user(NewUser::default(), self.engine.clock.now()).await.expect("a user").id
    }

    /// Binds a user to an athlete.
    pub(crate) async fn connect(&self, user: UserId, athlete: u32) -> ConnectionId {
        let grant = self.control("grant", json!({ "athlete": athlete })).await;
        let token = sync::secret(grant["refresh_token"].as_str().expect("a token"));
        let setup = self.engine.provider("strava").expect("strava");
        sync::connect_with_grant(&self.engine, setup, user, &token, None, None).await.expect("connects")
    }

    /// What works on this shape.
    pub(crate) fn commands(&self) -> Vec<Vec<&'static str>> {
        match self.place.shape {
            Shape::Sqlite => vec![vec!["serve"]],
            Shape::Postgres => vec![vec!["worker", "--export"], vec!["worker"]],
        }
    }

    pub(crate) fn start(&self, args: &[&str], settings: &[(&str, &str)]) -> Process {
        let mut env = self.place.env(&self.sim.url());
        for (name, value) in [("LEASE", "2s"), ("RENEW", "500ms"), ("SWEEP", "500ms"), ("EVENT_HEARTBEAT", "1s")] {
            env.insert(format!("WEARSYNC_{name}"), value.to_owned());
        }
        for (name, value) in settings {
            env.insert((*name).to_owned(), (*value).to_owned());
        }
        let log = self.place.dir.path().join(format!("{}.log", uuid::Uuid::now_v7().simple()));
        Process::start(args, &env, &log)
    }

    /// All that work on this shape.
    pub(crate) fn start_all(&self) -> Vec<Process> {
        self.commands().iter().map(|args| self.start(args, &[])).collect()
    }

    /// A key for everything.
    pub(crate) async fn api_key(&self) -> String {
        let secret = vault::new_api_key();
        let secret = secret.expose_secret();
        let new = NewApiKey {
            hash: vault::hash_secret(secret),
            prefix: secret[..7].to_owned(),
            name: "crash".to_owned(),
            scopes: "admin".to_owned(),
            created_by: None,
            expires_at: None,
        };
        self.engine.db.insert_api_key(new, self.engine.clock.now()).await.expect("a key");
        secret.to_owned()
    }

    pub(crate) async fn control(&self, path: &str, body: Value) -> Value {
        post(&self.http, &format!("{}/_simulator/{path}", self.sim.url()), &body).await
    }

    pub(crate) async fn ledger(&self) -> Value {
        get(&self.http, &format!("{}/_simulator/ledger", self.sim.url())).await["ledger"].clone()
    }

    /// Calls that reached one of the simulator's endpoints.
    pub(crate) async fn calls(&self, endpoint: &str) -> u64 {
        self.ledger().await["calls"][endpoint].as_u64().unwrap_or(0)
    }

    /// Waits for so many calls; the last one is still being answered if the simulator is slow.
    pub(crate) async fn until_calls(&self, endpoint: &str, least: u64) {
        let started = Instant::now();
        while self.calls(endpoint).await < least {
            assert!(started.elapsed() < Duration::from_secs(30), "{least} calls of {endpoint} do not come");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// A sync of the first user.
    pub(crate) async fn accept(&self, request: &SyncRequest) -> RunId {
        self.accept_for(self.people[0].connection, request).await
    }

    pub(crate) async fn accept_for(&self, connection: ConnectionId, request: &SyncRequest) -> RunId {
        let setup = self.engine.provider("strava").expect("strava");
        let (class, source) = (Class::Interactive, RunSource::Pull);
        let accepted = sync::submit(&self.engine, setup, connection, request, class, source, None).await;
        accepted.expect("accepts").expect("is active").id
    }

    pub(crate) async fn run(&self, id: RunId) -> Run {
        self.engine.db.find_run(id).await.expect("reads").expect("is there")
    }

    /// Waits for the end of a run, whatever it is, as long as it moves. A database that is away for a moment is asked
    /// again.
    pub(crate) async fn until_final(&self, id: RunId) -> Run {
        let (mut moved, mut committed) = (Instant::now(), 0);
        loop {
            let run = self.engine.db.find_run(id).await;
            if let Ok(Some(run)) = &run {
                if run.run_state().is_final() {
                    return run.clone();
                }
                if run.committed != committed {
                    (moved, committed) = (Instant::now(), run.committed);
                }
            }
            assert!(moved.elapsed() < Duration::from_secs(120), "the run does not end: {run:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits for the end of a run, which has to be a success.
    pub(crate) async fn until_success(&self, id: RunId) {
        let run = self.until_final(id).await;
        assert_eq!(run.run_state(), RunState::Success, "{run:?}");
    }

    /// A run whose workers die three times in a row without a page is parked, on purpose: the third kill waits for one.
    pub(crate) async fn until_not_parked_next(&self, id: RunId) {
        let started = Instant::now();
        loop {
            let run = self.run(id).await;
            // The claim after a kill is what counts it: one may be uncounted yet.
            if run.crashes < 1 || run.run_state().is_final() {
                return;
            }
            assert!(started.elapsed() < Duration::from_secs(30), "the run does not move: {run:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Where a person's files are.
    pub(crate) fn folder(&self, person: &Person) -> PathBuf {
        let exports = self.place.export_dir();
        if self.people.len() > 1 { exports.join(export::user_folder(None, person.user)) } else { exports }
    }

    /// Files equal the database: written once more from its rows, into another folder, they are the same byte for byte.
    /// Only when nothing else works.
    pub(crate) async fn check_projection(&self) {
        let again = self.place.dir.path().join("again");
        let settings = [("WEARSYNC_EXPORT_DIR", again.to_str().expect("text"))];
        let engine = support::engine(&self.place, &self.sim.url(), Clock::system(), &settings).await;
        engine.db.free_leases(engine.clock.now()).await.expect("nobody else works");
        for person in &self.people {
            engine.db.mark_all_exports(person.connection).await.expect("marks");
            sync::drain(&engine, person.connection).await.expect("drains");
        }
        let tree = |folder: &std::path::Path| {
            let mut tree = support::tree(folder);
            // It tells how far the windows are, and they move without a file.
            tree.retain(|path, _| !path.ends_with("last_sync.json"));
            tree
        };
        let (have, want) = (tree(&self.place.export_dir()), tree(&again));
        let differ: Vec<_> =
            want.iter().filter(|(path, bytes)| have.get(*path) != Some(*bytes)).map(|(path, _)| path).collect();
        let extra: Vec<_> = have.keys().filter(|path| !want.contains_key(*path)).collect();
        assert!(differ.is_empty() && extra.is_empty(), "other bytes or missing: {differ:?}, of nothing: {extra:?}");
        assert!(want.len() > 50, "there is something to compare");
    }

    /// Rows and files of everybody are exactly what the simulator issued.
    pub(crate) async fn check(&self) {
        for person in &self.people {
            self.check_person(person).await;
        }
    }

    pub(crate) async fn check_person(&self, person: &Person) {
        let truth = truth(&self.http, &self.sim.url(), person.athlete).await;
        // The exporting process may still be at it: the last batch comes with its sweep.
        for _ in 0..100 {
            if self.engine.db.list_export_due().await.expect("reads").is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        support::check(&self.engine.db, person.connection, &truth, &self.folder(person)).await;
    }
}

/// A process that answers HTTP, at an address that it keeps over its restarts.
pub(crate) struct Api {
    pub(crate) url: String,
    pub(crate) key: String,
    bind: String,
    args: Vec<&'static str>,
    pub(crate) process: Process,
}

impl Api {
    pub(crate) async fn start(scene: &Scene, args: &[&'static str]) -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("a port").port();
        let bind = format!("127.0.0.1:{port}");
        let process = scene.start(args, &[("WEARSYNC_BIND", &bind)]);
        let key = scene.api_key().await;
        let mut api = Self { url: format!("http://{bind}"), key, bind, args: args.to_vec(), process };
        api.until_up(scene).await;
        api
    }

    /// What answers HTTP on this shape; on SQLite it works as well.
    pub(crate) async fn of_shape(scene: &Scene) -> Self {
        match scene.place.shape {
            Shape::Sqlite => Self::start(scene, &["serve"]).await,
            Shape::Postgres => Self::start(scene, &["serve", "--no-worker"]).await,
        }
    }

    pub(crate) fn kill_and_start(&mut self, scene: &Scene) {
        self.restart_at(scene, &[]);
    }

    /// Kills it and starts it with these settings besides.
    pub(crate) fn restart_at(&mut self, scene: &Scene, settings: &[(&str, &str)]) {
        self.process.kill();
        let settings = [settings, &[("WEARSYNC_BIND", self.bind.as_str())]].concat();
        self.process = scene.start(&self.args, &settings);
    }

    pub(crate) async fn until_up(&mut self, scene: &Scene) {
        let started = Instant::now();
        while self.status(scene, "/health/ready").await != Some(200) {
            assert!(started.elapsed() < Duration::from_secs(20), "it does not come up: {}", self.process.said());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The status of an answer; `None` where there was none.
    pub(crate) async fn status(&self, scene: &Scene, path: &str) -> Option<u16> {
        let answer = scene.http.get(format!("{}{path}", self.url)).header("x-api-key", &self.key).send().await;
        answer.ok().map(|answer| answer.status().as_u16())
    }
}
