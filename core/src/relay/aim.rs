//! What one exchange is opened for, once its route is known: which sidecar of which tunnel takes it, now
//! and, where it moves, again.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Instant;

use sidelane_abi::failure;
use sidelane_tunnel::{OpenError, RequestId, proto};

use super::Relay;
use super::affinity::Sticky;
use super::moving::Budget;
use super::open::failed;
use super::policy::RouteState;
use super::routing::{Routing, Serving, Tunnel};
use crate::choice::Standing;
use crate::config::Route;
use crate::front::TlsFacts;
use crate::metrics::Record;
use crate::plugin;
use crate::plugin::lend::{Failure, Meta};
use crate::tunnel::session::Session;
use crate::tunnel::{RecvHalf, SendHalf};

/// An exchange and its route.
pub(super) struct Aim {
    pub(super) relay: Arc<Relay>,
    /// As it is before it is opened.
    pub(super) meta: Meta,
    pub(super) record: Arc<Record>,
    pub(super) route: Arc<Route>,
    pub(super) state: Option<Arc<RouteState>>,
    pub(super) tls: Option<Arc<TlsFacts>>,
    pub(super) sticky: Option<Arc<Sticky>>,
    /// Epochs of sessions that it is not given to again.
    pub(super) tried: Vec<u64>,
}

/// A sidecar has it.
pub(super) struct Taken {
    pub(super) id: RequestId,
    pub(super) send: SendHalf,
    pub(super) recv: RecvHalf,
    pub(super) tunnel: Arc<str>,
    pub(super) options: Arc<str>,
    pub(super) session: Arc<Session>,
    pub(super) standing: Arc<Standing>,
    pub(super) budget: Arc<Budget>,
}

impl Aim {
    /// Gives the exchange to a sidecar.
    ///
    /// # Errors
    /// Why nobody takes it.
    pub(super) fn open(&self, routing: &Routing) -> Result<Taken, Failure> {
        let protocol_type = &*self.meta.protocol_type;
        let asked = self.sticky.as_ref().and_then(|sticky| sticky.asked);
        // The tunnels that were tried and have nobody; a bit each.
        let mut tried = 0;
        let mut worst: Option<(Failure, &Arc<str>)> = None;
        while let Some((place, wanted)) = routing.choose(&self.route, protocol_type, tried, asked) {
            tried |= 1 << place;
            let unserved = |code, what: &str| failed(code, format!("tunnel {wanted}: {what}"));
            let Some(tunnel) = routing.tunnel(wanted) else {
                let failure = unserved(failure::NO_SIDECAR, "no sidecar is connected");
                worst.get_or_insert((failure, wanted));
                continue;
            };
            let (code, detail) = match self.open_on(tunnel, wanted, asked) {
                Ok(taken) => return Ok(taken),
                Err(why) => why,
            };
            let failure = unserved(code, &detail);
            // A tunnel that is full gives nothing to the others: it would change what they were
            // given by weight.
            if failure.code == failure::OVERLOADED {
                worst = Some((failure, wanted));
                break;
            }
            worst.get_or_insert((failure, wanted));
        }
        let Some((failure, wanted)) = worst else {
            let detail = format!("route {}: it has no tunnel", self.route.name);
            return Err(failed(failure::NO_SIDECAR, detail));
        };
        self.record.routed(&self.route.name, wanted);
        Err(failure)
    }

    /// Gives it to the sidecar that is chosen, or else to any other that takes it.
    fn open_on(
        &self,
        tunnel: &Tunnel,
        wanted: &Arc<str>,
        asked: Option<u128>,
    ) -> Result<Taken, (u32, Cow<'static, str>)> {
        let protocol_type = &*self.meta.protocol_type;
        let is_untried = |serving: &Serving| !self.tried.contains(&serving.session.epoch);
        let chosen = tunnel.choose(asked, |serving| {
            is_untried(serving) && serving.is_open() && serving.carries(protocol_type).is_some()
        });
        let mut reason = tunnel.why_not();
        let is_chosen = |one: &Serving| chosen.is_some_and(|chosen| std::ptr::eq(chosen, one));
        // Who was chosen is asked first; what the others would say is worth knowing where it fails.
        let others = tunnel.all().iter().filter(|one| !is_chosen(one));
        for serving in chosen.into_iter().chain(others) {
            let Some(number) = serving.carries(protocol_type) else { continue };
            if !is_untried(serving) {
                reason = (failure::NO_SIDECAR, "its sidecar has failed".into());
                continue;
            }
            if !serving.is_granted() {
                reason = (failure::NO_SIDECAR, "its sidecar may not serve it any more".into());
                continue;
            }
            match self.open_at(serving, number, tunnel, wanted) {
                Ok(taken) => return Ok(taken),
                Err(error) => reason = worst_of(&error),
            }
        }
        Err(reason)
    }

    fn open_at(
        &self,
        serving: &Serving,
        number: u32,
        tunnel: &Tunnel,
        wanted: &Arc<str>,
    ) -> Result<Taken, OpenError> {
        let known = &self.meta;
        let options = self.route.options_for(&known.protocol_type);
        let left = known.deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let state = self.state.as_ref();
        let open = proto::Open {
            tunnel: String::from(&**wanted),
            route: String::from(&*self.route.name),
            client_address: String::from(&*known.client_address),
            scheme: String::from(&*known.scheme),
            tls: self.tls.as_ref().map(|tls| tls.to_proto()),
            trace_parent: String::from(&*known.trace_parent),
            trusted_proxy: known.trusted_proxy,
            peer_address: String::from(&*known.peer_address),
            options: String::from(&*options),
            listener: String::from(&*known.listener),
            // Zero would say that there is no deadline.
            timeout_ns: left
                .map_or(0, |left| u64::try_from(left.as_nanos()).unwrap_or(u64::MAX).max(1)),
            policy: state.and_then(|state| state.delivery()),
            ..proto::Open::default()
        };
        let shard = plugin::current_shard().map(|shard| shard as usize);
        let flow = self.relay.flows.of(&self.relay.metrics, &known.protocol_type);
        let flow = self.record.tallied(flow);
        let (id, send, recv, is_crossing) = serving.session.open(shard, number, open, flow)?;
        self.record.routed(&self.route.name, wanted);
        if is_crossing {
            self.relay.metrics.exchange_crosses_threads();
        }
        if let Some(sticky) = &self.sticky {
            sticky.give(serving.tag);
        }
        let of_route = state.and_then(|state| state.move_budget.as_ref());
        Ok(Taken {
            id,
            send,
            recv,
            tunnel: Arc::clone(wanted),
            options,
            session: Arc::clone(&serving.session),
            standing: Arc::clone(&serving.standing),
            budget: Arc::clone(of_route.unwrap_or(&tunnel.budget)),
        })
    }
}

/// What a client is told where no lane took the exchange.
fn worst_of(error: &OpenError) -> (u32, Cow<'static, str>) {
    match error {
        OpenError::Closed | OpenError::GoingAway => {
            (failure::NO_SIDECAR, "its sidecar is going away, or has lost its connection".into())
        }
        _ => (failure::OVERLOADED, "its sidecars have as many exchanges as they may".into()),
    }
}
