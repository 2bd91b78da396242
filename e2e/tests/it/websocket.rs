//! WebSocket handshakes and frames, byte for byte.

use std::sync::mpsc;
use std::sync::{Arc, Mutex};

use sidelane_e2e::client::{Client, request};
use sidelane_e2e::nobody::Nobody;
use sidelane_e2e::process::{Setup, Sidelane};
use sidelane_e2e::service::Service;
use sidelane_e2e::stage::Stage;
use sidelane_e2e::wait;
use sidelane_e2e::websocket::{
    BINARY, CLOSE, CONTINUATION, Frame, KEY, MASK, PING, PONG, Socket, TEXT, accept, handshake,
    refusal,
};

/// A frame larger than anything that may be held whole.
const HUGE_BYTES: usize = 100 * 1000 * 1000;
/// What a process may grow by while frames of [`HUGE_BYTES`] pass.
const MEMORY_GROWTH_MAX: u64 = 48 * 1024 * 1024;

fn echo() -> Stage {
    Stage::websocket(sidelane_e2e::service::Connection::echo)
}

#[test]
fn handshake_passes_with_its_fields() {
    let stage = Stage::script_with(
        |setup| setup.websocket("{}"),
        |connection| {
            connection.accept(
                "Set-Cookie: a=1\r\nX-Chosen: 1\r\nSet-Cookie: b=2\r\nSec-WebSocket-Protocol: v2\r\nSec-WebSocket-Extensions: permessage-deflate; server_no_context_takeover\r\nX-Chosen: 2\r\n",
            )?;
            connection.echo()
        },
    );
    let lines = "X-Repeated: 1\r\nCookie: c=3\r\nSec-WebSocket-Protocol: v1, v2\r\nX-Repeated: 2\r\nSec-WebSocket-Extensions: permessage-deflate; client_max_window_bits, x-other\r\nOrigin: http://api.localhost\r\n";
    let mut socket = Socket::open_with(stage.sidelane.web(), "/a%2Fb?x=%zz&y=[]", lines);
    let head = &socket.head;
    assert_eq!(head.first("sec-websocket-accept"), Some(accept(KEY.as_bytes()).as_str()));
    assert_eq!(head.first("sec-websocket-protocol"), Some("v2"));
    assert_eq!(
        head.first("sec-websocket-extensions"),
        Some("permessage-deflate; server_no_context_takeover")
    );
    assert_eq!(head.list("upgrade"), "websocket");
    assert_eq!(head.list("connection"), "upgrade");
    assert_eq!(head.all("set-cookie").collect::<Vec<_>>(), [b"a=1", b"b=2"]);
    assert_eq!(head.all("x-chosen").collect::<Vec<_>>(), [b"1", b"2"]);
    assert_eq!(head.all("content-length").count() + head.all("transfer-encoding").count(), 0);
    socket.says_back("hello");

    let request = stage.service.only_request();
    assert_eq!((request.method.as_str(), request.version.as_str()), ("GET", "HTTP/1.1"));
    assert_eq!(request.target, b"/a%2Fb?x=%zz&y=[]");
    assert_eq!(request.first("host"), Some("api.localhost"));
    assert_eq!(request.all("x-repeated").collect::<Vec<_>>(), [b"1", b"2"]);
    assert_eq!(request.first("cookie"), Some("c=3"));
    assert_eq!(request.first("origin"), Some("http://api.localhost"));
    assert_eq!(request.first("sec-websocket-version"), Some("13"));
    assert_eq!(request.first("sec-websocket-protocol"), Some("v1, v2"));
    assert_eq!(
        request.first("sec-websocket-extensions"),
        Some("permessage-deflate; client_max_window_bits, x-other")
    );
    assert!(request.first("upgrade").is_some_and(|name| name.eq_ignore_ascii_case("websocket")));
    assert!(request.has("x-forwarded-for"), "as for HTTP: {request:?}");
}

#[test]
fn service_that_chooses_nothing_stays_without_choice() {
    let stage = echo();
    let lines = "Sec-WebSocket-Protocol: v1\r\nSec-WebSocket-Extensions: permessage-deflate\r\n";
    let socket = Socket::open_with(stage.sidelane.web(), "/", lines);
    assert_eq!(socket.head.first("sec-websocket-protocol"), None);
    assert_eq!(socket.head.first("sec-websocket-extensions"), None);
}

#[test]
fn refusal_of_the_service_passes_as_it_is() {
    for (name, status, answer) in [
        (
            "length",
            403,
            "HTTP/1.1 403 Forbidden\r\nset-cookie: a=1\r\nset-cookie: b=2\r\ncontent-length: 4\r\n\r\nno!\n",
        ),
        (
            "chunks",
            401,
            "HTTP/1.1 401 Unauthorized\r\nwww-authenticate: Basic\r\ntransfer-encoding: chunked\r\n\r\n2\r\nno\r\n2\r\n!\n\r\n0\r\n\r\n",
        ),
        (
            "other version",
            426,
            "HTTP/1.1 426 Upgrade Required\r\nsec-websocket-version: 13\r\ncontent-length: 4\r\n\r\nno!\n",
        ),
        ("no upgrade", 200, "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nno!\n"),
        (
            "redirect",
            307,
            "HTTP/1.1 307 Temporary Redirect\r\nlocation: /b\r\ncontent-length: 4\r\n\r\nno!\n",
        ),
    ] {
        let service = Service::answering(answer);
        let sidelane = Sidelane::both(&Setup::of(service.address()).websocket("{}"));
        let refused = refusal(sidelane.web(), "api.localhost", "/");
        assert_eq!(refused.head.status, status, "{name}: {refused:?}");
        assert_eq!(refused.body, b"no!\n", "{name}");
        assert_eq!(refused.head.first("x-sidelane-error"), None, "{name}");
        match status {
            403 => {
                let cookies: Vec<_> = refused.head.all("set-cookie").collect();
                assert_eq!(cookies, [b"a=1", b"b=2"]);
            }
            401 => assert_eq!(refused.head.first("www-authenticate"), Some("Basic")),
            426 => assert_eq!(refused.head.first("sec-websocket-version"), Some("13")),
            307 => assert_eq!(refused.head.first("location"), Some("/b")),
            _ => {}
        }
    }
}

#[test]
fn handshake_that_reaches_nobody_says_why() {
    let nobody = Nobody::new();
    let sidelane = Sidelane::both(&Setup::of(nobody.address()).websocket("{}"));
    let refused = refusal(sidelane.web(), "nobody.localhost", "/");
    assert_eq!(refused.head.status, 404);
    assert_eq!(refused.head.first("x-sidelane-error"), Some("no-route"));
    let refused = refusal(sidelane.web(), "api.localhost", "/");
    assert_eq!(refused.head.status, 502, "{refused:?}");
    assert!(refused.head.first("x-sidelane-error").is_some());

    let relay =
        Sidelane::spawn("relay", &Setup::of(nobody.address()).websocket("{}").relay_with_routes());
    let refused = refusal(relay.web(), "api.localhost", "/");
    assert_eq!(refused.head.status, 503);
    assert!(refused.head.first("retry-after").is_some(), "{refused:?}");
}

#[test]
fn service_that_does_not_answer_the_handshake_is_504() {
    let service = Service::start(|connection| {
        connection.request()?;
        connection.closed()
    });
    let setup = Setup::of(service.address()).websocket("{ handshake_timeout: 300ms }");
    let sidelane = Sidelane::both(&setup);
    let refused = refusal(sidelane.web(), "api.localhost", "/");
    assert_eq!(refused.head.status, 504, "{refused:?}");
    assert!(refused.head.first("x-sidelane-error").is_some());
    service.until("the service's connection to close", |records| records[0].closed);
}

#[test]
fn service_that_breaks_off_the_handshake_is_502() {
    for (name, answer) in [
        ("nothing", ""),
        ("half a head", "HTTP/1.1 101 Switching"),
        ("no HTTP", "hello\r\n\r\n"),
        (
            "no accept",
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        ),
        (
            "another accept",
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: AAAAAAAAAAAAAAAAAAAAAAAAAAA=\r\n\r\n",
        ),
    ] {
        let stage = Stage::script_with(
            |setup| setup.websocket("{}"),
            move |connection| {
                connection.request()?;
                connection.write(answer)?;
                connection.crash()
            },
        );
        let refused = refusal(stage.sidelane.web(), "api.localhost", "/");
        assert_eq!(refused.head.status, 502, "{name}: {refused:?}");
        assert!(refused.head.first("x-sidelane-error").is_some(), "{name}");
    }
}

/// Frames of every kind that a transparent hop passes, from a client where `masked`.
fn every_kind(masked: bool) -> Vec<Frame> {
    let mut frames = vec![
        Frame::new(TEXT, "hello"),
        Frame::new(TEXT, ""),
        Frame::new(BINARY, (0..=255).collect::<Vec<u8>>()),
        // Not UTF-8: whether that is wrong is for the ends to say.
        Frame::new(TEXT, b"\xff\xfe"),
        Frame::new(TEXT, "one ").unfinished(),
        Frame::new(PING, "in between"),
        Frame::new(CONTINUATION, "two ").unfinished(),
        Frame::new(CONTINUATION, "").unfinished(),
        Frame::new(PONG, ""),
        Frame::new(PONG, "unasked"),
        Frame::new(CONTINUATION, "three"),
        // What permessage-deflate marks: compressed messages, whole and in fragments.
        Frame::new(TEXT, "compressed, say both ends").rsv(4),
        Frame::new(BINARY, "compressed").rsv(4).unfinished(),
        Frame::new(CONTINUATION, "and its rest"),
        Frame::new(PING, "p".repeat(125)),
    ];
    for length in [125, 126, 127, 1000, 32 * 1024, 65_535, 65_536, 65_537, 1024 * 1024] {
        let payload = (0..length).map(|index: u32| index.to_le_bytes()[0] ^ 0x5a);
        frames.push(Frame::new(BINARY, payload.collect::<Vec<u8>>()));
    }
    frames.push(Frame::close(4001, "goodbye"));
    if masked {
        let keys = [MASK, [0; 4], [0xff; 4], [1, 2, 3, 4]];
        let keys = keys.iter().cycle();
        frames = frames.into_iter().zip(keys).map(|(frame, key)| frame.masked(*key)).collect();
    }
    frames
}

const DEFLATE: &str = "Sec-WebSocket-Extensions: permessage-deflate\r\n";

fn on_the_wire(frames: &[Frame]) -> Vec<u8> {
    frames.iter().flat_map(Frame::bytes).collect()
}

/// Compares long byte strings without printing them.
#[track_caller]
fn assert_same_bytes(left: &[u8], right: &[u8]) {
    let differs = left.iter().zip(right).position(|(left, right)| left != right);
    assert_eq!((left.len(), differs), (right.len(), None));
}

#[test]
fn frames_to_the_service_keep_every_byte() {
    let stage = Stage::script_with(
        |setup| setup.websocket("{}"),
        |connection| {
            connection.accept(DEFLATE)?;
            loop {
                if connection.frame()?.opcode == CLOSE {
                    return connection.write(Frame::close(4001, "goodbye").bytes());
                }
            }
        },
    );
    let sent = on_the_wire(&every_kind(true));
    let mut socket = Socket::open_with(stage.sidelane.web(), "/", DEFLATE);
    socket.client.send(&sent);
    assert_eq!(socket.frame(), Frame::close(4001, "goodbye"));
    let head = stage.service.only_request().raw.len();
    assert_same_bytes(&stage.service.received()[head..], &sent);
}

#[test]
fn frames_to_the_client_keep_every_byte() {
    let stage = Stage::script_with(
        |setup| setup.websocket("{}"),
        |connection| {
            connection.accept(DEFLATE)?;
            connection.write(on_the_wire(&every_kind(false)))?;
            connection.frame()?;
            Ok(())
        },
    );
    let mut socket = Socket::open_with(stage.sidelane.web(), "/", DEFLATE);
    let sent = on_the_wire(&every_kind(false));
    let received = socket.client.exactly(sent.len()).unwrap();
    assert_same_bytes(&received, &sent);
    let close = Frame::close(4001, "goodbye").masked(MASK).bytes();
    socket.client.send(&close);
    assert!(socket.client.rest().is_empty());
    wait::until("the closing handshake's end", || {
        stage.service.received().ends_with(&close).then_some(())
    });
}

#[test]
fn frames_pass_however_they_are_cut() {
    let stage = echo();
    let mut socket = stage.open();
    let frames = [
        Frame::new(TEXT, "cut").unfinished(),
        Frame::new(PING, "?"),
        Frame::new(CONTINUATION, "x".repeat(200)),
    ];
    for frame in &frames {
        for byte in frame.clone().masked(MASK).bytes() {
            socket.client.send([byte]);
        }
    }
    assert_eq!(socket.frame(), frames[0]);
    assert_eq!(socket.frame(), Frame::new(PONG, "?"));
    assert_eq!(socket.frame(), frames[2]);
}

#[test]
fn first_frames_may_come_with_the_handshake() {
    let stage = Stage::script_with(
        |setup| setup.websocket("{}"),
        |connection| {
            let request = connection.request()?.ok_or(std::io::ErrorKind::UnexpectedEof)?;
            // Head and first frame in one piece.
            let key = request.all("sec-websocket-key").next().unwrap_or_default();
            let head = format!(
                "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {}\r\n\r\n",
                accept(key)
            );
            connection.write([head.as_bytes(), &Frame::new(TEXT, "welcome").bytes()].concat())?;
            connection.echo()
        },
    );
    let mut client = Client::connect(stage.sidelane.web());
    let early = Frame::new(TEXT, "early").masked(MASK).bytes();
    client.send([handshake("api.localhost", "/", ""), early].concat());
    let head = client.head();
    let mut socket = Socket { client, head };
    assert_eq!(socket.frame(), Frame::new(TEXT, "welcome"));
    assert_eq!(socket.frame(), Frame::new(TEXT, "early"));
}

#[test]
fn frame_in_pieces_flows_before_it_is_whole() {
    let stage = echo_pieces();
    let mut socket = stage.open();
    // The header promises more than ever comes.
    let mut expected = Frame::new(BINARY, "").header(1 << 40);
    socket.client.send(Frame::new(BINARY, "").masked([0; 4]).header(1 << 40));
    for number in 0..20_u8 {
        socket.client.send(vec![number; 1000]);
        expected.extend([number; 1000]);
        assert_same_bytes(&socket.client.exactly(expected.len()).unwrap(), &expected);
        expected.clear();
    }
}

/// A service that sends a frame's bytes back as they come, the mask taken for zero.
fn echo_pieces() -> Stage {
    Stage::websocket(|connection| {
        connection.stop_recording();
        let header = connection.exactly(14)?;
        connection.write([&[header[0], header[1] & 0x7f], &header[2..10]].concat())?;
        loop {
            let piece = connection.some()?;
            if piece.is_empty() {
                return Ok(());
            }
            connection.write(piece)?;
        }
    })
}

#[test]
fn huge_frame_passes_both_ways_and_is_never_held_whole() {
    let stage = echo_pieces();
    let memory = stage.sidelane.memory_resident();
    let Socket { mut client, .. } = stage.open();
    client.send(Frame::new(BINARY, "").masked([0; 4]).header(HUGE_BYTES as u64));
    let piece: Vec<u8> = (0..1_000_000_u32).map(|index| index.to_le_bytes()[1]).collect();
    let sent = piece.clone();
    let mut writer = client.writer();
    let writing = std::thread::spawn(move || {
        for _ in 0..HUGE_BYTES / sent.len() {
            std::io::Write::write_all(&mut writer, &sent).unwrap();
        }
    });
    let header = Frame::new(BINARY, "").header(HUGE_BYTES as u64);
    assert_eq!(client.exactly(header.len()).unwrap(), header);
    for _ in 0..HUGE_BYTES / piece.len() {
        assert_same_bytes(&client.exactly(piece.len()).unwrap(), &piece);
    }
    writing.join().unwrap();
    let growth = stage.sidelane.memory_peak().saturating_sub(memory);
    assert!(growth < MEMORY_GROWTH_MAX, "{growth} bytes for a frame of {HUGE_BYTES}");
}

#[test]
fn close_passes_from_the_client_to_the_service_and_back() {
    let closes = [
        Frame::new(CLOSE, ""),
        Frame::close(1000, ""),
        Frame::close(1001, "käse"),
        Frame::close(3000, &"r".repeat(123)),
        Frame::close(4999, "private"),
    ];
    let stage = Stage::websocket(|connection| {
        let close = connection.frame()?;
        let mut answer = close.clone();
        answer.mask = None;
        connection.write(answer.bytes())?;
        connection.closed()
    });
    for close in closes {
        let mut socket = stage.open();
        socket.send(close.clone());
        assert_eq!(socket.frame(), close);
        assert!(socket.client.rest().is_empty(), "{close:?}");
        let sent = close.clone().masked(MASK).bytes();
        let records = stage.service.records();
        assert!(records.last().unwrap().received.ends_with(&sent), "{close:?}");
    }
}

#[test]
fn close_passes_from_the_service_to_the_client_and_back() {
    let closes = Arc::new(Mutex::new(vec![
        Frame::new(CLOSE, ""),
        Frame::close(1000, "done"),
        Frame::close(1011, "käse"),
        Frame::close(4999, &"r".repeat(123)),
    ]));
    let expected = closes.lock().unwrap().clone();
    let (answers, answered) = mpsc::channel();
    let answers = Mutex::new(answers);
    let stage = Stage::websocket(move |connection| {
        let close = closes.lock().expect("no panic").pop().expect("one per connection");
        connection.write(close.bytes())?;
        let answer = connection.frame()?;
        answers.lock().expect("no panic").send(answer).expect("the test waits");
        Ok(())
    });
    for close in expected.iter().rev() {
        let mut socket = stage.open();
        assert_eq!(socket.frame(), *close);
        // The client's answer is its own, and reaches the service as it is.
        socket.send(Frame::close(1000, "answer"));
        let answer = answered.recv_timeout(wait::DEADLINE).expect("the client's close");
        assert_eq!(answer, Frame::close(1000, "answer").masked(MASK));
        assert!(socket.client.rest().is_empty());
    }
}

#[test]
fn plain_requests_of_the_route_pass_beside() {
    let stage = Stage::script_with(
        |setup| setup.websocket("{}"),
        |connection| {
            while let Some(request) = connection.request()? {
                if request.has("upgrade") {
                    connection.upgrade(&request, "")?;
                    return connection.echo();
                }
                connection.write("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
            }
            Ok(())
        },
    );
    let mut socket = stage.open();
    assert_eq!(stage.get("/").body, b"ok");
    socket.says_back("one");
    // An upgrade to something else is no WebSocket: HTTP takes it, as it always did.
    let other = request(
        stage.sidelane.web(),
        "GET",
        "GET / HTTP/1.1\r\nHost: api.localhost\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n",
    );
    assert_eq!(other.head.status, 200);
    socket.says_back("two");
}
