//! What becomes of a target that a route takes: its prefix replaced, or where a redirect leads. Pure.

use http::HeaderValue;

use crate::config::policy::Redirect;

/// Puts `new` in place of the whole segments `prefix` of a path, with the query as it is. What comes
/// out begins with one `/`.
pub(crate) fn replace_prefix(target: &[u8], prefix: &str, new: &str) -> Vec<u8> {
    let rest = target.strip_prefix(prefix.as_bytes()).unwrap_or(target);
    let mut out = Vec::with_capacity(1 + new.len() + rest.len());
    out.extend_from_slice(new.trim_end_matches('/').as_bytes());
    if out.first() != Some(&b'/') {
        out.insert(0, b'/');
    }
    match rest.first() {
        // `/` alone stands where nothing is left of the prefix.
        Some(b'/') if out == b"/" => {
            let path = rest.iter().position(|byte| *byte != b'/').unwrap_or(rest.len());
            out.extend_from_slice(&rest[path..]);
        }
        _ => out.extend_from_slice(rest),
    }
    out
}

/// Returns the `Location` of a redirect (RFC 9110 §10.2.2). What is not said stays as the client asked:
/// with neither scheme nor host it is a path, with a host alone `//host/path`, which keeps the scheme
/// that the client used, whoever ended TLS. A new scheme goes without the old one's port.
pub(crate) fn location(
    redirect: &Redirect,
    prefix: &str,
    authority: &[u8],
    target: &[u8],
) -> Option<HeaderValue> {
    let target = if target.first() == Some(&b'/') { target } else { b"/" };
    let path = match &redirect.path_prefix {
        Some(new) => replace_prefix(target, prefix, new),
        None => target.to_vec(),
    };
    let mut out = Vec::with_capacity(16 + authority.len() + path.len());
    match (&redirect.scheme, &redirect.host) {
        (None, None) => {}
        (None, Some(host)) => {
            out.extend_from_slice(b"//");
            out.extend_from_slice(host.as_bytes());
        }
        (Some(scheme), host) => {
            out.extend_from_slice(scheme.as_bytes());
            out.extend_from_slice(b"://");
            match host {
                Some(host) => out.extend_from_slice(host.as_bytes()),
                None => out.extend_from_slice(without_port(authority)),
            }
        }
    }
    let is_relative = out.is_empty();
    // `//host` and `/\host` would lead away from here.
    let slashes = path.iter().take_while(|byte| matches!(byte, b'/' | b'\\')).count();
    let start = if is_relative { slashes.saturating_sub(1) } else { 0 };
    out.push(b'/');
    for byte in path.get(start + 1..).unwrap_or_default() {
        match byte {
            b'\\' => out.extend_from_slice(b"%5C"),
            byte => out.push(*byte),
        }
    }
    HeaderValue::from_bytes(&out).ok()
}

/// Returns where a request for `authority` and `target` is by `https` at `port`.
pub(crate) fn https_location(authority: &[u8], port: u16, target: &[u8]) -> Option<HeaderValue> {
    let host = without_port(authority);
    if host.is_empty() {
        return None;
    }
    let mut out = Vec::with_capacity(16 + host.len() + target.len());
    out.extend_from_slice(b"https://");
    out.extend_from_slice(host);
    if port != 443 {
        out.extend_from_slice(format!(":{port}").as_bytes());
    }
    // `*` of OPTIONS has no place in a URL.
    out.extend_from_slice(if target.first() == Some(&b'/') { target } else { b"/" });
    HeaderValue::from_bytes(&out).ok()
}

fn without_port(authority: &[u8]) -> &[u8] {
    match authority.iter().rposition(|byte| *byte == b':') {
        Some(colon) if authority[colon + 1..].iter().all(u8::is_ascii_digit) => &authority[..colon],
        _ => authority,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_prefix_is_replaced_by_whole_segments() {
        let table = [
            // target, prefix, new, expected
            ("/api/x", "/api", "", "/x"),
            ("/api", "/api", "", "/"),
            ("/api?q=1", "/api", "", "/?q=1"),
            ("/api/", "/api", "", "/"),
            ("/api/x?q=/api", "/api", "/v1", "/v1/x?q=/api"),
            ("/api", "/api", "/v1", "/v1"),
            ("/api?q", "/api", "/v1", "/v1?q"),
            ("/api/", "/api", "/v1", "/v1/"),
            ("/api/x", "/api", "/v1/", "/v1/x"),
            ("/api/x", "/api", "/", "/x"),
            ("/x", "", "/v1", "/v1/x"),
            ("/", "", "/v1", "/v1/"),
            ("/", "", "", "/"),
            ("/api//evil.example", "/api", "", "/evil.example"),
            ("/api//x", "/api", "/v1", "/v1//x"),
        ];
        assert!(!table.is_empty());
        for (target, prefix, new, expected) in table {
            let replaced = replace_prefix(target.as_bytes(), prefix, new);
            assert_eq!(String::from_utf8_lossy(&replaced), expected, "{target} {prefix} {new:?}");
        }
    }

    #[test]
    fn a_location_keeps_what_the_redirect_does_not_say() {
        let redirect = |scheme: &str, host: &str, prefix: Option<&str>| Redirect {
            status: 308,
            scheme: (!scheme.is_empty()).then(|| scheme.into()),
            host: (!host.is_empty()).then(|| host.into()),
            path_prefix: prefix.map(Arc::from),
        };
        let table = [
            (redirect("https", "", None), "/a?b=c", "https://old.example/a?b=c"),
            (redirect("https", "new.example", None), "/a", "https://new.example/a"),
            (redirect("", "new.example:8443", None), "/a?b", "//new.example:8443/a?b"),
            (redirect("", "", Some("/x")), "/p/a?b", "/x/a?b"),
            (redirect("", "", Some("")), "/p/a", "/a"),
            (redirect("", "", Some("")), "/p//evil.example/", "/evil.example/"),
            (redirect("", "", Some("/x")), "/p", "/x"),
            (redirect("", "", None), "//evil.example", "/evil.example"),
            (redirect("", "", None), "/\\evil.example\\", "/evil.example%5C"),
            (redirect("https", "new.example", None), "//a", "https://new.example//a"),
            (redirect("https", "new.example", Some("/x")), "*", "https://new.example/x/"),
        ];
        assert!(!table.is_empty());
        for (redirect, target, expected) in table {
            let location = location(&redirect, "/p", b"old.example:9080", target.as_bytes());
            assert_eq!(location.expect("a location"), expected, "{redirect:?} {target}");
        }
        assert_eq!(without_port(b"[::1]:80"), b"[::1]");
        assert_eq!(without_port(b"[::1]"), b"[::1]");
        assert_eq!(without_port(b"a"), b"a");
    }

    #[test]
    fn https_is_where_the_client_asked() {
        let table = [
            (&b"a.example"[..], 443, &b"/x?y=/z"[..], Some("https://a.example/x?y=/z")),
            (b"a.example:80", 443, b"/", Some("https://a.example/")),
            (b"a.example:", 8443, b"/", Some("https://a.example:8443/")),
            (b"[2001:db8::1]:80", 8443, b"/", Some("https://[2001:db8::1]:8443/")),
            (b"[2001:db8::1]", 443, b"//x", Some("https://[2001:db8::1]//x")),
            (b"a.example", 443, b"*", Some("https://a.example/")),
            (b":80", 443, b"/", None),
            (b"a.example", 443, b"/\n", None),
        ];
        for (authority, port, target, expected) in table {
            let location = https_location(authority, port, target);
            assert_eq!(location, expected.map(HeaderValue::from_static), "{expected:?}");
        }
    }

    proptest::proptest! {
        /// Whatever a client asks for, a redirect that names no host stays on this one.
        #[test]
        fn a_relative_location_leads_nowhere_else(
            target in "[/\\\\a-z.?:@]{0,12}",
            prefix in proptest::option::of("(/[a-z]{1,2}){0,2}/?"),
        ) {
            let redirect = Redirect {
                status: 307,
                scheme: None,
                host: None,
                path_prefix: prefix.map(|prefix| prefix.as_str().into()),
            };
            let target = format!("/{target}");
            let location = location(&redirect, "/a", b"h", target.as_bytes()).expect("a location");
            let path = location.as_bytes();
            assert_eq!(path.first(), Some(&b'/'), "{target}");
            assert!(!matches!(path.get(1), Some(b'/' | b'\\')), "{target}: {location:?}");
        }
    }
}
