//! The front over an in-memory connection: raw bytes on HTTP/1, the `h2` crate's client on HTTP/2.
//! Time is paused, so a connection that nothing moves runs into its timeout at once.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::Poll;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use sidelane_abi::failure;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::*;
use crate::plugin::lend::{Body, BodyFrame, Closed, RequestHead, Reset, Responder, ResponseHead};

mod h1;
mod h2;
mod h2_tunnel;

/// A request as a test's plugin gets it.
struct Asked {
    head: Box<RequestHead>,
    body: Box<dyn Body>,
    responder: Box<dyn Responder>,
}

type Answering = Pin<Box<dyn Future<Output = CallEnd> + Send>>;

/// Answers every request by one function.
struct Script {
    answer: Box<dyn Fn(Asked) -> Answering + Send + Sync>,
    seen: Mutex<Vec<String>>,
    noted: Mutex<Vec<Event>>,
}

impl Script {
    fn new<F, A>(answer: F) -> Arc<Self>
    where
        F: Fn(Asked) -> A + Send + Sync + 'static,
        A: Future<Output = ()> + Send + 'static,
    {
        Arc::new(Self {
            answer: Box::new(move |asked| {
                let answering = answer(asked);
                Box::pin(async move {
                    answering.await;
                    ENDED
                })
            }),
            seen: Mutex::default(),
            noted: Mutex::default(),
        })
    }

    /// `METHOD authority target` of every request so far.
    fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }

    fn noted(&self) -> Vec<Event> {
        self.noted.lock().unwrap().clone()
    }
}

const ENDED: CallEnd = CallEnd { code: failure::NONE, panicked: false };

impl Dispatch for Script {
    type Call = Answering;

    fn accept<B: Body, R: Responder>(
        &self,
        connection: &Arc<ConnectionInfo>,
        head: Box<RequestHead>,
        body: B,
        responder: R,
    ) -> Answering {
        assert_eq!(&*connection.listener, "test");
        self.seen.lock().unwrap().push(format!(
            "{} {} {}",
            head.method,
            String::from_utf8_lossy(&head.authority),
            String::from_utf8_lossy(&head.target)
        ));
        (self.answer)(Asked { head, body: Box::new(body), responder: Box::new(responder) })
    }

    fn note(&self, event: Event) {
        self.noted.lock().unwrap().push(event);
    }
}

impl Asked {
    async fn frame(&mut self) -> BodyFrame {
        poll_fn(|cx| self.body.poll_frame(cx)).await
    }

    /// Reads the body to its end.
    async fn read(&mut self) -> (Vec<u8>, Option<HeaderMap>) {
        let mut all = Vec::new();
        loop {
            match self.frame().await {
                BodyFrame::Data { bytes, end } => {
                    all.extend_from_slice(&bytes);
                    if end {
                        return (all, None);
                    }
                }
                BodyFrame::Trailers(trailers) => return (all, Some(trailers)),
                BodyFrame::End => return (all, None),
                BodyFrame::Failed(reset) => panic!("body failed: {reset:?}"),
            }
        }
    }

    fn begin(&mut self, status: u16, fields: &[(&'static str, &str)]) -> Result<(), Closed> {
        self.responder.head(response(status, fields), None, false)
    }

    /// The whole response in one call.
    fn answer(&mut self, status: u16, fields: &[(&'static str, &str)], body: &str) {
        let body = Some(Bytes::copy_from_slice(body.as_bytes()));
        self.responder.head(response(status, fields), body, true).unwrap();
    }

    async fn put(&mut self, bytes: impl Into<Bytes>, end: bool) -> Result<(), Closed> {
        let mut chunk = Some(bytes.into());
        poll_fn(|cx| self.responder.poll_body(cx, &mut chunk, end)).await
    }

    async fn closed(&mut self) -> Reset {
        poll_fn(|cx| self.responder.poll_closed(cx)).await
    }
}

fn response(status: u16, fields: &[(&'static str, &str)]) -> ResponseHead {
    ResponseHead {
        status: StatusCode::from_u16(status).unwrap(),
        headers: fields_of(fields),
        body_length: None,
    }
}

fn fields_of(fields: &[(&'static str, &str)]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in fields {
        headers.append(
            HeaderName::from_static(name),
            HeaderValue::from_bytes(value.as_bytes()).unwrap(),
        );
    }
    headers
}

/// A connection to a front.
struct Client {
    stream: DuplexStream,
    served: JoinHandle<Result<(), ConnectionError>>,
    shutdown: Option<oneshot::Sender<()>>,
}

/// Bytes that the in-memory connection holds in each direction.
const PIPE_BYTES: usize = 16 * 1024;

fn connect(script: &Arc<Script>) -> Client {
    connect_with(script, FrontConfig::default())
}

fn connect_with(script: &Arc<Script>, config: FrontConfig) -> Client {
    connect_through(script, config, PIPE_BYTES)
}

fn connect_through(script: &Arc<Script>, config: FrontConfig, pipe_bytes: usize) -> Client {
    let (stream, far) = tokio::io::duplex(pipe_bytes);
    let (shutdown, asked) = oneshot::channel();
    let info = ConnectionInfo::plain("test".into(), "192.0.2.1:4711".parse().unwrap());
    let asked = async {
        if asked.await.is_err() {
            std::future::pending().await
        }
    };
    let serving = serve(far, Arc::new(info), Arc::new(config), Arc::clone(script), asked);
    Client { stream, served: tokio::spawn(serving), shutdown: Some(shutdown) }
}

impl Client {
    async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).await.unwrap();
    }

    /// Reads until what was read ends in `tail`.
    async fn read_to(&mut self, tail: &str) -> String {
        let mut all = Vec::new();
        while !all.ends_with(tail.as_bytes()) {
            let mut byte = [0];
            let read = self.stream.read(&mut byte).await.unwrap();
            assert_eq!(read, 1, "closed after {:?}", String::from_utf8_lossy(&all));
            all.push(byte[0]);
        }
        String::from_utf8(all).unwrap()
    }

    /// Reads until the front closes.
    async fn read_all(&mut self) -> String {
        let mut all = Vec::new();
        self.stream.read_to_end(&mut all).await.unwrap();
        String::from_utf8(all).unwrap()
    }

    fn shut_down(&mut self) {
        self.shutdown.take().unwrap().send(()).unwrap();
    }
}

/// Tells when it is dropped.
struct Told(Option<oneshot::Sender<()>>);

impl Drop for Told {
    fn drop(&mut self) {
        if let Some(told) = self.0.take() {
            let _ = told.send(());
        }
    }
}

/// A slot for what one request of a test says once.
struct Once<T>(Mutex<Option<oneshot::Sender<T>>>);

impl<T> Once<T> {
    fn new() -> (Arc<Self>, oneshot::Receiver<T>) {
        let (sender, receiver) = oneshot::channel();
        (Arc::new(Self(Mutex::new(Some(sender)))), receiver)
    }

    fn say(&self, value: T) {
        let _ = self.0.lock().unwrap().take().expect("said once").send(value);
    }
}

impl Once<()> {
    /// Says it when what is returned is dropped.
    fn told_on_drop(&self) -> Told {
        Told(self.0.lock().unwrap().take())
    }
}

/// Bounds what a listener pays for a connection at rest, beside hyper's two buffers of 8 KiB.
const SERVING_BYTES_MAX: usize = 2048;

#[test]
fn connections_at_rest_are_small() {
    let script = Script::new(|_| async {});
    let (stream, _far) = tokio::io::duplex(1);
    let info = ConnectionInfo::plain("test".into(), "192.0.2.1:4711".parse().unwrap());
    let serving =
        serve(stream, Arc::new(info), Arc::default(), script, std::future::pending::<()>());
    let size = size_of_val(&serving);
    assert!(size <= SERVING_BYTES_MAX, "{size} bytes");
}

/// Turns of other tasks after which whoever could still take a chunk has taken it.
const TURNS: usize = 64;

/// Puts chunks until the front takes no more, and returns how many bytes it took.
async fn put_until_full(asked: &mut Asked, chunk: usize) -> usize {
    let mut taken = 0;
    let mut turns = 0;
    while turns < TURNS {
        let mut bytes = Some(Bytes::from(vec![b'x'; chunk]));
        let put = poll_fn(|cx| Poll::Ready(asked.responder.poll_body(cx, &mut bytes, false))).await;
        match put {
            Poll::Ready(put) => {
                put.unwrap();
                taken += chunk;
                turns = 0;
            }
            Poll::Pending => {
                turns += 1;
                tokio::task::yield_now().await;
            }
        }
    }
    taken
}
