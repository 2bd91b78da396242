//! Measures what docs/measurements.md says of sessions: `cargo measure` builds in release mode and runs
//! it. Loopback only; what it starts it ends. Prints tables in Markdown.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program that reports")]

mod fairness;
mod resume;
mod stage;

use std::process::ExitCode;
use std::time::{Duration, Instant};

const USAGE: &str = "\
usage: sidelane-measure [fairness|resume]... [--seconds N] [--cuts N]
  fairness   one small exchange beside four that saturate the tunnel
  resume     from a cut to the next byte, and what is sent again
  --seconds  of each measurement of fairness (5)
  --cuts     of each measurement of resume (100)
";

/// What is asked for.
struct Options {
    fairness: bool,
    resume: bool,
    time: Duration,
    cuts: usize,
}

fn main() -> ExitCode {
    let Some(options) = options(std::env::args().skip(1)) else {
        eprint!("{USAGE}");
        return ExitCode::from(2);
    };
    if options.fairness {
        println!("{}", fairness::report(options.time));
    }
    if options.resume {
        println!("{}", resume::report(options.cuts));
    }
    ExitCode::SUCCESS
}

fn options(mut arguments: impl Iterator<Item = String>) -> Option<Options> {
    let mut options =
        Options { fairness: false, resume: false, time: Duration::from_secs(5), cuts: 100 };
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "fairness" => options.fairness = true,
            "resume" => options.resume = true,
            "--seconds" => options.time = Duration::from_secs(arguments.next()?.parse().ok()?),
            "--cuts" => options.cuts = arguments.next()?.parse().ok()?,
            _ => return None,
        }
    }
    if !options.fairness && !options.resume {
        (options.fairness, options.resume) = (true, true);
    }
    Some(options)
}

/// Durations that were measured, and what is said of them.
#[derive(Default)]
struct Times(Vec<Duration>);

impl Times {
    fn add(&mut self, time: Duration) {
        self.0.push(time);
    }

    fn since(&mut self, begun: Instant) {
        self.add(begun.elapsed());
    }

    /// Returns the time that so many of a hundred do not exceed.
    fn percentile(&mut self, percent: usize) -> Duration {
        self.0.sort_unstable();
        let last = self.0.len().saturating_sub(1);
        self.0.get(last * percent / 100).copied().unwrap_or_default()
    }

    fn count(&self) -> usize {
        self.0.len()
    }
}

/// Milliseconds, with as many digits as are worth reading.
fn shown(time: Duration) -> String {
    let ms = time.as_secs_f64() * 1e3;
    if ms < 10.0 { format!("{ms:.3}") } else { format!("{ms:.1}") }
}

fn row(cells: &[String]) -> String {
    format!("| {} |\n", cells.join(" | "))
}

fn head(columns: &[&str]) -> String {
    let line = "|---".repeat(columns.len());
    format!("| {} |\n{line}|\n", columns.join(" | "))
}
