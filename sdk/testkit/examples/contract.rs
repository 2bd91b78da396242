//! Runs the contract suite on a plugin library: `cargo run -p sidelane-testkit --example contract -- FILE
//! [CONFIG.json]`.

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let Some(path) = arguments.next().map(PathBuf::from) else {
        eprintln!("usage: contract FILE [CONFIG.json]");
        return ExitCode::from(2);
    };
    let config = match arguments.next().map(std::fs::read).transpose() {
        Ok(None) => serde_json::Value::Null,
        Ok(Some(text)) => match serde_json::from_slice(&text) {
            Ok(config) => config,
            Err(error) => return fail(&[error.to_string()]),
        },
        Err(error) => return fail(&[error.to_string()]),
    };
    match sidelane_testkit::contract::run_with(&path, &config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(broken) => fail(&broken),
    }
}

fn fail(lines: &[String]) -> ExitCode {
    for line in lines {
        eprintln!("{line}");
    }
    ExitCode::FAILURE
}
