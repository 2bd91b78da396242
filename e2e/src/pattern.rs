//! Bodies of any length that a reader can check byte by byte without having them: a byte that is lost,
//! doubled or moved shows at once.

use std::sync::OnceLock;

/// The period: a prime, so that no piece of a power of two, once missing, leaves the rest in place.
const PERIOD: usize = 1_000_003;
/// Largest piece that is lent at once.
const PIECE_BYTES_MAX: usize = 64 * 1024;

/// Bytes from an offset on.
#[derive(Debug, Default)]
pub struct Pattern {
    offset: u64,
}

impl Pattern {
    /// Returns the next bytes, `most` at most and as many as can be lent at once.
    pub fn next(&mut self, most: u64) -> &'static [u8] {
        let length = usize::try_from(most).unwrap_or(usize::MAX).min(PIECE_BYTES_MAX);
        let piece = &table()[self.at()..][..length];
        self.offset += length as u64;
        piece
    }

    /// Takes bytes that came; the error is the offset of the first that is not the next one.
    pub fn check(&mut self, bytes: &[u8]) -> Result<(), u64> {
        for piece in bytes.chunks(PIECE_BYTES_MAX) {
            let expected = &table()[self.at()..][..piece.len()];
            if piece != expected {
                let same = piece.iter().zip(expected).take_while(|(one, other)| one == other);
                return Err(self.offset + same.count() as u64);
            }
            self.offset += piece.len() as u64;
        }
        Ok(())
    }

    /// Returns how many bytes were given or taken.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    fn at(&self) -> usize {
        usize::try_from(self.offset % PERIOD as u64).expect("less than the period")
    }
}

/// A period, and its beginning once more.
fn table() -> &'static [u8] {
    static TABLE: OnceLock<Vec<u8>> = OnceLock::new();
    TABLE.get_or_init(|| {
        let mut state = 1_u64;
        let mut table: Vec<u8> = std::iter::repeat_with(|| {
            // xorshift64
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_be_bytes()[0]
        })
        .take(PERIOD)
        .collect();
        table.extend_from_within(..PIECE_BYTES_MAX);
        table
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_given_is_taken_and_nothing_else() {
        let mut given = Pattern::default();
        let mut all = Vec::new();
        while given.offset() < 3_000_000 {
            all.extend_from_slice(given.next(3_000_000 - given.offset()));
        }
        assert_eq!(all.len(), 3_000_000);
        let mut taken = Pattern::default();
        for piece in all.chunks(70_001) {
            taken.check(piece).unwrap();
        }
        assert_eq!(taken.offset(), 3_000_000);
        // A piece of 32 KiB is missing, comes twice, or a byte is another.
        for (kept, from) in [(1_000_000, 1_032_768), (1_000_000, 967_232)] {
            let mut taken = Pattern::default();
            taken.check(&all[..kept]).unwrap();
            let at = taken.check(&all[from..]).unwrap_err();
            assert!((kept as u64..kept as u64 + 32).contains(&at), "{at}");
        }
        all[77] ^= 1;
        assert_eq!(Pattern::default().check(&all), Err(77));
    }
}
