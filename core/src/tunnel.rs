//! Drives the `sidelane-tunnel` state machines over real transports: lanes, sessions, dialling and
//! accepting.
//!
//! Knows sockets, clocks and retries; knows nothing of HTTP, routes' meaning or plugins.

pub mod accept;
pub mod backoff;
pub mod carrier;
pub mod dedicated;
pub mod dial;
mod drive;
mod exchange;
pub mod fault;
pub mod gate;
mod link;
mod pace;
pub mod pressure;
pub mod proxy;
pub mod returning;
pub mod session;
pub mod told;
pub mod transport;

#[cfg(test)]
pub(crate) mod test_tls;

pub use drive::{LaneEnd, drive};
pub use exchange::{RecvHalf, SendHalf};
pub use link::{Awaited, Link};
