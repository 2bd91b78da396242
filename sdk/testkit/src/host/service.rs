//! A service behind the tunnel, played by the test.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use sidelane_abi as abi;
use sidelane_plugin::failure;

use super::buf::lend_text;
use super::future;
use super::io::{self, TestStream};
use super::lent::{drop_lent, lend, using};
use super::world::World;

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
}

impl Default for TestService {
    fn default() -> Self {
        let shared =
            Shared { mode: Mode::Accepts, accepted: VecDeque::new(), acceptor: None, connects: 0 };
        Self { shared: Arc::new(Mutex::new(shared)), id: 1, version: 1, address: "127.0.0.1:3000" }
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

    /// How often the plugin dialled.
    #[must_use]
    pub fn connects(&self) -> usize {
        self.shared().connects
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
        let own = ServiceLent { service: self.clone(), world: world.clone() };
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
}

static VT: abi::ServiceVt =
    abi::ServiceVt { size: size_of::<abi::ServiceVt>(), connect, drop: drop_lent::<ServiceLent> };

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
