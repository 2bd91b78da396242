//! Requests that relay and service could read differently: refused before the service sees a byte.
//!
//! What is tested is the outcome on the wire, not what a library reports.

use sidelane_e2e::client::Client;
use sidelane_e2e::stage::{Stage, get};
use sidelane_e2e::tools::Python;

/// A request that a relay must not read as its own, hidden behind another one's body.
const HIDDEN: &str = "GET /hidden HTTP/1.1\r\nHost: api.localhost\r\n\r\n";

/// Asserts that a good request passes, and that nothing but it has reached the service.
fn nothing_reached(stage: &Stage, name: &str) {
    let before = stage.service.received().len();
    assert_eq!(stage.get("/good").head.status, 200, "{name}: the relay goes on");
    let requests = stage.service.take_requests();
    let targets: Vec<_> =
        requests.iter().map(|request| String::from_utf8_lossy(&request.target)).collect();
    assert_eq!(targets, ["/good"], "{name}: only the good request reaches the service");
    assert_eq!(
        stage.service.received().len() - before,
        requests[0].raw.len(),
        "{name}: not a byte of it reaches the service"
    );
}

/// Sends bytes; the answer must be one of the statuses, and the connection must close.
fn refused(stage: &Stage, name: &str, bytes: &[u8], statuses: &[u16]) {
    let mut client = stage.connect();
    // The relay may have answered and closed before it has read everything.
    let _ = client.try_send(bytes);
    let head = client.try_head().unwrap_or_else(|error| panic!("{name}: no answer: {error}"));
    assert!(statuses.contains(&head.status), "{name}: {head:?}");
    let _ = client.try_body("GET", head);
    let rest = client.rest();
    assert!(rest.is_empty(), "{name}: one answer only, not {:?}", String::from_utf8_lossy(&rest));
    nothing_reached(stage, name);
}

#[test]
fn ambiguous_heads_are_400() {
    let stage = Stage::ok();
    nothing_reached(&stage, "the pool's first connection");
    let table: &[(&str, &[u8])] = &[
        ("no Host", b"GET / HTTP/1.1\r\n\r\n"),
        ("no Host by HTTP/1.0", b"GET / HTTP/1.0\r\n\r\n"),
        ("Host twice", b"GET / HTTP/1.1\r\nHost: api.localhost\r\nHost: api.localhost\r\n\r\n"),
        ("Host twice, differing", b"GET / HTTP/1.1\r\nHost: api.localhost\r\nHost: other.localhost\r\n\r\n"),
        ("Host twice, absolute target", b"GET http://api.localhost/ HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"),
        ("Host with a space", b"GET / HTTP/1.1\r\nHost: api.localhost x\r\n\r\n"),
        ("Host with a path", b"GET / HTTP/1.1\r\nHost: api.localhost/x\r\n\r\n"),
        ("Host with userinfo", b"GET / HTTP/1.1\r\nHost: user@api.localhost\r\n\r\n"),
        ("Host with a wrong port", b"GET / HTTP/1.1\r\nHost: api.localhost:http\r\n\r\n"),
        ("Host with a large port", b"GET / HTTP/1.1\r\nHost: api.localhost:99999\r\n\r\n"),
        ("Host as a list", b"GET / HTTP/1.1\r\nHost: api.localhost, other.localhost\r\n\r\n"),
        ("Host not ASCII", b"GET / HTTP/1.1\r\nHost: \xfepi.localhost\r\n\r\n"),
        ("Host with a broken IPv6", b"GET / HTTP/1.1\r\nHost: [::1\r\n\r\n"),
        ("empty Host", b"GET / HTTP/1.1\r\nHost:\r\n\r\n"),
        ("userinfo in the target", b"GET http://user@api.localhost/ HTTP/1.1\r\nHost: api.localhost\r\n\r\n"),
        ("target without a slash", b"GET x HTTP/1.1\r\nHost: api.localhost\r\n\r\n"),
        ("two spaces in the request line", b"GET  / HTTP/1.1\r\nHost: api.localhost\r\n\r\n"),
        ("NUL in the target", b"GET /\x00 HTTP/1.1\r\nHost: api.localhost\r\n\r\n"),
        ("bare CR in the target", b"GET /\rx HTTP/1.1\r\nHost: api.localhost\r\n\r\n"),
        ("bare CR in a value", b"GET / HTTP/1.1\r\nHost: api.localhost\r\nX: a\rb\r\n\r\n"),
        ("bare CR before a field", b"GET / HTTP/1.1\r\nHost: api.localhost\r\n\rX: a\r\n\r\n"),
        ("obs-fold", b"GET / HTTP/1.1\r\nHost: api.localhost\r\nX: a\r\n b\r\n\r\n"),
        ("obs-fold by tab", b"GET / HTTP/1.1\r\nHost: api.localhost\r\nX: a\r\n\tb\r\n\r\n"),
        ("space before the first field", b"GET / HTTP/1.1\r\n X: a\r\nHost: api.localhost\r\n\r\n"),
        ("NUL in a value", b"GET / HTTP/1.1\r\nHost: api.localhost\r\nX: a\x00b\r\n\r\n"),
        ("control byte in a value", b"GET / HTTP/1.1\r\nHost: api.localhost\r\nX: a\x01b\r\n\r\n"),
        ("space in a name", b"GET / HTTP/1.1\r\nHost: api.localhost\r\nX Y: a\r\n\r\n"),
        ("space behind a name", b"GET / HTTP/1.1\r\nHost: api.localhost\r\nX : a\r\n\r\n"),
        ("parenthesis in a name", b"GET / HTTP/1.1\r\nHost: api.localhost\r\nX(: a\r\n\r\n"),
        ("empty name", b"GET / HTTP/1.1\r\nHost: api.localhost\r\n: a\r\n\r\n"),
        ("line without a colon", b"GET / HTTP/1.1\r\nHost: api.localhost\r\nnothing\r\n\r\n"),
        ("differing lengths", b"POST / HTTP/1.1\r\nHost: api.localhost\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd"),
        ("differing lengths as a list", b"POST / HTTP/1.1\r\nHost: api.localhost\r\nContent-Length: 3, 4\r\n\r\nabcd"),
        ("length with a sign", b"POST / HTTP/1.1\r\nHost: api.localhost\r\nContent-Length: +3\r\n\r\nabc"),
        ("negative length", b"POST / HTTP/1.1\r\nHost: api.localhost\r\nContent-Length: -3\r\n\r\nabc"),
        ("hexadecimal length", b"POST / HTTP/1.1\r\nHost: api.localhost\r\nContent-Length: 0x3\r\n\r\nabc"),
        ("empty length", b"POST / HTTP/1.1\r\nHost: api.localhost\r\nContent-Length:\r\n\r\n"),
        ("length with a space", b"POST / HTTP/1.1\r\nHost: api.localhost\r\nContent-Length: 1 1\r\n\r\nabcdefghijk"),
        ("huge length", b"POST / HTTP/1.1\r\nHost: api.localhost\r\nContent-Length: 99999999999999999999\r\n\r\nabc"),
        ("fraction of a length", b"POST / HTTP/1.1\r\nHost: api.localhost\r\nContent-Length: 3.0\r\n\r\nabc"),
    ];
    assert!(!table.is_empty());
    for (name, bytes) in table {
        refused(&stage, name, bytes, &[400]);
    }
}

#[test]
fn transfer_encoding_is_chunked_or_nothing() {
    let stage = Stage::ok();
    nothing_reached(&stage, "the pool's first connection");
    for (name, field) in [
        ("another coding first", "Transfer-Encoding: gzip, chunked"),
        ("another coding last", "Transfer-Encoding: chunked, gzip"),
        ("another coding alone", "Transfer-Encoding: gzip"),
        ("identity", "Transfer-Encoding: identity"),
        ("identity last", "Transfer-Encoding: chunked, identity"),
        ("chunked twice", "Transfer-Encoding: chunked, chunked"),
        ("two fields", "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"),
        ("two fields, differing", "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity"),
        ("a longer word", "Transfer-Encoding: xchunked"),
        ("a word behind it", "Transfer-Encoding: chunked x"),
        ("quoted", "Transfer-Encoding: \"chunked\""),
        ("parameter", "Transfer-Encoding: chunked;q=1"),
        ("vertical tab", "Transfer-Encoding: \x0bchunked"),
        ("empty", "Transfer-Encoding:"),
        ("empty element", "Transfer-Encoding: ,chunked"),
        ("space behind the name", "Transfer-Encoding : chunked"),
    ] {
        let bytes =
            format!("POST / HTTP/1.1\r\nHost: api.localhost\r\n{field}\r\n\r\n0\r\n\r\n{HIDDEN}");
        refused(&stage, name, bytes.as_bytes(), &[400, 501]);
    }
    let bytes = format!(
        "POST / HTTP/1.0\r\nHost: api.localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{HIDDEN}"
    );
    refused(&stage, "chunked by HTTP/1.0", bytes.as_bytes(), &[400, 501]);
}

#[test]
fn chunked_is_read_in_any_case() {
    let stage = Stage::ok();
    for value in ["chunked", "Chunked", "CHUNKED"] {
        let bytes = format!(
            "POST / HTTP/1.1\r\nHost: api.localhost\r\nTransfer-Encoding: {value}\r\n\r\n1\r\na\r\n0\r\n\r\n"
        );
        let (request, _) = stage.pass(value, "POST", bytes);
        assert_eq!(request.body.bytes, b"a", "{value}");
    }
}

#[test]
fn equal_lengths_are_one_or_refused() {
    let stage = Stage::ok();
    for fields in ["Content-Length: 3\r\nContent-Length: 3", "Content-Length: 3, 3"] {
        stage.service.take_requests();
        let bytes = format!("POST / HTTP/1.1\r\nHost: api.localhost\r\n{fields}\r\n\r\nabc");
        let answer = stage.ask("POST", bytes);
        match answer.head.status {
            // RFC 9110 §8.6: a recipient may take a repeated, identical length as one.
            200 => {
                let request = stage.service.only_request();
                assert_eq!(request.all("content-length").collect::<Vec<_>>(), [b"3"], "{fields}");
                assert_eq!(request.body.bytes, b"abc");
            }
            status => {
                assert_eq!(status, 400, "{fields}");
                assert!(stage.service.take_requests().is_empty(), "{fields}");
            }
        }
    }
}

/// RFC 9112 §6.1: both fields are an attack until shown otherwise. Refused; or read as chunked,
/// passed on with one framing, and the connection closed.
#[test]
fn length_beside_transfer_encoding_is_never_passed_on() {
    let stage = Stage::ok();
    for (name, fields) in [
        ("length first", "Content-Length: 6\r\nTransfer-Encoding: chunked"),
        ("length last", "Transfer-Encoding: chunked\r\nContent-Length: 6"),
        ("length 0", "Transfer-Encoding: chunked\r\nContent-Length: 0"),
        ("odd case", "transfer-ENCODING: chunked\r\ncOnTeNt-LeNgTh: 5"),
        ("length twice", "Content-Length: 5\r\nTransfer-Encoding: chunked\r\nContent-Length: 6"),
        (
            "far apart",
            concat!(
                "Content-Length: 6\r\nX-1: 1\r\nX-2: 2\r\nX-3: 3\r\n",
                "Transfer-Encoding: chunked"
            ),
        ),
    ] {
        stage.service.take_requests();
        let mut client = stage.connect();
        let bytes = format!(
            "POST /first HTTP/1.1\r\nHost: api.localhost\r\n{fields}\r\n\r\n0\r\n\r\n{HIDDEN}"
        );
        let _ = client.try_send(bytes.as_bytes());
        let answer = client.try_answer("POST").unwrap_or_else(|error| panic!("{name}: {error}"));
        let rest = client.rest();
        assert!(rest.is_empty(), "{name}: the connection closes behind the first answer");
        assert_eq!(stage.get("/good").head.status, 200);
        let requests = stage.service.take_requests();
        let targets: Vec<_> =
            requests.iter().map(|request| String::from_utf8_lossy(&request.target)).collect();
        match answer.head.status {
            400 => assert_eq!(targets, ["/good"], "{name}"),
            200 => {
                assert_eq!(targets, ["/first", "/good"], "{name}");
                let first = &requests[0];
                let both = first.has("transfer-encoding") && first.has("content-length");
                assert!(!both, "{name}: {first:?}");
                assert_eq!(first.body.bytes, b"", "{name}");
            }
            status => panic!("{name}: {status}"),
        }
    }
}

/// The same on a connection that has carried bodies before: the relay's sight of the head must not
/// depend on what came earlier.
#[test]
fn length_beside_transfer_encoding_is_seen_on_a_used_connection() {
    let stage = Stage::ok();
    let mut client = stage.connect();
    let large = "x".repeat(300_000);
    client.send(format!(
        "POST /large HTTP/1.1\r\nHost: api.localhost\r\nContent-Length: {}\r\n\r\n{large}",
        large.len()
    ));
    assert_eq!(client.answer("POST").head.status, 200);
    client.send(get("/small"));
    assert_eq!(client.answer("GET").head.status, 200);
    stage.service.take_requests();
    let bytes = format!(
        "POST /both HTTP/1.1\r\nHost: api.localhost\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{HIDDEN}"
    );
    let _ = client.try_send(bytes.as_bytes());
    let answer = client.try_answer("POST").unwrap();
    assert!(matches!(answer.head.status, 200 | 400), "{answer:?}");
    assert!(client.rest().is_empty());
    assert_eq!(stage.get("/good").head.status, 200);
    for request in stage.service.take_requests() {
        assert_ne!(request.target, b"/hidden");
        assert!(
            !(request.has("transfer-encoding") && request.has("content-length")),
            "{request:?}"
        );
    }
}

#[test]
fn broken_chunks_never_become_a_whole_request() {
    let stage = Stage::ok();
    for (name, body) in [
        ("size is no number", "zz\r\nabc\r\n0\r\n\r\n"),
        ("size is negative", "-1\r\nabc\r\n0\r\n\r\n"),
        ("size with a prefix", "0x3\r\nabc\r\n0\r\n\r\n"),
        ("size beyond 64 bits", "fffffffffffffffff\r\nabc\r\n0\r\n\r\n"),
        ("size is empty", "\r\nabc\r\n0\r\n\r\n"),
        ("chunk longer than its size", "1\r\nabc\r\n0\r\n\r\n"),
        ("bare LF behind the size", "3\nabc\r\n0\r\n\r\n"),
        ("bare CR in an extension", "3;a\rb\r\nabc\r\n0\r\n\r\n"),
        ("broken trailer", "3\r\nabc\r\n0\r\nx y: 1\r\n\r\n"),
    ] {
        stage.service.take_requests();
        let mut client = stage.connect();
        let head =
            "POST /broken HTTP/1.1\r\nHost: api.localhost\r\nTransfer-Encoding: chunked\r\n\r\n";
        let _ = client.try_send(format!("{head}{body}{HIDDEN}").as_bytes());
        if let Ok(answer) = client.try_answer("POST") {
            assert_eq!(answer.head.status, 400, "{name}: {answer:?}");
        }
        assert!(client.rest().is_empty(), "{name}");
        assert_eq!(stage.get("/good").head.status, 200, "{name}");
        let requests = stage.service.take_requests();
        let targets: Vec<_> =
            requests.iter().map(|request| String::from_utf8_lossy(&request.target)).collect();
        assert_eq!(
            targets,
            ["/good"],
            "{name}: the service reads no whole request but the good one"
        );
    }
}

#[test]
fn plain_connect_is_refused() {
    let stage = Stage::ok();
    nothing_reached(&stage, "the pool's first connection");
    let mut client = stage.connect();
    client.send("CONNECT api.localhost:80 HTTP/1.1\r\nHost: api.localhost:80\r\n\r\n");
    assert!(matches!(client.head().status, 405 | 501));
    nothing_reached(&stage, "CONNECT");
}

#[test]
fn other_versions_are_refused() {
    let stage = Stage::ok();
    nothing_reached(&stage, "the pool's first connection");
    for (name, bytes) in [
        ("HTTP/2.0 in a request line", "GET / HTTP/2.0\r\nHost: api.localhost\r\n\r\n"),
        ("HTTP/0.9", "GET /\r\n\r\n"),
        ("another protocol", "GET / RTSP/1.0\r\nHost: api.localhost\r\n\r\n"),
        ("lower case", "GET / http/1.1\r\nHost: api.localhost\r\n\r\n"),
    ] {
        let mut client = Client::connect(stage.sidelane.web());
        let _ = client.try_send(bytes.as_bytes());
        if let Ok(head) = client.try_head() {
            assert!(matches!(head.status, 400 | 505), "{name}: {head:?}");
        }
        drop(client.rest());
        nothing_reached(&stage, name);
    }
}

#[test]
fn bad_request_says_which() {
    let stage = Stage::ok();
    let answer = stage.ask("GET", "GET / HTTP/1.1\r\nHost: a b\r\n\r\n");
    assert_eq!(answer.head.status, 400);
    assert_eq!(answer.head.first("x-sidelane-error"), Some("bad-request"));
    let text = String::from_utf8(answer.body).unwrap();
    assert!(text.to_lowercase().contains("host"), "{text}");
    assert_eq!(text.trim_end().lines().count(), 1, "{text}");
}

#[test]
fn http2_requests_are_held_to_the_same_rules() {
    let Some(python) = Python::find("http2_requests_are_held_to_the_same_rules") else { return };
    let stage = Stage::ok();
    nothing_reached(&stage, "the pool's first connection");
    for case in [
        "h2-authority-differs",
        "h2-authority-missing",
        "h2-userinfo",
        "h2-connection-field",
        "h2-transfer-encoding",
        "h2-upper-case",
        "h2-value-newline",
        "h2-length-differs",
        "h2-connect",
    ] {
        let seen = python.run(case, stage.sidelane.web());
        // h2 resets a malformed stream with PROTOCOL_ERROR (1) before we could answer.
        let statuses: &[u16] = if case == "h2-connect" { &[405, 501] } else { &[400] };
        let refused = statuses.iter().any(|status| seen["status"] == *status)
            || (seen["status"].is_null() && !seen["reset"].is_null());
        assert!(refused, "{case}: {seen}");
        nothing_reached(&stage, case);
    }
    for case in ["h2-plain", "h2-authority-from-host", "h2-host-same"] {
        stage.service.take_requests();
        let seen = python.run(case, stage.sidelane.web());
        assert_eq!(seen["status"], 200, "{case}: {seen}");
        let request = stage.service.only_request();
        assert_eq!(request.first("host"), Some("api.localhost"), "{case}");
        assert_eq!(request.all("host").count(), 1, "{case}");
    }
}
