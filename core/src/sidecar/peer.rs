//! One relay, as this sidecar knows it: its lanes, and what it said of the announced document.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use sidelane_tunnel::proto;
use tokio::sync::watch;

use crate::config;
use crate::error::bounded;
use crate::tunnel::Link;

/// Addresses of an accepted announcement that the log tells.
const ADDRESSES_TOLD_MAX: usize = 3;

/// Longest word of a relay's, or error of a dial, that is kept and shown.
pub(super) const TOLD_BYTES_MAX: usize = 512;

/// One relay, or one of the addresses that a relay's name stands for.
pub struct Peer {
    /// As configured.
    pub relay: Arc<str>,
    /// Which of the name's addresses; `None`: it is dialled as configured.
    pub address: Option<SocketAddr>,
    /// For people: the relay, and the address where it is one of several.
    pub(super) name: String,
    /// What is dialled.
    pub(super) target: String,
    /// Which relay of the file it goes back to where relays tell of it; `None`: the file does.
    told_by: Option<Arc<str>>,
    /// False once the name no longer stands for the address: it is dialled no more.
    pub(super) wanted: watch::Sender<bool>,
    state: Mutex<PeerState>,
    is_connected: AtomicBool,
}

/// What a relay has said, for whoever follows.
#[derive(Clone, Debug)]
pub struct RelayAnswer {
    /// As configured, and the address where it is one of several.
    pub relay: String,
    /// A session is up.
    pub is_connected: bool,
    /// Version of the document that it accepted.
    pub accepted: Option<u64>,
    /// Why it refused the last one.
    pub refused: Vec<String>,
    /// What it said of the accepted one.
    pub notes: Vec<String>,
    /// By which clients reach the routes.
    pub addresses: Vec<String>,
    /// Why the last dial failed.
    pub last_error: Option<String>,
}

#[derive(Default)]
pub(super) struct PeerState {
    pub(super) lanes: Vec<Arc<Link>>,
    session: Option<SessionFacts>,
    /// Of the relay at the other end of the last session.
    instance: Bytes,
    refused: Vec<String>,
    /// The refused document is in force as soon as others are gone.
    waiting: bool,
    notes: Vec<String>,
    addresses: Vec<String>,
    accepted: Option<u64>,
    last_error: Option<String>,
    /// The relay is not to be dialled for a session before.
    stay_away: Option<Instant>,
    /// What was shown to the relay last.
    presented: Arc<[u8]>,
    /// The relay knows this sidecar by it.
    is_known: bool,
    /// What the relay knows this sidecar by.
    known: Arc<[u8]>,
    /// Why the relay refuses it; `None`: it does not, or has not answered.
    credential_refused: Option<String>,
}

/// What is told of a session on the admin page.
#[derive(Clone)]
struct SessionFacts {
    epoch: u64,
    since: Instant,
    tls: bool,
    /// The relay has said that it goes.
    leaving: bool,
}

impl Peer {
    pub(super) fn new(relay: Arc<str>, address: Option<SocketAddr>) -> Self {
        let name = match address {
            Some(address) => format!("{relay} at {address}"),
            None => relay.to_string(),
        };
        let target =
            address.map_or_else(|| config::place(&relay).to_owned(), |address| address.to_string());
        Self {
            relay,
            address,
            name,
            target,
            told_by: None,
            wanted: watch::Sender::new(true),
            state: Mutex::default(),
            is_connected: AtomicBool::new(false),
        }
    }

    /// Returns one that a relay tells of.
    pub(super) fn told(relay: Arc<str>, by: Arc<str>) -> Self {
        Self { told_by: Some(by), ..Self::new(relay, None) }
    }

    pub(super) fn with<T>(&self, f: impl FnOnce(&mut PeerState) -> T) -> T {
        f(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether a session can carry exchanges.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.is_connected.load(Ordering::Relaxed)
    }

    pub(super) fn is_wanted(&self) -> bool {
        *self.wanted.borrow()
    }

    /// Instance of the relay at the other end of the last session; empty: there was none.
    pub(super) fn instance(&self) -> Bytes {
        self.with(|state| state.instance.clone())
    }

    /// The address leads to a relay that another session is with.
    pub(super) fn leads_to(&self, instance: &[u8]) {
        self.with(|state| state.instance = Bytes::copy_from_slice(instance));
    }

    /// A relay has let us in.
    pub(super) fn session_begun(&self, epoch: u64, instance: Bytes, tls: bool) {
        self.with(|state| {
            state.session =
                Some(SessionFacts { epoch, since: Instant::now(), tls, leaving: false });
            state.instance = instance;
            state.last_error = None;
            state.forget_answers();
        });
    }

    /// The relay says that it goes; true: for the first time in this session.
    pub(super) fn leaves(&self) -> bool {
        self.with(|state| {
            let session = state.session.as_mut();
            session.is_some_and(|session| !std::mem::replace(&mut session.leaving, true))
        })
    }

    /// The relay has let a lane in by this credential.
    pub(super) fn known_by(&self, credential: &Arc<[u8]>) {
        self.with(|state| {
            state.presented = Arc::clone(credential);
            state.known = Arc::clone(credential);
            state.is_known = true;
            state.credential_refused = None;
        });
    }

    /// What a further lane of the session is let in by, where the relay refuses the newest credential.
    pub(super) fn known_credential(&self) -> Option<Arc<[u8]>> {
        self.with(|state| state.credential_refused.is_some().then(|| Arc::clone(&state.known)))
    }

    /// The relay is shown this credential, and has not answered. Returns whether it is another one.
    pub(super) fn presents(&self, credential: &Arc<[u8]>) -> bool {
        self.with(|state| {
            state.is_known = false;
            let is_other = *state.presented != **credential;
            state.presented = Arc::clone(credential);
            is_other
        })
    }

    /// Whether the relay is to be shown this credential: it was shown another one last, or does not accept
    /// this one yet.
    pub(super) fn is_to_see(&self, credential: &[u8]) -> bool {
        self.with(|state| !state.is_known || *state.presented != *credential)
    }

    /// Takes what the relay says of the credential that it was shown in the running session.
    pub(super) fn credential_answered(&self, answer: &proto::Authenticated) {
        let relay = &*self.name;
        if answer.accepted {
            self.with(|state| {
                state.known = Arc::clone(&state.presented);
                state.is_known = true;
                state.credential_refused = None;
            });
            let expires_in = (answer.expires_ms > 0).then_some(answer.expires_ms / 1000);
            tracing::info!(
                relay,
                expires_in_seconds = expires_in,
                "the relay accepts the credential presented"
            );
            return;
        }
        let mut reason = bounded(&answer.detail, TOLD_BYTES_MAX);
        if reason.is_empty() {
            "the relay gave no reason".clone_into(&mut reason);
        }
        let before = self.with(|state| {
            state.is_known = false;
            state.credential_refused.replace(reason.clone())
        });
        if before.as_ref() == Some(&reason) {
            tracing::debug!(relay, reason, "the relay still refuses the credential presented");
        } else {
            tracing::warn!(
                relay,
                reason,
                "the relay refuses the credential presented: the one before counts, and this one is \
                 presented again"
            );
        }
    }

    /// Whether the relay refuses the credential that it was shown last.
    pub(super) fn refuses_credential(&self) -> bool {
        self.with(|state| state.credential_refused.is_some())
    }

    /// Why there is no session; `None`: there is one, or no dial has failed yet.
    pub(super) fn failure(&self) -> Option<String> {
        if self.is_connected() {
            return None;
        }
        self.with(|state| state.last_error.clone())
    }

    /// The relay is too busy for so long.
    pub(super) fn is_busy_for(&self, asked: Duration) {
        self.with(|state| state.stay_away = Instant::now().checked_add(asked));
    }

    /// How long it still is.
    pub(super) fn stays_away(&self) -> Duration {
        let until = self.with(|state| state.stay_away.take());
        until.map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now()))
    }

    /// No dial succeeds.
    pub(super) fn failed(&self, error: &str) {
        self.with(|state| state.last_error = Some(bounded(error, TOLD_BYTES_MAX)));
    }

    /// The session can carry exchanges.
    pub(super) fn connected(&self) {
        self.is_connected.store(true, Ordering::Relaxed);
    }

    /// The session is lost, and what the relay said in it no longer counts.
    pub(super) fn session_ended(&self) {
        self.is_connected.store(false, Ordering::Relaxed);
        self.with(|state| {
            state.session = None;
            state.credential_refused = None;
            state.forget_answers();
        });
    }

    /// Takes what the relay says of a document.
    pub(super) fn answered(&self, announced: &proto::Announced) {
        let (relay, version) = (&*self.name, announced.version);
        if self.with(|state| state.accepted.is_some_and(|accepted| version < accepted)) {
            // A lane that came back brings what was said before, on another.
            tracing::debug!(relay, version, "an answer to an older announcement came late");
            return;
        }
        let keeps = self.with(|state| {
            // One that was accepted may be taken out of force.
            if state.accepted == Some(version) {
                state.accepted = None;
                state.addresses.clear();
            }
            let keeps = state.accepted;
            if announced.accepted {
                state.accepted = Some(version);
                state.addresses.clone_from(&announced.addresses);
            }
            state.refused.clone_from(&announced.reasons);
            state.waiting = announced.waiting;
            state.notes.clone_from(&announced.notes);
            if !announced.accepted && state.refused.is_empty() {
                state.refused.push("the relay gave no reason".to_owned());
            }
            keeps
        });
        let reasons = announced.reasons.join("; ");
        match keeps {
            _ if announced.accepted => {
                let addresses = told(&announced.addresses);
                tracing::info!(relay, version, addresses, "announcement accepted");
            }
            _ if announced.waiting => tracing::warn!(
                relay,
                version,
                reasons,
                "announcement waits: it is in force as soon as others give up what it takes"
            ),
            Some(last) => tracing::error!(
                relay,
                version,
                reasons,
                last,
                "announcement refused: the relay keeps the last one"
            ),
            None => tracing::error!(
                relay,
                version,
                reasons,
                "announcement refused: the relay serves nothing of this sidecar"
            ),
        }
        for note in &announced.notes {
            tracing::warn!(relay, version, note, "the relay notes of the announcement");
        }
    }

    /// Whether there is a session in which the relay has not accepted this document.
    pub(super) fn is_to_accept(&self, version: u64) -> bool {
        self.with(|state| state.session.is_some() && state.accepted != Some(version))
    }

    /// Whether the relay has let us in, and has not forgotten it.
    pub(super) fn has_session(&self) -> bool {
        self.with(|state| state.session.is_some())
    }

    /// Why the relay refuses the newest document that it has answered; `None`: it does not.
    pub(super) fn refusal(&self) -> Option<String> {
        self.with(|state| (!state.refused.is_empty()).then(|| state.refused.join("; ")))
    }

    /// Whether the newest document waits for others to give up what it takes.
    pub(super) fn waits(&self) -> bool {
        self.with(|state| state.waiting)
    }

    pub(super) fn answer(&self) -> RelayAnswer {
        self.with(|state| RelayAnswer {
            relay: self.name.clone(),
            is_connected: self.is_connected(),
            accepted: state.accepted,
            refused: state.refused.clone(),
            notes: state.notes.clone(),
            addresses: state.addresses.clone(),
            last_error: state.last_error.clone(),
        })
    }

    /// What the admin page says of it.
    pub fn describe(&self) -> serde_json::Value {
        self.with(|state| {
            serde_json::json!({
                "relay": &*self.relay,
                "address": self.address.map(|address| address.to_string()),
                "told_by": self.told_by.as_deref(),
                "connected": self.is_connected(),
                "tls": state.session.as_ref().map(|session| session.tls),
                "epoch": state.session.as_ref().map(|session| session.epoch),
                "leaving": state.session.as_ref().map(|session| session.leaving),
                "connected_for_seconds": state.session.as_ref().map(|s| s.since.elapsed().as_secs()),
                "lanes": state.lanes.iter().map(|link| link.describe()).collect::<Vec<_>>(),
                "announcement_accepted": state.accepted,
                "announcement_refused": state.refused,
                "announcement_waits": state.waiting,
                "announcement_notes": state.notes,
                "addresses": state.addresses,
                "credential_refused": state.credential_refused,
                "last_error": state.last_error,
            })
        })
    }
}

/// `http://a.example.org/, http://b.example.org/ and 3 more`; `None`: there are none.
fn told(addresses: &[String]) -> Option<String> {
    let shown = addresses.get(..ADDRESSES_TOLD_MAX).unwrap_or(addresses);
    let text = shown.join(", ");
    match addresses.len() - shown.len() {
        _ if shown.is_empty() => None,
        0 => Some(text),
        more => Some(format!("{text} and {more} more")),
    }
}

impl PeerState {
    fn forget_answers(&mut self) {
        self.accepted = None;
        self.refused.clear();
        self.waiting = false;
        self.notes.clear();
        self.addresses.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(version: u64, reasons: &[&str], notes: &[&str]) -> proto::Announced {
        let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
        proto::Announced {
            version,
            accepted: reasons.is_empty(),
            reasons: texts(reasons),
            notes: texts(notes),
            addresses: Vec::new(),
            waiting: false,
        }
    }

    #[test]
    fn a_refusal_stands_until_a_document_is_accepted_or_the_session_ends() {
        let peer = Peer::new("relay.example.org:9081".into(), None);
        assert_eq!(peer.refusal(), None);
        peer.answered(&answer(1, &[], &["route a: ours wins"]));
        let page = peer.describe();
        assert_eq!(page["announcement_accepted"], 1);
        assert_eq!(page["announcement_notes"][0], "route a: ours wins");
        peer.answered(&answer(2, &["route a: taken", "route b: taken"], &[]));
        assert_eq!(peer.refusal().as_deref(), Some("route a: taken; route b: taken"));
        let page = peer.describe();
        assert_eq!(page["announcement_accepted"], 1, "it keeps the last one");
        assert_eq!(page["announcement_refused"][1], "route b: taken");
        peer.answered(&answer(3, &[], &[]));
        assert_eq!(peer.refusal(), None);
        peer.answered(&proto::Announced { accepted: false, ..answer(4, &[], &[]) });
        assert_eq!(peer.refusal().as_deref(), Some("the relay gave no reason"));
        peer.session_ended();
        assert_eq!(peer.refusal(), None);
    }

    /// Lanes bring answers in the order in which they come back.
    #[test]
    fn an_answer_that_comes_late_does_not_undo_a_newer_one() {
        let peer = Peer::new("relay.example.org:9081".into(), None);
        peer.session_begun(1, b"relay".as_slice().into(), false);
        peer.answered(&answer(2, &[], &[]));
        for late in [answer(1, &[], &["late"]), answer(1, &["taken"], &[])] {
            peer.answered(&late);
            assert!(!peer.is_to_accept(2));
            assert_eq!(peer.refusal(), None);
        }
        peer.answered(&answer(2, &["out of force"], &[]));
        assert!(peer.is_to_accept(2));
    }

    #[test]
    fn a_credential_is_shown_until_the_relay_accepts_it() {
        let peer = Peer::new("relay.example.org:9081".into(), None);
        let (old, new): (Arc<[u8]>, Arc<[u8]>) = ((*b"old").into(), (*b"new").into());
        peer.known_by(&old);
        assert!(!peer.is_to_see(&old) && peer.is_to_see(&new));
        assert!(peer.presents(&new));
        assert!(peer.is_to_see(&new), "a lane may be lost with it");
        let answer = |accepted: bool, detail: &str| proto::Authenticated {
            accepted,
            detail: detail.to_owned(),
            expires_ms: 0,
        };
        peer.credential_answered(&answer(false, &"no\n".repeat(1000)));
        assert!(peer.refuses_credential() && peer.is_to_see(&new));
        assert_eq!(peer.known_credential(), Some(old), "for further lanes");
        let told = peer.describe()["credential_refused"].to_string();
        assert!(told.starts_with("\"no\\\\u{a}no") && told.len() < 1000, "{told}");
        assert!(!peer.presents(&new), "once more");
        assert!(peer.refuses_credential(), "until it is accepted");
        peer.credential_answered(&answer(false, ""));
        assert_eq!(peer.describe()["credential_refused"], "the relay gave no reason");
        peer.credential_answered(&answer(true, ""));
        assert!(!peer.refuses_credential() && !peer.is_to_see(&new));
        assert_eq!(peer.known_credential(), None, "the newest");
        assert!(peer.describe()["credential_refused"].is_null());
        // A lane that is let in by it says as much.
        peer.credential_answered(&answer(false, "no"));
        peer.known_by(&new);
        assert!(!peer.refuses_credential() && !peer.is_to_see(&new));
        peer.credential_answered(&answer(false, "no"));
        peer.session_ended();
        assert!(!peer.refuses_credential());
    }

    #[test]
    fn the_log_tells_the_first_addresses() {
        let addresses: Vec<String> = (0..5).map(|index| format!("http://{index}/")).collect();
        assert_eq!(told(&[]), None);
        assert_eq!(told(&addresses[..1]).as_deref(), Some("http://0/"));
        let text = "http://0/, http://1/, http://2/ and 2 more";
        assert_eq!(told(&addresses).as_deref(), Some(text));
    }

    #[test]
    fn an_address_of_a_name_is_dialled_and_named() {
        let address = "192.0.2.1:9081".parse().expect("an address");
        let peer = Peer::new("relay.example.org:9081".into(), Some(address));
        assert_eq!(peer.name, "relay.example.org:9081 at 192.0.2.1:9081");
        assert_eq!(peer.target, "192.0.2.1:9081");
        assert_eq!(peer.describe()["address"], "192.0.2.1:9081");
    }
}
