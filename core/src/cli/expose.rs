//! `expose`: one service at an address of its own, without a file.
//!
//! Writes the configuration that a user would, and runs the ordinary process with it; beside it, a thread
//! prints the address once the relay has accepted it, and a line for each exchange.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use clap::Args;
use serde_json::{Value as Json, json};
use tokio::sync::oneshot;

use super::{Failed, Paint};
use crate::config::{self, Source};
use crate::error::{chain, visible};
use crate::process::{self, Followed, RunError};
use crate::random;

mod live;
mod names;
mod plugins;

use live::View;

/// Where the relay of this process takes clients.
const LISTEN: &str = "127.0.0.1:9080";

/// What stands before the errors of the configuration: no file is to blame.
const SOURCE: &str = "expose";

/// For running exchanges after Ctrl-C: pages under development keep streams open for ever.
const DRAIN_TIMEOUT: &str = "5s";

/// For the last lines to be printed: a reader that hangs must not keep the process.
const LAST_LINES_TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The service: a port of this machine, HOST:PORT, https://HOST:PORT, or unix:/path.
    #[arg(value_name = "PORT|HOST:PORT")]
    service: String,
    /// Label below the relay's base domain; without it two words and a number, at random.
    #[arg(long, value_name = "NAME")]
    subdomain: Option<String>,
    /// Relay's tunnel address, HOST:PORT; without it a relay runs in this process, for this machine.
    #[arg(long, value_name = "ADDRESS")]
    relay: Option<String>,
    /// PEM file of those who sign the relay's certificate; without it the system's authorities.
    #[arg(long, value_name = "FILE", requires = "relay")]
    ca: Option<PathBuf>,
    /// Name that the relay's certificate must be for; without it the host of --relay.
    #[arg(long, value_name = "NAME", requires = "relay")]
    server_name: Option<String>,
    /// Dial the relay without TLS: anybody on the way reads and changes everything, the token too.
    #[arg(long, requires = "relay", conflicts_with_all = ["ca", "server_name"])]
    insecure: bool,
    /// File with the token that the relay wants of sidecars.
    #[arg(long, value_name = "FILE", requires = "relay")]
    token_file: Option<PathBuf>,
    /// Where clients connect to the relay of this process [default: 127.0.0.1:9080].
    #[arg(long, value_name = "ADDRESS", conflicts_with = "relay")]
    listen: Option<String>,
    /// Protocol type that is carried; may be given several times. Without it all that plugins serve.
    #[arg(long, value_name = "TYPE")]
    protocol: Vec<String>,
    /// Directory of the plugins' libraries.
    #[arg(long, value_name = "DIR")]
    plugin_dir: Option<PathBuf>,
    /// Level of the process's own log, on standard error.
    #[arg(long, value_name = "LEVEL", default_value = LOG)]
    log: String,
}

/// What the sidecar says at this level is printed as what became of the address.
const LOG: &str = "error,sidelane::sidecar=off";

pub(super) fn run(arguments: &Arguments) -> Result<(), Failed> {
    let subdomain = arguments.subdomain.clone().unwrap_or_else(|| names::random(random::number()));
    let libraries = plugins::find(arguments.plugin_dir.as_deref()).map_err(Failed::said)?;
    // Two that expose the same name must not share it, as replicas of one tunnel would.
    let tunnel = format!("expose-{:016x}", random::number());
    let document = document(arguments, &subdomain, &tunnel, &libraries);
    let source = Source::from_text(SOURCE.as_ref(), document.to_string());
    let config = config::parse(&source, &|_| None).map_err(|errors| Failed::said(said(&errors)))?;
    // The log, where a start tells them, shows errors alone.
    for warning in &config.warnings {
        eprintln!("warning: {}", visible(&line(warning)));
    }
    let view = View {
        service: config.tunnels.iter().map(|tunnel| tunnel.service_text()).collect(),
        subdomain,
        is_embedded: arguments.relay.is_none(),
        is_named: arguments.subdomain.is_some(),
        paint: Paint::stdout(),
    };
    let (ended, last_lines) = mpsc::channel();
    let (done, finish) = oneshot::channel();
    let follow = Box::new(move |followed: Followed| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new().name("expose".to_owned()).spawn(move || {
            runtime.block_on(live::follow(view, followed, finish));
            // An error means that nobody waits any more.
            let _ = ended.send(());
        })?;
        Ok(())
    });
    let result = process::run_config(&source, config, None, Some(follow));
    drop(done);
    // An error means that the thread never began, or is held up by whoever reads its lines.
    let _ = last_lines.recv_timeout(LAST_LINES_TIMEOUT);
    result.map_err(|error| failed(&error, arguments))
}

/// Returns the configuration as a file has it. JSON is YAML, and quotes everything.
fn document(
    arguments: &Arguments,
    subdomain: &str,
    tunnel: &str,
    libraries: &plugins::Found,
) -> Json {
    let service = match arguments.service.parse::<u16>() {
        Ok(port) => SocketAddr::from(([127, 0, 0, 1], port)).to_string(),
        Err(_) => arguments.service.clone(),
    };
    let mut served = json!({ "name": tunnel, "service": plain(&service) });
    if !arguments.protocol.is_empty() {
        served["protocols"] = arguments.protocol.iter().map(|name| plain(name)).collect();
    }
    let mut sidecar = json!({});
    let mut document = json!({
        "version": 1,
        "tunnels": [served],
        "routes": [{ "name": plain(subdomain), "subdomain": plain(subdomain), "tunnel": tunnel }],
        "plugins": { "libraries": libraries.to_json() },
        "log": { "level": plain(&arguments.log) },
        "drain_timeout": DRAIN_TIMEOUT,
    });
    match &arguments.relay {
        Some(relay) => {
            sidecar["relays"] = json!([self::relay(arguments, relay)]);
            if let Some(file) = &arguments.token_file {
                sidecar["token_file"] = path(file);
            }
        }
        None => {
            let listen = arguments.listen.as_deref().unwrap_or(LISTEN);
            // Nobody but this process dials the tunnel's end.
            document["relay"] = json!({
                "listeners": [{ "name": "web", "address": plain(listen) }],
                "tunnel": { "address": "127.0.0.1:0" },
            });
        }
    }
    document["sidecar"] = sidecar;
    document
}

/// Returns an item of `sidecar.relays`.
fn relay(arguments: &Arguments, address: &str) -> Json {
    let Arguments { ca, server_name, insecure, .. } = arguments;
    if *insecure {
        return json!({ "address": plain(address), "insecure": true });
    }
    let mut tls = serde_json::Map::new();
    tls.extend(ca.as_deref().map(|file| ("ca".to_owned(), path(file))));
    tls.extend(server_name.as_deref().map(|name| ("server_name".to_owned(), plain(name))));
    // Without any of them the address alone says what is done: TLS, but on loopback.
    if tls.is_empty() { plain(address) } else { json!({ "address": plain(address), "tls": tls }) }
}

/// Returns a text that stays as it is: `${` would ask for a value from elsewhere.
fn plain(text: &str) -> Json {
    text.replace("${", "$${").into()
}

/// Returns a path of a file; relative ones start at the working directory, as the source does.
fn path(path: &Path) -> Json {
    plain(&path.to_string_lossy())
}

/// Says what is wrong with arguments in the words of the command line.
fn said(errors: &config::ConfigErrors) -> String {
    errors.errors().iter().map(line).collect::<Vec<_>>().join("\n")
}

fn line(error: &config::ConfigError) -> String {
    let argument = match &*error.path {
        path if path.starts_with("tunnels[0].service") => "PORT|HOST:PORT",
        path if path.starts_with("tunnels[0].protocols") => "--protocol",
        path if path.starts_with("routes[0]") => "--subdomain",
        "sidecar.relays[0].tls.ca" => "--ca",
        "sidecar.relays[0].tls.server_name" => "--server-name",
        "sidecar.relays[0].insecure" => "--insecure",
        path if path.starts_with("sidecar.relays") => "--relay",
        path if path.starts_with("sidecar.token_file") => "--token-file",
        path if path.starts_with("relay.listeners") => "--listen",
        path if path.starts_with("log") => "--log",
        path => path,
    };
    let hint = match argument {
        "--relay" if error.message.contains("token") => " (--token-file FILE gives one)",
        _ => "",
    };
    format!("{argument}: {}{hint}", error.message)
}

fn failed(error: &RunError, arguments: &Arguments) -> Failed {
    let message = match error {
        RunError::Config(errors) => said(errors),
        error => chain(error),
    };
    if message.contains("cannot listen") && arguments.listen.is_none() {
        return Failed::said(format!("{message} (--listen ADDRESS takes another)"));
    }
    Failed::said(message)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    /// Returns the configuration of a command line, or what is wrong with it.
    fn configured(line: &[&str]) -> Result<config::Config, String> {
        let line = Line::try_parse_from(["expose"].iter().chain(line)).unwrap();
        let found =
            plugins::Found::of(vec![("http".to_owned(), "/lib/libsidelane_http.so".into())]);
        let document = document(&line.arguments, "calm-otter-42", "expose-1", &found);
        let source = Source::from_text(SOURCE.as_ref(), document.to_string());
        config::parse(&source, &|_| None).map_err(|errors| said(&errors))
    }

    #[test]
    fn a_port_is_a_service_of_this_machine() {
        let config = configured(&["3000"]).unwrap();
        assert_eq!(config.tunnels[0].service.to_string(), "127.0.0.1:3000");
        assert!(config.relay.is_some() && config.health.is_none() && config.admin.is_none());
        assert_eq!(config.relay.unwrap().listeners[0].address.to_string(), LISTEN);
        let config = configured(&["app.local:80", "--relay", "127.0.0.1:9081"]).unwrap();
        assert_eq!(config.tunnels[0].service.to_string(), "app.local:80");
        assert!(config.relay.is_none());
        let config = configured(&["unix:/run/${a}.sock"]).unwrap();
        assert_eq!(config.tunnels[0].service.to_string(), "unix:/run/${a}.sock");
    }

    #[test]
    fn another_machines_relay_is_dialled_by_tls() {
        let token = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(token.path(), "0123456789abcdef").unwrap();
        let dialled = |more: &[&str]| {
            let file = token.path().to_str().unwrap();
            let line = [&["3000", "--token-file", file, "--relay"], more].concat();
            let config = configured(&line).unwrap();
            let config::Relays::Listed(mut relays) = config.sidecar.unwrap().relays else {
                panic!("no list")
            };
            let warned: Vec<String> = config.warnings.iter().map(super::line).collect();
            (relays.remove(0), warned.concat())
        };
        let (relay, warned) = dialled(&["relay.example.org:1"]);
        assert!(relay.tls.is_some_and(|tls| tls.server_name.is_none()) && warned.is_empty());
        assert!(dialled(&["127.0.0.1:1"]).0.tls.is_none());
        let (relay, _) = dialled(&["127.0.0.1:1", "--server-name", "relay.internal"]);
        assert_eq!(relay.tls.unwrap().server_name.as_deref(), Some("relay.internal"));
        let (relay, warned) = dialled(&["relay.example.org:1", "--insecure"]);
        assert!(relay.tls.is_none());
        assert!(
            warned.starts_with("--insecure: relay.example.org:1 is dialled without"),
            "{warned}"
        );
    }

    #[test]
    fn faults_are_told_by_argument() {
        let faults = [
            vec!["app"],
            vec!["3000", "--relay", "relay.example.org"],
            vec!["3000", "--relay", "relay.example.org:9081"],
            vec!["3000", "--relay", "127.0.0.1:9081", "--token-file", "/does/not/exist"],
            vec!["3000", "--relay", "127.0.0.1:9081", "--ca", "/does/not/exist"],
            vec!["3000", "--relay", "127.0.0.1:9081", "--server-name", "a:1"],
            vec!["3000", "--listen", "9080"],
            vec!["3000", "--log", "a=b=c"],
        ];
        let told: Vec<String> = faults.iter().map(|line| configured(line).unwrap_err()).collect();
        insta::assert_snapshot!(told.join("\n"), @r#"
        PORT|HOST:PORT: "app" is not an address (accepted: host:port, as in 127.0.0.1:3000, the same behind https://, or unix:/path)
        --relay: "relay.example.org" is not an address (accepted: host:port, as in relay.example.org:9081, the same behind tcp:// or tls://, or ws://, wss://, grpc:// or grpcs:// and host or host:port)
        --relay: relay.example.org:9081 is another machine and gets neither token nor certificate (accepted: a loopback address, tls.certificate, or one of token, token_file, token_env) (--token-file FILE gives one)
        --token-file: cannot read /does/not/exist: No such file or directory (os error 2)
        --ca: cannot read /does/not/exist: No such file or directory (os error 2)
        --server-name: "a:1" is not a host name (accepted: labels of letters, digits and '-', joined by dots, at most 253 characters); leave out the port
        --listen: "9080" is not an address to listen on (accepted: IP:port, as in 127.0.0.1:9080 or [::1]:9080); did you mean "127.0.0.1:9080"?
        --log: "c" is not a level (accepted: error, warn, info, debug, trace, off; also target=level, joined by commas)
        "#);
    }
}
