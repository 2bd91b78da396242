//! One order for one name: prove it by one kind of challenge, and fetch the certificate (RFC 8555 §7.4).

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use instant_acme::{
    Account, AuthorizationStatus, ChallengeHandle, ChallengeType, Error, Identifier, NewOrder,
    Order, OrderStatus, RetryPolicy,
};
use rcgen::{CertificateParams, CustomExtension, DistinguishedName, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;

use super::failure::{Failure, Step, said};
use crate::tls::{self, Issued};

/// How long the authority may take to look, and to sign.
const POLL_TIMEOUT: Duration = Duration::from_secs(120);

/// How a name is proved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    /// By a certificate, at port 443 (RFC 8737).
    TlsAlpn,
    /// By an answer, at port 80 (RFC 8555 §8.3).
    Http,
}

impl Kind {
    const fn of_library(self) -> ChallengeType {
        match self {
            Self::TlsAlpn => ChallengeType::TlsAlpn01,
            Self::Http => ChallengeType::Http01,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TlsAlpn => "tls-alpn-01",
            Self::Http => "http-01",
        })
    }
}

/// A certificate and its key, both PEM. No `Debug`.
pub(super) struct Signed {
    pub(super) chain: String,
    pub(super) key: String,
}

/// Orders a certificate.
pub(super) async fn order(
    account: &Account,
    name: &str,
    kind: Kind,
    issued: &Issued,
) -> Result<Signed, Failure> {
    let identifiers = [Identifier::Dns(name.to_owned())];
    let order = account.new_order(&NewOrder::new(&identifiers)).await;
    let mut order = order.map_err(|error| Failure::of(Step::Order, &error))?;
    prove(&mut order, name, kind, issued).await?;

    let failed = |error| Failure::of(Step::Certificate, &error);
    let key = KeyPair::generate().map_err(|error| own(&error))?;
    let mut params = CertificateParams::new(vec![name.to_owned()]).map_err(|error| own(&error))?;
    params.distinguished_name = DistinguishedName::new();
    let request = params.serialize_request(&key).map_err(|error| own(&error))?;
    order.finalize_csr(request.der()).await.map_err(failed)?;
    let chain = order.poll_certificate(&policy()).await.map_err(failed)?;
    Ok(Signed { chain, key: key.serialize_pem() })
}

/// Proves whatever the order asks for.
async fn prove(order: &mut Order, name: &str, kind: Kind, issued: &Issued) -> Result<(), Failure> {
    let failed = |error: Error| Failure::of(Step::Challenge, &error);
    let mut shown = Vec::new();
    let mut authorizations = order.authorizations();
    while let Some(authorization) = authorizations.next().await {
        let mut authorization = authorization.map_err(failed)?;
        match authorization.status {
            // Of an order before: nothing is to be proved.
            AuthorizationStatus::Valid => continue,
            AuthorizationStatus::Pending => {}
            status => {
                let reason = format!("the authorization is {status:?} before anything was shown");
                return Err(Failure::new(Step::Challenge, reason));
            }
        }
        let kinds = authorization.challenges.iter().map(|challenge| label(&challenge.r#type));
        let offered = kinds.collect::<Vec<_>>().join(", ");
        let Some(mut challenge) = authorization.challenge(kind.of_library()) else {
            let reason = format!("the authority offers no {kind} for it, but {offered}");
            return Err(Failure::new(Step::Challenge, reason));
        };
        shown.push(show(&challenge, name, kind, issued)?);
        challenge.set_ready().await.map_err(failed)?;
    }
    if shown.is_empty() && order.state().status == OrderStatus::Ready {
        return Ok(());
    }
    match order.poll_ready(&policy()).await {
        Ok(OrderStatus::Ready) => Ok(()),
        Ok(_) | Err(Error::Api(_)) => Err(Failure::new(Step::Challenge, refusal(order).await)),
        Err(error) => Err(failed(error)),
    }
}

/// Asks why an order became invalid.
async fn refusal(order: &mut Order) -> String {
    let of_order = order.state().error.as_ref().map(said);
    let mut authorizations = order.authorizations();
    while let Some(authorization) = authorizations.next().await {
        let Ok(mut authorization) = authorization else { break };
        let Ok(state) = authorization.refresh().await else { break };
        if let Some(problem) = state.challenges.iter().find_map(|one| one.error.as_ref()) {
            return said(problem);
        }
    }
    of_order.unwrap_or_else(|| "the authority does not say why".to_owned())
}

/// Lets the authority see what it looks for, until dropped.
fn show<'a>(
    challenge: &ChallengeHandle<'_>,
    name: &str,
    kind: Kind,
    issued: &'a Issued,
) -> Result<Shown<'a>, Failure> {
    let authorization = challenge.key_authorization();
    match kind {
        Kind::TlsAlpn => {
            let key = proof(name, authorization.digest().as_ref())?;
            Ok(Shown::Certificate(Entry::new(&issued.challenges, name, key)))
        }
        Kind::Http => {
            let answer = authorization.as_str().into();
            Ok(Shown::Answer(Entry::new(&issued.answers, &challenge.token, answer)))
        }
    }
}

/// Returns the certificate that proves a name (RFC 8737 §3).
fn proof(name: &str, digest: &[u8]) -> Result<Arc<CertifiedKey>, Failure> {
    let key = KeyPair::generate().map_err(|error| own(&error))?;
    let mut params = CertificateParams::new(vec![name.to_owned()]).map_err(|error| own(&error))?;
    params.distinguished_name = DistinguishedName::new();
    params.custom_extensions = vec![CustomExtension::new_acme_identifier(digest)];
    let certificate = params.self_signed(&key).map_err(|error| own(&error))?;
    let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let key = tls::provider().key_provider.load_private_key(der).map_err(|error| own(&error))?;
    // Not by way of a check: its critical extension is known to nobody but the authority.
    Ok(Arc::new(CertifiedKey::new(vec![certificate.der().clone()], key)))
}

/// An entry of [`Issued`] that is gone when this is.
struct Entry<'a, V: Clone> {
    map: &'a ArcSwap<HashMap<Arc<str>, V>>,
    key: Arc<str>,
}

/// What the authority can see; the entries are there for their end.
enum Shown<'a> {
    Certificate(
        #[expect(dead_code, reason = "withdrawn when dropped")] Entry<'a, Arc<CertifiedKey>>,
    ),
    Answer(#[expect(dead_code, reason = "withdrawn when dropped")] Entry<'a, Arc<str>>),
}

impl<'a, V: Clone> Entry<'a, V> {
    fn new(map: &'a ArcSwap<HashMap<Arc<str>, V>>, key: &str, value: V) -> Self {
        let key: Arc<str> = key.into();
        map.rcu(|map| {
            let mut map = HashMap::clone(map);
            map.insert(Arc::clone(&key), value.clone());
            map
        });
        Self { map, key }
    }
}

impl<V: Clone> Drop for Entry<'_, V> {
    fn drop(&mut self) {
        self.map.rcu(|map| {
            let mut map = HashMap::clone(map);
            map.remove(&self.key);
            map
        });
    }
}

fn label(kind: &ChallengeType) -> &str {
    match kind {
        ChallengeType::Http01 => "http-01",
        ChallengeType::Dns01 => "dns-01",
        ChallengeType::TlsAlpn01 => "tls-alpn-01",
        ChallengeType::DeviceAttest01 => "device-attest-01",
        ChallengeType::Unknown(label) => label,
        _ => "others",
    }
}

/// A failure of cryptography, or of a name that cannot stand in a certificate.
fn own(error: &dyn std::error::Error) -> Failure {
    Failure::new(Step::Certificate, crate::error::chain(error))
}

const fn policy() -> RetryPolicy {
    RetryPolicy::new().timeout(POLL_TIMEOUT).backoff(1.5)
}

#[cfg(test)]
mod tests {
    use x509_parser::prelude::{FromDer as _, X509Certificate};

    use super::*;

    #[test]
    fn a_proof_names_the_name_alone_and_holds_the_digest_critically() {
        let key = proof("shop.example.org", &[7; 32]).unwrap();
        let (_, certificate) = X509Certificate::from_der(&key.cert[0]).unwrap();
        let names = &certificate.subject_alternative_name().unwrap().unwrap().value.general_names;
        assert_eq!(names.len(), 1, "{names:?}");
        let acme = certificate
            .extensions()
            .iter()
            .find(|extension| extension.oid.to_id_string() == "1.3.6.1.5.5.7.1.31")
            .unwrap();
        assert!(acme.critical);
        // An OCTET STRING of 32 bytes.
        assert_eq!(acme.value, [&[4, 32][..], &[7; 32]].concat());
    }

    #[test]
    fn what_is_shown_is_withdrawn() {
        let issued = Issued::default();
        let first = Entry::new(&issued.answers, "a", Arc::from("1"));
        let second = Entry::new(&issued.answers, "b", Arc::from("2"));
        assert_eq!(issued.answers.load().len(), 2);
        drop(first);
        assert_eq!(issued.answers.load().get("b").map(|answer| &**answer), Some("2"));
        drop(second);
        assert!(issued.answers.load().is_empty());
    }
}
