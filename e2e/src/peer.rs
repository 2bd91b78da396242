//! Clients and services outside of this workspace's code, as child processes that speak JSON lines.
//!
//! A service prints `{"port": …}` when it listens. A client may print lines while it runs, for tests
//! that act in its midst. Both print what they saw as their last line: a client at its end, a service
//! once its input ends. Each ends by itself after two minutes, so a wait for a line is no wait for ever.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::Value;

/// A running peer. Killed when dropped.
#[derive(Debug)]
pub struct Peer {
    name: String,
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Peer {
    /// Starts a client of `relay` with one of its cases.
    #[must_use]
    pub fn client(name: &str, mut command: Command, case: &str, relay: SocketAddr) -> Self {
        command.arg(case).arg(relay.ip().to_string()).arg(relay.port().to_string());
        Self::start(format!("{name} {case}"), command)
    }

    /// Starts a service, and returns where it listens.
    #[must_use]
    pub fn service(name: &str, command: Command) -> (Self, SocketAddr) {
        let mut peer = Self::start(name.to_owned(), command);
        let line = peer.line();
        let port = line["port"].as_u64().and_then(|port| u16::try_from(port).ok());
        (peer, SocketAddr::from((Ipv4Addr::LOCALHOST, port.expect("a port"))))
    }

    /// Starts a program that prints JSON lines.
    #[must_use]
    pub fn start(name: String, mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().expect("a pipe"));
        Self { name, child, input, output }
    }

    /// Returns the next line it prints.
    pub fn line(&mut self) -> Value {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap_or_else(|error| panic!("{}: {error}", self.name));
        serde_json::from_str(&line)
            .unwrap_or_else(|error| panic!("{} printed {line:?}: {error}", self.name))
    }

    /// Writes a line to its input.
    pub fn type_line(&mut self, line: &str) {
        let input = self.input.as_mut().expect("open until the peer is finished");
        let written = input.write_all(format!("{line}\n").as_bytes());
        written.unwrap_or_else(|error| panic!("{}: {error}", self.name));
    }

    /// Ends its input, and returns the line it prints last.
    #[must_use]
    pub fn finish(mut self) -> Value {
        drop(self.input.take());
        let seen = self.line();
        let status = self.child.wait().expect("it is ours to wait for");
        assert!(status.success(), "{}: {status}", self.name);
        seen
    }

    /// Kills it, as SIGKILL does: its connections end without a word.
    pub fn kill(self) {
        drop(self);
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Fails where it has ended already, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
