//! What a reload changes: a pure comparison of two configurations.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Config, Route, Tunnel};

/// What differs between two configurations.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Changes {
    /// Routes.
    pub routes: Delta<Route>,
    /// Tunnels.
    pub tunnels: Delta<Tunnel>,
    /// Base domains: routes take other hosts.
    pub base_domains: bool,
    /// Plugins.
    pub plugins: bool,
    /// Logs.
    pub log: bool,
    /// Drain timeout.
    pub drain_timeout: bool,
    /// Paths of what takes effect at the next start only.
    pub needs_restart: Vec<&'static str>,
}

impl Changes {
    /// Returns whether nothing differs.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
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
    let mut needs_restart = Vec::new();
    let mut restart = |path, differs: bool| {
        if differs {
            needs_restart.push(path);
        }
    };
    match (&old.relay, &new.relay) {
        (Some(old), Some(new)) => {
            restart("relay.listeners", old.listeners != new.listeners);
            restart("relay.tunnel", old.tunnel != new.tunnel);
            restart("relay.threads", old.threads != new.threads);
            restart("relay.limits", old.limits != new.limits);
            restart("relay.timeouts", old.timeouts != new.timeouts);
        }
        (old, new) => restart("relay", old.is_some() != new.is_some()),
    }
    match (&old.sidecar, &new.sidecar) {
        (Some(old), Some(new)) => {
            restart("sidecar.name", old.name != new.name);
            restart("sidecar.relays", old.relays != new.relays);
            restart("sidecar.token", old.token != new.token);
            restart("sidecar.lanes", old.lanes != new.lanes);
            restart("sidecar.threads", old.threads != new.threads);
            restart("sidecar.limits", old.limits != new.limits);
            restart("sidecar.timeouts", old.timeouts != new.timeouts);
        }
        (old, new) => restart("sidecar", old.is_some() != new.is_some()),
    }
    restart("health", old.health != new.health);
    restart("admin", old.admin != new.admin);
    let base_domains =
        |config: &Config| config.relay.as_ref().map(|relay| relay.base_domains.clone());
    Changes {
        routes: delta(&old.routes, &new.routes, |route| &route.name),
        tunnels: delta(&old.tunnels, &new.tunnels, |tunnel| &tunnel.name),
        base_domains: base_domains(old) != base_domains(new),
        plugins: old.plugins != new.plugins,
        log: old.log != new.log,
        drain_timeout: old.drain_timeout != new.drain_timeout,
        needs_restart,
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
