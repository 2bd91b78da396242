#!/usr/bin/env python3
"""Head-to-head on one machine: Sidelane (relay and sidecar), one nginx hop, two chained haproxy.

All proxies of a path share one core, load and service the other; each process has one worker
thread. What counts is the CPU of the proxies per request and per byte: rates drift with the
neighbours of the machine, and are shown for orientation. Every number of a table comes from the
same run, in rounds that visit all paths, and is the median of its rounds.

Started by `cargo bench-e2e`. Loopback only; what it starts it ends.
"""

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import platform
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

# Above the largest number of connections, at both ends of each proxy.
DESCRIPTORS = 16384
START_DEADLINE_S = 20
SMALL_BYTES = 1024
LARGE_BYTES = 64 * 1024 * 1024
BULK_CONNECTIONS = 8
HOST = "bench.localhost"
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PACKAGES = {"nginx": "nginx", "haproxy": "haproxy", "wrk": "wrk", "taskset": "util-linux"}

# wrk rounds what it prints; this is exact.
REPORT_LUA = """
function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format('\\nREPORT {"requests": %d, "bytes": %d, "duration_us": %d, "p50_us": %d, "p99_us": %d, "errors": %d}\\n',
    summary.requests, summary.bytes, summary.duration, latency:percentile(50), latency:percentile(99),
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
"""


def main():
    options = arguments()
    install_missing()
    raise_descriptors()
    if options.proxy_core == options.load_core:
        print("warning: one core for everything; rates mean nothing, CPU per request still does")
    with contextlib.ExitStack() as stack:
        directory = pathlib.Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="sidelane-bench-"))
        )
        # nginx drops to another user for its worker, which must reach the files.
        directory.chmod(0o755)
        bench = Bench(options, directory, stack)
        bench.start()
        results = bench.measure()
        table = bench.table(results)
    print(table)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(table)
    if any(row["errors"] for rows in results.values() for rows in rows.values() for row in rows):
        sys.exit("some requests failed; the table is not to be trusted")


def arguments():
    cores = sorted(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--program-directory", type=pathlib.Path, default="target/release")
    parser.add_argument("--seconds", type=int, default=5, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", default="1,64,1000")
    parser.add_argument("--no-bulk", action="store_true")
    parser.add_argument("--paths", help="comma-separated; default all")
    parser.add_argument("--proxy-core", type=int, default=cores[0])
    parser.add_argument("--load-core", type=int, default=cores[-1])
    parser.add_argument("--out", type=pathlib.Path, help="also write the table here")
    parser.add_argument("--profile", action="store_true", help="perf report of Sidelane at the end")
    options = parser.parse_args()
    options.connections = [int(text) for text in options.connections.split(",")]
    return options


def install_missing():
    """Distribution packages, where we may; says what to install where we may not."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    missing = [package for program, package in PACKAGES.items() if not shutil.which(program)]
    if not missing:
        return
    if os.getuid() != 0 or not shutil.which("apt-get"):
        sys.exit("not installed: " + ", ".join(missing))
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    subprocess.run(["apt-get", "update", "-qq"], check=True, env=environment)
    subprocess.run(
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing],
        check=True,
        env=environment,
    )


def raise_descriptors():
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(what, condition):
    deadline = time.monotonic() + START_DEADLINE_S
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: not there after {START_DEADLINE_S} s")
        time.sleep(0.02)


def answers(port, path="/small"):
    """Returns whether a GET is answered by 200."""
    try:
        with socket.create_connection(("127.0.0.1", port), 2) as stream:
            request = f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n"
            stream.sendall(request.encode())
            return stream.recv(64).split(b" ")[1:2] == [b"200"]
    except OSError:
        return False


def with_children(pid):
    """A process and its children: nginx's worker is one."""
    try:
        text = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except FileNotFoundError:
        return []
    return [pid, *(other for child in text.split() for other in with_children(int(child)))]


def cpu_seconds(pids):
    """User and system time of processes, their threads included."""
    user = system = 0
    for pid in pids:
        # The name may hold spaces; what follows its parenthesis may not.
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        user, system = user + int(fields[11]), system + int(fields[12])
    return user / TICKS_PER_S, system / TICKS_PER_S


def resident_kib(pids):
    total = 0
    for pid in pids:
        for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                total += int(line.split()[1])
    return total


class Bench:
    def __init__(self, options, directory, stack):
        self.options = options
        self.directory = directory
        self.stack = stack
        self.paths = {}

    def spawn(self, name, core, command):
        log = open(self.directory / f"{name}.log", "wb")
        process = subprocess.Popen(
            ["taskset", "-c", str(core), *map(str, command)],
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        self.stack.callback(self.end, process)
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

    def until_ready(self, name, process, condition):
        def check():
            if process.poll() is not None:
                log = (self.directory / f"{name}.log").read_text(errors="replace")
                raise SystemExit(f"{name} ended at start:\n{log[-2000:]}")
            return condition()

        return wait_for(name, check)

    def start(self):
        service = self.start_service()
        self.paths["direct"] = (service, [])
        self.start_nginx(service)
        self.start_haproxy(service)
        self.start_sidelane(service)
        if self.options.paths:
            wanted = ["direct", "nginx, one hop", *self.options.paths.split(",")]
            self.paths = {name: path for name, path in self.paths.items() if name in wanted}

    def nginx(self, name, core, server):
        port = free_port()
        prefix = self.directory / name
        prefix.mkdir()
        config = self.write(
            f"{name}.conf",
            f"""
daemon off; worker_processes 1; pid {prefix}/pid; error_log {prefix}/error.log warn;
events {{ worker_connections 8192; }}
http {{
  access_log off; sendfile on; tcp_nodelay on;
  client_body_temp_path {prefix}/body; proxy_temp_path {prefix}/proxy;
  fastcgi_temp_path {prefix}/fastcgi; uwsgi_temp_path {prefix}/uwsgi; scgi_temp_path {prefix}/scgi;
  keepalive_requests 100000000; keepalive_timeout 600s;
  {server.replace("@PORT@", str(port))}
}}
""",
        )
        process = self.spawn(name, core, ["nginx", "-p", prefix, "-c", config])
        self.until_ready(name, process, lambda: answers(port))
        return port, with_children(process.pid)

    def start_service(self):
        files = self.directory / "files"
        files.mkdir()
        (files / "small").write_bytes(b"x" * SMALL_BYTES)
        (files / "large").write_bytes(b"x" * LARGE_BYTES)
        server = f"server {{ listen 127.0.0.1:@PORT@ backlog=4096; root {files}; }}"
        port, _ = self.nginx("service", self.options.load_core, server)
        return port

    def start_nginx(self, service):
        server = f"""
  upstream service {{ server 127.0.0.1:{service}; keepalive 2048; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:@PORT@ backlog=4096;
    location / {{
      proxy_pass http://service; proxy_http_version 1.1; proxy_max_temp_file_size 0;
      proxy_set_header Connection ""; proxy_set_header Host $http_host;
      proxy_set_header X-Forwarded-For $remote_addr;
      proxy_set_header X-Forwarded-Proto $scheme;
      proxy_set_header X-Forwarded-Host $http_host;
      proxy_set_header Via "1.1 nginx";
    }}
  }}"""
        self.paths["nginx, one hop"] = self.nginx("nginx", self.options.proxy_core, server)

    def haproxy(self, name, target):
        port = free_port()
        config = self.write(
            f"{name}.cfg",
            f"""
global
  nbthread 1
  maxconn 4096
defaults
  mode http
  option forwardfor
  http-reuse always
  timeout connect 5s
  timeout client 600s
  timeout server 600s
frontend front
  bind 127.0.0.1:{port} backlog 4096
  http-request set-header X-Forwarded-Proto http
  default_backend back
backend back
  server next 127.0.0.1:{target}
""",
        )
        process = self.spawn(name, self.options.proxy_core, ["haproxy", "-db", "-f", config])
        self.until_ready(name, process, lambda: answers(port))
        return port, [process.pid]

    def start_haproxy(self, service):
        inner, inner_pids = self.haproxy("haproxy-inner", service)
        outer, outer_pids = self.haproxy("haproxy-outer", inner)
        self.paths["haproxy to haproxy"] = (outer, [*outer_pids, *inner_pids])

    def start_sidelane(self, service):
        binaries = self.options.program_directory.resolve()
        program = binaries / "sidelane"
        if not program.exists():
            raise SystemExit(f"{program} is not built; `cargo bench-e2e` builds it")
        shared = f"""
version: 1
plugins:
  directory: "{binaries}"
  libraries: [{{ name: http, library: libsidelane_http.so }}]
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
""",
        )
        relay, ports = self.sidelane("relay", program)
        self.write(
            "sidecar.yaml",
            shared
            + f"""
sidecar:
  threads: 1
  relays: ["{ports["tunnel"]}"]
tunnels: [{{ name: bench, service: "127.0.0.1:{service}" }}]
routes: [{{ subdomain: bench, tunnel: bench }}]
""",
        )
        sidecar, _ = self.sidelane("sidecar", program)
        port = int(ports["listeners"]["web"].rpartition(":")[2])
        self.until_ready("sidecar", sidecar, lambda: answers(port))
        self.paths["Sidelane, relay + sidecar"] = (port, [relay.pid, sidecar.pid])

    def sidelane(self, name, program):
        command = [program, "run", f"{name}.yaml", "--ports-file", f"{name}.ports"]
        process = self.spawn(name, self.options.proxy_core, command)
        path = self.directory / f"{name}.ports"

        def ports():
            with contextlib.suppress(OSError, ValueError):
                return json.loads(path.read_text())

        return process, self.until_ready(name, process, ports)

    def wrk(self, port, connections, seconds, path):
        script = self.write("report.lua", REPORT_LUA)
        command = ["taskset", "-c", str(self.options.load_core), "wrk", "-t1"]
        command += [f"-c{connections}", f"-d{seconds}s", "--timeout", "30s", "-s", str(script)]
        command += ["-H", f"Host: {HOST}", f"http://127.0.0.1:{port}{path}"]
        output = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=seconds + 60
        ).stdout
        line = next(line for line in output.splitlines() if line.startswith("REPORT "))
        return json.loads(line.removeprefix("REPORT "))

    def once(self, name, connections, path, seconds):
        port, pids = self.paths[name]
        # Connections and pools stand before the clock runs.
        self.wrk(port, connections, 1, path)
        user, system = cpu_seconds(pids)
        report = self.wrk(port, connections, seconds, path)
        after_user, after_system = cpu_seconds(pids)
        report["user_s"], report["system_s"] = after_user - user, after_system - system
        report["cpu_s"] = report["user_s"] + report["system_s"]
        report["resident_kib"] = resident_kib(pids)
        return report

    def measure(self):
        """Returns {what: {path: [report per round]}}."""
        cases = [(str(count), count, "/small") for count in self.options.connections]
        if not self.options.no_bulk:
            cases.append(("bulk", BULK_CONNECTIONS, "/large"))
        results = {label: {name: [] for name in self.paths} for label, _, _ in cases}
        for number in range(self.options.rounds):
            for label, connections, path in cases:
                for name in self.paths:
                    print(f"round {number + 1}: {label}, {name}", file=sys.stderr, flush=True)
                    report = self.once(name, connections, path, self.options.seconds)
                    results[label][name].append(report)
        if self.options.profile:
            self.profile()
        return results

    def profile(self):
        """Where Sidelane's time goes at 64 connections, by symbol."""
        name = "Sidelane, relay + sidecar"
        if name not in self.paths or not shutil.which("perf"):
            print("no profile: perf is not installed", file=sys.stderr)
            return
        port, pids = self.paths[name]
        data = self.directory / "perf.data"
        recorder = subprocess.Popen(
            ["perf", "record", "-q", "-g", "-p", ",".join(map(str, pids)), "-o", str(data)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            self.wrk(port, 64, self.options.seconds, "/small")
        finally:
            recorder.send_signal(signal.SIGINT)
            recorder.wait(20)
        report = subprocess.run(
            ["perf", "report", "-i", str(data), "--stdio", "--no-children", "-g", "none",
             "--percent-limit", "0.7", "--sort", "comm,dso,symbol"],
            capture_output=True,
            text=True,
        ).stdout
        print(report)

    def table(self, results):
        lines = [
            f"# Head-to-head, {datetime.date.today().isoformat()}",
            "",
            f"{platform.machine()}, Linux {platform.release()}, {os.cpu_count()} cores; proxies on core"
            f" {self.options.proxy_core}, load and service on core {self.options.load_core}; loopback, no TLS;"
            f" {self.options.rounds} rounds of {self.options.seconds} s, medians.",
            "",
        ]
        for label, paths in results.items():
            bulk = label == "bulk"
            if bulk:
                lines += [
                    f"## Bulk: {LARGE_BYTES >> 20} MiB bodies, {BULK_CONNECTIONS} connections",
                    "",
                    "| path | GB/s | proxy CPU-s per GB | of one nginx hop | user / system | resident MiB |",
                    "|---|---|---|---|---|---|",
                ]
            else:
                lines += [
                    f"## {SMALL_BYTES} B, connections: {label}",
                    "",
                    "| path | requests/s | p50 µs | p99 µs | proxy CPU µs per request | of one nginx hop | user / system | resident MiB |",
                    "|---|---|---|---|---|---|---|---|",
                ]
            cost = {name: self.cost(reports, bulk) for name, reports in paths.items()}
            base = cost.get("nginx, one hop")
            for name, reports in paths.items():
                ratio = f"{cost[name] / base:.2f}" if base and cost[name] else "-"
                lines.append(self.row(name, reports, bulk, cost[name], ratio))
            lines.append("")
        return "\n".join(lines)

    def row(self, name, reports, bulk, cost, ratio):
        def median(value):
            return statistics.median(value(report) for report in reports)

        cells = [f"**{name}**" if name.startswith("Sidelane") else name]
        seconds = lambda report: report["duration_us"] / 1e6  # noqa: E731
        if bulk:
            cells.append(f"{median(lambda report: report['bytes'] / 1e9 / seconds(report)):.2f}")
        else:
            cells.append(f"{median(lambda report: report['requests'] / seconds(report)):,.0f}")
            cells.append(f"{median(lambda report: report['p50_us']):,.0f}")
            cells.append(f"{median(lambda report: report['p99_us']):,.0f}")
        if name == "direct":
            cells += ["-", "-", "-", "-"]
        else:
            share = median(lambda report: report["user_s"] / max(report["cpu_s"], 1e-9))
            cells.append(f"{cost:.2f}")
            cells.append(ratio)
            cells.append(f"{share:.0%} / {1 - share:.0%}")
            cells.append(f"{median(lambda report: report['resident_kib']) / 1024:.1f}")
        return "| " + " | ".join(cells) + " |"

    @staticmethod
    def cost(reports, bulk):
        """CPU-s per GB, or µs per request."""
        if bulk:
            values = [report["cpu_s"] / (report["bytes"] / 1e9) for report in reports]
        else:
            values = [report["cpu_s"] * 1e6 / report["requests"] for report in reports]
        return statistics.median(values)


if __name__ == "__main__":
    main()
