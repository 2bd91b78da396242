//! TLS: what an end shows, whom it trusts, and where certificates are obtained.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use super::{Reader, Secret, one_of_keys, twice};
use crate::config::files::{Pair, PairFault};
use crate::config::raw::{Field, Section};
use crate::config::tls::{
    Acme, Authorities, Certificate, ClientCertificates, ClientTls, PEM_BYTES_MAX, PemFault,
    ServerTls, TlsVersion, Trust,
};
use crate::config::{tls, value};

pub(crate) const LISTENER_TLS_KEYS: &[&str] =
    &["certificates", "acme", "min_version", "client_certificates"];
pub(crate) const TUNNEL_TLS_KEYS: &[&str] = &["certificates", "acme", "min_version", "client_ca"];
pub(crate) const CERTIFICATES_KEYS: &[&str] = &["cert", "key", "directory"];
pub(crate) const CERTIFICATE_KEYS: &[&str] = &["cert", "key"];
pub(crate) const CLIENT_CERTIFICATES_KEYS: &[&str] = &["ca", "required", "forward"];
pub(crate) const RELAY_TLS_KEYS: &[&str] = &["ca", "server_name", "certificate"];
pub(crate) const SERVICE_TLS_KEYS: &[&str] =
    &["ca", "server_name", "certificate", "insecure_skip_verify"];
pub(crate) const ACME_KEYS: &[&str] =
    &["directory", "contacts", "storage", "ca", "external_account", "accept_terms"];
pub(crate) const EXTERNAL_ACCOUNT_KEYS: &[&str] = &["key_id", "key", "key_file", "key_env"];

/// Most certificates of one end, by files and by ACME each: all of them are held in memory, and names
/// are looked up in a table.
pub(crate) const CERTIFICATES_MAX: usize = 4096;

/// Most people whom an authority writes to.
pub(crate) const CONTACTS_MAX: usize = 16;

/// Where Let's Encrypt's directory is.
pub(crate) const ACME_DIRECTORY: &str = "https://acme-v02.api.letsencrypt.org/directory";

/// Longest URL, contact or key of an account.
const TEXT_BYTES_MAX: usize = 2048;

const CLIENT_CERTIFICATE_FORMS: &str = "accepted: {cert: FILE, key: FILE}";

impl Reader<'_> {
    /// Reads a listener's `tls`.
    pub(super) fn listener_tls(&mut self, field: &Field<'_>) -> Option<ServerTls> {
        let section = field.section(LISTENER_TLS_KEYS)?;
        let mut tls = self.shown(&section);
        if let Some(field) = section.field("client_certificates") {
            tls.clients = self.client_certificates(&field);
        }
        something_to_show(&section, &tls);
        Some(tls)
    }

    /// Reads `relay.tunnel.tls`; `is_shared`: what is shown is a listener's.
    pub(super) fn tunnel_tls(&mut self, field: &Field<'_>, is_shared: bool) -> Option<ServerTls> {
        let section = field.section(TUNNEL_TLS_KEYS)?;
        let mut tls = self.shown(&section);
        if let Some(field) = section.field("client_ca") {
            // Others may come with a token.
            tls.clients = self.authorities(&field).map(|authorities| ClientCertificates {
                authorities,
                required: false,
                forward: false,
            });
        }
        if is_shared {
            for key in ["certificates", "acme", "min_version"] {
                if let Some(field) = section.field(key) {
                    field.fail(
                        "has no effect: without `address` sidecars are shown the listener's \
                         certificates (accepted: client_ca alone, or `address` beside `listener`)",
                    );
                }
            }
            if ["certificates", "acme", "min_version", "client_ca"]
                .iter()
                .all(|key| section.field(key).is_none())
                && !section.has_unknown()
            {
                section.fail("says nothing (accepted: client_ca; or leave it out)");
            }
        } else {
            something_to_show(&section, &tls);
        }
        Some(tls)
    }

    fn shown(&mut self, section: &Section<'_>) -> ServerTls {
        let mut tls = ServerTls {
            certificates: Vec::new(),
            acme: Vec::new(),
            min_version: TlsVersion::default(),
            clients: None,
        };
        if let Some(field) = section.field("certificates") {
            for item in field.items().unwrap_or_default() {
                let read = self.certificates(&item);
                tls.certificates.extend(read);
            }
            if tls.certificates.len() > CERTIFICATES_MAX {
                field.fail(format!(
                    "has {} certificates (accepted: at most {CERTIFICATES_MAX})",
                    tls.certificates.len()
                ));
                tls.certificates.truncate(CERTIFICATES_MAX);
            }
        }
        section.set("acme", &mut tls.acme, acme_names);
        section.set("min_version", &mut tls.min_version, |f| {
            f.one_of(&[("1.2", TlsVersion::V1_2), ("1.3", TlsVersion::V1_3)])
        });
        tls
    }

    /// Reads one item of `certificates`.
    fn certificates(&mut self, field: &Field<'_>) -> Vec<Arc<Certificate>> {
        let Some(section) = field.section(CERTIFICATES_KEYS) else { return Vec::new() };
        if let Some(directory) = section.field("directory") {
            if section.field("cert").is_some() || section.field("key").is_some() {
                section.fail(
                    "has directory beside cert or key (accepted: {cert, key}, or {directory})",
                );
                return Vec::new();
            }
            return self.directory(&directory);
        }
        let forms = "accepted: {cert: FILE, key: FILE}, or {directory: PATH}";
        let Some((certificate, place)) = self.pair(&section, forms) else { return Vec::new() };
        if certificate.names.is_empty() {
            place.fail(no_names(&certificate.place));
        }
        self.lifetime(&place, &certificate);
        vec![certificate]
    }

    fn directory(&mut self, field: &Field<'_>) -> Vec<Arc<Certificate>> {
        let pairs = field.text().map(|path| self.files.read_directory(path));
        let pairs = match pairs {
            Some(Ok(pairs)) => pairs,
            Some(Err(message)) => {
                field.fail(message);
                return Vec::new();
            }
            None => return Vec::new(),
        };
        if pairs.is_empty() {
            field.fail(
                "holds no certificate (accepted: tls.crt and tls.key in it, as in a mounted Kubernetes \
                 secret, NAME.crt or NAME.pem with NAME.key or NAME-key.pem, or directories with these)",
            );
        }
        let mut certificates = Vec::new();
        for pair in pairs {
            let Pair { cert_path, key_path, cert, key } = &pair;
            match Certificate::from_pem(&cert_path.display().to_string(), cert, key) {
                Ok(certificate) => {
                    if certificate.names.is_empty() {
                        field.fail(no_names(&certificate.place));
                    }
                    self.lifetime(field, &certificate);
                    certificates.push(Arc::new(certificate));
                }
                Err(PemFault::Chain(message)) => {
                    field.fail(file_fault(cert_path, &message));
                }
                Err(PemFault::Key(message)) => field.fail(file_fault(key_path, &message)),
            }
        }
        certificates
    }

    /// Reads `cert` and `key`. Returns the field of `cert` as well.
    fn pair<'f>(
        &mut self,
        section: &Section<'f>,
        forms: &str,
    ) -> Option<(Arc<Certificate>, Field<'f>)> {
        let (cert, key) = match (section.field("cert"), section.field("key")) {
            (Some(cert), Some(key)) => (cert, key),
            (None, None) if section.has_unknown() => return None,
            (cert, key) => {
                let missing = match (&cert, &key) {
                    (None, Some(_)) => "`cert` is missing",
                    (Some(_), None) => "`key` is missing",
                    _ => "has no certificate",
                };
                if !section.has_unknown() {
                    section.fail(&format!("{missing} ({forms})"));
                }
                return None;
            }
        };
        let (cert_path, key_path) = (cert.text(), key.text());
        let pair = match self.files.read_pair(cert_path?, key_path?) {
            Ok(pair) => pair,
            Err(PairFault::Cert(message)) => {
                cert.fail(message);
                return None;
            }
            Err(PairFault::Key(message)) => {
                key.fail(message);
                return None;
            }
        };
        let place = pair.cert_path.display().to_string();
        match Certificate::from_pem(&place, &pair.cert, &pair.key) {
            Ok(certificate) => return Some((Arc::new(certificate), cert)),
            Err(PemFault::Chain(message)) => cert.fail(file_fault(&pair.cert_path, &message)),
            Err(PemFault::Key(message)) => key.fail(file_fault(&pair.key_path, &message)),
        }
        None
    }

    /// Warns of a certificate that is not valid now, or soon will not be.
    fn lifetime(&self, field: &Field<'_>, certificate: &Certificate) {
        let Certificate { place, not_before, not_after, .. } = certificate;
        if let Some(text) = tls::lifetime(self.now, *not_before, *not_after) {
            field.warn(format!("{place}: {text}"));
        }
    }

    /// Reads a file of certificates that are trusted.
    pub(super) fn authorities(&mut self, field: &Field<'_>) -> Option<Authorities> {
        let path = field.text()?;
        let text = match self.files.read_file(path, PEM_BYTES_MAX) {
            Ok(text) => text,
            Err(message) => {
                field.fail(message);
                return None;
            }
        };
        let full = self.files.path(path);
        match Authorities::from_pem(&full.display().to_string(), &text) {
            Ok(authorities) => {
                if let Some(which) = authorities.no_authority() {
                    field.warn(format!(
                        "{}: {which} is no authority (basicConstraints CA:TRUE is missing): nothing \
                         that it would have signed is believed; name the certificate of who signs",
                        full.display()
                    ));
                }
                Some(authorities)
            }
            Err(message) => {
                field.fail(file_fault(&full, &message));
                None
            }
        }
    }

    fn client_certificates(&mut self, field: &Field<'_>) -> Option<ClientCertificates> {
        let section = field.section(CLIENT_CERTIFICATES_KEYS)?;
        let ca = section.require("ca", "a PEM file of those who sign clients' certificates");
        let authorities = ca.and_then(|field| self.authorities(&field));
        let (mut required, mut forward) = (true, false);
        section.set("required", &mut required, Field::boolean);
        section.set("forward", &mut forward, Field::boolean);
        Some(ClientCertificates { authorities: authorities?, required, forward })
    }

    /// Reads the `tls` of an end that dials.
    pub(super) fn client_tls(
        &mut self,
        field: &Field<'_>,
        keys: &[&'static str],
    ) -> Option<ClientTls> {
        let section = field.section(keys)?;
        let mut tls = ClientTls::default();
        if let Some(field) = section.field("ca")
            && let Some(authorities) = self.authorities(&field)
        {
            tls.trust = Trust::Authorities(authorities);
        }
        section.set("server_name", &mut tls.server_name, |f| f.parse(value::host).map(Some));
        if let Some(field) = section.field("certificate")
            && let Some(section) = field.section(CERTIFICATE_KEYS)
            && let Some((certificate, place)) = self.pair(&section, CLIENT_CERTIFICATE_FORMS)
        {
            self.lifetime(&place, &certificate);
            tls.certificate = Some(certificate);
        }
        if let Some(field) = section.field("insecure_skip_verify")
            && field.boolean() == Some(true)
        {
            if section.field("ca").is_some() {
                field.fail("stands beside ca, which then has no effect (accepted: one of the two)");
            } else {
                field.warn("whoever answers at the address is believed to be the service");
            }
            tls.trust = Trust::Anybody;
        }
        Some(tls)
    }

    pub(super) fn acme(&mut self, field: &Field<'_>) -> Option<Acme> {
        let section = field.section(ACME_KEYS)?;
        let mut directory: Arc<str> = ACME_DIRECTORY.into();
        section.set("directory", &mut directory, |f| f.parse(https_url));
        let mut contacts = Vec::new();
        section.set("contacts", &mut contacts, |field| {
            let contacts = field.list_of(|item| item.parse(contact))?;
            twice(field, &contacts);
            if contacts.len() > CONTACTS_MAX {
                field.fail(format!(
                    "has {} contacts (accepted: at most {CONTACTS_MAX})",
                    contacts.len()
                ));
            }
            Some(contacts)
        });
        let storage = section
            .require("storage", "a directory for the account's key and the certificates")
            .and_then(|f| {
                f.parse(|text| {
                    if text.is_empty() {
                        Err("is empty (accepted: a directory)".to_owned())
                    } else {
                        Ok(text.to_owned())
                    }
                })
            })
            .map(|path| self.files.path(&path));
        let mut trust = Trust::System;
        if let Some(field) = section.field("ca")
            && let Some(authorities) = self.authorities(&field)
        {
            trust = Trust::Authorities(authorities);
        }
        let mut external_account = None;
        if let Some(field) = section.field("external_account") {
            external_account = self.external_account(&field);
        }
        let terms = section
            .require("accept_terms", "true, where you agree to the authority's terms of service");
        if let Some(field) = terms
            && field.boolean() == Some(false)
        {
            field.fail(
                "no authority gives certificates without (accepted: true, where you agree to its terms \
                 of service)",
            );
        }
        Some(Acme { directory, contacts, storage: storage?, trust, external_account })
    }

    fn external_account(&mut self, field: &Field<'_>) -> Option<(Arc<str>, Secret)> {
        let section = field.section(EXTERNAL_ACCOUNT_KEYS)?;
        let key_id = section.require("key_id", "text that the authority gave").and_then(|f| {
            f.parse(|text| {
                visible(text).ok_or_else(|| {
                    format!("\"{text}\" is not a key's id (accepted: visible characters)")
                })
            })
        });
        let keys = ["key", "key_file", "key_env"];
        let Some((field, text)) = self.secret(&section, keys)? else {
            section.fail("has no key (accepted: one of key, key_file, key_env)");
            return None;
        };
        let base64 = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'=');
        if text.is_empty() || text.len() > TEXT_BYTES_MAX || !text.bytes().all(base64) {
            field.fail("is not a key (accepted: base64url, as the authority gave it)");
            return None;
        }
        Some((key_id?, Secret::new(&text)))
    }

    /// Reads one of three keys of a secret: as it is, in a file, in a variable. `None`: a fault was told;
    /// `Some(None)`: none of the three is there.
    pub(super) fn secret<'f>(
        &mut self,
        section: &Section<'f>,
        keys: [&'static str; 3],
    ) -> Option<Option<(Field<'f>, String)>> {
        let Some(key) = one_of_keys(section, &keys)? else { return Some(None) };
        let field = section.field(key)?;
        let text = if key == keys[0] {
            field.secret().map(str::to_owned)
        } else if key == keys[1] {
            field.text().and_then(|path| {
                let text = self.files.read_secret(path);
                text.map_err(|message| field.fail(message)).ok()
            })
        } else {
            field.text().and_then(|name| {
                let text = (self.env)(name);
                if text.is_none() {
                    field.fail(format!(
                        "environment variable {name} is not set (accepted: one that is)"
                    ));
                }
                text
            })
        };
        Some(Some((field, text?)))
    }
}

fn something_to_show(section: &Section<'_>, tls: &ServerTls) {
    // What is faulty is told already.
    let is_given = |key: &str| section.field(key).is_some_and(|field| !field.is_empty());
    if tls.certificates.is_empty()
        && tls.acme.is_empty()
        && !is_given("certificates")
        && !is_given("acme")
        && !section.has_unknown()
    {
        section.fail(
            "has no certificate to show (accepted: one or more in `certificates`, or names in `acme`)",
        );
    }
}

fn no_names(place: &str) -> String {
    format!(
        "{place}: the certificate has no subjectAltName, so it is for no host (accepted: one with DNS names \
         or IP addresses)"
    )
}

fn file_fault(path: &Path, message: &str) -> String {
    format!("{}: {message}", path.display())
}

/// Names that an authority makes sure of by asking this relay, which it cannot for a wildcard.
fn acme_names(field: &Field<'_>) -> Option<Vec<Arc<str>>> {
    let names = field.list_of(|item| {
        item.parse(|text| {
            if text.starts_with('*') {
                return Err(format!(
                    "\"{text}\" is a wildcard, which needs a proof in the DNS that Sidelane cannot give \
                     (accepted: whole names; a wildcard's certificate goes to `certificates`)"
                ));
            }
            let name = value::host(text)?;
            if name.parse::<IpAddr>().is_ok() || !name.contains('.') {
                return Err(format!(
                    "\"{text}\" is no name that an authority can look up (accepted: names with a dot, as \
                     in shop.example.org)"
                ));
            }
            Ok(name)
        })
    })?;
    twice(field, &names);
    if names.len() > CERTIFICATES_MAX {
        field.fail(format!("has {} names (accepted: at most {CERTIFICATES_MAX})", names.len()));
    }
    Some(names)
}

fn visible(text: &str) -> Option<Arc<str>> {
    let is_good = (1..=TEXT_BYTES_MAX).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_graphic());
    is_good.then(|| text.into())
}

/// Parses `https://host…`.
fn https_url(text: &str) -> Result<Arc<str>, String> {
    match url(text, "https://…")? {
        Some((url, false)) => Ok(url),
        _ => Err(format!(
            "\"{text}\" can be read and changed by anybody on the way (accepted: https://…)"
        )),
    }
}

/// Parses `https://host…`, or `http://…` of this machine.
pub(super) fn https_or_loopback_url(text: &str) -> Result<Arc<str>, String> {
    let accepted = "https://…; http://… on a loopback address";
    match url(text, accepted)? {
        Some((url, _)) => Ok(url),
        None => Err(format!(
            "\"{text}\" can be read and changed by anybody on the way (accepted: {accepted})"
        )),
    }
}

/// Returns the URL and whether it is plain; `None`: it is plain and of another machine.
fn url(text: &str, accepted: &str) -> Result<Option<(Arc<str>, bool)>, String> {
    let bad = || format!("\"{text}\" is not a URL (accepted: {accepted})");
    let url = visible(text).ok_or_else(bad)?;
    let uri: http::Uri = text.parse().map_err(|_| bad())?;
    let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
        return Err(bad());
    };
    if authority.as_str().contains('@') || text.contains('#') {
        return Err(bad());
    }
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    let is_loopback =
        host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    match scheme {
        "https" => Ok(Some((url, false))),
        "http" if is_loopback => Ok(Some((url, true))),
        "http" => Ok(None),
        _ => Err(bad()),
    }
}

fn contact(text: &str) -> Result<Arc<str>, String> {
    let hint = if text.contains('@') && !text.contains(':') {
        format!("; did you mean \"mailto:{text}\"?")
    } else {
        String::new()
    };
    visible(text)
        .filter(|text| {
            text.strip_prefix("mailto:").is_some_and(|address| {
                address
                    .split_once('@')
                    .is_some_and(|(name, host)| !name.is_empty() && value::host(host).is_ok())
            })
        })
        .ok_or_else(|| {
            format!(
                "\"{text}\" is not a contact (accepted: mailto: and an address, as in \
                 mailto:ops@example.org){hint}"
            )
        })
}
