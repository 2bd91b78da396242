//! Exchanges on connections of their own: nothing added, nothing read, and the same ends as in messages.

use std::cell::OnceCell;
use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use sidelane_e2e::pattern::Pattern;
use sidelane_e2e::process::{Setup, Sidelane, library, line_library};
use sidelane_e2e::service::{Connection, Service};
use sidelane_e2e::signer::token_hash;
use sidelane_e2e::tap::{Counts, Tap};
use sidelane_e2e::wait;
use sidelane_e2e::websocket::{BINARY, Frame, MASK, Socket};

const RAW: &str = "{ WEBSOCKET: { mode: raw } }";
/// How soon an end of the tunnel must be seen by a client: what the other end has to say is waited for.
const END_DEADLINE: Duration = Duration::from_secs(20);

fn echo() -> Service {
    Service::start(|connection| {
        connection.stop_recording();
        connection.accept("")?;
        connection.echo()
    })
}

fn raw(service: &Service) -> Setup {
    Setup::of(service.address()).websocket("{}").options(RAW)
}

/// How many exchanges were to have a connection of their own and got one, or did not.
fn exchanges(process: &Sidelane, role: &str, how: &str) -> f64 {
    let labels = [&*format!("role=\"{role}\""), &*format!("how=\"{how}\"")];
    process.metric("sidelane_dedicated_exchanges_total", &labels).unwrap_or(0.0)
}

fn until_used(process: &Sidelane, role: &str, expected: f64) {
    let labels = [&*format!("role=\"{role}\""), "state=\"used\""];
    process.until_metric("sidelane_dedicated_connections", &labels, |used| used == expected);
}

fn until_waiting(process: &Sidelane, expected: f64) {
    let labels = ["role=\"relay\"", "state=\"waiting\""];
    process.until_metric("sidelane_dedicated_connections", &labels, |n| n == expected);
}

/// A relay and a sidecar that dials it at `through`.
fn apart(setup: &Setup, through: impl Fn(SocketAddr) -> SocketAddr) -> (Sidelane, Sidelane) {
    let relay = Sidelane::spawn("relay", &setup.relay());
    let sidecar = Sidelane::start("sidecar", &setup.sidecar(through(relay.tunnel())));
    until_waiting(&relay, 2.0);
    until_served(&relay);
    (relay, sidecar)
}

fn until_served(relay: &Sidelane) {
    relay.until_metric("sidelane_announcements_total", &["result=\"accepted\""], |n| n >= 1.0);
}

/// Of those that have grown since `before`, by how much, the most first.
fn grown(tap: &Tap, before: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let since = |(at, counts): (usize, &Arc<Counts>)| {
        let (now, then) = (counts.both(), before.get(at).copied().unwrap_or_default());
        (now.0 - then.0, now.1 - then.1)
    };
    let mut grown: Vec<_> = tap.connections().iter().enumerate().map(since).collect();
    grown.sort_unstable_by(|a, b| b.cmp(a));
    grown
}

#[test]
fn a_websocket_in_raw_mode_adds_no_byte_to_the_wire() {
    let service = echo();
    let tap = OnceCell::new();
    let (relay, sidecar) =
        apart(&raw(&service), |tunnel| tap.get_or_init(|| Tap::new(tunnel)).address());
    let tap = tap.get().expect("it was dialled");
    let mut socket = Socket::open(relay.web());
    // The connection is this one's from here on, and another is dialled in its place.
    socket.says_back("ready");
    until_used(&relay, "relay", 1.0);
    until_waiting(&relay, 2.0);
    let before: Vec<_> = tap.connections().iter().map(|counts| counts.both()).collect();
    let (mut to_service, mut to_client) = (0, 0);
    for length in [0, 1, 125, 126, 65_535, 65_536, 1_000_003] {
        let sent = Frame::new(BINARY, vec![0xa5; length]).masked(MASK);
        to_service += sent.bytes().len() as u64;
        to_client += Frame::new(BINARY, vec![0xa5; length]).bytes().len() as u64;
        socket.send(sent);
        assert_eq!(socket.frame().payload.len(), length);
    }
    let grown = grown(tap, &before);
    assert_eq!(grown[0], (to_client, to_service), "{grown:?}");
    for other in &grown[1..] {
        // Pings, and how far the lane has come.
        assert!(other.0 < 1000 && other.1 < 1000, "{grown:?}");
    }
    for (process, role) in [(&relay, "relay"), (&sidecar, "sidecar")] {
        assert_eq!(exchanges(process, role, "dedicated"), 1.0);
        let bytes =
            process.metric("sidelane_message_bytes_total", &["direction=\"sent\"", "WEBSOCKET"]);
        assert!(bytes.is_some_and(|bytes| bytes >= 1_131_326.0), "{role}: {bytes:?}");
    }
    socket.send(Frame::close(1000, "bye").masked(MASK));
    assert_eq!(socket.closes("the client's"), (1000, "bye".to_owned()));
    until_used(&relay, "relay", 0.0);
    until_used(&sidecar, "sidecar", 0.0);
}

/// A service of bytes: sends back what comes, and ends when its client does.
fn echo_bytes() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut writer = client.try_clone()?;
                io::copy(&mut &client, &mut writer)?;
                writer.shutdown(Shutdown::Write)
            });
        }
    });
    address
}

/// The program with the line protocol, whose route says `mode: raw`.
fn lines(service: SocketAddr, sidecar: &str) -> Sidelane {
    let yaml = format!(
        r#"version: 1
relay:
  listeners: [{{ name: lines, address: "127.0.0.1:0", protocol_type: LINE }}]
  base_domains: [localhost]
  tunnel: {{ address: "127.0.0.1:0" }}
  limits: {{ handshakes_per_second: 10000, handshakes_per_second_per_address: 10000 }}
sidecar: {{ {sidecar} }}
tunnels: [{{ name: echo, service: "{service}" }}]
routes: [{{ listener: lines, tunnel: echo, options: {{ LINE: {{ mode: raw }} }} }}]
plugins:
  libraries:
    - {{ name: http, library: "{}" }}
    - {{ name: line, library: "{}" }}
health: {{ address: "127.0.0.1:0" }}
admin: {{ address: "127.0.0.1:0" }}
"#,
        library().display(),
        line_library().display()
    );
    Sidelane::start("lines", &yaml)
}

fn connect(process: &Sidelane) -> TcpStream {
    let stream = TcpStream::connect(process.listener("lines")).expect("the listener stands");
    stream.set_read_timeout(Some(wait::DEADLINE)).expect("a deadline");
    stream.set_write_timeout(Some(wait::DEADLINE)).expect("a deadline");
    stream
}

/// Sends so many bytes and checks that they come back, both ends then closed.
fn there_and_back(stream: &TcpStream, length: u64) {
    let mut writer = stream.try_clone().expect("a handle");
    let writing = std::thread::spawn(move || {
        let mut pattern = Pattern::default();
        while pattern.offset() < length {
            writer.write_all(pattern.next(length - pattern.offset())).expect("it is taken");
        }
        writer.shutdown(Shutdown::Write).expect("open");
    });
    let (mut pattern, mut space, mut reader) = (Pattern::default(), vec![0; 64 * 1024], stream);
    loop {
        match reader.read(&mut space).expect("it comes back") {
            0 => break,
            read => pattern.check(&space[..read]).expect("the byte that was sent"),
        }
    }
    assert_eq!(pattern.offset(), length);
    writing.join().expect("no panic");
}

#[test]
fn a_hundred_mebibytes_of_a_byte_born_protocol_pass_both_ways() {
    let process = lines(echo_bytes(), "");
    there_and_back(&connect(&process), 100 * 1024 * 1024);
    for role in ["relay", "sidecar"] {
        assert_eq!(exchanges(&process, role, "dedicated"), 1.0, "{role}");
        until_used(&process, role, 0.0);
    }
    let sent = process.metric("sidelane_message_bytes_total", &["LINE", "direction=\"sent\""]);
    assert_eq!(sent, Some(2.0 * 100.0 * 1024.0 * 1024.0));
}

#[test]
fn a_thousand_connections_one_after_another_are_all_dialled_for() {
    let process = lines(echo_bytes(), "");
    until_waiting(&process, 2.0);
    let before = process.descriptors();
    for _ in 0..1000 {
        there_and_back(&connect(&process), 100);
    }
    assert_eq!(exchanges(&process, "relay", "dedicated"), 1000.0);
    assert_eq!(exchanges(&process, "relay", "framed"), 0.0);
    until_used(&process, "relay", 0.0);
    until_waiting(&process, 2.0);
    wait::until("the descriptors to go", || (process.descriptors() <= before + 8).then_some(()));
}

#[test]
fn a_sidecar_without_dedicated_connections_carries_messages() {
    let process = lines(echo_bytes(), "dedicated: 0");
    there_and_back(&connect(&process), 1024 * 1024);
    assert_eq!(exchanges(&process, "relay", "dedicated"), 0.0);
    assert_eq!(process.metric("sidelane_dedicated_connections", &[]), Some(0.0));

    let service = echo();
    let file = raw(&service).both().replace("  name: e2e\n", "  name: e2e\n  dedicated: 0\n");
    let process = Sidelane::start("framed", &file);
    let mut socket = Socket::open(process.web());
    socket.says_back("hello");
    let messages = process.metric("sidelane_plugin_websocket_messages_total", &["type=\"text\""]);
    assert!(messages.is_some_and(|messages| messages >= 1.0), "{messages:?}");
}

#[test]
fn a_killed_sidecar_is_an_end_for_the_client() {
    let service = echo();
    let (relay, sidecar) = apart(&raw(&service), |tunnel| tunnel);
    let mut socket = Socket::open(relay.web());
    socket.says_back("hello");
    until_used(&relay, "relay", 1.0);
    sidecar.kill();
    let ended = std::thread::spawn(move || socket.try_frame().map(|frame| frame.opcode));
    wait::within(END_DEADLINE, "the client's end", || ended.is_finished().then_some(()));
    ended.join().expect("no panic").expect_err("there is no frame, and no close frame");
    until_used(&relay, "relay", 0.0);
    until_waiting(&relay, 0.0);
}

#[test]
fn a_client_that_breaks_off_and_a_service_that_does_are_told_to_the_other() {
    let service = Service::start(|connection: &mut Connection| {
        connection.stop_recording();
        let request = connection.accept("")?;
        if request.target == b"/crash" {
            // It goes with most of it unread, and the system breaks the connection.
            return connection.exactly(1).map(drop);
        }
        connection.echo()
    });
    let (relay, sidecar) = apart(&raw(&service), |tunnel| tunnel);
    let mut socket = Socket::open(relay.web());
    socket.says_back("hello");
    until_used(&sidecar, "sidecar", 1.0);
    drop(socket);
    until_used(&sidecar, "sidecar", 0.0);
    until_used(&relay, "relay", 0.0);

    let mut socket = Socket::open_with(relay.web(), "/crash", "");
    socket.send(Frame::new(BINARY, vec![0; 1_000_000]).masked(MASK));
    socket.try_frame().expect_err("the service has crashed");
    until_used(&sidecar, "sidecar", 0.0);
    until_used(&relay, "relay", 0.0);
}

#[test]
fn a_reload_that_changes_the_mode_leaves_running_ones() {
    let service = echo();
    let setup = raw(&service);
    let process = Sidelane::both(&setup);
    until_waiting(&process, 2.0);
    let mut before = Socket::open(process.web());
    before.says_back("raw");
    let framed = setup.options("{ WEBSOCKET: { mode: framed, max_message_size: 1KiB } }");
    process.rewrite(&framed.both());
    assert_eq!(process.reload().0, 200);
    let mut after = Socket::open(process.web());
    after.says_back("framed");
    before.says_back("still raw");
    // Larger than a message may be now.
    before.says_back(&"x".repeat(2000));
    assert_eq!(exchanges(&process, "relay", "dedicated"), 1.0);
}

#[test]
fn timeouts_of_the_route_hold() {
    let service = echo();
    let setup = raw(&service);
    let file = setup
        .both()
        .replace("options: { WEBSOCKET", "timeouts: { idle: 1s }, options: { WEBSOCKET");
    let process = Sidelane::start("idle", &file);
    until_waiting(&process, 2.0);
    let mut socket = Socket::open(process.web());
    socket.says_back("hello");
    until_used(&process, "relay", 1.0);
    socket.try_frame().expect_err("nothing passed for a second");
    until_used(&process, "relay", 0.0);
    until_used(&process, "sidecar", 0.0);
    process.until_metric("sidelane_exchanges_total", &["code=\"service-timeout\""], |n| n >= 1.0);
}

#[test]
fn an_option_that_raw_mode_cannot_hold_is_refused() {
    let service = echo();
    let setup = raw(&service).options("{ WEBSOCKET: { mode: raw, max_message_size: 1MiB } }");
    let process = Sidelane::both(&raw(&service));
    process.rewrite(&setup.both());
    let (status, answer) = process.reload();
    assert_ne!(status, 200);
    assert!(answer.to_string().contains("has no effect with mode: raw"), "{answer}");
}

#[test]
fn a_withdrawn_credential_ends_it() {
    const TOKEN: &str = "a-token-that-is-withdrawn";
    let service = echo();
    let mut setup = raw(&service);
    setup.sidecar_token = Some(TOKEN.to_owned());
    let file = |principals: &str| {
        setup.relay().replacen("relay:\n", &format!("relay:\n  credentials:\n{principals}"), 1)
    };
    let other = format!(
        "    - {{ principal: other, tokens: [\"{}\"], subdomains: [other], tunnels: [other] }}\n",
        token_hash("another-token-of-the-tests")
    );
    let ours = format!(
        "    - {{ principal: ours, tokens: [\"{}\"], subdomains: [api], tunnels: [api] }}\n",
        token_hash(TOKEN)
    );
    let relay = Sidelane::spawn("relay", &file(&format!("{ours}{other}")));
    let sidecar = Sidelane::start("sidecar", &setup.sidecar(relay.tunnel()));
    until_waiting(&relay, 2.0);
    until_served(&relay);
    let mut socket = Socket::open(relay.web());
    socket.says_back("hello");
    until_used(&relay, "relay", 1.0);
    relay.rewrite(&file(&other));
    assert_eq!(relay.reload().0, 200);
    socket.try_frame().expect_err("it ends");
    until_used(&relay, "relay", 0.0);
    until_used(&sidecar, "sidecar", 0.0);
    until_waiting(&relay, 0.0);
}

#[test]
fn a_session_on_another_carrier_stays_in_messages() {
    let service = echo();
    let setup = raw(&service);
    let relay = Sidelane::spawn("relay", &setup.relay());
    let tunnel = relay.tunnel();
    let file = setup
        .sidecar(tunnel)
        .replace(&format!("\"{tunnel}\""), &format!("\"ws://{tunnel}/tunnel\""));
    let sidecar = Sidelane::start("sidecar", &file);
    until_served(&relay);
    let mut socket = Socket::open(relay.web());
    socket.says_back("hello");
    assert_eq!(relay.metric("sidelane_dedicated_connections", &[]), Some(0.0));
    assert_eq!(exchanges(&relay, "relay", "dedicated"), 0.0);
    assert!(sidecar.log().contains("the session has no dedicated connections"), "it says so");
}
