//! What the routing is made of: the file's routes, and sidecars' documents, of which some are in force,
//! some wait, and some are of sidecars that are gone.
//!
//! Pure but for the grants of sessions, which are read as they stand.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::document::{Document, is_same_goal, shortened};
use crate::config::{HostMatch, Match, Route};
use crate::credentials::{Grant, is_one_of};
use crate::tunnel::session::Session;

/// Documents of lost sidecars that are kept; the oldest of the principal that has the most makes room.
const LOST_DOCUMENTS_MAX: usize = 1024;

/// Routes of all of them together.
const LOST_ROUTES_MAX: usize = 100_000;

/// How long a session whose lanes are all lost holds names against one that waits for them. Longer than a
/// lane usually takes to come back, so that a blink changes nothing.
const SILENT_MAX: Duration = Duration::from_secs(2);

/// What the routing is made of. Whoever changes it makes the routing anew before letting go.
#[derive(Default)]
pub(super) struct Sources {
    pub(super) base_domains: Vec<Arc<str>>,
    pub(super) own: Vec<Arc<Route>>,
    /// Those in force, by epoch.
    pub(super) documents: BTreeMap<u64, Document>,
    /// Those that are not in force, by epoch: each the newest of its session, which may have an older
    /// one in force.
    pub(super) held: BTreeMap<u64, Held>,
    /// Documents of sidecars that are gone, newest last, and since when.
    pub(super) lost: VecDeque<(Instant, Document)>,
    /// Sessions with a document in force that take nothing, since all their lanes are lost or leaving, and
    /// since when.
    pub(super) silent: HashMap<u64, Instant>,
}

/// A document that is not in force.
pub(super) struct Held {
    pub(super) document: Document,
    /// One line each.
    pub(super) reasons: Vec<String>,
    /// It claims what its principal may not; else it waits for others to give up what it takes.
    pub(super) is_forbidden: bool,
}

/// What has become of documents.
#[derive(Default)]
pub(super) struct Settled {
    /// They are in force, and were not.
    pub(super) accepted: Vec<Accepted>,
    /// They are not in force, for other reasons than before: told to their sidecars.
    pub(super) refused: Vec<Refused>,
    /// Something in force is other than before.
    pub(super) is_changed: bool,
}

/// A document that came into force.
pub(super) struct Accepted {
    pub(super) session: Arc<Session>,
    pub(super) version: u64,
    pub(super) notes: Vec<String>,
}

/// A document that is kept out of force.
pub(super) struct Refused {
    pub(super) session: Arc<Session>,
    pub(super) version: u64,
    pub(super) reasons: Vec<String>,
    pub(super) is_forbidden: bool,
}

/// Hosts as the router finds them: a subdomain and the whole host it stands for are the same.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Hosts {
    Any,
    Name(String),
    Below(String),
}

/// What one route takes, at one of the base domains.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Slot {
    hosts: Hosts,
    path_prefix: Arc<str>,
    listener: Option<Arc<str>>,
    protocol_type: Option<Arc<str>>,
}

fn hosts(host: &HostMatch, base_domains: &[Arc<str>]) -> Vec<Hosts> {
    fn below(base: &str, name: &str) -> String {
        if name.is_empty() { base.to_owned() } else { format!("{name}.{base}") }
    }
    let bases = base_domains.iter();
    match host {
        HostMatch::Any => vec![Hosts::Any],
        HostMatch::Exact(host) => vec![Hosts::Name(host.to_string())],
        HostMatch::HostWildcard(suffix) => vec![Hosts::Below(suffix.to_string())],
        HostMatch::Subdomain(name) => bases.map(|base| Hosts::Name(below(base, name))).collect(),
        HostMatch::Wildcard(suffix) => {
            bases.map(|base| Hosts::Below(below(base, suffix))).collect()
        }
    }
}

fn slots(matches: &Match, base_domains: &[Arc<str>]) -> impl Iterator<Item = Slot> {
    hosts(&matches.host, base_domains).into_iter().map(|hosts| Slot {
        hosts,
        path_prefix: Arc::clone(&matches.path_prefix),
        listener: matches.listener.clone(),
        protocol_type: matches.protocol_type.clone(),
    })
}

/// Routes that come before others, by what they take.
pub(super) struct Earlier<'a> {
    by_slot: HashMap<Slot, &'a Arc<Route>>,
    /// By the whole host that each stands for.
    subdomains: HashMap<String, Vec<&'a Arc<Route>>>,
    base_domains: &'a [Arc<str>],
}

impl<'a> Earlier<'a> {
    pub(super) fn of(
        routes: impl Iterator<Item = &'a Arc<Route>>,
        base_domains: &'a [Arc<str>],
    ) -> Self {
        let (mut by_slot, mut subdomains) = (HashMap::new(), HashMap::<_, Vec<_>>::new());
        for route in routes {
            for slot in slots(&route.matches, base_domains) {
                if let (HostMatch::Subdomain(_), Hosts::Name(name)) =
                    (&route.matches.host, &slot.hosts)
                {
                    subdomains.entry(name.clone()).or_default().push(route);
                }
                by_slot.entry(slot).or_insert(route);
            }
        }
        Self { by_slot, subdomains, base_domains }
    }

    /// Whether the route takes anything that one of these takes.
    pub(super) fn has_any_of(&self, route: &Route) -> bool {
        slots(&route.matches, self.base_domains).any(|slot| self.by_slot.contains_key(&slot))
    }

    /// Returns which of these has all that the route takes, or would lose by it what is its own: the
    /// router looks at whole hosts before subdomains, and what a host is called changes nothing of whose
    /// it is.
    pub(super) fn over(&self, route: &Route) -> Option<&'a Arc<Route>> {
        let mut first = None;
        let has_all = slots(&route.matches, self.base_domains).all(|slot| {
            let has_it = self.by_slot.get(&slot);
            first = first.or(has_it);
            has_it.is_some()
        });
        let shadowed = || {
            let HostMatch::Exact(host) = &route.matches.host else { return None };
            let own = self.subdomains.get(&**host)?;
            own.iter().find(|own| takes_from(&route.matches, &own.matches))
        };
        first.filter(|_| has_all).or_else(shadowed).copied()
    }
}

/// Whether `whole`, looked at first, takes what would be `own`'s if both said their host alike.
fn takes_from(whole: &Match, own: &Match) -> bool {
    let meet = |a: &Option<Arc<str>>, b: &Option<Arc<str>>| a.is_none() || b.is_none() || a == b;
    let names = |matches: &Match| (matches.protocol_type.is_some(), matches.listener.is_some());
    let below = own.path_prefix.strip_prefix(&*whole.path_prefix);
    let is_as_wide = match below {
        Some("") => names(own) >= names(whole),
        Some(below) => below.starts_with('/'),
        None => false,
    };
    is_as_wide
        && meet(&whole.listener, &own.listener)
        && meet(&whole.protocol_type, &own.protocol_type)
}

/// Returns which routes of one document take the same, one line each.
pub(super) fn ambiguities(document: &Document, base_domains: &[Arc<str>]) -> Vec<String> {
    let mut taken: HashMap<Slot, &Arc<Route>> = HashMap::new();
    let mut reasons = Vec::new();
    for route in &document.routes {
        for slot in slots(&route.matches, base_domains) {
            if let Some(other) = taken.insert(slot, route) {
                reasons.push(format!("routes {} and {} take the same", other.name, route.name));
                break;
            }
        }
    }
    shortened(reasons)
}

/// Who has something.
struct Holder {
    session: Arc<Session>,
    grant: Arc<Grant>,
    /// None: a tunnel.
    route: Option<Arc<Route>>,
    /// By a whole host, which the router looks at before subdomains.
    is_exact: bool,
}

/// What documents in force take.
#[derive(Default)]
struct Taken {
    slots: HashMap<Slot, Vec<Holder>>,
    names: HashMap<String, Vec<Holder>>,
    tunnels: HashMap<Arc<str>, Vec<Holder>>,
}

impl Taken {
    fn add(&mut self, document: &Document, base_domains: &[Arc<str>]) {
        let holder = |route: Option<&Arc<Route>>| Holder {
            session: Arc::clone(&document.session),
            grant: Arc::clone(&document.grant),
            route: route.cloned(),
            is_exact: route.is_some_and(|r| matches!(r.matches.host, HostMatch::Exact(_))),
        };
        for tunnel in &document.tunnels {
            self.tunnels.entry(Arc::clone(&tunnel.name)).or_default().push(holder(None));
        }
        for route in &document.routes {
            for slot in slots(&route.matches, base_domains) {
                if let Hosts::Name(name) = &slot.hosts {
                    self.names.entry(name.clone()).or_default().push(holder(Some(route)));
                }
                self.slots.entry(slot).or_default().push(holder(Some(route)));
            }
        }
    }

    fn remove(&mut self, document: &Document, base_domains: &[Arc<str>]) {
        let epoch = document.session.epoch;
        let leave = |holders: Option<&mut Vec<Holder>>| {
            if let Some(holders) = holders {
                holders.retain(|holder| holder.session.epoch != epoch);
            }
        };
        for tunnel in &document.tunnels {
            leave(self.tunnels.get_mut(&tunnel.name));
        }
        for route in &document.routes {
            for slot in slots(&route.matches, base_domains) {
                if let Hosts::Name(name) = &slot.hosts {
                    leave(self.names.get_mut(name));
                }
                leave(self.slots.get_mut(&slot));
            }
        }
    }

    /// Returns what others hold of what `document` takes, one line each. Replicas of one principal that
    /// announce the same for the same tunnels share it, and those that `yields` tells of hold nothing against
    /// another of their principal.
    fn conflicts(
        &self,
        document: &Document,
        base_domains: &[Arc<str>],
        yields: impl Fn(&Session) -> bool,
    ) -> Vec<String> {
        let (epoch, grant) = (document.session.epoch, &document.grant);
        let others = |holders: Option<&'_ Vec<Holder>>, is_apart: &dyn Fn(&Holder) -> bool| {
            let mut all = holders.into_iter().flatten();
            let holds = |holder: &&Holder| {
                let is_other = holder.session.epoch != epoch && is_apart(holder);
                is_other && !(is_one_of(&holder.grant, grant) && yields(&holder.session))
            };
            all.find(holds).map(|holder| {
                let keeps = if holder.session.epoch < epoch {
                    "the older session keeps it"
                } else {
                    "the session that has it keeps it"
                };
                let ends = "and this document waits until that session ends or gives it up";
                match &holder.route {
                    // Another principal's sidecars and tunnels are nobody else's business.
                    _ if !is_one_of(&holder.grant, grant) => {
                        format!("taken by a sidecar of another principal; {keeps}, {ends}")
                    }
                    Some(route) => format!(
                        "taken by sidecar {} for tunnel {}; {keeps}, {ends}",
                        holder.session.name,
                        route.tunnels_text()
                    ),
                    None => format!("taken by sidecar {}; {keeps}, {ends}", holder.session.name),
                }
            })
        };
        let is_foreign = |holder: &Holder| !is_one_of(&holder.grant, grant);
        let mut reasons = Vec::new();
        for tunnel in &document.tunnels {
            let taken = others(self.tunnels.get(&tunnel.name), &is_foreign);
            reasons.extend(taken.map(|why| format!("tunnel {}: {why}", tunnel.name)));
        }
        for route in &document.routes {
            let is_exact = matches!(route.matches.host, HostMatch::Exact(_));
            let is_other = |holder: &Holder| {
                let is_same = holder.route.as_ref().is_some_and(|held| is_same_goal(held, route));
                is_foreign(holder) || !is_same
            };
            // Whole hosts come before subdomains, whatever the paths.
            let shadows = |holder: &Holder| is_foreign(holder) && holder.is_exact != is_exact;
            let taken = slots(&route.matches, base_domains).find_map(|slot| {
                let names = match &slot.hosts {
                    Hosts::Name(name) => self.names.get(name),
                    Hosts::Any | Hosts::Below(_) => None,
                };
                others(self.slots.get(&slot), &is_other).or_else(|| others(names, &shadows))
            });
            reasons.extend(taken.map(|why| format!("route {}: {why}", route.name)));
        }
        shortened(reasons)
    }
}

impl Sources {
    /// Returns the routes of `document` that neither the file nor its sidecar's document before has.
    pub(super) fn fresh_routes(&self, document: &Document) -> Vec<Arc<Route>> {
        let before = self.documents.get(&document.session.epoch);
        let known: HashSet<&Match> = before
            .iter()
            .flat_map(|before| &before.routes)
            .chain(&self.own)
            .map(|route| &route.matches)
            .collect();
        document.routes.iter().filter(|route| !known.contains(&route.matches)).cloned().collect()
    }

    /// What is worth telling a sidecar of its document that is in force.
    pub(super) fn notes(&self, document: &Document) -> Vec<String> {
        let others = self.documents.range(..document.session.epoch);
        let own = Earlier::of(self.own.iter(), &self.base_domains);
        document.notes(&own, others.map(|(_, other)| other))
    }

    /// Holds a session's newest document until [`Sources::settle`] finds what becomes of it.
    pub(super) fn hold(&mut self, document: Document) {
        let epoch = document.session.epoch;
        let held = Held { document, reasons: Vec::new(), is_forbidden: false };
        self.held.insert(epoch, held);
    }

    /// Finds out which documents are in force: those that claim only what their principals may, and that
    /// take nothing that others have. What is in force goes before what is not, the older before the
    /// newer.
    pub(super) fn settle(&mut self) -> Settled {
        let mut settled = Settled::default();
        let mut taken = Taken::default();
        for (epoch, mut document) in std::mem::take(&mut self.documents) {
            let grant = document.session.grant();
            if !Arc::ptr_eq(&document.grant, &grant) {
                document.grant = grant;
                settled.is_changed = true;
            }
            match self.verdict(&document, &taken, |_| false) {
                None => {
                    taken.add(&document, &self.base_domains);
                    self.documents.insert(epoch, document);
                }
                Some((reasons, is_forbidden)) => {
                    settled.is_changed = true;
                    // A newer one has been refused for reasons of its own.
                    if let Entry::Vacant(place) = self.held.entry(epoch) {
                        settled.refused.push(refused(&document, &reasons, is_forbidden));
                        place.insert(Held { document, reasons, is_forbidden });
                    }
                }
            }
        }
        for (epoch, mut held) in std::mem::take(&mut self.held) {
            held.document.grant = held.document.session.grant();
            // One that comes wins over a ghost at once; one that waits lets it come back for a while.
            let is_fresh = held.reasons.is_empty();
            let is_there = held.document.session.is_open();
            let yields = |other: &Session| {
                is_there && !other.is_open() && (is_fresh || self.is_silent(other.epoch))
            };
            match self.verdict(&held.document, &taken, yields) {
                None => {
                    settled.is_changed = true;
                    if let Some(before) = self.documents.get(&epoch) {
                        taken.remove(before, &self.base_domains);
                    }
                    taken.add(&held.document, &self.base_domains);
                    let (session, version) =
                        (Arc::clone(&held.document.session), held.document.version);
                    let notes = self.notes(&held.document);
                    // An older one of a ghost may have given way just before.
                    self.held.remove(&epoch);
                    self.put_in_force(held.document);
                    settled.accepted.push(Accepted { session, version, notes });
                    self.give_way(epoch, &mut taken, &mut settled);
                }
                Some((reasons, is_forbidden)) => {
                    let is_told = !held.reasons.is_empty() && held.is_forbidden == is_forbidden;
                    if !is_told {
                        settled.refused.push(refused(&held.document, &reasons, is_forbidden));
                    }
                    self.held.insert(epoch, Held { reasons, is_forbidden, ..held });
                }
            }
        }
        settled
    }

    /// Takes documents of ghosts out of force that the one of `epoch` has won over.
    fn give_way(&mut self, epoch: u64, taken: &mut Taken, settled: &mut Settled) {
        let others = self.documents.iter().filter(|(other, _)| **other != epoch);
        let ghosts = others.filter(|(_, document)| !document.session.is_open());
        for epoch in ghosts.map(|(epoch, _)| *epoch).collect::<Vec<_>>() {
            let Some(document) = self.documents.remove(&epoch) else { continue };
            let conflicts = taken.conflicts(&document, &self.base_domains, |_| false);
            if conflicts.is_empty() {
                self.documents.insert(epoch, document);
                continue;
            }
            taken.remove(&document, &self.base_domains);
            // A newer one of its own waits already.
            if let Entry::Vacant(place) = self.held.entry(epoch) {
                settled.refused.push(refused(&document, &conflicts, false));
                place.insert(Held { document, reasons: conflicts, is_forbidden: false });
            }
        }
    }

    /// Notes which sessions with a document in force take nothing. Returns whether one that waits may be let
    /// in instead of one of them.
    pub(super) fn look_at_silent(&mut self, now: Instant) -> bool {
        let silent = self.documents.values().filter(|document| !document.session.is_open());
        let silent: Vec<u64> = silent.map(|document| document.session.epoch).collect();
        self.silent.retain(|epoch, _| silent.contains(epoch));
        for epoch in silent {
            self.silent.entry(epoch).or_insert(now);
        }
        let is_any = self.silent.values().any(|since| now.duration_since(*since) >= SILENT_MAX);
        is_any && self.held.values().any(|held| !held.is_forbidden)
    }

    /// Whether a session has taken nothing for as long as it may hold names so.
    fn is_silent(&self, epoch: u64) -> bool {
        self.silent.get(&epoch).is_some_and(|since| since.elapsed() >= SILENT_MAX)
    }

    /// Returns why a document cannot be in force, and whether that is for its claims.
    fn verdict(
        &self,
        document: &Document,
        taken: &Taken,
        yields: impl Fn(&Session) -> bool,
    ) -> Option<(Vec<String>, bool)> {
        let beyond = document.beyond_claims(&self.base_domains);
        if !beyond.is_empty() {
            return Some((beyond, true));
        }
        let conflicts = taken.conflicts(document, &self.base_domains, yields);
        (!conflicts.is_empty()).then_some((conflicts, false))
    }

    fn put_in_force(&mut self, mut document: Document) {
        let session = Arc::clone(&document.session);
        // A name is a sidecar's own word: it stands for the same sidecar within a principal only.
        let is_its = |lost: &Document| {
            lost.session.name == session.name && lost.grant.principal == document.grant.principal
        };
        let of_its_last = || self.lost.iter().rev().map(|(_, lost)| lost).find(|lost| is_its(lost));
        let before = self.documents.get(&session.epoch).or_else(of_its_last);
        let known = before.map(Document::routes_by_match);
        // A sidecar that is back says anew what it serves.
        let keep: Vec<bool> = self.lost.iter().map(|(_, lost)| !is_its(lost)).collect();
        if let Some(known) = known {
            document.keep_routes(&known);
        }
        let mut keep = keep.into_iter();
        self.lost.retain(|_| keep.next().unwrap_or(true));
        self.documents.insert(session.epoch, document);
    }

    /// A session is over: what it had in force is remembered as lost. Returns whether it had anything.
    pub(super) fn lose(&mut self, epoch: u64, now: Instant) -> bool {
        let held = self.held.remove(&epoch).is_some();
        let Some(document) = self.documents.remove(&epoch) else { return held };
        let mut routes: usize = self.lost.iter().map(|(_, lost)| lost.routes.len()).sum();
        routes += document.routes.len();
        while !self.lost.is_empty()
            && (self.lost.len() >= LOST_DOCUMENTS_MAX || routes > LOST_ROUTES_MAX)
        {
            routes -= self.make_room();
        }
        self.lost.push_back((now, document));
        true
    }

    /// Forgets the oldest document of the principal that has lost the most, so that none pushes others
    /// out. Returns how many routes it had.
    fn make_room(&mut self) -> usize {
        let mut counts: HashMap<&str, usize> = HashMap::new();
        for (_, lost) in &self.lost {
            *counts.entry(&lost.grant.principal).or_default() += 1 + lost.routes.len();
        }
        let most = counts.into_iter().max_by_key(|(_, count)| *count).map(|(name, _)| name);
        let oldest = self.lost.iter().position(|(_, lost)| Some(&*lost.grant.principal) == most);
        let gone = self.lost.remove(oldest.unwrap_or_default());
        gone.map_or(0, |(_, document)| document.routes.len())
    }

    /// A session's credential is worth nothing any more: nothing of it is remembered.
    pub(super) fn forget(&mut self, epoch: u64) {
        self.held.remove(&epoch);
        self.documents.remove(&epoch);
    }

    /// Documents that wait for others, and those that claim what they may not.
    pub(super) fn held_counts(&self) -> (usize, usize) {
        let forbidden = self.held.values().filter(|held| held.is_forbidden).count();
        (self.held.len() - forbidden, forbidden)
    }
}

fn refused(document: &Document, reasons: &[String], is_forbidden: bool) -> Refused {
    Refused {
        session: Arc::clone(&document.session),
        version: document.version,
        reasons: reasons.to_vec(),
        is_forbidden,
    }
}

#[cfg(test)]
mod tests;
