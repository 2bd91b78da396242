//! An issuer's keys (RFC 7517): from a file's contents, or fetched and kept.
//!
//! One task fetches for an issuer, at its interval and when a handshake misses a key; whoever misses one
//! waits for that task and fetches nothing itself.

use std::sync::Arc;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use jsonwebtoken::jwk::{
    AlgorithmParameters, EllipticCurve, Jwk, KeyAlgorithm, PublicKeyUse, ThumbprintHash,
};
use jsonwebtoken::{Algorithm, DecodingKey};
use serde::Deserialize;
use serde_json::Value as Json;
use tokio::sync::watch;
use tokio::time::Instant;

use super::jwt::ALGORITHMS;
use super::{AuthError, fetch};
use crate::config::credentials::{Issuer, Keys};
use crate::error::chain;
use crate::metrics::Metrics;

/// Most keys of one issuer. Public issuers have two to ten.
const KEYS_MAX: usize = 64;

/// Longest `kid` that is kept.
const KID_BYTES_MAX: usize = 256;

/// Between two fetches, where a token names a key that is not known: anybody can send such tokens.
const MISSED_KEY_PAUSE: Duration = Duration::from_secs(30);

/// First and longest wait after a fetch that failed, while there are no keys at all.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// RFC 7638, by SHA-256.
pub type Thumbprint = [u8; 32];

/// One public key.
#[derive(Clone)]
pub struct Key {
    kid: Option<String>,
    algorithms: Vec<Algorithm>,
    pub(super) decoding: DecodingKey,
    pub(super) thumbprint: Thumbprint,
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Key").field("kid", &self.kid).finish_non_exhaustive()
    }
}

/// Reads a set of keys. Those that cannot check a signature, or can make one, are left out.
///
/// # Errors
/// It is not one, or holds nothing of use.
pub fn parse(text: &str) -> Result<Vec<Key>, String> {
    #[derive(Deserialize)]
    struct Set {
        keys: Vec<Json>,
    }
    let accepted = "(accepted: a set of public keys, as in {\"keys\": [{\"kty\": \"RSA\", …}]})";
    // Not serde's own words: they quote.
    let set: Set = serde_json::from_str(text)
        .map_err(|_| format!("is not a JSON object with a list of keys {accepted}"))?;
    if set.keys.len() > KEYS_MAX {
        let count = set.keys.len();
        return Err(format!("holds {count} keys (accepted: at most {KEYS_MAX})"));
    }
    let keys: Vec<Key> = set.keys.into_iter().filter_map(key).collect();
    if keys.is_empty() {
        let kinds = "RSA, EC on P-256 or P-384, OKP on Ed25519";
        return Err(format!("holds no key that verifies signatures (accepted: {kinds})"));
    }
    Ok(keys)
}

fn key(value: Json) -> Option<Key> {
    let jwk: Jwk = serde_json::from_value(value).ok()?;
    if !matches!(jwk.common.public_key_use, None | Some(PublicKeyUse::Signature)) {
        return None;
    }
    let fits: &[Algorithm] = match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => &ALGORITHMS[..6],
        AlgorithmParameters::EllipticCurve(key) => match key.curve {
            EllipticCurve::P256 => &[Algorithm::ES256],
            EllipticCurve::P384 => &[Algorithm::ES384],
            _ => return None,
        },
        AlgorithmParameters::OctetKeyPair(key) if key.curve == EllipticCurve::Ed25519 => {
            &[Algorithm::EdDSA]
        }
        _ => return None,
    };
    let algorithms: Vec<Algorithm> = match jwk.common.key_algorithm {
        None => fits.to_vec(),
        Some(only) => fits.iter().copied().filter(|alg| KeyAlgorithm::from(*alg) == only).collect(),
    };
    let kid = jwk.common.key_id.clone();
    if algorithms.is_empty() || kid.as_ref().is_some_and(|kid| kid.len() > KID_BYTES_MAX) {
        return None;
    }
    let thumbprint = jwk.thumbprint(ThumbprintHash::SHA256).ok()?;
    let thumbprint = {
        use base64::Engine as _;
        base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(thumbprint).ok()?
    };
    Some(Key {
        kid,
        algorithms,
        decoding: DecodingKey::from_jwk(&jwk).ok()?,
        thumbprint: thumbprint.try_into().ok()?,
    })
}

/// An issuer with its keys, as far as they are known.
pub struct IssuerKeys {
    pub(super) issuer: Arc<Issuer>,
    keys: ArcSwapOption<Vec<Key>>,
    /// Told after each fetch, whatever came of it.
    pub(super) fetched: watch::Sender<u64>,
    /// Told when a key is missed.
    missed: watch::Sender<u64>,
    /// When the last fetch ended.
    at: Mutex<Option<Instant>>,
}

impl std::fmt::Debug for IssuerKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IssuerKeys").field("issuer", &self.issuer.name).finish_non_exhaustive()
    }
}

impl IssuerKeys {
    /// Returns an issuer. Keys that are to be fetched are first what `before` has of the same URL, or of
    /// the issuer: who is let in by them is so until it is known which keys there are now.
    pub(super) fn new(issuer: &Arc<Issuer>, before: &[Arc<Self>]) -> Self {
        let keys = match &issuer.keys {
            Keys::Set(text) => match parse(text) {
                Ok(keys) => Some(Arc::new(keys)),
                Err(error) => {
                    // The file was checked when it was read.
                    tracing::error!(issuer = &*issuer.name, error, "keys cannot be read");
                    None
                }
            },
            Keys::Url { url, .. } => {
                let same = before.iter().find(|other| {
                    matches!(&other.issuer.keys, Keys::Url { url: other, .. } if other == url)
                });
                let of_issuer = |other: &&Arc<Self>| {
                    other.issuer.name == issuer.name && other.issuer.issuer == issuer.issuer
                };
                let known = |other: &Arc<Self>| other.keys.load_full();
                same.and_then(known).or_else(|| before.iter().find(of_issuer).and_then(known))
            }
        };
        Self {
            issuer: Arc::clone(issuer),
            keys: ArcSwapOption::new(keys),
            fetched: watch::Sender::new(0),
            missed: watch::Sender::new(0),
            at: Mutex::new(None),
        }
    }

    pub(super) fn is_remote(&self) -> bool {
        matches!(self.issuer.keys, Keys::Url { .. })
    }

    /// How many keys are known.
    pub(super) fn len(&self) -> usize {
        self.keys.load().as_ref().map_or(0, |keys| keys.len())
    }

    pub(super) fn has(&self, key: &Thumbprint) -> bool {
        let keys = self.keys.load();
        keys.as_ref().is_some_and(|keys| keys.iter().any(|known| known.thumbprint == *key))
    }

    /// Returns the keys that a token of this `kid` may be signed with, never none.
    pub(super) async fn find(
        &self,
        kid: Option<&str>,
        algorithm: Algorithm,
    ) -> Result<Vec<Key>, AuthError> {
        // Before the look, so that no fetch that ends meanwhile is missed.
        let mut fetched = self.fetched.subscribe();
        let found = self.known(kid, algorithm);
        if !found.is_empty() {
            return Ok(found);
        }
        if !self.is_remote() {
            return Err(AuthError::UnknownKey);
        }
        self.missed.send_modify(|count| *count = count.wrapping_add(1));
        let is_known = self.keys.load().is_some();
        let at = *self.at.lock().unwrap_or_else(PoisonError::into_inner);
        if is_known && at.is_some_and(|at| at.elapsed() < MISSED_KEY_PAUSE) {
            return Err(AuthError::UnknownKey);
        }
        // The sender is ours, so this does not fail; the time is the caller's to bound.
        let _ = fetched.changed().await;
        let found = self.known(kid, algorithm);
        match found.is_empty() {
            false => Ok(found),
            true if self.keys.load().is_some() => Err(AuthError::UnknownKey),
            true => Err(AuthError::KeysUnavailable),
        }
    }

    fn known(&self, kid: Option<&str>, algorithm: Algorithm) -> Vec<Key> {
        let keys = self.keys.load();
        let keys = keys.as_ref().map_or(&[][..], |keys| keys.as_slice());
        let fits = |key: &&Key| {
            key.algorithms.contains(&algorithm)
                && kid.is_none_or(|kid| key.kid.as_deref() == Some(kid))
        };
        keys.iter().filter(fits).cloned().collect()
    }

    /// Fetches the keys, now and again; `changed` is told when they are others.
    pub(super) async fn keep(self: Arc<Self>, metrics: Arc<Metrics>, changed: watch::Sender<()>) {
        let Keys::Url { url, authorities, token_file, interval } = &self.issuer.keys else {
            return;
        };
        let source = fetch::Source { url, authorities: authorities.as_ref(), token_file };
        let mut missed = self.missed.subscribe();
        let mut retry = RETRY_MIN;
        loop {
            let fetched = source.fetch().await;
            let fetched = fetched.and_then(|text| parse(&text).map_err(fetch::FetchError::Content));
            let name = &self.issuer.name;
            metrics.credentials.fetched(name, fetched.is_ok());
            let wait = match fetched {
                Ok(keys) => {
                    retry = RETRY_MIN;
                    metrics.credentials.set_keys(name, keys.len());
                    if self.store(keys) {
                        tracing::info!(
                            issuer = &**name,
                            keys = self.len(),
                            "an issuer's keys are known"
                        );
                        changed.send_replace(());
                    }
                    *interval
                }
                Err(error) => {
                    tracing::warn!(
                        issuer = &**name,
                        url = &**url,
                        error = chain(&error),
                        keys = self.len(),
                        "an issuer's keys cannot be fetched; those that are known stay"
                    );
                    let wait = retry.min(*interval);
                    retry = (retry * 2).min(RETRY_MAX);
                    wait
                }
            };
            *self.at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
            missed.borrow_and_update();
            self.fetched.send_modify(|count| *count = count.wrapping_add(1));
            let asked = async {
                tokio::time::sleep(MISSED_KEY_PAUSE).await;
                // This task holds the sender too.
                let _ = missed.changed().await;
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = asked => {}
            }
        }
    }

    /// Whether they are others than before.
    fn store(&self, keys: Vec<Key>) -> bool {
        let thumbprints = |keys: &[Key]| -> Vec<(Thumbprint, Option<String>)> {
            let mut all: Vec<_> =
                keys.iter().map(|key| (key.thumbprint, key.kid.clone())).collect();
            all.sort();
            all
        };
        let after = thumbprints(&keys);
        let before = self.keys.swap(Some(Arc::new(keys)));
        before.is_none_or(|before| thumbprints(&before) != after)
    }
}
