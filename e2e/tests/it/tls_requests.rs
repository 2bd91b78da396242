//! What TLS means for requests: for which hosts a connection is, where plain ones are sent, and what a
//! service is told of a client's certificate.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;
use sidelane_e2e::authority::{Authority, Files};
use sidelane_e2e::client::{Client, request};
use sidelane_e2e::peer::Peer;
use sidelane_e2e::process::{Setup, Sidelane};
use sidelane_e2e::service::{Request, Service};
use sidelane_e2e::stage::get;
use sidelane_e2e::tls::{Connector, chain};
use sidelane_e2e::tools::{Chromium, Curl, Python, tonic};
use sidelane_e2e::websocket::handshake;

use crate::browser::{Demo, until_messages};
use crate::tls_entry::{file, listener, start};

const HOST: &str = "api.localhost";
const VERSIONS: [&rustls::SupportedProtocolVersion; 2] =
    [&rustls::version::TLS13, &rustls::version::TLS12];

fn for_host(host: &str) -> String {
    format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")
}

#[test]
fn a_host_that_tls_is_not_for_is_misdirected() {
    let authority = Authority::new("ca");
    let files = authority.sign(&[HOST, "other.localhost", "*.shop.localhost", "127.0.0.1"]);
    let service = Service::ok();
    let relay = "  trusted_proxies: [127.0.0.1]\n";
    let setup = Setup::of(service.address()).websocket("{}");
    let sidelane = start(&setup, &[&listener(&[&files], "")], relay);
    let connector = Connector::new(&authority.ca());
    let table = [
        // Name in the hello (an address: none), host, status.
        (HOST, HOST, 200),
        (HOST, "API.localhost.:4711", 200),
        (HOST, "other.localhost", 421),
        (HOST, "127.0.0.1", 421),
        ("other.localhost", HOST, 421),
        ("other.localhost", "other.localhost", 404),
        ("127.0.0.1", HOST, 200),
        ("127.0.0.1", "127.0.0.1:4711", 404),
        ("127.0.0.1", "other.localhost", 404),
        ("127.0.0.1", "a.shop.localhost", 404),
        ("127.0.0.1", "a.b.shop.localhost", 421),
        ("127.0.0.1", "example.org", 421),
    ];
    for (name, host, status) in table {
        let mut client = connector.connect(sidelane.web(), name);
        client.send(for_host(host));
        let answer = client.answer("GET");
        assert_eq!(answer.head.status, status, "{name}: {host}: {answer:?}");
        if status == 421 {
            assert_eq!(answer.head.first("x-sidelane-error"), Some("misdirected"));
            let told = String::from_utf8_lossy(&answer.body).into_owned();
            assert!(told.contains("TLS is for another host"), "{name}: {host}: {told}");
            // The connection is for others still.
            client.send(for_host(name));
            assert_ne!(client.answer("GET").head.status, 421);
            let mut client = connector.connect(sidelane.web(), name);
            client.send(handshake(host, "/", ""));
            assert_eq!(client.answer("GET").head.status, 421, "{name}: {host}: WebSocket");
        }
    }
    let labels = ["role=\"relay\"", "protocol_type=\"HTTP\"", "code=\"misdirected\""];
    sidelane.until_metric("sidelane_exchanges_total", &labels, |count| count == 5.0);
}

#[test]
fn http2_and_grpc_are_told_that_they_are_misdirected() {
    let Some(curl) = Curl::find("http2_and_grpc_are_told_that_they_are_misdirected") else {
        return;
    };
    let authority = Authority::new("ca");
    let files = authority.sign(&[HOST]);
    let service = Service::ok();
    let setup = Setup::of(service.address()).grpc("{}");
    let sidelane = start(&setup, &[&listener(&[&files], "")], "");
    let ask = |arguments: &[&str]| {
        let output = curl
            .command(sidelane.web())
            .args(["--http2", "-i", "-H", "Host: other.localhost", "--cacert"])
            .arg(authority.ca())
            .args(arguments)
            .arg("https://api.localhost/")
            .output()
            .expect("curl starts");
        String::from_utf8_lossy(&output.stdout).to_lowercase()
    };
    let answer = ask(&[]);
    assert!(answer.starts_with("http/2 421"), "{answer}");
    assert!(answer.contains("x-sidelane-error: misdirected"), "{answer}");
    let answer = ask(&["-H", "content-type: application/grpc", "-H", "te: trailers", "-d", ""]);
    assert!(answer.contains("x-sidelane-error: misdirected"), "{answer}");
    assert!(answer.contains("grpc-status: ") || answer.starts_with("http/2 421"), "{answer}");
}

const REDIRECTING: &str = "{ name: http, address: \"127.0.0.2:0\", https_redirect: 8443 }";

#[test]
fn every_plain_request_is_sent_to_https() {
    let authority = Authority::new("ca");
    let files = authority.sign(&[HOST]);
    let service = Service::ok();
    let setup = Setup::of(service.address()).websocket("{}").grpc("{}");
    let sidelane = start(&setup, &[&listener(&[&files], ""), REDIRECTING], "");
    let http = sidelane.listener("http");
    let location = |method: &str, bytes: &str| {
        let answer = request(http, method, bytes);
        assert_eq!(answer.head.status, 308, "{bytes}: {answer:?}");
        if method != "HEAD" {
            assert!(answer.body.starts_with(b"see https://"), "{answer:?}");
        }
        answer.head.first("location").expect("a location").to_owned()
    };
    let to = format!("https://{HOST}:8443");
    assert_eq!(location("GET", &for_host(HOST)), format!("{to}/"));
    assert_eq!(
        location("GET", "GET /a//b?c=d&e HTTP/1.1\r\nHost: api.localhost:80\r\n\r\n"),
        format!("{to}/a//b?c=d&e")
    );
    assert_eq!(
        location("HEAD", "HEAD /x HTTP/1.0\r\nHost: api.localhost\r\n\r\n"),
        format!("{to}/x")
    );
    assert_eq!(
        location("POST", "POST / HTTP/1.1\r\nHost: api.localhost\r\nContent-Length: 2\r\n\r\nhi"),
        format!("{to}/")
    );
    assert_eq!(
        location("OPTIONS", "OPTIONS * HTTP/1.1\r\nHost: api.localhost\r\n\r\n"),
        format!("{to}/")
    );
    let socket = String::from_utf8(handshake("nobody.example", "/ws", "")).expect("text");
    assert_eq!(location("GET", &socket), "https://nobody.example:8443/ws");
    // No token of that name is known.
    let proof = "GET /.well-known/acme-challenge/x HTTP/1.1\r\nHost: api.localhost\r\n\r\n";
    assert_eq!(location("GET", proof), format!("{to}/.well-known/acme-challenge/x"));
    for bytes in
        ["GET / HTTP/1.1\r\n\r\n", "GET / HTTP/1.0\r\n\r\n", "GET / HTTP/1.1\r\nHost: a b\r\n\r\n"]
    {
        assert_eq!(request(http, "GET", bytes).head.status, 400, "{bytes}");
    }
    assert!(service.take_requests().is_empty());
    // Addresses told are those that serve.
    let routes = sidelane.admin_page("/routes");
    let expected = format!("https://{HOST}:{}/", sidelane.web().port());
    assert_eq!(routes[0]["urls"], json!([expected]), "{routes}");
    let Some(curl) = Curl::find("every_plain_request_is_sent_to_https") else { return };
    let output = curl.run(http, ["--http2-prior-knowledge", "-i", "http://api.localhost/x"]);
    let answer = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(answer.contains("location: https://api.localhost:8443/x"), "{answer}");
}

#[test]
fn clients_are_told_to_stay_with_https_by_https_alone() {
    let authority = Authority::new("ca");
    let files = authority.sign(&[HOST, "other.localhost"]);
    let own =
        "HTTP/1.1 200 OK\r\nstrict-transport-security: max-age=1\r\ncontent-length: 0\r\n\r\n";
    let service = Service::answering(own);
    let plain = "{ name: plain, address: \"127.0.0.2:0\" }";
    let relay = "  trusted_proxies: [127.0.0.3]\n";
    let setup =
        Setup::of(service.address()).route(sidelane_e2e::process::Route::new("other", "api"));
    let yaml = file(&setup, &[&listener(&[&files], ""), plain], relay).replace(
        "{ name: api, subdomain: api, tunnel: api }",
        "{ name: api, subdomain: api, tunnel: api, hsts: { max_age: 1h, include_subdomains: true } }",
    );
    let sidelane = Sidelane::start("sidelane", &yaml);
    let connector = Connector::new(&authority.ca());
    let told = |mut client: Client, host: &str| {
        client.send(for_host(host));
        let head = client.answer("GET").head;
        assert_eq!(head.status, 200);
        head.list("strict-transport-security")
    };
    let secure = |host: &str| told(connector.connect(sidelane.web(), host), host);
    let plain = |host: &str| told(Client::connect(sidelane.listener("plain")), host);
    assert_eq!(secure(HOST), "max-age=3600; includesubdomains");
    assert_eq!(plain(HOST), "");
    // What a service says where the route says nothing is the service's business.
    assert_eq!(secure("other.localhost"), "max-age=1");
    assert_eq!(plain("other.localhost"), "max-age=1");
}

/// A program that asks for clients' certificates, and its service.
struct Asking {
    authority: Authority,
    clients: Authority,
    service: Service,
    sidelane: Sidelane,
}

impl Asking {
    fn start(more: &str) -> Self {
        Self::start_with(more, "")
    }

    /// With further lines of its relay.
    fn start_with(more: &str, relay: &str) -> Self {
        let (authority, clients) = (Authority::new("ca"), Authority::new("clients"));
        let files = authority.sign(&[HOST]);
        let service = Service::ok();
        let ca = clients.ca();
        let asked = format!(", client_certificates: {{ ca: \"{}\"{more} }}", ca.display());
        let sidelane = start(&Setup::of(service.address()), &[&listener(&[&files], &asked)], relay);
        Self { authority, clients, service, sidelane }
    }

    fn connector(&self, certificate: Option<&Files>) -> Connector {
        Connector::with(&self.authority.ca(), &VERSIONS, certificate, &[])
    }

    /// What the service gets of a request with fields.
    fn gets(&self, certificate: Option<&Files>, fields: &str) -> Request {
        self.service.take_requests();
        let mut client = self.connector(certificate).connect(self.sidelane.web(), HOST);
        client.send(format!("GET / HTTP/1.1\r\nHost: {HOST}\r\n{fields}\r\n"));
        assert_eq!(client.answer("GET").head.status, 200);
        self.service.only_request()
    }

    /// Whether a client gets no answer.
    fn is_shut_out(&self, certificate: Option<&Files>) -> bool {
        // TLS 1.3 has the client done before its certificate is looked at.
        let client = self.connector(certificate).try_connect(self.sidelane.web(), HOST);
        client.is_err()
            || client.is_ok_and(|mut client| {
                client.try_send(&get("/")).is_err() || client.try_head().is_err()
            })
    }
}

const SPOOFED: &str = "Client-Cert: :AAAA:\r\nclient_cert: :AAAA:\r\nClient-Cert-Chain: :AAAA:\r\n";

fn client_fields(request: &Request) -> Vec<String> {
    let is_told = |name: &str| name.to_lowercase().starts_with("client");
    let fields = request
        .fields
        .iter()
        .map(|(name, value)| (String::from_utf8_lossy(name), String::from_utf8_lossy(value)));
    fields
        .filter(|(name, _)| is_told(name))
        .map(|(name, value)| format!("{name}: {value}").to_lowercase())
        .collect()
}

#[test]
fn a_certificate_that_is_required_is_told_where_that_is_configured() {
    let asking = Asking::start(", required: true, forward: true");
    let (known, unknown) =
        (asking.clients.sign(&["shop.internal"]), asking.authority.sign(&["evil.internal"]));
    assert!(asking.is_shut_out(None));
    assert!(asking.is_shut_out(Some(&unknown)));
    let ended = asking.clients.sign_with(&["old.internal"], |params| {
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2021, 1, 1);
    });
    assert!(asking.is_shut_out(Some(&ended)));
    let labels = ["listener=\"web\"", "result=\"certificate\""];
    asking.sidelane.until_metric("sidelane_tls_handshakes_total", &labels, |count| count == 3.0);
    let der = STANDARD.encode(&chain(&known.cert)[0]);
    let expected = format!("client-cert: :{der}:").to_lowercase();
    assert_eq!(client_fields(&asking.gets(Some(&known), "")), [expected.as_str()]);
    assert_eq!(client_fields(&asking.gets(Some(&known), SPOOFED)), [expected]);
}

#[test]
fn a_certificate_that_is_optional_is_told_or_nothing_is() {
    let asking = Asking::start(", required: false, forward: true");
    let known = asking.clients.sign(&["shop.internal"]);
    assert_eq!(client_fields(&asking.gets(None, SPOOFED)), [""; 0]);
    assert_eq!(client_fields(&asking.gets(Some(&known), SPOOFED)).len(), 1);
    let quiet = Asking::start(", required: false");
    let known = quiet.clients.sign(&["shop.internal"]);
    assert_eq!(client_fields(&quiet.gets(Some(&known), SPOOFED)), [""; 0]);
}

#[test]
fn a_client_among_trusted_proxies_tells_nothing_where_the_handshake_does() {
    let trusted = "  trusted_proxies: [127.0.0.1]\n";
    let asking = Asking::start_with(", required: false, forward: true", trusted);
    let known = asking.clients.sign(&["shop.internal"]);
    let der = STANDARD.encode(&chain(&known.cert)[0]);
    let expected = format!("client-cert: :{der}:").to_lowercase();
    assert_eq!(client_fields(&asking.gets(Some(&known), SPOOFED)), [expected]);
    assert_eq!(client_fields(&asking.gets(None, SPOOFED)), [""; 0]);
    // A proxy's word, where nothing else is told.
    let quiet = Asking::start_with(", required: false", trusted);
    assert_eq!(client_fields(&quiet.gets(None, SPOOFED)).len(), 3);
}

#[test]
fn a_plain_client_has_no_certificate_to_speak_of() {
    let service = Service::ok();
    let sidelane = Sidelane::both(&Setup::of(service.address()));
    let bytes = format!("GET / HTTP/1.1\r\nHost: {HOST}\r\n{SPOOFED}\r\n");
    assert_eq!(request(sidelane.web(), "GET", &bytes).head.status, 200);
    assert_eq!(client_fields(&service.only_request()), [""; 0]);
    // A proxy that is trusted has seen one, maybe.
    let web = "{ name: web, address: \"127.0.0.1:0\" }";
    let relay = "  trusted_proxies: [127.0.0.1]\n";
    let sidelane = start(&Setup::of(service.address()), &[web], relay);
    service.take_requests();
    assert_eq!(request(sidelane.web(), "GET", &bytes).head.status, 200);
    assert_eq!(client_fields(&service.only_request()).len(), 3);
}

#[test]
fn websocket_clients_come_by_tls() {
    let Some(python) = Python::find("websocket_clients_come_by_tls") else { return };
    let authority = Authority::new("ca");
    let files = authority.sign(&[HOST]);
    let (_peer, address) = Peer::service("websockets", python.script("ws_server.py"));
    let setup = Setup::of(address).websocket("{}");
    let sidelane = start(&setup, &[&listener(&[&files], "")], "");
    for case in ["echo", "pipelined"] {
        let mut command = python.script("ws_client.py");
        command.env("SIDELANE_E2E_CA", authority.ca());
        let seen = Peer::client("websockets", command, case, sidelane.web()).finish();
        match case {
            "echo" => {
                for kind in ["text", "binary", "repetitive", "random", "fragments", "large"] {
                    assert_eq!(seen[kind], true, "{kind}: {seen}");
                }
            }
            _ => assert_eq!(seen, json!({ "messages": 20_000, "in_order": true })),
        }
    }
}

#[test]
fn grpc_clients_come_by_tls() {
    let Some(python) = Python::find("grpc_clients_come_by_tls") else { return };
    let authority = Authority::new("ca");
    let files = authority.sign(&[HOST]);
    let (_peer, address) = Peer::service("grpcio", python.script("grpc_server.py"));
    let sidelane = start(&Setup::of(address).grpc("{}"), &[&listener(&[&files], "")], "");
    for (name, mut command) in [("grpcio", python.script("grpc_client.py")), ("tonic", tonic())] {
        command.env("SIDELANE_E2E_CA", authority.ca());
        let seen = Peer::client(name, command, "shapes", sidelane.web()).finish();
        let expected = json!({ "echo": true, "down": 1000, "in_order": true, "chat": true });
        for (key, value) in expected.as_object().expect("an object") {
            assert_eq!(&seen[key], value, "{name}: {key}: {seen}");
        }
    }
}

#[test]
fn a_browsers_page_talks_over_its_websocket_by_tls() {
    let Some(chromium) = Chromium::find("a_browsers_page_talks_over_its_websocket_by_tls") else {
        return;
    };
    let authority = Authority::new("ca");
    let files = authority.sign(&[HOST]);
    let demo = Demo::start();
    let setup = Setup::of(demo.address).websocket("{}");
    let redirecting = "{ name: http, address: \"127.0.0.1:0\", https_redirect: 443 }";
    let sidelane = start(&setup, &[&listener(&[&files], ""), redirecting], "");
    let url = format!("https://api.localhost:{}/?echo=hello", sidelane.web().port());
    // The authority is none of its own; what it says of all else is still looked at.
    let window = chromium.open_with(&url, &["--ignore-certificate-errors"]);
    let mut page = window.page();
    until_messages(&mut page, &["sent hello", "received hello"]);
    page.until("location.protocol", |scheme| scheme == "https:");
    page.until("performance.getEntriesByType('navigation')[0]?.nextHopProtocol", |protocol| {
        protocol == "h2"
    });
    page.until("document.getElementById('events')?.textContent", |events| {
        events.as_str().is_some_and(|text| text.starts_with("event "))
    });
}
