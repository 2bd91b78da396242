//! What is counted, per route, at the relay's end, where every connection passes once and both its
//! directions with it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use sidelane_plugin::{Counter, Gauge, Histogram, Host};

use crate::frame::opcode;
use crate::options::Options;

/// Routes with series of their own; what passes others counts as [`OTHER`]. With some 25 series each
/// they stay below the 8,192 that the host gives a plugin.
const ROUTES_MAX: usize = 256;

/// `route` beyond [`ROUTES_MAX`].
const OTHER: &str = "other";

/// Who ended a connection first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum By {
    Client,
    Service,
    /// A limit, a violation, a lost tunnel, a drain.
    Sidelane,
}

impl By {
    const fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Service => "service",
            Self::Sidelane => "sidelane",
        }
    }
}

/// A direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    ToService,
    ToClient,
}

/// Series of one direction of one route.
#[derive(Debug)]
struct Series {
    messages: [Counter; KINDS.len()],
    bytes: Counter,
    sizes: Histogram,
}

/// Values of `type`, in the order of [`kind`].
const KINDS: [&str; 5] = ["text", "binary", "close", "ping", "pong"];

const fn kind(code: u8) -> usize {
    match code {
        opcode::TEXT => 0,
        opcode::BINARY => 1,
        opcode::CLOSE => 2,
        opcode::PING => 3,
        _ => 4,
    }
}

/// What passed in one direction and is not yet added to the series.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    messages: [u32; KINDS.len()],
    bytes: u64,
}

impl Tally {
    pub(crate) fn message(&mut self, opcode: u8) {
        self.messages[kind(opcode)] += 1;
    }

    pub(crate) fn bytes(&mut self, bytes: u64) {
        self.bytes += bytes;
    }
}

/// Series of one route, made once and kept, and its options as they were last read.
#[derive(Debug)]
pub(crate) struct Route {
    host: Host,
    name: String,
    options: Mutex<(String, Options)>,
    connections: Gauge,
    opened: Counter,
    directions: [Series; 2],
    closes: Mutex<BTreeMap<(By, &'static str), Counter>>,
}

impl Route {
    fn new(host: Host, name: &str) -> Self {
        let route = ("route", name);
        let series = |direction: &'static str| {
            let labels = [route, ("direction", direction)];
            Series {
                messages: KINDS.map(|kind| {
                    host.counter_with(
                        "websocket_messages_total",
                        "Messages that passed, and control frames",
                        &[route, ("direction", direction), ("type", kind)],
                    )
                }),
                bytes: host.counter_with(
                    "websocket_bytes_total",
                    "Payload bytes that passed",
                    &labels,
                ),
                sizes: host.histogram_with(
                    "websocket_message_size_bytes",
                    "Sizes of whole messages, as sent",
                    &labels,
                ),
            }
        };
        Self {
            host,
            name: name.to_owned(),
            options: Mutex::default(),
            connections: host.gauge_with("websocket_connections", "Open connections", &[route]),
            opened: host.counter_with(
                "websocket_connections_opened_total",
                "Handshakes that the service accepted",
                &[route],
            ),
            directions: [series("client_to_service"), series("service_to_client")],
            closes: Mutex::default(),
        }
    }

    /// Reads the route's options, by comparison alone where they are those of last time.
    pub(crate) fn options(&self, text: &str) -> Options {
        if text.is_empty() {
            return Options::default();
        }
        let mut last = self.options.lock().unwrap_or_else(PoisonError::into_inner);
        if last.0 != text {
            *last = (text.to_owned(), Options::from_text(text));
        }
        last.1
    }

    pub(crate) fn opened(self: &Arc<Self>) -> Open {
        self.opened.add(1);
        self.connections.add(1);
        Open { route: Arc::clone(self) }
    }

    /// Adds what has passed.
    pub(crate) fn add(&self, direction: Direction, tally: &mut Tally) {
        let series = &self.directions[direction as usize];
        for (counter, count) in series.messages.iter().zip(tally.messages) {
            if count > 0 {
                counter.add(count.into());
            }
        }
        if tally.bytes > 0 {
            series.bytes.add(tally.bytes);
        }
        *tally = Tally::default();
    }

    /// Counts the size of a whole message.
    #[allow(clippy::cast_precision_loss, reason = "metrics are floating point")]
    pub(crate) fn size(&self, direction: Direction, bytes: u64) {
        self.directions[direction as usize].sizes.observe(bytes as f64);
    }

    fn closed(&self, by: By, code: &'static str) {
        let mut closes = self.closes.lock().unwrap_or_else(PoisonError::into_inner);
        let counter = closes.entry((by, code)).or_insert_with(|| {
            self.host.counter_with(
                "websocket_closes_total",
                "Connections ended, by who began and the close code",
                &[("route", &self.name), ("by", by.name()), ("code", code)],
            )
        });
        counter.add(1);
    }
}

/// An open connection. Dropping it counts its end.
#[derive(Debug)]
pub(crate) struct Open {
    route: Arc<Route>,
}

impl Open {
    pub(crate) fn route(&self) -> &Route {
        &self.route
    }

    /// Counts how the connection ends; `None`: without a close frame (1006).
    pub(crate) fn closed(&self, by: By, code: Option<u16>) {
        self.route.closed(by, code.map_or("1006", code_name));
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.route.connections.add(-1);
    }
}

/// Codes by name where RFC 6455 §7.4 and the registry have them, else by their range.
const fn code_name(code: u16) -> &'static str {
    match code {
        1000 => "1000",
        1001 => "1001",
        1002 => "1002",
        1003 => "1003",
        1005 => "1005",
        1007 => "1007",
        1008 => "1008",
        1009 => "1009",
        1010 => "1010",
        1011 => "1011",
        1012 => "1012",
        1013 => "1013",
        1014 => "1014",
        3000..=3999 => "3xxx",
        4000..=4999 => "4xxx",
        _ => "other",
    }
}

/// Statuses that refusals are counted by; others by their hundreds.
const fn status_name(status: u16) -> &'static str {
    match status {
        400 => "400",
        401 => "401",
        403 => "403",
        404 => "404",
        426 => "426",
        429 => "429",
        431 => "431",
        500 => "500",
        501 => "501",
        502 => "502",
        503 => "503",
        504 => "504",
        _ => match status / 100 {
            2 => "2xx",
            3 => "3xx",
            4 => "4xx",
            5 => "5xx",
            _ => "other",
        },
    }
}

/// The series of all routes.
#[derive(Debug)]
pub(crate) struct Metrics {
    host: Host,
    routes: Mutex<BTreeMap<String, Arc<Route>>>,
}

impl Metrics {
    pub(crate) fn new(host: &Host) -> Self {
        Self { host: *host, routes: Mutex::default() }
    }

    pub(crate) fn route(&self, name: &str) -> Arc<Route> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(route) = routes.get(name) {
            return Arc::clone(route);
        }
        let name = if routes.len() < ROUTES_MAX { name } else { OTHER };
        let new = || Arc::new(Route::new(self.host, name));
        Arc::clone(routes.entry(name.to_owned()).or_insert_with(new))
    }

    /// Counts a handshake that was answered by anything but a WebSocket. `route` is empty where none
    /// was found.
    pub(crate) fn refused(&self, route: &str, status: u16) {
        let known = (!route.is_empty()).then(|| self.route(route));
        let route = known.as_ref().map_or("", |route| &route.name);
        self.host
            .counter_with(
                "websocket_handshakes_refused_total",
                "Handshakes answered by a status that refuses",
                &[("route", route), ("code", status_name(status))],
            )
            .add(1);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn codes_are_a_bounded_set() {
        let closes: BTreeSet<_> = (0..=u16::MAX).map(code_name).collect();
        assert_eq!(closes.len(), 16);
        let statuses: BTreeSet<_> = (0..=u16::MAX).map(status_name).collect();
        assert_eq!(statuses.len(), 17);
    }

    #[test]
    fn the_readme_and_the_operators_guide_name_every_metric() {
        let source = include_str!("metrics.rs");
        let names: Vec<&str> = source
            .split('"')
            .filter(|text| text.starts_with("websocket_") && !text.contains(' '))
            .collect();
        assert!(names.len() >= 7, "no names found");
        for name in names.into_iter().filter(|name| *name != "websocket_") {
            let readme = include_str!("../README.md");
            assert!(readme.contains(&format!("`{name}`")), "README.md lacks {name}");
            let operations = include_str!("../../../docs/operations.md");
            assert!(operations.contains(name), "docs/operations.md lacks {name}");
        }
    }
}
