//! Requests one after the other while a test does something else, as a careful client sends them.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crate::client::{Answer, Client};
use crate::tls::Connector;
use crate::wait;

/// Where requests go; a test may change it.
pub type Target = Arc<Mutex<SocketAddr>>;

/// A thread that sends the same GET again and again and wants 200 each time.
///
/// It does what RFC 9112 §9.3.1 lets any client do: a request on a *kept* connection that ends without
/// a byte of an answer is sent again on a fresh one. A fresh connection must answer. An address that
/// refuses connections is looked up again.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    answers: Arc<AtomicU64>,
    thread: JoinHandle<io::Result<()>>,
}

impl Load {
    /// Keeps its connection for as long as the relay does.
    #[must_use]
    pub fn keeping(target: Target, request: Vec<u8>) -> Self {
        Self::start(target, request, true, None)
    }

    /// Makes a connection for each request.
    #[must_use]
    pub fn connecting(target: Target, request: Vec<u8>) -> Self {
        Self::start(target, request, false, None)
    }

    /// By TLS with a host of that name.
    #[must_use]
    pub fn secure(
        target: Target,
        request: Vec<u8>,
        keeps: bool,
        connector: Connector,
        name: &'static str,
    ) -> Self {
        Self::start(target, request, keeps, Some((connector, name)))
    }

    fn start(
        target: Target,
        request: Vec<u8>,
        keeps: bool,
        tls: Option<(Connector, &'static str)>,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let answers = Arc::new(AtomicU64::new(0));
        let (stopped, answered) = (Arc::clone(&stop), Arc::clone(&answers));
        let thread = std::thread::spawn(move || {
            let mut kept = None;
            while !stopped.load(Ordering::SeqCst) {
                let (client, answer) = exchange(&target, &request, kept.take(), tls.as_ref())?;
                if answer.head.status != 200 {
                    return Err(io::Error::other(format!("{answer:?}")));
                }
                answered.fetch_add(1, Ordering::SeqCst);
                let closes = answer.head.list("connection").contains("close");
                kept = (keeps && !closes).then_some(client);
            }
            Ok(())
        });
        Self { stop, answers, thread }
    }

    /// Answers so far.
    #[must_use]
    pub fn answers(&self) -> u64 {
        self.answers.load(Ordering::SeqCst)
    }

    /// Returns whether a request failed; [`Load::end`] says which.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits until so many more were answered.
    pub fn goes_on(&self, count: u64) {
        let from = self.answers();
        wait::until("answers under load", || {
            (self.answers() >= from + count || self.thread.is_finished()).then_some(())
        });
    }

    /// Ends it; the error is the first request that failed.
    pub fn end(self) -> io::Result<u64> {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().expect("a load does not panic")?;
        Ok(self.answers.load(Ordering::SeqCst))
    }
}

fn exchange(
    target: &Target,
    request: &[u8],
    kept: Option<Client>,
    tls: Option<&(Connector, &'static str)>,
) -> io::Result<(Client, Answer)> {
    if let Some(mut client) = kept
        && client.try_send(request).is_ok()
    {
        match client.try_head() {
            Ok(head) => return client.try_body("GET", head).map(|answer| (client, answer)),
            // Closed at rest, as the request was on its way.
            Err(error) if client.has_nothing() => drop(error),
            Err(error) => return Err(error),
        }
    }
    let mut client = if let Some((connector, name)) = tls {
        connector.try_connect(*target.lock().expect("no panic"), name)?
    } else {
        Client::over(wait::until("an open address", || {
            TcpStream::connect(*target.lock().expect("no panic")).ok()
        }))
    };
    client.try_send(request)?;
    let answer = client.try_answer("GET")?;
    Ok((client, answer))
}
