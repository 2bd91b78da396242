//! HTTP to the authority: a connection per request, bounded in time and size.
//!
//! An order takes some fifteen requests in as many weeks; a pool would keep nothing worth keeping. Knows
//! no ACME but for `Retry-After`, which the library does not hand on with errors.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST, HeaderValue, RETRY_AFTER, USER_AGENT};
use http::{Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::rt::TokioIo;
use instant_acme::{BodyWrapper, BytesResponse, HttpClient};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use thiserror::Error;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::config::tls::{ClientTls, Trust};
use crate::tls::{self, HTTP1_ALPN, TlsError};

/// For one request, from the name's lookup to the last byte of the answer.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// Largest answer that is read: a chain of certificates takes some 10 KiB.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// Who asks (RFC 8555 §6.1).
const AGENT: HeaderValue =
    HeaderValue::from_static(concat!("sidelane/", env!("CARGO_PKG_VERSION"), " instant-acme/0.8"));

/// Why a request has no answer.
#[derive(Debug, Error)]
pub(super) enum AskError {
    #[error("{0} is no address of an authority (accepted: https://…)")]
    Url(Uri),
    #[error("cannot connect to {to}")]
    Connect {
        to: String,
        #[source]
        source: std::io::Error,
    },
    #[error("no TLS with {to}")]
    Tls {
        to: String,
        #[source]
        source: std::io::Error,
    },
    #[error("no answer of {to} within {} s", REQUEST_TIMEOUT.as_secs())]
    Timeout { to: String },
    #[error("no HTTP with {to}")]
    Http {
        to: String,
        #[source]
        source: hyper::Error,
    },
    #[error("the answer of {to} breaks off or is longer than {ANSWER_BYTES_MAX} bytes")]
    Body {
        to: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("{to} answers {status}, and does not say why")]
    Status { to: String, status: StatusCode },
}

/// Asks one authority.
#[derive(Clone)]
pub(super) struct Client {
    tls: Arc<ClientConfig>,
    /// Of the last refusal.
    retry_after: Arc<Mutex<Option<SystemTime>>>,
}

impl Client {
    /// Returns a client that believes whom `trust` says.
    pub(super) fn new(trust: &Trust) -> Result<Self, TlsError> {
        let tls = ClientTls { trust: trust.clone(), ..ClientTls::default() };
        let tls = tls::client_config(&tls, &[HTTP1_ALPN])?;
        Ok(Self { tls: Arc::new(tls), retry_after: Arc::default() })
    }

    /// When the authority wants to be asked again, as it said with its last refusal.
    pub(super) fn take_retry_after(&self) -> Option<SystemTime> {
        self.retry_after.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    async fn ask(
        self,
        mut request: Request<Full<Bytes>>,
    ) -> Result<Response<Full<Bytes>>, AskError> {
        let uri = request.uri().clone();
        let (host, authority) = match (uri.scheme_str(), uri.host(), uri.authority()) {
            (Some("https"), Some(host), Some(authority)) => {
                (host.trim_start_matches('[').trim_end_matches(']'), authority.as_str())
            }
            _ => return Err(AskError::Url(uri)),
        };
        let to = || authority.to_owned();
        let server =
            ServerName::try_from(host.to_owned()).map_err(|_| AskError::Url(uri.clone()))?;
        let host_field =
            HeaderValue::from_str(authority).map_err(|_| AskError::Url(uri.clone()))?;
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        *request.uri_mut() = Uri::try_from(path).map_err(|_| AskError::Url(uri.clone()))?;
        request.headers_mut().insert(HOST, host_field);
        request.headers_mut().insert(USER_AGENT, AGENT);

        let stream = TcpStream::connect((host, uri.port_u16().unwrap_or(443)))
            .await
            .map_err(|source| AskError::Connect { to: to(), source })?;
        let stream = TlsConnector::from(Arc::clone(&self.tls))
            .connect(server, stream)
            .await
            .map_err(|source| AskError::Tls { to: to(), source })?;
        let http = |source| AskError::Http { to: to(), source };
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
        let exchange = async {
            let (parts, body) = sender.send_request(request).await.map_err(http)?.into_parts();
            let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await;
            let body = body.map_err(|source| AskError::Body { to: to(), source })?.to_bytes();
            Ok((parts, body))
        };
        let (mut exchange, mut connection) = (pin!(exchange), pin!(connection));
        let (parts, body) = tokio::select! {
            biased;
            done = &mut exchange => done?,
            // What it read before it ended is still there for the exchange.
            _ = &mut connection => exchange.await?,
        };
        if parts.status.is_client_error() || parts.status.is_server_error() {
            *self.retry_after.lock().unwrap_or_else(PoisonError::into_inner) =
                parts.headers.get(RETRY_AFTER).and_then(retry_after);
            let kind = parts.headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
            if !kind.is_some_and(|kind| kind.contains("json")) {
                return Err(AskError::Status { to: to(), status: parts.status });
            }
        }
        Ok(Response::from_parts(parts, Full::new(body)))
    }
}

/// Reads the field's two forms (RFC 9110 §10.2.3).
fn retry_after(value: &HeaderValue) -> Option<SystemTime> {
    let text = value.to_str().ok()?.trim();
    match text.parse() {
        Ok(seconds) => SystemTime::now().checked_add(Duration::from_secs(seconds)),
        Err(_) => httpdate::parse_http_date(text).ok(),
    }
}

impl HttpClient for Client {
    fn request(
        &self,
        request: Request<BodyWrapper<Bytes>>,
    ) -> Pin<Box<dyn Future<Output = Result<BytesResponse, instant_acme::Error>> + Send>> {
        let client = self.clone();
        Box::pin(async move {
            let (parts, body) = request.into_parts();
            let to = parts.uri.authority().map(ToString::to_string).unwrap_or_default();
            // The body is in memory: this cannot wait, and cannot fail.
            let body = body.collect().await.map(http_body_util::Collected::to_bytes);
            let request = Request::from_parts(parts, Full::new(body.unwrap_or_default()));
            let answer = tokio::time::timeout(REQUEST_TIMEOUT, client.ask(request)).await;
            let answer = answer.unwrap_or(Err(AskError::Timeout { to }));
            match answer {
                Ok(response) => Ok(response.into()),
                Err(error) => Err(instant_acme::Error::Other(Box::new(error))),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_read_in_both_forms() {
        let read = |text| retry_after(&HeaderValue::from_static(text));
        let in_a_minute = read("60").unwrap().duration_since(SystemTime::now()).unwrap();
        assert!((55..=60).contains(&in_a_minute.as_secs()), "{in_a_minute:?}");
        assert!(read("Fri, 31 Dec 1999 23:59:59 GMT").unwrap() < SystemTime::now());
        for nonsense in ["", "soon", "-1", "99999999999999999999999"] {
            assert_eq!(read(nonsense), None, "{nonsense:?}");
        }
        assert_eq!(read("18446744073709551615"), None, "no time so far ahead");
    }
}
