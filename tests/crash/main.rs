//! Real processes, killed at random moments and at named points: nothing lost, nothing twice, no torn file.
//!
//! `CRASH_KILLS` sets how often (60 in the test suite, 1 000 by `just crash`); `CRASH_SEED` repeats a run's choices;
//! `CRASH_LOG=1` shows what the processes say.

#![allow(clippy::unwrap_used, reason = "a test that fails panics")]

#[path = "../support/mod.rs"]
mod support;

mod accepts;
mod clock;
mod connect;
mod deliveries;
mod erase;
mod kills;
mod process;
mod refresh;
mod scene;
mod servers;
mod signals;
mod watch;

/// How often `CRASH_KILLS` asks for, or else `usually`.
fn kills(usually: u64) -> u64 {
    std::env::var("CRASH_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(usually)
}

/// A random source that `CRASH_SEED` makes repeatable.
fn chance() -> rand::rngs::StdRng {
    let seed = std::env::var("CRASH_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(rand::random);
    println!("CRASH_SEED={seed}");
    rand::SeedableRng::seed_from_u64(seed)
}
