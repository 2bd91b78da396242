//! The `relay` section.

use std::sync::Arc;
use std::time::Duration;

use super::{
    GRACE, GRACE_MAX, LANES_MAX, LISTENER_KEYS, PROXIES_MAX, RELAY_KEYS, RELAY_LIMITS_KEYS,
    RELAY_TIMEOUTS_KEYS, RELAY_TUNNEL_KEYS, REPLAY_BYTES_MAX, REPLAY_BYTES_MIN, Reader,
    THREADS_MAX, TUNNEL_ADDRESS, WARMUP_KEYS, WEB_ADDRESS, arcs, duration_within, items, networks,
    size, timeout, twice, unique,
};
use crate::config::credentials::Credentials;
use crate::config::error::list;
use crate::config::raw::{Field, Section};
use crate::config::{
    Balance, Carries, HostPort, Listener, REPLAY_BYTES, Relay, RelayLimits, RelayTimeouts,
    RelayTunnel, Warmup, value,
};

/// Most relays that a sidecar is told of: more than it dials.
pub(crate) const PEERS_MAX: usize = 256;

/// Most sessions that a relay waits for: as many as it may have.
pub(crate) const WARMUP_SESSIONS_MAX: usize = 1_000_000;

/// Youngest age at which connections are ended: below it clients do little but connect.
const CONNECTION_AGE_MIN: Duration = Duration::from_secs(1);

impl Reader<'_> {
    pub(super) fn relay(&mut self, field: &Field<'_>) -> Option<Relay> {
        let section = field.section(RELAY_KEYS)?;
        let mut relay = Relay {
            listeners: vec![Arc::new(Listener {
                name: "web".into(),
                address: WEB_ADDRESS,
                carries: Carries::Http,
                proxy_protocol: false,
                balance: Balance::Kernel,
                tls: None,
                https_redirect: None,
            })],
            base_domains: vec!["localhost".into()],
            trusted_proxies: Vec::new(),
            max_connection_age: None,
            tunnel: RelayTunnel {
                address: Some(TUNNEL_ADDRESS),
                listener: None,
                tls: None,
                insecure: false,
                token: None,
                peers: Vec::new(),
                advertise: None,
                grace: GRACE,
                replay: REPLAY_BYTES,
            },
            credentials: Credentials::default(),
            acme: None,
            warmup: Warmup::default(),
            threads: 0,
            limits: RelayLimits::default(),
            timeouts: RelayTimeouts::default(),
        };
        if let Some(field) = section.field("listeners") {
            let listeners = items(&field, |item| self.listener(item));
            unique(&field, "listener", &listeners, |listener| &listener.name);
            relay.listeners = arcs(listeners);
            redirects(&field, &relay.listeners);
            if field.is_empty() {
                field.fail("is empty (accepted: at least one listener; without the key: web on 127.0.0.1:9080)");
            }
        }
        section.set("base_domains", &mut relay.base_domains, |field| {
            let domains = field.list_of(|item| item.parse(value::host))?;
            twice(field, &domains);
            if field.is_empty() {
                field.fail("is empty (accepted: at least one domain, as in localhost)");
            }
            Some(domains)
        });
        section.set("trusted_proxies", &mut relay.trusted_proxies, |f| networks(f, PROXIES_MAX));
        section.set("max_connection_age", &mut relay.max_connection_age, |f| {
            timeout(f, CONNECTION_AGE_MIN).map(Some)
        });
        proxies(&section, &relay);
        // What cannot be read is not as good as nothing: nobody is asked who they are then.
        let mut is_open = section.field("credentials").is_none_or(|field| field.is_empty());
        is_open &= !section.is_mistyped("credentials");
        let tunnel = section.field("tunnel");
        if let Some(field) = &tunnel
            && let Some(section) = field.section(RELAY_TUNNEL_KEYS)
        {
            is_open &= self.relay_tunnel(&section, &mut relay.tunnel);
            tunnel_end(&section, &relay, is_open);
        }
        self.credentials(&section, tunnel.as_ref(), &mut relay);
        if let Some(field) = section.field("acme") {
            relay.acme = self.acme(&field);
        }
        acme_for_names(&section, &relay);
        section.set("warmup", &mut relay.warmup, warmup);
        section.set("threads", &mut relay.threads, |f| f.integer(0, THREADS_MAX));
        if let Some(field) = section.field("limits") {
            relay_limits(&field, &mut relay.limits);
        }
        if let Some(field) = section.field("timeouts")
            && let Some(section) = field.section(RELAY_TIMEOUTS_KEYS)
        {
            let timeouts = &mut relay.timeouts;
            let positive = |f: &Field<'_>| timeout(f, Duration::from_millis(1));
            section.set("request_head", &mut timeouts.request_head, positive);
            section.set("idle", &mut timeouts.idle, positive);
            section.set("open_wait", &mut timeouts.open_wait, |f| timeout(f, Duration::ZERO));
            section.set("handshake", &mut timeouts.handshake, positive);
            section.set("tls_handshake", &mut timeouts.tls_handshake, positive);
        }
        Some(relay)
    }

    /// Reads where sidecars come in. Returns whether they are asked for no token; false after a fault.
    fn relay_tunnel(&mut self, section: &Section<'_>, tunnel: &mut RelayTunnel) -> bool {
        if section.field("listener").is_some() {
            tunnel.address = None;
        }
        section.set("address", &mut tunnel.address, |f| f.parse(value::socket_address).map(Some));
        section.set("listener", &mut tunnel.listener, |f| f.parse(value::name).map(Some));
        let is_shared = section.field("listener").is_some() && section.field("address").is_none();
        if let Some(field) = section.field("tls") {
            tunnel.tls = self.tunnel_tls(&field, is_shared);
        }
        section.set("insecure", &mut tunnel.insecure, Field::boolean);
        section.set("peers", &mut tunnel.peers, peers);
        section.set("advertise", &mut tunnel.advertise, |f| {
            f.parse(value::dialled_by_others).map(Some)
        });
        section.set("grace", &mut tunnel.grace, |f| duration_within(f, Duration::ZERO, GRACE_MAX));
        section.set("replay", &mut tunnel.replay, |f| size(f, REPLAY_BYTES_MIN, REPLAY_BYTES_MAX));
        let as_written = self.token(section, &mut tunnel.token).is_some();
        as_written && tunnel.token.is_none()
    }

    fn listener(&mut self, field: &Field<'_>) -> Option<Listener> {
        let section = field.section(LISTENER_KEYS)?;
        let name = section.require("name", "text").and_then(|f| f.parse(value::name));
        let address = section
            .require("address", "IP:port, as in 127.0.0.1:9080")
            .and_then(|f| f.parse(value::socket_address));
        let mut protocol_type = None;
        section
            .set("protocol_type", &mut protocol_type, |f| f.parse(value::protocol_type).map(Some));
        let mut sniff = false;
        section.set("sniff", &mut sniff, Field::boolean);
        let mut proxy_protocol = false;
        section.set("proxy_protocol", &mut proxy_protocol, Field::boolean);
        let mut balance = Balance::default();
        section.set("balance", &mut balance, |f| {
            f.one_of(&[("kernel", Balance::Kernel), ("exact", Balance::Exact)])
        });
        let tls = section.field("tls").and_then(|field| self.listener_tls(&field));
        let mut https_redirect = None;
        section.set("https_redirect", &mut https_redirect, |f| f.integer(1, u16::MAX).map(Some));
        for key in ["tls", "protocol_type", "sniff"] {
            if let (Some(redirect), Some(other)) =
                (section.field("https_redirect"), section.field(key))
                && (key != "sniff" || other.is_true())
            {
                redirect.fail(format!(
                    "stands beside {key} (accepted: on a listener of plain HTTP, which sends all to the \
                     port of a listener with tls)"
                ));
            }
        }
        let carries = match (protocol_type, sniff) {
            (Some(_), true) => {
                section.fail(
                    "has protocol_type and sniff at once (accepted: one of them; without both: the \
                     HTTP front)",
                );
                return None;
            }
            (Some(protocol_type), false) => Carries::Type(protocol_type),
            (None, true) => Carries::Sniffed,
            (None, false) => Carries::Http,
        };
        Some(Listener {
            name: name?,
            address: address?,
            carries,
            proxy_protocol,
            balance,
            tls,
            https_redirect,
        })
    }
}

/// Reads when a relay that has just started is ready.
fn warmup(field: &Field<'_>) -> Option<Warmup> {
    let section = field.section(WARMUP_KEYS)?;
    let mut warmup = Warmup::default();
    section.set("time", &mut warmup.time, |f| timeout(f, Duration::ZERO));
    section.set("sessions", &mut warmup.sessions, |f| f.integer(0, WARMUP_SESSIONS_MAX));
    if let Some(sessions) = section.field("sessions").filter(|_| warmup.time.is_zero()) {
        sessions.warn("has no effect: `time` is 0s, and no session is waited for");
    }
    Some(warmup)
}

/// Reads relays that sidecars are told of.
fn peers(field: &Field<'_>) -> Option<Vec<HostPort>> {
    let peers = field.list_of(|item| item.parse(value::dialled_by_others))?;
    if peers.len() > PEERS_MAX {
        field.fail(format!("has {} relays (accepted: at most {PEERS_MAX})", peers.len()));
    }
    for (index, peer) in peers.iter().enumerate() {
        if peers[..index].contains(peer) {
            let place = field.item(index).filter(|_| field.item(peers.len()).is_none());
            place.as_ref().unwrap_or(field).fail(format!("\"{peer}\" stands here twice"));
        }
    }
    Some(peers)
}

/// Tells ports that clients are sent to and at which no listener speaks TLS. Port 0 may be any.
fn redirects(field: &Field<'_>, listeners: &[Arc<Listener>]) {
    let ports = || listeners.iter().filter(|one| one.tls.is_some()).map(|one| one.address.port());
    let items = field.items().unwrap_or_default();
    if items.len() != listeners.len() {
        // One is faulty, and may be the one.
        return;
    }
    for (item, listener) in items.iter().zip(listeners) {
        if let Some(port) = listener.https_redirect
            && let Some(redirect) = item.child("https_redirect")
            && !ports().any(|other| other == port || other == 0)
        {
            redirect.warn(format!(
                "no listener with tls has port {port}: right only where something in front leads it to one"
            ));
        }
    }
}

/// Tells ends of sidecars that are open to everybody, or plain where others can read along.
fn tunnel_end(section: &Section<'_>, relay: &Relay, is_open: bool) {
    let tunnel = &relay.tunnel;
    let exposed = tunnel.address.filter(|address| !address.ip().is_loopback());
    if let (Some(field), Some(name)) = (section.field("listener"), &tunnel.listener) {
        let listener = relay.listeners.iter().find(|listener| listener.name == *name);
        let declared = list(relay.listeners.iter().map(|listener| &*listener.name));
        match listener {
            // Of a listener with a fault nothing is known.
            None if field.is_told("relay.listeners") => {}
            None => field.fail(format!("unknown listener \"{name}\" (declared: {declared})")),
            Some(listener) if listener.tls.is_none() && !field.is_told("relay.listeners") => {
                field.fail(format!(
                    "listener \"{name}\" has no tls, by which sidecars are told from clients (accepted: one \
                     with tls)"
                ));
            }
            Some(_) => {}
        }
        if is_open {
            field.fail(
                "is open to others and nobody is asked who they are (accepted: relay.credentials, or one \
                 of token, token_file, token_env beside it)",
            );
        }
    }
    if let (true, Some(address), Some(field)) = (is_open, exposed, section.field("address")) {
        field.fail(format!(
            "{address} is open to others and nobody is asked who they are (accepted: a loopback address, \
             relay.credentials, or one of token, token_file, token_env beside it)"
        ));
    }
    let insecure = section.field("insecure").filter(|_| tunnel.insecure);
    if let Some(insecure) = insecure {
        match (tunnel.address, section.field("tls")) {
            (_, Some(_)) => insecure.fail(
                "stands beside tls (accepted: one of the two; with tls nobody on the way reads along)",
            ),
            (None, _) => insecure.fail(
                "is about `address`, which is not there (accepted: leave it out; a listener's sidecars \
                 come by its tls)",
            ),
            (Some(_), None) if exposed.is_none() => {
                insecure.warn("has no effect: on loopback nobody reads along");
            }
            (Some(address), None) => insecure.warn(format!(
                "{address} is plain: anybody on the way reads and changes everything, credentials too"
            )),
        }
    } else if let (Some(address), Some(field)) = (exposed, section.field("address"))
        && section.field("tls").is_none()
        && !section.is_mistyped("tls")
        && !section.is_mistyped("insecure")
    {
        field.fail(format!(
            "{address} is open to others and plain (accepted: a loopback address, `tls` beside it, or \
             `insecure: true` where nobody reads along on the way)"
        ));
    }
}

/// Tells names without an authority, and an authority without names.
fn acme_for_names(section: &Section<'_>, relay: &Relay) {
    let listeners = section.field("listeners").and_then(|field| field.items()).unwrap_or_default();
    let tunnel = section.field("tunnel");
    let ends = listeners.iter().chain(&tunnel).filter_map(|end| end.child("tls")?.child("acme"));
    let named: Vec<Field<'_>> = ends.filter(|field| !field.is_empty()).collect();
    match section.field("acme") {
        None if !section.is_mistyped("acme") => {
            for field in named {
                field.fail(
                    "names without an authority that gives certificates for them (accepted: with \
                     relay.acme beside the listeners)",
                );
            }
        }
        Some(acme) if named.is_empty() && relay.acme.is_some() => {
            acme.warn("has no effect: no listener, and not the tunnel, has names in tls.acme");
        }
        _ => {}
    }
}

/// Tells listeners that would believe everybody, or nobody, about clients' addresses.
fn proxies(section: &Section<'_>, relay: &Relay) {
    let any = relay.trusted_proxies.iter().find(|network| network.prefix_len() == 0);
    if let (Some(network), Some(field)) = (any, section.field("trusted_proxies")) {
        field.warn(format!("{network} is everybody: any client may give any address for its own"));
    }
    let listeners = section.field("listeners").and_then(|field| field.items()).unwrap_or_default();
    for field in listeners.iter().filter_map(|item| item.child("proxy_protocol")) {
        if relay.trusted_proxies.is_empty() && field.is_true() {
            field.warn(
                "takes no header, since no proxy is trusted: every connection is closed (accepted: \
                 the proxies' addresses in relay.trusted_proxies)",
            );
        }
    }
}

fn relay_limits(field: &Field<'_>, limits: &mut RelayLimits) {
    let Some(section) = field.section(RELAY_LIMITS_KEYS) else { return };
    section.set("connections", &mut limits.connections, |f| f.integer(1, 10_000_000));
    section.set("sessions", &mut limits.sessions, |f| f.integer(1, 1_000_000));
    section.set("sessions_per_principal", &mut limits.sessions_per_principal, |f| {
        f.integer(1, 1_000_000)
    });
    section.set("lanes_per_session", &mut limits.lanes_per_session, |f| f.integer(1, LANES_MAX));
    section.set("exchanges_per_session", &mut limits.exchanges_per_session, |f| {
        f.integer(1, 1_000_000)
    });
    section.set("streams_per_connection", &mut limits.streams_per_connection, |f| {
        f.integer(1, 10_000)
    });
    section.set("request_head", &mut limits.request_head, |f| {
        usize::try_from(size(f, 8 << 10, 64 << 10)?).ok()
    });
    section.set("request_headers", &mut limits.request_headers, |f| f.integer(16, 128));
    section.set("queued", &mut limits.queued, |f| size(f, 1 << 20, 1 << 40));
    section.set("window", &mut limits.window, |f| size(f, 64 << 10, 64 << 20));
    section.set("handshakes_per_second", &mut limits.handshakes_per_second, |f| {
        f.integer(1, 1_000_000)
    });
    section.set(
        "handshakes_per_second_per_address",
        &mut limits.handshakes_per_second_per_address,
        |f| f.integer(1, 1_000_000),
    );
    section.set(
        "failed_handshakes_per_minute_per_address",
        &mut limits.failed_handshakes_per_minute_per_address,
        |f| f.integer(1, 1_000_000),
    );
    section.set("tls_handshakes", &mut limits.tls_handshakes, |f| f.integer(1, 1_000_000));
    section.set("tls_handshakes_per_address", &mut limits.tls_handshakes_per_address, |f| {
        f.integer(1, 1_000_000)
    });
}
