//! A TCP load balancer as stands before relays: round robin over those that say they are ready.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::client::Client;

/// Between two looks at a relay's `/ready`. What real ones take seconds for, a test has not.
const INTERVAL: Duration = Duration::from_millis(20);

/// A relay behind the balancer.
#[derive(Clone, Copy, Debug)]
pub struct Backend {
    /// Where clients are sent.
    pub web: SocketAddr,
    /// Who says whether they may be.
    pub health: SocketAddr,
}

#[derive(Debug, Default)]
struct State {
    backends: Mutex<Vec<(Backend, bool)>>,
    turn: AtomicUsize,
    stop: AtomicBool,
}

impl State {
    /// Whose turn it is; `None`: nobody is ready.
    fn choose(&self) -> Option<SocketAddr> {
        let backends = self.backends.lock().expect("no panic");
        let ready: Vec<_> = backends.iter().filter(|(_, is_ready)| *is_ready).collect();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed).checked_rem(ready.len())?;
        Some(ready[turn].0.web)
    }
}

/// A running balancer. It ends when dropped; connections end with their ends.
#[derive(Debug)]
pub struct Balancer {
    address: SocketAddr,
    state: Arc<State>,
}

impl Balancer {
    /// Listens on a free port; nobody is behind it yet.
    #[must_use]
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a bound listener");
        let state = Arc::<State>::default();
        std::thread::spawn({
            let state = Arc::clone(&state);
            move || {
                for stream in listener.incoming() {
                    if state.stop.load(Ordering::SeqCst) {
                        return;
                    }
                    let (Ok(stream), state) = (stream, Arc::clone(&state)) else { continue };
                    std::thread::spawn(move || {
                        // A client of which a backend wants nothing sees its connection end.
                        let _ = forward(&stream, &state);
                        let _ = stream.shutdown(Shutdown::Both);
                    });
                }
            }
        });
        std::thread::spawn({
            let state = Arc::clone(&state);
            move || {
                while !state.stop.load(Ordering::SeqCst) {
                    probe(&state);
                    std::thread::park_timeout(INTERVAL);
                }
            }
        });
        Self { address, state }
    }

    /// Returns where clients connect.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Puts a relay behind it, in place of one that had the same address for clients.
    pub fn put(&self, backend: Backend) {
        let mut backends = self.state.backends.lock().expect("no panic");
        backends.retain(|(other, _)| other.web != backend.web);
        backends.push((backend, false));
    }

    /// Returns whether new connections go to this relay.
    #[must_use]
    pub fn sends_to(&self, web: SocketAddr) -> bool {
        let backends = self.state.backends.lock().expect("no panic");
        backends.iter().any(|(backend, is_ready)| backend.web == web && *is_ready)
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::SeqCst);
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(self.address);
    }
}

fn probe(state: &State) {
    let backends: Vec<_> = state.backends.lock().expect("no panic").clone();
    for (backend, _) in backends {
        let is_ready = is_ready(backend.health).unwrap_or(false);
        for (other, was_ready) in state.backends.lock().expect("no panic").iter_mut() {
            if other.health == backend.health {
                *was_ready = is_ready;
            }
        }
    }
}

fn is_ready(health: SocketAddr) -> io::Result<bool> {
    let mut client = Client::over(TcpStream::connect(health)?);
    client.try_send(b"GET /ready HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
    Ok(client.try_head()?.status == 200)
}

/// Joins a client's connection with a backend's until both directions have ended.
fn forward(client: &TcpStream, state: &State) -> io::Result<()> {
    let chosen = state.choose().ok_or(io::ErrorKind::ConnectionRefused)?;
    let backend = TcpStream::connect(chosen)?;
    for stream in [client, &backend] {
        stream.set_nodelay(true)?;
    }
    let (mut up, mut behind) = (client.try_clone()?, backend.try_clone()?);
    let upwards = std::thread::spawn(move || {
        let copied = io::copy(&mut up, &mut behind);
        // One that is gone needs no word.
        let _ = behind.shutdown(Shutdown::Write);
        copied
    });
    let copied = io::copy(&mut &backend, &mut &*client);
    let _ = client.shutdown(Shutdown::Write);
    let _ = upwards.join();
    copied.map(drop)
}
