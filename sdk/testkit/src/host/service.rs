//! A service behind the tunnel, played by the test.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use sidelane_abi as abi;
use sidelane_plugin::{HttpVersion, ServiceSettings, failure};

use super::buf::lend_text;
use super::future;
use super::io::{self, TestStream};
use super::lent::{drop_lent, lend, using};
use super::world::World;

/// What a service's alert during the handshake looks like here.
const ECONNRESET: i32 = 104;

/// What a connection attempt meets.
#[derive(Clone, Copy)]
enum Mode {
    Accepts,
    Refuses { code: u32, errno: i32 },
    Hangs,
}

struct Shared {
    mode: Mode,
    accepted: VecDeque<TestStream>,
    acceptor: Option<Waker>,
    connects: usize,
    /// Retries that the budget still has.
    budget: usize,
    /// How often the plugin asked for one.
    asked: usize,
    /// What the service agrees on, the best first; `None`: it knows nothing of ALPN.
    speaks: Option<&'static [&'static str]>,
    /// What was offered, by connection.
    offered: Vec<Vec<String>>,
}

/// A service that the plugin connects to. By default it accepts.
#[derive(Clone)]
pub struct TestService {
    shared: Arc<Mutex<Shared>>,
    /// Stable for a tunnel's name.
    pub id: u64,
    /// Changes with the tunnel's settings.
    pub version: u64,
    /// Where it is.
    pub address: &'static str,
    /// What the tunnel and the route ask for.
    pub settings: ServiceSettings,
}

impl Default for TestService {
    fn default() -> Self {
        let shared = Shared {
            mode: Mode::Accepts,
            accepted: VecDeque::new(),
            acceptor: None,
            connects: 0,
            budget: 0,
            asked: 0,
            speaks: None,
            offered: Vec::new(),
        };
        Self {
            shared: Arc::new(Mutex::new(shared)),
            id: 1,
            version: 1,
            address: "127.0.0.1:3000",
            settings: ServiceSettings::default(),
        }
    }
}

impl TestService {
    /// Returns a service at `address`.
    #[must_use]
    pub fn at(address: &'static str) -> Self {
        Self { address, ..Self::default() }
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the next connection, in order of dialling.
    pub async fn accept(&self) -> TestStream {
        poll_fn(|cx| {
            let mut shared = self.shared();
            if let Some(stream) = shared.accepted.pop_front() {
                return Poll::Ready(stream);
            }
            shared.acceptor = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// From here on refuses connections, as by `ECONNREFUSED`.
    pub fn refuse(&self) {
        self.shared().mode = Mode::Refuses { code: failure::SERVICE_UNREACHABLE, errno: 111 };
    }

    /// From here on connections never come about.
    pub fn hang(&self) {
        self.shared().mode = Mode::Hangs;
    }

    /// From here on accepts connections, as it does from the start.
    pub fn accept_again(&self) {
        self.shared().mode = Mode::Accepts;
    }

    /// Allows every exchange `retries` retries, and all together `budget` of them.
    #[must_use]
    pub fn with_retries(mut self, retries: u32, budget: usize) -> Self {
        self.settings.retries = retries;
        self.shared().budget = budget;
        self
    }

    /// How often the plugin asked whether it may send an exchange again.
    #[must_use]
    pub fn retries_asked(&self) -> usize {
        self.shared().asked
    }

    /// How often the plugin dialled.
    #[must_use]
    pub fn connects(&self) -> usize {
        self.shared().connects
    }

    /// A service that is spoken to by TLS (nothing is encrypted here), and agrees on the first of `protocols`
    /// that is offered; where none is, it refuses. What it speaks may change.
    #[must_use]
    pub fn with_tls(mut self, protocols: &'static [&'static str]) -> Self {
        self.settings.tls = true;
        self.settings.http_version = HttpVersion::ByAlpn;
        self.speak(protocols);
        self
    }

    /// From here on agrees on the first of `protocols` that is offered; empty: knows nothing of ALPN.
    pub fn speak(&self, protocols: &'static [&'static str]) {
        self.shared().speaks = (!protocols.is_empty()).then_some(protocols);
    }

    /// What was offered on connections that were dialled with protocols, in order of dialling.
    #[must_use]
    pub fn offered(&self) -> Vec<Vec<String>> {
        self.shared().offered.clone()
    }

    /// Dials with protocols, for a plugin.
    fn connect_alpn(&self, world: &Arc<World>, offered: Vec<String>) -> abi::Future {
        let protocol = {
            let mut shared = self.shared();
            shared.connects += 1;
            shared.offered.push(offered.clone());
            let speaks = shared.speaks.filter(|_| self.settings.tls && !offered.is_empty());
            speaks.map(|speaks| {
                speaks
                    .iter()
                    .find_map(|protocol| offered.iter().position(|offer| offer == protocol))
            })
        };
        let (service, own) = (self.clone(), world.clone());
        future::to_plugin(world, move |cx| {
            let (protocol, outcome) = match protocol {
                Some(None) => {
                    let alert = refused(failure::SERVICE_UNREACHABLE, ECONNRESET);
                    (abi::UNSET, Poll::Ready(alert))
                }
                Some(Some(index)) => {
                    (u32::try_from(index).unwrap_or(abi::UNSET), service.poll_connect(&own, cx))
                }
                None => (abi::UNSET, service.poll_connect(&own, cx)),
            };
            outcome.map(|abi::IoOutcome { code, err, io }| abi::AlpnOutcome {
                code,
                err,
                io,
                protocol,
            })
        })
    }

    fn poll_connect(&self, world: &Arc<World>, _: &mut Context<'_>) -> Poll<abi::IoOutcome> {
        let mut shared = self.shared();
        match shared.mode {
            Mode::Hangs => Poll::Pending,
            Mode::Refuses { code, errno } => Poll::Ready(refused(code, errno)),
            Mode::Accepts => {
                let (ours, theirs) = io::pair();
                shared.accepted.push_back(ours);
                if let Some(acceptor) = shared.acceptor.take() {
                    acceptor.wake();
                }
                let io = io::to_plugin(world, theirs);
                Poll::Ready(abi::IoOutcome { code: failure::NONE, err: 0, io })
            }
        }
    }

    /// Dials, for a plugin.
    pub(crate) fn connect(&self, world: &Arc<World>) -> abi::Future {
        self.shared().connects += 1;
        let (service, own) = (self.clone(), world.clone());
        future::to_plugin(world, move |cx| service.poll_connect(&own, cx))
    }

    /// Lends it to a plugin.
    pub(crate) fn to_plugin(&self, world: &Arc<World>) -> abi::Service {
        let own = ServiceLent {
            service: self.clone(),
            world: world.clone(),
            settings: Box::new(raw_settings(&self.settings)),
            retries: 0,
        };
        abi::Service {
            data: lend(&world.ledger, "service", own),
            vt: &VT,
            id: self.id,
            version: self.version,
            address: lend_text(self.address.as_bytes()),
        }
    }
}

/// An outcome without a stream.
pub(crate) fn refused(code: u32, err: i32) -> abi::IoOutcome {
    let io = abi::Io { data: std::ptr::null_mut(), vt: std::ptr::null() };
    abi::IoOutcome { code, err, io }
}

struct ServiceLent {
    service: TestService,
    world: Arc<World>,
    settings: Box<abi::ServiceSettings>,
    /// Retries of this exchange.
    retries: u32,
}

static VT: abi::ServiceVt = abi::ServiceVt {
    size: size_of::<abi::ServiceVt>(),
    connect,
    drop: drop_lent::<ServiceLent>,
    settings,
    retry,
    connect_alpn,
};

fn raw_settings(settings: &ServiceSettings) -> abi::ServiceSettings {
    let nanos = |time: std::time::Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX - 1);
    abi::ServiceSettings {
        size: size_of::<abi::ServiceSettings>(),
        flags: [
            (!settings.shared, abi::service::UNSHARED),
            (settings.tls, abi::service::TLS),
            (settings.http_version == HttpVersion::ByAlpn, abi::service::BY_ALPN),
        ]
        .into_iter()
        .filter_map(|(is_set, flag)| is_set.then_some(flag))
        .sum(),
        http_version: match settings.http_version {
            HttpVersion::Http1 | HttpVersion::ByAlpn => 1,
            HttpVersion::Http2 => 2,
        },
        retries: settings.retries,
        pool_idle: settings.pool_idle.unwrap_or(abi::UNSET),
        pool_connections: settings.pool_connections.unwrap_or(abi::UNSET),
        pool_idle_timeout_ns: settings.pool_idle_timeout.map_or(abi::UNSET_NS, nanos),
    }
}

/// For a plugin that asks a service it has dropped.
static NO_SETTINGS: abi::ServiceSettings = abi::ServiceSettings {
    size: size_of::<abi::ServiceSettings>(),
    flags: 0,
    http_version: 1,
    retries: 0,
    pool_idle: abi::UNSET,
    pool_connections: abi::UNSET,
    pool_idle_timeout_ns: abi::UNSET_NS,
};

unsafe extern "C" fn settings(data: *mut std::ffi::c_void) -> *const abi::ServiceSettings {
    // SAFETY: of this vtable.
    let settings = unsafe { using(data, |own: &mut ServiceLent| &raw const *own.settings) };
    settings.unwrap_or(&raw const NO_SETTINGS)
}

unsafe extern "C" fn retry(data: *mut std::ffi::c_void) -> u32 {
    // SAFETY: of this vtable.
    let granted = unsafe {
        using(data, |own: &mut ServiceLent| {
            let mut shared = own.service.shared();
            shared.asked += 1;
            let granted = own.retries < own.settings.retries && shared.budget > 0;
            own.retries += u32::from(granted);
            shared.budget -= usize::from(granted);
            granted
        })
    };
    u32::from(granted.unwrap_or(false))
}

unsafe extern "C" fn connect_alpn(
    data: *mut std::ffi::c_void,
    protocols: *const abi::Str,
    protocols_len: usize,
) -> abi::Future {
    let protocols: &[abi::Str] = if protocols_len == 0 {
        &[]
    } else {
        // SAFETY: borrowed for the call.
        unsafe { std::slice::from_raw_parts(protocols, protocols_len) }
    };
    // SAFETY: as above.
    let texts = protocols.iter().map(|text| unsafe { super::buf::borrowed(*text) });
    let offered: Vec<_> = texts.map(|text| String::from_utf8_lossy(text).into_owned()).collect();
    // SAFETY: of this vtable.
    let service = unsafe {
        using(data, |own: &mut ServiceLent| {
            let sizes = offered.iter().all(|protocol| (1..=255).contains(&protocol.len()));
            if offered.len() > abi::ALPN_MAX || !sizes {
                own.world.ledger.violation(format!("service: {offered:?} cannot be offered"));
            }
            (own.service.clone(), own.world.clone())
        })
    };
    match service {
        Some((service, world)) => service.connect_alpn(&world, offered),
        // As in `connect`.
        None => future::to_plugin(&World::new(), |_| {
            let abi::IoOutcome { code, err, io } = refused(failure::INTERNAL, 0);
            Poll::Ready(abi::AlpnOutcome { code, err, io, protocol: abi::UNSET })
        }),
    }
}

unsafe extern "C" fn connect(data: *mut std::ffi::c_void) -> abi::Future {
    // SAFETY: of this vtable.
    let service =
        unsafe { using(data, |own: &mut ServiceLent| (own.service.clone(), own.world.clone())) };
    match service {
        Some((service, world)) => service.connect(&world),
        // The violation is in the ledger; what it is of does not matter to a plugin that far gone.
        None => future::to_plugin(&World::new(), |_| Poll::Ready(refused(failure::INTERNAL, 0))),
    }
}
