//! What is counted of connections that carry one exchange's bytes each.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::Up;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    role: &'static str,
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HowLabels {
    role: &'static str,
    how: &'static str,
}

/// The metrics of dedicated connections.
#[derive(Default)]
pub struct DedicatedMetrics {
    connections: Family<StateLabels, Gauge>,
    exchanges: Family<HowLabels, Counter>,
}

impl DedicatedMetrics {
    pub(super) fn register(&self, r: &mut Registry) {
        r.register(
            "dedicated_connections",
            "Connections between sidecar and relay that wait for an exchange, or carry one's bytes",
            self.connections.clone(),
        );
        r.register(
            "dedicated_exchanges",
            "Exchanges that were to have a connection of their own: those that got one, and those \
             that went on in messages",
            self.exchanges.clone(),
        );
    }

    /// The process has this role: its rows stand from here on.
    pub(super) fn role(&self, role: &'static str) {
        for state in ["waiting", "used"] {
            drop(self.connections.get_or_create(&StateLabels { role, state }));
        }
        for how in ["dedicated", "framed"] {
            drop(self.exchanges.get_or_create(&HowLabels { role, how }));
        }
    }

    /// A connection waits for an exchange until the guard goes.
    #[must_use]
    pub fn waiting(&self, role: &'static str) -> Up {
        Up::new(self.connections.get_or_create_owned(&StateLabels { role, state: "waiting" }))
    }

    /// A connection is an exchange's until the guard goes.
    #[must_use]
    pub fn used(&self, role: &'static str) -> Up {
        self.exchanges.get_or_create(&HowLabels { role, how: "dedicated" }).inc();
        Up::new(self.connections.get_or_create_owned(&StateLabels { role, state: "used" }))
    }

    /// An exchange that was to have a connection of its own goes on in messages.
    pub fn framed(&self, role: &'static str) {
        self.exchanges.get_or_create(&HowLabels { role, how: "framed" }).inc();
    }
}
