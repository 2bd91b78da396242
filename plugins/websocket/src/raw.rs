//! A connection whose bytes nobody reads: after the handshake the host carries them on a connection of their
//! own, and where there is none they go on as frames.

use bytes::Bytes;
use sidelane_plugin::{ByteStream, Dedicated, Error, RecvHalf, SendHalf, failure};

use crate::WebSocket;
use crate::carry::{Carrier, Side};
use crate::connections::Permit;
use crate::metrics::Open;
use crate::options::Options;

/// What a handshake that was accepted leaves, beside the stream.
pub(crate) struct Accepted<'a> {
    pub(crate) plugin: &'a WebSocket,
    pub(crate) side: Side,
    /// What came behind the handshake.
    pub(crate) ahead: Bytes,
    pub(crate) send: SendHalf,
    pub(crate) recv: RecvHalf,
    /// The two ends agreed on extensions.
    pub(crate) extended: bool,
    pub(crate) options: Options,
    /// At the relay's end: the series that are counted.
    pub(crate) open: Option<Open>,
    pub(crate) permit: Permit,
}

/// A connection after its handshake.
pub(crate) enum Connection<'a> {
    Framed(Box<Carrier<'a>>),
    Raw(Box<Accepted<'a>>, ByteStream),
}

impl<'a> Accepted<'a> {
    /// Returns the connection as its route's options want it.
    pub(crate) fn over(self, stream: ByteStream) -> Connection<'a> {
        if self.options.is_raw {
            Connection::Raw(Box::new(self), stream)
        } else {
            Connection::Framed(self.framed(stream))
        }
    }

    fn framed(self, stream: ByteStream) -> Box<Carrier<'a>> {
        let Self { plugin, side, ahead, send, recv, extended, options, open, permit } = self;
        let mut carrier = Carrier::new(plugin, side, stream, send, recv, extended, options, permit);
        carrier.read_ahead(&ahead);
        if let Some(open) = open {
            carrier.count(open);
        }
        carrier
    }
}

impl Connection<'_> {
    /// Carries it until it ends.
    pub(crate) async fn run(self) -> Result<(), Error> {
        let (mut accepted, stream) = match self {
            Self::Framed(carrier) => return carrier.run().await,
            Self::Raw(accepted, stream) => (accepted, stream),
        };
        let ahead = accepted.ahead.clone().into();
        let Accepted { send, recv, .. } = &mut *accepted;
        match send.dedicate(recv, stream, ahead).await {
            Dedicated::Framed(stream) => accepted.framed(stream).run().await,
            Dedicated::Ended { reset, .. } if reset.code == failure::NONE => Ok(()),
            Dedicated::Ended { reset, .. } => Err(reset.into()),
        }
    }
}
