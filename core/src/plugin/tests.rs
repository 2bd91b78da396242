//! Loads real libraries: C ones with one thing wrong each, and the probes of `tests/fixtures`, driven
//! over in-memory streams.

mod lent;
mod libraries;
mod loading;
mod running;
