//! One claimed run, from its first page to its last file. The one place that decides what an error means.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::Value;
use tokio::task::JoinHandle;

use super::fetch::RunGate;
use super::prepare::{self, Input, Prepared};
use super::tokens::TokenFailure;
use super::{Engine, Error, ProviderSetup, connect, failpoint, plan, project, rebuild};
use crate::model::{
    AccountId, BEGINNING_MS, Class, Kind, PartName, PartState, Progress, Purpose, RunReport, Step, SyncRequest, Wanted,
    Window,
};
use crate::providers::{
    AccessToken, Api, Axis, DataPart, Deletes, FetchError, FetchedPage, FetchedPart, Item, Next, PRESENCE, PageRequest,
    StreamSpec,
};
use crate::storage::{
    self, Account, Boundary, Claim, NewAccount, NewWindow, PageWrite, PartFix, WantedPart, WantedWrite, WindowMove,
};
use crate::telemetry;

/// Tries of one call before its stream (or part) is given up.
pub(super) const TRIES: i64 = 5;
/// A wait up to this long is sat out; a longer one puts the run back.
pub(super) const SHORT_WAIT: Duration = Duration::from_secs(5);
/// How often a page is prepared anew because somebody else committed in between.
pub(super) const STALE_TRIES: usize = 10;
/// Refused tokens in a row before the call waits like after any other failure: with many processes on one account, a
/// fresh token can be used up by others before its first call.
const UNAUTHORIZED_TRIES: u32 = 3;
/// Parts looked up at a time; each is fetched and committed on its own.
const PART_BATCH: i64 = 100;
/// More parts than these are a history, not the news, and are fetched with what the others leave.
const HEAD_PARTS: i64 = 50;
/// After this time a part that was given up is asked for again, by the next run.
const GIVEN_UP: Duration = Duration::from_secs(6 * 3600);
/// Parts in a row that fail for want of a connection before the run is put back.
const PART_FAILURES: u32 = 3;

/// Why work on a run stops before its end.
#[derive(Debug)]
pub(crate) enum Stop {
    /// The run is no longer ours.
    Fenced,
    /// Somebody ended it.
    Cancelled,
    /// A more urgent run of the connection is due.
    GiveWay,
    /// The process is to end.
    Shutdown,
    /// No quota until then.
    Quota(DateTime<Utc>),
    /// A part has to wait before it is tried again.
    PartsLater(DateTime<Utc>),
    /// Worth another try.
    Retry { detail: String, after: Option<Duration> },
    /// This stream cannot be read; the others can.
    Stream(String),
    /// Nothing of this connection can be read.
    Fatal(String),
    /// Ours.
    Internal(Error),
}

impl From<storage::Error> for Stop {
    fn from(error: storage::Error) -> Self {
        match error {
            storage::Error::Fenced => Self::Fenced,
            error => Self::Internal(error.into()),
        }
    }
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        match error {
            Error::Storage(storage::Error::Fenced) => Self::Fenced,
            error => Self::Internal(error),
        }
    }
}

impl From<TokenFailure> for Stop {
    fn from(failure: TokenFailure) -> Self {
        match failure {
            TokenFailure::Reauthorize(_) | TokenFailure::Application(_) => Self::Fatal(failure.to_string()),
            TokenFailure::Transient(detail) => Self::Retry { detail, after: None },
            TokenFailure::Internal(error) => error.into(),
        }
    }
}

/// What a failed call means for the page it belongs to.
pub(super) fn read_failure(error: FetchError) -> Stop {
    match error {
        FetchError::Quota { until } => Stop::Quota(until),
        FetchError::Transient { detail, retry_after } => Stop::Retry { detail, after: retry_after },
        FetchError::Unreadable { detail } => Stop::Retry { detail, after: None },
        FetchError::AppDisabled { .. } => Stop::Fatal(error.to_string()),
        FetchError::Unauthorized { .. }
        | FetchError::MissingScope { .. }
        | FetchError::Gone
        | FetchError::Rejected { .. } => Stop::Stream(error.to_string()),
    }
}

/// Waits 1, 2, 4, 8, 16 seconds, each shortened by up to a half so that many do not come back at once.
pub(crate) fn backoff(attempt: i64) -> Duration {
    let whole = 1000_u64 << attempt.clamp(0, 4);
    Duration::from_millis(whole - rand::random_range(0..=whole / 2))
}

/// One claimed run at work.
pub(crate) struct Work<'a> {
    pub(super) engine: &'a Arc<Engine>,
    pub(super) setup: &'a ProviderSetup,
    pub(crate) claim: &'a Claim,
    pub(super) request: SyncRequest,
    gate: RunGate<'a>,
    token: Option<AccessToken>,
    refused: i64,
    pub(crate) report: RunReport,
    calls_before: u64,
    pub(super) cancel: &'a AtomicBool,
    /// A more urgent run of the connection was due at the last page boundary.
    give_way: bool,
    pub(super) parts: Vec<&'static str>,
    first_sync: bool,
    pub(super) progress: Progress,
    /// What it was told last that is being read.
    told: Option<Step>,
    /// Files of the pages before, being written while the next one is read.
    beside: Option<JoinHandle<Result<project::Drained, Error>>>,
}

impl<'a> Work<'a> {
    pub(crate) fn new(
        engine: &'a Arc<Engine>,
        setup: &'a ProviderSetup,
        claim: &'a Claim,
        cancel: &'a AtomicBool,
    ) -> Result<Self, Error> {
        let request: SyncRequest = serde_json::from_str(&claim.run.request)
            .map_err(|error| Error::Corrupt(format!("runs.request: {error}")))?;
        let report: RunReport = match &claim.run.report {
            Some(text) => {
                serde_json::from_str(text).map_err(|error| Error::Corrupt(format!("runs.report: {error}")))?
            }
            None => RunReport::default(),
        };
        let mut parts = setup.parts.clone();
        let asked = [("samples", request.samples), ("zones", request.zones), ("route", request.route)];
        for (name, asked) in asked {
            let known = setup.spec().parts.iter().find(|part| part.name.0 == name && !part.primary);
            if let Some(part) = known.filter(|part| asked && !parts.contains(&part.name.0)) {
                parts.push(part.name.0);
            }
        }
        Ok(Self {
            engine,
            setup,
            claim,
            request,
            gate: RunGate::new(engine, setup, claim.run.run_class()),
            token: None,
            refused: 0,
            calls_before: report.calls,
            report,
            cancel,
            give_way: false,
            parts,
            first_sync: false,
            progress: Progress::default(),
            told: None,
            beside: None,
        })
    }

    /// The class that the run goes on with when it is put back.
    pub(crate) fn class(&self) -> Class {
        self.gate.class()
    }

    /// Reads everything that was asked for, newest first, and writes its files.
    pub(crate) async fn run(&mut self) -> Result<(), Stop> {
        // A person may have given a new grant: no process may use what is left of the one before.
        let account = self.engine.db.find_account(self.claim.account_id).await?;
        self.refused = account.map_or(0, |account| account.grant_version);
        let mut result = self.read_all().await;
        self.report.calls = self.calls_before + self.gate.calls();
        self.gate.snapshot(true).await;
        // The provider may have refused the grant. The run itself ends as it would, and tells why.
        if matches!(result, Err(Stop::Fatal(_)))
            && let Err(error) = connect::end_refused(self.engine, Some(self.claim.account_id), false).await
        {
            result = Err(error.into());
        }
        match result {
            Ok(()) => self.project().await,
            // Files appear early: whatever is stored so far, before the run waits.
            Err(stop @ (Stop::Quota(_) | Stop::PartsLater(_) | Stop::Retry { .. } | Stop::Fatal(_))) => {
                self.project().await?;
                Err(stop)
            }
            Err(stop) => {
                // Whoever takes the run next may write the same files: the right to is given back first.
                self.join_beside().await;
                Err(stop)
            }
        }
    }

    async fn read_all(&mut self) -> Result<(), Stop> {
        if self.request.check_grant {
            return self.check_grant().await;
        }
        if !self.request.items.is_empty() {
            return self.read_items().await;
        }
        if self.report.streams.is_empty() {
            // A new run: what was given up some time ago is worth another try.
            self.engine.db.want_failed_again(self.claim.fence.connection, self.engine.now()).await?;
        }
        if self.request.rebuild {
            let done = rebuild::records(self.engine, self.setup, self.claim).await?;
            self.report.rebuilt = Some(done);
            return Ok(());
        }
        loop {
            self.take_again().await?;
            for stream in plan::streams(self.setup.spec(), &self.request) {
                let name = stream.name.0;
                if self.report.streams.get(name).is_some_and(|report| report.complete) {
                    continue;
                }
                self.tell_reading(stream).await?;
                self.report.streams.entry(name.to_owned()).or_default().error = None;
                match self.read_stream(stream).await {
                    Ok(()) => self.report.streams.entry(name.to_owned()).or_default().complete = true,
                    // A failed stream does not move; the others go on.
                    Err(Stop::Stream(detail)) => {
                        self.report.streams.entry(name.to_owned()).or_default().error = Some(detail);
                    }
                    Err(stop) => return Err(stop),
                }
            }
            self.read_parts().await?;
            if !self.engine.db.is_wanted_again(&self.claim.fence).await? {
                // Whoever cancelled it before its end is not to be told of a success.
                return if self.cancel.load(Ordering::Relaxed) { Err(Stop::Cancelled) } else { Ok(()) };
            }
        }
    }

    /// Somebody asked again: every stream is read once more, from a new head window. Noted in the report by the statement
    /// that takes the wish, so that a crash in between forgets neither.
    pub(super) async fn take_again(&mut self) -> Result<(), Stop> {
        if !self.engine.db.is_wanted_again(&self.claim.fence).await? {
            return Ok(());
        }
        self.report.again = true;
        for report in self.report.streams.values_mut() {
            (report.opened, report.complete) = (false, false);
        }
        let report = self.report_so_far().unwrap_or_default();
        self.engine.db.take_again(&self.claim.fence, &report).await?;
        Ok(())
    }

    /// Tells whoever watches that this part of the data is being read now. Refused by the database where it was told
    /// before, by this claim or an earlier one.
    async fn tell_reading(&mut self, stream: &StreamSpec) -> Result<(), Stop> {
        let step = match stream.data {
            DataPart::Workouts => Step::Workouts,
            DataPart::Daily => Step::Daily,
            DataPart::Profile => return Ok(()),
        };
        if self.told.replace(step) != Some(step) {
            let event = self.engine.db.insert_run_event(&self.claim.run, step, self.engine.now()).await?;
            self.engine.tell(event.as_ref()).await;
        }
        Ok(())
    }

    async fn read_stream(&mut self, stream: &'static StreamSpec) -> Result<(), Stop> {
        let again = self.report.again;
        self.progress = Progress { stream: stream.name.0.to_owned(), ..Progress::default() };
        if stream.axis == Axis::None {
            return self.read_list(stream).await;
        }
        let (engine, fence) = (self.engine, &self.claim.fence);
        let rows = engine.db.list_windows(fence.connection).await?;
        self.first_sync |= !rows.iter().any(|row| row.stream == stream.name.0);
        let accepted = self.claim.run.created_at;
        let name = stream.name.0;
        let before = self.report.streams.get(name).is_some_and(|report| report.opened);
        let open = plan::window_to_open(stream, &self.request, accepted, engine.now(), before, again, &rows);
        let opened = match open {
            Some(new) => {
                if new.purpose == Purpose::Cover {
                    for (lo, hi) in plan::unread(stream, &rows, new.lo) {
                        self.first_sync |= lo == BEGINNING_MS;
                        engine.db.open_window(fence, NewWindow { lo, hi, ..new }, None).await?;
                    }
                }
                self.report.streams.entry(name.to_owned()).or_default().opened = true;
                let report = self.report_so_far();
                Some(engine.db.open_window(fence, new, report.as_deref()).await?)
            }
            None => None,
        };
        failpoint::hit("window-opened");
        let mut windows: Vec<Window> = Vec::new();
        if opened.as_ref().is_none_or(|window| window.purpose == Purpose::Cover) || again {
            // Newest bounds first: the head, then what earlier runs left.
            for row in engine.db.list_windows(fence.connection).await? {
                if row.stream == stream.name.0 && row.state == "open" {
                    windows.push(row.window()?);
                }
            }
        } else {
            windows.extend(opened);
        }
        for window in windows {
            let id = window.id;
            match self.read_window(stream, window).await {
                Ok(()) => {}
                Err(Stop::Stream(detail)) => {
                    engine.db.note_window_error(id, &detail).await?;
                    return Err(Stop::Stream(detail));
                }
                Err(stop) => return Err(stop),
            }
            self.project().await?;
        }
        Ok(())
    }

    /// Reads a list that has no axis, whole.
    async fn read_list(&mut self, stream: &'static StreamSpec) -> Result<(), Stop> {
        let mut position = None;
        loop {
            let page = self.fetch_page(stream, BEGINNING_MS, i64::MAX, position.as_ref(), 0).await?;
            let next = page.next.clone();
            self.complete(stream, next == Next::End);
            self.store(stream, page, None).await?;
            match next {
                Next::End => return Ok(()),
                Next::Position(next) => position = Some(next),
            }
        }
    }

    async fn read_window(&mut self, stream: &'static StreamSpec, mut window: Window) -> Result<(), Stop> {
        if self.request.reconcile && window.purpose == Purpose::Reread {
            window.position = None;
        }
        // Absence counts only if the whole window was listed within one claim, nothing skipped.
        let whole = window.position.is_none() && self.request.offset == 0;
        let mut listed: HashSet<String> = HashSet::new();
        loop {
            let offset = if window.position.is_none() { self.request.offset } else { 0 };
            let page = self.fetch_page(stream, window.lo, window.hi, window.position.as_ref(), offset).await?;
            failpoint::hit("page-fetched");
            if whole {
                listed.extend(page.items.iter().map(|item| item.external_id.clone()));
            }
            let next = page.next.clone();
            let mut missing = Vec::new();
            if next == Next::End && whole && stream.deletes == Deletes::ConfirmByFetch && page.unreadable.is_empty() {
                missing = self.missing(stream, &window, &listed).await?;
            }
            // What was read beyond coverage is coverage too, if it was read whole on the stream's own axis.
            let proves = (self.request.offset == 0 && !self.request.by_creation_time).then_some((window.lo, window.hi));
            let position = match &next {
                Next::End => None,
                Next::Position(position) => Some(position.clone()),
            };
            let moved =
                WindowMove { window: window.clone(), stream: stream.name.0, position: position.clone(), proves };
            self.store(stream, page, Some((moved, missing))).await?;
            failpoint::hit("page-committed");
            self.project_beside().await;
            match next {
                Next::End => return Ok(()),
                Next::Position(position) => window.position = Some(position),
            }
        }
    }

    /// Notes that everything asked of a stream is read, if so; committed with the page that it comes from.
    fn complete(&mut self, stream: &StreamSpec, end: bool) {
        self.report.streams.entry(stream.name.0.to_owned()).or_default().complete |= end;
    }

    /// Records that lie in a window that was listed whole, and were not listed: each is asked for by itself before it
    /// counts as deleted.
    async fn missing(
        &self,
        stream: &StreamSpec,
        window: &Window,
        listed: &HashSet<String>,
    ) -> Result<Vec<WantedWrite>, Stop> {
        let connection = self.claim.fence.connection;
        let stored =
            self.engine.db.list_ids_between(connection, stream.kind, instant(window.lo), instant(window.hi)).await?;
        Ok(stored
            .into_iter()
            .filter(|(id, _)| !listed.contains(id))
            .map(|(external_id, order_at)| WantedWrite {
                wanted: Wanted { kind: stream.kind, external_id, part: PRESENCE },
                order_at,
            })
            .collect())
    }

    /// One page, with its short waits sat out.
    async fn fetch_page(
        &mut self,
        stream: &'static StreamSpec,
        lo: i64,
        hi: i64,
        position: Option<&Value>,
        offset: u32,
    ) -> Result<FetchedPage, Stop> {
        let limit = self.request.limit.unwrap_or(stream.page_size).clamp(1, stream.page_size);
        let deadline = self.engine.config.page_timeout;
        let mut tries = self.claim.run.attempts;
        loop {
            self.check_stop()?;
            let request = PageRequest { stream, lo, hi, position, limit, offset };
            let result = match tokio::time::timeout(deadline, self.call_page(&request)).await {
                Ok(result) => result,
                Err(_) => Err(Stop::Retry { detail: "the page was not read in time".to_owned(), after: None }),
            };
            match result {
                Err(Stop::Retry { detail, after }) => {
                    tries += 1;
                    if tries >= TRIES {
                        return Err(Stop::Stream(detail));
                    }
                    let wait = after.unwrap_or_else(|| backoff(tries - 1));
                    if wait > SHORT_WAIT {
                        return Err(Stop::Retry { detail, after: Some(wait) });
                    }
                    tracing::debug!(%detail, ?wait, "page is tried again");
                    self.pause(wait).await?;
                }
                other => return other,
            }
        }
    }

    /// The account's access token: the one in hand while it lives, else a fresh one.
    pub(super) async fn token(&mut self) -> Result<AccessToken, Stop> {
        let spare = self.engine.now() + chrono::Duration::seconds(30);
        if let Some(token) = self.token.as_ref().filter(|token| token.expires_at > spare) {
            return Ok(token.clone());
        }
        let token = self.engine.access_token(self.setup, self.claim.account_id, self.refused).await?;
        self.token = Some(token.clone());
        Ok(token)
    }

    /// The provider refused a token: it is refreshed, once per version, and not for ever.
    pub(super) async fn refuse_token(&mut self, version: i64, times: &mut u32) -> Result<(), Stop> {
        self.engine.forget_token(self.claim.account_id, version).await;
        self.refused = self.refused.max(version);
        self.token = None;
        *times += 1;
        if *times >= UNAUTHORIZED_TRIES {
            let detail = "the provider refuses one fresh access token after the other".to_owned();
            return Err(Stop::Retry { detail, after: None });
        }
        Ok(())
    }

    pub(super) fn api<'t>(&'t self, token: &'t AccessToken) -> Api<'t> {
        Api {
            http: &self.engine.http,
            spec: self.setup.spec(),
            base_url: &self.setup.base_url,
            token,
            gate: &self.gate,
        }
    }

    async fn call_page(&mut self, request: &PageRequest<'_>) -> Result<FetchedPage, Stop> {
        let mut refused = 0;
        loop {
            let token = self.token().await?;
            match self.setup.provider.fetch_page(&self.api(&token), request).await {
                Err(FetchError::Unauthorized { version }) => self.refuse_token(version, &mut refused).await?,
                Err(error) => return Err(read_failure(error)),
                Ok(page) => return Ok(page),
            }
        }
    }

    /// One part. For one part, an answer that is refused or cannot be read is its own business: the inner result.
    async fn call_part(
        &mut self,
        kind: Kind,
        id: &str,
        name: PartName,
    ) -> Result<Result<FetchedPart, FetchError>, Stop> {
        let mut refused = 0;
        loop {
            let token = self.token().await?;
            match self.setup.provider.fetch_part(&self.api(&token), kind, id, name).await {
                Err(FetchError::Unauthorized { version }) => self.refuse_token(version, &mut refused).await?,
                Err(FetchError::Gone) => return Ok(Ok(FetchedPart::None)),
                Err(
                    error @ (FetchError::Unreadable { .. }
                    | FetchError::Rejected { .. }
                    | FetchError::MissingScope { .. }
                    | FetchError::Transient { .. }),
                ) => return Ok(Err(error)),
                Err(error) => return Err(read_failure(error)),
                Ok(part) => return Ok(Ok(part)),
            }
        }
    }

    /// Prepares and commits a page of a stream.
    async fn store(
        &mut self,
        stream: &'static StreamSpec,
        page: FetchedPage,
        moved: Option<(WindowMove, Vec<WantedWrite>)>,
    ) -> Result<(), Stop> {
        let FetchedPage { items, unreadable, .. } = page;
        if let Some(athlete) = items.iter().find(|item| item.kind == Kind::Athlete) {
            self.name_account(&athlete.external_id).await?;
        }
        let listed = items.len() as u64;
        self.progress.done += listed;
        self.tell_progress();
        let (window, missing) = moved.map_or((None, Vec::new()), |(window, missing)| (Some(window), missing));
        let done = self.commit(items, window, missing).await?;
        for what in &unreadable {
            tracing::warn!(stream = %stream.name, what, "an item of a page cannot be read");
        }
        let report = self.report.streams.entry(stream.name.0.to_owned()).or_default();
        report.listed += listed;
        report.inserted += done.inserted;
        report.updated += done.updated;
        self.count(&done, unreadable);
        Ok(())
    }

    /// A pasted token says whose it is with the first profile that is read with it.
    async fn name_account(&mut self, provider_user_id: &str) -> Result<(), Stop> {
        let engine = self.engine;
        let id = self.claim.account_id;
        let Some(account) = engine.db.find_account(id).await? else { return Ok(()) };
        if account.provider_user_id == provider_user_id {
            return Ok(());
        }
        if !account.provider_user_id.starts_with("pending:") {
            return self.part_accounts(&account, provider_user_id).await;
        }
        if engine.db.name_account(id, provider_user_id, engine.now()).await? {
            return Ok(());
        }
        // Another run of the account may have named it meanwhile.
        if engine.db.find_account(id).await?.is_none_or(|account| account.provider_user_id == provider_user_id) {
            return Ok(());
        }
        // The person is known already, through another user or an earlier grant: one account, one grant, one refresher.
        let into = engine.db.move_account(id, provider_user_id, engine.now()).await?;
        engine.adopt_grant(&account, into).await?;
        Err(Stop::Retry { detail: "the grant joined the person's account".to_owned(), after: Some(Duration::ZERO) })
    }

    /// The grant of a known account turns out to be another person's: that person gets an account, and the user a new
    /// connection to it. What the old connection has read stays with it.
    async fn part_accounts(&mut self, account: &Account, provider_user_id: &str) -> Result<(), Stop> {
        let engine = self.engine;
        let now = engine.now();
        let new = NewAccount {
            id: AccountId::new(),
            provider: account.provider.clone(),
            client_id: account.client_id.clone(),
            provider_user_id: provider_user_id.to_owned(),
            imported_hash: account.imported_hash.clone(),
        };
        let into = engine.db.upsert_account(new, now).await?;
        engine.adopt_grant(account, into.id).await?;
        engine.db.drop_grant(account.id, "a token of another person was given for it", now).await?;
        engine.db.connect(self.claim.run.user_id, into.id, &account.provider, now).await?;
        engine.tell_news(self.claim.run.user_id).await;
        Err(Stop::Fatal(format!(
            "the token belongs to another account of {}: it has a connection of its own now; sync again",
            self.setup.spec().title
        )))
    }

    pub(super) fn count(&mut self, done: &Prepared, unreadable: Vec<String>) {
        self.report.samples += done.samples;
        self.report.samples_updated += done.samples_updated;
        let mut notes: Vec<String> = unreadable.into_iter().map(|what| format!("cannot be read: {what}")).collect();
        notes.extend(done.unreadable.iter().cloned());
        if done.dropped > 0 {
            notes.push(format!("{} values were no numbers and were dropped", done.dropped));
        }
        // A report is read by people: the first ones tell enough.
        let room = 20_usize.saturating_sub(self.report.notes.len());
        self.report.notes.extend(notes.into_iter().take(room));
    }

    /// Prepares items and commits them, behind the fence; prepares anew when somebody else was faster.
    pub(super) async fn commit(
        &mut self,
        items: Vec<Item>,
        window: Option<WindowMove>,
        missing: Vec<WantedWrite>,
    ) -> Result<Prepared, Stop> {
        let started = std::time::Instant::now();
        let engine = self.engine;
        let fence = &self.claim.fence;
        let mut ids: BTreeSet<(Kind, String)> =
            items.iter().map(|item| (item.kind, item.external_id.clone())).collect();
        let items = Arc::new(items);
        for _ in 0..STALE_TRIES {
            let mut step = Steps::begin();
            let state = engine.db.load_page_state(fence.connection, &ids).await?;
            let needed = {
                let (provider, items, state) = (self.setup.provider, items.clone(), state.clone());
                blocking(move || Ok(prepare::needed_bodies(provider, &items, &state))).await?
            };
            let bodies: HashMap<_, _> = engine.db.load_bodies(&needed).await?.into_iter().collect();
            step.end("load");
            let input = Input {
                provider: self.setup.provider,
                parts: self.parts.clone(),
                items: items.as_ref().clone(),
                state,
                bodies,
                now: engine.now(),
            };
            let mut done = blocking(move || prepare::prepare(input)).await?;
            step.end("prepare");
            if !done.also.is_subset(&ids) {
                ids.append(&mut done.also);
                continue;
            }
            done.write.window.clone_from(&window);
            done.write.wanted.extend(missing.iter().cloned());
            done.write.progress = serde_json::to_string(&self.progress).ok();
            done.write.report = self.report_so_far();
            failpoint::hit("page-prepared");
            let lease = engine.after(engine.config.lease);
            match engine.db.commit_page(fence, &done.write, engine.now(), lease).await {
                Ok(boundary) => {
                    step.end("commit");
                    telemetry::page_committed(
                        self.claim.run.id,
                        self.setup.spec().name,
                        crate::model::StreamName(leak_free(&self.progress.stream, self.setup)),
                        done.write.records.len() as u64,
                        done.samples,
                        started.elapsed().as_secs_f64(),
                    );
                    self.note(boundary);
                    return Ok(done);
                }
                Err(storage::Error::Stale) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(Stop::Retry { detail: "other work on this connection was faster each time".to_owned(), after: None })
    }

    /// Fetches what is wanted, newest record first.
    async fn read_parts(&mut self) -> Result<(), Stop> {
        let connection = self.claim.fence.connection;
        let (mut open, _) = self.engine.db.count_wanted(connection, self.engine.now()).await?;
        let many = self.first_sync || open > HEAD_PARTS;
        if many && open > 0 && self.gate.class() < Class::Backfill {
            // Somebody waits for the list, and has it; years of details are not to use up what is kept for those who wait.
            self.gate.set_class(Class::Backfill);
        }
        let mut failures = 0;
        self.progress = Progress::default();
        loop {
            let batch = self.engine.db.list_wanted(connection, self.engine.now(), PART_BATCH).await?;
            if batch.is_empty() {
                break;
            }
            for wanted in batch {
                self.check_stop()?;
                if self.progress.stream != wanted.part {
                    self.progress.stream.clone_from(&wanted.part);
                }
                self.progress.total = Some(self.progress.done + u64::try_from(open).unwrap_or(0));
                let fetched = self.read_part(&wanted).await?;
                open -= 1;
                self.progress.done += 1;
                failures = if fetched { 0 } else { failures + 1 };
                if failures >= PART_FAILURES {
                    return Err(Stop::Retry { detail: "the provider does not answer".to_owned(), after: None });
                }
            }
            (open, _) = self.engine.db.count_wanted(connection, self.engine.now()).await?;
        }
        // A part that failed has its own due time; the run comes back for it.
        match self.engine.db.count_wanted(connection, self.engine.now()).await? {
            (1.., Some(due)) => Err(Stop::PartsLater(due)),
            _ => Ok(()),
        }
    }

    /// Fetches and commits one part. `false`: the provider could not be reached for it.
    pub(super) async fn read_part(&mut self, wanted: &WantedPart) -> Result<bool, Stop> {
        let spec = self.setup.spec();
        let kind = Kind::parse(&wanted.kind);
        let name = spec.parts.iter().map(|part| part.name).chain([PRESENCE]).find(|name| name.0 == wanted.part);
        let (Some(kind), Some(name)) = (kind, name) else {
            return self
                .fix(wanted, PartState::Failed, "nothing is known of such a part".to_owned())
                .await
                .map(|()| true);
        };
        let id = wanted.external_id.as_str();
        let deadline = self.engine.config.page_timeout;
        let answer = match tokio::time::timeout(deadline, self.call_part(kind, id, name)).await {
            Ok(answer) => answer?,
            Err(_) => Err(FetchError::Transient { detail: "it was not read in time".to_owned(), retry_after: None }),
        };
        failpoint::hit("part-fetched");
        let report = self.report.parts.entry(wanted.part.clone()).or_default();
        match answer {
            Ok(FetchedPart::Body(_)) if name == PRESENCE => {
                // It is still there: only the list left it out.
                self.commit_fix(wanted, kind, Vec::new(), false, true).await?;
            }
            Ok(FetchedPart::None) if name == PRESENCE => {
                self.commit_fix(wanted, kind, Vec::new(), true, true).await?;
                for stream in spec.streams.iter().filter(|stream| stream.kind == kind) {
                    self.report.streams.entry(stream.name.0.to_owned()).or_default().deleted += 1;
                }
            }
            Ok(FetchedPart::Body(body)) => {
                report.stored += 1;
                let item =
                    Item { kind, external_id: wanted.external_id.clone(), part: name, body, order_at: wanted.order_at };
                self.tell_progress();
                let done = self.commit(vec![item], None, Vec::new()).await?;
                self.count(&done, Vec::new());
            }
            Ok(FetchedPart::None) => {
                report.none += 1;
                self.fix(wanted, PartState::None, String::new()).await?;
            }
            Err(error) => {
                let again = matches!(error, FetchError::Unreadable { .. } | FetchError::Transient { .. })
                    && wanted.attempts + 1 < TRIES;
                if !again {
                    report.failed += 1;
                }
                let state = if again { PartState::Wanted } else { PartState::Failed };
                self.fix(wanted, state, error.to_string()).await?;
                return Ok(!matches!(error, FetchError::Transient { .. }));
            }
        }
        failpoint::hit("part-committed");
        Ok(true)
    }

    /// Commits what became of a part that brought no body.
    async fn fix(&mut self, wanted: &WantedPart, state: PartState, error: String) -> Result<(), Stop> {
        let attempts = if state == PartState::None { 0 } else { wanted.attempts + 1 };
        let wait = if state == PartState::Failed { GIVEN_UP } else { backoff(wanted.attempts) };
        let fix = PartFix {
            id: wanted.id,
            state,
            attempts,
            due_at: self.engine.after(wait),
            last_error: (!error.is_empty()).then(|| error.chars().take(500).collect()),
        };
        let kind = Kind::parse(&wanted.kind).unwrap_or(Kind::Workout);
        self.commit_fix(wanted, kind, vec![fix], false, false).await
    }

    async fn commit_fix(
        &mut self,
        wanted: &WantedPart,
        kind: Kind,
        fixes: Vec<PartFix>,
        delete: bool,
        drop: bool,
    ) -> Result<(), Stop> {
        self.tell_progress();
        let engine = self.engine;
        let ids = BTreeSet::from([(kind, wanted.external_id.clone())]);
        for _ in 0..STALE_TRIES {
            let state = engine.db.load_page_state(self.claim.fence.connection, &ids).await?;
            let record = state.records.get(&(kind, wanted.external_id.clone()));
            let mut fixes = fixes.clone();
            for fix in &mut fixes {
                // An earlier answer serves on when a new one cannot be had.
                let has_body = state.parts.values().any(|row| row.id == fix.id && row.has_body);
                if has_body && matches!(fix.state, PartState::None | PartState::Failed) {
                    fix.state = PartState::Stored;
                }
            }
            let write = PageWrite {
                page_seq: state.page_seq,
                fixes,
                dropped: if drop { vec![wanted.id] } else { Vec::new() },
                deleted: record.filter(|_| delete).map(|record| record.id).into_iter().collect(),
                progress: serde_json::to_string(&self.progress).ok(),
                report: self.report_so_far(),
                ..PageWrite::default()
            };
            let lease = engine.after(engine.config.lease);
            match engine.db.commit_page(&self.claim.fence, &write, engine.now(), lease).await {
                Ok(boundary) => {
                    self.note(boundary);
                    return Ok(());
                }
                Err(storage::Error::Stale) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(Stop::Retry { detail: "other work on this connection was faster each time".to_owned(), after: None })
    }

    /// Writes the files of what is stored, where this process does.
    async fn project(&mut self) -> Result<(), Stop> {
        if self.engine.exporter.is_none() {
            return Ok(());
        }
        self.join_beside().await;
        let drained = project::drain(self.engine, self.claim.fence.connection).await?;
        self.report.files += drained.files;
        Ok(())
    }

    /// Begins to write the files of what is stored, unless the last beginning is still at it.
    async fn project_beside(&mut self) {
        if self.engine.exporter.is_none() || self.beside.as_ref().is_some_and(|task| !task.is_finished()) {
            return;
        }
        self.join_beside().await;
        let (engine, connection) = (self.engine.clone(), self.claim.fence.connection);
        self.beside = Some(tokio::spawn(async move { project::drain_files(&engine, connection).await }));
    }

    /// What went wrong there goes wrong again in the drain at the end, and is told by it.
    async fn join_beside(&mut self) {
        if let Some(task) = self.beside.take()
            && let Ok(Ok(drained)) = task.await
        {
            self.report.files += drained.files;
        }
    }

    pub(super) fn tell_progress(&mut self) {
        self.progress.calls = self.calls_before + self.gate.calls();
        self.progress.quota_left = self.gate.left();
        let Some(total) = self.progress.total else { return };
        let left = total.saturating_sub(self.progress.done);
        self.progress.eta_seconds = Some(match self.progress.quota_left {
            // Every further call costs one permit: what the windows hold decides.
            Some(permits) if left > permits => self.quota_eta(left - permits),
            _ => left / 4,
        });
    }

    /// Seconds that this many calls wait for quota, by the slowest window.
    fn quota_eta(&self, calls: u64) -> u64 {
        let class = self.gate.class();
        let slowest = self.setup.quotas.iter().map(|quota| {
            let share = crate::model::quota::share(quota.limit, class).max(1);
            calls.div_ceil(share) * quota.reset.length_ms().unsigned_abs() / 1000
        });
        slowest.max().unwrap_or(0)
    }

    pub(super) fn report_so_far(&mut self) -> Option<String> {
        self.report.calls = self.calls_before + self.gate.calls();
        serde_json::to_string(&self.report).ok()
    }

    /// Keeps what a commit told of the page boundary until the next call is to be made: what is committed is counted
    /// first, and a run that has nothing left to read ends instead of giving way.
    pub(super) fn note(&mut self, boundary: Boundary) {
        self.give_way = boundary.give_way;
        if boundary.cancel {
            self.cancel.store(true, Ordering::Relaxed);
        }
    }

    pub(super) fn check_stop(&self) -> Result<(), Stop> {
        if self.engine.stop.is_cancelled() {
            return Err(Stop::Shutdown);
        }
        if self.cancel.load(Ordering::Relaxed) {
            return Err(Stop::Cancelled);
        }
        if self.give_way {
            return Err(Stop::GiveWay);
        }
        Ok(())
    }

    pub(super) async fn pause(&self, wait: Duration) -> Result<(), Stop> {
        tokio::select! {
            () = self.engine.clock.sleep_until(self.engine.after(wait)) => Ok(()),
            () = self.engine.stop.cancelled() => Err(Stop::Shutdown),
        }
    }
}

/// Times the steps of a page.
struct Steps(std::time::Instant);

impl Steps {
    fn begin() -> Self {
        Self(std::time::Instant::now())
    }

    fn end(&mut self, step: &'static str) {
        telemetry::page_step(step, self.0.elapsed().as_secs_f64());
        self.0 = std::time::Instant::now();
    }
}

/// The name of what is read, as one of the few words that telemetry may use as a label.
fn leak_free(name: &str, setup: &ProviderSetup) -> &'static str {
    let spec = setup.spec();
    let streams = spec.streams.iter().map(|stream| stream.name.0);
    streams.chain(spec.parts.iter().map(|part| part.name.0)).find(|known| *known == name).unwrap_or("other")
}

/// A bound of an axis as an instant that both databases can compare; the beginning is the year 1.
fn instant(ms: i64) -> DateTime<Utc> {
    const YEAR_1_MS: i64 = -62_135_596_800_000;
    const YEAR_9999_MS: i64 = 253_402_300_799_000;
    DateTime::from_timestamp_millis(ms.clamp(YEAR_1_MS, YEAR_9999_MS)).unwrap_or_default()
}

/// Runs what is heavy on a thread of its own, so that the others' calls go on.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Error::Corrupt(format!("a page could not be prepared: {error}")))?
}

/// Streams of a report that did not end well.
pub(crate) fn failed_streams(report: &RunReport) -> BTreeMap<&str, &str> {
    report.streams.iter().filter_map(|(name, stream)| Some((name.as_str(), stream.error.as_deref()?))).collect()
}
