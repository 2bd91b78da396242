//! Opens the exchange of one client request or connection: route, session, lane.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use sidelane_abi::failure;
use sidelane_tunnel::{OpenError, proto};
use tokio::sync::watch;
use tokio::time::Sleep;

use super::Relay;
use crate::metrics::Record;
use crate::plugin;
use crate::plugin::lend::{Failure, Meta, Opened, Opener, RouteKey};
use crate::router::{self, Query};
use crate::tunnel::{RecvHalf, SendHalf};

/// `Retry-After` where no sidecar serves the route: about a reconnection's first delays.
const RETRY_AFTER_S: u32 = 1;

/// The host's side of one `open`.
pub(super) struct RelayOpener {
    relay: Arc<Relay>,
    /// None once it has gone with the exchange.
    meta: Option<Meta>,
    record: Arc<Record>,
    /// Waits for a session that is on its way.
    wait: Option<Wait>,
}

/// The time that an exchange may wait for a session, and what to look at meanwhile.
struct Wait {
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
    fn new(relay: &Relay, limit: Duration) -> Self {
        let deadline = Box::pin(tokio::time::sleep(limit));
        Self { deadline, change: next(relay.changes.subscribe()) }
    }

    /// True: look again. False: the time is up.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        if let Poll::Ready(changes) = self.change.as_mut().poll(cx) {
            self.change = next(changes);
            return Poll::Ready(true);
        }
        self.deadline.as_mut().poll(cx).map(|()| false)
    }
}

impl RelayOpener {
    pub(super) fn new(relay: Arc<Relay>, meta: Meta, record: Arc<Record>) -> Self {
        Self { relay, meta: Some(meta), record, wait: None }
    }

    fn open(&mut self, key: RouteKey<'_>) -> Result<Opened<SendHalf, RecvHalf>, Failure> {
        let Some(known) = &self.meta else {
            return Err(failed(failure::INTERNAL, "the exchange was opened before".into()));
        };
        let protocol_type = &*known.protocol_type;
        let routing = self.relay.routing.load();
        let query = match key {
            RouteKey::Listener => {
                Query { host: None, path: "/", listener: &known.listener, protocol_type }
            }
            RouteKey::Host { host, path } => {
                Query { host: Some(host), path, listener: &known.listener, protocol_type }
            }
        };
        let route = router::find(&routing.table, &query)
            .ok_or_else(|| failed(failure::NO_ROUTE, "no route takes this host and path".into()))?;
        let wanted = &route.tunnels.first().expect("a route has a tunnel").tunnel;
        self.record.routed(&route.name, wanted);
        let unserved = |code, what: &str| failed(code, format!("tunnel {wanted}: {what}"));
        let tunnel = routing
            .tunnel(wanted)
            .ok_or_else(|| unserved(failure::NO_SIDECAR, "no sidecar is connected"))?;
        let mut worst = (failure::NO_PROTOCOL, "no connected sidecar carries the protocol");
        for serving in tunnel.in_turn() {
            let Some(number) = serving.carries(protocol_type) else { continue };
            let options = route.options_for(protocol_type);
            let open = proto::Open {
                tunnel: String::from(&**wanted),
                route: String::from(&*route.name),
                client_address: String::from(&*known.client_address),
                scheme: String::from(&*known.scheme),
                tls: None,
                trace_parent: String::from(&*known.trace_parent),
                trusted_proxy: known.trusted_proxy,
                options: String::from(&*options),
                listener: String::from(&*known.listener),
                ..proto::Open::default()
            };
            let shard = plugin::current_shard().map(|shard| shard as usize);
            let flow = self.relay.flows.of(&self.relay.metrics, &known.protocol_type);
            let flow = self.record.tallied(flow);
            match serving.session.open(shard, number, open, flow) {
                Ok((id, send, recv, is_crossing)) => {
                    if is_crossing {
                        self.relay.metrics.exchange_crosses_threads();
                    }
                    let mut meta = self.meta.take().expect("looked at above");
                    meta.request_id = Arc::<str>::from(id).into();
                    meta.route = Arc::clone(&route.name).into();
                    meta.tunnel = Arc::clone(wanted).into();
                    meta.options = options.into();
                    return Ok(Opened { send, recv, meta });
                }
                Err(error) => worst = worst_of(&error),
            }
        }
        Err(unserved(worst.0, worst.1))
    }
}

/// What a client is told where no lane took the exchange.
fn worst_of(error: &OpenError) -> (u32, &'static str) {
    match error {
        OpenError::Closed | OpenError::GoingAway => {
            (failure::NO_SIDECAR, "its sidecar is going away")
        }
        _ => (failure::OVERLOADED, "its sidecars have as many exchanges as they may"),
    }
}

fn failed(code: u32, detail: String) -> Failure {
    let waits = matches!(code, failure::NO_SIDECAR | failure::NO_PROTOCOL | failure::OVERLOADED);
    Failure { code, retry_after_s: waits.then_some(RETRY_AFTER_S), detail }
}

impl Opener for RelayOpener {
    type Send = SendHalf;
    type Recv = RecvHalf;

    fn poll_open(
        &mut self,
        cx: &mut Context<'_>,
        key: RouteKey<'_>,
    ) -> Poll<Result<Opened<SendHalf, RecvHalf>, Failure>> {
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
                    self.wait = Some(Wait::new(&self.relay, self.relay.open_wait));
                    true
                }
            };
            if !look_again {
                self.record.unopened(failure.code);
                return Poll::Ready(Err(failure));
            }
        }
    }
}
