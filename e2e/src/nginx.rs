//! nginx as the ingress before a relay.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::authority::Files;
use crate::tools::skip;

/// Where Debian's package puts the module for TCP, and others build it in.
const STREAM_MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";

/// A running nginx. Ended when it is dropped.
#[derive(Debug)]
pub struct Nginx {
    child: Child,
    address: SocketAddr,
    directory: TempDir,
}

/// What it does with connections.
#[derive(Clone, Copy, Debug)]
pub enum Ingress<'a> {
    /// Passes TCP on.
    Tcp,
    /// Ends TLS, and passes WebSockets and gRPC on without.
    Http(&'a Files),
}

impl Nginx {
    /// Starts one before a relay, or says that `test` is skipped.
    #[must_use]
    pub fn start(test: &str, ingress: Ingress<'_>, relay: SocketAddr) -> Option<Self> {
        let version = Command::new("nginx").arg("-V").output();
        let Ok(version) = version else {
            skip(test, "nginx is not installed");
            return None;
        };
        let built = String::from_utf8_lossy(&version.stderr).into_owned();
        let is_there = Path::new(STREAM_MODULE).exists();
        let is_built_in =
            built.contains("--with-stream ") || built.trim_end().ends_with("--with-stream");
        if matches!(ingress, Ingress::Tcp) && !is_there && !is_built_in {
            skip(test, "this nginx has no stream module (Debian: libnginx-mod-stream)");
            return None;
        }
        // It inherits the socket as its standard input: the port is the kernel's choice, and whoever
        // connects before it runs waits.
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let address = listener.local_addr().expect("its address");
        let directory = tempfile::tempdir().expect("a temporary directory");
        let load = if is_there && matches!(ingress, Ingress::Tcp) {
            format!("load_module {STREAM_MODULE};\n")
        } else {
            String::new()
        };
        let root = directory.path().display();
        let served = match ingress {
            Ingress::Tcp => format!(
                "stream {{ server {{ listen {address}; proxy_pass {relay}; proxy_timeout 1h; }} }}\n"
            ),
            Ingress::Http(files) => http(address, relay, files, directory.path()),
        };
        let text = format!(
            "{load}daemon off; worker_processes 1; user root; pid {root}/nginx.pid; error_log {root}/error.log info;\n\
             events {{ worker_connections 256; }}\n{served}"
        );
        let file = directory.path().join("nginx.conf");
        fs::write(&file, text).expect("written");
        let child = Command::new("nginx")
            .arg("-p")
            .arg(directory.path())
            .arg("-e")
            .arg(directory.path().join("error.log"))
            .arg("-c")
            .arg(&file)
            .env("NGINX", "0;")
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("nginx starts");
        Some(Self { child, address, directory })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What it has logged.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("error.log")).unwrap_or_default()
    }
}

/// The lines that `docs/operations.md` gives an operator.
fn http(address: SocketAddr, relay: SocketAddr, files: &Files, directory: &Path) -> String {
    let (cert, key, root) = (files.cert.display(), files.key.display(), directory.display());
    format!(
        "http {{
  access_log off;
  client_body_temp_path {root}/body;
  proxy_temp_path {root}/proxy;
  fastcgi_temp_path {root}/fastcgi;
  uwsgi_temp_path {root}/uwsgi;
  scgi_temp_path {root}/scgi;
  server {{
    listen {address} ssl http2;
    ssl_certificate {cert};
    ssl_certificate_key {key};
    location = /tunnel {{
      proxy_pass http://{relay};
      proxy_http_version 1.1;
      proxy_set_header Upgrade $http_upgrade;
      proxy_set_header Connection upgrade;
      proxy_set_header Host $http_host;
      proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
      proxy_read_timeout 1h;
      proxy_send_timeout 1h;
    }}
    location /sidelane.tunnel.v1.Tunnel/ {{
      grpc_pass grpc://{relay};
      grpc_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
      grpc_read_timeout 1h;
      grpc_send_timeout 1h;
      client_body_timeout 1h;
      client_max_body_size 0;
    }}
  }}
}}
"
    )
}

impl Drop for Nginx {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("nginx said:\n{}", self.log());
        }
        // Its worker goes with it, which a killed one would leave behind.
        let _ = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status();
        let _ = self.child.wait();
    }
}
