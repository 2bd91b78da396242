//! The tools of these tests, held against each other without the program.

use sidelane_e2e::client::{Client, request};
use sidelane_e2e::peer::Peer;
use sidelane_e2e::service::Service;
use sidelane_e2e::tools::{Python, tonic};
use sidelane_e2e::websocket::{Frame, Socket};

#[test]
fn service_records_what_the_client_sent() {
    let service = Service::ok();
    let bytes = b"POST /a%2f?x HTTP/1.1\r\nHost: h\r\nA: \xfe\r\ncontent-length: 3\r\n\r\nabc";
    let answer = request(service.address(), "POST", bytes);
    assert_eq!((answer.head.status, answer.body.as_slice()), (200, b"ok".as_slice()));
    assert_eq!(service.received(), bytes);
    let request = service.only_request();
    assert_eq!(request.target, b"/a%2f?x");
    assert_eq!(request.all("a").collect::<Vec<_>>(), [b"\xfe"]);
}

#[test]
fn chunks_and_trailers_are_told_apart() {
    let service = Service::answering(
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx-end: yes\r\n\r\n",
    );
    let mut client = Client::connect(service.address());
    for _ in 0..2 {
        client.send(
            "PUT / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nt: 1\r\n\r\n",
        );
        let answer = client.answer("PUT");
        assert_eq!(answer.body, b"ok");
        assert_eq!(answer.trailers, [(b"x-end".to_vec(), b"yes".to_vec())]);
    }
    assert_eq!(service.requests().len(), 2);
    assert_eq!(service.records().len(), 1);
}

#[test]
fn raw_frames_are_understood_by_others() {
    let Some(python) = Python::find("raw_frames_are_understood_by_others") else { return };
    // Our client, their service.
    let (peer, address) = Peer::service("websockets", python.script("ws_server.py"));
    let mut socket = Socket::open_with(address, "/echo", "");
    socket.says_back("hello");
    socket.send(Frame::close(4000, "bye"));
    assert_eq!(socket.frame().close_code(), Some((4000, "bye".to_owned())));
    assert!(socket.client.rest().is_empty());
    drop(socket);
    let seen = peer.finish();
    assert_eq!(
        (&seen["closes"][0]["code"], &seen["closes"][0]["reason"]),
        (&4000.into(), &"bye".into())
    );
    // Their client, our service.
    let service = Service::start(|connection| {
        connection.accept("")?;
        connection.echo()
    });
    let command = python.script("ws_client.py");
    let seen = Peer::client("websockets", command, "echo-plain", service.address()).finish();
    assert_eq!((&seen["large"], &seen["code"]), (&true.into(), &4000.into()), "{seen}");
}

#[test]
fn grpc_peers_understand_each_other() {
    let Some(python) = Python::find("grpc_peers_understand_each_other") else { return };
    let serve = || {
        let mut command = tonic();
        command.arg("serve");
        command
    };
    let (_grpcio, to_grpcio) = Peer::service("grpcio", python.script("grpc_server.py"));
    let (_tonic, to_tonic) = Peer::service("tonic", serve());
    for address in [to_grpcio, to_tonic] {
        for command in [python.script("grpc_client.py"), tonic()] {
            let seen = Peer::client("a gRPC client", command, "shapes", address).finish();
            assert_eq!((&seen["up"], &seen["chat"]), (&"100 4950".into(), &true.into()), "{seen}");
        }
    }
}
