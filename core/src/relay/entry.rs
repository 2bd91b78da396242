//! Where the HTTP front hands over: which plugin takes a request, and what becomes of its call.
//!
//! Knows nothing of listeners and of how an exchange is opened.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use sidelane_abi::failure;

use super::Relay;
use super::open::RelayOpener;
use crate::front::{self, ConnectionInfo, Dispatch};
use crate::metrics::Record;
use crate::plugin::lend::{self, Failure};
use crate::plugin::{Call, CallEnd, PreparedHead};

/// What the HTTP front hands over; one for all connections.
pub(super) struct HttpEntry {
    pub(super) relay: Arc<Relay>,
}

impl Dispatch for HttpEntry {
    type Call = HttpExchange;

    fn accept<B: lend::Body, R: lend::Responder>(
        &self,
        connection: &Arc<ConnectionInfo>,
        head: Box<lend::RequestHead>,
        body: B,
        mut responder: R,
    ) -> HttpExchange {
        let relay = &self.relay;
        let head = PreparedHead::new(head);
        let Some(plugin) = relay.plugins.claim(&head) else {
            responder.abort(lend::Reset::new(failure::NO_PROTOCOL));
            return HttpExchange::Refused(failure::NO_PROTOCOL);
        };
        let record = Arc::new(relay.metrics.exchange("relay", plugin.name()));
        if plugin.quarantined() {
            let failure = Failure {
                code: failure::PLUGIN_FAILED,
                retry_after_s: None,
                detail: "the plugin failed too often".to_owned(),
            };
            record.unopened(failure::PLUGIN_FAILED);
            return HttpExchange::Runs(plugin.refuse_http(head, responder, failure), record);
        }
        let mut meta = relay.meta(
            &plugin,
            &connection.client_address_text,
            &connection.listener,
            &connection.scheme,
        );
        if let Some(tls) = &connection.tls {
            meta.tls_sni = Arc::clone(&tls.sni).into();
            meta.tls_alpn = Arc::clone(&tls.alpn).into();
            meta.tls_client = Arc::clone(&tls.client).into();
        }
        let opener = RelayOpener::new(Arc::clone(relay), meta.clone(), Arc::clone(&record));
        HttpExchange::Runs(plugin.accept_http(head, meta, body, responder, opener), record)
    }

    fn note(&self, event: front::Event) {
        match event {
            front::Event::InformationalDropped => self.relay.metrics.informational_dropped(),
            front::Event::Answered(code) => self.relay.metrics.front_answered(code),
        }
    }
}

/// An HTTP-born exchange that runs.
pub(super) enum HttpExchange {
    /// In the plugin.
    Runs(Call, Arc<Record>),
    /// Nobody takes it.
    Refused(u32),
}

impl Future for HttpExchange {
    type Output = CallEnd;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<CallEnd> {
        match self.get_mut() {
            Self::Runs(call, record) => Pin::new(call).poll(cx).map(|end| {
                record.end(end.code);
                end
            }),
            Self::Refused(code) => Poll::Ready(CallEnd { code: *code, panicked: false }),
        }
    }
}
