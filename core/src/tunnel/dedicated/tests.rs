//! Two ends of a lane in one process, and connections of TCP between them.

use std::time::Instant;

use sidelane_tunnel::{Event, Lane, LaneConfig, Side as LaneSide, proto};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use super::*;
use crate::metrics::{Flows, Metrics};
use crate::plugin::lend::SendHalf as _;
use crate::tunnel::transport::Socket;
use crate::tunnel::{RecvHalf, SendHalf, drive};

/// Long enough for whatever is waited for; a test that needs it has failed.
const PATIENCE: Duration = Duration::from_secs(20);

async fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dialled = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (listener.accept().await.unwrap().0, dialled)
}

/// A lane with both its ends, and one exchange on it.
struct World {
    pool: Arc<Pool>,
    claims: Arc<Claims>,
    metrics: Arc<Metrics>,
    relay: (Arc<Link>, SendHalf, RecvHalf),
    sidecar: mpsc::Receiver<(Key, Arc<Link>)>,
    flow: Arc<Flow>,
    /// Dropped, the lane is lost.
    drives: Vec<tokio::task::JoinHandle<()>>,
}

impl World {
    fn new(wait: Duration) -> Self {
        let metrics = Arc::new(Metrics::new());
        let pool = Pool::new(Arc::default(), Arc::clone(&metrics), wait);
        let claims = Claims::new(Arc::clone(&metrics));
        let link = |side| Link::new(0, 0, Lane::new(LaneConfig::new(side), Instant::now()));
        let (relay, sidecar) = (link(LaneSide::Relay), link(LaneSide::Sidecar));
        relay.dedicates(Dedication::Relay(Arc::clone(&pool)));
        sidecar.dedicates(Dedication::Sidecar(Arc::clone(&claims)));
        let (a, b) = tokio::io::duplex(64 * 1024);
        let (opened, delivered) = mpsc::channel(4);
        let lost = Reset::new(failure::TUNNEL_LOST);
        let at_relay = drive(Arc::clone(&relay), a, BytesMut::new(), lost, |_: &Arc<Link>, _| {});
        let at_sidecar =
            drive(sidecar, b, BytesMut::new(), lost, move |link: &Arc<Link>, event| {
                if let Event::Opened { key, .. } = event {
                    opened.try_send((key, Arc::clone(link))).unwrap();
                }
            });
        let drives = vec![
            tokio::spawn(async move { drop(at_relay.await) }),
            tokio::spawn(async move { drop(at_sidecar.await) }),
        ];
        let flow = Flows::new("relay").of(&metrics, &"LINE".into());
        let open = &mut proto::Open::default();
        let (_, key) = relay.open(|| RequestId(1), 1, open).unwrap();
        let (send, recv) = relay.halves(key, Arc::clone(&flow));
        Self { pool, claims, metrics, relay: (relay, send, recv), sidecar: delivered, flow, drives }
    }

    /// A connection that waits at the relay, and at the sidecar to be told whose it is.
    async fn connect(&self) -> tokio::task::JoinHandle<()> {
        let (relay, sidecar) = tcp_pair().await;
        let seat = self.pool.enter().unwrap();
        let held = tokio::spawn(seat.hold(Transport::plain(Socket::new(relay))));
        let claims = Arc::clone(&self.claims);
        tokio::spawn(async move {
            let (mut transport, mut input) =
                (Transport::plain(Socket::new(sidecar)), BytesMut::new());
            let Ok(id) = await_dedicate(&mut transport, &mut input).await else { return };
            transport.detach().unwrap();
            let given = Given { transport, rest: input.freeze() };
            if let Some(early) = claims.give(id, given) {
                early.hold().await;
            }
        });
        held
    }

    /// The relay's end begins.
    async fn dedicate(&mut self, ahead: &'static [u8]) -> (TcpStream, mpsc::Receiver<Dedicated>) {
        let (client, ours) = tcp_pair().await;
        let run = self.relay.1.dedicate(Box::new(ours), Bytes::from_static(ahead));
        (client, running(run))
    }

    /// The sidecar's end begins once it has heard of the exchange.
    async fn deliver(&mut self) -> (TcpStream, mpsc::Receiver<Dedicated>, (SendHalf, RecvHalf)) {
        let (key, link) = self.sidecar.recv().await.unwrap();
        let mut halves = link.halves(key, Arc::clone(&self.flow));
        let (service, ours) = tcp_pair().await;
        let run = halves.0.dedicate(Box::new(ours), Bytes::new());
        (service, running(run), halves)
    }
}

fn running(run: impl Future<Output = Dedicated> + Send + 'static) -> mpsc::Receiver<Dedicated> {
    let (done, end) = mpsc::channel(1);
    tokio::spawn(async move { drop(done.send(run.await).await) });
    end
}

async fn end(mut running: mpsc::Receiver<Dedicated>) -> (u32, u64, u64) {
    match timeout(PATIENCE, running.recv()).await.expect("in time").expect("it ends") {
        Dedicated::Ended { reset, sent, received } => (reset.code, sent, received),
        Dedicated::Framed(_) => panic!("it got no connection"),
    }
}

async fn framed(mut running: mpsc::Receiver<Dedicated>) {
    let end = timeout(PATIENCE, running.recv()).await.expect("in time").expect("it ends");
    assert!(matches!(end, Dedicated::Framed(_)));
}

async fn read_to_end(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.expect("in time").unwrap();
    bytes
}

fn reset_hard(stream: TcpStream) {
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
}

#[tokio::test]
async fn bytes_pass_as_they_are_and_each_direction_ends_on_its_own() {
    let mut world = World::new(PATIENCE);
    world.connect().await;
    let (mut client, relay) = world.dedicate(b"read ").await;
    let (mut service, sidecar, _halves) = world.deliver().await;
    client.write_all(b"before").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(read_to_end(&mut service).await, b"read before");
    service.write_all(b"answer").await.unwrap();
    drop(service);
    assert_eq!(read_to_end(&mut client).await, b"answer");
    drop(client);
    assert_eq!(end(relay).await, (failure::NONE, 11, 6));
    assert_eq!(end(sidecar).await, (failure::NONE, 6, 11));
    assert!(world.pool.is_empty());
}

#[tokio::test]
async fn one_waits_for_a_connection_and_gets_it() {
    let mut world = World::new(PATIENCE);
    let mut wanted = world.claims.wanted();
    let (mut client, relay) = world.dedicate(b"").await;
    let (mut service, sidecar, _halves) = world.deliver().await;
    timeout(PATIENCE, wanted.wait_for(|wanted| *wanted == 1)).await.unwrap().unwrap();
    world.connect().await;
    client.write_all(b"x").await.unwrap();
    let mut got = [0; 1];
    service.read_exact(&mut got).await.unwrap();
    assert_eq!(*wanted.borrow(), 0);
    drop((client, service));
    assert_eq!(end(relay).await.0, failure::NONE);
    assert_eq!(end(sidecar).await.0, failure::NONE);
}

#[tokio::test]
async fn without_a_connection_both_ends_go_on_in_messages() {
    let mut world = World::new(Duration::from_millis(10));
    let (_client, relay) = world.dedicate(b"").await;
    let (_service, sidecar, _halves) = world.deliver().await;
    framed(relay).await;
    framed(sidecar).await;
    let mut text = String::new();
    world.metrics.encode(&mut text);
    for role in ["relay", "sidecar"] {
        let row = format!("sidelane_dedicated_exchanges_total{{role=\"{role}\",how=\"framed\"}} 1");
        assert!(text.contains(&row), "{text}");
    }
}

#[tokio::test]
async fn a_connection_that_was_lost_is_not_taken() {
    let mut world = World::new(Duration::from_millis(10));
    let (relay, sidecar) = tcp_pair().await;
    let seat = world.pool.enter().unwrap();
    let held = tokio::spawn(seat.hold(Transport::plain(Socket::new(relay))));
    drop(sidecar);
    timeout(PATIENCE, held).await.expect("it notices").unwrap();
    assert!(world.pool.is_empty());
    let (_client, relay) = world.dedicate(b"").await;
    framed(relay).await;
}

#[tokio::test]
async fn a_sidecar_that_speaks_before_it_is_asked_is_closed() {
    let world = World::new(PATIENCE);
    let (relay, mut sidecar) = tcp_pair().await;
    let seat = world.pool.enter().unwrap();
    let held = tokio::spawn(seat.hold(Transport::plain(Socket::new(relay))));
    sidecar.write_all(b"?").await.unwrap();
    timeout(PATIENCE, held).await.expect("it is closed").unwrap();
    assert!(world.pool.is_empty());
}

#[tokio::test]
async fn an_end_that_breaks_is_told_to_the_other() {
    for (at_relay, code) in [(true, failure::CLIENT_GONE), (false, failure::SERVICE_RESET)] {
        let mut world = World::new(PATIENCE);
        world.connect().await;
        let (mut client, relay) = world.dedicate(b"").await;
        let (mut service, sidecar, _halves) = world.deliver().await;
        client.write_all(b"x").await.unwrap();
        service.read_exact(&mut [0; 1]).await.unwrap();
        if at_relay {
            reset_hard(client);
            assert_eq!(read_to_end(&mut service).await, b"");
        } else {
            reset_hard(service);
            assert_eq!(read_to_end(&mut client).await, b"");
        }
        assert_eq!(end(relay).await.0, code);
        assert_eq!(end(sidecar).await.0, code);
    }
}

#[tokio::test]
async fn what_a_service_said_before_it_hung_up_arrives() {
    let mut world = World::new(PATIENCE);
    world.connect().await;
    let (mut client, relay) = world.dedicate(b"").await;
    let (key, link) = world.sidecar.recv().await.unwrap();
    let mut halves = link.halves(key, Arc::clone(&world.flow));
    // What was written is read after it is dropped, as it is not always of a socket.
    let (mut service, ours) = tokio::io::duplex(64 * 1024);
    let sidecar = running(halves.0.dedicate(Box::new(ours), Bytes::new()));
    client.write_all(b"x").await.unwrap();
    service.read_exact(&mut [0; 1]).await.unwrap();
    let answer = vec![b'a'; 4 * 1024 * 1024];
    let saying = async {
        service.write_all(&answer).await.unwrap();
        service.shutdown().await.unwrap();
        // The client goes on meanwhile, to nobody.
        drop(service);
    };
    let (mut reading, mut writing) = client.split();
    let talking = async {
        // Until it breaks, or the answer is there.
        while writing.write_all(&[0; 4096]).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    let listening = async {
        let mut heard = Vec::new();
        reading.read_to_end(&mut heard).await.unwrap();
        heard
    };
    let heard = tokio::select! {
        ((), heard) = async { tokio::join!(saying, listening) } => heard,
        () = talking => panic!("the client's way broke before the answer was there"),
    };
    assert!(heard == answer);
    drop(client);
    assert_eq!(end(relay).await.0, failure::NONE);
    assert_eq!(end(sidecar).await.0, failure::NONE);
}

#[tokio::test]
async fn a_lost_lane_ends_it_at_both_ends() {
    let mut world = World::new(PATIENCE);
    world.connect().await;
    let (mut client, relay) = world.dedicate(b"").await;
    let (mut service, sidecar, _halves) = world.deliver().await;
    client.write_all(b"x").await.unwrap();
    service.read_exact(&mut [0; 1]).await.unwrap();
    for task in &world.drives {
        task.abort();
    }
    assert_eq!(end(relay).await.0, failure::TUNNEL_LOST);
    assert_eq!(end(sidecar).await.0, failure::TUNNEL_LOST);
    assert_eq!(read_to_end(&mut client).await, b"");
    assert_eq!(read_to_end(&mut service).await, b"");
}

#[tokio::test]
async fn an_end_of_the_connection_alone_is_not_believed() {
    let mut world = World::new(PATIENCE);
    // A connection whose other end only says that it has heard.
    let (relay, mut other) = tcp_pair().await;
    let seat = world.pool.enter().unwrap();
    tokio::spawn(seat.hold(Transport::plain(Socket::new(relay))));
    let (mut client, relay) = world.dedicate(b"").await;
    let mut input = BytesMut::new();
    while read_dedicate(&mut input).unwrap().is_none() {
        other.read_buf(&mut input).await.unwrap();
    }
    other.write_all(b"half of it").await.unwrap();
    other.shutdown().await.unwrap();
    let mut got = [0; 10];
    client.read_exact(&mut got).await.unwrap();
    let cut = tokio::join!(read_to_end(&mut client), end(relay));
    assert_eq!((cut.0.len(), cut.1.0), (0, failure::TUNNEL_LOST));
}

#[tokio::test]
async fn whoever_is_dropped_leaves_nothing_behind() {
    let mut world = World::new(PATIENCE);
    let (client, ours) = tcp_pair().await;
    drop(world.relay.1.dedicate(Box::new(ours), Bytes::new()));
    {
        let (_other, ours) = tcp_pair().await;
        let run = world.relay.1.dedicate(Box::new(ours), Bytes::new());
        tokio::pin!(run);
        let polled = poll_fn(|cx| std::task::Poll::Ready(run.as_mut().poll(cx).is_pending())).await;
        assert!(polled);
    }
    let (key, link) = world.sidecar.recv().await.unwrap();
    drop((client, world.relay.1, world.relay.2));
    let (mut send, _recv) = link.halves(key, Arc::clone(&world.flow));
    let (mut service, ours) = tcp_pair().await;
    let run = send.dedicate(Box::new(ours), Bytes::new());
    assert_eq!(end(running(run)).await.0, failure::CANCELLED);
    assert_eq!(read_to_end(&mut service).await, b"");
    assert_eq!(*world.claims.wanted().borrow(), 0);
}
