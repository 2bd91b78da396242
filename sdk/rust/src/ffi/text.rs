//! Borrowed bytes across the boundary.

use sidelane_abi as abi;

/// Lends `bytes`.
pub(crate) const fn lend(bytes: &[u8]) -> abi::Str {
    abi::Str { ptr: bytes.as_ptr(), len: bytes.len() }
}

/// Reads what was lent.
///
/// # Safety
/// `text` is valid for `'a` (H2).
pub(crate) unsafe fn bytes<'a>(text: abi::Str) -> &'a [u8] {
    if text.ptr.is_null() || text.len == 0 {
        return &[];
    }
    // SAFETY: not null, and valid for `'a` by this function's contract.
    unsafe { std::slice::from_raw_parts(text.ptr, text.len) }
}

/// Reads text that was lent; empty where it is not UTF-8, which the host rules out.
///
/// # Safety
/// As [`bytes`].
pub(crate) unsafe fn text<'a>(text: abi::Str) -> &'a str {
    // SAFETY: this function's contract is the same.
    std::str::from_utf8(unsafe { bytes(text) }).unwrap_or("")
}
