#!/usr/bin/env python3
"""Head-to-head on one machine: Sidelane (relay and sidecar), one nginx hop, two chained haproxy.

All proxies of a path share one core, load and service the other; each process has one worker
thread. What counts is the CPU of the proxies per operation and per byte: rates drift with the
neighbours of the machine, and are shown for orientation. Every number of a table comes from the
same run, in rounds that visit all paths, and is the median of its rounds.

Started by `cargo bench-e2e`. Loopback only; what it starts it ends.
"""

import argparse
import os
import pathlib
import sys

import machine
import tables
from stage import DIRECT, KINDS, NAMES, NGINX, RAW_NAMES, RING_NAMES, SIDELANE, TLS_NAMES, Stage
from workloads import Runner, cases

PACKAGES = {
    "nginx": "nginx",
    "haproxy": "haproxy",
    "openssl": "openssl",
    "taskset": "util-linux",
    "wrk": "wrk",
}
WORKLOADS = (*KINDS, "tls", "raw", "ring", "memory")


def main():
    options = arguments()
    machine.install_missing(PACKAGES)
    machine.raise_descriptors()
    if options.proxy_core == options.load_core:
        print("warning: one core for everything; rates mean nothing, CPU per request still does")
    # Idle connections are WebSockets.
    kinds = [kind for kind in KINDS if kind in options.only]
    if {"tls", "ring"} & set(options.only) and "http" not in kinds:
        kinds.append("http")
    if {"memory", "raw"} & set(options.only) and "websocket" not in kinds:
        kinds.append("websocket")
    with Stage(options, kinds) as stage:
        services = stage.start_services()
        names = options.paths or NAMES
        more = TLS_NAMES if "tls" in options.only else ()
        more += RAW_NAMES if "raw" in options.only else ()
        more += RING_NAMES if "ring" in options.only else ()
        runner = Runner(options, stage)
        # First, while no other proxy takes memory and time.
        idle = {}
        if "memory" in options.only:
            bound = machine.proxied_connections_max()
            counts = [min(count, bound) for count in options.idle]
            idle = runner.idle_memory(counts, names, services)
        found, results = cases(options), {}
        if found:
            plain = names if any(case.kind not in ("tls", "raw", "ring") for case in found) else ()
            paths = {name: stage.start(name, services) for name in dict.fromkeys([*plain, *more])}
            results = runner.measure(found, paths)
            if options.profile and SIDELANE in paths:
                runner.profile(found, paths[SIDELANE])
        table = tables.report(options, found, results, idle)
    print(table)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(table)
    reports = (report for paths in results.values() for rounds in paths.values() for report in rounds)
    if any(report["errors"] or not report["operations"] for report in reports):
        sys.exit("some operations failed; the table is not to be trusted")


def arguments():
    cores = sorted(os.sched_getaffinity(0))
    numbers = lambda text: [int(number) for number in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--program-directory", type=pathlib.Path, default="target/release")
    parser.add_argument("--only", type=workloads, default=WORKLOADS, metavar=",".join(WORKLOADS))
    parser.add_argument("--seconds", type=int, default=5, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=numbers, default="1,64,1000", help="of HTTP/1.1")
    parser.add_argument("--idle", type=numbers, default="1000,10000", help="idle WebSockets")
    parser.add_argument("--no-bulk", action="store_true")
    parser.add_argument("--paths", type=chosen_paths, help="comma-separated; default all", default=[])
    parser.add_argument("--proxy-core", type=int, default=cores[0])
    parser.add_argument("--load-core", type=int, default=cores[-1])
    parser.add_argument("--out", type=pathlib.Path, help="also write the table here")
    parser.add_argument("--profile", action="store_true", help="perf report of Sidelane at the end")
    return parser.parse_args()


def workloads(text):
    chosen = text.split(",")
    for name in chosen:
        if name not in WORKLOADS:
            raise argparse.ArgumentTypeError(f"{name}: one of {', '.join(WORKLOADS)}")
    return chosen


def chosen_paths(text):
    """By the beginning of their names: `haproxy,Sidelane`. The base of the ratios is always there."""
    return [
        name
        for name in NAMES
        if name in (DIRECT, NGINX) or any(name.startswith(word) for word in text.split(",") if word)
    ]


if __name__ == "__main__":
    main()
