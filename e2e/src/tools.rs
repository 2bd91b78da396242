//! Programs outside of the workspace that tests drive, and what happens where one is missing.

use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// Real `curl`.
#[derive(Debug)]
pub struct Curl(());

/// The Python client of `e2e/clients/client.py`, with the interpreter that has its packages.
#[derive(Debug)]
pub struct Python(PathBuf);

/// Says that a test could not run, and why. Fails with `CI=true`, where nothing may be missing.
pub fn skip(test: &str, why: &str) {
    assert!(std::env::var("CI").as_deref() != Ok("true"), "SKIPPED {test}: {why}, and CI is set");
    // Past the test harness's capture: a skipped test shows even where it passes.
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {why}");
}

impl Curl {
    /// Returns curl, or says that `test` is skipped.
    #[must_use]
    pub fn find(test: &str) -> Option<Self> {
        let version = Command::new("curl").arg("--version").stdout(Stdio::piped()).output();
        match version {
            Ok(output) if String::from_utf8_lossy(&output.stdout).contains("HTTP2") => {
                Some(Self(()))
            }
            Ok(_) => {
                skip(test, "this curl cannot speak HTTP/2");
                None
            }
            Err(_) => {
                skip(test, "curl is not installed");
                None
            }
        }
    }

    /// Returns a quiet curl that talks to the relay for every name, and ends within a minute.
    #[must_use]
    pub fn command(&self, relay: std::net::SocketAddr) -> Command {
        let mut command = Command::new("curl");
        command
            .args(["--silent", "--show-error", "--max-time", "60", "--noproxy", "*"])
            .arg("--connect-to")
            .arg(format!("::{}:{}", relay.ip(), relay.port()));
        command
    }

    /// Runs curl with arguments.
    #[must_use]
    pub fn run<I, S>(&self, relay: std::net::SocketAddr, arguments: I) -> Output
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        self.command(relay).args(arguments).output().expect("curl starts")
    }
}

impl Python {
    /// Returns the interpreter that `cargo test-all` prepared, or says that `test` is skipped.
    #[must_use]
    pub fn find(test: &str) -> Option<Self> {
        let prepared = std::env::var_os("SIDELANE_PYTHON").map(PathBuf::from).or_else(|| {
            let target = crate::process::build_directory();
            Some(target.parent()?.join("e2e-venv/bin/python3"))
        });
        match prepared {
            Some(python) if python.exists() => Some(Self(python)),
            _ => {
                skip(test, "no Python environment; `cargo test-all` prepares one");
                None
            }
        }
    }

    /// Runs one case of `e2e/clients/client.py`; it prints what it saw as one JSON object.
    #[must_use]
    pub fn run(&self, case: &str, relay: std::net::SocketAddr) -> serde_json::Value {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/client.py");
        let output = Command::new(&self.0)
            .arg(script)
            .arg(case)
            .arg(relay.ip().to_string())
            .arg(relay.port().to_string())
            .output()
            .expect("the interpreter starts");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "client.py {case}: {}\n{errors}", output.status);
        serde_json::from_slice(&output.stdout).expect("client.py prints JSON")
    }
}
