//! What the plugins of HTTP-born protocols share: which fields pass, what a service is told of the
//! client, failures in HTTP's words, waits before retries, and protobuf's wire format.
//!
//! Knows HTTP's semantics for intermediaries (RFC 9110 §7). Knows no protocol's payloads but HTTP's
//! bodies and trailers, and does no I/O but for the pool of HTTP/2 connections (the feature `h2`).
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod body;
pub mod config;
pub mod failure;
pub mod fields;
pub mod forwarded;
#[cfg(feature = "h2")]
pub mod h2_pool;
pub mod retry;
pub mod wire;
