//! How relays are dialled and what is presented to them. What of it a reload changes is in force from
//! the next dial, and sessions that are up are told of another credential.
//!
//! Knows settings and the token's file; what is made of an answer is the session's business.

use std::collections::HashMap;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::ClientConfig;
use rustls::pki_types::{IpAddr, Ipv4Addr, ServerName};

use super::{Peer, Sidecar};
use crate::config::{self, Over, RelayAddress, Relays, Secret};
use crate::error::chain;
use crate::tls::{self, H2_ALPN, HTTP1_ALPN, TUNNEL_ALPN};
use crate::tunnel::dial::{Carrier, Security, Way};

/// Longest token that is presented: as the tunnel's protocol has it.
const TOKEN_BYTES_MAX: u64 = 16 * 1024;

/// How often the token's file is read while sessions are up: a projected token is renewed minutes
/// before it ends.
const TOKEN_LOOK: Duration = Duration::from_secs(30);

/// This process's own relay.
pub struct Own {
    /// By which it is dialled; `None`: plain.
    pub tls: Option<Arc<ClientConfig>>,
    /// What it knows this process's sidecar by.
    pub token: Secret,
}

/// How relays are dialled and what is presented.
pub struct Access {
    /// By the relay's address as configured.
    carriers: HashMap<Arc<str>, (RelayAddress, Arc<Carrier>)>,
    /// For the relay of this process.
    own: Option<Arc<Carrier>>,
    /// By the relay's address as relays tell of it.
    told: HashMap<Arc<str>, (RelayAddress, Arc<Carrier>)>,
    follows_peers: bool,
    token: Option<Arc<[u8]>>,
    /// Read anew at each dial.
    token_file: Option<PathBuf>,
}

impl Access {
    /// Returns what a configuration says; what `before` made of the same settings stays the same, with
    /// the tickets that it holds.
    #[must_use]
    pub fn new(section: &config::Sidecar, own: Option<Own>, before: Option<&Self>) -> Self {
        let mut carriers = HashMap::new();
        if let Relays::Listed(relays) = &section.relays {
            for relay in relays {
                let address: Arc<str> = relay.to_string().into();
                let known = before.and_then(|before| before.carriers.get(&address));
                let carrier = match known.filter(|(settings, _)| settings == relay) {
                    Some((_, carrier)) => Arc::clone(carrier),
                    None => Arc::new(carrier(relay)),
                };
                carriers.insert(address, (relay.clone(), carrier));
            }
        }
        let own_token = own.as_ref().map(|own| own.token.clone());
        let own = own.map(|own| {
            let known = before.and_then(|before| before.own.as_ref());
            let is_same = |known: &&Arc<Carrier>| {
                known.ways.iter().all(|way| match (&way.security, &own.tls) {
                    (Security::Tls { config, .. }, Some(new)) => Arc::ptr_eq(config, new),
                    (Security::Plain { .. }, None) => true,
                    _ => false,
                })
            };
            match known.filter(is_same) {
                Some(known) => Arc::clone(known),
                None => Arc::new(own_carrier(own.tls)),
            }
        });
        let token = section.token.clone().or(own_token);
        Self {
            carriers,
            own,
            told: before.map(|before| before.told.clone()).unwrap_or_default(),
            follows_peers: section.follow_peers,
            token: token.map(|token| token.expose().as_bytes().into()),
            token_file: section.token_file.clone(),
        }
    }

    /// Returns access to anybody on loopback, with nothing to present.
    #[cfg(test)]
    pub(super) fn plain() -> Self {
        Self {
            carriers: HashMap::new(),
            own: Some(Arc::new(own_carrier(None))),
            told: HashMap::new(),
            follows_peers: true,
            token: None,
            token_file: None,
        }
    }

    /// Returns the same with what relays tell of; what is dialled as before stays the same.
    pub(super) fn with_told(
        before: &Self,
        relays: impl Iterator<Item = (Arc<str>, RelayAddress)>,
    ) -> Self {
        let told = relays.map(|(key, relay)| {
            let known = before.told.get(&key).filter(|(settings, _)| *settings == relay);
            let made = known.cloned().unwrap_or_else(|| {
                let made = Arc::new(carrier(&relay));
                (relay, made)
            });
            (key, made)
        });
        Self {
            carriers: before.carriers.clone(),
            own: before.own.clone(),
            told: told.collect(),
            follows_peers: before.follows_peers,
            token: before.token.clone(),
            token_file: before.token_file.clone(),
        }
    }

    /// Whether relays that relays tell of are dialled.
    pub(super) const fn follows_peers(&self) -> bool {
        self.follows_peers
    }

    /// The relays of the file, by their addresses.
    pub(super) fn listed(&self) -> HashMap<Arc<str>, RelayAddress> {
        let listed = self.carriers.iter();
        listed.map(|(key, (relay, _))| (Arc::clone(key), relay.clone())).collect()
    }

    /// How a relay, as configured, is dialled.
    pub(super) fn carrier(&self, relay: &str) -> Arc<Carrier> {
        let listed = self.carriers.get(relay).or_else(|| self.told.get(relay));
        let listed = listed.map(|(_, carrier)| carrier);
        let carrier = listed.or(self.own.as_ref()).map(Arc::clone);
        // A reload keeps the addresses, so there is one.
        carrier.unwrap_or_else(|| Arc::new(Carrier::tcp(Security::Plain { insecure: false })))
    }
}

/// Makes what a relay is dialled by.
fn carrier(relay: &RelayAddress) -> Carrier {
    let ways = [relay].into_iter().chain(&relay.fallback);
    let way = |relay: &RelayAddress| Way {
        over: relay.over.clone(),
        address: Some(relay.address.clone()),
        security: security(relay),
        proxy: relay.proxy.clone(),
    };
    Carrier { ways: ways.map(way).collect() }
}

fn security(relay: &RelayAddress) -> Security {
    let Some(tls) = &relay.tls else {
        return Security::Plain { insecure: relay.insecure };
    };
    let name = tls.server_name.as_ref().unwrap_or(&relay.address.host);
    let name = match ServerName::try_from(name.to_string()) {
        Ok(name) => name,
        Err(error) => return Security::Unusable(format!("{name} is no name for TLS: {error}")),
    };
    let alpn = match relay.over {
        Over::Tcp => TUNNEL_ALPN,
        Over::WebSocket { .. } => HTTP1_ALPN,
        Over::Grpc => H2_ALPN,
    };
    match tls::client_config(tls, &[alpn]) {
        Ok(config) => Security::Tls {
            config: Arc::new(config),
            name,
            has_certificate: tls.certificate.is_some(),
        },
        Err(error) => Security::Unusable(chain(&error)),
    }
}

/// The own relay's certificate is known by itself, whatever names it has; an address asks for none.
fn own_carrier(tls: Option<Arc<ClientConfig>>) -> Carrier {
    Carrier::tcp(match tls {
        // What it was bound to may be every address of the machine, which is reached by none of it.
        None => Security::Plain { insecure: true },
        Some(config) => Security::Tls {
            config,
            name: ServerName::IpAddress(IpAddr::V4(Ipv4Addr::from([127, 0, 0, 1]))),
            has_certificate: false,
        },
    })
}

/// What is presented, as it was last read.
#[derive(Default)]
pub(super) struct Presented {
    /// Of which file, and what it held.
    last: Mutex<Option<(PathBuf, Arc<[u8]>)>>,
}

impl Presented {
    /// Returns what is to be presented now; empty: nothing. A file that cannot be read leaves what it
    /// held before.
    pub(super) async fn read(&self, access: &Access) -> Arc<[u8]> {
        let configured = || access.token.clone().unwrap_or_default();
        let Some(path) = access.token_file.clone() else { return configured() };
        let to_read = path.clone();
        // A file may lie on a disk that does not answer.
        let read = tokio::task::spawn_blocking(move || read_token(&to_read)).await;
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match read.unwrap_or_else(|error| Err(io::Error::other(error))) {
            Ok(token) => {
                let token: Arc<[u8]> = token.into();
                *last = Some((path, Arc::clone(&token)));
                token
            }
            Err(error) => {
                tracing::warn!(
                    file = %path.display(),
                    %error,
                    setting = "sidecar.token_file",
                    "the token cannot be read: the last one is presented"
                );
                last.as_ref()
                    .filter(|(of, _)| *of == path)
                    .map_or_else(configured, |(_, token)| Arc::clone(token))
            }
        }
    }
}

fn read_token(path: &Path) -> io::Result<Vec<u8>> {
    let fault = |what: String| Err(io::Error::new(io::ErrorKind::InvalidData, what));
    // Opening a pipe would wait for whoever writes to it.
    if !std::fs::metadata(path)?.is_file() {
        return fault("it is no file".to_owned());
    }
    let mut token = Vec::new();
    std::fs::File::open(path)?.take(TOKEN_BYTES_MAX + 1).read_to_end(&mut token)?;
    let token = token.trim_ascii();
    if token.len() as u64 > TOKEN_BYTES_MAX {
        return fault(format!("it is longer than {TOKEN_BYTES_MAX} bytes"));
    }
    if token.is_empty() {
        return fault("it is empty".to_owned());
    }
    Ok(token.to_vec())
}

impl Sidecar {
    /// Takes how relays are dialled, and what is presented, from a configuration.
    pub fn set_access(self: &Arc<Self>, section: &config::Sidecar, own: Option<Own>) {
        let access = Access::new(section, own, Some(&self.access.load()));
        self.access.store(Arc::new(access));
        self.follow_again();
        self.access_changes.send_replace(());
    }

    /// Dials at once, and presents at once, what waits to be tried again.
    pub fn try_again(&self) {
        self.access_changes.send_replace(());
    }

    /// What is to be presented now.
    pub(super) async fn credential(&self) -> Arc<[u8]> {
        let access = self.access.load_full();
        self.presented.read(&access).await
    }

    /// Tells relays of another credential until the sidecar stops.
    pub(super) async fn hold_credential(self: Arc<Self>) {
        let mut stopping = self.stopping.subscribe();
        let mut changes = self.access_changes.subscribe();
        while !self.is_stopping() {
            tokio::select! {
                _ = changes.changed() => {}
                () = tokio::time::sleep(TOKEN_LOOK), if self.access.load().token_file.is_some() => {}
                _ = stopping.changed() => return,
            }
            self.renew().await;
        }
    }

    /// Presents the credential to each relay whose session knows another, or does not accept it yet: its
    /// hash, or the key that signed it, may come to the relay later.
    pub(super) async fn renew(&self) {
        let credential = self.credential().await;
        if credential.is_empty() {
            return;
        }
        for peer in self.peers().iter() {
            if peer.is_connected() && peer.is_to_see(&credential) {
                present(peer, &credential);
            }
        }
    }
}

fn present(peer: &Peer, credential: &Arc<[u8]>) {
    let links = peer.with(|state| state.lanes.clone());
    let Some(link) = links.iter().find(|link| link.is_open()) else { return };
    // Before the relay can answer.
    let is_other = peer.presents(credential);
    if !link.authenticate(credential) {
        tracing::error!(relay = peer.name, "the credential is longer than the relay accepts");
    } else if is_other {
        tracing::info!(relay = peer.name, "another credential is presented to the relay");
    } else {
        tracing::debug!(relay = peer.name, "the credential is presented to the relay again");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(token: Option<&str>, file: Option<&Path>) -> Access {
        Access {
            token: token.map(|token| token.as_bytes().into()),
            token_file: file.map(Path::to_owned),
            ..Access::plain()
        }
    }

    #[tokio::test]
    async fn a_token_is_read_anew_and_the_last_good_one_stays() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("token");
        let access = access(Some("configured"), Some(&file));
        let presented = Presented::default();
        let text = async || String::from_utf8(presented.read(&access).await.to_vec());
        assert_eq!(text().await.as_deref(), Ok("configured"), "there is no file yet");
        for (contents, expected) in [
            ("first\n", "first"),
            (" second ", "second"),
            ("\n", "second"),
            (&"x".repeat(20_000), "second"),
            ("third", "third"),
        ] {
            std::fs::write(&file, contents).expect("written");
            assert_eq!(text().await.as_deref(), Ok(expected));
        }
        std::fs::remove_file(&file).expect("removed");
        assert_eq!(text().await.as_deref(), Ok("third"));
        std::fs::create_dir(&file).expect("made");
        assert_eq!(text().await.as_deref(), Ok("third"));
    }
}
