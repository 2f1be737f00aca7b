//! Named points at which a test can make this process die.
//!
//! Only debug builds look: `WEARSYNC_FAILPOINT=name:n` aborts the process the n-th time that it comes by.

#[cfg(debug_assertions)]
use std::sync::atomic::{AtomicU64, Ordering};

/// Dies here, if a test asked for it.
#[cfg(debug_assertions)]
pub(crate) fn hit(name: &str) {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    static ASKED: std::sync::LazyLock<Option<(String, u64)>> = std::sync::LazyLock::new(|| {
        let text = std::env::var("WEARSYNC_FAILPOINT").ok()?;
        let (name, n) = text.split_once(':')?;
        Some((name.to_owned(), n.parse().ok()?))
    });
    if let Some((asked, n)) = ASKED.as_ref()
        && asked == name
        && COUNT.fetch_add(1, Ordering::SeqCst) + 1 == *n
    {
        // Not exit: nothing may be tidied up, as with kill -9.
        std::process::abort();
    }
}

/// Nothing, in a release build.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub(crate) fn hit(_: &str) {}
