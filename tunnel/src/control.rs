//! What a lane sends beside the messages of exchanges, and before them.

use std::collections::VecDeque;

use bytes::Bytes;
use prost::Message;

use crate::envelope::{Head, field, write_head};
use crate::exchange::Key;
use crate::id::RequestId;
use crate::payload::Reset;
use crate::proto;

/// A control message that waits for the carrier.
#[derive(Clone, Debug)]
pub(crate) enum Control {
    Ping {
        token: u64,
    },
    Pong {
        token: u64,
    },
    /// The count is read when it is written.
    Ack,
    /// The limit is read when it is written: an exchange has one such entry at most.
    Window(Key),
    Reset {
        id: RequestId,
        reset: Reset,
    },
    Refused {
        id: RequestId,
        code: u32,
    },
    Dispatched {
        id: RequestId,
    },
    /// An encoded announcement, answer to one, or go-away.
    Document {
        field: u32,
        bytes: Bytes,
    },
}

impl Control {
    const fn document_bytes(&self) -> usize {
        match self {
            Self::Document { bytes, .. } => bytes.len(),
            _ => 0,
        }
    }

    /// Returns whether both ends count it, so that it is replayed after a loss.
    pub(crate) const fn is_counted(&self) -> bool {
        match self {
            Self::Ping { .. } | Self::Pong { .. } | Self::Ack | Self::Window(_) => false,
            Self::Reset { .. }
            | Self::Refused { .. }
            | Self::Dispatched { .. }
            | Self::Document { .. } => true,
        }
    }
}

/// Bytes of announcements and of answers to them that may wait: a few of the longest.
const DOCUMENT_BYTES_MAX: usize = 8 * 1024 * 1024;

/// The queue of control messages.
#[derive(Debug)]
pub(crate) struct ControlQueue {
    /// Counted ones, in order.
    queue: VecDeque<Control>,
    /// Uncounted ones, which go out whatever the ring holds.
    urgent: VecDeque<Control>,
    /// Bounds what a peer that asks and never reads can make us hold.
    max: usize,
    /// Of the documents in the queue.
    document_bytes: usize,
    overflowed: bool,
}

impl ControlQueue {
    pub(crate) const fn new(max: usize) -> Self {
        Self {
            queue: VecDeque::new(),
            urgent: VecDeque::new(),
            max,
            document_bytes: 0,
            overflowed: false,
        }
    }

    pub(crate) fn push(&mut self, control: Control) {
        let bytes = control.document_bytes();
        if self.len() >= self.max || self.document_bytes + bytes > DOCUMENT_BYTES_MAX {
            self.overflowed = true;
        } else if !control.is_counted() {
            self.urgent.push_back(control);
        } else {
            self.document_bytes += bytes;
            self.queue.push_back(control);
        }
    }

    /// Queues what this end serves. It takes the place of one that waits still, and that nobody needs any
    /// more: in a long outage, or behind a full ring, there would be one for each change meanwhile.
    pub(crate) fn push_announcement(&mut self, announcement: Bytes) {
        let waits = self.queue.iter_mut().find_map(|control| match control {
            Control::Document { field: field::ANNOUNCE, bytes } => Some(bytes),
            _ => None,
        });
        if let Some(bytes) = waits {
            self.document_bytes -= bytes.len();
            self.document_bytes += announcement.len();
            *bytes = announcement;
        } else {
            self.push(Control::Document { field: field::ANNOUNCE, bytes: announcement });
        }
    }

    /// Takes the next one that is not counted.
    pub(crate) fn pop_urgent(&mut self) -> Option<Control> {
        let control = self.urgent.pop_front();
        if self.urgent.is_empty() && self.urgent.capacity() > 64 {
            self.urgent = VecDeque::new();
        }
        control
    }

    /// Takes the next one that is counted.
    pub(crate) fn pop_counted(&mut self) -> Option<Control> {
        let control = self.queue.pop_front();
        self.document_bytes -= control.as_ref().map_or(0, Control::document_bytes);
        if self.queue.is_empty() && self.queue.capacity() > 64 {
            self.queue = VecDeque::new();
        }
        control
    }

    /// Returns whether a message was lost for want of room: the lane is then of no further use.
    pub(crate) const fn has_overflowed(&self) -> bool {
        self.overflowed
    }

    pub(crate) const fn max(&self) -> usize {
        self.max
    }

    pub(crate) fn len(&self) -> usize {
        self.queue.len() + self.urgent.len()
    }

    pub(crate) fn has_urgent(&self) -> bool {
        !self.urgent.is_empty()
    }

    pub(crate) fn has_counted(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Drops what is not counted: the carrier that it was for is lost.
    pub(crate) fn clear_urgent(&mut self) {
        self.urgent = VecDeque::new();
    }

    pub(crate) fn clear(&mut self) {
        self.urgent = VecDeque::new();
        self.queue = VecDeque::new();
        self.document_bytes = 0;
    }
}

/// Writes a control message with a small body.
pub(crate) fn write_control(
    out: &mut Vec<u8>,
    request_id: Option<RequestId>,
    number: u32,
    message: &impl Message,
) {
    let payload_len = message.encoded_len();
    write_head(out, &Head { request_id, field: number, payload_len, ..Head::default() });
    message.encode_raw(out);
}

/// Writes a reset.
pub(crate) fn write_reset(out: &mut Vec<u8>, id: RequestId, reset: Reset) {
    let message = proto::Reset {
        code: reset.code,
        protocol_code: reset.protocol_code.map_or(0, |code| code.saturating_add(1)),
        detail: String::new(),
    };
    write_control(out, Some(id), field::RESET, &message);
}
