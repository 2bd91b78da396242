//! The certificates that are at hand: from storage or just obtained, and shown to clients by way of
//! [`Issued`].

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use super::Settings;
use super::schedule::renew_at;
use super::storage::Storage;
use crate::config::tls::Certificate;
use crate::error::chain;
use crate::metrics::Metrics;
use crate::random;
use crate::tls::{Issued, certified_key};

/// Shared by who sets what is wanted and by who obtains it.
pub(super) struct Shelf {
    pub(super) issued: Arc<Issued>,
    pub(super) metrics: Arc<Metrics>,
    /// By name: what is wanted, and what is there of it.
    held: Mutex<HashMap<Arc<str>, Option<Held>>>,
}

struct Held {
    certificate: Arc<Certificate>,
    renew_at: SystemTime,
}

impl Shelf {
    pub(super) fn new(issued: Arc<Issued>, metrics: Arc<Metrics>) -> Self {
        Self { issued, metrics, held: Mutex::default() }
    }

    /// Takes what is wanted, in place of `before`: what the storage has is shown from here on, what is
    /// not wanted any more is not. A certificate of another authority is shown until the new one has
    /// signed.
    pub(super) fn want(&self, before: Option<&Settings>, wanted: Option<&Settings>) {
        let mut held = self.lock();
        let names = wanted.map_or(&[][..], |settings| &settings.names);
        held.retain(|name, _| {
            let stays = names.iter().any(|wanted| wanted.name == *name);
            if !stays {
                self.metrics.acme.set_expiry(name, None);
            }
            stays
        });
        if let Some(settings) = wanted {
            let storage = Storage::of(&settings.acme);
            let is_other = before.is_some_and(|before| Storage::of(&before.acme) != storage);
            for name in names.iter().map(|wanted| &wanted.name) {
                if held.contains_key(name) && !is_other {
                    continue;
                }
                let found = load(&storage, name);
                let slot = held.entry(Arc::clone(name)).or_default();
                match (found, slot) {
                    (Some(found), slot) => *slot = Some(self.hold(name, found)),
                    (None, Some(old)) => old.renew_at = UNIX_EPOCH,
                    (None, None) => {
                        tracing::info!(
                            name = &**name,
                            "no certificate yet: TLS handshakes for the name fail until one is obtained"
                        );
                    }
                }
            }
        }
        self.show(&held);
    }

    /// Takes a certificate that was obtained. Returns whether it is still wanted.
    pub(super) fn put(&self, name: &Arc<str>, certificate: Certificate) -> bool {
        let mut held = self.lock();
        let Some(slot) = held.get_mut(name) else { return false };
        *slot = Some(self.hold(name, certificate));
        self.show(&held);
        true
    }

    /// When a name's certificate is to be ordered; the past where there is none.
    pub(super) fn renew_at(&self, name: &str) -> SystemTime {
        let held = self.lock();
        held.get(name).and_then(Option::as_ref).map_or(UNIX_EPOCH, |held| held.renew_at)
    }

    /// When a name's certificate ends; `None`: there is none.
    pub(super) fn expires(&self, name: &str) -> Option<SystemTime> {
        let held = self.lock();
        held.get(name).and_then(Option::as_ref).map(|held| held.certificate.not_after)
    }

    fn hold(&self, name: &Arc<str>, certificate: Certificate) -> Held {
        self.metrics.acme.set_expiry(name, Some(certificate.not_after));
        let renew_at = renew_at(certificate.not_before, certificate.not_after, random::number());
        Held { certificate: Arc::new(certificate), renew_at }
    }

    fn show(&self, held: &HashMap<Arc<str>, Option<Held>>) {
        let before = self.issued.certificates.load();
        let key = |name: &Arc<str>, certificate: &Certificate| {
            let known = before.get(name).filter(|known| *known.cert == *certificate.chain);
            // It was read with its key, so that this holds.
            known.cloned().or_else(|| certified_key(certificate).ok())
        };
        let shown = held.iter().filter_map(|(name, held)| {
            Some((Arc::clone(name), key(name, &held.as_ref()?.certificate)?))
        });
        self.issued.certificates.store(Arc::new(shown.collect()));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Arc<str>, Option<Held>>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns what the storage has for a name; nothing where that is damaged or has ended.
pub(super) fn load(storage: &Storage, name: &str) -> Option<Certificate> {
    match storage.certificate(name) {
        Ok(certificate) => certificate.filter(|found| found.not_after > SystemTime::now()),
        Err(error) => {
            let error = chain(&error);
            tracing::warn!(
                name,
                error,
                "the certificate that is kept cannot be used: it is obtained anew"
            );
            None
        }
    }
}
