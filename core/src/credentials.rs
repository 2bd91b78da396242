//! Who a sidecar is: what it presents, against what the relay's configuration knows.
//!
//! Knows credentials and claims; knows no sockets and no sessions. Whoever holds an [`Authenticated`]
//! asks [`Authenticator::regrant`] again whenever the configuration has changed.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use rustls::pki_types::CertificateDer;
use sha2::{Digest as _, Sha256};
use sidelane_tunnel::proto;
use thiserror::Error;

use crate::config::Secret;
use crate::config::credentials::{Claims, Credentials, TokenHash};
use crate::config::tls::Authorities;
use crate::random;

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

/// What a sidecar was let in by, kept to look again.
#[derive(Clone)]
pub enum Proof {
    /// Both ends are on loopback, and the relay knows no credentials.
    Loopback,
    /// It is this process's own.
    Embedded,
    /// Hash of a token.
    Token([u8; 32]),
}

impl fmt::Debug for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Loopback => "loopback",
            Self::Embedded => "embedded",
            Self::Token(_) => "token",
        })
    }
}

/// Who it is, and what it may claim.
#[derive(Debug, PartialEq, Eq)]
pub struct Grant {
    /// The principal's name.
    pub principal: Arc<str>,
    /// What it may claim.
    pub claims: Claims,
    /// When what was presented ends; `None`: never.
    pub expires: Option<SystemTime>,
}

/// A sidecar that is known.
#[derive(Clone, Debug)]
pub struct Authenticated {
    /// Who it is.
    pub grant: Arc<Grant>,
    /// By what.
    pub proof: Proof,
}

/// Why nobody is let in by what was presented. Says nothing of what it was.
#[derive(Debug, Error)]
pub enum AuthError {
    /// No credential at all.
    #[error(
        "this relay wants a credential and the hello has none; set sidecar.token, token_file or token_env"
    )]
    Missing,
    /// Not one that is known.
    #[error("the credential is not one that this relay accepts")]
    Unknown,
    /// The relay knows none.
    #[error("this relay knows no credentials, so it accepts sidecars over loopback only")]
    LoopbackOnly,
}

impl AuthError {
    /// What the sidecar is told.
    #[must_use]
    pub fn refusal(&self) -> proto::Refuse {
        proto::Refuse {
            reason: proto::RefuseReason::Credential.into(),
            detail: self.to_string(),
            retry_after_ms: 0,
        }
    }
}

/// Decides who is let in.
#[derive(Debug)]
pub struct Authenticator {
    rules: ArcSwap<Rules>,
    /// Hash of what this process's own sidecar presents.
    embedded: [u8; 32],
    /// That itself.
    embedded_token: Secret,
}

impl Authenticator {
    /// Returns one of these rules.
    #[must_use]
    pub fn new(rules: Rules) -> Self {
        let embedded_token: String =
            random::bytes::<32>().iter().map(|byte| format!("{byte:02x}")).collect();
        Self {
            rules: ArcSwap::from_pointee(rules),
            embedded: hash(embedded_token.as_bytes()),
            embedded_token: Secret::new(&embedded_token),
        }
    }

    /// Takes other rules, for whoever comes from here on.
    pub fn set(&self, rules: Rules) {
        self.rules.store(Arc::new(rules));
    }

    /// What this process's own sidecar presents.
    #[must_use]
    pub fn embedded_token(&self) -> &Secret {
        &self.embedded_token
    }

    /// Finds out who presents this.
    ///
    /// # Errors
    /// It is nobody who is known.
    pub async fn authenticate(&self, presented: Presented<'_>) -> Result<Authenticated, AuthError> {
        let proof = self.proof(presented)?;
        match self.regrant(&proof) {
            Some(grant) => Ok(Authenticated { grant, proof }),
            None => Err(AuthError::Unknown),
        }
    }

    /// Returns what a proof is worth now; `None`: nothing any more.
    #[must_use]
    pub fn regrant(&self, proof: &Proof) -> Option<Arc<Grant>> {
        let rules = self.rules.load();
        let grant = |principal: &str, claims| {
            Arc::new(Grant { principal: principal.into(), claims, expires: None })
        };
        match proof {
            Proof::Loopback => is_open(&rules).then(|| grant(LOCAL, Claims::everything())),
            Proof::Embedded => Some(grant(EMBEDDED, Claims::everything())),
            Proof::Token(presented) => {
                let token = rules.token.as_ref().map(|token| hash(token.expose().as_bytes()));
                if token.is_some_and(|token| token == *presented) {
                    return Some(grant(TOKEN, Claims::everything()));
                }
                // Hashes: how far two of them agree says nothing of a token.
                let found = rules
                    .credentials
                    .principals
                    .iter()
                    .find(|principal| principal.tokens.contains(&TokenHash(*presented)))?;
                Some(grant(&found.name, found.claims.clone()))
            }
        }
    }

    fn proof(&self, presented: Presented<'_>) -> Result<Proof, AuthError> {
        let rules = self.rules.load();
        let presented_hash = hash(presented.credential);
        if presented_hash == self.embedded {
            return Ok(Proof::Embedded);
        }
        if is_open(&rules) {
            let is_local = |address: IpAddr| address.to_canonical().is_loopback();
            return if is_local(presented.peer) && is_local(presented.local) {
                Ok(Proof::Loopback)
            } else {
                Err(AuthError::LoopbackOnly)
            };
        }
        if presented.credential.is_empty() {
            return Err(AuthError::Missing);
        }
        Ok(Proof::Token(presented_hash))
    }
}

/// Whether nobody is asked who they are.
fn is_open(rules: &Rules) -> bool {
    rules.token.is_none() && rules.credentials.principals.is_empty()
}

/// Compared in place of what was presented: the time it takes says nothing of where the two differ.
fn hash(text: &[u8]) -> [u8; 32] {
    Sha256::digest(text).into()
}
