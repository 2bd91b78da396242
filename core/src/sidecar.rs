//! The sidecar's role: holds a session with each relay, and delivers what comes to the service.
//!
//! Knows tunnels and their services; what a message says is the plugins' business.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use sidelane_abi::failure;
use sidelane_tunnel::{Event, Key, LaneConfig, ProtocolTable, RequestId, proto};
use tokio::sync::watch;

use crate::announcement;
use crate::config;
use crate::error::visible;
use crate::metrics::{Flows, Metrics};
use crate::plugin::Plugins;
use crate::plugin::lend::{Meta, Reset, Text};
use crate::random;
use crate::shard::Shard;
use crate::tunnel::Link;
use crate::tunnel::dedicated::Claims;
use crate::tunnel::dial;
use crate::tunnel::pressure;
use crate::tunnel::session::surest;

mod access;
mod dedicated;
mod health;
mod hold;
mod lane;
mod peer;
mod proxy_header;
mod relays;
mod retry;
mod service;
mod told;
mod withdraw;

use access::Presented;
pub use access::{Access, Own};
use dedicated::Ahead;
use health::Health;
pub use peer::{Peer, RelayAnswer};
use relays::NamedRelay;
pub use relays::{Resolve, ResolveFuture, system_resolver};
pub use retry::{Allowance, Budget, Budgets};
pub use service::{Asked, Retries, ServiceHandle, Services};
use told::Told;

/// Relays of which readiness says why there is no session.
const FAILURES_TOLD_MAX: usize = 3;

/// Longest time that is taken from a relay: a week. Clocks do not overflow by it.
const TIMEOUT_MAX: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// Most times that one exchange is sent again, whatever a relay says: as a file.
const ATTEMPTS_MAX: u32 = 10;

/// Most retries per second that a route's budget allows in any case, whatever a relay says: as a file.
const RETRIES_PER_SECOND_MAX: u32 = 10_000;

/// What the sidecar works with for as long as it runs.
pub struct Settings {
    /// For people.
    pub name: String,
    /// Lanes per session.
    pub lanes: u32,
    /// How each lane is set up, but for what the relay's welcome says.
    pub lane: LaneConfig,
    /// How long a relay may take to let us in.
    pub timeouts: dial::Timeouts,
    /// How often relays' names are looked up again.
    pub resolve_interval: Duration,
    /// Looks them up.
    pub resolve: Resolve,
}

/// The sidecar's role of this process.
pub struct Sidecar {
    settings: Settings,
    access: ArcSwap<Access>,
    /// Told whenever `access` changes.
    access_changes: watch::Sender<()>,
    presented: Presented,
    instance: [u8; 16],
    plugins: Arc<Plugins>,
    metrics: Arc<Metrics>,
    services: ArcSwap<Services>,
    document: watch::Sender<Arc<proto::Announce>>,
    shards: Arc<[Shard]>,
    peers: ArcSwap<Vec<Arc<Peer>>>,
    /// Serialises changes of `peers`; readers never take it.
    peers_change: Mutex<()>,
    names: Vec<Arc<NamedRelay>>,
    /// Relays that relays tell of.
    told: Told,
    stopping: watch::Sender<bool>,
    /// Nothing new is to come here.
    withdrawn: AtomicBool,
    /// Told whenever a relay's answer, or why there is none, changes.
    answers: watch::Sender<()>,
    flows: Flows,
    budgets: Budgets,
    health: Health,
    turn: AtomicUsize,
    /// Connections to have dialled ahead of exchanges that will want one.
    ahead: watch::Sender<Ahead>,
}

/// What a lane's handshake settled, kept for the session's further lanes.
struct Session {
    id: bytes::Bytes,
    secret: bytes::Bytes,
    protocols: ProtocolTable,
    lane: LaneConfig,
    lanes_max: u32,
    /// Exchanges that wait for a connection of their own; `None`: one of the two ends has none.
    claims: Option<Arc<Claims>>,
    /// Of the relay that has it.
    relay_instance: bytes::Bytes,
    /// Where the relay wants further lanes and those that come back; empty: where the session was dialled.
    advertised: String,
    /// The advertised address cannot be reached from here; where the session was dialled is tried.
    is_elsewhere: AtomicBool,
    /// How long the relay waits for a lane that has lost its connection; zero: not at all.
    grace: Duration,
}

impl Session {
    /// What is dialled for a lane of it, and whether the relay has said so.
    fn target<'a>(&'a self, peer: &'a Peer) -> (&'a str, bool) {
        if self.advertised.is_empty() || self.is_elsewhere.load(Ordering::Relaxed) {
            (&peer.target, false)
        } else {
            (&self.advertised, true)
        }
    }

    /// What was dialled, the advertised address or the other, cannot be reached: the other one is tried, where
    /// there are two. Several lanes may find out at once.
    fn not_reached(&self, is_advertised: bool) {
        self.is_elsewhere.store(is_advertised, Ordering::Relaxed);
    }
}

impl Sidecar {
    /// Returns the role; nothing is dialled before [`Sidecar::start`].
    pub fn new(
        settings: Settings,
        access: Access,
        relays: Vec<String>,
        plugins: Arc<Plugins>,
        metrics: Arc<Metrics>,
        shards: Arc<[Shard]>,
    ) -> Arc<Self> {
        let (peers, names) = relays::sort(relays, &access);
        Arc::new(Self {
            settings,
            access: ArcSwap::from_pointee(access),
            access_changes: watch::Sender::new(()),
            presented: Presented::default(),
            instance: random::bytes(),
            plugins,
            metrics,
            services: ArcSwap::default(),
            document: watch::Sender::new(Arc::default()),
            shards,
            peers: ArcSwap::from_pointee(peers),
            peers_change: Mutex::new(()),
            names,
            told: Told::default(),
            stopping: watch::Sender::new(false),
            withdrawn: AtomicBool::new(false),
            answers: watch::Sender::new(()),
            flows: Flows::new("sidecar"),
            budgets: Budgets::default(),
            health: Health::default(),
            turn: AtomicUsize::new(0),
            ahead: watch::Sender::default(),
        })
    }

    /// Takes tunnels and routes of a configuration: for new exchanges, and announced to all relays.
    pub fn configure(self: &Arc<Self>, config: &config::Config) {
        self.set_ahead(config);
        let before = self.services.load_full();
        self.services.store(Arc::new(before.updated(&config.tunnels)));
        let is_start = self.document.borrow().version == 0;
        let tasks = self.health.configure(
            &config.tunnels,
            |tunnel| before.has(tunnel),
            is_start,
            &self.metrics.sidecar,
        );
        self.document.send_modify(|document| {
            let mut next = announcement::encode(document.version + 1, config);
            self.mark(&mut next.tunnels);
            *document = Arc::new(next);
        });
        self.watch_services(tasks);
    }

    /// What the admin page says of the services.
    pub fn describe_services(&self) -> serde_json::Value {
        self.services.load().tunnels().map(|tunnel| self.health.describe(tunnel)).collect()
    }

    /// Begins to dial every relay.
    pub fn start(self: &Arc<Self>) {
        for peer in self.peers().iter() {
            self.start_peer(Arc::clone(peer));
        }
        for named in &self.names {
            let task = Arc::clone(self).hold_name(Arc::clone(named));
            self.next_shard().spawn(task);
        }
        self.next_shard().spawn(Arc::clone(self).hold_credential());
    }

    fn start_peer(self: &Arc<Self>, peer: Arc<Peer>) {
        // Refused only where the process ends.
        self.next_shard().spawn(Arc::clone(self).hold_peer(peer));
    }

    /// Peers take turns on the threads; their lanes lie on all.
    fn next_shard(&self) -> &Shard {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        &self.shards[turn % self.shards.len()]
    }

    /// Whether at least one session can carry exchanges.
    pub fn is_connected(&self) -> bool {
        self.peers().iter().any(|peer| peer.is_connected())
    }

    /// Why there is no session with any relay, as far as is known, the first ones; `None`: there is one.
    #[must_use]
    pub fn no_session(&self) -> Option<String> {
        if self.is_connected() {
            return None;
        }
        let mut text = "no session with any relay".to_owned();
        let peers = self.peers();
        let of_peers = peers.iter().filter_map(|peer| peer.failure());
        let of_names = self.names.iter().filter_map(|named| named.answer()?.last_error);
        for (index, failure) in of_peers.chain(of_names).take(FAILURES_TOLD_MAX).enumerate() {
            text += if index == 0 { ": " } else { "; " };
            text += &failure;
        }
        Some(text)
    }

    /// Why all relays with a session refuse the newest document; `None`: one does not, or there is none.
    pub fn refused_by_all(&self) -> Option<String> {
        let peers = self.peers();
        let mut connected = peers.iter().filter(|peer| peer.is_connected()).peekable();
        connected.peek()?;
        let reasons: Option<Vec<String>> = connected
            // One that waits is no fault of this sidecar: a rollout would never end that waits for it.
            .map(|peer| {
                let refusal = peer.refusal().filter(|_| !peer.waits());
                refusal.map(|reasons| format!("{}: {reasons}", peer.name))
            })
            .collect();
        reasons.map(|reasons| reasons.join("; "))
    }

    /// The relays, by what is dialled.
    pub fn peers(&self) -> Arc<Vec<Arc<Peer>>> {
        self.peers.load_full()
    }

    fn change_peers(&self, change: impl FnOnce(&mut Vec<Arc<Peer>>)) {
        let _held = self.peers_change.lock().unwrap_or_else(PoisonError::into_inner);
        let mut peers = Vec::clone(&self.peers.load());
        change(&mut peers);
        self.peers.store(Arc::new(peers));
    }

    /// What the admin page says of relays that are configured by name.
    pub fn describe_names(&self) -> serde_json::Value {
        let told = self.told.names();
        self.names.iter().chain(&told).map(|named| named.describe()).collect()
    }

    /// Returns what each relay has said.
    #[must_use]
    pub fn relay_answers(&self) -> Vec<RelayAnswer> {
        let told = self.told.names();
        let unresolved = self.names.iter().chain(&told).filter_map(|named| named.answer());
        self.peers().iter().map(|peer| peer.answer()).chain(unresolved).collect()
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
        let held = pressure::balance(&self.links(), queued_max);
        self.metrics.lanes.set_held("sidecar", &held, queued_max);
    }

    /// Exchanges that run.
    pub fn exchanges(&self) -> usize {
        self.links().iter().map(|link| link.load()).sum()
    }

    /// Ends all lanes for good once what is queued has been written.
    pub fn close(&self) {
        for link in self.links() {
            link.end(failure::DRAINING, "the sidecar has ended");
        }
    }

    /// Lanes that are up.
    pub fn lanes(&self) -> usize {
        self.links().len()
    }

    fn links(&self) -> Vec<Arc<Link>> {
        self.peers().iter().flat_map(|peer| peer.with(|state| state.lanes.clone())).collect()
    }

    /// Whether it takes nothing new any more.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        *self.stopping.borrow()
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
                peer.answered(&announced);
                self.count_refusals();
                self.answers.send_replace(());
            }
            Event::GoAway(go_away) => {
                let (relay, lane, reason) = (&*peer.name, link.number, &*visible(&go_away.detail));
                if go_away.code == failure::DRAINING && link.is_leaving() {
                    tracing::debug!(relay, lane, reason, "the relay is done with this lane");
                } else if go_away.code == failure::DRAINING {
                    tracing::info!(relay, lane, reason, "the relay takes nothing new on this lane");
                    self.relay_leaves(peer);
                } else {
                    tracing::error!(
                        relay,
                        lane,
                        reason,
                        "the relay withdraws this sidecar's credential"
                    );
                }
                link.leave();
            }
            Event::Announce(_) => {
                tracing::warn!(relay = peer.name, "the relay sent an announcement; ignored");
            }
            Event::Authenticated(answer) => {
                peer.credential_answered(&answer);
                self.count_refused_credentials();
                self.answers.send_replace(());
            }
            Event::Authenticate(_) | Event::Rtt(_) | Event::Suspect(_) => {}
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
        let route = texts.shared(&open.route);
        let client_address: Text = open.client_address.as_str().into();
        let policy = open.policy.as_ref();
        let asked = Asked {
            client_address: client_address.clone(),
            connect_timeout: policy.and_then(|policy| millis(policy.connect_timeout_ms)),
            retries: policy.and_then(|policy| self.retries(policy, &route)),
        };
        let Some(service) = services.find(&open.tunnel, asked) else {
            return refuse(failure::NO_ROUTE);
        };
        let record = self.metrics.exchange("sidecar", plugin.name());
        record.routed(&route, &service.tunnel);
        let tls = open.tls.as_ref();
        let meta = Meta {
            request_id: Arc::<str>::from(id).into(),
            protocol_type: Arc::clone(plugin.name()),
            route: route.into(),
            tunnel: Arc::clone(&service.tunnel).into(),
            client_address,
            listener: texts.shared(&open.listener).into(),
            scheme: texts.shared(&open.scheme).into(),
            tls_sni: tls.map_or("", |tls| &tls.sni).into(),
            tls_alpn: tls.map_or("", |tls| &tls.alpn).into(),
            tls_client: tls.map_or("", |tls| &tls.client_subject).into(),
            trace_parent: open.trace_parent.as_str().into(),
            trusted_proxy: open.trusted_proxy,
            peer_address: open.peer_address.as_str().into(),
            response_head_timeout: policy
                .and_then(|policy| millis(policy.response_head_timeout_ms)),
            options: texts.shared(&open.options).into(),
            deadline: (open.timeout_ns > 0)
                .then(|| Instant::now() + Duration::from_nanos(open.timeout_ns).min(TIMEOUT_MAX)),
        };
        let flow = record.tallied(self.flows.of(&self.metrics, plugin.name()));
        let (send, recv) = link.halves(key, flow);
        let call = plugin.deliver(meta, send, recv, service);
        tokio::spawn(async move {
            let end = call.await;
            record.end(end.code);
        });
    }

    /// What a route's policy allows of retries; pays the exchange into the route's budget.
    fn retries(&self, policy: &proto::DeliveryPolicy, route: &Arc<str>) -> Option<Retries> {
        if policy.retries == 0 {
            return None;
        }
        let allowance = Allowance {
            percent: policy.retry_budget_percent,
            per_second: policy.retry_budget_min.min(RETRIES_PER_SECOND_MAX),
        };
        Some(Retries {
            attempts: policy.retries.min(ATTEMPTS_MAX),
            used: AtomicU32::new(0),
            budget: self.budgets.deposit(route, allowance, Instant::now()),
            route: Arc::clone(route),
            metrics: Arc::clone(&self.metrics),
        })
    }

    fn count_refusals(&self) {
        let is_refused = self.peers().iter().any(|peer| peer.refusal().is_some());
        self.metrics.sidecar.set_announcement_refused(is_refused);
    }

    fn count_refused_credentials(&self) {
        let is_refused = self.peers().iter().any(|peer| peer.refuses_credential());
        self.metrics.sidecar.set_credential_refused(is_refused);
    }

    /// Sends the current document on a lane that is up.
    fn announce(&self, peer: &Peer) {
        let document = Arc::clone(&self.document.borrow());
        if let Some(link) = peer.with(|state| surest(&state.lanes).cloned()) {
            let is_sent = link.with(|lane| lane.announce(proto::Announce::clone(&document)));
            if !is_sent {
                tracing::error!(
                    relay = peer.name,
                    "the announcement is longer than the relay accepts"
                );
            }
        }
    }
}

/// Texts that a lane keeps: enough for the few routes that are busy at a time, few enough to look
/// through. None is longer than an open record.
const TEXTS_MAX: usize = 16;

/// A time of a relay's; 0: none.
fn millis(millis: u64) -> Option<Duration> {
    (millis > 0).then(|| Duration::from_millis(millis).min(TIMEOUT_MAX))
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
