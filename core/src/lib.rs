//! The library behind the program `sidelane`, in reading order.

pub mod cli;
pub mod process;

pub mod acme;
mod address;
pub mod admin;
pub mod announcement;
pub mod choice;
pub mod config;
pub mod credentials;
pub mod error;
pub mod explain;
pub mod front;
mod https;
pub mod join;
pub mod metrics;
pub mod plugin;
pub mod random;
pub mod relay;
pub mod router;
pub mod shard;
pub mod sidecar;
pub mod tls;
pub mod tunnel;
