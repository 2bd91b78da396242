//! The one task that orders: which name is due, what becomes of an order, and when to try again.
//!
//! Asks an [`Authority`], which is a trait so that time alone can be tested.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::task::{AbortHandle, Id, JoinError, JoinSet};
use tokio::time::Instant;

use super::Settings;
use super::failure::{Failure, Step};
use super::order::Kind;
use super::schedule::{Budget, backoff};
use super::shelf::Shelf;
use crate::config::tls::Certificate;
use crate::random;

/// Orders under way at once.
const ORDERS_AT_ONCE_MAX: usize = 4;

/// Orders for one name in an hour, whatever happens: public authorities take about five failed ones.
const ORDERS_PER_NAME_AND_HOUR_MAX: usize = 4;

/// Orders for all names in an hour: Let's Encrypt takes 300 in three hours.
const ORDERS_PER_HOUR_MAX: usize = 100;

/// For one order, from the lock to the certificate in storage.
const ORDER_TIMEOUT: Duration = Duration::from_secs(600);

/// Longest sleep: the clock of the wall, by which certificates end, may have been set meanwhile.
const SLEEP_MAX: Duration = Duration::from_secs(3600);

/// Future of an order.
pub(super) type Obtaining = Pin<Box<dyn Future<Output = Result<Obtained, Failure>> + Send>>;

/// A certificate, and how it was come by.
pub(super) struct Obtained {
    pub(super) certificate: Certificate,
    /// `None`: another process that shares the storage had obtained it.
    pub(super) kind: Option<Kind>,
}

/// Who signs.
pub(super) trait Authority: Send + Sync + 'static {
    /// Obtains a certificate by one order; `expires`: of the one that is there.
    fn obtain(
        self: Arc<Self>,
        name: Arc<str>,
        kind: Kind,
        expires: Option<SystemTime>,
    ) -> Obtaining;
}

/// Makes an authority of what is configured.
pub(super) type Meet = Box<dyn Fn(&Settings) -> Result<Arc<dyn Authority>, Failure> + Send>;

/// When something that fails is tried again.
struct Retry {
    failures: u32,
    not_before: Instant,
}

impl Retry {
    fn new(now: Instant) -> Self {
        Self { failures: 0, not_before: now }
    }

    /// Returns how long it waits.
    fn failed(&mut self, now: Instant, retry_after: Option<SystemTime>) -> Duration {
        self.failures = self.failures.saturating_add(1);
        let asked = retry_after.and_then(|time| time.duration_since(SystemTime::now()).ok());
        let delay = backoff(self.failures, random::number(), asked);
        self.not_before = now + delay;
        delay
    }
}

/// What is known of a name.
struct Name {
    /// How it is proved, the likeliest first.
    kinds: Vec<Kind>,
    /// How many of these have failed since the last delay.
    tried: usize,
    retry: Retry,
    orders: Budget,
    running: Option<AbortHandle>,
}

/// The task's state.
pub(super) struct Keeper {
    shelf: Arc<Shelf>,
    wanted: watch::Receiver<Option<Arc<Settings>>>,
    meet: Meet,
    settings: Option<Arc<Settings>>,
    authority: Option<Arc<dyn Authority>>,
    /// Whether the authority can be asked at all.
    retry: Retry,
    orders: Budget,
    names: HashMap<Arc<str>, Name>,
    running: JoinSet<Result<Obtained, Failure>>,
    /// Whose order a task is.
    tasks: HashMap<Id, (Arc<str>, Kind)>,
}

impl Keeper {
    pub(super) fn new(
        shelf: Arc<Shelf>,
        wanted: watch::Receiver<Option<Arc<Settings>>>,
        meet: Meet,
    ) -> Self {
        Self {
            shelf,
            wanted,
            meet,
            settings: None,
            authority: None,
            retry: Retry::new(Instant::now()),
            orders: Budget::default(),
            names: HashMap::new(),
            running: JoinSet::new(),
            tasks: HashMap::new(),
        }
    }

    /// Orders what is due, until whoever says what is wanted is gone.
    pub(super) async fn run(mut self) {
        self.wanted.mark_changed();
        loop {
            let next = self.order_due();
            tokio::select! {
                biased;
                changed = self.wanted.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let wanted = self.wanted.borrow_and_update().clone();
                    self.take(wanted);
                }
                Some(done) = self.running.join_next_with_id() => self.done(done),
                () = tokio::time::sleep_until(next) => {}
            }
        }
    }

    /// Takes what is wanted from here on. Whoever changed the section expects to see what comes of it:
    /// delays end, bounds stay.
    fn take(&mut self, wanted: Option<Arc<Settings>>) {
        let now = Instant::now();
        let acme = |settings: &Option<Arc<Settings>>| settings.as_ref().map(|one| one.acme.clone());
        let is_other = acme(&self.settings) != acme(&wanted);
        let wanted_names = wanted.as_ref().map_or(&[][..], |settings| &settings.names);
        self.names.retain(|name, known| {
            let stays = wanted_names.iter().any(|wanted| wanted.name == *name);
            if let Some(running) = known.running.take_if(|_| is_other || !stays) {
                running.abort();
            }
            stays
        });
        for wanted in wanted_names {
            let name = self.names.entry(Arc::clone(&wanted.name)).or_insert_with(|| Name {
                kinds: Vec::new(),
                tried: 0,
                retry: Retry::new(now),
                orders: Budget::default(),
                running: None,
            });
            let is_same = name.kinds.len() == wanted.kinds.len()
                && name.kinds.iter().all(|kind| wanted.kinds.contains(kind));
            if !is_same {
                name.kinds.clone_from(&wanted.kinds);
            }
            if is_other || !is_same {
                name.tried = 0;
                name.retry = Retry::new(now);
            }
        }
        self.settings = wanted;
        if is_other {
            self.authority = None;
            self.retry = Retry::new(now);
        }
    }

    /// Begins what is due. Returns when to look again.
    fn order_due(&mut self) -> Instant {
        let now = Instant::now();
        let today = SystemTime::now();
        let mut next = now + SLEEP_MAX;
        let Some(settings) = self.settings.clone() else { return next };
        for wanted in &settings.names {
            let Some(name) = self.names.get_mut(&wanted.name) else { continue };
            if name.running.is_some() {
                continue;
            }
            let left = self.shelf.renew_at(&wanted.name).duration_since(today).unwrap_or_default();
            let due = [
                now + left.min(SLEEP_MAX),
                name.retry.not_before,
                name.orders.free_at(now, ORDERS_PER_NAME_AND_HOUR_MAX),
                self.retry.not_before,
                self.orders.free_at(now, ORDERS_PER_HOUR_MAX),
            ];
            let due = due.into_iter().max().unwrap_or(now);
            if due > now {
                next = next.min(due);
                continue;
            }
            if self.running.len() >= ORDERS_AT_ONCE_MAX {
                // The end of one of them is the time to look again.
                continue;
            }
            let authority = match &self.authority {
                Some(authority) => Arc::clone(authority),
                None => match (self.meet)(&settings) {
                    Ok(authority) => Arc::clone(self.authority.insert(authority)),
                    Err(failure) => {
                        let delay = self.retry.failed(now, None);
                        tell(&wanted.name, None, &failure, delay, None);
                        return now + delay;
                    }
                },
            };
            let kind = name.kinds[name.tried.min(name.kinds.len() - 1)];
            self.orders.take(now);
            name.orders.take(now);
            let expires = self.shelf.expires(&wanted.name);
            tracing::debug!(name = &*wanted.name, challenge = %kind, "ordering a certificate");
            let obtaining = authority.obtain(Arc::clone(&wanted.name), kind, expires);
            let task = self.running.spawn(async move {
                let timeout = || {
                    let minutes = ORDER_TIMEOUT.as_secs() / 60;
                    Failure::new(Step::Order, format!("not done within {minutes} minutes"))
                };
                tokio::time::timeout(ORDER_TIMEOUT, obtaining)
                    .await
                    .unwrap_or_else(|_| Err(timeout()))
            });
            self.tasks.insert(task.id(), (Arc::clone(&wanted.name), kind));
            name.running = Some(task);
        }
        next
    }

    /// An order has ended.
    fn done(&mut self, done: Result<(Id, Result<Obtained, Failure>), JoinError>) {
        let (id, outcome) = match done {
            Ok((id, outcome)) => (id, outcome),
            Err(error) if error.is_cancelled() => {
                self.tasks.remove(&error.id());
                return;
            }
            Err(error) => {
                let failure =
                    Failure::new(Step::Order, format!("a fault of this program: {error}"));
                (error.id(), Err(failure))
            }
        };
        let Some((name, kind)) = self.tasks.remove(&id) else { return };
        let Some(known) = self.names.get_mut(&name) else { return };
        if known.running.as_ref().is_none_or(|running| running.id() != id) {
            // It had ended when it was to be aborted.
            return;
        }
        known.running = None;
        match outcome {
            Ok(obtained) => self.obtained(&name, obtained),
            Err(failure) => self.failed(&name, kind, &failure),
        }
    }

    fn obtained(&mut self, name: &Arc<str>, obtained: Obtained) {
        let now = Instant::now();
        self.retry = Retry::new(now);
        let expires = httpdate::fmt_http_date(obtained.certificate.not_after);
        self.shelf.put(name, obtained.certificate);
        if let Some(kind) = obtained.kind {
            self.shelf.metrics.acme.ordered(true);
            tracing::info!(name = &**name, expires, challenge = %kind, "certificate obtained");
        } else {
            tracing::info!(
                name = &**name,
                expires,
                "certificate obtained by another process that shares the storage"
            );
        }
        let Some(known) = self.names.get_mut(name) else { return };
        known.tried = 0;
        // What went well goes first the next time.
        known.kinds.sort_by_key(|kind| Some(*kind) != obtained.kind);
        if self.shelf.renew_at(name) > SystemTime::now() {
            known.retry = Retry::new(now);
        } else {
            // It would be ordered again and again.
            let delay = known.retry.failed(now, None);
            tracing::warn!(
                name = &**name,
                next_attempt_in_seconds = delay.as_secs(),
                "the certificate is due for renewal as soon as it is obtained: is the clock right?"
            );
        }
    }

    fn failed(&mut self, name: &Arc<str>, kind: Kind, failure: &Failure) {
        let now = Instant::now();
        self.shelf.metrics.acme.ordered(false);
        let expires = self.shelf.expires(name);
        let Some(known) = self.names.get_mut(name) else { return };
        let delay = if failure.is_of_authority {
            if self.retry.not_before <= now {
                self.retry.failed(now, failure.retry_after)
            } else {
                // Another name has met the same.
                self.retry.not_before - now
            }
        } else if failure.step == Step::Challenge
            && failure.retry_after.is_none()
            && known.tried + 1 < known.kinds.len()
        {
            known.tried += 1;
            Duration::ZERO
        } else {
            known.tried = 0;
            known.retry.failed(now, failure.retry_after)
        };
        tell(name, Some(kind), failure, delay, expires);
    }
}

/// Says what went wrong, and what comes next.
fn tell(
    name: &str,
    kind: Option<Kind>,
    failure: &Failure,
    delay: Duration,
    expires: Option<SystemTime>,
) {
    let seconds = delay.as_secs();
    let expires = expires.map(httpdate::fmt_http_date);
    let kind = kind.map(tracing::field::display);
    tracing::warn!(
        name,
        step = %failure.step,
        challenge = kind,
        error = failure.reason,
        next_attempt_in_seconds = seconds,
        expires,
        "certificate not obtained"
    );
}

#[cfg(test)]
mod tests;
