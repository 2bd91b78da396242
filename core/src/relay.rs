//! The relay's role: takes clients, routes them, and opens their exchanges on sidecars' sessions.
//!
//! Knows routes, sessions and documents; what a protocol says is the plugins' business.

use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use sidelane_abi::failure;
use sidelane_tunnel::proto;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

use crate::config::{self, Route};
use crate::explain::PublicListener;
use crate::front::{self, ConnectionInfo, Dispatch, FrontConfig};
use crate::metrics::{Flows, Metrics, Record};
use crate::plugin::lend::{self, Failure, Meta, Text};
use crate::plugin::{Call, CallEnd, Plugins, PreparedHead, Protocol};
use crate::shard::Shard;
use crate::tunnel::accept::Bounds;
use crate::tunnel::pressure;
use crate::tunnel::session::{Session, Sessions, Settings};

mod document;
mod explain;
mod listen;
mod observed;
mod open;
mod routing;
mod tunnels;

pub use listen::bind;

use document::{Document, refused_options};
use observed::Observed;
use open::RelayOpener;
use routing::Routing;

/// How long a name that a lost sidecar announced answers 503 (come back) before it answers 404
/// (never heard of it). Longer than a rollout of a Deployment with its images to pull.
const LOST_ROUTES_KEPT: Duration = Duration::from_secs(600);

/// Documents of lost sidecars that are kept; the oldest makes room.
const LOST_DOCUMENTS_MAX: usize = 1024;

/// The relay's role of this process.
pub struct Relay {
    plugins: Arc<Plugins>,
    metrics: Arc<Metrics>,
    sessions: Sessions,
    routing: ArcSwap<Routing>,
    /// As clients know them.
    public_listeners: ArcSwap<Vec<PublicListener>>,
    sources: Mutex<Sources>,
    stopping: watch::Sender<bool>,
    /// Told whenever an exchange that could not be opened might be now.
    changes: watch::Sender<()>,
    open_wait: Duration,
    connections: AtomicUsize,
    flows: Flows,
}

/// What the routing is made of. Whoever changes it makes the routing anew before letting go.
struct Sources {
    base_domains: Vec<Arc<str>>,
    own: Vec<Arc<Route>>,
    /// By epoch: the older document wins where two take the same.
    documents: BTreeMap<u64, Document>,
    /// Documents that are not in force because an older session holds what they take, by epoch.
    /// They come into force when nobody does any more.
    waiting: BTreeMap<u64, Document>,
    /// Documents of sidecars that are gone, newest last, and since when.
    lost: VecDeque<(Instant, Document)>,
}

impl Sources {
    /// What older sessions hold of what `document` takes, one line each.
    fn conflicts(&self, document: &Document) -> Vec<String> {
        let others = self.documents.range(..document.session.epoch);
        document.conflicts(others.map(|(_, other)| other))
    }

    fn put_in_force(&mut self, document: Document) {
        let session = Arc::clone(&document.session);
        // A sidecar that is back says anew what it serves.
        self.lost.retain(|(_, lost)| lost.session.name != session.name);
        self.waiting.remove(&session.epoch);
        self.documents.insert(session.epoch, document);
    }

    /// Puts waiting documents in force, the oldest first, where nothing stands in their way any
    /// more. Returns whose, and which version.
    fn take_waiting(&mut self) -> Vec<(Arc<Session>, u64)> {
        let mut accepted = Vec::new();
        for (epoch, document) in std::mem::take(&mut self.waiting) {
            if self.conflicts(&document).is_empty() {
                accepted.push((Arc::clone(&document.session), document.version));
                self.put_in_force(document);
            } else {
                self.waiting.insert(epoch, document);
            }
        }
        accepted
    }
}

/// A client listener that is bound: one socket per thread.
pub struct Bound {
    /// Its name.
    pub name: Arc<str>,
    /// `None`: the HTTP front.
    pub protocol_type: Option<Arc<str>>,
    /// Not empty.
    pub sockets: Vec<std::net::TcpListener>,
}

impl Bound {
    fn public(&self) -> PublicListener {
        let address = self.sockets.first().and_then(|socket| socket.local_addr().ok());
        PublicListener {
            name: Arc::clone(&self.name),
            port: address.map_or(0, |address| address.port()),
            is_http: self.protocol_type.is_none(),
        }
    }
}

impl Relay {
    /// Returns the role; nobody is let in before [`Relay::start`].
    pub fn new(
        base_domains: Vec<Arc<str>>,
        settings: Settings,
        open_wait: Duration,
        plugins: Arc<Plugins>,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        Arc::new(Self {
            plugins,
            metrics,
            sessions: Sessions::new(settings),
            routing: ArcSwap::default(),
            public_listeners: ArcSwap::default(),
            sources: Mutex::new(Sources {
                base_domains,
                own: Vec::new(),
                documents: BTreeMap::new(),
                waiting: BTreeMap::new(),
                lost: VecDeque::new(),
            }),
            stopping: watch::Sender::new(false),
            changes: watch::Sender::new(()),
            open_wait,
            connections: AtomicUsize::new(0),
            flows: Flows::new("relay"),
        })
    }

    /// Takes a configuration's routes and base domains, for new exchanges.
    pub fn configure(&self, config: &config::Config) {
        self.sessions.carry(&self.plugins.types());
        let mut sources = self.lock_sources();
        sources.own.clone_from(&config.routes);
        if let Some(section) = &config.relay {
            sources.base_domains.clone_from(&section.base_domains);
        }
        self.reroute(&sources);
    }

    /// Serves clients on `listeners` and sidecars on `tunnel`.
    pub fn start(
        self: &Arc<Self>,
        shards: &Arc<[Shard]>,
        listeners: Vec<Bound>,
        tunnel: std::net::TcpListener,
        front: FrontConfig,
        connections_max: usize,
        handshakes: Bounds,
    ) {
        self.set_public(listeners.iter().map(Bound::public).collect());
        let front = Arc::new(front);
        let entry = Arc::new(HttpEntry { relay: Arc::clone(self) });
        let connections = Arc::new(Semaphore::new(connections_max));
        for bound in listeners {
            let listener = Arc::new(listen::Listener {
                name: bound.name,
                protocol_type: bound.protocol_type,
                front: Arc::clone(&front),
                connections: Arc::clone(&connections),
                entry: Arc::clone(&entry),
                stopping: self.stopping.subscribe(),
            });
            for (shard, socket) in shards.iter().zip(bound.sockets) {
                let (relay, listener) = (Arc::clone(self), Arc::clone(&listener));
                shard.spawn(async move {
                    match TcpListener::from_std(socket) {
                        Ok(socket) => listen::accept(relay, listener, socket).await,
                        Err(error) => tracing::error!(%error, "a listener is lost"),
                    }
                });
            }
        }
        let (relay, threads) = (Arc::clone(self), Arc::clone(shards));
        shards[0].spawn(async move {
            match TcpListener::from_std(tunnel) {
                Ok(socket) => {
                    let stopping = relay.stopping.subscribe();
                    tunnels::accept(relay, socket, threads, handshakes, stopping).await;
                }
                Err(error) => tracing::error!(%error, "the tunnel's listener is lost"),
            }
        });
    }

    /// Accepts nobody from here on, and asks clients' connections to end with their exchanges.
    pub fn drain(&self) {
        self.stopping.send_replace(true);
    }

    /// Ends all sessions once what is queued has been written.
    pub fn close(&self) {
        for session in self.sessions.all() {
            session.go_away("the relay is shutting down");
            session.close();
        }
    }

    /// Exchanges that run.
    pub fn exchanges(&self) -> usize {
        let sessions = self.sessions.all();
        sessions.iter().flat_map(|session| session.lanes().to_vec()).map(|link| link.load()).sum()
    }

    /// Bounds what all sessions have queued; called every [`PRESSURE_TICK`].
    ///
    /// [`PRESSURE_TICK`]: crate::tunnel::pressure::PRESSURE_TICK
    pub fn balance(&self, queued_max: u64) {
        let sessions = self.sessions.all();
        let links: Vec<_> = sessions.iter().flat_map(|session| session.lanes().to_vec()).collect();
        pressure::balance(&links, queued_max);
    }

    /// Clients' connections that are open.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// Sessions that are up.
    pub fn sessions(&self) -> usize {
        self.sessions.len()
    }

    /// Whether a sidecar serves at least one tunnel.
    pub fn is_served(&self) -> bool {
        !self.routing.load().is_empty()
    }

    /// What the admin page says of the sessions.
    pub fn describe_sessions(&self) -> serde_json::Value {
        let sources = self.lock_sources();
        let describe = |session: &Arc<Session>| {
            let document = sources.documents.get(&session.epoch);
            let lanes = session.lanes();
            serde_json::json!({
                "sidecar": &*session.name,
                "peer": session.peer.to_string(),
                "epoch": session.epoch,
                "connected_for_seconds": session.since.elapsed().as_secs(),
                "tunnels": document.map(|document| document.tunnel_names()),
                "announcement": document.map(|document| document.version),
                "lanes": lanes.iter().map(|link| link.describe()).collect::<Vec<_>>(),
            })
        };
        self.sessions.all().iter().map(describe).collect()
    }

    fn lock_sources(&self) -> std::sync::MutexGuard<'_, Sources> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reroute(&self, sources: &Sources) {
        self.routing.store(Arc::new(Routing::build(sources)));
        self.notice();
    }

    /// Whether an exchange may wait for a session that is on its way.
    fn waits_for_sessions(&self) -> bool {
        !self.open_wait.is_zero() && !*self.stopping.borrow()
    }

    /// Lets exchanges that wait for a session look again.
    fn notice(&self) {
        self.changes.send_replace(());
    }

    fn session_begun(&self, session: &Arc<Session>) {
        self.metrics.set_sessions(self.sessions.len());
        tracing::info!(sidecar = &*session.name, peer = %session.peer, epoch = session.epoch, "session begun");
    }

    fn session_ended(&self, session: &Arc<Session>) {
        self.metrics.set_sessions(self.sessions.len());
        tracing::info!(sidecar = &*session.name, epoch = session.epoch, "session ended");
        let mut sources = self.lock_sources();
        sources.waiting.remove(&session.epoch);
        if let Some(document) = sources.documents.remove(&session.epoch) {
            if sources.lost.len() >= LOST_DOCUMENTS_MAX {
                sources.lost.pop_front();
            }
            sources.lost.push_back((Instant::now(), document));
            let accepted = sources.take_waiting();
            self.reroute(&sources);
            let accepted = self.accepted(&sources, accepted);
            drop(sources);
            self.tell_accepted(accepted);
        }
    }

    /// Tells sidecars whose documents waited that they are in force.
    fn tell_accepted(&self, accepted: Vec<(Arc<Session>, proto::Announced)>) {
        for (session, announced) in accepted {
            self.metrics.announced(true);
            tracing::info!(
                sidecar = &*session.name,
                version = announced.version,
                "announcement accepted: what it takes is free now"
            );
            session.answer(announced);
        }
    }

    /// Forgets the routes of sidecars that have been gone for long; called now and then.
    pub fn expire(&self, now: Instant) {
        let mut sources = self.lock_sources();
        let before = sources.lost.len();
        sources.lost.retain(|(since, _)| now.duration_since(*since) < LOST_ROUTES_KEPT);
        if sources.lost.len() != before {
            self.reroute(&sources);
        }
    }

    /// Takes a sidecar's document whole, or refuses it whole and keeps the one before.
    fn announce(&self, session: &Arc<Session>, announce: &proto::Announce) -> proto::Announced {
        let document = Document::parse(session, announce).and_then(|document| {
            let refused = refused_options(&document.routes, |protocol_type, options| {
                // A type that no plugin here serves is said to the client, not to the sidecar.
                let served = self.plugins.find(protocol_type).is_some();
                if served { self.plugins.validate_route(protocol_type, options) } else { Ok(()) }
            });
            if refused.is_empty() { Ok(document) } else { Err(refused) }
        });
        let mut sources = self.lock_sources();
        let mut freed = Vec::new();
        let reasons = match document {
            Ok(document) => {
                let conflicts = sources.conflicts(&document);
                if conflicts.is_empty() {
                    sources.put_in_force(document);
                    freed = sources.take_waiting();
                    self.reroute(&sources);
                } else {
                    sources.waiting.insert(session.epoch, document);
                }
                conflicts
            }
            Err(reasons) => reasons,
        };
        let accepted = reasons.is_empty();
        let freed = self.accepted(&sources, freed);
        let addresses = if accepted { self.addresses(&sources, session.epoch) } else { Vec::new() };
        drop(sources);
        self.tell_accepted(freed);
        self.metrics.announced(accepted);
        if accepted {
            tracing::info!(
                sidecar = &*session.name,
                version = announce.version,
                tunnels = announce.tunnels.len(),
                routes = announce.routes.len(),
                "announcement accepted"
            );
        } else {
            tracing::warn!(
                sidecar = &*session.name,
                version = announce.version,
                reasons = reasons.join("; "),
                "announcement refused"
            );
        }
        let (version, notes) = (announce.version, Vec::new());
        proto::Announced { version, accepted, reasons, notes, addresses }
    }

    /// What is known of an exchange before it is opened.
    fn meta(
        &self,
        plugin: &Protocol,
        client_address: &Arc<str>,
        listener: &Arc<str>,
        scheme: &Arc<str>,
    ) -> Meta {
        let empty = Text::default;
        Meta {
            request_id: empty(),
            protocol_type: Arc::clone(plugin.name()),
            route: empty(),
            tunnel: empty(),
            client_address: Arc::clone(client_address).into(),
            listener: Arc::clone(listener).into(),
            scheme: Arc::clone(scheme).into(),
            tls_sni: empty(),
            tls_alpn: empty(),
            tls_client: empty(),
            trace_parent: empty(),
            trusted_proxy: false,
            options: empty(),
            deadline: None,
        }
    }
}

/// What the HTTP front hands over; one for all connections.
pub struct HttpEntry {
    relay: Arc<Relay>,
}

impl Dispatch for HttpEntry {
    type Call = HttpExchange;

    fn accept<B: lend::Body, R: lend::Responder>(
        &self,
        connection: &Arc<ConnectionInfo>,
        head: Box<lend::RequestHead>,
        body: B,
        mut responder: R,
    ) -> HttpExchange {
        let relay = &self.relay;
        let asked = relay.metrics.is_followed().then(|| (head.method.clone(), head.target.clone()));
        let head = PreparedHead::new(head);
        let Some(plugin) = relay.plugins.claim(&head) else {
            responder.abort(lend::Reset::new(failure::NO_PROTOCOL));
            return HttpExchange::Refused(failure::NO_PROTOCOL);
        };
        let record = Arc::new(relay.metrics.exchange("relay", plugin.name()));
        if let Some((method, target)) = asked {
            record.asked(method.as_str(), &target);
        }
        let responder = Observed::new(responder, &record);
        if plugin.quarantined() {
            let failure = Failure {
                code: failure::PLUGIN_FAILED,
                retry_after_s: None,
                detail: "the plugin failed too often".to_owned(),
            };
            record.unopened(failure::PLUGIN_FAILED);
            return HttpExchange::Runs(plugin.refuse_http(head, responder, failure), record);
        }
        let mut meta = relay.meta(
            &plugin,
            &connection.client_address_text,
            &connection.listener,
            &connection.scheme,
        );
        if let Some(tls) = &connection.tls {
            meta.tls_sni = Arc::clone(&tls.sni).into();
            meta.tls_alpn = Arc::clone(&tls.alpn).into();
            meta.tls_client = Arc::clone(&tls.client).into();
        }
        let opener = RelayOpener::new(Arc::clone(relay), meta.clone(), Arc::clone(&record));
        HttpExchange::Runs(plugin.accept_http(head, meta, body, responder, opener), record)
    }

    fn note(&self, event: front::Event) {
        match event {
            front::Event::InformationalDropped => self.relay.metrics.informational_dropped(),
            front::Event::Answered(code) => self.relay.metrics.front_answered(code),
        }
    }
}

/// An HTTP-born exchange that runs.
pub enum HttpExchange {
    /// In the plugin.
    Runs(Call, Arc<Record>),
    /// Nobody takes it.
    Refused(u32),
}

impl Future for HttpExchange {
    type Output = CallEnd;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<CallEnd> {
        match self.get_mut() {
            Self::Runs(call, record) => Pin::new(call).poll(cx).map(|end| {
                record.end(end.code);
                end
            }),
            Self::Refused(code) => Poll::Ready(CallEnd { code: *code, panicked: false }),
        }
    }
}
