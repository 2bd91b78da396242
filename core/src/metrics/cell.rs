//! Counters, gauges and histograms that threads share without sharing a cache line.
//!
//! Each thread adds to a cell of its own (atomics, since a cell may be shared when threads are
//! many); a scrape sums up the cells. An addition costs a few nanoseconds, never a lock.

use std::cell::Cell;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::{MetricType, TypedMetric};

/// Cells of a metric. Threads beyond that share; 16 cover the cores of most machines, at 1 KiB per
/// counter.
const CELLS: usize = 16;

/// Bounds of the duration buckets, in microseconds: from a local answer to a stream.
const BUCKETS_US: [u64; 17] = [
    100,
    500,
    1_000,
    2_500,
    5_000,
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    10_000_000,
    30_000_000,
    120_000_000,
    600_000_000,
];

/// Index of the count of what is above the last bound, and of the sum in nanoseconds.
const ABOVE: usize = BUCKETS_US.len();
const SUM: usize = ABOVE + 1;

/// Returns this thread's cell.
fn own_cell() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static OWN: Cell<usize> = const { Cell::new(usize::MAX) };
    }
    OWN.with(|own| {
        if own.get() == usize::MAX {
            own.set(NEXT.fetch_add(1, Ordering::Relaxed) % CELLS);
        }
        own.get()
    })
}

/// `N` numbers per thread; a cell begins on a cache line of its own.
#[repr(align(64))]
struct Padded<const N: usize>([AtomicU64; N]);

/// `N` sums of numbers per thread.
struct Cells<const N: usize>(Arc<[Padded<N>; CELLS]>);

impl<const N: usize> Clone for Cells<N> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<const N: usize> Default for Cells<N> {
    fn default() -> Self {
        let number = |_| AtomicU64::new(0);
        Self(Arc::new(std::array::from_fn(|_| Padded(std::array::from_fn(number)))))
    }
}

impl<const N: usize> Cells<N> {
    fn add(&self, index: usize, value: u64) {
        self.0[own_cell()].0[index].fetch_add(value, Ordering::Relaxed);
    }

    /// Wrapping, so that what one thread adds another may take away.
    fn sum(&self, index: usize) -> u64 {
        self.0.iter().fold(0, |sum, cell| sum.wrapping_add(cell.0[index].load(Ordering::Relaxed)))
    }
}

/// Only grows. Clones are the same counter.
#[derive(Clone, Default)]
pub(super) struct Counter(Cells<1>);

impl Counter {
    /// Adds one.
    pub(super) fn inc(&self) {
        self.add(1);
    }

    /// Adds `value`.
    pub(super) fn add(&self, value: u64) {
        self.0.add(0, value);
    }

    /// Returns the sum.
    #[must_use]
    pub(super) fn value(&self) -> u64 {
        self.0.sum(0)
    }
}

impl fmt::Debug for Counter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.value().fmt(f)
    }
}

impl TypedMetric for Counter {
    const TYPE: MetricType = MetricType::Counter;
}

impl EncodeMetric for Counter {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        encoder.encode_counter::<NoLabelSet, u64, f64>(&self.value(), None)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

/// Goes up and down. Clones are the same gauge.
#[derive(Clone, Default)]
pub(super) struct Gauge(Cells<1>);

impl Gauge {
    /// Adds one.
    pub(super) fn inc(&self) {
        self.0.add(0, 1);
    }

    /// Takes one away, on whichever thread.
    pub(super) fn dec(&self) {
        self.0.add(0, u64::MAX);
    }

    /// Returns the sum.
    #[must_use]
    pub(super) fn value(&self) -> i64 {
        self.0.sum(0).cast_signed()
    }
}

impl fmt::Debug for Gauge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.value().fmt(f)
    }
}

impl TypedMetric for Gauge {
    const TYPE: MetricType = MetricType::Gauge;
}

impl EncodeMetric for Gauge {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        encoder.encode_gauge(&self.value())
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

/// A distribution of durations. Clones are the same histogram.
#[derive(Clone, Default)]
pub(super) struct Timing(Cells<{ SUM + 1 }>);

impl Timing {
    /// Counts a duration.
    pub(super) fn observe(&self, duration: Duration) {
        let us = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        self.0.add(BUCKETS_US.partition_point(|bound| *bound < us), 1);
        self.0.add(SUM, u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Returns how many were counted.
    #[must_use]
    pub(super) fn count(&self) -> u64 {
        (0..=ABOVE).map(|index| self.0.sum(index)).sum()
    }
}

impl fmt::Debug for Timing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timing").field("count", &self.count()).finish()
    }
}

impl TypedMetric for Timing {
    const TYPE: MetricType = MetricType::Histogram;
}

impl EncodeMetric for Timing {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        #[expect(clippy::cast_precision_loss, reason = "seconds for people")]
        let seconds = |value: u64, unit: f64| value as f64 / unit;
        let bounds = BUCKETS_US.iter().map(|us| seconds(*us, 1e6)).chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> =
            bounds.enumerate().map(|(index, bound)| (bound, self.0.sum(index))).collect();
        let count = buckets.iter().map(|(_, count)| count).sum();
        encoder.encode_histogram::<NoLabelSet>(seconds(self.0.sum(SUM), 1e9), count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_add_up() {
        const THREADS: u64 = CELLS as u64 + 4;
        let (counter, gauge, timing) = (Counter::default(), Gauge::default(), Timing::default());
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    for _ in 0..1000 {
                        counter.add(2);
                        timing.observe(Duration::from_millis(1));
                    }
                    gauge.inc();
                });
            }
        });
        assert_eq!(counter.value(), THREADS * 2000);
        assert_eq!(timing.count(), THREADS * 1000);
        assert_eq!(gauge.value(), THREADS.cast_signed());
        // On another thread than they were added on.
        (0..THREADS).for_each(|_| gauge.dec());
        assert_eq!(gauge.value(), 0);
    }
}
