//! How messages that hold secrets are shown: by what they are about. Whoever prints one, in a log or a
//! panic, prints no credential, no session's secret, no password's hash and no plugin's options.

use std::fmt::{Debug, Formatter, Result};

use crate::proto::{AnnouncedRoute, Authenticate, Hello, Resume, RouteOptions, Welcome};

impl Debug for Hello {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        f.debug_struct("Hello")
            .field("version", &self.version)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Debug for Welcome {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        f.debug_struct("Welcome")
            .field("version", &self.version)
            .field("epoch", &self.epoch)
            .field("lane", &self.lane)
            .finish_non_exhaustive()
    }
}

impl Debug for Resume {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        f.debug_struct("Resume").field("lane", &self.lane).finish_non_exhaustive()
    }
}

impl Debug for Authenticate {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        f.debug_struct("Authenticate").finish_non_exhaustive()
    }
}

impl Debug for AnnouncedRoute {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        f.debug_struct("AnnouncedRoute").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Debug for RouteOptions {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        f.debug_struct("RouteOptions")
            .field("protocol_type", &self.protocol_type)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::tunnel_message::Payload;
    use crate::{First, Lane, LaneConfig, Side, Transmit};

    #[test]
    fn no_message_shows_a_secret() {
        let secret = || "s3cret".as_bytes().to_vec().into();
        let options = RouteOptions { json: "s3cret".to_owned(), ..RouteOptions::default() };
        let route = AnnouncedRoute {
            policies: "s3cret".to_owned(),
            options: vec![options.clone()],
            ..AnnouncedRoute::default()
        };
        let shown = format!(
            "{:?} {:?} {:?} {:?} {options:?} {route:?}",
            Payload::Hello(Hello { credential: secret(), secret: secret(), ..Hello::default() }),
            Payload::Welcome(Welcome { secret: secret(), ..Welcome::default() }),
            Payload::Resume(Resume { secret: secret(), ..Resume::default() }),
            Payload::Authenticate(Authenticate { credential: secret() }),
        );
        assert_no_secret(&shown);
    }

    fn assert_no_secret(shown: &str) {
        // As bytes are shown, too.
        assert!(!shown.contains("s3cret") && !shown.contains("115, 51"), "{shown}");
    }

    /// What waits to be sent, and what is kept for replay.
    #[test]
    fn no_lane_shows_a_secret() {
        let now = std::time::Instant::now();
        let config = LaneConfig { replay_bytes_max: 1 << 20, ..LaneConfig::new(Side::Sidecar) };
        let mut lane = Lane::new(config, now);
        let credential = || b"s3cret".to_vec().into();
        assert!(lane.authenticate(Authenticate { credential: credential() }));
        assert_no_secret(&format!("{lane:?}"));
        let mut out = Transmit::new();
        assert!(lane.poll_transmit(now, &mut out, usize::MAX));
        assert_no_secret(&format!("{lane:?} {out:?}"));
        assert!(lane.stats().replay_bytes > 0);
        let first = First::Resume(Resume { secret: credential(), ..Resume::default() });
        assert_no_secret(&format!("{first:?}"));
    }
}
