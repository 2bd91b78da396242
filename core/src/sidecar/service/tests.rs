//! Connections by TLS, to a rustls server on loopback.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};
use rustls::server::WebPkiClientVerifier;
use rustls::{HandshakeKind, RootCertStore, ServerConfig};
use sidelane_abi::failure;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::dial::{DialError, Dialer};
use super::{Asked, Services};
use crate::config::tls::{Authorities, Certificate, ClientTls, Trust};
use crate::config::{HostPort, HttpVersion, Pool, ProxyVersion, ServiceAddress, Tunnel};
use crate::plugin::lend::{Connected, Service as _, Text};
use crate::sidecar::proxy_header::Origin;
use crate::tls::provider;

pub(in crate::sidecar) struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub(in crate::sidecar) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        Self(CertifiedIssuer::self_signed(params, key).unwrap())
    }

    pub(in crate::sidecar) fn trust(&self) -> Trust {
        Trust::Authorities(Authorities::from_pem("ca.pem", &self.0.pem()).unwrap())
    }

    pub(in crate::sidecar) fn sign(
        &self,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Certificate {
        let mut params = CertificateParams::new(["app.local".to_owned()]).unwrap();
        params.subject_alt_names.push(SanType::IpAddress(IpAddr::from([127, 0, 0, 1])));
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        Certificate::from_pem("app.pem", &certificate.pem(), &key.serialize_pem()).unwrap()
    }
}

/// A service that speaks TLS.
pub(in crate::sidecar) struct Service {
    listener: TcpListener,
    acceptor: TlsAcceptor,
    pub(in crate::sidecar) tunnel: Tunnel,
}

/// What a service is made of.
pub(in crate::sidecar) struct Makings {
    certificate: Certificate,
    clients: Option<RootCertStore>,
    pub(in crate::sidecar) alpn: &'static [&'static [u8]],
    versions: &'static [&'static rustls::SupportedProtocolVersion],
}

impl Makings {
    pub(in crate::sidecar) fn of(certificate: Certificate) -> Self {
        Self { certificate, clients: None, alpn: &[], versions: rustls::ALL_VERSIONS }
    }

    pub(in crate::sidecar) async fn serve(self, trust: Trust) -> Service {
        let builder = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(self.versions)
            .unwrap();
        let builder = match self.clients {
            None => builder.with_no_client_auth(),
            Some(roots) => builder.with_client_cert_verifier(
                WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
                    .build()
                    .unwrap(),
            ),
        };
        let (chain, key) = (self.certificate.chain.to_vec(), self.certificate.key().clone_key());
        let mut config = builder.with_single_cert(chain, key).unwrap();
        config.alpn_protocols = self.alpn.iter().map(|protocol| protocol.to_vec()).collect();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let tls = ClientTls { trust, ..ClientTls::default() };
        let service = ServiceAddress::Tcp(HostPort { host: "127.0.0.1".into(), port });
        Service { listener, acceptor: Arc::new(config).into(), tunnel: tunnel(service, tls) }
    }
}

fn tunnel(service: ServiceAddress, tls: ClientTls) -> Tunnel {
    Tunnel {
        name: "t".into(),
        service,
        protocols: None,
        connect_timeout: Duration::from_secs(30),
        tls: Some(Arc::new(tls)),
        http_version: HttpVersion::Auto,
        pool: Pool::default(),
        proxy_protocol: None,
        health_check: None,
        wait: Duration::ZERO,
        weight: 1,
    }
}

pub(in crate::sidecar) type Accepted = std::io::Result<TlsStream<TcpStream>>;

impl Service {
    pub(in crate::sidecar) fn tls(&mut self) -> &mut ClientTls {
        Arc::make_mut(self.tunnel.tls.as_mut().unwrap())
    }

    fn dialer(&self) -> Dialer {
        Dialer::new(&Arc::new(self.tunnel.clone()))
    }

    pub(in crate::sidecar) async fn accept(&self) -> Accepted {
        let (stream, _) = self.listener.accept().await?;
        self.acceptor.accept(stream).await
    }

    /// Both ends of one connection.
    async fn meet(
        &self,
        dialer: &Dialer,
        offered: &[&[u8]],
    ) -> (Result<Connected, DialError>, Accepted) {
        let offered = offered.iter().map(|protocol| protocol.to_vec()).collect();
        tokio::join!(dialer.dial(Origin::Own, offered), self.accept())
    }

    /// Why it is not connected to.
    async fn reason(&self) -> String {
        match self.meet(&self.dialer(), &[b"http/1.1"]).await.0 {
            Ok(_) => panic!("connected"),
            Err(error) => error.reason(),
        }
    }
}

async fn well(authority: &Authority) -> Service {
    Makings::of(authority.sign(|_| {})).serve(authority.trust()).await
}

#[tokio::test]
async fn a_certificate_of_the_address_or_of_the_name_asked_for_is_believed() {
    let authority = Authority::new("ours");
    let mut service = well(&authority).await;
    for (server_name, asked) in [(None, None), (Some("app.local"), Some("app.local"))] {
        service.tls().server_name = server_name.map(Into::into);
        let (client, served) = service.meet(&service.dialer(), &[]).await;
        let (mut client, mut served) = (client.unwrap().stream, served.unwrap());
        assert_eq!(served.get_ref().1.server_name(), asked);
        client.write_all(b"ping").await.unwrap();
        client.flush().await.unwrap();
        let mut got = [0; 4];
        served.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"ping");
    }
}

#[tokio::test]
async fn a_session_is_resumed_while_the_settings_stay() {
    let authority = Authority::new("ours");
    let service = well(&authority).await;
    let dialer = service.dialer();
    for kind in [HandshakeKind::Full, HandshakeKind::Resumed] {
        let (client, served) = service.meet(&dialer, &[b"h2"]).await;
        let (mut client, mut served) = (client.unwrap().stream, served.unwrap());
        assert_eq!(served.get_ref().1.handshake_kind(), Some(kind));
        // Tickets come with the first bytes.
        served.write_all(b"x").await.unwrap();
        served.flush().await.unwrap();
        client.read_u8().await.unwrap();
    }
    // A version of the settings has its own.
    let (_client, served) = service.meet(&service.dialer(), &[]).await;
    assert_eq!(served.unwrap().get_ref().1.handshake_kind(), Some(HandshakeKind::Full));
}

#[tokio::test]
async fn what_was_agreed_on_is_told() {
    let authority = Authority::new("ours");
    const BOTH: &[&[u8]] = &[b"h2", b"http/1.1"];
    for (speaks, offered, agreed) in
        [(BOTH, BOTH, Some(0)), (&BOTH[1..], BOTH, Some(1)), (&[], BOTH, None), (BOTH, &[], None)]
    {
        let makings = Makings { alpn: speaks, ..Makings::of(authority.sign(|_| {})) };
        let service = makings.serve(authority.trust()).await;
        let (client, _served) = service.meet(&service.dialer(), offered).await;
        assert_eq!(client.unwrap().protocol, agreed);
    }
    let makings = Makings { alpn: &[b"h2"], ..Makings::of(authority.sign(|_| {})) };
    let service = makings.serve(authority.trust()).await;
    assert_eq!(
        service.reason().await,
        "the service speaks none of http/1.1 (ALPN); `http_version` says what it is spoken to by"
    );
}

#[tokio::test]
async fn a_certificate_that_is_not_believed_is_told_with_its_remedy() {
    let (authority, other) = (Authority::new("ours"), Authority::new("theirs"));
    let mut service = well(&authority).await;
    service.tls().trust = other.trust();
    assert_eq!(
        service.reason().await,
        "the service's certificate is signed by none of the authorities in ca.pem; `tls.ca` names who \
         signs it"
    );

    // Made anew under its old name.
    service.tls().trust = Authority::new("ours").trust();
    assert_eq!(
        service.reason().await,
        "the service's certificate is signed by none of the authorities in ca.pem, though by one of the \
         same name: one of them was made anew; `tls.ca` names who signs it"
    );

    service.tls().trust = authority.trust();
    service.tls().server_name = Some("other.local".into());
    assert_eq!(
        service.reason().await,
        "the service's certificate is for app.local, 127.0.0.1 and not for other.local; \
         `tls.server_name` says which name it is for"
    );

    let expired = authority.sign(|params| {
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2021, 1, 1);
    });
    let reason = Makings::of(expired).serve(authority.trust()).await.reason().await;
    assert!(reason.starts_with("the service's certificate has expired: "), "{reason}");

    let not_yet = authority.sign(|params| params.not_before = rcgen::date_time_ymd(2300, 1, 1));
    let reason = Makings::of(not_yet).serve(authority.trust()).await.reason().await;
    assert!(reason.starts_with("the service's certificate is not valid yet"), "{reason}");

    let own = authority.sign(|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
    let reason = Makings::of(own).serve(authority.trust()).await.reason().await;
    assert!(reason.contains("an authority's own (CA:TRUE)"), "{reason}");
}

#[tokio::test]
async fn anybody_is_believed_where_the_settings_say_so() {
    let authority = Authority::new("ours");
    let expired = authority.sign(|params| params.not_after = rcgen::date_time_ymd(2021, 1, 1));
    let mut service = Makings::of(expired).serve(Trust::Anybody).await;
    service.tls().server_name = Some("other.local".into());
    let (client, served) = service.meet(&service.dialer(), &[]).await;
    assert!(client.is_ok() && served.is_ok());
}

#[tokio::test]
async fn a_service_that_speaks_no_tls_is_told_so() {
    let authority = Authority::new("ours");
    let service = well(&authority).await;
    for (answer, start) in [
        (&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], "the service answers, but not by TLS: "),
        (b"", "the service closed the connection during the TLS handshake (if it speaks no TLS: "),
    ] {
        let dialer = service.dialer();
        let serve = async {
            let (mut stream, _) = service.listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 4096]).await;
            stream.write_all(answer).await.unwrap();
        };
        let (client, ()) = tokio::join!(dialer.dial(Origin::Own, Vec::new()), serve);
        let reason = client.err().unwrap().reason();
        assert!(reason.starts_with(start), "{reason}");
    }
}

#[tokio::test]
async fn a_client_certificate_that_is_wanted_is_shown_or_missed() {
    let authority = Authority::new("ours");
    static TLS12: [&rustls::SupportedProtocolVersion; 1] = [&rustls::version::TLS12];
    static TLS13: [&rustls::SupportedProtocolVersion; 1] = [&rustls::version::TLS13];
    for versions in [&TLS12, &TLS13] {
        let mut roots = RootCertStore::empty();
        roots.add(authority.0.der().clone()).unwrap();
        let clients = Some(roots);
        let makings = Makings { clients, versions, ..Makings::of(authority.sign(|_| {})) };
        let mut service = makings.serve(authority.trust()).await;
        let (client, served) = service.meet(&service.dialer(), &[]).await;
        assert!(served.is_err());
        // With TLS 1.3 the client is through before the service has looked at its certificate.
        match client {
            Err(error) => {
                let reason = error.reason();
                assert!(reason.contains("client certificate"), "{reason}");
                assert!(reason.contains("`tls.certificate`"), "{reason}");
            }
            Ok(mut client) => {
                let error = client.stream.read_u8().await.unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
            }
        }
        service.tls().certificate = Some(Arc::new(authority.sign(|_| {})));
        let (client, served) = service.meet(&service.dialer(), &[]).await;
        client.unwrap();
        assert!(served.unwrap().get_ref().1.peer_certificates().is_some());
    }
}

#[tokio::test]
async fn each_direction_is_closed_on_its_own() {
    let authority = Authority::new("ours");
    let service = well(&authority).await;
    let (client, served) = service.meet(&service.dialer(), &[]).await;
    let (mut client, mut served) = (client.unwrap().stream, served.unwrap());
    assert!(client.is_write_vectored());
    client.write_all(b"all").await.unwrap();
    client.shutdown().await.unwrap();
    let mut got = Vec::new();
    // Ends well: `close_notify` came.
    served.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, b"all");
    served.write_all(b"answer").await.unwrap();
    served.shutdown().await.unwrap();
    let mut got = Vec::new();
    client.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, b"answer");
}

#[tokio::test]
async fn an_end_without_close_notify_is_an_error() {
    let authority = Authority::new("ours");
    let service = well(&authority).await;
    let (client, served) = service.meet(&service.dialer(), &[]).await;
    let (mut client, mut served) = (client.unwrap().stream, served.unwrap());
    served.write_all(b"half").await.unwrap();
    served.flush().await.unwrap();
    let (mut socket, _) = served.into_inner();
    socket.shutdown().await.unwrap();
    let mut got = Vec::new();
    let error = client.read_to_end(&mut got).await.unwrap_err();
    assert_eq!((&*got, error.kind()), (&b"half"[..], std::io::ErrorKind::UnexpectedEof));
}

#[tokio::test]
async fn the_proxy_header_comes_before_tls() {
    let authority = Authority::new("ours");
    let mut service = well(&authority).await;
    service.tunnel.proxy_protocol = Some(ProxyVersion::V1);
    let dialer = service.dialer();
    let serve = async {
        let (mut stream, _) = service.listener.accept().await.unwrap();
        let mut header = Vec::new();
        while !header.ends_with(b"\r\n") {
            header.push(stream.read_u8().await.unwrap());
        }
        (String::from_utf8(header).unwrap(), service.acceptor.accept(stream).await)
    };
    let origin = Origin::of("192.0.2.1:4711");
    let (client, (header, served)) = tokio::join!(dialer.dial(origin, Vec::new()), serve);
    assert!(client.is_ok() && served.is_ok());
    assert!(header.starts_with("PROXY TCP4 192.0.2.1 127.0.0.1 4711 "), "{header}");
}

#[tokio::test]
async fn plugins_get_tls_and_its_settings_within_the_connect_timeout() {
    let authority = Authority::new("ours");
    let service = well(&authority).await;
    let tunnel = Arc::new(service.tunnel.clone());
    let services = Services::default().updated([&tunnel]);
    let find = |connect_timeout| {
        let client_address = Text::default();
        services.find("t", Asked { client_address, connect_timeout, retries: None }).unwrap()
    };
    let handle = find(None);
    let settings = handle.settings();
    assert!(settings.tls);
    assert_eq!(settings.http_version, HttpVersion::Auto);
    let (client, served) = tokio::join!(handle.connect(vec![b"h2".to_vec()]), service.accept());
    assert!(client.is_ok() && served.is_ok());
    // Accepted by the system, and never answered.
    let handle = find(Some(Duration::from_millis(1)));
    let (code, error) = handle.connect(Vec::new()).await.err().unwrap();
    assert_eq!((code, error.kind()), (failure::SERVICE_TIMEOUT, std::io::ErrorKind::TimedOut));
    assert!(service.accept().await.is_err());

    let mut other = Tunnel::clone(&tunnel);
    other.tls =
        Some(ClientTls { trust: Authority::new("ours").trust(), ..ClientTls::default() }.into());
    let services = services.updated([&Arc::new(other)]);
    let asked = Asked { client_address: Text::default(), connect_timeout: None, retries: None };
    let handle = services.find("t", asked).unwrap();
    assert_eq!(handle.version(), 2);
    let (client, served) = tokio::join!(handle.connect(Vec::new()), service.accept());
    assert_eq!(client.err().map(|(code, _)| code), Some(failure::SERVICE_UNREACHABLE));
    assert!(served.is_err());
}

#[tokio::test]
async fn a_name_that_no_certificate_can_be_for_is_told() {
    let address = HostPort { host: "127.0.0.1".into(), port: 1 };
    let tls =
        ClientTls { trust: Trust::Anybody, server_name: Some("a b".into()), certificate: None };
    let dialer = Dialer::new(&Arc::new(tunnel(ServiceAddress::Tcp(address), tls)));
    let error = dialer.dial(Origin::Own, Vec::new()).await.err().unwrap();
    assert_eq!(
        error.reason(),
        "\"a b\" is no name that a certificate can be for; say which by `tls.server_name`"
    );
}
