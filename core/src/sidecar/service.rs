//! The services behind this sidecar's tunnels, as plugins get them.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use sidelane_abi::failure;
use tokio::time::timeout;

use self::dial::{DialError, Dialer};
use super::proxy_header::Origin;
use super::retry::Budget;
use crate::config;
use crate::metrics::Metrics;
use crate::plugin::lend::{ConnectFuture, Service, ServiceSettings, Text};

pub(super) mod dial;
#[cfg(test)]
pub(super) mod tests;
mod tls;

/// Services by tunnel.
#[derive(Default)]
pub struct Services {
    by_tunnel: HashMap<Arc<str>, Arc<Entry>>,
    /// Highest id given out. An id is never given to another tunnel's name.
    last_id: u64,
}

struct Entry {
    id: u64,
    version: u64,
    tunnel: Arc<config::Tunnel>,
    address: String,
    dialer: Dialer,
}

impl Entry {
    fn new(id: u64, version: u64, tunnel: &Arc<config::Tunnel>) -> Arc<Self> {
        Arc::new(Self {
            id,
            version,
            tunnel: Arc::clone(tunnel),
            address: tunnel.service.to_string(),
            dialer: Dialer::new(tunnel),
        })
    }
}

impl Services {
    /// Returns the services of `tunnels`: a tunnel that was there keeps its id, and its version
    /// where its settings are the same.
    #[must_use]
    pub fn updated<'a>(&self, tunnels: impl IntoIterator<Item = &'a Arc<config::Tunnel>>) -> Self {
        let mut next = Self { by_tunnel: HashMap::new(), last_id: self.last_id };
        for tunnel in tunnels {
            let entry = match self.by_tunnel.get(&tunnel.name) {
                Some(entry) if entry.tunnel == *tunnel => Arc::clone(entry),
                Some(entry) => Entry::new(entry.id, entry.version + 1, tunnel),
                None => {
                    next.last_id += 1;
                    Entry::new(next.last_id, 1, tunnel)
                }
            };
            next.by_tunnel.insert(Arc::clone(&tunnel.name), entry);
        }
        next
    }

    /// Returns whether the tunnel has a service here.
    #[must_use]
    pub fn has(&self, tunnel: &str) -> bool {
        self.by_tunnel.contains_key(tunnel)
    }

    /// Returns the tunnels, by name.
    pub fn tunnels(&self) -> impl Iterator<Item = &config::Tunnel> {
        let mut tunnels: Vec<_> = self.by_tunnel.values().map(|entry| &*entry.tunnel).collect();
        tunnels.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        tunnels.into_iter()
    }

    /// Returns the service of a tunnel, for one exchange.
    #[must_use]
    pub fn find(&self, tunnel: &str, asked: Asked) -> Option<ServiceHandle> {
        let entry = self.by_tunnel.get(tunnel)?;
        let tunnel = Arc::clone(&entry.tunnel.name);
        Some(ServiceHandle { tunnel, entry: Arc::clone(entry), asked })
    }
}

/// What one exchange asks for beyond its tunnel.
pub struct Asked {
    /// Whose connections are, where the service is told.
    pub client_address: Text,
    /// Instead of the tunnel's.
    pub connect_timeout: Option<Duration>,
    /// Whether it may be sent again; `None`: only what is safe in any case.
    pub retries: Option<Retries>,
}

/// How often one exchange may be sent again.
pub struct Retries {
    /// Most times.
    pub attempts: u32,
    /// Times so far.
    pub used: AtomicU32,
    /// The route's; `None`: too many routes have one.
    pub budget: Option<Arc<Budget>>,
    /// The route's name.
    pub route: Arc<str>,
    /// Where it is counted.
    pub metrics: Arc<Metrics>,
}

impl Retries {
    /// Takes one; false: there is none left, of the exchange's or of the route's.
    fn take(&self, tunnel: &str) -> bool {
        // One plugin's call at a time asks.
        let used = self.used.load(Ordering::Relaxed);
        let attempts = used < self.attempts;
        let budget = self.budget.as_ref();
        let granted = attempts && budget.is_some_and(|budget| budget.take(Instant::now()));
        let route = &*self.route;
        if granted {
            self.used.store(used + 1, Ordering::Relaxed);
            self.metrics.sidecar.retried(&self.route);
            tracing::debug!(route, tunnel, attempt = used + 1, "sent to the service again");
        } else {
            self.metrics.sidecar.retry_refused(&self.route);
            let ended = if attempts { "budget" } else { "attempts" };
            tracing::debug!(route, tunnel, ended, "not sent to the service again");
        }
        granted
    }
}

/// One exchange's view of a service; keeps the settings that the exchange began with.
pub struct ServiceHandle {
    /// The tunnel's name.
    pub tunnel: Arc<str>,
    entry: Arc<Entry>,
    asked: Asked,
}

impl Service for ServiceHandle {
    fn id(&self) -> u64 {
        self.entry.id
    }

    fn version(&self) -> u64 {
        self.entry.version
    }

    fn address(&self) -> &str {
        &self.entry.address
    }

    fn connect(&self, offered: Vec<Vec<u8>>) -> ConnectFuture {
        let entry = Arc::clone(&self.entry);
        let limit = self.asked.connect_timeout.unwrap_or(entry.tunnel.connect_timeout);
        let client = self.asked.client_address.clone();
        Box::pin(async move {
            let dial = entry.dialer.dial(Origin::of(&client), offered);
            let error = match timeout(limit, dial).await {
                Ok(Ok(connected)) => return Ok(connected),
                Ok(Err(error)) => error,
                Err(_) => DialError::late(),
            };
            tracing::warn!(tunnel = &*entry.tunnel.name, service = entry.address,
                error = %error.reason(), "cannot connect to the service");
            let is_late = error.is_late();
            let code =
                if is_late { failure::SERVICE_TIMEOUT } else { failure::SERVICE_UNREACHABLE };
            Err((code, error.into()))
        })
    }

    fn settings(&self) -> ServiceSettings {
        let tunnel = &self.entry.tunnel;
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX - 1);
        ServiceSettings {
            shared: tunnel.proxy_protocol.is_none(),
            http_version: tunnel.http_version,
            tls: tunnel.tls.is_some(),
            retries: self.asked.retries.as_ref().map_or(0, |retries| retries.attempts),
            pool_idle: tunnel.pool.idle.map(count),
            pool_connections: tunnel.pool.connections.map(count),
            pool_idle_timeout: tunnel.pool.idle_timeout,
        }
    }

    fn retry(&self) -> bool {
        self.asked.retries.as_ref().is_some_and(|retries| retries.take(&self.tunnel))
    }
}
