//! The HTTP protocol plugin: requests at the relay become messages, messages at the sidecar become
//! requests to the service, and the answers go back the same way, streamed.
//!
//! Knows HTTP's semantics for intermediaries (RFC 9110 §7) and its own payloads. Does not know
//! routes, tunnels or sockets: the host lends them.
#![forbid(unsafe_code)]

mod config;
mod failure;
mod fields;
mod forwarded;
mod payload;
