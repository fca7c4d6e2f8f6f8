#!/usr/bin/env python3
"""Measure userapi beside its peers, in one run on one machine. See README.md.

A *peer* is a server with the same three calls over the same users; a *cell* is one
peer under one call with so many connections for a second; a *round* visits every
peer once, so that noise hits all alike.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing, contextmanager
from http.client import HTTPConnection
from itertools import product
from pathlib import Path
from statistics import median

from peers import BENCH, JSON_SERVER, NODE, PEERS, PYTHON, USERAPI, VENV, run
from report import CALLS, CONNECTIONS, Cell, Results, draw, markdown

DATA = BENCH / ".data"
MEASURES = [*CALLS, "starts", "sizes"]

# Servers ######################################################################


def free_port():
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        return server.getsockname()[1]


class Server:
    """A peer's process and its children (all in one session) on a port of its own."""

    def __init__(self, peer, folder, **environ):
        self.peer, self.port = peer, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        places = {"bin": VENV / "bin", "node": NODE / "node_modules/.bin"}
        places.update(userapi=USERAPI, peers=BENCH / "peers", port=self.port)
        places.update(folder=folder, db=folder / "users.db")
        places = {name: shlex.quote(str(place)) for name, place in places.items()}
        command = peer.command.format(**places)
        environ = {"PYTHONPATH": str(BENCH / "peers"), **environ}
        environ["BENCH_DB"] = str(folder / "users.db")
        plain = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        start = time.perf_counter()
        with (folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                shlex.split(command),
                cwd=BENCH / "peers",
                env={**plain, **environ},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        while not self.answers():
            if self.process.poll() is not None or time.perf_counter() > start + 20:
                self.stop()
                sys.exit(f"{command}\n{(folder / 'server.log').read_text()}")
            time.sleep(0.002)
        self.cold = time.perf_counter() - start

    def answers(self):
        """Whether the first user comes, with a 200."""
        path = self.peer.get.replace("{id}", "1").replace("{id15}", f"{1:015d}")
        try:
            reply = b"".join(self.read(path))
        except OSError:
            return False
        return reply.split(b" ", 2)[1:2] == [b"200"] and b"user1@example.org" in reply

    def read(self, path):
        """The answer to a GET, piece by piece to its end."""
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        with self.connect() as client:
            client.sendall(head.encode())
            while piece := client.recv(1 << 18):
                yield piece

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def stats(self):
        """The fields of /proc/<pid>/stat past the name, of each process."""
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it ended meanwhile
            if int(fields[3]) == self.process.pid:
                yield fields

    def cpu(self):
        """Seconds of processor time so far."""
        ticks = sum(int(stat[11]) + int(stat[12]) for stat in self.stats())
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory(self):
        """Resident MB now (pages that processes share count in each)."""
        pages = sum(int(stat[21]) for stat in self.stats())
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def stop(self):
        for number in signal.SIGTERM, signal.SIGKILL:
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(10)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass


@contextmanager
def serving(folders, peer=None):
    """The servers of several peers, by name, all up at once."""
    servers = {}
    try:
        for name, folder in folders.items():
            servers[name] = Server(peer or PEERS[name], folder)
        yield servers
    finally:
        for server in servers.values():
            server.stop()


@contextmanager
def meanwhile(work):
    """Run work(ended) in a thread until the block is done."""
    ended = threading.Event()
    thread = threading.Thread(target=work, args=(ended,))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def prepare(name, count):
    """A fresh folder with a peer's users in it."""
    folder = DATA / f"{name}-{count}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (PEERS[name].seed)(folder, count)
    return folder


def note(*words):
    print(*words, file=sys.stderr, flush=True)


# Calls ########################################################################


def wrk(server, method, path, ids, body="", connections=16, seconds=1):
    """Load a server with random ids of 1..ids; what it answered and what it cost."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}", "-s"]
    command += [BENCH / "wrk.lua", server.url, "--", method, path, ids]
    before = server.cpu()
    out = run(*command, *([body] if body else []))
    numbers = re.search(r"^RESULT (.*)", out, re.M).group(1).split()
    done, duration, failed, p50, p99 = map(float, numbers)
    cpu = (server.cpu() - before) * 1e6 / max(done, 1)
    return Cell(done * 1e6 / duration, p50 / 1e3, p99 / 1e3, cpu, int(failed))


def load(server, call, connections, ids, seconds=1):
    peer = server.peer
    path = getattr(peer, call)
    method, body = ("POST", peer.body) if call == "post" else ("GET", "")
    return wrk(server, method, path, ids, body, connections, seconds)


def in_process(folder, call, ids, seconds=1):
    """The same work without HTTP: what a server of no cost at all would do."""
    os.environ["BENCH_DB"] = str(folder / "users.db")
    from peers import store

    def post(n):
        item = json.loads(PEERS["inprocess"].body.replace("{id}", str(n)))["item"]
        return store.add(item["name"], item["mail"])

    work = {
        "get": lambda n: store.get(n * 7919 % ids + 1),
        "list": lambda n: store.page(20),
        "post": post,
    }[call]
    times, start, cpu = [], time.perf_counter(), time.process_time()
    while not times or times[-1] < start + seconds:
        json.dumps(work(len(times))).encode()
        times.append(time.perf_counter())
    cpu = (time.process_time() - cpu) * 1e6 / len(times)
    waits = sorted(b - a for a, b in zip([start, *times], times))
    p50, p99 = (waits[len(waits) * p // 100] * 1e3 for p in (50, 99))
    return Cell(len(times) / (times[-1] - start), p50, p99, cpu, 0)


# Measures #####################################################################


def measure_starts(folders, rounds):
    """(seconds from the spawn to the first answer, MB half a second later), by peer."""
    starts = {name: [] for name in folders if name != "inprocess"}
    for _ in range(rounds):
        for name, found in starts.items():
            found.append(start_once(PEERS[name], folders[name]))
    return {name: tuple(map(median, zip(*found))) for name, found in starts.items()}


def start_once(peer, folder, **environ):
    server = Server(peer, folder, **environ)
    try:
        time.sleep(0.5)
        return server.cold, server.memory()
    finally:
        server.stop()


def measure_pythons(folder, rounds):
    """The same of userapi by each Python found here, which is lent bottle.py alone."""
    lent, starts = DATA / "bottle", {}
    lent.mkdir(exist_ok=True)
    shutil.copy(next(VENV.glob("lib/*/site-packages/bottle.py")), lent)
    for version, python in find_pythons():
        peer = PEERS["userapi"]
        peer = peer._replace(command=peer.command.replace("{bin}/python", python))
        start_once(peer, folder, PYTHONPATH=str(lent))  # compiles
        found = [start_once(peer, folder, PYTHONPATH=str(lent)) for _ in range(rounds)]
        starts[f"userapi on Python {version}"] = tuple(map(median, zip(*found)))
    return starts


def find_pythons():
    for version in (f"3.{minor}" for minor in range(9, 15)):
        paths = [shutil.which(f"python{version}")]
        paths += Path.home().glob(f".pyenv/versions/{version}.*/bin/python")
        for path in filter(None, paths):
            probe = [path, "-c", "import sqlite3"]
            if not subprocess.run(probe, capture_output=True).returncode:
                yield version, str(path)
                break


def measure_peers(folders, calls, rounds, count):
    """Cells by (peer, call, connections), one a round; MB after all of it, by peer."""
    cells = {}
    served = {name: path for name, path in folders.items() if name != "inprocess"}
    with serving(served) as servers:
        for server in servers.values():
            load(server, "get", 16, count)  # warm up
        for call, connections, _ in product(calls, CONNECTIONS, range(rounds)):
            note(f"{CALLS[call]}, {connections} connections")
            for name, server in servers.items():
                cell = load(server, call, connections, count)
                cells.setdefault((name, call, connections), []).append(cell)
            if "inprocess" in folders and connections == 1:
                cell = in_process(folders["inprocess"], call, count)
                cells.setdefault(("inprocess", call, 1), []).append(cell)
        memory = {name: server.memory() for name, server in servers.items()}
    return cells, memory


def measure_sizes(sizes, rounds):
    """userapi's cells by (size, call); seconds that each import took, by size."""
    cells, folders, imports = {}, {}, {}
    for size in sizes:
        start = time.perf_counter()
        folders[size] = prepare("userapi", size)
        imports[size] = time.perf_counter() - start
        note(f"{size:,} users imported in {imports[size]:.1f} s")
    with serving(folders, PEERS["userapi"]) as servers:
        pages = {size: deep_page(server, size) for size, server in servers.items()}
        for call, _ in product(["get", "list", "deep", "post"], range(rounds)):
            note(f"{call}, {len(sizes)} sizes")
            for size, server in servers.items():
                if call == "deep":
                    cell = wrk(server, "GET", pages[size], size)
                else:
                    cell = load(server, call, 16, size)
                cells.setdefault((size, call), []).append(cell)
    return cells, imports


def deep_page(server, size):
    """The path of a page at nine tenths, found as a client does: by `next`."""
    path, client = "/api/user?limit=1000", HTTPConnection("127.0.0.1", server.port)
    for _ in range(size * 9 // 10_000):
        client.request("GET", path)
        path = json.loads(client.getresponse().read())["next"]
        path = re.sub("^https?://[^/]+", "", path)
    client.close()
    return path.replace("limit=1000", "limit=20")


def measure_stream(size):
    """All users in one answer: MB/s, MB grown by it, another client's p99 meanwhile."""
    peak = []

    def watch(ended):
        while not ended.wait(0.01):
            peak.append(server.memory())

    def read_on(ended):
        while not ended.is_set():
            read_all(server)

    with serving({"userapi": DATA / f"userapi-{size}"}) as servers:
        server = servers["userapi"]
        before = server.memory()
        with meanwhile(watch):
            read_all(server)
        start = time.perf_counter()
        speed = read_all(server) / (time.perf_counter() - start)
        with meanwhile(read_on):
            other = load(server, "get", 1, size, 3)
    return speed / 1e6, max(peak) - before, other.p99


def read_all(server):
    return sum(map(len, server.read("/api/user")))


def measure_slow(size):
    """p99 of 16 clients beside 300 that are idle and 100 that drip."""
    head = b"GET /api/user/1 HTTP/1.1\r\nHost: localhost\r\nX-Drip: " + b"x" * 999

    def drip(ended):
        for byte in head:
            for client in clients[300:]:
                client.send(bytes([byte]))
            if ended.wait(0.05):
                break

    with (
        serving({"userapi": DATA / f"userapi-{size}"}) as servers,
        ExitStack() as stack,
    ):
        connect = servers["userapi"].connect
        clients = [stack.enter_context(connect()) for _ in range(400)]
        with meanwhile(drip):
            return load(servers["userapi"], "get", 16, size, 5).p99


# Command line #################################################################


def install():
    """The pinned peers, into bench/.venv and bench/.node, unless they are there."""
    wanted = (BENCH / "requirements.txt").read_text() + JSON_SERVER
    stamp = VENV / "installed.txt"
    if not stamp.exists() or stamp.read_text() != wanted:
        note("installing the peers")
        run(sys.executable, "-m", "venv", "--clear", VENV)
        run(PYTHON, "-m", "pip", "install", "-q", "-r", BENCH / "requirements.txt")
        run("npm", "install", "--no-audit", "--no-fund", "--prefix", NODE, JSON_SERVER)
        stamp.write_text(wanted)
    if Path(sys.prefix) != VENV:
        os.execv(PYTHON, [str(PYTHON), *sys.argv])


def words(known):
    def parse(text):
        found = text.split(",")
        unknown = set(found) - set(known)
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown}: choose from {list(known)}")
        return [name for name in known if name in found]

    return parse


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round, 100,000 users")
    parser.add_argument("--only", type=words(PEERS), help=",".join(PEERS))
    parser.add_argument("--calls", type=words(MEASURES), help=",".join(MEASURES))
    options = parser.parse_args()
    for program in "wrk", "npm":
        if not shutil.which(program):
            parser.error(f"{program} is needed (see bench/README.md)")
    install()
    results = measure(
        options.only or list(PEERS),
        options.calls or MEASURES,
        rounds=1 if options.quick else 3,
        sizes=[1000, 100_000] if options.quick else [1000, 100_000, 1_000_000],
    )
    text = "\n".join(markdown(results))
    print(text)
    for key, cells in results.cells.items():
        if failed := sum(cell.failed for cell in cells):
            note(f"{key}: {failed} requests FAILED")
    if not (options.quick or options.only or options.calls):
        title, rest = text.split("\n", 1)
        text = f"{title}\n\n![Requests per second](chart.svg)\n{rest}\n"
        (BENCH / "RESULTS.md").write_text(text, encoding="utf-8")
        draw(results, BENCH / "chart.svg")


def measure(names, calls, rounds, sizes, count=1000):
    """All that is wanted, one after the other; what is not of a peer is userapi's."""
    results = Results(names, [call for call in CALLS if call in calls], rounds)
    start = time.perf_counter()
    folders = {name: prepare(name, count) for name in names}
    if "starts" in calls:
        note("starts")
        results.starts = measure_starts(folders, rounds)
        if "userapi" in names:
            results.pythons = measure_pythons(folders["userapi"], rounds)
    if results.calls:
        found = measure_peers(folders, results.calls, rounds, count)
        results.cells, results.memory = found
    if "sizes" in calls and "userapi" in names:
        results.sizes, results.imports = measure_sizes(sizes, rounds)
        results.stream = measure_stream(sizes[-1])
        results.slow = measure_slow(sizes[-1])
    results.minutes = (time.perf_counter() - start) / 60
    shutil.rmtree(DATA)
    return results


if __name__ == "__main__":
    main()
