//! What the peer says: one place per message.

use std::time::Instant;

use bytes::{Bytes, BytesMut};
use prost::Message;
use prost::encoding::{DecodeContext, decode_key, skip_field};
use sidelane_abi::{OPEN_BYTES_MAX, failure};

use super::{ENTRIES_MAX, EVENTS_SPARE, Event, Lane, LaneError, Pressure};
use crate::control::Control;
use crate::credit::{WINDOW_MIN, charge};
use crate::envelope::{self, Envelope, FLAG_DATAGRAM, FLAG_END, FLAG_OPEN, field};
use crate::exchange::{Exchange, SendEnd};
use crate::id::RequestId;
use crate::outbox;
use crate::payload::{Payload, Reset};
use crate::proto;
use crate::replay::MESSAGE_COST;

impl Lane {
    /// Takes all whole messages from `buffer`. To be called whenever bytes have come: it notes that
    /// the peer lives. Without a carrier it takes nothing, and empties the buffer: what a lost
    /// connection still brings comes again.
    ///
    /// # Errors
    ///
    /// The lane cannot go on; the caller closes it.
    pub fn handle_input(&mut self, now: Instant, buffer: &mut BytesMut) -> Result<(), LaneError> {
        if !self.attached {
            buffer.clear();
            return Ok(());
        }
        self.now = self.now.max(now);
        self.liveness.handle_input(now);
        if self.suspicion.heard(self.now, self.liveness.rtt()) {
            self.push_event(Event::Suspect(false))?;
        }
        while self.closed.is_none() {
            let before = buffer.len();
            let message_bytes_max = self.config.message_bytes_max as usize;
            let Some(envelope) = envelope::read(buffer, message_bytes_max)? else { break };
            let bytes = (before - buffer.len()) as u64;
            let received = self.received;
            self.bytes_in += bytes;
            self.messages_in += 1;
            self.handle(envelope)?;
            let cost = bytes + MESSAGE_COST;
            if self.received != received {
                if self.replay.is_on() {
                    self.liveness.talk(self.now);
                }
                if self.acknowledge.received(self.now, cost) {
                    self.push_control(Control::Ack);
                }
            }
            self.check_control()?;
        }
        Ok(())
    }

    fn handle(&mut self, envelope: Envelope) -> Result<(), LaneError> {
        let number = envelope.field;
        match (envelope.request_id, number) {
            (None, field::HELLO..=field::AUTHENTICATED) => {
                self.handle_lane(number, &envelope.payload)
            }
            (Some(id), 0..=field::CUSTOM) => {
                // Reserved, and never negotiated: may be dropped, and is not counted.
                if envelope.flags & FLAG_DATAGRAM != 0 {
                    self.late += 1;
                    return Ok(());
                }
                self.received += 1;
                if envelope.flags & FLAG_OPEN == 0 {
                    self.handle_payload(id, envelope);
                    return Ok(());
                }
                self.handle_open(id, envelope)
            }
            (Some(id), field::WINDOW..=field::REFUSED) => {
                self.handle_exchange(id, number, &envelope.payload)
            }
            // Fields this version does not know leave nothing behind.
            (None, 0) => Ok(()),
            (_, field) => Err(LaneError::Unexpected { field }),
        }
    }

    fn handle_lane(&mut self, number: u32, payload: &Bytes) -> Result<(), LaneError> {
        match number {
            field::PING => {
                let proto::Ping { token } = decode(number, payload)?;
                self.push_control(Control::Pong { token });
            }
            field::PONG => {
                let proto::Pong { token } = decode(number, payload)?;
                if let Some(rtt) = self.liveness.handle_pong(self.now, token) {
                    self.watch_outstanding();
                    self.push_event(Event::Rtt(rtt))?;
                }
            }
            field::ACK => {
                let proto::Ack { received } = decode(number, payload)?;
                self.handle_ack(received)?;
            }
            field::GO_AWAY => {
                self.received += 1;
                self.peer_draining = true;
                self.push_event(Event::GoAway(decode(number, payload)?))?;
            }
            field::ANNOUNCE => {
                self.received += 1;
                check_entries(number, payload)?;
                self.push_event(Event::Announce(decode(number, payload)?))?;
            }
            field::ANNOUNCED => {
                self.received += 1;
                check_entries(number, payload)?;
                self.push_event(Event::Announced(decode(number, payload)?))?;
            }
            field::AUTHENTICATE => {
                self.received += 1;
                self.push_event(Event::Authenticate(decode(number, payload)?))?;
            }
            field::AUTHENTICATED => {
                self.received += 1;
                self.push_event(Event::Authenticated(decode(number, payload)?))?;
            }
            field => return Err(LaneError::Unexpected { field }),
        }
        Ok(())
    }

    fn handle_ack(&mut self, received: u64) -> Result<(), LaneError> {
        if received > self.sent || received < self.acknowledged {
            return Err(LaneError::Ack { received, sent: self.sent, before: self.acknowledged });
        }
        self.forget_acknowledged(received);
        if self.replay.is_on() {
            let may_grow = self.pressure == Pressure::None;
            self.replay.tune(self.now, self.liveness.rtt(), may_grow);
            self.wake_driver();
        }
        Ok(())
    }

    fn handle_exchange(
        &mut self,
        id: RequestId,
        number: u32,
        payload: &Bytes,
    ) -> Result<(), LaneError> {
        if number != field::WINDOW {
            self.received += 1;
        }
        match number {
            field::WINDOW => {
                let proto::Window { limit } = decode(number, payload)?;
                self.handle_window(id, limit);
            }
            field::RESET => {
                let reset: proto::Reset = decode(number, payload)?;
                let protocol_code = reset.protocol_code.checked_sub(1);
                self.handle_end(id, Reset { code: reset.code, protocol_code }, false);
            }
            field::REFUSED => {
                let refused: proto::Refused = decode(number, payload)?;
                self.expect_opener(id, number)?;
                self.handle_end(id, Reset::new(refused.code), true);
            }
            _ => {
                let proto::Dispatched {} = decode(number, payload)?;
                self.expect_opener(id, number)?;
                match self.ids.get(&id) {
                    Some(&index) => self.exchanges.at(index).dispatched = true,
                    None => self.late += 1,
                }
            }
        }
        Ok(())
    }

    /// Only the end that did not open an exchange says where it went.
    fn expect_opener(&self, id: RequestId, field: u32) -> Result<(), LaneError> {
        if id.made_by() == self.config.side {
            return Ok(());
        }
        Err(LaneError::Unexpected { field })
    }

    fn handle_window(&mut self, id: RequestId, limit: u64) {
        let Some(&index) = self.ids.get(&id) else {
            self.late += 1;
            return;
        };
        let exchange = self.exchanges.at(index);
        if exchange.send.credit.grant(limit) {
            self.wakes.push_from(&mut exchange.send.waker);
        }
    }

    /// The peer ended the exchange early. What it sent before can still be taken.
    fn handle_end(&mut self, id: RequestId, reset: Reset, refused: bool) {
        let Some(&index) = self.ids.get(&id) else {
            self.late += 1;
            return;
        };
        self.exchanges.at(index).refused = refused;
        self.end(index, reset);
    }

    fn handle_open(&mut self, id: RequestId, envelope: Envelope) -> Result<(), LaneError> {
        if id.made_by() == self.config.side || id.0 == 0 {
            return Err(LaneError::WrongParity(id));
        }
        if self.ids.contains_key(&id) {
            return Err(LaneError::IdInUse(id));
        }
        let open: proto::Open = match &envelope.open {
            Some(open) => decode(field::OPEN, open)?,
            None => proto::Open::default(),
        };
        let refusal = if self.draining {
            Some(failure::DRAINING)
        } else if self.is_overloaded() {
            Some(failure::OVERLOADED)
        } else if envelope.payload.len() > OPEN_BYTES_MAX {
            Some(failure::TOO_LARGE)
        } else {
            None
        };
        if let Some(code) = refusal {
            self.opens_refused += 1;
            self.push_control(Control::Refused { id, code });
            return Ok(());
        }
        let send_window = match open.window {
            0 => self.config.send_window,
            window => window.max(WINDOW_MIN),
        };
        let exchange = Exchange::new(id, false, send_window, self.config.receive_window);
        let key = self.exchanges.insert(exchange);
        self.ids.insert(id, key.index);
        let protocol_type = match open.protocol_number {
            0 => envelope.protocol_type,
            number => number,
        };
        self.push_event(Event::Opened { key, id, protocol_type, open })?;
        self.handle_payload(id, envelope);
        Ok(())
    }

    /// A message of an exchange, the first one too.
    fn handle_payload(&mut self, id: RequestId, envelope: Envelope) {
        let Some(&index) = self.ids.get(&id) else {
            self.late += 1;
            return;
        };
        let (exchange, spare) = self.exchanges.at_with_spare(index);
        let end = envelope.flags & FLAG_END != 0;
        if let Err(code) = admit(exchange, &envelope, end) {
            self.violations += 1;
            let reset = Reset::new(code);
            self.push_control(Control::Reset { id, reset });
            self.end(index, reset);
            return;
        }
        let has_payload = envelope.field != 0;
        if has_payload && exchange.recv.handle {
            let payload =
                Payload { field: envelope.field, end, head: Bytes::new(), body: envelope.payload };
            self.receive_queued += outbox::cost(&payload) as u64;
            spare.push(&mut exchange.recv.queue, payload);
        }
        if has_payload || end {
            self.wakes.push_from(&mut exchange.recv.waker);
        }
        if end && exchange.send.end == SendEnd::Written {
            self.end(index, Reset::new(failure::NONE));
        }
    }

    pub(super) fn push_event(&mut self, event: Event) -> Result<(), LaneError> {
        let max = self.config.exchanges_max.saturating_add(EVENTS_SPARE);
        if self.events.len() >= max {
            return Err(LaneError::EventFlood { max });
        }
        self.events.push_back(event);
        Ok(())
    }
}

/// Charges a message to its exchange, or says by which code the exchange is to be reset.
fn admit(exchange: &mut Exchange, envelope: &Envelope, end: bool) -> Result<(), u32> {
    let recv = &mut exchange.recv;
    if recv.ended {
        return Err(failure::FLOW_CONTROL);
    }
    if envelope.field != 0 {
        let first = !std::mem::replace(&mut recv.begun, true);
        if envelope.payload.len() > OPEN_BYTES_MAX {
            return Err(failure::FLOW_CONTROL);
        }
        if !first && recv.credit.charge(charge(envelope.payload.len())).is_err() {
            return Err(failure::FLOW_CONTROL);
        }
    }
    recv.ended = end;
    Ok(())
}

/// Counts a document's entries before they are decoded: an empty one has two bytes on the wire, and a
/// hundred times as many in memory.
fn check_entries(field: u32, mut payload: &[u8]) -> Result<(), LaneError> {
    let mut entries = 0;
    while !payload.is_empty() {
        let skipped = decode_key(&mut payload).and_then(|(number, wire)| {
            skip_field(wire, number, &mut payload, DecodeContext::default())
        });
        skipped.map_err(|source| LaneError::Payload { field, source })?;
        entries += 1;
        if entries > ENTRIES_MAX {
            return Err(LaneError::TooManyEntries { field, max: ENTRIES_MAX });
        }
    }
    Ok(())
}

fn decode<M: Message + Default>(field: u32, payload: &Bytes) -> Result<M, LaneError> {
    M::decode(payload.clone()).map_err(|source| LaneError::Payload { field, source })
}
