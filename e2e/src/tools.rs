//! Programs outside of the workspace that tests drive, and what happens where one is missing.

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use crate::peer::Peer;

/// Real `curl`.
#[derive(Debug)]
pub struct Curl(());

/// The interpreter that has the packages of the scripts in `e2e/clients`.
#[derive(Debug)]
pub struct Python(PathBuf);

/// The directory that has the scripts of `e2e/clients/node` and their packages.
#[derive(Debug)]
pub struct Node(PathBuf);

/// A browser.
#[derive(Debug)]
pub struct Chromium(());

/// A page in a browser. The browser is killed when it is dropped.
#[derive(Debug)]
pub struct Window {
    child: Child,
    pub(crate) profile: TempDir,
}

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
    pub fn command(&self, relay: SocketAddr) -> Command {
        let mut command = Command::new("curl");
        command
            .args(["--silent", "--show-error", "--max-time", "60", "--noproxy", "*"])
            .arg("--connect-to")
            .arg(format!("::{}:{}", relay.ip(), relay.port()));
        command
    }

    /// Runs curl with arguments.
    #[must_use]
    pub fn run<I, S>(&self, relay: SocketAddr, arguments: I) -> Output
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
        let prepared = std::env::var_os("SIDELANE_PYTHON").map(PathBuf::from);
        let python = prepared.or_else(|| Some(target()?.join("e2e-venv/bin/python3")));
        match python {
            Some(python) if python.exists() => Some(Self(python)),
            _ => {
                skip(test, "no Python environment; `cargo test-all` prepares one");
                None
            }
        }
    }

    /// Returns a call of a script of `e2e/clients`.
    #[must_use]
    pub fn script(&self, script: &str) -> Command {
        let clients = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients");
        let mut command = Command::new(&self.0);
        // What tests run leaves nothing in the source tree.
        command.env("PYTHONDONTWRITEBYTECODE", "1").arg(clients.join(script));
        command
    }

    /// Runs one case of `e2e/clients/client.py`; it prints what it saw as one JSON object.
    #[must_use]
    pub fn run(&self, case: &str, relay: SocketAddr) -> Value {
        Peer::client("client.py", self.script("client.py"), case, relay).finish()
    }
}

impl Node {
    /// Returns the packages that `cargo test-all` prepared, or says that `test` is skipped.
    #[must_use]
    pub fn find(test: &str) -> Option<Self> {
        let prepared = std::env::var_os("SIDELANE_NODE").map(PathBuf::from);
        let directory = prepared.or_else(|| Some(target()?.join("e2e-node")));
        match directory {
            Some(directory) if directory.join("node_modules").exists() => Some(Self(directory)),
            _ => {
                skip(test, "no Node.js packages; `cargo test-all` prepares them");
                None
            }
        }
    }

    /// Returns a call of a script of `e2e/clients/node`.
    #[must_use]
    pub fn script(&self, script: &str) -> Command {
        let mut command = Command::new("node");
        command.arg(self.0.join(script));
        command
    }
}

impl Chromium {
    /// Returns Chromium, or says that `test` is skipped.
    #[must_use]
    pub fn find(test: &str) -> Option<Self> {
        let version = Command::new("chromium").arg("--version").output();
        if version.is_ok_and(|output| output.status.success()) {
            return Some(Self(()));
        }
        skip(test, "chromium is not installed");
        None
    }

    /// Opens a page in a window of its own, without a screen and with a fresh profile. It runs until
    /// it is dropped.
    #[must_use]
    pub fn open(&self, url: &str) -> Window {
        self.open_with(url, &[])
    }

    /// The same with more arguments.
    #[must_use]
    pub fn open_with(&self, url: &str, arguments: &[&str]) -> Window {
        let profile = tempfile::tempdir().expect("a temporary directory");
        let mut user_data = OsString::from("--user-data-dir=");
        user_data.push(profile.path());
        let child = Command::new("chromium")
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
            .args(["--disable-quic", "--no-first-run", "--disable-background-networking"])
            .args(["--disable-component-update", "--disable-sync", "--no-proxy-server"])
            // Without a port it renders once and ends; the port is one that the kernel picks.
            .arg("--remote-debugging-port=0")
            .arg(user_data)
            .args(arguments)
            .arg(url)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .expect("chromium starts");
        Window { child, profile }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // Its helpers are in its group and would outlive it.
        let group = format!("-{}", self.child.id());
        let _ = Command::new("kill").args(["-KILL", "--", &group]).status();
        let _ = self.child.wait();
    }
}

/// Returns a call of the peer in `e2e/peers/tonic`.
#[must_use]
pub fn tonic() -> Command {
    let mut command = Command::new(crate::process::build_directory().join("sidelane-e2e-tonic"));
    command.env_remove("RUST_BACKTRACE");
    command
}

/// Returns the target directory.
fn target() -> Option<&'static Path> {
    crate::process::build_directory().parent()
}
