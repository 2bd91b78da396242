//! Fields that belong to one hop, and those that a proxy writes (RFC 9110 §7.6, RFC 7239).

use std::net::TcpListener;

use sidelane_e2e::client;
use sidelane_e2e::process::{Setup, Sidelane};
use sidelane_e2e::service::{Request, Service};
use sidelane_e2e::stage::Stage;
use sidelane_e2e::tools::Python;

/// Sends a GET with these fields, and returns what the service saw.
fn pass(stage: &Stage, name: &str, fields: &str) -> Request {
    let bytes = format!("GET / HTTP/1.1\r\nHost: api.localhost\r\n{fields}\r\n");
    stage.pass(name, "GET", bytes).0
}

#[test]
fn request_fields_of_one_hop_end_at_the_relay() {
    let stage = Stage::ok();
    let table: &[(&str, &str, &[&str])] = &[
        (
            "named by Connection",
            "Connection: X-Named, x-other\r\nX-Named: 1\r\nX-Other: 2\r\n",
            &["x-named", "x-other"],
        ),
        (
            "named by a second Connection",
            "Connection: close\r\nX-Named: 1\r\nConnection: x-named\r\n",
            &["x-named"],
        ),
        ("keep-alive", "Connection: keep-alive\r\nKeep-Alive: timeout=5\r\n", &["keep-alive"]),
        ("keep-alive, not named", "Keep-Alive: timeout=5\r\n", &["keep-alive"]),
        ("proxy-connection", "Proxy-Connection: keep-alive\r\n", &["proxy-connection"]),
        (
            "h2c",
            "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n",
            &["upgrade", "http2-settings"],
        ),
        (
            "h2c, not named",
            "Upgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
            &["upgrade", "http2-settings"],
        ),
        (
            "websocket without its plugin",
            "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
            &["upgrade"],
        ),
        ("te of a coding", "TE: gzip\r\nConnection: TE\r\n", &["te"]),
    ];
    assert!(!table.is_empty());
    for (name, fields, gone) in table {
        let request = pass(&stage, name, fields);
        for field in *gone {
            assert!(!request.has(field), "{name}: {field} in {request:?}");
        }
        let connection = request.first("connection").unwrap_or_default().to_lowercase();
        assert!(
            !connection.contains("x-") && !connection.contains("upgrade"),
            "{name}: {connection}"
        );
    }
}

#[test]
fn te_trailers_survives() {
    let stage = Stage::ok();
    let request = pass(&stage, "te", "TE: trailers\r\nConnection: TE\r\n");
    assert_eq!(request.first("te"), Some("trailers"));
}

#[test]
fn connection_cannot_name_what_the_proxy_writes() {
    let stage = Stage::ok();
    let fields = "Connection: x-forwarded-for, x-forwarded-proto, x-forwarded-host, forwarded, via, host\r\n";
    let request = pass(&stage, "named", fields);
    for field in
        ["x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "forwarded", "via", "host"]
    {
        assert_eq!(request.all(field).count(), 1, "{field} in {request:?}");
    }
}

#[test]
fn forwarded_fields_are_written_over_what_came_in() {
    let stage = Stage::ok();
    for (name, fields) in [
        ("none", ""),
        (
            "forged",
            "X-Forwarded-For: 6.6.6.6\r\nX-Forwarded-For: 7.7.7.7\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: evil\r\n\
             Forwarded: for=6.6.6.6;proto=https;host=evil\r\nForwarded: for=7.7.7.7\r\n",
        ),
    ] {
        let request = pass(&stage, name, fields);
        for (field, value) in [
            ("x-forwarded-for", "127.0.0.1"),
            ("x-forwarded-proto", "http"),
            ("x-forwarded-host", "api.localhost"),
        ] {
            let values: Vec<_> = request.all(field).map(String::from_utf8_lossy).collect();
            assert_eq!(values, [value], "{name}: {field}");
        }
        assert_eq!(request.all("forwarded").count(), 1, "{name}: {request:?}");
        let mut pairs: Vec<_> =
            request.first("forwarded").unwrap_or_default().split(';').map(str::trim).collect();
        pairs.sort_unstable();
        assert_eq!(pairs, ["for=127.0.0.1", "host=api.localhost", "proto=http"], "{name}");
    }
}

#[test]
fn forwarded_quotes_what_is_no_token() {
    let stage = Stage::ok();
    let bytes = "GET / HTTP/1.1\r\nHost: api.localhost:9080\r\n\r\n";
    let (request, _) = stage.pass("port", "GET", bytes);
    let forwarded = request.first("forwarded").unwrap_or_default();
    assert!(forwarded.contains("host=\"api.localhost:9080\""), "{forwarded}");
    assert_eq!(request.first("x-forwarded-host"), Some("api.localhost:9080"));
}

#[test]
fn forwarded_quotes_ipv6() {
    if TcpListener::bind("[::1]:0").is_err() {
        sidelane_e2e::tools::skip("forwarded_quotes_ipv6", "this machine has no IPv6 loopback");
        return;
    }
    let service = Service::ok();
    let mut setup = Setup::of(service.address());
    setup.web = "[::1]:0";
    let sidelane = Sidelane::both(&setup);
    let answer =
        client::request(sidelane.web(), "GET", "GET / HTTP/1.1\r\nHost: api.localhost\r\n\r\n");
    assert_eq!(answer.head.status, 200);
    let request = service.only_request();
    let forwarded = request.first("forwarded").unwrap_or_default();
    assert!(forwarded.contains("for=\"[::1]\""), "{forwarded}");
    assert_eq!(request.first("x-forwarded-for"), Some("::1"));
}

#[test]
fn via_is_added_to_what_came_in() {
    let stage = Stage::ok();
    let via = |request: &Request| {
        let values: Vec<_> = request.all("via").map(String::from_utf8_lossy).collect();
        values.join(", ")
    };
    assert_eq!(via(&pass(&stage, "none", "")), "1.1 sidelane");
    assert_eq!(via(&pass(&stage, "one", "Via: 1.0 fred\r\n")), "1.0 fred, 1.1 sidelane");
    let bytes = "GET / HTTP/1.0\r\nHost: api.localhost\r\n\r\n";
    assert_eq!(via(&stage.pass("1.0", "GET", bytes).0), "1.0 sidelane");
}

#[test]
fn via_names_http2() {
    let Some(python) = Python::find("via_names_http2") else { return };
    let stage = Stage::ok();
    assert_eq!(python.run("h2-plain", stage.sidelane.web())["status"], 200);
    let request = stage.service.only_request();
    assert!(matches!(request.first("via"), Some("2 sidelane" | "2.0 sidelane")), "{request:?}");
}

#[test]
fn response_fields_of_one_hop_end_at_the_sidecar() {
    let stage = Stage::of(Service::answering(
        "HTTP/1.1 200 OK\r\nConnection: X-Named, keep-alive\r\nX-Named: 1\r\nKeep-Alive: timeout=5\r\n\
         Proxy-Connection: keep-alive\r\nUpgrade: h2c\r\nX-Kept: 1\r\nVia: 1.1 inner\r\nContent-Length: 2\r\n\r\nok",
    ));
    let head = stage.get("/").head;
    for field in ["x-named", "keep-alive", "proxy-connection", "upgrade"] {
        assert_eq!(head.all(field).count(), 0, "{field} in {head:?}");
    }
    assert_eq!(head.first("x-kept"), Some("1"));
    assert_eq!(head.list("via"), "1.1 inner, 1.1 sidelane");
    assert!(!head.list("connection").contains("x-named"), "{head:?}");
}
