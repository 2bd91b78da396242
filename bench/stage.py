"""Services and proxies: what runs, by which configuration, on which core.

A path is a proxy or a chain of them before three services: HTTP (nginx with static files),
WebSocket and gRPC (sidelane-bench-load). What a stage starts it ends.
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

SMALL_BYTES = 1024
LARGE_BYTES = 64 * 1024 * 1024


@dataclasses.dataclass
class Path:
    """Where each kind of load goes, and the processes in the path by their part."""

    ports: dict
    processes: dict

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
        }

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

    def stands(self, kind, port):
        # What speaks HTTP/2 alone cannot be asked by a GET.
        return machine.listens(port) if kind == "grpc" else machine.answers(port, HOSTS[kind])

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

    def start_sidelane(self, services):
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
            "relay.yaml",
            shared
            + """
relay:
  threads: 1
  listeners: [{ name: web, address: "127.0.0.1:0" }]
  base_domains: [localhost]
  tunnel: { address: "127.0.0.1:0" }
  limits: { exchanges_per_session: 20000 }
""",
        )
        relay, ports = self.sidelane("relay")
        tunnels = [
            {"name": kind, "service": f"127.0.0.1:{port}"} for kind, port in services.items()
        ]
        routes = [{"subdomain": kind, "tunnel": kind} for kind in services]
        self.write(
            "sidecar.yaml",
            shared
            + f"""
sidecar:
  threads: 1
  relays: ["{ports["tunnel"]}"]
  limits: {{ exchanges_per_session: 20000 }}
tunnels: {json.dumps(tunnels)}
routes: {json.dumps(routes)}
""",
        )
        sidecar, _ = self.sidelane("sidecar")
        port = int(ports["listeners"]["web"].rpartition(":")[2])
        ports = {kind: port for kind in services}
        self.until_all_stand("sidecar", sidecar, ports)
        return Path(ports, {"relay": [relay.pid], "sidecar": [sidecar.pid]})

    def sidelane(self, name):
        program = self.program("sidelane")
        command = [program, "run", f"{name}.yaml", "--ports-file", f"{name}.ports"]
        process = self.spawn(name, self.options.proxy_core, command)
        path = self.directory / f"{name}.ports"

        def ports():
            with contextlib.suppress(OSError, ValueError):
                return json.loads(path.read_text())

        return process, self.until_ready(name, process, ports)
