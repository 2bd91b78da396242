use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;
use crate::tunnel::carrier::tests::{plain, sockets};

/// What a dialler makes of a server's answer.
async fn told<F>(serve: impl FnOnce(h2::server::SendResponse<Bytes>, RecvStream) -> F) -> String
where
    F: Future<Output = ()> + Send + 'static,
{
    let (dialled, accepted) = sockets().await;
    let served = async move {
        let mut connection = h2::server::handshake(accepted).await.expect("HTTP/2");
        let (request, respond) = connection.accept().await.expect("a stream").expect("HTTP/2");
        let task = tokio::spawn(serve(respond, request.into_body()));
        while connection.accept().await.is_some() {}
        task.await.expect("no panic");
    };
    let dial = async {
        let stream = GrpcStream::dial(plain(dialled), "relay.test", false).await.expect("HTTP/2");
        let mut stream = Transport::grpc(stream, false, Vec::new());
        // Before it is answered, as a hello is.
        let _ = stream.write_all(b"hello").await;
        let mut all = Vec::new();
        match stream.read_to_end(&mut all).await {
            Ok(_) => String::from_utf8_lossy(&all).into_owned(),
            Err(error) => error.to_string(),
        }
    };
    let (told, ()) = tokio::join!(dial, served);
    told
}

fn head(status: u16, fields: &[(&'static str, &'static str)]) -> Response<()> {
    let mut response = Response::builder().status(status);
    for (name, value) in fields {
        response = response.header(*name, *value);
    }
    response.body(()).expect("a response")
}

const GRPC: (&str, &str) = ("content-type", "application/grpc+proto");

#[tokio::test]
async fn each_answer_that_is_no_tunnels_says_what_it_is() {
    let text = told(async |mut respond: h2::server::SendResponse<Bytes>, _| {
        let mut send = respond.send_response(head(502, &[("retry-after", "3")]), false).unwrap();
        send.send_data("no upstream\n".into(), true).unwrap();
    });
    assert_eq!(text.await, "it answers HTTP 502: no upstream");
    let text = told(async |mut respond: h2::server::SendResponse<Bytes>, _| {
        respond.send_response(head(200, &[("content-type", "text/html")]), true).unwrap();
    });
    assert_eq!(text.await, "it answers HTTP 200");
    let text = told(async |mut respond: h2::server::SendResponse<Bytes>, _| {
        let fields = [GRPC, ("grpc-status", "12"), ("grpc-message", "no such method")];
        respond.send_response(head(200, &fields), true).unwrap();
    });
    assert_eq!(text.await, "the gRPC stream ended with status 12: no such method");
    let text = told(async |mut respond: h2::server::SendResponse<Bytes>, _| {
        let mut send = respond.send_response(head(200, &[GRPC]), false).unwrap();
        send.send_trailers(trailers(14)).unwrap();
    });
    assert_eq!(text.await, "the gRPC stream ended with status 14");
    let text = told(async |mut respond: h2::server::SendResponse<Bytes>, _| {
        let mut send = respond.send_response(head(200, &[GRPC]), false).unwrap();
        send.send_data(Bytes::from_static(&[1, 0, 0, 0, 0]), false).unwrap();
        // Until the dialler has gone.
        let _ = poll_fn(|cx| send.poll_reset(cx)).await;
    });
    assert!(text.await.starts_with("a compressed message"));
}

#[tokio::test]
async fn a_stream_that_ends_well_is_an_end() {
    let text = told(async |mut respond: h2::server::SendResponse<Bytes>, mut body: RecvStream| {
        // A server may look at the first message before it answers.
        assert!(body.data().await.is_some());
        let mut send = respond.send_response(head(200, &[GRPC]), false).unwrap();
        for piece in [&b"\0\0\0\0\x05\x0a\x03a"[..], b"b", b"c\0\0\0\0\0\0", b"\0\0\0\x03\x0a\x01d"]
        {
            send.send_data(Bytes::from_static(piece), false).unwrap();
        }
        send.send_trailers(trailers(0)).unwrap();
    });
    assert_eq!(text.await, "abcd");
}

#[tokio::test]
async fn one_who_speaks_no_http2_is_told_as_such() {
    let (dialled, mut accepted) = sockets().await;
    let serve = async {
        accepted.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.expect("written");
        let mut space = [0; 1024];
        while accepted.read(&mut space).await.is_ok_and(|read| read > 0) {}
    };
    let dial = async {
        let stream = GrpcStream::dial(plain(dialled), "relay.test", false).await.expect("sent");
        let mut stream = Transport::grpc(stream, false, Vec::new());
        stream.read(&mut [0; 1]).await.expect_err("no HTTP/2").to_string()
    };
    let (error, ()) = tokio::join!(dial, serve);
    assert!(!error.is_empty(), "{error}");
}
