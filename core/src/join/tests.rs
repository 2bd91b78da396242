use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UnixStream};

use super::*;

async fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dialled = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (listener.accept().await.unwrap().0, dialled)
}

/// Bytes that do not repeat within a pipe's or a buffer's size.
fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..length).map(|_| next()).collect()
}

/// Writes all of `bytes`, ends, and returns the hash of what comes back.
async fn exchange<S: Stream>(stream: S, bytes: Vec<u8>) -> (u64, Vec<u8>) {
    let (mut read, mut write) = tokio::io::split(stream);
    let reading = async {
        let (mut hash, mut count, mut space) = (Sha256::new(), 0, vec![0; 50_000]);
        loop {
            let read = read.read(&mut space).await.unwrap();
            if read == 0 {
                return (count, hash.finalize().to_vec());
            }
            count += read as u64;
            hash.update(&space[..read]);
        }
    };
    let writing = async {
        write.write_all(&bytes).await.unwrap();
        write.shutdown().await.unwrap();
    };
    tokio::join!(reading, writing).0
}

async fn check_bulk(a: (impl Stream, impl Stream), b: (impl Stream, impl Stream)) {
    let (there, back) = (pattern(24 * 1024 * 1024, 1), pattern(17 * 1024 * 1024 + 7, 2));
    let (sha_there, sha_back) = (Sha256::digest(&there).to_vec(), Sha256::digest(&back).to_vec());
    let lengths = (there.len() as u64, back.len() as u64);
    let joined = both(Box::new(a.1), Box::new(b.1));
    let (joined, at_a, at_b) = tokio::join!(joined, exchange(a.0, there), exchange(b.0, back));
    assert_eq!(joined.unwrap(), lengths);
    assert_eq!(at_a, (lengths.1, sha_back));
    assert_eq!(at_b, (lengths.0, sha_there));
}

#[tokio::test]
async fn sockets_are_joined_both_ways() {
    check_bulk(tcp_pair().await, tcp_pair().await).await;
    check_bulk(tcp_pair().await, UnixStream::pair().unwrap()).await;
}

#[tokio::test]
async fn what_is_no_socket_is_joined_too() {
    check_bulk(tokio::io::duplex(100_000), tcp_pair().await).await;
    check_bulk(tokio::io::duplex(1000), tokio::io::duplex(70_000)).await;
}

#[tokio::test]
async fn a_direction_ends_while_the_other_goes_on() {
    let ((mut client, ours), (mut service, theirs)) = (tcp_pair().await, tcp_pair().await);
    let ends = async move {
        client.write_all(b"all I have").await.unwrap();
        client.shutdown().await.unwrap();
        let mut heard = Vec::new();
        service.read_to_end(&mut heard).await.unwrap();
        assert_eq!(heard, b"all I have");
        // The end has passed, and the other direction is open.
        for part in [&b"first "[..], b"second"] {
            service.write_all(part).await.unwrap();
            let mut got = vec![0; part.len()];
            client.read_exact(&mut got).await.unwrap();
            assert_eq!(got, part);
        }
        drop(service);
        assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);
    };
    let (joined, ()) = tokio::join!(both(Box::new(ours), Box::new(theirs)), ends);
    assert_eq!(joined.unwrap(), (10, 12));
}

#[tokio::test]
async fn what_was_read_before_comes_first() {
    let ((mut client, mut ours), (mut service, mut theirs)) = (tcp_pair().await, tcp_pair().await);
    client.write_all(b"cd").await.unwrap();
    client.shutdown().await.unwrap();
    let mut direction = Direction::new(Bytes::from_static(b"ab"));
    let moved = poll_fn(|cx| direction.poll_move(cx, &mut ours, &mut theirs));
    moved.await.unwrap();
    poll_fn(|cx| direction.poll_shut(cx, &mut theirs)).await.unwrap();
    assert_eq!(direction.bytes(), 4);
    let mut heard = Vec::new();
    service.read_to_end(&mut heard).await.unwrap();
    assert_eq!(heard, b"abcd");
}

#[tokio::test]
async fn the_kernel_moves_what_is_much_and_nothing_is_held_at_rest() {
    let ((mut client, mut ours), (mut service, mut theirs)) = (tcp_pair().await, tcp_pair().await);
    let mut direction = Direction::default();
    let bytes = pattern(8 * 1024 * 1024, 3);
    let (mut got, mut was_spliced) = (vec![0; bytes.len()], false);
    let writing = client.write_all(&bytes);
    let reading = service.read_exact(&mut got);
    {
        let mut ends = std::pin::pin!(async { tokio::try_join!(writing, reading) });
        poll_fn(|cx| {
            let moved = direction.poll_move(cx, &mut ours, &mut theirs);
            assert!(moved.is_pending());
            was_spliced |= direction.is_bulk;
            ends.as_mut().poll(cx)
        })
        .await
        .unwrap();
    }
    assert!(was_spliced && got == bytes);
    poll_fn(|cx| {
        assert!(direction.poll_move(cx, &mut ours, &mut theirs).is_pending());
        Poll::Ready(())
    })
    .await;
    assert!(direction.pipe.is_none() && direction.held.is_empty());
}

#[tokio::test]
async fn a_broken_end_is_named() {
    let ((client, mut ours), (mut service, mut theirs)) = (tcp_pair().await, tcp_pair().await);
    socket2::SockRef::from(&client).set_linger(Some(std::time::Duration::ZERO)).unwrap();
    drop(client);
    let mut up = Direction::default();
    let fault = poll_fn(|cx| up.poll_move(cx, &mut ours, &mut theirs)).await.unwrap_err();
    assert!(matches!(fault, Fault::From(_)), "{fault:?}");
    service.write_all(b"for nobody").await.unwrap();
    service.write_all(b"at all").await.unwrap();
    let mut down = Direction::default();
    let fault = poll_fn(|cx| down.poll_move(cx, &mut theirs, &mut ours)).await.unwrap_err();
    assert!(matches!(fault, Fault::To(_)), "{fault:?}");
}
