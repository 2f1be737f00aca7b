//! What a delivery asks for: one named item, or whether the grant still lives.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use chrono::{DateTime, Utc};

use super::connect;
use super::engine::{SHORT_WAIT, STALE_TRIES, Stop, TRIES, Work, backoff, read_failure};
use super::tokens::TokenFailure;
use crate::model::{Kind, NamedItem, Progress};
use crate::providers::{FetchError, FetchedItem, FetchedPart, PRESENCE};
use crate::storage::{self, PageWrite};

/// An item that is announced and not there is asked for again for this long; then it is left to the next sync.
const PATIENCE: chrono::Duration = chrono::Duration::minutes(10);
/// The first wait for it; each further one is as long as all before.
const FIRST_WAIT: chrono::Duration = chrono::Duration::seconds(15);

impl Work<'_> {
    /// Reads the named items, and what is wanted of them.
    pub(super) async fn read_items(&mut self) -> Result<(), Stop> {
        loop {
            self.take_again().await?;
            for item in self.request.items.clone() {
                let stream = self.setup.spec().streams.iter().find(|stream| stream.kind == item.kind);
                let Some(stream) = stream.map(|stream| stream.name.0) else {
                    return Err(Stop::Fatal(format!("nothing lists records of kind {}", item.kind.as_str())));
                };
                self.progress = Progress { stream: stream.to_owned(), ..Progress::default() };
                self.report.streams.entry(stream.to_owned()).or_default().error = None;
                match self.read_item(&item, stream).await {
                    Ok(()) => self.report.streams.entry(stream.to_owned()).or_default().complete = true,
                    Err(Stop::Stream(detail)) => {
                        self.report.streams.entry(stream.to_owned()).or_default().error = Some(detail);
                    }
                    Err(stop) => return Err(stop),
                }
            }
            if !self.engine.db.is_wanted_again(&self.claim.fence).await? {
                return if self.cancel.load(Ordering::Relaxed) { Err(Stop::Cancelled) } else { Ok(()) };
            }
        }
    }

    async fn read_item(&mut self, item: &NamedItem, stream: &'static str) -> Result<(), Stop> {
        let connection = self.claim.fence.connection;
        let known = self.engine.db.find_start(connection, item.kind, &item.external_id).await?;
        let start = known.map(|(start, _)| start);
        let items = match (self.fetch_named(item, start).await?, known) {
            (FetchedItem::None, Some((_, false))) => {
                self.delete(item).await?;
                self.report.streams.entry(stream.to_owned()).or_default().deleted += 1;
                return Ok(());
            }
            (FetchedItem::None, None) if !item.gone => return self.later(item),
            // Nothing was stored, or nothing is left: the notice is true already.
            (FetchedItem::None, _) => return Ok(()),
            // It is still there: what changed of it, if anything, comes with its own notice or the next sync.
            (FetchedItem::Found(_), _) if item.gone => return Ok(()),
            (FetchedItem::Found(items), _) => items,
        };
        let spec = self.setup.spec();
        let is_primary = |part| spec.part(item.kind, part).is_some_and(|part| part.primary);
        if !items.first().is_some_and(|first| is_primary(first.part.0)) {
            // The provider has it, and does not list it yet.
            return self.later(item);
        }
        for (n, answer) in items.into_iter().enumerate() {
            // What came along is kept where it would be fetched anyway.
            if n > 0 && !self.parts.contains(&answer.part.0) {
                continue;
            }
            self.progress.done += 1;
            self.tell_progress();
            let part = answer.part.0;
            let done = self.commit(vec![answer], None, Vec::new()).await?;
            if n == 0 {
                let report = self.report.streams.entry(stream.to_owned()).or_default();
                report.listed += 1;
                report.inserted += done.inserted;
                report.updated += done.updated;
            } else {
                self.report.parts.entry(part.to_owned()).or_default().stored += 1;
            }
            self.count(&done, Vec::new());
        }
        self.read_parts_of(item.kind, &item.external_id).await
    }

    /// An item that is announced and not there: it may still be processed at the provider.
    fn later(&mut self, item: &NamedItem) -> Result<(), Stop> {
        let now = self.engine.now();
        let age = now - self.claim.run.created_at;
        if age < PATIENCE {
            return Err(Stop::PartsLater(now + age.max(FIRST_WAIT)));
        }
        let note = format!("{} {} is not there: the next sync looks for it", item.kind.as_str(), item.external_id);
        if !self.report.notes.contains(&note) {
            self.report.notes.push(note);
        }
        Ok(())
    }

    /// Asks for one item, with its short waits sat out.
    async fn fetch_named(&mut self, item: &NamedItem, start: Option<DateTime<Utc>>) -> Result<FetchedItem, Stop> {
        let deadline = self.engine.config.page_timeout;
        let mut tries = self.claim.run.attempts;
        loop {
            self.check_stop()?;
            let answer = match tokio::time::timeout(deadline, self.call_named(item, start)).await {
                Ok(answer) => answer,
                Err(_) => Err(Stop::Retry { detail: "the item was not read in time".to_owned(), after: None }),
            };
            match answer {
                Err(Stop::Retry { detail, after }) => {
                    tries += 1;
                    if tries >= TRIES {
                        return Err(Stop::Stream(detail));
                    }
                    let wait = after.unwrap_or_else(|| backoff(tries - 1));
                    if wait > SHORT_WAIT {
                        return Err(Stop::Retry { detail, after: Some(wait) });
                    }
                    self.pause(wait).await?;
                }
                answer => return answer,
            }
        }
    }

    async fn call_named(&mut self, item: &NamedItem, start: Option<DateTime<Utc>>) -> Result<FetchedItem, Stop> {
        let (provider, kind, id) = (self.setup.provider, item.kind, item.external_id.as_str());
        let mut refused = 0;
        loop {
            let token = self.token().await?;
            let answer = if item.gone {
                provider.fetch_part(&self.api(&token), kind, id, PRESENCE).await.map(|part| match part {
                    FetchedPart::Body(_) => FetchedItem::Found(Vec::new()),
                    FetchedPart::None => FetchedItem::None,
                })
            } else {
                provider.fetch_item(&self.api(&token), kind, id, start).await
            };
            match answer {
                Err(FetchError::Unauthorized { version }) => self.refuse_token(version, &mut refused).await?,
                Err(FetchError::Gone) => return Ok(FetchedItem::None),
                Err(error) => return Err(read_failure(error)),
                Ok(found) => return Ok(found),
            }
        }
    }

    /// Marks the record of an item as deleted: its absence was confirmed by a call.
    async fn delete(&mut self, item: &NamedItem) -> Result<(), Stop> {
        let engine = self.engine;
        let key = (item.kind, item.external_id.clone());
        let ids = BTreeSet::from([key.clone()]);
        for _ in 0..STALE_TRIES {
            let state = engine.db.load_page_state(self.claim.fence.connection, &ids).await?;
            let write = PageWrite {
                page_seq: state.page_seq,
                deleted: state.records.get(&key).map(|record| record.id).into_iter().collect(),
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

    /// Fetches what is wanted of one record, and nothing else: years of others may be wanted, too.
    async fn read_parts_of(&mut self, kind: Kind, external_id: &str) -> Result<(), Stop> {
        let connection = self.claim.fence.connection;
        for (wanted, due) in self.engine.db.list_wanted_of(connection, kind, external_id).await? {
            if due <= self.engine.now() {
                self.check_stop()?;
                self.progress.stream.clone_from(&wanted.part);
                self.read_part(&wanted).await?;
            }
        }
        let left = self.engine.db.list_wanted_of(connection, kind, external_id).await?;
        match left.into_iter().map(|(_, due)| due).min() {
            Some(due) => Err(Stop::PartsLater(due)),
            None => Ok(()),
        }
    }

    /// Somebody says that the grant was taken back. Whether it was, a refresh tells; then the connection ends.
    pub(super) async fn check_grant(&mut self) -> Result<(), Stop> {
        let (engine, id) = (self.engine, self.claim.account_id);
        let version = engine.db.find_account(id).await?.map_or(0, |account| account.token_version);
        match engine.access_token(self.setup, id, version).await {
            Ok(_) => {
                self.report.notes.push("the grant still lives: nothing was changed".to_owned());
                Ok(())
            }
            Err(failure @ TokenFailure::Reauthorize(_)) => {
                // Only what the provider itself refused counts.
                if connect::end_refused(engine, Some(id), true).await? == 0 {
                    return Err(failure.into());
                }
                Err(Stop::Fatal(format!("the person took back access at {}", self.setup.spec().title)))
            }
            Err(failure) => Err(failure.into()),
        }
    }
}
