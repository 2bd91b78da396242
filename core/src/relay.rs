//! The relay's role: takes clients, routes them, and opens their exchanges on sidecars' sessions.
//!
//! Knows routes, sessions and documents; what a protocol says is the plugins' business.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use sidelane_tunnel::proto;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::config::{self, Match, Route};
use crate::credentials::Authenticator;
use crate::metrics::{Flows, Metrics};
use crate::plugin::lend::{Meta, Text};
use crate::plugin::{Plugins, Protocol};
use crate::shard::Shard;
use crate::tls::Issued;
use crate::tunnel::pressure;
use crate::tunnel::session::{Session, Sessions};

mod bounds;
mod document;
mod door;
mod entry;
mod explain;
mod listen;
mod listeners;
mod open;
mod plain;
mod policy;
mod proxy_header;
mod public;
mod routing;
mod stream;
mod summary;
mod tls;
mod tunnels;

pub use listen::bind;
pub use listeners::{BindError, Prepared, Settings as EntrySettings};

use bounds::{credential_rules, millis, session_settings};
use document::{Document, refused_options};
use door::Door;
use entry::HttpEntry;
use listeners::Listeners;
use routing::Routing;
use tls::Handshakes;

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
    sources: Mutex<Sources>,
    stopping: watch::Sender<bool>,
    /// Told whenever an exchange that could not be opened might be now.
    changes: watch::Sender<()>,
    /// In milliseconds; see [`config::RelayTimeouts::open_wait`].
    open_wait_ms: AtomicU64,
    listeners: Listeners,
    /// The HTTP front's way in, made once.
    entry: OnceLock<Arc<HttpEntry>>,
    /// Where sidecars knock.
    door: Door,
    authenticator: Authenticator,
    /// What is obtained by ACME.
    issued: Arc<Issued>,
    /// Under way, on listeners of clients.
    tls_handshakes: Arc<Handshakes>,
    /// Of clients, on all listeners.
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

    /// Returns the routes of `document` that neither the file nor its sidecar's document before has.
    fn fresh_routes(&self, document: &Document) -> Vec<Arc<Route>> {
        let before = self.documents.get(&document.session.epoch);
        let known: HashSet<&Match> = before
            .iter()
            .flat_map(|before| &before.routes)
            .chain(&self.own)
            .map(|route| &route.matches)
            .collect();
        document.routes.iter().filter(|route| !known.contains(&route.matches)).cloned().collect()
    }

    /// What is worth telling a sidecar of its document that is in force.
    fn notes(&self, document: &Document) -> Vec<String> {
        let others = self.documents.range(..document.session.epoch);
        document.notes(&self.own, others.map(|(_, other)| other))
    }

    fn put_in_force(&mut self, mut document: Document) {
        let session = Arc::clone(&document.session);
        let of_its_last = || {
            let lost = self.lost.iter().rev().find(|(_, lost)| lost.session.name == session.name);
            lost.map(|(_, lost)| lost)
        };
        if let Some(before) = self.documents.get(&session.epoch).or_else(of_its_last) {
            document.keep_routes_of(before);
        }
        // A sidecar that is back says anew what it serves.
        self.lost.retain(|(_, lost)| lost.session.name != session.name);
        self.waiting.remove(&session.epoch);
        self.documents.insert(session.epoch, document);
    }

    /// Puts waiting documents in force, the oldest first, where nothing stands in their way any
    /// more. Returns which.
    fn take_waiting(&mut self) -> Vec<Accepted> {
        let mut accepted = Vec::new();
        for (epoch, document) in std::mem::take(&mut self.waiting) {
            if self.conflicts(&document).is_empty() {
                accepted.push(Accepted {
                    session: Arc::clone(&document.session),
                    version: document.version,
                    notes: self.notes(&document),
                });
                self.put_in_force(document);
            } else {
                self.waiting.insert(epoch, document);
            }
        }
        accepted
    }
}

/// A document that waited and is in force.
struct Accepted {
    session: Arc<Session>,
    version: u64,
    notes: Vec<String>,
}

impl Relay {
    /// Returns the role; nobody is let in before [`Relay::start`].
    pub fn new(section: &config::Relay, plugins: Arc<Plugins>, metrics: Arc<Metrics>) -> Arc<Self> {
        let settings = session_settings(section, &plugins);
        let issued = Arc::default();
        Arc::new(Self {
            plugins,
            metrics,
            sessions: Sessions::new(settings),
            routing: ArcSwap::default(),
            sources: Mutex::new(Sources {
                base_domains: section.base_domains.clone(),
                own: Vec::new(),
                documents: BTreeMap::new(),
                waiting: BTreeMap::new(),
                lost: VecDeque::new(),
            }),
            stopping: watch::Sender::new(false),
            changes: watch::Sender::new(()),
            open_wait_ms: AtomicU64::new(millis(section.timeouts.open_wait)),
            listeners: Listeners::new(EntrySettings::of(section)),
            entry: OnceLock::new(),
            door: Door::new(section, &issued),
            authenticator: Authenticator::new(credential_rules(section)),
            issued,
            tls_handshakes: Arc::default(),
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

    /// Takes a configuration's limits and timeouts: for new connections and sessions, and where a
    /// limit is on what runs, for that at once.
    pub fn limit(&self, section: &config::Relay) {
        self.listeners.set_settings(EntrySettings::of(section));
        self.listeners.set_tunnel(&section.tunnel, &self.issued);
        self.sessions.set(session_settings(section, &self.plugins));
        self.door.set(section, &self.issued);
        self.authenticator.set(credential_rules(section));
        self.open_wait_ms.store(millis(section.timeouts.open_wait), Ordering::Relaxed);
    }

    /// Binds a configuration's listeners that are not bound yet, for `threads` threads; nobody is
    /// accepted before [`Relay::listen`].
    ///
    /// # Errors
    /// The first that cannot be bound, or whose TLS cannot be had.
    pub fn prepare(&self, section: &config::Relay, threads: usize) -> Result<Prepared, BindError> {
        self.listeners.prepare(&section.listeners, &section.tunnel, &self.issued, threads)
    }

    /// Puts listeners in force: new ones accept before those that are gone stop. Connections of these
    /// end with what runs on them; nobody else's are touched.
    pub fn listen(self: &Arc<Self>, prepared: Prepared) {
        self.listeners.apply(self, prepared);
    }

    /// Serves clients on `listeners`, and sidecars on `tunnel` where they have an address of their own.
    pub fn start(
        self: &Arc<Self>,
        shards: &Arc<[Shard]>,
        listeners: Prepared,
        tunnel: Option<std::net::TcpListener>,
    ) {
        self.listeners.set_threads(shards);
        self.listen(listeners);
        let Some(tunnel) = tunnel else { return };
        let relay = Arc::clone(self);
        shards[0].spawn(async move {
            match TcpListener::from_std(tunnel) {
                Ok(socket) => {
                    let stopping = relay.stopping.subscribe();
                    tunnels::accept(relay, socket, stopping).await;
                }
                Err(error) => tracing::error!(%error, "the tunnel's listener is lost"),
            }
        });
    }

    /// Certificates that are obtained meanwhile.
    pub fn issued(&self) -> &Arc<Issued> {
        &self.issued
    }

    /// By which this process's own sidecar dials; `None`: plain.
    pub fn embedded_tls(&self) -> Option<Arc<rustls::ClientConfig>> {
        self.door.embedded()
    }

    /// What this process's own sidecar presents.
    pub fn embedded_token(&self) -> &config::Secret {
        self.authenticator.embedded_token()
    }

    /// Tells in the log where clients reach the file's routes.
    pub fn tell_addresses(&self) {
        let sources = self.lock_sources();
        public::tell(&sources.own, &self.public(&sources));
    }

    /// The HTTP front's way in.
    fn entry(self: &Arc<Self>) -> Arc<HttpEntry> {
        Arc::clone(self.entry.get_or_init(|| Arc::new(HttpEntry { relay: Arc::clone(self) })))
    }

    /// Accepts nobody from here on, and asks clients' connections to end with their exchanges.
    pub fn drain(&self) {
        self.stopping.send_replace(true);
        self.listeners.stop();
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
            let waiting = sources.waiting.get(&session.epoch).map(|document| {
                serde_json::json!({
                    "announcement": document.version,
                    "reasons": sources.conflicts(document),
                })
            });
            let lanes = session.lanes();
            serde_json::json!({
                "sidecar": &*session.name,
                "peer": session.peer.to_string(),
                "epoch": session.epoch,
                "connected_for_seconds": session.since.elapsed().as_secs(),
                "tunnels": document.map(|document| document.tunnel_names()),
                "unavailable": document.map(|document| document.unavailable()),
                "announcement": document.map(|document| document.version),
                "waiting": waiting,
                "notes": document.map(|document| sources.notes(document)),
                "lanes": lanes.iter().map(|link| link.describe()).collect::<Vec<_>>(),
            })
        };
        self.sessions.all().iter().map(describe).collect()
    }

    fn lock_sources(&self) -> std::sync::MutexGuard<'_, Sources> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reroute(&self, sources: &Sources) {
        let routing = Routing::build(sources, &self.routing.load(), &self.metrics);
        self.routing.store(Arc::new(routing));
        self.metrics.set_announcements_waiting(sources.waiting.len());
        self.notice();
    }

    /// Whether an exchange may wait for a session that is on its way.
    fn waits_for_sessions(&self) -> bool {
        !self.open_wait().is_zero() && !*self.stopping.borrow()
    }

    /// How long an exchange may.
    fn open_wait(&self) -> Duration {
        Duration::from_millis(self.open_wait_ms.load(Ordering::Relaxed))
    }

    /// Lets exchanges that wait for a session look again.
    fn notice(&self) {
        self.changes.send_replace(());
    }

    fn session_begun(&self, session: &Arc<Session>) {
        self.metrics.set_sessions("relay", self.sessions.len());
        tracing::info!(sidecar = &*session.name, peer = %session.peer, epoch = session.epoch, "session begun");
    }

    fn session_ended(&self, session: &Arc<Session>) {
        self.metrics.set_sessions("relay", self.sessions.len());
        tracing::info!(sidecar = &*session.name, epoch = session.epoch, "session ended");
        let mut sources = self.lock_sources();
        if sources.waiting.remove(&session.epoch).is_some() {
            self.metrics.set_announcements_waiting(sources.waiting.len());
        }
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
        let mut notes = Vec::new();
        let mut waiting = false;
        let reasons = match document {
            Ok(document) => {
                let conflicts = sources.conflicts(&document);
                if conflicts.is_empty() {
                    let fresh = sources.fresh_routes(&document);
                    public::tell(&fresh, &self.public(&sources));
                    notes = sources.notes(&document);
                    sources.put_in_force(document);
                    freed = sources.take_waiting();
                    self.reroute(&sources);
                } else {
                    waiting = true;
                    sources.waiting.insert(session.epoch, document);
                    self.metrics.set_announcements_waiting(sources.waiting.len());
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
                notes = notes.join("; "),
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
        let version = announce.version;
        proto::Announced { version, accepted, reasons, notes, addresses, waiting }
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
            peer_address: empty(),
            response_head_timeout: None,
            options: empty(),
            deadline: None,
        }
    }
}
