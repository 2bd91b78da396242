//! The two listeners beside the data path, on a thread of their own: health (`/live`, `/ready`,
//! `/metrics`) and admin (`/config`, `/routes`, `/tunnels`, `/plugins`, `POST /-/reload`).
//!
//! Knows paths, texts and bounds; what there is to say it asks of an [`AdminState`]. Answers while
//! the data path is busy or stuck, which is when it is needed.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::pin::pin;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HOST, ORIGIN};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value as Json, json};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{sleep, timeout};

use crate::metrics;

/// Connections of one listener at once. Probes and scrapers are few; more wait in the backlog.
const CONNECTIONS_MAX: usize = 64;

/// Largest request head, the smallest that hyper takes.
const HEAD_BYTES_MAX: usize = 8 * 1024;

/// Most fields of a request head.
const HEADERS_MAX: usize = 64;

/// For a client to send a whole request head, the first and each further one.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// After this a connection takes no further request, so that idle ones do not hold their place.
const CONNECTION_AGE_MAX: Duration = Duration::from_secs(300);

/// For the last response of a connection to be read.
const LAST_RESPONSE_TIMEOUT: Duration = Duration::from_secs(30);

/// Wait after a failed accept: without descriptors it fails at once, again and again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Whether the process can do its work.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Readiness {
    /// Why not, a line each; empty: ready.
    pub reasons: Vec<String>,
}

/// What the listeners show. Called on the admin thread: must not wait for the data path.
pub trait AdminState: Send + Sync + 'static {
    /// Returns whether exchanges can be carried.
    fn ready(&self) -> Readiness;
    /// Returns whether the process should go on at all; a supervisor restarts it where not.
    fn live(&self) -> Readiness {
        Readiness::default()
    }
    /// Returns the metrics as text of type [`metrics::CONTENT_TYPE`].
    fn metrics(&self) -> String;
    /// Returns the effective configuration, masked.
    fn config(&self) -> Json;
    /// Returns the routes in use.
    fn routes(&self) -> Json;
    /// Returns the tunnels with their sessions.
    fn tunnels(&self) -> Json;
    /// Returns the plugins with their generations.
    fn plugins(&self) -> Json;
    /// Reads the configuration again; the answer, or what is wrong with it.
    fn reload(&self) -> impl Future<Output = Result<Json, String>> + Send;
}

/// Binds a listener for [`serve`].
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// The running listeners; they end when it is dropped.
#[derive(Debug)]
pub struct Server {
    stop: Option<oneshot::Sender<Infallible>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // Its panic was told by the panic hook.
            let _ = thread.join();
        }
    }
}

/// Serves on listeners of [`bind`], on a thread of its own.
pub fn serve<S: AdminState>(
    health: Option<TcpListener>,
    admin: Option<TcpListener>,
    state: Arc<S>,
) -> io::Result<Server> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let entered = runtime.enter();
    let listeners = [(Side::Health, health), (Side::Admin, admin)]
        .into_iter()
        .filter_map(|(side, listener)| Some((side, listener?)))
        .map(|(side, listener)| Ok((side, tokio::net::TcpListener::from_std(listener)?)))
        .collect::<io::Result<Vec<_>>>()?;
    drop(entered);
    let (stop, stopped) = oneshot::channel();
    let thread = std::thread::Builder::new().name("admin".to_owned()).spawn(move || {
        runtime.block_on(async move {
            for (side, listener) in listeners {
                tokio::spawn(accept(side, listener, state.clone()));
            }
            // Ends by the sender's drop; the runtime's drop then ends all tasks.
            let _ = stopped.await;
        });
    })?;
    Ok(Server { stop: Some(stop), thread: Some(thread) })
}

/// Which listener a request came in by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Health,
    Admin,
}

async fn accept<S: AdminState>(side: Side, listener: tokio::net::TcpListener, state: Arc<S>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let place = places.clone().acquire_owned().await.expect("the semaphore is never closed");
        match listener.accept().await {
            Ok((stream, _)) => {
                let state = state.clone();
                tokio::spawn(async move {
                    connection(side, stream, state).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(?side, %error, "a connection could not be accepted");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection<S: AdminState>(side: Side, stream: tokio::net::TcpStream, state: Arc<S>) {
    let service = service_fn(|request: Request<hyper::body::Incoming>| {
        let state = state.clone();
        async move { Ok::<_, Infallible>(respond(side, &request, &*state).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    let ended = match timeout(CONNECTION_AGE_MAX, connection.as_mut()).await {
        Ok(ended) => ended,
        Err(_) => {
            connection.as_mut().graceful_shutdown();
            timeout(LAST_RESPONSE_TIMEOUT, connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = ended {
        tracing::debug!(?side, %error, "a connection ended early");
    }
}

type Answer = Response<Full<Bytes>>;

async fn respond<S: AdminState, B>(side: Side, request: &Request<B>, state: &S) -> Answer {
    if side == Side::Admin
        && let Err(reason) = same_origin(request.headers())
    {
        return json_answer(StatusCode::FORBIDDEN, &json!({ "error": reason }));
    }
    let path = request.uri().path();
    let read = matches!(*request.method(), Method::GET | Method::HEAD);
    let answer = match (side, path) {
        (Side::Health, "/live") => readiness(&state.live()),
        (Side::Health, "/ready") => readiness(&state.ready()),
        (Side::Health, "/metrics") => {
            text_answer(StatusCode::OK, metrics::CONTENT_TYPE, state.metrics())
        }
        (Side::Health, "/") => index(HEALTH_INDEX),
        (Side::Admin, "/config") => json_answer(StatusCode::OK, &state.config()),
        (Side::Admin, "/routes") => json_answer(StatusCode::OK, &state.routes()),
        (Side::Admin, "/tunnels") => json_answer(StatusCode::OK, &state.tunnels()),
        (Side::Admin, "/plugins") => json_answer(StatusCode::OK, &state.plugins()),
        (Side::Admin, "/") => index(ADMIN_INDEX),
        (Side::Admin, "/-/reload") if *request.method() == Method::POST => {
            return match state.reload().await {
                Ok(answer) => json_answer(StatusCode::OK, &answer),
                Err(error) => {
                    json_answer(StatusCode::UNPROCESSABLE_ENTITY, &json!({ "error": error }))
                }
            };
        }
        (Side::Admin, "/-/reload") => return not_allowed("POST"),
        _ => {
            let error = json!({ "error": format!("no page {path}; / lists them") });
            return json_answer(StatusCode::NOT_FOUND, &error);
        }
    };
    if read { answer } else { not_allowed("GET, HEAD") }
}

const HEALTH_INDEX: &str = "\
sidelane: health

GET /live      200 while the process should go on
GET /ready     200 while exchanges can be carried, else 503 with reasons
GET /metrics   OpenMetrics
";

const ADMIN_INDEX: &str = "\
sidelane: administration

GET  /config     effective configuration, secrets masked
GET  /routes     routes in use
GET  /tunnels    tunnels with their sessions
GET  /plugins    plugins with their generations
POST /-/reload   read the configuration again
";

/// Keeps web pages out: a browser on this machine reaches loopback addresses for any page that asks,
/// by a name that resolves to one (DNS rebinding) or by a form that posts across origins.
fn same_origin(headers: &HeaderMap) -> Result<(), &'static str> {
    let text = |name| headers.get(name).map(|value: &HeaderValue| value.to_str().unwrap_or(""));
    let host = text(HOST).unwrap_or("");
    if !is_loopback(host) {
        return Err("the Host field names no loopback address");
    }
    match text(ORIGIN) {
        Some(origin) if origin.strip_prefix("http://") != Some(host) => {
            Err("the request comes from another origin")
        }
        _ => Ok(()),
    }
}

fn is_loopback(host: &str) -> bool {
    if let Ok(address) = host.parse::<SocketAddr>() {
        return address.ip().is_loopback();
    }
    let name = host.split_once(':').map_or(host, |(name, _)| name);
    let literal = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    name.eq_ignore_ascii_case("localhost")
        || literal.unwrap_or(name).parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn readiness(readiness: &Readiness) -> Answer {
    if readiness.reasons.is_empty() {
        json_answer(StatusCode::OK, &json!({ "status": "ok" }))
    } else {
        let body = json!({ "status": "unavailable", "reasons": readiness.reasons });
        json_answer(StatusCode::SERVICE_UNAVAILABLE, &body)
    }
}

fn index(text: &'static str) -> Answer {
    text_answer(StatusCode::OK, "text/plain; charset=utf-8", text.to_owned())
}

fn not_allowed(allowed: &'static str) -> Answer {
    let error = json!({ "error": format!("method not allowed (accepted: {allowed})") });
    let mut answer = json_answer(StatusCode::METHOD_NOT_ALLOWED, &error);
    answer.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
    answer
}

fn json_answer(status: StatusCode, value: &Json) -> Answer {
    // The alternate form is indented, for people; scripts do not mind.
    text_answer(status, "application/json", format!("{value:#}\n"))
}

fn text_answer(status: StatusCode, content_type: &'static str, text: String) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(text)));
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpStream;
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct State {
        reasons: Mutex<Vec<String>>,
        reload_fails: bool,
    }

    impl AdminState for State {
        fn ready(&self) -> Readiness {
            Readiness { reasons: self.reasons.lock().unwrap().clone() }
        }
        fn metrics(&self) -> String {
            metrics::Metrics::new().encode()
        }
        fn config(&self) -> Json {
            json!({ "version": 1 })
        }
        fn routes(&self) -> Json {
            json!([{ "name": "demo" }])
        }
        fn tunnels(&self) -> Json {
            json!([])
        }
        fn plugins(&self) -> Json {
            json!([])
        }
        async fn reload(&self) -> Result<Json, String> {
            if self.reload_fails { Err("c.yaml:1:1: bad".to_owned()) } else { Ok(json!({})) }
        }
    }

    struct Running {
        state: Arc<State>,
        health: SocketAddr,
        admin: SocketAddr,
        server: Server,
    }

    fn start(state: State) -> Running {
        let bind = || bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let (health, admin, state) = (bind(), bind(), Arc::new(state));
        let (health_at, admin_at) = (health.local_addr().unwrap(), admin.local_addr().unwrap());
        let server = serve(Some(health), Some(admin), state.clone()).unwrap();
        Running { state, health: health_at, admin: admin_at, server }
    }

    /// Sends a request and returns the whole response.
    fn ask(address: SocketAddr, request: &str, fields: &str) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let host =
            if fields.contains("Host:") { String::new() } else { format!("Host: {address}\r\n") };
        write!(stream, "{request} HTTP/1.1\r\n{host}{fields}Connection: close\r\n\r\n").unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).unwrap();
        response
    }

    #[track_caller]
    fn check(address: SocketAddr, request: &str, status: &str, part: &str) {
        let response = ask(address, request, "");
        assert!(response.starts_with(&format!("HTTP/1.1 {status}")), "{request}: {response}");
        assert!(response.contains(part), "{request}: {response}");
    }

    #[test]
    fn pages_answer_on_their_own_listener_only() {
        let running = start(State::default());
        check(running.health, "GET /live", "200", "\"ok\"");
        check(running.health, "GET /metrics", "200", "application/openmetrics-text; version=1.0.0");
        check(running.health, "GET /metrics", "200", "# EOF");
        check(running.health, "GET /", "200", "/ready");
        check(running.health, "GET /config", "404", "no page /config");
        check(running.admin, "GET /config?x", "200", "\"version\": 1");
        check(running.admin, "GET /routes", "200", "\"demo\"");
        check(running.admin, "GET /tunnels", "200", "[]");
        check(running.admin, "GET /plugins", "200", "[]");
        check(running.admin, "GET /", "200", "/-/reload");
        check(running.admin, "GET /live", "404", "no page /live");
    }

    #[test]
    fn readiness_tells_its_reasons() {
        let running = start(State::default());
        check(running.health, "GET /ready", "200", "\"ok\"");
        running.state.reasons.lock().unwrap().push("no session".to_owned());
        check(running.health, "GET /ready", "503", "\"no session\"");
        check(running.health, "GET /live", "200", "\"ok\"");
    }

    #[test]
    fn methods_are_checked() {
        let running = start(State::default());
        check(running.health, "POST /live", "405", "allow: GET, HEAD");
        check(running.admin, "DELETE /config", "405", "allow: GET, HEAD");
        check(running.admin, "GET /-/reload", "405", "allow: POST");
        let response = ask(running.health, "HEAD /live", "");
        assert!(
            response.starts_with("HTTP/1.1 200") && response.ends_with("\r\n\r\n"),
            "{response}"
        );
    }

    #[test]
    fn a_reload_tells_what_is_wrong() {
        check(start(State::default()).admin, "POST /-/reload", "200", "{}");
        let running = start(State { reload_fails: true, ..State::default() });
        check(running.admin, "POST /-/reload", "422", "c.yaml:1:1: bad");
    }

    #[test]
    fn pages_of_the_web_cannot_reach_admin() {
        let running = start(State::default());
        let status = |fields: &str| {
            ask(running.admin, "POST /-/reload", fields).split(' ').nth(1).unwrap().to_owned()
        };
        assert_eq!(status("Host: evil.example:9083\r\n"), "403");
        assert_eq!(status("Host: 192.0.2.1\r\n"), "403");
        assert_eq!(status("Host: localhost:9083\r\n"), "200");
        assert_eq!(status("Host: [::1]:9083\r\n"), "200");
        assert_eq!(status("Host: [::1]\r\n"), "200");
        assert_eq!(status("Origin: http://evil.example\r\n"), "403");
        assert_eq!(status("Origin: null\r\n"), "403");
        let own = format!("Origin: http://{}\r\n", running.admin);
        assert_eq!(status(&own), "200");
    }

    #[test]
    fn large_heads_are_refused() {
        let running = start(State::default());
        let fields = format!("X-Large: {}\r\n", "x".repeat(HEAD_BYTES_MAX));
        assert!(ask(running.health, "GET /live", &fields).starts_with("HTTP/1.1 431"));
        let fields = "X: y\r\n".repeat(HEADERS_MAX + 1);
        assert!(ask(running.health, "GET /live", &fields).starts_with("HTTP/1.1 431"));
    }

    #[test]
    fn connections_beyond_the_bound_wait_for_a_place() {
        let running = start(State::default());
        let connect = || {
            let stream = TcpStream::connect(running.health).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
            stream
        };
        let ask = |stream: &mut TcpStream| {
            write!(stream, "GET /live HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        };
        let answered = |stream: &mut TcpStream| {
            let mut response = Vec::new();
            while !response.ends_with(b"}\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                response.push(byte[0]);
            }
        };
        let mut held: Vec<TcpStream> = (0..CONNECTIONS_MAX)
            .map(|_| {
                let mut stream = connect();
                ask(&mut stream);
                answered(&mut stream);
                stream
            })
            .collect();
        let mut waiting = connect();
        ask(&mut waiting);
        // Round trips on the one thread that accepts: it had every chance to take the new one.
        for stream in &mut held {
            ask(stream);
            answered(stream);
        }
        waiting.set_nonblocking(true).unwrap();
        assert_eq!(waiting.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        waiting.set_nonblocking(false).unwrap();
        held.pop();
        answered(&mut waiting);
    }

    #[test]
    fn listeners_close_with_the_server() {
        let running = start(State::default());
        drop(running.server);
        bind(running.health).unwrap();
        bind(running.admin).unwrap();
    }
}
