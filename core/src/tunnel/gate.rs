//! Who may begin a handshake: bounds on how many come in a second, and on how many of one address
//! fail in a minute.
//!
//! Knows addresses and times; knows nothing of what is said. What it remembers of strangers is
//! bounded, however many there are.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher as _, RandomState};
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::address;

/// How often the gate's count begins anew, and so the least time that a dialler that came too soon is asked
/// to stay away.
const WINDOW: Duration = Duration::from_secs(1);

/// The longest: that of a herd of six thousand at the default rate. Further ones come too soon once more.
const RETRY_AFTER_RATE_MAX: u32 = 30;

/// How long failures of an address count, from the first of them.
const FAILURES_KEPT: Duration = Duration::from_secs(60);

/// Most addresses whose failures are remembered; the one that began first makes room.
const FAILING_MAX: usize = 4096;

/// What a failure weighs, and one by the same credential again. That is no guess, but a sidecar whose
/// credential was withdrawn, and others at its address are not to pay for it.
const WEIGHT: u32 = 10;
const WEIGHT_AGAIN: u32 = 1;

/// Most credentials of an address that are known again.
const SEEN_MAX: usize = 64;

/// What handshakes are bounded by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// From a dialler's connection to its whole hello, and for our answer to be taken.
    pub timeout: Duration,
    /// For TLS before that.
    pub tls_timeout: Duration,
    /// Handshakes begun in one second, over all addresses.
    pub per_second: u32,
    /// The same for one address.
    pub per_second_and_address: u32,
    /// Handshakes of one address that may fail in a minute.
    pub failures_per_minute_and_address: u32,
}

/// Why one is not let in, before anything is known of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TurnedAway {
    /// Too many come at once.
    Rate {
        /// When those before it have been let in.
        retry_after: Duration,
    },
    /// Too many of its address have failed.
    Failures {
        /// When they are forgotten.
        retry_after: Duration,
        /// It is the first that is turned away for them.
        is_first: bool,
    },
}

impl TurnedAway {
    /// Too many are under way, which is over as soon as one of them is.
    pub const BUSY: Self = Self::Rate { retry_after: WINDOW };

    /// The reason as a metric's label.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Rate { .. } => "rate",
            Self::Failures { .. } => "failures",
        }
    }

    /// What the dialler is told.
    #[must_use]
    pub const fn detail(self) -> &'static str {
        match self {
            Self::Rate { .. } => "too many sidecars dial at once",
            Self::Failures { .. } => "too many handshakes from this address have failed",
        }
    }

    /// When it may come back.
    #[must_use]
    pub const fn retry_after(self) -> Duration {
        match self {
            Self::Rate { retry_after } | Self::Failures { retry_after, .. } => retry_after,
        }
    }
}

/// Lets handshakes begin.
#[derive(Debug, Default)]
pub struct Gate {
    window: Mutex<Window>,
    failing: Mutex<Failing>,
    /// Of what was presented; nobody else can make the same.
    hasher: RandomState,
}

#[derive(Debug, Default)]
struct Window {
    began: Option<Instant>,
    total: u32,
    /// Those that were told to come back, and have not had their second yet.
    expected: u32,
    /// Invariant: as many entries as handshakes in this second at most, emptied each second.
    by_address: HashMap<IpAddr, OfAddress>,
}

/// What one address has asked for in a second.
#[derive(Debug, Default)]
struct OfAddress {
    begun: u32,
    refused: u32,
}

impl Window {
    fn enter_address(&mut self, bounds: &Bounds, address: IpAddr) -> Result<(), TurnedAway> {
        let of_address = self.by_address.entry(address::client(address)).or_default();
        if of_address.begun >= bounds.per_second_and_address {
            let retry_after = queue(&mut of_address.refused, bounds.per_second_and_address);
            return Err(TurnedAway::Rate { retry_after });
        }
        of_address.begun += 1;
        Ok(())
    }

    /// Begins anew where the window is over.
    fn begin(&mut self, bounds: &Bounds, now: Instant) {
        let elapsed = self.began.map(|began| now.saturating_duration_since(began));
        if elapsed.is_some_and(|elapsed| elapsed < WINDOW) {
            return;
        }
        let windows = u32::try_from(elapsed.unwrap_or_default().as_secs()).unwrap_or(u32::MAX);
        let had_their_turn = bounds.per_second.saturating_mul(windows);
        let expected = self.expected.saturating_sub(had_their_turn);
        *self = Self { began: Some(now), expected, ..Self::default() };
    }
}

/// Puts one more in the line of those that are to come back, and returns when its turn is. Told one time
/// for all, they would come together again, and all but a few in vain.
fn queue(waiting: &mut u32, per_second: u32) -> Duration {
    let behind = *waiting / per_second.max(1);
    let windows = behind.saturating_add(1).min(RETRY_AFTER_RATE_MAX);
    *waiting = waiting.saturating_add(1).min(per_second.saturating_mul(RETRY_AFTER_RATE_MAX));
    WINDOW * windows
}

/// Addresses whose handshakes fail.
#[derive(Debug, Default)]
struct Failing {
    /// Invariant: at most [`FAILING_MAX`], each in `order` once.
    by_address: HashMap<IpAddr, Failures>,
    /// The oldest first.
    order: VecDeque<IpAddr>,
}

#[derive(Debug)]
struct Failures {
    began: Instant,
    /// In parts of [`WEIGHT`].
    count: u32,
    is_told: bool,
    /// Hashes of credentials; at most [`SEEN_MAX`].
    seen: Vec<u64>,
}

impl Failing {
    /// Forgets what has its time.
    fn expire(&mut self, now: Instant) {
        while let Some(oldest) = self.order.front() {
            let is_over = self
                .by_address
                .get(oldest)
                .is_none_or(|failures| now.duration_since(failures.began) >= FAILURES_KEPT);
            if !is_over {
                return;
            }
            self.drop_oldest();
        }
    }

    fn drop_oldest(&mut self) {
        if let Some(oldest) = self.order.pop_front() {
            self.by_address.remove(&oldest);
        }
    }
}

impl Gate {
    /// Lets one more begin. Without an address, as of a proxy that brings many, the total alone counts.
    ///
    /// # Errors
    /// Why not. What is refused for its failures counts for nobody else's rate.
    pub fn enter(
        &self,
        bounds: &Bounds,
        address: impl Into<Option<IpAddr>>,
        now: Instant,
    ) -> Result<(), TurnedAway> {
        let address = address.into();
        self.check_failures(bounds, address, now)?;
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        window.begin(bounds, now);
        if window.total >= bounds.per_second {
            let retry_after = queue(&mut window.expected, bounds.per_second);
            return Err(TurnedAway::Rate { retry_after });
        }
        if let Some(address) = address {
            window.enter_address(bounds, address)?;
        }
        window.total += 1;
        Ok(())
    }

    /// The same for an address that is known only after one was let begin without: it does not count for the
    /// total again.
    ///
    /// # Errors
    /// Why not.
    pub fn enter_address(
        &self,
        bounds: &Bounds,
        address: IpAddr,
        now: Instant,
    ) -> Result<(), TurnedAway> {
        self.check_failures(bounds, address, now)?;
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        window.begin(bounds, now);
        window.enter_address(bounds, address)
    }

    /// Whether an address has failed too often to be listened to.
    ///
    /// # Errors
    /// It has.
    pub fn check_failures(
        &self,
        bounds: &Bounds,
        address: impl Into<Option<IpAddr>>,
        now: Instant,
    ) -> Result<(), TurnedAway> {
        let Some(address) = address.into() else { return Ok(()) };
        let mut failing = self.failing.lock().unwrap_or_else(PoisonError::into_inner);
        failing.expire(now);
        let Some(failures) = failing.by_address.get_mut(&address::client(address)) else {
            return Ok(());
        };
        if failures.count / WEIGHT < bounds.failures_per_minute_and_address {
            return Ok(());
        }
        let is_first = !std::mem::replace(&mut failures.is_told, true);
        let retry_after = FAILURES_KEPT.saturating_sub(now.duration_since(failures.began));
        Err(TurnedAway::Failures { retry_after, is_first })
    }

    /// A handshake of this address has failed by what was, or was not, said in it; `presented` is the
    /// credential that was refused, where it came as far as that.
    pub fn failed(
        &self,
        address: impl Into<Option<IpAddr>>,
        presented: Option<&[u8]>,
        now: Instant,
    ) {
        let Some(address) = address.into().map(address::client) else { return };
        let presented = presented.map(|presented| self.hasher.hash_one(presented));
        let mut failing = self.failing.lock().unwrap_or_else(PoisonError::into_inner);
        failing.expire(now);
        if !failing.by_address.contains_key(&address) {
            if failing.order.len() >= FAILING_MAX {
                failing.drop_oldest();
            }
            failing.order.push_back(address);
        }
        let first = || Failures { began: now, count: 0, is_told: false, seen: Vec::new() };
        let failures = failing.by_address.entry(address).or_insert_with(first);
        let is_again = presented.is_some_and(|hash| failures.seen.contains(&hash));
        if let Some(hash) = presented.filter(|_| !is_again && failures.seen.len() < SEEN_MAX) {
            failures.seen.push(hash);
        }
        let weight = if is_again { WEIGHT_AGAIN } else { WEIGHT };
        failures.count = failures.count.saturating_add(weight);
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const BOUNDS: Bounds = Bounds {
        timeout: Duration::ZERO,
        tls_timeout: Duration::ZERO,
        per_second: 7,
        per_second_and_address: 3,
        failures_per_minute_and_address: 2,
    };

    fn address(last: u8) -> IpAddr {
        Ipv4Addr::new(192, 0, 2, last).into()
    }

    fn text(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn one_address_cannot_take_all_handshakes() {
        let gate = Gate::default();
        let now = Instant::now();
        let entered = (0..100).filter(|_| gate.enter(&BOUNDS, address(1), now).is_ok()).count();
        assert_eq!(entered, 3);
        assert_eq!(gate.enter(&BOUNDS, address(2), now), Ok(()));
    }

    #[test]
    fn the_total_is_bounded_and_comes_back_after_a_second() {
        let gate = Gate::default();
        let now = Instant::now();
        let all = (0..=255).cycle().take(2000);
        let entered = all.filter(|n| gate.enter(&BOUNDS, address(*n), now).is_ok()).count();
        assert_eq!(entered, 7);
        assert_eq!(gate.enter(&BOUNDS, address(1), now + Duration::from_secs(1)), Ok(()));
    }

    /// When one that is turned away now is told to come back, in seconds.
    fn told(gate: &Gate, last: u8, now: Instant) -> u64 {
        match gate.enter(&BOUNDS, address(last), now) {
            Err(TurnedAway::Rate { retry_after }) => retry_after.as_secs(),
            other => panic!("it is let in: {other:?}"),
        }
    }

    #[test]
    fn those_that_are_turned_away_are_told_to_come_back_one_windowful_after_the_other() {
        let gate = Gate::default();
        let began = Instant::now();
        let in_first = (0..7).filter(|n| gate.enter(&BOUNDS, address(*n), began).is_ok()).count();
        assert_eq!(in_first, 7);
        let told_first: Vec<u64> = (0..20).map(|n| told(&gate, n, began)).collect();
        assert_eq!(told_first, [[1; 7].as_slice(), &[2; 7], &[3; 6]].concat());
        // A second later the first of them have their turn; whoever is new is behind the others.
        let later = began + WINDOW;
        let in_second = (0..7).filter(|n| gate.enter(&BOUNDS, address(*n), later).is_ok()).count();
        assert_eq!((in_second, told(&gate, 100, later)), (7, 2));
        // Nobody waits for ever.
        let long = (0..1000).map(|n| told(&gate, (n % 250) as u8, later)).max();
        assert_eq!(long, Some(RETRY_AFTER_RATE_MAX.into()));
        // Those that have stayed away are not waited for.
        let much_later = later + WINDOW * 1000;
        for n in 0..7 {
            assert_eq!(gate.enter(&BOUNDS, address(n), much_later), Ok(()));
        }
        assert_eq!(told(&gate, 8, much_later), 1);
    }

    #[test]
    fn many_of_one_address_come_back_as_it_may() {
        let gate = Gate::default();
        let now = Instant::now();
        let entered = (0..3).filter(|_| gate.enter(&BOUNDS, address(1), now).is_ok()).count();
        assert_eq!(entered, 3);
        let told: Vec<u64> = (0..7).map(|_| told(&gate, 1, now)).collect();
        assert_eq!(told, [1, 1, 1, 2, 2, 2, 3]);
        assert_eq!(gate.enter(&BOUNDS, address(2), now), Ok(()), "nobody else waits for them");
    }

    #[test]
    fn an_address_that_fails_is_turned_away_until_its_failures_are_forgotten() {
        let gate = Gate::default();
        let began = Instant::now();
        for _ in 0..2 {
            assert_eq!(gate.enter(&BOUNDS, address(1), began), Ok(()));
            gate.failed(address(1), None, began);
        }
        let later = began + Duration::from_secs(20);
        let away =
            |is_first| TurnedAway::Failures { retry_after: Duration::from_secs(40), is_first };
        assert_eq!(gate.enter(&BOUNDS, address(1), later), Err(away(true)));
        assert_eq!(gate.enter(&BOUNDS, address(1), later), Err(away(false)), "told once");
        assert_eq!(gate.enter(&BOUNDS, address(2), later), Ok(()), "nobody else is");
        let over = began + FAILURES_KEPT;
        assert_eq!(gate.enter(&BOUNDS, address(1), over), Ok(()));
        assert!(gate.failing.lock().expect("not poisoned").by_address.is_empty());
    }

    #[test]
    fn the_same_credential_again_weighs_less_than_another_one() {
        let gate = Gate::default();
        let now = Instant::now();
        for _ in 0..10 {
            gate.failed(address(1), Some(b"withdrawn"), now);
        }
        assert_eq!(gate.check_failures(&BOUNDS, address(1), now), Ok(()));
        gate.failed(address(1), Some(b"withdrawn"), now);
        gate.check_failures(&BOUNDS, address(1), now).expect_err("ten again are another one");
        for guess in [b"a", b"b"] {
            gate.failed(address(2), Some(guess), now);
        }
        gate.check_failures(&BOUNDS, address(2), now).expect_err("guesses");
        for guess in 0..1000_u32 {
            gate.failed(address(3), Some(&guess.to_be_bytes()), now);
        }
        let failing = gate.failing.lock().expect("not poisoned");
        assert_eq!(failing.by_address[&address(3)].seen.len(), SEEN_MAX);
    }

    #[test]
    fn whoever_has_no_address_of_its_own_counts_in_the_total_alone() {
        let gate = Gate::default();
        let now = Instant::now();
        for _ in 0..10 {
            gate.failed(None, None, now);
        }
        let entered = (0..100).filter(|_| gate.enter(&BOUNDS, None, now).is_ok()).count();
        assert_eq!(entered, 7);
    }

    #[test]
    fn whoever_moves_about_in_a_network_of_its_own_is_one_address() {
        let gate = Gate::default();
        let now = Instant::now();
        for host in ["2001:db8::1", "2001:db8::2"] {
            gate.failed(text(host), None, now);
        }
        gate.enter(&BOUNDS, text("2001:db8::ffff:3"), now).expect_err("the same /64");
        assert_eq!(gate.enter(&BOUNDS, text("2001:db8:0:1::1"), now), Ok(()));
        for host in ["192.0.2.1", "::ffff:192.0.2.1"] {
            gate.failed(text(host), None, now);
        }
        gate.enter(&BOUNDS, address(1), now).expect_err("one address in two forms");
    }

    #[test]
    fn what_is_remembered_of_strangers_is_bounded() {
        let gate = Gate::default();
        let began = Instant::now();
        let many = u32::try_from(3 * FAILING_MAX).expect("few");
        for n in 0..many {
            let now = began + Duration::from_micros(n.into());
            gate.failed(IpAddr::from(Ipv4Addr::from_bits(n)), None, now);
            gate.failed(IpAddr::from(Ipv4Addr::from_bits(n)), None, now);
        }
        let failing = gate.failing.lock().expect("not poisoned");
        assert_eq!((failing.by_address.len(), failing.order.len()), (FAILING_MAX, FAILING_MAX));
        drop(failing);
        let now = began + Duration::from_secs(1);
        assert_eq!(
            gate.enter(&BOUNDS, IpAddr::from(Ipv4Addr::from_bits(0)), now),
            Ok(()),
            "made room"
        );
        let last: IpAddr = Ipv4Addr::from_bits(many - 1).into();
        gate.enter(&BOUNDS, last, now).expect_err("the newest are kept");
    }
}
