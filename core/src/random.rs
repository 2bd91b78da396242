//! Random numbers from the system: ids, secrets, jitter.

use rustix::rand::{GetRandomFlags, getrandom};

/// Returns `N` unpredictable bytes.
///
/// # Panics
/// Where the system has no random numbers at all: nothing that needs a secret may go on then.
#[must_use]
pub fn bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        filled += getrandom(&mut bytes[filled..], GetRandomFlags::empty())
            .expect("getrandom(2) works on every Linux this program runs on");
    }
    bytes
}

/// Returns an unpredictable number.
#[must_use]
pub fn number() -> u64 {
    u64::from_le_bytes(bytes())
}
