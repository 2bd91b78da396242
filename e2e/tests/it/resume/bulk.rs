//! Large bodies over lanes that are cut five times a second: every byte arrives once, in its place.
//!
//! `SIDELANE_TORN_MIB` says how many MiB each way; a GiB by default.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use sidelane_e2e::client::head_end;
use sidelane_e2e::fault::Fault;
use sidelane_e2e::pattern::Pattern;
use sidelane_e2e::process::{Setup, Sidelane};
use sidelane_e2e::service::{Connection, Service};
use sidelane_e2e::stage::get;
use sidelane_e2e::wait;

use super::{Torn, pass};

const MIB: u64 = 1024 * 1024;
/// Each body by default.
const BODY_MIB: u64 = 1024;
/// A body whose transfer is held back.
const QUARTER: u64 = 256 * MIB;
/// What it may cost an end: the ring of its lane (16 MiB at most), the exchange's window on both sides of
/// the plugin, copies on their way, and room for the allocator.
const GROWTH_MAX: u64 = 48 * MIB;
/// Between two cuts. Each is to every lane that is well; cuts and resets take turns.
const PERIOD: Duration = Duration::from_millis(200);
/// How long a client waits for a byte: above the grace, so that a broken end shows as what it is.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// How long a body is.
pub(super) fn body_bytes() -> u64 {
    let mib = std::env::var("SIDELANE_TORN_MIB")
        .map_or(BODY_MIB, |text| text.parse().expect("SIDELANE_TORN_MIB is a number"));
    mib * MIB
}

/// Sends a body, or takes one and says where it went wrong.
pub(super) fn serve(connection: &mut Connection) -> io::Result<()> {
    connection.stop_recording();
    while let Some(request) = connection.request()? {
        let length = request.first("content-length").and_then(|text| text.parse().ok());
        let mut pattern = Pattern::default();
        if let Some(length) = length {
            let mut outcome = "whole".to_owned();
            let mut left: u64 = length;
            while left > 0 {
                let bytes = connection.some()?;
                if bytes.is_empty() {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                if outcome == "whole"
                    && let Err(offset) = pattern.check(&bytes)
                {
                    outcome = format!("other at {offset}");
                }
                left -= bytes.len() as u64;
            }
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", outcome.len());
            connection.write(head + &outcome)?;
        } else {
            let digits = String::from_utf8_lossy(&request.target[1..]).into_owned();
            let length = digits.parse().map_err(io::Error::other)?;
            connection.write(format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n"))?;
            while pattern.offset() < length {
                connection.write(pattern.next(length - pattern.offset()))?;
            }
        }
    }
    Ok(())
}

/// Reads a head, and returns what came behind it.
fn read_head(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        if let Some(end) = head_end(&bytes) {
            assert!(bytes.starts_with(b"HTTP/1.1 200 "), "{:?}", String::from_utf8_lossy(&bytes));
            return bytes.split_off(end);
        }
        let mut space = [0; 4096];
        let length = stream.read(&mut space).expect("a head");
        assert_ne!(length, 0, "the connection ended before the head: {bytes:?}");
        bytes.extend_from_slice(&space[..length]);
    }
}

fn connect(torn: &Torn) -> TcpStream {
    let stream = TcpStream::connect(torn.relay.web()).expect("the relay listens");
    stream.set_read_timeout(Some(SILENCE_MAX)).expect("a fresh socket takes options");
    stream.set_write_timeout(Some(SILENCE_MAX)).expect("a fresh socket takes options");
    stream
}

pub(super) fn download(torn: &Torn, length: u64) {
    let mut stream = connect(torn);
    stream.write_all(&get(&format!("/{length}"))).expect("the relay reads");
    let mut pattern = Pattern::default();
    pattern.check(&read_head(&mut stream)).expect("the body's beginning");
    let mut space = vec![0; 256 * 1024];
    while pattern.offset() < length {
        let at = pattern.offset();
        let count = stream.read(&mut space);
        let count = count.unwrap_or_else(|error| panic!("{error} at {at} of {length}"));
        assert_ne!(count, 0, "it ended at {at} of {length}");
        pattern.check(&space[..count]).expect("the bytes that were sent");
    }
    assert_eq!(pattern.offset(), length, "nothing follows");
}

pub(super) fn upload(torn: &Torn, length: u64) {
    let mut stream = connect(torn);
    write!(stream, "POST / HTTP/1.1\r\nHost: api.localhost\r\nContent-Length: {length}\r\n\r\n")
        .expect("the relay reads");
    let mut pattern = Pattern::default();
    while pattern.offset() < length {
        let at = pattern.offset();
        let written = stream.write_all(pattern.next(length - at));
        written.unwrap_or_else(|error| panic!("{error} at {at} of {length}"));
    }
    let mut outcome = read_head(&mut stream);
    stream.shutdown(Shutdown::Write).expect("it is open");
    stream.read_to_end(&mut outcome).expect("the answer's end");
    assert_eq!(String::from_utf8_lossy(&outcome), "whole");
}

/// Runs a transfer while lanes are cut, and says what it took.
pub(super) fn under_cuts(name: &str, torn: &Torn, length: u64, transfer: fn(&Torn, u64)) {
    let before = torn.resumed();
    let storm = torn.wire.every(PERIOD, &[Fault::Cut, Fault::Reset]);
    let begun = Instant::now();
    transfer(torn, length);
    let (elapsed, cuts) = (begun.elapsed(), storm.end());
    println!(
        "{name}: {} MiB in {elapsed:.1?} with {cuts} connections cut, {} lanes resumed",
        length / MIB,
        torn.resumed() - before,
    );
    assert!(cuts >= 4, "{cuts} cuts in {elapsed:?}");
    torn.until_lanes(super::LANES);
    torn.lost_nothing();
    torn.is_one_session();
    assert!(torn.resumed() >= before + 4.0);
}

#[test]
fn download_cut_five_times_a_second_arrives_whole() {
    let service = Service::start(serve);
    under_cuts("download", &Torn::of(&Setup::of(service.address())), body_bytes(), download);
}

#[test]
fn upload_cut_five_times_a_second_arrives_whole() {
    let service = Service::start(serve);
    under_cuts("upload", &Torn::of(&Setup::of(service.address())), body_bytes(), upload);
}

/// A body whose transfer is held back by an outage: what waits is bounded by the lane's ring and the
/// exchange's window, not by what the service would send.
#[test]
fn outage_in_a_transfer_holds_it_back_and_costs_no_memory() {
    let service = Service::start(serve);
    let torn = Torn::of(&Setup::of(service.address()));
    let resident = || [&torn.relay, &torn.sidecar].map(Sidelane::memory_resident);
    let before = resident();
    std::thread::scope(|scope| {
        let transfer = scope.spawn(|| download(&torn, QUARTER));
        let carried = || torn.wire.carried().iter().map(|one| one.up).sum::<u64>();
        wait::until("some of it", || (carried() > QUARTER / 8).then_some(()));
        torn.wire.down();
        torn.until_lanes(0);
        pass(Duration::from_secs(2));
        assert!(!transfer.is_finished(), "it waits for a lane");
        torn.wire.up();
        transfer.join().expect("the whole body");
    });
    let peaks = [&torn.relay, &torn.sidecar].map(Sidelane::memory_peak);
    for (peak, before) in peaks.into_iter().zip(before) {
        println!("held back: {} KiB more", peak.saturating_sub(before) / 1024);
        assert!(peak - before < GROWTH_MAX, "{before} before, {peak} at most");
    }
    torn.lost_nothing();
    torn.is_one_session();
}
