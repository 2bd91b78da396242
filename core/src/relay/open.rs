//! Opens the exchange of one client request or connection: route, session, lane.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use sidelane_abi::failure;
use tokio::sync::watch;
use tokio::time::Sleep;

use super::Relay;
use super::affinity::Sticky;
use super::aim::Aim;
use super::moving::{self, Asks, Receiving, Sending};
use super::policy::{self, Admitted, Held, RouteState};
use crate::config::Route;
use crate::front::TlsFacts;
use crate::metrics::Record;
use crate::plugin::lend::{Failure, Meta, Opened, Opener, RouteKey};
use crate::router::{self, Query};

/// `Retry-After` where no sidecar serves the route: about a reconnection's first delays.
const RETRY_AFTER_S: u32 = 1;

/// The host's side of one `open`.
pub(super) struct RelayOpener {
    relay: Arc<Relay>,
    /// None once it has gone with the exchange.
    meta: Option<Meta>,
    record: Arc<Record>,
    routed: Routed,
    /// Waits for a session that is on its way.
    wait: Option<Wait>,
    /// What a byte-born connection is routed by, where its first bytes named a host; else its TLS may have.
    host: Option<Arc<str>>,
    /// What the client's TLS said.
    tls: Option<Arc<TlsFacts>>,
    /// What is known of the request where it is HTTP-born.
    asks: Asks,
    /// Which sidecar the client asks for.
    sticky: Option<Arc<Sticky>>,
}

/// How the exchange's route is found.
enum Routed {
    /// By the head, before the plugin had it: an exchange keeps the route whose policies it was let in
    /// by. `None`: there is none.
    Before(Option<Arc<Route>>, Option<Arc<RouteState>>),
    /// By the key that the plugin gives. Whoever runs the call gets what the exchange was let in by.
    ByKey(Arc<Held>, Option<Admitted>),
}

/// The time that an exchange may wait for a session, and what to look at meanwhile.
pub(super) struct Wait {
    deadline: Pin<Box<Sleep>>,
    change: Change,
}

/// The next change of what is served. Hands its receiver back, so that no change is missed.
type Change = Pin<Box<dyn Future<Output = watch::Receiver<()>> + Send>>;

fn next(mut changes: watch::Receiver<()>) -> Change {
    Box::pin(async move {
        // An error means that the relay is gone, and with it whoever waits.
        let _ = changes.changed().await;
        changes
    })
}

impl Wait {
    pub(super) fn new(relay: &Relay, limit: Duration) -> Self {
        let deadline = Box::pin(tokio::time::sleep(limit));
        Self { deadline, change: next(relay.changes.subscribe()) }
    }

    /// True: look again. False: the time is up.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        if let Poll::Ready(changes) = self.change.as_mut().poll(cx) {
            self.change = next(changes);
            return Poll::Ready(true);
        }
        self.deadline.as_mut().poll(cx).map(|()| false)
    }
}

impl RelayOpener {
    /// Returns the opener of a byte-born exchange.
    pub(super) fn new(relay: Arc<Relay>, meta: Meta, record: Arc<Record>) -> Self {
        let routed = Routed::ByKey(Arc::default(), None);
        Self {
            relay,
            meta: Some(meta),
            record,
            routed,
            wait: None,
            host: None,
            tls: None,
            asks: Asks::Unknown,
            sticky: None,
        }
    }

    /// Returns the same, which routes what has no host of its own by this one.
    pub(super) fn by_host(self, host: Option<Arc<str>>) -> Self {
        Self { host, ..self }
    }

    /// Returns the same for a client that came by TLS, where it did.
    pub(super) fn over(self, tls: Option<Arc<TlsFacts>>) -> Self {
        Self { tls, ..self }
    }

    /// Returns the same for a request of this kind.
    pub(super) fn asking(self, asks: Asks) -> Self {
        Self { asks, ..self }
    }

    /// Returns the same for a client that asks for a sidecar.
    pub(super) fn sticky(self, sticky: Option<Arc<Sticky>>) -> Self {
        Self { sticky, ..self }
    }

    /// Returns the opener of an HTTP-born exchange for this route, and the route's policies.
    pub(super) fn routed(
        relay: Arc<Relay>,
        meta: Meta,
        record: Arc<Record>,
        route: Option<Arc<Route>>,
        state: Option<Arc<RouteState>>,
    ) -> Self {
        let routed = Routed::Before(route, state);
        Self {
            relay,
            meta: Some(meta),
            record,
            routed,
            wait: None,
            host: None,
            tls: None,
            asks: Asks::Unknown,
            sticky: None,
        }
    }

    /// What the call of a byte-born exchange is watched by.
    pub(super) fn held(&self) -> Arc<Held> {
        match &self.routed {
            Routed::ByKey(held, _) => Arc::clone(held),
            Routed::Before(..) => Arc::default(),
        }
    }

    fn open(&mut self, key: RouteKey<'_>) -> Result<Opened<Sending, Receiving>, Failure> {
        let Some(known) = &self.meta else {
            return Err(failed(failure::INTERNAL, "the exchange was opened before".into()));
        };
        let protocol_type = &*known.protocol_type;
        let routing = self.relay.routing.load();
        let no_route = || failed(failure::NO_ROUTE, "no route takes this host and path".into());
        let (route, state) = match &mut self.routed {
            Routed::Before(route, state) => (route.as_ref().ok_or_else(no_route)?, state.as_ref()),
            Routed::ByKey(_, admitted) => {
                let (named, path) = match key {
                    RouteKey::Listener => (self.host.as_deref(), "/"),
                    RouteKey::Host { host, path } => (Some(host), path),
                };
                let tls = self.tls.as_deref();
                if let (Some(host), Some(tls)) = (named, tls)
                    && !tls.hosts.allow(host.as_bytes())
                {
                    return Err(failed(failure::MISDIRECTED, tls.hosts.why_not().into()));
                }
                let sni = tls.map(|tls| &*tls.sni).filter(|sni| !sni.is_empty());
                let host = named.or(sni);
                let query = Query { host, path, listener: &known.listener, protocol_type };
                let route = router::find(&routing.table, &query).ok_or_else(no_route)?;
                let state = routing.policies.of(route);
                if let (Some(state), None) = (state, &admitted) {
                    *admitted = Some(admit(state, &known.client_address, &self.record)?);
                }
                (route, state)
            }
        };
        let aim = Aim {
            relay: Arc::clone(&self.relay),
            record: Arc::clone(&self.record),
            route: Arc::clone(route),
            state: state.cloned(),
            tls: self.tls.clone(),
            sticky: self.sticky.clone(),
            tried: Vec::new(),
            meta: self.meta.take().expect("looked at above"),
        };
        let taken = match aim.open(&routing) {
            Ok(taken) => taken,
            Err(failure) => {
                self.meta = Some(aim.meta);
                return Err(failure);
            }
        };
        let mut meta = aim.meta.clone();
        meta.request_id = Arc::<str>::from(taken.id).into();
        meta.route = Arc::clone(&aim.route.name).into();
        meta.tunnel = Arc::clone(&taken.tunnel).into();
        meta.options = Arc::clone(&taken.options).into();
        if let Routed::ByKey(held, admitted) = &mut self.routed {
            held.put(admitted.take());
        }
        let (send, recv) = moving::begin(aim, taken, self.asks);
        Ok(Opened { send, recv, meta })
    }
}

impl RelayOpener {
    /// Finds the route anew after what is served has changed; one with policies stays.
    fn look_again(&mut self, key: RouteKey<'_>) {
        let (Some(known), RouteKey::Host { host, path }) = (&self.meta, key) else { return };
        let Routed::Before(Some(route), None) = &mut self.routed else { return };
        let routing = self.relay.routing.load();
        let (listener, protocol_type) = (&*known.listener, &*known.protocol_type);
        let query = Query { host: Some(host), path, listener, protocol_type };
        let found = router::find(&routing.table, &query);
        if let Some(found) = found.filter(|found| found.policies.is_none()) {
            *route = Arc::clone(found);
        }
    }
}

/// Lets a byte-born exchange in.
fn admit(state: &Arc<RouteState>, client: &str, record: &Record) -> Result<Admitted, Failure> {
    let client = client.parse::<SocketAddr>().ok().map(|address| address.ip());
    state.admit(client, policy::now()).map_err(|refusal| {
        record.routed(&state.route.name, &Arc::default());
        state.refused(refusal, client);
        refusal.failure()
    })
}

pub(super) fn failed(code: u32, detail: String) -> Failure {
    let waits = matches!(code, failure::NO_SIDECAR | failure::NO_PROTOCOL | failure::OVERLOADED);
    Failure { code, retry_after_s: waits.then_some(RETRY_AFTER_S), detail }
}

impl Opener for RelayOpener {
    type Send = Sending;
    type Recv = Receiving;

    fn poll_open(
        &mut self,
        cx: &mut Context<'_>,
        key: RouteKey<'_>,
    ) -> Poll<Result<Opened<Sending, Receiving>, Failure>> {
        loop {
            let failure = match self.open(key) {
                Ok(opened) => return Poll::Ready(Ok(opened)),
                Err(failure) => failure,
            };
            let may_wait = failure.code == failure::NO_SIDECAR && self.relay.waits_for_sessions();
            let look_again = match &mut self.wait {
                _ if !may_wait => false,
                Some(wait) => ready!(wait.poll(cx)),
                None => {
                    // Changes are seen from here on; one that came just before is seen by the
                    // second look.
                    self.wait = Some(Wait::new(&self.relay, self.relay.open_wait()));
                    true
                }
            };
            if look_again {
                self.look_again(key);
            } else {
                self.record.unopened(failure.code);
                return Poll::Ready(Err(failure));
            }
        }
    }
}
