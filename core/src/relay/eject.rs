//! Sidecars that fail are left aside for a while: by what becomes of their exchanges, at this relay and on
//! one tunnel.

use std::sync::Arc;
use std::sync::PoisonError;

use sidelane_abi::failure;

use super::{Relay, policy};
use crate::choice::{Standing, may_eject};
use crate::tunnel::session::Session;

impl Relay {
    /// An exchange has failed at a sidecar's end, or at its service's. As many in a row leave it aside, but
    /// never more than half of those that serve the tunnel.
    pub(super) fn sidecar_failed(
        &self,
        tunnel: &Arc<str>,
        session: &Session,
        standing: &Arc<Standing>,
        code: u32,
    ) {
        if !standing.failed() {
            return;
        }
        // Seldom, and one at a time, so that two do not count each other as the half that stays.
        let _one = self.ejecting.lock().unwrap_or_else(PoisonError::into_inner);
        let now = policy::now();
        let routing = self.routing.load();
        let Some(serving) = routing.tunnel(tunnel).map(|tunnel| tunnel.all()) else { return };
        let open = || serving.iter().filter(|one| one.is_open());
        let is_open = open().any(|one| Arc::ptr_eq(&one.standing, standing));
        if !is_open || standing.is_ejected(now) {
            return;
        }
        let ejected = open().filter(|one| one.standing.is_ejected(now)).count();
        let sidecar = &*session.name;
        let (tunnel_name, code) = (&**tunnel, failure::name(code));
        if !may_eject(ejected, open().count()) {
            tracing::debug!(
                sidecar,
                tunnel = tunnel_name,
                code,
                "a sidecar fails, and too few others serve the tunnel to leave it aside"
            );
            return;
        }
        let time = standing.eject(now);
        self.metrics.balance.ejected(tunnel);
        tracing::warn!(
            sidecar,
            epoch = session.epoch,
            tunnel = tunnel_name,
            code,
            seconds = time.as_secs(),
            "a sidecar fails again and again: it is left aside for a while"
        );
        self.metrics.balance.set_ejected(self.count_ejected());
    }

    fn count_ejected(&self) -> usize {
        let now = policy::now();
        let routing = self.routing.load();
        let all = routing.tunnels().flat_map(|(_, tunnel)| tunnel.all());
        all.filter(|one| one.standing.is_ejected(now)).count()
    }

    /// Tells of those that take exchanges again; called every second.
    pub(super) fn look_at_ejected(&self) {
        if !self.metrics.balance.is_any_ejected() {
            return;
        }
        let now = policy::now();
        for (tunnel, all) in self.routing.load().tunnels() {
            for one in all.all().iter().filter(|one| one.standing.is_back(now)) {
                tracing::info!(
                    sidecar = &*one.session.name,
                    epoch = one.session.epoch,
                    tunnel = &**tunnel,
                    "a sidecar that was left aside takes exchanges again"
                );
            }
        }
        self.metrics.balance.set_ejected(self.count_ejected());
    }
}
