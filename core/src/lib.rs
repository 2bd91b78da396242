//! Core.
pub mod config;
pub mod metrics;
pub mod router;
