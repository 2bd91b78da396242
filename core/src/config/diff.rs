//! What a reload changes: a pure comparison of two configurations.

use std::collections::HashMap;
use std::sync::Arc;

use super::tls::ServerTls;
use super::{Config, Listener, RelayAddress, RelayTunnel, Relays, Route, Sidecar, Tunnel};

/// What differs between two configurations.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Changes {
    /// Routes.
    pub routes: Delta<Route>,
    /// Tunnels.
    pub tunnels: Delta<Tunnel>,
    /// Client listeners.
    pub listeners: Delta<Listener>,
    /// Base domains: routes take other hosts.
    pub base_domains: bool,
    /// What connections, sessions and handshakes go by: `relay.limits`, `relay.timeouts`,
    /// `relay.trusted_proxies`, `relay.max_connection_age`, `relay.tunnel.listener`, `relay.tunnel.tls`
    /// (with `insecure`), `relay.tunnel.token`, `relay.tunnel.advertise`, `relay.tunnel.grace`,
    /// `relay.tunnel.replay`, `relay.tunnel.peers`,
    /// `relay.credentials` (with `token_issuers`), `relay.acme`.
    pub relay: Vec<&'static str>,
    /// What relays are dialled by: `sidecar.relays` (their TLS; where they are is for a start),
    /// `sidecar.follow_peers`, `sidecar.token`.
    pub sidecar: Vec<&'static str>,
    /// Address of health and metrics.
    pub health: bool,
    /// Address of administration.
    pub admin: bool,
    /// Plugins.
    pub plugins: bool,
    /// Logs.
    pub log: bool,
    /// Drain timeout.
    pub drain_timeout: bool,
    /// Withdraw timeout.
    pub withdraw_timeout: bool,
}

impl Changes {
    /// Returns whether nothing differs.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Returns whether exchanges are routed, or delivered, in another way.
    #[must_use]
    pub fn is_routing(&self) -> bool {
        !self.routes.is_empty() || !self.tunnels.is_empty() || self.base_domains
    }
}

/// What differs between two lists of named things.
#[derive(Clone, Debug, PartialEq)]
pub struct Delta<T> {
    /// Only in the new one.
    pub added: Vec<Arc<T>>,
    /// Only in the old one.
    pub removed: Vec<Arc<T>>,
    /// In both and not equal: old, new.
    pub changed: Vec<(Arc<T>, Arc<T>)>,
}

impl<T> Default for Delta<T> {
    fn default() -> Self {
        Self { added: Vec::new(), removed: Vec::new(), changed: Vec::new() }
    }
}

impl<T> Delta<T> {
    /// Returns whether nothing differs.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.added.is_empty() && self.removed.is_empty() && self.changed.is_empty()
    }
}

/// Compares two configurations.
#[must_use]
pub fn diff(old: &Config, new: &Config) -> Changes {
    let mut relay = Vec::new();
    let mut listeners = Delta::default();
    if let (Some(old), Some(new)) = (&old.relay, &new.relay) {
        listeners = delta(&old.listeners, &new.listeners, |listener| &listener.name);
        let mut differs = |path, differs: bool| relay.extend(differs.then_some(path));
        differs("relay.limits", old.limits != new.limits);
        differs("relay.timeouts", old.timeouts != new.timeouts);
        differs("relay.trusted_proxies", old.trusted_proxies != new.trusted_proxies);
        differs("relay.max_connection_age", old.max_connection_age != new.max_connection_age);
        let (tunnel, new_tunnel) = (&old.tunnel, &new.tunnel);
        differs("relay.tunnel.listener", tunnel.listener != new_tunnel.listener);
        let tls = |tunnel: &'_ RelayTunnel| (tunnel.tls.clone(), tunnel.insecure);
        differs("relay.tunnel.tls", tls(tunnel) != tls(new_tunnel));
        differs("relay.tunnel.token", tunnel.token != new_tunnel.token);
        differs("relay.tunnel.peers", tunnel.peers != new_tunnel.peers);
        differs("relay.tunnel.advertise", tunnel.advertise != new_tunnel.advertise);
        differs("relay.tunnel.grace", tunnel.grace != new_tunnel.grace);
        differs("relay.tunnel.replay", tunnel.replay != new_tunnel.replay);
        differs("relay.credentials", old.credentials != new.credentials);
        differs("relay.acme", old.acme != new.acme);
    }
    let mut sidecar = Vec::new();
    if let (Some(old), Some(new)) = (&old.sidecar, &new.sidecar) {
        let mut differs = |path, differs: bool| sidecar.extend(differs.then_some(path));
        differs("sidecar.relays", old.relays != new.relays);
        let token = |sidecar: &Sidecar| (sidecar.token.clone(), sidecar.token_file.clone());
        differs("sidecar.follow_peers", old.follow_peers != new.follow_peers);
        differs("sidecar.token", token(old) != token(new));
    }
    let base_domains =
        |config: &Config| config.relay.as_ref().map(|relay| relay.base_domains.clone());
    Changes {
        routes: delta(&old.routes, &new.routes, |route| &route.name),
        tunnels: delta(&old.tunnels, &new.tunnels, |tunnel| &tunnel.name),
        listeners,
        relay,
        sidecar,
        health: old.health != new.health,
        admin: old.admin != new.admin,
        base_domains: base_domains(old) != base_domains(new),
        plugins: old.plugins != new.plugins,
        log: old.log != new.log,
        drain_timeout: old.drain_timeout != new.drain_timeout,
        withdraw_timeout: old.withdraw_timeout != new.withdraw_timeout,
    }
}

/// Puts back into `new` what `started` says of all that takes effect at a start only. Returns the
/// paths of what differed, in the file's order.
pub fn hold_back(new: &mut Config, started: &Config) -> Vec<&'static str> {
    let mut held = Held(Vec::new());
    match (&mut new.relay, &started.relay) {
        (Some(new), Some(old)) => {
            held.tunnel(&mut new.tunnel, &old.tunnel);
            held.keep("relay.warmup", &mut new.warmup, &old.warmup);
            held.keep("relay.threads", &mut new.threads, &old.threads);
        }
        (new, old) => held.keep("relay", new, old),
    }
    match (&mut new.sidecar, &started.sidecar) {
        (Some(new), Some(old)) => {
            held.keep("sidecar.name", &mut new.name, &old.name);
            held.relays(&mut new.relays, &old.relays);
            let (interval, old_interval) = (&mut new.resolve_interval, &old.resolve_interval);
            held.keep("sidecar.resolve_interval", interval, old_interval);
            held.keep("sidecar.lanes", &mut new.lanes, &old.lanes);
            held.keep("sidecar.threads", &mut new.threads, &old.threads);
            held.keep("sidecar.limits", &mut new.limits, &old.limits);
            held.keep("sidecar.timeouts", &mut new.timeouts, &old.timeouts);
        }
        (new, old) => held.keep("sidecar", new, old),
    }
    let (plugins, old) = (&mut new.plugins, &started.plugins);
    held.keep("plugins.generations", &mut plugins.generations, &old.generations);
    held.keep("plugins.panics", &mut plugins.panics, &old.panics);
    held.keep("plugins.panics_within", &mut plugins.panics_within, &old.panics_within);
    held.keep("plugins.slow_poll", &mut plugins.slow_poll, &old.slow_poll);
    held.keep("log.format", &mut new.log.format, &started.log.format);
    held.0
}

/// Paths of what was put back.
struct Held(Vec<&'static str>);

impl Held {
    /// Where sidecars come in stays; by what they come in does not.
    fn tunnel(&mut self, new: &mut RelayTunnel, old: &RelayTunnel) {
        if new.address == old.address {
            return;
        }
        self.keep("relay.tunnel.address", &mut new.address, &old.address);
        // What is plain at the new address, on loopback say, or where nobody reads along, need not be so
        // at the one that stays; nor does a listener's certificate do there.
        let is_exposed = new.address.is_some_and(|address| !address.ip().is_loopback());
        let shows = |tls: &ServerTls| !tls.certificates.is_empty() || !tls.acme.is_empty();
        if is_exposed && !new.tls.as_ref().is_some_and(shows) {
            // Whose certificates are believed is no matter of the address.
            let clients = new.tls.as_ref().and_then(|tls| tls.clients.clone());
            let kept = old.tls.clone().map(|tls| ServerTls { clients, ..tls });
            self.keep("relay.tunnel.tls", &mut new.tls, &kept);
            new.insecure = old.insecure;
        }
    }

    /// Which relays are dialled stays; by which TLS, proxy and other ways each of them is does not.
    fn relays(&mut self, new: &mut Relays, old: &Relays) {
        let place =
            |relay: &RelayAddress| (relay.address.clone(), relay.over.clone(), relay.insecure);
        if let (Relays::Listed(new), Relays::Listed(old)) = (&*new, old)
            && new.iter().map(place).eq(old.iter().map(place))
        {
            return;
        }
        let mut kept = old.clone();
        if let (Relays::Listed(kept), Relays::Listed(new)) = (&mut kept, &*new) {
            for relay in kept {
                if let Some(same) = new.iter().find(|new| place(new) == place(relay)) {
                    relay.tls.clone_from(&same.tls);
                    relay.proxy.clone_from(&same.proxy);
                    relay.fallback.clone_from(&same.fallback);
                }
            }
        }
        if *new != kept {
            self.0.push("sidecar.relays");
            *new = kept;
        }
    }

    fn keep<T: PartialEq + Clone>(&mut self, path: &'static str, new: &mut T, old: &T) {
        if new != old {
            self.0.push(path);
            new.clone_from(old);
        }
    }
}

fn delta<T: PartialEq>(old: &[Arc<T>], new: &[Arc<T>], name: fn(&T) -> &Arc<str>) -> Delta<T> {
    let mut left: HashMap<&str, &Arc<T>> = old.iter().map(|item| (&**name(item), item)).collect();
    let mut delta = Delta::default();
    for item in new {
        match left.remove(&**name(item)) {
            None => delta.added.push(item.clone()),
            Some(old) if Arc::ptr_eq(old, item) || **old == **item => {}
            Some(old) => delta.changed.push((old.clone(), item.clone())),
        }
    }
    // In the old file's order, whatever the map's.
    delta.removed = old.iter().filter(|item| left.contains_key(&**name(item))).cloned().collect();
    delta
}
