//! `wearsync simulator`: the simulated provider alone, with all its options.

use chrono::{DateTime, Utc};
use clap::Args;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::exit::{Exit, Outcome};
use super::output::remark;
use super::{Session, signals};
use crate::clock::Clock;
use crate::simulator::{Client, Fault, Options, Running, parse_fault, start};

/// What it can be told while it runs.
const CONTROLS: &str = "Controls, JSON below URL/_simulator (athletes are counted from 0):
  POST upload  {\"athlete\": 0, \"count\": 1}                     somebody records activities
  POST edit    {\"athlete\": 0, \"id\": ID, \"name\": \"…\"}       changes one
  POST delete  {\"athlete\": 0, \"id\": ID}                     deletes one
  POST event   {\"athlete\": 0, \"object_type\": \"activity\", \"object_id\": ID, \"aspect_type\": \"update\"}
                                                            sends an event, true or not
  POST grant   {\"athlete\": 0}                               a refresh token, as if that person had agreed
  POST revoke  {\"athlete\": 0}                               that person takes access back
  POST fault   {\"faults\": [\"429=1/3\"]}                    the faults from now on, as with --fault
  GET  truth?athlete=0                                      what there is
  GET  ledger                                               what was asked and sent";

#[derive(Debug, Args)]
#[command(after_help = CONTROLS)]
pub(crate) struct Simulator {
    /// Port on 127.0.0.1; 0 takes a free one
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// The same seed, epoch and calls give the same bytes
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The instant the world was made at, as 2026-02-05T08:30:00Z; without it, now
    #[arg(long, value_name = "TIME")]
    epoch: Option<DateTime<Utc>>,
    /// People with an account
    #[arg(long, default_value_t = 2)]
    athletes: u32,
    /// Activities of each, about one a day backwards
    #[arg(long, default_value_t = 400)]
    activities: u32,
    /// Points of each stream; 0 varies between 300 and 7200
    #[arg(long, default_value_t = 0)]
    stream_points: u32,
    /// Share of activities entered by hand, 0 to 1
    #[arg(long, default_value_t = 0.05, value_name = "SHARE", value_parser = parse_share)]
    manual_share: f64,
    /// Share of activities only their owner may see, 0 to 1
    #[arg(long, default_value_t = 0.05, value_name = "SHARE", value_parser = parse_share)]
    private_share: f64,
    /// Rows that break careless clients
    #[arg(long, default_value_t = true, num_args = 0..=1, default_missing_value = "true", require_equals = true, action = clap::ArgAction::Set)]
    awkward: bool,
    /// One ride of 13 days with 45 000 points for each athlete
    #[arg(long)]
    very_long: bool,
    /// Every other page is short without being the last
    #[arg(long)]
    short_pages: bool,
    /// Kudos, followers and gear distances grow with the number of calls
    #[arg(long, default_value_t = true, num_args = 0..=1, default_missing_value = "true", require_equals = true, action = clap::ArgAction::Set)]
    volatile: bool,
    /// Count calls and refuse those over the limits
    #[arg(long)]
    quota: bool,
    /// Calls allowed: overall a quarter hour, overall a day, reads a quarter hour, reads a day
    #[arg(long, value_name = "A,B,C,D", default_value = "200,2000,100,1000", value_parser = parse_limits)]
    limits: [u64; 4],
    /// Streams answer without quota headers
    #[arg(long)]
    streams_without_headers: bool,
    /// Life of an access token, seconds
    #[arg(long, default_value_t = 21_600, value_name = "SECONDS")]
    token_life: i64,
    /// Every refresh answers a new refresh token, and the old one is dead at once
    #[arg(long)]
    rotate: bool,
    /// An access token dies after so many calls
    #[arg(long, value_name = "CALLS")]
    expire_after_calls: Option<u64>,
    /// Applications known to the provider (again for more)
    #[arg(long = "client", value_name = "ID:SECRET", value_parser = parse_client)]
    clients: Vec<Client>,
    /// The consent page answers itself
    #[arg(long)]
    auto_approve: bool,
    /// The person presses Cancel
    #[arg(long, requires = "auto_approve")]
    refuse_consent: bool,
    /// Scopes that the person unticks
    #[arg(long = "untick", value_name = "SCOPE")]
    unticked_scopes: Vec<String>,
    /// Refuse visits and codes without PKCE
    #[arg(long)]
    require_pkce: bool,
    /// Events of push subscriptions carry a signature
    #[arg(long)]
    sign_events: bool,
    /// Share of events that are sent twice, 0 to 1
    #[arg(long, default_value_t = 0.0, value_name = "SHARE", value_parser = parse_share)]
    duplicate_events: f64,
    /// Share of events that later ones overtake, 0 to 1
    #[arg(long, default_value_t = 0.0, value_name = "SHARE", value_parser = parse_share)]
    late_events: f64,
    /// Between two tries of one event, milliseconds
    #[arg(long, default_value_t = 1000, value_name = "MS")]
    event_retry_ms: u64,
    /// What goes wrong, as name[@endpoint]=share or 1/n, then :value and *times: 429=0.02, cut@list=1/3*2 (again for more)
    #[arg(long = "fault", value_name = "FAULT", value_parser = parse_fault)]
    faults: Vec<Fault>,
}

impl From<Simulator> for Options {
    fn from(given: Simulator) -> Self {
        let defaults = Self::default();
        Self {
            port: given.port,
            seed: given.seed,
            epoch: given.epoch,
            athletes: given.athletes,
            activities: given.activities,
            stream_points: given.stream_points,
            manual_share: given.manual_share,
            private_share: given.private_share,
            awkward: given.awkward,
            very_long: given.very_long,
            short_pages: given.short_pages,
            volatile: given.volatile,
            quota: given.quota,
            limits: given.limits,
            streams_without_headers: given.streams_without_headers,
            token_life_seconds: given.token_life,
            rotate: given.rotate,
            expire_after_calls: given.expire_after_calls,
            clients: if given.clients.is_empty() { defaults.clients } else { given.clients },
            auto_approve: given.auto_approve,
            refuse_consent: given.refuse_consent,
            unticked_scopes: given.unticked_scopes,
            require_pkce: given.require_pkce,
            code_settles_ms: defaults.code_settles_ms,
            sign_events: given.sign_events,
            duplicate_events: given.duplicate_events,
            late_events: given.late_events,
            event_retry_ms: given.event_retry_ms,
            faults: given.faults,
        }
    }
}

/// What makes a wearsync talk to a simulator instead of Strava.
pub(crate) fn settings(running: &Running, client: &Client) -> Vec<(&'static str, String)> {
    let url = running.url();
    vec![
        ("WEARSYNC_PROVIDERS__STRAVA__API_BASE_URL", format!("{url}/api/v3")),
        ("WEARSYNC_PROVIDERS__STRAVA__AUTHORIZE_URL", format!("{url}/oauth/authorize")),
        ("WEARSYNC_PROVIDERS__STRAVA__TOKEN_URL", format!("{url}/oauth/token")),
        ("STRAVA_CLIENT_ID", client.id.clone()),
        ("STRAVA_CLIENT_SECRET", client.secret.clone()),
    ]
}

pub(crate) async fn run(session: &Session, arguments: Simulator) -> Outcome {
    let options = Options::from(arguments);
    let client = options.clients.first().cloned();
    let port = options.port;
    let running = start(options, Clock::system()).await.map_err(|error| {
        anyhow::anyhow!("the simulator cannot listen on 127.0.0.1:{port} ({error}): choose another with --port")
    })?;
    let stop = CancellationToken::new();
    signals::stop_on_signal(stop.clone())?;
    let settings = client.map_or_else(Vec::new, |client| settings(&running, &client));
    let environment: serde_json::Map<String, serde_json::Value> =
        settings.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
    session.out.show(&json!({ "url": running.url(), "environment": environment }), || {
        let exports: Vec<String> = settings.iter().map(|(name, value)| format!("export {name}={value}")).collect();
        let url = running.url();
        format!(
            "# simulated Strava at {url}; a refresh token for it:\n#   curl -X POST {url}/_simulator/grant -d '{{\"athlete\": 0}}'\n{}",
            exports.join("\n")
        )
    })?;
    remark("Ctrl-C ends it");
    stop.cancelled().await;
    running.shutdown().await;
    Ok(Exit::Done)
}

fn parse_share(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|share| (0.0..=1.0).contains(share))
        .ok_or_else(|| "a share lies between 0 and 1".to_owned())
}

fn parse_limits(text: &str) -> Result<[u64; 4], String> {
    let numbers: Option<Vec<u64>> = text.split(',').map(|number| number.trim().parse().ok()).collect();
    numbers
        .and_then(|numbers| numbers.try_into().ok())
        .ok_or_else(|| "write four numbers with commas between".to_owned())
}

fn parse_client(text: &str) -> Result<Client, String> {
    match text.split_once(':') {
        Some((id, secret)) if !id.is_empty() && !secret.is_empty() => {
            Ok(Client { id: id.to_owned(), secret: secret.to_owned() })
        }
        _ => Err("write ID:SECRET".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        simulator: Simulator,
    }

    fn options(arguments: &[&str]) -> Options {
        Line::try_parse_from([&["simulator"], arguments].concat()).unwrap().simulator.into()
    }

    #[test]
    fn without_options_it_is_the_default_world() {
        assert_eq!(serde_json::to_value(options(&[])).unwrap(), serde_json::to_value(Options::default()).unwrap());
    }

    #[test]
    fn options_arrive() {
        let options = options(&[
            "--awkward=false",
            "--rotate",
            "--limits",
            "1,2,3,4",
            "--client",
            "7:s",
            "--fault",
            "429=0.02",
            "--fault",
            "cut@list=1/3*2",
        ]);
        assert!(!options.awkward && options.rotate && options.volatile);
        assert_eq!((options.limits, options.faults.len()), ([1, 2, 3, 4], 2));
        assert_eq!(options.clients, [Client { id: "7".to_owned(), secret: "s".to_owned() }]);
    }
}
