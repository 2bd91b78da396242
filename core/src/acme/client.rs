//! HTTP to the authority, as the library asks for it. Knows no ACME but for `Retry-After`, which the
//! library does not hand on with errors.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER, USER_AGENT};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use instant_acme::{BodyWrapper, BytesResponse, HttpClient};
use rustls::ClientConfig;
use thiserror::Error;

use crate::config::tls::{ClientTls, Trust};
use crate::https::{self, Terms};
use crate::tls::{self, HTTP1_ALPN, TlsError};

/// A chain of certificates takes some 10 KiB.
const TERMS: Terms =
    Terms { timeout: Duration::from_secs(30), answer_bytes_max: 1 << 20, plain_on_loopback: false };

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Who asks (RFC 8555 §6.1).
const AGENT: HeaderValue =
    HeaderValue::from_static(concat!("sidelane/", env!("CARGO_PKG_VERSION"), " instant-acme/0.8"));

/// An answer that says nothing of itself.
#[derive(Debug, Error)]
#[error("{to} answers {status}, and does not say why")]
struct Unexplained {
    to: String,
    status: StatusCode,
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

    async fn ask(self, mut request: Request<Full<Bytes>>) -> Result<Response<Bytes>, BoxError> {
        request.headers_mut().insert(USER_AGENT, AGENT);
        let to = request.uri().authority().map(ToString::to_string).unwrap_or_default();
        let response = https::ask(&self.tls, request, TERMS).await?;
        let status = response.status();
        if status.is_client_error() || status.is_server_error() {
            *self.retry_after.lock().unwrap_or_else(PoisonError::into_inner) =
                response.headers().get(RETRY_AFTER).and_then(retry_after);
            let kind = response.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
            if !kind.is_some_and(|kind| kind.contains("json")) {
                return Err(Box::new(Unexplained { to, status }));
            }
        }
        Ok(response)
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
            // The body is in memory: this cannot wait, and cannot fail.
            let body = body.collect().await.map(http_body_util::Collected::to_bytes);
            let request = Request::from_parts(parts, Full::new(body.unwrap_or_default()));
            match client.ask(request).await {
                Ok(response) => Ok(response.map(Full::new).into()),
                Err(error) => Err(instant_acme::Error::Other(error)),
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
