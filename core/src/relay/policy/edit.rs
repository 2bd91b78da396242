//! What a route changes in heads: fields, host and path; and where a redirect leads.
//!
//! Pure. Knows no exchange.

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH, EXPECT, HOST};
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::config::policy::{HeaderChanges, Redirect, Rewrite};
use crate::plugin::lend::RequestHead;

const FORWARDED: HeaderName = HeaderName::from_static("forwarded");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// What `Connection` says that is no end-to-end field's name.
const OPTIONS: [&str; 6] =
    ["close", "keep-alive", "upgrade", "te", "transfer-encoding", "http2-settings"];

/// Removes, sets, adds, in this order.
pub(in crate::relay) fn change(headers: &mut HeaderMap, changes: &HeaderChanges) {
    for name in &changes.remove {
        headers.remove(name);
    }
    // A name that is set twice gets both values: the first replaces, the others follow.
    for (index, (name, value)) in changes.set.iter().enumerate() {
        if changes.set[..index].iter().any(|(earlier, _)| earlier == name) {
            append(headers, name, value);
        } else if headers.try_insert(name.clone(), value.clone()).is_err() {
            tracing::warn!(field = name.as_str(), "a head has too many fields to set one more");
        }
    }
    for (name, value) in &changes.add {
        append(headers, name, value);
    }
}

fn append(headers: &mut HeaderMap, name: &HeaderName, value: &HeaderValue) {
    if headers.try_append(name.clone(), value.clone()).is_err() {
        tracing::warn!(field = name.as_str(), "a head has too many fields to add one more");
    }
}

/// Ends here what a request's `Connection` names (RFC 9110 §7.6.1), before the route changes anything:
/// else a client could have the route's own fields taken out again behind us. What the protocol's
/// plugin reads of the connection stays.
pub(in crate::relay) fn end_hop(headers: &mut HeaderMap) {
    let mut kept: Vec<u8> = Vec::new();
    let mut named: Vec<HeaderName> = Vec::new();
    for value in headers.get_all(CONNECTION) {
        for token in value.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
            if OPTIONS.iter().any(|option| token.eq_ignore_ascii_case(option.as_bytes())) {
                if !kept.is_empty() {
                    kept.extend_from_slice(b", ");
                }
                kept.extend_from_slice(token);
            } else if let Ok(name) = HeaderName::from_bytes(token) {
                named.push(name);
            }
        }
    }
    if named.is_empty() {
        return;
    }
    // Length and host are not the connection's, whatever it says.
    for name in named.iter().filter(|name| !matches!(**name, CONTENT_LENGTH | HOST | EXPECT)) {
        headers.remove(name);
    }
    match HeaderValue::from_maybe_shared(Bytes::from(kept)) {
        Ok(kept) if !kept.is_empty() => _ = headers.insert(CONNECTION, kept),
        _ => _ = headers.remove(CONNECTION),
    }
}

/// Rewrites host and path. `prefix` is the route's, `changes` are what is made of the fields after
/// this. Returns whether the sidecar's end leaves what stands in `Forwarded` and `X-Forwarded-*` and
/// adds to it, as it does to a trusted proxy's: where what the client asked for stands there, or the
/// route says such a field itself. `is_trusted`: the client is such a proxy, and what it wrote stays.
pub(in crate::relay) fn rewrite(
    head: &mut RequestHead,
    rewrite: &Rewrite,
    prefix: &str,
    changes: &HeaderChanges,
    is_trusted: bool,
) -> bool {
    if let Some(new) = &rewrite.path_prefix
        && head.target.first() == Some(&b'/')
    {
        head.target = Bytes::from(replace_prefix(&head.target, prefix, new));
    }
    let said = changes.set.iter().chain(&changes.add).any(|(name, _)| is_forwarded(name));
    if rewrite.host.is_none() && !said {
        return is_trusted;
    }
    if !is_trusted {
        let theirs: Vec<HeaderName> =
            head.headers.keys().filter(|name| is_forwarded(name)).cloned().collect();
        for name in theirs {
            head.headers.remove(name);
        }
    }
    if !head.headers.contains_key(X_FORWARDED_HOST)
        && let Ok(asked) = HeaderValue::from_bytes(&head.authority)
    {
        // A head at its limit of fields goes without.
        let _ = head.headers.try_insert(X_FORWARDED_HOST, asked);
    }
    let Some(host) = &rewrite.host else { return true };
    head.authority = Bytes::copy_from_slice(host.as_bytes());
    if head.headers.contains_key(HOST)
        && let Ok(value) = HeaderValue::from_str(host)
    {
        head.headers.insert(HOST, value);
    }
    true
}

fn is_forwarded(name: &HeaderName) -> bool {
    *name == FORWARDED || name.as_str().starts_with("x-forwarded-")
}

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
    fn what_connection_names_ends_here() {
        let table: &[(&[&str], &str, &str)] = &[
            // Connection, what is left of it, what is left beside
            (&[], "", "x-a x-b"),
            (&["close"], "close", "x-a x-b"),
            (&["Close, X-A"], "Close", "x-b"),
            (&["x-a,,x-b ", "upgrade"], "upgrade", ""),
            (&["x-a"], "", "x-b"),
            (&["x-c, host, content-length, \u{fc}, a b"], "", "x-a x-b"),
        ];
        assert!(!table.is_empty());
        for (values, connection, rest) in table {
            let mut headers = HeaderMap::new();
            for value in *values {
                headers.append(CONNECTION, HeaderValue::from_str(value).unwrap());
            }
            for name in ["x-a", "x-b", "host", "content-length"] {
                headers.insert(name, HeaderValue::from_static("1"));
            }
            end_hop(&mut headers);
            let left = headers.get_all(CONNECTION).iter().map(|value| value.as_bytes());
            let left: Vec<_> = left.map(String::from_utf8_lossy).collect();
            assert_eq!(left.join("|"), *connection, "{values:?}");
            let left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
            let left: Vec<_> = left.into_iter().filter(|name| name.starts_with("x-")).collect();
            assert_eq!(left.join(" "), *rest, "{values:?}");
            assert!(headers.contains_key(HOST) && headers.contains_key(CONTENT_LENGTH));
        }
    }

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
    fn fields_are_removed_then_set_then_added() {
        let field = |name: &'static str, value: &'static str| {
            (HeaderName::from_static(name), HeaderValue::from_static(value))
        };
        let mut headers: HeaderMap =
            [field("a", "1"), field("b", "2"), field("c", "3")].into_iter().collect();
        let changes = HeaderChanges {
            set: vec![field("b", "x"), field("a", "new"), field("a", "more")],
            add: vec![field("c", "4")],
            remove: vec![HeaderName::from_static("a"), HeaderName::from_static("z")],
        };
        change(&mut headers, &changes);
        let all = |name: &str| -> Vec<_> {
            headers.get_all(name).iter().map(|value| value.to_str().unwrap().to_owned()).collect()
        };
        assert_eq!(all("a"), ["new", "more"]);
        assert_eq!(all("b"), ["x"]);
        assert_eq!(all("c"), ["3", "4"]);
    }

    fn head(fields: &[(&'static str, &'static str)]) -> RequestHead {
        RequestHead {
            method: http::Method::GET,
            scheme: "http".into(),
            authority: Bytes::from_static(b"shop.example.org"),
            target: Bytes::from_static(b"/api/x"),
            protocol: None,
            version: http::Version::HTTP_11,
            headers: fields
                .iter()
                .map(|(name, value)| {
                    (HeaderName::from_static(name), HeaderValue::from_static(value))
                })
                .collect(),
            end: true,
            expect_continue: false,
            can_upgrade: false,
        }
    }

    #[test]
    fn a_rewritten_host_still_tells_what_the_client_asked_for() {
        let none = HeaderChanges::default();
        let rules = Rewrite { host: Some("app.internal".into()), path_prefix: Some("/v1".into()) };
        let theirs = [("host", "shop.example.org"), ("x-forwarded-host", "evil.example")];
        let mut asked = head(&theirs);
        assert!(rewrite(&mut asked, &rules, "/api", &none, false));
        assert_eq!(asked.authority, "app.internal");
        assert_eq!(asked.target, "/v1/x");
        assert_eq!(asked.headers["host"], "app.internal");
        assert_eq!(asked.headers["x-forwarded-host"], "shop.example.org");
        let mut proxied = head(&[("x-forwarded-host", "public.example"), ("forwarded", "for=a")]);
        assert!(rewrite(&mut proxied, &rules, "/api", &none, true));
        assert_eq!(proxied.headers["x-forwarded-host"], "public.example");
        assert_eq!(proxied.headers["forwarded"], "for=a");
    }

    #[test]
    fn a_rewritten_path_alone_leaves_the_host() {
        let none = HeaderChanges::default();
        let rules = Rewrite { host: None, path_prefix: Some("".into()) };
        let mut asked = head(&[("x-forwarded-host", "evil.example")]);
        assert!(!rewrite(&mut asked, &rules, "/api", &none, false));
        assert_eq!((&*asked.authority, &*asked.target), (&b"shop.example.org"[..], &b"/x"[..]));
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

        /// A path that was rewritten is one.
        #[test]
        fn a_rewritten_path_begins_with_a_slash(
            target in "/[/a-z.?]{0,12}",
            new in "(/?[a-z]{0,2}){0,2}/?",
        ) {
            let path = replace_prefix(target.as_bytes(), "/a", &new);
            assert_eq!(path.first(), Some(&b'/'), "{target} {new}");
        }
    }
}
