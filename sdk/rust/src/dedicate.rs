//! An exchange on a connection of its own: the host joins the bytes, the plugin hears of the end.

use std::future::poll_fn;

use crate::{Buf, ByteStream, Error, Exchange, RecvHalf, Reset, SendHalf, failure};

/// What became of an exchange that was to have a connection of its own.
#[derive(Debug)]
pub enum Dedicated {
    /// It is over, and the peer knows.
    Ended {
        /// Why; with the code `NONE` all was said.
        reset: Reset,
        /// Bytes from the stream to the peer.
        sent: u64,
        /// Bytes from the peer to the stream.
        received: u64,
    },
    /// There is no connection for it, at either end: it goes on in messages.
    Framed(ByteStream),
}

impl SendHalf {
    /// Moves the exchange to a connection of its own: from here on it is the bytes of `stream`, after those of
    /// `ahead` (read of it before), both ways, as they are. Both ends call it at the same place of what they
    /// say, with all messages before it taken. Dropped before its end, it ends the exchange with its halves.
    pub async fn dedicate(
        &mut self,
        recv: &mut RecvHalf,
        stream: ByteStream,
        ahead: Buf,
    ) -> Dedicated {
        let mut running = match self.start_dedicated(stream, ahead) {
            Ok(running) => running,
            Err(stream) => return Dedicated::Framed(stream),
        };
        let outcome = poll_fn(|cx| running.poll(cx)).await;
        drop(running);
        match outcome {
            Some(framed @ Dedicated::Framed(_)) => framed,
            Some(ended) => {
                self.end();
                recv.end();
                ended
            }
            // It panicked there.
            None => {
                let reset = Reset::new(failure::INTERNAL);
                self.reset(reset);
                Dedicated::Ended { reset, sent: 0, received: 0 }
            }
        }
    }
}

impl Exchange<'_> {
    /// As [`Self::join`], on a connection of its own where there is one: to be called at both ends, before the
    /// first message.
    ///
    /// # Errors
    /// As [`Self::join`].
    pub async fn dedicate(mut self, stream: ByteStream) -> Result<(), Error> {
        match self.send.dedicate(&mut self.recv, stream, Buf::new()).await {
            Dedicated::Framed(stream) => self.join(stream).await,
            Dedicated::Ended { reset, .. } if reset.code == failure::NONE => Ok(()),
            Dedicated::Ended { reset, .. } => Err(reset.into()),
        }
    }
}
