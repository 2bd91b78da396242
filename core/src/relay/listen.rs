//! Clients' connections from accept to their protocol. One socket per data-path thread and address,
//! so that the kernel spreads connections and none crosses a thread, unless a listener asks for an
//! exact balance.
//!
//! Knows how a connection begins: its PROXY header, TLS, its first bytes. Which listeners there are is
//! `listeners`' business.

use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use sidelane_abi::failure;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::Relay;
use super::listeners::{Listener, Open, Settings};
use super::open::RelayOpener;
use super::policy::{now, watch_stream};
use super::proxy_header;
use super::stream::{ClientStream, Place};
use super::tls::Acceptor;
use crate::config::{self, Balance, Carries};
use crate::error::chain;
use crate::front::{self, ConnectionInfo, forwarded, or_shutdown};
use crate::plugin::SniffResult;
use crate::plugin::lend::Failure;
use crate::random;

mod secure;

/// Connections that the kernel completes before they are accepted.
const BACKLOG: i32 = 4096;

/// Pause after the system refused a connection (out of descriptors, say): retrying at once would
/// spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Silence on a client's connection before the first probe.
const PROBE_AFTER: Duration = Duration::from_secs(60);

/// Between probes.
const PROBE_EVERY: Duration = Duration::from_secs(20);

/// Probes without an answer that end the connection.
const PROBES: u32 = 3;

/// A connection of a listener that goes is not asked to end before this age: its first request may be
/// under way.
const FIRST_REQUEST_GRACE: Duration = Duration::from_secs(1);

/// How long an HTTP/1.1 connection that is to end may wait for the request whose response says so.
/// Closed at once, most clients that ask again and again would meet a closed connection.
const IDLE_GRACE: Duration = Duration::from_secs(5);

/// Bytes shown to plugins until they know whose a connection is. A magic number, or the first line of
/// a protocol; what is not decided by then goes to the HTTP front.
const SNIFF_BYTES_MAX: usize = 4 * 1024;

/// A connection's age is shortened by up to one in this many parts of it, at random, so that clients
/// that came together do not come back together.
const AGE_JITTER_PART: u32 = 10;

/// Binds `count` sockets to one address; port 0 is chosen once for all of them.
///
/// # Errors
/// The system's.
pub fn bind(address: SocketAddr, count: usize) -> io::Result<Vec<std::net::TcpListener>> {
    let mut address = address;
    let mut listeners = Vec::with_capacity(count);
    for _ in 0..count {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        if count > 1 {
            socket.set_reuse_port(true)?;
        }
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        let listener = std::net::TcpListener::from(socket);
        address = listener.local_addr()?;
        listeners.push(listener);
    }
    Ok(listeners)
}

/// Accepts clients on this thread, the relay's `own`, until the listener stops; those that the kernel
/// has let in by then are served still.
pub(super) async fn accept(relay: Arc<Relay>, open: Arc<Open>, socket: TcpListener, own: usize) {
    let listener = Arc::clone(open.listener());
    let mut closing = listener.closing();
    loop {
        let accepted = tokio::select! {
            accepted = socket.accept() => accepted,
            // An error means that the listener is gone, which is the same.
            _ = closing.wait_for(|closing| *closing) => break,
        };
        match accepted {
            Ok((stream, peer)) => admit(&relay, &listener, stream, peer, own),
            Err(error) => {
                let name = listener.config().name.clone();
                tracing::error!(listener = &*name, %error, "cannot accept a connection");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    let Ok(socket) = socket.into_std() else { return };
    // As many as may have waited; those that come meanwhile are refused with the socket.
    for _ in 0..BACKLOG {
        // Nobody is waited for.
        let Ok((stream, peer)) = socket.accept() else { break };
        let stream = stream.set_nonblocking(true).and_then(|()| TcpStream::from_std(stream));
        match stream {
            Ok(stream) => admit(&relay, &listener, stream, peer, own),
            Err(error) => tracing::debug!(%peer, %error, "client lost while its listener closed"),
        }
    }
    drop(socket);
    // With the last one connections are asked to end.
    drop(open);
}

/// Gives a connection its place, and begins to serve it on its thread.
fn admit(
    relay: &Arc<Relay>,
    listener: &Arc<Listener>,
    stream: TcpStream,
    peer: SocketAddr,
    own: usize,
) {
    let rules = listener.rules();
    let config = Arc::clone(&rules.config);
    let settings = relay.listeners.settings();
    let place = match config.balance {
        Balance::Kernel => Place::try_new(relay, own, settings.connections_max),
        Balance::Exact => Place::try_balanced(relay, own, settings.connections_max),
    };
    let Some(place) = place else {
        relay.metrics.connection_refused(&config.name);
        tracing::warn!(listener = &*config.name, client = %peer, "too many connections; closed");
        return;
    };
    let thread = place.thread();
    let client = Client {
        relay: Arc::clone(relay),
        listener: Arc::clone(listener),
        config,
        acceptor: rules.acceptor.clone(),
        settings,
        peer,
        began: Instant::now(),
    };
    if thread == own {
        tokio::spawn(client.serve(stream, place));
        return;
    }
    let name = Arc::clone(&client.config.name);
    let handed_over = stream.into_std().is_ok_and(|stream| {
        relay.listeners.shards()[thread].spawn(async move {
            match TcpStream::from_std(stream) {
                Ok(stream) => client.serve(stream, place).await,
                Err(error) => tracing::debug!(%peer, %error, "client lost between threads"),
            }
        })
    });
    if !handed_over {
        relay.metrics.connection_refused(&name);
        tracing::warn!(listener = &*name, client = %peer, "its thread takes no connection; closed");
    }
}

/// No delay, since what is written is whole; and probes, so that a client that vanished while its
/// exchange waits is found out.
fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let keepalive =
        TcpKeepalive::new().with_time(PROBE_AFTER).with_interval(PROBE_EVERY).with_retries(PROBES);
    SockRef::from(stream).set_tcp_keepalive(&keepalive)
}

/// A client that was let in, and what its connection goes by from begin to end.
struct Client {
    relay: Arc<Relay>,
    listener: Arc<Listener>,
    config: Arc<config::Listener>,
    acceptor: Option<Arc<Acceptor>>,
    settings: Arc<Settings>,
    /// Who connected: the client itself, or a proxy.
    peer: SocketAddr,
    began: Instant,
}

impl Client {
    async fn serve(self, stream: TcpStream, place: Place) {
        if let Err(error) = tune(&stream) {
            tracing::debug!(client = %self.peer, %error, "client gone before it was served");
            return;
        }
        let up = self.relay.metrics.connection_open(&self.config.name);
        let mut stream = ClientStream::new(stream, place, up);
        let mut shutdown = pin!(self.shutdown());
        let mut address = self.peer;
        if self.config.proxy_protocol {
            // Boxed, as below: what few connections wait for is no part of the memory of all.
            match Box::pin(self.proxy_header(stream, shutdown.as_mut())).await {
                Some((behind, client)) => {
                    stream = behind;
                    address = client.unwrap_or(address);
                }
                None => return,
            }
        }
        let mut info = ConnectionInfo::plain(Arc::clone(&self.config.name), address);
        if let Some(acceptor) = &self.acceptor {
            match Box::pin(self.secure(acceptor, stream, address, shutdown.as_mut())).await {
                Some((behind, facts)) => {
                    stream = behind;
                    info.scheme = https();
                    info.tls = Some(Arc::new(facts));
                }
                None => return,
            }
        }
        match &self.config.carries {
            Carries::Http => {}
            Carries::Type(protocol_type) => {
                return self.serve_stream(protocol_type, None, stream, &info).await;
            }
            Carries::Sniffed => match Box::pin(self.sniff(stream, shutdown.as_mut())).await {
                Some(Sniffed::Http(behind)) => stream = behind,
                Some(Sniffed::Stream { protocol_type, host, stream }) => {
                    return self.serve_stream(&protocol_type, host, stream, &info).await;
                }
                None => return,
            },
        }
        info.https_redirect = self.config.https_redirect;
        info.ends_soon = AtomicBool::new(self.relay.is_withdrawn());
        let trusted = &self.settings.trusted_proxies;
        if !trusted.is_empty() && forwarded::is_in(address.ip(), trusted) {
            info.trusted_proxies = Some(Arc::clone(trusted));
        }
        let front = Arc::clone(&self.settings.front);
        let entry = self.relay.entry();
        let info = Arc::new(info);
        let ending = self.gently(shutdown, Arc::clone(&info));
        if let Err(error) = front::serve(stream, info, front, entry, ending).await {
            tracing::debug!(client = %self.peer, error = chain(&error), "connection ended");
        }
    }

    /// Ready when an HTTP connection shall end: a while after `shutdown`, in which HTTP/1.1 tells its
    /// client with the next response; at once where the whole relay stops.
    async fn gently(
        &self,
        shutdown: Pin<&mut impl Future<Output = ()>>,
        info: Arc<ConnectionInfo>,
    ) {
        shutdown.await;
        info.ends_soon.store(true, Ordering::Relaxed);
        let mut stopping = self.relay.stopping.subscribe();
        // Boxed: few connections ever wait here, and all would have room for it.
        let stopped = Box::pin(async move {
            // An error means that the relay is gone, which is the same.
            let _ = stopping.wait_for(|stopping| *stopping).await;
        });
        let _ = timeout(IDLE_GRACE, stopped).await;
    }

    /// Ready when the connection shall end with what runs on it: its listener goes, or it has its age.
    fn shutdown(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut stopping = self.listener.stopping();
        let (relay, name) = (Arc::clone(&self.relay), Arc::clone(&self.config.name));
        let began = self.began;
        let end =
            self.settings.max_connection_age.map(|age| began + jittered(age, random::number()));
        async move {
            let stopped = async {
                // An error means that the listener is gone, which is the same.
                let _ = stopping.wait_for(|stopping| *stopping).await;
                if began.elapsed() < FIRST_REQUEST_GRACE {
                    // Boxed: few connections ever wait here, and all would have room for it.
                    Box::pin(sleep_until(began + FIRST_REQUEST_GRACE)).await;
                }
            };
            let Some(end) = end else { return stopped.await };
            tokio::select! {
                () = stopped => {}
                () = Box::pin(sleep_until(end)) => relay.metrics.connection_aged(&name),
            }
        }
    }

    /// Takes the PROXY header off a connection. `None`: it is closed.
    async fn proxy_header(
        &self,
        mut stream: ClientStream,
        shutdown: Pin<&mut impl Future<Output = ()>>,
    ) -> Option<(ClientStream, Option<SocketAddr>)> {
        let trusted = &self.settings.trusted_proxies;
        if !forwarded::is_in(self.peer.ip(), trusted) {
            self.refuse_proxy("untrusted", "its address is not in relay.trusted_proxies");
            return None;
        }
        let mut ahead = BytesMut::new();
        let limit = self.settings.front.request_head_timeout;
        let read = {
            let read = pin!(timeout(limit, proxy_header::read(&mut stream, &mut ahead)));
            or_shutdown(read, shutdown).await?
        };
        match read {
            Ok(Ok(client)) => Some((stream.with_ahead(ahead.freeze()), client)),
            Ok(Err(error)) => {
                self.refuse_proxy(error.label(), &chain(&error));
                None
            }
            Err(_elapsed) => {
                self.refuse_proxy("timeout", "no whole PROXY header within timeouts.request_head");
                None
            }
        }
    }

    fn refuse_proxy(&self, label: &'static str, reason: &str) {
        let name = &self.config.name;
        self.relay.metrics.proxy_header_refused(name, label);
        tracing::debug!(listener = &**name, peer = %self.peer, reason, "no PROXY header; closed");
        // A balancer's health check looks so too, every few seconds.
        if label != "closed"
            && let Some(refused) = self.listener.refused_headers.note(now())
        {
            let (listener, peer) = (&**name, self.peer);
            tracing::warn!(listener, %peer, reason, refused, "connections without a PROXY header that holds; closed");
        }
    }

    /// Finds out whose a connection is by its first bytes. `None`: it is closed.
    async fn sniff(
        &self,
        mut stream: ClientStream,
        shutdown: Pin<&mut impl Future<Output = ()>>,
    ) -> Option<Sniffed> {
        let limit = self.settings.front.request_head_timeout;
        let read = {
            let read = pin!(timeout(limit, read_until_known(&self.relay, &mut stream)));
            or_shutdown(read, shutdown).await?
        };
        let (ahead, known) = match read {
            Ok(Ok(read)) => read,
            Ok(Err(error)) => {
                tracing::debug!(client = %self.peer, %error, "client gone before it said anything");
                return None;
            }
            Err(_elapsed) => {
                tracing::debug!(client = %self.peer, "too slow to say what it is; closed");
                return None;
            }
        };
        if ahead.is_empty() {
            return None;
        }
        let stream = stream.with_ahead(ahead);
        Some(match known {
            None => Sniffed::Http(stream),
            Some((protocol_type, host)) => Sniffed::Stream { protocol_type, host, stream },
        })
    }

    /// A byte-born protocol: the plugin owns the client's bytes. `host`, where the first bytes named
    /// one, is what it is routed by; else it is the one that TLS named.
    async fn serve_stream(
        &self,
        protocol_type: &Arc<str>,
        host: Option<Arc<str>>,
        stream: ClientStream,
        info: &ConnectionInfo,
    ) {
        let (relay, listener) = (&self.relay, &self.config.name);
        let Some(plugin) = relay.plugins.find(protocol_type) else {
            tracing::warn!(
                listener = &**listener,
                protocol_type = &**protocol_type,
                "no plugin carries the listener's protocol_type; connection closed"
            );
            return;
        };
        let client = &info.client_address_text;
        let mut meta = relay.meta(&plugin, client, listener, &Arc::default());
        if let Some(tls) = &info.tls {
            tls.tell(&mut meta);
        }
        if plugin.quarantined() {
            let failure = Failure {
                code: failure::PLUGIN_FAILED,
                retry_after_s: None,
                detail: "the plugin failed too often".to_owned(),
            };
            plugin.refuse_stream(stream, failure).await;
            return;
        }
        let record = Arc::new(relay.metrics.exchange("relay", plugin.name()));
        let opener = RelayOpener::new(Arc::clone(relay), meta.clone(), Arc::clone(&record))
            .over(info.tls.clone());
        let held = opener.held();
        let call = plugin.accept_stream(meta, stream, opener.by_host(host));
        let end = watch_stream(call, held).await;
        record.end(end.code);
    }
}

/// The scheme of connections with TLS; one for all.
fn https() -> Arc<str> {
    static HTTPS: LazyLock<Arc<str>> = LazyLock::new(|| "https".into());
    Arc::clone(&HTTPS)
}

/// Whose a connection is that may be anybody's.
enum Sniffed {
    /// No plugin knows it.
    Http(ClientStream),
    /// A plugin does.
    Stream { protocol_type: Arc<str>, host: Option<Arc<str>>, stream: ClientStream },
}

/// A type, and the host that the first bytes named.
type Known = (Arc<str>, Option<Arc<str>>);

/// Reads until the plugins know whose the bytes are, or that they are nobody's.
async fn read_until_known(
    relay: &Relay,
    stream: &mut (impl AsyncRead + Unpin),
) -> io::Result<(Bytes, Option<Known>)> {
    let mut ahead = BytesMut::with_capacity(SNIFF_BYTES_MAX);
    loop {
        let room = SNIFF_BYTES_MAX - ahead.len();
        let read = (&mut *stream).take(room as u64).read_buf(&mut ahead).await?;
        if read == 0 {
            // All there is, or all that is looked at.
            return Ok((ahead.freeze(), None));
        }
        let known = match relay.plugins.sniff(&ahead, &[] as &[&str]) {
            SniffResult::NeedMore => continue,
            SniffResult::No => None,
            SniffResult::Yes { protocol, host, rivals } => {
                note_rivals(protocol.name(), &rivals);
                Some((Arc::clone(protocol.name()), host.map(Arc::from)))
            }
        };
        return Ok((ahead.freeze(), known));
    }
}

/// Says once that several types claim the same bytes: a client chooses which, so it may come often.
fn note_rivals(taken: &str, rivals: &[Arc<str>]) {
    static SAID: AtomicBool = AtomicBool::new(false);
    if !rivals.is_empty() && !SAID.swap(true, Ordering::Relaxed) {
        tracing::warn!(
            taken,
            others = rivals.join(", "),
            "several protocol types recognise the same connection: the first by name takes it"
        );
    }
}

/// Returns the age shortened by up to a tenth.
fn jittered(age: Duration, random: u64) -> Duration {
    let part = u32::try_from(random >> 32).expect("32 bits are left");
    age - (age / AGE_JITTER_PART).mul_f64(f64::from(part) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_age_is_shortened_by_a_tenth_at_most() {
        let age = Duration::from_secs(100);
        assert_eq!(jittered(age, 0), age);
        assert_eq!(jittered(age, u64::MAX), Duration::from_secs(90));
        assert_eq!(jittered(age, u64::from(u32::MAX / 2) << 32).as_secs(), 95);
    }
}
