//! Relay and sidecar apart: the death and return of either, and who is let in.

use std::time::Duration;

use sidelane_e2e::client::{Answer, Client, request};
use sidelane_e2e::process::{Setup, Sidelane};
use sidelane_e2e::service::Service;
use sidelane_e2e::stage::get;
use sidelane_e2e::wait;

/// How soon a sidecar that comes back must serve: a dial, a handshake and an announcement, with the
/// first retry's jitter.
const RETURN_DEADLINE: Duration = Duration::from_secs(3);

fn ask(relay: &Sidelane) -> Answer {
    request(relay.web(), "GET", get("/"))
}

/// Starts a relay, and a sidecar that serves through it.
fn pair(setup: &Setup) -> (Sidelane, Sidelane) {
    let relay = Sidelane::spawn("relay", &setup.relay());
    let sidecar = Sidelane::start("sidecar", &setup.sidecar(relay.tunnel()));
    wait::until("the announcement", || (ask(&relay).head.status == 200).then_some(()));
    (relay, sidecar)
}

#[test]
fn two_processes_serve() {
    let service = Service::ok();
    let (relay, sidecar) = pair(&Setup::of(service.address()));
    let answer = ask(&relay);
    assert_eq!((answer.head.status, answer.body.as_slice()), (200, b"ok".as_slice()));
    assert_eq!(relay.metric("sidelane_sessions", &[]), Some(1.0));
    for side in [&relay, &sidecar] {
        assert!(side.metric("sidelane_lanes", &[]).unwrap_or(0.0) >= 1.0);
        assert!(side.metric("sidelane_messages_total", &[]).unwrap_or(0.0) >= 2.0);
        assert!(side.metric("sidelane_message_bytes_total", &[]).unwrap_or(0.0) >= 2.0);
    }
}

#[test]
fn killed_sidecar_breaks_its_transfers_cleanly_and_comes_back() {
    killed_sidecar_comes_back(Setup::relay);
}

#[test]
fn routes_of_the_relay_outlive_a_killed_sidecar() {
    killed_sidecar_comes_back(Setup::relay_with_routes);
}

/// A client in mid-transfer, the sidecar killed, 503, and the sidecar back.
fn killed_sidecar_comes_back(relay_file: fn(&Setup) -> String) {
    let service = Service::start(|connection| {
        connection.stop_recording();
        while let Some(request) = connection.request()? {
            if request.target == b"/endless" {
                connection.write("HTTP/1.1 200 OK\r\ncontent-length: 1000000000000\r\n\r\n")?;
                loop {
                    connection.write([b'.'; 16 * 1024])?;
                }
            }
            connection.write("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
        }
        Ok(())
    });
    let setup = Setup::of(service.address());
    let relay = Sidelane::spawn("relay", &relay_file(&setup));
    let sidecar = Sidelane::start("sidecar", &setup.sidecar(relay.tunnel()));
    wait::until("the sidecar to serve", || (ask(&relay).head.status == 200).then_some(()));

    let mut fixed = Client::connect(relay.web());
    fixed.send(get("/endless"));
    let head = fixed.head();
    assert_eq!(head.status, 200);
    fixed.exactly(1024 * 1024).expect("the transfer flows");

    sidecar.kill();
    // What was in flight still arrives; then the connection ends, short of its length.
    fixed.try_body("GET", head).expect_err("a broken transfer does not look complete");

    let answer = wait::within(RETURN_DEADLINE, "the relay to notice", || {
        let answer = ask(&relay);
        (answer.head.status == 503).then_some(answer)
    });
    assert_eq!(answer.head.first("x-sidelane-error"), Some("no-sidecar"));
    assert!(answer.head.first("retry-after").is_some());

    let started = std::time::Instant::now();
    let _sidecar = Sidelane::spawn("sidecar", &setup.sidecar(relay.tunnel()));
    wait::within(RETURN_DEADLINE, "200 again", || (ask(&relay).head.status == 200).then_some(()));
    assert!(started.elapsed() < RETURN_DEADLINE);
}

#[test]
fn killed_relay_is_dialled_again() {
    let service = Service::ok();
    let setup = Setup::of(service.address());
    let (relay, sidecar) = pair(&setup);
    let (web, tunnel) = (relay.web(), relay.tunnel());
    relay.kill();
    sidecar.until_metric("sidelane_lanes", &[], |lanes| lanes == 0.0);
    let yaml = setup
        .relay()
        .replace("name: web, address: \"127.0.0.1:0\"", &format!("name: web, address: \"{web}\""))
        .replace(
            "tunnel: { address: \"127.0.0.1:0\"",
            &format!("tunnel: {{ address: \"{tunnel}\""),
        );
    let relay = Sidelane::spawn("relay", &yaml);
    wait::until("200 again", || (ask(&relay).head.status == 200).then_some(()));
}

#[test]
fn two_sidecars_share_a_tunnel_and_either_may_leave() {
    let service = Service::ok();
    let setup = Setup::of(service.address());
    let (relay, first) = pair(&setup);
    let _second = Sidelane::start("second", &setup.sidecar(relay.tunnel()));
    relay.until_metric("sidelane_sessions", &[], |sessions| sessions == 2.0);
    first.kill();
    relay.until_metric("sidelane_sessions", &[], |sessions| sessions == 1.0);
    for _ in 0..20 {
        assert_eq!(ask(&relay).head.status, 200);
    }
}

#[test]
fn right_token_is_let_in() {
    let service = Service::ok();
    let mut setup = Setup::of(service.address());
    setup.relay_token = Some("correct-horse-battery-staple".to_owned());
    setup.sidecar_token = Some("correct-horse-battery-staple".to_owned());
    let (relay, sidecar) = pair(&setup);
    for (name, side) in [("relay", &relay), ("sidecar", &sidecar)] {
        assert!(!side.log().contains("correct-horse-battery-staple"), "the {name} logs the token");
        let config = side.get(side.admin(), "/config");
        assert_eq!(config.head.status, 200, "{name}");
        let text = String::from_utf8_lossy(&config.body).into_owned();
        assert!(
            !text.contains("correct-horse-battery-staple"),
            "the {name} shows the token: {text}"
        );
    }
}

#[test]
fn wrong_or_missing_token_is_refused() {
    for shown in [Some("wrong-horse-battery-staple".to_owned()), None] {
        let service = Service::ok();
        let mut setup = Setup::of(service.address());
        setup.relay_token = Some("correct-horse-battery-staple".to_owned());
        setup.sidecar_token = shown.clone();
        let relay = Sidelane::spawn("relay", &setup.relay());
        let sidecar = Sidelane::spawn("sidecar", &setup.sidecar(relay.tunnel()));
        relay.until_metric("sidelane_handshakes_refused_total", &[], |count| count >= 1.0);
        assert_eq!(ask(&relay).head.status, 404, "{shown:?}: it announced nothing");
        let ready = sidecar.get(sidecar.health(), "/ready");
        assert_eq!(ready.head.status, 503, "{shown:?}");
        wait::until("the sidecar to say why", || {
            sidecar.log().contains("credential").then_some(())
        });
        for side in [&relay, &sidecar] {
            assert!(
                !side.log().contains("correct-horse-battery-staple")
                    && !side.log().contains("wrong-horse-battery-staple")
            );
        }
    }
}

#[test]
fn tunnel_listener_survives_noise() {
    let service = Service::ok();
    let (relay, _sidecar) = pair(&Setup::of(service.address()));
    for noise in [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".as_slice(),
        &[0xff; 1024],
        &[0x00; 1024],
        // A length of 2^63.
        &[0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x01],
        // An empty message.
        &[0x00],
    ] {
        let mut client = Client::connect(relay.tunnel());
        let _ = client.try_send(noise);
        client.shutdown();
        drop(client.rest());
    }
    assert_eq!(ask(&relay).head.status, 200);
}
