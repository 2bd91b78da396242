//! Takes a sidecar out of service while it runs: its document says of every tunnel that it is not to be
//! had here, and relays send new exchanges elsewhere. Lanes stay up and are dialled anew, what runs goes
//! on, and what has crossed the word is served.

use std::sync::atomic::Ordering;

use sidelane_tunnel::proto;

use super::Sidecar;

/// Why a tunnel is not to be had here, as relays are told.
const WITHDRAWN: &str = "its sidecar is withdrawn";

/// What a relay knows of the withdrawal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Withdrawal {
    /// For people.
    pub name: String,
    /// It sends nothing new.
    pub is_acknowledged: bool,
    /// Why it does not take the document that says so.
    pub refused: Option<String>,
}

impl Sidecar {
    /// Has every relay send nothing new here, those that are dialled later too.
    pub fn withdraw(&self) {
        self.withdrawn.store(true, Ordering::SeqCst);
        self.announce_health();
    }

    /// Which relays know of it, of those with a session: what no relay serves needs no word of it.
    #[must_use]
    pub fn withdrawal(&self) -> Vec<Withdrawal> {
        let version = self.document.borrow().version;
        let peers = self.peers();
        let told = peers.iter().filter(|peer| peer.has_session());
        told.map(|peer| Withdrawal {
            name: peer.name.clone(),
            is_acknowledged: !peer.is_to_accept(version),
            refused: peer.refusal(),
        })
        .collect()
    }

    /// Whether no relay sends anything new.
    #[must_use]
    pub fn is_withdrawn_everywhere(&self) -> bool {
        let version = self.document.borrow().version;
        !self.peers().iter().any(|peer| peer.is_to_accept(version))
    }

    /// Says of each announced tunnel whether it can be had here; true: something is said anew. Called
    /// while the document is changed, so that no change of it forgets the withdrawal.
    pub(super) fn mark(&self, tunnels: &mut [proto::AnnouncedTunnel]) -> bool {
        if !self.withdrawn.load(Ordering::SeqCst) {
            return self.health.mark(tunnels);
        }
        let mut is_changed = false;
        for tunnel in tunnels.iter_mut().filter(|tunnel| tunnel.unavailable != WITHDRAWN) {
            WITHDRAWN.clone_into(&mut tunnel.unavailable);
            is_changed = true;
        }
        is_changed
    }
}
