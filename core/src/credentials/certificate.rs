//! Sidecars that are known by a client certificate: names in it, against principals.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::claims::Placeholders;
use super::{AuthError, Rules};
use crate::config::credentials::{CertificatePattern, Principal};
use crate::tls;
use crate::tls::identity::Identity;

/// Whose certificate it is.
pub(super) struct Known<'a> {
    pub(super) principal: &'a Principal,
    /// The name in it that fits.
    pub(super) name: Arc<str>,
    /// What that name says of a Kubernetes ServiceAccount.
    pub(super) placeholders: Option<Placeholders>,
    pub(super) not_after: SystemTime,
}

/// Returns whose certificate it is, the end's own being the first of `chain`.
///
/// # Errors
/// It is not trusted, has ended, or names nobody.
pub(super) fn find<'a>(
    rules: &'a Rules,
    chain: &[CertificateDer<'_>],
) -> Result<Known<'a>, AuthError> {
    let untrusted = |why: &str| AuthError::UntrustedCertificate(why.to_owned());
    let authorities = rules
        .authorities
        .as_ref()
        .ok_or_else(|| untrusted("this relay trusts no client certificates"))?;
    let end = chain.first().ok_or(AuthError::Missing)?;
    tls::verify_client(authorities, chain).map_err(|error| untrusted(&error.to_string()))?;
    let unreadable = || untrusted("it cannot be read");
    let identity = Identity::of(end).ok_or_else(unreadable)?;
    let not_after = not_after(end).ok_or_else(unreadable)?;
    let principals = rules.credentials.principals.iter();
    principals
        .filter_map(|principal| {
            let name =
                principal.certificates.iter().find_map(|pattern| fits(pattern, &identity))?;
            let placeholders = Placeholders::of_spiffe_id(&name);
            Some(Known { principal, name, placeholders, not_after })
        })
        .next()
        .ok_or(AuthError::UnknownCertificate)
}

/// Returns the name that fits.
fn fits(pattern: &CertificatePattern, identity: &Identity) -> Option<Arc<str>> {
    let (names, pattern_fits): (_, &dyn Fn(&str) -> bool) = match pattern {
        CertificatePattern::Dns(pattern) => (&identity.dns, &|name| pattern.fits(name)),
        CertificatePattern::Uri(pattern) => (&identity.uris, &|uri| pattern.fits_uri(uri)),
    };
    names.iter().find(|name| pattern_fits(name)).cloned()
}

fn not_after(certificate: &CertificateDer<'_>) -> Option<SystemTime> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let seconds = u64::try_from(parsed.validity().not_after.timestamp()).ok()?;
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}
