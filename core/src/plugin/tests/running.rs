//! Exchanges through a loaded plugin: what passes, what is isolated, what outlives what.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::{Arc, Mutex, Once};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, Version};
use sidelane_abi::failure;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::mpsc;

use super::DRAIN;
use super::lent::{self, Body, Metrics, Opener, Responder, Service};
use super::libraries::{c_plugin, probe_bytes, probe_http};
use super::loading::spec;
use crate::plugin::vtable::lent_objects;
use crate::plugin::{
    Born, Call, CallEnd, GenerationState, Limits, PluginSpec, Plugins, PreparedHead, SniffResult,
    enter_shard, lend,
};

const ENDED: CallEnd = CallEnd { code: failure::NONE, panicked: false };

fn probe(label: &str) -> PluginSpec {
    PluginSpec { config: serde_json::json!({"label": label}), ..spec("probe", probe_bytes()) }
}

fn loaded(limits: Limits) -> (Plugins, Metrics) {
    let metrics = Metrics::default();
    let plugins = Plugins::new(metrics.host(), limits);
    plugins.apply(&[probe("first")], DRAIN).unwrap();
    (plugins, metrics)
}

/// Runs a test as a data-path thread does, and checks that nothing that was lent is left.
fn on_shard(test: impl Future<Output = ()>) {
    let before = lent_objects();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        enter_shard(0, 1);
        test.await;
    });
    drop(runtime);
    assert_eq!(lent_objects(), before);
}

/// Begins `accept` at the relay for a client that has sent `first`; the exchange cannot be opened.
fn accept(plugins: &Plugins, first: u8) -> (Call, DuplexStream) {
    let (client, theirs) = tokio::io::duplex(1024);
    let call = begin(plugins, theirs, Opener { end: None });
    let mut client = client;
    let mut cx = Context::from_waker(Waker::noop());
    let written = Pin::new(&mut client);
    let written = tokio::io::AsyncWrite::poll_write(written, &mut cx, &[first]);
    assert!(matches!(written, Poll::Ready(Ok(1))));
    (call, client)
}

fn begin(plugins: &Plugins, client: DuplexStream, opener: Opener) -> Call {
    plugins.find("PROBE").unwrap().accept_stream(lent::meta(), client, opener)
}

/// Both ends of an echoing exchange: the client, and the calls at relay and sidecar.
fn echo(plugins: &Plugins) -> (DuplexStream, Call, Call) {
    let (relay, (send, recv)) = lent::exchange();
    let (client, theirs) = tokio::io::duplex(1024);
    let accepting = begin(plugins, theirs, Opener { end: Some(relay) });
    let (accept, mut accepted) = mpsc::unbounded_channel::<DuplexStream>();
    tokio::spawn(async move {
        while let Some(stream) = accepted.recv().await {
            let (mut read, mut write) = tokio::io::split(stream);
            tokio::io::copy(&mut read, &mut write).await.unwrap();
            write.shutdown().await.unwrap();
        }
    });
    let delivering =
        plugins.find("PROBE").unwrap().deliver(lent::meta(), send, recv, Service { accept });
    (client, accepting, delivering)
}

async fn echoes(client: &mut DuplexStream, bytes: &[u8]) {
    let (mut read, mut write) = tokio::io::split(client);
    let mut back = vec![0; bytes.len()];
    let (written, read) = tokio::join!(write.write_all(bytes), read.read_exact(&mut back));
    written.unwrap();
    read.unwrap();
    assert!(back == bytes);
}

fn state(plugins: &Plugins) -> Vec<GenerationState> {
    plugins.generations().iter().map(|generation| generation.state).collect()
}

#[test]
fn bytes_pass_through_both_ends_of_an_exchange() {
    on_shard(async {
        let (plugins, metrics) = loaded(Limits::default());
        let (mut client, accepting, delivering) = echo(&plugins);
        let (accepting, delivering) = (tokio::spawn(accepting), tokio::spawn(delivering));
        client.write_all(b"E").await.unwrap();
        echoes(&mut client, b"hello").await;
        // More than all buffers between hold, in pieces large and small: backpressure both ways.
        echoes(&mut client, &vec![0x5a; 1_000_000]).await;
        assert_eq!(metrics.value("probe", "futures"), 2.0);
        assert_eq!(plugins.generations()[0].exchanges, 2);
        client.shutdown().await.unwrap();
        assert_eq!(client.read(&mut [0; 8]).await.unwrap(), 0);
        assert_eq!((accepting.await.unwrap(), delivering.await.unwrap()), (ENDED, ENDED));
        assert_eq!(metrics.value("probe", "futures"), 0.0);
        assert_eq!(plugins.generations()[0].exchanges, 0);
    });
}

#[test]
fn a_dropped_call_cancels_and_resets_the_exchange() {
    on_shard(async {
        let (plugins, metrics) = loaded(Limits::default());
        let (mut client, accepting, delivering) = echo(&plugins);
        let accepting = tokio::spawn(accepting);
        let delivering = tokio::spawn(delivering);
        client.write_all(b"E").await.unwrap();
        echoes(&mut client, b"hello").await;
        accepting.abort();
        assert!(accepting.await.unwrap_err().is_cancelled());
        assert_ne!(delivering.await.unwrap().code, failure::NONE);
        assert_eq!(client.read(&mut [0; 8]).await.unwrap(), 0);
        assert_eq!(metrics.value("probe", "futures"), 0.0);
    });
}

#[test]
fn a_call_that_is_never_polled_leaves_nothing() {
    on_shard(async {
        let (plugins, metrics) = loaded(Limits::default());
        let (client, call) = {
            let (call, client) = accept(&plugins, b'E');
            (client, call)
        };
        assert_eq!(plugins.generations()[0].exchanges, 1);
        drop((call, client));
        assert_eq!(plugins.generations()[0].exchanges, 0);
        assert_eq!(metrics.value("probe", "futures"), 0.0);
    });
}

#[test]
fn a_refused_open_reaches_the_plugin() {
    on_shard(async {
        let (plugins, _) = loaded(Limits::default());
        for first in *b"EH" {
            let (call, _client) = accept(&plugins, first);
            assert_eq!(call.await, CallEnd { code: failure::NO_ROUTE, panicked: false });
        }
    });
}

#[test]
fn a_panic_in_one_exchange_leaves_the_others() {
    on_shard(async {
        let (plugins, metrics) = loaded(Limits::default());
        let (mut client, accepting, delivering) = echo(&plugins);
        let (accepting, delivering) = (tokio::spawn(accepting), tokio::spawn(delivering));
        client.write_all(b"E").await.unwrap();
        echoes(&mut client, b"before").await;

        let (call, mut panicked) = accept(&plugins, b'P');
        assert_eq!(call.await, CallEnd { code: failure::PLUGIN_FAILED, panicked: true });
        assert_eq!(panicked.read(&mut [0; 8]).await.unwrap(), 0);
        assert_eq!(plugins.generations()[0].panics, 1);

        echoes(&mut client, b"after").await;
        client.shutdown().await.unwrap();
        assert_eq!((accepting.await.unwrap(), delivering.await.unwrap()), (ENDED, ENDED));
        assert_eq!(metrics.value("probe", "futures"), 0.0);
    });
}

#[test]
fn too_many_panics_put_a_generation_in_quarantine() {
    on_shard(async {
        let limits = Limits { panics_max: 3, ..Limits::default() };
        let (plugins, _) = loaded(limits);
        for panics in 0..3 {
            assert!(!plugins.find("PROBE").unwrap().quarantined(), "after {panics}");
            accept(&plugins, b'P').0.await;
        }
        let protocol = plugins.find("PROBE").unwrap();
        assert!(protocol.quarantined() && plugins.generations()[0].quarantined);
        // The same library and configuration stay in quarantine, another configuration is new.
        plugins.apply(&[probe("first")], DRAIN).unwrap();
        assert!(plugins.find("PROBE").unwrap().quarantined());
        plugins.apply(&[probe("second")], DRAIN).unwrap();
        assert!(!plugins.find("PROBE").unwrap().quarantined());
    });
}

#[test]
fn a_new_configuration_lets_running_exchanges_end_on_the_old_generation() {
    on_shard(async {
        let (plugins, metrics) = loaded(Limits::default());
        let (mut client, accepting, delivering) = echo(&plugins);
        let (accepting, delivering) = (tokio::spawn(accepting), tokio::spawn(delivering));
        client.write_all(b"E").await.unwrap();
        echoes(&mut client, b"before").await;

        let applied = plugins.apply(&[probe("second")], DRAIN).unwrap();
        assert_eq!((applied.loaded.len(), applied.drained.len(), plugins.libraries()), (1, 1, 1));
        assert_eq!(state(&plugins), [GenerationState::Draining, GenerationState::Current]);
        assert_eq!(
            (metrics.value("probe", "drains"), metrics.value("probe", "instances")),
            (1.0, 2.0)
        );

        echoes(&mut client, b"while draining").await;
        let (mut other, other_accepting, other_delivering) = echo(&plugins);
        tokio::spawn(other_accepting);
        tokio::spawn(other_delivering);
        other.write_all(b"E").await.unwrap();
        echoes(&mut other, b"on the new one").await;
        assert_eq!(
            plugins.generations().iter().map(|generation| generation.exchanges).collect::<Vec<_>>(),
            [2, 2]
        );

        client.shutdown().await.unwrap();
        assert_eq!((accepting.await.unwrap(), delivering.await.unwrap()), (ENDED, ENDED));
        assert_eq!(state(&plugins), [GenerationState::Retired, GenerationState::Current]);
        assert_eq!(metrics.value("probe", "instances"), 1.0);
        // The second generation registers the same metrics and gets the same ids.
        assert_eq!(metrics.registered(), 4);
    });
}

#[test]
fn an_unchanged_plugin_is_not_touched() {
    on_shard(async {
        let (plugins, metrics) = loaded(Limits::default());
        let applied = plugins.apply(&[probe("first")], DRAIN).unwrap();
        assert_eq!((applied.kept.len(), applied.loaded.len(), applied.drained.len()), (1, 0, 0));
        assert_eq!(
            (metrics.value("probe", "drains"), metrics.value("probe", "instances")),
            (0.0, 1.0)
        );
        let applied = plugins.apply(&[], DRAIN).unwrap();
        assert_eq!(applied.drained, ["probe"]);
        assert!(plugins.find("PROBE").is_none());
        assert_eq!(metrics.value("probe", "instances"), 0.0);
    });
}

#[test]
fn tasks_end_before_their_generation_is_destroyed() {
    on_shard(async {
        let (plugins, metrics) = loaded(Limits::default());
        let (call, mut client) = accept(&plugins, b'S');
        assert_eq!(call.await, ENDED);
        assert_eq!(client.read_u8().await.unwrap(), b'+');
        assert_eq!(plugins.find("PROBE").unwrap().generation.tasks(), 1);
        assert_eq!(metrics.value("probe", "futures"), 1.0);

        plugins.apply(&[probe("second")], DRAIN).unwrap();
        // Aborted, and gone once the runtime has looked at it.
        while metrics.value("probe", "instances") > 1.0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(metrics.value("probe", "futures"), 0.0);
        assert_eq!(state(&plugins), [GenerationState::Retired, GenerationState::Current]);
    });
}

#[test]
fn spawning_outside_a_data_path_thread_is_refused() {
    // No shard has been entered on this thread.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (plugins, metrics) = loaded(Limits::default());
        let (call, mut client) = accept(&plugins, b'S');
        assert_eq!(call.await, ENDED);
        assert_eq!(client.read_u8().await.unwrap(), b'-');
        assert_eq!(metrics.value("probe", "futures"), 0.0);
    });
}

#[test]
fn exchanges_that_outlast_the_drain_deadline_are_ended() {
    on_shard(async {
        let (plugins, metrics) = loaded(Limits::default());
        let (call, _client) = accept(&plugins, b'W');
        let (spawning, _other) = accept(&plugins, b'S');
        assert_eq!(spawning.await, ENDED);
        let waiting = tokio::spawn(call);
        while metrics.value("probe", "futures") < 2.0 {
            tokio::task::yield_now().await;
        }
        plugins.end_drained(Duration::ZERO);
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished(), "a current generation is not ended");

        plugins.apply(&[probe("second")], DRAIN).unwrap();
        plugins.end_drained(Duration::from_secs(3600));
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished(), "its deadline has not passed");
        plugins.end_drained(Duration::ZERO);
        assert_eq!(waiting.await.unwrap(), CallEnd { code: failure::DRAINING, panicked: false });
        while metrics.value("probe", "instances") > 1.0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(metrics.value("probe", "futures"), 0.0);
    });
}

#[test]
fn running_exchanges_take_leave_when_their_generation_drains_or_the_process_ends() {
    on_shard(async {
        for ends_by_swap in [true, false] {
            let (plugins, _metrics) = loaded(Limits::default());
            let (call, _client) = accept(&plugins, b'L');
            let waiting = tokio::spawn(call);
            tokio::task::yield_now().await;
            assert!(!waiting.is_finished());
            if ends_by_swap {
                plugins.apply(&[probe("second")], DRAIN).unwrap();
            } else {
                plugins.take_leave(std::time::Instant::now() + DRAIN);
            }
            assert_eq!(waiting.await.unwrap(), ENDED, "by swap: {ends_by_swap}");
        }
    });
}

#[test]
fn a_call_that_has_moved_to_another_task_takes_leave_too() {
    on_shard(async {
        let (plugins, _metrics) = loaded(Limits::default());
        // What an earlier waker stood in may be used again by the next: more than one shows it.
        let mut moved = Vec::new();
        for _ in 0..16 {
            let (mut call, client) = accept(&plugins, b'L');
            let first = tokio::spawn(async move {
                let polled = poll_fn(|cx| Poll::Ready(Pin::new(&mut call).poll(cx))).await;
                polled.is_pending().then_some(call)
            });
            let call = first.await.unwrap().expect("it waits");
            moved.push((tokio::spawn(call), client));
            tokio::task::yield_now().await;
        }
        plugins.take_leave(std::time::Instant::now() + DRAIN);
        for (call, _client) in moved {
            let ended = tokio::time::timeout(Duration::from_secs(10), call).await;
            assert_eq!(ended.expect("it was woken").unwrap(), ENDED);
        }
    });
}

#[test]
fn a_plugin_knows_the_number_of_threads_when_it_is_made() {
    let metrics = Metrics::default();
    // On a thread that is none of them, as plugins are loaded.
    let plugins = Plugins::new(metrics.host().with_shards(3), Limits::default());
    plugins.apply(&[probe("first")], DRAIN).unwrap();
    assert_eq!(metrics.value("probe", "shards"), 3.0);
}

#[test]
fn timers_and_blocking_work_are_lent() {
    on_shard(async {
        let (plugins, _) = loaded(Limits::default());
        for (first, answer) in [(b'T', b"fired".as_slice()), (b'B', b"blocked")] {
            let (call, mut client) = accept(&plugins, first);
            assert_eq!(call.await, ENDED);
            let mut read = Vec::new();
            client.read_to_end(&mut read).await.unwrap();
            assert_eq!(read, answer);
        }
    });
}

#[test]
fn connections_are_lent_and_joined_half_by_half() {
    on_shard(async {
        let (plugins, _) = loaded(Limits::default());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (call, mut client) = accept(&plugins, b'C');
        let call = tokio::spawn(call);
        client.write_u8(u8::try_from(address.len()).unwrap()).await.unwrap();
        client.write_all(address.as_bytes()).await.unwrap();
        let (mut service, _) = listener.accept().await.unwrap();

        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut question = String::new();
        service.read_to_string(&mut question).await.unwrap();
        assert_eq!(question, "question");
        // The client's direction has ended; the service's goes on.
        service.write_all(b"answer").await.unwrap();
        drop(service);
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert_eq!((answer.as_str(), call.await.unwrap()), ("answer", ENDED));
    });
}

#[test]
fn a_failed_connection_says_what_failed() {
    on_shard(async {
        let (plugins, _) = loaded(Limits::default());
        for address in ["unix:/nowhere/at/all", "127.0.0.1:notaport"] {
            let (call, mut client) = accept(&plugins, b'C');
            let call = tokio::spawn(call);
            client.write_u8(u8::try_from(address.len()).unwrap()).await.unwrap();
            client.write_all(address.as_bytes()).await.unwrap();
            let end = CallEnd { code: failure::SERVICE_UNREACHABLE, panicked: false };
            assert_eq!(call.await.unwrap(), end, "{address}");
        }
    });
}

#[test]
fn a_thousand_exchanges_leave_nothing() {
    on_shard(async {
        let (plugins, metrics) = loaded(Limits { panics_max: 10_000, ..Limits::default() });
        for round in 0..1000 {
            let (mut client, accepting, delivering) = echo(&plugins);
            let (accepting, delivering) = (tokio::spawn(accepting), tokio::spawn(delivering));
            client.write_all(b"E").await.unwrap();
            echoes(&mut client, &[0x5a; 5000][..1 + round % 5000]).await;
            match round % 4 {
                0 => client.shutdown().await.unwrap(),
                1 => drop(client),
                2 => accepting.abort(),
                _ => delivering.abort(),
            }
            let _ends = (accepting.await, delivering.await);
            if round % 10 == 0 {
                accept(&plugins, b'P').0.await;
            }
        }
        assert_eq!(metrics.value("probe", "futures"), 0.0);
        assert_eq!(plugins.generations()[0].exchanges, 0);
        assert_eq!(plugins.generations()[0].panics, 100);
        plugins.apply(&[], DRAIN).unwrap();
        assert_eq!(metrics.value("probe", "instances"), 0.0);
    });
}

#[test]
fn a_plugin_without_a_future_fails_its_exchange() {
    on_shard(async {
        let plugins = Plugins::new(Metrics::default().host(), Limits::default());
        plugins.apply(&[spec("bare", &c_plugin("no-future.so", &[]))], DRAIN).unwrap();
        let protocol = plugins.find("BARE").unwrap();
        let (client, _theirs) = tokio::io::duplex(16);
        let call = protocol.accept_stream(lent::meta(), client, Opener { end: None });
        assert_eq!(call.await, CallEnd { code: failure::PLUGIN_FAILED, panicked: false });
        let head = head("/", None);
        let call = protocol.refuse_http(head, Responder::default(), no_route());
        assert_eq!(call.await, CallEnd { code: failure::UNSUPPORTED, panicked: false });
    });
}

#[test]
fn sniffing_tells_yes_no_and_need_more() {
    let (plugins, _) = loaded(Limits::default());
    let all: [&str; 0] = [];
    assert!(matches!(plugins.sniff(b"PRO", &all), SniffResult::NeedMore));
    assert!(matches!(plugins.sniff(b"GET / HTTP/1.1", &all), SniffResult::No));
    let SniffResult::Yes { protocol, host, rivals } = plugins.sniff(b"PROBE api.example\nx", &all)
    else {
        panic!("not recognised")
    };
    assert_eq!((&**protocol.name(), host.as_deref()), ("PROBE", Some("api.example")));
    assert_eq!(protocol.born(), Born::Bytes);
    assert_eq!(rivals, ["PROBE2".into()]);
    let SniffResult::Yes { protocol, host, rivals } = plugins.sniff(b"PROBE \xff\n", &["PROBE2"])
    else {
        panic!("not recognised")
    };
    assert!(rivals.is_empty());
    assert_eq!((&**protocol.name(), host), ("PROBE2", None));
    assert!(matches!(plugins.sniff(b"PROBE x\n", &["OTHER"]), SniffResult::No));
}

#[test]
fn route_options_are_checked_by_the_plugin() {
    let (plugins, _) = loaded(Limits::default());
    plugins.validate_route("PROBE", "{}").unwrap();
    let fault = plugins.validate_route("PROBE", r#"{"depth": 3}"#).unwrap_err();
    assert_eq!(fault.to_string(), "depth: 3 is too deep");
    let fault = plugins.validate_route("HTTP", "{}").unwrap_err();
    assert_eq!(fault.to_string(), "no plugin serves HTTP (served: PROBE, PROBE2)");
}

fn head(target: &'static str, probe: Option<&'static str>) -> PreparedHead {
    head_that(target, probe, false)
}

fn head_that(target: &'static str, probe: Option<&'static str>, can_upgrade: bool) -> PreparedHead {
    let mut headers = HeaderMap::new();
    headers.append("x-twice", HeaderValue::from_static("one"));
    headers.append("x-twice", HeaderValue::from_bytes(b"\xfftwo").unwrap());
    if let Some(probe) = probe {
        headers.append("x-probe", HeaderValue::from_static(probe));
    }
    PreparedHead::new(Box::new(lend::RequestHead {
        method: Method::POST,
        scheme: Arc::from("http"),
        authority: Bytes::from_static(b"api.example:9080"),
        target: Bytes::from_static(target.as_bytes()),
        protocol: None,
        version: Version::HTTP_11,
        headers,
        end: false,
        expect_continue: false,
        can_upgrade,
    }))
}

fn no_route() -> lend::Failure {
    let detail = "no route for api.example".to_owned();
    lend::Failure { code: failure::NO_ROUTE, retry_after_s: None, detail }
}

fn http_plugins() -> Plugins {
    let plugins = Plugins::new(Metrics::default().host(), Limits::default());
    plugins.apply(&[spec("http", probe_http()), spec("bytes", probe_bytes())], DRAIN).unwrap();
    plugins
}

async fn request(plugins: &Plugins, target: &'static str) -> (CallEnd, lent::Response) {
    ask(plugins, head(target, Some("yes"))).await
}

async fn ask(plugins: &Plugins, head: PreparedHead) -> (CallEnd, lent::Response) {
    let protocol = plugins.claim(&head).unwrap();
    let mut trailers = HeaderMap::new();
    trailers.append("x-sum", HeaderValue::from_static("42"));
    let data = |bytes: Bytes| lend::BodyFrame::Data { bytes, end: false };
    let body = Body(
        [
            data(Bytes::from_static(b"small")),
            data(Bytes::from(vec![7; 20_000])),
            lend::BodyFrame::Trailers(trailers),
        ]
        .into(),
    );
    let responder = Responder::default();
    let opener = Opener { end: None };
    let call = protocol.accept_http(head, lent::meta(), body, responder.clone(), opener);
    let end = call.await;
    let response = std::mem::take(&mut *responder.0.lock().unwrap());
    (end, response)
}

#[test]
fn a_request_and_its_response_cross_whole() {
    on_shard(async {
        let plugins = http_plugins();
        for can_upgrade in [false, true] {
            let head = head_that("/echo", Some("yes"), can_upgrade);
            let (end, response) = ask(&plugins, head).await;
            assert_eq!(end, ENDED);
            let (status, headers) = response.head.unwrap();
            assert_eq!((status, response.informational[0].0.as_u16()), (StatusCode::OK, 103));
            let twice: Vec<&[u8]> =
                headers.get_all("x-twice").iter().map(HeaderValue::as_bytes).collect();
            assert_eq!(twice, [b"one".as_slice(), b"\xfftwo"]);
            assert_eq!(response.body.iter().map(Bytes::len).collect::<Vec<_>>(), [5, 20_000]);
            assert_eq!(response.trailers.unwrap()["x-sum"], "42");
            assert!(response.ended && response.aborted.is_none());
        }
    });
}

#[test]
fn what_http_does_not_allow_aborts_the_exchange() {
    on_shard(async {
        let plugins = http_plugins();
        for target in ["/bad-name", "/bad-value", "/many", "/status"] {
            let (_, response) = request(&plugins, target).await;
            assert!(response.head.is_none(), "{target}");
            let reset = lend::Reset::new(failure::PLUGIN_FAILED);
            assert_eq!(response.aborted, Some(reset), "{target}");
        }
        let (end, _) = request(&plugins, "/panic").await;
        assert_eq!(end, CallEnd { code: failure::PLUGIN_FAILED, panicked: true });
    });
}

#[test]
fn the_highest_claim_wins_and_a_panicking_one_loses() {
    let plugins = http_plugins();
    let claimed = |probe| plugins.claim(&head("/", probe)).map(|p| p.name().to_string());
    assert_eq!(claimed(Some("yes")).as_deref(), Some("PROBEHTTP"));
    assert_eq!(claimed(Some("maybe")).as_deref(), Some("PROBEHTTP"));
    assert_eq!(claimed(None), None);
    assert_eq!(claimed(Some("panic")), None);
}

#[test]
fn a_failure_is_said_in_the_plugins_words() {
    on_shard(async {
        let plugins = http_plugins();
        let protocol = plugins.find("PROBEHTTP").unwrap();
        assert_eq!((protocol.born(), &**protocol.plugin_name()), (Born::Http, "http"));
        let responder = Responder::default();
        let call = protocol.refuse_http(head("/", None), responder.clone(), no_route());
        assert_eq!(call.await, ENDED);
        let response = responder.0.lock().unwrap();
        let (status, headers) = response.head.as_ref().unwrap();
        assert_eq!(
            (status.as_u16(), &headers["x-sidelane-error"]),
            (404, &"no-route".parse().unwrap())
        );
        assert_eq!(response.body[0], "no-route: no route for api.example\n");
    });
}

/// Core keeps calls in its own futures and spawns them: compiles while they are `Send` and `Unpin`.
const _: fn() = || {
    fn is_send_and_unpin<T: Send + Unpin>() {}
    is_send_and_unpin::<Call>();
};

#[test]
fn a_call_may_move_between_tasks() {
    /// Counts its wakes.
    #[derive(Default)]
    struct Told(Mutex<usize>);
    impl Wake for Told {
        fn wake(self: Arc<Self>) {
            *self.0.lock().unwrap() += 1;
        }
    }
    on_shard(async {
        let (plugins, _) = loaded(Limits::default());
        let (client, theirs) = tokio::io::duplex(16);
        let mut call = begin(&plugins, theirs, Opener { end: None });
        let tasks: [Arc<Told>; 2] = Default::default();
        for task in &tasks {
            let waker = Waker::from(Arc::clone(task));
            let polled = Pin::new(&mut call).poll(&mut Context::from_waker(&waker));
            assert!(polled.is_pending());
        }
        // The client goes: the task that polled last is told, and only that.
        drop(client);
        assert_eq!((*tasks[0].0.lock().unwrap(), *tasks[1].0.lock().unwrap()), (0, 1));
        assert_ne!(call.await.code, failure::NONE);
        drop(tasks);
    });
}

#[test]
fn apply_from_another_thread_swaps_under_running_exchanges() {
    on_shard(async {
        let (plugins, metrics) = loaded(Limits::default());
        let plugins = Arc::new(plugins);
        let stop = Arc::new(Once::new());
        let swapper = std::thread::spawn({
            let (plugins, stop) = (Arc::clone(&plugins), Arc::clone(&stop));
            move || {
                let mut swaps = 0_usize;
                while !stop.is_completed() || swaps < 4 {
                    swaps += 1;
                    plugins.apply(&[probe(&format!("label {swaps}"))], DRAIN).unwrap();
                }
            }
        });
        for _ in 0..50 {
            let (mut client, accepting, delivering) = echo(&plugins);
            let (accepting, delivering) = (tokio::spawn(accepting), tokio::spawn(delivering));
            client.write_all(b"E").await.unwrap();
            echoes(&mut client, b"while swapping").await;
            client.shutdown().await.unwrap();
            assert_eq!((accepting.await.unwrap(), delivering.await.unwrap()), (ENDED, ENDED));
        }
        stop.call_once(|| ());
        swapper.join().unwrap();
        assert_eq!(metrics.value("probe", "futures"), 0.0);
        assert_eq!(metrics.value("probe", "instances"), 1.0);
        assert_eq!(plugins.libraries(), 1);
    });
}
