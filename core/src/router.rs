//! Which route takes an exchange: a pure function of a table.
//!
//! A route is a candidate if every part of its match fits. Of the candidates wins, in this order:
//! the more specific host (exact, subdomain, wildcard with the longest suffix, any), the longer
//! path prefix, the one that names the protocol type, the one that names the listener. A table in
//! which two routes could be equal is not built. Knows no configuration files and does no I/O.

use std::collections::HashMap;
use std::fmt::{self, Write as _};
use std::net::Ipv6Addr;
use std::sync::Arc;

use crate::config::{HostMatch, Route};

mod explain;
mod path;
mod target;

pub use explain::{Explanation, Other, explain};
pub(crate) use target::{https_location, location, replace_prefix};

/// Longest host name looked up (RFC 1035 §2.3.4); longer ones fit no route.
const HOST_BYTES_MAX: usize = 253;

/// What an exchange asks for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Query<'a> {
    /// As the client sent it: a port, a final dot and upper case are ignored. `None`: byte-born.
    pub host: Option<&'a str>,
    /// Path; what follows a `?` is ignored. Matched as sent, without resolving escapes or dots; where
    /// that matters, [`is_clear`] says so.
    pub path: &'a str,
    /// Name of the listener it came in by.
    pub listener: &'a str,
    /// Its protocol type.
    pub protocol_type: &'a str,
}

/// Routes in the shape of a look-up: hash tables by host, then by path prefix.
#[derive(Clone, Debug, Default)]
pub struct RouteTable {
    exact: HashMap<Box<str>, Paths>,
    subdomains: HashMap<Box<str>, Paths>,
    /// By what follows the star and its dot.
    wildcards: HashMap<Box<str>, Paths>,
    /// Length of the longest key of `wildcards`: longer suffixes of a host need no look-up.
    longest_wildcard: usize,
    any: Paths,
    /// Some route has a path prefix.
    has_prefixes: bool,
    /// All of them, as they were given.
    routes: Vec<Arc<Route>>,
}

/// Routes of one host.
#[derive(Clone, Debug, Default)]
struct Paths {
    /// Those without a prefix, the most specific first: what most hosts have alone, without a look-up.
    every: Vec<Arc<Route>>,
    /// The most specific candidate first.
    by_prefix: HashMap<Box<str>, Vec<Arc<Route>>>,
    /// Length of the longest prefix: what follows in a path needs no look-up.
    longest: usize,
}

/// Pairs of routes that take the same exchanges, each in the order of the routes given.
#[derive(Clone, Debug)]
pub struct Ambiguity {
    /// Never empty.
    pub pairs: Vec<(Arc<Route>, Arc<Route>)>,
}

impl fmt::Display for Ambiguity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (first, second)) in self.pairs.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(
                f,
                "{separator}routes \"{}\" and \"{}\" take the same exchanges",
                first.name, second.name
            )?;
        }
        Ok(())
    }
}

impl std::error::Error for Ambiguity {}

impl RouteTable {
    /// Builds the table; `base_domains` are lower case.
    pub fn build(routes: &[Arc<Route>], base_domains: &[Arc<str>]) -> Result<Self, Ambiguity> {
        match Self::build_in_order(routes, base_domains) {
            (table, None) => Ok(table),
            (_, Some(ambiguity)) => Err(ambiguity),
        }
    }

    /// Builds the table. Where routes take the same exchanges the first has them, and the ambiguity says
    /// which those are.
    #[must_use]
    pub fn build_in_order(
        routes: &[Arc<Route>],
        base_domains: &[Arc<str>],
    ) -> (Self, Option<Ambiguity>) {
        let mut table = Self::default();
        let mut pairs: Vec<(Arc<Route>, Arc<Route>)> = Vec::new();
        let mut insert = |paths: &mut Paths, route: &Arc<Route>| {
            if let Err(first) = paths.insert(route)
                // Two base domains would tell the same pair twice.
                && !pairs.last().is_some_and(|(_, second)| Arc::ptr_eq(second, route))
            {
                pairs.push((first, route.clone()));
            }
        };
        for route in routes {
            match &route.matches.host {
                HostMatch::Any => insert(&mut table.any, route),
                HostMatch::Exact(host) => {
                    insert(table.exact.entry((**host).into()).or_default(), route);
                }
                HostMatch::HostWildcard(suffix) => {
                    insert(table.wildcards.entry((**suffix).into()).or_default(), route);
                }
                HostMatch::Subdomain(subdomain) => {
                    for base in base_domains {
                        let host = format!("{subdomain}.{base}").into_boxed_str();
                        insert(table.subdomains.entry(host).or_default(), route);
                    }
                }
                HostMatch::Wildcard(suffix) => {
                    for base in base_domains {
                        let suffix = if suffix.is_empty() {
                            base.as_ref().into()
                        } else {
                            format!("{suffix}.{base}").into_boxed_str()
                        };
                        insert(table.wildcards.entry(suffix).or_default(), route);
                    }
                }
            }
        }
        table.routes = routes.to_vec();
        table.has_prefixes = routes.iter().any(|route| !route.matches.path_prefix.is_empty());
        table.longest_wildcard = table.wildcards.keys().map(|key| key.len()).max().unwrap_or(0);
        let ambiguity = (!pairs.is_empty()).then_some(Ambiguity { pairs });
        (table, ambiguity)
    }
}

impl RouteTable {
    /// Returns the routes, in the order in which they were given.
    #[must_use]
    pub fn routes(&self) -> &[Arc<Route>] {
        &self.routes
    }
}

impl Paths {
    /// Adds the route; the error is the route that takes the same already.
    fn insert(&mut self, route: &Arc<Route>) -> Result<(), Arc<Route>> {
        let matches = &route.matches;
        self.longest = self.longest.max(matches.path_prefix.len());
        let routes = if matches.path_prefix.is_empty() {
            &mut self.every
        } else {
            self.by_prefix.entry((*matches.path_prefix).into()).or_default()
        };
        let same = routes.iter().find(|other| {
            other.matches.listener == matches.listener
                && other.matches.protocol_type == matches.protocol_type
        });
        if let Some(same) = same {
            return Err(same.clone());
        }
        routes.push(route.clone());
        routes.sort_by_key(|route| {
            let matches = &route.matches;
            (matches.protocol_type.is_none(), matches.listener.is_none())
        });
        Ok(())
    }

    fn find(&self, query: &Query<'_>, path: &str) -> Option<&Arc<Route>> {
        let fits = |route: &&Arc<Route>| {
            let fits = |wanted: &Option<Arc<str>>, given: &str| {
                wanted.as_ref().is_none_or(|wanted| **wanted == *given)
            };
            fits(&route.matches.protocol_type, query.protocol_type)
                && fits(&route.matches.listener, query.listener)
        };
        // Prefixes end before a '/' or with the path.
        let mut end = if path.len() <= self.longest {
            path.len()
        } else {
            segment_end(&path.as_bytes()[..=self.longest])
        };
        while end > 0 {
            let found = self.by_prefix.get(&path[..end]);
            if let Some(route) = found.and_then(|routes| routes.iter().find(fits)) {
                return Some(route);
            }
            end = segment_end(&path.as_bytes()[..end]);
        }
        self.every.iter().find(fits)
    }
}

/// Returns where the segments before the last one end.
fn segment_end(path: &[u8]) -> usize {
    memchr::memrchr(b'/', path).unwrap_or(0)
}

/// Returns the route that takes the exchange.
#[must_use]
pub fn find<'t>(table: &'t RouteTable, query: &Query<'_>) -> Option<&'t Arc<Route>> {
    let path = query.path.split(['?', '#']).next().unwrap_or_default();
    let mut buffer = HostBuffer::default();
    if let Some(host) = query.host.and_then(|host| normalize(host, &mut buffer)) {
        let named = [&table.exact, &table.subdomains].into_iter().filter_map(|map| map.get(host));
        let wild =
            suffixes(host, table.longest_wildcard).filter_map(|suffix| table.wildcards.get(suffix));
        if let Some(route) = named.chain(wild).find_map(|paths| paths.find(query, path)) {
            return Some(route);
        }
    }
    table.any.find(query, path)
}

/// Returns whether the exchange goes to the same route however a service reads its path: with dots
/// resolved, escapes undone, slashes joined, parameters dropped. `found` is the route that takes it.
/// One that does not has no route: its client would choose whose policies it meets.
#[must_use]
pub fn is_clear(table: &RouteTable, query: &Query<'_>, found: &Arc<Route>) -> bool {
    if !table.has_prefixes {
        return true;
    }
    let path = query.path.split(['?', '#']).next().unwrap_or_default();
    path::is_read_alike(path, |path| {
        find(table, &Query { path, ..*query }).is_some_and(|route| Arc::ptr_eq(route, found))
    })
}

/// Returns whether a path can be read in one way only, and so be a route's prefix.
#[must_use]
pub fn is_plain(path: &str) -> bool {
    path::is_read_alike(path, |_| false)
}

/// Returns what follows each dot, the longest first, as far as it is at most `longest` long.
fn suffixes(host: &str, longest: usize) -> impl Iterator<Item = &str> {
    // The star takes one label at least, and a label has one character at least.
    let start = host.len().saturating_sub(longest + 1).max(1);
    let tail = host.get(start.min(host.len())..).unwrap_or_default();
    memchr::memchr_iter(b'.', tail.as_bytes()).map(move |dot| &tail[dot + 1..])
}

/// Room for a host name that is not as the tables have it.
struct HostBuffer {
    bytes: [u8; HOST_BYTES_MAX],
    len: usize,
}

impl Default for HostBuffer {
    fn default() -> Self {
        Self { bytes: [0; HOST_BYTES_MAX], len: 0 }
    }
}

impl HostBuffer {
    fn as_str(&self) -> Option<&str> {
        std::str::from_utf8(&self.bytes[..self.len]).ok()
    }
}

impl fmt::Write for HostBuffer {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = self.len + text.len();
        self.bytes.get_mut(self.len..end).ok_or(fmt::Error)?.copy_from_slice(text.as_bytes());
        self.len = end;
        Ok(())
    }
}

/// Returns the host as the tables have it: without port, brackets and final dot, lower case, IPv6
/// in its shortest form.
fn normalize<'a>(host: &'a str, buffer: &'a mut HostBuffer) -> Option<&'a str> {
    if let Some(literal) = host.strip_prefix('[') {
        let (literal, _) = literal.split_once(']')?;
        let address: Ipv6Addr = literal.parse().ok()?;
        write!(buffer, "{address}").ok()?;
        return buffer.as_str();
    }
    let name = host.split_once(':').map_or(host, |(name, _)| name);
    let name = name.strip_suffix('.').unwrap_or(name);
    if name.len() > HOST_BYTES_MAX {
        return None;
    }
    if !name.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return Some(name);
    }
    buffer.write_str(name).ok()?;
    buffer.bytes[..name.len()].make_ascii_lowercase();
    buffer.as_str()
}

#[cfg(test)]
mod tests;
