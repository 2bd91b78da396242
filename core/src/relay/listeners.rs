//! Which client listeners a relay has: opened before anything of a new configuration counts, taken
//! over where their address stays, stopped where it is gone.
//!
//! Knows sockets, names and addresses; what a connection is made of is `listen`'s business.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use ipnet::IpNet;
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::Relay;
use super::listen::{accept, bind};
use super::summary::Summary;
use super::tls::{Acceptor, SidecarTls};
use crate::config;
use crate::front::FrontConfig;
use crate::metrics::Metrics;
use crate::shard::Shard;
use crate::tls::Issued;

/// What connections of all listeners go by, each as it was when it began.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Of the HTTP front.
    pub front: Arc<FrontConfig>,
    /// Connections of all listeners at once.
    pub connections_max: usize,
    /// Whose word on the client is taken.
    pub trusted_proxies: Arc<[IpNet]>,
    /// An HTTP connection is asked to end at about this age.
    pub max_connection_age: Option<Duration>,
    /// For a TLS handshake, from the connection's begin.
    pub tls_handshake: Duration,
    /// TLS handshakes of all listeners under way at once.
    pub tls_handshakes_max: usize,
    /// The same, from one address.
    pub tls_handshakes_per_address_max: usize,
}

impl Settings {
    /// Returns what a configuration says.
    #[must_use]
    pub fn of(section: &config::Relay) -> Self {
        let limits = &section.limits;
        let front = FrontConfig {
            request_head_timeout: section.timeouts.request_head,
            idle_timeout: section.timeouts.idle,
            head_bytes_max: u32::try_from(limits.request_head).unwrap_or(u32::MAX),
            headers_max: limits.request_headers,
            h2_streams_max: limits.streams_per_connection,
            ..FrontConfig::default()
        };
        Self {
            front: Arc::new(front),
            connections_max: limits.connections,
            trusted_proxies: section.trusted_proxies.as_slice().into(),
            max_connection_age: section.max_connection_age,
            tls_handshake: section.timeouts.tls_handshake,
            tls_handshakes_max: limits.tls_handshakes,
            tls_handshakes_per_address_max: limits.tls_handshakes_per_address,
        }
    }
}

/// One listener that is bound.
#[derive(Debug)]
pub(super) struct Listener {
    /// Swapped where a configuration says something else of the same address; a connection keeps what
    /// it began with.
    rules: ArcSwap<Rules>,
    /// Where it listens: as configured but for port 0.
    local: SocketAddr,
    /// Nobody is to be accepted any more.
    closing: watch::Sender<bool>,
    /// All sockets are closed, and connections end with what runs on them: not before, since a client
    /// that is told so comes back at once, and would meet a socket that is about to close.
    stopping: watch::Sender<bool>,
    /// PROXY headers that do not hold.
    pub(super) refused_headers: Summary,
    /// TLS handshakes that were not begun.
    pub(super) refused_handshakes: Summary,
    /// TLS handshakes that failed.
    pub(super) failed_handshakes: Summary,
}

/// What a listener's connections go by.
#[derive(Debug)]
pub(super) struct Rules {
    /// As in the configuration.
    pub(super) config: Arc<config::Listener>,
    /// TLS; `None`: connections are plain.
    pub(super) acceptor: Option<Arc<Acceptor>>,
}

impl Rules {
    /// Returns the rules of a configuration; TLS that is `before`'s stays the same object, and with it
    /// its session tickets.
    fn new(
        config: &Arc<config::Listener>,
        sidecars: Option<SidecarTls>,
        before: Option<&Self>,
        issued: &Arc<Issued>,
    ) -> io::Result<Self> {
        let config = Arc::clone(config);
        let Some(tls) = &config.tls else { return Ok(Self { config, acceptor: None }) };
        let before = before.and_then(|before| before.acceptor.as_ref());
        let acceptor = match before.filter(|before| before.is_of(tls, sidecars.as_ref())) {
            Some(same) => Arc::clone(same),
            None => Arc::new(Acceptor::new(tls, sidecars, issued)?),
        };
        Ok(Self { config, acceptor: Some(acceptor) })
    }
}

/// Returns what is asked of sidecars on a listener; `None`: they do not come in there.
fn sidecars(tunnel: &config::RelayTunnel, listener: &config::Listener) -> Option<SidecarTls> {
    let is_shared = tunnel.listener.as_ref() == Some(&listener.name);
    let clients = || tunnel.tls.as_ref().and_then(|tls| tls.clients.clone());
    is_shared.then(|| SidecarTls { clients: clients() })
}

impl Listener {
    /// Its settings.
    pub(super) fn config(&self) -> Arc<config::Listener> {
        Arc::clone(&self.rules.load().config)
    }

    /// What a connection that begins goes by.
    pub(super) fn rules(&self) -> Arc<Rules> {
        self.rules.load_full()
    }

    /// Turns true where accepting shall end.
    pub(super) fn closing(&self) -> watch::Receiver<bool> {
        self.closing.subscribe()
    }

    /// Turns true where connections shall end.
    pub(super) fn stopping(&self) -> watch::Receiver<bool> {
        self.stopping.subscribe()
    }
}

/// The sockets of a listener that are open: with the last of them its connections are asked to end.
#[derive(Debug)]
pub(super) struct Open(Arc<Listener>);

impl Open {
    pub(super) fn listener(&self) -> &Arc<Listener> {
        &self.0
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.stopping.send_replace(true);
    }
}

/// An address of the configuration that cannot be listened on.
#[derive(Debug)]
pub struct BindError {
    /// Place among the configuration's listeners.
    pub index: usize,
    /// Why.
    pub source: io::Error,
}

/// The listeners of a configuration, before they are in force.
#[derive(Debug, Default)]
pub struct Prepared {
    /// In the configuration's order.
    listeners: Vec<(Arc<Listener>, Arc<Rules>)>,
    /// The sockets of those that were not there before, one per thread.
    fresh: Vec<(Arc<Listener>, Vec<std::net::TcpListener>)>,
}

impl Prepared {
    /// Where each listens, by name, in the configuration's order.
    pub fn addresses(&self) -> impl Iterator<Item = (&Arc<str>, SocketAddr)> {
        self.listeners.iter().map(|(listener, rules)| (&rules.config.name, listener.local))
    }
}

/// All listeners of the relay.
pub(super) struct Listeners {
    current: Mutex<Vec<Arc<Listener>>>,
    settings: ArcSwap<Settings>,
    /// The relay's threads, once it has started.
    threads: OnceLock<Threads>,
}

struct Threads {
    shards: Arc<[Shard]>,
    loads: Loads,
}

impl Listeners {
    pub(super) fn new(settings: Settings) -> Self {
        Self {
            current: Mutex::default(),
            settings: ArcSwap::from_pointee(settings),
            threads: OnceLock::new(),
        }
    }

    /// What a connection that begins now goes by.
    pub(super) fn settings(&self) -> Arc<Settings> {
        self.settings.load_full()
    }

    pub(super) fn set_settings(&self, settings: Settings) {
        self.settings.store(Arc::new(settings));
    }

    /// Names the threads that accept and serve.
    pub(super) fn set_threads(&self, shards: &Arc<[Shard]>) {
        let loads = Loads::new(shards.len());
        // Said once, at the start.
        let _ = self.threads.set(Threads { shards: Arc::clone(shards), loads });
    }

    /// The relay's threads.
    pub(super) fn shards(&self) -> &Arc<[Shard]> {
        &self.threads().shards
    }

    /// Connections per thread.
    pub(super) fn loads(&self) -> &Loads {
        &self.threads().loads
    }

    fn threads(&self) -> &Threads {
        self.threads.get().expect("threads are named before anybody is accepted")
    }

    /// Binds what is not bound yet. Nothing changes until [`Listeners::apply`]; dropped instead, the
    /// new sockets close, and nobody was accepted on them.
    ///
    /// # Errors
    /// The first address that cannot be listened on, or whose TLS cannot be had.
    pub(super) fn prepare(
        &self,
        configs: &[Arc<config::Listener>],
        tunnel: &config::RelayTunnel,
        issued: &Arc<Issued>,
        threads: usize,
    ) -> Result<Prepared, BindError> {
        let mut left = self.lock().clone();
        let mut kept: Vec<Option<Arc<Listener>>> = vec![None; configs.len()];
        // By name first, so that of several at port 0 each finds its own.
        for is_same in [same_name_and_address, same_address] {
            for (config, kept) in configs.iter().zip(&mut kept) {
                if kept.is_none()
                    && let Some(at) = left.iter().position(|old| is_same(&old.config(), config))
                {
                    *kept = Some(left.remove(at));
                }
            }
        }
        let mut prepared = Prepared { listeners: Vec::new(), fresh: Vec::new() };
        for (index, (config, kept)) in configs.iter().zip(kept).enumerate() {
            let failed = |source| BindError { index, source };
            let before = kept.as_ref().map(|listener| listener.rules());
            let rules = Rules::new(config, sidecars(tunnel, config), before.as_deref(), issued);
            let rules = Arc::new(rules.map_err(failed)?);
            let listener = match kept {
                Some(listener) => listener,
                None => {
                    let sockets = bind(config.address, threads).map_err(failed)?;
                    let listener = Arc::new(Listener {
                        rules: ArcSwap::new(Arc::clone(&rules)),
                        local: sockets[0].local_addr().map_err(failed)?,
                        closing: watch::Sender::new(false),
                        stopping: watch::Sender::new(false),
                        refused_headers: Summary::default(),
                        refused_handshakes: Summary::default(),
                        failed_handshakes: Summary::default(),
                    });
                    prepared.fresh.push((Arc::clone(&listener), sockets));
                    listener
                }
            };
            prepared.listeners.push((listener, rules));
        }
        Ok(prepared)
    }

    /// Puts listeners in force: the new ones accept, then those that are gone stop.
    pub(super) fn apply(&self, relay: &Arc<Relay>, prepared: Prepared) {
        let Prepared { listeners, fresh } = prepared;
        for listener in self.lock().iter() {
            relay.metrics.tls.set_certificates(&listener.config().name, &[]);
        }
        for (listener, rules) in &listeners {
            listener.rules.store(Arc::clone(rules));
            tell(&relay.metrics, rules);
        }
        for (listener, sockets) in fresh {
            let open = Arc::new(Open(listener));
            for (thread, socket) in sockets.into_iter().enumerate() {
                let (relay, open) = (Arc::clone(relay), Arc::clone(&open));
                let started = self.shards()[thread].spawn(async move {
                    match TcpListener::from_std(socket) {
                        Ok(socket) => accept(relay, open, socket, thread).await,
                        Err(error) => tracing::error!(%error, "a listener is lost"),
                    }
                });
                if !started {
                    tracing::error!(thread, "a thread is too busy to take a listener; it is lost");
                }
            }
        }
        let listeners: Vec<_> = listeners.into_iter().map(|(listener, _)| listener).collect();
        let old = std::mem::replace(&mut *self.lock(), listeners);
        if relay.is_withdrawn() {
            self.withdraw();
        }
        let current = self.lock();
        for old in old {
            if !current.iter().any(|listener| Arc::ptr_eq(listener, &old)) {
                tracing::info!(
                    listener = &*old.config().name, address = %old.local,
                    "listener closes; its connections end with what runs on them"
                );
                old.closing.send_replace(true);
            }
        }
    }

    /// Takes what a configuration asks of sidecars that come in by a listener of clients.
    pub(super) fn set_tunnel(&self, tunnel: &config::RelayTunnel, issued: &Arc<Issued>) {
        for listener in self.lock().iter() {
            let before = listener.rules();
            let config = &before.config;
            match Rules::new(config, sidecars(tunnel, config), Some(&before), issued) {
                Ok(rules) => listener.rules.store(Arc::new(rules)),
                Err(error) => tracing::error!(
                    listener = &*config.name, %error,
                    "relay.tunnel.tls cannot be used; the listener goes on with what it was"
                ),
            }
        }
    }

    /// Asks the connections of all to end with what runs on them; the sockets stay open.
    pub(super) fn withdraw(&self) {
        for listener in self.lock().iter() {
            listener.stopping.send_replace(true);
        }
    }

    /// Stops all: the relay shuts down.
    pub(super) fn stop(&self) {
        for listener in self.lock().iter() {
            listener.closing.send_replace(true);
        }
    }

    /// Names and addresses of those in force.
    pub(super) fn addresses(&self) -> Vec<(Arc<config::Listener>, SocketAddr)> {
        self.lock().iter().map(|listener| (listener.config(), listener.local)).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Listener>>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Begins the rows of a listener.
fn tell(metrics: &Metrics, rules: &Rules) {
    let name = &rules.config.name;
    metrics.listener(name);
    let certificates = rules.acceptor.as_ref().map(|acceptor| {
        metrics.tls.listener(name);
        acceptor.certificates()
    });
    metrics.tls.set_certificates(name, &certificates.unwrap_or_default());
}

fn same_name_and_address(old: &config::Listener, new: &config::Listener) -> bool {
    old.name == new.name && old.address == new.address
}

fn same_address(old: &config::Listener, new: &config::Listener) -> bool {
    old.address == new.address
}

/// How many connections each of the relay's threads has.
pub(super) struct Loads {
    counts: Box<[AtomicUsize]>,
    /// Held while a thread is chosen, so that two that choose at once do not choose the same.
    choice: Mutex<()>,
}

impl Loads {
    fn new(threads: usize) -> Self {
        Self {
            counts: (0..threads).map(|_| AtomicUsize::new(0)).collect(),
            choice: Mutex::default(),
        }
    }

    /// Counts one more on a thread.
    pub(super) fn add(&self, thread: usize) {
        self.counts[thread].fetch_add(1, Ordering::Relaxed);
    }

    /// Counts one less.
    pub(super) fn remove(&self, thread: usize) {
        self.counts[thread].fetch_sub(1, Ordering::Relaxed);
    }

    /// Counts one more on the thread that has the fewest, and returns which; `own` where that is one.
    pub(super) fn add_to_least(&self, own: usize) -> usize {
        let _held = self.choice.lock().unwrap_or_else(PoisonError::into_inner);
        let load = |thread: &usize| self.counts[*thread].load(Ordering::Relaxed);
        let least = (0..self.counts.len()).min_by_key(load).unwrap_or(own);
        let thread = if load(&own) <= load(&least) { own } else { least };
        self.add(thread);
        thread
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Balance, Carries};

    fn listener(name: &str, address: &str) -> Arc<config::Listener> {
        Arc::new(config::Listener {
            name: name.into(),
            address: address.parse().unwrap(),
            carries: Carries::Http,
            proxy_protocol: false,
            balance: Balance::Kernel,
            tls: None,
            https_redirect: None,
        })
    }

    fn listeners() -> Listeners {
        Listeners::new(Settings {
            front: Arc::default(),
            connections_max: 1,
            trusted_proxies: Arc::from([]),
            max_connection_age: None,
            tls_handshake: Duration::ZERO,
            tls_handshakes_max: 1,
            tls_handshakes_per_address_max: 1,
        })
    }

    fn prepare(
        listeners: &Listeners,
        configs: &[Arc<config::Listener>],
    ) -> Result<Prepared, BindError> {
        let tunnel = config::RelayTunnel {
            address: None,
            listener: None,
            tls: None,
            insecure: false,
            token: None,
            peers: Vec::new(),
            advertise: None,
            grace: Duration::ZERO,
            replay: config::REPLAY_BYTES,
        };
        listeners.prepare(configs, &tunnel, &Arc::default(), 1)
    }

    /// Puts in force without anybody who accepts.
    fn put(listeners: &Listeners, configs: &[Arc<config::Listener>]) -> Vec<Arc<Listener>> {
        let prepared = prepare(listeners, configs).unwrap();
        let put: Vec<_> = prepared.listeners.into_iter().map(|(listener, _)| listener).collect();
        listeners.lock().clone_from(&put);
        put
    }

    #[test]
    fn an_unchanged_listener_stays_the_same_object() {
        let listeners = listeners();
        let (a, b) = (listener("a", "127.0.0.1:0"), listener("b", "127.0.0.1:0"));
        let first = put(&listeners, &[Arc::clone(&a), Arc::clone(&b)]);
        // In another order, beside another one, and rebuilt from a file.
        let second = put(
            &listeners,
            &[listener("c", "127.0.0.1:0"), listener("b", "127.0.0.1:0"), Arc::clone(&a)],
        );
        assert!(Arc::ptr_eq(&first[0], &second[2]) && Arc::ptr_eq(&first[1], &second[1]));
        assert!(!first.iter().any(|old| Arc::ptr_eq(old, &second[0])));
    }

    #[test]
    fn a_listener_that_is_renamed_keeps_its_socket() {
        let listeners = listeners();
        let first = put(&listeners, &[listener("a", "127.0.0.1:0")]);
        let second = put(&listeners, &[listener("b", "127.0.0.1:0")]);
        assert!(Arc::ptr_eq(&first[0], &second[0]));
    }

    #[test]
    fn another_address_is_another_listener() {
        let listeners = listeners();
        let first = put(&listeners, &[listener("a", "127.0.0.1:0")]);
        let second = put(&listeners, &[listener("a", "127.0.0.2:0")]);
        assert!(!Arc::ptr_eq(&first[0], &second[0]));
    }

    #[test]
    fn a_bind_failure_names_the_listener_and_changes_nothing() {
        let listeners = listeners();
        let first = put(&listeners, &[listener("a", "127.0.0.1:0")]);
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let taken = listener("b", &taken.local_addr().unwrap().to_string());
        let error = prepare(&listeners, &[listener("a", "127.0.0.1:0"), taken]).unwrap_err();
        assert_eq!((error.index, error.source.kind()), (1, io::ErrorKind::AddrInUse));
        assert!(Arc::ptr_eq(&first[0], &listeners.lock()[0]));
    }

    #[test]
    fn the_thread_with_the_fewest_is_chosen_and_its_own_among_equals() {
        let loads = Loads::new(3);
        assert_eq!(loads.add_to_least(1), 1);
        assert_eq!(loads.add_to_least(1), 0);
        assert_eq!(loads.add_to_least(1), 2);
        loads.remove(2);
        assert_eq!(loads.add_to_least(0), 2);
        assert_eq!(loads.add_to_least(2), 2);
    }
}
