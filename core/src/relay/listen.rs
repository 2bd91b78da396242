//! The relay's client listeners: one socket per data-path thread and address, so that the kernel
//! spreads connections and none crosses a thread.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use sidelane_abi::failure;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::Relay;
use super::entry::HttpEntry;
use super::open::RelayOpener;
use super::policy::watch_stream;
use crate::error::chain;
use crate::front::{self, ConnectionInfo};
use crate::metrics::Up;
use crate::plugin::lend::Failure;

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

/// One listener as its accept loops share it.
pub(super) struct Listener {
    pub(super) name: Arc<str>,
    /// `None`: the HTTP front.
    pub(super) protocol_type: Option<Arc<str>>,
    pub(super) front: Arc<front::FrontConfig>,
    /// Connections of all listeners of the process.
    pub(super) connections: Arc<Semaphore>,
    pub(super) entry: Arc<HttpEntry>,
    pub(super) stopping: watch::Receiver<bool>,
}

/// Accepts clients on this thread until `stopping` turns true.
pub(super) async fn accept(relay: Arc<Relay>, listener: Arc<Listener>, socket: TcpListener) {
    let mut stopping = listener.stopping.clone();
    loop {
        let accepted = tokio::select! {
            accepted = socket.accept() => accepted,
            _ = stopping.wait_for(|stopping| *stopping) => return,
        };
        let (stream, client) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::error!(listener = &*listener.name, %error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&listener.connections).try_acquire_owned() else {
            relay.metrics.connection_refused(&listener.name);
            tracing::warn!(listener = &*listener.name, %client, "too many connections; closed");
            continue;
        };
        let (relay, listener) = (Arc::clone(&relay), Arc::clone(&listener));
        let stream = ClientStream::new(stream, permit, &relay, &listener.name);
        tokio::spawn(async move {
            serve(&relay, &listener, stream, client).await;
        });
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

async fn serve(
    relay: &Arc<Relay>,
    listener: &Arc<Listener>,
    stream: ClientStream,
    client: SocketAddr,
) {
    if let Err(error) = tune(&stream.stream) {
        tracing::debug!(%client, %error, "client gone before it was served");
        return;
    }
    if let Some(protocol_type) = &listener.protocol_type {
        return serve_stream(relay, listener, protocol_type, stream, client).await;
    }
    let info = Arc::new(ConnectionInfo::plain(Arc::clone(&listener.name), client));
    let mut stopping = listener.stopping.clone();
    let shutdown = async move {
        // An error means that the relay is gone: shut down too.
        let _ = stopping.wait_for(|stopping| *stopping).await;
    };
    let (front, entry) = (Arc::clone(&listener.front), Arc::clone(&listener.entry));
    if let Err(error) = front::serve(stream, info, front, entry, shutdown).await {
        tracing::debug!(%client, error = chain(&error), "connection ended");
    }
}

/// A client's connection, which is counted for as long as its socket lives: an upgraded one outlives
/// the front's call.
struct ClientStream {
    stream: TcpStream,
    /// Of all connections that the process may have.
    _permit: OwnedSemaphorePermit,
    _up: Up,
    _counted: Counted,
}

impl ClientStream {
    fn new(
        stream: TcpStream,
        permit: OwnedSemaphorePermit,
        relay: &Arc<Relay>,
        listener: &Arc<str>,
    ) -> Self {
        let up = relay.metrics.connection_open(listener);
        Self { stream, _permit: permit, _up: up, _counted: Counted::new(relay) }
    }
}

impl AsyncRead for ClientStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for ClientStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A connection that shutdown waits for.
struct Counted(Arc<Relay>);

impl Counted {
    fn new(relay: &Arc<Relay>) -> Self {
        relay.connections.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(relay))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A byte-born protocol: the plugin owns the client's bytes.
async fn serve_stream(
    relay: &Arc<Relay>,
    listener: &Arc<Listener>,
    protocol_type: &Arc<str>,
    stream: ClientStream,
    client: SocketAddr,
) {
    let Some(plugin) = relay.plugins.find(protocol_type) else {
        tracing::warn!(
            listener = &*listener.name,
            protocol_type = &**protocol_type,
            "no plugin carries the listener's protocol_type; connection closed"
        );
        return;
    };
    let meta = relay.meta(&plugin, &client.to_string().into(), &listener.name, &Arc::default());
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
    let opener = RelayOpener::new(Arc::clone(relay), meta.clone(), Arc::clone(&record));
    let held = opener.held();
    let end = watch_stream(plugin.accept_stream(meta, stream, opener), held).await;
    record.end(end.code);
}
