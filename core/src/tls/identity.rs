//! What a certificate says of its holder: names, subject, SPIFFE id.

use std::fmt::Write as _;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use sha2::{Digest as _, Sha256};
use x509_parser::extensions::GeneralName;
use x509_parser::objects::{oid_registry, oid2abbrev};
use x509_parser::prelude::{FromDer as _, X509Certificate};
use x509_parser::x509::{AttributeTypeAndValue, X509Name};

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
            subject: shortened(&text(parsed.subject())).into(),
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

/// Returns a name as RFC 4514 writes it: what comes last in the certificate first, and values so escaped
/// that none can be taken for several.
fn text(name: &X509Name<'_>) -> String {
    let mut parts: Vec<String> = name
        .iter_rdn()
        .map(|one| one.iter().map(attribute).collect::<Vec<_>>().join("+"))
        .collect();
    parts.reverse();
    parts.join(",")
}

fn attribute(attribute: &AttributeTypeAndValue<'_>) -> String {
    let kind = attribute.attr_type();
    let mut text = match oid2abbrev(kind, oid_registry()) {
        Ok(short) => format!("{short}="),
        Err(_) => format!("{kind}="),
    };
    let Ok(value) = attribute.as_str() else {
        // No text, or none of Unicode: its bytes, which is `#` and two digits for each.
        text.push('#');
        for byte in attribute.as_slice() {
            // Writing to a string does not fail.
            let _ = write!(text, "{byte:02x}");
        }
        return text;
    };
    let last = value.chars().count().saturating_sub(1);
    for (place, c) in value.chars().enumerate() {
        let is_outermost = (c == ' ' && (place == 0 || place == last)) || (c == '#' && place == 0);
        if c.is_control() {
            for byte in c.encode_utf8(&mut [0; 4]).bytes() {
                // As above.
                let _ = write!(text, "\\{byte:02x}");
            }
            continue;
        }
        if is_outermost || matches!(c, ',' | '+' | '"' | '\\' | '<' | '>' | ';' | '=') {
            text.push('\\');
        }
        text.push(c);
    }
    text
}

fn shortened(text: &str) -> &str {
    let end = (0..=SUBJECT_BYTES_MAX.min(text.len())).rev().find(|at| text.is_char_boundary(*at));
    &text[..end.unwrap_or_default()]
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair};

    use super::*;

    #[track_caller]
    fn check(parts: &[(DnType, &str)], expected: &str) {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        for (kind, value) in parts {
            params.distinguished_name.push(kind.clone(), *value);
        }
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        assert_eq!(&*Identity::of(certificate.der()).unwrap().subject, expected);
    }

    #[test]
    fn a_subject_is_written_so_that_no_value_passes_for_another() {
        use DnType::{CommonName, OrganizationName};
        check(&[], "");
        check(&[(OrganizationName, "Example"), (CommonName, "shop")], "CN=shop,O=Example");
        check(
            &[(OrganizationName, "Example"), (CommonName, "shop,CN=admin")],
            "CN=shop\\,CN\\=admin,O=Example",
        );
        check(&[(CommonName, " #a\\+b ")], "CN=\\ #a\\\\\\+b\\ ");
        check(&[(CommonName, "#a\r\nx: y")], "CN=\\#a\\0d\\0ax: y");
        check(&[(CommonName, "Müller")], "CN=Müller");
        check(&[(CommonName, &"é".repeat(SUBJECT_BYTES_MAX))], &format!("CN={}", "é".repeat(126)));
    }
}
