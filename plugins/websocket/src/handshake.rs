//! What both ends know of the opening handshake (RFC 6455 §4, RFC 8441).

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha1::{Digest, Sha1};
use sidelane_http_born::fields::{self, Kind, Nominated};
use sidelane_http_born::wire::Field;
use sidelane_plugin::RequestHead;

/// Appended to a key before it is hashed (RFC 6455 §1.3).
const GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

const KEY: &[u8] = b"sec-websocket-key";
const VERSION: &[u8] = b"sec-websocket-version";
const ACCEPT: &[u8] = b"sec-websocket-accept";
pub(crate) const PROTOCOL: &[u8] = b"sec-websocket-protocol";
const EXTENSIONS: &[u8] = b"sec-websocket-extensions";

/// Bytes of a key before they are encoded.
const KEY_BYTES: usize = 16;

/// What is wrong with a handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Answered by 426, which names the version that is spoken.
    Version,
    Key,
    /// The request has a body.
    Body,
}

/// Whether a request asks for a WebSocket.
pub(crate) fn is_asked(head: &RequestHead<'_>) -> bool {
    if !head.can_upgrade() {
        return false;
    }
    if head.version() == 20 {
        return head.method() == "CONNECT"
            && head.protocol().is_some_and(|name| name.eq_ignore_ascii_case(b"websocket"));
    }
    head.version() == 11
        && head.method() == "GET"
        && names(head.headers(), b"upgrade", b"websocket")
        && names(head.headers(), b"connection", b"upgrade")
}

/// Whether one of the fields `name` lists `token`.
pub(crate) fn names<'a>(
    mut fields: impl Iterator<Item = Field<'a>>,
    name: &[u8],
    token: &[u8],
) -> bool {
    fields.any(|(candidate, value)| {
        candidate == name && fields::tokens(value).any(|item| item.eq_ignore_ascii_case(token))
    })
}

/// Checks what a client asks. Returns its key; `None`: over HTTP/2 there is none.
pub(crate) fn check<'a>(head: &RequestHead<'a>) -> Result<Option<&'a [u8]>, Fault> {
    if one(head, VERSION).is_none_or(|version| version.trim_ascii() != b"13") {
        return Err(Fault::Version);
    }
    if head.version() == 20 {
        return Ok(None);
    }
    if !head.ends() {
        return Err(Fault::Body);
    }
    let key = one(head, KEY).map(<[u8]>::trim_ascii).ok_or(Fault::Key)?;
    let mut decoded = [0; KEY_BYTES + 2];
    match STANDARD.decode_slice(key, &mut decoded) {
        Ok(KEY_BYTES) => Ok(Some(key)),
        _ => Err(Fault::Key),
    }
}

/// The value of a field that may stand once.
fn one<'a>(head: &RequestHead<'a>, name: &[u8]) -> Option<&'a [u8]> {
    let mut values = head.headers().filter(|(candidate, _)| *candidate == name);
    let (_, value) = values.next()?;
    values.next().is_none().then_some(value)
}

/// Whether a field passes with the handshake: those of one connection do not, and the subprotocol
/// travels by itself.
pub(crate) fn passes(name: &[u8], nominated: &Nominated<'_>) -> bool {
    let own = name == KEY || name == VERSION || name == ACCEPT || name == PROTOCOL;
    !own && (fields::passes(name, nominated))
}

/// As [`passes`]; what an intermediary before the relay wrote of the client only where `forwarded`.
pub(crate) fn passes_to_service(name: &[u8], nominated: &Nominated<'_>, forwarded: bool) -> bool {
    passes(name, nominated) && (forwarded || fields::kind(name) != Kind::Forwarded)
}

/// Whether a response's fields negotiate an extension, to which reserved bits then belong.
pub(crate) fn extended<'a>(mut fields: impl Iterator<Item = Field<'a>>) -> bool {
    fields.any(|(name, value)| name == EXTENSIONS && fields::tokens(value).next().is_some())
}

/// Returns the `Sec-WebSocket-Accept` that answers `key`.
pub(crate) fn accept(key: &[u8]) -> String {
    let mut hash = Sha1::new();
    hash.update(key);
    hash.update(GUID);
    STANDARD.encode(hash.finalize())
}

/// Returns a key of our own.
pub(crate) fn key() -> Result<String, String> {
    random::<KEY_BYTES>().map(|bytes| STANDARD.encode(bytes))
}

/// Returns bytes that nobody can foresee.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], String> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)
        .map_err(|error| format!("the system gives no random bytes: {error}"))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accept_is_the_rfcs() {
        assert_eq!(accept(b"dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[test]
    fn keys_differ_and_are_16_bytes() {
        let (a, b) = (key().unwrap(), key().unwrap());
        assert_ne!(a, b);
        assert_eq!(STANDARD.decode(&a).unwrap().len(), KEY_BYTES);
    }

    #[test]
    fn empty_extensions_are_none() {
        let fields = |value: &'static [u8]| [(EXTENSIONS, value)].into_iter();
        assert!(extended(fields(b"permessage-deflate; client_no_context_takeover")));
        assert!(!extended(fields(b" , ")));
        assert!(!extended(fields(b"")));
    }
}
