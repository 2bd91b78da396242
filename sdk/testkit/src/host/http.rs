//! An HTTP client, played by the test: the request's body and the response.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use bytes::Bytes;
use sidelane_abi as abi;
use sidelane_plugin::{Reset, failure};

use super::buf;
use super::exchange::{reset_from_raw, reset_to_raw};
use super::future;
use super::io::{self, TestStream};
use super::lent::{drop_lent, lend, using};
use super::service::refused;
use super::waker::keep;
use super::world::World;
use crate::ledger::Ledger;

pub(crate) type Fields = Vec<(Bytes, Bytes)>;

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

enum Frame {
    Data { bytes: Bytes, end: bool },
    Trailers(Fields),
    End,
    Failed(Reset),
}

#[derive(Default)]
struct BodyShared {
    frames: VecDeque<Frame>,
    asked: bool,
    dropped: bool,
    taker: Option<Waker>,
    sender: Option<Waker>,
}

type SharedBody = Arc<Mutex<BodyShared>>;

fn lock_body(shared: &SharedBody) -> MutexGuard<'_, BodyShared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The client's end of a request's body.
#[derive(Clone, Default)]
pub struct BodySender {
    shared: SharedBody,
}

impl BodySender {
    fn push(&self, frame: Frame) {
        let mut shared = lock_body(&self.shared);
        shared.frames.push_back(frame);
        wake(&mut shared.taker);
    }

    /// Sends a chunk.
    pub fn send(&self, bytes: impl Into<Bytes>) {
        self.push(Frame::Data { bytes: bytes.into(), end: false });
    }

    /// Sends a chunk and says with it that it is the last.
    pub fn send_last(&self, bytes: impl Into<Bytes>) {
        self.push(Frame::Data { bytes: bytes.into(), end: true });
    }

    /// Ends the body.
    pub fn end(&self) {
        self.push(Frame::End);
    }

    /// Ends the body with trailers.
    pub fn trailers(&self, fields: &[(&str, &str)]) {
        self.push(Frame::Trailers(owned(fields)));
    }

    /// Breaks off.
    pub fn fail(&self, reset: Reset) {
        self.push(Frame::Failed(reset));
    }

    /// Whether the plugin asked for a frame.
    #[must_use]
    pub fn was_asked(&self) -> bool {
        lock_body(&self.shared).asked
    }

    /// Whether the plugin dropped the body.
    #[must_use]
    pub fn was_dropped(&self) -> bool {
        lock_body(&self.shared).dropped
    }

    /// Waits until the plugin has taken all that was sent, or dropped the body.
    pub async fn taken(&self) {
        poll_fn(|cx| {
            let mut shared = lock_body(&self.shared);
            if shared.frames.is_empty() || shared.dropped {
                return Poll::Ready(());
            }
            shared.sender = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    pub(crate) fn to_plugin(&self, world: &Arc<World>, length: Option<u64>) -> abi::Body {
        let own = BodyLent {
            shared: self.shared.clone(),
            ledger: world.ledger.clone(),
            trailers: Vec::new(),
            fields: Vec::new(),
        };
        abi::Body {
            data: lend(&world.ledger, "body", own),
            vt: &BODY,
            length: length.unwrap_or(abi::LENGTH_UNKNOWN),
        }
    }
}

pub(crate) fn owned(fields: &[(&str, &str)]) -> Fields {
    let bytes = |text: &str| Bytes::copy_from_slice(text.as_bytes());
    fields.iter().map(|(name, value)| (bytes(name), bytes(value))).collect()
}

pub(crate) fn lend_fields(fields: &Fields) -> Vec<abi::Header> {
    let field = |(name, value): &(Bytes, Bytes)| abi::Header {
        name: buf::lend_text(name),
        value: buf::lend_text(value),
    };
    fields.iter().map(field).collect()
}

struct BodyLent {
    shared: SharedBody,
    ledger: Arc<Ledger>,
    trailers: Fields,
    fields: Vec<abi::Header>,
}

// SAFETY: the fields point into the trailers beside them.
unsafe impl Send for BodyLent {}

impl Drop for BodyLent {
    fn drop(&mut self) {
        let mut shared = lock_body(&self.shared);
        shared.dropped = true;
        shared.taker = None;
        wake(&mut shared.sender);
    }
}

static BODY: abi::BodyVt =
    abi::BodyVt { size: size_of::<abi::BodyVt>(), poll_frame, drop: drop_lent::<BodyLent> };

unsafe extern "C" fn poll_frame(
    data: *mut c_void,
    waker: *const abi::Waker,
    frame: *mut abi::Frame,
) -> u32 {
    // SAFETY: borrowed for the call.
    let waker = unsafe { keep(waker) };
    // SAFETY: valid for the call.
    let frame = unsafe { &mut *frame };
    let take = |own: &mut BodyLent| {
        let mut shared = lock_body(&own.shared);
        shared.asked = true;
        let Some(next) = shared.frames.pop_front() else {
            shared.taker = Some(waker);
            return abi::poll::PENDING;
        };
        wake(&mut shared.sender);
        drop(shared);
        match next {
            Frame::Data { bytes, end } => {
                frame.data = buf::to_plugin(&own.ledger, bytes);
                frame.end = end.into();
                abi::body::DATA
            }
            Frame::Trailers(trailers) => {
                own.trailers = trailers;
                own.fields = lend_fields(&own.trailers);
                frame.headers = own.fields.as_ptr();
                frame.headers_len = own.fields.len();
                frame.end = 1;
                abi::body::TRAILERS
            }
            Frame::End => abi::body::END,
            Frame::Failed(reset) => {
                frame.reset = reset_to_raw(reset);
                abi::poll::CLOSED
            }
        }
    };
    // SAFETY: of this vtable.
    unsafe { using(data, take) }.unwrap_or(abi::body::END)
}

/// A response's head, as the client got it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResponseHead {
    /// Status.
    pub status: u16,
    /// Fields.
    pub headers: Vec<(Bytes, Bytes)>,
    /// Exact length of the body, where the plugin gave it.
    pub body_length: Option<u64>,
    /// The head came with the end.
    pub end: bool,
}

impl ResponseHead {
    /// The first field of a name, whatever its case.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut fields = self.headers.iter();
        let (_, value) = fields.find(|(own, _)| own.eq_ignore_ascii_case(name.as_bytes()))?;
        std::str::from_utf8(value).ok()
    }
}

/// A response to its end.
#[derive(Clone, Debug)]
pub struct WholeResponse {
    /// Its head.
    pub head: ResponseHead,
    /// Its body.
    pub body: Vec<u8>,
    /// Its trailers.
    pub trailers: Vec<(Bytes, Bytes)>,
}

#[derive(Default)]
struct ResponseShared {
    informational: VecDeque<ResponseHead>,
    head: Option<ResponseHead>,
    chunks: VecDeque<Bytes>,
    trailers: Fields,
    ended: bool,
    aborted: Option<Reset>,
    gone: Option<Reset>,
    /// Chunks that may wait before the plugin's sends do.
    room: usize,
    upgrade: Option<TestStream>,
    upgraded: bool,
    client: Option<Waker>,
    sender: Option<Waker>,
    closer: Option<Waker>,
}

type SharedResponse = Arc<Mutex<ResponseShared>>;

/// Chunks of a response that wait unread before the plugin's sends do.
const CHUNKS_WAITING: usize = 8;

/// The client's end of a response.
#[derive(Clone)]
pub struct Response {
    shared: SharedResponse,
    transport_1_0: bool,
}

fn lock(shared: &SharedResponse) -> MutexGuard<'_, ResponseShared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Response {
    /// `transport_1_0`: the client knows no interim responses.
    pub(crate) fn new(transport_1_0: bool) -> Self {
        let shared = ResponseShared { room: CHUNKS_WAITING, ..ResponseShared::default() };
        Self { shared: Arc::new(Mutex::new(shared)), transport_1_0 }
    }

    async fn wait<T>(&self, mut ready: impl FnMut(&mut ResponseShared) -> Option<T>) -> T {
        poll_fn(|cx| {
            let mut shared = lock(&self.shared);
            match ready(&mut shared) {
                Some(value) => {
                    wake(&mut shared.sender);
                    Poll::Ready(value)
                }
                None => {
                    shared.client = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }

    /// Waits for the next interim response.
    pub async fn informational(&self) -> ResponseHead {
        self.wait(|shared| shared.informational.pop_front()).await
    }

    /// Waits for the head.
    ///
    /// # Errors
    /// The plugin aborted.
    pub async fn head(&self) -> Result<ResponseHead, Reset> {
        self.wait(|shared| shared.head.clone().map(Ok).or_else(|| shared.aborted.map(Err))).await
    }

    /// Waits for a chunk; `None`: the end.
    ///
    /// # Errors
    /// The plugin aborted.
    pub async fn chunk(&self) -> Result<Option<Bytes>, Reset> {
        self.wait(|shared| match shared.chunks.pop_front() {
            Some(chunk) => Some(Ok(Some(chunk))),
            None => shared.aborted.map(Err).or_else(|| shared.ended.then_some(Ok(None))),
        })
        .await
    }

    /// Waits for the whole response.
    ///
    /// # Errors
    /// The plugin aborted.
    pub async fn whole(&self) -> Result<WholeResponse, Reset> {
        let head = self.head().await?;
        let mut body = Vec::new();
        while let Some(chunk) = self.chunk().await? {
            body.extend_from_slice(&chunk);
        }
        let trailers = lock(&self.shared).trailers.clone();
        Ok(WholeResponse { head, body, trailers })
    }

    /// The reset that the plugin aborted with, if it did.
    #[must_use]
    pub fn was_aborted(&self) -> Option<Reset> {
        lock(&self.shared).aborted
    }

    /// Whether the response has a head, or was aborted: whether the client was told anything.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        let shared = lock(&self.shared);
        shared.head.is_some() || shared.aborted.is_some()
    }

    /// The client goes away.
    pub fn disconnect(&self) {
        let mut shared = lock(&self.shared);
        shared.gone = Some(Reset::new(failure::CLIENT_GONE));
        wake(&mut shared.closer);
        wake(&mut shared.sender);
    }

    /// Sets how many unread chunks the plugin may be ahead; 0: its sends wait.
    pub fn set_room(&self, chunks: usize) {
        let mut shared = lock(&self.shared);
        shared.room = chunks;
        wake(&mut shared.sender);
    }

    /// The client's bytes after an upgrade. To be taken before the plugin asks for its end.
    #[must_use]
    pub fn upgraded(&self) -> TestStream {
        let (ours, theirs) = io::pair();
        lock(&self.shared).upgrade = Some(theirs);
        ours
    }

    pub(crate) fn to_plugin(&self, world: &Arc<World>) -> abi::Responder {
        let own = ResponderLent {
            shared: self.shared.clone(),
            world: world.clone(),
            transport_1_0: self.transport_1_0,
        };
        abi::Responder { data: lend(&world.ledger, "responder", own), vt: &RESPONDER }
    }
}

struct ResponderLent {
    shared: SharedResponse,
    world: Arc<World>,
    transport_1_0: bool,
}

impl ResponderLent {
    fn violation(&self, text: &str) {
        self.world.ledger.violation(format!("responder: {text}"));
    }
}

impl Drop for ResponderLent {
    fn drop(&mut self) {
        let mut shared = lock(&self.shared);
        (shared.sender, shared.closer) = (None, None);
        if !shared.ended && !shared.upgraded && shared.aborted.is_none() {
            shared.aborted = Some(Reset::new(failure::PLUGIN_FAILED));
            wake(&mut shared.client);
        }
    }
}

static RESPONDER: abi::ResponderVt = abi::ResponderVt {
    size: size_of::<abi::ResponderVt>(),
    informational,
    head,
    poll_body,
    finish,
    abort,
    poll_closed,
    upgrade,
    drop: drop_lent::<ResponderLent>,
};

/// # Safety
/// `data` is a lent responder.
unsafe fn respond(
    data: *mut c_void,
    f: impl FnOnce(&ResponderLent, &mut ResponseShared) -> u32,
) -> u32 {
    let respond = |own: &mut ResponderLent| {
        let mut shared = lock(&own.shared);
        if shared.gone.is_some() || shared.aborted.is_some() {
            return abi::poll::CLOSED;
        }
        if shared.ended {
            own.violation("used after the end");
            return abi::poll::CLOSED;
        }
        let tag = f(own, &mut shared);
        wake(&mut shared.client);
        tag
    };
    // SAFETY: by this function's contract.
    unsafe { using(data, respond) }.unwrap_or(abi::poll::CLOSED)
}

unsafe extern "C" fn informational(
    data: *mut c_void,
    status: u32,
    headers: *const abi::Header,
    headers_len: usize,
) -> u32 {
    // SAFETY: borrowed for the call.
    let headers = unsafe { buf::headers(headers, headers_len) };
    let send = |own: &ResponderLent, shared: &mut ResponseShared| {
        if !(100..200).contains(&status) || status == 101 {
            own.violation(&format!("{status} is no interim status"));
        }
        if shared.head.is_some() {
            own.violation("an interim response after the head");
        }
        if own.transport_1_0 {
            return abi::poll::CLOSED;
        }
        let status = u16::try_from(status).unwrap_or_default();
        let head = ResponseHead { status, headers, body_length: None, end: false };
        shared.informational.push_back(head);
        abi::poll::READY
    };
    // SAFETY: of this vtable.
    unsafe { respond(data, send) }
}

unsafe extern "C" fn head(
    data: *mut c_void,
    head: *const abi::ResponseHead,
    first: *mut abi::Buf,
) -> u32 {
    // SAFETY: borrowed for the call.
    let head = unsafe { &*head };
    // SAFETY: borrowed for the call.
    let headers = unsafe { buf::headers(head.headers, head.headers_len) };
    // SAFETY: null, or moved to us, also on failure.
    let first = unsafe { first.as_ref() }.map(|first| unsafe { buf::from_plugin(first) });
    let send = |own: &ResponderLent, shared: &mut ResponseShared| {
        if shared.head.is_some() {
            own.violation("two heads");
        }
        if !(200..1000).contains(&head.status) && head.status != 101 {
            own.violation(&format!("{} is no final status", head.status));
        }
        let end = head.flags & abi::response::END != 0;
        shared.head = Some(ResponseHead {
            status: u16::try_from(head.status).unwrap_or_default(),
            headers,
            body_length: (head.body_length != abi::LENGTH_UNKNOWN).then_some(head.body_length),
            end,
        });
        shared.chunks.extend(first.filter(|first| !first.is_empty()));
        shared.ended = end;
        abi::poll::READY
    };
    // SAFETY: of this vtable.
    unsafe { respond(data, send) }
}

unsafe extern "C" fn poll_body(
    data: *mut c_void,
    waker: *const abi::Waker,
    chunk: *mut abi::Buf,
    flags: u32,
) -> u32 {
    // SAFETY: borrowed for the call.
    let waker = unsafe { keep(waker) };
    let send = |own: &ResponderLent, shared: &mut ResponseShared| {
        if shared.head.is_none() {
            own.violation("a chunk before the head");
        }
        if shared.chunks.len() >= shared.room {
            shared.sender = Some(waker);
            return abi::poll::PENDING;
        }
        // SAFETY: valid for the call, and moved to us, since READY is returned.
        let chunk = unsafe { buf::from_plugin(&*chunk) };
        if !chunk.is_empty() {
            shared.chunks.push_back(chunk);
        }
        shared.ended = flags & abi::response::END != 0;
        abi::poll::READY
    };
    // SAFETY: of this vtable.
    unsafe { respond(data, send) }
}

unsafe extern "C" fn finish(
    data: *mut c_void,
    headers: *const abi::Header,
    headers_len: usize,
) -> u32 {
    // SAFETY: borrowed for the call.
    let trailers = unsafe { buf::headers(headers, headers_len) };
    let send = |own: &ResponderLent, shared: &mut ResponseShared| {
        if shared.head.is_none() {
            own.violation("an end before the head");
        }
        shared.trailers = trailers;
        shared.ended = true;
        abi::poll::READY
    };
    // SAFETY: of this vtable.
    unsafe { respond(data, send) }
}

unsafe extern "C" fn abort(data: *mut c_void, reset: abi::Reset) {
    let abort = |_: &ResponderLent, shared: &mut ResponseShared| {
        shared.aborted = Some(reset_from_raw(reset));
        abi::poll::READY
    };
    // SAFETY: of this vtable.
    unsafe { respond(data, abort) };
}

unsafe extern "C" fn poll_closed(
    data: *mut c_void,
    waker: *const abi::Waker,
    reset: *mut abi::Reset,
) -> u32 {
    // SAFETY: borrowed for the call.
    let waker = unsafe { keep(waker) };
    let closed = |own: &mut ResponderLent| {
        let mut shared = lock(&own.shared);
        match shared.gone {
            Some(reason) => {
                // SAFETY: valid for the call.
                unsafe { reset.write(reset_to_raw(reason)) };
                abi::poll::CLOSED
            }
            None => {
                shared.closer = Some(waker);
                abi::poll::PENDING
            }
        }
    };
    // SAFETY: of this vtable.
    unsafe { using(data, closed) }.unwrap_or(abi::poll::PENDING)
}

unsafe extern "C" fn upgrade(data: *mut c_void) -> abi::Future {
    let take = |own: &mut ResponderLent| {
        let mut shared = lock(&own.shared);
        if !shared.head.as_ref().is_some_and(|head| head.status == 101 || head.status == 200) {
            own.violation("an upgrade without a head that accepts it");
        }
        shared.upgraded = true;
        (shared.upgrade.take(), own.world.clone())
    };
    // SAFETY: of this vtable.
    let (mut stream, world) = unsafe { using(data, take) }.unwrap_or_else(|| (None, World::new()));
    let own = world.clone();
    future::to_plugin(&world, move |_| {
        Poll::Ready(match stream.take() {
            Some(stream) => {
                abi::IoOutcome { code: failure::NONE, err: 0, io: io::to_plugin(&own, stream) }
            }
            None => refused(failure::UNSUPPORTED, 0),
        })
    })
}
