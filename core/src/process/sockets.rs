//! The addresses of one process, bound before anything starts: a busy port is an error of the
//! start, not of a thread.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};

use super::{RunError, threads};
use crate::config::Config;
use crate::relay::{Bound, bind};

/// All listening sockets.
pub(super) struct Sockets {
    pub(super) listeners: Vec<Bound>,
    pub(super) tunnel: Option<TcpListener>,
    pub(super) tunnel_address: Option<SocketAddr>,
    pub(super) health: Option<TcpListener>,
    pub(super) admin: Option<TcpListener>,
    addresses: Value,
}

impl Sockets {
    /// Binds what the file asks for.
    pub(super) fn bind(config: &Config) -> Result<Self, RunError> {
        let mut listeners = Vec::new();
        let mut tunnel = None;
        if let Some(relay) = &config.relay {
            for (index, listener) in relay.listeners.iter().enumerate() {
                let what = format!("relay.listeners[{index}]");
                listeners.push(Bound {
                    name: Arc::clone(&listener.name),
                    protocol_type: listener.protocol_type().cloned(),
                    sockets: bind_all(&what, listener.address, threads(relay.threads))?,
                });
            }
            tunnel = Some(bind_one("relay.tunnel", relay.tunnel.address)?);
        }
        let health = config.health.map(|address| bind_one("health", address)).transpose()?;
        let admin = config.admin.map(|address| bind_one("admin", address)).transpose()?;
        let address = |socket: &Option<TcpListener>| socket.as_ref().and_then(local);
        let by_name: serde_json::Map<String, Value> = listeners
            .iter()
            .map(|bound| (bound.name.to_string(), json!(local(&bound.sockets[0]))))
            .collect();
        let addresses = json!({
            "listeners": by_name,
            "tunnel": address(&tunnel),
            "health": address(&health),
            "admin": address(&admin),
        });
        for (what, address) in addresses.as_object().into_iter().flatten() {
            if !address.is_null() {
                tracing::info!(%address, "listening: {what}");
            }
        }
        Ok(Self { listeners, tunnel_address: address(&tunnel), tunnel, health, admin, addresses })
    }

    /// Writes the addresses as JSON, whole or not at all.
    pub(super) fn write(&self, path: &Path) -> Result<(), RunError> {
        let failed = |source| RunError::PortsFile { path: path.to_owned(), source };
        let part = path.with_extension("part");
        std::fs::write(&part, self.addresses.to_string()).map_err(failed)?;
        std::fs::rename(&part, path).map_err(failed)
    }
}

fn local(socket: &TcpListener) -> Option<SocketAddr> {
    socket.local_addr().ok()
}

fn bind_one(what: &str, address: SocketAddr) -> Result<TcpListener, RunError> {
    let mut sockets = bind_all(what, address, 1)?;
    Ok(sockets.remove(0))
}

fn bind_all(what: &str, address: SocketAddr, count: usize) -> Result<Vec<TcpListener>, RunError> {
    bind(address, count).map_err(|source| RunError::Bind { what: what.to_owned(), address, source })
}
