//! What a lane tells of itself: events, and its numbers.

use std::time::Duration;

#[cfg(doc)]
use super::Lane;
use crate::exchange::Key;
use crate::id::RequestId;
use crate::payload::Reset;
use crate::proto;

/// What happened, beside what the exchanges' handles tell.
#[derive(Clone, Debug, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "the large one is the frequent one: no box each")]
pub enum Event {
    /// The peer opened an exchange; its two handles are the caller's, who drops each.
    Opened {
        /// Names it here.
        key: Key,
        /// Names it at both ends.
        id: RequestId,
        /// Its protocol's number in the session.
        protocol_type: u32,
        /// What the peer's core knows of it.
        open: proto::Open,
    },
    /// What the peer serves.
    Announce(proto::Announce),
    /// The answer to what we announced.
    Announced(proto::Announced),
    /// The sidecar presents another credential.
    Authenticate(proto::Authenticate),
    /// What became of the credential that we presented.
    Authenticated(proto::Authenticated),
    /// No new exchanges on this lane.
    GoAway(proto::GoAway),
    /// The smoothed round-trip time was measured again.
    Rtt(Duration),
    /// True: something is unacknowledged, and no byte came for longer than the round trip explains.
    /// False: one came after all.
    Suspect(bool),
}

/// How an exchange stands: whether another end may be given what this one was sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fate {
    /// How it ended on the wire; `None`: it goes on.
    pub closed: Option<Reset>,
    /// As [`Lane::is_refused`].
    pub refused: bool,
    /// As [`Lane::is_dispatched`].
    pub dispatched: bool,
    /// Something of the peer's direction came.
    pub answered: bool,
}

/// A lane's numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LaneStats {
    /// Exchanges whose slots are filled.
    pub exchanges: usize,
    /// Exchanges that the peer may still send for.
    pub exchanges_on_wire: usize,
    /// Bytes of whole messages taken in.
    pub bytes_in: u64,
    /// Bytes handed out.
    pub bytes_out: u64,
    /// Counted messages received: what the peer has as `sent`.
    pub received: u64,
    /// Counted messages sent: what the peer has, or will have, as `received`.
    pub sent: u64,
    /// Counted messages sent that the peer has acknowledged.
    pub acknowledged: u64,
    /// All messages received, counted or not.
    pub messages_in: u64,
    /// All messages sent, counted or not.
    pub messages_out: u64,
    /// Messages for exchanges that were over.
    pub late: u64,
    /// Opens refused by this end's limits.
    pub opens_refused: u64,
    /// Exchanges reset because the peer broke a rule of its own exchange.
    pub violations: u64,
    /// Cost of what exchanges have queued for sending.
    pub send_queued_bytes: u64,
    /// Cost of what was received and not taken.
    pub receive_queued_bytes: u64,
    /// Control messages that wait.
    pub control_queued: usize,
    /// Smoothed round-trip time.
    pub rtt: Option<Duration>,
    /// Cost of what is kept for replay.
    pub replay_bytes: u64,
    /// What may be kept for replay now.
    pub replay_limit: u64,
    /// How often the lane came back.
    pub resumes: u64,
    /// Messages sent again.
    pub replayed: u64,
    /// Bytes of those.
    pub replayed_bytes: u64,
}
