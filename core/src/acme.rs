//! Certificates by ACME (RFC 8555): obtained and renewed while the relay runs.
//!
//! Decides what is ordered when, and keeps what it got; who shows it, and the proofs meanwhile, to
//! clients and to the authority finds them in [`Issued`].

use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use instant_acme::Account;
use tokio::sync::watch;

use crate::config::{self, tls};
use crate::metrics::Metrics;
use crate::tls::Issued;

mod account;
mod client;
mod failure;
mod keeper;
mod order;
mod schedule;
mod shelf;
mod storage;

use client::Client;
use failure::{Failure, Step};
use keeper::{Authority, Keeper, Obtained, Obtaining};
use order::Kind;
use shelf::Shelf;
use storage::Storage;

/// Where an authority looks for a proof by TLS (RFC 8737 §3).
const HTTPS_PORT: u16 = 443;

/// What is to be obtained, and from whom.
#[derive(Debug, PartialEq, Eq)]
struct Settings {
    acme: tls::Acme,
    names: Vec<Wanted>,
}

/// A name.
#[derive(Debug, PartialEq, Eq)]
struct Wanted {
    name: Arc<str>,
    /// How it is proved, the likeliest first; never empty.
    kinds: Vec<Kind>,
}

impl Settings {
    /// Returns what a relay wants; `None`: nothing.
    fn of(section: &config::Relay) -> Option<Self> {
        let acme = section.acme.clone()?;
        let mut names: Vec<Wanted> = Vec::new();
        // Those that answer HTTP.
        let has_plain = section.listeners.iter().any(|listener| {
            listener.tls.is_none() && !matches!(listener.carries, config::Carries::Type(_))
        });
        let ends = section.listeners.iter().map(|listener| (listener.address, &listener.tls));
        let tunnel = section.tunnel.address.map(|address| (address, &section.tunnel.tls));
        for (address, tls) in ends.chain(tunnel) {
            let kinds = kinds(has_plain, address.port() == HTTPS_PORT);
            for name in tls.iter().flat_map(|tls| &tls.acme) {
                match names.iter_mut().find(|wanted| wanted.name == *name) {
                    None => names.push(Wanted { name: Arc::clone(name), kinds: kinds.clone() }),
                    Some(wanted) if address.port() == HTTPS_PORT => wanted.kinds.clone_from(&kinds),
                    Some(_) => {}
                }
            }
        }
        (!names.is_empty()).then_some(Self { acme, names })
    }
}

/// The ways to prove a name: by TLS first where clients come in at its port, by HTTP first elsewhere, and
/// not at all where nobody would answer. Where the first fails the other is tried: ports are forwarded.
fn kinds(has_plain: bool, is_at_port: bool) -> Vec<Kind> {
    match (has_plain, is_at_port) {
        (false, _) => vec![Kind::TlsAlpn],
        (true, true) => vec![Kind::TlsAlpn, Kind::Http],
        (true, false) => vec![Kind::Http, Kind::TlsAlpn],
    }
}

/// Keeps a relay's certificates by ACME.
pub struct Acme {
    shelf: Arc<Shelf>,
    wanted: watch::Sender<Option<Arc<Settings>>>,
    /// Held while something is set.
    setting: Mutex<()>,
}

impl Acme {
    /// Returns a keeper of nothing yet.
    #[must_use]
    pub fn new(issued: Arc<Issued>, metrics: Arc<Metrics>) -> Self {
        let shelf = Arc::new(Shelf::new(issued, metrics));
        Self { shelf, wanted: watch::Sender::new(None), setting: Mutex::new(()) }
    }

    /// Takes what a configuration wants. Certificates that are kept for its names are shown when this
    /// returns; those of other names are not any more. Reads files.
    pub fn set(&self, section: &config::Relay) {
        self.want(Settings::of(section));
    }

    /// Ends what is under way, and begins nothing more. What was obtained is shown further on.
    pub fn stop(&self) {
        self.wanted.send_replace(None);
    }

    fn want(&self, settings: Option<Settings>) {
        let _one = self.setting.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.wanted.borrow().clone();
        let settings = settings.map(Arc::new);
        if before == settings {
            return;
        }
        if before.is_none() {
            self.shelf.metrics.acme.begin();
        }
        self.shelf.want(before.as_deref(), settings.as_deref());
        self.wanted.send_replace(settings);
    }

    /// Returns what obtains and renews: to be run once, where there are timers and sockets. Ends when
    /// this is dropped.
    pub fn keep(&self) -> impl Future<Output = ()> + Send + use<> {
        let issued = Arc::clone(&self.shelf.issued);
        let meet = Box::new(move |settings: &Settings| {
            let met = Met::new(settings, &issued)?;
            Ok(Arc::new(met) as Arc<dyn Authority>)
        });
        Keeper::new(Arc::clone(&self.shelf), self.wanted.subscribe(), meet).run()
    }
}

/// The authority that is configured.
struct Met {
    acme: tls::Acme,
    storage: Storage,
    client: Client,
    issued: Arc<Issued>,
    /// Opened by the first order.
    account: tokio::sync::Mutex<State>,
}

enum State {
    Closed,
    Open(Account),
    /// The authority does not know the one that is kept.
    Lost,
}

impl Met {
    fn new(settings: &Settings, issued: &Arc<Issued>) -> Result<Self, Failure> {
        let client = Client::new(&settings.acme.trust)
            .map_err(|error| Failure::new(Step::Account, crate::error::chain(&error)))?;
        Ok(Self {
            acme: settings.acme.clone(),
            storage: Storage::of(&settings.acme),
            client,
            issued: Arc::clone(issued),
            account: tokio::sync::Mutex::new(State::Closed),
        })
    }

    async fn account(&self) -> Result<Account, Failure> {
        let mut state = self.account.lock().await;
        let is_lost = match &*state {
            State::Open(account) => return Ok(account.clone()),
            State::Closed => false,
            State::Lost => true,
        };
        let open = |is_lost| account::open(&self.acme, &self.storage, &self.client, is_lost);
        let account = match open(is_lost).await {
            Err(failure) if failure.is_account_unknown && !is_lost => open(true).await?,
            opened => opened?,
        };
        *state = State::Open(account.clone());
        Ok(account)
    }

    /// The authority does not know this account; another order may have met the same before.
    async fn forget(&self, account: &Account) {
        let mut state = self.account.lock().await;
        if matches!(&*state, State::Open(open) if open.id() == account.id()) {
            *state = State::Lost;
        }
    }

    async fn obtain(
        &self,
        name: &str,
        kind: Kind,
        expires: Option<SystemTime>,
    ) -> Result<Obtained, Failure> {
        self.storage.prepare()?;
        let Some(_lock) = self.storage.lock(name)? else {
            let reason = "another process that shares the storage orders the certificate";
            return Err(Failure::new(Step::Storage, reason));
        };
        if let Some(certificate) = shelf::load(&self.storage, name)
            && expires.is_none_or(|expires| certificate.not_after > expires)
        {
            return Ok(Obtained { certificate, kind: None });
        }
        let account = self.account().await?;
        let order = async |account| order::order(account, name, kind, &self.issued).await;
        let signed = match order(&account).await {
            Err(failure) if failure.is_account_unknown => {
                self.forget(&account).await;
                order(&self.account().await?).await?
            }
            signed => signed?,
        };
        let certificate = tls::Certificate::from_pem(name, &signed.chain, &signed.key);
        let certificate = certificate.map_err(|fault| match fault {
            tls::PemFault::Chain(why) => {
                Failure::new(Step::Certificate, format!("what the authority signed {why}"))
            }
            tls::PemFault::Key(why) => Failure::new(Step::Certificate, format!("the key {why}")),
        })?;
        if !certificate.names.iter().any(|own| **own == *name) {
            let reason =
                format!("what the authority signed is for {}", certificate.names.join(", "));
            return Err(Failure::new(Step::Certificate, reason));
        }
        self.storage.keep_certificate(name, &signed.chain, &signed.key)?;
        Ok(Obtained { certificate, kind: Some(kind) })
    }
}

impl Authority for Met {
    fn obtain(
        self: Arc<Self>,
        name: Arc<str>,
        kind: Kind,
        expires: Option<SystemTime>,
    ) -> Obtaining {
        Box::pin(async move {
            let outcome = Self::obtain(&self, &name, kind, expires).await;
            let asked = self.client.take_retry_after();
            outcome.map_err(|failure| Failure { retry_after: asked, ..failure })
        })
    }
}

#[cfg(test)]
mod tests;
