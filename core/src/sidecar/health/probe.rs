//! One look at a service: over its own connection, dialled as exchanges' are, within a time.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use http::{Method, Request, StatusCode, Version, header};
use http_body_util::Empty;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;

use crate::config::{HealthCheck, HttpVersion, Probe, ServiceAddress, Tunnel};
use crate::error::chain;
use crate::plugin::lend::{Connected, Stream};
use crate::sidecar::proxy_header::Origin;
use crate::sidecar::service::dial::Dialer;
use crate::tls::{H2_ALPN, HTTP1_ALPN};

/// Most bytes of an answer's head that are read: a health page has few fields.
const HEAD_BYTES_MAX: usize = 16 * 1024;

/// Most fields of an answer's head.
const HEAD_FIELDS_MAX: usize = 100;

/// Most bytes of a `HealthCheckResponse` that are read: it has one number.
const MESSAGE_BYTES_MAX: usize = 1024;

/// Bytes before a gRPC message: whether it is compressed, and its length.
const PREFIX_BYTES: usize = 5;

/// `SERVING` of `grpc.health.v1.HealthCheckResponse.ServingStatus`.
const SERVING: u64 = 1;

/// Returns whether the service is well; else one line that says why not.
pub(super) async fn probe(
    tunnel: &Tunnel,
    dialer: &Dialer,
    check: &HealthCheck,
) -> Result<(), String> {
    match tokio::time::timeout(check.timeout, ask(tunnel, dialer, &check.probe)).await {
        Ok(answered) => answered,
        Err(_) => Err(format!("no answer within {:?}", check.timeout)),
    }
}

/// Returns whether the service accepts connections, within the tunnel's connect timeout.
pub(super) async fn accepts(tunnel: &Tunnel, dialer: &Dialer) -> bool {
    matches!(tokio::time::timeout(tunnel.connect_timeout, dialer.accepts()).await, Ok(true))
}

/// What is offered by ALPN for a probe, as for exchanges.
fn offered(tunnel: &Tunnel, probe: &Probe) -> &'static [&'static [u8]] {
    match (probe, tunnel.http_version) {
        (Probe::Grpc { .. }, _) | (_, HttpVersion::Http2) => &[H2_ALPN],
        (_, HttpVersion::Auto) => &[H2_ALPN, HTTP1_ALPN],
        (_, HttpVersion::Http1) => &[HTTP1_ALPN],
    }
}

async fn ask(tunnel: &Tunnel, dialer: &Dialer, probe: &Probe) -> Result<(), String> {
    let offered = offered(tunnel, probe);
    let protocols = offered.iter().map(|protocol| protocol.to_vec()).collect();
    let Connected { stream, protocol } = dialer
        .dial(Origin::Own, protocols)
        .await
        .map_err(|error| format!("cannot connect: {}", error.reason()))?;
    let is_tls = tunnel.tls.is_some();
    let agreed = protocol.and_then(|protocol| offered.get(protocol)).copied();
    let by_h2 = if is_tls { agreed == Some(H2_ALPN) } else { offered == [H2_ALPN] };
    if offered == [H2_ALPN] && !by_h2 && !matches!(probe, Probe::Tcp) {
        return Err("the service did not agree on HTTP/2 (ALPN)".to_owned());
    }
    let scheme = if is_tls { "https" } else { "http" };
    match probe {
        Probe::Tcp => Ok(()),
        Probe::Http { path, host } => {
            let host = host.as_deref().map_or_else(|| authority(tunnel), ToOwned::to_owned);
            let status = if by_h2 {
                http2_status(stream, scheme, path, &host).await?
            } else {
                http1_status(stream, path, &host).await?
            };
            let is_good = status.is_success() || status.is_redirection();
            if is_good { Ok(()) } else { Err(format!("answered {}", status.as_u16())) }
        }
        Probe::Grpc { service } => grpc(stream, scheme, &authority(tunnel), service).await,
    }
}

/// What stands for the service's name in a request.
fn authority(tunnel: &Tunnel) -> String {
    match &tunnel.service {
        ServiceAddress::Tcp(address) => address.to_string(),
        ServiceAddress::Unix(_) => "localhost".to_owned(),
    }
}

async fn http1_status(
    stream: Box<dyn Stream>,
    path: &str,
    host: &str,
) -> Result<StatusCode, String> {
    let request = Request::get(path)
        .header(header::HOST, host)
        .header(header::USER_AGENT, "sidelane-health")
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| format!("the request cannot be made: {error}"))?;
    let failed = |error: hyper::Error| format!("no answer: {}", chain(&error));
    let (mut sender, connection) = http1::Builder::new()
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEAD_FIELDS_MAX)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(failed)?;
    let exchange = async { sender.send_request(request).await.map(|r| r.status()).map_err(failed) };
    driven(async { connection.await.map_err(failed) }, exchange).await
}

/// Drives the connection until the exchange on it is through. Its end is told to the exchange too, and
/// more exactly: an answer may be there when the connection ends.
async fn driven<T>(
    connection: impl Future<Output = Result<(), String>>,
    exchange: impl Future<Output = Result<T, String>>,
) -> Result<T, String> {
    let (mut connection, mut exchange) = (pin!(connection), pin!(exchange));
    let mut ended = None;
    poll_fn(|cx| {
        if ended.is_none()
            && let Poll::Ready(end) = connection.as_mut().poll(cx)
        {
            ended = Some(end);
        }
        match (exchange.as_mut().poll(cx), &ended) {
            (Poll::Pending, Some(Ok(()))) => {
                Poll::Ready(Err("no answer: the connection was closed".to_owned()))
            }
            (Poll::Pending, Some(Err(error))) => Poll::Ready(Err(error.clone())),
            (polled, _) => polled,
        }
    })
    .await
}

type Answer = (http::response::Parts, h2::RecvStream);

/// Sends a request over HTTP/2, and hands what comes to `read`.
async fn http2<T>(
    stream: Box<dyn Stream>,
    request: Request<()>,
    body: Option<Bytes>,
    read: impl AsyncFnOnce(Answer) -> Result<T, String>,
) -> Result<T, String> {
    let failed = |error: h2::Error| format!("no answer: {error}");
    let (sender, connection) = h2::client::Builder::new()
        .enable_push(false)
        .max_header_list_size(u32::try_from(HEAD_BYTES_MAX).expect("a small number"))
        .handshake::<_, Bytes>(stream)
        .await
        .map_err(failed)?;
    let exchange = async {
        let mut sender = sender.ready().await.map_err(failed)?;
        let (response, mut sending) =
            sender.send_request(request, body.is_none()).map_err(failed)?;
        if let Some(body) = body {
            sending.send_data(body, true).map_err(failed)?;
        }
        let (head, body) = response.await.map_err(failed)?.into_parts();
        read((head, body)).await
    };
    driven(async { connection.await.map_err(failed) }, exchange).await
}

fn http2_request(
    method: Method,
    scheme: &str,
    authority: &str,
    path: &str,
) -> Result<Request<()>, String> {
    Request::builder()
        .method(method)
        .uri(format!("{scheme}://{authority}{path}"))
        .version(Version::HTTP_2)
        .header(header::USER_AGENT, "sidelane-health")
        .body(())
        .map_err(|error| format!("the request cannot be made: {error}"))
}

async fn http2_status(
    stream: Box<dyn Stream>,
    scheme: &str,
    path: &str,
    host: &str,
) -> Result<StatusCode, String> {
    let request = http2_request(Method::GET, scheme, host, path)?;
    http2(stream, request, None, async |(head, _)| Ok(head.status)).await
}

/// `grpc.health.v1.Health/Check`, by hand: a message with one text, and one with one number.
async fn grpc(
    stream: Box<dyn Stream>,
    scheme: &str,
    authority: &str,
    service: &str,
) -> Result<(), String> {
    let path = "/grpc.health.v1.Health/Check";
    let mut request = http2_request(Method::POST, scheme, authority, path)?;
    let headers = request.headers_mut();
    headers.insert(header::CONTENT_TYPE, http::HeaderValue::from_static("application/grpc"));
    headers.insert(header::TE, http::HeaderValue::from_static("trailers"));
    let status = http2(stream, request, Some(asking_for(service)), read_status).await?;
    match status {
        SERVING => Ok(()),
        0 => Err("its status is UNKNOWN".to_owned()),
        2 => Err("its status is NOT_SERVING".to_owned()),
        3 => Err("its status is SERVICE_UNKNOWN".to_owned()),
        other => Err(format!("its status is {other}")),
    }
}

fn asking_for(service: &str) -> Bytes {
    let mut message = BytesMut::new();
    if !service.is_empty() {
        message.put_u8(0x0a);
        let mut length = service.len();
        while length >= 0x80 {
            message.put_u8(u8::try_from(length & 0x7f).expect("seven bits") | 0x80);
            length >>= 7;
        }
        message.put_u8(u8::try_from(length).expect("seven bits"));
        message.put_slice(service.as_bytes());
    }
    let mut body = BytesMut::with_capacity(PREFIX_BYTES + message.len());
    body.put_u8(0);
    body.put_u32(u32::try_from(message.len()).expect("a name from a file"));
    body.put(message);
    body.freeze()
}

async fn read_status((head, mut body): Answer) -> Result<u64, String> {
    if head.status != StatusCode::OK {
        return Err(format!("answered {}", head.status.as_u16()));
    }
    refusal(&head.headers)?;
    let mut message = BytesMut::new();
    while let Some(data) = poll_fn(|cx| body.poll_data(cx)).await {
        let data = data.map_err(|error| format!("the answer broke off: {error}"))?;
        let _ = body.flow_control().release_capacity(data.len());
        message.extend_from_slice(&data);
        if message.len() > MESSAGE_BYTES_MAX {
            return Err("the answer is no health status".to_owned());
        }
    }
    let trailers = poll_fn(|cx| body.poll_trailers(cx)).await;
    if let Ok(Some(trailers)) = trailers {
        refusal(&trailers)?;
    }
    decode(&message).ok_or_else(|| "the answer is no health status".to_owned())
}

/// What a `grpc-status` other than 0 says.
fn refusal(fields: &http::HeaderMap) -> Result<(), String> {
    match fields.get("grpc-status") {
        Some(status) if status.as_bytes() != b"0" => {
            Err(format!("answered grpc-status {}", status.as_bytes().escape_ascii()))
        }
        _ => Ok(()),
    }
}

/// Reads the one message, and in it the one number; other fields are skipped.
fn decode(mut body: &[u8]) -> Option<u64> {
    if body.len() < PREFIX_BYTES || body.get_u8() != 0 {
        return None;
    }
    let length = usize::try_from(body.get_u32()).ok()?;
    let mut message = body.get(..length)?;
    let mut status = 0;
    while !message.is_empty() {
        let key = varint(&mut message)?;
        match key & 7 {
            0 => {
                let value = varint(&mut message)?;
                if key >> 3 == 1 {
                    status = value;
                }
            }
            1 => message = message.get(8..)?,
            2 => {
                let length = usize::try_from(varint(&mut message)?).ok()?;
                message = message.get(length..)?;
            }
            5 => message = message.get(4..)?,
            _ => return None,
        }
    }
    Some(status)
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, UnixListener};

    use super::*;
    use crate::config::{HostPort, Pool, ProxyVersion};
    use crate::sidecar::service::tests::{Authority, Makings, Service};

    fn tunnel(service: ServiceAddress) -> Arc<Tunnel> {
        Arc::new(Tunnel {
            name: "t".into(),
            service,
            protocols: None,
            connect_timeout: Duration::from_secs(5),
            tls: None,
            http_version: HttpVersion::Http1,
            pool: Pool::default(),
            proxy_protocol: None,
            health_check: None,
            wait: Duration::ZERO,
            weight: 1,
        })
    }

    async fn look(tunnel: &Arc<Tunnel>, check: &HealthCheck) -> Result<(), String> {
        probe(tunnel, &Dialer::new(tunnel), check).await
    }

    async fn listen() -> (TcpListener, Arc<Tunnel>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let host_port = HostPort { host: "127.0.0.1".into(), port: address.port() };
        (listener, tunnel(ServiceAddress::Tcp(host_port)))
    }

    fn check(probe: Probe, timeout: Duration) -> HealthCheck {
        HealthCheck {
            probe,
            interval: Duration::from_secs(1),
            timeout,
            healthy_after: 1,
            unhealthy_after: 1,
        }
    }

    fn http(host: Option<&str>) -> Probe {
        Probe::Http { path: "/healthz?q=1".into(), host: host.map(Into::into) }
    }

    const LONG: Duration = Duration::from_secs(30);

    /// Answers one request with `answer`; what came.
    async fn answer_once(mut stream: impl Stream, answer: &[u8]) -> String {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        stream.write_all(answer).await.unwrap();
        String::from_utf8(head).unwrap()
    }

    #[tokio::test]
    async fn an_answer_from_200_to_399_is_good() {
        for (answer, expected) in [
            (&b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"[..], Ok(())),
            (b"HTTP/1.1 204 No Content\r\n\r\n", Ok(())),
            (b"HTTP/1.0 301 Moved\r\n\r\n", Ok(())),
            (b"HTTP/1.1 404 Not Found\r\n\r\n", Err("answered 404")),
            (b"HTTP/1.1 503 No\r\n\r\n", Err("answered 503")),
            (b"hello\r\n\r\n", Err("no answer: ")),
            (b"", Err("no answer: ")),
        ] {
            let (listener, tunnel) = listen().await;
            let check = check(http(Some("app.local")), LONG);
            let serve = async {
                let (stream, _) = listener.accept().await.unwrap();
                answer_once(stream, answer).await
            };
            let (result, head) = tokio::join!(look(&tunnel, &check), serve);
            assert!(head.starts_with("GET /healthz?q=1 HTTP/1.1\r\nhost: app.local\r\n"), "{head}");
            match expected {
                Ok(()) => assert_eq!(result, Ok(())),
                Err(start) => {
                    let reason = result.unwrap_err();
                    assert!(reason.starts_with(start) && !reason.contains('\n'), "{reason}");
                }
            }
        }
    }

    #[tokio::test]
    async fn a_head_that_is_too_long_is_no_answer() {
        let (listener, tunnel) = listen().await;
        let answer = format!("HTTP/1.1 200 OK\r\na: {}\r\n\r\n", "x".repeat(2 * HEAD_BYTES_MAX));
        let serve = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut room = [0; 1024];
            let _ = stream.read(&mut room).await;
            // The reader may be gone before the end.
            let _ = stream.write_all(answer.as_bytes()).await;
        };
        let check = check(http(None), LONG);
        let (result, ()) = tokio::join!(look(&tunnel, &check), serve);
        assert!(result.unwrap_err().starts_with("no answer: "));
    }

    #[tokio::test]
    async fn a_service_that_says_nothing_has_a_time() {
        let (listener, tunnel) = listen().await;
        let check = check(http(None), Duration::from_millis(1));
        let reason = look(&tunnel, &check).await.unwrap_err();
        assert_eq!(reason, "no answer within 1ms");
        drop(listener);
    }

    #[tokio::test]
    async fn a_connection_is_all_that_tcp_asks_for() {
        let (listener, tunnel) = listen().await;
        let check = check(Probe::Tcp, LONG);
        assert_eq!(look(&tunnel, &check).await, Ok(()));
        assert!(accepts(&tunnel, &Dialer::new(&tunnel)).await);
        drop(listener);
        assert!(look(&tunnel, &check).await.unwrap_err().starts_with("cannot connect: "));
        assert!(!accepts(&tunnel, &Dialer::new(&tunnel)).await);
    }

    #[tokio::test]
    async fn a_unix_socket_is_asked_like_any_and_told_whose_connection_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("app.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let mut tunnel = tunnel(ServiceAddress::Unix(Arc::from(path)));
        Arc::make_mut(&mut tunnel).proxy_protocol = Some(ProxyVersion::V1);
        let serve = async {
            let (stream, _) = listener.accept().await.unwrap();
            answer_once(stream, b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await
        };
        let check = check(http(None), LONG);
        let (result, head) = tokio::join!(look(&tunnel, &check), serve);
        assert_eq!(result, Ok(()));
        let expected = "PROXY UNKNOWN\r\nGET /healthz?q=1 HTTP/1.1\r\nhost: localhost\r\n";
        assert!(head.starts_with(expected), "{head}");
    }

    /// Answers one request over HTTP/2; its path and body.
    async fn answer_h2(
        stream: impl Stream,
        response: http::Response<()>,
        body: &'static [u8],
        status: Option<&'static str>,
    ) -> (String, Vec<u8>) {
        let mut connection = h2::server::handshake(stream).await.unwrap();
        let (request, mut respond) = connection.accept().await.unwrap().unwrap();
        let path = request.uri().path().to_owned();
        let mut sending = respond.send_response(response, false).unwrap();
        sending.send_data(Bytes::from_static(body), status.is_none()).unwrap();
        if let Some(status) = status {
            let mut trailers = http::HeaderMap::new();
            trailers.insert("grpc-status", http::HeaderValue::from_static(status));
            sending.send_trailers(trailers).unwrap();
        }
        let mut stream = request.into_body();
        let read = async {
            let mut got = Vec::new();
            while let Some(Ok(data)) = stream.data().await {
                got.extend_from_slice(&data);
            }
            got
        };
        let drive = async { while connection.accept().await.is_some() {} };
        let (got, ()) = tokio::join!(read, drive);
        (path, got)
    }

    #[tokio::test]
    async fn grpc_is_asked_for_the_service_and_serving_is_good() {
        let ok = || http::Response::new(());
        let not_found = || http::Response::builder().status(404).body(()).unwrap();
        for (response, body, status, expected) in [
            (ok(), &b"\0\0\0\0\x02\x08\x01"[..], Some("0"), Ok(())),
            // A field that is not known.
            (ok(), b"\0\0\0\0\x06\x12\x02ab\x08\x01", Some("0"), Ok(())),
            (ok(), b"\0\0\0\0\x02\x08\x02", Some("0"), Err("its status is NOT_SERVING")),
            (ok(), b"\0\0\0\0\0", Some("0"), Err("its status is UNKNOWN")),
            (ok(), b"", Some("5"), Err("answered grpc-status 5")),
            (ok(), b"\0\0\0\0\x09\x08\x01", Some("0"), Err("the answer is no health status")),
            (ok(), b"\x01\0\0\0\x02\x08\x01", Some("0"), Err("the answer is no health status")),
            (not_found(), b"\0\0\0\0\x02\x08\x01", None, Err("answered 404")),
        ] {
            let (listener, tunnel) = listen().await;
            let check = check(Probe::Grpc { service: "app".into() }, LONG);
            let serve = async {
                let (stream, _) = listener.accept().await.unwrap();
                answer_h2(stream, response, body, status).await
            };
            let (result, (path, got)) = tokio::join!(look(&tunnel, &check), serve);
            assert_eq!(path, "/grpc.health.v1.Health/Check");
            assert_eq!(got, b"\0\0\0\0\x05\x0a\x03app");
            assert_eq!(result, expected.map_err(str::to_owned));
        }
    }

    #[tokio::test]
    async fn a_service_of_http_2_is_asked_over_it() {
        let (listener, mut tunnel) = listen().await;
        Arc::make_mut(&mut tunnel).http_version = HttpVersion::Http2;
        let check = check(http(Some("app.local")), LONG);
        let serve = async {
            let (stream, _) = listener.accept().await.unwrap();
            answer_h2(stream, http::Response::new(()), b"ok", None).await
        };
        let (result, (path, _)) = tokio::join!(look(&tunnel, &check), serve);
        assert_eq!((result, &*path), (Ok(()), "/healthz"));
    }

    /// A service by TLS that agrees on one of `alpn`.
    async fn by_tls(alpn: &'static [&'static [u8]]) -> Service {
        let authority = Authority::new("ours");
        let mut makings = Makings::of(authority.sign(|_| {}));
        makings.alpn = alpn;
        makings.serve(authority.trust()).await
    }

    #[tokio::test]
    async fn a_service_by_tls_is_asked_over_what_it_chooses() {
        let service = by_tls(&[b"h2", b"http/1.1"]).await;
        let tunnel = Arc::new(service.tunnel.clone());
        let check = check(http(Some("app.local")), LONG);
        let serve = async {
            let stream = service.accept().await.unwrap();
            answer_h2(stream, http::Response::new(()), b"ok", None).await
        };
        let (result, (path, _)) = tokio::join!(look(&tunnel, &check), serve);
        assert_eq!((result, &*path), (Ok(()), "/healthz"));

        let service = by_tls(&[]).await;
        let tunnel = Arc::new(service.tunnel.clone());
        let serve = async {
            let stream = service.accept().await.unwrap();
            answer_once(stream, b"HTTP/1.1 204 No Content\r\n\r\n").await
        };
        let (result, head) = tokio::join!(look(&tunnel, &check), serve);
        assert_eq!(result, Ok(()));
        assert!(head.starts_with("GET /healthz?q=1 HTTP/1.1\r\n"), "{head}");
    }

    #[tokio::test]
    async fn grpc_by_tls_must_be_agreed_on() {
        let service = by_tls(&[]).await;
        let tunnel = Arc::new(service.tunnel.clone());
        let check = check(Probe::Grpc { service: String::new().into() }, LONG);
        let (result, _served) = tokio::join!(look(&tunnel, &check), service.accept());
        assert_eq!(result, Err("the service did not agree on HTTP/2 (ALPN)".to_owned()));
    }

    #[tokio::test]
    async fn tcp_by_tls_is_a_handshake_and_waiting_is_none() {
        let mut service = by_tls(&[]).await;
        let check = check(Probe::Tcp, LONG);
        let tunnel = Arc::new(service.tunnel.clone());
        let (result, served) = tokio::join!(look(&tunnel, &check), service.accept());
        assert!(result.is_ok() && served.is_ok());
        service.tls().trust = Authority::new("theirs").trust();
        let tunnel = Arc::new(service.tunnel.clone());
        let (result, _served) = tokio::join!(look(&tunnel, &check), service.accept());
        let reason = result.unwrap_err();
        assert!(reason.starts_with("cannot connect: the service's certificate is"), "{reason}");
        assert!(reason.contains("`tls.ca`"), "{reason}");
        assert!(accepts(&tunnel, &Dialer::new(&tunnel)).await);
    }

    #[test]
    fn a_long_name_is_encoded_as_protobuf_does() {
        let body = asking_for(&"a".repeat(300));
        assert_eq!(&body[..8], b"\0\0\0\x01\x2f\x0a\xac\x02");
        assert_eq!(body.len(), PREFIX_BYTES + 303);
        assert_eq!(&asking_for("")[..], b"\0\0\0\0\0");
    }
}
