//! Streams of numbered messages over a wire that is harmed again and again: each number comes once, in
//! order, and none is missing.

use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use sidelane_e2e::fault::{End, Fault};
use sidelane_e2e::process::Setup;
use sidelane_e2e::service::Service;
use sidelane_e2e::wait;
use sidelane_e2e::websocket::{BINARY, Frame, MASK, Socket};

use super::{LANES, Torn};
use crate::grpc::Peers;

/// Messages in flight.
const IN_FLIGHT: u64 = 64;
/// Between two cuts.
const PERIOD: Duration = Duration::from_millis(200);
/// Connections that are cut before the slower faults come.
const CUTS: u64 = 20;
/// Messages that pass between two of the slower faults.
const MESSAGES_BETWEEN: f64 = 200.0;
/// How soon messages must pass again where bytes have stopped and nothing says so: a second of
/// suspicion and a dial. Half of what pings would take.
const NOTICED_WITHIN: Duration = Duration::from_secs(5);

/// What no socket reports, or one end's alone.
const SILENT: [Fault; 5] = [
    Fault::Stall,
    Fault::HalfOpen(End::Dialler),
    Fault::HalfOpen(End::Target),
    Fault::Deaf(End::Dialler),
    Fault::Deaf(End::Target),
];

/// Harms both lanes in every way while messages flow.
fn harm_in_every_way(torn: &Torn) {
    let storm = torn.wire.every(PERIOD, &[Fault::Cut, Fault::Reset]);
    wait::until("cuts", || (storm.harmed() >= CUTS).then_some(()));
    drop(storm);
    for fault in SILENT {
        torn.until_lanes(LANES);
        wait::until("lanes that are well", || (torn.wire.well().len() == LANES).then_some(()));
        go_on(torn, MESSAGES_BETWEEN, wait::DEADLINE);
        let begun = Instant::now();
        assert_eq!(torn.wire.harm(fault), LANES, "{fault:?}");
        // What was on its way beyond the wire may still come: more than that.
        go_on(torn, 2.0 * IN_FLIGHT as f64 + MESSAGES_BETWEEN, NOTICED_WITHIN);
        println!("{fault:?}: messages pass again after {:.2?}", begun.elapsed());
    }
    torn.until_lanes(LANES);
}

/// Waits until so many more messages have come from the sidecar.
fn go_on(torn: &Torn, count: f64, deadline: Duration) {
    let received = || {
        let labels = ["direction=\"received\""];
        torn.relay.metric("sidelane_messages_total", &labels).unwrap_or(0.0)
    };
    let before = received();
    wait::within(deadline, "messages", || (received() >= before + count).then_some(()));
}

/// A message that no other is equal to, of 8 to 40,007 bytes: some beyond what a message of the tunnel
/// holds.
fn numbered(number: u64) -> Vec<u8> {
    let mut message = number.to_be_bytes().to_vec();
    let length = if number.is_multiple_of(50) { 40_000 } else { number * 37 % 2000 };
    message.resize(8 + usize::try_from(length).expect("small"), 0);
    message
}

#[test]
fn websocket_sees_every_number_once_in_order() {
    let service = Service::start(|connection| {
        connection.accept("")?;
        connection.stop_recording();
        connection.echo()
    });
    let torn = Torn::of(&Setup::of(service.address()).websocket("{}"));
    let mut socket = Socket::open(torn.relay.web());
    let mut writer = socket.client.writer();
    let (received, ended) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let sender = std::thread::spawn({
        let (received, ended) = (Arc::clone(&received), Arc::clone(&ended));
        move || {
            let mut sent = 0;
            while !ended.load(Ordering::SeqCst) {
                if sent - received.load(Ordering::SeqCst) >= IN_FLIGHT {
                    std::thread::park_timeout(Duration::from_millis(1));
                    continue;
                }
                let frame = Frame::new(BINARY, numbered(sent)).masked(MASK);
                writer.write_all(&frame.bytes()).expect("the relay reads");
                sent += 1;
            }
            let close = Frame::close(1000, "").masked(MASK);
            writer.write_all(&close.bytes()).expect("the relay reads");
            sent
        }
    });
    let reader = std::thread::spawn(move || {
        let mut next = 0;
        loop {
            let frame = socket.try_frame().unwrap_or_else(|error| panic!("{error} after {next}"));
            if let Some((code, _)) = frame.close_code() {
                assert_eq!(code, 1000, "after {next}");
                return next;
            }
            assert!(frame.payload == numbered(next), "{next} is another");
            next += 1;
            received.store(next, Ordering::SeqCst);
        }
    });
    harm_in_every_way(&torn);
    ended.store(true, Ordering::SeqCst);
    let (sent, received) = (sender.join().expect("sent"), reader.join().expect("received"));
    println!("websocket: {received} messages, {} lanes resumed", torn.resumed());
    assert_eq!(sent, received);
    torn.lost_nothing();
    torn.is_one_session();
}

/// Runs the case `numbers` of a client against its own library's service.
fn grpc_sees_every_number_once_in_order(name: &str) {
    let Some(peers) = Peers::find("numbers by gRPC") else { return };
    let (_service, address) = peers.service(name);
    let torn = Torn::of(&Setup::of(address).grpc("{}"));
    let mut client = peers.client(name, "numbers", torn.relay.web());
    assert_eq!(client.line()["begun"], true);
    harm_in_every_way(&torn);
    client.type_line("enough");
    let seen = client.finish();
    println!("{name}: {} messages, {} lanes resumed", seen["received"], torn.resumed());
    assert_eq!(seen["code"], 0, "{seen}");
    assert!(seen["wrong"].as_array().is_some_and(Vec::is_empty), "{seen}");
    assert_eq!(seen["sent"], seen["received"], "{seen}");
    torn.lost_nothing();
    torn.is_one_session();
}

#[test]
fn grpcio_sees_every_number_once_in_order() {
    grpc_sees_every_number_once_in_order("grpcio");
}

#[test]
fn tonic_sees_every_number_once_in_order() {
    grpc_sees_every_number_once_in_order("tonic");
}
