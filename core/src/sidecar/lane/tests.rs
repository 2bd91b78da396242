use std::net::Ipv4Addr;
use std::sync::atomic::AtomicBool;

use bytes::Bytes;
use sidelane_tunnel::{First, LaneConfig, ProtocolTable, Side};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::*;
use crate::metrics::Metrics;
use crate::plugin::{HostContext, Limits, Plugins};
use crate::shard::Shards;
use crate::sidecar::{Access, Settings, system_resolver};
use crate::tunnel::accept;
use crate::tunnel::dial::Carrier;
use crate::tunnel::transport::Socket;

/// Longer than anything here takes on a busy machine.
const GRACE: Duration = Duration::from_secs(30);

fn sidecar() -> Arc<Sidecar> {
    let metrics = Arc::new(Metrics::new());
    let plugins = Arc::new(Plugins::new(HostContext::new(metrics.sink()), Limits::default()));
    let shards = Shards::start("test", 1, 0, 1).expect("a thread");
    let all = Arc::clone(&shards.all);
    shards.stop();
    let settings = Settings {
        name: "test".to_owned(),
        lanes: 1,
        lane: LaneConfig::new(Side::Sidecar),
        timeouts: Timeouts { connect: Duration::from_secs(5), answer: Duration::from_secs(5) },
        resolve_interval: Duration::from_secs(30),
        resolve: system_resolver(),
    };
    Sidecar::new(settings, Access::plain(), Vec::new(), plugins, metrics, all)
}

fn lane(side: Side) -> sidelane_tunnel::Lane {
    let config = LaneConfig { replay_bytes_max: 1 << 20, ..LaneConfig::new(side) };
    sidelane_tunnel::Lane::new(config, std::time::Instant::now())
}

fn session(grace: Duration, advertised: String) -> Session {
    Session {
        id: Bytes::from_static(b"session"),
        secret: Bytes::from_static(b"secret"),
        protocols: ProtocolTable::default(),
        lane: LaneConfig::new(Side::Sidecar),
        lanes_max: 2,
        relay_instance: Bytes::from_static(b"relay"),
        advertised,
        is_elsewhere: AtomicBool::new(false),
        grace,
        claims: None,
    }
}

/// A sidecar's lane that runs, and the relay that it dials: as a test says what that answers.
struct Stage {
    link: Arc<Link>,
    task: JoinHandle<LaneEnd>,
    listener: TcpListener,
    /// The relay's end of the lane.
    relay: Arc<Link>,
}

impl Stage {
    /// Returns them with the relay's end of the first connection.
    async fn new(grace: Duration) -> (Self, Transport) {
        Self::advertising(grace, String::new()).await
    }

    async fn advertising(grace: Duration, advertised: String) -> (Self, Transport) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a listener");
        let address = listener.local_addr().expect("its address");
        let session = session(grace, advertised);
        let link = Link::new(3, 0, lane(Side::Sidecar));
        link.known();
        let relay = Link::new(3, 0, lane(Side::Relay));
        relay.known();
        let peer = Arc::new(Peer::new(address.to_string().into(), None));
        let stage = |task, listener| Self { link: Arc::clone(&link), task, listener, relay };
        let dialled = tokio::net::TcpStream::connect(address).await.expect("it listens");
        let (accepted, _) = listener.accept().await.expect("dialled");
        let first = NewLane {
            transport: Transport::plain(Socket::new(dialled)),
            carrier: Arc::new(Carrier::tcp(dial::Security::Plain { insecure: false })),
            input: BytesMut::new(),
            number: 3,
        };
        let task = Lane::new(&sidecar(), &peer, &Arc::new(session), &link).run(first);
        let stage = stage(tokio::spawn(task), listener);
        (stage, Transport::plain(Socket::new(accepted)))
    }

    async fn accept(&self) -> (Transport, proto::Resume) {
        let (stream, _) = self.listener.accept().await.expect("dialled");
        let mut transport = Transport::plain(Socket::new(stream));
        let mut input = BytesMut::new();
        let first = accept::read_first(&mut transport, &mut input).await.expect("a first word");
        let First::Resume(resume) = first else { panic!("{first:?}") };
        assert_eq!((&*resume.session, &*resume.secret), (&b"session"[..], &b"secret"[..]));
        assert_eq!((resume.lane, &*resume.relay_instance), (3, &b"relay"[..]));
        assert!(input.is_empty());
        (transport, resume)
    }

    /// Takes the next dial, and goes on with the lane.
    async fn take(&self) -> (Transport, u64) {
        let (mut transport, resume) = self.accept().await;
        self.relay.with(sidelane_tunnel::Lane::detach);
        self.relay.resume(resume.received).expect("nothing is missing");
        let resumed = proto::Resumed { received: self.relay.received(), attempt: resume.attempt };
        accept::send_resumed(&mut transport, &resumed).await.expect("it listens");
        (transport, resume.attempt)
    }

    async fn refuse(&self, reason: RefuseReason, retry_after_ms: u32) -> u64 {
        self.refuse_by(b"", reason, retry_after_ms).await
    }

    async fn refuse_by(
        &self,
        relay: &'static [u8],
        reason: RefuseReason,
        retry_after_ms: u32,
    ) -> u64 {
        let (mut transport, resume) = self.accept().await;
        let refuse = proto::Refuse {
            reason: reason.into(),
            detail: "no".to_owned(),
            retry_after_ms,
            relay_instance: Bytes::from_static(relay),
        };
        accept::send_refuse(&mut transport, &refuse).await.expect("it listens");
        resume.attempt
    }

    /// Drives the relay's end on a connection, in a task of its own.
    fn drive(&self, transport: Transport) -> JoinHandle<LaneEnd> {
        tokio::spawn(drive(Arc::clone(&self.relay), transport, BytesMut::new(), LOST, |_, _| {}))
    }

    /// Says something that is counted, and waits until the relay has it.
    async fn says_one_more(&self) {
        let before = self.relay.received();
        self.link.with(|lane| lane.announce(proto::Announce::default()));
        self.until(|| self.relay.received() > before).await;
    }

    async fn until(&self, mut holds: impl FnMut() -> bool) {
        let looked = async {
            while !holds() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(GRACE, looked).await.expect("it comes to hold");
    }

    /// Loses the connection without a word.
    async fn lose(&self, driven: JoinHandle<LaneEnd>) {
        self.relay.replace();
        driven.await.expect("driven");
    }
}

#[tokio::test]
async fn a_lost_lane_is_dialled_until_it_is_back() {
    let (stage, transport) = Stage::new(GRACE).await;
    let driven = stage.drive(transport);
    stage.says_one_more().await;
    stage.lose(driven).await;
    // What is said meanwhile waits.
    stage.until(|| stage.link.is_detached()).await;
    stage.link.with(|lane| lane.announce(proto::Announce::default()));
    // The next connections break before anything is answered.
    for attempt in 1..=3 {
        assert_eq!(stage.accept().await.1.attempt, attempt);
    }
    let (transport, attempt) = stage.take().await;
    assert_eq!(attempt, 4);
    let driven = stage.drive(transport);
    stage.until(|| stage.relay.received() == 2).await;
    // One that breaks right behind the answer, of which the sidecar may not know.
    stage.lose(driven).await;
    drop(stage.take().await);
    let (transport, attempt) = stage.take().await;
    assert_eq!(attempt, 6);
    let driven = stage.drive(transport);
    stage.says_one_more().await;
    stage.link.close();
    assert!(matches!(stage.task.await, Ok(LaneEnd::Local)));
    driven.await.expect("driven");
    assert!(!stage.relay.is_detached(), "it was said that the lane does not come back");
}

#[tokio::test]
async fn a_relay_that_does_not_know_the_lane_ends_it_at_once() {
    use RefuseReason::{Gap, Stale, UnknownLane, UnknownSession};
    for reason in [UnknownSession, UnknownLane, Gap, Stale] {
        let (stage, transport) = Stage::new(GRACE).await;
        drop(transport);
        stage.refuse(reason, 0).await;
        stage.task.await.expect("it ends");
        assert!(!stage.link.is_detached() && stage.link.is_leaving(), "{reason:?}");
    }
}

#[tokio::test]
async fn other_relays_behind_one_address_are_passed_by() {
    let (stage, transport) = Stage::new(GRACE).await;
    let driven = stage.drive(transport);
    stage.says_one_more().await;
    stage.lose(driven).await;
    for _ in 0..WRONG_RELAYS_MAX {
        stage.refuse(RefuseReason::WrongRelay, 0).await;
    }
    let driven = stage.drive(stage.take().await.0);
    stage.says_one_more().await;
    stage.lose(driven).await;
    for _ in 0..=WRONG_RELAYS_MAX {
        stage.refuse(RefuseReason::WrongRelay, 0).await;
    }
    stage.task.await.expect("it ends");
    assert!(!stage.link.is_detached());
}

#[tokio::test]
async fn one_other_relay_again_and_again_is_the_end() {
    let (stage, transport) = Stage::new(GRACE).await;
    drop(transport);
    for relay in [b"a", b"b", b"a", b"b", b"b"] {
        stage.refuse_by(relay, RefuseReason::WrongRelay, 0).await;
        assert!(!stage.task.is_finished());
    }
    stage.refuse_by(b"b", RefuseReason::WrongRelay, 0).await;
    stage.task.await.expect("it ends");
}

#[tokio::test]
async fn another_relay_at_the_advertised_address_is_the_end() {
    let advertised = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a listener");
    let address = advertised.local_addr().expect("its address").to_string();
    let (mut stage, transport) = Stage::advertising(GRACE, address).await;
    stage.listener = advertised;
    drop(transport);
    stage.refuse(RefuseReason::WrongRelay, 0).await;
    stage.task.await.expect("it ends");
}

#[tokio::test]
async fn where_the_advertised_address_is_not_reached_the_dialled_one_is() {
    let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a listener");
    let address = closed.local_addr().expect("its address").to_string();
    let (stage, transport) = Stage::advertising(GRACE, address).await;
    drop(closed);
    drop(transport);
    let driven = stage.drive(stage.take().await.0);
    stage.says_one_more().await;
    drop(driven);
}

#[tokio::test]
async fn a_relay_that_is_busy_is_left_alone_for_as_long_as_it_asks() {
    let (stage, transport) = Stage::new(GRACE).await;
    drop(transport);
    let asked = Duration::from_millis(700);
    stage.refuse(RefuseReason::Overloaded, 700).await;
    let refused_at = Instant::now();
    let driven = stage.drive(stage.take().await.0);
    assert!(refused_at.elapsed() >= asked, "{:?}", refused_at.elapsed());
    stage.says_one_more().await;
    drop(driven);
}

#[tokio::test]
async fn the_grace_is_the_end() {
    let grace = Duration::from_millis(300);
    let (stage, transport) = Stage::new(grace).await;
    let lost_at = Instant::now();
    drop((transport, stage.listener));
    stage.task.await.expect("it ends");
    assert!(lost_at.elapsed() >= grace && !stage.link.is_detached());
}

#[tokio::test]
async fn a_lane_that_is_closed_is_dialled_no_more() {
    let (stage, transport) = Stage::new(GRACE).await;
    drop(transport);
    stage.until(|| stage.link.is_detached()).await;
    stage.link.close();
    stage.task.await.expect("it ends");
    assert!(!stage.link.is_detached());
}

#[tokio::test]
async fn a_silent_connection_is_replaced_by_one_that_is_dialled_beside_it() {
    let (stage, transport) = Stage::new(GRACE).await;
    let driven = stage.drive(transport);
    stage.says_one_more().await;
    stage.lose(driven).await;
    // The relay's end stands still, and the connection stays.
    let (silent, _) = stage.take().await;
    let silent_at = Instant::now();
    stage.link.with(|lane| lane.announce(proto::Announce::default()));
    let (transport, attempt) = stage.take().await;
    let noticed = silent_at.elapsed();
    assert!(noticed >= Duration::from_millis(900), "{noticed:?}");
    assert_eq!(attempt, 2);
    let driven = stage.drive(transport);
    stage.until(|| stage.relay.received() == 2).await;
    // The silent one is closed by the sidecar; it is heard of no more.
    drop(silent);
    stage.says_one_more().await;
    drop(driven);
}

#[test]
fn lanes_that_find_an_address_dead_at_once_all_try_the_other() {
    let session = session(Duration::ZERO, "advertised:1".to_owned());
    let peer = Peer::new("dialled:1".into(), None);
    for (expected, next) in [("advertised:1", "dialled:1"), ("dialled:1", "advertised:1")] {
        let (target, is_advertised) = session.target(&peer);
        assert_eq!(target, expected);
        // Two lanes have dialled it.
        session.not_reached(is_advertised);
        session.not_reached(is_advertised);
        assert_eq!(session.target(&peer).0, next);
    }
}
