//! The `sidecar` section.

use std::sync::Arc;
use std::time::Duration;

use super::tls::RELAY_TLS_KEYS;
use super::{
    DEDICATED_MAX, LANES, LANES_MAX, RELAY_ADDRESS_KEYS, REPLAY_BYTES_MAX, REPLAY_BYTES_MIN,
    RESOLVE_INTERVAL, Reader, SIDECAR_KEYS, SIDECAR_LIMITS_KEYS, SIDECAR_TIMEOUTS_KEYS,
    THREADS_MAX, host_name, size, timeout,
};
use crate::config::raw::{Field, Section, Value};
use crate::config::way::{self, Says};
use crate::config::{
    HostPort, Over, Proxy, RelayAddress, Relays, Sidecar, SidecarLimits, SidecarTimeouts, value,
};

/// Shortest time between two look-ups: a name service is asked by all sidecars.
const RESOLVE_INTERVAL_MIN: Duration = Duration::from_secs(1);

impl Reader<'_> {
    pub(super) fn sidecar(&mut self, field: &Field<'_>, has_relay: bool) -> Option<Sidecar> {
        let section = field.section(SIDECAR_KEYS)?;
        let mut sidecar = Sidecar {
            name: host_name(),
            relays: Relays::Embedded,
            proxy: None,
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
                let proxy = self.proxy(&section, &mut sidecar.proxy);
                let listed =
                    relays.list_of(|item| self.relay_address(item, is_anonymous, &proxy));
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
                "`relays` is missing (accepted: a list of host:port or URLs; only beside a `relay` section \
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

    /// Reads the proxy for all relays, from the file or the environment. Returns whom it is for.
    fn proxy(&mut self, section: &Section<'_>, proxy: &mut Option<Arc<Proxy>>) -> ProxyFor {
        if let Some(field) = section.field("proxy") {
            *proxy = read_proxy(&field).flatten();
            return ProxyFor { proxy: proxy.clone(), no_proxy: None };
        }
        let variable = |names: [&'static str; 2]| {
            let given = names.into_iter().find_map(|name| Some((name, (self.env)(name)?)));
            given.filter(|(_, value)| !value.is_empty())
        };
        let no_proxy = variable(["NO_PROXY", "no_proxy"]).map(|(_, value)| value);
        if let Some((name, value)) = variable(["HTTPS_PROXY", "https_proxy"]) {
            match Proxy::parse(&value) {
                Ok(parsed) => *proxy = Some(Arc::new(parsed)),
                Err(error) => section.fail(&format!(
                    "environment variable {name} {error}; `proxy: none` dials directly"
                )),
            }
        }
        ProxyFor { proxy: proxy.clone(), no_proxy: Some(no_proxy.unwrap_or_default()) }
    }

    /// Reads an address, or a mapping with it. `is_anonymous`: no token is presented.
    fn relay_address(
        &mut self,
        item: &Field<'_>,
        is_anonymous: bool,
        proxy: &ProxyFor,
    ) -> Option<RelayAddress> {
        let open = |field: &Field<'_>, address: &HostPort| {
            field.fail(format!(
                "{address} is another machine and gets neither token nor certificate (accepted: a loopback \
                 address, tls.certificate, or one of token, token_file, token_env)"
            ));
        };
        if !matches!(item.node().value, Value::Map(_)) {
            let (address, over, says) = item.parse(way::relay)?;
            let mut relay = RelayAddress::by(address, over, says, None);
            check_plain(item, &relay);
            if is_anonymous && !relay.address.is_loopback() {
                open(item, &relay.address);
            }
            relay.proxy = proxy.of(&relay);
            return Some(relay);
        }
        let section = item.section(RELAY_ADDRESS_KEYS)?;
        let field = section.require("address", way::RELAY_ACCEPTED);
        let parsed = field.as_ref().and_then(|field| field.parse(way::relay));
        let tls = section.field("tls").map(|field| self.client_tls(&field, RELAY_TLS_KEYS));
        let mut insecure = false;
        section.set("insecure", &mut insecure, Field::boolean);
        let own_proxy = section.field("proxy").map(|field| read_proxy(&field).flatten());
        let fallback = section.field("fallback").map(|field| read_fallback(&field));
        let (address, over, says) = parsed?;
        let is_loopback = address.is_loopback();
        let is_by_tcp = over == Over::Tcp && says == Says::Nothing;
        if let Some(field) = section.field("insecure").filter(|_| insecure) {
            if tls.is_some() && is_by_tcp {
                field.fail(
                    "stands beside tls (accepted: one of the two; with tls nobody on the way reads along)",
                );
            } else if says == Says::Tls && fallback.is_none() {
                field.fail(
                    "stands beside an address that is dialled by TLS (accepted: one of the two)",
                );
            } else if is_loopback && fallback.is_none() {
                field.warn("has no effect: loopback is plain where no tls is given");
            } else if says != Says::Tls && !is_loopback {
                field.warn(format!(
                    "{address} is dialled without TLS: anybody on the way reads and changes everything, \
                     credentials too"
                ));
            }
        }
        if says == Says::Plain
            && fallback.is_none()
            && let Some(field) = section.field("tls")
        {
            field.fail("stands beside an address that is dialled without TLS (accepted: wss:// or grpcs://)");
        }
        // A fault in it leaves the default; the configuration is not taken then.
        let as_written = tls.as_ref().is_none_or(Option::is_some);
        let tls = tls.map(|tls| Arc::new(tls.unwrap_or_default()));
        let made = |(address, over, says): (HostPort, Over, Says)| {
            let says = if insecure && says == Says::Nothing { Says::Plain } else { says };
            let mut relay = RelayAddress::by(address, over, says, tls.clone());
            relay.insecure = insecure;
            relay.proxy = own_proxy.clone().unwrap_or_else(|| proxy.of(&relay));
            relay
        };
        let mut relay = made((address, over, says));
        if let Some(field) = &field {
            check_plain(field, &relay);
        }
        for (place, way) in fallback.into_iter().flatten() {
            let other = made(way);
            check_plain(&place, &other);
            if other.to_string() == relay.to_string()
                || relay.fallback.iter().any(|before| before.to_string() == other.to_string())
            {
                place.fail(format!("\"{other}\" stands here twice"));
            }
            relay.fallback.push(other);
        }
        let certificate = tls.as_ref().and_then(|tls| tls.certificate.as_ref());
        let is_away = |relay: &RelayAddress| !relay.address.is_loopback();
        if is_anonymous
            && (is_away(&relay) || relay.fallback.iter().any(is_away))
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

/// Most further ways to a relay: each may take the time of a dial before the next is tried.
const FALLBACK_MAX: usize = 8;

/// Reads the other ways to a relay, with their places.
fn read_fallback<'a>(field: &Field<'a>) -> Vec<(Field<'a>, (HostPort, Over, Says))> {
    let items = field.items().unwrap_or_default();
    if items.len() > FALLBACK_MAX {
        field.fail(format!("has {} addresses (accepted: {FALLBACK_MAX} at most)", items.len()));
    }
    let way = |item: Field<'a>| item.parse(way::relay).map(|way| (item, way));
    items.into_iter().filter_map(way).collect()
}

/// Reads a proxy, or `none`.
fn read_proxy(field: &Field<'_>) -> Option<Option<Arc<Proxy>>> {
    match field.secret()? {
        "none" => Some(None),
        // What is told of it is without it.
        text => {
            Proxy::parse(text).map_err(|error| field.fail(error)).ok().map(|p| Some(Arc::new(p)))
        }
    }
}

/// A scheme that says plain is held to what addresses without one are: TLS beyond loopback.
fn check_plain(field: &Field<'_>, relay: &RelayAddress) {
    if relay.tls.is_none() && !relay.insecure && !relay.address.is_loopback() {
        let (ws, grpc) = ("wss://", "grpcs://");
        let better = if relay.over == Over::Grpc { grpc } else { ws };
        field.fail(format!(
            "{relay} is another machine and dialled without TLS (accepted: {better}, or insecure: true \
             where nobody on the way can do harm)"
        ));
    }
}

/// The proxy of relays that name none of their own.
struct ProxyFor {
    proxy: Option<Arc<Proxy>>,
    /// It is the environment's, which names what is dialled directly; loopback is in any case.
    no_proxy: Option<String>,
}

impl ProxyFor {
    fn of(&self, relay: &RelayAddress) -> Option<Arc<Proxy>> {
        let proxy = self.proxy.as_ref()?;
        let is_direct = self.no_proxy.as_ref().is_some_and(|no_proxy| {
            relay.address.is_loopback() || way::bypasses(no_proxy, &relay.address)
        });
        (!is_direct).then(|| Arc::clone(proxy))
    }
}

/// Tells addresses that stand in the list again.
fn unique_relays(field: &Field<'_>, relays: &[RelayAddress]) {
    for (index, relay) in relays.iter().enumerate() {
        let is_again = relays[..index].iter().any(|other| other.to_string() == relay.to_string());
        if is_again {
            // Faulty items are left out of `relays`, so an index is a place only where there are none.
            let place = field.item(index).filter(|_| field.item(relays.len()).is_none());
            place.as_ref().unwrap_or(field).fail(format!("\"{relay}\" stands here twice"));
        }
    }
}
