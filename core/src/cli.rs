//! The command line: arguments to calls, errors to exit codes.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::error::chain;
use crate::process;

/// The program failed, or the file does not hold.
const EXIT_FAILED: u8 = 1;

/// A tunnel sidecar and relay with protocol plugins.
///
/// Exit codes: 0 ended as asked, or the file is valid; 1 failed, or the file is not valid; 2 the
/// command line is not understood.
#[derive(Debug, Parser)]
#[command(name = "sidelane", version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the roles that the file's `relay` and `sidecar` sections give this process.
    ///
    /// SIGHUP reloads the file; SIGTERM and SIGINT stop accepting, let running exchanges end within
    /// `drain_timeout` and exit 0; a second one exits at once.
    Run {
        /// Configuration file.
        #[arg(default_value = "sidecar.yaml")]
        file: PathBuf,
        /// Write the addresses that were bound, as JSON, once all are: for ports given as 0.
        #[arg(long, value_name = "PATH")]
        ports_file: Option<PathBuf>,
    },
    /// Say what is wrong with a file, as a start or a reload would: plugins are loaded and asked.
    Check {
        /// Configuration file.
        #[arg(default_value = "sidecar.yaml")]
        file: PathBuf,
    },
}

/// Parses the arguments and runs the command.
#[must_use]
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run { file, ports_file } => process::run(&file, ports_file.as_deref()),
        Command::Check { file } => process::check(&file).map(|checked| {
            use std::io::Write as _;
            // A closed standard output is not the file's fault.
            let _ = writeln!(std::io::stdout(), "{}", checked.summary);
        }),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", chain(&error));
            ExitCode::from(EXIT_FAILED)
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
