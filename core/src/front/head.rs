//! Checks of a request's head, and what is dispatched of it (RFC 9110, 9112 §3, 9113 §8.3).
//!
//! Pure. Two readers that disagree about a request's host or length can be played against each
//! other; whatever could be read in two ways is refused here, before anyone has seen a byte of it.

use std::sync::Arc;

use bytes::Bytes;
use http::header::{
    CONTENT_LENGTH, COOKIE, EXPECT, HOST, HeaderMap, HeaderValue, TRANSFER_ENCODING, UPGRADE,
};
use http::uri::PathAndQuery;
use http::{Method, StatusCode, Uri, Version, request};
use sidelane_abi::failure;

use super::answer::Refusal;
use crate::plugin::lend::RequestHead;

/// Returns the head of an HTTP/1 request as it is dispatched. `known` is an authority that has
/// passed before on this connection.
pub(super) fn of_http1(
    parts: request::Parts,
    scheme: Arc<str>,
    end: bool,
    known: &Bytes,
) -> Result<RequestHead, Refusal> {
    let request::Parts { method, uri, version, mut headers, .. } = parts;
    if method == Method::CONNECT {
        return Err(Refusal::unsupported("CONNECT is not supported"));
    }
    check_transfer_encoding(&headers)?;
    let host = take_host(&mut headers)?;
    let authority = match (uri.authority(), &host) {
        // RFC 9112 §3.2.2: the target's authority counts, but without Host the request is broken.
        (Some(_), None) if version >= Version::HTTP_11 => {
            return Err(Refusal::bad_request("no Host"));
        }
        (Some(authority), _) => authority.as_str().as_bytes(),
        (None, Some(host)) => host.as_bytes(),
        (None, None) => return Err(Refusal::bad_request("no Host")),
    };
    if let Some(host) = &host
        && host.as_bytes() != &known[..]
        && !is_authority(host.as_bytes())
    {
        return Err(Refusal::bad_request("invalid Host"));
    }
    let authority = accept_authority(authority, known)?;
    if let Some(scheme) = uri.scheme_str()
        && !scheme.eq_ignore_ascii_case("http")
        && !scheme.eq_ignore_ascii_case("https")
    {
        return Err(Refusal::bad_request("the target's scheme is neither http nor https"));
    }
    let target = target(&method, &uri)?;
    let expect_continue = !end
        && version >= Version::HTTP_11
        && headers
            .get(EXPECT)
            .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"));
    let can_upgrade = end && version == Version::HTTP_11 && headers.contains_key(UPGRADE);
    Ok(RequestHead {
        method,
        scheme,
        authority,
        target,
        protocol: None,
        version,
        headers,
        end,
        expect_continue,
        can_upgrade,
    })
}

/// Returns the head of an HTTP/2 request as it is dispatched.
pub(super) fn of_http2(
    parts: request::Parts,
    scheme: Arc<str>,
    end: bool,
    headers_max: usize,
    known: &Bytes,
) -> Result<RequestHead, Refusal> {
    let request::Parts { method, uri, version, mut headers, extensions, .. } = parts;
    if headers.len() > headers_max {
        return Err(Refusal {
            code: failure::TOO_LARGE,
            status: StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            reason: "too many header fields",
        });
    }
    let protocol = extensions.get::<h2::ext::Protocol>();
    if method == Method::CONNECT && protocol.is_none() {
        return Err(Refusal::unsupported("CONNECT without :protocol is not supported"));
    }
    let protocol = protocol.map(|protocol| Bytes::copy_from_slice(protocol.as_ref()));
    let can_upgrade = protocol.is_some() && !end;
    let host = take_host(&mut headers)?;
    let authority = match (uri.authority(), &host) {
        (Some(authority), Some(host))
            if !authority.as_str().as_bytes().eq_ignore_ascii_case(host.as_bytes()) =>
        {
            return Err(Refusal::bad_request(":authority and host differ"));
        }
        (Some(authority), _) => authority.as_str().as_bytes(),
        (None, Some(host)) => host.as_bytes(),
        (None, None) => return Err(Refusal::bad_request("neither :authority nor host")),
    };
    let authority = accept_authority(authority, known)?;
    if headers.contains_key(TRANSFER_ENCODING) {
        return Err(Refusal::bad_request("Transfer-Encoding in HTTP/2"));
    }
    let target = target(&method, &uri)?;
    join_cookies(&mut headers);
    // What follows an extended CONNECT is no body but the stream that it asks for.
    let end = end || can_upgrade;
    let expect_continue = !end
        && headers
            .get(EXPECT)
            .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"));
    Ok(RequestHead {
        method,
        scheme,
        authority,
        target,
        protocol,
        version,
        headers,
        end,
        expect_continue,
        can_upgrade,
    })
}

/// Returns the length that the head states, where it states one.
pub(super) fn stated_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// hyper has refused what does not end in `chunked`, and drops `Content-Length` beside it and closes
/// after the response. What is left are codings that nobody here undoes.
fn check_transfer_encoding(headers: &HeaderMap) -> Result<(), Refusal> {
    let mut values = headers.get_all(TRANSFER_ENCODING).iter();
    let Some(first) = values.next() else { return Ok(()) };
    if values.next().is_none() && first.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked") {
        return Ok(());
    }
    let twice = headers
        .get_all(TRANSFER_ENCODING)
        .iter()
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
        .filter(|coding| coding.trim_ascii().eq_ignore_ascii_case(b"chunked"))
        .count()
        > 1;
    Err(if twice {
        Refusal::bad_request("Transfer-Encoding says chunked more than once")
    } else {
        Refusal::unsupported("a Transfer-Encoding other than chunked")
    })
}

/// Takes the Host field out: the authority carries it.
fn take_host(headers: &mut HeaderMap) -> Result<Option<HeaderValue>, Refusal> {
    if headers.get_all(HOST).iter().nth(1).is_some() {
        return Err(Refusal::bad_request("more than one Host"));
    }
    Ok(headers.remove(HOST))
}

fn accept_authority(authority: &[u8], known: &Bytes) -> Result<Bytes, Refusal> {
    if !known.is_empty() && authority == &known[..] {
        return Ok(known.clone());
    }
    if authority.contains(&b'@') {
        return Err(Refusal::bad_request("user information in the authority"));
    }
    if !is_authority(authority) {
        return Err(Refusal::bad_request("invalid Host"));
    }
    Ok(Bytes::copy_from_slice(authority))
}

/// Returns path and query as sent, `*` for OPTIONS alone.
fn target(method: &Method, uri: &Uri) -> Result<Bytes, Refusal> {
    let Some(sent) = uri.path_and_query().map(PathAndQuery::as_str) else {
        return Err(Refusal::bad_request("the target has no path"));
    };
    match sent.as_bytes() {
        b"/" => Ok(Bytes::from_static(b"/")),
        b"*" if method == Method::OPTIONS => Ok(Bytes::from_static(b"*")),
        [b'/', ..] => Ok(Bytes::copy_from_slice(sent.as_bytes())),
        // `http://host?query`: RFC 9110 §4.2.3, an empty path is `/`.
        [] | [b'?', ..] if uri.authority().is_some() => Ok(Bytes::from(format!("/{sent}"))),
        _ => Err(Refusal::bad_request("the target is neither a path nor an absolute URI")),
    }
}

/// HTTP/2 may split Cookie for the sake of compression; elsewhere it is one field (RFC 9113 §8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let http::header::Entry::Occupied(mut entry) = headers.entry(COOKIE) else { return };
    if entry.iter().nth(1).is_none() {
        return;
    }
    let crumbs: Vec<&[u8]> = entry.iter().map(HeaderValue::as_bytes).collect();
    let joined = HeaderValue::from_maybe_shared(Bytes::from(crumbs.join(&b"; "[..])))
        .expect("values and a separator that are valid make a valid value");
    entry.insert(joined);
}

/// Returns whether `bytes` are `uri-host [":" port]` (RFC 3986 §3.2.2) with a host that is not empty.
pub(crate) fn is_authority(bytes: &[u8]) -> bool {
    let (host_is_valid, rest) = if let Some(literal) = bytes.strip_prefix(b"[") {
        let Some(close) = literal.iter().position(|byte| *byte == b']') else { return false };
        (is_ip_literal(&literal[..close]), &literal[close + 1..])
    } else {
        let end = bytes.iter().position(|byte| *byte == b':').unwrap_or(bytes.len());
        (is_reg_name(&bytes[..end]), &bytes[end..])
    };
    host_is_valid
        && match rest {
            [] => true,
            [b':', port @ ..] => is_port(port),
            _ => false,
        }
}

/// `reg-name`, which takes IPv4 addresses too.
fn is_reg_name(bytes: &[u8]) -> bool {
    let mut rest = bytes;
    while let [first, tail @ ..] = rest {
        rest = match (first, tail) {
            (b'%', [high, low, tail @ ..])
                if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() =>
            {
                tail
            }
            (byte, tail) if is_unreserved_or_sub_delim(*byte) => tail,
            _ => return false,
        };
    }
    !bytes.is_empty()
}

/// `IPv6address / IPvFuture`, without the brackets.
fn is_ip_literal(bytes: &[u8]) -> bool {
    if let [b'v' | b'V', future @ ..] = bytes {
        let Some(dot) = future.iter().position(|byte| *byte == b'.') else { return false };
        let (version, address) = (&future[..dot], &future[dot + 1..]);
        return !version.is_empty()
            && version.iter().all(u8::is_ascii_hexdigit)
            && !address.is_empty()
            && address.iter().all(|byte| *byte == b':' || is_unreserved_or_sub_delim(*byte));
    }
    str::from_utf8(bytes).is_ok_and(|text| text.parse::<std::net::Ipv6Addr>().is_ok())
}

fn is_unreserved_or_sub_delim(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=".contains(&byte)
}

/// Decimal, at most 65535; `host:` is allowed.
fn is_port(digits: &[u8]) -> bool {
    digits.iter().all(u8::is_ascii_digit)
        && digits
            .iter()
            .try_fold(0_u16, |port, digit| {
                port.checked_mul(10)?.checked_add(u16::from(digit - b'0'))
            })
            .is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authorities() {
        let valid: &[&[u8]] = &[
            b"a",
            b"api.localhost",
            b"api.localhost:9080",
            b"api.localhost:",
            b"127.0.0.1:65535",
            b"[::1]",
            b"[2001:db8::1]:443",
            b"[v1.a:b]",
            b"a_b.example",
            b"%41.example",
            b"a,b",
        ];
        let invalid: &[&[u8]] = &[
            b"",
            b":80",
            b"a b",
            b"a/b",
            b"a?b",
            b"a#b",
            b"u@a",
            b"a:b",
            b"a:80:81",
            b"a:65536",
            b"a:99999999",
            b"[::1",
            b"[::1]80",
            b"[]",
            b"[g::]",
            b"[v.a]",
            b"%4",
            b"%zz",
            b"a\x80",
            b"a\\b",
            b"<a>",
        ];
        for host in valid {
            assert!(is_authority(host), "{}", String::from_utf8_lossy(host));
        }
        for host in invalid {
            assert!(!is_authority(host), "{}", String::from_utf8_lossy(host));
        }
    }

    #[test]
    fn cookie_crumbs_are_joined_in_order() {
        let mut headers = HeaderMap::new();
        for crumb in ["a=1", "b=2", "c=\u{e9}"] {
            headers.append(COOKIE, HeaderValue::from_bytes(crumb.as_bytes()).unwrap());
        }
        join_cookies(&mut headers);
        let values: Vec<_> = headers.get_all(COOKIE).iter().collect();
        assert_eq!(values, ["a=1; b=2; c=\u{e9}".as_bytes()]);
    }
}
