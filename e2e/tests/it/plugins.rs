//! Plugins that other teams write: a byte-born protocol on a listener of its own, and libraries that
//! are replaced while their exchanges run.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};

use sidelane_e2e::process::{Sidelane, library, line_library};
use sidelane_e2e::service::Service;
use sidelane_e2e::wait;

/// The program with HTTP and the line protocol, each with a listener.
pub(crate) fn yaml(line: &Path, service: SocketAddr) -> String {
    let http = library();
    format!(
        r#"version: 1
relay:
  listeners:
    - {{ name: web, address: "127.0.0.1:0" }}
    - {{ name: lines, address: "127.0.0.1:0", protocol_type: LINE }}
  base_domains: [localhost]
  tunnel: {{ address: "127.0.0.1:0" }}
sidecar: {{}}
tunnels: [{{ name: echo, service: "{service}" }}]
routes: [{{ listener: lines, tunnel: echo }}]
plugins:
  libraries:
    - {{ name: http, library: "{}" }}
    - {{ name: line, library: "{}" }}
health: {{ address: "127.0.0.1:0" }}
admin: {{ address: "127.0.0.1:0" }}
"#,
        http.display(),
        line.display(),
    )
}

/// Sends back what comes, until the client has ended its direction.
pub(crate) fn echo() -> Service {
    Service::start(|connection| {
        loop {
            let bytes = connection.some()?;
            if bytes.is_empty() {
                return Ok(());
            }
            connection.write(&bytes)?;
        }
    })
}

/// A copy of the line plugin in a directory of its own, so that it can be replaced.
pub(crate) struct Line {
    directory: tempfile::TempDir,
}

impl Line {
    pub(crate) fn new() -> Self {
        let line = Self { directory: tempfile::tempdir().expect("a temporary directory") };
        line.replace(&fs::read(line_library()).expect("the library is built"));
        line
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().join("libline.so")
    }

    /// Puts other bytes in its place as a careful deployment does: whole, by a rename.
    fn replace(&self, bytes: &[u8]) {
        let part = self.directory.path().join("part");
        fs::write(&part, bytes).expect("the directory is ours");
        fs::rename(part, self.path()).expect("the directory is ours");
    }

    /// Another content that is the same plugin.
    fn rebuilt(&self) -> Vec<u8> {
        let mut bytes = fs::read(self.path()).expect("it is there");
        bytes.extend(b"rebuilt");
        bytes
    }
}

pub(crate) fn connect(sidelane: &Sidelane) -> TcpStream {
    let stream = TcpStream::connect(sidelane.listener("lines")).expect("the listener stands");
    stream.set_read_timeout(Some(wait::DEADLINE)).expect("a deadline");
    stream
}

pub(crate) fn says_back(stream: &mut TcpStream, line: &str) {
    stream.write_all(line.as_bytes()).expect("the relay reads");
    let mut back = vec![0; line.len()];
    stream.read_exact(&mut back).expect("the line comes back");
    assert_eq!(back, line.as_bytes());
}

/// States of the line plugin's generations, oldest first.
fn generations(sidelane: &Sidelane) -> Vec<String> {
    let plugins = sidelane.admin_page("/plugins");
    let all = plugins.as_array().expect("a list");
    let lines = all.iter().filter(|plugin| plugin["name"] == "line");
    lines.map(|plugin| plugin["state"].as_str().expect("a state").to_owned()).collect()
}

#[test]
fn byte_born_protocol_has_a_listener_of_its_own() {
    let (line, service) = (Line::new(), echo());
    let sidelane = Sidelane::start("sidelane", &yaml(&line.path(), service.address()));
    let mut client = connect(&sidelane);
    says_back(&mut client, "one line\n");
    says_back(&mut client, "and HTTP/1.1 is just bytes\r\n\r\n");
    client.shutdown(Shutdown::Write).expect("open");
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).expect("the service ends after its client");
    assert!(rest.is_empty(), "{rest:?}");
    let ended = ["role=\"relay\"", "protocol_type=\"LINE\"", "code=\"none\""];
    sidelane.until_metric("sidelane_exchanges_total", &ended, |count| count >= 1.0);
}

#[test]
fn megabytes_pass_a_byte_born_exchange_both_ways() {
    let (line, service) = (Line::new(), echo());
    let sidelane = Sidelane::start("sidelane", &yaml(&line.path(), service.address()));
    let mut client = connect(&sidelane);
    let mut writer = client.try_clone().expect("a second handle");
    let sent: Vec<u8> = (0..8_000_000u32).map(|n| (n % 251) as u8).collect();
    let copy = sent.clone();
    let writing = std::thread::spawn(move || {
        writer.write_all(&copy).expect("the relay reads");
        writer.shutdown(Shutdown::Write).expect("open");
    });
    let mut back = Vec::with_capacity(sent.len());
    client.read_to_end(&mut back).expect("all comes back");
    writing.join().expect("all was written");
    assert!(back == sent, "{} bytes came back of {}", back.len(), sent.len());
}

#[test]
fn replaced_library_takes_new_exchanges_and_the_old_one_ends_its_own() {
    let (line, service) = (Line::new(), echo());
    let sidelane = Sidelane::start("sidelane", &yaml(&line.path(), service.address()));
    let mut old = connect(&sidelane);
    says_back(&mut old, "before\n");
    assert_eq!(generations(&sidelane), ["current"]);

    line.replace(&line.rebuilt());
    sidelane.signal("HUP");
    wait::until("a second generation", || {
        (generations(&sidelane) == ["draining", "current"]).then_some(())
    });
    let mut new = connect(&sidelane);
    says_back(&mut new, "after\n");
    says_back(&mut old, "still here\n");

    drop(old);
    wait::until("the old generation's end", || {
        (generations(&sidelane) == ["retired", "current"]).then_some(())
    });
    says_back(&mut new, "and on\n");
}

#[test]
fn library_that_went_bad_is_refused_and_the_old_one_serves_on() {
    let (line, service) = (Line::new(), echo());
    let sidelane = Sidelane::start("sidelane", &yaml(&line.path(), service.address()));
    let mut client = connect(&sidelane);
    says_back(&mut client, "before\n");

    line.replace(b"not a library at all\n");
    sidelane.signal("HUP");
    let labels = ["result=\"failure\""];
    sidelane.until_metric("sidelane_config_reloads_total", &labels, |count| count >= 1.0);
    assert!(sidelane.log().contains("libline.so"), "the log names the file");
    says_back(&mut client, "after\n");
    says_back(&mut connect(&sidelane), "new ones too\n");
    assert_eq!(generations(&sidelane), ["current"]);
}
