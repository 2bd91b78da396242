//! The tunnel between a sidecar and a relay, without I/O: the envelope's codec, the handshake, and
//! the state machine of a lane with its exchanges, credit and order of sending.
//!
//! Bytes, time and wakers are arguments; sockets, threads and clocks are the caller's. The contract
//! on the wire is `proto/tunnel.proto`.
//!
//! Start reading at [`Lane`].
#![warn(missing_docs)]
#![forbid(unsafe_code)]

mod acknowledge;
mod budget;
mod control;
pub mod credit;
pub mod dedicate;
pub mod envelope;
mod exchange;
pub mod handshake;
mod id;
mod lane;
mod liveness;
mod masked;
mod outbox;
mod payload;
mod protocols;
mod replay;
mod spare;
mod transmit;
mod wakes;

/// The schema's messages, generated from `proto/tunnel.proto` and checked in.
#[rustfmt::skip]
#[allow(missing_docs, unreachable_pub, clippy::pedantic, clippy::use_self, reason = "generated")]
#[path = "gen/sidelane.tunnel.v1.rs"]
pub mod proto;

// `tests/decode.rs` is compiled here and by the fuzz target.
#[cfg(test)]
extern crate self as sidelane_tunnel;
#[cfg(test)]
mod tests;

pub use acknowledge::{ACK_BYTES, ACK_DELAY};
pub use budget::Budget;
pub use envelope::DecodeError;
pub use exchange::Key;
pub use handshake::{
    Acceptor, Dialler, FEATURE_RESUME, First, HELD_MAX, HELLO_BYTES_MAX, HandshakeError,
    MESSAGE_BYTES_MIN, Reply, VERSION,
};
pub use id::{InvalidRequestId, REQUEST_ID_BYTES_MAX, RequestId, Side};
pub use lane::{
    Event, Fate, Lane, LaneConfig, LaneError, LaneStats, OPEN_RECORD_BYTES_MAX, OpenError,
    Pressure, SEND_QUEUE_BYTES_MAX,
};
pub use outbox::{QUANTUM_BYTES, SPARSE_BYTES_MAX};
pub use payload::{Payload, Received, Reset};
pub use protocols::{PROTOCOL_NUMBER_NAMED_MIN, PROTOCOLS_MAX, ProtocolTable, ProtocolTableError};
pub use transmit::{COPY_BYTES_MAX, Transmit};
pub use wakes::Wakes;
