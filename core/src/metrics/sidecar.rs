//! What the sidecar's end counts beside exchanges: retries, the health of services, and what relays
//! say of its document. Labels are names from configurations.

use std::sync::Arc;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RouteLabel {
    route: Arc<str>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TunnelLabel {
    tunnel: Arc<str>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CheckLabels {
    tunnel: Arc<str>,
    result: &'static str,
}

/// Counters of the sidecar's end.
#[derive(Default)]
pub struct SidecarMetrics {
    retries: Family<RouteLabel, Counter>,
    retries_exhausted: Family<RouteLabel, Counter>,
    healthy: Family<TunnelLabel, Gauge>,
    checks: Family<CheckLabels, Counter>,
    announcement_refused: Gauge,
    credential_refused: Gauge,
    resolve_failures: Counter,
}

impl SidecarMetrics {
    pub(super) fn register(&self, r: &mut Registry) {
        r.register("retries", "Exchanges sent to a service once more", self.retries.clone());
        r.register(
            "retries_exhausted",
            "Retries that the route's budget, or its number of attempts, did not allow",
            self.retries_exhausted.clone(),
        );
        r.register(
            "service_healthy",
            "1 where the tunnel's service passes its health check",
            self.healthy.clone(),
        );
        r.register("health_checks", "Health checks of services, by result", self.checks.clone());
        r.register(
            "announcement_refused",
            "1 while a connected relay refuses the newest document of this sidecar",
            self.announcement_refused.clone(),
        );
        r.register(
            "credential_renewal_refused",
            "1 while a connected relay refuses the newest credential of this sidecar",
            self.credential_refused.clone(),
        );
        r.register(
            "relay_resolve_failures",
            "Times that a relay's name could not be resolved",
            self.resolve_failures.clone(),
        );
    }

    /// An exchange of the route is sent once more. The budgets bound how many routes there are.
    pub fn retried(&self, route: &Arc<str>) {
        self.retries.get_or_create(&RouteLabel { route: Arc::clone(route) }).inc();
    }

    /// An exchange of the route would have been sent once more.
    pub fn retry_refused(&self, route: &Arc<str>) {
        self.retries_exhausted.get_or_create(&RouteLabel { route: Arc::clone(route) }).inc();
    }

    /// Whether a tunnel's service can be served; `None`: nobody checks it any more.
    pub fn set_healthy(&self, tunnel: &Arc<str>, is_healthy: Option<bool>) {
        let label = TunnelLabel { tunnel: Arc::clone(tunnel) };
        match is_healthy {
            Some(is_healthy) => {
                self.healthy.get_or_create(&label).set(i64::from(is_healthy));
            }
            None => {
                self.healthy.remove(&label);
            }
        }
    }

    /// A check of a tunnel's service has ended.
    pub fn checked(&self, tunnel: &Arc<str>, is_good: bool) {
        let result = if is_good { "success" } else { "failure" };
        self.checks.get_or_create(&CheckLabels { tunnel: Arc::clone(tunnel), result }).inc();
    }

    /// Whether a relay refuses the newest document.
    pub fn set_announcement_refused(&self, is_refused: bool) {
        self.announcement_refused.set(i64::from(is_refused));
    }

    /// Whether a relay refuses the newest credential in a running session.
    pub fn set_credential_refused(&self, is_refused: bool) {
        self.credential_refused.set(i64::from(is_refused));
    }

    /// A relay's name could not be resolved.
    pub fn resolve_failed(&self) {
        self.resolve_failures.inc();
    }
}
