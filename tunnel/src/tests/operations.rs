//! Any calls of a lane, from random bytes and from the corpus of the fuzz target.

use std::path::PathBuf;

use bytes::Bytes;
use proptest::prelude::*;

use super::operate::check;
use crate::{Acceptor, Dialler, FEATURE_RESUME, MESSAGE_BYTES_MIN, proto};

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn any_calls_keep_a_lanes_promises(calls in prop::collection::vec(any::<u8>(), 0..1500)) {
        check(&calls);
    }

    #[test]
    fn any_likely_calls_keep_a_lanes_promises(
        setup in any::<u8>(),
        calls in prop::collection::vec((0..20_u8, any::<[u8; 3]>()), 0..300),
    ) {
        let mut input = vec![setup];
        for (call, numbers) in calls {
            input.push(call);
            // Bytes as they are end a lane nearly always.
            input.extend(if call == 0 { [0; 3] } else { numbers });
        }
        check(&input);
    }
}

/// Replays what the fuzz target has found worth keeping. `SIDELANE_BLESS=1` writes the seeds anew.
#[test]
fn the_corpus_keeps_a_lanes_promises() {
    let corpus = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/lane");
    if std::env::var_os("SIDELANE_BLESS").is_some() {
        std::fs::create_dir_all(&corpus).expect("the corpus is writable");
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
    let resume = proto::Resume {
        session: Bytes::from_static(&[1; 16]),
        secret: Bytes::from_static(&[2; 32]),
        lane: 1,
        attempt: 2,
        received: 3,
        relay_instance: Bytes::new(),
    };
    let hello = proto::Hello {
        instance: Bytes::from_static(&[1; 16]),
        features: FEATURE_RESUME,
        window: 1 << 16,
        message_bytes_max: MESSAGE_BYTES_MIN,
        ..proto::Hello::default()
    };
    let resumed = proto::Resumed { received: 7, attempt: 2 };
    let greeting = |bytes: Bytes| {
        let mut out = vec![0, 18, u8::try_from(bytes.len()).expect("short")];
        out.extend_from_slice(&bytes);
        out
    };
    // Opens, sends 12 bytes, transmits.
    let sent = [6, 1, 7, 3, 4, 1, 0, 2, 255];
    let cut = [3, 4, 1, 2, 255];
    let calls = |setup: u8, parts: &[&[u8]]| [&[setup], parts.concat().as_slice()].concat();
    vec![
        ("empty", Vec::new()),
        ("resume", greeting(Dialler::new().resume(&resume).expect("fit"))),
        ("hello", greeting(Dialler::new().hello(&hello).expect("fit"))),
        ("resumed", greeting(Acceptor::new().encode_resumed(&resumed))),
        ("cut-and-replay", calls(0, &[&sent, &sent, &cut, &cut, &sent])),
        ("gap", calls(2, &[&sent, &[3, 4, 255, 4, 0, 4, 254]])),
        // An open of the peer, data, an answer, detached with a window and an end queued.
        (
            "peer-opens",
            calls(
                1,
                &[
                    &[1, 1, 200, 0, 31, 0, 1],
                    &[1, 1, 200, 0, 31, 0, 0],
                    &[8, 0, 3, 8, 0, 13, 0, 10, 0, 1, 4, 1, 2, 255],
                ],
            ),
        ),
        ("no-ring", calls(4, &[&sent, &cut])),
        ("full-ring", calls(0, &[&[6, 1], &[7, 200, 200, 1, 0, 2, 255].repeat(8), &cut])),
        ("acknowledged", calls(0, &[&sent, &[1, 0, 0, 1, 37, 1, 0], &cut])),
        ("silence", calls(0, &[&sent, &[5, 1, 5, 30, 5, 100, 5, 255, 5, 255]])),
        ("away-and-close", calls(1, &[&[17, 16, 9, 2, 255, 3, 19, 0, 4, 1]])),
    ]
}
