//! How WebSockets end: violations, limits, silence, and the loss of either side.

use std::io::ErrorKind;
use std::sync::{Mutex, mpsc};

use sidelane_e2e::process::{Setup, Sidelane};
use sidelane_e2e::service::{Connection, Record, Service};
use sidelane_e2e::stage::Stage;
use sidelane_e2e::wait;
use sidelane_e2e::websocket::{
    BINARY, CLOSE, CONTINUATION, Frame, MASK, PING, PONG, Socket, TEXT, refusal,
};

/// For ends that do not answer a close frame: how long they are waited for.
const HASTY: &str = "{ close_timeout: 100ms }";

/// A service that reads whatever comes.
fn listener() -> Stage {
    Stage::websocket(Connection::closed)
}

fn echo_with(config: &str, options: &str) -> Stage {
    Stage::script_with(
        |setup| setup.websocket(config).options(options),
        |connection| {
            connection.accept("")?;
            connection.echo()
        },
    )
}

/// Frames that break RFC 6455 in a way that no proxy may pass on.
fn violations() -> Vec<(&'static str, Frame)> {
    vec![
        ("reserved opcode 3", Frame::new(3, "x")),
        ("reserved opcode 7", Frame::new(7, "")),
        ("reserved control opcode", Frame::new(0xB, "")),
        ("RSV1 without an extension", Frame::new(TEXT, "x").rsv(4)),
        ("RSV2", Frame::new(TEXT, "x").rsv(2)),
        ("RSV3 of a ping", Frame::new(PING, "x").rsv(1)),
        ("fragmented ping", Frame::new(PING, "x").unfinished()),
        ("fragmented close", Frame::close(1000, "").unfinished()),
        ("ping of 126 bytes", Frame::new(PING, "x".repeat(126))),
        ("pong of 70,000 bytes", Frame::new(PONG, "x".repeat(70_000))),
    ]
}

#[test]
fn violation_of_the_client_is_1002_to_the_client() {
    let mut cases: Vec<_> =
        violations().into_iter().map(|(name, frame)| (name, frame.masked(MASK))).collect();
    cases.push(("unmasked", Frame::new(TEXT, "x")));
    cases.push(("unmasked close", Frame::close(1000, "")));
    let stage = Stage::script_with(
        |setup| setup.websocket(HASTY),
        |connection| {
            connection.accept("")?;
            connection.closed()
        },
    );
    for (name, frame) in cases {
        let mut socket = stage.open();
        socket.send(Frame::new(TEXT, "good"));
        let good = Frame::new(TEXT, "good").masked(MASK).bytes();
        let last = |records: &[Record]| records.last().expect("a connection").clone();
        stage.service.until(name, |records| last(records).received.ends_with(&good));
        let head = last(&stage.service.records()).received.len();
        socket.client.send(frame.bytes());
        assert_eq!(socket.closes(name).0, 1002, "{name}");
        stage.service.until(name, |records| last(records).closed);
        let (close, rest) = first_frame(&last(&stage.service.records()).received[head..]);
        // To the service its client has gone away.
        assert_eq!(close.close_code().map(|(code, _)| code), Some(1001), "{name}");
        assert!(close.mask.is_some() && rest == 0, "{name}: {close:?} and {rest} bytes");
    }
}

/// Returns the first frame of what came, and how many bytes follow it.
fn first_frame(bytes: &[u8]) -> (Frame, usize) {
    let mut rest = bytes;
    let frame = Frame::read(|length| {
        let (head, tail) = rest.split_at_checked(length).ok_or(ErrorKind::UnexpectedEof)?;
        rest = tail;
        Ok(head.to_vec())
    });
    (frame.unwrap_or_else(|error| panic!("{error}: {bytes:?}")), rest.len())
}

#[test]
fn violation_of_the_service_is_1002_to_the_service() {
    let mut cases = violations();
    cases.push(("masked", Frame::new(TEXT, "x").masked(MASK)));
    let wrong: Vec<_> = cases.iter().map(|(_, frame)| frame.bytes()).collect();
    let (closes, closed) = mpsc::channel();
    let closes = Mutex::new(closes);
    let stage = Stage::script_with(
        |setup| setup.websocket(HASTY),
        move |connection| {
            connection.accept("")?;
            connection.write(Frame::new(TEXT, "good").bytes())?;
            // Not before the client has what came before.
            connection.frame()?;
            connection.write(&wrong[connection.index()])?;
            let close = connection.frame()?;
            closes.lock().expect("no panic").send(close).map_err(std::io::Error::other)?;
            connection.closed()
        },
    );
    for (name, _) in cases {
        let mut socket = stage.open();
        assert_eq!(socket.frame(), Frame::new(TEXT, "good"), "{name}");
        socket.send(Frame::new(TEXT, "seen"));
        // The client did nothing wrong: the fault is on the other side.
        assert_eq!(socket.closes(name).0, 1011, "{name}");
        let close = closed.recv_timeout(wait::DEADLINE).expect(name);
        assert_eq!(close.close_code().map(|(code, _)| code), Some(1002), "{name}: {close:?}");
        assert!(close.mask.is_some(), "{name}: to a service frames are masked");
        stage.service.until(name, |records| records.iter().all(|record| record.closed));
    }
}

#[test]
fn message_over_the_limit_is_1009() {
    let stage = echo_with("{}", "{ WEBSOCKET: { max_message_size: 1KiB } }");
    let mut socket = stage.open();
    socket.says_back(&"x".repeat(1024));
    // The limit holds for a message, however it is cut.
    socket.send(Frame::new(TEXT, "x".repeat(1000)).unfinished());
    socket.send(Frame::new(PING, "between"));
    socket.send(Frame::new(CONTINUATION, "x".repeat(24)));
    for opcode in [TEXT, PONG, CONTINUATION] {
        assert_eq!(socket.frame().opcode, opcode);
    }
    socket.send(Frame::new(BINARY, "x".repeat(1025)));
    assert_eq!(socket.closes("one frame").0, 1009);

    let mut socket = stage.open();
    socket.send(Frame::new(TEXT, "x".repeat(1000)).unfinished());
    socket.send(Frame::new(CONTINUATION, "x".repeat(25)));
    assert_eq!(socket.closes("fragments").0, 1009);

    // A header says enough; nobody waits for what it promises.
    let mut socket = stage.open();
    socket.client.send(Frame::new(BINARY, "").masked(MASK).header(1 << 50));
    assert_eq!(socket.closes("a header").0, 1009);
}

#[test]
fn message_of_the_service_over_the_limit_is_1009_too() {
    let stage = Stage::script_with(
        |setup| setup.websocket("{}").options("{ WEBSOCKET: { max_message_size: 1KiB } }"),
        |connection| {
            connection.accept("")?;
            connection.write(Frame::new(TEXT, "x".repeat(1024)).bytes())?;
            connection.frame()?;
            connection.write(Frame::new(TEXT, "x".repeat(1025)).bytes())?;
            let close = connection.frame()?;
            connection.write(Frame::new(CLOSE, close.payload).bytes())?;
            connection.closed()
        },
    );
    let mut socket = stage.open();
    assert_eq!(socket.frame(), Frame::new(TEXT, "x".repeat(1024)));
    let seen = Frame::new(TEXT, "seen").masked(MASK).bytes();
    socket.client.send(&seen);
    assert_eq!(socket.closes("to the client").0, 1011);
    stage.service.until("the close frame", |records| records[0].closed);
    let head = stage.service.only_request().raw.len();
    let (close, _) = first_frame(&stage.service.received()[head + seen.len()..]);
    assert_eq!(close.close_code().map(|(code, _)| code), Some(1009));
}

#[test]
fn more_messages_than_a_second_may_have_are_1008() {
    let stage = echo_with("{}", "{ WEBSOCKET: { messages_per_second: 10 } }");
    let mut socket = stage.open();
    for number in 0..1000 {
        let frame = Frame::new(TEXT, number.to_string()).masked(MASK);
        // Fails once the connection is closed for it.
        if socket.client.try_send(&frame.bytes()).is_err() {
            break;
        }
    }
    assert_eq!(socket.closes("a thousand at once").0, 1008);
}

#[test]
fn options_that_mean_nothing_are_refused_at_start() {
    let setup = Setup::of("127.0.0.1:1".parse().unwrap()).websocket("{}");
    for options in [
        "{ WEBSOCKET: { max_message_sise: 1KiB } }",
        "{ WEBSOCKET: { max_message_size: many } }",
        "{ WEBSOCKET: { messages_per_second: -1 } }",
    ] {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("sidecar.yaml");
        std::fs::write(&file, setup.clone().options(options).both()).unwrap();
        let output = std::process::Command::new(sidelane_e2e::process::program())
            .arg("check")
            .arg(&file)
            .output()
            .unwrap();
        assert!(!output.status.success(), "{options}");
    }
}

#[test]
fn idle_websocket_is_closed_where_a_timeout_is_set() {
    let stage = echo_with("{ idle_timeout: 300ms }", "{}");
    let mut socket = stage.open();
    socket.says_back("hello");
    let (code, _) = socket.closes("idle");
    assert_eq!(code, 1001);
    stage.service.until("the service's end", |records| records[0].closed);
}

#[test]
fn proxy_pings_where_it_is_told_to() {
    let stage = echo_with("{ ping_interval: 100ms }", "{}");
    let mut socket = stage.open();
    for _ in 0..3 {
        let ping = socket.frame();
        assert_eq!(ping.opcode, PING);
        socket.send(Frame::new(PONG, ping.payload));
    }
    socket.says_back("still there");
    // A pong that answers the proxy's own ping is not the service's to see.
    let received = stage.service.received();
    let head = stage.service.only_request().raw.len();
    let text = Frame::new(TEXT, "still there").masked(MASK).bytes();
    assert!(received[head..].ends_with(&text));
}

#[test]
fn client_that_is_gone_ends_the_service() {
    let stage = listener();
    let mut socket = stage.open();
    socket.send(Frame::new(TEXT, "last words"));
    let words = Frame::new(TEXT, "last words").masked(MASK).bytes();
    stage.service.until("the message", |records| records[0].received.ends_with(&words));
    drop(socket);
    stage.service.until("the service's end", |records| records[0].closed);
}

#[test]
fn client_that_is_gone_inside_a_frame_ends_the_service() {
    let stage = listener();
    let mut socket = stage.open();
    let mut begun = Frame::new(BINARY, "").masked([0; 4]).header(1_000_000);
    begun.extend([7; 1000]);
    socket.client.send(&begun);
    stage.service.until("what came of the frame", |records| records[0].received.ends_with(&begun));
    drop(socket);
    stage.service.until("the service's end", |records| records[0].closed);
    assert!(stage.service.received().ends_with(&begun), "no close frame inside of a frame");
}

#[test]
fn service_that_is_gone_ends_the_client() {
    for (name, last) in [
        ("silently", Vec::new()),
        ("after a message", Frame::new(TEXT, "last").bytes()),
        ("inside a frame", Frame::new(BINARY, vec![7; 100_000]).bytes()[..50_000].to_vec()),
    ] {
        let bytes = last.clone();
        let stage = Stage::websocket(move |connection| {
            connection.write(&bytes)?;
            connection.frame()?;
            connection.crash()
        });
        let mut socket = stage.open();
        let came = socket.client.exactly(last.len()).unwrap();
        assert_eq!(came, last, "{name}");
        socket.send(Frame::new(TEXT, "go"));
        let rest = socket.client.rest();
        if name == "inside a frame" {
            assert!(rest.is_empty(), "{name}: {rest:?} would be read as the frame's");
        }
    }
}

#[test]
fn service_that_ends_its_direction_may_still_be_told() {
    // A half-closed connection, no close frame: what the client sends meanwhile still arrives.
    let stage = Stage::websocket(|connection| {
        connection.write(Frame::close(1000, "that was all").bytes())?;
        connection.frame().map(drop)
    });
    let mut socket = stage.open();
    assert_eq!(socket.frame(), Frame::close(1000, "that was all"));
    socket.send(Frame::close(1000, ""));
    assert!(socket.client.rest().is_empty());
    let close = Frame::close(1000, "").masked(MASK).bytes();
    wait::until("the client's close", || stage.service.received().ends_with(&close).then_some(()));
}

#[test]
fn client_that_ends_its_direction_still_gets_the_answer() {
    let stage = Stage::websocket(|connection| {
        let close = connection.frame()?;
        connection.write(Frame::new(TEXT, "before the end").bytes())?;
        connection.write(Frame::new(CLOSE, close.payload).bytes())
    });
    let mut socket = stage.open();
    socket.send(Frame::close(1000, "bye"));
    socket.client.shutdown();
    assert_eq!(socket.frame(), Frame::new(TEXT, "before the end"));
    assert_eq!(socket.frame(), Frame::close(1000, "bye"));
}

/// Relay and sidecar apart, and the setup of both.
fn pair(service: &Service, config: &str) -> (Sidelane, Sidelane) {
    let setup = Setup::of(service.address()).websocket(config);
    let relay = Sidelane::spawn("relay", &setup.relay());
    let sidecar = Sidelane::start("sidecar", &setup.sidecar(relay.tunnel()));
    wait::until("the announcement", || {
        (refusal(relay.web(), "api.localhost", "/refuse").head.status == 403).then_some(())
    });
    (relay, sidecar)
}

/// Refuses `/refuse`; begins a frame on `/half`; echoes else.
fn service() -> Service {
    Service::start(|connection| {
        while let Some(request) = connection.request()? {
            match request.target.as_slice() {
                b"/refuse" => {
                    connection.write("HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n")?;
                }
                b"/half" => {
                    connection.upgrade(&request, "")?;
                    connection.write(&Frame::new(BINARY, vec![7; 100_000]).bytes()[..50_000])?;
                    return connection.closed();
                }
                _ => {
                    connection.upgrade(&request, "")?;
                    return connection.echo();
                }
            }
        }
        Ok(())
    })
}

#[test]
fn killed_sidecar_is_1012_between_frames_and_a_drop_inside_of_one() {
    let service = service();
    let (relay, sidecar) = pair(&service, "{}");
    let mut whole = Socket::open(relay.web());
    whole.says_back("hello");
    let mut half = Socket::open_with(relay.web(), "/half", "");
    drop(half.client.exactly(50_000).expect("the frame's begin"));
    sidecar.kill();
    assert_eq!(whole.closes("whole").0, 1012);
    let rest = half.client.rest();
    assert!(rest.is_empty(), "{rest:?} would be read as the frame's");
    relay.until_metric("sidelane_exchanges_in_flight", &[], |count| count == 0.0);
}

#[test]
fn killed_relay_ends_the_service() {
    let service = service();
    let (relay, sidecar) = pair(&service, "{}");
    let mut socket = Socket::open(relay.web());
    socket.says_back("hello");
    relay.kill();
    sidecar.until_metric("sidelane_exchanges_in_flight", &[], |count| count == 0.0);
    service.until("the service's end", |records| records.iter().all(|record| record.closed));
}

#[test]
fn drain_closes_with_the_configured_code() {
    for (config, code) in [("{}", 1001), ("{ drain_code: 1012 }", 1012)] {
        let service = service();
        let mut setup = Setup::of(service.address()).websocket(config);
        setup.drain = "2s";
        let mut sidelane = Sidelane::both(&setup);
        let mut socket = Socket::open(sidelane.web());
        socket.says_back("hello");
        sidelane.signal("TERM");
        assert_eq!(socket.closes(config).0, code, "{config}");
        service.until("the service's end", |records| records[0].closed);
        assert_eq!(sidelane.ended().code(), Some(0));
    }
}

#[test]
fn drained_sidecar_closes_what_it_carries() {
    let service = service();
    let setup = Setup::of(service.address()).websocket("{}");
    let relay = Sidelane::spawn("relay", &setup.relay());
    let mut short = setup;
    short.drain = "2s";
    let mut sidecar = Sidelane::start("sidecar", &short.sidecar(relay.tunnel()));
    wait::until("the announcement", || {
        (refusal(relay.web(), "api.localhost", "/refuse").head.status == 403).then_some(())
    });
    let mut socket = Socket::open(relay.web());
    socket.says_back("hello");
    sidecar.signal("TERM");
    let (code, _) = socket.closes("drained");
    assert!([1001, 1012].contains(&code), "{code}");
    assert_eq!(sidecar.ended().code(), Some(0));
}
