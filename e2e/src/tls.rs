//! A client's end of TLS, which believes one authority and says what was agreed on.

use std::fs;
use std::io::{self, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned, SupportedProtocolVersion,
};

use crate::authority::Files;
use crate::client::{Client, tune};

/// A connection with TLS.
pub type TlsStream = StreamOwned<ClientConnection, TcpStream>;

/// Makes connections, and resumes their sessions where it can.
#[derive(Clone, Debug)]
pub struct Connector(Arc<ClientConfig>);

impl Connector {
    /// Returns one that believes the authority in a PEM file.
    #[must_use]
    pub fn new(ca: &Path) -> Self {
        Self::with(ca, &[&rustls::version::TLS13, &rustls::version::TLS12], None, &[])
    }

    /// The same with versions of TLS, a certificate to show, and protocols to offer.
    #[must_use]
    pub fn with(
        ca: &Path,
        versions: &[&'static SupportedProtocolVersion],
        certificate: Option<&Files>,
        alpn: &[&str],
    ) -> Self {
        let mut roots = RootCertStore::empty();
        for authority in chain(ca) {
            roots.add(authority).expect("an authority");
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .expect("versions of TLS")
            .with_root_certificates(roots);
        let mut config = match certificate {
            None => builder.with_no_client_auth(),
            Some(files) => {
                let key = PrivateKeyDer::from_pem_file(&files.key).expect("a key");
                builder.with_client_auth_cert(chain(&files.cert), key).expect("its key")
            }
        };
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        Self(Arc::new(config))
    }

    /// Connects, and names `name` (an address: nothing) in the hello.
    ///
    /// # Errors
    /// Why the handshake failed.
    pub fn try_connect(&self, relay: SocketAddr, name: &str) -> io::Result<Client> {
        self.try_connect_behind(relay, name, b"")
    }

    /// The same behind other bytes, which go out with the hello in one piece.
    ///
    /// # Errors
    /// Why the handshake failed.
    pub fn try_connect_behind(
        &self,
        relay: SocketAddr,
        name: &str,
        first: &[u8],
    ) -> io::Result<Client> {
        let name = ServerName::try_from(name.to_owned()).expect("a name");
        let connection = ClientConnection::new(Arc::clone(&self.0), name).expect("a configuration");
        let stream = TcpStream::connect(relay)?;
        tune(&stream);
        let mut stream = StreamOwned::new(connection, stream);
        let mut begin = first.to_vec();
        while stream.conn.wants_write() {
            stream.conn.write_tls(&mut begin)?;
        }
        stream.sock.write_all(&begin)?;
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        Ok(Client::over_tls(stream))
    }

    /// As [`Self::try_connect`], where nothing is to fail.
    #[must_use]
    pub fn connect(&self, relay: SocketAddr, name: &str) -> Client {
        self.try_connect(relay, name).unwrap_or_else(|error| panic!("{name}: {error}"))
    }
}

/// Returns the certificates of a PEM file.
#[must_use]
pub fn chain(file: &Path) -> Vec<CertificateDer<'static>> {
    let pem = fs::read(file).expect("a file");
    CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().expect("PEM")
}
