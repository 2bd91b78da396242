//! Lanes on other carriers than TCP, through proxies and ingresses; and what the tunnel's port says to whom
//! it is no port for.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;

use serde_json::json;
use sidelane_e2e::authority::{Authority, Files};
use sidelane_e2e::client::{Answer, Client, request};
use sidelane_e2e::connect::ConnectProxy;
use sidelane_e2e::fault::{Fault, Wire};
use sidelane_e2e::nginx::{Ingress, Nginx};
use sidelane_e2e::peer::Peer;
use sidelane_e2e::process::{Route, Setup, Sidelane};
use sidelane_e2e::service::Service;
use sidelane_e2e::stage::get;
use sidelane_e2e::tools::{Curl, tonic};
use sidelane_e2e::wait;
use sidelane_e2e::websocket::Socket;

const TOKEN: &str = "correct-horse-battery-staple";

/// More than any window or buffer on the way.
const BULK_BYTES: usize = 24 << 20;

/// Answers `ok`, echoes WebSockets, sends [`BULK_BYTES`] at `/bulk`, and counts what is sent to it.
fn service() -> Service {
    Service::start(|connection| {
        while let Some(request) = connection.request()? {
            if request.has("upgrade") {
                connection.upgrade(&request, "")?;
                return connection.echo();
            }
            if request.target == b"/bulk" {
                connection.stop_recording();
                let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {BULK_BYTES}\r\n\r\n");
                connection.write(head)?;
                for at in (0..BULK_BYTES).step_by(bulk_piece(0).len()) {
                    connection.write(bulk_piece(at))?;
                }
                continue;
            }
            let body = connection.body(&request)?;
            let text = format!("{} ok", body.bytes.len());
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", text.len());
            connection.write(head + &text)?;
        }
        Ok(())
    })
}

/// The bytes of a bulk transfer from a place on.
fn bulk_piece(at: usize) -> Vec<u8> {
    let number = u64::try_from(at).expect("it fits");
    (0..4096_u64).flat_map(|n| (number + n).to_be_bytes()).collect()
}

fn setup(service: &Service) -> Setup {
    let mut setup = Setup::of(service.address()).websocket("{}").grpc("{}");
    setup.relay_token = Some(TOKEN.to_owned());
    setup.sidecar_token = Some(TOKEN.to_owned());
    setup
}

/// A relay's file with these keys of `relay.tunnel` beside its address and token.
fn relay_yaml(setup: &Setup, tunnel: &str, relay: &str) -> String {
    let plain = format!("  tunnel: {{ address: \"127.0.0.1:0\", token: \"{TOKEN}\" }}");
    let yaml = setup.relay();
    assert!(yaml.contains(&plain), "{yaml}");
    let keys =
        format!("{relay}  tunnel: {{ address: \"127.0.0.1:0\", token: \"{TOKEN}\"{tunnel} }}");
    yaml.replace(&plain, &keys)
}

/// A sidecar's file with this in place of its relay.
fn sidecar_yaml(setup: &Setup, relay: &str) -> String {
    let nowhere = SocketAddr::from(([127, 0, 0, 1], 9));
    let plain = format!("relays: [\"{nowhere}\"]");
    let yaml = setup.sidecar(nowhere);
    assert!(yaml.contains(&plain), "{yaml}");
    yaml.replace(&plain, relay)
}

fn shows(files: &Files) -> String {
    let (cert, key) = (files.cert.display(), files.key.display());
    format!(", tls: {{ certificates: [{{ cert: \"{cert}\", key: \"{key}\" }}] }}")
}

fn relays(url: &str, ca: Option<&Path>, more: &str) -> String {
    let tls = ca.map(|ca| format!(", tls: {{ ca: \"{}\" }}", ca.display())).unwrap_or_default();
    format!("relays: [{{ address: \"{url}\"{tls}{more} }}]")
}

fn ask(relay: &Sidelane) -> Answer {
    request(relay.web(), "GET", get("/"))
}

fn until_served(relay: &Sidelane) {
    wait::until("the announcement", || (ask(relay).head.status == 200).then_some(()));
}

/// Waits until a log has a line with all of these.
fn until_logged(side: &Sidelane, parts: &[&str]) -> String {
    wait::until(&format!("{parts:?} in the log"), || {
        let log = side.log();
        let line = log.lines().find(|line| parts.iter().all(|part| line.contains(part)));
        line.map(str::to_owned)
    })
}

/// Every lane of both ends runs on `carrier`.
fn runs_on(relay: &Sidelane, sidecar: &Sidelane, carrier: &str) {
    for (side, role) in [(relay, "relay"), (sidecar, "sidecar")] {
        let lanes = |carrier: &str| {
            let labels = [format!("role=\"{role}\""), format!("carrier=\"{carrier}\"")];
            let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
            side.metric("sidelane_lane_connections", &labels).unwrap_or(0.0)
        };
        wait::until("both lanes", || (lanes(carrier) == 2.0).then_some(()));
        let all: f64 = ["tcp", "websocket", "grpc"].into_iter().map(lanes).sum();
        assert!((all - 2.0).abs() < 0.1, "{role}: {all} on all carriers");
    }
}

/// HTTP, a WebSocket, bulk both ways, and gRPC from end to end.
fn everything_passes(relay: &Sidelane) {
    let answer = ask(relay);
    assert_eq!((answer.head.status, &*answer.body), (200, &b"0 ok"[..]));
    let mut socket = Socket::open(relay.web());
    socket.says_back("through the carrier");
    let mut client = Client::connect(relay.web());
    client.send(get("/bulk"));
    assert_eq!(client.head().status, 200);
    for at in (0..BULK_BYTES).step_by(bulk_piece(0).len()) {
        let expected = bulk_piece(at);
        assert!(client.exactly(expected.len()).expect("it flows") == expected, "at {at}");
    }
    let mut sent =
        format!("POST /up HTTP/1.1\r\nHost: api.localhost\r\ncontent-length: {BULK_BYTES}\r\n\r\n")
            .into_bytes();
    sent.resize(sent.len() + BULK_BYTES, b'u');
    let answer = request(relay.web(), "POST", &sent);
    assert_eq!(String::from_utf8_lossy(&answer.body), format!("{BULK_BYTES} ok"));
    socket.says_back("still");
    let seen = Peer::client("tonic", tonic(), "unary", relay.web()).finish();
    assert_eq!(seen["error"], json!(null), "{seen}");
}

/// A gRPC service behind the same host.
fn with_grpc(setup: Setup) -> (Setup, Peer) {
    let mut command = tonic();
    command.arg("serve");
    let (peer, address) = Peer::service("tonic", command);
    let route = Route::new("api", "grpc").under("/e2e.Peer/").named("grpc");
    (setup.tunnel("grpc", address).route(route), peer)
}

#[test]
fn everything_passes_over_each_carrier_plain() {
    let service = service();
    let (setup, _grpc) = with_grpc(setup(&service));
    for (scheme, carrier) in [("tcp", "tcp"), ("ws", "websocket"), ("grpc", "grpc")] {
        let relay = Sidelane::spawn("relay", &relay_yaml(&setup, "", ""));
        let url = format!("{scheme}://{}", relay.tunnel());
        let sidecar =
            Sidelane::start("sidecar", &sidecar_yaml(&setup, &format!("relays: [\"{url}\"]")));
        until_served(&relay);
        runs_on(&relay, &sidecar, carrier);
        everything_passes(&relay);
        let line = until_logged(&sidecar, &["lane up", carrier]);
        assert!(!line.contains(TOKEN), "{line}");
    }
}

#[test]
fn everything_passes_over_each_carrier_by_tls() {
    let service = service();
    let (setup, _grpc) = with_grpc(setup(&service));
    let authority = Authority::new("e2e");
    let files = authority.sign(&["127.0.0.1"]);
    for (scheme, carrier) in [("tls", "tcp"), ("wss", "websocket"), ("grpcs", "grpc")] {
        // Lanes go from the thread that shakes hands to their own.
        let threads = |yaml: String, role: &str| {
            yaml.replace(&format!("{role}:\n"), &format!("{role}:\n  threads: 2\n"))
        };
        let yaml = threads(relay_yaml(&setup, &shows(&files), ""), "relay");
        let relay = Sidelane::spawn("relay", &yaml);
        let url = format!("{scheme}://{}", relay.tunnel());
        let yaml = sidecar_yaml(&setup, &relays(&url, Some(&authority.ca()), ""));
        let sidecar = Sidelane::start("sidecar", &threads(yaml, "sidecar"));
        until_served(&relay);
        runs_on(&relay, &sidecar, carrier);
        everything_passes(&relay);
    }
}

#[test]
fn an_ingress_of_nginx_passes_each_carrier() {
    let service = service();
    let (setup, _grpc) = with_grpc(setup(&service));
    let authority = Authority::new("e2e");
    let files = authority.sign(&["127.0.0.1"]);
    let proxies = "  trusted_proxies: [127.0.0.1]\n";
    for (name, scheme, carrier) in
        [("TCP", "tcp", "tcp"), ("WebSocket", "wss", "websocket"), ("gRPC", "grpcs", "grpc")]
    {
        let relay = Sidelane::spawn("relay", &relay_yaml(&setup, "", proxies));
        let ingress = if carrier == "tcp" { Ingress::Tcp } else { Ingress::Http(&files) };
        let test = format!("an ingress of nginx for {name}");
        let Some(nginx) = Nginx::start(&test, ingress, relay.tunnel()) else { continue };
        let url = format!("{scheme}://{}", nginx.address());
        let ca = authority.ca();
        let ca = (carrier != "tcp").then_some(&*ca);
        let yaml = sidecar_yaml(&setup, &relays(&url, ca, ""));
        let sidecar = Sidelane::start("sidecar", &yaml);
        until_served(&relay);
        runs_on(&relay, &sidecar, carrier);
        everything_passes(&relay);
    }
}

#[test]
fn who_is_passed_on_by_a_proxy_is_not_taken_for_this_machine() {
    let service = Service::ok();
    let authority = Authority::new("e2e");
    let files = authority.sign(&["127.0.0.1"]);
    // Nobody needs a token, and both ends are on loopback: the ingress's.
    let setup = Setup::of(service.address());
    let relay = Sidelane::spawn("relay", &setup.relay());
    let test = "loopback behind an ingress";
    let Some(nginx) = Nginx::start(test, Ingress::Http(&files), relay.tunnel()) else { return };
    let url = format!("wss://{}", nginx.address());
    let yaml = sidecar_yaml(&setup, &relays(&url, Some(&authority.ca()), ""));
    let sidecar = Sidelane::spawn("sidecar", &yaml);
    until_logged(&relay, &["sidecar refused", "loopback"]);
    until_logged(&sidecar, &["refuses this sidecar's credential", "over loopback only"]);
}

#[test]
fn a_relay_is_reached_through_a_proxy_by_connect() {
    let service = service();
    let setup = setup(&service);
    let authority = Authority::new("e2e");
    let files = authority.sign(&["127.0.0.1"]);
    for (scheme, carrier) in [("tls", "tcp"), ("wss", "websocket"), ("grpcs", "grpc")] {
        let open = ConnectProxy::start(None);
        let closed = ConnectProxy::start(Some("me:p@ss"));
        let relay = Sidelane::spawn("relay", &relay_yaml(&setup, &shows(&files), ""));
        let url = format!("{scheme}://{}", relay.tunnel());
        for (proxy, credentials) in [(&open, ""), (&closed, "me:p%40ss@")] {
            let address = proxy.address();
            let through = format!(
                "{}\n  proxy: \"http://{credentials}{address}\"",
                relays(&url, Some(&authority.ca()), "")
            );
            let sidecar = Sidelane::start("sidecar", &sidecar_yaml(&setup, &through));
            until_served(&relay);
            runs_on(&relay, &sidecar, carrier);
            let answer = ask(&relay);
            assert_eq!(&*answer.body, b"0 ok");
            let heads = proxy.heads();
            assert!(heads.len() >= 2, "a lane each: {heads:?}");
            let asked = format!("CONNECT {} HTTP/1.1\r\n", relay.tunnel());
            assert!(heads.iter().all(|head| head.starts_with(&asked)), "{heads:?}");
            let shown = sidecar.admin_page("/config").to_string() + &sidecar.log();
            assert!(!shown.contains("p@ss") && !shown.contains("p%40ss"), "{shown}");
        }
    }
}

#[test]
fn a_proxy_that_lets_nobody_through_is_told_with_its_answer() {
    let service = Service::ok();
    let setup = setup(&service);
    let proxy = ConnectProxy::start(Some("me:secret"));
    let free = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let nobody = free.local_addr().expect("its address");
    drop(free);
    let address = proxy.address();
    for (target, through, expected) in [
        (nobody, format!("http://me:secret@{address}"), "answered 502 Bad Gateway to CONNECT"),
        (nobody, format!("http://{address}"), "answered 407 to CONNECT"),
        (nobody, format!("http://me:wrong@{address}"), "it wants credentials (Basic realm"),
        (nobody, format!("http://{nobody}"), "cannot be reached"),
    ] {
        let yaml = format!("relays: [\"tls://{target}\"]\n  proxy: \"{through}\"");
        let sidecar = Sidelane::spawn("sidecar", &sidecar_yaml(&setup, &yaml));
        let line = until_logged(&sidecar, &["no session", expected]);
        assert!(!line.contains("secret") && !line.contains("wrong"), "{line}");
    }
}

#[test]
fn a_way_that_fails_gives_place_to_the_next_and_is_tried_first_again() {
    let service = service();
    let setup = setup(&service);
    let relay = Sidelane::spawn("relay", &relay_yaml(&setup, "", ""));
    let closed = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let nobody = closed.local_addr().expect("its address");
    drop(closed);
    let web = relay.web();
    let tunnel = relay.tunnel();
    // Nobody listens; clients' port answers by HTTP that it is no tunnel; then the relay.
    let fallback = format!(", fallback: [\"ws://{web}/tunnel\", \"grpc://{tunnel}\"]");
    let yaml = sidecar_yaml(&setup, &relays(&nobody.to_string(), None, &fallback));
    let sidecar = Sidelane::start("sidecar", &yaml);
    until_served(&relay);
    runs_on(&relay, &sidecar, "grpc");
    until_logged(&sidecar, &["a way to the relay fails", "cannot connect"]);
    until_logged(&sidecar, &["a way to the relay fails", "it answers HTTP 404"]);
    let page = sidecar.admin_page("/tunnels").to_string();
    assert!(page.contains("\"carrier\":\"grpc\""), "{page}");
}

#[test]
fn when_no_way_leads_to_the_relay_each_is_told() {
    let service = Service::ok();
    let setup = setup(&service);
    let relay = Sidelane::spawn("relay", &setup.relay());
    let closed = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let nobody = closed.local_addr().expect("its address");
    drop(closed);
    let fallback = format!(", fallback: [\"ws://{}/tunnel\"]", relay.web());
    let yaml = sidecar_yaml(&setup, &relays(&nobody.to_string(), None, &fallback));
    let sidecar = Sidelane::spawn("sidecar", &yaml);
    until_logged(&sidecar, &["is reached in no way", "cannot connect", "it answers HTTP 404"]);
}

#[test]
fn who_asks_the_tunnels_port_by_http_is_told_what_it_is() {
    let service = Service::ok();
    let setup = setup(&service);
    let relay = Sidelane::spawn("relay", &setup.relay());
    let upgrade = "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
                   sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    for (name, method, target, fields, status) in [
        ("a health check", "GET", "/", "", 200),
        ("a look", "HEAD", "/", "", 200),
        ("another path", "GET", "/healthz", "", 404),
        ("no upgrade", "GET", "/tunnel", "", 426),
        ("a page in a browser", "GET", "/tunnel", "origin: http://localhost\r\n", 403),
        ("another path's upgrade", "GET", "/other", upgrade, 404),
        ("a large head", "GET", "/", &format!("x: {}\r\n", "y".repeat(32 * 1024)), 431),
    ] {
        let bytes = format!("{method} {target} HTTP/1.1\r\nhost: relay\r\n{fields}\r\n");
        let mut client = Client::connect(relay.tunnel());
        // Of a large head not all need be read.
        let _ = client.try_send(bytes.as_bytes());
        let answer = client.answer(method);
        assert_eq!(answer.head.status, status, "{name}: {answer:?}");
        if method == "GET" && status != 431 {
            let text = String::from_utf8_lossy(&answer.body);
            assert!(text.starts_with("this is a Sidelane relay's port for sidecars"), "{text}");
        }
        assert_eq!(client.rest(), b"", "{name}: it closes");
    }
    if let Some(curl) = Curl::find("who_asks_the_tunnels_port_by_http_is_told_what_it_is") {
        for (target, status) in [("/", "200"), ("/healthz", "404")] {
            let url = format!("http://relay{target}");
            let arguments = ["--http2-prior-knowledge", "--write-out", "%{http_code}", &url];
            let output = curl.run(relay.tunnel(), arguments);
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(text.starts_with("this is a Sidelane relay's port for sidecars"), "{output:?}");
            assert!(text.ends_with(status), "{output:?}");
        }
    }
    // None of them was held against this address.
    let sidecar = Sidelane::start("sidecar", &setup.sidecar(relay.tunnel()));
    until_served(&relay);
    drop(sidecar);
}

#[test]
fn a_peer_of_tonics_is_as_good_as_ours_at_either_end() {
    let service = service();
    let (setup, _grpc) = with_grpc(setup(&service));
    for (case, scheme, carrier) in [("to-grpc", "tcp", "grpc"), ("to-tcp", "grpc", "tcp")] {
        let relay = Sidelane::spawn("relay", &relay_yaml(&setup, "", ""));
        let mut command = tonic();
        let tunnel = relay.tunnel();
        command.args([case, &tunnel.ip().to_string(), &tunnel.port().to_string()]);
        let (_bridge, address) = Peer::service(case, command);
        let url = format!("relays: [\"{scheme}://{address}\"]");
        let _sidecar = Sidelane::start("sidecar", &sidecar_yaml(&setup, &url));
        until_served(&relay);
        let labels = ["role=\"relay\"", &format!("carrier=\"{carrier}\"")];
        relay.until_metric("sidelane_lane_connections", &labels, |lanes| lanes == 2.0);
        everything_passes(&relay);
    }
}

#[test]
fn a_download_goes_on_over_each_carrier_when_its_connections_are_cut() {
    let service = service();
    let setup = setup(&service);
    for scheme in ["tcp", "ws", "grpc"] {
        let relay = Sidelane::spawn("relay", &relay_yaml(&setup, "", ""));
        let wire = Wire::to(relay.tunnel());
        let url = format!("relays: [\"{scheme}://{}\"]", wire.address());
        let sidecar = Sidelane::start("sidecar", &sidecar_yaml(&setup, &url));
        until_served(&relay);
        let carrier = sidecar.admin_page("/tunnels");
        let carrier =
            carrier["relays"][0]["lanes"][0]["carrier"].as_str().expect("a carrier").to_owned();
        let mut client = Client::connect(relay.web());
        client.send(get("/bulk"));
        assert_eq!(client.head().status, 200);
        let piece = bulk_piece(0).len();
        for (number, at) in (0..BULK_BYTES).step_by(piece).enumerate() {
            if number % 150 == 50 {
                assert!(wire.harm(Fault::Cut) > 0, "{scheme}");
            }
            let expected = bulk_piece(at);
            assert!(client.exactly(piece).expect("it goes on") == expected, "{scheme} at {at}");
        }
        until_logged(&relay, &["lane is back", &carrier]);
        runs_on(&relay, &sidecar, &carrier);
    }
}

#[test]
fn a_lane_comes_back_by_another_carrier_where_the_first_ones_port_is_closed() {
    let service = service();
    let setup = setup(&service);
    let relay = Sidelane::spawn("relay", &relay_yaml(&setup, "", ""));
    let (first, second) = (Wire::to(relay.tunnel()), Wire::to(relay.tunnel()));
    let fallback =
        format!(", fallback: [\"ws://{}\", \"grpc://{}\"]", second.address(), relay.tunnel());
    let yaml = sidecar_yaml(&setup, &relays(&first.address().to_string(), None, &fallback));
    let sidecar = Sidelane::start("sidecar", &yaml);
    until_served(&relay);
    runs_on(&relay, &sidecar, "tcp");
    let mut client = Client::connect(relay.web());
    client.send(get("/bulk"));
    assert_eq!(client.head().status, 200);
    let piece = bulk_piece(0).len();
    for (number, at) in (0..BULK_BYTES).step_by(piece).enumerate() {
        match number {
            100 => {
                first.down();
                first.harm(Fault::Cut);
            }
            300 => {
                runs_on(&relay, &sidecar, "websocket");
                second.down();
                second.harm(Fault::Cut);
            }
            500 => {
                runs_on(&relay, &sidecar, "grpc");
                first.up();
                // The first way is tried first again.
                assert!(sidecar.log().contains("a way to the relay fails"));
            }
            _ => {}
        }
        let expected = bulk_piece(at);
        assert!(client.exactly(piece).expect("it goes on") == expected, "at {at}");
    }
    for carrier in ["websocket", "grpc"] {
        until_logged(&sidecar, &["lane is back", carrier]);
    }
}
