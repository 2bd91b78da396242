//! One lane as the rest of core sees it: the state machine behind its lock, and what may be known
//! without taking it.
//!
//! A lane outlives its connections. While it has none its exchanges wait; whoever drives it says what
//! became of a connection, and whether the lane waits for the next one.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::Waker;
use std::time::Duration;

use sidelane_abi::failure;
use sidelane_tunnel::{Key, Lane, LaneError, OpenError, RequestId, Reset, proto};
use tokio::sync::Notify;

use super::LaneEnd;
use super::carrier::Kind;
use super::dedicated::Dedication;
use super::exchange::{RecvHalf, SendHalf};
use super::returning::{NotTaken, Return, Returns};
use crate::metrics::Flow;

/// How long a lane that we close waits for the peer to acknowledge what was sent, and one whose session
/// is ended for it to be written.
pub(super) const CLOSE_LINGER: Duration = Duration::from_secs(1);

/// What the ring counts for a message beside its bytes.
const MESSAGE_COST: u64 = 64;

/// No new exchanges: the peer is going away, or we are.
const LEAVING: u32 = 1;
/// The driver ends once everything queued is written, and the lane does not come back.
const CLOSING: u32 = 1 << 1;
/// What is queued has [`CLOSE_LINGER`] to be written.
const HURRIED: u32 = 1 << 2;
/// The driver ends at once, and the lane does not come back.
const SEVERED: u32 = 1 << 3;
/// The peer has said that the lane does not come back.
const LAST: u32 = 1 << 4;
/// A connection is driven.
const ATTACHED: u32 = 1 << 5;
/// Something came on this connection.
const HEARD: u32 = 1 << 6;
/// The peer knows of the lane: something came on a connection of it.
const KNOWN: u32 = 1 << 7;
/// The peer is silent for longer than the round trip explains.
const SUSPECT: u32 = 1 << 8;
/// Another connection waits to take this one's place: nothing more is read.
const FENCED: u32 = 1 << 9;
/// We give up the connection for another.
const REPLACED: u32 = 1 << 10;
/// Has another connection, and nobody who waits for that was told.
const RETURNED: u32 = 1 << 11;
/// Something came on the connection before.
const WAS_HEARD: u32 = 1 << 12;

/// A lane of a session.
pub struct Link {
    /// Which of its session's lanes, from 0.
    pub number: u32,
    /// The data-path thread that drives it.
    pub shard: usize,
    lane: Mutex<Lane>,
    state: AtomicU32,
    exchanges: AtomicUsize,
    /// How its exchanges get connections of their own; unset: not at all.
    dedication: OnceLock<Dedication>,
    /// Exchanges that ended with the lane.
    lost: AtomicUsize,
    returns: Returns,
    /// What its connection, or its last one, is: an index of [`Kind::ALL`].
    carrier: AtomicUsize,
    /// Told whenever whoever waits for a connection is to look at `state` again.
    changed: Notify,
    /// The driver's, while it waits for the socket to take what is to be written.
    blocked: Mutex<Option<Waker>>,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link")
            .field("number", &self.number)
            .field("shard", &self.shard)
            .finish_non_exhaustive()
    }
}

/// What a lane without a connection gets.
#[derive(Debug)]
pub enum Awaited {
    /// Another connection.
    Return(Box<Return>),
    /// Nothing: it is closed, or its time is up.
    Nothing,
}

fn go_away(code: u32, detail: &str) -> proto::GoAway {
    proto::GoAway { code, detail: detail.to_owned(), last: false }
}

impl Link {
    /// Returns a link over `lane`.
    #[must_use]
    pub fn new(number: u32, shard: usize, lane: Lane) -> Arc<Self> {
        Arc::new(Self {
            number,
            shard,
            lane: Mutex::new(lane),
            state: AtomicU32::new(0),
            exchanges: AtomicUsize::new(0),
            lost: AtomicUsize::new(0),
            returns: Returns::default(),
            carrier: AtomicUsize::new(0),
            changed: Notify::new(),
            blocked: Mutex::new(None),
            dedication: OnceLock::new(),
        })
    }

    /// Says how its exchanges get connections of their own. Once, before the first exchange.
    pub fn dedicates(&self, by: Dedication) {
        // A second one says the same.
        let _ = self.dedication.set(by);
    }

    pub(super) fn dedication(&self) -> Option<&Dedication> {
        self.dedication.get()
    }

    fn has_any(&self, bits: u32) -> bool {
        self.state.load(Ordering::Acquire) & bits != 0
    }

    /// Returns what it was.
    fn set(&self, bits: u32) -> u32 {
        self.state.fetch_or(bits, Ordering::AcqRel)
    }

    fn unset(&self, bits: u32) -> u32 {
        self.state.fetch_and(!bits, Ordering::AcqRel)
    }

    /// Runs `f` under the lock and calls the wakers that it made ready after it: a waker may run a
    /// plugin's code, and that may come back here.
    pub fn with<T>(&self, f: impl FnOnce(&mut Lane) -> T) -> T {
        let mut lane = self.lane.lock().unwrap_or_else(PoisonError::into_inner);
        let result = f(&mut lane);
        if lane.has_wakes() {
            let wakes = lane.take_wakes();
            drop(lane);
            wakes.wake();
        }
        result
    }

    /// Opens an exchange, whose halves [`Link::halves`] gives. `make_id` is called under the lock. `open`
    /// is taken but where the lane is leaving: then it is for another.
    ///
    /// # Errors
    /// Where the lane is leaving or full.
    pub fn open(
        &self,
        make_id: impl FnOnce() -> RequestId,
        protocol_type: u32,
        open: &mut proto::Open,
    ) -> Result<(RequestId, Key), OpenError> {
        self.with(|lane| {
            if lane.is_leaving() {
                return Err(OpenError::GoingAway);
            }
            let id = make_id();
            lane.open(id, protocol_type, std::mem::take(open)).map(|key| (id, key))
        })
    }

    /// Returns the halves of an exchange. Called once per key.
    pub fn halves(self: &Arc<Self>, key: Key, flow: Arc<Flow>) -> (SendHalf, RecvHalf) {
        self.exchanges.fetch_add(1, Ordering::Relaxed);
        let send = SendHalf::new(Arc::clone(self), key, Arc::clone(&flow));
        (send, RecvHalf::new(Arc::clone(self), key, flow))
    }

    /// Refuses an exchange that the peer opened: nothing of it was or will be written to a service.
    pub fn refuse(&self, key: Key, reset: Reset) {
        self.with(|lane| {
            lane.refused(key, reset);
            lane.drop_send(key);
            lane.drop_recv(key);
        });
    }

    /// Its connection from here on is of this kind.
    pub fn runs_on(&self, carrier: Kind) {
        self.carrier.store(carrier as usize, Ordering::Relaxed);
    }

    /// What its connection, or its last one, is.
    pub fn carrier(&self) -> Kind {
        Kind::ALL.get(self.carrier.load(Ordering::Relaxed)).copied().unwrap_or(Kind::Tcp)
    }

    /// Exchanges whose send half is held here. Cheap: a hint for choosing a lane.
    pub fn load(&self) -> usize {
        self.exchanges.load(Ordering::Relaxed)
    }

    /// Whether new exchanges may be opened: there is a connection on which the peer was heard, and nobody
    /// is leaving.
    pub fn is_open(&self) -> bool {
        let wanted = ATTACHED | HEARD;
        self.state.load(Ordering::Acquire) & (wanted | LEAVING) == wanted
    }

    /// Whether it has lost its connection, and may take new exchanges once it has another.
    pub fn is_suspended(&self) -> bool {
        !self.is_open() && !self.has_any(LEAVING) && self.has_any(KNOWN)
    }

    /// Whether one end takes no new exchanges on it.
    pub fn is_leaving(&self) -> bool {
        self.has_any(LEAVING)
    }

    /// Whether one end has said that it does not come back.
    pub fn is_leaving_for_good(&self) -> bool {
        self.is_ending()
    }

    /// Whether a connection is driven.
    pub fn is_attached(&self) -> bool {
        self.has_any(ATTACHED)
    }

    /// Whether the peer is silent for longer than the round trip explains.
    pub fn is_suspect(&self) -> bool {
        self.has_any(SUSPECT)
    }

    /// Takes no new exchanges from here on.
    pub fn leave(&self) {
        self.set(LEAVING);
    }

    /// Tells the peer to open no more exchanges, and takes none.
    pub fn go_away(&self, code: u32, detail: &str) {
        self.leave();
        self.with(|lane| lane.go_away(go_away(code, detail)));
    }

    /// Asks the peer to open no more exchanges, and takes those that cross the question.
    pub fn ask_away(&self, code: u32, detail: &str) {
        self.leave();
        self.with(|lane| lane.ask_away(go_away(code, detail)));
    }

    /// Presents another credential to the peer. False: it is longer than that accepts.
    pub fn authenticate(&self, credential: &[u8]) -> bool {
        let credential = credential.to_vec().into();
        self.with(|lane| lane.authenticate(proto::Authenticate { credential }))
    }

    /// Ends the lane and its exchanges where no driver will.
    pub fn abandon(&self, lost: Reset) {
        self.leave();
        self.with(|lane| {
            if lane.closed().is_none() {
                self.lost.store(lane.stats().exchanges_on_wire, Ordering::Relaxed);
            }
            lane.close(lost);
        });
        // Whoever dialled for it learns of it by the closed connection.
        drop(self.returns.end());
    }

    /// Tells the peer that the lane does not come back, and asks the driver to end once everything queued
    /// is written, and acknowledged where the peer does that.
    pub fn close(&self) {
        self.close_for(failure::DRAINING, "the lane is closed");
    }

    /// The same, for a reason.
    pub fn end(&self, code: u32, detail: &str) {
        self.close_for(code, detail);
    }

    /// Tells the peer that this end goes soon, and opens and takes exchanges all the same.
    pub fn foretell(&self, code: u32, detail: &str) {
        self.with(|lane| lane.ask_away(go_away(code, detail)));
    }

    fn close_for(&self, code: u32, detail: &str) {
        if self.set(LEAVING | CLOSING) & CLOSING == 0 {
            self.with(|lane| lane.go_away(proto::GoAway { last: true, ..go_away(code, detail) }));
        }
        self.interrupt();
    }

    /// Ends its exchanges at once, tells the peer why, and asks the driver to end once that is written, or
    /// has had its time.
    pub fn revoke(&self, code: u32, detail: &str, reset: Reset) {
        self.set(LEAVING | HURRIED);
        self.with(|lane| lane.end_exchanges(reset));
        self.close_for(code, detail);
    }

    /// Asks the driver to end at once, whatever is queued.
    pub fn sever(&self) {
        self.set(LEAVING | SEVERED);
        self.interrupt();
    }

    /// Gives up the connection for another one, which the caller has: the driver ends at once, and the
    /// lane waits.
    pub fn replace(&self) {
        self.set(REPLACED);
        self.interrupt();
    }

    /// Whoever drives the lane, or waits for its next connection, looks at it again.
    fn interrupt(&self) {
        self.with(Lane::wake_driver);
        let blocked = self.lock_blocked().take();
        if let Some(waker) = blocked {
            waker.wake();
        }
        self.changed.notify_one();
    }

    fn lock_blocked(&self) -> std::sync::MutexGuard<'_, Option<Waker>> {
        self.blocked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // --- connections ------------------------------------------------------------------------------

    /// The peer knows of the lane, whatever comes on its first connection.
    pub fn known(&self) {
        self.set(KNOWN);
    }

    /// The peer has said that it closes the lane for good.
    pub fn ends(&self) {
        self.set(LEAVING | LAST);
    }

    /// Gives the lane another connection. Its driver reads nothing more from the one before, and then
    /// [`Link::returned`] has this one.
    ///
    /// # Errors
    /// It is not taken.
    pub fn offer(&self, next: Return) -> Result<(), (Box<Return>, NotTaken)> {
        self.returns.offer(next, || {
            self.set(FENCED);
        })?;
        self.interrupt();
        Ok(())
    }

    /// Waits for another connection until `deadline`, or until the lane is closed.
    pub async fn returned(&self, deadline: tokio::time::Instant) -> Awaited {
        loop {
            if self.is_ending() {
                return Awaited::Nothing;
            }
            let taken = self.returns.take(|| {
                self.unset(FENCED);
            });
            if let Some(next) = taken {
                return Awaited::Return(next);
            }
            if tokio::time::timeout_at(deadline, self.changed.notified()).await.is_err() {
                return Awaited::Nothing;
            }
        }
    }

    /// Waits until the lane is closed while it has no connection.
    pub async fn ended(&self) {
        while !self.is_ending() {
            self.changed.notified().await;
        }
    }

    fn is_ending(&self) -> bool {
        self.has_any(CLOSING | SEVERED | LAST)
    }

    /// There is another connection, and the peer has so many counted messages. To be called before it is
    /// driven.
    ///
    /// # Errors
    /// What the peer lacks is not kept any more.
    pub fn resume(&self, received: u64) -> Result<(), LaneError> {
        let now = tokio::time::Instant::now().into_std();
        self.with(|lane| lane.resume(now, received))?;
        self.set(KNOWN);
        Ok(())
    }

    /// Counted messages that have come: what the peer is told when the lane comes back.
    pub fn received(&self) -> u64 {
        self.with(|lane| lane.received())
    }

    /// How far both directions have come: it grows with everything that was acknowledged or received.
    pub fn progress(&self) -> u64 {
        let stats = self.with(|lane| lane.stats());
        stats.acknowledged + stats.received
    }

    /// What the peer lacks, as it said when the lane came back: counted messages, and their bytes.
    pub fn to_replay(&self) -> (u64, u64) {
        let stats = self.with(|lane| lane.stats());
        let messages = stats.sent - stats.acknowledged;
        (messages, stats.replay_bytes.saturating_sub(messages * MESSAGE_COST))
    }

    /// Whether something came on the connection before.
    pub fn was_heard(&self) -> bool {
        self.has_any(WAS_HEARD)
    }

    /// Whether the lane has another connection since this was asked last, and can take exchanges.
    pub fn take_returned(&self) -> bool {
        self.is_open() && self.unset(RETURNED) & RETURNED != 0
    }

    /// Exchanges that ended with the lane.
    pub fn lost(&self) -> usize {
        self.lost.load(Ordering::Relaxed)
    }

    /// Whether it has no connection and waits for one.
    pub fn is_detached(&self) -> bool {
        self.with(|lane| lane.closed().is_none() && !lane.is_attached())
    }

    /// A connection is driven from here on.
    pub(super) fn attach(&self) {
        self.unset(HEARD | SUSPECT);
        self.set(ATTACHED | RETURNED);
    }

    /// Something came on the connection.
    pub(super) fn hear(&self) {
        if !self.has_any(HEARD) {
            self.set(HEARD | KNOWN);
        }
    }

    pub(super) fn suspect(&self, is_suspect: bool) {
        if is_suspect {
            self.set(SUSPECT);
        } else {
            self.unset(SUSPECT);
        }
    }

    /// The connection is not driven any more. The lane waits for another one where it may come back, else
    /// its exchanges end with `lost`.
    pub(super) fn detach(&self, end: Option<&LaneEnd>, lost: Reset) {
        let waits = end.is_some_and(|end| self.waits_after(end));
        let before = self.unset(ATTACHED | HEARD | SUSPECT | REPLACED | WAS_HEARD);
        if before & HEARD != 0 {
            self.set(WAS_HEARD);
        }
        if waits {
            self.with(Lane::detach);
        } else {
            self.abandon(lost);
        }
    }

    fn waits_after(&self, end: &LaneEnd) -> bool {
        let is_wanted = match end {
            // Whoever has another connection for it knows of the lane.
            LaneEnd::Replaced => true,
            // The welcome may be lost, and then nobody knows of it.
            LaneEnd::Closed | LaneEnd::Io(_) | LaneEnd::Lane(LaneError::Dead(_)) => {
                self.has_any(KNOWN)
            }
            LaneEnd::Lane(_) | LaneEnd::Local => false,
        };
        is_wanted && !self.is_ending() && self.with(|lane| lane.may_resume())
    }

    /// The driver waits for its socket: it is woken by this where it is to look at the lane before.
    pub(super) fn wait_blocked(&self, waker: &Waker) {
        let mut blocked = self.lock_blocked();
        if !blocked.as_ref().is_some_and(|known| known.will_wake(waker)) {
            *blocked = Some(waker.clone());
        }
    }

    /// What the admin page says of it.
    pub fn describe(&self) -> serde_json::Value {
        let stats = self.with(|lane| lane.stats());
        serde_json::json!({
            "lane": self.number,
            "carrier": self.carrier().label(),
            "thread": self.shard,
            "open": self.is_open(),
            "attached": self.is_attached(),
            "suspect": self.is_suspect(),
            "resumes": stats.resumes,
            "replay_bytes": stats.replay_bytes,
            "replay_limit_bytes": stats.replay_limit,
            "replayed_messages": stats.replayed,
            "replayed_bytes": stats.replayed_bytes,
            "exchanges": stats.exchanges,
            "messages_sent": stats.sent,
            "messages_received": stats.received,
            "bytes_sent": stats.bytes_out,
            "bytes_received": stats.bytes_in,
            "queued_bytes": stats.send_queued_bytes,
            "unread_bytes": stats.receive_queued_bytes,
            "round_trip_us": stats.rtt.map(|rtt| u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX)),
        })
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.has_any(CLOSING)
    }

    pub(super) fn is_hurried(&self) -> bool {
        self.has_any(HURRIED)
    }

    /// Why the driver is to end at once.
    pub(super) fn interruption(&self) -> Option<LaneEnd> {
        match self.state.load(Ordering::Acquire) & (SEVERED | FENCED | REPLACED) {
            0 => None,
            bits if bits & SEVERED != 0 => Some(LaneEnd::Local),
            _ => Some(LaneEnd::Replaced),
        }
    }

    /// As if it had a connection on which the peer was heard.
    #[cfg(test)]
    pub(crate) fn pretend_open(&self) {
        self.attach();
        self.hear();
    }

    pub(super) fn exchange_ended(&self) {
        self.exchanges.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
