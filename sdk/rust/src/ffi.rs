//! The boundary: everything unsafe of this crate. Each object that the host lends is wrapped in a type
//! that owns it, drops it once, and can be used in safe code in no way that the ABI forbids.
//!
//! What every SAFETY comment below leans on, upheld by the host (`sidelane_abi`, "Rules"):
//! * **H1** an object moved to the plugin is valid, vtable included, until its `drop`;
//! * **H2** what a call borrows to the plugin is valid as long as the call's documentation says;
//! * **H3** moved objects may be used from any thread, by one at a time.
#![allow(unsafe_code, reason = "the plugin's side of the C ABI")]
#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a call through a vtable reads the pointer and calls: one act, one reason"
)]

pub(crate) mod body;
pub(crate) mod buf;
pub(crate) mod context;
pub(crate) mod exchange;
pub(crate) mod future;
pub(crate) mod header_list;
pub(crate) mod host;
pub(crate) mod io;
#[doc(hidden)]
pub mod plugin;
pub(crate) mod request;
pub(crate) mod responder;
pub(crate) mod service;
pub(crate) mod text;
pub(crate) mod timer;
pub(crate) mod waker;

/// The ABI itself, for [`export!`](crate::export) and for tests that play the host.
pub use sidelane_abi as abi;
