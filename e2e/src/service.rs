//! A service on localhost that records exactly the bytes it gets and answers by script.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use crate::client::{first, head_end, split_field, values};
use crate::wait;

/// How long a script waits for bytes. Above every wait a test has.
const READ_DEADLINE: Duration = Duration::from_secs(60);

/// What one connection brought.
#[derive(Clone, Debug, Default)]
pub struct Record {
    /// All bytes, as they came.
    pub received: Vec<u8>,
    /// The peer has closed or reset the connection.
    pub closed: bool,
}

/// What a service has seen.
#[derive(Debug, Default)]
struct Seen {
    records: Vec<Record>,
    requests: Vec<Request>,
}

type Records = Arc<Mutex<Seen>>;

/// A listening service. Its thread ends with it; those of its connections end with their peers.
#[derive(Debug)]
pub struct Service {
    address: SocketAddr,
    records: Records,
    stop: Arc<AtomicBool>,
}

impl Service {
    /// Listens on a free port and runs `script` for each connection on a thread of its own. An
    /// error of the script (the peer has gone) ends the connection.
    pub fn start<F>(script: F) -> Self
    where
        F: Fn(&mut Connection) -> io::Result<()> + Send + Sync + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        Self::start_on(listener, script)
    }

    /// As [`Service::start`], on a listener that stands.
    pub fn start_on<F>(listener: TcpListener, script: F) -> Self
    where
        F: Fn(&mut Connection) -> io::Result<()> + Send + Sync + 'static,
    {
        let address = listener.local_addr().expect("a bound listener");
        let records = Records::default();
        let stop = Arc::new(AtomicBool::new(false));
        let script = Arc::new(script);
        std::thread::spawn({
            let records = Arc::clone(&records);
            let stop = Arc::clone(&stop);
            move || {
                for stream in listener.incoming() {
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                    let Ok(stream) = stream else { continue };
                    let index = {
                        let mut seen = lock(&records);
                        seen.records.push(Record::default());
                        seen.records.len() - 1
                    };
                    let records = Arc::clone(&records);
                    let script = Arc::clone(&script);
                    std::thread::spawn(move || Connection::run(stream, index, records, &*script));
                }
            }
        });
        Self { address, records, stop }
    }

    /// Answers every request with the same bytes, on connections kept alive.
    #[must_use]
    pub fn answering(answer: impl Into<Vec<u8>>) -> Self {
        let answer = answer.into();
        Self::start(move |connection| {
            while connection.exchange()?.is_some() {
                connection.write(&answer)?;
            }
            Ok(())
        })
    }

    /// Answers 200 with the body `ok`.
    #[must_use]
    pub fn ok() -> Self {
        Self::answering("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
    }

    /// Returns where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns what each connection brought so far.
    #[must_use]
    pub fn records(&self) -> Vec<Record> {
        lock(&self.records).records.clone()
    }

    /// Returns all bytes of all connections, connection by connection.
    #[must_use]
    pub fn received(&self) -> Vec<u8> {
        self.records().into_iter().flat_map(|record| record.received).collect()
    }

    /// Returns the requests that scripts have read, in the order in which they came.
    #[must_use]
    pub fn requests(&self) -> Vec<Request> {
        lock(&self.records).requests.clone()
    }

    /// Returns the requests that came since the last call.
    #[allow(clippy::must_use_candidate, reason = "a test may call it to forget what came before")]
    pub fn take_requests(&self) -> Vec<Request> {
        std::mem::take(&mut lock(&self.records).requests)
    }

    /// Returns the only request that came since the last call.
    #[must_use]
    pub fn only_request(&self) -> Request {
        let mut requests = self.take_requests();
        assert_eq!(requests.len(), 1, "one request reaches the service: {requests:?}");
        requests.remove(0)
    }

    /// Waits until some connection's record fulfils the condition.
    pub fn until(&self, what: &str, condition: impl Fn(&[Record]) -> bool) {
        wait::until(what, || condition(&lock(&self.records).records).then_some(()));
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the accepting thread, which then sees the flag.
        drop(TcpStream::connect(self.address));
    }
}

fn lock(records: &Records) -> MutexGuard<'_, Seen> {
    records.lock().expect("no script panics with the records locked")
}

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Request {
    /// The head, byte for byte.
    pub raw: Vec<u8>,
    /// Method.
    pub method: String,
    /// Target, byte for byte.
    pub target: Vec<u8>,
    /// Version, as in `HTTP/1.1`.
    pub version: String,
    /// Fields in order, as sent.
    pub fields: Vec<(Vec<u8>, Vec<u8>)>,
    /// Body, where the script has read it.
    pub body: Body,
}

impl Request {
    /// Parses a head that ends with an empty line.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let mut lines = bytes.split(|byte| *byte == b'\n').map(|line| line.trim_ascii_end());
        let mut words = lines.next()?.split(|byte| *byte == b' ');
        let method = String::from_utf8(words.next()?.to_vec()).ok()?;
        let target = words.next()?.to_vec();
        let version = String::from_utf8(words.next()?.to_vec()).ok()?;
        let fields = lines.take_while(|line| !line.is_empty()).filter_map(split_field).collect();
        Some(Self { raw: bytes.to_vec(), method, target, version, fields, body: Body::default() })
    }

    /// Returns every value of a field, in order.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a [u8]> {
        values(&self.fields, name)
    }

    /// Returns a field's first value as text.
    #[must_use]
    pub fn first(&self, name: &str) -> Option<&str> {
        first(&self.fields, name)
    }

    /// Returns whether the field is there.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.all(name).next().is_some()
    }
}

/// A request's body as it came.
#[derive(Clone, Debug, Default)]
pub struct Body {
    /// Decoded bytes.
    pub bytes: Vec<u8>,
    /// Trailer fields.
    pub trailers: Vec<(Vec<u8>, Vec<u8>)>,
}

/// One connection, for a script.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    index: usize,
    records: Records,
    buffer: Vec<u8>,
    recording: bool,
}

impl Connection {
    fn run<F>(stream: TcpStream, index: usize, records: Records, script: &F)
    where
        F: Fn(&mut Self) -> io::Result<()>,
    {
        let configured = stream
            .set_nodelay(true)
            .and_then(|()| stream.set_read_timeout(Some(READ_DEADLINE)))
            .and_then(|()| stream.set_write_timeout(Some(READ_DEADLINE)));
        let mut connection = Self { stream, index, records, buffer: Vec::new(), recording: true };
        // An error is the peer's end of it; what it means is for the test to say.
        let _ = configured.and_then(|()| script(&mut connection));
        lock(&connection.records).records[index].closed = true;
    }

    /// Returns which connection this is, counted from 0.
    #[must_use]
    pub fn index(&self) -> usize {
        self.index
    }

    /// Reads the next request's head; `None` where the peer closed instead.
    pub fn request(&mut self) -> io::Result<Option<Request>> {
        let request = self.read_head()?;
        if let Some(request) = &request {
            lock(&self.records).requests.push(request.clone());
        }
        Ok(request)
    }

    /// Reads the next request with its body; `None` where the peer closed instead.
    pub fn exchange(&mut self) -> io::Result<Option<Request>> {
        let Some(mut request) = self.read_head()? else { return Ok(None) };
        request.body = self.body(&request)?;
        lock(&self.records).requests.push(request.clone());
        Ok(Some(request))
    }

    fn read_head(&mut self) -> io::Result<Option<Request>> {
        loop {
            if let Some(end) = head_end(&self.buffer) {
                let bytes: Vec<u8> = self.buffer.drain(..end).collect();
                return Request::parse(&bytes)
                    .map(Some)
                    .ok_or_else(|| io::Error::other("not a request's head"));
            }
            if self.fill()? == 0 {
                return Ok(None);
            }
        }
    }

    /// Reads a request's whole body.
    pub fn body(&mut self, request: &Request) -> io::Result<Body> {
        let mut body = Body::default();
        if request.has("transfer-encoding") {
            loop {
                let line = self.line()?;
                let digits = String::from_utf8_lossy(&line).into_owned();
                let length = usize::from_str_radix(digits.trim(), 16).map_err(io::Error::other)?;
                if length == 0 {
                    break;
                }
                body.bytes.extend(self.exactly(length)?);
                self.line()?;
            }
            loop {
                let line = self.line()?;
                if line.is_empty() {
                    break;
                }
                body.trailers.extend(split_field(&line));
            }
        } else if let Some(length) = request.first("content-length") {
            let length = length.parse().map_err(io::Error::other)?;
            body.bytes = self.exactly(length)?;
        }
        Ok(body)
    }

    /// Writes bytes.
    pub fn write(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.stream.write_all(bytes.as_ref())
    }

    /// Reads exactly `length` bytes.
    pub fn exactly(&mut self, length: usize) -> io::Result<Vec<u8>> {
        while self.buffer.len() < length {
            if self.fill()? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(self.buffer.drain(..length).collect())
    }

    /// Reads whatever comes next, as it comes; empty at the end.
    pub fn some(&mut self) -> io::Result<Vec<u8>> {
        if self.buffer.is_empty() {
            self.fill()?;
        }
        Ok(std::mem::take(&mut self.buffer))
    }

    /// Stops recording: for bodies that are too large to keep.
    pub fn stop_recording(&mut self) {
        self.recording = false;
    }

    /// Waits until the peer has closed or reset the connection; an error is that, too.
    pub fn closed(&mut self) -> io::Result<()> {
        while self.fill()? != 0 {}
        Ok(())
    }

    /// Closes both directions at once, in the middle of what was promised: what a crashed service
    /// looks like.
    pub fn crash(&mut self) -> io::Result<()> {
        self.stream.shutdown(Shutdown::Both)
    }

    fn line(&mut self) -> io::Result<Vec<u8>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return Ok(line.trim_ascii_end().to_vec());
            }
            if self.fill()? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    fn fill(&mut self) -> io::Result<usize> {
        let mut chunk = [0; 64 * 1024];
        let length = self.stream.read(&mut chunk)?;
        self.buffer.extend_from_slice(&chunk[..length]);
        let mut seen = lock(&self.records);
        let record = &mut seen.records[self.index];
        if self.recording {
            record.received.extend_from_slice(&chunk[..length]);
        }
        record.closed |= length == 0;
        Ok(length)
    }
}
