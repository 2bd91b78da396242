//! Tasks behind the cargo aliases: `cargo demo`, `cargo test-all`, `cargo bench-e2e`, `cargo soak`,
//! `cargo measure`.
//!
//! Knows how the workspace is built and started; knows nothing of what the programs do.
#![allow(clippy::print_stdout, reason = "a task talks to the person who started it")]

use std::process::ExitCode;

mod demo;
mod test;
mod workspace;

const USAGE: &str = "\
tasks of this workspace:
  cargo demo              build in release mode, start relay, sidecar and a demo service
  cargo test-all [ARGS]   prepare what tests need and run all of them; ARGS go to `cargo test`
  cargo bench-e2e [ARGS]  head-to-head with nginx and haproxy; ARGS go to bench/run.py
  cargo soak [RELOADS]    that many reloads under load (1000), on a release build; says what came of it
  cargo measure [ARGS]    what docs/measurements.md says of sessions, on a release build; --help says of what
";

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let task = arguments.next();
    let rest: Vec<String> = arguments.collect();
    let outcome = match task.as_deref() {
        Some("demo") => demo::run(),
        Some("test") => test::run(&rest),
        Some("bench") => workspace::bench(&rest),
        Some("soak") => workspace::soak(&rest),
        Some("measure") => workspace::measure(&rest),
        _ => {
            eprint!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
