//! An exchange goes to another sidecar when its own dies, unseen by its client and its plugin, as long as
//! no service can have acted on it, or may do so again.
//!
//! It moves where nothing of it reached a service (it was refused, or nothing was written), and, within a
//! budget, where its request may be repeated and its lane is lost; never once an answer has begun. What was
//! sent so far is kept until that is settled. From then on a half costs one branch more than its lane's.
//!
//! Knows what HTTP says of methods where the exchange is HTTP-born, and nothing of what a plugin sends.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Instant;

use bytes::Bytes;
use http::Method;
use sidelane_abi::failure;
use sidelane_tunnel::Fate;

use super::Relay;
use super::aim::{Aim, Taken};
use super::open::Wait;
use super::policy;
use crate::choice::{InFlight, Standing};
use crate::metrics::MoveReason;
use crate::plugin::lend::{self, Closed, DedicateFuture, Message, Received, Reset, Stream};
use crate::tunnel::session::Session;
use crate::tunnel::{RecvHalf, SendHalf};

mod budget;

pub(super) use budget::Budget;

/// Bytes of one exchange that are kept to be sent again. A head and a form fit; what is longer goes to
/// one sidecar only.
const KEPT_BYTES_MAX: u64 = 64 * 1024;

/// Bytes of all exchanges of a relay that are kept. Beyond it exchanges that begin do not move.
const KEPT_BYTES_OF_ALL_MAX: u64 = 64 * 1024 * 1024;

/// What keeping a message costs beside its bytes.
const MESSAGE_COST: u64 = 64;

/// How often one exchange moves. A request that ends each sidecar it meets is not to meet all.
const MOVES_MAX: u32 = 3;

/// What is known of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asks {
    /// Byte-born: nothing.
    Unknown,
    /// It is not to be carried out twice.
    Once,
    /// It may be sent again where no answer has begun. `freely`: the route says so of more failures than
    /// the loss of a sidecar.
    Again { freely: bool },
}

impl Asks {
    /// Returns what an HTTP head says (RFC 9110 §9.2). `retries`: the route sends requests again.
    pub(super) fn of(method: &Method, protocol: Option<&[u8]>, retries: bool) -> Self {
        let is_safe =
            matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE);
        // A WebSocket's handshake over HTTP/2 is what GET is over HTTP/1.1 (RFC 8441 §5).
        let is_handshake = *method == Method::CONNECT && protocol == Some(b"websocket");
        let is_idempotent = matches!(*method, Method::PUT | Method::DELETE);
        if is_safe || is_handshake || (retries && is_idempotent) {
            Self::Again { freely: retries }
        } else {
            Self::Once
        }
    }
}

/// Bytes that are kept of all exchanges of a relay.
#[derive(Debug, Default)]
pub(super) struct KeptBytes(AtomicU64);

impl KeptBytes {
    fn try_add(&self, bytes: u64) -> bool {
        let is_room = self.0.fetch_add(bytes, Ordering::Relaxed) + bytes <= KEPT_BYTES_OF_ALL_MAX;
        if !is_room {
            self.remove(bytes);
        }
        is_room
    }

    fn remove(&self, bytes: u64) {
        self.0.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// Returns the halves of an exchange that a sidecar has taken.
pub(super) fn begin(aim: Aim, taken: Taken, asks: Asks) -> (Sending, Receiving) {
    let Taken { send, recv, tunnel, session, standing, budget, .. } = taken;
    budget.deposit();
    let (of_send, of_recv) = InFlight::both(&standing);
    let moving = Moving {
        relay: Arc::clone(&aim.relay),
        aim: Some(aim),
        place: At { tunnel, session, standing },
        budget,
        asks,
        kept: Vec::new(),
        kept_bytes: 0,
        is_finished: false,
        is_sender_gone: false,
        is_judged: false,
        moves: 0,
        state: State::Runs,
        for_send: None,
        for_recv: None,
        sender: None,
        receiver: None,
        rung: [None, None],
    };
    let shared = Arc::new(Shared {
        moving: Mutex::new(moving),
        again: Mutex::default(),
        is_intended: AtomicBool::new(false),
        is_finished: AtomicBool::new(false),
        is_sender_gone: AtomicBool::new(false),
        given_up: OnceLock::new(),
    });
    let send = Sending { inner: send, in_flight: of_send, shared: Some(Arc::clone(&shared)) };
    (send, Receiving { inner: recv, in_flight: of_recv, shared: Some(shared) })
}

/// The direction from the client to whichever sidecar has the exchange.
pub(super) struct Sending {
    inner: SendHalf,
    in_flight: InFlight,
    /// `None`: it does not move any more.
    shared: Option<Arc<Shared>>,
}

/// The direction to the client.
pub(super) struct Receiving {
    inner: RecvHalf,
    in_flight: InFlight,
    /// `None`: an answer has begun, or it has ended.
    shared: Option<Arc<Shared>>,
}

/// What both halves know while the exchange may move.
///
/// Lanes call wakers of plugins, and these may call a half, also while the other one holds the lock. So
/// nobody waits for it: whoever finds it taken is called again, or leaves word of what it wants.
struct Shared {
    moving: Mutex<Moving>,
    /// Who found the lock taken: two at most.
    again: Mutex<Vec<Waker>>,
    /// One of the following was set, and is to be looked at.
    is_intended: AtomicBool,
    is_finished: AtomicBool,
    is_sender_gone: AtomicBool,
    given_up: OnceLock<Reset>,
}

struct Moving {
    relay: Arc<Relay>,
    /// `None`: it does not move any more.
    aim: Option<Aim>,
    place: At,
    budget: Arc<Budget>,
    asks: Asks,
    /// What was sent so far.
    kept: Vec<Message>,
    kept_bytes: u64,
    is_finished: bool,
    is_sender_gone: bool,
    /// What became of it was counted for, or against, who has it.
    is_judged: bool,
    moves: u32,
    state: State,
    /// Halves at the sidecar it has moved to, until their owners come for them.
    for_send: Option<(SendHalf, InFlight)>,
    for_recv: Option<(RecvHalf, InFlight)>,
    /// Who waits until it has moved.
    sender: Option<Waker>,
    receiver: Option<Waker>,
    /// To be woken once the lock is free.
    rung: [Option<Waker>; 2],
}

/// Who has the exchange.
struct At {
    tunnel: Arc<str>,
    session: Arc<Session>,
    standing: Arc<Standing>,
}

enum State {
    Runs,
    /// For a sidecar that takes it.
    Waits(Wait),
    /// What was kept is sent to another one.
    Replays {
        send: SendHalf,
        in_flight: InFlight,
        next: usize,
    },
}

/// The lock, whose holder tells others what it has changed once it is free.
struct Held<'a> {
    shared: &'a Shared,
    moving: Option<MutexGuard<'a, Moving>>,
}

impl std::ops::Deref for Held<'_> {
    type Target = Moving;

    fn deref(&self) -> &Moving {
        self.moving.as_ref().expect("taken when dropped only")
    }
}

impl std::ops::DerefMut for Held<'_> {
    fn deref_mut(&mut self) -> &mut Moving {
        self.moving.as_mut().expect("taken when dropped only")
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let rung = std::mem::take(&mut self.rung);
        self.moving = None;
        self.shared.carry_out();
        let again = std::mem::take(&mut *lock(&self.shared.again));
        rung.into_iter().flatten().chain(again).for_each(Waker::wake);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn try_lock(&self) -> Option<MutexGuard<'_, Moving>> {
        match self.moving.try_lock() {
            Ok(moving) => Some(moving),
            Err(std::sync::TryLockError::Poisoned(error)) => Some(error.into_inner()),
            Err(std::sync::TryLockError::WouldBlock) => None,
        }
    }

    /// Takes the lock; `None`: the other half has it, and `cx` is woken once it has not.
    fn hold(&self, cx: &Context<'_>) -> Option<Held<'_>> {
        let mut moving = self.try_lock();
        if moving.is_none() {
            lock(&self.again).push(cx.waker().clone());
            // It may have been given back just before.
            moving = self.try_lock();
        }
        let mut held = Held { shared: self, moving: Some(moving?) };
        if self.is_intended.swap(false, Ordering::AcqRel) {
            held.carry_out(self);
        }
        Some(held)
    }

    fn intend(&self) {
        self.is_intended.store(true, Ordering::Release);
        self.carry_out();
    }

    /// Does what was left word of, unless somebody has the lock, who does it then.
    fn carry_out(&self) {
        while self.is_intended.load(Ordering::Acquire) {
            let Some(mut moving) = self.try_lock() else { return };
            self.is_intended.store(false, Ordering::Release);
            moving.carry_out(self);
        }
    }
}

impl Moving {
    fn carry_out(&mut self, shared: &Shared) {
        if let Some(reset) = shared.given_up.get() {
            self.give_up(*reset);
        }
        if shared.is_finished.load(Ordering::Acquire) && !self.is_finished {
            self.is_finished = true;
            if let Some((send, _)) = &mut self.for_send {
                lend::SendHalf::finish(send);
            }
        }
        if shared.is_sender_gone.load(Ordering::Acquire) && !self.is_sender_gone {
            self.is_sender_gone = true;
            if self.is_finished {
                self.for_send = None;
            } else {
                self.give_up(Reset::new(failure::CANCELLED));
            }
        }
    }

    fn may_move(&self) -> bool {
        self.aim.is_some()
    }

    /// It stays where it is. Halves that wait for their owners go on waiting.
    fn settle(&mut self) {
        if let Some(aim) = self.aim.take() {
            aim.relay.kept_bytes.remove(self.kept_bytes);
        }
        self.kept_bytes = 0;
        self.kept = Vec::new();
    }

    /// One end has ended it.
    fn give_up(&mut self, reset: Reset) {
        self.settle();
        if let Some((send, _)) = &mut self.for_send {
            lend::SendHalf::reset(send, reset);
        }
        if let State::Replays { send, .. } = &mut self.state {
            lend::SendHalf::reset(send, reset);
        }
        self.state = State::Runs;
        self.ring();
    }

    fn ring(&mut self) {
        self.rung = [self.sender.take(), self.receiver.take()];
    }

    /// An answer has begun.
    fn answered(&mut self) {
        self.is_judged = true;
        self.place.standing.succeeded();
        self.settle();
    }

    /// Keeps a message that was sent, as far as there is room.
    fn keep(&mut self, message: Message) {
        let Some(aim) = &self.aim else { return };
        let cost = message.len() as u64 + MESSAGE_COST;
        if self.kept_bytes + cost > KEPT_BYTES_MAX || !aim.relay.kept_bytes.try_add(cost) {
            return self.settle();
        }
        self.kept_bytes += cost;
        self.is_finished |= message.end;
        self.kept.push(message);
    }

    /// Goes on with a move; ready where none is under way.
    fn drive(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            match &mut self.state {
                State::Runs => return Poll::Ready(()),
                State::Waits(wait) => {
                    let look_again = ready!(wait.poll(cx));
                    let taken = self.aim.as_ref().filter(|_| look_again).map(Aim::open_again);
                    match taken {
                        Some(Ok(taken)) => self.take(taken),
                        Some(Err(_)) => {}
                        // The halves that it had say how it ended.
                        None => {
                            self.settle();
                            self.state = State::Runs;
                            self.ring();
                        }
                    }
                }
                State::Replays { send, next, .. } => {
                    let mut is_closed = false;
                    while let Some(message) = self.kept.get(*next) {
                        let mut message = Some(message.clone());
                        match ready!(lend::SendHalf::poll_send(send, cx, &mut message)) {
                            Ok(()) => *next += 1,
                            Err(Closed) => {
                                is_closed = true;
                                break;
                            }
                        }
                    }
                    if self.is_finished && !is_closed {
                        lend::SendHalf::finish(send);
                    }
                    let state = std::mem::replace(&mut self.state, State::Runs);
                    if let State::Replays { send, in_flight, .. } = state
                        && !self.is_sender_gone
                    {
                        self.for_send = Some((send, in_flight));
                    }
                    self.ring();
                }
            }
        }
    }

    /// Another sidecar has it.
    fn take(&mut self, taken: Taken) {
        let Taken { send, recv, tunnel, session, standing, budget, .. } = taken;
        let (of_send, of_recv) = InFlight::both(&standing);
        self.place = At { tunnel, session, standing };
        self.is_judged = false;
        self.budget = budget;
        self.for_send = None;
        self.for_recv = Some((recv, of_recv));
        self.state = State::Replays { send, in_flight: of_send, next: 0 };
    }

    /// Sends the exchange elsewhere after it has ended so; false: that is how it ended.
    fn try_move(&mut self, reset: Reset, fate: Option<Fate>) -> bool {
        let is_answered = fate.is_none_or(|fate| fate.answered);
        if !is_answered && !self.is_judged && is_failure(reset.code) {
            self.is_judged = true;
            let At { tunnel, session, standing } = &self.place;
            self.relay.sidecar_failed(tunnel, session, standing, reset.code);
        }
        let Some(aim) = &mut self.aim else { return false };
        let is_refused = fate.is_some_and(|fate| fate.refused);
        let is_due = aim.meta.deadline.is_some_and(|deadline| deadline <= Instant::now());
        let may = !is_answered && !is_due && self.moves < MOVES_MAX;
        let Some(reason) = why(self.asks, reset.code, is_refused).filter(|_| may) else {
            self.settle();
            return false;
        };
        if reason == MoveReason::Idempotent && !self.budget.take(policy::now()) {
            aim.relay.metrics.balance.not_moved();
            self.settle();
            return false;
        }
        let has_another_lane = is_of_lane(reset.code) && self.place.session.is_open();
        self.moves += 1;
        let from = Arc::clone(&self.place.session.name);
        let (route, code) = (Arc::clone(&aim.route.name), failure::name(reset.code));
        let metrics = Arc::clone(&aim.relay.metrics);
        match aim.open_elsewhere(self.place.session.epoch, has_another_lane) {
            Ok(taken) => {
                let (from, to) = (&*from, &*taken.session.name);
                let (route, tunnel, reason) = (&*route, &*taken.tunnel, reason.label());
                tracing::debug!(route, tunnel, from, to, reason, code, "an exchange moves");
                self.take(taken);
            }
            // One that has left may be on its way back, or another come in its place.
            Err(error)
                if is_of_lane(reset.code)
                    && error.code == failure::NO_SIDECAR
                    && aim.relay.waits_for_sessions() =>
            {
                let (route, from, reason) = (&*route, &*from, reason.label());
                tracing::debug!(route, from, reason, code, "an exchange waits for another sidecar");
                self.state = State::Waits(Wait::new(&aim.relay, aim.relay.open_wait()));
            }
            Err(_) => {
                self.settle();
                return false;
            }
        }
        metrics.balance.moved(reason);
        true
    }
}

impl Drop for Moving {
    fn drop(&mut self) {
        self.settle();
    }
}

impl Aim {
    fn open_again(&self) -> Result<Taken, lend::Failure> {
        self.open(&self.relay.routing.load())
    }

    /// Gives the exchange to another session than that of `epoch`. Where that has lanes still it may take it
    /// again, before the others where the client asks for it, else after them: all its lanes may be about to
    /// go, and each that refuses costs a move.
    fn open_elsewhere(
        &mut self,
        epoch: u64,
        has_another_lane: bool,
    ) -> Result<Taken, lend::Failure> {
        if has_another_lane && self.sticky.is_some() {
            return self.open_again();
        }
        self.tried.push(epoch);
        let opened = self.open_again();
        if !has_another_lane {
            return opened;
        }
        self.tried.pop();
        opened.or_else(|_| self.open_again())
    }
}

/// Why an exchange that ended with `code`, unanswered, may go elsewhere; `None`: it may not.
fn why(asks: Asks, code: u32, is_refused: bool) -> Option<MoveReason> {
    if is_refused {
        let is_of_its_end = matches!(
            code,
            failure::NO_ROUTE
                | failure::NO_PROTOCOL
                | failure::SERVICE_UNREACHABLE
                | failure::SERVICE_RESET
                | failure::SERVICE_TIMEOUT
                | failure::OVERLOADED
                | failure::TUNNEL_LOST
                | failure::PLUGIN_FAILED
                | failure::DRAINING
        );
        // What else is refused would be refused elsewhere too: it is for what was asked.
        let reason =
            if code == failure::TUNNEL_LOST { MoveReason::Unsent } else { MoveReason::Refused };
        return is_of_its_end.then_some(reason);
    }
    let Asks::Again { freely } = asks else { return None };
    let may = match code {
        failure::TUNNEL_LOST | failure::DRAINING => true,
        // The same request may be what breaks services: only where the route says so.
        failure::SERVICE_UNREACHABLE | failure::SERVICE_RESET | failure::PLUGIN_FAILED => freely,
        _ => false,
    };
    may.then_some(MoveReason::Idempotent)
}

/// Whether it is a lane, and not the sidecar, that takes nothing.
const fn is_of_lane(code: u32) -> bool {
    matches!(code, failure::TUNNEL_LOST | failure::DRAINING)
}

/// Whether an unanswered exchange's end speaks against its sidecar.
const fn is_failure(code: u32) -> bool {
    matches!(
        code,
        failure::SERVICE_UNREACHABLE
            | failure::SERVICE_RESET
            | failure::TUNNEL_LOST
            | failure::PLUGIN_FAILED
            | failure::NO_PROTOCOL
            | failure::NO_ROUTE
    )
}

impl Sending {
    /// Polls what may have to move first; `call` is told the half that the exchange has now, and says by
    /// an error that it has ended so.
    fn poll<T>(
        &mut self,
        cx: &mut Context<'_>,
        mut call: impl FnMut(&mut SendHalf, Option<&mut Moving>, &mut Context<'_>) -> Poll<Result<T, T>>,
    ) -> Poll<T> {
        let Some(shared) = self.shared.take() else {
            return call(&mut self.inner, None, cx).map(|(Ok(done) | Err(done))| done);
        };
        let mut is_kept = true;
        let polled = 'held: {
            let Some(mut held) = shared.hold(cx) else { break 'held Poll::Pending };
            loop {
                if held.drive(cx).is_pending() {
                    held.sender = Some(cx.waker().clone());
                    break Poll::Pending;
                }
                if let Some((send, in_flight)) = held.for_send.take() {
                    (self.inner, self.in_flight) = (send, in_flight);
                }
                is_kept = held.may_move();
                let polled = call(&mut self.inner, Some(&mut held), cx);
                match polled {
                    Poll::Ready(Err(ended)) => {
                        let fate = self.inner.fate();
                        let reset = fate.and_then(|fate| fate.closed);
                        let reset = reset.unwrap_or(Reset::new(failure::CANCELLED));
                        if !held.try_move(reset, fate) {
                            break Poll::Ready(ended);
                        }
                    }
                    Poll::Ready(Ok(done)) => break Poll::Ready(done),
                    Poll::Pending => break Poll::Pending,
                }
            }
        };
        if is_kept {
            self.shared = Some(shared);
        }
        polled
    }
}

impl lend::SendHalf for Sending {
    fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        message: &mut Option<Message>,
    ) -> Poll<Result<(), Closed>> {
        self.poll(cx, |send, moving, cx| {
            let moving = moving.filter(|moving| moving.may_move());
            let Some(moving) = moving else { return send.poll_send(cx, message).map(Ok) };
            let is_dispatched = || send.fate().is_some_and(|fate| fate.dispatched);
            if !matches!(moving.asks, Asks::Again { .. })
                && !moving.kept.is_empty()
                && is_dispatched()
            {
                moving.settle();
                return send.poll_send(cx, message).map(Ok);
            }
            let copy = message.clone();
            match ready!(send.poll_send(cx, message)) {
                Ok(()) => {
                    copy.into_iter().for_each(|message| moving.keep(message));
                    Poll::Ready(Ok(Ok(())))
                }
                Err(Closed) => Poll::Ready(Err(Err(Closed))),
            }
        })
    }

    fn finish(&mut self) {
        self.inner.finish();
        if let Some(shared) = &self.shared {
            shared.is_finished.store(true, Ordering::Release);
            shared.intend();
        }
    }

    fn reset(&mut self, reset: Reset) {
        if let Some(shared) = &self.shared {
            // The first word counts.
            let _ = shared.given_up.set(reset);
            shared.intend();
        }
        self.inner.reset(reset);
    }

    fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<Reset> {
        self.poll(cx, |send, moving, cx| {
            let reset = ready!(send.poll_closed(cx));
            let may_move = moving.is_some_and(|moving| moving.may_move());
            let is_failed = may_move && reset.code != failure::NONE;
            Poll::Ready(if is_failed { Err(reset) } else { Ok(reset) })
        })
    }

    fn dispatched(&mut self) {
        self.inner.dispatched();
    }

    fn refused(&mut self, reset: Reset) {
        self.reset(reset);
    }

    /// One that is handed over stays where it is: what has passed is not known any more.
    fn dedicate(&mut self, stream: Box<dyn Stream>, ahead: Bytes) -> DedicateFuture {
        if let Some(shared) = self.shared.take()
            && let Some(mut held) = shared.hold(&Context::from_waker(Waker::noop()))
        {
            if let Some((send, in_flight)) = held.for_send.take() {
                (self.inner, self.in_flight) = (send, in_flight);
            }
            held.settle();
        }
        self.inner.dedicate(stream, ahead)
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.take() {
            shared.is_sender_gone.store(true, Ordering::Release);
            shared.intend();
        }
    }
}

impl lend::RecvHalf for Receiving {
    fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Received> {
        let Some(shared) = self.shared.take() else { return self.inner.poll_recv(cx) };
        let mut is_kept = true;
        let polled = 'held: {
            let Some(mut held) = shared.hold(cx) else { break 'held Poll::Pending };
            loop {
                if held.drive(cx).is_pending() {
                    held.receiver = Some(cx.waker().clone());
                    break Poll::Pending;
                }
                if let Some((recv, in_flight)) = held.for_recv.take() {
                    (self.inner, self.in_flight) = (recv, in_flight);
                }
                let received = self.inner.poll_recv(cx);
                match &received {
                    Poll::Ready(Received::Reset(reset)) => {
                        if held.try_move(*reset, self.inner.fate()) {
                            continue;
                        }
                        is_kept = false;
                    }
                    // One that does not move any more speaks for its sidecar all the same.
                    Poll::Ready(_) => {
                        held.answered();
                        is_kept = false;
                    }
                    Poll::Pending => {}
                }
                break received;
            }
        };
        if is_kept {
            self.shared = Some(shared);
        }
        polled
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.take() {
            // Nobody is there to hear an answer.
            let _ = shared.given_up.set(Reset::new(failure::CANCELLED));
            shared.intend();
        }
    }
}

#[cfg(test)]
mod tests;
