//! An address where nobody listens, and nobody will.

use std::net::{SocketAddr, TcpListener, TcpStream};

/// An address that refuses connections for as long as this lives: the own end of a connection, which
/// the system gives to no listener. A port that was merely free may be another test's a moment later.
#[derive(Debug)]
pub struct Nobody {
    stream: TcpStream,
    _peer: TcpListener,
}

impl Nobody {
    /// Finds one.
    ///
    /// # Panics
    /// Where loopback does not work.
    #[must_use]
    pub fn new() -> Self {
        let peer = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = peer.local_addr().expect("it is bound");
        Self { stream: TcpStream::connect(address).expect("it listens"), _peer: peer }
    }

    /// Returns the address.
    ///
    /// # Panics
    /// Never: the socket is connected.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.stream.local_addr().expect("it is connected")
    }
}

impl Default for Nobody {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_listens_there() {
        let nobody = Nobody::new();
        let refused = TcpStream::connect(nobody.address()).expect_err("refused");
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
        TcpListener::bind(nobody.address()).expect_err("it is taken");
    }
}
