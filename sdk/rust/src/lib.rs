//! Write a Sidelane protocol plugin in ordinary async Rust.
//!
//! Implement [`Protocol`], name it in [`export!`], build a `cdylib`. The crate turns the C ABI
//! (`sidelane-abi`) into owned Rust types; a plugin needs no `unsafe` and brings no runtime: sockets,
//! timers and threads are the [`Host`]'s. `docs/plugin-guide.md` is the guide.
#![warn(missing_docs)]

mod dedicate;
mod error;
pub mod ffi;
mod headers;
#[cfg(feature = "hyper")]
mod hyper_rt;
mod join;
mod protocol;
mod shard;
#[cfg(feature = "tracing")]
mod trace;

pub use dedicate::Dedicated;
pub use error::{Closed, ConfigError, Error, Failure, Reset, ServiceError};
pub use ffi::body::{Body, Frame};
pub use ffi::buf::{Buf, BufBuilder};
pub use ffi::exchange::{Exchange, Message, Opener, RecvHalf, RouteKey, SendHalf};
pub use ffi::header_list::HeaderList;
pub use ffi::host::{BlockingPanicked, Counter, Gauge, Histogram, Host, Level, Spliced};
pub use ffi::io::ByteStream;
pub use ffi::request::{HeaderIter, Meta, Request, RequestHead};
pub use ffi::responder::{Responder, ResponseHead};
pub use ffi::service::{Connect, ConnectAlpn, Connected, HttpVersion, Service, ServiceSettings};
pub use ffi::timer::{Elapsed, Instant, Sleep, Timer};
pub use headers::Headers;
#[cfg(feature = "hyper")]
pub use hyper_rt::{HyperExecutor, HyperSleep, HyperTimer};
pub use protocol::{Born, Claim, Protocol, Sniff};
pub use shard::PerShard;
/// Why things fail: one numbering for plugins, tunnel, logs and `x-sidelane-error`.
pub use sidelane_abi::failure;
pub use sidelane_abi::{FIELD_CUSTOM, MESSAGE_BYTES_MAX, OPEN_BYTES_MAX};

/// Exports a [`Protocol`] as the plugin of this library: emits the stamp that the host reads from
/// the file before it loads it.
///
/// Stands once, in a `cdylib`: two libraries that export the stamp do not link into one. The name is
/// the package's unless given: `export!(Line, name = "line")`.
#[macro_export]
macro_rules! export {
    ($protocol:ty) => {
        $crate::export!($protocol, name = ::core::env!("CARGO_PKG_NAME"));
    };
    ($protocol:ty, name = $name:expr) => {
        /// What the host reads of this library before it loads it.
        #[unsafe(no_mangle)]
        #[allow(non_upper_case_globals, reason = "the ABI's symbol")]
        pub static sidelane_plugin_stamp: $crate::ffi::abi::Stamp =
            $crate::ffi::plugin::stamp::<$protocol>(
                $name,
                ::core::env!("CARGO_PKG_VERSION"),
                ::core::cfg!(panic = "unwind"),
            );
    };
}
