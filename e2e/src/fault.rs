//! A wire between sidecar and relay that a test harms: it cuts, resets, stalls, half-opens, delays
//! and loses, while both ends are the real program.
//!
//! It carries TCP on loopback byte by byte and knows nothing of what the bytes mean. It runs on a
//! thread of its own; a test drives it from outside, and reads what it has carried. What it holds
//! of a direction is bounded (4 MiB, `line`); whoever sends more waits.

mod line;
mod pump;
mod storm;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use socket2::{Domain, SockRef, Socket, Type};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;

use line::Line;
use pump::{Flow, Outcome};
pub use storm::Storm;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;
/// What the kernel holds for a wire that loses before the wire reads it: little, so that what waits for
/// the window waits at its sender, as it would without a wire.
const RECEIVE_BYTES: usize = 8 * 1024;
/// How long whoever was cut off may take to close its own end; then it is closed without it.
const CLOSE_DEADLINE: Duration = Duration::from_secs(2);

/// One of a wire's two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Who has dialled the wire: the sidecar.
    Dialler,
    /// Whom the wire has dialled: the relay.
    Target,
}

/// What may happen to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Both ends see the connection closed; what was on its way is gone.
    Cut,
    /// Both ends see it reset.
    Reset,
    /// Bytes stop, both ways; both ends see it open. Until [`Wire::heal`].
    Stall,
    /// Nothing comes to this end any more; what it sends arrives. Until [`Wire::heal`].
    Deaf(End),
    /// This end sees it reset; the other sees it open and silent.
    HalfOpen(End),
}

/// How a wire is, in each direction.
#[derive(Clone, Copy, Debug, Default)]
pub struct Shape {
    /// One way. A connection is up after two of it, as a TCP handshake takes.
    pub delay: Duration,
    /// Share of segments that come a round trip late, and all behind them: what a loss is to
    /// whoever reads the stream. The sender's window halves then, as congestion control does it.
    pub loss: f64,
    /// Where another run is to lose other segments.
    pub seed: u64,
}

/// What a wire has carried of one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Carried {
    /// Counted from 0, in the order in which they were made.
    pub number: usize,
    /// When the wire took it.
    pub begun: Instant,
    /// It is in place, and nothing has harmed it.
    pub well: bool,
    /// Bytes to the relay.
    pub up: u64,
    /// Bytes to the sidecar.
    pub down: u64,
}

/// A wire. What runs through it ends when it is dropped.
#[derive(Debug)]
pub struct Wire {
    address: SocketAddr,
    shared: Arc<Shared>,
    /// Holds the port while nobody listens.
    _holder: Socket,
    thread: Option<JoinHandle<()>>,
}

/// What the thread of a wire and its test share.
#[derive(Debug)]
struct Shared {
    shape: Shape,
    state: Mutex<State>,
    door: watch::Sender<Door>,
}

#[derive(Debug, Default)]
struct State {
    /// Where connections lead, in turn.
    targets: Vec<SocketAddr>,
    made: usize,
    connections: BTreeMap<usize, Handle>,
    /// Of those that are gone.
    carried: Vec<Carried>,
}

/// How new connections are met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Door {
    Open,
    /// They are accepted, and nothing moves on them.
    Silent,
    /// Nobody listens.
    Shut,
    /// The wire is at its end.
    Gone,
}

#[derive(Clone, Debug)]
struct Handle {
    control: Arc<watch::Sender<Control>>,
    traffic: Arc<Traffic>,
}

#[derive(Debug)]
struct Traffic {
    begun: Instant,
    up: AtomicU64,
    down: AtomicU64,
    harmed: AtomicBool,
}

/// What is to become of a connection.
#[derive(Clone, Copy, Debug, Default)]
struct Control {
    stalls_up: bool,
    stalls_down: bool,
    end: Option<Fault>,
}

impl Wire {
    /// A wire that passes everything to `target` at once.
    #[must_use]
    pub fn to(target: SocketAddr) -> Self {
        Self::shaped(target, Shape::default())
    }

    /// A wire of that shape.
    ///
    /// # Panics
    /// Where loopback does not work.
    #[must_use]
    pub fn shaped(target: SocketAddr, shape: Shape) -> Self {
        let holder = bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), &shape);
        let address = holder.local_addr().expect("it is bound");
        let address = address.as_socket().expect("an address of IPv4");
        let state = Mutex::new(State { targets: vec![target], ..State::default() });
        let shared = Arc::new(Shared { shape, state, door: watch::Sender::new(Door::Open) });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime");
        // Before the first dial.
        let listener = runtime.block_on(async { listen(address, &shape) });
        let thread = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || runtime.block_on(serve(listener, address, shared))
        });
        Self { address, shared, _holder: holder, thread: Some(thread) }
    }

    /// Returns where it is dialled.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// New connections lead to each of these in turn.
    pub fn lead_to(&self, targets: &[SocketAddr]) {
        self.shared.state().targets = targets.to_vec();
    }

    /// Does this to every connection that is well; returns how many there were.
    #[allow(clippy::must_use_candidate, reason = "what it does is the point of it")]
    pub fn harm(&self, fault: Fault) -> usize {
        self.shared.harm(fault, |_| true)
    }

    /// Does this to the connection of that number; returns whether it was well.
    #[allow(clippy::must_use_candidate, reason = "what it does is the point of it")]
    pub fn harm_one(&self, number: usize, fault: Fault) -> bool {
        self.shared.harm(fault, |each| each == number) == 1
    }

    /// What was stalled goes on, and new connections pass.
    pub fn heal(&self) {
        self.shared.door.send_replace(Door::Open);
        for handle in self.shared.state().connections.values() {
            handle.control.send_modify(|control| {
                control.stalls_up = false;
                control.stalls_down = false;
            });
            if handle.control.borrow().end.is_none() {
                handle.traffic.harmed.store(false, Ordering::SeqCst);
            }
        }
    }

    /// Stalls every connection, those that are yet to be made too, until [`Wire::heal`].
    pub fn freeze(&self) {
        self.shared.door.send_replace(Door::Silent);
        self.harm(Fault::Stall);
    }

    /// Cuts every connection and refuses new ones, until [`Wire::up`].
    pub fn down(&self) {
        self.shared.door.send_replace(Door::Shut);
        self.harm(Fault::Cut);
    }

    /// Takes connections again.
    pub fn up(&self) {
        self.shared.door.send_replace(Door::Open);
    }

    /// Does each of these in turn to every connection that is well, once in a period, until what is
    /// returned is dropped.
    #[must_use]
    pub fn every(&self, period: Duration, faults: &[Fault]) -> Storm {
        Storm::over(Arc::clone(&self.shared), period, faults.to_vec())
    }

    /// Returns what each connection has carried so far, in the order in which they were made.
    #[must_use]
    pub fn carried(&self) -> Vec<Carried> {
        let state = self.shared.state();
        let open = state.connections.iter().map(|(number, handle)| handle.carried(*number));
        let mut all: Vec<_> = state.carried.iter().copied().chain(open).collect();
        all.sort_by_key(|carried| carried.number);
        all
    }

    /// Returns the numbers of those that are well.
    #[must_use]
    pub fn well(&self) -> Vec<usize> {
        let carried = self.carried();
        carried.iter().filter(|carried| carried.well).map(|carried| carried.number).collect()
    }

    /// Returns how many connections were made in all.
    #[must_use]
    pub fn made(&self) -> usize {
        self.shared.state().made
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.shared.door.send_replace(Door::Gone);
        if let Some(thread) = self.thread.take() {
            // A panic of it has been printed.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics with it locked")
    }

    fn harm(&self, fault: Fault, chosen: impl Fn(usize) -> bool) -> usize {
        let state = self.state();
        let well = state.connections.iter().filter(|(number, handle)| {
            chosen(**number) && !handle.traffic.harmed.load(Ordering::SeqCst)
        });
        well.map(|(_, handle)| handle.harm(fault)).count()
    }
}

impl Handle {
    fn harm(&self, fault: Fault) {
        self.traffic.harmed.store(true, Ordering::SeqCst);
        self.control.send_modify(|control| match fault {
            Fault::Stall => (control.stalls_up, control.stalls_down) = (true, true),
            Fault::Deaf(End::Dialler) => control.stalls_down = true,
            Fault::Deaf(End::Target) => control.stalls_up = true,
            Fault::Cut | Fault::Reset | Fault::HalfOpen(_) => control.end = Some(fault),
        });
    }

    fn carried(&self, number: usize) -> Carried {
        Carried {
            number,
            begun: self.traffic.begun,
            well: !self.traffic.harmed.load(Ordering::SeqCst),
            up: self.traffic.up.load(Ordering::SeqCst),
            down: self.traffic.down.load(Ordering::SeqCst),
        }
    }
}

/// A socket at an address that others of ours may share.
fn bind(address: SocketAddr, shape: &Shape) -> Socket {
    let socket = socket(shape);
    socket.set_reuse_port(true).expect("a fresh socket takes options");
    socket.bind(&address.into()).expect("a free port");
    socket
}

fn socket(shape: &Shape) -> Socket {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    if shape.loss > 0.0 {
        // Before it is connected, or a larger window has been told by then.
        socket.set_recv_buffer_size(RECEIVE_BYTES).expect("a fresh socket takes options");
    }
    socket
}

fn listen(address: SocketAddr, shape: &Shape) -> TcpListener {
    let socket = bind(address, shape);
    socket.listen(BACKLOG).expect("a bound socket listens");
    socket.set_nonblocking(true).expect("a fresh socket takes options");
    TcpListener::from_std(socket.into()).expect("a listener")
}

/// Accepts until the wire is gone. What it has accepted ends with its runtime.
async fn serve(listener: TcpListener, address: SocketAddr, shared: Arc<Shared>) {
    let mut door = shared.door.subscribe();
    let mut listener = Some(listener);
    loop {
        let now = *door.borrow_and_update();
        match now {
            Door::Gone => return,
            Door::Shut => listener = None,
            Door::Open | Door::Silent => {
                listener.get_or_insert_with(|| listen(address, &shared.shape));
            }
        }
        let accepted = async {
            match &listener {
                Some(listener) => listener.accept().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            // The sender lives in `shared`.
            _ = door.changed() => {}
            accepted = accepted => {
                // An error is the dialler's, who has gone already.
                let Ok((dialler, _)) = accepted else { continue };
                tokio::spawn(carry(dialler, now == Door::Silent, Arc::clone(&shared)));
            }
        }
    }
}

/// Carries one connection until it ends or is ended.
async fn carry(dialler: TcpStream, silent: bool, shared: Arc<Shared>) {
    let control = Control { stalls_up: silent, stalls_down: silent, end: None };
    let (control, mut watched) = watch::channel(control);
    let traffic = Arc::new(Traffic {
        begun: Instant::now(),
        up: AtomicU64::new(0),
        down: AtomicU64::new(0),
        harmed: AtomicBool::new(silent),
    });
    let handle = Handle { control: Arc::new(control), traffic: Arc::clone(&traffic) };
    let (number, target) = {
        let mut state = shared.state();
        let number = state.made;
        state.made += 1;
        state.connections.insert(number, handle.clone());
        (number, state.targets[number % state.targets.len()])
    };
    // Nobody at the target: the dialler sees a connection that ends.
    if let Ok(target) = connect(target, &shared.shape).await {
        run(dialler, target, number as u64, &shared.shape, &mut watched, &traffic).await;
    } else {
        let _ = SockRef::from(&dialler).set_linger(Some(Duration::ZERO));
    }
    traffic.harmed.store(true, Ordering::SeqCst);
    let mut state = shared.state();
    state.connections.remove(&number);
    state.carried.push(handle.carried(number));
}

async fn connect(target: SocketAddr, shape: &Shape) -> std::io::Result<TcpStream> {
    let socket = socket(shape);
    socket.set_nonblocking(true)?;
    TcpSocket::from_std_stream(socket.into()).connect(target).await
}

async fn run(
    dialler: TcpStream,
    target: TcpStream,
    number: u64,
    shape: &Shape,
    control: &mut watch::Receiver<Control>,
    traffic: &Traffic,
) {
    for side in [&dialler, &target] {
        // An error shows when bytes are to pass.
        let _ = side.set_nodelay(true);
    }
    let begun = traffic.begun.into();
    // Another number for each direction of each connection.
    let seed = shape.seed.wrapping_add(2 * number);
    let up = Flow {
        from: &dialler,
        to: &target,
        line: Line::new(shape, seed, begun),
        stalls: |control| control.stalls_up,
        carried: &traffic.up,
    };
    let down = Flow {
        from: &target,
        to: &dialler,
        line: Line::new(shape, seed + 1, begun),
        stalls: |control| control.stalls_down,
        carried: &traffic.down,
    };
    let (mut up_control, mut down_control) = (control.clone(), control.clone());
    let both = async { tokio::join!(up.run(&mut up_control), down.run(&mut down_control)) };
    let fault = tokio::select! {
        biased;
        ended = control.wait_for(|control| control.end.is_some()) => {
            ended.ok().and_then(|control| control.end)
        }
        (up, down) = both => {
            let broken = up == Outcome::Broken || down == Outcome::Broken;
            broken.then_some(Fault::Reset)
        }
    };
    let resets = |side: &TcpStream| {
        // Takes effect with its close.
        let _ = SockRef::from(side).set_linger(Some(Duration::ZERO));
    };
    match fault {
        None | Some(Fault::Stall | Fault::Deaf(_)) => {}
        Some(Fault::Cut) => {
            let both = async { tokio::join!(pump::close(&dialler), pump::close(&target)) };
            let _ = tokio::time::timeout(CLOSE_DEADLINE, both).await;
        }
        Some(Fault::Reset) => {
            resets(&dialler);
            resets(&target);
        }
        Some(Fault::HalfOpen(end)) => {
            let (gone, _stays) =
                if end == End::Dialler { (dialler, target) } else { (target, dialler) };
            resets(&gone);
            drop(gone);
            // Until the wire is dropped, and its runtime with it.
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests;
