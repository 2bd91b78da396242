//! What a route changes in heads: fields, host and path.
//!
//! Pure. Knows no exchange.

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH, EXPECT, HOST};
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::config::policy::{HeaderChanges, Rewrite};
use crate::plugin::lend::RequestHead;
use crate::router::replace_prefix;

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

#[cfg(test)]
mod tests {
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
