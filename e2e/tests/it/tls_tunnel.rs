//! TLS between sidecar and relay: whom each end believes, what it says where it does not, and what a
//! reload changes while exchanges run.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use sidelane_e2e::authority::{Authority, Files};
use sidelane_e2e::client::{Answer, Client, request};
use sidelane_e2e::process::{Setup, Sidelane};
use sidelane_e2e::service::Service;
use sidelane_e2e::stage::get;
use sidelane_e2e::tools::Python;
use sidelane_e2e::wait;

const TOKEN: &str = "correct-horse-battery-staple";

/// A relay's file with these keys of `relay.tunnel` beside its address and token.
fn relay_yaml(setup: &Setup, tunnel: &str) -> String {
    let plain = format!("tunnel: {{ address: \"127.0.0.1:0\", token: \"{TOKEN}\" }}");
    let yaml = setup.relay();
    assert!(yaml.contains(&plain), "{yaml}");
    let keys = format!("tunnel: {{ address: \"127.0.0.1:0\", token: \"{TOKEN}\"{tunnel} }}");
    yaml.replace(&plain, &keys)
}

/// A sidecar's file that dials `tunnel` as `relay` says: keys of the relay's mapping.
fn sidecar_yaml(setup: &Setup, tunnel: SocketAddr, relay: &str) -> String {
    let plain = format!("relays: [\"{tunnel}\"]");
    let yaml = setup.sidecar(tunnel);
    assert!(yaml.contains(&plain), "{yaml}");
    yaml.replace(&plain, &format!("relays: [{{ address: \"{tunnel}\"{relay} }}]"))
}

fn pair_yaml(files: &Files) -> String {
    format!("{{ cert: \"{}\", key: \"{}\" }}", files.cert.display(), files.key.display())
}

fn shows(files: &Files) -> String {
    format!(", tls: {{ certificates: [{}] }}", pair_yaml(files))
}

fn trusts(ca: &Path, more: &str) -> String {
    format!(", tls: {{ ca: \"{}\"{more} }}", ca.display())
}

fn setup(service: &Service) -> Setup {
    let mut setup = Setup::of(service.address());
    setup.relay_token = Some(TOKEN.to_owned());
    setup.sidecar_token = Some(TOKEN.to_owned());
    setup
}

fn ask(relay: &Sidelane) -> Answer {
    request(relay.web(), "GET", get("/"))
}

fn until_served(relay: &Sidelane) {
    wait::until("the announcement", || (ask(relay).head.status == 200).then_some(()));
}

/// Waits until a log has a line with all of these.
fn until_logged(side: &Sidelane, parts: &[&str]) -> String {
    wait::until(&format!("{parts:?} in the log"), || {
        let log = side.log();
        let line = log.lines().find(|line| parts.iter().all(|part| line.contains(part)));
        line.map(str::to_owned)
    })
}

/// A service that sends `/slow` in two halves, the second after a byte of the client's.
fn halves() -> Service {
    Service::start(|connection| {
        while let Some(request) = connection.request()? {
            if request.target == b"/halves" {
                connection.write("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")?;
                loop {
                    connection.write("5\r\nabcde\r\n")?;
                    std::thread::park_timeout(Duration::from_millis(5));
                }
            }
            connection.write("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
        }
        Ok(())
    })
}

/// A download that goes on for as long as it is read.
struct Download(Client);

impl Download {
    fn begin(relay: &Sidelane) -> Self {
        let mut client = Client::connect(relay.web());
        client.send(get("/halves"));
        assert_eq!(client.head().status, 200);
        let mut download = Self(client);
        download.goes_on();
        download
    }

    fn goes_on(&mut self) {
        for _ in 0..20 {
            assert_eq!(self.0.chunk().expect("it goes on").as_deref(), Some(&b"abcde"[..]));
        }
    }
}

#[test]
fn lanes_run_by_tls_with_a_ca_of_ones_own() {
    let service = Service::ok();
    let setup = setup(&service);
    let authority = Authority::new("e2e");
    let relay_files = authority.sign(&["relay.internal", "127.0.0.1"]);
    // Lanes go from the thread that shakes hands to their own.
    let threads = |yaml: String, role: &str| {
        yaml.replace(&format!("{role}:\n"), &format!("{role}:\n  threads: 2\n"))
    };
    let file = threads(relay_yaml(&setup, &shows(&relay_files)), "relay");
    let relay = Sidelane::spawn("relay", &file);
    let trusts = trusts(&authority.ca(), "");
    let file = threads(sidecar_yaml(&setup, relay.tunnel(), &trusts), "sidecar");
    let sidecar = Sidelane::start("sidecar", &file);
    until_served(&relay);
    for side in [&relay, &sidecar] {
        side.until_metric("sidelane_lanes", &[], |lanes| lanes == 2.0);
    }
    until_logged(&relay, &["lane up", "tls=true"]);
    until_logged(&sidecar, &["session begun", "tls=true"]);
    let page = sidecar.admin_page("/tunnels");
    assert_eq!(page["relays"][0]["tls"], true, "{page}");
    // The second lane remembers the first one's ticket.
    let resumed = ["listener=\"_tunnel\"", "result=\"resumed\""];
    relay.until_metric("sidelane_tls_handshakes_total", &resumed, |count| count >= 1.0);
    let body = vec![b'x'; 3_000_000];
    let head = format!(
        "POST / HTTP/1.1\r\nhost: api.localhost\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    let mut all = head.into_bytes();
    all.extend_from_slice(&body);
    assert_eq!(request(relay.web(), "POST", all).head.status, 200);
    assert_eq!(service.requests().last().expect("a request").body.bytes.len(), body.len());
}

#[test]
fn each_fault_stands_in_both_logs_and_says_what_to_do() {
    let service = Service::ok();
    let setup = setup(&service);
    let (authority, other) = (Authority::new("ours"), Authority::new("theirs"));
    let good = authority.sign(&["127.0.0.1"]);
    let elsewhere = authority.sign(&["relay.internal"]);
    let ended = authority.sign_with(&["ended.test", "127.0.0.1"], |params| {
        params.not_before = rcgen::date_time_ymd(2000, 1, 1);
        params.not_after = rcgen::date_time_ymd(2001, 1, 1);
    });
    let believes = trusts(&authority.ca(), "");
    for (tunnel, relay_of_sidecar, at_sidecar, at_relay) in [
        (
            shows(&good),
            trusts(&other.ca(), ""),
            "name its authority by tls.ca",
            "gave up TLS with the alert UnknownCA",
        ),
        (
            shows(&elsewhere),
            believes.clone(),
            "its certificate is for relay.internal, not for 127.0.0.1: set tls.server_name",
            "gave up TLS with the alert BadCertificate",
        ),
        (
            shows(&ended),
            believes.clone(),
            "its certificate ended at Mon, 01 Jan 2001",
            "gave up TLS with the alert CertificateExpired",
        ),
        (
            String::new(),
            believes.clone(),
            "it answers without TLS: set relay.tunnel.tls there",
            "the dialler speaks TLS, and relay.tunnel has none",
        ),
        (
            shows(&good),
            String::new(),
            "this relay expects TLS here",
            "the dialler speaks no TLS, and relay.tunnel.tls is set",
        ),
    ] {
        let relay = Sidelane::spawn("relay", &relay_yaml(&setup, &tunnel));
        let file = sidecar_yaml(&setup, relay.tunnel(), &relay_of_sidecar);
        let sidecar = Sidelane::spawn("sidecar", &file);
        until_logged(&sidecar, &["no session", at_sidecar]);
        until_logged(&relay, &["no handshake on the tunnel's port", at_relay]);
        assert_eq!(sidecar.metric("sidelane_lanes", &[]).unwrap_or(0.0), 0.0);
        for side in [&relay, &sidecar] {
            assert!(!side.log().contains(TOKEN), "the token stands in a log");
        }
    }
}

#[test]
fn a_name_is_checked_where_an_address_is_dialled() {
    let service = Service::ok();
    let setup = setup(&service);
    let authority = Authority::new("e2e");
    let files = authority.sign(&["relay.internal"]);
    let relay = Sidelane::spawn("relay", &relay_yaml(&setup, &shows(&files)));
    let trusts = trusts(&authority.ca(), ", server_name: relay.internal");
    let _sidecar = Sidelane::start("sidecar", &sidecar_yaml(&setup, relay.tunnel(), &trusts));
    until_served(&relay);
}

#[test]
fn whoever_does_not_offer_the_tunnels_protocol_is_turned_away() {
    let Some(python) = Python::find("the tunnel's ALPN") else { return };
    let service = Service::ok();
    let authority = Authority::new("e2e");
    let files = authority.sign(&["127.0.0.1"]);
    let relay = Sidelane::spawn("relay", &relay_yaml(&setup(&service), &shows(&files)));
    let told = peek(&python, relay.tunnel(), &authority.ca(), &["-"]);
    let received = told["received"].as_str().unwrap_or_default();
    assert!(received.contains("this port speaks sidelane/1"), "{told}");
    let told = peek(&python, relay.tunnel(), &authority.ca(), &["spdy/3"]);
    let error = told["error"].as_str().unwrap_or_default().to_uppercase().replace(' ', "_");
    assert!(error.contains("NO_APPLICATION_PROTOCOL"), "{told}");
    let expected = "which the dialler did not offer by ALPN";
    for more in ["", " (it offered others)"] {
        let parts = ["no handshake on the tunnel's port", &format!("{expected}{more}")];
        until_logged(&relay, &parts);
    }
}

#[test]
fn a_relays_certificate_is_replaced_while_a_download_runs() {
    let Some(python) = Python::find("a relay's certificate replaced") else { return };
    let shown_by = |address, ca: &Path| {
        let seen = peek(&python, address, ca, &["sidelane/1"]);
        seen["certificate"].as_str().unwrap_or_else(|| panic!("{seen}")).to_owned()
    };
    let service = halves();
    let setup = setup(&service);
    let authority = Authority::new("e2e");
    let files = authority.sign(&["127.0.0.1"]);
    let relay = Sidelane::spawn("relay", &relay_yaml(&setup, &shows(&files)));
    let believes = trusts(&authority.ca(), "");
    let sidecar = Sidelane::start("sidecar", &sidecar_yaml(&setup, relay.tunnel(), &believes));
    until_served(&relay);
    let mut download = Download::begin(&relay);
    let before = shown_by(relay.tunnel(), &authority.ca());
    // Under the same names, as who renews it does.
    let renewed = authority.sign(&["127.0.0.1"]);
    assert_eq!((renewed.cert, renewed.key), (files.cert, files.key));
    let (status, answer) = relay.reload();
    assert_eq!(status, 200, "{answer}");
    let after = shown_by(relay.tunnel(), &authority.ca());
    assert_ne!(before, after, "whoever dials from here on sees the new one");
    download.goes_on();
    // Of another authority: lanes that are up stay, and a sidecar that comes anew does not get in.
    let other = Authority::new("other");
    let theirs = other.sign(&["127.0.0.1"]);
    relay.rewrite(&fs::read_to_string(relay.file()).expect("the file").replace(
        &pair_yaml(&Files {
            cert: renewed_path(&authority, ""),
            key: renewed_path(&authority, "-key"),
        }),
        &pair_yaml(&theirs),
    ));
    let (status, answer) = relay.reload();
    assert_eq!(status, 200, "{answer}");
    download.goes_on();
    assert_eq!(ask(&relay).head.status, 200);
    let newcomer = Sidelane::spawn("newcomer", &sidecar_yaml(&setup, relay.tunnel(), &believes));
    until_logged(&newcomer, &["no session", "name its authority by tls.ca"]);
    // Until it believes the other one: lanes are dialled anew, and the download goes on on the old.
    let sidecar_file = fs::read_to_string(sidecar.file()).expect("the file");
    let authority_text = authority.ca().display().to_string();
    let other_text = other.ca().display().to_string();
    sidecar.rewrite(&sidecar_file.replace(&authority_text, &other_text));
    let (status, answer) = sidecar.reload();
    assert_eq!(status, 200, "{answer}");
    until_logged(&relay, &["the lane is dialled anew"]);
    download.goes_on();
    // Two that are dialled so, and the download's.
    wait::until("the lanes that were dialled before", || {
        let page = sidecar.admin_page("/tunnels");
        let lanes = page["relays"][0]["lanes"].as_array().cloned().unwrap_or_default();
        let open = lanes.iter().filter(|lane| lane["open"] == true).count();
        (open == 2 && lanes.len() == 3).then_some(())
    });
    download.goes_on();
    drop(download);
    sidecar.until_metric("sidelane_lanes", &[], |lanes| lanes == 2.0);
    for _ in 0..20 {
        assert_eq!(ask(&relay).head.status, 200);
    }
    assert!(!sidecar.log().contains("session lost"), "the session is one");
    assert_eq!(sidecar.metric("sidelane_lanes_lost_total", &[]).unwrap_or(0.0), 0.0);
}

fn renewed_path(authority: &Authority, suffix: &str) -> PathBuf {
    authority.ca().with_file_name(format!("127.0.0.1{suffix}.pem"))
}

/// Connects by TLS, and returns what was seen.
fn peek(python: &Python, address: SocketAddr, ca: &Path, more: &[&str]) -> Value {
    let mut command = python.script("tls_peek.py");
    command.arg(address.to_string()).arg(ca).args(more);
    let output = command.output().expect("Python starts");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"))
}

#[test]
fn a_sidecar_shows_a_certificate_of_its_own_and_another_after_a_reload() {
    let service = Service::ok();
    let setup = setup(&service);
    let (authority, clients) = (Authority::new("relays"), Authority::new("sidecars"));
    let files = authority.sign(&["127.0.0.1"]);
    let tunnel = format!(
        ", tls: {{ certificates: [{}], client_ca: \"{}\" }}",
        pair_yaml(&files),
        clients.ca().display()
    );
    let relay = Sidelane::spawn("relay", &relay_yaml(&setup, &tunnel));
    let first = clients.sign(&["first.test"]);
    let more = format!(", certificate: {}", pair_yaml(&first));
    let believes = trusts(&authority.ca(), &more);
    let sidecar = Sidelane::start("sidecar", &sidecar_yaml(&setup, relay.tunnel(), &believes));
    until_served(&relay);
    sidecar.until_metric("sidelane_lanes", &[], |lanes| lanes == 2.0);
    let second = clients.sign(&["second.test"]);
    let file = fs::read_to_string(sidecar.file()).expect("the file");
    sidecar.rewrite(&file.replace(&pair_yaml(&first), &pair_yaml(&second)));
    let (status, answer) = sidecar.reload();
    assert_eq!(status, 200, "{answer}");
    until_logged(&relay, &["the lane is dialled anew"]);
    wait::until("two lanes that are dialled anew", || {
        assert_eq!(ask(&relay).head.status, 200);
        let page = sidecar.admin_page("/tunnels");
        let lanes = page["relays"][0]["lanes"].as_array().cloned().unwrap_or_default();
        (lanes.len() == 2 && lanes.iter().all(|lane| lane["lane"].as_u64() > Some(1))).then_some(())
    });
    assert!(!sidecar.log().contains("session lost"), "the session is one");
    // One that nobody of the relay's signed.
    let strangers = Authority::new("strangers");
    let stranger = strangers.sign(&["third.test"]);
    let more = format!(", certificate: {}", pair_yaml(&stranger));
    let believes = trusts(&authority.ca(), &more);
    let refused = Sidelane::spawn("refused", &sidecar_yaml(&setup, relay.tunnel(), &believes));
    until_logged(
        &refused,
        &["no session", "it refuses the certificate that is set as tls.certificate"],
    );
    until_logged(&relay, &["not one that relay.tunnel.tls.client_ca signed"]);
}

#[test]
fn garbage_and_silence_on_the_tunnels_port_cost_a_bounded_amount() {
    let service = Service::ok();
    let setup = setup(&service);
    let authority = Authority::new("e2e");
    let files = authority.sign(&["127.0.0.1"]);
    let mut file = relay_yaml(&setup, &shows(&files));
    // All come from one address here.
    file = file.replace(
        "  base_domains:",
        "  timeouts: { tls_handshake: 1s, handshake: 1s }
  limits: { handshakes_per_second: 10000, handshakes_per_second_per_address: 10000, failed_handshakes_per_minute_per_address: 1000000 }
  base_domains:",
    );
    let relay = Sidelane::spawn("relay", &file);
    let believes = trusts(&authority.ca(), "");
    let _sidecar = Sidelane::start("sidecar", &sidecar_yaml(&setup, relay.tunnel(), &believes));
    until_served(&relay);
    let before = relay.descriptors();
    let secret = b"s3cret-in-the-noise";
    let mut open = Vec::new();
    for n in 0..300 {
        let mut stream = TcpStream::connect(relay.tunnel()).expect("connected");
        let bytes: &[u8] = match n % 5 {
            0 => b"",
            1 => &[0x16],
            // A record that promises more than comes.
            2 => &[0x16, 0x03, 0x01, 0x02, 0x00, 0x01],
            3 => secret,
            _ => &[0x16, 0x03, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
        };
        // The relay may have closed it by then.
        let _ = stream.write_all(bytes);
        open.push(stream);
    }
    // Each ends by the relay's doing, the silent ones in time.
    for mut stream in open {
        stream.set_read_timeout(Some(wait::DEADLINE)).expect("a timeout");
        let mut space = Vec::new();
        // A reset is an end too.
        match stream.read_to_end(&mut space) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
    }
    wait::until("the descriptors", || (relay.descriptors() <= before + 4).then_some(()));
    assert_eq!(ask(&relay).head.status, 200, "lanes that are up are not touched");
    assert!(!relay.log().contains("s3cret"), "what comes before a handshake is in no log");
}

#[test]
fn an_address_that_fails_too_often_is_turned_away_and_its_secret_is_nowhere() {
    let service = Service::ok();
    let mut setup = setup(&service);
    let limit = |yaml: String| {
        yaml.replace(
            "  base_domains:",
            "  limits: { failed_handshakes_per_minute_per_address: 1 }\n  base_domains:",
        )
    };
    let authority = Authority::new("e2e");
    let files = authority.sign(&["127.0.0.1"]);
    let believes = trusts(&authority.ca(), "");
    setup.sidecar_token = Some("wrong-horse-battery-staple".to_owned());
    for (tunnel, relay_of_sidecar, told) in [
        (String::new(), String::new(), "too many handshakes from this address have failed"),
        (shows(&files), believes, "it turns this address away"),
    ] {
        let relay = Sidelane::spawn("relay", &limit(relay_yaml(&setup, &tunnel)));
        let file = sidecar_yaml(&setup, relay.tunnel(), &relay_of_sidecar);
        let sidecar = Sidelane::spawn("sidecar", &file);
        let refused = ["the relay refuses this sidecar's credential"];
        until_logged(&sidecar, &refused);
        until_logged(&sidecar, &["no session", told]);
        let line = until_logged(&relay, &["it is turned away", "address=127.0.0.1"]);
        assert!(line.contains("WARN"), "{line}");
        let reason = ["reason=\"failures\""];
        relay.until_metric("sidelane_handshakes_refused_total", &reason, |count| count >= 1.0);
        let credential = ["reason=\"CREDENTIAL\""];
        assert_eq!(relay.metric("sidelane_handshakes_refused_total", &credential), Some(1.0));
        for side in [&relay, &sidecar] {
            assert!(!side.log().contains("horse-battery"), "a token stands in a log");
        }
    }
}

#[test]
fn another_token_is_in_force_without_a_restart_at_either_end() {
    let service = halves();
    let setup = setup(&service);
    let relay = Sidelane::spawn("relay", &relay_yaml(&setup, ""));
    let directory = tempfile::tempdir().expect("a directory");
    let token_file = directory.path().join("token");
    fs::write(&token_file, format!("{TOKEN}\n")).expect("written");
    let file = setup.sidecar(relay.tunnel()).replace(
        &format!("token: \"{TOKEN}\""),
        &format!("token_file: \"{}\"", token_file.display()),
    );
    let sidecar = Sidelane::start("sidecar", &file);
    until_served(&relay);
    fs::write(&token_file, "another-horse-battery-staple\n").expect("written");
    let (status, answer) = sidecar.reload();
    assert_eq!(status, 200, "{answer}");
    until_logged(&sidecar, &["another credential is presented to the relay"]);
    let text = fs::read_to_string(relay.file()).expect("the file");
    relay.rewrite(&text.replace(TOKEN, "another-horse-battery-staple"));
    let (status, answer) = relay.reload();
    assert_eq!(status, 200, "{answer}");
    // Whoever comes from here on needs the new one.
    let newcomer = Sidelane::start("newcomer", &file.replace("name: e2e", "name: newcomer"));
    newcomer.until_metric("sidelane_lanes", &[], |lanes| lanes == 2.0);
}

#[test]
fn relay_and_sidecar_of_one_process_speak_tls_where_the_tunnel_has_it() {
    let service = Service::ok();
    let setup = Setup::of(service.address());
    let authority = Authority::new("e2e");
    // For a name that nobody here dials: the process knows its own certificate.
    let files = authority.sign(&["relay.example.org"]);
    let yaml = setup.both().replace(
        "tunnel: { address: \"127.0.0.1:0\" }",
        &format!("tunnel: {{ address: \"127.0.0.1:0\"{} }}", shows(&files)),
    );
    let both = Sidelane::start("sidelane", &yaml);
    until_served(&both);
    until_logged(&both, &["session begun", "tls=true"]);
    let renewed = authority.sign(&["relay.example.org"]);
    assert_eq!(renewed.cert, files.cert);
    let (status, answer) = both.reload();
    assert_eq!(status, 200, "{answer}");
    until_logged(&both, &["the lane is dialled anew"]);
    both.until_metric("sidelane_lanes", &["role=\"sidecar\""], |lanes| lanes == 2.0);
    assert_eq!(ask(&both).head.status, 200);
    assert!(!both.log().contains("session lost"));
}

#[test]
fn one_port_serves_clients_and_sidecars() {
    let service = Service::ok();
    let setup = setup(&service);
    let authority = Authority::new("e2e");
    let files = authority.sign(&["api.localhost", "127.0.0.1"]);
    let yaml = setup
        .relay()
        .replace(
            "- { name: web, address: \"127.0.0.1:0\" }",
            &format!(
                "- {{ name: web, address: \"127.0.0.1:0\" }}\n    - {{ name: https, address: \
                 \"127.0.0.1:0\", tls: {{ certificates: [{}] }} }}",
                pair_yaml(&files)
            ),
        )
        .replace(
            &format!("tunnel: {{ address: \"127.0.0.1:0\", token: \"{TOKEN}\" }}"),
            &format!("tunnel: {{ listener: https, token: \"{TOKEN}\" }}"),
        );
    let relay = Sidelane::spawn("relay", &yaml);
    let port = relay.listener("https");
    let believes = trusts(&authority.ca(), "");
    let sidecar = Sidelane::start("sidecar", &sidecar_yaml(&setup, port, &believes));
    until_served(&relay);
    sidecar.until_metric("sidelane_lanes", &[], |lanes| lanes == 2.0);
    if let Some(python) = Python::find("one port for clients and sidecars") {
        let seen = peek(&python, port, &authority.ca(), &["http/1.1", "api.localhost"]);
        let answer = seen["received"].as_str().unwrap_or_default();
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("ok"), "{seen}");
    }
    // Lanes are no clients' connections: a relay that ends does not wait for them.
    relay.until_metric("sidelane_connections", &["listener=\"https\""], |open| open == 0.0);
}
