//! Real processes, killed at random moments and at named points: nothing lost, nothing twice, no torn file.
//!
//! `CRASH_KILLS` sets how often (60 in the test suite, 1 000 by `just crash`); `CRASH_SEED` repeats a run's choices.

#[path = "../support/mod.rs"]
mod support;

mod kills;
mod process;
mod scene;
