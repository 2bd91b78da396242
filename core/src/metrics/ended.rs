//! Exchanges that have ended, for whoever follows them. Nothing here is made, and nothing of it costs an
//! exchange more than a look, where nobody does.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Ends that wait for a follower; beyond, the oldest are lost to it. A screen scrolls no faster.
pub(super) const WAITING_MAX: usize = 1024;

/// Longest target kept. A line for people is shorter still.
const TARGET_BYTES_MAX: usize = 1024;

/// An exchange that has ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// `relay` or `sidecar`.
    pub role: &'static str,
    /// Protocol type.
    pub protocol_type: Arc<str>,
    /// Empty where none was found.
    pub route: Arc<str>,
    /// `none`, or why it failed.
    pub code: &'static str,
    /// From its begin.
    pub duration: Duration,
    /// Method and target of an HTTP-born one, as far as the role knows them: at a relay.
    pub request: Option<(String, String)>,
    /// Status of its response, as far as the role knows it.
    pub status: Option<u16>,
    /// Payload sent into the tunnel.
    pub bytes_sent: u64,
    /// Payload received from the tunnel.
    pub bytes_received: u64,
}

/// What is kept of an exchange that runs.
#[derive(Default)]
pub(super) struct Details {
    request: OnceLock<(String, String)>,
    tally: Arc<Tally>,
}

/// Bytes of one exchange.
#[derive(Default)]
pub(super) struct Tally {
    sent: AtomicU64,
    received: AtomicU64,
}

impl Tally {
    pub(super) fn sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn passed(&self, sent: u64, received: u64) {
        self.sent(sent);
        self.received(received);
    }
}

impl Details {
    pub(super) fn asked(&self, method: &str, target: &[u8]) {
        self.request.get_or_init(|| {
            let target = &target[..target.len().min(TARGET_BYTES_MAX)];
            (method.to_owned(), String::from_utf8_lossy(target).into_owned())
        });
    }

    pub(super) fn tally(&self) -> Arc<Tally> {
        Arc::clone(&self.tally)
    }

    pub(super) fn ended(
        &self,
        role: &'static str,
        protocol_type: &Arc<str>,
        route: &Arc<str>,
        code: &'static str,
        began: Instant,
        status: Option<u16>,
    ) -> Ended {
        Ended {
            role,
            protocol_type: Arc::clone(protocol_type),
            route: Arc::clone(route),
            code,
            duration: began.elapsed(),
            request: self.request.get().cloned(),
            status,
            bytes_sent: self.tally.sent.load(Ordering::Relaxed),
            bytes_received: self.tally.received.load(Ordering::Relaxed),
        }
    }
}
