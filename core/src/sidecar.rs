//! The sidecar's role: holds a session with each relay, and delivers what comes to the service.
//!
//! Knows tunnels and their services; what a message says is the plugins' business.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use bytes::BytesMut;
use sidelane_abi::failure;
use sidelane_tunnel::{Event, Key, Lane, LaneConfig, ProtocolTable, RequestId, proto};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};

use crate::announcement;
use crate::config;
use crate::error::chain;
use crate::metrics::{Flows, Metrics};
use crate::plugin::Plugins;
use crate::plugin::lend::{Meta, Reset};
use crate::random;
use crate::shard::Shard;
use crate::tunnel::backoff::{Backoff, SETTLED, jitter};
use crate::tunnel::dial::{self, DialError};
use crate::tunnel::pressure;
use crate::tunnel::session::FEATURE_ANNOUNCE;
use crate::tunnel::{LaneEnd, Link, drive};

mod service;

pub use service::{ServiceHandle, Services};

/// Further lanes of a new session are dialled within this, so that a relay's restart does not meet
/// all of them at once.
const LANE_STAGGER: Duration = Duration::from_millis(50);

/// Ends of lanes that the session's task has not looked at yet: one per lane at most.
const LANE_ENDS_MAX: usize = 64;

/// What the sidecar works with; replaced as a whole by a reload.
pub struct Settings {
    /// For people.
    pub name: String,
    /// Sent with each hello; `None`: loopback only.
    pub token: Option<Arc<[u8]>>,
    /// Lanes per session.
    pub lanes: u32,
    /// How each lane is set up, but for what the relay's welcome says.
    pub lane: LaneConfig,
    /// How long a relay may take to let us in.
    pub timeouts: dial::Timeouts,
}

/// The sidecar's role of this process.
pub struct Sidecar {
    settings: Settings,
    instance: [u8; 16],
    plugins: Arc<Plugins>,
    metrics: Arc<Metrics>,
    services: ArcSwap<Services>,
    document: watch::Sender<Arc<proto::Announce>>,
    shards: Arc<[Shard]>,
    peers: Vec<Arc<Peer>>,
    stopping: watch::Sender<bool>,
    /// Told whenever a relay's answer, or why there is none, changes.
    answers: watch::Sender<()>,
    flows: Flows,
}

/// One relay, as this sidecar knows it.
pub struct Peer {
    /// Its address as configured.
    pub relay: String,
    state: Mutex<PeerState>,
    is_connected: AtomicBool,
}

#[derive(Default)]
struct PeerState {
    lanes: Vec<Arc<Link>>,
    session: Option<SessionFacts>,
    refused: Vec<String>,
    accepted: Option<u64>,
    addresses: Vec<String>,
    notes: Vec<String>,
    last_error: Option<String>,
}

/// What a relay has said, for whoever follows.
#[derive(Clone, Debug)]
pub struct RelayAnswer {
    /// Its address as configured.
    pub relay: String,
    /// A session is up.
    pub is_connected: bool,
    /// Version of the document that it accepted.
    pub accepted: Option<u64>,
    /// Why it refused the last one.
    pub refused: Vec<String>,
    /// What it said of the accepted one.
    pub notes: Vec<String>,
    /// By which clients reach the routes.
    pub addresses: Vec<String>,
    /// Why the last dial failed.
    pub last_error: Option<String>,
}

/// What is told of a session on the admin page.
#[derive(Clone)]
struct SessionFacts {
    epoch: u64,
    since: Instant,
}

/// What a lane's handshake settled, kept for the session's further lanes.
struct Session {
    id: bytes::Bytes,
    secret: bytes::Bytes,
    protocols: ProtocolTable,
    lane: LaneConfig,
    lanes_max: u32,
}

impl Sidecar {
    /// Returns the role; nothing is dialled before [`Sidecar::start`].
    pub fn new(
        settings: Settings,
        relays: Vec<String>,
        plugins: Arc<Plugins>,
        metrics: Arc<Metrics>,
        shards: Arc<[Shard]>,
    ) -> Arc<Self> {
        let peers = relays
            .into_iter()
            .map(|relay| {
                Arc::new(Peer {
                    relay,
                    state: Mutex::default(),
                    is_connected: AtomicBool::new(false),
                })
            })
            .collect();
        Arc::new(Self {
            settings,
            instance: random::bytes(),
            plugins,
            metrics,
            services: ArcSwap::default(),
            document: watch::Sender::new(Arc::default()),
            shards,
            peers,
            stopping: watch::Sender::new(false),
            answers: watch::Sender::new(()),
            flows: Flows::new("sidecar"),
        })
    }

    /// Takes tunnels and routes of a configuration: for new exchanges, and announced to all relays.
    pub fn configure(&self, config: &config::Config) {
        self.services.store(Arc::new(self.services.load().updated(&config.tunnels)));
        let version = self.document.borrow().version + 1;
        self.document.send_replace(Arc::new(announcement::encode(version, config)));
    }

    /// Begins to dial every relay.
    pub fn start(self: &Arc<Self>) {
        for (n, peer) in self.peers.iter().enumerate() {
            let sidecar = Arc::clone(self);
            let peer = Arc::clone(peer);
            let shard = &self.shards[n % self.shards.len()];
            shard.spawn(async move { sidecar.hold_peer(peer).await });
        }
    }

    /// Whether at least one session can carry exchanges.
    pub fn is_connected(&self) -> bool {
        self.peers.iter().any(|peer| peer.is_connected.load(Ordering::Relaxed))
    }

    /// The relays.
    pub fn peers(&self) -> &[Arc<Peer>] {
        &self.peers
    }

    /// Returns what each relay has said.
    #[must_use]
    pub fn relay_answers(&self) -> Vec<RelayAnswer> {
        self.peers.iter().map(|peer| peer.answer()).collect()
    }

    /// Returns a watch that changes whenever [`Sidecar::relay_answers`] may differ.
    #[must_use]
    pub fn follow_answers(&self) -> watch::Receiver<()> {
        self.answers.subscribe()
    }

    /// Tells the relays that nothing new is taken and dials no more. Running exchanges go on.
    pub fn drain(&self) {
        self.stopping.send_replace(true);
        for link in self.links() {
            link.go_away(failure::DRAINING, "the sidecar is shutting down");
        }
    }

    /// Bounds what all sessions have queued; called every [`PRESSURE_TICK`].
    ///
    /// [`PRESSURE_TICK`]: crate::tunnel::pressure::PRESSURE_TICK
    pub fn balance(&self, queued_max: u64) {
        pressure::balance(&self.links(), queued_max);
    }

    /// Exchanges that run.
    pub fn exchanges(&self) -> usize {
        self.links().iter().map(|link| link.load()).sum()
    }

    /// Ends all lanes once what is queued has been written.
    pub fn close(&self) {
        for link in self.links() {
            link.close();
        }
    }

    /// Lanes that are up.
    pub fn lanes(&self) -> usize {
        self.links().len()
    }

    fn links(&self) -> Vec<Arc<Link>> {
        self.peers.iter().flat_map(|peer| peer.with(|state| state.lanes.clone())).collect()
    }

    /// Whether it takes nothing new any more.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    /// Begins sessions with one relay, one after the other, until the sidecar stops.
    async fn hold_peer(self: Arc<Self>, peer: Arc<Peer>) {
        let mut backoff = Backoff::default();
        let mut stopping = self.stopping.subscribe();
        while !self.is_stopping() {
            let mut wait_at_least = Duration::ZERO;
            match self.begin_session(&peer).await {
                Ok((session, lane)) => {
                    let began = Instant::now();
                    self.hold_session(&peer, session, lane).await;
                    if began.elapsed() >= SETTLED {
                        backoff.reset();
                    }
                    if !self.is_stopping() {
                        tracing::warn!(relay = peer.relay, "session lost; dialling again");
                    }
                }
                Err(error) => {
                    let cause = chain(&error);
                    tracing::warn!(relay = peer.relay, error = cause, "no session");
                    peer.with(|state| state.last_error = Some(cause));
                    self.answers.send_replace(());
                    wait_at_least = error.retry_after().unwrap_or_default();
                }
            }
            let wait = backoff.next(random::number()).max(wait_at_least);
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                _ = stopping.changed() => {}
            }
        }
    }

    async fn begin_session(&self, peer: &Peer) -> Result<(Session, NewLane), DialError> {
        let protocols = self.protocols();
        let hello = self.hello(&protocols);
        let (stream, welcome, input) =
            dial::dial(&peer.relay, &hello, self.settings.timeouts).await?;
        let session = Session {
            id: welcome.session,
            secret: welcome.secret,
            protocols,
            lane: self.settings.lane.clone().with_peer(welcome.window, welcome.message_bytes_max),
            lanes_max: welcome.lanes_max,
        };
        self.metrics.session_begun();
        tracing::info!(relay = peer.relay, epoch = welcome.epoch, "session begun");
        peer.with(|state| {
            state.session = Some(SessionFacts { epoch: welcome.epoch, since: Instant::now() });
            state.last_error = None;
            state.accepted = None;
            state.refused.clear();
        });
        Ok((session, NewLane { stream, input, number: welcome.lane }))
    }

    async fn join_session(
        &self,
        peer: &Peer,
        session: &Session,
        wait: Duration,
    ) -> Result<NewLane, DialError> {
        tokio::time::sleep(wait).await;
        let hello = proto::Hello {
            session: session.id.clone(),
            secret: session.secret.clone(),
            ..self.hello(&session.protocols)
        };
        let (stream, welcome, input) =
            dial::dial(&peer.relay, &hello, self.settings.timeouts).await?;
        Ok(NewLane { stream, input, number: welcome.lane })
    }

    /// Numbers of the protocol types that plugins serve, for one session.
    fn protocols(&self) -> ProtocolTable {
        let types = self.plugins.types();
        ProtocolTable::bind(types.iter().map(AsRef::as_ref)).unwrap_or_else(|error| {
            // The loader holds names to the same rules.
            tracing::error!(%error, "protocol types cannot be offered");
            ProtocolTable::default()
        })
    }

    fn hello(&self, protocols: &ProtocolTable) -> proto::Hello {
        proto::Hello {
            version: sidelane_tunnel::VERSION,
            features: FEATURE_ANNOUNCE,
            instance: self.instance.to_vec().into(),
            name: self.settings.name.clone(),
            credential: self.settings.token.as_deref().unwrap_or_default().to_vec().into(),
            protocols: protocols.to_wire(),
            window: self.settings.lane.receive_window,
            message_bytes_max: self.settings.lane.message_bytes_max,
            ..proto::Hello::default()
        }
    }

    /// Keeps a session's lanes up until the last is lost or the relay has forgotten it.
    async fn hold_session(self: &Arc<Self>, peer: &Arc<Peer>, session: Session, first: NewLane) {
        let (ended, mut lane_ends) = mpsc::channel::<Arc<Link>>(LANE_ENDS_MAX);
        let session = Arc::new(session);
        let mut document = self.document.subscribe();
        let mut backoff = Backoff::default();
        let wanted = self.settings.lanes.min(session.lanes_max) as usize;
        self.start_lane(peer, &session, first, ended.clone());
        peer.is_connected.store(true, Ordering::Relaxed);
        self.announce(peer);
        document.mark_unchanged();
        let mut wait = jitter(LANE_STAGGER, random::number());
        // One dial at a time; it begins anew when it is done.
        let mut dial = Box::pin(self.join_session(peer, &session, wait));
        loop {
            let live = peer.with(|state| state.lanes.len());
            if live == 0 {
                break;
            }
            tokio::select! {
                Some(link) = lane_ends.recv() => {
                    peer.with(|state| state.lanes.retain(|other| !Arc::ptr_eq(other, &link)));
                    self.announce(peer);
                }
                result = &mut dial, if live < wanted && !self.is_stopping() => {
                    match result {
                        Ok(lane) => {
                            self.start_lane(peer, &session, lane, ended.clone());
                            wait = jitter(LANE_STAGGER, random::number());
                        }
                        Err(error) if error.is_unknown_session() => {
                            tracing::warn!(relay = peer.relay, "the relay has forgotten the session");
                            for link in peer.with(|state| state.lanes.clone()) {
                                link.close();
                            }
                            wait = backoff.next(random::number());
                        }
                        Err(error) => {
                            tracing::warn!(relay = peer.relay, error = chain(&error), "no further lane");
                            let asked = error.retry_after().unwrap_or_default();
                            wait = backoff.next(random::number()).max(asked);
                        }
                    }
                    dial = Box::pin(self.join_session(peer, &session, wait));
                }
                Ok(()) = document.changed() => self.announce(peer),
            }
        }
        peer.is_connected.store(false, Ordering::Relaxed);
        peer.with(|state| {
            state.session = None;
            state.accepted = None;
        });
        self.answers.send_replace(());
    }

    fn start_lane(
        self: &Arc<Self>,
        peer: &Arc<Peer>,
        session: &Arc<Session>,
        lane: NewLane,
        ended: mpsc::Sender<Arc<Link>>,
    ) {
        let shard = &self.shards[lane.number as usize % self.shards.len()];
        let link =
            Link::new(lane.number, shard.index, Lane::new(session.lane.clone(), Instant::now()));
        if self.is_stopping() {
            link.leave();
        }
        peer.with(|state| state.lanes.push(Arc::clone(&link)));
        let sidecar = Arc::clone(self);
        let (task_peer, session) = (Arc::clone(peer), Arc::clone(session));
        let driven = Arc::clone(&link);
        let task = async move {
            let (peer, number) = (task_peer, driven.number);
            let _up = sidecar.metrics.lane_up("sidecar");
            let end = sidecar.drive_lane(&peer, &session, lane, Arc::clone(&driven)).await;
            let is_ours = matches!(end, LaneEnd::Local);
            if is_ours || sidecar.is_stopping() {
                tracing::debug!(relay = peer.relay, lane = number, "lane closed");
            } else {
                sidecar.metrics.lane_lost("sidecar");
                tracing::warn!(relay = peer.relay, lane = number, error = chain(&end), "lane lost");
            }
            // An error means that the session's task is gone, and with it whoever would care.
            let _ = ended.send(driven).await;
        };
        if !shard.spawn(task) {
            peer.with(|state| state.lanes.retain(|other| !Arc::ptr_eq(other, &link)));
        }
    }

    async fn drive_lane(
        self: &Arc<Self>,
        peer: &Arc<Peer>,
        session: &Arc<Session>,
        lane: NewLane,
        link: Arc<Link>,
    ) -> LaneEnd {
        // The socket belongs to the runtime that dialled; this may be another thread's.
        let stream = match lane.stream.into_std().and_then(TcpStream::from_std) {
            Ok(stream) => stream,
            Err(error) => return LaneEnd::Io(error),
        };
        tracing::info!(relay = peer.relay, lane = lane.number, "lane up");
        let lost = Reset::new(failure::TUNNEL_LOST);
        let mut texts = Texts::default();
        drive(link, stream, lane.input, lost, |link: &Arc<Link>, event| {
            self.handle_event(peer, session, link, event, &mut texts);
        })
        .await
    }

    fn handle_event(
        self: &Arc<Self>,
        peer: &Peer,
        session: &Session,
        link: &Arc<Link>,
        event: Event,
        texts: &mut Texts,
    ) {
        match event {
            Event::Opened { key, id, protocol_type, open } => {
                self.deliver(session, link, key, id, protocol_type, &open, texts);
            }
            Event::Announced(announced) => {
                answered(peer, &announced);
                self.answers.send_replace(());
            }
            Event::GoAway(go_away) => {
                tracing::info!(
                    relay = peer.relay,
                    lane = link.number,
                    reason = go_away.detail,
                    "the relay takes nothing new on this lane"
                );
                link.leave();
            }
            Event::Announce(_) => {
                tracing::warn!(relay = peer.relay, "the relay sent an announcement; ignored");
            }
            Event::Rtt(_) => {}
        }
    }

    /// Starts the plugin on an exchange that the relay opened, or refuses it.
    #[allow(clippy::too_many_arguments, reason = "an event's fields, and whose they are")]
    fn deliver(
        self: &Arc<Self>,
        session: &Session,
        link: &Arc<Link>,
        key: Key,
        id: RequestId,
        protocol_type: u32,
        open: &proto::Open,
        texts: &mut Texts,
    ) {
        let refuse = |code: u32| link.refuse(key, Reset::new(code));
        if self.is_stopping() {
            return refuse(failure::DRAINING);
        }
        let plugin = session.protocols.name(protocol_type).and_then(|name| self.plugins.find(name));
        let Some(plugin) = plugin else { return refuse(failure::NO_PROTOCOL) };
        if plugin.quarantined() {
            return refuse(failure::PLUGIN_FAILED);
        }
        let services = self.services.load();
        let Some(service) = services.find(&open.tunnel) else { return refuse(failure::NO_ROUTE) };
        let route = texts.shared(&open.route);
        let record = self.metrics.exchange("sidecar", plugin.name());
        record.routed(&route, &service.tunnel);
        let tls = open.tls.as_ref();
        let meta = Meta {
            request_id: Arc::<str>::from(id).into(),
            protocol_type: Arc::clone(plugin.name()),
            route: route.into(),
            tunnel: Arc::clone(&service.tunnel).into(),
            client_address: open.client_address.as_str().into(),
            listener: texts.shared(&open.listener).into(),
            scheme: texts.shared(&open.scheme).into(),
            tls_sni: tls.map_or("", |tls| &tls.sni).into(),
            tls_alpn: tls.map_or("", |tls| &tls.alpn).into(),
            tls_client: tls.map_or("", |tls| &tls.client_subject).into(),
            trace_parent: open.trace_parent.as_str().into(),
            trusted_proxy: open.trusted_proxy,
            options: texts.shared(&open.options).into(),
            deadline: (open.timeout_ns > 0)
                .then(|| Instant::now() + Duration::from_nanos(open.timeout_ns)),
        };
        let flow = record.tallied(self.flows.of(&self.metrics, plugin.name()));
        let (send, recv) = link.halves(key, flow);
        let call = plugin.deliver(meta, send, recv, service);
        tokio::spawn(async move {
            let end = call.await;
            record.end(end.code);
        });
    }

    /// Sends the current document on a lane that is up.
    fn announce(&self, peer: &Peer) {
        let document = Arc::clone(&self.document.borrow());
        if let Some(link) = peer.with(|state| state.lanes.first().cloned()) {
            let is_sent = link.with(|lane| lane.announce(proto::Announce::clone(&document)));
            if !is_sent {
                tracing::error!(
                    relay = peer.relay,
                    "the announcement is longer than the relay accepts"
                );
            }
        }
    }
}

/// Texts that a lane keeps: enough for the few routes that are busy at a time, few enough to look
/// through. None is longer than an open record.
const TEXTS_MAX: usize = 16;

/// A lane that was let in, not driven yet.
struct NewLane {
    stream: TcpStream,
    input: BytesMut,
    number: u32,
}

impl Peer {
    fn with<T>(&self, f: impl FnOnce(&mut PeerState) -> T) -> T {
        f(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn answer(&self) -> RelayAnswer {
        self.with(|state| RelayAnswer {
            relay: self.relay.clone(),
            is_connected: self.is_connected.load(Ordering::Relaxed),
            accepted: state.accepted,
            refused: state.refused.clone(),
            notes: state.notes.clone(),
            addresses: state.addresses.clone(),
            last_error: state.last_error.clone(),
        })
    }

    /// What the admin page says of it.
    pub fn describe(&self) -> serde_json::Value {
        self.with(|state| {
            serde_json::json!({
                "relay": self.relay,
                "connected": self.is_connected.load(Ordering::Relaxed),
                "epoch": state.session.as_ref().map(|session| session.epoch),
                "connected_for_seconds": state.session.as_ref().map(|s| s.since.elapsed().as_secs()),
                "lanes": state.lanes.iter().map(|link| serde_json::json!({
                    "lane": link.number, "thread": link.shard, "exchanges": link.load(), "open": link.is_open(),
                })).collect::<Vec<_>>(),
                "announcement_accepted": state.accepted,
                "announcement_refused": state.refused,
                "announcement_notes": state.notes,
                "addresses": state.addresses,
                "last_error": state.last_error,
            })
        })
    }
}

fn answered(peer: &Peer, announced: &proto::Announced) {
    if announced.accepted {
        tracing::info!(relay = peer.relay, version = announced.version, "announcement accepted");
    } else {
        tracing::error!(
            relay = peer.relay,
            version = announced.version,
            reasons = announced.reasons.join("; "),
            "announcement refused: the relay keeps the last one"
        );
    }
    peer.with(|state| {
        if announced.accepted {
            state.accepted = Some(announced.version);
            state.addresses.clone_from(&announced.addresses);
            state.notes.clone_from(&announced.notes);
        }
        state.refused.clone_from(&announced.reasons);
    });
}

/// Texts kept of a lane's exchanges: names that come again and again are made once.
#[derive(Default)]
struct Texts {
    /// Invariant: at most [`TEXTS_MAX`].
    kept: Vec<Arc<str>>,
    /// The next to go where there are as many.
    oldest: usize,
}

impl Texts {
    /// Returns the text, shared with the last exchanges that had it.
    fn shared(&mut self, text: &str) -> Arc<str> {
        if text.is_empty() {
            return Arc::default();
        }
        if let Some(kept) = self.kept.iter().find(|kept| ***kept == *text) {
            return Arc::clone(kept);
        }
        let made: Arc<str> = text.into();
        if self.kept.len() < TEXTS_MAX {
            self.kept.push(Arc::clone(&made));
        } else {
            self.kept[self.oldest] = Arc::clone(&made);
            self.oldest = (self.oldest + 1) % TEXTS_MAX;
        }
        made
    }
}
