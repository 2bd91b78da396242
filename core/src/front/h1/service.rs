//! hyper's service: one request in, one response out.

use std::cell::Cell;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, PoisonError};
use std::task::{Context as TaskContext, Poll, ready};

use bytes::Bytes;
use http::header::{CONNECTION, HeaderValue};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use hyper::body::{Body as _, Incoming};
use sidelane_abi::failure;

use super::body::{RequestBody, ResponseBody, Streaming};
use super::interim;
use crate::front::answer::{self, Refusal};
use crate::front::exchange::{DropInterim, Exchange, Output, Rest, Traits, has_body};
use crate::front::wire::{Busy, CONTINUE, Calling, Signals};
use crate::front::{Context, Dispatch, Event, head};
use crate::plugin::lend::{Reset, ResponseHead};

/// The requests of one connection.
pub(super) struct Requests<D> {
    context: Context<D>,
    signals: Arc<Signals>,
    dropped: DropInterim,
    /// The last authority that was accepted: a client asks the same one again and again.
    authority: Cell<Bytes>,
}

impl<D: Dispatch> Requests<D> {
    pub(super) fn new(context: Context<D>, signals: Arc<Signals>) -> Self {
        let dispatch = Arc::clone(&context.dispatch);
        let dropped: DropInterim = Arc::new(move || dispatch.note(Event::InformationalDropped));
        Self { context, signals, dropped, authority: Cell::default() }
    }

    fn dispatch(&self, request: Request<Incoming>) -> Result<Running<D>, Refusal> {
        let (parts, incoming) = request.into_parts();
        let known = self.authority.take();
        let scheme = Arc::clone(&self.context.info.scheme);
        let head = head::of_http1(parts, scheme, incoming.is_end_stream(), &known)?;
        self.authority.set(head.authority.clone());

        let traits = Traits::of(&head, head.version >= http::Version::HTTP_11);
        self.signals.look_ahead.store(traits.expect_continue, Relaxed);
        let exchange = Exchange::new(traits);
        // Before the plugin can ask for the body.
        let started = self.signals.poll_start().is_ready();
        let body = RequestBody::new(incoming, Arc::clone(&exchange), Busy::new(&self.signals));
        let responder = exchange.responder(Arc::clone(&self.dropped));
        let context = &self.context;
        let call = context.dispatch.accept(&context.info, Box::new(head), body, responder);
        Ok(Running {
            call: Some((call, Calling::new(&self.signals))),
            exchange,
            traits,
            dispatch: Arc::clone(&context.dispatch),
            busy: Some(Busy::new(&self.signals)),
            started,
            told_to_continue: false,
        })
    }
}

impl<D: Dispatch> hyper::service::Service<Request<Incoming>> for Requests<D> {
    type Response = Response<ResponseBody>;
    type Error = Infallible;
    type Future = Answer<D>;

    fn call(&self, request: Request<Incoming>) -> Answer<D> {
        self.signals.requests.fetch_add(1, Relaxed);
        self.signals.unread.store(false, Relaxed);
        let head_only = *request.method() == Method::HEAD;
        match self.dispatch(request) {
            Ok(running) => Answer::Running(running),
            Err(refusal) => {
                self.context.dispatch.note(Event::Answered(refusal.code));
                tracing::debug!(
                    client = %self.context.info.client_address_text,
                    reason = refusal.reason,
                    "request refused"
                );
                // What a request that cannot be trusted left on the connection cannot be either.
                self.signals.unread.store(true, Relaxed);
                let mut response = answer(refusal, head_only);
                let close = HeaderValue::from_static("close");
                response.headers_mut().insert(CONNECTION, close);
                Answer::Refused(Some(response))
            }
        }
    }
}

/// A response in the making. Dropped unfinished once the client is gone.
pub(super) enum Answer<D: Dispatch> {
    Refused(Option<Response<ResponseBody>>),
    Running(Running<D>),
}

impl<D: Dispatch> Future for Answer<D> {
    type Output = Result<Response<ResponseBody>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<Self::Output> {
        match self.get_mut() {
            Self::Refused(response) => {
                Poll::Ready(Ok(response.take().expect("a future is not polled after its end")))
            }
            Self::Running(running) => running.poll(cx).map(Ok),
        }
    }
}

pub(super) struct Running<D: Dispatch> {
    call: Option<(D::Call, Calling)>,
    exchange: Arc<Exchange>,
    traits: Traits,
    dispatch: Arc<D>,
    /// None once the response has begun.
    busy: Option<Busy>,
    /// What was answered before has left, so that interim responses may be written past hyper.
    started: bool,
    /// A `100 Continue` was sent.
    told_to_continue: bool,
}

impl<D: Dispatch> Running<D> {
    fn poll(&mut self, cx: &mut TaskContext<'_>) -> Poll<Response<ResponseBody>> {
        if !self.started {
            let signals = self.busy.as_ref().expect("no response has begun").signals();
            ready!(signals.poll_start());
            self.started = true;
        }
        if let Some((call, _)) = &mut self.call
            && self.exchange.attend(call, cx)
        {
            self.call = None;
        }
        let response = loop {
            match ready!(self.exchange.poll_output(cx, true)) {
                // hyper flushes before its turn ends, and with that what is put here.
                Output::Interim(status, headers) => self.interim(status, &headers),
                Output::Head { head, first, end, upgrade } => {
                    break self.begin(head, first, end, upgrade);
                }
                Output::Aborted(reset) => break self.fail(reset),
                Output::Chunk { .. } | Output::End(_) => unreachable!("the head comes first"),
            }
        };
        self.busy = None;
        if let Some((call, calling)) = self.call.take() {
            let rest = Rest::new(call, Arc::clone(&self.exchange));
            tokio::spawn(async move {
                rest.await;
                drop(calling);
            });
        }
        Poll::Ready(response)
    }

    fn interim(&mut self, status: StatusCode, headers: &HeaderMap) {
        let signals = self.busy.as_ref().expect("no response has begun").signals();
        if signals.put_interim(&interim::encode(status, headers), false) {
            self.told_to_continue |= status == StatusCode::CONTINUE;
        } else if status == StatusCode::CONTINUE && !self.told_to_continue {
            // What the client waits for goes, without what may go with it.
            self.told_to_continue = signals.put_interim(CONTINUE, true);
        } else {
            self.dispatch.note(Event::InformationalDropped);
        }
    }

    fn begin(
        &mut self,
        mut head: ResponseHead,
        first: Option<Bytes>,
        end: bool,
        upgrade: bool,
    ) -> Response<ResponseBody> {
        let busy = self.busy.take().expect("a response begins once");
        let signals = busy.signals();
        signals.look_ahead.store(false, Relaxed);
        let stated = match answer::check_response(&mut head) {
            Ok(stated) => stated,
            Err(reset) => {
                self.exchange.client_gone(reset);
                return self.fail(reset);
            }
        };
        if upgrade {
            let slot = &signals.upgrade;
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&self.exchange));
            let upgrade = HeaderValue::from_static("upgrade");
            head.headers.entry(CONNECTION).or_insert(upgrade);
        } else if signals.ends_soon.load(Relaxed) || self.exchange.body_is_uncertain() {
            head.headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        let length = first.as_ref().map_or(0, Bytes::len) as u64;
        let whole = end && stated.is_none_or(|stated| stated == length);
        let body = if !has_body(self.traits.head_only, head.status) {
            ResponseBody::Absent
        } else if whole {
            ResponseBody::Whole(first)
        } else {
            let exchange = Arc::clone(&self.exchange);
            let length = head.body_length;
            ResponseBody::Streaming(Streaming::new(exchange, first, end, stated, length, busy))
        };
        respond(head.status, head.headers, body)
    }

    fn fail(&self, reset: Reset) -> Response<ResponseBody> {
        self.dispatch.note(Event::Answered(reset.code));
        tracing::debug!(code = failure::name(reset.code), "exchange ended without a response");
        answer(Refusal::of_code(reset.code), self.traits.head_only)
    }
}

impl<D: Dispatch> Drop for Running<D> {
    fn drop(&mut self) {
        if self.busy.is_some() {
            self.exchange.client_gone(Reset::new(failure::CLIENT_GONE));
        }
    }
}

fn answer(refusal: Refusal, head_only: bool) -> Response<ResponseBody> {
    let body =
        if head_only { ResponseBody::Absent } else { ResponseBody::Whole(Some(refusal.line())) };
    respond(refusal.status, refusal.headers(), body)
}

fn respond(status: StatusCode, headers: HeaderMap, body: ResponseBody) -> Response<ResponseBody> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}
