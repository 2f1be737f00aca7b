//! wearsync mirrors personal and wearable data into your own database and files: no gaps, no duplicates, provable.
//!
//! The rooms and what each may name are listed in `ARCHITECTURE.md` and held by `tests/layering.rs`.

#![forbid(unsafe_code)]

pub mod api;
pub mod app;
pub mod calculated;
pub mod cli;
pub mod clock;
pub mod config;
pub mod coordination;
pub mod export;
pub mod model;
pub mod providers;
#[cfg(feature = "simulator")]
pub mod simulator;
pub mod storage;
pub mod sync;
pub mod telemetry;
pub mod vault;
pub mod worker;
