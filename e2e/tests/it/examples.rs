//! What stands in `examples/config` runs as it stands.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use sidelane_e2e::client::{self, Answer};
use sidelane_e2e::process::{Sidelane, build_directory, program};
use sidelane_e2e::service::Service;
use sidelane_e2e::wait;

const TOKEN: &str = "a-token-of-the-tests";

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/config").join(name)
}

/// SHA-256 of [`TOKEN`].
const TOKEN_HASH: &str = "sha256:c7355b9788d3036817b4b9118e71116224521da29885b160eb8451377c47b377";

/// A directory with `tls.crt` and `tls.key` for the base domain and the tunnel.
fn certificates() -> tempfile::TempDir {
    let names = ["*.localhost", "tunnel.localhost"].map(str::to_owned);
    let made = rcgen::generate_simple_self_signed(names).expect("a certificate");
    let directory = tempfile::tempdir().expect("a directory");
    let key = made.signing_key.serialize_pem();
    fs::write(directory.path().join("tls.crt"), made.cert.pem()).expect("a file");
    fs::write(directory.path().join("tls.key"), key).expect("a file");
    directory
}

/// Every port is free, every service is `service`.
fn variables(service: &Service) -> Vec<(&'static str, String)> {
    let mut variables = vec![
        ("SIDELANE_PLUGIN_DIR", build_directory().display().to_string()),
        ("SIDELANE_TOKEN", TOKEN.to_owned()),
        ("SHOP_TOKEN_HASH", TOKEN_HASH.to_owned()),
    ];
    let listeners = [
        "HTTP_PORT",
        "HTTPS_PORT",
        "WS_PORT",
        "HEALTH_PORT",
        "ADMIN_PORT",
        "SIDECAR_HEALTH_PORT",
        "SIDECAR_ADMIN_PORT",
        "LINES_PORT",
    ];
    variables.extend(listeners.map(|port| (port, "0".to_owned())));
    let services =
        ["DEMO_PORT", "NEXT_PORT", "API_PORT", "APPS_PORT", "LINES_SERVICE_PORT", "SEARCH_PORT"];
    variables.extend(services.map(|port| (port, service.address().port().to_string())));
    variables
}

fn get(sidelane: &Sidelane, host: &str, path: &str) -> Answer {
    let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    client::request(sidelane.web(), "GET", request)
}

/// Starts an example of one process, asks each address, and expects each status.
fn check(name: &'static str, asked: &[(&str, &str, u16)]) -> (Service, Sidelane) {
    let service = Service::ok();
    let sidelane = Sidelane::spawn_file(name, &example(name), &variables(&service));
    sidelane.until_ready();
    for (host, path, status) in asked {
        let answer = get(&sidelane, host, path);
        assert_eq!(answer.head.status, *status, "{name}: {host}{path}: {answer:?}");
    }
    (service, sidelane)
}

#[test]
fn every_example_is_valid() {
    let service = Service::ok();
    let mut variables = variables(&service);
    // Free ports are no addresses of one relay.
    variables.push(("RELAY", "127.0.0.1:9".to_owned()));
    let certificates = certificates();
    variables.push(("TLS_DIR", certificates.path().display().to_string()));
    let entries = fs::read_dir(example("")).expect("the examples are there");
    let mut seen = BTreeSet::new();
    for entry in entries {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        if !path.is_dir() && path.extension().is_none_or(|extension| extension != "yaml") {
            continue;
        }
        let output = Command::new(program())
            .arg("check")
            .arg(&path)
            .arg("--strict")
            .envs(variables.iter().map(|(name, value)| (name, value)))
            .output()
            .expect("the program starts");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name}: {text}");
        seen.insert(name);
    }
    assert!(seen.len() >= 9, "{seen:?}");
}

#[test]
fn relay_and_sidecar_alone_find_each_other() {
    let service = Service::ok();
    let mut variables = variables(&service);
    let relay = Sidelane::spawn_file("relay.yaml", &example("relay.yaml"), &variables);
    variables.push(("RELAY", relay.tunnel().to_string()));
    let sidecar = Sidelane::spawn_file("sidecar.yaml", &example("sidecar.yaml"), &variables);
    sidecar.until_ready();
    wait::until("the announced route", || {
        (get(&relay, "shop.localhost", "/").head.status == 200).then_some(())
    });
}

#[test]
fn relay_and_sidecar_find_each_other_by_tls() {
    let service = Service::ok();
    let certificates = certificates();
    let mut variables = variables(&service);
    variables.push(("TLS_DIR", certificates.path().display().to_string()));
    let relay = Sidelane::spawn_file("tls-relay.yaml", &example("tls-relay.yaml"), &variables);
    variables.push(("RELAY", relay.tunnel().to_string()));
    let sidecar =
        Sidelane::spawn_file("tls-sidecar.yaml", &example("tls-sidecar.yaml"), &variables);
    sidecar.until_ready();
    let answer = get(&relay, "shop.localhost", "/x");
    assert_eq!(answer.head.status, 308);
    assert_eq!(answer.head.first("location"), Some("https://shop.localhost:9443/x"));
}

#[test]
fn several_services_have_names_of_their_own() {
    let asked = [
        ("shop.localhost", "/", 200),
        ("api.localhost", "/", 200),
        ("blog.apps.localhost", "/", 200),
        ("apps.localhost", "/", 404),
    ];
    drop(check("several-services.yaml", &asked));
}

#[test]
fn paths_are_routed_rewritten_and_redirected() {
    let (service, sidelane) = check("path-routing.yaml", &[("www.localhost", "/", 200)]);
    service.take_requests();
    assert_eq!(get(&sidelane, "www.localhost", "/api/orders?page=2").head.status, 200);
    let request = service.take_requests().remove(0);
    assert_eq!(request.target, b"/v2/orders?page=2");
    assert_eq!(client::first(&request.fields, "host"), Some("api.internal"));
    let moved = get(&sidelane, "www.localhost", "/docs/start");
    assert_eq!(moved.head.status, 308);
    let location = moved.head.first("location").unwrap_or_default();
    assert!(location.ends_with("/handbook/start"), "{moved:?}");
}

#[test]
fn policies_are_in_force() {
    let asked = [("intern.localhost", "/", 401), ("old.localhost", "/x", 301)];
    let (_service, sidelane) = check("policies.yaml", &asked);
    let answer = get(&sidelane, "api.localhost", "/");
    assert_eq!(answer.head.status, 200);
    assert_eq!(answer.head.first("strict-transport-security"), Some("max-age=31536000"));
    // "alice:open sesame"
    let request = "GET / HTTP/1.1\r\nHost: intern.localhost\r\nConnection: close\r\n\
                   Authorization: Basic YWxpY2U6b3BlbiBzZXNhbWU=\r\n\r\n";
    assert_eq!(client::request(sidelane.web(), "GET", request).head.status, 200);
}

#[test]
fn a_custom_protocol_has_a_port_of_its_own() {
    let (_service, sidelane) = check("custom-protocol.yaml", &[("demo.localhost", "/", 200)]);
    // The service behind it speaks HTTP: any bytes pass, both ways.
    let request = "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let answer = client::request(sidelane.listener("lines"), "GET", request);
    assert_eq!(answer.head.status, 200);
}

#[test]
fn a_directory_of_files_is_one_configuration() {
    let asked = [("shop.localhost", "/", 200), ("shop.localhost", "/search/x", 200)];
    drop(check("teams", &asked));
}
