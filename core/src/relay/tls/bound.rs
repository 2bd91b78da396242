//! How many TLS handshakes may be under way, over all and from one address: each costs a signature and
//! some tens of kilobytes, and who begins one has shown nothing yet.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use crate::address;

/// What handshakes are bounded by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::relay) struct Bounds {
    /// Under way at once.
    pub(in crate::relay) all_max: usize,
    /// The same, from one address.
    pub(in crate::relay) per_address_max: usize,
}

/// Why one more may not begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::relay) enum Over {
    /// There are as many as may be.
    All,
    /// The address has as many as one may have.
    Address,
}

impl Over {
    /// As a metric's label.
    pub(in crate::relay) const fn label(self) -> &'static str {
        match self {
            Self::All => "total",
            Self::Address => "address",
        }
    }
}

/// Handshakes that are under way, of clients and sidecars.
#[derive(Debug, Default)]
pub(in crate::relay) struct Handshakes(Mutex<Counts>);

#[derive(Debug, Default)]
struct Counts {
    all: usize,
    /// Invariant: no entry is zero, so there are as many as handshakes at most.
    by_address: HashMap<IpAddr, usize>,
}

impl Handshakes {
    /// Counts one more until what is returned is dropped. `address`: whose; `None`: a proxy's that is
    /// trusted, which is bounded with all others alone.
    ///
    /// # Errors
    /// There are as many as may be.
    pub(in crate::relay) fn try_enter(
        self: &Arc<Self>,
        bounds: Bounds,
        address: Option<IpAddr>,
    ) -> Result<Permit, Over> {
        let address = address.map(address::client);
        let mut counts = self.lock();
        if counts.all >= bounds.all_max {
            return Err(Over::All);
        }
        if let Some(address) = address {
            match counts.by_address.entry(address) {
                Entry::Occupied(count) if *count.get() >= bounds.per_address_max => {
                    return Err(Over::Address);
                }
                Entry::Vacant(_) if bounds.per_address_max == 0 => return Err(Over::Address),
                entry => *entry.or_default() += 1,
            }
        }
        counts.all += 1;
        drop(counts);
        Ok(Permit { handshakes: Arc::clone(self), address })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A handshake that may be made.
#[derive(Debug)]
pub(in crate::relay) struct Permit {
    handshakes: Arc<Handshakes>,
    address: Option<IpAddr>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut counts = self.handshakes.lock();
        counts.all -= 1;
        if let Some(address) = self.address
            && let Entry::Occupied(mut count) = counts.by_address.entry(address)
        {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { all_max: 4, per_address_max: 2 };

    #[test]
    fn an_address_has_its_bound_and_all_have_theirs() {
        let handshakes = Arc::new(Handshakes::default());
        let enter = |address: &str| {
            handshakes.try_enter(BOUNDS, Some(address.parse().unwrap())).map_err(Over::label)
        };
        let first = enter("192.0.2.1").unwrap();
        let _second = enter("::ffff:192.0.2.1").unwrap();
        assert_eq!(enter("192.0.2.1").unwrap_err(), "address");
        let _third = enter("2001:db8::1").unwrap();
        let _fourth = enter("2001:db8::2").unwrap();
        assert_eq!(enter("192.0.2.3").unwrap_err(), "total");
        drop(first);
        assert_eq!(enter("2001:db8::3").unwrap_err(), "address");
        assert!(enter("192.0.2.1").is_ok());
    }

    #[test]
    fn a_trusted_proxy_is_bounded_with_all_others_alone() {
        let handshakes = Arc::new(Handshakes::default());
        let held: Vec<_> =
            (0..4).map(|_| handshakes.try_enter(BOUNDS, None).expect("not over")).collect();
        assert_eq!(handshakes.try_enter(BOUNDS, None).unwrap_err(), Over::All);
        drop(held);
        let counts = handshakes.lock();
        assert!(counts.all == 0 && counts.by_address.is_empty());
    }

    #[test]
    fn nothing_is_left_of_addresses_that_are_gone() {
        let handshakes = Arc::new(Handshakes::default());
        for last in 0..=255 {
            let address = IpAddr::from([192, 0, 2, last]);
            drop(handshakes.try_enter(BOUNDS, Some(address)).expect("not over"));
        }
        let closed = Bounds { all_max: 4, per_address_max: 0 };
        assert!(handshakes.try_enter(closed, Some([192, 0, 2, 1].into())).is_err());
        assert!(handshakes.lock().by_address.is_empty());
    }
}
