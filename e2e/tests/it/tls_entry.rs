//! TLS on clients' listeners: which certificate is shown, what is agreed on, what may be replaced while
//! everything runs, and what a handshake may cost.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use sidelane_e2e::authority::{Authority, Files};
use sidelane_e2e::client::Client;
use sidelane_e2e::peer::Peer;
use sidelane_e2e::process::{Plugin, Setup, Sidelane, line_library};
use sidelane_e2e::service::Service;
use sidelane_e2e::stage::get;
use sidelane_e2e::tls::{Connector, chain};
use sidelane_e2e::tools::{Curl, Python};
use sidelane_e2e::wait;
use sidelane_e2e::websocket::{Frame, Socket};

const WEB: &str = "{ name: web, address: \"127.0.0.1:0\" }";
const HOST: &str = "api.localhost";

/// One certificate of a listener.
pub(crate) fn certificate(files: &Files) -> String {
    format!("{{ cert: \"{}\", key: \"{}\" }}", files.cert.display(), files.key.display())
}

/// A listener with certificates, and with more keys of `tls`.
pub(crate) fn listener(files: &[&Files], more: &str) -> String {
    let all: Vec<_> = files.iter().map(|files| certificate(files)).collect();
    let all = all.join(", ");
    format!("{{ name: web, address: \"127.0.0.1:0\", tls: {{ certificates: [{all}]{more} }} }}")
}

/// A file with other listeners, and with further lines of its relay.
pub(crate) fn file(setup: &Setup, listeners: &[&str], relay: &str) -> String {
    setup
        .both()
        .replace(WEB, &listeners.join("\n    - "))
        .replace("  base_domains:", &format!("{relay}  base_domains:"))
}

pub(crate) fn start(setup: &Setup, listeners: &[&str], relay: &str) -> Sidelane {
    Sidelane::start("sidelane", &file(setup, listeners, relay))
}

pub(crate) fn reload(sidelane: &Sidelane) {
    let (status, answer) = sidelane.reload();
    assert_eq!(status, 200, "{answer}");
}

/// The status of a request on a connection.
fn status(client: &mut Client) -> u16 {
    client.send(get("/"));
    client.answer("GET").head.status
}

#[track_caller]
fn shows(connector: &Connector, relay: SocketAddr, name: &str, files: &Files) {
    let client = connector.connect(relay, name);
    let shown = client.tls().peer_certificates().expect("a certificate");
    assert_eq!(shown, chain(&files.cert), "{name}");
}

fn until_result(sidelane: &Sidelane, result: &str, count: f64) {
    let result = format!("result=\"{result}\"");
    let labels = ["listener=\"web\"", result.as_str()];
    sidelane.until_metric("sidelane_tls_handshakes_total", &labels, |found| found == count);
}

#[test]
fn curl_speaks_both_versions_of_tls_and_of_http() {
    let Some(curl) = Curl::find("curl_speaks_both_versions_of_tls_and_of_http") else { return };
    let authority = Authority::new("ca");
    let files = authority.sign(&[HOST]);
    let service = Service::ok();
    let sidelane = start(&Setup::of(service.address()), &[&listener(&[&files], "")], "");
    let ca = authority.ca();
    let table: [(&[&str], &str); 4] = [
        (&["--http1.1", "--tlsv1.2", "--tls-max", "1.2"], "1.1 200 ok"),
        (&["--http1.1", "--tlsv1.3"], "1.1 200 ok"),
        (&["--http2", "--tlsv1.2", "--tls-max", "1.2"], "2 200 ok"),
        (&["--http2", "--tlsv1.3"], "2 200 ok"),
    ];
    for (arguments, expected) in table {
        let output = curl
            .command(sidelane.web())
            .args(arguments)
            .arg("--cacert")
            .arg(&ca)
            .args(["-w", "%{http_version} %{response_code} ", "-o", "-", "https://api.localhost/"])
            .output()
            .expect("curl starts");
        let answer = String::from_utf8_lossy(&output.stdout).into_owned();
        let answer: String = match answer.strip_prefix("ok") {
            Some(rest) => format!("{rest}ok"),
            None => format!("{answer} {}", String::from_utf8_lossy(&output.stderr)),
        };
        assert_eq!(answer, expected, "{arguments:?}");
    }
    for request in service.take_requests() {
        let scheme: Vec<_> = request.all("x-forwarded-proto").collect();
        assert_eq!(scheme, [b"https"]);
    }
    until_result(&sidelane, "full", 4.0);
}

#[test]
fn the_certificate_is_that_of_the_name() {
    let authority = Authority::new("ca");
    let (first, wild, directory) = (
        authority.sign(&["api.localhost"]),
        authority.sign(&["*.shop.localhost"]),
        tempfile::tempdir(),
    );
    let directory = directory.expect("a directory");
    // As Kubernetes mounts a TLS secret.
    let mounted = authority.sign(&["shop.example.org"]);
    fs::copy(&mounted.cert, directory.path().join("tls.crt")).expect("a copy");
    fs::copy(&mounted.key, directory.path().join("tls.key")).expect("a copy");
    let listener = format!(
        "{{ name: web, address: \"127.0.0.1:0\", tls: {{ certificates: [{}, {}, {{ directory: \"{}\" }}] }} }}",
        certificate(&first),
        certificate(&wild),
        directory.path().display()
    );
    let service = Service::ok();
    let sidelane = start(&Setup::of(service.address()), &[&listener], "");
    let connector = Connector::new(&authority.ca());
    let web = sidelane.web();
    shows(&connector, web, "api.localhost", &first);
    shows(&connector, web, "API.localhost", &first);
    shows(&connector, web, "a.shop.localhost", &wild);
    shows(&connector, web, "shop.example.org", &mounted);
    let error =
        connector.try_connect(web, "a.b.shop.localhost").expect_err("it is not for this name");
    assert!(error.to_string().contains("not valid for name"), "{error}");
    until_result(&sidelane, "rejected", 1.0);
    let labels = ["listener=\"web\"", "name=\"shop.example.org\""];
    let expiry = sidelane.metric("sidelane_certificate_expiry_timestamp_seconds", &labels);
    assert!(expiry.is_some_and(|seconds| seconds > 1e9), "{expiry:?}");
}

#[test]
fn a_certificate_is_replaced_and_nothing_that_runs_notices() {
    let Some(python) = Python::find("a_certificate_is_replaced_and_nothing_that_runs_notices")
    else {
        return;
    };
    let authority = Authority::new("ca");
    let files = authority.sign(&[HOST]);
    let (replaced, until_replaced) = mpsc::channel::<()>();
    let until_replaced = Mutex::new(until_replaced);
    let service = Service::start(move |connection| {
        while let Some(request) = connection.request()? {
            if request.target == b"/download" {
                connection.write("HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n01234")?;
                let replaced = until_replaced.lock().expect("no panic");
                replaced.recv_timeout(wait::DEADLINE).map_err(io::Error::other)?;
                connection.write("56789")?;
            } else if request.all("upgrade").next().is_some() {
                connection.upgrade(&request, "")?;
                loop {
                    let frame = connection.frame()?;
                    connection.write(Frame { mask: None, ..frame }.bytes())?;
                }
            } else {
                connection.write("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
            }
        }
        Ok(())
    });
    let (_grpc, grpc) = Peer::service("grpcio", python.script("grpc_server.py"));
    let mut setup = Setup::of(service.address()).websocket("{}").grpc("{}");
    setup = setup.tunnel("rpc", grpc);
    setup
        .routes
        .push(sidelane_e2e::process::Route::new("api", "rpc").under("/e2e.Peer").named("rpc"));
    let sidelane = start(&setup, &[&listener(&[&files], "")], "");
    let web = sidelane.web();
    let connector = Connector::new(&authority.ca());

    let mut socket = Socket::open_over(connector.connect(web, HOST), "/ws", "");
    socket.says_back("before");
    let mut download = connector.connect(web, HOST);
    download.send(get("/download"));
    let head = download.head();
    assert_eq!(head.status, 200);
    let mut kept = connector.connect(web, HOST);
    assert_eq!(status(&mut kept), 200);
    let mut command = python.script("grpc_client.py");
    command.env("SIDELANE_E2E_CA", authority.ca());
    let mut rpc = Peer::client("grpcio", command, "talk", web);
    assert_eq!(rpc.line()["before"], "before");

    let old = chain(&files.cert);
    // By the same names.
    let files = authority.sign(&[HOST]);
    assert_ne!(old, chain(&files.cert));
    reload(&sidelane);

    shows(&connector, web, HOST, &files);
    socket.says_back("after");
    replaced.send(()).expect("the service waits");
    let body = download.try_body("GET", head).expect("a whole body").body;
    assert_eq!(body, b"0123456789");
    assert_eq!(status(&mut kept), 200);
    assert_eq!(kept.tls().peer_certificates(), Some(&*old));
    rpc.type_line("go on");
    let seen = rpc.finish();
    assert_eq!((&seen["after"], &seen["code"]), (&"after".into(), &0.into()), "{seen}");
    sidelane
        .until_metric("sidelane_exchanges_total", &["role=\"relay\"", "code=\"none\""], |_| true);
}

#[test]
fn certificates_are_replaced_under_load() {
    const REPLACED: usize = 5;
    /// Of each kind, between two replacements.
    const ROUNDS: u64 = 10;
    let authority = Authority::new("ca");
    let files = authority.sign(&[HOST]);
    let service = Service::start(|connection| {
        while let Some(request) = connection.request()? {
            if request.all("upgrade").next().is_none() {
                connection.write("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
                continue;
            }
            connection.upgrade(&request, "")?;
            while let Ok(frame) = connection.frame() {
                connection.write(Frame { mask: None, ..frame }.bytes())?;
            }
        }
        Ok(())
    });
    let setup = Setup::of(service.address()).websocket("{}");
    let sidelane = start(&setup, &[&listener(&[&files], "")], "");
    let (web, connector) = (sidelane.web(), Connector::new(&authority.ca()));
    let stop = AtomicBool::new(false);
    let rounds = [const { AtomicU64::new(0) }; 3];
    let until_stop = |rounds: &AtomicU64, round: &mut dyn FnMut()| {
        while !stop.load(Ordering::SeqCst) {
            round();
            rounds.fetch_add(1, Ordering::SeqCst);
        }
    };
    std::thread::scope(|scope| {
        // However the test goes, they end.
        let _stop = OnDrop(|| stop.store(true, Ordering::SeqCst));
        let kept = scope.spawn(|| {
            let mut client = connector.connect(web, HOST);
            until_stop(&rounds[0], &mut || assert_eq!(status(&mut client), 200));
        });
        let fresh = scope.spawn(|| {
            until_stop(&rounds[1], &mut || {
                assert_eq!(status(&mut connector.connect(web, HOST)), 200);
            });
        });
        let socket = scope.spawn(|| {
            let mut socket = Socket::open_over(connector.connect(web, HOST), "/ws", "");
            until_stop(&rounds[2], &mut || socket.says_back("hello"));
        });
        let all = [kept, fresh, socket];
        for _ in 0..REPLACED {
            let before = rounds.each_ref().map(|rounds| rounds.load(Ordering::SeqCst));
            let files = authority.sign(&[HOST]);
            reload(&sidelane);
            shows(&Connector::new(&authority.ca()), web, HOST, &files);
            wait::until("all go on", || {
                let is_ended = all.iter().any(|thread| thread.is_finished());
                let mut pairs = rounds.iter().zip(before);
                let go_on =
                    pairs.all(|(now, before)| now.load(Ordering::SeqCst) >= before + ROUNDS);
                (is_ended || go_on).then_some(())
            });
            assert!(all.iter().all(|thread| !thread.is_finished()), "one has failed");
        }
    });
}

/// Does something at the end of a scope, come what may.
struct OnDrop<F: Fn()>(F);

impl<F: Fn()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

#[test]
fn sessions_are_resumed_until_the_certificate_is_another() {
    let authority = Authority::new("ca");
    let files = authority.sign(&[HOST]);
    let service = Service::ok();
    let sidelane = start(&Setup::of(service.address()), &[&listener(&[&files], "")], "");
    for version in [&rustls::version::TLS13, &rustls::version::TLS12] {
        let connector = Connector::with(&authority.ca(), &[version], None, &[]);
        let kind = || {
            let mut client = connector.connect(sidelane.web(), HOST);
            // Tickets come with the first answer.
            assert_eq!(status(&mut client), 200);
            client.tls().handshake_kind().expect("it is done")
        };
        use rustls::HandshakeKind::{Full, Resumed};
        assert_eq!([kind(), kind()], [Full, Resumed], "{version:?}");
        // What says the same of the listener leaves its tickets.
        reload(&sidelane);
        assert_eq!(kind(), Resumed, "{version:?}");
        drop(authority.sign(&[HOST]));
        reload(&sidelane);
        assert_eq!([kind(), kind()], [Full, Resumed], "{version:?}");
    }
    until_result(&sidelane, "resumed", 6.0);
}

#[test]
fn a_listener_turns_to_tls_and_back_on_its_socket() {
    let authority = Authority::new("ca");
    let files = authority.sign(&[HOST]);
    let service = Service::ok();
    let setup = Setup::of(service.address());
    let sidelane = start(&setup, &[WEB], "");
    let web = sidelane.web();
    let connector = Connector::new(&authority.ca());
    let mut plain = Client::connect(web);
    assert_eq!(status(&mut plain), 200);

    sidelane.rewrite(&file(&setup, &[&listener(&[&files], "")], ""));
    reload(&sidelane);
    let mut secure = connector.connect(web, HOST);
    assert_eq!(status(&mut secure), 200);
    assert_eq!(status(&mut plain), 200, "it keeps what it began with");
    let mut refused = Client::connect(web);
    refused.send(get("/"));
    assert_eq!(refused.answer("GET").head.status, 400);

    sidelane.rewrite(&file(&setup, &[WEB], ""));
    reload(&sidelane);
    assert_eq!(status(&mut Client::connect(web)), 200);
    assert_eq!(status(&mut secure), 200, "it keeps what it began with");
    let expiry = sidelane.metric("sidelane_certificate_expiry_timestamp_seconds", &[]);
    assert_eq!(expiry, None);
}

#[test]
fn plain_http_on_the_port_of_tls_is_told_so() {
    let authority = Authority::new("ca");
    let files = authority.sign(&[HOST]);
    let service = Service::ok();
    let sidelane = start(&Setup::of(service.address()), &[&listener(&[&files], "")], "");
    let mut client = Client::connect(sidelane.web());
    client.send(get("/"));
    let answer = client.answer("GET");
    assert_eq!(answer.head.status, 400);
    assert_eq!(answer.head.first("x-sidelane-error"), Some("bad-request"));
    assert_eq!(answer.body, b"bad-request: this port speaks https\n");
    assert_eq!(client.rest(), b"");
    let mut client = Client::connect(sidelane.web());
    client.send(b"\0\0garbage");
    assert_eq!(client.rest(), b"");
    until_result(&sidelane, "not_tls", 2.0);
    wait::until("a line in the log", || {
        sidelane.log().contains("TLS handshakes failed").then_some(())
    });
}

#[test]
fn unknown_protocols_and_old_versions_are_refused() {
    let authority = Authority::new("ca");
    let files = authority.sign(&[HOST]);
    let listener = listener(&[&files], ", min_version: \"1.3\"");
    let service = Service::ok();
    let sidelane = start(&Setup::of(service.address()), &[&listener], "");
    let (ca, both) = (authority.ca(), [&rustls::version::TLS13, &rustls::version::TLS12]);
    let fails = |connector: Connector, expected: &str| {
        let error = connector.try_connect(sidelane.web(), HOST).expect_err("refused");
        assert!(error.to_string().contains(expected), "{error}");
    };
    fails(Connector::with(&ca, &both, None, &["lines/1"]), "NoApplicationProtocol");
    fails(Connector::with(&ca, &both[1..], None, &[]), "ProtocolVersion");
    until_result(&sidelane, "incompatible", 2.0);
}

#[test]
fn slow_hello_is_cut() {
    let authority = Authority::new("ca");
    let files = authority.sign(&[HOST]);
    let listener = listener(&[&files], "");
    let relay = "  timeouts: { tls_handshake: 1s }\n";
    let service = Service::ok();
    let sidelane = start(&Setup::of(service.address()), &[&listener], relay);
    let mut silent = Client::connect(sidelane.web());
    let mut slow = Client::connect(sidelane.web());
    slow.send(b"\x16\x03\x01\x02\x00\x01");
    assert_eq!((silent.rest(), slow.rest()), (Vec::new(), Vec::new()));
    until_result(&sidelane, "timeout", 2.0);
    assert_eq!(status(&mut Connector::new(&authority.ca()).connect(sidelane.web(), HOST)), 200);
}

#[test]
fn handshakes_under_way_are_bounded() {
    let authority = Authority::new("ca");
    let files = authority.sign(&[HOST]);
    let service = Service::ok();
    let listener = listener(&[&files], "");
    let refused = |sidelane: &Sidelane, reason: &str, count: f64| {
        let reason = format!("reason=\"{reason}\"");
        let labels = ["listener=\"web\"", reason.as_str()];
        sidelane.until_metric("sidelane_tls_handshakes_refused_total", &labels, |n| n >= count);
    };
    for (limits, relay, reason) in [
        ("tls_handshakes_per_address: 2", "", "address"),
        // Those that a proxy brings are bounded with all others alone.
        (
            "tls_handshakes: 2, tls_handshakes_per_address: 1",
            "  trusted_proxies: [127.0.0.1]\n",
            "total",
        ),
    ] {
        let relay =
            format!("  limits: {{ {limits} }}\n  timeouts: {{ tls_handshake: 60s }}\n{relay}");
        let sidelane = start(&Setup::of(service.address()), &[&listener], &relay);
        let connector = Connector::new(&authority.ca());
        let mut done = connector.connect(sidelane.web(), HOST);
        // A client is done with TLS 1.3 before the relay is.
        assert_eq!(status(&mut done), 200);
        let held = [0; 2].map(|_| {
            let mut client = Client::connect(sidelane.web());
            client.send(b"\x16");
            client
        });
        // Both have their places by then, and leave none.
        sidelane.until_metric("sidelane_connections", &["listener=\"web\""], |open| open == 3.0);
        drop(connector.try_connect(sidelane.web(), HOST).expect_err("there is no place"));
        refused(&sidelane, reason, 1.0);
        assert_eq!(status(&mut done), 200, "whoever is in stays in");
        drop(held);
        wait::until("a place", || connector.try_connect(sidelane.web(), HOST).ok());
    }
}

#[test]
fn proxy_header_comes_before_tls() {
    let authority = Authority::new("ca");
    let files = authority.sign(&[HOST]);
    let service = Service::ok();
    let listener = listener(&[&files], "").replace("tls:", "proxy_protocol: true, tls:");
    let relay = "  trusted_proxies: [127.0.0.1]\n";
    let sidelane = start(&Setup::of(service.address()), &[&listener], relay);
    let connector = Connector::new(&authority.ca());
    let header = b"PROXY TCP4 192.0.2.1 127.0.0.1 4711 443\r\n";
    let mut client = connector.try_connect_behind(sidelane.web(), HOST, header).expect("TLS");
    assert_eq!(status(&mut client), 200);
    let request = service.only_request();
    assert_eq!(request.all("x-forwarded-for").collect::<Vec<_>>(), [b"192.0.2.1"]);
    assert_eq!(request.all("x-forwarded-proto").collect::<Vec<_>>(), [b"https"]);
}

#[test]
fn a_protocol_of_bytes_is_routed_by_the_name_in_tls() {
    let authority = Authority::new("ca");
    let files = authority.sign(&[HOST, "nobody.localhost"]);
    // It sends back what it gets.
    let service = Service::start(|connection| {
        loop {
            let byte = connection.exactly(1)?;
            connection.write(byte)?;
        }
    });
    let mut setup = Setup::of(service.address());
    setup.plugins.push(Plugin { name: "line", library: line_library(), config: "~".to_owned() });
    let listener = listener(&[&files], "").replace("tls:", "protocol_type: LINE, tls:");
    let sidelane = start(&setup, &[&listener], "");
    let connector = Connector::with(
        &authority.ca(),
        &[&rustls::version::TLS13],
        None,
        // It need not be one that we know.
        &["lines/1"],
    );
    let mut client = connector.connect(sidelane.web(), HOST);
    client.send(b"hello\n");
    assert_eq!(client.exactly(6).expect("an echo"), b"hello\n");
    let mut nobody = connector.connect(sidelane.web(), "nobody.localhost");
    nobody.send(b"hello\n");
    let _ = nobody.rest();
    let labels = ["role=\"relay\"", "protocol_type=\"LINE\"", "code=\"no-route\""];
    sidelane.until_metric("sidelane_exchanges_total", &labels, |count| count == 1.0);
}

#[test]
fn host_that_the_first_bytes_name_is_that_of_tls() {
    let authority = Authority::new("ca");
    let files = authority.sign(&[HOST, "other.localhost", "127.0.0.1"]);
    // It sends back what it gets.
    let service = Service::start(|connection| {
        loop {
            let byte = connection.exactly(1)?;
            connection.write(byte)?;
        }
    });
    let mut setup = Setup::of(service.address());
    setup.plugins.push(Plugin { name: "line", library: line_library(), config: "~".to_owned() });
    let listener = listener(&[&files], "").replace("tls:", "sniff: true, tls:");
    let sidelane = start(&setup, &[&listener], "");
    let connector = Connector::new(&authority.ca());
    let greeting = format!("LINE {HOST}\n");
    for name in [HOST, "127.0.0.1"] {
        let mut client = connector.connect(sidelane.web(), name);
        client.send(&greeting);
        let echo = client.exactly(greeting.len());
        assert_eq!(echo.expect("an echo"), greeting.as_bytes(), "{name}");
    }
    let mut other = connector.connect(sidelane.web(), "other.localhost");
    other.send(&greeting);
    assert_eq!(other.rest(), b"");
    let labels = ["role=\"relay\"", "protocol_type=\"LINE\"", "code=\"misdirected\""];
    sidelane.until_metric("sidelane_exchanges_total", &labels, |count| count == 1.0);
}

/// A relay whose listener is the tunnel's too, and what its sidecars are set up by.
fn one_port(service: &Service, listener: &str) -> (Setup, Sidelane) {
    let mut setup = Setup::of(service.address());
    let token = "0123456789abcdef0123456789abcdef".to_owned();
    (setup.relay_token, setup.sidecar_token) = (Some(token.clone()), Some(token));
    let relay = setup
        .relay()
        .replace(WEB, listener)
        .replace("tunnel: { address: \"127.0.0.1:0\"", "tunnel: { listener: web");
    (setup, Sidelane::spawn("relay", &relay))
}

#[test]
fn sidecars_come_in_by_the_port_of_clients() {
    let authority = Authority::new("ca");
    let files = authority.sign(&[HOST]);
    let service = Service::ok();
    let (setup, relay) = one_port(&service, &listener(&[&files], ""));
    let address = relay.web();
    let ca = authority.ca();
    let dialled = format!(
        "[{{ address: \"{address}\", tls: {{ ca: \"{}\", server_name: {HOST} }} }}]",
        ca.display()
    );
    let sidecar = setup.sidecar(address).replace(&format!("[\"{address}\"]"), &dialled);
    let sidecar = Sidelane::spawn("sidecar", &sidecar);
    sidecar.until_ready();
    relay.until_ready();
    let mut client = Connector::new(&ca).connect(address, HOST);
    assert_eq!(status(&mut client), 200);
    // A lane is no client's connection.
    relay.until_metric("sidelane_connections", &["listener=\"web\""], |open| open == 1.0);
}

#[test]
fn a_sidecar_without_tls_is_told_so_at_the_port_of_clients() {
    let authority = Authority::new("ca");
    let files = authority.sign(&[HOST]);
    let service = Service::ok();
    let (setup, relay) = one_port(&service, &listener(&[&files], ""));
    let sidecar = Sidelane::spawn("sidecar", &setup.sidecar(relay.web()));
    wait::until("the sidecar's log to say so", || {
        let log = sidecar.log();
        let is_told = |line: &str| {
            line.contains("no session") && line.contains("this relay expects TLS here")
        };
        log.lines().any(is_told).then_some(())
    });
    assert!(relay.log().contains("the dialler speaks no TLS, and the listener expects it"));
    let refused = relay.metric("sidelane_handshakes_refused_total", &["reason=\"tls\""]);
    assert!(refused.unwrap_or(0.0) >= 1.0, "{refused:?}");
    until_result(&relay, "not_tls", 1.0);
}

#[test]
fn a_sidecar_is_told_of_names_that_no_certificate_is_for() {
    let authority = Authority::new("ca");
    let files = authority.sign(&["other.localhost"]);
    let service = Service::ok();
    let setup = Setup::of(service.address());
    let relay = setup.relay().replace(WEB, &listener(&[&files], ""));
    let relay = Sidelane::spawn("relay", &relay);
    let sidecar = Sidelane::start("sidecar", &setup.sidecar(relay.tunnel()));
    let expected =
        format!("no certificate of listener web is for {HOST}; clients are answered 421");
    wait::until("the relay's note", || {
        let page = sidecar.admin_page("/tunnels");
        let notes = page["relays"][0]["announcement_notes"].to_string();
        notes.contains(&expected).then_some(())
    });
}

#[test]
fn large_bodies_pass_both_ways() {
    const SIZE: usize = 8 << 20;
    let authority = Authority::new("ca");
    let files = authority.sign(&[HOST]);
    let service = Service::start(|connection| {
        while let Some(request) = connection.exchange()? {
            let head =
                format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", request.body.bytes.len());
            connection.write([head.as_bytes(), &request.body.bytes].concat())?;
        }
        Ok(())
    });
    let sidelane = start(&Setup::of(service.address()), &[&listener(&[&files], "")], "");
    let body: Vec<u8> = (0..=250_u8).cycle().take(SIZE).collect();
    let mut client = Connector::new(&authority.ca()).connect(sidelane.web(), HOST);
    let head = format!("POST / HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {SIZE}\r\n\r\n");
    client.send([head.as_bytes(), &body].concat());
    let answer = client.answer("POST");
    assert!(answer.body == body, "{} bytes came back", answer.body.len());
}

#[test]
fn many_connections_at_once_are_served() {
    let authority = Authority::new("ca");
    let files = authority.sign(&[HOST]);
    let service = Service::ok();
    let sidelane = start(&Setup::of(service.address()), &[&listener(&[&files], "")], "");
    let connector = Arc::new(Connector::new(&authority.ca()));
    let web = sidelane.web();
    let threads = [0; 32].map(|_| {
        let connector = Arc::clone(&connector);
        std::thread::spawn(move || status(&mut connector.connect(web, HOST)))
    });
    let statuses = threads.map(|thread| thread.join().expect("no panic"));
    assert_eq!(statuses, [200; 32]);
}
