//! Asks the admin address of a running process.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use http::header::HOST;
use http::{Method, Request, StatusCode};
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

/// Returns the address to ask: the one given, or that of the file's `admin` section, which may be good
/// where the rest of the file is not. A file that does not tell it is an error: whoever answers at
/// another address may be another process.
pub(super) fn address(admin: Option<&str>, file: Option<&Path>) -> Result<String, Failed> {
    if let Some(admin) = admin {
        return named(admin).map_err(Failed::said);
    }
    let path = file.unwrap_or_else(|| Path::new(FILE));
    if file.is_none() && !path.exists() {
        eprintln!("no {FILE} here; asking {ADDRESS} (--admin ADDRESS names another)");
        return Ok(ADDRESS.to_owned());
    }
    of_file(path).map_err(Failed::said)
}

/// Reads `127.0.0.1:9083`, `localhost:9083`.
fn named(admin: &str) -> Result<String, String> {
    let port = admin.strip_prefix("localhost:").and_then(|port| port.parse::<u16>().ok());
    if port.is_some() || admin.parse::<SocketAddr>().is_ok() {
        return Ok(admin.to_owned());
    }
    let hint = match admin.trim_start_matches(':').parse::<u16>() {
        Ok(port) => format!("; did you mean \"127.0.0.1:{port}\"?"),
        Err(_) => String::new(),
    };
    Err(format!(
        "--admin: \"{admin}\" is not an address (accepted: IP:port, as in {ADDRESS}){hint}"
    ))
}

/// Returns the admin address that the file tells.
fn of_file(path: &Path) -> Result<String, String> {
    let name = path.display();
    let why_not = "(--admin ADDRESS says which process to ask)";
    let faulty = || format!("{name} does not hold (`sidelane check {name}` says why)");
    let unreadable = |errors: config::ConfigErrors| format!("{errors} {why_not}");
    let source = config::Source::read(path).map_err(unreadable)?;
    let env = |variable: &str| std::env::var(variable).ok();
    let Ok(draft) = config::draft(&source, &env) else {
        return Err(format!("{}, and its `admin.address` is not known {why_not}", faulty()));
    };
    match (draft.admin(), draft.is_good()) {
        (Some(admin), true) => Ok(admin.to_string()),
        (Some(admin), false) => {
            eprintln!("{}; asking its `admin.address`, {admin}", faulty());
            Ok(admin.to_string())
        }
        (None, true) => Err(format!("{name}: has no `admin` section {why_not}")),
        (None, false) => {
            Err(format!("{}, and its `admin.address` is not known {why_not}", faulty()))
        }
    }
}

/// Returns a page of the process.
pub(super) fn get(address: &str, page: &str) -> Result<Json, AskError> {
    call(address, &Method::GET, page)
}

/// Returns what the process answers.
pub(super) fn call(address: &str, method: &Method, page: &str) -> Result<Json, AskError> {
    let unreachable = |source| AskError::Unreachable { address: address.to_owned(), source };
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(unreachable)?;
    let asked = runtime.block_on(async { timeout(TIMEOUT, ask(address, method, page)).await });
    asked.unwrap_or_else(|_| Err(AskError::Timeout(address.to_owned())))
}

async fn ask(address: &str, method: &Method, page: &str) -> Result<Json, AskError> {
    let unreachable = |source| AskError::Unreachable { address: address.to_owned(), source };
    let not_admin = || AskError::NotAdmin(address.to_owned());
    let stream = TcpStream::connect(address).await.map_err(unreachable)?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|_| not_admin())?;
    // Ends with the answer, or with the runtime.
    tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(page)
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
    fn an_address_is_taken_from_what_is_good_of_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c.yaml");
        let check = |text: &str, expected: Result<&str, &str>| {
            std::fs::write(&path, text).unwrap();
            let got = of_file(&path).map_err(|error| error.replace(path.to_str().unwrap(), "FILE"));
            assert_eq!(got.as_deref().map_err(String::as_str), expected, "{text}");
        };
        let admin = "admin: { address: '127.0.0.1:${SIDELANE_NOT_SET:-4711}' }\n";
        check(&format!("version: 1\nrelay: {{}}\n{admin}"), Ok("127.0.0.1:4711"));
        check(&format!("version: 1\nrelay: 3\nroutes: 4\n{admin}"), Ok("127.0.0.1:4711"));
        let unknown = "FILE does not hold (`sidelane check FILE` says why), and its `admin.address` \
                       is not known (--admin ADDRESS says which process to ask)";
        for faulty in [
            "relay: 3\n",
            "admin: { address: nowhere }\n",
            "admin: { address: '127.0.0.1:${SIDELANE_NOT_SET}' }\n",
            "admin: [\n",
        ] {
            check(&format!("version: 1\n{faulty}"), Err(unknown));
        }
        let none = "FILE: has no `admin` section (--admin ADDRESS says which process to ask)";
        check("version: 1\nrelay: {}\n", Err(none));
        std::fs::remove_file(&path).unwrap();
        let error = of_file(&path).unwrap_err();
        assert!(
            error.contains("cannot be read: ") && error.contains("(--admin ADDRESS"),
            "{error}"
        );
    }

    #[test]
    fn an_address_that_is_given_is_one() {
        for good in ["127.0.0.1:1", "[::1]:9083", "localhost:9083"] {
            assert_eq!(named(good).as_deref(), Ok(good));
        }
        assert_eq!(
            named("21083").unwrap_err(),
            "--admin: \"21083\" is not an address (accepted: IP:port, as in 127.0.0.1:9083); did you \
             mean \"127.0.0.1:21083\"?"
        );
        for bad in ["", "x", "relay:9083", "localhost", "127.0.0.1"] {
            assert!(named(bad).unwrap_err().ends_with("as in 127.0.0.1:9083)"), "{bad}");
        }
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
