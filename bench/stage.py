"""Services and proxies: what runs, by which configuration, on which core.

A path is a proxy or a chain of them before three services: HTTP (nginx with static files),
WebSocket and gRPC (sidelane-bench-load). Paths with TLS take HTTP alone, by one certificate for
`localhost`. What a stage starts it ends.
"""

import contextlib
import dataclasses
import json
import pathlib
import signal
import subprocess
import tempfile

import machine

KINDS = ("http", "websocket", "grpc")
HOSTS = {kind: f"{kind}.localhost" for kind in KINDS}
DIRECT = "direct"
NGINX = "nginx, one hop"
HAPROXY = "haproxy to haproxy"
SIDELANE = "Sidelane, relay + sidecar"
NAMES = (DIRECT, NGINX, HAPROXY, SIDELANE)
NGINX_TLS = "nginx, one hop, TLS on entry"
NGINX_CHAIN_TLS = "nginx to nginx, TLS on entry and between"
SIDELANE_TUNNEL_TLS = "Sidelane, TLS on the tunnel"
SIDELANE_TLS = "Sidelane, TLS on entry and tunnel"
SIDELANE_RAW = "Sidelane, WebSockets raw"
RAW_NAMES = (NGINX, HAPROXY, SIDELANE, SIDELANE_RAW)
# Beside each other in one run: plain, TLS on the tunnel, TLS on both.
TLS_NAMES = (NGINX, SIDELANE, SIDELANE_TUNNEL_TLS, NGINX_TLS, NGINX_CHAIN_TLS, SIDELANE_TLS)
# Beside each other in one run: lanes that come back, with all they have to remember, and such that do not.
SIDELANE_NO_RING = "Sidelane, grace 0s"
RING_NAMES = (SIDELANE_NO_RING, SIDELANE)
# What a client asks for by SNI must be what it asks for by Host.
TLS_HOST = "localhost"

SMALL_BYTES = 1024
LARGE_BYTES = 64 * 1024 * 1024


@dataclasses.dataclass
class Path:
    """Where each kind of load goes, and the processes in the path by their part."""

    ports: dict
    processes: dict
    tls: bool = False

    @property
    def pids(self):
        return [pid for pids in self.processes.values() for pid in pids]


class Stage(contextlib.ExitStack):
    """Processes and their files, ended and removed together."""

    def __init__(self, options, kinds):
        super().__init__()
        self.options = options
        self.kinds = kinds
        self.programs = options.program_directory.resolve()
        self.starts = {
            DIRECT: lambda services: Path(services, {}),
            NGINX: self.start_nginx,
            HAPROXY: self.start_haproxy,
            SIDELANE: self.start_sidelane,
            SIDELANE_NO_RING: lambda services: self.start_sidelane(services, grace="0s"),
            NGINX_TLS: self.start_nginx_tls,
            NGINX_CHAIN_TLS: self.start_nginx_chain_tls,
            SIDELANE_TUNNEL_TLS: lambda services: self.start_sidelane(services, tunnel_tls=True),
            SIDELANE_TLS: lambda services: self.start_sidelane(
                services, tunnel_tls=True, entry_tls=True
            ),
        }
        self.starts[SIDELANE_RAW] = lambda services: self.start_sidelane(services, raw=True)
        self.sidelanes = 0

    def __enter__(self):
        super().__enter__()
        self.directory = pathlib.Path(
            self.enter_context(tempfile.TemporaryDirectory(prefix="sidelane-bench-"))
        )
        # nginx drops to another user for its worker, which must reach the files.
        self.directory.chmod(0o755)
        return self

    def start(self, name, services):
        return self.starts[name](services)

    def program(self, name):
        program = self.programs / name
        if not program.exists():
            raise SystemExit(f"{program} is not built; `cargo bench-e2e` builds it")
        return program

    def spawn(self, name, core, command):
        log = open(self.directory / f"{name}.log", "wb")
        process = subprocess.Popen(
            ["taskset", "-c", str(core), *map(str, command)],
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        self.callback(self.end, process)
        return process

    def end(self, process):
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def write(self, name, text):
        path = self.directory / name
        path.write_text(text)
        return path

    def log(self, name):
        return (self.directory / f"{name}.log").read_text(errors="replace")

    def until_ready(self, name, process, condition):
        def check():
            if process.poll() is not None:
                raise SystemExit(f"{name} ended at start:\n{self.log(name)[-2000:]}")
            return condition()

        return machine.wait_for(name, check)

    def certificate(self):
        """Files of a certificate, its key and its authority; made once."""
        certificate, key, authority = (
            self.directory / name for name in ("tls.crt", "tls.key", "ca.crt")
        )
        if not certificate.exists():
            make_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
            ca_key, request = self.directory / "ca.key", self.directory / "tls.csr"
            names = self.write("names", f"subjectAltName=DNS:{TLS_HOST},IP:127.0.0.1\n")
            for command in (
                ["req", "-x509", *make_key, "-subj", "/CN=CA", "-keyout", ca_key, "-out", authority],
                ["req", *make_key, "-subj", "/CN=bench", "-keyout", key, "-out", request],
                ["x509", "-req", "-in", request, "-CA", authority, "-CAkey", ca_key]
                + ["-CAcreateserial", "-extfile", names, "-out", certificate],
            ):
                subprocess.run(["openssl", *map(str, command)], check=True, capture_output=True)
        return certificate, key, authority

    def stands(self, kind, port):
        # What speaks HTTP/2 alone, or TLS, cannot be asked by a GET.
        if kind in ("grpc", "tls"):
            return machine.listens(port)
        return machine.answers(port, HOSTS[kind])

    def until_all_stand(self, name, process, ports):
        self.until_ready(
            name, process, lambda: all(self.stands(kind, port) for kind, port in ports.items())
        )

    # Services

    def start_services(self):
        starts = {
            "http": self.start_http_service,
            "websocket": lambda: self.start_load_service("ws-echo-server"),
            "grpc": lambda: self.start_load_service("grpc-server"),
        }
        return {kind: starts[kind]() for kind in self.kinds}

    def start_http_service(self):
        files = self.directory / "files"
        files.mkdir()
        (files / "small").write_bytes(b"x" * SMALL_BYTES)
        (files / "large").write_bytes(b"x" * LARGE_BYTES)
        port = machine.free_port()
        server = f"server {{ listen 127.0.0.1:{port} backlog=4096; root {files}; }}"
        self.nginx("service", self.options.load_core, server, {"http": port})
        return port

    def start_load_service(self, command):
        process = self.spawn(
            command, self.options.load_core, [self.program("sidelane-bench-load"), command]
        )

        def port():
            first, _, _ = self.log(command).partition("\n")
            return int(first.rpartition(":")[2]) if first.startswith("listening ") else None

        return self.until_ready(command, process, port)

    # Proxies

    def nginx(self, name, core, servers, ports):
        prefix = self.directory / name
        prefix.mkdir()
        config = self.write(
            f"{name}.conf",
            f"""
daemon off; worker_processes 1; pid {prefix}/pid; error_log {prefix}/error.log warn;
# With few of these left it resets clients that have not yet asked; descriptors bound it, not this.
events {{ worker_connections {machine.DESCRIPTORS}; }}
http {{
  access_log off; sendfile on; tcp_nodelay on;
  client_body_temp_path {prefix}/body; proxy_temp_path {prefix}/proxy;
  fastcgi_temp_path {prefix}/fastcgi; uwsgi_temp_path {prefix}/uwsgi; scgi_temp_path {prefix}/scgi;
  keepalive_requests 100000000; keepalive_timeout 600s;
  {servers}
}}
""",
        )
        process = self.spawn(name, core, ["nginx", "-p", prefix, "-c", config])
        self.until_all_stand(name, process, ports)
        return machine.with_children(process.pid)

    def start_nginx(self, services):
        ports = {kind: machine.free_port() for kind in services}
        servers = {
            "http": """
  upstream http { server 127.0.0.1:@SERVICE@; keepalive 2048; keepalive_requests 100000000; }
  server {
    listen 127.0.0.1:@PORT@ backlog=4096;
    location / {
      proxy_pass http://http; proxy_http_version 1.1; proxy_max_temp_file_size 0;
      proxy_set_header Connection ""; proxy_set_header Host $http_host;
      proxy_set_header X-Forwarded-For $remote_addr;
      proxy_set_header X-Forwarded-Proto $scheme;
      proxy_set_header X-Forwarded-Host $http_host;
      proxy_set_header Via "1.1 nginx";
    }
  }""",
            "websocket": """
  server {
    listen 127.0.0.1:@PORT@ backlog=4096;
    location / {
      proxy_pass http://127.0.0.1:@SERVICE@; proxy_http_version 1.1;
      proxy_read_timeout 600s; proxy_send_timeout 600s;
      proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection "upgrade";
      proxy_set_header Host $http_host;
      proxy_set_header X-Forwarded-For $remote_addr;
    }
  }""",
            "grpc": """
  upstream grpc { server 127.0.0.1:@SERVICE@; keepalive 2048; keepalive_requests 100000000; }
  server {
    listen 127.0.0.1:@PORT@ http2 backlog=4096;
    http2_max_concurrent_streams 1024;
    location / {
      grpc_pass grpc://grpc; grpc_read_timeout 600s; grpc_send_timeout 600s;
      grpc_set_header X-Forwarded-For $remote_addr;
    }
  }""",
        }
        text = "".join(
            servers[kind].replace("@PORT@", str(ports[kind])).replace("@SERVICE@", str(service))
            for kind, service in services.items()
        )
        return Path(ports, {"nginx": self.nginx("nginx", self.options.proxy_core, text, ports)})

    def start_nginx_tls(self, services):
        port = machine.free_port()
        text = self.nginx_tls(port, f"http://127.0.0.1:{services['http']}")
        pids = self.nginx("nginx-tls", self.options.proxy_core, text, {"tls": port})
        return Path({"http": port}, {"nginx": pids}, tls=True)

    def start_nginx_chain_tls(self, services):
        outer, inner = machine.free_port(), machine.free_port()
        text = self.nginx_tls(inner, f"http://127.0.0.1:{services['http']}")
        inner_pids = self.nginx("nginx-inner", self.options.proxy_core, text, {"tls": inner})
        text = self.nginx_tls(outer, f"https://127.0.0.1:{inner}")
        outer_pids = self.nginx("nginx-outer", self.options.proxy_core, text, {"tls": outer})
        return Path({"http": outer}, {"outer": outer_pids, "inner": inner_pids}, tls=True)

    def nginx_tls(self, port, target):
        certificate, key, authority = self.certificate()
        scheme, _, address = target.partition("://")
        return f"""
  upstream next {{ server {address}; keepalive 2048; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port} ssl backlog=4096;
    ssl_certificate {certificate}; ssl_certificate_key {key};
    ssl_protocols TLSv1.3; ssl_conf_command Ciphersuites TLS_AES_256_GCM_SHA384;
    location / {{
      proxy_pass {scheme}://next; proxy_http_version 1.1; proxy_max_temp_file_size 0;
      proxy_ssl_verify on; proxy_ssl_trusted_certificate {authority};
      proxy_ssl_name {TLS_HOST}; proxy_ssl_server_name on; proxy_ssl_protocols TLSv1.3;
      proxy_set_header Connection ""; proxy_set_header Host $http_host;
      proxy_set_header X-Forwarded-For $remote_addr;
      proxy_set_header X-Forwarded-Proto $scheme;
      proxy_set_header X-Forwarded-Host $http_host;
      proxy_set_header Via "1.1 nginx";
    }}
  }}"""

    def haproxy(self, name, targets):
        ports = {kind: machine.free_port() for kind in targets}
        protocol = {"grpc": "proto h2"}
        fronts = "".join(
            f"""
frontend {kind}
  bind 127.0.0.1:{ports[kind]} backlog 4096 {protocol.get(kind, "")}
  http-request set-header X-Forwarded-Proto http
  default_backend {kind}-next
backend {kind}-next
  server next 127.0.0.1:{target} {protocol.get(kind, "")}
"""
            for kind, target in targets.items()
        )
        config = self.write(
            f"{name}.cfg",
            f"""
global
  nbthread 1
  maxconn {machine.proxied_connections_max()}
  tune.h2.max-concurrent-streams 1024
defaults
  mode http
  option forwardfor
  http-reuse always
  timeout connect 5s
  timeout client 600s
  timeout server 600s
  timeout tunnel 600s
{fronts}""",
        )
        process = self.spawn(name, self.options.proxy_core, ["haproxy", "-db", "-f", config])
        self.until_all_stand(name, process, ports)
        return ports, [process.pid]

    def start_haproxy(self, services):
        inner, inner_pids = self.haproxy("haproxy-inner", services)
        outer, outer_pids = self.haproxy("haproxy-outer", inner)
        return Path(outer, {"outer": outer_pids, "inner": inner_pids})

    def start_sidelane(self, services, tunnel_tls=False, entry_tls=False, raw=False, grace=None):
        self.sidelanes += 1
        relay_name, sidecar_name = f"relay-{self.sidelanes}", f"sidecar-{self.sidelanes}"
        certificates = {}
        if tunnel_tls or entry_tls:
            certificate, key, authority = self.certificate()
            certificates = {"certificates": [{"cert": str(certificate), "key": str(key)}]}
        listener = {"name": "web", "address": "127.0.0.1:0"}
        listener |= {"tls": certificates} if entry_tls else {}
        tunnel = {"address": "127.0.0.1:0"} | ({"tls": certificates} if tunnel_tls else {})
        tunnel |= {"grace": grace} if grace else {}
        libraries = [
            {"name": kind, "library": f"libsidelane_{kind}.so"}
            for kind in ("http", *(kind for kind in services if kind != "http"))
        ]
        for library in libraries:
            self.program(library["library"])
        # YAML takes JSON where it takes a flow mapping.
        shared = f"""
version: 1
plugins: {json.dumps({"directory": str(self.programs), "libraries": libraries})}
health: {{ address: "127.0.0.1:0" }}
log: {{ level: warn }}
"""
        self.write(
            f"{relay_name}.yaml",
            shared
            + f"""
relay:
  threads: 1
  listeners: {json.dumps([listener])}
  base_domains: [localhost]
  tunnel: {json.dumps(tunnel)}
  limits: {{ exchanges_per_session: 20000, handshakes_per_second_per_address: 10000 }}
""",
        )
        relay, ports = self.sidelane(relay_name)
        tunnels = [
            {"name": kind, "service": f"127.0.0.1:{port}"} for kind, port in services.items()
        ]
        routes = [{"subdomain": kind, "tunnel": kind} for kind in services]
        for route in routes:
            if raw and route["tunnel"] == "websocket":
                route["options"] = {"WEBSOCKET": {"mode": "raw"}}
        if entry_tls:
            routes.append({"host": TLS_HOST, "tunnel": "http"})
        dialled = {"address": ports["tunnel"]}
        dialled |= {"tls": {"ca": str(authority)}} if tunnel_tls else {}
        self.write(
            f"{sidecar_name}.yaml",
            shared
            + f"""
sidecar:
  threads: 1
  relays: {json.dumps([dialled])}
  limits: {{ exchanges_per_session: 20000 }}
tunnels: {json.dumps(tunnels)}
routes: {json.dumps(routes)}
""",
        )
        sidecar, own = self.sidelane(sidecar_name)
        port = int(ports["listeners"]["web"].rpartition(":")[2])
        ports = {kind: port for kind in services}
        if entry_tls:
            health = int(own["health"].rpartition(":")[2])
            ready = lambda: machine.answers(health, TLS_HOST, "/ready")  # noqa: E731
            self.until_ready(sidecar_name, sidecar, ready)
        else:
            self.until_all_stand(sidecar_name, sidecar, ports)
        return Path(ports, {"relay": [relay.pid], "sidecar": [sidecar.pid]}, tls=entry_tls)

    def sidelane(self, name):
        program = self.program("sidelane")
        command = [program, "run", f"{name}.yaml", "--ports-file", f"{name}.ports"]
        process = self.spawn(name, self.options.proxy_core, command)
        path = self.directory / f"{name}.ports"

        def ports():
            with contextlib.suppress(OSError, ValueError):
                return json.loads(path.read_text())

        return process, self.until_ready(name, process, ports)
