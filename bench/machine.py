"""The machine: ports, limits, and what /proc says of processes. Knows no proxy."""

import os
import pathlib
import resource
import shutil
import socket
import subprocess
import sys
import time

# Above the largest number of connections, at both ends of each proxy.
DESCRIPTORS = 65536
# Descriptors of a process that are no connections; generous.
DESCRIPTORS_APART = 200
START_DEADLINE_S = 20
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def install_missing(packages):
    """Distribution packages, where we may; says what to install where we may not."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    missing = [package for program, package in packages.items() if not shutil.which(program)]
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


def proxied_connections_max():
    """How many connections one proxy process can carry: each takes two descriptors."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (soft - DESCRIPTORS_APART) // 2


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


def answers(port, host, path="/small"):
    """Returns whether a GET is answered by 200."""
    try:
        with socket.create_connection(("127.0.0.1", port), 2) as stream:
            request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
            stream.sendall(request.encode())
            return stream.recv(64).split(b" ")[1:2] == [b"200"]
    except OSError:
        return False


def listens(port):
    try:
        socket.create_connection(("127.0.0.1", port), 2).close()
        return True
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


def memory_kib(pids):
    """Proportional set size: what processes share counts once."""
    total = 0
    for pid in pids:
        for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total
