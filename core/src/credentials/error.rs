//! Why nobody is let in by what was presented.

use sidelane_tunnel::proto;
use thiserror::Error;

/// When a sidecar is asked to come back whose issuer's keys could not be had: they are fetched again
/// meanwhile.
const RETRY_AFTER_KEYS_MS: u32 = 5_000;

/// Why nobody is let in by what was presented. The texts go to the sidecar and into both logs: they say
/// what is accepted, and nothing of what was presented.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum AuthError {
    /// No credential at all.
    #[error(
        "this relay wants a credential and the sidecar presents none (accepted: sidecar.token, \
         token_file or token_env, or a client certificate)"
    )]
    Missing,
    /// A token whose hash is not known.
    #[error(
        "the token is not one that this relay accepts (accepted: one whose hash is among `tokens` of \
         relay.credentials)"
    )]
    UnknownToken,
    /// The relay knows none.
    #[error("this relay knows no credentials, so it accepts sidecars over loopback only")]
    LoopbackOnly,
    /// A client certificate whose names are nobody's.
    #[error(
        "no name in the client certificate's subjectAltName is a principal's (accepted: one that fits \
         `certificates` of relay.credentials)"
    )]
    UnknownCertificate,
    /// A client certificate that is not trusted, or not any more.
    #[error(
        "the client certificate is not trusted (accepted: one signed by relay.tunnel.tls.client_ca): {0}"
    )]
    UntrustedCertificate(String),
    /// A signed token that cannot be read.
    #[error("the signed token cannot be read (accepted: a JWT of at most {max} bytes with iss, aud, exp and sub)", max = super::jwt::TOKEN_BYTES_MAX)]
    MalformedJwt,
    /// Signed by what anybody could sign by, or nothing.
    #[error(
        "the signed token's algorithm is not accepted (accepted: RS256, RS384, RS512, PS256, PS384, \
         PS512, ES256, ES384, EdDSA)"
    )]
    Algorithm,
    /// Of an issuer that is not known.
    #[error("the signed token's issuer is not known (accepted: `issuer` of relay.token_issuers)")]
    UnknownIssuer,
    /// Signed with a key that the issuer does not have.
    #[error(
        "the signed token's key is not among its issuer's (accepted: a `kid` of the issuer's set of keys)"
    )]
    UnknownKey,
    /// There are no keys to check it by.
    #[error("the keys of the signed token's issuer could not be fetched yet; try again")]
    KeysUnavailable,
    /// Not signed by the issuer.
    #[error("the signed token's signature is not its issuer's")]
    Signature,
    /// For somebody else.
    #[error(
        "the signed token is for another audience (accepted: `audiences` of its issuer in relay.token_issuers)"
    )]
    Audience,
    /// Its time has come.
    #[error("the credential has expired (accepted: one whose end is to come; renew it)")]
    Expired,
    /// Its time has not come.
    #[error(
        "the signed token is not valid yet (accepted: one whose nbf is past; do the clocks agree?)"
    )]
    NotYetValid,
    /// Good, and nobody's.
    #[error(
        "the signed token is good, and names no principal (accepted: what fits a rule under `jwt` of \
         relay.credentials)"
    )]
    UnknownSubject,
}

impl AuthError {
    /// All labels.
    pub const LABELS: [&'static str; 15] = [
        "missing",
        "unknown_token",
        "loopback_only",
        "unknown_certificate",
        "untrusted_certificate",
        "malformed_jwt",
        "algorithm",
        "unknown_issuer",
        "unknown_key",
        "keys_unavailable",
        "signature",
        "audience",
        "expired",
        "not_yet_valid",
        "unknown_subject",
    ];

    /// The cause, for metrics.
    #[must_use]
    pub const fn label(&self) -> &'static str {
        let index = match self {
            Self::Missing => 0,
            Self::UnknownToken => 1,
            Self::LoopbackOnly => 2,
            Self::UnknownCertificate => 3,
            Self::UntrustedCertificate(_) => 4,
            Self::MalformedJwt => 5,
            Self::Algorithm => 6,
            Self::UnknownIssuer => 7,
            Self::UnknownKey => 8,
            Self::KeysUnavailable => 9,
            Self::Signature => 10,
            Self::Audience => 11,
            Self::Expired => 12,
            Self::NotYetValid => 13,
            Self::UnknownSubject => 14,
        };
        Self::LABELS[index]
    }

    /// What the sidecar is told.
    #[must_use]
    pub fn refusal(&self) -> proto::Refuse {
        let (reason, retry_after_ms) = match self {
            // No fault of the sidecar's.
            Self::KeysUnavailable => (proto::RefuseReason::Overloaded, RETRY_AFTER_KEYS_MS),
            _ => (proto::RefuseReason::Credential, 0),
        };
        proto::Refuse {
            reason: reason.into(),
            detail: self.to_string(),
            retry_after_ms,
            ..proto::Refuse::default()
        }
    }
}
