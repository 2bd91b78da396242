//! Services that are spoken to by TLS: whom the sidecar believes, what it says where it does not, and
//! which HTTP the service chooses. The services are Python's `ssl`, grpcio and `websockets`.

use std::net::SocketAddr;

use serde_json::{Value, json};
use sidelane_e2e::authority::{Authority, Files};
use sidelane_e2e::client::{Answer, Client, request};
use sidelane_e2e::peer::Peer;
use sidelane_e2e::process::{Setup, Sidelane};
use sidelane_e2e::service::Service;
use sidelane_e2e::stage::get;
use sidelane_e2e::tools::Python;
use sidelane_e2e::wait;

/// Relay and sidecar in one file, the service by https; `keys` are more of the tunnel's, `tls` those of its
/// TLS.
fn yaml(setup: &Setup, keys: &str, tls: &str) -> String {
    let yaml = setup.both();
    let at = yaml.find("service: \"").expect("a tunnel") + "service: \"".len();
    let end = at + yaml[at..].find('"').expect("a tunnel");
    let (before, service, after) = (&yaml[..at], &yaml[at..end], &yaml[end + 1..]);
    format!("{before}https://{service}\"{keys}, tls: {{ {tls} }}{after}")
}

fn sidelane(address: SocketAddr, keys: &str, tls: &str) -> Sidelane {
    Sidelane::start("sidelane", &yaml(&Setup::of(address), keys, tls))
}

fn ca(authority: &Authority) -> String {
    format!("ca: \"{}\"", authority.ca().display())
}

fn certificate(files: &Files) -> String {
    let (cert, key) = (files.cert.display(), files.key.display());
    format!("certificate: {{ cert: \"{cert}\", key: \"{key}\" }}")
}

/// Starts Python's server with a certificate.
fn serve(python: &Python, files: &Files, arguments: &[&str]) -> (Peer, SocketAddr) {
    let mut command = python.script("tls_server.py");
    command.arg(&files.cert).arg(&files.key).args(arguments);
    Peer::service("tls_server.py", command)
}

fn by_tls(python: &Python, script: &str, files: &Files) -> (Peer, SocketAddr) {
    let mut command = python.script(script);
    command.arg(&files.cert).arg(&files.key);
    Peer::service(script, command)
}

fn ask(sidelane: &Sidelane) -> Answer {
    request(sidelane.web(), "GET", get("/"))
}

/// What the service saw.
fn seen(answer: &Answer) -> Value {
    serde_json::from_slice(&answer.body).unwrap_or_else(|error| panic!("{answer:?}: {error}"))
}

fn until_healthy(sidelane: &Sidelane) {
    wait::until("a good check", || {
        let page = sidelane.admin_page("/tunnels");
        assert_eq!(page["services"][0]["tls"], true, "{page}");
        (page["services"][0]["health"] == "healthy").then_some(())
    });
}

/// Asks, is refused, and returns the reason that the log tells.
fn refused(sidelane: &Sidelane, line: &str) -> String {
    let answer = ask(sidelane);
    assert_eq!(answer.head.status, 502, "{answer:?}");
    let error = answer.head.first("x-sidelane-error").unwrap_or_default();
    assert!(["service-unreachable", "service-reset"].contains(&error), "{answer:?}");
    wait::until(line, || {
        sidelane.log().lines().find(|told| told.contains(line)).map(ToOwned::to_owned)
    })
}

const CANNOT: &str = "cannot connect to the service";
const LOCAL: &[&str] = &["127.0.0.1"];

#[test]
fn service_by_tls_is_reached_over_http_1_1_and_its_session_resumed() {
    let test = "service_by_tls_is_reached_over_http_1_1_and_its_session_resumed";
    let Some(python) = Python::find(test) else { return };
    let authority = Authority::new("e2e");
    let (peer, address) = serve(&python, &authority.sign(LOCAL), &[]);
    let sidelane = sidelane(address, ", pool: { idle: 0 }", &ca(&authority));
    for _ in 0..3 {
        let seen = seen(&ask(&sidelane));
        assert_eq!(seen["http"], "HTTP/1.1", "{seen}");
        assert_eq!(seen["tls"], "TLSv1.3", "{seen}");
        assert_eq!(seen["host"], "api.localhost", "{seen}");
        assert_eq!((&seen["alpn"], &seen["sni"]), (&Value::Null, &Value::Null), "{seen}");
    }
    drop(sidelane);
    let counted = peer.finish();
    assert_eq!(counted, json!({ "connections": 3, "resumed": 2, "failed": 0 }));
}

#[test]
fn service_that_chooses_http_2_is_spoken_to_by_it() {
    let Some(python) = Python::find("service_that_chooses_http_2_is_spoken_to_by_it") else {
        return;
    };
    let authority = Authority::new("e2e");
    let files = authority.sign(LOCAL);
    let (peer, address) = serve(&python, &files, &["--alpn", "h2,http/1.1"]);
    let auto = sidelane(address, "", &ca(&authority));
    for _ in 0..3 {
        let seen = seen(&ask(&auto));
        assert_eq!(seen["http"], "HTTP/2", "{seen}");
        assert_eq!((&seen["alpn"], &seen["scheme"]), (&json!("h2"), &json!("https")), "{seen}");
    }
    drop(auto);
    assert_eq!(peer.finish()["connections"], 1);

    let (_peer, address) = serve(&python, &files, &["--alpn", "h2,http/1.1"]);
    let one = sidelane(address, ", http_version: 1", &ca(&authority));
    let told = seen(&ask(&one));
    assert_eq!((&told["http"], &told["alpn"]), (&json!("HTTP/1.1"), &json!("http/1.1")), "{told}");

    // Knows nothing of ALPN.
    let (_peer, address) = serve(&python, &files, &[]);
    let two = sidelane(address, ", http_version: 2", &ca(&authority));
    let answer = ask(&two);
    assert_eq!(answer.head.status, 502, "{answer:?}");
    assert_eq!(answer.head.first("x-sidelane-error"), Some("service-invalid"));
}

#[test]
fn name_that_is_asked_for_is_told_to_the_service() {
    let Some(python) = Python::find("name_that_is_asked_for_is_told_to_the_service") else {
        return;
    };
    let authority = Authority::new("e2e");
    let (_peer, address) = serve(&python, &authority.sign(&["app.internal"]), &[]);
    let tls = format!("{}, server_name: app.internal", ca(&authority));
    assert_eq!(seen(&ask(&sidelane(address, "", &tls)))["sni"], "app.internal");

    let wrong = sidelane(address, "", &ca(&authority));
    let reason = refused(&wrong, CANNOT);
    assert!(reason.contains("is for app.internal and not for 127.0.0.1"), "{reason}");
    assert!(reason.contains("`tls.server_name`"), "{reason}");
}

#[test]
fn unknown_authority_is_refused_unless_nothing_is_verified() {
    let test = "unknown_authority_is_refused_unless_nothing_is_verified";
    let Some(python) = Python::find(test) else { return };
    let (authority, other) = (Authority::new("e2e"), Authority::new("other"));
    let (_peer, address) = serve(&python, &authority.sign(LOCAL), &[]);
    let check = ", health_check: { type: tcp }";
    let wrong = Sidelane::spawn("sidelane", &yaml(&Setup::of(address), "", &ca(&other)));
    let reason = refused(&wrong, CANNOT);
    assert!(reason.contains("signed by none of the authorities in "), "{reason}");
    assert!(reason.contains("`tls.ca`"), "{reason}");

    // What a check finds stands on the admin page too.
    let checked = Sidelane::spawn("sidelane", &yaml(&Setup::of(address), check, &ca(&other)));
    wait::until("a failed check", || {
        let page = checked.admin_page("/tunnels");
        let told = page["services"][0]["unavailable"].as_str().unwrap_or_default().to_owned();
        (told.contains("`tls.ca`") && page["services"][0]["health"] == "unhealthy").then_some(())
    });

    let anybody = sidelane(address, check, "insecure_skip_verify: true");
    assert_eq!(seen(&ask(&anybody))["http"], "HTTP/1.1");
    let log = anybody.log();
    let warned = log.lines().any(|l| l.contains("WARN") && l.contains("insecure_skip_verify"));
    assert!(warned, "{log}");
}

#[test]
fn expired_certificate_is_refused() {
    let Some(python) = Python::find("expired_certificate_is_refused") else { return };
    let authority = Authority::new("e2e");
    let files = authority.sign_with(LOCAL, |params| {
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2021, 1, 1);
    });
    let (_peer, address) = serve(&python, &files, &[]);
    let reason = refused(&sidelane(address, "", &ca(&authority)), CANNOT);
    assert!(reason.contains("certificate has expired"), "{reason}");
}

#[test]
fn client_certificate_is_shown_where_the_service_asks() {
    let Some(python) = Python::find("client_certificate_is_shown_where_the_service_asks") else {
        return;
    };
    let authority = Authority::new("e2e");
    let clients = authority.ca();
    let arguments = ["--clients", clients.to_str().expect("a path of ours")];
    let (_peer, address) = serve(&python, &authority.sign(LOCAL), &arguments);
    let own = authority.sign(&["sidecar.internal"]);
    let tls = format!("{}, {}", ca(&authority), certificate(&own));
    assert_eq!(seen(&ask(&sidelane(address, "", &tls)))["client"], "sidecar.internal");

    // With TLS 1.3 the service says so on a connection that stands.
    let without = sidelane(address, "", &ca(&authority));
    let reason = refused(&without, "the service broke off a TLS connection");
    assert!(reason.contains("wants a client certificate; `tls.certificate`"), "{reason}");
}

#[test]
fn certificate_that_is_replaced_is_taken_by_reload() {
    let Some(python) = Python::find("certificate_that_is_replaced_is_taken_by_reload") else {
        return;
    };
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    let (_peer, address) = serve(&python, &new.sign(LOCAL), &[]);
    let sidelane = sidelane(address, "", &ca(&old));
    refused(&sidelane, CANNOT);
    let trusted = std::fs::read(old.ca()).expect("the directory is ours");
    let trust = |pem: &[u8]| {
        std::fs::write(old.ca(), pem).expect("the directory is ours");
        let (status, told) = sidelane.reload();
        assert_eq!(status, 200, "{told}");
    };
    trust(&std::fs::read(new.ca()).expect("the directory is ours"));
    assert_eq!(seen(&ask(&sidelane))["http"], "HTTP/1.1");
    // The connection that is kept, and its session, were made by what is believed no more.
    trust(&trusted);
    assert_eq!(ask(&sidelane).head.status, 502);
}

#[test]
fn service_that_speaks_no_tls_is_told_so() {
    let authority = Authority::new("e2e");
    let service = Service::start(|connection| {
        // A record's header is all that it takes to see that this is no request.
        connection.exactly(5)?;
        connection.write("HTTP/1.1 400 Bad Request\r\n\r\n")
    });
    let sidelane = sidelane(service.address(), "", &ca(&authority));
    let reason = refused(&sidelane, CANNOT);
    assert!(reason.contains("not by TLS") || reason.contains("speaks no TLS"), "{reason}");
}

#[test]
fn body_that_is_cut_off_is_not_taken_for_whole() {
    let Some(python) = Python::find("body_that_is_cut_off_is_not_taken_for_whole") else { return };
    let authority = Authority::new("e2e");
    let (_peer, address) = serve(&python, &authority.sign(LOCAL), &[]);
    let sidelane = sidelane(address, "", &ca(&authority));
    let whole = request(sidelane.web(), "GET", get("/closed"));
    assert_eq!(whole.body, b"all there is", "{whole:?}");
    let mut client = Client::connect(sidelane.web());
    client.send(get("/truncated"));
    // The head may be out already; then the body's chunks have no end.
    let cut = client.try_answer("GET");
    assert!(cut.as_ref().is_err() || cut.as_ref().is_ok_and(|a| a.head.status == 502), "{cut:?}");
    sidelane.until_metric("sidelane_exchanges_in_flight", &[], |count| count == 0.0);
}

#[test]
fn grpc_by_tls_passes_and_its_health_is_asked() {
    let Some(python) = Python::find("grpc_by_tls_passes_and_its_health_is_asked") else { return };
    let authority = Authority::new("e2e");
    let (_peer, address) = by_tls(&python, "grpc_server.py", &authority.sign(LOCAL));
    let check = ", health_check: { type: grpc, service: e2e.Peer }";
    let setup = Setup::of(address).grpc("{}");
    let sidelane = Sidelane::start("sidelane", &yaml(&setup, check, &ca(&authority)));
    let script = python.script("grpc_client.py");
    let seen = Peer::client("grpcio", script, "shapes", sidelane.web()).finish();
    assert_eq!((&seen["echo"], &seen["down"]), (&true.into(), &1000.into()), "{seen}");
    until_healthy(&sidelane);

    // A service that knows nothing of ALPN speaks no gRPC.
    let (_peer, address) = serve(&python, &authority.sign(LOCAL), &[]);
    let setup = Setup::of(address).grpc("{}");
    let sidelane = Sidelane::spawn("sidelane", &yaml(&setup, check, &ca(&authority)));
    wait::until("a failed check", || {
        let page = sidelane.admin_page("/tunnels");
        let told = page["services"][0]["unavailable"].as_str().unwrap_or_default().to_owned();
        told.contains("did not agree on HTTP/2 (ALPN)").then_some(())
    });
}

#[test]
fn websocket_by_tls_passes() {
    let Some(python) = Python::find("websocket_by_tls_passes") else { return };
    let authority = Authority::new("e2e");
    let (_peer, address) = by_tls(&python, "ws_server.py", &authority.sign(LOCAL));
    let setup = Setup::of(address).websocket("{}");
    let sidelane = Sidelane::start("sidelane", &yaml(&setup, "", &ca(&authority)));
    let script = python.script("ws_client.py");
    let seen = Peer::client("websockets", script, "echo", sidelane.web()).finish();
    for kind in ["text", "binary", "empty", "random", "fragments", "large", "pong"] {
        assert_eq!(seen[kind], true, "{kind}: {seen}");
    }
}

#[test]
fn http_health_is_asked_over_what_the_service_chooses() {
    let Some(python) = Python::find("http_health_is_asked_over_what_the_service_chooses") else {
        return;
    };
    let authority = Authority::new("e2e");
    for alpn in [&["--alpn", "h2"][..], &["--alpn", "http/1.1"], &[]] {
        let (_peer, address) = serve(&python, &authority.sign(LOCAL), alpn);
        let check = ", health_check: { type: http }";
        let sidelane = sidelane(address, check, &ca(&authority));
        until_healthy(&sidelane);
    }
}
