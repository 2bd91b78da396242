//! Many WebSockets and calls at once: none waits for another, none leaves anything behind.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};

use sidelane_e2e::client::Client;
use sidelane_e2e::process::{Setup, Sidelane};
use sidelane_e2e::stage::Stage;
use sidelane_e2e::websocket::{
    BINARY, CONTINUATION, Frame, MASK, PING, Socket, TEXT, handshake, refusal,
};

use crate::grpc::Peers;
use crate::residue::Random;

/// Exchanges with random ends.
const EXCHANGES: u64 = 3_000;
/// Clients at once.
const CLIENTS: u64 = 16;
/// Round trips beside what is stalled.
const ROUNDS: usize = 500;

#[test]
fn what_passes_is_counted_by_route() {
    let stage = Stage::script_with(
        |setup| setup.websocket("{}"),
        |connection| {
            while let Some(request) = connection.request()? {
                if request.target == b"/refuse" {
                    connection.write("HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n")?;
                    continue;
                }
                connection.upgrade(&request, "")?;
                return connection.echo();
            }
            Ok(())
        },
    );
    let mut socket = stage.open();
    socket.says_back("hello");
    socket.send(Frame::new(BINARY, vec![0; 100_000]).unfinished());
    socket.send(Frame::new(PING, "?"));
    socket.send(Frame::new(CONTINUATION, "end"));
    for _ in 0..3 {
        drop(socket.frame());
    }
    let sidelane = &stage.sidelane;
    let route = "route=\"api\"";
    sidelane.until_metric("sidelane_plugin_websocket_connections", &[route], |open| open == 1.0);
    socket.send(Frame::close(4000, ""));
    assert_eq!(socket.closes("the echo").0, 4000);
    assert_eq!(refusal(sidelane.web(), "api.localhost", "/refuse").head.status, 403);
    sidelane.until_metric("sidelane_plugin_websocket_connections", &[route], |open| open == 0.0);

    let (up, down) = ("direction=\"client_to_service\"", "direction=\"service_to_client\"");
    let code = |code: &str| format!("code=\"{code}\"");
    for (name, labels, count) in [
        ("connections_opened_total", vec![], 1),
        ("handshakes_refused_total", vec![code("403")], 1),
        ("messages_total", vec![up.to_owned(), "type=\"text\"".to_owned()], 1),
        ("messages_total", vec![down.to_owned(), "type=\"text\"".to_owned()], 1),
        ("messages_total", vec![up.to_owned(), "type=\"binary\"".to_owned()], 1),
        ("messages_total", vec![down.to_owned(), "type=\"binary\"".to_owned()], 1),
        ("messages_total", vec![up.to_owned(), "type=\"ping\"".to_owned()], 1),
        ("messages_total", vec![down.to_owned(), "type=\"pong\"".to_owned()], 1),
        ("messages_total", vec![up.to_owned(), "type=\"close\"".to_owned()], 1),
        ("bytes_total", vec![up.to_owned()], 5 + 100_003 + 1 + 2),
        ("bytes_total", vec![down.to_owned()], 5 + 100_003 + 1 + 2),
        ("message_size_bytes_count", vec![up.to_owned()], 2),
        ("message_size_bytes_sum", vec![up.to_owned()], 100_008),
        ("closes_total", vec!["by=\"client\"".to_owned(), code("4xxx")], 1),
    ] {
        let name = format!("sidelane_plugin_websocket_{name}");
        let mut labels: Vec<_> = labels.iter().map(String::as_str).collect();
        labels.push(route);
        let value = sidelane.metric(&name, &labels);
        assert_eq!(value, Some(f64::from(count)), "{name}{labels:?}");
    }
}

/// A service that pours without end on `/pour`, never reads on `/ignore`, and echoes else.
fn stalling() -> Stage {
    Stage::script_with(
        |setup| setup.websocket("{}"),
        |connection| {
            connection.stop_recording();
            let request = connection.accept("")?;
            match request.target.as_slice() {
                b"/pour" => {
                    let frame = Frame::new(BINARY, vec![7; 60_000]).bytes();
                    loop {
                        connection.write(&frame)?;
                    }
                }
                b"/ignore" => {
                    connection.write(Frame::new(TEXT, "ignoring").bytes())?;
                    // Returns once the test is over: its handle of the socket dies with the process.
                    loop {
                        std::thread::park();
                    }
                }
                _ => connection.echo(),
            }
        },
    )
}

#[test]
fn stalled_websockets_hold_no_other_back() {
    let stage = stalling();
    let relay = stage.sidelane.web();
    // Their service pours, and they never read.
    let _pouring: Vec<_> = (0..4).map(|_| Socket::open_with(relay, "/pour", "")).collect();
    // They pour, and their service never reads.
    let mut ignored: Vec<_> = (0..4).map(|_| Socket::open_with(relay, "/ignore", "")).collect();
    let frame = Frame::new(BINARY, vec![7; 60_000]).masked(MASK).bytes();
    for socket in &mut ignored {
        let mut writer = socket.client.writer();
        let frame = frame.clone();
        std::thread::spawn(move || while std::io::Write::write_all(&mut writer, &frame).is_ok() {});
    }
    let mut socket = Socket::open(relay);
    for number in 0..ROUNDS {
        socket.says_back(&number.to_string());
    }
}

#[test]
fn stalled_websocket_and_stalled_stream_hold_no_ping_pong_back() {
    let test = "stalled_websocket_and_stalled_stream_hold_no_ping_pong_back";
    let Some(peers) = Peers::find(test) else { return };
    let (_peer, address) = peers.service("tonic");
    let stalling = stalling();
    // One session carries both protocols to two services.
    let setup = Setup::of(stalling.service.address())
        .websocket("{}")
        .grpc("{}")
        .tunnel("calls", address)
        .route(sidelane_e2e::process::Route::new("api", "calls").under("/e2e.Peer").named("calls"));
    let sidelane = Sidelane::both(&setup);
    let _unread = Socket::open_with(sidelane.web(), "/pour", "");
    let mut socket = Socket::open(sidelane.web());
    socket.says_back("before");
    let seen = peers.ask("tonic", "stalled", sidelane.web());
    assert_eq!(seen["rounds"], ROUNDS, "{seen}");
    for number in 0..ROUNDS {
        socket.says_back(&number.to_string());
    }
}

/// One WebSocket with one of many ends. Errors are ends, too: only what is left counts.
fn one(relay: SocketAddr, random: &mut Random) {
    let mut client = Client::connect(relay);
    let kind = random.below(12);
    let path = match kind {
        0 => "/refuse",
        1 => "/crash",
        2 => "/half",
        3 => "/wrong",
        4 => "/close",
        _ => "/",
    };
    client.send(handshake("api.localhost", path, ""));
    if kind == 5 {
        return;
    }
    if !client.try_head().is_ok_and(|head| head.status == 101) {
        return;
    }
    let _ = client.try_send(&Frame::new(TEXT, "hello").masked(MASK).bytes());
    let end = match kind {
        6 => Frame::new(TEXT, "unmasked").bytes(),
        7 => Frame::new(BINARY, "").masked(MASK).header(1_000_000),
        8 => Frame::new(BINARY, vec![1; 100_000]).masked(MASK).bytes(),
        9 => vec![0x81],
        _ => Frame::close(1000, "").masked(MASK).bytes(),
    };
    let _ = client.try_send(&end);
    if random.below(2) == 0 {
        while Frame::read(|length| client.exactly(length)).is_ok() {
            if kind > 6 && kind < 10 {
                return;
            }
        }
    }
}

#[test]
fn thousands_of_random_ends_of_websockets_leave_nothing() {
    let stage = Stage::script_with(
        |setup| setup.websocket("{ close_timeout: 500ms }"),
        |connection| {
            connection.stop_recording();
            let Some(request) = connection.request()? else { return Ok(()) };
            match request.target.as_slice() {
                b"/refuse" => {
                    return connection.write("HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n");
                }
                b"/crash" => return connection.crash(),
                _ => connection.upgrade(&request, "")?,
            }
            match request.target.as_slice() {
                b"/half" => {
                    connection.write(&Frame::new(BINARY, vec![1; 99_999]).bytes()[..50_000])
                }
                b"/wrong" => {
                    connection.write(Frame::new(TEXT, "x").masked(MASK).bytes())?;
                    connection.closed()
                }
                b"/close" => {
                    connection.write(Frame::close(1000, "").bytes())?;
                    connection.frame().map(drop)
                }
                _ => connection.echo(),
            }
        },
    );
    let left = AtomicU64::new(EXCHANGES);
    let relay = stage.sidelane.web();
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            let left = &left;
            scope.spawn(move || {
                let mut random = Random::of(client);
                while left
                    .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1))
                    .is_ok()
                {
                    one(relay, &mut random);
                }
            });
        }
    });
    nothing_is_left(&stage.sidelane, "sidelane_plugin_websocket_connections");
    stage.open().says_back("the program still serves");
}

/// Waits until the program says that nothing is in flight, at either end, nor any client connected.
fn nothing_is_left(sidelane: &Sidelane, of_plugin: &str) {
    for name in ["sidelane_exchanges_in_flight", "sidelane_connections", of_plugin] {
        sidelane.until_metric(name, &[], |count| count == 0.0);
    }
}

#[test]
fn thousands_of_random_ends_of_calls_leave_nothing() {
    let test = "thousands_of_random_ends_of_calls_leave_nothing";
    let Some(python) = sidelane_e2e::tools::Python::find(test) else { return };
    let service = python.script("grpc_h2_server.py");
    let (_service, address) = sidelane_e2e::peer::Peer::service("h2", service);
    let sidelane = Sidelane::both(&Setup::of(address).grpc("{}"));
    let client = python.script("grpc_h2.py");
    let client = sidelane_e2e::peer::Peer::client("grpc_h2.py", client, "ends", sidelane.web());
    let seen = client.finish();
    assert_eq!(seen["ends"], 2_000, "{seen}");
    nothing_is_left(&sidelane, "sidelane_plugin_grpc_in_flight");
    sidelane.until_metric("sidelane_plugin_grpc_streams", &[], |count| count == 0.0);
}
