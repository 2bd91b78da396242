use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use rustls::pki_types::ServerName;
use sidelane_abi::failure;
use sidelane_tunnel::{Event, LaneConfig, Payload, Received, Side};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, duplex};

use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use super::*;
use crate::metrics::{Flows, Metrics};
use crate::plugin::lend::{RecvHalf as _, SendHalf as _};
use crate::tls::TUNNEL_ALPN;
use crate::tunnel::drive;
use crate::tunnel::test_tls::{self, Ca};

const LOST: Reset = Reset::new(failure::TUNNEL_LOST);

/// A field of a protocol's payload (`HttpBody`).
const FIELD: u32 = 19;

fn link(side: Side) -> Arc<Link> {
    let config = LaneConfig {
        replay_bytes_min: 64 * 1024,
        replay_bytes_max: 256 * 1024,
        ..LaneConfig::new(side)
    };
    let link = Link::new(0, 0, Lane::new(config, Instant::now()));
    link.known();
    link
}

fn halves(link: &Arc<Link>, key: Key) -> (SendHalf, RecvHalf) {
    let metrics = Metrics::new();
    link.halves(key, Flows::new("relay").of(&metrics, &"HTTP".into()))
}

fn open(link: &Arc<Link>, id: u64) -> (SendHalf, RecvHalf) {
    let opened = link.open(|| RequestId(id), 1, &mut proto::Open::default());
    halves(link, opened.expect("opened").1)
}

/// A numbered message of some length.
fn message(number: u32, length: usize) -> Option<Payload> {
    let mut body = vec![u8::try_from(number % 251).expect("below"); length.max(4)];
    body[..4].copy_from_slice(&number.to_be_bytes());
    Some(Payload { field: FIELD, end: false, head: Bytes::new(), body: body.into() })
}

async fn send(half: &mut SendHalf, mut message: Option<Payload>) {
    poll_fn(|cx| half.poll_send(cx, &mut message)).await.expect("the exchange goes on");
}

async fn next(half: &mut RecvHalf) -> Received {
    poll_fn(|cx| half.poll_recv(cx)).await
}

/// Lengths and offsets that look as random as they need to.
struct Lcg(u64);

impl Lcg {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }

    fn length(&mut self) -> usize {
        let length = match self.below(8) {
            0 => self.below(32 * 1024),
            _ => self.below(600),
        };
        usize::try_from(length).expect("short")
    }
}

/// A stream that breaks after so many bytes, of both directions together.
struct Cut<S> {
    stream: S,
    left: Rc<Cell<u64>>,
}

impl<S> Cut<S> {
    fn pass(&self, bytes: usize) -> io::Result<()> {
        let left = self.left.get();
        if left == 0 {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        self.left.set(left.saturating_sub(bytes as u64));
        Ok(())
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Cut<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.pass(0)?;
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if read.is_ready() {
            // The last bytes before the break arrive in part.
            let left = usize::try_from(self.left.get()).unwrap_or(usize::MAX);
            let bytes = buf.filled().len() - before;
            buf.set_filled(before + bytes.min(left));
            self.pass(bytes)?;
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Cut<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.pass(0)?;
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        if let Poll::Ready(Ok(count)) = written {
            self.pass(count)?;
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Sends back what comes on an exchange.
async fn echo((mut send_half, mut recv_half): (SendHalf, RecvHalf)) {
    while let Received::Message(message) = next(&mut recv_half).await {
        send(&mut send_half, Some(Payload { end: false, ..message })).await;
    }
    send_half.finish();
}

/// Says numbered messages, and hears each of them once and in order.
async fn count(halves: (SendHalf, RecvHalf), count: u32, seed: u64) {
    let (mut send_half, mut recv_half) = halves;
    let mut lengths = Lcg(seed);
    let all: Vec<usize> = (0..count).map(|_| lengths.length()).collect();
    let say = async {
        for (number, length) in (0..).zip(&all) {
            send(&mut send_half, message(number, *length)).await;
        }
        send_half.finish();
    };
    let hear = async {
        for (number, length) in (0..).zip(&all) {
            let Received::Message(heard) = next(&mut recv_half).await else {
                panic!("message {number} does not come")
            };
            assert_eq!(heard.body, message(number, *length).expect("one").body, "message {number}");
        }
        assert_eq!(next(&mut recv_half).await, Received::Finished);
    };
    tokio::join!(say, hear);
}

/// Carries exchanges over connections that break again and again. Returns how often they did.
async fn carry<S>(
    exchanges: u64,
    messages: u32,
    seed: u64,
    mut connect: impl AsyncFnMut(Rc<Cell<u64>>) -> Option<(S, S)>,
) -> u32
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (relay, sidecar) = (link(Side::Relay), link(Side::Sidecar));
    let done = Rc::new(Cell::new(0));
    let wanted = exchanges;
    for id in 0..exchanges {
        let halves = open(&relay, id * 2 + 1);
        let (done, relay) = (Rc::clone(&done), Arc::clone(&relay));
        tokio::task::spawn_local(async move {
            count(halves, messages, seed + id).await;
            done.set(done.get() + 1);
            if done.get() == wanted {
                relay.close();
            }
        });
    }
    let mut random = Lcg(seed);
    let mut cuts = 0;
    loop {
        let left = Rc::new(Cell::new(20_000 + random.below(400_000)));
        if random.below(3) == 0 {
            left.set(1 + random.below(3_000));
        }
        let Some((ours, theirs)) = connect(Rc::clone(&left)).await else {
            cuts += 1;
            continue;
        };
        let at_relay = drive(Arc::clone(&relay), ours, BytesMut::new(), LOST, |_, _| {});
        let on_event = |link: &Arc<Link>, event| {
            if let Event::Opened { key, .. } = event {
                tokio::task::spawn_local(echo(halves(link, key)));
            }
        };
        let at_sidecar = drive(Arc::clone(&sidecar), theirs, BytesMut::new(), LOST, on_event);
        tokio::join!(at_relay, at_sidecar);
        if !relay.is_detached() {
            assert_eq!(done.get(), wanted, "closed before all was said");
            return cuts;
        }
        assert!(sidecar.is_detached() && !relay.is_open() && relay.is_suspended());
        cuts += 1;
        let (of_relay, of_sidecar) = (relay.received(), sidecar.received());
        relay.resume(of_sidecar).expect("nothing is missing");
        sidecar.resume(of_relay).expect("nothing is missing");
        // The next connection breaks before anything is driven on it.
        if random.below(4) == 0 {
            relay.with(Lane::detach);
            sidecar.with(Lane::detach);
            relay.resume(sidecar.received()).expect("nothing is missing");
            sidecar.resume(relay.received()).expect("nothing is missing");
        }
    }
}

#[tokio::test]
async fn thousands_of_cuts_lose_double_and_reorder_nothing() {
    let local = tokio::task::LocalSet::new();
    let cuts = local
        .run_until(carry(8, 6_000, 7, async |left: Rc<Cell<u64>>| {
            let (ours, theirs) = duplex(16 * 1024);
            let cut = |stream| Cut { stream, left: Rc::clone(&left) };
            Some((cut(ours), cut(theirs)))
        }))
        .await;
    assert!(cuts >= 1_000, "{cuts} cuts");
}

#[tokio::test]
async fn lanes_by_tls_come_back_as_well() {
    let ca = Ca::new("test");
    let certificate = ca.certificate("relay.test");
    let acceptor = TlsAcceptor::from(test_tls::server(&certificate, None, &[TUNNEL_ALPN]));
    let connector = TlsConnector::from(test_tls::client(&ca, None, &[TUNNEL_ALPN]));
    let local = tokio::task::LocalSet::new();
    let connect = async |left: Rc<Cell<u64>>| {
        let (ours, theirs) = duplex(16 * 1024);
        let cut = |stream| Cut { stream, left: Rc::clone(&left) };
        let name = ServerName::try_from("relay.test").expect("a name");
        // Both fail where the connection breaks within the handshake.
        let (server, client) =
            tokio::join!(acceptor.accept(cut(ours)), connector.connect(name, cut(theirs)));
        Some((TlsStream::from(server.ok()?), TlsStream::from(client.ok()?)))
    };
    let cuts = local.run_until(carry(4, 1_500, 11, connect)).await;
    assert!(cuts >= 100, "{cuts} cuts");
}
