//! A response on its way back: its head, body and trailers, each as soon as it is there.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};

use http::Version;
use http::header::{CONNECTION, HeaderMap};
use http_body::Body as _;
use hyper::body::Incoming;
use sidelane_http_born::body::{self, BODY_BYTES_MAX, FIELD_TRAILERS, data_message};
use sidelane_http_born::fields::{self, Kind, Nominated};
use sidelane_http_born::forwarded;
use sidelane_http_born::wire::FieldsSize;
use sidelane_plugin::{Buf, Message, OPEN_BYTES_MAX, SendHalf, failure};

use super::{Failed, Stop, late};
use crate::payload::{self, FIELD_RESPONSE};
use crate::pool::{Connection, Deadline};

/// Where a response's body comes from.
pub(super) trait Inflow {
    /// Returns what is there next, having moved what goes on beside it.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Item>;
    /// Moves what goes on beside it: the request's body.
    fn drive(&mut self, cx: &mut Context<'_>);
}

/// A body on a connection that carries nothing else.
pub(super) struct Owned {
    pub(super) connection: Box<Connection>,
    pub(super) body: Incoming,
}

impl Inflow for Owned {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Item> {
        let mut driven = false;
        loop {
            if self.body.is_end_stream() {
                return Poll::Ready(Item::End);
            }
            match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Ready(None) => return Poll::Ready(Item::End),
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) if data.is_empty() => {}
                    Ok(data) => return Poll::Ready(Item::Data(data.into())),
                    Err(frame) => {
                        if let Ok(trailers) = frame.into_trailers() {
                            return Poll::Ready(Item::Trailers(trailers));
                        }
                    }
                },
                Poll::Ready(Some(Err(error))) => {
                    let text = format!("the service broke off its response: {error}");
                    return Poll::Ready(Item::Failed(Failed::new(failure::SERVICE_RESET, text)));
                }
                Poll::Pending if driven => return Poll::Pending,
                Poll::Pending => {
                    driven = true;
                    let _ = self.connection.poll_drive(cx);
                }
            }
        }
    }

    fn drive(&mut self, cx: &mut Context<'_>) {
        let _ = self.connection.poll_drive(cx);
    }
}

/// A response on its way back.
pub(super) struct Download<I> {
    pub(super) inflow: I,
    /// An answer without a body, whatever its fields say.
    pub(super) bodiless: bool,
    /// Exact length of the body, where known.
    pub(super) length: Option<u64>,
    /// What was read ahead, to know whether a chunk is the last.
    pub(super) peeked: Option<Item>,
}

/// What comes next of a response's body.
pub(super) enum Item {
    Data(Buf),
    Trailers(HeaderMap),
    End,
    Failed(Failed),
}

impl<I: Inflow> Download<I> {
    /// Sends head, body and trailers, each as soon as it is there.
    pub(super) async fn pass(
        &mut self,
        send: &mut SendHalf,
        head: &http::response::Parts,
        deadline: &mut Deadline,
    ) -> Result<(), Stop> {
        let mut chunk = Buf::new();
        let mut out = None;
        let mut begun = false;
        poll_fn(|cx| {
            // Set where a look ahead found nothing: nothing more comes before the next wake-up.
            let mut quiet = false;
            loop {
                let ended = out.as_ref().is_some_and(|message: &Message| message.end);
                match send.poll_send(cx, &mut out) {
                    Poll::Ready(Ok(())) if ended => return Poll::Ready(Ok(())),
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(_)) => {
                        return send.poll_closed(cx).map(|reset| Err(Stop::Gone(reset)));
                    }
                    Poll::Pending => {
                        // The request's body goes on meanwhile.
                        self.inflow.drive(cx);
                        return deadline.poll(cx).map(|()| Err(late()));
                    }
                }
                if chunk.is_empty() {
                    let item = match self.peeked.take() {
                        Some(item) => Poll::Ready(item),
                        None if quiet => Poll::Pending,
                        None => self.inflow.poll_next(cx),
                    };
                    match item {
                        Poll::Ready(Item::Data(data)) => chunk = data,
                        Poll::Ready(Item::Trailers(trailers)) if begun => {
                            let message = trailers_message(&trailers);
                            if message.head.len() > OPEN_BYTES_MAX {
                                let text = "the service's trailers are larger than allowed";
                                return Poll::Ready(Err(Failed::new(
                                    failure::SERVICE_INVALID,
                                    text,
                                )
                                .into()));
                            }
                            out = Some(message);
                            continue;
                        }
                        Poll::Ready(Item::End) if begun => {
                            out = Some(data_message(Buf::new(), true));
                            continue;
                        }
                        Poll::Ready(Item::Failed(failed)) => {
                            return Poll::Ready(Err(failed.into()));
                        }
                        Poll::Ready(item) => self.peeked = Some(item),
                        Poll::Pending if begun => {
                            if let Poll::Ready(reset) = send.poll_closed(cx) {
                                return Poll::Ready(Err(Stop::Gone(reset)));
                            }
                            return deadline.poll(cx).map(|()| Err(late()));
                        }
                        Poll::Pending => quiet = true,
                    }
                }
                let part = if chunk.len() > BODY_BYTES_MAX {
                    chunk.split_to(BODY_BYTES_MAX)
                } else {
                    std::mem::take(&mut chunk)
                };
                if chunk.is_empty() && self.peeked.is_none() && !quiet {
                    match self.inflow.poll_next(cx) {
                        Poll::Ready(item) => self.peeked = Some(item),
                        Poll::Pending => quiet = true,
                    }
                }
                let end = chunk.is_empty()
                    && self.peeked.take_if(|item| matches!(item, Item::End)).is_some();
                let message = if begun {
                    data_message(part, end)
                } else {
                    self.head_message(head, part, end)
                };
                begun = true;
                if message.head.len() + message.body.len() > OPEN_BYTES_MAX {
                    let text = "the response's head is larger than allowed";
                    return Poll::Ready(Err(Failed::new(failure::SERVICE_INVALID, text).into()));
                }
                out = Some(message);
            }
        })
        .await
    }

    fn head_message(&self, head: &http::response::Parts, first: Buf, end: bool) -> Message {
        let fields = || {
            head.headers.iter().map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()))
        };
        let via: (&[u8], &[u8]) = (
            b"via",
            forwarded::via(match head.version {
                Version::HTTP_10 => 10,
                Version::HTTP_2 => 20,
                _ => 11,
            })
            .as_bytes(),
        );
        let nominated = Nominated::scan(
            head.headers
                .get_all(CONNECTION)
                .iter()
                .map(|value| (&b"connection"[..], value.as_bytes())),
        );
        let mut size = FieldsSize::default();
        for (name, value) in fields().chain([via]) {
            size.add(name.len(), value.len());
        }
        let passing = fields()
            .filter(|(name, value)| {
                fields::passes(name, &nominated)
                    || (self.bodiless
                        && fields::kind(name) == Kind::ContentLength
                        && fields::content_length(value).is_some())
            })
            .chain([via]);
        let status = head.status.as_u16();
        let payload = payload::encode_response(status, passing, size, self.length, first.len());
        Message { field: FIELD_RESPONSE, end, head: payload, body: first }
    }
}

fn trailers_message(trailers: &HeaderMap) -> Message {
    let fields = trailers
        .iter()
        .map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()))
        .filter(|(name, _)| fields::kind(name) == Kind::EndToEnd);
    let head = body::encode_trailers(fields);
    Message { field: FIELD_TRAILERS, end: true, head, body: Buf::new() }
}
