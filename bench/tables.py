"""The report: tables in Markdown, ratios, and which aims are met. Medians of rounds."""

import datetime
import os
import platform
import statistics

from stage import (
    DIRECT,
    HAPROXY,
    NGINX,
    SIDELANE,
    SIDELANE_TLS,
    SIDELANE_TUNNEL_TLS,
)

# Both Sidelane processes together.
IDLE_KIB_AIM = 10
PLURALS = {"echo": "echoes"}
PART_TITLES = {"outer": "outer haproxy", "inner": "inner haproxy"}


def report(options, cases, results, idle):
    lines = [
        f"# Head-to-head, {datetime.date.today().isoformat()}",
        "",
        f"{platform.machine()}, Linux {platform.release()}, {os.cpu_count()} cores; proxies on core"
        f" {options.proxy_core}, load and service on core {options.load_core}; loopback, TLS only where a path says so;"
        f" {options.rounds} rounds of {options.seconds} s, medians.",
        "",
    ]
    for case in cases:
        lines += case_table(case, results[case.title])
    for count, paths in idle.items():
        lines += idle_table(count, paths)
    lines += parts_table([case for case in cases if not case.bulk and case.kind not in ("tls", "raw", "ring")], results)
    lines += aims_table(cases, results, idle)
    return "\n".join(lines)


def median(reports, value):
    return statistics.median(value(report) for report in reports)


def cost(case, reports):
    """CPU-s per GB, or µs per operation."""
    if case.bulk:
        return median(reports, lambda report: report["cpu_s"] / (report["bytes"] / 1e9))
    return median(reports, lambda report: report["cpu_s"] * 1e6 / report["operations"])


def ratio(value, base):
    return f"{value / base:.2f}" if value is not None and base else "-"


def label(name):
    return f"**{name}**" if name in (SIDELANE, SIDELANE_TUNNEL_TLS, SIDELANE_TLS) else name


def row(cells):
    return "| " + " | ".join(cells) + " |"


def head(cells):
    return [row(cells), "|" + "---|" * len(cells)]


def case_table(case, paths):
    if case.bulk:
        columns = ["path", "GB/s", "proxy CPU-s per GB"]
    else:
        columns = ["path", f"{PLURALS.get(case.operation, case.operation + 's')}/s", "p50 µs", "p99 µs"]
        columns.append(f"proxy CPU µs per {case.operation}")
    columns += [title for title, _ in case.bases] + ["user / system", "resident MiB"]
    costs = {name: cost(case, reports) for name, reports in paths.items() if name != DIRECT}
    lines = [f"## {case.title}", "", *head(columns)]
    for name, reports in paths.items():
        seconds = lambda report: report["duration_us"] / 1e6  # noqa: E731
        cells = [label(name)]
        if case.bulk:
            cells.append(f"{median(reports, lambda report: report['bytes'] / 1e9 / seconds(report)):.2f}")
        else:
            cells.append(f"{median(reports, lambda report: report['operations'] / seconds(report)):,.0f}")
            cells.append(f"{median(reports, lambda report: report['p50_us']):,.0f}")
            cells.append(f"{median(reports, lambda report: report['p99_us']):,.0f}")
        if name == DIRECT:
            cells += ["-"] * 5
        else:
            share = median(reports, lambda report: report["user_s"] / max(report["cpu_s"], 1e-9))
            cells.append(f"{costs[name]:.2f}")
            cells += [ratio(costs[name], costs.get(base)) for _, base in case.bases]
            cells.append(f"{share:.0%} / {1 - share:.0%}")
            cells.append(f"{median(reports, lambda report: report['memory_kib']) / 1024:.1f}")
        lines.append(row(cells))
    return [*lines, ""]


def idle_kib(rounds):
    return median(rounds, lambda kib: sum(kib.values()))


def idle_table(count, paths):
    values = {name: idle_kib(rounds) for name, rounds in paths.items()}
    lines = [f"## Memory: {count:,} idle WebSockets", ""]
    lines += head(["path", "KiB per connection", "by process", "of one nginx hop", "of two haproxy"])
    for name, value in values.items():
        rounds = paths[name]
        parts = (f"{part} {median(rounds, lambda kib: kib[part]):.1f}" for part in rounds[0])
        ratios = [ratio(value, values.get(NGINX)), ratio(value, values.get(HAPROXY))]
        lines.append(row([label(name), f"{value:.1f}", ", ".join(parts), *ratios]))
    return [*lines, ""]


def parts_table(cases, results):
    """User and system time per operation, of each process."""
    if not cases:
        return []
    parts = {}
    for case in cases:
        for name, reports in results[case.title].items():
            for part in reports[0]["parts"]:
                parts[name, part] = PART_TITLES.get(part, part)
    lines = ["## Where the time goes: user + system µs per operation", ""]
    lines += head(["load", *parts.values()])
    for case in cases:
        cells = [case.title]
        for name, part in parts:
            of_part = lambda index: median(  # noqa: E731
                results[case.title][name],
                lambda report: report["parts"][part][index] * 1e6 / report["operations"],
            )
            cells.append(f"{of_part(0):.2f} + {of_part(1):.2f}")
        lines.append(row(cells))
    return [*lines, ""]


def aims_table(cases, results, idle):
    rows = []
    for case in cases:
        paths = results[case.title]
        if case.aim in paths and SIDELANE in paths:
            value = cost(case, paths[SIDELANE]) / cost(case, paths[case.aim])
            aim = f"at most the CPU of {case.aim}"
            rows.append((case.title, aim, f"{value:.2f} of it", value <= 1))
    for count, paths in idle.items():
        if SIDELANE in paths:
            value = idle_kib(paths[SIDELANE])
            aim = f"at most {IDLE_KIB_AIM} KiB per connection"
            rows.append((f"{count:,} idle WebSockets", aim, f"{value:.1f} KiB", value <= IDLE_KIB_AIM))
    if not rows:
        return []
    lines = ["## Aims", "", *head(["load", "aim", "measured", "met"])]
    lines += [row([what, aim, value, "yes" if met else "**no**"]) for what, aim, value, met in rows]
    return [*lines, ""]
