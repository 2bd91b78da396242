//! The plugin's entry points: a [`Protocol`] as an `abi::PluginVt`, and the stamp that leads to it.

use std::ffi::c_void;
use std::future::Future;
use std::pin::Pin;
use std::ptr::{self, NonNull};
use std::task::Poll;

use sidelane_abi as abi;

use super::body::Body;
use super::buf::Buf;
use super::context::{self, Panicked};
use super::exchange::{End, Exchange, Opener, failure_from_raw};
use super::future::{Hosted, drop_boxed, panicked};
use super::host::{Host, Level};
use super::io::ByteStream;
use super::request::{Meta, Request, RequestHead};
use super::responder::Responder;
use super::service::Service;
use super::text::{bytes, lend};
use super::waker::with_context;
use crate::protocol::{Born, Claim, Protocol, Sniff};
use crate::{ConfigError, Error, Failure, Instant, Reset, failure};

/// Most types of one plugin (`abi::PluginVt::types_len`).
const TYPES_MAX: usize = 8;

/// Longest name of a type (`abi::TypeDesc::name`).
const TYPE_NAME_BYTES_MAX: usize = 32;

/// Makes the stamp of a library that exports `T`.
#[must_use]
pub const fn stamp<T: Protocol>(name: &str, version: &str, unwinds: bool) -> abi::Stamp {
    abi::Stamp {
        magic: abi::MAGIC,
        #[allow(clippy::cast_possible_truncation, reason = "a few hundred bytes")]
        size: size_of::<abi::Stamp>() as u32,
        abi_major: abi::ABI_MAJOR,
        abi_minor: abi::ABI_MINOR,
        panic: if unwinds { abi::panic_strategy::UNWIND } else { abi::panic_strategy::ABORT },
        name: padded(name),
        version: padded(version),
        toolchain: padded(env!("SIDELANE_TOOLCHAIN")),
        plugin: vtable::<T>(),
    }
}

/// Returns the entry points of `T`, as its library exports them.
#[must_use]
pub const fn vtable<T: Protocol>() -> &'static abi::PluginVt {
    const { &Entry::<T>::VT }
}

/// Cuts what does not fit, and keeps a NUL at the end.
const fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut out = [0; N];
    let text = text.as_bytes();
    let mut i = 0;
    while i < text.len() && i + 1 < N {
        out[i] = text[i];
        i += 1;
    }
    out
}

/// An instance, as the host holds it.
struct Entry<T> {
    host: Host,
    protocol: T,
}

impl<T: Protocol> Entry<T> {
    const TYPES: &'static [abi::TypeDesc; TYPES_MAX] = &{
        assert!(
            !T::TYPES.is_empty() && T::TYPES.len() <= TYPES_MAX,
            "a plugin serves 1 to 8 types"
        );
        let born = match T::BORN {
            Born::Http => abi::born::HTTP,
            Born::Bytes => abi::born::BYTES,
        };
        let mut types = [abi::TypeDesc { name: lend(b""), born }; TYPES_MAX];
        let mut i = 0;
        while i < T::TYPES.len() {
            assert!(
                valid_type(T::TYPES[i].as_bytes()),
                "a type's name: A-Z, 0-9, _, 1 to 32 bytes"
            );
            types[i].name = lend(T::TYPES[i].as_bytes());
            i += 1;
        }
        types
    };

    const HTTP: bool = matches!(T::BORN, Born::Http);

    const VT: abi::PluginVt = abi::PluginVt {
        size: size_of::<abi::PluginVt>(),
        types: Self::TYPES.as_ptr(),
        types_len: T::TYPES.len(),
        create: create::<T>,
        validate_route: validate_route::<T>,
        claims: if Self::HTTP { Some(claims::<T>) } else { None },
        sniff: if Self::HTTP { None } else { Some(sniff::<T>) },
        accept_http: if Self::HTTP { Some(accept_http::<T>) } else { None },
        accept_stream: if Self::HTTP { None } else { Some(accept_stream::<T>) },
        deliver: deliver::<T>,
        refuse_http: if Self::HTTP { Some(refuse_http::<T>) } else { None },
        refuse_stream: if Self::HTTP { None } else { Some(refuse_stream::<T>) },
        drain: drain::<T>,
        destroy: destroy::<T>,
    };
}

const fn valid_type(name: &[u8]) -> bool {
    let mut i = 0;
    while i < name.len() {
        if !(name[i].is_ascii_uppercase() || name[i].is_ascii_digit() || name[i] == b'_') {
            return false;
        }
        i += 1;
    }
    !name.is_empty() && name.len() <= TYPE_NAME_BYTES_MAX
}

fn type_name<T: Protocol>(protocol: u32) -> &'static str {
    T::TYPES.get(protocol as usize).copied().unwrap_or("")
}

/// # Safety
/// `plugin` came from [`create`] and outlives what is made of it: the host destroys an instance after
/// all its futures (`abi::PluginVt::destroy`).
unsafe fn entry<T>(plugin: *mut c_void) -> &'static Entry<T> {
    // SAFETY: by this function's contract; shared, never mutably borrowed.
    unsafe { &*plugin.cast::<Entry<T>>() }
}

unsafe extern "C" fn create<T: Protocol>(
    host: *const abi::Host,
    config: abi::Str,
    error: *mut abi::ErrorOut,
) -> *mut c_void {
    let Some(host) = NonNull::new(host.cast_mut()) else {
        return ptr::null_mut();
    };
    // SAFETY: valid while the process lives.
    let host = unsafe { Host::new(host) };
    context::install_panic_hook();
    #[cfg(feature = "tracing")]
    crate::trace::install();
    // SAFETY: borrowed for the call (H2).
    let config = unsafe { bytes(config) };
    let created = context::call(host, || {
        let protocol = T::new(parse_config(config)?, &host)?;
        Ok(Box::into_raw(Box::new(Entry { host, protocol })).cast::<c_void>())
    });
    let refusal = match created {
        Ok(Ok(plugin)) => return plugin,
        Ok(Err(refusal)) => refusal,
        Err(Panicked) => ConfigError::new("the plugin panicked on its configuration; see the log"),
    };
    // SAFETY: `error` is valid for the call.
    unsafe { refuse_config(error, refusal) };
    ptr::null_mut()
}

/// An absent block and an empty one mean the same, to `()` and to a struct of defaults.
fn parse_config<C: serde::de::DeserializeOwned>(json: &[u8]) -> Result<C, ConfigError> {
    let empty = match json.trim_ascii() {
        b"" | b"null" => true,
        json => json.starts_with(b"{") && json[1..].trim_ascii() == b"}",
    };
    if !empty {
        // serde would take a list for a struct, field by field.
        if matches!(json.trim_ascii_start().first(), Some(b'[' | b'"')) {
            return Err(ConfigError::new("not a block of settings (expected: name and value)"));
        }
        return parse_json(json);
    }
    // Of the two errors that of the block is the useful one: it names a missing field.
    parse_json(b"null").or_else(|_| parse_json(b"{}"))
}

fn parse_json<C: serde::de::DeserializeOwned>(json: &[u8]) -> Result<C, ConfigError> {
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let parsed = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        let message = error.into_inner().to_string();
        // The position is within the JSON that the host made of the block, no use to anybody.
        let message = message.split(" at line ").next().unwrap_or_default().to_owned();
        ConfigError { message, path: (path != ".").then_some(path) }
    })?;
    deserializer.end().map_err(|error| ConfigError::new(error.to_string()))?;
    Ok(parsed)
}

/// # Safety
/// `error` is null or valid for the call; its buffers are the host's to drop and are empty.
unsafe fn refuse_config(error: *mut abi::ErrorOut, refusal: ConfigError) {
    // SAFETY: by this function's contract.
    let Some(error) = (unsafe { error.as_mut() }) else {
        return;
    };
    error.message = Buf::from(refusal.message).into_raw();
    error.path = refusal.path.map_or_else(Buf::new, Buf::from).into_raw();
}

unsafe extern "C" fn validate_route<T: Protocol>(
    plugin: *mut c_void,
    _protocol: u32,
    options: abi::Str,
    error: *mut abi::ErrorOut,
) -> u32 {
    // SAFETY: the host's to keep alive.
    let entry = unsafe { entry::<T>(plugin) };
    // SAFETY: borrowed for the call (H2).
    let options = unsafe { bytes(options) };
    let validated = context::call(entry.host, || {
        let options = if options.trim_ascii().is_empty() { b"null" } else { options };
        let options = serde_json::from_slice(options)
            .map_err(|error| ConfigError::new(format!("options are not JSON: {error}")))?;
        entry.protocol.validate_route(&options)
    });
    let refusal = match validated {
        Ok(Ok(())) => return 1,
        Ok(Err(refusal)) => refusal,
        Err(Panicked) => ConfigError::new("the plugin panicked on these options; see the log"),
    };
    // SAFETY: `error` is valid for the call.
    unsafe { refuse_config(error, refusal) };
    0
}

unsafe extern "C" fn claims<T: Protocol>(
    plugin: *mut c_void,
    protocol: u32,
    head: *const abi::RequestHead,
) -> u32 {
    // SAFETY: the host's to keep alive.
    let entry = unsafe { entry::<T>(plugin) };
    // SAFETY: borrowed for the call (H2).
    let head = unsafe { RequestHead::new(head, type_name::<T>(protocol)) };
    match context::call(entry.host, || entry.protocol.claims(&head)) {
        Ok(Claim::No) | Err(Panicked) => abi::claim::NO,
        Ok(Claim::Fallback) => abi::claim::FALLBACK,
        Ok(Claim::Yes) => abi::claim::YES,
    }
}

unsafe extern "C" fn sniff<T: Protocol>(
    plugin: *mut c_void,
    _protocol: u32,
    first: abi::Str,
    host: *mut abi::Str,
) -> u32 {
    // SAFETY: the host's to keep alive.
    let entry = unsafe { entry::<T>(plugin) };
    // SAFETY: borrowed for the call (H2).
    let first = unsafe { bytes(first) };
    match context::call(entry.host, || entry.protocol.sniff(first)) {
        Ok(Sniff::No) | Err(Panicked) => abi::sniff::NO,
        Ok(Sniff::NeedMore) => abi::sniff::NEED_MORE,
        Ok(Sniff::Yes { host: name }) => {
            // SAFETY: null, or valid for the call.
            if let (Some(name), Some(host)) = (name, unsafe { host.as_mut() }) {
                *host = lend(name);
            }
            abi::sniff::YES
        }
    }
}

unsafe extern "C" fn accept_http<T: Protocol>(
    plugin: *mut c_void,
    protocol: u32,
    head: *const abi::RequestHead,
    meta: *const abi::Meta,
    body: abi::Body,
    responder: abi::Responder,
    opener: abi::Opener,
) -> abi::Future {
    // SAFETY: the host's to keep alive; what is moved is ours, and what is borrowed is valid until the
    // future is dropped, which is as long as the handler has it.
    let (entry, request, responder, opener) = unsafe {
        let meta = Meta::new(meta);
        let head = RequestHead::new(head, type_name::<T>(protocol));
        let request = Request { head, body: Body::new(body), meta };
        (entry::<T>(plugin), request, Responder::new(responder), Opener::new(opener, meta))
    };
    handle(entry.host, "accept_http", End::Relay, None, || {
        entry.protocol.accept_http(request, responder, opener)
    })
}

unsafe extern "C" fn accept_stream<T: Protocol>(
    plugin: *mut c_void,
    _protocol: u32,
    meta: *const abi::Meta,
    client: abi::Io,
    opener: abi::Opener,
) -> abi::Future {
    // SAFETY: as in `accept_http`.
    let (entry, client, opener) = unsafe {
        (entry::<T>(plugin), ByteStream::new(client), Opener::new(opener, Meta::new(meta)))
    };
    handle(entry.host, "accept", End::Relay, None, || entry.protocol.accept(client, opener))
}

unsafe extern "C" fn deliver<T: Protocol>(
    plugin: *mut c_void,
    _protocol: u32,
    meta: *const abi::Meta,
    exchange: abi::Exchange,
    service: abi::Service,
) -> abi::Future {
    // SAFETY: as in `accept_http`.
    let (entry, exchange, service) = unsafe {
        let exchange = Exchange::new(exchange, Meta::new(meta), End::Sidecar);
        (entry::<T>(plugin), exchange, Service::new(service))
    };
    handle(entry.host, "deliver", End::Sidecar, None, || entry.protocol.deliver(exchange, service))
}

unsafe extern "C" fn refuse_http<T: Protocol>(
    plugin: *mut c_void,
    protocol: u32,
    head: *const abi::RequestHead,
    responder: abi::Responder,
    failure: *const abi::Failure,
) -> abi::Future {
    // SAFETY: as in `accept_http`.
    let (entry, head, responder, failure) = unsafe {
        let head = RequestHead::new(head, type_name::<T>(protocol));
        (entry::<T>(plugin), head, Responder::new(responder), failure_from_raw(&*failure))
    };
    let refusal = Refusal::new(Some(head), failure);
    // SAFETY: the refusal is dropped after the future that borrows from it (`Handler`).
    let (head, failure) = unsafe { refusal.borrow() };
    handle(entry.host, "refuse_http", End::Relay, Some(refusal), || {
        entry.protocol.refuse_http(head.as_ref().expect("made with a head"), responder, failure)
    })
}

unsafe extern "C" fn refuse_stream<T: Protocol>(
    plugin: *mut c_void,
    _protocol: u32,
    client: abi::Io,
    failure: *const abi::Failure,
) -> abi::Future {
    // SAFETY: as in `accept_http`.
    let (entry, client, failure) =
        unsafe { (entry::<T>(plugin), ByteStream::new(client), failure_from_raw(&*failure)) };
    let refusal = Refusal::new(None, failure);
    // SAFETY: the refusal is dropped after the future that borrows from it (`Handler`).
    let (_, failure) = unsafe { refusal.borrow() };
    handle(entry.host, "refuse", End::Relay, Some(refusal), || {
        entry.protocol.refuse(client, failure)
    })
}

unsafe extern "C" fn drain<T: Protocol>(plugin: *mut c_void, deadline_ns: u64) {
    // SAFETY: the host's to keep alive.
    let entry = unsafe { entry::<T>(plugin) };
    let _ = context::call(entry.host, || entry.protocol.drain(Instant::from_nanos(deadline_ns)));
}

unsafe extern "C" fn destroy<T: Protocol>(plugin: *mut c_void) {
    // SAFETY: from `create`, and the host destroys it once, after all else.
    let entry = unsafe { Box::from_raw(plugin.cast::<Entry<T>>()) };
    let host = entry.host;
    let _ = context::call(host, move || drop(entry));
}

/// What a refusal lends to its handler, at an address of its own.
struct Refusal {
    owned: NonNull<(Option<RequestHead<'static>>, Failure)>,
}

// SAFETY: owns what it points at, which is `Send` and `Sync`.
unsafe impl Send for Refusal {}

impl Refusal {
    fn new(head: Option<RequestHead<'static>>, failure: Failure) -> Self {
        Self { owned: NonNull::from(Box::leak(Box::new((head, failure)))) }
    }

    /// # Safety
    /// What is returned is not used once `self` is dropped.
    #[allow(clippy::type_complexity, reason = "a pair")]
    unsafe fn borrow(&self) -> (&'static Option<RequestHead<'static>>, &'static Failure) {
        // SAFETY: owned, and by this function's contract not used later.
        let owned = unsafe { self.owned.as_ref() };
        (&owned.0, &owned.1)
    }
}

impl Drop for Refusal {
    fn drop(&mut self) {
        // SAFETY: made from a box, freed once.
        drop(unsafe { Box::from_raw(self.owned.as_ptr()) });
    }
}

/// A handler's future. The order of the fields is the order of their drops: the future first.
struct Handler<F> {
    host: Host,
    name: &'static str,
    end: End,
    future: F,
    _refusal: Option<Refusal>,
}

impl<F> Hosted for Handler<F> {
    fn host(&self) -> Host {
        self.host
    }
}

fn handle<F>(
    host: Host,
    name: &'static str,
    end: End,
    refusal: Option<Refusal>,
    make: impl FnOnce() -> F,
) -> abi::Future
where
    F: Future<Output = Result<(), Error>> + Send,
{
    // Made where it stays: a handler's future may be several KiB.
    let mut handler = Box::<Handler<F>>::new_uninit();
    let room = &mut handler;
    let made = context::poll_handler(
        host,
        move || {
            room.write(Handler { host, name, end, future: make(), _refusal: refusal });
        },
        |made| made.is_err().then_some(Reset::new(failure::PLUGIN_FAILED)),
    );
    match made {
        Ok(()) => {
            // SAFETY: written by the closure, which has ended well.
            let handler = unsafe { handler.assume_init() };
            abi::Future { data: Box::into_raw(handler).cast(), vt: const { &Handler::<F>::VT } }
        }
        Err(Panicked) => panicked(),
    }
}

impl<F: Future<Output = Result<(), Error>> + Send> Handler<F> {
    const VT: abi::FutureVt = abi::FutureVt {
        size: size_of::<abi::FutureVt>(),
        poll: poll_handler::<F>,
        drop: drop_boxed::<Self>,
    };
}

unsafe extern "C" fn poll_handler<F: Future<Output = Result<(), Error>>>(
    data: *mut c_void,
    waker: *const abi::Waker,
    out: *mut c_void,
) -> u32 {
    // SAFETY: the data of this vtable, polled by one thread at a time.
    let handler = unsafe { &mut *data.cast::<Handler<F>>() };
    let (host, name, end) = (handler.host, handler.name, handler.end);
    // SAFETY: the box is never moved out of.
    let future = unsafe { Pin::new_unchecked(&mut handler.future) };
    let polled = context::poll_handler(
        host,
        // SAFETY: the waker is borrowed for the call (H2).
        || unsafe { with_context(waker, |cx| future.poll(cx)) },
        |polled| match polled {
            Ok(Poll::Ready(Err(error))) => Some(error.reset(end.stream_failure())),
            Ok(_) => None,
            Err(Panicked) => Some(Reset::new(failure::PLUGIN_FAILED)),
        },
    );
    let code = match polled {
        Ok(Poll::Pending) => return abi::poll::PENDING,
        Err(Panicked) => return abi::poll::PANICKED,
        Ok(Poll::Ready(Ok(()))) => failure::NONE,
        Ok(Poll::Ready(Err(error))) => {
            let code = error.reset(end.stream_failure()).code;
            log_failed(host, name, code, &error);
            code
        }
    };
    // SAFETY: `out` of a handler's future is a `u32` (`abi::PluginVt`).
    unsafe { out.cast::<u32>().write(code) };
    abi::poll::READY
}

fn log_failed(host: Host, name: &str, code: u32, error: &Error) {
    let level = match code {
        failure::PLUGIN_FAILED | failure::INTERNAL | failure::UNSUPPORTED => Level::Warn,
        _ => Level::Debug,
    };
    if host.logs(level) {
        host.log(level, "sidelane_plugin", &format!("{name}: {}: {error}", failure::name(code)));
    }
}
