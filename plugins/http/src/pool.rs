//! Connections to services, kept between requests: per data-path thread, by service.
//!
//! An unused connection has no task of its own. That the service closed it shows when it is taken
//! again, or when the thread's reaper looks, which also ends what was unused for too long.

use std::collections::HashMap;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use http::Extensions;
use hyper::client::conn::http1;
use sidelane_http_born::h2_pool::{self, PoolConfig};
use sidelane_plugin::{
    ByteStream, Counter, Gauge, Host, HttpVersion, Instant, PerShard, Reset, SendHalf, Service,
    ServiceError, ServiceSettings, Timer,
};

use self::watch::Counted;
pub(crate) use self::watch::{Watch, encode_interim};
use crate::config::Config;
use crate::upload::Upload;

mod watch;

/// Most fields in a response's head or trailers; one more is `service-invalid`. The same bound as the
/// relay's fronts have.
pub(crate) const HEADERS_MAX: usize = 128;

/// Most bytes of a response's head; more is `service-invalid`. The same bound as the relay's fronts
/// have.
pub(crate) const HEAD_BYTES_MAX: usize = 64 * 1024;

/// What hyper may hold of one connection: twice a head, so that a head at its bound is told from one
/// above it, and a bulk response is read in large pieces.
const READ_BYTES_MAX: usize = 2 * HEAD_BYTES_MAX;

/// What is offered by ALPN to a service that is spoken to by TLS.
const OFFER_HTTP1: &[&str] = &["http/1.1"];

/// What is offered to one that chooses.
const OFFER_BOTH: &[&str] = &["h2", "http/1.1"];

/// Services whose choice is remembered, per data-path thread.
const CHOSEN_MAX: usize = 1024;

/// How often the reaper looks at unused connections: often enough that a closed one does not hold its
/// descriptor for long, seldom enough to cost nothing.
const REAP_INTERVAL: Duration = Duration::from_secs(5);

/// Why there is no connection.
#[derive(Debug)]
pub(crate) enum PoolError {
    /// [`Config::connections_max`] are in use.
    Full,
    /// The service cannot be reached.
    Connect(ServiceError),
    /// hyper refused the stream.
    Handshake(hyper::Error),
}

/// What the pool counts.
#[derive(Clone, Debug)]
struct Metrics {
    opened: Counter,
    reused: Counter,
    repeated: Counter,
    connections: Gauge,
    idle: Gauge,
}

/// The pool of one plugin instance.
#[derive(Debug)]
pub(crate) struct Pool {
    config: Arc<Config>,
    shards: PerShard<Shard>,
    metrics: Metrics,
    draining: AtomicBool,
    /// Connections to services of HTTP/2.
    pub(crate) h2: Arc<h2_pool::Pool>,
}

/// One thread's part.
#[derive(Debug, Default)]
struct Shard {
    services: HashMap<u64, Parked>,
    /// Connections in `services`.
    idle: usize,
    /// Connections used and unused, but for those counted in `open_of`.
    open: Arc<AtomicUsize>,
    /// Connections to services whose tunnel has a bound of its own, used and unused.
    open_of: HashMap<u64, Arc<AtomicUsize>>,
    /// By a service's id: its version, and what that chose last.
    chosen: HashMap<u64, (u64, Chosen)>,
    reaping: bool,
}

/// What a service chose by ALPN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Chosen {
    /// HTTP/1.1, or nothing.
    Http1,
    /// HTTP/2.
    Http2,
}

/// The unused connections of one service.
#[derive(Debug)]
struct Parked {
    version: u64,
    /// How long they are kept.
    idle_timeout: Duration,
    /// Oldest first; taken from the back, so that what is not needed grows old.
    #[allow(clippy::vec_box, reason = "a connection is large, and moves from hand to hand")]
    connections: Vec<Box<Connection>>,
}

/// Counts an open connection while it lives.
#[derive(Debug)]
struct Slot {
    open: Arc<AtomicUsize>,
    gauge: Gauge,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.open.fetch_sub(1, Ordering::Relaxed);
        self.gauge.add(-1);
    }
}

/// A connection to a service. Kept in a box: hyper's part is large, and futures that hold it are
/// moved.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) sender: http1::SendRequest<Upload>,
    /// `None` once it has ended.
    driver: Option<http1::Connection<Counted, Upload>>,
    pub(crate) watch: Arc<Watch>,
    /// For every request: made once, since the callback and its table are four allocations.
    pub(crate) extensions: Extensions,
    /// Kept with the connection: setting a timer again is cheaper than making one.
    pub(crate) timer: Option<Timer>,
    /// Taken from the pool.
    pub(crate) reused: bool,
    idle_since: Instant,
    _slot: Slot,
}

impl Connection {
    /// Drives reading and writing; ready once the connection has ended, for whatever reason. hyper
    /// tells the request's future and the body what happened.
    pub(crate) fn poll_drive(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(driver) = &mut self.driver else {
            return Poll::Ready(());
        };
        match Pin::new(driver).poll(cx) {
            Poll::Ready(_) => {
                self.driver = None;
                Poll::Ready(())
            }
            Poll::Pending => Poll::Pending,
        }
    }

    /// Whether request and response are through and another request may follow.
    pub(crate) fn is_idle(&self) -> bool {
        self.driver.is_some() && self.sender.is_ready()
    }
}

impl Pool {
    pub(crate) fn new(config: Arc<Config>, host: &Host) -> Self {
        let metrics = Metrics {
            opened: host
                .counter("http_connections_opened_total", "Connections to services dialled"),
            reused: host
                .counter("http_connections_reused_total", "Requests sent on a kept connection"),
            repeated: host
                .counter("http_requests_repeated_total", "Requests repeated on a fresh connection"),
            connections: host.gauge("http_connections", "Connections to services"),
            idle: host.gauge("http_connections_idle", "Connections to services without a request"),
        };
        let h2_config = PoolConfig {
            // What no request uses is closed at once where nothing is to be kept.
            idle_timeout: config.idle_timeout.max(REAP_INTERVAL),
            connections_max: config.connections_max,
            keepalive_interval: Duration::ZERO,
            keepalive_timeout: Duration::ZERO,
        };
        let h2 = h2_pool::Pool::new(h2_config, host, "http2", "http2_requests_repeated_total");
        Self {
            config,
            shards: PerShard::new(host, Shard::default),
            metrics,
            draining: AtomicBool::new(false),
            h2: Arc::new(h2),
        }
    }

    /// Takes an unused connection to the service.
    pub(crate) fn take(&self, service: &Service) -> Option<Box<Connection>> {
        let (connection, stale) = self.shards.with(|shard| {
            let stale = match shard.services.get(&service.id()) {
                Some(parked) if parked.version != service.version() => shard
                    .services
                    .remove(&service.id())
                    .map_or_else(Vec::new, |parked| parked.connections),
                _ => Vec::new(),
            };
            let connection =
                shard.services.get_mut(&service.id()).and_then(|parked| parked.connections.pop());
            shard.idle -= stale.len() + usize::from(connection.is_some());
            (connection, stale)
        });
        self.count_idle(-(stale.len() as i64) - i64::from(connection.is_some()));
        connection.map(|mut connection| {
            connection.reused = true;
            self.metrics.reused.add(1);
            connection
        })
    }

    /// What this version of the service chose last by ALPN, on this thread.
    pub(crate) fn chosen(&self, service: &Service) -> Option<Chosen> {
        let chosen = self.shards.with(|shard| shard.chosen.get(&service.id()).copied());
        chosen.filter(|(version, _)| *version == service.version()).map(|(_, chosen)| chosen)
    }

    /// Remembers what the service chose.
    pub(crate) fn choose(&self, service: &Service, chosen: Chosen) {
        self.shards.with(|shard| {
            if shard.chosen.len() >= CHOSEN_MAX {
                // Who asks next finds out anew.
                shard.chosen.clear();
            }
            shard.chosen.insert(service.id(), (service.version(), chosen));
        });
    }

    /// Dials the service, where no connection was `dialled` already.
    pub(crate) async fn connect(
        &self,
        service: &Service,
        settings: &ServiceSettings,
        dialled: Option<ByteStream>,
        send: &mut SendHalf,
        deadline: &mut Deadline,
    ) -> Result<Box<Connection>, Connecting> {
        let slot = self.slot(service, settings).ok_or(Connecting::Failed(PoolError::Full))?;
        let stream = match dialled {
            Some(stream) => stream,
            None => dial(service, settings, send, deadline).await?,
        };
        let watch = Arc::new(Watch::default());
        let counted = Counted { stream, watch: Arc::clone(&watch) };
        let (sender, driver) = http1::Builder::new()
            .max_headers(HEADERS_MAX)
            .max_buf_size(READ_BYTES_MAX)
            .max_header_size(HEAD_BYTES_MAX)
            .handshake(counted)
            .await
            .map_err(|error| Connecting::Failed(PoolError::Handshake(error)))?;
        self.metrics.opened.add(1);
        Ok(Box::new(Connection {
            sender,
            driver: Some(driver),
            extensions: watch.extensions(),
            watch,
            timer: None,
            reused: false,
            idle_since: Host::current().now(),
            _slot: slot,
        }))
    }

    /// Counts a request that is repeated.
    pub(crate) fn count_repeated(&self) {
        self.metrics.repeated.add(1);
    }

    /// Keeps a connection for the next request, or closes it where there are enough, or where it is
    /// one client's.
    pub(crate) fn park(
        self: &Arc<Self>,
        service: &Service,
        settings: &ServiceSettings,
        mut connection: Box<Connection>,
    ) {
        let idle_max =
            settings.pool_idle.map_or(self.config.idle_per_service, |idle| idle as usize);
        if self.draining.load(Ordering::Relaxed) || idle_max == 0 || !settings.shared {
            return;
        }
        let idle_timeout = settings.pool_idle_timeout.unwrap_or(self.config.idle_timeout);
        let host = Host::current();
        connection.idle_since = host.now();
        let mut closing = Vec::new();
        let (change, reap) = self.shards.with(|shard| {
            let parked = shard.services.entry(service.id()).or_insert_with(|| Parked {
                version: service.version(),
                idle_timeout,
                connections: Vec::new(),
            });
            let before = parked.connections.len();
            if parked.version != service.version() {
                // Whichever is newer, a connection to the other is of no use soon.
                if parked.version > service.version() {
                    closing.push(connection);
                    return (0, false);
                }
                parked.version = service.version();
                parked.idle_timeout = idle_timeout;
                closing.append(&mut parked.connections);
            }
            if parked.connections.len() >= idle_max {
                closing.push(parked.connections.remove(0));
            }
            parked.connections.push(connection);
            let after = parked.connections.len();
            shard.idle = shard.idle + after - before;
            let reap = !std::mem::replace(&mut shard.reaping, true);
            (after as i64 - before as i64, reap)
        });
        self.count_idle(change);
        drop(closing);
        if reap && !host.try_spawn(Arc::clone(self).reap()) {
            self.shards.with(|shard| shard.reaping = false);
        }
    }

    /// Closes what is unused, and keeps nothing from here on.
    pub(crate) fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
        self.h2.drain();
        let mut closing = Vec::new();
        self.shards.each(|shard| {
            shard.idle = 0;
            closing.extend(shard.services.drain().flat_map(|(_, parked)| parked.connections));
        });
        self.count_idle(-(closing.len() as i64));
    }

    /// Takes a place among [`Config::connections_max`], for which another service's unused connection
    /// may have to go; where the tunnel says how many there may be, among those.
    fn slot(&self, service: &Service, settings: &ServiceSettings) -> Option<Slot> {
        let gauge = self.metrics.connections;
        if let Some(connections_max) = settings.pool_connections {
            let open = self.shards.with(|shard| shard.open_of(service.id()));
            if open.load(Ordering::Relaxed) >= connections_max as usize {
                return None;
            }
            open.fetch_add(1, Ordering::Relaxed);
            gauge.add(1);
            return Some(Slot { open, gauge });
        }
        let (slot, closing) = self.shards.with(|shard| {
            let full = shard.open.load(Ordering::Relaxed) >= self.config.connections_max;
            let closing = if full { shard.take_oldest() } else { None };
            if full && closing.is_none() {
                return (None, None);
            }
            shard.open.fetch_add(1, Ordering::Relaxed);
            gauge.add(1);
            (Some(Slot { open: Arc::clone(&shard.open), gauge }), closing)
        });
        if closing.is_some() {
            self.count_idle(-1);
        }
        slot
    }

    /// Ends unused connections as their time comes, until there are none.
    async fn reap(self: Arc<Self>) {
        let host = Host::current();
        loop {
            let soonest = self
                .shards
                .with(|shard| shard.services.values().map(|parked| parked.idle_timeout).min());
            host.sleep(soonest.map_or(REAP_INTERVAL, |soonest| soonest.min(REAP_INTERVAL))).await;
            let now = host.now();
            let (closing, left) = self.shards.with(|shard| {
                let closing = shard.take_ended(now);
                shard.reaping = shard.idle > 0;
                (closing, shard.reaping)
            });
            self.count_idle(-(closing.len() as i64));
            drop(closing);
            if !left {
                return;
            }
        }
    }

    #[allow(clippy::cast_possible_wrap, reason = "counts of connections are small")]
    fn count_idle(&self, change: i64) {
        if change != 0 {
            self.metrics.idle.add(change);
        }
    }
}

/// Dials the service, and lets it choose where it may.
async fn dial(
    service: &Service,
    settings: &ServiceSettings,
    send: &mut SendHalf,
    deadline: &mut Deadline,
) -> Result<ByteStream, Connecting> {
    let by_alpn = settings.http_version == HttpVersion::ByAlpn;
    let mut connect = service.connect_alpn(if by_alpn { OFFER_BOTH } else { OFFER_HTTP1 });
    let connected = poll_fn(|cx| {
        if let Poll::Ready(connected) = Pin::new(&mut connect).poll(cx) {
            return Poll::Ready(
                connected.map_err(|error| Connecting::Failed(PoolError::Connect(error))),
            );
        }
        if let Poll::Ready(reset) = send.poll_closed(cx) {
            return Poll::Ready(Err(Connecting::Abandoned(reset)));
        }
        deadline.poll(cx).map(|()| Err(Connecting::Late))
    })
    .await?;
    if connected.protocol == Some("h2") {
        return Err(Connecting::Http2);
    }
    Ok(connected.stream)
}

/// Why [`Pool::connect`] gave no connection.
#[derive(Debug)]
pub(crate) enum Connecting {
    /// It failed.
    Failed(PoolError),
    /// The exchange is over.
    Abandoned(Reset),
    /// Its deadline has passed.
    Late,
    /// The service agreed on HTTP/2.
    Http2,
}

/// The end of the time that an exchange has; none for most.
#[derive(Debug)]
pub(crate) struct Deadline(Option<(Timer, bool)>);

impl Deadline {
    pub(crate) fn new(at: Option<Instant>) -> Self {
        Self(at.map(|at| (Host::current().timer(at), false)))
    }

    /// Ready once it has passed, and from then on.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some((timer, has_passed)) = &mut self.0 else { return Poll::Pending };
        if *has_passed || timer.poll_fired(cx).is_ready() {
            *has_passed = true;
            return Poll::Ready(());
        }
        Poll::Pending
    }
}

impl Shard {
    /// Takes the connection that was unused for longest.
    fn take_oldest(&mut self) -> Option<Box<Connection>> {
        let parked = self
            .services
            .values_mut()
            .filter(|parked| !parked.connections.is_empty())
            .min_by_key(|parked| parked.connections[0].idle_since)?;
        self.idle -= 1;
        Some(parked.connections.remove(0))
    }

    /// Returns the count of a service's connections, where its tunnel bounds them.
    fn open_of(&mut self, service: u64) -> Arc<AtomicUsize> {
        if let Some(open) = self.open_of.get(&service) {
            return Arc::clone(open);
        }
        // Services that are gone leave no count behind.
        self.open_of.retain(|_, open| open.load(Ordering::Relaxed) > 0);
        Arc::clone(self.open_of.entry(service).or_default())
    }

    /// Takes what the service has closed, and what was unused for as long as it is kept.
    #[allow(clippy::vec_box, reason = "as in `Parked`")]
    fn take_ended(&mut self, now: Instant) -> Vec<Box<Connection>> {
        // Nobody waits for these connections; looking is enough.
        let mut cx = Context::from_waker(Waker::noop());
        let mut ended = Vec::new();
        self.services.retain(|_, parked| {
            let idle_timeout = parked.idle_timeout;
            ended.extend(parked.connections.extract_if(.., |connection| {
                now - connection.idle_since >= idle_timeout
                    || connection.poll_drive(&mut cx).is_ready()
            }));
            !parked.connections.is_empty()
        });
        self.idle -= ended.len();
        ended
    }
}
