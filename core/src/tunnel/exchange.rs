//! The halves of an exchange on a lane, as plugins get them.

use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use sidelane_tunnel::{Fate, Key};

use super::{Link, dedicated};
use crate::metrics::Flow;
use crate::plugin::lend::{self, Closed, DedicateFuture, Message, Received, Reset, Stream};

/// The direction from here to the peer.
pub struct SendHalf {
    link: Arc<Link>,
    key: Key,
    flow: Arc<Flow>,
}

impl SendHalf {
    pub(super) fn new(link: Arc<Link>, key: Key, flow: Arc<Flow>) -> Self {
        Self { link, key, flow }
    }
}

impl SendHalf {
    /// How the exchange stands; `None`: its lane knows it no more.
    pub fn fate(&self) -> Option<Fate> {
        self.link.with(|lane| lane.fate(self.key))
    }
}

impl lend::SendHalf for SendHalf {
    fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        message: &mut Option<Message>,
    ) -> Poll<Result<(), Closed>> {
        let bytes = message.as_ref().map_or(0, Message::len);
        let sent = self.link.with(|lane| lane.poll_send(self.key, cx, message));
        if let Poll::Ready(Ok(())) = sent {
            self.flow.sent(bytes);
        }
        sent.map_err(|_| Closed)
    }

    fn finish(&mut self) {
        self.link.with(|lane| lane.finish(self.key));
    }

    fn reset(&mut self, reset: Reset) {
        self.link.with(|lane| lane.reset(self.key, reset));
    }

    fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<Reset> {
        self.link.with(|lane| lane.poll_closed(self.key, cx))
    }

    fn dispatched(&mut self) {
        self.link.with(|lane| lane.dispatched(self.key));
    }

    fn refused(&mut self, reset: Reset) {
        self.link.with(|lane| lane.refused(self.key, reset));
    }

    fn dedicate(&mut self, stream: Box<dyn Stream>, ahead: Bytes) -> DedicateFuture {
        let (link, flow) = (Arc::clone(&self.link), Arc::clone(&self.flow));
        Box::pin(dedicated::dedicate(link, self.key, flow, stream, ahead))
    }
}

impl Drop for SendHalf {
    fn drop(&mut self) {
        self.link.with(|lane| lane.drop_send(self.key));
        self.link.exchange_ended();
    }
}

/// The direction from the peer to here.
pub struct RecvHalf {
    link: Arc<Link>,
    key: Key,
    flow: Arc<Flow>,
}

impl RecvHalf {
    pub(super) fn new(link: Arc<Link>, key: Key, flow: Arc<Flow>) -> Self {
        Self { link, key, flow }
    }
}

impl RecvHalf {
    /// As [`SendHalf::fate`].
    pub fn fate(&self) -> Option<Fate> {
        self.link.with(|lane| lane.fate(self.key))
    }
}

impl lend::RecvHalf for RecvHalf {
    fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Received> {
        let received = self.link.with(|lane| lane.poll_recv(self.key, cx));
        if let Poll::Ready(Received::Message(message)) = &received {
            self.flow.received(message.len());
        }
        received
    }
}

impl Drop for RecvHalf {
    fn drop(&mut self) {
        self.link.with(|lane| lane.drop_recv(self.key));
    }
}
