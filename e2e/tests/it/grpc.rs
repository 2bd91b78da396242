//! gRPC clients and services that nobody here wrote, each client against each service.

use std::net::SocketAddr;
use std::process::Command;

use serde_json::{Value, json};
use sidelane_e2e::peer::Peer;
use sidelane_e2e::process::{Setup, Sidelane};
use sidelane_e2e::tools::{Python, tonic};
use sidelane_e2e::wait;

const NAMES: [&str; 2] = ["grpcio", "tonic"];

/// Both sets of peers.
pub(crate) struct Peers {
    python: Python,
}

impl Peers {
    pub(crate) fn find(test: &str) -> Option<Self> {
        Python::find(test).map(|python| Self { python })
    }

    pub(crate) fn service(&self, name: &str) -> (Peer, SocketAddr) {
        let command = match name {
            "grpcio" => self.python.script("grpc_server.py"),
            _ => {
                let mut command = tonic();
                command.arg("serve");
                command
            }
        };
        Peer::service(name, command)
    }

    fn command(&self, name: &str) -> Command {
        if name == "grpcio" { self.python.script("grpc_client.py") } else { tonic() }
    }

    pub(crate) fn client(&self, name: &str, case: &str, relay: SocketAddr) -> Peer {
        Peer::client(name, self.command(name), case, relay)
    }

    pub(crate) fn ask(&self, name: &str, case: &str, relay: SocketAddr) -> Value {
        self.client(name, case, relay).finish()
    }
}

/// Runs a case of each client against each service, and returns what each saw.
fn each_pair(test: &str, case: &str) -> Vec<(String, Value)> {
    let Some(peers) = Peers::find(test) else { return Vec::new() };
    let mut all = Vec::new();
    for service in NAMES {
        let (_peer, address) = peers.service(service);
        let sidelane = Sidelane::both(&Setup::of(address).grpc("{}"));
        for client in NAMES {
            let seen = peers.ask(client, case, sidelane.web());
            all.push((format!("{client} to {service}"), seen));
        }
        sidelane.until_metric("sidelane_exchanges_in_flight", &[], |count| count == 0.0);
    }
    all
}

/// As [`each_pair`], of each library with itself: for what takes long.
fn each_library(test: &str, case: &str) -> Vec<(String, Value)> {
    let Some(peers) = Peers::find(test) else { return Vec::new() };
    let mut all = Vec::new();
    for name in NAMES {
        let (_peer, address) = peers.service(name);
        let sidelane = Sidelane::both(&Setup::of(address).grpc("{}"));
        all.push((name.to_owned(), peers.ask(name, case, sidelane.web())));
        sidelane.until_metric("sidelane_exchanges_in_flight", &[], |count| count == 0.0);
    }
    all
}

/// Compares the rows of `expected` alone.
#[track_caller]
fn has(pair: &str, seen: &Value, expected: &Value) {
    for (key, value) in expected.as_object().expect("an object") {
        assert_eq!(&seen[key], value, "{pair}: {key}: {seen}");
    }
}

#[test]
fn all_four_shapes_pass() {
    for (pair, seen) in each_pair("all_four_shapes_pass", "shapes") {
        let expected = json!({
            "echo": true,
            "empty": true,
            "down": 1000,
            "in_order": true,
            "none": 0,
            "up": "100 4950",
            "up_none": "0 0",
            "up_empty": "3 0",
            "chat": true,
            "first": ["ready", "after", 0],
        });
        has(&pair, &seen, &expected);
    }
}

#[test]
fn metadata_passes_both_ways() {
    for (pair, seen) in each_pair("metadata_passes_both_ways", "metadata") {
        has(&pair, &seen, &json!({ "deadline": true, "without_deadline": false }));
        let sent = json!({ "x-repeated": ["1", "2"], "x-data-bin": ["0001ff", ""] });
        has(&pair, &seen["metadata"], &sent);
        let agent = if pair.starts_with("grpcio") { "grpc-python/" } else { "tonic/" };
        let agents = seen["metadata"]["user-agent"].as_array().expect("an agent");
        assert!(agents[0].as_str().is_some_and(|name| name.starts_with(agent)), "{pair}: {seen}");
        let initial = json!({ "x-initial": ["1", "2"], "x-initial-bin": ["00feff"] });
        has(&pair, &seen["initial"], &initial);
        if pair.ends_with("grpcio") {
            // tonic's services have no way to send trailing metadata with a success.
            let trailing = json!({ "x-trailing": ["1", "2"], "x-trailing-bin": ["fffe00"] });
            has(&pair, &seen["trailing"], &trailing);
        }
    }
}

#[test]
fn statuses_of_the_service_pass() {
    for (pair, seen) in each_pair("statuses_of_the_service_pass", "status") {
        let fail = json!({
            "code": 3,
            "message": "käse 100%\nsecond line",
            "details": ["0803ff"],
            "messages": 0,
        });
        assert_eq!(seen["fail"], fail, "{pair}");
        let late =
            json!({ "code": 9, "message": "after one message", "details": null, "messages": 1 });
        assert_eq!(seen["late"], late, "{pair}");
        // The client was still sending.
        let early = json!({ "code": 8, "message": "enough", "details": null, "messages": 0 });
        assert_eq!(seen["early"], early, "{pair}");
        assert_eq!(seen["unknown"]["code"], 12, "{pair}");
    }
}

#[test]
fn deadline_ends_both_sides() {
    let Some(peers) = Peers::find("deadline_ends_both_sides") else { return };
    for service in NAMES {
        let (peer, address) = peers.service(service);
        let sidelane = Sidelane::both(&Setup::of(address).grpc("{}"));
        for client in NAMES {
            let seen = peers.ask(client, "deadline", sidelane.web());
            // tonic's client does not watch its deadline: who told it was the program or the service.
            has(client, &seen, &json!({ "code": 4, "messages": 1 }));
        }
        sidelane.until_metric("sidelane_exchanges_in_flight", &[], |count| count == 0.0);
        assert_eq!(peer.finish()["cancelled"], json!(["deadline", "deadline"]), "{service}");
    }
}

#[test]
fn cancellation_reaches_the_service() {
    let Some(peers) = Peers::find("cancellation_reaches_the_service") else { return };
    for service in NAMES {
        let (peer, address) = peers.service(service);
        let sidelane = Sidelane::both(&Setup::of(address).grpc("{}"));
        for client in NAMES {
            let seen = peers.ask(client, "cancel", sidelane.web());
            has(client, &seen, &json!({ "code": 1, "after": true }));
        }
        sidelane.until_metric("sidelane_exchanges_in_flight", &[], |count| count == 0.0);
        assert_eq!(peer.finish()["cancelled"], json!(["cancel", "cancel"]), "{service}");
    }
}

#[test]
fn client_that_is_gone_cancels_at_the_service() {
    let Some(peers) = Peers::find("client_that_is_gone_cancels_at_the_service") else { return };
    for service in NAMES {
        let (peer, address) = peers.service(service);
        let sidelane = Sidelane::both(&Setup::of(address).grpc("{}"));
        for client in NAMES {
            let mut held = peers.client(client, "held", sidelane.web());
            assert_eq!(held.line()["held"], true);
            held.kill();
        }
        sidelane.until_metric("sidelane_exchanges_in_flight", &[], |count| count == 0.0);
        // Its connection to the service is alive, the calls on it are not.
        let seen = peers.ask("tonic", "unary", sidelane.web());
        assert_eq!(seen["code"], 0, "{seen}");
        assert_eq!(peer.finish()["cancelled"], json!(["held", "held"]), "{service}");
    }
}

#[test]
fn messages_of_five_mebibytes_pass() {
    for (pair, seen) in each_pair("messages_of_five_mebibytes_pass", "large") {
        has(&pair, &seen, &json!({ "same": true }));
    }
}

#[test]
fn hundred_mebibytes_pass_each_way_and_cost_no_memory() {
    let Some(peers) = Peers::find("hundred_mebibytes_pass_each_way_and_cost_no_memory") else {
        return;
    };
    for name in NAMES {
        let (_peer, address) = peers.service(name);
        let sidelane = Sidelane::both(&Setup::of(address).grpc("{}"));
        let memory = sidelane.memory_resident();
        let seen = peers.ask(name, "huge", sidelane.web());
        let bytes = 100 * 1024 * 1024;
        let expected =
            json!({ "down": [100, bytes], "large": [5, bytes], "up": format!("100 {bytes}") });
        has(name, &seen, &expected);
        let growth = sidelane.memory_peak().saturating_sub(memory);
        assert!(growth < 64 * 1024 * 1024, "{name}: {growth} bytes");
    }
}

#[test]
fn ten_thousand_short_calls_pass() {
    for (pair, seen) in each_library("ten_thousand_short_calls_pass", "short") {
        has(&pair, &seen, &json!({ "ok": 10_000 }));
    }
}

#[test]
fn hundred_streams_interleave() {
    for (pair, seen) in each_pair("hundred_streams_interleave", "many") {
        has(&pair, &seen, &json!({ "same": true, "ended": 100 }));
    }
}

#[test]
fn stalled_streams_hold_no_other_back() {
    for (pair, seen) in each_pair("stalled_streams_hold_no_other_back", "stalled") {
        has(&pair, &seen, &json!({ "rounds": 500 }));
    }
}

#[test]
fn compressed_messages_pass_untouched() {
    for (pair, seen) in each_pair("compressed_messages_pass_untouched", "gzip") {
        has(&pair, &seen, &json!({ "same": true }));
    }
}

#[test]
fn health_and_reflection_services_pass() {
    let Some(peers) = Peers::find("health_and_reflection_services_pass") else { return };
    let (_peer, address) = peers.service("grpcio");
    let sidelane = Sidelane::both(&Setup::of(address).grpc("{}"));
    let seen = peers.ask("grpcio", "health", sidelane.web());
    assert_eq!(seen, json!({ "e2e.Peer": 1, "": 1, "nobody": 5, "watched": 1 }));
    let seen = peers.ask("grpcio", "reflection", sidelane.web());
    let services =
        json!(["e2e.Peer", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection",]);
    assert_eq!(seen["services"], services);
}

#[test]
fn calls_pass_two_processes() {
    let Some(peers) = Peers::find("calls_pass_two_processes") else { return };
    let (_peer, address) = peers.service("tonic");
    let setup = Setup::of(address).grpc("{}");
    let relay = Sidelane::spawn("relay", &setup.relay());
    let _sidecar = Sidelane::start("sidecar", &setup.sidecar(relay.tunnel()));
    wait::until("the announcement", || {
        (peers.ask("tonic", "unary", relay.web())["code"] == 0).then_some(())
    });
    for client in NAMES {
        has(client, &peers.ask(client, "shapes", relay.web()), &json!({ "up": "100 4950" }));
    }
}
