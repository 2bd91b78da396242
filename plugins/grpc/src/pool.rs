//! HTTP/2 connections to services, shared by RPCs: per data-path thread, by service.
//!
//! Each connection has a task of its own that reads and writes for all its streams, pings where it is
//! told to, and ends it when it was unused for too long. One connection is dialled at a time; who
//! needs one meanwhile waits for it.

use std::collections::HashMap;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{self, SendRequest};
use h2::{Ping, PingPong};
use sidelane_plugin::{
    ByteStream, Connect, Counter, Gauge, Host, Instant, PerShard, Service, ServiceError, Timer,
    failure,
};

use crate::config::Config;

/// What a service may send on one stream before it has gone on through the tunnel: as much as one
/// exchange's credit usually is.
const STREAM_WINDOW_BYTES: u32 = 1024 * 1024;

/// What a service may send on all streams of a connection: a few stalled streams do not stop the rest.
const CONNECTION_WINDOW_BYTES: u32 = 4 * 1024 * 1024;

/// What h2 may hold of one stream's request: two chunks, one that is being written and the next.
const SEND_BUFFER_BYTES: usize = 64 * 1024;

/// What h2 lets pile up in small frames, at 256 bytes each, before it takes the service for an attacker
/// and closes the connection: more than the connection's window can hold even in messages of a few
/// bytes, since a stream that stalls must not end the others.
const SMALL_FRAMES_BUDGET_BYTES: usize = 256 * CONNECTION_WINDOW_BYTES as usize;

/// Most bytes of a response's metadata or trailers: the bound that the relay's fronts have.
const HEAD_BYTES_MAX: u32 = 64 * 1024;

/// How long a service may take from the connection to its HTTP/2 settings.
const SETTINGS_TIMEOUT: Duration = Duration::from_secs(10);

/// Looks at whether a connection is used, in one idle timeout.
const IDLE_LOOKS: u32 = 4;

/// Why there is no stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PoolError {
    /// All streams of all connections that there may be are in use.
    Full,
    /// The service cannot be reached.
    Connect(ServiceError),
    /// It does not speak HTTP/2, or broke off before it did.
    Handshake,
    /// It did not say its settings in time.
    Slow,
}

impl PoolError {
    /// One of [`failure`].
    pub(crate) const fn code(self) -> u32 {
        match self {
            Self::Full => failure::OVERLOADED,
            Self::Connect(error) => error.code,
            Self::Handshake => failure::SERVICE_INVALID,
            Self::Slow => failure::SERVICE_TIMEOUT,
        }
    }
}

impl std::fmt::Display for PoolError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Full => f.write_str("all streams of all connections to the service are in use"),
            Self::Connect(error) => error.fmt(f),
            Self::Handshake => f.write_str("the service does not speak HTTP/2"),
            Self::Slow => f.write_str("the service did not send its HTTP/2 settings in time"),
        }
    }
}

/// What the pool counts.
#[derive(Clone, Copy, Debug)]
struct Metrics {
    opened: Counter,
    retried: Counter,
    connections: Gauge,
    streams: Gauge,
}

/// The pool of one plugin instance.
#[derive(Debug)]
pub(crate) struct Pool {
    config: Config,
    shards: PerShard<Shard>,
    metrics: Metrics,
    draining: AtomicBool,
}

/// One thread's part, by service.
type Shard = HashMap<u64, Connections>;

/// The connections to one service.
#[derive(Debug, Default)]
struct Connections {
    version: u64,
    open: Vec<Pooled>,
    dialling: bool,
    /// Dials that have ended.
    dials: u64,
    /// How the last of them did.
    failed: Option<PoolError>,
    waiting: Vec<Waker>,
}

#[derive(Debug)]
struct Pooled {
    sender: SendRequest<Bytes>,
    link: Arc<Link>,
}

/// What is known of a connection.
#[derive(Debug, Default)]
struct Link {
    /// Streams in use.
    active: AtomicUsize,
    /// Streams that ever were.
    used: AtomicU64,
}

/// A place for one stream on a connection.
#[derive(Debug)]
pub(crate) struct Place<'a> {
    pub(crate) sender: SendRequest<Bytes>,
    link: Arc<Link>,
    service: u64,
    pool: &'a Pool,
}

impl Place<'_> {
    /// Keeps others from getting a place on this connection, which takes no more streams.
    pub(crate) fn retire(&self) {
        self.pool.remove(self.service, &self.link);
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.pool.metrics.streams.add(-1);
        let last = self.link.active.fetch_sub(1, Ordering::Relaxed) == 1;
        if last && self.pool.draining.load(Ordering::Relaxed) {
            self.pool.remove(self.service, &self.link);
        }
    }
}

/// Someone's wait for a place.
#[derive(Debug, Default)]
pub(crate) struct Ticket {
    /// Dials that had ended when it began.
    since: Option<u64>,
    /// Dials that had ended when its waker was left.
    waits: Option<u64>,
}

enum Turn {
    Taken(SendRequest<Bytes>, Arc<Link>),
    Failed(PoolError),
    Wait,
    Dial,
}

impl Pool {
    pub(crate) fn new(config: Config, host: &Host) -> Self {
        let metrics = Metrics {
            opened: host.counter("grpc_connections_opened_total", "Connections to services opened"),
            retried: host
                .counter("grpc_rpcs_retried_total", "RPCs that were sent on a second connection"),
            connections: host.gauge("grpc_connections", "Connections to services"),
            streams: host.gauge("grpc_streams", "Streams to services"),
        };
        Self {
            config,
            shards: PerShard::new(host, Shard::default),
            metrics,
            draining: AtomicBool::new(false),
        }
    }

    /// Counts an RPC that is sent again.
    pub(crate) fn count_retried(&self) {
        self.metrics.retried.add(1);
    }

    /// Ready with a place for a stream, once there is one.
    pub(crate) fn poll_place<'a>(
        self: &'a Arc<Self>,
        cx: &mut Context<'_>,
        service: &Service,
        ticket: &mut Ticket,
    ) -> Poll<Result<Place<'a>, PoolError>> {
        loop {
            let mut stale = Vec::new();
            let turn = self.shards.with(|shard| {
                let connections = shard.entry(service.id()).or_default();
                if connections.version < service.version() {
                    connections.version = service.version();
                    stale.append(&mut connections.open);
                }
                connections.turn(cx, ticket, self.config.connections_max)
            });
            // Their RPCs go on; they end with the last of them.
            drop(stale);
            match turn {
                Turn::Taken(sender, link) => {
                    self.metrics.streams.add(1);
                    let (service, pool) = (service.id(), &**self);
                    return Poll::Ready(Ok(Place { sender, link, service, pool }));
                }
                Turn::Failed(error) => return Poll::Ready(Err(error)),
                Turn::Wait => return Poll::Pending,
                Turn::Dial => {
                    let dial =
                        dial(Arc::clone(self), service.id(), service.version(), service.connect());
                    if !Host::current().try_spawn(dial) {
                        self.dialled(service.id(), Err(PoolError::Full));
                    }
                }
            }
        }
    }

    /// Closes what is unused; what is used closes with its last stream.
    pub(crate) fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
        let mut closing = Vec::new();
        self.shards.each(|shard| {
            for connections in shard.values_mut() {
                let unused = |pooled: &mut Pooled| pooled.link.active.load(Ordering::Relaxed) == 0;
                closing.extend(connections.open.extract_if(.., unused));
            }
        });
    }

    /// A dial has ended; who waits looks again.
    fn dialled(&self, service: u64, result: Result<Option<Pooled>, PoolError>) {
        let waiting = self.shards.with(|shard| {
            let connections = shard.entry(service).or_default();
            connections.dialling = false;
            connections.dials += 1;
            connections.failed = result.as_ref().err().copied();
            if let Ok(Some(pooled)) = result {
                connections.open.push(pooled);
            }
            std::mem::take(&mut connections.waiting)
        });
        waiting.into_iter().for_each(Waker::wake);
    }

    fn remove(&self, service: u64, link: &Arc<Link>) {
        let mut closing = Vec::new();
        self.shards.with(|shard| {
            if let Some(connections) = shard.get_mut(&service) {
                let is_it = |pooled: &mut Pooled| Arc::ptr_eq(&pooled.link, link);
                closing.extend(connections.open.extract_if(.., is_it));
            }
        });
        // Outside the lock: the last sender that goes wakes the connection's task.
        drop(closing);
    }
}

impl Connections {
    fn turn(&mut self, cx: &mut Context<'_>, ticket: &mut Ticket, connections_max: usize) -> Turn {
        // The oldest with room: RPCs that share a connection share its system calls.
        let room = |pooled: &&Pooled| {
            pooled.link.active.load(Ordering::Relaxed) < pooled.sender.current_max_send_streams()
        };
        if let Some(pooled) = self.open.iter().find(room) {
            pooled.link.active.fetch_add(1, Ordering::Relaxed);
            pooled.link.used.fetch_add(1, Ordering::Relaxed);
            return Turn::Taken(pooled.sender.clone(), Arc::clone(&pooled.link));
        }
        let since = *ticket.since.get_or_insert(self.dials);
        if let Some(error) = self.failed
            && since < self.dials
        {
            return Turn::Failed(error);
        }
        if self.dialling {
            if ticket.waits != Some(self.dials) {
                ticket.waits = Some(self.dials);
                self.waiting.push(cx.waker().clone());
            }
            return Turn::Wait;
        }
        if self.open.len() >= connections_max {
            return Turn::Failed(PoolError::Full);
        }
        self.dialling = true;
        Turn::Dial
    }
}

/// Tells those who wait that a dial has ended, also where its task is dropped.
struct Dialling {
    pool: Arc<Pool>,
    service: u64,
    ended: bool,
}

impl Dialling {
    fn end(&mut self, result: Result<Option<Pooled>, PoolError>) {
        if !std::mem::replace(&mut self.ended, true) {
            self.pool.dialled(self.service, result);
        }
    }
}

impl Drop for Dialling {
    fn drop(&mut self) {
        // The host drops its tasks where nobody waits any more, perhaps outside of a call.
        if !self.ended && Host::try_current().is_some() {
            self.end(Err(PoolError::Handshake));
        }
    }
}

/// Counts an open connection while it lives.
struct Counted(Gauge);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.add(-1);
    }
}

/// Dials a service, and then drives the connection to its end.
async fn dial(pool: Arc<Pool>, service: u64, version: u64, connect: Connect) {
    let mut dialling = Dialling { pool: Arc::clone(&pool), service, ended: false };
    let stream = match connect.await {
        Ok(stream) => stream,
        Err(error) => return dialling.end(Err(PoolError::Connect(error))),
    };
    pool.metrics.opened.add(1);
    pool.metrics.connections.add(1);
    let _counted = Counted(pool.metrics.connections);
    let host = Host::current();
    let deadline = host.now() + SETTINGS_TIMEOUT;
    let (sender, connection) = match host.timeout(SETTINGS_TIMEOUT, handshake(stream)).await {
        Ok(Ok(connected)) => connected,
        Ok(Err(_)) => return dialling.end(Err(PoolError::Handshake)),
        Err(_) => return dialling.end(Err(PoolError::Slow)),
    };
    let link = Arc::new(Link::default());
    let mut driver = Driver {
        connection,
        clock: Clock::new(&pool.config, host, deadline),
        pings: None,
        link: Arc::clone(&link),
    };
    let mut sender = Some(sender);
    poll_fn(|cx| {
        if driver.poll_connection(cx).is_ready() {
            return Poll::Ready(());
        }
        if sender.is_some() && driver.connection.max_concurrent_send_streams() > 0 {
            // It has said its settings.
            driver.begin(&pool.config);
            let pooled = sender.take().map(|sender| Pooled { sender, link: Arc::clone(&link) });
            dialling.end(Ok(pooled.filter(|_| pool.takes(service, version))));
        }
        match driver.poll_clock(cx, &pool.config) {
            Poll::Ready(Time::Settings) => {
                dialling.end(Err(PoolError::Slow));
                Poll::Ready(())
            }
            Poll::Ready(Time::Unanswered) => Poll::Ready(()),
            Poll::Ready(Time::Unused) => {
                // Without a sender it says goodbye and ends.
                pool.remove(service, &link);
                driver.poll_connection(cx)
            }
            Poll::Pending => Poll::Pending,
        }
    })
    .await;
    dialling.end(Err(PoolError::Handshake));
    pool.remove(service, &link);
}

impl Pool {
    /// Whether a connection to this version of the service is of use.
    fn takes(&self, service: u64, version: u64) -> bool {
        !self.draining.load(Ordering::Relaxed)
            && self.shards.with(|shard| {
                shard.get(&service).is_none_or(|connections| connections.version <= version)
            })
    }
}

type Connected = (SendRequest<Bytes>, client::Connection<ByteStream, Bytes>);

async fn handshake(stream: ByteStream) -> Result<Connected, h2::Error> {
    client::Builder::new()
        .enable_push(false)
        // No stream is opened before the service has said how many it takes.
        .initial_max_send_streams(0)
        .initial_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_send_buffer_size(SEND_BUFFER_BYTES)
        .data_frame_budget(SMALL_FRAMES_BUDGET_BYTES)
        .max_header_list_size(HEAD_BYTES_MAX)
        .handshake(stream)
        .await
}

/// Drives a connection.
struct Driver {
    connection: client::Connection<ByteStream, Bytes>,
    clock: Clock,
    pings: Option<PingPong>,
    link: Arc<Link>,
}

/// What time has come for.
enum Time {
    /// The settings did not come.
    Settings,
    /// A ping was not answered.
    Unanswered,
    /// Nobody has used it for long.
    Unused,
}

impl Driver {
    fn poll_connection(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        Pin::new(&mut self.connection).poll(cx).map(|_| ())
    }

    /// The service has said its settings.
    fn begin(&mut self, config: &Config) {
        self.clock.settings = None;
        let now = self.clock.host.now();
        self.clock.look = Some(now + config.idle_timeout / IDLE_LOOKS);
        if !config.keepalive_interval.is_zero() {
            self.pings = self.connection.ping_pong();
            self.clock.ping = Some(now + config.keepalive_interval);
        }
    }

    fn poll_clock(&mut self, cx: &mut Context<'_>, config: &Config) -> Poll<Time> {
        if self.clock.pong.is_some()
            && let Some(pings) = &mut self.pings
            && pings.poll_pong(cx).is_ready()
        {
            self.clock.pong = None;
            self.clock.ping = Some(self.clock.host.now() + config.keepalive_interval);
        }
        loop {
            if self.clock.poll(cx).is_pending() {
                return Poll::Pending;
            }
            let now = self.clock.host.now();
            let due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
            if due(self.clock.settings) {
                return Poll::Ready(Time::Settings);
            }
            if due(self.clock.pong) {
                return Poll::Ready(Time::Unanswered);
            }
            if due(self.clock.ping) {
                self.clock.ping = Some(now + config.keepalive_interval);
                // A connection without RPCs is left in peace: servers take pings there for abuse.
                if self.link.active.load(Ordering::Relaxed) > 0
                    && let Some(pings) = &mut self.pings
                    && pings.send_ping(Ping::opaque()).is_ok()
                {
                    self.clock.ping = None;
                    self.clock.pong = Some(now + config.keepalive_timeout);
                    let _ = pings.poll_pong(cx);
                    if self.poll_connection(cx).is_ready() {
                        return Poll::Ready(Time::Unanswered);
                    }
                }
            }
            if due(self.clock.look) {
                self.clock.look = Some(now + config.idle_timeout / IDLE_LOOKS);
                if self.clock.is_unused(&self.link) {
                    return Poll::Ready(Time::Unused);
                }
            }
        }
    }
}

/// The times that a connection waits for, on one timer.
struct Clock {
    host: Host,
    timer: Timer,
    set: Instant,
    settings: Option<Instant>,
    ping: Option<Instant>,
    pong: Option<Instant>,
    look: Option<Instant>,
    /// Streams that ever were, at the last look, and looks since that changed.
    seen: (u64, u32),
}

impl Clock {
    fn new(_: &Config, host: Host, settings: Instant) -> Self {
        Self {
            host,
            timer: host.timer(settings),
            set: settings,
            settings: Some(settings),
            ping: None,
            pong: None,
            look: None,
            seen: (0, 0),
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let times = [self.settings, self.ping, self.pong, self.look];
        let Some(next) = times.into_iter().flatten().min() else { return Poll::Pending };
        if next != self.set {
            self.timer.reset(next);
            self.set = next;
        }
        self.timer.poll_fired(cx)
    }

    fn is_unused(&mut self, link: &Link) -> bool {
        let used = link.used.load(Ordering::Relaxed);
        let looks = if used == self.seen.0 && link.active.load(Ordering::Relaxed) == 0 {
            self.seen.1 + 1
        } else {
            0
        };
        self.seen = (used, looks);
        looks >= IDLE_LOOKS
    }
}
