//! Why a lane cannot go on, or an exchange not be opened.

use std::time::Duration;

#[cfg(doc)]
use super::Lane;
use super::OPEN_RECORD_BYTES_MAX;
use crate::envelope::DecodeError;
use crate::id::RequestId;

/// Why an exchange could not be opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum OpenError {
    /// The lane has ended.
    #[error("the lane is closed")]
    Closed,
    /// One end has said that no new exchanges are to come.
    #[error("the lane is going away")]
    GoingAway,
    /// As many exchanges as the lane takes, or as many bytes queued.
    #[error("the lane is at its limit of exchanges or queued bytes")]
    Overloaded,
    /// What core knows of the exchange is too long.
    #[error("an open record of {bytes} bytes, at most {OPEN_RECORD_BYTES_MAX} are sent")]
    TooLarge {
        /// Its encoded length.
        bytes: usize,
    },
    /// The id is in use, or not of this end's parity: a defect of the caller.
    #[error("request id {0} is in use or not of this end's parity")]
    InvalidId(RequestId),
}

/// Why a lane cannot go on. Its exchanges end; the caller says how by [`Lane::close`].
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum LaneError {
    /// The peer's bytes are no message.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The peer's control message, or its open record, is no message of its type.
    #[error("malformed payload in field {field}")]
    Payload {
        /// Field's number.
        field: u32,
        /// What is wrong with it.
        #[source]
        source: prost::DecodeError,
    },
    /// A message that has no place on an open lane, or is the wrong end's to send.
    #[error("field {field} is not expected here")]
    Unexpected {
        /// Field's number.
        field: u32,
    },
    /// A peer's id has the parity of ours.
    #[error("request id {0} is not of the peer's parity")]
    WrongParity(RequestId),
    /// A peer opens an exchange that is open.
    #[error("request id {0} is in use")]
    IdInUse(RequestId),
    /// A peer acknowledges what was not sent, or less than before.
    #[error("{received} messages acknowledged, {sent} were sent and {before} acknowledged before")]
    Ack {
        /// Acknowledged.
        received: u64,
        /// Counted messages sent.
        sent: u64,
        /// Acknowledged before.
        before: u64,
    },
    /// The peer makes us answer faster than it reads.
    #[error("more than {max} control messages, or too long ones, wait for the peer")]
    ControlFlood {
        /// The bound.
        max: usize,
    },
    /// More came at once than the bound on events holds.
    #[error("more than {max} events wait")]
    EventFlood {
        /// The bound.
        max: usize,
    },
    /// An announcement, or the answer to one, with more in it than any end takes.
    #[error("more than {max} entries in field {field}")]
    TooManyEntries {
        /// Field's number.
        field: u32,
        /// The bound.
        max: usize,
    },
    /// No byte came for too long.
    #[error("no byte from the peer for {0:?}")]
    Dead(Duration),
    /// There is nothing to resume: the lane has ended.
    #[error("the lane is closed")]
    Closed,
    /// The lane has a carrier: [`Lane::detach`] comes before [`Lane::resume`], and before the peer is told
    /// what was received.
    #[error("the lane has a connection that it was not detached from")]
    Attached,
    /// A lane cannot come back: the peer has less than it said before, or more than was sent.
    #[error(
        "the peer has {received} messages of this lane; {sent} were sent, and what came before \
         {acknowledged} is not kept any more"
    )]
    Gap {
        /// What the peer says that it has.
        received: u64,
        /// Counted messages sent.
        sent: u64,
        /// Acknowledged before.
        acknowledged: u64,
    },
}
