//! A small exchange beside bulk ones on a slow network: it waits for its turn, not for what was sent
//! before it was there.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use sidelane_e2e::fault::Shape;
use sidelane_e2e::process::Setup;
use sidelane_e2e::service::{Connection, Service};
use sidelane_e2e::stage::get;
use sidelane_e2e::wait;
use sidelane_e2e::websocket::Socket;

use crate::resume::Torn;

/// 50 ms there and back, a segment of a hundred lost: each lane carries about 350 KB/s.
const SLOW: Shape = Shape { delay: Duration::from_millis(25), loss: 0.01, seed: 1 };
/// Exchanges that would take all of it.
const BULK: usize = 4;
/// Bytes before anything is measured: what a lane hands on is what the network takes by then.
const WARM_UP_BYTES: u64 = 1024 * 1024;
/// Round trips.
const ROUNDS: usize = 15;
/// Half of them must be done within this: a fifth of a second is usual, and four fifths were where half
/// a megabyte stood before a message.
const MEDIAN_MAX: Duration = Duration::from_millis(450);

/// Echoes a WebSocket, and sends without an end to others.
fn serve(connection: &mut Connection) -> io::Result<()> {
    let Some(request) = connection.request()? else { return Ok(()) };
    connection.stop_recording();
    if request.has("upgrade") {
        connection.upgrade(&request, "")?;
        return connection.echo();
    }
    connection.write("HTTP/1.1 200 OK\r\ncontent-length: 1000000000000\r\n\r\n")?;
    loop {
        connection.write([b'.'; 16 * 1024])?;
    }
}

#[test]
fn small_messages_overtake_bulk_on_a_slow_network() {
    let service = Service::start(serve);
    let torn = Torn::with(&Setup::of(service.address()).websocket("{}"), "", SLOW);
    let came = Arc::new(AtomicU64::new(0));
    let bulk: Vec<_> = std::iter::repeat_with(|| {
        let mut stream = TcpStream::connect(torn.relay.web()).expect("the relay listens");
        stream.write_all(&get("/bulk")).expect("the relay reads");
        let handle = stream.try_clone().expect("a socket has more than one handle");
        let came = Arc::clone(&came);
        let reader = std::thread::spawn(move || {
            let mut space = [0; 16 * 1024];
            while let Ok(length) = stream.read(&mut space)
                && length > 0
            {
                came.fetch_add(length as u64, Ordering::SeqCst);
            }
        });
        (handle, reader)
    })
    .take(BULK)
    .collect();
    wait::until("bulk", || (came.load(Ordering::SeqCst) > WARM_UP_BYTES).then_some(()));
    let mut socket = Socket::open(torn.relay.web());
    let mut times: Vec<_> = std::iter::repeat_with(|| {
        let begun = Instant::now();
        socket.says_back("now");
        begun.elapsed()
    })
    .take(ROUNDS)
    .collect();
    times.sort_unstable();
    let before = came.load(Ordering::SeqCst);
    wait::until("bulk goes on", || (came.load(Ordering::SeqCst) > before).then_some(()));
    for (stream, reader) in bulk {
        stream.shutdown(Shutdown::Both).expect("it is open");
        reader.join().expect("a download does not panic");
    }
    assert!(times[ROUNDS / 2] < MEDIAN_MAX, "{times:?}");
}
