//! WebSocket clients and services that nobody here wrote, each client against each service, over
//! HTTP/1.1, HTTP/2, and in a browser.

use std::net::SocketAddr;

use serde_json::Value;
use sidelane_e2e::client::request;
use sidelane_e2e::peer::Peer;
use sidelane_e2e::process::{Setup, Sidelane};
use sidelane_e2e::stage::Stage;
use sidelane_e2e::tools::{Chromium, Node, Python};
use sidelane_e2e::websocket::KEY;

/// Both sets of peers.
struct Peers {
    python: Python,
    node: Node,
}

impl Peers {
    fn find(test: &str) -> Option<Self> {
        Some(Self { python: Python::find(test)?, node: Node::find(test)? })
    }

    fn service(&self, name: &str) -> (Peer, SocketAddr) {
        match name {
            "websockets" => Peer::service(name, self.python.script("ws_server.py")),
            _ => Peer::service(name, self.node.script("server.mjs")),
        }
    }

    fn ask(&self, name: &str, case: &str, relay: SocketAddr) -> Value {
        let command = match name {
            "websockets" => self.python.script("ws_client.py"),
            _ => self.node.script("client.mjs"),
        };
        Peer::client(name, command, case, relay).finish()
    }
}

const NAMES: [&str; 2] = ["websockets", "ws"];

/// Runs a case of each client against each service, and returns what each saw.
fn each_pair(test: &str, case: &str) -> Vec<(String, Value)> {
    let Some(peers) = Peers::find(test) else { return Vec::new() };
    let mut all = Vec::new();
    for service in NAMES {
        let (_peer, address) = peers.service(service);
        let sidelane = Sidelane::both(&Setup::of(address).websocket("{}"));
        for client in NAMES {
            let seen = peers.ask(client, case, sidelane.web());
            all.push((format!("{client} to {service}"), seen));
        }
        sidelane.until_metric("sidelane_exchanges_in_flight", &[], |count| count == 0.0);
    }
    all
}

#[test]
fn messages_of_every_kind_come_back_compressed() {
    for (pair, seen) in each_pair("messages_of_every_kind_come_back_compressed", "echo") {
        echoed(&pair, &seen);
        let extensions = seen["extensions"].as_str();
        assert!(extensions.is_some_and(|all| all.contains("permessage-deflate")), "{pair}: {seen}");
    }
}

#[test]
fn messages_of_every_kind_come_back_plain() {
    for (pair, seen) in each_pair("messages_of_every_kind_come_back_plain", "echo-plain") {
        echoed(&pair, &seen);
        assert_eq!(seen["extensions"], Value::Null, "{pair}");
    }
}

fn echoed(pair: &str, seen: &Value) {
    for kind in ["text", "binary", "empty", "repetitive", "random", "fragments", "large", "pong"] {
        assert_eq!(seen[kind], true, "{pair}: {kind}: {seen}");
    }
    assert_eq!((&seen["code"], &seen["reason"]), (&4000.into(), &"goodbye: käse".into()), "{pair}");
}

#[test]
fn subprotocol_is_the_services_choice() {
    for (pair, seen) in each_pair("subprotocol_is_the_services_choice", "subprotocol") {
        assert_eq!((&seen["subprotocol"], &seen["same"]), (&"v2".into(), &true.into()), "{pair}");
    }
}

#[test]
fn refusal_reaches_the_client() {
    for (pair, seen) in each_pair("refusal_reaches_the_client", "refused") {
        assert_eq!(seen["status"], 403, "{pair}: {seen}");
        assert_eq!(seen["why"], serde_json::json!(["first", "second"]), "{pair}");
        assert_eq!(seen["cookies"], serde_json::json!(["a=1", "b=2"]), "{pair}");
        assert_eq!(seen["body"], "not for you\n", "{pair}");
    }
}

#[test]
fn close_of_the_service_reaches_the_client() {
    for (pair, seen) in each_pair("close_of_the_service_reaches_the_client", "closed") {
        assert_eq!(seen["code"], 4321, "{pair}: {seen}");
        assert_eq!(seen["reason"], "reason of the service: käse", "{pair}");
    }
}

#[test]
fn close_of_the_client_reaches_the_service() {
    let Some(peers) = Peers::find("close_of_the_client_reaches_the_service") else { return };
    for service in NAMES {
        let (peer, address) = peers.service(service);
        let sidelane = Sidelane::both(&Setup::of(address).websocket("{}"));
        for client in NAMES {
            peers.ask(client, "echo-plain", sidelane.web());
        }
        sidelane.until_metric("sidelane_exchanges_in_flight", &[], |count| count == 0.0);
        let close = serde_json::json!({ "path": "/echo", "code": 4000, "reason": "goodbye: käse" });
        assert_eq!(peer.finish()["closes"], serde_json::json!([close, close]), "{service}");
    }
}

#[test]
fn pushed_messages_arrive_in_order() {
    for (pair, seen) in each_pair("pushed_messages_arrive_in_order", "pushed") {
        assert_eq!(seen["messages"], 10_000, "{pair}: {seen}");
        assert_eq!((&seen["in_order"], &seen["code"]), (&true.into(), &1000.into()), "{pair}");
    }
}

#[test]
fn pipelined_messages_come_back_in_order() {
    for (pair, seen) in each_pair("pipelined_messages_come_back_in_order", "pipelined") {
        assert_eq!(
            (&seen["messages"], &seen["in_order"]),
            (&20_000.into(), &true.into()),
            "{pair}"
        );
    }
}

#[test]
fn two_hundred_connections_mix_nothing_up() {
    for (pair, seen) in each_pair("two_hundred_connections_mix_nothing_up", "many") {
        assert_eq!(seen["same"], 200, "{pair}: {seen}");
    }
}

/// Echoes WebSockets, with a choice; refuses `/refuse`.
fn service_of_http2() -> Stage {
    Stage::script_with(
        |setup| setup.websocket("{}"),
        |connection| {
            while let Some(request) = connection.request()? {
                if request.target == b"/refuse" {
                    connection.write("HTTP/1.1 403 Forbidden\r\nset-cookie: a=1\r\nset-cookie: b=2\r\ncontent-length: 4\r\n\r\nno!\n")?;
                    continue;
                }
                let lines = if request.has("sec-websocket-protocol") {
                    "Sec-WebSocket-Protocol: v2\r\nX-Chosen: 1\r\nX-Chosen: 2\r\n"
                } else {
                    ""
                };
                connection.upgrade(&request, lines)?;
                return connection.echo();
            }
            Ok(())
        },
    )
}

fn http2(test: &str, case: &str) -> Option<(Stage, Value)> {
    let python = Python::find(test)?;
    let stage = service_of_http2();
    let seen =
        Peer::client("ws_h2.py", python.script("ws_h2.py"), case, stage.sidelane.web()).finish();
    Some((stage, seen))
}

fn fields<'a>(seen: &'a Value, name: &str) -> Vec<&'a str> {
    let all = seen["headers"].as_array().expect("a list").iter();
    all.filter(|field| field[0] == name).filter_map(|field| field[1].as_str()).collect()
}

#[test]
fn http2_websocket_reaches_the_service_as_http1() {
    let test = "http2_websocket_reaches_the_service_as_http1";
    let Some((stage, seen)) = http2(test, "echo") else { return };
    assert_eq!(seen["status"], 200, "{seen}");
    assert_eq!(seen["same"], true, "{seen}");
    assert_eq!(seen["close"], serde_json::json!([8, "0fa0627965"]), "{seen}");
    assert_eq!(seen["end"]["reset"], Value::Null, "{seen}");
    assert_eq!(fields(&seen, "sec-websocket-protocol"), ["v2"]);
    assert_eq!(fields(&seen, "x-chosen"), ["1", "2"]);
    for of_http1 in ["connection", "upgrade", "sec-websocket-accept"] {
        assert!(fields(&seen, of_http1).is_empty(), "{of_http1}: {seen}");
    }

    let request = stage.service.only_request();
    assert_eq!((request.method.as_str(), request.version.as_str()), ("GET", "HTTP/1.1"));
    assert_eq!(request.target, b"/echo?x=%zz");
    assert_eq!(request.first("host"), Some("api.localhost"));
    assert_eq!(request.all("x-repeated").collect::<Vec<_>>(), [b"1", b"2"]);
    assert_eq!(request.first("sec-websocket-version"), Some("13"));
    assert_eq!(request.first("sec-websocket-protocol"), Some("v1, v2"));
    assert_eq!(request.first("sec-websocket-extensions"), Some("permessage-deflate"));
    assert_eq!(request.first("origin"), Some("http://api.localhost"));
    let key = request.first("sec-websocket-key").expect("a key of the sidecar's");
    assert!(key.len() == KEY.len() && key != KEY, "{key}");
    assert!(request.first("upgrade").is_some_and(|name| name.eq_ignore_ascii_case("websocket")));
}

#[test]
fn http2_refusal_passes_as_it_is() {
    let Some((_, seen)) = http2("http2_refusal_passes_as_it_is", "refused") else { return };
    assert_eq!((&seen["status"], &seen["body"]), (&403.into(), &"no!\n".into()), "{seen}");
    assert_eq!(fields(&seen, "set-cookie"), ["a=1", "b=2"]);
}

#[test]
fn http2_violation_ends_its_stream_alone() {
    let Some((_, seen)) = http2("http2_violation_ends_its_stream_alone", "unmasked") else {
        return;
    };
    assert_eq!((&seen["good"], &seen["other"]), (&"good".into(), &"still there".into()), "{seen}");
    assert_eq!((&seen["code"], &seen["others"]), (&1002.into(), &0.into()), "{seen}");
}

#[test]
fn http2_reset_ends_its_websocket_alone() {
    let Some((stage, seen)) = http2("http2_reset_ends_its_websocket_alone", "cancel") else {
        return;
    };
    assert_eq!((&seen["good"], &seen["other"]), (&"good".into(), &"still there".into()), "{seen}");
    stage.service.until("the services' ends", |records| {
        records.len() == 2 && records.iter().all(|record| record.closed)
    });
}

#[test]
fn fifty_websockets_share_one_http2_connection() {
    let Some((_, seen)) = http2("fifty_websockets_share_one_http2_connection", "many") else {
        return;
    };
    assert_eq!((&seen["same"], &seen["sockets"]), (&true.into(), &50.into()), "{seen}");
}

#[test]
fn http2_websocket_is_told_of_the_drain() {
    let Some(python) = Python::find("http2_websocket_is_told_of_the_drain") else { return };
    let mut stage = service_of_http2();
    let relay = stage.sidelane.web();
    let mut peer = Peer::client("ws_h2.py", python.script("ws_h2.py"), "held", relay);
    assert_eq!(peer.line()["held"], true);
    stage.sidelane.signal("TERM");
    let seen = peer.finish();
    assert_eq!(seen["code"], 1001, "{seen}");
    assert_eq!(stage.sidelane.ended().code(), Some(0));
}

/// requirements 1.8: an echo server on a port of localhost, relay, sidecar, and a command line client
/// at `ws://<subdomain>.localhost:<port>` that gets back what is typed.
#[test]
fn what_is_typed_is_echoed() {
    let Some(peers) = Peers::find("what_is_typed_is_echoed") else { return };
    let (_peer, address) = peers.service("ws");
    let setup = Setup::of(address).websocket("{}");
    let relay = Sidelane::spawn("relay", &setup.relay());
    let sidecar = Sidelane::start("sidecar", &setup.sidecar(relay.tunnel()));
    sidecar.until_metric("sidelane_lanes", &[], |lanes| lanes >= 1.0);
    let mut command = peers.node.script("type.mjs");
    command.arg(format!("ws://api.localhost:{}/echo", relay.web().port()));
    let mut peer = Peer::start("type.mjs".to_owned(), command);
    assert_eq!(peer.line()["connected"], true);
    for typed in ["hello", "käse", "{\"json\": true}"] {
        peer.type_line(typed);
        assert_eq!(peer.line()["echoed"], typed);
    }
    assert_eq!(peer.finish()["code"], 1000);
}

/// The page tells the service what it saw: a browser's script can reach nothing else.
const PAGE: &str = r#"<!doctype html><title>echo</title><script>
const seen = { messages: [] };
const socket = new WebSocket(`ws://${location.host}/echo`, ["v1", "v2"]);
socket.binaryType = "arraybuffer";
socket.onopen = () => {
  seen.protocol = socket.protocol;
  seen.extensions = socket.extensions;
  socket.send("käse");
  socket.send(new Uint8Array([0, 255, 128]));
  socket.send("x".repeat(200000));
};
socket.onmessage = ({ data }) => {
  seen.messages.push(typeof data === "string" ? (data.length > 9 ? data.length : data) : [...new Uint8Array(data)]);
  if (seen.messages.length === 3) socket.close(4000, "goodbye");
};
socket.onclose = ({ code, reason, wasClean }) => {
  fetch("/seen", { method: "POST", body: JSON.stringify({ ...seen, code, reason, wasClean }) });
};
</script>"#;

#[test]
fn browser_opens_a_websocket() {
    let Some(chromium) = Chromium::find("browser_opens_a_websocket") else { return };
    let stage = Stage::script_with(
        |setup| setup.websocket("{}"),
        |connection| {
            while let Some(request) = connection.exchange()? {
                if request.has("upgrade") {
                    connection.upgrade(&request, "Sec-WebSocket-Protocol: v2\r\n")?;
                    return connection.echo();
                }
                let (kind, body) = if request.target == b"/" {
                    ("text/html; charset=utf-8", PAGE)
                } else {
                    ("text/plain", "ok")
                };
                connection.write(format!(
                    "HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n{body}",
                    body.len()
                ))?;
            }
            Ok(())
        },
    );
    let address = stage.sidelane.web();
    assert_eq!(request(address, "GET", sidelane_e2e::stage::get("/")).head.status, 200);
    let _window = chromium.open(&format!("http://api.localhost:{}/", address.port()));
    let seen =
        sidelane_e2e::wait::within(std::time::Duration::from_secs(60), "the page's word", || {
            stage.service.requests().into_iter().find(|request| request.target == b"/seen")
        });
    let seen: Value = serde_json::from_slice(&seen.body.bytes).expect("JSON of the page");
    assert_eq!(seen["protocol"], "v2", "{seen}");
    assert_eq!(seen["messages"], serde_json::json!(["käse", [0, 255, 128], 200_000]), "{seen}");
    assert_eq!((&seen["code"], &seen["reason"]), (&4000.into(), &"goodbye".into()), "{seen}");
    assert_eq!(seen["wasClean"], true, "{seen}");
}
