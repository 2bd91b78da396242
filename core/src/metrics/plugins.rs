//! Metrics that plugins register for themselves: `sidelane_plugin_<name>{plugin="…"}`.

use std::collections::HashMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use sidelane_abi::metric;

use crate::plugin::{Labels, MetricSink};

/// Series of all plugins together. Bounds what a scrape costs.
const SERIES_MAX: usize = 32_768;

/// Buckets of a plugin's histogram, each 4 times the one before: 0.001 to about 4,000 of its unit,
/// 16 B to 64 MiB where that is bytes.
const HISTOGRAM_BUCKETS: u16 = 12;

type FloatCounter = Counter<f64, AtomicU64>;
type FloatGauge = Gauge<f64, AtomicU64>;
type Histograms = Family<Labels, Histogram, fn() -> Histogram>;

/// Metrics of one name: a series per plugin and labels of its own.
enum Named {
    Counter(Family<Labels, FloatCounter>),
    Gauge(Family<Labels, FloatGauge>),
    Histogram(Histograms),
}

#[derive(Clone)]
enum Value {
    Counter(FloatCounter),
    Gauge(FloatGauge),
    Histogram(Histogram),
}

/// The plugins' metrics.
pub(super) struct PluginMetrics {
    registry: Arc<Mutex<Registry>>,
    by_name: Mutex<HashMap<String, Named>>,
    /// By id. Replaced as a whole: plugins add on every message, and register when a route is new.
    values: ArcSwap<Vec<Value>>,
}

impl PluginMetrics {
    pub(super) fn new(registry: Arc<Mutex<Registry>>) -> Self {
        Self { registry, by_name: Mutex::default(), values: ArcSwap::default() }
    }

    fn register_named(&self, kind: u32, name: &str, help: &str) -> Option<Named> {
        let mut registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        let name = format!("plugin_{name}");
        match kind {
            metric::COUNTER => {
                let family = Family::default();
                registry.register(
                    name.strip_suffix("_total").unwrap_or(&name),
                    help,
                    family.clone(),
                );
                Some(Named::Counter(family))
            }
            metric::GAUGE => {
                let family = Family::default();
                registry.register(name, help, family.clone());
                Some(Named::Gauge(family))
            }
            metric::HISTOGRAM => {
                let family: Histograms = if name.ends_with("_bytes") {
                    Family::new_with_constructor(histogram_of_bytes)
                } else {
                    Family::new_with_constructor(histogram)
                };
                registry.register(name, help, family.clone());
                Some(Named::Histogram(family))
            }
            _ => None,
        }
    }
}

fn histogram_of_bytes() -> Histogram {
    Histogram::new(exponential_buckets(16.0, 4.0, HISTOGRAM_BUCKETS))
}

fn histogram() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 4.0, HISTOGRAM_BUCKETS))
}

impl MetricSink for PluginMetrics {
    fn register(
        &self,
        plugin: &str,
        kind: u32,
        name: &str,
        help: &str,
        labels: &Labels,
    ) -> Option<u32> {
        // Held until the values are replaced: registrations take turns.
        let mut by_name = self.by_name.lock().unwrap_or_else(PoisonError::into_inner);
        let values = self.values.load();
        if values.len() >= SERIES_MAX {
            tracing::warn!(plugin, name, max = SERIES_MAX, "a plugin's metric is one too many");
            return None;
        }
        if !by_name.contains_key(name) {
            by_name.insert(name.to_owned(), self.register_named(kind, name, help)?);
        }
        let own = ("plugin".to_owned(), plugin.to_owned());
        let label: Labels = std::iter::once(own).chain(labels.iter().cloned()).collect();
        let value = match (by_name.get(name)?, kind) {
            (Named::Counter(family), metric::COUNTER) => {
                Value::Counter(family.get_or_create_owned(&label))
            }
            (Named::Gauge(family), metric::GAUGE) => {
                Value::Gauge(family.get_or_create_owned(&label))
            }
            (Named::Histogram(family), metric::HISTOGRAM) => {
                Value::Histogram(family.get_or_create_owned(&label))
            }
            _ => {
                tracing::warn!(
                    plugin,
                    name,
                    "another plugin has a metric of this name and another kind"
                );
                return None;
            }
        };
        let id = u32::try_from(values.len()).ok()?;
        let mut replaced = Vec::clone(&values);
        replaced.push(value);
        self.values.store(Arc::new(replaced));
        Some(id)
    }

    fn add(&self, id: u32, value: f64) {
        let values = self.values.load();
        match values.get(id as usize) {
            // A counter only grows; what would lower it is the plugin's mistake.
            Some(Value::Counter(counter)) if value >= 0.0 => {
                counter.inc_by(value);
            }
            Some(Value::Gauge(gauge)) => {
                gauge.inc_by(value);
            }
            Some(Value::Histogram(histogram)) => histogram.observe(value),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::encoding::text;

    fn written(metrics: &PluginMetrics) -> String {
        let mut out = String::new();
        let registry = metrics.registry.lock().expect("not poisoned");
        text::encode(&mut out, &registry).expect("a string takes all");
        out
    }

    #[test]
    fn plugins_share_a_name_and_differ_by_label() {
        let metrics = PluginMetrics::new(Arc::new(Mutex::new(Registry::with_prefix("sidelane"))));
        let a = metrics
            .register("a", metric::COUNTER, "repeats_total", "Repeats", &Vec::new())
            .expect("taken");
        let b = metrics
            .register("b", metric::COUNTER, "repeats_total", "Repeats", &Vec::new())
            .expect("taken");
        metrics.add(a, 1.0);
        metrics.add(b, 2.0);
        metrics.add(b, -5.0);
        let text = written(&metrics);
        assert!(text.contains("sidelane_plugin_repeats_total{plugin=\"a\"} 1.0"), "{text}");
        assert!(text.contains("sidelane_plugin_repeats_total{plugin=\"b\"} 2.0"), "{text}");
        assert_eq!(
            metrics.register("c", metric::GAUGE, "repeats_total", "Repeats", &Vec::new()),
            None
        );
    }

    #[test]
    fn series_differ_by_their_labels() {
        let metrics = PluginMetrics::new(Arc::new(Mutex::new(Registry::with_prefix("sidelane"))));
        let ids = ["up", "down"].map(|direction| {
            let labels = vec![("direction".to_owned(), direction.to_owned())];
            metrics.register("ws", metric::HISTOGRAM, "sizes_bytes", "Sizes", &labels)
        });
        metrics.add(ids[0].expect("taken"), 100.0);
        metrics.add(ids[1].expect("taken"), 5000.0);
        let text = written(&metrics);
        for line in [
            "sidelane_plugin_sizes_bytes_bucket{le=\"256.0\",plugin=\"ws\",direction=\"up\"} 1",
            "sidelane_plugin_sizes_bytes_bucket{le=\"256.0\",plugin=\"ws\",direction=\"down\"} 0",
        ] {
            assert!(text.contains(line), "{text}");
        }
    }

    #[test]
    fn their_number_is_bounded() {
        let metrics = PluginMetrics::new(Arc::default());
        let none = Vec::new();
        for n in 0..SERIES_MAX {
            let labels = vec![("n".to_owned(), n.to_string())];
            assert!(metrics.register("a", metric::GAUGE, "g", "", &labels).is_some());
        }
        assert_eq!(metrics.register("a", metric::GAUGE, "one_more", "", &none), None);
    }
}
