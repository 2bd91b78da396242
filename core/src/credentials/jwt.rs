//! Signed tokens (JWT, RFC 7519; RFC 8725): read, checked by an issuer's keys, and held against the rules
//! of principals. Kubernetes' ServiceAccount tokens among them.

use std::str::FromStr as _;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, Validation};
use serde::Deserialize;
use serde_json::Value as Json;

use super::claims::Placeholders;
use super::jwks::{IssuerKeys, Thumbprint};
use super::{AuthError, Rules};
use crate::config::credentials::{Issuer, JwtRule, Principal};

/// Longest signed token that is read. Kubernetes' have about 1 KiB, those of CI systems 2.
pub(super) const TOKEN_BYTES_MAX: usize = 16 * 1024;

/// Longest value of `iss`, `sub`, a namespace or an account; kept for the life of a session.
const CLAIM_BYTES_MAX: usize = 1024;

/// Most values of `aud`.
const AUDIENCES_MAX: usize = 32;

/// Most keys of an issuer that are tried on a token that names none.
const KEYS_TRIED_MAX: usize = 8;

/// Algorithms by which nobody but the holder of a private key can sign.
pub(super) const ALGORITHMS: [Algorithm; 9] = [
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::PS384,
    Algorithm::PS512,
    Algorithm::ES256,
    Algorithm::ES384,
    Algorithm::EdDSA,
];

/// What has the shape of a signed token: three parts, of which the first is a header.
pub(super) struct Token<'a> {
    text: &'a str,
    header: Header,
    payload: &'a str,
}

#[derive(Deserialize)]
struct Header {
    #[serde(default)]
    alg: Option<String>,
    #[serde(default)]
    kid: Option<String>,
    /// What must be understood and is not (RFC 7515 §4.1.11).
    #[serde(default)]
    crit: Option<Json>,
}

impl<'a> Token<'a> {
    /// Returns the token; `None`: it is none, and a token of another kind may be.
    pub(super) fn parse(credential: &'a [u8]) -> Option<Self> {
        let text = std::str::from_utf8(credential).ok()?;
        let mut parts = text.split('.');
        let [header, payload, signature] = [parts.next()?, parts.next()?, parts.next()?];
        let is_base64 = |part: &str| {
            part.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
        };
        if parts.next().is_some() || ![header, payload, signature].into_iter().all(is_base64) {
            return None;
        }
        // Whatever is longer is no token that would be accepted; its header is not looked at.
        if text.len() > TOKEN_BYTES_MAX {
            return None;
        }
        let header = URL_SAFE_NO_PAD.decode(header).ok()?;
        let is_object = serde_json::from_slice::<Json>(&header).ok()?.is_object();
        let header = serde_json::from_slice(&header).unwrap_or(Header {
            // Read as an object, and not as a header: refused below as what it is.
            alg: None,
            kid: None,
            crit: Some(Json::Null),
        });
        is_object.then_some(Self { text, header, payload })
    }

    /// Who it says has signed it. Believed for nothing but to choose the keys.
    fn issuer(&self) -> Option<String> {
        #[derive(Deserialize)]
        struct Unverified {
            iss: String,
        }
        let payload = URL_SAFE_NO_PAD.decode(self.payload).ok()?;
        serde_json::from_slice::<Unverified>(&payload).ok().map(|unverified| unverified.iss)
    }
}

/// What a signed token says, once it is known who signed it.
#[derive(Debug)]
pub struct Signed {
    /// Name of the issuer in the configuration.
    pub issuer: Arc<str>,
    /// `sub`.
    pub subject: Arc<str>,
    /// `iss`.
    iss: Arc<str>,
    audiences: Vec<String>,
    /// Namespace and account of a Kubernetes ServiceAccount.
    account: Option<(Arc<str>, Arc<str>)>,
    /// `exp`.
    expires: SystemTime,
    /// Of the key that it is signed with.
    key: Thumbprint,
}

impl Signed {
    pub(super) fn placeholders(&self) -> Option<Placeholders> {
        let (namespace, account) = self.account.as_ref()?;
        Placeholders::new(namespace, account)
    }
}

#[derive(Deserialize)]
struct Claims {
    iss: String,
    sub: String,
    aud: Audience,
    exp: f64,
    #[serde(rename = "kubernetes.io", default)]
    kubernetes: Option<Kubernetes>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Several(Vec<String>),
}

/// What Kubernetes adds to a bound ServiceAccount token.
#[derive(Deserialize)]
struct Kubernetes {
    namespace: String,
    serviceaccount: ServiceAccount,
}

#[derive(Deserialize)]
struct ServiceAccount {
    name: String,
}

/// Finds out who signed the token, waiting for keys where it must.
///
/// # Errors
/// Why it is worth nothing.
pub(super) async fn verify(
    token: &Token<'_>,
    issuers: &[Arc<IssuerKeys>],
) -> Result<Signed, AuthError> {
    let Header { alg, kid, crit } = &token.header;
    if crit.is_some() {
        return Err(AuthError::MalformedJwt);
    }
    let algorithm = alg.as_deref().and_then(|alg| Algorithm::from_str(alg).ok());
    let algorithm = algorithm.filter(|alg| ALGORITHMS.contains(alg)).ok_or(AuthError::Algorithm)?;
    let iss = token.issuer().ok_or(AuthError::MalformedJwt)?;
    let mut result = Err(AuthError::UnknownIssuer);
    // Several entries may be of one issuer, for different audiences.
    for keys in issuers.iter().filter(|keys| *keys.issuer.issuer == *iss) {
        result = verify_by(token, algorithm, kid.as_deref(), keys).await;
        if result.is_ok() {
            break;
        }
    }
    result
}

async fn verify_by(
    token: &Token<'_>,
    algorithm: Algorithm,
    kid: Option<&str>,
    keys: &IssuerKeys,
) -> Result<Signed, AuthError> {
    let found = keys.find(kid, algorithm).await?;
    let mut result = Err(AuthError::UnknownKey);
    for key in found.iter().take(KEYS_TRIED_MAX) {
        let validation = validation(&keys.issuer, algorithm);
        result = match jsonwebtoken::decode::<Claims>(token.text, &key.decoding, &validation) {
            Ok(data) => signed(data.claims, &keys.issuer, key.thumbprint),
            Err(error) => Err(cause(error.kind())),
        };
        // Another key may be the one.
        if !matches!(result, Err(AuthError::Signature)) {
            break;
        }
    }
    result
}

fn validation(issuer: &Issuer, algorithm: Algorithm) -> Validation {
    let mut validation = Validation::new(algorithm);
    validation.set_required_spec_claims(&["iss", "aud", "exp", "sub"]);
    validation.set_issuer(&[&issuer.issuer]);
    validation.set_audience(&issuer.audiences);
    validation.validate_nbf = true;
    validation.leeway = issuer.leeway.as_secs();
    validation
}

fn cause(kind: &ErrorKind) -> AuthError {
    match kind {
        ErrorKind::ExpiredSignature => AuthError::Expired,
        ErrorKind::ImmatureSignature => AuthError::NotYetValid,
        ErrorKind::InvalidAudience => AuthError::Audience,
        ErrorKind::InvalidIssuer => AuthError::UnknownIssuer,
        ErrorKind::InvalidAlgorithm | ErrorKind::UnsupportedAlgorithm => AuthError::Algorithm,
        ErrorKind::MissingRequiredClaim(_)
        | ErrorKind::InvalidClaimFormat(_)
        | ErrorKind::InvalidToken
        | ErrorKind::Base64(_)
        | ErrorKind::Json(_)
        | ErrorKind::Utf8(_) => AuthError::MalformedJwt,
        _ => AuthError::Signature,
    }
}

fn signed(claims: Claims, issuer: &Issuer, key: Thumbprint) -> Result<Signed, AuthError> {
    let Claims { iss, sub, aud, exp, kubernetes } = claims;
    let audiences = match aud {
        Audience::One(one) => vec![one],
        Audience::Several(several) => several,
    };
    let account: Option<(Arc<str>, Arc<str>)> = match kubernetes {
        Some(of) => Some((of.namespace.into(), of.serviceaccount.name.into())),
        None => account_of(&sub).map(|(namespace, account)| (namespace.into(), account.into())),
    };
    let is_long = |text: &str| text.len() > CLAIM_BYTES_MAX;
    let is_any_long = is_long(&iss)
        || is_long(&sub)
        || audiences.iter().any(|audience| is_long(audience))
        || account.as_ref().is_some_and(|(a, b)| is_long(a) || is_long(b));
    if audiences.len() > AUDIENCES_MAX || is_any_long {
        return Err(AuthError::MalformedJwt);
    }
    let expires = Duration::try_from_secs_f64(exp)
        .ok()
        .and_then(|exp| UNIX_EPOCH.checked_add(exp))
        .ok_or(AuthError::MalformedJwt)?;
    Ok(Signed {
        issuer: Arc::clone(&issuer.name),
        iss: iss.into(),
        account,
        subject: sub.into(),
        audiences,
        expires,
        key,
    })
}

/// Reads `system:serviceaccount:<namespace>:<account>`.
fn account_of(subject: &str) -> Option<(&str, &str)> {
    let (namespace, account) = subject.strip_prefix("system:serviceaccount:")?.split_once(':')?;
    let is_whole = !namespace.is_empty() && !account.is_empty() && !account.contains(':');
    is_whole.then_some((namespace, account))
}

/// Returns whose token it is, and when it ends.
///
/// # Errors
/// It is nobody's, or not any more.
pub(super) fn find<'a>(
    rules: &'a Rules,
    issuers: &[Arc<IssuerKeys>],
    signed: &Signed,
) -> Result<(&'a Principal, SystemTime), AuthError> {
    let mut of_issuer = issuers.iter().filter(|keys| *keys.issuer.name == *signed.issuer);
    let keys = of_issuer.next().ok_or(AuthError::UnknownIssuer)?;
    let issuer = &keys.issuer;
    if *issuer.issuer != *signed.iss {
        return Err(AuthError::UnknownIssuer);
    }
    let is_for = |audience: &Arc<str>| signed.audiences.iter().any(|aud| **aud == **audience);
    if !issuer.audiences.iter().any(is_for) {
        return Err(AuthError::Audience);
    }
    // A key that its issuer has withdrawn signs nothing any more.
    if !keys.has(&signed.key) {
        return Err(AuthError::UnknownKey);
    }
    let fits = |principal: &&Arc<Principal>| principal.jwt.iter().any(|rule| fits(rule, signed));
    let principal =
        rules.credentials.principals.iter().find(fits).ok_or(AuthError::UnknownSubject)?;
    let expires = signed.expires.checked_add(issuer.leeway).ok_or(AuthError::MalformedJwt)?;
    Ok((principal, expires))
}

fn fits(rule: &JwtRule, signed: &Signed) -> bool {
    let JwtRule { issuer, subject, namespace, service_account } = rule;
    let (own_namespace, own_account) = match &signed.account {
        Some((namespace, account)) => (Some(&**namespace), Some(&**account)),
        None => (None, None),
    };
    *issuer == signed.issuer
        && [
            (subject, Some(&*signed.subject)),
            (namespace, own_namespace),
            (service_account, own_account),
        ]
        .into_iter()
        .all(|(pattern, text)| {
            pattern.as_ref().is_none_or(|pattern| text.is_some_and(|text| pattern.fits_text(text)))
        })
}
