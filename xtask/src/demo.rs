//! `cargo demo`: the whole path on one machine, from a clean clone, ended by Ctrl-C.

use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::pin::pin;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, sleep, timeout};

use crate::workspace::{self, DEMO_PACKAGE, PROGRAM_PACKAGES};

/// How long a freshly built program may take to answer `/ready`; a slow disk needs a second.
const READY_DEADLINE: Duration = Duration::from_secs(30);
/// How long a child may take to end after SIGTERM; longer than sidecar.yaml's drain deadline.
const END_DEADLINE: Duration = Duration::from_secs(40);
/// One probe of `/ready`.
const PROBE_DEADLINE: Duration = Duration::from_secs(2);
/// Between two probes.
const PROBE_INTERVAL: Duration = Duration::from_millis(50);

/// Builds in release mode, starts everything, and waits for Ctrl-C.
pub(crate) fn run() -> Result<()> {
    let ports = Ports::from_environment()?;
    // Before minutes of building, not after.
    ports.require_free()?;
    let mut packages = PROGRAM_PACKAGES.to_vec();
    packages.push(DEMO_PACKAGE);
    println!(
        "building sidelane, its plugins and the demo service (release; some minutes the first time)"
    );
    workspace::build("release", &packages)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start a runtime")?;
    runtime.block_on(serve(&ports))
}

async fn serve(ports: &Ports) -> Result<()> {
    let binaries = workspace::target().join("release");

    // Registered before the first child starts, so that an early Ctrl-C cannot orphan one.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;

    let mut service = spawn(
        &binaries.join(DEMO_PACKAGE),
        &[OsString::from(format!("127.0.0.1:{}", ports.service))],
        &[],
    )?;
    let mut sidelane = spawn(
        &binaries.join("sidelane"),
        &[OsString::from("run"), OsString::from("sidecar.yaml")],
        &[(OsString::from("SIDELANE_PLUGIN_DIR"), binaries.clone().into_os_string())],
    )?;

    let ended = tokio::select! {
        outcome = introduce(ports) => match outcome {
            Ok(()) => tokio::select! {
                status = sidelane.wait() => Err(died("sidelane", status)),
                status = service.wait() => Err(died("the demo service", status)),
                _ = interrupt.recv() => Ok(()),
                _ = terminate.recv() => Ok(()),
            },
            Err(error) => Err(error),
        },
        status = sidelane.wait() => Err(died("sidelane", status)),
        status = service.wait() => Err(died("the demo service", status)),
        _ = interrupt.recv() => Ok(()),
        _ = terminate.recv() => Ok(()),
    };

    println!("ending; Ctrl-C again cuts what still runs, the page's events for one");
    // Sidelane first: its exchanges end while the service still answers.
    let sidelane_end = end(&mut sidelane, "sidelane", &mut interrupt).await;
    let service_end = end(&mut service, "the demo service", &mut interrupt).await;
    ended.and(sidelane_end).and(service_end)
}

/// The ports of sidecar.yaml, by the names of environment variables that stand there.
struct Ports {
    http: u16,
    tunnel: u16,
    health: u16,
    admin: u16,
    service: u16,
    base_domain: String,
}

impl Ports {
    fn from_environment() -> Result<Self> {
        Ok(Self {
            http: port("HTTP_PORT", 9080)?,
            tunnel: port("WS_PORT", 9081)?,
            health: port("HEALTH_PORT", 9082)?,
            admin: port("ADMIN_PORT", 9083)?,
            service: port("DEMO_PORT", 3000)?,
            base_domain: std::env::var("BASE_DOMAIN").unwrap_or_else(|_| "localhost".to_owned()),
        })
    }

    /// A taken port is the demo's most likely failure; says which variable moves it.
    fn require_free(&self) -> Result<()> {
        for (variable, port) in [
            ("HTTP_PORT", self.http),
            ("WS_PORT", self.tunnel),
            ("HEALTH_PORT", self.health),
            ("ADMIN_PORT", self.admin),
            ("DEMO_PORT", self.service),
        ] {
            TcpListener::bind((Ipv4Addr::LOCALHOST, port)).with_context(|| {
                format!("port {port} is taken; choose another with {variable}=<port> cargo demo")
            })?;
        }
        Ok(())
    }
}

fn port(variable: &str, default: u16) -> Result<u16> {
    match std::env::var(variable) {
        Ok(text) => {
            text.parse().with_context(|| format!("{variable}={text}: not a port (1 to 65535)"))
        }
        Err(_) => Ok(default),
    }
}

fn spawn(
    program: &Path,
    arguments: &[OsString],
    variables: &[(OsString, OsString)],
) -> Result<Child> {
    Command::new(program)
        .current_dir(workspace::root())
        .args(arguments)
        .envs(variables.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        // A group of its own: Ctrl-C reaches this task alone, which then ends the children in order.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))
}

/// Waits until the path stands, then says where it is.
async fn introduce(ports: &Ports) -> Result<()> {
    let health = SocketAddr::from((Ipv4Addr::LOCALHOST, ports.health));
    let deadline = Instant::now() + READY_DEADLINE;
    loop {
        let last = match timeout(PROBE_DEADLINE, ready(health)).await {
            Ok(Ok(200)) => break,
            Ok(Ok(status)) => format!("status {status}"),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no answer".to_owned(),
        };
        if Instant::now() > deadline {
            bail!("http://{health}/ready: {last} after {} s", READY_DEADLINE.as_secs());
        }
        sleep(PROBE_INTERVAL).await;
    }
    let address = format!("http://demo.{}:{}/", ports.base_domain, ports.http);
    println!(
        "
  client ─▶ relay :{http} ══ tunnel :{tunnel} ══ sidecar ─▶ demo service :{service}

  open     {address}
  try      curl -v {address}
           curl -N {address}events
           curl -o /dev/null '{address}download?bytes=100000000'
           curl --data-binary 'hello' {address}echo
           npx wscat -c ws://127.0.0.1:{http}/ws -H 'Host: demo.{base_domain}'
  metrics  http://{health}/metrics
  routes   edit sidecar.yaml while this runs
  end      Ctrl-C
",
        base_domain = ports.base_domain,
        http = ports.http,
        tunnel = ports.tunnel,
        service = ports.service,
    );
    Ok(())
}

async fn ready(health: SocketAddr) -> Result<u16> {
    let mut stream = TcpStream::connect(health).await?;
    stream
        .write_all(b"GET /ready HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        .await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    status_of(&answer).context("not an HTTP answer")
}

/// Reads the status of an HTTP/1.1 answer.
fn status_of(answer: &[u8]) -> Option<u16> {
    let line = answer.split(|byte| *byte == b'\r').next()?;
    let mut words = std::str::from_utf8(line).ok()?.split(' ');
    words.next().filter(|version| version.starts_with("HTTP/1."))?;
    words.next()?.parse().ok()
}

fn died(name: &str, status: std::io::Result<ExitStatus>) -> anyhow::Error {
    match status {
        Ok(status) => anyhow::anyhow!("{name} ended by itself: {status}"),
        Err(error) => anyhow::anyhow!("{name}: {error}"),
    }
}

/// Asks a child to end, and waits; each interrupt asks once more, and past the deadline it is killed.
async fn end(child: &mut Child, name: &str, interrupt: &mut Signal) -> Result<()> {
    let Some(id) = child.id() else { return Ok(()) };
    ask_to_end(id, name).await?;
    let outcome = {
        let mut ended = pin!(timeout(END_DEADLINE, child.wait()));
        loop {
            tokio::select! {
                outcome = &mut ended => break outcome,
                _ = interrupt.recv() => ask_to_end(id, name).await?,
            }
        }
    };
    match outcome {
        Ok(status) => {
            let status = status?;
            if !status.success() {
                bail!("{name} ended with {status}");
            }
            Ok(())
        }
        Err(_) => {
            child.kill().await?;
            bail!("{name} did not end within {} s and was killed", END_DEADLINE.as_secs());
        }
    }
}

async fn ask_to_end(id: u32, name: &str) -> Result<()> {
    // By the `kill` program: sending a signal from std or tokio needs a crate more.
    let asked = Command::new("kill").args(["-TERM", &id.to_string()]).status().await?;
    if !asked.success() {
        bail!("{name}: cannot be asked to end");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::status_of;

    #[test]
    fn status_is_read_from_the_first_line() {
        assert_eq!(status_of(b"HTTP/1.1 200 OK\r\nx: 1\r\n\r\n"), Some(200));
        assert_eq!(status_of(b"HTTP/1.1 503\r\n\r\n"), Some(503));
        assert_eq!(status_of(b"SSH-2.0-x\r\n"), None);
        assert_eq!(status_of(b""), None);
    }
}
