//! An authority that speaks ACME: Pebble, with a name server that says 127.0.0.1 for every name.
//!
//! It really looks for proofs, at the ports that a test says, and signs with keys of its own.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use serde_json::json;
use tempfile::TempDir;

use crate::tools::skip;
use crate::wait;

/// Where each of the listeners is, so that they are told apart whatever their ports.
const ACME: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 1);
const MANAGEMENT: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

/// The authority. Killed when dropped; its log is shown where the test failed.
#[derive(Debug)]
pub struct Pebble {
    children: [Child; 2],
    directory: TempDir,
    address: SocketAddr,
    management: SocketAddr,
}

/// How the authority behaves.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// Where it looks for HTTP's proof.
    pub http_port: u16,
    /// Where it looks for TLS's.
    pub tls_port: u16,
    /// The only external account (id and key, base64url) that accounts may be bound to.
    pub external_account: Option<(&'static str, &'static str)>,
    /// Of its certificates, in seconds; 0: five years.
    pub validity_seconds: u64,
}

impl Pebble {
    /// Starts an authority, or says that `test` is skipped.
    #[must_use]
    pub fn start(test: &str, rules: &Rules) -> Option<Self> {
        let is_there = |program| {
            Command::new(program)
                .arg("-h")
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .is_ok()
        };
        if !is_there("pebble") || !is_there("pebble-challtestsrv") {
            skip(test, "pebble is not installed");
            return None;
        }
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = |name: &str| directory.path().join(name);
        let log =
            || File::options().create(true).append(true).open(path("log")).expect("a log file");

        let dns = Command::new("pebble-challtestsrv")
            .args(["-dns01", "127.0.0.1:0", "-defaultIPv4", "127.0.0.1", "-defaultIPv6", ""])
            .args(["-http01", "", "-https01", "", "-tlsalpn01", "", "-management", "127.0.0.1:0"])
            .stdin(Stdio::null())
            .stdout(log())
            .stderr(log())
            .spawn()
            .expect("pebble-challtestsrv starts");
        let mut running = Running(vec![dns]);
        let dns = running.listens(0, "udp", ACME);

        make_certificate(&path("ca.pem"), &path("cert.pem"), &path("key.pem"));
        let keys: serde_json::Map<_, _> =
            rules.external_account.iter().map(|(id, key)| ((*id).to_owned(), json!(key))).collect();
        let config = json!({ "pebble": {
            "listenAddress": format!("{ACME}:0"),
            "managementListenAddress": format!("{MANAGEMENT}:0"),
            "certificate": path("cert.pem"),
            "privateKey": path("key.pem"),
            "httpPort": rules.http_port,
            "tlsPort": rules.tls_port,
            "externalAccountBindingRequired": rules.external_account.is_some(),
            "externalAccountMACKeys": keys,
            "certificateValidityPeriod": rules.validity_seconds,
        }});
        fs::write(path("config.json"), config.to_string()).expect("the directory is ours");
        let pebble = Command::new("pebble")
            .arg("-config")
            .arg(path("config.json"))
            .args(["-dnsserver", &dns.to_string(), "-strict"])
            .env("PEBBLE_VA_NOSLEEP", "1")
            // Otherwise one of twenty nonces is refused, now and then three in a row.
            .env("PEBBLE_WFE_NONCEREJECT", "0")
            // Otherwise half of the orders prove nothing, at random.
            .env("PEBBLE_AUTHZREUSE", "0")
            .stdin(Stdio::null())
            .stdout(log())
            .stderr(log())
            .spawn()
            .expect("pebble starts");
        running.0.push(pebble);
        let address = running.listens(1, "tcp", ACME);
        let management = running.listens(1, "tcp", MANAGEMENT);
        let children = std::mem::take(&mut running.0).try_into().expect("two were started");
        Some(Self { children, directory, address, management })
    }

    /// Returns the URL of its directory.
    #[must_use]
    pub fn url(&self) -> String {
        format!("https://{}/dir", self.address)
    }

    /// Returns the file of who signed the certificate of its own listeners.
    #[must_use]
    pub fn ca(&self) -> PathBuf {
        self.directory.path().join("ca.pem")
    }

    /// Returns the certificate by which what it signs is verified, PEM.
    #[must_use]
    pub fn root(&self) -> String {
        let output = Command::new("curl")
            .args(["--silent", "--show-error", "--max-time", "30", "--noproxy", "*", "--cacert"])
            .arg(self.ca())
            .arg(format!("https://{}/roots/0", self.management))
            .output()
            .expect("curl starts");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).expect("PEM is text")
    }

    /// Returns what it said so far.
    #[must_use]
    pub fn log(&self) -> String {
        let bytes = fs::read(self.directory.path().join("log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for Pebble {
    fn drop(&mut self) {
        for child in &mut self.children {
            // Fails where it has ended already, which is as good.
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<_> = log.lines().rev().take(40).collect();
            eprintln!("---- pebble ----");
            for line in tail.iter().rev() {
                eprintln!("{line}");
            }
        }
    }
}

/// Children that are killed where a start fails half-way.
struct Running(Vec<Child>);

impl Running {
    /// Waits until a child listens at an address, at whatever port, and returns both.
    fn listens(&mut self, child: usize, protocol: &str, address: Ipv4Addr) -> SocketAddr {
        let child = &mut self.0[child];
        wait::until(&format!("a {protocol} listener at {address}"), || {
            if let Ok(Some(status)) = child.try_wait() {
                panic!("ended at start: {status}");
            }
            listener(child.id(), protocol, address)
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // Fails where it has ended already, which is as good.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Finds the socket of a process among all of the system's.
fn listener(process: u32, protocol: &str, address: Ipv4Addr) -> Option<SocketAddr> {
    let sockets: Vec<String> = fs::read_dir(format!("/proc/{process}/fd"))
        .ok()?
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .filter_map(|target| {
            Some(target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())
        })
        .collect();
    let table = fs::read_to_string(format!("/proc/{process}/net/{protocol}")).ok()?;
    table.lines().skip(1).find_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        // Listening, or a UDP socket without a peer.
        let is_open = matches!((*fields.get(3)?, protocol), ("0A", "tcp") | ("07", "udp"));
        let (host, port) = fields.get(1)?.split_once(':')?;
        let host = Ipv4Addr::from(u32::from_str_radix(host, 16).ok()?.to_ne_bytes());
        let is_ours = is_open && host == address && sockets.iter().any(|inode| inode == fields[9]);
        let port = u16::from_str_radix(port, 16).ok()?;
        is_ours.then(|| SocketAddrV4::new(host, port).into())
    })
}

/// Makes an authority's certificate and one that it signs for the listeners.
fn make_certificate(ca_path: &Path, certificate_path: &Path, key_path: &Path) {
    let made = (|| {
        let ca_key = KeyPair::generate()?;
        let mut ca = CertificateParams::new(Vec::new())?;
        // OpenSSL takes a certificate for its own issuer where both have the same name.
        ca.distinguished_name.push(DnType::CommonName, "authority of a test");
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca_pem = ca.self_signed(&ca_key)?.pem();
        let key = KeyPair::generate()?;
        let names = vec![ACME.to_string(), MANAGEMENT.to_string()];
        let certificate =
            CertificateParams::new(names)?.signed_by(&key, &Issuer::new(ca, ca_key))?;
        Ok::<_, rcgen::Error>((ca_pem, certificate.pem(), key.serialize_pem()))
    })();
    let (ca, certificate, key) = made.expect("certificates can be made");
    for (path, text) in [(ca_path, ca), (certificate_path, certificate), (key_path, key)] {
        fs::write(path, text).expect("the directory is ours");
    }
}
