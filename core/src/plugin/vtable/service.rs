//! The service behind a tunnel, as a plugin dials it.

use std::ffi::c_void;

use sidelane_abi as abi;

use super::exchange::nanos;
use super::{Counted, Invalid, bytes_of, future, guard, io, report, str_of};
use crate::plugin::lend::{self, HttpVersion};
use crate::tls::HTTP1_ALPN;

/// Returns the service to give a plugin.
pub(super) fn lend_service<S: lend::Service>(service: S) -> abi::Service {
    let settings = settings_to_abi(service.settings());
    let lent = Box::new(Service { service, settings, _counted: Counted::new() });
    let (id, version) = (lent.service.id(), lent.service.version());
    let data = Box::into_raw(lent);
    // SAFETY: just leaked. The address is borrowed from where the service stays until `drop`.
    let address = str_of(unsafe { &(*data).service }.address().as_bytes());
    abi::Service { data: data.cast(), vt: &Service::<S>::VT, id, version, address }
}

fn settings_to_abi(settings: lend::ServiceSettings) -> abi::ServiceSettings {
    let flag = |is_set, flag| if is_set { flag } else { 0 };
    let flags = flag(!settings.shared, abi::service::UNSHARED)
        | flag(settings.tls, abi::service::TLS)
        | flag(settings.http_version == HttpVersion::Auto, abi::service::BY_ALPN);
    abi::ServiceSettings {
        size: size_of::<abi::ServiceSettings>(),
        flags,
        http_version: match settings.http_version {
            // A plugin that knows nothing of ALPN offers HTTP/1.1, and speaks it.
            HttpVersion::Http1 | HttpVersion::Auto => 1,
            HttpVersion::Http2 => 2,
        },
        retries: settings.retries,
        pool_idle: settings.pool_idle.unwrap_or(abi::UNSET),
        pool_connections: settings.pool_connections.unwrap_or(abi::UNSET),
        pool_idle_timeout_ns: settings.pool_idle_timeout.map_or(abi::UNSET_NS, nanos),
    }
}

struct Service<S> {
    service: S,
    settings: abi::ServiceSettings,
    _counted: Counted,
}

impl<S: lend::Service> Service<S> {
    const VT: abi::ServiceVt = abi::ServiceVt {
        size: size_of::<abi::ServiceVt>(),
        connect: Self::connect,
        drop: Self::drop,
        settings: Self::settings,
        retry: Self::retry,
        connect_alpn: Self::connect_alpn,
    };

    unsafe extern "C" fn settings(data: *mut c_void) -> *const abi::ServiceSettings {
        // SAFETY: `data` is what `lend_service` leaked; shared, since `address` is borrowed from it.
        let this = unsafe { &*data.cast::<Self>() };
        &raw const this.settings
    }

    unsafe extern "C" fn retry(data: *mut c_void) -> u32 {
        // SAFETY: as in `settings`.
        let this = unsafe { &*data.cast::<Self>() };
        guard("service.retry", 0, || u32::from(this.service.retry()))
    }

    unsafe extern "C" fn connect(data: *mut c_void) -> abi::Future {
        // SAFETY: `data` is what `lend_service` leaked; shared, since `address` is borrowed from it.
        let this = unsafe { &*data.cast::<Self>() };
        let offered = vec![HTTP1_ALPN.to_vec()];
        let connect = guard("service.connect", None, || Some(this.service.connect(offered)));
        future::lend(async move {
            let abi::AlpnOutcome { code, err, io, protocol: _ } = match connect {
                Some(connect) => io::connected(connect).await,
                None => io::not_connected(abi::failure::INTERNAL, 0),
            };
            abi::IoOutcome { code, err, io }
        })
    }

    unsafe extern "C" fn connect_alpn(
        data: *mut c_void,
        protocols: *const abi::Str,
        protocols_len: usize,
    ) -> abi::Future {
        // SAFETY: as in `connect`.
        let this = unsafe { &*data.cast::<Self>() };
        // SAFETY: the plugin lends the protocols for the call.
        let connect = match unsafe { offered(protocols, protocols_len) } {
            Ok(offered) => {
                guard("service.connect_alpn", None, || Some(this.service.connect(offered)))
            }
            Err(invalid) => {
                report("service.connect_alpn", invalid);
                None
            }
        };
        future::lend(async move {
            match connect {
                Some(connect) => io::connected(connect).await,
                None => io::not_connected(abi::failure::INTERNAL, 0),
            }
        })
    }

    unsafe extern "C" fn drop(data: *mut c_void) {
        // SAFETY: `data` is what `lend_service` leaked, dropped once.
        let lent = unsafe { Box::from_raw(data.cast::<Self>()) };
        guard("service.drop", (), || drop(lent));
    }
}

/// Returns the protocols that a plugin offers.
///
/// # Safety
/// `protocols` leads to that many texts, which are valid for the call.
unsafe fn offered(protocols: *const abi::Str, len: usize) -> Result<Vec<Vec<u8>>, Invalid> {
    if len == 0 {
        return Ok(Vec::new());
    }
    if protocols.is_null() {
        return Err(Invalid::NullPointer);
    }
    if len > abi::ALPN_MAX {
        return Err(Invalid::Protocols);
    }
    // SAFETY: by this function's contract.
    let protocols = unsafe { std::slice::from_raw_parts(protocols, len) };
    let mut offered = Vec::with_capacity(len);
    for protocol in protocols {
        // SAFETY: by this function's contract.
        let protocol = unsafe { bytes_of(*protocol) }?;
        // RFC 7301 §3.1.
        if protocol.is_empty() || protocol.len() > usize::from(u8::MAX) {
            return Err(Invalid::Protocols);
        }
        offered.push(protocol.to_vec());
    }
    Ok(offered)
}
