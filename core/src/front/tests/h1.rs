//! HTTP/1.1 and 1.0.

use super::*;

const GET: &str = "GET / HTTP/1.1\r\nHost: a.test\r\n\r\n";

fn ok() -> Arc<Script> {
    Script::new(|mut asked| async move { asked.answer(200, &[], "ok") })
}

/// Reads the request's body, then says `METHOD target: body [trailers]`.
fn echo() -> Arc<Script> {
    Script::new(|mut asked| async move {
        let (body, trailers) = asked.read().await;
        let body = String::from_utf8(body).unwrap();
        let trailers = trailers.map(|trailers| format!(" {trailers:?}")).unwrap_or_default();
        asked.answer(200, &[], &format!("{body}{trailers}"));
    })
}

/// Returns a response without its date.
fn undated(text: &str) -> String {
    text.split_inclusive("\r\n").filter(|line| !line.starts_with("date: ")).collect()
}

async fn refuse(input: &[u8], status: &str, code: Option<&str>) {
    let script = ok();
    let mut client = connect(&script);
    client.send(input).await;
    let output = client.read_all().await;
    let request = String::from_utf8_lossy(&input[..input.len().min(200)]);
    let (version, rest) = output.split_at_checked("HTTP/1.1 ".len()).expect("an answer");
    assert!(version.starts_with("HTTP/1."), "{request:?} got {output:?}");
    assert!(rest.starts_with(status), "{request:?} got {output:?}");
    assert!(
        output.contains("connection: close\r\n") || output.starts_with("HTTP/1.1 431"),
        "{request:?} got {output:?}"
    );
    if let Some(code) = code {
        assert!(
            output.contains(&format!("x-sidelane-error: {code}\r\n")),
            "{request:?} got {output:?}"
        );
    }
    assert_eq!(script.seen(), [""; 0], "{request:?} was dispatched");
}

#[tokio::test(start_paused = true)]
async fn broken_requests_are_refused_before_dispatch() {
    let bad = Some("bad-request");
    let unsupported = Some("unsupported");
    let table: &[(&[u8], &str, Option<&str>)] = &[
        (b"GET / HTTP/1.1\r\n\r\n", "400", bad),
        (b"GET / HTTP/1.0\r\n\r\n", "400", bad),
        (b"GET / HTTP/1.1\r\nHost:\r\n\r\n", "400", bad),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", "400", bad),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "400", bad),
        (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", "400", bad),
        (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", "400", bad),
        (b"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n", "400", bad),
        (b"GET / HTTP/1.1\r\nHost: a:99999\r\n\r\n", "400", bad),
        (b"GET / HTTP/1.1\r\nHost: a, b@c\r\n\r\n", "400", bad),
        (b"GET http://a/ HTTP/1.1\r\n\r\n", "400", bad),
        (b"GET http://u@a/ HTTP/1.1\r\nHost: a\r\n\r\n", "400", bad),
        (b"GET http://a/ HTTP/1.1\r\nHost: a b\r\n\r\n", "400", bad),
        (b"GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n", "400", bad),
        (b"GET * HTTP/1.1\r\nHost: a\r\n\r\n", "400", bad),
        (b"GET a.test HTTP/1.1\r\nHost: a\r\n\r\n", "400", bad),
        (b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n", "501", unsupported),
        (
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
            "501",
            unsupported,
        ),
        (
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n",
            "501",
            unsupported,
        ),
        (
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
            "400",
            bad,
        ),
        // What follows is refused by hyper itself, without a body.
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", "400", None),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, gzip\r\n\r\n", "400", None),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n", "400", None),
        (b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", "400", None),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", "400", None),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1, 1\r\n\r\n", "400", None),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\n", "400", None),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", "400", None),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n", "400", None),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n", "400", None),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX : a\r\n\r\n", "400", None),
        (b"GET / HTTP/1.1\r\nHost: a\r\n: a\r\n\r\n", "400", None),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n", "400", None),
        (b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", "400", None),
        (b"GET / HTTP/3.0\r\nHost: a\r\n\r\n", "400", None),
        (b"PR /\r\n", "400", None),
    ];
    for (input, status, code) in table {
        refuse(input, status, *code).await;
    }
}

#[tokio::test(start_paused = true)]
async fn oversized_heads_are_refused() {
    let long = format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "x".repeat(64 * 1024));
    refuse(long.as_bytes(), "431", None).await;
    let many = format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "X: x\r\n".repeat(128));
    refuse(many.as_bytes(), "431", None).await;
}

#[tokio::test(start_paused = true)]
async fn heads_within_the_limits_pass() {
    for fields in ["X: x\r\n".repeat(127), format!("X: {}\r\n", "x".repeat(63 * 1024))] {
        let script = ok();
        let mut client = connect(&script);
        client.send(format!("GET / HTTP/1.1\r\nHost: a\r\n{fields}\r\n")).await;
        assert!(client.read_all().await.starts_with("HTTP/1.1 200 OK\r\n"));
    }
}

#[tokio::test(start_paused = true)]
async fn authority_and_target_as_they_count() {
    let table = [
        ("GET / HTTP/1.1\r\nHost: a.test:80\r\n\r\n", "GET a.test:80 /"),
        (
            "GET /%7e//a/../b?x=%00&y=[] HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET a /%7e//a/../b?x=%00&y=[]",
        ),
        ("GET /?a?b=/ HTTP/1.1\r\nHost: a\r\n\r\n", "GET a /?a?b=/"),
        ("GET http://b.test/x?y HTTP/1.1\r\nHost: a.test\r\n\r\n", "GET b.test /x?y"),
        ("GET http://b.test HTTP/1.1\r\nHost: a.test\r\n\r\n", "GET b.test /"),
        ("GET http://b.test?q HTTP/1.1\r\nHost: a.test\r\n\r\n", "GET b.test /?q"),
        ("GET http://b.test/ HTTP/1.0\r\n\r\n", "GET b.test /"),
        ("GET / HTTP/1.0\r\nHost: a.test\r\n\r\n", "GET a.test /"),
        ("OPTIONS * HTTP/1.1\r\nHost: [::1]:9\r\n\r\n", "OPTIONS [::1]:9 *"),
        ("PURGE / HTTP/1.1\r\nhOsT: \t a \r\n\r\n", "PURGE a /"),
    ];
    for (input, expected) in table {
        let script = Script::new(|mut asked| async move {
            assert!(!asked.head.headers.contains_key("host"));
            asked.answer(200, &[], "");
        });
        let mut client = connect(&script);
        client.send(input).await;
        client.read_all().await;
        assert_eq!(script.seen(), [expected], "{input:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn repeated_and_odd_fields_pass_in_order() {
    let (heard, head) = Once::new();
    let script = Script::new(move |mut asked| {
        heard.say(asked.head.headers.clone());
        async move { asked.answer(200, &[("set-cookie", "a"), ("set-cookie", "b")], "") }
    });
    let mut client = connect(&script);
    client.send(b"GET / HTTP/1.1\r\nHost: a\r\nX: 1\r\nY: \xff\xe9\r\nX: 2\r\n\r\n").await;
    let output = client.read_all().await;
    let head = head.await.unwrap();
    assert_eq!(head.get_all("x").iter().collect::<Vec<_>>(), ["1", "2"]);
    assert_eq!(head["y"].as_bytes(), b"\xff\xe9");
    assert!(output.contains("set-cookie: a\r\nset-cookie: b\r\n"), "{output:?}");
}

#[tokio::test(start_paused = true)]
async fn content_length_beside_chunked_never_passes_and_closes() {
    for fields in [
        "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n",
    ] {
        let script = Script::new(|mut asked| async move {
            assert!(!asked.head.headers.contains_key("content-length"));
            assert_eq!(asked.body.length(), None);
            let (body, _) = asked.read().await;
            asked.answer(200, &[], str::from_utf8(&body).unwrap());
        });
        let mut client = connect(&script);
        client
            .send(format!("POST /1 HTTP/1.1\r\nHost: a\r\n{fields}\r\n5\r\nhello\r\n0\r\n\r\n"))
            .await;
        client.send(GET).await;
        let output = client.read_all().await;
        assert!(output.contains("connection: close\r\n"), "{output:?}");
        assert!(output.ends_with("\r\n\r\nhello"), "{output:?}");
        assert_eq!(script.seen(), ["POST a /1"]);
    }
}

#[tokio::test(start_paused = true)]
async fn whole_response_has_its_length() {
    let script = ok();
    let mut client = connect(&script);
    client.send(GET).await;
    let output = client.read_to("ok").await;
    assert_eq!(undated(&output), "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok");
    assert!(output.contains("\r\ndate: "));
}

#[tokio::test(start_paused = true)]
async fn date_of_the_service_is_kept() {
    let date = "Tue, 15 Nov 1994 08:12:31 GMT";
    let script =
        Script::new(move |mut asked| async move { asked.answer(200, &[("date", date)], "") });
    let mut client = connect(&script);
    client.send(GET).await;
    let output = client.read_all().await;
    assert_eq!(output.matches("date: ").count(), 1);
    assert!(output.contains(date));
}

#[tokio::test(start_paused = true)]
async fn streamed_chunks_arrive_one_by_one() {
    let (go, gone_on) = oneshot::channel::<()>();
    let gone_on = Mutex::new(Some(gone_on));
    let script = Script::new(move |mut asked| {
        let gone_on = gone_on.lock().unwrap().take().unwrap();
        async move {
            asked.begin(200, &[("content-type", "text/event-stream")]).unwrap();
            asked.put("data: 1\n\n", false).await.unwrap();
            gone_on.await.unwrap();
            asked.put("data: 2\n\n", false).await.unwrap();
            asked.responder.finish(None).unwrap();
        }
    });
    let mut client = connect(&script);
    client.send(GET).await;
    let head = client.read_to("\r\n\r\n").await;
    assert!(head.contains("transfer-encoding: chunked\r\n"));
    assert_eq!(client.read_to("1\n\n\r\n").await, "9\r\ndata: 1\n\n\r\n");
    go.send(()).unwrap();
    assert_eq!(client.read_to("0\r\n\r\n").await, "9\r\ndata: 2\n\n\r\n0\r\n\r\n");
}

#[tokio::test(start_paused = true)]
async fn streamed_body_of_known_length_is_not_chunked() {
    for stated in [false, true] {
        let script = Script::new(move |mut asked| async move {
            let fields: &[_] = if stated { &[("content-length", "6")] } else { &[] };
            let mut head = response(200, fields);
            head.body_length = Some(6);
            asked.responder.head(head, Some("abc".into()), false).unwrap();
            asked.put("def", false).await.unwrap();
            asked.responder.finish(None).unwrap();
        });
        let mut client = connect(&script);
        client.send(GET).await;
        client.send(GET).await;
        for _ in 0..2 {
            let output = undated(&client.read_to("def").await);
            assert_eq!(output, "HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nabcdef");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn body_that_differs_from_its_length_never_looks_whole() {
    let script = Script::new(|mut asked| async move {
        asked.answer(200, &[("content-length", "6")], "abc");
    });
    let mut client = connect(&script);
    client.send([GET, GET].concat()).await;
    let output = client.read_all().await;
    assert!(output.contains("content-length: 6\r\n"), "{output:?}");
    assert_eq!(output.matches("HTTP/1.1").count(), 1, "{output:?}");

    let script = Script::new(|mut asked| async move {
        asked.answer(200, &[("content-length", "2")], "abc");
    });
    let mut client = connect(&script);
    client.send(GET).await;
    assert!(client.read_all().await.ends_with("\r\n\r\nab"));
}

#[tokio::test(start_paused = true)]
async fn invalid_length_of_a_response_is_the_services_fault() {
    for fields in [
        &[("content-length", "x")][..],
        &[("content-length", "+1")],
        &[("content-length", "1"), ("content-length", "2")],
    ] {
        let script = Script::new(move |mut asked| async move {
            asked.answer(200, fields, "a");
        });
        let mut client = connect(&script);
        client.send(GET).await;
        let output = client.read_all().await;
        assert!(output.starts_with("HTTP/1.1 502"), "{output:?}");
        assert!(output.contains("x-sidelane-error: service-invalid\r\n"), "{output:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn bodiless_responses_keep_their_length() {
    let table = [
        ("HEAD", 200, "HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n"),
        ("GET", 304, "HTTP/1.1 304 Not Modified\r\ncontent-length: 7\r\n\r\n"),
        // RFC 9110 §8.6: none in 204.
        ("GET", 204, "HTTP/1.1 204 No Content\r\n\r\n"),
    ];
    for (method, status, expected) in table {
        let script = Script::new(move |mut asked| async move {
            asked.begin(status, &[("content-length", "7")]).unwrap();
            // A service's body that must not be passed on.
            asked.put("ignored", false).await.unwrap();
            asked.responder.finish(None).unwrap();
        });
        let mut client = connect(&script);
        let request = format!("{method} / HTTP/1.1\r\nHost: a\r\n\r\n");
        client.send([&*request, &*request].concat()).await;
        assert_eq!(undated(&client.read_all().await), expected.repeat(2), "{method} {status}");
    }
}

#[tokio::test(start_paused = true)]
async fn pipelined_requests_are_answered_in_order() {
    let script = Script::new(|mut asked| async move {
        let target = String::from_utf8(asked.head.target.to_vec()).unwrap();
        tokio::task::yield_now().await;
        asked.answer(200, &[], &target);
    });
    let mut client = connect(&script);
    let requests: String =
        (0..20).map(|n| format!("GET /{n:02} HTTP/1.1\r\nHost: a\r\n\r\n")).collect();
    client.send(requests).await;
    for n in 0..20 {
        client.read_to(&format!("\r\n\r\n/{n:02}")).await;
    }
}

#[tokio::test(start_paused = true)]
async fn http10_is_answered_in_its_version() {
    let script = Script::new(|mut asked| async move {
        asked.begin(200, &[("trailer", "x")]).unwrap();
        asked.put("a", false).await.unwrap();
        asked.put("b", false).await.unwrap();
        asked.responder.finish(Some(fields_of(&[("x", "y")]))).unwrap();
    });
    let mut client = connect(&script);
    client.send("GET / HTTP/1.0\r\nHost: a\r\n\r\n").await;
    assert_eq!(undated(&client.read_all().await), "HTTP/1.0 200 OK\r\n\r\nab");

    let mut client = connect(&ok());
    client.send("GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n").await;
    client.read_to("ok").await;
    client.send("GET / HTTP/1.0\r\nHost: a\r\n\r\n").await;
    let output = client.read_all().await;
    assert_eq!(undated(&output), "HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok");
}

#[tokio::test(start_paused = true)]
async fn fixed_and_chunked_bodies_arrive_whole() {
    let mut client = connect(&echo());
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello").await;
    assert!(client.read_to("hello").await.contains("content-length: 5\r\n"));
    client
        .send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n2;x=y\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n")
        .await;
    client.read_to("\r\n\r\nhello").await;
}

#[tokio::test(start_paused = true)]
async fn length_and_end_of_the_body_are_known() {
    let script = Script::new(|mut asked| async move {
        assert_eq!(asked.body.length(), Some(3));
        assert!(!asked.head.end);
        assert!(
            matches!(asked.frame().await, BodyFrame::Data { bytes, end: true } if bytes == "abc")
        );
        assert!(matches!(asked.frame().await, BodyFrame::End));
        asked.answer(200, &[], "");
    });
    let mut client = connect(&script);
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc").await;
    assert!(client.read_all().await.starts_with("HTTP/1.1 200"));

    let script = Script::new(|mut asked| async move {
        assert!(asked.head.end);
        assert_eq!(asked.body.length(), Some(0));
        asked.answer(200, &[], "");
    });
    let mut client = connect(&script);
    client.send(GET).await;
    assert!(client.read_all().await.starts_with("HTTP/1.1 200"));
}

#[tokio::test(start_paused = true)]
async fn request_trailers_arrive() {
    let mut client = connect(&echo());
    client
        .send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTrailer: X\r\n\r\n1\r\na\r\n0\r\nX: y\r\n\r\n")
        .await;
    client.read_to("a {\"x\": \"y\"}").await;
}

#[tokio::test(start_paused = true)]
async fn trailers_say_nothing_of_the_clients_certificate() {
    let mut client = connect(&echo());
    client
        .send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\
               X: y\r\nClient-Cert: :AAAA:\r\nclient_cert: :AAAA:\r\nClient-Cert-Chain: :AAAA:\r\n\r\n")
        .await;
    client.read_to("a {\"x\": \"y\"}").await;
}

#[tokio::test(start_paused = true)]
async fn announced_response_trailers_pass() {
    let script = Script::new(|mut asked| async move {
        asked.begin(200, &[("trailer", "x-sum")]).unwrap();
        asked.put("a", false).await.unwrap();
        asked.responder.finish(Some(fields_of(&[("x-sum", "1"), ("x-other", "2")]))).unwrap();
    });
    let mut client = connect(&script);
    client.send("GET / HTTP/1.1\r\nHost: a\r\nTE: trailers\r\n\r\n").await;
    let output = client.read_all().await;
    assert!(output.ends_with("\r\n\r\n1\r\na\r\n0\r\nx-sum: 1\r\n\r\n"), "{output:?}");
}

const EXPECTING: &str =
    "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n";

const CONTINUE: &str = "HTTP/1.1 100 Continue\r\n\r\n";

#[tokio::test(start_paused = true)]
async fn client_goes_on_only_when_told() {
    for pipe_bytes in [1, 7, PIPE_BYTES] {
        let (go, gone_on) = oneshot::channel::<()>();
        let gone_on = Mutex::new(Some(gone_on));
        let script = Script::new(move |mut asked| {
            let gone_on = gone_on.lock().unwrap().take().unwrap();
            async move {
                assert!(asked.head.expect_continue);
                // Reading does not tell the client.
                let early = poll_fn(|cx| Poll::Ready(asked.body.poll_frame(cx).is_ready())).await;
                assert!(!early);
                gone_on.await.unwrap();
                asked.responder.informational(StatusCode::CONTINUE, HeaderMap::new()).unwrap();
                let (body, _) = asked.read().await;
                asked.answer(200, &[], str::from_utf8(&body).unwrap());
            }
        });
        let mut client = connect_through(&script, FrontConfig::default(), pipe_bytes);
        client.send(EXPECTING).await;
        let mut byte = [0];
        let early = tokio::time::timeout(Duration::from_secs(20), client.stream.read(&mut byte));
        assert!(early.await.is_err(), "answered before the plugin said so");
        go.send(()).unwrap();
        assert_eq!(client.read_to("\r\n\r\n").await, CONTINUE);
        client.send("abc").await;
        let output = client.read_to("abc").await;
        assert!(output.starts_with("HTTP/1.1 200 OK\r\n"), "{output:?}");
        assert!(!output.contains("connection: close"), "{output:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn body_that_comes_without_a_100_is_read() {
    let script = echo();
    for pipe_bytes in [1, 7, PIPE_BYTES] {
        let mut client = connect_through(&script, FrontConfig::default(), pipe_bytes);
        // The second time with the head, then after a time-out of the client's own.
        client.send(format!("{EXPECTING}abc")).await;
        let output = client.read_to("abc").await;
        assert!(output.starts_with("HTTP/1.1 200 OK\r\n"), "{output:?}");
        client.send(EXPECTING).await;
        let mut byte = [0];
        let early = tokio::time::timeout(Duration::from_secs(1), client.stream.read(&mut byte));
        assert!(early.await.is_err(), "told to go on, or answered");
        client.send("def").await;
        let output = client.read_to("def").await;
        // Nothing is uncertain once the body has come: the connection is kept.
        assert!(output.starts_with("HTTP/1.1 200 OK\r\n"), "{output:?}");
        assert!(!output.contains("connection: close"), "{output:?}");
        client.send(GET).await;
        client.read_to("\r\n\r\n").await;
    }
}

#[tokio::test(start_paused = true)]
async fn final_answer_without_100_leaves_the_body_unread() {
    for ask in [false, true] {
        let script = Script::new(move |mut asked| async move {
            if ask {
                let early = poll_fn(|cx| Poll::Ready(asked.body.poll_frame(cx).is_ready())).await;
                assert!(!early);
                // hyper has had its turn to write a 100.
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            asked.answer(417, &[], "no");
        });
        let mut client = connect(&script);
        client.send(EXPECTING).await;
        let output = client.read_to("no").await;
        assert!(output.starts_with("HTTP/1.1 417 Expectation Failed\r\n"), "{output:?}");
        assert!(output.contains("connection: close\r\n"), "{output:?}");
        assert_eq!(client.read_all().await, "");
    }
}

/// hyper writes its own 100 and the head that follows as one.
#[tokio::test(start_paused = true)]
async fn answer_right_after_the_body_was_asked_for_comes_alone() {
    let script = Script::new(|mut asked| async move {
        let early = poll_fn(|cx| Poll::Ready(asked.body.poll_frame(cx).is_ready())).await;
        assert!(!early);
        tokio::task::yield_now().await;
        asked.begin(200, &[]).unwrap();
        let (body, _) = asked.read().await;
        asked.put(body, true).await.unwrap();
    });
    for pipe_bytes in [1, 30, PIPE_BYTES] {
        let mut client = connect_through(&script, FrontConfig::default(), pipe_bytes);
        client.send(EXPECTING).await;
        let head = client.read_to("\r\n\r\n").await;
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head:?}");
        assert!(head.contains("connection: close\r\n"), "{head:?}");
        client.send("abc").await;
        assert_eq!(client.read_all().await, "3\r\nabc\r\n0\r\n\r\n");
    }
}

#[tokio::test(start_paused = true)]
async fn interim_responses_pass_before_the_head_alone() {
    let script = Script::new(|mut asked| async move {
        let early = StatusCode::EARLY_HINTS;
        let hints = [("link", "</a>"), ("link", "</b>"), ("connection", "close")];
        asked.responder.informational(early, fields_of(&hints)).unwrap();
        tokio::task::yield_now().await;
        asked.responder.informational(early, fields_of(&[("link", "</c>")])).unwrap();
        let switching = StatusCode::SWITCHING_PROTOCOLS;
        assert_eq!(asked.responder.informational(switching, HeaderMap::new()), Err(Closed));
        asked.answer(200, &[], "ok");
        assert_eq!(asked.responder.informational(early, HeaderMap::new()), Err(Closed));
    });
    for pipe_bytes in [1, 7, PIPE_BYTES] {
        let mut client = connect_through(&script, FrontConfig::default(), pipe_bytes);
        for _ in 0..2 {
            client.send(GET).await;
            let output = client.read_to("ok").await;
            let hints = "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\nlink: </b>\r\n\r\n\
                         HTTP/1.1 103 Early Hints\r\nlink: </c>\r\n\r\nHTTP/1.1 200 OK\r\n";
            assert!(output.starts_with(hints), "{output:?}");
        }
    }
    assert_eq!(script.noted(), []);
}

#[tokio::test(start_paused = true)]
async fn http10_gets_no_interim_response() {
    let script = Script::new(|mut asked| async move {
        assert!(!asked.head.expect_continue);
        for status in [StatusCode::CONTINUE, StatusCode::EARLY_HINTS] {
            asked.responder.informational(status, HeaderMap::new()).unwrap();
        }
        let (body, _) = asked.read().await;
        asked.answer(200, &[], str::from_utf8(&body).unwrap());
    });
    let mut client = connect(&script);
    client.send(EXPECTING.replace("HTTP/1.1", "HTTP/1.0")).await;
    client.send("abc").await;
    let output = client.read_all().await;
    assert!(output.starts_with("HTTP/1.0 200 OK\r\n") && output.ends_with("abc"), "{output:?}");
    assert_eq!(script.noted(), [Event::InformationalDropped; 2]);
}

/// What is left of a response in hyper's buffer must not be cut by an interim response of the next.
#[tokio::test(start_paused = true)]
async fn pipelined_interim_responses_keep_their_place() {
    let long = "x".repeat(40_000);
    let sent = long.clone();
    let script = Script::new(move |mut asked| {
        let long = sent.clone();
        async move {
            match &asked.head.target[..] {
                b"/long" => asked.answer(200, &[], &long),
                b"/empty" => asked.answer(204, &[], ""),
                _ => {
                    asked
                        .responder
                        .informational(StatusCode::PROCESSING, HeaderMap::new())
                        .unwrap();
                    asked.responder.informational(StatusCode::CONTINUE, HeaderMap::new()).unwrap();
                    let (body, _) = asked.read().await;
                    asked.answer(200, &[], str::from_utf8(&body).unwrap());
                }
            }
        }
    });
    for pipe_bytes in [1, 50, 1000, PIPE_BYTES] {
        for (first, end) in [("/empty", "\r\n\r\n"), ("/long", &format!("\r\n\r\n{long}"))] {
            let client = connect_through(&script, FrontConfig::default(), pipe_bytes);
            let get = format!("GET {first} HTTP/1.1\r\nHost: a\r\n\r\n");
            let (mut from, mut to) = tokio::io::split(client.stream);
            let input = format!("{get}{EXPECTING}abc{get}{EXPECTING}def");
            let sending =
                tokio::spawn(async move { to.write_all(input.as_bytes()).await.map(|()| to) });
            let mut output = Vec::new();
            while !output.ends_with(b"\r\n\r\ndef") {
                // Slower than the front, so that its buffer fills.
                tokio::time::sleep(Duration::from_millis(1)).await;
                let mut bytes = [0; 4096];
                let read = from.read(&mut bytes).await.unwrap();
                assert!(read > 0, "closed after {:?}", String::from_utf8_lossy(&output));
                output.extend_from_slice(&bytes[..read]);
            }
            sending.await.unwrap().unwrap();
            let output = undated(&String::from_utf8(output).unwrap());
            let status = if first == "/empty" { "204 No Content" } else { "200 OK" };
            let length = if first == "/empty" { "" } else { "content-length: 40000\r\n" };
            let round = |body: &str| {
                format!(
                    "HTTP/1.1 {status}\r\n{length}{}HTTP/1.1 102 Processing\r\n\r\n{CONTINUE}\
                     HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n{body}",
                    end.strip_prefix("\r\n").unwrap()
                )
            };
            assert_eq!(output, round("abc") + &round("def"), "{first} through {pipe_bytes}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn interim_responses_for_a_slow_client_are_bounded() {
    let script = Script::new(|mut asked| async move {
        let hint = "x".repeat(1000);
        for _ in 0..1000 {
            let fields = fields_of(&[("link", &hint)]);
            asked.responder.informational(StatusCode::EARLY_HINTS, fields).unwrap();
            tokio::task::yield_now().await;
        }
        asked
            .responder
            .informational(StatusCode::CONTINUE, fields_of(&[("a", &hint), ("b", &hint)]))
            .unwrap();
        let (body, _) = asked.read().await;
        asked.answer(200, &[], str::from_utf8(&body).unwrap());
    });
    let mut client = connect(&script);
    client.send(EXPECTING).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let output = client.read_to(CONTINUE).await;
    let hints = output.matches("HTTP/1.1 103").count();
    assert!(output.len() < 64 * 1024 + PIPE_BYTES + 2000, "{}", output.len());
    assert_eq!(script.noted().len() + hints, 1000);
    client.send("abc").await;
    assert!(client.read_to("abc").await.starts_with("HTTP/1.1 200 OK\r\n"));
}

#[tokio::test(start_paused = true)]
async fn early_answer_arrives_although_the_body_goes_on() {
    let script = Script::new(|mut asked| async move { asked.answer(413, &[], "too large") });
    let mut client = connect(&script);
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n").await;
    let (mut from, mut to) = tokio::io::split(client.stream);
    let sending = tokio::spawn(async move { to.write_all(&vec![b'x'; 1_000_000]).await });
    let mut output = Vec::new();
    from.read_to_end(&mut output).await.unwrap();
    assert!(String::from_utf8_lossy(&output).ends_with("\r\n\r\ntoo large"));
    // What goes on is thrown away up to a bound, instead of a reset that would eat the answer.
    sending.await.unwrap().unwrap();
}

/// Over a real socket, where closing with input outstanding resets the connection.
#[tokio::test]
async fn answer_survives_input_that_nobody_reads() {
    let body = vec![b'x'; 300_000];
    let head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 300000\r\n\r\n";
    let refused = b"POST / HTTP/1.1\r\nHost: a b\r\nContent-Length: 300000\r\n\r\n";
    let long = b"GET / HTTP/1.1\r\nX: ";
    let table = [(&head[..], "413", "too large"), (refused, "400", "Host\n"), (long, "431", "")];
    for (head, status, tail) in table {
        let script = Script::new(|mut asked| async move { asked.answer(413, &[], "too large") });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut client = tokio::net::TcpStream::connect(address).await.unwrap();
        let (far, from) = listener.accept().await.unwrap();
        let info = Arc::new(ConnectionInfo::plain("test".into(), from));
        let serving = serve(far, info, Arc::default(), script, std::future::pending());
        let served = tokio::spawn(serving);
        client.write_all(head).await.unwrap();
        client.write_all(&body).await.unwrap();
        let mut output = String::new();
        client.read_to_string(&mut output).await.unwrap();
        assert!(output.starts_with(&format!("HTTP/1.1 {status} ")), "{output:?}");
        assert!(output.ends_with(tail), "{output:?}");
        drop(client);
        let _ = served.await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn broken_chunk_is_the_clients_fault() {
    let script = Script::new(|mut asked| async move {
        let reset = loop {
            if let BodyFrame::Failed(reset) = asked.frame().await {
                break reset;
            }
        };
        asked.responder.abort(reset);
    });
    let mut client = connect(&script);
    client.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\naXX").await;
    assert!(client.read_all().await.starts_with("HTTP/1.1 400 Bad Request\r\n"));
}

/// Sends `input`, waits for the request, closes, and waits until the call is dropped.
async fn leave(input: &str, begin: bool, look: bool) {
    let (started, start) = Once::new();
    let (dropped, drop_seen) = Once::<()>::new();
    let script = Script::new(move |mut asked| {
        let started = Arc::clone(&started);
        let told = dropped.told_on_drop();
        async move {
            if begin {
                asked.begin(200, &[]).unwrap();
            }
            started.say(());
            if look {
                assert_eq!(asked.closed().await.code, failure::CLIENT_GONE);
            } else {
                std::future::pending::<()>().await;
            }
            drop(told);
        }
    });
    let mut client = connect(&script);
    client.send(input).await;
    start.await.unwrap();
    if begin {
        client.read_to("\r\n\r\n").await;
    }
    drop(client.stream);
    drop_seen.await.unwrap();
    assert!(matches!(client.served.await.unwrap(), Err(ConnectionError::ClientGone)));
}

#[tokio::test(start_paused = true)]
async fn disconnect_cancels_the_call() {
    let started = tokio::time::Instant::now();
    leave(GET, false, false).await;
    leave(GET, true, false).await;
    leave(GET, true, true).await;
    leave(EXPECTING, false, false).await;
    leave("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n", false, false).await;
    leave("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n", true, false).await;
    assert_eq!(started.elapsed().as_secs(), 0, "noticed by a timeout only");
}

#[tokio::test(start_paused = true)]
async fn disconnect_within_the_body_fails_the_body() {
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
    let mut client = connect(&script);
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc").await;
    drop(client.stream);
    assert_eq!(reset.await.unwrap().code, failure::CLIENT_GONE);
}

#[tokio::test(start_paused = true)]
async fn call_goes_on_after_its_response() {
    let (done, finished) = Once::new();
    let script = Script::new(move |mut asked| {
        let done = Arc::clone(&done);
        async move {
            asked.answer(200, &[], "ok");
            tokio::time::sleep(Duration::from_secs(1)).await;
            done.say(());
        }
    });
    let mut client = connect(&script);
    client.send(GET).await;
    client.read_to("ok").await;
    drop(client);
    finished.await.unwrap();
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
    let mut client = connect(&script);
    client.send(GET).await;
    let taken = taken.await.unwrap();
    let bound = FrontConfig::default().buffer_bytes_max + 2 * 32 * 1024 + PIPE_BYTES;
    assert!((PIPE_BYTES..=bound).contains(&taken), "{taken} bytes were taken");
    assert!(client.read_to("end\r\n0\r\n\r\n").await.len() > taken);
}

#[tokio::test(start_paused = true)]
async fn unread_body_is_not_taken_from_the_client() {
    let script = Script::new(|mut asked| async move {
        let _ = asked.closed().await;
    });
    let mut client = connect(&script);
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10000000\r\n\r\n").await;
    let mut sent = 0;
    let chunk = vec![b'x'; 4096];
    let second = Duration::from_secs(1);
    while let Ok(written) = tokio::time::timeout(second, client.stream.write(&chunk)).await {
        sent += written.unwrap();
    }
    assert!(sent <= 2 * FrontConfig::default().buffer_bytes_max + PIPE_BYTES, "{sent} were taken");
}

#[tokio::test(start_paused = true)]
async fn abort_before_the_head_is_answered_by_its_code() {
    let table = [
        (failure::NO_ROUTE, "404 Not Found", "no-route"),
        (failure::NO_SIDECAR, "503 Service Unavailable", "no-sidecar"),
        (failure::SERVICE_UNREACHABLE, "502 Bad Gateway", "service-unreachable"),
        (failure::SERVICE_TIMEOUT, "504 Gateway Timeout", "service-timeout"),
        (failure::PLUGIN_FAILED, "502 Bad Gateway", "plugin-failed"),
        (failure::INTERNAL, "500 Internal Server Error", "internal"),
    ];
    for (code, status, name) in table {
        let script = Script::new(move |mut asked| async move {
            asked.responder.abort(Reset::new(code));
            assert_eq!(asked.begin(200, &[]), Err(Closed));
        });
        let mut client = connect(&script);
        client.send(GET).await;
        let head = client.read_to("\r\n\r\n").await;
        assert!(head.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{head:?}");
        assert!(head.contains(&format!("x-sidelane-error: {name}\r\n")), "{head:?}");
        assert!(client.read_to("\n").await.starts_with(&format!("{name}: ")));
        assert_eq!(script.noted(), [Event::Answered(code)]);
        // The connection goes on.
        client.send(GET).await;
        client.read_to("\r\n\r\n").await;
    }
}

#[tokio::test(start_paused = true)]
async fn call_that_ends_without_a_response_is_answered_by_its_code() {
    let table = [
        (CallEnd { code: failure::NONE, panicked: false }, "plugin-failed"),
        (CallEnd { code: failure::TUNNEL_LOST, panicked: false }, "tunnel-lost"),
        (CallEnd { code: failure::TUNNEL_LOST, panicked: true }, "plugin-failed"),
    ];
    for (end, name) in table {
        let script = Arc::new(Script {
            answer: Box::new(move |asked| {
                Box::pin(async move {
                    drop(asked);
                    end
                })
            }),
            seen: Mutex::default(),
            noted: Mutex::default(),
        });
        let mut client = connect(&script);
        client.send(GET).await;
        let head = client.read_to("\r\n\r\n").await;
        assert!(head.starts_with("HTTP/1.1 502 "), "{head:?}");
        assert!(head.contains(&format!("x-sidelane-error: {name}\r\n")), "{head:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn abort_after_the_head_ends_without_a_clean_end() {
    for drops in [false, true] {
        let script = Script::new(move |mut asked| async move {
            asked.begin(200, &[]).unwrap();
            asked.put("abc", false).await.unwrap();
            if !drops {
                asked.responder.abort(Reset::new(failure::SERVICE_RESET));
            }
        });
        let mut client = connect(&script);
        client.send([GET, GET].concat()).await;
        let output = client.read_all().await;
        assert!(output.ends_with("\r\n\r\n3\r\nabc\r\n"), "{output:?}");
        assert!(matches!(client.served.await.unwrap(), Err(ConnectionError::Aborted)));
    }
}

#[tokio::test(start_paused = true)]
async fn idle_connection_shuts_down_at_once() {
    let mut client = connect(&ok());
    client.send(GET).await;
    client.read_to("ok").await;
    client.shut_down();
    assert_eq!(client.read_all().await, "");
    client.served.await.unwrap().unwrap();

    let mut unused = connect(&ok());
    unused.shut_down();
    assert_eq!(unused.read_all().await, "");
}

#[tokio::test(start_paused = true)]
async fn shutdown_lets_the_exchange_end() {
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
    let mut client = connect(&script);
    client.send([GET, GET].concat()).await;
    start.await.unwrap();
    client.shut_down();
    tokio::task::yield_now().await;
    go.send(()).unwrap();
    let output = undated(&client.read_all().await);
    assert_eq!(output, "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok");
}

#[tokio::test(start_paused = true)]
async fn request_that_came_before_shutdown_is_answered() {
    let mut client = connect(&ok());
    client.send(GET).await;
    client.shut_down();
    assert!(client.read_all().await.ends_with("\r\n\r\nok"));
}

#[tokio::test(start_paused = true)]
async fn cut_at_every_offset_leaves_nothing() {
    let script = Script::new(|mut asked| async move {
        asked.begin(200, &[]).unwrap();
        loop {
            let (bytes, end) = match asked.frame().await {
                BodyFrame::Data { bytes, end } => (bytes, end),
                BodyFrame::Failed(_) => return,
                BodyFrame::Trailers(_) | BodyFrame::End => (Bytes::new(), true),
            };
            if asked.put(bytes, end).await.is_err() || end {
                return;
            }
        }
    });
    let input = "POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc\
        POST /2 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX: y\r\n\r\n\
        GET /3 HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n";
    let begun = tokio::time::Instant::now();
    for cut in 0..=input.len() {
        let mut client = connect(&script);
        client.send(&input[..cut]).await;
        if cut % 2 == 0 {
            tokio::task::yield_now().await;
        }
        drop(client.stream);
        let _ = client.served.await.unwrap();
        while tokio::runtime::Handle::current().metrics().num_alive_tasks() > 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(Arc::strong_count(&script), 1, "something is left after {cut} bytes");
    }
    assert_eq!(begun.elapsed().as_secs(), 0, "ended by a timeout only");
    assert!(script.seen().iter().any(|seen| seen == "GET a /3"));
}

#[tokio::test]
async fn exchange_may_live_on_another_thread() {
    let script = Script::new(|mut asked| async move {
        let (done, ended) = oneshot::channel();
        let elsewhere = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                asked.begin(200, &[]).unwrap();
                let mut size = 0;
                loop {
                    match asked.frame().await {
                        BodyFrame::Data { bytes, .. } => {
                            size += bytes.len();
                            asked.put(bytes, false).await.unwrap();
                        }
                        frame => break assert!(matches!(frame, BodyFrame::End), "{frame:?}"),
                    }
                }
                asked.put(format!("{size}!"), true).await.unwrap();
            });
            done.send(()).unwrap();
        });
        ended.await.unwrap();
        elsewhere.join().unwrap();
    });
    let mut client = connect(&script);
    client.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n").await;
    let (mut from, mut to) = tokio::io::split(client.stream);
    let sending = tokio::spawn(async move {
        for _ in 0..500 {
            let chunk = format!("3e8\r\n{}\r\n", "x".repeat(1000));
            to.write_all(chunk.as_bytes()).await.unwrap();
        }
        to.write_all(b"0\r\n\r\n").await.unwrap();
        to
    });
    let mut output = Vec::new();
    while !output.ends_with(b"500000!\r\n0\r\n\r\n") {
        assert_ne!(from.read_buf(&mut output).await.unwrap(), 0, "closed early");
    }
    sending.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn slow_head_is_told_so() {
    for sent in ["GET / HTTP/1.1\r\nHost", &format!("{GET}GET / HT")] {
        let mut client = connect(&ok());
        let begun = tokio::time::Instant::now();
        client.send(sent).await;
        if sent.starts_with(GET) {
            client.read_to("ok").await;
            // Only now is it known to be a head: it came with the request before it.
            client.send("TP").await;
        }
        let output = client.read_all().await;
        assert_eq!(begun.elapsed().as_secs(), 30);
        assert!(output.starts_with("HTTP/1.1 408 Request Timeout\r\n"), "{output:?}");
        assert!(output.contains("x-sidelane-error: client-timeout\r\n"), "{output:?}");
        assert!(matches!(client.served.await.unwrap(), Err(ConnectionError::HeadTimeout)));
    }
}

#[tokio::test(start_paused = true)]
async fn idle_connection_ends_without_a_word() {
    let mut client = connect(&ok());
    let begun = tokio::time::Instant::now();
    client.send(GET).await;
    client.read_to("ok").await;
    assert_eq!(client.read_all().await, "");
    assert_eq!(begun.elapsed().as_secs(), 75);
    client.served.await.unwrap().unwrap();

    let mut silent = connect(&ok());
    assert_eq!(silent.read_all().await, "");
    assert_eq!(begun.elapsed().as_secs(), 105);
    assert!(matches!(silent.served.await.unwrap(), Err(ConnectionError::HeadTimeout)));
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
    let mut client = connect(&script);
    client.send(GET).await;
    over.await.unwrap();
    let served = tokio::time::timeout(Duration::from_secs(300), client.served).await;
    assert!(matches!(served.unwrap().unwrap(), Err(ConnectionError::Stalled)));
}

#[tokio::test(start_paused = true)]
async fn slow_client_takes_a_response_that_is_over() {
    let script = Script::new(|mut asked| async move {
        asked.answer(200, &[], &"x".repeat(20 * 16 * 1024));
    });
    let mut client = connect(&script);
    client.send(GET).await;
    client.read_to("\r\n\r\n").await;
    for _ in 0..20 {
        // Five times the idle timeout in all, and never a whole one at once.
        tokio::time::sleep(Duration::from_secs(20)).await;
        client.stream.read_exact(&mut [0; 16 * 1024]).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn slow_service_is_no_idle_connection() {
    let script = Script::new(|mut asked| async move {
        tokio::time::sleep(Duration::from_secs(600)).await;
        asked.answer(200, &[], "late");
    });
    let mut client = connect(&script);
    client.send(GET).await;
    client.read_to("late").await;
}

#[tokio::test(start_paused = true)]
async fn http1_is_recognised_byte_by_byte() {
    for method in ["POST", "PUT", "PROPFIND", "PRIX", "P", "GET"] {
        let script = ok();
        let mut client = connect(&script);
        for byte in format!("{method} / HTTP/1.1\r\nHost: a\r\n\r\n").bytes() {
            client.send([byte]).await;
            tokio::task::yield_now().await;
        }
        client.read_to("ok").await;
        assert_eq!(script.seen(), [format!("{method} a /")]);
    }
}

#[tokio::test(start_paused = true)]
async fn upgrade_hands_over_every_byte() {
    let script = Script::new(|mut asked| async move {
        assert!(asked.head.can_upgrade);
        asked.responder.head(response(101, &[("upgrade", "line")]), None, true).unwrap();
        let mut stream = asked.responder.upgrade().await.unwrap();
        let mut line = [0; 6];
        stream.read_exact(&mut line).await.unwrap();
        stream.write_all(&line).await.unwrap();
        stream.shutdown().await.unwrap();
    });
    let mut client = connect(&script);
    client
        .send("GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: line\r\n\r\nahe")
        .await;
    let head = undated(&client.read_to("\r\n\r\n").await);
    assert_eq!(
        head,
        "HTTP/1.1 101 Switching Protocols\r\nupgrade: line\r\nconnection: upgrade\r\n\r\n"
    );
    client.served.await.unwrap().unwrap();
    client.stream.write_all(b"ad\n").await.unwrap();
    let mut rest = String::new();
    client.stream.read_to_string(&mut rest).await.unwrap();
    assert_eq!(rest, "ahead\n");
}

#[tokio::test(start_paused = true)]
async fn upgrade_fails_where_the_connection_is_dropped_first() {
    let (begun, begin) = Once::new();
    let (heard, code) = Once::new();
    let script = Script::new(move |mut asked| {
        let (begun, heard) = (Arc::clone(&begun), Arc::clone(&heard));
        async move {
            asked.responder.head(response(101, &[]), None, true).unwrap();
            begun.say(());
            heard.say(asked.responder.upgrade().await.map(drop).map_err(|(code, _)| code));
        }
    });
    // Too little room for the 101 to leave, so the stream cannot be handed over yet.
    let mut client = connect_through(&script, FrontConfig::default(), 16);
    client.send("GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n").await;
    begin.await.unwrap();
    tokio::task::yield_now().await;
    client.served.abort();
    assert_eq!(code.await.unwrap(), Err(failure::CLIENT_GONE));
}

#[tokio::test(start_paused = true)]
async fn upgrade_may_be_refused() {
    let script = Script::new(|mut asked| async move { asked.answer(403, &[], "no") });
    let mut client = connect(&script);
    let request = "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: line\r\n\r\n";
    client.send(request).await;
    client.read_to("no").await;
    client.send(request).await;
    client.read_to("no").await;
}

#[tokio::test(start_paused = true)]
async fn switching_unasked_is_the_plugins_fault() {
    let script = Script::new(|mut asked| async move {
        assert!(!asked.head.can_upgrade);
        assert_eq!(asked.begin(101, &[]), Err(Closed));
        let error = asked.responder.upgrade().await.err().unwrap();
        assert_eq!(error.0, failure::UNSUPPORTED);
    });
    let mut client = connect(&script);
    client.send(GET).await;
    assert!(client.read_to("\r\n\r\n").await.starts_with("HTTP/1.1 502 "));
}

#[tokio::test(start_paused = true)]
async fn h2c_upgrade_is_not_taken() {
    let script = ok();
    let mut client = connect(&script);
    client
        .send("GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n")
        .await;
    assert!(client.read_to("ok").await.starts_with("HTTP/1.1 200 OK\r\n"));
}
