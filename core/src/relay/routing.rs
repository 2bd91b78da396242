//! Which tunnel takes an exchange, and which sessions serve that tunnel: one immutable picture,
//! replaced whole.

use std::borrow::Cow;
use std::cell::Cell;
use std::collections::HashMap;
use std::sync::Arc;

use sidelane_abi::failure;

use super::affinity;
use super::moving::Budget;
use super::policy::{self, RouteStates};
use super::sources::{Earlier, Sources};
use crate::choice::{Draw, Standing};
use crate::config::{Match, Route};
use crate::credentials::Grant;
use crate::metrics::Metrics;
use crate::router::RouteTable;
use crate::tunnel::session::Session;

/// Tunnels of one route that are chosen among, a bit each of those that were tried. A split in
/// more parts than this has the rest of them unused; a configuration is refused long before.
pub(super) const SHARES_MAX: usize = 32;

/// The picture that new exchanges are routed by.
#[derive(Default)]
pub(super) struct Routing {
    pub(super) table: RouteTable,
    pub(super) policies: RouteStates,
    tunnels: HashMap<Arc<str>, Tunnel>,
    /// That serve something.
    pub(super) sessions: usize,
}

/// Who serves a tunnel.
#[derive(Default)]
pub(super) struct Tunnel {
    /// By epoch.
    serving: Vec<Serving>,
    draw: Draw,
    /// Places of `serving` by what cookies call them.
    by_tag: HashMap<u128, usize>,
    /// Of moves whose route has none of its own.
    pub(super) budget: Arc<Budget>,
    /// Why a sidecar that has the tunnel does not serve it now.
    unavailable: Option<Arc<str>>,
}

/// One session's part in a tunnel.
pub(super) struct Serving {
    pub(super) session: Arc<Session>,
    /// What the session's document is in force by.
    grant: Arc<Grant>,
    /// Protocol types that the sidecar carries on this tunnel; `None`: all of the session.
    protocols: Option<Arc<[Arc<str>]>>,
    /// How it does.
    pub(super) standing: Arc<Standing>,
    /// Its share beside the others.
    pub(super) weight: u32,
    /// What cookies call it.
    pub(super) tag: u128,
}

impl Routing {
    /// Returns the picture of `sources`. Routes of the file win over announced ones, of those the
    /// older session's, and last come those of sidecars that are gone.
    ///
    /// What the routes' policies remember stays as far as `before` has it.
    pub(super) fn build(sources: &Sources, before: &Self, metrics: &Arc<Metrics>) -> Self {
        let mut routes = sources.own.clone();
        let mut taken: std::collections::HashSet<Match> =
            routes.iter().map(|route| route.matches.clone()).collect();
        let own = Earlier::of(sources.own.iter(), &sources.base_domains);
        let mut tunnels: HashMap<Arc<str>, Tunnel> = HashMap::new();
        let now = policy::now();
        for document in sources.documents.values() {
            for route in &document.routes {
                if own.over(route).is_none() && taken.insert(route.matches.clone()) {
                    routes.push(Arc::clone(route));
                }
            }
            for announced in &document.tunnels {
                let tunnel = tunnels.entry(Arc::clone(&announced.name)).or_default();
                if let Some(reason) = &announced.unavailable {
                    tunnel.unavailable = Some(Arc::clone(reason));
                    continue;
                }
                let session = &document.session;
                let known = before.tunnel(&announced.name);
                let known = known.and_then(|tunnel| tunnel.serving_of(session.epoch));
                let (standing, tag) = match known {
                    Some(known) => (Arc::clone(&known.standing), known.tag),
                    None => (
                        Arc::new(Standing::new(now)),
                        affinity::tag(&session.instance, &announced.name),
                    ),
                };
                tunnel.serving.push(Serving {
                    session: Arc::clone(session),
                    grant: Arc::clone(&document.grant),
                    protocols: announced.protocols.clone(),
                    standing,
                    weight: announced.weight,
                    tag,
                });
            }
        }
        for (name, tunnel) in &mut tunnels {
            tunnel.begin(before.tunnel(name), now);
        }
        // Nobody serves these; their clients hear 503 and not 404. None is in the way of a route that is
        // served, however either says its host.
        if !sources.lost.is_empty() {
            let live = routes.clone();
            let live = Earlier::of(live.iter(), &sources.base_domains);
            for (_, document) in &sources.lost {
                for route in &document.routes {
                    if !live.has_any_of(route)
                        && live.over(route).is_none()
                        && taken.insert(route.matches.clone())
                    {
                        routes.push(Arc::clone(route));
                    }
                }
            }
        }
        // What is announced in other words than the file's may still be the same.
        let (table, ambiguity) = RouteTable::build_in_order(&routes, &sources.base_domains);
        if let Some(ambiguity) = ambiguity {
            tracing::debug!(%ambiguity, "the first of these routes has them");
        }
        let policies = RouteStates::build(&routes, &before.policies, metrics);
        Self { table, policies, tunnels, sessions: sources.documents.len() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.tunnels.is_empty()
    }

    pub(super) fn tunnel(&self, name: &str) -> Option<&Tunnel> {
        self.tunnels.get(name)
    }

    pub(super) fn tunnels(&self) -> impl Iterator<Item = (&Arc<str>, &Tunnel)> {
        self.tunnels.iter()
    }
}

impl Routing {
    /// Returns the next tunnel to try for an exchange, and its place among the route's: of those that
    /// are served and not in `tried` one by its weight, else one that is not served, whose reason the
    /// client is told. `tag`: a sidecar of one of them is asked for.
    pub(super) fn choose<'r>(
        &self,
        route: &'r Route,
        protocol_type: &str,
        tried: u32,
        tag: Option<u128>,
    ) -> Option<(usize, &'r Arc<str>)> {
        if let [only] = route.tunnels.as_slice() {
            return (tried == 0).then_some((0, &only.tunnel));
        }
        let untried = || {
            let shares = route.tunnels.iter().take(SHARES_MAX).enumerate();
            shares.filter(|(place, _)| tried & (1 << place) == 0)
        };
        let tagged = tag.and_then(|tag| {
            let has = |name: &str| self.tunnel(name).is_some_and(|tunnel| tunnel.has(tag));
            untried().find(|(_, share)| has(&share.tunnel))
        });
        if let Some((place, share)) = tagged {
            return Some((place, &share.tunnel));
        }
        let served = untried()
            .filter(|(_, share)| {
                let tunnel = self.tunnel(&share.tunnel);
                tunnel.is_some_and(|tunnel| tunnel.is_served(protocol_type))
            })
            .map(|(place, share)| (place, share.weight));
        let place = pick(served, random()).or_else(|| untried().next().map(|(place, _)| place))?;
        Some((place, &route.tunnels[place].tunnel))
    }
}

/// Picks by weight; those of weight 0 only where there are no others.
fn pick(shares: impl Iterator<Item = (usize, u32)> + Clone, random: u64) -> Option<usize> {
    let sum: u64 = shares.clone().map(|(_, weight)| u64::from(weight)).sum();
    if sum == 0 {
        let count = shares.clone().count() as u64;
        let index = random.checked_rem(count)?;
        return shares.into_iter().nth(usize::try_from(index).ok()?).map(|(place, _)| place);
    }
    let mut point = random % sum;
    for (place, weight) in shares {
        match point.checked_sub(u64::from(weight)) {
            Some(rest) => point = rest,
            None => return Some(place),
        }
    }
    None
}

/// Returns a number that spreads well (SplitMix64) and costs next to nothing.
pub(super) fn random() -> u64 {
    thread_local! {
        static STATE: Cell<u64> = Cell::new(crate::random::number());
    }
    let state = STATE.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
    STATE.set(state);
    let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

impl Tunnel {
    fn is_served(&self, protocol_type: &str) -> bool {
        self.serving.iter().any(|serving| serving.carries(protocol_type).is_some())
    }

    /// Returns why an exchange finds nobody here, where nobody is asked.
    pub(super) fn why_not(&self) -> (u32, Cow<'static, str>) {
        match &self.unavailable {
            Some(reason) if self.serving.is_empty() => {
                (failure::NO_SIDECAR, format!("its service is unavailable: {reason}").into())
            }
            _ => (failure::NO_PROTOCOL, "no connected sidecar carries the protocol".into()),
        }
    }

    /// Makes what is chosen by; goes on with what `before` knows.
    fn begin(&mut self, before: Option<&Self>, now: u64) {
        self.draw = Draw::new(self.serving.iter().map(|serving| serving.weight).collect());
        let tags = self.serving.iter().enumerate();
        // Of two sessions of one instance the newer has it.
        self.by_tag = tags.map(|(place, serving)| (serving.tag, place)).collect();
        if let Some(before) = before {
            self.budget = Arc::clone(&before.budget);
        }
        // Others have gone, and more than half would be left aside.
        let ejected = || self.serving.iter().filter(|serving| serving.standing.is_ejected(now));
        let beyond = ejected().count().saturating_sub(self.serving.len() / 2);
        for serving in ejected().take(beyond) {
            serving.standing.readmit(now);
        }
    }

    /// Returns those who serve it, by epoch.
    pub(super) fn all(&self) -> &[Serving] {
        &self.serving
    }

    /// Returns the part of a session.
    fn serving_of(&self, epoch: u64) -> Option<&Serving> {
        let place = self.serving.binary_search_by_key(&epoch, |serving| serving.session.epoch);
        self.serving.get(place.ok()?)
    }

    fn has(&self, tag: u128) -> bool {
        self.by_tag.contains_key(&tag)
    }

    /// Chooses one that `is_able` says can take an exchange: the one of `tag` where it is among them and
    /// not left aside, else by weight and load. Allocates nothing.
    pub(super) fn choose(
        &self,
        tag: Option<u128>,
        is_able: impl Fn(&Serving) -> bool,
    ) -> Option<&Serving> {
        // With one there is nothing to choose, and no clock to be read.
        let now = if self.serving.len() > 1 { policy::now() } else { u64::MAX };
        let of_tag = tag.and_then(|tag| self.serving.get(*self.by_tag.get(&tag)?));
        let is_in = |one: &&Serving| is_able(one) && !one.standing.is_ejected(now);
        if let Some(serving) = of_tag.filter(is_in) {
            return Some(serving);
        }
        let place = self.draw.choose(
            now,
            random,
            |place| &*self.serving[place].standing,
            |place| is_able(&self.serving[place]),
        );
        place.map(|place| &self.serving[place])
    }
}

impl Serving {
    /// Returns whether it can take an exchange now, whichever that is.
    pub(super) fn is_open(&self) -> bool {
        self.session.is_open() && self.is_granted()
    }

    /// Returns whether the session may still be given exchanges by what its document claimed.
    pub(super) fn is_granted(&self) -> bool {
        self.session.is_granted(&self.grant)
    }

    /// Returns the number under which the session carries this protocol on the tunnel.
    pub(super) fn carries(&self, protocol_type: &str) -> Option<u32> {
        let is_carried = self
            .protocols
            .as_ref()
            .is_none_or(|types| types.iter().any(|carried| **carried == *protocol_type));
        is_carried.then(|| self.session.protocols.number(protocol_type)).flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picks(weights: &[u32]) -> Vec<usize> {
        let shares = weights.iter().copied().enumerate();
        (0..1000).filter_map(|random| pick(shares.clone(), random)).collect()
    }

    #[test]
    fn tunnels_get_their_share() {
        let table: &[(&[u32], &[usize])] = &[
            (&[90, 10], &[900, 100]),
            (&[1, 1], &[500, 500]),
            (&[0, 5], &[0, 1000]),
            (&[0, 0], &[500, 500]),
            (&[3, 0, 1], &[750, 0, 250]),
            (&[u32::MAX, u32::MAX], &[1000, 0]),
        ];
        assert!(!table.is_empty());
        for (weights, expected) in table {
            let picks = picks(weights);
            for (place, expected) in expected.iter().enumerate() {
                let count = picks.iter().filter(|picked| **picked == place).count();
                assert_eq!(count, *expected, "{weights:?}, place {place}");
            }
        }
        assert!(picks(&[]).is_empty());
    }

    #[test]
    fn random_numbers_spread() {
        let ones: u32 = (0..1000).map(|_| random().count_ones()).sum();
        assert!((31_000..33_000).contains(&ones), "{ones} of 64000 bits");
    }
}
