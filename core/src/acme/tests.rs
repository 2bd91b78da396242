//! Against Pebble, which looks for each proof; the listeners are the test's own.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use rustls::ClientConfig;
use rustls::pki_types::{CertificateDer, ServerName};
use sidelane_e2e::pebble::{Pebble, Rules};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;
use crate::config::Secret;
use crate::config::tls::{Authorities, Certificate, ClientTls, ServerTls, TlsVersion, Trust};
use crate::tls::{ACME_ALPN, HTTP1_ALPN, Resolver, client_config, server_config};

const NAME: &str = "shop.example.org";
const OTHER: &str = "other.example.org";

/// A storage, and two listeners that show what is issued.
struct Rig {
    directory: tempfile::TempDir,
    issued: Arc<Issued>,
    metrics: Arc<Metrics>,
    http: SocketAddr,
    tls: SocketAddr,
}

/// Certificates by ACME as a process has them.
struct Kept {
    acme: Acme,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Rig {
    /// Shows what is issued for `names`; without `answers` HTTP-01 cannot succeed.
    async fn new(names: &[&str], answers: bool) -> Self {
        let issued = Arc::new(Issued::default());
        let http = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let tls = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let rig = Self {
            directory: tempfile::tempdir().unwrap(),
            issued: Arc::clone(&issued),
            metrics: Arc::new(Metrics::new()),
            http: http.local_addr().unwrap(),
            tls: tls.local_addr().unwrap(),
        };
        let own = ServerTls {
            certificates: Vec::new(),
            acme: names.iter().map(|name| (*name).into()).collect(),
            min_version: TlsVersion::V1_2,
            clients: None,
        };
        let resolver = Arc::new(Resolver::new(&own, Arc::clone(&issued)).unwrap());
        let config = server_config(&own, resolver, &[HTTP1_ALPN, ACME_ALPN]).unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        tokio::spawn(async move {
            while let Ok((stream, _)) = tls.accept().await {
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    let mut stream = acceptor.accept(stream).await?;
                    stream.shutdown().await
                });
            }
        });
        tokio::spawn(async move {
            while let Ok((stream, _)) = http.accept().await {
                tokio::spawn(answer(stream, answers.then(|| Arc::clone(&issued))));
            }
        });
        rig
    }

    fn rules(&self) -> Rules {
        Rules { http_port: self.http.port(), tls_port: self.tls.port(), ..Rules::default() }
    }

    fn settings(&self, pebble: &Pebble, names: &[(&str, &[Kind])]) -> Settings {
        let ca = fs::read_to_string(pebble.ca()).unwrap();
        Settings {
            acme: tls::Acme {
                directory: pebble.url().into(),
                contacts: vec!["mailto:ops@example.org".into()],
                storage: self.directory.path().join("acme"),
                trust: Trust::Authorities(Authorities::from_pem("ca.pem", &ca).unwrap()),
                external_account: None,
            },
            names: names
                .iter()
                .map(|(name, kinds)| Wanted { name: (*name).into(), kinds: kinds.to_vec() })
                .collect(),
        }
    }

    fn keep(&self, settings: Settings) -> Kept {
        let acme = Acme::new(Arc::clone(&self.issued), Arc::clone(&self.metrics));
        acme.want(Some(settings));
        let task = tokio::spawn(acme.keep());
        Kept { acme, task }
    }

    /// The certificate that a client is shown; `None`: the handshake fails.
    async fn shown(&self, name: &str) -> Option<CertificateDer<'static>> {
        let tls = ClientTls { trust: Trust::Anybody, ..ClientTls::default() };
        let config: ClientConfig = client_config(&tls, &[HTTP1_ALPN]).unwrap();
        let stream = TcpStream::connect(self.tls).await.unwrap();
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.ok()?;
        Some(stream.get_ref().1.peer_certificates()?[0].clone().into_owned())
    }

    fn metric(&self, row: &str) -> u64 {
        let mut text = String::new();
        self.metrics.encode(&mut text);
        let value = text.lines().find_map(|line| line.strip_prefix(row)?.strip_prefix(' '));
        value.map_or(0, |value| value.parse().unwrap())
    }

    fn succeeded(&self) -> u64 {
        self.metric("sidelane_acme_orders_total{result=\"success\"}")
    }

    fn failed(&self) -> u64 {
        self.metric("sidelane_acme_orders_total{result=\"failure\"}")
    }

    fn stored(&self, file: &str) -> PathBuf {
        let mut authorities = fs::read_dir(self.directory.path().join("acme")).unwrap();
        authorities.next().unwrap().unwrap().path().join(file)
    }
}

/// Answers one request as the relay's plain listeners do.
async fn answer(mut stream: TcpStream, issued: Option<Arc<Issued>>) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let path = head.split(' ').nth(1).unwrap_or_default();
    let token = path.strip_prefix("/.well-known/acme-challenge/").unwrap_or_default();
    let answer = issued.and_then(|issued| issued.answers.load().get(token).cloned());
    let (status, body) = answer.map_or_else(|| (404, "".into()), |answer| (200, answer));
    let length = body.len();
    let text = format!(
        "HTTP/1.1 {status} X\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    );
    stream.write_all(text.as_bytes()).await?;
    stream.shutdown().await
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A certificate of our own making, and when it ends.
fn certificate(name: &str, from: Duration, to: Duration) -> (String, String) {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
    params.not_before = (SystemTime::now() - from).into();
    params.not_after = (SystemTime::now() + to).into();
    (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
}

const DAY: Duration = Duration::from_secs(24 * 3600);

#[tokio::test]
async fn each_kind_of_challenge_proves_a_name() {
    let names = ["by-tls.example.org", "by-http.example.org"];
    let rig = Rig::new(&names, true).await;
    let test = "each_kind_of_challenge_proves_a_name";
    let Some(pebble) = Pebble::start(test, &rig.rules()) else { return };
    let wanted = [(names[0], &[Kind::TlsAlpn][..]), (names[1], &[Kind::Http][..])];
    assert_eq!(rig.shown(names[0]).await, None, "nothing is there yet");
    let _kept = rig.keep(rig.settings(&pebble, &wanted));
    until("two certificates", || rig.succeeded() == 2).await;
    assert_eq!(rig.failed(), 0);
    for name in names {
        let shown = rig.shown(name).await.unwrap();
        assert_eq!(rig.issued.certificates.load()[name].cert[0], shown);
        let row = format!("sidelane_acme_certificate_expiry_timestamp_seconds{{name=\"{name}\"}}");
        assert!(rig.metric(&row) > 0);
    }
    assert_eq!(rig.shown(OTHER).await, None, "nobody else's name is answered");
    // What proved the names is gone.
    assert!(rig.issued.answers.load().is_empty() && rig.issued.challenges.load().is_empty());
}

#[tokio::test]
async fn the_other_kind_is_tried_where_the_first_fails() {
    let rig = Rig::new(&[NAME], false).await;
    let test = "the_other_kind_is_tried_where_the_first_fails";
    let Some(pebble) = Pebble::start(test, &rig.rules()) else { return };
    let _kept = rig.keep(rig.settings(&pebble, &[(NAME, &[Kind::Http, Kind::TlsAlpn])]));
    until("a certificate", || rig.succeeded() == 1).await;
    assert_eq!(rig.failed(), 1);
    assert!(rig.shown(NAME).await.is_some());
}

#[tokio::test]
async fn a_start_finds_what_the_last_one_obtained() {
    let rig = Rig::new(&[NAME], true).await;
    let test = "a_start_finds_what_the_last_one_obtained";
    let Some(pebble) = Pebble::start(test, &rig.rules()) else { return };
    let kept = rig.keep(rig.settings(&pebble, &[(NAME, &[Kind::TlsAlpn])]));
    until("a certificate", || rig.succeeded() == 1).await;
    let first = rig.shown(NAME).await.unwrap();
    drop(kept);
    rig.issued.certificates.store(Arc::default());

    let again = Rig { metrics: Arc::new(Metrics::new()), ..rig };
    let kept = again.keep(again.settings(&pebble, &[(NAME, &[Kind::TlsAlpn])]));
    assert_eq!(again.shown(NAME).await.unwrap(), first, "before anything was asked");
    // Another name is ordered by the account that is kept.
    let both = [(NAME, &[Kind::TlsAlpn][..]), (OTHER, &[Kind::Http])];
    kept.acme.want(Some(again.settings(&pebble, &both)));
    until("another certificate", || again.succeeded() == 1).await;
    assert_eq!(again.shown(NAME).await.unwrap(), first);
    assert_eq!(pebble.log().matches("Issued certificate").count(), 2, "{}", pebble.log());
    assert_eq!(pebble.log().matches("There are now 1 accounts in memory").count(), 1);
    assert!(!pebble.log().contains("There are now 2 accounts in memory"));
}

#[tokio::test]
async fn a_certificate_that_ends_soon_is_shown_and_replaced() {
    let rig = Rig::new(&[NAME], true).await;
    let test = "a_certificate_that_ends_soon_is_shown_and_replaced";
    let Some(pebble) = Pebble::start(test, &rig.rules()) else { return };
    let settings = rig.settings(&pebble, &[(NAME, &[Kind::Http])]);
    let storage = Storage::of(&settings.acme);
    storage.prepare().unwrap();
    let (chain, key) = certificate(NAME, 80 * DAY, 10 * DAY);
    storage.keep_certificate(NAME, &chain, &key).unwrap();
    let old = Certificate::from_pem("old", &chain, &key).unwrap();

    let acme = Acme::new(Arc::clone(&rig.issued), Arc::clone(&rig.metrics));
    acme.want(Some(settings));
    assert_eq!(rig.shown(NAME).await.unwrap(), old.chain[0]);
    let _kept = Kept { task: tokio::spawn(acme.keep()), acme };
    until("a new certificate", || rig.succeeded() == 1).await;
    assert_ne!(rig.shown(NAME).await.unwrap(), old.chain[0]);
    assert!(storage.certificate(NAME).unwrap().unwrap().not_after > old.not_after);
}

#[tokio::test]
async fn what_is_damaged_in_storage_is_obtained_anew() {
    let rig = Rig::new(&[NAME], true).await;
    let test = "what_is_damaged_in_storage_is_obtained_anew";
    let Some(pebble) = Pebble::start(test, &rig.rules()) else { return };
    let settings = rig.settings(&pebble, &[(NAME, &[Kind::Http])]);
    Storage::of(&settings.acme).prepare().unwrap();
    fs::write(rig.stored("account.json"), "{").unwrap();
    fs::write(rig.stored(&format!("{NAME}.pem")), "no PEM").unwrap();
    let _kept = rig.keep(settings);
    until("a certificate", || rig.succeeded() == 1).await;
    assert_eq!(rig.failed(), 0);
    assert!(rig.stored("account.json.unusable").exists());
}

#[tokio::test]
async fn an_account_that_the_authority_has_forgotten_is_made_anew() {
    let rig = Rig::new(&[NAME, OTHER], true).await;
    let test = "an_account_that_the_authority_has_forgotten_is_made_anew";
    let Some(pebble) = Pebble::start(test, &rig.rules()) else { return };
    let kept = rig.keep(rig.settings(&pebble, &[(NAME, &[Kind::Http])]));
    until("a certificate", || rig.succeeded() == 1).await;
    drop(kept);
    let path = rig.stored("account.json");
    let mut account: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let id = account["credentials"]["id"].as_str().unwrap();
    account["credentials"]["id"] = format!("{id}0").into();
    fs::write(&path, account.to_string()).unwrap();
    let both = [(NAME, &[Kind::Http][..]), (OTHER, &[Kind::Http])];
    let _kept = rig.keep(rig.settings(&pebble, &both));
    until("another certificate", || rig.succeeded() == 2).await;
    assert_eq!(rig.failed(), 0);
}

#[tokio::test]
async fn contacts_follow_the_configuration() {
    let rig = Rig::new(&[NAME, OTHER], true).await;
    let Some(pebble) = Pebble::start("contacts_follow_the_configuration", &rig.rules()) else {
        return;
    };
    let kept = rig.keep(rig.settings(&pebble, &[(NAME, &[Kind::Http])]));
    until("a certificate", || rig.succeeded() == 1).await;
    let both = [(NAME, &[Kind::Http][..]), (OTHER, &[Kind::Http])];
    let mut settings = rig.settings(&pebble, &both);
    settings.acme.contacts = vec!["mailto:other@example.org".into()];
    kept.acme.want(Some(settings));
    until("another certificate", || rig.succeeded() == 2).await;
    let account = fs::read_to_string(rig.stored("account.json")).unwrap();
    assert!(account.contains("other@example.org") && !account.contains("ops@"), "{account}");
}

#[tokio::test]
async fn accounts_are_bound_to_external_ones() {
    let rig = Rig::new(&[NAME], true).await;
    let key = "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W";
    let rules = Rules { external_account: Some(("kid-1", key)), ..rig.rules() };
    let Some(pebble) = Pebble::start("accounts_are_bound_to_external_ones", &rules) else { return };
    let settings = |key: Option<&str>| {
        let mut settings = rig.settings(&pebble, &[(NAME, &[Kind::Http])]);
        settings.acme.external_account = key.map(|key| ("kid-1".into(), Secret::new(key)));
        settings
    };
    let kept = rig.keep(settings(None));
    until("a refusal", || rig.failed() == 1).await;
    kept.acme.want(Some(settings(Some("d3Jvbmc"))));
    until("another refusal", || rig.failed() == 2).await;
    kept.acme.want(Some(settings(Some(key))));
    until("a certificate", || rig.succeeded() == 1).await;
}

#[tokio::test]
async fn names_come_and_go_while_it_runs() {
    let rig = Rig::new(&[NAME, OTHER], true).await;
    let Some(pebble) = Pebble::start("names_come_and_go_while_it_runs", &rig.rules()) else {
        return;
    };
    let kept = rig.keep(rig.settings(&pebble, &[(NAME, &[Kind::TlsAlpn])]));
    until("a certificate", || rig.succeeded() == 1).await;
    kept.acme.want(Some(rig.settings(&pebble, &[(OTHER, &[Kind::TlsAlpn])])));
    assert_eq!(rig.shown(NAME).await, None);
    let row =
        |name| format!("sidelane_acme_certificate_expiry_timestamp_seconds{{name=\"{name}\"}}");
    assert_eq!(rig.metric(&row(NAME)), 0);
    until("the other certificate", || rig.succeeded() == 2).await;
    assert!(rig.shown(OTHER).await.is_some());
    // It comes back from storage at once.
    let both = [(NAME, &[Kind::TlsAlpn][..]), (OTHER, &[Kind::TlsAlpn])];
    kept.acme.want(Some(rig.settings(&pebble, &both)));
    assert!(rig.shown(NAME).await.is_some() && rig.shown(OTHER).await.is_some());
    // Nothing is wanted any more.
    kept.acme.want(None);
    assert_eq!(rig.shown(NAME).await, None);
    assert_eq!(rig.succeeded(), 2);
}

#[tokio::test]
async fn another_authority_signs_anew_while_the_first_certificate_is_shown() {
    let rig = Rig::new(&[NAME], true).await;
    let test = "another_authority_signs_anew_while_the_first_certificate_is_shown";
    let Some(first) = Pebble::start(test, &rig.rules()) else { return };
    let Some(second) = Pebble::start(test, &rig.rules()) else { return };
    let kept = rig.keep(rig.settings(&first, &[(NAME, &[Kind::Http])]));
    until("a certificate", || rig.succeeded() == 1).await;
    let old = rig.shown(NAME).await.unwrap();
    kept.acme.want(Some(rig.settings(&second, &[(NAME, &[Kind::Http])])));
    assert!(rig.shown(NAME).await.is_some());
    until("another certificate", || rig.succeeded() == 2).await;
    assert_ne!(rig.shown(NAME).await.unwrap(), old);
}

#[tokio::test]
async fn two_that_share_a_storage_order_once() {
    let rig = Rig::new(&[NAME], true).await;
    let Some(pebble) = Pebble::start("two_that_share_a_storage_order_once", &rig.rules()) else {
        return;
    };
    let settings = || rig.settings(&pebble, &[(NAME, &[Kind::Http])]);
    let storage = Storage::of(&settings().acme);
    storage.prepare().unwrap();
    let lock = storage.lock(NAME).unwrap().unwrap();
    let kept = rig.keep(settings());
    until("it finds the lock taken", || rig.failed() == 1).await;
    // The other has written what it got, and let go.
    let (chain, key) = certificate(NAME, DAY, 80 * DAY);
    storage.keep_certificate(NAME, &chain, &key).unwrap();
    drop(lock);
    // Any change of the section ends the delay.
    let mut changed = settings();
    changed.acme.contacts.clear();
    kept.acme.want(Some(changed));
    until("it finds the certificate", || !rig.issued.certificates.load().is_empty()).await;
    assert_eq!((rig.succeeded(), rig.failed()), (0, 1));
}

/// What a relay with these listeners, and this tunnel, wants: names and the ways to prove them.
fn wanted(listeners: &str, tunnel: &str) -> Vec<(String, Vec<Kind>)> {
    let text = format!(
        "version: 1\nrelay:\n  listeners: [{listeners}]\n  base_domains: [example.org]\n  \
         tunnel: {{ address: \"127.0.0.1:9081\"{tunnel} }}\n  \
         acme: {{ storage: /var/lib/acme, accept_terms: true }}\n\
         plugins: {{ libraries: [{{ name: http, library: ./libsidelane_http.so }}] }}\n"
    );
    let source = config::Source::from_text(std::path::Path::new("/test.yaml"), &text);
    let config = config::parse(&source, &|_| None).unwrap_or_else(|errors| panic!("{errors}"));
    let settings = Settings::of(config.relay.as_ref().unwrap());
    let names = settings.into_iter().flat_map(|settings| settings.names);
    names.map(|wanted| (wanted.name.to_string(), wanted.kinds)).collect()
}

#[test]
fn names_come_of_all_ends_once_and_are_proved_where_somebody_answers() {
    const HIGH: &str =
        r#"{ name: a, address: "0.0.0.0:8443", tls: { acme: [a.example, b.example] } }"#;
    const AT_PORT: &str = r#"{ name: b, address: "0.0.0.0:443", tls: { acme: [b.example] } }"#;
    const PLAIN: &str = r#"{ name: c, address: "0.0.0.0:80" }"#;
    const LINES: &str = r#"{ name: d, address: "0.0.0.0:7000", protocol_type: LINE }"#;
    const TUNNEL: &str = ", tls: { acme: [a.example, t.example] }";
    let (tls, http) = (Kind::TlsAlpn, Kind::Http);
    let cases = [
        (PLAIN.to_owned(), "", vec![]),
        (HIGH.to_owned(), "", vec![("a.example", vec![tls]), ("b.example", vec![tls])]),
        (
            format!("{HIGH}, {AT_PORT}, {PLAIN}"),
            "",
            vec![("a.example", vec![http, tls]), ("b.example", vec![tls, http])],
        ),
        (format!("{AT_PORT}, {LINES}"), "", vec![("b.example", vec![tls])]),
        (
            format!("{AT_PORT}, {PLAIN}"),
            TUNNEL,
            vec![
                ("b.example", vec![tls, http]),
                ("a.example", vec![http, tls]),
                ("t.example", vec![http, tls]),
            ],
        ),
    ];
    for (listeners, tunnel, expected) in cases {
        let found = wanted(&listeners, tunnel);
        let found: Vec<_> = found.iter().map(|(name, kinds)| (&**name, kinds.clone())).collect();
        assert_eq!(found, expected, "{listeners} {tunnel}");
    }
}

#[tokio::test]
async fn a_failure_says_which_step_and_what_the_authority_said() {
    let test = "a_failure_says_which_step_and_what_the_authority_said";
    // Nothing is issued for the names that the listeners of this rig show: no proof is seen.
    let rig = Rig::new(&[NAME], false).await;
    let nobody = sidelane_e2e::nobody::Nobody::new();
    let Some(pebble) = Pebble::start(test, &rig.rules()) else { return };
    let port = nobody.address().port();
    let deaf = Rules { http_port: port, tls_port: port, ..Rules::default() };
    let Some(deaf) = Pebble::start(test, &deaf) else { return };
    let acme = |pebble: &Pebble| rig.settings(pebble, &[]).acme;
    let gone: Arc<str> = format!("https://{}/dir", nobody.address()).into();
    let elsewhere: Arc<str> = format!("{}/nowhere", pebble.url()).into();
    let file = rig.directory.path().join("file");
    fs::write(&file, "").unwrap();
    let cases = [
        (
            tls::Acme { directory: gone, ..acme(&pebble) },
            Kind::Http,
            Step::Account,
            "cannot connect to ",
        ),
        (
            tls::Acme {
                trust: Trust::Authorities(
                    Authorities::from_pem("other.pem", &fs::read_to_string(deaf.ca()).unwrap())
                        .unwrap(),
                ),
                ..acme(&pebble)
            },
            Kind::Http,
            Step::Account,
            "invalid peer certificate: ",
        ),
        (
            tls::Acme { directory: elsewhere, ..acme(&pebble) },
            Kind::Http,
            Step::Account,
            " answers 404 Not Found, and does not say why",
        ),
        (
            tls::Acme { storage: file, ..acme(&pebble) },
            Kind::Http,
            Step::Storage,
            "cannot make the directory ",
        ),
        (acme(&pebble), Kind::Http, Step::Challenge, "urn:ietf:params:acme:error:unauthorized"),
        (acme(&deaf), Kind::Http, Step::Challenge, "urn:ietf:params:acme:error:connection"),
        (acme(&deaf), Kind::TlsAlpn, Step::Challenge, "Failed to connect to 127.0.0.1:"),
    ];
    for (acme, kind, step, expected) in cases {
        let settings = Settings { acme, names: Vec::new() };
        let met = Arc::new(Met::new(&settings, &rig.issued).unwrap());
        let outcome = Authority::obtain(met, NAME.into(), kind, None).await;
        let Err(failure) = outcome else { panic!("no failure: {expected}") };
        assert_eq!(failure.step, step, "{failure:?}");
        assert!(failure.reason.contains(expected), "{failure:?} ({expected})");
        assert_eq!(
            failure.is_of_authority,
            step == Step::Account,
            "{failure:?}: others need not try"
        );
    }
    assert!(rig.issued.answers.load().is_empty() && rig.issued.challenges.load().is_empty());
}
