//! Certificates for tests, made as they are needed.

use std::sync::Arc;

use rcgen::{CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, date_time_ymd};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ServerConfig};

use crate::config::tls::{
    Authorities, Certificate, ClientCertificates, ClientTls, ServerTls, TlsVersion, Trust,
};
use crate::tls::{Issued, Resolver, client_config, server_config};
use crate::tunnel::dial::{Carrier, Security};

/// A laptop's own authority.
pub(crate) struct Ca {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Ca {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        Self { issuer: CertifiedIssuer::self_signed(params, key).expect("signed") }
    }

    pub(crate) fn authorities(&self) -> Authorities {
        Authorities::from_pem("ca.pem", &self.issuer.pem()).expect("an authority")
    }

    pub(crate) fn certificate(&self, name: &str) -> Arc<Certificate> {
        self.sign(name, |_| {})
    }

    /// Ended in 2001.
    pub(crate) fn expired(&self, name: &str) -> Arc<Certificate> {
        self.sign(name, |params| {
            params.not_before = date_time_ymd(2000, 1, 1);
            params.not_after = date_time_ymd(2001, 1, 1);
        })
    }

    fn sign(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> Arc<Certificate> {
        let mut params = CertificateParams::new([name.to_owned()]).expect("a name");
        change(&mut params);
        let key = KeyPair::generate().expect("a key");
        let signed = params.signed_by(&key, &self.issuer).expect("signed");
        let certificate = Certificate::from_pem("tls.crt", &signed.pem(), &key.serialize_pem());
        Arc::new(certificate.expect("a certificate"))
    }
}

/// An end that is dialled; `clients` sign the certificates that it demands.
pub(crate) fn server(
    certificate: &Arc<Certificate>,
    clients: Option<&Ca>,
    alpn: &[&[u8]],
) -> Arc<ServerConfig> {
    let tls = ServerTls {
        certificates: vec![Arc::clone(certificate)],
        acme: Vec::new(),
        min_version: TlsVersion::V1_2,
        clients: clients.map(|ca| ClientCertificates {
            authorities: ca.authorities(),
            required: true,
            forward: false,
        }),
    };
    let resolver = Resolver::new(&tls, Arc::new(Issued::default())).expect("a resolver");
    Arc::new(server_config(&tls, Arc::new(resolver), alpn).expect("a configuration"))
}

pub(crate) fn client(
    ca: &Ca,
    certificate: Option<&Arc<Certificate>>,
    alpn: &[&[u8]],
) -> Arc<ClientConfig> {
    let tls = ClientTls {
        trust: Trust::Authorities(ca.authorities()),
        server_name: None,
        certificate: certificate.cloned(),
    };
    Arc::new(client_config(&tls, alpn).expect("a configuration"))
}

pub(crate) fn carrier(config: Arc<ClientConfig>, name: &str) -> Carrier {
    let name = ServerName::try_from(name.to_owned()).expect("a name");
    Carrier::tcp(Security::Tls { config, name, has_certificate: false })
}
