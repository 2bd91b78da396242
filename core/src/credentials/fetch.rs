//! Fetches an issuer's keys: one GET, over TLS but on loopback, bounded in time and size.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, HOST, HeaderValue, USER_AGENT};
use http::uri::Scheme;
use http::{Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::config::tls::{Authorities, ClientTls, Trust};
use crate::tls::{self, HTTP1_ALPN, TlsError};

/// How long a fetch may take as a whole.
pub(super) const FETCH_TIMEOUT: Duration = Duration::from_secs(10);

/// Largest set of keys.
const BODY_BYTES_MAX: usize = 1 << 20;

/// Largest bearer token that is sent.
const BEARER_BYTES_MAX: u64 = 64 * 1024;

/// Why nothing was fetched.
#[derive(Debug, Error)]
pub(super) enum FetchError {
    #[error("not a URL of a set of keys (accepted: https://…, and http://… on loopback)")]
    Url,
    #[error("http:// leads to {0}, which is not on loopback (accepted: https://…)")]
    NotLoopback(std::net::IpAddr),
    #[error("no set of keys within {FETCH_TIMEOUT:?}")]
    Timeout,
    #[error("cannot connect")]
    Connect(#[source] io::Error),
    #[error("no TLS")]
    Tls(#[source] TlsError),
    #[error("the request failed")]
    Http(#[source] hyper::Error),
    #[error("the bearer token in {path} cannot be used: {why}")]
    Bearer { path: PathBuf, why: String },
    #[error("answered {0}; redirects are not followed (accepted: 200)")]
    Redirect(StatusCode),
    #[error("answered {0} (accepted: 200)")]
    Status(StatusCode),
    #[error("the set is longer than {BODY_BYTES_MAX} bytes, or ends early")]
    Body,
    #[error("what came {0}")]
    Content(String),
}

/// Where an issuer's keys are.
pub(super) struct Source<'a> {
    pub(super) url: &'a str,
    pub(super) authorities: Option<&'a Authorities>,
    pub(super) token_file: &'a Option<PathBuf>,
}

impl Source<'_> {
    /// Fetches the set as text.
    ///
    /// # Errors
    /// As [`FetchError`] says; nothing of the bearer token.
    pub(super) async fn fetch(&self) -> Result<String, FetchError> {
        let result = tokio::time::timeout(FETCH_TIMEOUT, self.fetch_unbounded()).await;
        result.unwrap_or(Err(FetchError::Timeout))
    }

    async fn fetch_unbounded(&self) -> Result<String, FetchError> {
        let url: Uri = self.url.parse().map_err(|_| FetchError::Url)?;
        let host = url.host().ok_or(FetchError::Url)?.to_owned();
        let is_tls = url.scheme() == Some(&Scheme::HTTPS);
        if !is_tls && url.scheme() != Some(&Scheme::HTTP) {
            return Err(FetchError::Url);
        }
        let port = url.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let request = request(&url, self.bearer().await?)?;
        let stream = TcpStream::connect((bare, port)).await.map_err(FetchError::Connect)?;
        let response = if is_tls {
            let trust = self.authorities.map_or(Trust::System, |a| Trust::Authorities(a.clone()));
            let settings = ClientTls { trust, server_name: None, certificate: None };
            let config = tls::client_config(&settings, &[HTTP1_ALPN]).map_err(FetchError::Tls)?;
            let name = ServerName::try_from(bare.to_owned()).map_err(|_| FetchError::Url)?;
            let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await;
            exchange(stream.map_err(FetchError::Connect)?, request).await?
        } else {
            let peer = stream.peer_addr().map_err(FetchError::Connect)?.ip().to_canonical();
            if !peer.is_loopback() {
                return Err(FetchError::NotLoopback(peer));
            }
            exchange(stream, request).await?
        };
        read(response).await
    }

    /// The bearer token, as its file has it now.
    async fn bearer(&self) -> Result<Option<HeaderValue>, FetchError> {
        let Some(path) = self.token_file else { return Ok(None) };
        let failed = |why: &str| FetchError::Bearer { path: path.clone(), why: why.to_owned() };
        let of = path.clone();
        let text = tokio::task::spawn_blocking(move || {
            let metadata = std::fs::metadata(&of)?;
            if metadata.len() > BEARER_BYTES_MAX {
                return Err(io::Error::other(format!(
                    "it is longer than {BEARER_BYTES_MAX} bytes"
                )));
            }
            std::fs::read_to_string(&of)
        });
        let text = text.await.map_err(|_| failed("reading it was cut off"))?;
        let text = text.map_err(|error| failed(&error.to_string()))?;
        let value = HeaderValue::try_from(format!("Bearer {}", text.trim()));
        let mut value = value.map_err(|_| failed("it holds what a header cannot"))?;
        value.set_sensitive(true);
        Ok(Some(value))
    }
}

fn request(url: &Uri, bearer: Option<HeaderValue>) -> Result<Request<Empty<Bytes>>, FetchError> {
    let authority = url.authority().ok_or(FetchError::Url)?;
    // Userinfo is nobody's business.
    let host = authority.as_str().rsplit('@').next().unwrap_or_default();
    let path = url.path_and_query().map_or("/", |path| path.as_str());
    let mut request = Request::get(path)
        .header(HOST, host)
        .header(ACCEPT, "application/jwk-set+json, application/json")
        .header(USER_AGENT, concat!("sidelane/", env!("CARGO_PKG_VERSION")))
        .body(Empty::new())
        .map_err(|_| FetchError::Url)?;
    if let Some(bearer) = bearer {
        request.headers_mut().insert(AUTHORIZATION, bearer);
    }
    Ok(request)
}

/// Ends the connection on every way out: whatever drops this future, or the answer, closes it.
struct Answer {
    response: Response<Incoming>,
    connection: tokio::task::JoinHandle<()>,
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

async fn exchange<S>(stream: S, request: Request<Empty<Bytes>>) -> Result<Answer, FetchError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(FetchError::Http)?;
    let connection = tokio::spawn(async move {
        // Its failure is the request's too.
        let _ = connection.await;
    });
    let abort = connection.abort_handle();
    match sender.send_request(request).await {
        Ok(response) => Ok(Answer { response, connection }),
        Err(error) => {
            abort.abort();
            Err(FetchError::Http(error))
        }
    }
}

async fn read(mut answer: Answer) -> Result<String, FetchError> {
    let status = answer.response.status();
    if status.is_redirection() {
        return Err(FetchError::Redirect(status));
    }
    if status != StatusCode::OK {
        return Err(FetchError::Status(status));
    }
    let body = Limited::new(answer.response.body_mut(), BODY_BYTES_MAX);
    let bytes = body.collect().await.map_err(|_| FetchError::Body)?.to_bytes();
    String::from_utf8(bytes.to_vec()).map_err(|_| FetchError::Content("is not UTF-8".to_owned()))
}
