//! The `sidecar` section.

use std::time::Duration;

use super::{
    LANES, LANES_MAX, RESOLVE_INTERVAL, Reader, SIDECAR_KEYS, SIDECAR_LIMITS_KEYS,
    SIDECAR_TIMEOUTS_KEYS, THREADS_MAX, host_name, size, timeout,
};
use crate::config::raw::Field;
use crate::config::{RelayAddress, Relays, Sidecar, SidecarLimits, SidecarTimeouts, value};

/// Shortest time between two look-ups: a name service is asked by all sidecars.
const RESOLVE_INTERVAL_MIN: Duration = Duration::from_secs(1);

impl Reader<'_> {
    pub(super) fn sidecar(&mut self, field: &Field<'_>, has_relay: bool) -> Option<Sidecar> {
        let section = field.section(SIDECAR_KEYS)?;
        let mut sidecar = Sidecar {
            name: host_name(),
            relays: Relays::Embedded,
            resolve_interval: RESOLVE_INTERVAL,
            token: None,
            token_file: None,
            lanes: LANES,
            threads: 1,
            limits: SidecarLimits::default(),
            timeouts: SidecarTimeouts::default(),
        };
        section.set("name", &mut sidecar.name, |f| f.parse(value::name));
        let token_as_written = self.token(&section, &mut sidecar.token);
        match section.field("relays") {
            Some(relays) => {
                if let Some(listed) = relays.list_of(|item| item.parse(value::host_port)) {
                    if relays.is_empty() {
                        relays.fail("is empty (accepted: at least one relay as host:port)");
                    }
                    if let Some(open) = listed.iter().find(|relay| !relay.is_loopback())
                        && sidecar.token.is_none()
                        && token_as_written
                    {
                        relays.fail(format!(
                            "{open} is another machine and gets no token (accepted: loopback \
                             addresses, or one of token, token_file, token_env)"
                        ));
                    }
                    let listed = listed.into_iter().map(RelayAddress::new);
                    sidecar.relays = Relays::Listed(listed.collect());
                }
            }
            None if section.is_mistyped("relays") => {}
            None if !has_relay => section.fail(
                "`relays` is missing (accepted: a list of host:port; only beside a `relay` section \
                 it may be left out)",
            ),
            None => {}
        }
        section.set("resolve_interval", &mut sidecar.resolve_interval, |f| {
            timeout(f, RESOLVE_INTERVAL_MIN)
        });
        section.set("lanes", &mut sidecar.lanes, |f| f.integer(1, LANES_MAX));
        section.set("threads", &mut sidecar.threads, |f| f.integer(0, THREADS_MAX));
        if let Some(field) = section.field("limits")
            && let Some(section) = field.section(SIDECAR_LIMITS_KEYS)
        {
            let limits = &mut sidecar.limits;
            section.set("exchanges_per_session", &mut limits.exchanges_per_session, |f| {
                f.integer(1, 1_000_000)
            });
            section.set("queued", &mut limits.queued, |f| size(f, 1 << 20, 1 << 40));
            section.set("window", &mut limits.window, |f| size(f, 64 << 10, 64 << 20));
        }
        if let Some(field) = section.field("timeouts")
            && let Some(section) = field.section(SIDECAR_TIMEOUTS_KEYS)
        {
            let timeouts = &mut sidecar.timeouts;
            let positive = |f: &Field<'_>| timeout(f, Duration::from_millis(1));
            section.set("dial", &mut timeouts.dial, positive);
            section.set("handshake", &mut timeouts.handshake, positive);
        }
        Some(sidecar)
    }
}
