use std::collections::HashMap;
use std::net::SocketAddr;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, SupportedProtocolVersion};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;

use super::*;
use crate::config::tls::{Authorities, Certificate, ClientTls, TlsVersion, Trust};
use crate::tls::{certified_key, client_config, provider, roots};

/// A CA and what it signs.
struct Ca(CertifiedIssuer<'static, KeyPair>);

impl Ca {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn sign(&self, names: &[&str]) -> Arc<Certificate> {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names.clone()).unwrap();
        params.distinguished_name.push(DnType::CommonName, names[0].as_str());
        let signed = params.signed_by(&key, &self.0).unwrap();
        let certificate =
            Certificate::from_pem("test.crt", &signed.pem(), &key.serialize_pem()).unwrap();
        Arc::new(certificate)
    }

    fn authorities(&self) -> Authorities {
        Authorities::from_pem("ca.crt", &self.0.pem()).unwrap()
    }
}

fn server(certificates: &[&Arc<Certificate>]) -> ServerTls {
    ServerTls {
        certificates: certificates.iter().map(|one| Arc::clone(one)).collect(),
        acme: Vec::new(),
        min_version: TlsVersion::V1_2,
        clients: None,
    }
}

fn acceptor(tls: &ServerTls) -> Acceptor {
    Acceptor::new(tls, None, &Arc::default()).unwrap()
}

fn client(ca: &Ca, alpn: &[&[u8]]) -> ClientConfig {
    let trust = Trust::Authorities(ca.authorities());
    client_config(&ClientTls { trust, ..ClientTls::default() }, alpn).unwrap()
}

fn with_certificate(ca: &Ca, certificate: &Arc<Certificate>) -> ClientConfig {
    let trust = Trust::Authorities(ca.authorities());
    let certificate = Some(Arc::clone(certificate));
    client_config(&ClientTls { trust, certificate, server_name: None }, &[]).unwrap()
}

fn of_version(ca: &Ca, version: &'static SupportedProtocolVersion) -> ClientConfig {
    ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots(&ca.authorities()).unwrap())
        .with_no_client_auth()
}

/// Both ends of a connection over loopback.
async fn connection() -> (TcpStream, Socket) {
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
    (client.unwrap(), Socket::new(accepted.unwrap().0))
}

async fn accept(
    acceptor: &Acceptor,
    socket: Socket,
    carries: &Carries,
) -> Result<(Accepted, &'static str), HandshakeError> {
    acceptor.greet(socket, carries).await?.shake_hands().await
}

type Shaken = (Result<(Accepted, &'static str), HandshakeError>, io::Result<ClientConnection>);

/// Makes a handshake, and reads on at the client's end until the first byte, so that tickets arrive
/// and the server's last word does.
async fn shake(
    acceptor: &Acceptor,
    config: &Arc<ClientConfig>,
    name: &str,
    carries: Carries,
) -> Shaken {
    let (stream, socket) = connection().await;
    let server = async {
        let mut shaken = accept(acceptor, socket, &carries).await;
        if let Ok((Accepted::Client(stream, _) | Accepted::Sidecar(stream), _)) = &mut shaken {
            stream.write_all(b"!").await.unwrap();
            stream.flush().await.unwrap();
        }
        shaken
    };
    let client = async {
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let mut stream = TlsConnector::from(Arc::clone(config)).connect(name, stream).await?;
        stream.read_u8().await?;
        Ok(stream.into_inner().1)
    };
    tokio::join!(server, client)
}

async fn facts(acceptor: &Acceptor, config: ClientConfig, name: &str) -> TlsFacts {
    match shake(acceptor, &Arc::new(config), name, Carries::Http).await {
        (Ok((Accepted::Client(_, facts), _)), _) => facts,
        (Ok(_), _) => panic!("no client"),
        (Err(error), _) => panic!("{error:?}"),
    }
}

async fn label(acceptor: &Acceptor, config: ClientConfig, name: &str) -> &'static str {
    match shake(acceptor, &Arc::new(config), name, Carries::Http).await.0 {
        Ok((_, result)) => result,
        Err(error) => error.label(),
    }
}

#[tokio::test]
async fn the_certificate_is_that_of_the_name_and_says_the_hosts() {
    let ca = Ca::new("ca");
    let first = ca.sign(&["a.example.org", "127.0.0.1"]);
    let wild = ca.sign(&["*.example.org"]);
    let acceptor = acceptor(&server(&[&first, &wild]));
    for (name, hosts) in [
        ("a.example.org", Hosts::Named("a.example.org".into())),
        ("B.example.org", Hosts::Named("b.example.org".into())),
        ("127.0.0.1", Hosts::Shown(Arc::clone(&first.names))),
    ] {
        assert_eq!(facts(&acceptor, client(&ca, &[]), name).await.hosts, hosts, "{name}");
    }
    let trust = Trust::Anybody;
    let trusting = client_config(&ClientTls { trust, ..ClientTls::default() }, &[]).unwrap();
    let facts = facts(&acceptor, trusting, "a.example.com").await;
    assert_eq!((&*facts.sni, facts.hosts), ("a.example.com", Hosts::default()));
    // A client that verifies sees that it is not for the name.
    let result = label(&acceptor, client(&ca, &[]), "a.example.com").await;
    assert_eq!(result, "rejected");
}

#[tokio::test]
async fn what_was_obtained_meanwhile_is_shown_and_says_the_hosts() {
    let ca = Ca::new("ca");
    let issued = Arc::new(Issued::default());
    let tls = ServerTls { acme: vec!["a.example.org".into()], ..server(&[]) };
    let acceptor = Acceptor::new(&tls, None, &issued).unwrap();
    assert_eq!(label(&acceptor, client(&ca, &[]), "a.example.org").await, "failed");
    let obtained = certified_key(&ca.sign(&["a.example.org"])).unwrap();
    issued.certificates.store(Arc::new(HashMap::from([("a.example.org".into(), obtained)])));
    let facts = facts(&acceptor, client(&ca, &[]), "a.example.org").await;
    assert_eq!(facts.hosts, Hosts::Named("a.example.org".into()));
}

#[tokio::test]
async fn the_protocol_is_agreed_on_or_the_handshake_fails() {
    let ca = Ca::new("ca");
    let tls = server(&[&ca.sign(&["a.example.org"])]);
    let sidecars = Some(SidecarTls { clients: None });
    let shared = Acceptor::new(&tls, sidecars, &Arc::default()).unwrap();
    let clients = acceptor(&tls);
    let lines = || Carries::Type("LINES".into());
    let table: [(&Acceptor, Carries, &[&[u8]], &str); 14] = [
        (&clients, Carries::Http, &[b"h2", b"http/1.1"], "client h2"),
        (&clients, Carries::Http, &[b"http/1.1", b"h2"], "client h2"),
        (&clients, Carries::Http, &[b"http/1.1"], "client http/1.1"),
        (&clients, Carries::Http, &[], "client "),
        (&clients, Carries::Http, &[b"lines"], "incompatible"),
        (&clients, Carries::Http, &[TUNNEL_ALPN], "incompatible"),
        (&clients, Carries::Sniffed, &[b"lines"], "client "),
        (&clients, Carries::Sniffed, &[b"lines", b"h2"], "client h2"),
        (&clients, lines(), &[b"h2"], "client "),
        (&clients, lines(), &[], "client "),
        (&shared, Carries::Http, &[TUNNEL_ALPN], "sidecar"),
        (&shared, Carries::Http, &[b"h2"], "client h2"),
        (&shared, lines(), &[TUNNEL_ALPN], "sidecar"),
        // Nothing is to be proved.
        (&shared, Carries::Http, &[ACME_ALPN], "failed"),
    ];
    for (acceptor, carries, alpn, expected) in table {
        let config = Arc::new(client(&ca, alpn));
        let (shaken, told) = shake(acceptor, &config, "a.example.org", carries).await;
        let result = match &shaken {
            Ok((Accepted::Client(_, facts), _)) => format!("client {}", facts.alpn),
            Ok((Accepted::Sidecar(_), _)) => "sidecar".to_owned(),
            Ok((Accepted::Authority, _)) => "authority".to_owned(),
            Err(error) => error.label().to_owned(),
        };
        assert_eq!(result, expected, "{alpn:?}");
        if result == "incompatible" {
            let told = told.err().map(|error| error.to_string()).unwrap_or_default();
            assert!(told.contains("NoApplicationProtocol"), "{told}");
        }
    }
}

#[tokio::test]
async fn an_authority_sees_the_proof_of_a_name() {
    let ca = Ca::new("ca");
    let issued = Arc::new(Issued::default());
    let proof = ca.sign(&["a.example.org"]);
    let challenges = HashMap::from([("a.example.org".into(), certified_key(&proof).unwrap())]);
    issued.challenges.store(Arc::new(challenges));
    let mut tls = server(&[&ca.sign(&["b.example.org"])]);
    // Whoever comes without one is no client here.
    tls.clients = Some(clients(&ca, true));
    let acceptor = Acceptor::new(&tls, None, &issued).unwrap();
    let (stream, socket) = connection().await;
    let name = ServerName::try_from("a.example.org").unwrap();
    let connector = TlsConnector::from(Arc::new(client(&ca, &[ACME_ALPN])));
    let (shaken, stream) =
        tokio::join!(accept(&acceptor, socket, &Carries::Http), connector.connect(name, stream));
    assert!(matches!(shaken, Ok((Accepted::Authority, "full"))));
    let mut stream = stream.unwrap();
    assert_eq!(stream.get_ref().1.peer_certificates().unwrap(), &*proof.chain);
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(ACME_ALPN));
    // And is closed, with a word of TLS's own.
    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
}

#[tokio::test]
async fn both_versions_are_spoken_unless_one_is_too_old() {
    let ca = Ca::new("ca");
    let tls = server(&[&ca.sign(&["a.example.org"])]);
    let newest = ServerTls { min_version: TlsVersion::V1_3, ..tls.clone() };
    let (both, newest) = (acceptor(&tls), acceptor(&newest));
    let (old, new) = (&rustls::version::TLS12, &rustls::version::TLS13);
    for (acceptor, version, expected) in [
        (&both, old, "full"),
        (&both, new, "full"),
        (&newest, old, "incompatible"),
        (&newest, new, "full"),
    ] {
        let result = label(acceptor, of_version(&ca, version), "a.example.org").await;
        assert_eq!(result, expected, "{version:?}");
    }
}

#[tokio::test]
async fn a_session_is_resumed_until_the_listeners_tls_is_another() {
    let ca = Ca::new("ca");
    let tls = server(&[&ca.sign(&["a.example.org"])]);
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let config = Arc::new(of_version(&ca, version));
        let acceptor = acceptor(&tls);
        let mut results = Vec::new();
        let other = Acceptor::new(&tls, None, &Arc::default()).unwrap();
        for acceptor in [&acceptor, &acceptor, &other] {
            let shaken = shake(acceptor, &config, "a.example.org", Carries::Http).await.0;
            results.push(shaken.map(|(_, result)| result).unwrap_or("failed"));
        }
        assert_eq!(results, ["full", "resumed", "full"], "{version:?}");
    }
    let same = acceptor(&tls);
    assert!(same.is_of(&tls, None));
    assert!(!same.is_of(&tls, Some(&SidecarTls { clients: None })));
    assert!(!same.is_of(&server(&[&ca.sign(&["a.example.org"])]), None));
}

fn clients(ca: &Ca, required: bool) -> ClientCertificates {
    ClientCertificates { authorities: ca.authorities(), required, forward: true }
}

#[tokio::test]
async fn a_clients_certificate_is_asked_for_and_told() {
    let (ca, theirs) = (Ca::new("ca"), Ca::new("theirs"));
    let mut tls = server(&[&ca.sign(&["a.example.org"])]);
    tls.clients = Some(clients(&theirs, true));
    let required = acceptor(&tls);
    tls.clients = Some(clients(&theirs, false));
    let optional = acceptor(&tls);
    let (known, unknown) = (theirs.sign(&["shop.internal"]), ca.sign(&["evil.internal"]));
    let name = "a.example.org";
    assert_eq!(label(&required, client(&ca, &[]), name).await, "certificate");
    assert_eq!(label(&required, with_certificate(&ca, &unknown), name).await, "certificate");
    assert_eq!(label(&optional, with_certificate(&ca, &unknown), name).await, "certificate");
    let nobody = facts(&optional, client(&ca, &[]), name).await;
    assert!(nobody.client.is_empty() && nobody.client_fields.is_none());
    for acceptor in [&required, &optional] {
        let facts = facts(acceptor, with_certificate(&ca, &known), name).await;
        assert_eq!(&*facts.client, "CN=shop.internal");
        assert_eq!(
            facts.client_fields,
            Some(crate::front::ClientFields::new(&known.chain[0], &[]))
        );
        assert!(facts.client_sha256.is_some());
    }
}

/// Of a session that is resumed nobody looks at the certificate again, and it would be resumed for ever.
#[tokio::test]
async fn who_is_asked_for_a_certificate_shows_it_each_time() {
    let (ca, theirs) = (Ca::new("ca"), Ca::new("theirs"));
    let mut tls = server(&[&ca.sign(&["a.example.org"])]);
    tls.clients = Some(clients(&theirs, false));
    let acceptor = acceptor(&tls);
    let mut old = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_root_certificates(roots(&ca.authorities()).unwrap())
        .with_no_client_auth();
    let known = theirs.sign(&["shop.internal"]);
    let new = with_certificate(&ca, &known);
    old.client_auth_cert_resolver = Arc::clone(&new.client_auth_cert_resolver);
    for config in [Arc::new(old), Arc::new(new)] {
        for carries in [Carries::Http, Carries::Http, Carries::Type("LINES".into())] {
            let shaken = shake(&acceptor, &config, "a.example.org", carries).await.0;
            assert_eq!(shaken.map(|(_, result)| result).unwrap_or("failed"), "full");
        }
    }
}

#[tokio::test]
async fn what_is_no_tls_is_told_so_where_it_is_http() {
    let ca = Ca::new("ca");
    let acceptor = acceptor(&server(&[&ca.sign(&["a.example.org"])]));
    let lines = || Carries::Type("LINES".into());
    let table: [(&[u8], Carries, &str, bool); 6] = [
        (b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", Carries::Http, "not_tls", true),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Carries::Sniffed, "not_tls", true),
        (b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", lines(), "not_tls", false),
        (b"\x00\x01\x02", Carries::Http, "not_tls", false),
        (b"\x16\x03\x01\xff\xffgarbage that goes on", Carries::Http, "failed", false),
        (b"", Carries::Http, "closed", false),
    ];
    for (sent, carries, expected, is_told) in table {
        let (mut stream, socket) = connection().await;
        let client = async {
            stream.write_all(sent).await.unwrap();
            stream.shutdown().await.unwrap();
            let mut answer = Vec::new();
            // A reset, where what was sent was not read to its end.
            let _ = stream.read_to_end(&mut answer).await;
            String::from_utf8_lossy(&answer).into_owned()
        };
        let (shaken, answer) = tokio::join!(accept(&acceptor, socket, &carries), client);
        assert_eq!(shaken.err().map(|error| error.label()), Some(expected), "{sent:?}");
        assert_eq!(answer.starts_with("HTTP/1.1 400 "), is_told, "{sent:?}: {answer}");
        assert_eq!(answer.ends_with("\r\n\r\nbad-request: this port speaks https\n"), is_told);
    }
}

#[tokio::test]
async fn a_sidecar_without_tls_is_known_by_its_hello_where_sidecars_come_in() {
    let ca = Ca::new("ca");
    let tls = server(&[&ca.sign(&["a.example.org"])]);
    let sidecars = Some(SidecarTls { clients: None });
    let shared = Acceptor::new(&tls, sidecars, &Arc::default()).unwrap();
    let table: [(&[u8], bool); 9] = [
        (b"\x47\x82\x02\x45", true),
        (b"\xc8\x01\x82\x02\xc5\x01", true),
        (b"\x80\x80\x01\x82\x02", true),
        (b"\x80\x80\x80\x01\x82\x02", false),
        (b"GET / HTTP/1.1\r\n", false),
        (b"\x16\x03\x01", false),
        (b"\xc8\x01\x82", false),
        (b"\x00\x01", false),
        (b"", false),
    ];
    for (sent, expected) in table {
        for (acceptor, expected) in [(&shared, expected), (&acceptor(&tls), false)] {
            let (mut stream, mut socket) = connection().await;
            stream.write_all(sent).await.unwrap();
            stream.shutdown().await.unwrap();
            let is_hello = acceptor.hears_plain_sidecar(&mut socket).await.unwrap();
            assert_eq!(is_hello, expected, "{sent:?}");
        }
    }
}
