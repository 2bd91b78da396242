//! The PROXY protocol's header (versions 1 and 2), by which a load balancer says who its client is.
//!
//! Knows where a header ends and what it says of the client. Whether the sender may be believed is
//! the caller's to know, and so is the time it may take.

use std::io;
use std::net::{IpAddr, SocketAddr};

use bytes::{Buf as _, BytesMut};
use ppp::{v1, v2};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt as _};

/// Longest header of version 1, its line end included (the protocol's own bound).
const V1_BYTES_MAX: usize = 107;

/// Beginning of a header of version 1.
const V1_PREFIX: &[u8] = b"PROXY ";

/// Fixed part of a header of version 2.
const V2_FIXED_BYTES: usize = 16;

/// Longest header of version 2. The protocol asks for 536 to be taken; balancers in clouds add fields
/// of some hundred bytes each, a certificate's names at most.
const V2_BYTES_MAX: usize = 4 * 1024;

/// Why a connection's beginning is no header.
#[derive(Debug, Error)]
pub(super) enum HeaderError {
    /// The connection ended first.
    #[error("the connection ended before a whole PROXY header came")]
    Closed,
    /// The transport failed.
    #[error("the connection failed")]
    Io(#[source] io::Error),
    /// Other bytes came.
    #[error("the connection does not begin with a PROXY header")]
    Missing,
    /// It goes on for too long.
    #[error(
        "the PROXY header has {0} bytes or more (at most {V1_BYTES_MAX} in version 1, {V2_BYTES_MAX} in version 2)"
    )]
    TooLong(usize),
    /// The text of version 1 does not hold.
    #[error("the PROXY header of version 1 does not hold")]
    V1(#[source] v1::BinaryParseError),
    /// The fields of version 2 do not hold.
    #[error("the PROXY header of version 2 does not hold")]
    V2(#[source] v2::ParseError),
}

impl HeaderError {
    /// The reason as a metric's label.
    pub(super) fn label(&self) -> &'static str {
        match self {
            Self::Closed | Self::Io(_) => "closed",
            Self::Missing => "missing",
            Self::TooLong(_) | Self::V1(_) | Self::V2(_) => "invalid",
        }
    }
}

/// Reads a header off `stream`. What came behind it is left in `ahead`, which is empty before.
/// Returns the client that it names; `None`: the sender speaks for itself (`LOCAL`, `UNKNOWN`, or an
/// address of no IP network).
///
/// # Errors
/// As [`HeaderError`] says. The time is the caller's to bound.
pub(super) async fn read<S: AsyncRead + Unpin>(
    stream: &mut S,
    ahead: &mut BytesMut,
) -> Result<Option<SocketAddr>, HeaderError> {
    loop {
        if let Some(length) = length(ahead)? {
            let client = parse(&ahead[..length])?;
            ahead.advance(length);
            return Ok(client);
        }
        ahead.reserve(V2_BYTES_MAX.saturating_sub(ahead.len()).max(1));
        if stream.read_buf(ahead).await.map_err(HeaderError::Io)? == 0 {
            return Err(HeaderError::Closed);
        }
    }
}

/// Returns the header's length once that can be told and all of it is there.
fn length(bytes: &[u8]) -> Result<Option<usize>, HeaderError> {
    if begins(bytes, v2::PROTOCOL_PREFIX) {
        let Some(fixed) = bytes.get(..V2_FIXED_BYTES) else { return Ok(None) };
        let length = V2_FIXED_BYTES + usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
        return match length {
            V2_BYTES_MAX.. => Err(HeaderError::TooLong(length)),
            _ if bytes.len() >= length => Ok(Some(length)),
            _ => Ok(None),
        };
    }
    if !begins(bytes, V1_PREFIX) {
        return Err(HeaderError::Missing);
    }
    let line = &bytes[..bytes.len().min(V1_BYTES_MAX)];
    match line.windows(2).position(|pair| pair == b"\r\n") {
        Some(at) => Ok(Some(at + 2)),
        None if line.len() == V1_BYTES_MAX => Err(HeaderError::TooLong(V1_BYTES_MAX)),
        None => Ok(None),
    }
}

/// Returns whether `bytes` may go on to begin with `prefix`.
fn begins(bytes: &[u8], prefix: &[u8]) -> bool {
    let known = bytes.len().min(prefix.len());
    bytes[..known] == prefix[..known]
}

/// Reads a whole header.
fn parse(header: &[u8]) -> Result<Option<SocketAddr>, HeaderError> {
    let source = |address: IpAddr, port| Some(SocketAddr::new(address.to_canonical(), port));
    if header.starts_with(v2::PROTOCOL_PREFIX) {
        let header = v2::Header::try_from(header).map_err(HeaderError::V2)?;
        if header.command == v2::Command::Local || header.protocol != v2::Protocol::Stream {
            return Ok(None);
        }
        return Ok(match header.addresses {
            v2::Addresses::IPv4(pair) => source(pair.source_address.into(), pair.source_port),
            v2::Addresses::IPv6(pair) => source(pair.source_address.into(), pair.source_port),
            v2::Addresses::Unspecified | v2::Addresses::Unix(_) => None,
        });
    }
    let header = v1::Header::try_from(header).map_err(HeaderError::V1)?;
    Ok(match header.addresses {
        v1::Addresses::Tcp4(pair) => source(pair.source_address.into(), pair.source_port),
        v1::Addresses::Tcp6(pair) => source(pair.source_address.into(), pair.source_port),
        v1::Addresses::Unknown => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header of version 2: command and version, family and protocol, what follows.
    fn v2(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        let length = u16::try_from(rest.len()).unwrap().to_be_bytes();
        [v2::PROTOCOL_PREFIX, &[0x20 | command, family], &length, rest].concat()
    }

    fn ipv4() -> Vec<u8> {
        vec![192, 0, 2, 1, 10, 0, 0, 1, 0x12, 0x67, 0, 80]
    }

    /// Reads `header` with `rest` behind it, in parts of each size, and returns who it names or what
    /// the error's text begins with.
    #[track_caller]
    fn check(header: &[u8], expected: Result<Option<&str>, &str>) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let sent = [header, b"GET / HTTP/1.1"].concat();
        for size in [1, 7, 16, sent.len()] {
            runtime.block_on(async {
                let mut stream = parts(&sent, size);
                let mut ahead = BytesMut::new();
                match (read(&mut stream, &mut ahead).await, expected) {
                    (Ok(client), Ok(expected)) => {
                        assert_eq!(client.map(|client| client.to_string()).as_deref(), expected);
                        stream.read_to_end_into(&mut ahead).await;
                        assert_eq!(&ahead[..], b"GET / HTTP/1.1");
                    }
                    (Err(error), Err(expected)) => {
                        assert!(error.to_string().contains(expected), "{error}");
                    }
                    (got, expected) => panic!("{header:?}: {got:?}, not {expected:?}"),
                }
            });
        }
    }

    /// A stream that yields its bytes in parts.
    struct Parts(Vec<Vec<u8>>);

    fn parts(bytes: &[u8], size: usize) -> Parts {
        let mut all: Vec<Vec<u8>> = bytes.chunks(size).map(<[u8]>::to_vec).collect();
        all.reverse();
        Parts(all)
    }

    impl Parts {
        async fn read_to_end_into(&mut self, ahead: &mut BytesMut) {
            while self.read_buf(ahead).await.unwrap() > 0 {}
        }
    }

    impl AsyncRead for Parts {
        fn poll_read(
            mut self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
            buf: &mut tokio::io::ReadBuf<'_>,
        ) -> std::task::Poll<io::Result<()>> {
            if let Some(mut part) = self.0.pop() {
                let room = buf.remaining().min(part.len());
                let rest = part.split_off(room);
                buf.put_slice(&part);
                if !rest.is_empty() {
                    self.0.push(rest);
                }
            }
            std::task::Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn version_1_names_the_client() {
        check(b"PROXY TCP4 192.0.2.1 10.0.0.1 4711 80\r\n", Ok(Some("192.0.2.1:4711")));
        check(b"PROXY TCP6 2001:db8::1 ::1 4711 80\r\n", Ok(Some("[2001:db8::1]:4711")));
        check(b"PROXY TCP6 ::ffff:192.0.2.1 ::1 4711 80\r\n", Ok(Some("192.0.2.1:4711")));
        check(b"PROXY UNKNOWN\r\n", Ok(None));
        check(b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n", Ok(None));
    }

    #[test]
    fn version_2_names_the_client() {
        check(&v2(1, 0x11, &ipv4()), Ok(Some("192.0.2.1:4711")));
        let tlv = [&ipv4()[..], &[0xe0, 0, 2, b'a', b'b']].concat();
        check(&v2(1, 0x11, &tlv), Ok(Some("192.0.2.1:4711")));
        let mut ipv6 = [0; 36];
        ipv6[..2].copy_from_slice(&[0x20, 0x01]);
        ipv6[15] = 1;
        ipv6[32..34].copy_from_slice(&[0x12, 0x67]);
        check(&v2(1, 0x21, &ipv6), Ok(Some("[2001::1]:4711")));
    }

    #[test]
    fn a_sender_may_speak_for_itself() {
        check(&v2(0, 0x00, &[]), Ok(None));
        check(&v2(0, 0x11, &ipv4()), Ok(None));
        check(&v2(1, 0x00, &[1, 2, 3]), Ok(None));
        check(&v2(1, 0x12, &ipv4()), Ok(None));
        check(&v2(1, 0x31, &[0; 216]), Ok(None));
    }

    #[test]
    fn what_is_no_header_is_an_error() {
        check(b"GET / HTTP/1.1\r\n\r\n", Err("does not begin"));
        check(b"PROXX TCP4", Err("does not begin"));
        check(b"PROXY TCP4 192.0.2.1 10.0.0.1 4711\r\n", Err("version 1"));
        check(b"PROXY TCP4 192.0.2.256 10.0.0.1 4711 80\r\n", Err("version 1"));
        check(b"PROXY UDP4 192.0.2.1 10.0.0.1 4711 80\r\n", Err("version 1"));
        check(b"PROXY TCP4 192.0.2.1 10.0.0.1 4711 99999\r\n", Err("version 1"));
        check(&[b"PROXY UNKNOWN ", &[b'x'; 200][..], b"\r\n"].concat(), Err("107 bytes"));
        check(&v2(2, 0x11, &ipv4()), Err("version 2"));
        check(&v2(1, 0x41, &ipv4()), Err("version 2"));
        check(&v2(1, 0x11, &ipv4()[..8]), Err("version 2"));
        let mut other = v2(1, 0x11, &ipv4());
        other[12] = 0x31;
        check(&other, Err("version 2"));
        check(&v2(1, 0x11, &[0; V2_BYTES_MAX]), Err("4112 bytes"));
    }

    #[test]
    fn a_connection_that_ends_early_is_told_so() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        for sent in [&b""[..], b"PROXY TCP4", &v2(1, 0x11, &ipv4())[..20]] {
            let read = runtime.block_on(read(&mut parts(sent, 3), &mut BytesMut::new()));
            assert!(matches!(read, Err(HeaderError::Closed)), "{read:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_beginning_is_a_header_or_an_error_and_no_more_is_read_than_may_be(
            prefix in 0..4_usize,
            bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..5000),
        ) {
            let prefix: &[u8] = match prefix {
                0 => b"",
                1 => b"PROXY TCP4 ",
                2 => b"\r\n\r\n\0\r\nQUIT\n",
                _ => b"\r\n\r\n\0\r\nQUIT\n\x21\x21",
            };
            let sent = [prefix, &bytes].concat();
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let mut stream = parts(&sent, 1500);
            let mut ahead = BytesMut::new();
            let read = runtime.block_on(read(&mut stream, &mut ahead));
            // What is held is what a header may be, and one read more.
            assert!(ahead.len() <= 2 * V2_BYTES_MAX);
            runtime.block_on(stream.read_to_end_into(&mut ahead));
            assert!(read.is_err() || sent.ends_with(&ahead));
        }
    }
}
