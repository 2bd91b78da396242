//! The splitter by itself.

use std::path::PathBuf;

use proptest::prelude::*;
use sidelane_grpc::splitter::{Incoming, Outgoing, SplitError};
use sidelane_plugin::Buf;

use crate::message;
use crate::split::{check, split};

const UNBOUNDED: u32 = u32::MAX;

fn sizes() -> impl Strategy<Value = Vec<usize>> {
    let size = prop_oneof![8 => 0usize..200, 2 => 0usize..5_000, 1 => 30_000usize..70_000];
    proptest::collection::vec(size, 0..12)
}

proptest! {
    #[test]
    fn any_messages_in_any_frames_arrive(sizes in sizes(), cuts in proptest::collection::vec(1usize..20_000, 1..8)) {
        let all: Vec<u8> = sizes.iter().enumerate().flat_map(|(i, size)| message(i, *size)).collect();
        let (mut rest, mut frames, mut next) = (&all[..], Vec::new(), cuts.iter().cycle());
        while !rest.is_empty() {
            let (frame, after) = rest.split_at(rest.len().min(*next.next().unwrap()));
            frames.push(frame);
            rest = after;
        }
        prop_assert_eq!(split(&frames, UNBOUNDED), Ok(u32::try_from(sizes.len()).unwrap()));
    }

    #[test]
    fn any_bytes_are_split_or_refused(input in proptest::collection::vec(any::<u8>(), 0..2_000)) {
        check(&input);
    }
}

#[test]
fn the_corpus_is_split_or_refused() {
    let corpus = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/grpc_split");
    if std::env::var_os("SIDELANE_BLESS").is_some() {
        for (name, bytes) in seeds() {
            std::fs::write(corpus.join(name), bytes).expect("the corpus is writable");
        }
    }
    let mut replayed = 0;
    for entry in std::fs::read_dir(&corpus).expect("the corpus is checked in") {
        let path = entry.expect("the corpus is readable").path();
        check(&std::fs::read(&path).expect("the corpus is readable"));
        replayed += 1;
    }
    assert!(replayed >= seeds().len(), "only {replayed} in {}", corpus.display());
}

fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let with = |how: u8, bytes: Vec<u8>| [vec![how], bytes].concat();
    vec![
        ("empty", with(0, Vec::new())),
        ("empty-messages", with(0xfe, [message(0, 0), message(1, 0)].concat())),
        ("byte-by-byte", with(0, [message(0, 9), message(1, 300)].concat())),
        ("batch", with(0xfe, (0..20).flat_map(|i| message(i, 17)).collect())),
        ("too-large", with(1, message(0, 1_001))),
        ("prefix-truncated", with(2, vec![0, 0, 0])),
        ("body-truncated", with(2, message(0, 20)[..15].to_vec())),
        ("length-huge", with(0xfe, vec![1, 0xff, 0xff, 0xff, 0xff, 7])),
    ]
}

/// What chunks a body makes: bytes, messages, and whether the message goes on.
fn chunks(bytes: &[u8], ending: bool) -> Vec<(usize, u32, bool)> {
    let mut outgoing = Outgoing::new(UNBOUNDED);
    let mut bytes = Buf::copy_from_slice(bytes);
    std::iter::from_fn(|| outgoing.next(&mut bytes, ending).unwrap())
        .map(|piece| (piece.body.len(), piece.messages, piece.partial))
        .collect()
}

#[test]
fn a_unary_request_is_one_chunk() {
    assert_eq!(chunks(&message(0, 100), true), [(105, 1, false)]);
    assert_eq!(chunks(&message(0, 0), true), [(5, 1, false)]);
    assert_eq!(chunks(b"", true), [(0, 0, false)]);
}

#[test]
fn small_messages_that_are_there_share_a_batch() {
    let all: Vec<u8> = (0..10).flat_map(|i| message(i, 20)).collect();
    assert_eq!(chunks(&all, false), [(25, 1, false), (225, 9, false)]);
    assert_eq!(chunks(&all, true), [(25, 1, false), (225, 9, false), (0, 0, false)]);
}

#[test]
fn large_messages_come_in_pieces() {
    let kib = 1024;
    assert_eq!(
        chunks(&message(0, 70 * kib), true),
        [(32 * kib, 0, true), (32 * kib, 0, true), (6 * kib + 5, 1, false)]
    );
}

#[test]
fn a_bounded_message_is_refused_before_it_is_sent() {
    let mut outgoing = Outgoing::new(99);
    let mut bytes = Buf::copy_from_slice(&[message(0, 99), message(1, 100)].concat());
    assert_eq!(outgoing.next(&mut bytes, false).unwrap().unwrap().messages, 1);
    assert_eq!(outgoing.next(&mut bytes, false), Err(SplitError::TooLarge));
}

#[test]
fn chunks_out_of_order_are_refused() {
    let one = message(0, 10);
    let two = [message(0, 10), message(1, 10)].concat();
    let begun = || {
        let mut incoming = Incoming::new(UNBOUNDED);
        assert_eq!(incoming.chunk(&one, 0, true, false, false), Ok(1));
        incoming
    };
    let order = Err(SplitError::Order);
    // The first chunk is the first, and no other is.
    assert_eq!(Incoming::new(UNBOUNDED).chunk(&one, 0, false, false, false), order);
    assert_eq!(Incoming::new(UNBOUNDED).chunk(&one, 1, true, false, false), order);
    assert_eq!(begun().chunk(&one, 1, true, false, false), order);
    // Numbers that were or will be.
    assert_eq!(begun().chunk(&one, 0, false, false, false), order);
    assert_eq!(begun().chunk(&one, 2, false, false, false), order);
    assert_eq!(begun().batch(&two, 2, 2), order);
    // Not what it says it is.
    assert_eq!(begun().chunk(&one, 1, false, false, true), order);
    assert_eq!(begun().chunk(&one[..9], 1, false, false, false), order);
    assert_eq!(begun().chunk(&one[..9], 1, false, true, true), order);
    assert_eq!(begun().chunk(&two, 1, false, false, false), order);
    assert_eq!(begun().chunk(b"", 1, false, false, true), order);
    assert_eq!(begun().batch(&two, 1, 1), order);
    assert_eq!(begun().batch(&two, 1, 3), order);
    assert_eq!(begun().batch(&two[..29], 1, 2), order);
    assert_eq!(begun().batch(b"", 1, 0), order);
    assert_eq!(Incoming::new(UNBOUNDED).batch(&two, 0, 2), order);
    // Between the pieces of a message nothing else.
    let mut incoming = begun();
    assert_eq!(incoming.chunk(&one[..9], 1, false, false, true), Ok(0));
    assert_eq!(incoming.batch(&two, 2, 2), order);
    assert_eq!(incoming.chunk(b"", 2, false, true, false), order);
}

#[test]
fn numbers_go_round() {
    let mut outgoing = Outgoing::new(UNBOUNDED);
    let mut bytes = Buf::copy_from_slice(&message(0, 3));
    assert_eq!(outgoing.next(&mut bytes, false).unwrap().unwrap().sequence, 0);
    let mut bytes = Buf::copy_from_slice(&[message(0, 3), message(1, 3)].concat());
    assert_eq!(outgoing.next(&mut bytes, false).unwrap().unwrap().sequence, 1);
    let mut bytes = Buf::copy_from_slice(&message(0, 3));
    assert_eq!(outgoing.next(&mut bytes, true).unwrap().unwrap().sequence, 3);
}
