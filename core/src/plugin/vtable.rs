//! ABI objects made from what core lends (`lend`), and plugin objects made usable for core.
//!
//! Each child turns one family of objects. The rule for all of them: memory is freed by the side
//! that made it, through its vtable; what a plugin passes is checked where that is cheap, and a
//! fault ends the exchange with a log line that names the plugin, never the process.

pub(super) mod buf;
pub(super) mod call;
pub(super) mod exchange;
pub(super) mod future;
pub(super) mod http;
pub(super) mod instance;
pub(super) mod io;
pub(super) mod service;
pub(super) mod waker;

use std::panic::{AssertUnwindSafe, catch_unwind};

use sidelane_abi as abi;

use super::host;
use super::lend;

/// What a plugin passed cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Invalid {
    #[error("a pointer is null where bytes are announced")]
    NullPointer,
    #[error("a vtable is null or smaller than this ABI's")]
    Vtable,
    #[error("a buffer of the host's came back with other bounds than it left with")]
    Bounds,
    #[error("text is not UTF-8")]
    Text,
    #[error("a header's name is not allowed in HTTP")]
    HeaderName,
    #[error("a header's value is not allowed in HTTP")]
    HeaderValue,
    #[error("more than {HEADERS_MAX} headers")]
    HeadersMany,
    #[error("a status is not allowed here")]
    Status,
    #[error("a message's payload field is not between 9 and 31")]
    Field,
    #[error("a message is larger than the ABI allows")]
    MessageLarge,
    #[error("application protocols are too many, or one has not 1 to 255 bytes")]
    Protocols,
}

/// Most header fields that a plugin may pass at once. Bounds what a wrong count makes us read and
/// allocate; the front takes 128 and a plugin adds a handful.
const HEADERS_MAX: usize = 1024;

/// Logs what the plugin, whose code is running on this thread, did wrong.
fn report(call: &'static str, invalid: Invalid) {
    let plugin = host::current_plugin();
    tracing::warn!(plugin, call, error = %invalid, "a plugin passed what cannot be used");
}

/// Runs core's code below a plugin's call. A panic in it must not cross: it would abort.
fn guard<T>(call: &'static str, fallback: T, run: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| {
        let plugin = host::current_plugin();
        tracing::error!(plugin, call, "core panicked below a plugin's call");
        fallback
    })
}

/// Returns text or bytes as the ABI borrows them.
fn str_of(bytes: &[u8]) -> abi::Str {
    abi::Str { ptr: bytes.as_ptr(), len: bytes.len() }
}

/// Returns the bytes that a plugin lends.
///
/// # Safety
/// `text` is valid for `'a`, as the ABI says of the field or argument it comes from.
unsafe fn bytes_of<'a>(text: abi::Str) -> Result<&'a [u8], Invalid> {
    match (text.len, text.ptr.is_null()) {
        (0, _) => Ok(&[]),
        (_, true) => Err(Invalid::NullPointer),
        // SAFETY: not null, and valid for `len` bytes and for `'a` by this function's contract.
        (len, false) => Ok(unsafe { std::slice::from_raw_parts(text.ptr, len) }),
    }
}

/// As [`bytes_of`], for text.
///
/// # Safety
/// As [`bytes_of`].
unsafe fn text_of<'a>(text: abi::Str) -> Result<&'a str, Invalid> {
    // SAFETY: by this function's contract.
    let bytes = unsafe { bytes_of(text) }?;
    std::str::from_utf8(bytes).map_err(|_| Invalid::Text)
}

fn reset_to_abi(reset: lend::Reset) -> abi::Reset {
    let protocol_code = reset.protocol_code.unwrap_or(abi::NO_PROTOCOL_CODE);
    abi::Reset { code: reset.code, protocol_code }
}

fn reset_from_abi(reset: abi::Reset) -> lend::Reset {
    let protocol_code =
        (reset.protocol_code != abi::NO_PROTOCOL_CODE).then_some(reset.protocol_code);
    lend::Reset { code: reset.code, protocol_code }
}

/// Counts the objects lent on this thread, wherever they are dropped, so that tests can tell that
/// none is left.
struct Counted {
    #[cfg(test)]
    count: std::sync::Arc<std::sync::atomic::AtomicIsize>,
}

#[cfg(test)]
std::thread_local! {
    static LENT: std::sync::Arc<std::sync::atomic::AtomicIsize> = std::sync::Arc::default();
}

/// Returns how many objects that this thread has lent are not dropped.
#[cfg(test)]
pub(super) fn lent_objects() -> isize {
    LENT.with(|count| count.load(std::sync::atomic::Ordering::SeqCst))
}

impl Counted {
    #[inline]
    fn new() -> Self {
        Self {
            #[cfg(test)]
            count: LENT.with(|count| {
                count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                std::sync::Arc::clone(count)
            }),
        }
    }
}

#[cfg(test)]
impl Drop for Counted {
    fn drop(&mut self) {
        self.count.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
    }
}
