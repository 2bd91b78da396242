//! Which relays are dialled: those configured by address, and each address that a configured name
//! stands for, looked up again and again.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use serde_json::json;
use sidelane_tunnel::HELD_MAX;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use super::health::jittered;
use super::{Access, Peer, RelayAnswer, Sidecar};
use crate::config;
use crate::random;
use crate::tunnel::backoff::Backoff;

/// Most addresses that one sidecar dials. Each is a session with its lanes and tasks; no fleet of relays
/// that one sidecar should know all of is larger.
pub(super) const ADDRESSES_MAX: usize = 64;

/// How long a name service may take: that of the system's resolver for one server, twice.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Looks up `host:port`.
pub type Resolve = Arc<dyn Fn(Arc<str>) -> ResolveFuture + Send + Sync>;

/// The addresses of a name, on their way.
pub type ResolveFuture = Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send>>;

/// Returns the system's resolver.
#[must_use]
pub fn system_resolver() -> Resolve {
    Arc::new(|name: Arc<str>| {
        Box::pin(async move { Ok(tokio::net::lookup_host(&*name).await?.collect()) })
    })
}

/// A relay that is configured by name.
pub(super) struct NamedRelay {
    name: Arc<str>,
    /// Which relay of the file it goes back to where relays tell of it; `None`: the file does.
    told_by: Option<Arc<str>>,
    /// No relay tells of it any more.
    is_released: AtomicBool,
    state: Mutex<Resolution>,
    /// Ends the wait for the next look-up.
    again: Notify,
}

/// What is known of a name.
#[derive(Default)]
struct Resolution {
    addresses: Vec<SocketAddr>,
    last_error: Option<String>,
}

impl NamedRelay {
    fn new(name: Arc<str>) -> Self {
        Self {
            name,
            told_by: None,
            is_released: AtomicBool::new(false),
            state: Mutex::default(),
            again: Notify::new(),
        }
    }

    /// Returns one that a relay tells of.
    pub(super) fn told(name: Arc<str>, by: Arc<str>) -> Self {
        Self { told_by: Some(by), ..Self::new(name) }
    }

    /// It is not looked up any more.
    pub(super) fn release(&self) {
        self.is_released.store(true, Ordering::Release);
        self.again.notify_one();
    }

    fn is_wanted(&self) -> bool {
        !self.is_released.load(Ordering::Acquire)
    }

    fn with<T>(&self, change: impl FnOnce(&mut Resolution) -> T) -> T {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Why nothing is dialled; `None`: an address is known, or looked up for the first time.
    pub(super) fn answer(&self) -> Option<RelayAnswer> {
        self.with(|state| {
            let error = state.last_error.as_ref().filter(|_| state.addresses.is_empty())?;
            Some(RelayAnswer {
                relay: self.name.to_string(),
                is_connected: false,
                accepted: None,
                refused: Vec::new(),
                notes: Vec::new(),
                addresses: Vec::new(),
                last_error: Some(format!("{} cannot be resolved: {error}", self.name)),
            })
        })
    }

    /// What the admin page says of it.
    pub(super) fn describe(&self) -> serde_json::Value {
        self.with(|state| {
            json!({
                "relay": &*self.name,
                "told_by": self.told_by.as_deref(),
                "addresses": state.addresses.iter().map(ToString::to_string).collect::<Vec<_>>(),
                "last_error": state.last_error,
            })
        })
    }
}

/// Tells relays by address from those by name.
pub(super) fn sort(relays: Vec<String>, access: &Access) -> (Vec<Arc<Peer>>, Vec<Arc<NamedRelay>>) {
    let (mut peers, mut names) = (Vec::new(), Vec::new());
    for relay in relays {
        let relay: Arc<str> = relay.into();
        let is_address = config::place(&relay).parse::<SocketAddr>().is_ok();
        // A name that goes to a proxy is for that to look up.
        if is_address || access.carrier(&relay).is_by_proxy() {
            peers.push(Arc::new(Peer::new(relay, None)));
        } else {
            names.push(Arc::new(NamedRelay::new(relay)));
        }
    }
    (peers, names)
}

/// What is dialled for a name's addresses. Those of loopback are one machine's, and so one relay's: the
/// first that answers will do.
fn targets(addresses: &[SocketAddr]) -> Vec<Option<SocketAddr>> {
    if addresses.iter().all(|address| address.ip().to_canonical().is_loopback()) {
        return vec![None];
    }
    addresses.iter().copied().map(Some).collect()
}

impl Sidecar {
    /// Looks a name up until the sidecar stops, and dials what it stands for.
    pub(super) async fn hold_name(self: Arc<Self>, named: Arc<NamedRelay>) {
        let mut backoff = Backoff::default();
        let mut stopping = self.stopping.subscribe();
        while !self.is_stopping() && named.is_wanted() {
            let is_known = self.resolve(&named).await;
            let interval = jittered(self.settings.resolve_interval, random::number());
            let wait = if is_known {
                backoff.reset();
                interval
            } else {
                // Where nothing is known of it there is nothing to live on meanwhile.
                backoff.next(random::number()).min(interval)
            };
            tokio::select! {
                () = sleep(wait) => {}
                () = named.again.notified() => {}
                _ = stopping.changed() => {}
            }
        }
    }

    /// A relay goes soon: its name may stand for others by now. Once in a session, so that no relay makes us
    /// ask the name service again and again.
    pub(super) fn relay_leaves(&self, peer: &Peer) {
        if peer.leaves() {
            let told = self.told.names();
            let names = self.names.iter().chain(&told);
            for named in names.filter(|named| named.name == peer.relay) {
                named.again.notify_one();
            }
        }
    }

    /// Looks a name up once; whether any address of it is known then.
    async fn resolve(self: &Arc<Self>, named: &NamedRelay) -> bool {
        let looked_up = (self.settings.resolve)(config::place(&named.name).into());
        let result = match timeout(RESOLVE_TIMEOUT, looked_up).await {
            Ok(Ok(addresses)) if addresses.is_empty() => Err("it has no address".to_owned()),
            Ok(Ok(addresses)) => Ok(addresses),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer within {RESOLVE_TIMEOUT:?}")),
        };
        let relay = &*named.name;
        match result {
            Ok(mut addresses) => {
                addresses.sort_unstable();
                addresses.dedup();
                let is_changed = named.with(|state| {
                    state.last_error = None;
                    let is_changed = state.addresses != addresses;
                    state.addresses.clone_from(&addresses);
                    is_changed
                });
                if is_changed {
                    tracing::info!(relay, ?addresses, "the relay's name has been resolved");
                    self.dial_while(&named.name, &addresses, || named.is_wanted());
                }
                true
            }
            Err(error) => {
                self.metrics.sidecar.resolve_failed();
                let known = named.with(|state| {
                    state.last_error = Some(error.clone());
                    state.addresses.len()
                });
                tracing::warn!(relay, error, known, "the relay's name cannot be resolved");
                self.answers.send_replace(());
                known > 0
            }
        }
    }

    /// Makes the addresses those that are dialled for a name. One that is gone keeps its session while
    /// that works.
    fn dial_while(
        self: &Arc<Self>,
        name: &Arc<str>,
        addresses: &[SocketAddr],
        is_wanted: impl Fn() -> bool,
    ) {
        let targets = targets(addresses);
        let mut new = Vec::new();
        self.change_peers(|peers| {
            if !is_wanted() {
                return;
            }
            for peer in peers.iter().filter(|peer| peer.relay == *name) {
                let is_wanted = targets.contains(&peer.address);
                peer.wanted
                    .send_if_modified(|wanted| std::mem::replace(wanted, is_wanted) != is_wanted);
            }
            let mut left_out = 0;
            for target in &targets {
                let dials = |peer: &Arc<Peer>| match target {
                    // Another name, or the file itself, may name the same address.
                    Some(address) => peer.target == address.to_string() && peer.is_wanted(),
                    None => peer.relay == *name && peer.address.is_none(),
                };
                if peers.iter().any(dials) {
                    continue;
                }
                if peers.len() >= ADDRESSES_MAX {
                    left_out += 1;
                    continue;
                }
                let peer = Arc::new(Peer::new(Arc::clone(name), *target));
                peers.push(Arc::clone(&peer));
                new.push(peer);
            }
            if left_out > 0 {
                tracing::warn!(
                    relay = &**name,
                    left_out,
                    max = ADDRESSES_MAX,
                    "too many addresses of relays; some are not dialled"
                );
            }
        });
        for peer in new {
            self.start_peer(peer);
        }
    }

    #[cfg(test)]
    fn dial_addresses(self: &Arc<Self>, name: &Arc<str>, addresses: &[SocketAddr]) {
        self.dial_while(name, addresses, || true);
    }

    /// Whether another session leads to the relay that this one's last session led to: a sidecar has one
    /// session with a relay.
    pub(super) fn is_reached_otherwise(&self, peer: &Arc<Peer>) -> bool {
        let instance = peer.instance();
        !instance.is_empty()
            && self.peers().iter().any(|other| {
                !Arc::ptr_eq(other, peer) && other.is_connected() && other.instance() == instance
            })
    }

    /// A peer has found this relay; whether another session leads there.
    pub(super) fn finds(&self, peer: &Arc<Peer>, instance: &[u8]) -> bool {
        peer.leads_to(instance);
        self.is_reached_otherwise(peer)
    }

    /// The relays that other sessions lead to.
    pub(super) fn held_otherwise(&self, peer: &Peer) -> Vec<Bytes> {
        let peers = self.peers();
        let others = peers.iter().filter(|other| !std::ptr::eq(&***other, peer));
        let connected = others.filter(|other| other.is_connected()).map(|other| other.instance());
        connected.filter(|instance| !instance.is_empty()).take(HELD_MAX).collect()
    }

    /// Whether another address of the same name is connected: failures of this one wake nobody.
    pub(super) fn has_connected_sibling(&self, peer: &Arc<Peer>) -> bool {
        self.peers().iter().any(|other| {
            !Arc::ptr_eq(other, peer) && other.relay == peer.relay && other.is_connected()
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;
    use crate::metrics::Metrics;
    use crate::plugin::{HostContext, Limits, Plugins};
    use crate::shard::Shards;
    use crate::sidecar::{Settings, dial};
    use sidelane_tunnel::{LaneConfig, Side};

    type Answers = Arc<Mutex<VecDeque<io::Result<Vec<SocketAddr>>>>>;

    fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().expect("an address")).collect()
    }

    /// A sidecar whose threads have ended, so that nothing is dialled; the resolver gives `answers` in
    /// turn.
    fn sidecar(relays: &[&str], answers: &Answers) -> Arc<Sidecar> {
        let metrics = Arc::new(Metrics::new());
        let host = HostContext::new(metrics.sink());
        let plugins = Arc::new(Plugins::new(host, Limits::default()));
        let shards = Shards::start("test", 1, 0, 1).expect("a thread");
        let all = Arc::clone(&shards.all);
        shards.stop();
        let answers = Arc::clone(answers);
        let settings = Settings {
            name: "test".to_owned(),
            lanes: 1,
            lane: LaneConfig::new(Side::Sidecar),
            timeouts: dial::Timeouts {
                connect: Duration::from_secs(1),
                answer: Duration::from_secs(1),
            },
            resolve_interval: Duration::from_secs(30),
            resolve: Arc::new(move |_| {
                let next = answers.lock().expect("not poisoned").pop_front();
                Box::pin(async move {
                    match next {
                        Some(answer) => answer,
                        None => std::future::pending().await,
                    }
                })
            }),
        };
        let relays = relays.iter().map(|relay| (*relay).to_owned()).collect();
        Sidecar::new(settings, Access::plain(), relays, plugins, metrics, all)
    }

    /// Peers that are wanted, by what is dialled.
    fn wanted(sidecar: &Sidecar) -> Vec<String> {
        let peers = sidecar.peers();
        let wanted = peers.iter().filter(|peer| peer.is_wanted());
        wanted.map(|peer| peer.target.clone()).collect()
    }

    #[tokio::test]
    async fn each_address_of_a_name_is_dialled_and_one_that_is_gone_no_more() {
        let answers = Answers::default();
        let sidecar = sidecar(&["127.0.0.1:1", "relay.test:9081"], &answers);
        assert_eq!(wanted(&sidecar), ["127.0.0.1:1"]);
        let named = Arc::clone(&sidecar.names[0]);
        let refused = || Err(io::Error::other("no name service"));
        for (answer, expected) in [
            // Nothing is known.
            (refused(), &["127.0.0.1:1"][..]),
            (
                Ok(addresses(&["192.0.2.2:9081", "192.0.2.1:9081", "192.0.2.1:9081"])),
                &["127.0.0.1:1", "192.0.2.1:9081", "192.0.2.2:9081"],
            ),
            // What is known is kept.
            (refused(), &["127.0.0.1:1", "192.0.2.1:9081", "192.0.2.2:9081"]),
            (Ok(Vec::new()), &["127.0.0.1:1", "192.0.2.1:9081", "192.0.2.2:9081"]),
            (
                Ok(addresses(&["192.0.2.2:9081", "192.0.2.3:9081"])),
                &["127.0.0.1:1", "192.0.2.2:9081", "192.0.2.3:9081"],
            ),
            // Back again.
            (Ok(addresses(&["192.0.2.1:9081"])), &["127.0.0.1:1", "192.0.2.1:9081"]),
            // The file names it too.
            (Ok(addresses(&["127.0.0.1:1", "192.0.2.9:9081"])), &["127.0.0.1:1", "192.0.2.9:9081"]),
        ] {
            let is_error = answer.as_ref().map_or(true, Vec::is_empty);
            answers.lock().expect("not poisoned").push_back(answer);
            sidecar.resolve(&named).await;
            assert_eq!(wanted(&sidecar), expected);
            assert_eq!(named.describe()["last_error"].is_string(), is_error);
        }
        let mut text = String::new();
        sidecar.metrics.encode(&mut text);
        assert!(text.contains("sidelane_relay_resolve_failures_total 3"), "{text}");
    }

    #[tokio::test]
    async fn a_peer_that_is_not_wanted_goes_once_its_session_is_lost() {
        let answers = Answers::default();
        let sidecar = sidecar(&["relay.test:9081"], &answers);
        sidecar.dial_addresses(&"relay.test:9081".into(), &addresses(&["192.0.2.1:9081"]));
        let peer = Arc::clone(&sidecar.peers()[0]);
        sidecar.dial_addresses(&"relay.test:9081".into(), &addresses(&["192.0.2.2:9081"]));
        assert_eq!(sidecar.peers().len(), 2);
        // As it goes on after a session's end.
        Arc::clone(&sidecar).hold_peer(peer).await;
        assert_eq!(wanted(&sidecar), ["192.0.2.2:9081"]);
        assert_eq!(sidecar.peers().len(), 1);
    }

    #[tokio::test]
    async fn a_name_of_loopback_is_one_relay() {
        let answers = Answers::default();
        let sidecar = sidecar(&["localhost:9081"], &answers);
        let both = addresses(&["127.0.0.1:9081", "[::1]:9081"]);
        sidecar.dial_addresses(&"localhost:9081".into(), &both);
        sidecar.dial_addresses(&"localhost:9081".into(), &both[..1]);
        assert_eq!(wanted(&sidecar), ["localhost:9081"]);
    }

    #[tokio::test]
    async fn addresses_are_bounded() {
        let answers = Answers::default();
        let sidecar = sidecar(&["relay.test:9081"], &answers);
        let many: Vec<SocketAddr> =
            (1..=100).map(|n| SocketAddr::from(([192, 0, 2, n], 9081))).collect();
        sidecar.dial_addresses(&"relay.test:9081".into(), &many);
        assert_eq!(sidecar.peers().len(), ADDRESSES_MAX);
    }

    #[tokio::test(start_paused = true)]
    async fn names_are_looked_up_at_their_interval_and_sooner_while_nothing_is_known() {
        let answers = Answers::default();
        let sidecar = sidecar(&["relay.test:9081"], &answers);
        let fill = [
            Err(io::Error::other("no name service")),
            Ok(addresses(&["192.0.2.1:9081"])),
            Ok(addresses(&["192.0.2.2:9081"])),
        ];
        answers.lock().expect("not poisoned").extend(fill);
        let start = tokio::time::Instant::now();
        let task = tokio::spawn(Arc::clone(&sidecar).hold_name(Arc::clone(&sidecar.names[0])));
        let until = async |target: &str| {
            while wanted(&sidecar) != [target] {
                sleep(Duration::from_millis(10)).await;
            }
            start.elapsed()
        };
        let first = until("192.0.2.1:9081").await;
        assert!(first < Duration::from_secs(1), "{first:?}");
        let second = until("192.0.2.2:9081").await - first;
        assert!(second > Duration::from_secs(26) && second < Duration::from_secs(34), "{second:?}");
        // The last look-up has no answer, and a time.
        let error = || sidecar.names[0].describe()["last_error"].clone();
        while error().is_null() {
            sleep(Duration::from_secs(1)).await;
        }
        assert_eq!(error(), "no answer within 10s");
        sidecar.drain();
        task.await.expect("it ends");
    }
}
