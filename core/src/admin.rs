//! The two listeners beside the data path, on a thread of their own: health (`/live`, `/ready`,
//! `/metrics`) and admin (`/config`, `/routes`, `/tunnels`, `/plugins`, `/explain`, `POST /-/reload`,
//! `POST /-/drain`).
//!
//! Knows paths, texts and bounds; what there is to say it asks of an [`AdminState`]. Answers while
//! the data path is busy or stuck, which is when it is needed.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HOST, ORIGIN};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value as Json, json};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};

use crate::explain::Question;

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

/// How long a client waits for a reload: reading and plugins' checks are a matter of moments.
const RELOAD_TIMEOUT: Duration = Duration::from_secs(30);

/// Content type of the metrics.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Whether exchanges can be carried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Readiness {
    /// They can.
    pub ready: bool,
    /// Why not, a line each.
    pub reasons: Vec<String>,
}

/// Somebody asks for a reload.
#[derive(Debug)]
pub struct ReloadRequest {
    /// What became of it, or what is wrong with the configuration.
    pub reply: oneshot::Sender<Result<String, String>>,
}

/// What the listeners show. Called on the admin thread: must not wait for the data path.
pub trait AdminState: Send + Sync + 'static {
    /// Returns whether the process should go on at all; a supervisor restarts it where not.
    fn is_live(&self) -> bool;
    /// Returns whether exchanges can be carried.
    fn readiness(&self) -> Readiness;
    /// Writes the metrics in the OpenMetrics text format.
    fn metrics(&self, out: &mut String);
    /// Returns the effective configuration, masked.
    fn config(&self) -> Json;
    /// Returns the routes in use.
    fn routes(&self) -> Json;
    /// Returns the tunnels with their sessions.
    fn tunnels(&self) -> Json;
    /// Returns the plugins with their generations.
    fn plugins(&self) -> Json;
    /// Says what would become of a request.
    ///
    /// # Errors
    /// What it asks for that is not there, for people.
    fn explain(&self, question: &Question) -> Result<Json, String>;
    /// Where requests for a reload go.
    fn reloads(&self) -> mpsc::Sender<ReloadRequest>;
    /// Has others send nothing new here, or ends the process too; returns what is left. Asked again it changes
    /// nothing.
    fn drain(&self, is_end: bool) -> Json;
    /// Says how far the process is on its way out, and what is left.
    fn draining(&self) -> Json;
}

/// Serves on the listeners, on a thread of its own, until the process ends.
///
/// # Errors
/// The system's, where the thread cannot be made or a socket not be used.
pub fn start(
    state: Arc<dyn AdminState>,
    health: Option<TcpListener>,
    admin: Option<TcpListener>,
) -> io::Result<Listeners> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let listeners =
        Listeners { state, runtime: runtime.handle().clone(), accepting: Mutex::default() };
    listeners.replace(Side::Health, health)?;
    listeners.replace(Side::Admin, admin)?;
    std::thread::Builder::new()
        .name("admin".to_owned())
        .spawn(move || runtime.block_on(std::future::pending::<()>()))?;
    Ok(listeners)
}

/// The listeners that are served, at most one of each side.
pub struct Listeners {
    state: Arc<dyn AdminState>,
    runtime: tokio::runtime::Handle,
    accepting: Mutex<HashMap<Side, AbortHandle>>,
}

impl Listeners {
    /// Serves one side on another listener, or on none: the one before closes once the new one
    /// accepts, and requests that came by it are answered still.
    ///
    /// # Errors
    /// The system's, where the socket cannot be used; the one before goes on then.
    pub fn replace(&self, side: Side, listener: Option<TcpListener>) -> io::Result<()> {
        let task = match listener {
            Some(listener) => {
                listener.set_nonblocking(true)?;
                let entered = self.runtime.enter();
                let listener = tokio::net::TcpListener::from_std(listener)?;
                drop(entered);
                let accepting = accept(side, listener, Arc::clone(&self.state));
                Some(self.runtime.spawn(accepting).abort_handle())
            }
            None => None,
        };
        let mut accepting = self.accepting.lock().unwrap_or_else(PoisonError::into_inner);
        let old = match task {
            Some(task) => accepting.insert(side, task),
            None => accepting.remove(&side),
        };
        if let Some(old) = old {
            old.abort();
        }
        Ok(())
    }
}

/// Which listener a request came in by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// Health and metrics.
    Health,
    /// Administration.
    Admin,
}

async fn accept(side: Side, listener: tokio::net::TcpListener, state: Arc<dyn AdminState>) {
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

async fn connection(side: Side, stream: tokio::net::TcpStream, state: Arc<dyn AdminState>) {
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

async fn respond<B>(side: Side, request: &Request<B>, state: &dyn AdminState) -> Answer {
    if side == Side::Admin
        && let Err(reason) = same_origin(request.headers())
    {
        return json_answer(StatusCode::FORBIDDEN, &json!({ "error": reason }));
    }
    let path = request.uri().path();
    let read = matches!(*request.method(), Method::GET | Method::HEAD);
    let answer = match (side, path) {
        (Side::Health, "/live") => status(state.is_live(), &[]),
        (Side::Health, "/ready") => {
            let readiness = state.readiness();
            status(readiness.ready, &readiness.reasons)
        }
        (Side::Health, "/metrics") => {
            let mut text = String::new();
            state.metrics(&mut text);
            text_answer(StatusCode::OK, OPENMETRICS, text)
        }
        (Side::Health, "/") => index(HEALTH_INDEX),
        (Side::Admin, "/config") => json_answer(StatusCode::OK, &state.config()),
        (Side::Admin, "/routes") => json_answer(StatusCode::OK, &state.routes()),
        (Side::Admin, "/tunnels") => json_answer(StatusCode::OK, &state.tunnels()),
        (Side::Admin, "/plugins") => json_answer(StatusCode::OK, &state.plugins()),
        (Side::Admin, "/explain") => {
            let question = question(request.uri().query().unwrap_or_default());
            match question.and_then(|question| state.explain(&question)) {
                Ok(answer) => json_answer(StatusCode::OK, &answer),
                Err(error) => json_answer(StatusCode::BAD_REQUEST, &json!({ "error": error })),
            }
        }
        (Side::Admin, "/") => index(ADMIN_INDEX),
        (Side::Admin, "/-/reload") if *request.method() == Method::POST => {
            return reload(state.reloads()).await;
        }
        (Side::Admin, "/-/drain") if *request.method() == Method::POST => {
            return drain(request.uri().query().unwrap_or_default(), state);
        }
        (Side::Admin, "/-/drain") if !read => return not_allowed("GET, HEAD, POST"),
        (Side::Admin, "/-/drain") => json_answer(StatusCode::OK, &state.draining()),
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
GET  /explain    ?url=URL[&protocol=TYPE][&listener=NAME]: which route takes it, and why
POST /-/reload   read the configuration again
GET  /-/drain    how far the process is on its way out, and what is left
POST /-/drain    have others send nothing new here; ?phase=end: and end; answers the same
";

/// Reads `url`, `protocol` and `listener` of a query.
fn question(query: &str) -> Result<Question, String> {
    let mut values: [Option<String>; 3] = Default::default();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let index = QUESTION_KEYS.iter().position(|known| *known == key).ok_or_else(|| {
            format!("\"{key}\" is unknown (accepted: {})", QUESTION_KEYS.join(", "))
        })?;
        values[index] = Some(unescaped(value).ok_or_else(|| format!("\"{key}\" is no text"))?);
    }
    let [url, protocol, listener] = values;
    Question::parse(url.as_deref().unwrap_or_default(), protocol.as_deref(), listener.as_deref())
}

const QUESTION_KEYS: [&str; 3] = ["url", "protocol", "listener"];

/// Resolves percent escapes; `None`: one is not whole, or the result is not UTF-8.
fn unescaped(text: &str) -> Option<String> {
    let mut bytes = text.bytes();
    let mut found = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        let mut digit = || char::from(bytes.next()?).to_digit(16);
        found.push(match byte {
            b'%' => u8::try_from(digit()? * 16 + digit()?).ok()?,
            byte => byte,
        });
    }
    String::from_utf8(found).ok()
}

/// Escapes what has a meaning in a query, and what is not printable.
#[must_use]
pub fn escaped(text: &str) -> String {
    let mut found = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/:".contains(&byte) {
            found.push(byte.into());
        } else {
            found.push_str(&format!("%{byte:02X}"));
        }
    }
    found
}

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

/// Asks for a reload and waits for what became of it.
async fn reload(reloads: mpsc::Sender<ReloadRequest>) -> Answer {
    let (reply, answer) = oneshot::channel();
    let asked = async {
        reloads.send(ReloadRequest { reply }).await.ok()?;
        answer.await.ok()
    };
    let (status, value) = match timeout(RELOAD_TIMEOUT, asked).await {
        Ok(Some(Ok(done))) => (StatusCode::OK, json!({ "status": done })),
        Ok(Some(Err(error))) => (StatusCode::UNPROCESSABLE_ENTITY, json!({ "error": error })),
        Ok(None) => {
            (StatusCode::SERVICE_UNAVAILABLE, json!({ "error": "the process is shutting down" }))
        }
        Err(_) => (StatusCode::GATEWAY_TIMEOUT, json!({ "error": "the reload takes too long" })),
    };
    json_answer(status, &value)
}

/// Withdraws the process, or ends it, and says what is left.
fn drain(query: &str, state: &dyn AdminState) -> Answer {
    let is_end = match query {
        "" | "phase=withdraw" => false,
        "phase=end" => true,
        _ => {
            let error = format!("\"{query}\" is unknown (accepted: phase=withdraw, phase=end)");
            return json_answer(StatusCode::BAD_REQUEST, &json!({ "error": error }));
        }
    };
    json_answer(StatusCode::OK, &state.drain(is_end))
}

fn status(good: bool, reasons: &[String]) -> Answer {
    if good {
        json_answer(StatusCode::OK, &json!({ "status": "ok" }))
    } else {
        let body = json!({ "status": "unavailable", "reasons": reasons });
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
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::net::TcpStream;

    struct State {
        reasons: Mutex<Vec<String>>,
        reloads: mpsc::Sender<ReloadRequest>,
    }

    impl AdminState for State {
        fn is_live(&self) -> bool {
            true
        }
        fn readiness(&self) -> Readiness {
            let reasons = self.reasons.lock().unwrap().clone();
            Readiness { ready: reasons.is_empty(), reasons }
        }
        fn metrics(&self, out: &mut String) {
            out.push_str("# EOF\n");
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
        fn explain(&self, question: &Question) -> Result<Json, String> {
            match question.listener.as_deref() {
                Some("nope") => Err("there is no listener".to_owned()),
                _ => Ok(json!({ "asked": format!("{question:?}") })),
            }
        }
        fn reloads(&self) -> mpsc::Sender<ReloadRequest> {
            self.reloads.clone()
        }
        fn drain(&self, is_end: bool) -> Json {
            json!({ "phase": if is_end { "ending" } else { "withdrawn" } })
        }
        fn draining(&self) -> Json {
            json!({ "phase": "running" })
        }
    }

    struct Running {
        state: Arc<State>,
        health: SocketAddr,
        admin: SocketAddr,
    }

    /// Starts with a process that answers each request for a reload with `answer`; `None`: it has
    /// ended.
    fn start_with(answer: Option<Result<String, String>>) -> Running {
        let bind = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (health, admin) = (bind(), bind());
        let (health_at, admin_at) = (health.local_addr().unwrap(), admin.local_addr().unwrap());
        let (reloads, mut requests) = mpsc::channel::<ReloadRequest>(1);
        std::thread::spawn(move || {
            while let Some(answer) = &answer
                && let Some(request) = requests.blocking_recv()
            {
                // A client that is gone asks for no answer.
                let _ = request.reply.send(answer.clone());
            }
        });
        let state = Arc::new(State { reasons: Mutex::default(), reloads });
        start(state.clone(), Some(health), Some(admin)).unwrap();
        Running { state, health: health_at, admin: admin_at }
    }

    fn running() -> Running {
        start_with(Some(Ok("taken".to_owned())))
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
        let running = running();
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
    fn questions_are_read_from_a_query() {
        let admin = running().admin;
        let url = escaped("http://demo.localhost:9080/ä b?x=1&y");
        assert_eq!(url, "http://demo.localhost:9080/%C3%A4%20b%3Fx%3D1%26y");
        let url = url.replace("%20", "");
        let page = format!("GET /explain?url={url}&protocol=GRPC&listener=web");
        // As a client would write it (RFC 3986 §2.5).
        check(admin, &page, "200", "/%C3%A4b?x=1&y");
        check(admin, &page, "200", "GRPC");
        check(admin, "GET /explain", "400", "has no host");
        check(admin, "GET /explain?url=x&protocol=http", "400", "is not a protocol type");
        check(admin, "GET /explain?url=x&listener=nope", "400", "there is no listener");
        check(admin, "GET /explain?url=x&port=1", "400", "is unknown (accepted: url");
        for bad in ["%", "%4", "%GG", "%FF", "%+1"] {
            check(admin, &format!("GET /explain?url={bad}"), "400", "is no text");
        }
        check(admin, "POST /explain?url=x", "405", "GET, HEAD");
    }

    #[test]
    fn readiness_tells_its_reasons() {
        let running = running();
        check(running.health, "GET /ready", "200", "\"ok\"");
        running.state.reasons.lock().unwrap().push("no session".to_owned());
        check(running.health, "GET /ready", "503", "\"no session\"");
        check(running.health, "GET /live", "200", "\"ok\"");
    }

    #[test]
    fn methods_are_checked() {
        let running = running();
        check(running.health, "POST /live", "405", "allow: GET, HEAD");
        check(running.admin, "DELETE /config", "405", "allow: GET, HEAD");
        check(running.admin, "GET /-/reload", "405", "allow: POST");
        check(running.admin, "PUT /-/drain", "405", "allow: GET, HEAD, POST");
        check(running.health, "POST /-/drain", "404", "no page /-/drain");
        let response = ask(running.health, "HEAD /live", "");
        assert!(
            response.starts_with("HTTP/1.1 200") && response.ends_with("\r\n\r\n"),
            "{response}"
        );
    }

    #[test]
    fn a_reload_tells_what_became_of_it() {
        check(running().admin, "POST /-/reload", "200", "\"taken\"");
        let refused = start_with(Some(Err("c.yaml:1:1: bad".to_owned())));
        check(refused.admin, "POST /-/reload", "422", "c.yaml:1:1: bad");
        check(start_with(None).admin, "POST /-/reload", "503", "shutting down");
    }

    #[test]
    fn a_drain_says_how_far() {
        let admin = running().admin;
        check(admin, "POST /-/drain", "200", "\"withdrawn\"");
        check(admin, "POST /-/drain?phase=withdraw", "200", "\"withdrawn\"");
        check(admin, "POST /-/drain?phase=end", "200", "\"ending\"");
        check(admin, "GET /-/drain", "200", "\"running\"");
        check(admin, "POST /-/drain?phase=now", "400", "(accepted: phase=withdraw, phase=end)");
    }

    #[test]
    fn pages_of_the_web_cannot_reach_admin() {
        let running = running();
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
        let running = running();
        let fields = format!("X-Large: {}\r\n", "x".repeat(HEAD_BYTES_MAX));
        assert!(ask(running.health, "GET /live", &fields).starts_with("HTTP/1.1 431"));
        let fields = "X: y\r\n".repeat(HEADERS_MAX + 1);
        assert!(ask(running.health, "GET /live", &fields).starts_with("HTTP/1.1 431"));
    }

    #[test]
    fn connections_beyond_the_bound_wait_for_a_place() {
        let running = running();
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
}
