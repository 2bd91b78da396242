use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;
use crate::config::{HostPort, Secret};
use crate::error::chain;
use crate::tunnel::carrier::tests::sockets;

fn proxy(credentials: Option<&str>) -> Proxy {
    let address = HostPort { host: "proxy.test".into(), port: 3128 };
    Proxy { address, credentials: credentials.map(Secret::new) }
}

/// What becomes of a proxy's answer, and what it was asked.
async fn asked(proxy: &Proxy, answer: &[u8]) -> (Result<Vec<u8>, String>, String) {
    let (dialled, mut accepted) = sockets().await;
    let serve = async {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(accepted.read_u8().await.expect("read"));
        }
        // The other end may have heard enough before all is written.
        let _ = accepted.write_all(answer).await;
        let _ = accepted.shutdown().await;
        String::from_utf8(head).expect("text")
    };
    let dial = async {
        let mut socket =
            connect(dialled, proxy, "relay.test:443").await.map_err(|error| chain(&error))?;
        let mut rest = Vec::new();
        socket.read_to_end(&mut rest).await.expect("read");
        Ok(rest)
    };
    tokio::join!(dial, serve)
}

#[tokio::test]
async fn a_connection_goes_through_with_what_came_behind_the_answer() {
    let (through, head) =
        asked(&proxy(None), b"HTTP/1.1 200 OK\r\nvia: x\r\n\r\nfirst bytes").await;
    assert_eq!(through.as_deref(), Ok(&b"first bytes"[..]));
    assert!(head.starts_with("CONNECT relay.test:443 HTTP/1.1\r\n"), "{head}");
    assert!(head.to_lowercase().contains("\r\nhost: relay.test:443\r\n"), "{head}");
    assert!(!head.to_lowercase().contains("authorization"), "{head}");
    let (through, head) = asked(&proxy(Some("me:secret")), b"HTTP/1.0 200 Fine\r\n\r\n").await;
    assert_eq!(through.as_deref(), Ok(&b""[..]));
    assert!(
        head.to_lowercase().contains("\r\nproxy-authorization: basic bwu6c2vjcmv0\r\n"),
        "{head}"
    );
}

/// What a proxy says of a body is to be ignored (RFC 9110 §9.3.6), and what it says before its answer too.
#[tokio::test]
async fn an_answer_has_no_body_whatever_it_says() {
    for answer in [
        "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\nfirst",
        "HTTP/1.1 200 OK\r\ncontent-length: 5000\r\n\r\nfirst",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nfirst",
        "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nfirst",
        "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\nfirst",
    ] {
        let (through, _) = asked(&proxy(None), answer.as_bytes()).await;
        assert_eq!(through.as_deref(), Ok(&b"first"[..]), "{answer}");
    }
}

#[tokio::test]
async fn an_answer_without_an_end_is_bounded() {
    let endless = "HTTP/1.1 200 OK\r\n".to_owned() + &"a: b\r\n".repeat(1_000_000);
    let (through, _) = asked(&proxy(None), endless.as_bytes()).await;
    let error = through.expect_err("refused");
    assert!(error.contains("did not answer CONNECT relay.test:443: "), "{error}");
}

#[tokio::test]
async fn an_answer_that_lets_nobody_through_is_told_without_the_password() {
    let proxy = proxy(Some("me:secret"));
    for (answer, expected) in [
        (
            &b"HTTP/1.1 407 Who\r\nproxy-authenticate: Negotiate\r\ncontent-length: 0\r\n\r\n"[..],
            "proxy http://***@proxy.test:3128 answered 407 to CONNECT relay.test:443: it wants \
             credentials (Negotiate) (accepted: ",
        ),
        (
            b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n",
            "proxy http://***@proxy.test:3128 answered 403 Forbidden to CONNECT relay.test:443",
        ),
        (b"", "did not answer CONNECT relay.test:443: "),
        (b"SSH-2.0-OpenSSH\r\n", "did not answer CONNECT relay.test:443: "),
        (&[b'x'; 100_000], "did not answer CONNECT relay.test:443: "),
    ] {
        let (through, _) = asked(&proxy, answer).await;
        let error = through.expect_err("refused");
        assert!(error.contains(expected), "{error}");
        assert!(!error.contains("secret") && !error.contains("bWU6"), "{error}");
    }
}
