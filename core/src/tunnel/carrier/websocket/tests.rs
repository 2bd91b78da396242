use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;
use crate::tunnel::carrier::tests::{pattern, plain, sockets};
use crate::tunnel::transport::Transport;

/// Makes the acceptor's handshake.
pub(in crate::tunnel::carrier) async fn accept(stream: Transport) -> WebSocketStream<Transport> {
    let socket = tokio_tungstenite::accept_async_with_config(stream, Some(config())).await;
    WebSocketStream::of(socket.expect("a WebSocket"))
}

/// The dialler's end as bytes on a connection, and the acceptor's.
async fn raw() -> (TcpStream, WebSocketStream<Transport>) {
    let (dialled, accepted) = sockets().await;
    (dialled, WebSocketStream::accepted(plain(accepted), Bytes::new()).await)
}

/// A frame of a dialler's, masked by zeros.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![first];
    match payload.len() {
        length @ 0..126 => bytes.push(0x80 | u8::try_from(length).unwrap()),
        length => {
            bytes.push(0x80 | 127);
            bytes.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(payload);
    bytes
}

async fn read_all(server: &mut WebSocketStream<Transport>) -> Result<Vec<u8>, String> {
    let mut all = Vec::new();
    match server.read_to_end(&mut all).await {
        Ok(_) => Ok(all),
        Err(error) => Err(error.to_string()),
    }
}

#[tokio::test]
async fn messages_and_their_fragments_are_one_stream_and_pings_are_answered_beside_it() {
    let (mut client, mut server) = raw().await;
    let mut sent = frame(0x82, b"abc");
    sent.extend_from_slice(&frame(0x82, b""));
    // In two fragments, with a ping between them.
    sent.extend_from_slice(&frame(0x02, b"de"));
    sent.extend_from_slice(&frame(0x89, b"are you there"));
    sent.extend_from_slice(&frame(0x80, b"f"));
    sent.extend_from_slice(&frame(0x8a, b"unasked"));
    sent.extend_from_slice(&frame(0x88, &[]));
    for byte in sent {
        client.write_all(&[byte]).await.expect("written");
    }
    assert_eq!(read_all(&mut server).await.as_deref(), Ok(&b"abcdef"[..]));
    server.flush().await.expect("flushed");
    drop(server);
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).await.expect("read");
    assert!(answer.starts_with(b"\x8a\x0dare you there\x88"), "a pong and a close: {answer:?}");
}

#[tokio::test]
async fn a_flood_of_messages_without_bytes_leaves_turns_to_others() {
    let (mut client, mut server) = raw().await;
    let count = 100 * NOTHINGS_PER_POLL;
    let mut sent = frame(0x82, b"").repeat(count);
    sent.extend_from_slice(&frame(0x82, b"abc"));
    client.write_all(&sent).await.expect("written");
    let mut polls = 0;
    let mut space = [0; 3];
    let mut room = ReadBuf::new(&mut space);
    let read = std::future::poll_fn(|cx| {
        polls += 1;
        Pin::new(&mut server).poll_read(cx, &mut room)
    });
    read.await.expect("read");
    assert_eq!(room.filled(), b"abc");
    assert!(polls > 100, "{polls} turns for {count} messages");
}

#[tokio::test]
async fn what_no_tunnel_sends_ends_the_lane_and_says_why() {
    for (name, bytes, expected) in [
        ("text", frame(0x81, b"hello"), "a text message on the WebSocket"),
        ("compressed", frame(0xc2, b"abc"), "a compressed frame"),
        ("large frame", frame(0x82, &vec![0; MESSAGE_BYTES_MAX + 1]), "above 1 MiB"),
        (
            "large message",
            {
                let mut bytes = frame(0x02, &vec![0; MESSAGE_BYTES_MAX]);
                bytes.extend_from_slice(&frame(0x80, b"x"));
                bytes
            },
            "above 1 MiB",
        ),
        ("opcode", frame(0x83, b"abc"), "opcode"),
        ("unmasked", vec![0x82, 1, b'x'], "unmasked"),
    ] {
        let (mut client, mut server) = raw().await;
        let write = async {
            // The other end may be gone before all is written.
            let _ = client.write_all(&bytes).await;
            let _ = client.shutdown().await;
        };
        let (error, ()) = tokio::join!(read_all(&mut server), write);
        let error = error.expect_err(name);
        assert!(error.contains(expected), "{name}: {error}");
    }
}

#[tokio::test]
async fn a_message_that_is_cut_off_is_none() {
    for rest in [1, 3, 7] {
        let (mut client, mut server) = raw().await;
        let mut sent = frame(0x82, b"whole");
        sent.extend_from_slice(&frame(0x82, b"cut off")[..rest]);
        client.write_all(&sent).await.expect("written");
        drop(client);
        assert_eq!(read_all(&mut server).await.as_deref(), Ok(&b"whole"[..]));
    }
}

#[tokio::test]
async fn a_batch_is_one_message() {
    let (dialled, accepted) = sockets().await;
    let (dialled, accepted) = tokio::join!(
        WebSocketStream::dial(plain(dialled), "relay.test", "/tunnel"),
        tokio_tungstenite::accept_async(accepted),
    );
    let (mut dialled, mut accepted) = (dialled.expect("dialled"), accepted.expect("accepted"));
    let batch = pattern(100_000);
    let slices: Vec<IoSlice<'_>> = batch.chunks(1000).map(IoSlice::new).collect();
    let write = dialled.write_vectored(&slices);
    let read = std::future::poll_fn(|cx| Pin::new(&mut accepted).poll_next(cx));
    let (written, read) = tokio::join!(write, read);
    assert_eq!(written.expect("written"), batch.len());
    let Some(Ok(Message::Binary(bytes))) = read else { panic!("a message: {read:?}") };
    assert!(bytes == batch);
}

#[tokio::test]
async fn an_answer_that_is_no_upgrade_says_what_it_is() {
    for (answer, expected) in [
        (
            "HTTP/1.1 404 Not Found\r\ncontent-length: 8\r\n\r\nnowhere\n",
            "it answers HTTP 404: nowhere",
        ),
        ("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", "it answers HTTP 200"),
        ("SSH-2.0-OpenSSH_9.2\r\n", "HTTP"),
        (
            "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\
             sec-websocket-accept: AAAAAAAAAAAAAAAAAAAAAAAAAAA=\r\n\r\n",
            "Key mismatch",
        ),
    ] {
        let (dialled, mut accepted) = sockets().await;
        let serve = async {
            let mut head = [0; 1024];
            let mut read = 0;
            while !head[..read].ends_with(b"\r\n\r\n") {
                read += accepted.read(&mut head[read..]).await.expect("read");
            }
            let head = String::from_utf8_lossy(&head[..read]).to_lowercase();
            assert!(head.starts_with("get /a?b=c http/1.1\r\n"), "{head}");
            assert!(head.contains("\r\nhost: relay.test:81\r\n"), "{head}");
            assert!(head.contains("\r\nuser-agent: sidelane/"), "{head}");
            accepted.write_all(answer.as_bytes()).await.expect("written");
            accepted.shutdown().await.expect("shut down");
        };
        let dial = WebSocketStream::dial(plain(dialled), "relay.test:81", "/a?b=c");
        let (dialled, ()) = tokio::join!(dial, serve);
        let error = dialled.err().expect("refused").to_string();
        assert!(error.contains(expected), "{error}");
    }
}
