//! What goes to the peer, in the order that the outbox says.

use sidelane_abi::failure;

use super::{Lane, SEND_QUEUE_BYTES_MAX};
use std::time::Instant;

use crate::control::{Control, write_control, write_reset};
use crate::envelope::{FLAG_END, FLAG_OPEN, Head, field, write_head};
use crate::exchange::SendEnd;
use crate::payload::{Payload, Reset};
use crate::proto;
use crate::replay::Tee;
use crate::transmit::Transmit;

impl Lane {
    /// Moves messages to `out`, whole ones only, until it holds `bytes_max` or nothing is left that may
    /// be sent: with a full ring nothing that is counted may. Returns whether something was added.
    pub fn poll_transmit(&mut self, now: Instant, out: &mut Transmit, bytes_max: usize) -> bool {
        if !self.attached {
            return false;
        }
        self.now = self.now.max(now);
        let before = out.len();
        while out.len() < bytes_max {
            if let Some(control) = self.control.pop_urgent() {
                self.write_uncounted(out, control);
            } else if self.replay.is_behind() {
                self.replayed_bytes += self.replay.send_again(out);
                self.replayed += 1;
                self.messages_out += 1;
            } else if !self.may_send_counted() {
                break;
            } else if let Some(control) = self.control.pop_counted() {
                self.emit_counted(out, |out| write_counted(out, control));
            } else if let Some((index, payload)) = self.outbox.next() {
                self.write_payload(out, index, payload);
            } else {
                break;
            }
        }
        self.wake_waiting();
        let added = out.len() - before;
        self.bytes_out += added as u64;
        self.watch_outstanding();
        added > 0
    }

    /// Appends one counted message to what goes out. Every message that both ends count passes
    /// here, once, in the order of its number, which is `sent` before the call: what is kept for
    /// replay is kept here.
    fn emit_counted(&mut self, out: &mut Transmit, write: impl FnOnce(&mut Tee<'_>)) {
        self.sent += 1;
        self.messages_out += 1;
        write(&mut Tee { out, replay: &mut self.replay });
        self.replay.end_message();
    }

    /// Appends one message that is not counted: after a loss it is sent anew or not at all.
    fn emit_uncounted(&mut self, out: &mut Transmit, write: impl FnOnce(&mut Vec<u8>)) {
        self.messages_out += 1;
        out.join_with(write);
    }

    fn write_uncounted(&mut self, out: &mut Transmit, control: Control) {
        match control {
            Control::Ack => {
                self.acknowledge.said();
                let received = self.received;
                self.emit_uncounted(out, |out| {
                    write_control(out, None, field::ACK, &proto::Ack { received });
                });
            }
            Control::Ping { token } => self.emit_uncounted(out, |out| {
                write_control(out, None, field::PING, &proto::Ping { token });
            }),
            Control::Pong { token } => self.emit_uncounted(out, |out| {
                write_control(out, None, field::PONG, &proto::Pong { token });
            }),
            Control::Window(key) => {
                let Some(exchange) = self.exchanges.find_mut(key) else { return };
                exchange.recv.window_queued = false;
                if exchange.closed.is_some() || exchange.recv.ended {
                    return;
                }
                let limit = exchange.recv.credit.raise();
                let id = exchange.id;
                self.emit_uncounted(out, |out| {
                    write_control(out, Some(id), field::WINDOW, &proto::Window { limit });
                });
            }
            _ => unreachable!("only what is not counted is urgent"),
        }
    }

    fn write_payload(&mut self, out: &mut Transmit, index: u32, payload: Payload) {
        let exchange = self.exchanges.at(index);
        let opening = exchange.open.take();
        let mut flags = 0;
        if opening.is_some() {
            flags |= FLAG_OPEN;
        }
        if payload.end {
            flags |= FLAG_END;
            exchange.send.end = SendEnd::Written;
        }
        let id = exchange.id;
        let complete = payload.end && exchange.recv.ended;
        let left = self.outbox.queued_by(index);
        let reset_after = if left == 0 { exchange.reset_after_queue } else { None };
        if left <= SEND_QUEUE_BYTES_MAX / 2 {
            self.wakes.push_from(&mut exchange.send.waker);
        }
        self.emit_counted(out, |out| {
            out.join_with(|out| {
                let head = Head {
                    request_id: Some(id),
                    protocol_type: opening.as_ref().map_or(0, |opening| opening.protocol_type),
                    flags,
                    open: opening.as_ref().map(|opening| &*opening.record),
                    field: payload.field,
                    payload_len: payload.len(),
                };
                write_head(out, &head);
            });
            out.push(payload.head);
            out.push(payload.body);
        });
        if complete {
            self.end(index, Reset::new(failure::NONE));
        } else if let Some(reset) = reset_after {
            self.end_with(index, reset, Control::Reset { id, reset });
        }
    }

    /// Wakes the senders that waited for room in the lane, once there is some.
    pub(super) fn wake_waiting(&mut self) {
        if self.outbox.queued() as u64 >= self.config.queued_bytes_max {
            return;
        }
        while let Some(key) = self.waiting.pop_front() {
            let Some(exchange) = self.exchanges.find_mut(key) else { continue };
            exchange.send.waits_for_lane = false;
            self.wakes.push_from(&mut exchange.send.waker);
        }
    }
}

fn write_counted(out: &mut Tee<'_>, control: Control) {
    match control {
        Control::Reset { id, reset } => out.join_with(|out| write_reset(out, id, reset)),
        Control::Refused { id, code } => out.join_with(|out| {
            let refused = proto::Refused { code, detail: String::new() };
            write_control(out, Some(id), field::REFUSED, &refused);
        }),
        Control::Dispatched { id } => out.join_with(|out| {
            write_control(out, Some(id), field::DISPATCHED, &proto::Dispatched {});
        }),
        Control::Document { field, bytes } => {
            out.join_with(|out| {
                let head = Head { field, payload_len: bytes.len(), ..Head::default() };
                write_head(out, &head);
            });
            out.push(bytes);
        }
        Control::Ping { .. } | Control::Pong { .. } | Control::Ack | Control::Window(_) => {
            unreachable!("not counted");
        }
    }
}
