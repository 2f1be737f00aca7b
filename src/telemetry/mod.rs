//! What the service tells of itself: one function per event, which writes the log line and counts together, so that
//! logs and metrics never disagree.
//!
//! May name model. What must always hold: no key, token, OAuth state, or body of a request or answer ever comes in
//! here; labels take few values (never an id, never text from outside); one thing has one field name everywhere (`run`,
//! `provider`, `stream`, `seconds`). Log lines go to stderr: stdout belongs to the answers of commands.

use std::fmt::Display;
use std::io::IsTerminal as _;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use metrics::{counter, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing::{debug, info, warn};
use tracing_subscriber::EnvFilter;

use crate::model::{AccountId, Class, ConnectionId, ProviderName, RunId, RunSource, RunState, StreamName};

/// Seconds; from a query to a page of a slow provider.
const BUCKETS: &[f64] = &[0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

/// How often histograms are emptied into their buckets, asked or not.
const UPKEEP: Duration = Duration::from_secs(10);

/// A Redis that is away is asked often; the log hears of it this often.
const REDIS_SILENCE: Duration = Duration::from_secs(10);

/// The one gauge.
const LISTENERS: &str = "wearsync_listeners";

const HELP: &[(&str, &str)] = &[
    ("wearsync_runs_accepted_total", "Runs written down for a caller, the clock or a webhook"),
    ("wearsync_runs_claimed_total", "Times a worker took a run"),
    ("wearsync_runs_settled_total", "Runs that ended, by state"),
    ("wearsync_runs_put_back_total", "Times a run gave its worker back, by reason"),
    ("wearsync_leases_lost_total", "Runs that another worker took over or that were changed meanwhile"),
    ("wearsync_deliveries_total", "Calls to addresses of webhooks, by outcome"),
    ("wearsync_subscriptions_total", "Subscriptions asked for by a change of settings, by outcome"),
    ("wearsync_pages_total", "Pages of provider data committed"),
    ("wearsync_records_total", "Records written by committed pages"),
    ("wearsync_samples_total", "Samples written by committed pages"),
    ("wearsync_provider_calls_total", "Calls to providers, by status; 0 for no answer"),
    ("wearsync_tokens_refreshed_total", "Refreshes of access tokens, by outcome"),
    ("wearsync_connections_total", "Connections made and ended, by what happened"),
    ("wearsync_grants_left_total", "Grants given back at providers, by outcome"),
    ("wearsync_quota_waits_total", "Times a run had to wait for a provider's quota"),
    ("wearsync_schedule_begun_total", "Runs begun by the clock"),
    ("wearsync_schedule_released_total", "Runs let go that waited on a quota"),
    ("wearsync_silences_total", "Connections whose pushes stopped, or came again"),
    ("wearsync_files_total", "Entity files written"),
    ("wearsync_http_requests_total", "Requests answered, by route and status"),
    ("wearsync_redis_errors_total", "Calls to Redis that failed"),
    (LISTENERS, "Event streams that are open now"),
    ("wearsync_sweeps_total", "Looks for runs that nobody was told of"),
    ("wearsync_sweep_found_total", "Runs found by a sweep, by what was done"),
    ("wearsync_run_seconds", "From claim to end of a run, seconds"),
    ("wearsync_page_seconds", "Preparing and committing a page, seconds"),
    ("wearsync_page_step_seconds", "One step of a page (load, prepare, commit), seconds"),
    ("wearsync_provider_call_seconds", "Calls to providers, seconds"),
    ("wearsync_file_batch_seconds", "Writing a batch of entity files, seconds"),
    ("wearsync_http_request_seconds", "Answering a request, seconds"),
];

/// Begins to log to stderr. `filter` is written as `RUST_LOG` is. A second call changes nothing.
///
/// # Errors
/// When the filter cannot be read.
pub fn init(json: bool, filter: &str) -> Result<(), String> {
    let filter =
        EnvFilter::try_new(filter).map_err(|error| format!("the log filter `{filter}` is not one: {error}"))?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // Refused when somebody logs already, which is what was asked for.
    let _ = if json {
        lines.json().flatten_event(true).try_init()
    } else {
        lines.with_ansi(std::io::stderr().is_terminal()).try_init()
    };
    Ok(())
}

/// Begins to count, once per process; every call answers the same handle, whose `render` is `/metrics`.
pub fn install_metrics() -> PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE
        .get_or_init(|| {
            let builder = PrometheusBuilder::new();
            let Ok(builder) = builder.set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), BUCKETS) else {
                unreachable!("only an empty list is refused")
            };
            let recorder = builder.build_recorder();
            let handle = recorder.handle();
            // Refused when another recorder counts already: then this handle stays empty.
            if metrics::set_global_recorder(recorder).is_ok() {
                for (name, help) in HELP {
                    if name.ends_with("_seconds") {
                        metrics::describe_histogram!(*name, *help);
                    } else if *name == LISTENERS {
                        metrics::describe_gauge!(*name, *help);
                    } else {
                        metrics::describe_counter!(*name, *help);
                    }
                }
                // Without it, histograms grow for as long as nobody asks for the metrics.
                let kept = handle.clone();
                std::thread::spawn(move || {
                    loop {
                        std::thread::sleep(UPKEEP);
                        kept.run_upkeep();
                    }
                });
            }
            handle
        })
        .clone()
}

/// Counts for as long as it lives.
#[derive(Debug)]
pub struct Listening(());

/// Somebody opened an event stream.
#[must_use]
pub fn listener() -> Listening {
    debug!("event stream opened");
    gauge!(LISTENERS).increment(1.0);
    Listening(())
}

impl Drop for Listening {
    fn drop(&mut self) {
        debug!("event stream ended");
        gauge!(LISTENERS).decrement(1.0);
    }
}

/// What became of a call to a webhook's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// Kept.
    Accepted,
    /// It was kept before.
    Duplicate,
    /// Its sender may be anybody.
    Untrusted,
    /// It cannot be read.
    Unreadable,
    /// Nothing is set up that it could be believed by.
    Off,
}

/// A provider, or somebody who looks like it, called a webhook's address; `why` it was refused, in our own words.
pub fn delivery_received(provider: ProviderName, outcome: Received, why: &str) {
    let word = match outcome {
        Received::Accepted => "accepted",
        Received::Duplicate => "duplicate",
        Received::Untrusted => "untrusted",
        Received::Unreadable => "unreadable",
        Received::Off => "off",
    };
    match outcome {
        Received::Off => warn!(%provider, outcome = word, why, "delivery refused"),
        _ => debug!(%provider, outcome = word, "delivery received"),
    }
    counter!("wearsync_deliveries_total", "provider" => provider.0, "outcome" => word).increment(1);
}

/// A provider was asked to send its events; what was done, and why nothing was.
pub fn subscribed(provider: ProviderName, outcome: &'static str, failure: Option<&str>) {
    match failure {
        None => info!(%provider, outcome, "subscribed to events"),
        Some(why) => warn!(%provider, outcome, why, "events could not be subscribed to"),
    }
    counter!("wearsync_subscriptions_total", "provider" => provider.0, "outcome" => outcome).increment(1);
}

/// A run is written down.
pub fn run_accepted(run: RunId, provider: ProviderName, class: Class, source: RunSource) {
    let (class, source) = (class_word(class), source.as_str());
    info!(%run, %provider, class, source, "run accepted");
    counter!("wearsync_runs_accepted_total", "provider" => provider.0, "class" => class, "source" => source)
        .increment(1);
}

/// A worker took a run; `epoch` counts its claims.
pub fn run_claimed(run: RunId, provider: ProviderName, class: Class, epoch: i64) {
    let class = class_word(class);
    info!(%run, %provider, class, epoch, "run claimed");
    counter!("wearsync_runs_claimed_total", "provider" => provider.0, "class" => class).increment(1);
}

/// A run ended; `seconds` since its last claim.
pub fn run_settled(run: RunId, provider: ProviderName, state: RunState, seconds: f64) {
    let state = state.as_str();
    info!(%run, %provider, state, seconds, "run settled");
    counter!("wearsync_runs_settled_total", "provider" => provider.0, "state" => state).increment(1);
    histogram!("wearsync_run_seconds", "provider" => provider.0).record(seconds);
}

/// A run gave its worker back and is due again at `due`. `reason` is one of a few words: `quota`, `retry`, `gave_way`.
pub fn run_put_back(run: RunId, provider: ProviderName, reason: &'static str, due: DateTime<Utc>) {
    info!(%run, %provider, reason, %due, "run put back");
    counter!("wearsync_runs_put_back_total", "provider" => provider.0, "reason" => reason).increment(1);
}

/// A worker found that the run is no longer its own: its work since the last page is dropped.
pub fn lease_lost(run: RunId) {
    warn!(%run, "lease lost");
    counter!("wearsync_leases_lost_total").increment(1);
}

/// A step of a page ended, one of a few words: `load` (what is stored already), `prepare`, `commit`.
pub fn page_step(step: &'static str, seconds: f64) {
    histogram!("wearsync_page_step_seconds", "step" => step).record(seconds);
}

/// A page is stored, with this many records and samples written; `seconds` from the answer to the commit.
pub fn page_committed(
    run: RunId,
    provider: ProviderName,
    stream: StreamName,
    records: u64,
    samples: u64,
    seconds: f64,
) {
    debug!(%run, %provider, %stream, records, samples, seconds, "page committed");
    counter!("wearsync_pages_total", "provider" => provider.0, "stream" => stream.0).increment(1);
    counter!("wearsync_records_total", "provider" => provider.0, "stream" => stream.0).increment(records);
    counter!("wearsync_samples_total", "provider" => provider.0, "stream" => stream.0).increment(samples);
    histogram!("wearsync_page_seconds", "provider" => provider.0, "stream" => stream.0).record(seconds);
}

/// A provider was called; `status` is 0 where no answer came.
pub fn call(provider: ProviderName, status: u16, seconds: f64) {
    debug!(%provider, status, seconds, "provider called");
    counter!("wearsync_provider_calls_total", "provider" => provider.0, "status" => status.to_string()).increment(1);
    histogram!("wearsync_provider_call_seconds", "provider" => provider.0).record(seconds);
}

/// How a refresh went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refresh {
    /// A new token is stored.
    Ok,
    /// The provider refused the grant.
    Refused,
    /// The provider gave a new token, but it was lost before it was stored.
    RotationLost,
    /// Worth trying again.
    Transient,
}

/// An access token was asked for.
pub fn token_refreshed(provider: ProviderName, account: AccountId, outcome: Refresh) {
    let word = match outcome {
        Refresh::Ok => "ok",
        Refresh::Refused => "refused",
        Refresh::RotationLost => "rotation_lost",
        Refresh::Transient => "transient",
    };
    match outcome {
        Refresh::Ok => info!(%provider, %account, outcome = word, "token refreshed"),
        _ => warn!(%provider, %account, outcome = word, "token not refreshed"),
    }
    counter!("wearsync_tokens_refreshed_total", "provider" => provider.0, "outcome" => word).increment(1);
}

/// A user was connected with an account.
pub fn connected(provider: ProviderName, connection: ConnectionId) {
    info!(%provider, %connection, "connected");
    counter!("wearsync_connections_total", "provider" => provider.0, "what" => "connected").increment(1);
}

/// A connection ended; `what` is one of a few words: `disconnected`, `purged`, `deauthorized`.
pub fn disconnected(provider: &'static str, connection: ConnectionId, what: &'static str) {
    info!(provider, %connection, what, "connection ended");
    counter!("wearsync_connections_total", "provider" => provider, "what" => what).increment(1);
}

/// A provider was told that a grant is used no more, or could not be told.
pub fn grant_left(provider: &'static str, account: AccountId, failure: Option<&String>) {
    match failure {
        None => info!(provider, %account, "grant given back"),
        Some(failure) => warn!(provider, %account, failure, "grant not given back: the provider may still list it"),
    }
    let outcome = if failure.is_none() { "ok" } else { "failed" };
    counter!("wearsync_grants_left_total", "provider" => provider, "outcome" => outcome).increment(1);
}

/// A run waits for its provider's quota.
pub fn quota_wait(run: RunId, provider: ProviderName, until: DateTime<Utc>) {
    info!(%run, %provider, %until, "quota spent");
    counter!("wearsync_quota_waits_total", "provider" => provider.0).increment(1);
}

/// Runs were begun by the clock, and runs that waited on a quota were let go.
pub fn schedule_step(provider: ProviderName, begun: u64, released: u64) {
    debug!(%provider, begun, released, "schedule step");
    counter!("wearsync_schedule_begun_total", "provider" => provider.0).increment(begun);
    counter!("wearsync_schedule_released_total", "provider" => provider.0).increment(released);
}

/// A connection that used to be pushed fell quiet, or is no longer.
pub fn connection_quiet(provider: ProviderName, connection: ConnectionId, quiet: bool) {
    if quiet {
        warn!(%provider, %connection, "the provider sends nothing any more about a connection; it is asked instead");
    } else {
        info!(%provider, %connection, "the provider sends again");
    }
    let what = if quiet { "fell_quiet" } else { "spoke" };
    counter!("wearsync_silences_total", "provider" => provider.0, "what" => what).increment(1);
}

/// Entity files are written and on disk.
pub fn file_batch(files: u64, seconds: f64) {
    debug!(files, seconds, "files written");
    counter!("wearsync_files_total").increment(files);
    histogram!("wearsync_file_batch_seconds").record(seconds);
}

/// Somebody tried to log in. Who it was is nobody's business who reads logs.
pub fn login(worked: bool) {
    let outcome = if worked { "ok" } else { "refused" };
    info!(outcome, "login");
    counter!("wearsync_logins_total", "outcome" => outcome).increment(1);
}

/// A developer has another password.
pub fn password_changed(developer: uuid::Uuid) {
    info!(%developer, "password changed");
}

/// A request was answered. `route` is the pattern (`/api/v1/tasks/{task_id}`), never the path as asked for.
pub fn http_request(method: &str, route: &str, status: u16, seconds: f64) {
    // A method is text from outside.
    let known = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"];
    let method = known.into_iter().find(|known| *known == method).unwrap_or("other");
    if status >= 500 {
        warn!(method, route, status, seconds, "request failed");
    } else {
        debug!(method, route, status, seconds, "request answered");
    }
    counter!("wearsync_http_requests_total", "method" => method, "route" => route.to_owned(), "status" => status.to_string())
        .increment(1);
    histogram!("wearsync_http_request_seconds", "method" => method, "route" => route.to_owned()).record(seconds);
}

/// A call to Redis failed.
pub fn redis_down(error: &dyn Display) {
    static TOLD: Mutex<Option<Instant>> = Mutex::new(None);
    counter!("wearsync_redis_errors_total").increment(1);
    let mut told = TOLD.lock().unwrap_or_else(PoisonError::into_inner);
    if told.is_none_or(|at| at.elapsed() >= REDIS_SILENCE) {
        *told = Some(Instant::now());
        warn!(%error, "Redis is away; work goes on at the pace of the sweep");
    }
}

/// Runs were looked for that nobody was told of: expired leases found, and due runs put on the ready list.
pub fn sweep(expired: u64, ready: u64) {
    if expired > 0 {
        warn!(expired, ready, "sweep found expired leases");
    } else {
        debug!(expired, ready, "sweep");
    }
    counter!("wearsync_sweeps_total").increment(1);
    counter!("wearsync_sweep_found_total", "what" => "expired").increment(expired);
    counter!("wearsync_sweep_found_total", "what" => "ready").increment(ready);
}

fn class_word(class: Class) -> &'static str {
    match class {
        Class::Interactive => "interactive",
        Class::Webhook => "webhook",
        Class::Schedule => "schedule",
        Class::Backfill => "backfill",
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::sync::Arc;

    use super::*;

    const ACME: ProviderName = ProviderName("acme");

    fn tell_everything() {
        let (run, account, at) = (RunId::new(), AccountId::new(), DateTime::<Utc>::UNIX_EPOCH);
        for outcome in
            [Received::Accepted, Received::Duplicate, Received::Untrusted, Received::Unreadable, Received::Off]
        {
            delivery_received(ACME, outcome, "");
        }
        subscribed(ACME, "created", None);
        subscribed(ACME, "error", Some("no answer"));
        run_accepted(run, ACME, Class::Interactive, RunSource::Pull);
        run_claimed(run, ACME, Class::Webhook, 1);
        run_settled(run, ACME, RunState::Partial, 1.5);
        run_put_back(run, ACME, "quota", at);
        lease_lost(run);
        page_step("commit", 0.01);
        page_committed(run, ACME, StreamName("activities"), 200, 5000, 0.3);
        call(ACME, 429, 0.2);
        for outcome in [Refresh::Ok, Refresh::Refused, Refresh::RotationLost, Refresh::Transient] {
            token_refreshed(ACME, account, outcome);
        }
        let connection = ConnectionId::new();
        connected(ACME, connection);
        disconnected(ACME.0, connection, "purged");
        grant_left(ACME.0, account, None);
        grant_left(ACME.0, account, Some(&"no answer".to_owned()));
        quota_wait(run, ACME, at);
        schedule_step(ACME, 3, 1);
        connection_quiet(ACME, ConnectionId::new(), true);
        connection_quiet(ACME, ConnectionId::new(), false);
        file_batch(7, 0.01);
        http_request("GET", "/api/v1/tasks/{task_id}", 200, 0.004);
        http_request("BREW", "/", 500, 0.004);
        redis_down(&"no answer");
        sweep(1, 2);
        drop(listener());
    }

    #[test]
    fn every_event_is_counted_and_described() {
        install_metrics();
        let handle = install_metrics();
        tell_everything();
        let text = handle.render();
        for line in [
            r#"wearsync_runs_accepted_total{provider="acme",class="interactive",source="pull"}"#,
            r#"wearsync_runs_settled_total{provider="acme",state="partial"}"#,
            r#"wearsync_records_total{provider="acme",stream="activities"} "#,
            r#"wearsync_provider_calls_total{provider="acme",status="429"}"#,
            r#"wearsync_tokens_refreshed_total{provider="acme",outcome="rotation_lost"}"#,
            r#"wearsync_http_requests_total{method="other",route="/",status="500"}"#,
            r#"wearsync_run_seconds_bucket{provider="acme",le="2.5"} "#,
        ] {
            assert!(text.contains(line), "{line} not in\n{text}");
        }
        for (name, _) in HELP {
            assert!(text.contains(&format!("# HELP {name} ")), "{name} is described but never told");
        }
        for line in text.lines().filter(|line| line.starts_with("# TYPE wearsync_")) {
            let name = line.split(' ').nth(2).unwrap();
            assert!(HELP.iter().any(|(known, _)| *known == name), "{name} is told but not described");
        }
    }

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn every_event_is_a_line_with_fields() {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::DEBUG)
            .json()
            .flatten_event(true)
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, tell_everything);
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        let told: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let find = |message: &str| told.iter().find(|line| line["message"] == message);
        assert_eq!(find("page committed").unwrap()["records"], 200);
        assert_eq!(find("run settled").unwrap()["state"], "partial");
        assert_eq!(find("request failed").unwrap()["level"], "WARN");
        assert!(told.iter().all(|line| line["message"].is_string()));
    }

    #[test]
    fn a_bad_filter_is_told() {
        assert!(init(false, "wearsync=loud").unwrap_err().contains("wearsync=loud"));
    }
}
