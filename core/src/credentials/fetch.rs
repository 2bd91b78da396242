//! Fetches an issuer's keys: one GET, over TLS but on loopback, bounded in time and size.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::header::{ACCEPT, AUTHORIZATION, HeaderValue, USER_AGENT};
use http::{Request, StatusCode};
use http_body_util::Full;
use thiserror::Error;

use crate::config::tls::{Authorities, ClientTls, Trust};
use crate::https::{self, AskError, Terms};
use crate::tls::{self, HTTP1_ALPN, TlsError};

/// How long a fetch may take as a whole.
pub(super) const FETCH_TIMEOUT: Duration = Duration::from_secs(10);

const TERMS: Terms =
    Terms { timeout: FETCH_TIMEOUT, answer_bytes_max: 1 << 20, plain_on_loopback: true };

/// Largest bearer token that is sent.
const BEARER_BYTES_MAX: u64 = 64 * 1024;

/// Why nothing was fetched.
#[derive(Debug, Error)]
pub(super) enum FetchError {
    #[error("not a URL of a set of keys (accepted: https://…, and http://… on loopback)")]
    Url,
    #[error(transparent)]
    Ask(#[from] AskError),
    #[error("no TLS")]
    Tls(#[source] TlsError),
    #[error("the bearer token in {path} cannot be used: {why}")]
    Bearer { path: PathBuf, why: String },
    #[error("answered {0}; redirects are not followed (accepted: 200)")]
    Redirect(StatusCode),
    #[error("answered {0} (accepted: 200)")]
    Status(StatusCode),
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
        let trust = self.authorities.map_or(Trust::System, |a| Trust::Authorities(a.clone()));
        let settings = ClientTls { trust, server_name: None, certificate: None };
        let tls = tls::client_config(&settings, &[HTTP1_ALPN]).map_err(FetchError::Tls)?;
        let mut request = Request::get(self.url)
            .header(ACCEPT, "application/jwk-set+json, application/json")
            .header(USER_AGENT, concat!("sidelane/", env!("CARGO_PKG_VERSION")))
            .body(Full::default())
            .map_err(|_| FetchError::Url)?;
        if let Some(bearer) = self.bearer().await? {
            request.headers_mut().insert(AUTHORIZATION, bearer);
        }
        let response = https::ask(&Arc::new(tls), request, TERMS).await?;
        match response.status() {
            StatusCode::OK => String::from_utf8(response.into_body().to_vec())
                .map_err(|_| FetchError::Content("is not UTF-8".to_owned())),
            status if status.is_redirection() => Err(FetchError::Redirect(status)),
            status => Err(FetchError::Status(status)),
        }
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
