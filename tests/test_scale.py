"""userapi on PostgreSQL: the core suite, then what only a database for many can show.

A PostgreSQL of its own is started in a temporary folder, and for the tests of failing
over the cluster of examples/cluster: a primary with a synchronous standby, three
processes, HAProxy.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import xml.etree.ElementTree as tree
from pathlib import Path

import psycopg
import pytest
from processes import CLEAN, USERAPI, Process, wait_for

ROOT = USERAPI.parent
sys.path.insert(0, str(ROOT / "examples" / "cluster"))
import cluster as example  # noqa: E402

QUICK = f"{example.CONFIG}\nfsync = off\nmax_connections = 200\n"
SYNCHRONOUS = f"{QUICK}\nsynchronous_standby_names = '*'\n"
JSON = {"Content-Type": "application/json"}
ADA = {"name": "Ada", "mail": "ada@example.org"}


@pytest.fixture
def folder():
    """A folder that PostgreSQL may use, whoever it has to run as."""
    with tempfile.TemporaryDirectory() as path:
        if os.geteuid() == 0:
            example.shutil.chown(path, "postgres")
        yield Path(path)


@pytest.fixture(scope="module")
def server():
    with tempfile.TemporaryDirectory() as path:
        if os.geteuid() == 0:
            example.shutil.chown(path, "postgres")
        made = example.Postgres(Path(path) / "data", QUICK).make()
        yield made
        made.stop()


@pytest.fixture
def db(server):
    """The URL of an empty database."""
    name = f"t{uuid.uuid4().hex}"
    with psycopg.connect(server.url, autocommit=True) as other:
        other.execute(f"CREATE DATABASE {name}")
    yield f"{server.url.rpartition('/')[0]}/{name}"
    with psycopg.connect(server.url, autocommit=True) as other:
        other.execute(f"DROP DATABASE {name} WITH (FORCE)")


def run(*args, **more):
    """The command line: exit status, standard output, standard error."""
    command = [sys.executable, str(USERAPI), *map(str, args)]
    done = subprocess.run(
        command, capture_output=True, timeout=120, text=True, env=CLEAN, **more
    )
    return done.returncode, done.stdout, done.stderr


@contextlib.contextmanager
def serving(folder, db, *args):
    argv = [USERAPI, "--db", db, "--port", "0", "--log", "off", *args]
    process = Process(Path(folder) / f"said-{uuid.uuid4().hex}", argv)
    try:
        yield process
    finally:
        process.kill()


def ask(port, method, path, body=None, headers=None, timeout=20):
    """One request: status, headers, text."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    with contextlib.closing(connection):
        sent = body and json.dumps(body)
        connection.request(method, path, sent, {**JSON, **(headers or {})})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode()


# --- one database


def test_the_core_suite_passes_on_postgresql(server, tmp_path):
    """All of it, but for the tests that are marked as of SQLite's files."""
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"--junit-xml={report}", str(ROOT / "test_userapi.py")],
        env={**CLEAN, "TEST_POSTGRESQL": server.url},
        capture_output=True,
        timeout=1200,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    cases = list(tree.parse(report).getroot().iter("testcase"))
    left = [(case.get("name"), skip) for case in cases for skip in case.iter("skipped")]
    for name, skip in left:
        print(f"{name}: {skip.get('message')}")
        assert skip.get("message").startswith("of SQLite alone: ")
    assert len(left) < 120 < 2000 < len(cases)


def test_ten_processes_may_start_at_once(db, tmp_path):
    command = [sys.executable, str(USERAPI), "token", "add"]
    processes = [
        subprocess.Popen([*command, f"t{n}", "--db", db], stdout=-1, stderr=-1)
        for n in range(10)
    ]
    for process in processes:
        assert process.wait(60) == 0, process.stderr.read()
        process.stdout.close()
        process.stderr.close()
    assert run("token", "list", "--db", db)[1].count("admin") == 10
    assert run("check", "--db", db) == (0, "whole: 0 users\n", "")


def foreign(other):
    other.execute("CREATE TABLE users (login text)")


def newer(other):
    other.execute("COMMENT ON TABLE users IS 'userapi 99'")


@pytest.mark.parametrize(
    "damage, told",
    [(foreign, "of another program"), (newer, "of a newer userapi")],
)
def test_what_is_not_ours_is_refused_in_a_line(server, db, damage, told):
    if damage is newer:
        assert run("import", "-", "--db", db, input="name,mail\n")[0] == 0
    with psycopg.connect(db, autocommit=True) as other:
        damage(other)
    secret = db.replace("postgres@", "postgres:secret@")
    for command in ("check", "serve"):
        status, out, err = run(command, "--db", secret)
        assert (status, out) == (1, "") and told in err
        assert len(err.splitlines()) == 1 and "secret" not in err


def test_a_database_of_version_1_is_migrated(db):
    assert run("import", "-", "--db", db, input="name,mail\nAda,ada@x\n")[0] == 0
    with psycopg.connect(db, autocommit=True) as other:
        other.execute("DROP VIEW sqlite_master")
        other.execute("COMMENT ON TABLE users IS 'userapi 1'")
    assert run("check", "--db", db) == (0, "whole: 1 users\n", "")


def test_a_database_that_is_not_there_is_told_in_a_line():
    db = f"postgresql://someone:secret@127.0.0.1:{example.free_port()}/users"
    status, out, err = run("serve", "--db", db)
    assert (status, out) == (1, "") and len(err.splitlines()) == 1
    assert "refused" in err and "secret" not in err


def test_a_url_that_is_none_is_told_in_a_line():
    status, out, err = run("serve", "--db", "postgresql://someone:secret%@localhost/x")
    assert (status, out) == (2, "") and len(err.splitlines()) == 1
    assert "URL" in err and "secret" not in err


def test_without_psycopg_a_line_says_how_to_get_it():
    code = "import sys; sys.modules['psycopg'] = None; import userapi;"
    code += " sys.exit(userapi.main(['check', '--db', 'postgresql://localhost/x']))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and "pip install 'psycopg[binary]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_what_postgresql_cannot_keep_is_refused(db, tmp_path):
    with serving(tmp_path, db) as process:
        item = {**ADA, "address": [{"city": "A\0B"}]}
        status, _, text = ask(process.port, "POST", "/api/v2/user", {"item": item})
        assert status == 422 and "U+0000" in text
        assert ask(process.port, "GET", "/api/user?q=%00")[2] == '{"results": []}'
        assert ask(process.port, "POST", "/api/user", {"item": ADA})[0] == 201


def test_a_database_goes_from_sqlite_to_postgresql_and_back_whole(db, tmp_path):
    import userapi

    phones, cities = [{"number": "+49 30 1234567"}], [{"city": "九龍"}, {"city": "B"}]
    store = userapi.Store(str(tmp_path / "first.db"))
    store.create_users(
        {"id": n * 3, "name": f"Ünal {n}", "mail": f"u{n}@x", "phone": phones * (n % 3)}
        for n in range(1, 5000)
    )
    store.merge_users({"id": n * 3, "address": cities} for n in range(1, 300))
    store.close()
    files = [tmp_path / f"{n}.ndjson" for n in range(3)]
    places = [tmp_path / "first.db", db, tmp_path / "last.db"]
    for n, (place, file) in enumerate(zip(places, files)):
        if n:
            assert run("import", files[n - 1], "--db", place)[0] == 0
        assert run("export", file, "--db", place)[0] == 0
        assert run("check", "--db", place)[0] == 0
    assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes()
    assert b'"version": 2' in files[0].read_bytes()


def plan(db, sql, *values):
    import userapi

    with psycopg.connect(db, autocommit=True) as other:
        other.execute("SET enable_seqscan = off")
        text = f"EXPLAIN {userapi.translate(sql)}"
        return "\n".join(row[0] for row in other.execute(text, values or None))


def test_reading_uses_indexes(db):
    import userapi

    lines = "".join(f"{n},User {n},u{n}@x\n" for n in range(1, 3000))
    assert run("import", "-", "--db", db, input=f"id,name,mail\n{lines}")[0] == 0
    where, values = userapi.Query(q="ser 29").where()
    found = plan(db, f"SELECT user_id FROM users WHERE {where}", *values)
    assert "users_by_text" in found and "Seq Scan" not in found
    for sort, column in userapi.SORT_INDEXES:
        sql = "SELECT user_id FROM users WHERE (users.{0}, user_id) > (?, ?)"
        sql += " ORDER BY users.{0}, users.user_id LIMIT 10"
        found = plan(db, sql.format(column), "n", 7)
        assert f"users_by_{sort}" in found and "Sort" not in found


# --- a database that does not answer


@contextlib.contextmanager
def standing_still(server):
    """No process of this PostgreSQL does anything."""
    pid = (server.folder / "postmaster.pid").read_text().split()[0]
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", pid], capture_output=True, text=True, check=True
    )
    pids = [int(pid), *map(int, listed.stdout.split())]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def test_a_slow_database_keeps_nobody_from_asking_for_our_health(server, db, tmp_path):
    with serving(tmp_path, db) as process:
        port, answers = process.port, []
        assert ask(port, "POST", "/api/user", {"item": ADA})[0] == 201
        calls = [("GET", "/api/user/1", None)] * 20
        calls += [("POST", "/api/user", {"item": ADA})] * 20
        threads = [
            threading.Thread(target=lambda c=call: answers.append(ask(port, *c)[0]))
            for call in calls
        ]
        with standing_still(server):
            for thread in threads:
                thread.start()
            for _ in range(20):
                began = time.monotonic()
                assert ask(port, "GET", "/health")[2] == '{"status": "ok"}'
                assert time.monotonic() - began < 1
            assert not answers
        for thread in threads:
            thread.join(60)
        assert sorted(answers) == [200] * 20 + [201] * 20


def test_connections_that_were_cut_are_made_anew(server, db, tmp_path):
    with serving(tmp_path, db) as process:
        port = process.port
        for _ in range(3):
            assert ask(port, "POST", "/api/user", {"item": ADA})[0] == 201
            assert ask(port, "GET", "/api/user/1")[0] == 200
            with psycopg.connect(server.url, autocommit=True) as other:
                other.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = %s",
                    (db.rpartition("/")[2],),
                )
        assert ask(port, "GET", "/api/changes?limit=9")[2].count("create") == 3


def test_of_many_while_no_server_answers_a_few_wait_for_it(folder, tmp_path):
    """The others are told at once; each would wait for seconds, one after another."""
    made = example.Postgres(folder / "data", QUICK).make()
    try:
        with serving(tmp_path, made.url) as process, socket.socket() as silent:
            made.stop()
            silent.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            silent.bind(("127.0.0.1", made.port))
            silent.listen(200)
            calls = [("GET", "/api/user/1", None)] * 30
            calls += [("POST", "/api/user", {"item": ADA})] * 10
            answers = []
            threads = [
                threading.Thread(
                    target=lambda c=call: answers.append(
                        ask(process.port, *c, timeout=60)
                    )
                )
                for call in calls
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(90)
            assert [status for status, _, _ in answers] == [503] * 40
            assert all(int(headers["Retry-After"]) > 0 for _, headers, _ in answers)
            silent.setblocking(False)
            asked = []
            with contextlib.suppress(BlockingIOError):
                while True:
                    asked.append(silent.accept()[0].close())
            assert 1 < len(asked) <= 20, "each looks twice: who writes, who reads?"
            silent.close()
            made.run("pg_ctl", "-w", "-l", made.folder / "log", "start")
            wait_for(
                lambda: ask(process.port, "POST", "/api/user", {"item": ADA})[0] == 201,
                "its return",
            )
    finally:
        made.stop()


# --- a primary, a standby, three processes, HAProxy


@pytest.fixture
def cluster(folder):
    with example.Cluster(folder, SYNCHRONOUS) as made:
        yield made


def test_while_nobody_takes_writes_reads_go_on(cluster):
    """The primary has died; the standby serves reads until it is promoted, and writes
    from then on, in the same processes."""
    assert ask(cluster.port, "POST", "/api/user", {"item": ADA})[0] == 201
    cluster.primary.kill()
    for port in (*cluster.ports, cluster.port):
        assert ask(port, "GET", "/api/user/1")[0] == 200
        status, headers, _ = ask(port, "POST", "/api/user", {"item": ADA})
        assert status == 503 and int(headers["Retry-After"]) > 0
        assert ask(port, "GET", "/health")[0] == 200
    cluster.standby.promote()
    cluster.primary, cluster.standby = cluster.standby, cluster.primary
    cluster.standby.copy(cluster.primary)

    def written():
        return ask(cluster.port, "POST", "/api/user", {"item": ADA})[0] == 201

    wait_for(written, "a write after the promotion")
    assert [process.poll() for process in cluster.processes.values()] == [None] * 3


def test_a_process_may_have_a_standby_alone(cluster, tmp_path):
    assert ask(cluster.port, "POST", "/api/user", {"item": ADA})[0] == 201
    with serving(tmp_path, cluster.standby.url) as process:
        assert ask(process.port, "GET", "/api/user/1")[0] == 200
        status, headers, _ = ask(process.port, "DELETE", "/api/user/1")
        assert status == 503 and int(headers["Retry-After"]) > 0


class Writer(threading.Thread):
    """Creates users one after the other, each until it is acknowledged; every try goes
    to another port."""

    def __init__(self, ports):
        super().__init__()
        self.ports, self.done, self.again = itertools.cycle(ports), {}, 0
        self.enough = threading.Event()

    def run(self):
        while not self.enough.is_set():
            key = uuid.uuid4().hex
            while (made := self.create(key)) is None:
                self.again += 1
                time.sleep(0.02)
            self.done[f"{key}@x"] = made

    def create(self, key):
        """The new user's id; None where nobody knows whether there is one."""
        item, headers = {"name": "W", "mail": f"{key}@x"}, {"Idempotency-Key": key}
        try:
            port = next(self.ports)
            got = ask(port, "POST", "/api/user", {"item": item}, headers, 10)
        except (OSError, http.client.HTTPException):
            return None
        assert got[0] in (201, 502, 503, 504), got
        return json.loads(got[2])["results"][0]["id"] if got[0] == 201 else None


class Reader(threading.Thread):
    """Reads the log of changes as it grows."""

    def __init__(self, port):
        super().__init__()
        self.port, self.seen, self.enough = port, [], threading.Event()

    def run(self):
        while not self.enough.is_set():
            since = self.seen[-1]["seq"] if self.seen else 0
            with contextlib.suppress(OSError, http.client.HTTPException):
                path = f"/api/changes?since={since}"
                status, _, text = ask(self.port, "GET", path)
                self.seen += json.loads(text)["results"] if status == 200 else []


def test_whatever_dies_nothing_acknowledged_is_lost_and_nothing_done_twice(cluster):
    ports = [cluster.port, *cluster.ports]
    writers = [Writer(ports[n % 4 :] + ports[: n % 4]) for n in range(6)]
    reader, chance = Reader(cluster.port), random.Random(10)
    for thread in (*writers, reader):
        thread.start()

    def more(count):
        wanted = sum(len(writer.done) for writer in writers) + count
        wait_for(
            lambda: sum(len(writer.done) for writer in writers) >= wanted,
            f"{count} more users",
            90,
        )

    try:
        for _ in range(10):
            more(chance.randrange(20, 120))
            number = chance.randrange(3)
            cluster.processes[number].send_signal(signal.SIGKILL)
            cluster.processes[number].wait()
            more(chance.randrange(5, 40))
            cluster.fail_over()
            cluster.start_process(number)
        more(50)
    finally:
        for writer in writers:
            writer.enough.set()
        for writer in writers:
            writer.join(60)
    users = json.loads(ask(cluster.port, "GET", "/api/user")[2])["results"]
    log = json.loads(ask(cluster.port, "GET", "/api/changes")[2])["results"]
    wait_for(lambda: len(reader.seen) >= len(log), "the reader's end")
    reader.enough.set()
    reader.join(60)
    done = {mail: id for writer in writers for mail, id in writer.done.items()}
    print(f"{len(done)} acknowledged, {sum(w.again for w in writers)} tried again")
    assert {user["mail"]: user["id"] for user in users} == done, "none lost"
    assert len(users) == len(done), "none twice"
    assert [change["seq"] for change in log] == list(range(1, len(log) + 1))
    assert sorted(change["user"] for change in log) == sorted(done.values())
    assert reader.seen == log, "no gap that a reader stepped over"
