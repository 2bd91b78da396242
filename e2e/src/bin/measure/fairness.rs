//! One small exchange beside four bulk ones: through one lane, through two, and over TCP connections of
//! their own.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sidelane_e2e::client::Client;
use sidelane_e2e::fault::{Shape, Wire};
use sidelane_e2e::stage::get;
use sidelane_e2e::wait;
use sidelane_e2e::websocket::{BINARY, Frame, Socket};

use crate::stage::{LOSSY, Stage, Tunnel, service};
use crate::{Times, head, row, shown};

/// Exchanges that saturate.
const BULK: usize = 4;
/// Bytes of a small message.
const MESSAGE_BYTES: usize = 125;
/// Bytes of bulk, over all, before the clock starts: windows have grown by then.
const WARM_UP_BYTES: u64 = 8 * 1024 * 1024;
/// Aim on loopback.
const AIM: Duration = Duration::from_micros(300);

/// How long each part of a measurement runs.
pub(crate) fn report(time: Duration) -> String {
    let mut text = format!(
        "## One small exchange beside {BULK} bulk ones\n\nRound trips of a WebSocket's {MESSAGE_BYTES} bytes and of a small GET, ms; {time:?} each.\n\n"
    );
    for (name, wire) in [("loopback", None), ("50 ms there and back, 1 % loss", Some(LOSSY))] {
        text += &format!("### {name}\n\n");
        let columns =
            ["path", "echo p50", "echo p99", "GET p50", "GET p99", "bulk MB/s", "alone p50"];
        text += &head(&columns);
        text += &over_tcp(wire, time);
        for tls in [false, true] {
            for lanes in [1, 2] {
                text += &through_lanes(Tunnel { lanes, tls, wire }, time);
            }
        }
        text.push('\n');
    }
    text + &format!("Aim on loopback: echo p50 at most {} ms.\n", shown(AIM))
}

fn over_tcp(wire: Option<Shape>, time: Duration) -> String {
    let service = service();
    let wire = wire.map(|shape| Wire::shaped(service.address(), shape));
    let address = wire.as_ref().map_or_else(|| service.address(), Wire::address);
    measure("TCP, a connection each", address, time)
}

fn through_lanes(tunnel: Tunnel, time: Duration) -> String {
    let service = service();
    let stage = Stage::start(service.address(), tunnel);
    let lanes =
        if tunnel.lanes == 1 { "1 lane".to_owned() } else { format!("{} lanes", tunnel.lanes) };
    let tls = if tunnel.tls { ", TLS" } else { "" };
    measure(&format!("Sidelane, {lanes}{tls}"), stage.relay.web(), time)
}

fn measure(name: &str, address: SocketAddr, time: Duration) -> String {
    eprintln!("{name}");
    let mut alone = echoes(address, time / 4);
    let bulk = Bulk::start(address);
    let (bytes, begun) = (bulk.bytes(), Instant::now());
    let mut echoes = echoes(address, time);
    let mut answers = answers(address, time);
    let rate = (bulk.bytes() - bytes) as f64 / 1e6 / begun.elapsed().as_secs_f64();
    bulk.end();
    row(&[
        name.to_owned(),
        shown(echoes.percentile(50)),
        shown(echoes.percentile(99)),
        shown(answers.percentile(50)),
        shown(answers.percentile(99)),
        format!("{rate:.1}"),
        shown(alone.percentile(50)),
    ])
}

/// Round trips of a WebSocket, one after the other.
fn echoes(address: SocketAddr, time: Duration) -> Times {
    let mut socket = Socket::open(address);
    let mut times = Times::default();
    let end = Instant::now() + time;
    while Instant::now() < end {
        let begun = Instant::now();
        socket.send(Frame::new(BINARY, [7; MESSAGE_BYTES]));
        let frame = socket.frame();
        times.since(begun);
        assert_eq!(frame.payload, [7; MESSAGE_BYTES], "an echo");
    }
    times
}

/// Small requests on one connection, one after the other.
fn answers(address: SocketAddr, time: Duration) -> Times {
    let mut client = Client::connect(address);
    let mut times = Times::default();
    let end = Instant::now() + time;
    while Instant::now() < end {
        let begun = Instant::now();
        client.send(get("/"));
        let answer = client.answer("GET");
        times.since(begun);
        assert_eq!(answer.body, b"ok", "an answer");
    }
    times
}

/// Downloads that go on until they are ended.
struct Bulk {
    streams: Vec<TcpStream>,
    threads: Vec<JoinHandle<()>>,
    bytes: Arc<AtomicU64>,
}

impl Bulk {
    fn start(address: SocketAddr) -> Self {
        let bytes = Arc::new(AtomicU64::new(0));
        let mut bulk = Self { streams: Vec::new(), threads: Vec::new(), bytes };
        for _ in 0..BULK {
            let mut stream = TcpStream::connect(address).expect("somebody listens");
            bulk.streams.push(stream.try_clone().expect("a socket has more than one handle"));
            let bytes = Arc::clone(&bulk.bytes);
            bulk.threads.push(std::thread::spawn(move || {
                stream.write_all(&get("/bulk")).expect("it is read");
                let mut space = vec![0; 256 * 1024];
                while let Ok(length) = stream.read(&mut space)
                    && length > 0
                {
                    bytes.fetch_add(length as u64, Ordering::Relaxed);
                }
            }));
        }
        wait::until("bulk", || (bulk.bytes() > WARM_UP_BYTES).then_some(()));
        bulk
    }

    fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    fn end(self) {
        for stream in self.streams {
            // It may have ended by itself; then nothing was measured, and the rate shows it.
            let _ = stream.shutdown(Shutdown::Both);
        }
        for thread in self.threads {
            thread.join().expect("a download does not panic");
        }
    }
}
