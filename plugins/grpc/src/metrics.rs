//! What passes, by route, service and method. Counted at the relay's end, once for each RPC.
//!
//! A method has series of its own only once it has proved to be one, and while there is room; all
//! others share `other`. Looking them up allocates nothing, and nothing is registered per message.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use sidelane_plugin::{Counter, Gauge, Histogram, Host, Instant};

use crate::status;

/// Longest name of a service or method that is a label.
const NAME_BYTES_MAX: usize = 100;

/// What is counted as no method of its own.
const OTHER: &str = "other";

/// The route of an RPC for which there is none.
const NO_ROUTE: &str = "";

/// Values of `grpc_status`: 0 to 16, any other number, and none.
const STATUSES: usize = 19;
const STATUS_OTHER: usize = 17;
const STATUS_NONE: usize = 18;

/// A direction of an RPC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Request,
    Response,
}

/// Messages and bytes of one direction, prefixes included.
#[derive(Clone, Copy, Debug, Default)]
struct Passed {
    messages: u64,
    bytes: u64,
}

#[derive(Debug)]
struct DirectionSeries {
    messages: Counter,
    bytes: Counter,
}

impl DirectionSeries {
    fn new(host: &Host, labels: [(&str, &str); 3], direction: &str) -> Self {
        let [route, service, method] = labels;
        let labels = [route, service, method, ("direction", direction)];
        Self {
            messages: host.counter_with("grpc_messages_total", "Messages", &labels),
            bytes: host.counter_with(
                "grpc_bytes_total",
                "Bytes of messages, as sent, with their prefixes",
                &labels,
            ),
        }
    }

    fn add(&self, passed: Passed) {
        if passed.messages > 0 {
            self.messages.add(passed.messages);
        }
        if passed.bytes > 0 {
            self.bytes.add(passed.bytes);
        }
    }
}

/// The series of one method at one route.
#[derive(Debug)]
struct Series {
    host: Host,
    route: Box<str>,
    service: Box<str>,
    method: Box<str>,
    request: DirectionSeries,
    response: DirectionSeries,
    duration: Histogram,
    in_flight: Gauge,
    /// Registered as each status comes up.
    rpcs: [OnceLock<Counter>; STATUSES],
}

impl Series {
    fn new(host: Host, route: &str, service: &str, method: &str) -> Arc<Self> {
        let labels = [("route", route), ("service", service), ("method", method)];
        let help = "From an RPC's head to its end";
        Arc::new(Self {
            request: DirectionSeries::new(&host, labels, "request"),
            response: DirectionSeries::new(&host, labels, "response"),
            duration: host.histogram_with("grpc_duration_seconds", help, &labels),
            in_flight: host.gauge_with("grpc_in_flight", "RPCs that run", &labels),
            rpcs: [const { OnceLock::new() }; STATUSES],
            route: route.into(),
            service: service.into(),
            method: method.into(),
            host,
        })
    }

    fn direction(&self, direction: Direction) -> &DirectionSeries {
        match direction {
            Direction::Request => &self.request,
            Direction::Response => &self.response,
        }
    }

    fn rpcs(&self, index: usize) -> Counter {
        *self.rpcs[index].get_or_init(|| {
            let text = match index {
                STATUS_OTHER => OTHER.to_owned(),
                STATUS_NONE => "none".to_owned(),
                status => status.to_string(),
            };
            let labels = [
                ("route", &*self.route),
                ("service", &*self.service),
                ("method", &*self.method),
                ("grpc_status", &*text),
            ];
            self.host.counter_with("grpc_rpcs_total", "RPCs that ended", &labels)
        })
    }
}

#[derive(Debug, Default)]
struct Table {
    /// By route, then by service and method as the path has them.
    routes: HashMap<Box<str>, HashMap<Box<str>, Arc<Series>>>,
    /// Methods in it.
    methods: usize,
    /// By route: what has no series of its own.
    others: HashMap<Box<str>, Arc<Series>>,
}

/// The series of one plugin instance.
#[derive(Debug)]
pub(crate) struct Metrics {
    host: Host,
    methods_max: usize,
    table: RwLock<Table>,
}

impl Metrics {
    pub(crate) fn new(host: &Host, methods_max: usize) -> Self {
        Self { host: *host, methods_max, table: RwLock::default() }
    }

    /// Begins to count an RPC to `path`, `/<service>/<method>`.
    pub(crate) fn begin<'a>(&'a self, route: &'a str, path: &'a str, start: Instant) -> Rpc<'a> {
        let route = if route.is_empty() { NO_ROUTE } else { route };
        let known = self.find(route, path);
        let own = known.is_some();
        let series = known.unwrap_or_else(|| self.other(route));
        series.in_flight.add(1);
        Rpc {
            metrics: self,
            route,
            path,
            series,
            settled: own,
            held: [Passed::default(); 2],
            start,
            status: STATUS_NONE,
        }
    }

    fn find(&self, route: &str, path: &str) -> Option<Arc<Series>> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table.routes.get(route)?.get(path).cloned()
    }

    fn other(&self, route: &str) -> Arc<Series> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(series) = table.others.get(route) {
            return Arc::clone(series);
        }
        drop(table);
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let make = || Series::new(self.host, route, OTHER, OTHER);
        Arc::clone(table.others.entry(route.into()).or_insert_with(make))
    }

    /// Gives the method series of its own, if there is room.
    fn admit(&self, route: &str, path: &str) -> Option<Arc<Series>> {
        let (service, method) = names(path)?;
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let known = table.routes.get(route).and_then(|methods| methods.get(path));
        if let Some(series) = known {
            return Some(Arc::clone(series));
        }
        if table.methods >= self.methods_max {
            return None;
        }
        table.methods += 1;
        let series = Series::new(self.host, route, service, method);
        let methods = table.routes.entry(route.into()).or_default();
        methods.insert(path.into(), Arc::clone(&series));
        Some(series)
    }
}

/// Returns the service and the method that a path names, where they can be labels.
fn names(path: &str) -> Option<(&str, &str)> {
    let (service, method) = path.strip_prefix('/')?.rsplit_once('/')?;
    let fits = |name: &str| {
        (1..=NAME_BYTES_MAX).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'?')
    };
    (fits(service) && fits(method)).then_some((service, method))
}

/// Counts one RPC, to its end whatever that is.
#[derive(Debug)]
pub(crate) struct Rpc<'a> {
    metrics: &'a Metrics,
    route: &'a str,
    path: &'a str,
    series: Arc<Series>,
    /// `series` is final. Until then what passes is held back.
    settled: bool,
    held: [Passed; 2],
    start: Instant,
    status: usize,
}

impl Rpc<'_> {
    /// Counts what passed.
    pub(crate) fn passed(&mut self, direction: Direction, messages: u32, bytes: usize) {
        let passed = Passed { messages: u64::from(messages), bytes: bytes as u64 };
        if self.settled {
            self.series.direction(direction).add(passed);
            return;
        }
        let held = &mut self.held[direction as usize];
        held.messages += passed.messages;
        held.bytes += passed.bytes;
        if direction == Direction::Response && messages > 0 {
            // Whoever answers with a message has the method.
            self.settle(true);
        }
    }

    /// The service ended the RPC with `status`; `None`: without one.
    pub(crate) fn answered(&mut self, status: Option<u32>) {
        self.told(status);
        // What a caller may not see, or what is not there, says nothing of the method's existence:
        // anyone can ask for any name.
        let proved = status.is_some_and(|status| {
            let refusals =
                [status::UNIMPLEMENTED, status::UNAUTHENTICATED, status::PERMISSION_DENIED];
            !refusals.iter().any(|refusal| u32::from(*refusal) == status)
        });
        self.settle(proved);
    }

    /// The client was told `status`.
    pub(crate) fn told(&mut self, status: Option<u32>) {
        self.status = match status {
            None => STATUS_NONE,
            Some(status) => usize::try_from(status).map_or(STATUS_OTHER, |s| s.min(STATUS_OTHER)),
        };
    }

    /// Decides whose series count, and counts what was held back.
    fn settle(&mut self, proved: bool) {
        if self.settled {
            return;
        }
        self.settled = true;
        if proved && let Some(series) = self.metrics.admit(self.route, self.path) {
            self.series.in_flight.add(-1);
            series.in_flight.add(1);
            self.series = series;
        }
        for direction in [Direction::Request, Direction::Response] {
            self.series.direction(direction).add(self.held[direction as usize]);
        }
    }
}

impl Drop for Rpc<'_> {
    fn drop(&mut self) {
        self.settle(false);
        let taken = self.metrics.host.now() - self.start;
        self.series.duration.observe(taken.as_secs_f64());
        self.series.in_flight.add(-1);
        self.series.rpcs(self.status).add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_bounded() {
        let long = format!("/{}/m", "s".repeat(101));
        for (path, expected) in [
            ("/a.b.C/M", Some(("a.b.C", "M"))),
            ("/x/a.b.C/M", Some(("x/a.b.C", "M"))),
            ("/C/", None),
            ("//M", None),
            ("/M", None),
            ("C/M", None),
            ("/C/M?x", None),
            ("/C/é", None),
            (&long, None),
        ] {
            assert_eq!(names(path), expected, "{path}");
        }
    }
}
