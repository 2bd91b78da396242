//! One lane as the rest of core sees it: the state machine behind its lock, and what may be known
//! without taking it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use sidelane_tunnel::{Key, Lane, OpenError, RequestId, Reset, proto};

use super::exchange::{RecvHalf, SendHalf};
use crate::metrics::Flow;

/// A lane of a session.
pub struct Link {
    /// Which of its session's lanes, from 0.
    pub number: u32,
    /// The data-path thread that drives it.
    pub shard: usize,
    lane: Mutex<Lane>,
    /// No new exchanges: the peer is going away, or we are.
    leaving: AtomicBool,
    /// The driver ends once everything queued is written.
    closing: AtomicBool,
    /// The driver ends at once.
    severed: AtomicBool,
    exchanges: AtomicUsize,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link")
            .field("number", &self.number)
            .field("shard", &self.shard)
            .finish_non_exhaustive()
    }
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
            leaving: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            severed: AtomicBool::new(false),
            exchanges: AtomicUsize::new(0),
        })
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

    /// Exchanges whose send half is held here. Cheap: a hint for choosing a lane.
    pub fn load(&self) -> usize {
        self.exchanges.load(Ordering::Relaxed)
    }

    /// Whether new exchanges may be opened.
    pub fn is_open(&self) -> bool {
        !self.leaving.load(Ordering::Acquire)
    }

    /// Takes no new exchanges from here on.
    pub fn leave(&self) {
        self.leaving.store(true, Ordering::Release);
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
        self.with(|lane| lane.close(lost));
    }

    /// Asks the driver to end once everything queued is written.
    pub fn close(&self) {
        self.leave();
        self.closing.store(true, Ordering::Release);
        self.with(Lane::wake_driver);
    }

    /// Tells the peer that the lane does not come back, and asks the driver to end once everything queued
    /// is written.
    pub fn end(&self, code: u32, detail: &str) {
        self.leave();
        self.with(|lane| lane.go_away(proto::GoAway { last: true, ..go_away(code, detail) }));
        self.close();
    }

    /// Tells the peer that this end goes soon, and opens and takes exchanges all the same.
    pub fn foretell(&self, code: u32, detail: &str) {
        self.with(|lane| lane.ask_away(go_away(code, detail)));
    }

    /// Ends its exchanges at once, tells the peer why, and asks the driver to end once that is written.
    pub fn revoke(&self, code: u32, detail: &str, reset: Reset) {
        self.leave();
        self.with(|lane| {
            lane.end_exchanges(reset);
            lane.go_away(proto::GoAway { last: true, ..go_away(code, detail) });
        });
        self.close();
    }

    /// Asks the driver to end at once, whatever is queued: at the latest when it looks at the time next,
    /// for a ping.
    pub fn sever(&self) {
        self.leave();
        self.severed.store(true, Ordering::Release);
        self.with(Lane::wake_driver);
    }

    /// What the admin page says of it.
    pub fn describe(&self) -> serde_json::Value {
        let stats = self.with(|lane| lane.stats());
        serde_json::json!({
            "lane": self.number,
            "thread": self.shard,
            "open": self.is_open(),
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
        self.closing.load(Ordering::Acquire)
    }

    pub(super) fn is_severed(&self) -> bool {
        self.severed.load(Ordering::Acquire)
    }

    pub(super) fn exchange_ended(&self) {
        self.exchanges.fetch_sub(1, Ordering::Relaxed);
    }
}
