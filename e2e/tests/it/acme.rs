//! Certificates by ACME, from an authority that looks for each proof at the relay's own listeners.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Output;

use sidelane_e2e::client;
use sidelane_e2e::nobody::Nobody;
use sidelane_e2e::pebble::{Pebble, Rules};
use sidelane_e2e::process::{Setup, Sidelane};
use sidelane_e2e::service::Service;
use sidelane_e2e::stage::get;
use sidelane_e2e::tools::Curl;
use sidelane_e2e::wait;

const NAME: &str = "api.localhost";
const SUCCESS: &[&str] = &["result=\"success\""];
const FAILURE: &[&str] = &["result=\"failure\""];
const ORDERS: &str = "sidelane_acme_orders_total";
const EXPIRY: &str = "sidelane_acme_certificate_expiry_timestamp_seconds";

/// Where a relay takes clients.
#[derive(Clone, Copy)]
enum Listeners {
    /// By TLS alone.
    Tls,
    /// In plain, too, where it sends them on to TLS.
    Both,
}

/// Whom the relay asks, and where it keeps what it gets.
struct Section<'a> {
    directory: String,
    ca: Option<&'a Path>,
    storage: &'a Path,
    names: &'a str,
}

/// A relay and a sidecar whose relay shows certificates that it has to obtain.
fn yaml(service: &Service, listeners: Listeners, section: &Section<'_>) -> String {
    let Section { directory, ca, storage, names } = section;
    let ca = ca.map(|ca| format!(", ca: \"{}\"", ca.display())).unwrap_or_default();
    let mut text =
        format!("    - {{ name: web, address: \"127.0.0.1:0\", tls: {{ acme: [{names}] }} }}\n");
    if matches!(listeners, Listeners::Both) {
        text += "    - { name: plain, address: \"127.0.0.1:0\", https_redirect: 443 }\n";
    }
    text += &format!(
        "  acme: {{ directory: \"{directory}\", storage: \"{}\", accept_terms: true{ca} }}\n",
        storage.display()
    );
    let plain = "    - { name: web, address: \"127.0.0.1:0\" }\n";
    let setup = Setup::of(service.address()).both();
    assert!(setup.contains(plain), "{setup}");
    setup.replace(plain, &text)
}

/// Asks by TLS for `name`, and believes the authority alone.
fn ask(curl: &Curl, sidelane: &Sidelane, root: &Path, name: &str) -> Output {
    let url = format!("https://{name}/");
    curl.command(sidelane.web()).arg("--cacert").arg(root).arg(url).output().expect("curl starts")
}

/// Whether the service has answered.
fn is_ok(output: &Output) -> bool {
    output.status.success() && output.stdout == b"ok"
}

/// What is kept, of all authorities: files and their contents.
fn kept(storage: &Path) -> Vec<(PathBuf, String)> {
    let entries = |path: &Path| fs::read_dir(path).expect("it is there");
    let paths = entries(storage)
        .flat_map(|authority| entries(&authority.expect("readable").path()))
        .map(|entry| entry.expect("readable").path());
    paths.map(|path| (path.clone(), fs::read_to_string(path).expect("text"))).collect()
}

/// Nobody but the owner reads what is kept, and neither log nor pages say any of its secrets.
fn is_kept_secret(sidelane: &Sidelane, storage: &Path) {
    let mut secrets = Vec::new();
    for (path, text) in kept(storage) {
        let mode = fs::metadata(&path).expect("it is there").permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{}", path.display());
        if path.ends_with("account.json") {
            let account: serde_json::Value = serde_json::from_str(&text).expect("JSON");
            let key = account["credentials"]["key_pkcs8"].as_str();
            secrets.push(key.expect("the account's key").to_owned());
        } else if let Some((_, key)) = text.split_once("-----BEGIN PRIVATE KEY-----\n") {
            secrets.push(key.lines().next().expect("the key's first line").to_owned());
        }
    }
    assert_eq!(secrets.len(), 2, "the account's key and the certificate's");
    let pages = [
        sidelane.log(),
        sidelane.metrics(),
        sidelane.admin_page("/config").to_string(),
        sidelane.admin_page("/routes").to_string(),
    ];
    for page in pages {
        assert!(!page.contains("PRIVATE KEY"), "{page}");
        assert!(!secrets.iter().any(|secret| page.contains(secret.as_str())), "{page}");
    }
}

#[test]
fn a_name_is_proved_by_tls_once_the_authority_is_there_and_kept_for_the_next_start() {
    let test = "a_name_is_proved_by_tls_once_the_authority_is_there_and_kept_for_the_next_start";
    let Some(curl) = Curl::find(test) else { return };
    let service = Service::ok();
    let directory = tempfile::tempdir().unwrap();
    let (storage, root) = (directory.path().join("acme"), directory.path().join("root.pem"));

    // The authority cannot be reached: the relay runs, says so, and shows nothing.
    let nobody = Nobody::new();
    let unreachable = format!("https://{}/dir", nobody.address());
    let section = Section { directory: unreachable, ca: None, storage: &storage, names: NAME };
    let sidelane = Sidelane::start("sidelane", &yaml(&service, Listeners::Tls, &section));
    sidelane.until_metric(ORDERS, FAILURE, |failures| failures >= 1.0);
    let log = sidelane.log();
    for part in ["certificate not obtained", "step=account", "cannot connect to", "next_attempt_in"]
    {
        assert!(log.contains(part), "{part}: {log}");
    }
    let told = log.matches("no certificate yet").count();
    let refused = curl.run(sidelane.web(), ["--insecure", "https://api.localhost/"]);
    assert_eq!(refused.status.code(), Some(35), "a handshake that fails: {refused:?}");
    assert_eq!((told, sidelane.log().matches("no certificate yet").count()), (1, 1), "once a name");

    // It is there: an edit ends the delay.
    let rules = Rules { tls_port: sidelane.web().port(), ..Rules::default() };
    let Some(pebble) = Pebble::start(test, &rules) else { return };
    fs::write(&root, pebble.root()).unwrap();
    let ca = pebble.ca();
    let section = Section { directory: pebble.url(), ca: Some(&ca), ..section };
    let text = yaml(&service, Listeners::Tls, &section);
    sidelane.rewrite(&text);
    assert_eq!(sidelane.reload().0, 200);
    sidelane.until_metric(ORDERS, SUCCESS, |orders| orders == 1.0);
    let answer = ask(&curl, &sidelane, &root, NAME);
    assert!(is_ok(&answer), "{answer:?}");
    assert!(sidelane.log().contains("challenge=tls-alpn-01"), "{}", sidelane.log());
    assert!(sidelane.metric(EXPIRY, &[NAME]).unwrap() > 0.0);
    is_kept_secret(&sidelane, &storage);

    // A start finds it, with or without the authority.
    sidelane.kill();
    // Its authorities are a part of the configuration.
    let kept = directory.path().join("ca.pem");
    fs::copy(&ca, &kept).unwrap();
    drop(pebble);
    let text = text.replace(ca.to_str().unwrap(), kept.to_str().unwrap());
    let sidelane = Sidelane::start("sidelane again", &text);
    let answer = ask(&curl, &sidelane, &root, NAME);
    assert!(is_ok(&answer), "{answer:?}");
    assert_eq!(sidelane.metric(ORDERS, &[]), Some(0.0), "nothing was ordered");
}

#[test]
fn a_name_is_proved_by_http_before_the_redirect_and_leaves_with_a_reload() {
    let test = "a_name_is_proved_by_http_before_the_redirect_and_leaves_with_a_reload";
    let Some(curl) = Curl::find(test) else { return };
    let service = Service::ok();
    let directory = tempfile::tempdir().unwrap();
    let (storage, root) = (directory.path().join("acme"), directory.path().join("root.pem"));
    let nobody = Nobody::new();
    let unreachable = format!("https://{}/dir", nobody.address());
    let section = Section { directory: unreachable, ca: None, storage: &storage, names: NAME };
    let sidelane = Sidelane::start("sidelane", &yaml(&service, Listeners::Both, &section));
    let plain = sidelane.listener("plain");
    let rules =
        Rules { http_port: plain.port(), tls_port: sidelane.web().port(), ..Rules::default() };
    let Some(pebble) = Pebble::start(test, &rules) else { return };
    fs::write(&root, pebble.root()).unwrap();
    let ca = pebble.ca();
    let section = Section { directory: pebble.url(), ca: Some(&ca), ..section };
    sidelane.rewrite(&yaml(&service, Listeners::Both, &section));
    assert_eq!(sidelane.reload().0, 200);
    sidelane.until_metric(ORDERS, SUCCESS, |orders| orders == 1.0);
    assert!(sidelane.log().contains("challenge=http-01"), "{}", sidelane.log());
    let answer = ask(&curl, &sidelane, &root, NAME);
    assert!(is_ok(&answer), "{answer:?}");
    assert_eq!(client::request(plain, "GET", get("/")).head.status, 308);

    // Another name comes, the first goes.
    let section = Section { names: "other.localhost", ..section };
    sidelane.rewrite(&yaml(&service, Listeners::Both, &section));
    assert_eq!(sidelane.reload().0, 200);
    sidelane.until_metric(ORDERS, SUCCESS, |orders| orders == 2.0);
    let gone = ask(&curl, &sidelane, &root, NAME);
    assert_eq!(gone.status.code(), Some(35), "{gone:?}");
    assert_eq!(sidelane.metric(EXPIRY, &[NAME]), None);
    assert!(sidelane.metric(EXPIRY, &["other.localhost"]).is_some());
}

#[test]
fn a_certificate_is_renewed_before_it_ends_while_clients_come() {
    let test = "a_certificate_is_renewed_before_it_ends_while_clients_come";
    let Some(curl) = Curl::find(test) else { return };
    let service = Service::ok();
    let directory = tempfile::tempdir().unwrap();
    let storage = directory.path().join("acme");
    let nobody = Nobody::new();
    let unreachable = format!("https://{}/dir", nobody.address());
    let section = Section { directory: unreachable, ca: None, storage: &storage, names: NAME };
    let sidelane = Sidelane::start("sidelane", &yaml(&service, Listeners::Tls, &section));
    let rules = Rules { tls_port: sidelane.web().port(), validity_seconds: 15, ..Rules::default() };
    let Some(pebble) = Pebble::start(test, &rules) else { return };
    let ca = pebble.ca();
    let section = Section { directory: pebble.url(), ca: Some(&ca), ..section };
    sidelane.rewrite(&yaml(&service, Listeners::Tls, &section));
    assert_eq!(sidelane.reload().0, 200);
    sidelane.until_metric(ORDERS, SUCCESS, |orders| orders == 1.0);
    let first = sidelane.metric(EXPIRY, &[NAME]).unwrap();
    // When it ends is not asked: what is shown on a slow machine may have ended.
    let mut requests = 0;
    wait::until("a renewal", || {
        let answer = curl.run(sidelane.web(), ["--insecure", "https://api.localhost/"]);
        assert!(is_ok(&answer), "{answer:?}");
        requests += 1;
        (sidelane.metric(ORDERS, SUCCESS)? >= 2.0).then_some(())
    });
    assert!(requests > 1, "clients came while the first certificate was shown");
    assert!(sidelane.metric(EXPIRY, &[NAME]).unwrap() > first);
    assert!(is_ok(&curl.run(sidelane.web(), ["--insecure", "https://api.localhost/"])));
}
