//! Buffers: the host's, counted per owner, and a plugin's.

use std::ptr;
use std::sync::Arc;

use bytes::Bytes;
use sidelane_abi as abi;

use super::lent::{drop_lent, lend, using};
use crate::ledger::Ledger;

struct HostBuf {
    bytes: Bytes,
    ledger: Arc<Ledger>,
}

static VT: abi::BufVt =
    abi::BufVt { size: size_of::<abi::BufVt>(), clone, drop: drop_lent::<HostBuf> };

/// Hands `bytes` to a plugin.
pub(crate) fn to_plugin(ledger: &Arc<Ledger>, bytes: Bytes) -> abi::Buf {
    let (ptr, len) = (bytes.as_ptr(), bytes.len());
    let data = lend(ledger, "buffer", HostBuf { bytes, ledger: ledger.clone() });
    abi::Buf { ptr, len, data, vt: &VT }
}

unsafe extern "C" fn clone(buf: *const abi::Buf) -> abi::Buf {
    // SAFETY: borrowed for the call.
    let buf = unsafe { &*buf };
    // SAFETY: of this vtable.
    let bytes =
        unsafe { using(buf.data, |own: &mut HostBuf| (own.bytes.clone(), own.ledger.clone())) };
    let Some((bytes, ledger)) = bytes else {
        return empty();
    };
    abi::Buf { ptr: buf.ptr, len: buf.len, ..to_plugin(&ledger, bytes) }
}

pub(crate) const fn empty() -> abi::Buf {
    abi::Buf { ptr: ptr::null(), len: 0, data: ptr::null_mut(), vt: ptr::null() }
}

/// Takes a buffer over from a plugin: copies and drops it.
///
/// # Safety
/// `buf` is moved to the caller.
pub(crate) unsafe fn from_plugin(buf: &abi::Buf) -> Bytes {
    // SAFETY: valid while it is owned.
    let bytes =
        Bytes::copy_from_slice(unsafe { borrowed(abi::Str { ptr: buf.ptr, len: buf.len }) });
    if !buf.vt.is_null() {
        // SAFETY: owned, dropped once.
        unsafe { ((*buf.vt).drop)(buf.data) };
    }
    bytes
}

/// # Safety
/// Valid for `'a`.
pub(crate) unsafe fn borrowed<'a>(text: abi::Str) -> &'a [u8] {
    if text.ptr.is_null() || text.len == 0 {
        return &[];
    }
    // SAFETY: by this function's contract.
    unsafe { std::slice::from_raw_parts(text.ptr, text.len) }
}

/// # Safety
/// Valid for the call.
pub(crate) unsafe fn text(text: abi::Str) -> String {
    // SAFETY: by this function's contract.
    String::from_utf8_lossy(unsafe { borrowed(text) }).into_owned()
}

/// # Safety
/// The fields are valid for the call.
pub(crate) unsafe fn headers(headers: *const abi::Header, len: usize) -> Vec<(Bytes, Bytes)> {
    (0..len)
        .map(|i| {
            // SAFETY: by this function's contract.
            let field = unsafe { *headers.add(i) };
            // SAFETY: as above.
            let (name, value) = unsafe { (borrowed(field.name), borrowed(field.value)) };
            (Bytes::copy_from_slice(name), Bytes::copy_from_slice(value))
        })
        .collect()
}

pub(crate) const fn lend_text(text: &[u8]) -> abi::Str {
    abi::Str { ptr: text.as_ptr(), len: text.len() }
}
