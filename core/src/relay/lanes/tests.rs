use std::future::poll_fn;
use std::time::Instant as StdInstant;

use sidelane_tunnel::{
    Dialler, FEATURE_RESUME, LaneConfig, OpenError, Payload, Received, Reply, Side,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
use tokio::sync::Notify;

use super::*;
use crate::config;
use crate::config::credentials::Claims;
use crate::credentials::{Authenticated, Grant, Proof};
use crate::metrics::{Flows, Metrics};
use crate::plugin::lend::{RecvHalf as _, SendHalf as _};
use crate::plugin::{HostContext, Limits, Plugins};
use crate::tunnel::{RecvHalf, SendHalf};

/// A field of a protocol's payload (`HttpBody`).
const FIELD: u32 = 19;

fn relay_with(keys: &str) -> Arc<Relay> {
    let yaml = format!("version: 1\nrelay:\n  tunnel: {{ {keys} }}\n");
    let source = config::Source::from_text("relay.yaml".as_ref(), &yaml);
    let config = config::parse(&source, &|_| None).expect("a valid file");
    let metrics = Arc::new(Metrics::new());
    let plugins = Arc::new(Plugins::new(HostContext::new(metrics.sink()), Limits::default()));
    Relay::new(&config.relay.expect("a relay"), plugins, metrics)
}

fn peer() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 4711))
}

/// A lane that was let in, and the sidecar's end of it.
struct Stage {
    relay: Arc<Relay>,
    session: Arc<Session>,
    link: Arc<Link>,
    welcome: proto::Welcome,
    sidecar: Arc<Link>,
    lane: tokio::task::JoinHandle<()>,
}

impl Stage {
    /// Returns them with the sidecar's end of the first connection.
    fn new(relay: Arc<Relay>, features: u64) -> (Self, DuplexStream) {
        let hello = proto::Hello {
            version: sidelane_tunnel::VERSION,
            features,
            instance: vec![7; 16].into(),
            window: 256 * 1024,
            message_bytes_max: 1024 * 1024,
            ..proto::Hello::default()
        };
        let grant = Grant { principal: "p".into(), claims: Claims::everything() };
        let known = Authenticated { grant: Arc::new(grant), proof: Proof::Loopback, expires: None };
        let admitted = relay.sessions.admit(&hello, known, peer(), |_, _| 0).expect("let in");
        let (session, link) = (Arc::clone(&admitted.session), Arc::clone(&admitted.link));
        let welcome = admitted.welcome.clone();
        let (ours, theirs) = duplex(64 * 1024);
        let transport = Transport::scripted(ours);
        let lane = tokio::spawn(run(Arc::clone(&relay), admitted, transport, BytesMut::new()));
        let config = LaneConfig {
            replay_bytes_max: if welcome.grace_ms > 0 { 1 << 20 } else { 0 },
            ..LaneConfig::new(Side::Sidecar)
        };
        let sidecar = Link::new(0, 0, sidelane_tunnel::Lane::new(config, StdInstant::now()));
        sidecar.known();
        (Self { relay, session, link, welcome, sidecar, lane }, theirs)
    }

    fn resume(&self, attempt: u64) -> proto::Resume {
        proto::Resume {
            session: self.welcome.session.clone(),
            secret: self.welcome.secret.clone(),
            lane: self.welcome.lane,
            attempt,
            received: self.sidecar.received(),
            relay_instance: self.welcome.relay_instance.clone(),
        }
    }

    /// Dials with `resume`. Returns the connection and the answer.
    async fn dial(&self, resume: &proto::Resume) -> (DuplexStream, Option<Reply>) {
        let theirs = self.begin(resume);
        answer(theirs.await).await
    }

    async fn begin(&self, resume: &proto::Resume) -> DuplexStream {
        let (ours, theirs) = duplex(64 * 1024);
        let dialled = Dialled {
            transport: Transport::scripted(ours),
            input: BytesMut::new(),
            peer: peer(),
            place: Box::new(()),
        };
        super::resume(&self.relay, dialled, resume).await;
        theirs
    }

    async fn refusal(&self, resume: &proto::Resume) -> proto::RefuseReason {
        match self.dial(resume).await.1 {
            Some(Reply::Refuse(refuse)) => refuse.reason(),
            other => panic!("refused: {other:?}"),
        }
    }

    /// Drives the sidecar's end on this connection, in a task of its own.
    fn drive(&self, stream: DuplexStream) -> tokio::task::JoinHandle<LaneEnd> {
        let echo = |link: &Arc<Link>, event| {
            if let Event::Opened { key, .. } = event {
                tokio::spawn(echo(halves(link, key)));
            }
        };
        tokio::spawn(drive(Arc::clone(&self.sidecar), stream, BytesMut::new(), LOST, echo))
    }

    async fn come_back(&self, attempt: u64) -> tokio::task::JoinHandle<LaneEnd> {
        let (stream, reply) = self.dial(&self.resume(attempt)).await;
        let Some(Reply::Resumed(resumed)) = reply else { panic!("resumed: {reply:?}") };
        assert_eq!(resumed.attempt, attempt);
        self.sidecar.resume(resumed.received).expect("nothing is missing");
        self.drive(stream)
    }

    async fn open(&self) -> (SendHalf, RecvHalf) {
        settle(|| self.link.is_open()).await;
        self.try_open().expect("opened")
    }

    fn try_open(&self) -> Result<(SendHalf, RecvHalf), OpenError> {
        let metrics = Metrics::new();
        let flow = Flows::new("relay").of(&metrics, &"HTTP".into());
        let opened = self.session.open(Some(0), 1, proto::Open::default(), flow);
        opened.map(|(_, send, recv, _)| (send, recv))
    }
}

fn halves(link: &Arc<Link>, key: sidelane_tunnel::Key) -> (SendHalf, RecvHalf) {
    let metrics = Metrics::new();
    link.halves(key, Flows::new("sidecar").of(&metrics, &"HTTP".into()))
}

async fn echo((mut send_half, mut recv_half): (SendHalf, RecvHalf)) {
    while let Received::Message(message) = next(&mut recv_half).await {
        send(&mut send_half, message).await;
    }
    send_half.finish();
}

async fn send(half: &mut SendHalf, message: Payload) {
    let mut message = Some(message);
    poll_fn(|cx| half.poll_send(cx, &mut message)).await.expect("the exchange goes on");
}

async fn next(half: &mut RecvHalf) -> Received {
    poll_fn(|cx| half.poll_recv(cx)).await
}

async fn says(halves: &mut (SendHalf, RecvHalf), text: &'static str) {
    let body = bytes::Bytes::from_static(text.as_bytes());
    send(&mut halves.0, Payload { field: FIELD, body: body.clone(), ..Payload::default() }).await;
    match next(&mut halves.1).await {
        Received::Message(message) => assert_eq!(message.body, body),
        other => panic!("{text}: {other:?}"),
    }
}

async fn answer(mut stream: DuplexStream) -> (DuplexStream, Option<Reply>) {
    let mut input = BytesMut::new();
    let mut dialler = Dialler::new();
    loop {
        if let Some(reply) = dialler.handle_input(&mut input).expect("an answer") {
            assert!(input.is_empty(), "what follows an answer is looked at by nobody here");
            return (stream, Some(reply));
        }
        // Byte by byte, so that what follows stays.
        let mut byte = [0];
        if stream.read_exact(&mut byte).await.is_err() {
            return (stream, None);
        }
        input.extend_from_slice(&byte);
    }
}

/// Lets others go on until something holds; the clock is the tests' own.
async fn settle(mut holds: impl FnMut() -> bool) {
    for _ in 0..1_000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("it does not come to hold");
}

#[tokio::test(start_paused = true)]
async fn a_lane_that_lost_its_connection_takes_what_was_said_meanwhile() {
    let (stage, stream) = Stage::new(relay_with(""), FEATURE_RESUME);
    let first = stage.drive(stream);
    let mut halves = stage.open().await;
    says(&mut halves, "before").await;
    stage.sidecar.replace();
    assert!(matches!(first.await, Ok(LaneEnd::Replaced)));
    settle(|| stage.session.is_suspended()).await;
    let body = bytes::Bytes::from_static(b"meanwhile");
    let meanwhile = Payload { field: FIELD, body: body.clone(), ..Payload::default() };
    send(&mut halves.0, meanwhile).await;
    tokio::time::advance(Duration::from_secs(14)).await;
    let _driven = stage.come_back(1).await;
    match next(&mut halves.1).await {
        Received::Message(message) => assert_eq!(message.body, body),
        other => panic!("{other:?}"),
    }
    says(&mut halves, "after").await;
    settle(|| stage.session.is_open()).await;
    assert!(stage.link.take_returned() || stage.session.is_open());
}

#[tokio::test(start_paused = true)]
async fn nothing_more_is_read_from_a_connection_before_its_successor_is_answered() {
    let (stage, mut old) = Stage::new(relay_with(""), FEATURE_RESUME);
    // What makes the lane known: an announcement, counted; and what lies unread when the dial comes.
    let mut transmit = sidelane_tunnel::Transmit::default();
    let mut bytes = |version| {
        stage.sidecar.with(|lane| {
            lane.announce(proto::Announce { version, ..proto::Announce::default() });
            lane.poll_transmit(StdInstant::now(), &mut transmit, 1 << 20);
        });
        let mut slices = [std::io::IoSlice::new(&[]); 16];
        let count = transmit.chunks(&mut slices);
        let bytes: Vec<u8> = slices[..count].iter().flat_map(|part| part.to_vec()).collect();
        transmit.advance(bytes.len());
        bytes
    };
    let (first, unread) = (bytes(1), bytes(2));
    old.write_all(&first).await.expect("written");
    settle(|| stage.link.received() == 1).await;
    // Both are there before the lane's task runs again: the dial goes before.
    old.write_all(&unread).await.expect("written");
    let (stream, reply) = stage.dial(&stage.resume(1)).await;
    let Some(Reply::Resumed(resumed)) = reply else { panic!("resumed: {reply:?}") };
    assert_eq!(resumed.received, 1, "the second lay unread, and is thrown away");
    assert_eq!(stage.link.received(), 1);
    // The old connection is closed, and the second comes again on the new one.
    let mut rest = Vec::new();
    let _ = old.read_to_end(&mut rest).await;
    stage.sidecar.with(|lane| lane.detach());
    stage.sidecar.resume(resumed.received).expect("nothing is missing");
    let _driven = stage.drive(stream);
    settle(|| stage.link.received() == 2).await;
}

#[tokio::test(start_paused = true)]
async fn the_newest_attempt_has_the_lane() {
    let (stage, stream) = Stage::new(relay_with(""), FEATURE_RESUME);
    let first = stage.drive(stream);
    settle(|| stage.link.is_open()).await;
    stage.sidecar.replace();
    first.await.expect("driven");
    let second = stage.come_back(5).await;
    for stale in [1, 5] {
        assert_eq!(stage.refusal(&stage.resume(stale)).await, proto::RefuseReason::Stale);
    }
    settle(|| stage.link.is_open()).await;
    // Of two that come at once the older is closed without an answer.
    let (older, newer) = (stage.resume(6), stage.resume(7));
    let (older, newer) = (stage.begin(&older).await, stage.begin(&newer).await);
    assert_eq!(answer(older).await.1, None);
    assert!(matches!(answer(newer).await.1, Some(Reply::Resumed(_))));
    let end = second.await.expect("driven");
    assert!(matches!(end, LaneEnd::Closed | LaneEnd::Io(_)), "fenced: {end:?}");
}

#[tokio::test(start_paused = true)]
async fn whoever_does_not_know_the_secret_harms_nothing() {
    let (stage, stream) = Stage::new(relay_with(""), FEATURE_RESUME);
    let _driven = stage.drive(stream);
    let mut halves = stage.open().await;
    let reasons = [
        (proto::Resume { secret: vec![1; 32].into(), ..stage.resume(1) }, "UNKNOWN_SESSION"),
        (proto::Resume { session: vec![1; 16].into(), ..stage.resume(1) }, "UNKNOWN_SESSION"),
        (proto::Resume { relay_instance: vec![1; 16].into(), ..stage.resume(1) }, "WRONG_RELAY"),
        (proto::Resume { lane: 9, ..stage.resume(1) }, "UNKNOWN_LANE"),
    ];
    for (resume, expected) in reasons {
        assert_eq!(stage.refusal(&resume).await.as_str_name(), expected);
        says(&mut halves, "goes on").await;
    }
    // Sidecars that come back too late, each for a session of its own, are no guessers.
    for gone in 0..=60 {
        let session = [u8::try_from(gone).expect("small"); 16].to_vec();
        let secret = [u8::try_from(gone).expect("small"); 32].to_vec();
        let (session, secret) = (session.into(), secret.into());
        stage.refusal(&proto::Resume { session, secret, ..stage.resume(1) }).await;
    }
    assert!(stage.relay.door.check_failures(peer()).is_ok());
    // A wrong secret counts as a wrong credential does: such an address is turned away.
    for guess in 0..=60 {
        let secret = [u8::try_from(guess).expect("small"); 32].to_vec();
        let resume = proto::Resume { secret: secret.into(), ..stage.resume(1) };
        stage.refusal(&resume).await;
    }
    assert!(stage.relay.door.check_failures(peer()).is_err());
}

/// A lane that comes back may bring what was overtaken on another one.
#[tokio::test(start_paused = true)]
async fn an_older_announcement_that_comes_late_changes_nothing() {
    let (stage, stream) = Stage::new(relay_with(""), FEATURE_RESUME);
    let _driven = stage.drive(stream);
    let _halves = stage.open().await;
    let announce = |version, unavailable: &str| proto::Announce {
        version,
        tunnels: vec![proto::AnnouncedTunnel {
            name: "api".to_owned(),
            unavailable: unavailable.to_owned(),
            ..proto::AnnouncedTunnel::default()
        }],
        ..proto::Announce::default()
    };
    let in_force = || stage.relay.describe_sessions()[0]["announcement"].as_u64();
    stage.relay.announced(&stage.session, announce(2, "it is withdrawn"));
    assert_eq!(in_force(), Some(2));
    stage.relay.announced(&stage.session, announce(1, ""));
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(in_force(), Some(2));
    // The same again, as on another lane, and a newer one are taken.
    for version in [2, 3] {
        stage.relay.announced(&stage.session, announce(version, ""));
        settle(|| in_force() == Some(version)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_gap_ends_the_lane_and_its_exchanges() {
    let (stage, stream) = Stage::new(relay_with(""), FEATURE_RESUME);
    let _driven = stage.drive(stream);
    let mut halves = stage.open().await;
    says(&mut halves, "before").await;
    let resume = proto::Resume { received: 1_000, ..stage.resume(1) };
    assert_eq!(stage.refusal(&resume).await, proto::RefuseReason::Gap);
    assert_eq!(next(&mut halves.1).await, Received::Reset(LOST));
    settle(|| stage.session.is_over()).await;
    assert_eq!(stage.refusal(&stage.resume(2)).await, proto::RefuseReason::UnknownSession);
}

#[tokio::test(start_paused = true)]
async fn exchanges_wait_for_as_long_as_the_grace() {
    let (stage, stream) = Stage::new(relay_with("grace: 3s"), FEATURE_RESUME);
    let driven = stage.drive(stream);
    let mut halves = stage.open().await;
    stage.sidecar.replace();
    driven.await.expect("driven");
    settle(|| stage.link.is_detached()).await;
    let lost_at = Instant::now();
    assert_eq!(next(&mut halves.1).await, Received::Reset(LOST));
    let waited = lost_at.elapsed();
    assert!(waited >= Duration::from_secs(3) && waited < Duration::from_secs(4), "{waited:?}");
    stage.lane.await.expect("ended");
    assert!(stage.session.is_over() && stage.relay.sessions.is_empty());
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_for_a_lane_that_does_not_come_back() {
    // Without the feature at one of the ends.
    for (keys, features) in [("grace: 0s", FEATURE_RESUME), ("", 0)] {
        let (stage, stream) = Stage::new(relay_with(keys), features);
        assert_eq!((stage.welcome.grace_ms, stage.welcome.features & FEATURE_RESUME), (0, 0));
        let driven = stage.drive(stream);
        settle(|| stage.link.is_open()).await;
        driven.abort();
        stage.lane.await.expect("ended");
    }
    // Nothing was heard of it: the welcome may be lost.
    let (stage, stream) = Stage::new(relay_with(""), FEATURE_RESUME);
    drop(stream);
    stage.lane.await.expect("ended");
    // The sidecar has said that it is the end.
    let (stage, stream) = Stage::new(relay_with(""), FEATURE_RESUME);
    let driven = stage.drive(stream);
    settle(|| stage.link.is_open()).await;
    stage.sidecar.close();
    assert!(matches!(driven.await, Ok(LaneEnd::Local)));
    stage.lane.await.expect("ended");
    // Something that no sidecar says.
    let (stage, mut stream) = Stage::new(relay_with(""), FEATURE_RESUME);
    stream.write_all(&[0xff; 64]).await.expect("written");
    stage.lane.await.expect("ended");
}

#[tokio::test(start_paused = true)]
async fn a_session_that_ends_ends_its_waiting_lanes() {
    let ends: [fn(&Session); 4] =
        [|s| s.revoke_lanes("withdrawn"), Session::give_way, Session::close, Session::sever];
    for end in ends {
        let (stage, stream) = Stage::new(relay_with(""), FEATURE_RESUME);
        let driven = stage.drive(stream);
        let mut halves = stage.open().await;
        stage.sidecar.replace();
        driven.await.expect("driven");
        settle(|| stage.link.is_detached()).await;
        let began = Instant::now();
        end(&stage.session);
        assert_eq!(next(&mut halves.1).await, Received::Reset(LOST));
        stage.lane.await.expect("ended");
        assert_eq!(began.elapsed(), Duration::ZERO);
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_breaks_in_the_answer_is_none() {
    let (stage, stream) = Stage::new(relay_with("grace: 3s"), FEATURE_RESUME);
    let driven = stage.drive(stream);
    let mut halves = stage.open().await;
    stage.sidecar.replace();
    driven.await.expect("driven");
    settle(|| stage.link.is_detached()).await;
    let lost_at = Instant::now();
    // Each is heard of no more once it is dialled; the time goes on.
    for attempt in 1..=50 {
        drop(stage.begin(&stage.resume(attempt)).await);
        tokio::time::advance(Duration::from_millis(50)).await;
    }
    let driven = stage.come_back(51).await;
    says(&mut halves, "after").await;
    stage.sidecar.replace();
    driven.await.expect("driven");
    settle(|| stage.link.is_detached()).await;
    // What was said on the last one gives the lane its time anew.
    assert!(lost_at.elapsed() < Duration::from_secs(3));
    tokio::time::advance(Duration::from_millis(2_500)).await;
    let _driven = stage.come_back(52).await;
    says(&mut halves, "again").await;
}

/// A wire that stops when it is told to, and stays up.
fn stalling(mut stream: DuplexStream) -> (DuplexStream, Arc<Notify>) {
    let (mut inner, outer) = duplex(64 * 1024);
    let stop = Arc::new(Notify::new());
    let stopped = Arc::clone(&stop);
    tokio::spawn(async move {
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut stream, &mut inner) => {}
            () = stopped.notified() => std::future::pending().await,
        }
    });
    (outer, stop)
}

#[tokio::test(start_paused = true)]
async fn a_silent_connection_is_left_aside_and_then_given_up() {
    let (stage, stream) = Stage::new(relay_with(""), FEATURE_RESUME);
    let (stream, stop) = stalling(stream);
    let driven = stage.drive(stream);
    let mut halves = stage.open().await;
    says(&mut halves, "before").await;
    stop.notify_one();
    let stalled_at = Instant::now();
    let body = bytes::Bytes::from_static(b"into the void");
    send(&mut halves.0, Payload { field: FIELD, body: body.clone(), ..Payload::default() }).await;
    while !stage.link.is_suspect() {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let silent = stalled_at.elapsed();
    assert!(silent < Duration::from_millis(1_500), "{silent:?}");
    assert!(stage.session.is_open(), "there is no other lane");
    while stage.link.is_attached() {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let dead = stalled_at.elapsed();
    assert!(dead <= Duration::from_secs(11), "{dead:?}");
    driven.await.expect("driven");
    let _driven = stage.come_back(1).await;
    match next(&mut halves.1).await {
        Received::Message(message) => assert_eq!(message.body, body),
        other => panic!("{other:?}"),
    }
    says(&mut halves, "after").await;
    assert!(!stage.link.is_suspect());
}
