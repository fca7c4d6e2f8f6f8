"""The core suite of userapi, in the order of the module.

The scenario tables come first in each section: a row names the request, the status,
what the answer must hold and what it must not hold. Around every answer stand the
checks that hold for all of them (`check_always`), and around every row the one that a
refusal, a read or a dry run leaves nothing behind (`play`).
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import csv
import http.client
import io
import itertools
import json
import os
import pickle
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import unicodedata
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import pytest
import webtest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import userapi
from userapi import Problem, UserAPI, main

pytestmark = pytest.mark.filterwarnings("ignore:Unknown REQUEST_METHOD")

HERE = Path(__file__).resolve().parent
#: Where the files of the tests lie, if there is room: a disk takes 3 s of 20 for a
#: thousand commits, and no test here can cut its power to see what they were good for.
IN_MEMORY = Path("/dev/shm")
if IN_MEMORY.is_dir() and shutil.disk_usage(IN_MEMORY).free > 1 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(IN_MEMORY))
#: the URL of a PostgreSQL whose superuser we may be, to run all of it on that
POSTGRESQL = os.environ.get("TEST_POSTGRESQL", "")
MAX_ID = 2**53 - 1
TOKEN = "correct-horse-battery-staple"
AS = "Content-Type"

SIMONE = {"id": 1, "name": "Simone Giertz", "mail": "giertz@shittyrobots.loc"}
ZOE = {"id": 2, "name": "Zoë Müller", "mail": "zoe@example.org"}
CHAN = {"id": 3, "name": "陳大文", "mail": "chan@example.hk"}
LATE = {"id": 1337, "name": "Late Comer", "mail": "late@example.org"}
SEED = [SIMONE, ZOE, CHAN, LATE]
PHONE = {"id": 1, "label": "work", "number": "+852 2345 6789"}
ADDRESS = {
    "id": 1,
    "label": "home",
    "street": "彌敦道 1",
    "postcode": "999077",
    "city": "九龍",
    "region": "Kowloon",
    "country": "HK",
}
GRACE = {"name": "Grace Hopper", "mail": "grace@example.org"}
MOBILE = {"label": "mobile", "number": "+49 30 1234567"}
OFFICE = {
    "label": "office",
    "street": "1 Main St",
    "postcode": "10115",
    "city": "Berlin",
    "region": "BE",
    "country": "DE",
}

SUCCESS = {"code": 0, "message": "SUCCESS"}
LIST_METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
ITEM_METHODS = "GET, HEAD, PUT, PATCH, DELETE, OPTIONS"
READ_METHODS = "GET, HEAD, OPTIONS"
#: Ids of the path that no user can have: digits of other scripts, signs, blanks, ends.
NO_IDS = ["%EF%BC%91", "+1", "-1", "1_0", "1.0", "%201", "1%20", "%C2%B2", "1e0", "x"]
NO_IDS += ["9007199254740992", "1" * 40, "9" * 4301, "0x1", "1%00", "%D9%A1", "1;1"]
#: What no failure may hold: the inside of the program, and the place where it runs.
LEAKS = ["Traceback", 'File "', ".py", "sqlite", "SELECT ", "INSERT ", "/tmp/"]


# ------------------------------------------------------------------------------------
# Client, rows and fixtures
# ------------------------------------------------------------------------------------


def of_files(why: str) -> Any:
    """Marks a test that makes no sense on PostgreSQL."""
    return pytest.mark.skipif(bool(POSTGRESQL), reason=f"of SQLite alone: {why}")


def database(path: Any, template: Any = "") -> Any:
    """The database of that path, a copy of the template: a file there, or one in
    PostgreSQL that has its name from it."""
    if not POSTGRESQL or str(path).startswith("postgres"):
        return Path(shutil.copy(template, path)) if template else path
    name = f"t{abs(hash(str(path)))}"
    source = urlsplit(str(template)).path[1:] or "template1"
    with contextlib.closing(userapi.Postgres(POSTGRESQL)) as other:
        sql = "SELECT 1 FROM pg_database WHERE datname = ?"
        if not other.execute(sql, (name,)).fetchall():
            other.execute(f"CREATE DATABASE {name} TEMPLATE {source}")
    return urlsplit(POSTGRESQL)._replace(path=f"/{name}").geturl()


def drop(db: Any) -> None:
    """Away with a database of PostgreSQL; a file goes with its folder."""
    if POSTGRESQL:
        with contextlib.closing(userapi.Postgres(POSTGRESQL)) as other:
            name = urlsplit(str(db)).path[1:]
            other.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


class Client:
    """Sends requests to one application under WebTest's lint; checks every answer."""

    def __init__(self, db: Any, headers: Any = None, **options: Any) -> None:
        self.db, self.headers = str(database(db)), headers or {}
        self.cross_origin = "cors" in options
        self.app = UserAPI(db=self.db, **options)
        self.web = webtest.TestApp(self.app, extra_environ={"REMOTE_ADDR": "127.0.0.1"})

    def __call__(
        self, line: str, body: Any = None, headers: Any = None, **environ: str
    ):
        """Send `GET /api/user`, say; what is no text is sent as JSON."""
        method, path = line.split(" ", 1)
        headers = {**self.headers, **(headers or {})}
        if body is not None and not isinstance(body, (bytes, str)):
            body = json.dumps(body, ensure_ascii=False)
            headers.setdefault("Content-Type", "application/json")
        if isinstance(body, str):
            body = body.encode()
        path = quote(path, safe="/?&=%,:;+-_.~'*!()@[]$")
        more = {} if body is None else {"body": body}
        answer = self.web.request(
            path,
            method=method,
            headers=headers,
            environ={"REMOTE_ADDR": "127.0.0.1", **environ},
            expect_errors=True,
            **more,
        )
        check_always(method, answer, self.cross_origin)
        return answer

    def users(self) -> list[dict[str, Any]]:
        return self("GET /api/v2/user").json["results"]

    def changes(self, since: int | None = None) -> list[dict[str, Any]]:
        query = "" if since is None else f"?since={since}"
        return self("GET /api/changes" + query).json["results"]

    def etag(self, user: int) -> str:
        return self(f"GET /api/user/{user}").headers["ETag"]

    def close(self) -> None:
        self.app.close()


def call(client: Client, method: str, path: str, body: bytes = b"", **environ: Any):
    """A call without the lint, which would not let every environment through."""
    request = webtest.TestRequest.blank(path, method=method, body=body).environ
    request.update({"REMOTE_ADDR": "127.0.0.1", **environ})
    started: list[str] = []
    chunks = client.app(request, lambda status, headers: started.append(status))
    text = b"".join(chunks)
    if hasattr(chunks, "close"):
        chunks.close()
    assert len(started) == 1
    return int(started[0][:3]), text


def check_always(method: str, answer: Any, cross_origin: bool = False) -> None:
    """What holds for every answer, whatever was asked."""
    head, body = answer.headers, answer.body
    assert head["X-Content-Type-Options"] == "nosniff"
    assert head["Referrer-Policy"] == "no-referrer"
    assert "default-src 'none'" in head["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in head["Content-Security-Policy"]
    assert head["Cache-Control"] == "private, no-cache"
    if not cross_origin:
        assert not [name for name in head if name.lower().startswith("access-control")]
    if method == "HEAD" or answer.status_int in (204, 304):
        assert body == b""
    elif "Content-Length" in head:
        assert int(head["Content-Length"]) == len(body)
    if answer.status_int >= 400:
        check_problem(method, answer)
    elif answer.content_type == "application/json" and body.startswith(b'{"code"'):
        assert (answer.json["code"], answer.json["message"]) == (0, "SUCCESS")


def check_problem(method: str, answer: Any) -> None:
    """A failure is problem+json with the two old members, and tells nothing inside."""
    status = answer.status_int
    assert answer.content_type == "application/problem+json"
    needed = {401: "WWW-Authenticate", 405: "Allow", 429: "Retry-After"}
    needed[503] = "Retry-After"
    assert needed.get(status, "Content-Type") in answer.headers
    if method == "HEAD":
        return
    problem = json.loads(answer.body)
    assert problem["code"] == 1 and type(problem["code"]) is int
    assert problem["message"] == "FAILURE"
    assert problem["status"] == status
    assert problem["type"] == "about:blank"
    assert problem["title"] and isinstance(problem["title"], str)
    assert problem["detail"] and isinstance(problem["detail"], str)
    for error in problem.get("errors", []):
        assert error["detail"]
    text = answer.body.decode()
    assert not [leak for leak in LEAKS if leak in text]


class Row(NamedTuple):
    """One request, and what must and must not come back."""

    line: str
    status: Any  # more than one where the contract leaves it open
    has: Any = ()
    lacks: Any = ()
    body: Any = None
    headers: Any = {}
    options: Any = {}  # of the application
    environ: Any = {}


def check(answer: Any, row: Row) -> None:
    """That an answer is the one that its row names."""
    allowed = row.status if isinstance(row.status, tuple) else (row.status,)
    assert answer.status_int in allowed, answer.body[:600]
    wants = row.has if isinstance(row.has, tuple) else (row.has,)
    text = answer.body.decode()
    for want in wants:
        if isinstance(want, str):
            assert want in text
        elif isinstance(want, dict):
            assert matches(want, json.loads(text)), text
        else:
            want(answer)
    lacks = (row.lacks,) if isinstance(row.lacks, str) else row.lacks
    assert not [part for part in lacks if part in text]


def matches(want: Any, got: Any) -> bool:
    """Whether `got` holds all of `want`: of an object its members, of a list each."""
    if isinstance(want, type):
        return isinstance(got, want)
    if isinstance(want, dict):
        return isinstance(got, dict) and all(
            name in got and matches(value, got[name]) for name, value in want.items()
        )
    if isinstance(want, list):
        return len(want) == len(got) and all(map(matches, want, got))
    return type(want) is type(got) and want == got


def exactly(**members: Any):
    """The answer is these members and nothing else."""

    def look(answer: Any) -> None:
        assert json.loads(answer.body) == members

    return look


def results(*items: Any):
    return exactly(results=list(items))


def shows(*items: Any) -> dict[str, Any]:
    """The results hold at least these members."""
    return {"results": list(items)}


def done(*items: Any):
    """The acknowledgement of a write, with what it made."""
    return exactly(**SUCCESS, results=list(items))


def at(*pointers: str):
    """The problem's errors stand exactly at these pointers."""

    def look(answer: Any) -> None:
        errors = json.loads(answer.body)["errors"]
        assert {error["pointer"] for error in errors} == set(pointers)

    return look


def told(detail: str):
    """The problem says this, word by word."""

    def look(answer: Any) -> None:
        assert json.loads(answer.body)["detail"] == detail

    return look


def bad_items(*numbers: int):
    """The problem's errors speak of exactly these of the `items`."""

    def look(answer: Any) -> None:
        errors = json.loads(answer.body)["errors"]
        found = [re.match(r"#/items/([0-9]+)", error["pointer"]) for error in errors]
        assert {int(one.group(1)) for one in found if one} == set(numbers)

    return look


def among(*numbers: int):
    """As `bad_items`, where another may be named as well: of two ids, say, both."""

    def look(answer: Any) -> None:
        errors = json.loads(answer.body)["errors"]
        found = {int(one) for one in re.findall("#/items/([0-9]+)", str(errors))}
        assert set(numbers) <= found | {error.get("line") for error in errors}

    return look


def header(name: str, value: Any):
    """A header of the answer: its value, None for absent, or a question about it."""

    def look(answer: Any) -> None:
        got = answer.headers.get(name)
        assert value(got) if callable(value) else got == value, (name, got)

    return look


def allow(methods: str):
    def look(answer: Any) -> None:
        assert sorted(answer.headers["Allow"].split(", ")) == sorted(
            methods.split(", ")
        )

    return look


def located(path: str):
    """`Location`, absolute or not: both are one to a client."""
    return header("Location", lambda got: got and urlsplit(got).path == path)


def as_text(text: str):
    def look(answer: Any) -> None:
        assert answer.body.decode() == text

    return look


def scenarios(*tables: list[Row], **named: list[Row]):
    """Parametrize a test over the rows of tables, each under a readable name."""
    named.update({str(number): rows for number, rows in enumerate(tables)})
    pairs = [(name, row) for name, rows in named.items() for row in rows]
    names = [f"{name} {row.line[:70]} {row.status}" for name, row in pairs]
    return pytest.mark.parametrize("row", [row for _, row in pairs], ids=names)


@pytest.fixture(autouse=True, scope="session")
def clean_environment():
    """No USERAPI_ variable of whoever runs the tests decides anything."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("USERAPI_")]:
            patch.delenv(name)
        yield


def fill(client: Client) -> None:
    """Put the four users of the tables into an empty database."""
    third = {**CHAN, "phone": [PHONE], "address": [ADDRESS]}
    made = client("POST /api/v2/user", {"items": [SIMONE, ZOE, third, LATE]})
    assert made.status_int == 201


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """The database that each test gets a copy of, made by the program itself."""
    path = tmp_path_factory.mktemp("template") / "users.db"
    client = Client(path)
    fill(client)
    client.close()
    if not POSTGRESQL:
        assert [file.name for file in path.parent.iterdir()] == ["users.db"]
    yield client.db
    drop(client.db)


@pytest.fixture
def db(template, tmp_path) -> Any:
    """A database of its own with the four users."""
    path = database(tmp_path / "users.db", template)
    yield path
    drop(path)


@pytest.fixture
def connect(db):
    """Makes clients of the test's database, and closes them after it."""
    with contextlib.ExitStack() as stack:

        def connect(path: Any = db, **options: Any) -> Client:
            client = Client(path, **options)
            stack.callback(client.close)
            return client

        yield connect


@pytest.fixture
def client(connect) -> Client:
    return connect()


ALL_ROWS = "SELECT " + ", ".join(
    f"(SELECT string_agg(r::text, ' ' ORDER BY r) FROM {name} AS r)"
    for name in ("users", "user_phone", "user_address", "changes", "retries", "tokens")
)


class Stage:
    """A copy of the template with a client on it, and a witness of what it commits."""

    def __init__(self, path: Any, options: Any) -> None:
        self.client = Client(path, **options)
        self.witness = another(path)
        if not POSTGRESQL:
            self.witness.execute("PRAGMA synchronous = OFF")  # it only takes back

    def commits(self) -> Any:
        """What stays the same until something is committed."""
        sql = ALL_ROWS if POSTGRESQL else "PRAGMA data_version"
        return self.witness.execute(sql).fetchone()

    def close(self) -> None:
        self.client.close()
        self.witness.close()
        drop(self.client.db)


@pytest.fixture(scope="session")
def play(template, tmp_path_factory):
    """Plays a row on the four users; what keeps nothing must leave nothing behind.

    What has been kept is taken back, as it takes a tenth of the time of a new stage.
    """
    folder, numbers = tmp_path_factory.mktemp("stages"), itertools.count()
    idle: list[Stage] = []

    def enter(options: Any) -> Stage:
        if idle and not options:
            return idle.pop()
        path = database(folder / f"{next(numbers)}.db", template)
        return Stage(path, options)

    def leave(stage: Stage, options: Any, kept: bool) -> None:
        if options or kept and POSTGRESQL:
            return stage.close()
        if kept:
            with contextlib.closing(another(template)) as first:
                first.backup(stage.witness)
        idle.append(stage)

    def play(row: Row) -> Any:
        stage = enter(row.options)
        before = stage.commits()
        answer = stage.client(row.line, row.body, row.headers, **row.environ)
        check(answer, row)
        kept = stage.commits() != before
        writes = row.line.startswith(("POST", "PUT", "PATCH", "DELETE"))
        if answer.status_int >= 400 or "dry_run=true" in row.line or not writes:
            assert not kept
        leave(stage, row.options, kept)
        return answer

    yield play
    for stage in idle:
        stage.close()


def snapshot(client: Client) -> tuple[bytes, bytes]:
    """All that there is: every user with everything, and the log of changes."""
    users = client("GET /api/v2/user?format=ndjson").body
    return users, client("GET /api/changes").body


@pytest.fixture(scope="module")
def scratch():
    """A database in memory that the tests of any value share."""
    client = Client(":memory:")
    yield client
    client.close()
    drop(client.db)


def wait_until(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def at_once(count: int, call: Any) -> list[Any]:
    """What a call returns in each of so many threads, which begin together."""
    together = threading.Barrier(count)

    def begin(number: int) -> Any:
        together.wait(60)
        return call(number)

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


def run(*argv: Any, **more: Any) -> Any:
    """A program that has a minute, and finds the module: what becomes of it."""
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths, **more.pop("env", {})}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    return subprocess.run([*map(str, argv)], timeout=60, env=env, **streams)


def ended(process: Any) -> int:
    """The exit status of a process, which has a minute; wait(60) would look for it only
    every 50 ms."""
    guard = threading.Timer(60, process.kill)
    guard.start()
    try:
        return process.wait()
    finally:
        guard.cancel()


SCRIPT = [sys.executable, str(HERE / "userapi.py")]  # is compiled at each start
#: what is installed as `userapi`, which starts in half of the time
PROGRAM = [
    sys.executable,
    "-c",
    f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
    "import userapi; sys.exit(userapi.main())",
]
#: Several commands, each in a process of its own (the last in this one) and with the
#: exit status that it must have; to import what they need is nine tenths of a start.
EACH = """
import json, os, sys
sys.path.insert(0, sys.argv.pop(1))
import userapi
*others, last = json.loads(sys.argv[1])
for status, *argv in others:
    child = os.fork()
    if not child:
        sys.exit(userapi.main(argv))
    assert os.waitpid(child, 0)[1] >> 8 == status, argv
sys.exit(userapi.main(last + sys.argv[2:]))
"""


def each(*commands: Any) -> list[str]:
    """The program that runs these commands: (status, *words), the last without."""
    return [sys.executable, "-c", EACH, str(HERE), json.dumps(commands, default=str)]


def run_main(capfd: Any, *argv: str) -> tuple[int, str, str]:
    """The command line in this process: exit code, standard output, standard error."""
    capfd.readouterr()
    try:
        status = main(list(argv))
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else 1
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    return status, out, err


@pytest.fixture
def command(capfd, db):
    """Runs a command on the test's database."""

    def command(*argv: Any) -> tuple[int, str, str]:
        return run_main(capfd, *[str(arg) for arg in argv], "--db", str(db))

    return command


@contextlib.contextmanager
def serving(
    *args: Any, out: Any = None, env: Any = None, program: Any = PROGRAM, **more: Any
):
    """A server on a free port: its process, its URL and its start line."""
    process = subprocess.Popen(
        [*program, *map(str, args), "--port", "0"],
        stderr=subprocess.PIPE,
        stdout=out or subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        encoding="utf-8",
        env={**os.environ, **(env or {}), "PYTHONIOENCODING": "utf-8"},
        **more,
    )
    guard = threading.Timer(120, process.kill)
    guard.start()
    try:
        line = process.stderr.readline()
        found = re.search(r"(https?://|unix:)\S+", line)
        if not found:
            process.kill()
        assert found, line + process.stderr.read()
        yield process, found.group(), line
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait()
    finally:
        guard.cancel()
        process.kill()
        process.wait()
        process.stderr.close()


@contextlib.contextmanager
def hosting(app: UserAPI, log: str = "off"):
    """The server in a thread: itself and its URL."""
    app.settings.update({"port": 0, "log": log})
    socks, up = userapi.open_sockets(app.settings), threading.Event()
    server = userapi.Server(app)
    thread = threading.Thread(target=lambda: asyncio.run(server.run(socks, up.set)))
    thread.start()
    try:
        assert up.wait(30)
        yield server, userapi.server_url(app.settings, socks[0])
    finally:
        if not server.stopping:
            server.loop.call_soon_threadsafe(server.stop)
        thread.join(60)
        app.close()
    assert not thread.is_alive()


def fetch(url: str, line: str, body: Any = None, headers: Any = None):
    """One request over a real socket: status, headers, text."""
    method, path = line.split(" ", 1)
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    with contextlib.closing(connection):
        connection.request(method, path, body and json.dumps(body), headers or {})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode()


def post(item: Any, status: Any = 422, has: Any = (), **more: Any) -> Row:
    return Row("POST /api/user", status, has, body={"item": item}, **more)


# ------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------

PROMISED_SETTINGS = ["db", "host", "port", "unix", "cert", "key", "token", "cors"]
PROMISED_SETTINGS += ["allow_host", "unique_mail", "require_if_match", "max_body"]
PROMISED_SETTINGS += ["log", "keep_changes", "max_items", "trusted_proxy"]


def test_settings_have_the_promised_names_and_a_help():
    names = [setting.name for setting in userapi.SETTINGS]
    assert set(PROMISED_SETTINGS) <= set(names)
    assert len(set(names)) == len(names)
    assert all(setting.help for setting in userapi.SETTINGS)


def test_defaults_are_the_contracts():
    default = {setting.name: setting.default for setting in userapi.SETTINGS}
    assert (default["db"], default["host"]) == ("users.db", "127.0.0.1")
    assert (default["port"], default["log"]) == (8080, "text")
    assert (default["max_body"], default["max_items"]) == (8 * 1024 * 1024, 10_000)
    assert default["keep_changes"] == 100_000
    assert not default["unique_mail"] and not default["require_if_match"]
    assert not default["token"] and not default["allow_host"] and not default["cors"]


def test_a_variable_is_a_setting_and_a_keyword_beats_it(connect, monkeypatch):
    monkeypatch.setenv("USERAPI_REQUIRE_IF_MATCH", "yes")
    assert connect()("DELETE /api/user/1").status_int == 428
    assert connect(require_if_match=False)("DELETE /api/user/1").status_int == 200


@pytest.mark.parametrize(
    "text, status",
    [(word, 428) for word in ("1", "true", "yes")]
    + [(word, 200) for word in ("0", "false", "no")],
)
def test_boolean_variables(connect, monkeypatch, text, status):
    monkeypatch.setenv("USERAPI_REQUIRE_IF_MATCH", text)
    assert connect()("DELETE /api/user/1").status_int == status


def test_an_empty_token_variable_is_none(connect, monkeypatch):
    monkeypatch.setenv("USERAPI_TOKEN", "")
    assert connect()("GET /api/user/1").status_int == 200


def test_the_database_is_a_variable_too(db, monkeypatch):
    monkeypatch.setenv("USERAPI_DB", str(db))
    app = UserAPI()
    try:
        assert webtest.TestApp(app, extra_environ={"REMOTE_ADDR": "::1"}).get(
            "/api/user/1"
        ).json == {"results": [SIMONE]}
    finally:
        app.close()


REFUSED_SETTINGS = [
    {"nonsense": 1},
    {"port": "x"},
    {"port": 65536},
    {"log": "loud"},
    {"unique_mail": "maybe"},
    {"max_body": 0},
    {"token": "two words"},
    {"token": "täg"},
    {"host": "\udcff"},
    {"host": ""},
    {"cors": "https://example.org:443"},
    {"cors": "https://münchen.example"},
    {"cert": "only-half.pem"},
    {"trusted_proxy": "nonsense"},
    {"token_file": "/nowhere/token"},
]


@pytest.mark.parametrize("setting", REFUSED_SETTINGS, ids=str)
def test_a_setting_that_cannot_be_is_refused_by_name(db, setting):
    with pytest.raises((Problem, ValueError, TypeError), match=next(iter(setting))):
        UserAPI(db=str(db), **setting)


def test_a_token_may_be_bytes(connect):
    client = connect(token=TOKEN.encode())
    assert client("GET /api/user/1", headers=bearer(TOKEN)).status_int == 200


def test_an_empty_token_file_is_refused(db, tmp_path):
    path = tmp_path / "token"
    path.touch(mode=0o600)
    with pytest.raises((Problem, ValueError), match="token_file"):
        UserAPI(db=str(db), token_file=str(path))


def test_a_token_file_that_is_named_beats_the_variables(connect, monkeypatch, tmp_path):
    for name in ("named", "variable"):
        (tmp_path / name).write_text(f"{name}\n")
        (tmp_path / name).chmod(0o600)
    named = str(tmp_path / "named")
    monkeypatch.setenv("USERAPI_TOKEN", "text")
    monkeypatch.setenv("USERAPI_TOKEN_FILE", str(tmp_path / "variable"))
    for right, options in (
        ("text", {}),
        ("named", {"token_file": named}),
        ("keyword", {"token_file": named, "token": "keyword"}),
    ):
        client = connect(**options)
        for token in ("text", "variable", "named", "keyword"):
            status = 200 if token == right else 401
            assert client("GET /api/user/1", headers=bearer(token)).status_int == status


def test_serve_takes_every_setting_but_the_stores(connect):
    """As keywords, in force from then on: the token above all."""
    client = connect(cors="")
    client.app.configure({"token": TOKEN, "cors": FRIEND, "trusted_proxy": "127.0.0.1"})
    assert client("GET /api/user/1").status_int == 401
    headers = {**bearer(TOKEN), "Origin": FRIEND}
    answer = client("GET /api/user/1", headers=headers)
    assert answer.headers["Access-Control-Allow-Origin"] == FRIEND
    assert answer.headers["Vary"] == "Accept, Origin"
    assert client.app.guard.is_trusted("127.0.0.1")
    for name in ("db", "unique_mail", "keep_changes"):
        with pytest.raises(ValueError, match=name):
            userapi.serve(client.app, **{name: 1})


# ------------------------------------------------------------------------------------
# Problems
# ------------------------------------------------------------------------------------


STATUSES = [400, 401, 403, 404, 405, 406, 408, 409, 410, 411, 412, 413, 414, 415, 417]
STATUSES += [422, 428, 429, 431, 500, 501, 503, 505, 507]


def test_there_is_a_problem_for_each_status_of_the_contract():
    assert sorted(userapi.PROBLEMS) == STATUSES
    for status in STATUSES:
        body = json.loads(Problem(status, "because").body())
        assert (body["status"], body["code"], body["detail"]) == (status, 1, "because")
        assert body["title"] and body["message"] == "FAILURE" and "errors" not in body


def test_a_problem_comes_out_of_a_process_pool_as_it_was():
    errors = [{"pointer": "#/item/name", "detail": "is required"}]
    problem = Problem(503, "later", errors, [("Retry-After", "5")], total=3)
    again = pickle.loads(pickle.dumps(problem))
    assert (vars(again), str(again)) == (vars(problem), "later")


class BrokenInput(io.BytesIO):
    """A request's body out of a server that has a fault of its own."""

    def read(self, size: int = -1) -> bytes:
        raise RuntimeError("secret of the server")


def test_an_unknown_fault_is_a_500_with_an_id_that_the_log_has(client, capfd, caplog):
    log = io.StringIO()
    broken = {"wsgi.input": BrokenInput(), "wsgi.errors": log}
    status, body = call(client, "POST", "/api/user", b"x", **broken)
    assert status == 500 and b"secret" not in body
    told = log.getvalue() + capfd.readouterr().err + caplog.text
    names = re.findall(r"[0-9A-Za-z-]{6,}", json.loads(body)["detail"])
    assert [name for name in names if re.search("[0-9]", name) and name in told]
    assert "RuntimeError" in told
    assert len(client.users()) == 4


def test_a_database_that_someone_took_apart_is_a_failure_and_no_end(client):
    run_sql(client.db, "PRAGMA foreign_keys = OFF")
    run_sql(client.db, "DROP TABLE users /*pg CASCADE*/")
    for line in ("GET /api/user/1", "GET /api/user", "DELETE /api/user/1"):
        check(client(line), Row(line, (500, 503), lacks=["no such table"]))
    assert client("GET /health").status_int == 200


def fault_of_sqlite(text: str, name: str = "") -> sqlite3.Error:
    fault = sqlite3.OperationalError(text)
    fault.sqlite_errorname = name
    return fault


#: (the fault, the status, the seconds after which to ask again)
FAULTS = [
    (fault_of_sqlite("disk I/O error", "SQLITE_IOERR_WRITE"), 507, "5"),
    (fault_of_sqlite("disk I/O error", "SQLITE_IOERR_SHMSIZE"), 507, "5"),
    (fault_of_sqlite("disk I/O error", "SQLITE_IOERR_READ"), 503, "5"),
    (fault_of_sqlite("database or disk is full"), 507, "5"),
    (fault_of_sqlite("database is locked"), 503, "5"),
    (fault_of_sqlite("attempt to write a readonly database"), 503, "5"),
    (fault_of_sqlite("unable to open database file"), 503, "5"),
    (fault_of_sqlite("no such column: version"), 503, "5"),
    (sqlite3.DatabaseError("database disk image is malformed"), 503, "60"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "its text is damaged"), 503, "60"),
    (sqlite3.IntegrityError("UNIQUE constraint failed: users.mail_fold"), 409, ""),
]


@pytest.mark.parametrize("fault, status, after", FAULTS, ids=repr)
def test_a_fault_of_sqlite_is_told_without_its_text(fault, status, after):
    problem = userapi.database_problem(fault)
    assert problem.status == status
    assert problem.headers == [("Retry-After", after)] * bool(after)
    assert str(fault) not in problem.detail


def test_a_fault_of_the_program_is_none_of_the_databases(client):
    with pytest.raises(sqlite3.ProgrammingError):
        client.app.store.rows("SELECT ?")
    assert len(client.users()) == 4


# ------------------------------------------------------------------------------------
# Fields
# ------------------------------------------------------------------------------------

#: (sent, kept): what a name becomes.
NAMES = [
    ("A", "A"),
    ("  Ada  Lovelace \n", "Ada  Lovelace"),
    ("\u2003Ada\u00a0\u3000", "Ada"),
    ("Zoe\u0308", "Zoë"),
    ("陳大文", "陳大文"),
    ("عبد الله", "عبد الله"),
    ("O'Brien; DROP TABLE users --", "O'Brien; DROP TABLE users --"),
    ("<b>Bold</b>", "<b>Bold</b>"),
    ("=1+1", "=1+1"),
    ("👩\u200d🔬", "👩\u200d🔬"),
    ("\u200bA", "\u200bA"),
    ("A\u2028B", "A\u2028B"),
    ("\ue000", "\ue000"),
    ("x" * 200, "x" * 200),
    (" " + "x" * 200 + " ", "x" * 200),
    ("e\u0301" * 200, "é" * 200),
    ("𝒳" * 200, "𝒳" * 200),
    ("null", "null"),
]
BAD_NAMES = ["", " ", "\t\n", "x" * 201, "a\x00b", "a\tb", "a\nb", "a\x7fb", "a\x85b"]
BAD_NAMES += [f"a{chr(code)}b" for code in (*range(0x202A, 0x202F), 0x2066, 0x2069)]
BAD_NAMES += ["a\u0378b", "a\ufffeb", "a\U0010ffffb", "\u200b", "\u200d\u200d", "\xad"]
BAD_NAMES += ["\u115f", "\u1160", "\u2800", "\u3164", "\uffa0", "\ufeff"]
BAD_NAMES += ["\u200b \u3164"]
NOT_TEXTS: list[Any] = [None, True, 1, 1.5, [], ["A"], {}, {"a": "b"}]

MAILS = [
    "a@b",
    "A.B+c@Example.ORG",
    ".!#$%&'*+/=?^_`{|}~-@x.y",
    "..a..@example.org",
    "x" * 64 + "@example.org",
    "a@" + "b" * 63 + ".org",
    "a@127.0.0.1",
    "a@xn--mller-kva.example",
    "=1+1@example.org",
    "a@" + ".".join(["b" * 63] * 3 + ["b" * 60]),
]
BAD_MAILS = ["", "a", "@", "a@", "@b", "a@b@c", "a b@c", " a@b", "a@b ", "a@b\n"]
BAD_MAILS += ["a@b.", "a@b\x00", "a\u200b@b", "a@b,c@d"]
BAD_MAILS += ["\ta@b", "a@-b", "a@b-", "a@b..c", "a@b_c", "a@.b", "ä@b", "a@ü.de"]
BAD_MAILS += ["x" * 65 + "@b", "a@" + "b" * 64, '"a"@b', "a@[127.0.0.1]", "a(x)@b"]
BAD_MAILS += ["a@" + ".".join(["b" * 63] * 3 + ["b" * 61])]

NUMBERS = ["112", "+49 30 1234567", "(030) 123-45/67", "030.123", "555 1234 x12"]
NUMBERS += ["5551234x1", "(1)23", "+" + "1" * 31, "+(49)30"]
BAD_NUMBERS = ["", "12", "+12", "1 2", "1" * 33, "++49", "abc", "12a4", "+", "-123"]
BAD_NUMBERS += ["１２３", "123\n", " 123", "123x", "123 x 4", "x123", "123;4"]

COUNTRIES = ["DE", "HK", "ZZ"]
BAD_COUNTRIES = ["de", "D", "DEU", "D1", "ÄÖ", "D ", "ＤＥ"]

IDS: list[tuple[Any, int]] = [(5, 5), (MAX_ID, MAX_ID), (7.0, 7)]
BAD_IDS: list[Any] = [0, -1, MAX_ID + 1, 2**63, 1.5, True, False, "5", [5], {}, 10**29]


@pytest.mark.parametrize("sent, kept", NAMES, ids=ascii)
def test_name_is_kept(play, sent, kept):
    user = {"id": 1338, "name": kept, "mail": "a@b"}
    play(post({"name": sent, "mail": "a@b"}, 201, done(user)))


@pytest.mark.parametrize("sent", BAD_NAMES + NOT_TEXTS, ids=ascii)
def test_name_is_refused(play, sent):
    play(post({"name": sent, "mail": "a@b"}, 422, at("#/item/name")))


def test_a_name_is_as_long_as_it_is_in_nfc():
    assert userapi.clean_name("\u03b1\u0313\u0300\u0345" * 200) == "\u1f82" * 200


def test_a_name_of_very_many_marks_is_refused_at_once(client):
    """To put n marks in order takes n² steps: these would take 10 s."""
    begun = time.monotonic()
    name = "a" + "\u0301\u0316" * 50_000
    answer = client("POST /api/user", {"item": {"name": name, "mail": "a@b"}})
    assert answer.json["detail"] == "name has 100001 characters; 200 are the most"
    assert time.monotonic() - begun < 3


@pytest.mark.parametrize("sent", MAILS)
def test_mail_is_kept_as_written(play, sent):
    assert len(sent) <= 254
    user = {"id": 1338, "name": "A", "mail": sent}
    play(post({"name": "A", "mail": sent}, 201, done(user)))


@pytest.mark.parametrize("sent", BAD_MAILS + NOT_TEXTS, ids=ascii)
def test_mail_is_refused(play, sent):
    play(post({"name": "A", "mail": sent}, 422, at("#/item/mail")))


@pytest.mark.parametrize("sent, kept", IDS)
def test_id_is_kept(play, sent, kept):
    user = {"id": kept, **GRACE}
    play(post({"id": sent, **GRACE}, 201, (done(user), located(f"/api/user/{kept}"))))


@pytest.mark.parametrize("sent", BAD_IDS, ids=ascii)
def test_id_is_refused(play, sent):
    play(post({"id": sent, **GRACE}, 422, at("#/item/id")))


@pytest.mark.parametrize("sent", NUMBERS)
def test_number_is_kept(play, sent):
    body = {"item": {"label": "x", "number": sent}}
    phone = {"id": 1, "label": "x", "number": sent}
    play(Row("POST /api/user/1/phone", 201, done(phone), body=body))


@pytest.mark.parametrize("sent", BAD_NUMBERS + NOT_TEXTS, ids=ascii)
def test_number_is_refused(play, sent):
    body = {"item": {"label": "x", "number": sent}}
    play(Row("POST /api/user/1/phone", 422, at("#/item/number"), body=body))


@pytest.mark.parametrize("sent", COUNTRIES)
def test_country_is_kept(play, sent):
    item = {**OFFICE, "country": sent}
    want = done({"id": 1, **item})
    play(Row("POST /api/user/1/address", 201, want, body={"item": item}))


@pytest.mark.parametrize("sent", BAD_COUNTRIES + NOT_TEXTS[1:], ids=ascii)
def test_country_is_refused(play, sent):
    body = {"item": {**OFFICE, "country": sent}}
    play(Row("POST /api/user/1/address", 422, at("#/item/country"), body=body))


LENGTHS = {"label": 50, "street": 200, "postcode": 200, "city": 200, "region": 200}


@pytest.mark.parametrize("name, most", LENGTHS.items())
def test_lengths_of_an_address(play, name, most):
    line = "POST /api/user/1/address"
    item = {**OFFICE, name: "ä" * most}
    play(Row(line, 201, done({"id": 1, **item}), body={"item": item}))
    item = {**OFFICE, name: "ä" * (most + 1)}
    play(Row(line, 422, at(f"#/item/{name}"), body={"item": item}))


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("sent", NOT_TEXTS[1:], ids=ascii)
def test_an_address_is_texts(play, name, sent):
    body = {"item": {**OFFICE, name: sent}}
    play(Row("POST /api/user/1/address", 422, at(f"#/item/{name}"), body=body))


ADDRESSES = [
    Row("POST /api/user/1/address", 201, body={"item": {"street": "1 Main St"}}),
    Row("POST /api/user/1/address", 201, body={"item": {"city": "Berlin"}}),
    Row("POST /api/user/1/address", 422, at("#/item"), body={"item": {}}),
    Row("POST /api/user/1/address", 422, (at("#/item"),
        told("the item needs street or city")), body={"item": {"country": "DE"}}),
    Row("POST /api/user/1/address", 422, at("#/item"),
        body={"item": {"street": " ", "city": ""}}),
    Row("POST /api/user/1/address", 422, at("#/item/street"),
        body={"item": {"street": 5}}),
    Row("POST /api/user/1/phone", 201, body={"item": {"number": "112"}}),
    Row("POST /api/user/1/phone", 422, at("#/item/number"), body={"item": {}}),
    Row(
        "POST /api/user/1/phone",
        422,
        at("#/item/label", "#/item/number", "#/item/fax"),
        body={"item": {"label": "x" * 51, "number": "12", "fax": "112"}},
    ),
]  # fmt: skip


@scenarios(ADDRESSES)
def test_what_a_phone_and_an_address_need(play, row):
    play(row)


TWICE = [{"id": 1, **MOBILE}, {"id": 1, **MOBILE}]
ODD_NAMES = {"a~b/c d": 1, "!$&'()*+,;=:@": 2, "ä": 3}
ONE_FAULT = {"pointer": "#/item/mail", "detail": "is not a mail address"}
#: How faults are told: each at its place, and all of them in a sentence.
TOLD = [
    post({**GRACE, "mail": "a"}, 422, exactly(
        code=1, message="FAILURE", type="about:blank", title="Unprocessable Content",
        status=422, detail="mail is not a mail address", errors=[ONE_FAULT])),
    post(5, 422, (told("the item is not an object"), at("#/item"))),
    post({}, 422, told("2 members are not valid")),
    post({**GRACE, **ODD_NAMES}, 422,
         at("#/item/a~0b~1c%20d", "#/item/!$&'()*+,;=:@", "#/item/%C3%A4")),
    post({**GRACE, "ä/~1": 1}, 422, (at("#/item/%C3%A4~1~01"),
         told("ä/~1 is no member that can be sent here"))),
    post({**GRACE, "phone": TWICE}, 422, at("#/item/phone")),
    Row("POST /api/v2/user", 422, told("phone is not a list"),
        body={"item": {**GRACE, "phone": None}}),
    Row("POST /api/v2/user", 422, (told("id stands twice"), at("#/item/phone/1/id")),
        body={"item": {**GRACE, "phone": TWICE}}),
    Row("PUT /api/user/3/address/1", 422, (told("the item needs street or city"),
        at("#/item")), body={"item": {"label": "x"}}),
    Row("PATCH /api/user/3", 422, told("id is not a whole number"),
        body={"item": {"id": None}}),
    Row("POST /api/user", 422, (told("the item is not an object"), at("#/items/1")),
        body={"items": [GRACE, 5]}),
    Row("PUT /api/user", 404, (told("id is nobody's"), at("#/items/1/id")),
        body={"items": [{**GRACE, "id": 1}, {**GRACE, "id": 99}]}),
    Row("POST /api/user", 422, at(*[f"#/items/{n}" for n in range(101)]),
        body={"items": [5] * 101}),
    Row("PUT /api/user", 422, (told("id stands twice"), at("#/items/1/id")),
        body={"items": [{**GRACE, "id": 1}, {**GRACE, "id": 1}]}),
    Row("POST /api/user", 422, (told("2 faults"), at("#/items/0/id", "#/items/1/name")),
        body={"items": [{**GRACE, "id": 1}, {**GRACE, "name": ""}]}),
    Row("POST /api/user", 422, told("line 3 has 1 cells where the header has 2"),
        body="name,mail\nA,a@b\nB\n", headers={AS: "text/csv"}),
    Row("POST /api/user", 422, (told("mail is not a mail address"), at("#/mail")),
        body="name,mail\nA,a@b\nB,x\n", headers={AS: "text/csv"}),
    Row("POST /api/user", 409, (told("id is taken"), at("#/id")),
        body="id,name,mail\n1,A,a@b\n", headers={AS: "text/csv"}),
    Row("POST /api/user", 422, told("line 2 is not an object"),
        body=json.dumps(GRACE) + "\n[1]\n", headers={AS: "application/x-ndjson"}),
]  # fmt: skip


@scenarios(TOLD)
def test_what_is_told_of_faults(play, row):
    play(row)


def test_of_very_many_faults_the_first_are_told_and_all_are_counted():
    faults = userapi.Faults(most=2)
    for number, status in enumerate((409, 409, 404)):
        faults.add(userapi.Place(f"#/items/{number}"), "id", "is odd", status)
        with pytest.raises(Problem) as refused:
            faults.raise_worst()
        problem = refused.value
        assert problem.status == status and len(problem.errors) == min(number + 1, 2)
        assert problem.more == ({} if number < 2 else {"total": 3})


def test_a_list_has_a_thousand_entries_at_most(play):
    for count, status in ((1000, 201), (1001, 422)):
        item = {**GRACE, "phone": [MOBILE] * count}
        has = at("#/item/phone") if status == 422 else ()
        play(Row("POST /api/v2/user", status, has, body={"item": item}))


BIDI = {chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
INVISIBLE = set("\u115f\u1160\u2800\u3164\uffa0")


def kept_name(text: str) -> str | None:
    """What the contract makes of a name: the text that is kept, or None."""
    text = unicodedata.normalize("NFC", text).strip()
    kinds = [unicodedata.category(char) for char in text]
    if not 1 <= len(text) <= 200 or BIDI & set(text) or {"Cc", "Cn", "Cs"} & set(kinds):
        return None
    seen = [kind not in ("Cf", "Zs", "Zl", "Zp") for kind in kinds]
    return text if any(map(lambda s, c: s and c not in INVISIBLE, seen, text)) else None


#: Without the controls that Python strips and others do not call white space.
CHARS = st.characters(
    exclude_categories=["Cs"], exclude_characters="\x1c\x1d\x1e\x1f\x85"
)
ODD = st.sampled_from(sorted(BIDI | INVISIBLE | set(" \t\n\u200b\u0301\u00a0\u3000Aé")))
EXAMPLES = 25 * int(os.environ.get("USERAPI_FUZZ", "1"))  # tests/test_fuzz.py sets it
REPEATABLE = settings(
    derandomize=True, deadline=None, max_examples=EXAMPLES, database=None
)


@REPEATABLE
@given(
    st.one_of(st.text(CHARS, max_size=12), st.text(st.one_of(ODD, CHARS), max_size=8))
)
def test_any_name(scratch, text):
    kept = kept_name(text)
    item = {"name": text, "mail": "a@b"}
    answer = scratch("POST /api/user?dry_run=true", {"item": item})
    assert answer.status_int == (422 if kept is None else 201)
    if kept is not None:
        assert answer.json["results"][0]["name"] == kept
    assert taken_by_an_import(scratch, item) == (kept is not None)


def taken_by_an_import(client: Client, item: Any) -> bool:
    """Whether imports take the item, alone and among others that are fine."""
    taken = set()
    for media, write in ((NDJSON, ndjson_text), ("text/csv", csv_text)):
        for items in ([item], [GRACE, item, GRACE]):
            line = "POST /api/user?dry_run=true"
            answer = client(line, write(items), {AS: media})
            taken.add(answer.status_int in (200, 201))
    assert len(taken) == 1
    return taken.pop()


def ndjson_text(items: list[Any]) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


def csv_text(items: list[Any]) -> str:
    """As RFC 4180 has it; the writer of Python 3.10 refuses U+0000."""

    def quote(cell: str) -> str:
        doubled = cell.replace('"', '""')
        return f'"{doubled}"' if re.search('[",\r\n]', cell) else cell

    rows = [[csv_cell(str(value)) for value in item.values()] for item in items]
    return "".join(
        ",".join(map(quote, row)) + "\r\n" for row in [list(items[0]), *rows]
    )


def csv_cell(value: str) -> str:
    return "'" + value if re.match(r"'*[=+\-@\t\r]", value) else value


HTML_MAIL = re.compile(
    r"[a-zA-Z0-9.!#$%&'*+/=?^_`{|}~-]+@[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
    r"(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?)*"
)


@REPEATABLE
@given(
    st.one_of(
        st.from_regex(HTML_MAIL, fullmatch=True),
        st.text(st.sampled_from("aZ0.@-_+' \n\u00e4"), max_size=9),
    )
)
def test_any_mail(scratch, mail):
    good = HTML_MAIL.fullmatch(mail) and len(mail) <= 254 and mail.index("@") <= 64
    item = {"name": "A", "mail": mail}
    answer = scratch("POST /api/user?dry_run=true", {"item": item})
    assert answer.status_int == (201 if good else 422)
    if good:
        assert answer.json["results"][0]["mail"] == mail
    assert taken_by_an_import(scratch, item) == bool(good)


# --- strict JSON

ITEM = '{"item": {"name": "A", "mail": "a@b"%s}}'


def raw(body: Any, status: Any = 400, has: Any = (), **more: Any) -> Row:
    return Row("POST /api/user", status, has, body=body, **more)


def nested(depth: int) -> str:
    """An item whose member `x` makes the whole `depth` deep."""
    return ITEM % (', "x": ' + "[" * (depth - 2) + "]" * (depth - 2))


JSON_TEXTS = [
    raw(ITEM % "", 201),
    raw(" \t\r\n" + ITEM % "" + "\n", 201),
    raw(ITEM % ', "id": 1.0', 409),
    raw(ITEM % ', "id": 42.0', 201, {"results": [{"id": 42}]}),
    raw('{"item": {"name": "\\ud83d\\ude00", "mail": "a@b"}}', 201, "😀"),
    raw(nested(32), 422, at("#/item/x")),
    raw(nested(33)),
    raw(nested(100_000)),
    raw('{"item":' * 50_000),
    raw(ITEM % (', "x": "' + "[" * 40 + '\\"[\\\\"'), 422, at("#/item/x")),
    raw(ITEM % (', "x": ' + "[{}]," * 40 + "1")),
    raw(ITEM % (', "x": [' + "[{}]," * 40 + "1]"), 422, at("#/item/x")),
    raw("[" * 1_000_000),
    raw(ITEM % (', "id": ' + "1" * 30), 422, at("#/item/id")),
    raw(ITEM % (', "id": ' + "1" * 31)),
    raw(ITEM % (', "id": 0.' + "1" * 31)),
    raw(ITEM % (', "id": ' + "1" * 5000)),
    raw(ITEM % (', "id": ' + "1" * 1_000_000)),
    raw(ITEM % ', "id": 1e308', 422, at("#/item/id")),
    raw(ITEM % ', "id": 1e400'),
    raw(ITEM % ', "id": -1e400'),
    raw(ITEM % ', "id": NaN'),
    raw(ITEM % ', "id": Infinity'),
    raw(ITEM % ', "id": -Infinity'),
    raw(ITEM % ', "id": 01'),
    raw(ITEM % ', "id": +1'),
    raw(ITEM % ', "id": 0x10'),
    raw(ITEM % ', "name": "B"'),
    raw(ITEM % ', "\\u006eame": "A"'),
    raw('{"item": {}, "item": {"name": "A", "mail": "a@b"}}'),
    raw(ITEM % ', "x": {"y": 1, "y": 1}'),
    raw(ITEM % ', "x": "\\ud800"'),
    raw(ITEM % ', "x": "\\udc00\\ud800"'),
    raw(ITEM % ', "\\ud800": 1'),
    raw(ITEM % ', "x": "\\x"'),
    raw(ITEM % ', "x": "\t"'),
    raw(ITEM % ', "x": 1,'),
    raw(ITEM % "" + "{}"),
    raw(ITEM % "" + "\x00"),
    raw((ITEM % "")[:-1]),
    raw("{'item': {}}"),
    raw("{item: {}}"),
    raw("/* */ {}"),
    raw("nul"),
    raw(""),
    raw(" "),
    raw(b"\xff"),
    raw(b'{"item": {"name": "\xe4", "mail": "a@b"}}'),
    raw(b'{"item": {"name": "\xc0\xaf", "mail": "a@b"}}'),
    raw(b'{"item": {"name": "\xed\xa0\x80", "mail": "a@b"}}'),
    raw((ITEM % "").encode("utf-16")),
    raw((ITEM % "").encode("utf-32")),
]  # fmt: skip


@scenarios(JSON_TEXTS)
def test_json_is_strict(play, row):
    play(row)


def room_for(read, *args: Any) -> int:
    """The most bytes that were in use at a time while something was read or refused."""
    tracemalloc.start()
    with contextlib.suppress(Problem):
        read(*args)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("character", ["a", "\\n", "[", '\\"', '","['], ids=str)
def test_long_strings_take_little_more_room_than_they_are_long(character):
    data = ('["' + character * (1 << 20) + '"' + ", []" * 32 + "]").encode()
    assert room_for(userapi.load_json, data) < 10 * len(data)


def test_a_long_csv_header_takes_little_more_room_than_it_is_long():
    data = b"a," * (1 << 17)
    assert room_for(next, userapi.read_csv(io.BytesIO(data))) < 16 * len(data)


class NotStrict(ValueError):
    pass


def strict_pairs(pairs):
    if len({name for name, _ in pairs}) < len(pairs):
        raise NotStrict
    return dict(pairs)


def strict_number(text):
    if len(re.sub("[^0-9]", "", text)) > 30 or float(text) in (1e999, -1e999):
        raise NotStrict
    return float(text)


def no_constant(text):
    raise NotStrict


def is_strict(text: str) -> bool:
    """Whether the standard library, held to the contract, reads this."""
    try:
        value = json.loads(
            text,
            object_pairs_hook=strict_pairs,
            parse_float=strict_number,
            parse_int=strict_number,
            parse_constant=no_constant,
        )
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return False
    return True


VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner)
    ),
    max_leaves=6,
)
TOKENS = st.sampled_from(
    ["{", "}", "[", "]", ":", ",", '"', '"a"', "\\", "1", "1e", "-", "NaN", "1e400"]
    + ["0", ".", " ", "null", "tru", "true", '"\\ud800"', '"\\u00e4"', "ä", "\x01"]
)


@REPEATABLE
@given(st.one_of(VALUES.map(json.dumps), st.lists(TOKENS, max_size=7).map("".join)))
def test_any_json_text(scratch, text):
    body = ITEM % f', "x": {text}'
    answer = scratch("POST /api/user", body)
    assert answer.status_int == (422 if is_strict(body) else 400), text


# ------------------------------------------------------------------------------------
# Store
# ------------------------------------------------------------------------------------

#: The database of the application that userapi replaces: its schema, and odd rows.
FIRST_SCHEMA = """
    CREATE TABLE users (user_id INTEGER PRIMARY KEY AUTOINCREMENT,
        user_name TEXT NOT NULL, user_mail TEXT NOT NULL);
"""
FIRST_ROWS = [
    (1, "Simone Giertz", "giertz@shittyrobots.loc"),
    (2, "Ada Lovelace", "ada@analytical.example"),
    (4, "Zoë Müller-Ñuñez", "zoe@müller.example"),
    (5, "O'Brien; DROP TABLE users", "bobby@tables.example"),
    (6, "  Padded Name ", "padded@example.org"),
    (7, "Twin One", "shared@example.org"),
    (8, "Twin Two", "SHARED@example.org"),
    (9, "", "empty-name@example.org"),
    (10, "No Mail", ""),
    (11, "陳大文", "chan@example.hk"),
    (12, "<b>Bold</b>", "bold@example.org"),
    (1337, "Late Comer", "late@example.org"),
]
SCHEMA = "SELECT type, name, sql FROM sqlite_master ORDER BY 1, 2"
OLD_INSERT = "INSERT INTO users (user_name, user_mail) VALUES (?, ?)"


def another(path: Any) -> Any:
    """Another program's connection to the database."""
    if POSTGRESQL and str(path).startswith("postgres"):
        return userapi.Postgres(str(path))
    return sqlite3.connect(str(path), isolation_level=None, timeout=20)


def run_sql(path: Any, text: str, *values: Any) -> list[Any]:
    """What another program does to the database, past userapi."""
    with contextlib.closing(another(path)) as other:
        found = other.execute(text, values)
        return list(found) if getattr(found, "description", None) else []


@pytest.fixture
def first(tmp_path) -> Path:
    """A database as the first application left it."""
    path = tmp_path / "flaskrest.db"
    with contextlib.closing(sqlite3.connect(str(path))) as other, other:
        other.execute(FIRST_SCHEMA)
        other.executemany("INSERT INTO users VALUES (?, ?, ?)", FIRST_ROWS)
    return path


@of_files("the file of the first application")
def test_the_first_applications_database_opens_whole(connect, first):
    users = [dict(zip(("id", "name", "mail"), row)) for row in FIRST_ROWS]
    client = connect(first)
    assert client("GET /api/user/0").json == {"results": users}
    assert client("GET /api/user/6").json == {"results": [users[4]]}
    text = client("GET /api/user?q=ZO%C3%8B&fields=id").json
    assert text == {"results": [{"id": 4}]}
    assert client("POST /api/user", {"item": GRACE}).json["results"][0]["id"] == 1338
    kept = run_sql(first, "SELECT user_id, user_name, user_mail FROM users")
    assert sorted(kept)[: len(FIRST_ROWS)] == FIRST_ROWS
    for user in client.users():
        assert user["version"] == 1 and user["phone"] == user["address"] == []


@of_files("the file of the first application")
def test_the_first_application_still_writes_to_it(connect, first):
    client = connect(first)
    run_sql(first, OLD_INSERT, "Grace", "grace@example.org")
    assert client("GET /api/user/1338").json["results"][0]["name"] == "Grace"
    client.close()
    run_sql(first, OLD_INSERT, "Ada", "ada@example.org")
    assert connect(first)("GET /api/user/1339").json["results"][0]["name"] == "Ada"


@of_files("the file of the first application")
def test_text_of_the_first_application_that_is_none_is_taken_over(connect, first):
    run_sql(first, "ANALYZE")
    run_sql(first, "UPDATE users SET user_name = CAST(x'41ff42' AS TEXT)")
    assert {user["name"] for user in connect(first).users()} == {"A\ufffdB"}


def test_opening_again_changes_nothing(connect, first):
    connect(first).close()
    before = run_sql(first, "SELECT * FROM users"), run_sql(first, SCHEMA)
    connect(first).close()
    assert (run_sql(first, "SELECT * FROM users"), run_sql(first, SCHEMA)) == before


@of_files("the file of the first application")
def test_a_migration_that_fails_leaves_all_as_it_was(connect, first):
    """Another program has an index of a name that it needs."""
    run_sql(first, "CREATE INDEX users_by_mail ON users (user_mail)")
    before = run_sql(first, "SELECT * FROM users"), run_sql(first, SCHEMA)
    with pytest.raises(Problem):
        UserAPI(db=str(first))
    assert (run_sql(first, "SELECT * FROM users"), run_sql(first, SCHEMA)) == before
    run_sql(first, "DROP INDEX users_by_mail")
    assert len(connect(first).users()) == len(FIRST_ROWS)


def test_a_new_field_is_a_new_column(connect, db, monkeypatch):
    """One more row in the table of fields is all that it takes."""
    field = userapi.LABEL._replace(name="note", column="note")
    columns = userapi.ADDRESS.columns
    monkeypatch.setattr(userapi.ADDRESS, "columns", (*columns, field))
    assert len(connect().users()) == 4
    with contextlib.closing(another(db)) as other:
        found = other.execute("SELECT * FROM user_address").description
    names = [column[0] for column in found]
    assert names.count("note") == 1 and "city" in names
    assert run_sql(db, "SELECT note, city FROM user_address") == [("", "九龍")]


FOREIGN_WRITES = [
    ("UPDATE users SET user_mail = 'new@example.org' WHERE user_id = 1", "update", 1),
    ("UPDATE users SET user_name = user_name || '!' WHERE user_id = 1", "update", 1),
    ("UPDATE users SET user_mail = 'x@y' WHERE user_name LIKE 'Simone%'", "update", 1),
    ("INSERT INTO users (user_name, user_mail) VALUES ('É', 'E@x')", "create", 1338),
    (
        "INSERT INTO users (user_id, user_name, user_mail) VALUES (50, 'G', 'g@x')",
        "create",
        50,
    ),
    ("DELETE FROM users WHERE user_id = 3", "delete", 3),
]


@of_files("what other programs write is noticed by triggers")
@pytest.mark.parametrize("text, op, user", FOREIGN_WRITES)
def test_another_programs_write_is_a_write(client, text, op, user):
    old = client(f"GET /api/user/{user}").headers.get("ETag")
    last = client.changes()[-1]["seq"]
    run_sql(client.db, text)
    (change,) = client.changes(since=last)
    assert (change["op"], change["user"], change["actor"]) == (op, user, None)
    assert change["seq"] > last and parse_time(change["at"])
    answer = client(f"GET /api/v2/user/{user}")
    if op == "delete":
        assert answer.status_int == 404
        assert client(f"GET /api/user/{user}/phone").status_int == 404
        client("POST /api/user", {"item": {**CHAN}})
        assert client(f"GET /api/user/{user}/phone").json == {"results": []}
        return
    shown = answer.json["results"][0]
    assert answer.headers["ETag"] == f'"{shown["version"]}"' != old
    assert shown["version"] >= (1 if op == "create" else 2)
    assert parse_time(shown["created"]) and parse_time(shown["updated"])
    stale = client(f"PUT /api/user/{user}", {"item": GRACE}, {"If-Match": old or '"0"'})
    assert stale.status_int == 412
    fresh = {"If-Match": answer.headers["ETag"]}
    assert client(f"PUT /api/user/{user}", {"item": GRACE}, fresh).status_int == 200


@of_files("what other programs write is noticed by triggers")
def test_another_programs_write_names_the_members_and_no_values(client):
    last = client.changes()[-1]["seq"]
    run_sql(client.db, "UPDATE users SET user_mail = 'secret@x' WHERE user_id = 1")
    answer = client(f"GET /api/changes?since={last}")
    assert answer.json["results"][0]["fields"] == ["mail"]
    assert "secret" not in answer.text


@of_files("what other programs write is noticed by triggers")
def test_another_programs_write_of_many_rows_is_one_change_each(client):
    last = client.changes()[-1]["seq"]
    run_sql(client.db, "UPDATE users SET user_name = 'Same'")
    changes = client.changes(since=last)
    assert sorted(change["user"] for change in changes) == [1, 2, 3, 1337]
    assert [user["version"] for user in client.users()] == [2, 2, 2, 2]


@of_files("text is text elsewhere")
@pytest.mark.parametrize("sort", ["name", "-name", "mail", "-mail"])
def test_another_programs_text_that_is_none_is_passed_page_by_page(client, sort):
    """Its place among the others is by its bytes, which no cursor loses."""
    for text in ("ff", "ff41", "c3", "c328", "eda080", "5a00", "efbfbd"):
        text = f"CAST(x'{text}' AS TEXT)"
        columns = "INSERT INTO users (user_name, user_mail)"
        run_sql(client.db, f"{columns} VALUES ({text}, 'a' || {text})")
    whole = client(f"GET /api/user?sort={sort}").json["results"]
    pages = walk(client, f"/api/user?sort={sort}&limit=1")
    assert list(itertools.chain(*pages)) == whole and len(whole) == 4 + 7


@of_files("what other programs write is noticed by triggers")
def test_another_program_gives_a_user_another_id(client):
    """It takes its phones along, nobody inherits them, and the next id is a new one."""
    client("DELETE /api/user/1337")
    last = client.changes()[-1]["seq"]
    run_sql(client.db, "UPDATE users SET user_id = 1337 WHERE user_id = 3")
    run_sql(client.db, "UPDATE users SET user_id = 1338 WHERE user_id = 2")
    moved = client.users()[1]
    assert (moved["id"], moved["phone"], moved["address"]) == (1337, [PHONE], [ADDRESS])
    assert moved["version"] == 2  # 1 was that of the user before
    client("POST /api/user", {"item": {"id": 3, **GRACE}})
    assert client("GET /api/user/3/phone").json == {"results": []}
    added = client("POST /api/user", {"item": GRACE}).json["results"]
    assert added[0]["id"] == 1339
    log = [(change["op"], change["user"]) for change in client.changes(since=last)]
    assert log[:4] == [
        ("delete", 3),
        ("create", 1337),
        ("delete", 2),
        ("create", 1338),
    ]


REPLACE = "REPLACE INTO users (user_id, user_name, user_mail) VALUES (3, 'Eve', 'e@x')"


@of_files("what other programs write is noticed by triggers")
@pytest.mark.parametrize(
    "statement", [REPLACE, "UPDATE OR REPLACE users SET user_id = 3 WHERE user_id = 1"]
)
def test_another_program_replaces_a_user(client, statement):
    """No version of it comes twice, and no number of its phones is given twice."""
    client("PATCH /api/user/3", {"item": {"name": "Eva"}})
    run_sql(client.db, statement)
    assert client.etag(3) == '"3"'
    added = client("POST /api/user/3/phone", {"item": {"number": "999"}}).json
    assert added["results"] == [{"id": 2, "label": "", "number": "999"}]
    numbers = client("GET /api/user/3/phone").json["results"]
    assert numbers == [PHONE, *added["results"]]


@of_files("what other programs write is noticed by triggers")
def test_another_program_moves_a_user_there_and_back_and_there(client):
    """Whoever has the id next has another version; an id of then is not given again."""
    for new, old in ((2000, 1), (1, 2000), (2000, 1), (1, 2000)):
        move = f"UPDATE OR IGNORE users SET user_id = {new} WHERE user_id = {old}"
        run_sql(client.db, move)
    assert client.etag(1) == '"5"'
    client("POST /api/user", {"item": {"id": 2000, **GRACE}})
    assert client.etag(2000) == '"5"'  # 4 was that of the user before
    run_sql(client.db, "UPDATE users SET user_id = 3000 WHERE user_id = 1")
    client("DELETE /api/user/3000")
    added = client("POST /api/user", {"item": GRACE}).json["results"]
    assert added[0]["id"] == 3001


@of_files("what other programs write is noticed by triggers")
def test_another_program_gives_a_phone_to_another_user(client):
    last = client.changes()[-1]["seq"]
    run_sql(client.db, "UPDATE user_phone SET user_id = 1 WHERE user_id = 3")
    log = [(change["user"], change["fields"]) for change in client.changes(since=last)]
    assert sorted(log) == [(1, ["phone"]), (3, ["phone"])]
    assert [user["version"] for user in client.users()] == [2, 1, 2, 1]


def test_a_phone_that_waited_for_its_user_is_not_written_over(client):
    run_sql(
        client.db,
        "INSERT INTO user_phone (user_id, id, number) VALUES (2000, 1, '110')",
    )
    client("POST /api/user", {"item": {"id": 2000, **ADA}})
    added = client("POST /api/user/2000/phone", {"item": {"number": "+1 212 555"}})
    assert added.json["results"][0]["id"] == 2
    item = {"phone": [{"number": "112"}]}
    merged = client("PATCH /api/v2/user/2000", {"item": item})
    assert [one["id"] for one in merged.json["results"][0]["phone"]] == [3]


@of_files("what other programs write is noticed by triggers")
@pytest.mark.parametrize(
    "call", ["PATCH /api/user/1338", "POST /api/user/1338/phone", "PATCH /api/user"]
)
def test_another_programs_text_is_folded_when_it_is_written_next(client, call):
    run_sql(client.db, OLD_INSERT, "ÉMILE", "emile@example.org")
    item = {"number": "999"} if "phone" in call else {"mail": "e@example.org"}
    one = {"item": item} if "1338" in call else {"items": [{"id": 1338, **item}]}
    assert client(call, one).status_code in (200, 201)
    found = client("GET /api/user?q=%C3%A9mile&fields=id").json
    assert found == {"results": [{"id": 1338}]}


def test_a_list_in_another_order_is_no_change(client):
    phones = [PHONE, {**PHONE, "id": 7}]
    client("PATCH /api/v2/user/3", {"item": {"phone": phones}})
    last = client.changes()[-1]["seq"]
    client("PATCH /api/v2/user/3", {"item": {"phone": phones[::-1]}})
    assert [change["fields"] for change in client.changes(since=last)] == [[]]


@of_files("what other programs write is noticed by triggers")
def test_another_programs_text_is_found_and_sorted(client):
    run_sql(client.db, OLD_INSERT, "ADA", "Ada@Example.ORG")
    run_sql(client.db, "UPDATE users SET user_mail = 'NEW@x' WHERE user_id = 1")
    found = client("GET /api/user?q=aDa&fields=id").json
    assert found == {"results": [{"id": 1338}]}
    assert client("GET /api/user?mail=new@X&fields=id").json == {"results": [{"id": 1}]}
    assert client("GET /api/user?mail=giertz@shittyrobots.loc").json == {"results": []}
    first = client("GET /api/user?sort=name&limit=1").json["results"][0]
    assert first["id"] == 1338
    run_sql(client.db, OLD_INSERT, "ZOË", "ZOË@Example.ORG")
    for name in ("ZO%C3%8B", "ZOE%CC%88"):  # as one character, and as two
        found = client(f"GET /api/user?name={name}&fields=id").json
        assert found == {"results": [{"id": 1339}]}
    mail = "/api/user?mail=ZOË@example.org&fields=id"
    assert client(f"GET {mail}").json == {"results": [{"id": 1339}]}


@of_files("text is text elsewhere")
def test_another_programs_text_that_is_none_is_shown_all_the_same(client):
    damaged = "CAST(x'41ff42' AS TEXT)"
    run_sql(client.db, f"UPDATE users SET user_name = {damaged} WHERE user_id = 2")
    shown = {"results": [{"id": 2, "name": "A\ufffdB"}]}
    assert client("GET /api/user?id=2&fields=id,name").json == shown
    assert "2,A\ufffdB,zoe@example.org" in client("GET /api/user?format=csv").text


@of_files("numbers are numbers elsewhere")
def test_another_programs_numbers_that_are_none_make_no_list_unreadable(client):
    run_sql(client.db, "INSERT INTO user_phone (user_id, id) VALUES (3, 'fax')")
    run_sql(client.db, "UPDATE users SET version = 'none' WHERE user_id = 2")
    shown = {user["id"]: user for user in client.users()}
    assert shown[2]["version"] == 0 and len(shown[3]["phone"]) == 2


#: What SQLite is told, so that what is acknowledged stays and a file cannot run code.
PRAGMAS = {"journal_mode": "wal", "synchronous": 3, "journal_size_limit": 16 << 20}
PRAGMAS.update(busy_timeout=5000, foreign_keys=1, trusted_schema=0)
PRAGMAS.update(wal_autocheckpoint=4000, cache_spill=0)


@of_files("its pragmas")
def test_sqlite_is_told_to_be_careful(client):
    client("DELETE /api/user/1")
    for name, value in PRAGMAS.items():
        assert client.app.store.rows(f"PRAGMA {name}") == [(value,)], name


def test_our_own_write_is_one_change_and_one_version(client):
    last = client.changes()[-1]["seq"]
    client("PATCH /api/user/1", {"item": {"mail": "s@g"}})
    assert [change["user"] for change in client.changes(since=last)] == [1]
    assert client.users()[0]["version"] == 2


@of_files("a database in memory")
def test_memory_is_private_to_an_application_and_shared_by_its_threads():
    one, two = Client(":memory:"), Client(":memory:")

    def write(_: int) -> set[int]:
        answers = [one("POST /api/user", {"item": GRACE}) for _ in range(20)]
        return {answer.status_int for answer in answers}

    assert at_once(4, write) == [{201}] * 4
    assert [user["id"] for user in one.users()] == list(range(1, 81))
    assert two.users() == []
    one.close()
    two.close()


def test_two_applications_on_one_file_see_each_other(connect):
    one, two = connect(), connect()
    etag = two.etag(1)
    assert one("PUT /api/user/1", {"item": GRACE}).status_int == 200
    assert two("GET /api/user/1").json["results"] == [{"id": 1, **GRACE}]
    stale = two("DELETE /api/user/1", headers={"If-Match": etag})
    assert stale.status_int == 412
    assert two("DELETE /api/user/1").status_int == 200
    assert one("GET /api/user/1").status_int == 404


def test_of_many_threads_with_one_etag_one_wins(client):
    """The write decides, not a read before it."""
    if_match = {"If-Match": client.etag(1)}

    def write(number: int) -> int:
        item = {"name": f"N{number}", "mail": "n@x"}
        return client("PUT /api/user/1", {"item": item}, if_match).status_int

    assert sorted(at_once(8, write)) == [200] + [412] * 7


def test_a_file_that_another_program_holds_is_a_503(client):
    """The other's lock outlasts our patience; the write leaves nothing, reads go on."""
    assert client("GET /api/user/1").status_int == 200
    client.app.store.patience = 0.01
    with contextlib.closing(another(client.db)) as other:
        other.execute("BEGIN IMMEDIATE")
        answer = client("DELETE /api/user/1")
        assert answer.status_int == 503 and int(answer.headers["Retry-After"]) > 0
        assert client("GET /api/user/1").status_int == 200
        other.execute("ROLLBACK")
        assert client("DELETE /api/user/1").status_int == 200


@of_files("a trigger in its words")
def test_a_write_that_another_programs_trigger_swallows_is_no_success(client):
    """The statement itself decides, as it does where someone was faster."""
    run_sql(
        client.db,
        "CREATE TRIGGER deaf BEFORE UPDATE ON users BEGIN SELECT RAISE(IGNORE); END",
    )
    before = snapshot(client)
    assert client("PATCH /api/user/1", {"item": {"name": "A"}}).status_int == 412
    assert client("POST /api/user/3/phone", {"item": MOBILE}).status_int == 412
    assert snapshot(client) == before


NO_ROOM = (503, 507)  # SQLite before 3.35 does not always say what it lacked


@contextlib.contextmanager
def no_room(size: int = 1024):
    """No file of this process gets past a size, as on a disk that is full."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@of_files("the room on its disk")
@pytest.mark.skipif(sys.platform == "win32", reason="no limits of that kind there")
def test_a_commit_that_fails_leaves_nothing(client):
    assert client("PATCH /api/user/2", {"item": {"name": "A"}}).status_int == 200
    before = snapshot(client)
    with no_room():
        assert client("DELETE /api/user/1").status_int in NO_ROOM
        answer = client("PATCH /api/user/2", {"item": {"name": "B"}})
        assert answer.status_int in NO_ROOM
        assert client("GET /api/user/1").status_int == 200
    assert snapshot(client) == before
    assert client("DELETE /api/user/1").status_int == 200
    assert client.app.store.rows("PRAGMA synchronous") == [(3,)], "as careful as before"


@of_files("the room on its disk")
def test_what_is_new_needs_its_room_twice_and_the_log_gives_its_own_back(db):
    """A third of a small disk is spared."""
    disk, log = userapi.Disk(str(db)), Path(f"{db}-wal")
    size = disk.size()
    with contextlib.closing(another(db)) as other:
        other.execute("BEGIN")
        other.execute("CREATE TABLE new AS SELECT zeroblob(200000) AS x")
        ((pages,),) = other.execute("PRAGMA page_count")
        room = 2 * (pages * 4096 - size)
        assert room > 400_000
        with no_room((size + room) * 3 // 2):
            assert disk.require_room(other, frees=False) == disk.room() == room
        with no_room((size + room) * 3 // 2 - 2):
            with pytest.raises(Problem) as refused:
                disk.require_room(other, frees=False)
            assert refused.value.status == 507
            assert disk.require_room(other, frees=True) == room - 1
        other.execute("COMMIT")
        disk.make_room(other)
        assert not disk.low and log.stat().st_size > 200_000
        with no_room(size + (12 << 20)):
            assert disk.require_room(other, frees=False) == 11 << 20
            disk.make_room(other)
            assert not disk.low and log.stat().st_size > 200_000
        with no_room(size + (2 << 20)):
            disk.make_room(other)
        assert disk.low and log.stat().st_size == 0


@of_files("the room on its disk")
def test_where_little_room_is_left_each_write_of_a_group_is_asked_by_itself(client):
    store, size = client.app.store, os.path.getsize(client.db)
    large = {"items": [{**GRACE, "name": "N" * 200}] * 200}
    with no_room((size + 50_000) * 3 // 2):
        store.open_group()
        assert store.disk.low and store.begin_group()
        assert client("POST /api/user", large).status_int == 507
        assert client("DELETE /api/user/1").status_int == 200
        store.commit_group()
        store.close_group()
    assert [user["id"] for user in client.users()] == [2, 3, 1337]
    assert client("DELETE /api/user/2").status_int == 200 and not store.disk.low


@of_files("the room on its disk")
def test_a_group_that_sqlite_takes_back_is_refused_as_a_whole(client):
    """Where the file may not grow, SQLite ends the transaction in the middle of it:
    what was done before is gone as well, and nothing of it may be acknowledged."""
    store, before = client.app.store, snapshot(client)
    store.open_group()
    ((pages,),) = store.rows("PRAGMA page_count")
    store._group.execute(f"PRAGMA max_page_count = {pages}")
    assert store.begin_group()

    def create(number: int) -> int:
        headers = {"Idempotency-Key": str(number)}
        answer = client("POST /api/user", {"item": ADA}, headers=headers)
        return answer.status_int

    statuses_ = [create(0)]
    while statuses_[-1] == 201 and len(statuses_) < 500:
        statuses_.append(create(len(statuses_)))
    assert statuses_[0] == 201 and statuses_[-1] == 507
    assert create(0) == 507, "and so is what comes later in the group"
    with pytest.raises(Problem) as refused:
        store.commit_group()
    assert refused.value.status == 507
    assert snapshot(client) == before
    store._group.execute("PRAGMA max_page_count = 1000000")
    assert store.begin_group() and create(0) == 201
    store.commit_group()
    assert client.users()[-1]["name"] == ADA["name"]
    store.close_group()


def test_a_write_that_fails_takes_nothing_of_its_group_along(client):
    store = client.app.store
    store.open_group()
    assert store.begin_group()
    assert client("POST /api/user", {"item": ADA}).status_int == 201
    dry = client("POST /api/user?dry_run=true", {"item": ADA})
    assert dry.status_int == 201
    with pytest.raises(ZeroDivisionError), store.transaction():
        store.create_users([ADA])
        1 / 0  # noqa: B018
    assert client("POST /api/user", {"item": GRACE}).status_int == 201
    store.commit_group()
    store.close_group()
    assert [user["name"] for user in client.users()[-2:]] == [
        ADA["name"],
        GRACE["name"],
    ]
    assert len(client.users()) == 6


def test_what_on_change_writes_is_committed_by_itself(client):
    """It is called between two groups, by the thread whose writes are parts of them."""
    told = []

    def follow(change):
        told.append((change["op"], change["user"]))
        if change["op"] == "create":
            store.merge_users([{"id": change["user"], "name": "Followed"}])

    store = userapi.Store(client.db, on_change=follow)
    store.open_group()
    assert store.begin_group()
    [ada] = store.create_users([ADA])
    store.commit_group()
    store.announce_group()
    assert client.users()[-1]["name"] == "Followed"
    assert told == [("create", ada["id"]), ("update", ada["id"])]
    log = client("GET /api/changes").json["results"]
    assert [(row["op"], row["user"]) for row in log[-2:]] == told
    store.close_group()


def test_what_a_group_deleted_is_told_once_it_is_committed(client):
    told = []
    store = userapi.Store(client.db, on_change=lambda change: told.append(change["op"]))
    store.open_group()
    assert store.begin_group()
    store.create_users([ADA])
    store.delete_users([1])
    store.create_users([ADA])
    store.commit_group()
    assert told == []
    store.announce_group()
    assert told == ["create", "delete", "create"]
    store.close_group()


def test_what_is_noted_beside_a_group_concerns_nobody_where_it_cannot_be(client):
    """Someone took the table away whose rows are written at its begin, or froze it."""
    store = client.app.store
    store.open_group()
    store.touch_token("ada", "2026-01-01")
    run_sql(client.db, "ALTER TABLE tokens RENAME TO gone")
    assert store.begin_group()
    store.create_users([GRACE])
    store.commit_group()
    run_sql(client.db, "ALTER TABLE gone RENAME TO tokens")
    store.add_token("ada", "admin")
    if not POSTGRESQL:
        refuse = "BEGIN SELECT RAISE(ABORT, 'frozen'); END"
        run_sql(client.db, f"CREATE TRIGGER f BEFORE UPDATE ON tokens {refuse}")
        store.touch_token("ada", "2026-01-01")
    assert store.begin_group() and not store.waiting
    store.merge_users([{"id": 1, "name": "A"}])
    store.commit_group()
    store.revoke_token("ada")
    assert len(client.users()) == 5 and client.etag(1) == '"2"'
    store.close_group()
    store.close_group()
    assert len(client.users()) == 5, "closed twice, it stays usable"


NOISE = (
    "CREATE TABLE noise AS WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL"
    " SELECT i + 1 FROM n LIMIT 5000) SELECT randomblob(4000) FROM n"
)


@of_files("its log")
def test_a_log_that_others_keep_long_is_emptied_by_the_next_write(client, monkeypatch):
    """Two processes that write without a pause keep it so, as if they were readers."""
    monkeypatch.setattr(userapi, "LONG", 1 << 20)
    monkeypatch.setattr(userapi, "LOOK", 0)
    log = Path(f"{client.db}-wal")
    with contextlib.closing(another(client.db)) as reader:
        reader.execute("BEGIN")
        assert list(reader.execute("SELECT 1 FROM users"))
        run_sql(client.db, NOISE)
        assert client("PATCH /api/user/1", {"item": {"name": "A"}}).status_int == 200
        assert log.stat().st_size > 16 << 20
    assert client("PATCH /api/user/1", {"item": {"name": "B"}}).status_int == 200
    assert log.stat().st_size == 0


@of_files("its lock")
def test_a_group_that_waits_in_vain_is_refused(client):
    store = client.app.store
    store.patience = 0.01
    store.open_group()
    with contextlib.closing(another(client.db)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert not store.begin_group() and store.begin_group(wait=True)
        assert client("POST /api/user", {"item": GRACE}).status_int == 503
        with pytest.raises(Problem):
            store.commit_group()
    store.close_group()


@of_files("its lock")
def test_another_thread_is_no_part_of_the_group_that_is_under_way(client):
    store = client.app.store
    store.patience = 0.01
    store.open_group()
    assert store.begin_group()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client, "POST /api/user", {"item": GRACE}).result(60)
    assert answer.status_int == 503
    store.commit_group()
    store.close_group()


FORK = """
import os, sys, userapi
store, gone = userapi.Store(sys.argv[1]), userapi.Store(":memory:")
memory = userapi.Store(":memory:")
for one in (store, memory):
    one.create_users([{"name": "Before", "mail": "b@x"}])
del gone
before, store.patience = set(store._pool), 0.01
store._writing.acquire()  # as a thread has it that is about to write
child = os.fork()
if not child:
    for one in (store, memory):
        one.create_users([{"name": "Child", "mail": "c@x"}])
    assert memory.count_users() == 2  # a copy is its own
    sys.exit(bool(before & set(store._pool)))  # no connection may cross a fork
assert os.waitpid(child, 0)[1] == 0
store._writing.release()
store.create_users([{"name": "Parent", "mail": "p@x"}])
print([user["name"] for user in store.find_users()][-3:], store.check())
assert memory.count_users() == 1
"""


FORK_AND_CLOSE = """
import os, sys, userapi
store = userapi.Store(sys.argv[1])
store.create_users([{"name": "Before", "mail": "b@x"}])
store.open_group()  # as our own server has it
wrote, closed = os.pipe(), os.pipe()
child = os.fork()
if not child:
    for name in ("First", "Second"):
        store.create_users([{"name": name, "mail": "c@x"}])
        os.write(wrote[1], b".")
        os.read(closed[0], 1)
    os._exit(0)  # as a child of multiprocessing ends
assert store.begin_group(wait=True)
store.commit_group()
for _ in range(2):
    os.read(wrote[0], 1)
    store.close_group()
    os.write(closed[1], b".")
assert os.waitpid(child, 0)[1] == 0
with store.transaction():
    [mine] = store.create_users([{"name": "Mine", "mail": "m@x"}])
    child = os.fork()
    if not child:
        os._exit(bool(list(store.find_users(name="Mine"))))
    assert os.waitpid(child, 0)[1] == 0
    store.delete_users([mine["id"]])
print([user["name"] for user in store.find_users()][-3:], store.check())
"""


@of_files("the locks on it")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork there")
def test_what_a_child_wrote_stays_when_its_parent_closes_the_database(db):
    """Else its log would be deleted under it."""
    out = run(sys.executable, "-c", FORK_AND_CLOSE, db)
    wanted = b"['Before', 'First', 'Second'] []\n"
    assert (out.returncode, out.stdout) == (0, wanted), out.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork there")
def test_a_store_goes_on_in_both_processes_after_a_fork(db):
    out = run(sys.executable, "-c", FORK, db)
    wanted = b"['Before', 'Child', 'Parent'] []\n"
    assert (out.returncode, out.stdout) == (0, wanted), out.stderr


def test_a_store_needs_no_fork(connect, monkeypatch):
    """As on Windows."""
    monkeypatch.delattr(os, "register_at_fork", raising=False)
    assert len(connect().users()) == 4


@of_files("its file")
@pytest.mark.parametrize("gone", ["file", "folder", "replaced"])
def test_a_file_that_went_away_takes_no_more_writes(connect, tmp_path, template, gone):
    """They would be acknowledged, and be in a file that nobody can find."""
    folder = tmp_path / "folder"
    folder.mkdir()
    db = database(folder / "users.db", template)
    client = connect(db)
    if gone == "file":
        assert client("PATCH /api/user/1", {"item": {"name": "A"}}).status_int == 200
        db.unlink()
    elif gone == "folder":
        shutil.rmtree(folder)
    else:
        os.replace(database(folder / "new.db", template), db)
    assert client("POST /api/user", {"item": GRACE}).status_int == 503
    assert client("DELETE /api/user/1").status_int == 503
    client.close()
    there = client("GET /api/user").status_int
    assert (there, db.exists()) == ((200, True) if gone == "replaced" else (503, False))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no named pipes")
def test_what_is_no_file_is_no_database_and_nothing_is_made_beside_it(tmp_path):
    os.mkfifo(tmp_path / "users.db")
    with pytest.raises(Problem) as refused:
        userapi.Store(tmp_path / "users.db")
    assert refused.value.detail == "is no file"
    assert [path.name for path in tmp_path.iterdir()] == ["users.db"]


@of_files("the file of the first application")
@pytest.mark.parametrize("lock", [True, False])
@pytest.mark.parametrize("old", [True, False])
def test_many_may_make_or_upgrade_a_database_at_once(
    tmp_path, first, monkeypatch, old, lock
):
    """Without a lock (on Windows) that is not sure, but they can open it one by one."""
    if not lock:
        monkeypatch.setitem(sys.modules, "fcntl", None)
    for number in range(8 if lock else 1):
        path = tmp_path / f"{number}.db"
        if old:
            shutil.copy(first, path)

        def open_it(_: int, path: Path = path) -> int:
            with contextlib.closing(userapi.Store(path)) as store:
                return store.count_users()

        opened = at_once(4 if lock else 1, open_it)
        assert set(opened) == {len(FIRST_ROWS) * old}


@of_files("the file of the first application")
@pytest.mark.parametrize("how", ["IMMEDIATE", "EXCLUSIVE", "DEFERRED"])
def test_a_start_waits_for_the_first_application_to_end_what_it_does(first, how):
    other = sqlite3.connect(first, isolation_level=None, check_same_thread=False)
    with contextlib.closing(other):
        other.execute(f"BEGIN {how}")
        assert list(other.execute("SELECT 1 FROM users"))
        timer = threading.Timer(0.03, other.execute, ["COMMIT"])
        timer.start()
        store = userapi.Store(str(first))
        timer.join()
    assert store.count_users() == len(FIRST_ROWS)
    store.close()


@of_files("what is written to it")
def test_what_is_half_written_when_a_database_is_opened_is_no_damage(
    tmp_path, template
):
    """As where another program closes it just now, and its log goes into the file."""
    path = database(tmp_path / "users.db", template)
    whole = path.read_bytes()
    path.write_bytes(whole[:8192] + bytes(len(whole) - 8192))
    os.utime(path, (1, 1))

    class Opened(userapi.Store):
        def _examine(self, beside: list[str], size: int) -> None:
            try:
                super()._examine(beside, size)
            finally:
                path.write_bytes(whole)

    store = Opened(str(path))
    assert store.check() == []
    store.close()


def page_gone(path: Path) -> None:
    sql = "SELECT rootpage FROM sqlite_master WHERE name = 'graves'"
    ((at_,),) = run_sql(path, sql)
    whole = path.read_bytes()
    path.write_bytes(whole[: (at_ - 1) * 4096] + bytes(4096) + whole[at_ * 4096 :])


def empty_beside_a_wal(path: Path) -> None:
    path.write_bytes(b"")
    path.with_name(path.name + "-wal").write_bytes(b"\x37\x7f\x06\x82" + b"\0" * 60)


def empty_beside_a_journal(path: Path) -> None:
    path.write_bytes(b"")
    path.with_name(path.name + "-journal").write_bytes(b"\1" * 512)  # of many pages


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def of_another(*statements: str) -> Any:
    """Another program's database is in its place."""

    def damage(path: Path) -> None:
        path.unlink()
        for statement in statements:
            run_sql(path, statement)

    return damage


THEIR_USERS = "CREATE TABLE users (id INTEGER PRIMARY KEY AUTOINCREMENT, login TEXT)"
BROKEN = {
    "newer": lambda path: run_sql(path, "PRAGMA user_version = 9999"),
    "half of ours": lambda path: run_sql(path, "DROP TABLE changes"),
    "text": lambda path: path.write_text("id,name,mail\n1,Simone,s@g\n" * 100),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "no header": lambda path: path.write_bytes(bytes(100) + path.read_bytes()[100:]),
    "one byte": lambda path: path.write_bytes(b"\n"),  # which SQLite takes for none
    "no page": page_gone,
    "empty beside a log": empty_beside_a_wal,
    "empty beside a journal": empty_beside_a_journal,
    "folder": folder,
    "no users": of_another("CREATE TABLE customers (id INTEGER PRIMARY KEY)"),
    "other users": of_another(THEIR_USERS, "INSERT INTO users VALUES (1, 'root')"),
    "more tables": of_another(FIRST_SCHEMA, "CREATE TABLE orders (id INTEGER)"),
    "marked": of_another(FIRST_SCHEMA, "PRAGMA application_id = 5"),
    "of a version": of_another(FIRST_SCHEMA, "PRAGMA user_version = 1"),
}


def everything_in(path: Path) -> dict[str, bytes | None]:
    return {
        file.name: file.read_bytes() if file.is_file() else None
        for file in path.iterdir()
    }


@of_files("its file")
@pytest.mark.parametrize("damage", BROKEN)
def test_a_file_that_is_not_ours_is_refused_and_untouched(db, damage, capfd):
    BROKEN[damage](db)
    before = everything_in(db.parent)
    with pytest.raises(Problem) as refused:
        UserAPI(db=str(db))
    assert str(refused.value) and refused.value.status == 503
    assert everything_in(db.parent) == before
    status, _, err = run_main(capfd, "serve", "--port", "0", "--db", str(db))
    assert status in (1, 2)
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err
    assert everything_in(db.parent) == before


@of_files("its file")
def test_a_file_in_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(Problem):
        UserAPI(db=str(tmp_path / "no" / "users.db"))
    assert not list(tmp_path.iterdir())


@of_files("its file")
@pytest.mark.parametrize("left", ["nothing", "a first write's journal", "a table's"])
def test_an_empty_file_is_a_new_database(connect, tmp_path, left):
    path = tmp_path / "new.db"
    path.touch()
    if left.endswith("journal"):
        path.with_name("new.db-journal").write_bytes(b"\1" * 16 + bytes(496))
    elif left != "nothing":
        run_sql(path, "CREATE TABLE t (id INTEGER PRIMARY KEY AUTOINCREMENT)")
        run_sql(path, "DROP TABLE t")
    client = connect(path)
    assert client("GET /api/user").json == {"results": []}
    assert client("POST /api/user", {"item": GRACE}).json["results"][0]["id"] == 1


@of_files("its file")
def test_the_sample_opens(connect, tmp_path):
    path = Path(shutil.copy(HERE / "users.db.sample", tmp_path / "users.db"))
    client = connect(path)
    assert client("GET /api/user/1").json == {"results": [SIMONE]}
    users = client.users()
    assert len(users) >= 12
    assert any(not user["name"].isascii() for user in users)
    for user in users[1:]:
        item = {name: user[name] for name in ("name", "mail", "phone", "address")}
        answer = client(f"PUT /api/v2/user/{user['id']}?dry_run=true", {"item": item})
        assert answer.status_int == 200, "the sample's own values are valid"


@contextlib.contextmanager
def read_only(folder: Path):
    """The folder as on read-only media; root becomes nobody for it, in this process."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    modes = {path: path.stat().st_mode for path in (folder, *folder.iterdir())}
    for path in modes:
        path.chmod(0o555 if path.is_dir() else 0o444)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for path, mode in modes.items():
            path.chmod(mode)


@pytest.fixture
def public(template):
    """A folder that everyone can get to, with a database in it."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        shutil.copy(template, Path(folder) / "users.db")
        yield Path(folder)


@of_files("its file's permissions")
def test_from_read_only_media_it_reads_and_writes_are_a_503(public):
    before = everything_in(public)
    with read_only(public):
        client = Client(public / "users.db")
        assert client("GET /api/user").json == {"results": SEED}
        for line, body in (
            ("DELETE /api/user/1", None),
            ("POST /api/user", {"item": GRACE}),
        ):
            answer = client(line, body)
            assert answer.status_int == 503
        assert client("GET /api/user/1").status_int == 200
        client.close()
    assert everything_in(public) == before


@of_files("its file's permissions")
def test_an_old_database_on_read_only_media_is_refused(public):
    (public / "users.db").unlink()
    with contextlib.closing(sqlite3.connect(public / "users.db")) as other, other:
        other.execute(FIRST_SCHEMA)
    with read_only(public), pytest.raises(Problem):
        UserAPI(db=str(public / "users.db"))


@of_files("its file's permissions")
def test_a_file_that_may_not_be_read_is_refused(public):
    with read_only(public):
        pass  # the folder is as it was again
    (public / "users.db").chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(Problem):
            UserAPI(db=str(public / "users.db"))
    finally:
        if root:
            os.seteuid(0)


def test_a_thousand_users_are_read_page_by_page_inside(connect, tmp_path):
    """More than are read at a time, with ties everywhere: all once, in order."""
    client = connect(tmp_path / "many.db")
    items = [{"name": f"N{n % 7}", "mail": f"m{n % 3}@x"} for n in range(1201)]
    assert client("POST /api/user", {"items": items}).status_int == 201
    for sort in ("id", "-id", "name", "-name", "mail", "-created"):
        whole = client(f"GET /api/user?sort={sort}").json["results"]
        keys = [user.get(sort.lstrip("-")) for user in whole]
        if "created" not in sort:
            assert keys == sorted(keys, reverse=sort[0] == "-")
        assert len({user["id"] for user in whole}) == 1201
        lines_ = client(f"GET /api/user?sort={sort}&format=ndjson").text.splitlines()
        assert [json.loads(line) for line in lines_] == whole
        rows = client(f"GET /api/user?sort={sort}&format=csv").text.split("\r\n")[1:-1]
        assert [int(row.split(",")[0]) for row in rows] == [u["id"] for u in whole]
        page = client(f"GET /api/user?sort={sort}&limit=1000").json["results"]
        assert page == whole[:1000]


@of_files("its way of counting")
def test_a_page_costs_the_same_at_any_depth_among_equals(tmp_path):
    """Of 2,000 users with one name, mail and time; counted in SQLite's own steps."""
    steps = [0]

    class Counting(userapi.Store):
        def _connect(self) -> Any:
            db = super()._connect()
            db.set_progress_handler(lambda: steps.__setitem__(0, steps[0] + 1), 10)
            return db

    def cost(**query: Any) -> int:
        steps[0] = 0
        page = next(store.pages("user_id", userapi.Query(limit=20, **query)))
        assert len(page) == 20
        return steps[0]

    store = Counting(str(tmp_path / "users.db"))
    store.create_users([{"name": "Ada", "mail": "ada@x"}] * 2000)
    for sort in ("name", "-mail", "created", "-updated"):
        first = next(store.pages("user_id", userapi.Query(sort=sort, limit=20)))
        place = userapi.place_of(first[-1])[0], 1000
        assert cost(sort=sort, after=place) < 2 * cost(sort=sort), sort
    store.close()


def test_an_import_counts_on_from_what_another_process_wrote(connect):
    """Where each write commits for itself, as in processes of another server."""
    one, another = connect(), connect()
    rows = "name,mail\nAda,ada@example.org\n"
    for client in (one, another, one):
        assert client("POST /api/user", rows, SENT_CSV).status_int == 201
    assert [user["id"] for user in one.users()][3:] == [1337, 1338, 1339, 1340]


def made(db: Any) -> list[Any]:
    """The indexes and triggers of users."""
    return sorted(run_sql(db, userapi.ASIDE_SQL))


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("name", ["N", "Zoe\u0308"])
def test_many_new_users_leave_every_index(connect, db, monkeypatch, unique, name):
    """From a number on indexes and triggers are made last; with unique_mail never."""
    monkeypatch.setattr(userapi, "BATCH", 20)
    monkeypatch.setattr(userapi.Store, "many", 40)
    client = connect(unique_mail=unique)
    before = made(db)
    rows = "name,mail\n" + "".join(f"{name},n{n}@x\n" for n in range(90))
    assert client("POST /api/user", rows, SENT_CSV).status_int == 201
    assert made(db) == before and len(before) >= (5 if POSTGRESQL else 8)
    again = client("POST /api/user", rows, SENT_CSV)
    assert again.status_int == (409 if unique else 201)
    assert made(db) == before and client.app.store.check() == []
    assert len(client("GET /api/user?mail=n89@X").json["results"]) == 2 - unique


@of_files("triggers of its own")
def test_another_programs_trigger_sees_every_new_user(client, db, monkeypatch):
    monkeypatch.setattr(userapi.Store, "many", 1000)
    audit = "AFTER INSERT ON users BEGIN INSERT INTO seen VALUES (NEW.user_id); END"
    run_sql(db, "CREATE TABLE seen (id)")
    run_sql(db, f"CREATE TRIGGER users_seen {audit}")
    client.app.store.create_users([GRACE] * 2500)
    assert run_sql(db, "SELECT count(*) FROM seen") == [(2500,)]


# --- unique mail


def test_unique_mail(connect):
    client = connect(unique_mail=True)
    taken = {"name": "Other", "mail": "GIERTZ@shittyrobots.LOC"}
    row = Row("", 409, at("#/item/mail"))
    check(client("POST /api/user", {"item": taken}), row)
    check(client("PUT /api/user/2", {"item": taken}), row)
    check(client("PATCH /api/user/2", {"item": {"mail": taken["mail"]}}), row)
    items = [{"id": 2, **GRACE}, {"id": 3, **taken}]
    check(client("PUT /api/user", {"items": items}), Row("", 409, bad_items(1)))
    items = [{"id": 99, **GRACE}, {"id": 3, **taken}]
    check(client("PUT /api/user", {"items": items}), Row("", 404, bad_items(0, 1)))
    twice = {"items": [GRACE, {**GRACE, "mail": "GRACE@example.org"}]}
    check(client("POST /api/user", twice), Row("", 409))
    text = "name,mail\nOther,GIERTZ@shittyrobots.loc\n"
    csv_type = {"Content-Type": "text/csv"}
    check(
        client("POST /api/user", text, csv_type),
        Row("", 409, {"errors": [{"line": 2}]}),
    )
    assert [user["version"] for user in client.users()] == [1, 1, 1, 1]
    named = {"items": [{"id": 2, "name": "A"}, {"id": 3, "name": "A"}]}
    assert client("PATCH /api/user", named).status_int == 200
    chans = {"item": {"name": "Other", "mail": CHAN["mail"]}}
    assert client("POST /api/user", chans).status_int == 409
    assert client("PUT /api/user/1", {"item": {**taken}}).status_int == 200
    assert client("POST /api/user", {"item": GRACE}).status_int == 201
    assert client("DELETE /api/user/1").status_int == 200
    assert client("POST /api/user", {"item": taken}).status_int == 201
    assert connect()("POST /api/user", chans).status_int == 201, "where it is off again"


def test_addresses_may_move_along_a_long_row_of_users(connect):
    store = connect(unique_mail=True).app.store
    many = store.create_users([{"name": "A", "mail": f"m{n}@x"} for n in range(1200)])
    mails = [user["mail"] for user in many]
    moved = [{"id": u["id"], "mail": m} for u, m in zip(many, mails[1:] + mails[:1])]
    assert [user["mail"] for user in store.merge_users(moved)] == mails[1:] + mails[:1]


@of_files("what other programs write is noticed by triggers")
@pytest.mark.parametrize("way", ["ABORT", "REPLACE", "IGNORE"])
@pytest.mark.parametrize(
    "statement",
    [
        "INSERT OR {} INTO users (user_name, user_mail) VALUES ('Eve', 'GIERTZ{}')",
        "UPDATE OR {} users SET user_mail = 'GIERTZ{}' WHERE user_id = 3",
    ],
)
def test_another_program_takes_no_address_away(connect, statement, way):
    client = connect(unique_mail=True)
    before = snapshot(client)
    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        run_sql(client.db, statement.format(way, "@shittyrobots.loc"))
    assert snapshot(client) == before and client.app.store.check() == []
    run_sql(client.db, "UPDATE users SET user_mail = upper(user_mail)")  # one's own
    assert client.users()[0]["mail"] == "GIERTZ@SHITTYROBOTS.LOC"


def test_unique_mail_holds_for_processes_that_were_started_without(connect):
    client = connect()
    assert connect(unique_mail=True).users() == client.users()
    taken, before = {"item": {"name": "A", "mail": ZOE["mail"].upper()}}, client.users()
    for call in ("POST /api/user", "PATCH /api/user/1", "POST /api/user?dry_run=true"):
        answer = client(call, taken)
        assert (answer.status_int, answer.json["code"]) == (409, 1)
        assert "unique_mail" in answer.json["detail"]
    assert client.users() == before


def test_a_command_leaves_unique_mail_as_the_server_has_it(command, connect, tmp_path):
    """Else one that is not told of it would undo it, and the next start be refused."""
    again = tmp_path / "again.csv"
    again.write_text(f"name,mail\nA,{ZOE['mail'].upper()}\n")
    connect(unique_mail=True)
    status, _, err = command("import", again)
    assert status == 1 and "is taken" in err
    assert command("check")[0] == 0
    assert command("import", again, "--no-unique-mail")[0] == 0, "but one that is told"
    assert command("import", again, "--unique-mail")[0] == 1, "nor could have it"


def test_unique_mail_over_duplicates_is_refused_with_their_ids(connect, db, capfd):
    twin = {"id": 77, "name": "Twin", "mail": "LATE@example.org"}
    client = connect()
    assert client("POST /api/user", {"item": twin}).status_int == 201
    client.close()
    with pytest.raises(Problem) as refused:
        UserAPI(db=str(db), unique_mail=True)
    assert "77" in str(refused.value) and "1337" in str(refused.value)
    status, _, err = run_main(
        capfd, "serve", "--port", "0", "--db", str(db), "--unique-mail"
    )
    assert status in (1, 2) and "77" in err and "1337" in err
    assert len(connect().users()) == 5


# --- the Store from Python


def test_the_store_gives_and_takes_users(client):
    store = client.app.store
    assert store.get_user(1)["name"] == "Simone Giertz"
    assert store.get_user(3)["phone"] == [PHONE]
    assert [user["id"] for user in store.find_users(q="ZOË")] == [2]
    assert [user["id"] for user in store.find_users(sort="-id", limit=2)] == [1337, 3]
    assert [user["id"] for user in store.find_users(limit=1)] == [1]
    assert [user["id"] for user in store.find_users(ids=[3, 1337], limit=200)] == [
        3,
        1337,
    ]
    (made,) = store.create_users([{**GRACE, "phone": [MOBILE]}])
    assert made == client("GET /api/v2/user/1338").json["results"][0]
    (put_,) = store.replace_users([{"id": 1338, **ADA}])
    assert (put_["name"], put_["version"]) == (ADA["name"], 2)
    (merged,) = store.merge_users([{"id": 1338, "phone": []}])
    assert (merged["name"], merged["phone"]) == (ADA["name"], [])
    assert [change["op"] for change in client.changes()[-3:]] == [
        "create",
        "update",
        "update",
    ]


STORE_REFUSALS = [
    (lambda store: store.get_user(99), 404),
    (lambda store: store.get_user(2**63), 404),
    (lambda store: store.create_users([BAD, GRACE]), 422),
    (lambda store: store.create_users([{**GRACE, "name": "a\ud800b"}]), 422),
    (
        lambda store: store.create_users(
            [{**GRACE, "phone": [{**MOBILE, "label": "\ud800"}]}]
        ),
        422,
    ),
    (
        lambda store: store.create_users([{**GRACE, "address": [{"city": "\ud800"}]}]),
        422,
    ),
    (lambda store: store.find_users(q="\ud800"), 400),
    (lambda store: store.create_users([{"id": 1, **GRACE}]), 409),
    (lambda store: store.replace_users([{"id": 99, **GRACE}]), 404),
    (lambda store: store.merge_users([{"id": 1, "name": None}]), 422),
    (lambda store: store.find_users(sort="nonsense"), 400),
    (lambda store: store.find_users(colour="red"), 400),
    (lambda store: store.find_users(limit=0), 400),
    (lambda store: store.find_users(q=5), 400),
    (lambda store: store.find_users(limit=2.5), 400),
    (lambda store: store.find_users(limit=2**63), 400),
    (lambda store: store.find_users(sort="--id"), 400),
    (lambda store: store.find_users(ids=1), 400),
    (lambda store: store.find_users(after=(1,)), 400),
    (lambda store: store.find_users(ids=[2**63]), 400),
    (lambda store: store.get_user("1"), 404),
    (lambda store: store.get_user(-(2**63) - 1), 404),
    (lambda store: store.delete_users(iter([1, -(2**63) - 1])), 404),
    (lambda store: store.revoke_token("nobody"), 404),
    (lambda store: store.delete_rows(3, userapi.PHONE, [1, 9]), 404),
    (lambda store: store.delete_rows(9, userapi.PHONE, [1]), 404),
]


@pytest.mark.parametrize("call_, status", STORE_REFUSALS)
def test_the_store_refuses_as_the_api_does(client, call_, status):
    before = snapshot(client)
    with pytest.raises(Problem) as refused:
        call_(client.app.store)
    assert refused.value.status == status
    assert snapshot(client) == before


def test_the_store_tells_which_item_is_wrong(client):
    with pytest.raises(Problem) as refused:
        client.app.store.create_users([GRACE, BAD])
    pointers = [error["pointer"] for error in refused.value.errors]
    assert pointers == ["#/items/1/name", "#/items/1/mail"]


def test_a_tokens_name_is_taken_once(client):
    client.app.store.add_token("bob", "read-only")
    client.app.store.add_token("ada", "admin")
    with pytest.raises(Problem) as refused:
        client.app.store.add_token("ada", "read-only")
    assert refused.value.status == 409
    named = [row[:2] for row in client.app.store.tokens()]
    assert named == [("ada", "admin"), ("bob", "read-only")]


def test_the_store_deletes_rows_of_a_user(client):
    client.app.store.delete_rows(3, userapi.PHONE, [1])
    assert client("GET /api/user/3/phone").json == {"results": []}
    assert client.etag(3) == '"2"'


def test_what_is_written_together_is_kept_together_or_not_at_all(client):
    store = client.app.store
    with pytest.raises(Problem), store.transaction():
        store.create_users([GRACE])
        store.create_users([BAD])
    assert len(client.users()) == 4
    with store.transaction():
        assert store.count_users() == 4
        store.create_users([GRACE])
        store.create_users([ADA])
        assert store.count_users() == 6
    assert len(client.users()) == 6


PARTS_REFUSED = [
    lambda store: store.create_users([*[GRACE] * userapi.BATCH, BAD]),
    # whose addresses have been taken from them before the fault is found
    lambda store: store.merge_users([{"id": n, "mail": "one@x.org"} for n in (1, 2)]),
    lambda store: store.delete_users([1, 99]),
]


@pytest.mark.parametrize("refused", PARTS_REFUSED)
def test_a_part_that_is_refused_leaves_nothing_in_the_whole(connect, refused):
    store = connect(unique_mail=True).app.store
    before = list(store.find_users())
    with store.transaction(actor="host"):
        store.create_users([ADA])
        with pytest.raises(Problem):
            refused(store)
        with pytest.raises(ZeroDivisionError), store.transaction():
            store.create_users([{**ADA, "mail": "other@x.org"}])
            store.create_users([{**ADA, "mail": "third@x.org"}])
            1 / 0  # noqa: B018
        with store.transaction():
            assert store.count_users() == 5
            store.create_users([{**ADA, "mail": "other@x.org"}], actor="bob")
            store.delete_users([3])
    assert [user["id"] for user in store.find_users(mail=SIMONE["mail"])] == [1]
    after = [user["id"] for user in store.find_users()]
    assert after == [*(user["id"] for user in before if user["id"] != 3), 1338, 1339]
    log = [json.loads(change) for change, _ in store.changes(None, 99)][-3:]
    told_ = [(row["op"], row["user"], row["actor"]) for row in log]
    assert told_ == [
        ("create", 1338, "host"),
        ("create", 1339, "bob"),
        ("delete", 3, "host"),
    ]


def test_an_import_that_is_refused_within_a_whole_leaves_every_index(db, monkeypatch):
    monkeypatch.setattr(userapi.Store, "many", 1000)
    store, before = userapi.Store(str(db)), made(db)
    with store.transaction(), contextlib.suppress(Problem):
        store.create_users([*[GRACE] * 2500, BAD])
    assert made(db) == before and store.count_users() == 4


def test_a_dry_run_within_a_whole_keeps_nothing(client):
    """As where the application is called by what has begun a transaction of its own."""
    store = client.app.store
    with store.transaction():
        answer = client("POST /api/user?dry_run=true", {"item": GRACE})
        with store.transaction(keep=False):
            store.create_users([GRACE])
            assert store.count_users() == 5
        assert client("POST /api/user", {"item": ADA}).status_int == 201
    assert answer.status_int == 201 and len(client.users()) == 5


def test_a_list_that_was_read_before_a_rollback_is_not_remembered(client):
    with client.app.store.transaction(keep=False):
        client.app.store.create_users([GRACE])
        assert len(client("GET /api/user").json["results"]) == 5
    assert len(client("GET /api/user").json["results"]) == 4
    with client.app.store.transaction():
        client.app.store.create_users([GRACE])
        assert len(client("GET /api/user").json["results"]) == 5


def test_to_look_for_what_no_database_holds_is_no_fault_within_a_whole(client):
    with client.app.store.transaction():
        client.app.store.create_users([GRACE])
        assert client("GET /api/user?q=%00").json == {"results": []}
    assert len(client.users()) == 5


@of_files("the room on its disk")
def test_a_whole_that_sqlite_takes_back_in_a_part_is_refused(client):
    store, before = client.app.store, snapshot(client)
    with pytest.raises(Problem) as refused, store.transaction() as whole:
        store.create_users([GRACE])
        ((pages,),) = store.rows("PRAGMA page_count")
        whole.writer().execute(f"PRAGMA max_page_count = {pages}")
        with contextlib.suppress(Exception):  # as a careless host does
            for _ in range(9999):
                store.add_token(secrets.token_hex(99), "admin")
        whole.writer().execute("PRAGMA max_page_count = 1000000")
        with contextlib.suppress(Exception):
            store.create_users([ADA])
    assert refused.value.status == 507 and snapshot(client) == before


def test_transactions_of_coroutines_that_overlap_are_refused(client):
    """What one was told is kept would be taken back with the other's writes."""
    store, before = client.app.store, snapshot(client)

    async def write() -> None:
        with store.transaction():
            store.create_users([GRACE])
            await asyncio.sleep(0)

    async def both() -> list[Any]:
        return await asyncio.gather(write(), write(), return_exceptions=True)

    assert [type(fault) for fault in asyncio.run(both())] == [RuntimeError] * 2
    assert snapshot(client) == before
    assert len(store.create_users([GRACE])) == 1


def test_more_ids_than_a_statement_has_values(client):
    """SQLite takes 32,766 by default, 250,000 on Debian."""
    store, many = client.app.store, range(1, 260_000)
    assert len(list(store.find_users(ids=iter(many)))) == 4
    assert list(store.find_users(ids=[])) == []
    with pytest.raises(Problem) as refused:
        store.delete_users(many)
    assert refused.value.status == 404


def test_the_folder_that_we_are_in_may_change(db, tmp_path, monkeypatch):
    monkeypatch.chdir(db.parent if isinstance(db, Path) else tmp_path)
    store = userapi.Store(db.name if isinstance(db, Path) else db)
    monkeypatch.chdir("/")
    assert len(store.create_users([GRACE])) == 1


def test_what_is_in_memory_is_waited_for_but_not_for_ever():
    store = userapi.Store(":memory:")
    store.patience = 0.01
    with store.transaction():
        store.create_users([GRACE])
        pool = concurrent.futures.ThreadPoolExecutor(1)
        with pool, pytest.raises(Problem) as refused:
            pool.submit(store.count_users).result(60)
    assert refused.value.status == 503 and store.count_users() == 1


# ------------------------------------------------------------------------------------
# Operations
# ------------------------------------------------------------------------------------

# --- reading users, v1

READS = [
    Row("GET /api/user", 200, results(*SEED)),
    Row("GET /api/user/0", 200, results(*SEED)),
    Row("GET /api/user/1", 200, (results(SIMONE), header("ETag", '"1"'))),
    Row("GET /api/user/2", 200, (results(ZOE), header("Vary", "Accept"))),
    Row("GET /api/user/3", 200, results(CHAN), ["phone", "version", "created"]),
    Row("GET /api/user/1337", 200, results(LATE)),
    Row("GET /api/user/99", 404),
    Row(f"GET /api/user/{MAX_ID}", 404),
    Row(f"GET /api/user/{'0' * 40}1", 200, results(SIMONE)),
    Row(f"GET /api/user?id={'0' * 5000}1", 200, results(SIMONE)),
    *[Row(f"GET /api/user/{text}", 404) for text in NO_IDS],
    Row("GET /api/user/%FF1", (400, 404)),
    Row("GET /api/user/1/fax", 404),
    Row("GET /api/users", 404),
    Row("GET /api/User", 404),
    Row("GET /api", 404),
    Row("GET /api/user/1/phone/1/x", 404),
]  # fmt: skip

VERSIONS = [
    Row("GET /api/v1/user/1", 200, results(SIMONE)),
    Row("GET /api/v2/user/1", 200, {"results": [{**SIMONE, "version": 1}]}),
    Row("GET /api/v3/user", 404, ("v1", "v2"), "v4"),
    Row("GET /api/v3/user/1", 404, ("v1", "v2")),
    Row("GET /api/v3/", 404, ("v1", "v2")),
    Row("DELETE /api/v3/user/1", 404, ("v1", "v2")),
    Row("GET /api/v0/user", 404),
    Row("GET /api/v01/user", 404),
    Row("GET /api/V1/user", 404),
]  # fmt: skip

# --- methods

METHODS = [
    Row("POST /api/user/1", 405, allow(ITEM_METHODS), body={"item": GRACE}),
    Row("POST /api/user/99", 405, allow(ITEM_METHODS), body={"item": GRACE}),
    *[
        Row(f"{method} /api/user/0", 405, allow(READ_METHODS), body={"item": GRACE})
        for method in ("POST", "PUT", "PATCH", "DELETE")
    ],
    Row("POST /api/changes", 405, allow(READ_METHODS), body={}),
    Row("DELETE /health", 405, allow(READ_METHODS)),
    Row("PUT /openapi.json", 405, allow(READ_METHODS), body={}),
    Row("POST /", 405, allow(READ_METHODS), body={}),
    Row("TRACE /api/user/1", 405, allow(ITEM_METHODS)),
    Row("TRACE /api/user", 405, allow(LIST_METHODS)),
    Row("BREW /api/user", (405, 501)),
    Row("get /api/user", (405, 501)),
    Row("Post /api/user", (405, 501), body={"item": GRACE}),
    Row("OPTIONS /api/user", 204, allow(LIST_METHODS)),
    Row("OPTIONS /api/user/1", 204, (allow(ITEM_METHODS),
        header("Accept-Patch", "application/json, application/merge-patch+json"))),
    Row("OPTIONS /api/user/0", 204, allow(READ_METHODS)),
    Row("OPTIONS /api/user/3/phone", 204, allow(LIST_METHODS)),
    Row("OPTIONS /api/user/3/phone/1", 204, allow(ITEM_METHODS)),
    Row("OPTIONS /api/user/3/address", 204, allow(LIST_METHODS)),
    Row("OPTIONS /api/user/3/address/1", 204, allow(ITEM_METHODS)),
    Row("OPTIONS /api/changes", 204, allow(READ_METHODS)),
    Row("POST /api/user/3/phone/1", 405, allow(ITEM_METHODS), body={"item": MOBILE}),
    Row("POST /api/user/3/address/1", 405, allow(ITEM_METHODS), body={"item": OFFICE}),
    Row("HEAD /api/user", 200, as_text("")),
    Row("HEAD /api/user/1", 200, (as_text(""), header("ETag", '"1"'))),
    Row("HEAD /api/user/99", 404, as_text("")),
]  # fmt: skip

# --- writing one user

NEW = {"id": 1338, **GRACE}
ONE_PUT = {"id": 1, **GRACE}


def put(item: Any, status: Any, has: Any = (), **more: Any) -> Row:
    return Row("PUT /api/user/1", status, has, body={"item": item}, **more)


def patch(item: Any, status: Any, has: Any = (), **more: Any) -> Row:
    return Row("PATCH /api/user/1", status, has, body={"item": item}, **more)


ONE = [
    post(GRACE, 201, (done(NEW), located("/api/user/1338"))),
    post({"id": 4, **GRACE}, 201, (done({"id": 4, **GRACE}), located("/api/user/4"))),
    post({"id": MAX_ID, **GRACE}, 201, {"results": [{"id": MAX_ID}]}),
    post({"id": 1, **GRACE}, 409, at("#/item/id")),
    post({"name": "A"}, 422, at("#/item/mail")),
    post({"mail": "a@b"}, 422, at("#/item/name")),
    post({}, 422, at("#/item/name", "#/item/mail")),
    post({"id": 5, "name": "", "mail": ""}, 422, at("#/item/name", "#/item/mail")),
    post(
        {"id": 0, "name": 1, "mail": "x", "age": 3},
        422,
        at("#/item/id", "#/item/name", "#/item/mail", "#/item/age"),
    ),
    post({**GRACE, "a/b~c d%ä": 1}, 422, at("#/item/a~1b~0c%20d%25%C3%A4")),
    post({**GRACE, "": 1}, 422, at("#/item/")),
    post({**GRACE, "phone": []}, 422, at("#/item/phone")),
    post({**GRACE, "Name": "x"}, 422, at("#/item/Name")),
    put(GRACE, 200, done(ONE_PUT)),
    put({"id": 1, **GRACE}, 200, done(ONE_PUT)),
    put({"id": 1.0, **GRACE}, 200, done(ONE_PUT)),
    put({"id": 2, **GRACE}, 422, at("#/item/id")),
    put({"id": "1", **GRACE}, 422, at("#/item/id")),
    put({"name": "A"}, 422, at("#/item/mail")),
    put({"mail": "a@b"}, 422, at("#/item/name")),
    put({"id": 2, "name": ""}, 422, at("#/item/id", "#/item/name", "#/item/mail")),
    put({**GRACE, "age": 1}, 422, at("#/item/age")),
    Row("PUT /api/user/99", 404, told("there is no user 99"), body={"item": GRACE}),
    Row("PUT /api/user/99", 422, body={"item": {"name": "A"}}),
    patch({"mail": "new@x"}, 200, done({**SIMONE, "mail": "new@x"})),
    patch({"name": "New"}, 200, done({**SIMONE, "name": "New"})),
    patch({"id": 1, "name": "New"}, 200, done({**SIMONE, "name": "New"})),
    patch(GRACE, 200, done(ONE_PUT)),
    patch({}, 200, done(SIMONE)),
    patch({"name": None}, 422, at("#/item/name")),
    patch({"name": "", "mail": None}, 422, at("#/item/name", "#/item/mail")),
    patch({"id": 2}, 422, at("#/item/id")),
    patch({"age": 1}, 422, at("#/item/age")),
    Row("PATCH /api/user/99", 404, body={"item": {"name": "New"}}),
    Row("DELETE /api/user/1", 200, exactly(**SUCCESS)),
    Row("DELETE /api/user/1337", 200, as_text('{"code": 0, "message": "SUCCESS"}')),
    Row("DELETE /api/user/99", 404),
]  # fmt: skip

ENVELOPES = [
    Row(f"{line}", 422, at("#"), body=body)
    for line in ("POST /api/user", "PUT /api/user/1", "PATCH /api/user/1")
    for body in (
        [],
        {},
        7,
        [{"item": GRACE}],
        GRACE,
        {"Item": GRACE},
        {"item": GRACE, "items": [GRACE]},
        {"item": GRACE, "more": 1},
    )
]
ENVELOPES += [
    raw(text, 422, at("#"), headers={AS: "application/json"})
    for text in ("null", "true", '"item"', "1")
]
ENVELOPES += [
    Row("PUT /api/user/1", 422, at("#"), body={"items": [{"id": 1, **GRACE}]}),
    Row("POST /api/user", 422, body={"item": [GRACE]}),
    Row("POST /api/user", 422, body={"item": None}),
    Row("POST /api/user", 422, body={"items": GRACE}),
    Row("POST /api/user", 422, bad_items(1), body={"items": [GRACE, 5]}),
]  # fmt: skip

# --- writing many

ADA = {"name": "Ada Lovelace", "mail": "ada@example.org"}
BAD = {"name": "", "mail": "x"}


def many(line: str, status: Any, has: Any, *items: Any) -> Row:
    return Row(line, status, has, body={"items": list(items)})


MANY = [
    many("POST /api/user", 201, done(NEW, {"id": 1339, **ADA}), GRACE, ADA),
    many("POST /api/user", 201, {"results": [{"id": 9}, {"id": 1338}]},
        {"id": 9, **ADA}, GRACE),
    many("POST /api/user", 422, bad_items(0, 2), BAD, GRACE, {"id": 0, **ADA}),
    many("POST /api/user", 409, bad_items(0, 2), SIMONE, GRACE, ZOE),
    many("POST /api/user", 422, bad_items(0, 1), {"id": 1, **ADA}, BAD, GRACE),
    many("POST /api/user", 422, among(2), {"id": 9, **ADA}, GRACE,
        {"id": 9.0, **GRACE}),
    many("PUT /api/user", 200, done(ONE_PUT, {"id": 3, **ADA}), ONE_PUT,
        {"id": 3, **ADA}),
    many("PUT /api/user", 422, at("#/items/1/id"), ONE_PUT, ADA),
    many("PUT /api/user", 422, among(1), ONE_PUT, {"id": 1, **ADA}),
    many("PUT /api/user", 422, among(1), {"id": 1337, **ADA}, {"id": 1337, **ADA}),
    many("PUT /api/user", 422, bad_items(0, 1), {"id": 1, **BAD},
        {"id": 2, "name": "A"}),
    many("PUT /api/user", 404, bad_items(1, 2), ONE_PUT, {"id": 98, **ADA},
        {"id": 99, **ADA}),
    many("PUT /api/user", 422, bad_items(0, 1), {"id": 99, **ADA}, {"id": 1, **BAD}),
    many(
        "PATCH /api/user",
        200,
        done({**SIMONE, "mail": "a@b"}, {**CHAN, "name": "Chan"}),
        {"id": 1, "mail": "a@b"},
        {"id": 3, "name": "Chan"},
    ),
    many("PATCH /api/user", 422, at("#/items/0/id"), {"name": "A"}),
    many("PATCH /api/user", 422, among(1), {"id": 1}, {"id": 1, "name": "A"}),
    many("PATCH /api/user", 404, bad_items(0), {"id": 99, "name": "A"}, {"id": 1}),
    many("PATCH /api/user", 422, bad_items(0, 1), {"id": 99}, {"id": 1, "name": None}),
    many("PUT /api/user", 422, at("#/items/0/age"), {**ONE_PUT, "age": 1}),
    Row("DELETE /api/user?id=1,3", 200, exactly(**SUCCESS)),
    Row("DELETE /api/user?id=1337", 200, exactly(**SUCCESS)),
    Row("DELETE /api/user?id=1,98,99", 404, ("98", "99", {"errors": [dict, dict]})),
    Row("DELETE /api/user?id=1,1", (400, 422)),
    Row("DELETE /api/user", 400, "id"),
    *[
        Row(f"DELETE /api/user?id={text}", 400, "id")
        for text in ("", "x", "1,x", "1,,3", "1;3", "-1", "1.0", "%EF%BC%91", ",", "1,")
    ],
    Row("DELETE /api/user?id=1&id=3", 400, "id"),
    Row("DELETE /api/user?ids=1", 400, "ids"),
]  # fmt: skip


# --- v2 and the sub-resources


def full(user: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A user as v2 shows it, but for its times."""
    return {**user, "phone": [], "address": [], "version": 1, **more}


def v2(line: str, status: Any, has: Any, **item: Any) -> Row:
    method, path = line.split(" ")
    return Row(f"{method} /api/v2/user{path}", status, has, body={"item": item})


LISTS = {"phone": [PHONE], "address": [ADDRESS]}
V2_NEW = full(NEW)
V2_PUT = full({"id": 3, **GRACE}, **LISTS, version=2)
TWO = [{"id": 1, **MOBILE}, {"id": 2, **MOBILE}]
ODD_TIMES = {"version": None, "created": 1, "updated": "never"}
V2 = [
    Row("GET /api/v2/user/3", 200, shows(full(CHAN, **LISTS))),
    Row("GET /api/v2/user", 200,
        shows(*[full(user, phone=list, address=list) for user in SEED])),
    Row("GET /api/v2/user/0", 200, shows(*[dict] * 4)),
    v2("POST ", 201, (shows(V2_NEW), located("/api/v2/user/1338")), **GRACE),
    v2("POST ", 201, shows({"phone": TWO}), **GRACE, phone=[MOBILE, MOBILE]),
    v2("POST ", 201, shows({"address": [{"id": 1, **OFFICE}]}), **GRACE,
        address=[OFFICE]),
    v2("POST ", 201, shows(V2_NEW), **GRACE, **ODD_TIMES),
    v2("POST ", 422, at("#/item/phone/1/number"), **GRACE,
        phone=[MOBILE, {"number": "1"}]),
    v2("POST ", 422, at("#/item/phone/0/number"), **GRACE, phone=[{}]),
    v2("POST ", 422, at("#/item/phone/0/x"), **GRACE, phone=[{**MOBILE, "x": 1}]),
    v2("POST ", 422, at("#/item/phone"), **GRACE, phone=MOBILE),
    v2("POST ", 422, at("#/item/phone/0"), **GRACE, phone=[1]),
    v2("POST ", 422, at("#/item/address/0/country"), **GRACE,
        address=[{**OFFICE, "country": "de"}]),
    v2("POST ", 422, at("#/item/age"), **GRACE, age=1),
    v2("PUT /3", 200, shows(V2_PUT), **GRACE),
    v2("PUT /3", 200, shows(V2_PUT), **GRACE, **ODD_TIMES),
    v2("PUT /3", 200, shows({**V2_PUT, "phone": []}), **GRACE, phone=[]),
    v2("PUT /3", 200, shows({**V2_PUT, "phone": TWO[1:]}), **GRACE, phone=[MOBILE]),
    v2("PUT /3", 200, shows({**V2_PUT, "phone": [PHONE, TWO[1]]}), **GRACE,
        phone=[PHONE, MOBILE]),
    v2("PUT /3", 422, (), **GRACE, phone=[PHONE, PHONE]),
    v2("PATCH /3", 200, shows(full({**CHAN, "name": "C"}, **LISTS, version=2)),
        name="C"),
    v2("PATCH /3", 200, shows(full(CHAN, phone=[PHONE], version=2)), address=[]),
    v2("PATCH /3", 200, shows({"phone": [], "address": [ADDRESS]}), phone=None),
    v2("PATCH /3", 200, shows({**CHAN, **LISTS}), version=99),
    many("PUT /api/v2/user", 200, shows(full(ONE_PUT, phone=TWO[:1], version=2)),
        {**ONE_PUT, "phone": [MOBILE]}),
    many("PATCH /api/v2/user", 422, at("#/items/0/phone/0/number"),
        {"id": 1, "phone": [{"number": "1"}]}),
    Row("DELETE /api/v2/user/3", 200, exactly(**SUCCESS)),
]  # fmt: skip


def one(line: str, status: Any, has: Any = (), **item: Any) -> Row:
    return Row(line, status, has, body={"item": item})


def sub_rows(sort: str, seeded: Any, item: Any, key: str) -> list[Row]:
    """Phones and addresses are the same operations twice."""
    line, first = f"/api/user/3/{sort}", f"/api/user/3/{sort}/1"
    no_user, labelled = f"/api/user/99/{sort}", {**seeded, "label": "x"}
    two, three = {"id": 2, **item}, {"id": 3, **item}
    broken = {"item": {**item, key: 5}}
    return [
        Row(f"GET {line}", 200, results(seeded)),
        Row(f"GET {first}", 200, results(seeded)),
        Row(f"GET /api/v2/user/3/{sort}/1", 200, results(seeded)),
        Row(f"GET /api/user/1/{sort}", 200, results()),
        Row(f"GET /api/user/1/{sort}/1", 404),
        Row(f"GET {line}/2", 404, told(f"there is no {sort} 2")),
        Row(f"GET {no_user}", 404),
        Row(f"GET {no_user}/1", 404),
        *[Row(f"GET {line}/{text}", 404) for text in NO_IDS],
        one(f"POST {line}", 201, (done(two), located(f"{line}/2")), **item),
        one(f"POST /api/v2/user/3/{sort}", 201, located(f"/api/v2/user/3/{sort}/2"),
            **item),
        one(f"POST {line}", 201, done({**item, "id": 7}), id=7, **item),
        one(f"POST {line}", 409, (at("#/item/id"), told("id is taken")), id=1, **item),
        one(f"POST {line}", 422, at("#/item/id"), id=0, **item),
        one(f"POST {no_user}", 404, **item),
        many(f"POST {line}", 201, done(two, three), item, item),
        many(f"POST {line}", 422, at(f"#/items/1/{key}"), item, {**item, key: 5}),
        many(f"POST {line}", 409, bad_items(1), item, {**item, "id": 1}),
        one(f"PUT {first}", 200, done({"id": 1, **item}), **item),
        one(f"PUT {first}", 422, at("#/item/id"), id=2, **item),
        one(f"PUT {first}", 422, label="x"),
        one(f"PUT {line}/2", 404, told(f"there is no {sort} 2"), **item),
        one(f"PUT {no_user}/1", 404, **item),
        many(f"PUT {no_user}", 404, told("there is no user 99"), {"id": 1, **item}),
        many(f"PUT {line}", 200, done({"id": 1, **item}), {"id": 1, **item}),
        many(f"PUT {line}", 404, bad_items(1), {"id": 1, **item}, two),
        many(f"PUT {line}", 422, (at("#/items/0/id"), told("id is required")), item),
        many(f"PUT {line}", 422, (at("#/items/1/id"), told("id stands twice")),
             {"id": 1, **item}, {"id": 1, **item}),
        many(f"PATCH {line}", 404, at("#/items/0/id", "#/items/2/id"),
             {"id": 2}, {"id": 1}, {"id": 3}),
        many(f"PATCH {line}", 422, at("#/items/0/id", "#/items/0/label"),
             {"id": 2, "label": 5}),
        many(f"PATCH {line}", 422, at("#/items/0/id", "#/items/1/id"),
             {"label": "x"}, {"id": 0, "label": "x"}),
        one(f"PATCH {first}", 422, at("#/item/id"), id=2),
        Row(f"PATCH {first}", 422, at("#/item"), body={"item": 5}),
        one(f"PATCH {first}", 200, done(labelled), label="x"),
        one(f"PATCH {first}", 422, at("#/item/x"), x=1),
        one(f"PATCH {first}", 422, at("#/item/id", "#/item/x"), id=None, x=None),
        one(f"PATCH {line}/2", 404, label="x"),
        many(f"PATCH {line}", 200, done(labelled), {"id": 1, "label": "x"}),
        Row(f"DELETE {first}", 200, exactly(**SUCCESS)),
        Row(f"DELETE {line}/2", 404),
        Row(f"DELETE {no_user}/1", 404, told("there is no user 99")),
        Row(f"DELETE {line}?id=1", 200, exactly(**SUCCESS)),
        Row(f"DELETE {line}?id=1,2", 404, {"errors": [
            {"parameter": "id", "detail": f"there is no {sort} 2"}]}),
        Row(f"DELETE {line}?id=4,5,6,7", 404, told(
            f"there is no {sort} 4, there is no {sort} 5, there is no {sort} 6")),
        Row(f"DELETE {line}?id=1,1", 422, {"errors": [
            {"parameter": "id", "detail": "1 stands twice"}]}),
        Row(f"DELETE {line}", 400, "id"),
        *[  # what is sent is told before what is there, and that before the version
            Row(f"{line_} /api/user/{place}", status, has, body=body,
                headers={"If-Match": '"9"'})
            for line_, place, status, has, body in (
                ("POST", f"99/{sort}", 422, at(f"#/item/{key}"), broken),
                ("POST", f"3/{sort}", 422, at(f"#/item/{key}"), broken),
                ("PUT", f"3/{sort}/2", 422, at(f"#/item/{key}"), broken),
                ("PUT", f"3/{sort}/2", 404, (), {"item": item}),
                ("PUT", f"3/{sort}/1", 412, (), {"item": item}),
                ("DELETE", f"3/{sort}/2", 404, (), None),
                ("DELETE", f"3/{sort}/1", 412, (), None),
            )
        ],
        Row(f"POST {line}", 415, "application/json", body="id",
            headers={AS: "text/csv"}),
        Row(f"GET {line}?format=csv", 400, "format"),
        Row(f"GET {line}", 406, headers={"Accept": "text/csv"}),
        Row(f"GET {line}?x=1", 400, "x"),
    ]  # fmt: skip


SUBS = sub_rows("phone", PHONE, MOBILE, "number")
SUBS += sub_rows("address", ADDRESS, OFFICE, "city")
SUBS += [
    one("POST /api/user/3/address", 422, at("#/item", "#/item/label"), label=5),
    one("PATCH /api/user/3/address/1", 422, at("#/item", "#/item/country"),
        street="", city=None, country="x"),
]  # fmt: skip

# --- media types

JSON_BODY = ITEM % ""
MEDIA = [
    raw(JSON_BODY, 201, headers={AS: "application/json"}),
    raw(JSON_BODY, 201),
    raw(JSON_BODY, 201, headers={AS: "Application/JSON"}),
    raw(JSON_BODY, 201, headers={AS: "application/json; charset=utf-8"}),
    raw('{"item": {"name": "ä", "mail": "a@b"}}', 201, "ä",
        headers={AS: "application/json;charset=latin-1"}),
    raw('{"item": {"name": "ä", "mail": "a@b"}}', 201, "ä",
        headers={AS: 'application/json; charset="utf-16"'}),
    raw(b'{"item": {"name": "\xe4", "mail": "a@b"}}', 400,
        headers={AS: "application/json;charset=latin-1"}),
    *[
        raw(JSON_BODY, 415, "application/json", headers={AS: kind})
        for kind in (
            "text/plain",
            "text/plain; charset=utf-8",
            "text/plain; application/json",
            "application/x-www-form-urlencoded",
            "multipart/form-data; boundary=x",
            "text/html",
            "application/xml",
            "application/merge-patch+json",
            "application/vnd.api+json",
            "application/jsonx",
            "application",
            "application/json, text/plain",
            "*/*",
        )
    ],
    *[
        Row(f"{method} /api/user/1", 415, "application/json", body=JSON_BODY,
            headers={AS: kind})
        for method in ("PUT", "PATCH")
        for kind in ("text/plain", "application/x-www-form-urlencoded", "image/png")
    ],
    Row("PUT /api/user/1", 415, body=JSON_BODY,
        headers={AS: "application/merge-patch+json"}),
    Row("PATCH /api/user/1", 200, body=JSON_BODY,
        headers={AS: "application/merge-patch+json"}),
    Row("PATCH /api/user/1", 200, body=JSON_BODY,
        headers={AS: "application/merge-patch+json;charset=x"}),
    Row("PATCH /api/user/1", 200, body=JSON_BODY),
    raw(JSON_BODY, 415, headers={"Content-Encoding": "gzip"}),
    raw(b"\x1f\x8b\x08\x00", 415, headers={"Content-Encoding": "gzip",
        AS: "application/json"}),
    raw(JSON_BODY, 415, headers={"Content-Encoding": "br", AS: "text/csv"}),
    Row("POST /api/user", 411),
    Row("PUT /api/user/1", 411),
    Row("PATCH /api/user/1", 411),
    Row("POST /api/user", 400, body=b""),
    raw(JSON_BODY, 413, options={"max_body": 30}),
    raw(JSON_BODY, 201, options={"max_body": len(JSON_BODY)}),
    Row("POST /api/user", 413, body={"items": [GRACE] * 4}, options={"max_items": 3}),
    Row("POST /api/user", 201, body={"items": [GRACE] * 3}, options={"max_items": 3}),
]  # fmt: skip

# --- reading on

ALL = [1, 2, 3, 1337]


def ids(*wanted: int):
    """The users shown, in this order."""

    def look(answer: Any) -> None:
        got = [user["id"] for user in json.loads(answer.body)["results"]]
        assert got == list(wanted)

    return look


def last_page(answer: Any) -> None:
    assert json.loads(answer.body)["next"] is None
    assert "Link" not in answer.headers


def more_pages(answer: Any) -> None:
    following = json.loads(answer.body)["next"]
    assert answer.headers["Link"] == f'<{following}>; rel="next"'
    assert following.isascii() and "/api/user?" in following.replace("/v2", "")


def read(query: str, status: Any, *has: Any, **more: Any) -> Row:
    return Row(f"GET /api/user?{query}", status, has, **more)


READING = [
    read("limit=2", 200, ids(1, 2), more_pages),
    read("limit=4", 200, ids(*ALL)),
    read("limit=5", 200, ids(*ALL), last_page),
    read("limit=1000", 200, ids(*ALL), last_page),
    Row("GET /api/user/0?limit=1", 200, ids(1)),
    Row("GET /api/user", 200, header("Link", None), ["next", "total"]),
    read("count=true", 200, ids(*ALL), {"total": 4}),
    read("count=true&limit=1", 200, ids(1), {"total": 4}, more_pages),
    read("count=true&q=example.org", 200, ids(2, 1337), {"total": 2}),
    read("count=false", 200, results(*SEED)),
    read("q=ZOË", 200, results(ZOE)),
    read("q=zOË m", 200, ids(2)),
    read("q=MÜLLER", 200, ids(2)),
    read("q=大", 200, ids(3)),
    read("q=SHITTYROBOTS", 200, ids(1)),
    read("q=e", 200, ids(*ALL)),
    read("q=example", 200, ids(2, 3, 1337)),
    *[read(f"q={text}", 200, results()) for text in ("%25", "_", "'", '"', "*", "\\")],
    read("q=nobody", 200, results()),
    read("q=%00", 200, results()),
    read("name=Zoë Müller", 200, results(ZOE)),
    read(unicodedata.normalize("NFD", "name=Zoë Müller"), 200, results(ZOE)),
    read("name=zoë müller", 200, results()),
    read("name=Zoë", 200, results()),
    read("mail=GIERTZ@ShittyRobots.LOC", 200, results(SIMONE)),
    read("mail=giertz", 200, results()),
    read("id=1337,1", 200, ids(1, 1337)),
    read("id=1,99", 200, ids(1)),
    read("id=99", 200, results()),
    read("id=1,2,3&q=zoë", 200, ids(2)),
    read("id=1,2&name=Simone Giertz&mail=giertz@shittyrobots.loc", 200, ids(1)),
    read("sort=id", 200, ids(*ALL)),
    read("sort=-id", 200, ids(1337, 3, 2, 1)),
    read("sort=name", 200, ids(1337, 1, 2, 3)),
    read("sort=-name", 200, ids(3, 2, 1, 1337)),
    read("sort=mail", 200, ids(3, 1, 1337, 2)),
    read("sort=-mail", 200, ids(2, 1337, 1, 3)),
    read("sort=created", 200, {"results": [SIMONE, dict, dict, dict]}),
    read("sort=name&q=example.org", 200, ids(1337, 2)),
    read("fields=id,name", 200, {"results": [dict] * 4}, "Simone",
        lacks=["mail", "giertz"]),
    read("fields=mail&id=1", 200, results({"mail": SIMONE["mail"]})),
    read("fields=id&id=1", 200, results({"id": 1})),
    Row("GET /api/user/1?fields=name", 200,
        (results({"name": SIMONE["name"]}), header("ETag", None))),
    Row("GET /api/v2/user/3?fields=phone,version", 200,
        results({"phone": [PHONE], "version": 1})),
    Row("GET /api/v2/user?fields=id,phone&id=3", 200,
        results({"id": 3, "phone": [PHONE]})),
]  # fmt: skip

BAD_QUERIES = {
    "limit": ["0", "1001", "-1", "x", "", "+1", "1.0", "1e2", "%EF%BC%91", "9" * 5000],
    "after": ["", "x", "=", "%00", "%FF", "a" * 5000, "bnVsbA", "W10", "eyJpZCI6MX0"],
    "count": ["maybe", "2", ""],
    "sort": ["", "phone", "-", "--name", "NAME", "user_name", "name;", "name desc"],
    "fields": ["", "phone", "id,phone", "version", "name,", "user_name", "*"],
    "id": ["", "x", "1,x", ",", "-1", "1.0", "%EF%BC%91", "9" * 5000],
    "format": ["", "xml", "CSVX", "text/csv"],
    "unknown": ["1"],
    "Limit": ["1"],
    "conflict": ["skip"],
}
BAD_READS = [
    read(f"{name}={text}", 400, name)
    for name, texts in BAD_QUERIES.items()
    for text in texts
]
BAD_READS += [
    read("limit=0", 400, told("limit is not a whole number from 1 to 1000")),
    read("count=2&format=xml", 400, told("2 parameters are not valid")),
    read("fields=phone", 400, told("fields is not one of id, name, mail")),
    read("count=2&fields=phone", 400, told("2 parameters are not valid")),
    read("limit=2&limit=2", 400, "limit"),
    read("q=a&q=b", 400, "q"),
    read("q=%FF", 400, "q"),
    read("name=%ED%A0%80", 400, "name"),
    read("limit", 400, "limit"),
    read("a=1&b=2", 400),
    Row("GET /api/user/1?limit=1", 400, "limit"),
    Row("GET /api/user/1?x=1", 400, "x"),
    Row("GET /api/user/1?fields=phone", 400, "fields"),
    Row("POST /api/user?x=1", 400, "x", body={"item": GRACE}),
    Row("PUT /api/user/1?x=1", 400, "x", body={"item": GRACE}),
    Row("PUT /api/user/1?dry_run=maybe", 400, "dry_run", body={"item": GRACE}),
    Row("DELETE /api/user/1?id=1", 400, "id"),
    Row("GET /api/user?dry_run=true", 400, "dry_run"),
    Row("POST /api/user?dry_run=true&dry_run=true", 400, body={"item": GRACE}),
    Row("GET /api/changes?x=1", 400, "x"),
    *(
        Row("GET /api/changes", 400, "Last-Event-ID", headers={"Last-Event-ID": text})
        for text in ("", "x", "-1", "9" * 16)
    ),
]  # fmt: skip

# --- formats

CSV_TEXT = "id,name,mail\r\n" + "".join(
    f"{user['id']},{user['name']},{user['mail']}\r\n" for user in SEED
)
NDJSON = "application/x-ndjson"


def kind(media: str):
    def look(answer: Any) -> None:
        assert answer.content_type == media

    return look


def ndjson(*wanted: Any):
    def look(answer: Any) -> None:
        lines = answer.body.decode().split("\n")
        assert lines.pop() == "", "every line ends"
        assert matches(list(wanted), [json.loads(line) for line in lines])

    return look


def not_json(answer: Any) -> None:
    assert answer.content_type in ("text/csv", NDJSON)


def accepting(accept: str, status: Any, *has: Any, line: str = "GET /api/user") -> Row:
    return Row(line, status, has, headers={"Accept": accept})


CSV_ANSWER = (kind("text/csv"), as_text(CSV_TEXT), header("Vary", "Accept"))
JSON_ANSWER = (kind("application/json"), results(*SEED), header("Vary", "Accept"))
ONE_CSV = as_text("id,name,mail\r\n1,Simone Giertz,giertz@shittyrobots.loc\r\n")
FORMATS = [
    Row("GET /api/user?format=csv", 200, CSV_ANSWER),
    Row("GET /api/v2/user?format=csv", 200, CSV_ANSWER),
    Row("GET /api/user/0?format=csv", 200, CSV_ANSWER),
    Row("GET /api/user?format=json", 200, JSON_ANSWER),
    Row("GET /api/user?format=ndjson", 200, (kind(NDJSON), ndjson(*SEED))),
    Row("GET /api/user?format=ndjson&id=3", 200, ndjson(CHAN), ["phone", "created"]),
    Row("GET /api/v2/user?format=ndjson&id=3", 200,
        ndjson(full(CHAN, phone=[PHONE], address=[ADDRESS], created=str, updated=str))),
    Row("GET /api/user/1?format=csv", 200, (ONE_CSV, header("ETag", None))),
    Row("GET /api/user/1?format=ndjson", 200, (ndjson(SIMONE), header("ETag", None))),
    Row("GET /api/user?format=csv&sort=-id&limit=1", 200,
        as_text("id,name,mail\r\n1337,Late Comer,late@example.org\r\n")),
    Row("GET /api/user?format=csv&limit=1", 200,
        header("Link", lambda link: 'rel="next"' in link)),
    Row("GET /api/user?format=csv&id=1&fields=name", 200,
        as_text("name\r\nSimone Giertz\r\n")),
    Row("GET /api/v2/user?format=csv&id=2&fields=id,phone", 200,
        as_text("id,phone\r\n2,[]\r\n")),
    Row("GET /api/user?format=csv&id=99", 200, as_text("id,name,mail\r\n")),
    Row("GET /api/user?format=ndjson&id=99", 200, as_text("")),
    accepting("text/csv", 200, *CSV_ANSWER),
    accepting("text/*", 200, *CSV_ANSWER),
    accepting("application/xml, text/csv;q=0.1", 200, *CSV_ANSWER),
    accepting("text/csv, application/json;q=0.5", 200, *CSV_ANSWER),
    accepting("text/csv;q=0.5, application/json", 200, *JSON_ANSWER),
    accepting("TEXT/CSV", 200, *CSV_ANSWER),
    accepting('text/csv;a="b\\";q=0,c"', 200, *CSV_ANSWER),
    accepting("application/json;q=0.5;a=b, text/csv", 200, *CSV_ANSWER),
    accepting("application/json;q=0, */*", 200, not_json),
    accepting(NDJSON, 200, kind(NDJSON), ndjson(*SEED)),
    accepting("application/json", 200, *JSON_ANSWER),
    accepting("*/*", 200, *JSON_ANSWER),
    accepting("application/*", 200, *JSON_ANSWER),
    accepting("text/html,application/xhtml+xml,*/*;q=0.8", 200, *JSON_ANSWER),
    accepting("text/csv", 200, *JSON_ANSWER, line="GET /api/user?format=json"),
    accepting("application/json", 200, *CSV_ANSWER, line="GET /api/user?format=csv"),
    accepting("application/xml", 200, *CSV_ANSWER, line="GET /api/user?format=csv"),
    accepting("application/xml", 406),
    accepting("image/*", 406),
    accepting("application/json;q=0, text/csv;q=0.0", 406),
    accepting("application/xml", 406, line="GET /api/user/1"),
    accepting("text/csv", 404, line="GET /api/user/99"),
    accepting("text/csv", 406, line="GET /api/user/3/phone"),
    accepting("application/xml", 406, line="GET /api/changes"),
]  # fmt: skip


TABLES = {
    "reads": READS,
    "versions": VERSIONS,
    "methods": METHODS,
    "one": ONE,
    "envelopes": ENVELOPES,
    "many": MANY,
    "v2": V2,
    "subs": SUBS,
    "media": MEDIA,
    "reading": READING,
    "bad-reads": BAD_READS,
    "formats": FORMATS,
}
ROWS = list(itertools.chain(*TABLES.values()))


@scenarios(**TABLES)
def test_operations(play, row):
    play(row)


# --- what holds for every row of the tables


def of_users(row: Row) -> bool:
    return row.line.split(" ")[1].startswith("/api/user")


@scenarios([row for row in ROWS if of_users(row)])
def test_v1_and_a_trailing_slash_mean_the_same(play, row):
    """`/api/v1/user/1/` answers as `/api/user/1` does: the same checks hold."""
    method, path = row.line.split(" ", 1)
    path, mark, query = path.replace("/api/user", "/api/v1/user").partition("?")
    wants = row.has if isinstance(row.has, tuple) else (row.has,)
    wants = tuple(want for want in wants if not speaks_of_its_uri(want))
    answer = play(row._replace(line=f"{method} {path}/{mark}{query}", has=wants))
    if "Location" in answer.headers:
        assert urlsplit(answer.headers["Location"]).path.startswith("/api/v1/user/")


def speaks_of_its_uri(want: Any) -> bool:
    return want is more_pages or "header." in getattr(want, "__qualname__", "")


@scenarios([row for row in ROWS if row.line.startswith("GET ")])
def test_head_is_get_without_its_body(play, row):
    head = play(row._replace(line=f"HEAD {row.line[4:]}", has=(), lacks=()))
    whole = play(row)
    assert head.status == whole.status
    assert sorted(head.headers.items()) == sorted(whole.headers.items())


WRITES = [
    row
    for row in ROWS
    if row.status in (200, 201) and row.line.startswith(("P", "DELETE"))
]


@scenarios(WRITES)
def test_a_dry_run_answers_as_the_write_would_and_keeps_nothing(play, row):
    mark = "&" if "?" in row.line else "?"
    dry = play(row._replace(line=f"{row.line}{mark}dry_run=true"))
    real = play(row)
    assert dry.status == real.status
    times = re.compile(rb'"(created|updated)": ?"[^"]*"')
    assert times.sub(b"", dry.body) == times.sub(b"", real.body)
    assert dry.headers.get("Location") == real.headers.get("Location")


# --- writes, as they are kept


def test_a_write_is_kept_and_is_a_version(client):
    before = client.users()[0]
    client("PUT /api/user/1", {"item": GRACE})
    after = client.users()[0]
    assert client("GET /api/user/1").json == {"results": [ONE_PUT]}
    assert (before["version"], after["version"]) == (1, 2)
    assert after["created"] == before["created"]
    assert parse_time(after["updated"]) >= parse_time(before["updated"])
    found = client("GET /api/user?q=HOPPER").json["results"]
    assert [user["id"] for user in found] == [1]
    assert client("GET /api/user?q=giertz").json == {"results": []}


def parse_time(text: str) -> datetime:
    """RFC 3339, in UTC."""
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)", text)
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def test_times_are_now_in_utc(client):
    client("POST /api/user", {"item": GRACE})
    user = client.users()[-1]
    now = datetime.now(timezone.utc)
    assert abs((now - parse_time(user["created"])).total_seconds()) < 120
    assert user["created"] == user["updated"]


def test_a_deleted_user_takes_everything_along(client):
    assert client("DELETE /api/user/3").status_int == 200
    for path in ("", "/phone", "/phone/1", "/address", "/address/1"):
        assert client(f"GET /api/user/3{path}").status_int == 404
    assert client("POST /api/user", {"item": CHAN}).status_int == 201
    for kind_ in ("phone", "address"):
        assert client(f"GET /api/user/3/{kind_}").json == {"results": []}


def test_bulk_delete_deletes_exactly_these(client):
    client("DELETE /api/user?id=3,1")
    assert [user["id"] for user in client.users()] == [2, 1337]


def test_the_id_after_the_last_is_a_409(client):
    assert client("POST /api/user", {"item": {"id": MAX_ID, **GRACE}}).status_int == 201
    assert client("POST /api/user", {"item": GRACE}).status_int == 409
    both = {"items": [{"id": 4, **ADA}, GRACE]}
    assert client("POST /api/user", both).status_int == 409
    assert client("GET /api/user/4").status_int == 404
    csv_type = {"Content-Type": "text/csv"}
    assert client("POST /api/user", "name,mail\nA,a@b\n", csv_type).status_int == 409
    assert client("DELETE /api/user/1").status_int == 200
    assert client("POST /api/user", {"item": {"id": 1, **GRACE}}).status_int == 201


def test_an_id_that_is_given_needs_none_left(client):
    """Another program may have used ids past the last."""
    sql = "INSERT INTO users (user_id, user_name, user_mail) VALUES (?, 'B', 'b@b')"
    run_sql(client.db, sql, 2**60)
    assert client("POST /api/user", {"item": GRACE}).status_int == 409
    assert client("POST /api/user", {"item": {"id": 4, **GRACE}}).status_int == 201


def test_the_last_id_of_all_may_be_counted(client):
    before_it = {"item": {"id": MAX_ID - 1, **GRACE}}
    assert client("POST /api/user", before_it).status_int == 201
    made = client("POST /api/user", {"item": GRACE})
    assert made.json["results"] == [{"id": MAX_ID, **GRACE}]
    assert client("POST /api/user", {"item": GRACE}).status_int == 409
    assert client.app.store.get_user(MAX_ID)["id"] == MAX_ID
    assert client(f"DELETE /api/user?id={MAX_ID}").status_int == 200


def test_a_bulk_may_mix_ids_given_and_counted(client):
    items = [GRACE, {"id": 1338, **ADA}, GRACE]
    answer = client("POST /api/user", {"items": items})
    if answer.status_int == 201:
        assert len({user["id"] for user in answer.json["results"]}) == 3
    else:
        assert answer.status_int in (409, 422) and len(client.users()) == 4


def test_what_was_read_can_be_sent_back(client):
    """PUT of a GET's answer changes no member, in v1 and in v2."""
    for version, user in itertools.product(("v1", "v2"), ALL):
        line = f"/api/{version}/user/{user}"
        before = client(f"GET {line}").json["results"][0]
        answer = client(f"PUT {line}", {"item": before})
        after = answer.json["results"][0]
        for name in ("version", "updated"):
            before.pop(name, None)
            after.pop(name, None)
        assert after == before


@pytest.mark.parametrize("kind_, item", [("phone", MOBILE), ("address", OFFICE)])
def test_numbers_are_stable_and_never_reused(client, kind_, item):
    line = f"/api/user/3/{kind_}"
    numbers = []
    for _ in range(3):
        made = client(f"POST {line}", {"item": item}).json["results"][0]["id"]
        numbers.append(made)
        assert client(f"DELETE {line}/{made}").status_int == 200
    client("PUT /api/v2/user/3", {"item": {**GRACE, kind_: []}})
    client("PUT /api/v2/user/3", {"item": {**GRACE, kind_: [item, item]}})
    numbers += [one["id"] for one in client(f"GET {line}").json["results"]]
    assert numbers == [2, 3, 4, 5, 6]
    assert client(f"POST /api/user/2/{kind_}", {"item": item}).json["results"] == [
        {"id": 1, **item}
    ]


@pytest.mark.parametrize("kind_, item", [("phone", MOBILE), ("address", OFFICE)])
def test_the_number_after_the_last_is_a_409(client, kind_, item):
    line = f"POST /api/user/3/{kind_}"
    assert client(line, {"item": {"id": MAX_ID, **item}}).status_int == 201
    assert client(line, {"item": item}).status_int == 409
    put_ = client("PUT /api/v2/user/3", {"item": {**GRACE, kind_: [item]}})
    assert put_.status_int == 409
    assert client(f"DELETE /api/user/3/{kind_}/{MAX_ID}").status_int == 200
    assert client(line, {"item": item}).status_int == 409
    assert client(line, {"item": {"id": 2, **item}}).status_int == 201


def test_a_user_has_a_thousand_phones_at_most(client):
    client("PATCH /api/v2/user/1", {"item": {"phone": [MOBILE] * 999}})
    assert client("POST /api/user/1/phone", {"item": MOBILE}).status_int == 201
    items = [{"id": 1, "label": "x"}]
    assert client("PATCH /api/user/1/phone", {"items": items}).status_int == 200
    refused = client("POST /api/user/1/phone", {"item": MOBILE})
    check(refused, Row("", 409, told("1000 are the most that a user has")))


@pytest.mark.parametrize("kind_, item", [("phone", MOBILE), ("address", OFFICE)])
def test_writing_a_sub_resource_is_a_version_of_its_user(client, kind_, item):
    line = f"/api/user/3/{kind_}"
    writes = [
        (f"POST {line}", {"item": item}),
        (f"PUT {line}/1", {"item": item}),
        (f"PATCH {line}/1", {"item": {"label": "x"}}),
        (f"PUT {line}", {"items": [{"id": 1, **item}]}),
        (f"PATCH {line}", {"items": [{"id": 1, "label": "y"}]}),
        (f"DELETE {line}/2", None),
        (f"DELETE {line}?id=1", None),
    ]
    for number, (request, body) in enumerate(writes):
        last = client.changes()[-1]["seq"]
        fresh = {"If-Match": f'"{1 + number}"'}
        assert client(request, body, {"If-Match": '"77"'}).status_int == 412
        answer = client(request, body, fresh)
        assert answer.status_int in (200, 201), request
        assert client.etag(3) == f'"{2 + number}"'
        assert not body or answer.headers["ETag"] == client.etag(3)
        (change,) = client.changes(since=last)
        assert (change["op"], change["user"]) == ("update", 3)
        assert kind_ in change["fields"]
    nobody = {"If-Match": '"1"'}
    missing = client(f"PUT /api/user/99/{kind_}/1", {"item": item}, nobody)
    assert missing.status_int == 404


# --- paging

CROWD = [
    {"name": name, "mail": mail}
    for name in ("Ada", "ada", "Zoë", "ZOË", "Straße", "STRASSE", "陳", "Éa", "éA", "z")
    for mail in ("same@example.org", "SAME@example.org", "b@x")
]
SORTS = ["id", "name", "mail", "created", "updated"]


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """Thirty users with ties in every order, and times apart; for reading only."""
    client = Client(tmp_path_factory.mktemp("crowd") / "users.db")
    text = "".join(
        json.dumps({**user, "created": stamp(n // 4), "updated": stamp(9 - n // 4)})
        + "\n"
        for n, user in enumerate(CROWD)
    )
    made = client("POST /api/v2/user", text, {"Content-Type": NDJSON})
    assert made.json["created"] == len(CROWD)
    yield client
    client.close()


def stamp(minute: int) -> str:
    return f"2024-02-29T12:{minute:02}:00Z"


def walk(client: Client, line: str) -> list[Any]:
    """All pages, as a client that only follows `next` sees them."""
    pages = []
    while line:
        page = client(f"GET {line}").json
        pages.append(page["results"])
        assert len(pages) < 100
        target = urlsplit(page["next"] or "")
        line = target.path + ("?" + target.query if target.query else "")
    return pages


def sort_key(sort: str, user: dict[str, Any]) -> Any:
    value = user[sort.lstrip("-")]
    return value.casefold() if isinstance(value, str) else value


@pytest.mark.parametrize("limit", [1, 7, 30])
@pytest.mark.parametrize("sort", [sign + name for name in SORTS for sign in ("", "-")])
def test_pages_of_every_order(crowd, sort, limit):
    whole = crowd(f"GET /api/v2/user?sort={sort}").json["results"]
    keys = [sort_key(sort, user) for user in whole]
    assert keys == sorted(keys, reverse=sort.startswith("-"))
    for _, ties in itertools.groupby(whole, lambda user: sort_key(sort, user)):
        numbers = [user["id"] for user in ties]
        assert numbers in (sorted(numbers), sorted(numbers)[::-1])
    pages = walk(crowd, f"/api/v2/user?sort={sort}&limit={limit}")
    assert list(itertools.chain(*pages)) == whole
    assert all(len(page) == limit for page in pages[:-1])


def test_a_page_has_no_more_than_its_limit_where_the_key_changes(crowd):
    found = crowd.app.store.find_users(sort="name", after=("ada", 1), limit=7)
    assert [user["name"].casefold() for user in found] == ["ada"] * 5 + ["strasse"] * 2


def test_pages_keep_filters_fields_and_version(crowd):
    for base in ("/api/user", "/api/v1/user", "/api/v2/user", "/api/user/0"):
        line = f"{base}?q=ADA&sort=-mail&fields=id,mail&limit=4&count=true"
        whole = crowd(f"GET {base}?q=ADA&sort=-mail&fields=id,mail").json["results"]
        assert list(itertools.chain(*walk(crowd, line))) == whole
        assert len(whole) == 6 and set(whole[0]) == {"id", "mail"}


def test_a_page_starts_where_the_last_ended_whatever_was_written(client):
    following = client("GET /api/user?sort=name&limit=2").json["next"]
    client("DELETE /api/user/1337")
    client("POST /api/user", {"item": {"name": "AAA", "mail": "a@b"}})
    target = urlsplit(following)
    page = client(f"GET {target.path}?{target.query}")
    assert [user["id"] for user in page.json["results"]] == [2, 3]


@pytest.mark.parametrize(
    "cursor",
    [
        '["id", "1", 1]',
        f'["id", {2**63}, 1]',
        '["id", true, true]',
        '["name", 1, 1]',
        r'["name", "\ud800", 1]',
        "[1, 1, 1]",
    ],
)
def test_a_cursor_that_was_made_up_is_refused(play, cursor):
    after = base64.urlsafe_b64encode(cursor.encode()).decode().rstrip("=")
    play(Row(f"GET /api/user?limit=1&after={after}", 400, "after"))


@pytest.mark.parametrize("other", ["", "&sort=id", "&sort=-name", "&sort=mail"])
def test_a_cursor_of_another_order_is_refused(client, other):
    following = client("GET /api/user?sort=name&limit=1").json["next"]
    cursor = re.search(r"[?&]after=([^&]*)", following).group(1)
    row = Row(f"GET /api/user?limit=1&after={cursor}{other}", 400, "after")
    check(client(row.line), row)
    assert client(f"GET /api/user?limit=1&sort=name&after={cursor}").status_int == 200


@REPEATABLE
@given(st.one_of(st.text(max_size=20), st.binary(max_size=20).map(base64.b64encode)))
def test_any_cursor_is_a_page_or_a_400(crowd, text):
    answer = crowd(f"GET /api/user?limit=3&after={quote(text, safe='')}")
    assert answer.status_int in (200, 400)


@REPEATABLE
@given(st.text(st.sampled_from("aAdÉéëßsS陳.@ %_'"), max_size=4))
def test_any_q(crowd, text):
    """`q` finds exactly the users whose folded name or mail holds it folded."""
    found = crowd(f"GET /api/user?q={quote(text, safe='')}")
    if not text:
        assert found.status_int in (200, 400)
        return
    wanted = [
        n
        for n, user in enumerate(CROWD, 1)
        if text.casefold() in user["name"].casefold()
        or text.casefold() in user["mail"].casefold()
    ]
    assert [user["id"] for user in found.json["results"]] == wanted


# --- concurrency


def tagged(line: str, name: str, value: str, status: Any, *has: Any) -> Row:
    body = None if line.startswith(("GET", "HEAD", "DEL")) else {"item": GRACE}
    return Row(line, status, has, body=body, headers={name: value})


ETAGS = [
    *[
        tagged(f"GET /api{version}/user/1", "If-None-Match", value, 304,
            header("ETag", '"1"'), as_text(""))
        for value in ('"1"', 'W/"1"', "*", '"7", "1"', '"7" ,W/"1"')
        for version in ("", "/v2")
    ],
    *[
        tagged("GET /api/user/1", "If-None-Match", value, 200, results(SIMONE))
        for value in ('"2"', '"11"', '""', 'W/"2"', 'w/"1"', 'W/ "1"')
    ],
    tagged("GET /api/user/99", "If-None-Match", "*", 404),
    tagged("HEAD /api/user/1", "If-None-Match", '"1"', 304),
    tagged("GET /api/user/1?format=csv", "If-None-Match", '"1"', 200, ONE_CSV),
    tagged("GET /api/user/1?fields=id", "If-None-Match", "*", 200, results({"id": 1})),
    *[
        tagged(f"{method} /api/user/1", "If-Match", value, 200)
        for method in ("PUT", "PATCH", "DELETE")
        for value in ('"1"', "*", '"9", "1"')
    ],
    *[
        tagged(f"{method} /api/user/1", "If-Match", value, 412)
        for method in ("PUT", "PATCH", "DELETE")
        for value in ('"2"', 'W/"1"', '"11"', '""', 'w/"1"', 'W/ "1"')
    ],
    tagged("PUT /api/user/1", "If-None-Match", '"1"', 412),
    tagged("DELETE /api/user/1", "If-None-Match", "*", 412),
    tagged("PUT /api/user/1", "If-None-Match", '"2"', 200),
    tagged("DELETE /api/user?id=1", "If-Match", '"2"', 400),
    tagged("POST /api/user", "If-Match", '"1"', 400),
    tagged("POST /api/user", "If-Match", "*", 201),
    tagged("PUT /api/user/1", "If-Match", "1", (400, 412)),
    tagged("PUT /api/user/1", "If-Match", '"' + "9" * 5000 + '"', 412),
    tagged("PUT /api/user/99", "If-Match", '"1"', (404, 412)),
    Row("PUT /api/user/1", 422, at("#/item/name", "#/item/mail"), body={"item": BAD},
        headers={"If-Match": '"2"'}),
]  # fmt: skip


@scenarios(ETAGS)
def test_etags(play, row):
    play(row)


def test_a_weak_etag_is_no_if_match(client):
    etag = client("GET /api/user").headers["ETag"]
    assert client("GET /api/user", None, {"If-None-Match": etag}).status_int == 304
    assert client("GET /api/user", None, {"If-Match": etag}).status_int == 412


def test_etags_rise_and_are_the_version(client):
    seen = []
    for name in ("A", "B", "C"):
        client("PATCH /api/user/1", {"item": {"name": name}})
        answer = client("GET /api/v2/user/1")
        assert answer.headers["ETag"] == f'"{answer.json["results"][0]["version"]}"'
        assert answer.headers["ETag"] == client.etag(1)
        seen.append(answer.json["results"][0]["version"])
    assert seen == [2, 3, 4]


@pytest.mark.parametrize("id", [3, 1337])
def test_an_etag_of_a_deleted_user_is_not_its_successors(client, id):
    """Someone was faster, and it is another user now that has the id."""
    etag, line = client.etag(id), f"/api/user/{id}"
    client(f"DELETE {line}")
    client("POST /api/user", {"item": {**CHAN, "id": id}})
    stale = client(f"PUT {line}", {"item": GRACE}, {"If-Match": etag})
    assert stale.status_int == 412
    fresh = {"If-Match": client.etag(id)}
    assert client(f"PUT {line}", {"item": GRACE}, fresh).status_int == 200


def test_a_new_user_is_version_1_wherever_its_id_stands(client):
    made = client("POST /api/v2/user", {"items": [{"id": 50, **GRACE}, GRACE]})
    assert [user["version"] for user in made.json["results"]] == [1, 1]


REQUIRED = [
    Row("PUT /api/user/1", 428, body={"item": GRACE}),
    Row("PATCH /api/user/1", 428, body={"item": GRACE}),
    Row("DELETE /api/user/1", 428),
    tagged("PUT /api/user/1", "If-Match", '"1"', 200),
    tagged("DELETE /api/user/1", "If-Match", "*", 200),
    tagged("DELETE /api/user/1", "If-Match", '"2"', 412),
    Row("GET /api/user/1", 200),
    Row("POST /api/user", 201, body={"item": GRACE}),
    many("PUT /api/user", 200, (), {"id": 1, **GRACE}),
    many("PATCH /api/user", 200, (), {"id": 1}),
    Row("DELETE /api/user?id=1", 200),
]  # fmt: skip


@scenarios([row._replace(options={"require_if_match": True}) for row in REQUIRED])
def test_if_match_may_be_required(play, row):
    play(row)


# --- retrying


def keyed(key: str) -> dict[str, str]:
    return {"Idempotency-Key": key}


RETRIES = [
    ("POST /api/user", {"item": GRACE}, {"item": ADA}),
    ("POST /api/v2/user", {"item": {**GRACE, "phone": [MOBILE]}}, {"item": GRACE}),
    ("POST /api/user", {"items": [GRACE, ADA]}, {"items": [GRACE]}),
    ("POST /api/user/3/phone", {"item": MOBILE}, {"item": {"number": "112"}}),
    ("POST /api/user/3/address", {"item": OFFICE}, {"item": {"city": "Ulm"}}),
]


@pytest.mark.parametrize("line, body, another", RETRIES)
def test_the_same_post_twice_is_done_once(client, line, body, another):
    first = client(line, body, keyed("k" * 255))
    after = snapshot(client)
    second = client(line, body, keyed("k" * 255))
    assert first.status_int == second.status_int == 201
    assert first.body == second.body
    assert first.headers.get("Location") == second.headers.get("Location")
    assert "Idempotency-Replayed" not in first.headers
    assert second.headers["Idempotency-Replayed"] == "true"
    assert snapshot(client) == after
    other = client(line, another, keyed("k" * 255))
    assert other.status_int == 422 and snapshot(client) == after
    assert client(line, body, keyed("other")).status_int == 201
    assert client(line, body).status_int == 201


def test_an_import_can_be_retried(client):
    as_csv = {"Content-Type": "text/csv", **keyed("import-1")}
    first = client("POST /api/user", "name,mail\nA,a@b\n", as_csv)
    second = client("POST /api/user", "name,mail\nA,a@b\n", as_csv)
    assert first.json == second.json and first.json["created"] == 1
    assert second.headers["Idempotency-Replayed"] == "true"
    assert len(client.users()) == 5


def test_answers_are_kept_for_retries_while_there_is_room(client, monkeypatch):
    monkeypatch.setattr(userapi, "RETRIES", 2000)

    def create(key: str) -> str:
        user = {"name": key * 30, "mail": "a@b"}
        items = {"items": [user] * (20 if key == "d" else 1)}
        answer = client("POST /api/user", items, keyed(key))
        assert answer.status_int == 201
        return answer.headers.get("Idempotency-Replayed", "false")

    assert [create(key) for key in "abc"] == ["false"] * 3
    assert [create(key) for key in "abc"] == ["true"] * 3
    assert create("d") == "false", "which takes all of it"
    assert [create(key) for key in "dabc"] == ["true"] + ["false"] * 3


def test_a_key_outlives_the_process(connect):
    client = connect()
    first = client("POST /api/user", {"item": GRACE}, keyed("k"))
    client.close()
    second = connect()("POST /api/user", {"item": GRACE}, keyed("k"))
    assert second.headers["Idempotency-Replayed"] == "true"
    assert second.body == first.body


def test_a_key_is_forgotten_after_a_day(client):
    for _ in range(2):
        answer = client("POST /api/user", {"item": GRACE}, keyed("k"))
        assert "Idempotency-Replayed" not in answer.headers
        run_sql(client.db, "UPDATE retries SET at = at - 86401")
    client("POST /api/user", {"item": GRACE}, keyed("l"))
    assert run_sql(client.db, "SELECT count(*) FROM retries") == [(1,)]


def test_a_key_counts_for_one_uri(client):
    for line in ("POST /api/user", "POST /api/v2/user"):
        answer = client(line, {"item": GRACE}, keyed("k"))
        assert "Idempotency-Replayed" not in answer.headers
    assert len(client.users()) == 6


def test_a_key_counts_for_one_actor(connect, db, capfd):
    named = add_token(capfd, db, "ada")
    client = connect(token=TOKEN)
    for token in (TOKEN, named):
        answer = client(
            "POST /api/user", {"item": GRACE}, {**bearer(token), **keyed("k")}
        )
        assert answer.status_int == 201
        assert "Idempotency-Replayed" not in answer.headers


def test_a_refusal_is_not_kept_under_a_key(client):
    taken = {"item": {"id": 1, **GRACE}}
    assert client("POST /api/user", taken, keyed("k")).status_int == 409
    client("DELETE /api/user/1")
    answer = client("POST /api/user", taken, keyed("k"))
    assert answer.status_int == 201
    assert "Idempotency-Replayed" not in answer.headers


def test_a_dry_run_is_not_kept_under_a_key(client):
    dry = client("POST /api/user?dry_run=true", {"item": GRACE}, keyed("k"))
    assert dry.status_int in (400, 422) and len(client.users()) == 4
    assert client("POST /api/user", {"item": GRACE}, keyed("k")).status_int == 201
    assert len(client.users()) == 5


@pytest.mark.parametrize("key", ["", "k" * 256, "a b", "a\tb", "ä", "a\x7f"])
def test_keys_that_are_none(play, key):
    play(post(GRACE, (400, 422), headers=keyed(key)))


def test_the_same_key_at_once_is_done_once(client):
    line, body = "POST /api/user", {"item": GRACE}
    answers = at_once(6, lambda _: client(line, body, keyed("k")))
    assert {answer.status_int for answer in answers} == {201}
    assert len({answer.body for answer in answers}) == 1
    assert len(client.users()) == 5


# --- changes


def test_every_write_leaves_its_change(client):
    last = client.changes()[-1]["seq"]
    client("POST /api/v2/user", {"item": {**GRACE, "phone": [MOBILE]}})
    client("PATCH /api/user/1338", {"item": {"mail": "new@x"}})
    client("PUT /api/user", {"items": [{"id": 1, **ADA}, {"id": 2, **ADA}]})
    client("DELETE /api/user/1338")
    client("DELETE /api/user?id=1,2")
    changes = client.changes(since=last)
    assert [(one["op"], one["user"]) for one in changes] == [
        ("create", 1338),
        ("update", 1338),
        ("update", 1),
        ("update", 2),
        ("delete", 1338),
        ("delete", 1),
        ("delete", 2),
    ]
    for change in changes:
        assert set(change) == {"seq", "at", "actor", "op", "user", "fields"}
        assert change["actor"] is None and isinstance(change["fields"], list)
        assert parse_time(change["at"])
    numbers = [change["seq"] for change in changes]
    assert numbers == sorted(set(numbers)) and numbers[0] > last
    assert {"name", "mail", "phone"} <= set(changes[0]["fields"])
    assert changes[1]["fields"] == ["mail"]
    same = {"name": CHAN["name"], "mail": "new@x", "phone": [PHONE], "address": []}
    client("PUT /api/v2/user/3", {"item": same})
    assert client.changes()[-1]["fields"] == ["mail", "address"]
    client("PATCH /api/user/3/phone/1", {"item": {"label": PHONE["label"]}})
    assert client.changes()[-1]["fields"] == []
    client("PATCH /api/user/3/phone/1", {"item": {"label": "new"}})
    assert client.changes()[-1]["fields"] == ["phone"]
    text = client("GET /api/changes").text
    assert not [
        value for value in ("Grace", "Ada", "new@x", "1234567") if value in text
    ]


def test_a_long_log_is_read_to_what_was_its_end(client, monkeypatch):
    monkeypatch.setattr(userapi, "PAGE_ROWS", 3)
    changes = client.changes()
    environ = webtest.TestRequest.blank("/api/changes").environ
    environ["REMOTE_ADDR"] = "127.0.0.1"
    pieces = iter(client.app(environ, lambda *start: None))
    text = next(pieces)
    for _ in range(3):
        client("POST /api/user", {"item": ADA})
    assert json.loads(text + b"".join(pieces)) == {"results": changes}
    assert len(client.changes()) == 7


def test_an_import_leaves_its_changes(client):
    last = client.changes()[-1]["seq"]
    text = "id,name,mail\n1,A,a@b\n2,B,b@c\n5,C,c@d\n"
    line = "POST /api/user?conflict=replace"
    client(line, text, {"Content-Type": "text/csv"})
    changes = client.changes(since=last)
    assert sorted((one["user"], one["op"]) for one in changes) == [
        (1, "update"),
        (2, "update"),
        (5, "create"),
    ]
    client("POST /api/user", "name,mail\nA,a@b\nB,b@c\n", {AS: "text/csv"})
    told_ = [(one["user"], one["op"], one["fields"]) for one in client.changes()[-2:]]
    fields = ["name", "mail"]
    assert told_ == [(1338, "create", fields), (1339, "create", fields)]


CHANGES = [
    Row("GET /api/changes", 200, {"results": [dict] * 4}, "next"),
    Row("GET /api/v2/changes", 200, {"results": [dict] * 4}),
    Row("GET /api/changes?since=0", 200, {"results": [dict] * 4}),
    Row("GET /api/changes?since=3", 200, {"results": [{"seq": 4}]}),
    Row("GET /api/changes?since=4", 200, {"results": []}),
    Row("GET /api/changes?limit=2", 200,
        {"results": [{"seq": 1}, {"seq": 2}], "next": str}),
    Row("GET /api/changes?limit=5", 200, {"results": [dict] * 4, "next": None}),
    *[
        Row(f"GET /api/changes?since={text}", 400, "since")
        for text in ("", "x", "-1", "1.0", "%EF%BC%91", "9" * 5000)
    ],
    *[Row(f"GET /api/changes?limit={text}", 400, "limit") for text in ("0", "1001",
        "x")],
    Row("GET /api/changes?since=1&since=2", 400, "since"),
    Row("HEAD /api/changes", 200),
]  # fmt: skip


@scenarios(CHANGES)
def test_changes(play, row):
    play(row)


def test_changes_are_read_page_by_page(client):
    for number in range(20):
        client("PATCH /api/user/1", {"item": {"name": f"N{number}"}})
    pages = walk(client, "/api/changes?limit=7")
    assert [len(page) for page in pages] == [7, 7, 7, 3]
    numbers = [change["seq"] for page in pages for change in page]
    assert numbers == list(range(1, 25))


def test_the_log_is_bounded_and_says_what_is_gone(connect):
    client = connect(keep_changes=10)
    for number in range(30):
        client("PATCH /api/user/1", {"item": {"name": f"N{number}"}})
    if not POSTGRESQL:
        run_sql(client.db, "UPDATE users SET user_name = 'Foreign'")
    client("DELETE /api/user/1")
    changes = client.changes()
    oldest = changes[0]["seq"]
    foreign = 0 if POSTGRESQL else 4
    assert len(changes) == 10 and changes[-1]["seq"] == 4 + 30 + foreign + 1
    assert client(f"GET /api/changes?since={oldest - 1}").json["results"] == changes
    for since in (0, oldest - 2):
        row = Row(f"GET /api/changes?since={since}", 410, str(oldest))
        check(client(row.line), row)


@of_files("a store of a class of its own")
def test_a_log_that_is_cut_while_it_is_read_is_told_whole_or_is_a_410(connect):
    other, names = connect(keep_changes=2), [{"item": {"name": n}} for n in "ABCDE"]

    class Read(userapi.Store):
        """Whenever it has read, another process has written."""

        def rows(self, sql: str, values: Any = ()) -> Any:
            found = super().rows(sql, values)
            for name in names:
                other("PATCH /api/user/1", name)
            return found

    with contextlib.closing(Read(str(other.db))) as store:
        told = [seq for _, seq in store.changes(2, 100)]
    assert told[0] == 3, "a gap"


def test_the_last_of_many_changes_of_one_request_are_kept(connect):
    client = connect(keep_changes=3)
    made = client("POST /api/v2/user", {"items": [GRACE] * 9}).json["results"]
    items = [{"id": user["id"], "name": f"N{user['id']}"} for user in made]
    assert client("PATCH /api/user", {"items": items}).status_int == 200
    log = client("GET /api/changes").json["results"]
    assert [change["user"] for change in log] == [user["id"] for user in made[-3:]]
    assert [change["seq"] for change in log] == [20, 21, 22]


# --- server-sent events


class Stream:
    """A stream of events, read as a WSGI server reads it: ours, or another."""

    def __init__(
        self, client: Client, query: str = "", ours: bool = False, **headers: str
    ) -> None:
        environ = webtest.TestRequest.blank("/api/changes" + query).environ
        environ["REMOTE_ADDR"] = "127.0.0.1"
        environ["HTTP_ACCEPT"] = "text/event-stream"
        environ.update({"userapi.server": True} if ours else {})
        for name, value in headers.items():
            environ[f"HTTP_{name.upper()}"] = value
        self.text = ""
        self.answer = client.app(environ, self.start)
        self.chunks = iter(self.answer)

    def start(self, status: str, headers: Any, exc_info: Any = None) -> None:
        self.status, self.headers = status, dict(headers)

    def read(self, count: int) -> list[Any]:
        """The next events: (id, event, data)."""
        deadline, events = time.monotonic() + 30, []
        while len(events) < count:
            while "\n\n" not in self.text:
                assert time.monotonic() < deadline
                chunk = next(self.chunks)
                assert isinstance(chunk, bytes)
                self.text += chunk.decode()
            block, self.text = self.text.split("\n\n", 1)
            event = self.parse(block)
            events += [event] if event else []
        return events

    @staticmethod
    def parse(block: str) -> Any:
        lines = [line.partition(": ") for line in block.split("\n")]
        found = {name: value for name, _, value in lines if name and ":" not in name}
        return (
            (int(found["id"]), json.loads(found["data"])) if "data" in found else None
        )

    def close(self) -> None:
        if hasattr(self.answer, "close"):
            self.answer.close()


@pytest.fixture
def stream():
    with contextlib.ExitStack() as stack:

        def stream(*args: Any, **headers: str) -> Stream:
            return stack.enter_context(contextlib.closing(Stream(*args, **headers)))

        yield stream


def test_events_begin_with_the_log_and_go_on_with_what_comes(client, connect, stream):
    one = stream(client)
    events = one.read(4)
    assert one.status.startswith("200")
    assert one.headers["Content-Type"].startswith("text/event-stream")
    assert one.headers["X-Content-Type-Options"] == "nosniff"
    assert [number for number, _ in events] == [1, 2, 3, 4]
    assert [change for _, change in events] == client.changes()
    client("DELETE /api/user/1")
    connect()("DELETE /api/user/2")
    connect(open=True)("DELETE /api/user/3")
    events = one.read(3)
    assert [(number, change["user"]) for number, change in events] == [
        (5, 1),
        (6, 2),
        (7, 3),
    ]
    assert [change for _, change in events] == client.changes(since=4)


@pytest.mark.parametrize(
    "query, headers, first",
    [
        ("", {}, 1),
        ("?since=2", {}, 3),
        ("", {"last_event_id": "3"}, 4),
        ("?since=1", {"last_event_id": "3"}, 4),
    ],
)
def test_events_resume(client, stream, query, headers, first):
    assert stream(client, query, **headers).read(1)[0][0] == first


def test_streams_are_told_the_same_each_from_its_place(client, stream):
    first, late, other = (stream(client, f"?since={seq}") for seq in (4, 2, 4))
    client("DELETE /api/user/1")
    assert first.read(1) == other.read(1) == late.read(3)[2:]
    client("DELETE /api/user/2")
    assert late.read(1) == first.read(1)
    client("DELETE /api/user/3")
    assert [seq for seq, _ in other.read(2)] == [6, 7]


def test_events_older_than_the_log_are_a_410(connect, stream):
    client = connect(keep_changes=2)
    for number in range(5):
        client("PATCH /api/user/1", {"item": {"name": f"N{number}"}})
    old = stream(client, last_event_id="1")
    assert old.status.startswith("410")
    old = stream(client, "?since=0")
    assert old.status.startswith("410")


def test_a_reader_that_fell_behind_the_log_is_not_told_half_of_it(connect, stream):
    """Its stream ends; the next request, with the same id, is the 410."""
    client = connect(keep_changes=2)
    one = stream(client, "?since=2")
    assert [number for number, _ in one.read(2)] == [3, 4]
    for number in range(5):
        client("PATCH /api/user/1", {"item": {"name": f"N{number}"}})
    assert b"id:" not in b"".join(one.chunks)
    assert stream(client, last_event_id="4").status.startswith("410")


def test_a_silent_stream_says_that_it_lives(client, stream, monkeypatch):
    monkeypatch.setattr(userapi, "HEARTBEAT", 0)
    one = stream(client, "?since=4")
    chunks = list(itertools.islice(one.chunks, 3))
    assert chunks[0] == b"retry: 1000\n\n"
    assert chunks[1].startswith(b":") and chunks[1].endswith(b"\n\n")
    client("DELETE /api/user/1")
    assert one.read(1)[0][0] == 5


def test_under_another_server_a_stream_gives_its_thread_back(
    client, stream, monkeypatch
):
    monkeypatch.setattr(userapi, "TURN", 0)
    one = stream(client)
    assert [number for number, _ in one.read(4)] == [1, 2, 3, 4]
    assert list(itertools.islice(one.chunks, 3)) in ([], [b""])
    again = stream(client, last_event_id="4")
    assert list(itertools.islice(again.chunks, 3)) == [b"retry: 1000\n\n", b""]


def test_a_stream_outlives_a_database_that_does_not_answer(client, stream):
    one = stream(client, "?since=3", ours=True)
    assert one.read(1)[0][0] == 4
    run_sql(client.db, "ALTER TABLE changes RENAME TO gone")
    assert next(one.chunks) == b""
    run_sql(client.db, "ALTER TABLE gone RENAME TO changes")
    client("DELETE /api/user/1")
    assert one.read(1)[0][0] == 5


def test_a_last_event_id_that_is_none_is_refused(client, stream):
    assert stream(client, last_event_id="x").status.startswith("400")


# --- importing

SENT_CSV, SENT_NDJSON = {AS: "text/csv"}, {AS: NDJSON}


def counts(created: int = 0, replaced: int = 0, skipped: int = 0):
    return exactly(**SUCCESS, created=created, replaced=replaced, skipped=skipped)


def csv_in(text: Any, status: Any, *has: Any, query: str = "", **more: Any) -> Row:
    line = f"POST /api/user{query}"
    return Row(line, status, has, body=text, headers=SENT_CSV, **more)


def ndjson_in(*items: Any, status: Any, has: Any = (), query: str = "") -> Row:
    text = "".join(
        (item if isinstance(item, str) else json.dumps(item)) + "\n" for item in items
    )
    line = f"POST /api/v2/user{query}"
    return Row(line, status, has, body=text, headers=SENT_NDJSON)


def lines(*numbers: int):
    """The problem's errors stand on these lines of the file."""

    def look(answer: Any) -> None:
        problem = json.loads(answer.body)
        assert sorted({error["line"] for error in problem["errors"]}) == list(numbers)
        assert problem["total"] >= len(numbers)
        assert all(isinstance(error["pointer"], str) for error in problem["errors"])

    return look


MADE = (200, 201)
CONFLICTS = "id,name,mail\n1,Other,o@x\n9,New,n@x\n"
IMPORTS = [
    csv_in("id,name,mail\r\n5,Grace,g@x\r\n,Ada,a@x\r\n", MADE, counts(created=2)),
    csv_in("name,mail\nGrace,g@x\n", MADE, counts(created=1)),
    csv_in("mail,id,name\ng@x,5,Grace", MADE, counts(created=1)),
    csv_in('\ufeffid,name,mail\n\n5,"Hopper, Grace",g@x\n\n\n', MADE,
        counts(created=1)),
    csv_in('name,mail\n"a ""b"" c",g@x\n', MADE, counts(created=1)),
    csv_in("id,name,mail\n", MADE, counts()),
    csv_in("id,name,mail\n5,Grace,g@x\n,,nope\n7,A,b@c\n0,A,b@c\n", 422, lines(3, 5)),
    csv_in('id,name,mail\n5,"Ada\n",g@x\n6,A,a@b\n7,,a@b\n', 422, lines(5)),
    csv_in("\nid,name,mail\n\n\n5,,g@x\n", 422, lines(5)),
    csv_in("id,name,mail\n5,A\n", 422, lines(2)),
    csv_in("id,name,mail\n5,A,a@b,c\n", 422, lines(2)),
    csv_in("id,name,mail,phone\n5,A,a@b,1\n", 422, lines(1)),
    csv_in("id,name,mail,mail\n5,A,a@b,a@b\n", 422, lines(1)),
    csv_in("id,name\n5,A\n", 422),
    csv_in("", (400, 422)),
    csv_in("id,name,mail\n5,A,a@b\n5,B,b@c\n", 422, among(3)),
    csv_in("id,name,mail\n1338,A,a@b\n1338,B,b@c\n", 422, among(3)),
    csv_in("id,name,mail\n５,A,a@b\n", 422, lines(2)),
    csv_in("id,name,mail\n 5,A,a@b\n", 422, lines(2)),
    csv_in(b"id,name,mail\n5,\xe4,a@b\n", 400),
    csv_in('id,name,mail\n5,"A,a@b\n', (400, 422)),
    csv_in(CONFLICTS, 409, lines(2)),
    csv_in(CONFLICTS, 409, lines(2), query="?conflict=fail"),
    csv_in(f"id,name,mail\n{'0' * 5000}1,A,a@b\n", 409, lines(2)),
    csv_in(CONFLICTS, MADE, counts(created=1, skipped=1), query="?conflict=skip"),
    csv_in(CONFLICTS, MADE, counts(created=1, replaced=1), query="?conflict=replace"),
    csv_in(CONFLICTS, MADE, counts(1, 1), query="?conflict=replace&dry_run=true"),
    csv_in("id,name,mail\n1337,A,a@b\n", MADE, counts(0, 1), query="?conflict=replace"),
    csv_in(CONFLICTS, 409, lines(2), query="?dry_run=true"),
    csv_in(CONFLICTS, 400, "conflict", query="?conflict=maybe"),
    csv_in("id,name,mail\n1,,o@x\n", 422, lines(2), query="?conflict=skip"),
    csv_in("id,name,mail\n5,A,a@b\n", 413, options={"max_body": 20}),
    csv_in("name,mail\n" + "A,a@b\n" * 4, 413, options={"max_items": 3}),
    csv_in("name,mail\n" + "A,a@b\n" * 3, MADE, options={"max_items": 3}),
    csv_in("name,mail\n" + "x" * 200_000 + ",a@b\n", 422, lines(2)),
    csv_in("name,mail\nA\0B,a@b\n", 422, lines(2)),
    csv_in("name,mail\nA,a@b\n1234567,a@b\n", 409, lines(3),
        options={"unique_mail": True}),
    csv_in("name,mail\nA,a@b\nB,A@b\n", MADE, counts(1, 0, 1), query="?conflict=skip",
        options={"unique_mail": True}),
    ndjson_in({"id": 5, **GRACE}, ADA, status=MADE, has=counts(created=2)),
    ndjson_in({**GRACE, "phone": [MOBILE]}, status=MADE, has=counts(created=1)),
    ndjson_in("", GRACE, "  ", status=MADE, has=counts(created=1)),
    ndjson_in(GRACE, BAD, ADA, {**ADA, "age": 1}, status=422, has=lines(2, 4)),
    ndjson_in(GRACE, "{", status=422, has=lines(2)),
    ndjson_in(GRACE, "[]", "5", status=422, has=lines(2, 3)),
    ndjson_in('{"name": "A", "name": "A", "mail": "a@b"}', status=422, has=lines(1)),
    ndjson_in('{"name": NaN, "mail": "a@b"}', status=422, has=lines(1)),
    ndjson_in({**GRACE, "phone": [{"number": "1"}]}, status=422, has=lines(1)),
    ndjson_in({**GRACE, "created": stamp(5), "updated": stamp(6)}, status=MADE),
    ndjson_in({**GRACE, "created": "yesterday"}, status=422, has=lines(1)),
    ndjson_in({**GRACE, "updated": 5}, status=422, has=lines(1)),
    ndjson_in({**GRACE, "version": 77}, status=MADE, has=counts(created=1)),
    ndjson_in(SIMONE, status=409, has=lines(1)),
    ndjson_in(SIMONE, GRACE, status=MADE, has=counts(1, 0, 1), query="?conflict=skip"),
    ndjson_in(SIMONE, status=MADE, has=counts(0, 1), query="?conflict=replace"),
    ndjson_in({"id": 5, **GRACE}, {"id": 5, **ADA}, status=422, has=among(2)),
    *[ndjson_in(*[GRACE] * 1000, {"id": 1338, **ADA}, status=422,
        has=(lines(1001), told("id stands twice")), query=f"?conflict={how}")
        for how in ("fail", "skip", "replace")],
    Row("POST /api/user", 422, lines(1), body='{"name":"A","mail":"a@b","phone":[]}\n',
        headers=SENT_NDJSON),
    Row("POST /api/user", MADE, counts(1),
        body=b"\xef\xbb\xbf" + json.dumps(GRACE).encode(), headers=SENT_NDJSON),
    Row("POST /api/user", (400, 422), body=b"\xff\n", headers=SENT_NDJSON),
    Row("PUT /api/user", 415, body="id,name,mail\n", headers=SENT_CSV),
    Row("PATCH /api/user/1", 415, body="id,name,mail\n", headers=SENT_CSV),
]  # fmt: skip


@scenarios(IMPORTS)
def test_imports(play, row):
    play(row)


#: (sent, kept): RFC 3339 with any offset, kept in UTC.
TIMES = [
    ("2024-02-29T12:00:00Z", "2024-02-29T12:00:00+00:00"),
    ("2024-02-29T12:00:00.5Z", "2024-02-29T12:00:00.500+00:00"),
    ("2024-02-29T12:00:00.123987Z", "2024-02-29T12:00:00.123+00:00"),
    (f"2024-02-29T12:00:00.{'9' * 30}Z", "2024-02-29T12:00:00.999+00:00"),
    ("2024-02-29T12:00:00+05:30", "2024-02-29T06:30:00+00:00"),
    ("2023-12-31T23:00:00-02:00", "2024-01-01T01:00:00+00:00"),
    ("1969-07-20T20:17:40Z", "1969-07-20T20:17:40+00:00"),
]
BAD_TIMES = ["", "yesterday", "2024-02-30T12:00:00Z", "2024-02-29", "2024-02-29T12:00Z"]
BAD_TIMES += [
    "2024-02-29T12:00:00",
    "2024-02-29T25:00:00Z",
    "2024-02-29T12:00:00+24:00",
]
BAD_TIMES += [
    "2024-02-29T12:00:00+14:60",
    "2024-02-29T24:00:00Z",
    "2016-12-31T23:59:60Z",
]
BAD_TIMES += ["2024-13-01T12:00:00Z", "24-02-29T12:00:00Z", "２024-02-29T12:00:00Z", 0]
BAD_TIMES += ["2024-02-29T12:00:00Z\n", "0000-01-01T00:00:00Z", None, 1709208000, []]


@pytest.mark.parametrize("sent, kept", TIMES)
def test_times_of_an_import_are_kept_in_utc(client, sent, kept):
    text = json.dumps({"id": 5, **GRACE, "created": sent, "updated": sent})
    assert client("POST /api/v2/user", text, SENT_NDJSON).status_int in MADE
    user = client("GET /api/v2/user/5").json["results"][0]
    assert parse_time(user["created"]) == datetime.fromisoformat(kept)
    assert parse_time(user["updated"]) == datetime.fromisoformat(kept)


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="no zone to set there")
def test_a_time_in_utc_is_the_same_wherever_the_host_stands(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        kept = userapi.check_time("2024-02-29T12:00:00Z")
    time.tzset()
    assert kept == "2024-02-29T12:00:00.000Z"


@pytest.mark.parametrize("sent", BAD_TIMES)
def test_what_is_no_time_is_refused(play, sent):
    text = json.dumps({**GRACE, "updated": sent})
    play(ndjson_in(text, status=422, has=lines(1)))


def test_an_import_names_all_bad_lines_up_to_a_hundred(play):
    good, bad = "A,a@b\n", ",a@b\n"
    answer = play(csv_in("name,mail\n" + (good + bad) * 250, 422))
    assert answer.json["total"] == 250
    assert [error["line"] for error in answer.json["errors"]] == list(range(3, 203, 2))


def test_a_header_of_many_columns_is_told_up_to_a_hundred(play):
    answer = play(csv_in("x," * 2000 + "\n", 422, lines(1)))
    assert answer.json["total"] == 2003 and len(answer.json["errors"]) == 100


@pytest.mark.parametrize("write", [csv_text, ndjson_text])
def test_an_id_stands_twice_however_far_apart(client, write):
    """Far enough for it to be read and checked with others."""
    ids = [*range(2001, 4001), 2001, 4000, 3000]
    text = write([{"id": id, **GRACE} for id in ids])
    media = "text/csv" if write is csv_text else NDJSON
    answer = client("POST /api/user", text, {AS: media})
    first = 2 if write is csv_text else 1
    twice = lines(*(first + place for place in (2000, 2001, 2002)))
    check(answer, Row("", 422, twice))


def test_an_import_keeps_what_it_should(client):
    """Times for a user that is new, no version, the numbers of phones as they were."""
    phone = {"id": 4, **MOBILE}
    times = {"created": stamp(1), "updated": "2024-02-29T13:02:00+01:00"}
    new = {"id": 5, **GRACE, "phone": [phone], "version": 700, **times}
    old = {**CHAN, "name": "Chan", "created": stamp(3), "version": 70}
    text = json.dumps(new) + "\n" + json.dumps(old) + "\n"
    before = client.users()[2]
    answer = client("POST /api/v2/user?conflict=replace", text, SENT_NDJSON)
    assert (answer.json["created"], answer.json["replaced"]) == (1, 1)
    users = {user["id"]: user for user in client.users()}
    assert users[5]["phone"] == [phone] and users[5]["version"] < 700
    assert parse_time(users[5]["created"]) == parse_time(stamp(1))
    assert parse_time(users[5]["updated"]) == parse_time(stamp(2))
    assert users[3]["created"] == before["created"]
    assert (users[3]["name"], users[3]["version"]) == ("Chan", 2)
    assert users[3]["phone"] == [PHONE]
    more = client("POST /api/user/5/phone", {"item": MOBILE})
    assert more.json["results"][0]["id"] == 5


def test_csv_replaces_name_and_mail_and_nothing_else(client):
    text = "id,name,mail\n3,Chan,c@x\n"
    client("POST /api/user?conflict=replace", text, SENT_CSV)
    user = client.users()[2]
    assert (user["name"], user["mail"], user["version"]) == ("Chan", "c@x", 2)
    assert (user["phone"], user["address"]) == ([PHONE], [ADDRESS])


@pytest.mark.parametrize(
    "version, kind_", [("v1", "csv"), ("v1", "ndjson"), ("v2", "ndjson")]
)
def test_out_in_and_out_again_is_the_same(client, tmp_path, version, kind_):
    client("POST /api/user", {"items": [{"name": n, "mail": m} for n, m in CELLS]})
    line = f"/api/{version}/user"
    first = client(f"GET {line}?format={kind_}").body
    other = Client(tmp_path / "other.db")
    sent = {"csv": SENT_CSV, "ndjson": SENT_NDJSON}[kind_]
    assert other(f"POST {line}", first, sent).json["created"] == 4 + len(CELLS)
    assert other(f"GET {line}?format={kind_}").body == first
    other.close()


#: Names and mails that a spreadsheet would run, or that a CSV reader could lose.
CELLS = [
    ("=1+1", "=1+1@example.org"),
    ("+49", "+tag@example.org"),
    ("-5", "-x@example.org"),
    ("@SUM(A1)", "a@b"),
    ("'=1", "'=a@example.org"),
    ("''=1", "''a@b"),
    ("'quoted'", "'a'@example.org"),
    ('say "hi", twice', "a@b"),
    ("a,b;c\u2028d", "a@b"),
    ("'", "a@b"),
    ("null", "a@b"),
    ("\u200b=1", "a@b"),
]


def test_an_import_keeps_and_refuses_the_same_values(client):
    """All good ones in one file, with what they become; each bad one by its line."""
    good = [{"name": sent, "mail": "a@b"} for sent, _ in NAMES]
    good += [{"name": "A", "mail": mail} for mail in MAILS]
    text = "".join(json.dumps(item) + "\n" for item in good)
    made = client("POST /api/user", text, SENT_NDJSON)
    assert made.json["created"] == len(good)
    users = client("GET /api/user").json["results"][4:]
    assert [user["name"] for user in users[: len(NAMES)]] == [kept for _, kept in NAMES]
    assert [user["mail"] for user in users[len(NAMES) :]] == MAILS
    bad = [{"name": name, "mail": "a@b"} for name in BAD_NAMES + NOT_TEXTS]
    bad += [{"name": "A", "mail": mail} for mail in BAD_MAILS + NOT_TEXTS]
    bad += [{"id": number, **GRACE} for number in BAD_IDS]
    text = "".join(json.dumps(GRACE) + "\n" + json.dumps(item) + "\n" for item in bad)
    row = Row("", 422, lines(*range(2, 2 * len(bad) + 1, 2)))
    assert len(bad) <= 100
    check(client("POST /api/user", text, SENT_NDJSON), row)
    assert len(client.users()) == 4 + len(good)


def test_a_csv_of_one_line_keeps_and_refuses_the_same_values(client):
    """Each in a file of its own, as lines that are all plain go another way."""

    def post_csv(name: str, mail: str) -> int:
        text = csv_text([{"name": name, "mail": mail}])
        return client("POST /api/user", text, SENT_CSV).status_int

    good = [(sent, "a@b") for sent, _ in NAMES] + [("A", mail) for mail in MAILS]
    assert {post_csv(*cells) for cells in good} == {201}
    users = client("GET /api/user").json["results"][4:]
    assert [user["name"] for user in users[: len(NAMES)]] == [kept for _, kept in NAMES]
    assert [user["mail"] for user in users[len(NAMES) :]] == MAILS
    bad = [(name, "a@b") for name in BAD_NAMES] + [("A", mail) for mail in BAD_MAILS]
    assert {post_csv(*cells) for cells in bad} == {422}
    assert post_csv("Straße", "a@b") == 201
    assert client("GET /api/user?q=STRASSE").json["results"][0]["name"] == "Straße"


def test_formula_cells_are_defused(client):
    client("POST /api/user", {"items": [{"name": n, "mail": m} for n, m in CELLS]})
    text = client("GET /api/user?format=csv").body.decode()
    rows = list(csv.reader(io.StringIO(text, newline="")))[5:]
    assert [row[1:] for row in rows] == [[csv_cell(n), csv_cell(m)] for n, m in CELLS]


def test_a_prefix_is_taken_off_where_one_was_put(client):
    text = "name,mail\n'=1+1,'+a@b\n''=1,a@b\n'x,a@b\n=2,a@b\n"
    assert client("POST /api/user", text, SENT_CSV).json["created"] == 4
    names = [user["name"] for user in client.users()[4:]]
    assert names == ["=1+1", "'=1", "'x", "=2"]
    assert client.users()[4]["mail"] == "+a@b"


@REPEATABLE
@given(
    st.lists(
        st.text(st.one_of(st.sampled_from("'=+-@\",; "), CHARS), min_size=1, max_size=8)
        .map(kept_name)
        .filter(bool),
        min_size=1,
        max_size=4,
    )
)
def test_any_name_goes_through_csv(scratch, names):
    """Read by another reader it is what was put in; read by us it is the name."""
    text = csv_text([{"name": name, "mail": "a@b"} for name in names])
    before = {user["id"] for user in scratch.users()}
    made = scratch("POST /api/user", text, SENT_CSV)
    assert made.json["created"] == len(names)
    new = [user["id"] for user in scratch.users() if user["id"] not in before]
    wanted = ",".join(map(str, new))
    got = scratch(f"GET /api/user?id={wanted}").json["results"]
    assert [user["name"] for user in got] == names
    text = scratch(f"GET /api/user?id={wanted}&format=csv").body.decode()
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert [row[1] for row in rows[1:]] == [csv_cell(name) for name in names]
    scratch(f"DELETE /api/user?id={wanted}")


def test_an_import_of_columns_and_of_lines_are_the_same(client, tmp_path):
    """What is looked at all at once (never where mails must be unique) is kept and
    refused as what is looked at one by one."""
    slow = Client(tmp_path / "slow.db", unique_mail=True)
    texts = [kept for _, kept in NAMES] + [sent for sent, _ in NAMES]
    texts += [name for name in BAD_NAMES if isinstance(name, str)]
    for number, (name, mail) in enumerate([(n, "a@b") for n in texts] + CELLS):
        mail = f"{number}{mail}"
        text = csv_text([{"name": name, "mail": mail}]).encode("utf-8", "replace")
        one, two = (each("POST /api/user", text, SENT_CSV) for each in (client, slow))
        assert (one.status_int, one.json) == (two.status_int, two.json), name
    client(
        "DELETE /api/user?id="
        + ",".join(str(user["id"]) for user in client.users()[:4])
    )
    for query in ("sort=name", "q=o\u0308", "q=%2B"):
        line = f"GET /api/v2/user?fields=name,mail,phone,version&{query}"
        assert client(line).json == slow(line).json
    slow.close()


def test_an_id_of_columns_stands_twice_in_a_later_line(client, monkeypatch):
    monkeypatch.setattr(userapi, "BATCH", 2)
    text = "id,name,mail\n10,A,a@b\n11,B,b@b\n12,C,c@b\n10,D,d@b\n11,E,\n"
    row = Row("", 422, lines(5, 6))
    check(client("POST /api/user", text, SENT_CSV), row)
    assert len(client.users()) == 4
    made = client("POST /api/user", text[: text.index("10,D")], SENT_CSV)
    assert made.json["created"] == 3


@REPEATABLE
@given(st.binary(max_size=60), st.sampled_from(["text/csv", NDJSON]))
def test_any_import_is_an_answer(scratch, body, media):
    line = "POST /api/user?dry_run=true"
    for text in (body, b"name,mail\n" + body):
        assert scratch(line, text, {AS: media}).status_int in (200, 201, 400, 422)


# ------------------------------------------------------------------------------------
# Application: the guard
# ------------------------------------------------------------------------------------


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def basic(token: str, user: str = "anyone") -> dict[str, str]:
    pair = base64.b64encode(f"{user}:{token}".encode()).decode()
    return {"Authorization": f"Basic {pair}"}


def add_token(capfd: Any, db: Any, name: str, *flags: str) -> str:
    """`token add`, and the token that it shows once."""
    status, out, _ = run_main(capfd, "token", "add", name, "--db", str(db), *flags)
    assert status == 0
    return max(re.findall(r"[\w.~+/=-]+", out), key=len)


@pytest.fixture(scope="session")
def guarded(template, tmp_path_factory):
    """A client on the template with three named tokens, one of them revoked."""
    path = database(tmp_path_factory.mktemp("guarded") / "users.db", template)

    def run(*argv: str) -> str:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert main(["token", *argv, "--db", str(path)]) == 0
        return max(out.getvalue().split() or [""], key=len)

    tokens = {"ada": run("add", "ada"), "rob": run("add", "rob", "--read-only")}
    tokens["old"] = run("add", "old")
    run("revoke", "old")
    client = Client(path, token=TOKEN)
    yield client, tokens
    client.close()


SAFE = ("GET", "HEAD", "OPTIONS")
#: Who asks, and what becomes of it: (of reads, of writes), None where it gets through.
WHO = {
    "none": (401, 401),
    "wrong": (401, 401),
    "empty": (401, 401),
    "revoked": (401, 401),
    "read-only": (None, 403),
    "read-only by Basic": (None, 403),
    "admin": (None, None),
    "admin by Basic": (None, None),
    "the setting": (None, None),
    "the setting by Basic": (None, None),
    "wrong by Basic": (401, 401),
}


def credentials(who: str, tokens: dict[str, str]) -> dict[str, str]:
    token = {
        "wrong": "x" * 43,
        "empty": "",
        "revoked": tokens["old"],
        "read-only": tokens["rob"],
        "admin": tokens["ada"],
        "the setting": TOKEN,
    }.get(who.replace(" by Basic", ""))
    if token is None:
        return {}
    return basic(token) if "Basic" in who else bearer(token)


def every_operation() -> list[str]:
    """A request line for each operation of the module, in each version: a new one
    cannot be forgotten."""
    found = set()
    for operation in userapi.OPERATIONS:
        path = re.sub("<id:id>|{id}", "3", re.sub("<n:id>|{n}", "1", operation.path))
        assert not re.search("[<{]", path)
        versioned = path.startswith(("/user", "/changes"))
        for base in ("/api", "/api/v1", "/api/v2") if versioned else ("",):
            methods = [operation.method, "OPTIONS"]
            methods += ["HEAD"] if operation.method == "GET" else []
            found |= {f"{method} {base}{path}" for method in methods}
    return sorted(found)


@pytest.mark.parametrize("number, line", [*enumerate(every_operation())])
def test_every_operation_asks_who_is_there(guarded, number, line):
    client, tokens = guarded
    peer = f"192.0.2.{number}"  # so that none is slowed
    safe = line.startswith(SAFE)
    body = {"item": GRACE} if line.startswith("P") else None
    sent = line if safe else line + "?dry_run=true"
    for who, refusals in WHO.items():
        answer = client(sent, body, credentials(who, tokens), REMOTE_ADDR=peer)
        expected = refusals[0 if safe else 1]
        if line.endswith(" /health"):
            assert answer.status_int in (200, 204)
        elif expected:
            check(answer, Row(line, expected, lacks=["Simone", "giertz", TOKEN]))
        else:
            assert answer.status_int in (200, 201, 204, 400, 422), who
        if answer.status_int == 401:
            schemes = " ".join(answer.headers.getall("WWW-Authenticate"))
            assert "Bearer" in schemes and "Basic" in schemes


UNAUTHORIZED = [
    Row("GET /api/user/1", 401, headers={"Authorization": value})
    for value in (
        TOKEN,
        "Bearer",
        f"Bearer  x{TOKEN}",
        f"Token {TOKEN}",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN.upper()}",
        "Basic",
        "Basic !!!",
        "Basic " + base64.b64encode(TOKEN.encode()).decode(),
        "Basic " + base64.b64encode(f"{TOKEN}:".encode()).decode(),
        "Basic " + base64.b64encode(b"a:\xff\xfe").decode(),
        f"Bearer ä{TOKEN}",
        "Digest username=x",
    )
]
UNAUTHORIZED += [
    Row(line, 401)
    for line in (
        "GET /",
        "GET /docs",
        "GET /openapi.json",
        "GET /postman.json",
        "GET /metrics",
        "GET /api/changes",
        "GET /api/v3/user",
        "GET /nothing/here",
        "OPTIONS /api/user",
        "BREW /api/user",
        "POST /api/user/1",
        f"GET /api/user/1?token={TOKEN}",
        f"GET /api/user/1?access_token={TOKEN}",
    )
]
UNAUTHORIZED += [
    Row("GET /health", 200, exactly(status="ok")),
    Row("GET /health", 200, exactly(status="ok"), headers=bearer("wrong")),
    Row("GET /api/user/1", 200, headers={"Authorization": f"bearer {TOKEN}"}),
    Row("GET /api/user/1", 200, headers=basic(TOKEN, "")),
    Row("GET /api/user/1", 200, headers={**bearer(TOKEN), "Host": "users.example"}),
    Row("GET /api/user/1", 200, headers=bearer(TOKEN),
        environ={"REMOTE_ADDR": "8.8.8.8"}),
    Row("GET /api/v3/user", 404, headers=bearer(TOKEN)),
]  # fmt: skip


@scenarios([row._replace(options={"token": TOKEN}) for row in UNAUTHORIZED])
def test_with_a_token_everything_needs_one(play, row):
    play(row)


def test_a_revoked_token_is_nobody_at_once(connect, db, capfd):
    ada, bob = add_token(capfd, db, "ada"), add_token(capfd, db, "bob")
    one, two = connect(), connect()
    for client in (one, two):
        assert client("GET /api/user/1", headers=bearer(ada)).status_int == 200
    assert run_main(capfd, "token", "revoke", "ada", "--db", str(db))[0] == 0
    for client in (one, two):
        assert client("GET /api/user/1", headers=bearer(ada)).status_int == 401
        assert client("GET /api/user/1", headers=bearer(bob)).status_int == 200
    assert run_main(capfd, "token", "revoke", "bob", "--db", str(db))[0] == 0
    assert one("GET /api/user/1").status_int == 200, "no token: this host again"


def test_a_revoked_token_ends_its_stream(connect, db, capfd, stream):
    ada, bob = add_token(capfd, db, "ada"), add_token(capfd, db, "bob", "--read-only")
    client = connect(headers=bearer(ada))
    one = stream(client, authorization=f"Bearer {bob}")
    one.read(4)
    assert run_main(capfd, "token", "revoke", "bob", "--db", str(db))[0] == 0
    client("DELETE /api/user/1")
    assert b"id:" not in b"".join(itertools.islice(one.chunks, 3))


def test_a_token_made_while_it_runs_counts_at_once(client, db, capfd):
    assert client("GET /api/user/1").status_int == 200
    token = add_token(capfd, db, "ada")
    assert client("GET /api/user/1").status_int == 401
    assert client("GET /api/user/1", headers=bearer(token)).status_int == 200


def test_the_actor_is_the_tokens_name(connect, db, capfd):
    ada = add_token(capfd, db, "ada")
    client = connect(headers=bearer(TOKEN), token=TOKEN)
    client("PATCH /api/user/1", {"item": {"name": "A"}})
    client("PATCH /api/user/1", {"item": {"name": "B"}}, bearer(ada))
    client("PATCH /api/user/1", {"item": {"name": "C"}}, basic(ada, "mallory"))
    actors = [change["actor"] for change in client.changes()]
    assert actors == [None, None, None, None, "admin", "ada", "ada"]
    assert ada not in client("GET /api/changes").text
    ((name, *_, used),) = client.app.store.tokens()
    assert name == "ada" and used


@of_files("its file")
def test_no_token_is_kept_in_clear(connect, db, capfd):
    token = add_token(capfd, db, "ada")
    client = connect(headers=bearer(token), token=TOKEN)
    client("PATCH /api/user/1", {"item": {"name": "B"}})
    client.close()
    for file in db.parent.iterdir():
        assert token.encode() not in file.read_bytes()
        assert TOKEN.encode() not in file.read_bytes()


def test_wrong_tokens_are_slowed_and_a_right_one_always_passes(connect):
    client = connect(token=TOKEN)

    def status(headers: Any, address: str = "10.1.1.1") -> int:
        answer = client("GET /api/user/1", headers=headers, REMOTE_ADDR=address)
        if answer.status_int == 429:
            assert 0 < int(answer.headers["Retry-After"]) <= 60
        return answer.status_int

    assert [status({}) for _ in range(15)] == [401] * 15
    assert [status(bearer(f"no{n}")) for n in range(12)] == [401] * 10 + [429] * 2
    assert status(basic("no")) == 429
    assert status(bearer(TOKEN)) == 200
    assert status(basic(TOKEN)) == 200
    assert status(bearer("no")) == 429
    assert status({}) == 401
    assert status(bearer("no"), "10.1.1.2") == 401


# --- this host only, and the Host header

LOCAL_HOSTS = ["localhost", "localhost:8080", "LOCALHOST:80", "127.0.0.1", "[::1]"]
LOCAL_HOSTS += ["127.0.0.1:8080", "127.9.8.7", "[::1]:8080"]
FOREIGN_HOSTS = ["evil.com localhost", "evil.com", "evil.com:8080"]
FOREIGN_HOSTS += ["localhost.evil.com", "evil.com.", "1.1.1.1", "127.0.0.1.evil.com"]
FOREIGN_HOSTS += ["127.0.0.1.nip.io:80", "192.168.1.5", "[::2]", "localhost@evil.com"]
FOREIGN_HOSTS += ["evil.com#localhost", "evil.com/localhost", "xlocalhost"]
FOREIGN_HOSTS += ["localhostx", "localhost,evil.com", "[::ffff:1.1.1.1]"]
FOREIGN_HOSTS += ["127.0.0.1@evil.com:80", "evil.com:localhost", "[::1"]

HOSTS = [Row("GET /api/user/1", 200, headers={"Host": host}) for host in LOCAL_HOSTS]
HOSTS += [
    Row("GET /api/user/1", (400, 403), lacks="Simone", headers={"Host": host})
    for host in FOREIGN_HOSTS
]
HOSTS += [
    Row("GET /api/user/1", 403, headers={"Host": "evil.com"}),
    Row("GET /", 403, headers={"Host": "evil.com"}),
    Row("DELETE /api/user/1", 403, headers={"Host": "evil.com"}),
    Row("GET /openapi.json", 403, headers={"Host": "evil.com"}),
    *[
        Row("GET /api/user/1", 200, environ={"REMOTE_ADDR": address})
        for address in ("127.0.0.1", "127.3.4.5", "::1", "::ffff:127.0.0.1")
    ],
    *[
        Row("GET /api/user/1", 403, "token", "Simone", environ={"REMOTE_ADDR": address})
        for address in ("10.0.0.1", "192.168.1.5", "::2", "::ffff:8.8.8.8", "128.0.0.1")
    ],
    Row("GET /api/user/1", 403, environ={"REMOTE_ADDR": "8.8.8.8"},
        headers={"X-Forwarded-For": "127.0.0.1", "Forwarded": "for=127.0.0.1"}),
    Row("GET /api/user/1", 403, headers={"Host": "evil.com",
        "X-Forwarded-Host": "localhost"}),
    Row("GET /api/user/1", 200, headers={"Host": "device.lan"},
        options={"allow_host": "device.lan"}),
    Row("GET /api/user/1", 200, headers={"Host": "device.lan:8080"},
        options={"allow_host": "device.lan"}),
    Row("GET /api/user/1", 200, headers={"Host": "b.lan"},
        options={"allow_host": "a.lan,b.lan"}),
    Row("GET /api/user/1", 200, options={"allow_host": "device.lan"}),
    Row("GET /api/user/1", 403, headers={"Host": "evil.com"},
        options={"allow_host": "device.lan"}),
    Row("GET /api/user/1", 403, headers={"Host": "x.device.lan"},
        options={"allow_host": "device.lan"}),
    Row("GET /api/user/1", 403, environ={"REMOTE_ADDR": "10.0.0.1"},
        options={"allow_host": "localhost"}),
    Row("GET /api/user/1", 200, environ={"REMOTE_ADDR": "10.0.0.1"},
        options={"open": True}),
    Row("GET /api/user/1", 200, headers={"Host": "evil.com"}, options={"open": True}),
    Row("GET /api/user/1", 200, headers={**bearer(TOKEN), "Host": "a.lan"},
        options={"token": TOKEN, "allow_host": "a.lan"}),
    Row("GET /api/user/1", 403, headers={**bearer(TOKEN), "Host": "evil.com"},
        options={"token": TOKEN, "allow_host": "a.lan"}),
]  # fmt: skip


@scenarios(HOSTS)
def test_without_a_token_it_is_this_host_only(play, row):
    play(row)


# --- other sites

SITES = [None, "same-origin", "none", "same-site", "cross-site", "nonsense"]
ORIGINS = {
    None: True,
    "http://localhost:8080": True,
    "https://localhost:8080": True,
    "http://localhost": False,
    "http://localhost:8081": False,
    "http://localhost:80801": False,
    "http://localhost.evil.com:8080": False,
    "https://evil.com": False,
    "null": False,
    "": False,
    "localhost:8080": False,
    "http://localhost:8080@evil.com": False,
    "http://[::1/": False,
}
FRIEND = "https://friend.example"
WRITING = {
    "POST /api/user": GRACE,
    "PUT /api/user/1": GRACE,
    "PATCH /api/user/1": GRACE,
    "DELETE /api/user/1": None,
    "POST /api/user/3/phone": MOBILE,
    "DELETE /api/user?id=1": None,
}


def from_site(site: str | None, origin: str | None, **more: str) -> dict[str, str]:
    headers = {"Host": "localhost:8080", "Sec-Fetch-Site": site, "Origin": origin}
    return {name: value for name, value in headers.items() if value is not None} | more


@pytest.mark.parametrize("line", WRITING)
@pytest.mark.parametrize("site", SITES)
def test_writes_from_another_site_are_refused(play, line, site):
    body = WRITING[line] and {"item": WRITING[line]}
    dry = line + ("&" if "?" in line else "?") + "dry_run=true"
    for origin, fits in ORIGINS.items():
        good = fits if site is None else site in ("same-origin", "none")
        status: Any = (200, 201) if good else 403
        if origin == "" and site is None:
            status = (200, 201, 403)  # no browser sends it
        play(Row(dry, status, body=body, headers=from_site(site, origin)))


@pytest.mark.parametrize("site", SITES)
def test_reads_from_another_site_pass_without_leave_to_look(play, site):
    """The browser keeps the answer from the page: no CORS header says otherwise."""
    for origin in ORIGINS:
        has = header("Access-Control-Allow-Origin", None)
        play(Row("GET /api/user/1", 200, has, headers=from_site(site, origin)))


FORMS = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]


@pytest.mark.parametrize("media", FORMS)
@pytest.mark.parametrize("line", [line for line in WRITING if line[:3] != "DEL"])
def test_no_form_can_write(play, line, media):
    body = json.dumps({"item": WRITING[line]})
    play(Row(line, 415, body=body, headers={AS: media, "Host": "localhost"}))


PREFLIGHT = {
    "Access-Control-Request-Method": "DELETE",
    "Access-Control-Request-Headers": "authorization,content-type,if-match",
}


def test_cors_for_the_origins_that_it_names(connect):
    client = connect(cors=FRIEND, token=TOKEN)
    there = {"Origin": FRIEND, "Sec-Fetch-Site": "cross-site"}
    allowed = client("OPTIONS /api/user/1", headers={**there, **PREFLIGHT})
    assert allowed.status_int == 204
    assert allowed.headers["Access-Control-Allow-Origin"] == FRIEND
    assert "DELETE" in allowed.headers["Access-Control-Allow-Methods"]
    names = allowed.headers["Access-Control-Allow-Headers"].lower()
    sent = {"authorization", "content-type", "if-match", "last-event-id"}
    assert sent <= set(re.split(", *", names))
    assert "Origin" in allowed.headers["Vary"]
    read_ = client("GET /api/user/1", headers={**there, **bearer(TOKEN)})
    assert read_.status_int == 200
    assert read_.headers["Access-Control-Allow-Origin"] == FRIEND
    assert "Origin" in read_.headers["Vary"] and "Accept" in read_.headers["Vary"]
    exposed = read_.headers["Access-Control-Expose-Headers"].lower()
    assert "etag" in exposed and "location" in exposed and "link" in exposed
    refused = client("GET /api/user/1", headers=there)
    assert refused.status_int == 401
    written = client("DELETE /api/user/1", headers={**there, **bearer(TOKEN)})
    assert written.status_int == 200


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.com",
        "null",
        FRIEND + ".evil.com",
        "http://friend.example",
        FRIEND + ":444",
    ],
)
def test_cors_for_nobody_else(connect, origin):
    client = connect(cors=FRIEND, token=TOKEN)
    there = {"Origin": origin, "Sec-Fetch-Site": "cross-site"}
    for line, headers in (
        ("OPTIONS /api/user/1", {**there, **PREFLIGHT}),
        ("GET /api/user/1", {**there, **bearer(TOKEN)}),
        ("DELETE /api/user/1", {**there, **bearer(TOKEN)}),
    ):
        answer = client(line, headers=headers)
        assert "Access-Control-Allow-Origin" not in answer.headers
        if line.startswith("DELETE"):
            assert answer.status_int == 403


def test_without_cors_a_preflight_gets_nothing(connect):
    client = connect()
    answer = client("OPTIONS /api/user/1", headers={"Origin": FRIEND, **PREFLIGHT})
    assert not [name for name in answer.headers if name.startswith("Access-Control")]


def test_addresses_with_wrong_tokens_are_remembered_up_to_a_thousand(connect):
    guard_ = connect(token=TOKEN).app.guard
    for number in range(1100):
        for _ in range(10 if number == 1099 else 1):
            assert guard_.failed(f"10.0.{number // 256}.{number % 256}").status == 401
    assert len(guard_.failures) == 1000
    assert guard_.failed("10.0.4.75").status == 429, "the last one is still known"
    assert guard_.failed("10.0.0.0").status == 401, "and the first one is not"


# --- the rest of the application


def test_health_says_ok_and_no_more(play):
    play(Row("GET /health", 200, exactly(status="ok")))
    play(Row("GET /health/", 200, exactly(status="ok")))


METRIC = re.compile(
    r'[a-zA-Z_:][a-zA-Z0-9_:]*(\{([a-z_]+="[^"]*",?)*\})? (NaN|[+-]?Inf|[0-9.e+-]+)'
)


def test_metrics_are_prometheus_text(client):
    client("GET /api/user/1")
    client("GET /api/user/99")
    client("GET /api/user/98")
    answer = client("GET /metrics")
    assert answer.content_type == "text/plain"
    found = [line for line in answer.text.splitlines() if not line.startswith("#")]
    assert found and all(METRIC.fullmatch(line) for line in found)
    assert not [leak for leak in ("/api/user/99", "Simone") if leak in answer.text]
    assert [line for line in found if '"404"' in line and line.endswith((" 2", " 2.0"))]
    assert [line for line in found if "_bucket{" in line and 'le="+Inf"' in line]
    users = [line for line in found if "user" in line and line.endswith((" 4", " 4.0"))]
    assert users
    sizes = [line.split()[0] for line in found if "_bytes " in line]
    assert "userapi_database_bytes" in sizes
    assert POSTGRESQL or sizes == ["userapi_database_bytes", "userapi_wal_bytes"]


def test_an_application_never_raises(client):
    """Whatever a server hands over: an answer, and the next request is served."""
    odd = [
        {"PATH_INFO": ""},
        {"PATH_INFO": "//"},
        {"PATH_INFO": "/\xff\xfe"},
        {"PATH_INFO": "/api/user/" + "1/" * 2000},
        {"QUERY_STRING": "%"},
        {"QUERY_STRING": "a=%zz&&=&b"},
        {"QUERY_STRING": "\xff"},
        {"CONTENT_LENGTH": "x"},
        {"CONTENT_LENGTH": "-1"},
        {"CONTENT_LENGTH": "9" * 30},
        {"CONTENT_LENGTH": "50"},
        {"CONTENT_LENGTH": 50},
        {"HTTP_HOST": ""},
        {"HTTP_HOST": "\xff"},
        {"REMOTE_ADDR": "nonsense"},
        {"HTTP_ACCEPT": ";q=x,,/"},
        {"HTTP_ACCEPT": "*/*;q=" + "9" * 5000},
        {"HTTP_IF_NONE_MATCH": '"'},
        {"HTTP_IF_MATCH": ",,,"},
        {"CONTENT_TYPE": "\xff/;="},
        {"HTTP_AUTHORIZATION": "\xff"},
    ]
    for method, change in itertools.product(("GET", "POST", "PUT"), odd):
        status, body = call(client, method, "/api/user/1", **change)
        assert status != 500 and b"Traceback" not in body, change
    assert client("GET /api/user/1").status_int == 200


def test_head_of_the_events_ends(client):
    wish = {"HTTP_ACCEPT": "text/event-stream"}
    assert call(client, "HEAD", "/api/changes", **wish) == (200, b"")


def test_a_chunked_body_is_read_to_its_end_and_bounded(connect):
    """As a server of another kind hands it over: without a length."""
    client = connect(max_body=200)
    chunked = {"HTTP_TRANSFER_ENCODING": "chunked", "CONTENT_LENGTH": ""}
    chunked["wsgi.input_terminated"] = True
    body = json.dumps({"item": GRACE}).encode()
    assert call(client, "POST", "/api/user", body, **chunked)[0] == 201
    assert call(client, "POST", "/api/user", body + b" " * 200, **chunked)[0] == 413


def test_a_body_shorter_than_announced_is_refused(client):
    body = json.dumps({"item": GRACE}).encode()
    answer = client("POST /api/user", body, CONTENT_LENGTH=str(len(body)))
    assert answer.status_int == 201
    more = str(len(body) + 10)
    assert call(client, "POST", "/api/user", body, CONTENT_LENGTH=more)[0] == 400
    assert len(client.users()) == 5


def test_under_a_prefix_its_uris_have_it(client):
    def send(line: str, body: Any = None):
        return client(line, body, SCRIPT_NAME="/people")

    page = send("GET /api/user?limit=1")
    assert urlsplit(page.json["next"]).path == "/people/api/user"
    made = send("POST /api/user", {"item": GRACE})
    assert urlsplit(made.headers["Location"]).path == "/people/api/user/1338"


FORWARDED = {
    "X-Forwarded-For": "8.8.8.8, 10.0.0.1",
    "X-Forwarded-Host": "users.example",
    "X-Forwarded-Proto": "https",
}


def test_a_trusted_proxy_says_who_asks(connect):
    """The last hop that is not a proxy itself counts; without trust nothing does."""
    client = connect(token=TOKEN, trusted_proxy="10.0.0.1,10.0.0.2")

    def wrong(address: str, headers: Any) -> int:
        return client(
            "GET /api/user/1", headers={**bearer("no"), **headers}, REMOTE_ADDR=address
        ).status_int

    assert [wrong("10.0.0.1", FORWARDED) for _ in range(11)] == [401] * 10 + [429]
    assert wrong("10.0.0.2", FORWARDED) == 429
    assert wrong("::ffff:10.0.0.2", FORWARDED) == 429, "as --host :: has it"
    assert wrong("8.8.8.8", {}) == 429
    spoofed = {"X-Forwarded-For": "8.8.8.8, 9.9.9.9"}
    assert wrong("10.0.0.1", spoofed) == 401
    for port in range(5):
        assert wrong("10.0.0.1", {"X-Forwarded-For": f"8.8.8.8:{port}"}) == 429
    for hop in ("2001:db8::1", "[2001:db8::1]", "[2001:db8::1]:5") * 4:
        status = wrong("10.0.0.1", {"X-Forwarded-For": f"{hop}, 10.0.0.2:4"})
    assert status == 429, "a port is no part of the address"
    assert wrong("7.7.7.7", FORWARDED) == 401
    assert wrong("10.0.0.1", {}) == 401


def test_a_trusted_proxy_says_which_host_was_asked(connect):
    client = connect(
        trusted_proxy="127.0.0.1", headers=FORWARDED, allow_host="users.example"
    )
    there = {"X-Forwarded-For": "127.0.0.9"}
    assert client("GET /api/user/1", headers=there).status_int == 200
    assert client("GET /api/user/1").status_int == 403, "8.8.8.8 is not this host"
    proxied = connect(trusted_proxy="127.0.0.1,10.0.0.0/8")
    for hops in ("10.0.0.7", "10.0.0.7, 10.0.0.8", "127.0.0.1:5, 10.0.0.8,"):
        answer = proxied("GET /api/user/1", headers={"X-Forwarded-For": hops})
        assert answer.status_int == 403, "who is trusted as a proxy is not this host"
    same_site = {**there, "Origin": "https://users.example"}
    assert client("DELETE /api/user/1", headers=same_site).status_int == 200
    other = {**there, "Origin": "https://localhost"}
    assert client("DELETE /api/user/2", headers=other).status_int == 403


def test_a_trusted_proxy_says_under_which_prefix_it_stands(connect):
    headers = {"X-Forwarded-Prefix": "/people", "X-Forwarded-For": "127.0.0.2"}
    client = connect(trusted_proxy="127.0.0.1", headers=headers)
    for line in ("GET /api/user?limit=1", "GET /people/api/user?limit=1"):
        page = client(line)
        assert urlsplit(page.json["next"]).path == "/people/api/user"
    assert connect(headers=headers)("GET /people/api/user").status_int == 404


def test_on_change_is_called_after_the_commit(db):
    seen: list[Any] = []
    client = Client(db, on_change=lambda *change: seen.append(change))
    client("DELETE /api/user/99")
    client("DELETE /api/user/1?dry_run=true")
    with pytest.raises(ZeroDivisionError), client.app.store.transaction():
        client.app.store.delete_users([1])
        1 / 0  # noqa: B018
    assert seen == []
    client("DELETE /api/user/1")
    assert seen == [(client.changes()[-1],)]
    client.close()


def test_on_change_is_told_more_than_the_log_keeps(db):
    told = []
    store = userapi.Store(str(db), keep_changes=2, on_change=told.append)
    store.create_users([ADA] * 20)
    store.merge_users([{"id": id, "name": "A"} for id in range(1338, 1358)])
    assert [change["op"] for change in told] == ["create"] * 20 + ["update"] * 20
    assert len(store.changes(None, 99)) == 2


def test_a_fault_of_on_change_undoes_nothing(db, capfd):
    store = userapi.Store(str(db), on_change=lambda change: 1 / 0)
    store.delete_users([1, 2])
    assert [user["id"] for user in store.find_users()] == [3, 1337]
    assert capfd.readouterr().err.count("ZeroDivisionError") == 2
    store.close()


# ------------------------------------------------------------------------------------
# Contract documents and page
# ------------------------------------------------------------------------------------

DOCUMENTS = [
    Row("GET /openapi.json", 200, (kind("application/json"), '"openapi": "3.1')),
    Row("GET /postman.json", 200, (kind("application/json"), "/v2.1.0/collection")),
    Row("GET /docs", 200, (kind("text/html"), "curl", "/user")),
    Row("GET /", 200, (kind("text/html"), "<!doctype html>"), "unsafe-inline"),
    Row("GET /favicon.ico", 404),
]  # fmt: skip


@scenarios(DOCUMENTS)
def test_documents_answer(play, row):
    play(row)


def test_the_document_has_every_operation(client):
    paths = client("GET /openapi.json").json["paths"]
    ids_ = [
        operation["operationId"]
        for methods in paths.values()
        for method, operation in methods.items()
        if method in ("get", "put", "post", "patch", "delete", "head", "options")
    ]
    assert len(ids_) == len(set(ids_)) >= 5


# ------------------------------------------------------------------------------------
# Server
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [True, False])
def test_readers_find_all_that_is_wanted_of_them(threads, monkeypatch):
    """In threads, or where the host lets none be started in the loop."""
    if not threads:

        def refuse(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", refuse)
    found: dict[int, Any] = {}

    async def read() -> None:
        all_there = asyncio.Event()
        readers = userapi.Readers(asyncio.get_running_loop())

        def keep(number: int, result: Any) -> None:
            found[number] = result
            if len(found) == 100:
                all_there.set()

        def divide(number: int) -> tuple[float, bool]:
            here = threading.current_thread() is threading.main_thread()
            return 1 / number, here

        for number in range(100):
            readers.run(lambda result, n=number: keep(n, result), divide, number)
        assert not found, "not before the loop goes on"
        await asyncio.wait_for(all_there.wait(), 60)
        assert readers.busy == 0

    asyncio.run(read())
    assert isinstance(found.pop(0), ZeroDivisionError)
    assert found == {n: (1 / n, not threads) for n in range(1, 100)}


AT = "Host: localhost|"
JSON_POST = f"POST /api/user?dry_run=true HTTP/1.1|{AT}Content-Type: application/json|"
SIZE = len(JSON_BODY)
CHUNKED = JSON_POST + "Transfer-Encoding: chunked||"
HALVES = f"10|{JSON_BODY[:16]}|{SIZE - 16:x};x=y|{JSON_BODY[16:]}|0|"

#: (what is sent, with | for CR LF; the statuses that come back).
WIRE = [
    (f"GET /health HTTP/1.1|{AT}|", [200]),
    (f"GET /health HTTP/1.1|{AT}|" * 3, [200, 200, 200]),
    (f"|GET /health HTTP/1.1|{AT}|", [400]),
    (f"GET /health HTTP/1.1|{AT}|GET /nothing HTTP/1.1|{AT}|", [200, 404]),
    (f"GET /health HTTP/1.1|{AT}Connection: close||" * 2, [200]),
    (f"GET /health HTTP/1.1|{AT}Connection: x , Close||" * 2, [200]),
    (f"GET /health HTTP/1.1|{AT}Connection: x||" * 2, [200, 200]),
    (f"GET /health HTTP/1.0|{AT}|" * 2, [200]),
    (f"GET /health HTTP/1.0|{AT}Connection: x||" * 2, [200]),
    (f"GET /health HTTP/1.0|{AT}Connection: keep-alive||" * 2, [200, 200]),
    ("GET /health HTTP/1.0||", [403]),
    (f"GET /api/user HTTP/1.0|{AT}|", [200]),
    (f"GET /api/user HTTP/1.1|{AT}|GET /health HTTP/1.1|{AT}|", [200, 200]),
    (f"HEAD /api/user HTTP/1.1|{AT}|GET /health HTTP/1.1|{AT}|", [200, 200]),
    (f"GET http://localhost/health HTTP/1.1|{AT}|", [200]),
    (f"GET http://localhost?q=x HTTP/1.1|{AT}|", [200]),
    (f"GET http://evil.com/health HTTP/1.1|{AT}|", [403]),
    (f"GET ftp://localhost/health HTTP/1.1|{AT}|", [400]),
    (f"GET http:// HTTP/1.1|{AT}|", [400]),
    (f"GET health HTTP/1.1|{AT}|", [400]),
    (f"GET /health#x HTTP/1.1|{AT}|", [400]),
    (f"GET /%zz HTTP/1.1|{AT}|", [400]),
    (f"GET /%68ealth HTTP/1.1|{AT}|", [200]),
    ("GET /health HTTP/1.1||", [400]),
    (f"GET /health HTTP/1.1|{AT}{AT}|", [400]),
    ("GET /health HTTP/1.1|Host: a b||", [400]),
    ("GET /health HTTP/1.1|Host: evil.com||", [403]),
    (f"GET  /health HTTP/1.1|{AT}|", [400]),
    (f"GET /health http/1.1|{AT}|", [400]),
    (f"GET /health HTTP/2.0|{AT}|", [505]),
    (f"GET /health HTTP/1.2|{AT}|", [505]),
    (f"G@T /health HTTP/1.1|{AT}|", [400]),
    (f"get /health HTTP/1.1|{AT}|", [405]),
    (f"GET /health HTTP/1.1|{AT}X_Y: 1|X-A: 1|X-A: 2||", [200]),
    (f"GET /health HTTP/1.1|{AT}X: 1| folded||", [400]),
    (f"GET /health HTTP/1.1|{AT}X : 1||", [400]),
    (f"GET /health HTTP/1.1|{AT}no colon||", [400]),
    (f"GET /health HTTP/1.1|{AT}: 1||", [400]),
    (f"GET /health HTTP/1.1|{AT}X: \x01||", [400]),
    ("GET /health HTTP/1.1\nHost: localhost\n\n", [400]),
    (f"GET /health HTTP/1.1|{AT}X: a\rb||", [400]),
    (f"GET /{'a' * 8178} HTTP/1.1|{AT}|", [404]),
    (f"GET /{'a' * 8179} HTTP/1.1|{AT}|", [414]),
    (f"GET /health HTTP/1.1|{AT}X: {'a' * 16_362}||", [200]),
    (f"GET /health HTTP/1.1|{AT}X: {'a' * 16_363}||", [431]),
    (f"GET /{'a' * 9000} HTTP/1.1|{AT}|", [414]),
    (f"GET /{'a' * 9000}", [414]),
    (f"GET /health HTTP/1.1|{AT}X: {'a' * 17_000}||", [431]),
    (f"GET /health HTTP/1.1|{AT}X: {'a' * 17_000}", [431]),
    (f"GET /health HTTP/1.1|{AT}" + "X: 1|" * 64 + "|", [431]),
    (f"GET /health HTTP/1.1|{AT}Content-Length: 0||", [200]),
    (f"{JSON_POST}Content-Length: 0||GET /health HTTP/1.1|{AT}|", [400, 200]),
    (f"GET /health HTTP/1.1|{AT}Content-Length: 2||xxGET /nothing HTTP/1.1|{AT}|",
        [200, 404]),
    (f"{JSON_POST}Content-Length: {SIZE}||{JSON_BODY}", [201]),
    (f"{JSON_POST}Content-Length: {SIZE}||{JSON_BODY}" * 2, [201, 201]),
    (f"{JSON_POST}|", [411]),
    (f"{JSON_POST}Content-Length: x||", [400]),
    (f"{JSON_POST}Content-Length: +5||", [400]),
    (f"{JSON_POST}Content-Length: \xb2||", [400]),
    (f"{JSON_POST}Content-Length: 5, 5||", [400]),
    (f"{JSON_POST}Content-Length: 5|Content-Length: 5||", [400]),
    (f"{JSON_POST}Content-Length: 9000000||", [413]),
    (f"{JSON_POST}Content-Length: {'9' * 5000}||", [413]),
    (f"{JSON_POST}Content-Length: 5|Transfer-Encoding: chunked||", [400]),
    (f"{JSON_POST}Transfer-Encoding: gzip||", [501]),
    (f"POST /api/user HTTP/1.0|{AT}Transfer-Encoding: chunked||", [400]),
    (f"{JSON_POST}Expect: 100-Continue|Content-Length: {SIZE}||", [100]),
    (  # PostgreSQL may be slow to say who gets in: the body is read meanwhile
        "POST / HTTP/1.1|Host: evil.com|Expect: 100-continue|Content-Length: 5||",
        [100] if POSTGRESQL else [403],
    ),
    (f"{JSON_POST}Content-Length: {SIZE}||", []),
    (f"POST /api/user HTTP/1.0|{AT}Expect: 100-continue|Content-Length: 5||", []),
    (f"POST /nothing HTTP/1.0|{AT}Expect: more|Content-Length: 5||hello", [404]),
    (f"{JSON_POST}Expect: more|Content-Length: {SIZE}||{JSON_BODY}", [417]),
    (f"{CHUNKED}{SIZE:x}|{JSON_BODY}|0||", [201]),
    (f"{CHUNKED}{HALVES}|GET /health HTTP/1.1|{AT}|", [201, 200]),
    (f"{CHUNKED}{HALVES}X-Trailer: 1||", [201]),
    (f"{CHUNKED}{HALVES}no trailer||", [400]),
    (f"{CHUNKED}{HALVES}X: {'a' * 17_000}", [431]),
    (f"{CHUNKED}{SIZE:x}|{JSON_BODY}x|0||", [400]),
    (f"{CHUNKED}{SIZE:x}|{JSON_BODY}xx0||", [400]),
    (f"{CHUNKED}0x5|hello|0||", [400]),
    (f"{CHUNKED}-5|hello|0||", [400]),
    (f"{CHUNKED}5 |hello|0||", [400]),
    (f"{CHUNKED}5\nhello|0||", [400]),
    (f"{CHUNKED}5\nhello", [400]),
    (f"{CHUNKED}|0||", [400]),
    (f"{CHUNKED}{HALVES}X: a\nb", [400]),
    (f"{CHUNKED}{HALVES}X: a|content-length: 5||", [400]),
    (f"{CHUNKED}5;{'x' * 2000}", [400]),
    (f"{CHUNKED}{SIZE:04x};{'x' * 1017}|{JSON_BODY}|0||", [201]),
    (f"{CHUNKED}{SIZE:04x};{'x' * 1018}|{JSON_BODY}|0||", [400]),
    ("||", [400]),
    (f"GET /health?x=1 HTTP/1.1|{AT}|", [400]),
    (f"{CHUNKED}ffffffff|", [413]),
    (f"{CHUNKED}fffffffff|", [400]),
    ("GET /hea", []),
    ("", []),
]  # fmt: skip


#: (a header section, with | for CR LF; its WSGI variables, or the status).
SECTIONS = [
    ("", {}),
    ("Host: a|", {"HTTP_HOST": "a"}),
    ("X:|Y: \t b c \t|", {"HTTP_X": "", "HTTP_Y": "b c"}),
    ("x-a: 1|X-A: 2|X-a:3|", {"HTTP_X_A": "1,2,3"}),
    ("X_A: 1|X-A: 2|A_: 3|B: 4|", {"HTTP_X_A": "2", "HTTP_B": "4"}),
    ("Content-Type: a/b|content-length: 5|", {"CONTENT_TYPE": "a/b",
     "CONTENT_LENGTH": "5"}),
    ("Cookie: \xe4|", {"HTTP_COOKIE": "\xe4"}),
    ("A: 1|B: 2|C: 3|D: 4|", {"HTTP_A": "1", "HTTP_B": "2", "HTTP_C": "3",
     "HTTP_D": "4"}),
    ("A: 1|B: 2|C: 3|D: 4|E_: 5|", 431),
    ("X: a\x7f|", 400),
    ("X: a\0|", 400),
    (" X: a|", 400),
    ("X : a|", 400),
    (": a|", 400),
    ("X|", 400),
    ("X: a", 400),
    ("X: a|\tb|", 400),
    ("X@: a|", 400),
]  # fmt: skip
SECTIONS += [
    (f"{name}: a|{name.lower()}: a|", 400)
    for name in ("Host", "Content-Length", "Content-Type", "Authorization")
]
#: (method, target; path, query and Host, which was h, or the status).
TARGETS = [
    ("GET", "/", ("/", "", "h")),
    ("GET", "/a?b?c=/d", ("/a", "b?c=/d", "h")),
    ("GET", "/a%2fb%C3%A4?%zz", ("/a/b\xc3\xa4", "%zz", "h")),
    ("GET", "//a/b", ("//a/b", "", "h")),
    ("OPTIONS", "*", ("*", "", "h")),
    ("GET", "http://a", ("/", "", "a")),
    ("GET", "HTTP://a:1/b/c?d/e", ("/b/c", "d/e", "a:1")),
    ("GET", "https://a?b=/c", ("/", "b=/c", "a")),
    ("GET", "*", 400),
    ("OPTIONS", "a", 400),
    ("OPTIONS", "*?a", 400),
    ("GET", "http://", 400),
    ("GET", "http:///a", 400),
    ("GET", "http:/a", 400),
    ("GET", "http://a@b/", 400),
    ("GET", "ftp://a/", 400),
    ("GET", "a/b", 400),
    ("GET", "/a#b", 400),
    ("GET", "/a?b#c", 400),
    ("GET", "/%", 400),
    ("GET", "/%4", 400),
]


def wire(text: str) -> bytes:
    """A text of these tables as it is sent, with | for CR LF."""
    return text.replace("|", "\r\n").encode("latin-1")


def what_is_read(read, *args: Any) -> Any:
    """What a reader of the head gives, or the status with which it refuses."""
    try:
        return read(*args)
    except Problem as problem:
        return problem.status


@pytest.mark.parametrize("section, wanted", SECTIONS, ids=ascii)
def test_a_header_section(section, wanted):
    found = what_is_read(userapi.parse_fields, wire(section), 4)
    assert found == wanted


@pytest.mark.parametrize("method, target, wanted", TARGETS)
def test_a_request_target(method, target, wanted):
    line = f"{method} {target} HTTP/1.1".encode()
    found = what_is_read(userapi.parse_line, line, {"HTTP_HOST": "h"})
    if found != 400:
        names = ("PATH_INFO", "QUERY_STRING", "HTTP_HOST")
        found = tuple(found[name] for name in names)
    assert found == wanted


PIPELINED = (
    b"GET /a?b HTTP/1.1\r\nHost: h\r\n\r\n"
    b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\n12345"
    b"POST /b HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"3;x=y\r\nabc\r\n00a\r\n0123456789\r\n0\r\nX: y\r\n\r\n"
    b"PUT /c HTTP/1.0\r\nContent-Length: 0\r\n\r\n"
    b"POST /d HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"500\r\n" + b"d" * 0x500 + b"\r\n0\r\n\r\n"
)
ARE_READ = [
    ("GET", "/a", None),
    ("POST", "/a", b"12345"),
    ("POST", "/b", b"abc0123456789"),
    ("PUT", "/c", None),
    ("POST", "/d", b"d" * 0x500),
]


@REPEATABLE
@given(st.sets(st.integers(1, len(PIPELINED) - 1)))
@example(set(range(1, len(PIPELINED))))
@example({len(PIPELINED) - 4})  # in the line of a chunk, far into what has arrived
def test_requests_are_the_same_however_they_arrive(scratch, cuts):
    parser = userapi.Parser(userapi.Server(scratch.app), "127.0.0.1")
    found = []
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), None]):
        parser.buffer += PIPELINED[start:end]
        while environ := parser.next_request():
            body = environ["wsgi.input"].read() if "CONTENT_LENGTH" in environ else b""
            found.append(
                (environ["REQUEST_METHOD"], environ["PATH_INFO"], body or None)
            )
    assert found == ARE_READ and parser.is_idle()


def begin(scratch: Any, sent: str) -> userapi.Parser:
    """A parser that has read what was sent, | being CR LF, in pieces that end at ^."""
    parser = userapi.Parser(userapi.Server(scratch.app), "127.0.0.1")
    for piece in sent.replace("|", "\r\n").split("^"):
        parser.buffer += piece.encode()
        while parser.next_request():
            parser.deadline = float("inf")
    return parser


def test_what_a_client_says_again_is_read_as_the_first_time(scratch):
    """A line and a section that are the last ones' are not taken apart anew."""
    parser = begin(scratch, "")
    heads = [("/a", "h"), ("/a", "h"), ("/b", "h"), ("/b", "i"), ("http://j/b", "i")]
    heads += [("/b", "i"), ("/", "i")]
    for target, host in heads:
        parser.buffer += f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    read = []
    while environ := parser.next_request():
        read.append((environ.pop("PATH_INFO"), environ.pop("HTTP_HOST")))
    assert read == [*heads[:4], ("/b", "j"), *heads[5:]]
    parser.buffer = b"\r\n\r\n"  # which is no line
    assert what_is_read(parser.next_request) == 400


@pytest.mark.parametrize("left", range(1, 5))
def test_trailers_just_within_the_limit(scratch, left):
    trailers = f"X: {'a' * (scratch.app.settings.max_head - 5)}|"
    sent = f"{CHUNKED}0|{trailers}|".replace("|", "\r\n")
    parser = begin(scratch, sent[:-left])
    parser.buffer += sent[-left:].encode()
    assert parser.next_request()


@pytest.mark.parametrize("begun", [False, True])
def test_who_has_begun_to_send_is_not_invited(scratch, begun):
    head = f"{JSON_POST}Expect: 100-continue|Content-Length: 5||"
    assert begin(scratch, head + "x" * begun).invites is not begun


#: (what has arrived; for how many seconds the rest is waited for).
WAITS = [
    ("GET /", 10),
    (f"GET ^/health HTTP/1.1|{AT}|GET /", 10),
    (f"{JSON_POST}Content-Length: 5||", 20),
    (f"{JSON_POST}Content-Length: {4 << 20}||", 36),
]


@pytest.mark.parametrize("sent, seconds", WAITS)
def test_how_long_the_rest_is_waited_for(scratch, sent, seconds):
    left = begin(scratch, sent).deadline - time.monotonic()
    assert seconds - 5 < left < seconds + 0.1


@pytest.fixture(scope="module")
def server(template, tmp_path_factory):
    """A real server, for rows that change nothing: its URL."""
    path = database(tmp_path_factory.mktemp("server") / "users.db", template)
    with hosting(UserAPI(str(path))) as (_, url):
        yield url


def dial(url: str) -> socket.socket:
    at_ = urlsplit(url)
    return socket.create_connection((at_.hostname, at_.port), timeout=30)


def hear(sock: socket.socket) -> bytes:
    """All that comes until the other side is done."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(65536):
            parts.append(part)
    return b"".join(parts)


def statuses(answers: bytes) -> list[int]:
    return [int(code) for code in re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", answers)]


@pytest.mark.parametrize("pieces", [False, True], ids=["whole", "in-pieces"])
@pytest.mark.parametrize("sent, wanted", WIRE, ids=[text[:60] for text, _ in WIRE])
def test_the_wire(server, sent, wanted, pieces):
    """Sent at once or in pieces, then no more: an answer to each, and to no other."""
    data = wire(sent)
    size = max(1, len(data) // 9) if pieces else len(data) or 1
    with dial(server) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(ConnectionError):  # it may have hung up on us
            for start in range(0, len(data), size):
                sock.sendall(data[start : start + size])
            sock.shutdown(socket.SHUT_WR)
        answers = hear(sock)
    assert statuses(answers) == wanted
    if wanted and wanted[0] >= 400:
        assert b'"code": 1, "message": "FAILURE"' in answers
        assert b"X-Content-Type-Options: nosniff" in answers
    assert statuses(fetch_raw(server)) == [200], "and the next client is served"


def fetch_raw(url: str) -> bytes:
    with dial(url) as sock:
        sock.sendall(
            ASK_HEALTH.replace(b"localhost", b"localhost\r\nConnection: close")
        )
        return hear(sock)


def test_a_connection_is_kept(server):
    connection = http.client.HTTPConnection(urlsplit(server).netloc, timeout=30)
    with contextlib.closing(connection):
        for _ in range(3):
            connection.request("GET", "/api/user/1")
            answer = connection.getresponse()
            assert answer.status == 200 and answer.read()
            assert not answer.will_close


def drip(server: Any, sock: socket.socket, first: bytes) -> float:
    """Send this, and a byte now and then until a 408 comes: the seconds it takes."""
    began = time.monotonic()
    sock.sendall(first)
    while not select.select([sock], [], [], 0.02)[0]:
        sock.sendall(b"a")
        pass_a_second(server)
        assert time.monotonic() - began < 30
    assert statuses(hear(sock)) == [408]
    return time.monotonic() - began


def test_deadlines(db):
    """Half a head or half a body is a 408, however slowly more comes; an idle one is
    closed without a word."""
    with hosting(UserAPI(str(db))) as (server, url), contextlib.ExitStack() as stack:
        idle, head, body = [stack.enter_context(dial(url)) for _ in range(3)]
        head.sendall(ASK_HEALTH[:20])
        pass_a_second(server)
        head.sendall(ASK_HEALTH[20:])
        assert statuses(head.recv(65536)) == [200]
        server.settings.head_timeout = server.settings.body_timeout = 0.1
        assert drip(server, head, ASK_HEALTH[:-2] + b"X: ") >= 0.1
        half = f"{JSON_POST}Content-Length: 5000||half"
        assert drip(server, body, wire(half)) >= 0.1
        assert not readable(idle)
        server.settings.idle_timeout = 0.1
        late = stack.enter_context(dial(url))
        wait_until(lambda: pass_a_second(server) or readable(late))
        assert hear(late) == b"" and not readable(idle)


CLOSE = f"{AT}Connection: close|"  # with each | a byte longer on the wire
#: (a head in two pieces; limits that it just keeps).
HALF_HEADS = [
    ("GET /" + "a" * 95, f" HTTP/1.1|{CLOSE}|", {"max_line": 109}),
    ("GET /" + "a" * 95 + " HTTP/1.1", f"|{CLOSE}|", {"max_line": 109}),
    ("GET /" + "a" * 95, f" HTTP/1.1|{CLOSE}|", {"max_line": 109, "max_head": 50}),
    (f"GET / HTTP/1.1|{CLOSE}", "|", {"max_head": len(CLOSE) + 2}),
    (f"GET / HTTP/1.1|{CLOSE}\r", "\n", {"max_head": len(CLOSE) + 2}),
]


@pytest.mark.parametrize("first, rest, limits", HALF_HEADS)
def test_a_limit_counts_the_same_wherever_a_piece_ends(db, first, rest, limits):
    first, rest = wire(first), wire(rest)
    with hosting(UserAPI(str(db), **limits)) as (server, url), dial(url) as sock:
        sock.sendall(first)
        wait_until(lambda: first in [one.parser.buffer for one in server.connections])
        sock.sendall(rest)
        assert statuses(hear(sock)) in ([200], [404])


def test_a_chunked_body_may_be_cut_anywhere(db):
    head, rest = wire(CHUNKED), wire(f"{HALVES}X-Trailer: 1||")
    with hosting(UserAPI(str(db))) as (server, url):
        for cut in range(len(rest)):
            with dial(url) as sock:
                sock.sendall(head + rest[:cut])
                pass_a_second(server)
                sock.sendall(rest[cut:])
                assert statuses(sock.recv(65536)) == [201], rest[:cut]


def test_connections_and_bodies_in_flight_are_bounded(db):
    app = UserAPI(str(db), max_connections=3, max_bodies=900, max_body=800)
    with contextlib.ExitStack() as stack:
        server, url = stack.enter_context(hosting(app))
        one, two, three = [stack.enter_context(dial(url)) for _ in range(3)]

        def announce(sock: socket.socket, size: int) -> None:
            more = f"Expect: 100-continue|Content-Length: {size}||"
            sock.sendall(wire(JSON_POST + more))

        announce(one, 800)
        assert b"100 Continue" in one.recv(99)
        with dial(url) as four:
            assert statuses(hear(four)) == [503]
        announce(two, 101)
        assert statuses(hear(two)) == [503]
        announce(three, 100)
        assert b"100 Continue" in three.recv(99)
        one.sendall(JSON_BODY.encode().ljust(800))
        assert b"201 Created" in one.recv(65536)
        announce(one, 801)
        assert statuses(hear(one)) == [413]
        three.sendall(JSON_BODY.encode().ljust(100))
        assert b"201 Created" in three.recv(65536)
        wait_until(lambda: server.bodies == 0)


@of_files("a guard that never has to wait for a database")
def test_who_is_not_let_in_holds_no_room_for_bodies(db):
    """They are told so before a body that is not short, however it is framed."""
    app = UserAPI(str(db), token="right", max_bodies=1 << 20, max_body=1 << 20)
    with contextlib.ExitStack() as stack:
        server, url = stack.enter_context(hosting(app))
        chunk = f"Transfer-Encoding: chunked||8000|{'x' * 0x8000}|8001|"
        for framing in [f"Content-Length: {1 << 20}||{JSON_BODY}", chunk] * 2:
            stranger = stack.enter_context(dial(url))
            stranger.sendall(wire(f"{JSON_POST}{framing}"))
            assert statuses(hear(stranger)) == [401]
        short = stack.enter_context(dial(url))
        sent = f"{JSON_POST}Content-Length: {len(JSON_BODY)}||{JSON_BODY}" * 2
        short.sendall(wire(sent))
        short.shutdown(socket.SHUT_WR)
        assert statuses(hear(short)) == [401, 401], "and the connection is kept"
        wait_until(lambda: server.bodies == 0)
        right = stack.enter_context(dial(url))
        head = f"{JSON_POST}Authorization: Bearer right|Content-Length: {1 << 20}||"
        right.sendall(wire(head))
        right.sendall(JSON_BODY.encode().ljust(1 << 20))
        assert statuses(right.recv(65536)) == [201]


def test_one_body_as_long_as_it_may_be_is_never_too_much(db):
    head = f"{JSON_POST}Expect: 100-continue|Content-Length: 800||"
    with contextlib.ExitStack() as stack:
        app = UserAPI(str(db), max_bodies=100, max_body=800)
        _, url = stack.enter_context(hosting(app))
        one, two = [stack.enter_context(dial(url)) for _ in range(2)]
        one.sendall(wire(head))
        assert b"100 Continue" in one.recv(99)
        two.sendall(wire(head))
        assert statuses(hear(two)) == [503]
        one.sendall(JSON_BODY.encode().ljust(800))
        assert b"201 Created" in one.recv(65536)


def test_a_write_waits_for_another_program_and_reads_do_not(db):
    with hosting(UserAPI(str(db))) as (_, url):
        with contextlib.closing(another(db)) as other:
            other.execute("BEGIN IMMEDIATE")
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                write = pool.submit(fetch, url, "DELETE /api/user/1")
                assert fetch(url, "GET /api/user/1")[0] == 200
                other.execute("UPDATE users SET user_name = 'Fo' WHERE user_id = 2")
                other.execute("COMMIT")
        assert write.result()[0] == 200
        assert fetch(url, "GET /api/user/1")[0] == 404
        (user,) = json.loads(fetch(url, "GET /api/user/2")[2])["results"]
        assert user["name"] == "Fo"


def test_writes_of_one_turn_fail_alone(db):
    """Many at once, a third refused, a third dry runs: each gets its own answer."""
    sent = [(BAD, "", 422), (GRACE, "", 201), (GRACE, "?dry_run=true", 201)] * 10
    seen: list[Any] = []
    with hosting(UserAPI(str(db), on_change=seen.append)) as (_, url):

        def send(number: int) -> int:
            item, query, _ = sent[number]
            return fetch(url, f"POST /api/user{query}", {"item": item})[0]

        assert at_once(30, send) == [status for _, _, status in sent]
    made = run_sql(db, "SELECT user_id FROM users WHERE user_id > 1337 ORDER BY 1")
    assert made == [(id,) for id in range(1338, 1348)]
    assert [change["op"] for change in seen] == ["create"] * 10
    assert [change["seq"] for change in seen] == list(range(5, 15))
    assert run_sql(db, "SELECT max(seq) FROM changes") == [(14,)]


# --- around an application that has faults of its own


def failing():
    yield b"begun"
    raise RuntimeError("secret")


def raising():
    raise RuntimeError("secret")


LENGTH_5 = [("Content-Length", "5")]
#: What the application that is wrapped around answers: headers, and a body's maker.
AROUND = {
    "/raises": ([], raising),
    "/split": ([("X", "a\r\nInjected: 1")], lambda: [b"x"]),
    "/fails": ([], failing),
    "/longer": (LENGTH_5, lambda: iter([b"hel", b"lo wo", b"rld"])),
    "/pieces": ([], lambda: iter([b"hel", b"lo"])),
    "/late": ([], lambda: [b"failed"]),
}


class Around(UserAPI):
    def __call__(self, environ: Any, start_response: Any) -> Any:
        if environ["PATH_INFO"] not in AROUND:
            return super().__call__(environ, start_response)
        headers, make = AROUND[environ["PATH_INFO"]]
        body = make()
        start_response("200 OK", headers)
        if environ["PATH_INFO"] == "/late":  # PEP 3333 has it take the other's place
            start_response("500 Internal Server Error", headers, (None, None, None))
        return body


#: (what is asked, the status, how the answer ends)
ANSWERED = [
    ("GET /raises HTTP/1.1", 500, b"}"),
    ("HEAD /raises HTTP/1.1", 500, b"\r\n\r\n"),
    ("GET /split HTTP/1.1", 500, b"}"),
    ("GET /late HTTP/1.1", 500, b"failed"),
    ("GET /pieces HTTP/1.1", 200, b"\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"),
    ("GET /pieces HTTP/1.0", 200, b"\r\n\r\nhello"),
    ("HEAD /pieces HTTP/1.1", 200, b"\r\n\r\n"),
    ("GET /longer HTTP/1.1", 200, b"\r\n\r\nhello"),
    ("GET /fails HTTP/1.1", 200, b"\r\n\r\n5\r\nbegun\r\n"),
]


@pytest.fixture(scope="module")
def around(template, tmp_path_factory):
    path = database(tmp_path_factory.mktemp("around") / "users.db", template)
    with hosting(Around(str(path))) as (_, url):
        yield url


@pytest.mark.parametrize("line, status, end", ANSWERED, ids=str)
def test_an_application_around_it_cannot_break_the_protocol(around, line, status, end):
    request = f"{line}\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = talk(around, request.encode())
    assert statuses(answer.replace(b"HTTP/1.0 ", b"HTTP/1.1 ")) == [status]
    assert answer.endswith(end), answer
    assert b"secret" not in answer and b"Injected" not in answer
    if status == 500 and end != b"failed":
        assert b"Content-Type: application/problem+json\r\n" in answer
    assert statuses(fetch_raw(around)) == [200], "and the next client is served"


@of_files("the room on its disk")
@pytest.mark.parametrize("quick", [False, True], ids=["in-a-thread", "in-the-loop"])
@pytest.mark.skipif(sys.platform == "win32", reason="no limits of that kind there")
def test_an_answer_waits_for_its_commit(db, monkeypatch, quick):
    """And is none of success where that fails, however quick the disk is."""
    monkeypatch.setattr(userapi, "SLOW_SYNC", 60 if quick else 0)
    with hosting(UserAPI(str(db))) as (_, url):
        body = {"item": {"name": "A"}}
        assert fetch(url, "PATCH /api/user/2", body)[0] == 200
        with no_room():
            assert fetch(url, "DELETE /api/user/1")[0] in NO_ROOM
            assert fetch(url, "GET /api/user/1")[0] == 200
        assert fetch(url, "DELETE /api/user/1")[0] == 200
    assert run_sql(db, "SELECT user_id FROM users ORDER BY 1") == [(2,), (3,), (1337,)]


@of_files("its file's permissions")
def test_a_server_on_read_only_media(public):
    with read_only(public), hosting(UserAPI(str(public / "users.db"))) as (_, url):
        assert fetch(url, "DELETE /api/user/1")[0] == 503
        assert json.loads(fetch(url, "GET /api/user")[2]) == {"results": SEED}


def test_a_server_on_a_database_in_memory():
    with hosting(UserAPI(":memory:")) as (_, url):
        assert fetch(url, "POST /api/user", {"item": GRACE})[0] == 201
        answer = {"results": [{"id": 1, **GRACE}]}
        assert json.loads(fetch(url, "GET /api/user")[2]) == answer


def test_who_hangs_up_before_the_answer_has_written_all_the_same(db):
    with hosting(UserAPI(str(db))) as (server, url):
        with contextlib.closing(another(db)) as other:
            other.execute("BEGIN IMMEDIATE")
            with dial(url) as sock:
                sock.sendall(b"DELETE /api/user/1 HTTP/1.1\r\nHost: localhost\r\n\r\n")
                wait_until(lambda: server.committing)
                reset = struct.pack("ii", 1, 0)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            wait_until(lambda: not server.connections)
            other.execute("ROLLBACK")
        wait_until(lambda: fetch(url, "GET /api/user/1")[0] == 404)


@of_files("the lock on it")
def test_who_reads_by_a_token_waits_for_nobody_who_writes(client, db):
    """Although the day of its last use is to be written."""
    token = client.app.store.add_token("ada", "read-only")
    with contextlib.closing(another(db)) as other:
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        answer = client("GET /api/user/1", headers=bearer(token))
        assert answer.status_int == 200 and time.monotonic() - began < 3
        other.execute("ROLLBACK")
    assert client("GET /api/user/1", headers=bearer(token)).status_int == 200
    assert parse_day(client.app.store.tokens()[0][3])


@of_files("its journal")
def test_a_commit_without_a_write_ahead_log_waits_for_who_reads(client, db):
    """As on a file system that processes share no memory on. What is written meanwhile
    is no part of it: another thread has the group's connection."""
    store = client.app.store
    store.open_group()
    store._group.execute("PRAGMA journal_mode = DELETE")
    with contextlib.closing(sqlite3.connect(db, check_same_thread=False)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM users").fetchall()
        assert store.begin_group()
        store.create_users([ADA])
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            committed = pool.submit(store.commit_group)
            wait_until(lambda: store._group_state == "committed")
            pool.submit(lambda: time.sleep(0.05) or reader.rollback())
            store.create_users([GRACE])
            committed.result(60)
    store.close_group()
    assert [user["name"] for user in client.users()[4:]] == [ADA["name"], GRACE["name"]]
    assert [change["user"] for change in client.changes()[-2:]] == [1338, 1339]


def test_the_last_use_of_a_token_is_noted_while_it_serves(db, capfd):
    token = add_token(capfd, db, "ada")
    used = "SELECT used FROM tokens WHERE name = 'ada'"
    with hosting(UserAPI(str(db))) as (server, url):
        assert run_sql(db, used) == [("",)]
        assert fetch(url, "GET /api/user/1", headers=bearer(token))[0] == 200
        pass_a_second(server)
        wait_until(lambda: parse_day(run_sql(db, used)[0][0]))


def parse_day(text: str) -> Any:
    return text and datetime.strptime(text, "%Y-%m-%d")


def test_what_is_not_done_in_time_is_given_up(db, monkeypatch):
    """A body that never ends does not keep the server from ending."""
    monkeypatch.setattr(userapi, "GRACE", 0.05)
    with hosting(UserAPI(str(db))) as (server, url), dial(url) as sock:
        sock.sendall(wire(f"{JSON_POST}Content-Length: 50||half"))
        wait_until(lambda: [one for one in server.connections if one.parser.body])
        server.loop.call_soon_threadsafe(server.stop)
        assert hear(sock) == b""


def test_a_signal_lets_what_was_begun_be_done(db):
    """A body that is on its way is answered, idle connections and streams end."""
    with contextlib.ExitStack() as stack:
        process, url, _ = stack.enter_context(serving("--db", db, "--log", "off"))
        slow, idle, events = [stack.enter_context(dial(url)) for _ in range(3)]
        head = JSON_POST.replace("?dry_run=true", "")
        slow.sendall(wire(f"{head}Content-Length: {SIZE}|Expect: 100-continue||"))
        assert b"100 Continue" in slow.recv(99)
        idle.sendall(ASK_HEALTH)
        assert statuses(idle.recv(65536)) == [200]
        events.sendall(
            b"GET /api/changes?since=4 HTTP/1.0\r\nHost: localhost\r\n"
            b"Accept: text/event-stream\r\n\r\n"
        )
        assert statuses(events.recv(65536)) == [200]
        process.send_signal(signal.SIGTERM)
        assert b"HTTP/" not in hear(idle)
        hear(events)
        assert process.poll() is None
        slow.sendall(JSON_BODY.encode())
        assert statuses(hear(slow)) == [201]
        assert ended(process) == 0
    assert run_sql(db, "SELECT count(*) FROM users") == [(5,)]


def test_events_over_the_wire(db):
    with hosting(UserAPI(str(db))) as (server, url), dial(url) as sock:
        sock.sendall(
            b"GET /api/changes HTTP/1.1\r\nHost: localhost\r\n"
            b"Accept: text/event-stream\r\nLast-Event-ID: 3\r\n\r\n"
        )
        text = b""
        while b"id: 4\n" not in text:
            text += sock.recv(65536)
        assert fetch(url, "DELETE /api/user/1")[0] == 200
        with contextlib.closing(Client(db)) as other:
            other("DELETE /api/user/2")
        while b"id: 6\n" not in text:
            text += sock.recv(65536)
        server.loop.call_soon_threadsafe(server.stop)
        text += hear(sock)
    found = [int(number) for number in re.findall(rb"^id: (\d+)$", text, re.M)]
    assert found == [4, 5, 6]
    assert text.endswith(b"0\r\n\r\n")


@pytest.fixture(scope="module")
def big(template, tmp_path_factory):
    """Five megabytes of users: more than the system buffers between two sockets."""
    path = database(tmp_path_factory.mktemp("big") / "users.db", template)
    source = tmp_path_factory.mktemp("source") / "in.csv"
    mail = f"{'a' * 60}@{'b' * 60}.{'c' * 60}.{'d' * 60}"
    source.write_text("name,mail\n" + f"{'N' * 200},{mail}\n" * 12_000)
    assert main(["import", str(source), "--db", str(path)]) == 0
    return path


@pytest.mark.parametrize(
    "what", ["user", "user?format=csv", "user?format=ndjson", "changes"]
)
def test_all_there_are_come_in_pieces(big, what):
    """However many there are: no piece, and so no moment, holds more than a few."""
    client = Client(big)
    environ = webtest.TestRequest.blank(f"/api/{what}").environ
    environ["REMOTE_ADDR"] = "127.0.0.1"
    sizes = [len(chunk) for chunk in client.app(environ, lambda *start: None)]
    assert sum(sizes) > 1_000_000 and max(sizes) < sum(sizes) / 10
    client.close()


def lazy(url: str) -> socket.socket:
    """A connection whose client has room for next to nothing."""
    sock = socket.socket()
    sock.settimeout(60)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect((urlsplit(url).hostname, urlsplit(url).port))
    return sock


ASK_ALL = b"GET /api/user HTTP/1.1\r\nHost: localhost\r\n\r\n"
ASK_HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def test_a_client_that_takes_nothing_waits_alone(big):
    """Its stream and its further requests pause; others are served; nothing is lost."""
    more = 9000  # requests: more than are read ahead
    with hosting(UserAPI(str(big))) as (_, url), lazy(url) as sock:
        data = ASK_ALL + ASK_HEALTH * more

        def send() -> None:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        assert sock.recv(12) == b"HTTP/1.1 200"
        for _ in range(3):
            assert fetch(url, "GET /api/user/1")[0] == 200
        answers = hear(sock)
        sender.join(60)
    assert len(statuses(answers)) == more
    users = answers[: answers.index(b"\r\n0\r\n\r\n")]
    assert users.count(b'"name"') == 12_004
    assert answers.count(b'{"status": "ok"}') == more


@pytest.mark.skipif(
    not hasattr(socket, "TCP_NOTSENT_LOWAT"), reason="it cannot be told to"
)
def test_the_system_holds_little_of_an_answer(big):
    """Else a slow client would be seen to take something once a megabyte only, and
    be given up meanwhile."""
    with hosting(UserAPI(str(big))) as (server, url), dial(url) as sock:
        sock.sendall(ASK_ALL)
        assert sock.recv(12) == b"HTTP/1.1 200"
        (one,) = server.connections
        wait_until(lambda: one.paused)
        assert one.written - one.unsent() < 1 << 20


def test_a_client_that_takes_nothing_is_given_up(big):
    app = UserAPI(str(big))
    with hosting(app) as (server, url), lazy(url) as sock:
        app.settings.send_timeout = 0.1
        sock.sendall(ASK_ALL)
        metrics = "userapi_connections"
        one = f"^{metrics} 1"
        wait_until(
            lambda: (
                pass_a_second(server)
                or re.search(one, fetch(url, "GET /metrics")[2], re.M)
            )
        )
        assert not hear(sock).endswith(b"0\r\n\r\n")


def test_a_second_signal_ends_it_at_once(big):
    with serving("--db", big, "--log", "off") as (process, url, _), lazy(url) as sock:
        sock.sendall(ASK_ALL)
        assert sock.recv(12) == b"HTTP/1.1 200"
        process.send_signal(signal.SIGTERM)

        def refused() -> bool:
            try:
                dial(url).close()
            except ConnectionError:
                return True
            return False

        wait_until(refused)
        assert process.poll() is None, "it finishes what was begun"
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        ended(process)
        assert time.monotonic() - began < 4, "and not after its five seconds"


@of_files("the room on its disk")
@pytest.mark.skipif(sys.platform == "win32", reason="no limits of that kind there")
def test_without_room_writes_are_a_507_and_reads_go_on(db):
    """A limit on the size of files stands for the full disk."""
    size = db.stat().st_size + 2_000_000
    body = {"items": [{"name": "N" * 200, "mail": "a@b"}] * 500}
    with no_room(size), hosting(UserAPI(str(db))) as (_, url):
        codes = [fetch(url, "POST /api/user", body)[0] for _ in range(10)]
        assert set(codes) == {201, 507} and codes[0] == 201
        assert fetch(url, "POST /api/user", body)[0] == 507
        kept = 4 + 500 * codes.count(201)
        answer = fetch(url, "GET /api/user?count=true&limit=1")
        assert (answer[0], json.loads(answer[2])["total"]) == (200, kept)
        assert fetch(url, "DELETE /api/user/1")[0] == 200, "and what makes room is done"
        kept -= 1
    assert run_sql(db, "SELECT count(*) FROM users") == [(kept,)]


def test_a_unix_socket(command, db, tmp_path):
    path = tmp_path / "s"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    with hosting(UserAPI(str(db), unix=str(path))) as (_, url):
        assert url == f"unix:{path}"
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as sock:
            sock.settimeout(30)
            sock.connect(str(path))
            sock.sendall(b"GET /api/user/1 HTTP/1.0\r\nHost: localhost\r\n\r\n")
            assert statuses(hear(sock)) == [200]
        status, _, err = command("--unix", path)
        assert status == 2 and "another process" in err


#: As a service manager does it: the socket is descriptor 3, the process the one meant.
HAND_OVER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_a_socket_handed_over_and_the_service_manager_told(db, tmp_path):
    told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    told.bind(str(tmp_path / "notify"))
    told.settimeout(30)
    with contextlib.closing(told), contextlib.closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(5)
        number = sock.fileno()
        program = [sys.executable, "-c", HAND_OVER, str(number), *SCRIPT]
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "LISTEN_FDS": "1"}
        with serving("--db", db, program=program, env=env, pass_fds=(number,)) as (
            process,
            url,
            _,
        ):
            assert urlsplit(url).port == sock.getsockname()[1]
            assert told.recv(99) == b"READY=1"
            assert statuses(fetch_raw(url)) == [200]
            process.send_signal(signal.SIGTERM)
            assert told.recv(99) == b"STOPPING=1"
            assert ended(process) == 0


def test_tls(db, tmp_path, monkeypatch):
    import ssl

    monkeypatch.setattr(userapi, "DRAIN", 0.1)

    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    args = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"]
    args += ["ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=localhost"]
    args += ["-addext", "subjectAltName=IP:127.0.0.1"]
    args += ["-keyout", str(key), "-out", str(cert)]
    subprocess.run(args, capture_output=True, timeout=20, check=True)
    with hosting(UserAPI(str(db), cert=str(cert), key=str(key))) as (_, url):
        assert url.startswith("https://")
        context = ssl.create_default_context(cafile=str(cert))
        connection = http.client.HTTPSConnection(
            urlsplit(url).netloc, timeout=30, context=context
        )
        with contextlib.closing(connection):
            for path in ("/api/user/1", "/api/user"):
                connection.request("GET", path)
                answer = connection.getresponse()
                assert answer.status == 200 and b"Simone" in answer.read()
        with context.wrap_socket(dial(url), server_hostname="127.0.0.1") as sock:
            sock.sendall(b"nonsense\r\n\r\n")
            assert statuses(hear(sock)) == [400]


def test_a_key_that_is_none_is_refused(command, tmp_path):
    path = tmp_path / "cert.pem"
    path.write_text("nothing")
    status, _, err = command("--cert", path, "--key", path, "--port", "0")
    assert status in (1, 2) and "cert" in err


LOG_LINE = re.compile(
    r'127\.0\.0\.1 - (\S+) \[[^\]]+\] "(.*)" (\d{3}) (\d+) "(.*)" "(.*)" ([\d.]+)'
)


@pytest.mark.parametrize("format_", ["text", "json"])
def test_the_access_log(db, monkeypatch, format_):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stdout", log)
    odd = {"User-Agent": 'curl "x" \x85', "Referer": "http://localhost/?Token=sesame"}
    with hosting(UserAPI(str(db)), log=format_) as (_, url):
        size = len(fetch(url, "GET /api/user/1", headers=odd)[2])
        fetch(url, "POST /api/user", {"item": GRACE})
        assert statuses(talk(url, b"nonsense\r\n\r\n")) == [400]
        fetch(url, "GET /api/user?access_token=sesame&limit=2")
        large = f"PUT /api/user HTTP/1.1|{AT}Content-Length: 9000000||"
        assert statuses(talk(url, wire(large))) == [413]
    entries = log.getvalue().splitlines()
    assert len(entries) == 5 and "sesame" not in log.getvalue()
    assert "PUT /api/user HTTP/1.1" in entries[4]
    assert "GET /api/user?access_token=" in entries[3] and "&limit=2" in entries[3]
    if format_ == "json":
        entry = json.loads(entries[0])
        assert entry["status"] == 200 and "GET /api/user/1" in str(entry)
        assert json.loads(entries[1])["status"] == 201
    else:
        found = LOG_LINE.fullmatch(entries[0])
        assert found.group(2) == "GET /api/user/1 HTTP/1.1"
        assert (found.group(3), int(found.group(4))) == ("200", size)
        assert all(line.isprintable() and line.isascii() for line in entries)


def test_a_slow_reader_of_the_log_keeps_nobody_waiting(db, monkeypatch):
    """The pipe is full long before; the lines wait, and none is lost."""
    reading, writing = os.pipe()
    numbers = itertools.count()

    def ask(size: int) -> None:
        agent = {"User-Agent": f"{next(numbers):04}{'x' * size}"}
        assert fetch(url, "GET /health", headers=agent)[0] == 200

    with open(writing, "w") as log, open(reading) as pipe:
        monkeypatch.setattr(sys, "stdout", log)
        with hosting(UserAPI(str(db)), log="text") as (server, url):
            for _ in range(30):
                ask(4000)
            for _ in range(2):
                pass_a_second(server)
                ask(1)
            assert server.logging and readable(pipe)
            reader = threading.Thread(target=lambda: told.append(pipe.read()))
            told: list[str] = []
            reader.start()
        log.close()
        reader.join(60)
    found = [int(number) for number in re.findall('"([0-9]{4,})x+"', told[0])]
    assert found == list(range(next(numbers))) and len(found) == 32


def pass_a_second(server: Any) -> None:
    """Have the server do now what it does once a second."""
    done_ = threading.Event()
    server.loop.call_soon_threadsafe(lambda: (server.sweep(), done_.set()))
    assert done_.wait(30)


def readable(file: Any) -> bool:
    return bool(select.select([file], [], [], 0)[0])


def talk(url: str, data: bytes) -> bytes:
    with dial(url) as sock:
        sock.sendall(data)
        return hear(sock)


# ------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------

REFUSED = ["--nonsense", "nonsense", "serve extra", "--db ''", "--port x", "--port -1"]
REFUSED += ["--port 65536", "--por 0", "--token secret", "--token=secret", "--log loud"]
REFUSED += ["--max-body x", "--host 0.0.0.0 --port 0", "--host :: --port 0"]
REFUSED += ["--host 192.0.2.1 --port 0", "--cert nothing.pem --port 0", "import"]
REFUSED += [
    "import x.csv --conflict maybe",
    "export --format xml",
    "backup",
    "backup -",
]
REFUSED += ["token", "token list desk", "token list --read-only", "token add"]
REFUSED += ["token revoke desk --read-only", "token add 'two words'", "token add admin"]
REFUSED += ["token nonsense", "--unix users.db"]


@pytest.mark.parametrize("words", REFUSED)
def test_wrong_usage_is_a_2(capfd, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    db = Path(shutil.copy(HERE / "users.db.sample", tmp_path / "users.db"))
    before = db.read_bytes()
    status, out, err = run_main(capfd, *shlex.split(words))
    assert status == 2 and err.strip() and "secret" not in out + err
    assert db.read_bytes() == before


def test_a_public_address_without_a_token_says_what_to_do(command):
    status, _, err = command("--host", "0.0.0.0", "--port", "0")
    assert status == 2
    assert "USERAPI_TOKEN" in err or "token" in err


@pytest.mark.parametrize(
    "name, text",
    [("UNIQUE_MAIL", "maybe"), ("PORT", "x"), ("LOG", "loud"), ("MAX_BODY", "-")],
)
def test_a_refused_variable_is_a_2_that_names_it(command, monkeypatch, name, text):
    monkeypatch.setenv(f"USERAPI_{name}", text)
    status, _, err = command("serve", "--port", "0") if name != "PORT" else command()
    assert status == 2
    assert name.lower() in err.lower().replace("-", "_")


def test_a_public_address_without_a_token_makes_no_database(capfd, tmp_path):
    path = tmp_path / "new.db"
    args = ["--host", "0.0.0.0", "--port", "0", "--db", str(path)]
    assert run_main(capfd, *args)[0] == 2
    assert not path.exists()


def test_what_is_no_command_is_told_which_there_are(capfd):
    status, _, err = run_main(capfd, "improt", "x.csv")
    assert status == 2 and "'improt'" in err and "import" in err.split("choose")[1]


def test_a_unix_socket_whose_path_is_too_long_is_refused(command, tmp_path):
    status, _, err = command("--unix", tmp_path / ("x" * 200))
    assert status == 2 and "too long" in err


def test_a_unix_socket_where_there_are_none_is_refused(command, tmp_path, monkeypatch):
    monkeypatch.delattr(socket, "AF_UNIX")
    status, _, err = command("--unix", tmp_path / "s")
    assert status == 2 and "Unix" in err


def test_a_token_file_that_others_can_read_is_refused(command, tmp_path):
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    path.chmod(0o644)
    status, _, err = command("serve", "--port", "0", "--token-file", path)
    assert status == 2 and TOKEN not in err


def test_help_and_version(capfd):
    status, out, _ = run_main(capfd, "--help")
    assert status == 0 and "import" in out and "backup" in out
    status, out, _ = run_main(capfd, "--version")
    assert status == 0 and userapi.__version__ in out


@pytest.mark.parametrize("name", [*userapi.COMMANDS])
def test_the_help_of_a_command_explains_each_argument(name):
    _, _, arguments = userapi.COMMANDS[name]
    told = {argument for argument, options in arguments.items() if options.get("help")}
    assert told == {*arguments} - {"action"}  # whose choices say it all


def test_every_setting_is_a_flag(capfd):
    out = run_main(capfd, "serve", "--help")[1]
    for setting in userapi.SETTINGS:
        flag = "--" + setting.name.replace("_", "-")
        assert (flag in out) or setting.name == "token", flag
    assert "--token-file" in out
    assert not re.search(r"--token[ =,\]]", out)


def test_a_flag_beats_the_variable_of_what_is_true(command, monkeypatch, tmp_path):
    again = tmp_path / "again.csv"
    again.write_text(f"name,mail\nA,{ZOE['mail']}\n")
    monkeypatch.setenv("USERAPI_UNIQUE_MAIL", "yes")
    assert command("import", again)[0] == 1
    assert command("import", again, "--no-unique-mail")[0] == 0


def test_a_flag_beats_the_variable(capfd, db, monkeypatch, tmp_path):
    monkeypatch.setenv("USERAPI_DB", str(tmp_path / "empty.db"))
    UserAPI().close()
    assert run_main(capfd, "export", "--format", "csv")[1].strip() == "id,name,mail"
    out = run_main(capfd, "export", "--format", "csv", "--db", str(db))[1]
    assert "Simone" in out


@pytest.mark.parametrize("format_", ["csv", "ndjson", "json"])
def test_export(command, client, tmp_path, format_):
    shown = {"json": "GET /api/v2/user", "csv": "GET /api/user?format=csv"}
    shown["ndjson"] = "GET /api/v2/user?format=ndjson"
    wanted = client(shown[format_]).body
    target = tmp_path / "out.txt"
    assert command("export", target, "--format", format_) == (0, "", "")
    if format_ == "json":
        assert (
            json.loads(target.read_bytes())["results"] == json.loads(wanted)["results"]
        )
    else:
        assert target.read_bytes() == wanted
    status, out, err = command("export", "--format", format_)
    assert (status, err) == (0, "")
    assert out.replace("\r\n", "\n") == target.read_text("utf-8")


def test_import(command, client, tmp_path):
    source = tmp_path / "in.csv"
    source.write_bytes("id,name,mail\r\n1,Other,o@x\r\n,Zoé,z@x\r\n".encode())
    status, _, err = command("import", source)
    assert status == 1 and "2" in err
    assert len(client.users()) == 4
    assert command("import", source, "--conflict", "skip", "--dry-run")[0] == 0
    assert len(client.users()) == 4
    status, out, err = command("import", source, "--conflict", "replace")
    assert status == 0 and "1" in out + err
    assert client("GET /api/user/1").json["results"][0]["name"] == "Other"
    assert client("GET /api/user/1338").json["results"][0]["name"] == "Zoé"


def test_a_dry_import_makes_no_database(capfd, tmp_path):
    source = tmp_path / "in.csv"
    source.write_text("name,mail\nA,a@b\n")
    args = ["import", str(source), "--dry-run", "--db", str(tmp_path / "new.db")]
    status, out, _ = run_main(capfd, *args)
    assert (status, out) == (0, "1 created, 0 replaced, 0 skipped\n")
    assert list(tmp_path.iterdir()) == [source]


@of_files("it has a log of another kind")
@pytest.mark.parametrize("open_elsewhere", [False, True])
def test_an_import_into_a_new_database_needs_no_log(tmp_path, capfd, open_elsewhere):
    """Unless another program has it open; whoever opens it next has one again."""
    db, source = tmp_path / "new.db", tmp_path / "users.csv"
    source.write_text("name,mail\nA,a@b\nB,b@b\n")
    userapi.Store(str(db)).close()
    other = sqlite3.connect(db)
    if open_elsewhere:
        other.execute("SELECT count(*) FROM users").fetchone()
    assert main(["import", str(source), "--db", str(db)]) == 0
    mode = "wal" if open_elsewhere else "delete"
    assert other.execute("PRAGMA journal_mode").fetchone() == (mode,)
    other.close()
    assert run_sql(db, "PRAGMA integrity_check") == [("ok",)]
    client = Client(db)
    assert run_sql(db, "PRAGMA journal_mode") == [("wal",)]
    assert [user["name"] for user in client.users()] == ["A", "B"]
    client.close()
    assert main(["import", str(source), "--db", str(db)]) == 0
    assert run_sql(db, "PRAGMA journal_mode") == [("wal",)], "it is no longer new"


@of_files("it has a log of another kind")
def test_nobody_opens_a_new_database_while_it_is_filled(tmp_path, monkeypatch):
    monkeypatch.setattr(userapi.Database, "patience", 0.01)
    db = str(tmp_path / "new.db")
    store = userapi.Store(db)
    store.expect_many()
    with store.transaction():
        store.create_users([{"name": "A", "mail": "a@b"}])
        with pytest.raises(Problem) as refused:
            userapi.Store(db)
    assert refused.value.status == 503
    assert refused.value.detail == "another program holds the database"
    store.close()
    other = userapi.Store(db)
    assert [user["name"] for user in other.find_users()] == ["A"]
    other.close()


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal there")
def test_an_import_that_is_interrupted_keeps_nothing(db):
    """More than a pipe holds has been taken, so it is in the midst of it."""
    process = subprocess.Popen(
        [*PROGRAM, "import", "-", "--db", str(db)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    process.stdin.write(b"name,mail\n" + b"A,a@b\n" * 16_000)
    process.stdin.flush()
    process.send_signal(signal.SIGINT)
    assert ended(process) == 1
    with process:
        out, err = process.stdout.read(), process.stderr.read()
    assert (out, err) == (b"", b"userapi: interrupted\n")
    assert run_sql(db, "SELECT count(*) FROM users") == [(4,)]


def test_import_of_ndjson_and_export_are_lossless(command, client, db, tmp_path, capfd):
    """The versions too: who moves a database moves its ETags."""
    client("PATCH /api/user/3", {"item": {"name": "New"}})
    client("PUT /api/user/3/phone/1", {"item": MOBILE})
    first = tmp_path / "out.ndjson"
    command("export", first, "--format", "ndjson")
    other = str(tmp_path / "other.db")
    assert run_main(capfd, "import", str(first), "--db", other)[0] == 0
    second = tmp_path / "again.ndjson"
    run_main(capfd, "export", str(second), "--format", "ndjson", "--db", other)
    assert first.read_bytes() == second.read_bytes()


def test_an_import_keeps_a_version_that_no_deleted_user_had(command, client, tmp_path):
    client("DELETE /api/user?id=1,2")
    path = tmp_path / "in.ndjson"
    users = (
        {"id": id, "version": version, **GRACE} for id, version in ((1, 9), (2, 1))
    )
    path.write_text("".join(json.dumps(user) + "\n" for user in users))
    assert command("import", path)[0] == 0
    assert [client.etag(1), client.etag(2)] == ['"9"', '"2"']


FILES = {
    "users.csv": "name,mail\nA,a@b\n",
    "users.ndjson": json.dumps({"name": "A", "mail": "a@b"}),
    "users.txt": "\ufeffmail,name\na@b,A\n",
    "users": "\n" + json.dumps({"name": "A", "mail": "a@b"}) + "\n",
}


@pytest.mark.parametrize("name", FILES)
def test_an_import_knows_its_format(command, client, tmp_path, name):
    source = tmp_path / name
    source.write_text(FILES[name], "utf-8")
    assert command("import", source)[0] == 0
    assert client("GET /api/user/1338").json == {
        "results": [{"id": 1338, "name": "A", "mail": "a@b"}]
    }


@pytest.mark.parametrize("end", ["csv", "ndjson", "json"])
def test_an_export_is_what_its_name_says(command, tmp_path, end):
    assert command("export", tmp_path / f"out.{end}")[0] == 0
    assert command("export", tmp_path / "out", "--format", end)[0] == 0
    assert (tmp_path / f"out.{end}").read_bytes() == (tmp_path / "out").read_bytes()


def test_an_export_to_a_name_that_says_no_format_asks_for_one(command, tmp_path):
    status, _, err = command("export", tmp_path / "out.txt")
    assert status == 2 and "--format" in err
    assert not (tmp_path / "out.txt").exists()


@pytest.mark.parametrize(
    "argv", [["export"], ["check"], ["backup", "copy.db"]], ids=str
)
def test_a_database_that_is_not_there(capfd, tmp_path, monkeypatch, argv):
    """A slip of the pen in --db must not be an empty backup each night."""
    monkeypatch.chdir(tmp_path)
    status, _, err = run_main(capfd, *argv, "--db", "typo.db")
    assert status == 1 and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals there")
def test_a_terminal_gets_a_progress_bar(db, tmp_path, monkeypatch):
    """Rows are sent for as long as it takes to be told of them."""
    import pty

    ours, theirs = pty.openpty()
    os.mkfifo(path := tmp_path / "users.csv")
    argv = ["import", str(path), "--db", str(db)]
    with concurrent.futures.ThreadPoolExecutor(1) as pool, open(ours, "rb", 0) as told:
        with open(theirs, "w") as terminal:
            monkeypatch.setattr(sys, "stderr", terminal)
            status = pool.submit(main, argv)
            with path.open("wb") as rows:
                rows.write(b"name,mail\n")
                more = b"A,a@b\n" * 1000
                wait_until(lambda: readable(told) or not rows.write(more))
            text = told.read(4096)
            assert status.result(60) == 0
        with contextlib.suppress(OSError):  # which is how it ends
            while part := told.read(4096):
                text += part
    assert re.match(rb"\r\[[# ]{30}\] \d+ rows, \d+/s, \d+ s left ", text)
    assert text.endswith(b"\r\x1b[K") and b"\n" not in text


@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
def test_no_progress_bar_stands_amid_what_goes_to_the_terminal(command, monkeypatch):
    import pty

    ours, theirs = pty.openpty()
    with open(ours, "rb", 0) as told, open(theirs, "w") as terminal:

        def shown() -> bytes:
            print("end", end="", file=terminal, flush=True)
            text = told.read(1)
            while not text.endswith(b"end"):
                text += told.read(1)
            return text[:-3]

        monkeypatch.setattr(sys, "stderr", terminal)
        assert command("export")[0] == 0
        assert shown().endswith(b"\r\x1b[K"), "as only the one goes to it"
        monkeypatch.setattr(sys, "stdout", terminal)
        status, out, _ = command("export")
        assert (status, out.count("\n"), shown()) == (0, 4, b"")


def test_a_progress_bar_says_how_much_is_left(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = f"\r[{'#' * 7}{' ' * 23}] 50 rows, 5/s, 30 s left "
    with pytest.raises(OSError), userapi.Progress("rows") as progress:
        progress.show(50, 0.25)
        assert terminal.getvalue() == "", "not before a tenth of a second"
        progress.began = progress.shown = time.monotonic() - 10
        progress.show(50, 0.25)
        assert terminal.getvalue() == bar
        raise OSError
    assert terminal.getvalue() == f"{bar}\r\x1b[K", "out of the way of the message"


def test_import_names_the_bad_lines_and_keeps_nothing(command, client, tmp_path):
    source = tmp_path / "in.csv"
    bad = {500: ",a@b", 700: "A,nope", 900: "A"}
    rows = [bad.get(line, "A,a@b") for line in range(2, 1001)]
    source.write_text("name,mail\n" + "\n".join(rows) + "\n")
    status, _, err = command("import", source)
    assert status == 1
    assert not [line for line in bad if str(line) not in err]
    assert len(client.users()) == 4


def test_what_a_file_holds_commands_no_terminal(command, tmp_path):
    source = tmp_path / "in.csv"
    source.write_text("name,mail,\x1b[31m\x07\nA,a@b,1\n")
    status, _, err = command("import", source)
    assert status == 1 and r"\x1b[31m\x07 is no column" in err and "\x1b" not in err


FAILING = [
    ("import", "missing.csv"),
    ("export", "no/such/folder/out.csv"),
    ("backup", "no/such/folder/users.db"),
    ("token", "revoke", "nobody"),
]


@pytest.mark.parametrize("argv", FAILING, ids=" ".join)
def test_a_failure_is_a_1_and_one_line(command, tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    status, out, err = command(*argv)
    assert (status, out) == (1, "") and len(err.strip().splitlines()) == 1


@of_files("the copy of a file")
def test_backup_is_a_whole_copy(command, client, connect, tmp_path):
    target = tmp_path / "copy.db"
    assert command("backup", target)[0] == 0
    assert connect(target).users() == client.users()
    assert run_sql(target, "PRAGMA integrity_check") == [("ok",)]


@of_files("the copy of a file")
def test_after_a_backup_the_store_is_written_to_as_before(client, tmp_path):
    memory, told_ = userapi.Store(":memory:"), []
    for store in (client.app.store, memory):
        store.backup(str(tmp_path / "copy.db"), lambda *done: told_.append(done))
        store.create_users([GRACE])
        assert run_sql(tmp_path / "copy.db", "PRAGMA journal_mode") == [("delete",)]
    assert memory.count_users() == 1 and len(client.users()) == 5
    assert told_ and all(done == total > 0 for done, total in told_)


@pytest.mark.parametrize("end", ["-wal", "-journal"])
def test_a_backup_goes_to_no_place_where_a_log_stands(command, tmp_path, end):
    """SQLite would take it for the copy's own."""
    target, beside = tmp_path / "copy.db", tmp_path / f"copy.db{end}"
    beside.write_bytes(b"of another")
    status, _, err = command("backup", target)
    assert status == 1 and len(err.strip().splitlines()) == 1
    assert not target.exists() and beside.read_bytes() == b"of another"
    target.symlink_to(tmp_path / "other.db")
    beside.rename(tmp_path / f"other.db{end}")
    assert command("backup", target)[0] == 1 and not target.exists()


@of_files("the copy of a file")
def test_two_backups_to_one_place_at_once_are_both_whole(client, tmp_path):
    target, inside = str(tmp_path / "copy.db"), []

    def again(*_: int) -> None:
        if not inside:
            inside.append(True)
            client.app.store.backup(target, again)

    client.app.store.backup(target, again)
    assert inside and run_sql(target, "PRAGMA integrity_check") == [("ok",)]
    assert sorted(path.name for path in tmp_path.glob("copy*")) == ["copy.db"]


@of_files("the copy of a file")
@pytest.mark.parametrize("argv", [["backup"], ["export", "--format", "csv"]], ids=str)
def test_what_comes_out_of_it_does_not_replace_its_log(command, db, connect, argv):
    with contextlib.closing(connect(db)) as log:  # which is there as long as this
        log("POST /api/user", {"item": {"name": "Ada", "mail": "ada@example.org"}})
        for end in ("", "-wal", "-shm"):
            before = db.with_name(db.name + end).read_bytes()
            status, _, err = command(*argv, f"{db}{end}")
            assert status == 1 and err.count("\n") == 1
            assert db.with_name(db.name + end).read_bytes() == before


@of_files("the copy of a file")
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has none")
def test_of_what_is_not_written_to_its_end_nothing_is_left(db, tmp_path):
    path = tmp_path / "out"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), userapi.whole_file(str(path), str(db)):
        1 / 0  # noqa: B018
    assert path.read_text() == "before" and not list(tmp_path.glob("*.part"))


def test_a_backup_replaces_nothing_but_a_file(command, tmp_path):
    """Run by root with /dev/null, it would take that from the whole machine."""
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        status, _, err = command("backup", tmp_path / name)
        assert status == 1 and err.count("\n") == 1
    assert (tmp_path / "pipe").is_fifo()


@of_files("the rights of its file")
@pytest.mark.skipif(sys.platform == "win32", reason="has other rights")
@pytest.mark.parametrize("argv", [["backup"], ["export", "--format", "csv"]], ids=str)
def test_what_comes_out_of_it_is_no_more_open_than_the_database(command, db, argv):
    target, link = db.parent / "target", db.parent / "link"
    link.symlink_to(target)
    db.chmod(0o600)
    for mode in (0o600, 0o640, 0o600):
        assert command(*argv, link)[0] == 0
        assert link.is_symlink() and target.stat().st_size > 100
        assert target.stat().st_mode & 0o777 == mode
        target.chmod({0o600: 0o640, 0o640: 0o400}[mode])
    assert not [path for path in db.parent.iterdir() if path.suffix == ".part"]


@of_files("a file that could be written over")
@pytest.mark.parametrize("argv", [["backup"], ["export", "--format", "csv"]], ids=str)
def test_the_database_is_not_written_over_by_what_comes_out_of_it(command, db, argv):
    """A server that has it open would go on with a file that nobody finds."""
    before = db.stat().st_ino
    status, _, err = command(*argv, db.parent / "." / db.name)
    assert status == 1 and "the database itself" in err
    assert command("check")[0] == 0 and db.stat().st_ino == before


def test_check_names_what_is_missing_and_what_is_nobodys(command, db):
    run_sql(db, "DROP INDEX users_by_mail")
    if not POSTGRESQL:
        run_sql(db, "DROP TRIGGER users_delete")
    run_sql(db, "INSERT INTO user_phone (user_id, id, number) VALUES (99, 1, '112')")
    status, out, err = command("check")
    assert (status, out) == (1, "")
    lines_ = err.splitlines()
    assert "users_by_mail is missing" in lines_[0]
    assert POSTGRESQL or "users_delete is missing" in lines_[1]
    assert "1 rows of user_phone" in lines_[-1] and len(lines_) == 2 + (not POSTGRESQL)


@of_files("its file")
def test_check_of_a_whole_and_of_a_broken_database(command, client, db):
    assert command("check")[0] == 0
    items = [{"name": f"N{n}", "mail": f"n{n}@example.org"} for n in range(3000)]
    client("POST /api/user", {"items": items})
    client.close()
    size = db.stat().st_size
    with db.open("r+b") as file:
        for place in range(size // 4096 // 2, size // 4096 - 1, 3):
            file.seek(place * 4096 + 8)
            file.write(b"\xff" * 600)
    before = db.read_bytes()
    status, _, err = command("check")
    assert status == 1 and err.strip()
    assert db.read_bytes() == before


def test_tokens(command, db):
    status, out, _ = command("token", "add", "ada")
    assert status == 0
    token = max(re.findall(r"[\w.~+/=-]+", out), key=len)
    assert len(token) >= 43
    assert command("token", "add", "ada")[0] == 1
    assert command("token", "add", "rob", "--read-only")[0] == 0
    status, out, _ = command("token", "list")
    assert status == 0 and token not in out
    (ada,) = [line for line in out.splitlines() if "ada" in line]
    (rob,) = [line for line in out.splitlines() if "rob" in line]
    assert "admin" in ada and "read-only" in rob
    assert datetime.now(timezone.utc).strftime("%Y-%m-%d")[:8] in ada
    assert command("token", "revoke", "ada")[0] == 0
    assert "ada" not in command("token", "list")[1]
    assert command("token", "revoke", "ada")[0] == 1


@pytest.mark.parametrize("name", ["openapi", "postman"])
def test_printed_documents_are_the_served_ones(capfd, client, name):
    status, out, err = run_main(capfd, name)
    assert (status, err) == (0, "")
    served = client(f"GET /{name}.json").text.replace("http://localhost:80", "BASE")
    served = served.replace("http://localhost", "BASE")
    assert json.loads(out.replace("http://127.0.0.1:8080", "BASE")) == json.loads(
        served
    )


# --- real processes

START = re.compile(
    r"userapi (\S+) on (http://127\.0\.0\.1:\d+/) · \S*/users\.db, 4 users · "
    r"no token: this host only\n"
)


def test_it_serves_and_ends_when_told(db):
    with serving("--db", db, program=SCRIPT) as (process, url, line):
        assert START.fullmatch(re.sub(r"//[\w.:]+/t\d+", "/users.db", line)), line
        assert fetch(url, "GET /api/user/1")[2] == json.dumps({"results": [SIMONE]})
        status, headers, text = fetch(url, "POST /api/user", {"item": GRACE})
        assert (status, json.loads(text)["results"]) == (201, [NEW])
        assert fetch(url, "DELETE /api/user/1337")[2] == json.dumps(SUCCESS)
        assert "Python" not in headers.get("Server", "")
        process.send_signal(signal.SIGTERM)
        assert ended(process) == 0
    assert POSTGRESQL or [file.name for file in db.parent.iterdir()] == ["users.db"]
    assert run_sql(db, "SELECT count(*) FROM users") == [(4,)]


def test_it_serves_with_a_token_and_never_logs_it(db, tmp_path):
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    path.chmod(0o600)
    args = ["--db", db, "--token-file", path, "--log", "json", "--host", "0.0.0.0"]
    log_file = tmp_path / "log"
    with log_file.open("w") as out, serving(*args, out=out) as (process, url, line):
        url = url.replace("0.0.0.0", "127.0.0.1")
        assert "this host only" not in line
        assert fetch(url, "GET /api/user/1")[0] == 401
        assert fetch(url, "GET /api/user/1", headers=bearer(TOKEN))[0] == 200
        assert fetch(url, f"GET /api/user/1?token={TOKEN[:9]}")[0] == 401
        process.send_signal(signal.SIGINT)
        log = process.stderr.read() + log_file.read_text()
        assert ended(process) == 0
    entries = [json.loads(entry) for entry in log.splitlines() if entry.startswith("{")]
    assert len(entries) >= 3
    assert TOKEN not in line + log


def test_a_port_that_is_taken_is_one_line(command):
    with contextlib.closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        status, _, err = command("--port", other.getsockname()[1])
    assert status == 2 and len(err.strip().splitlines()) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork there")
def test_import_from_standard_input_and_export_to_a_pipe(db):
    program = each((0, "import", "-"), ["export", "--format", "csv"])
    text = "name,mail\nZoé,z@x\n".encode()
    done_ = run(*program, input=text, env={"USERAPI_DB": str(db)})
    assert (done_.returncode, done_.stderr) == (0, b"")
    counts_ = "1 created, 0 replaced, 0 skipped\n"
    assert done_.stdout == (counts_ + CSV_TEXT + "1338,Zoé,z@x\r\n").encode()


@pytest.mark.parametrize("begins", ["name,mail\nx", "[x"], ids=["csv", "ndjson"])
def test_a_line_without_end_is_refused_in_bounded_memory(command, tmp_path, begins):
    file, told = tmp_path / "in", []
    file.write_text(begins)
    os.truncate(file, 40 << 20)
    media = "csv" if "mail" in begins else "ndjson"
    import_ = ("import", file, "--format", media)
    assert room_for(lambda: told.append(command(*import_))) < 40 << 20
    ((status, _, err),) = told
    assert status == 1 and f"line {begins.count('mail') + 1}: # is not valid" in err


BUFFERED = {"PYTHONUNBUFFERED": ""}
PRINTING = [(1, "openapi"), (1, "token", "add", "desk"), (1, "check")]


@pytest.mark.skipif(sys.platform != "linux", reason="has no /dev/full")
def test_what_cannot_be_printed_is_a_1_and_one_line(db):
    env = {**BUFFERED, "USERAPI_DB": str(db)}
    with open("/dev/full", "w") as full:
        done_ = run(*each(*PRINTING, ["openapi"]), stdout=full, env=env)
    assert done_.returncode == 1
    assert re.fullmatch(b"(userapi: .*\n){4}", done_.stderr)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork there")
def test_who_reads_what_is_printed_may_go_away(db, big):
    """A command ends with a 1 and without a word, in the midst of its output or before
    it; a server whose log nobody reads ends as any other."""
    ours, theirs = os.pipe()
    reader = threading.Thread(target=lambda: os.read(ours, 10) and os.close(ours))
    reader.start()
    program = each((1, "export", "--db", big), *PRINTING, ["--db", db])
    env = {**BUFFERED, "USERAPI_DB": str(db)}
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(open(theirs, "wb"))
        server = serving(program=program, out=out, env=env)
        process, url, _ = stack.enter_context(server)
        out.close()
        reader.join(60)
        assert statuses(fetch_raw(url)) == [200]
        process.terminate()
        assert ended(process) == 0
        assert process.stderr.read() == ""


@pytest.mark.skipif(sys.platform == "win32", reason="closes no descriptors so")
def test_standard_output_and_error_may_be_closed(db, tmp_path):
    """What has nothing to say is done, a server serves; what cannot be said is a 1."""
    env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "USERAPI_DB": str(db)}

    def start(*closed: int) -> Any:
        checked, copy = (int(1 in closed), "check"), tmp_path / f"{closed}.csv"
        return subprocess.Popen(
            each((0, "export", copy), checked, (2, "--port", "x"), ["--port", "0"]),
            preexec_fn=lambda: os.closerange(closed[0], closed[-1] + 1),
            env={**os.environ, **env},
        )

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(env["NOTIFY_SOCKET"])
        told.settimeout(30)
        servers = [start(1), start(2), start(0, 1, 2)]
        assert [told.recv(99) for _ in servers] == [b"READY=1"] * 3
        for server in servers:
            server.terminate()
        assert [ended(server) for server in servers] == [0] * 3
    copies = [path.read_bytes().decode() for path in tmp_path.glob("*.csv")]
    assert copies == [CSV_TEXT] * 3


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no named pipes")
def test_a_server_that_is_told_to_end_before_it_listens_has_done_its_work(tmp_path):
    os.mkfifo(path := tmp_path / "token", 0o600)
    argv = [*PROGRAM, "--db", tmp_path / "users.db", "--token-file", path]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE)
    with process, path.open("w"):  # from here on it reads
        process.send_signal(signal.SIGTERM)
        assert (ended(process), process.stderr.read()) == (0, b"")


def test_the_documents_are_printed_on_any_terminal(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["openapi"]) == 0
    assert json.loads(terminal.buffer.getvalue()) == userapi.openapi()


@pytest.mark.skipif(sys.platform == "win32", reason="has no named pipes")
def test_an_export_goes_into_a_pipe_as_it_is(command, tmp_path):
    pipe = tmp_path / "users.csv"
    os.mkfifo(pipe)
    with open(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        assert command("export", pipe) == (0, "", "")
        assert file.read() == CSV_TEXT.encode()
    assert pipe.is_fifo()


@of_files("there is none before")
def test_an_import_of_nothing_makes_no_database(command, db):
    db.unlink()
    assert command("import", "missing.csv")[0] == 1
    assert not db.exists()


def test_importing_the_module_does_nothing(tmp_path):
    code = "import userapi, os; print(os.listdir('.'))"
    env = {"PYTHONDONTWRITEBYTECODE": "1"}
    out = run(sys.executable, "-c", code, cwd=tmp_path, env=env)
    assert (out.returncode, out.stdout, out.stderr) == (0, b"[]\n", b"")


def test_without_bottle_one_line_says_how_to_get_it(tmp_path):
    """Python without its site packages: Bottle is not there."""
    copy = shutil.copy(HERE / "userapi.py", tmp_path)
    out = run(sys.executable, "-I", "-S", copy, "--port", "0")
    assert out.returncode in (1, 2)
    assert len(out.stderr.strip().splitlines()) == 1
    assert b"pip" in out.stderr and b"bottle.py" in out.stderr


@pytest.mark.parametrize("name", ["__main__", "alone"])
def test_without_bottle_it_says_how_to_get_it_however_it_is_run(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "bottle", None)
    code = compile((HERE / "userapi.py").read_bytes(), userapi.__file__, "exec")
    with pytest.raises((SystemExit, ImportError)) as ended:
        exec(code, {"__name__": name})  # and without a __spec__: it stays here
    assert isinstance(ended.value, SystemExit) == (name == "__main__")
    assert "pip" in str(ended.value) and "bottle.py" in str(ended.value)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="nothing is limited there")
def test_it_starts_where_files_may_not_be_large():
    """A file that it makes at its start is cut short then."""
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, 2**17))

    out = run(*SCRIPT, "--version", preexec_fn=limit)
    assert (out.returncode, out.stdout) == (0, f"{userapi.__version__}\n".encode())


# ------------------------------------------------------------------------------------
# README
# ------------------------------------------------------------------------------------


def readme() -> str:
    return (HERE / "README.md").read_text("utf-8")


def commands(text: str) -> list[tuple[str, str]]:
    """The commands of the console blocks, each with the answer printed under it.

    A command starts with `$ ` and goes on where a line ends in a backslash."""
    found = []
    for block in re.findall(r"^```console\n(.*?)^```", text, re.M | re.S):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            head = re.match(r"(?:[^\n]*\\\n)*[^\n]*", part).group()
            found.append((head, part[len(head) :].strip()))
    return found


def same(wanted: str, got: str) -> bool:
    """Equal, where `…` in the README stands for anything."""
    if "…" not in wanted:
        with contextlib.suppress(ValueError):
            return json.loads(wanted) == json.loads(got)
    words = [re.escape(word) for word in re.split("…", " ".join(wanted.split()))]
    return bool(re.fullmatch(".*".join(words), " ".join(got.split()), re.S))


def test_the_readmes_examples_are_true(tmp_path):
    """Every `$ curl` in order, on a fresh server with the sample's users."""
    shutil.copy(HERE / "users.db.sample", tmp_path / "users.db")
    examples = [pair for pair in commands(readme()) if "curl" in pair[0]]
    assert len(examples) >= 5
    with serving("--db", "users.db", cwd=tmp_path) as (_, url, _):
        for line, wanted in examples:
            line = line.replace("http://127.0.0.1:8080/", url)
            line = line.replace("http://localhost:8080/", url)
            out = run("sh", "-c", line, cwd=tmp_path, text=True, encoding="utf-8")
            assert same(wanted, out.stdout), f"{line}\n{out.stdout}{out.stderr}"


def test_the_readmes_settings_are_the_codes():
    rows = re.findall(r"^\| *`([a-z_]+)` *\|(.*)\|$", readme(), re.M)
    assert [name for name, _ in rows] == [one.name for one in userapi.SETTINGS]
    for (_, cells), one in zip(rows, userapi.SETTINGS):
        assert one.help in cells
