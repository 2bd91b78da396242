use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};

use sidelane_tunnel::LaneConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::config::tls::Certificate;
use crate::error::chain;
use crate::tls::TUNNEL_ALPN;
use crate::tunnel::accept;
use crate::tunnel::test_tls::{self, Ca};

const TIMEOUTS: Timeouts =
    Timeouts { connect: Duration::from_secs(10), answer: Duration::from_secs(10) };

fn hello() -> proto::Hello {
    proto::Hello {
        instance: vec![1; 16].into(),
        window: LaneConfig::default().receive_window,
        message_bytes_max: 128 * 1024,
        ..proto::Hello::default()
    }
}

/// Dials whoever `serve` makes of the connection, and returns the error in one line.
async fn fault<F>(carrier: &Carrier, serve: impl FnOnce(TcpStream) -> F) -> String
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a listener");
    let address = listener.local_addr().expect("its address").to_string();
    let hello = hello();
    let accepted = async { serve(listener.accept().await.expect("accepted").0).await };
    let dialled = dial("relay.test:9081", &address, carrier, &hello, TIMEOUTS);
    let (dialled, ()) = tokio::join!(dialled, accepted);
    chain(&dialled.map(drop).expect_err("refused"))
}

/// Takes the hello, and everything after it until the dialler goes.
async fn read_all<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S) {
    // The dialler may be gone before.
    let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
}

fn by_tls(config: Arc<rustls::ServerConfig>) -> impl FnOnce(TcpStream) -> TlsServe {
    |stream| {
        Box::pin(async move {
            if let Ok(stream) = TlsAcceptor::from(config).accept(stream).await {
                read_all(stream).await;
            }
        })
    }
}

type TlsServe = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

#[tokio::test]
async fn each_fault_of_tls_says_what_to_do() {
    let (ca, other) = (Ca::new("ours"), Ca::new("theirs"));
    let good = ca.certificate("relay.test");
    let alpn: &[&[u8]] = &[TUNNEL_ALPN];
    let carrier = test_tls::carrier(test_tls::client(&ca, None, alpn), "relay.test");
    let server = |certificate: Arc<Certificate>, clients, alpn| {
        by_tls(test_tls::server(&certificate, clients, alpn))
    };
    for (serve, expected) in [
        (server(other.certificate("relay.test"), None, alpn), "name its authority by tls.ca"),
        (
            server(ca.certificate("relay.internal"), None, alpn),
            "its certificate is for relay.internal, not for relay.test: set tls.server_name",
        ),
        (server(ca.expired("relay.test"), None, alpn), "ended at Mon, 01 Jan 2001 00:00:00 GMT"),
        (server(Arc::clone(&good), None, &[b"h2"]), "it does not speak sidelane/1 there"),
        (server(Arc::clone(&good), None, &[]), "speaks TLS and not sidelane/1 (ALPN)"),
        (server(Arc::clone(&good), Some(&ca), alpn), "it wants a certificate of this sidecar"),
    ] {
        let text = fault(&carrier, serve).await;
        assert!(text.contains("relay relay.test:9081"), "{text}");
        assert!(text.contains(expected), "{text}");
    }
    let shown = other.certificate("sidecar.test");
    let carrier = test_tls::carrier(test_tls::client(&ca, Some(&shown), alpn), "relay.test");
    let text = fault(&carrier, server(Arc::clone(&good), Some(&ca), alpn)).await;
    assert!(text.contains("it refuses the certificate that is set as tls.certificate"), "{text}");
}

#[tokio::test]
async fn an_answer_without_tls_is_told_as_such() {
    let ca = Ca::new("ours");
    let carrier = test_tls::carrier(test_tls::client(&ca, None, &[TUNNEL_ALPN]), "relay.test");
    // As a plain relay answers.
    let text = fault(&carrier, async |mut stream: TcpStream| {
        let refuse = proto::Refuse { detail: "plain here".to_owned(), ..proto::Refuse::default() };
        accept::send_refuse(&mut stream, &refuse).await.expect("sent");
        read_all(stream).await;
    })
    .await;
    assert!(text.contains("it answers without TLS: set relay.tunnel.tls there"), "{text}");
    let text = fault(&carrier, async |stream: TcpStream| drop(stream)).await;
    assert!(text.contains("closed the connection in the TLS handshake"), "{text}");
    let text = fault(&carrier, async |mut stream: TcpStream| {
        stream.write_all(&[0x15, 3, 3, 0, 2, 2, 0x31]).await.expect("sent");
        read_all(stream).await;
    })
    .await;
    assert!(text.contains("turns this address away"), "{text}");
}

#[test]
fn another_machine_is_dialled_by_tls_and_with_something_to_present() {
    let remote: IpAddr = "192.0.2.1".parse().expect("an address");
    let mapped: SocketAddr = "[::ffff:127.0.0.1]:1".parse().expect("an address");
    let remote = Place::Address(remote);
    let plain = Security::Plain { insecure: false };
    check_place("r", &Place::Address(mapped.ip()), &plain, true).expect("loopback");
    let error = check_place("r", &remote, &plain, false).expect_err("plain");
    assert!(error.to_string().contains("is dialled without TLS"), "{error}");
    check_place("r", &Place::Named("127.0.0.1:1"), &plain, false).expect_err("a proxy's loopback");
    let insecure = Security::Plain { insecure: true };
    check_place("r", &remote, &insecure, false).expect("as the file says");
    let error = check_place("r", &remote, &insecure, true).expect_err("bare");
    assert!(error.to_string().contains("set sidecar.token"), "{error}");
    let ca = Ca::new("ours");
    let mut carrier = test_tls::carrier(test_tls::client(&ca, None, &[]), "r.test");
    let security = carrier.ways.remove(0).security;
    check_place("r", &remote, &security, true).expect_err("bare");
    let Security::Tls { config, name, .. } = security else { panic!("it is TLS") };
    check_place("r", &remote, &Security::Tls { config, name, has_certificate: true }, true)
        .expect("a certificate is something");
}
