//! Calls of a plugin's functions.

use std::any::Any;
use std::ffi::c_void;
use std::sync::Arc;

use bytes::Bytes;
use sidelane_abi as abi;
use sidelane_plugin::ConfigError;

use super::buf::{self, borrowed, lend_text, text};
use super::exchange::{Opens, Peer, opener};
use super::future::PluginFuture;
use super::http::{BodySender, Fields, Response, lend_fields};
use super::io::{self, TestStream};
use super::service::TestService;
use super::vtable;
use super::world::World;
use crate::kit::{TestFailure, TestMeta, TestRequest};

/// An instance of a plugin.
pub(crate) struct Instance {
    vt: &'static abi::PluginVt,
    data: *mut c_void,
    pub(crate) world: Arc<World>,
}

fn empty_error() -> abi::ErrorOut {
    abi::ErrorOut { size: size_of::<abi::ErrorOut>(), message: buf::empty(), path: buf::empty() }
}

/// # Safety
/// Filled in by a plugin, and ours to drop.
unsafe fn config_error(error: &abi::ErrorOut) -> ConfigError {
    // SAFETY: by this function's contract.
    let (message, path) =
        unsafe { (buf::from_plugin(&error.message), buf::from_plugin(&error.path)) };
    let utf8 = |bytes: &Bytes| String::from_utf8_lossy(bytes).into_owned();
    ConfigError { message: utf8(&message), path: (!path.is_empty()).then(|| utf8(&path)) }
}

impl Instance {
    /// # Safety
    /// `vt` obeys the ABI.
    pub(crate) unsafe fn create(
        vt: &'static abi::PluginVt,
        world: Arc<World>,
        config: &str,
    ) -> Result<Self, ConfigError> {
        let host = vtable::new(&world);
        let mut error = empty_error();
        // SAFETY: the host is never freed, the text is valid for the call.
        let data = unsafe { (vt.create)(host, lend_text(config.as_bytes()), &raw mut error) };
        // SAFETY: the host's to drop, whether it is filled in or empty.
        let error = unsafe { config_error(&error) };
        if data.is_null() { Err(error) } else { Ok(Self { vt, data, world }) }
    }

    pub(crate) fn types(&self) -> Vec<(String, u32)> {
        // SAFETY: static.
        let types = unsafe { std::slice::from_raw_parts(self.vt.types, self.vt.types_len) };
        // SAFETY: static.
        types.iter().map(|desc| (unsafe { text(desc.name) }, desc.born)).collect()
    }

    /// Which functions that may be absent are there: claims, sniff, accept_http, accept_stream,
    /// refuse_http, refuse_stream.
    pub(crate) fn has(&self) -> [bool; 6] {
        let vt = self.vt;
        [
            vt.claims.is_some(),
            vt.sniff.is_some(),
            vt.accept_http.is_some(),
            vt.accept_stream.is_some(),
            vt.refuse_http.is_some(),
            vt.refuse_stream.is_some(),
        ]
    }

    pub(crate) fn validate_route(&self, protocol: u32, options: &str) -> Result<(), ConfigError> {
        let mut error = empty_error();
        let options = lend_text(options.as_bytes());
        // SAFETY: the instance is alive, the text valid for the call.
        let valid =
            unsafe { (self.vt.validate_route)(self.data, protocol, options, &raw mut error) };
        // SAFETY: the host's to drop, whether it is filled in or empty.
        let error = unsafe { config_error(&error) };
        if valid == 1 { Ok(()) } else { Err(error) }
    }

    pub(crate) fn claims(&self, protocol: u32, request: &TestRequest) -> u32 {
        let head = HeadRecord::new(request);
        // SAFETY: the instance is alive, the head valid for the call.
        self.vt
            .claims
            .map_or(0, |claims| unsafe { claims(self.data, protocol, &raw const head.raw) })
    }

    /// Returns the tag, and the host where it lies within `bytes`; `Err`: it lies elsewhere.
    pub(crate) fn sniff(
        &self,
        protocol: u32,
        bytes: &[u8],
    ) -> Result<(u32, Option<Vec<u8>>), String> {
        let Some(sniff) = self.vt.sniff else {
            return Ok((abi::sniff::NO, None));
        };
        let mut host = lend_text(b"");
        let none = host.ptr;
        // SAFETY: the instance is alive, the bytes valid for the call.
        let tag = unsafe { sniff(self.data, protocol, lend_text(bytes), &raw mut host) };
        if host.ptr == none || host.ptr.is_null() || host.len == 0 {
            return Ok((tag, None));
        }
        let (start, end) = (bytes.as_ptr() as usize, bytes.as_ptr() as usize + bytes.len());
        let at = host.ptr as usize;
        if at < start || at.saturating_add(host.len) > end {
            return Err("sniff: the host is not a part of the bytes".to_owned());
        }
        // SAFETY: within the bytes.
        Ok((tag, Some(unsafe { borrowed(host) }.to_vec())))
    }

    /// # Panics
    /// Where the plugin is not HTTP-born.
    pub(crate) fn accept_http(
        &self,
        protocol: u32,
        request: &TestRequest,
        opens: Opens,
        body: &BodySender,
        response: &Response,
        peer: &Peer,
    ) -> PluginFuture {
        let accept = self.vt.accept_http.expect("an HTTP-born protocol");
        let records = Box::new((
            HeadRecord::new(request),
            MetaRecord::new(&request.meta.before_open()),
            MetaRecord::new(&request.meta),
        ));
        let (head, meta) = (&raw const records.0.raw, &raw const records.1.raw);
        let opener = opener(&self.world, opens, peer, &raw const records.2.raw);
        let body = body.to_plugin(&self.world, request.body_length);
        let responder = response.to_plugin(&self.world);
        // SAFETY: the instance is alive; what is borrowed is dropped behind the future.
        let raw = unsafe { accept(self.data, protocol, head, meta, body, responder, opener) };
        self.future(raw, records)
    }

    /// # Panics
    /// Where the plugin is not byte-born.
    pub(crate) fn accept_stream(
        &self,
        protocol: u32,
        meta: &TestMeta,
        opens: Opens,
        client: TestStream,
        peer: &Peer,
    ) -> PluginFuture {
        let accept = self.vt.accept_stream.expect("a byte-born protocol");
        let records = Box::new((MetaRecord::new(&meta.before_open()), MetaRecord::new(meta)));
        let opener = opener(&self.world, opens, peer, &raw const records.1.raw);
        let client = io::to_plugin(&self.world, client);
        // SAFETY: the instance is alive; what is borrowed is dropped behind the future.
        let raw = unsafe { accept(self.data, protocol, &raw const records.0.raw, client, opener) };
        self.future(raw, records)
    }

    pub(crate) fn deliver(
        &self,
        protocol: u32,
        meta: &TestMeta,
        peer: &Peer,
        service: &TestService,
    ) -> PluginFuture {
        let record = Box::new(MetaRecord::new(meta));
        let exchange = peer.to_plugin(&self.world);
        let service = service.to_plugin(&self.world);
        let deliver = self.vt.deliver;
        // SAFETY: the instance is alive; what is borrowed is dropped behind the future.
        let raw = unsafe { deliver(self.data, protocol, &raw const record.raw, exchange, service) };
        self.future(raw, record)
    }

    /// # Panics
    /// Where the plugin is not HTTP-born.
    pub(crate) fn refuse_http(
        &self,
        protocol: u32,
        request: &TestRequest,
        response: &Response,
        failure: &TestFailure,
    ) -> PluginFuture {
        let refuse = self.vt.refuse_http.expect("an HTTP-born protocol");
        let records = Box::new((HeadRecord::new(request), FailureRecord::new(failure)));
        let (head, failure) = (&raw const records.0.raw, &raw const records.1.raw);
        let responder = response.to_plugin(&self.world);
        // SAFETY: the instance is alive; what is borrowed is dropped behind the future.
        let raw = unsafe { refuse(self.data, protocol, head, responder, failure) };
        self.future(raw, records)
    }

    /// # Panics
    /// Where the plugin is not byte-born.
    pub(crate) fn refuse_stream(
        &self,
        protocol: u32,
        client: TestStream,
        failure: &TestFailure,
    ) -> PluginFuture {
        let refuse = self.vt.refuse_stream.expect("a byte-born protocol");
        let record = Box::new(FailureRecord::new(failure));
        let client = io::to_plugin(&self.world, client);
        // SAFETY: the instance is alive; what is borrowed is dropped behind the future.
        let raw = unsafe { refuse(self.data, protocol, client, &raw const record.raw) };
        self.future(raw, record)
    }

    fn future(&self, raw: abi::Future, borrowed: Box<dyn Any + Send>) -> PluginFuture {
        // SAFETY: moved to us; a handler's future resolves to a code.
        unsafe { PluginFuture::new(raw, self.world.clone(), true, Some(borrowed)) }
    }

    pub(crate) fn drain(&self, deadline_ns: u64) {
        // SAFETY: the instance is alive.
        unsafe { (self.vt.drain)(self.data, deadline_ns) }
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        self.world.cancel_all();
        // SAFETY: alive, and all its futures are gone.
        unsafe { (self.vt.destroy)(self.data) };
    }
}

struct HeadRecord {
    raw: abi::RequestHead,
    _texts: [Bytes; 5],
    _fields: Fields,
    _headers: Vec<abi::Header>,
}

// SAFETY: points into what it owns, and is immutable.
unsafe impl Send for HeadRecord {}

impl HeadRecord {
    fn new(request: &TestRequest) -> Self {
        let texts = [
            &request.method,
            &request.scheme,
            &request.authority,
            &request.target,
            &request.protocol,
        ]
        .map(|text| Bytes::copy_from_slice(text.as_bytes()));
        let fields = request.headers.clone();
        let headers = lend_fields(&fields);
        let flags = [
            (request.body_length == Some(0), abi::request::END),
            (request.expect_continue, abi::request::EXPECT_CONTINUE),
            (request.can_upgrade, abi::request::CAN_UPGRADE),
        ];
        let raw = abi::RequestHead {
            size: size_of::<abi::RequestHead>(),
            version: request.version,
            flags: flags.into_iter().filter(|(set, _)| *set).map(|(_, flag)| flag).sum(),
            method: lend_text(&texts[0]),
            scheme: lend_text(&texts[1]),
            authority: lend_text(&texts[2]),
            target: lend_text(&texts[3]),
            protocol: lend_text(&texts[4]),
            headers: headers.as_ptr(),
            headers_len: headers.len(),
        };
        Self { raw, _texts: texts, _fields: fields, _headers: headers }
    }
}

struct MetaRecord {
    raw: abi::Meta,
    _texts: Vec<Bytes>,
}

// SAFETY: points into what it owns, and is immutable.
unsafe impl Send for MetaRecord {}

impl MetaRecord {
    fn new(meta: &TestMeta) -> Self {
        let mut texts = Vec::new();
        let mut own = |text: &str| {
            let bytes = Bytes::copy_from_slice(text.as_bytes());
            let lent = lend_text(&bytes);
            texts.push(bytes);
            lent
        };
        let raw = abi::Meta {
            size: size_of::<abi::Meta>(),
            deadline_ns: meta.deadline_ns,
            request_id: own(&meta.request_id),
            protocol_type: own(&meta.protocol_type),
            route: own(&meta.route),
            tunnel: own(&meta.tunnel),
            client_address: own(&meta.client_address),
            listener: own(&meta.listener),
            scheme: own(&meta.scheme),
            tls_sni: own(&meta.tls_sni),
            tls_alpn: own(&meta.tls_alpn),
            tls_client: own(&meta.tls_client),
            trace_parent: own(&meta.trace_parent),
            options: own(&meta.options),
            peer_address: own(&meta.peer_address),
            response_head_timeout_ns: meta.response_head_timeout_ns,
            flags: if meta.trusted_proxy { abi::meta::TRUSTED_PROXY } else { 0 },
        };
        Self { raw, _texts: texts }
    }
}

struct FailureRecord {
    raw: abi::Failure,
    _detail: Box<TestFailure>,
}

// SAFETY: points into what it owns, and is immutable.
unsafe impl Send for FailureRecord {}

impl FailureRecord {
    fn new(failure: &TestFailure) -> Self {
        let detail = Box::new(failure.clone());
        Self { raw: detail.to_raw(), _detail: detail }
    }
}

impl TestFailure {
    /// Borrows from `self`.
    pub(crate) fn to_raw(&self) -> abi::Failure {
        abi::Failure {
            size: size_of::<abi::Failure>(),
            code: self.code,
            retry_after_s: self.retry_after_s,
            detail: lend_text(self.detail.as_bytes()),
        }
    }
}
