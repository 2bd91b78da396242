//! `Bytes` and [`abi::Buf`], without copying where that pays.

use std::ffi::c_void;

use bytes::Bytes;
use sidelane_abi as abi;

use super::{Counted, Invalid, guard};

/// Below this a plugin's buffer is copied and freed at once: that costs less than keeping an owner.
const COPY_BYTES_MAX: usize = 4 * 1024;

/// Told beside the vtable's address, so that a coincidence of addresses is found out.
const TAG: u64 = u64::from_be_bytes(*b"hostbuf\0");

/// What `data` of a buffer made here leads to.
struct HostBuf {
    tag: u64,
    bytes: Bytes,
    _counted: Counted,
}

static BUF_VT: abi::BufVt =
    abi::BufVt { size: size_of::<abi::BufVt>(), clone: host_clone, drop: host_drop };

/// A buffer that owns nothing.
pub(in crate::plugin) const EMPTY: abi::Buf =
    abi::Buf { ptr: std::ptr::null(), len: 0, data: std::ptr::null_mut(), vt: std::ptr::null() };

/// Returns the buffer to give a plugin for `bytes`.
pub(in crate::plugin) fn lend(bytes: Bytes) -> abi::Buf {
    if bytes.is_empty() {
        return EMPTY;
    }
    let (ptr, len) = (bytes.as_ptr(), bytes.len());
    let data = Box::into_raw(Box::new(HostBuf { tag: TAG, bytes, _counted: Counted::new() }));
    abi::Buf { ptr, len, data: data.cast(), vt: &raw const BUF_VT }
}

/// Takes the buffer from a plugin, leaving [`EMPTY`]. It is consumed on failure too.
///
/// # Safety
/// `buf` is a buffer that the plugin moves here (plugin ABI, "Ownership").
pub(in crate::plugin) unsafe fn take(buf: &mut abi::Buf) -> Result<Bytes, Invalid> {
    let buf = std::mem::replace(buf, EMPTY);
    if buf.vt.is_null() {
        // SAFETY: the buffer was moved here.
        return unsafe { static_bytes(&buf) };
    }
    if std::ptr::eq(buf.vt, &raw const BUF_VT) {
        // SAFETY: only `lend` and `host_clone` make buffers with this vtable, a static of ours
        // that is not generic; `data` is the box they leaked and is given back once.
        let host = unsafe { Box::from_raw(buf.data.cast::<HostBuf>()) };
        return narrowed(&host, &buf);
    }
    // SAFETY: the buffer was moved here.
    let foreign = unsafe { Foreign::new(buf) }?;
    if foreign.len == 0 {
        return Ok(Bytes::new());
    }
    if foreign.len < COPY_BYTES_MAX {
        return Ok(Bytes::copy_from_slice(foreign.as_ref()));
    }
    Ok(Bytes::from_owner(foreign))
}

/// Returns another owner of the bytes of a buffer that stays with the plugin.
///
/// # Safety
/// `buf` is a live buffer, borrowed for the call.
pub(super) unsafe fn share(buf: &abi::Buf) -> Result<Bytes, Invalid> {
    if buf.vt.is_null() {
        // SAFETY: the buffer is live.
        return unsafe { static_bytes(buf) };
    }
    if std::ptr::eq(buf.vt, &raw const BUF_VT) {
        // SAFETY: as in `take`, but the box stays with its owner.
        let host = unsafe { &*buf.data.cast::<HostBuf>() };
        return narrowed(host, buf);
    }
    if buf.len == 0 {
        return Ok(Bytes::new());
    }
    if buf.ptr.is_null() {
        return Err(Invalid::NullPointer);
    }
    if buf.len < COPY_BYTES_MAX {
        // SAFETY: a live buffer's bytes are valid (plugin ABI, `Buf`).
        let bytes = unsafe { std::slice::from_raw_parts(buf.ptr, buf.len) };
        return Ok(Bytes::copy_from_slice(bytes));
    }
    // SAFETY: a buffer's vtable is static.
    let vt = unsafe { &*buf.vt };
    if vt.size < size_of::<abi::BufVt>() {
        return Err(Invalid::Vtable);
    }
    // SAFETY: the buffer is live; the clone is an owner of its own.
    let clone = unsafe { (vt.clone)(buf) };
    // SAFETY: the clone is ours.
    Ok(Bytes::from_owner(unsafe { Foreign::new(clone) }?))
}

/// Ends a buffer that a plugin moves here, without looking at its bytes.
///
/// # Safety
/// As [`take`].
pub(super) unsafe fn discard(buf: &mut abi::Buf) {
    let buf = std::mem::replace(buf, EMPTY);
    if buf.vt.is_null() {
        return;
    }
    if std::ptr::eq(buf.vt, &raw const BUF_VT) {
        // SAFETY: as in `take`.
        drop(unsafe { Box::from_raw(buf.data.cast::<HostBuf>()) });
        return;
    }
    // SAFETY: the vtable of a live buffer is static.
    let vt = unsafe { &*buf.vt };
    // SAFETY: this owner ends here.
    unsafe { (vt.drop)(buf.data) };
}

/// # Safety
/// `buf` is live and has no vtable.
unsafe fn static_bytes(buf: &abi::Buf) -> Result<Bytes, Invalid> {
    match (buf.len, buf.ptr.is_null()) {
        (0, _) => Ok(Bytes::new()),
        (_, true) => Err(Invalid::NullPointer),
        // SAFETY: without a vtable it is static memory (plugin ABI, `Buf`), and a plugin's statics
        // live as long as the process, since its library is never unmapped.
        (len, false) => Ok(Bytes::from_static(unsafe { std::slice::from_raw_parts(buf.ptr, len) })),
    }
}

/// Returns the part of our own bytes that the buffer was narrowed to.
fn narrowed(host: &HostBuf, buf: &abi::Buf) -> Result<Bytes, Invalid> {
    if host.tag != TAG {
        return Err(Invalid::Vtable);
    }
    if buf.len == 0 {
        return Ok(Bytes::new());
    }
    let start = (buf.ptr as usize).wrapping_sub(host.bytes.as_ptr() as usize);
    match start.checked_add(buf.len) {
        Some(end) if end <= host.bytes.len() => Ok(host.bytes.slice(start..end)),
        _ => Err(Invalid::Bounds),
    }
}

unsafe extern "C" fn host_clone(buf: *const abi::Buf) -> abi::Buf {
    // SAFETY: the caller lends a live buffer of ours for the call.
    let buf = unsafe { &*buf };
    guard("buf.clone", EMPTY, || {
        // SAFETY: as above.
        let shared = unsafe { share(buf) };
        shared.map_or(EMPTY, lend)
    })
}

unsafe extern "C" fn host_drop(data: *mut c_void) {
    // SAFETY: `data` is what `lend` leaked, and its owner ends here.
    let host = unsafe { Box::from_raw(data.cast::<HostBuf>()) };
    guard("buf.drop", (), || drop(host));
}

/// A plugin's buffer, kept as it is.
struct Foreign {
    ptr: *const u8,
    len: usize,
    data: *mut c_void,
    drop: unsafe extern "C" fn(*mut c_void),
}

// SAFETY: everything the ABI moves may be sent to another thread (plugin ABI, "Threads").
unsafe impl Send for Foreign {}
// SAFETY: the bytes are immutable, and only `drop` touches `data`.
unsafe impl Sync for Foreign {}

impl Foreign {
    /// # Safety
    /// `buf` is a plugin's buffer with a vtable, moved here.
    unsafe fn new(buf: abi::Buf) -> Result<Self, Invalid> {
        // SAFETY: a buffer's vtable is static.
        let vt = unsafe { &*buf.vt };
        if vt.size < size_of::<abi::BufVt>() {
            return Err(Invalid::Vtable);
        }
        let this = Self { ptr: buf.ptr, len: buf.len, data: buf.data, drop: vt.drop };
        if this.ptr.is_null() && this.len != 0 { Err(Invalid::NullPointer) } else { Ok(this) }
    }
}

impl AsRef<[u8]> for Foreign {
    fn as_ref(&self) -> &[u8] {
        if self.len == 0 {
            return &[];
        }
        // SAFETY: the buffer is owned until `drop`, its bytes are valid and immutable (plugin ABI,
        // `Buf`), and `ptr` is not null (`Foreign::new`).
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        // SAFETY: this owner was moved here and ends once.
        unsafe { (self.drop)(self.data) }
    }
}
