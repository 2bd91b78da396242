//! Many sidecars that lose their relay at once, and its return.
//!
//! The sidecars are the library's own, each with an instance, sessions, lanes and a schedule of its own,
//! on two threads of this process; the relay is the program. `cargo test -p sidelane --test it -- herd
//! --nocapture` prints what docs/measurements.md tells.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sidelane::config::{self, Config, Source};
use sidelane::metrics::Metrics;
use sidelane::plugin::{HostContext, Limits, Plugins};
use sidelane::shard::Shards;
use sidelane::sidecar::{Access, Settings, Sidecar, system_resolver};
use sidelane::tunnel::dial;
use sidelane_e2e::process::{Setup, Sidelane};
use sidelane_e2e::wait;
use sidelane_tunnel::{LaneConfig, Side};

const SIDECARS: usize = 500;

/// Lanes of each session.
const LANES: u32 = 2;

/// As a file's default.
const REPLAY: u64 = 16 * 1024 * 1024;

/// How soon after the relay's restart all serve again.
const BACK_WITHIN: Duration = Duration::from_secs(10);

/// Between two looks at a relay.
const LOOK: Duration = Duration::from_millis(100);

/// How many times the work, and the memory, of the first arrival of all their return may cost.
const CPU_RATIO_MAX: f64 = 3.0;
const MEMORY_RATIO_MAX: f64 = 1.5;

/// Sidecars that a test has made. They end with it.
struct Herd {
    sidecars: Vec<Arc<Sidecar>>,
    metrics: Arc<Metrics>,
    shards: Option<Shards>,
}

impl Herd {
    fn start(relay: SocketAddr) -> Self {
        let shards = Shards::start("herd", 2, 0, 2).expect("threads");
        let metrics = Arc::new(Metrics::new());
        let plugins = Arc::new(Plugins::new(HostContext::new(metrics.sink()), Limits::default()));
        let counted = Arc::clone(&metrics);
        let sidecars = (0..SIDECARS).map(|number| {
            let config = configuration(relay, number);
            let section = config.sidecar.as_ref().expect("a sidecar's file");
            let sidecar = Sidecar::new(
                settings(number),
                Access::new(section, None, None),
                vec![relay.to_string()],
                Arc::clone(&plugins),
                Arc::clone(&metrics),
                Arc::clone(&shards.all),
            );
            sidecar.configure(&config);
            sidecar.start();
            sidecar
        });
        Self { sidecars: sidecars.collect(), metrics: counted, shards: Some(shards) }
    }

    /// Waits until every lane has lost its connection: a process that is started again comes later.
    fn until_lost(&self) {
        wait::until("the lanes to notice", || {
            let mut page = String::new();
            self.metrics.encode(&mut page);
            let none = "sidelane_lanes{role=\"sidecar\"} 0";
            page.lines().any(|line| line == none).then_some(())
        });
    }
}

impl Drop for Herd {
    fn drop(&mut self) {
        for sidecar in &self.sidecars {
            sidecar.drain();
        }
        if let Some(shards) = self.shards.take() {
            shards.stop();
        }
    }
}

fn configuration(relay: SocketAddr, number: usize) -> Config {
    let text = format!(
        "version: 1
sidecar: {{ relays: [\"{relay}\"] }}
tunnels: [{{ name: t-{number}, service: \"127.0.0.1:9\" }}]
routes: [{{ subdomain: s-{number}, tunnel: t-{number} }}]
"
    );
    let source = Source::from_text(Path::new("herd.yaml"), text);
    config::parse(&source, &|_| None).expect("a valid file")
}

fn settings(number: usize) -> Settings {
    Settings {
        name: format!("herd-{number}"),
        lanes: LANES,
        // Lanes come back; the relay that was killed knows none of them.
        lane: LaneConfig { replay_bytes_max: REPLAY, ..LaneConfig::new(Side::Sidecar) },
        timeouts: dial::Timeouts {
            connect: Duration::from_secs(10),
            answer: Duration::from_secs(10),
        },
        resolve_interval: Duration::from_secs(30),
        resolve: system_resolver(),
    }
}

/// What a relay has cost so far.
#[derive(Clone, Copy, Debug)]
struct Cost {
    cpu_seconds: f64,
    memory_peak: u64,
}

impl Cost {
    fn of(relay: &Sidelane) -> Self {
        let cpu = relay.metric("process_cpu_seconds_total", &[]);
        Self { cpu_seconds: cpu.expect("it is told"), memory_peak: relay.memory_peak() }
    }
}

/// A relay as it comes, behind a balancer: all of these sidecars dial from one address, which is not held to
/// what one may.
fn relay_file() -> String {
    let setup = Setup::of(SocketAddr::from(([127, 0, 0, 1], 9)));
    let proxies = "  trusted_proxies: [127.0.0.1]\n  tunnel: ";
    setup.relay().replacen("  tunnel: ", proxies, 1).replace("level: debug", "level: info")
}

/// Waits until a relay serves all, and then until it has all their lanes; returns when each was so.
fn until_whole(relay: &Sidelane, since: Instant) -> (Duration, Duration) {
    let sidecars = SIDECARS as f64;
    let lanes = f64::from(LANES) * sidecars;
    let accepted = ["result=\"accepted\""];
    until(relay, "sidelane_announcements_total", &accepted, sidecars);
    until(relay, "sidelane_sessions", &[], sidecars);
    let serving = since.elapsed();
    until(relay, "sidelane_lanes", &[], lanes);
    (serving, since.elapsed())
}

/// Looks seldom: the sidecars are to have this process's time.
fn until(relay: &Sidelane, metric: &str, labels: &[&str], wanted: f64) {
    let end = Instant::now() + wait::DEADLINE;
    loop {
        let count = relay.metric(metric, labels).unwrap_or_default();
        if count >= wanted {
            return;
        }
        assert!(Instant::now() < end, "{metric} is {count}, and not {wanted}");
        std::thread::park_timeout(LOOK);
    }
}

#[test]
fn all_sidecars_are_back_soon_after_their_relay() {
    let file = relay_file();
    let relay = Sidelane::spawn("relay", &file);
    let (web, tunnel) = (relay.web(), relay.tunnel());
    let any = "address: \"127.0.0.1:0\"";
    let file = file.replacen(any, &format!("address: \"{web}\""), 1).replacen(
        any,
        &format!("address: \"{tunnel}\""),
        1,
    );
    let began = Instant::now();
    let herd = Herd::start(tunnel);
    let (arrived, whole) = until_whole(&relay, began);
    let before = Cost::of(&relay);

    relay.kill();
    herd.until_lost();
    let began = Instant::now();
    let relay = Sidelane::spawn("relay again", &file);
    let (back, whole_again) = until_whole(&relay, began);
    let after = Cost::of(&relay);
    let refused = |reason| {
        let refused = relay.metric("sidelane_handshakes_refused_total", &[reason]);
        refused.unwrap_or_default()
    };
    println!(
        "{SIDECARS} sidecars of {LANES} lanes\n\
         first: all serve after {arrived:.1?}, all lanes after {whole:.1?}; {before:?}\n\
         again: all serve after {back:.1?}, all lanes after {whole_again:.1?}; {after:?}\n\
         refused then: {} for their rate, {} lanes of the relay that was killed",
        refused("rate"),
        refused("WRONG_RELAY") + refused("UNKNOWN_SESSION"),
    );
    assert!(back < BACK_WITHIN, "{back:?}");
    assert!(after.cpu_seconds < before.cpu_seconds * CPU_RATIO_MAX, "{before:?} {after:?}");
    let memory_max = before.memory_peak as f64 * MEMORY_RATIO_MAX;
    assert!((after.memory_peak as f64) < memory_max, "{before:?} {after:?}");
}
