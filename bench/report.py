"""What the measures say: tables in Markdown and a chart. Shown are medians of the
rounds; a ratio is the median of the ratios within each round."""

import os
import platform
import sqlite3
from datetime import date
from statistics import median
from typing import NamedTuple

from peers import PEERS

CALLS = {"get": "GET one", "list": "list of 20", "post": "POST one"}
CONNECTIONS = 1, 16, 64

#: How many times a peer's requests per second userapi's are to be.
RATIOS = [
    ("get", 16, "pocketbase", 2),
    ("get", 16, "fastapi", 5),
    ("get", 16, "falcon", 1.5),
    ("get", 16, "flask", 20),
    ("get", 16, "bottle", 0.75),
    ("post", 64, "pocketbase", 2.5),
    ("post", 64, "fastapi", 5),
    ("post", 64, "bottle", 3),
    ("post", 1, "pocketbase", 0.7),
    ("list", 16, "pocketbase", 5),
]


class Cell(NamedTuple):
    rate: float  # requests per second
    p50: float  # milliseconds
    p99: float
    cpu: float  # microseconds of the server's processor time per request
    failed: int


class Results:
    """What was measured; whatever was not stays empty."""

    def __init__(self, names, calls, rounds):
        self.names, self.calls, self.rounds = names, calls, rounds
        self.cells = {}  # (peer, call, connections): a cell a round
        self.sizes = {}  # (users, call): a cell a round
        self.starts = {}  # peer: (seconds, MB)
        self.pythons = {}  # the same for userapi by Python
        self.memory = {}  # peer: MB after the load
        self.imports = {}  # users: seconds
        self.stream = ()  # MB/s, MB grown, ms
        self.slow = None  # ms
        self.minutes = 0


def ratio(results, call, connections, name):
    """userapi's rate over a peer's: where the peer logs its requests, so does it."""
    ours = "userapi" if PEERS[name].logs else "userapi-quiet"
    cells = [results.cells.get((peer, call, connections), []) for peer in (ours, name)]
    rates = [ours.rate / theirs.rate for ours, theirs in zip(*cells)]
    return median(rates) if rates else None


def slowdown(results, key, base):
    cells = [results.sizes.get(k, []) for k in (base, key)]
    rates = [before.rate / now.rate for before, now in zip(*cells)]
    return median(rates) if rates else None


def middle(cells, field):
    return median(getattr(cell, field) for cell in cells) if cells else None


def show(number, unit=""):
    """Three digits that matter, thousands apart."""
    if number is None:
        return ""
    digits = f"{number:,.0f}" if number >= 100 else f"{number:#.3g}".rstrip(".")
    return digits + unit


# Tables #######################################################################


def tables(results):
    """Each as its title, its head and its rows."""
    yield "Aims", ("userapi", "aim", "measured", ""), rows_of_aims(results)
    if results.cells:
        head = [""]
        head += [f"{CALLS[call]} · {n}" for call in results.calls for n in CONNECTIONS]
        for title, text in BY_PEER.items():
            yield title, head, rows_by_peer(results, text)
    if results.starts:
        facts = "first answer, s", "idle, MB", "after load, MB", "POST synced", "logs"
        yield "Start, memory, durability", ("", *facts), rows_of_starts(results)
    if results.sizes:
        calls = "GET one", "first 20", "20 at nine tenths", "POST one", "import, s"
        title = "userapi by users: requests per second, 16 connections"
        yield title, ("users", *calls), rows_of_sizes(results)


def rows_of_aims(results):
    for what, sign, aim, unit, found in aims(results):
        if found is not None:
            reached = found >= aim if sign == "≥" else found <= aim
            verdict = "✓" if reached else "**✗**"
            yield what, f"{sign} {aim:g}{unit}", show(found, unit), verdict


def aims(results):
    """What userapi is to reach, and what it did (None where that is not known)."""
    for call, n, name, aim in RATIOS:
        what = f"{CALLS[call]} · {n} over {PEERS[name].label}"
        yield what, "≥", aim, "×", ratio(results, call, n, name)
    least, most = min(results.imports, default=0), max(results.imports, default=0)
    slower = slowdown(results, (most, "get"), (least, "get"))
    yield f"GET one of {most:,} users slower than of {least:,}", "≤", 1.3, "×", slower
    slower = slowdown(results, (most, "deep"), (most, "list"))
    yield f"page at {most * 9 // 10:,} slower than the first", "≤", 2, "×", slower
    speed, growth, p99 = results.stream or (None, None, None)
    yield f"all {most:,} users in one answer", "≥", 40, " MB/s", speed
    yield "memory grown by that", "≤", 12, " MB", growth
    yield "another client's p99 meanwhile", "≤", 50, " ms", p99
    what = "others' p99 beside 300 idle and 100 dripping clients"
    yield what, "≤", 250, " ms", results.slow
    seconds, idle = results.starts.get("userapi", (None, None))
    yield "start to first answer", "≤", 0.5, " s", seconds
    yield "idle memory", "≤", 30, " MB", idle


def times_as_fast(results, name, call, n):
    return "" if "userapi" in name else show(ratio(results, call, n, name), "×")


def rate(results, *key):
    return show(middle(results.cells.get(key), "rate"))


def waits(results, *key):
    cells = results.cells.get(key)
    return cells and f"{show(middle(cells, 'p50'))} / {show(middle(cells, 'p99'))}"


def processor(results, *key):
    return show(middle(results.cells.get(key), "cpu"))


BY_PEER = {
    "userapi is so many times as fast": times_as_fast,
    "Requests per second": rate,
    "p50 / p99 in ms": waits,
    "The server's processor time per request, µs": processor,
}


def rows_by_peer(results, text):
    for name in results.names:
        keys = [(name, call, n) for call in results.calls for n in CONNECTIONS]
        yield PEERS[name].label, *(text(results, *key) or "" for key in keys)


def rows_of_starts(results):
    for name, (seconds, idle) in results.starts.items():
        peer, after = PEERS[name], show(results.memory.get(name))
        facts = ("yes" if fact else "no" for fact in (peer.synced, peer.logs))
        yield peer.label, show(seconds), show(idle), after, *facts
    for label, (seconds, idle) in results.pythons.items():
        yield label, show(seconds), show(idle), "", "yes", "yes"


def rows_of_sizes(results):
    for size, seconds in results.imports.items():
        calls = (results.sizes.get((size, c)) for c in ("get", "list", "deep", "post"))
        rates = (show(middle(cells, "rate")) for cells in calls)
        yield f"{size:,}", *rates, show(seconds)


def markdown(results):
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    yield f"""# Results

{date.today()}, {system}, Python {platform.python_version()}, SQLite \
{sqlite3.sqlite_version}; medians of {results.rounds} rounds in \
{results.minutes:.0f} minutes. A number after · is how many connections.
Made by `python bench/run.py`; what is measured, and how, is in its README.md."""
    for title, head, rows in tables(results):
        rows = [row for row in rows if any(row[1:])]
        if not rows:
            continue
        yield f"\n## {title}\n"
        yield "| " + " | ".join(head) + " |"
        yield "|---" + "|---:" * (len(head) - 1) + "|"
        yield from ("| " + " | ".join(row) + " |" for row in rows)


# Chart ########################################################################


def draw(results, path):
    """A bar for each peer, for GET, list and POST side by side."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "userapi", "font.size": 9})
    from matplotlib import pyplot

    names = [name for name in results.names if PEERS[name].command][::-1]
    labels = [PEERS[name].label.strip("*") for name in names]
    colours = ["#0b6bcb" if name.startswith("userapi") else "#b8c0cc" for name in names]
    figure, axes = pyplot.subplots(
        1, 3, figsize=(10, 1 + 0.26 * len(names)), sharey=True
    )
    for axis, (call, n) in zip(axes, [("get", 16), ("list", 16), ("post", 64)]):
        cells = (results.cells.get((name, call, n)) for name in names)
        rates = [middle(found, "rate") or 0 for found in cells]
        bars = axis.barh(labels, rates, color=colours)
        axis.bar_label(bars, [show(rate) for rate in rates], padding=3)
        axis.set_title(f"{CALLS[call]}, {n} connections", loc="left")
        axis.set_xlim(0, max(rates) * 1.25)
        axis.xaxis.set_visible(False)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(left=False)
    figure.suptitle("Requests per second", x=0.01, ha="left", weight="bold")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    text = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(map(str.rstrip, text)) + "\n", encoding="utf-8")
