//! Exchanges and openers, with the test at the other end of the tunnel.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use bytes::Bytes;
use sidelane_abi as abi;
use sidelane_plugin::{Reset, failure};

use super::buf;
use super::future;
use super::io::{self, PluginStream};
use super::lent::{drop_lent, lend, using};
use super::waker::keep;
use super::world::World;
use crate::TestStream;
use crate::kit::TestFailure;
use crate::ledger::Ledger;

/// Credit of a fresh exchange, as in the tunnel.
const WINDOW_BYTES: usize = 256 * 1024;

/// Payload field numbers of `TunnelMessage`.
const FIELDS: std::ops::RangeInclusive<u32> = 9..=31;

pub(crate) fn reset_from_raw(raw: abi::Reset) -> Reset {
    let code = raw.protocol_code;
    Reset { code: raw.code, protocol_code: (code != abi::NO_PROTOCOL_CODE).then_some(code) }
}

pub(crate) fn reset_to_raw(reset: Reset) -> abi::Reset {
    abi::Reset {
        code: reset.code,
        protocol_code: reset.protocol_code.unwrap_or(abi::NO_PROTOCOL_CODE),
    }
}

/// A message as the other end of the tunnel sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerMessage {
    /// Payload field number.
    pub field: u32,
    /// Last message of its direction.
    pub end: bool,
    /// The encoded payload.
    pub payload: Bytes,
}

struct Shared {
    window: usize,
    sent: VecDeque<PeerMessage>,
    sent_end: bool,
    coming: VecDeque<PeerMessage>,
    coming_end: bool,
    reset: Option<Reset>,
    dispatched: bool,
    refused: Option<Reset>,
    /// What the exchange is joined to where it is dedicated.
    dedicated: Option<TestStream>,
    sender: Option<Waker>,
    closer: Option<Waker>,
    receiver: Option<Waker>,
    peer: Option<Waker>,
}

impl Shared {
    fn end(&mut self, reset: Reset) {
        let over = self.sent_end && self.coming_end && self.coming.is_empty();
        if self.reset.is_none() && !over {
            self.reset = Some(reset);
            let wakers = [&mut self.sender, &mut self.closer, &mut self.receiver, &mut self.peer];
            wakers.into_iter().filter_map(Option::take).for_each(Waker::wake);
        }
    }
}

type SharedExchange = Arc<Mutex<Shared>>;

fn lock(shared: &SharedExchange) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

/// The other end of an exchange, in the test's hands.
#[derive(Clone)]
pub struct Peer {
    shared: SharedExchange,
}

impl Peer {
    pub(crate) fn new() -> Self {
        let shared = Shared {
            window: WINDOW_BYTES,
            sent: VecDeque::new(),
            sent_end: false,
            coming: VecDeque::new(),
            coming_end: false,
            reset: None,
            dispatched: false,
            refused: None,
            dedicated: None,
            sender: None,
            closer: None,
            receiver: None,
            peer: None,
        };
        Self { shared: Arc::new(Mutex::new(shared)) }
    }

    /// Lends both halves to a plugin.
    pub(crate) fn to_plugin(&self, world: &Arc<World>) -> abi::Exchange {
        let send = SendLent {
            shared: self.shared.clone(),
            ledger: world.ledger.clone(),
            world: world.clone(),
        };
        let recv =
            RecvLent { shared: self.shared.clone(), ledger: world.ledger.clone(), finished: false };
        abi::Exchange {
            send: abi::SendHalf { data: lend(&world.ledger, "send half", send), vt: &SEND },
            recv: abi::RecvHalf { data: lend(&world.ledger, "receive half", recv), vt: &RECV },
        }
    }

    /// Sends a message to the plugin.
    pub fn send(&self, field: u32, payload: impl Into<Bytes>, end: bool) {
        let mut shared = lock(&self.shared);
        shared.coming.push_back(PeerMessage { field, end, payload: payload.into() });
        shared.coming_end |= end;
        wake(&mut shared.receiver);
    }

    /// Ends the direction to the plugin.
    pub fn finish(&self) {
        let mut shared = lock(&self.shared);
        shared.coming_end = true;
        wake(&mut shared.receiver);
    }

    /// Resets the exchange.
    pub fn reset(&self, reset: Reset) {
        lock(&self.shared).end(reset);
    }

    /// Takes the plugin's next message, which returns its credit; `None`: the direction has ended.
    pub async fn next(&self) -> Option<Result<PeerMessage, Reset>> {
        poll_fn(|cx| {
            let mut shared = lock(&self.shared);
            if let Some(message) = shared.sent.pop_front() {
                shared.window += message.payload.len();
                wake(&mut shared.sender);
                return Poll::Ready(Some(Ok(message)));
            }
            if let Some(reset) = shared.reset {
                return Poll::Ready(Some(Err(reset)));
            }
            if shared.sent_end {
                return Poll::Ready(None);
            }
            shared.peer = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// Takes the plugin's next message.
    ///
    /// # Panics
    /// Where there is none.
    pub async fn message(&self) -> PeerMessage {
        match self.next().await {
            Some(Ok(message)) => message,
            Some(Err(reset)) => panic!("no message but a {reset}"),
            None => panic!("no message but the end"),
        }
    }

    /// Takes messages to the end of the direction and joins their payloads.
    ///
    /// # Panics
    /// Where the exchange is reset instead.
    pub async fn payload_to_end(&self) -> Vec<u8> {
        let mut all = Vec::new();
        while let Some(message) = self.next().await {
            let message = message.expect("messages to the end");
            all.extend_from_slice(&message.payload);
            if message.end {
                break;
            }
        }
        all
    }

    /// Waits until the exchange is reset, throwing messages away.
    ///
    /// # Panics
    /// Where it ends well instead.
    pub async fn reset_reason(&self) -> Reset {
        loop {
            match self.next().await {
                Some(Ok(_)) => {}
                Some(Err(reset)) => return reset,
                None => panic!("no reset but the end"),
            }
        }
    }

    /// The reset that ended the exchange, if one did.
    #[must_use]
    pub fn was_reset(&self) -> Option<Reset> {
        lock(&self.shared).reset
    }

    /// Whether the plugin said that it is about to write to a service.
    #[must_use]
    pub fn was_dispatched(&self) -> bool {
        lock(&self.shared).dispatched
    }

    /// Whether, and why, the plugin said that nothing was written to a service.
    #[must_use]
    pub fn was_refused(&self) -> Option<Reset> {
        lock(&self.shared).refused
    }

    /// Whether the plugin ended its direction.
    #[must_use]
    pub fn has_finished(&self) -> bool {
        lock(&self.shared).sent_end
    }

    /// Sets the credit left to the plugin, in bytes; 0: its sends wait.
    pub fn set_window(&self, bytes: usize) {
        let mut shared = lock(&self.shared);
        shared.window = bytes;
        wake(&mut shared.sender);
    }

    /// Has a connection for the exchange where the plugin dedicates it, and returns its other end. Without it
    /// the exchange goes on in messages.
    pub fn dedicated(&self) -> TestStream {
        let (ours, theirs) = io::pair();
        lock(&self.shared).dedicated = Some(theirs);
        ours
    }

    /// How many of the plugin's messages wait to be taken.
    #[must_use]
    pub fn waiting(&self) -> usize {
        lock(&self.shared).sent.len()
    }

    /// How many messages the plugin has yet to take.
    #[must_use]
    pub fn untaken(&self) -> usize {
        lock(&self.shared).coming.len()
    }
}

struct SendLent {
    shared: SharedExchange,
    ledger: Arc<Ledger>,
    world: Arc<World>,
}

impl Drop for SendLent {
    fn drop(&mut self) {
        let mut shared = lock(&self.shared);
        (shared.sender, shared.closer) = (None, None);
        if !shared.sent_end {
            shared.end(Reset::new(failure::CANCELLED));
        }
    }
}

static SEND: abi::SendVt = abi::SendVt {
    size: size_of::<abi::SendVt>(),
    poll_send,
    finish,
    reset,
    poll_closed,
    dispatched,
    refused,
    drop: drop_lent::<SendLent>,
    dedicate,
};

unsafe extern "C" fn poll_send(
    data: *mut c_void,
    waker: *const abi::Waker,
    message: *mut abi::Msg,
) -> u32 {
    // SAFETY: borrowed for the call.
    let waker = unsafe { keep(waker) };
    let send = |own: &mut SendLent| {
        let mut shared = lock(&own.shared);
        if shared.reset.is_some() {
            return abi::poll::CLOSED;
        }
        if shared.sent_end {
            own.ledger.violation("send half: a message after the end".to_owned());
            return abi::poll::CLOSED;
        }
        if shared.window == 0 {
            shared.sender = Some(waker);
            return abi::poll::PENDING;
        }
        // SAFETY: valid for the call.
        let message = unsafe { &*message };
        // SAFETY: moved to us, since READY is returned.
        let (head, body) =
            unsafe { (buf::from_plugin(&message.head), buf::from_plugin(&message.body)) };
        let payload = Bytes::from([head, body].concat());
        check_message(&own.ledger, message.field, payload.len());
        shared.window = shared.window.saturating_sub(payload.len());
        let end = message.flags & abi::msg::END != 0;
        shared.sent_end = end;
        shared.sent.push_back(PeerMessage { field: message.field, end, payload });
        wake(&mut shared.peer);
        abi::poll::READY
    };
    // SAFETY: of this vtable.
    unsafe { using(data, send) }.unwrap_or(abi::poll::CLOSED)
}

fn check_message(ledger: &Ledger, field: u32, len: usize) {
    let max = abi::OPEN_BYTES_MAX;
    if len > max {
        ledger.violation(format!("send half: a message of {len} bytes, at most {max} are allowed"));
    }
    if !FIELDS.contains(&field) {
        ledger.violation(format!("send half: payload field {field} is none ({FIELDS:?})"));
    }
}

/// # Safety
/// `data` is a lent send half.
unsafe fn shared<R>(data: *mut c_void, f: impl FnOnce(&mut Shared) -> R) -> Option<R> {
    // SAFETY: by this function's contract.
    unsafe { using(data, |own: &mut SendLent| f(&mut lock(&own.shared))) }
}

unsafe extern "C" fn finish(data: *mut c_void) -> u32 {
    let finish = |shared: &mut Shared| {
        if shared.reset.is_some() {
            return abi::poll::CLOSED;
        }
        shared.sent_end = true;
        wake(&mut shared.peer);
        abi::poll::READY
    };
    // SAFETY: of this vtable.
    unsafe { shared(data, finish) }.unwrap_or(abi::poll::CLOSED)
}

unsafe extern "C" fn reset(data: *mut c_void, reset: abi::Reset) {
    // SAFETY: of this vtable.
    unsafe { shared(data, |shared| shared.end(reset_from_raw(reset))) };
}

unsafe extern "C" fn poll_closed(
    data: *mut c_void,
    waker: *const abi::Waker,
    reset: *mut abi::Reset,
) -> u32 {
    // SAFETY: borrowed for the call.
    let waker = unsafe { keep(waker) };
    let closed = |shared: &mut Shared| match shared.reset {
        Some(reason) => {
            // SAFETY: valid for the call.
            unsafe { reset.write(reset_to_raw(reason)) };
            abi::poll::CLOSED
        }
        None => {
            shared.closer = Some(waker);
            abi::poll::PENDING
        }
    };
    // SAFETY: of this vtable.
    unsafe { shared(data, closed) }.unwrap_or(abi::poll::PENDING)
}

unsafe extern "C" fn dispatched(data: *mut c_void) {
    // SAFETY: of this vtable.
    unsafe { shared(data, |shared| shared.dispatched = true) };
}

unsafe extern "C" fn refused(data: *mut c_void, reset: abi::Reset) {
    let refuse = |own: &mut SendLent| {
        let mut shared = lock(&own.shared);
        if shared.dispatched {
            own.ledger.violation("send half: refused after it was dispatched".to_owned());
        }
        shared.refused = Some(reset_from_raw(reset));
        shared.end(reset_from_raw(reset));
    };
    // SAFETY: of this vtable.
    unsafe { using(data, refuse) };
}

unsafe extern "C" fn dedicate(data: *mut c_void, stream: abi::Io, ahead: abi::Buf) -> abi::Future {
    // SAFETY: of this vtable.
    let own = unsafe { using(data, |own: &mut SendLent| (own.shared.clone(), own.world.clone())) };
    let (shared, world) = own.expect("a send half that is alive");
    // SAFETY: moved to us.
    let stream = unsafe { PluginStream::new(stream, world.clone()) };
    // SAFETY: moved to us.
    let ahead = unsafe { buf::from_plugin(&ahead) };
    let other = lock(&shared).dedicated.take();
    let Some(mut other) = other else {
        let mut stream = Some(stream);
        return future::to_plugin(&world, move |_| {
            let io = stream.take().map_or(NO_IO, PluginStream::into_raw);
            Poll::Ready(outcome(abi::dedicated::FRAMED, failure::NONE, io, (0, 0)))
        });
    };
    let mut joined = Box::pin(async move {
        let mut stream = stream;
        other.write(&ahead).await;
        let bytes = tokio::io::copy_bidirectional(&mut stream, &mut other).await?;
        Ok::<_, std::io::Error>((bytes.0 + ahead.len() as u64, bytes.1))
    });
    future::to_plugin(&world, move |cx| {
        joined.as_mut().poll(cx).map(|joined| {
            let mut shared = lock(&shared);
            (shared.sent_end, shared.coming_end) = (true, true);
            wake(&mut shared.peer);
            match joined {
                Ok(bytes) => outcome(abi::dedicated::ENDED, failure::NONE, NO_IO, bytes),
                Err(_) => outcome(abi::dedicated::ENDED, failure::CLIENT_GONE, NO_IO, (0, 0)),
            }
        })
    })
}

const NO_IO: abi::Io = abi::Io { data: std::ptr::null_mut(), vt: std::ptr::null() };

fn outcome(how: u32, code: u32, io: abi::Io, (sent, received): (u64, u64)) -> abi::DedicateOutcome {
    abi::DedicateOutcome { how, reset: reset_to_raw(Reset::new(code)), io, sent, received }
}

struct RecvLent {
    shared: SharedExchange,
    ledger: Arc<Ledger>,
    finished: bool,
}

impl Drop for RecvLent {
    fn drop(&mut self) {
        let mut shared = lock(&self.shared);
        shared.receiver = None;
        if !self.finished {
            shared.end(Reset::new(failure::CANCELLED));
        }
    }
}

static RECV: abi::RecvVt =
    abi::RecvVt { size: size_of::<abi::RecvVt>(), poll_recv, drop: drop_lent::<RecvLent> };

unsafe extern "C" fn poll_recv(
    data: *mut c_void,
    waker: *const abi::Waker,
    message: *mut abi::Msg,
    reset: *mut abi::Reset,
) -> u32 {
    // SAFETY: borrowed for the call.
    let waker = unsafe { keep(waker) };
    let receive = |own: &mut RecvLent| {
        let mut shared = lock(&own.shared);
        if let Some(reason) = shared.reset {
            own.finished = true;
            // SAFETY: valid for the call.
            unsafe { reset.write(reset_to_raw(reason)) };
            return abi::recv::RESET;
        }
        if let Some(next) = shared.coming.pop_front() {
            own.finished = next.end;
            let body = buf::to_plugin(&own.ledger, next.payload);
            let flags = if next.end { abi::msg::END } else { 0 };
            // SAFETY: valid for the call; what it held is the plugin's and empty.
            unsafe {
                message.write(abi::Msg { field: next.field, flags, head: buf::empty(), body })
            };
            return abi::recv::MESSAGE;
        }
        if shared.coming_end {
            own.finished = true;
            return abi::recv::FINISHED;
        }
        shared.receiver = Some(waker);
        abi::poll::PENDING
    };
    // SAFETY: of this vtable.
    unsafe { using(data, receive) }.unwrap_or(abi::recv::FINISHED)
}

/// What opening yields.
#[derive(Clone)]
pub(crate) enum Opens {
    Exchange,
    Failure(TestFailure),
    Never,
}

struct OpenerLent {
    world: Arc<World>,
    opens: Opens,
    peer: Peer,
    meta: *const abi::Meta,
    opened: bool,
}

// SAFETY: the meta record outlives the plugin's future and is immutable.
unsafe impl Send for OpenerLent {}

/// Lends an opener whose exchange leads to `peer`. `meta` is to outlive the plugin's future.
pub(crate) fn opener(
    world: &Arc<World>,
    opens: Opens,
    peer: &Peer,
    meta: *const abi::Meta,
) -> abi::Opener {
    let own = OpenerLent { world: world.clone(), opens, peer: peer.clone(), meta, opened: false };
    abi::Opener { data: lend(&world.ledger, "opener", own), vt: &OPENER }
}

static OPENER: abi::OpenerVt =
    abi::OpenerVt { size: size_of::<abi::OpenerVt>(), poll_open, drop: drop_lent::<OpenerLent> };

unsafe extern "C" fn poll_open(
    data: *mut c_void,
    _waker: *const abi::Waker,
    key: *const abi::RouteKey,
    out: *mut abi::Opened,
) -> u32 {
    // SAFETY: valid for the call.
    let kind = unsafe { (*key).kind };
    let open = |own: &mut OpenerLent| {
        if own.opened {
            own.world.ledger.violation("opener: opened twice".to_owned());
        }
        if kind > abi::route_key::HOST {
            own.world.ledger.violation(format!("opener: no such kind of key: {kind}"));
        }
        match &own.opens {
            Opens::Never => abi::poll::PENDING,
            Opens::Exchange => {
                own.opened = true;
                let exchange = own.peer.to_plugin(&own.world);
                // SAFETY: valid for the call.
                let out = unsafe { &raw mut (*out).exchange };
                // SAFETY: as above.
                unsafe { out.write(exchange) };
                abi::poll::READY
            }
            Opens::Failure(failure) => {
                own.opened = true;
                // SAFETY: valid for the call; the detail lives as long as the opener.
                unsafe { (&raw mut (*out).failure).write(failure.to_raw()) };
                abi::poll::CLOSED
            }
        }
    };
    // SAFETY: of this vtable.
    let tag = unsafe { using(data, open) }.unwrap_or(abi::poll::PANICKED);
    if tag == abi::poll::READY {
        // SAFETY: of this vtable.
        let meta = unsafe { using(data, |own: &mut OpenerLent| own.meta) };
        // SAFETY: valid for the call.
        unsafe { (&raw mut (*out).meta).write(meta.unwrap_or(std::ptr::null())) };
    }
    tag
}
