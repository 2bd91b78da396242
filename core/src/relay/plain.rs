//! What a listener without TLS answers by itself, before any plugin is asked: how an authority proves a
//! name (RFC 8555 §8.3), and where `https` is.
//!
//! Pure but for the look at what is proved.

use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue};
use http::{Method, StatusCode};
use sidelane_abi::failure;

use super::entry::answer_redirect;
use crate::front::ConnectionInfo;
use crate::plugin::lend::{Closed, RequestHead, Reset, Responder, ResponseHead};
use crate::router;
use crate::tls::Issued;

/// Where an authority asks for its token.
const CHALLENGES: &[u8] = b"/.well-known/acme-challenge/";

/// What the exchange is counted as: nobody was asked whose it is.
pub(super) fn protocol_type() -> &'static Arc<str> {
    static HTTP: LazyLock<Arc<str>> = LazyLock::new(|| "HTTP".into());
    &HTTP
}

/// What is said.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// To an authority: the proof.
    Proof(Arc<str>),
    /// To all others: the same by `https`.
    Https(HeaderValue),
    /// There is no saying where that is.
    Nothing,
}

impl Said {
    /// Returns what is said to a request; `None`: it is for a route.
    pub(super) fn to(
        connection: &ConnectionInfo,
        head: &RequestHead,
        issued: &Issued,
    ) -> Option<Self> {
        if connection.tls.is_some() {
            return None;
        }
        if let Some(proof) = proof(head, issued) {
            return Some(Self::Proof(proof));
        }
        let port = connection.https_redirect?;
        let location = router::https_location(&head.authority, port, &head.target);
        Some(location.map_or(Self::Nothing, Self::Https))
    }

    /// Says it. Returns the code by which the exchange ends.
    pub(super) fn say(self, responder: &mut impl Responder, method: &Method) -> u32 {
        let answered = match self {
            Self::Proof(proof) => answer_proof(responder, &proof, method),
            Self::Https(location) => {
                answer_redirect(responder, StatusCode::PERMANENT_REDIRECT, location, method)
            }
            Self::Nothing => {
                responder.abort(Reset::new(failure::BAD_REQUEST));
                return failure::BAD_REQUEST;
            }
        };
        if answered.is_ok() { failure::NONE } else { failure::CLIENT_GONE }
    }
}

fn proof(head: &RequestHead, issued: &Issued) -> Option<Arc<str>> {
    let token = head.target.strip_prefix(CHALLENGES)?;
    if head.method != Method::GET && head.method != Method::HEAD {
        return None;
    }
    let token = token.split(|byte| *byte == b'?').next().unwrap_or_default();
    issued.answers.load().get(str::from_utf8(token).ok()?).cloned()
}

fn answer_proof(
    responder: &mut impl Responder,
    proof: &Arc<str>,
    method: &Method,
) -> Result<(), Closed> {
    let body = Bytes::copy_from_slice(proof.as_bytes());
    let length = body.len() as u64;
    let mut headers = HeaderMap::with_capacity(2);
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    let first = (method != Method::HEAD).then_some(body);
    let head = ResponseHead { status: StatusCode::OK, headers, body_length: Some(length) };
    responder.head(head, first, true)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn said(redirect: Option<u16>, method: Method, host: &str, target: &str) -> Option<Said> {
        let issued = Issued::default();
        let answers = HashMap::from([("tok".into(), "tok.thumb".into())]);
        issued.answers.store(Arc::new(answers));
        let mut connection =
            ConnectionInfo::plain("http".into(), "192.0.2.1:4711".parse().unwrap());
        connection.https_redirect = redirect;
        let head = RequestHead {
            method,
            scheme: "http".into(),
            authority: Bytes::copy_from_slice(host.as_bytes()),
            target: Bytes::copy_from_slice(target.as_bytes()),
            protocol: None,
            version: http::Version::HTTP_11,
            headers: HeaderMap::new(),
            end: true,
            expect_continue: false,
            can_upgrade: false,
        };
        Said::to(&connection, &head, &issued)
    }

    #[test]
    fn a_known_token_is_answered_on_any_listener_without_tls() {
        let proof = Some(Said::Proof("tok.thumb".into()));
        let path = "/.well-known/acme-challenge/tok";
        for redirect in [None, Some(443)] {
            assert_eq!(said(redirect, Method::GET, "a", path), proof);
            assert_eq!(said(redirect, Method::HEAD, "a", path), proof);
        }
        assert_eq!(said(None, Method::GET, "a", "/.well-known/acme-challenge/tok?x"), proof);
        for other in ["/.well-known/acme-challenge/", "/.well-known/acme-challenge/tok/x", "/tok"] {
            assert_eq!(said(None, Method::GET, "a", other), None, "{other}");
        }
        assert_eq!(said(None, Method::POST, "a", path), None);
        assert!(matches!(said(Some(443), Method::POST, "a", path), Some(Said::Https(_))));
    }

    #[test]
    fn all_else_is_sent_to_https_where_the_listener_does_so() {
        let location = |location: &'static str| HeaderValue::from_static(location);
        let to = said(Some(8443), Method::POST, "a.example:8080", "/x?y").unwrap();
        assert_eq!(to, Said::Https(location("https://a.example:8443/x?y")));
        let to = said(Some(443), Method::GET, "a.example", "/.well-known/acme-challenge/other");
        let other = "https://a.example/.well-known/acme-challenge/other";
        assert_eq!(to, Some(Said::Https(location(other))));
        assert_eq!(said(None, Method::GET, "a.example", "/"), None);
    }
}
