//! The one place that asks what time it is.
//!
//! May name nothing of this crate. What must always hold: every instant that is stored came from a [`Clock`], in
//! whole milliseconds, so that both databases give back what they were given.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use chrono::{DateTime, Utc};

/// A source of time.
#[derive(Clone, Debug)]
pub enum Clock {
    /// The machine's clock, plus an offset (milliseconds) that keeps several machines on the database's time.
    System(Arc<AtomicI64>),
    /// Stands still until moved: for tests that simulate days.
    Mock(Arc<AtomicI64>),
}

impl Clock {
    /// The machine's clock.
    #[must_use]
    pub fn system() -> Self {
        Self::System(Arc::default())
    }

    /// A clock that stands at this instant.
    #[must_use]
    pub fn mock(at: DateTime<Utc>) -> Self {
        Self::Mock(Arc::new(AtomicI64::new(at.timestamp_millis())))
    }

    /// Now, in whole milliseconds.
    #[must_use]
    pub fn now(&self) -> DateTime<Utc> {
        DateTime::from_timestamp_millis(self.now_ms()).unwrap_or_default()
    }

    /// Now, milliseconds since 1970.
    #[must_use]
    pub fn now_ms(&self) -> i64 {
        match self {
            #[expect(clippy::disallowed_methods, reason = "the one place that may")]
            Self::System(offset) => Utc::now().timestamp_millis() + offset.load(Ordering::Relaxed),
            Self::Mock(at) => at.load(Ordering::SeqCst),
        }
    }

    /// Follows a reference (the database) that says it is `reference_ms` right now.
    pub fn follow(&self, reference_ms: i64) {
        if let Self::System(offset) = self {
            let here = self.now_ms() - offset.load(Ordering::Relaxed);
            offset.store(reference_ms - here, Ordering::Relaxed);
        }
    }

    /// Moves a mock clock; does nothing to a real one.
    pub fn set(&self, at: DateTime<Utc>) {
        if let Self::Mock(now) = self {
            now.store(at.timestamp_millis(), Ordering::SeqCst);
        }
    }

    /// Waits until this instant by this clock. A mock clock is looked at every millisecond.
    pub async fn sleep_until(&self, at: DateTime<Utc>) {
        loop {
            let left = at.timestamp_millis() - self.now_ms();
            let Ok(left) = u64::try_from(left) else { return };
            if left == 0 {
                return;
            }
            let step = match self {
                // An offset that moves while we sleep is noticed within a second.
                Self::System(_) => left.min(1000),
                Self::Mock(_) => 1,
            };
            tokio::time::sleep(std::time::Duration::from_millis(step)).await;
        }
    }
}
