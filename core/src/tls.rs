//! TLS as rustls does it, with aws-lc-rs: what the configuration's certificates and authorities become.
//!
//! Knows certificates, names and what is negotiated; knows no sockets.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, LazyLock, OnceLock};

use arc_swap::ArcSwap;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme,
    SupportedProtocolVersion,
};
use thiserror::Error;

use crate::config::tls::{Authorities, Certificate, ClientTls, ServerTls, TlsVersion, Trust};

pub mod identity;

/// The tunnel's application protocol (ALPN, RFC 7301): one port can serve clients and sidecars by it.
pub const TUNNEL_ALPN: &[u8] = b"sidelane/1";

/// HTTP/2's.
pub const H2_ALPN: &[u8] = b"h2";

/// HTTP/1.1's.
pub const HTTP1_ALPN: &[u8] = b"http/1.1";

/// What ACME proves a name by (RFC 8737).
pub const ACME_ALPN: &[u8] = b"acme-tls/1";

/// Why there is no TLS to be had of a configuration.
#[derive(Debug, Error)]
pub enum TlsError {
    /// The system has no authorities.
    #[error("the system has no certificate authorities to trust; name them by `ca`")]
    NoAuthorities,
    /// An authority, or what is asked for, cannot be used.
    #[error("{what} cannot be used")]
    Unusable {
        /// What.
        what: String,
        /// Why.
        #[source]
        source: rustls::Error,
    },
}

/// The one provider of cryptography.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> =
        LazyLock::new(|| Arc::new(rustls::crypto::aws_lc_rs::default_provider()));
    Arc::clone(&PROVIDER)
}

/// Returns the certificate with its key as rustls signs with it.
///
/// # Errors
/// The key cannot be used, or is another certificate's.
pub fn certified_key(certificate: &Certificate) -> Result<Arc<CertifiedKey>, String> {
    let key = CertifiedKey::from_der(
        certificate.chain.to_vec(),
        certificate.key().clone_key(),
        &provider(),
    );
    match key {
        Ok(key) => Ok(Arc::new(key)),
        Err(rustls::Error::InconsistentKeys(_)) => Err(format!(
            "is not the key of {} (accepted: the key that this certificate was made for)",
            certificate.place
        )),
        Err(error) => Err(format!("cannot be used: {error} (accepted: RSA, ECDSA or Ed25519)")),
    }
}

/// Certificates that are obtained while the relay runs, and what proves names meanwhile (ACME).
#[derive(Default)]
pub struct Issued {
    /// By name.
    pub certificates: ArcSwap<HashMap<Arc<str>, Arc<CertifiedKey>>>,
    /// By name: shown to whoever asks by [`ACME_ALPN`].
    pub challenges: ArcSwap<HashMap<Arc<str>, Arc<CertifiedKey>>>,
    /// By token: what `/.well-known/acme-challenge/<token>` answers (RFC 8555 §8.3).
    pub answers: ArcSwap<HashMap<Arc<str>, Arc<str>>>,
}

impl fmt::Debug for Issued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Issued").finish_non_exhaustive()
    }
}

/// Which certificate is shown to whom: exact names first, then one-label wildcards, then the first.
pub struct Resolver {
    by_name: HashMap<Arc<str>, Arc<CertifiedKey>>,
    /// By what follows `*.`.
    by_parent: HashMap<Arc<str>, Arc<CertifiedKey>>,
    first: Option<Arc<CertifiedKey>>,
    acme: Vec<Arc<str>>,
    issued: Arc<Issued>,
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resolver").field("names", &self.by_name.len()).finish_non_exhaustive()
    }
}

impl Resolver {
    /// Returns the resolver of these certificates; what is issued meanwhile comes before them.
    ///
    /// # Errors
    /// A key that is not its certificate's; a configuration's are.
    pub fn new(tls: &ServerTls, issued: Arc<Issued>) -> Result<Self, String> {
        let mut resolver = Self {
            by_name: HashMap::new(),
            by_parent: HashMap::new(),
            first: None,
            acme: tls.acme.clone(),
            issued,
        };
        for certificate in &tls.certificates {
            let key = certified_key(certificate)?;
            for name in certificate.names.iter() {
                let (map, name) = match name.strip_prefix("*.") {
                    Some(parent) => (&mut resolver.by_parent, parent.into()),
                    None => (&mut resolver.by_name, Arc::clone(name)),
                };
                map.entry(name).or_insert_with(|| Arc::clone(&key));
            }
            resolver.first.get_or_insert(key);
        }
        Ok(resolver)
    }

    /// Returns the certificate for a name, as a client asks by SNI.
    #[must_use]
    pub fn find(&self, name: Option<&str>) -> Option<Arc<CertifiedKey>> {
        let issued = self.issued.certificates.load();
        let Some(name) = name else {
            let issued = || self.acme.iter().find_map(|name| issued.get(name).cloned());
            return self.first.clone().or_else(issued);
        };
        let name = name.to_ascii_lowercase();
        let by_acme = || {
            self.acme
                .iter()
                .any(|own| **own == *name)
                .then(|| issued.get(&*name).cloned())
                .flatten()
        };
        let by_parent = || self.by_parent.get(name.split_once('.')?.1).cloned();
        by_acme()
            .or_else(|| self.by_name.get(&*name).cloned())
            .or_else(by_parent)
            .or_else(|| self.first.clone())
    }
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let mut alpn = hello.alpn().into_iter().flatten();
        if alpn.any(|protocol| protocol == ACME_ALPN) {
            let name = hello.server_name()?.to_ascii_lowercase();
            return self.issued.challenges.load().get(&*name).cloned();
        }
        self.find(hello.server_name())
    }
}

fn versions(min: TlsVersion) -> &'static [&'static SupportedProtocolVersion] {
    static BOTH: [&SupportedProtocolVersion; 2] =
        [&rustls::version::TLS13, &rustls::version::TLS12];
    match min {
        TlsVersion::V1_2 => &BOTH,
        TlsVersion::V1_3 => &BOTH[..1],
    }
}

fn unusable(what: impl Into<String>) -> impl FnOnce(rustls::Error) -> TlsError {
    let what = what.into();
    move |source| TlsError::Unusable { what, source }
}

/// Returns the store of these authorities.
///
/// # Errors
/// One of them is no certificate that can be trusted.
pub fn roots(authorities: &Authorities) -> Result<Arc<RootCertStore>, TlsError> {
    let mut store = RootCertStore::empty();
    for certificate in authorities.certificates.iter() {
        store.add(certificate.clone()).map_err(unusable(&*authorities.place))?;
    }
    Ok(Arc::new(store))
}

/// Returns the store of the system's authorities, read once in the process's life.
///
/// # Errors
/// There are none.
pub fn system_roots() -> Result<Arc<RootCertStore>, TlsError> {
    static ROOTS: OnceLock<Arc<RootCertStore>> = OnceLock::new();
    let store = ROOTS.get_or_init(|| {
        let mut store = RootCertStore::empty();
        store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        Arc::new(store)
    });
    if store.is_empty() { Err(TlsError::NoAuthorities) } else { Ok(Arc::clone(store)) }
}

/// Returns rustls's configuration of an end that is dialled: it shows what `resolver` finds, speaks
/// `alpn`, and gives out tickets under keys of its own, which change every six hours. A configuration
/// that was made anew takes no ticket of the one before, so nobody gets in by what was checked under
/// other rules.
///
/// # Errors
/// Authorities that cannot be used.
pub fn server_config(
    tls: &ServerTls,
    resolver: Arc<dyn ResolvesServerCert>,
    alpn: &[&[u8]],
) -> Result<ServerConfig, TlsError> {
    let builder = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(versions(tls.min_version))
        .map_err(unusable("TLS"))?;
    let builder = match &tls.clients {
        None => builder.with_no_client_auth(),
        Some(clients) => {
            let verifier = WebPkiClientVerifier::builder_with_provider(
                roots(&clients.authorities)?,
                provider(),
            );
            let verifier =
                if clients.required { verifier } else { verifier.allow_unauthenticated() };
            let verifier = verifier.build().map_err(|error| TlsError::Unusable {
                what: clients.authorities.place.to_string(),
                source: rustls::Error::General(error.to_string()),
            })?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder.with_cert_resolver(resolver);
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    config.ticketer = rustls::crypto::aws_lc_rs::Ticketer::new().map_err(unusable("tickets"))?;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    Ok(config)
}

/// Returns rustls's configuration of an end that dials and speaks `alpn`; it remembers sessions for
/// resumption, so keep it for as long as the settings stay.
///
/// # Errors
/// There is nobody to trust, or a certificate cannot be used.
pub fn client_config(tls: &ClientTls, alpn: &[&[u8]]) -> Result<ClientConfig, TlsError> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(versions(TlsVersion::V1_2))
        .map_err(unusable("TLS"))?;
    let builder = match &tls.trust {
        Trust::System => builder.with_root_certificates(system_roots()?),
        Trust::Authorities(authorities) => builder.with_root_certificates(roots(authorities)?),
        Trust::Anybody => builder.dangerous().with_custom_certificate_verifier(Arc::new(Anybody(
            provider().signature_verification_algorithms,
        ))),
    };
    let mut config = match &tls.certificate {
        None => builder.with_no_client_auth(),
        Some(certificate) => builder
            .with_client_auth_cert(certificate.chain.to_vec(), certificate.key().clone_key())
            .map_err(unusable(&*certificate.place))?,
    };
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    Ok(config)
}

/// Returns rustls's configuration of this process's own sidecar towards its own relay: it believes
/// whoever shows a certificate that the relay has.
///
/// # Errors
/// TLS cannot be had at all.
pub fn embedded_client_config(own: Arc<Resolver>) -> Result<ClientConfig, TlsError> {
    let algorithms = provider().signature_verification_algorithms;
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(versions(TlsVersion::V1_2))
        .map_err(unusable("TLS"))?;
    let mut config = builder
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Own { resolver: own, algorithms }))
        .with_no_client_auth();
    config.alpn_protocols = vec![TUNNEL_ALPN.to_vec()];
    Ok(config)
}

/// Believes anybody who holds the key of what is shown.
#[derive(Debug)]
struct Anybody(WebPkiSupportedAlgorithms);

/// Believes the holder of a certificate of this process.
struct Own {
    resolver: Arc<Resolver>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl fmt::Debug for Own {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Own").finish_non_exhaustive()
    }
}

macro_rules! signatures {
    ($algorithms:ident) => {
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signed: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            rustls::crypto::verify_tls12_signature(
                message,
                certificate,
                signed,
                &self.$algorithms(),
            )
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signed: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            rustls::crypto::verify_tls13_signature(
                message,
                certificate,
                signed,
                &self.$algorithms(),
            )
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.$algorithms().supported_schemes()
        }
    };
}

impl Anybody {
    const fn algorithms(&self) -> WebPkiSupportedAlgorithms {
        self.0
    }
}

impl Own {
    const fn algorithms(&self) -> WebPkiSupportedAlgorithms {
        self.algorithms
    }
}

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _end: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    signatures!(algorithms);
}

impl ServerCertVerifier for Own {
    fn verify_server_cert(
        &self,
        end: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let is_own = self.resolver.find(None).is_some_and(|own| own.cert.first() == Some(end));
        if is_own {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(rustls::Error::General("not this process's own certificate".to_owned()))
        }
    }

    signatures!(algorithms);
}

/// Verifies a client's chain again, as when authorities have changed while it is connected.
///
/// # Errors
/// It is not trusted, or not any more.
pub fn verify_client(
    authorities: &Authorities,
    chain: &[CertificateDer<'_>],
) -> Result<(), rustls::Error> {
    let general = |error: &dyn fmt::Display| rustls::Error::General(error.to_string());
    let (end, intermediates) = chain.split_first().ok_or(rustls::Error::NoCertificatesPresented)?;
    let roots = roots(authorities).map_err(|error| general(&error))?;
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
        .build()
        .map_err(|error| general(&error))?;
    verifier.verify_client_cert(end, intermediates, UnixTime::now()).map(drop)
}
