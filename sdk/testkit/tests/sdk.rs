//! The SDK on the fake host: what a plugin's author relies on.

use std::time::Duration;

use serde_json::json;
use sidelane_plugin::{
    Born, Buf, ByteStream, Claim, ConfigError, Error, Exchange, Failure, Frame, HeaderList, Host,
    Message, Opener, PerShard, Protocol, Request, RequestHead, Reset, Responder, ResponseHead,
    RouteKey, Service, failure,
};
use sidelane_testkit::{Kit, Outcome, TestFailure, TestMeta, TestRequest, TestService};
use tokio::io::AsyncWriteExt as _;

const WELL: Outcome = Outcome::Ended(failure::NONE);
const CUSTOM: u32 = sidelane_plugin::FIELD_CUSTOM;

#[derive(serde::Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Config {
    pool: Pool,
}

#[derive(serde::Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Pool {
    size: u32,
}

struct Bytes;

impl Protocol for Bytes {
    type Config = Config;
    const TYPES: &'static [&'static str] = &["BYTES"];

    fn new(config: Config, _: &Host) -> Result<Self, ConfigError> {
        match config.pool.size {
            0..100 => Ok(Self),
            size => Err(ConfigError::at("pool.size", format!("{size} is too large"))),
        }
    }

    async fn accept(&self, client: ByteStream, mut opener: Opener<'_>) -> Result<(), Error> {
        let exchange = opener.open(RouteKey::Listener).await?;
        exchange.join(client).await
    }

    async fn deliver(&self, exchange: Exchange<'_>, service: Service) -> Result<(), Error> {
        let stream = service.connect().await?;
        exchange.join(stream).await
    }
}

fn bytes() -> Kit {
    Kit::new::<Bytes>(&json!(null)).expect("accepts an absent block")
}

#[test]
fn absent_block_is_defaults_and_errors_carry_their_path() {
    let error = |config| Kit::new::<Bytes>(&config).err().expect("refused");
    assert_eq!(error(json!({"pool": {"size": "x"}})).path.as_deref(), Some("pool.size"));
    assert_eq!(error(json!({"pool": {"size": 100}})).path.as_deref(), Some("pool.size"));
    assert!(error(json!([{"size": 1}])).message.contains("not a block"));
    assert!(error(json!({"pol": {}})).message.contains("unknown field `pol`"));
    drop(bytes());
}

#[test]
fn join_keeps_each_half_open_until_it_ends() {
    let kit = bytes();
    let mut call = kit.accept();
    kit.block_on(async {
        call.client.write(b"up").await;
        let message = call.peer.message().await;
        assert_eq!((message.field, &message.payload[..]), (CUSTOM, &b"up"[..]));
        call.client.shutdown().await;
        assert_eq!(call.peer.payload_to_end().await, b"");
        // The other direction still works.
        call.peer.send(CUSTOM, &b"down"[..], false);
        assert_eq!(call.client.read(4).await, b"down");
        assert_eq!(call.running.ended(), None);
        call.peer.send(CUSTOM, &b"last"[..], true);
        assert_eq!(call.client.read_to_end().await, b"last");
        assert_eq!(call.running.outcome().await, WELL);
    });
}

#[test]
fn join_moves_much_data_under_backpressure() {
    let kit = bytes();
    let service = TestService::default();
    let call = kit.deliver(&TestMeta::default(), &service);
    let sent: Vec<u8> =
        (0..1_000_000u32).map(|i| i.to_le_bytes()[0] ^ i.to_le_bytes()[1]).collect();
    kit.block_on(async {
        let mut stream = service.accept().await;
        call.peer.send(CUSTOM, &b"go"[..], true);
        assert_eq!(stream.read(2).await, b"go");
        assert!(call.peer.was_dispatched());
        let (mut written, mut received) = (0, Vec::new());
        while received.len() < sent.len() {
            // The window is 256 KiB, the pipe 64 KiB: neither end takes it all at once.
            let chunk = (sent.len() - written).min(50_000);
            if chunk > 0 {
                stream.write(&sent[written..written + chunk]).await;
                written += chunk;
            }
            while received.len() < written {
                received.extend_from_slice(&call.peer.message().await.payload);
            }
        }
        assert!(received == sent);
        stream.shutdown().await;
        assert_eq!(call.running.outcome().await, WELL);
    });
}

#[test]
fn full_window_stops_reading_from_the_client() {
    let kit = bytes();
    let mut call = kit.accept();
    call.peer.set_window(0);
    kit.block_on(call.client.write(&[7; 60_000]));
    kit.run_until_idle();
    assert_eq!(call.peer.waiting(), 0);
    kit.block_on(async {
        call.peer.set_window(1 << 20);
        let mut received = 0;
        while received < 60_000 {
            received += call.peer.message().await.payload.len();
        }
    });
    call.running.cancel();
}

#[test]
fn question_mark_tells_the_peer_why() {
    let kit = bytes();
    let service = TestService::default();
    service.refuse();
    let call = kit.deliver(&TestMeta::default(), &service);
    let outcome = kit.block_on(call.running.outcome());
    assert_eq!(outcome, Outcome::Ended(failure::SERVICE_UNREACHABLE));
    assert_eq!(call.peer.was_reset(), Some(Reset::new(failure::SERVICE_UNREACHABLE)));
}

#[test]
fn cancelled_handler_resets_with_cancelled() {
    let kit = bytes();
    let call = kit.deliver(&TestMeta::default(), &TestService::default());
    kit.run_until_idle();
    call.running.cancel();
    assert_eq!(call.peer.was_reset(), Some(Reset::new(failure::CANCELLED)));
}

#[test]
fn reset_ends_a_join_whose_stream_is_full() {
    let kit = bytes();
    let mut call = kit.accept();
    call.client.set_room(1);
    kit.block_on(async {
        call.peer.send(CUSTOM, vec![1; 1000], false);
        call.peer.reset(Reset { code: failure::SERVICE_RESET, protocol_code: Some(8) });
        assert_eq!(call.running.outcome().await, Outcome::Ended(failure::SERVICE_RESET));
        call.client.closed().await;
    });
}

#[test]
fn broken_streams_count_against_their_end() {
    let kit = bytes();
    let mut call = kit.accept();
    let service = TestService::default();
    let deliver = kit.deliver(&TestMeta::default(), &service);
    kit.run_until_idle();
    call.client.fail(104);
    kit.block_on(async {
        assert_eq!(call.running.outcome().await, Outcome::Ended(failure::CLIENT_GONE));
        assert_eq!(call.peer.was_reset().map(|reset| reset.code), Some(failure::CLIENT_GONE));
        service.accept().await.fail(104);
        assert_eq!(deliver.running.outcome().await, Outcome::Ended(failure::SERVICE_RESET));
    });
}

/// Does what the target asks for.
struct Asked {
    calls: PerShard<u32>,
}

impl Protocol for Asked {
    type Config = ();
    const TYPES: &'static [&'static str] = &["ASKED"];
    const BORN: Born = Born::Http;

    fn new((): (), host: &Host) -> Result<Self, ConfigError> {
        Ok(Self { calls: PerShard::new(host, u32::default) })
    }

    fn claims(&self, head: &RequestHead<'_>) -> Claim {
        assert_ne!(head.target(), b"/panic", "asked to");
        if head.header(b"x-asked").is_some() { Claim::Yes } else { Claim::No }
    }

    async fn accept_http(
        &self,
        mut request: Request<'_>,
        mut responder: Responder,
        mut opener: Opener<'_>,
    ) -> Result<(), Error> {
        let host = Host::current();
        let calls = self.calls.with(|calls| {
            *calls += 1;
            *calls
        });
        match request.head.target() {
            b"/panic" => panic!("asked to panic, call {calls}"),
            b"/open" => {
                let exchange = opener.open(RouteKey::Host { host: b"test", path: b"/" }).await?;
                drop(exchange);
                Ok(())
            }
            b"/echo" => echo(&mut request, &mut responder).await,
            b"/blocking" => {
                let sum = host.blocking(|| (1..=4).sum::<u32>()).await;
                answer(&mut responder, &sum.expect("adds up").to_string())
            }
            b"/blocking-panic" => {
                let result = host.blocking(|| panic!("asked to")).await;
                answer(
                    &mut responder,
                    &result.map_or_else(|error| error.to_string(), |()| String::new()),
                )
            }
            b"/sleep" => {
                let before = host.now();
                host.sleep(Duration::from_secs(3600)).await;
                answer(&mut responder, &(host.now() - before).as_secs().to_string())
            }
            b"/timeout" => {
                let never = std::future::pending::<()>();
                let timed_out = host.timeout(Duration::from_secs(5), never).await.is_err();
                answer(&mut responder, &timed_out.to_string())
            }
            b"/spawn" => {
                let mut stream = host.connect("10.0.0.1:1").await?;
                host.spawn(async move {
                    let _ = stream.write_all(b"from a task").await;
                    let _ = stream.shutdown().await;
                });
                answer(&mut responder, "spawned")
            }
            b"/splice" => {
                let (a, b) = (host.connect("10.0.0.1:1").await?, host.connect("10.0.0.1:1").await?);
                let spliced = host.splice(a, b).await?;
                answer(&mut responder, &format!("{} {}", spliced.a_to_b, spliced.b_to_a))
            }
            b"/metrics" => {
                host.counter("asked_total", "Calls.").add(3);
                host.gauge("open", "Open.").add(-1);
                host.histogram("wait_seconds", "Wait.").observe(0.5);
                host.counter("Not Valid", "Refused.").add(1);
                answer(&mut responder, "ok")
            }
            _ => Err(Error::new(failure::BAD_REQUEST, "asked for nothing known")),
        }
    }

    async fn deliver(&self, mut exchange: Exchange<'_>, _: Service) -> Result<(), Error> {
        let message = exchange.recv.recv().await.ok_or_else(Error::unsupported)??;
        let whole = message.body.clone();
        exchange.send.refused(Reset::new(failure::SERVICE_INVALID));
        drop(whole);
        Ok(())
    }
}

async fn echo(request: &mut Request<'_>, responder: &mut Responder) -> Result<(), Error> {
    responder.informational(103, &HeaderList::new())?;
    let mut headers = HeaderList::new();
    headers.extend(request.head.headers().filter(|(name, _)| name.starts_with(b"x-")));
    let body_length = request.body.length();
    responder.head(ResponseHead { status: 200, headers: &headers, body_length }, None, false)?;
    while let Some(frame) = request.body.frame().await {
        match frame? {
            Frame::Data { bytes, end } => responder.body(bytes, end).await?,
            Frame::Trailers(trailers) => {
                responder.finish(Some(&trailers.iter().collect()))?;
                return Ok(());
            }
        }
    }
    Ok(())
}

fn answer(responder: &mut Responder, text: &str) -> Result<(), Error> {
    let headers = HeaderList::new();
    let head =
        ResponseHead { status: 200, headers: &headers, body_length: Some(text.len() as u64) };
    responder.head(head, Some(Buf::copy_from_slice(text.as_bytes())), true)?;
    Ok(())
}

fn asked() -> Kit {
    Kit::new::<Asked>(&json!(null)).expect("accepts an absent block")
}

#[test]
fn host_services_reach_the_plugin() {
    for (target, expected) in [
        ("/blocking", "10"),
        ("/blocking-panic", "the blocking work panicked"),
        ("/sleep", "3600"),
        ("/timeout", "true"),
        ("/metrics", "ok"),
    ] {
        let kit = asked();
        let call = kit.accept_http(&TestRequest::new("GET", target));
        let response = kit.block_on(call.response.whole()).expect(target);
        assert_eq!(String::from_utf8_lossy(&response.body), expected, "{target}");
        assert_eq!(kit.block_on(call.running.outcome()), WELL, "{target}");
        if target == "/metrics" {
            assert_eq!(kit.metric("asked_total"), Some(3.0));
            assert_eq!(kit.metric("open"), Some(-1.0));
            assert_eq!(kit.metric("wait_seconds"), Some(0.5));
            assert_eq!(kit.metric("Not Valid"), None);
        }
    }
}

#[test]
fn spawned_tasks_outlive_their_handler() {
    let kit = asked();
    let service = TestService::at("10.0.0.1:1");
    kit.listen(&service);
    let call = kit.accept_http(&TestRequest::new("GET", "/spawn"));
    kit.block_on(async {
        assert_eq!(call.running.outcome().await, WELL);
        assert_eq!(service.accept().await.read_to_end().await, b"from a task");
    });
}

#[test]
fn splice_joins_streams_in_the_host() {
    let kit = asked();
    let service = TestService::at("10.0.0.1:1");
    kit.listen(&service);
    let call = kit.accept_http(&TestRequest::new("GET", "/splice"));
    kit.block_on(async {
        let (mut a, mut b) = (service.accept().await, service.accept().await);
        a.write(b"four").await;
        a.shutdown().await;
        assert_eq!(b.read_to_end().await, b"four");
        b.write(b"to").await;
        b.shutdown().await;
        assert_eq!(a.read_to_end().await, b"to");
        assert_eq!(call.response.whole().await.expect("answers").body, b"4 2");
    });
}

#[test]
fn http_frames_pass_with_their_trailers() {
    let kit = asked();
    let request =
        TestRequest::new("POST", "/echo").with_body(None).header("x-a", "1").header("x-a", "2");
    let call = kit.accept_http(&request);
    kit.block_on(async {
        assert_eq!(call.response.informational().await.status, 103);
        let head = call.response.head().await.expect("a head");
        assert_eq!((head.headers.len(), head.body_length), (2, None));
        call.body.send("one ");
        call.body.send("two");
        call.body.trailers(&[("x-sum", "7")]);
        let whole = call.response.whole().await.expect("a response");
        assert_eq!(whole.body, b"one two");
        assert_eq!(whole.trailers, [("x-sum".into(), "7".into())]);
        assert_eq!(call.running.outcome().await, WELL);
    });
}

#[test]
fn full_client_stops_the_body() {
    let kit = asked();
    let call = kit.accept_http(&TestRequest::new("POST", "/echo").with_body(None));
    call.response.set_room(1);
    for _ in 0..3 {
        call.body.send("chunk");
    }
    call.body.end();
    kit.run_until_idle();
    assert_eq!(call.running.ended(), None);
    kit.block_on(async {
        assert_eq!(call.response.chunk().await, Ok(Some("chunk".into())));
        assert_eq!(call.response.chunk().await, Ok(Some("chunk".into())));
        assert_eq!(call.response.chunk().await, Ok(Some("chunk".into())));
    });
    // The body's end came without a frame of its own, so the echo leaves the response open.
    assert_eq!(kit.block_on(call.running.outcome()), WELL);
    assert_eq!(call.response.was_aborted(), Some(Reset::new(failure::PLUGIN_FAILED)));
}

#[test]
fn a_panic_fails_its_exchange_alone_and_is_logged() {
    let kit = asked();
    let panics = kit.accept_http(&TestRequest::new("GET", "/panic"));
    let sleeps = kit.accept_http(&TestRequest::new("GET", "/sleep"));
    kit.block_on(async {
        assert_eq!(panics.running.outcome().await, Outcome::Panicked);
        assert_eq!(panics.response.was_aborted(), Some(Reset::new(failure::PLUGIN_FAILED)));
        assert_eq!(sleeps.running.outcome().await, WELL);
    });
    let logs = kit.logs();
    let line = logs.iter().find(|line| line.target == "panic").expect("a line");
    assert!(
        line.text.contains("asked to panic, call 1") && line.text.contains("sdk.rs"),
        "{line:?}"
    );
    assert_eq!(kit.claims(&TestRequest::new("GET", "/panic")), 0, "a panicking claim is no claim");
    assert_eq!(kit.claims(&TestRequest::new("GET", "/").header("x-asked", "1")), 2);
}

#[test]
fn failed_handlers_tell_the_client_why() {
    for (target, opens, code) in [
        ("/open", Some(failure::NO_ROUTE), failure::NO_ROUTE),
        ("/unknown", None, failure::BAD_REQUEST),
    ] {
        let mut kit = asked();
        if let Some(code) = opens {
            kit.refuse_opens(TestFailure::new(code));
        }
        let call = kit.accept_http(&TestRequest::new("GET", target));
        assert_eq!(kit.block_on(call.running.outcome()), Outcome::Ended(code), "{target}");
        assert_eq!(call.response.was_aborted(), Some(Reset::new(code)), "{target}");
    }
}

#[test]
fn default_refusal_is_one_line_with_the_code() {
    for (code, status, retry) in [
        (failure::NO_ROUTE, 404, None),
        (failure::NO_SIDECAR, 503, Some("1")),
        (failure::SERVICE_TIMEOUT, 504, None),
        (failure::SERVICE_RESET, 502, None),
    ] {
        let kit = asked();
        let call = kit.refuse_http(&TestRequest::new("GET", "/"), &TestFailure::new(code));
        let whole = kit.block_on(call.response.whole()).expect("a response");
        assert_eq!(whole.head.status, status);
        assert_eq!(whole.head.header("x-sidelane-error"), Some(failure::name(code)));
        assert_eq!(whole.head.header("retry-after"), retry);
        assert!(String::from_utf8_lossy(&whole.body).starts_with(failure::name(code)));
        let head = kit.refuse_http(&TestRequest::new("HEAD", "/"), &TestFailure::new(code));
        let without = kit.block_on(head.response.whole()).expect("a response");
        assert_eq!(
            (without.body.len(), without.head.body_length),
            (0, Some(whole.body.len() as u64))
        );
    }
}

#[test]
fn handlers_left_out_say_unsupported() {
    struct DeliversOnly;
    impl Protocol for DeliversOnly {
        type Config = ();
        const TYPES: &'static [&'static str] = &["DELIVERS_ONLY"];
        const BORN: Born = Born::Http;

        fn new((): (), _: &Host) -> Result<Self, ConfigError> {
            Ok(Self)
        }

        async fn deliver(&self, _: Exchange<'_>, _: Service) -> Result<(), Error> {
            Ok(())
        }
    }
    let kit = Kit::new::<DeliversOnly>(&json!(null)).expect("accepts an absent block");
    let call = kit.accept_http(&TestRequest::new("GET", "/"));
    assert_eq!(kit.block_on(call.running.outcome()), Outcome::Ended(failure::UNSUPPORTED));
    assert_eq!(call.response.was_aborted(), Some(Reset::new(failure::UNSUPPORTED)));
}

#[test]
fn refused_exchanges_may_be_tried_elsewhere() {
    let kit = asked();
    let call = kit.deliver(&TestMeta::default(), &TestService::default());
    call.peer.send(CUSTOM, &b"x"[..], true);
    assert_eq!(kit.block_on(call.running.outcome()), WELL);
    assert_eq!(call.peer.was_refused(), Some(Reset::new(failure::SERVICE_INVALID)));
}

/// Leaks what it is lent.
struct Leaks;

impl Protocol for Leaks {
    type Config = ();
    const TYPES: &'static [&'static str] = &["LEAKS"];

    fn new((): (), _: &Host) -> Result<Self, ConfigError> {
        Ok(Self)
    }

    async fn deliver(&self, mut exchange: Exchange<'_>, _: Service) -> Result<(), Error> {
        let message = exchange.recv.recv().await.ok_or_else(Error::unsupported)??;
        std::mem::forget(message);
        exchange
            .send
            .send(Message { field: 1, end: true, head: Buf::new(), body: vec![0; 200_000].into() })
            .await?;
        Ok(())
    }

    async fn refuse(&self, client: ByteStream, _: &Failure) -> Result<(), Error> {
        std::mem::forget(client);
        Ok(())
    }
}

#[test]
fn kit_names_leaks_and_broken_limits() {
    let kit = Kit::new::<Leaks>(&json!({})).expect("accepts an empty block");
    let call = kit.deliver(&TestMeta::default(), &TestService::default());
    call.peer.send(CUSTOM, &b"x"[..], true);
    let refused = kit.refuse(&TestFailure::new(failure::NO_ROUTE));
    kit.run_until_idle();
    assert_eq!(refused.running.ended(), Some(WELL));
    let violations = kit.finish();
    for expected in
        ["200000 bytes", "payload field 1", "buffer: 1 never dropped", "stream: 1 never dropped"]
    {
        assert!(
            violations.iter().any(|line| line.contains(expected)),
            "{expected}: {violations:?}"
        );
    }
}

#[test]
#[should_panic(expected = "stalled")]
fn waiting_for_what_cannot_happen_is_said() {
    let kit = bytes();
    let call = kit.accept();
    kit.block_on(call.running.outcome());
}
