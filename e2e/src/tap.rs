//! Counts what passes between a sidecar and its relay, connection by connection, and changes nothing.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of one connection so far.
#[derive(Debug, Default)]
pub struct Counts {
    up: AtomicU64,
    down: AtomicU64,
}

impl Counts {
    /// Bytes from the dialler, and to it.
    #[must_use]
    pub fn both(&self) -> (u64, u64) {
        (self.up.load(Ordering::SeqCst), self.down.load(Ordering::SeqCst))
    }
}

/// A place to dial instead of the relay.
#[derive(Debug)]
pub struct Tap {
    address: SocketAddr,
    connections: Arc<Mutex<Vec<Arc<Counts>>>>,
}

impl Tap {
    /// Listens, and passes each connection on to `to`. Ends with the process.
    ///
    /// # Panics
    /// Where no port is free.
    #[must_use]
    pub fn new(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("an address");
        let connections = Arc::<Mutex<Vec<Arc<Counts>>>>::default();
        let seen = Arc::clone(&connections);
        std::thread::spawn(move || {
            for dialled in listener.incoming() {
                let (Ok(dialled), Ok(relay)) = (dialled, TcpStream::connect(to)) else { continue };
                let counts = Arc::<Counts>::default();
                seen.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&counts));
                let ends = || Some((dialled.try_clone().ok()?, relay.try_clone().ok()?));
                let (Some((from, to)), Some((back, forth))) = (ends(), ends()) else { continue };
                let up = Arc::clone(&counts);
                std::thread::spawn(move || pass(from, to, &up.up));
                std::thread::spawn(move || pass(forth, back, &counts.down));
            }
        });
        Self { address, connections }
    }

    /// What is to be dialled.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The connections so far, in the order in which they came.
    #[must_use]
    pub fn connections(&self) -> Vec<Arc<Counts>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, count: &AtomicU64) {
    let mut space = vec![0; 64 * 1024];
    let mut moved = || -> io::Result<bool> {
        let read = from.read(&mut space)?;
        count.fetch_add(read as u64, Ordering::SeqCst);
        to.write_all(&space[..read])?;
        Ok(read > 0)
    };
    while let Ok(true) = moved() {}
    let _ = to.shutdown(Shutdown::Write);
}
