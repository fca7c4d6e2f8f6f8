"""userapi inside other programs: mounted, served by others, installed, alone.

Mounted means: whatever a client gets directly from userapi, it gets through the parent
too, byte for byte, but for the prefix. So one battery of requests is sent to a bare
application and through each parent, and the answers are compared.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import io
import itertools
import json
import os
import pathlib
import queue
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import sysconfig
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote, unquote_to_bytes, urljoin, urlsplit
from wsgiref.simple_server import make_server
from wsgiref.util import setup_testing_defaults, shift_path_info

import bottle
import pytest

import userapi
from userapi import Problem, UserAPI

HERE = pathlib.Path(__file__).resolve().parent.parent
MODULE = HERE / "userapi.py"
EXAMPLES = HERE / "examples"
PREFIX = "/below/here"
PATIENCE = 60  # seconds that a busy machine may need for what takes a moment

# Times are given, so that two databases made from this hold the same bytes.
SEED = "\n".join(
    json.dumps(user)
    for user in (
        {
            "id": 1,
            "name": "Simone Giertz",
            "mail": "giertz@shittyrobots.loc",
            "phone": [{"label": "work", "number": "+46 8 1234567"}],
            "address": [{"label": "home", "city": "Stockholm", "country": "SE"}],
            "created": "2020-01-01T00:00:00Z",
            "updated": "2020-01-02T00:00:00Z",
        },
        {
            "id": 2,
            "name": "Zoë \u05d3\u05e0\u05d4",
            "mail": "zoe@example.org",
            "created": "2020-01-03T00:00:00Z",
            "updated": "2020-01-03T00:00:00Z",
        },
        {
            "id": 1337,
            "name": "=cmd",
            "mail": "leet@example.org",
            "created": "2020-01-04T00:00:00Z",
            "updated": "2020-01-04T00:00:00Z",
        },
    )
)


# -- asking ---------------------------------------------------------------------------


class Answer:
    """What came back: status, headers without regard to case, bytes."""

    def __init__(self, status, headers, body):
        self.status = status
        self.headers = [(name.lower(), value) for name, value in headers]
        self.body = body

    def __getitem__(self, name):
        return dict(self.headers)[name.lower()]

    @property
    def json(self):
        return json.loads(self.body)

    def __repr__(self):
        return f"<{self.status} {self.headers} {self.body[:500]!r}>"


def environ_of(method, target, body=None, headers=None, **more):
    """What a WSGI server would hand over for a request from this host."""
    path, _, query = target.partition("?")
    environ = {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": unquote_to_bytes(path).decode("latin-1"),
        "QUERY_STRING": query,
        "REMOTE_ADDR": "127.0.0.1",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "HTTP_HOST": "127.0.0.1",
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
    }
    if body is not None:
        environ["wsgi.input"] = io.BytesIO(body)
        environ["CONTENT_LENGTH"] = str(len(body))
    for name, value in (headers or {}).items():
        key = name.upper().replace("-", "_")
        environ[key if key == "CONTENT_TYPE" else "HTTP_" + key] = value
    environ.update(more)
    setup_testing_defaults(environ)
    return environ


def start(app, environ):
    """Call a WSGI application: status, headers, the chunks still to be iterated."""
    started = []
    written = []

    def start_response(status, headers, exc_info=None):
        started[:] = [int(status.split()[0]), headers]
        return written.append

    chunks = app(environ, start_response)
    # some applications start only when they are first iterated
    iterator = iter(chunks)
    first = next(iterator, b"")
    return (*started, chunks, itertools.chain(written, [first], iterator))


def call(app, method, target, body=None, headers=None, **more):
    status, fields, chunks, iterator = start(
        app, environ_of(method, target, body, headers, **more)
    )
    try:
        return Answer(status, fields, b"".join(iterator))
    finally:
        if hasattr(chunks, "close"):
            chunks.close()


def stream(app, method, target, headers):
    """Like call(), but the pieces of the body one after the other."""
    _, _, chunks, iterator = start(app, environ_of(method, target, None, headers))
    try:
        yield from iterator
    finally:
        if hasattr(chunks, "close"):
            chunks.close()


def fetch(port, method, target, body=None, headers=None, connection=None):
    """The same over a socket."""
    own = connection or http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        own.request(method, target, body, headers or {})
        response = own.getresponse()
        return Answer(response.status, response.getheaders(), response.read())
    finally:
        if connection is None:
            own.close()


def read_events(pieces, count, deadline=PATIENCE):
    """The ids of the first events of a stream, without ever waiting for good."""
    found = queue.Queue()
    enough = threading.Event()

    def read():
        text = b""
        for piece in pieces:
            if enough.is_set():
                break
            text += piece
            ids = re.findall(rb"^id: ?(\d+)\r?$", text[: text.rfind(b"\n") + 1], re.M)
            if len(ids) >= count:
                found.put([int(number) for number in ids[:count]])
                break
        if hasattr(pieces, "close"):
            pieces.close()

    threading.Thread(target=read, daemon=True).start()
    try:
        return found.get(timeout=deadline)
    finally:
        enough.set()


def socket_pieces(port, target, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request(
        "GET", target, headers={"Accept": "text/event-stream", **(headers or {})}
    )
    response = connection.getresponse()
    assert response.status == 200, response.read()
    assert response.getheader("Content-Type").startswith("text/event-stream")
    try:
        while piece := response.read1(65536):
            yield piece
    finally:
        connection.close()


def wait_for(condition, what, deadline=PATIENCE):
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        if result := condition():
            return result
        threading.Event().wait(0.02)
    raise AssertionError(f"{what}: not within {deadline} s")


@contextlib.contextmanager
def running(command, pattern, log, env=None, cwd=None):
    """A program from when its output matches a pattern until it has been told to end.

    Gives the match; what it printed is in the file log.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("USERAPI_", "PYTHON"))
    }
    environment.update({"PYTHONUNBUFFERED": "1", **(env or {})})
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=cwd,
            start_new_session=True,
        )
    try:

        def match():
            text = log.read_text("utf-8", "replace")
            assert process.poll() is None, f"it ended: {text}"
            return re.search(pattern, text)

        match = wait_for(match, f"{command}: {pattern}")
        yield process, match
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(8)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def program(name):
    """A program of Debian's; .ci/run installs them all and allows no skipping."""
    path = shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    return path or pytest.skip(f"{name} is not installed")


@pytest.fixture
def make(tmp_path):
    """Applications on new databases with the same three users."""
    made = []

    def make(seed=True, **settings):
        settings.setdefault("db", str(tmp_path / f"users{len(made)}.db"))
        app = UserAPI(**settings)
        made.append(app)
        if seed:
            answer = call(
                app,
                "POST",
                "/api/v2/user",
                SEED.encode(),
                {"Content-Type": "application/x-ndjson"},
            )
            assert answer.json["created"] == 3, answer
        return app

    yield make
    for app in made:
        app.close()


# -- the parents ----------------------------------------------------------------------
# Each makes a WSGI application that has app below PREFIX and a page of its own, with
# error pages and middleware of the kind that would spoil a child's answers.


def plain_parent(app):
    def parent(environ, start_response):
        if environ["PATH_INFO"] == "/own":
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [b"the parent's"]
        assert environ["PATH_INFO"].startswith(PREFIX)
        for _ in PREFIX.strip("/").split("/"):
            shift_path_info(environ)
        return app(environ, start_response)

    return parent


def bottle_parent(app):
    parent = bottle.Bottle()
    parent.mount(PREFIX, app)
    parent.get("/own", callback=lambda: "the parent's")
    for code in (400, 404, 405, 415, 422, 500):
        parent.error(code)(lambda error: "<h1>the parent's error page</h1>")
    return parent


def flask_parent(app):
    import flask
    from werkzeug.middleware.dispatcher import DispatcherMiddleware

    parent = flask.Flask("parent")
    parent.get("/own")(lambda: "the parent's")
    for code in (400, 404, 405, 415, 422, 500):
        parent.register_error_handler(code, lambda error: ("the parent's error", 400))
    parent.wsgi_app = DispatcherMiddleware(parent.wsgi_app, {PREFIX: app})
    return parent


def django_parent(app):
    import django
    from django.conf import settings
    from django.core.handlers.wsgi import WSGIHandler
    from django.http import HttpResponse, StreamingHttpResponse
    from django.urls import re_path

    if not settings.configured:
        settings.configure(
            ALLOWED_HOSTS=["*"],
            APPEND_SLASH=False,
            MIDDLEWARE=["django.middleware.common.CommonMiddleware"],
            ROOT_URLCONF=None,
            SECRET_KEY="a test's",
        )
        django.setup()

    def users(request, path=""):
        environ = dict(request.environ)
        environ["SCRIPT_NAME"] += PREFIX
        environ["PATH_INFO"] = environ["PATH_INFO"][len(PREFIX) :]
        status, headers, chunks, iterator = start(app, environ)

        def body():
            try:
                yield from iterator
            finally:
                if hasattr(chunks, "close"):
                    chunks.close()

        response = StreamingHttpResponse(body(), status=status)
        del response.headers["Content-Type"]
        for name, value in headers:
            response.headers[name] = value
        return response

    class Urls:
        urlpatterns = [
            re_path("^own$", lambda request: HttpResponse("the parent's")),
            re_path(f"^{PREFIX[1:]}(?P<path>/.*)?$", users),
        ]

    settings.ROOT_URLCONF = Urls
    return WSGIHandler()


def pyramid_parent(app):
    from pyramid.config import Configurator
    from pyramid.response import Response
    from pyramid.wsgi import wsgiapp2

    with Configurator() as config:
        config.add_route("users", PREFIX)
        config.add_route("users_below", PREFIX + "/*subpath")
        config.add_view(wsgiapp2(app), route_name="users")
        config.add_view(wsgiapp2(app), route_name="users_below")
        config.add_route("own", "/own")
        config.add_view(lambda request: Response("the parent's"), route_name="own")
        config.add_notfound_view(lambda request: Response("the parent's", status=404))
    return config.make_wsgi_app()


def fastapi_parent(app):
    """An ASGI application, called as if it were WSGI: Starlette's client does that."""
    from a2wsgi import WSGIMiddleware
    from fastapi import FastAPI
    from fastapi.responses import PlainTextResponse
    from starlette.testclient import TestClient

    parent = FastAPI()
    parent.get("/own")(lambda: PlainTextResponse("the parent's"))
    for code in (404, 405, 422):
        parent.exception_handler(code)(lambda *_: PlainTextResponse("the parent's"))
    parent.mount(PREFIX, WSGIMiddleware(app))
    client = TestClient(
        parent,
        base_url="http://127.0.0.1",
        client=("127.0.0.1", 50000),
        follow_redirects=False,
    )
    for name in list(client.headers):
        del client.headers[name]

    def wsgi(environ, start_response):
        headers = {
            key[5:].replace("_", "-"): value
            for key, value in environ.items()
            if key.startswith("HTTP_")
        }
        if "CONTENT_TYPE" in environ:
            headers["Content-Type"] = environ["CONTENT_TYPE"]
        target = quote(environ["PATH_INFO"].encode("latin-1"))
        target += "?" * bool(environ["QUERY_STRING"])
        response = client.request(
            environ["REQUEST_METHOD"],
            target + environ["QUERY_STRING"],
            content=environ["wsgi.input"].read() or None,
            headers=headers,
        )
        start_response(
            f"{response.status_code} -", list(response.headers.multi_items())
        )
        return [response.content]

    return wsgi


PARENTS = {
    parent.__name__.partition("_")[0]: parent
    for parent in (
        plain_parent,
        bottle_parent,
        flask_parent,
        django_parent,
        pyramid_parent,
        fastapi_parent,
    )
}
WSGI_PARENTS = {name: make for name, make in PARENTS.items() if name != "fastapi"}

each_parent = pytest.mark.parametrize("parent", PARENTS.values(), ids=PARENTS.keys())
each_wsgi_parent = pytest.mark.parametrize(
    "parent", WSGI_PARENTS.values(), ids=WSGI_PARENTS.keys()
)


# -- mounted --------------------------------------------------------------------------

JSON = {"Content-Type": "application/json"}
ADA = b'{"item": {"name": "Ada", "mail": "ada@example.org"}}'

#: In this order, as the writes build on each other: method, target, body, headers.
BATTERY = [
    ("GET", "/api/user", None, {}),
    ("GET", "/api/user/", None, {}),
    ("GET", "/api/user/0", None, {}),
    ("GET", "/api/user/1", None, {}),
    ("GET", "/api/v2/user/1", None, {}),
    ("GET", "/api/v2/user/1/", None, {}),
    ("GET", "/api/v2/user/1/phone", None, {}),
    ("GET", "/api/user/1/address/1", None, {}),
    ("HEAD", "/api/user", None, {}),
    ("HEAD", "/api/v2/user/1", None, {}),
    ("HEAD", "/api/user/99", None, {}),
    ("OPTIONS", "/api/user", None, {}),
    ("OPTIONS", "/api/user/1", None, {}),
    ("GET", "/api/user?limit=1", None, {}),
    ("GET", "/api/v2/user?limit=2&sort=-name&count=true", None, {}),
    ("GET", "/api/user?q=zo%C3%AB&fields=id,name", None, {}),
    ("GET", "/api/user?format=csv", None, {}),
    ("GET", "/api/v2/user", None, {"Accept": "application/x-ndjson"}),
    ("GET", "/api/user/1", None, {"Accept": "image/png"}),
    ("GET", "/api/user?colour=red", None, {}),
    ("GET", "/api/user/99", None, {}),
    ("GET", "/api/user/x", None, {}),
    ("GET", "/api/v3/user", None, {}),
    ("GET", "/nowhere/at%20all", None, {}),
    ("GET", "/api", None, {}),
    ("POST", "/api/user", ADA, JSON),
    ("POST", "/api/user", ADA, {}),
    ("POST", "/api/user", b'{"item": {"name": "", "mail": "x", "a": 1}}', JSON),
    ("POST", "/api/user", b"name=Ada", {"Content-Type": "text/plain"}),
    ("POST", "/api/user", b"{", JSON),
    ("POST", "/api/user", b"", JSON),
    ("POST", "/api/user/1", ADA, JSON),
    ("POST", "/api/user", b'{"item":{"id":1,"name":"A","mail":"a@b.c"}}', JSON),
    ("PATCH", "/api/user/2", b'{"item": {"name": "Zo\xc3\xa9"}}', JSON),
    ("PUT", "/api/user/2", ADA, {**JSON, "If-Match": '"77"'}),
    ("PUT", "/api/user/99", ADA, JSON),
    ("DELETE", "/api/user", None, {}),
    ("DELETE", "/api/user/1337", None, {}),
    ("DELETE", "/api/user/1337", None, {}),
    ("BREW", "/api/user", None, {}),
    ("GET", "/api/v2/user/1", None, {"If-None-Match": '"1"'}),
    ("GET", "/openapi.json", None, {}),
    ("GET", "/postman.json", None, {}),
    ("GET", "/", None, {}),
    ("GET", "/docs", None, {}),
    ("GET", "/health", None, {}),
]

#: what a server or a parent may add to an answer's head, or leave to its own server
PARENTS_HEADERS = {
    "date",
    "server",
    "connection",
    "transfer-encoding",
    "content-length",
}


def without_prefix(value):
    """What an answer would be without the mount; as bytes or as text."""
    if isinstance(value, bytes):
        return value.replace(PREFIX.encode(), b"")
    return value.replace(PREFIX, "")


def without_servers(body):
    return json.dumps({**json.loads(body), "servers": None}).encode()


def comparable(answer):
    """The headers that must come through; a Location may be given in full."""
    return [
        (name, without_prefix(value).replace("http://127.0.0.1", ""))
        for name, value in answer.headers
        if name not in PARENTS_HEADERS
        and not (answer.status in (204, 304) and name.startswith("content-type"))
    ]


@each_parent
def test_every_answer_comes_through_a_parent_unchanged(make, parent):
    bare, mounted = make(), parent(make())
    for method, target, body, headers in BATTERY:
        expected = call(bare, method, target, body, headers)
        got = call(mounted, method, PREFIX + target, body, headers)
        what = f"{method} {target} {body}"
        assert got.status == expected.status, (what, got)
        if target == "/openapi.json":  # whose "servers" the next test follows
            got.body, expected.body = map(without_servers, (got.body, expected.body))
        assert without_prefix(got.body) == expected.body, what
        if target not in ("/", "/docs"):  # may name the prefix, and hash what does
            assert set(comparable(expected)) <= set(comparable(got)), what
        if got.status >= 400 and method != "HEAD":
            assert got["Content-Type"].startswith("application/problem+json"), what
            assert (got.json["code"], got.json["message"]) == (1, "FAILURE"), what


@each_parent
def test_each_address_that_is_given_leads_back_through_the_parent(make, parent):
    mounted = parent(make())

    def follow(reference, base):
        """Resolve it as a client does, and ask for it."""
        url = urlsplit(urljoin(f"http://127.0.0.1{PREFIX}{base}", reference))
        assert url.netloc == "127.0.0.1", reference
        assert url.path.startswith(PREFIX + "/"), reference
        return call(mounted, "GET", url.path + ("?" + url.query) * bool(url.query))

    created = call(mounted, "POST", PREFIX + "/api/user", ADA, JSON)
    assert created.status == 201
    assert follow(created["Location"], "/api/user").json == {
        "results": created.json["results"]
    }

    seen, base, answer = [], "/api/v2/user?limit=1&sort=name", None
    answer = call(mounted, "GET", PREFIX + base)
    while True:
        seen += [user["id"] for user in answer.json["results"]]
        following = answer.json["next"]
        if following is None:
            assert "link" not in dict(answer.headers)
            break
        (link,) = re.findall(r'^<(.+)>; rel="next"$', answer["Link"])
        assert urljoin("http://h/", link) == urljoin("http://h/", following)
        answer = follow(link, base)
        assert answer.status == 200
    assert sorted(seen) == [1, 2, 1337, created.json["results"][0]["id"]]

    changes = call(mounted, "GET", PREFIX + "/api/changes?limit=1").json
    assert follow(changes["next"], "/api/changes").json["results"]

    openapi = call(mounted, "GET", PREFIX + "/openapi.json").json
    (server,) = openapi["servers"][:1]
    path = next(p for p in openapi["paths"] if re.fullmatch(r"/?(api/)?(v1/)?user", p))
    base = urljoin(f"http://127.0.0.1{PREFIX}/openapi.json", server["url"])
    assert follow(base.rstrip("/") + "/" + path.lstrip("/"), "/").status == 200

    postman = call(mounted, "GET", PREFIX + "/postman.json").json
    bases = [
        variable["value"].rstrip("/")
        for variable in postman["variable"]
        if "://" in str(variable.get("value"))
    ]
    assert bases == [f"http://127.0.0.1{PREFIX}"]


@each_parent
def test_the_prefix_without_a_slash_is_the_page(make, parent):
    mounted = parent(make())
    without, with_slash = (call(mounted, "GET", PREFIX + end) for end in ("", "/"))
    if without.status in (301, 302, 307, 308):  # Starlette's mounts insist on it
        assert urlsplit(without["Location"]).path == PREFIX + "/"
        assert parent is fastapi_parent
    else:
        assert without.status == 200
        assert without.body == with_slash.body
    assert with_slash.status == 200
    assert with_slash["Content-Type"].startswith("text/html")


@each_wsgi_parent
def test_events_come_through_a_parent(make, parent):
    mounted = parent(make())
    target, headers = PREFIX + "/api/changes?since=0", {"Accept": "text/event-stream"}
    assert read_events(stream(mounted, "GET", target, headers), 3) == [1, 2, 3]
    headers["Last-Event-ID"] = "2"
    assert read_events(stream(mounted, "GET", target, headers), 1) == [3]


@each_parent
def test_a_parents_own_page_stays(make, parent):
    mounted = parent(make())
    for _ in range(2):
        assert call(mounted, "GET", PREFIX + "/api/user/99").status == 404
        answer = call(mounted, "GET", "/own")
        assert (answer.status, answer.body) == (200, b"the parent's")


def test_a_bottle_parents_hooks_and_request_are_unharmed(make):
    """bottle.request is one per thread; a child that rebinds it breaks its parent."""
    child = make()
    parent = bottle.Bottle()
    parent.mount(PREFIX, child)
    seen = []

    @parent.hook("before_request")
    def before():
        seen.append(("before", bottle.request.path))

    @parent.hook("after_request")
    def after():
        seen.append(
            ("after", bottle.request.path, bottle.request.environ["the.parent"])
        )
        bottle.response.set_header("X-Parent", "was here")

    @parent.get("/own/<word>")
    def own(word):
        bottle.response.set_header("X-Own", "before the call")
        environ = bottle.request.environ
        inner = call(child, "GET", "/api/user/1?fields=id")
        refused = call(child, "GET", "/api/user/99")
        assert (inner.status, refused.status) == (200, 404)
        assert bottle.request.environ is environ
        assert bottle.request.query.get("question") == word
        assert bottle.response.status_code == 200
        return bottle.request.path

    mark = {"the.parent": "its own mark"}
    for target in ("/api/user/1", "/api/user/99", "/api/user?format=csv", "/docs"):
        seen.clear()
        answer = call(parent, "GET", PREFIX + target, **mark)
        path = PREFIX + target.partition("?")[0]
        assert seen == [("before", path), ("after", path, "its own mark")]
        assert answer["X-Parent"] == "was here"
    answer = call(parent, "GET", "/own/yes?question=yes", **mark)
    assert answer.body == b"/own/yes"
    assert answer["X-Own"] == "before the call"


def test_the_environment_is_given_back_as_it_came(make):
    """A parent may still need it after the call: its log, its middleware."""
    app = make()
    for method, target, body in (
        ("GET", "/api/user/1", None),
        ("GET", "/api/user/", None),
        ("GET", "/nowhere", None),
        ("PATCH", "/api/user/1", b'{"item": {"name": "A"}}'),
    ):
        environ = environ_of(method, target, body, SCRIPT_NAME=PREFIX)
        kept = {key: environ[key] for key in environ if key.isupper()}
        _, _, chunks, iterator = start(app, environ)
        b"".join(iterator)
        if hasattr(chunks, "close"):
            chunks.close()
        assert {key: environ[key] for key in kept} == kept


def test_a_mount_that_moves_the_environment_before_the_body_is_read(make):
    """Bottle's mount undoes its shift while a stream has still to be iterated."""
    app = make()
    environ = environ_of("GET", "/api/user?limit=2", SCRIPT_NAME=PREFIX)
    _, fields, _, iterator = start(app, environ)
    environ["SCRIPT_NAME"], environ["PATH_INFO"] = "", PREFIX + environ["PATH_INFO"]
    answer = Answer(200, fields, b"".join(iterator))
    assert urlsplit(answer.json["next"]).path == PREFIX + "/api/user"


def test_a_prefix_beyond_ascii_is_percent_encoded(make):
    script = "/für".encode().decode("latin-1")  # as PEP 3333 has it
    app = make()
    answer = call(app, "POST", "/api/user", ADA, JSON, SCRIPT_NAME=script)
    assert urlsplit(answer["Location"]).path.startswith("/f%C3%BCr/api/user/")
    answer = call(app, "GET", "/api/user?limit=1", SCRIPT_NAME=script)
    assert urlsplit(answer.json["next"]).path == "/f%C3%BCr/api/user"


# -- two in one process ---------------------------------------------------------------


def test_settings_data_and_limits_are_each_applications_own(make):
    one = make(seed=False, token="ones-secret")
    two = make(seed=False, unique_mail=True)
    memory, other_memory = (make(seed=False, db=":memory:") for _ in range(2))
    bearer = {"Authorization": "Bearer ones-secret"}
    assert call(one, "POST", "/api/user", ADA, {**JSON, **bearer}).status == 201
    assert call(one, "POST", "/api/user", ADA, {**JSON, **bearer}).status == 201
    assert call(two, "POST", "/api/user", ADA, JSON).status == 201
    assert call(two, "POST", "/api/user", ADA, JSON).status == 409
    assert call(memory, "POST", "/api/user", ADA, JSON).status == 201

    def count(app, headers=None):
        answer = call(app, "GET", "/api/user", None, headers)
        assert answer.status == 200
        return len(answer.json["results"])

    assert [count(one, bearer), count(two), count(memory), count(other_memory)] == [
        *(2, 1, 1, 0)
    ]
    assert call(one, "GET", "/api/user").status == 401
    for _ in range(12):  # the one's failed logins are not the other's
        failed = call(one, "GET", "/api/user", None, {"Authorization": "Bearer no"})
    assert failed.status == 429
    assert call(two, "GET", "/api/user").status == 200
    before = call(two, "GET", "/metrics").body
    call(one, "GET", "/api/user", None, bearer)
    call(memory, "GET", "/api/user")
    one.close()
    assert call(two, "GET", "/api/user/1").status == 200
    assert call(memory, "GET", "/api/user/1").status == 200

    def served(text):
        """Requests counted so far, /metrics aside."""
        lines = re.findall(r"^(\w*requests\w*\{[^}]*\}) (\d+)", text.decode(), re.M)
        return sum(int(n) for name, n in lines if "metrics" not in name.lower())

    assert served(call(two, "GET", "/metrics").body) == served(before) + 1


def test_threads_may_use_several_applications_at_once(make):
    apps = [make(seed=False), make(seed=False, db=":memory:"), make(seed=False)]

    def work(number):
        ids = []
        for turn in range(12):
            app = apps[(number + turn) % 3]
            item = {"name": f"n{number}-{turn}", "mail": f"m{number}@example.org"}
            body = json.dumps({"item": item}).encode()
            created = call(app, "POST", "/api/user", body, JSON)
            assert created.status == 201, created
            user = created.json["results"][0]
            got = call(app, "GET", f"/api/user/{user['id']}").json["results"]
            assert got == [{"id": user["id"], **item}]
            ids.append((app, user["id"]))
        return ids

    with ThreadPoolExecutor(8) as pool:
        made = list(itertools.chain(*pool.map(work, range(8))))
    for app in apps:
        ids = sorted(number for owner, number in made if owner is app)
        assert ids == list(range(1, 33))
        assert len(call(app, "GET", "/api/user").json["results"]) == 32


# -- who may pass ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "peer, host, status",
    [
        ("127.0.0.1", "127.0.0.1", 200),
        ("127.0.0.1", "localhost:8000", 200),
        ("127.8.9.1", "[::1]:80", 200),
        ("::1", "LOCALHOST", 200),
        ("192.0.2.7", "127.0.0.1", 403),
        ("192.0.2.7", "localhost", 403),
        ("2001:db8::1", "localhost", 403),
        ("127.0.0.1", "users.example", 403),
        ("127.0.0.1", "localhost.evil.example", 403),
        ("127.0.0.1", "127.0.0.1.evil.example", 403),
    ],
)
def test_mounted_without_a_token_only_this_host_gets_in(make, peer, host, status):
    request = {"REMOTE_ADDR": peer, "HTTP_HOST": host}
    closed = plain_parent(make())
    answer = call(closed, "GET", PREFIX + "/api/user/1", **request)
    assert answer.status == status, answer
    if status == 403:
        assert answer["Content-Type"].startswith("application/problem+json")
        assert b"Giertz" not in answer.body
    opened = plain_parent(make(open=True))
    assert call(opened, "GET", PREFIX + "/api/user/1", **request).status == 200


@pytest.mark.parametrize("open", [False, True])
def test_a_token_counts_below_a_prefix_too(make, open):
    mounted = plain_parent(make(seed=False, token="s3cret", open=open))
    far = {"REMOTE_ADDR": "192.0.2.7", "HTTP_HOST": "users.example"}
    answer = call(mounted, "GET", PREFIX + "/api/user", **far)
    assert answer.status == 401 and "www-authenticate" in dict(answer.headers)
    bearer = {"Authorization": "Bearer s3cret"}
    assert call(mounted, "GET", PREFIX + "/api/user", None, bearer, **far).status == 200
    assert call(mounted, "GET", PREFIX + "/health", **far).json == {"status": "ok"}


# -- behind a proxy -------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/api/user?limit=1", PREFIX + "/api/user?limit=1"])
def test_a_trusted_proxys_prefix_counts_whether_kept_or_stripped(make, path):
    app = make(trusted_proxy="127.0.0.1")
    forwarded = {"X-Forwarded-Prefix": PREFIX}
    answer = call(app, "GET", path, None, forwarded)
    assert answer.status == 200, answer
    assert urlsplit(answer.json["next"]).path == PREFIX + "/api/user"


def test_nobody_elses_forwarded_headers_are_believed(make):
    app = make()  # trusts no proxy
    forged = {"X-Forwarded-Prefix": "/evil", "X-Forwarded-Host": "evil.example"}
    answer = call(app, "GET", "/api/user?limit=1", None, forged)
    assert answer.status == 200 and b"evil" not in answer.body
    assert b"evil" not in call(app, "GET", "/openapi.json", None, forged).body
    answer = call(app, "POST", "/api/user", ADA, {**JSON, **forged})
    assert "evil" not in answer["Location"]
    far = call(
        make(open=False),
        "GET",
        "/api/user",
        None,
        {"X-Forwarded-For": "127.0.0.1"},
        REMOTE_ADDR="192.0.2.7",
    )
    assert far.status == 403


def test_a_trusted_proxys_client_is_the_one_that_counts(make):
    app = make(trusted_proxy="127.0.0.1")
    answer = call(app, "GET", "/api/user", None, {"X-Forwarded-For": "192.0.2.7"})
    assert answer.status == 403, answer
    answer = call(app, "GET", "/api/user", None, {"X-Forwarded-For": "127.0.0.1"})
    assert answer.status == 200, answer


NGINX = """
daemon off; master_process off; worker_processes 1;
pid {folder}/nginx.pid; error_log {folder}/nginx.log;
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    server {{
        listen 127.0.0.1:{port};
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_set_header Host $http_host;
        proxy_set_header X-Forwarded-For $remote_addr;
        proxy_set_header X-Forwarded-Proto $scheme;
        proxy_set_header X-Forwarded-Prefix $prefix;
        proxy_buffering off;
        location /kept {{ set $prefix /kept; proxy_pass http://127.0.0.1:{upstream}; }}
        location /cut/ {{ set $prefix /cut; proxy_pass http://127.0.0.1:{upstream}/; }}
        location = /cut {{ set $prefix /cut; proxy_pass http://127.0.0.1:{upstream}/; }}
    }}
}}
"""


@contextlib.contextmanager
def served(tmp_path, *flags, python=(sys.executable,), script=MODULE, env=None):
    """`python userapi.py serve` on a free port: the process and the port."""
    log = tmp_path / f"serve-{len(list(tmp_path.iterdir()))}.log"
    command = [*python, script, "serve", "--port", "0", *flags]
    with running(command, r"http://127\.0\.0\.1:(\d+)/", log, env) as (process, match):
        yield process, int(match[1])


@pytest.mark.parametrize("prefix", ["/kept", "/cut"])
def test_behind_nginx(make, tmp_path, prefix):
    make(db=str(tmp_path / "n.db")).close()
    nginx, port = program("nginx"), free_port()
    flags = ("--db", tmp_path / "n.db", "--trusted-proxy", "127.0.0.1", "--log", "off")
    with served(tmp_path, *flags) as (_, upstream):
        config = tmp_path / "nginx.conf"
        config.write_text(NGINX.format(folder=tmp_path, port=port, upstream=upstream))
        (tmp_path / "nginx-out.log").touch()
        command = [nginx, "-p", tmp_path, "-c", config, "-e", tmp_path / "nginx.log"]
        with running(command, "", tmp_path / "nginx-out.log"):

            def answers():
                with contextlib.suppress(OSError):
                    return fetch(port, "GET", prefix + "/health").status == 200

            wait_for(answers, "nginx")
            check_a_served_application(port, prefix)
            for end in ("", "/"):
                page = fetch(port, "GET", prefix + end)
                assert page.status == 200, page
                assert page["Content-Type"].startswith("text/html")


# -- served by others -----------------------------------------------------------------


def check_a_served_application(port, prefix=""):
    """Everything that could go wrong between a server and us, over real sockets."""
    base = prefix + "/api/user"
    first = fetch(port, "GET", base + "/1").json["results"]
    assert first == [
        {"id": 1, "name": "Simone Giertz", "mail": "giertz@shittyrobots.loc"}
    ]
    assert fetch(port, "HEAD", base).body == b""
    options = fetch(port, "OPTIONS", base)
    assert options.status == 204 and "PATCH" in options["Allow"]
    for method, target, body, status in (
        ("GET", base + "/99999", None, 404),
        ("GET", prefix + "/nowhere", None, 404),
        ("PUT", base + "/0", ADA, 405),
        ("POST", base, b"{", 400),
        ("POST", base, b'{"item": {"name": "A", "mail": "no"}}', 422),
        ("DELETE", base, None, 400),
    ):
        answer = fetch(port, method, target, body, JSON)
        assert answer.status == status, answer
        assert answer["Content-Type"].startswith("application/problem+json")
        assert answer.json["code"] == 1
    etag = {"If-None-Match": fetch(port, "GET", base + "/1")["ETag"]}
    unchanged = fetch(port, "GET", base + "/1", None, etag)
    assert (unchanged.status, unchanged.body) == (304, b"")

    def work(number):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        ids = []
        for turn in range(10):
            item = {"name": f"{number}", "mail": f"m{number}-{turn}@example.org"}
            body = json.dumps({"item": item}).encode()
            answer = fetch(port, "POST", base, body, JSON, connection)
            assert answer.status == 201, answer
            location = urlsplit(answer["Location"]).path
            assert location == f"{base}/{answer.json['results'][0]['id']}"
            assert fetch(port, "GET", location, None, {}, connection).status == 200
            ids.append(answer.json["results"][0]["id"])
        connection.close()
        return ids

    with ThreadPoolExecutor(6) as pool:
        ids = list(itertools.chain(*pool.map(work, range(6))))
    assert len(set(ids)) == 60
    users = fetch(port, "GET", base).json["results"]
    assert set(ids) <= {user["id"] for user in users}
    assert fetch(port, "GET", base + "?count=true&limit=1").json["total"] == len(users)

    # an open stream brings what another connection writes afterwards
    latest = fetch(port, "GET", prefix + "/api/changes?limit=1000").json["results"]
    since = latest[-1]["seq"]
    events = socket_pieces(port, f"{prefix}/api/changes?since={since - 1}")
    arrived = queue.Queue()

    def read():
        arrived.put(read_events(events, 2))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    assert fetch(port, "POST", base, ADA, JSON).status == 201
    assert arrived.get(timeout=PATIENCE) == [since, since + 1]


def gunicorn(folder, *flags):
    yield [
        *(sys.executable, "-m", "gunicorn", "--bind", "127.0.0.1:0", *flags),
        *("--worker-tmp-dir", folder, "--graceful-timeout", "1", "userapi:UserAPI()"),
    ]
    yield r"Listening at: http://127\.0\.0\.1:(\d+)"


def waitress(folder):
    listen = "--listen=127.0.0.1:0"
    yield [
        *(sys.executable, "-m", "waitress", listen, "--threads=8", "--call"),
        "userapi:UserAPI",
    ]
    yield r"Serving on http://127\.0\.0\.1:(\d+)"


def granian(folder):
    port = free_port()
    yield [
        *(sys.executable, "-m", "granian", "--interface", "wsgi", "--factory"),
        *("--port", port, "--workers", "2", "--blocking-threads", "4"),
        *("--workers-kill-timeout", "2", "userapi:UserAPI"),
    ]
    yield rf"Listening at: http://127\.0\.0\.1:({port})[\s\S]*Started worker-2"


def uwsgi(folder):
    """Debian's, with Debian's Python: only Bottle is lent to it."""
    shutil.copy(bottle.__file__, folder)
    yield [
        *(program("uwsgi_python3"), "--http-socket", "127.0.0.1:0", "--master"),
        *("--processes", "2", "--threads", "4", "--die-on-term", "--lazy-apps"),
        *("--worker-reload-mercy", "2", "--pythonpath", HERE, "--pythonpath", folder),
        *("--module", "userapi:UserAPI()", "--add-header", "Connection: close"),
    ]
    yield r"bound to TCP address 127\.0\.0\.1:(\d+)[\s\S]*spawned uWSGI worker 2"


SERVERS = {
    "gunicorn-threads": lambda folder: gunicorn(
        folder, "--worker-class", "gthread", "--threads", "8"
    ),
    "gunicorn-processes": lambda folder: gunicorn(
        folder, "--worker-class", "gthread", "--workers", "2", "--threads", "4"
    ),
    "gunicorn-preload": lambda folder: gunicorn(
        folder, "--preload", "--workers", "2", "--threads", "4"
    ),
    "waitress": waitress,
    "granian": granian,
    "uwsgi": uwsgi,
}


@pytest.mark.parametrize("server", SERVERS.values(), ids=SERVERS.keys())
def test_served_by_another_server(make, tmp_path, server):
    make(db=str(tmp_path / "s.db")).close()
    folder = tmp_path / "server"
    folder.mkdir()
    command, pattern = server(folder)
    env = {"USERAPI_DB": str(tmp_path / "s.db"), "PYTHONPATH": str(HERE)}
    log = tmp_path / "server.log"
    with running(command, pattern, log, env, cwd=folder) as (_, match):
        check_a_served_application(int(match[1]))
        assert "Traceback" not in log.read_text("utf-8", "replace")


def test_wsgirefs_server_waits_for_no_chunks(make, tmp_path):
    """It hands over the socket itself: nothing there says where a body ends."""
    app = make(db=str(tmp_path / "w.db"))
    with make_server("127.0.0.1", 0, app) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with socket.create_connection(server.server_address, PATIENCE) as client:
            client.sendall(
                b"POST /api/user HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"
            )
            assert client.recv(99).startswith(b"HTTP/1.0 411 ")


def test_every_setting_comes_from_the_environment(tmp_path, monkeypatch):
    """A server that only knows `userapi:UserAPI()` can still be told everything."""
    monkeypatch.setenv("USERAPI_DB", str(tmp_path / "e.db"))
    monkeypatch.setenv("USERAPI_TOKEN", "from-environment")
    monkeypatch.setenv("USERAPI_UNIQUE_MAIL", "yes")
    monkeypatch.setenv("USERAPI_MAX_BODY", "200")
    app = UserAPI()
    try:
        assert call(app, "GET", "/api/user").status == 401
        headers = {"Authorization": "Bearer from-environment", **JSON}
        assert call(app, "POST", "/api/user", ADA, headers).status == 201
        assert call(app, "POST", "/api/user", ADA, headers).status == 409
        long = b'{"item": {"name": "%s"}}' % (b"a" * 200)
        assert call(app, "POST", "/api/user", long, headers).status == 413
    finally:
        app.close()
    assert (tmp_path / "e.db").exists()
    beaten = UserAPI(db=":memory:", token="by-keyword")  # a keyword beats the variable
    try:
        headers = {"Authorization": "Bearer by-keyword"}
        assert call(beaten, "GET", "/api/user", None, headers).json == {"results": []}
    finally:
        beaten.close()


@contextlib.contextmanager
def uvicorn(tmp_path):
    """userapi below PREFIX in FastAPI: a real socket, where events can flow."""
    (tmp_path / "parent.py").write_text(
        "from a2wsgi import WSGIMiddleware\n"
        "from fastapi import FastAPI\n"
        "from userapi import UserAPI\n"
        "app = FastAPI()\n"
        f"app.mount({PREFIX!r}, WSGIMiddleware(UserAPI()))\n"
    )
    env = {"USERAPI_DB": str(tmp_path / "f.db"), "PYTHONPATH": f"{HERE}:{tmp_path}"}
    command = [sys.executable, "-m", "uvicorn", "--port", "0"]
    command += ["--timeout-graceful-shutdown", "2", "parent:app"]
    pattern = r"running on http://127\.0\.0\.1:(\d+)"
    with running(command, pattern, tmp_path / "uvicorn.log", env) as (process, match):
        yield process, int(match[1])


def test_fastapi_under_uvicorn(make, tmp_path):
    make(db=str(tmp_path / "f.db")).close()
    with uvicorn(tmp_path) as (_, port):
        check_a_served_application(port, PREFIX)


def test_abandoned_events_give_their_threads_back(make, tmp_path):
    """a2wsgi has ten threads and never notices that a reader has gone."""
    make(db=str(tmp_path / "f.db")).close()
    with uvicorn(tmp_path) as (process, port):
        for _ in range(12):
            with socket.create_connection(("127.0.0.1", port)) as reader:
                head = f"GET {PREFIX}/api/changes HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                reader.sendall(head.encode() + b"Accept: text/event-stream\r\n\r\n")
        assert fetch(port, "GET", PREFIX + "/api/user/1").status == 200
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)


# -- the page below a prefix ----------------------------------------------------------


@pytest.mark.parametrize("end", ["", "/"])
def test_the_page_works_below_a_prefix(make, end):
    playwright = pytest.importorskip("playwright.sync_api")
    import waitress

    server = waitress.create_server(
        flask_parent(make()), listen="127.0.0.1:0", threads=8
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    port = server.effective_port
    try:
        with playwright.sync_playwright() as p:
            browser = p.chromium.launch(
                executable_path=program("chromium"),
                args=[
                    "--no-sandbox",
                    "--disable-gpu",
                    "--disable-background-networking",
                ],
            )
            page = browser.new_page()
            asked, faults = [], []
            page.on("request", lambda request: asked.append(urlsplit(request.url)))
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on(
                "response",
                lambda r: faults.append(r.url) if r.status >= 400 else None,
            )
            page.goto(f"http://127.0.0.1:{port}{PREFIX}{end}")
            page.get_by_text("Simone Giertz").first.wait_for(timeout=PATIENCE * 1000)
            # another's change arrives by the events, through the prefix as well
            fetch(port, "POST", PREFIX + "/api/user", ADA, JSON)
            page.get_by_text("ada@example.org").first.wait_for(timeout=PATIENCE * 1000)
            browser.close()
        http_only = [url for url in asked if url.scheme.startswith("http")]
        assert {url.netloc for url in http_only} == {f"127.0.0.1:{port}"}
        assert all(url.path.startswith(PREFIX) for url in http_only), http_only
        assert not faults
    finally:
        server.close()


# -- used from Python -----------------------------------------------------------------


def test_the_store_has_the_rules_and_the_problems_of_the_api(make):
    app = make()
    assert app.store.get_user(1)["name"] == "Simone Giertz"
    assert [user["id"] for user in app.store.find_users()] == [1, 2, 1337]
    with pytest.raises(Problem) as caught:
        app.store.get_user(99)
    assert caught.value.status == 404
    with pytest.raises(Problem) as caught:
        app.store.create_users([{"name": "", "mail": "nowhere"}])
    assert caught.value.status == 422
    app.store.create_users([{"name": " Ada ", "mail": "ada@example.org"}])
    answer = call(app, "GET", "/api/user?name=Ada").json["results"]
    assert [user["mail"] for user in answer] == ["ada@example.org"]
    changes = call(app, "GET", "/api/changes").json["results"]
    assert [change["op"] for change in changes] == ["create"] * 4


def test_on_change_is_called_after_the_commit(make, tmp_path):
    seen = []

    def on_change(*_, **__):
        with contextlib.closing(sqlite3.connect(path)) as db:
            seen.append(db.execute("SELECT count(*) FROM users").fetchone()[0])

    path = tmp_path / "hook.db"
    app = make(seed=False, db=str(path), on_change=on_change)
    assert call(app, "POST", "/api/user", ADA, JSON).status == 201
    assert seen and set(seen) == {1}
    seen.clear()
    assert call(app, "POST", "/api/user", b"{}", JSON).status == 422
    assert call(app, "POST", "/api/user?dry_run=true", ADA, JSON).status < 300
    assert call(app, "GET", "/api/user").status == 200
    assert call(app, "DELETE", "/api/user/99").status == 404
    assert not seen
    assert call(app, "DELETE", "/api/user/1").status == 200
    assert seen and set(seen) == {0}


def test_what_was_committed_is_acknowledged_whatever_on_change_does(make, capfd):
    def on_change(*_, **__):
        raise RuntimeError("the host program's own fault")

    app = make(seed=False, on_change=on_change)
    assert call(app, "POST", "/api/user", ADA, JSON).status == 201
    assert len(call(app, "GET", "/api/user").json["results"]) == 1


# -- the examples ---------------------------------------------------------------------


def test_example_mounted_in_flask(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import mounted_in_flask

    app = mounted_in_flask.create_app(str(tmp_path / "users.db"))
    assert b"/people" in call(app, "GET", "/").body
    assert call(app, "POST", "/people/api/user", ADA, JSON).status == 201
    assert call(app, "GET", "/people")["Content-Type"].startswith("text/html")
    assert call(app, "GET", "/greet/1").body == b"Hello, Ada!"
    assert call(app, "GET", "/greet/2").status == 404


def test_example_mock_server():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, EXAMPLES / "mock_server.py"],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def test_example_admin_socket(tmp_path):
    path = tmp_path / "users.sock"
    env = {"PYTHONPATH": str(HERE)}
    command = [sys.executable, EXAMPLES / "admin_socket.py", path]
    with running(command, str(path), tmp_path / "log", env) as (process, _):
        assert path.stat().st_mode & 0o777 == 0o660
        for name in ("users.db", "recipients.txt"):
            assert not (tmp_path / name).stat().st_mode & 0o007
        curl = [program("curl"), "-sS", "--max-time", "20", "--unix-socket", path]
        url = "http://localhost/api/user"
        created = subprocess.run(
            [*curl, url, "--data-binary", ADA, "-H", "Content-Type: application/json"],
            capture_output=True,
            check=True,
        )
        assert json.loads(created.stdout)["message"] == "SUCCESS", created.stdout
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    # on_change may be called when the answer is out already
    assert (tmp_path / "recipients.txt").read_text("utf-8") == "ada@example.org\n"


def test_example_nightly_import(tmp_path):
    people, db = tmp_path / "people.csv", tmp_path / "users.db"
    command = [sys.executable, EXAMPLES / "nightly_import.py", people, db]
    env = {**os.environ, "PYTHONPATH": str(HERE)}

    def night(csv):
        people.write_text(csv, "utf-8")
        return subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=PATIENCE
        )

    def names():
        with contextlib.closing(sqlite3.connect(db)) as file:
            return [row[0] for row in file.execute("SELECT user_name FROM users")]

    done = night("id,name,mail\n1,Ada,ada@example.org\n")
    assert done.returncode == 0, done
    assert names() == ["Ada"]
    done = night("id,name,mail\n1,Augusta,ada@example.org\n2,Bob,bob@example.org\n")
    assert done.returncode == 0, done
    assert names() == ["Augusta", "Bob"]
    done = night("id,name,mail\n1,Eve,eve@example.org\n2,Mallory,nowhere\n")
    assert done.returncode == 1, done
    assert "3" in done.stderr and "Traceback" not in done.stderr
    assert names() == ["Augusta", "Bob"]
    assert pathlib.Path(f"{db}.yesterday").exists()


# -- installed, copied, alone ---------------------------------------------------------


def run(*command, env=None, **options):
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("USERAPI_", "PYTHON"))
    }
    return subprocess.run(
        [str(part) for part in command],
        env={**environment, "PYTHONDONTWRITEBYTECODE": "1", **(env or {})},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=PATIENCE * 2,
        **options,
    )


def bottle_wheel(folder):
    """Bottle as it is installed, put back into a wheel: no registry is needed."""
    distribution = importlib.metadata.distribution("bottle")
    path = folder / f"bottle-{distribution.version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file in distribution.files:
            if ".." not in file.parts and file.suffix != ".pyc":
                wheel.write(file.locate(), str(file))
    return path


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """A folder with Bottle's wheel and ours, made from a copy of what is here."""
    tree, folder = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheels")
    for name in ("userapi.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(HERE / name, tree)
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps")
    done = run(*pip, "--no-build-isolation", "--wheel-dir", folder, tree)
    assert done.returncode == 0, done.stderr
    bottle_wheel(folder)
    return folder


def test_the_installed_wheel_gives_the_command(wheels, tmp_path):
    (ours,) = wheels.glob("userapi-*.whl")
    assert ours.name == f"userapi-{userapi.__version__}-py3-none-any.whl"
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q")
    done = run(*pip, "--no-index", "--find-links", wheels, "userapi")
    assert done.returncode == 0, done.stderr
    command, db = tmp_path / "venv/bin/userapi", tmp_path / "users.db"
    assert run(command, "check", "--db", db, cwd=tmp_path).returncode in (0, 1)
    assert run(command, "no-such-command", cwd=tmp_path).returncode == 2
    done = run(command, "openapi", cwd=tmp_path)
    assert json.loads(done.stdout)["info"]["version"], done
    with served(tmp_path, "--db", db, python=(), script=command) as (process, port):
        assert fetch(port, "GET", "/api/user").json == {"results": []}
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    assert run(command, "check", "--db", db, cwd=tmp_path).returncode == 0


def script_metadata():
    """The PEP 723 block, by the regular expression that the PEP gives."""
    pattern = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
    (block,) = re.finditer(pattern, MODULE.read_text("utf-8"))
    assert block["type"] == "script"
    return "".join(
        line[2:] if line.startswith("# ") else line[1:]
        for line in block["content"].splitlines(keepends=True)
    )


def test_the_script_block_says_what_the_project_says():
    tomllib = pytest.importorskip("tomllib")
    block = tomllib.loads(script_metadata())
    project = tomllib.loads((HERE / "pyproject.toml").read_text("utf-8"))["project"]
    assert block["requires-python"] == project["requires-python"]
    assert block["dependencies"] == project["dependencies"]


@pytest.mark.parametrize("runner", ["uv", "pipx"])
def test_a_script_runner_needs_no_preparation(wheels, tmp_path, runner):
    """`uv run userapi.py` and `pipx run userapi.py`, by the PEP 723 block."""
    env = {
        "UV_FIND_LINKS": str(wheels),
        "UV_NO_INDEX": "1",
        "UV_OFFLINE": "1",
        "UV_CACHE_DIR": str(tmp_path / "cache"),
        "UV_PYTHON": sys.executable,
        "PIP_FIND_LINKS": str(wheels),
        "PIP_NO_INDEX": "1",
        "PIPX_HOME": str(tmp_path / "pipx"),
        "PIPX_DEFAULT_PYTHON": sys.executable,
    }
    shutil.copy(MODULE, tmp_path)
    tool = pathlib.Path(sysconfig.get_path("scripts")) / runner
    command = (tool, "run", tmp_path / "userapi.py", "openapi")
    done = run(*command, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["openapi"].startswith("3.1")


#: a Python that sees the standard library and the script's own folder, no more
BARE = (sys.executable, "-S", "-E", "-s")


def test_bottle_beside_the_file_is_enough(tmp_path):
    shutil.copy(MODULE, tmp_path)
    shutil.copy(bottle.__file__, tmp_path / "bottle.py")
    script = tmp_path / "userapi.py"
    flags = ("--db", tmp_path / "users.db")
    with served(tmp_path, *flags, python=BARE, script=script) as (process, port):
        assert fetch(port, "POST", "/api/user", ADA, JSON).status == 201
        assert fetch(port, "GET", "/").status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0


def test_a_read_only_folder_is_enough(tmp_path):
    """As on a device's squashfs; root may write everywhere, so only modes are set."""
    folder = tmp_path / "firmware"
    folder.mkdir()
    shutil.copy(MODULE, folder)
    shutil.copy(bottle.__file__, folder / "bottle.py")
    folder.chmod(0o555)
    try:
        flags = ("--db", tmp_path / "users.db")
        env = {"PYTHONDONTWRITEBYTECODE": "1"}
        script = folder / "userapi.py"
        python = (sys.executable, "-S", "-s")
        with served(tmp_path, *flags, python=python, script=script, env=env) as (
            _,
            port,
        ):
            assert fetch(port, "GET", "/api/user").status == 200
    finally:
        folder.chmod(0o755)


def test_a_missing_bottle_is_one_line(tmp_path):
    shutil.copy(MODULE, tmp_path)
    done = run(*BARE, tmp_path / "userapi.py", "serve", "--db", tmp_path / "users.db")
    assert done.returncode == 1, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "pip install" in line and "bottle.py" in line and "python3-bottle" in line
    assert not (tmp_path / "users.db").exists()


def test_a_zipapp_runs_on_a_bare_python(tmp_path):
    folder = tmp_path / "pyz"
    folder.mkdir()
    shutil.copy(MODULE, folder)
    shutil.copy(bottle.__file__, folder / "bottle.py")
    (folder / "__main__.py").write_text("import sys, userapi; sys.exit(userapi.main())")
    pyz = tmp_path / "userapi.pyz"
    done = run(sys.executable, "-m", "zipapp", folder, "-o", pyz, "-c")
    assert done.returncode == 0, done.stderr
    bare = (sys.executable, "-I", "-S")
    db = ("--db", tmp_path / "users.db")
    with served(tmp_path, *db, python=bare, script=pyz) as (process, port):
        assert fetch(port, "POST", "/api/user", ADA, JSON).status == 201
        assert fetch(port, "GET", "/").status == 200
        assert fetch(port, "GET", "/docs").status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    assert run(*bare, pyz, "check", *db).returncode == 0
    done = run(*bare, pyz, "export", *db, "-", "--format", "csv")
    assert done.stdout.splitlines()[1:] == ["1,Ada,ada@example.org"]


def test_nothing_happens_at_import(tmp_path):
    """No file, no thread, no signal, no setting read; and no work done twice."""
    code = (
        "import signal, threading\n"
        "before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)\n"
        "import userapi\n"
        "after = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)\n"
        "assert before == after\n"
        "assert threading.active_count() == 1\n"
    )
    env = {"PYTHONPATH": str(HERE), "USERAPI_PORT": "nonsense", "USERAPI_DB": "x.db"}
    done = run(sys.executable, "-c", code, env=env, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


#: takes away what Windows, macOS or musl may lack, before the program starts
LESS = """
import asyncio, asyncio.unix_events, os, signal, socket, sys

class Missing:
    def find_spec(self, name, *_):
        if name in ("fcntl", "grp", "pwd", "resource", "termios"):
            raise ModuleNotFoundError(name)

def no_handlers(*_):
    raise NotImplementedError

for module, names in {
    os: "fork forkpty memfd_create statvfs posix_fadvise getuid fchmod fdatasync",
    signal: "SIGHUP SIGALRM SIGUSR1 SIGUSR2 pthread_sigmask sigwait",
    socket: "SO_REUSEPORT TCP_QUICKACK TCP_CORK send_fds recv_fds",
}.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
sys.meta_path.insert(0, Missing())
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules.pop(name, None)
asyncio.unix_events._UnixSelectorEventLoop.add_signal_handler = no_handlers
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_runs_without_what_only_some_systems_have(tmp_path, number):
    (tmp_path / "sitecustomize.py").write_text(LESS)
    env = {"PYTHONPATH": str(tmp_path)}
    with served(tmp_path, "--db", tmp_path / "users.db", env=env) as (process, port):
        assert fetch(port, "POST", "/api/user", ADA, JSON).status == 201
        assert fetch(port, "GET", "/api/user/1").status == 200
        assert fetch(port, "GET", "/metrics").status == 200
        process.send_signal(number)
        assert process.wait(PATIENCE) == 0
    done = run(sys.executable, MODULE, "check", "--db", tmp_path / "users.db", env=env)
    assert done.returncode == 0, done


# -- small ----------------------------------------------------------------------------

#: what a server of users has no use for
NEEDLESS = {
    *("antigravity", "cgi", "concurrent.futures.process", "csv", "ctypes", "curses"),
    *("dbm", "distutils", "doctest", "ensurepip", "ftplib", "idlelib", "imaplib"),
    *("lib2to3", "multiprocessing", "pdb", "pip", "pkg_resources", "poplib"),
    *("profile", "psycopg", "pydoc", "setuptools", "smtplib", "tkinter", "turtle"),
    *("unittest", "venv", "xml", "xmlrpc", "wsgiref.simple_server", "http.server"),
    *("zipfile.__main__",),
}


def test_serving_loads_nothing_that_is_not_needed(tmp_path):
    log = tmp_path / "importtime.log"
    python = (sys.executable, "-X", "importtime")
    command = [*python, MODULE, "serve", "--port", "0", "--db", tmp_path / "users.db"]
    with running(command, r"http://127\.0\.0\.1:(\d+)/", log) as (_, match):
        assert fetch(int(match[1]), "GET", "/api/user").status == 200
        assert fetch(int(match[1]), "POST", "/api/user", ADA, JSON).status == 201
        text = log.read_text("utf-8", "replace")
    loaded = re.findall(r"^import time:\s+\d+ \|\s+\d+ \|\s+([\w.]+)$", text, re.M)
    assert "bottle" in loaded and "sqlite3" in loaded
    needless = {name for name in loaded if name in NEEDLESS}
    needless |= {name for name in loaded if name.partition(".")[0] in NEEDLESS}
    assert not needless
    assert loaded.count("userapi") <= 1


def memory(process):
    """The resident memory of a process in MiB."""
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text("ascii")
    return int(re.search(r"^VmRSS:\s+(\d+) kB$", status, re.M)[1]) / 1024


@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="needs Linux's /proc"
)
def test_it_starts_soon_and_stays_small(tmp_path):
    flags = ("--db", tmp_path / "users.db", "--log", "off")
    times = []
    for _ in range(3):  # the first one may write the bytecode
        before = time.monotonic()
        with served(tmp_path, *flags) as (process, port):
            assert fetch(port, "GET", "/api/user/0").status == 200
            times.append(time.monotonic() - before)
            size = memory(process)
    assert min(times) < 2, times
    assert size <= 30, f"{size:.1f} MiB"
