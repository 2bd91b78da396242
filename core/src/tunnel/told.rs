//! How often what happens to a lane again and again is told in the log: a network that flaps all night is
//! not to fill it.

use std::time::Duration;

use tokio::time::Instant;

/// Between two that are told at info of one lane. All others are lines at debug.
const TOLD_EVERY: Duration = Duration::from_secs(10);

/// What happens to one lane.
#[derive(Debug, Default)]
pub struct Told {
    at: Option<Instant>,
    untold: u64,
}

impl Told {
    /// It happens once more. Returns how often it has since it was last told, where it is to be told now.
    pub fn note(&mut self, now: Instant) -> Option<u64> {
        self.untold += 1;
        if self.at.is_some_and(|at| now.saturating_duration_since(at) < TOLD_EVERY) {
            return None;
        }
        self.at = Some(now);
        Some(std::mem::take(&mut self.untold))
    }
}

/// A line at info, or one at debug where the first argument is false.
macro_rules! tell {
    ($is_told:expr, $($rest:tt)*) => {
        if $is_told {
            tracing::info!($($rest)*);
        } else {
            tracing::debug!($($rest)*);
        }
    };
}
pub(crate) use tell;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_that_is_cut_five_times_a_second_is_told_of_six_times_a_minute() {
        let mut told = Told::default();
        let began = Instant::now();
        let counts: Vec<u64> = (0..300)
            .filter_map(|cut| told.note(began + Duration::from_millis(200) * cut))
            .collect();
        assert_eq!(counts, [1, 50, 50, 50, 50, 50]);
    }
}
