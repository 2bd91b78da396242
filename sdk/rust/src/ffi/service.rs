//! The service behind a tunnel.

use std::future::Future;
use std::mem::offset_of;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use sidelane_abi as abi;

use super::future::Foreign;
use super::io::ByteStream;
use super::text::text;
use crate::{ServiceError, failure};

/// Which HTTP a service is spoken to by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HttpVersion {
    /// HTTP/1.1.
    #[default]
    Http1,
    /// HTTP/2: by ALPN with TLS, by prior knowledge without.
    Http2,
    /// What the service chooses by ALPN, HTTP/2 before HTTP/1.1; only with TLS.
    ByAlpn,
}

/// What a tunnel and a route ask of whoever talks to a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceSettings {
    /// A connection may serve exchanges of several clients; where not, it serves the one exchange that
    /// asked for it.
    pub shared: bool,
    /// HTTP's major version to the service.
    pub http_version: HttpVersion,
    /// The service is spoken to by TLS.
    pub tls: bool,
    /// Most times that this exchange may be sent again, each asked for by [`Service::retry`]; 0: the
    /// route has no policy, and only what is safe in any case is.
    pub retries: u32,
    /// Unused connections to keep, per data-path thread; `None`: the plugin's own.
    pub pool_idle: Option<u32>,
    /// Connections, used and unused, per data-path thread; `None`: the plugin's own.
    pub pool_connections: Option<u32>,
    /// How long an unused connection is kept; `None`: the plugin's own.
    pub pool_idle_timeout: Option<Duration>,
}

impl Default for ServiceSettings {
    fn default() -> Self {
        Self {
            shared: true,
            http_version: HttpVersion::Http1,
            tls: false,
            retries: 0,
            pool_idle: None,
            pool_connections: None,
            pool_idle_timeout: None,
        }
    }
}

/// The service behind a tunnel, at the sidecar.
pub struct Service {
    raw: abi::Service,
    /// Held around each call into the host: one thread at a time (H3).
    calls: Mutex<()>,
}

// SAFETY: H3.
unsafe impl Send for Service {}
// SAFETY: the calls through `&self` are made under `calls`.
unsafe impl Sync for Service {}

impl Service {
    /// # Safety
    /// `raw` is moved to the caller (H1).
    pub(crate) const unsafe fn new(raw: abi::Service) -> Self {
        Self { raw, calls: Mutex::new(()) }
    }

    /// Stable for a tunnel's name while the process lives: the key of connection pools.
    #[must_use]
    pub const fn id(&self) -> u64 {
        self.raw.id
    }

    /// Changes when the tunnel's settings change: older pooled connections are stale.
    #[must_use]
    pub const fn version(&self) -> u64 {
        self.raw.version
    }

    /// Where it is, `127.0.0.1:3000`.
    #[must_use]
    pub fn address(&self) -> &str {
        // SAFETY: borrowed until the service is dropped.
        unsafe { text(self.raw.address) }
    }

    /// What the tunnel and the route ask of whoever talks to the service.
    #[must_use]
    pub fn settings(&self) -> ServiceSettings {
        let known = offset_of!(abi::ServiceVt, settings) + size_of::<usize>();
        // SAFETY: owned (H1).
        let vt = unsafe { &*self.raw.vt };
        if vt.size < known {
            return ServiceSettings::default();
        }
        let _one = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: owned (H1), under `calls`; never null, borrowed until the service is dropped.
        let raw = unsafe { &*(vt.settings)(self.raw.data) };
        let count = |count: u32| (count != abi::UNSET).then_some(count);
        ServiceSettings {
            shared: raw.flags & abi::service::UNSHARED == 0,
            http_version: match raw.http_version {
                2 => HttpVersion::Http2,
                _ if raw.flags & abi::service::BY_ALPN != 0 => HttpVersion::ByAlpn,
                _ => HttpVersion::Http1,
            },
            tls: raw.flags & abi::service::TLS != 0,
            retries: raw.retries,
            pool_idle: count(raw.pool_idle),
            pool_connections: count(raw.pool_connections),
            pool_idle_timeout: (raw.pool_idle_timeout_ns != abi::UNSET_NS)
                .then(|| Duration::from_nanos(raw.pool_idle_timeout_ns)),
        }
    }

    /// Asks whether this exchange may be sent to the service once more, and takes that from the route's
    /// budget. To be asked only where the service cannot have processed it, or may twice.
    #[must_use]
    pub fn retry(&self) -> bool {
        let known = offset_of!(abi::ServiceVt, retry) + size_of::<usize>();
        // SAFETY: owned (H1).
        let vt = unsafe { &*self.raw.vt };
        if vt.size < known {
            return false;
        }
        let _one = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: owned (H1), under `calls`.
        unsafe { (vt.retry)(self.raw.data) == 1 }
    }

    /// Dials. The host bounds it by the connect timeout, TLS included. Where the service is spoken to by
    /// TLS, `http/1.1` is offered (ALPN).
    pub fn connect(&self) -> Connect {
        let _one = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: owned (H1), under `calls`; the future resolves to an `IoOutcome`.
        Connect { outcome: unsafe { Foreign::new(((*self.raw.vt).connect)(self.raw.data)) } }
    }
}

impl Service {
    /// As [`Self::connect`], with the application protocols that are offered where the service is spoken to
    /// by TLS (RFC 7301), the best first: at most [`abi::ALPN_MAX`]. None: none is offered. A host before
    /// ABI 0.4 speaks no TLS, and dials.
    pub fn connect_alpn(&self, protocols: &'static [&'static str]) -> ConnectAlpn {
        let known = offset_of!(abi::ServiceVt, connect_alpn) + size_of::<usize>();
        // SAFETY: owned (H1).
        let vt = unsafe { &*self.raw.vt };
        if vt.size < known {
            return ConnectAlpn(Dialling::Plain(self.connect()));
        }
        let mut offered = [abi::Str { ptr: std::ptr::null(), len: 0 }; abi::ALPN_MAX];
        for (offer, protocol) in offered.iter_mut().zip(protocols) {
            *offer = abi::Str { ptr: protocol.as_ptr(), len: protocol.len() };
        }
        let count = protocols.len().min(offered.len());
        let _one = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: owned (H1), under `calls`; the protocols are valid for the call.
        let future = unsafe { (vt.connect_alpn)(self.raw.data, offered.as_ptr(), count) };
        // SAFETY: the future resolves to an `AlpnOutcome`.
        ConnectAlpn(Dialling::Alpn { outcome: unsafe { Foreign::new(future) }, protocols })
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // SAFETY: owned (H1), dropped once.
        unsafe { ((*self.raw.vt).drop)(self.raw.data) }
    }
}

impl std::fmt::Debug for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Service")
            .field("id", &self.id())
            .field("version", &self.version())
            .field("address", &self.address())
            .finish()
    }
}

/// A connection on its way. Dropping it gives up.
pub struct Connect {
    outcome: Foreign<abi::IoOutcome>,
}

impl Connect {
    pub(crate) const fn new(outcome: Foreign<abi::IoOutcome>) -> Self {
        Self { outcome }
    }
}

impl Future for Connect {
    type Output = Result<ByteStream, ServiceError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Poll::Ready(stream_from_outcome(ready!(self.outcome.poll(cx))))
    }
}

impl std::fmt::Debug for Connect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connect").finish_non_exhaustive()
    }
}

/// A connection to a service, and what was agreed on.
#[derive(Debug)]
pub struct Connected {
    /// The bytes.
    pub stream: ByteStream,
    /// The protocol that was agreed on by ALPN; `None`: none was.
    pub protocol: Option<&'static str>,
}

/// A connection on its way ([`Service::connect_alpn`]). Dropping it gives up.
pub struct ConnectAlpn(Dialling);

enum Dialling {
    Plain(Connect),
    Alpn { outcome: Foreign<abi::AlpnOutcome>, protocols: &'static [&'static str] },
}

impl Future for ConnectAlpn {
    type Output = Result<Connected, ServiceError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            Dialling::Plain(connect) => {
                let stream = ready!(Pin::new(connect).poll(cx));
                Poll::Ready(stream.map(|stream| Connected { stream, protocol: None }))
            }
            Dialling::Alpn { outcome, protocols } => {
                let outcome = ready!(outcome.poll(cx));
                let index = outcome.as_ref().map_or(abi::UNSET, |outcome| outcome.protocol);
                let protocol = protocols.get(index as usize).copied();
                let outcome = outcome.map(|outcome| abi::IoOutcome {
                    code: outcome.code,
                    err: outcome.err,
                    io: outcome.io,
                });
                let stream = stream_from_outcome(outcome);
                Poll::Ready(stream.map(|stream| Connected { stream, protocol }))
            }
        }
    }
}

impl std::fmt::Debug for ConnectAlpn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConnectAlpn").finish_non_exhaustive()
    }
}

pub(crate) fn stream_from_outcome(
    outcome: Option<abi::IoOutcome>,
) -> Result<ByteStream, ServiceError> {
    let Some(outcome) = outcome else {
        return Err(ServiceError { code: failure::INTERNAL, errno: None });
    };
    if outcome.code != failure::NONE {
        let errno = (outcome.err != 0).then_some(outcome.err);
        return Err(ServiceError { code: outcome.code, errno });
    }
    // SAFETY: owned by the caller where `code` is 0 (`abi::IoOutcome`).
    Ok(unsafe { ByteStream::new(outcome.io) })
}

#[cfg(test)]
mod tests {
    use std::ffi::c_void;
    use std::task::Waker;

    use super::*;

    unsafe extern "C" fn nothing(_: *mut c_void) {}

    unsafe extern "C" fn refused(_: *mut c_void, _: *const abi::Waker, out: *mut c_void) -> u32 {
        let io = abi::Io { data: std::ptr::null_mut(), vt: std::ptr::null() };
        let outcome = abi::IoOutcome { code: failure::SERVICE_UNREACHABLE, err: 111, io };
        // SAFETY: `out` of the future that `connect` returned.
        unsafe { out.cast::<abi::IoOutcome>().write(outcome) };
        abi::poll::READY
    }

    unsafe extern "C" fn connect(_: *mut c_void) -> abi::Future {
        static VT: abi::FutureVt =
            abi::FutureVt { size: size_of::<abi::FutureVt>(), poll: refused, drop: nothing };
        abi::Future { data: std::ptr::null_mut(), vt: &raw const VT }
    }

    unsafe extern "C" fn no_settings(_: *mut c_void) -> *const abi::ServiceSettings {
        unreachable!("an older host has no such slot");
    }

    unsafe extern "C" fn no_retry(_: *mut c_void) -> u32 {
        unreachable!("an older host has no such slot");
    }

    unsafe extern "C" fn no_alpn(_: *mut c_void, _: *const abi::Str, _: usize) -> abi::Future {
        unreachable!("an older host has no such slot");
    }

    #[test]
    fn a_host_before_0_3_is_asked_for_no_more_than_it_has() {
        static VT: abi::ServiceVt = abi::ServiceVt {
            size: offset_of!(abi::ServiceVt, settings),
            connect,
            drop: nothing,
            settings: no_settings,
            retry: no_retry,
            connect_alpn: no_alpn,
        };
        let address = abi::Str { ptr: "a:1".as_ptr(), len: 3 };
        let data = std::ptr::null_mut();
        let raw = abi::Service { data, vt: &raw const VT, id: 1, version: 1, address };
        // SAFETY: moved.
        let service = unsafe { Service::new(raw) };
        assert_eq!(service.settings(), ServiceSettings::default());
        assert!(!service.retry());
        let mut connect = service.connect_alpn(&["h2"]);
        let mut cx = Context::from_waker(Waker::noop());
        let Poll::Ready(Err(error)) = Pin::new(&mut connect).poll(&mut cx) else {
            panic!("it refuses");
        };
        assert_eq!((error.code, error.errno), (failure::SERVICE_UNREACHABLE, Some(111)));
    }
}
