//! Which tunnel takes an exchange, and which sessions serve that tunnel: one immutable picture,
//! replaced whole.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::Sources;
use crate::router::RouteTable;
use crate::tunnel::session::Session;

/// The picture that new exchanges are routed by.
#[derive(Default)]
pub(super) struct Routing {
    pub(super) table: RouteTable,
    tunnels: HashMap<Arc<str>, Tunnel>,
}

/// Who serves a tunnel. Never empty.
#[derive(Default)]
pub(super) struct Tunnel {
    serving: Vec<Serving>,
    turn: AtomicUsize,
}

/// One session's part in a tunnel.
pub(super) struct Serving {
    pub(super) session: Arc<Session>,
    /// Protocol types that the sidecar carries on this tunnel; `None`: all of the session.
    protocols: Option<Arc<[Arc<str>]>>,
}

impl Routing {
    /// Returns the picture of `sources`. Routes of the file win over announced ones, of those the
    /// older session's, and last come those of sidecars that are gone.
    pub(super) fn build(sources: &Sources) -> Self {
        let mut routes = sources.own.clone();
        let mut taken: std::collections::HashSet<_> =
            routes.iter().map(|route| route.matches.clone()).collect();
        let mut tunnels: HashMap<Arc<str>, Tunnel> = HashMap::new();
        for document in sources.documents.values() {
            for route in &document.routes {
                if taken.insert(route.matches.clone()) {
                    routes.push(Arc::clone(route));
                }
            }
            for (name, protocols) in &document.tunnels {
                tunnels.entry(Arc::clone(name)).or_default().serving.push(Serving {
                    session: Arc::clone(&document.session),
                    protocols: protocols.clone(),
                });
            }
        }
        // Nobody serves these; their clients hear 503 and not 404.
        for (_, document) in &sources.lost {
            for route in &document.routes {
                if taken.insert(route.matches.clone()) {
                    routes.push(Arc::clone(route));
                }
            }
        }
        let table = RouteTable::build(&routes, &sources.base_domains).unwrap_or_else(|ambiguity| {
            // The file was checked when it was read, and what is announced is left out above.
            tracing::error!(%ambiguity, "routes contradict each other; only the file's are in force");
            RouteTable::build(&sources.own, &sources.base_domains).unwrap_or_default()
        });
        Self { table, tunnels }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.tunnels.is_empty()
    }

    pub(super) fn tunnel(&self, name: &str) -> Option<&Tunnel> {
        self.tunnels.get(name)
    }
}

impl Tunnel {
    /// Returns those who serve it, beginning with another one each time.
    pub(super) fn in_turn(&self) -> impl Iterator<Item = &Serving> {
        let first = self.turn.fetch_add(1, Ordering::Relaxed) % self.serving.len().max(1);
        self.serving[first..].iter().chain(&self.serving[..first])
    }
}

impl Serving {
    /// Returns the number under which the session carries this protocol on the tunnel.
    pub(super) fn carries(&self, protocol_type: &str) -> Option<u32> {
        let is_carried = self
            .protocols
            .as_ref()
            .is_none_or(|types| types.iter().any(|carried| **carried == *protocol_type));
        is_carried.then(|| self.session.protocols.number(protocol_type)).flatten()
    }
}
