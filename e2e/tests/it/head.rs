//! Heads: what a client says of its request and a service of its answer arrives as it was said.

use sidelane_e2e::service::Service;
use sidelane_e2e::stage::Stage;
use sidelane_e2e::tools::{Curl, Python};

#[test]
fn every_method_passes() {
    let stage = Stage::ok();
    for method in [
        "GET",
        "HEAD",
        "POST",
        "PUT",
        "DELETE",
        "PATCH",
        "OPTIONS",
        "TRACE",
        "PROPFIND",
        "M-SEARCH",
        "X!#$%&'*+-.^_`|~9",
    ] {
        let bytes = format!("{method} / HTTP/1.1\r\nHost: api.localhost\r\n\r\n");
        let (request, _) = stage.pass(method, method, bytes);
        assert_eq!(request.method, method);
        assert_eq!(request.version, "HTTP/1.1", "{method}");
    }
}

#[test]
fn targets_are_untouched() {
    let stage = Stage::ok();
    for target in [
        "/",
        "/?",
        "/a%2Fb%2f",
        "/%zz%",
        "/%00%0d%0a",
        "//double//slash/",
        "/a/./b/../c",
        "/a;b=c,d",
        "/?a=b&&c==d&a=b",
        "/?q=%7B%22x%22%3A1%7D+[1]",
        "/?{a:1}|b^c`d'e\\",
        "/{a}|b^c",
        "/:colon@at!$'()*",
        "/?next=http://other.localhost/?x=1",
        "/~user/-_.",
    ] {
        let bytes = format!("GET {target} HTTP/1.1\r\nHost: api.localhost\r\n\r\n");
        let (request, _) = stage.pass(target, "GET", bytes);
        assert_eq!(String::from_utf8_lossy(&request.target), target);
    }
}

#[test]
fn options_asterisk_passes() {
    let stage = Stage::ok();
    let bytes = "OPTIONS * HTTP/1.1\r\nHost: api.localhost\r\n\r\n";
    let (request, _) = stage.pass("asterisk", "OPTIONS", bytes);
    assert_eq!(request.target, b"*");
}

#[test]
fn absolute_target_counts_instead_of_host() {
    let stage = Stage::ok();
    for (target, seen) in [
        ("http://api.localhost/x?y", "/x?y"),
        ("http://api.localhost", "/"),
        ("http://api.localhost/", "/"),
        ("HTTP://api.localhost/a%2f", "/a%2f"),
    ] {
        for host in ["api.localhost", "other.localhost"] {
            let bytes = format!("GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n");
            let (request, _) = stage.pass(target, "GET", bytes);
            assert_eq!(String::from_utf8_lossy(&request.target), seen, "{target}");
            assert_eq!(request.first("host"), Some("api.localhost"), "{target} with Host: {host}");
            assert_eq!(request.all("host").count(), 1, "{target} with Host: {host}");
        }
    }
}

#[test]
fn host_is_kept_as_sent() {
    let stage = Stage::ok();
    for host in ["api.localhost", "API.localhost", "api.localhost:9080", "api.localhost:1"] {
        let bytes = format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n");
        let (request, _) = stage.pass(host, "GET", bytes);
        assert_eq!(request.first("host"), Some(host));
    }
}

#[test]
fn repeated_and_odd_request_values_arrive_in_order() {
    let stage = Stage::ok();
    let bytes = b"GET / HTTP/1.1\r\nHost: api.localhost\r\nX-A: 1\r\nX-B: z\r\nx-a: 2\r\nX-A: 1\r\n\
        X-Empty:\r\nX-Bytes: a\xfe\xffb\r\nX-Tab: a\tb\r\nX-Space:   a  b   \r\nCookie: a=1\r\nCookie: b=2\r\n\r\n";
    let (request, _) = stage.pass("values", "GET", bytes);
    assert_eq!(request.all("x-a").collect::<Vec<_>>(), [b"1", b"2", b"1"]);
    assert_eq!(request.all("x-b").collect::<Vec<_>>(), [b"z"]);
    assert_eq!(request.all("x-empty").collect::<Vec<_>>(), [b""]);
    assert_eq!(request.all("x-bytes").collect::<Vec<_>>(), [b"a\xfe\xffb"]);
    assert_eq!(request.all("x-tab").collect::<Vec<_>>(), [b"a\tb"]);
    assert_eq!(request.all("x-space").collect::<Vec<_>>(), [b"a  b"]);
    assert_eq!(request.all("cookie").collect::<Vec<_>>(), [b"a=1", b"b=2"]);
}

#[test]
fn repeated_and_odd_response_values_arrive_in_order() {
    let stage = Stage::of(Service::answering(
        b"HTTP/1.1 200 OK\r\nSet-Cookie: a=1; Path=/\r\nX-B: z\r\nset-cookie: b=2\r\nSet-Cookie: a=1; Path=/\r\n\
          X-Bytes: a\xfe\xffb\r\nX-Empty:\r\nServer: mine/1\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\n\
          Content-Length: 0\r\n\r\n"
            .to_vec(),
    ));
    let head = stage.get("/").head;
    let cookies: Vec<_> = head.all("set-cookie").collect();
    assert_eq!(cookies, [b"a=1; Path=/".as_slice(), b"b=2", b"a=1; Path=/"]);
    assert_eq!(head.all("x-bytes").collect::<Vec<_>>(), [b"a\xfe\xffb"]);
    assert_eq!(head.all("x-empty").collect::<Vec<_>>(), [b""]);
    assert_eq!(head.all("server").collect::<Vec<_>>(), [b"mine/1"]);
    assert_eq!(head.all("date").collect::<Vec<_>>(), [b"Thu, 01 Jan 1970 00:00:00 GMT"]);
}

#[test]
fn every_final_status_passes() {
    let stage = Stage::script(|connection| {
        while let Some(request) = connection.exchange()? {
            let status = String::from_utf8_lossy(&request.target[1..]).into_owned();
            let length = if status == "204" { "" } else { "content-length: 0\r\n" };
            connection.write(format!("HTTP/1.1 {status} Any Reason\r\n{length}\r\n"))?;
        }
        Ok(())
    });
    let mut client = stage.connect();
    for status in [
        200, 201, 202, 203, 204, 205, 206, 207, 226, 300, 301, 302, 303, 304, 307, 308, 400, 401,
        402, 403, 404, 405, 407, 409, 410, 412, 416, 418, 421, 425, 429, 451, 499, 500, 501, 502,
        503, 504, 511, 599, 799, 999,
    ] {
        client.send(format!("GET /{status} HTTP/1.1\r\nHost: api.localhost\r\n\r\n"));
        let answer = client.answer("GET");
        assert_eq!(answer.head.status, status);
        assert_eq!(answer.head.first("x-sidelane-error"), None, "{status} is the service's own");
    }
}

#[test]
fn request_heads_up_to_the_limits_pass() {
    let stage = Stage::ok();
    // 128 fields, Host among them.
    let fields: String = (0..127).map(|number| format!("x-{number}: {number}\r\n")).collect();
    let bytes = format!("GET / HTTP/1.1\r\nHost: api.localhost\r\n{fields}\r\n");
    let (request, _) = stage.pass("128 fields", "GET", bytes);
    for number in 0..127 {
        assert_eq!(request.first(&format!("x-{number}")), Some(number.to_string().as_str()));
    }
    let long = "v".repeat(60 * 1024);
    let bytes = format!("GET / HTTP/1.1\r\nHost: api.localhost\r\nx-long: {long}\r\n\r\n");
    let (request, _) = stage.pass("60 KiB", "GET", bytes);
    assert_eq!(request.first("x-long").map(str::len), Some(long.len()));
    let target = format!("/{}", "p".repeat(60 * 1024));
    let bytes = format!("GET {target} HTTP/1.1\r\nHost: api.localhost\r\n\r\n");
    let (request, _) = stage.pass("60 KiB of target", "GET", bytes);
    assert_eq!(request.target.len(), target.len());
}

#[test]
fn request_heads_over_the_limits_are_431() {
    let stage = Stage::ok();
    let fields: String = (0..200).map(|number| format!("x-{number}: {number}\r\n")).collect();
    let long = "v".repeat(80 * 1024);
    for (name, fields) in [("200 fields", fields), ("80 KiB", format!("x-long: {long}\r\n"))] {
        let mut client = stage.connect();
        // The relay may close before it has read all of it.
        let _ = client
            .try_send(format!("GET / HTTP/1.1\r\nHost: api.localhost\r\n{fields}\r\n").as_bytes());
        assert_eq!(client.answer("GET").head.status, 431, "{name}");
        drop(client.rest());
    }
    assert!(stage.service.received().is_empty());
}

#[test]
fn response_heads_up_to_the_limits_pass() {
    let stage = Stage::script(|connection| {
        while let Some(request) = connection.exchange()? {
            let fields = match request.target.as_slice() {
                b"/many" => (0..127).map(|number| format!("x-{number}: {number}\r\n")).collect(),
                b"/long" => format!("x-long: {}\r\n", "v".repeat(60 * 1024)),
                b"/too-many" => {
                    (0..300).map(|number| format!("x-{number}: {number}\r\n")).collect()
                }
                _ => format!("x-long: {}\r\n", "v".repeat(200 * 1024)),
            };
            connection.write(format!("HTTP/1.1 200 OK\r\n{fields}content-length: 0\r\n\r\n"))?;
        }
        Ok(())
    });
    let many = stage.get("/many").head;
    assert_eq!(many.status, 200);
    assert_eq!(many.first("x-126"), Some("126"));
    let long = stage.get("/long").head;
    assert_eq!(long.status, 200);
    assert_eq!(long.first("x-long").map(str::len), Some(60 * 1024));
    for path in ["/too-many", "/too-long"] {
        let head = stage.get(path).head;
        assert_eq!(head.status, 502, "{path}");
        assert_eq!(head.first("x-sidelane-error"), Some("service-invalid"), "{path}");
    }
}

#[test]
fn ranges_pass() {
    let body: Vec<u8> = (0..=255).collect();
    let stage = Stage::script(move |connection| {
        while let Some(request) = connection.exchange()? {
            let range = request.first("range").unwrap_or_default().to_owned();
            let bounds = range.strip_prefix("bytes=").and_then(|text| text.split_once('-'));
            let (Some((first, last)), Some("\"v1\"")) = (bounds, request.first("if-range")) else {
                connection.write(
                    "HTTP/1.1 416 Nope\r\ncontent-range: bytes */256\r\ncontent-length: 0\r\n\r\n",
                )?;
                continue;
            };
            let (first, last): (usize, usize) =
                (first.parse().unwrap_or(0), last.parse().unwrap_or(0));
            let part = &body[first..=last];
            connection.write(format!(
                "HTTP/1.1 206 Partial Content\r\ncontent-range: bytes {first}-{last}/256\r\netag: \"v1\"\r\ncontent-length: {}\r\n\r\n",
                part.len()
            ))?;
            connection.write(part)?;
        }
        Ok(())
    });
    let answer = stage.ask(
        "GET",
        "GET / HTTP/1.1\r\nHost: api.localhost\r\nRange: bytes=16-31\r\nIf-Range: \"v1\"\r\n\r\n",
    );
    assert_eq!(answer.head.status, 206);
    assert_eq!(answer.head.first("content-range"), Some("bytes 16-31/256"));
    assert_eq!(answer.head.first("etag"), Some("\"v1\""));
    assert_eq!(answer.body, (16..=31).collect::<Vec<u8>>());
    let answer = stage.get("/");
    assert_eq!(answer.head.status, 416);
    assert_eq!(answer.head.first("content-range"), Some("bytes */256"));
}

#[test]
fn curl_reaches_the_service_by_both_versions() {
    let Some(curl) = Curl::find("curl_reaches_the_service_by_both_versions") else { return };
    let stage = Stage::ok();
    for (flag, shown) in
        [("--http1.0", "1.1 200"), ("--http1.1", "1.1 200"), ("--http2-prior-knowledge", "2 200")]
    {
        stage.service.take_requests();
        let output = curl.run(
            stage.sidelane.web(),
            [flag, "--write-out", " %{http_version} %{http_code}", "http://api.localhost/a%2Fb?c"],
        );
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{flag}: {}", String::from_utf8_lossy(&output.stderr));
        let request = stage.service.only_request();
        assert_eq!(request.target, b"/a%2Fb?c", "{flag}");
        assert_eq!(request.version, "HTTP/1.1", "{flag}");
        assert_eq!(request.first("host"), Some("api.localhost"), "{flag}");
        // A relay answers an HTTP/1.0 request as 1.1 or as 1.0 (RFC 9110 §2.5 allows both).
        let version_1_0 = flag == "--http1.0" && text == "ok 1.0 200".replace("1.0", "1");
        assert!(text.ends_with(shown) || text == "ok 1 200" || version_1_0, "{flag}: {text}");
        assert!(text.starts_with("ok "), "{flag}: {text}");
    }
}

#[test]
fn curl_uploads_and_downloads_by_both_versions() {
    let Some(curl) = Curl::find("curl_uploads_and_downloads_by_both_versions") else { return };
    let stage = Stage::script(|connection| {
        while let Some(request) = connection.exchange()? {
            let body = request.body.bytes;
            connection
                .write(format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len()))?;
            connection.write(body)?;
        }
        Ok(())
    });
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("body");
    let body: Vec<u8> = (0..3_000_000_u32).map(|number| (number % 251) as u8).collect();
    std::fs::write(&file, &body).unwrap();
    for flags in [
        ["--http1.1", "--expect100-timeout=60"].as_slice(),
        &["--http1.1", "--header", "Transfer-Encoding: chunked"],
        &["--http2-prior-knowledge"],
    ] {
        let flags: Vec<String> = flags
            .iter()
            .flat_map(|flag| flag.split('=').map(str::to_owned).collect::<Vec<_>>())
            .collect();
        let mut command = curl.command(stage.sidelane.web());
        command.args(&flags).arg("--header").arg("Expect:").arg("--upload-file").arg(&file);
        let output = command.arg("http://api.localhost/").output().unwrap();
        assert!(output.status.success(), "{flags:?}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(output.stdout == body, "{flags:?}: {} bytes came back", output.stdout.len());
    }
}

#[test]
fn python_http2_head_arrives_as_http1() {
    let Some(python) = Python::find("python_http2_head_arrives_as_http1") else { return };
    let stage = Stage::ok();
    let seen = python.run("h2-get", stage.sidelane.web());
    assert_eq!(seen["status"], 200, "{seen}");
    assert_eq!(seen["body"], "ok");
    let request = stage.service.only_request();
    assert_eq!(request.version, "HTTP/1.1");
    assert_eq!(String::from_utf8_lossy(&request.target), "/a%2Fb//c;d?x=%zz&&y=[]");
    assert_eq!(request.first("host"), Some("api.localhost"));
    assert_eq!(request.all("host").count(), 1);
    assert_eq!(request.all("x-repeated").collect::<Vec<_>>(), [b"1", b"2"]);
    // RFC 9113 §8.2.3: crumbs become one field again.
    assert_eq!(request.all("cookie").collect::<Vec<_>>(), [b"a=1; b=2"]);
    assert_eq!(request.all("x-bytes").collect::<Vec<_>>(), [b"\xfe\xff"]);
    assert!(!request.has("transfer-encoding"), "{request:?}");
}

#[test]
fn python_http1_keeps_its_connection() {
    let Some(python) = Python::find("python_http1_keeps_its_connection") else { return };
    let stage = Stage::script(|connection| {
        while let Some(request) = connection.exchange()? {
            let body = request.body.bytes;
            connection
                .write(format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len()))?;
            connection.write(body)?;
        }
        Ok(())
    });
    let seen = python.run("http1-keep-alive", stage.sidelane.web());
    assert_eq!(seen["connections"], 1, "{seen}");
    for (number, answer) in seen["answers"].as_array().unwrap().iter().enumerate() {
        let body = ["", "fixed", "chunked"][number % 3];
        assert_eq!(answer[0], 200, "{number}");
        assert_eq!(answer[1], body, "{number}");
    }
    assert_eq!(seen["answers"].as_array().unwrap().len(), 10);
}
