//! The death of either process: what the session cannot survive ends cleanly, and as soon as it is
//! known.

use std::sync::Mutex;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use sidelane_e2e::client::{Client, request};
use sidelane_e2e::fault::{Fault, Shape};
use sidelane_e2e::process::{Setup, Sidelane};
use sidelane_e2e::service::Service;
use sidelane_e2e::stage::get;
use sidelane_e2e::wait;
use sidelane_e2e::websocket::Socket;

use super::{LANES, Torn, relay_yaml};

/// How soon a session that is known to be gone must be over: far below the grace of 15 s.
const AT_ONCE: Duration = Duration::from_secs(5);

/// Begins an answer that has no end on `/endless`; echoes a WebSocket; answers others.
fn service() -> Service {
    Service::start(|connection| {
        while let Some(request) = connection.request()? {
            if request.has("upgrade") {
                connection.upgrade(&request, "")?;
                return connection.echo();
            }
            if request.target == b"/endless" {
                connection.write("HTTP/1.1 200 OK\r\ncontent-length: 1000000000000\r\n\r\nx")?;
                return connection.closed();
            }
            connection.write("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
        }
        Ok(())
    })
}

#[test]
fn restarted_relay_does_not_know_the_session_and_a_new_one_begins_at_once() {
    let service = service();
    let setup = Setup::of(service.address()).websocket("{}");
    let torn = Torn::of(&setup);
    let mut client = Client::connect(torn.relay.web());
    client.send(get("/endless"));
    assert_eq!(client.head().status, 200);
    let mut socket = Socket::open(torn.relay.web());
    socket.says_back("before");
    torn.relay.kill();
    torn.sidecar.until_metric("sidelane_lanes", &[], |lanes| lanes == 0.0);
    // Clients lost their connections with the relay; the services' exchanges wait for its return.
    assert!(service.records().iter().any(|record| !record.closed));

    let relay = Sidelane::spawn("relay again", &relay_yaml(&setup, ""));
    let begun = Instant::now();
    torn.wire.lead_to(&[relay.tunnel()]);
    service.until("the old exchanges' ends", |records| records.iter().all(|one| one.closed));
    assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
    wait::until("200 again", || {
        (request(relay.web(), "GET", get("/")).head.status == 200).then_some(())
    });
    assert!(begun.elapsed() < 2 * AT_ONCE, "{:?}", begun.elapsed());
    assert_eq!(torn.sidecar.metric("sidelane_session_dials_total", &[]), Some(2.0));
}

#[test]
fn killed_sidecar_is_waited_for_and_its_exchanges_end_with_the_grace() {
    let service = service();
    let setup = Setup::of(service.address()).websocket("{}");
    let torn = Torn::with(&setup, ", grace: 2s", Shape::default());
    let mut client = Client::connect(torn.relay.web());
    client.send(get("/endless"));
    let head = client.head();
    let mut socket = Socket::open(torn.relay.web());
    socket.says_back("before");
    torn.sidecar.kill();
    let begun = Instant::now();
    assert_eq!(socket.closes("the sidecar was killed").0, 1012);
    let elapsed = begun.elapsed();
    assert!(elapsed >= Duration::from_millis(1500), "nobody says that it is not cut: {elapsed:?}");
    client.try_body("GET", head).expect_err("a broken transfer does not look complete");
    let web = torn.relay.web();
    let answer = request(web, "GET", get("/"));
    assert_eq!(answer.head.status, 503, "{answer:?}");
    let _sidecar = Sidelane::start("sidecar again", &setup.sidecar(torn.wire.address()));
    wait::until("200 again", || (request(web, "GET", get("/")).head.status == 200).then_some(()));
}

#[test]
fn sidecar_that_ends_by_itself_is_not_waited_for() {
    let service = service();
    let setup = Setup::of(service.address());
    let mut torn = Torn::of(&setup);
    let web = torn.relay.web();
    torn.sidecar.signal("TERM");
    assert_eq!(torn.sidecar.ended().code(), Some(0));
    let begun = Instant::now();
    torn.relay.until_metric("sidelane_sessions", &[], |sessions| sessions == 0.0);
    assert!(begun.elapsed() < AT_ONCE, "the grace is for who may come back: {:?}", begun.elapsed());
    assert_eq!(request(web, "GET", get("/")).head.status, 503);
}

/// The network fails while a process ends: what it has begun comes to its end all the same.
#[test]
fn lanes_come_back_while_a_process_ends() {
    for is_relay in [true, false] {
        let (go, gone) = mpsc::channel();
        let gone = Mutex::new(gone);
        let service = Service::start(move |connection| {
            while connection.request()?.is_some() {
                connection.write("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nbegun")?;
                let gone = gone.lock().expect("no panic");
                gone.recv_timeout(wait::DEADLINE).map_err(std::io::Error::other)?;
                connection.write(" end")?;
            }
            Ok(())
        });
        let setup = Setup::of(service.address());
        let mut torn = Torn::of(&setup);
        let mut client = Client::connect(torn.relay.web());
        client.send(get("/"));
        let head = client.head();
        let ending = if is_relay { &torn.relay } else { &torn.sidecar };
        ending.signal("TERM");
        ending.until_metric("sidelane_draining", &[], |phase| phase == 2.0);
        assert_eq!(torn.wire.harm(Fault::Cut), LANES);
        torn.sidecar
            .until_metric("sidelane_lane_resumes_total", &[], |count| count == LANES as f64);
        torn.until_lanes(LANES);
        // Nobody else is let in.
        if is_relay {
            let late = Sidelane::spawn("late", &setup.sidecar(torn.relay.tunnel()));
            wait::until("its refusal", || late.log().contains("is shutting down").then_some(()));
            assert_eq!(torn.relay.metric("sidelane_sessions", &[]), Some(1.0));
        }
        go.send(()).expect("the service waits");
        let answer = client.try_body("GET", head).expect("it comes whole");
        assert_eq!(answer.body, b"begun end");
        let ending = if is_relay { &mut torn.relay } else { &mut torn.sidecar };
        assert_eq!(ending.ended().code(), Some(0));
    }
}
