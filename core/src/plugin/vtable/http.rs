//! The HTTP front's objects: request head, body, responder, and header fields both ways.

use std::ffi::c_void;
use std::task::Poll;

use bytes::Bytes;
use http::header::{HeaderName, HeaderValue};
use http::{HeaderMap, StatusCode, Version};
use sidelane_abi as abi;

use super::waker::with_context;
use super::{
    Counted, HEADERS_MAX, Invalid, buf, bytes_of, future, guard, io, report, reset_from_abi,
    reset_to_abi, str_of,
};
use crate::plugin::lend;

/// A request's head with the ABI's view of it, made once for claiming and accepting.
pub struct PreparedHead {
    view: abi::RequestHead,
    /// What `view.headers` points to.
    _fields: Vec<abi::Header>,
    /// What the texts of both point to.
    _owner: Owner,
}

/// Whose texts a view's pointers lead to.
enum Owner {
    Head(#[allow(dead_code, reason = "kept for the pointers into it")] Box<lend::RequestHead>),
    /// Of a request that may upgrade: it lives as long as its connection, and the fields of a head
    /// are slices of the buffer that the connection was read into, which they would keep.
    Text(#[allow(dead_code, reason = "kept for the pointers into it")] Vec<u8>),
}

// SAFETY: the pointers of `view` and `_fields` lead into `_owner`, which is on the heap, `Send`, owned
// and not changed.
unsafe impl Send for PreparedHead {}
// SAFETY: as above.
unsafe impl Sync for PreparedHead {}

impl std::fmt::Debug for PreparedHead {
    /// Without the texts, which may hold secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PreparedHead").field("fields", &self._fields.len()).finish_non_exhaustive()
    }
}

impl PreparedHead {
    /// Makes the view.
    #[must_use]
    pub fn new(head: Box<lend::RequestHead>) -> Self {
        if head.can_upgrade {
            return Self::copied(&head);
        }
        let fields = fields_of(&head.headers);
        let view = view(&head, &fields, str_of);
        Self { view, _fields: fields, _owner: Owner::Head(head) }
    }

    /// Copies the head's texts into one piece, so that the head may go.
    fn copied(head: &lend::RequestHead) -> Self {
        let mut text = Vec::new();
        for (name, value) in &head.headers {
            text.extend_from_slice(name.as_str().as_bytes());
            text.extend_from_slice(value.as_bytes());
        }
        // In the order in which `view` asks for them.
        text.extend_from_slice(head.method.as_str().as_bytes());
        text.extend_from_slice(head.scheme.as_bytes());
        text.extend_from_slice(&head.authority);
        text.extend_from_slice(&head.target);
        text.extend_from_slice(head.protocol.as_deref().unwrap_or_default());
        text.shrink_to_fit();
        let mut rest = &text[..];
        let mut copy = |original: &[u8]| {
            let (copy, behind) = rest.split_at(original.len());
            debug_assert_eq!(copy, original);
            rest = behind;
            str_of(copy)
        };
        let fields: Vec<abi::Header> = head
            .headers
            .iter()
            .map(|(name, value)| abi::Header {
                name: copy(name.as_str().as_bytes()),
                value: copy(value.as_bytes()),
            })
            .collect();
        let view = view(head, &fields, copy);
        Self { view, _fields: fields, _owner: Owner::Text(text) }
    }

    pub(super) fn as_abi(&self) -> *const abi::RequestHead {
        &raw const self.view
    }

    /// A text of the view.
    fn text(&self, text: abi::Str) -> &[u8] {
        // SAFETY: the pointers of `view` and `_fields` lead into `_owner`, which lives as long as
        // `self` and is not changed.
        unsafe { bytes_of(text) }.unwrap_or_default()
    }

    /// The effective authority.
    #[must_use]
    pub fn authority(&self) -> &[u8] {
        self.text(self.view.authority)
    }

    /// Path and query, or `*`.
    #[must_use]
    pub fn target(&self) -> &[u8] {
        self.text(self.view.target)
    }

    /// Gives the head back, to be changed. `None`: a text in it is not what it was made of, which
    /// does not happen.
    #[must_use]
    pub fn into_head(self) -> Option<Box<lend::RequestHead>> {
        if let Owner::Head(head) = self._owner {
            return Some(head);
        }
        let copy = |text: abi::Str| Bytes::copy_from_slice(self.text(text));
        let mut headers = HeaderMap::with_capacity(self._fields.len());
        for field in &self._fields {
            let name = HeaderName::from_bytes(self.text(field.name)).ok()?;
            let value = HeaderValue::from_bytes(self.text(field.value)).ok()?;
            headers.try_append(name, value).ok()?;
        }
        let has = |bit: u32| self.view.flags & bit != 0;
        let protocol = copy(self.view.protocol);
        Some(Box::new(lend::RequestHead {
            method: http::Method::from_bytes(self.text(self.view.method)).ok()?,
            scheme: str::from_utf8(self.text(self.view.scheme)).ok()?.into(),
            authority: copy(self.view.authority),
            target: copy(self.view.target),
            protocol: (!protocol.is_empty()).then_some(protocol),
            version: match self.view.version {
                10 => Version::HTTP_10,
                11 => Version::HTTP_11,
                _ => Version::HTTP_2,
            },
            headers,
            end: has(abi::request::END),
            expect_continue: has(abi::request::EXPECT_CONTINUE),
            can_upgrade: has(abi::request::CAN_UPGRADE),
        }))
    }
}

/// Makes the view of a head, whose texts `lend` puts where they stay.
fn view(
    head: &lend::RequestHead,
    fields: &[abi::Header],
    mut lend: impl FnMut(&[u8]) -> abi::Str,
) -> abi::RequestHead {
    let bit = |set: bool, bit: u32| if set { bit } else { 0 };
    abi::RequestHead {
        size: size_of::<abi::RequestHead>(),
        version: match head.version {
            Version::HTTP_09 | Version::HTTP_10 => 10,
            Version::HTTP_11 => 11,
            _ => 20,
        },
        flags: bit(head.end, abi::request::END)
            | bit(head.expect_continue, abi::request::EXPECT_CONTINUE)
            | bit(head.can_upgrade, abi::request::CAN_UPGRADE),
        method: lend(head.method.as_str().as_bytes()),
        scheme: lend(head.scheme.as_bytes()),
        authority: lend(&head.authority),
        target: lend(&head.target),
        protocol: lend(head.protocol.as_deref().unwrap_or_default()),
        headers: fields.as_ptr(),
        headers_len: fields.len(),
    }
}

fn fields_of(headers: &HeaderMap) -> Vec<abi::Header> {
    headers
        .iter()
        .map(|(name, value)| abi::Header {
            name: str_of(name.as_str().as_bytes()),
            value: str_of(value.as_bytes()),
        })
        .collect()
}

/// Reads the fields that a plugin lends.
///
/// # Safety
/// `headers` leads to `len` fields, valid for the call.
unsafe fn headers_from(headers: *const abi::Header, len: usize) -> Result<HeaderMap, Invalid> {
    if len == 0 {
        return Ok(HeaderMap::new());
    }
    if headers.is_null() {
        return Err(Invalid::NullPointer);
    }
    if len > HEADERS_MAX {
        return Err(Invalid::HeadersMany);
    }
    // SAFETY: by this function's contract, and not null.
    let fields = unsafe { std::slice::from_raw_parts(headers, len) };
    let mut map = HeaderMap::with_capacity(len);
    for field in fields {
        // SAFETY: a field's text is as valid as the field.
        let name = unsafe { bytes_of(field.name) }?;
        // SAFETY: as above.
        let value = unsafe { bytes_of(field.value) }?;
        let name = HeaderName::from_bytes(name).map_err(|_| Invalid::HeaderName)?;
        let value = HeaderValue::from_bytes(value).map_err(|_| Invalid::HeaderValue)?;
        map.try_append(name, value).map_err(|_| Invalid::HeadersMany)?;
    }
    Ok(map)
}

/// Returns the body to give a plugin.
pub(super) fn lend_body<B: lend::Body>(body: B) -> abi::Body {
    let length = body.length().unwrap_or(abi::LENGTH_UNKNOWN);
    let lent =
        Body { body, trailers: HeaderMap::new(), fields: Vec::new(), _counted: Counted::new() };
    abi::Body { data: Box::into_raw(Box::new(lent)).cast(), vt: &Body::<B>::VT, length }
}

struct Body<B> {
    body: B,
    /// What `fields` points into.
    trailers: HeaderMap,
    /// What the last frame's `headers` points to.
    fields: Vec<abi::Header>,
    _counted: Counted,
}

impl<B: lend::Body> Body<B> {
    const VT: abi::BodyVt = abi::BodyVt {
        size: size_of::<abi::BodyVt>(),
        poll_frame: Self::poll_frame,
        drop: Self::drop,
    };

    unsafe extern "C" fn poll_frame(
        data: *mut c_void,
        waker: *const abi::Waker,
        frame: *mut abi::Frame,
    ) -> u32 {
        // SAFETY: `data` is what `lend_body` leaked, used by one thread at a time.
        let this = unsafe { &mut *data.cast::<Self>() };
        let broken = Poll::Ready(lend::BodyFrame::Failed(lend::Reset::new(abi::failure::INTERNAL)));
        let polled = guard("body.poll_frame", broken, || {
            // SAFETY: the plugin lends the waker for the call.
            unsafe { with_context(waker, |cx| this.body.poll_frame(cx)) }
        });
        let Poll::Ready(got) = polled else { return abi::poll::PENDING };
        let mut filled = abi::Frame {
            data: buf::EMPTY,
            end: 1,
            headers: std::ptr::null(),
            headers_len: 0,
            reset: abi::Reset { code: abi::failure::NONE, protocol_code: abi::NO_PROTOCOL_CODE },
        };
        let tag = match got {
            lend::BodyFrame::Data { bytes, end } => {
                filled.data = buf::lend(bytes);
                filled.end = u32::from(end);
                abi::body::DATA
            }
            lend::BodyFrame::Trailers(trailers) => {
                this.trailers = trailers;
                this.fields = fields_of(&this.trailers);
                filled.headers = this.fields.as_ptr();
                filled.headers_len = this.fields.len();
                abi::body::TRAILERS
            }
            lend::BodyFrame::End => abi::body::END,
            lend::BodyFrame::Failed(why) => {
                filled.reset = reset_to_abi(why);
                abi::poll::CLOSED
            }
        };
        // SAFETY: the plugin lends the frame for the call; its old content is not owned by us.
        unsafe { frame.write(filled) };
        tag
    }

    unsafe extern "C" fn drop(data: *mut c_void) {
        // SAFETY: `data` is what `lend_body` leaked, dropped once.
        let lent = unsafe { Box::from_raw(data.cast::<Self>()) };
        guard("body.drop", (), || drop(lent));
    }
}

/// Returns the responder to give a plugin.
pub(super) fn lend_responder<R: lend::Responder>(responder: R) -> abi::Responder {
    let lent = Box::new(Responder { responder, _counted: Counted::new() });
    abi::Responder { data: Box::into_raw(lent).cast(), vt: &Responder::<R>::VT }
}

struct Responder<R> {
    responder: R,
    _counted: Counted,
}

fn tag(result: Result<(), lend::Closed>) -> u32 {
    match result {
        Ok(()) => abi::poll::READY,
        Err(lend::Closed) => abi::poll::CLOSED,
    }
}

impl<R: lend::Responder> Responder<R> {
    const VT: abi::ResponderVt = abi::ResponderVt {
        size: size_of::<abi::ResponderVt>(),
        informational: Self::informational,
        head: Self::head,
        poll_body: Self::poll_body,
        finish: Self::finish,
        abort: Self::abort,
        poll_closed: Self::poll_closed,
        upgrade: Self::upgrade,
        drop: Self::drop,
    };

    /// # Safety
    /// `data` is what `lend_responder` leaked, used by one thread at a time.
    unsafe fn of<'a>(data: *mut c_void) -> &'a mut Self {
        // SAFETY: by this function's contract.
        unsafe { &mut *data.cast::<Self>() }
    }

    /// Runs a call that ends the exchange where what the plugin passed cannot be used.
    fn call(
        &mut self,
        call: &'static str,
        run: impl FnOnce(&mut R) -> Result<Result<(), lend::Closed>, Invalid>,
    ) -> u32 {
        guard(call, abi::poll::CLOSED, || match run(&mut self.responder) {
            Ok(result) => tag(result),
            Err(invalid) => {
                report(call, invalid);
                self.responder.abort(lend::Reset::new(abi::failure::PLUGIN_FAILED));
                abi::poll::CLOSED
            }
        })
    }

    unsafe extern "C" fn informational(
        data: *mut c_void,
        status: u32,
        headers: *const abi::Header,
        headers_len: usize,
    ) -> u32 {
        // SAFETY: the plugin calls its own responder's function with its `data`.
        let this = unsafe { Self::of(data) };
        this.call("responder.informational", |responder| {
            let status = status_from(status, 100..=199)?;
            if status == StatusCode::SWITCHING_PROTOCOLS {
                return Err(Invalid::Status);
            }
            // SAFETY: the plugin lends the fields for the call.
            let headers = unsafe { headers_from(headers, headers_len) }?;
            Ok(responder.informational(status, headers))
        })
    }

    unsafe extern "C" fn head(
        data: *mut c_void,
        head: *const abi::ResponseHead,
        first: *mut abi::Buf,
    ) -> u32 {
        // SAFETY: as in `informational`.
        let this = unsafe { Self::of(data) };
        // SAFETY: the plugin lends the buffer's place for the call.
        let first = unsafe { first.as_mut() };
        // SAFETY: the plugin moves the buffer here, whatever comes of the call.
        let first = first.map(|first| unsafe { buf::take(first) }).transpose();
        // SAFETY: the plugin lends the head for the call.
        let head = unsafe { &*head };
        this.call("responder.head", |responder| {
            let first: Option<Bytes> = first?;
            let status = match head.status {
                101 => StatusCode::SWITCHING_PROTOCOLS,
                other => status_from(other, 200..=999)?,
            };
            // SAFETY: as above.
            let headers = unsafe { headers_from(head.headers, head.headers_len) }?;
            let body_length = (head.body_length != abi::LENGTH_UNKNOWN).then_some(head.body_length);
            let end = head.flags & abi::response::END != 0;
            Ok(responder.head(lend::ResponseHead { status, headers, body_length }, first, end))
        })
    }

    unsafe extern "C" fn poll_body(
        data: *mut c_void,
        waker: *const abi::Waker,
        chunk: *mut abi::Buf,
        flags: u32,
    ) -> u32 {
        // SAFETY: as in `informational`.
        let this = unsafe { Self::of(data) };
        // SAFETY: the plugin lends its buffer for the call.
        let chunk = unsafe { &mut *chunk };
        let mut pending = false;
        let tag = this.call("responder.poll_body", |responder| {
            // SAFETY: as above. It stays the plugin's until the front has taken it.
            let mut shared = Some(unsafe { buf::share(chunk) }?);
            let end = flags & abi::response::END != 0;
            // SAFETY: the plugin lends the waker for the call.
            let polled =
                unsafe { with_context(waker, |cx| responder.poll_body(cx, &mut shared, end)) };
            match polled {
                Poll::Pending => {
                    pending = true;
                    Ok(Ok(()))
                }
                Poll::Ready(result) => Ok(result),
            }
        });
        match tag {
            abi::poll::READY if pending => abi::poll::PENDING,
            abi::poll::READY => {
                // SAFETY: READY moves the chunk here.
                unsafe { buf::discard(chunk) };
                abi::poll::READY
            }
            other => other,
        }
    }

    unsafe extern "C" fn finish(
        data: *mut c_void,
        headers: *const abi::Header,
        headers_len: usize,
    ) -> u32 {
        // SAFETY: as in `informational`.
        let this = unsafe { Self::of(data) };
        this.call("responder.finish", |responder| {
            // SAFETY: the plugin lends the fields for the call.
            let trailers = unsafe { headers_from(headers, headers_len) }?;
            Ok(responder.finish((headers_len != 0).then_some(trailers)))
        })
    }

    unsafe extern "C" fn abort(data: *mut c_void, reset: abi::Reset) {
        // SAFETY: as in `informational`.
        let this = unsafe { Self::of(data) };
        guard("responder.abort", (), || this.responder.abort(reset_from_abi(reset)));
    }

    unsafe extern "C" fn poll_closed(
        data: *mut c_void,
        waker: *const abi::Waker,
        reset: *mut abi::Reset,
    ) -> u32 {
        // SAFETY: as in `informational`.
        let this = unsafe { Self::of(data) };
        let broken = Poll::Ready(lend::Reset::new(abi::failure::INTERNAL));
        let polled = guard("responder.poll_closed", broken, || {
            // SAFETY: the plugin lends the waker for the call.
            unsafe { with_context(waker, |cx| this.responder.poll_closed(cx)) }
        });
        let Poll::Ready(why) = polled else { return abi::poll::PENDING };
        if !reset.is_null() {
            // SAFETY: the plugin lends the record for the call.
            unsafe { reset.write(reset_to_abi(why)) };
        }
        abi::poll::CLOSED
    }

    unsafe extern "C" fn upgrade(data: *mut c_void) -> abi::Future {
        // SAFETY: as in `informational`.
        let this = unsafe { Self::of(data) };
        let stream = guard("responder.upgrade", None, || Some(this.responder.upgrade()));
        future::lend(async move {
            match stream {
                Some(stream) => io::outcome(stream).await,
                None => io::failed_outcome(abi::failure::INTERNAL, 0),
            }
        })
    }

    unsafe extern "C" fn drop(data: *mut c_void) {
        // SAFETY: `data` is what `lend_responder` leaked, dropped once.
        let lent = unsafe { Box::from_raw(data.cast::<Self>()) };
        guard("responder.drop", (), || drop(lent));
    }
}

fn status_from(status: u32, allowed: std::ops::RangeInclusive<u16>) -> Result<StatusCode, Invalid> {
    u16::try_from(status)
        .ok()
        .filter(|status| allowed.contains(status))
        .and_then(|status| StatusCode::from_u16(status).ok())
        .ok_or(Invalid::Status)
}
