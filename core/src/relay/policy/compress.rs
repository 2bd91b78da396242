//! Compression of responses by gzip (RFC 1952), as they pass.
//!
//! Decides whether a response is compressed (RFC 9110 §8.4, §12.5.3) and does it chunk by chunk: each
//! is flushed as it comes, so that a stream of events stays one. Knows no exchange.

use std::io::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use flate2::write::GzEncoder;
use http::header::{
    ACCEPT_ENCODING, ACCEPT_RANGES, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE,
    CONTENT_TYPE, ETAG, HeaderName, HeaderValue, VARY,
};
use http::{HeaderMap, StatusCode};

use crate::config::policy::Compression;

/// Responses that are compressed at once in the process; beyond, they pass as they are. A compressor
/// holds about 300 KiB whatever passes through it.
const COMPRESSORS_MAX: usize = 512;

/// Digests of the bytes as the service sent them (RFC 9530, RFC 1864): a compressed body would belie
/// them.
const DIGESTS: [HeaderName; 4] = [
    HeaderName::from_static("content-digest"),
    HeaderName::from_static("repr-digest"),
    HeaderName::from_static("digest"),
    HeaderName::from_static("content-md5"),
];

static COMPRESSORS: AtomicUsize = AtomicUsize::new(0);

/// Whether the client takes gzip.
pub(super) fn accepts_gzip(headers: &HeaderMap) -> bool {
    let mut gzip = None;
    let mut any = None;
    for value in headers.get_all(ACCEPT_ENCODING) {
        for member in value.as_bytes().split(|byte| *byte == b',') {
            let mut parts = member.split(|byte| *byte == b';').map(<[u8]>::trim_ascii);
            let coding = parts.next().unwrap_or_default();
            let takes = parts.find_map(quality).unwrap_or(true);
            if coding.eq_ignore_ascii_case(b"gzip") || coding.eq_ignore_ascii_case(b"x-gzip") {
                gzip = Some(takes);
            } else if coding == b"*" {
                any = Some(takes);
            }
        }
    }
    gzip.or(any).unwrap_or(false)
}

/// Returns whether a weight is above zero; `None`: this is no weight.
fn quality(parameter: &[u8]) -> Option<bool> {
    let (name, value) =
        parameter.split_at_checked(parameter.iter().position(|b| *b == b'=')? + 1)?;
    if !name[..name.len() - 1].trim_ascii().eq_ignore_ascii_case(b"q") {
        return None;
    }
    // What is not a number is no wish for gzip either.
    Some(value.trim_ascii().iter().any(|byte| matches!(byte, b'1'..=b'9')))
}

/// What becomes of a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// Would never be compressed.
    Never,
    /// Would be for a client that takes it; caches must know (`Vary`).
    Other,
    /// Is.
    Gzip,
}

/// Decides on a response. `length` is that of the body, where known; to HEAD, of the one that GET gets.
pub(super) fn choose(
    config: &Compression,
    takes_gzip: bool,
    status: StatusCode,
    headers: &HeaderMap,
    length: Option<u64>,
) -> Choice {
    let is_bodiless = status.is_informational()
        || matches!(
            status,
            StatusCode::NO_CONTENT
                | StatusCode::RESET_CONTENT
                | StatusCode::PARTIAL_CONTENT
                | StatusCode::NOT_MODIFIED
        );
    let is_small = length.is_some_and(|length| length < config.min_size);
    let is_said = [CONTENT_ENCODING, CONTENT_RANGE].iter().any(|name| headers.contains_key(name));
    if is_bodiless
        || is_small
        || is_said
        || DIGESTS.iter().any(|name| headers.contains_key(name))
        || is_fixed(headers)
        || !is_compressible(headers.get(CONTENT_TYPE))
    {
        return Choice::Never;
    }
    if takes_gzip { Choice::Gzip } else { Choice::Other }
}

/// `no-transform` (RFC 9111 §5.2.2.6).
fn is_fixed(headers: &HeaderMap) -> bool {
    headers.get_all(CACHE_CONTROL).iter().any(|value| {
        value
            .as_bytes()
            .split(|byte| *byte == b',')
            .any(|directive| directive.trim_ascii().eq_ignore_ascii_case(b"no-transform"))
    })
}

/// Text in the wide sense. Pictures, films, archives and fonts of today are compressed already, and
/// gRPC's messages are its own.
fn is_compressible(content_type: Option<&HeaderValue>) -> bool {
    let Some(value) = content_type else { return false };
    let essence = value.as_bytes().split(|byte| *byte == b';').next().unwrap_or_default();
    let essence = essence.trim_ascii().to_ascii_lowercase();
    let Ok(essence) = std::str::from_utf8(&essence) else { return false };
    essence.starts_with("text/")
        || essence.ends_with("+json")
        || essence.ends_with("+xml")
        || essence.ends_with("+text")
        || matches!(
            essence,
            "application/json"
                | "application/javascript"
                | "application/ecmascript"
                | "application/x-javascript"
                | "application/xml"
                | "application/x-ndjson"
                | "application/jsonl"
                | "application/yaml"
                | "application/toml"
                | "application/graphql"
                | "application/wasm"
                | "application/x-www-form-urlencoded"
                | "application/vnd.ms-fontobject"
                | "font/ttf"
                | "font/otf"
                | "image/bmp"
                | "image/x-icon"
                | "image/vnd.microsoft.icon"
        )
}

/// Says that the answer depends on what the client takes.
pub(super) fn vary(headers: &mut HeaderMap) {
    let is_said = headers.get_all(VARY).iter().any(|value| {
        value.as_bytes().split(|byte| *byte == b',').any(|name| {
            let name = name.trim_ascii();
            name == b"*" || name.eq_ignore_ascii_case(b"accept-encoding")
        })
    });
    if !is_said {
        // A head at its limit of fields goes without.
        let _ = headers.try_append(VARY, HeaderValue::from_static("Accept-Encoding"));
    }
}

/// Makes a head that of the compressed body.
pub(super) fn mark(headers: &mut HeaderMap) {
    headers.remove(CONTENT_LENGTH);
    // Ranges of what the service has are not ranges of what the client gets.
    headers.remove(ACCEPT_RANGES);
    headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    let tag = headers.get(ETAG).filter(|tag| !tag.as_bytes().starts_with(b"W/"));
    // The bytes are others than the tag stands for, though they mean the same (RFC 9110 §8.8.1).
    if let Some(weak) = tag
        .and_then(|tag| HeaderValue::from_bytes(&[b"W/".as_slice(), tag.as_bytes()].concat()).ok())
    {
        headers.insert(ETAG, weak);
    }
}

/// Compresses one body.
pub(super) struct Gzip {
    encoder: GzEncoder<Vec<u8>>,
    _counted: Counted,
}

impl Gzip {
    /// Returns a compressor; `None`: as many run as may.
    pub(super) fn begin(config: &Compression) -> Option<Self> {
        let counted = Counted::begin()?;
        let level = flate2::Compression::new(config.level.clamp(1, 9));
        Some(Self { encoder: GzEncoder::new(Vec::new(), level), _counted: counted })
    }

    /// Compresses a chunk so that its reader can read all of it.
    pub(super) fn chunk(&mut self, chunk: &[u8]) -> Bytes {
        // Writing to memory does not fail.
        let _ = self.encoder.write_all(chunk);
        let _ = self.encoder.flush();
        Bytes::from(std::mem::take(self.encoder.get_mut()))
    }

    /// Compresses the last chunk, which may be empty, and ends.
    pub(super) fn end(mut self, chunk: &[u8]) -> Bytes {
        let _ = self.encoder.write_all(chunk);
        Bytes::from(self.encoder.finish().unwrap_or_default())
    }
}

struct Counted;

impl Counted {
    fn begin() -> Option<Self> {
        if COMPRESSORS.fetch_add(1, Ordering::Relaxed) >= COMPRESSORS_MAX {
            COMPRESSORS.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        Some(Self)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        COMPRESSORS.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    const CONFIG: Compression = Compression { level: 5, min_size: 1024 };

    fn map(fields: &[(&'static str, &str)]) -> HeaderMap {
        fields
            .iter()
            .map(|(name, value)| {
                (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
            })
            .collect()
    }

    #[test]
    fn a_client_takes_gzip_where_it_says_so() {
        let table: &[(&[&str], bool)] = &[
            (&[], false),
            (&["gzip"], true),
            (&["GZIP"], true),
            (&["x-gzip"], true),
            (&["br, gzip;q=0.5"], true),
            (&["br", "gzip"], true),
            (&["gzip;q=0"], false),
            (&["gzip; q=0.000"], false),
            (&["gzip ; Q = 0.001"], true),
            (&["gzip;level=0;q=1"], true),
            (&["*"], true),
            (&["*;q=0"], false),
            (&["gzip;q=0, *"], false),
            (&["gzip, *;q=0"], true),
            (&["identity"], false),
            (&[""], false),
            (&["gzipped"], false),
            (&["gzip;q=nonsense"], false),
        ];
        assert!(!table.is_empty());
        for (values, takes) in table {
            let headers: HeaderMap = values
                .iter()
                .map(|value| (ACCEPT_ENCODING, HeaderValue::from_str(value).unwrap()))
                .collect();
            assert_eq!(accepts_gzip(&headers), *takes, "{values:?}");
        }
    }

    #[test]
    fn what_is_compressed_and_what_is_not() {
        let json = ("content-type", "application/json");
        let table = [
            (200, vec![json], None, Choice::Gzip),
            (200, vec![json], Some(1024), Choice::Gzip),
            (200, vec![json], Some(1023), Choice::Never),
            (404, vec![("content-type", "Text/HTML; charset=utf-8")], None, Choice::Gzip),
            (200, vec![("content-type", "image/svg+xml")], None, Choice::Gzip),
            (200, vec![("content-type", "text/event-stream")], None, Choice::Gzip),
            (200, vec![("content-type", "image/png")], None, Choice::Never),
            (200, vec![("content-type", "application/grpc")], None, Choice::Never),
            (200, vec![], None, Choice::Never),
            (200, vec![json, ("content-encoding", "br")], None, Choice::Never),
            (200, vec![json, ("content-digest", "sha-256=:a:")], None, Choice::Never),
            (200, vec![json, ("cache-control", "public, No-Transform")], None, Choice::Never),
            (206, vec![json], None, Choice::Never),
            (204, vec![json], None, Choice::Never),
            (304, vec![json], None, Choice::Never),
            (101, vec![json], None, Choice::Never),
        ];
        assert!(!table.is_empty());
        for (status, fields, length, expected) in table {
            let (status, headers) = (StatusCode::from_u16(status).unwrap(), map(&fields));
            let choice = choose(&CONFIG, true, status, &headers, length);
            assert_eq!(choice, expected, "{status} {fields:?} {length:?}");
            let other = choose(&CONFIG, false, status, &headers, length);
            let kept = if expected == Choice::Gzip { Choice::Other } else { Choice::Never };
            assert_eq!(other, kept, "{status} {fields:?} {length:?} without gzip");
        }
    }

    #[test]
    fn a_compressed_head_says_what_it_is() {
        let mut headers = map(&[
            ("content-length", "5000"),
            ("accept-ranges", "bytes"),
            ("etag", "\"x\""),
            ("vary", "Origin"),
        ]);
        vary(&mut headers);
        vary(&mut headers);
        mark(&mut headers);
        let vary: Vec<_> = headers.get_all(VARY).iter().collect();
        assert_eq!(vary, ["Origin", "Accept-Encoding"]);
        assert_eq!(headers[ETAG], "W/\"x\"");
        assert_eq!(headers[CONTENT_ENCODING], "gzip");
        assert!(!headers.contains_key(CONTENT_LENGTH) && !headers.contains_key(ACCEPT_RANGES));
        mark(&mut headers);
        assert_eq!(headers[ETAG], "W/\"x\"", "weak once");
    }

    #[test]
    fn each_chunk_can_be_read_when_it_comes() {
        let mut gzip = Gzip::begin(&CONFIG).expect("room");
        let mut wire = Vec::new();
        let mut sent = Vec::new();
        for chunk in ["event: a\n\n", "event: b\n\n", "event: a\n\n"] {
            wire.extend_from_slice(&gzip.chunk(chunk.as_bytes()));
            sent.extend_from_slice(chunk.as_bytes());
            let mut read = vec![0; sent.len()];
            let mut decoder = flate2::read::GzDecoder::new(&*wire);
            decoder.read_exact(&mut read).expect("all that was sent");
            assert_eq!(read, sent);
        }
        wire.extend_from_slice(&gzip.end(b"the end"));
        sent.extend_from_slice(b"the end");
        let mut read = Vec::new();
        flate2::read::GzDecoder::new(&*wire).read_to_end(&mut read).expect("whole");
        assert_eq!(read, sent);
    }
}
