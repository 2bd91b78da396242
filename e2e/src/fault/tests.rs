use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};

use super::*;
use crate::wait;

/// A wire, and both ends of a connection through it.
fn pair(shape: Shape) -> (Wire, TcpListener, TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let wire = Wire::shaped(listener.local_addr().unwrap(), shape);
    let (dialler, target) = connection(&wire, &listener);
    (wire, listener, dialler, target)
}

fn connection(wire: &Wire, listener: &TcpListener) -> (TcpStream, TcpStream) {
    let dialler = TcpStream::connect(wire.address()).unwrap();
    let (target, _) = listener.accept().unwrap();
    for side in [&dialler, &target] {
        side.set_read_timeout(Some(wait::DEADLINE)).unwrap();
    }
    (dialler, target)
}

fn passes(mut from: &TcpStream, mut to: &TcpStream, bytes: &[u8]) {
    from.write_all(bytes).unwrap();
    let mut seen = vec![0; bytes.len()];
    to.read_exact(&mut seen).unwrap();
    assert_eq!(seen, bytes);
}

fn ends_with(mut side: &TcpStream) -> Result<usize, ErrorKind> {
    side.read(&mut [0; 16]).map_err(|error| error.kind())
}

/// Nothing comes for as long as a wire without delay would never take.
fn is_silent(mut side: &TcpStream) {
    side.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert_eq!(side.read(&mut [0; 16]).unwrap_err().kind(), ErrorKind::WouldBlock);
    side.set_read_timeout(Some(wait::DEADLINE)).unwrap();
}

#[test]
fn bytes_pass_both_ways_and_an_end_is_passed_on() {
    let (wire, _listener, dialler, target) = pair(Shape::default());
    passes(&dialler, &target, b"to the relay");
    passes(&target, &dialler, &[7; 100_000]);
    dialler.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(ends_with(&target), Ok(0));
    passes(&target, &dialler, b"still");
    drop(target);
    assert_eq!(ends_with(&dialler), Ok(0));
    wait::until("the end", || wire.well().is_empty().then_some(()));
    let [carried] = wire.carried()[..] else { panic!("one connection") };
    assert_eq!((carried.well, carried.up, carried.down), (false, 12, 100_005));
}

#[test]
fn cut_is_an_end_and_a_reset_is_one() {
    let (wire, listener, dialler, target) = pair(Shape::default());
    passes(&dialler, &target, b"x");
    assert_eq!(wire.harm(Fault::Cut), 1);
    assert_eq!((ends_with(&dialler), ends_with(&target)), (Ok(0), Ok(0)));
    let (dialler, target) = connection(&wire, &listener);
    passes(&dialler, &target, b"x");
    assert!(wire.harm_one(1, Fault::Reset));
    let reset = Err(ErrorKind::ConnectionReset);
    assert_eq!((ends_with(&dialler), ends_with(&target)), (reset, reset));
    assert_eq!(wire.made(), 2);
}

#[test]
fn stalled_connection_is_open_and_goes_on_when_it_is_healed() {
    let (wire, listener, mut dialler, target) = pair(Shape::default());
    passes(&dialler, &target, b"x");
    wire.harm(Fault::Stall);
    dialler.write_all(b"later").unwrap();
    is_silent(&target);
    // New ones pass.
    let (other, other_target) = connection(&wire, &listener);
    passes(&other, &other_target, b"x");
    wire.heal();
    let mut seen = [0; 5];
    (&target).read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"later");
    assert_eq!(wire.well(), [0, 1]);
}

#[test]
fn frozen_wire_takes_connections_on_which_nothing_moves() {
    let (wire, listener, dialler, target) = pair(Shape::default());
    passes(&dialler, &target, b"x");
    wire.freeze();
    let (mut other, other_target) = connection(&wire, &listener);
    other.write_all(b"y").unwrap();
    is_silent(&other_target);
    wire.heal();
    assert_eq!(ends_with(&other_target), Ok(1));
    passes(&dialler, &target, b"x");
}

#[test]
fn deaf_end_hears_nothing_and_is_heard() {
    let (wire, _listener, dialler, target) = pair(Shape::default());
    passes(&target, &dialler, b"x");
    wire.harm(Fault::Deaf(End::Dialler));
    (&target).write_all(b"unheard").unwrap();
    passes(&dialler, &target, b"heard");
    is_silent(&dialler);
}

#[test]
fn half_open_connection_is_reset_at_one_end_and_silent_at_the_other() {
    for end in [End::Dialler, End::Target] {
        let (wire, _listener, dialler, target) = pair(Shape::default());
        passes(&dialler, &target, b"x");
        wire.harm(Fault::HalfOpen(end));
        let (gone, stays) = if end == End::Dialler { (dialler, target) } else { (target, dialler) };
        assert_eq!(ends_with(&gone), Err(ErrorKind::ConnectionReset));
        (&stays).write_all(b"x").unwrap();
        is_silent(&stays);
    }
}

#[test]
fn wire_that_is_down_refuses_and_keeps_its_port() {
    let (wire, listener, dialler, target) = pair(Shape::default());
    wire.down();
    assert_eq!((ends_with(&dialler), ends_with(&target)), (Ok(0), Ok(0)));
    let address = wire.address();
    wait::until("a refusal", || {
        let error = TcpStream::connect(address).err()?;
        (error.kind() == ErrorKind::ConnectionRefused).then_some(())
    });
    TcpListener::bind(address).expect_err("the port is taken");
    wire.up();
    let stream = wait::until("a connection", || TcpStream::connect(address).ok());
    let (target, _) = listener.accept().unwrap();
    passes(&stream, &target, b"x");
}

#[test]
fn connections_lead_where_they_are_told_in_turn() {
    let (wire, first, ..) = pair(Shape::default());
    let second = TcpListener::bind("127.0.0.1:0").unwrap();
    let targets = [&first, &second].map(|listener| listener.local_addr().unwrap());
    wire.lead_to(&targets);
    // The first of all went to the first.
    connection(&wire, &second);
    connection(&wire, &first);
    wire.lead_to(&targets[1..]);
    connection(&wire, &second);
}

#[test]
fn delay_is_kept_and_order_under_loss() {
    let delay = Duration::from_millis(20);
    let (wire, _listener, mut dialler, mut target) = pair(Shape { delay, loss: 0.05, seed: 1 });
    let sent: Vec<_> = (0..600_000_u32).map(|number| number.to_le_bytes()[0]).collect();
    let begun = Instant::now();
    dialler.write_all(b"x").unwrap();
    target.read_exact(&mut [0]).unwrap();
    assert!(begun.elapsed() >= delay, "{:?}", begun.elapsed());
    let writer = std::thread::spawn({
        let sent = sent.clone();
        move || dialler.write_all(&sent).map(|()| dialler)
    });
    let mut seen = vec![0; sent.len()];
    target.read_exact(&mut seen).unwrap();
    assert!(seen == sent);
    drop(writer.join().unwrap().unwrap());
    drop(wire);
}

#[test]
fn storm_harms_again_and_again_until_it_is_over() {
    let (wire, listener, ..) = pair(Shape::default());
    let storm = wire.every(Duration::from_millis(5), &[Fault::Cut, Fault::Reset]);
    for _ in 0..4 {
        let (dialler, _target) = connection(&wire, &listener);
        // Either is an end.
        assert_ne!(ends_with(&dialler), Ok(1));
    }
    assert!(storm.end() >= 4);
    let (dialler, target) = connection(&wire, &listener);
    passes(&dialler, &target, b"calm");
}
