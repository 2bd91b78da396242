//! The program as a child process: its files, its ports, its signals, its memory, its metrics.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::client::{self, Answer};
use crate::wait;

/// The base domain of every test.
pub const BASE_DOMAIN: &str = "localhost";
/// What tests run and load: the program, its plugins, the demo's service, and a peer written in Rust.
const PACKAGES: &[&str] = &[
    "sidelane",
    "sidelane-http-plugin",
    "sidelane-websocket-plugin",
    "sidelane-grpc-plugin",
    "line-rust",
    "sidelane-demo-service",
    "sidelane-e2e-tonic",
];
/// How long the program may take to end after SIGTERM: its drain deadline in these tests, and room.
const END_DEADLINE: Duration = Duration::from_secs(30);

/// What the files of a test say. Every address is given port 0.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Tunnels: name and service.
    pub tunnels: Vec<(String, SocketAddr)>,
    /// Routes.
    pub routes: Vec<Route>,
    /// Token of the tunnel's listener; without one both ends must be on loopback.
    pub relay_token: Option<String>,
    /// Token that the sidecar shows.
    pub sidecar_token: Option<String>,
    /// YAML flow mapping: the HTTP plugin's configuration block.
    pub http_config: String,
    /// Library of the HTTP plugin.
    pub library: PathBuf,
    /// Plugins beside the HTTP plugin.
    pub plugins: Vec<Plugin>,
    /// Deadline of a drain.
    pub drain: &'static str,
    /// Where clients connect.
    pub web: &'static str,
}

/// A plugin of a test, beside the HTTP plugin.
#[derive(Clone, Debug)]
pub struct Plugin {
    /// Name.
    pub name: &'static str,
    /// Library.
    pub library: PathBuf,
    /// YAML flow mapping: its configuration block.
    pub config: String,
}

/// A route of a test.
#[derive(Clone, Debug)]
pub struct Route {
    /// Name.
    pub name: String,
    /// Subdomain of [`BASE_DOMAIN`].
    pub subdomain: String,
    /// Path prefix; empty: any.
    pub path_prefix: String,
    /// Tunnel.
    pub tunnel: String,
    /// YAML flow mapping: a block per protocol type; empty: none.
    pub options: String,
}

impl Setup {
    /// One service behind `http://api.localhost/`.
    #[must_use]
    pub fn of(service: SocketAddr) -> Self {
        Self {
            tunnels: vec![("api".to_owned(), service)],
            routes: vec![Route::new("api", "api")],
            relay_token: None,
            sidecar_token: None,
            http_config: "{}".to_owned(),
            library: library(),
            plugins: Vec::new(),
            drain: "10s",
            web: "127.0.0.1:0",
        }
    }

    /// Loads the WebSocket plugin, with a configuration block.
    #[must_use]
    pub fn websocket(self, config: &str) -> Self {
        self.plugin("websocket", "libsidelane_websocket.so", config)
    }

    /// Loads the gRPC plugin, with a configuration block.
    #[must_use]
    pub fn grpc(self, config: &str) -> Self {
        self.plugin("grpc", "libsidelane_grpc.so", config)
    }

    fn plugin(mut self, name: &'static str, library: &str, config: &str) -> Self {
        let library = build_directory().join(library);
        self.plugins.push(Plugin { name, library, config: config.to_owned() });
        self
    }

    /// Gives the first route a block per protocol type.
    #[must_use]
    pub fn options(mut self, options: &str) -> Self {
        self.routes[0].options = options.to_owned();
        self
    }

    /// Adds a tunnel to a service.
    #[must_use]
    pub fn tunnel(mut self, name: &str, service: SocketAddr) -> Self {
        self.tunnels.push((name.to_owned(), service));
        self
    }

    /// Adds a route.
    #[must_use]
    pub fn route(mut self, route: Route) -> Self {
        self.routes.push(route);
        self
    }

    /// Relay and sidecar in one file.
    #[must_use]
    pub fn both(&self) -> String {
        format!("{}{}{}", self.relay_section(), self.sidecar_section(None), self.shared(true))
    }

    /// A relay's file that holds the routes itself.
    #[must_use]
    pub fn relay_with_routes(&self) -> String {
        format!("{}{}", self.relay_section(), self.shared(true))
    }

    /// A relay's file; what it serves is announced by sidecars.
    #[must_use]
    pub fn relay(&self) -> String {
        format!("{}{}", self.relay_section(), self.shared(false))
    }

    /// A sidecar's file, which dials `tunnel`.
    #[must_use]
    pub fn sidecar(&self, tunnel: SocketAddr) -> String {
        format!("{}{}", self.sidecar_section(Some(tunnel)), self.shared(true))
    }

    fn relay_section(&self) -> String {
        let token = token(self.relay_token.as_deref());
        format!(
            "relay:
  listeners:
    - {{ name: web, address: \"{web}\" }}
  base_domains: [{BASE_DOMAIN}]
  tunnel: {{ address: \"127.0.0.1:0\"{token} }}
",
            web = self.web,
        )
    }

    fn sidecar_section(&self, tunnel: Option<SocketAddr>) -> String {
        let mut text = "sidecar:\n  name: e2e\n".to_owned();
        if let Some(tunnel) = tunnel {
            text += &format!("  relays: [\"{tunnel}\"]\n");
        }
        if let Some(token) = &self.sidecar_token {
            text += &format!("  token: \"{token}\"\n");
        }
        text
    }

    fn shared(&self, announces: bool) -> String {
        let mut text = format!("version: 1\ndrain_timeout: {}\n", self.drain);
        if announces {
            text += "tunnels:\n";
            for (name, service) in &self.tunnels {
                text += &format!("  - {{ name: {name}, service: \"{service}\" }}\n");
            }
            text += "routes:\n";
            for route in &self.routes {
                text += &route.yaml();
            }
        }
        text += "plugins:\n  libraries:\n";
        text += &library_yaml("http", &self.library, &self.http_config);
        for plugin in &self.plugins {
            text += &library_yaml(plugin.name, &plugin.library, &plugin.config);
        }
        text + "health: { address: \"127.0.0.1:0\" }
admin: { address: \"127.0.0.1:0\" }
log: { level: debug, format: text }
"
    }
}

fn library_yaml(name: &str, library: &Path, config: &str) -> String {
    format!("    - {{ name: {name}, library: \"{}\", config: {config} }}\n", library.display())
}

fn token(token: Option<&str>) -> String {
    token.map(|token| format!(", token: \"{token}\"")).unwrap_or_default()
}

impl Route {
    /// A route of a subdomain, named as it.
    #[must_use]
    pub fn new(subdomain: &str, tunnel: &str) -> Self {
        Self {
            name: subdomain.to_owned(),
            subdomain: subdomain.to_owned(),
            path_prefix: String::new(),
            tunnel: tunnel.to_owned(),
            options: String::new(),
        }
    }

    /// The same under a path prefix.
    #[must_use]
    pub fn under(mut self, path_prefix: &str) -> Self {
        self.path_prefix = path_prefix.to_owned();
        self
    }

    /// The same by another name.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        self.name = name.to_owned();
        self
    }

    fn yaml(&self) -> String {
        let prefix = if self.path_prefix.is_empty() {
            String::new()
        } else {
            format!(", path_prefix: \"{}\"", self.path_prefix)
        };
        let options = if self.options.is_empty() {
            String::new()
        } else {
            format!(", options: {}", self.options)
        };
        format!(
            "  - {{ name: {}, subdomain: {}{prefix}, tunnel: {}{options} }}\n",
            self.name, self.subdomain, self.tunnel
        )
    }
}

/// Returns where the program and its plugins were built; builds them where nobody did.
#[must_use]
pub fn build_directory() -> &'static Path {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| {
        if let Some(directory) = std::env::var_os("SIDELANE_BUILD_DIR") {
            return PathBuf::from(directory);
        }
        // This test is <directory>/deps/<name>; what stands in <directory> may be of another day.
        let test = std::env::current_exe().expect("a test has a path");
        let directory = test.ancestors().nth(2).expect("tests are built in deps/").to_path_buf();
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet"]);
        cargo.args(PACKAGES.iter().flat_map(|package| ["--package", package]));
        if directory.ends_with("release") {
            cargo.arg("--release");
        }
        cargo.env("CARGO_TARGET_DIR", directory.parent().expect("a profile's directory"));
        let status = cargo.status().expect("cargo starts");
        assert!(status.success(), "the program builds");
        directory
    })
}

/// Returns the program.
#[must_use]
pub fn program() -> PathBuf {
    build_directory().join("sidelane")
}

/// Returns the HTTP plugin's library.
#[must_use]
pub fn library() -> PathBuf {
    build_directory().join("libsidelane_http.so")
}

/// Returns the library of the line protocol's example plugin: byte-born, of type LINE.
#[must_use]
pub fn line_library() -> PathBuf {
    build_directory().join("libline_rust.so")
}

/// A running program. Killed when dropped; its log is shown where the test failed.
#[derive(Debug)]
pub struct Sidelane {
    child: Child,
    directory: TempDir,
    name: &'static str,
    ports: Value,
}

impl Sidelane {
    /// Starts a program with a file of this text, and waits until its listeners stand.
    #[must_use]
    pub fn spawn(name: &'static str, yaml: &str) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        write_file(&directory.path().join("sidecar.yaml"), yaml);
        Self::spawn_in(name, directory, "sidecar.yaml")
    }

    /// Starts a program with a file that stands in a directory, as a test has laid it out.
    #[must_use]
    pub fn spawn_in(name: &'static str, directory: TempDir, file: &str) -> Self {
        let ports_file = directory.path().join("ports.json");
        let log = File::create(directory.path().join("log")).expect("a log file");
        let child = Command::new(program())
            .current_dir(directory.path())
            .args(["run", file, "--ports-file", "ports.json"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file can be shared"))
            .stderr(log)
            .spawn()
            .expect("the program starts");
        let mut sidelane = Self { child, directory, name, ports: Value::Null };
        sidelane.ports = wait::until("the program's listeners", || {
            if let Ok(Some(status)) = sidelane.child.try_wait() {
                panic!("{name} ended at start: {status}");
            }
            serde_json::from_slice(&fs::read(&ports_file).ok()?).ok()
        });
        sidelane
    }

    /// Starts a program, and waits until `/ready` says yes.
    #[must_use]
    pub fn start(name: &'static str, yaml: &str) -> Self {
        let sidelane = Self::spawn(name, yaml);
        sidelane.until_ready();
        sidelane
    }

    /// Relay and sidecar in one process, ready.
    #[must_use]
    pub fn both(setup: &Setup) -> Self {
        Self::start("sidelane", &setup.both())
    }

    /// Waits until `/ready` says yes.
    pub fn until_ready(&self) {
        wait::until("/ready", || {
            (self.get(self.health(), "/ready").head.status == 200).then_some(())
        });
    }

    /// Returns the process's id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Returns where clients connect.
    #[must_use]
    pub fn web(&self) -> SocketAddr {
        self.address(&["listeners", "web"])
    }

    /// Returns where clients of a listener of that name connect.
    #[must_use]
    pub fn listener(&self, name: &str) -> SocketAddr {
        self.address(&["listeners", name])
    }

    /// Returns where sidecars connect.
    #[must_use]
    pub fn tunnel(&self) -> SocketAddr {
        self.address(&["tunnel"])
    }

    /// Returns the health listener's address.
    #[must_use]
    pub fn health(&self) -> SocketAddr {
        self.address(&["health"])
    }

    /// Returns the admin listener's address.
    #[must_use]
    pub fn admin(&self) -> SocketAddr {
        self.address(&["admin"])
    }

    fn address(&self, path: &[&str]) -> SocketAddr {
        let value = path.iter().fold(&self.ports, |value, key| &value[key]);
        let text = value.as_str().unwrap_or_else(|| panic!("no {path:?} in {}", self.ports));
        text.parse().expect("an address")
    }

    /// Returns the configuration file.
    #[must_use]
    pub fn file(&self) -> PathBuf {
        self.directory.path().join("sidecar.yaml")
    }

    /// Replaces the configuration file by a rename, as editors do.
    pub fn rewrite(&self, yaml: &str) {
        let fresh = self.directory.path().join("sidecar.yaml.fresh");
        write_file(&fresh, yaml);
        fs::rename(&fresh, self.file()).expect("the file is replaced");
    }

    /// Returns the answer to a GET on one of the program's own listeners.
    #[must_use]
    pub fn get(&self, address: SocketAddr, path: &str) -> Answer {
        client::request(
            address,
            "GET",
            format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"),
        )
    }

    /// Returns a JSON page of the admin listener.
    #[must_use]
    pub fn admin_page(&self, path: &str) -> Value {
        let answer = self.get(self.admin(), path);
        assert_eq!(answer.head.status, 200, "{path}");
        serde_json::from_slice(&answer.body).expect("JSON")
    }

    /// Returns the metrics page.
    #[must_use]
    pub fn metrics(&self) -> String {
        String::from_utf8(self.get(self.health(), "/metrics").body).expect("metrics are text")
    }

    /// Returns the sum of a metric's samples whose labels contain each of `labels`
    /// (`code="no-route"`); `None` where there is no such sample.
    #[must_use]
    pub fn metric(&self, name: &str, labels: &[&str]) -> Option<f64> {
        sum_samples(&self.metrics(), name, labels)
    }

    /// Waits until a metric's sum fulfils a condition. A sample that is not there counts as 0.
    pub fn until_metric(&self, name: &str, labels: &[&str], condition: impl Fn(f64) -> bool) {
        wait::until(&format!("{name}{labels:?} in metrics"), || {
            condition(self.metric(name, labels).unwrap_or(0.0)).then_some(())
        });
    }

    /// Returns what the program logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        let bytes = fs::read(self.directory.path().join("log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Sends a signal, by the name that `kill` takes.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill")
            .args([&format!("-{name}"), &self.child.id().to_string()])
            .status()
            .expect("kill starts");
        assert!(status.success(), "kill -{name}");
    }

    /// Kills the program, as SIGKILL does, and waits for its end.
    pub fn kill(mut self) {
        self.child.kill().expect("the program can be killed");
        self.child.wait().expect("the program ends");
    }

    /// Waits until the program has ended by itself.
    pub fn ended(&mut self) -> ExitStatus {
        wait::within(END_DEADLINE, "the program's end", || {
            self.child.try_wait().expect("the program is ours to wait for")
        })
    }

    /// Returns the largest resident size so far, in bytes.
    #[must_use]
    pub fn memory_peak(&self) -> u64 {
        self.memory("VmHWM")
    }

    /// Returns the resident size, in bytes.
    #[must_use]
    pub fn memory_resident(&self) -> u64 {
        self.memory("VmRSS")
    }

    fn memory(&self, row: &str) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let status = fs::read_to_string(path).expect("the program runs");
        let line = status.lines().find(|line| line.starts_with(row)).expect("the row stands there");
        let kib = line.split_whitespace().nth(1).and_then(|text| text.parse::<u64>().ok());
        kib.expect("a number of KiB") * 1024
    }
}

impl Drop for Sidelane {
    fn drop(&mut self) {
        // Fails where it has ended already, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<_> = log.lines().rev().take(60).collect();
            eprintln!("---- {} ----", self.name);
            for line in tail.iter().rev() {
                eprintln!("{line}");
            }
        }
    }
}

fn write_file(path: &Path, text: &str) {
    fs::write(path, text).expect("the directory is ours");
}

fn sum_samples(page: &str, name: &str, labels: &[&str]) -> Option<f64> {
    let samples = page.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let (sample, value) = rest.rsplit_once(' ')?;
        let whole_name = sample.is_empty() || sample.starts_with('{');
        let all = labels.iter().all(|label| sample.contains(label));
        if whole_name && all { value.parse::<f64>().ok() } else { None }
    });
    samples.fold(None, |sum, value| Some(sum.unwrap_or(0.0) + value))
}

#[cfg(test)]
mod tests {
    use super::sum_samples;

    #[test]
    fn samples_are_summed_over_matching_labels() {
        let page = "# TYPE a counter\na_total{x=\"1\",y=\"2\"} 3\na_total{x=\"1\"} 4\na_total{x=\"2\"} 8\na_total_created 9\nb 1.5\n";
        assert_eq!(sum_samples(page, "a_total", &[]), Some(15.0));
        assert_eq!(sum_samples(page, "a_total", &["x=\"1\""]), Some(7.0));
        assert_eq!(sum_samples(page, "b", &[]), Some(1.5));
        assert_eq!(sum_samples(page, "c", &[]), None);
    }
}
