//! What is there of a body, without waiting for more: frames that wait together are taken together,
//! and the end with them.

use std::task::{Context, Poll};

use sidelane_plugin::{Buf, BufBuilder};

/// Frames up to this long are joined by copying: senders put each small message into a frame of its
/// own, and one message through the tunnel costs more than copying a few hundred bytes.
const JOINED_FRAME_BYTES_MAX: usize = 2 * 1024;

/// Most bytes that are joined: half of what a tunnel message may have.
const JOINED_BYTES_MAX: usize = 16 * 1024;

/// A frame of a body.
#[derive(Debug)]
pub(crate) enum Item<T, E> {
    /// Bytes. `end`: nothing follows.
    Data { bytes: Buf, end: bool },
    /// The end.
    End(Tail<T, E>),
}

/// How a body ends.
#[derive(Debug)]
pub(crate) enum Tail<T, E> {
    Plain,
    Trailers(T),
    Failed(E),
}

/// Where frames come from.
pub(crate) trait Source {
    type Trailers;
    type Error;

    fn poll_item(&mut self, cx: &mut Context<'_>) -> Poll<Item<Self::Trailers, Self::Error>>;
}

/// What was there: bytes, and the end where it was there too.
#[derive(Debug)]
pub(crate) struct Taken<T, E> {
    pub(crate) bytes: Buf,
    pub(crate) tail: Option<Tail<T, E>>,
}

/// Takes a body's frames.
#[derive(Debug)]
pub(crate) struct Inflow<S: Source> {
    source: S,
    /// Read and not taken yet.
    ahead: Option<Item<S::Trailers, S::Error>>,
}

impl<S: Source> Inflow<S> {
    pub(crate) const fn new(source: S) -> Self {
        Self { source, ahead: None }
    }

    pub(crate) const fn source(&mut self) -> &mut S {
        &mut self.source
    }

    /// Ready with what is there, once something is.
    pub(crate) fn poll_take(&mut self, cx: &mut Context<'_>) -> Poll<Taken<S::Trailers, S::Error>> {
        let item = match self.ahead.take() {
            Some(item) => item,
            None => std::task::ready!(self.source.poll_item(cx)),
        };
        let first = match item {
            Item::Data { bytes, end: true } => {
                return Poll::Ready(Taken { bytes, tail: Some(Tail::Plain) });
            }
            Item::End(tail) => {
                return Poll::Ready(Taken { bytes: Buf::new(), tail: Some(tail) });
            }
            Item::Data { bytes, end: false } => bytes,
        };
        let joins = first.len() <= JOINED_FRAME_BYTES_MAX;
        let mut joined = None::<BufBuilder>;
        let tail = loop {
            match self.source.poll_item(cx) {
                Poll::Pending => break None,
                Poll::Ready(Item::End(tail @ (Tail::Plain | Tail::Trailers(_)))) => {
                    break Some(tail);
                }
                Poll::Ready(Item::Data { bytes, end })
                    if joins
                        && bytes.len() <= JOINED_FRAME_BYTES_MAX
                        && joined.as_ref().map_or(first.len(), BufBuilder::len) + bytes.len()
                            <= JOINED_BYTES_MAX =>
                {
                    let joined = joined.get_or_insert_with(|| {
                        let mut joined = BufBuilder::with_capacity(2 * JOINED_FRAME_BYTES_MAX);
                        joined.extend_from_slice(&first);
                        joined
                    });
                    joined.extend_from_slice(&bytes);
                    if end {
                        break Some(Tail::Plain);
                    }
                }
                Poll::Ready(item) => {
                    self.ahead = Some(item);
                    break None;
                }
            }
        };
        let bytes = joined.map_or(first, BufBuilder::freeze);
        Poll::Ready(Taken { bytes, tail })
    }
}
