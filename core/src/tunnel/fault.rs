//! What became of TLS between sidecar and relay, in words that say what to do.

use std::fmt::Write as _;
use std::io;
use std::time::{Duration, UNIX_EPOCH};

use rustls::pki_types::UnixTime;
use rustls::{AlertDescription, CertificateError, Error, InvalidMessage};

use crate::error::visible;

/// Most names of a certificate that are told.
const NAMES_TOLD_MAX: usize = 8;

/// Returns rustls's error inside of an I/O error.
#[must_use]
pub fn of(error: &io::Error) -> Option<&Error> {
    error.get_ref()?.downcast_ref()
}

/// Returns what an error of TLS means at the dialling end, and what to do.
#[must_use]
pub fn text(error: &io::Error) -> String {
    let Some(fault) = of(error) else {
        return match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
                "it closed the connection in the TLS handshake".to_owned()
            }
            _ => format!("TLS failed: {error}"),
        };
    };
    match fault {
        Error::InvalidCertificate(fault) => certificate(fault),
        Error::InvalidMessage(
            InvalidMessage::InvalidContentType | InvalidMessage::UnknownProtocolVersion,
        ) => "it answers without TLS: set relay.tunnel.tls there, or insecure: true here where \
              nobody on the way can do harm"
            .to_owned(),
        Error::AlertReceived(alert) => self::alert(*alert),
        Error::PeerIncompatible(fault) => {
            format!("it speaks no TLS that is spoken here: {fault:?}")
        }
        fault => format!("TLS failed: {fault}"),
    }
}

fn certificate(fault: &CertificateError) -> String {
    match fault {
        CertificateError::UnknownIssuer => {
            "its certificate is signed by nobody who is trusted here: name its authority by tls.ca"
                .to_owned()
        }
        CertificateError::NotValidForNameContext { expected, presented } => {
            let mut names = String::new();
            for name in presented.iter().take(NAMES_TOLD_MAX) {
                let separator = if names.is_empty() { "" } else { ", " };
                // Writing to a string does not fail.
                let _ = write!(names, "{separator}{}", bare(name));
            }
            if names.is_empty() {
                names += "no name at all";
            }
            let names = visible(&names);
            let expected = expected.to_str();
            format!(
                "its certificate is for {names}, not for {expected}: set tls.server_name to a name \
                 that it is for"
            )
        }
        CertificateError::NotValidForName => {
            "its certificate is for other names: set tls.server_name to one that it is for"
                .to_owned()
        }
        CertificateError::ExpiredContext { not_after, .. } => {
            format!("its certificate ended at {}", date(*not_after))
        }
        CertificateError::Expired => "its certificate has ended".to_owned(),
        CertificateError::NotValidYetContext { not_before, .. } => {
            format!("its certificate begins at {} only", date(*not_before))
        }
        CertificateError::NotValidYet => "its certificate is not valid yet".to_owned(),
        fault => format!("its certificate does not hold: {fault}"),
    }
}

fn alert(alert: AlertDescription) -> String {
    match alert {
        AlertDescription::CertificateRequired => {
            "it wants a certificate of this sidecar: set tls.certificate".to_owned()
        }
        AlertDescription::UnknownCA
        | AlertDescription::BadCertificate
        | AlertDescription::CertificateExpired
        | AlertDescription::CertificateRevoked
        | AlertDescription::CertificateUnknown
        | AlertDescription::UnsupportedCertificate
        | AlertDescription::DecryptError => {
            format!("it refuses the certificate that is set as tls.certificate ({alert:?})")
        }
        AlertDescription::NoApplicationProtocol => {
            "it does not speak sidelane/1 there: that is no tunnel's port".to_owned()
        }
        AlertDescription::AccessDenied => {
            "it turns this address away: too many handshakes, or too many that failed".to_owned()
        }
        alert => format!("it ended TLS with the alert {alert:?}"),
    }
}

/// Returns what an error of TLS means at the relay's end.
#[must_use]
pub fn of_dialler(fault: &Error) -> String {
    match fault {
        Error::AlertReceived(alert) => format!(
            "the dialler gave up TLS with the alert {alert:?}: it does not believe this relay's \
             certificate, or wants other TLS"
        ),
        Error::InvalidCertificate(fault) => diallers_certificate(fault),
        Error::InvalidMessage(
            InvalidMessage::InvalidContentType | InvalidMessage::UnknownProtocolVersion,
        ) => "the dialler goes on without TLS".to_owned(),
        Error::PeerIncompatible(fault) => {
            format!("the dialler speaks no TLS that is spoken here: {fault:?}")
        }
        fault => format!("TLS failed: {fault}"),
    }
}

fn diallers_certificate(fault: &CertificateError) -> String {
    match fault {
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "the dialler's certificate is not one that relay.tunnel.tls.client_ca signed, or not \
             any more"
                .to_owned()
        }
        CertificateError::ExpiredContext { not_after, .. } => {
            format!("the dialler's certificate ended at {}", date(*not_after))
        }
        CertificateError::Expired => "the dialler's certificate has ended".to_owned(),
        CertificateError::NotValidYetContext { not_before, .. } => {
            format!("the dialler's certificate begins at {} only", date(*not_before))
        }
        CertificateError::NotValidYet => "the dialler's certificate is not valid yet".to_owned(),
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "the dialler's certificate is not for clients (extendedKeyUsage clientAuth)".to_owned()
        }
        fault => format!("the dialler's certificate does not hold: {fault}"),
    }
}

/// `relay.internal` of rustls's `DnsName("relay.internal")`, `127.0.0.1` of `IpAddress(127.0.0.1)`.
fn bare(name: &str) -> &str {
    let inner = name.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')'));
    inner.map_or(name, |inner| inner.trim_matches('"'))
}

fn date(time: UnixTime) -> String {
    httpdate::fmt_http_date(UNIX_EPOCH + Duration::from_secs(time.as_secs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> UnixTime {
        UnixTime::since_unix_epoch(Duration::from_secs(seconds))
    }

    #[test]
    fn a_diallers_certificate_is_told_of_in_words_of_ours() {
        let ended =
            CertificateError::ExpiredContext { time: at(978_307_300), not_after: at(978_307_200) };
        let early =
            CertificateError::NotValidYetContext { time: at(1), not_before: at(978_307_200) };
        let table = [
            (ended, "the dialler's certificate ended at Mon, 01 Jan 2001 00:00:00 GMT"),
            (early, "the dialler's certificate begins at Mon, 01 Jan 2001 00:00:00 GMT only"),
            (
                CertificateError::UnknownIssuer,
                "the dialler's certificate is not one that relay.tunnel.tls.client_ca signed, or not any more",
            ),
        ];
        for (fault, expected) in table {
            assert_eq!(of_dialler(&Error::InvalidCertificate(fault)), expected);
        }
    }

    #[test]
    fn names_are_told_as_people_write_them() {
        for (name, expected) in [
            ("DnsName(\"relay.internal\")", "relay.internal"),
            ("IpAddress(127.0.0.1)", "127.0.0.1"),
            ("something else", "something else"),
        ] {
            assert_eq!(bare(name), expected);
        }
    }
}
