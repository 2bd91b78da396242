#!/usr/bin/env python3
"""Records docs/walk.md: start, edit, reload while a WebSocket and a download run, break the file, mend it.

    cargo build --release --workspace && python3 docs/walk.py

Needs curl and Python's `websockets` (`cargo test-all` puts it into target/e2e-venv). Runs in a directory of
its own on ports of its own, and ends what it started.
"""

import asyncio
import hashlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = Path(os.environ.get("SIDELANE_BUILD_DIR", ROOT / "target/release"))
DOWNLOAD_BYTES = 256 * 1024 * 1024
DEADLINE_S = 60

FILE = """\
version: 1
relay:
  listeners: [{ name: web, address: "127.0.0.1:${HTTP_PORT}" }]
  tunnel: { address: "127.0.0.1:${WS_PORT}" }
sidecar: { name: laptop }
tunnels:
  - { name: demo, service: "127.0.0.1:${DEMO_PORT}" }
routes:
  - { subdomain: demo, tunnel: demo }
plugins:
  directory: "${SIDELANE_PLUGIN_DIR}"
  libraries:
    - { name: http, library: libsidelane_http.so }
    - { name: websocket, library: libsidelane_websocket.so }
health: { address: "127.0.0.1:${HEALTH_PORT}" }
admin: { address: "127.0.0.1:${ADMIN_PORT}" }
"""


def free_port():
    """Of four digits, as the default that is shown in its place, so that tables stay aligned."""
    while True:
        port = random.randrange(2000, 9000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue


class Walk:
    def __init__(self, directory):
        self.directory = Path(directory)
        names = ["HTTP_PORT", "WS_PORT", "DEMO_PORT", "HEALTH_PORT", "ADMIN_PORT"]
        self.ports = {name: str(free_port()) for name in names}
        self.env = os.environ | self.ports | {
            "SIDELANE_PLUGIN_DIR": str(BUILD),
            "PATH": f"{BUILD}:{os.environ['PATH']}",
            "NO_COLOR": "1",
        }
        self.lines = []
        self.log = self.directory / "log"
        self.log_read = 0

    def say(self, text):
        self.lines += [text, ""]

    def plain(self, text):
        """What differs from run to run is told by its meaning."""
        shown = {"HTTP_PORT": "9080", "WS_PORT": "9081", "HEALTH_PORT": "9082", "ADMIN_PORT": "9083", "DEMO_PORT": "3000"}
        for name, port in self.ports.items():
            text = re.sub(rf"\b{port}\b", shown[name], text)
        text = text.replace(str(BUILD), "target/release")
        return re.sub(r"\x1b\[[0-9;]*m", "", text)

    def run(self, command, expected=0):
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.directory, env=self.env, capture_output=True, text=True, timeout=DEADLINE_S
        )
        if done.returncode != expected:
            raise SystemExit(f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        output = self.plain((done.stdout + done.stderr).rstrip())
        status = f"\n[exit {expected}]" if expected else ""
        self.lines += ["```console", f"$ {self.plain(command)}", *([output + status] if output or status else []), "```", ""]
        return done.stdout

    def until(self, what, condition):
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            found = condition()
            if found:
                return found
            time.sleep(0.02)
        raise SystemExit(f"{what}: not within {DEADLINE_S} s\n{self.log.read_text()}")

    def until_log(self, words):
        """Waits for a new line of the log that holds `words`, and shows it."""
        def look():
            for line in self.log.read_text()[self.log_read:].splitlines():
                if words in line:
                    return line
        line = self.until(words, look)
        self.log_read = len(self.log.read_text())
        line = re.sub(r"^\S+Z\s+", "", self.plain(line))
        self.lines += ["The log says:", "", "```text", line, "```", ""]


class Echo(threading.Thread):
    """A WebSocket that sends numbers and counts what comes back in order."""

    def __init__(self, port):
        super().__init__(daemon=True)
        self.port, self.sent, self.received, self.ending, self.error = port, 0, 0, False, None

    def run(self):
        asyncio.run(self.speak())

    async def speak(self):
        import websockets

        try:
            async with websockets.connect(f"ws://demo.localhost:{self.port}/ws", host="127.0.0.1", port=self.port) as socket_:
                while not self.ending:
                    await socket_.send(str(self.sent))
                    self.sent += 1
                    while True:
                        answer = await asyncio.wait_for(socket_.recv(), DEADLINE_S)
                        if answer == str(self.received):
                            break
                    self.received += 1
                    await asyncio.sleep(0.01)
        except Exception as error:  # told at the end of the walk
            self.error = repr(error)


def main():
    with tempfile.TemporaryDirectory() as directory:
        walk = Walk(directory)
        (walk.directory / "sidecar.yaml").write_text(FILE)
        started = []
        try:
            record(walk, started)
        finally:
            for process in started:
                process.send_signal(signal.SIGTERM)
            for process in started:
                process.wait(DEADLINE_S)
        (ROOT / "docs/walk.md").write_text("\n".join(walk.lines).rstrip() + "\n")


def record(walk, started):
    def start(*command, log=subprocess.DEVNULL):
        started.append(subprocess.Popen(command, cwd=walk.directory, env=walk.env, stdout=log, stderr=log))
        return started[-1]

    web, admin, health = (walk.ports[name] for name in ["HTTP_PORT", "ADMIN_PORT", "HEALTH_PORT"])
    walk.say("# A walk through a reload")
    walk.say(
        "Recorded by [`walk.py`](walk.py) from the program as built: commands, their output, and what the log said. "
        "Ports are written as their defaults."
    )
    walk.say("## Start")
    start(str(BUILD / "sidelane-demo-service"))
    walk.run("cat sidecar.yaml")
    walk.run("sidelane check sidecar.yaml")
    walk.say("`sidelane run sidecar.yaml` runs in another terminal.")
    start(str(BUILD / "sidelane"), "run", "sidecar.yaml", log=walk.log.open("w"))
    ready = f"curl -sf http://127.0.0.1:{health}/ready"
    walk.until("ready", lambda: subprocess.run(["bash", "-c", ready], capture_output=True).returncode == 0)
    walk.run(f"sidelane routes --admin 127.0.0.1:{admin}")
    walk.run(f"curl -s -o /dev/null -w '%{{http_code}}\\n' -H 'Host: demo.localhost' http://127.0.0.1:{web}/")

    walk.say("## A WebSocket and a download begin")
    walk.say(
        f"A client echoes numbers over `ws://demo.localhost:9080/ws`, one every 10 ms; curl takes {DOWNLOAD_BYTES >> 20} MiB, slowly. "
        "Both run through everything below."
    )
    echo = Echo(int(web))
    echo.start()
    download = subprocess.Popen(
        ["bash", "-c", f"curl -sS --limit-rate 24M -H 'Host: demo.localhost' 'http://127.0.0.1:{web}/download?bytes={DOWNLOAD_BYTES}' | sha256sum"],
        stdout=subprocess.PIPE, text=True,
    )
    walk.until("the echo", lambda: echo.received > 10 or echo.error)

    walk.say("## Edit, and it is reloaded")
    walk.say("`shop.localhost` is not there. One line in the file, and it is:")
    walk.run(f"curl -s -H 'Host: shop.localhost' http://127.0.0.1:{web}/")
    walk.log_read = len(walk.log.read_text())
    walk.run("sed -i '/subdomain: demo/a \\  - { subdomain: shop, tunnel: demo, limits: { concurrent: 50 } }' sidecar.yaml")
    walk.until_log("configuration reloaded")
    walk.run(f"curl -s -o /dev/null -w '%{{http_code}}\\n' -H 'Host: shop.localhost' http://127.0.0.1:{web}/")
    walk.run(f"sidelane explain shop.localhost/cart --file sidecar.yaml")

    walk.say("## Break it")
    walk.log_read = len(walk.log.read_text())
    walk.run("sed -i 's/shop, tunnel: demo/shop, tunnel: dmeo/; s/concurrent/concurent/' sidecar.yaml")
    walk.until_log("configuration not reloaded")
    walk.say("The last good configuration is in force, and says so:")
    walk.run(f"curl -s -o /dev/null -w '%{{http_code}}\\n' -H 'Host: shop.localhost' http://127.0.0.1:{web}/")
    walk.run(f"curl -s http://127.0.0.1:{health}/metrics | grep ^sidelane_config_last_reload_successful")
    walk.say("The places, with carets:")
    walk.run("sidelane check sidecar.yaml", expected=1)

    walk.say("## Mend it")
    walk.log_read = len(walk.log.read_text())
    walk.run("sed -i 's/dmeo/demo/; s/concurent/concurrent/' sidecar.yaml && sidelane check sidecar.yaml")
    walk.run(f"curl -s -X POST http://127.0.0.1:{admin}/-/reload")
    walk.run(f"curl -s http://127.0.0.1:{health}/metrics | grep ^sidelane_config_last_reload_successful")

    walk.say("## What the WebSocket and the download saw")
    digest = download.communicate(timeout=DEADLINE_S)[0].split()[0]
    echo.ending = True
    echo.join(DEADLINE_S)
    direct = hashlib.sha256()
    with urllib.request.urlopen(f"http://127.0.0.1:{walk.ports['DEMO_PORT']}/download?bytes={DOWNLOAD_BYTES}") as answer:
        while chunk := answer.read(1 << 20):
            direct.update(chunk)
    same = digest == direct.hexdigest()
    if echo.error or echo.sent != echo.received or not same:
        raise SystemExit(f"echo {echo.sent} {echo.received} {echo.error}, download whole: {same}")
    walk.lines += [
        "```text",
        f"WebSocket: {echo.sent} numbers sent, {echo.received} back, in order, on one connection",
        f"download:  {DOWNLOAD_BYTES >> 20} MiB, SHA-256 as the service sent it",
        "```", "",
    ]


if __name__ == "__main__":
    sys.exit(main())
