//! A reload: a new configuration taken whole, or the old one kept and the reason told.
//!
//! Sockets are bound and plugins loaded first, since both may fail; what follows cannot. What takes
//! effect at a start only is held back, and told as pending for as long as the file says it.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::SystemTime;

use super::sockets::Opened;
use super::{Asked, Process, RunError, check, load_plugins, log, own_relay};
use crate::admin::Side;
use crate::config::{self, Changes, Config, ConfigErrors};
use crate::error::chain;

/// What the last reload that was taken left behind.
pub(super) struct Taken {
    /// When; `None`: the start.
    reloaded: Option<SystemTime>,
    started: SystemTime,
    /// Paths of what the file says and only a restart puts in force.
    pub(super) pending: Vec<&'static str>,
}

impl Taken {
    /// Nothing was reloaded yet.
    pub(super) fn at_start() -> Self {
        Self { reloaded: None, started: SystemTime::now(), pending: Vec::new() }
    }

    /// `the reload of Sun, 06 Nov 1994 08:49:37 GMT`.
    fn text(&self) -> String {
        let date = |time| httpdate::fmt_http_date(time);
        match self.reloaded {
            Some(time) => format!("the reload of {}", date(time)),
            None => format!("the start of {}", date(self.started)),
        }
    }
}

impl Process {
    /// Takes a new configuration, or keeps the old one and says why. Returns as well the files that values
    /// come from in either: the next edit may be of one of them.
    pub(super) fn reload(
        &self,
        source: Result<config::Source, ConfigErrors>,
        log: &log::Handle,
    ) -> (Result<String, String>, Vec<PathBuf>) {
        let read = source.and_then(|source| check::reread(&source, &self.plugins, &self.config()));
        let mut files = match &read {
            Ok(config) => config.files.clone(),
            Err(errors) => errors.files().to_vec(),
        };
        let result = read.map_err(RunError::from).and_then(|config| self.take(config, log));
        files.extend_from_slice(&self.config().files);
        files.sort();
        files.dedup();
        (self.told(result), files)
    }

    fn told(&self, result: Result<String, RunError>) -> Result<String, String> {
        match result {
            Ok(summary) => {
                self.metrics.reloaded(true);
                *self.lock_error() = None;
                tracing::info!(summary, "configuration reloaded");
                Ok(summary)
            }
            Err(error) => Err(self.reload_failed(&error)),
        }
    }

    fn reload_failed(&self, error: &RunError) -> String {
        let text = chain(error);
        match error {
            // A line each, as a start tells them.
            RunError::Config(errors) => {
                let faults = errors.errors().len() + errors.more();
                tracing::error!(
                    faults,
                    "configuration not reloaded: the last good one stays in force"
                );
                for fault in errors.errors() {
                    tracing::error!("{fault}");
                }
            }
            _ => tracing::error!(
                error = text,
                "configuration not reloaded: the last good one stays in force"
            ),
        }
        *self.lock_error() = Some(text.clone());
        // Last: whoever sees it finds the rest.
        self.metrics.reloaded(false);
        text
    }

    fn take(&self, mut config: Config, log: &log::Handle) -> Result<String, RunError> {
        let pending = config::hold_back(&mut config, &self.started);
        let old = self.config();
        config.reuse(&old);
        let changes = config::diff(&old, &config);
        // Dropped where anything below fails: nobody was accepted on what it holds.
        let opened = Opened::bind(&config, &changes, self.relay.as_deref(), self.relay_threads)?;
        // Always: a library's file may be another one under the same name.
        let loaded = load_plugins(&self.plugins, &config)?;
        if let Err(errors) = config.check_plugins(&Asked(&self.plugins)) {
            // Only plugins that are loaded can be asked; what they refuse brings back those before.
            if let Err(error) = load_plugins(&self.plugins, &old) {
                tracing::error!(error = chain(&error), "the plugins before cannot be brought back");
            }
            return Err(errors.into());
        }
        let is_pending_same = self.lock_taken().pending == pending;
        let pending_text = self.set_pending(pending);
        let is_same = changes.is_empty() && loaded.is_empty();
        // The new file's places and warnings count in any case.
        let config = Arc::new(config);
        *self.config.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&config);
        if config.warnings != old.warnings {
            check::warn(&config);
        }
        if is_same {
            // Whoever asks for a reload may have put something right at a relay.
            if let Some(sidecar) = &self.sidecar {
                sidecar.try_again();
            }
            let since = if is_pending_same {
                format!("nothing has changed since {}", self.lock_taken().text())
            } else {
                self.lock_taken().reloaded = Some(SystemTime::now());
                let text = if pending_text.is_empty() {
                    "what waited for a restart is taken back"
                } else {
                    "nothing changes before a restart"
                };
                text.to_owned()
            };
            return Ok(since + &in_force(&config) + &pending_text);
        }
        self.put_in_force(&config, &changes, &loaded, opened);
        if changes.log {
            log.update(&config.log);
        }
        self.lock_taken().reloaded = Some(SystemTime::now());
        Ok(summary(&changes, &loaded) + &pending_text)
    }

    /// Swaps what differs, each part for itself; nothing here fails.
    fn put_in_force(&self, config: &Config, changes: &Changes, loaded: &[String], opened: Opened) {
        let addresses = opened.addresses(&self.addresses());
        let are_plugins_other = changes.plugins || !loaded.is_empty();
        if let (Some(relay), Some(section)) = (&self.relay, &config.relay) {
            // Of listeners too: sidecars may come in by one of them.
            if !changes.relay.is_empty() || !changes.listeners.is_empty() {
                relay.limit(section);
            }
            // Before listeners: a new one finds its routes.
            if changes.is_routing() || are_plugins_other {
                relay.configure(config);
            }
            // Before listeners, too: a new one finds the certificates that are kept.
            if let Some(acme) = &self.acme {
                acme.set(section);
            }
            if let Some(prepared) = opened.listeners {
                relay.listen(prepared);
            }
        }
        // After the relay, whose certificates the sidecar of its own process knows.
        let is_reached_otherwise = !changes.sidecar.is_empty()
            || !changes.relay.is_empty()
            || !changes.listeners.is_empty();
        if let (Some(sidecar), Some(section), true) =
            (&self.sidecar, &config.sidecar, is_reached_otherwise)
        {
            sidecar.set_access(section, own_relay(section, self.relay.as_deref()));
        }
        if let Some(sidecar) = &self.sidecar
            && (!changes.routes.is_empty() || !changes.tunnels.is_empty() || are_plugins_other)
        {
            sidecar.configure(config);
        }
        if let Some(listeners) = self.admin.get() {
            let sides = [(Side::Health, opened.health), (Side::Admin, opened.admin)];
            for (side, socket) in sides.into_iter().filter_map(|(side, new)| Some((side, new?))) {
                if let Err(error) = listeners.replace(side, socket) {
                    tracing::error!(?side, %error, "a listener could not be replaced");
                }
            }
        }
        self.moved(addresses);
    }

    /// Tells where the process listens, where that is elsewhere than before.
    fn moved(&self, addresses: super::Addresses) {
        let before = self.addresses();
        if addresses == before {
            return;
        }
        addresses.log(&before);
        if let Some(path) = &self.ports_file
            && let Err(error) = addresses.write(path)
        {
            tracing::error!(error = chain(&error), "the ports file is out of date");
        }
        *self.addresses.lock().unwrap_or_else(PoisonError::into_inner) = addresses;
    }

    fn addresses(&self) -> super::Addresses {
        self.addresses.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Keeps what only a restart puts in force, and returns what the answer says of it.
    fn set_pending(&self, pending: Vec<&'static str>) -> String {
        self.metrics.set_restart_pending(!pending.is_empty());
        for what in &pending {
            tracing::warn!(setting = what, "changed, and takes effect only after a restart");
        }
        let text = match pending.as_slice() {
            [] => String::new(),
            paths => format!("; only after a restart: {}", paths.join(", ")),
        };
        self.lock_taken().pending = pending;
        text
    }
}

fn in_force(config: &Config) -> String {
    format!(
        "; in force: routes {}, tunnels {}, listeners {}",
        config.routes.len(),
        config.tunnels.len(),
        config.relay.as_ref().map_or(0, |relay| relay.listeners.len()),
    )
}

fn summary(changes: &Changes, loaded: &[String]) -> String {
    let mut text =
        format!("{}; {}", count(&changes.routes, "routes"), count(&changes.tunnels, "tunnels"),);
    if !changes.listeners.is_empty() {
        text += &format!("; {}", count(&changes.listeners, "listeners"));
    }
    let others = [
        (changes.base_domains, "relay.base_domains"),
        (changes.plugins, "plugins"),
        (changes.health, "health"),
        (changes.admin, "admin"),
        (changes.log, "log"),
        (changes.drain_timeout, "drain_timeout"),
        (changes.withdraw_timeout, "withdraw_timeout"),
    ];
    let others = others.into_iter().filter_map(|(differs, what)| differs.then_some(what));
    let live = changes.relay.iter().chain(&changes.sidecar).copied();
    let others: Vec<_> = live.chain(others).collect();
    if !others.is_empty() {
        text += &format!("; changed: {}", others.join(", "));
    }
    if !loaded.is_empty() {
        text += &format!("; plugins loaded: {}", loaded.join(", "));
    }
    text
}

fn count<T>(delta: &config::Delta<T>, what: &str) -> String {
    let (added, removed) = (delta.added.len(), delta.removed.len());
    format!("{what}: {added} added, {removed} removed, {} changed", delta.changed.len())
}
