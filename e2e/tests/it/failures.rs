//! The failure table of docs/operations.md, HTTP column.

use sidelane_e2e::client::{Answer, request};
use sidelane_e2e::nobody::Nobody;
use sidelane_e2e::process::{Setup, Sidelane};
use sidelane_e2e::service::Service;
use sidelane_e2e::stage::{Stage, get};

/// Asserts what every failure of ours looks like: its status, its code, one line of text.
fn assert_failure(answer: &Answer, status: u16, code: &str) {
    assert_eq!(answer.head.status, status, "{answer:?}");
    assert_eq!(answer.head.first("x-sidelane-error"), Some(code), "{answer:?}");
    let text = String::from_utf8(answer.body.clone()).expect("a failure's body is text");
    assert_eq!(text.trim_end().lines().count(), 1, "{text:?}");
    assert!(!text.trim().is_empty());
}

#[test]
fn no_route_is_404() {
    let stage = Stage::ok();
    for host in [
        "nobody.localhost",
        "localhost",
        "api.other",
        "api.localhost.other",
        "127.0.0.1",
        "[::1]:80",
        "x.api.localhost",
    ] {
        let answer = stage.ask("GET", format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n"));
        assert_failure(&answer, 404, "no-route");
    }
    let code = ["role=\"relay\"", "code=\"no-route\""];
    stage.sidelane.until_metric("sidelane_exchanges_total", &code, |count| count >= 7.0);
    assert!(stage.service.received().is_empty());
}

#[test]
fn failure_is_json_where_the_client_accepts_it() {
    let stage = Stage::ok();
    let answer = stage
        .ask("GET", "GET / HTTP/1.1\r\nHost: nobody.localhost\r\nAccept: application/json\r\n\r\n");
    assert_eq!(answer.head.status, 404);
    assert!(answer.head.list("content-type").starts_with("application/json"), "{answer:?}");
    let body: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
    assert!(body.is_object(), "{body}");
    assert!(body.to_string().contains("no-route"), "{body}");
}

#[test]
fn failure_of_a_head_request_has_no_body() {
    let stage = Stage::ok();
    let mut client = stage.connect();
    // Twice: a byte of a body would be taken for the next head.
    for _ in 0..2 {
        client.send("HEAD / HTTP/1.1\r\nHost: nobody.localhost\r\n\r\n");
        assert_eq!(client.answer("HEAD").head.status, 404);
    }
}

#[test]
fn no_sidecar_is_503() {
    let service = Service::ok();
    let setup = Setup::of(service.address());
    // The route stands in the relay's own file; nobody serves its tunnel.
    let relay = Sidelane::spawn("relay", &setup.relay_with_routes());
    let answer = request(relay.web(), "GET", get("/"));
    assert_failure(&answer, 503, "no-sidecar");
    let seconds = answer.head.first("retry-after").map(str::parse::<u32>);
    assert!(matches!(seconds, Some(Ok(1..))), "{answer:?}");
}

#[test]
fn refused_connection_is_502() {
    let nobody = Nobody::new();
    let sidelane = Sidelane::both(&Setup::of(nobody.address()));
    assert_failure(&request(sidelane.web(), "GET", get("/")), 502, "service-unreachable");
}

#[test]
fn service_that_closes_without_an_answer_is_502() {
    let stage = Stage::script(|connection| {
        connection.exchange()?;
        connection.crash()
    });
    assert_failure(&stage.get("/"), 502, "service-reset");
}

#[test]
fn service_that_speaks_no_http_is_502() {
    for words in [
        "SSH-2.0-OpenSSH_9.2\r\n\r\n",
        "HTTP/1.1 abc\r\n\r\n",
        "HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        "HTTP/1.1 200 OK\r\nx: a\r\n b\r\ncontent-length: 0\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n",
    ] {
        let stage = Stage::of(Service::answering(words));
        assert_failure(&stage.get("/"), 502, "service-invalid");
    }
}

#[test]
fn a_service_that_speaks_tls_is_told_of() {
    // An alert: unexpected_message.
    let stage = Stage::of(Service::answering("\x15\x03\x01\0\x02\x02\x0a"));
    assert_failure(&stage.get("/"), 502, "service-invalid");
    let log = stage.sidelane.log();
    assert!(log.contains("if it speaks TLS: `service: https://"), "{log}");
}

#[test]
fn slow_service_is_504() {
    let service = Service::start(|connection| {
        connection.request()?;
        connection.closed()
    });
    let mut setup = Setup::of(service.address());
    setup.http_config = "{ response_timeout: 200ms }".to_owned();
    let sidelane = Sidelane::both(&setup);
    assert_failure(&request(sidelane.web(), "GET", get("/")), 504, "service-timeout");
    service.until("the late request to be cancelled", |records| records[0].closed);
}

#[test]
fn failures_are_counted_by_their_code() {
    let stage = Stage::ok();
    let answer = stage.ask("GET", "GET / HTTP/1.1\r\nHost: nobody.localhost\r\n\r\n");
    assert_eq!(answer.head.status, 404);
    assert_eq!(stage.get("/").head.status, 200);
    stage.sidelane.until_metric("sidelane_exchanges_total", &["no-route"], |count| count == 1.0);
    stage
        .sidelane
        .until_metric("sidelane_exchanges_total", &["route=\"api\""], |count| count >= 1.0);
}

#[test]
fn one_failure_leaves_the_connection_usable() {
    let stage = Stage::ok();
    let mut client = stage.connect();
    client.send("GET / HTTP/1.1\r\nHost: nobody.localhost\r\n\r\n");
    assert_eq!(client.answer("GET").head.status, 404);
    client.send(get("/"));
    assert_eq!(client.answer("GET").head.status, 200);
}
