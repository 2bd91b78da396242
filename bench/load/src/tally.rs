//! What a load counts and prints.

use std::io::BufRead;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

/// How long past its end a worker may wait for what is in flight; then it counts as an error.
pub(crate) const GRACE: Duration = Duration::from_secs(10);

/// Operations of one worker, or of all.
#[derive(Default)]
pub(crate) struct Tally {
    pub(crate) operations: u64,
    pub(crate) errors: u64,
    latencies_us: Vec<u32>,
}

impl Tally {
    pub(crate) fn latency(&mut self, since: Instant) {
        let us = since.elapsed().as_micros();
        self.latencies_us.push(u32::try_from(us).unwrap_or(u32::MAX));
    }

    /// Counts an error, and says it: the first of a run tells more than their number.
    pub(crate) fn error(&mut self, error: &anyhow::Error) {
        self.errors += 1;
        eprintln!("{error:#}");
    }

    pub(crate) fn add(&mut self, mut other: Self) {
        self.operations += other.operations;
        self.errors += other.errors;
        self.latencies_us.append(&mut other.latencies_us);
    }

    /// Prints the one line of JSON that a run ends with.
    pub(crate) fn print(mut self, duration: Duration) {
        self.latencies_us.sort_unstable();
        println!(
            r#"{{"operations": {}, "errors": {}, "duration_us": {}, "p50_us": {}, "p99_us": {}}}"#,
            self.operations,
            self.errors,
            duration.as_micros(),
            self.percentile(50),
            self.percentile(99),
        );
    }

    fn percentile(&self, percent: usize) -> u32 {
        let last = self.latencies_us.len().saturating_sub(1);
        self.latencies_us.get(last * percent / 100).copied().unwrap_or(0)
    }
}

/// Says that all connections stand, and waits to be told to go on. Blocks the only thread: nothing
/// is in flight.
pub(crate) fn wait_for_line() -> Result<()> {
    println!("open");
    let mut line = String::new();
    ensure!(std::io::stdin().lock().read_line(&mut line)? > 0, "standard input ended");
    Ok(())
}
