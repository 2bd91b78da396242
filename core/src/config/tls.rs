//! TLS as a configuration says it: which certificates are shown, whom is trusted, what is asked for.
//!
//! Contents are read with the file that names them, so that a certificate that is replaced is a change
//! of the configuration like any other. What rustls makes of them is `crate::tls`' business.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::Secret;

/// Largest file of certificates or keys that is read.
pub const PEM_BYTES_MAX: u64 = 1 << 20;

/// Most certificates of one chain; public ones have two to four.
pub const CHAIN_MAX: usize = 16;

/// Most certificates that are trusted by one file.
pub const AUTHORITIES_MAX: usize = 1024;

/// How long before its end a certificate is told of.
pub const EXPIRES_SOON: Duration = Duration::from_secs(14 * 24 * 3600);

/// A chain and its key.
#[derive(Clone, PartialEq, Eq)]
pub struct Certificate {
    /// The file it came from, for people.
    pub place: Arc<str>,
    /// The end's own first.
    pub chain: Arc<[CertificateDer<'static>]>,
    key: Arc<PrivateKeyDer<'static>>,
    /// DNS names and IP addresses that it is for, lower case; `*.x` stands for one label below `x`
    /// (RFC 9525 §6.3).
    pub names: Arc<[Arc<str>]>,
    /// Valid from.
    pub not_before: SystemTime,
    /// Valid until.
    pub not_after: SystemTime,
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificate")
            .field("place", &self.place)
            .field("names", &self.names)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

impl Certificate {
    /// Reads a chain and its key, both PEM.
    ///
    /// # Errors
    /// Which of the two is at fault, and what is wrong with it; never a part of the key.
    pub fn from_pem(place: &str, chain: &str, key: &str) -> Result<Self, PemFault> {
        let certificates = certificates(chain, CHAIN_MAX).map_err(PemFault::Chain)?;
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|_| {
            PemFault::Key("holds no private key (accepted: PEM, as in -----BEGIN PRIVATE KEY-----, not encrypted)".to_owned())
        })?;
        let (names, not_before, not_after) = facts(&certificates[0]).map_err(PemFault::Chain)?;
        let certificate = Self {
            place: place.into(),
            chain: certificates.into(),
            key: Arc::new(key),
            names,
            not_before,
            not_after,
        };
        crate::tls::certified_key(&certificate).map_err(PemFault::Key)?;
        Ok(certificate)
    }

    /// The key. Never printed.
    #[must_use]
    pub fn key(&self) -> &PrivateKeyDer<'static> {
        &self.key
    }
}

/// Which part of a certificate and its key is at fault, and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PemFault {
    /// The certificates.
    Chain(String),
    /// The key.
    Key(String),
}

/// Certificates that are trusted to sign others.
#[derive(Clone, PartialEq, Eq)]
pub struct Authorities {
    /// The file they came from, for people.
    pub place: Arc<str>,
    /// One or more.
    pub certificates: Arc<[CertificateDer<'static>]>,
}

impl fmt::Debug for Authorities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Authorities({}, {})", self.place, self.certificates.len())
    }
}

impl Authorities {
    /// Reads certificates, PEM.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn from_pem(place: &str, text: &str) -> Result<Self, String> {
        let certificates = certificates(text, AUTHORITIES_MAX)?;
        for certificate in &certificates {
            facts(certificate)?;
        }
        Ok(Self { place: place.into(), certificates: certificates.into() })
    }

    /// Returns the first of them that another has signed and that may sign none itself, as a server's:
    /// `certificate 2, of CN=relay,`. One that signs itself is trusted for itself, which may be meant.
    #[must_use]
    pub fn no_authority(&self) -> Option<String> {
        self.certificates.iter().enumerate().find_map(|(index, certificate)| {
            let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
            let is_end = !parsed.is_ca() && parsed.subject().as_raw() != parsed.issuer().as_raw();
            is_end.then(|| format!("certificate {}, of {},", index + 1, parsed.subject()))
        })
    }

    /// When the first of them ends.
    #[must_use]
    pub fn not_after(&self) -> Option<SystemTime> {
        self.certificates.iter().filter_map(|one| facts(one).ok()).map(|(_, _, end)| end).min()
    }
}

/// Returns what is to be told of a certificate's time.
#[must_use]
pub fn lifetime(now: SystemTime, not_before: SystemTime, not_after: SystemTime) -> Option<String> {
    let days = |duration: Duration| match duration.as_secs() / (24 * 3600) {
        0 => "less than a day".to_owned(),
        1 => "1 day".to_owned(),
        days => format!("{days} days"),
    };
    if let Ok(ago) = now.duration_since(not_after) {
        return Some(format!("ended on {}, {} ago", date(not_after), days(ago)));
    }
    if let Ok(until) = not_before.duration_since(now)
        && !until.is_zero()
    {
        return Some(format!("is not valid before {}, in {}", date(not_before), days(until)));
    }
    let left = not_after.duration_since(now).unwrap_or_default();
    (left < EXPIRES_SOON).then(|| format!("ends on {}, in {}", date(not_after), days(left)))
}

/// Returns `25 Nov 2026`.
fn date(time: SystemTime) -> String {
    let text = httpdate::fmt_http_date(time);
    text.get(5..16).unwrap_or(&text).to_owned()
}

fn certificates(text: &str, max: usize) -> Result<Vec<CertificateDer<'static>>, String> {
    let accepted = "(accepted: PEM, as in -----BEGIN CERTIFICATE-----)";
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    // The error of the crate lists bytes.
    let certificates =
        certificates.map_err(|_| format!("is PEM that is cut short or garbled {accepted}"))?;
    match certificates.len() {
        0 => Err(format!("holds no certificate {accepted}")),
        count if count > max => {
            Err(format!("holds {count} certificates (accepted: at most {max})"))
        }
        _ => Ok(certificates),
    }
}

/// Returns the names that a certificate is for, as [`Certificate::names`]; none: it cannot be read.
#[must_use]
pub fn names(certificate: &CertificateDer<'_>) -> Arc<[Arc<str>]> {
    facts(certificate).map(|(names, ..)| names).unwrap_or_default()
}

type Facts = (Arc<[Arc<str>]>, SystemTime, SystemTime);

fn facts(certificate: &CertificateDer<'_>) -> Result<Facts, String> {
    let (_, parsed) = X509Certificate::from_der(certificate)
        .map_err(|error| format!("holds a certificate that cannot be read: {error}"))?;
    let mut names: Vec<Arc<str>> = Vec::new();
    if let Ok(Some(extension)) = parsed.subject_alternative_name() {
        for name in &extension.value.general_names {
            match name {
                GeneralName::DNSName(name) => names.push(name.to_ascii_lowercase().into()),
                GeneralName::IPAddress(bytes) => names.extend(address(bytes)),
                _ => {}
            }
        }
    }
    let time = |seconds: i64| {
        u64::try_from(seconds)
            .map_or(UNIX_EPOCH, |seconds| UNIX_EPOCH + Duration::from_secs(seconds))
    };
    let validity = parsed.validity();
    let (begin, end) = (validity.not_before.timestamp(), validity.not_after.timestamp());
    Ok((names.into(), time(begin), time(end)))
}

fn address(bytes: &[u8]) -> Option<Arc<str>> {
    let address: std::net::IpAddr = match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok()?.into(),
        16 => <[u8; 16]>::try_from(bytes).ok()?.into(),
        _ => return None,
    };
    Some(address.to_string().into())
}

/// Oldest version of TLS that is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TlsVersion {
    /// TLS 1.2 (RFC 5246).
    #[default]
    V1_2,
    /// TLS 1.3 (RFC 8446).
    V1_3,
}

/// The end that is dialled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerTls {
    /// In the file's order: where several fit a name, the first is shown; the first of all where none
    /// fits, or no name is asked for.
    pub certificates: Vec<Arc<Certificate>>,
    /// Names whose certificates are obtained by ACME; lower case. With one of them, or a certificate,
    /// there is something to show.
    pub acme: Vec<Arc<str>>,
    /// Oldest version.
    pub min_version: TlsVersion,
    /// Client certificates; `None`: none is asked for.
    pub clients: Option<ClientCertificates>,
}

impl ServerTls {
    /// Returns whether it shows a certificate for the host, which may begin with `*.`.
    #[must_use]
    pub fn covers(&self, host: &str) -> bool {
        let above = host.split_once('.').map(|(_, above)| above);
        let mut names = self.certificates.iter().flat_map(|certificate| certificate.names.iter());
        self.acme.iter().any(|name| **name == *host)
            || names.any(|name| {
                **name == *host || name.strip_prefix("*.").is_some_and(|rest| Some(rest) == above)
            })
    }
}

/// Certificates of those who dial.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientCertificates {
    /// Who signs them.
    pub authorities: Authorities,
    /// Nobody gets in without one.
    pub required: bool,
    /// The service is told of it by `Client-Cert` and `Client-Cert-Chain` (RFC 9440).
    pub forward: bool,
}

/// The end that dials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientTls {
    /// Who signs the other end's certificate.
    pub trust: Trust,
    /// The name that it must be for, and that is asked for (SNI); `None`: the host that is dialled.
    pub server_name: Option<Arc<str>>,
    /// What this end shows where it is asked.
    pub certificate: Option<Arc<Certificate>>,
}

impl Default for ClientTls {
    fn default() -> Self {
        Self { trust: Trust::System, server_name: None, certificate: None }
    }
}

/// Whom an end that dials believes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trust {
    /// The system's authorities.
    System,
    /// These, and no others.
    Authorities(Authorities),
    /// Anybody: `insecure_skip_verify`.
    Anybody,
}

/// Certificates by ACME (RFC 8555).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acme {
    /// URL of the authority's directory.
    pub directory: Arc<str>,
    /// Whom the authority writes to: `mailto:…`.
    pub contacts: Vec<Arc<str>>,
    /// A directory for the account's key and the certificates; absolute, or relative to the working
    /// directory.
    pub storage: PathBuf,
    /// Who signs the authority's own certificate.
    pub trust: Trust,
    /// Binds the account to one elsewhere (RFC 8555 §7.3.4): key id and HMAC key.
    pub external_account: Option<(Arc<str>, Secret)>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificates_time_is_told_in_days() {
        let day = Duration::from_secs(24 * 3600);
        // 25 Nov 2026.
        let now = SystemTime::UNIX_EPOCH + day * 20_782;
        let table: &[(SystemTime, SystemTime, Option<&str>)] = &[
            (now - day, now + day * 15, None),
            (now, now + day * 14, None),
            (now - day, now + day * 13, Some("ends on 08 Dec 2026, in 13 days")),
            (now - day, now + day / 2, Some("ends on 25 Nov 2026, in less than a day")),
            (now - day * 2, now, Some("ended on 25 Nov 2026, less than a day ago")),
            (now - day * 2, now - day, Some("ended on 24 Nov 2026, 1 day ago")),
            (now + day, now + day * 90, Some("is not valid before 26 Nov 2026, in 1 day")),
        ];
        assert!(!table.is_empty());
        for (begin, end, expected) in table {
            assert_eq!(lifetime(now, *begin, *end).as_deref(), *expected);
        }
    }
}
