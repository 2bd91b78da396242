//! What holds for any bytes as the frames of one direction. The fuzz target runs it too.

use super::{Checker, write};

/// Reads frame headers until the bytes end or are refused; payloads are taken as they come. The first
/// byte says whose frames they are.
pub(crate) fn check(bytes: &[u8]) {
    let Some((setup, bytes)) = bytes.split_first() else { return };
    let mut checker = Checker::new(setup & 1 != 0, setup & 2 != 0);
    let mut rest = bytes;
    while !rest.is_empty() {
        let read = checker.read(rest);
        // What is read of all of it is told of no less, or not yet.
        for cut in 0..rest.len().min(14) {
            match (checker.read(&rest[..cut]), read) {
                (Ok(None), _) => {}
                (early, whole) => assert_eq!(early, whole),
            }
        }
        let Ok(Some((header, len))) = read else { return };
        assert!(len <= 14 && len <= rest.len());
        assert_eq!(write(&header).as_slice(), &rest[..len], "a header is written as it was read");
        checker.passed(&header);
        rest = &rest[len..];
        let payload = usize::try_from(header.len).unwrap_or(usize::MAX).min(rest.len());
        rest = &rest[payload..];
    }
}
