//! The services behind this sidecar's tunnels, as plugins get them.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use sidelane_abi::failure;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::config;
use crate::plugin::lend::{Service, Stream, StreamFuture};

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
                Some(entry) => Arc::new(Entry {
                    id: entry.id,
                    version: entry.version + 1,
                    tunnel: Arc::clone(tunnel),
                    address: tunnel.service.to_string(),
                }),
                None => {
                    next.last_id += 1;
                    Arc::new(Entry {
                        id: next.last_id,
                        version: 1,
                        tunnel: Arc::clone(tunnel),
                        address: tunnel.service.to_string(),
                    })
                }
            };
            next.by_tunnel.insert(Arc::clone(&tunnel.name), entry);
        }
        next
    }

    /// Returns the service of a tunnel.
    #[must_use]
    pub fn find(&self, tunnel: &str) -> Option<ServiceHandle> {
        let entry = self.by_tunnel.get(tunnel)?;
        Some(ServiceHandle { tunnel: Arc::clone(&entry.tunnel.name), entry: Arc::clone(entry) })
    }
}

/// One exchange's view of a service; keeps the settings that the exchange began with.
pub struct ServiceHandle {
    /// The tunnel's name.
    pub tunnel: Arc<str>,
    entry: Arc<Entry>,
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

    fn connect(&self) -> StreamFuture {
        let entry = Arc::clone(&self.entry);
        Box::pin(async move {
            let limit = entry.tunnel.connect_timeout;
            let result = connect(&entry.address, limit).await;
            if let Err((_, error)) = &result {
                tracing::warn!(tunnel = &*entry.tunnel.name, service = entry.address,
                    %error, "cannot connect to the service");
            }
            result
        })
    }
}

async fn connect(address: &str, limit: Duration) -> Result<Box<dyn Stream>, (u32, io::Error)> {
    let stream = match timeout(limit, TcpStream::connect(address)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err((failure::SERVICE_UNREACHABLE, error)),
        Err(_) => return Err((failure::SERVICE_TIMEOUT, io::ErrorKind::TimedOut.into())),
    };
    stream.set_nodelay(true).map_err(|error| (failure::SERVICE_UNREACHABLE, error))?;
    Ok(Box::new(stream))
}
