//! The addresses of one process, bound before anything starts: a busy port is an error of the
//! start, not of a thread. A reload binds what is new in the same way, before anything of it counts.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::RunError;
use crate::config::{Changes, Config, ConfigErrors};
use crate::relay::{Prepared, Relay, bind};

/// All listening sockets.
pub(super) struct Sockets {
    pub(super) listeners: Option<Prepared>,
    pub(super) tunnel: Option<TcpListener>,
    pub(super) health: Option<TcpListener>,
    pub(super) admin: Option<TcpListener>,
    pub(super) addresses: Addresses,
}

impl Sockets {
    /// Binds what the file asks for.
    pub(super) fn bind(
        config: &Config,
        relay: Option<&Relay>,
        threads: usize,
    ) -> Result<Self, RunError> {
        let mut listeners = None;
        let mut tunnel = None;
        if let (Some(section), Some(relay)) = (&config.relay, relay) {
            listeners = Some(bind_listeners(config, relay, threads)?);
            tunnel = bind_some(config, "relay.tunnel", section.tunnel.address)?;
        }
        let health = bind_some(config, "health", config.health)?;
        let admin = bind_some(config, "admin", config.admin)?;
        let addresses = Addresses {
            listeners: listeners.iter().flat_map(of_listeners).collect(),
            tunnel: local(tunnel.as_ref()),
            health: local(health.as_ref()),
            admin: local(admin.as_ref()),
        };
        addresses.log(&Addresses::default());
        Ok(Self { listeners, tunnel, health, admin, addresses })
    }
}

/// What a reload opens: beside what is open, which closes once these are served.
#[derive(Default)]
pub(super) struct Opened {
    pub(super) listeners: Option<Prepared>,
    /// The outer is `Some` where the address changes.
    pub(super) health: Option<Option<TcpListener>>,
    pub(super) admin: Option<Option<TcpListener>>,
}

impl Opened {
    /// Binds what is new in `config`.
    pub(super) fn bind(
        config: &Config,
        changes: &Changes,
        relay: Option<&Relay>,
        threads: usize,
    ) -> Result<Self, RunError> {
        let listeners = match relay {
            Some(relay) if !changes.listeners.is_empty() => {
                Some(bind_listeners(config, relay, threads)?)
            }
            _ => None,
        };
        let changed = |differs: bool, what, address| {
            differs.then(|| bind_some(config, what, address)).transpose()
        };
        Ok(Self {
            listeners,
            health: changed(changes.health, "health", config.health)?,
            admin: changed(changes.admin, "admin", config.admin)?,
        })
    }

    /// Returns where the process listens once these are in force.
    pub(super) fn addresses(&self, before: &Addresses) -> Addresses {
        let mut addresses = before.clone();
        if let Some(prepared) = &self.listeners {
            addresses.listeners = of_listeners(prepared).collect();
        }
        if let Some(health) = &self.health {
            addresses.health = local(health.as_ref());
        }
        if let Some(admin) = &self.admin {
            addresses.admin = local(admin.as_ref());
        }
        addresses
    }
}

/// Where a process listens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Addresses {
    pub(super) listeners: Vec<(Arc<str>, SocketAddr)>,
    pub(super) tunnel: Option<SocketAddr>,
    pub(super) health: Option<SocketAddr>,
    pub(super) admin: Option<SocketAddr>,
}

impl Addresses {
    /// Tells what is there and was not `before`.
    pub(super) fn log(&self, before: &Self) {
        for (name, address) in &self.listeners {
            if !before.listeners.iter().any(|other| *other == (Arc::clone(name), *address)) {
                tracing::info!(%address, listener = &**name, "listening: clients");
            }
        }
        let others = [
            ("tunnel", self.tunnel, before.tunnel),
            ("health", self.health, before.health),
            ("admin", self.admin, before.admin),
        ];
        for (what, address, before) in others {
            if let Some(address) = address.filter(|_| address != before) {
                tracing::info!(%address, "listening: {what}");
            }
        }
    }

    /// Writes them as JSON, whole or not at all.
    pub(super) fn write(&self, path: &Path) -> Result<(), RunError> {
        let failed = |source| RunError::PortsFile { path: path.to_owned(), source };
        let part = path.with_extension("part");
        let by_name: Map<String, Value> = self
            .listeners
            .iter()
            .map(|(name, address)| (name.to_string(), json!(address)))
            .collect();
        let addresses = json!({
            "listeners": by_name,
            "tunnel": self.tunnel,
            "health": self.health,
            "admin": self.admin,
        });
        std::fs::write(&part, addresses.to_string()).map_err(failed)?;
        std::fs::rename(&part, path).map_err(failed)
    }
}

fn of_listeners(prepared: &Prepared) -> impl Iterator<Item = (Arc<str>, SocketAddr)> {
    prepared.addresses().map(|(name, address)| (Arc::clone(name), address))
}

fn local(socket: Option<&TcpListener>) -> Option<SocketAddr> {
    socket.and_then(|socket| socket.local_addr().ok())
}

fn bind_listeners(config: &Config, relay: &Relay, threads: usize) -> Result<Prepared, RunError> {
    let Some(section) = &config.relay else { return Ok(Prepared::default()) };
    relay.prepare(section, threads).map_err(|error| {
        let what = format!("relay.listeners[{}]", error.index);
        let address = section.listeners[error.index].address;
        cannot_listen(config, &what, address, &error.source).into()
    })
}

fn bind_some(
    config: &Config,
    what: &str,
    address: Option<SocketAddr>,
) -> Result<Option<TcpListener>, RunError> {
    address.map(|address| bind_one(config, what, address)).transpose()
}

fn bind_one(config: &Config, what: &str, address: SocketAddr) -> Result<TcpListener, RunError> {
    let bound = bind(address, 1).map(|mut sockets| sockets.remove(0));
    bound.map_err(|error| cannot_listen(config, what, address, &error).into())
}

fn cannot_listen(
    config: &Config,
    what: &str,
    address: SocketAddr,
    error: &std::io::Error,
) -> ConfigErrors {
    let message = format!("cannot listen on {address}: {error}");
    config.origin.error(&format!("{what}.address"), message).into()
}
