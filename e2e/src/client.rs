//! A client that writes exactly the bytes it is given and reads answers without repairing them.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use crate::tls::TlsStream;

/// How long an answer may take. Longer than any wait the program has by default in these tests.
const READ_DEADLINE: Duration = Duration::from_secs(30);
/// Largest head read; above what the program lets through.
const HEAD_BYTES_MAX: usize = 256 * 1024;

/// A connection to the relay.
#[derive(Debug)]
pub struct Client {
    stream: Stream,
    buffer: Vec<u8>,
}

/// What a connection is made of.
#[derive(Debug)]
enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream>),
}

impl Stream {
    fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(stream) => stream,
            Self::Tls(stream) => &stream.sock,
        }
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.write_all(bytes),
            Self::Tls(stream) => stream.write_all(bytes).and_then(|()| stream.flush()),
        }
    }

    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(bytes),
            Self::Tls(stream) => stream.read(bytes),
        }
    }
}

/// The head of an answer.
#[derive(Clone, Debug)]
pub struct Head {
    /// Minor version: 0 or 1.
    pub minor: u8,
    /// Status.
    pub status: u16,
    /// Fields in order, as sent.
    pub fields: Vec<(Vec<u8>, Vec<u8>)>,
}

/// A whole answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Head.
    pub head: Head,
    /// Body, decoded where it came in chunks.
    pub body: Vec<u8>,
    /// Trailer fields.
    pub trailers: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Head {
    /// Parses a head that ends with an empty line.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let mut lines = bytes.split(|byte| *byte == b'\n').map(|line| line.trim_ascii_end());
        let status_line = std::str::from_utf8(lines.next()?).ok()?;
        let rest = status_line.strip_prefix("HTTP/1.")?;
        let minor = rest.bytes().next()?.checked_sub(b'0')?;
        let status = rest.get(2..5)?.parse().ok()?;
        let fields = lines.take_while(|line| !line.is_empty()).filter_map(split_field).collect();
        Some(Self { minor, status, fields })
    }

    /// Returns every value of a field, in order.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a [u8]> {
        values(&self.fields, name)
    }

    /// Returns a field's only or first value as text.
    #[must_use]
    pub fn first(&self, name: &str) -> Option<&str> {
        first(&self.fields, name)
    }

    /// Returns a field's values joined as a list, lower case.
    #[must_use]
    pub fn list(&self, name: &str) -> String {
        let values: Vec<_> =
            self.all(name).map(|value| String::from_utf8_lossy(value).to_lowercase()).collect();
        values.join(", ")
    }
}

/// Returns the values of a field among `fields`, in order.
pub fn values<'a>(
    fields: &'a [(Vec<u8>, Vec<u8>)],
    name: &'a str,
) -> impl Iterator<Item = &'a [u8]> {
    fields
        .iter()
        .filter(move |(field, _)| field.eq_ignore_ascii_case(name.as_bytes()))
        .map(|(_, value)| value.as_slice())
}

/// Returns the first value of a field among `fields`, where it is text.
#[must_use]
pub fn first<'a>(fields: &'a [(Vec<u8>, Vec<u8>)], name: &str) -> Option<&'a str> {
    let (_, value) =
        fields.iter().find(|(field, _)| field.eq_ignore_ascii_case(name.as_bytes()))?;
    std::str::from_utf8(value).ok()
}

/// Splits `name: value`; `None` for a line without a colon.
#[must_use]
pub fn split_field(line: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let colon = line.iter().position(|byte| *byte == b':')?;
    let (name, value) = line.split_at(colon);
    Some((name.to_vec(), value[1..].trim_ascii().to_vec()))
}

impl Client {
    /// Connects.
    #[must_use]
    pub fn connect(address: SocketAddr) -> Self {
        Self::over(TcpStream::connect(address).expect("the relay listens"))
    }

    /// The same over a connection that stands.
    #[must_use]
    pub fn over(stream: TcpStream) -> Self {
        tune(&stream);
        Self { stream: Stream::Plain(stream), buffer: Vec::new() }
    }

    /// The same over TLS whose handshake is done.
    #[must_use]
    pub fn over_tls(stream: TlsStream) -> Self {
        Self { stream: Stream::Tls(Box::new(stream)), buffer: Vec::new() }
    }

    /// What TLS agreed on.
    ///
    /// # Panics
    /// The connection is plain.
    #[must_use]
    pub fn tls(&self) -> &rustls::ClientConnection {
        match &self.stream {
            Stream::Plain(_) => panic!("the connection is plain"),
            Stream::Tls(stream) => &stream.conn,
        }
    }

    /// Writes bytes; an error says that the relay has closed.
    pub fn try_send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Writes bytes.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.try_send(bytes.as_ref()).expect("the relay reads");
    }

    /// Returns a second handle of the connection, to write while another thread reads.
    #[must_use]
    pub fn writer(&self) -> TcpStream {
        self.stream.socket().try_clone().expect("a socket has more than one handle")
    }

    /// Ends the write direction.
    pub fn shutdown(&self) {
        self.stream.socket().shutdown(Shutdown::Write).expect("the socket is open");
    }

    /// Reads the next head, an interim one included.
    #[must_use]
    pub fn head(&mut self) -> Head {
        self.try_head().expect("an answer's head")
    }

    /// Reads the next head; fails where the connection ends before it does.
    pub fn try_head(&mut self) -> io::Result<Head> {
        let end = loop {
            if let Some(end) = head_end(&self.buffer) {
                break end;
            }
            if self.buffer.len() > HEAD_BYTES_MAX {
                return Err(io::Error::other("head too large"));
            }
            self.fill()?;
        };
        let bytes: Vec<u8> = self.buffer.drain(..end).collect();
        Head::parse(&bytes).ok_or_else(|| {
            io::Error::other(format!("not a head: {:?}", String::from_utf8_lossy(&bytes)))
        })
    }

    /// Reads the final answer to `method`, passing over interim ones.
    #[must_use]
    pub fn answer(&mut self, method: &str) -> Answer {
        self.try_answer(method).expect("a whole answer")
    }

    /// Reads the final answer to `method`; fails where it does not end as its framing says.
    pub fn try_answer(&mut self, method: &str) -> io::Result<Answer> {
        let head = loop {
            let head = self.try_head()?;
            if head.status >= 200 || head.status == 101 {
                break head;
            }
        };
        self.try_body(method, head)
    }

    /// Reads the body that belongs to a head.
    pub fn try_body(&mut self, method: &str, head: Head) -> io::Result<Answer> {
        let mut body = Vec::new();
        let mut trailers = Vec::new();
        if method == "HEAD" || head.status < 200 || head.status == 204 || head.status == 304 {
            // No body, whatever the fields say.
        } else if head.list("transfer-encoding") == "chunked" {
            while let Some(chunk) = self.chunk()? {
                body.extend_from_slice(&chunk);
            }
            trailers = self.trailers()?;
        } else if let Some(length) = head.first("content-length") {
            let length = length.parse().map_err(io::Error::other)?;
            body = self.exactly(length)?;
        } else {
            loop {
                body.append(&mut self.buffer);
                match self.fill() {
                    Ok(()) => {}
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(Answer { head, body, trailers })
    }

    /// Reads one chunk; `None` for the last.
    pub fn chunk(&mut self) -> io::Result<Option<Vec<u8>>> {
        let line = self.line()?;
        let digits = line.split(|byte| *byte == b';').next().unwrap_or_default();
        let digits = std::str::from_utf8(digits.trim_ascii()).map_err(io::Error::other)?;
        let length = usize::from_str_radix(digits, 16).map_err(io::Error::other)?;
        if length == 0 {
            return Ok(None);
        }
        let chunk = self.exactly(length)?;
        if self.line()?.is_empty() {
            Ok(Some(chunk))
        } else {
            Err(io::Error::other("chunk overrun"))
        }
    }

    /// Reads trailer fields up to the empty line.
    fn trailers(&mut self) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let mut fields = Vec::new();
        loop {
            let line = self.line()?;
            if line.is_empty() {
                return Ok(fields);
            }
            fields.extend(split_field(&line));
        }
    }

    /// Reads a line without its end.
    pub fn line(&mut self) -> io::Result<Vec<u8>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return Ok(line.trim_ascii_end().to_vec());
            }
            self.fill()?;
        }
    }

    /// Reads exactly `length` bytes.
    pub fn exactly(&mut self, length: usize) -> io::Result<Vec<u8>> {
        while self.buffer.len() < length {
            self.fill()?;
        }
        Ok(self.buffer.drain(..length).collect())
    }

    /// Waits until the relay has closed, and returns what came before that. A reset counts as a
    /// close: bytes of ours that nobody read cause one.
    #[must_use]
    pub fn rest(&mut self) -> Vec<u8> {
        loop {
            match self.fill() {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    panic!("the relay keeps the connection open")
                }
                Err(_) => return std::mem::take(&mut self.buffer),
            }
        }
    }

    /// Returns whether nothing was read that was not given out.
    #[must_use]
    pub fn has_nothing(&self) -> bool {
        self.buffer.is_empty()
    }

    fn fill(&mut self) -> io::Result<()> {
        let mut chunk = [0; 16 * 1024];
        match self.stream.read(&mut chunk)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            length => {
                self.buffer.extend_from_slice(&chunk[..length]);
                Ok(())
            }
        }
    }
}

/// Sends at once, and waits for nothing for ever.
pub(crate) fn tune(stream: &TcpStream) {
    stream.set_nodelay(true).expect("a fresh socket takes options");
    stream.set_read_timeout(Some(READ_DEADLINE)).expect("a fresh socket takes options");
    stream.set_write_timeout(Some(READ_DEADLINE)).expect("a fresh socket takes options");
}

/// Returns where a head ends: behind its empty line.
#[must_use]
pub fn head_end(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4)
}

/// One request on a connection of its own.
#[must_use]
pub fn request(address: SocketAddr, method: &str, bytes: impl AsRef<[u8]>) -> Answer {
    let mut client = Client::connect(address);
    client.send(bytes);
    client.answer(method)
}

#[cfg(test)]
mod tests {
    use super::Head;

    #[test]
    fn head_keeps_order_and_bytes() {
        let head = Head::parse(b"HTTP/1.1 200 OK\r\nA: 1\r\nb: \xff\r\na:2\r\n\r\n").unwrap();
        assert_eq!((head.minor, head.status), (1, 200));
        assert_eq!(head.all("a").collect::<Vec<_>>(), [b"1", b"2"]);
        assert_eq!(head.all("B").collect::<Vec<_>>(), [b"\xff"]);
        assert!(Head::parse(b"HTTP/2 200\r\n\r\n").is_none());
    }
}
