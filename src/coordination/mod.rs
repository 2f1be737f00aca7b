//! What processes share besides the database: the list of ready runs, the quotas, the cache of access tokens, the
//! fan-out of run events.
//!
//! May name model, clock, config and telemetry; everything that speaks Redis is here. What must always hold: nothing
//! here is the truth. Whatever is lost at any moment costs seconds (the next sweep, one refresh, an event less), and
//! both stores give the same answers to the same calls.

mod local;
mod redis;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use futures::StreamExt as _;
use futures::stream::BoxStream;
use tokio::sync::{Notify, broadcast};

pub use local::Local;
pub use redis::Shared;

use crate::config::SecretUrl;
use crate::model::quota::{self, Quota, Seen, Window};
use crate::model::{AccountId, Class, Job, UserId};

/// Events that wait for one slow reader. Few: room for all of them is taken for each user who is listened to.
const EVENTS_KEPT: usize = 16;

/// The shared store did not answer, or not as expected. Nothing above needs to know more.
#[derive(Clone, Debug, thiserror::Error)]
#[error("Redis: {0}")]
pub struct Error(String);

/// May a call be made?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// Yes; this many more are left to this class in the tightest window.
    Granted {
        /// Calls left after this one; `u64::MAX` where there is no quota.
        left: u64,
    },
    /// Not before this instant, milliseconds.
    Wait {
        /// When the spent window starts anew.
        until_ms: i64,
    },
    /// Nothing is stored for this key: [`Coordination::restore`] it from the snapshot, then take again.
    Unknown,
}

/// In this process, or shared through Redis.
#[derive(Clone, Debug)]
pub enum Coordination {
    /// One working process.
    Local(Local),
    /// Any number of them.
    Redis(Shared),
}

impl Coordination {
    /// For one working process.
    #[must_use]
    pub fn local() -> Self {
        Self::Local(Local::default())
    }

    /// For any number of processes. Connects when first used; needs a running tokio runtime.
    ///
    /// # Errors
    /// When the address cannot be used; not when Redis is away.
    pub fn redis(url: &SecretUrl, prefix: &str) -> Result<Self, Error> {
        Shared::new(url.expose(), prefix).map(Self::Redis)
    }

    /// Puts a run or a delivery on the ready list, due at `due_ms`. Again: it moves.
    ///
    /// # Errors
    /// Redis is away; the sweep finds it.
    pub async fn push(&self, job: impl Into<Job>, class: Class, due_ms: i64) -> Result<(), Error> {
        let job = job.into();
        match self {
            Self::Local(local) => {
                local.push(job, class, due_ms);
                Ok(())
            }
            Self::Redis(shared) => shared.push(job, class, due_ms).await,
        }
    }

    /// Takes the most urgent job that is due: lowest class, then due, then id. Each push is answered at most once.
    ///
    /// # Errors
    /// Redis is away.
    pub async fn pop(&self, now_ms: i64) -> Result<Option<Job>, Error> {
        match self {
            Self::Local(local) => Ok(local.pop(now_ms)),
            Self::Redis(shared) => shared.pop(now_ms).await,
        }
    }

    /// Notified once per push, here or (while Redis is connected) elsewhere. A hint: keep polling besides.
    #[must_use]
    pub fn ready_notify(&self) -> Arc<Notify> {
        match self {
            Self::Local(local) => local.ready_notify(),
            Self::Redis(shared) => shared.ready_notify(),
        }
    }

    /// Takes `cost` calls from all windows of `key` in one step, or from none.
    ///
    /// # Errors
    /// Redis is away.
    pub async fn take(
        &self,
        key: &str,
        quotas: &[Quota],
        class: Class,
        cost: u64,
        now_ms: i64,
    ) -> Result<Taken, Error> {
        if quotas.is_empty() {
            return Ok(Taken::Granted { left: u64::MAX });
        }
        match self {
            Self::Local(local) => Ok(local.take(key, quotas, class, cost, now_ms)),
            Self::Redis(shared) => shared.take(key, quotas, class, cost, now_ms).await,
        }
    }

    /// Begins a key with a snapshot (by quota name; an empty one is fine). Where the key exists, `used` is only raised.
    ///
    /// # Errors
    /// Redis is away.
    pub async fn restore(
        &self,
        key: &str,
        quotas: &[Quota],
        windows: &[(String, Window)],
        now_ms: i64,
    ) -> Result<(), Error> {
        if quotas.is_empty() {
            return Ok(());
        }
        match self {
            Self::Local(local) => {
                local.restore(key, quotas, windows, now_ms);
                Ok(())
            }
            Self::Redis(shared) => shared.restore(key, quotas, windows, now_ms).await,
        }
    }

    /// Takes in what a response told. Does nothing to an unknown key, which the next `take` restores.
    ///
    /// # Errors
    /// Redis is away.
    pub async fn observe(&self, key: &str, quotas: &[Quota], seen: &[Seen], now_ms: i64) -> Result<(), Error> {
        if quotas.is_empty() {
            return Ok(());
        }
        match self {
            Self::Local(local) => {
                local.observe(key, quotas, seen, now_ms);
                Ok(())
            }
            Self::Redis(shared) => shared.observe(key, quotas, seen, now_ms).await,
        }
    }

    /// After a refusal (429): closes the windows it may have come from, and says when to come back (milliseconds;
    /// `now_ms` where there is no quota).
    ///
    /// # Errors
    /// Redis is away.
    pub async fn refused(&self, key: &str, quotas: &[Quota], now_ms: i64) -> Result<i64, Error> {
        if quotas.is_empty() {
            return Ok(now_ms);
        }
        match self {
            Self::Local(local) => Ok(local.refused(key, quotas, now_ms)),
            Self::Redis(shared) => shared.refused(key, quotas, now_ms).await,
        }
    }

    /// The windows as they stand, one per quota in their order; none at all where nothing is stored, so that an empty
    /// store is never mistaken for an unused quota.
    ///
    /// # Errors
    /// Redis is away.
    pub async fn windows(&self, key: &str, quotas: &[Quota], now_ms: i64) -> Result<Vec<Window>, Error> {
        if quotas.is_empty() {
            return Ok(Vec::new());
        }
        match self {
            Self::Local(local) => Ok(local.windows(key, quotas, now_ms)),
            Self::Redis(shared) => shared.windows(key, quotas, now_ms).await,
        }
    }

    /// Keeps an account's access token (sealed) until it ends. An older version never replaces a newer one.
    ///
    /// # Errors
    /// Redis is away.
    pub async fn cache_token(
        &self,
        account: AccountId,
        version: i64,
        sealed: Vec<u8>,
        expires_at_ms: i64,
        now_ms: i64,
    ) -> Result<(), Error> {
        match self {
            Self::Local(local) => {
                local.cache_token(account, version, sealed, expires_at_ms, now_ms);
                Ok(())
            }
            Self::Redis(shared) => shared.cache_token(account, version, sealed, expires_at_ms, now_ms).await,
        }
    }

    /// The version and the sealed token, while it lasts.
    ///
    /// # Errors
    /// Redis is away.
    pub async fn cached_token(&self, account: AccountId, now_ms: i64) -> Result<Option<(i64, Vec<u8>)>, Error> {
        match self {
            Self::Local(local) => Ok(local.cached_token(account, now_ms)),
            Self::Redis(shared) => shared.cached_token(account, now_ms).await,
        }
    }

    /// Forgets the account's token if it is of this version.
    ///
    /// # Errors
    /// Redis is away.
    pub async fn forget_token(&self, account: AccountId, version: i64) -> Result<(), Error> {
        match self {
            Self::Local(local) => {
                local.forget_token(account, version);
                Ok(())
            }
            Self::Redis(shared) => shared.forget_token(account, version).await,
        }
    }

    /// Tells an event to everybody who listens for this user now, in every process.
    ///
    /// # Errors
    /// Redis is away.
    pub async fn publish(&self, user: UserId, payload: String) -> Result<(), Error> {
        match self {
            Self::Local(local) => {
                local.publish(user, payload);
                Ok(())
            }
            Self::Redis(shared) => shared.publish(user, &payload).await,
        }
    }

    /// The user's events from now on, in order. Events are missed while Redis is away, and by a reader that is 16 events
    /// behind: then it is given an empty text, which says that the rows tell more.
    #[must_use]
    pub fn subscribe(&self, user: UserId) -> BoxStream<'static, String> {
        match self {
            Self::Local(local) => local.subscribe(user),
            Self::Redis(shared) => shared.subscribe(user),
        }
    }

    /// Whether the store answers.
    ///
    /// # Errors
    /// Redis is away.
    pub async fn ping(&self) -> Result<(), Error> {
        match self {
            Self::Local(_) => Ok(()),
            Self::Redis(shared) => shared.ping().await,
        }
    }
}

/// Hands events to the listeners of this process.
#[derive(Debug, Default)]
struct Fanout {
    users: Mutex<HashMap<UserId, broadcast::Sender<String>>>,
}

impl Fanout {
    fn send(&self, user: UserId, payload: String) {
        let mut users = lock(&self.users);
        // An error means that nobody listens any more.
        if users.get(&user).is_some_and(|sender| sender.send(payload).is_err()) {
            users.remove(&user);
        }
    }

    /// Something may have been missed: everybody is to look at the rows.
    fn send_all(&self) {
        lock(&self.users).retain(|_, sender| sender.send(String::new()).is_ok());
    }

    fn listen(&self, user: UserId) -> BoxStream<'static, String> {
        let mut users = lock(&self.users);
        users.retain(|_, sender| sender.receiver_count() > 0);
        let receiver = users.entry(user).or_insert_with(|| broadcast::channel(EVENTS_KEPT).0).subscribe();
        futures::stream::unfold(receiver, |mut receiver| async {
            match receiver.recv().await {
                Ok(payload) => Some((payload, receiver)),
                Err(broadcast::error::RecvError::Lagged(_)) => Some((String::new(), receiver)),
                Err(broadcast::error::RecvError::Closed) => None,
            }
        })
        .boxed()
    }
}

/// Windows after a snapshot was taken in: new ones begin with it, others only rise.
fn restored(quotas: &[Quota], windows: &mut [Option<Window>], snapshot: &[(String, Window)], now_ms: i64) {
    for (quota, slot) in quotas.iter().zip(windows) {
        let told = snapshot.iter().find(|(name, _)| *name == quota.name);
        let told = told.map(|(_, window)| quota::current(quota, Some(*window), now_ms));
        let mut window = quota::current(quota, slot.or(told), now_ms);
        if let Some(told) = told {
            window.used = window.used.max(told.used);
        }
        *slot = Some(window);
    }
}

/// What a panic elsewhere left behind is still whole: every change under these locks is a single step.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
