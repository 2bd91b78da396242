//! The sidecar's end: messages become a request to the service, its response becomes messages.
//!
//! The connection to the service is driven inside the exchange's own task: one wake-up per event, no
//! task switch between the socket and the tunnel.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH, EXPECT, HOST, HeaderMap, HeaderName, HeaderValue, TE, TRAILER, TRANSFER_ENCODING};
use http::uri::PathAndQuery;
use http::{Method, Request, Response, StatusCode, Uri, Version};
use http_body::Body;
use hyper::body::Incoming;
use hyper::client::conn::TrySendError;
use sidelane_plugin::{
    Buf, Error, Exchange, Host, Message, Meta, RecvHalf, Reset, SendHalf, Service, Timer, failure,
};

use crate::accept::data_message;
use crate::config::Config;
use crate::fields::{self, Kind, Nominated};
use crate::forwarded;
use crate::payload::{
    self, BODY_BYTES_MAX, FIELD_REQUEST, FIELD_RESPONSE, FIELD_TRAILERS, FieldsSize, RequestPayload,
};
use crate::pool::{Connecting, Connection, Pool, PoolError};
use crate::upload::{SharedSource, Upload};

/// How long what is left of a request is taken and thrown away after the service has answered and
/// closed. A client that only reads once it has sent everything gets its answer; one that never ends
/// is cut off (nginx's `lingering_time`).
const LINGER: Duration = Duration::from_secs(30);

/// Fields added to those that came: host, connection, length, five that tell of the client.
const FIELDS_ADDED: usize = 10;

/// A failure that the relay is told by its code.
#[derive(Debug)]
struct Failed {
    code: u32,
    message: String,
}

impl Failed {
    fn new(code: u32, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// How an exchange ends when it does not end well.
#[derive(Debug)]
enum Stop {
    /// The peer reset it or is gone: there is nobody to tell.
    Gone(Reset),
    /// It failed here.
    Failed(Failed),
}

impl From<Failed> for Stop {
    fn from(failed: Failed) -> Self {
        Self::Failed(failed)
    }
}

/// Delivers one request to the service, and the response back.
pub(crate) async fn deliver(
    config: &Config,
    pool: &Arc<Pool>,
    exchange: Exchange<'_>,
    service: &Service,
) -> Result<(), Error> {
    let (mut send, mut recv, meta) = exchange.split();
    let first = match recv.recv().await {
        Some(Ok(message)) if message.field == FIELD_REQUEST => message,
        Some(Ok(_)) | None => {
            send.refused(Reset::new(failure::BAD_REQUEST));
            return Err(Error::new(failure::BAD_REQUEST, "the exchange does not begin with a request"));
        }
        Some(Err(reset)) => return Err(reset.into()),
    };
    let mut delivery = match Delivery::new(config, &meta, first, recv) {
        Ok(delivery) => delivery,
        Err(failed) => {
            send.refused(Reset::new(failed.code));
            return Err(Error::new(failed.code, failed.message));
        }
    };
    match delivery.run(pool, &mut send, service).await {
        Ok(()) => Ok(()),
        Err(Stop::Gone(reset)) => Err(reset.into()),
        Err(Stop::Failed(failed)) => {
            let reset = Reset::new(failed.code);
            if delivery.dispatched { send.reset(reset) } else { send.refused(reset) }
            Err(Error::new(failed.code, failed.message))
        }
    }
}

/// A request being delivered.
struct Delivery<'a> {
    config: &'a Config,
    meta: &'a Meta<'a>,
    /// The exchange's first payload, from which the request can be made again.
    payload: Bytes,
    body: Buf,
    end: bool,
    /// The rest of the body; `None`: there is none.
    source: Option<SharedSource>,
    /// Kept where nothing is left to receive: its end must not look like ours.
    _recv: Option<RecvHalf>,
    method: Method,
    expects_continue: bool,
    dispatched: bool,
}

type Pending = dyn Future<Output = Result<Response<Incoming>, TrySendError<Request<Upload>>>> + Send;
