//! Any bytes are read or refused by the envelope's decoder, never with a panic, and with the meaning
//! that prost gives them.
#![no_main]

#[path = "../../tunnel/src/tests/decode.rs"]
mod decode;

libfuzzer_sys::fuzz_target!(|message: &[u8]| decode::check(message));
