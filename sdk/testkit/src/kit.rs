//! The test's handle: a fake host with one instance of a plugin.

use std::future::{Future, poll_fn};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use sidelane_plugin::ffi::{abi, plugin::vtable};
use sidelane_plugin::{ConfigError, Protocol, failure};

use crate::host::exchange::{Opens, Peer};
use crate::host::future::PluginFuture;
use crate::host::http::{BodySender, Response, owned};
use crate::host::io::{self, TestStream};
use crate::host::plugin::Instance;
use crate::host::service::TestService;
use crate::host::world::{Metric, World};

/// A fake host with one instance of a plugin. Dropping it destroys the instance and panics where the
/// plugin broke a rule of the ABI, leaked what it was lent, or dropped it twice.
pub struct Kit {
    /// `None` while it is being dropped.
    instance: Option<Instance>,
    world: Arc<World>,
    opens: Opens,
}

/// How a handler ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// With one of [`failure`]; [`failure::NONE`]: well.
    Ended(u32),
    /// It panicked.
    Panicked,
}

/// A line of the host's log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLine {
    /// One of `sidelane_abi::level`.
    pub level: u32,
    /// What it is about.
    pub target: String,
    /// The line.
    pub text: String,
}

/// What the host says of an exchange.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "the fields of `sidelane_plugin::Meta`")]
pub struct TestMeta {
    pub deadline_ns: u64,
    pub request_id: String,
    pub protocol_type: String,
    pub route: String,
    pub tunnel: String,
    pub client_address: String,
    pub listener: String,
    pub scheme: String,
    pub tls_sni: String,
    pub tls_alpn: String,
    pub tls_client: String,
    pub trace_parent: String,
    pub options: String,
    pub peer_address: String,
    /// 0: none.
    pub response_head_timeout_ns: u64,
    pub trusted_proxy: bool,
}

impl Default for TestMeta {
    fn default() -> Self {
        Self {
            deadline_ns: 0,
            request_id: "r1".to_owned(),
            protocol_type: String::new(),
            route: "test".to_owned(),
            tunnel: "test".to_owned(),
            client_address: "192.0.2.1:4711".to_owned(),
            listener: "public".to_owned(),
            scheme: String::new(),
            tls_sni: String::new(),
            tls_alpn: String::new(),
            tls_client: String::new(),
            trace_parent: String::new(),
            options: String::new(),
            peer_address: String::new(),
            response_head_timeout_ns: 0,
            trusted_proxy: false,
        }
    }
}

impl TestMeta {
    pub(crate) fn before_open(&self) -> Self {
        let (request_id, route, tunnel) = (String::new(), String::new(), String::new());
        Self { request_id, route, tunnel, ..self.clone() }
    }
}

/// A failure that the host hands to a plugin.
#[derive(Clone, Debug)]
pub struct TestFailure {
    /// One of [`failure`].
    pub code: u32,
    /// 0: none.
    pub retry_after_s: u32,
    /// One line for people.
    pub detail: String,
}

impl TestFailure {
    /// Returns a failure with a line of text.
    #[must_use]
    pub fn new(code: u32) -> Self {
        Self { code, retry_after_s: 0, detail: format!("test: {}", failure::name(code)) }
    }
}

/// A request that the host hands to a plugin.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "the fields of `sidelane_plugin::RequestHead`")]
pub struct TestRequest {
    pub method: String,
    pub scheme: String,
    pub authority: String,
    pub target: String,
    /// `:protocol` of an extended CONNECT, or empty.
    pub protocol: String,
    /// 10, 11 or 20.
    pub version: u32,
    pub headers: Vec<(Bytes, Bytes)>,
    /// `Some(0)`: the request has no body.
    pub body_length: Option<u64>,
    pub expect_continue: bool,
    pub can_upgrade: bool,
    pub meta: TestMeta,
}

impl TestRequest {
    /// Returns an HTTP/1.1 request without a body.
    #[must_use]
    pub fn new(method: &str, target: &str) -> Self {
        Self {
            method: method.to_owned(),
            scheme: "http".to_owned(),
            authority: "test.localhost:9080".to_owned(),
            target: target.to_owned(),
            protocol: String::new(),
            version: 11,
            headers: owned(&[("host", "test.localhost:9080")]),
            body_length: Some(0),
            expect_continue: false,
            can_upgrade: false,
            meta: TestMeta { scheme: "http".to_owned(), ..TestMeta::default() },
        }
    }

    /// Adds a field.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.extend(owned(&[(name, value)]));
        self
    }

    /// Gives it a body; `None`: of unknown length.
    #[must_use]
    pub const fn with_body(mut self, length: Option<u64>) -> Self {
        self.body_length = length;
        self
    }

    /// Sets the version: 10, 11 or 20.
    #[must_use]
    pub const fn version(mut self, version: u32) -> Self {
        self.version = version;
        self
    }

    /// The client waits for `100 Continue`.
    #[must_use]
    pub fn expecting_continue(mut self) -> Self {
        self.expect_continue = true;
        self.header("expect", "100-continue")
    }
}

#[derive(Default)]
struct End {
    outcome: Option<Outcome>,
    waiter: Option<Waker>,
}

/// A handler that runs. Dropping this lets it run on.
pub struct Running {
    world: Arc<World>,
    task: usize,
    end: Arc<Mutex<End>>,
}

impl Running {
    fn new(world: &Arc<World>, future: PluginFuture) -> Self {
        let end = Arc::new(Mutex::new(End::default()));
        let own = end.clone();
        let task = world.spawn(Box::pin(async move {
            let outcome = future.await;
            let mut end = own.lock().unwrap_or_else(PoisonError::into_inner);
            end.outcome = Some(outcome);
            if let Some(waiter) = end.waiter.take() {
                waiter.wake();
            }
        }));
        Self { world: world.clone(), task, end }
    }

    /// Waits until the handler ends.
    pub async fn outcome(&self) -> Outcome {
        poll_fn(|cx| {
            let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(outcome) = end.outcome {
                return Poll::Ready(outcome);
            }
            end.waiter = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// How the handler ended, if it has.
    #[must_use]
    pub fn ended(&self) -> Option<Outcome> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).outcome
    }

    /// Drops the handler's future where it stands.
    pub fn cancel(&self) {
        self.world.cancel(self.task);
    }
}

/// An `accept_http` that runs.
pub struct AcceptHttp {
    /// The handler.
    pub running: Running,
    /// The client's end of the request's body.
    pub body: BodySender,
    /// The client's end of the response.
    pub response: Response,
    /// The other end of the exchange, once it is opened.
    pub peer: Peer,
}

/// An `accept` that runs.
pub struct Accept {
    /// The handler.
    pub running: Running,
    /// The client's end of the connection.
    pub client: TestStream,
    /// The other end of the exchange, once it is opened.
    pub peer: Peer,
}

/// A `deliver` that runs.
pub struct Deliver {
    /// The handler.
    pub running: Running,
    /// The other end of the exchange.
    pub peer: Peer,
}

/// A `refuse_http` that runs.
pub struct RefuseHttp {
    /// The handler.
    pub running: Running,
    /// The client's end of the response.
    pub response: Response,
}

/// A `refuse` that runs.
pub struct Refuse {
    /// The handler.
    pub running: Running,
    /// The client's end of the connection.
    pub client: TestStream,
}

impl Kit {
    /// Makes an instance of `P` on a fresh host. `config` is the plugin's block; `Null`: it is absent.
    ///
    /// # Errors
    /// The plugin refuses its configuration.
    pub fn new<P: Protocol>(config: &serde_json::Value) -> Result<Self, ConfigError> {
        Self::with_vtable(vtable::<P>(), &config.to_string())
    }

    /// As [`Self::new`], of the plugin library at `path`, mapped for good.
    ///
    /// # Errors
    /// The file is no plugin of this ABI, or the plugin refuses its configuration.
    pub fn load(path: &std::path::Path, config: &serde_json::Value) -> Result<Self, ConfigError> {
        let vt = crate::contract::functions(path).map_err(ConfigError::new)?;
        Self::with_vtable(vt, &config.to_string())
    }

    pub(crate) fn with_vtable(
        vt: &'static abi::PluginVt,
        config: &str,
    ) -> Result<Self, ConfigError> {
        let world = World::new();
        let instance = create(vt, world.clone(), config)?;
        Ok(Self { instance: Some(instance), world, opens: Opens::Exchange })
    }

    pub(crate) fn instance(&self) -> &Instance {
        self.instance.as_ref().expect("present until the kit is dropped")
    }

    /// Runs `test` beside the plugin to its end. Where nothing can happen the clock jumps to the next
    /// timer.
    ///
    /// # Panics
    /// Where there is none either: the test waits for what cannot happen.
    pub fn block_on<F: Future>(&self, test: F) -> F::Output {
        self.world.block_on(test)
    }

    /// Runs the plugin until it waits for the test or the clock.
    pub fn run_until_idle(&self) {
        self.world.run_until_idle();
    }

    /// Moves the clock.
    pub fn advance(&self, duration: Duration) {
        self.world.advance(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX / 2));
    }

    /// Has later opens fail with `failure`.
    pub fn refuse_opens(&mut self, failure: TestFailure) {
        self.opens = Opens::Failure(failure);
    }

    /// Has later opens wait without end.
    pub fn hold_opens(&mut self) {
        self.opens = Opens::Never;
    }

    /// Puts a service at its address, for a plugin that dials by itself.
    pub fn listen(&self, service: &TestService) {
        self.world.state().services.insert(service.address.to_owned(), service.clone());
    }

    /// Checks a route's options, given as JSON, for the plugin's first type.
    ///
    /// # Errors
    /// The plugin refuses them.
    pub fn validate_route(&self, options: &serde_json::Value) -> Result<(), ConfigError> {
        self.instance().validate_route(0, &options.to_string())
    }

    /// One of `sidelane_abi::claim`, for the plugin's first type.
    #[must_use]
    pub fn claims(&self, request: &TestRequest) -> u32 {
        self.instance().claims(0, request)
    }

    /// One of `sidelane_abi::sniff` and the host named, for the plugin's first type.
    ///
    /// # Panics
    /// Where the host is not a part of `bytes`.
    #[must_use]
    pub fn sniff(&self, bytes: &[u8]) -> (u32, Option<Vec<u8>>) {
        self.instance().sniff(0, bytes).expect("a part of the bytes")
    }

    /// A client's request arrives at the relay.
    #[must_use]
    pub fn accept_http(&self, request: &TestRequest) -> AcceptHttp {
        self.accept_http_as(0, request)
    }

    pub(crate) fn accept_http_as(&self, protocol: u32, request: &TestRequest) -> AcceptHttp {
        let (body, response) = (BodySender::default(), Response::new(request.version == 10));
        if request.body_length == Some(0) {
            body.end();
        }
        let peer = Peer::new();
        let opens = self.opens.clone();
        let future = self.instance().accept_http(protocol, request, opens, &body, &response, &peer);
        AcceptHttp { running: Running::new(&self.world, future), body, response, peer }
    }

    /// A client's connection arrives at the relay.
    #[must_use]
    pub fn accept(&self) -> Accept {
        self.accept_as(0)
    }

    pub(crate) fn accept_as(&self, protocol: u32) -> Accept {
        let ((client, theirs), peer) = (io::pair(), Peer::new());
        let opens = self.opens.clone();
        let meta = TestMeta::default();
        let future = self.instance().accept_stream(protocol, &meta, opens, theirs, &peer);
        Accept { running: Running::new(&self.world, future), client, peer }
    }

    /// An exchange arrives at the sidecar.
    #[must_use]
    pub fn deliver(&self, meta: &TestMeta, service: &TestService) -> Deliver {
        self.deliver_as(0, meta, service)
    }

    pub(crate) fn deliver_as(
        &self,
        protocol: u32,
        meta: &TestMeta,
        service: &TestService,
    ) -> Deliver {
        let peer = Peer::new();
        let future = self.instance().deliver(protocol, meta, &peer, service);
        Deliver { running: Running::new(&self.world, future), peer }
    }

    /// A request cannot be served, and the plugin is to say so.
    #[must_use]
    pub fn refuse_http(&self, request: &TestRequest, failure: &TestFailure) -> RefuseHttp {
        self.refuse_http_as(0, request, failure)
    }

    pub(crate) fn refuse_http_as(
        &self,
        protocol: u32,
        request: &TestRequest,
        failure: &TestFailure,
    ) -> RefuseHttp {
        let response = Response::new(request.version == 10);
        let future = self.instance().refuse_http(protocol, request, &response, failure);
        RefuseHttp { running: Running::new(&self.world, future), response }
    }

    /// A connection cannot be served, and the plugin is to say so.
    #[must_use]
    pub fn refuse(&self, failure: &TestFailure) -> Refuse {
        self.refuse_as(0, failure)
    }

    pub(crate) fn refuse_as(&self, protocol: u32, failure: &TestFailure) -> Refuse {
        let (client, theirs) = io::pair();
        let future = self.instance().refuse_stream(protocol, theirs, failure);
        Refuse { running: Running::new(&self.world, future), client }
    }

    /// Tells the plugin that what still runs after `within` is cut, and polls what runs once.
    pub fn drain(&self, within: Duration) {
        let within = u64::try_from(within.as_nanos()).unwrap_or(u64::MAX);
        let deadline_ns = self.world.state().now.saturating_add(within);
        self.instance().drain(deadline_ns);
        self.world.wake_all();
    }

    /// The host's log so far.
    #[must_use]
    pub fn logs(&self) -> Vec<LogLine> {
        self.world.state().logs.clone()
    }

    /// The sum of a metric's series; `None`: the plugin has not registered it. Of a histogram, the sum
    /// of what was observed.
    #[must_use]
    pub fn metric(&self, name: &str) -> Option<f64> {
        self.metric_with(name, &[])
    }

    /// The sum of those of a metric's series that have all of `labels`.
    #[must_use]
    pub fn metric_with(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let state = self.world.state();
        let fits = |metric: &&Metric| {
            let has = |(name, value): &(&str, &str)| {
                metric.labels.iter().any(|label| label.0 == *name && label.1 == *value)
            };
            metric.name == name && labels.iter().all(has)
        };
        let fitting: Vec<f64> =
            state.metrics.iter().filter(fits).map(|metric| metric.value).collect();
        (!fitting.is_empty()).then(|| fitting.iter().sum())
    }

    /// Destroys the instance and returns what the plugin did wrong, instead of panicking.
    #[must_use]
    pub fn finish(mut self) -> Vec<String> {
        drop(self.instance.take());
        self.world.ledger.violations(true)
    }
}

#[allow(unsafe_code, reason = "a vtable is taken at its word")]
fn create(
    vt: &'static abi::PluginVt,
    world: Arc<World>,
    config: &str,
) -> Result<Instance, ConfigError> {
    // SAFETY: the SDK's, or one that a test loads in order to try it.
    unsafe { Instance::create(vt, world, config) }
}

impl Drop for Kit {
    fn drop(&mut self) {
        if self.instance.take().is_none() || std::thread::panicking() {
            return;
        }
        let violations = self.world.ledger.violations(true);
        assert!(
            violations.is_empty(),
            "the plugin broke the ABI's rules:\n  {}",
            violations.join("\n  ")
        );
    }
}
