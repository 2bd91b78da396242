//! How clients come in: behind balancers and proxies, with several protocols on one address, and for
//! how long.

use std::net::{SocketAddr, TcpStream};
use std::sync::{Mutex, mpsc};

use sidelane_e2e::client::{Client, request};
use sidelane_e2e::process::{Plugin, Setup, Sidelane, line_library};
use sidelane_e2e::service::Service;
use sidelane_e2e::stage::get;
use sidelane_e2e::wait;

/// A program whose listener `web` has further keys, and whose relay has further lines.
fn start(setup: &Setup, listener: &str, relay: &str) -> Sidelane {
    let yaml = setup.both();
    let edited = yaml
        .replace(
            "{ name: web, address: \"127.0.0.1:0\"",
            &format!("{{ name: web, address: \"127.0.0.1:0\"{listener}"),
        )
        .replace("  base_domains:", &format!("{relay}  base_domains:"));
    Sidelane::start("sidelane", &edited)
}

/// Returns what the service is told of the client for a request with these bytes before and fields
/// within it: `X-Forwarded-For` and `X-Forwarded-Proto`.
fn told(sidelane: &Sidelane, service: &Service, before: &[u8], fields: &str) -> (String, String) {
    service.take_requests();
    let request = format!("GET / HTTP/1.1\r\nHost: api.localhost\r\n{fields}\r\n");
    let mut client = Client::connect(sidelane.web());
    client.send([before, request.as_bytes()].concat());
    assert_eq!(client.answer("GET").head.status, 200, "{fields}");
    let request = service.only_request();
    let list = |name: &str| {
        let values: Vec<_> = request.all(name).map(String::from_utf8_lossy).collect();
        values.join(", ")
    };
    (list("x-forwarded-for"), list("x-forwarded-proto"))
}

/// Tests are the proxy.
const TRUSTED: &str = "  trusted_proxies: [127.0.0.1]\n";

fn proxy_v2() -> Vec<u8> {
    [
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".as_slice(),
        &[198, 51, 100, 7, 127, 0, 0, 1, 0x12, 0x67, 0, 80],
    ]
    .concat()
}

#[test]
fn proxy_header_names_the_client() {
    let service = Service::ok();
    let sidelane = start(&Setup::of(service.address()), ", proxy_protocol: true", TRUSTED);
    let v1 = b"PROXY TCP4 192.0.2.1 127.0.0.1 4711 80\r\n";
    assert_eq!(told(&sidelane, &service, v1, "").0, "192.0.2.1");
    let v1 = b"PROXY TCP6 2001:db8::1 ::1 4711 80\r\n";
    assert_eq!(told(&sidelane, &service, v1, "").0, "2001:db8::1");
    assert_eq!(told(&sidelane, &service, &proxy_v2(), "").0, "198.51.100.7");
    assert_eq!(told(&sidelane, &service, b"PROXY UNKNOWN\r\n", "").0, "127.0.0.1");
}

#[test]
fn connection_without_its_proxy_header_is_closed_and_counted() {
    let service = Service::ok();
    let sidelane = start(&Setup::of(service.address()), ", proxy_protocol: true", TRUSTED);
    let refused = |reason: &str, count: f64| {
        let reason = format!("reason=\"{reason}\"");
        let labels = ["listener=\"web\"", reason.as_str()];
        sidelane.until_metric("sidelane_proxy_headers_refused_total", &labels, |n| n == count);
    };
    for (bytes, reason, count) in [
        (get("/"), "missing", 1.0),
        (b"PROXY TCP4 192.0.2.1 127.0.0.1 4711\r\n".to_vec(), "invalid", 1.0),
        ([b"PROXY UNKNOWN ".as_slice(), &[b'x'; 200]].concat(), "invalid", 2.0),
    ] {
        let mut client = Client::connect(sidelane.web());
        client.send(bytes);
        assert_eq!(client.rest(), b"", "nothing is said to who is not understood");
        refused(reason, count);
    }
    drop(TcpStream::connect(sidelane.web()).unwrap());
    refused("closed", 1.0);
    assert_eq!(service.records().len(), 0);
}

#[test]
fn proxy_header_of_a_stranger_is_not_believed() {
    let service = Service::ok();
    let sidelane = start(
        &Setup::of(service.address()),
        ", proxy_protocol: true",
        "  trusted_proxies: [10.0.0.0/8]\n",
    );
    let mut client = Client::connect(sidelane.web());
    client.send(b"PROXY TCP4 192.0.2.1 127.0.0.1 4711 80\r\n");
    assert_eq!(client.rest(), b"");
    let labels = ["reason=\"untrusted\""];
    sidelane.until_metric("sidelane_proxy_headers_refused_total", &labels, |count| count == 1.0);
    assert!(sidelane.log().contains("WARN") && sidelane.log().contains("its address is not in"));
}

#[test]
fn trusted_proxy_names_the_client_and_its_scheme() {
    let service = Service::ok();
    let relay = "  trusted_proxies: [127.0.0.1, 10.0.0.0/8]\n";
    let sidelane = start(&Setup::of(service.address()), "", relay);
    let (client, scheme) = told(
        &sidelane,
        &service,
        b"",
        "X-Forwarded-For: 203.0.113.5, 192.0.2.1, 10.0.0.2\r\nX-Forwarded-Proto: https\r\n",
    );
    assert!(client.contains("192.0.2.1"), "{client}");
    assert!(scheme.contains("https"), "{scheme}");
    let (client, _) = told(&sidelane, &service, b"", "Forwarded: for=\"[2001:db8::1]:9\"\r\n");
    assert!(client.contains("2001:db8::1"), "{client}");
}

#[test]
fn address_lists_go_by_the_client_that_a_proxy_names() {
    let service = Service::ok();
    let setup = Setup::of(service.address());
    let yaml = setup
        .both()
        .replace("  base_domains:", "  trusted_proxies: [127.0.0.1]\n  base_domains:")
        .replace("tunnel: api }", "tunnel: api, addresses: { allow: [192.0.2.0/24] } }");
    let sidelane = Sidelane::start("sidelane", &yaml);
    let status = |fields: &str| {
        let text = format!("GET / HTTP/1.1\r\nHost: api.localhost\r\n{fields}\r\n");
        request(sidelane.web(), "GET", text).head.status
    };
    assert_eq!(status("X-Forwarded-For: 192.0.2.1\r\n"), 200);
    assert_eq!(status("X-Forwarded-For: 192.0.2.1, 198.51.100.7\r\n"), 403);
    assert_eq!(status(""), 403);
}

#[test]
fn stranger_cannot_name_another_client() {
    let service = Service::ok();
    let relay = "  trusted_proxies: [10.0.0.0/8]\n";
    for relay in ["", relay] {
        let sidelane = start(&Setup::of(service.address()), "", relay);
        let fields = "X-Forwarded-For: 192.0.2.1\r\nX-Forwarded-Proto: https\r\n";
        let told = told(&sidelane, &service, b"", fields);
        assert_eq!(told, ("127.0.0.1".to_owned(), "http".to_owned()));
    }
}

#[test]
fn client_behind_a_balancer_and_a_proxy_is_found_by_both() {
    let service = Service::ok();
    let relay = "  trusted_proxies: [127.0.0.1, 10.0.0.0/8]\n";
    let sidelane = start(&Setup::of(service.address()), ", proxy_protocol: true", relay);
    // The balancer names a proxy that is trusted, and that one its client.
    let header = b"PROXY TCP4 10.0.0.9 127.0.0.1 4711 80\r\n";
    let (client, _) = told(&sidelane, &service, header, "X-Forwarded-For: 192.0.2.1\r\n");
    assert!(client.contains("192.0.2.1"), "{client}");
    // What the balancer names is no proxy: what that one says of others is not believed.
    let header = b"PROXY TCP4 198.51.100.7 127.0.0.1 4711 80\r\n";
    let (client, _) = told(&sidelane, &service, header, "X-Forwarded-For: 192.0.2.1\r\n");
    assert_eq!(client, "198.51.100.7");
}

/// HTTP and lines on one address, behind a service that sends back what it gets.
fn sniffing() -> (Service, Sidelane) {
    let service = Service::start(|connection| {
        loop {
            let bytes = connection.some()?;
            match bytes.as_slice() {
                [] => return Ok(()),
                [b'G', b'E', b'T', ..] => {
                    connection.write("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
                }
                bytes => connection.write(bytes)?,
            }
        }
    });
    let mut setup = Setup::of(service.address());
    let line = Plugin { name: "line", library: line_library(), config: "~".to_owned() };
    setup.plugins.push(line);
    let sidelane = start(&setup, ", sniff: true", "");
    (service, sidelane)
}

/// Sends parts one by one, and returns as many bytes as come back.
fn line(address: SocketAddr, parts: &[&[u8]]) -> Vec<u8> {
    let mut client = Client::connect(address);
    for part in parts {
        client.send(part);
    }
    client.exactly(parts.iter().map(|part| part.len()).sum()).expect("all comes back")
}

#[test]
fn one_address_takes_what_its_first_bytes_say() {
    let (_service, sidelane) = sniffing();
    for _ in 0..2 {
        assert_eq!(request(sidelane.web(), "GET", get("/")).body, b"ok");
        let greeting = b"LINE api.localhost\n".as_slice();
        assert_eq!(line(sidelane.web(), &[greeting, b"hello"]), b"LINE api.localhost\nhello");
        // A byte at a time: nobody decides too early, and nothing is lost.
        let bytes: Vec<&[u8]> = greeting.chunks(1).collect();
        assert_eq!(line(sidelane.web(), &bytes), greeting);
    }
    // Not a line after all: the front gets every byte of it, and refuses.
    let answer =
        request(sidelane.web(), "GET", "LINK / HTTP/1.1\r\nHost: api.localhost\r\nX: y\r\n\r\n");
    assert_ne!(answer.head.status, 0);
    let lines =
        sidelane.metric("sidelane_exchanges_total", &["role=\"relay\"", "protocol_type=\"LINE\""]);
    assert!(lines.is_some_and(|lines| lines >= 3.0), "{lines:?}");
}

#[test]
fn host_that_the_first_bytes_name_is_routed() {
    let (_service, sidelane) = sniffing();
    let mut client = Client::connect(sidelane.web());
    client.send(b"LINE nobody.localhost\n");
    assert_eq!(client.rest(), b"", "the plugin's way to refuse: it closes");
    sidelane.until_metric(
        "sidelane_exchanges_total",
        &["role=\"relay\"", "protocol_type=\"LINE\"", "code=\"no-route\""],
        |count| count == 1.0,
    );
}

#[test]
fn connection_of_a_certain_age_ends_after_its_request() {
    let (aged, until_aged) = mpsc::channel::<()>();
    let until_aged = Mutex::new(until_aged);
    let service = Service::start(move |connection| {
        while let Some(request) = connection.request()? {
            if request.target == b"/held" {
                let aged = until_aged.lock().expect("no panic");
                aged.recv_timeout(wait::DEADLINE).map_err(std::io::Error::other)?;
            }
            connection.write("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
        }
        Ok(())
    });
    let sidelane = start(&Setup::of(service.address()), "", "  max_connection_age: 1s\n");
    let mut idle = Client::connect(sidelane.web());
    let mut busy = Client::connect(sidelane.web());
    busy.send(get("/held"));
    idle.send(get("/"));
    assert_eq!(idle.answer("GET").head.status, 200);
    assert_eq!(idle.rest(), b"", "an idle one is closed");
    sidelane.until_metric("sidelane_connections_aged_total", &["listener=\"web\""], |n| n == 2.0);
    aged.send(()).unwrap();
    let answer = busy.answer("GET");
    assert_eq!((answer.head.status, answer.head.list("connection").as_str()), (200, "close"));
    assert_eq!(busy.rest(), b"");
}

/// A client that asks again and again is told by an answer, and never meets a closed connection.
#[test]
fn busy_connection_of_a_certain_age_is_told_before_it_ends() {
    let service = Service::ok();
    let sidelane = start(&Setup::of(service.address()), "", "  max_connection_age: 1s\n");
    for _ in 0..3 {
        let mut client = Client::connect(sidelane.web());
        loop {
            client.send(get("/"));
            let head = client.answer("GET").head;
            assert_eq!(head.status, 200);
            if head.list("connection") == "close" {
                break;
            }
        }
        assert_eq!(client.rest(), b"");
    }
}

#[test]
fn balanced_listener_serves_from_all_threads() {
    let service = Service::ok();
    let sidelane = start(&Setup::of(service.address()), ", balance: exact", "  threads: 3\n");
    let mut clients: Vec<Client> = (0..9).map(|_| Client::connect(sidelane.web())).collect();
    for _ in 0..2 {
        for client in &mut clients {
            client.send(get("/"));
            assert_eq!(client.answer("GET").head.status, 200);
        }
    }
    sidelane.until_metric("sidelane_connections", &["listener=\"web\""], |count| count == 9.0);
    drop(clients);
    sidelane.until_metric("sidelane_connections", &["listener=\"web\""], |count| count == 0.0);
}

#[test]
fn rows_of_what_is_known_stand_from_the_start() {
    let service = Service::ok();
    let sidelane = Sidelane::both(&Setup::of(service.address()));
    for (name, labels) in [
        ("sidelane_config_reloads_total", ["result=\"failure\""].as_slice()),
        ("sidelane_config_restart_pending", &[]),
        ("sidelane_announcements_total", &["result=\"refused\""]),
        ("sidelane_sessions", &["role=\"relay\""]),
        ("sidelane_sessions", &["role=\"sidecar\""]),
        ("sidelane_lanes_lost_total", &["role=\"sidecar\""]),
        ("sidelane_handshakes_refused_total", &["reason=\"CREDENTIAL\""]),
        ("sidelane_connections", &["listener=\"web\""]),
        ("sidelane_connections_refused_total", &["listener=\"web\""]),
        ("sidelane_connections_aged_total", &["listener=\"web\""]),
    ] {
        assert!(sidelane.metric(name, labels).is_some(), "{name}{labels:?}");
    }
    sidelane.until_metric("sidelane_sessions", &["role=\"sidecar\""], |count| count == 1.0);
}
