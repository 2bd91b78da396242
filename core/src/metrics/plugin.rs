//! Metrics that plugins register: `sidelane_plugin_<name>{plugin="…"}`. Bounded in number, added to
//! without locks.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use sidelane_abi::metric;

/// Most metrics of all plugins; past it registering is refused.
pub const PLUGIN_METRICS_MAX: usize = 256;

/// Longest name and help text.
const NAME_BYTES_MAX: usize = 64;
const HELP_CHARS_MAX: usize = 256;

/// Names under the prefix that core itself uses.
const RESERVED: [&str; 3] = ["panics", "generations", "quarantined"];

/// Bounds of the buckets. Units differ from plugin to plugin, so they span many decades.
const BUCKETS: [f64; 12] =
    [1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, f64::INFINITY];

/// Metrics of plugins. An id is an index plus one: 0 means "refused" in the ABI.
pub struct PluginMetrics {
    slots: Box<[OnceLock<Slot>; PLUGIN_METRICS_MAX]>,
    /// How many slots are taken; held while one is.
    taken: Mutex<usize>,
}

#[derive(Debug)]
struct Slot {
    plugin: String,
    name: String,
    help: String,
    kind: u32,
    /// Bits of an `f64`: the value, or a histogram's sum.
    value: AtomicU64,
    /// Counts of a histogram.
    buckets: [AtomicU64; BUCKETS.len()],
}

impl Default for PluginMetrics {
    fn default() -> Self {
        Self { slots: Box::new(std::array::from_fn(|_| OnceLock::new())), taken: Mutex::new(0) }
    }
}

impl fmt::Debug for PluginMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.slots.iter().filter_map(OnceLock::get)).finish()
    }
}

impl PluginMetrics {
    /// Registers a metric of kind [`sidelane_abi::metric`] and returns its id; the same name gives
    /// the same id. `None`: the name or kind is not accepted, the name is another kind's, or there
    /// are [`PLUGIN_METRICS_MAX`] already.
    pub fn register(&self, plugin: &str, kind: u32, name: &str, help: &str) -> Option<u32> {
        if !matches!(kind, metric::COUNTER | metric::GAUGE | metric::HISTOGRAM) {
            return None;
        }
        // The exposition adds the suffix itself.
        let name = if kind == metric::COUNTER {
            name.strip_suffix("_total").unwrap_or(name)
        } else {
            name
        };
        let good = name.len() <= NAME_BYTES_MAX
            && name.starts_with(|c: char| c.is_ascii_lowercase())
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
            && !RESERVED.contains(&name);
        if !good {
            return None;
        }
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        for (index, slot) in self.slots[..*taken].iter().filter_map(OnceLock::get).enumerate() {
            if slot.name == name {
                if slot.kind != kind {
                    return None;
                }
                if slot.plugin == plugin {
                    return u32::try_from(index + 1).ok();
                }
            }
        }
        let slot = Slot {
            plugin: plugin.to_owned(),
            name: name.to_owned(),
            help: help.chars().take(HELP_CHARS_MAX).collect::<String>().replace('\n', " "),
            kind,
            value: AtomicU64::new(0),
            buckets: std::array::from_fn(|_| AtomicU64::new(0)),
        };
        self.slots.get(*taken)?.set(slot).ok()?;
        *taken += 1;
        u32::try_from(*taken).ok()
    }

    /// Adds to a counter or gauge, or observes in a histogram. Unknown ids, values that are no
    /// numbers, and negative ones for a counter are passed over.
    pub fn add(&self, id: u32, value: f64) {
        let slot = (id as usize).checked_sub(1).and_then(|index| self.slots.get(index)?.get());
        let Some(slot) = slot else { return };
        if !value.is_finite() || (slot.kind == metric::COUNTER && value < 0.0) {
            return;
        }
        if slot.kind == metric::HISTOGRAM {
            let bucket = BUCKETS.partition_point(|bound| *bound < value).min(BUCKETS.len() - 1);
            slot.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        }
        let mut bits = slot.value.load(Ordering::Relaxed);
        while let Err(now) = slot.value.compare_exchange_weak(
            bits,
            (f64::from_bits(bits) + value).to_bits(),
            Ordering::Relaxed,
            Ordering::Relaxed,
        ) {
            bits = now;
        }
    }
}

impl EncodeMetric for Slot {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let value = f64::from_bits(self.value.load(Ordering::Relaxed));
        match self.metric_type() {
            MetricType::Counter => encoder.encode_counter::<NoLabelSet, f64, f64>(&value, None),
            MetricType::Histogram => {
                let counts = self.buckets.iter().map(|count| count.load(Ordering::Relaxed));
                let buckets: Vec<(f64, u64)> = BUCKETS.into_iter().zip(counts).collect();
                let count = buckets.iter().map(|(_, count)| count).sum();
                encoder.encode_histogram::<NoLabelSet>(value, count, &buckets, None)
            }
            _ => encoder.encode_gauge(&value),
        }
    }

    fn metric_type(&self) -> MetricType {
        match self.kind {
            metric::COUNTER => MetricType::Counter,
            metric::HISTOGRAM => MetricType::Histogram,
            _ => MetricType::Gauge,
        }
    }
}

impl Collector for PluginMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut slots: Vec<&Slot> = self.slots.iter().filter_map(OnceLock::get).collect();
        slots.sort_by_key(|slot| (&slot.name, &slot.plugin));
        for family in slots.chunk_by(|a, b| a.name == b.name) {
            let name = format!("sidelane_plugin_{}", family[0].name);
            let kind = family[0].metric_type();
            let mut metric = encoder.encode_descriptor(&name, &family[0].help, None, kind)?;
            for slot in family {
                let labels = [("plugin", slot.plugin.as_str())];
                slot.encode(metric.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_name_is_one_metric() {
        let metrics = PluginMetrics::default();
        let id = metrics.register("http", metric::COUNTER, "retries", "Retries").unwrap();
        assert_eq!(metrics.register("http", metric::COUNTER, "retries", "x"), Some(id));
        assert_eq!(metrics.register("http", metric::COUNTER, "retries_total", "x"), Some(id));
        assert_ne!(metrics.register("grpc", metric::COUNTER, "retries", "x"), Some(id));
        assert_eq!(metrics.register("grpc", metric::GAUGE, "retries", "x"), None);
    }

    #[test]
    fn bad_names_and_kinds_are_refused() {
        let metrics = PluginMetrics::default();
        for name in ["", "A", "1a", "a-b", "é", "panics", "panics_total", &"a".repeat(65)] {
            assert_eq!(metrics.register("p", metric::COUNTER, name, ""), None, "{name}");
        }
        assert_eq!(metrics.register("p", 0, "a", ""), None);
        assert_eq!(metrics.register("p", 4, "a", ""), None);
    }

    #[test]
    fn the_number_is_bounded() {
        let metrics = PluginMetrics::default();
        let ids: Vec<_> = (0..PLUGIN_METRICS_MAX + 1)
            .map(|index| metrics.register("p", metric::GAUGE, &format!("m{index}"), ""))
            .collect();
        assert!(ids[..PLUGIN_METRICS_MAX].iter().all(Option::is_some));
        assert_eq!(ids[PLUGIN_METRICS_MAX], None);
        assert_eq!(metrics.register("p", metric::GAUGE, "m0", ""), Some(1));
    }

    #[test]
    fn unknown_ids_and_bad_values_change_nothing() {
        let metrics = PluginMetrics::default();
        let id = metrics.register("p", metric::COUNTER, "a", "").unwrap();
        for (id, value) in [(0, 1.0), (2, 1.0), (u32::MAX, 1.0), (id, -1.0), (id, f64::NAN)] {
            metrics.add(id, value);
        }
        let slot = metrics.slots[0].get().unwrap();
        assert_eq!(slot.value.load(Ordering::Relaxed), 0);
    }
}
