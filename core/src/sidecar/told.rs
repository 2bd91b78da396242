//! Relays that relays tell of: dialled like those of the file, by the settings of the one that tells.
//!
//! A relay could send a sidecar anywhere, and what a sidecar presents is worth something. So one that is told
//! of is dialled by TLS that is verified by the same authorities, or not at all; without, only where its host
//! is one that the file names.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use super::access::Access;
use super::relays::{ADDRESSES_MAX, NamedRelay};
use super::{Peer, Sidecar};
use crate::config::tls::Trust;
use crate::config::{self, HostPort, RelayAddress};

/// What relays have told, and what is dialled for it.
#[derive(Default)]
pub(super) struct Told(Mutex<State>);

#[derive(Default)]
struct State {
    /// By the teller's name: the relay that it is, and what its last session began with.
    by_teller: HashMap<String, (Arc<str>, Vec<HostPort>)>,
    /// What is dialled. Invariant: at most [`ADDRESSES_MAX`].
    dialled: HashMap<Arc<str>, Dialled>,
}

enum Dialled {
    Address(Arc<Peer>),
    Name(Arc<NamedRelay>),
}

/// A relay that is told of, and the one of the file that it goes back to.
struct Found {
    relay: RelayAddress,
    root: Arc<str>,
}

/// Returns how a relay is dialled that one of the file tells of, or one that goes back to it; `None`: not at
/// all.
fn derived(root: &RelayAddress, told: &HostPort, hosts: &HashSet<&str>) -> Option<RelayAddress> {
    let is_verified = root.tls.as_ref().is_some_and(|tls| tls.trust != Trust::Anybody);
    (is_verified || hosts.contains(&*told.host)).then(|| RelayAddress {
        address: told.clone(),
        fallback: Vec::new(),
        ..root.clone()
    })
}

/// Returns all relays that are told of by those of the file, by those that these tell of, and so on: what two
/// of them tell of each other alone leads nowhere.
fn find(
    listed: &HashMap<Arc<str>, RelayAddress>,
    by_teller: &HashMap<String, (Arc<str>, Vec<HostPort>)>,
) -> HashMap<Arc<str>, Found> {
    let hosts: HashSet<&str> = listed.values().map(|relay| &*relay.address.host).collect();
    let places: HashSet<&HostPort> = listed.values().map(|relay| &relay.address).collect();
    let mut found: HashMap<Arc<str>, Found> = HashMap::new();
    let mut roots: Vec<&Arc<str>> = listed.keys().collect();
    roots.sort();
    let mut queue: VecDeque<(Arc<str>, &Arc<str>)> =
        roots.into_iter().map(|root| (Arc::clone(root), root)).collect();
    while let Some((teller, root)) = queue.pop_front() {
        let of_teller = by_teller.values().filter(|(relay, _)| *relay == teller);
        for told in of_teller.flat_map(|(_, told)| told) {
            if places.contains(told) || found.len() >= ADDRESSES_MAX {
                continue;
            }
            let Some(relay) = derived(&listed[root], told, &hosts) else { continue };
            let key: Arc<str> = relay.to_string().into();
            if !found.contains_key(&key) {
                found.insert(Arc::clone(&key), Found { relay, root: Arc::clone(root) });
                queue.push_back((key, root));
            }
        }
    }
    found
}

impl Told {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Names that are looked up.
    pub(super) fn names(&self) -> Vec<Arc<NamedRelay>> {
        let state = self.lock();
        let name = |dialled: &Dialled| match dialled {
            Dialled::Name(named) => Some(Arc::clone(named)),
            Dialled::Address(_) => None,
        };
        state.dialled.values().filter_map(name).collect()
    }
}

impl Sidecar {
    /// A session has begun with a relay that tells of these.
    pub(super) fn told(self: &Arc<Self>, peer: &Peer, peers: &[String]) {
        let read = |text: &String| match config::value::host_port(text) {
            Ok(address) => Some(address),
            Err(error) => {
                tracing::warn!(relay = peer.name, error, "the relay tells of a relay that is none");
                None
            }
        };
        let peers: Vec<HostPort> = peers.iter().filter_map(read).collect();
        let mut state = self.told.lock();
        let before = state.by_teller.get(&peer.name).map(|(_, before)| before.as_slice());
        if before.unwrap_or_default() == peers {
            return;
        }
        let told = peers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        tracing::info!(relay = peer.name, told, "the relay tells of others");
        state.by_teller.insert(peer.name.clone(), (Arc::clone(&peer.relay), peers));
        self.follow(&mut state);
    }

    /// A relay is dialled no more, and what it told counts no more.
    pub(super) fn told_no_more(self: &Arc<Self>, peer: &Peer) {
        let mut state = self.told.lock();
        if state.by_teller.remove(&peer.name).is_some() {
            self.follow(&mut state);
        }
    }

    /// Looks again at what is told after the way to relays has changed.
    pub(super) fn follow_again(self: &Arc<Self>) {
        self.follow(&mut self.told.lock());
    }

    /// Makes what is told what is dialled, where the file says so.
    fn follow(self: &Arc<Self>, state: &mut State) {
        let access = self.access.load_full();
        let found = match access.follows_peers() {
            true => find(&access.listed(), &state.by_teller),
            false => HashMap::new(),
        };
        let relays = found.iter().map(|(key, found)| (Arc::clone(key), found.relay.clone()));
        self.access.store(Arc::new(Access::with_told(&access, relays)));
        state.dialled.retain(|key, dialled| {
            let is_wanted = found.contains_key(key);
            if !is_wanted {
                self.release(key, dialled);
            }
            is_wanted
        });
        for (key, found) in found {
            if !state.dialled.contains_key(&key) {
                let dialled = self.dial_told(&key, &found.root);
                state.dialled.extend(dialled.map(|dialled| (key, dialled)));
            }
        }
    }

    fn dial_told(self: &Arc<Self>, key: &Arc<str>, root: &Arc<str>) -> Option<Dialled> {
        let is_address = config::place(key).parse::<SocketAddr>().is_ok();
        // A name that goes to a proxy is for that to look up.
        if !is_address && !self.access.load().carrier(key).is_by_proxy() {
            let named = Arc::new(NamedRelay::told(Arc::clone(key), Arc::clone(root)));
            // Refused only where the process ends.
            self.next_shard().spawn(Arc::clone(self).hold_name(Arc::clone(&named)));
            return Some(Dialled::Name(named));
        }
        let peer = Arc::new(Peer::told(Arc::clone(key), Arc::clone(root)));
        let mut is_new = false;
        self.change_peers(|peers| {
            // A name of the file may stand for the same address.
            let is_known =
                peers.iter().any(|other| other.target == peer.target && other.is_wanted());
            is_new = !is_known && peers.len() < ADDRESSES_MAX;
            if is_new {
                peers.push(Arc::clone(&peer));
            }
        });
        is_new.then(|| {
            self.start_peer(Arc::clone(&peer));
            Dialled::Address(peer)
        })
    }

    /// Dials no more; a session that is up stays as long as it lasts.
    fn release(&self, key: &Arc<str>, dialled: &Dialled) {
        tracing::info!(relay = &**key, "no relay tells of this one any more");
        match dialled {
            Dialled::Address(peer) => drop(peer.wanted.send_replace(false)),
            Dialled::Name(named) => self.change_peers(|peers| {
                // Under the lock by which its addresses are dialled.
                named.release();
                for peer in peers.iter().filter(|peer| peer.relay == *key) {
                    peer.wanted.send_replace(false);
                }
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tls::ClientTls;

    fn address(text: &str) -> HostPort {
        config::value::host_port(text).expect("an address")
    }

    fn listed(relays: &[RelayAddress]) -> HashMap<Arc<str>, RelayAddress> {
        relays.iter().map(|relay| (relay.address.to_string().into(), relay.clone())).collect()
    }

    type Tellers = HashMap<String, (Arc<str>, Vec<HostPort>)>;

    fn tellers(told: &[(&str, &[&str])]) -> Tellers {
        let entry = |(teller, told): &(&str, &[&str])| {
            let told = told.iter().map(|text| address(text)).collect();
            ((*teller).to_owned(), ((*teller).into(), told))
        };
        told.iter().map(entry).collect()
    }

    fn found(listed: &HashMap<Arc<str>, RelayAddress>, told: &[(&str, &[&str])]) -> Vec<String> {
        let mut found: Vec<String> =
            find(listed, &tellers(told)).keys().map(ToString::to_string).collect();
        found.sort();
        found
    }

    #[test]
    fn what_the_file_leads_to_is_dialled_and_nothing_else() {
        let listed = listed(&[RelayAddress::new(address("a.example:1"))]);
        type Told<'a> = &'a [(&'a str, &'a [&'a str])];
        let table: &[(Told<'_>, &[&str])] = &[
            (&[], &[]),
            (&[("a.example:1", &["b.example:1", "192.0.2.1:1"])], &["192.0.2.1:1", "b.example:1"]),
            // The file's own, said again.
            (&[("a.example:1", &["a.example:1"])], &[]),
            // One that is told of tells of others, and of who told of it.
            (
                &[
                    ("a.example:1", &["b.example:1"]),
                    ("b.example:1", &["a.example:1", "c.example:1"]),
                ],
                &["b.example:1", "c.example:1"],
            ),
            // Two that tell of each other alone.
            (&[("b.example:1", &["c.example:1"]), ("c.example:1", &["b.example:1"])], &[]),
        ];
        assert!(!table.is_empty());
        for (told, expected) in table {
            assert_eq!(found(&listed, told), *expected, "{told:?}");
        }
        let many: Vec<String> = (0..200).map(|n| format!("r{n}.example:1")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert_eq!(found(&listed, &[("a.example:1", &many)]).len(), ADDRESSES_MAX);
    }

    #[test]
    fn who_cannot_be_verified_sends_nobody_to_other_hosts() {
        let told: &[(&str, &[&str])] = &[("a.example:1", &["a.example:2", "evil.example:1"])];
        let by = |trust: Option<Trust>| RelayAddress {
            insecure: trust.is_none(),
            tls: trust.map(|trust| Arc::new(ClientTls { trust, ..ClientTls::default() })),
            ..RelayAddress::new(address("a.example:1"))
        };
        assert_eq!(found(&listed(&[by(None)]), told), ["a.example:2"]);
        assert_eq!(found(&listed(&[by(Some(Trust::Anybody))]), told), ["a.example:2"]);
        let verified = listed(&[by(Some(Trust::System))]);
        assert_eq!(found(&verified, told), ["a.example:2", "evil.example:1"]);
        let all = find(&verified, &tellers(told));
        let relay = &all["evil.example:1"].relay;
        assert_eq!(relay.address.to_string(), "evil.example:1");
        assert_eq!(relay.tls, by(Some(Trust::System)).tls, "as the one that tells");
    }
}
