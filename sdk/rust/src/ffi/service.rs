//! The service behind a tunnel.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use sidelane_abi as abi;

use super::future::Foreign;
use super::io::ByteStream;
use super::text::text;
use crate::{ServiceError, failure};

/// The service behind a tunnel, at the sidecar.
pub struct Service {
    raw: abi::Service,
    /// Held around each call into the host: one thread at a time (H3).
    calls: Mutex<()>,
}

// SAFETY: H3.
unsafe impl Send for Service {}
// SAFETY: the one call through `&self` is made under `calls`.
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

    /// Dials. The host bounds it by the connect timeout.
    pub fn connect(&self) -> Connect {
        let _one = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: owned (H1), under `calls`; the future resolves to an `IoOutcome`.
        Connect { outcome: unsafe { Foreign::new(((*self.raw.vt).connect)(self.raw.data)) } }
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
