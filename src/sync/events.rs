//! What runs go through, as the mirrored API says it, and telling it to whoever listens.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use chrono::{DateTime, SecondsFormat, Utc};
use serde::Serialize;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::{Engine, failpoint};
use crate::model::{BEGINNING_MS, DataType, RunId, RunReport, RunState, Step, SyncRequest, SyncStatus, UserId};
use crate::providers::{self, DataPart, ProviderSpec};
use crate::storage::RunEvent;
use crate::telemetry;

/// An event in the mirrored API's form. What it has no place for is in `metadata`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Event {
    /// Its id.
    pub event_id: Uuid,
    /// The run, also `metadata.task_id`.
    pub run_id: RunId,
    /// Whose.
    pub user_id: UserId,
    /// Provider.
    pub provider: String,
    /// Who asked.
    pub source: String,
    /// Where the run is.
    pub stage: String,
    /// How it stands.
    pub status: String,
    /// In plain words.
    pub message: Option<String>,
    /// 1 when it is over and something was read.
    pub progress: Option<f64>,
    /// Samples stored.
    pub items_processed: Option<u64>,
    /// Never known before the end.
    pub items_total: Option<u64>,
    /// Why nothing was read.
    pub error: Option<String>,
    /// The user whose sync another one's came from. Nobody's here: `docs/adr/0006-shared-accounts.md` says why.
    pub primary_user_id: Option<UserId>,
    /// What else there is to say.
    pub metadata: Map<String, Value>,
    /// When the run began; in the first event, and in the only one of a delivery.
    pub started_at: Option<DateTime<Utc>>,
    /// When it ended.
    pub ended_at: Option<DateTime<Utc>>,
    /// When this happened.
    pub timestamp: DateTime<Utc>,
}

/// What became of one part of the data.
pub type PartOutcome = (&'static str, bool);

/// Per part that was asked for and that the provider has: whether each of its streams ended without error. A run that
/// failed as a whole has no part that is.
#[must_use]
pub fn part_outcomes(spec: &ProviderSpec, state: RunState, report: &RunReport, asked: DataType) -> Vec<PartOutcome> {
    let parts = [("workouts", DataPart::Workouts, DataType::Daily), ("data_247", DataPart::Daily, DataType::Workouts)];
    let there = parts.into_iter().filter(|(_, part, not_asked)| asked != *not_asked && spec.supports(*part));
    let outcome = there.map(|(name, part, _)| {
        let mut streams = spec.streams.iter().filter(|stream| stream.data == part);
        let whole = match state {
            RunState::Failed | RunState::Cancelled => false,
            // What a partial run never came to was not read.
            _ => streams.all(|stream| match report.streams.get(stream.name.0) {
                Some(stream) => stream.error.is_none(),
                None => state == RunState::Success,
            }),
        };
        (name, whole)
    });
    outcome.collect()
}

impl From<&RunEvent> for Event {
    fn from(row: &RunEvent) -> Self {
        let request: SyncRequest = serde_json::from_str(&row.request).unwrap_or_default();
        let historical = row.source == "backfill";
        let provider = row.provider.as_str();
        let mut event = Self {
            event_id: row.id,
            run_id: row.run_id,
            user_id: row.user_id,
            provider: row.provider.clone(),
            source: row.source.clone(),
            stage: row.stage.clone(),
            status: row.status.clone(),
            message: None,
            progress: None,
            items_processed: None,
            items_total: None,
            error: None,
            primary_user_id: None,
            metadata: Map::from_iter([("task_id".to_owned(), json!(row.run_id))]),
            started_at: None,
            ended_at: None,
            timestamp: row.at,
        };
        match row.step() {
            Step::Started => {
                let kind = if historical { "Historical" } else { "Live" };
                event.message = Some(format!("{kind} sync from {provider} started"));
                event.started_at = Some(row.at);
                event.note("trace_id", json!(row.run_id));
                event.note("is_historical", json!(historical));
                event.note("start_date", json!(request.since_ms.and_then(date)));
                event.note("end_date", json!(request.until_ms.and_then(date)));
            }
            Step::Workouts => event.message = Some(format!("Fetching workouts from {provider}")),
            Step::Daily => {
                event.message = Some(format!("Fetching 24/7 data (sleep / recovery / activity) from {provider}"));
            }
            Step::Ended => event.end(row, &request, historical),
        }
        event
    }
}

impl Event {
    fn note(&mut self, name: &str, value: Value) {
        self.metadata.insert(name.to_owned(), value);
    }

    /// Fills in what only the last event says.
    fn end(&mut self, row: &RunEvent, request: &SyncRequest, historical: bool) {
        let report: RunReport =
            row.report.as_deref().and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
        let status = SyncStatus::ALL.into_iter().find(|status| status.as_str() == row.status);
        let status = status.unwrap_or(SyncStatus::Failed);
        let provider = row.provider.as_str();
        let of_webhook = row.source == "webhook";
        let (records, records_updated, records_deleted) = report.records();
        let changed = records_updated + records_deleted;
        let (inserted, updated) = (report.samples - report.samples_updated.min(report.samples), report.samples_updated);
        self.ended_at = Some(row.at);
        // What a delivery asked for is told once: with both ends.
        self.started_at = of_webhook.then_some(row.at);
        if matches!(status, SyncStatus::Success | SyncStatus::Partial) {
            self.progress = Some(1.0);
            self.items_processed = Some(report.samples);
        }
        self.message = Some(match status {
            SyncStatus::Cancelled => format!("Sync from {provider} cancelled"),
            SyncStatus::Failed => format!("Sync from {provider} failed"),
            SyncStatus::Skipped => "skipped: nothing new".to_owned(),
            _ if of_webhook => format!("webhook {records} new, {changed} updated"),
            SyncStatus::Partial => format!("Sync from {provider} completed with errors"),
            SyncStatus::Success | SyncStatus::InProgress => {
                let mut text = format!("Sync from {provider} completed");
                if report.samples > 0 {
                    // Writing to a string cannot fail.
                    let _ = write!(text, " · {inserted} new, {updated} updated");
                }
                text
            }
        });
        if status == SyncStatus::Failed {
            let reason = row.reason.clone().filter(|_| of_webhook);
            self.error = Some(reason.unwrap_or_else(|| "All sync sub-tasks failed".to_owned()));
        }
        self.note("is_historical", json!(historical));
        if status != SyncStatus::Cancelled {
            self.note("params", params(provider, status, &report, request.data_type));
        }
        let (inserted, updated) = if of_webhook { (records, changed) } else { (inserted, updated) };
        if inserted + updated > 0 {
            self.note("inserted", json!(inserted));
            self.note("updated", json!(updated));
        }
        if let Some(reason) = &row.reason {
            self.note("reason", json!(reason));
        }
    }
}

/// Per part: whether it succeeded, its records in numbers, and what went wrong.
fn params(provider: &str, status: SyncStatus, report: &RunReport, asked: DataType) -> Value {
    let Some(spec) = providers::find(provider).map(|provider| provider.spec()) else { return json!({}) };
    let state = match status {
        SyncStatus::Failed => RunState::Failed,
        SyncStatus::Partial => RunState::Partial,
        _ => RunState::Success,
    };
    let parts = part_outcomes(spec, state, report, asked).into_iter().map(|(name, success)| {
        let data = if name == "workouts" { DataPart::Workouts } else { DataPart::Daily };
        let streams = spec.streams.iter().filter(|stream| stream.data == data);
        let streams = streams.filter_map(|stream| Some((stream.name.0, report.streams.get(stream.name.0)?)));
        let (mut inserted, mut updated, mut errors) = (0, 0, Vec::new());
        for (stream, told) in streams {
            inserted += told.inserted;
            updated += told.updated;
            errors.extend(told.error.as_ref().map(|error| format!("{stream}: {error}")));
        }
        let mut part = json!({"success": success, "inserted": inserted, "updated": updated});
        if !errors.is_empty() {
            part["error"] = json!(errors.join("; "));
        }
        (name, part)
    });
    json!(parts.collect::<BTreeMap<_, _>>())
}

/// A bound of a request; none where it is the beginning.
fn date(ms: i64) -> Option<String> {
    let at = DateTime::from_timestamp_millis(ms).filter(|_| ms != BEGINNING_MS)?;
    Some(at.to_rfc3339_opts(SecondsFormat::AutoSi, true))
}

/// An event as it travels between processes: number, id, and the JSON of one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventLine {
    /// Its place among the events of the user.
    pub seq: i64,
    /// Its id.
    pub id: Uuid,
    /// JSON of the [`Event`], without a line break.
    pub json: String,
}

impl From<&RunEvent> for EventLine {
    fn from(row: &RunEvent) -> Self {
        let json = serde_json::to_string(&Event::from(row)).unwrap_or_default();
        Self { seq: row.seq, id: row.id, json }
    }
}

impl std::fmt::Display for EventLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {}", self.seq, self.id, self.json)
    }
}

impl EventLine {
    /// The reverse of its text; `None` for anything else.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut words = text.splitn(3, ' ');
        let (seq, id, json) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?, words.next()?);
        Some(Self { seq, id, json: json.to_owned() })
    }
}

impl Engine {
    /// Tells an event that was just committed to whoever listens now, in every process. Who misses it finds its row.
    pub(crate) async fn tell(&self, event: Option<&RunEvent>) {
        let Some(row) = event else { return };
        failpoint::hit("event-committed");
        if let Err(error) = self.shared.publish(row.user_id, EventLine::from(row).to_string()).await {
            telemetry::redis_down(&error);
        }
    }

    /// Tells the last event of a run that was just changed.
    pub async fn tell_last(&self, run: RunId) {
        match self.db.find_last_run_event(run).await {
            Ok(event) => self.tell(event.as_ref()).await,
            Err(error) => tracing::debug!(%run, %error, "an event was not told; its row is there"),
        }
    }

    /// Tells that events of this user were written that nobody told.
    pub async fn tell_news(&self, user: UserId) {
        if let Err(error) = self.shared.publish(user, String::new()).await {
            telemetry::redis_down(&error);
        }
    }
}
