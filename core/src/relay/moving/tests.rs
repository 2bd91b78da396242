use std::net::SocketAddr;
use std::sync::atomic::AtomicUsize;
use std::task::Wake;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use sidelane_tunnel::{Event, Key, Lane, LaneConfig, ProtocolTable, Side, Transmit, proto};

use super::*;
use crate::config;
use crate::credentials::Presented;
use crate::metrics::Metrics;
use crate::plugin::lend::{
    Meta, Opened, Opener as _, RecvHalf as _, RouteKey, SendHalf as _, Text,
};
use crate::plugin::{HostContext, Limits, Plugins};
use crate::relay::Relay;
use crate::relay::open::RelayOpener;
use crate::tunnel::Link;

const FIELD: u32 = 17;

/// A relay, sidecars that serve one tunnel, and the sidecars' ends of their lanes.
struct Stage {
    relay: Arc<Relay>,
    peers: Vec<Peer>,
}

struct Peer {
    session: Arc<Session>,
    link: Arc<Link>,
    lane: Lane,
    out: Transmit,
    /// Exchanges that came.
    opened: Vec<Key>,
}

impl Stage {
    async fn new(sidecars: u8) -> Self {
        Self::with_route(sidecars, "").await
    }

    /// `policies`: of the route, as in a file.
    async fn with_route(sidecars: u8, policies: &str) -> Self {
        let yaml = format!(
            "version: 1\nrelay: {{ base_domains: [example.org] }}\n\
             routes: [{{ subdomain: web, tunnel: web{policies} }}]\n"
        );
        let source = config::Source::from_text("relay.yaml".as_ref(), &yaml);
        let config = config::parse(&source, &|_| None).expect("a valid file");
        let metrics = Arc::new(Metrics::new());
        let plugins = Arc::new(Plugins::new(HostContext::new(metrics.sink()), Limits::default()));
        let relay = Relay::new(config.relay.as_ref().expect("a relay"), plugins, metrics);
        relay.configure(&config);
        let mut stage = Self { relay, peers: Vec::new() };
        for instance in 0..sidecars {
            stage.join(instance).await;
        }
        stage
    }

    /// One more sidecar comes.
    async fn join(&mut self, instance: u8) {
        let hello = proto::Hello {
            version: sidelane_tunnel::VERSION,
            instance: vec![instance; 16].into(),
            name: format!("sidecar-{instance}"),
            protocols: ProtocolTable::bind(["HTTP"]).expect("a name").to_wire(),
            window: 256 * 1024,
            message_bytes_max: 1024 * 1024,
            ..proto::Hello::default()
        };
        let local = [127, 0, 0, 1].into();
        let presented = Presented { credential: &[], chain: &[], peer: local, local };
        let known = self.relay.authenticator.authenticate(presented).await.expect("on loopback");
        let peer = SocketAddr::new(local, 4711);
        let admitted = self.relay.sessions.admit(&hello, known, peer, |_, _| 0).expect("let in");
        admitted.link.pretend_open();
        let announce = proto::Announce {
            version: 1,
            tunnels: vec![proto::AnnouncedTunnel { name: "web".to_owned(), ..Default::default() }],
            routes: Vec::new(),
        };
        assert!(self.relay.announce(&admitted.session, &announce).accepted);
        self.peers.push(Peer {
            session: admitted.session,
            link: admitted.link,
            lane: Lane::new(LaneConfig::new(Side::Sidecar), Instant::now()),
            out: Transmit::new(),
            opened: Vec::new(),
        });
    }

    /// Opens an exchange, whose first message is `first`.
    fn open(&self, asks: Asks, first: Message) -> Exchange {
        let record = Arc::new(self.relay.metrics.exchange("relay", &"HTTP".into()));
        let query = crate::router::Query {
            host: Some("web.example.org"),
            path: "/",
            listener: "web",
            protocol_type: "HTTP",
        };
        let routing = self.relay.routing.load();
        let route = crate::router::find(&routing.table, &query);
        let state = route.and_then(|route| routing.policies.of(route)).cloned();
        let route = route.cloned();
        let mut opener =
            RelayOpener::routed(Arc::clone(&self.relay), meta(), record, route, state).asking(asks);
        let key = RouteKey::Host { host: "web.example.org", path: "/" };
        let Poll::Ready(Ok(Opened { send, recv, .. })) = opener.poll_open(&mut context(), key)
        else {
            panic!("a sidecar takes it");
        };
        let mut exchange = Exchange { send, recv };
        assert_eq!(exchange.send(first), Poll::Ready(Ok(())));
        exchange
    }

    /// Lets everything arrive.
    fn run(&mut self) {
        self.peers.iter_mut().for_each(Peer::run);
    }

    /// The one sidecar that has an exchange.
    fn holder(&mut self) -> usize {
        self.run();
        let holders: Vec<usize> = (0..self.peers.len())
            .filter(|index| self.peers[*index].lane.stats().exchanges_on_wire > 0)
            .collect();
        let [holder] = holders[..] else { panic!("{holders:?} have an exchange") };
        holder
    }

    fn metric(&self, line: &str) -> bool {
        let mut text = String::new();
        self.relay.metrics.encode(&mut text);
        let found = text.lines().any(|other| other == line);
        if !found {
            let near = line.split(['{', ' ']).next().unwrap();
            let near: Vec<_> = text.lines().filter(|other| other.starts_with(near)).collect();
            eprintln!("{near:#?}");
        }
        found
    }
}

impl Peer {
    fn run(&mut self) {
        let now = Instant::now();
        loop {
            let to_peer = self.link.with(|lane| transmit(lane, &mut self.out));
            let to_relay = transmit(&mut self.lane, &mut self.out);
            if to_peer.is_empty() && to_relay.is_empty() {
                return;
            }
            self.lane.handle_input(now, &mut BytesMut::from(&*to_peer)).expect("it is told well");
            self.link
                .with(|lane| lane.handle_input(now, &mut BytesMut::from(&*to_relay)))
                .expect("it tells well");
            while let Some(event) = self.lane.poll_event() {
                if let Event::Opened { key, .. } = event {
                    self.opened.push(key);
                }
            }
            while let Some(event) = self.link.with(Lane::poll_event) {
                if matches!(event, Event::GoAway(_)) {
                    self.link.leave();
                }
            }
        }
    }

    fn last(&self) -> Key {
        *self.opened.last().expect("an exchange came")
    }

    /// Takes what came of the last exchange, as text; a dot stands for its end.
    fn received(&mut self) -> String {
        let mut text = String::new();
        let key = self.last();
        loop {
            match self.lane.poll_recv(key, &mut context()) {
                Poll::Ready(Received::Message(message)) => {
                    text += str::from_utf8(&message.body).expect("text");
                }
                Poll::Ready(Received::Finished) => return text + ".",
                Poll::Ready(Received::Reset(reset)) => {
                    return text + "!" + failure::name(reset.code);
                }
                Poll::Pending => return text,
            }
        }
    }

    fn refuse(&mut self, code: u32) {
        let key = self.last();
        self.lane.refused(key, Reset::new(code));
        self.lane.drop_send(key);
        self.lane.drop_recv(key);
        self.run();
    }

    fn dispatch(&mut self) {
        let key = self.last();
        self.lane.dispatched(key);
        self.run();
    }

    fn answer(&mut self, text: &'static str, end: bool) {
        let key = self.last();
        let sent = self.lane.poll_send(key, &mut context(), &mut Some(message(text, end)));
        assert_eq!(sent, Poll::Ready(Ok(())));
        self.run();
    }

    /// The process dies.
    fn die(&self, relay: &Relay) {
        self.link.abandon(Reset::new(failure::TUNNEL_LOST));
        assert!(relay.sessions.lane_ended(&self.session, &self.link));
        relay.session_ended(&self.session);
    }
}

fn transmit(lane: &mut Lane, out: &mut Transmit) -> Vec<u8> {
    let mut bytes = Vec::new();
    while lane.poll_transmit(Instant::now(), out, usize::MAX) {
        let mut slices = [std::io::IoSlice::new(&[]); 64];
        let count = out.chunks(&mut slices);
        let before = bytes.len();
        slices[..count].iter().for_each(|slice| bytes.extend_from_slice(slice));
        out.advance(bytes.len() - before);
    }
    bytes
}

struct Exchange {
    send: Sending,
    recv: Receiving,
}

impl Exchange {
    fn send(&mut self, message: Message) -> Poll<Result<(), Closed>> {
        self.send.poll_send(&mut context(), &mut Some(message))
    }

    fn recv(&mut self) -> Poll<Received> {
        self.recv.poll_recv(&mut context())
    }

    fn may_move(&self) -> bool {
        self.send.shared.is_some() && self.recv.shared.is_some()
    }
}

fn context() -> Context<'static> {
    Context::from_waker(Waker::noop())
}

fn message(text: &str, end: bool) -> Message {
    Message { field: FIELD, end, head: Bytes::new(), body: Bytes::copy_from_slice(text.as_bytes()) }
}

/// As a lane hands it out.
fn said(text: &str, end: bool) -> Poll<Received> {
    Poll::Ready(Received::Message(message(text, end)))
}

fn ended(code: u32) -> Poll<Received> {
    Poll::Ready(Received::Reset(Reset::new(code)))
}

fn meta() -> Meta {
    let none = Text::default;
    Meta {
        request_id: none(),
        protocol_type: "HTTP".into(),
        route: none(),
        tunnel: none(),
        client_address: "192.0.2.1:4711".into(),
        listener: "web".into(),
        scheme: "http".into(),
        tls_sni: none(),
        tls_alpn: none(),
        tls_client: none(),
        trace_parent: none(),
        trusted_proxy: false,
        peer_address: none(),
        response_head_timeout: None,
        options: none(),
        deadline: None,
    }
}

const AGAIN: Asks = Asks::Again { freely: false };

fn moved(reason: &str, count: usize) -> String {
    format!("sidelane_exchanges_moved_total{{reason=\"{reason}\"}} {count}")
}

#[tokio::test]
async fn what_was_refused_goes_elsewhere_with_all_that_was_sent() {
    for code in [failure::DRAINING, failure::OVERLOADED, failure::SERVICE_UNREACHABLE] {
        let mut stage = Stage::new(2).await;
        let mut exchange = stage.open(Asks::Once, message("one ", false));
        assert_eq!(exchange.send(message("two ", false)), Poll::Ready(Ok(())));
        let first = stage.holder();
        stage.peers[first].refuse(code);
        assert_eq!(exchange.recv(), Poll::Pending, "nobody notices");
        let second = stage.holder();
        assert_ne!(first, second);
        assert_eq!(stage.peers[second].received(), "one two ");
        // What follows goes there, and so comes the answer.
        assert_eq!(exchange.send(message("three", true)), Poll::Ready(Ok(())));
        stage.run();
        assert_eq!(stage.peers[second].received(), "three.");
        stage.peers[second].answer("done", true);
        assert_eq!(exchange.recv(), said("done", true));
        assert!(stage.metric(&moved("refused", 1)));
        let routing = stage.relay.routing.load_full();
        let in_flight = || -> Vec<u32> {
            let all = routing.tunnel("web").expect("served").all();
            all.iter().map(|one| one.standing.in_flight()).collect()
        };
        let mut expected = [0, 0];
        expected[second] = 1;
        assert_eq!(in_flight(), expected, "counted where it is");
        drop(exchange);
        assert_eq!(in_flight(), [0, 0]);
        assert_eq!(stage.relay.kept_bytes.0.load(Ordering::Relaxed), 0);
    }
}

#[tokio::test]
async fn whichever_half_finds_out_moves_it() {
    let mut stage = Stage::new(4).await;
    let mut exchange = stage.open(Asks::Once, message("a", false));
    let refuse = |stage: &mut Stage| {
        let holder = stage.holder();
        assert_eq!(stage.peers[holder].received().chars().next(), Some('a'));
        stage.peers[holder].refuse(failure::OVERLOADED);
    };
    refuse(&mut stage);
    assert_eq!(exchange.send.poll_closed(&mut context()), Poll::Pending);
    refuse(&mut stage);
    assert_eq!(exchange.send(message("b", false)), Poll::Ready(Ok(())));
    exchange.send.finish();
    refuse(&mut stage);
    assert_eq!(exchange.recv(), Poll::Pending);
    let last = stage.holder();
    assert_eq!(stage.peers[last].received(), "ab.", "its end has moved too");
    // The sender may be gone by then, since it has said all.
    let Exchange { send, mut recv } = exchange;
    drop(send);
    stage.run();
    stage.peers[last].answer("x", true);
    assert_eq!(recv.poll_recv(&mut context()), said("x", true));
}

#[tokio::test]
async fn an_exchange_moves_three_times_at_most() {
    let mut stage = Stage::new(5).await;
    let mut exchange = stage.open(AGAIN, message("a", true));
    let mut holders = Vec::new();
    for _ in 0..3 {
        let holder = stage.holder();
        holders.push(holder);
        stage.peers[holder].refuse(failure::SERVICE_UNREACHABLE);
        assert_eq!(exchange.recv(), Poll::Pending);
    }
    let holder = stage.holder();
    holders.push(holder);
    holders.sort_unstable();
    holders.dedup();
    assert_eq!(holders.len(), 4, "to another one each time");
    stage.peers[holder].refuse(failure::SERVICE_UNREACHABLE);
    assert_eq!(exchange.recv(), ended(failure::SERVICE_UNREACHABLE));
    assert!(stage.metric(&moved("refused", 3)));
}

#[tokio::test]
async fn what_nobody_else_would_take_ends_as_it_is() {
    for code in [failure::BAD_REQUEST, failure::UNSUPPORTED, failure::TOO_LARGE] {
        let mut stage = Stage::new(2).await;
        let mut exchange = stage.open(AGAIN, message("a", true));
        let holder = stage.holder();
        stage.peers[holder].refuse(code);
        assert_eq!(exchange.recv(), ended(code));
    }
    // Nor does it wait where only this one serves the tunnel.
    let mut stage = Stage::new(1).await;
    let mut exchange = stage.open(AGAIN, message("a", true));
    stage.peers[0].run();
    stage.peers[0].refuse(failure::SERVICE_UNREACHABLE);
    assert_eq!(exchange.recv(), ended(failure::SERVICE_UNREACHABLE));
}

/// What becomes of an exchange whose sidecar dies, by what it asks and how far it is.
#[tokio::test]
async fn of_a_sidecar_that_dies_only_what_may_be_repeated_goes_elsewhere() {
    #[derive(Debug, PartialEq)]
    enum Far {
        Unwritten,
        Written,
        Dispatched,
        Answered,
    }
    use Far::{Answered, Dispatched, Unwritten, Written};
    let table = [
        (Asks::Once, Unwritten, Some("unsent")),
        (Asks::Once, Written, None),
        (Asks::Once, Dispatched, None),
        (Asks::Unknown, Unwritten, Some("unsent")),
        (Asks::Unknown, Written, None),
        (AGAIN, Unwritten, Some("unsent")),
        (AGAIN, Written, Some("idempotent")),
        (AGAIN, Dispatched, Some("idempotent")),
        (AGAIN, Answered, None),
    ];
    for (asks, far, expected) in table {
        let mut stage = Stage::new(2).await;
        let mut exchange = stage.open(asks, message("a", true));
        let counts = |stage: &Stage| -> Vec<usize> {
            stage.peers.iter().map(|peer| peer.link.with(|lane| lane.exchanges())).collect()
        };
        let first = counts(&stage).iter().position(|count| *count == 1).expect("one has it");
        if far != Unwritten {
            stage.run();
        }
        if matches!(far, Dispatched | Answered) {
            stage.peers[first].dispatch();
        }
        if far == Answered {
            stage.peers[first].answer("begun", false);
        }
        stage.peers[first].die(&stage.relay);
        let second = 1 - first;
        match expected {
            Some(reason) => {
                assert_eq!(exchange.recv(), Poll::Pending, "{asks:?} {far:?}");
                stage.peers[second].run();
                assert_eq!(stage.peers[second].received(), "a.", "{asks:?} {far:?}");
                assert!(stage.metric(&moved(reason, 1)));
            }
            None => {
                if far == Answered {
                    // The sender hears of it first, and it is not for it to say that nothing came.
                    assert!(exchange.send.poll_closed(&mut context()).is_ready());
                    assert_eq!(exchange.recv(), said("begun", false));
                }
                assert_eq!(exchange.recv(), ended(failure::TUNNEL_LOST), "{asks:?} {far:?}");
                assert_eq!(counts(&stage)[second], 0);
            }
        }
    }
}

#[test]
fn what_a_head_says_of_repeating() {
    let table: &[(&str, Option<&[u8]>, bool, Asks)] = &[
        ("GET", None, false, AGAIN),
        ("HEAD", None, false, AGAIN),
        ("OPTIONS", None, false, AGAIN),
        ("TRACE", None, false, AGAIN),
        ("GET", None, true, Asks::Again { freely: true }),
        ("POST", None, true, Asks::Once),
        ("PATCH", None, true, Asks::Once),
        ("PUT", None, false, Asks::Once),
        ("PUT", None, true, Asks::Again { freely: true }),
        ("DELETE", None, true, Asks::Again { freely: true }),
        ("CONNECT", Some(b"websocket"), false, AGAIN),
        ("CONNECT", Some(b"other"), false, Asks::Once),
        ("get", None, true, Asks::Once),
    ];
    assert!(!table.is_empty());
    for (method, protocol, retries, expected) in table {
        let method = Method::from_bytes(method.as_bytes()).unwrap();
        assert_eq!(Asks::of(&method, *protocol, *retries), *expected, "{method}");
    }
}

#[tokio::test]
async fn a_route_that_retries_says_of_more_failures_that_they_may_be_repeated() {
    for (asks, is_moved) in [(AGAIN, false), (Asks::Again { freely: true }, true)] {
        let mut stage = Stage::new(2).await;
        let mut exchange = stage.open(asks, message("a", true));
        let holder = stage.holder();
        stage.peers[holder].dispatch();
        let key = stage.peers[holder].last();
        stage.peers[holder].lane.reset(key, Reset::new(failure::SERVICE_RESET));
        stage.run();
        assert_eq!(exchange.recv() == Poll::Pending, is_moved);
    }
}

#[tokio::test]
async fn what_may_have_been_carried_out_is_repeated_within_a_budget() {
    let retries = ", retries: { budget: 1%, budget_min: 0 }";
    let mut stage = Stage::with_route(3, retries).await;
    let mut exchange = stage.open(AGAIN, message("a", true));
    let holder = stage.holder();
    stage.peers[holder].die(&stage.relay);
    assert_eq!(exchange.recv(), ended(failure::TUNNEL_LOST), "nobody has paid in");
    assert!(stage.metric("sidelane_exchanges_not_moved_total 1"));
}

#[tokio::test]
async fn a_body_beyond_the_bound_is_kept_no_longer() {
    let mut stage = Stage::new(2).await;
    let mut exchange = stage.open(AGAIN, message("a", false));
    let part = "x".repeat(30 * 1024);
    for is_kept in [true, true, false] {
        assert_eq!(exchange.send(message(&part, false)), Poll::Ready(Ok(())));
        let kept = stage.relay.kept_bytes.0.load(Ordering::Relaxed);
        assert_eq!(kept > 0, is_kept);
        assert!(kept <= KEPT_BYTES_MAX);
        stage.run();
        let holder = stage.holder();
        assert!(!stage.peers[holder].received().is_empty());
    }
    let holder = stage.holder();
    stage.peers[holder].refuse(failure::DRAINING);
    assert_eq!(exchange.recv(), ended(failure::DRAINING));
    assert!(!exchange.may_move());
}

#[tokio::test]
async fn what_all_exchanges_keep_is_bounded() {
    let mut stage = Stage::new(2).await;
    assert!(stage.relay.kept_bytes.try_add(KEPT_BYTES_OF_ALL_MAX - 10));
    let mut exchange = stage.open(AGAIN, message("a", true));
    let holder = stage.holder();
    stage.peers[holder].refuse(failure::DRAINING);
    assert_eq!(exchange.recv(), ended(failure::DRAINING));
    assert_eq!(stage.relay.kept_bytes.0.load(Ordering::Relaxed), KEPT_BYTES_OF_ALL_MAX - 10);
}

#[tokio::test]
async fn an_exchange_that_is_answered_costs_nothing_more() {
    let mut stage = Stage::new(1).await;
    let mut exchange = stage.open(AGAIN, message("a", false));
    assert!(exchange.may_move());
    stage.run();
    stage.peers[0].answer("b", false);
    assert_eq!(exchange.recv(), said("b", false));
    assert_eq!(exchange.send(message("c", false)), Poll::Ready(Ok(())));
    assert!(exchange.send.shared.is_none() && exchange.recv.shared.is_none());
    assert_eq!(stage.relay.kept_bytes.0.load(Ordering::Relaxed), 0);
}

#[tokio::test(start_paused = true)]
async fn where_nobody_is_there_it_waits_for_whoever_comes() {
    let mut stage = Stage::new(1).await;
    let mut exchange = stage.open(Asks::Once, message("a", false));
    stage.run();
    stage.peers[0].link.leave();
    stage.peers[0].refuse(failure::DRAINING);
    assert_eq!(exchange.recv(), Poll::Pending);
    assert_eq!(exchange.send(message("b", true)), Poll::Pending, "kept by whoever has it");
    stage.join(9).await;
    assert_eq!(exchange.send(message("b", true)), Poll::Ready(Ok(())));
    stage.peers[1].run();
    assert_eq!(stage.peers[1].received(), "ab.");
    stage.peers[1].answer("c", true);
    assert_eq!(exchange.recv(), said("c", true));

    // Nobody comes.
    let mut stage = Stage::new(1).await;
    let mut exchange = stage.open(Asks::Once, message("a", false));
    stage.run();
    stage.peers[0].link.leave();
    stage.peers[0].refuse(failure::DRAINING);
    assert_eq!(exchange.recv(), Poll::Pending);
    tokio::time::advance(Duration::from_millis(999)).await;
    assert_eq!(exchange.recv(), Poll::Pending);
    tokio::time::advance(Duration::from_millis(2)).await;
    assert_eq!(exchange.recv(), ended(failure::DRAINING));
}

#[tokio::test]
async fn what_a_leaving_lane_refused_goes_to_another_sidecar_where_there_is_one() {
    // As often as chance might choose the same one again.
    for _ in 0..100 {
        let mut stage = Stage::new(2).await;
        let mut exchange = stage.open(Asks::Once, message("a", true));
        let first = stage.holder();
        stage.peers[first].refuse(failure::DRAINING);
        assert_eq!(exchange.recv(), Poll::Pending);
        assert_ne!(stage.holder(), first);
    }
}

#[tokio::test]
async fn another_lane_of_the_same_sidecar_takes_what_a_leaving_one_refused() {
    let mut stage = Stage::new(1).await;
    let mut exchange = stage.open(Asks::Once, message("a", true));
    stage.run();
    // The session is still open, as with a second lane.
    stage.peers[0].refuse(failure::DRAINING);
    assert_eq!(exchange.recv(), Poll::Pending);
    stage.run();
    assert_eq!(stage.peers[0].received(), "a.");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_is_gone_moves_nothing() {
    let ends: [fn(&mut Exchange); 2] = [
        |exchange| exchange.send.reset(Reset::new(failure::CLIENT_GONE)),
        |exchange| {
            // Dropped unfinished.
            let shared = exchange.send.shared.take().expect("it may move");
            shared.is_sender_gone.store(true, Ordering::Release);
            shared.intend();
        },
    ];
    for end in ends {
        let mut stage = Stage::new(1).await;
        let mut exchange = stage.open(AGAIN, message("a", false));
        stage.run();
        stage.peers[0].link.leave();
        stage.peers[0].refuse(failure::DRAINING);
        assert_eq!(exchange.recv(), Poll::Pending, "it waits");
        end(&mut exchange);
        stage.join(9).await;
        assert_eq!(exchange.recv(), ended(failure::DRAINING));
        stage.run();
        assert!(stage.peers[1].opened.is_empty());
    }
    // Before it was written at all: that it was reset by us is no reason to send it elsewhere.
    let mut stage = Stage::new(2).await;
    let mut exchange = stage.open(AGAIN, message("a", false));
    exchange.send.reset(Reset::new(failure::CLIENT_GONE));
    assert_eq!(exchange.recv(), ended(failure::CLIENT_GONE));
    stage.run();
    assert!(stage.peers.iter().all(|peer| peer.opened.is_empty()));
}

#[tokio::test]
async fn one_that_fails_again_and_again_is_left_aside_and_never_the_last() {
    let mut stage = Stage::new(2).await;
    let mut fails = 0;
    for _ in 0..200 {
        let mut exchange = stage.open(Asks::Once, message("a", true));
        let holder = stage.holder();
        if holder == 0 {
            fails += 1;
            stage.peers[0].refuse(failure::SERVICE_UNREACHABLE);
            assert_eq!(exchange.recv(), Poll::Pending);
            assert_eq!(stage.holder(), 1, "the other one has it");
        }
        stage.peers[1].answer("b", true);
        assert_eq!(exchange.recv(), said("b", true));
    }
    assert_eq!(fails, crate::choice::FAILURES_MAX);
    assert!(stage.metric("sidelane_sidecar_ejections_total{tunnel=\"web\"} 1"));
    assert!(stage.metric("sidelane_sidecars_ejected 1"));
    // The other fails too: half are left aside already.
    for _ in 0..20 {
        let mut exchange = stage.open(Asks::Once, message("a", true));
        assert_eq!(stage.holder(), 1);
        stage.peers[1].refuse(failure::SERVICE_UNREACHABLE);
        // It is tried nevertheless, where nobody else is.
        assert_eq!(exchange.recv(), Poll::Pending);
        stage.run();
        stage.peers[0].refuse(failure::SERVICE_UNREACHABLE);
        assert_eq!(exchange.recv(), ended(failure::SERVICE_UNREACHABLE));
    }
    assert!(stage.metric("sidelane_sidecar_ejections_total{tunnel=\"web\"} 1"));
}

#[tokio::test]
async fn an_upload_that_is_not_kept_speaks_for_its_sidecar_and_against_it() {
    // What becomes of the sidecar's uploads, one after the other, and whether that leaves it aside.
    for (ends, is_left_aside) in [("fffff", true), ("ffff", false), ("ffffaf", false)] {
        let mut stage = Stage::new(2).await;
        let part = "x".repeat(40 * 1024);
        for end in ends.chars() {
            loop {
                let mut exchange = stage.open(Asks::Once, message("a", false));
                let holder = stage.holder();
                for _ in 0..2 {
                    assert_eq!(exchange.send(message(&part, false)), Poll::Ready(Ok(())));
                    stage.run();
                    assert!(!stage.peers[holder].received().is_empty());
                }
                assert_eq!(exchange.recv(), Poll::Pending);
                if holder == 1 || end == 'a' {
                    stage.peers[holder].answer("b", true);
                    assert_eq!(exchange.recv(), said("b", true));
                } else {
                    let key = stage.peers[0].last();
                    stage.peers[0].lane.reset(key, Reset::new(failure::SERVICE_RESET));
                    stage.run();
                    // Both halves hear of it, and it counts once.
                    assert!(exchange.send.poll_closed(&mut context()).is_ready());
                    assert_eq!(exchange.recv(), ended(failure::SERVICE_RESET));
                }
                if holder == 0 {
                    break;
                }
            }
        }
        let ejected = stage.metric("sidelane_sidecar_ejections_total{tunnel=\"web\"} 1");
        assert_eq!(ejected, is_left_aside, "{ends}");
    }
}

struct Bell(AtomicUsize);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[tokio::test]
async fn a_half_that_finds_the_other_at_work_is_called_again_and_leaves_word() {
    let stage = Stage::new(1).await;
    let mut exchange = stage.open(AGAIN, message("a", false));
    let shared = Arc::clone(exchange.send.shared.as_ref().expect("it may move"));
    let bell = Arc::new(Bell(AtomicUsize::new(0)));
    let waker = Waker::from(Arc::clone(&bell));
    let held = shared.hold(&context()).expect("nobody has it");
    let mut cx = Context::from_waker(&waker);
    assert_eq!(exchange.recv.poll_recv(&mut cx), Poll::Pending);
    assert_eq!(exchange.send.poll_closed(&mut cx), Poll::Pending);
    exchange.send.finish();
    assert!(!held.is_finished);
    assert_eq!(bell.0.load(Ordering::Relaxed), 0);
    drop(held);
    assert_eq!(bell.0.load(Ordering::Relaxed), 2);
    assert!(shared.hold(&context()).expect("free").is_finished);
    assert_eq!(exchange.recv.poll_recv(&mut cx), Poll::Pending);
    assert_eq!(bell.0.load(Ordering::Relaxed), 2);
}
