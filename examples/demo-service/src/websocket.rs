//! `/ws`: a WebSocket that sends every message back.

use anyhow::Result;
use futures_util::{SinkExt, StreamExt};
use http::{HeaderValue, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::Role;

use crate::{Payload, full, text};

/// Answers a handshake; the echo begins once the answer is on its way.
pub(crate) fn upgrade(mut request: Request<Incoming>) -> Response<Payload> {
    let Some(accept) = accept(&request) else {
        let why = "a WebSocket echo: open it by ws://, version 13\n".to_owned();
        let mut response = text(StatusCode::UPGRADE_REQUIRED, why);
        let headers = response.headers_mut();
        headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
        return response;
    };
    let upgraded = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        if let Err(error) = echo(upgraded).await {
            eprintln!("websocket: {error}");
        }
    });
    let mut response = Response::new(full(String::new()));
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    response
}

/// Returns what answers the handshake's key; `None` where the request is no handshake that we know.
fn accept<B>(request: &Request<B>) -> Option<HeaderValue> {
    let headers = request.headers();
    let upgrade = headers.get(header::UPGRADE)?.as_bytes();
    let version = headers.get(header::SEC_WEBSOCKET_VERSION)?;
    if !upgrade.eq_ignore_ascii_case(b"websocket") || version != "13" {
        return None;
    }
    let key = headers.get(header::SEC_WEBSOCKET_KEY)?;
    HeaderValue::try_from(derive_accept_key(key.as_bytes())).ok()
}

/// Pings and the closing handshake are answered by the library while it is read from.
async fn echo(upgraded: OnUpgrade) -> Result<()> {
    let stream = TokioIo::new(upgraded.await?);
    let mut socket = WebSocketStream::from_raw_socket(stream, Role::Server, None).await;
    while let Some(message) = socket.next().await {
        let message = message?;
        if message.is_text() || message.is_binary() {
            socket.send(message).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::accept;

    #[test]
    fn only_a_handshake_of_version_13_is_accepted() {
        let request = |version: &str, upgrade: &str| {
            Request::builder()
                .header("upgrade", upgrade)
                .header("sec-websocket-version", version)
                .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==")
                .body(())
                .unwrap()
        };
        let rfc = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";
        assert_eq!(accept(&request("13", "WebSocket")).unwrap(), rfc);
        assert_eq!(accept(&request("8", "websocket")), None);
        assert_eq!(accept(&request("13", "h2c")), None);
        assert_eq!(accept(&Request::new(())), None);
    }
}
