//! Where lanes come back: at the advertised address, past a relay that is another one, beside lanes
//! that were not lost, and by TLS.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use sidelane_e2e::authority::Authority;
use sidelane_e2e::fault::{End, Fault, Shape, Wire};
use sidelane_e2e::process::{Setup, Sidelane};
use sidelane_e2e::service::Service;
use sidelane_e2e::wait;
use sidelane_e2e::websocket::Socket;

use super::{LANES, Torn, bulk, relay_yaml};

/// Rounds in which every lane is cut.
const ROUNDS: usize = 10;
/// A round trip of an exchange whose lane nobody touches: below a second, after which a lane is
/// suspect, with room for a busy machine.
const UNTOUCHED_MAX: Duration = Duration::from_millis(700);

/// One way: a handshake by TLS takes six of it and more.
const HANDSHAKE_DELAY: Duration = Duration::from_millis(30);
/// Less than that: each cut finds handshakes under way.
const HANDSHAKE_CUT_EVERY: Duration = Duration::from_millis(130);
/// So many of them are cut.
const CUT_HANDSHAKES: f64 = 5.0;

fn echo() -> Service {
    Service::start(|connection| {
        connection.accept("")?;
        connection.echo()
    })
}

/// Where nobody is asked to connect before the wire is told better.
fn nowhere() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, 9))
}

/// One whose first lane comes by one wire, and whose further ones and all that come back by another.
fn advertising(service: &Service) -> (Torn, Wire) {
    let setup = Setup::of(service.address()).websocket("{}");
    let advertised = Wire::to(nowhere());
    let keys = format!(", advertise: \"{}\"", advertised.address());
    let relay = Sidelane::spawn("relay", &relay_yaml(&setup, &keys));
    advertised.lead_to(&[relay.tunnel()]);
    let wire = Wire::to(relay.tunnel());
    let sidecar = Sidelane::start("sidecar", &setup.sidecar(wire.address()));
    let torn = Torn { relay, sidecar, wire };
    torn.until_whole();
    (torn, advertised)
}

#[test]
fn new_exchanges_take_the_lane_that_is_up() {
    let service = Service::ok();
    let (torn, advertised) = advertising(&service);
    advertised.down();
    torn.until_lanes(1);
    for _ in 0..50 {
        let begun = Instant::now();
        assert_eq!(torn.ask().head.status, 200);
        assert!(begun.elapsed() < UNTOUCHED_MAX, "{:?}", begun.elapsed());
    }
    advertised.up();
    torn.until_lanes(LANES);
    torn.lost_nothing();
    torn.is_one_session();
}

#[test]
fn lanes_come_back_at_the_advertised_address() {
    let service = echo();
    let (torn, advertised) = advertising(&service);
    assert_eq!((torn.wire.made(), advertised.made()), (1, LANES - 1), "further lanes go there");
    let mut socket = Socket::open(torn.relay.web());
    for round in 0..ROUNDS {
        let (made, resumed) = (advertised.made(), torn.resumed());
        let cut = torn.wire.harm(Fault::Cut) + advertised.harm(Fault::Cut);
        assert_eq!(cut, LANES, "round {round}");
        wait::until("their return", || (torn.resumed() >= resumed + LANES as f64).then_some(()));
        torn.until_lanes(LANES);
        assert_eq!(advertised.made(), made + LANES, "round {round}");
        socket.says_back("still");
    }
    assert_eq!(torn.wire.made(), 1, "nothing comes back where the first dial went");
    torn.lost_nothing();
    torn.is_one_session();
}

#[test]
fn another_relay_behind_the_same_address_means_dialling_again() {
    let service = echo();
    let setup = Setup::of(service.address()).websocket("{}");
    let torn = Torn::of(&setup);
    let other = Sidelane::spawn("another relay", &relay_yaml(&setup, ""));
    let mut socket = Socket::open(torn.relay.web());
    // As a virtual IP does it: each connection goes to the next of them.
    torn.wire.lead_to(&[torn.relay.tunnel(), other.tunnel()]);
    let mut wrong = 0;
    for _ in 0..ROUNDS {
        let (made, resumed) = (torn.wire.made(), torn.resumed());
        assert_eq!(torn.wire.harm(Fault::Reset), LANES);
        wait::until("their return", || (torn.resumed() >= resumed + LANES as f64).then_some(()));
        torn.until_lanes(LANES);
        wrong += torn.wire.made() - made - LANES;
        socket.says_back("still");
    }
    println!("wrong relay: {wrong} dials reached it");
    assert!(wrong > 0, "some reached the other one");
    assert_eq!(other.metric("sidelane_sessions", &[]).unwrap_or(0.0), 0.0);
    torn.lost_nothing();
    torn.is_one_session();
}

/// Opens WebSockets until each lane has one, and returns them with the numbers of their connections.
fn one_on_each_lane(torn: &Torn) -> Vec<(Socket, usize)> {
    let mut found: Vec<(Socket, usize)> = Vec::new();
    wait::until("a WebSocket on each lane", || {
        let mut socket = Socket::open(torn.relay.web());
        let before = torn.wire.carried();
        // More than what pings and acknowledgements bring.
        socket.says_back(&"x".repeat(60_000));
        let moved = torn.wire.carried().into_iter().zip(before);
        let moved = moved.max_by_key(|(after, before)| after.down - before.down);
        let lane = moved.expect("a connection").0.number;
        if found.iter().all(|(_, other)| *other != lane) {
            found.push((socket, lane));
        }
        (found.len() == LANES).then_some(())
    });
    found
}

#[test]
fn exchanges_of_other_lanes_notice_nothing() {
    let service = echo();
    let torn = Torn::of(&Setup::of(service.address()).websocket("{}"));
    for fault in [Fault::Cut, Fault::Reset, Fault::Stall, Fault::HalfOpen(End::Dialler)] {
        let mut found = one_on_each_lane(&torn);
        let (mut kept, _) = found.pop().expect("two");
        let (mut lost, lane) = found.pop().expect("two");
        let made = torn.wire.made();
        assert!(torn.wire.harm_one(lane, fault));
        // On the lost one there is something to say, or nobody would miss it.
        let waits = std::thread::spawn(move || {
            lost.says_back(&"x".repeat(60_000));
            lost
        });
        let mut slowest = Duration::ZERO;
        let mut rounds = 0;
        while !waits.is_finished() || rounds < 100 {
            let begun = Instant::now();
            kept.says_back("meanwhile");
            slowest = slowest.max(begun.elapsed());
            rounds += 1;
        }
        waits.join().expect("it was answered");
        println!(
            "{fault:?} of one lane: {rounds} round trips beside it, the slowest {slowest:.2?}"
        );
        assert!(slowest < UNTOUCHED_MAX, "{fault:?}: {slowest:?}");
        assert_eq!(torn.wire.made(), made + 1, "{fault:?}: one lane came back");
        torn.until_lanes(LANES);
    }
    torn.lost_nothing();
    torn.is_one_session();
}

/// Relay and sidecar that speak TLS, with these keys of `relay` beside.
fn by_tls(setup: &Setup, relay: &str, shape: Shape) -> Torn {
    let authority = Authority::new("e2e");
    let files = authority.sign(&["127.0.0.1"]);
    let keys = format!(
        ", tls: {{ certificates: [{{ cert: \"{}\", key: \"{}\" }}] }}",
        files.cert.display(),
        files.key.display()
    );
    let yaml = relay_yaml(setup, &keys);
    let yaml = yaml.replace("relay:\n", &format!("relay:\n{relay}"));
    Torn::between(&yaml, shape, |wire| {
        let plain = format!("relays: [\"{wire}\"]");
        let ca = authority.ca();
        let tls =
            format!("relays: [{{ address: \"{wire}\", tls: {{ ca: \"{}\" }} }}]", ca.display());
        setup.sidecar(wire).replace(&plain, &tls)
    })
}

#[test]
fn lanes_by_tls_come_back_too() {
    let service = Service::start(bulk::serve);
    let torn = by_tls(&Setup::of(service.address()), "", Shape::default());
    bulk::under_cuts("download by TLS", &torn, bulk::body_bytes() / 4, bulk::download);
    bulk::under_cuts("upload by TLS", &torn, bulk::body_bytes() / 4, bulk::upload);
}

/// Each cut meets handshakes that are under way. What a bad road does to them is no guess of a credential:
/// the relay does not turn the address away for it.
#[test]
fn handshakes_that_are_cut_keep_no_lane_from_coming_back() {
    let service = echo();
    let setup = Setup::of(service.address()).websocket("{}");
    let limits = "  limits: { failed_handshakes_per_minute_per_address: 1 }\n";
    let torn = by_tls(&setup, limits, Shape { delay: HANDSHAKE_DELAY, ..Shape::default() });
    let mut socket = Socket::open(torn.relay.web());
    let storm = torn.wire.every(HANDSHAKE_CUT_EVERY, &[Fault::Cut, Fault::Reset]);
    torn.relay.until_metric("sidelane_handshakes_refused_total", &["reason=\"tls\""], |count| {
        count >= CUT_HANDSHAKES
    });
    drop(storm);
    socket.says_back("still");
    torn.until_lanes(LANES);
    let failures = torn.relay.metric("sidelane_handshakes_refused_total", &["reason=\"failures\""]);
    assert_eq!(failures.unwrap_or(0.0), 0.0);
    assert!(!torn.relay.log().contains("no handshake on the tunnel's port"));
    torn.lost_nothing();
    torn.is_one_session();
}
