//! The way to a relay through an HTTP proxy: CONNECT (RFC 9110 §9.3.6), by hyper.
//!
//! Knows the proxy and what it answers; what is said through it is the caller's business. Its
//! credentials are told to it and to nobody else.

use std::io;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::header::{HOST, HeaderValue, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, USER_AGENT};
use http::{Method, Request, StatusCode};
use http_body_util::Empty;
use hyper::client::conn::http1;
use hyper::upgrade;
use hyper_util::rt::TokioIo;
use thiserror::Error;
use tokio::net::TcpStream;

use super::transport::Socket;
use crate::config::Proxy;
use crate::error::bounded;

/// Largest head of the proxy's answer.
const HEAD_BYTES_MAX: usize = 16 * 1024;

/// Longest word of the proxy's that is told.
const TOLD_BYTES_MAX: usize = 200;

/// Why a proxy lets nobody through.
#[derive(Debug, Error)]
pub enum ProxyError {
    /// It cannot be reached.
    #[error("proxy {proxy} cannot be reached")]
    Connect {
        /// Which.
        proxy: Arc<str>,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It wants to know who we are.
    #[error(
        "proxy {proxy} answered 407 to CONNECT {target}: it wants credentials{offered} (accepted: \
         http://user:password@host:port in `proxy`, by the scheme Basic)"
    )]
    Credentials {
        /// Which.
        proxy: Arc<str>,
        /// What was asked for.
        target: String,
        /// By which schemes, where it says so.
        offered: String,
    },
    /// It will not.
    #[error("proxy {proxy} answered {status} to CONNECT {target}")]
    Refused {
        /// Which.
        proxy: Arc<str>,
        /// HTTP's status.
        status: StatusCode,
        /// What was asked for.
        target: String,
    },
    /// It answers as no proxy does.
    #[error("proxy {proxy} did not answer CONNECT {target}")]
    Answer {
        /// Which.
        proxy: Arc<str>,
        /// What was asked for.
        target: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Has the proxy at the other end of `stream` connect to `target`, `host:port`. The time is the caller's to
/// bound.
///
/// # Errors
/// As [`ProxyError`] says.
pub async fn connect(stream: TcpStream, proxy: &Proxy, target: &str) -> Result<Socket, ProxyError> {
    let name: Arc<str> = proxy.to_string().into();
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| ProxyError::Answer {
        proxy: Arc::clone(&name),
        target: target.to_owned(),
        source,
    };
    let request = request(proxy, target).map_err(|error| failed(error.into()))?;
    let io = TokioIo::new(Socket::new(stream));
    let shaken = http1::Builder::new().max_buf_size(HEAD_BYTES_MAX).handshake(io).await;
    let (mut requests, connection) = shaken.map_err(|error| failed(error.into()))?;
    let asked = async {
        let answer = requests.send_request(request).await.map_err(|error| failed(error.into()))?;
        if answer.status() == StatusCode::PROXY_AUTHENTICATION_REQUIRED {
            let offered = answer.headers().get(PROXY_AUTHENTICATE);
            let offered = offered.map(|offered| String::from_utf8_lossy(offered.as_bytes()));
            let offered = offered.map(|text| format!(" ({})", bounded(&text, TOLD_BYTES_MAX)));
            return Err(ProxyError::Credentials {
                proxy: Arc::clone(&name),
                target: target.to_owned(),
                offered: offered.unwrap_or_default(),
            });
        }
        if !answer.status().is_success() {
            return Err(ProxyError::Refused {
                proxy: Arc::clone(&name),
                status: answer.status(),
                target: target.to_owned(),
            });
        }
        upgrade::on(answer).await.map_err(|error| failed(error.into()))
    };
    let driven = connection.with_upgrades();
    tokio::pin!(driven, asked);
    let upgraded = tokio::select! {
        // Its end is told by the answer, or by there being none.
        biased;
        result = &mut asked => result?,
        _ = &mut driven => asked.await?,
    };
    let parts = upgraded
        .downcast::<TokioIo<Socket>>()
        .map_err(|_other| failed("the connection is of another kind".into()))?;
    let mut socket = parts.io.into_inner();
    socket.put_back(&parts.read_buf);
    Ok(socket)
}

fn request(proxy: &Proxy, target: &str) -> Result<Request<Empty<Bytes>>, http::Error> {
    let mut request = Request::builder()
        .method(Method::CONNECT)
        .uri(target)
        .header(HOST, target)
        .header(USER_AGENT, concat!("sidelane/", env!("CARGO_PKG_VERSION")));
    if let Some(credentials) = &proxy.credentials {
        let mut value =
            HeaderValue::try_from(format!("Basic {}", STANDARD.encode(credentials.expose())))?;
        value.set_sensitive(true);
        request = request.header(PROXY_AUTHORIZATION, value);
    }
    request.body(Empty::new())
}

#[cfg(test)]
mod tests;
