//! Loads real libraries: C ones with one thing wrong each, and the probes of `tests/fixtures`, driven
//! over in-memory streams.

mod lent;
pub(in crate::plugin) mod libraries;
mod loading;
mod running;

/// How long replaced plugins may run on; each test ends them itself.
const DRAIN: std::time::Duration = std::time::Duration::from_secs(60);
