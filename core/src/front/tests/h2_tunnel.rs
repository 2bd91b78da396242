//! Extended CONNECT (RFC 8441): a request that becomes a byte stream.

use ::h2::client::{ResponseFuture, SendRequest};
use ::h2::ext::Protocol;
use ::h2::{Reason, RecvStream, SendStream};
use http::{Method, Request};

use super::*;

async fn client(script: &Arc<Script>) -> SendRequest<Bytes> {
    let Client { stream, .. } = connect(script);
    let (requests, mut connection) = ::h2::client::handshake(stream).await.unwrap();
    // The server's settings come before anything else of it.
    poll_fn(|cx| {
        let _ = Pin::new(&mut connection).poll(cx);
        Poll::Ready(())
    })
    .await;
    tokio::spawn(connection);
    let requests = requests.ready().await.unwrap();
    while !requests.is_extended_connect_protocol_enabled() {
        tokio::task::yield_now().await;
    }
    requests
}

fn connect_request(protocol: &'static str) -> Request<()> {
    let mut request = Request::builder()
        .method(Method::CONNECT)
        .uri("http://a.test/chat?x")
        .header("content-length", "7")
        .body(())
        .unwrap();
    request.extensions_mut().insert(Protocol::from_static(protocol));
    request
}

fn ask(requests: &mut SendRequest<Bytes>) -> (ResponseFuture, SendStream<Bytes>) {
    let mut request = connect_request("websocket");
    request.headers_mut().remove("content-length");
    requests.send_request(request, false).unwrap()
}

async fn next(recv: &mut RecvStream) -> Option<Result<Bytes, ::h2::Error>> {
    let chunk = recv.data().await;
    if let Some(Ok(bytes)) = &chunk {
        recv.flow_control().release_capacity(bytes.len()).unwrap();
    }
    chunk
}

#[tokio::test(start_paused = true)]
async fn an_extended_connect_becomes_a_byte_stream() {
    let script = Script::new(|mut asked| async move {
        assert!(asked.head.can_upgrade && asked.head.end);
        assert_eq!(asked.head.protocol.as_deref(), Some(&b"websocket"[..]));
        assert!(matches!(asked.frame().await, BodyFrame::End));
        let head = response(200, &[("x", "y"), ("connection", "upgrade"), ("content-length", "3")]);
        asked.responder.head(head, None, false).unwrap();
        let mut stream = asked.responder.upgrade().await.unwrap();
        let mut line = Vec::new();
        stream.read_to_end(&mut line).await.unwrap();
        stream.write_all(&line).await.unwrap();
        stream.shutdown().await.unwrap();
    });
    let mut requests = client(&script).await;
    let (answer, mut send) = ask(&mut requests);
    send.send_data("ahead of the answer, ".into(), false).unwrap();
    let answer = answer.await.unwrap();
    assert_eq!((answer.status(), &answer.headers()["x"]), (StatusCode::OK, &"y".parse().unwrap()));
    for gone in ["connection", "content-length"] {
        assert!(!answer.headers().contains_key(gone), "{gone}");
    }
    send.send_data("and after it".into(), true).unwrap();
    let mut recv = answer.into_body();
    let mut all = Vec::new();
    while let Some(bytes) = next(&mut recv).await {
        all.extend_from_slice(&bytes.unwrap());
    }
    assert_eq!(all, b"ahead of the answer, and after it");
    assert_eq!(script.seen(), ["CONNECT a.test /chat?x"]);
}

#[tokio::test(start_paused = true)]
async fn a_stream_is_held_back_by_the_clients_window_and_carries_more() {
    const LENGTH: usize = 1 << 20;
    let script = Script::new(|mut asked| async move {
        asked.begin(200, &[]).unwrap();
        let mut stream = asked.responder.upgrade().await.unwrap();
        let bytes: Vec<u8> = (0..=250).cycle().take(LENGTH).collect();
        let (head, rest) = bytes.split_at(100_000);
        let parts = [io::IoSlice::new(head), io::IoSlice::new(rest)];
        let written = stream.write_vectored(&parts).await.unwrap();
        stream.write_all(&bytes[written..]).await.unwrap();
        stream.shutdown().await.unwrap();
    });
    let mut requests = client(&script).await;
    let (answer, _send) = ask(&mut requests);
    let mut recv = answer.await.unwrap().into_body();
    let mut length = 0;
    while let Some(bytes) = next(&mut recv).await {
        for byte in bytes.unwrap() {
            assert_eq!(usize::from(byte), length % 251);
            length += 1;
        }
    }
    assert_eq!(length, LENGTH);
}

#[tokio::test(start_paused = true)]
async fn the_clients_reset_is_an_error_of_the_stream() {
    let (heard, error) = Once::new();
    let script = Script::new(move |mut asked| {
        let heard = Arc::clone(&heard);
        async move {
            asked.begin(200, &[]).unwrap();
            let mut stream = asked.responder.upgrade().await.unwrap();
            heard.say(stream.read_u8().await.unwrap_err().kind());
        }
    });
    let mut requests = client(&script).await;
    let (answer, mut send) = ask(&mut requests);
    let _recv = answer.await.unwrap();
    send.send_reset(Reason::CANCEL);
    assert_eq!(error.await.unwrap(), io::ErrorKind::ConnectionReset);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_is_dropped_before_its_end_is_reset() {
    let script = Script::new(|mut asked| async move {
        asked.begin(200, &[]).unwrap();
        let mut stream = asked.responder.upgrade().await.unwrap();
        stream.write_all(b"cut").await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), b'!');
    });
    let mut requests = client(&script).await;
    let (answer, mut send) = ask(&mut requests);
    let mut recv = answer.await.unwrap().into_body();
    assert_eq!(next(&mut recv).await.unwrap().unwrap(), "cut");
    send.send_data("!".into(), false).unwrap();
    assert_eq!(next(&mut recv).await.unwrap().unwrap_err().reason(), Some(Reason::CANCEL));
}

#[tokio::test(start_paused = true)]
async fn a_stream_may_be_refused() {
    let script = Script::new(|mut asked| async move { asked.answer(403, &[], "no") });
    let mut requests = client(&script).await;
    let (answer, _send) = ask(&mut requests);
    let answer = answer.await.unwrap();
    assert_eq!(answer.status(), StatusCode::FORBIDDEN);
    assert_eq!(next(&mut answer.into_body()).await.unwrap().unwrap(), "no");
}

#[tokio::test(start_paused = true)]
async fn switching_protocols_is_not_http2s_way() {
    let script = Script::new(|mut asked| async move {
        assert_eq!(asked.begin(101, &[]), Err(Closed));
    });
    let mut requests = client(&script).await;
    let (answer, _send) = ask(&mut requests);
    assert_eq!(answer.await.unwrap().status(), StatusCode::BAD_GATEWAY);
}
