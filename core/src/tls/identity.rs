//! What a certificate says of its holder: names, subject, SPIFFE id.

use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use sha2::{Digest as _, Sha256};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// Longest subject that is told to anybody.
const SUBJECT_BYTES_MAX: usize = 256;

/// Most names that are looked at.
const NAMES_MAX: usize = 64;

/// Who a verified certificate is for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Subject, as in `CN=shop,O=Example` (RFC 4514), shortened.
    pub subject: Arc<str>,
    /// DNS names, lower case.
    pub dns: Vec<Arc<str>>,
    /// URIs, SPIFFE ids among them.
    pub uris: Vec<Arc<str>>,
    /// SHA-256 of the certificate.
    pub sha256: [u8; 32],
}

impl Identity {
    /// Returns who a certificate is for; `None`: it cannot be read.
    #[must_use]
    pub fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        let mut identity = Self {
            subject: shortened(&parsed.subject().to_string()).into(),
            sha256: Sha256::digest(certificate).into(),
            ..Self::default()
        };
        if let Ok(Some(extension)) = parsed.subject_alternative_name() {
            for name in extension.value.general_names.iter().take(NAMES_MAX) {
                match name {
                    GeneralName::DNSName(name) => {
                        identity.dns.push(name.to_ascii_lowercase().into())
                    }
                    GeneralName::URI(uri) => identity.uris.push((*uri).into()),
                    _ => {}
                }
            }
        }
        Some(identity)
    }
}

fn shortened(text: &str) -> &str {
    let end = (0..=SUBJECT_BYTES_MAX.min(text.len())).rev().find(|at| text.is_char_boundary(*at));
    &text[..end.unwrap_or_default()]
}
