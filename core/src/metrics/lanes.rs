//! What is counted of lanes that lose their connections and come back. Labels are roles and reasons.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::tunnel::pressure::Held;

/// Upper bounds of the times of outages, in seconds: from a round trip on loopback to a long grace.
const OUTAGES: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0];

/// Why a lane does not come back (`RefuseReason`).
const REASONS: [&str; 6] =
    ["UNKNOWN_SESSION", "WRONG_RELAY", "UNKNOWN_LANE", "STALE", "GAP", "OVERLOADED"];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RoleLabel {
    role: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Clone)]
struct Outages;

impl MetricConstructor<Histogram> for Outages {
    fn new_metric(&self) -> Histogram {
        Histogram::new(OUTAGES)
    }
}

type Timings = Family<RoleLabel, Histogram, Outages>;

/// Counters of lanes' connections.
pub struct LaneMetrics {
    connections_lost: Family<RoleLabel, Counter>,
    resumes: Family<RoleLabel, Counter>,
    outage: Timings,
    dial: Timings,
    replayed_messages: Family<RoleLabel, Counter>,
    replayed_bytes: Family<RoleLabel, Counter>,
    exchanges_lost: Family<RoleLabel, Counter>,
    fenced: Counter,
    refused: Family<ReasonLabel, Counter>,
    queued: Family<RoleLabel, Gauge>,
    replay: Family<RoleLabel, Gauge>,
    budget: Family<RoleLabel, Gauge>,
    detached: Family<RoleLabel, Gauge>,
    suspect: Family<RoleLabel, Gauge>,
}

impl Default for LaneMetrics {
    fn default() -> Self {
        Self {
            connections_lost: Family::default(),
            resumes: Family::default(),
            outage: Family::new_with_constructor(Outages),
            dial: Family::new_with_constructor(Outages),
            replayed_messages: Family::default(),
            replayed_bytes: Family::default(),
            exchanges_lost: Family::default(),
            fenced: Counter::default(),
            refused: Family::default(),
            queued: Family::default(),
            replay: Family::default(),
            budget: Family::default(),
            detached: Family::default(),
            suspect: Family::default(),
        }
    }
}

impl LaneMetrics {
    pub(super) fn register(&self, r: &mut Registry) {
        r.register(
            "lane_connections_lost",
            "Connections that lanes lost, and came back on others or not",
            self.connections_lost.clone(),
        );
        r.register("lane_resumes", "Times that lanes came back", self.resumes.clone());
        r.register_with_unit(
            "lane_outage",
            "From the loss of a lane's connection to its return",
            Unit::Seconds,
            self.outage.clone(),
        );
        r.register_with_unit(
            "lane_resume_dial",
            "From the dial by which a lane came back to its return",
            Unit::Seconds,
            self.dial.clone(),
        );
        r.register(
            "lane_replayed_messages",
            "Messages to be sent again when lanes came back",
            self.replayed_messages.clone(),
        );
        r.register_with_unit(
            "lane_replayed",
            "Bytes of these messages",
            Unit::Bytes,
            self.replayed_bytes.clone(),
        );
        r.register(
            "lane_exchanges_lost",
            "Exchanges that ended with their lane",
            self.exchanges_lost.clone(),
        );
        r.register(
            "lane_connections_fenced",
            "Connections given up because the sidecar has dialled another for their lane",
            self.fenced.clone(),
        );
        r.register(
            "lane_resumes_refused",
            "Dials for a lane that could not come back, by why",
            self.refused.clone(),
        );
        r.register_with_unit(
            "queued",
            "Messages of exchanges that wait, to be sent or to be taken",
            Unit::Bytes,
            self.queued.clone(),
        );
        r.register_with_unit(
            "replay",
            "Messages kept until the peer has acknowledged them",
            Unit::Bytes,
            self.replay.clone(),
        );
        r.register_with_unit(
            "replay_budget",
            "What may be kept so in the process",
            Unit::Bytes,
            self.budget.clone(),
        );
        r.register(
            "lanes_detached",
            "Lanes that have no connection and wait for one",
            self.detached.clone(),
        );
        r.register(
            "lanes_suspect",
            "Lanes whose peer is silent for longer than the round trip explains",
            self.suspect.clone(),
        );
    }

    /// The process has this role: its rows stand from here on.
    pub(super) fn begin(&self, role: &'static str) {
        let label = RoleLabel { role };
        let families =
            [&self.connections_lost, &self.resumes, &self.replayed_messages, &self.replayed_bytes];
        for family in families.into_iter().chain([&self.exchanges_lost]) {
            drop(family.get_or_create(&label));
        }
        for family in [&self.queued, &self.replay, &self.budget, &self.detached, &self.suspect] {
            drop(family.get_or_create(&label));
        }
        drop(self.outage.get_or_create(&label));
        if role == "sidecar" {
            drop(self.dial.get_or_create(&label));
        } else {
            for reason in REASONS {
                drop(self.refused.get_or_create(&ReasonLabel { reason }));
            }
        }
    }

    /// A lane has lost its connection, and waits for another.
    pub fn connection_lost(&self, role: &'static str) {
        self.connections_lost.get_or_create(&RoleLabel { role }).inc();
    }

    /// A lane has come back, so long after the loss; so much is sent again.
    pub fn resumed(&self, role: &'static str, outage: Duration, messages: u64, bytes: u64) {
        let label = RoleLabel { role };
        self.resumes.get_or_create(&label).inc();
        self.outage.get_or_create(&label).observe(outage.as_secs_f64());
        self.replayed_messages.get_or_create(&label).inc_by(messages);
        self.replayed_bytes.get_or_create(&label).inc_by(bytes);
    }

    /// The dial by which a lane came back took so long.
    pub fn dialled(&self, time: Duration) {
        self.dial.get_or_create(&RoleLabel { role: "sidecar" }).observe(time.as_secs_f64());
    }

    /// So many exchanges ended with their lane.
    pub fn exchanges_lost(&self, role: &'static str, count: usize) {
        self.exchanges_lost.get_or_create(&RoleLabel { role }).inc_by(count as u64);
    }

    /// A connection was given up for a newer one of its lane.
    pub fn fenced(&self) {
        self.fenced.inc();
    }

    /// A lane could not come back.
    pub fn resume_refused(&self, reason: &'static str) {
        self.refused.get_or_create(&ReasonLabel { reason }).inc();
    }

    /// What the lanes of a role hold, and what may be kept for replay.
    pub fn set_held(&self, role: &'static str, held: &Held, budget: u64) {
        let label = RoleLabel { role };
        let set = |family: &Family<RoleLabel, Gauge>, value: u64| {
            family.get_or_create(&label).set(i64::try_from(value).unwrap_or(i64::MAX));
        };
        set(&self.queued, held.queued);
        set(&self.replay, held.replay);
        set(&self.budget, budget);
        set(&self.detached, held.detached as u64);
        set(&self.suspect, held.suspect as u64);
    }
}
