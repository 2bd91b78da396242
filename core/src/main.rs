//! The program `sidelane`.

use std::process::ExitCode;

/// Stands in for the C library's allocator too (feature `override`), so that plugins and the host
/// share it: about a sixth of a small request's time went to glibc's (docs/adr/0004-allocator.md).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    sidelane::cli::main()
}
