//! What a route asks for beyond its tunnel, at the relay's end: who may come in and how often, what
//! changes in heads, how long it may take.
//!
//! Owns the state of routes (buckets, counts, known users), which outlives a reload that leaves the
//! policy it belongs to as it was. Knows no plugins: an exchange that may not go on is a [`Refusal`],
//! which the protocol's plugin says in its words.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use http::{HeaderMap, HeaderValue};
use sidelane_abi::failure;
use sidelane_tunnel::proto;

use super::moving::Budget;
use super::summary::Summary;
use crate::config::policy::{Addresses, Hsts, Policies};
use crate::config::{Match, Route};
use crate::metrics::{Metrics, RouteMetrics};
use crate::plugin::lend::Failure;

mod auth;
mod compress;
mod edit;
mod rate;
mod respond;
mod watch;

pub(super) use auth::{Checked, Question, Verdict};
pub(super) use edit::{change, end_hop, rewrite};
pub(super) use respond::{LimitedBody, Shaped, Shaping};
pub(super) use watch::{Held, Watch, watch_stream};

use auth::Authenticator;
use rate::{Bucket, ClientBuckets};

/// What can refuse an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Policy {
    /// `addresses`
    Addresses,
    /// `limits.rate`
    Rate,
    /// `limits.rate_per_client`
    RatePerClient,
    /// `limits.concurrent`
    Concurrent,
    /// `basic_auth`
    BasicAuth,
    /// `limits.body`
    Body,
}

impl Policy {
    const ALL: [Self; 6] = [
        Self::Addresses,
        Self::Rate,
        Self::RatePerClient,
        Self::Concurrent,
        Self::BasicAuth,
        Self::Body,
    ];

    /// Whether a route's policies ask for it.
    fn is_asked(self, policies: &Policies) -> bool {
        let limits = &policies.limits;
        match self {
            Self::Addresses => !policies.addresses.is_empty(),
            Self::Rate => limits.rate.is_some(),
            Self::RatePerClient => limits.rate_per_client.is_some(),
            Self::Concurrent => limits.concurrent.is_some(),
            Self::BasicAuth => policies.basic_auth.is_some(),
            Self::Body => limits.body.is_some(),
        }
    }

    /// As a label.
    const fn name(self) -> &'static str {
        match self {
            Self::Addresses => "addresses",
            Self::Rate => "rate",
            Self::RatePerClient => "rate_per_client",
            Self::Concurrent => "concurrent",
            Self::BasicAuth => "basic_auth",
            Self::Body => "body",
        }
    }
}

/// Why an exchange may not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) policy: Policy,
    code: u32,
    retry_after: Option<Duration>,
    detail: &'static str,
}

impl Refusal {
    const fn new(policy: Policy, code: u32, detail: &'static str) -> Self {
        Self { policy, code, retry_after: None, detail }
    }

    const fn after(self, wait: Duration) -> Self {
        Self { retry_after: Some(wait), ..self }
    }

    /// The body is larger than the route allows.
    pub(super) const fn too_large() -> Self {
        Self::new(
            Policy::Body,
            failure::TOO_LARGE,
            "the request's body is larger than the route allows",
        )
    }

    /// The client must say who it is.
    pub(super) const fn unauthorized() -> Self {
        Self::new(
            Policy::BasicAuth,
            failure::UNAUTHORIZED,
            "the route asks for a user name and password",
        )
    }

    const fn guesses(wait: Duration) -> Self {
        Self::new(
            Policy::BasicAuth,
            failure::RATE_LIMITED,
            "too many attempts with a password from this address",
        )
        .after(wait)
    }

    const fn checks() -> Self {
        Self::new(Policy::BasicAuth, failure::OVERLOADED, "too many passwords are being checked")
    }

    /// As a plugin says it.
    pub(super) fn failure(self) -> Failure {
        Failure {
            code: self.code,
            retry_after_s: self.retry_after.map(whole_seconds),
            detail: self.detail.to_owned(),
        }
    }
}

/// Rounds up: who comes back then is let in.
fn whole_seconds(wait: Duration) -> u32 {
    let seconds = wait.as_secs().saturating_add(u64::from(wait.subsec_nanos() > 0));
    u32::try_from(seconds.max(1)).unwrap_or(u32::MAX)
}

/// Nanoseconds of this process's clock, for buckets.
pub(super) fn now() -> u64 {
    static EPOCH: OnceLock<Instant> = OnceLock::new();
    let epoch = *EPOCH.get_or_init(Instant::now);
    u64::try_from(epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// A route's policies with all that they remember.
pub(super) struct RouteState {
    pub(super) route: Arc<Route>,
    pub(super) policies: Arc<Policies>,
    pub(super) metrics: RouteMetrics,
    /// `Strict-Transport-Security`.
    hsts: Option<HeaderValue>,
    rate: Option<Arc<Bucket>>,
    clients: Option<Arc<ClientBuckets>>,
    /// Exchanges that run, also those that began under the configuration before.
    running: Arc<AtomicUsize>,
    auth: Option<Arc<Authenticator>>,
    /// Of moves to another sidecar; `None`: those of the tunnel count.
    pub(super) move_budget: Option<Arc<Budget>>,
    summaries: Arc<[Summary; Policy::ALL.len()]>,
}

impl RouteState {
    /// Returns the state of a route; `before` is that of the route in its place. What has not changed
    /// in it is the same object. `None`: the route has no policies.
    fn of(route: &Arc<Route>, before: Option<&Self>, metrics: &Arc<Metrics>) -> Option<Self> {
        let policies = Arc::clone(route.policies.as_ref()?);
        let limits = &policies.limits;
        let kept = |same: fn(&Policies, &Policies) -> bool| {
            before.filter(|before| same(&before.policies, &policies))
        };
        let rate = limits.rate.as_ref().map(|rate| {
            kept(|a, b| a.limits.rate == b.limits.rate)
                .and_then(|before| before.rate.clone())
                .unwrap_or_else(|| Arc::new(Bucket::new(rate)))
        });
        let clients = limits.rate_per_client.as_ref().map(|rate| {
            kept(|a, b| a.limits.rate_per_client == b.limits.rate_per_client)
                .and_then(|before| before.clients.clone())
                .unwrap_or_else(|| Arc::new(ClientBuckets::new(rate)))
        });
        let auth = policies.basic_auth.as_ref().map(|auth| {
            kept(|a, b| a.basic_auth == b.basic_auth)
                .and_then(|before| before.auth.clone())
                .unwrap_or_else(|| Arc::new(Authenticator::new(auth)))
        });
        let metrics = metrics.route(&route.name);
        let timeouts = [("idle", policies.timeouts.idle), ("total", policies.timeouts.total)];
        metrics.begin(
            Policy::ALL.into_iter().filter(|policy| policy.is_asked(&policies)).map(Policy::name),
            timeouts.into_iter().filter_map(|(name, timeout)| timeout.map(|_| name)),
            policies.redirect.is_some(),
        );
        Some(Self {
            route: Arc::clone(route),
            metrics,
            hsts: policies.hsts.as_ref().map(hsts_value),
            rate,
            clients,
            running: before.map(|before| Arc::clone(&before.running)).unwrap_or_default(),
            auth,
            move_budget: policies.retries.as_ref().map(|retries| {
                kept(|a, b| a.retries == b.retries)
                    .and_then(|before| before.move_budget.clone())
                    .unwrap_or_else(|| Arc::new(Budget::of(retries)))
            }),
            summaries: before.map(|before| Arc::clone(&before.summaries)).unwrap_or_default(),
            policies,
        })
    }

    /// Lets an exchange in that nobody is asked about any more, as long as what is returned lives.
    ///
    /// # Errors
    /// The first policy that refuses it.
    pub(super) fn admit(
        self: &Arc<Self>,
        client: Option<IpAddr>,
        now: u64,
    ) -> Result<Admitted, Refusal> {
        self.pass(client, now)?;
        self.enter()
    }

    /// Whether an exchange may come in by address and rates. `None` as `client`: its address is not known,
    /// which no list of addresses allows. A client that is past its own rate takes nothing of the route's.
    ///
    /// # Errors
    /// The first policy that refuses it.
    pub(super) fn pass(&self, client: Option<IpAddr>, now: u64) -> Result<(), Refusal> {
        if !may_come(&self.policies.addresses, client) {
            let detail = "the route is closed to this address";
            return Err(Refusal::new(Policy::Addresses, failure::FORBIDDEN, detail));
        }
        if let (Some(buckets), Some(client)) = (&self.clients, client) {
            buckets.take(client, now).map_err(|wait| {
                let detail = "the route's rate limit for one client is reached";
                Refusal::new(Policy::RatePerClient, failure::RATE_LIMITED, detail).after(wait)
            })?;
        }
        if let Some(bucket) = &self.rate {
            bucket.take(now).map_err(|wait| {
                let detail = "the route's rate limit is reached";
                Refusal::new(Policy::Rate, failure::RATE_LIMITED, detail).after(wait)
            })?;
        }
        Ok(())
    }

    /// Counts an exchange that may come in among those that run.
    ///
    /// # Errors
    /// There are as many as may be.
    pub(super) fn enter(self: &Arc<Self>) -> Result<Admitted, Refusal> {
        let running = self.running.fetch_add(1, Ordering::Relaxed);
        self.metrics.begun();
        let admitted = Admitted { state: Arc::clone(self) };
        let limit = self.policies.limits.concurrent;
        if limit.is_some_and(|limit| running >= limit as usize) {
            let detail = "the route has as many exchanges as it may";
            return Err(Refusal::new(Policy::Concurrent, failure::OVERLOADED, detail));
        }
        Ok(admitted)
    }

    /// Looks at who a request says it comes from.
    pub(super) fn look(&self, headers: &HeaderMap, client: IpAddr, now: u64) -> Verdict {
        match &self.auth {
            Some(auth) => auth.look(headers, client, now),
            None => Verdict::Known,
        }
    }

    /// `WWW-Authenticate`, where the route asks.
    pub(super) fn challenge(&self) -> Option<HeaderValue> {
        self.auth.as_ref().map(|auth| auth.challenge())
    }

    /// Takes note of a refusal.
    pub(super) fn refused(&self, refusal: Refusal, client: Option<IpAddr>) {
        let policy = refusal.policy.name();
        self.metrics.refused(policy);
        let route = &*self.route.name;
        let code = failure::name(refusal.code);
        let client = client.map(tracing::field::display);
        tracing::debug!(route, policy, code, client, "exchange refused");
        if let Some(refused) = self.summaries[refusal.policy as usize].note(now()) {
            tracing::info!(route, policy, code, refused, "a policy refuses exchanges");
        }
    }

    /// What the sidecar's end is asked to do; `None`: nothing.
    pub(super) fn delivery(&self) -> Option<proto::DeliveryPolicy> {
        let timeouts = &self.policies.timeouts;
        let ms = |time: Option<Duration>| {
            // Zero would say that there is none.
            let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX).max(1);
            time.map(ms).unwrap_or_default()
        };
        let retries = self.policies.retries;
        let policy = proto::DeliveryPolicy {
            connect_timeout_ms: ms(timeouts.connect),
            response_head_timeout_ms: ms(timeouts.response_head),
            retries: retries.map(|retries| retries.attempts).unwrap_or_default(),
            retry_budget_percent: retries.map(|retries| retries.budget_percent).unwrap_or_default(),
            retry_budget_min: retries.map(|retries| retries.budget_min).unwrap_or_default(),
        };
        (policy != proto::DeliveryPolicy::default()).then_some(policy)
    }
}

impl From<Checked> for Result<(), Refusal> {
    fn from(checked: Checked) -> Self {
        match checked {
            Checked::Known => Ok(()),
            Checked::Unknown => Err(Refusal::unauthorized()),
            Checked::Overloaded => Err(Refusal::checks()),
            Checked::Limited(wait) => Err(Refusal::guesses(wait)),
        }
    }
}

impl Verdict {
    /// Returns whether the request goes on, or what is still to be asked.
    pub(super) fn settle(self) -> Result<Option<Question>, Refusal> {
        match self {
            Self::Known => Ok(None),
            Self::Ask(question) => Ok(Some(question)),
            Self::Unknown => Err(Refusal::unauthorized()),
            Self::Limited(wait) => Err(Refusal::guesses(wait)),
        }
    }
}

/// Returns the field's value (RFC 6797 §6.1).
fn hsts_value(hsts: &Hsts) -> HeaderValue {
    let subdomains = if hsts.include_subdomains { "; includeSubDomains" } else { "" };
    let preload = if hsts.preload { "; preload" } else { "" };
    let value = format!("max-age={}{subdomains}{preload}", hsts.max_age.as_secs());
    HeaderValue::try_from(value).expect("digits and directives are fit for a field")
}

fn may_come(addresses: &Addresses, client: Option<IpAddr>) -> bool {
    if addresses.is_empty() {
        return true;
    }
    let Some(client) = client.map(|client| client.to_canonical()) else { return false };
    let is_in = |list: &[ipnet::IpNet]| list.iter().any(|net| net.contains(&client));
    !is_in(&addresses.deny) && (addresses.allow.is_empty() || is_in(&addresses.allow))
}

/// An exchange that was let in, counted until dropped.
pub(super) struct Admitted {
    pub(super) state: Arc<RouteState>,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.state.running.fetch_sub(1, Ordering::Relaxed);
        self.state.metrics.ended();
    }
}

/// The states of all routes that have policies.
#[derive(Default)]
pub(super) struct RouteStates {
    /// By the route's place in memory, which its state keeps.
    by_route: HashMap<usize, Arc<RouteState>>,
}

impl RouteStates {
    /// Returns the states of `routes`, which take different exchanges each; what `before` remembers of
    /// those that take the same stays.
    pub(super) fn build(routes: &[Arc<Route>], before: &Self, metrics: &Arc<Metrics>) -> Self {
        let mut by_match: Option<HashMap<&Match, &Arc<RouteState>>> = None;
        let mut by_route = HashMap::new();
        for route in routes.iter().filter(|route| route.policies.is_some()) {
            let state = before.of(route).cloned().or_else(|| {
                let by_match = by_match.get_or_insert_with(|| {
                    let states = before.by_route.values();
                    states.map(|state| (&state.route.matches, state)).collect()
                });
                let before = by_match.get(&route.matches).map(|state| &***state);
                RouteState::of(route, before, metrics).map(Arc::new)
            });
            if let Some(state) = state {
                by_route.insert(place(route), state);
            }
        }
        Self { by_route }
    }

    /// Returns a route's state; `None`: it has no policies.
    pub(super) fn of(&self, route: &Arc<Route>) -> Option<&Arc<RouteState>> {
        self.by_route.get(&place(route))
    }
}

fn place(route: &Arc<Route>) -> usize {
    Arc::as_ptr(route).addr()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::policy::{BasicAuth, Rate, Retries, RouteLimits, RouteTimeouts};
    use crate::config::{MatchSpec, Share};

    fn route(name: &str, policies: Policies) -> Arc<Route> {
        let spec = MatchSpec { subdomain: Some(name), ..MatchSpec::default() };
        Arc::new(Route {
            name: name.into(),
            tunnels: vec![Share { tunnel: "t".into(), weight: 1 }],
            matches: Match::parse(&spec).expect("a valid match"),
            options: Default::default(),
            policies: Some(Arc::new(policies)),
        })
    }

    fn state(policies: Policies) -> Arc<RouteState> {
        let route = route("r", policies);
        Arc::new(RouteState::of(&route, None, &Arc::new(Metrics::new())).expect("policies"))
    }

    fn rate(count: u32) -> Option<Rate> {
        Some(Rate { count, per: Duration::from_secs(1), burst: count })
    }

    #[test]
    fn addresses_are_denied_before_they_are_allowed() {
        let nets = |list: &[&str]| list.iter().map(|net| net.parse().unwrap()).collect();
        let table: &[(&[&str], &[&str], &str, bool)] = &[
            (&[], &[], "192.0.2.1", true),
            (&["10.0.0.0/8"], &[], "10.1.2.3", true),
            (&["10.0.0.0/8"], &[], "192.0.2.1", false),
            (&["10.0.0.0/8"], &["10.1.0.0/16"], "10.1.2.3", false),
            (&["10.0.0.0/8"], &["10.1.0.0/16"], "10.2.2.3", true),
            (&[], &["10.1.0.0/16"], "10.1.2.3", false),
            (&[], &["10.1.0.0/16"], "192.0.2.1", true),
            (&["10.0.0.0/8"], &[], "::ffff:10.0.0.1", true),
            (&["2001:db8::/32"], &[], "2001:db8::1", true),
            (&["2001:db8::/32"], &[], "10.0.0.1", false),
        ];
        assert!(!table.is_empty());
        for (allow, deny, client, comes) in table {
            let addresses = Addresses { allow: nets(allow), deny: nets(deny) };
            let policies = Policies { addresses, ..Policies::default() };
            let admitted = state(policies).admit(Some(client.parse().unwrap()), 1);
            assert_eq!(admitted.is_ok(), *comes, "{allow:?} {deny:?} {client}");
        }
        let addresses = Addresses { allow: nets(&["0.0.0.0/0", "::/0"]), deny: vec![] };
        let closed = state(Policies { addresses, ..Policies::default() });
        assert!(closed.admit(None, 1).is_err(), "an unknown address is in no list");
    }

    #[test]
    fn limits_refuse_in_their_own_words() {
        let client = Some(IpAddr::from([192, 0, 2, 1]));
        let limits = |limits| state(Policies { limits, ..Policies::default() });
        let none = RouteLimits::default();
        let table = [
            (RouteLimits { rate: rate(1), ..none }, Policy::Rate, 429, Some(1)),
            (RouteLimits { rate_per_client: rate(1), ..none }, Policy::RatePerClient, 429, Some(1)),
            (RouteLimits { concurrent: Some(1), ..none }, Policy::Concurrent, 503, None),
        ];
        assert!(!table.is_empty());
        for (wanted, policy, status, retry) in table {
            let state = limits(wanted);
            let first = state.admit(client, 1).map_err(|refusal| refusal.policy);
            let first = first.expect("the first comes in");
            let refusal = state.admit(client, 1).map(|_| ()).expect_err("the second does not");
            assert_eq!(refusal.policy, policy);
            let failure = refusal.failure();
            assert_eq!(crate::front::status_of(failure.code).as_u16(), status, "{policy:?}");
            assert_eq!(failure.retry_after_s, retry, "{policy:?}");
            drop(first);
            assert!(state.admit(client, 2_000_000_000).is_ok(), "{policy:?} passes");
        }
    }

    #[test]
    fn a_client_past_its_own_rate_takes_nothing_of_the_routes() {
        let limits =
            RouteLimits { rate: rate(5), rate_per_client: rate(1), ..RouteLimits::default() };
        let state = state(Policies { limits, ..Policies::default() });
        let pass = |number: u8| state.pass(Some(IpAddr::from([192, 0, 2, number])), 1);
        assert!(pass(1).is_ok());
        for _ in 0..100 {
            assert_eq!(pass(1).map_err(|refusal| refusal.policy), Err(Policy::RatePerClient));
        }
        assert!((2..=5).all(|number| pass(number).is_ok()), "others have what is left");
        assert_eq!(pass(6).map_err(|refusal| refusal.policy), Err(Policy::Rate));
    }

    #[test]
    fn a_refused_exchange_is_not_counted_as_running() {
        let limits = RouteLimits { concurrent: Some(2), ..RouteLimits::default() };
        let state = state(Policies { limits, ..Policies::default() });
        let two = [state.admit(None, 1), state.admit(None, 1)];
        assert!((0..10).all(|_| state.admit(None, 1).is_err()));
        assert_eq!(state.running.load(Ordering::Relaxed), 2);
        drop(two);
        assert_eq!(state.running.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn retry_after_is_rounded_up() {
        let table = [(0, 1), (1, 1), (999, 1), (1000, 1), (1001, 2), (60_000, 60)];
        assert!(!table.is_empty());
        for (ms, seconds) in table {
            assert_eq!(whole_seconds(Duration::from_millis(ms)), seconds, "{ms} ms");
        }
        assert_eq!(whole_seconds(Duration::MAX), u32::MAX);
    }

    #[test]
    fn what_a_policy_remembers_outlives_changes_of_others() {
        let metrics = Arc::new(Metrics::new());
        let policies = Policies {
            limits: RouteLimits {
                rate: rate(1),
                rate_per_client: rate(2),
                concurrent: Some(5),
                body: None,
            },
            basic_auth: Some(BasicAuth { realm: "r".into(), users: vec![] }),
            ..Policies::default()
        };
        let first = [route("a", policies.clone()), route("b", policies.clone())];
        let before = RouteStates::build(&first, &RouteStates::default(), &metrics);
        let old = before.of(&first[0]).expect("has policies");
        let running = old.admit(None, 1).map_err(|refusal| refusal.policy).expect("let in");

        let mut changed = policies.clone();
        changed.limits.rate = rate(7);
        changed.limits.concurrent = Some(1);
        let second = [route("a", changed), Arc::clone(&first[1])];
        let after = RouteStates::build(&second, &before, &metrics);
        let new = after.of(&second[0]).expect("has policies");
        let same = |a: &Option<Arc<Bucket>>, b: &Option<Arc<Bucket>>| {
            Arc::ptr_eq(a.as_ref().unwrap(), b.as_ref().unwrap())
        };
        assert!(!same(&new.rate, &old.rate), "another rate begins anew");
        let clients = |state: &RouteState| Arc::as_ptr(state.clients.as_ref().unwrap());
        assert_eq!(clients(new), clients(old));
        let auth = |state: &RouteState| Arc::as_ptr(state.auth.as_ref().unwrap());
        assert_eq!(auth(new), auth(old));
        assert!(new.admit(None, 1).is_err(), "what runs counts under the new limit");
        drop(running);
        assert!(new.admit(None, 1).is_ok());
        let unchanged = (before.of(&first[1]).unwrap(), after.of(&first[1]).unwrap());
        assert!(Arc::ptr_eq(unchanged.0, unchanged.1), "the same route, the same state");
    }

    #[test]
    fn what_may_be_counted_begins_at_zero() {
        let metrics = Arc::new(Metrics::new());
        let policies = Policies {
            limits: RouteLimits { body: Some(1), ..RouteLimits::default() },
            timeouts: RouteTimeouts { idle: Some(Duration::from_secs(1)), ..Default::default() },
            ..Policies::default()
        };
        let _state = RouteState::of(&route("r", policies), None, &metrics);
        let mut text = String::new();
        metrics.encode(&mut text);
        let refused: Vec<_> =
            text.lines().filter(|line| line.starts_with("sidelane_policy_")).collect();
        let expected = [
            "sidelane_policy_refused_total{route=\"r\",policy=\"body\"} 0",
            "sidelane_policy_timeouts_total{route=\"r\",timeout=\"idle\"} 0",
        ];
        assert_eq!(refused, expected);
    }

    #[test]
    fn the_sidecar_is_asked_for_its_part_alone() {
        assert_eq!(state(Policies::default()).delivery(), None);
        let asked = state(Policies {
            timeouts: RouteTimeouts {
                connect: Some(Duration::from_micros(1)),
                response_head: Some(Duration::from_secs(10)),
                idle: Some(Duration::from_secs(1)),
                total: Some(Duration::from_secs(1)),
            },
            retries: Some(Retries { attempts: 2, budget_percent: 20, budget_min: 10 }),
            ..Policies::default()
        });
        let delivery = asked.delivery().expect("asked");
        assert_eq!(delivery.connect_timeout_ms, 1);
        assert_eq!(delivery.response_head_timeout_ms, 10_000);
        assert_eq!((delivery.retries, delivery.retry_budget_percent), (2, 20));
        assert_eq!(delivery.retry_budget_min, 10);
    }
}
