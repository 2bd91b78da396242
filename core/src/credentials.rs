//! Who a sidecar is: what it presents, against what the relay's configuration knows.
//!
//! Knows credentials and claims; knows no sessions. Whoever holds an [`Authenticated`] asks
//! [`Authenticator::regrant`] again whenever the configuration has changed, or an issuer's keys have.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use rustls::pki_types::CertificateDer;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use tokio::sync::watch;

use crate::config::Secret;
use crate::config::credentials::{Claims, Credentials, Principal};
use crate::config::tls::Authorities;
use crate::metrics::Metrics;
use crate::random;

mod certificate;
mod claims;
mod error;
mod fetch;
pub mod jwks;
mod jwt;

pub use claims::{NOT_TUNNEL, is_one_of, why_not_route, why_not_tunnel};
pub use error::AuthError;

use claims::Placeholders;
use jwks::IssuerKeys;
use jwt::Signed;

/// Principal of those who come over loopback to a relay that knows no credentials.
const LOCAL: &str = "local";

/// Principal of this process's own sidecar.
const EMBEDDED: &str = "embedded";

/// Principal of those who present `relay.tunnel.token`.
const TOKEN: &str = "token";

/// What a relay's configuration knows.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// `relay.tunnel.token`: whoever presents it may claim everything.
    pub token: Option<Secret>,
    /// `relay.credentials`.
    pub credentials: Credentials,
    /// Who signs certificates of sidecars.
    pub authorities: Option<Authorities>,
    /// How long a handshake waits for an issuer's keys.
    pub wait: Duration,
}

/// What a sidecar presents.
#[derive(Clone, Copy)]
pub struct Presented<'a> {
    /// Of its hello; may be empty.
    pub credential: &'a [u8],
    /// Its certificate's chain, verified in the handshake; empty: none.
    pub chain: &'a [CertificateDer<'static>],
    /// Where it comes from.
    pub peer: IpAddr,
    /// Where it came in.
    pub local: IpAddr,
}

impl fmt::Debug for Presented<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Presented").field("peer", &self.peer).finish_non_exhaustive()
    }
}

/// What a sidecar was let in by, kept to look again.
#[derive(Clone)]
pub enum Proof {
    /// Both ends are on loopback, and the relay knows no credentials.
    Loopback,
    /// It is this process's own.
    Embedded,
    /// Hash of a token.
    Token([u8; 32]),
    /// A client certificate's chain, and the name in it that fits.
    Certificate(Arc<[CertificateDer<'static>]>, Arc<str>),
    /// What a signed token says. The token itself is not kept.
    Jwt(Arc<Signed>),
}

impl fmt::Debug for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// For people: what it was, never its secret.
impl fmt::Display for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loopback => f.write_str("loopback"),
            Self::Embedded => f.write_str("embedded"),
            // Enough to tell the hashes of a file apart; of a token of random bits it says nothing.
            Self::Token([a, b, c, d, ..]) => {
                write!(f, "token sha256:{a:02x}{b:02x}{c:02x}{d:02x}…")
            }
            Self::Certificate(_, name) => write!(f, "certificate {}", crate::error::visible(name)),
            Self::Jwt(signed) => {
                write!(f, "jwt {} {}", signed.issuer, crate::error::visible(&signed.subject))
            }
        }
    }
}

/// Who it is, and what it may claim.
#[derive(Debug, PartialEq, Eq)]
pub struct Grant {
    /// The principal's name. Where its claims hold placeholders, with what stands for them, since each
    /// who fits is another principal then: `cluster/shop/web`.
    pub principal: Arc<str>,
    /// What it may claim.
    pub claims: Claims,
}

impl Grant {
    /// The grant of one who may do nothing any more.
    #[must_use]
    pub fn withdrawn(&self) -> Self {
        Self { principal: Arc::clone(&self.principal), claims: Claims::default() }
    }
}

/// A sidecar that is known.
#[derive(Clone, Debug)]
pub struct Authenticated {
    /// Who it is. The same object for as long as it is worth the same.
    pub grant: Arc<Grant>,
    /// By what.
    pub proof: Proof,
    /// When what was presented ends; `None`: never.
    pub expires: Option<SystemTime>,
}

impl Authenticated {
    /// For people: what it was let in by, never its secret.
    #[must_use]
    pub fn credential(&self) -> String {
        match self.proof {
            // `relay.tunnel.token` may be a word of somebody's own, of which not even a hash is shown.
            Proof::Token(_) if *self.grant.principal == *TOKEN => "token".to_owned(),
            ref proof => proof.to_string(),
        }
    }

    /// Returns whether what was presented has ended.
    #[must_use]
    pub fn is_expired(&self, now: SystemTime) -> bool {
        self.expires.is_some_and(|expires| expires <= now)
    }
}

/// What was presented and is nobody's.
#[derive(Debug)]
pub struct Refused {
    /// Why.
    pub error: AuthError,
    /// What it was, to look again when the rules are others: a token's hash, or what a signed token says
    /// whose signature is good. The credential itself is not kept.
    pub proof: Option<Proof>,
}

/// The rules in force, with the keys of their issuers.
#[derive(Debug, Default)]
struct State {
    rules: Rules,
    /// In the order of `rules.credentials.issuers`.
    issuers: Vec<Arc<IssuerKeys>>,
}

/// Decides who is let in.
pub struct Authenticator {
    state: ArcSwap<State>,
    metrics: Arc<Metrics>,
    /// Told whenever the rules are others.
    rules_changed: watch::Sender<()>,
    /// Told whenever an issuer's keys are others.
    keys_changed: watch::Sender<()>,
    /// Hash of what this process's own sidecar presents.
    embedded: [u8; 32],
    /// That itself.
    embedded_token: Secret,
}

impl fmt::Debug for Authenticator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authenticator").finish_non_exhaustive()
    }
}

impl Authenticator {
    /// Returns one of these rules. Keys by URL are there once [`Authenticator::keep_keys`] runs.
    #[must_use]
    pub fn new(rules: Rules, metrics: Arc<Metrics>) -> Self {
        let embedded_token: String =
            random::bytes::<32>().iter().map(|byte| format!("{byte:02x}")).collect();
        let authenticator = Self {
            state: ArcSwap::default(),
            metrics,
            rules_changed: watch::Sender::new(()),
            keys_changed: watch::Sender::new(()),
            embedded: hash(embedded_token.as_bytes()),
            embedded_token: Secret::new(&embedded_token),
        };
        authenticator.set(rules);
        authenticator
    }

    /// Takes other rules, for whoever comes from here on. Keys that are known stay until those of another
    /// URL have been fetched.
    pub fn set(&self, rules: Rules) {
        let before = self.state.load();
        let issuers = rules.credentials.issuers.iter().map(|issuer| {
            let same = before.issuers.iter().find(|keys| keys.issuer == *issuer);
            same.map_or_else(|| Arc::new(IssuerKeys::new(issuer, &before.issuers)), Arc::clone)
        });
        let issuers: Vec<_> = issuers.collect();
        for gone in &before.issuers {
            if !issuers.iter().any(|keys| keys.issuer.name == gone.issuer.name) {
                self.metrics.credentials.forget_issuer(&gone.issuer.name);
            }
        }
        for keys in &issuers {
            self.metrics.credentials.set_keys(&keys.issuer.name, keys.len());
        }
        self.state.store(Arc::new(State { rules, issuers }));
        self.rules_changed.send_replace(());
    }

    /// What this process's own sidecar presents.
    #[must_use]
    pub fn embedded_token(&self) -> &Secret {
        &self.embedded_token
    }

    /// Told whenever an issuer's keys are others: what was let in by them is to be looked at again.
    #[must_use]
    pub fn keys_changed(&self) -> watch::Receiver<()> {
        self.keys_changed.subscribe()
    }

    /// Finds out who presents this. Takes at most [`Rules::wait`].
    ///
    /// # Errors
    /// It is nobody who is known.
    pub async fn authenticate(&self, presented: Presented<'_>) -> Result<Authenticated, AuthError> {
        self.authenticate_or_keep(presented).await.map_err(|refused| refused.error)
    }

    /// As [`Authenticator::authenticate`], with what may be looked at again of what is refused.
    ///
    /// # Errors
    /// It is nobody who is known.
    pub async fn authenticate_or_keep(
        &self,
        presented: Presented<'_>,
    ) -> Result<Authenticated, Refused> {
        let state = self.state.load_full();
        let result = match self.proof(&state, presented).await {
            // Others may be in force by now.
            Ok(proof) => self.grant(&proof).map_err(|error| (error, Some(proof))),
            Err(error) => Err((error, None)),
        };
        result.map_err(|(error, proof)| {
            self.metrics.credentials.refused(error.label());
            Refused { error, proof }
        })
    }

    /// Returns what a proof is worth now.
    ///
    /// # Errors
    /// Nothing, and why.
    pub fn grant(&self, proof: &Proof) -> Result<Authenticated, AuthError> {
        let known = self.judge(&self.state.load(), proof, None)?;
        if known.is_expired(SystemTime::now()) {
            return Err(AuthError::Expired);
        }
        Ok(known)
    }

    /// Returns what somebody who was let in is worth now; the grant is the same object where it is the
    /// same. Whether it has expired is the caller's to ask.
    ///
    /// # Errors
    /// Nothing any more, and why.
    pub fn regrant(&self, before: &Authenticated) -> Result<Authenticated, AuthError> {
        self.judge(&self.state.load(), &before.proof, Some(&before.grant))
    }

    fn judge(
        &self,
        state: &State,
        proof: &Proof,
        before: Option<&Arc<Grant>>,
    ) -> Result<Authenticated, AuthError> {
        let rules = &state.rules;
        let (grant, expires) = match proof {
            Proof::Loopback if is_open(rules) => (everything(LOCAL), None),
            Proof::Loopback => return Err(AuthError::Missing),
            Proof::Embedded => (everything(EMBEDDED), None),
            Proof::Token(presented) => (token_grant(rules, presented)?, None),
            Proof::Certificate(chain, _) => {
                let known = certificate::find(rules, chain)?;
                let grant = known.principal.grant(known.placeholders.as_ref());
                (grant, Some(known.not_after))
            }
            Proof::Jwt(signed) => {
                let (principal, expires) = jwt::find(rules, &state.issuers, signed)?;
                (principal.grant(signed.placeholders().as_ref()), Some(expires))
            }
        };
        let grant = match before {
            Some(before) if **before == grant => Arc::clone(before),
            _ => Arc::new(grant),
        };
        Ok(Authenticated { grant, proof: proof.clone(), expires })
    }

    async fn proof(&self, state: &State, presented: Presented<'_>) -> Result<Proof, AuthError> {
        let rules = &state.rules;
        let presented_hash = hash(presented.credential);
        if is_same(&presented_hash, &self.embedded) {
            return Ok(Proof::Embedded);
        }
        if is_open(rules) {
            let is_local = |address: IpAddr| address.to_canonical().is_loopback();
            return if is_local(presented.peer) && is_local(presented.local) {
                Ok(Proof::Loopback)
            } else {
                Err(AuthError::LoopbackOnly)
            };
        }
        // What is presented and wrong is refused, whatever certificate is there beside it.
        if presented.credential.is_empty() {
            if presented.chain.is_empty() {
                return Err(AuthError::Missing);
            }
            let known = certificate::find(rules, presented.chain)?;
            return Ok(Proof::Certificate(presented.chain.into(), known.name));
        }
        if !state.issuers.is_empty()
            && let Some(token) = jwt::Token::parse(presented.credential)
        {
            let verified = jwt::verify(&token, &state.issuers);
            let verified = tokio::time::timeout(rules.wait, verified).await;
            let signed = verified.unwrap_or(Err(AuthError::KeysUnavailable))?;
            return Ok(Proof::Jwt(Arc::new(signed)));
        }
        Ok(Proof::Token(presented_hash))
    }

    /// Fetches keys of issuers by URL, now and again, until `stopping` turns true.
    pub async fn keep_keys(self: Arc<Self>, mut stopping: watch::Receiver<bool>) {
        let mut rules_changed = self.rules_changed.subscribe();
        let mut tasks: Vec<(Arc<IssuerKeys>, tokio::task::JoinHandle<()>)> = Vec::new();
        loop {
            rules_changed.borrow_and_update();
            let state = self.state.load_full();
            let is_known = |keys: &Arc<IssuerKeys>, all: &[Arc<IssuerKeys>]| {
                all.iter().any(|other| Arc::ptr_eq(other, keys))
            };
            tasks.retain(|(keys, task)| {
                let is_wanted = is_known(keys, &state.issuers);
                if !is_wanted {
                    task.abort();
                }
                is_wanted
            });
            for keys in state.issuers.iter().filter(|keys| keys.is_remote()) {
                if !tasks.iter().any(|(other, _)| Arc::ptr_eq(other, keys)) {
                    let (metrics, changed) = (Arc::clone(&self.metrics), self.keys_changed.clone());
                    let task = tokio::spawn(Arc::clone(keys).keep(metrics, changed));
                    tasks.push((Arc::clone(keys), task));
                }
            }
            drop(state);
            tokio::select! {
                _ = rules_changed.changed() => {}
                _ = stopping.wait_for(|stopping| *stopping) => break,
            }
        }
        for (_, task) in tasks {
            task.abort();
        }
    }
}

fn everything(principal: &str) -> Grant {
    Grant { principal: principal.into(), claims: Claims::everything() }
}

fn token_grant(rules: &Rules, presented: &[u8; 32]) -> Result<Grant, AuthError> {
    let shorthand = rules.token.as_ref().map(|token| hash(token.expose().as_bytes()));
    if shorthand.is_some_and(|token| is_same(&token, presented)) {
        return Ok(everything(TOKEN));
    }
    let has_it = |principal: &&Arc<Principal>| {
        principal.tokens.iter().any(|token| is_same(&token.0, presented))
    };
    let found = rules.credentials.principals.iter().find(has_it).ok_or(AuthError::UnknownToken)?;
    Ok(found.grant(None))
}

impl Principal {
    /// What it is granted, with `placeholders` in its claims.
    fn grant(&self, placeholders: Option<&Placeholders>) -> Grant {
        let principal = match placeholders {
            Some(Placeholders { namespace, service_account })
                if claims::has_placeholders(&self.claims) =>
            {
                format!("{}/{namespace}/{service_account}", self.name).into()
            }
            _ => Arc::clone(&self.name),
        };
        Grant { principal, claims: claims::filled(&self.claims, placeholders) }
    }
}

/// Whether nobody is asked who they are.
fn is_open(rules: &Rules) -> bool {
    rules.token.is_none() && rules.credentials.principals.is_empty()
}

/// Compared in place of what was presented.
fn hash(text: &[u8]) -> [u8; 32] {
    Sha256::digest(text).into()
}

/// In a time that says nothing of where the two differ.
fn is_same(a: &[u8; 32], b: &[u8; 32]) -> bool {
    a.ct_eq(b).into()
}

#[cfg(test)]
mod tests;
