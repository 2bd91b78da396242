//! Bodies: their lengths, chunks and trailers, and the answers that have none.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use sidelane_e2e::service::Service;
use sidelane_e2e::stage::Stage;
use sidelane_e2e::tools::{Curl, Python};

#[test]
fn fixed_length_stays_fixed_length() {
    let stage = Stage::of(Service::answering("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"));
    let bytes = "POST / HTTP/1.1\r\nHost: api.localhost\r\nContent-Length: 3\r\n\r\nabc";
    let (request, answer) = stage.pass("fixed", "POST", bytes);
    assert_eq!(request.first("content-length"), Some("3"));
    assert!(!request.has("transfer-encoding"));
    assert_eq!(request.body.bytes, b"abc");
    assert_eq!(answer.head.first("content-length"), Some("5"));
    assert_eq!(answer.head.first("transfer-encoding"), None);
    assert_eq!(answer.body, b"hello");
}

#[test]
fn chunked_stays_without_a_length() {
    let stage = Stage::of(Service::answering(
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2;x=y\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
    ));
    let bytes = "POST / HTTP/1.1\r\nHost: api.localhost\r\nTransfer-Encoding: chunked\r\n\r\n\
        1;ext=\"1\"\r\na\r\n002\r\nbc\r\n0\r\n\r\n";
    let (request, answer) = stage.pass("chunked", "POST", bytes);
    assert_eq!(request.body.bytes, b"abc");
    assert_eq!(answer.head.list("transfer-encoding"), "chunked");
    assert_eq!(answer.head.first("content-length"), None);
    assert_eq!(answer.body, b"hello");
}

#[test]
fn empty_bodies_stay_empty() {
    let stage = Stage::ok();
    let (request, _) = stage.pass("none", "GET", "GET / HTTP/1.1\r\nHost: api.localhost\r\n\r\n");
    assert!(!request.has("transfer-encoding") && !request.has("content-length"), "{request:?}");
    let (request, _) = stage.pass(
        "zero",
        "POST",
        "POST / HTTP/1.1\r\nHost: api.localhost\r\nContent-Length: 0\r\n\r\n",
    );
    assert_eq!(request.first("content-length"), Some("0"));
    let (request, _) = stage.pass(
        "no chunk",
        "POST",
        "POST / HTTP/1.1\r\nHost: api.localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    );
    assert_eq!(request.body.bytes, b"");
}

#[test]
fn body_of_a_get_passes() {
    let stage = Stage::ok();
    let bytes = "GET / HTTP/1.1\r\nHost: api.localhost\r\nContent-Length: 3\r\n\r\nabc";
    let (request, _) = stage.pass("GET with a body", "GET", bytes);
    assert_eq!(request.body.bytes, b"abc");
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let stage = Stage::script(|connection| {
        while let Some(request) = connection.exchange()? {
            connection.write(format!(
                "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n",
                request.target.len()
            ))?;
            connection.write(request.target)?;
        }
        Ok(())
    });
    let mut client = stage.connect();
    client.send(
        "POST /1 HTTP/1.1\r\nHost: api.localhost\r\nContent-Length: 3\r\n\r\nabc\
         GET /22 HTTP/1.1\r\nHost: api.localhost\r\n\r\n\
         POST /333 HTTP/1.1\r\nHost: api.localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n\
         GET /4444 HTTP/1.1\r\nHost: api.localhost\r\n\r\n",
    );
    for target in ["/1", "/22", "/333", "/4444"] {
        assert_eq!(client.answer("GET").body, target.as_bytes());
    }
}

#[test]
fn answers_without_a_body_keep_their_length_field() {
    for (name, method, answer, length) in [
        ("HEAD", "HEAD", "HTTP/1.1 200 OK\r\ncontent-length: 1234\r\n\r\n", Some("1234")),
        ("HEAD of chunked", "HEAD", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", None),
        ("204", "GET", "HTTP/1.1 204 No Content\r\n\r\n", None),
        (
            "304",
            "GET",
            "HTTP/1.1 304 Not Modified\r\netag: \"a\"\r\ncontent-length: 1234\r\n\r\n",
            Some("1234"),
        ),
        ("304 without", "GET", "HTTP/1.1 304 Not Modified\r\netag: \"a\"\r\n\r\n", None),
    ] {
        let stage = Stage::of(Service::answering(answer));
        let mut client = stage.connect();
        // Twice on one connection: a byte of a body would be taken for the next head.
        for _ in 0..2 {
            client.send(format!("{method} / HTTP/1.1\r\nHost: api.localhost\r\n\r\n"));
            let answer = client.answer(method);
            assert_eq!(answer.head.first("content-length"), length, "{name}");
            assert_eq!(answer.head.list("transfer-encoding"), "", "{name}");
        }
    }
}

#[test]
fn body_until_close_ends_cleanly() {
    let stage = Stage::script(|connection| {
        connection.exchange()?;
        connection.write("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nuntil the end")
    });
    let answer = stage.get("/");
    assert_eq!(answer.body, b"until the end");
    // The whole body may be there with the head: then its length is known.
    let framed = answer.head.list("transfer-encoding") == "chunked"
        || answer.head.first("content-length") == Some("13");
    assert!(framed, "{answer:?}");
}

#[test]
fn http_1_0_clients_are_served() {
    let stage = Stage::script(|connection| {
        while let Some(request) = connection.exchange()? {
            connection.write(match request.target.as_slice() {
                b"/chunked" => {
                    "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"
                }
                _ => "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
            })?;
        }
        Ok(())
    });
    for path in ["/fixed", "/chunked"] {
        let mut client = stage.connect();
        client.send(format!("GET {path} HTTP/1.0\r\nHost: api.localhost\r\n\r\n"));
        let answer = client.answer("GET");
        assert_eq!(answer.head.status, 200, "{path}");
        assert_eq!(answer.head.list("transfer-encoding"), "", "{path}: HTTP/1.0 knows no chunks");
        assert_eq!(answer.body, b"hello", "{path}");
        assert!(client.rest().is_empty(), "{path}: the connection ends with the answer");
    }
    for request in stage.service.requests() {
        assert_eq!(request.version, "HTTP/1.1");
    }
    let mut client = stage.connect();
    for _ in 0..2 {
        client.send("GET /fixed HTTP/1.0\r\nHost: api.localhost\r\nConnection: keep-alive\r\n\r\n");
        assert_eq!(
            client.answer("GET").body,
            b"hello",
            "an HTTP/1.0 connection is kept where asked for"
        );
    }
    let bytes = "POST /fixed HTTP/1.0\r\nHost: api.localhost\r\nContent-Length: 3\r\n\r\nabc";
    let (request, _) = stage.pass("a body by HTTP/1.0", "POST", bytes);
    assert_eq!(request.body.bytes, b"abc");
}

#[test]
fn request_trailers_pass() {
    let stage = Stage::ok();
    let bytes = b"POST / HTTP/1.1\r\nHost: api.localhost\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum, x-odd\r\n\r\n\
        3\r\nabc\r\n0\r\nX-Sum: 3\r\nx-odd: \xfe\r\n\r\n";
    let (request, _) = stage.pass("trailers", "POST", bytes);
    assert_eq!(request.body.bytes, b"abc");
    let mut trailers: Vec<_> = request
        .body
        .trailers
        .iter()
        .map(|(name, value)| (name.to_ascii_lowercase(), value.clone()))
        .collect();
    trailers.sort();
    assert_eq!(
        trailers,
        [(b"x-odd".to_vec(), b"\xfe".to_vec()), (b"x-sum".to_vec(), b"3".to_vec())]
    );
}

#[test]
fn response_trailers_pass() {
    let stage = Stage::of(Service::answering(
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n3\r\nabc\r\n0\r\nx-sum: 3\r\n\r\n",
    ));
    let bytes = "GET / HTTP/1.1\r\nHost: api.localhost\r\nTE: trailers\r\nConnection: TE\r\n\r\n";
    let answer = stage.ask("GET", bytes);
    assert_eq!(answer.body, b"abc");
    assert_eq!(answer.trailers, [(b"x-sum".to_vec(), b"3".to_vec())]);
}

#[test]
fn http2_trailers_pass_both_ways() {
    let Some(python) = Python::find("http2_trailers_pass_both_ways") else { return };
    let stage = Stage::of(Service::answering(
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nx-end: yes\r\n\r\n",
    ));
    let seen = python.run("h2-trailers", stage.sidelane.web());
    assert_eq!(seen["status"], 200, "{seen}");
    assert_eq!(seen["body"], "abc");
    assert_eq!(seen["trailers"], serde_json::json!([["x-end", "yes"]]));
    let request = stage.service.only_request();
    assert_eq!(request.body.bytes, b"hello");
    assert_eq!(request.body.trailers, [(b"x-sum".to_vec(), b"5".to_vec())]);
}

/// A service that says `100 Continue` for `/accept` and refuses everything else by 417.
fn expecting(told: Arc<AtomicBool>) -> Stage {
    Stage::script(move |connection| {
        while let Some(request) = connection.request()? {
            assert_eq!(request.first("expect"), Some("100-continue"), "{request:?}");
            if request.target == b"/accept" {
                told.store(true, Ordering::SeqCst);
                connection.write("HTTP/1.1 100 Continue\r\n\r\n")?;
                let body = connection.body(&request)?;
                connection.write(format!(
                    "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n",
                    body.bytes.len()
                ))?;
                connection.write(body.bytes)?;
            } else {
                connection
                    .write("HTTP/1.1 417 No\r\nconnection: close\r\ncontent-length: 2\r\n\r\nno")?;
                // Whatever still comes would be the body that was not asked for.
                return connection.closed();
            }
        }
        Ok(())
    })
}

#[test]
fn client_is_told_to_continue_by_the_service_alone() {
    let told = Arc::new(AtomicBool::new(false));
    let stage = expecting(Arc::clone(&told));
    let mut client = stage.connect();
    client.send("PUT /accept HTTP/1.1\r\nHost: api.localhost\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n");
    let interim = client.head();
    assert_eq!(interim.status, 100);
    assert!(told.load(Ordering::SeqCst), "100 came before the service said so");
    client.send("body");
    let answer = client.answer("PUT");
    assert_eq!((answer.head.status, answer.body.as_slice()), (200, b"body".as_slice()));
}

#[test]
fn refusal_to_continue_passes_and_no_body_does() {
    let stage = expecting(Arc::default());
    let mut client = stage.connect();
    client.send("PUT /no HTTP/1.1\r\nHost: api.localhost\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n");
    let head = client.head();
    assert_eq!(head.status, 417, "the first answer is the refusal");
    assert_eq!(client.try_body("PUT", head).unwrap().body, b"no");
    let received = stage.service.received();
    assert!(received.ends_with(b"\r\n\r\n"), "{}", String::from_utf8_lossy(&received));
}

#[test]
fn http2_client_is_told_to_continue() {
    let Some(python) = Python::find("http2_client_is_told_to_continue") else { return };
    let stage = Stage::script(|connection| {
        while let Some(request) = connection.request()? {
            connection.write("HTTP/1.1 100 Continue\r\n\r\n")?;
            let body = connection.body(&request)?;
            connection.write("HTTP/1.1 103 Early Hints\r\nlink: </a.css>; rel=preload\r\n\r\n")?;
            connection.write(format!(
                "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n",
                body.bytes.len()
            ))?;
            connection.write(body.bytes)?;
        }
        Ok(())
    });
    let seen = python.run("h2-continue", stage.sidelane.web());
    assert_eq!(seen["informational"], serde_json::json!([100, 103]), "{seen}");
    assert_eq!(seen["status"], 200);
    assert_eq!(seen["body"], "body");
}

/// Real curl uploads with `Expect: 100-continue`: which interim responses it sees, how it ends, and
/// what the service got of the body.
#[test]
fn curl_sees_of_expect_what_the_service_says() {
    let Some(curl) = Curl::find("curl_sees_of_expect_what_the_service_says") else { return };
    let stage = Stage::script(|connection| {
        while let Some(request) = connection.request()? {
            assert_eq!(request.first("expect"), Some("100-continue"), "{request:?}");
            match &request.target[..] {
                b"/refuses" => {
                    connection.write(
                        "HTTP/1.1 417 No\r\nconnection: close\r\ncontent-length: 2\r\n\r\nno",
                    )?;
                    return connection.closed();
                }
                b"/continues" => connection.write("HTTP/1.1 100 Continue\r\n\r\n")?,
                b"/answers-first" => {
                    connection.write("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n")?;
                    let body = connection.body(&request)?;
                    connection.write(body.bytes)?;
                    continue;
                }
                _ => {}
            }
            let body = connection.body(&request)?;
            connection.write("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n")?;
            connection.write(body.bytes)?;
        }
        Ok(())
    });
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("body");
    std::fs::write(&file, "some body").unwrap();
    for (path, patience, statuses, body) in [
        // Only the service's own word ends a wait this long.
        ("/continues", "50", [100, 200].as_slice(), "some body"),
        ("/refuses", "50", &[417], "no"),
        ("/ignores", "0.2", &[200], "some body"),
        ("/answers-first", "0.2", &[200], "some body"),
    ] {
        let mut command = curl.command(stage.sidelane.web());
        command.args(["--http1.1", "--verbose", "--header", "Expect: 100-continue"]);
        command.args(["--expect100-timeout", patience, "--upload-file"]).arg(&file);
        let output = command.arg(format!("http://api.localhost{path}")).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{path}: {told}");
        let seen: Vec<u16> = told
            .lines()
            .filter_map(|line| line.strip_prefix("< HTTP/1.1 ")?.get(..3)?.parse().ok())
            .collect();
        assert_eq!(seen, statuses, "{path}: {told}");
        assert_eq!(String::from_utf8_lossy(&output.stdout), body, "{path}: {told}");
    }
    assert!(stage.service.received().windows(9).filter(|bytes| bytes == b"some body").count() == 3);
}

#[test]
fn early_hints_reach_an_http1_client() {
    let hints = "HTTP/1.1 103 Early Hints\r\nlink: </a.css>; rel=preload\r\n\r\n";
    let answer = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
    let stage = Stage::of(Service::answering(format!("{hints}{hints}{answer}")));
    let mut client = stage.connect();
    client.send("GET / HTTP/1.1\r\nHost: api.localhost\r\n\r\n");
    for _ in 0..2 {
        let interim = client.head();
        assert_eq!(interim.status, 103);
        assert_eq!(interim.first("link"), Some("</a.css>; rel=preload"));
    }
    let answer = client.answer("GET");
    assert_eq!((answer.head.status, answer.body.as_slice()), (200, b"ok".as_slice()));
    // HTTP/1.0 has none.
    let answer = stage.ask("GET", "GET / HTTP/1.0\r\nHost: api.localhost\r\n\r\n");
    assert_eq!((answer.head.status, answer.body.as_slice()), (200, b"ok".as_slice()));
}
