//! A session whose connections break, stall and go half: relay and sidecar as two processes, with a
//! wire between them that does what the test says. What a client sees of it is the subject, never how
//! it is done.
#![allow(clippy::print_stdout, reason = "what a transfer took is worth a line with --nocapture")]

mod bulk;
mod ends;
mod lanes;
mod outage;
mod streams;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use sidelane_e2e::client::{Answer, request};
use sidelane_e2e::fault::{Shape, Wire};
use sidelane_e2e::process::{Setup, Sidelane};
use sidelane_e2e::stage::get;
use sidelane_e2e::wait;

/// Lanes of a session by default.
const LANES: usize = 2;

/// Relay and sidecar with a wire between them.
pub(crate) struct Torn {
    pub(crate) relay: Sidelane,
    pub(crate) sidecar: Sidelane,
    pub(crate) wire: Wire,
}

impl Torn {
    /// With the grace that lanes have by default.
    pub(crate) fn of(setup: &Setup) -> Self {
        Self::with(setup, "", Shape::default())
    }

    /// With these keys of `relay.tunnel` beside its address (`, grace: 1s`), and a wire of that shape.
    pub(crate) fn with(setup: &Setup, tunnel: &str, shape: Shape) -> Self {
        Self::between(&relay_yaml(setup, tunnel), shape, |wire| setup.sidecar(wire))
    }

    /// With a relay's file, and a sidecar's that dials the wire.
    pub(crate) fn between(
        relay: &str,
        shape: Shape,
        sidecar: impl FnOnce(SocketAddr) -> String,
    ) -> Self {
        let relay = Sidelane::spawn("relay", relay);
        let wire = Wire::shaped(relay.tunnel(), shape);
        let sidecar = Sidelane::start("sidecar", &sidecar(wire.address()));
        let torn = Self { relay, sidecar, wire };
        torn.until_whole();
        torn
    }

    /// Waits until the sidecar's document is in force and its lanes stand.
    pub(crate) fn until_whole(&self) {
        let accepted = ["result=\"accepted\""];
        self.relay.until_metric("sidelane_announcements_total", &accepted, |count| count >= 1.0);
        self.until_lanes(LANES);
    }

    /// Waits until so many lanes are up, as both ends see it.
    pub(crate) fn until_lanes(&self, count: usize) {
        for side in [&self.relay, &self.sidecar] {
            side.until_metric("sidelane_lanes", &[], |lanes| lanes == count as f64);
        }
    }

    pub(crate) fn ask(&self) -> Answer {
        request(self.relay.web(), "GET", get("/"))
    }

    /// Returns how many lanes came back, by the sidecar's count.
    pub(crate) fn resumed(&self) -> f64 {
        self.sidecar.metric("sidelane_lane_resumes_total", &[]).unwrap_or(0.0)
    }

    /// Checks that there was one session from the beginning to the end.
    pub(crate) fn is_one_session(&self) {
        assert_eq!(self.sidecar.metric("sidelane_session_dials_total", &[]), Some(1.0));
        assert_eq!(self.relay.metric("sidelane_sessions", &[]), Some(1.0));
    }

    /// Checks that no exchange ended for the loss of a lane.
    pub(crate) fn lost_nothing(&self) {
        for side in [&self.relay, &self.sidecar] {
            let lost = side.metric("sidelane_exchanges_total", &["code=\"tunnel-lost\""]);
            assert_eq!(lost.unwrap_or(0.0), 0.0, "exchanges ended with their lane");
        }
    }
}

/// A relay's file with these keys of `relay.tunnel` beside its address.
pub(crate) fn relay_yaml(setup: &Setup, tunnel: &str) -> String {
    let plain = "tunnel: { address: \"127.0.0.1:0\"";
    let yaml = setup.relay();
    assert!(yaml.contains(plain), "{yaml}");
    yaml.replace(plain, &format!("{plain}{tunnel}"))
}

/// Waits until so much time has passed: the length of an outage is what a test is about, and nothing
/// shows it but the clock.
pub(crate) fn pass(time: Duration) {
    let begun = Instant::now();
    wait::within(time + wait::DEADLINE, "time", || (begun.elapsed() >= time).then_some(()));
}
