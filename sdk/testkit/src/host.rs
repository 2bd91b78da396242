//! The fake host: every object of the ABI, from memory. Functions here are called by plugins; that a
//! plugin keeps the ABI's rules is what is being tested, so each object remembers that it was dropped and
//! its memory is never freed.
#![allow(unsafe_code, reason = "the host's side of the C ABI")]
#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a call through a vtable reads the pointer and calls: one act, one reason"
)]

pub(crate) mod buf;
pub(crate) mod exchange;
pub(crate) mod future;
pub(crate) mod http;
pub(crate) mod io;
pub(crate) mod lent;
pub(crate) mod plugin;
pub(crate) mod service;
pub(crate) mod vtable;
pub(crate) mod waker;
pub(crate) mod world;
