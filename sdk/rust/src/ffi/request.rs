//! What the host says of a request and of an exchange. Borrowed, read in place.

use std::fmt;
use std::mem::offset_of;
use std::time::Duration;

use sidelane_abi as abi;

use super::text::{bytes, text};
use crate::{Body, Instant};

/// An HTTP request's head.
#[derive(Clone, Copy)]
pub struct RequestHead<'a> {
    raw: &'a abi::RequestHead,
    protocol_type: &'static str,
}

// SAFETY: immutable for `'a` (H2).
unsafe impl Send for RequestHead<'_> {}
// SAFETY: as above.
unsafe impl Sync for RequestHead<'_> {}

impl<'a> RequestHead<'a> {
    /// # Safety
    /// `raw` and what it leads to is valid for `'a` (H2).
    pub(crate) const unsafe fn new(
        raw: *const abi::RequestHead,
        protocol_type: &'static str,
    ) -> Self {
        // SAFETY: by this function's contract.
        Self { raw: unsafe { &*raw }, protocol_type }
    }

    /// Which of the plugin's types is asked.
    #[must_use]
    pub const fn protocol_type(&self) -> &'static str {
        self.protocol_type
    }

    /// Method.
    #[must_use]
    pub fn method(&self) -> &'a str {
        // SAFETY: valid for `'a` (H2).
        unsafe { text(self.raw.method) }
    }

    /// `http` or `https`.
    #[must_use]
    pub fn scheme(&self) -> &'a str {
        // SAFETY: valid for `'a` (H2).
        unsafe { text(self.raw.scheme) }
    }

    /// The effective authority (RFC 9112 §3.2, RFC 9113 §8.3.1), port included where sent.
    #[must_use]
    pub fn authority(&self) -> &'a [u8] {
        // SAFETY: valid for `'a` (H2).
        unsafe { bytes(self.raw.authority) }
    }

    /// Path and query as sent, or `*`.
    #[must_use]
    pub fn target(&self) -> &'a [u8] {
        // SAFETY: valid for `'a` (H2).
        unsafe { bytes(self.raw.target) }
    }

    /// `:protocol` of an extended CONNECT (RFC 8441).
    #[must_use]
    pub fn protocol(&self) -> Option<&'a [u8]> {
        // SAFETY: valid for `'a` (H2).
        let protocol = unsafe { bytes(self.raw.protocol) };
        (!protocol.is_empty()).then_some(protocol)
    }

    /// 10, 11 or 20.
    #[must_use]
    pub const fn version(&self) -> u32 {
        self.raw.version
    }

    /// The fields, names in lower case, order kept within a name.
    #[must_use]
    pub fn headers(&self) -> HeaderIter<'a> {
        // SAFETY: valid for `'a` (H2).
        unsafe { HeaderIter::new(self.raw.headers, self.raw.headers_len) }
    }

    /// The first field of a name, given in lower case.
    #[must_use]
    pub fn header(&self, name: &[u8]) -> Option<&'a [u8]> {
        self.headers().find(|(candidate, _)| *candidate == name).map(|(_, value)| value)
    }

    /// The request has no body.
    #[must_use]
    pub const fn ends(&self) -> bool {
        self.raw.flags & abi::request::END != 0
    }

    /// The client waits for `100 Continue` before it sends the body. Asking for the body does not tell
    /// it to: `informational(100)` does.
    #[must_use]
    pub const fn expects_continue(&self) -> bool {
        self.raw.flags & abi::request::EXPECT_CONTINUE != 0
    }

    /// [`Responder::upgrade`](crate::Responder::upgrade) can hand over the byte stream.
    #[must_use]
    pub const fn can_upgrade(&self) -> bool {
        self.raw.flags & abi::request::CAN_UPGRADE != 0
    }
}

impl fmt::Debug for RequestHead<'_> {
    /// Without the fields, which may hold secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestHead")
            .field("method", &self.method())
            .field("authority", &self.authority().escape_ascii().to_string())
            .field("target", &self.target().escape_ascii().to_string())
            .field("version", &self.version())
            .finish_non_exhaustive()
    }
}

/// Borrowed header fields: name, value.
#[derive(Clone)]
pub struct HeaderIter<'a> {
    fields: std::slice::Iter<'a, abi::Header>,
}

// SAFETY: immutable for `'a` (H2).
unsafe impl Send for HeaderIter<'_> {}
// SAFETY: as above.
unsafe impl Sync for HeaderIter<'_> {}

impl HeaderIter<'_> {
    /// # Safety
    /// The fields and what they lead to are valid for the iterator's lifetime (H2).
    pub(crate) unsafe fn new(headers: *const abi::Header, len: usize) -> Self {
        let fields = if headers.is_null() || len == 0 {
            &[]
        } else {
            // SAFETY: by this function's contract.
            unsafe { std::slice::from_raw_parts(headers, len) }
        };
        Self { fields: fields.iter() }
    }
}

impl<'a> Iterator for HeaderIter<'a> {
    type Item = (&'a [u8], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        // SAFETY: valid for `'a` (`new`).
        self.fields.next().map(|field| unsafe { (bytes(field.name), bytes(field.value)) })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.fields.size_hint()
    }
}

impl ExactSizeIterator for HeaderIter<'_> {}

/// An HTTP request.
#[derive(Debug)]
pub struct Request<'a> {
    /// Its head.
    pub head: RequestHead<'a>,
    /// Its body.
    pub body: Body,
    /// What the host knows of the client.
    pub meta: Meta<'a>,
}

/// What the host knows of an exchange.
#[derive(Clone, Copy)]
pub struct Meta<'a> {
    raw: &'a abi::Meta,
}

// SAFETY: immutable for `'a` (H2).
unsafe impl Send for Meta<'_> {}
// SAFETY: as above.
unsafe impl Sync for Meta<'_> {}

macro_rules! texts {
    ($($(#[$doc:meta])* $name:ident)*) => {$(
        $(#[$doc])*
        #[must_use]
        pub fn $name(&self) -> &'a str {
            // SAFETY: valid for `'a` (H2).
            unsafe { text(self.raw.$name) }
        }
    )*};
}

impl<'a> Meta<'a> {
    /// # Safety
    /// `raw` and what it leads to is valid for `'a` (H2).
    pub(crate) const unsafe fn new(raw: *const abi::Meta) -> Self {
        // SAFETY: by this function's contract.
        Self { raw: unsafe { &*raw } }
    }

    texts! {
        /// Unique in its session, the same at both ends. Empty before `open`.
        request_id
        /// The `protocol_type`.
        protocol_type
        /// The route's name. Empty before `open`.
        route
        /// The tunnel's name. Empty before `open`.
        tunnel
        /// The client's address, `192.0.2.1:4711` or `[2001:db8::1]:4711`.
        client_address
        /// The listener's name at the relay.
        listener
        /// `http`, `https`, or empty for a byte-born protocol.
        scheme
        /// Server name of the TLS handshake, or empty.
        tls_sni
        /// Application protocol of the TLS handshake, or empty.
        tls_alpn
        /// Subject of the client's certificate, or empty.
        tls_client
        /// `traceparent` (W3C), or empty.
        trace_parent
        /// The route's `options.<protocol_type>` as JSON, or empty.
        options
    }

    /// Whether the client is a proxy that the relay trusts: what it wrote in `Forwarded` and
    /// `X-Forwarded-*` is added to, not replaced.
    #[must_use]
    pub const fn is_trusted_proxy(&self) -> bool {
        self.has(offset_of!(abi::Meta, flags) + size_of::<u32>())
            && self.raw.flags & abi::meta::TRUSTED_PROXY != 0
    }

    /// Address of the proxy that [`Self::is_trusted_proxy`] says there is, in the form of
    /// `client_address`; empty where it is not known.
    #[must_use]
    pub fn peer_address(&self) -> &'a str {
        if !self.has(offset_of!(abi::Meta, peer_address) + size_of::<abi::Str>()) {
            return "";
        }
        // SAFETY: valid for `'a` (H2).
        unsafe { text(self.raw.peer_address) }
    }

    /// How long the service may take from dispatch to its response head, where the route says it.
    #[must_use]
    pub fn response_head_timeout(&self) -> Option<Duration> {
        let known = self.has(offset_of!(abi::Meta, response_head_timeout_ns) + size_of::<u64>());
        (known && self.raw.response_head_timeout_ns != 0)
            .then(|| Duration::from_nanos(self.raw.response_head_timeout_ns))
    }

    /// Whether the record is as long: what is beyond, a host of an older ABI did not fill.
    const fn has(&self, bytes: usize) -> bool {
        self.raw.size >= bytes
    }

    /// The client's deadline, on the host's clock.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        (self.raw.deadline_ns != 0).then(|| Instant::from_nanos(self.raw.deadline_ns))
    }
}

impl fmt::Debug for Meta<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Meta")
            .field("request_id", &self.request_id())
            .field("protocol_type", &self.protocol_type())
            .field("route", &self.route())
            .field("tunnel", &self.tunnel())
            .field("client_address", &self.client_address())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(size: usize) -> abi::Meta {
        let none = abi::Str { ptr: std::ptr::null(), len: 0 };
        let peer = "192.0.2.9:1";
        abi::Meta {
            size,
            deadline_ns: 0,
            request_id: none,
            protocol_type: none,
            route: none,
            tunnel: none,
            client_address: none,
            listener: none,
            scheme: none,
            tls_sni: none,
            tls_alpn: none,
            tls_client: none,
            trace_parent: none,
            options: none,
            peer_address: abi::Str { ptr: peer.as_ptr(), len: peer.len() },
            response_head_timeout_ns: 7,
            flags: abi::meta::TRUSTED_PROXY,
        }
    }

    #[test]
    fn what_a_host_of_an_older_abi_did_not_fill_is_absent() {
        let whole = record(size_of::<abi::Meta>());
        // SAFETY: valid for the scope, with static text.
        let meta = unsafe { Meta::new(&raw const whole) };
        assert!(meta.is_trusted_proxy());
        assert_eq!(meta.peer_address(), "192.0.2.9:1");
        assert_eq!(meta.response_head_timeout(), Some(Duration::from_nanos(7)));

        let older = record(offset_of!(abi::Meta, peer_address));
        // SAFETY: as above.
        let meta = unsafe { Meta::new(&raw const older) };
        assert!(!meta.is_trusted_proxy());
        assert_eq!((meta.peer_address(), meta.response_head_timeout()), ("", None));
    }
}
