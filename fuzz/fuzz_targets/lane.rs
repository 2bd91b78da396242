//! Any bytes from a peer and any calls, the loss and the return of a connection among them, keep a lane's
//! promises and its bounds; the handshake takes or refuses any bytes.
#![no_main]

#[path = "../../tunnel/src/tests/operate.rs"]
mod operate;

libfuzzer_sys::fuzz_target!(|input: &[u8]| operate::check(input));
