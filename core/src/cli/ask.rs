//! Asks the admin address of a running process.

use std::io;
use std::path::Path;
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use http::header::HOST;
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Empty, LengthLimitError, Limited};
use hyper_util::rt::TokioIo;
use serde_json::Value as Json;
use thiserror::Error;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{EXIT_UNREACHABLE, Failed};
use crate::config;

/// Where `admin` is, unless a file says otherwise.
const ADDRESS: &str = "127.0.0.1:9083";

/// The file that stands for the process where none is named.
const FILE: &str = "sidecar.yaml";

/// Largest answer. Ten thousand routes with their policies are some 10 MiB.
const ANSWER_BYTES_MAX: usize = 64 * 1024 * 1024;

/// For the whole exchange; the admin thread answers at once.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Why there is no answer.
#[derive(Debug, Error)]
pub(super) enum AskError {
    /// Nobody is there.
    #[error("cannot reach {address} (is `admin` in the file of a process that runs here?)")]
    Unreachable {
        /// The address.
        address: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Nothing came in time.
    #[error("{0} gave no answer within 10s")]
    Timeout(String),
    /// Something else listens there.
    #[error("{0} does not answer as the admin address of sidelane does")]
    NotAdmin(String),
    /// It is no such page.
    #[error("{address} refuses: {reason}")]
    Refused {
        /// The address.
        address: String,
        /// What it said.
        reason: String,
    },
}

impl From<AskError> for Failed {
    fn from(error: AskError) -> Self {
        let failed = Self::new(&error);
        match error {
            AskError::Unreachable { .. } | AskError::Timeout(_) => {
                Self { code: EXIT_UNREACHABLE, ..failed }
            }
            _ => failed,
        }
    }
}

/// Returns the address to ask: the one given, or that of the file's `admin` section.
pub(super) fn address(admin: Option<&str>, file: Option<&Path>) -> Result<String, Failed> {
    if let Some(admin) = admin {
        return Ok(admin.to_owned());
    }
    let read = |path: &Path| config::load(path).map(|(_, config)| config.admin);
    if let Some(file) = file {
        let admin = read(file).map_err(|errors| Failed::said(errors.to_string()))?;
        let none = || Failed::said(format!("{}: has no `admin` section", file.display()));
        return Ok(admin.ok_or_else(none)?.to_string());
    }
    let file = Path::new(FILE);
    if !file.exists() {
        return Ok(ADDRESS.to_owned());
    }
    match read(file) {
        Ok(admin) => Ok(admin.map_or_else(|| ADDRESS.to_owned(), |admin| admin.to_string())),
        Err(_) => {
            eprintln!("{FILE} does not hold (`sidelane check` says why); asking {ADDRESS}");
            Ok(ADDRESS.to_owned())
        }
    }
}

/// Returns a page of the process.
pub(super) fn get(address: &str, page: &str) -> Result<Json, AskError> {
    let unreachable = |source| AskError::Unreachable { address: address.to_owned(), source };
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(unreachable)?;
    let asked = runtime.block_on(async { timeout(TIMEOUT, ask(address, page)).await });
    asked.unwrap_or_else(|_| Err(AskError::Timeout(address.to_owned())))
}

async fn ask(address: &str, page: &str) -> Result<Json, AskError> {
    let unreachable = |source| AskError::Unreachable { address: address.to_owned(), source };
    let not_admin = || AskError::NotAdmin(address.to_owned());
    let stream = TcpStream::connect(address).await.map_err(unreachable)?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|_| not_admin())?;
    // Ends with the answer, or with the runtime.
    tokio::spawn(connection);
    let request = Request::get(page)
        .header(HOST, address)
        .body(Empty::<Bytes>::new())
        .map_err(|_| not_admin())?;
    let response = sender.send_request(request).await.map_err(|_| not_admin())?;
    let status = response.status();
    let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
    let body = body.map_err(|error| {
        if error.is::<LengthLimitError>() {
            let reason = "the answer is larger than 64MiB".to_owned();
            return AskError::Refused { address: address.to_owned(), reason };
        }
        not_admin()
    })?;
    let json: Json = serde_json::from_reader(body.aggregate().reader()).map_err(|_| not_admin())?;
    if status == StatusCode::OK {
        return Ok(json);
    }
    let reason = json["error"].as_str().ok_or_else(not_admin)?.to_owned();
    Err(AskError::Refused { address: address.to_owned(), reason })
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;

    use super::*;
    use crate::error::chain;

    /// Checks what becomes of an answer.
    #[track_caller]
    fn check(answer: &'static str, expected: Result<&str, &str>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            let read = stream.read(&mut request).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
            String::from_utf8_lossy(&request[..read]).into_owned()
        });
        let got = get(&address, "/routes").map(|json| json.to_string());
        let got = got.map_err(|error| chain(&error).replace(&address, "ADDRESS"));
        assert_eq!(got.as_deref().map_err(String::as_str), expected);
        assert!(server.join().unwrap().starts_with("GET /routes HTTP/1.1\r\nhost: 127.0.0.1:"));
    }

    #[test]
    fn answers_are_taken_and_everything_else_is_told() {
        check("HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n[1]", Ok("[1]"));
        check(
            "HTTP/1.1 404 Not Found\r\ncontent-length: 19\r\n\r\n{\"error\":\"no page\"}",
            Err("ADDRESS refuses: no page"),
        );
        let not_admin = Err("ADDRESS does not answer as the admin address of sidelane does");
        check("HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n<a/>", not_admin);
        check("HTTP/1.1 500 No\r\ncontent-length: 2\r\n\r\n{}", not_admin);
        check("SSH-2.0-x\r\n", not_admin);
        check("", not_admin);
    }

    #[test]
    fn nobody_there_has_an_exit_code_of_its_own() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        drop(listener);
        let failed = Failed::from(get(&address, "/routes").unwrap_err());
        assert_eq!(failed.code, EXIT_UNREACHABLE);
        assert!(failed.message.contains("is `admin` in the file"), "{}", failed.message);
    }
}
