//! One service behind one program, and the shortest ways to ask it something.

use std::io;

use crate::client::{self, Answer, Client};
use crate::process::{Setup, Sidelane};
use crate::service::{Connection, Request, Service};

/// A program with relay and sidecar, and the service at `http://api.localhost/`.
#[derive(Debug)]
pub struct Stage {
    /// The program.
    pub sidelane: Sidelane,
    /// The service.
    pub service: Service,
}

impl Stage {
    /// Puts a program before a service.
    #[must_use]
    pub fn of(service: Service) -> Self {
        let sidelane = Sidelane::both(&Setup::of(service.address()));
        Self { sidelane, service }
    }

    /// A service that answers 200 with `ok`.
    #[must_use]
    pub fn ok() -> Self {
        Self::of(Service::ok())
    }

    /// A service that runs a script for each connection.
    pub fn script<F>(script: F) -> Self
    where
        F: Fn(&mut Connection) -> io::Result<()> + Send + Sync + 'static,
    {
        Self::of(Service::start(script))
    }

    /// A service that runs a script for each connection, behind a program that is set up as said.
    pub fn script_with<F>(setup: impl FnOnce(Setup) -> Setup, script: F) -> Self
    where
        F: Fn(&mut Connection) -> io::Result<()> + Send + Sync + 'static,
    {
        let service = Service::start(script);
        let sidelane = Sidelane::both(&setup(Setup::of(service.address())));
        Self { sidelane, service }
    }

    /// Returns a connection to the relay.
    #[must_use]
    pub fn connect(&self) -> Client {
        Client::connect(self.sidelane.web())
    }

    /// Sends bytes on a connection of their own, and reads the answer to `method`.
    #[must_use]
    pub fn ask(&self, method: &str, bytes: impl AsRef<[u8]>) -> Answer {
        client::request(self.sidelane.web(), method, bytes)
    }

    /// Asks for a path.
    #[must_use]
    pub fn get(&self, path: &str) -> Answer {
        self.ask("GET", get(path))
    }

    /// Sends a request that must reach the service, and returns both sides of it.
    #[must_use]
    pub fn pass(&self, name: &str, method: &str, bytes: impl AsRef<[u8]>) -> (Request, Answer) {
        self.service.take_requests();
        let answer = self.ask(method, bytes);
        assert_eq!(answer.head.status, 200, "{name}: {answer:?}");
        let mut requests = self.service.take_requests();
        assert_eq!(requests.len(), 1, "{name}: one request reaches the service: {requests:?}");
        (requests.remove(0), answer)
    }
}

/// Returns the bytes of a GET without a body.
#[must_use]
pub fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: api.localhost\r\n\r\n").into_bytes()
}
