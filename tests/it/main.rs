//! One binary for all tests that need a database: each extra one would link for itself.

#![allow(clippy::unwrap_used, reason = "a test that fails panics")]

#[path = "../support/mod.rs"]
mod support;

mod api;
mod conformance;
mod connect;
mod files;
mod manage;
mod oracle;
mod properties;
mod quota;
mod receive;
mod schedule;
mod sql;
mod storage;
mod sync;
mod tokens;
mod watch;
