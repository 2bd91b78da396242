//! The C ABI between the host (`sidelane`) and a protocol plugin.
//!
//! Only layouts, tags and constants: no code runs here. `sdk/include/sidelane_plugin.h` is the
//! same contract in C; a test holds the two against each other. Plugin authors in Rust use
//! `sidelane-plugin`, which turns these shapes into ordinary Rust types.
//!
//! # Rules
//!
//! * **Ownership.** [`Str`] and every `*const` struct are borrowed: for the call, or for as long as
//!   the field or function says. [`Buf`], [`Future`], [`Io`], [`Body`], [`Responder`], [`Opener`],
//!   [`SendHalf`], [`RecvHalf`], [`Service`] and [`Timer`] by value are moved; the receiver calls
//!   `drop` of each exactly once. Memory is freed by the side that made it, through its vtable.
//! * **Threads.** Everything moved may be sent to another thread. One object is used by one thread
//!   at a time. A plugin's entry points are called concurrently. No call blocks.
//! * **Polling.** A `poll_*` that returns [`poll::PENDING`] has kept (retained) the waker and calls
//!   it once progress can be made. `waker` is never null and is borrowed for the call.
//! * **Panics and exceptions** never cross: each side catches its own. A plugin reports one as
//!   [`poll::PANICKED`].
//! * **Versions.** Every vtable and every struct passed by pointer begins with its `size`. Slots are
//!   appended, never changed; a reader treats a slot at or beyond `size` as absent. Structs passed
//!   by value are frozen within a major version. A host takes plugins of [`ABI_MINOR_OLDEST`] to
//!   [`ABI_MINOR`]; what a minor version added says so ("since 0.3").
#![no_std]
#![warn(missing_docs)]

use core::ffi::c_void;

/// Major version. Different majors do not load.
pub const ABI_MAJOR: u32 = 0;
/// Minor version. A plugin's may not exceed its host's.
pub const ABI_MINOR: u32 = 5;
/// Oldest minor version that a host of this one takes: what came since was only appended.
pub const ABI_MINOR_OLDEST: u32 = 2;
/// First bytes of every [`Stamp`].
pub const MAGIC: [u8; 16] = *b"sidelane-plugin\0";
/// The one symbol a plugin exports: a [`Stamp`].
pub const STAMP_SYMBOL: &str = "sidelane_plugin_stamp";

/// Panic strategy of the plugin's code, in [`Stamp::panic`].
pub mod panic_strategy {
    /// Unwinds: a panic is caught at the boundary.
    pub const UNWIND: u32 = 1;
    /// Aborts the process: refused by the host.
    pub const ABORT: u32 = 2;
    /// The language has no panics (C).
    pub const NONE: u32 = 3;
}

/// What a plugin says of itself. Plain data, read from the library's file before it is mapped, so
/// nothing but [`Stamp::plugin`] may need a relocation.
#[repr(C)]
pub struct Stamp {
    /// [`MAGIC`].
    pub magic: [u8; 16],
    /// `sizeof(Stamp)` as the plugin was compiled.
    pub size: u32,
    /// [`ABI_MAJOR`] the plugin was compiled against.
    pub abi_major: u32,
    /// [`ABI_MINOR`] the plugin was compiled against.
    pub abi_minor: u32,
    /// One of [`panic_strategy`].
    pub panic: u32,
    /// Plugin's name, NUL padded UTF-8.
    pub name: [u8; 64],
    /// Plugin's version, NUL padded UTF-8.
    pub version: [u8; 32],
    /// Compiler that built it, NUL padded UTF-8.
    pub toolchain: [u8; 96],
    /// The plugin's functions.
    pub plugin: *const PluginVt,
}

// SAFETY: a stamp is immutable data; its pointer leads to an immutable static.
#[allow(unsafe_code, reason = "a static that holds a pointer needs Sync")]
unsafe impl Sync for Stamp {}

/// Borrowed bytes; UTF-8 where the field says text. `ptr` may be null where `len` is 0.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Str {
    /// First byte.
    pub ptr: *const u8,
    /// Length in bytes.
    pub len: usize,
}

/// Owned, reference-counted, immutable bytes. Whoever owns it may narrow `ptr` and `len` within
/// the range it got. `vt` null: static memory, nothing to drop, copied freely.
#[repr(C)]
pub struct Buf {
    /// First byte.
    pub ptr: *const u8,
    /// Length in bytes.
    pub len: usize,
    /// The maker's own.
    pub data: *mut c_void,
    /// The maker's functions; null for static memory.
    pub vt: *const BufVt,
}

/// Functions of a [`Buf`].
#[repr(C)]
pub struct BufVt {
    /// `sizeof(BufVt)`.
    pub size: usize,
    /// Returns another owner of the same bytes (`ptr`, `len` as in `buf`).
    pub clone: unsafe extern "C" fn(buf: *const Buf) -> Buf,
    /// Ends one owner. Does not look at `ptr` and `len`.
    pub drop: unsafe extern "C" fn(data: *mut c_void),
}

/// A reference-counted waker; the implementer's fields follow. Always used by pointer.
#[repr(C)]
pub struct Waker {
    /// The implementer's functions.
    pub vt: *const WakerVt,
}

/// Functions of a [`Waker`]. May be called from any thread.
#[repr(C)]
pub struct WakerVt {
    /// `sizeof(WakerVt)`.
    pub size: usize,
    /// Adds an owner.
    pub retain: unsafe extern "C" fn(waker: *const Waker),
    /// Ends an owner.
    pub release: unsafe extern "C" fn(waker: *const Waker),
    /// Asks for another poll; keeps the ownership.
    pub wake: unsafe extern "C" fn(waker: *const Waker),
}

/// Tags that any `poll_*` may return. Others are named where they are returned.
pub mod poll {
    /// Not yet; the waker was kept.
    pub const PENDING: u32 = 0;
    /// Done.
    pub const READY: u32 = 1;
    /// The other side of the object is gone; details are in the `Reset` that the call fills, if any.
    pub const CLOSED: u32 = 2;
    /// The callee panicked; the object may only be dropped.
    pub const PANICKED: u32 = u32::MAX;
}

/// A future. `out` of its poll is typed by the function that returned it.
#[repr(C)]
pub struct Future {
    /// The maker's own.
    pub data: *mut c_void,
    /// The maker's functions.
    pub vt: *const FutureVt,
}

/// Functions of a [`Future`].
#[repr(C)]
pub struct FutureVt {
    /// `sizeof(FutureVt)`.
    pub size: usize,
    /// [`poll::PENDING`], [`poll::READY`] (then `out` is filled) or [`poll::PANICKED`]. Not called
    /// again after either of the last two.
    pub poll: unsafe extern "C" fn(data: *mut c_void, waker: *const Waker, out: *mut c_void) -> u32,
    /// Cancels where it is not done. What was moved into the future is dropped with it.
    pub drop: unsafe extern "C" fn(data: *mut c_void),
}

/// Result of an [`IoVt`] call.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct IoRes {
    /// [`poll::PENDING`], [`poll::READY`] or [`io::ERROR`].
    pub tag: u32,
    /// `errno` where `tag` is [`io::ERROR`], else 0.
    pub err: i32,
    /// Bytes moved; 0 from `poll_read` is the end of the stream.
    pub n: usize,
}

/// Tags of [`IoRes`] beside those of [`poll`].
pub mod io {
    /// Failed; `err` says why.
    pub const ERROR: u32 = 3;
}

/// One element of a vectored write; the layout of POSIX `struct iovec`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct IoVec {
    /// First byte.
    pub ptr: *const u8,
    /// Length in bytes.
    pub len: usize,
}

/// A byte stream, each direction closed on its own.
#[repr(C)]
pub struct Io {
    /// The maker's own.
    pub data: *mut c_void,
    /// The maker's functions.
    pub vt: *const IoVt,
}

/// Functions of an [`Io`]. One read and one write may be pending at once, each with its own waker.
#[repr(C)]
pub struct IoVt {
    /// `sizeof(IoVt)`.
    pub size: usize,
    /// Reads up to `len` bytes into `ptr`.
    pub poll_read: unsafe extern "C" fn(
        data: *mut c_void,
        waker: *const Waker,
        ptr: *mut u8,
        len: usize,
    ) -> IoRes,
    /// Writes from `count` (at least 1, at most 64) elements.
    pub poll_writev: unsafe extern "C" fn(
        data: *mut c_void,
        waker: *const Waker,
        iov: *const IoVec,
        count: usize,
    ) -> IoRes,
    /// Pushes out what the implementer buffered.
    pub poll_flush: unsafe extern "C" fn(data: *mut c_void, waker: *const Waker) -> IoRes,
    /// Flushes and ends the write direction; reading goes on.
    pub poll_shutdown: unsafe extern "C" fn(data: *mut c_void, waker: *const Waker) -> IoRes,
    /// Closes both directions.
    pub drop: unsafe extern "C" fn(data: *mut c_void),
}

/// A timer that can be set again. Fires once per deadline.
#[repr(C)]
pub struct Timer {
    /// The host's own.
    pub data: *mut c_void,
    /// The host's functions.
    pub vt: *const TimerVt,
}

/// Functions of a [`Timer`].
#[repr(C)]
pub struct TimerVt {
    /// `sizeof(TimerVt)`.
    pub size: usize,
    /// [`poll::READY`] once the deadline has passed.
    pub poll: unsafe extern "C" fn(data: *mut c_void, waker: *const Waker) -> u32,
    /// Sets another deadline, on the clock of [`HostVt::now`].
    pub reset: unsafe extern "C" fn(data: *mut c_void, deadline_ns: u64),
    /// Ends it.
    pub drop: unsafe extern "C" fn(data: *mut c_void),
}

/// Why something failed or ended early: the rows of the failure table and the reset codes, one
/// numbering for ABI, tunnel, logs and the `x-sidelane-error` header.
pub mod failure {
    /// No failure.
    pub const NONE: u32 = 0;
    /// The other end no longer wants it.
    pub const CANCELLED: u32 = 1;
    /// No route takes the name or path.
    pub const NO_ROUTE: u32 = 2;
    /// The route's tunnel has no sidecar connected.
    pub const NO_SIDECAR: u32 = 3;
    /// No connected sidecar, or no loaded plugin, carries the protocol.
    pub const NO_PROTOCOL: u32 = 4;
    /// The service refused the connection, or could not be reached.
    pub const SERVICE_UNREACHABLE: u32 = 5;
    /// The service closed or reset the exchange before it was complete.
    pub const SERVICE_RESET: u32 = 6;
    /// The service sent what its protocol does not allow.
    pub const SERVICE_INVALID: u32 = 7;
    /// The service was too slow.
    pub const SERVICE_TIMEOUT: u32 = 8;
    /// Over a rate.
    pub const RATE_LIMITED: u32 = 9;
    /// Over a limit on load: exchanges, sessions, bytes queued.
    pub const OVERLOADED: u32 = 10;
    /// A head, message or body is larger than allowed.
    pub const TOO_LARGE: u32 = 11;
    /// The tunnel was lost for longer than its grace.
    pub const TUNNEL_LOST: u32 = 12;
    /// The client closed or reset the exchange.
    pub const CLIENT_GONE: u32 = 13;
    /// The client sent what its protocol does not allow.
    pub const BAD_REQUEST: u32 = 14;
    /// A peer ignored its credit.
    pub const FLOW_CONTROL: u32 = 15;
    /// The plugin failed (error or panic) or is quarantined.
    pub const PLUGIN_FAILED: u32 = 16;
    /// This end is going away.
    pub const DRAINING: u32 = 17;
    /// The credential does not allow it.
    pub const FORBIDDEN: u32 = 18;
    /// A defect on our side.
    pub const INTERNAL: u32 = 19;
    /// The host or the transport cannot do it.
    pub const UNSUPPORTED: u32 = 20;
    /// The client was too slow.
    pub const CLIENT_TIMEOUT: u32 = 21;
    /// The client did not say who it is, or not truly.
    pub const UNAUTHORIZED: u32 = 22;
    /// The connection is not for the host that was asked for: TLS was agreed on for another name.
    pub const MISDIRECTED: u32 = 23;

    /// Returns the code's name as it stands in logs, metrics and `x-sidelane-error`.
    #[must_use]
    pub const fn name(code: u32) -> &'static str {
        match code {
            NONE => "none",
            CANCELLED => "cancelled",
            NO_ROUTE => "no-route",
            NO_SIDECAR => "no-sidecar",
            NO_PROTOCOL => "no-protocol",
            SERVICE_UNREACHABLE => "service-unreachable",
            SERVICE_RESET => "service-reset",
            SERVICE_INVALID => "service-invalid",
            SERVICE_TIMEOUT => "service-timeout",
            RATE_LIMITED => "rate-limited",
            OVERLOADED => "overloaded",
            TOO_LARGE => "too-large",
            TUNNEL_LOST => "tunnel-lost",
            CLIENT_GONE => "client-gone",
            BAD_REQUEST => "bad-request",
            FLOW_CONTROL => "flow-control",
            PLUGIN_FAILED => "plugin-failed",
            DRAINING => "draining",
            FORBIDDEN => "forbidden",
            INTERNAL => "internal",
            UNSUPPORTED => "unsupported",
            CLIENT_TIMEOUT => "client-timeout",
            UNAUTHORIZED => "unauthorized",
            MISDIRECTED => "misdirected",
            _ => "unknown",
        }
    }
}

/// A failure with what a client may be told of it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Failure {
    /// `sizeof(Failure)`.
    pub size: usize,
    /// One of [`failure`].
    pub code: u32,
    /// Seconds for `Retry-After`; 0: none.
    pub retry_after_s: u32,
    /// One line of text for people; borrowed as the call says.
    pub detail: Str,
}

/// Why a direction or a stream ended early.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reset {
    /// One of [`failure`].
    pub code: u32,
    /// The protocol's own code where it has one (HTTP/2's error code), passed as sent;
    /// [`NO_PROTOCOL_CODE`] where not.
    pub protocol_code: u32,
}

/// [`Reset::protocol_code`] where there is none.
pub const NO_PROTOCOL_CODE: u32 = u32::MAX;

/// Unknown length, in the fields that say so.
pub const LENGTH_UNKNOWN: u64 = u64::MAX;

/// A header field. Names are lower case where the host made them.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Header {
    /// Field name.
    pub name: Str,
    /// Field value, any bytes HTTP allows.
    pub value: Str,
}

/// An HTTP request's head. Borrowed until the future that got it is dropped.
#[repr(C)]
pub struct RequestHead {
    /// `sizeof(RequestHead)`.
    pub size: usize,
    /// 10, 11 or 20.
    pub version: u32,
    /// Bits of [`request`].
    pub flags: u32,
    /// Method.
    pub method: Str,
    /// `http` or `https`.
    pub scheme: Str,
    /// The effective authority (RFC 9112 §3.2, RFC 9113 §8.3.1), port included where sent.
    pub authority: Str,
    /// Path and query as sent, or `*`.
    pub target: Str,
    /// `:protocol` of an extended CONNECT (RFC 8441), else empty.
    pub protocol: Str,
    /// Fields, order kept within a name.
    pub headers: *const Header,
    /// Number of `headers`.
    pub headers_len: usize,
}

/// Bits of [`RequestHead::flags`].
pub mod request {
    /// The request has no body.
    pub const END: u32 = 1;
    /// The client waits for `100 Continue` before it sends the body; `informational(100)` says so.
    /// Asking for the body does not: it then yields what a client sends that has waited enough.
    pub const EXPECT_CONTINUE: u32 = 2;
    /// `upgrade` of the responder can hand over the byte stream.
    pub const CAN_UPGRADE: u32 = 4;
}

/// A response's head. Borrowed for the call.
#[repr(C)]
pub struct ResponseHead {
    /// `sizeof(ResponseHead)`.
    pub size: usize,
    /// Status, 200 to 999 (or 101 with an upgrade).
    pub status: u32,
    /// Bits of [`response`].
    pub flags: u32,
    /// Exact length of the body, or [`LENGTH_UNKNOWN`]. `content-length` among the headers wins.
    pub body_length: u64,
    /// Fields.
    pub headers: *const Header,
    /// Number of `headers`.
    pub headers_len: usize,
}

/// Bits of [`ResponseHead::flags`] and of the `flags` of [`ResponderVt::poll_body`].
pub mod response {
    /// Nothing follows.
    pub const END: u32 = 1;
}

/// A request's body.
#[repr(C)]
pub struct Body {
    /// The host's own.
    pub data: *mut c_void,
    /// The host's functions.
    pub vt: *const BodyVt,
    /// Exact length, or [`LENGTH_UNKNOWN`].
    pub length: u64,
}

/// What [`BodyVt::poll_frame`] fills in.
#[repr(C)]
pub struct Frame {
    /// Data, owned by the caller after [`body::DATA`].
    pub data: Buf,
    /// 1 where no frame follows this one, else 0.
    pub end: u32,
    /// Trailer fields after [`body::TRAILERS`]; borrowed until the next call on this body.
    pub headers: *const Header,
    /// Number of `headers`.
    pub headers_len: usize,
    /// Why, after [`poll::CLOSED`].
    pub reset: Reset,
}

/// Tags of [`BodyVt::poll_frame`], beside [`poll::PENDING`] and [`poll::CLOSED`].
pub mod body {
    /// `frame.data` holds a chunk.
    pub const DATA: u32 = 1;
    /// `frame.headers` holds the trailers; the body has ended.
    pub const TRAILERS: u32 = 3;
    /// The body has ended.
    pub const END: u32 = 4;
}

/// Functions of a [`Body`].
#[repr(C)]
pub struct BodyVt {
    /// `sizeof(BodyVt)`.
    pub size: usize,
    /// Next frame.
    pub poll_frame:
        unsafe extern "C" fn(data: *mut c_void, waker: *const Waker, frame: *mut Frame) -> u32,
    /// Ends interest; the host drains or closes as the protocol wants.
    pub drop: unsafe extern "C" fn(data: *mut c_void),
}

/// Where a response goes.
#[repr(C)]
pub struct Responder {
    /// The host's own.
    pub data: *mut c_void,
    /// The host's functions.
    pub vt: *const ResponderVt,
}

/// Functions of a [`Responder`], in the order of use: `informational`*, `head`, `poll_body`*, `finish`.
#[repr(C)]
pub struct ResponderVt {
    /// `sizeof(ResponderVt)`.
    pub size: usize,
    /// Sends an interim response (100 to 199 but 101). [`poll::READY`], or [`poll::CLOSED`] where
    /// the transport cannot send it or the client is gone.
    pub informational: unsafe extern "C" fn(
        data: *mut c_void,
        status: u32,
        headers: *const Header,
        headers_len: usize,
    ) -> u32,
    /// Sends the head, and with it a first chunk of the body where `first` is not null (moved, also
    /// on failure). [`poll::READY`], or [`poll::CLOSED`].
    pub head:
        unsafe extern "C" fn(data: *mut c_void, head: *const ResponseHead, first: *mut Buf) -> u32,
    /// Sends a chunk. [`poll::PENDING`] leaves `chunk` with the caller: backpressure.
    pub poll_body: unsafe extern "C" fn(
        data: *mut c_void,
        waker: *const Waker,
        chunk: *mut Buf,
        flags: u32,
    ) -> u32,
    /// Ends the body, with trailers where `headers_len` is not 0.
    pub finish:
        unsafe extern "C" fn(data: *mut c_void, headers: *const Header, headers_len: usize) -> u32,
    /// Ends the exchange early: a reset on HTTP/2 (with `protocol_code` where given), a closed
    /// connection on HTTP/1. Before the head the host answers by `code` instead.
    pub abort: unsafe extern "C" fn(data: *mut c_void, reset: Reset),
    /// [`poll::CLOSED`] once the client is gone (then `reset` is filled).
    pub poll_closed:
        unsafe extern "C" fn(data: *mut c_void, waker: *const Waker, reset: *mut Reset) -> u32,
    /// After a `head` that accepts an upgrade: resolves to an [`IoOutcome`] with the client's bytes.
    pub upgrade: unsafe extern "C" fn(data: *mut c_void) -> Future,
    /// Without `finish` (or END) before: as `abort` with [`failure::PLUGIN_FAILED`].
    pub drop: unsafe extern "C" fn(data: *mut c_void),
}

/// `out` of a future that resolves to an [`Io`].
#[repr(C)]
pub struct IoOutcome {
    /// 0: `io` is valid. Else one of [`failure`].
    pub code: u32,
    /// `errno` where there is one.
    pub err: i32,
    /// The stream, owned by the caller where `code` is 0.
    pub io: Io,
}

/// One message of an exchange.
#[repr(C)]
pub struct Msg {
    /// Payload field of `TunnelMessage` (`tunnel.proto`): 9 and up, but for [`FIELD_DEDICATION`];
    /// [`FIELD_CUSTOM`] for any bytes.
    pub field: u32,
    /// Bits of [`msg`].
    pub flags: u32,
    /// First part of the encoded payload; empty on receive.
    pub head: Buf,
    /// Second part of the encoded payload; on receive all of it.
    pub body: Buf,
}

/// `TunnelMessage.custom`: bytes that only the plugin understands.
pub const FIELD_CUSTOM: u32 = 31;

/// `TunnelMessage.dedication`: the hosts' own, between the two calls of [`SendVt::dedicate`]. Since 0.5.
pub const FIELD_DEDICATION: u32 = 30;

/// Most bytes of `head` and `body` together in a message of data: 32 KiB of payload and what frames
/// it. A longer message passes, up to [`OPEN_BYTES_MAX`], and costs as much credit as one of this
/// size; what can be cut should be, so that exchanges take turns.
pub const MESSAGE_BYTES_MAX: usize = 33 * 1024;

/// Most bytes of `head` and `body` together in any message: a 64 KiB head, what frames it, and a
/// message's worth of body. An end of an exchange holds at most three and a half windows of the
/// largest messages.
pub const OPEN_BYTES_MAX: usize = 112 * 1024;

/// Bits of [`Msg::flags`].
pub mod msg {
    /// Last message of its direction.
    pub const END: u32 = 1;
}

/// The direction from here to the peer.
#[repr(C)]
pub struct SendHalf {
    /// The host's own.
    pub data: *mut c_void,
    /// The host's functions.
    pub vt: *const SendVt,
}

/// Functions of a [`SendHalf`].
#[repr(C)]
pub struct SendVt {
    /// `sizeof(SendVt)`.
    pub size: usize,
    /// Queues `message`. [`poll::READY`]: `head` and `body` are moved. [`poll::PENDING`]: they stay
    /// with the caller (backpressure). [`poll::CLOSED`]: they stay, the exchange is over.
    pub poll_send:
        unsafe extern "C" fn(data: *mut c_void, waker: *const Waker, message: *mut Msg) -> u32,
    /// Ends the direction (an empty END message) where no message with END was sent.
    pub finish: unsafe extern "C" fn(data: *mut c_void) -> u32,
    /// Ends the whole exchange, both directions, for `reset`'s reason.
    pub reset: unsafe extern "C" fn(data: *mut c_void, reset: Reset),
    /// [`poll::CLOSED`] once the exchange is over on the wire (then `reset` is filled), without
    /// reading; [`poll::PENDING`] until then. With [`failure::NONE`] it is complete, or the peer has
    /// answered and wants no more: nothing has failed, and what was received may still be read.
    pub poll_closed:
        unsafe extern "C" fn(data: *mut c_void, waker: *const Waker, reset: *mut Reset) -> u32,
    /// Sidecar's end: the first byte is about to be written to a service.
    pub dispatched: unsafe extern "C" fn(data: *mut c_void),
    /// Sidecar's end: nothing was and nothing will be written to a service. Ends the exchange.
    pub refused: unsafe extern "C" fn(data: *mut c_void, reset: Reset),
    /// An unfinished half is reset with [`failure::CANCELLED`].
    pub drop: unsafe extern "C" fn(data: *mut c_void),
    /// Moves the exchange to a connection of its own: from here on it is the bytes of `stream`, after those of
    /// `ahead` (read of it before), both ways, as they are. Resolves to a [`DedicateOutcome`]: at the end,
    /// or at once where the exchange stays as it is. Both ends call it at the same place of what they
    /// say, and have taken all messages before it. Neither half is used until it has resolved; dropping
    /// the future ends the exchange with the halves. Since 0.5.
    pub dedicate: unsafe extern "C" fn(data: *mut c_void, stream: Io, ahead: Buf) -> Future,
}

/// `out` of [`SendVt::dedicate`]. Since 0.5.
#[repr(C)]
pub struct DedicateOutcome {
    /// One of [`dedicated`].
    pub how: u32,
    /// After [`dedicated::ENDED`]: why; with [`failure::NONE`] all was said. The peer knows.
    pub reset: Reset,
    /// After [`dedicated::FRAMED`]: the stream that was given, owned by the caller.
    pub io: Io,
    /// Bytes from the stream to the peer.
    pub sent: u64,
    /// Bytes from the peer to the stream.
    pub received: u64,
}

/// Values of [`DedicateOutcome::how`]. Since 0.5.
pub mod dedicated {
    /// The exchange is over.
    pub const ENDED: u32 = 0;
    /// There is no connection for it: it goes on in messages, at both ends.
    pub const FRAMED: u32 = 1;
}

/// The direction from the peer to here.
#[repr(C)]
pub struct RecvHalf {
    /// The host's own.
    pub data: *mut c_void,
    /// The host's functions.
    pub vt: *const RecvVt,
}

/// Tags of [`RecvVt::poll_recv`], beside [`poll::PENDING`].
pub mod recv {
    /// `message` is filled and owned by the caller.
    pub const MESSAGE: u32 = 1;
    /// The exchange was reset or lost; `reset` is filled.
    pub const RESET: u32 = 2;
    /// The direction has ended.
    pub const FINISHED: u32 = 3;
}

/// Functions of a [`RecvHalf`].
#[repr(C)]
pub struct RecvVt {
    /// `sizeof(RecvVt)`.
    pub size: usize,
    /// Next message; taking it returns its credit to the peer.
    pub poll_recv: unsafe extern "C" fn(
        data: *mut c_void,
        waker: *const Waker,
        message: *mut Msg,
        reset: *mut Reset,
    ) -> u32,
    /// An unfinished half is reset with [`failure::CANCELLED`].
    pub drop: unsafe extern "C" fn(data: *mut c_void),
}

/// Both directions of an exchange, each on its own.
#[repr(C)]
pub struct Exchange {
    /// From here to the peer.
    pub send: SendHalf,
    /// From the peer to here.
    pub recv: RecvHalf,
}

/// What core knows of an exchange. Borrowed until the future that got it is dropped.
#[repr(C)]
pub struct Meta {
    /// `sizeof(Meta)`.
    pub size: usize,
    /// Monotonic deadline on the clock of [`HostVt::now`]; 0: none.
    pub deadline_ns: u64,
    /// `request_id`: unique in its session. Empty before `open`.
    pub request_id: Str,
    /// `protocol_type`.
    pub protocol_type: Str,
    /// Route's name. Empty before `open`.
    pub route: Str,
    /// Tunnel's name. Empty before `open`.
    pub tunnel: Str,
    /// Client's address, `192.0.2.1:4711` or `[2001:db8::1]:4711`.
    pub client_address: Str,
    /// The listener's name at the relay.
    pub listener: Str,
    /// `http`, `https`, or empty for a byte-born protocol.
    pub scheme: Str,
    /// Server name of the TLS handshake, or empty.
    pub tls_sni: Str,
    /// Application protocol of the TLS handshake, or empty.
    pub tls_alpn: Str,
    /// Subject of the client's certificate, or empty.
    pub tls_client: Str,
    /// `traceparent` (W3C), or empty.
    pub trace_parent: Str,
    /// The route's `options.<protocol_type>` as JSON, or empty.
    pub options: Str,
    /// Where [`meta::TRUSTED_PROXY`] is set: the proxy's own address, in the form of
    /// `client_address`, or empty where it is not known. Since 0.3.
    pub peer_address: Str,
    /// From dispatch to the service's response head, as the route says; 0: the plugin's own, or none.
    /// Since 0.3.
    pub response_head_timeout_ns: u64,
    /// Bits of [`meta`]. Since 0.3.
    pub flags: u32,
}

/// Bits of [`Meta::flags`].
pub mod meta {
    /// The client is a proxy that the relay trusts: what it wrote in `Forwarded` and `X-Forwarded-*`
    /// is added to, not replaced.
    pub const TRUSTED_PROXY: u32 = 1;
}

/// What an exchange is opened for.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct RouteKey {
    /// `sizeof(RouteKey)`.
    pub size: usize,
    /// One of [`route_key`].
    pub kind: u32,
    /// Host name for [`route_key::HOST`], port allowed.
    pub host: Str,
    /// Path for [`route_key::HOST`]; empty is `/`.
    pub path: Str,
}

/// Values of [`RouteKey::kind`].
pub mod route_key {
    /// What the listener (or SNI) has fixed.
    pub const LISTENER: u32 = 0;
    /// By `host` and `path`.
    pub const HOST: u32 = 1;
}

/// What [`OpenerVt::poll_open`] fills in.
#[repr(C)]
pub struct Opened {
    /// After [`poll::READY`]: owned by the caller.
    pub exchange: Exchange,
    /// After [`poll::READY`]: borrowed until the plugin's future is dropped.
    pub meta: *const Meta,
    /// After [`poll::CLOSED`]: why; its `detail` is borrowed until the opener is dropped.
    pub failure: Failure,
}

/// Opens the exchange of one client request or connection.
#[repr(C)]
pub struct Opener {
    /// The host's own.
    pub data: *mut c_void,
    /// The host's functions.
    pub vt: *const OpenerVt,
}

/// Functions of an [`Opener`].
#[repr(C)]
pub struct OpenerVt {
    /// `sizeof(OpenerVt)`.
    pub size: usize,
    /// Routes, authorises and opens; [`poll::READY`] or [`poll::CLOSED`] fill `out`. Nothing is sent
    /// before the first message. Yields one exchange.
    pub poll_open: unsafe extern "C" fn(
        data: *mut c_void,
        waker: *const Waker,
        key: *const RouteKey,
        out: *mut Opened,
    ) -> u32,
    /// Ends it.
    pub drop: unsafe extern "C" fn(data: *mut c_void),
}

/// The service behind a tunnel, at the sidecar.
#[repr(C)]
pub struct Service {
    /// The host's own.
    pub data: *mut c_void,
    /// The host's functions.
    pub vt: *const ServiceVt,
    /// Stable for a tunnel's name while the process lives: key of connection pools.
    pub id: u64,
    /// Changes when the tunnel's settings change: older pooled connections are stale.
    pub version: u64,
    /// Where it is, `127.0.0.1:3000`; borrowed until the service is dropped.
    pub address: Str,
}

/// Functions of a [`Service`].
#[repr(C)]
pub struct ServiceVt {
    /// `sizeof(ServiceVt)`.
    pub size: usize,
    /// Dials; resolves to an [`IoOutcome`]. The host bounds it by the connect timeout, TLS included. Where
    /// the service is spoken to by TLS, `http/1.1` is offered (ALPN).
    pub connect: unsafe extern "C" fn(data: *mut c_void) -> Future,
    /// Ends it.
    pub drop: unsafe extern "C" fn(data: *mut c_void),
    /// What the tunnel and the route ask of whoever talks to the service; borrowed until the service
    /// is dropped. Never null. Since 0.3.
    pub settings: unsafe extern "C" fn(data: *mut c_void) -> *const ServiceSettings,
    /// Asks whether this exchange may be sent to the service once more, and takes that from the route's
    /// budget. Asked only where the service cannot have processed it, or may twice. 1, or 0: what the
    /// client gets is what the last try gave. Since 0.3.
    pub retry: unsafe extern "C" fn(data: *mut c_void) -> u32,
    /// As `connect`, with the application protocols that are offered where the service is spoken to by
    /// TLS (RFC 7301), the best first; resolves to an [`AlpnOutcome`]. They are borrowed for the call;
    /// at most [`ALPN_MAX`], each of 1 to 255 bytes. None: none is offered. Since 0.4.
    pub connect_alpn: unsafe extern "C" fn(
        data: *mut c_void,
        protocols: *const Str,
        protocols_len: usize,
    ) -> Future,
}

/// Most protocols that [`ServiceVt::connect_alpn`] takes. Since 0.4.
pub const ALPN_MAX: usize = 8;

/// `out` of [`ServiceVt::connect_alpn`]. Since 0.4.
#[repr(C)]
pub struct AlpnOutcome {
    /// 0: `io` is valid. Else one of [`failure`].
    pub code: u32,
    /// `errno` where there is one.
    pub err: i32,
    /// The stream, owned by the caller where `code` is 0.
    pub io: Io,
    /// Which of the protocols was agreed on, counted from 0; [`UNSET`]: none, since the service is not
    /// spoken to by TLS, or knows nothing of ALPN.
    pub protocol: u32,
}

/// What a tunnel and a route ask of whoever talks to a service. Since 0.3.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceSettings {
    /// `sizeof(ServiceSettings)`.
    pub size: usize,
    /// Bits of [`service`].
    pub flags: u32,
    /// HTTP's major version to the service: 1, or 2 by prior knowledge, or with [`service::TLS`] by ALPN.
    /// 1 with [`service::BY_ALPN`]: what the service chooses.
    pub http_version: u32,
    /// Most times that this exchange may be sent again; 0: the route has no policy, and only what is
    /// safe in any case is.
    pub retries: u32,
    /// Unused connections to keep, per data-path thread; [`UNSET`]: the plugin's own.
    pub pool_idle: u32,
    /// Connections, used and unused, per data-path thread; [`UNSET`]: the plugin's own.
    pub pool_connections: u32,
    /// How long an unused connection is kept; [`UNSET_NS`]: the plugin's own.
    pub pool_idle_timeout_ns: u64,
}

/// Bits of [`ServiceSettings::flags`].
pub mod service {
    /// Each connection tells the service of one client: it serves the exchange that asked for it, and
    /// no other.
    pub const UNSHARED: u32 = 1;
    /// The service is spoken to by TLS. Since 0.4.
    pub const TLS: u32 = 2;
    /// The service chooses HTTP's version by ALPN, HTTP/2 before HTTP/1.1; whoever offers HTTP/1.1 alone
    /// gets that. Only with `TLS`. Since 0.4.
    pub const BY_ALPN: u32 = 4;
}

/// A count of [`ServiceSettings`] that says nothing.
pub const UNSET: u32 = u32::MAX;

/// A time of [`ServiceSettings`] that says nothing.
pub const UNSET_NS: u64 = u64::MAX;

/// The services that the host lends a plugin. Valid while the process lives.
#[repr(C)]
pub struct Host {
    /// The host's functions; its own fields follow.
    pub vt: *const HostVt,
}

/// Levels of [`HostVt::log`].
pub mod level {
    /// Worth waking someone.
    pub const ERROR: u32 = 1;
    /// Wants attention.
    pub const WARN: u32 = 2;
    /// Connection.
    pub const INFO: u32 = 3;
    /// Branch.
    pub const DEBUG: u32 = 4;
    /// Message.
    pub const TRACE: u32 = 5;
}

/// Kinds of [`HostVt::metric`].
pub mod metric {
    /// Only grows.
    pub const COUNTER: u32 = 1;
    /// Goes up and down.
    pub const GAUGE: u32 = 2;
    /// Distribution; the name ends in its unit.
    pub const HISTOGRAM: u32 = 3;
}

/// Functions of a [`Host`].
#[repr(C)]
pub struct HostVt {
    /// `sizeof(HostVt)`.
    pub size: usize,
    /// Runs `future` (its `out` is null) on this thread. 1, or 0 outside the host's data-path
    /// threads (then it is dropped).
    pub spawn: unsafe extern "C" fn(host: *const Host, future: Future) -> u32,
    /// Monotonic nanoseconds since some point before the plugin was loaded; never 0.
    pub now: unsafe extern "C" fn(host: *const Host) -> u64,
    /// A timer for `deadline_ns` on that clock.
    pub timer: unsafe extern "C" fn(host: *const Host, deadline_ns: u64) -> Timer,
    /// Dials `address` (`host:port`); resolves to an [`IoOutcome`]. `address` is borrowed for the call.
    pub connect: unsafe extern "C" fn(host: *const Host, address: Str) -> Future,
    /// Writes a log line; text is borrowed for the call.
    pub log: unsafe extern "C" fn(host: *const Host, level: u32, target: Str, text: Str),
    /// Most verbose [`level`] that is written.
    pub log_level: unsafe extern "C" fn(host: *const Host) -> u32,
    /// Registers a series of a metric; the same name and labels give the same id. 0: refused (invalid
    /// name, other label names than the metric's first series has, too many). The exposed name is
    /// `sidelane_plugin_<name>`, with the plugin's name as the label `plugin` before the others.
    /// Values come from sets that are bounded (a route's name, never a path); each is cut at 128 bytes.
    /// A histogram whose name ends in `_bytes` has buckets from 16 B to 64 MiB, any other from 0.001
    /// to about 4,000 of its unit.
    pub metric: unsafe extern "C" fn(
        host: *const Host,
        kind: u32,
        name: Str,
        help: Str,
        labels: *const Header,
        labels_len: usize,
    ) -> u32,
    /// Adds to a counter or gauge, or observes in a histogram.
    pub metric_add: unsafe extern "C" fn(host: *const Host, id: u32, value: f64),
    /// Which data-path thread this is, from 0; [`NO_SHARD`] elsewhere.
    pub shard: unsafe extern "C" fn(host: *const Host) -> u32,
    /// How many there are.
    pub shards: unsafe extern "C" fn(host: *const Host) -> u32,
    /// Runs `run(data)` on a thread that may block. It is run exactly once.
    pub blocking: unsafe extern "C" fn(
        host: *const Host,
        run: unsafe extern "C" fn(*mut c_void),
        data: *mut c_void,
    ),
    /// Joins two byte streams, half-close kept, until both directions have ended; `out` is a
    /// [`SpliceOutcome`]. Streams of the host's own are joined without passing the plugin.
    pub splice: unsafe extern "C" fn(host: *const Host, a: Io, b: Io) -> Future,
    /// Ends the exchange and resolves to [`failure::UNSUPPORTED`]; [`SendVt::dedicate`] is what moves one to
    /// a connection of its own.
    pub dedicate: unsafe extern "C" fn(host: *const Host, exchange: Exchange) -> Future,
}

/// [`HostVt::shard`] outside the data-path threads.
pub const NO_SHARD: u32 = u32::MAX;

/// `out` of [`HostVt::splice`].
#[repr(C)]
pub struct SpliceOutcome {
    /// 0, or `errno`.
    pub err: i32,
    /// Bytes from `a` to `b`.
    pub a_to_b: u64,
    /// Bytes from `b` to `a`.
    pub b_to_a: u64,
}

/// Where a call that can be refused says why. The host passes it with empty buffers; what the plugin
/// puts there is the host's to drop.
#[repr(C)]
pub struct ErrorOut {
    /// `sizeof(ErrorOut)`.
    pub size: usize,
    /// One line of text.
    pub message: Buf,
    /// Dotted path within the block (`pool.idle_timeout`), or empty.
    pub path: Buf,
}

/// A `protocol_type` that the plugin serves. Static.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct TypeDesc {
    /// Its name: upper-case letters, digits and `_`, at most 32 bytes.
    pub name: Str,
    /// One of [`born`].
    pub born: u32,
}

// SAFETY: describes immutable static text.
#[allow(unsafe_code, reason = "a static that holds a pointer needs Sync")]
unsafe impl Sync for TypeDesc {}

/// How exchanges of a type come into being at the relay.
pub mod born {
    /// From requests of the HTTP front (`claims`, `accept_http`, `refuse_http`).
    pub const HTTP: u32 = 1;
    /// From bytes of a listener (`sniff`, `accept_stream`, `refuse_stream`).
    pub const BYTES: u32 = 2;
}

/// Results of [`PluginVt::claims`]. The highest wins; between equals the type first in name order.
pub mod claim {
    /// Not mine.
    pub const NO: u32 = 0;
    /// Mine if nobody else wants it.
    pub const FALLBACK: u32 = 1;
    /// Mine.
    pub const YES: u32 = 2;
}

/// Results of [`PluginVt::sniff`].
pub mod sniff {
    /// Not mine.
    pub const NO: u32 = 0;
    /// Mine.
    pub const YES: u32 = 1;
    /// Cannot say yet.
    pub const NEED_MORE: u32 = 2;
}

/// A plugin's functions. `plugin` is what `create` returned; `protocol` is an index into `types`.
/// Functions that return a [`Future`] resolve with `out: *mut u32`, one of [`failure`]
/// ([`failure::NONE`]: ended well). What such a call borrows is valid until its future is dropped.
#[repr(C)]
pub struct PluginVt {
    /// `sizeof(PluginVt)`.
    pub size: usize,
    /// The protocol types served.
    pub types: *const TypeDesc,
    /// Number of `types`, 1 to 8.
    pub types_len: usize,
    /// Makes an instance from the configuration block (JSON text; `null` where the file has none).
    /// Null: refused, `error` is filled.
    pub create:
        unsafe extern "C" fn(host: *const Host, config: Str, error: *mut ErrorOut) -> *mut c_void,
    /// Checks a route's `options.<protocol_type>` (JSON text). 1, or 0 with `error` filled.
    pub validate_route: unsafe extern "C" fn(
        plugin: *mut c_void,
        protocol: u32,
        options: Str,
        error: *mut ErrorOut,
    ) -> u32,
    /// Pure. One of [`claim`]. Null where no type is [`born::HTTP`].
    pub claims: Option<
        unsafe extern "C" fn(plugin: *mut c_void, protocol: u32, head: *const RequestHead) -> u32,
    >,
    /// Pure. One of [`sniff`]; may point `host` at a part of `bytes`. Null where no type is [`born::BYTES`].
    pub sniff: Option<
        unsafe extern "C" fn(plugin: *mut c_void, protocol: u32, bytes: Str, host: *mut Str) -> u32,
    >,
    /// Relay's end of an HTTP-born exchange.
    pub accept_http: Option<
        unsafe extern "C" fn(
            plugin: *mut c_void,
            protocol: u32,
            head: *const RequestHead,
            meta: *const Meta,
            body: Body,
            responder: Responder,
            opener: Opener,
        ) -> Future,
    >,
    /// Relay's end of a byte-born exchange.
    pub accept_stream: Option<
        unsafe extern "C" fn(
            plugin: *mut c_void,
            protocol: u32,
            meta: *const Meta,
            client: Io,
            opener: Opener,
        ) -> Future,
    >,
    /// Sidecar's end.
    pub deliver: unsafe extern "C" fn(
        plugin: *mut c_void,
        protocol: u32,
        meta: *const Meta,
        exchange: Exchange,
        service: Service,
    ) -> Future,
    /// Says `failure` to an HTTP client in the protocol's words.
    pub refuse_http: Option<
        unsafe extern "C" fn(
            plugin: *mut c_void,
            protocol: u32,
            head: *const RequestHead,
            responder: Responder,
            failure: *const Failure,
        ) -> Future,
    >,
    /// Says `failure` on a byte stream in the protocol's words.
    pub refuse_stream: Option<
        unsafe extern "C" fn(
            plugin: *mut c_void,
            protocol: u32,
            client: Io,
            failure: *const Failure,
        ) -> Future,
    >,
    /// The end of this generation, or of the process, is near: end idle connections, finish what
    /// runs. What still runs at `deadline_ns` (on the clock of [`HostVt::now`]) is cut. Few new
    /// exchanges come, or none. Each running call is polled once after this returns, so that it may
    /// take its leave in its protocol's words. May be called again; the earliest deadline counts.
    pub drain: unsafe extern "C" fn(plugin: *mut c_void, deadline_ns: u64),
    /// Frees the instance. All its futures, exchanges and tasks are gone.
    pub destroy: unsafe extern "C" fn(plugin: *mut c_void),
}

// SAFETY: a table of function pointers and a pointer to static descriptions.
#[allow(unsafe_code, reason = "a static that holds a pointer needs Sync")]
unsafe impl Sync for PluginVt {}
