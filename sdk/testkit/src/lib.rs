//! Tests for Sidelane plugins without a Sidelane.
//!
//! [`Kit`] is a host in the test's process: it lends a plugin everything the ABI names, from memory, on
//! one thread, with a clock of its own that jumps to the next timer when nothing else can happen. The
//! test plays client, peer and service from an `async` block in [`Kit::block_on`]. When the kit is
//! dropped it checks that each thing it lent was dropped exactly once.
//!
//! [`contract::run`] checks any plugin library, whatever language it is written in, against the rules
//! that every plugin must keep.
#![warn(missing_docs)]

pub mod contract;
mod host;
mod kit;
mod ledger;

pub use host::exchange::{Peer, PeerMessage};
pub use host::http::{BodySender, Response, ResponseHead, WholeResponse};
pub use host::io::TestStream;
pub use host::service::TestService;
pub use kit::{
    Accept, AcceptHttp, Deliver, Kit, LogLine, Outcome, Refuse, RefuseHttp, Running, TestFailure,
    TestMeta, TestRequest,
};

/// Compiles and runs the examples of the guide.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/plugin-guide.md")]
struct Guide;
