//! Bytes that cross the boundary by reference.

use std::alloc::{self, Layout};
use std::ffi::c_void;
use std::fmt;
use std::ops::{Bound, Deref, RangeBounds};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicUsize, Ordering, fence};

use bytes::Bytes;
use bytes::buf::UninitSlice;
use sidelane_abi as abi;

/// From this length on handing a buffer over beats copying it (measured; see `plugin-abi.md`).
const COPY_BYTES_MAX: usize = 4 * 1024;

/// Owned, reference-counted, immutable bytes, whoever made them. A clone and a slice share the bytes; a
/// buffer that only passes through a plugin is handed on as the same object.
pub struct Buf {
    raw: abi::Buf,
}

// SAFETY: H3 for the owner; the bytes are immutable and `clone` is the only function called through
// `&self`, which the ABI lets any owner call and makers of reference-counted buffers count atomically.
unsafe impl Send for Buf {}
// SAFETY: as above.
unsafe impl Sync for Buf {}

impl Buf {
    /// Returns no bytes.
    #[must_use]
    pub const fn new() -> Self {
        Self::from_static(&[])
    }

    /// Refers to static bytes.
    #[must_use]
    pub const fn from_static(bytes: &'static [u8]) -> Self {
        let raw = abi::Buf {
            ptr: bytes.as_ptr(),
            len: bytes.len(),
            data: ptr::null_mut(),
            vt: ptr::null(),
        };
        Self { raw }
    }

    /// Copies `bytes`.
    #[must_use]
    pub fn copy_from_slice(bytes: &[u8]) -> Self {
        let mut builder = BufBuilder::with_capacity(bytes.len());
        builder.extend_from_slice(bytes);
        builder.freeze()
    }

    /// Number of bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.raw.len
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.raw.len == 0
    }

    /// Returns a part of the bytes, shared.
    ///
    /// # Panics
    /// Where the range is out of bounds.
    #[must_use]
    pub fn slice(&self, range: impl RangeBounds<usize>) -> Self {
        let start = match range.start_bound() {
            Bound::Included(&start) => start,
            Bound::Excluded(&start) => start + 1,
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(&end) => end + 1,
            Bound::Excluded(&end) => end,
            Bound::Unbounded => self.raw.len,
        };
        assert!(
            start <= end && end <= self.raw.len,
            "slice {start}..{end} of {} bytes",
            self.raw.len
        );
        if start == end {
            return Self::new();
        }
        let mut part = self.clone();
        part.narrow(start, end);
        part
    }

    /// Splits off and returns the first `at` bytes.
    ///
    /// # Panics
    /// Where there are fewer.
    #[must_use]
    pub fn split_to(&mut self, at: usize) -> Self {
        let head = self.slice(..at);
        self.narrow(at, self.raw.len);
        head
    }

    /// Keeps the first `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        self.raw.len = self.raw.len.min(len);
    }

    /// Keeps `start..end`, which is within bounds.
    fn narrow(&mut self, start: usize, end: usize) {
        debug_assert!(start <= end && end <= self.raw.len);
        if start != 0 {
            // SAFETY: `start` is within the bytes that `ptr` leads to.
            self.raw.ptr = unsafe { self.raw.ptr.add(start) };
        }
        self.raw.len = end - start;
    }

    /// Turns it into [`Bytes`]: those it was made from, else a reference to 4 KiB and more and a copy
    /// of less.
    #[must_use]
    pub fn into_bytes(self) -> Bytes {
        if self.raw.vt.is_null() {
            // SAFETY: without a vtable the memory is static (`abi::Buf`).
            return Bytes::from_static(unsafe { text_static(&self.raw) });
        }
        if ptr::eq(self.raw.vt, &raw const BYTES_VT.vt) {
            // SAFETY: this very vtable, a static of ours, is only ever paired with a `SharedBytes`.
            let shared = unsafe { &*self.raw.data.cast::<SharedBytes>() };
            return shared.bytes.slice_ref(&self);
        }
        if self.raw.len < COPY_BYTES_MAX {
            Bytes::copy_from_slice(&self)
        } else {
            Bytes::from_owner(self)
        }
    }

    /// As [`Self::into_bytes`] of a clone, which is only made where it is kept.
    #[must_use]
    pub fn to_bytes(&self) -> Bytes {
        let is_host_made = !self.raw.vt.is_null() && !ptr::eq(self.raw.vt, &raw const BYTES_VT.vt);
        if is_host_made && self.raw.len < COPY_BYTES_MAX {
            return Bytes::copy_from_slice(self);
        }
        self.clone().into_bytes()
    }

    /// Takes over a buffer from the host.
    ///
    /// # Safety
    /// `raw` is moved to the caller (H1).
    pub(crate) const unsafe fn from_raw(raw: abi::Buf) -> Self {
        Self { raw }
    }

    /// Moves it to the host.
    pub(crate) const fn into_raw(self) -> abi::Buf {
        let raw =
            abi::Buf { ptr: self.raw.ptr, len: self.raw.len, data: self.raw.data, vt: self.raw.vt };
        std::mem::forget(self);
        raw
    }
}

/// # Safety
/// `raw` refers to static memory.
unsafe fn text_static(raw: &abi::Buf) -> &'static [u8] {
    // SAFETY: by this function's contract.
    unsafe { super::text::bytes(abi::Str { ptr: raw.ptr, len: raw.len }) }
}

impl Drop for Buf {
    fn drop(&mut self) {
        if !self.raw.vt.is_null() {
            // SAFETY: owned and with a vtable (H1); dropped here once.
            unsafe { ((*self.raw.vt).drop)(self.raw.data) }
        }
    }
}

impl Clone for Buf {
    fn clone(&self) -> Self {
        if self.raw.vt.is_null() {
            let raw = abi::Buf { data: ptr::null_mut(), vt: ptr::null(), ..self.raw };
            return Self { raw };
        }
        // SAFETY: owned and with a vtable (H1); the clone is ours to drop.
        Self { raw: unsafe { ((*self.raw.vt).clone)(&raw const self.raw) } }
    }
}

impl Deref for Buf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: valid and immutable while it is owned (H1).
        unsafe { super::text::bytes(abi::Str { ptr: self.raw.ptr, len: self.raw.len }) }
    }
}

impl AsRef<[u8]> for Buf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Default for Buf {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "b\"{}\"", self.escape_ascii())
    }
}

impl PartialEq for Buf {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Buf {}

impl PartialEq<[u8]> for Buf {
    fn eq(&self, other: &[u8]) -> bool {
        **self == *other
    }
}

impl bytes::Buf for Buf {
    fn remaining(&self) -> usize {
        self.raw.len
    }

    fn chunk(&self) -> &[u8] {
        self
    }

    fn advance(&mut self, count: usize) {
        assert!(count <= self.raw.len, "advance by {count} of {} bytes", self.raw.len);
        self.narrow(count, self.raw.len);
    }

    fn copy_to_bytes(&mut self, len: usize) -> Bytes {
        self.split_to(len).into_bytes()
    }
}

impl From<&'static [u8]> for Buf {
    fn from(bytes: &'static [u8]) -> Self {
        Self::from_static(bytes)
    }
}

impl From<&'static str> for Buf {
    fn from(text: &'static str) -> Self {
        Self::from_static(text.as_bytes())
    }
}

impl From<Bytes> for Buf {
    fn from(bytes: Bytes) -> Self {
        if bytes.is_empty() {
            return Self::new();
        }
        let (ptr, len) = (bytes.as_ptr(), bytes.len());
        let data = Box::into_raw(Box::new(SharedBytes { refs: AtomicUsize::new(1), bytes }));
        Self { raw: abi::Buf { ptr, len, data: data.cast(), vt: &raw const BYTES_VT.vt } }
    }
}

impl From<Vec<u8>> for Buf {
    /// Copies less than 4 KiB. Encode into a [`BufBuilder`] to copy nothing at any size.
    fn from(bytes: Vec<u8>) -> Self {
        if bytes.len() < COPY_BYTES_MAX {
            Self::copy_from_slice(&bytes)
        } else {
            Bytes::from(bytes).into()
        }
    }
}

impl From<String> for Buf {
    fn from(text: String) -> Self {
        text.into_bytes().into()
    }
}

/// A vtable with a tag behind it, so that no two of them have equal contents and none may be merged
/// with another: `into_bytes` asks for [`BYTES_VT`] by address.
#[repr(C)]
struct Tagged {
    vt: abi::BufVt,
    tag: u64,
}

static BYTES_VT: Tagged = Tagged {
    vt: abi::BufVt { size: size_of::<abi::BufVt>(), clone: clone_bytes, drop: drop_bytes },
    tag: 1,
};

static BLOCK_VT: Tagged = Tagged {
    vt: abi::BufVt { size: size_of::<abi::BufVt>(), clone: clone_block, drop: drop_block },
    tag: 2,
};

struct SharedBytes {
    refs: AtomicUsize,
    bytes: Bytes,
}

unsafe extern "C" fn clone_bytes(buf: *const abi::Buf) -> abi::Buf {
    // SAFETY: `buf` is one of this vtable, borrowed for the call.
    let buf = unsafe { &*buf };
    // SAFETY: `data` of this vtable is a `SharedBytes` with at least the caller's owner.
    retain(unsafe { &(*buf.data.cast::<SharedBytes>()).refs });
    abi::Buf { ptr: buf.ptr, len: buf.len, data: buf.data, vt: buf.vt }
}

unsafe extern "C" fn drop_bytes(data: *mut c_void) {
    let shared = data.cast::<SharedBytes>();
    // SAFETY: `data` of this vtable is a `SharedBytes` with at least the caller's owner.
    if release(unsafe { &(*shared).refs }) {
        // SAFETY: made by `Box::into_raw`, and this was the last owner.
        let last = unsafe { Box::from_raw(shared) };
        // `Bytes::from_owner` runs foreign code here.
        super::context::contain(move || drop(last));
    }
}

/// What stands before the bytes of a [`BufBuilder`]'s allocation.
#[repr(C)]
struct BlockHead {
    refs: AtomicUsize,
    capacity: usize,
}

const BLOCK_HEAD_BYTES: usize = size_of::<BlockHead>();

fn block_layout(capacity: usize) -> Layout {
    capacity
        .checked_add(BLOCK_HEAD_BYTES)
        .and_then(|size| Layout::from_size_align(size, align_of::<BlockHead>()).ok())
        .expect("a buffer fits the address space")
}

unsafe extern "C" fn clone_block(buf: *const abi::Buf) -> abi::Buf {
    // SAFETY: `buf` is one of this vtable, borrowed for the call.
    let buf = unsafe { &*buf };
    // SAFETY: `data` of this vtable is a `BlockHead` with at least the caller's owner.
    retain(unsafe { &(*buf.data.cast::<BlockHead>()).refs });
    abi::Buf { ptr: buf.ptr, len: buf.len, data: buf.data, vt: buf.vt }
}

unsafe extern "C" fn drop_block(data: *mut c_void) {
    let head = data.cast::<BlockHead>();
    // SAFETY: `data` of this vtable is a `BlockHead` with at least the caller's owner.
    if release(unsafe { &(*head).refs }) {
        // SAFETY: the last owner; the head is still there.
        let layout = block_layout(unsafe { (*head).capacity });
        // SAFETY: allocated with this layout by `BufBuilder`.
        unsafe { alloc::dealloc(data.cast(), layout) }
    }
}

fn retain(refs: &AtomicUsize) {
    // A count that overflows would free memory in use; no program holds half the address space in
    // owners without leaking them.
    if refs.fetch_add(1, Ordering::Relaxed) > isize::MAX as usize {
        std::process::abort();
    }
}

/// Returns whether that was the last owner.
fn release(refs: &AtomicUsize) -> bool {
    let last = refs.fetch_sub(1, Ordering::Release) == 1;
    if last {
        fence(Ordering::Acquire);
    }
    last
}

/// Writes a [`Buf`] in one allocation, counter included: what a payload is encoded into.
pub struct BufBuilder {
    /// Invariant: null while `capacity` is 0, else a block of `capacity` bytes behind its head.
    block: *mut u8,
    /// Invariant: `len <= capacity`, and that many bytes are initialised.
    len: usize,
    capacity: usize,
}

// SAFETY: owns its allocation.
unsafe impl Send for BufBuilder {}
// SAFETY: owns its allocation; `&self` only reads.
unsafe impl Sync for BufBuilder {}

impl BufBuilder {
    /// Returns an empty one that has not allocated.
    #[must_use]
    pub const fn new() -> Self {
        Self { block: ptr::null_mut(), len: 0, capacity: 0 }
    }

    /// Returns an empty one that holds `capacity` bytes without growing.
    #[must_use]
    pub fn with_capacity(capacity: usize) -> Self {
        let mut builder = Self::new();
        if capacity > 0 {
            builder.grow(capacity);
        }
        builder
    }

    /// Number of bytes written.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether none were.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends `bytes`.
    pub fn extend_from_slice(&mut self, bytes: &[u8]) {
        self.reserve(bytes.len());
        if bytes.is_empty() {
            return;
        }
        // SAFETY: reserved.
        let end = unsafe { self.block.add(BLOCK_HEAD_BYTES + self.len) };
        // SAFETY: room for them was reserved, and a borrowed slice cannot overlap what is owned here.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), end, bytes.len()) };
        self.len += bytes.len();
    }

    /// Appends a byte.
    pub fn push(&mut self, byte: u8) {
        self.extend_from_slice(&[byte]);
    }

    /// Makes room for `more` bytes.
    pub fn reserve(&mut self, more: usize) {
        if more > self.capacity - self.len {
            let needed = self.len.checked_add(more).expect("a buffer fits the address space");
            self.grow(needed.max(self.capacity * 2).max(64));
        }
    }

    fn grow(&mut self, capacity: usize) {
        let layout = block_layout(capacity);
        let block = if self.block.is_null() {
            // SAFETY: a block's layout is never empty, it has a head.
            unsafe { alloc::alloc(layout) }
        } else {
            // SAFETY: allocated with the layout of the present capacity; the new size is not 0.
            unsafe { alloc::realloc(self.block, block_layout(self.capacity), layout.size()) }
        };
        if block.is_null() {
            alloc::handle_alloc_error(layout);
        }
        self.block = block;
        self.capacity = capacity;
    }

    /// The room behind what is written, at least one byte.
    pub(crate) fn spare(&mut self) -> (*mut u8, usize) {
        self.reserve(1);
        // SAFETY: `len <= capacity`, and there is a block.
        (unsafe { self.block.add(BLOCK_HEAD_BYTES + self.len) }, self.capacity - self.len)
    }

    /// Counts `count` bytes as written.
    ///
    /// # Safety
    /// They were written to what [`Self::spare`] returned.
    pub(crate) unsafe fn written(&mut self, count: usize) {
        assert!(count <= self.capacity - self.len, "more written than there was room for");
        self.len += count;
    }

    /// Turns it into a [`Buf`], without copying.
    #[must_use]
    pub fn freeze(self) -> Buf {
        let Some(block) = NonNull::new(self.block) else {
            return Buf::new();
        };
        let head = BlockHead { refs: AtomicUsize::new(1), capacity: self.capacity };
        // SAFETY: every block has room for its head before the bytes, aligned by its layout.
        unsafe { block.cast::<BlockHead>().write(head) };
        // SAFETY: the bytes begin behind the head.
        let ptr = unsafe { block.as_ptr().add(BLOCK_HEAD_BYTES) };
        let raw = abi::Buf {
            ptr,
            len: self.len,
            data: block.as_ptr().cast(),
            vt: &raw const BLOCK_VT.vt,
        };
        std::mem::forget(self);
        Buf { raw }
    }
}

impl Drop for BufBuilder {
    fn drop(&mut self) {
        if !self.block.is_null() {
            // SAFETY: allocated with this layout, and not frozen.
            unsafe { alloc::dealloc(self.block, block_layout(self.capacity)) }
        }
    }
}

impl Default for BufBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl Deref for BufBuilder {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        if self.block.is_null() {
            return &[];
        }
        // SAFETY: the bytes begin behind the head.
        let ptr = unsafe { self.block.add(BLOCK_HEAD_BYTES) };
        // SAFETY: `len` bytes are initialised.
        unsafe { std::slice::from_raw_parts(ptr, self.len) }
    }
}

impl fmt::Debug for BufBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "b\"{}\"", self.escape_ascii())
    }
}

// SAFETY: `chunk_mut` is the room behind what is written, and `advance_mut` counts within it.
unsafe impl bytes::BufMut for BufBuilder {
    fn remaining_mut(&self) -> usize {
        isize::MAX as usize - self.len
    }

    unsafe fn advance_mut(&mut self, count: usize) {
        // SAFETY: the caller has written them (`BufMut::advance_mut`).
        unsafe { self.written(count) }
    }

    fn chunk_mut(&mut self) -> &mut UninitSlice {
        let (ptr, len) = self.spare();
        // SAFETY: owned room of `len` bytes, borrowed with `self`.
        unsafe { UninitSlice::from_raw_parts_mut(ptr, len) }
    }

    fn put_slice(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use bytes::BufMut as _;

    use super::*;

    #[test]
    fn bytes_come_back_as_themselves() {
        let bytes = Bytes::from(vec![7; 100]);
        let mut buf = Buf::from(bytes.clone());
        let tail = buf.split_to(10).len();
        assert_eq!(tail, 10);
        let back = buf.into_bytes();
        assert_eq!(back.as_ptr(), bytes[10..].as_ptr());
    }

    #[test]
    fn builder_grows_and_freezes_in_place() {
        let mut builder = BufBuilder::with_capacity(4);
        for byte in 0..=255u8 {
            builder.put_u8(byte);
        }
        builder.put_slice(b"end");
        let buf = builder.freeze();
        assert_eq!(buf.len(), 259);
        assert_eq!(&buf[256..], b"end");
        let clone = buf.clone();
        drop(buf);
        assert_eq!(clone.slice(254..257), *[254u8, 255, b'e'].as_slice());
    }

    #[test]
    fn large_foreign_bytes_are_not_copied() {
        for (len, copied) in [(COPY_BYTES_MAX - 1, true), (COPY_BYTES_MAX, false)] {
            let buf = Buf::copy_from_slice(&vec![1; len]);
            let before = buf.as_ptr();
            let bytes = buf.into_bytes();
            assert_eq!(bytes.as_ptr() != before, copied, "{len}");
            assert_eq!(bytes.len(), len);
        }
    }

    #[test]
    fn static_and_empty_need_no_owner() {
        assert!(Buf::default().into_bytes().is_empty());
        assert!(BufBuilder::new().freeze().is_empty());
        assert_eq!(Buf::from("x").clone().slice(..).into_bytes(), "x");
        assert!(Buf::from("x").slice(1..).is_empty());
    }

    #[test]
    fn last_owner_frees_the_bytes() {
        struct Owner {
            _alive: std::sync::Arc<()>,
        }
        impl AsRef<[u8]> for Owner {
            fn as_ref(&self) -> &[u8] {
                b"owned"
            }
        }
        let alive = std::sync::Arc::new(());
        let buf = Buf::from(Bytes::from_owner(Owner { _alive: alive.clone() }));
        let part = buf.slice(1..3);
        drop(buf);
        assert_eq!(std::sync::Arc::strong_count(&alive), 2);
        assert_eq!(&*part, b"wn");
        drop(part);
        assert_eq!(std::sync::Arc::strong_count(&alive), 1);
    }
}
