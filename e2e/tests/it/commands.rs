//! The commands beside `run`: what they print, and what they exit with.

use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;
use sidelane_e2e::client;
use sidelane_e2e::nobody::Nobody;
use sidelane_e2e::process::{Route, Setup, Sidelane, build_directory, program};
use sidelane_e2e::service::Service;
use sidelane_e2e::stage::Stage;
use sidelane_e2e::tools::Curl;
use sidelane_e2e::wait;
use tempfile::TempDir;

const TOKEN: &str = "a-token-of-16-bytes-or-more";

/// Runs a command in a directory without files, and returns what came of it.
fn run(arguments: &[&str]) -> Output {
    let directory = tempfile::tempdir().expect("a temporary directory");
    run_in(directory.path(), arguments)
}

fn run_in(directory: &Path, arguments: &[&str]) -> Output {
    Command::new(program())
        .current_dir(directory)
        .args(arguments)
        .env_remove("SIDELANE_PLUGIN_DIR")
        .stdin(Stdio::null())
        .output()
        .expect("the program starts")
}

/// Checks a command's exit code, and that its output has each part.
#[track_caller]
fn check(arguments: &[&str], code: i32, parts: &[&str]) -> String {
    check_output(&run(arguments), code, parts)
}

#[track_caller]
fn check_output(output: &Output, code: i32, parts: &[&str]) -> String {
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let all = format!("{out}{err}");
    assert_eq!(output.status.code(), Some(code), "{all}");
    for part in parts {
        assert!(all.contains(part), "no {part:?} in:\n{all}");
    }
    assert!(!all.contains('\x1b'), "no terminal, no control codes:\n{all}");
    all
}

#[test]
fn check_says_what_is_wrong_and_exits_accordingly() {
    let service = Service::ok();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let write = |yaml: &str| {
        fs::write(directory.path().join("sidecar.yaml"), yaml).expect("a file is written");
    };
    let run = |arguments: &[&str]| run_in(directory.path(), arguments);
    let good = Setup::of(service.address()).both();
    write(&good);
    check_output(&run(&["check"]), 0, &["sidecar.yaml: valid: 1 route, 1 tunnel", "HTTP"]);
    write(&good.replace("tunnel: api", "tunnel: apii"));
    let parts = ["sidecar.yaml:", "routes[0].tunnel", "did you mean \"api\"?", "^^^^"];
    check_output(&run(&["check", "sidecar.yaml"]), 1, &parts);
    let output = run(&["check", "--output", "json"]);
    assert_eq!(output.status.code(), Some(1));
    let json: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(json["valid"], false);
    assert_eq!(json["errors"][0]["path"], "routes[0].tunnel");
    assert!(json["errors"][0]["line"].is_u64(), "{json}");
    // Everybody may say who a client is.
    write(&good.replace("  base_domains:", "  trusted_proxies: [0.0.0.0/0]\n  base_domains:"));
    check_output(&run(&["check"]), 0, &["warning: 0.0.0.0/0 is everybody", "valid"]);
    let parts = ["warning: 0.0.0.0/0 is everybody", "--strict takes warnings for errors"];
    check_output(&run(&["check", "--strict"]), 1, &parts);
    let output = run(&["check", "--output", "json"]);
    let json: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(json["warnings"][0]["path"], "relay.trusted_proxies");
    // What only the plugin knows.
    write(&good.replace("config: {}", "config: { idle_timeout: soon }"));
    check_output(&run(&["check"]), 1, &["plugins.libraries[0].config", "idle_timeout"]);
    check_output(&run(&["check", "other.yaml"]), 1, &["other.yaml", "cannot be read"]);
    check_output(&run(&["check", "--strange"]), 2, &["--strange", "--help"]);
}

#[test]
fn explain_asks_the_running_process() {
    let stage = Stage::ok();
    let admin = stage.sidelane.admin().to_string();
    let explain = |rest: &[&str]| run(&[&["explain", "--admin", &admin], rest].concat());
    let parts = [
        "route     api (from e2e)",
        "the host is its subdomain \"api\" below the base domain localhost",
        "served",
        "sees host api.localhost, path /x?y",
    ];
    // The file's own route wins over the same one that its sidecar announced.
    let parts = [&["route     api (from file)"], &parts[1..]].concat();
    check_output(&explain(&["http://api.localhost/x?y"]), 0, &parts);
    let missing = explain(&["apu.localhost"]);
    check_output(&missing, 4, &["route     none: 404", "did you mean \"api.localhost\"?"]);
    let output = explain(&["api.localhost", "--output", "json"]);
    let json: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(json["route"], "api");
    assert_eq!(json["tunnels"][0]["served"], true);
    assert_eq!(json["tunnels"][0]["service"], stage.service.address().to_string());
    check_output(&explain(&["ftp://x"]), 1, &["has an unknown scheme"]);
    let nowhere = explain(&["api.localhost", "--listener", "nope"]);
    check_output(&nowhere, 1, &["there is no listener \"nope\" (those are web)"]);
    let strange = explain(&["api.localhost", "--protocol", "http"]);
    check_output(&strange, 1, &["not a protocol type", "did you mean \"HTTP\"?"]);
    let unserved = explain(&["api.localhost", "--protocol", "LINE"]);
    check_output(&unserved, 1, &["no plugin serves protocol type \"LINE\" (served: HTTP)"]);
    check_output(&explain(&["api.localhost:1"]), 0, &["no listener for HTTP has port 1 ("]);
}

#[test]
fn explain_reads_a_file_without_a_process() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let service = "127.0.0.1:3000".parse().expect("an address");
    let setup = Setup::of(service).route(Route::new("api", "api").under("/v2").named("second"));
    fs::write(directory.path().join("relay.yaml"), setup.both()).expect("a file is written");
    let explain = |url: &str| run_in(directory.path(), &["explain", "--file", "relay.yaml", url]);
    let parts = ["route     second", "service 127.0.0.1:3000", "api: it fits, but second has"];
    check_output(&explain("api.localhost/v2/x"), 0, &parts);
    check_output(
        &explain("api.localhost/v22"),
        0,
        &["route     api", "second: path /v22 does not"],
    );
}

#[test]
fn pages_of_a_running_process_are_tables() {
    let stage = Stage::ok();
    assert_eq!(stage.get("/").head.status, 200);
    let admin = stage.sidelane.admin().to_string();
    let page = |name: &str| run(&[name, "--admin", &admin]);
    let web = stage.sidelane.web().port();
    let url = format!("http://api.localhost:{web}/");
    check_output(&page("routes"), 0, &["ROUTE", &url, "api", "file", "in force"]);
    let service = stage.service.address().to_string();
    check_output(
        &page("tunnels"),
        0,
        &["TUNNEL", &service, "SIDECAR", "e2e", "RELAY", "accepted 1"],
    );
    check_output(&page("plugins"), 0, &["http", "HTTP", "current"]);
    let config = check_output(&page("config"), 0, &["relay:", "base_domains:", "- localhost"]);
    assert!(!config.contains("last_reload_error"), "{config}");
    for name in ["routes", "tunnels", "plugins", "config"] {
        let output = run(&[name, "--admin", &admin, "--output", "json"]);
        let json: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(json.is_array(), stage.sidelane.admin_page(&format!("/{name}")).is_array());
    }
}

#[test]
fn a_bad_edit_shows_in_the_configuration_page() {
    let stage = Stage::ok();
    let admin = stage.sidelane.admin().to_string();
    stage.sidelane.rewrite("version: 1\nrelay: 3\n");
    stage
        .sidelane
        .until_metric("sidelane_config_last_reload_successful", &[], |value| value == 0.0);
    let config = check(
        &["config", "--admin", &admin],
        0,
        &["# not in force, the last edit: sidecar.yaml:2"],
    );
    // What is in force is a file.
    let directory = tempfile::tempdir().expect("a temporary directory");
    fs::write(directory.path().join("shown.yaml"), config).expect("a file is written");
    check_output(&run_in(directory.path(), &["check", "shown.yaml"]), 0, &["valid"]);
}

#[test]
fn a_sidecar_shows_what_relays_said() {
    let service = Service::ok();
    let setup = Setup::of(service.address());
    let relay = Sidelane::spawn("relay", &setup.relay());
    let first = Sidelane::start("first", &setup.sidecar(relay.tunnel()));
    let mut other = Setup::of(service.address());
    other.tunnels[0].0 = "mine".to_owned();
    other.routes[0].tunnel = "mine".to_owned();
    let second = Sidelane::spawn("second", &other.sidecar(relay.tunnel()));
    let until = |sidelane: &Sidelane, part: &str| {
        let admin = sidelane.admin().to_string();
        wait::until(part, || {
            let output = run(&["routes", "--admin", &admin]);
            String::from_utf8_lossy(&output.stdout).contains(part).then_some(())
        });
    };
    until(&first, "in force");
    // The relay has said where clients reach the route.
    let url = format!("http://api.localhost:{}/", relay.web().port());
    until(&first, &url);
    wait::until("the address in the log", || {
        let log = first.log();
        let told = |line: &str| line.contains("announcement accepted") && line.contains(&url);
        log.lines().any(told).then_some(())
    });
    until(&second, "refused: route api: taken by sidecar e2e for tunnel api");
    until(&relay, "in force");
}

#[test]
fn a_relay_says_why_a_sidecar_does_not_serve_a_tunnel() {
    let service = Service::ok();
    let setup = Setup::of(service.address());
    let relay = Sidelane::spawn("relay", &setup.relay());
    let directory = tempfile::tempdir().expect("a temporary directory");
    let there = format!("service: \"{}\"", service.address());
    let missing = format!("service: \"unix:{}/s\", wait: 10m", directory.path().display());
    let yaml = setup.sidecar(relay.tunnel());
    assert!(yaml.contains(&there), "{yaml}");
    let sidecar = Sidelane::spawn("sidecar", &yaml.replace(&there, &missing));
    let admin = relay.admin().to_string();
    let ask = |command: &[&str]| {
        let output = run(&[command, &["--admin", &admin]].concat());
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let reason = "not served: api (unavailable at e2e: waiting for the service";
    wait::until(reason, || ask(&["routes"]).contains(reason).then_some(()));
    let tunnels = ask(&["tunnels"]);
    assert!(tunnels.contains("unavailable at e2e: waiting for the service"), "{tunnels}");
    let explained = ask(&["explain", "api.localhost"]);
    let reason = "unavailable at sidecar e2e: waiting for the service";
    assert!(explained.contains(reason), "{explained}");
    assert!(explained.contains("client    sees 503"), "{explained}");
    drop(sidecar);
}

#[test]
fn a_file_says_which_process_is_asked() {
    let stage = Stage::ok();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let bound = format!("admin: {{ address: \"{}\" }}", stage.sidelane.admin());
    let yaml = Setup::of(stage.service.address()).both();
    let yaml = yaml.replace("admin: { address: \"127.0.0.1:0\" }", &bound);
    for name in ["sidecar.yaml", "other.yaml"] {
        fs::write(directory.path().join(name), &yaml).expect("a file is written");
    }
    let run = |arguments: &[&str]| run_in(directory.path(), arguments);
    check_output(&run(&["routes"]), 0, &["in force"]);
    check_output(&run(&["routes", "--file", "other.yaml"]), 0, &["in force"]);
    let silent = yaml.replace(&bound, "");
    fs::write(directory.path().join("other.yaml"), silent).expect("a file is written");
    let parts = ["has no `admin` section", "--admin ADDRESS"];
    check_output(&run(&["routes", "--file", "other.yaml"]), 1, &parts);
    // A faulty file still says whom to ask where it can.
    let faulty = yaml.replace("relay:\n", "relay:\n  strange: 1\n");
    fs::write(directory.path().join("sidecar.yaml"), faulty).expect("a file is written");
    let parts = ["sidecar.yaml does not hold", "asking its `admin.address`", "in force"];
    check_output(&run(&["routes"]), 0, &parts);
    fs::write(directory.path().join("sidecar.yaml"), "relay: [\n").expect("a file is written");
    for command in ["routes", "config"] {
        check_output(&run(&[command]), 1, &["sidecar.yaml does not hold", "--admin ADDRESS"]);
    }
    check_output(&run(&["routes", "--admin", "21083"]), 1, &["\"21083\" is not an address"]);
}

#[test]
fn a_process_that_is_not_there_has_an_exit_code_of_its_own() {
    let nobody = Nobody::new();
    let address = nobody.address().to_string();
    for arguments in [["routes", "--admin"], ["config", "--admin"]] {
        let arguments = [arguments[0], arguments[1], &address];
        check(&arguments, 3, &["cannot reach", "is `admin` in the file"]);
    }
    check(&["explain", "x.localhost", "--admin", &address], 3, &["cannot reach"]);
}

#[test]
fn completions_are_scripts_that_shells_read() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = check(&["completions", shell], 0, &["sidelane", "expose", "explain"]);
        if shell == "bash" {
            let status = Command::new("bash").args(["-n", "-c", &script]).status();
            assert!(status.expect("bash starts").success());
        }
    }
    check(&["completions", "csh"], 2, &["possible values"]);
}

#[test]
fn a_new_token_is_a_file_of_its_own_and_its_hash_goes_beside_it() {
    let new = run(&["token", "new"]);
    check_output(&new, 0, &["sl_", "tokens: [\"sha256:"]);
    let token = String::from_utf8(new.stdout).expect("text");
    assert_eq!(token.lines().count(), 1, "{token}");
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("token");
    fs::write(&path, token).expect("a file is written");
    let hash = Command::new(program())
        .args(["token", "hash"])
        .stdin(File::open(&path).expect("the file"))
        .output()
        .expect("the program starts");
    let hash = check_output(&hash, 0, &["sha256:"]);
    let line = String::from_utf8(new.stderr).expect("text");
    assert_eq!(line, format!("tokens: [\"{}\"]\n", hash.trim_end()));
    check(&["token", "hash"], 1, &["a token of 0 bytes (accepted: 16 to 4096)"]);
    check(&["token", "new", "--bytes", "8"], 2, &["16..=64"]);
}

#[test]
fn the_schema_is_one_of_draft_2020_12() {
    let schema: Value = serde_json::from_str(&check(&["schema"], 0, &[])).expect("JSON");
    assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
    assert!(schema["properties"]["routes"].is_object());
}

#[test]
fn man_pages_are_written_for_every_command() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    check_output(&run_in(directory.path(), &["man", "--dir", "man1"]), 0, &[]);
    for name in ["sidelane", "sidelane-run", "sidelane-expose", "sidelane-explain"] {
        let page = directory.path().join(format!("man1/{name}.1"));
        assert!(fs::read_to_string(&page).expect("a page").contains(".TH"), "{name}");
    }
    check(&["man"], 0, &[".TH sidelane"]);
}

/// A running `sidelane expose`. Killed when dropped.
struct Exposed {
    child: Child,
    directory: TempDir,
}

impl Exposed {
    fn start(arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let file = |name: &str| File::create(directory.path().join(name)).expect("a file");
        let child = Command::new(program())
            .current_dir(directory.path())
            .arg("expose")
            .args(arguments)
            .env("SIDELANE_PLUGIN_DIR", build_directory())
            .stdin(Stdio::null())
            .stdout(file("out"))
            .stderr(file("err"))
            .spawn()
            .expect("the program starts");
        Self { child, directory }
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.directory.path().join(name)).expect("a file")
    }

    /// Waits for a whole line of the output that has each part, and returns it.
    fn line(&self, parts: &[&str]) -> String {
        wait::until(&format!("a line with {parts:?}"), || {
            let out = self.read("out");
            let whole = out.rfind('\n').map_or("", |end| &out[..end]);
            let found = whole.lines().find(|line| parts.iter().all(|part| line.contains(part)));
            found.map(str::to_owned)
        })
    }

    /// Returns host and port of the address that it prints.
    fn address(&self) -> (String, u16) {
        let line = self.line(&["http://", " -> "]);
        let url = line.split(' ').next().expect("a line has words");
        let authority = url.trim_start_matches("http://").trim_end_matches('/');
        let (host, port) = authority.split_once(':').expect("a port");
        (host.to_owned(), port.parse().expect("a number"))
    }

    /// Waits for its end, and returns its exit code and what it wrote.
    fn end(mut self) -> (Option<i32>, String) {
        let status = wait::until("the end of expose", || {
            self.child.try_wait().expect("a child can be asked")
        });
        (status.code(), format!("{}{}", self.read("out"), self.read("err")))
    }

    fn interrupt(self) -> (Option<i32>, String) {
        let id = self.child.id().to_string();
        let status = Command::new("kill").args(["-INT", &id]).status().expect("kill starts");
        assert!(status.success());
        self.end()
    }
}

impl Drop for Exposed {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ask(address: SocketAddr, host: &str, path: &str) -> u16 {
    let request = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
    client::request(address, "GET", request).head.status
}

#[test]
fn expose_gives_a_service_an_address_and_shows_its_requests() {
    let Some(curl) = Curl::find("expose_gives_a_service_an_address_and_shows_its_requests") else {
        return;
    };
    let service = Service::ok();
    let port = service.address().port().to_string();
    let exposed = Exposed::start(&[&port, "--listen", "127.0.0.1:0"]);
    let (host, listening) = exposed.address();
    let relay = SocketAddr::from(([127, 0, 0, 1], listening));
    let words: Vec<&str> = host.split('.').next().expect("a label").split('-').collect();
    assert_eq!(words.len(), 3, "{host}: two words and a number");
    let url = format!("http://{host}/hello?a=b");
    let output = curl.run(relay, ["--data", "x", &url]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "ok");
    exposed.line(&["HTTP ", "POST /hello?a=b 200 ", "ms "]);
    assert_eq!(ask(relay, "other.localhost", "/"), 404);
    exposed.line(&["GET / 404 ", "no-route"]);
    let (code, wrote) = exposed.interrupt();
    assert_eq!(code, Some(0), "{wrote}");
    assert!(!wrote.contains('\x1b') && !wrote.contains("dialling again"), "{wrote}");
}

#[test]
fn expose_shows_that_the_service_is_down() {
    let nobody = Nobody::new();
    let service = nobody.address().to_string();
    let exposed = Exposed::start(&[&service, "--listen", "127.0.0.1:0"]);
    let (host, listening) = exposed.address();
    let relay = SocketAddr::from(([127, 0, 0, 1], listening));
    assert_eq!(ask(relay, &host, "/x"), 502);
    exposed.line(&["GET /x 502 ", "service-unreachable"]);
}

#[test]
fn expose_takes_a_subdomain_of_a_relay_elsewhere() {
    let service = Service::ok();
    let mut setup = Setup::of(service.address());
    setup.relay_token = Some(TOKEN.to_owned());
    let relay = Sidelane::spawn("relay", &setup.relay());
    let tunnel = relay.tunnel().to_string();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let token = directory.path().join("token");
    fs::write(&token, format!("{TOKEN}\n")).expect("a file is written");
    let token = token.to_str().expect("a path is text");
    let port = service.address().port().to_string();
    let arguments =
        [&port, "--relay", &tunnel, "--token-file", token, "--subdomain", "mine"].map(String::from);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let first = Exposed::start(&arguments);
    assert_eq!(first.address(), ("mine.localhost".to_owned(), relay.web().port()));
    assert_eq!(ask(relay.web(), "mine.localhost", "/"), 200);
    // Only the relay knows method, path and status.
    first.line(&["Z HTTP ", "ms "]);
    assert!(first.read("out").contains("method, path and status are the relay's"));

    let second = Exposed::start(&arguments);
    let (code, wrote) = second.end();
    assert_eq!(code, Some(1), "{wrote}");
    assert!(wrote.contains("does not give the address mine: route mine: taken"), "{wrote}");
    assert!(wrote.contains("try another --subdomain"), "{wrote}");
    assert!(!wrote.contains("document waits"), "it does not, it has ended: {wrote}");
    assert_eq!(ask(relay.web(), "mine.localhost", "/"), 200, "the first one keeps it");

    let (code, wrote) = first.interrupt();
    assert_eq!(code, Some(0), "{wrote}");
}

#[test]
fn expose_gives_up_a_subdomain_that_the_relay_has_itself() {
    let service = Service::ok();
    let relay = Sidelane::spawn("relay", &Setup::of(service.address()).relay_with_routes());
    let tunnel = relay.tunnel().to_string();
    let (code, wrote) = Exposed::start(&["3000", "--relay", &tunnel, "--subdomain", "api"]).end();
    assert_eq!(code, Some(1), "{wrote}");
    assert!(wrote.contains("does not give the address api"), "{wrote}");
}

#[test]
fn expose_says_why_a_relay_lets_it_not_in() {
    let service = Service::ok();
    let mut setup = Setup::of(service.address());
    setup.relay_token = Some(TOKEN.to_owned());
    let relay = Sidelane::spawn("relay", &setup.relay());
    let tunnel = relay.tunnel().to_string();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let token = directory.path().join("token");
    fs::write(&token, "another-token-of-16-bytes").expect("a file is written");
    let token = token.to_str().expect("a path is text");
    let (code, wrote) = Exposed::start(&["3000", "--relay", &tunnel, "--token-file", token]).end();
    assert_eq!(code, Some(1), "{wrote}");
    assert!(
        wrote.contains("no session with the relay") && wrote.contains("the token is not one"),
        "{wrote}"
    );
    drop(relay);
    let (code, wrote) = Exposed::start(&["3000", "--relay", &tunnel, "--token-file", token]).end();
    assert_eq!(code, Some(1), "{wrote}");
    assert!(wrote.contains("refused"), "{wrote}");
}

#[test]
fn expose_says_what_it_cannot_do_before_it_begins() {
    check(&["expose"], 2, &["Usage"]);
    check(&["expose", "app"], 1, &["PORT|HOST:PORT: \"app\" is not an address"]);
    let nowhere = check(&["expose", "3000", "--plugin-dir", "/nowhere"], 1, &["/nowhere"]);
    assert!(nowhere.contains("SIDELANE_PLUGIN_DIR"), "{nowhere}");
    let directory = build_directory().to_str().expect("a path is text");
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    let arguments = ["expose", "3000", "--plugin-dir", directory, "--listen", &address];
    check(&arguments, 1, &["cannot listen on", &address]);
    let arguments = ["expose", "3000", "--plugin-dir", directory, "--protocol", "SMTP"];
    check(&arguments, 1, &["--protocol: no plugin serves protocol type \"SMTP\""]);
}
