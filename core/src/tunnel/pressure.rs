//! The bound on bytes queued, and kept for replay, over all lanes of a role. Each lane knows its own bytes alone; their
//! sum is looked at now and then, so that no message pays for it.

use std::sync::Arc;
use std::time::Duration;

use sidelane_tunnel::Pressure;

use super::Link;

/// How often the sum is looked at. What comes in between is bounded by the windows that are granted
/// already.
pub const PRESSURE_TICK: Duration = Duration::from_millis(100);

/// What all lanes of a role hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Held {
    /// Bytes queued in either direction.
    pub queued: u64,
    /// Bytes kept for replay.
    pub replay: u64,
    /// Lanes that have no connection.
    pub detached: usize,
    /// Lanes whose peer is silent for longer than the round trip explains.
    pub suspect: usize,
}

/// Tells all `links` how much room is left of `max` bytes. Returns what they hold.
pub fn balance(links: &[Arc<Link>], max: u64) -> Held {
    let mut held = Held::default();
    for link in links {
        let stats = link.with(|lane| lane.stats());
        held.queued += stats.send_queued_bytes + stats.receive_queued_bytes;
        held.replay += stats.replay_bytes;
        held.detached += usize::from(!link.is_attached());
        held.suspect += usize::from(link.is_suspect());
    }
    let pressure = of(held.queued + held.replay, max);
    for link in links {
        link.with(|lane| lane.set_pressure(pressure));
    }
    held
}

const fn of(queued: u64, max: u64) -> Pressure {
    if queued >= max {
        Pressure::Full
    } else if queued > max / 2 {
        Pressure::High
    } else {
        Pressure::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_stop_growing_at_half_and_opens_at_all_of_it() {
        assert_eq!(of(0, 100), Pressure::None);
        assert_eq!(of(50, 100), Pressure::None);
        assert_eq!(of(51, 100), Pressure::High);
        assert_eq!(of(99, 100), Pressure::High);
        assert_eq!(of(100, 100), Pressure::Full);
    }
}
