//! How a lane is set up.

use std::sync::Arc;
use std::time::Duration;

use crate::budget::Budget;
use crate::id::Side;

/// How a lane is set up: what the handshake settled, and limits of this end.
#[derive(Clone, Debug)]
pub struct LaneConfig {
    /// Which end this is.
    pub side: Side,
    /// Credit that an exchange's peer begins with. Default 256 KiB, at least
    /// [`crate::credit::WINDOW_MIN`].
    pub receive_window: u64,
    /// Credit that we begin with. Default 256 KiB.
    pub send_window: u64,
    /// What a receive window may grow to. Default 4 MiB.
    pub window_max: u64,
    /// Longest message accepted. Default 1 MiB.
    pub message_bytes_max: u32,
    /// Longest message that the peer accepts. Default 1 MiB.
    pub peer_message_bytes_max: u32,
    /// Exchanges at once; above it the peer's opens are refused, ours fail. Default 10,000.
    pub exchanges_max: usize,
    /// Bytes received and unread, and, apart from them, bytes to be sent. Above it opens are refused
    /// and senders wait; above half of it windows stop growing. Default 64 MiB.
    pub queued_bytes_max: u64,
    /// Between pings. Default 5 s.
    pub ping_idle: Duration,
    /// Without any byte from the peer for so long, the lane is dead. Default 10 s.
    pub dead_after: Duration,
    /// Bytes kept for replay at first, and at least. Default 256 KiB.
    pub replay_bytes_min: u64,
    /// Bytes kept for replay at most; 0: nothing is kept, nothing acknowledged, and the lane does not
    /// come back. Default 0: the handshake decides.
    pub replay_bytes_max: u64,
    /// What the lanes of the process keep together; `None`: no bound but each lane's own.
    pub replay_budget: Option<Arc<Budget>>,
}

impl LaneConfig {
    /// Returns the defaults for one end.
    #[must_use]
    pub const fn new(side: Side) -> Self {
        Self {
            side,
            receive_window: 256 * 1024,
            send_window: 256 * 1024,
            window_max: 4 * 1024 * 1024,
            message_bytes_max: 1024 * 1024,
            peer_message_bytes_max: 1024 * 1024,
            exchanges_max: 10_000,
            queued_bytes_max: 64 * 1024 * 1024,
            ping_idle: Duration::from_secs(5),
            dead_after: Duration::from_secs(10),
            replay_bytes_min: 256 * 1024,
            replay_bytes_max: 0,
            replay_budget: None,
        }
    }
}

impl LaneConfig {
    /// Returns the same with what the peer's hello or welcome says.
    #[must_use]
    pub fn with_peer(mut self, window: u64, message_bytes_max: u32) -> Self {
        self.send_window = window;
        self.peer_message_bytes_max = message_bytes_max;
        self
    }
}

impl Default for LaneConfig {
    fn default() -> Self {
        Self::new(Side::Relay)
    }
}

/// How much is queued beside this lane, in all that shares a bound with it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum Pressure {
    /// Little.
    #[default]
    None,
    /// More than half of the bound: windows stop growing.
    High,
    /// All of it: opens are refused too.
    Full,
}
