//! What is counted of one route's policies and of the responses of all routes.
//!
//! Looked up once per state of a route; what happens seldom (a refusal, a timeout) is looked up when it
//! does.

use std::sync::Arc;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use super::{Metrics, cell};

/// Routes that have a histogram of their own; later ones share [`super::OTHER`]. Each is three
/// kilobytes here, and nineteen lines of a scrape.
pub(super) const TIMED_ROUTES_MAX: usize = 1_000;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct RouteLabel {
    pub(super) route: Arc<str>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct StatusLabels {
    pub(super) route: Arc<str>,
    pub(super) status: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PolicyLabels {
    route: Arc<str>,
    policy: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TimeoutLabels {
    route: Arc<str>,
    timeout: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SizeLabels {
    route: Arc<str>,
    size: &'static str,
}

/// The families of routes.
#[derive(Default)]
pub(super) struct RouteFamilies {
    pub(super) responses: Family<StatusLabels, Counter>,
    pub(super) heads: Family<RouteLabel, cell::Timing>,
    running: Family<RouteLabel, Gauge>,
    refused: Family<PolicyLabels, Counter>,
    redirects: Family<RouteLabel, Counter>,
    timeouts: Family<TimeoutLabels, Counter>,
    compressed: Family<SizeLabels, Counter>,
    uncompressed: Family<RouteLabel, Counter>,
}

impl RouteFamilies {
    pub(super) fn register(&self, r: &mut Registry) {
        r.register(
            "http_responses",
            "Responses to HTTP clients, by the first digit of the status",
            self.responses.clone(),
        );
        r.register_with_unit(
            "http_response_head",
            "From a request's head to its response's",
            Unit::Seconds,
            self.heads.clone(),
        );
        r.register(
            "route_exchanges_in_flight",
            "Exchanges that run on routes with policies",
            self.running.clone(),
        );
        r.register(
            "policy_refused",
            "Exchanges that a policy of their route refused",
            self.refused.clone(),
        );
        r.register("redirects", "Requests answered by a redirect", self.redirects.clone());
        r.register(
            "policy_timeouts",
            "Exchanges cut by a timeout of their route",
            self.timeouts.clone(),
        );
        r.register_with_unit(
            "compression",
            "Bodies that were compressed, before (plain) and after (gzip)",
            Unit::Bytes,
            self.compressed.clone(),
        );
        r.register(
            "compression_skipped",
            "Responses that passed as they were because as many were being compressed as may",
            self.uncompressed.clone(),
        );
    }
}

/// The metrics of one route that has policies.
pub struct RouteMetrics {
    metrics: Arc<Metrics>,
    route: Arc<str>,
    running: Gauge,
}

impl Metrics {
    /// Returns the metrics of a route's policies.
    #[must_use]
    pub fn route(self: &Arc<Self>, name: &Arc<str>) -> RouteMetrics {
        let route = self.name(name);
        let label = RouteLabel { route: Arc::clone(&route) };
        let running = self.routes.running.get_or_create_owned(&label);
        RouteMetrics { metrics: Arc::clone(self), route, running }
    }
}

impl RouteMetrics {
    fn label(&self) -> RouteLabel {
        RouteLabel { route: Arc::clone(&self.route) }
    }

    /// Makes the rows of what the route's policies may count, so that a rate over the first event is
    /// seen.
    pub fn begin(
        &self,
        policies: impl Iterator<Item = &'static str>,
        timeouts: impl Iterator<Item = &'static str>,
        redirects: bool,
    ) {
        let routes = &self.metrics.routes;
        for policy in policies {
            let labels = PolicyLabels { route: Arc::clone(&self.route), policy };
            drop(routes.refused.get_or_create(&labels));
        }
        for timeout in timeouts {
            let labels = TimeoutLabels { route: Arc::clone(&self.route), timeout };
            drop(routes.timeouts.get_or_create(&labels));
        }
        if redirects {
            drop(routes.redirects.get_or_create(&self.label()));
        }
    }

    /// An exchange runs.
    pub fn begun(&self) {
        self.running.inc();
    }

    /// It has ended.
    pub fn ended(&self) {
        self.running.dec();
    }

    /// A policy has refused an exchange.
    pub fn refused(&self, policy: &'static str) {
        let labels = PolicyLabels { route: Arc::clone(&self.route), policy };
        self.metrics.routes.refused.get_or_create(&labels).inc();
    }

    /// A request was sent elsewhere.
    pub fn redirected(&self) {
        self.metrics.routes.redirects.get_or_create(&self.label()).inc();
    }

    /// A timeout has cut an exchange.
    pub fn timed_out(&self, timeout: &'static str) {
        let labels = TimeoutLabels { route: Arc::clone(&self.route), timeout };
        self.metrics.routes.timeouts.get_or_create(&labels).inc();
    }

    /// A chunk was compressed.
    pub fn compressed(&self, plain: usize, gzip: usize) {
        for (size, bytes) in [("plain", plain), ("gzip", gzip)] {
            let labels = SizeLabels { route: Arc::clone(&self.route), size };
            self.metrics.routes.compressed.get_or_create(&labels).inc_by(bytes as u64);
        }
    }

    /// A response was not compressed for want of room.
    pub fn uncompressed(&self) {
        self.metrics.routes.uncompressed.get_or_create(&self.label()).inc();
    }
}

/// Returns the label of a status: its first digit.
pub(super) const fn class(status: u16) -> &'static str {
    match status / 100 {
        1 => "1xx",
        2 => "2xx",
        3 => "3xx",
        4 => "4xx",
        5 => "5xx",
        _ => super::OTHER,
    }
}
