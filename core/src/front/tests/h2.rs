//! HTTP/2 by prior knowledge, through the `h2` crate's client.

use ::h2::client::{ResponseFuture, SendRequest};
use ::h2::{Reason, RecvStream, SendStream};
use http::{Method, Request, Response};

use super::*;

/// A client whose connection runs as a task.
struct H2 {
    requests: SendRequest<Bytes>,
    connection: JoinHandle<Result<(), ::h2::Error>>,
    served: JoinHandle<Result<(), ConnectionError>>,
    shutdown: Option<oneshot::Sender<()>>,
}

async fn h2(script: &Arc<Script>) -> H2 {
    h2_with(script, FrontConfig::default()).await
}

async fn h2_with(script: &Arc<Script>, config: FrontConfig) -> H2 {
    let Client { stream, served, shutdown } = connect_with(script, config);
    let (requests, connection) = ::h2::client::handshake(stream).await.unwrap();
    H2 { requests, connection: tokio::spawn(connection), served, shutdown }
}

fn get(fields: &[(&'static str, &str)]) -> Request<()> {
    let mut request = Request::get("http://a.test/x?y").body(()).unwrap();
    *request.headers_mut() = fields_of(fields);
    request
}

fn post() -> Request<()> {
    Request::post("http://a.test/").body(()).unwrap()
}

impl H2 {
    async fn send(
        &mut self,
        request: Request<()>,
        end: bool,
    ) -> (ResponseFuture, SendStream<Bytes>) {
        let mut requests = self.requests.clone().ready().await.unwrap();
        requests.send_request(request, end).unwrap()
    }

    async fn ask(&mut self, request: Request<()>) -> (Response<()>, String, Option<HeaderMap>) {
        let (answer, _) = self.send(request, true).await;
        read(answer.await.unwrap()).await.unwrap()
    }
}

async fn read(
    response: Response<RecvStream>,
) -> Result<(Response<()>, String, Option<HeaderMap>), ::h2::Error> {
    let (parts, mut body) = response.into_parts();
    let mut all = Vec::new();
    while let Some(bytes) = body.data().await {
        let bytes = bytes?;
        body.flow_control().release_capacity(bytes.len())?;
        all.extend_from_slice(&bytes);
    }
    let trailers = body.trailers().await?;
    Ok((Response::from_parts(parts, ()), String::from_utf8(all).unwrap(), trailers))
}

#[tokio::test(start_paused = true)]
async fn requests_are_answered_beside_each_other() {
    let script = Script::new(|mut asked| async move {
        let delay = String::from_utf8_lossy(asked.head.headers["delay"].as_bytes()).into_owned();
        tokio::time::sleep(Duration::from_secs(delay.parse().unwrap())).await;
        asked.answer(200, &[("connection", "x"), ("x", "y")], &delay);
    });
    let mut client = h2(&script).await;
    let (slow, _) = client.send(get(&[("delay", "9")]), true).await;
    let (head, body, trailers) = client.ask(get(&[("delay", "1")])).await;
    assert_eq!((head.status(), &*body, trailers), (StatusCode::OK, "1", None));
    assert!(!head.headers().contains_key("connection"));
    assert_eq!(head.headers()["x"], "y");
    assert!(head.headers().contains_key("date"));
    assert_eq!(read(slow.await.unwrap()).await.unwrap().1, "9");
    assert_eq!(script.seen(), ["GET a.test /x?y"; 2]);
}

#[tokio::test(start_paused = true)]
async fn interim_responses_pass() {
    let script = Script::new(|mut asked| async move {
        assert!(asked.head.expect_continue);
        let early = fields_of(&[("link", "</a>")]);
        asked.responder.informational(StatusCode::EARLY_HINTS, early).unwrap();
        asked.responder.informational(StatusCode::CONTINUE, HeaderMap::new()).unwrap();
        let (body, _) = asked.read().await;
        asked.answer(200, &[], str::from_utf8(&body).unwrap());
    });
    let mut client = h2(&script).await;
    let mut request = post();
    request.headers_mut().insert("expect", HeaderValue::from_static("100-continue"));
    let (mut answer, mut body) = client.send(request, false).await;
    let early = poll_fn(|cx| answer.poll_informational(cx)).await.unwrap().unwrap();
    assert_eq!(early.status(), StatusCode::EARLY_HINTS);
    assert_eq!(early.headers()["link"], "</a>");
    let go_on = poll_fn(|cx| answer.poll_informational(cx)).await.unwrap().unwrap();
    assert_eq!(go_on.status(), StatusCode::CONTINUE);
    body.send_data("abc".into(), true).unwrap();
    assert_eq!(read(answer.await.unwrap()).await.unwrap().1, "abc");
    assert_eq!(script.noted(), []);
}

#[tokio::test(start_paused = true)]
async fn trailers_pass_both_ways() {
    let script = Script::new(|mut asked| async move {
        let (body, trailers) = asked.read().await;
        assert_eq!(body, b"abc");
        asked.begin(200, &[]).unwrap();
        asked.responder.finish(trailers).unwrap();
    });
    let mut client = h2(&script).await;
    let (answer, mut body) = client.send(post(), false).await;
    body.send_data("abc".into(), false).unwrap();
    // What may not stand there is left out.
    body.send_trailers(fields_of(&[("grpc-status", "0"), ("client-cert", ":AAAA:")])).unwrap();
    let (_, _, trailers) = read(answer.await.unwrap()).await.unwrap();
    let trailers = trailers.unwrap();
    assert_eq!(trailers["grpc-status"], "0");
    assert!(!trailers.contains_key("client-cert"));
}

#[tokio::test(start_paused = true)]
async fn lengths_are_known() {
    let script = Script::new(|mut asked| async move {
        assert_eq!(asked.body.length(), Some(3));
        assert!(
            matches!(asked.frame().await, BodyFrame::Data { bytes, end: true } if bytes == "abc")
        );
        let mut head = response(200, &[]);
        head.body_length = Some(3);
        asked.responder.head(head, None, false).unwrap();
        asked.put("abc", true).await.unwrap();
    });
    let mut client = h2(&script).await;
    let mut request = post();
    request.headers_mut().insert("content-length", HeaderValue::from_static("3"));
    let (answer, mut body) = client.send(request, false).await;
    body.send_data("abc".into(), true).unwrap();
    let (head, body, _) = read(answer.await.unwrap()).await.unwrap();
    assert_eq!((&head.headers()["content-length"], &*body), (&HeaderValue::from(3), "abc"));
}

#[tokio::test(start_paused = true)]
async fn broken_requests_are_refused_before_dispatch() {
    let with = |uri: &str, fields: &[(&'static str, &str)]| {
        let mut request = Request::get(uri).version(http::Version::HTTP_2).body(()).unwrap();
        *request.headers_mut() = fields_of(fields);
        request
    };
    let many: Vec<_> = (0..129).map(|_| ("x", "y")).collect();
    let connect = Request::builder().method(Method::CONNECT).uri("a.test:80").body(()).unwrap();
    let table = [
        (with("http://a.test/", &[("host", "b.test")]), 400, "bad-request"),
        (with("http://a.test/", &[("host", "a.test"), ("host", "a.test")]), 400, "bad-request"),
        (with("http://u@a.test/", &[]), 400, "bad-request"),
        (with("http://a.test/", &many), 431, "too-large"),
        (connect, 501, "unsupported"),
        (without_authority(&[]), 400, "bad-request"),
        (without_authority(&[("host", "a b")]), 400, "bad-request"),
    ];
    for (request, status, code) in table {
        let script = Script::new(|mut asked| async move { asked.answer(200, &[], "ok") });
        let mut client = h2(&script).await;
        let asked = format!("{request:?}");
        let (head, body, _) = client.ask(request).await;
        assert_eq!(head.status().as_u16(), status, "{asked}");
        assert_eq!(head.headers()["x-sidelane-error"], code, "{asked}");
        assert!(body.starts_with(&format!("{code}: ")), "{asked}");
        assert_eq!(script.seen(), [""; 0], "{asked}");
        // Others on the connection are not concerned.
        assert_eq!(client.ask(get(&[])).await.1, "ok");
    }
}

/// The client sends no `:authority` for what looks like a request of HTTP/1.
fn without_authority(fields: &[(&'static str, &str)]) -> Request<()> {
    let mut request = Request::get("/").version(http::Version::HTTP_11).body(()).unwrap();
    *request.headers_mut() = fields_of(fields);
    request
}

#[tokio::test(start_paused = true)]
async fn host_counts_where_there_is_no_authority() {
    let script = Script::new(|mut asked| async move { asked.answer(200, &[], "ok") });
    let mut client = h2(&script).await;
    assert_eq!(client.ask(without_authority(&[("host", "b.test:1")])).await.1, "ok");
    assert_eq!(script.seen(), ["GET b.test:1 /"]);
}

#[tokio::test(start_paused = true)]
async fn oversized_head_is_refused() {
    let script = Script::new(|mut asked| async move { asked.answer(200, &[], "ok") });
    let mut client = h2(&script).await;
    let (head, ..) = client.ask(get(&[("x", &"x".repeat(70 * 1024))])).await;
    assert_eq!(head.status().as_u16(), 431);
    assert_eq!(script.seen(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn host_may_repeat_the_authority_and_cookies_are_joined() {
    let script = Script::new(|mut asked| async move {
        assert!(!asked.head.headers.contains_key("host"));
        let cookies: Vec<_> = asked.head.headers.get_all("cookie").iter().collect();
        assert_eq!(cookies, ["a=1; b=2"]);
        asked.answer(200, &[], "ok");
    });
    let mut client = h2(&script).await;
    let request = get(&[("host", "A.test"), ("cookie", "a=1"), ("cookie", "b=2")]);
    assert_eq!(client.ask(request).await.1, "ok");
}

#[tokio::test(start_paused = true)]
async fn reset_codes_pass_exactly() {
    let table = [
        (
            Reset { code: failure::SERVICE_RESET, protocol_code: Some(11) },
            Reason::ENHANCE_YOUR_CALM,
        ),
        (Reset { code: failure::SERVICE_RESET, protocol_code: Some(99) }, Reason::from(99)),
        (Reset::new(failure::CANCELLED), Reason::CANCEL),
        (Reset::new(failure::TUNNEL_LOST), Reason::INTERNAL_ERROR),
    ];
    for (reset, reason) in table {
        let script = Script::new(move |mut asked| async move {
            asked.begin(200, &[]).unwrap();
            asked.put("abc", false).await.unwrap();
            asked.responder.abort(reset);
        });
        let mut client = h2(&script).await;
        let (answer, _) = client.send(get(&[]), true).await;
        let mut body = answer.await.unwrap().into_body();
        assert_eq!(body.data().await.unwrap().unwrap(), "abc", "{reset:?}");
        let error = body.data().await.unwrap().unwrap_err();
        assert_eq!((error.is_reset(), error.reason()), (true, Some(reason)), "{reset:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn abort_before_the_head_is_answered_by_its_code() {
    let script = Script::new(|mut asked| async move {
        asked.responder.abort(Reset::new(failure::SERVICE_TIMEOUT));
    });
    let mut client = h2(&script).await;
    let (head, body, _) = client.ask(get(&[])).await;
    assert_eq!(head.status(), StatusCode::GATEWAY_TIMEOUT);
    assert_eq!(head.headers()["x-sidelane-error"], "service-timeout");
    assert_eq!(body, "service-timeout: the service was too slow\n");
    assert_eq!(script.noted(), [Event::Answered(failure::SERVICE_TIMEOUT)]);
}

#[tokio::test(start_paused = true)]
async fn reset_by_the_client_cancels_with_its_code() {
    for begin in [false, true] {
        let (started, start) = Once::new();
        let (heard, reset) = Once::new();
        let script = Script::new(move |mut asked| {
            let (started, heard) = (Arc::clone(&started), Arc::clone(&heard));
            async move {
                if begin {
                    asked.begin(200, &[]).unwrap();
                }
                started.say(());
                heard.say(asked.closed().await);
            }
        });
        let mut client = h2(&script).await;
        let (_answer, mut body) = client.send(post(), false).await;
        start.await.unwrap();
        body.send_reset(Reason::from(77));
        let expected = Reset { code: failure::CLIENT_GONE, protocol_code: Some(77) };
        assert_eq!(reset.await.unwrap(), expected);
    }
}

#[tokio::test(start_paused = true)]
async fn reset_and_disconnect_drop_a_call_that_does_not_look() {
    for disconnect in [false, true] {
        let (started, start) = Once::new();
        let (dropped, drop_seen) = Once::<()>::new();
        let script = Script::new(move |asked| {
            let started = Arc::clone(&started);
            let told = dropped.told_on_drop();
            async move {
                started.say(());
                std::future::pending::<()>().await;
                drop((asked, told));
            }
        });
        let mut client = h2(&script).await;
        let (_answer, mut body) = client.send(post(), false).await;
        start.await.unwrap();
        if disconnect {
            client.connection.abort();
        } else {
            body.send_reset(Reason::CANCEL);
        }
        drop_seen.await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn reset_fails_the_body_with_its_code() {
    let (heard, reset) = Once::new();
    let script = Script::new(move |mut asked| {
        let heard = Arc::clone(&heard);
        async move {
            loop {
                if let BodyFrame::Failed(reset) = asked.frame().await {
                    return heard.say(reset);
                }
            }
        }
    });
    let mut client = h2(&script).await;
    let (_answer, mut body) = client.send(post(), false).await;
    body.send_data("abc".into(), false).unwrap();
    tokio::task::yield_now().await;
    body.send_reset(Reason::CANCEL);
    let expected = Reset { code: failure::CLIENT_GONE, protocol_code: Some(8) };
    assert_eq!(reset.await.unwrap(), expected);
}

#[tokio::test(start_paused = true)]
async fn slow_reader_holds_a_bounded_amount() {
    let (full, taken) = Once::new();
    let script = Script::new(move |mut asked| {
        let full = Arc::clone(&full);
        async move {
            asked.begin(200, &[]).unwrap();
            full.say(put_until_full(&mut asked, 32 * 1024).await);
            asked.put("end", true).await.unwrap();
        }
    });
    let mut client = h2(&script).await;
    let (answer, _) = client.send(get(&[]), true).await;
    let answer = answer.await.unwrap();
    let taken = taken.await.unwrap();
    let window = 64 * 1024;
    let bound = window + FrontConfig::default().h2_send_buffer + 2 * 32 * 1024;
    assert!((window..=bound).contains(&taken), "{taken} bytes were taken");
    assert_eq!(read(answer).await.unwrap().1.len(), taken + 3);
}

#[tokio::test(start_paused = true)]
async fn window_opens_as_the_body_is_read() {
    let (go, gone_on) = oneshot::channel::<()>();
    let gone_on = Mutex::new(Some(gone_on));
    let script = Script::new(move |mut asked| {
        let gone_on = gone_on.lock().unwrap().take().unwrap();
        async move {
            gone_on.await.unwrap();
            let (body, _) = asked.read().await;
            asked.answer(200, &[], &body.len().to_string());
        }
    });
    let config = FrontConfig { h2_stream_window: 64 * 1024, ..FrontConfig::default() };
    let mut client = h2_with(&script, config).await;
    let (answer, mut body) = client.send(post(), false).await;
    let mut sent = 0;
    let all = 300 * 1024;
    let mut go = Some(go);
    while sent < all {
        body.reserve_capacity(all - sent);
        let room = poll_fn(|cx| body.poll_capacity(cx));
        match tokio::time::timeout(Duration::from_secs(1), room).await {
            Ok(room) => {
                let room = room.unwrap().unwrap();
                sent += room;
                body.send_data(vec![0; room].into(), sent == all).unwrap();
            }
            Err(_elapsed) => {
                assert_eq!(sent, 64 * 1024, "more than the window was sent");
                go.take().expect("the window is full once").send(()).unwrap();
            }
        }
    }
    assert!(go.is_none(), "the window was never full");
    assert_eq!(read(answer.await.unwrap()).await.unwrap().1, all.to_string());
}

#[tokio::test(start_paused = true)]
async fn head_and_304_have_no_body() {
    for (method, status) in [(Method::HEAD, 200), (Method::GET, 304)] {
        let script = Script::new(move |mut asked| async move {
            asked.begin(status, &[("content-length", "7")]).unwrap();
            asked.put("ignored", true).await.unwrap();
        });
        let mut client = h2(&script).await;
        let mut request = get(&[]);
        *request.method_mut() = method;
        let (head, body, _) = client.ask(request).await;
        assert_eq!((head.headers()["content-length"].as_bytes(), &*body), (&b"7"[..], ""));
    }
}

#[tokio::test(start_paused = true)]
async fn early_answer_ends_the_stream() {
    let script = Script::new(|mut asked| async move { asked.answer(413, &[], "too large") });
    let mut client = h2(&script).await;
    let (answer, mut body) = client.send(post(), false).await;
    let (head, text, _) = read(answer.await.unwrap()).await.unwrap();
    assert_eq!((head.status().as_u16(), &*text), (413, "too large"));
    let reset = poll_fn(|cx| body.poll_reset(cx)).await.unwrap();
    assert_eq!(reset, Reason::NO_ERROR);
}

#[tokio::test(start_paused = true)]
async fn body_that_nobody_wants_is_read_on_for_a_while() {
    let script = Script::new(|mut asked| async move { asked.answer(413, &[], "too much") });
    let mut client = h2(&script).await;
    let (answer, mut body) = client.send(post(), false).await;
    assert_eq!(read(answer.await.unwrap()).await.unwrap().1, "too much");
    // No reset meets what is on its way, and the stream ends as the client ends it.
    body.send_data("abc".into(), true).unwrap();
    assert_eq!(client.ask(get(&[])).await.0.status(), StatusCode::PAYLOAD_TOO_LARGE);
    // One that goes on and on is reset after a while.
    let (answer, mut body) = client.send(post(), false).await;
    assert_eq!(read(answer.await.unwrap()).await.unwrap().1, "too much");
    let began = tokio::time::Instant::now();
    let reason = poll_fn(|cx| body.poll_reset(cx)).await.unwrap();
    assert_eq!(reason, Reason::NO_ERROR);
    assert_eq!(began.elapsed().as_secs(), 2);
}

#[tokio::test(start_paused = true)]
async fn shutdown_waits_for_streams() {
    let (started, start) = Once::new();
    let (go, gone_on) = oneshot::channel::<()>();
    let gone_on = Mutex::new(Some(gone_on));
    let script = Script::new(move |mut asked| {
        let gone_on = gone_on.lock().unwrap().take().expect("one request only");
        started.say(());
        async move {
            gone_on.await.unwrap();
            asked.answer(200, &[], "ok");
        }
    });
    let mut client = h2(&script).await;
    let (answer, _) = client.send(get(&[]), true).await;
    start.await.unwrap();
    client.shutdown.take().unwrap().send(()).unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(client.requests.clone().ready().await.is_err(), "GOAWAY was not said");
    go.send(()).unwrap();
    assert_eq!(read(answer.await.unwrap()).await.unwrap().1, "ok");
    client.served.await.unwrap().unwrap();
    client.connection.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn idle_connection_is_told_to_go_away() {
    let script = Script::new(|mut asked| async move {
        tokio::time::sleep(Duration::from_secs(600)).await;
        asked.answer(200, &[], "late");
    });
    let mut client = h2(&script).await;
    assert_eq!(client.ask(get(&[])).await.1, "late");
    let rested = tokio::time::Instant::now();
    client.served.await.unwrap().unwrap();
    assert_eq!(rested.elapsed().as_secs(), 75);
    assert!(client.requests.ready().await.is_err(), "GOAWAY was not said");
}

/// Its exchange has ended, as by a timeout of its route.
#[tokio::test(start_paused = true)]
async fn client_that_takes_nothing_holds_no_response_that_is_over() {
    let (ended, over) = Once::new();
    let script = Script::new(move |mut asked| {
        let ended = Arc::clone(&ended);
        async move {
            asked.begin(200, &[]).unwrap();
            put_until_full(&mut asked, 32 * 1024).await;
            ended.say(());
        }
    });
    let mut client = h2(&script).await;
    let (answer, _) = client.send(get(&[]), true).await;
    // Its window stays shut.
    let _response = answer.await.unwrap();
    over.await.unwrap();
    let served = tokio::time::timeout(Duration::from_secs(300), client.served).await;
    assert!(matches!(served.unwrap().unwrap(), Err(ConnectionError::Stalled)));
}

#[tokio::test(start_paused = true)]
async fn silent_client_ends_after_its_goodbye() {
    let script = Script::new(|mut asked| async move { asked.answer(200, &[], "ok") });
    let mut client = connect(&script);
    client.send(H2_PREFACE).await;
    client.send(b"\0\0\0\x04\0\0\0\0\0").await;
    let begun = tokio::time::Instant::now();
    let mut all = Vec::new();
    client.stream.read_to_end(&mut all).await.unwrap();
    assert_eq!(begun.elapsed().as_secs(), 80);
    client.served.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn call_that_ends_without_a_response_is_answered() {
    let script = Script::new(|asked| async move { drop(asked) });
    let mut client = h2(&script).await;
    let (head, ..) = client.ask(get(&[])).await;
    assert_eq!(head.status(), StatusCode::BAD_GATEWAY);
    assert_eq!(head.headers()["x-sidelane-error"], "plugin-failed");
}

#[tokio::test(start_paused = true)]
async fn streams_that_nobody_reads_hold_up_no_other() {
    let script = Script::new(|mut asked| async move {
        if asked.head.headers.contains_key("stall") {
            std::future::pending::<()>().await;
        }
        let (body, _) = asked.read().await;
        asked.answer(200, &[], &body.len().to_string());
    });
    let config = FrontConfig::default();
    let mut client = h2(&script).await;
    let mut stalled = Vec::new();
    for _ in 0..16 {
        let mut request = post();
        request.headers_mut().insert("stall", HeaderValue::from_static("1"));
        let (answer, mut body) = client.send(request, false).await;
        let ahead = config.h2_stream_window as usize;
        body.reserve_capacity(ahead);
        while body.capacity() < ahead {
            poll_fn(|cx| body.poll_capacity(cx)).await.unwrap().unwrap();
        }
        body.send_data(vec![b'x'; ahead].into(), false).unwrap();
        stalled.push((answer, body));
    }
    let (answer, mut body) = client.send(post(), false).await;
    body.send_data(vec![b'x'; 100_000].into(), true).unwrap();
    assert_eq!(read(answer.await.unwrap()).await.unwrap().1, "100000");
}
