//! Who sidecars are, from outside: hashes of tokens, an issuer of signed tokens, an authority for
//! certificates.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, PKCS_ED25519, PublicKeyData as _, SanType, SigningKey as _,
};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// Returns a token's hash as a relay's file says it.
#[must_use]
pub fn token_hash(token: &str) -> String {
    let hex: String = Sha256::digest(token).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// An issuer of signed tokens, with one key.
#[derive(Debug)]
pub struct Signer {
    key: KeyPair,
    kid: &'static str,
}

impl Signer {
    /// The issuer's URL.
    pub const ISSUER: &'static str = "https://issuer.test";

    /// Returns an issuer with a fresh key of this id.
    #[must_use]
    pub fn new(kid: &'static str) -> Self {
        Self { key: KeyPair::generate_for(&PKCS_ED25519).expect("a key"), kid }
    }

    /// Returns the set of its keys.
    #[must_use]
    pub fn set(&self) -> String {
        let x = URL_SAFE_NO_PAD.encode(self.key.der_bytes());
        let key = json!({ "kty": "OKP", "crv": "Ed25519", "kid": self.kid, "use": "sig", "x": x });
        json!({ "keys": [key] }).to_string()
    }

    /// Returns a token of a ServiceAccount that ends after this time.
    #[must_use]
    pub fn account(&self, namespace: &str, account: &str, lasts: Duration) -> String {
        let end = SystemTime::now() + lasts;
        let end = end.duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
        self.sign(&json!({
            "iss": Self::ISSUER,
            "aud": ["sidelane"],
            "sub": format!("system:serviceaccount:{namespace}:{account}"),
            "exp": end,
            "kubernetes.io": { "namespace": namespace, "serviceaccount": { "name": account } },
        }))
    }

    fn sign(&self, claims: &Value) -> String {
        let header = json!({ "alg": "EdDSA", "kid": self.kid, "typ": "JWT" });
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", part(&header), part(claims));
        let signature = self.key.sign(signed.as_bytes()).expect("a signature");
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}

/// An authority that signs certificates.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").finish_non_exhaustive()
    }
}

impl Default for Authority {
    fn default() -> Self {
        Self::new()
    }
}

impl Authority {
    /// Returns a fresh one.
    #[must_use]
    pub fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().expect("a key");
        Self { issuer: CertifiedIssuer::self_signed(params, key).expect("an authority") }
    }

    /// Returns its certificate, PEM.
    #[must_use]
    pub fn pem(&self) -> String {
        self.issuer.pem()
    }

    /// Returns a certificate with its key, both PEM, for DNS names, IP addresses and URIs.
    #[must_use]
    pub fn certificate(&self, names: &[&str]) -> (String, String) {
        let mut params = CertificateParams::default();
        params.subject_alt_names = names
            .iter()
            .map(|name| match name.parse() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) if name.contains("://") => SanType::URI((*name).try_into().expect("ASCII")),
                Err(_) => SanType::DnsName((*name).try_into().expect("ASCII")),
            })
            .collect();
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        (certificate.pem(), key.serialize_pem())
    }
}
