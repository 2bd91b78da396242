//! Routes' policies as clients and services meet them.

use std::sync::{Mutex, mpsc};
use std::time::Duration;

use serde_json::Value;
use sidelane_e2e::client::{Answer, Client, request};
use sidelane_e2e::process::{Setup, Sidelane};
use sidelane_e2e::service::{Connection, Service};
use sidelane_e2e::stage::get;
use sidelane_e2e::tools::Curl;
use sidelane_e2e::wait;
use sidelane_e2e::websocket::{Socket, refusal};

use crate::grpc::Peers;
use crate::plugins::{self, Line, says_back};

/// `password`.
const HASH: &str = "$2a$04$UuTkLRZZ6QofpDOlMz32MuuxEHA43WOemOYHPz6.SjsVsyO1tDU96";
/// `alice:password`.
const ALICE: &str = "Basic YWxpY2U6cGFzc3dvcmQ=";
/// `alice:passwort`.
const MALLORY: &str = "Basic YWxpY2U6cGFzc3dvcnQ=";

/// Gives the route of a file policies.
fn with(yaml: &str, policies: &str) -> String {
    let route = "subdomain: api, tunnel: api }";
    assert!(yaml.contains(route), "{yaml}");
    yaml.replace(route, &format!("subdomain: api, tunnel: api, {policies} }}"))
}

fn start(setup: &Setup, policies: &str) -> Sidelane {
    Sidelane::start("sidelane", &with(&setup.both(), policies))
}

fn ask(sidelane: &Sidelane, lines: &str) -> Answer {
    let bytes = format!("GET / HTTP/1.1\r\nHost: api.localhost\r\n{lines}\r\n");
    request(sidelane.web(), "GET", bytes)
}

fn basic_auth() -> String {
    format!("basic_auth: {{ realm: Shop, users: {{ alice: \"{HASH}\" }} }}")
}

/// Checks an answer of ours, and that its metric says why.
#[track_caller]
fn refused(sidelane: &Sidelane, answer: &Answer, status: u16, error: &str, policy: &str) {
    assert_eq!(answer.head.status, status, "{answer:?}");
    assert_eq!(answer.head.first("x-sidelane-error"), Some(error), "{answer:?}");
    let labels = ["route=\"api\"", &format!("policy=\"{policy}\"")];
    sidelane.until_metric("sidelane_policy_refused_total", &labels, |count| count >= 1.0);
}

#[test]
fn addresses_decide_who_comes_in() {
    let service = Service::ok();
    let setup = Setup::of(service.address());
    for (policies, comes) in [
        ("addresses: { allow: [127.0.0.0/8] }", true),
        ("addresses: { deny: [10.0.0.0/8] }", true),
        ("addresses: { allow: [10.0.0.0/8] }", false),
        ("addresses: { allow: [127.0.0.0/8], deny: [127.0.0.1] }", false),
    ] {
        let sidelane = start(&setup, policies);
        let answer = ask(&sidelane, "");
        if comes {
            assert_eq!(answer.head.status, 200, "{policies}");
        } else {
            refused(&sidelane, &answer, 403, "forbidden", "addresses");
        }
    }
}

#[test]
fn rate_is_limited_and_outlives_other_edits() {
    let service = Service::ok();
    let setup = Setup::of(service.address());
    let edited = |policies: &str, header: &str| {
        let set = format!("{policies}, response_headers: {{ set: {{ x-edit: {header} }} }}");
        with(&setup.both(), &set)
    };
    let until = |sidelane: &Sidelane, header: &str| {
        wait::until("the edit", || {
            (ask(sidelane, "").head.first("x-edit") == Some(header)).then_some(())
        });
    };
    for (key, policy) in [("rate", "rate"), ("rate_per_client", "rate_per_client")] {
        let policies = format!("limits: {{ {key}: {{ count: 1, per: 1h, burst: 2 }} }}");
        let sidelane = Sidelane::start("sidelane", &edited(&policies, "first"));
        for _ in 0..2 {
            assert_eq!(ask(&sidelane, "").head.status, 200, "{key}: within the burst");
        }
        let answer = ask(&sidelane, "");
        refused(&sidelane, &answer, 429, "rate-limited", policy);
        let wait: u32 = answer.head.first("retry-after").unwrap().parse().unwrap();
        assert!((3000..=3600).contains(&wait), "{key}: {wait}");
        assert_eq!(answer.head.first("x-edit"), Some("first"), "refusals have the route's fields");
        // The bucket stays as empty as it is.
        sidelane.rewrite(&edited(&policies, "second"));
        until(&sidelane, "second");
        assert_eq!(ask(&sidelane, "").head.status, 429, "{key} after another policy's edit");
        // Another limit is another bucket.
        sidelane.rewrite(&edited(&policies.replace("burst: 2", "burst: 3"), "third"));
        until(&sidelane, "third");
        wait::until("a fresh bucket", || (ask(&sidelane, "").head.status == 429).then_some(()));
        assert!(service.take_requests().len() >= 4, "{key}: the edit gave more");
    }
}

/// A service that answers `/held` when it is told to, and everything else at once.
fn holding() -> (Service, mpsc::Sender<()>) {
    let (go, until) = mpsc::channel();
    let until = Mutex::new(until);
    let service = Service::start(move |connection| {
        while let Some(request) = connection.request()? {
            if request.target.starts_with(b"/held") {
                let until = until.lock().expect("no panic");
                until.recv_timeout(wait::DEADLINE).map_err(std::io::Error::other)?;
            }
            connection.write("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
        }
        Ok(())
    });
    (service, go)
}

#[test]
fn concurrent_exchanges_are_limited() {
    let (service, go) = holding();
    let sidelane = start(&Setup::of(service.address()), "limits: { concurrent: 1 }");
    let running = |count: f64| {
        sidelane.until_metric(
            "sidelane_route_exchanges_in_flight",
            &["route=\"api\""],
            |running| (running - count).abs() < 0.5,
        );
    };
    let mut held = Client::connect(sidelane.web());
    held.send(get("/held"));
    service.until("the held request", |records| {
        records.iter().any(|record| !record.received.is_empty())
    });
    running(1.0);
    let answer = ask(&sidelane, "");
    refused(&sidelane, &answer, 503, "overloaded", "concurrent");
    go.send(()).unwrap();
    assert_eq!(held.answer("GET").head.status, 200);
    running(0.0);
    assert_eq!(ask(&sidelane, "").head.status, 200);
}

#[test]
fn basic_auth_lets_those_in_who_know_the_password() {
    let Some(curl) = Curl::find("basic_auth_lets_those_in_who_know_the_password") else { return };
    let service = Service::ok();
    let setup = Setup::of(service.address()).websocket("{}");
    let sidelane = start(&setup, &basic_auth());
    for lines in ["", &format!("Authorization: {MALLORY}\r\n"), "Authorization: Bearer x\r\n"] {
        let answer = ask(&sidelane, lines);
        refused(&sidelane, &answer, 401, "unauthorized", "basic_auth");
        assert_eq!(
            answer.head.first("www-authenticate"),
            Some("Basic realm=\"Shop\", charset=\"UTF-8\"")
        );
    }
    let handshake = refusal(sidelane.web(), "api.localhost", "/");
    refused(&sidelane, &handshake, 401, "unauthorized", "basic_auth");
    assert!(handshake.head.first("www-authenticate").is_some());
    assert!(service.take_requests().is_empty(), "nothing reaches the service");

    // By the first bcrypt is asked, by the others what is remembered.
    for version in ["--http2-prior-knowledge", "--http2-prior-knowledge", "--http1.1"] {
        let arguments = [version, "-u", "alice:password", "http://api.localhost/"];
        let output = curl.run(sidelane.web(), arguments);
        assert_eq!(output.stdout, b"ok", "{version}: {output:?}");
    }
    let requests = service.take_requests();
    assert_eq!(requests.len(), 3);
    assert!(requests.iter().all(|request| !request.has("authorization")), "{requests:?}");
    assert!(!sidelane.log().contains("password"), "no credentials in the log");
    assert!(!sidelane.log().contains(ALICE), "no credentials in the log");
}

#[test]
fn websocket_opens_with_the_password() {
    let service = Service::start(|connection| {
        connection.accept("")?;
        connection.echo()
    });
    let setup = Setup::of(service.address()).websocket("{}");
    let sidelane = start(&setup, &basic_auth());
    let lines = format!("Authorization: {ALICE}\r\n");
    Socket::open_with(sidelane.web(), "/", &lines).says_back("hello");
    assert!(!service.only_request().has("authorization"));
}

#[test]
fn redirect_leads_where_the_route_says() {
    let Some(curl) = Curl::find("redirect_leads_where_the_route_says") else { return };
    let service = Service::ok();
    let setup = Setup::of(service.address());
    for (redirect, path, status, location) in [
        ("scheme: https", "/a?b=c", "307", "https://api.localhost/a?b=c"),
        ("status: 308, host: new.example.org", "/a", "308", "//new.example.org/a"),
        ("status: 301, scheme: https, host: n.example", "/", "301", "https://n.example/"),
    ] {
        let yaml = setup.both();
        let redirected = yaml.replace(
            "subdomain: api, tunnel: api }",
            &format!("subdomain: api, redirect: {{ {redirect} }} }}"),
        );
        let sidelane = Sidelane::start("sidelane", &redirected);
        let url = format!("http://api.localhost{path}");
        let output = curl.run(sidelane.web(), ["-i", &url]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.starts_with(&format!("HTTP/1.1 {status} ")), "{redirect}: {text}");
        assert!(text.contains(&format!("location: {location}\r\n")), "{redirect}: {text}");
        sidelane.until_metric("sidelane_redirects_total", &["route=\"api\""], |count| count == 1.0);
    }
    assert!(service.take_requests().is_empty());
}

#[test]
fn body_above_its_limit_is_413() {
    let service = Service::ok();
    let sidelane = start(&Setup::of(service.address()), "limits: { body: 10B }");
    let post = |head: &str, body: &str| {
        let bytes = format!("POST / HTTP/1.1\r\nHost: api.localhost\r\n{head}\r\n\r\n{body}");
        request(sidelane.web(), "POST", bytes)
    };
    let fits = post("Content-Length: 10", "0123456789");
    assert_eq!(fits.head.status, 200, "{fits:?}");
    let fits = post("Transfer-Encoding: chunked", "5\r\n01234\r\n5\r\n56789\r\n0\r\n\r\n");
    assert_eq!(fits.head.status, 200, "{fits:?}");
    assert_eq!(service.take_requests().len(), 2);
    let said = post("Content-Length: 11", "0123456789a");
    refused(&sidelane, &said, 413, "too-large", "body");
    assert!(service.take_requests().is_empty(), "nothing reaches the service");
    let found = post("Transfer-Encoding: chunked", "5\r\n01234\r\n6\r\n56789a\r\n0\r\n\r\n");
    refused(&sidelane, &found, 413, "too-large", "body");
}

#[test]
fn http2_body_above_its_limit_is_413() {
    let Some(curl) = Curl::find("http2_body_above_its_limit_is_413") else { return };
    let service = Service::ok();
    let sidelane = start(&Setup::of(service.address()), "limits: { body: 10B }");
    for (length, body, status) in [
        ("", "0123456789", "200"),
        ("", "0123456789a", "413"),
        ("transfer-encoding: chunked", "0123456789a", "413"),
    ] {
        let arguments = [
            "--http2-prior-knowledge",
            "--output",
            "/dev/null",
            "--write-out",
            "%{http_code}",
            "--header",
            length,
            "--data",
            body,
            "http://api.localhost/",
        ];
        let output = curl.run(sidelane.web(), arguments);
        assert_eq!(output.stdout, status.as_bytes(), "{body} {length}: {output:?}");
    }
}

#[test]
fn heads_change_as_the_route_says() {
    let answer = "HTTP/1.1 200 OK\r\nx-internal: 1\r\nserver: s\r\ncontent-length: 2\r\n\r\nok";
    let service = Service::answering(answer);
    let policies = "request_headers: { set: { x-env: prod }, add: { x-tag: [a, b] }, \
                    remove: [x-debug] }, response_headers: { set: { server: sidelane }, \
                    remove: [x-internal] }, rewrite: { host: \"app.internal:8080\", \
                    path_prefix: /v1 }";
    let sidelane = start(&Setup::of(service.address()), policies);
    let answer = request(
        sidelane.web(),
        "GET",
        "GET /a?b HTTP/1.1\r\nHost: api.localhost\r\nX-Debug: 1\r\nX-Env: test\r\nX-Tag: z\r\n\
         X-Forwarded-Host: evil.example\r\n\r\n",
    );
    assert_eq!(answer.head.status, 200, "{answer:?}");
    assert_eq!(answer.head.first("server"), Some("sidelane"));
    assert_eq!(answer.head.first("x-internal"), None);
    let request = service.only_request();
    assert_eq!(request.target, b"/v1/a?b");
    assert_eq!(request.first("host"), Some("app.internal:8080"));
    assert_eq!(request.first("x-env"), Some("prod"));
    assert_eq!(request.all("x-tag").collect::<Vec<_>>(), [b"z", b"a", b"b"]);
    assert!(!request.has("x-debug"));
    assert_eq!(request.first("x-forwarded-host"), Some("api.localhost"));
    assert_eq!(request.first("x-forwarded-for"), Some("127.0.0.1"));
}

#[test]
fn responses_are_compressed_for_those_who_take_it() {
    let test = "responses_are_compressed_for_those_who_take_it";
    let Some(curl) = Curl::find(test) else { return };
    let text = "all work and no play ".repeat(500);
    let answer = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\netag: \"1\"\r\ncontent-length: {}\r\n\r\n{text}",
        text.len()
    );
    let service = Service::answering(answer);
    let sidelane = start(&Setup::of(service.address()), "compression: { level: 6 }");
    let plain = ask(&sidelane, "");
    assert_eq!(plain.body, text.as_bytes());
    assert_eq!(plain.head.list("vary"), "accept-encoding");
    assert_eq!(plain.head.first("content-encoding"), None);
    let packed = ask(&sidelane, "Accept-Encoding: br, gzip;q=0.8\r\n");
    assert_eq!(packed.head.first("content-encoding"), Some("gzip"), "{:?}", packed.head);
    assert_eq!(packed.head.first("etag"), Some("W/\"1\""));
    assert_eq!(packed.head.list("vary"), "accept-encoding");
    assert!(packed.body.len() < text.len() / 10, "{} bytes", packed.body.len());
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let arguments = ["--compressed", version, "http://api.localhost/"];
        let output = curl.run(sidelane.web(), arguments);
        assert_eq!(output.stdout, text.as_bytes(), "{version}: {output:?}");
    }
    let labels = ["route=\"api\"", "size=\"gzip\""];
    sidelane.until_metric("sidelane_compression_bytes_total", &labels, |bytes| bytes > 0.0);
}

#[test]
fn compressed_events_come_as_they_are_sent() {
    let (next, until) = mpsc::channel::<()>();
    let until = Mutex::new(until);
    let service = Service::start(move |connection| {
        connection.request()?;
        connection.write(
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\
             transfer-encoding: chunked\r\n\r\n",
        )?;
        let until = until.lock().expect("no panic");
        for _ in 0..3 {
            connection.write("b\r\ndata: one\n\n\r\n")?;
            // The next one is sent only once the client has this one.
            until.recv_timeout(wait::DEADLINE).map_err(std::io::Error::other)?;
        }
        connection.write("0\r\n\r\n")
    });
    let sidelane = start(&Setup::of(service.address()), "compression: {}");
    let mut client = Client::connect(sidelane.web());
    client.send("GET / HTTP/1.1\r\nHost: api.localhost\r\nAccept-Encoding: gzip\r\n\r\n");
    let head = client.head();
    assert_eq!(head.first("content-encoding"), Some("gzip"), "{head:?}");
    for event in 0..3 {
        let chunk = client.chunk().expect("a chunk");
        assert!(chunk.is_some_and(|chunk| !chunk.is_empty()), "event {event}");
        next.send(()).unwrap();
    }
    // The compressor's last bytes, and the end.
    while client.chunk().expect("a whole answer").is_some() {}
}

#[test]
fn total_timeout_is_504_and_counted() {
    let (service, _go) = holding();
    let sidelane = start(&Setup::of(service.address()), "timeouts: { total: 200ms }");
    let answer = request(sidelane.web(), "GET", get("/held"));
    assert_eq!(answer.head.status, 504, "{answer:?}");
    assert_eq!(answer.head.first("x-sidelane-error"), Some("service-timeout"));
    let labels = ["route=\"api\"", "timeout=\"total\""];
    sidelane.until_metric("sidelane_policy_timeouts_total", &labels, |count| count == 1.0);
}

#[test]
fn idle_exchange_is_cut_and_a_busy_one_is_not() {
    let service = Service::start(|connection: &mut Connection| {
        connection.request()?;
        connection.write("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n")?;
        connection.write("some of it")?;
        connection.closed()
    });
    let sidelane = start(&Setup::of(service.address()), "timeouts: { idle: 200ms }");
    let mut client = Client::connect(sidelane.web());
    client.send(get("/"));
    let head = client.head();
    assert_eq!(head.status, 200);
    assert!(client.try_body("GET", head).is_err(), "broken off, not whole");
    let labels = ["route=\"api\"", "timeout=\"idle\""];
    sidelane.until_metric("sidelane_policy_timeouts_total", &labels, |count| count == 1.0);
    service.until("the service's end", |records| records[0].closed);
}

#[test]
fn websocket_that_rests_is_cut() {
    let service = Service::start(|connection| {
        connection.accept("")?;
        connection.echo()
    });
    let setup = Setup::of(service.address()).websocket("{}");
    let sidelane = start(&setup, "timeouts: { idle: 300ms }");
    let mut socket = Socket::open(sidelane.web());
    socket.says_back("hello");
    assert!(socket.try_frame().is_err(), "cut");
    service.until("the service's end", |records| records[0].closed);
}

#[test]
fn exchanges_are_split_by_weight() {
    let answer = |name: &str| format!("HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n{name}");
    let (a, b) = (Service::answering(answer("a")), Service::answering(answer("b")));
    let setup = Setup::of(a.address()).tunnel("canary", b.address());
    let split = |api: u32, canary: u32| {
        setup.both().replace(
            "subdomain: api, tunnel: api }",
            &format!(
                "subdomain: api, tunnels: [{{ name: api, weight: {api} }}, \
                 {{ name: canary, weight: {canary} }}] }}"
            ),
        )
    };
    let sidelane = Sidelane::start("sidelane", &split(1, 0));
    let mut client = Client::connect(sidelane.web());
    let mut ask = || {
        client.send(get("/"));
        String::from_utf8(client.answer("GET").body).unwrap()
    };
    let all: Vec<String> = (0..50).map(|_| ask()).collect();
    assert!(all.iter().all(|name| name == "a"), "{all:?}");
    sidelane.rewrite(&split(1, 3));
    wait::until("the canary", || (ask() == "b").then_some(()));
    let canary = (0..400).filter(|_| ask() == "b").count();
    // 300 are expected; nine standard deviations around.
    assert!((222..=378).contains(&canary), "{canary} of 400");
}

#[test]
fn running_exchange_keeps_the_policies_it_began_with() {
    let service = Service::ok();
    let setup = Setup::of(service.address());
    let sidelane = start(&setup, "limits: { body: 1MiB }");
    let mut upload = Client::connect(sidelane.web());
    upload.send("POST / HTTP/1.1\r\nHost: api.localhost\r\nContent-Length: 1000\r\n\r\n");
    upload.send(vec![b'.'; 500]);
    service.until("the upload", |records| records.iter().any(|record| !record.received.is_empty()));
    sidelane
        .rewrite(&with(&setup.both(), "limits: { body: 1B }, addresses: { deny: [127.0.0.1] }"));
    wait::until("the edit", || (ask(&sidelane, "").head.status == 403).then_some(()));
    upload.send(vec![b'.'; 500]);
    let answer = upload.answer("POST");
    assert_eq!(answer.head.status, 200, "{answer:?}");
}

#[test]
fn grpc_hears_refusals_in_its_own_words() {
    let Some(peers) = Peers::find("grpc_hears_refusals_in_its_own_words") else { return };
    let (_peer, address) = peers.service("grpcio");
    let setup = Setup::of(address).grpc("{}");
    let auth = basic_auth();
    for (policies, case, code) in [
        ("addresses: { deny: [127.0.0.1] }", "unary", 7),
        (auth.as_str(), "unary", 16),
        ("limits: { body: 3B }", "unary", 8),
        ("timeouts: { total: 300ms }", "held", 4),
        ("response_headers: { set: { x-a: b } }, limits: { rate: { count: 100 } }", "unary", 0),
    ] {
        let sidelane = start(&setup, policies);
        if case == "held" {
            // Its own deadline is half a second.
            let seen = peers.ask("grpcio", "deadline", sidelane.web());
            assert_eq!(seen["code"], code, "{policies}: {seen}");
            let labels = ["code=\"service-timeout\""];
            sidelane.until_metric("sidelane_exchanges_total", &labels, |count| count >= 1.0);
            continue;
        }
        let seen = peers.ask("grpcio", case, sidelane.web());
        assert_eq!(seen["code"], code, "{policies}: {seen}");
    }
}

#[test]
fn announced_policies_are_carried_out_by_the_relay() {
    let service = Service::ok();
    let setup = Setup::of(service.address());
    let relay = Sidelane::spawn("relay", &setup.relay());
    let sidecar = Sidelane::start("sidecar", &with(&setup.sidecar(relay.tunnel()), &basic_auth()));
    wait::until("the announcement", || (ask(&relay, "").head.status == 401).then_some(()));
    let known = format!("Authorization: {ALICE}\r\n");
    assert_eq!(ask(&relay, &known).head.status, 200);
    relay.until_metric(
        "sidelane_policy_refused_total",
        &["route=\"api\"", "policy=\"basic_auth\""],
        |count| count >= 1.0,
    );
    // The sidecar's file changes, and the relay's answers with it.
    let open = with(&setup.sidecar(relay.tunnel()), "limits: { concurrent: 5 }");
    sidecar.rewrite(&open);
    wait::until("the edit", || (ask(&relay, "").head.status == 200).then_some(()));
}

#[test]
fn routes_of_the_relays_file_win_and_conflicts_wait() {
    let service = Service::ok();
    let setup = Setup::of(service.address());
    let closed = with(&setup.relay_with_routes(), "addresses: { deny: [127.0.0.1] }");
    let relay = Sidelane::spawn("relay", &closed);
    let _sidecar = Sidelane::start("sidecar", &setup.sidecar(relay.tunnel()));
    let routes = |relay: &Sidelane| -> Value { relay.admin_page("/routes") };
    wait::until("the overruled route", || {
        let routes = routes(&relay);
        let announced = routes.as_array()?.iter().find(|route| route["from"] == "e2e")?.clone();
        (announced["overruled_by"]["from"] == "file").then_some(())
    });
    assert_eq!(ask(&relay, "").head.status, 403);

    let relay = Sidelane::spawn("relay", &setup.relay());
    let first = Sidelane::start("sidecar", &setup.sidecar(relay.tunnel()));
    wait::until("the first", || (ask(&relay, "").head.status == 200).then_some(()));
    let other = Service::answering("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nother");
    let mut theirs = Setup::of(other.address());
    theirs.tunnels[0].0 = "other".to_owned();
    theirs.routes[0].tunnel = "other".to_owned();
    let _second = Sidelane::spawn("second", &theirs.sidecar(relay.tunnel()));
    relay.until_metric("sidelane_announcements_waiting", &[], |count| count == 1.0);
    let waiting = routes(&relay);
    let waits = waiting.as_array().unwrap().iter().find(|route| !route["waits_for"].is_null());
    let reason = waits.expect("a waiting route")["waits_for"][0].as_str().unwrap().to_owned();
    assert!(reason.contains("the older session keeps it"), "{reason}");
    assert_eq!(ask(&relay, "").body, b"ok");
    first.kill();
    wait::within(Duration::from_secs(10), "the second", || {
        (ask(&relay, "").body == b"other").then_some(())
    });
    relay.until_metric("sidelane_announcements_waiting", &[], |count| count == 0.0);
}

/// Starts the line protocol on a listener, with policies of its route.
fn start_lines(line: &Line, service: &Service, policies: &str) -> Sidelane {
    let yaml = plugins::yaml(&line.path(), service.address());
    let route = "{ listener: lines, tunnel: echo }";
    assert!(yaml.contains(route), "{yaml}");
    let policies = format!("{{ listener: lines, tunnel: echo, {policies} }}");
    Sidelane::start("sidelane", &yaml.replace(route, &policies))
}

/// Whether the relay has closed the connection without a byte.
fn is_closed(stream: &mut std::net::TcpStream) -> bool {
    matches!(std::io::Read::read(stream, &mut [0; 16]), Ok(0) | Err(_))
}

#[test]
fn byte_born_exchanges_are_limited_too() {
    let (line, service) = (Line::new(), plugins::echo());
    for (policies, policy) in [
        ("limits: { concurrent: 1 }", "concurrent"),
        ("limits: { rate: { count: 1, per: 1h } }", "rate"),
        ("limits: { rate_per_client: { count: 1, per: 1h } }", "rate_per_client"),
    ] {
        let sidelane = start_lines(&line, &service, policies);
        let mut first = plugins::connect(&sidelane);
        says_back(&mut first, "one\n");
        let mut second = plugins::connect(&sidelane);
        assert!(is_closed(&mut second), "{policies}");
        let labels = ["route=\"lines\"", &format!("policy=\"{policy}\"")];
        sidelane.until_metric("sidelane_policy_refused_total", &labels, |count| count >= 1.0);
        says_back(&mut first, "two\n");
        drop(first);
        let running = "sidelane_route_exchanges_in_flight";
        sidelane.until_metric(running, &["route=\"lines\""], |count| count < 0.5);
        if policy == "concurrent" {
            says_back(&mut plugins::connect(&sidelane), "three\n");
        }
    }
    let sidelane = start_lines(&line, &service, "addresses: { allow: [10.0.0.0/8] }");
    assert!(is_closed(&mut plugins::connect(&sidelane)));
}

#[test]
fn byte_born_exchange_that_rests_is_cut() {
    let (line, service) = (Line::new(), plugins::echo());
    let sidelane = start_lines(&line, &service, "timeouts: { idle: 800ms }");
    let mut client = plugins::connect(&sidelane);
    says_back(&mut client, "one\n");
    assert!(is_closed(&mut client), "cut");
    let labels = ["route=\"lines\"", "timeout=\"idle\""];
    sidelane.until_metric("sidelane_policy_timeouts_total", &labels, |count| count >= 1.0);
}

#[test]
fn no_client_takes_out_what_the_route_sets() {
    let service = Service::ok();
    let policies = "request_headers: { set: { x-env: prod } }, rewrite: { host: app.internal }";
    let sidelane = start(&Setup::of(service.address()), policies);
    let lines =
        "Connection: x-env, close, X-Forwarded-Host, x-hop\r\nX-Env: theirs\r\nX-Hop: 1\r\n";
    assert_eq!(ask(&sidelane, lines).head.status, 200);
    let request = service.only_request();
    assert_eq!(request.first("x-env"), Some("prod"), "{request:?}");
    assert_eq!(request.first("x-forwarded-host"), Some("api.localhost"), "{request:?}");
    assert!(!request.has("x-hop"), "{request:?}");
}

#[test]
fn no_path_leads_around_a_routes_policies() {
    let service = Service::ok();
    let yaml = Setup::of(service.address()).both();
    let admin =
        format!("  - {{ subdomain: api, path_prefix: /admin, tunnel: api, {} }}", basic_auth());
    let yaml = yaml.replace("routes:\n", &format!("routes:\n{admin}\n"));
    let sidelane = Sidelane::start("sidelane", &yaml);
    let status = |path: &str| {
        let bytes = format!("GET {path} HTTP/1.1\r\nHost: api.localhost\r\n\r\n");
        request(sidelane.web(), "GET", bytes).head.status
    };
    assert_eq!(status("/admin/x"), 401);
    for path in [
        "/x/../admin/x",
        "/x/%2e%2e/admin",
        "//admin",
        "/%61dmin",
        "/admin%2fx",
        "/./admin",
        "/\\admin",
        "/x/..;/admin",
        "/admin/../x",
    ] {
        assert!(matches!(status(path), 400 | 401), "{path}");
    }
    assert!(service.take_requests().is_empty(), "nothing reaches the service");
    for path in ["/", "/x//y", "/x/../y%2Fz", "/administrator", "/x%20y"] {
        assert_eq!(status(path), 200, "{path}");
    }
}

#[test]
fn who_knows_no_password_takes_no_place_of_those_who_do() {
    let (service, go) = holding();
    let policies = format!("limits: {{ concurrent: 1 }}, {}", basic_auth());
    let sidelane = start(&Setup::of(service.address()), &policies);
    let mut held = Client::connect(sidelane.web());
    held.send(format!(
        "GET /held HTTP/1.1\r\nHost: api.localhost\r\nAuthorization: {ALICE}\r\n\r\n"
    ));
    service.until("the held request", |records| {
        records.iter().any(|record| !record.received.is_empty())
    });
    // The place is taken; a stranger hears that it must say who it is all the same.
    let answer = ask(&sidelane, "");
    refused(&sidelane, &answer, 401, "unauthorized", "basic_auth");
    let answer = ask(&sidelane, &format!("Authorization: {ALICE}\r\n"));
    refused(&sidelane, &answer, 503, "overloaded", "concurrent");
    go.send(()).unwrap();
    assert_eq!(held.answer("GET").head.status, 200);
}

#[test]
fn a_route_says_itself_what_stands_in_forwarded_fields() {
    let service = Service::ok();
    let policies = "request_headers: { set: { x-forwarded-proto: https, x-forwarded-prefix: /p } }";
    let sidelane = start(&Setup::of(service.address()), policies);
    let lines =
        "X-Forwarded-For: 192.0.2.1\r\nX-Forwarded-Proto: ftp\r\nX-Forwarded-User: root\r\n";
    assert_eq!(ask(&sidelane, lines).head.status, 200);
    let request = service.only_request();
    for (name, value) in [
        ("x-forwarded-proto", Some("https")),
        ("x-forwarded-prefix", Some("/p")),
        ("x-forwarded-for", Some("127.0.0.1")),
        ("x-forwarded-host", Some("api.localhost")),
        ("x-forwarded-user", None),
    ] {
        assert_eq!(request.first(name), value, "{name}: {request:?}");
    }
}
