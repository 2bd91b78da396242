use proptest::prelude::*;

use super::*;

const KEY: [u8; 4] = [1, 2, 3, 4];

fn client() -> Checker {
    Checker::new(true, false)
}

#[test]
fn what_a_proxy_must_not_pass_is_told_by_its_first_bytes() {
    let continued = || {
        let mut checker = client();
        checker.passed(&Header { fin: false, reserved: 0, opcode: 1, key: None, len: 0 });
        checker
    };
    let server = Checker::new(false, false);
    let cases: [(Checker, &[u8], Violation); 19] = [
        (client(), &[0x89, 0x80 | 126], Violation::ControlTooLong),
        (client(), &[0x88, 0x80 | 127], Violation::ControlTooLong),
        (client(), &[0x09], Violation::ControlFragmented),
        (client(), &[0x08], Violation::ControlFragmented),
        (client(), &[0x0a], Violation::ControlFragmented),
        (client(), &[0x81, 0x05], Violation::Unmasked),
        (client(), &[0x89, 0x00], Violation::Unmasked),
        (server, &[0x81, 0x85], Violation::Masked),
        (client(), &[0x83], Violation::Opcode),
        (client(), &[0x87], Violation::Opcode),
        (client(), &[0x8b], Violation::Opcode),
        (client(), &[0x8f], Violation::Opcode),
        (client(), &[0xc1], Violation::Reserved),
        (client(), &[0xa1], Violation::Reserved),
        (client(), &[0x91], Violation::Reserved),
        (client(), &[0x82, 0xff, 0x80], Violation::LengthTooLarge),
        (client(), &[0x82, 0xfe, 0, 125], Violation::LengthNotMinimal),
        (client(), &[0x80], Violation::NothingToContinue),
        (continued(), &[0x81], Violation::InsideMessage),
    ];
    for (checker, bytes, expected) in cases {
        assert_eq!(checker.read(bytes), Err(expected), "{bytes:02x?}");
    }
    let long = [0x82, 0xff, 0, 0, 0, 0, 0, 0, 0xff, 0xff];
    assert_eq!(client().read(&long), Err(Violation::LengthNotMinimal));
}

#[test]
fn what_is_allowed_passes() {
    let mut checker = Checker::new(true, true);
    for bytes in [
        &[0xc1, 0x80, 1, 2, 3, 4][..],
        &[0x01, 0x80, 1, 2, 3, 4],
        &[0x89, 0xfd, 1, 2, 3, 4],
        &[0x00, 0xfe, 0, 126, 1, 2, 3, 4],
        &[0x88, 0x82, 1, 2, 3, 4],
        &[0x80, 0xff, 0, 0, 0, 0, 0, 1, 0, 0, 1, 2, 3, 4],
        &[0x82, 0xff, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 2, 3, 4],
    ] {
        let (header, len) = checker.read(bytes).unwrap().unwrap();
        assert_eq!((len, header.key), (bytes.len(), Some(KEY)));
        assert_eq!(write(&header).as_slice(), bytes);
        checker.passed(&header);
    }
}

#[test]
fn masking_twice_is_nothing() {
    let mut payload = *b"hello";
    mask(&mut payload, KEY);
    assert_ne!(payload, *b"hello");
    mask(&mut payload, KEY);
    assert_eq!(payload, *b"hello");
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
        check::check(&bytes);
    }

    #[test]
    fn headers_come_back(
        fin in any::<bool>(),
        reserved in 0..8u8,
        opcode in prop::sample::select(vec![1u8, 2]),
        key in any::<Option<[u8; 4]>>(),
        len in prop_oneof![0..130u64, 0xfff0..0x1_0010u64, 0..(1u64 << 63)],
    ) {
        let header = Header { fin, reserved, opcode, key, len };
        let written = write(&header);
        let checker = Checker::new(key.is_some(), true);
        prop_assert_eq!(
            checker.read(written.as_slice()), Ok(Some((header, written.as_slice().len()))));
        for cut in 0..written.as_slice().len() {
            prop_assert_eq!(checker.read(&written.as_slice()[..cut]), Ok(None));
        }
    }
}

/// Also what the fuzz target is fed with.
#[test]
fn the_corpus_is_read_or_refused() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/frame_header");
    let mut found = 0;
    for entry in std::fs::read_dir(corpus).expect("the corpus is there") {
        check::check(&std::fs::read(entry.unwrap().path()).unwrap());
        found += 1;
    }
    assert!(found >= 8, "no corpus found");
}
