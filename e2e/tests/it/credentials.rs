//! Sidecars as principals: each has its own names and no other's, and what is withdrawn ends at once.

use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use serde_json::Value;
use sidelane_e2e::client::{Client, request};
use sidelane_e2e::process::{Route, Setup, Sidelane};
use sidelane_e2e::service::Service;
use sidelane_e2e::signer::{Authority, Signer, token_hash};
use sidelane_e2e::wait;

const SHOP: &str = "shop-token-of-sixteen-bytes";
const BANK: &str = "bank-token-of-sixteen-bytes";

/// Bytes of a download; the second half comes once it is let go.
const PART: &[u8] = &[b'.'; 256 * 1024];

fn get(host: &str, path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: {host}.localhost\r\n\r\n")
}

fn status(relay: &Sidelane, host: &str) -> u16 {
    request(relay.web(), "GET", get(host, "/")).head.status
}

fn until_status(relay: &Sidelane, host: &str, expected: u16) {
    wait::until(&format!("{expected} of {host}"), || {
        (status(relay, host) == expected).then_some(())
    });
}

/// A relay's file with more in its section.
fn relay(more: &str) -> String {
    let yaml = Setup::of(([127, 0, 0, 1], 1).into()).relay();
    yaml.replacen("relay:\n", &format!("relay:\n{more}"), 1)
}

/// Principals by token, who may claim the names of theirs.
fn principals(all: &[(&str, &str, &str)]) -> String {
    let mut yaml = "  credentials:\n".to_owned();
    for (name, token, names) in all {
        let hash = token_hash(token);
        yaml += &format!(
            "    - {{ principal: {name}, tokens: [\"{hash}\"], subdomains: [{names}], tunnels: [{name}] }}\n"
        );
    }
    yaml
}

/// A sidecar's file, with one tunnel and routes of these subdomains.
fn sidecar(tunnel: &str, service: &Service, subdomains: &[&str]) -> Setup {
    let mut setup = Setup::of(service.address());
    setup.tunnels[0].0 = tunnel.to_owned();
    setup.routes = subdomains.iter().map(|name| Route::new(name, tunnel)).collect();
    setup
}

fn by_token(setup: Setup, token: &str) -> Setup {
    Setup { sidecar_token: Some(token.to_owned()), ..setup }
}

/// Answers at once, but for `/download`, of which the second half waits for a word.
fn downloads() -> (Service, Sender<()>) {
    let (go, until) = channel::<()>();
    let until = Mutex::new(until);
    let service = Service::start(move |connection| {
        while let Some(request) = connection.request()? {
            if request.target != b"/download" {
                connection.write("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
                continue;
            }
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", PART.len() * 2);
            connection.write(head)?;
            connection.write(PART)?;
            let until = until.lock().expect("no panic");
            until.recv_timeout(wait::DEADLINE).map_err(std::io::Error::other)?;
            connection.write(PART)?;
        }
        Ok(())
    });
    (service, go)
}

fn sessions(relay: &Sidelane) -> Vec<Value> {
    relay.admin_page("/tunnels")["sessions"].as_array().expect("a list").clone()
}

fn session_of(relay: &Sidelane, principal: &str) -> Option<Value> {
    sessions(relay).into_iter().find(|session| session["principal"] == principal)
}

#[test]
fn a_token_revoked_by_reload_ends_its_sidecar_alone() {
    let (shop_service, shop_go) = downloads();
    let (bank_service, bank_go) = downloads();
    let both = principals(&[("shop", SHOP, "shop, \"shop-*\""), ("bank", BANK, "bank")]);
    let relay_process = Sidelane::spawn("relay", &relay(&both));
    let tunnel = relay_process.tunnel();
    let shop = sidecar("shop", &shop_service, &["shop", "shop-7"]);
    let shop = Sidelane::start("shop", &by_token(shop, SHOP).sidecar(tunnel));
    let bank = sidecar("bank", &bank_service, &["bank"]);
    let bank = Sidelane::start("bank", &by_token(bank, BANK).sidecar(tunnel));
    for host in ["shop", "shop-7", "bank"] {
        until_status(&relay_process, host, 200);
    }

    // Each reaches only its own names.
    for (what, setup, reason) in [
        (
            "a name",
            sidecar("shop", &shop_service, &["bank-2", "shop-2"]),
            "may not claim subdomain bank-2; its subdomains: shop, shop-*",
        ),
        (
            "a tunnel",
            sidecar("bank", &shop_service, &["shop-2"]),
            "may not claim tunnel bank; its tunnels: shop",
        ),
    ] {
        let thief = Sidelane::spawn("thief", &by_token(setup, SHOP).sidecar(tunnel));
        wait::until(what, || {
            let told = sessions(&relay_process)
                .iter()
                .any(|session| session["forbidden"]["reasons"].to_string().contains(reason));
            told.then_some(())
        });
        assert!(relay_process.log().contains(reason), "{what}");
        assert_eq!(relay_process.metric("sidelane_announcements_forbidden", &[]), Some(1.0));
        assert_eq!(status(&relay_process, "shop-2"), 404, "{what}");
        let page = "/explain?url=http://shop-2.localhost/";
        let told = relay_process.admin_page(page)["not_in_force"].to_string();
        assert!(told.contains(reason), "{what}: {told}");
        wait::until(what, || {
            let told = thief.admin_page(page)["notes"].to_string();
            told.contains("refuses what this sidecar announces").then_some(())
        });
        assert_eq!(thief.get(thief.health(), "/ready").head.status, 503, "{what}");
        thief.kill();
        relay_process.until_metric("sidelane_announcements_forbidden", &[], |count| count == 0.0);
    }

    let download = |host: &str| {
        let mut client = Client::connect(relay_process.web());
        client.send(get(host, "/download"));
        let head = client.head();
        assert_eq!(head.status, 200);
        (client, head)
    };
    let (mut of_shop, shop_head) = download("shop");
    let (mut of_bank, bank_head) = download("bank");
    let epoch = session_of(&relay_process, "bank").expect("a session")["epoch"].clone();
    relay_process.rewrite(&relay(&principals(&[
        ("shop", "another-token-of-sixteen", "shop"),
        ("bank", BANK, "bank"),
    ])));
    // The download of the one breaks, though its service goes on.
    assert!(of_shop.try_body("GET", shop_head).is_err(), "the download is cut");
    drop(shop_go);
    until_status(&relay_process, "shop", 404);
    assert_eq!(status(&relay_process, "shop-7"), 404);
    assert_eq!(status(&relay_process, "bank"), 200);
    bank_go.send(()).expect("the service waits");
    assert_eq!(of_bank.try_body("GET", bank_head).expect("whole").body.len(), PART.len() * 2);
    assert_eq!(session_of(&relay_process, "bank").expect("the same")["epoch"], epoch);

    let log = relay_process.log();
    let line =
        log.lines().find(|line| line.contains("session ended: its credential was withdrawn"));
    let line = line.expect("a clear line");
    for part in ["WARN", "principal=\"shop\"", "cause=the token is not one", "peer=127.0.0.1:"] {
        assert!(line.contains(part), "{part}: {line}");
    }
    assert_eq!(log.matches("session ended: its credential").count(), 1);
    wait::until("the sidecar's word of it", || {
        shop.log().contains("the credential was withdrawn").then_some(())
    });
    let revoked =
        relay_process.metric("sidelane_sessions_revoked_total", &["reason=\"withdrawn\""]);
    assert_eq!(revoked, Some(1.0));
    let refused = &["reason=\"unknown_token\""][..];
    relay_process.until_metric("sidelane_credentials_refused_total", refused, |count| count >= 1.0);
    wait::until("not ready", || {
        (shop.get(shop.health(), "/ready").head.status == 503).then_some(())
    });

    // Claims that narrow take names away, and give them back.
    relay_process.rewrite(&relay(&principals(&[("bank", BANK, "other")])));
    until_status(&relay_process, "bank", 404);
    wait::until("the sidecar is told", || {
        (bank.get(bank.health(), "/ready").head.status == 503).then_some(())
    });
    assert_eq!(session_of(&relay_process, "bank").expect("the same")["epoch"], epoch);
    relay_process.rewrite(&relay(&both));
    until_status(&relay_process, "bank", 200);
    assert_eq!(session_of(&relay_process, "bank").expect("the same")["epoch"], epoch);
    until_status(&relay_process, "shop", 200);
}

/// A relay that knows ServiceAccounts of an issuer, each by its own names.
fn cluster(directory: &Path) -> String {
    relay(&format!(
        "  credentials:
    - {{ principal: cluster, jwt: [{{ issuer: k8s, namespace: \"*\", service_account: \"*\" }}], subdomains: [\"{{service_account}}.{{namespace}}\"], tunnels: [\"{{namespace}}-{{service_account}}\"] }}
  token_issuers:
    - {{ name: k8s, issuer: \"{}\", audiences: [sidelane], jwks_file: \"{}\", leeway: 0s }}
",
        Signer::ISSUER,
        directory.join("keys.json").display(),
    ))
}

#[test]
fn a_signed_token_is_renewed_ends_and_goes_with_its_key() {
    let files = tempfile::tempdir().expect("a directory");
    let write = |name: &str, text: &str| {
        fs::write(files.path().join("fresh"), text).expect("a file");
        fs::rename(files.path().join("fresh"), files.path().join(name)).expect("a file");
    };
    let hour = Duration::from_secs(3600);
    let first = Signer::new("first");
    write("keys.json", &first.set());
    write("token", &first.account("shop", "web", hour));
    let relay = Sidelane::spawn("relay", &cluster(files.path()));
    let service = Service::ok();
    let setup = sidecar("shop-web", &service, &["web.shop"]);
    let token_file =
        format!("sidecar:\n  token_file: \"{}\"\n", files.path().join("token").display());
    let yaml = setup.sidecar(relay.tunnel()).replacen("sidecar:\n", &token_file, 1);
    let sidecar = Sidelane::start("sidecar", &yaml);
    until_status(&relay, "web.shop", 200);
    let known = session_of(&relay, "cluster/shop/web").expect("a session");
    assert_eq!(known["credential"], "jwt k8s system:serviceaccount:shop:web");

    // Another account of the same entry is another principal.
    write("other", &first.account("shop", "db", hour));
    let other = yaml.replace("/token\"", "/other\"");
    let thief = Sidelane::spawn("thief", &other);
    let reason =
        "principal cluster/shop/db may not claim subdomain web.shop; its subdomains: db.shop";
    wait::until("the refusal", || relay.log().contains(reason).then_some(()));
    thief.kill();

    // A token that ends soon takes its place in the running session, and is not renewed in time.
    let lasts = Duration::from_secs(4);
    write("token", &first.account("shop", "web", lasts));
    let _ = sidecar.reload();
    relay
        .until_metric("sidelane_credentials_renewed_total", &["result=\"accepted\""], |n| n == 1.0);
    let renewed = session_of(&relay, "cluster/shop/web").expect("the same");
    assert_eq!(renewed["epoch"], known["epoch"]);
    assert_ne!(renewed["expires"], known["expires"]);
    assert_eq!(status(&relay, "web.shop"), 200);
    relay.until_metric("sidelane_sessions_revoked_total", &["reason=\"expired\""], |n| n == 1.0);
    let line = "session ended: its credential has expired";
    wait::until(line, || relay.log().contains(line).then_some(()));
    until_status(&relay, "web.shop", 404);
    let refused = &["reason=\"expired\""][..];
    relay.until_metric("sidelane_credentials_refused_total", refused, |count| count >= 1.0);
    // The file is read anew at each dial.
    write("token", &first.account("shop", "web", hour));
    until_status(&relay, "web.shop", 200);

    // Other keys: what the key before signed is worth nothing.
    let second = Signer::new("second");
    write("keys.json", &second.set());
    let withdrawn = &["reason=\"withdrawn\""][..];
    let _ = relay.reload();
    // That of the sidecar that was killed may still wait for its lanes.
    relay.until_metric("sidelane_sessions_revoked_total", withdrawn, |count| count >= 1.0);
    let refused = &["reason=\"unknown_key\""][..];
    relay.until_metric("sidelane_credentials_refused_total", refused, |count| count >= 1.0);
    write("token", &second.account("shop", "web", hour));
    until_status(&relay, "web.shop", 200);

    // Signed by a key that the relay does not know yet: the token before counts until it does.
    let epoch = session_of(&relay, "cluster/shop/web").expect("a session")["epoch"].clone();
    let third = Signer::new("third");
    write("token", &third.account("shop", "web", hour));
    let _ = sidecar.reload();
    sidecar.until_metric("sidelane_credential_renewal_refused", &[], |refused| refused == 1.0);
    assert_eq!(status(&relay, "web.shop"), 200);
    let keys = |set: &str| serde_json::from_str::<Value>(set).expect("JSON")["keys"][0].clone();
    let both = serde_json::json!({ "keys": [keys(&second.set()), keys(&third.set())] });
    write("keys.json", &both.to_string());
    let _ = (relay.reload(), sidecar.reload());
    sidecar.until_metric("sidelane_credential_renewal_refused", &[], |refused| refused == 0.0);
    write("keys.json", &third.set());
    let _ = relay.reload();
    assert_eq!(status(&relay, "web.shop"), 200);
    assert_eq!(session_of(&relay, "cluster/shop/web").expect("the same")["epoch"], epoch);
}

#[test]
fn a_client_certificate_is_a_principal_until_nobody_trusts_it() {
    let files = tempfile::tempdir().expect("a directory");
    let write = |name: &str, text: &str| {
        let path = files.path().join(name);
        fs::write(&path, text).expect("a file");
        path.display().to_string()
    };
    let (servers, clients) = (Authority::new(), Authority::new());
    let (chain, key) = servers.certificate(&["127.0.0.1"]);
    let (cert, key) = (write("tls.crt", &chain), write("tls.key", &key));
    let ca = write("ca.pem", &servers.pem());
    let client_ca = write("clients.pem", &clients.pem());
    let tls = format!(
        ", tls: {{ certificates: [{{ cert: \"{cert}\", key: \"{key}\" }}], client_ca: \"{client_ca}\" }} }}"
    );
    let yaml = relay(
        "  credentials:
    - { principal: mesh, certificates: [\"spiffe://example.org/ns/*/sa/web\"], subdomains: [\"{namespace}\"], tunnels: [\"{namespace}\"] }
",
    );
    let plain = "  tunnel: { address: \"127.0.0.1:0\" }";
    assert!(yaml.contains(plain), "{yaml}");
    let yaml = yaml.replace(plain, &format!("  tunnel: {{ address: \"127.0.0.1:0\"{tls}"));
    let relay = Sidelane::spawn("relay", &yaml);

    let service = Service::ok();
    let start = |name: &'static str, id: &str, subdomain: &str| {
        let (chain, key) = clients.certificate(&[id]);
        let chain = write(&format!("{name}.crt"), &chain);
        let key = write(&format!("{name}.key"), &key);
        let setup = sidecar(subdomain, &service, &[subdomain]);
        let tunnel = relay.tunnel();
        let address = format!("[\"{tunnel}\"]");
        let by_tls = format!(
            "[{{ address: \"{tunnel}\", tls: {{ ca: \"{ca}\", certificate: {{ cert: \"{chain}\", key: \"{key}\" }} }} }}]"
        );
        Sidelane::spawn(name, &setup.sidecar(tunnel).replace(&address, &by_tls))
    };
    let _shop = start("shop", "spiffe://example.org/ns/shop/sa/web", "shop");
    let _bank = start("bank", "spiffe://example.org/ns/bank/sa/web", "bank");
    let other = start("other", "spiffe://example.org/ns/bank/sa/db", "bank");
    until_status(&relay, "shop", 200);
    until_status(&relay, "bank", 200);
    let known = session_of(&relay, "mesh/shop/web").expect("a session");
    assert_eq!(known["credential"], "certificate spiffe://example.org/ns/shop/sa/web");
    let refused = &["reason=\"unknown_certificate\""][..];
    relay.until_metric("sidelane_credentials_refused_total", refused, |count| count >= 1.0);
    wait::until("the reason", || {
        other.log().contains("no name in the client certificate's subjectAltName").then_some(())
    });

    // Another authority: whoever was let in by the one before goes.
    write("clients.pem", &Authority::new().pem());
    let _ = relay.reload();
    let withdrawn = &["reason=\"withdrawn\""][..];
    relay.until_metric("sidelane_sessions_revoked_total", withdrawn, |count| count == 2.0);
    until_status(&relay, "shop", 404);
    until_status(&relay, "bank", 404);
    assert!(relay.log().contains("cause=the client certificate is not trusted"));
}

#[test]
fn a_token_that_comes_before_its_hash_is_taken_once_the_hash_is_there() {
    const NEXT: &str = "the-next-token-of-shop-by-far";
    let files = tempfile::tempdir().expect("a directory");
    let file = files.path().join("token");
    let write = |token: &str| {
        fs::write(files.path().join("fresh"), token).expect("a file");
        fs::rename(files.path().join("fresh"), &file).expect("a file");
    };
    // The hashes that the relay knows of the principal's.
    let rules = |tokens: &[&str]| {
        let hashes: Vec<String> =
            tokens.iter().map(|token| format!("\"{}\"", token_hash(token))).collect();
        relay(&format!(
            "  credentials:\n    - {{ principal: shop, tokens: [{}], subdomains: [shop], tunnels: [shop] }}\n",
            hashes.join(", ")
        ))
    };
    let shown = |token: &str| format!("token {}…", &token_hash(token)[..15]);
    write("not-a-token-of-anybody");
    let relay = Sidelane::spawn("relay", &rules(&[SHOP]));
    let service = Service::ok();
    let setup = sidecar("shop", &service, &["shop"]);
    let token_file = format!("sidecar:\n  token_file: \"{}\"\n", file.display());
    let yaml = setup.sidecar(relay.tunnel()).replacen("sidecar:\n", &token_file, 1);
    let sidecar = Sidelane::spawn("sidecar", &yaml);
    // Readiness says why, and no word of what was presented.
    let ready = wait::until("the reason", || {
        let page = sidecar.get(sidecar.health(), "/ready");
        let text = String::from_utf8_lossy(&page.body).into_owned();
        text.contains("the token is not one that this relay accepts").then_some(text)
    });
    assert!(ready.contains("no session with any relay: relay 127.0.0.1:"), "{ready}");
    assert!(!ready.contains("not-a-token-of-anybody"), "{ready}");
    write(SHOP);
    // With all lanes that it wants: a further one would present the file's token too.
    let known = wait::until("two lanes", || {
        let known = session_of(&relay, "shop")?;
        (known["lanes"].as_array()?.len() == 2).then_some(known)
    });
    assert_eq!(known["credential"], shown(SHOP));

    // The sidecar's file is replaced first.
    let of_relay = |key: &str| sidecar.admin_page("/tunnels")["relays"][0][key].clone();
    let is_refused = || {
        wait::until("the relay's refusal", || {
            of_relay("credential_refused").is_string().then_some(())
        });
        sidecar.until_metric("sidelane_credential_renewal_refused", &[], |refused| refused == 1.0);
        let page = session_of(&relay, "shop").expect("the same");
        assert!(page["credential_refused"].is_string(), "{page}");
        assert_eq!(page["epoch"], known["epoch"]);
    };
    write(NEXT);
    let _ = sidecar.reload();
    is_refused();
    let log = sidecar.log();
    let line = log.lines().find(|line| line.contains("the relay refuses the credential presented"));
    let line = line.expect("a line");
    assert!(line.contains("WARN") && line.contains("the token is not one"), "{line}");
    assert_eq!(session_of(&relay, "shop").expect("the same")["credential"], shown(SHOP));
    // The hash comes: the token is presented again though it is the same.
    relay.rewrite(&rules(&[SHOP, NEXT]));
    let accepted = &["result=\"accepted\""][..];
    let _ = (relay.reload(), sidecar.reload());
    relay.until_metric("sidelane_credentials_renewed_total", accepted, |count| count == 1.0);
    sidecar.until_metric("sidelane_credential_renewal_refused", &[], |refused| refused == 0.0);
    assert!(of_relay("credential_refused").is_null());
    assert_eq!(session_of(&relay, "shop").expect("the same")["credential"], shown(NEXT));
    relay.rewrite(&rules(&[NEXT]));
    let _ = relay.reload();

    // Both at once, before the sidecar asks again: the relay has what it refused.
    write(BANK);
    let _ = sidecar.reload();
    is_refused();
    relay.rewrite(&rules(&[BANK]));
    relay.until_metric("sidelane_credentials_renewed_total", accepted, |count| count >= 2.0);
    let page = session_of(&relay, "shop").expect("the same");
    assert_eq!((&page["credential"], &page["epoch"]), (&shown(BANK).into(), &known["epoch"]));
    sidecar.until_metric("sidelane_credential_renewal_refused", &[], |refused| refused == 0.0);
    assert_eq!(status(&relay, "shop"), 200);
    let withdrawn = &["reason=\"withdrawn\""][..];
    assert_eq!(relay.metric("sidelane_sessions_revoked_total", withdrawn), Some(0.0));
    for log in [sidecar.log(), relay.log()] {
        for secret in [SHOP, NEXT, BANK] {
            assert!(!log.contains(secret));
        }
    }
}
