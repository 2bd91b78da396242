//! One HTTP request of this program's own, to an authority or an issuer of tokens: over TLS, a
//! connection per request, bounded in time and size. Redirects are not followed.
//!
//! Such requests are minutes or weeks apart; a pool would keep nothing worth keeping. Knows nothing of
//! what is asked.

use std::io;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{HOST, HeaderValue};
use http::{Request, Response, Uri};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// How it may be asked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms {
    /// From the name's lookup to the last byte of the answer.
    pub(crate) timeout: Duration,
    /// Longest body of an answer.
    pub(crate) answer_bytes_max: usize,
    /// `http://` is taken where it leads to loopback.
    pub(crate) plain_on_loopback: bool,
}

/// Why a request has no answer.
#[derive(Debug, Error)]
pub(crate) enum AskError {
    #[error("{0} cannot be asked (accepted: https://…)")]
    Url(Uri),
    #[error("http:// leads to {0}, which is not on loopback (accepted: https://…)")]
    NotLoopback(IpAddr),
    #[error("cannot connect to {to}")]
    Connect {
        to: String,
        #[source]
        source: io::Error,
    },
    #[error("no TLS with {to}")]
    Tls {
        to: String,
        #[source]
        source: io::Error,
    },
    #[error("no answer of {to} within {} s", .after.as_secs())]
    Timeout { to: String, after: Duration },
    #[error("no HTTP with {to}")]
    Http {
        to: String,
        #[source]
        source: hyper::Error,
    },
    #[error("the answer of {to} breaks off or is longer than {max} bytes")]
    Body {
        to: String,
        max: usize,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Sends a request to its URI's authority, and reads the whole answer.
///
/// # Errors
/// There is none. Nothing of the request's fields and body is told.
pub(crate) async fn ask(
    tls: &Arc<ClientConfig>,
    request: Request<Full<Bytes>>,
    terms: Terms,
) -> Result<Response<Bytes>, AskError> {
    let to = host_field(request.uri()).unwrap_or_default().to_owned();
    let answer = tokio::time::timeout(terms.timeout, ask_unbounded(tls, request, terms)).await;
    answer.unwrap_or(Err(AskError::Timeout { to, after: terms.timeout }))
}

async fn ask_unbounded(
    tls: &Arc<ClientConfig>,
    mut request: Request<Full<Bytes>>,
    terms: Terms,
) -> Result<Response<Bytes>, AskError> {
    let uri = request.uri().clone();
    let no_url = || AskError::Url(uri.clone());
    let is_tls = match uri.scheme_str() {
        Some("https") => true,
        Some("http") if terms.plain_on_loopback => false,
        _ => return Err(no_url()),
    };
    let (Some(host), Some(field)) = (uri.host(), host_field(&uri)) else { return Err(no_url()) };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    *request.uri_mut() = Uri::try_from(path).map_err(|_| no_url())?;
    let field_value = HeaderValue::from_str(field).map_err(|_| no_url())?;
    request.headers_mut().insert(HOST, field_value);

    let to = || field.to_owned();
    let connect = |source| AskError::Connect { to: to(), source };
    let port = uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
    let stream = TcpStream::connect((host, port)).await.map_err(connect)?;
    if is_tls {
        let name = ServerName::try_from(host.to_owned()).map_err(|_| no_url())?;
        let stream = TlsConnector::from(Arc::clone(tls)).connect(name, stream).await;
        let stream = stream.map_err(|source| AskError::Tls { to: to(), source })?;
        exchange(stream, request, field, terms).await
    } else {
        let peer = stream.peer_addr().map_err(connect)?.ip().to_canonical();
        if !peer.is_loopback() {
            return Err(AskError::NotLoopback(peer));
        }
        exchange(stream, request, field, terms).await
    }
}

/// The authority without user and password, which are nobody's business.
fn host_field(uri: &Uri) -> Option<&str> {
    uri.authority()?.as_str().rsplit('@').next()
}

async fn exchange<S>(
    stream: S,
    request: Request<Full<Bytes>>,
    to: &str,
    terms: Terms,
) -> Result<Response<Bytes>, AskError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let http = |source| AskError::Http { to: to.to_owned(), source };
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
    let exchange = async {
        let (parts, body) = sender.send_request(request).await.map_err(http)?.into_parts();
        let max = terms.answer_bytes_max;
        let body = Limited::new(body, max).collect().await;
        let body = body.map_err(|source| AskError::Body { to: to.to_owned(), max, source })?;
        Ok(Response::from_parts(parts, body.to_bytes()))
    };
    let (mut exchange, mut connection) = (pin!(exchange), pin!(connection));
    tokio::select! {
        biased;
        done = &mut exchange => done,
        // What it read before it ended is still there for the exchange.
        _ = &mut connection => exchange.await,
    }
}
