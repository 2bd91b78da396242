"""What is measured: loads, the proxies' clocks around them, and the memory of idle connections."""

import contextlib
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time

import machine
from stage import (
    DIRECT,
    HAPROXY,
    HOSTS,
    LARGE_BYTES,
    NAMES,
    NGINX,
    RAW_NAMES,
    NGINX_CHAIN_TLS,
    RING_NAMES,
    SIDELANE_NO_RING,
    SMALL_BYTES,
    TLS_HOST,
    TLS_NAMES,
    Stage,
)

BULK_CONNECTIONS = 8
CONNECTIONS = 64
GRPC_CONNECTIONS = 4
MESSAGE_BYTES = 125
# A frame of a bulk WebSocket, and how many of it wait.
RAW_BYTES = 60 * 1000
RAW_IN_FLIGHT = 8
IN_FLIGHT = 32
# Until the last buffers of the handshakes are given back.
SETTLE_S = 1.0

# wrk rounds what it prints; this is exact.
REPORT_LUA = """
function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format('\\nREPORT {"operations": %d, "bytes": %d, "duration_us": %d, "p50_us": %d, "p99_us": %d, "errors": %d}\\n',
    summary.requests, summary.bytes, summary.duration, latency:percentile(50), latency:percentile(99),
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
"""


@dataclasses.dataclass
class Case:
    """One load. An aim is a path whose cost Sidelane's is to stay within."""

    kind: str
    title: str
    operation: str
    # (runner, path) -> report
    run: object
    aim: str = None
    bulk: bool = False
    # Whether --profile looks at it.
    profiled: bool = False
    # Which paths it visits, and by which of them its costs are divided.
    paths: tuple = NAMES
    bases: tuple = (("of one nginx hop", NGINX), ("of two haproxy", HAPROXY))


def cases(options):
    """The cases of the chosen workloads, in the order of the table."""

    def wrk(connections, target):
        return lambda runner, path: runner.wrk(path, connections, target)

    def load(kind, command, *arguments):
        return lambda runner, path: runner.load(path, kind, command, *arguments)

    found = [
        Case(
            "http",
            f"HTTP/1.1, {SMALL_BYTES} B, connections: {count}",
            "request",
            wrk(count, "/small"),
            aim=NGINX if count == CONNECTIONS else None,
            profiled=count == CONNECTIONS,
        )
        for count in options.connections
    ]
    if not options.no_bulk:
        title = f"Bulk: {LARGE_BYTES >> 20} MiB bodies, {BULK_CONNECTIONS} connections"
        found.append(Case("http", title, "GB", wrk(BULK_CONNECTIONS, "/large"), bulk=True))
    sockets = ["--connections", CONNECTIONS, "--bytes", MESSAGE_BYTES]
    calls = ["--connections", GRPC_CONNECTIONS, "--streams", CONNECTIONS, "--bytes", MESSAGE_BYTES]
    found += [
        Case(
            "websocket",
            f"WebSocket ping-pong, {MESSAGE_BYTES} B, connections: {CONNECTIONS}",
            "echo",
            load("websocket", "ws-ping-pong", *sockets),
            aim=NGINX,
            profiled=True,
        ),
        Case(
            "websocket",
            f"WebSocket, {IN_FLIGHT} in flight, {MESSAGE_BYTES} B, connections: {CONNECTIONS}",
            "echo",
            load("websocket", "ws-pipelined", *sockets, "--in-flight", IN_FLIGHT),
            aim=HAPROXY,
            profiled=True,
        ),
        Case(
            "grpc",
            f"gRPC unary, {MESSAGE_BYTES} B, {CONNECTIONS} in flight over {GRPC_CONNECTIONS} connections",
            "call",
            load("grpc", "grpc-unary", *calls),
            aim=HAPROXY,
            profiled=True,
        ),
        Case(
            "grpc",
            f"gRPC server streaming, messages of {MESSAGE_BYTES} B, {CONNECTIONS} streams over {GRPC_CONNECTIONS} connections",
            "message",
            load("grpc", "grpc-stream", *calls),
            aim=HAPROXY,
            profiled=True,
        ),
    ]
    for size, per in ((MESSAGE_BYTES, CONNECTIONS), (RAW_BYTES, BULK_CONNECTIONS)):
        sockets = ["--connections", per, "--bytes", size, "--in-flight", RAW_IN_FLIGHT]
        found.append(
            Case(
                "raw",
                f"WebSocket raw and framed, {size} B, {RAW_IN_FLIGHT} in flight, connections: {per}",
                "echo",
                load("websocket", "ws-pipelined", *sockets),
                paths=RAW_NAMES,
            )
        )
    tls = {
        "paths": TLS_NAMES,
        "bases": (("of one nginx hop", NGINX), ("of nginx to nginx, TLS", NGINX_CHAIN_TLS)),
    }
    found.append(
        Case(
            "tls",
            f"TLS 1.3: HTTP/1.1, {SMALL_BYTES} B, connections: {CONNECTIONS}",
            "request",
            wrk(CONNECTIONS, "/small"),
            **tls,
        )
    )
    if not options.no_bulk:
        title = f"TLS 1.3: bulk, {LARGE_BYTES >> 20} MiB bodies, {BULK_CONNECTIONS} connections"
        found.append(
            Case("tls", title, "GB", wrk(BULK_CONNECTIONS, "/large"), bulk=True, **tls)
        )
    ring = {"paths": RING_NAMES, "bases": (("of grace 0s", SIDELANE_NO_RING),)}
    title = f"Ring: HTTP/1.1, {SMALL_BYTES} B, connections: {CONNECTIONS}"
    found.append(Case("ring", title, "request", wrk(CONNECTIONS, "/small"), **ring))
    title = f"Ring: bulk, {LARGE_BYTES >> 20} MiB bodies, {BULK_CONNECTIONS} connections"
    found.append(Case("ring", title, "GB", wrk(BULK_CONNECTIONS, "/large"), bulk=True, **ring))
    return [case for case in found if case.kind in options.only]


def say(*words):
    print(*words, file=sys.stderr, flush=True)


class Runner:
    """Runs loads against paths that stand."""

    def __init__(self, options, stage):
        self.options = options
        self.stage = stage
        self.script = stage.write("report.lua", REPORT_LUA)

    def measure(self, found, paths):
        """Returns {title: {path: [report per round]}}."""
        chosen = {case.title: [name for name in paths if name in case.paths] for case in found}
        results = {case.title: {name: [] for name in chosen[case.title]} for case in found}
        for number in range(self.options.rounds):
            for case in found:
                for name in chosen[case.title]:
                    path = paths[name]
                    say(f"round {number + 1}: {case.title}, {name}")
                    results[case.title][name].append(case.run(self, path))
        return results

    def wrk(self, path, connections, target):
        # Connections and pools stand before the clocks are read.
        self.wrk_once(path, connections, target, 1)
        clocks = Clocks(path)
        report = self.wrk_once(path, connections, target, self.options.seconds)
        return clocks.stop(report)

    def wrk_once(self, path, connections, target, seconds):
        command = ["taskset", "-c", str(self.options.load_core), "wrk", "-t1"]
        command += [f"-c{connections}", f"-d{seconds}s", "--timeout", "30s", "-s", str(self.script)]
        host, origin = HOSTS["http"], "http://127.0.0.1"
        if path.tls:
            # Its SNI is the URL's host.
            host, origin = TLS_HOST, f"https://{TLS_HOST}"
        command += ["-H", f"Host: {host}", f"{origin}:{path.ports['http']}{target}"]
        output = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=seconds + 60
        ).stdout
        line = next(line for line in output.splitlines() if line.startswith("REPORT "))
        return json.loads(line.removeprefix("REPORT "))

    def load(self, path, kind, command, *arguments):
        with self.start_load(path, kind, command, *arguments) as process:
            clocks = Clocks(path)
            process.stdin.write("\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"{command}: ended without a report")
            return clocks.stop(json.loads(line))

    @contextlib.contextmanager
    def start_load(self, path, kind, command, *arguments):
        """A load whose connections stand."""
        command = [self.stage.program("sidelane-bench-load"), command]
        command += ["--target", f"127.0.0.1:{path.ports[kind]}", "--host", HOSTS[kind], *arguments]
        command += ["--seconds", self.options.seconds]
        with subprocess.Popen(
            ["taskset", "-c", str(self.options.load_core), *map(str, command)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                if not process.stdout.readline().startswith("open"):
                    raise SystemExit(f"{command[1]}: its connections do not stand")
                yield process
            finally:
                # Its standard input ends: so does a load that is waiting.
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()

    def idle_memory(self, counts, names, services):
        """Returns {count: {path: [{part: KiB per connection} per round]}}. Processes are fresh each time:
        what an allocator kept of earlier loads would hide the growth."""
        results = {count: {name: [] for name in names if name != DIRECT} for count in counts}
        for number in range(self.options.rounds):
            for count, paths in results.items():
                for name, values in paths.items():
                    say(f"round {number + 1}: {count} idle WebSockets, {name}")
                    with Stage(self.options, ["websocket"]) as fresh:
                        path = fresh.start(name, {"websocket": services["websocket"]})
                        values.append(self.idle_once(path, count))
        return results

    def idle_once(self, path, count):
        # What is made once, by the first connection, is no cost of each.
        with self.start_load(path, "websocket", "ws-idle", "--connections", 1):
            pass
        time.sleep(SETTLE_S)
        before = self.memory_of_parts(path)
        with self.start_load(path, "websocket", "ws-idle", "--connections", count):
            time.sleep(SETTLE_S)
            after = self.memory_of_parts(path)
        return {part: (after[part] - before[part]) / count for part in after}

    @staticmethod
    def memory_of_parts(path):
        return {part: machine.memory_kib(pids) for part, pids in path.processes.items()}

    def profile(self, found, path):
        """Prints where Sidelane's time goes, by process and symbol."""
        if not shutil.which("perf"):
            say("no profile: perf is not installed")
            return
        # A loaded plugin is a copy in memory without a name: its symbols are found by its build id.
        perf = ["perf", "--buildid-dir", str(self.stage.directory / "symbols")]
        for library in self.stage.programs.glob("libsidelane_*.so"):
            subprocess.run([*perf, "buildid-cache", "--add", library], stderr=subprocess.DEVNULL)
        for case in found:
            if not case.profiled:
                continue
            data = self.stage.directory / "perf.data"
            command = ["perf", "record", "-q", "--buildid-mmap", "-p", ",".join(map(str, path.pids))]
            recorder = subprocess.Popen(
                [*command, "-o", str(data)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                case.run(self, path)
            finally:
                recorder.send_signal(signal.SIGINT)
                recorder.wait(20)
            parts = ", ".join(f"{part} is {pids[0]}" for part, pids in path.processes.items())
            print(f"# {case.title}\n# {parts}")
            for keys, limit in [("pid,dso", "0.7"), ("pid,dso,symbol", "0.7")]:
                command = [*perf, "report", "-i", str(data), "--stdio", "--no-children"]
                command += ["-g", "none", "--percent-limit", limit, "--sort", keys]
                output = subprocess.run(command, capture_output=True, text=True).stdout
                rows = [line for line in output.splitlines() if line and line[0] != "#"]
                print("\n".join(rows), end="\n\n")


class Clocks:
    """User and system time of a path's processes from here on."""

    def __init__(self, path):
        self.path = path
        self.start = self.read()

    def read(self):
        return {part: machine.cpu_seconds(pids) for part, pids in self.path.processes.items()}

    def stop(self, report):
        """Adds the times, and the memory, to a load's report."""
        report["parts"] = {
            part: (user - self.start[part][0], system - self.start[part][1])
            for part, (user, system) in self.read().items()
        }
        report["user_s"] = sum(user for user, _ in report["parts"].values())
        report["system_s"] = sum(system for _, system in report["parts"].values())
        report["cpu_s"] = report["user_s"] + report["system_s"]
        report["memory_kib"] = machine.memory_kib(self.path.pids)
        return report
