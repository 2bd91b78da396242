//! The WebSocket plugin on a fake host: the test plays client, peer and service.

mod ends;
mod frames;
mod handshake;
mod library;
mod limits;
mod path;
mod policy;
mod raw;
mod wire;

use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha1::{Digest, Sha1};
use sidelane_testkit::{AcceptHttp, Deliver, Kit, TestMeta, TestRequest, TestService, TestStream};
use sidelane_websocket::WebSocket;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

pub(crate) const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
pub(crate) const ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

pub(crate) fn kit() -> Kit {
    kit_with(&serde_json::json!({}))
}

pub(crate) fn kit_with(config: &serde_json::Value) -> Kit {
    Kit::new::<WebSocket>(config).expect("a valid configuration")
}

pub(crate) fn meta() -> TestMeta {
    TestMeta { scheme: "http".to_owned(), ..TestMeta::default() }
}

/// A client's handshake.
pub(crate) fn upgrade(target: &str) -> TestRequest {
    let mut request = TestRequest::new("GET", target)
        .header("connection", "keep-alive, Upgrade")
        .header("upgrade", "WebSocket")
        .header("sec-websocket-version", "13")
        .header("sec-websocket-key", KEY);
    request.can_upgrade = true;
    request
}

/// The same over HTTP/2.
pub(crate) fn connect(target: &str) -> TestRequest {
    let mut request = TestRequest::new("CONNECT", target)
        .version(20)
        .with_body(None)
        .header("sec-websocket-version", "13");
    "websocket".clone_into(&mut request.protocol);
    request.can_upgrade = true;
    request
}

/// Reads a head, to the empty line.
pub(crate) async fn read_head(stream: &mut TestStream) -> String {
    String::from_utf8_lossy(&stream.read_until(b"\r\n\r\n").await).into_owned()
}

/// The values of a field in a head, in order.
pub(crate) fn values<'a>(head: &'a str, name: &str) -> Vec<&'a str> {
    head.lines()
        .filter_map(|line| line.split_once(": "))
        .filter(|(candidate, _)| *candidate == name)
        .map(|(_, value)| value)
        .collect()
}

/// The service's 101 to a handshake, with further lines of head.
pub(crate) fn switching(head: &str, more: &str) -> Vec<u8> {
    let key = values(head, "sec-websocket-key")[0];
    let hash = Sha1::digest(format!("{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11"));
    format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Accept: {}\r\n{more}\r\n",
        STANDARD.encode(hash)
    )
    .into_bytes()
}

/// What the plugin has written and the test not read.
pub(crate) fn written(stream: &mut TestStream) -> Vec<u8> {
    let mut all = Vec::new();
    let mut cx = Context::from_waker(Waker::noop());
    loop {
        let mut room = [0; 4096];
        let mut buf = ReadBuf::new(&mut room);
        match Pin::new(&mut *stream).poll_read(&mut cx, &mut buf) {
            Poll::Ready(Ok(())) if !buf.filled().is_empty() => all.extend_from_slice(buf.filled()),
            _ => return all,
        }
    }
}

/// Writes what there is room for; how much that was.
pub(crate) fn write_some(stream: &mut TestStream, bytes: &[u8]) -> usize {
    let mut cx = Context::from_waker(Waker::noop());
    match Pin::new(stream).poll_write(&mut cx, bytes) {
        Poll::Ready(Ok(count)) => count,
        _ => 0,
    }
}

/// Both ends with the test as the tunnel between them, after the handshake.
pub(crate) struct Path {
    pub(crate) accepted: AcceptHttp,
    pub(crate) delivered: Deliver,
    pub(crate) client: TestStream,
    pub(crate) service: TestStream,
}

impl Path {
    /// `extensions`: what the service negotiates; empty: none.
    pub(crate) fn open(kit: &Kit, options: &str, extensions: &str) -> Self {
        let mut request = upgrade("/chat");
        options.clone_into(&mut request.meta.options);
        let meta = TestMeta { options: options.to_owned(), ..meta() };
        let test_service = TestService::default();
        let accepted = kit.accept_http(&request);
        let client = accepted.response.upgraded();
        let delivered = kit.deliver(&meta, &test_service);
        kit.block_on(async {
            settle(kit, &accepted, &delivered).await;
            let mut service = test_service.accept().await;
            let head = read_head(&mut service).await;
            let more = match extensions {
                "" => String::new(),
                list => format!("Sec-WebSocket-Extensions: {list}\r\n"),
            };
            service.write(&switching(&head, &more)).await;
            settle(kit, &accepted, &delivered).await;
            assert_eq!(accepted.response.head().await.expect("a head").status, 101);
            Self { accepted, delivered, client, service }
        })
    }

    /// Carries until nothing waits at either end.
    pub(crate) async fn settle(&self, kit: &Kit) {
        settle(kit, &self.accepted, &self.delivered).await;
    }
}

/// Carries what waits at both ends; true: something did.
async fn carry(accepted: &AcceptHttp, delivered: &Deliver) -> bool {
    let mut moved = false;
    for (from, to) in [(&accepted.peer, &delivered.peer), (&delivered.peer, &accepted.peer)] {
        while from.waiting() > 0 {
            let message = from.message().await;
            to.send(message.field, message.payload, message.end);
            moved = true;
        }
        if from.has_finished() && to.was_reset().is_none() {
            to.finish();
        }
    }
    moved
}

pub(crate) async fn settle(kit: &Kit, accepted: &AcceptHttp, delivered: &Deliver) {
    loop {
        kit.run_until_idle();
        if carry(accepted, delivered).await {
            continue;
        }
        let mut told = false;
        for (from, to) in [(&accepted.peer, &delivered.peer), (&delivered.peer, &accepted.peer)] {
            if let (Some(reset), None) = (from.was_reset(), to.was_reset()) {
                to.reset(reset);
                told = to.was_reset().is_some();
            }
        }
        kit.run_until_idle();
        if !told {
            return;
        }
    }
}
