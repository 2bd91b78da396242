//! The SDK's optional parts: hyper on the host's streams, timers and threads, and `tracing`.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use http_body_util::{BodyExt as _, Empty};
use hyper::rt::{Executor as _, Timer as _};
use serde_json::json;
use sidelane_abi::level;
use sidelane_plugin::{
    Buf, ConfigError, Error, Exchange, FIELD_CUSTOM, Host, HyperExecutor, HyperTimer, Message,
    Protocol, Service, failure,
};
use sidelane_testkit::{Kit, Outcome, TestMeta, TestService};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// Counts this thread's allocations.
struct Counting;

#[allow(unsafe_code, reason = "an allocator's trait is unsafe")]
// SAFETY: hands everything to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's contract is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract is the same.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Asks the service for `/` by hyper's client and sends the body to the peer.
struct Fetch;

impl Protocol for Fetch {
    type Config = ();
    const TYPES: &'static [&'static str] = &["FETCH"];

    fn new((): (), _: &Host) -> Result<Self, ConfigError> {
        tracing::info!(target: "fetch", size = 3, "made {}", "here");
        Ok(Self)
    }

    async fn deliver(&self, mut exchange: Exchange<'_>, service: Service) -> Result<(), Error> {
        let host = Host::current();
        let failed = |error: hyper::Error| Error::new(failure::SERVICE_RESET, error.to_string());
        let stream = service.connect().await?;
        let (mut client, connection) =
            hyper::client::conn::http1::handshake(stream).await.map_err(failed)?;
        HyperExecutor::new(host).execute(connection);
        let request = hyper::Request::get("/").header("host", "test").body(Empty::<&[u8]>::new());
        exchange.send.dispatched();
        let response = client.send_request(request.expect("a request")).await.map_err(failed)?;
        let body = response.into_body().collect().await.map_err(failed)?.to_bytes();
        let timer = HyperTimer::new(host);
        let before = timer.now();
        timer.sleep_until(before + Duration::from_secs(7)).await;
        tracing::debug!(target: "fetch", slept = ?(timer.now() - before));
        exchange
            .send
            .send(Message { field: FIELD_CUSTOM, end: true, head: Buf::new(), body: body.into() })
            .await?;
        exchange.recv.recv().await.transpose()?;
        Ok(())
    }
}

#[test]
fn hyper_and_tracing_run_on_the_host() {
    let kit = Kit::new::<Fetch>(&json!(null)).expect("accepts an absent block");
    let service = TestService::default();
    let call = kit.deliver(&TestMeta::default(), &service);
    kit.block_on(async {
        let mut stream = service.accept().await;
        let head = stream.read_until(b"\r\n\r\n").await;
        assert!(head.starts_with(b"GET / HTTP/1.1\r\n"), "{}", head.escape_ascii());
        stream.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello").await;
        assert_eq!(call.peer.payload_to_end().await, b"hello");
        call.peer.finish();
        assert_eq!(call.running.outcome().await, Outcome::Ended(failure::NONE));
    });
    let logs = kit.logs();
    let line = |level| logs.iter().find(|line| line.target == "fetch" && line.level == level);
    assert_eq!(line(level::INFO).map(|line| line.text.as_str()), Some("made here size=3"));
    assert_eq!(line(level::DEBUG).map(|line| line.text.as_str()), Some(" slept=7s"));
}

/// Counts what polls that find nothing allocate, on both sides of the boundary.
struct Frugal;

impl Protocol for Frugal {
    type Config = ();
    const TYPES: &'static [&'static str] = &["FRUGAL"];

    fn new((): (), _: &Host) -> Result<Self, ConfigError> {
        Ok(Self)
    }

    async fn deliver(&self, mut exchange: Exchange<'_>, service: Service) -> Result<(), Error> {
        let mut stream = service.connect().await?;
        let mut round = 0;
        let mut before = 0;
        let polls = poll_fn(|cx| {
            let mut room = [0; 64];
            let mut buf = tokio::io::ReadBuf::new(&mut room);
            let idle = exchange.recv.poll_recv(cx).is_pending()
                && exchange.send.poll_closed(cx).is_pending()
                && tokio::io::AsyncRead::poll_read(Pin::new(&mut stream), cx, &mut buf)
                    .is_pending();
            assert!(idle, "nothing comes");
            round += 1;
            if round == 2 {
                before = ALLOCATIONS.get();
            }
            if round < 100 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Poll::Ready(ALLOCATIONS.get() - before)
        })
        .await;
        let text = format!("{polls}");
        exchange
            .send
            .send(Message { field: FIELD_CUSTOM, end: true, head: Buf::new(), body: text.into() })
            .await?;
        drop(exchange.recv);
        Ok(())
    }
}

#[test]
fn idle_polls_allocate_nothing() {
    let kit = Kit::new::<Frugal>(&json!(null)).expect("accepts an absent block");
    let call = kit.deliver(&TestMeta::default(), &TestService::default());
    let payload = kit.block_on(call.peer.payload_to_end());
    let allocations: u64 = String::from_utf8_lossy(&payload).parse().expect("a number");
    assert_eq!(allocations, 0, "in 98 polls of the whole handler");
}
