//! The wire is down for a while: shorter than the grace it costs a client time and nothing else, longer
//! it ends each exchange in the words of its protocol.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;
use sidelane_e2e::client::{Client, Head, request};
use sidelane_e2e::fault::{Fault, Shape};
use sidelane_e2e::peer::Peer;
use sidelane_e2e::process::{Route, Setup};
use sidelane_e2e::service::{Connection, Service};
use sidelane_e2e::stage::get;
use sidelane_e2e::wait;
use sidelane_e2e::websocket::{BINARY, Frame, MASK, Socket, TEXT};

use super::{LANES, Torn, pass};
use crate::grpc::Peers;

/// An outage that ends within every grace here but the short one.
const OUTAGE: Duration = Duration::from_secs(3);
/// A grace that is over soon.
const SHORT: &str = ", grace: 1s";
/// Payload of the frame that is sent in two halves.
const HALVES_BYTES: usize = 100_000;

/// Says to a service's scripts that they may go on.
#[derive(Clone, Default)]
struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    fn open(&self) {
        *self.0.0.lock().expect("no panic") = true;
        self.0.1.notify_all();
    }

    fn wait(&self) -> io::Result<()> {
        let open = self.0.0.lock().expect("no panic");
        let waited = self.0.1.wait_timeout_while(open, 2 * wait::DEADLINE, |open| !*open);
        let timeout = waited.expect("no panic").1;
        if timeout.timed_out() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(()) }
    }
}

/// Answers `/` at once, `/late` once the gate is open, `/halves` half before and half behind it; sends
/// a WebSocket's frame on `/frame` in two halves, and echoes on others.
fn serve(connection: &mut Connection, gate: &Gate) -> io::Result<()> {
    let half = vec![b'a'; HALVES_BYTES / 2];
    while let Some(request) = connection.request()? {
        if request.has("upgrade") {
            connection.upgrade(&request, "")?;
            if request.target == b"/frame" {
                let frame = Frame::new(BINARY, [&half[..], &half[..]].concat()).bytes();
                let (first, second) = frame.split_at(frame.len() - half.len());
                connection.write(first)?;
                gate.wait()?;
                connection.write(second)?;
            }
            return connection.echo();
        }
        match request.target.as_slice() {
            b"/late" => {
                gate.wait()?;
                connection.write("HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nlate")?;
            }
            b"/halves" => {
                let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {HALVES_BYTES}\r\n\r\n");
                connection.write(head)?;
                connection.write(&half)?;
                gate.wait()?;
                connection.write(&half)?;
            }
            b"/up" => {
                let length = request.first("content-length").and_then(|text| text.parse().ok());
                let body = connection.exactly(length.expect("a length"))?;
                let whole = body.iter().all(|byte| *byte == b'a');
                let answer = if whole { "whole" } else { "other" };
                connection
                    .write(format!("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n{answer}"))?;
            }
            _ => connection.write("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?,
        }
    }
    Ok(())
}

/// Clients in the midst of exchanges of every kind.
struct Clients {
    late: Client,
    halves: (Client, Head),
    up: Client,
    talks: Socket,
    half_frame: Socket,
    grpc: Option<Peer>,
}

impl Clients {
    fn begin(web: SocketAddr, service: &Service, peers: Option<&Peers>, case: &str) -> Self {
        let mut late = Client::connect(web);
        late.send(get("/late"));
        let mut halves = Client::connect(web);
        halves.send(get("/halves"));
        let head = halves.head();
        halves.exactly(HALVES_BYTES / 2).expect("the first half");
        let mut up = Client::connect(web);
        up.send(format!(
            "POST /up HTTP/1.1\r\nHost: api.localhost\r\nContent-Length: {HALVES_BYTES}\r\n\r\n"
        ));
        up.send(vec![b'a'; HALVES_BYTES / 2]);
        let mut talks = Socket::open(web);
        talks.says_back("before");
        let mut half_frame = Socket::open_with(web, "/frame", "");
        half_frame.client.exactly(10 + HALVES_BYTES / 2).expect("half a frame");
        wait::until("what must reach the service", || {
            let targets: Vec<_> = service.requests().into_iter().map(|one| one.target).collect();
            let all = [&b"/late"[..], b"/halves", b"/up", b"/frame"];
            all.iter().all(|target| targets.iter().any(|one| one == target)).then_some(())
        });
        let grpc = peers.map(|peers| {
            let mut peer = peers.client("grpcio", case, web);
            // It says so once its stream has brought a message.
            assert!(peer.line().is_object());
            peer
        });
        Self { late, halves: (halves, head), up, talks, half_frame, grpc }
    }
}

/// A service of HTTP and WebSocket, and one of gRPC where its peers are there.
fn setup(service: &Service, grpc: Option<SocketAddr>) -> Setup {
    let setup = Setup::of(service.address()).websocket("{}").grpc("{}");
    match grpc {
        None => setup,
        Some(address) => setup
            .tunnel("grpc", address)
            .route(Route::new("api", "grpc").under("/e2e.Peer").named("grpc")),
    }
}

#[test]
fn outage_shorter_than_the_grace_costs_time_alone() {
    let peers = Peers::find("an outage of gRPC");
    let peer = peers.as_ref().map(|peers| peers.service("grpcio"));
    let gate = Gate::default();
    let service = Service::start({
        let gate = gate.clone();
        move |connection| serve(connection, &gate)
    });
    let torn = Torn::of(&setup(&service, peer.as_ref().map(|(_, address)| *address)));
    let mut clients = Clients::begin(torn.relay.web(), &service, peers.as_ref(), "talk");

    torn.wire.down();
    torn.until_lanes(0);
    gate.open();
    // Both ends have something to say meanwhile.
    clients.up.send(vec![b'a'; HALVES_BYTES / 2]);
    clients.talks.send(Frame::new(TEXT, "meanwhile"));
    if let Some(peer) = &mut clients.grpc {
        peer.type_line("go on");
    }
    pass(OUTAGE);
    torn.wire.up();

    assert_eq!(clients.late.answer("GET").body, b"late");
    let (mut halves, _) = clients.halves;
    let rest = halves.exactly(HALVES_BYTES / 2).expect("the second half");
    assert!(rest.iter().all(|byte| *byte == b'a'));
    assert_eq!(clients.up.answer("POST").body, b"whole");
    assert_eq!(clients.talks.frame(), Frame::new(TEXT, "meanwhile"));
    clients.talks.says_back("after");
    let rest = clients.half_frame.client.exactly(HALVES_BYTES / 2).expect("the rest of a frame");
    assert!(rest.iter().all(|byte| *byte == b'a'));
    clients.half_frame.says_back("after");
    if let Some(peer) = clients.grpc {
        let seen = peer.finish();
        assert_eq!((&seen["after"], &seen["code"]), (&"after".into(), &0.into()), "{seen}");
    }
    torn.until_lanes(LANES);
    torn.lost_nothing();
    torn.is_one_session();
}

#[test]
fn outage_longer_than_the_grace_ends_each_exchange_as_its_protocol_says() {
    let peers = Peers::find("an outage of gRPC");
    let peer = peers.as_ref().map(|peers| peers.service("grpcio"));
    let gate = Gate::default();
    let service = Service::start({
        let gate = gate.clone();
        move |connection| serve(connection, &gate)
    });
    let setup = setup(&service, peer.as_ref().map(|(_, address)| *address));
    let torn = Torn::with(&setup, SHORT, Shape::default());
    let clients = Clients::begin(torn.relay.web(), &service, peers.as_ref(), "held");
    torn.wire.down();
    ends_as_the_failure_table_says(clients);
    gate.open();
    // The services' connections have ended as well, without a word from the relay.
    service.until("the services' ends", |records| records.iter().all(|record| record.closed));
    torn.wire.up();
    wait::until("200 again", || (torn.ask().head.status == 200).then_some(()));
}

/// Checks what clients see whose tunnel is lost for good.
fn ends_as_the_failure_table_says(mut clients: Clients) {
    let answer = clients.late.answer("GET");
    assert_eq!((answer.head.status, answer.head.first("x-sidelane-error")), LOST);
    let (mut halves, head) = clients.halves;
    let half = Head { fields: vec![("content-length".into(), "50000".into())], ..head };
    halves.try_body("GET", half).expect_err("a broken transfer does not look complete");
    let answer = clients.up.answer("POST");
    assert_eq!((answer.head.status, answer.head.first("x-sidelane-error")), LOST);
    let (code, reason) = clients.talks.closes("between frames");
    assert_eq!(code, 1012, "{reason}");
    let rest = clients.half_frame.client.rest();
    assert!(rest.is_empty(), "{rest:?} would be read as the frame's");
    if let Some(peer) = clients.grpc {
        let seen: Value = peer.finish();
        assert_eq!(seen["code"], 14, "{seen}");
    }
}

const LOST: (u16, Option<&str>) = (502, Some("tunnel-lost"));

#[test]
fn request_of_an_outage_waits_and_is_served() {
    let service = Service::ok();
    let torn = waiting(&service, "20s");
    torn.wire.down();
    torn.until_lanes(0);
    let web = torn.relay.web();
    let waits = std::thread::spawn(move || request(web, "GET", get("/")));
    let in_flight = |count: f64| count >= 1.0;
    torn.relay.until_metric("sidelane_connections", &["listener=\"web\""], in_flight);
    pass(Duration::from_millis(500));
    assert!(!waits.is_finished(), "it waits for a lane");
    torn.wire.up();
    let answer = waits.join().expect("an answer");
    assert_eq!((answer.head.status, answer.body.as_slice()), (200, b"ok".as_slice()));
    torn.is_one_session();
}

#[test]
fn request_of_an_outage_waits_no_longer_than_open_wait() {
    let service = Service::ok();
    let torn = waiting(&service, "500ms");
    torn.wire.down();
    torn.until_lanes(0);
    let begun = Instant::now();
    let answer = torn.ask();
    let elapsed = begun.elapsed();
    assert_eq!(answer.head.status, 503, "{answer:?}");
    assert!(answer.head.first("retry-after").is_some(), "{answer:?}");
    assert!(elapsed >= Duration::from_millis(500), "{elapsed:?}");
    assert!(elapsed < Duration::from_secs(5), "the grace is 15 s: {elapsed:?}");
    torn.wire.up();
    wait::until("200 again", || (torn.ask().head.status == 200).then_some(()));
    torn.is_one_session();
}

/// With that `open_wait` at the relay.
fn waiting(service: &Service, open_wait: &str) -> Torn {
    let setup = Setup::of(service.address());
    let timeouts = format!("  timeouts: {{ open_wait: {open_wait} }}\n  base_domains:");
    let relay = super::relay_yaml(&setup, "").replace("  base_domains:", &timeouts);
    Torn::between(&relay, Shape::default(), |wire| setup.sidecar(wire))
}

#[test]
fn quiet_stall_is_noticed_by_pings_and_costs_nothing() {
    let service = Service::start(|connection| {
        connection.accept("")?;
        connection.echo()
    });
    let torn = Torn::of(&Setup::of(service.address()).websocket("{}"));
    let mut socket = Socket::open(torn.relay.web());
    socket.says_back("before");
    let begun = Instant::now();
    torn.wire.harm(Fault::Stall);
    // Nothing is sent: only pings can tell.
    wait::until("both lanes' return", || (torn.wire.well().len() == LANES).then_some(()));
    torn.until_lanes(LANES);
    let noticed = begun.elapsed();
    println!("quiet stall: new connections after {noticed:.2?}");
    assert!(noticed < Duration::from_secs(9), "a ping each 5 s, and a second more: {noticed:?}");
    socket.client.send(Frame::new(TEXT, "after").masked(MASK).bytes());
    assert_eq!(socket.frame(), Frame::new(TEXT, "after"));
    torn.lost_nothing();
    torn.is_one_session();
}
