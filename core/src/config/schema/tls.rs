//! What the language says of TLS, of who sidecars are, and of what they may claim.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};

use super::*;

/// What is shown to those who dial, and what is asked of them.
#[derive(JsonSchema)]
pub(super) struct ListenerTls {
    /// By name (SNI) the first that fits, else the first of all. One at least, unless `acme` has names.
    certificates: Vec<Certificates>,
    /// Names whose certificates are obtained by `relay.acme`.
    acme: Vec<AcmeName>,
    /// Oldest version of TLS that is taken.
    min_version: TlsVersion,
    /// Clients are asked for a certificate.
    #[schemars(extend("x-default" = "absent: none is asked for"))]
    client_certificates: ClientCertificates,
}

/// Certificates and their keys: of two files, or of a directory.
#[derive(JsonSchema)]
pub(super) struct Certificates {
    /// PEM, the end's own certificate first, then those that lead to an authority. A file that is replaced
    /// is taken over as a change of the configuration is.
    cert: FilePath,
    /// PEM of the key, not encrypted.
    key: FilePath,
    /// In place of the two: `tls.crt` and `tls.key` in it, as in a mounted Kubernetes secret, `NAME.crt` or
    /// `NAME.pem` with `NAME.key` or `NAME-key.pem`, `fullchain.pem` with `privkey.pem`, and directories
    /// with these.
    directory: FilePath,
}

/// Clients' certificates.
#[derive(JsonSchema)]
pub(super) struct ClientCertificates {
    /// PEM of those who sign them.
    #[schemars(extend("x-required" = true))]
    ca: FilePath,
    /// Nobody gets in without one.
    required: Bool,
    /// The service is told of it by `Client-Cert` and `Client-Cert-Chain` (RFC 9440).
    forward: Bool,
}

/// TLS for sidecars.
#[derive(JsonSchema)]
pub(super) struct TunnelTls {
    /// As a listener's.
    certificates: Vec<Certificates>,
    /// As a listener's.
    acme: Vec<AcmeName>,
    /// As a listener's.
    min_version: TlsVersion,
    /// PEM of those who sign sidecars' certificates; who has none may still present a token.
    client_ca: FilePath,
}

/// Who a sidecar is, and what it may claim. Patterns: `*` stands for any characters of a label, as the whole
/// first label for one label or more, alone for any name. In `subdomains`, `hosts` and `tunnels`
/// `{namespace}` and `{service_account}` stand for what a `jwt`, or a certificate's
/// `spiffe://…/ns/NAMESPACE/sa/ACCOUNT`, says.
#[derive(JsonSchema)]
pub(super) struct Principal {
    /// Its name in logs and metrics; unique.
    #[schemars(extend("x-required" = true))]
    principal: Name,
    /// Hashes of tokens, as `sidelane token new` and `sidelane token hash` print them; any of them will do.
    tokens: Vec<Hash>,
    /// Names in a sidecar's certificate; any of them will do. With `tunnel.tls.client_ca`.
    certificates: Vec<CertificateName>,
    /// Signed tokens; any of them will do.
    jwt: Vec<JwtRule>,
    /// Subdomains of any base domain that it may claim. At most 256 items in each of these lists.
    subdomains: Vec<Pattern>,
    /// Whole hosts that it may claim.
    hosts: Vec<Pattern>,
    /// Tunnels that it may serve.
    tunnels: Vec<Pattern>,
    /// Listeners that it may claim as a whole, by routes without a host.
    listeners: Vec<Pattern>,
}

/// What a signed token must say; one of `subject`, `namespace`, `service_account` at least.
#[derive(JsonSchema)]
pub(super) struct JwtRule {
    /// Name of one of `token_issuers`.
    #[schemars(extend("x-required" = true))]
    issuer: Name,
    /// `sub`; `*` stands for any characters.
    #[schemars(extend("x-default" = "any"))]
    subject: AnyText,
    /// Namespace of a Kubernetes ServiceAccount token.
    #[schemars(extend("x-default" = "any"))]
    namespace: Pattern,
    /// Account of a Kubernetes ServiceAccount token.
    #[schemars(extend("x-default" = "any"))]
    service_account: Pattern,
}

/// Who signs tokens. One of `jwks_file`, `jwks_url` is required.
#[derive(JsonSchema)]
pub(super) struct Issuer {
    /// Unique.
    #[schemars(extend("x-required" = true))]
    name: Name,
    /// `iss` of its tokens.
    #[schemars(extend("x-required" = true))]
    issuer: AnyText,
    /// One of these must be in `aud`.
    #[schemars(extend("x-required" = true))]
    audiences: Vec<AnyText>,
    /// File of its keys (RFC 7517), at most 256 KiB.
    jwks_file: FilePath,
    /// Where its keys are fetched.
    jwks_url: KeysUrl,
    /// With `jwks_url`: PEM of those who sign the server's certificate.
    #[schemars(extend("x-default" = "the system's authorities"))]
    ca: FilePath,
    /// With `jwks_url`: file whose contents are sent as a bearer token, read anew each time.
    token_file: FilePath,
    /// With `jwks_url`: how often the keys are fetched.
    refresh: Duration<10_000, DAY>,
    /// By how much clocks may differ.
    leeway: Duration<0, 600_000>,
}

/// Certificates by ACME.
#[derive(JsonSchema)]
pub(super) struct Acme {
    /// The authority's directory.
    directory: HttpsUrl,
    /// Whom the authority writes to; at most 16.
    contacts: Vec<Contact>,
    /// Directory for the account's key and the certificates; relative to the configuration's.
    #[schemars(extend("x-required" = true))]
    storage: FilePath,
    /// PEM of those who sign the authority's own certificate.
    #[schemars(extend("x-default" = "the system's authorities"))]
    ca: FilePath,
    /// Binds the account to one that the authority knows already.
    #[schemars(extend("x-default" = "none"))]
    external_account: ExternalAccount,
    /// `true`: you agree to the authority's terms of service.
    #[schemars(extend("x-required" = true))]
    accept_terms: Bool,
}

/// An account that the authority knows already (RFC 8555 §7.3.4). One of `key`, `key_file`, `key_env` is
/// required.
#[derive(JsonSchema)]
pub(super) struct ExternalAccount {
    /// As the authority gave it.
    #[schemars(extend("x-required" = true))]
    key_id: AnyText,
    /// HMAC key in base64url; best as `${file:…}`.
    key: AnyText,
    /// File that holds the key.
    key_file: FilePath,
    /// Environment variable that holds the key.
    key_env: Variable,
}

/// A relay: an address, or a section.
pub(super) struct RelayItem;

impl JsonSchema for RelayItem {
    fn schema_name() -> Cow<'static, str> {
        "RelayItem".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let (address, section) =
            (RelayUrl::json_schema(generator), generator.subschema_for::<RelayAddress>());
        json_schema!({
            "anyOf": [address, section],
            "x-accepted": "an address, or sections",
        })
    }
}

/// A relay that is dialled.
#[derive(JsonSchema)]
pub(super) struct RelayAddress {
    /// Where, and what carries lanes there: TCP, WebSocket (`ws`, `wss`) or gRPC.
    #[schemars(extend("x-required" = true))]
    address: RelayUrl,
    /// TLS, on loopback too.
    #[schemars(extend("x-default" = "with the system's authorities; on loopback absent: plain"))]
    tls: RelayTls,
    /// `true`: plain beyond loopback, where anybody on the way reads and changes everything.
    #[schemars(extend("x-default" = "`false`"))]
    insecure: Bool,
    /// Other ways to the relay, in turn, where the one before fails; `tls`, `insecure` and `proxy` count for
    /// them too. At most 8.
    #[schemars(extend("x-default" = "none"))]
    fallback: Vec<RelayUrl>,
    /// HTTP proxy on the way to this relay; `none`: there is none.
    #[schemars(extend("x-default" = "`sidecar.proxy`"))]
    proxy: ProxyUrl,
}

/// TLS to a relay.
#[derive(JsonSchema)]
pub(super) struct RelayTls {
    /// PEM of those who sign the relay's certificate; no others are believed then.
    #[schemars(extend("x-default" = "the system's authorities"))]
    ca: FilePath,
    /// The name that the certificate must be for.
    #[schemars(extend("x-default" = "the host in `address`"))]
    server_name: Host,
    /// What is shown where the relay asks for it, in place of a token or beside it.
    #[schemars(extend("x-default" = "none"))]
    certificate: Certificate,
}

/// A certificate and its key.
#[derive(JsonSchema)]
pub(super) struct Certificate {
    /// PEM, the end's own certificate first.
    #[schemars(extend("x-required" = true))]
    cert: FilePath,
    /// PEM of the key, not encrypted.
    #[schemars(extend("x-required" = true))]
    key: FilePath,
}

/// TLS to a service.
#[derive(JsonSchema)]
pub(super) struct ServiceTls {
    /// PEM of those who sign the service's certificate; no others are believed then.
    #[schemars(extend("x-default" = "the system's authorities"))]
    ca: FilePath,
    /// The name that the certificate must be for, and that is asked for (SNI).
    #[schemars(extend("x-default" = "the host in `service`"))]
    server_name: Host,
    /// What is shown where the service asks for it.
    #[schemars(extend("x-default" = "none"))]
    certificate: Certificate,
    /// `true`: any certificate is believed; whoever answers at the address is the service.
    insecure_skip_verify: Bool,
}

/// Clients are told to come by TLS only.
#[derive(JsonSchema)]
pub(super) struct Hsts {
    /// For how long a client remembers it, in whole seconds; `0s`: it forgets.
    max_age: Duration<0, { 10 * 365 * DAY }>,
    /// For subdomains too.
    include_subdomains: Bool,
    /// It may be put on the lists that come with browsers; with all subdomains, for a year or more.
    preload: Bool,
}
