//! From a cut to the next byte, as a client and a service see it, and what is sent again for it.

use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sidelane_e2e::client::Client;
use sidelane_e2e::fault::{Carried, Fault, Shape, Wire};
use sidelane_e2e::service::{Connection, Service};
use sidelane_e2e::stage::get;
use sidelane_e2e::wait;

use crate::stage::{FAR, Stage, Tunnel, service};
use crate::{Times, head, row, shown};

/// Between two messages of a trickle.
const TICK: Duration = Duration::from_millis(1);
/// Bytes of such a message: its number.
const MESSAGE_BYTES: usize = 8;
/// Between two cuts, beside sixteen times the wire's delay.
const PAUSE: Duration = Duration::from_millis(250);
/// Lanes that are cut.
const LANES: usize = 2;
/// Bytes of bulk before the first cut.
const WARM_UP_BYTES: u64 = 8 * 1024 * 1024;

/// So many cuts in each measurement.
pub(crate) fn report(cuts: usize) -> String {
    let mut text = format!(
        "## From a cut to the next byte\n\nA message each way every {TICK:?}, both lanes cut and reset by turns, {cuts} times; ms.\n\n"
    );
    let columns = [
        "wire",
        "direction",
        "cuts",
        "cut to next byte p50",
        "p99",
        "dial to next byte p50",
        "p99",
    ];
    text += &head(&columns);
    let wires = [("loopback", Shape::default()), ("50 ms there and back", FAR)];
    for (name, shape) in wires {
        for tls in [false, true] {
            let name = if tls { format!("{name}, TLS") } else { name.to_owned() };
            eprintln!("cuts: {name}");
            text += &trickles(&name, Tunnel { lanes: LANES, tls, wire: Some(shape) }, cuts);
        }
    }
    text += "\n### What is sent again\n\nDuring a download that saturates.\n\n";
    text += &head(&["wire", "lanes that came back", "KiB sent again for each", "MB/s"]);
    for (name, shape) in wires {
        eprintln!("sent again: {name}");
        text += &replayed(name, Tunnel { lanes: LANES, tls: false, wire: Some(shape) }, cuts);
    }
    text
}

/// Numbered messages of one direction.
#[derive(Default)]
struct Trickle {
    sent: AtomicU64,
    came: Mutex<Vec<Instant>>,
    stopped: AtomicBool,
}

impl Trickle {
    /// Sends numbers until it is stopped.
    fn send(&self, mut write: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        let mut next = Instant::now();
        while !self.stopped.load(Ordering::SeqCst) {
            let number = self.sent.fetch_add(1, Ordering::SeqCst);
            write(&number.to_be_bytes())?;
            next += TICK;
            while let Some(left) = next.checked_duration_since(Instant::now()) {
                std::thread::park_timeout(left);
            }
        }
        Ok(())
    }

    /// Takes numbers until the stream ends.
    fn receive(&self, mut read: impl FnMut() -> io::Result<Vec<u8>>) -> io::Result<()> {
        for number in 0_u64.. {
            let bytes = read()?;
            assert_eq!(bytes, number.to_be_bytes(), "every number comes, in order");
            self.came.lock().expect("no panic").push(Instant::now());
        }
        Ok(())
    }

    fn count(&self) -> u64 {
        self.came.lock().expect("no panic").len() as u64
    }
}

/// A trickle each way, each in an exchange of its own.
fn trickles(name: &str, tunnel: Tunnel, cuts: usize) -> String {
    let (down, up) = (Arc::new(Trickle::default()), Arc::new(Trickle::default()));
    let service = Service::start({
        let (down, up) = (Arc::clone(&down), Arc::clone(&up));
        move |connection| serve(connection, &down, &up)
    });
    let stage = Stage::start(service.address(), tunnel);
    let mut receiver = Client::connect(stage.relay.web());
    receiver.send(get("/down"));
    assert_eq!(receiver.head().status, 200, "a trickle begins");
    let mut sender = TcpStream::connect(stage.relay.web()).expect("the relay listens");
    sender.set_nodelay(true).expect("a fresh socket takes options");
    sender
        .write_all(
            b"POST /up HTTP/1.1\r\nHost: api.localhost\r\nContent-Length: 1000000000\r\n\r\n",
        )
        .expect("the relay reads");
    let threads = [
        std::thread::spawn({
            let down = Arc::clone(&down);
            move || down.receive(|| receiver.exactly(MESSAGE_BYTES))
        }),
        std::thread::spawn({
            let up = Arc::clone(&up);
            move || {
                let outcome = up.send(|bytes| sender.write_all(bytes));
                // Open for what is still to arrive.
                while up.count() < up.sent.load(Ordering::SeqCst) {
                    std::thread::park_timeout(TICK);
                }
                outcome
            }
        }),
    ];
    wait::until("the trickles", || (down.count().min(up.count()) > 100).then_some(()));
    let wire = stage.wire.as_ref().expect("a wire");
    let marks = cut(&stage, wire, tunnel, cuts);
    let mut text = String::new();
    for (direction, trickle) in [("to the client", &down), ("to the service", &up)] {
        trickle.stopped.store(true, Ordering::SeqCst);
        wait::until("the rest", || {
            (trickle.count() == trickle.sent.load(Ordering::SeqCst)).then_some(())
        });
        let came = trickle.came.lock().expect("no panic");
        let (mut whole, mut from_dial) = gaps(&marks, &wire.carried(), &came);
        text += &row(&[
            name.to_owned(),
            direction.to_owned(),
            whole.count().to_string(),
            shown(whole.percentile(50)),
            shown(whole.percentile(99)),
            shown(from_dial.percentile(50)),
            shown(from_dial.percentile(99)),
        ]);
    }
    drop(stage);
    for thread in threads {
        // Its stream ended with the stage.
        let _ = thread.join().expect("every number came in order");
    }
    text
}

fn serve(connection: &mut Connection, down: &Trickle, up: &Trickle) -> io::Result<()> {
    connection.stop_recording();
    let request = connection.request()?.ok_or(io::ErrorKind::UnexpectedEof)?;
    if request.target == b"/up" {
        return up.receive(|| connection.exactly(MESSAGE_BYTES));
    }
    connection.write("HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n")?;
    down.send(|bytes| connection.write(bytes))?;
    connection.closed()
}

/// Cuts all lanes again and again; returns when.
fn cut(stage: &Stage, wire: &Wire, tunnel: Tunnel, cuts: usize) -> Vec<Instant> {
    let pause = PAUSE + 16 * tunnel.wire.map_or(Duration::ZERO, |shape| shape.delay);
    let mut marks = Vec::new();
    for number in 0..cuts {
        wait::until("lanes", || (wire.well().len() == tunnel.lanes).then_some(()));
        stage.until_lanes(tunnel.lanes);
        let begun = Instant::now();
        wait::until("the next cut", || (begun.elapsed() >= pause).then_some(()));
        marks.push(Instant::now());
        wire.harm(if number % 2 == 0 { Fault::Cut } else { Fault::Reset });
    }
    stage.until_lanes(tunnel.lanes);
    marks
}

/// Returns how long each cut held messages back, and how much of it came after the last dial.
fn gaps(marks: &[Instant], carried: &[Carried], came: &[Instant]) -> (Times, Times) {
    let (mut whole, mut from_dial) = (Times::default(), Times::default());
    for (number, mark) in marks.iter().enumerate() {
        let end = marks.get(number + 1);
        let first = came.partition_point(|time| time < mark).saturating_sub(1);
        let pauses = came[first..].windows(2);
        let within = pauses.take_while(|pair| end.is_none_or(|end| pair[1] < *end));
        // Messages come every tick: the longest pause is the cut's.
        let Some(pause) = within.max_by_key(|pair| pair[1] - pair[0]) else { continue };
        whole.add(pause[1] - *mark.min(&pause[1]));
        let dials = carried.iter().map(|one| one.begun);
        if let Some(dial) = dials.filter(|begun| *begun > *mark && *begun <= pause[1]).max() {
            from_dial.add(pause[1] - dial);
        }
    }
    (whole, from_dial)
}

/// A download that saturates while its lanes are cut.
fn replayed(name: &str, tunnel: Tunnel, cuts: usize) -> String {
    let service = service();
    let stage = Stage::start(service.address(), tunnel);
    let bytes = Arc::new(AtomicU64::new(0));
    let mut stream = TcpStream::connect(stage.relay.web()).expect("the relay listens");
    let reader = std::thread::spawn({
        let bytes = Arc::clone(&bytes);
        move || {
            stream.write_all(&get("/bulk")).expect("the relay reads");
            let mut space = vec![0; 256 * 1024];
            while let Ok(length) = stream.read(&mut space)
                && length > 0
            {
                bytes.fetch_add(length as u64, Ordering::Relaxed);
            }
        }
    });
    let come = || bytes.load(Ordering::Relaxed);
    wait::until("bulk", || (come() > WARM_UP_BYTES).then_some(()));
    let metric = |name| stage.sidecar.metric(name, &[]).unwrap_or(0.0);
    let (before, begun) = (come(), Instant::now());
    cut(&stage, stage.wire.as_ref().expect("a wire"), tunnel, cuts);
    let rate = (come() - before) as f64 / 1e6 / begun.elapsed().as_secs_f64();
    let (resumed, again) = (metric(RESUMED), metric(REPLAYED));
    drop(stage);
    reader.join().expect("a download does not panic");
    // The bulk is on one lane; the other's are acknowledgements, which are not counted.
    let each = again / 1024.0 / (resumed / LANES as f64).max(1.0);
    row(&[name.to_owned(), format!("{resumed}"), format!("{each:.1}"), format!("{rate:.1}")])
}

/// Lanes that came back.
const RESUMED: &str = "sidelane_lane_resumes_total";
/// Bytes that were sent again then.
const REPLAYED: &str = "sidelane_lane_replayed_bytes_total";
