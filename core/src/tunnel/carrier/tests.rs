//! What holds of every carrier.

use std::future::poll_fn;
use std::io::IoSlice;
use std::net::Ipv4Addr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use tokio::io::{AsyncReadExt as _, AsyncWrite as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, oneshot};

use super::*;
use crate::tunnel::carrier::grpc::{CONTENT, GrpcStream};
use crate::tunnel::carrier::websocket::WebSocketStream;
use crate::tunnel::drive::WRITE_BYTES;
use crate::tunnel::transport::{Movable as _, Socket, Transport};

pub(in crate::tunnel) async fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a listener");
    let address = listener.local_addr().expect("its address");
    let (dialled, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
    (dialled.expect("dialled"), accepted.expect("accepted").0)
}

pub(super) fn plain(stream: TcpStream) -> Transport {
    Transport::plain(Socket::new(stream))
}

/// Both ends of a lane's connection, the dialler's first.
async fn pair(kind: Kind) -> (Transport, Transport) {
    let (dialled, accepted) = sockets().await;
    let (dialled, accepted) = (plain(dialled), plain(accepted));
    match kind {
        Kind::Tcp => (dialled, accepted),
        Kind::WebSocket => {
            let (dialled, accepted) = tokio::join!(
                WebSocketStream::dial(dialled, "relay.test", "/tunnel"),
                websocket::tests::accept(accepted),
            );
            (Transport::websocket(dialled.expect("a WebSocket")), Transport::websocket(accepted))
        }
        Kind::Grpc => {
            let accepted = accept_grpc(accepted);
            let dialled = GrpcStream::dial(dialled, "relay.test", false).await.expect("HTTP/2");
            let mut dialled = Transport::grpc(dialled, false, Vec::new());
            // The dialler's connection moves when its stream does.
            dialled.flush().await.expect("flushed");
            let accepted = accepted.await.expect("a stream");
            (dialled, accepted)
        }
    }
}

/// Serves HTTP/2 in a task, and gives out the first stream.
pub(super) fn accept_grpc(stream: Transport) -> oneshot::Receiver<Transport> {
    let (give, stream_of) = oneshot::channel();
    tokio::spawn(async move {
        let mut connection = h2::server::Builder::new()
            .max_send_buffer_size(grpc::SEND_BUFFER_BYTES)
            .handshake::<_, bytes::Bytes>(stream)
            .await
            .expect("HTTP/2");
        let (request, mut respond) = connection.accept().await.expect("a stream").expect("HTTP/2");
        assert_eq!(request.uri().path(), GRPC_PATH);
        assert_eq!(request.headers()["te"], "trailers");
        let mut head = http::Response::new(());
        head.headers_mut().insert(http::header::CONTENT_TYPE, CONTENT);
        let send = respond.send_response(head, false).expect("answered");
        drop(respond);
        let stream = GrpcStream::accepted(send, request.into_body(), Arc::new(Notify::new()));
        let _ = give.send(Transport::grpc(stream, false, Vec::new()));
        while connection.accept().await.is_some() {}
    });
    stream_of
}

pub(super) fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| u8::try_from(at % 251).expect("below")).collect()
}

#[tokio::test]
async fn bytes_arrive_in_order_however_they_are_written_and_read() {
    for kind in Kind::ALL {
        let (client, server) = pair(kind).await;
        assert_eq!((client.kind(), server.kind()), (kind, kind));
        for (mut from, mut to) in [(client, server)].into_iter().flat_map(|(client, server)| {
            let (read_client, write_client) = tokio::io::split(client);
            let (read_server, write_server) = tokio::io::split(server);
            [(write_client, read_server), (write_server, read_client)]
        }) {
            let sent = pattern(3_000_000);
            let expected = sent.clone();
            let write = async move {
                let mut at = 0;
                for size in [1, 2, 300, 5_000, 130_000, 1_000_000].into_iter().cycle() {
                    let end = (at + size).min(sent.len());
                    from.write_all(&sent[at..end]).await.expect("written");
                    at = end;
                    if at == sent.len() {
                        break;
                    }
                }
                from.flush().await.expect("flushed");
                from
            };
            let read = async move {
                let mut received = vec![0; expected.len()];
                let mut at = 0;
                for size in [1, 7, 4_096, 200_000].into_iter().cycle() {
                    let end = (at + size).min(received.len());
                    let read = to.read(&mut received[at..end]).await.expect("read");
                    assert!(read > 0, "{kind}: the end");
                    at += read;
                    if at == received.len() {
                        break;
                    }
                }
                assert!(received == expected, "{kind}");
                to
            };
            let _ends = tokio::join!(write, read);
        }
    }
}

#[tokio::test]
async fn a_batch_is_taken_whole_and_one_who_does_not_read_is_waited_for() {
    for kind in [Kind::WebSocket, Kind::Grpc] {
        let (mut client, server) = pair(kind).await;
        let batch = pattern(WRITE_BYTES);
        let slices: Vec<IoSlice<'_>> = batch.chunks(2048).map(IoSlice::new).collect();
        let mut sent = 0;
        if kind == Kind::WebSocket {
            let first = poll_fn(|cx| Pin::new(&mut client).poll_write_vectored(cx, &slices)).await;
            sent = first.expect("written");
            assert_eq!(sent, batch.len(), "in one call");
        }
        // Until nobody takes any more.
        loop {
            let more = poll_fn(|cx| match Pin::new(&mut client).poll_write_vectored(cx, &slices) {
                Poll::Pending => Poll::Ready(None),
                Poll::Ready(written) => Poll::Ready(Some(written.expect("written"))),
            });
            let Some(written) = more.await else { break };
            sent += written;
            assert!(sent < 64 << 20, "{kind}: somebody holds it all");
        }
        // What was taken gets out without another write; an end that reads nothing but is flushed does too.
        let read = tokio::spawn(async move {
            let mut server = server;
            let mut received = vec![0; sent];
            server.read_exact(&mut received).await.expect("read");
            server
        });
        let flushed = async {
            poll_fn(|cx| {
                let _ = Pin::new(&mut client).poll_flush(cx);
                let mut space = [0; 1];
                let mut space = tokio::io::ReadBuf::new(&mut space);
                // As a lane's driver does.
                let _ = tokio::io::AsyncRead::poll_read(Pin::new(&mut client), cx, &mut space);
                Poll::<()>::Pending
            })
            .await;
        };
        tokio::select! {
            () = flushed => {}
            server = read => drop(server.expect("no panic")),
        }
    }
}

#[test]
fn a_connection_goes_to_another_runtime_with_what_was_read_and_not_given_out() {
    let runtime =
        || tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    for kind in Kind::ALL {
        let here = runtime();
        let (mut client, mut server) = here.block_on(async {
            let (mut client, mut server) = pair(kind).await;
            server.write_all(&pattern(50_000)).await.expect("written");
            server.flush().await.expect("flushed");
            let mut first = [0; 10];
            client.read_exact(&mut first).await.expect("read");
            assert_eq!(first, *pattern(10));
            client.detach().expect("taken off");
            (client, server)
        });
        let there = std::thread::spawn(move || {
            runtime().block_on(async move {
                client.attach().expect("put on");
                let mut rest = vec![0; 49_990];
                client.read_exact(&mut rest).await.expect("read");
                assert_eq!(rest, pattern(50_000)[10..]);
                client.write_all(b"answer").await.expect("written");
                client.shutdown().await.expect("shut down");
                // Until the other end has it.
                let _ = client.read(&mut rest).await;
            });
        });
        here.block_on(async {
            let mut answer = Vec::new();
            server.read_to_end(&mut answer).await.expect("read");
            assert_eq!(answer, b"answer", "{kind}");
            server.shutdown().await.expect("shut down");
        });
        drop(server);
        drop(here);
        there.join().expect("no panic");
    }
}

#[tokio::test]
async fn a_connection_that_is_gone_ends_the_bytes() {
    for kind in Kind::ALL {
        let (mut client, server) = pair(kind).await;
        drop(server);
        let mut rest = Vec::new();
        // An end or an error, and no waiting.
        let _ = client.read_to_end(&mut rest).await;
        assert!(rest.is_empty(), "{kind}");
    }
}

#[test]
fn what_an_answer_says_is_told_in_a_line() {
    for (body, expected) in [
        (&b"no such thing\nmore"[..], Some("no such thing")),
        (b"  \x1b[31mred", Some("\\u{1b}[31mred")),
        (b"<html><body>", None),
        (b"", None),
        (b"\nsecond", None),
    ] {
        assert_eq!(first_line(body).as_deref(), expected);
    }
    assert_eq!(first_line(&[b'x'; 1000]).map(|line| line.len()), Some(TOLD_BYTES_MAX));
    let mut headers = HeaderMap::new();
    headers.insert(RETRY_AFTER, http::HeaderValue::from_static("7"));
    let error =
        CarrierError::http(http::StatusCode::TOO_MANY_REQUESTS, &headers, b"slow down").io();
    let wrapped = io::Error::other(error);
    let found = CarrierError::of(&wrapped).expect("inside");
    assert_eq!(found.to_string(), "it answers HTTP 429: slow down");
    assert!(
        matches!(found, CarrierError::Http { retry_after: Some(after), .. } if after.as_secs() == 7)
    );
}
