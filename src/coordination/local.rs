//! The store of one working process.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex};

use futures::stream::BoxStream;
use tokio::sync::Notify;

use super::{Fanout, Taken, lock, restored};
use crate::model::quota::{self, Decision, Quota, Seen, Window};
use crate::model::{AccountId, Class, Job, UserId};

/// See [`super::Coordination`] for what its functions promise.
#[derive(Clone, Debug, Default)]
pub struct Local(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    ready: Mutex<Ready>,
    notify: Arc<Notify>,
    /// By key, then by the quota's name.
    quotas: Mutex<HashMap<String, HashMap<String, Window>>>,
    tokens: Mutex<HashMap<AccountId, Token>>,
    fanout: Fanout,
}

#[derive(Debug, Default)]
struct Ready {
    order: BTreeSet<(Class, i64, Job)>,
    places: HashMap<Job, (Class, i64)>,
}

#[derive(Debug)]
struct Token {
    version: i64,
    sealed: Vec<u8>,
    expires_at_ms: i64,
}

impl Local {
    pub(super) fn push(&self, job: Job, class: Class, due_ms: i64) {
        let mut ready = lock(&self.0.ready);
        if let Some((class, due_ms)) = ready.places.insert(job, (class, due_ms)) {
            ready.order.remove(&(class, due_ms, job));
        }
        ready.order.insert((class, due_ms, job));
        drop(ready);
        self.0.notify.notify_one();
    }

    pub(super) fn pop(&self, now_ms: i64) -> Option<Job> {
        // The least of all jobs of a class.
        let least = Job::Run(crate::model::RunId(uuid::Uuid::nil()));
        let mut ready = lock(&self.0.ready);
        let first = |class: Class| ready.order.range((class, i64::MIN, least)..).next().copied();
        let found = Class::ALL
            .into_iter()
            .find_map(|class| first(class).filter(|(c, due, _)| *c == class && *due <= now_ms))?;
        ready.order.remove(&found);
        ready.places.remove(&found.2);
        Some(found.2)
    }

    pub(super) fn ready_notify(&self) -> Arc<Notify> {
        self.0.notify.clone()
    }

    pub(super) fn take(&self, key: &str, quotas: &[Quota], class: Class, cost: u64, now_ms: i64) -> Taken {
        let mut all = lock(&self.0.quotas);
        let Some(stored) = all.get_mut(key) else { return Taken::Unknown };
        match with(stored, quotas, |windows| quota::take(quotas, windows, class, cost, now_ms)) {
            Decision::Granted { left } => Taken::Granted { left },
            Decision::Wait { until_ms } => Taken::Wait { until_ms },
        }
    }

    pub(super) fn restore(&self, key: &str, quotas: &[Quota], snapshot: &[(String, Window)], now_ms: i64) {
        let mut all = lock(&self.0.quotas);
        let stored = all.entry(key.to_owned()).or_default();
        with(stored, quotas, |windows| restored(quotas, windows, snapshot, now_ms));
    }

    pub(super) fn observe(&self, key: &str, quotas: &[Quota], seen: &[Seen], now_ms: i64) {
        if let Some(stored) = lock(&self.0.quotas).get_mut(key) {
            with(stored, quotas, |windows| quota::observe(quotas, windows, seen, now_ms));
        }
    }

    pub(super) fn refused(&self, key: &str, quotas: &[Quota], now_ms: i64) -> i64 {
        let mut none = HashMap::new();
        let mut all = lock(&self.0.quotas);
        let stored = all.get_mut(key).unwrap_or(&mut none);
        with(stored, quotas, |windows| quota::refused(quotas, windows, now_ms))
    }

    pub(super) fn windows(&self, key: &str, quotas: &[Quota], now_ms: i64) -> Vec<Window> {
        let all = lock(&self.0.quotas);
        let Some(stored) = all.get(key) else { return Vec::new() };
        quotas.iter().map(|quota| quota::current(quota, stored.get(&*quota.name).copied(), now_ms)).collect()
    }

    pub(super) fn cache_token(
        &self,
        account: AccountId,
        version: i64,
        sealed: Vec<u8>,
        expires_at_ms: i64,
        now_ms: i64,
    ) {
        let mut tokens = lock(&self.0.tokens);
        tokens.retain(|_, token| now_ms < token.expires_at_ms);
        if now_ms < expires_at_ms && tokens.get(&account).is_none_or(|token| token.version <= version) {
            tokens.insert(account, Token { version, sealed, expires_at_ms });
        }
    }

    pub(super) fn cached_token(&self, account: AccountId, now_ms: i64) -> Option<(i64, Vec<u8>)> {
        let tokens = lock(&self.0.tokens);
        let token = tokens.get(&account).filter(|token| now_ms < token.expires_at_ms)?;
        Some((token.version, token.sealed.clone()))
    }

    pub(super) fn forget_token(&self, account: AccountId, version: i64) {
        let mut tokens = lock(&self.0.tokens);
        if tokens.get(&account).is_some_and(|token| token.version == version) {
            tokens.remove(&account);
        }
    }

    pub(super) fn publish(&self, user: UserId, payload: String) {
        self.0.fanout.send(user, payload);
    }

    pub(super) fn subscribe(&self, user: UserId) -> BoxStream<'static, String> {
        self.0.fanout.listen(user)
    }
}

/// Lines the stored windows up with the quotas, works on them, and stores them again.
fn with<T>(stored: &mut HashMap<String, Window>, quotas: &[Quota], work: impl FnOnce(&mut [Option<Window>]) -> T) -> T {
    let mut windows: Vec<_> = quotas.iter().map(|quota| stored.get(&*quota.name).copied()).collect();
    let answer = work(&mut windows);
    for (quota, window) in quotas.iter().zip(windows) {
        stored.extend(window.map(|window| (quota.name.to_string(), window)));
    }
    answer
}
