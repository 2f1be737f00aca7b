//! The simulator, an engine that accepts and never works, one connected user, and the processes that do work.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use wearsync::clock::Clock;
use wearsync::model::{Class, ConnectionId, RunId, RunSource, RunState, SyncRequest, UserId};
use wearsync::simulator::{self, Options, Running};
use wearsync::storage::{NewUser, Run};
use wearsync::sync::{self, Engine};

use crate::process::Process;
use crate::support::{self, Place, Shape, client, get, post, truth};

pub(crate) struct Scene {
    pub(crate) place: Place,
    pub(crate) sim: Running,
    pub(crate) engine: Arc<Engine>,
    pub(crate) user: UserId,
    pub(crate) connection: ConnectionId,
    pub(crate) http: reqwest::Client,
}

impl Scene {
    pub(crate) async fn new(shape: Shape, options: Options) -> Self {
        Self::at(Place::new(shape).await, options).await
    }

    pub(crate) async fn at(place: Place, options: Options) -> Self {
        let sim = simulator::start(options, Clock::system()).await.expect("the simulator starts");
        let engine = support::engine_without_files(&place, &sim.url()).await;
        let user = engine.db.insert_user(NewUser::default(), engine.clock.now()).await.expect("a user").id;
        let mut scene = Self { place, sim, engine, user, connection: ConnectionId::new(), http: client() };
        scene.connection = scene.connect(user).await;
        scene
    }

    /// Binds a user to the first athlete.
    pub(crate) async fn connect(&self, user: UserId) -> ConnectionId {
        let grant = self.control("grant", json!({ "athlete": 0 })).await;
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
        for (name, value) in [("LEASE", "2s"), ("RENEW", "500ms"), ("SWEEP", "500ms")] {
            env.insert(format!("WEARSYNC_{name}"), value.to_owned());
        }
        for (name, value) in settings {
            env.insert((*name).to_owned(), (*value).to_owned());
        }
        Process::start(args, &env)
    }

    pub(crate) async fn control(&self, path: &str, body: Value) -> Value {
        post(&self.http, &format!("{}/_simulator/{path}", self.sim.url()), &body).await
    }

    pub(crate) async fn ledger(&self) -> Value {
        get(&self.http, &format!("{}/_simulator/ledger", self.sim.url())).await["ledger"].clone()
    }

    pub(crate) async fn accept(&self, request: &SyncRequest) -> RunId {
        self.accept_for(self.connection, request).await
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

    /// Waits for the end of a run, which has to be a success.
    pub(crate) async fn until_success(&self, id: RunId) {
        let started = Instant::now();
        loop {
            let run = self.run(id).await;
            if run.run_state().is_final() {
                assert_eq!(run.run_state(), RunState::Success, "{run:?}");
                return;
            }
            assert!(started.elapsed() < Duration::from_secs(120), "the run does not end: {run:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
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

    /// Rows and files are exactly what the simulator issued.
    pub(crate) async fn check(&self) {
        let truth = truth(&self.http, &self.sim.url(), 0).await;
        // The exporting process may still be at it: the last batch comes with its sweep.
        for _ in 0..100 {
            if self.engine.db.list_export_due().await.expect("reads").is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        support::check(&self.engine.db, self.connection, &truth, &self.place.export_dir()).await;
    }
}
