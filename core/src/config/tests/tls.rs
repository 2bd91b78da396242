//! Certificates and credentials of files that are good: what is read, warned of, shown, and what
//! changes it.

use std::fs;
use std::os::unix::fs::symlink;
use std::time::SystemTime;

use rcgen::date_time_ymd;
use tempfile::TempDir;

use super::files::{KEYS, certificate, directory, write};
use super::*;
use crate::config::credentials::{CertificatePattern, Keys};
use crate::config::tls::{Certificate, Trust};

fn read(directory: &TempDir, text: &str) -> Config {
    let path = directory.path().join("test.yaml");
    let source = Source::from_text(&path, format!("version: 1\n{text}"));
    parse(&source, &env).unwrap_or_else(|errors| panic!("{}", errors.report()))
}

fn warnings(directory: &TempDir, text: &str) -> Vec<String> {
    let prefix = format!("{}/", directory.path().display());
    let warnings = read(directory, text).warnings;
    warnings
        .iter()
        .map(|warning| format!("{}: {}", warning.path, warning.message.replace(&prefix, "")))
        .collect()
}

fn shown(config: &Config) -> Vec<Arc<Certificate>> {
    let listener = &config.relay.as_ref().unwrap().listeners[0];
    listener.tls.as_ref().unwrap().certificates.clone()
}

/// A listener that shows these.
fn showing(certificates: &str) -> String {
    format!(
        "relay: {{ listeners: [{{ name: a, address: \"127.0.0.1:1\", tls: {{ certificates: [{certificates}] }} }}] }}\n"
    )
}

#[test]
fn certificates_come_from_files_and_belong_to_the_configuration() {
    let directory = directory();
    let config = read(&directory, &showing("{ cert: good.crt, key: good.key }"));
    let certificates = shown(&config);
    assert_eq!(certificates.len(), 1);
    assert_eq!(*certificates[0].names, ["shop.example.org".into()]);
    assert_eq!(config.files, ["good.crt", "good.key"].map(|name| directory.path().join(name)));
}

#[test]
fn a_directory_is_read_in_every_layout() {
    let directory = directory();
    let root = directory.path().join("d");
    fs::create_dir_all(root.join("live")).unwrap();
    fs::create_dir(root.join("other")).unwrap();
    let new = |name: &str| certificate(&[name], |_| {});
    let rename = |to: &str, (cert, key): (String, String), ends: (&str, &str)| {
        for (end, text) in [(ends.0, cert), (ends.1, key)] {
            fs::write(root.join(format!("{to}{end}")), text).unwrap();
        }
    };
    rename("tls", new("secret.example"), (".crt", ".key"));
    rename("a", new("a.example"), (".crt", ".key"));
    rename("b", new("b.example"), (".pem", ".key"));
    rename("c", new("c.example"), (".pem", "-key.pem"));
    rename("live/", new("live.example"), ("fullchain.pem", "privkey.pem"));
    rename("other/tls", new("other.example"), (".crt", ".key"));
    // Beside certificates, and no one's other half.
    for name in ["ca.crt", "live/chain.pem", ".hidden.key", "README"] {
        fs::write(root.join(name), "").unwrap();
    }
    let config = read(&directory, &showing("{ directory: d }"));
    let names: Vec<String> =
        shown(&config).iter().map(|certificate| certificate.names[0].to_string()).collect();
    let expected = ["secret", "a", "b", "c", "live", "other"].map(|name| format!("{name}.example"));
    assert_eq!(names, expected);
    for directory in ["", "live", "other"] {
        assert!(config.files.contains(&root.join(directory)), "{directory}: {:?}", config.files);
    }
}

/// What the kubelet does: a new timestamped directory, a symlink to it, renamed over `..data`.
fn publish(directory: &Path, version: &str, (cert, key): &(String, String)) {
    let new = directory.join(format!("..{version}"));
    fs::create_dir_all(&new).unwrap();
    fs::write(new.join("tls.crt"), cert).unwrap();
    fs::write(new.join("tls.key"), key).unwrap();
    symlink(format!("..{version}"), directory.join("..data_tmp")).unwrap();
    fs::rename(directory.join("..data_tmp"), directory.join("..data")).unwrap();
}

#[test]
fn a_mounted_secret_is_of_one_version_and_its_next_one_is_a_change() {
    let directory = directory();
    let secret = directory.path().join("secret");
    fs::create_dir(&secret).unwrap();
    publish(&secret, "1", &certificate(&["one.example"], |_| {}));
    for name in ["tls.crt", "tls.key"] {
        symlink(Path::new("..data").join(name), secret.join(name)).unwrap();
    }
    for form in ["{ directory: secret }", "{ cert: secret/tls.crt, key: secret/tls.key }"] {
        publish(&secret, "1", &certificate(&["one.example"], |_| {}));
        let old = read(&directory, &showing(form));
        assert_eq!(*shown(&old)[0].names, ["one.example".into()]);
        publish(&secret, "2", &certificate(&["two.example"], |_| {}));
        let new = read(&directory, &showing(form));
        assert_eq!(*shown(&new)[0].names, ["two.example".into()]);
        let changes = diff(&old, &new);
        assert_eq!(changes.listeners.changed.len(), 1);
        assert!(changes.relay.is_empty());
    }
}

#[test]
fn a_certificate_that_ends_or_has_ended_or_is_not_valid_yet_is_told() {
    let directory = directory();
    let path = directory.path();
    let now = SystemTime::now();
    let day = Duration::from_secs(24 * 3600);
    let of = |begin: SystemTime, end: SystemTime| {
        certificate(&["a.example"], |params| {
            params.not_before = begin.into();
            params.not_after = end.into();
        })
    };
    write(
        path,
        "ended",
        &certificate(&["a.example"], |params| {
            params.not_before = date_time_ymd(2020, 1, 1);
            params.not_after = date_time_ymd(2020, 2, 1);
        }),
    );
    write(path, "ends", &of(now - day, now + day * 5 + day / 2));
    write(path, "begins", &of(now + day * 3 + day / 2, now + day * 90));
    write(path, "fresh", &of(now - day, now + day * 90));
    let all = ["ended", "ends", "begins", "fresh"]
        .map(|name| format!("{{ cert: {name}.crt, key: {name}.key }}"))
        .join(", ");
    let told = warnings(&directory, &showing(&all));
    let expected = [
        ("[0].cert: ended.crt: ended on 01 Feb 2020, ", " days ago"),
        ("[1].cert: ends.crt: ends on ", ", in 5 days"),
        ("[2].cert: begins.crt: is not valid before ", ", in 3 days"),
    ];
    assert_eq!(told.len(), expected.len(), "{told:?}");
    for (told, (begin, end)) in told.iter().zip(expected) {
        assert!(told.contains(begin) && told.ends_with(end), "{told}");
    }
}

#[test]
fn warnings_tell_what_is_likely_a_mistake() {
    let directory = directory();
    let table = [
        (
            "relay:
  listeners:
    - { name: a, address: \"127.0.0.1:1\", tls: { certificates: [{ cert: good.crt, key: good.key }] } }
    - { name: b, address: \"127.0.0.1:2\" }
  base_domains: [example.org, example.net]
routes:
  - { subdomain: shop, tunnel: t }
  - { subdomain: bank, tunnel: t }
  - { host: shop.example.org, path_prefix: /x, tunnel: t }
  - { host: a.shop.example.org, tunnel: t }
  - { host: b.shop.example.org, listener: b, tunnel: t, hsts: {} }
",
            "routes[1].subdomain: no listener with tls has a certificate for bank.example.org, bank.example.net: browsers refuse what is shown
routes[3].host: no listener with tls has a certificate for a.shop.example.org: browsers refuse what is shown
routes[4].hsts: has no effect: no listener that the route is taken at has tls",
        ),
        (
            "relay:
  tunnel: { address: \"0.0.0.0:1\", insecure: true, token: 0123456789abcdef }
  acme: { storage: acme, accept_terms: true }
",
            "relay.acme: has no effect: no listener, and not the tunnel, has names in tls.acme
relay.tunnel.insecure: 0.0.0.0:1 is plain: anybody on the way reads and changes everything, credentials too",
        ),
        (
            "relay:
  listeners:
    - { name: a, address: \"127.0.0.1:8443\", tls: { certificates: [{ cert: good.crt, key: good.key }] } }
    - { name: b, address: \"127.0.0.1:2\", https_redirect: 8443 }
    - { name: c, address: \"127.0.0.1:3\", https_redirect: 443 }
",
            "relay.listeners[2].https_redirect: no listener with tls has port 443: right only where something in front leads it to one",
        ),
        (
            "relay: { tunnel: { insecure: true } }
",
            "relay.tunnel.insecure: has no effect: on loopback nobody reads along",
        ),
        (
            "sidecar:
  token: 0123456789abcdef
  relays: [{ address: \"10.0.0.5:1\", insecure: true }, { address: \"127.0.0.1:1\", insecure: true }]
tunnels: [{ name: a, service: \"https://localhost:1\", tls: { insecure_skip_verify: true } }]
",
            "sidecar.relays[0].insecure: 10.0.0.5:1 is dialled without TLS: anybody on the way reads and changes everything, credentials too
sidecar.relays[1].insecure: has no effect: loopback is plain where no tls is given
tunnels[0].tls.insecure_skip_verify: whoever answers at the address is believed to be the service",
        ),
        (
            "relay:
  base_domains: [example.org]
  tunnel: { tls: { certificates: [{ cert: good.crt, key: good.key }], client_ca: ca.pem } }
  credentials:
    - { principal: a, subdomains: [a], tunnels: [a] }
    - { principal: b, tokens: [], subdomains: [a], tunnels: [a] }
    - principal: c
      jwt: [{ issuer: used, subject: \"*\" }]
      subdomains: [shop.example.org, example.org, \"*.shop\", notexample.org]
      hosts: [shop, \"*\", localhost, \"*.example.org\"]
      listeners: [web, \"w*\", lines]
    - { principal: d, jwt: [{ issuer: used, subject: \"*\" }], tunnels: [a] }
    - { principal: e, jwt: [{ issuer: used, subject: \"*\" }] }
  token_issuers:
    - { name: used, issuer: a, audiences: [b], jwks_file: keys.json }
    - { name: unused, issuer: a, audiences: [b], jwks_url: \"https://a.example\" }
",
            "relay.tunnel.tls.client_ca: has no effect: no entry of relay.credentials has certificates
relay.credentials[0]: nobody can be this: it has none of tokens, certificates, jwt
relay.credentials[1]: nobody can be this: what it is known by is empty
relay.credentials[2]: may claim names and serve no tunnel behind them
relay.credentials[2].subdomains[0]: \"shop.example.org\" is for names below example.org, with the base domain twice; a whole host goes to hosts
relay.credentials[2].subdomains[1]: \"example.org\" is for names below example.org, with the base domain twice; a whole host goes to hosts
relay.credentials[2].hosts[0]: \"shop\" has no dot, as every host has; a name below a base domain goes to subdomains
relay.credentials[2].listeners[2]: \"lines\" fits no listener
relay.credentials[3]: may serve tunnels and claim no name: only routes in the relay's own file lead to it
relay.credentials[4]: may claim nothing (accepted: patterns in tunnels, and in subdomains, hosts or listeners)
relay.token_issuers[1].name: no entry of relay.credentials takes tokens of issuer \"unused\"",
        ),
        (
            "relay:
  credentials:
    - principal: cluster
      jwt: [{ issuer: c, namespace: \"*\" }]
      subdomains: [\"{service_account}.{namespace}\"]
      tunnels: [\"{namespace}-*\", \"{namespace}.*\"]
  token_issuers: [{ name: c, issuer: a, audiences: [b], jwks_file: keys.json }]
",
            "relay.credentials[0].tunnels[0]: \"{namespace}-*\" may be another account's: with {namespace} or {service_account} it fits names that are made for a longer one (accepted: what no name of an account holds, as '.', in between)",
        ),
    ];
    for (text, expected) in table {
        let mut told = warnings(&directory, text);
        let mut expected: Vec<&str> = expected.lines().collect();
        told.sort();
        expected.sort_unstable();
        assert_eq!(told, expected, "{text}");
    }
}

/// Every key of TLS and credentials.
pub(super) const EVERYTHING: &str = "relay:
  listeners:
    - name: https
      address: \"127.0.0.1:1\"
      tls:
        certificates: [{ cert: good.crt, key: good.key }]
        acme: [Other.example.org]
        min_version: 1.3
        client_certificates: { ca: ca.pem, forward: true }
    - { name: http, address: \"127.0.0.1:2\", https_redirect: 443 }
  tunnel:
    address: \"0.0.0.0:3\"
    listener: https
    tls: { certificates: [{ cert: good.crt, key: good.key }], client_ca: ca.pem }
  credentials:
    - principal: shop
      tokens: [\"sha256:00112233445566778899AABBCCDDEEFF00112233445566778899aabbccddeeff\"]
      certificates: [\"spiffe://example.org/ns/*/sa/*\", \"dns:shop.internal\", \"uri:urn:shop\"]
      jwt: [{ issuer: cluster, namespace: shop, service_account: \"*\" }]
      subdomains: [\"{service_account}.{namespace}\"]
      tunnels: [\"{namespace}.*\"]
  token_issuers:
    - { name: cluster, issuer: c, audiences: [sidelane], jwks_file: keys.json }
    - { name: other, issuer: o, audiences: [sidelane], jwks_url: \"https://a.example\", ca: ca.pem, token_file: token }
  acme:
    storage: acme
    contacts: [\"mailto:ops@example.org\"]
    external_account: { key_id: me, key: c2VjcmV0 }
    accept_terms: true
sidecar:
  relays:
    - relay.example.org:1
    - 127.0.0.1:1
    - { address: \"127.0.0.1:2\", tls: {} }
    - { address: \"10.0.0.5:1\", tls: { ca: ca.pem, server_name: Relay.internal, certificate: { cert: good.crt, key: good.key } } }
    - { address: \"10.0.0.6:1\", insecure: true }
  token_file: token
tunnels:
  - { name: a, service: \"https://localhost:8443\" }
  - { name: b, service: \"https://localhost:8444/\", http_version: 1, tls: { insecure_skip_verify: true } }
  - { name: c, service: \"localhost:1\" }
routes:
  - { subdomain: a, tunnel: a, hsts: { max_age: 1h, include_subdomains: true } }
";

fn everything(directory: &TempDir) -> Config {
    fs::write(directory.path().join("token"), "0123456789abcdef-of-a-file\n").unwrap();
    read(directory, EVERYTHING)
}

#[test]
fn the_whole_language_is_read() {
    let directory = directory();
    let config = everything(&directory);
    let relay = config.relay.as_ref().unwrap();
    let tls = relay.listeners[0].tls.as_ref().unwrap();
    assert_eq!(*tls.acme, ["other.example.org".into()]);
    assert_eq!(tls.min_version, super::super::tls::TlsVersion::V1_3);
    let clients = tls.clients.as_ref().unwrap();
    assert!(clients.required && clients.forward);
    assert_eq!(relay.listeners[1].https_redirect, Some(443));
    assert_eq!(relay.tunnel.listener.as_deref(), Some("https"));
    assert!(!relay.tunnel.tls.as_ref().unwrap().clients.as_ref().unwrap().required);
    let principal = &relay.credentials.principals[0];
    assert_eq!(principal.tokens[0].0[..2], [0x00, 0x11]);
    assert!(matches!(
        &*principal.certificates,
        [CertificatePattern::Uri(_), CertificatePattern::Dns(_), CertificatePattern::Uri(uri)]
            if uri.as_str() == "urn:shop"
    ));
    assert!(matches!(&relay.credentials.issuers[0].keys, Keys::Set(text) if **text == *KEYS));
    let Keys::Url { token_file, interval, .. } = &relay.credentials.issuers[1].keys else {
        panic!("a URL")
    };
    assert_eq!(*token_file, Some(directory.path().join("token")));
    assert_eq!(*interval, Duration::from_secs(300));
    assert_eq!(relay.acme.as_ref().unwrap().storage, directory.path().join("acme"));
    let sidecar = config.sidecar.as_ref().unwrap();
    assert_eq!(sidecar.token_file, Some(directory.path().join("token")));
    let Relays::Listed(relays) = &sidecar.relays else { panic!("a list") };
    let has_tls: Vec<bool> = relays.iter().map(|relay| relay.tls.is_some()).collect();
    assert_eq!(has_tls, [true, false, true, true, false]);
    let tls = relays[3].tls.as_ref().unwrap();
    assert_eq!(tls.server_name.as_deref(), Some("relay.internal"));
    assert!(tls.certificate.is_some());
    let versions: Vec<HttpVersion> =
        config.tunnels.iter().map(|tunnel| tunnel.http_version).collect();
    assert_eq!(versions, [HttpVersion::Auto, HttpVersion::Http1, HttpVersion::Http1]);
    assert_eq!(config.tunnels[1].tls.as_ref().unwrap().trust, Trust::Anybody);
    assert!(config.tunnels[2].tls.is_none());
    let hsts = config.routes[0].policies.as_ref().unwrap().hsts.unwrap();
    assert!(hsts.include_subdomains && !hsts.preload);
    assert_eq!(hsts.max_age, Duration::from_secs(3600));
}

#[test]
fn keys_and_hashes_are_never_shown() {
    let directory = directory();
    let config = everything(&directory);
    let key = fs::read_to_string(directory.path().join("good.key")).unwrap();
    let base64 = key.lines().nth(1).unwrap();
    let shown = config.to_masked_json();
    for text in [shown.to_string(), format!("{config:?}")] {
        for secret in [base64, "00112233", "0123456789abcdef", "c2VjcmV0"] {
            assert!(!text.contains(secret), "{secret} in {text}");
        }
    }
    let listener = &shown["relay"]["listeners"][0]["tls"]["certificates"][0];
    assert_eq!(listener["names"], json!(["shop.example.org"]));
    assert!(listener["cert"].as_str().unwrap().ends_with("/good.crt"));
    assert!(listener["not_after"].as_str().unwrap().ends_with(" GMT"));
    assert_eq!(shown["relay"]["credentials"][0]["tokens"], json!(["***"]));
    assert_eq!(shown["tunnels"][0]["service"], "https://localhost:8443");
    assert_eq!(shown["tunnels"][0]["http_version"], "auto");
}

#[test]
fn a_token_in_its_hashs_place_is_in_no_snippet() {
    let text = "version: 1\nrelay:\n  credentials:\n    - principal: a\n      tokens:\n        - s3cret-one\n        - s3cret-two\n";
    let report = bad(text).report();
    assert!(report.contains("tokens[1]") && !report.contains("s3cret"), "{report}");
}

#[test]
fn a_reload_takes_over_tls_and_credentials_and_waits_with_addresses() {
    let directory = directory();
    let old = everything(&directory);
    let change = |from: &str, to: &str| {
        assert!(EVERYTHING.contains(from), "{from}");
        let mut new = read(&directory, &EVERYTHING.replace(from, to));
        let held = hold_back(&mut new, &old);
        let changes = diff(&old, &new);
        (held, changes.relay, changes.sidecar, changes.listeners.changed.len())
    };
    let nothing: Vec<&str> = Vec::new();
    let table = [
        ("principal: shop", "principal: bank", vec![], vec!["relay.credentials"], vec![], 0),
        ("min_version: 1.3", "min_version: 1.2", vec![], vec![], vec![], 1),
        ("    listener: https\n", "", vec![], vec!["relay.tunnel.listener"], vec![], 0),
        (
            "    tls: { certificates: [{ cert: good.crt, key: good.key }], client_ca",
            "    tls: { acme: [x.example.org], client_ca",
            vec![],
            vec!["relay.tunnel.tls"],
            vec![],
            0,
        ),
        ("key_id: me", "key_id: you", vec![], vec!["relay.acme"], vec![], 0),
        (
            "    address: \"0.0.0.0:3\"",
            "    address: \"0.0.0.0:4\"",
            vec!["relay.tunnel.address"],
            vec![],
            vec![],
            0,
        ),
        (
            "  token_file: token\n",
            "  token: 0123456789abcdef\n",
            vec![],
            vec![],
            vec!["sidecar.token"],
            0,
        ),
        ("server_name: Relay", "server_name: other", vec![], vec![], vec!["sidecar.relays"], 0),
        ("127.0.0.1:2\", tls: {}", "127.0.0.1:2\"", vec![], vec![], vec!["sidecar.relays"], 0),
        ("10.0.0.6:1\", insecure: true", "10.0.0.6:1\"", vec!["sidecar.relays"], vec![], vec![], 0),
        ("    - 127.0.0.1:1\n", "", vec!["sidecar.relays"], vec![], vec![], 0),
    ];
    for (from, to, held, relay, sidecar, listeners) in table {
        assert_eq!(change(from, to), (held, relay, sidecar, listeners), "{from} → {to}");
    }
    assert_eq!(change("relay:", "relay:"), (nothing.clone(), nothing.clone(), nothing, 0));
}

/// The socket stays where it is until a restart: what the file says of another must not open it.
#[test]
fn an_address_that_stays_keeps_its_tls() {
    let directory = directory();
    let of = |tunnel: &str| {
        read(&directory, &format!("relay: {{ tunnel: {{ {tunnel}, token: 0123456789abcdef }} }}\n"))
    };
    let old =
        of("address: \"0.0.0.0:1\", tls: { certificates: [{ cert: good.crt, key: good.key }] }");
    let mut new = of("address: \"127.0.0.1:1\"");
    let held = hold_back(&mut new, &old);
    assert_eq!(held, ["relay.tunnel.address", "relay.tunnel.tls"]);
    let stays = old.relay.as_ref().unwrap().tunnel.clone();
    assert_eq!(new.relay.unwrap().tunnel, stays);

    let mut new = of("address: \"10.0.0.5:1\", insecure: true");
    assert_eq!(hold_back(&mut new, &old), held);
    assert_eq!(new.relay.unwrap().tunnel, stays, "plain is meant for another network");

    let shared = |client_ca: &str| {
        let text = format!(
            "relay:
  listeners: [{{ name: https, address: \"127.0.0.1:2\", tls: {{ certificates: [{{ cert: good.crt, key: good.key }}] }} }}]
  tunnel: {{ listener: https, token: 0123456789abcdef{client_ca} }}
"
        );
        read(&directory, &text)
    };
    for (client_ca, has_clients) in [("", false), (", tls: { client_ca: ca.pem }", true)] {
        let mut new = shared(client_ca);
        assert_eq!(hold_back(&mut new, &old), held);
        let tls = new.relay.unwrap().tunnel.tls.expect("TLS stays");
        assert_eq!(tls.certificates, stays.tls.as_ref().unwrap().certificates, "{client_ca}");
        assert_eq!(tls.clients.is_some(), has_clients, "sidecars at the listener show theirs");
    }
}

#[test]
fn authorities_that_are_none_are_warned_of() {
    let directory = directory();
    let path = directory.path();
    let issuer = |is_ca: rcgen::IsCa| {
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = is_ca;
        let key = rcgen::KeyPair::generate().unwrap();
        rcgen::CertifiedIssuer::self_signed(params, key).unwrap()
    };
    let ca = issuer(rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained));
    let mut params = rcgen::CertificateParams::new(vec!["a.example".to_owned()]).unwrap();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::CommonName, "relay");
    let end = params.signed_by(&rcgen::KeyPair::generate().unwrap(), &ca).unwrap();
    fs::write(path.join("authority.pem"), ca.pem()).unwrap();
    // Trusted for itself.
    fs::write(path.join("pinned.pem"), issuer(rcgen::IsCa::NoCa).pem()).unwrap();
    fs::write(path.join("end.pem"), format!("{}{}", ca.pem(), end.pem())).unwrap();
    for (name, is_warned) in [("authority", false), ("pinned", false), ("end", true)] {
        let text = format!(
            "sidecar: {{ relays: [{{ address: \"127.0.0.1:1\", tls: {{ ca: {name}.pem }} }}] }}\n"
        );
        let told = warnings(&directory, &text);
        assert_eq!(told.len(), usize::from(is_warned), "{told:?}");
        if let Some(told) = told.first() {
            let expected =
                "sidecar.relays[0].tls.ca: end.pem: certificate 2, of CN=relay, is no authority";
            assert!(told.starts_with(expected), "{told}");
        }
    }
}
