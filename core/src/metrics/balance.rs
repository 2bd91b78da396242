//! What is counted of sidecars that share tunnels: those left aside, and exchanges that move.

use std::sync::Arc;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TunnelLabel {
    tunnel: Arc<str>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

/// Why an exchange may go to another sidecar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MoveReason {
    /// The sidecar has said that nothing of it reached a service.
    Refused,
    /// Nothing of it was written to the lane that is lost.
    Unsent,
    /// It may be carried out twice.
    Idempotent,
}

impl MoveReason {
    const ALL: [Self; 3] = [Self::Refused, Self::Unsent, Self::Idempotent];

    /// As a label.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::Unsent => "unsent",
            Self::Idempotent => "idempotent",
        }
    }
}

/// Counters of a relay's sidecars.
#[derive(Default)]
pub struct BalanceMetrics {
    ejections: Family<TunnelLabel, Counter>,
    ejected: Gauge,
    moved: Family<ReasonLabel, Counter>,
    not_moved: Counter,
}

impl BalanceMetrics {
    pub(super) fn register(&self, r: &mut Registry) {
        r.register(
            "sidecar_ejections",
            "Times that a sidecar was left aside since its exchanges failed",
            self.ejections.clone(),
        );
        r.register(
            "sidecars_ejected",
            "Sidecars that are left aside, each once per tunnel",
            self.ejected.clone(),
        );
        r.register(
            "exchanges_moved",
            "Exchanges sent to another sidecar when their own failed, by why that may be",
            self.moved.clone(),
        );
        r.register(
            "exchanges_not_moved",
            "Exchanges that could have been repeated elsewhere, but for the budget",
            self.not_moved.clone(),
        );
        for reason in MoveReason::ALL {
            drop(self.moved.get_or_create(&ReasonLabel { reason: reason.label() }));
        }
    }

    /// A sidecar is left aside on a tunnel.
    pub fn ejected(&self, tunnel: &Arc<str>) {
        self.ejections.get_or_create(&TunnelLabel { tunnel: Arc::clone(tunnel) }).inc();
    }

    /// So many are.
    pub fn set_ejected(&self, count: usize) {
        self.ejected.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// Whether any was when they were last counted.
    #[must_use]
    pub fn is_any_ejected(&self) -> bool {
        self.ejected.get() != 0
    }

    /// An exchange goes to another sidecar.
    pub fn moved(&self, reason: MoveReason) {
        self.moved.get_or_create(&ReasonLabel { reason: reason.label() }).inc();
    }

    /// One could have, but for the budget.
    pub fn not_moved(&self) {
        self.not_moved.inc();
    }
}
