//! Where the HTTP front hands over: which plugin takes a request, which route it is for, and what
//! becomes of its call.
//!
//! A route's policies are carried out here, between the head and the plugin. Knows nothing of
//! listeners and of how an exchange is opened.

use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue, LOCATION};
use http::{Method, StatusCode};
use sidelane_abi::failure;
use tokio::time::Instant;

use super::Relay;
use super::affinity::Sticky;
use super::moving::Asks;
use super::open::RelayOpener;
use super::plain::{self, Said};
use super::policy::{self, LimitedBody, Refusal, RouteState, Shaped, Shaping, Verdict, Watch};
use crate::front::{self, ConnectionInfo, Dispatch, TlsFacts, forwarded};
use crate::metrics::Record;
use crate::plugin::lend::{self, Failure, Meta, Responder as _, Text};
use crate::plugin::{Call, CallEnd, PreparedHead, Protocol};
use crate::router::{self, Query};

/// What the HTTP front hands over; one for all connections.
pub(super) struct HttpEntry {
    pub(super) relay: Arc<Relay>,
}

impl Dispatch for HttpEntry {
    type Call = HttpExchange;

    fn accept<B: lend::Body, R: lend::Responder>(
        &self,
        connection: &Arc<ConnectionInfo>,
        mut head: Box<lend::RequestHead>,
        body: B,
        mut responder: R,
    ) -> HttpExchange {
        let relay = &self.relay;
        if let Some(said) = Said::to(connection, &head, &relay.issued) {
            return self.say(said, &head, responder);
        }
        // A proxy that is trusted speaks of its own client, whom it alone has seen; but not where whoever
        // connects is told of by his handshake: a client's address may be among those of proxies.
        let tls = connection.tls.as_deref();
        if connection.trusted_proxies.is_none() || tls.is_some_and(|tls| tls.forwards_client) {
            let fields = tls.and_then(|tls| tls.client_fields.as_ref());
            front::set_client_cert(&mut head.headers, fields);
        }
        let told = connection
            .trusted_proxies
            .as_ref()
            .map(|trusted| forwarded::client(connection.client_address, &head.headers, trusted));
        let asked = relay.metrics.is_followed().then(|| (head.method.clone(), head.target.clone()));
        let asks = Asks::of(&head.method, head.protocol.as_deref(), false);
        let head = PreparedHead::new(head);
        let Some(plugin) = relay.plugins.claim(&head) else {
            responder.abort(lend::Reset::new(failure::NO_PROTOCOL));
            return HttpExchange::Refused(failure::NO_PROTOCOL);
        };
        let record = Arc::new(relay.metrics.exchange("relay", plugin.name()));
        if let Some((method, target)) = asked {
            record.asked(method.as_str(), &target);
        }
        let responder = Shaped::new(responder, &record);
        if plugin.quarantined() {
            let failure = Failure {
                code: failure::PLUGIN_FAILED,
                retry_after_s: None,
                detail: "the plugin failed too often".to_owned(),
            };
            record.unopened(failure::PLUGIN_FAILED);
            return HttpExchange::Runs(plugin.refuse_http(head, responder, failure), record);
        }
        let misdirected = connection.tls.as_ref().filter(|tls| !tls.hosts.allow(head.authority()));
        if let Some(tls) = misdirected {
            let failure = Failure {
                code: failure::MISDIRECTED,
                retry_after_s: None,
                detail: tls.hosts.why_not().to_owned(),
            };
            record.unopened(failure::MISDIRECTED);
            return HttpExchange::Runs(plugin.refuse_http(head, responder, failure), record);
        }
        let mut meta = relay.meta(
            &plugin,
            &connection.client_address_text,
            &connection.listener,
            &connection.scheme,
        );
        let client = told.map_or(connection.client_address, |told| told.address);
        if let Some(told) = told {
            meta.client_address = Text::from(&*told.address.to_string());
            meta.peer_address = Arc::clone(&connection.client_address_text).into();
            meta.scheme = told.scheme.map_or(meta.scheme, Text::from);
            meta.trusted_proxy = true;
        }
        if let Some(tls) = &connection.tls {
            tls.tell(&mut meta);
        }
        let routing = relay.routing.load();
        // What is not text fits no route; the plugin says so.
        let route = str::from_utf8(head.authority()).ok().zip(str::from_utf8(head.target()).ok());
        let query = route.map(|(host, path)| Query {
            host: Some(host),
            path,
            listener: &connection.listener,
            protocol_type: plugin.name(),
        });
        let route = query.as_ref().and_then(|query| router::find(&routing.table, query));
        if let (Some(query), Some(found)) = (&query, route)
            && !router::is_clear(&routing.table, query, found)
        {
            let failure = Failure {
                code: failure::BAD_REQUEST,
                retry_after_s: None,
                detail: "the path can be read as another route's".to_owned(),
            };
            record.unopened(failure::BAD_REQUEST);
            return HttpExchange::Runs(plugin.refuse_http(head, responder, failure), record);
        }
        let Some(state) = route.and_then(|route| routing.policies.of(route)) else {
            let opener = RelayOpener::routed(
                Arc::clone(relay),
                meta.clone(),
                Arc::clone(&record),
                route.cloned(),
                None,
            )
            .over(connection.tls.clone())
            .asking(asks);
            let call = plugin.accept_http(head, meta, body, responder, opener);
            return HttpExchange::Runs(call, record);
        };
        let Some(head) = head.into_head() else {
            record.end(failure::INTERNAL);
            return HttpExchange::Refused(failure::INTERNAL);
        };
        let arrival = Arrival {
            relay: Arc::clone(relay),
            state: Arc::clone(state),
            plugin,
            client: client.ip(),
            tls: connection.tls.clone(),
            head,
            meta,
            body,
            responder,
            record,
            began: Instant::now(),
        };
        arrival.begin()
    }

    fn note(&self, event: front::Event) {
        match event {
            front::Event::InformationalDropped => self.relay.metrics.informational_dropped(),
            front::Event::Answered(code) => self.relay.metrics.front_answered(code),
        }
    }
}

impl HttpEntry {
    /// Says what a listener without TLS says by itself.
    fn say(
        &self,
        said: Said,
        head: &lend::RequestHead,
        responder: impl lend::Responder,
    ) -> HttpExchange {
        let metrics = &self.relay.metrics;
        let record = Arc::new(metrics.exchange("relay", plain::protocol_type()));
        if metrics.is_followed() {
            record.asked(head.method.as_str(), &head.target);
        }
        let code = said.say(&mut Shaped::new(responder, &record), &head.method);
        HttpExchange::Answered(record, code)
    }
}

/// A request for a route that has policies.
struct Arrival<B, R> {
    relay: Arc<Relay>,
    state: Arc<RouteState>,
    plugin: Protocol,
    client: IpAddr,
    tls: Option<Arc<TlsFacts>>,
    head: Box<lend::RequestHead>,
    meta: Meta,
    body: B,
    responder: Shaped<R>,
    record: Arc<Record>,
    began: Instant,
}

impl<B: lend::Body, R: lend::Responder> Arrival<B, R> {
    fn begin(self) -> HttpExchange {
        let now = policy::now();
        if let Err(refusal) = self.state.pass(Some(self.client), now) {
            return self.refuse(refusal);
        }
        let verdict: Verdict = self.state.look(&self.head.headers, self.client, now);
        match verdict.settle() {
            Err(refusal) => self.refuse(refusal),
            Ok(None) => self.go_on(),
            Ok(Some(question)) => HttpExchange::Asks(Box::pin(async move {
                match question.ask().await.into() {
                    Ok(()) => self.go_on().await,
                    Err(refusal) => self.refuse(refusal).await,
                }
            })),
        }
    }

    /// Says a refusal in the protocol's words.
    fn refuse(self, refusal: Refusal) -> HttpExchange {
        let Self { state, plugin, client, head, meta, responder, record, .. } = self;
        state.refused(refusal, Some(client));
        let failure = refusal.failure();
        record.routed(&state.route.name, &Arc::default());
        record.unopened(failure.code);
        let shaping = Shaping::new(&state, &head, &meta.scheme).challenge(state.challenge());
        let responder = responder.shape(shaping);
        let call = plugin.refuse_http(PreparedHead::new(head), responder, failure);
        HttpExchange::Runs(call, record)
    }

    /// Answers, or hands the request to its plugin as the route has changed it.
    fn go_on(mut self) -> HttpExchange {
        // Whoever does not know the password takes no place of those who do.
        let admitted = match self.state.enter() {
            Ok(admitted) => admitted,
            Err(refusal) => return self.refuse(refusal),
        };
        let policies = &*self.state.policies;
        if policies.basic_auth.is_some() {
            self.head.headers.remove(AUTHORIZATION);
        }
        if policies.redirect.is_some() {
            return self.redirect();
        }
        let is_too_long =
            policies.limits.body.zip(self.body.length()).is_some_and(|(max, length)| length > max);
        if is_too_long {
            return self.refuse(Refusal::too_large());
        }
        let Self {
            relay,
            state,
            plugin,
            tls,
            mut head,
            mut meta,
            body,
            responder,
            record,
            began,
            ..
        } = self;
        let policies = &*state.policies;
        let sticky =
            policies.affinity.as_ref().map(|affinity| Sticky::take(affinity, &mut head.headers));
        let asks = Asks::of(&head.method, head.protocol.as_deref(), policies.retries.is_some());
        let shaping = Shaping::new(&state, &head, &meta.scheme).sticky(sticky.clone());
        let prefix = &state.route.matches.path_prefix;
        policy::end_hop(&mut head.headers);
        let changes = &policies.request_headers;
        meta.trusted_proxy =
            policy::rewrite(&mut head, &policies.rewrite, prefix, changes, meta.trusted_proxy);
        policy::change(&mut head.headers, changes);
        meta.deadline =
            policies.timeouts.total.and_then(|total| began.into_std().checked_add(total));
        let opener = RelayOpener::routed(
            relay,
            meta.clone(),
            Arc::clone(&record),
            Some(Arc::clone(&state.route)),
            Some(Arc::clone(&state)),
        )
        .over(tls)
        .asking(asks)
        .sticky(sticky);
        let (body, responder) = (LimitedBody::new(body, &state), responder.shape(shaping));
        let call = plugin.accept_http(PreparedHead::new(head), meta, body, responder, opener);
        let watch = Watch::new(admitted, began);
        HttpExchange::Watched(Box::new(Watched { call: Some(call), watch, record }))
    }

    /// Sends the client elsewhere.
    fn redirect(self) -> HttpExchange {
        let Self { state, head, meta, responder, record, .. } = self;
        record.routed(&state.route.name, &Arc::default());
        let mut responder = responder.shape(Shaping::new(&state, &head, &meta.scheme));
        let answer = state.policies.redirect.as_ref().and_then(|redirect| {
            let prefix = &state.route.matches.path_prefix;
            let location = router::location(redirect, prefix, &head.authority, &head.target)?;
            Some((StatusCode::from_u16(redirect.status).ok()?, location))
        });
        let Some((status, location)) = answer else {
            // What the front lets through as a path is fit for a field.
            responder.abort(lend::Reset::new(failure::BAD_REQUEST));
            return HttpExchange::Answered(record, failure::BAD_REQUEST);
        };
        state.metrics.redirected();
        let answered = answer_redirect(&mut responder, status, location, &head.method);
        let code = if answered.is_ok() { failure::NONE } else { failure::CLIENT_GONE };
        HttpExchange::Answered(record, code)
    }
}

/// Answers with a line for people, too (RFC 9110 §15.4).
pub(super) fn answer_redirect(
    responder: &mut impl lend::Responder,
    status: StatusCode,
    location: HeaderValue,
    method: &Method,
) -> Result<(), lend::Closed> {
    let line = Bytes::from([b"see ".as_slice(), location.as_bytes(), b"\n"].concat());
    let length = line.len() as u64;
    let mut headers = HeaderMap::with_capacity(3);
    headers.insert(LOCATION, location);
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    let first = (method != Method::HEAD).then_some(line);
    responder.head(lend::ResponseHead { status, headers, body_length: Some(length) }, first, true)
}

/// An HTTP-born exchange that runs.
pub(super) enum HttpExchange {
    /// In the plugin.
    Runs(Call, Arc<Record>),
    /// In the plugin, under the policies of its route.
    Watched(Box<Watched>),
    /// Waits for a password to be checked, and then runs.
    Asks(Pin<Box<dyn Future<Output = CallEnd> + Send>>),
    /// Answered by core.
    Answered(Arc<Record>, u32),
    /// Nobody takes it.
    Refused(u32),
}

/// An exchange and the times that it has.
pub(super) struct Watched {
    call: Option<Call>,
    watch: Watch,
    record: Arc<Record>,
}

impl Future for HttpExchange {
    type Output = CallEnd;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<CallEnd> {
        match self.get_mut() {
            Self::Runs(call, record) => Pin::new(call).poll(cx).map(|end| ended(record, end)),
            Self::Watched(watched) => {
                let Watched { call, watch, record } = &mut **watched;
                watch.poll_call(call, cx).map(|end| ended(record, end))
            }
            Self::Asks(future) => future.as_mut().poll(cx),
            Self::Answered(record, code) => {
                Poll::Ready(ended(record, CallEnd { code: *code, panicked: false }))
            }
            Self::Refused(code) => Poll::Ready(CallEnd { code: *code, panicked: false }),
        }
    }
}

/// Counts the end of an exchange, with the answer that the front gives where nobody has.
fn ended(record: &Record, end: CallEnd) -> CallEnd {
    let is_wanted = !matches!(end.code, failure::NONE | failure::CANCELLED | failure::CLIENT_GONE);
    if is_wanted && !record.is_answered() {
        record.answered(front::status_of(end.code));
    }
    record.end(end.code);
    end
}
