//! A place, a simulator in a process of its own, and an engine beside it.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};
use wearsync::clock::Clock;
use wearsync::model::{Class, ConnectionId, RunReport, RunSource, RunState, SyncRequest, UserId};
use wearsync::storage::NewUser;
use wearsync::sync::{self, Engine};
use wearsync::telemetry;

use crate::machine;
use crate::support::{self, Place, Shape};

/// A process of ours, ended when dropped.
pub(crate) struct Process(pub(crate) Child);

impl Process {
    pub(crate) fn start(args: &[&str], env: &BTreeMap<String, String>, stdout: Stdio) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_wearsync"))
            .args(args)
            .env_clear()
            .envs(env)
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(if std::env::var("BENCH_LOG").is_ok() { Stdio::inherit() } else { Stdio::null() })
            .spawn()
            .expect("the program starts");
        Self(child)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The simulator, without quotas, faults or rows that cannot be read.
pub(crate) struct Simulator {
    pub(crate) url: String,
    /// Ends with this.
    _process: Process,
}

impl Simulator {
    pub(crate) fn start(activities: u32, points: u32) -> Self {
        let (activities, points) = (activities.to_string(), points.to_string());
        let args = [
            "--json",
            "simulator",
            "--athletes",
            "1",
            "--activities",
            &activities,
            "--stream-points",
            &points,
            "--manual-share",
            "0",
            "--private-share",
            "0",
            "--awkward=false",
        ];
        let mut process = Process::start(&args, &BTreeMap::new(), Stdio::piped());
        let mut out = process.0.stdout.take().expect("is piped");
        let (mut text, mut piece) = (Vec::new(), [0; 4096]);
        let url = loop {
            let n = out.read(&mut piece).expect("reads");
            assert!(n > 0, "the simulator ended");
            text.extend_from_slice(&piece[..n]);
            if let Ok(value) = serde_json::from_slice::<Value>(&text) {
                break value["url"].as_str().expect("a url").to_owned();
            }
        };
        Self { url, _process: process }
    }
}

/// Everything that a sync needs.
pub(crate) struct Rig {
    pub(crate) place: Place,
    pub(crate) sim: Simulator,
    pub(crate) engine: Arc<Engine>,
    pub(crate) user: UserId,
    pub(crate) connection: ConnectionId,
}

/// What a sync took.
pub(crate) struct Took {
    pub(crate) report: RunReport,
    pub(crate) seconds: f64,
    /// Of this process, milliseconds.
    pub(crate) cpu_ms: f64,
    /// Of the database's server, milliseconds; 0 with SQLite.
    pub(crate) backends_ms: f64,
    /// Seconds waited for each step.
    pub(crate) steps: Vec<(&'static str, f64)>,
}

impl Rig {
    /// `parts` as in the setting: `none`, `streams`.
    pub(crate) async fn new(shape: Shape, activities: u32, points: u32, parts: &str) -> Self {
        telemetry::install_metrics();
        let place = Place::new(shape).await;
        let sim = Simulator::start(activities, points);
        let engine =
            support::engine(&place, &sim.url, Clock::system(), &[("WEARSYNC_PROVIDERS__STRAVA__PARTS", parts)]).await;
        let user = engine.db.insert_user(NewUser::default(), engine.clock.now()).await.expect("a user").id;
        let grant =
            support::post(&support::client(), &format!("{}/_simulator/grant", sim.url), &json!({ "athlete": 0 })).await;
        let token = sync::secret(grant["refresh_token"].as_str().expect("a token"));
        let setup = engine.provider("strava").expect("strava");
        let connection = sync::connect_with_grant(&engine, setup, user, &token, None, None).await.expect("connects");
        Self { place, sim, engine, user, connection }
    }

    /// The same place with fresh connections to the database: what the old ones wrote is in its statistics then.
    pub(crate) async fn reopen(&mut self, parts: &str) {
        self.engine.db.close().await;
        let settings = [("WEARSYNC_PROVIDERS__STRAVA__PARTS", parts)];
        self.engine = support::engine(&self.place, &self.sim.url, Clock::system(), &settings).await;
    }

    /// One sync, from accept to settled.
    pub(crate) async fn sync(&self) -> Took {
        let setup = self.engine.provider("strava").expect("strava");
        let database = self.place.redis.as_ref().map_or("", |(_, name)| name);
        let backends = || if database.is_empty() { 0.0 } else { machine::backends_cpu_ms(database) };
        let (steps, cpu, served, begun) = (steps(), machine::own_cpu_ms(), backends(), Instant::now());
        let request = SyncRequest::default();
        let (class, source) = (Class::Interactive, RunSource::Pull);
        let accepted = sync::submit(&self.engine, setup, self.connection, &request, class, source, None).await;
        let id = accepted.expect("accepts").expect("is active").id;
        sync::execute(&self.engine, id).await.expect("executes");
        let seconds = begun.elapsed().as_secs_f64();
        let (cpu_ms, backends_ms) = (machine::own_cpu_ms() - cpu, backends() - served);
        let run = self.engine.db.find_run(id).await.expect("reads").expect("is there");
        assert_eq!(run.run_state(), RunState::Success, "{:?}", run.reason);
        let report = serde_json::from_str(run.report.as_deref().unwrap_or("{}")).expect("a report");
        let steps = self::steps().into_iter().zip(steps).map(|((name, now), (_, then))| (name, now - then)).collect();
        Took { report, seconds, cpu_ms, backends_ms, steps }
    }
}

/// Seconds per step so far, from the metrics.
fn steps() -> Vec<(&'static str, f64)> {
    let text = telemetry::install_metrics().render();
    let sum = |name: &str| {
        let lines = text.lines().filter(|line| line.starts_with(name));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    };
    vec![
        ("fetch", sum("wearsync_provider_call_seconds_sum")),
        ("load", sum("wearsync_page_step_seconds_sum{step=\"load\"}")),
        ("prepare", sum("wearsync_page_step_seconds_sum{step=\"prepare\"}")),
        ("commit", sum("wearsync_page_step_seconds_sum{step=\"commit\"}")),
        ("files", sum("wearsync_file_batch_seconds_sum")),
    ]
}
