//! The gate between a run and a provider: permits of the shared quota, and what answers tell of it.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};

use super::{Engine, ProviderSetup};
use crate::coordination::Taken;
use crate::model::Class;
use crate::model::quota::{Seen, Window};
use crate::providers::Gate;
use crate::telemetry;

/// A snapshot of the quotas goes to the database at most this often.
const SNAPSHOT_MS: i64 = 10_000;
/// When the shared store is away, calls wait this long before they ask again.
const AWAY_SECONDS: i64 = 2;

/// One run's gate.
pub(crate) struct RunGate<'a> {
    engine: &'a Engine,
    setup: &'a ProviderSetup,
    key: String,
    class: AtomicI64,
    calls: AtomicU64,
    left: Mutex<Option<u64>>,
}

impl<'a> RunGate<'a> {
    pub(crate) fn new(engine: &'a Engine, setup: &'a ProviderSetup, class: Class) -> Self {
        Self {
            engine,
            setup,
            key: setup.quota_key(),
            class: AtomicI64::new(class.number()),
            calls: AtomicU64::new(0),
            left: Mutex::new(None),
        }
    }

    /// Calls sent so far.
    pub(crate) fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// Calls left to the run's class in the tightest window; `None` without quotas.
    pub(crate) fn left(&self) -> Option<u64> {
        *self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on calls are made for this class.
    pub(crate) fn set_class(&self, class: Class) {
        self.class.store(class.number(), Ordering::Relaxed);
    }

    pub(crate) fn class(&self) -> Class {
        Class::from_number(self.class.load(Ordering::Relaxed))
    }

    async fn named_windows(&self, now_ms: i64) -> Vec<(String, Window)> {
        let quotas = &self.setup.quotas;
        match self.engine.shared.windows(&self.key, quotas, now_ms).await {
            Ok(windows) => quotas.iter().map(|quota| quota.name.clone().into_owned()).zip(windows).collect(),
            Err(error) => {
                telemetry::redis_down(&error);
                Vec::new()
            }
        }
    }

    /// Keeps a snapshot; at most every ten seconds per process unless `force`.
    pub(crate) async fn snapshot(&self, force: bool) {
        static LAST: AtomicI64 = AtomicI64::new(i64::MIN);
        let now = self.engine.now();
        let now_ms = now.timestamp_millis();
        let last = LAST.load(Ordering::Relaxed);
        if !force && now_ms.saturating_sub(last) < SNAPSHOT_MS {
            return;
        }
        LAST.store(now_ms, Ordering::Relaxed);
        let windows = self.named_windows(now_ms).await;
        if windows.is_empty() {
            return;
        }
        if let Err(error) = self.engine.db.save_quota(&self.key, &windows, now).await {
            tracing::warn!(%error, "the quota's snapshot could not be kept");
        }
    }
}

#[async_trait]
impl Gate for RunGate<'_> {
    async fn take(&self) -> Result<(), DateTime<Utc>> {
        let away = || self.engine.now() + chrono::Duration::seconds(AWAY_SECONDS);
        for _ in 0..3 {
            let now_ms = self.engine.clock.now_ms();
            let taken = self.engine.shared.take(&self.key, &self.setup.quotas, self.class(), 1, now_ms).await;
            match taken {
                Ok(Taken::Granted { left }) => {
                    self.calls.fetch_add(1, Ordering::Relaxed);
                    *self.left.lock().unwrap_or_else(PoisonError::into_inner) = (left != u64::MAX).then_some(left);
                    return Ok(());
                }
                Ok(Taken::Wait { until_ms }) => {
                    return Err(DateTime::from_timestamp_millis(until_ms).unwrap_or_else(away));
                }
                // The store is new, or lost everything: what is known of this window comes from the snapshot.
                Ok(Taken::Unknown) => {
                    let known = self.engine.db.load_quota(&self.key).await.unwrap_or_default();
                    if let Err(error) = self.engine.shared.restore(&self.key, &self.setup.quotas, &known, now_ms).await
                    {
                        telemetry::redis_down(&error);
                        return Err(away());
                    }
                }
                Err(error) => {
                    telemetry::redis_down(&error);
                    return Err(away());
                }
            }
        }
        Err(away())
    }

    async fn observe(&self, seen: &[Seen]) {
        if !seen.is_empty() {
            let now_ms = self.engine.clock.now_ms();
            if let Err(error) = self.engine.shared.observe(&self.key, &self.setup.quotas, seen, now_ms).await {
                telemetry::redis_down(&error);
            }
        }
        self.snapshot(false).await;
    }

    async fn refused(&self, retry_after: Option<Duration>) -> DateTime<Utc> {
        let now = self.engine.now();
        let until = match self.engine.shared.refused(&self.key, &self.setup.quotas, now.timestamp_millis()).await {
            Ok(until_ms) => DateTime::from_timestamp_millis(until_ms).unwrap_or(now),
            Err(error) => {
                telemetry::redis_down(&error);
                now
            }
        };
        // Without quotas of ours there is nothing to wait for but the provider's patience.
        let least = retry_after.unwrap_or_default().max(Duration::from_secs(AWAY_SECONDS.unsigned_abs()));
        until.max(self.engine.after(least))
    }
}
