//! The sidecar's end as a file sets it up: where the service is and how it is spoken to, what is sent
//! to it again, and whether it is well.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use sidelane_e2e::client::{Answer, Client, request};
use sidelane_e2e::nobody::Nobody;
use sidelane_e2e::peer::Peer;
use sidelane_e2e::process::{Setup, Sidelane};
use sidelane_e2e::service::Service;
use sidelane_e2e::stage::get;
use sidelane_e2e::tools::tonic;
use sidelane_e2e::wait;

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

/// Relay and sidecar in one file; `service`, `tunnel` and `route` go into the tunnel's and the route's
/// entries.
fn yaml(service: &str, tunnel: &str, route: &str) -> String {
    let any: SocketAddr = "127.0.0.1:1".parse().expect("an address");
    let yaml = Setup::of(any).both();
    let replaced = yaml
        .replace(
            "{ name: api, service: \"127.0.0.1:1\" }",
            &format!("{{ name: api, service: \"{service}\"{tunnel} }}"),
        )
        .replace(
            "subdomain: api, tunnel: api }",
            &format!("subdomain: api, tunnel: api{route} }}"),
        );
    assert_ne!(replaced, yaml);
    replaced
}

fn of(service: &Service, tunnel: &str, route: &str) -> Sidelane {
    Sidelane::start("sidelane", &yaml(&service.address().to_string(), tunnel, route))
}

fn ask(sidelane: &Sidelane) -> Answer {
    request(sidelane.web(), "GET", get("/"))
}

fn error(answer: &Answer) -> &str {
    answer.head.first("x-sidelane-error").unwrap_or_default()
}

/// Answers each request on a Unix socket, while the test runs.
fn serve_unix(path: &Path) {
    let listener = UnixListener::bind(path).expect("the path is free");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                let mut head = Vec::new();
                let mut byte = [0];
                while stream.read(&mut byte).is_ok_and(|read| read == 1) {
                    head.push(byte[0]);
                    if head.ends_with(b"\r\n\r\n") {
                        head.clear();
                        // An error is the end of the peer.
                        let _ = stream.write_all(OK.as_bytes());
                    }
                }
            });
        }
    });
}

#[test]
fn service_on_a_unix_socket_is_served() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("app.sock");
    serve_unix(&path);
    let sidelane = Sidelane::start("sidelane", &yaml(&format!("unix:{}", path.display()), "", ""));
    assert_eq!(ask(&sidelane).body, b"ok");
    let page = sidelane.admin_page("/tunnels");
    assert_eq!(page["services"][0]["service"], format!("unix:{}", path.display()));
    assert_eq!(page["services"][0]["health"], "unchecked");
}

#[test]
fn each_connection_tells_the_service_whose_it_is() {
    let service = Service::start(|connection| {
        let mut header = connection.exactly(12)?;
        if header.starts_with(b"PROXY ") {
            while !header.ends_with(b"\r\n") {
                header.extend(connection.exactly(1)?);
            }
        } else {
            connection.exactly(4 + 12)?;
        }
        while connection.exchange()?.is_some() {
            connection.write(OK)?;
        }
        Ok(())
    });
    for version in ["v1", "v2"] {
        let sidelane = of(&service, &format!(", proxy_protocol: {version}"), "");
        // One client's requests too have a connection each.
        for _ in 0..2 {
            let before = service.records().len();
            let mut client = Client::connect(sidelane.web());
            client.send(get("/"));
            assert_eq!(client.answer("GET").body, b"ok");
            let address = client.writer().local_addr().expect("connected");
            let port = service.address().port();
            let header = if version == "v1" {
                let text = format!("PROXY TCP4 127.0.0.1 127.0.0.1 {} {port}\r\n", address.port());
                text.into_bytes()
            } else {
                let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".to_vec();
                header.extend([127, 0, 0, 1, 127, 0, 0, 1]);
                header.extend(address.port().to_be_bytes());
                header.extend(port.to_be_bytes());
                header
            };
            let records = service.records();
            assert_eq!(records.len(), before + 1, "{version}");
            let received = &records[before].received;
            assert!(received.starts_with(&[&header[..], b"GET / HTTP/1.1\r\n"].concat()));
        }
    }
}

#[test]
fn a_service_of_http_2_gets_plain_requests_over_it() {
    let mut command = tonic();
    command.arg("serve");
    let (_peer, address) = Peer::service("tonic", command);
    let sidelane =
        Sidelane::start("sidelane", &yaml(&address.to_string(), ", http_version: 2", ""));
    for _ in 0..2 {
        // A server of gRPC says in its words that it has no such method; over HTTP/1.1 it says nothing.
        let answer = ask(&sidelane);
        assert_eq!(answer.head.first("grpc-status"), Some("12"), "{answer:?}");
        assert_eq!(answer.head.list("via"), "2.0 sidelane");
    }
    assert_eq!(sidelane.metric("sidelane_plugin_http2_connections_opened_total", &[]), Some(1.0));
}

#[test]
fn a_tunnels_pool_settings_are_kept_to() {
    let service = Service::ok();
    let sidelane = of(&service, ", pool: { idle: 0 }", "");
    for _ in 0..2 {
        assert_eq!(ask(&sidelane).body, b"ok");
    }
    assert_eq!(service.records().len(), 2);
}

/// Closes every other connection without an answer, from the first.
fn flaky() -> Service {
    let connections = AtomicUsize::new(0);
    Service::start(move |connection| {
        let breaks = connections.fetch_add(1, Ordering::SeqCst).is_multiple_of(2);
        if connection.exchange()?.is_some() && !breaks {
            connection
                .write("HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok")?;
        }
        Ok(())
    })
}

#[test]
fn what_a_service_did_not_answer_is_sent_again_where_that_does_no_harm() {
    let service = flaky();
    let sidelane = of(&service, "", ", retries: { attempts: 2 }");
    assert_eq!(ask(&sidelane).body, b"ok");
    assert_eq!(service.take_requests().len(), 2);
    let post = "POST / HTTP/1.1\r\nHost: api.localhost\r\nContent-Length: 3\r\n\r\nabc";
    let answer = request(sidelane.web(), "POST", post);
    assert_eq!((answer.head.status, error(&answer)), (502, "service-reset"));
    assert_eq!(service.take_requests().len(), 1);
    let route = ["route=\"api\""];
    assert_eq!(sidelane.metric("sidelane_retries_total", &route), Some(1.0));
    assert_eq!(sidelane.metric("sidelane_retries_exhausted_total", &route), None);
}

#[test]
fn without_a_policy_nothing_is_sent_again() {
    let service = flaky();
    let sidelane = of(&service, "", "");
    let answer = ask(&sidelane);
    assert_eq!((answer.head.status, error(&answer)), (502, "service-reset"));
    assert_eq!(service.requests().len(), 1);
}

#[test]
fn retries_end_with_the_attempts_or_the_budget() {
    let service = Service::start(|connection| connection.exchange().map(drop));
    for (retries, sent) in [
        ("{ attempts: 3, budget: 100%, budget_min: 10 }", 4),
        ("{ attempts: 3, budget: 1%, budget_min: 0 }", 1),
    ] {
        let sidelane = of(&service, "", &format!(", retries: {retries}"));
        let answer = ask(&sidelane);
        assert_eq!((answer.head.status, error(&answer)), (502, "service-reset"), "{retries}");
        assert_eq!(service.take_requests().len(), sent, "{retries}");
        let exhausted = sidelane.metric("sidelane_retries_exhausted_total", &["route=\"api\""]);
        assert_eq!(exhausted, Some(1.0), "{retries}");
    }
}

#[test]
fn a_service_that_cannot_be_reached_is_dialled_again() {
    let nobody = Nobody::new();
    let sidelane = Sidelane::start(
        "sidelane",
        &yaml(&nobody.address().to_string(), "", ", retries: { attempts: 2, budget_min: 10 }"),
    );
    let answer = ask(&sidelane);
    assert_eq!((answer.head.status, error(&answer)), (502, "service-unreachable"));
    assert_eq!(sidelane.metric("sidelane_retries_total", &["route=\"api\""]), Some(2.0));
}

#[test]
fn a_routes_response_head_timeout_is_kept_to() {
    let service = Service::start(|connection| {
        // Reads on, and so sees that nobody waits any more.
        while connection.exchange()?.is_some() {}
        Ok(())
    });
    let sidelane = of(&service, "", ", timeouts: { response_head: 50ms }");
    let answer = ask(&sidelane);
    assert_eq!((answer.head.status, error(&answer)), (504, "service-timeout"));
}

#[test]
fn a_service_that_fails_its_health_check_is_left_alone_until_it_passes() {
    let is_well = Arc::new(AtomicBool::new(true));
    let seen = Arc::clone(&is_well);
    let service = Service::start(move |connection| {
        while let Some(request) = connection.request()? {
            let is_check = request.target == b"/healthz";
            let fails = is_check && !seen.load(Ordering::SeqCst);
            connection.write(if fails {
                "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"
            } else {
                OK
            })?;
        }
        Ok(())
    });
    let check = "{ type: http, path: /healthz, interval: 100ms, unhealthy_after: 2 }";
    let yaml = yaml(&service.address().to_string(), &format!(", health_check: {check}"), "");
    let yaml = yaml.replacen("relay:\n", "relay:\n  timeouts: { open_wait: 0s }\n", 1);
    let sidelane = Sidelane::start("sidelane", &yaml);
    let until_status = |expected: u16| {
        wait::until(&format!("a {expected}"), || {
            let answer = ask(&sidelane);
            (answer.head.status == expected).then_some(answer)
        })
    };
    until_status(200);
    assert_eq!(sidelane.metric("sidelane_service_healthy", &["tunnel=\"api\""]), Some(1.0));
    is_well.store(false, Ordering::SeqCst);
    let refused = until_status(503);
    assert_eq!(error(&refused), "no-sidecar");
    assert_eq!(sidelane.metric("sidelane_service_healthy", &["tunnel=\"api\""]), Some(0.0));
    let page = sidelane.admin_page("/tunnels");
    assert_eq!(page["services"][0]["health"], "unhealthy");
    assert_eq!(page["services"][0]["unavailable"], "its health check fails: answered 503");
    let failed = ["tunnel=\"api\"", "result=\"failure\""];
    assert!(sidelane.metric("sidelane_health_checks_total", &failed) >= Some(2.0));
    is_well.store(true, Ordering::SeqCst);
    until_status(200);
    assert!(sidelane.log().contains("the service passes its health check"));
}

#[test]
fn a_service_that_is_waited_for_gets_nothing_before_it_is_there() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("app.sock");
    let yaml = yaml(&format!("unix:{}", path.display()), ", wait: 1m", "");
    let yaml = yaml.replacen("relay:\n", "relay:\n  timeouts: { open_wait: 0s }\n", 1);
    let sidelane = Sidelane::spawn("sidelane", &yaml);
    sidelane.until_metric("sidelane_lanes", &["role=\"sidecar\""], |lanes| lanes > 0.0);
    let answer = ask(&sidelane);
    assert_eq!((answer.head.status, error(&answer)), (503, "no-sidecar"));
    let page = sidelane.admin_page("/tunnels");
    assert_eq!(page["services"][0]["unavailable"], "waiting for the service");
    serve_unix(&path);
    wait::until("the service to be served", || (ask(&sidelane).head.status == 200).then_some(()));
}

#[test]
fn a_relay_is_dialled_by_its_name() {
    let service = Service::ok();
    let setup = Setup::of(service.address());
    let relay = Sidelane::spawn("relay", &setup.relay());
    let by_name = format!("localhost:{}", relay.tunnel().port());
    let yaml = setup.sidecar(relay.tunnel()).replace(&relay.tunnel().to_string(), &by_name);
    let sidecar = Sidelane::start("sidecar", &yaml);
    assert_eq!(
        wait::until("an answer", || Some(ask(&relay)).filter(|a| a.body == b"ok")).body,
        b"ok"
    );
    let page = sidecar.admin_page("/tunnels");
    assert_eq!(page["names"][0]["relay"], by_name);
    assert_eq!(page["names"][0]["last_error"], serde_json::Value::Null);
    assert_eq!(page["relays"][0]["relay"], by_name);
}
