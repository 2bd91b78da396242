//! The service behind `cargo demo`: a page that shows what arrived, and one path for each thing
//! that a tunnel must not break (streaming, events, large bodies, slowness, WebSockets).
//!
//! An ordinary HTTP/1.1 server; knows nothing of Sidelane.
#![allow(clippy::print_stdout, reason = "a program that says where it listens")]

mod websocket;

use std::convert::Infallible;
use std::fmt::Write as _;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, Sleep};

/// One chunk of `/download`: large enough that its framing costs nothing.
const CHUNK_BYTES: usize = 64 * 1024;
/// Largest `/download`. Bounds nothing here (it streams), but keeps a typo from filling a disk.
const DOWNLOAD_BYTES_MAX: u64 = 1 << 40;
/// Between two events of `/events`.
const EVENT_INTERVAL: Duration = Duration::from_secs(1);
/// Longest `/slow`.
const SLOW_MAX: Duration = Duration::from_secs(600);

type Payload = BoxBody<Bytes, hyper::Error>;

static REQUESTS: AtomicU64 = AtomicU64::new(0);

/// What `--help` says.
const USAGE: &str = "\
usage: sidelane-demo-service [ADDRESS]

A web page with a WebSocket echo, downloads, uploads, events and slow answers, to put a tunnel before.
ADDRESS is IP:port; default 127.0.0.1:$DEMO_PORT, with DEMO_PORT 3000 where it is not set.";

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let address = match (arguments.next(), arguments.next()) {
        (Some(help), _) if help == "--help" || help == "-h" => {
            println!("{USAGE}");
            return Ok(());
        }
        (Some(address), None) if !address.starts_with('-') => address,
        (None, _) => {
            let port = std::env::var("DEMO_PORT").unwrap_or_else(|_| "3000".to_owned());
            format!("127.0.0.1:{port}")
        }
        _ => {
            eprintln!("arguments not understood\n{USAGE}");
            std::process::exit(2);
        }
    };
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(serve(&address))
}

async fn serve(address: &str) -> Result<()> {
    let listener =
        TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
    println!("demo service on http://{}/", listener.local_addr()?);
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => drop(tokio::spawn(connection(stream))),
                // Out of descriptors: the next accept may succeed.
                Err(error) => eprintln!("accept: {error}"),
            },
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
        }
    }
}

async fn connection(stream: TcpStream) {
    // Failure to set it costs latency only.
    let _ = stream.set_nodelay(true);
    let served = hyper::server::conn::http1::Builder::new()
        .half_close(true)
        .serve_connection(TokioIo::new(stream), service_fn(answer))
        .with_upgrades()
        .await;
    if let Err(error) = served {
        eprintln!("connection: {error}");
    }
}

async fn answer(request: Request<Incoming>) -> Result<Response<Payload>, Infallible> {
    let count = REQUESTS.fetch_add(1, Ordering::Relaxed) + 1;
    let query = request.uri().query().unwrap_or_default().to_owned();
    let response = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/") => html(page(&request, count)),
        (_, "/echo") => echo(request),
        (&Method::GET, "/events") => events(),
        (&Method::GET, "/ws") => websocket::upgrade(request),
        (&Method::GET | &Method::HEAD, "/download") => download(&query),
        (_, "/slow") => slow(&query).await,
        (_, "/") => text(StatusCode::METHOD_NOT_ALLOWED, "try GET\n".to_owned()),
        (_, path) => text(StatusCode::NOT_FOUND, format!("nothing at {path}\n")),
    };
    Ok(response)
}

/// Returns the value of `name` in a query such as `bytes=10&x=1`.
fn parameter<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
}

fn text(status: StatusCode, body: String) -> Response<Payload> {
    respond(status, "text/plain; charset=utf-8", full(body))
}

fn html(body: String) -> Response<Payload> {
    respond(StatusCode::OK, "text/html; charset=utf-8", full(body))
}

fn full(body: String) -> Payload {
    Full::new(Bytes::from(body)).map_err(|never| match never {}).boxed()
}

fn respond(status: StatusCode, content_type: &'static str, body: Payload) -> Response<Payload> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// `/echo`: the body comes back as it arrives.
fn echo(request: Request<Incoming>) -> Response<Payload> {
    let content_type = request.headers().get(header::CONTENT_TYPE).cloned();
    let mut response =
        respond(StatusCode::OK, "application/octet-stream", request.into_body().boxed());
    if let Some(content_type) = content_type {
        response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    }
    response
}

/// `/download?bytes=N`: exactly N bytes, streamed, with their length in front.
fn download(query: &str) -> Response<Payload> {
    let wanted = parameter(query, "bytes").unwrap_or("1048576").parse::<u64>();
    match wanted {
        Ok(bytes) if bytes <= DOWNLOAD_BYTES_MAX => respond(
            StatusCode::OK,
            "application/octet-stream",
            Download { left: bytes, chunk: Bytes::from(vec![b'.'; CHUNK_BYTES]) }
                .map_err(|never| match never {})
                .boxed(),
        ),
        _ => text(
            StatusCode::BAD_REQUEST,
            format!("bytes: a number up to {DOWNLOAD_BYTES_MAX}, in /download?bytes=1000000\n"),
        ),
    }
}

/// `/events`: one server-sent event a second, for as long as the client listens.
fn events() -> Response<Payload> {
    let body = Events { count: 0, next: Box::pin(tokio::time::sleep(Duration::ZERO)) };
    let mut response =
        respond(StatusCode::OK, "text/event-stream", body.map_err(|never| match never {}).boxed());
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

/// `/slow?ms=N`: answers late.
async fn slow(query: &str) -> Response<Payload> {
    let wait = parameter(query, "ms").unwrap_or("2000").parse().map(Duration::from_millis);
    match wait {
        Ok(wait) if wait <= SLOW_MAX => {
            tokio::time::sleep(wait).await;
            text(StatusCode::OK, format!("after {} ms\n", wait.as_millis()))
        }
        _ => text(
            StatusCode::BAD_REQUEST,
            format!("ms: a number up to {}, in /slow?ms=2000\n", SLOW_MAX.as_millis()),
        ),
    }
}

struct Download {
    left: u64,
    chunk: Bytes,
}

impl Body for Download {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut TaskContext<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        let length = usize::try_from(self.left).unwrap_or(usize::MAX).min(self.chunk.len());
        self.left -= length as u64;
        Poll::Ready(Some(Ok(Frame::data(self.chunk.slice(..length)))))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

struct Events {
    count: u64,
    next: Pin<Box<Sleep>>,
}

impl Body for Events {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.next.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        self.count += 1;
        self.next.as_mut().reset(Instant::now() + EVENT_INTERVAL);
        let event = format!("id: {0}\ndata: event {0}\n\n", self.count);
        Poll::Ready(Some(Ok(Frame::data(Bytes::from(event)))))
    }
}

/// The page: what arrived, as the service saw it.
fn page(request: &Request<Incoming>, count: u64) -> String {
    let mut rows = String::new();
    for (name, value) in request.headers() {
        let value = String::from_utf8_lossy(value.as_bytes());
        // Writing to a string cannot fail.
        let _ = writeln!(rows, "<tr><th>{}</th><td>{}</td></tr>", name, escape(&value));
    }
    let target = request.uri().path_and_query().map_or("/", |target| target.as_str());
    PAGE.replace("{method}", &escape(request.method().as_str()))
        .replace("{version}", &format!("{:?}", request.version()))
        .replace("{count}", &count.to_string())
        .replace("{target}", &escape(target))
        .replace("{rows}", &rows)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

const PAGE: &str = include_str!("page.html");

#[cfg(test)]
mod tests {
    use super::{escape, parameter};

    #[test]
    fn parameter_is_found_by_its_whole_name() {
        assert_eq!(parameter("bytes=10", "bytes"), Some("10"));
        assert_eq!(parameter("x=1&bytes=10", "bytes"), Some("10"));
        assert_eq!(parameter("kilobytes=10", "bytes"), None);
        assert_eq!(parameter("bytesize=10", "bytes"), None);
        assert_eq!(parameter("", "bytes"), None);
    }

    #[test]
    fn what_a_client_sent_cannot_become_markup() {
        assert_eq!(escape("<a href=\"x\">&"), "&lt;a href=&quot;x&quot;&gt;&amp;");
    }
}
