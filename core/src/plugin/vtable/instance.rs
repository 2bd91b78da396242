//! A plugin's instance: its entry points as safe functions.

use std::ffi::c_void;
use std::time::Instant;

use sidelane_abi as abi;

use super::call::{Call, Lent};
use super::exchange::{self, Failure, Meta};
use super::future::PluginFuture;
use super::http::{self, PreparedHead};
use super::{buf, io, report, service, str_of};
use crate::plugin::error::ConfigFault;
use crate::plugin::generation::ExchangePin;
use crate::plugin::host::{HostObject, clock_ns};
use crate::plugin::lend;

/// Longest text that a plugin's refusal may have; the rest is cut. Bounds a log line.
const FAULT_BYTES_MAX: usize = 4 * 1024;

/// What `create` returned, until `destroy`.
pub(in crate::plugin) struct Instance {
    vt: &'static abi::PluginVt,
    data: *mut c_void,
    host: &'static HostObject,
}

// SAFETY: a plugin's entry points are called concurrently from any thread (plugin ABI, "Threads").
unsafe impl Send for Instance {}
// SAFETY: as above.
unsafe impl Sync for Instance {}

/// What a plugin says of a connection's first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::plugin) enum Sniffed<'a> {
    No,
    Yes { host: Option<&'a str> },
    NeedMore,
}

impl Instance {
    /// Makes an instance; the configuration is JSON text.
    pub(in crate::plugin) fn create(
        vt: &'static abi::PluginVt,
        host: &'static HostObject,
        config: &str,
    ) -> Result<Self, ConfigFault> {
        let mut error = no_error();
        let entered = host.enter();
        // SAFETY: the vtable is the loader's, static and whole; text and record are lent for the
        // call; `host` lives as long as the process.
        let data = unsafe { (vt.create)(host.as_abi(), str_of(config.as_bytes()), &mut error) };
        drop(entered);
        // SAFETY: what the plugin put there is ours to drop (plugin ABI, `ErrorOut`).
        let fault = unsafe { fault_of(&mut error) };
        if data.is_null() { Err(fault) } else { Ok(Self { vt, data, host }) }
    }

    /// Checks a route's options for the type at `index`.
    pub(in crate::plugin) fn validate_route(
        &self,
        index: u32,
        options: &str,
    ) -> Result<(), ConfigFault> {
        let mut error = no_error();
        let entered = self.host.enter();
        let options = str_of(options.as_bytes());
        // SAFETY: the instance is alive, `index` one of its types; the rest is lent for the call.
        let answer = unsafe { (self.vt.validate_route)(self.data, index, options, &mut error) };
        drop(entered);
        // SAFETY: as in `create`.
        let fault = unsafe { fault_of(&mut error) };
        if answer == 1 { Ok(()) } else { Err(fault) }
    }

    /// One of [`abi::claim`].
    pub(in crate::plugin) fn claims(&self, index: u32, head: &PreparedHead) -> u32 {
        let Some(claims) = self.vt.claims else { return abi::claim::NO };
        let entered = self.host.enter();
        // SAFETY: as in `validate_route`.
        let answer = unsafe { claims(self.data, index, head.as_abi()) };
        drop(entered);
        match answer {
            abi::claim::NO | abi::claim::FALLBACK | abi::claim::YES => answer,
            abi::poll::PANICKED => {
                self.host.panicked();
                abi::claim::NO
            }
            other => {
                self.host.unknown_tag("claims", other);
                abi::claim::NO
            }
        }
    }

    /// Asks whether a connection that begins with `bytes` is the type's.
    pub(in crate::plugin) fn sniff<'a>(&self, index: u32, bytes: &'a [u8]) -> Sniffed<'a> {
        let Some(sniff) = self.vt.sniff else { return Sniffed::No };
        let mut host = abi::Str { ptr: std::ptr::null(), len: 0 };
        let entered = self.host.enter();
        // SAFETY: as in `validate_route`.
        let answer = unsafe { sniff(self.data, index, str_of(bytes), &mut host) };
        match answer {
            abi::sniff::NO => Sniffed::No,
            abi::sniff::NEED_MORE => Sniffed::NeedMore,
            abi::sniff::YES => Sniffed::Yes { host: part_of(bytes, host) },
            abi::poll::PANICKED => {
                drop(entered);
                self.host.panicked();
                Sniffed::No
            }
            other => {
                self.host.unknown_tag("sniff", other);
                Sniffed::No
            }
        }
    }

    /// Relay's end of an HTTP-born exchange.
    pub(in crate::plugin) fn accept_http(
        &self,
        pin: ExchangePin,
        index: u32,
        head: PreparedHead,
        meta: lend::Meta,
        (body, responder): (impl lend::Body, impl lend::Responder),
        opener: impl lend::Opener,
    ) -> Call {
        let Some(accept) = self.vt.accept_http else {
            return Call::ended(pin, abi::failure::UNSUPPORTED);
        };
        let (opener, owner) = exchange::lend_opener(opener);
        let body = http::lend_body(body);
        let responder = http::lend_responder(responder);
        let lent = Lent {
            head: Some(head),
            meta: Some(Meta::new(meta)),
            _opener: Some(owner),
            failure: None,
        };
        Call::start(pin, lent, |lent| {
            let (head, meta) = (lent.head(), lent.meta());
            // SAFETY: the instance is alive (`pin`), `index` is one of its types; objects are moved;
            // head and meta stay where they are until the call has dropped the future.
            self.begin(|| unsafe { accept(self.data, index, head, meta, body, responder, opener) })
        })
    }

    /// Relay's end of a byte-born exchange.
    pub(in crate::plugin) fn accept_stream(
        &self,
        pin: ExchangePin,
        index: u32,
        meta: lend::Meta,
        client: Box<dyn lend::Stream>,
        opener: impl lend::Opener,
    ) -> Call {
        let Some(accept) = self.vt.accept_stream else {
            return Call::ended(pin, abi::failure::UNSUPPORTED);
        };
        let (opener, owner) = exchange::lend_opener(opener);
        let client = io::lend(client);
        let lent = Lent { meta: Some(Meta::new(meta)), _opener: Some(owner), ..Lent::default() };
        Call::start(pin, lent, |lent| {
            let meta = lent.meta();
            // SAFETY: as in `accept_http`.
            self.begin(|| unsafe { accept(self.data, index, meta, client, opener) })
        })
    }

    /// Sidecar's end.
    pub(in crate::plugin) fn deliver(
        &self,
        pin: ExchangePin,
        index: u32,
        meta: lend::Meta,
        (send, recv): (impl lend::SendHalf, impl lend::RecvHalf),
        service: impl lend::Service,
    ) -> Call {
        let exchange = exchange::lend_exchange(send, recv);
        let service = service::lend_service(service);
        let lent = Lent { meta: Some(Meta::new(meta)), ..Lent::default() };
        Call::start(pin, lent, |lent| {
            let meta = lent.meta();
            // SAFETY: as in `accept_http`.
            self.begin(|| unsafe { (self.vt.deliver)(self.data, index, meta, exchange, service) })
        })
    }

    /// Says `failure` to an HTTP client.
    pub(in crate::plugin) fn refuse_http(
        &self,
        pin: ExchangePin,
        index: u32,
        head: PreparedHead,
        responder: impl lend::Responder,
        failure: lend::Failure,
    ) -> Call {
        let Some(refuse) = self.vt.refuse_http else {
            return Call::ended(pin, abi::failure::UNSUPPORTED);
        };
        let responder = http::lend_responder(responder);
        let failure = Some(Failure::new(failure));
        let lent = Lent { head: Some(head), failure, ..Lent::default() };
        Call::start(pin, lent, |lent| {
            let (head, failure) = (lent.head(), lent.failure());
            // SAFETY: as in `accept_http`.
            self.begin(|| unsafe { refuse(self.data, index, head, responder, failure) })
        })
    }

    /// Says `failure` on a byte stream.
    pub(in crate::plugin) fn refuse_stream(
        &self,
        pin: ExchangePin,
        index: u32,
        client: Box<dyn lend::Stream>,
        failure: lend::Failure,
    ) -> Call {
        let Some(refuse) = self.vt.refuse_stream else {
            return Call::ended(pin, abi::failure::UNSUPPORTED);
        };
        let client = io::lend(client);
        let lent = Lent { failure: Some(Failure::new(failure)), ..Lent::default() };
        Call::start(pin, lent, |lent| {
            let failure = lent.failure();
            // SAFETY: as in `accept_http`.
            self.begin(|| unsafe { refuse(self.data, index, client, failure) })
        })
    }

    /// Tells that what runs at `deadline` is cut.
    pub(in crate::plugin) fn drain(&self, deadline: Instant) {
        let entered = self.host.enter();
        // SAFETY: the instance is alive.
        unsafe { (self.vt.drain)(self.data, clock_ns(deadline)) };
        drop(entered);
    }

    fn begin(&self, call: impl FnOnce() -> abi::Future) -> Option<PluginFuture> {
        let entered = self.host.enter();
        let raw = call();
        drop(entered);
        // SAFETY: the future was just moved here by the plugin that has this host.
        let future = unsafe { PluginFuture::new(raw, self.host) };
        if future.is_none() {
            tracing::warn!(plugin = self.host.plugin(), "the plugin gave no future for a call");
        }
        future
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        let entered = self.host.enter();
        // SAFETY: the last owner is gone, and with it every call and task (generation.rs).
        unsafe { (self.vt.destroy)(self.data) };
        drop(entered);
    }
}

fn no_error() -> abi::ErrorOut {
    abi::ErrorOut { size: size_of::<abi::ErrorOut>(), message: buf::EMPTY, path: buf::EMPTY }
}

/// # Safety
/// The plugin has filled `error`, or left it.
unsafe fn fault_of(error: &mut abi::ErrorOut) -> ConfigFault {
    let text = |buf: &mut abi::Buf| {
        // SAFETY: what the plugin puts there is moved (plugin ABI, `ErrorOut`).
        let bytes = unsafe { buf::take(buf) }.unwrap_or_default();
        let kept = &bytes[..bytes.len().min(FAULT_BYTES_MAX)];
        String::from_utf8_lossy(kept).replace(['\r', '\n'], " ")
    };
    let (message, path) = (text(&mut error.message), text(&mut error.path));
    let message = if message.is_empty() { "without saying why".to_owned() } else { message };
    ConfigFault { message, path }
}

/// Returns the part of `bytes` that `host` points at, where it is text.
fn part_of(bytes: &[u8], host: abi::Str) -> Option<&str> {
    if host.len == 0 {
        return None;
    }
    let start = (host.ptr as usize).wrapping_sub(bytes.as_ptr() as usize);
    let end = start.checked_add(host.len).filter(|&end| end <= bytes.len());
    let Some(end) = end else {
        report("sniff", super::Invalid::Bounds);
        return None;
    };
    std::str::from_utf8(&bytes[start..end]).map_err(|_| report("sniff", super::Invalid::Text)).ok()
}
