//! A client's exchanges go to one sidecar, by a cookie that names it.
//!
//! The name is a hash of the sidecar instance's random id and the tunnel's name. It says nothing to whoever
//! reads it and is the same at every relay, and after every reconnect of the same process, without a secret
//! that relays would have to share. One that is made up finds nobody, and chooses nobody that its client
//! could not have been given anyhow.

use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::header::{COOKIE, HeaderMap, HeaderValue, SET_COOKIE};
use sha2::{Digest as _, Sha256};

use crate::config::policy::Affinity;

/// Keeps the hash apart from whatever else is made of an instance's id.
const DOMAIN: &[u8] = b"sidelane affinity 1\0";

/// Returns what cookies call a sidecar instance on a tunnel.
pub(super) fn tag(instance: &[u8], tunnel: &str) -> u128 {
    let hash = Sha256::new().chain_update(DOMAIN).chain_update(instance).chain_update(tunnel);
    let hash: [u8; 32] = hash.finalize().into();
    hash[..16].iter().fold(0, |tag, byte| tag << 8 | u128::from(*byte))
}

fn text(tag: u128) -> String {
    URL_SAFE_NO_PAD.encode(tag.to_be_bytes())
}

fn parse(text: &[u8]) -> Option<u128> {
    let bytes = URL_SAFE_NO_PAD.decode(text).ok()?;
    Some(u128::from_be_bytes(bytes.try_into().ok()?))
}

/// Which sidecar one exchange asks for, and which one it was given.
pub(super) struct Sticky {
    pub(super) asked: Option<u128>,
    given: Mutex<Option<u128>>,
}

impl Sticky {
    /// Takes the cookie out of a request, which the service is not to see.
    pub(super) fn take(affinity: &Affinity, headers: &mut HeaderMap) -> Arc<Self> {
        let asked = take_cookie(&affinity.cookie, headers);
        Arc::new(Self { asked, given: Mutex::default() })
    }

    /// The exchange goes to this one.
    pub(super) fn give(&self, tag: u128) {
        *self.given.lock().unwrap_or_else(PoisonError::into_inner) = Some(tag);
    }

    /// Tells the client of another sidecar than it asked for. `path`: what the route takes.
    pub(super) fn tell(
        &self,
        affinity: &Affinity,
        path: &str,
        is_https: bool,
        headers: &mut HeaderMap,
    ) {
        let given = *self.given.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(given) = given.filter(|given| Some(*given) != self.asked) else { return };
        // A prefix may hold what ends a cookie's attribute; the whole host has it then.
        let is_plain = |byte: u8| byte.is_ascii_graphic() && byte != b';' && byte != b',';
        let path = if !path.is_empty() && path.bytes().all(is_plain) { path } else { "/" };
        let mut cookie = format!("{}={}; Path={path}", affinity.cookie, text(given));
        if !affinity.max_age.is_zero() {
            cookie += &format!("; Max-Age={}", affinity.max_age.as_secs());
        }
        cookie += "; HttpOnly; SameSite=Lax";
        if is_https {
            cookie += "; Secure";
        }
        let Ok(value) = HeaderValue::try_from(cookie) else { return };
        // A head at its limit of fields goes without.
        let _ = headers.try_append(SET_COOKIE, value);
    }
}

/// Removes a cookie, and returns what it names, if anything. What is left stays as it was.
fn take_cookie(name: &str, headers: &mut HeaderMap) -> Option<u128> {
    let value_of = |pair: &'_ [u8]| {
        let pair = pair.trim_ascii();
        let value = pair.strip_prefix(name.as_bytes())?.strip_prefix(b"=")?;
        Some(value.to_vec())
    };
    let pairs = |value: &'_ HeaderValue| -> Vec<Vec<u8>> {
        value.as_bytes().split(|byte| *byte == b';').map(<[u8]>::to_vec).collect()
    };
    let is_there = |value: &HeaderValue| {
        value.as_bytes().split(|byte| *byte == b';').any(|pair| value_of(pair).is_some())
    };
    if !headers.get_all(COOKIE).iter().any(is_there) {
        return None;
    }
    let mut asked = None;
    let fields: Vec<HeaderValue> = headers.get_all(COOKIE).iter().cloned().collect();
    headers.remove(COOKIE);
    for field in fields {
        if !is_there(&field) {
            headers.append(COOKIE, field);
            continue;
        }
        let (ours, theirs): (Vec<_>, Vec<_>) =
            pairs(&field).into_iter().partition(|pair| value_of(pair).is_some());
        asked = asked.or_else(|| parse(&value_of(ours.first()?)?));
        let left = theirs.join(&b';');
        let left = left.trim_ascii();
        if let (false, Ok(left)) = (left.is_empty(), HeaderValue::from_bytes(left)) {
            headers.append(COOKIE, left);
        }
    }
    asked
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn affinity(max_age: u64) -> Affinity {
        Affinity { cookie: "stick".into(), max_age: Duration::from_secs(max_age) }
    }

    fn cookies(fields: &[&str]) -> HeaderMap {
        let field = |value: &&str| (COOKIE, HeaderValue::from_str(value).unwrap());
        fields.iter().map(field).collect()
    }

    #[test]
    fn the_cookie_is_taken_out_and_the_others_stay() {
        let tag = tag(&[7; 16], "web");
        let ours = format!("stick={}", text(tag));
        let table: &[(&[&str], Option<u128>, &[&str])] = &[
            (&[], None, &[]),
            (&["a=1; b=2"], None, &["a=1; b=2"]),
            (&[&ours], Some(tag), &[]),
            (&[&format!("a=1; {ours}; b=2")], Some(tag), &["a=1; b=2"]),
            (&["a=1", &ours, "b=2"], Some(tag), &["a=1", "b=2"]),
            (&[&format!("{ours}; stick=other")], Some(tag), &[]),
            (&["stick=made-up; a=1"], None, &["a=1"]),
            (&["stick=; stic=1; sticky=2; xstick=3"], None, &["stic=1; sticky=2; xstick=3"]),
        ];
        assert!(!table.is_empty());
        for (fields, asked, left) in table {
            let mut headers = cookies(fields);
            assert_eq!(Sticky::take(&affinity(0), &mut headers).asked, *asked, "{fields:?}");
            let found: Vec<_> =
                headers.get_all(COOKIE).iter().map(|value| value.to_str().unwrap()).collect();
            assert_eq!(found, *left, "{fields:?}");
        }
    }

    fn told(sticky: &Sticky, max_age: u64, path: &str, is_https: bool) -> Option<String> {
        let mut headers = HeaderMap::new();
        sticky.tell(&affinity(max_age), path, is_https, &mut headers);
        headers.get(SET_COOKIE).map(|value| value.to_str().unwrap().to_owned())
    }

    #[test]
    fn a_client_is_told_of_another_sidecar_than_it_asked_for() {
        let (one, other) = (tag(&[1; 16], "web"), tag(&[2; 16], "web"));
        let sticky = Sticky { asked: Some(one), given: Mutex::default() };
        assert_eq!(told(&sticky, 0, "", false), None, "nobody has it");
        sticky.give(one);
        assert_eq!(told(&sticky, 0, "", false), None);
        sticky.give(other);
        let value = text(other);
        let expected = format!("stick={value}; Path=/; HttpOnly; SameSite=Lax");
        assert_eq!(told(&sticky, 0, "", false), Some(expected));
        let expected =
            format!("stick={value}; Path=/api; Max-Age=60; HttpOnly; SameSite=Lax; Secure");
        assert_eq!(told(&sticky, 60, "/api", true), Some(expected));
        let expected = format!("stick={value}; Path=/; HttpOnly; SameSite=Lax");
        assert_eq!(told(&sticky, 0, "/a;Domain=x", false), Some(expected));
    }

    #[test]
    fn names_differ_by_instance_and_tunnel_and_by_nothing_else() {
        let names = [tag(&[1; 16], "a"), tag(&[2; 16], "a"), tag(&[1; 16], "b")];
        assert!(names[0] != names[1] && names[0] != names[2] && names[1] != names[2]);
        // Relays of other versions find the same.
        assert_eq!(text(names[0]), "OPhlAdgMD_xGKwRrJN3n6Q");
        assert_eq!(parse(text(names[0]).as_bytes()), Some(names[0]));
        for bad in ["", "AAAA", "x".repeat(1000).as_str()] {
            assert_eq!(parse(bad.as_bytes()), None);
        }
    }
}
