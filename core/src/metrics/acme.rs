//! What is counted of certificates by ACME. Labels are names from the configuration.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use super::ResultLabel;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct NameLabel {
    name: Arc<str>,
}

/// Counters of certificates by ACME.
#[derive(Default)]
pub struct AcmeMetrics {
    orders: Family<ResultLabel, Counter>,
    expiry: Family<NameLabel, Gauge>,
}

impl AcmeMetrics {
    pub(super) fn register(&self, r: &mut Registry) {
        r.register("acme_orders", "Certificates ordered by ACME, by result", self.orders.clone());
        r.register_with_unit(
            "acme_certificate_expiry_timestamp",
            "When the certificate that is shown for the name ends",
            Unit::Seconds,
            self.expiry.clone(),
        );
    }

    /// Something is to be ordered: the rows stand from here on.
    pub fn begin(&self) {
        for result in ["success", "failure"] {
            drop(self.orders.get_or_create(&ResultLabel { result }));
        }
    }

    /// An order has ended.
    pub fn ordered(&self, is_good: bool) {
        let result = if is_good { "success" } else { "failure" };
        self.orders.get_or_create(&ResultLabel { result }).inc();
    }

    /// When a name's certificate ends; `None`: the name is not configured any more.
    pub fn set_expiry(&self, name: &Arc<str>, expires: Option<SystemTime>) {
        let label = NameLabel { name: Arc::clone(name) };
        match expires {
            Some(expires) => {
                let seconds = expires.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
                self.expiry.get_or_create(&label).set(i64::try_from(seconds).unwrap_or(i64::MAX));
            }
            None => {
                self.expiry.remove(&label);
            }
        }
    }
}
