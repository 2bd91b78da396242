//! What sidecars' handshakes go by, on the tunnel's own address and on listeners that they share with
//! clients: bounds, TLS, and what was told of those that failed.
//!
//! Knows settings and counts; what is said in a handshake is `tunnels`' business.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime};

use arc_swap::{ArcSwap, ArcSwapOption};
use http::header::{FORWARDED, HeaderMap, HeaderName, VIA};
use ipnet::IpNet;
use rustls::{ClientConfig, ServerConfig};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::knock::Came;
use super::tls::{Bounds as Under, Handshakes, Permit};
use crate::config;
use crate::config::tls::{Certificate, ClientCertificates, ServerTls};
use crate::error::chain;
use crate::front::forwarded;
use crate::metrics::Metrics;
use crate::tls::{self, ACME_ALPN, H2_ALPN, HTTP1_ALPN, Issued, Resolver, TUNNEL_ALPN, TlsError};
use crate::tunnel::accept::HANDSHAKES_MAX;
use crate::tunnel::gate::{Bounds, Gate, TurnedAway};

/// Fields of a request that somebody passes on.
const PASSED_ON: [HeaderName; 4] = [
    HeaderName::from_static("x-forwarded-for"),
    HeaderName::from_static("x-real-ip"),
    FORWARDED,
    VIA,
];

/// Diallers at once that are told to come back; further ones are closed unanswered, and come back too soon. As
/// many as a herd brings in the moment that telling one takes; each is a socket and a small task.
const TURNED_AWAY_MAX: usize = 512;

/// No listener is called so: their names begin with a letter or digit.
const OWN_ADDRESS: &str = "_tunnel";

/// Where sidecars knock.
pub(super) struct Door {
    gate: Gate,
    bounds: ArcSwap<Bounds>,
    /// Each brings the connections of many.
    proxies: ArcSwap<Vec<IpNet>>,
    handshakes: Arc<Handshakes>,
    turned_away: Arc<Semaphore>,
    way: ArcSwap<Way>,
    /// By which this process's own sidecar dials; `None`: plain.
    embedded: ArcSwapOption<ClientConfig>,
    /// What `way` and `embedded` were made of: what is shown at the tunnel's own address, or at the
    /// listener where it has none.
    made_of: Mutex<Option<Option<ServerTls>>>,
    /// Stands for the tunnel's own address where metrics have a listener's name.
    pub(super) name: Arc<str>,
}

/// How one comes in at the tunnel's own address.
pub(super) enum Way {
    /// Without TLS.
    Plain,
    /// By TLS.
    Tls(Arc<ServerConfig>),
    /// By TLS, which cannot be had: nobody does.
    Closed,
}

/// Handshakes under way of one address, that is no trusted proxy's: a quarter of all, so that one who
/// dials and says nothing leaves places for others.
const HANDSHAKES_OF_ADDRESS_MAX: usize = HANDSHAKES_MAX / 4;

/// Its place among the handshakes under way.
pub(super) type Place = Permit;

/// Its place among those that are told to come back.
pub(super) type Told = OwnedSemaphorePermit;

impl Door {
    /// Returns the door of a configuration.
    pub(super) fn new(section: &config::Relay, issued: &Arc<Issued>, metrics: &Metrics) -> Self {
        let door = Self {
            gate: Gate::default(),
            bounds: ArcSwap::from_pointee(bounds(section)),
            proxies: ArcSwap::from_pointee(section.trusted_proxies.clone()),
            handshakes: Arc::default(),
            turned_away: Arc::new(Semaphore::new(TURNED_AWAY_MAX)),
            way: ArcSwap::from_pointee(Way::Plain),
            embedded: ArcSwapOption::empty(),
            made_of: Mutex::default(),
            name: OWN_ADDRESS.into(),
        };
        door.set_tls(section, issued, metrics);
        door
    }

    /// Takes another configuration, for handshakes that begin from here on. Tickets given out before
    /// are worth nothing where its TLS is another.
    pub(super) fn set(&self, section: &config::Relay, issued: &Arc<Issued>, metrics: &Metrics) {
        self.bounds.store(Arc::new(bounds(section)));
        self.proxies.store(Arc::new(section.trusted_proxies.clone()));
        self.set_tls(section, issued, metrics);
    }

    fn set_tls(&self, section: &config::Relay, issued: &Arc<Issued>, metrics: &Metrics) {
        let tunnel = &section.tunnel;
        let shared = tunnel.listener.as_ref().and_then(|name| {
            let listener = section.listeners.iter().find(|listener| listener.name == *name)?;
            listener.tls.as_ref()
        });
        let shown = if tunnel.address.is_some() { tunnel.tls.as_ref() } else { shared };
        let source = shown.cloned();
        let mut made_of = self.made_of.lock().unwrap_or_else(PoisonError::into_inner);
        if made_of.as_ref() == Some(&source) {
            // Tickets go on to count.
            return;
        }
        let (way, embedded) = match source.as_ref().map(|shown| configs(shown, issued)) {
            None => (Way::Plain, None),
            Some(Ok((server, client))) => (Way::Tls(server), Some(client)),
            Some(Err(error)) => {
                let error = chain(&error);
                tracing::error!(error, "relay.tunnel.tls cannot be used: no sidecar is let in");
                (Way::Closed, None)
            }
        };
        if matches!(way, Way::Tls(_)) {
            metrics.tls.listener(&self.name);
        }
        // Those of a listener are told under its name.
        let own = source.as_ref().filter(|_| section.tunnel.address.is_some());
        let certificates = own.map(|own| named(&own.certificates)).unwrap_or_default();
        metrics.tls.set_certificates(&self.name, &certificates);
        self.way.store(Arc::new(way));
        self.embedded.store(embedded);
        *made_of = Some(source);
    }

    /// By which this process's own sidecar dials; `None`: plain.
    pub(super) fn embedded(&self) -> Option<Arc<ClientConfig>> {
        self.embedded.load_full()
    }

    /// How one comes in at the tunnel's own address.
    pub(super) fn way(&self) -> Arc<Way> {
        self.way.load_full()
    }

    /// What handshakes are bounded by.
    pub(super) fn bounds(&self) -> Bounds {
        **self.bounds.load()
    }

    /// Whose handshakes and failures are counted; `None`: a trusted proxy's are nobody's.
    pub(super) fn counted(&self, peer: SocketAddr) -> Option<IpAddr> {
        let is_proxy = forwarded::is_in(peer.ip(), &self.proxies.load());
        (!is_proxy).then_some(peer.ip())
    }

    /// Gives a handshake its place.
    ///
    /// # Errors
    /// Why it has none.
    pub(super) fn enter(&self, peer: SocketAddr) -> Result<Place, TurnedAway> {
        let counted = self.counted(peer);
        self.gate.enter(&self.bounds(), counted, Instant::now())?;
        let bounds = Under { all_max: HANDSHAKES_MAX, per_address_max: HANDSHAKES_OF_ADDRESS_MAX };
        self.handshakes.try_enter(bounds, counted).map_err(|_over| TurnedAway::BUSY)
    }

    /// Whom a request comes from: whom a trusted proxy names, else who connected. What others say of
    /// themselves is not believed; but who says that it passes something on is not the one who asks.
    pub(super) fn came(&self, peer: SocketAddr, headers: &HeaderMap) -> Came {
        let proxies = self.proxies.load();
        let is_passed_on = PASSED_ON.iter().any(|name| headers.contains_key(name));
        if !forwarded::is_in(peer.ip(), &proxies) {
            return Came { address: peer, is_hidden: is_passed_on };
        }
        let address = forwarded::client(peer, headers, &proxies).address;
        Came { address, is_hidden: address == peer }
    }

    /// Gives a handshake its place that came by HTTP from `peer` for `client`; `place` is its connection's,
    /// where no other handshake of that has it.
    ///
    /// # Errors
    /// Why it has none.
    pub(super) fn enter_for(
        &self,
        place: Option<Place>,
        peer: SocketAddr,
        client: SocketAddr,
    ) -> Result<Place, TurnedAway> {
        let counted = self.counted(peer).or_else(|| self.counted(client));
        let (bounds, now) = (self.bounds(), Instant::now());
        match place {
            // Its connection was counted for it.
            Some(place) if self.counted(peer).is_some() || counted.is_none() => return Ok(place),
            Some(_) => {
                if let Some(address) = counted {
                    self.gate.enter_address(&bounds, address, now)?;
                }
            }
            None => self.gate.enter(&bounds, counted, now)?,
        }
        let under = Under { all_max: HANDSHAKES_MAX, per_address_max: HANDSHAKES_OF_ADDRESS_MAX };
        self.handshakes.try_enter(under, counted).map_err(|_over| TurnedAway::BUSY)
    }

    /// Whether an address has failed too often to be listened to.
    ///
    /// # Errors
    /// It has.
    pub(super) fn check_failures(&self, peer: SocketAddr) -> Result<(), TurnedAway> {
        self.gate.check_failures(&self.bounds(), self.counted(peer), Instant::now())
    }

    /// A handshake has failed by what was, or was not, said in it; `presented` is the credential that was
    /// refused.
    pub(super) fn failed(&self, peer: SocketAddr, presented: Option<&[u8]>) {
        self.gate.failed(self.counted(peer), presented, Instant::now());
    }

    /// The place of one that is told to come back; `None`: too many are.
    pub(super) fn tell(&self) -> Option<Told> {
        Arc::clone(&self.turned_away).try_acquire_owned().ok()
    }
}

/// Counts one that is turned away, and tells of the first of an address.
pub(super) fn note(metrics: &Metrics, peer: SocketAddr, why: TurnedAway) {
    metrics.handshake_refused(why.label());
    tracing::debug!(%peer, reason = why.detail(), "turned away");
    if let TurnedAway::Failures { retry_after, is_first: true } = why {
        tracing::warn!(
            address = %peer.ip().to_canonical(),
            seconds = retry_after.as_secs(),
            setting = "relay.limits.failed_handshakes_per_minute_per_address",
            "too many handshakes of sidecars at this address have failed: it is turned away"
        );
    }
}

fn bounds(section: &config::Relay) -> Bounds {
    let limits = &section.limits;
    Bounds {
        timeout: section.timeouts.handshake,
        tls_timeout: section.timeouts.tls_handshake,
        per_second: limits.handshakes_per_second,
        per_second_and_address: limits.handshakes_per_second_per_address,
        failures_per_minute_and_address: limits.failed_handshakes_per_minute_per_address,
    }
}

fn named(certificates: &[Arc<Certificate>]) -> Vec<(Arc<str>, SystemTime)> {
    let named = |certificate: &Arc<Certificate>| {
        let name = certificate.names.first().unwrap_or(&certificate.place);
        (Arc::clone(name), certificate.not_after)
    };
    certificates.iter().map(named).collect()
}

/// Both ends of the tunnel's own TLS. A certificate is asked for where authorities are named, and never
/// demanded: a token does as well, and which of the two a principal has is the credentials' business.
fn configs(
    shown: &ServerTls,
    issued: &Arc<Issued>,
) -> Result<(Arc<ServerConfig>, Arc<ClientConfig>), TlsError> {
    let resolver =
        Resolver::new(shown, Arc::clone(issued)).map_err(|error| TlsError::Unusable {
            what: "relay.tunnel.tls".to_owned(),
            source: rustls::Error::General(error),
        })?;
    let resolver = Arc::new(resolver);
    let clients = shown.clients.clone();
    let shown = ServerTls {
        clients: clients.map(|clients| ClientCertificates { required: false, ..clients }),
        ..shown.clone()
    };
    // ACME proves the tunnel's names here too, where this is the port it knocks at.
    let alpn = [TUNNEL_ALPN, H2_ALPN, HTTP1_ALPN, ACME_ALPN];
    let alpn = if shown.acme.is_empty() { &alpn[..3] } else { &alpn[..] };
    let server = tls::server_config(&shown, Arc::clone(&resolver) as _, alpn)?;
    Ok((Arc::new(server), Arc::new(tls::embedded_client_config(resolver)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_behind_a_proxy_do_not_shut_everybody_else_behind_it_out() {
        let yaml = "version: 1\nrelay:\n  trusted_proxies: [192.0.2.0/28]\n  limits: { failed_handshakes_per_minute_per_address: 1 }\n";
        let source = config::Source::from_text("relay.yaml".as_ref(), yaml);
        let config = config::parse(&source, &|_| None).expect("a valid file");
        let section = config.relay.expect("a relay");
        let door = Door::new(&section, &Arc::default(), &Metrics::new());
        let peer = |last| SocketAddr::from(([192, 0, 2, last], 4711));
        for last in [1, 77] {
            door.failed(peer(last), None);
        }
        assert!(door.enter(peer(1)).is_ok());
        assert!(door.enter(peer(77)).is_err());
    }

    #[test]
    fn who_dials_and_says_nothing_leaves_places_for_others() {
        let yaml = "version: 1\nrelay:\n  limits: { handshakes_per_second: 10000, handshakes_per_second_per_address: 10000 }\n";
        let source = config::Source::from_text("relay.yaml".as_ref(), yaml);
        let config = config::parse(&source, &|_| None).expect("a valid file");
        let section = config.relay.expect("a relay");
        let door = Door::new(&section, &Arc::default(), &Metrics::new());
        let peer = |last| SocketAddr::from(([192, 0, 2, last], 4711));
        let held: Vec<_> = (0..10_000).map_while(|_| door.enter(peer(1)).ok()).collect();
        assert_eq!(held.len(), HANDSHAKES_OF_ADDRESS_MAX);
        assert!(door.enter(peer(2)).is_ok());
        drop(held);
        assert!(door.enter(peer(1)).is_ok());
    }
}
