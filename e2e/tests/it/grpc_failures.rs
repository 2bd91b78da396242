//! The gRPC column of what clients see when something fails: the status code, and a message that
//! names the cause.

use serde_json::Value;
use sidelane_e2e::nobody::Nobody;
use sidelane_e2e::process::{Setup, Sidelane};
use sidelane_e2e::service::Service;
use sidelane_e2e::wait;

use crate::grpc::Peers;

/// Asserts a status whose message holds one of the words.
#[track_caller]
fn is(seen: &Value, code: u64, words: &[&str]) {
    assert_eq!(seen["code"], code, "{seen}");
    let message = seen["message"].as_str().unwrap_or_default();
    assert!(words.iter().any(|word| message.contains(word)), "one of {words:?}: {seen}");
}

#[test]
fn no_such_route_is_unimplemented() {
    let Some(peers) = Peers::find("no_such_route_is_unimplemented") else { return };
    let nobody = Nobody::new();
    let mut setup = Setup::of(nobody.address()).grpc("{}");
    setup.routes[0].subdomain = "other".to_owned();
    let sidelane = Sidelane::both(&setup);
    for client in ["grpcio", "tonic"] {
        is(&peers.ask(client, "unary", sidelane.web()), 12, &["no route", "no-route"]);
    }
}

#[test]
fn no_sidecar_is_unavailable() {
    let Some(peers) = Peers::find("no_sidecar_is_unavailable") else { return };
    let nobody = Nobody::new();
    let relay =
        Sidelane::spawn("relay", &Setup::of(nobody.address()).grpc("{}").relay_with_routes());
    for client in ["grpcio", "tonic"] {
        is(&peers.ask(client, "unary", relay.web()), 14, &["sidecar", "no-sidecar"]);
    }
}

#[test]
fn sidecar_without_the_protocol_is_unavailable() {
    let Some(peers) = Peers::find("sidecar_without_the_protocol_is_unavailable") else { return };
    let nobody = Nobody::new();
    let setup = Setup::of(nobody.address());
    let relay = Sidelane::spawn("relay", &setup.clone().grpc("{}").relay());
    let sidecar = Sidelane::start("sidecar", &setup.sidecar(relay.tunnel()));
    sidecar.until_metric("sidelane_lanes", &[], |lanes| lanes >= 1.0);
    wait::until("the announcement", || {
        let seen = peers.ask("tonic", "unary", relay.web());
        (seen["code"] == 14).then_some(seen)
    });
}

#[test]
fn refused_connection_is_unavailable() {
    let Some(peers) = Peers::find("refused_connection_is_unavailable") else { return };
    let nobody = Nobody::new();
    let sidelane = Sidelane::both(&Setup::of(nobody.address()).grpc("{}"));
    for client in ["grpcio", "tonic"] {
        is(&peers.ask(client, "unary", sidelane.web()), 14, &["refused", "reach", "connect"]);
    }
}

#[test]
fn service_that_closes_at_once_is_unavailable() {
    let Some(peers) = Peers::find("service_that_closes_at_once_is_unavailable") else { return };
    let service = Service::start(sidelane_e2e::service::Connection::crash);
    let sidelane = Sidelane::both(&Setup::of(service.address()).grpc("{}"));
    for client in ["grpcio", "tonic"] {
        is(&peers.ask(client, "unary", sidelane.web()), 14, &["service"]);
    }
}

#[test]
fn service_that_speaks_no_http2_is_an_error_with_a_cause() {
    let Some(peers) = Peers::find("service_that_speaks_no_http2_is_an_error_with_a_cause") else {
        return;
    };
    let service = Service::start(|connection| {
        connection.some()?;
        connection.write("HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")?;
        connection.closed()
    });
    let sidelane = Sidelane::both(&Setup::of(service.address()).grpc("{}"));
    let seen = peers.ask("tonic", "unary", sidelane.web());
    assert!([2, 13, 14].contains(&seen["code"].as_u64().unwrap_or(0)), "{seen}");
    assert!(seen["message"].as_str().is_some_and(|text| text.contains("service")), "{seen}");
}

#[test]
fn killed_service_is_unavailable_in_mid_stream() {
    let Some(peers) = Peers::find("killed_service_is_unavailable_in_mid_stream") else { return };
    for client in ["grpcio", "tonic"] {
        let (service, address) = peers.service("tonic");
        let sidelane = Sidelane::both(&Setup::of(address).grpc("{}"));
        let mut held = peers.client(client, "held", sidelane.web());
        assert_eq!(held.line()["held"], true);
        service.kill();
        let seen = held.finish();
        is(&seen, 14, &["service"]);
        sidelane.until_metric("sidelane_exchanges_in_flight", &[], |count| count == 0.0);
    }
}

#[test]
fn killed_sidecar_is_unavailable_in_mid_stream() {
    let Some(peers) = Peers::find("killed_sidecar_is_unavailable_in_mid_stream") else { return };
    let (_peer, address) = peers.service("tonic");
    let setup = Setup::of(address).grpc("{}");
    let relay = Sidelane::spawn("relay", &setup.relay());
    for client in ["grpcio", "tonic"] {
        let sidecar = Sidelane::start("sidecar", &setup.sidecar(relay.tunnel()));
        wait::until("the announcement", || {
            (peers.ask("tonic", "unary", relay.web())["code"] == 0).then_some(())
        });
        let mut held = peers.client(client, "held", relay.web());
        assert_eq!(held.line()["held"], true);
        sidecar.kill();
        is(&held.finish(), 14, &["tunnel", "sidecar"]);
        relay.until_metric("sidelane_exchanges_in_flight", &[], |count| count == 0.0);
    }
}

#[test]
fn message_over_the_limit_is_resource_exhausted() {
    let Some(peers) = Peers::find("message_over_the_limit_is_resource_exhausted") else { return };
    let (_peer, address) = peers.service("tonic");
    let setup = Setup::of(address).grpc("{}").options("{ GRPC: { max_message_size: 4MiB } }");
    let sidelane = Sidelane::both(&setup);
    for client in ["grpcio", "tonic"] {
        let seen = peers.client(client, "limit", sidelane.web()).finish();
        assert_eq!(seen["below"], true, "{client}: {seen}");
        is(&seen["above"], 8, &["4194304", "limit", "max_message_size"]);
        is(&seen["answer_above"], 8, &["4194304", "limit", "max_message_size"]);
    }
    sidelane.until_metric("sidelane_exchanges_in_flight", &[], |count| count == 0.0);
}

#[test]
fn drained_program_ends_its_streams_as_unavailable() {
    let Some(peers) = Peers::find("drained_program_ends_its_streams_as_unavailable") else {
        return;
    };
    for client in ["grpcio", "tonic"] {
        let (_peer, address) = peers.service("tonic");
        let mut setup = Setup::of(address).grpc("{}");
        setup.drain = "1s";
        let mut sidelane = Sidelane::both(&setup);
        let mut held = peers.client(client, "held", sidelane.web());
        assert_eq!(held.line()["held"], true);
        sidelane.signal("TERM");
        assert_eq!(held.finish()["code"], 14, "{client}");
        assert_eq!(sidelane.ended().code(), Some(0));
    }
}

#[test]
fn calls_are_counted_by_method_and_status() {
    let Some(peers) = Peers::find("calls_are_counted_by_method_and_status") else { return };
    let (_peer, address) = peers.service("tonic");
    let sidelane = Sidelane::both(&Setup::of(address).grpc("{ methods_max: 3 }"));
    peers.ask("tonic", "status", sidelane.web());
    peers.ask("tonic", "short", sidelane.web());
    sidelane.until_metric("sidelane_exchanges_in_flight", &[], |count| count == 0.0);
    let page = sidelane.metrics();
    let rows: Vec<_> = page.lines().filter(|line| line.contains("sidelane_plugin_grpc")).collect();
    let holds = |all: &[&str]| rows.iter().any(|row| all.iter().all(|part| row.contains(part)));
    let labels = ["route=\"api\"", "service=\"e2e.Peer\""];
    for (method, status) in [("Fail", "3"), ("Late", "9"), ("Refuse", "8")] {
        let method = format!("method=\"{method}\"");
        let status = format!("grpc_status=\"{status}\"");
        assert!(holds(&[labels[0], labels[1], &method, &status]), "{method} {status}: {rows:#?}");
    }
    // The fourth method goes where all that are too many go.
    assert!(holds(&["method=\"other\"", "10000"]), "{rows:#?}");
    assert!(!holds(&["method=\"Echo\""]), "{rows:#?}");
}
