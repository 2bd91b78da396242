//! HTTP/2 connections to services, shared by RPCs: per data-path thread, by service.
//!
//! Each connection has a task of its own that reads and writes for all its streams, pings where it is
//! told to, and ends it when it was unused for too long. One connection is dialled at a time; who
//! needs one meanwhile waits for it.

use std::collections::HashMap;
use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{self, SendRequest};
use sidelane_plugin::{
    ByteStream, ConnectAlpn, Connected, Counter, Gauge, Host, PerShard, Service, ServiceError,
    ServiceSettings, failure,
};

use self::driver::{Clock, Driver, Time};

mod driver;

/// What a service may send on one stream before it has gone on through the tunnel. The way to it is
/// short; the exchange's own credit is for the long one. Small frames that wait are kept in some 300
/// bytes each: with four times as much, streams of small messages cost a sixth more, in cache misses.
const STREAM_WINDOW_BYTES: u32 = 64 * 1024;

/// What a service may send on all streams of a connection: all that HTTP/2 can say (RFC 9113 §6.9.1).
/// With less, a few streams that stall would stop all others on the connection.
const CONNECTION_WINDOW_BYTES: u32 = (1 << 31) - 1;

/// What h2 may hold of one stream's request: two chunks, one that is being written and the next.
const SEND_BUFFER_BYTES: usize = 64 * 1024;

/// What h2 lets pile up in frames of less than 256 bytes before it takes the service for an attacker and
/// closes the connection: without a bound. Streams that stall must not end the others, and their
/// windows bound what they hold.
const SMALL_FRAMES_BUDGET_BYTES: usize = usize::MAX / 2;

/// Most bytes of a response's metadata or trailers: the bound that the relay's fronts have.
const HEAD_BYTES_MAX: u32 = 64 * 1024;

/// How long a service may take from the connection to its HTTP/2 settings.
const SETTINGS_TIMEOUT: Duration = Duration::from_secs(10);

/// Most connections, per data-path thread, to a service whose connections each name a client and so
/// serve one RPC, where its tunnel does not say how many. Bounds the descriptors that a burst takes.
const UNSHARED_MAX: usize = 1024;

/// Looks at whether a connection is used, in one idle timeout.
const IDLE_LOOKS: u32 = 4;

/// What is offered by ALPN to a service that is spoken to by TLS (RFC 9113 §3.2).
const H2: &str = "h2";

/// Offers HTTP/2 alone.
const OFFER_H2: &[&str] = &[H2];

/// Offers both, for who can speak both.
const OFFER_BOTH: &[&str] = &[H2, "http/1.1"];

/// How a pool is kept; a tunnel's settings go before the first two.
#[derive(Clone, Copy, Debug)]
pub struct PoolConfig {
    /// How long a connection is kept without a stream; more than 0.
    pub idle_timeout: Duration,
    /// Connections to one service, per data-path thread.
    pub connections_max: usize,
    /// How often a connection with streams on it is pinged; 0: never.
    pub keepalive_interval: Duration,
    /// How long the service may take to answer a ping.
    pub keepalive_timeout: Duration,
}

/// Why there is no stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolError {
    /// All streams of all connections that there may be are in use.
    Full,
    /// The service cannot be reached.
    Connect(ServiceError),
    /// It closed the connection before it had said anything.
    Closed,
    /// It does not speak HTTP/2.
    Handshake,
    /// It did not agree on HTTP/2 by ALPN.
    NotAgreed,
    /// It did not say its settings in time.
    Slow,
}

impl PoolError {
    /// One of [`failure`].
    #[must_use]
    pub const fn code(self) -> u32 {
        match self {
            Self::Full => failure::OVERLOADED,
            Self::Connect(error) => error.code,
            Self::Closed => failure::SERVICE_UNREACHABLE,
            Self::Handshake | Self::NotAgreed => failure::SERVICE_INVALID,
            Self::Slow => failure::SERVICE_TIMEOUT,
        }
    }
}

impl std::fmt::Display for PoolError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Full => f.write_str("all streams of all connections to the service are in use"),
            Self::Connect(error) => error.fmt(f),
            Self::Closed => f.write_str("the service closed the connection at once"),
            Self::Handshake => f.write_str("the service does not speak HTTP/2"),
            Self::NotAgreed => f.write_str("the service did not agree on HTTP/2 (ALPN)"),
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
pub struct Pool {
    config: PoolConfig,
    shards: PerShard<Shard>,
    metrics: Metrics,
    draining: AtomicBool,
    /// Who waits for dials, on all threads: a stream that becomes free will do as well.
    waiting: AtomicUsize,
    /// RPCs that had a connection of their own.
    unshared: AtomicU64,
}

/// Which connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    /// The service's id.
    id: u64,
    /// Its version.
    version: u64,
    /// The RPC that alone uses them; 0: they are shared.
    rpc: u64,
}

/// One thread's part.
type Shard = HashMap<Key, Connections>;

/// The connections to one version of a service.
#[derive(Debug, Default)]
struct Connections {
    open: Vec<Pooled>,
    dialling: bool,
    /// Dials that have ended.
    dials: u64,
    /// How the last of them did.
    failed: Option<PoolError>,
    /// The connection that ended as [`PoolError::NotAgreed`], for who offered HTTP/1.1 too.
    other: Option<ByteStream>,
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
pub struct Place<'a> {
    /// Opens the stream.
    pub sender: SendRequest<Bytes>,
    link: Arc<Link>,
    key: Key,
    pool: &'a Pool,
}

impl Place<'_> {
    /// Keeps others from getting a place on this connection, which takes no more streams.
    pub fn retire(&self) {
        self.pool.remove(self.key, &self.link);
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.pool.metrics.streams.add(-1);
        let last = self.link.active.fetch_sub(1, Ordering::Relaxed) == 1;
        if last && self.pool.draining.load(Ordering::Relaxed) {
            self.pool.remove(self.key, &self.link);
        }
        if self.pool.waiting.load(Ordering::Relaxed) > 0 {
            self.pool.stream_freed(self.key);
        }
    }
}

/// An RPC's use of connections to a service; where they are its own, they end with it.
#[derive(Debug)]
pub struct User<'a> {
    pool: &'a Pool,
    key: Key,
    settings: ServiceSettings,
    offer: &'static [&'static str],
}

impl User<'_> {
    /// Offers HTTP/1.1 as well. Where the service takes that, the end is [`PoolError::NotAgreed`], and one of
    /// those who waited gets the connection by [`Self::take_other`].
    #[must_use]
    pub const fn or_http1(mut self) -> Self {
        self.offer = OFFER_BOTH;
        self
    }

    /// Takes the connection on which the service did not agree on HTTP/2.
    #[must_use]
    pub fn take_other(&self) -> Option<ByteStream> {
        self.pool.shards.with(|shard| shard.get_mut(&self.key)?.other.take())
    }
}

impl Drop for User<'_> {
    fn drop(&mut self) {
        if self.key.rpc > 0 {
            self.pool.forget(self.key);
        }
    }
}

/// Someone's wait for a place.
#[derive(Debug, Default)]
pub struct Ticket {
    /// Dials that had ended when it began.
    since: Option<u64>,
    /// Dials that had ended when its waker was left.
    waits: Option<u64>,
    /// Refused a stream: another connection is better, if there may be one.
    avoid: Option<Arc<Link>>,
}

impl Ticket {
    /// Waits for a place on another connection than that of `place`.
    #[must_use]
    pub fn beside(place: &Place<'_>) -> Self {
        Self { avoid: Some(Arc::clone(&place.link)), ..Self::default() }
    }
}

enum Turn {
    Taken(SendRequest<Bytes>, Arc<Link>),
    Failed(PoolError),
    /// `joins`: one more waits.
    Wait {
        joins: bool,
    },
    Dial,
}

impl Pool {
    /// Makes a pool whose metrics begin with `prefix`; what is sent again counts as `retried`.
    #[must_use]
    pub fn new(config: PoolConfig, host: &Host, prefix: &str, retried: &str) -> Self {
        let metrics = Metrics {
            opened: host.counter(
                &format!("{prefix}_connections_opened_total"),
                "Connections to services opened",
            ),
            retried: host.counter(retried, "What was sent to a service on a second connection"),
            connections: host.gauge(&format!("{prefix}_connections"), "Connections to services"),
            streams: host.gauge(&format!("{prefix}_streams"), "Streams to services"),
        };
        Self {
            config,
            shards: PerShard::new(host, Shard::default),
            metrics,
            draining: AtomicBool::new(false),
            waiting: AtomicUsize::new(0),
            unshared: AtomicU64::new(0),
        }
    }

    /// Begins an RPC's use of connections to the service.
    #[must_use]
    pub fn user(&self, service: &Service, settings: ServiceSettings) -> User<'_> {
        let rpc =
            if settings.shared { 0 } else { self.unshared.fetch_add(1, Ordering::Relaxed) + 1 };
        let key = Key { id: service.id(), version: service.version(), rpc };
        User { pool: self, key, settings, offer: OFFER_H2 }
    }

    /// Counts what is sent again.
    pub fn count_retried(&self) {
        self.metrics.retried.add(1);
    }

    /// Ready with a place for a stream, once there is one.
    ///
    /// # Errors
    /// As [`PoolError`] says.
    pub fn poll_place<'a>(
        self: &'a Arc<Self>,
        cx: &mut Context<'_>,
        service: &Service,
        user: &User<'_>,
        ticket: &mut Ticket,
    ) -> Poll<Result<Place<'a>, PoolError>> {
        let (key, settings) = (user.key, &user.settings);
        let own = settings.pool_connections.map(|connections| connections as usize);
        loop {
            let mut stale = Vec::new();
            let turn = self.shards.with(|shard| {
                if !shard.contains_key(&key) {
                    stale = shard.take_older(key);
                    if key.rpc > 0 && shard.unshared(key.id) >= own.unwrap_or(UNSHARED_MAX) {
                        return Turn::Failed(PoolError::Full);
                    }
                }
                let connections = shard.entry(key).or_default();
                connections.turn(cx, ticket, own.unwrap_or(self.config.connections_max).max(1))
            });
            // Their RPCs go on; they end with the last of them.
            drop(stale);
            match turn {
                Turn::Taken(sender, link) => {
                    self.metrics.streams.add(1);
                    return Poll::Ready(Ok(Place { sender, link, key, pool: self }));
                }
                Turn::Failed(error) => return Poll::Ready(Err(error)),
                Turn::Wait { joins } => {
                    self.waiting.fetch_add(usize::from(joins), Ordering::Relaxed);
                    return Poll::Pending;
                }
                Turn::Dial => {
                    let idle_timeout = settings
                        .pool_idle_timeout
                        .filter(|timeout| !timeout.is_zero())
                        .unwrap_or(self.config.idle_timeout);
                    let connect = service.connect_alpn(user.offer);
                    let dialled = Dialled { key, idle_timeout, must_agree: settings.tls };
                    let dial = dial(Arc::clone(self), connect, dialled);
                    if !Host::current().try_spawn(dial) {
                        self.dialled(key, Err(PoolError::Full), None);
                    }
                }
            }
        }
    }

    /// Closes what is unused; what is used closes with its last stream.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
        let (mut closing, mut others) = (Vec::new(), Vec::new());
        self.shards.each(|shard| {
            for connections in shard.values_mut() {
                let unused = |pooled: &mut Pooled| pooled.link.active.load(Ordering::Relaxed) == 0;
                closing.extend(connections.open.extract_if(.., unused));
                others.extend(connections.other.take());
            }
        });
    }

    /// A stream has become free; who waits for a dial looks again, and waits on where another was faster.
    fn stream_freed(&self, key: Key) {
        let waiting = self.shards.with(|shard| {
            shard.get(&key).map(|connections| connections.waiting.clone()).unwrap_or_default()
        });
        waiting.into_iter().for_each(Waker::wake);
    }

    /// A dial has ended; who waits looks again.
    fn dialled(&self, key: Key, result: Result<Pooled, PoolError>, mut other: Option<ByteStream>) {
        let mut result = Some(result);
        let mut unused = Vec::new();
        let waiting = self.shards.with(|shard| {
            if key.rpc > 0 && !shard.contains_key(&key) {
                // The RPC is over; nobody else may use its connection, which ends without a sender.
                return Vec::new();
            }
            let connections = shard.entry(key).or_default();
            connections.dialling = false;
            connections.dials += 1;
            connections.failed = None;
            // Where nobody waits any more, nobody takes it.
            let taken = if connections.waiting.is_empty() { None } else { other.take() };
            let before = std::mem::replace(&mut connections.other, taken);
            unused.extend(before.into_iter().chain(other.take()));
            match result.take() {
                Some(Ok(pooled)) => connections.open.push(pooled),
                Some(Err(error)) => connections.failed = Some(error),
                None => {}
            }
            std::mem::take(&mut connections.waiting)
        });
        // Outside the lock, as in `remove`.
        drop((result, unused));
        self.waiting.fetch_sub(waiting.len(), Ordering::Relaxed);
        waiting.into_iter().for_each(Waker::wake);
    }

    /// An RPC that had connections of its own is over.
    fn forget(&self, key: Key) {
        let own = self.shards.with(|shard| shard.remove(&key));
        if let Some(own) = &own {
            self.waiting.fetch_sub(own.waiting.len(), Ordering::Relaxed);
        }
        // Outside the lock, as in `remove`.
        drop(own);
    }

    fn remove(&self, key: Key, link: &Arc<Link>) {
        let mut closing = Vec::new();
        self.shards.with(|shard| {
            if let Some(connections) = shard.get_mut(&key) {
                let is_it = |pooled: &mut Pooled| Arc::ptr_eq(&pooled.link, link);
                closing.extend(connections.open.extract_if(.., is_it));
            }
        });
        // Outside the lock: the last sender that goes wakes the connection's task.
        drop(closing);
    }
}

/// What is done with one thread's part.
trait TakeOlder {
    /// Takes the connections to older versions of a service.
    fn take_older(&mut self, key: Key) -> Vec<Pooled>;
    /// How many RPCs have connections to the service of their own.
    fn unshared(&self, id: u64) -> usize;
}

impl TakeOlder for Shard {
    fn take_older(&mut self, newer: Key) -> Vec<Pooled> {
        // An RPC that has a connection of its own forgets it itself.
        let older = |key: &Key| key.id == newer.id && key.version < newer.version && key.rpc == 0;
        let of_older = self.iter_mut().filter(|(key, _)| older(key));
        let taken = of_older.flat_map(|(_, connections)| connections.open.drain(..)).collect();
        self.retain(|key, connections| !older(key) || connections.dialling);
        taken
    }

    fn unshared(&self, id: u64) -> usize {
        self.keys().filter(|key| key.id == id && key.rpc > 0).count()
    }
}

impl Connections {
    fn turn(&mut self, cx: &mut Context<'_>, ticket: &mut Ticket, connections_max: usize) -> Turn {
        // The oldest with room: RPCs that share a connection share its system calls.
        let room = |pooled: &&Pooled| {
            pooled.link.active.load(Ordering::Relaxed) < pooled.sender.current_max_send_streams()
        };
        let avoided = |pooled: &&Pooled| {
            ticket.avoid.as_ref().is_some_and(|link| Arc::ptr_eq(&pooled.link, link))
        };
        let more = self.dialling || self.open.len() < connections_max;
        let mut places = self.open.iter().filter(room);
        let place = match &ticket.avoid {
            None => places.next(),
            Some(_) => places
                .clone()
                .find(|pooled| !avoided(pooled))
                .or_else(|| if more { None } else { places.next() }),
        };
        if let Some(pooled) = place {
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
            let joins = ticket.waits != Some(self.dials);
            if joins {
                ticket.waits = Some(self.dials);
                self.waiting.push(cx.waker().clone());
            }
            return Turn::Wait { joins };
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
    key: Key,
    ended: bool,
}

impl Dialling {
    fn end(&mut self, result: Result<Pooled, PoolError>) {
        if !std::mem::replace(&mut self.ended, true) {
            self.pool.dialled(self.key, result, None);
        }
    }

    fn not_agreed(&mut self, other: ByteStream) {
        if !std::mem::replace(&mut self.ended, true) {
            self.pool.dialled(self.key, Err(PoolError::NotAgreed), Some(other));
        }
    }
}

impl Drop for Dialling {
    fn drop(&mut self) {
        // The host drops its tasks where nobody waits any more, perhaps outside of a call.
        if !self.ended && Host::try_current().is_some() {
            self.end(Err(PoolError::Closed));
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

/// What a connection is dialled for.
struct Dialled {
    key: Key,
    idle_timeout: Duration,
    /// The service is to agree on HTTP/2, not only to speak it.
    must_agree: bool,
}

/// Dials a service, and then drives the connection to its end.
async fn dial(pool: Arc<Pool>, connect: ConnectAlpn, dialled: Dialled) {
    let Dialled { key, idle_timeout, must_agree } = dialled;
    let config = PoolConfig { idle_timeout, ..pool.config };
    let mut dialling = Dialling { pool: Arc::clone(&pool), key, ended: false };
    let stream = match connect.await {
        Ok(Connected { stream, protocol }) if must_agree && protocol != Some(H2) => {
            return dialling.not_agreed(stream);
        }
        Ok(Connected { stream, .. }) => stream,
        Err(error) => return dialling.end(Err(PoolError::Connect(error))),
    };
    pool.metrics.opened.add(1);
    pool.metrics.connections.add(1);
    let _counted = Counted(pool.metrics.connections);
    let host = Host::current();
    let deadline = host.now() + SETTINGS_TIMEOUT;
    let (sender, connection) = match host.timeout(SETTINGS_TIMEOUT, handshake(stream)).await {
        Ok(Ok(connected)) => connected,
        Ok(Err(error)) => return dialling.end(Err(broken(&error))),
        Err(_) => return dialling.end(Err(PoolError::Slow)),
    };
    let link = Arc::new(Link::default());
    let mut driver = Driver {
        connection,
        clock: Clock::new(&config, host, deadline),
        pings: None,
        link: Arc::clone(&link),
    };
    let mut sender = Some(sender);
    let ended = poll_fn(|cx| {
        if let Poll::Ready(ended) = driver.poll_connection(cx) {
            return Poll::Ready(ended);
        }
        // It is above 0 once the service has said its settings.
        if driver.connection.max_concurrent_send_streams() > 0
            && let Some(sender) = sender.take()
        {
            driver.begin(&config);
            dialling.end(Ok(Pooled { sender, link: Arc::clone(&link) }));
        }
        match driver.poll_clock(cx, &config) {
            Poll::Ready(Time::Settings) => {
                dialling.end(Err(PoolError::Slow));
                Poll::Ready(PoolError::Slow)
            }
            Poll::Ready(Time::Unanswered) => Poll::Ready(PoolError::Slow),
            Poll::Ready(Time::Unused) => {
                // Without a sender it says goodbye and ends.
                pool.remove(key, &link);
                driver.poll_connection(cx)
            }
            Poll::Pending => Poll::Pending,
        }
    })
    .await;
    dialling.end(Err(ended));
    pool.remove(key, &link);
}

fn broken(error: &h2::Error) -> PoolError {
    if error.is_io() { PoolError::Closed } else { PoolError::Handshake }
}

type Spoken = (SendRequest<Bytes>, client::Connection<ByteStream, Bytes>);

async fn handshake(stream: ByteStream) -> Result<Spoken, h2::Error> {
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
