//! TLS and credentials for people: certificates by their place, names and end; of keys, tokens and
//! their hashes nothing.

use std::sync::Arc;
use std::time::SystemTime;

use serde_json::{Value as Json, json};

use super::credentials::{CertificatePattern, Issuer, Keys, Pattern, Principal};
use super::tls::{Acme, Authorities, Certificate, ClientTls, ServerTls, TlsVersion, Trust};
use super::{Over, RelayAddress, duration_text};

fn certificate(certificate: &Certificate) -> Json {
    json!({
        "cert": certificate.place.as_ref(),
        "key": "***",
        "names": certificate.names.iter().map(AsRef::as_ref).collect::<Vec<&str>>(),
        "not_after": time(certificate.not_after),
    })
}

fn time(time: SystemTime) -> String {
    httpdate::fmt_http_date(time)
}

fn authorities(authorities: &Authorities) -> Json {
    authorities.place.as_ref().into()
}

/// Returns a listener's `tls`.
pub(super) fn listener(tls: &ServerTls) -> Json {
    let mut json = shown(tls);
    json["client_certificates"] = tls.clients.as_ref().map_or(Json::Null, |clients| {
        json!({
            "ca": authorities(&clients.authorities),
            "required": clients.required,
            "forward": clients.forward,
        })
    });
    json
}

/// Returns `relay.tunnel.tls`.
pub(super) fn tunnel(tls: &ServerTls) -> Json {
    let mut json = shown(tls);
    json["client_ca"] =
        tls.clients.as_ref().map_or(Json::Null, |clients| authorities(&clients.authorities));
    json
}

fn shown(tls: &ServerTls) -> Json {
    json!({
        "certificates": tls.certificates.iter().map(|one| certificate(one)).collect::<Vec<_>>(),
        "acme": tls.acme.iter().map(AsRef::as_ref).collect::<Vec<&str>>(),
        "min_version": match tls.min_version {
            TlsVersion::V1_2 => "1.2",
            TlsVersion::V1_3 => "1.3",
        },
    })
}

fn client(tls: &ClientTls) -> Json {
    json!({
        "ca": match &tls.trust {
            Trust::Authorities(trusted) => authorities(trusted),
            Trust::System | Trust::Anybody => Json::Null,
        },
        "server_name": tls.server_name.as_deref(),
        "certificate": tls.certificate.as_deref().map(certificate),
    })
}

/// Returns a tunnel's `tls`.
pub(super) fn service(tls: &ClientTls) -> Json {
    let mut json = client(tls);
    json["insecure_skip_verify"] = (tls.trust == Trust::Anybody).into();
    json
}

/// Returns an item of `sidecar.relays`: in short where the address says all.
pub(super) fn relay(relay: &RelayAddress) -> Json {
    let is_default = |tls: &Arc<ClientTls>| **tls == ClientTls::default();
    let says_all = match relay.over {
        Over::Tcp => relay.tls == RelayAddress::new(relay.address.clone()).tls,
        Over::WebSocket { .. } | Over::Grpc => relay.tls.as_ref().is_none_or(is_default),
    };
    let is_short = !relay.insecure && relay.proxy.is_none() && relay.fallback.is_empty();
    if says_all && is_short {
        return relay.to_string().into();
    }
    json!({
        "address": relay.to_string(),
        "tls": relay.tls.as_deref().map(client),
        "insecure": relay.insecure,
        "fallback": relay.fallback.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "proxy": relay.proxy.as_ref().map(ToString::to_string),
    })
}

/// Returns an entry of `relay.credentials`.
pub(super) fn principal(principal: &Principal) -> Json {
    let patterns = |patterns: &[Pattern]| {
        patterns.iter().map(|pattern| Json::from(pattern.as_str())).collect::<Json>()
    };
    let certificates = principal.certificates.iter().map(|pattern| match pattern {
        CertificatePattern::Dns(name) => format!("dns:{name}"),
        CertificatePattern::Uri(uri) if uri.as_str().starts_with("spiffe://") => uri.to_string(),
        CertificatePattern::Uri(uri) => format!("uri:{uri}"),
    });
    let jwt = principal.jwt.iter().map(|rule| {
        let text = |pattern: &Option<Pattern>| pattern.as_ref().map(ToString::to_string);
        json!({
            "issuer": rule.issuer.as_ref(),
            "subject": text(&rule.subject),
            "namespace": text(&rule.namespace),
            "service_account": text(&rule.service_account),
        })
    });
    json!({
        "principal": principal.name.as_ref(),
        "tokens": principal.tokens.iter().map(|_| "***").collect::<Vec<_>>(),
        "certificates": certificates.collect::<Vec<_>>(),
        "jwt": jwt.collect::<Vec<_>>(),
        "subdomains": patterns(&principal.claims.subdomains),
        "hosts": patterns(&principal.claims.hosts),
        "tunnels": patterns(&principal.claims.tunnels),
        "listeners": patterns(&principal.claims.listeners),
    })
}

/// Returns an entry of `relay.token_issuers`.
pub(super) fn issuer(issuer: &Issuer) -> Json {
    let mut json = json!({
        "name": issuer.name.as_ref(),
        "issuer": issuer.issuer.as_ref(),
        "audiences": issuer.audiences.iter().map(AsRef::as_ref).collect::<Vec<&str>>(),
        "leeway": duration_text(issuer.leeway),
    });
    match &issuer.keys {
        // Its contents are long.
        Keys::Set(_) => json["jwks_file"] = "***".into(),
        Keys::Url { url, authorities: trusted, token_file, interval } => {
            json["jwks_url"] = url.as_ref().into();
            json["ca"] = trusted.as_ref().map_or(Json::Null, authorities);
            json["token_file"] = json!(token_file);
            json["refresh"] = duration_text(*interval).into();
        }
    }
    json
}

/// Returns `relay.acme`.
pub(super) fn acme(acme: &Acme) -> Json {
    json!({
        "directory": acme.directory.as_ref(),
        "contacts": acme.contacts.iter().map(AsRef::as_ref).collect::<Vec<&str>>(),
        "storage": acme.storage,
        "ca": match &acme.trust {
            Trust::Authorities(trusted) => authorities(trusted),
            Trust::System | Trust::Anybody => Json::Null,
        },
        "external_account": acme
            .external_account
            .as_ref()
            .map(|(id, key)| json!({ "key_id": id.as_ref(), "key": key.to_string() })),
        "accept_terms": true,
    })
}
