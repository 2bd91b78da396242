//! What is counted of TLS at the ends that are dialled: handshakes, and how long certificates last.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use super::ListenerReasonLabels;

/// Certificates of one listener that are told; the first to end, where there are more.
const CERTIFICATES_MAX: usize = 1_000;

/// Why a handshake is not begun.
const REASONS: [&str; 2] = ["total", "address"];

/// What becomes of nearly all handshakes.
const RESULTS: [&str; 2] = ["full", "resumed"];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ListenerResultLabels {
    listener: Arc<str>,
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CertificateLabels {
    listener: Arc<str>,
    name: Arc<str>,
}

/// The metrics of TLS.
#[derive(Default)]
pub struct TlsMetrics {
    handshakes: Family<ListenerResultLabels, Counter>,
    refused: Family<ListenerReasonLabels, Counter>,
    expiry: Family<CertificateLabels, Gauge>,
    /// Rows of `expiry`, so that those of certificates that are gone go.
    told: Mutex<HashMap<Arc<str>, Vec<CertificateLabels>>>,
}

impl TlsMetrics {
    pub(super) fn register(&self, r: &mut Registry) {
        r.register(
            "tls_handshakes",
            "TLS handshakes that have ended, by how",
            self.handshakes.clone(),
        );
        r.register(
            "tls_handshakes_refused",
            "Connections closed because too many TLS handshakes were under way",
            self.refused.clone(),
        );
        r.register_with_unit(
            "certificate_expiry_timestamp",
            "When a certificate of a listener ends",
            Unit::Seconds,
            self.expiry.clone(),
        );
    }

    /// A listener has TLS: its rows stand from here on.
    pub fn listener(&self, listener: &Arc<str>) {
        let listener = || Arc::clone(listener);
        for result in RESULTS {
            let labels = ListenerResultLabels { listener: listener(), result };
            drop(self.handshakes.get_or_create(&labels));
        }
        for reason in REASONS {
            let labels = ListenerReasonLabels { listener: listener(), reason };
            drop(self.refused.get_or_create(&labels));
        }
    }

    /// A handshake has ended.
    pub fn handshake(&self, listener: &Arc<str>, result: &'static str) {
        let listener = Arc::clone(listener);
        self.handshakes.get_or_create(&ListenerResultLabels { listener, result }).inc();
    }

    /// A handshake was not begun.
    pub fn refused(&self, listener: &Arc<str>, reason: &'static str) {
        let listener = Arc::clone(listener);
        self.refused.get_or_create(&ListenerReasonLabels { listener, reason }).inc();
    }

    /// A listener shows these certificates, each by a name, and no others; none: it has no TLS, or is
    /// gone. Of several by one name the first to end counts.
    pub fn set_certificates(&self, listener: &Arc<str>, certificates: &[(Arc<str>, SystemTime)]) {
        let mut by_name: BTreeMap<&Arc<str>, i64> = BTreeMap::new();
        for (name, end) in certificates {
            let end = end.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            let end = i64::try_from(end).unwrap_or(i64::MAX);
            by_name.entry(name).and_modify(|known| *known = end.min(*known)).or_insert(end);
        }
        let mut rows: Vec<_> = by_name.into_iter().collect();
        rows.sort_by_key(|(_, end)| *end);
        rows.truncate(CERTIFICATES_MAX);
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        for labels in told.remove(listener).unwrap_or_default() {
            if !rows.iter().any(|(name, _)| **name == labels.name) {
                self.expiry.remove(&labels);
            }
        }
        let mut labels_of = Vec::with_capacity(rows.len());
        for (name, end) in rows {
            let labels =
                CertificateLabels { listener: Arc::clone(listener), name: Arc::clone(name) };
            self.expiry.get_or_create(&labels).set(end);
            labels_of.push(labels);
        }
        if !labels_of.is_empty() {
            told.insert(Arc::clone(listener), labels_of);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use prometheus_client::encoding::text;

    use super::*;

    #[test]
    fn certificates_that_are_gone_are_not_told() {
        let metrics = TlsMetrics::default();
        let mut registry = Registry::default();
        metrics.register(&mut registry);
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        let (a, b): (Arc<str>, Arc<str>) = ("a".into(), "b".into());
        let rows = || {
            let mut out = String::new();
            text::encode(&mut out, &registry).unwrap();
            let rows = out.lines().filter(|line| line.starts_with("certificate_expiry"));
            let mut rows: Vec<_> = rows.map(str::to_owned).collect();
            rows.sort();
            rows.join("\n")
        };
        metrics.set_certificates(&a, &[("x".into(), at(7)), ("x".into(), at(5))]);
        metrics.set_certificates(&b, &[("x".into(), at(9)), ("y".into(), at(9))]);
        metrics.set_certificates(&b, &[("y".into(), at(11))]);
        insta::assert_snapshot!(rows(), @r#"
        certificate_expiry_timestamp_seconds{listener="a",name="x"} 5
        certificate_expiry_timestamp_seconds{listener="b",name="y"} 11
        "#);
        metrics.set_certificates(&a, &[]);
        metrics.set_certificates(&b, &[]);
        assert_eq!(rows(), "");
    }
}
