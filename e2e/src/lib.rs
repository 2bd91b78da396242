//! What the end-to-end tests stand on: the real program as a child process, a service that records
//! the bytes it gets and answers by script, and clients that send exactly what a test says.
//!
//! Blocking and without a runtime on purpose: a test reads like the exchange it is about (only the wire
//! of `fault` has a runtime, on a thread of its own). Knows nothing of core's code; what it knows is the
//! command line, the YAML and the wire.
#![allow(clippy::print_stderr, reason = "a failing test shows the program's log")]

pub mod authority;
pub mod balancer;
pub mod browser;
pub mod client;
pub mod connect;
pub mod fault;
pub mod load;
pub mod nginx;
pub mod nobody;
pub mod pattern;
pub mod pebble;
pub mod peer;
pub mod process;
pub mod service;
pub mod signer;
pub mod stage;
pub mod tap;
pub mod tls;
pub mod tools;
pub mod wait;
pub mod websocket;
