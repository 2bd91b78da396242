use std::future::poll_fn;
use std::net::Ipv4Addr;

use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;
use crate::tunnel::test_tls::{self, Ca};

async fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a listener");
    let address = listener.local_addr().expect("its address");
    let (dialled, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
    (dialled.expect("dialled"), accepted.expect("accepted").0)
}

/// Both ends of a TLS connection, the dialler's first.
async fn pair() -> (Transport, Transport) {
    let ca = Ca::new("test");
    let certificate = ca.certificate("relay.test");
    let acceptor = TlsAcceptor::from(test_tls::server(&certificate, None, &[TUNNEL_ALPN]));
    let connector = TlsConnector::from(test_tls::client(&ca, None, &[TUNNEL_ALPN]));
    let (dialled, accepted) = sockets().await;
    let name = ServerName::try_from("relay.test").expect("a name");
    let (client, server) = tokio::join!(
        connector.connect(name, Socket::new(dialled).reading_ahead()),
        acceptor.accept(Socket::new(accepted).reading_ahead()),
    );
    (Transport::client(client.expect("TLS")), Transport::server(server.expect("TLS")))
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| u8::try_from(at % 251).expect("below")).collect()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

#[test]
fn a_connection_goes_to_another_runtime_with_what_was_read_and_not_given_out() {
    let here = runtime();
    let (mut client, mut server) = here.block_on(async {
        let (mut client, mut server) = pair().await;
        assert!(client.is_tls() && client.speaks_tunnel() && server.speaks_tunnel());
        client.write_all(&pattern(100_000)).await.expect("written");
        client.flush().await.expect("flushed");
        // The rest lies in rustls, in the socket's read-ahead, and in the kernel.
        let mut first = [0; 10];
        server.read_exact(&mut first).await.expect("read");
        assert_eq!(first, *pattern(10));
        server.detach().expect("taken off");
        server.read_exact(&mut first).await.expect("what is decrypted is given out still");
        (client, server)
    });
    let there = std::thread::spawn(move || {
        runtime().block_on(async move {
            server.attach().expect("put on");
            let mut rest = vec![0; 99_980];
            server.read_exact(&mut rest).await.expect("read");
            assert_eq!(rest, pattern(100_000)[20..]);
            server.write_all(b"answer").await.expect("written");
            server.shutdown().await.expect("shut down");
        });
    });
    here.block_on(async {
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.expect("read");
        assert_eq!(answer, b"answer");
    });
    there.join().expect("no panic");
}

#[tokio::test]
async fn a_lanes_batch_is_taken_whole_and_a_full_buffer_is_backpressure() {
    let (mut client, mut server) = pair().await;
    let batch = pattern(TLS_BUFFER_BYTES);
    let slices: Vec<IoSlice<'_>> = batch.chunks(2048).map(IoSlice::new).collect();
    assert_eq!(slices.len(), 64, "as drive writes");
    let first = poll_fn(|cx| Pin::new(&mut client).poll_write_vectored(cx, &slices)).await;
    assert_eq!(first.expect("written"), batch.len(), "in one call, and not a part of it");
    let mut sent = batch.clone();
    // Until nobody takes any more: the peer reads nothing.
    loop {
        let more = poll_fn(|cx| match Pin::new(&mut client).poll_write_vectored(cx, &slices) {
            Poll::Pending => Poll::Ready(None),
            Poll::Ready(written) => Poll::Ready(Some(written.expect("written"))),
        });
        let Some(written) = more.await else { break };
        sent.extend_from_slice(&batch[..written]);
        assert!(sent.len() < 64 << 20, "somebody holds it all");
    }
    let expected = sent.len();
    let reader = tokio::spawn(async move {
        let mut received = vec![0; expected];
        server.read_exact(&mut received).await.expect("read");
        (received, server)
    });
    // As an idle lane does: what was taken gets out without another write.
    client.flush().await.expect("flushed");
    let (received, _server) = reader.await.expect("no panic");
    assert!(received == sent, "what was taken arrives, in order");
}

#[tokio::test]
async fn what_was_read_before_comes_first_and_peeking_takes_nothing() {
    let (mut dialled, accepted) = sockets().await;
    let mut socket = Socket::with_ahead(accepted, BytesMut::from(&b"a"[..]));
    dialled.write_all(b"bcdef").await.expect("written");
    assert_eq!(socket.peek(3).await.expect("peeked"), b"abc");
    let mut socket = socket.reading_ahead();
    let mut all = [0; 6];
    socket.read_exact(&mut all).await.expect("read");
    assert_eq!(&all, b"abcdef");
    drop(dialled);
    assert_eq!(socket.peek(2).await.expect("the end"), b"");
}

#[tokio::test]
async fn an_idle_connection_holds_no_read_buffer() {
    let (mut dialled, accepted) = sockets().await;
    let mut socket = Socket::new(accepted).reading_ahead();
    let mut bytes = [0; 4];
    dialled.write_all(b"abcdef").await.expect("written");
    socket.read_exact(&mut bytes).await.expect("read");
    assert!(socket.ahead.capacity() > 0);
    socket.read_exact(&mut bytes[..2]).await.expect("read");
    assert_eq!(socket.ahead.capacity(), 0);
    assert!(
        SPARE.with_borrow(|spare| spare.as_ref().is_some_and(|b| b.capacity() >= READ_AHEAD_BYTES))
    );
}

#[tokio::test]
async fn both_ends_know_what_was_shown() {
    let ca = Ca::new("test");
    let certificate = ca.certificate("relay.test");
    let shown = ca.certificate("sidecar.test");
    // A protocol of somebody else's.
    let acceptor = TlsAcceptor::from(test_tls::server(&certificate, Some(&ca), &[b"h2"]));
    let connector = TlsConnector::from(test_tls::client(&ca, Some(&shown), &[b"h2"]));
    let (dialled, accepted) = sockets().await;
    let name = ServerName::try_from("relay.test").expect("a name");
    let (client, server) = tokio::join!(
        connector.connect(name, Socket::new(dialled)),
        acceptor.accept(Socket::new(accepted)),
    );
    let client = Transport::client(client.expect("TLS"));
    let mut server = Transport::server(server.expect("TLS"));
    assert!(!client.speaks_tunnel() && !server.speaks_tunnel());
    assert_eq!(client.peer_chain(), &*certificate.chain);
    assert_eq!(server.peer_chain(), &*shown.chain);
    server.forget_peer_chain();
    assert!(server.peer_chain().is_empty());
}
