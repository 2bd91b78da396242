//! The program `sidelane`.

use std::process::ExitCode;

fn main() -> ExitCode {
    sidelane::cli::main()
}
