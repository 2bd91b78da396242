//! One exchange between a plugin's call and the connection that carries its answer.
//!
//! The plugin's side ([`Responder`]) puts a head, chunks and an end; the connection's side (HTTP/1's
//! service and body, HTTP/2's stream task) takes them when the client can. One chunk waits at most:
//! that is the backpressure. Knows nothing of either HTTP version's rules.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode};
use sidelane_abi::failure;

use super::CallEnd;
use crate::plugin::lend::{self, Closed, Reset, ResponseHead};

/// Interim responses of one exchange that wait for the client. Services send one or two; past the
/// bound the rest are dropped.
const INTERIM_MAX: usize = 16;

/// Invariant: never held across a call into a plugin or a waker.
#[derive(Default)]
struct State {
    interim: VecDeque<(StatusCode, HeaderMap)>,
    head: Option<ResponseHead>,
    head_given: bool,
    /// The head accepts the upgrade.
    upgrading: bool,
    chunk: Option<Bytes>,
    trailers: Option<HeaderMap>,
    /// The client gets no more than it has; a body that the plugin puts is dropped.
    bodiless: bool,
    /// The plugin has ended the response. What it put before may still wait.
    finished: bool,
    /// The connection has taken all there was.
    taken: bool,
    aborted: Option<Reset>,
    /// `aborted` only says that the responder was dropped; the call's own code is better.
    abandoned: bool,
    gone: Option<Reset>,
    continue_given: bool,
    /// The request's body was read to its end.
    body_ended: bool,
    upgrade: Upgrade,
    /// The connection is polling the call itself and will look at what it did.
    attended: bool,

    connection: Option<Waker>,
    rest: Option<Waker>,
    room: Option<Waker>,
    closed: Option<Waker>,
    upgraded: Option<Waker>,
}

#[derive(Default)]
enum Upgrade {
    #[default]
    Waiting,
    Ready(Box<dyn lend::Stream>),
    Failed,
    Taken,
}

/// What accepts an upgrade.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum UpgradeBy {
    /// 101, on HTTP/1.1 (RFC 9110 §7.8).
    Switching,
    /// A 2xx that does not end, on an extended CONNECT (RFC 8441 §5).
    Success,
}

impl UpgradeBy {
    fn accepts(self, status: StatusCode, end: bool) -> bool {
        match self {
            Self::Switching => status == StatusCode::SWITCHING_PROTOCOLS,
            Self::Success => status.is_success() && !end,
        }
    }
}

/// What an exchange is born with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Traits {
    /// The request's method is HEAD.
    pub(super) head_only: bool,
    /// How the request may become a byte stream, if it may.
    pub(super) upgrade: Option<UpgradeBy>,
    /// The client understands interim responses: HTTP/1.0 has none (RFC 9110 §15.2).
    pub(super) interim: bool,
    /// The client waits for an interim 100 before it sends the request's body.
    pub(super) expect_continue: bool,
}

impl Traits {
    pub(super) fn of(head: &lend::RequestHead, interim: bool) -> Self {
        Self {
            head_only: head.method == Method::HEAD,
            upgrade: head.can_upgrade.then_some(if head.protocol.is_some() {
                UpgradeBy::Success
            } else {
                UpgradeBy::Switching
            }),
            interim,
            expect_continue: head.expect_continue,
        }
    }
}

/// What both sides of an exchange share.
pub(super) struct Exchange {
    traits: Traits,
    state: Mutex<State>,
}

/// What the connection takes from an exchange.
#[derive(Debug)]
pub(super) enum Output {
    Interim(StatusCode, HeaderMap),
    /// `first` may follow at once; `end`: nothing follows `first`.
    /// `upgrade`: the request becomes a byte stream; nothing else follows.
    Head {
        head: ResponseHead,
        first: Option<Bytes>,
        end: bool,
        upgrade: bool,
    },
    Chunk {
        bytes: Bytes,
        end: bool,
    },
    /// The response has ended.
    End(Option<HeaderMap>),
    Aborted(Reset),
}

impl Exchange {
    pub(super) fn new(traits: Traits) -> Arc<Self> {
        Arc::new(Self { traits, state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change below is whole before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the plugin's end.
    pub(super) fn responder(self: &Arc<Self>, dropped: DropInterim) -> Responder {
        Responder { exchange: Arc::clone(self), dropped }
    }

    /// Polls the call in the connection's own turn. What it puts is looked at right after, so it
    /// need not wake the connection. Returns true once the call has ended.
    pub(super) fn attend<C: Future<Output = CallEnd> + Unpin>(
        &self,
        call: &mut C,
        cx: &mut Context<'_>,
    ) -> bool {
        self.state().attended = true;
        let polled = Pin::new(call).poll(cx);
        self.state().attended = false;
        let Poll::Ready(end) = polled else { return false };
        self.call_ended(end);
        true
    }

    /// Ends what the call has left open.
    pub(super) fn call_ended(&self, end: CallEnd) {
        let mut state = self.state();
        if state.finished || (state.aborted.is_some() && !state.abandoned) {
            return;
        }
        let code = match end {
            CallEnd { panicked: true, .. } | CallEnd { code: failure::NONE, .. } => {
                failure::PLUGIN_FAILED
            }
            CallEnd { code, .. } => code,
        };
        state.aborted = Some(Reset::new(code));
        state.abandoned = false;
        let waker = state.wake_connection();
        drop(state);
        wake(waker);
    }

    /// Takes what comes next. Chunks and the end come only after the head, an abort after what was
    /// put before it.
    pub(super) fn poll_output(&self, cx: &mut Context<'_>, room: bool) -> Poll<Output> {
        let mut state = self.state();
        let Some(output) = state.next_output(room) else {
            keep(&mut state.connection, cx.waker());
            return Poll::Pending;
        };
        let waker = if state.chunk.is_none() { state.room.take() } else { None };
        drop(state);
        // A plugin on this very task is polled again by whoever called this.
        wake(waker);
        Poll::Ready(output)
    }

    /// The client is gone, or its stream was reset. Nothing happens once all was taken.
    pub(super) fn client_gone(&self, reset: Reset) {
        let mut state = self.state();
        if state.taken || state.gone.is_some() {
            return;
        }
        state.gone = Some(reset);
        state.chunk = None;
        if matches!(state.upgrade, Upgrade::Waiting) {
            state.upgrade = Upgrade::Failed;
        }
        let wakers =
            [state.closed.take(), state.room.take(), state.upgraded.take(), state.rest.take()];
        drop(state);
        wakers.into_iter().for_each(wake);
    }

    /// The connection has sent as much as it had announced; what the plugin still puts is dropped.
    pub(super) fn take_all(&self) {
        let mut state = self.state();
        state.bodiless = true;
        state.finished = true;
        state.taken = true;
        state.chunk = None;
        let waker = state.room.take();
        drop(state);
        wake(waker);
    }

    /// The request's body was read to its end.
    pub(super) fn body_ended(&self) {
        if self.traits.expect_continue {
            self.state().body_ended = true;
        }
    }

    /// Returns whether the request's body may still come, or not: the client waited to be told to
    /// send it, was not, and may have stopped waiting (RFC 9110 §10.1.1).
    pub(super) fn body_is_uncertain(&self) -> bool {
        self.traits.expect_continue && {
            let state = self.state();
            !state.continue_given && !state.body_ended
        }
    }

    /// Hands over the client's bytes after a head that accepts the upgrade.
    pub(super) fn upgraded(&self, stream: Box<dyn lend::Stream>) {
        let mut state = self.state();
        state.upgrade = Upgrade::Ready(stream);
        let waker = state.upgraded.take();
        // Whoever carried the request is done; its task's memory lives as long as its waker.
        state.connection = None;
        drop(state);
        wake(waker);
    }

    /// The client's bytes will not come.
    pub(super) fn upgrade_failed(&self) {
        let mut state = self.state();
        if matches!(state.upgrade, Upgrade::Waiting) {
            state.upgrade = Upgrade::Failed;
        }
        let waker = state.upgraded.take();
        drop(state);
        wake(waker);
    }

    fn poll_upgraded(
        &self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Box<dyn lend::Stream>, (u32, io::Error)>> {
        let mut state = self.state();
        match std::mem::replace(&mut state.upgrade, Upgrade::Taken) {
            Upgrade::Ready(stream) => Poll::Ready(Ok(stream)),
            Upgrade::Waiting => {
                state.upgrade = Upgrade::Waiting;
                keep(&mut state.upgraded, cx.waker());
                Poll::Pending
            }
            Upgrade::Failed => {
                Poll::Ready(Err((failure::CLIENT_GONE, io::ErrorKind::ConnectionReset.into())))
            }
            Upgrade::Taken => Poll::Ready(Err((
                failure::UNSUPPORTED,
                io::Error::other("the byte stream was handed over before"),
            ))),
        }
    }
}

impl State {
    fn next_output(&mut self, room: bool) -> Option<Output> {
        if let Some((status, headers)) = self.interim.pop_front() {
            return Some(Output::Interim(status, headers));
        }
        if let Some(head) = self.head.take() {
            let first = self.chunk.take();
            let end = self.finished && self.trailers.is_none();
            self.taken = end;
            return Some(Output::Head { head, first, end, upgrade: self.upgrading });
        }
        if self.chunk.is_some() && !room {
            return None;
        }
        if let Some(bytes) = self.chunk.take() {
            let end = self.finished && self.trailers.is_none();
            self.taken = end;
            return Some(Output::Chunk { bytes, end });
        }
        if self.finished {
            self.taken = true;
            return Some(Output::End(self.trailers.take()));
        }
        self.aborted.map(|reset| {
            self.taken = true;
            Output::Aborted(reset)
        })
    }

    fn wake_connection(&mut self) -> Option<Waker> {
        if self.attended { None } else { self.connection.take() }
    }

    /// Nothing more can be put.
    fn is_over(&self) -> bool {
        self.finished || self.aborted.is_some() || self.gone.is_some()
    }
}

/// Keeps `waker` unless it is there already.
fn keep(slot: &mut Option<Waker>, waker: &Waker) {
    match slot {
        Some(kept) => kept.clone_from(waker),
        None => *slot = Some(waker.clone()),
    }
}

fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker {
        waker.wake();
    }
}

/// Counts an interim response that is not sent.
pub(super) type DropInterim = Arc<dyn Fn() + Send + Sync>;

/// The plugin's end of an exchange.
pub(super) struct Responder {
    exchange: Arc<Exchange>,
    dropped: DropInterim,
}

impl lend::Responder for Responder {
    fn informational(&mut self, status: StatusCode, headers: HeaderMap) -> Result<(), Closed> {
        let traits = self.exchange.traits;
        let mut state = self.exchange.state();
        if state.is_over() || state.head_given || !is_interim(status) {
            return Err(Closed);
        }
        // The one that a client may be waiting for always has room.
        let awaited = status == StatusCode::CONTINUE && !state.continue_given;
        if !traits.interim || (state.interim.len() >= INTERIM_MAX && !awaited) {
            drop(state);
            (self.dropped)();
            return Ok(());
        }
        state.continue_given |= awaited;
        state.interim.push_back((status, headers));
        let waker = state.wake_connection();
        drop(state);
        wake(waker);
        Ok(())
    }

    fn head(&mut self, head: ResponseHead, first: Option<Bytes>, end: bool) -> Result<(), Closed> {
        let traits = self.exchange.traits;
        let mut state = self.exchange.state();
        if state.is_over() || state.head_given {
            return Err(Closed);
        }
        let upgrading = traits.upgrade.is_some_and(|by| by.accepts(head.status, end));
        if head.status.is_informational() && !upgrading {
            state.aborted = Some(Reset::new(failure::PLUGIN_FAILED));
        } else {
            if has_body(traits.head_only, head.status) && !upgrading {
                state.chunk = first.filter(|chunk| !chunk.is_empty());
                state.finished = end;
            } else {
                state.bodiless = true;
                state.finished = true;
            }
            state.head = Some(head);
            state.head_given = true;
            state.upgrading = upgrading;
        }
        let refused = state.aborted.is_some();
        let waker = state.wake_connection();
        drop(state);
        wake(waker);
        if refused { Err(Closed) } else { Ok(()) }
    }

    fn poll_body(
        &mut self,
        cx: &mut Context<'_>,
        chunk: &mut Option<Bytes>,
        end: bool,
    ) -> Poll<Result<(), Closed>> {
        let mut state = self.exchange.state();
        if state.aborted.is_some() || state.gone.is_some() || !state.head_given {
            return Poll::Ready(Err(Closed));
        }
        if state.bodiless {
            *chunk = None;
            return Poll::Ready(Ok(()));
        }
        if state.finished {
            return Poll::Ready(Err(Closed));
        }
        if state.chunk.is_some() {
            keep(&mut state.room, cx.waker());
            return Poll::Pending;
        }
        state.chunk = chunk.take().filter(|chunk| !chunk.is_empty());
        state.finished = end;
        let waker = if state.chunk.is_some() || end { state.wake_connection() } else { None };
        drop(state);
        wake(waker);
        Poll::Ready(Ok(()))
    }

    fn finish(&mut self, trailers: Option<HeaderMap>) -> Result<(), Closed> {
        let mut state = self.exchange.state();
        if state.aborted.is_some() || state.gone.is_some() || !state.head_given {
            return Err(Closed);
        }
        if state.finished {
            return Ok(());
        }
        state.finished = true;
        state.trailers = trailers.filter(|trailers| !trailers.is_empty());
        let waker = state.wake_connection();
        drop(state);
        wake(waker);
        Ok(())
    }

    fn finish_behind(&mut self, last: Bytes, trailers: Option<HeaderMap>) -> Result<(), Closed> {
        let mut state = self.exchange.state();
        let is_open = state.head_given && !state.is_over() && !state.bodiless;
        if is_open && !last.is_empty() {
            state.chunk = Some(match state.chunk.take() {
                None => last,
                Some(chunk) => [&*chunk, &*last].concat().into(),
            });
        }
        drop(state);
        self.finish(trailers)
    }

    fn abort(&mut self, reset: Reset) {
        self.exchange.abort(reset, false);
    }

    fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<Reset> {
        let mut state = self.exchange.state();
        if let Some(reset) = state.gone {
            return Poll::Ready(reset);
        }
        keep(&mut state.closed, cx.waker());
        Poll::Pending
    }

    fn upgrade(&mut self) -> lend::StreamFuture {
        if self.exchange.traits.upgrade.is_none() {
            let error = io::Error::other("the request does not upgrade");
            return Box::pin(std::future::ready(Err((failure::UNSUPPORTED, error))));
        }
        let exchange = Arc::clone(&self.exchange);
        Box::pin(poll_fn(move |cx| exchange.poll_upgraded(cx)))
    }
}

impl Exchange {
    fn abort(&self, reset: Reset, abandoned: bool) {
        let mut state = self.state();
        if state.is_over() {
            return;
        }
        state.aborted = Some(reset);
        state.abandoned = abandoned;
        let waker = state.wake_connection();
        drop(state);
        wake(waker);
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        self.exchange.abort(Reset::new(failure::PLUGIN_FAILED), true);
    }
}

/// What is left of a call once its response has begun: runs as a task of its own, so that a client
/// that takes its time with the response does not hold up the request's body.
pub(super) struct Rest<C> {
    call: C,
    /// `None` once the request has become a byte stream: the rest is between that and the plugin.
    exchange: Option<Arc<Exchange>>,
}

impl<C: Future<Output = CallEnd> + Unpin> Rest<C> {
    pub(super) fn new(call: C, exchange: Arc<Exchange>) -> Self {
        Self { call, exchange: Some(exchange) }
    }
}

impl<C: Future<Output = CallEnd> + Unpin> Future for Rest<C> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let Some(exchange) = &this.exchange else {
            return Pin::new(&mut this.call).poll(cx).map(drop);
        };
        keep(&mut exchange.state().rest, cx.waker());
        if let Poll::Ready(end) = Pin::new(&mut this.call).poll(cx) {
            exchange.call_ended(end);
            return Poll::Ready(());
        }
        let state = exchange.state();
        // The call has had its chance to see it.
        let is_gone = state.gone.is_some();
        let is_upgraded = matches!(state.upgrade, Upgrade::Taken);
        drop(state);
        if is_upgraded {
            this.exchange = None;
        }
        if is_gone { Poll::Ready(()) } else { Poll::Pending }
    }
}

/// Returns whether a response to the request may have a body (RFC 9110 §6.4.1).
pub(super) fn has_body(head_only: bool, status: StatusCode) -> bool {
    !head_only
        && !status.is_informational()
        && status != StatusCode::NO_CONTENT
        && status != StatusCode::NOT_MODIFIED
}

/// Returns whether `status` can be that of an interim response.
fn is_interim(status: StatusCode) -> bool {
    status.is_informational() && status != StatusCode::SWITCHING_PROTOCOLS
}
