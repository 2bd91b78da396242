//! The `sidecar` section.

use std::sync::Arc;
use std::time::Duration;

use super::tls::RELAY_TLS_KEYS;
use super::{
    DEDICATED_MAX, LANES, LANES_MAX, RELAY_ADDRESS_KEYS, REPLAY_BYTES_MAX, REPLAY_BYTES_MIN,
    RESOLVE_INTERVAL, Reader, SIDECAR_KEYS, SIDECAR_LIMITS_KEYS, SIDECAR_TIMEOUTS_KEYS,
    THREADS_MAX, host_name, size, timeout,
};
use crate::config::raw::{Field, Value};
use crate::config::{
    HostPort, RelayAddress, Relays, Sidecar, SidecarLimits, SidecarTimeouts, value,
};

/// Shortest time between two look-ups: a name service is asked by all sidecars.
const RESOLVE_INTERVAL_MIN: Duration = Duration::from_secs(1);

impl Reader<'_> {
    pub(super) fn sidecar(&mut self, field: &Field<'_>, has_relay: bool) -> Option<Sidecar> {
        let section = field.section(SIDECAR_KEYS)?;
        let mut sidecar = Sidecar {
            name: host_name(),
            relays: Relays::Embedded,
            follow_peers: true,
            resolve_interval: RESOLVE_INTERVAL,
            token: None,
            token_file: None,
            lanes: LANES,
            dedicated: None,
            threads: 1,
            limits: SidecarLimits::default(),
            timeouts: SidecarTimeouts::default(),
        };
        section.set("name", &mut sidecar.name, |f| f.parse(value::name));
        let token_file = self.token(&section, &mut sidecar.token);
        let token_as_written = token_file.is_some();
        sidecar.token_file = token_file.flatten();
        match section.field("relays") {
            Some(relays) => {
                let is_anonymous = token_as_written && sidecar.token.is_none();
                let listed = relays.list_of(|item| self.relay_address(item, is_anonymous));
                if let Some(listed) = listed {
                    if relays.is_empty() {
                        relays.fail("is empty (accepted: at least one relay as host:port)");
                    }
                    unique_relays(&relays, &listed);
                    sidecar.relays = Relays::Listed(listed);
                }
            }
            None if section.is_mistyped("relays") => {}
            None if !has_relay => section.fail(
                "`relays` is missing (accepted: a list of host:port; only beside a `relay` section \
                 it may be left out)",
            ),
            None => {}
        }
        section.set("follow_peers", &mut sidecar.follow_peers, Field::boolean);
        section.set("resolve_interval", &mut sidecar.resolve_interval, |f| {
            timeout(f, RESOLVE_INTERVAL_MIN)
        });
        section.set("lanes", &mut sidecar.lanes, |f| f.integer(1, LANES_MAX));
        section.set("dedicated", &mut sidecar.dedicated, |f| f.integer(0, DEDICATED_MAX).map(Some));
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
            section
                .set("replay", &mut limits.replay, |f| size(f, REPLAY_BYTES_MIN, REPLAY_BYTES_MAX));
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

    /// Reads `host:port`, or a mapping with it. `is_anonymous`: no token is presented.
    fn relay_address(&mut self, item: &Field<'_>, is_anonymous: bool) -> Option<RelayAddress> {
        let open = |field: &Field<'_>, address: &HostPort| {
            field.fail(format!(
                "{address} is another machine and gets neither token nor certificate (accepted: a loopback \
                 address, tls.certificate, or one of token, token_file, token_env)"
            ));
        };
        if !matches!(item.node().value, Value::Map(_)) {
            let address = item.parse(value::host_port)?;
            if is_anonymous && !address.is_loopback() {
                open(item, &address);
            }
            return Some(RelayAddress::new(address));
        }
        let section = item.section(RELAY_ADDRESS_KEYS)?;
        let field = section.require("address", "host:port, as in relay.example.org:9081");
        let address = field.as_ref().and_then(|field| field.parse(value::host_port));
        let tls = section.field("tls").map(|field| self.client_tls(&field, RELAY_TLS_KEYS));
        let mut insecure = false;
        section.set("insecure", &mut insecure, Field::boolean);
        let address = address?;
        let is_loopback = address.is_loopback();
        if let Some(field) = section.field("insecure").filter(|_| insecure) {
            if tls.is_some() {
                field.fail(
                    "stands beside tls (accepted: one of the two; with tls nobody on the way reads along)",
                );
            } else if is_loopback {
                field.warn("has no effect: loopback is plain where no tls is given");
            } else {
                field.warn(format!(
                    "{address} is dialled without TLS: anybody on the way reads and changes everything, \
                     credentials too"
                ));
            }
        }
        let mut relay = RelayAddress::new(address);
        relay.insecure = insecure;
        // A fault in it leaves the default; the configuration is not taken then.
        let as_written = tls.as_ref().is_none_or(Option::is_some);
        match tls {
            Some(tls) => relay.tls = Some(Arc::new(tls.unwrap_or_default())),
            None if insecure => relay.tls = None,
            None => {}
        }
        let certificate = relay.tls.as_ref().and_then(|tls| tls.certificate.as_ref());
        if is_anonymous
            && !is_loopback
            && as_written
            && certificate.is_none()
            && !item.is_told(item.path())
            && let Some(field) = &field
        {
            open(field, &relay.address);
        }
        Some(relay)
    }
}

/// Tells addresses that stand in the list again.
fn unique_relays(field: &Field<'_>, relays: &[RelayAddress]) {
    for (index, relay) in relays.iter().enumerate() {
        let is_again = relays[..index].iter().any(|other| other.address == relay.address);
        if is_again {
            // Faulty items are left out of `relays`, so an index is a place only where there are none.
            let place = field.item(index).filter(|_| field.item(relays.len()).is_none());
            place
                .as_ref()
                .unwrap_or(field)
                .fail(format!("\"{}\" stands here twice", relay.address));
        }
    }
}
