//! Any bytes are read as WebSocket frame headers or refused, never with a panic, and are written as
//! they were read.
#![no_main]

#[path = "../../plugins/websocket/src/frame/check.rs"]
mod check;
#[path = "../../plugins/websocket/src/frame.rs"]
#[allow(dead_code, reason = "the plugin uses the rest")]
mod frame;

use frame::{Checker, write};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| check::check(bytes));
