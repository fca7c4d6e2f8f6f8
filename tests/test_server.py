"""The server as a socket sees it: raw bytes out, raw bytes back, from a real process.

In order: the tools, the table of odd and hostile requests, the same question put to
h11, then order, bodies, limits, doors, signals, the log, streams, and the disk.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import http.client
import itertools
import json
import os
import random
import re
import select
import signal
import socket
import sqlite3
import ssl
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote_to_bytes

import h11
import pytest
from processes import USERAPI, Process, wait_for

MIB = 1 << 20

linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads /proc or runs under strace"
)


# ---------------------------------------------------------------------------------
# Tools
# ---------------------------------------------------------------------------------


class Server(Process):
    """A server on a free port, on a database in a folder of its own."""

    unix = None

    def __init__(self, folder, *flags, argv=None, prefix=(), fds=(), port="0"):
        folder.mkdir(exist_ok=True)
        self.db = folder / "users.db"
        argv = argv or [USERAPI, "serve", "--db", self.db, "--log", "off"]
        end = () if port is None else ("--port", port)
        output = folder / "output.txt"
        super().__init__(output, [*argv, *end, *flags], prefix, pass_fds=fds)


class CutOff(AssertionError):
    """The connection ended within an answer."""


class Answer:
    """One answer as it stood on the wire, decoded strictly."""

    def __init__(self, head):
        first, *lines = head.decode("latin-1").split("\r\n")
        found = re.fullmatch(r"HTTP/1\.[01] ([1-5][0-9][0-9]) [ -~]*", first)
        assert found, f"not a status line: {first!r}"
        self.status = int(found[1])
        self.fields, self.body, self.interim, self.chunks = [], b"", 0, 0
        for line in lines:
            found = re.fullmatch(r"([!#-'*+.^_`|~0-9A-Za-z-]+):[ \t]*(.*)", line)
            assert found and not re.search(r"[\x00-\x08\x0a-\x1f\x7f]", line), line
            self.fields.append((found[1].lower(), found[2].strip()))
        for name in ("content-length", "transfer-encoding", "content-type", "date"):
            assert len([1 for field, _ in self.fields if field == name]) < 2, head

    def get(self, name):
        return ", ".join(v for field, v in self.fields if field == name) or None

    @property
    def closes(self):
        return "close" in (self.get("connection") or "").lower()

    def json(self):
        return json.loads(self.body)

    def __repr__(self):
        return f"<{self.status} {self.fields} {self.body[:200]!r}>"


class Client:
    """One connection, bytes only: it neither repairs nor repeats anything."""

    def __init__(self, server, timeout=60, window=None, tls=None):
        family = socket.AF_INET6 if ":" in (server.host or "") else socket.AF_INET
        self.socket = socket.socket(socket.AF_UNIX if server.unix else family)
        self.timeout = timeout
        self.socket.settimeout(timeout)
        if window:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        self.socket.connect(server.unix or (server.host, server.port))
        if not server.unix:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_hostname="localhost")
        self.buffer = bytearray()

    def send(self, data):
        """False where the server wants no more of it."""
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError, ConnectionAbortedError):
            return False
        return True

    def end(self):
        """Nothing more comes from here; answers may."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def more(self):
        """Wait for more bytes; False at the end."""
        try:
            data = self.socket.recv(65536)
        except (ConnectionResetError, ConnectionAbortedError):
            return False
        self.buffer += data
        return bool(data)

    def take(self):
        """What has come by now, without waiting."""
        with contextlib.suppress(OSError):
            self.socket.setblocking(False)
            self.buffer += self.socket.recv(65536)
        self.socket.settimeout(self.timeout)

    def until(self, mark):
        """The bytes up to and with `mark`; None if the connection ends before any."""
        while (at := self.buffer.find(mark)) < 0:
            if not self.more():
                if self.buffer:
                    raise CutOff(bytes(self.buffer))
                return None
        return self.exactly(at + len(mark))

    def exactly(self, size):
        while len(self.buffer) < size:
            if not self.more():
                raise CutOff(bytes(self.buffer[:200]))
        found = bytes(self.buffer[:size])
        del self.buffer[:size]
        return found

    def rest(self):
        while self.more():
            pass
        return self.exactly(len(self.buffer))

    def head(self):
        """The head of the next answer; None if the connection ends instead."""
        head = self.until(b"\r\n\r\n")
        return None if head is None else Answer(head[:-4])

    def answer(self, method="GET"):
        """The next answer; None if the connection ends instead."""
        interim = 0
        answer = self.head()
        while answer and answer.status < 200:
            interim += 1
            answer = self.head()
        if answer is None:
            return None
        answer.interim = interim
        coding, length = answer.get("transfer-encoding"), answer.get("content-length")
        assert not (coding and length), answer
        if answer.status in (204, 304):
            assert not coding and not length, answer
        elif method == "HEAD":
            pass
        elif coding:
            assert coding == "chunked", answer
            answer.body = self.chunked(answer)
        elif length is not None:
            answer.body = self.exactly(int(length))
        else:
            assert answer.closes, answer
            answer.body = self.rest()
        return answer

    def chunked(self, answer):
        body = bytearray()
        while True:
            line = self.until(b"\r\n")
            if line is None:
                raise CutOff("no last chunk")
            assert re.fullmatch(rb"[0-9A-Fa-f]+\r\n", line), line
            size = int(line, 16)
            body += self.exactly(size)
            assert self.exactly(2) == b"\r\n"
            if size == 0:
                return bytes(body)
            answer.chunks += 1

    def ask(self, data, method=None):
        """Send one request and read its answer."""
        self.send(data)
        return self.answer(method or data.split(b" ")[0].decode())

    def close(self):
        self.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def request(method, path, item=None, *fields, version="1.1"):
    """A sound request, as bytes; `item` is sent in its envelope."""
    body = b"" if item is None else json.dumps({"item": item}).encode()
    lines = [f"{method} {path} HTTP/{version}", "Host: localhost", *fields]
    if item is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


def ada(name="Ada", **members):
    return {"name": name, "mail": "ada@example.org", **members}


def old_database(path, count):
    """`count` users as the first version of the application kept them."""
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute(
            "CREATE TABLE users (user_id INTEGER PRIMARY KEY AUTOINCREMENT,"
            " user_name TEXT NOT NULL, user_mail TEXT NOT NULL)"
        )
        db.executemany(
            "INSERT INTO users (user_name, user_mail) VALUES (?, ?)",
            ((f"{'n' * 150}{i}", f"user{i}@example.org") for i in range(count)),
        )


def assert_problem(answer):
    """It is an RFC 9457 problem with the contract's members and headers."""
    assert answer.get("content-type") == "application/problem+json", answer
    problem = answer.json()
    assert (problem["code"], problem["message"]) == (1, "FAILURE"), problem
    assert problem["status"] == answer.status, problem
    assert problem["type"] and problem["title"] and problem["detail"], problem
    assert not re.search(rb'Traceback|File "|\.py|SELECT', answer.body), problem
    assert answer.get("x-content-type-options") == "nosniff", answer
    assert answer.get("referrer-policy") == "no-referrer", answer
    assert answer.get("cache-control") == "private, no-cache", answer
    policy = answer.get("content-security-policy") or ""
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The one that most tests share: defaults, user 1 is Ada."""
    with Server(tmp_path_factory.mktemp("server")) as server:
        with Client(server) as client:
            assert client.ask(request("POST", "/api/user", ada(id=1))).status == 201
        yield server


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One that takes bodies of 1,000 bytes: the table's."""
    with Server(tmp_path_factory.mktemp("small"), "--max-body", "1000") as server:
        with Client(server) as client:
            assert client.ask(request("POST", "/api/user", ada(id=1))).status == 201
        yield server


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    """One with 100,000 users, 21 MB as JSON: streams that no kernel buffer swallows."""
    folder = tmp_path_factory.mktemp("crowded")
    old_database(folder / "users.db", 100_000)
    with Server(folder) as server:
        yield server


# ---------------------------------------------------------------------------------
# Odd and hostile requests
# ---------------------------------------------------------------------------------

OPEN, CLOSED, EITHER = "stays open", "is closed", "may do either"

Row = collections.namedtuple("Row", "name data statuses end")

GET = b"GET /api/user/1 HTTP/1.1\r\nHost: localhost\r\n"
GET10 = b"GET /api/user/1 HTTP/1.0\r\nHost: localhost\r\n"
POST = b"POST /api/user HTTP/1.1\r\nHost: localhost\r\n"
JSON = b"Content-Type: application/json\r\n"
ITEM = b'{"item": {"name": "Ada", "mail": "ada@example.org"}}'
LENGTH = b"Content-Length: %d\r\n" % len(ITEM)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
PARTS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(ITEM), ITEM)
END = b"\r\n"

#: What a smuggler hides in a body; nobody may ever answer it.
HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: localhost\r\n\r\n"
HIDDEN_LENGTH = b"Content-Length: %d\r\n" % len(HIDDEN)

#: What follows each row on the same connection: the only other thing to be answered.
PROBE = GET + b"Connection: close\r\n\r\n"


def line(text, *fields):
    """A request by its first line, with a sound Host."""
    return text + b"\r\nHost: localhost\r\n" + b"".join(fields) + b"\r\n"


def chunks(*parts):
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)


def row(name, data, statuses, end):
    return Row(name, data, {statuses} if isinstance(statuses, int) else statuses, end)


SOUND = [
    row("plain", GET + END, 200, OPEN),
    row("names in capitals", b"GET /api/user/1 HTTP/1.1\r\nHOST: localhost\r\n\r\n",
        200, OPEN),
    row("no space after the colon", GET + b"x-a:1\r\n\r\n", 200, OPEN),
    row("much space around a value", GET + b"X-A: \t  1 \t \r\n\r\n", 200, OPEN),
    row("a tab within a value", GET + b"X-A: a\tb\r\n\r\n", 200, OPEN),
    row("an empty value", GET + b"X-A:\r\nX-B: \r\n\r\n", 200, OPEN),
    row("a name of every kind of sign", GET + b"!#$%&'*+-.^`|~9z: 1\r\n\r\n",
        200, OPEN),
    row("a value of every visible sign",
        GET + b"X-A: " + bytes(range(33, 127)) + b"\r\n\r\n", 200, OPEN),
    row("the same field twice", GET + b"X-A: 1\r\nX-A: 2\r\n\r\n", 200, OPEN),
    row("names with an underscore", GET + b"X_A: 1\r\nHost_: a\r\n\r\n", 200, OPEN),
    row("64 fields", GET + b"".join(b"X-%d: 1\r\n" % i for i in range(63)) + END,
        200, OPEN),
    row("a header section of 15 KiB", GET + b"X-A: %s\r\n\r\n" % (b"a" * 15_000),
        200, OPEN),
    row("a request line of 8,000 bytes", line(b"GET /%s HTTP/1.1" % (b"a" * 7984)),
        404, OPEN),
    row("HEAD", b"HEAD /api/user/1 HTTP/1.1\r\nHost: localhost\r\n\r\n", 200, OPEN),
    row("HEAD of nobody", b"HEAD /api/user/99 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        404, OPEN),
    row("OPTIONS", line(b"OPTIONS /api/user HTTP/1.1"), 204, OPEN),
    row("a trailing slash", line(b"GET /api/user/1/ HTTP/1.1"), 200, OPEN),
    row("an empty query", line(b"GET /api/user/1? HTTP/1.1"), 200, OPEN),
    row("an encoded letter", line(b"GET /api/us%65r/1 HTTP/1.1"), 200, OPEN),
    row("nobody", line(b"GET /api/user/99 HTTP/1.1"), 404, OPEN),
    row("Connection: close", GET + b"Connection: close\r\n\r\n", 200, CLOSED),
    row("Connection: Close among others",
        GET + b"Connection: Keep-Alive, Close\r\n\r\n", 200, CLOSED),
    row("Connection: keep-alive", GET + b"Connection: keep-alive\r\n\r\n", 200, OPEN),
    row("Connection: close, twice given",
        GET + b"Connection: x\r\nConnection: close\r\n\r\n", 200, CLOSED),
    row("Connection: closed is no close", GET + b"Connection: closed\r\n\r\n",
        200, OPEN),
    row("Connection: clo se is no close", GET + b"Connection: clo se\r\n\r\n",
        200, OPEN),
    row("Connection: a list with blanks and holes",
        GET + b"Connection: ,\t, a ,close\t ,\r\n\r\n", 200, CLOSED),
    row("HTTP/1.0", GET10 + END, 200, CLOSED),
    row("HTTP/1.0 kept ali ve", GET10 + b"Connection: keep-ali ve\r\n\r\n",
        200, CLOSED),
    row("HTTP/1.0 kept alive", GET10 + b"Connection: keep-alive\r\n\r\n", 200, OPEN),
    row("HTTP/1.0 both kept alive and closed",
        GET10 + b"Connection: keep-alive, close\r\n\r\n", 200, CLOSED),
    row("HTTP/1.0 without Host", b"GET /api/user/1 HTTP/1.0\r\n\r\n", {200, 403},
        CLOSED),
    row("Host with a port",
        b"GET /api/user/1 HTTP/1.1\r\nHost: 127.0.0.1:80\r\n\r\n", 200, OPEN),
    row("Host in IPv6", b"GET /api/user/1 HTTP/1.1\r\nHost: [::1]:80\r\n\r\n",
        200, OPEN),
    row("absolute form", line(b"GET http://localhost/api/user/1 HTTP/1.1"), 200, OPEN),
    row("absolute form in capitals",
        line(b"GET HTTP://LOCALHOST:80/api/user/1 HTTP/1.1"), 200, OPEN),
    row("an upgrade to HTTP/2 is not taken up",
        GET + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n", 200, OPEN),
    row("POST", POST + JSON + LENGTH + END + ITEM, 201, OPEN),
    row("POST without a type", POST + LENGTH + END + ITEM, 201, OPEN),
    row("POST kept in chunks", POST + JSON + CHUNKED + END + PARTS, 201, OPEN),
    row("POST in chunks of a byte",
        POST + JSON + CHUNKED + END
        + chunks(*(ITEM[i : i + 1] for i in range(len(ITEM)))) + b"0\r\n\r\n",
        201, OPEN),
    row("Chunked in capitals",
        POST + JSON + b"TRANSFER-ENCODING: CHUNKED\r\n" + END + PARTS, 201, OPEN),
    row("sizes in capitals",
        POST + JSON + CHUNKED + END + b"34\r\n" + ITEM + b"\r\nA\r\n          \r\n"
        b"0\r\n\r\n", 201, OPEN),
    row("a body of exactly the limit",
        POST + JSON + b"Content-Length: 1000\r\n\r\n" + ITEM.ljust(1000), 201, OPEN),
    row("a length beside a dropped one",
        POST + JSON + b"Content_Length: 0\r\n" + LENGTH + END + ITEM, 201, OPEN),
    row("POST in HTTP/1.0",
        b"POST /api/user HTTP/1.0\r\nHost: localhost\r\n" + LENGTH + END + ITEM,
        201, CLOSED),
    row("Expect: 100-continue", POST + b"Expect: 100-continue\r\n" + LENGTH + END
        + ITEM, 201, OPEN),
    row("Expect: 100-Continue, chunked",
        POST + b"expect: 100-Continue\r\n" + CHUNKED + END + PARTS, 201, OPEN),
    row("Expect: 100-continue of no body", GET + b"Expect: 100-continue\r\n\r\n",
        200, OPEN),
    row("Expect in HTTP/1.0",
        b"POST /api/user HTTP/1.0\r\nHost: localhost\r\nExpect: 100-continue\r\n"
        + LENGTH + END + ITEM, 201, CLOSED),
    row("GET with a body", GET + HIDDEN_LENGTH + END + HIDDEN, {200, 400}, EITHER),
    row("GET with a chunked body",
        GET + CHUNKED + END + chunks(HIDDEN) + b"0\r\n\r\n", {200, 400}, EITHER),
    row("HEAD with a body",
        b"HEAD /api/user/1 HTTP/1.1\r\nHost: localhost\r\n" + HIDDEN_LENGTH + END
        + HIDDEN, {200, 400}, EITHER),
    row("DELETE with a body",
        line(b"DELETE /api/user/99 HTTP/1.1", HIDDEN_LENGTH) + HIDDEN, {400, 404},
        EITHER),
    row("a body for nobody",
        line(b"PUT /api/user/99 HTTP/1.1", JSON, LENGTH) + ITEM, 404, EITHER),
    row("a body where no method is", line(b"POST /api/user/1 HTTP/1.1", HIDDEN_LENGTH)
        + HIDDEN, 405, EITHER),
    row("a body where nothing is", line(b"POST /nowhere HTTP/1.1", HIDDEN_LENGTH)
        + HIDDEN, 404, EITHER),
    row("a body that is no JSON", POST + JSON + HIDDEN_LENGTH + END + HIDDEN,
        400, EITHER),
    row("close, and more behind it", GET + b"Connection: close\r\n\r\n" + HIDDEN,
        200, CLOSED),
    row("HTTP/1.0, and more behind it", GET10 + END + HIDDEN, 200, CLOSED),
]  # fmt: skip

FRAMING = [
    row("length and coding", POST + LENGTH + CHUNKED + END + PARTS, 400, CLOSED),
    row("coding and length", POST + CHUNKED + LENGTH + END + PARTS, 400, CLOSED),
    row("length 0 and coding",
        POST + b"Content-Length: 0\r\n" + CHUNKED + END + PARTS, 400, CLOSED),
    row("a short length and coding: CL.TE",
        POST + b"Content-Length: 6\r\n" + CHUNKED + b"\r\n0\r\n\r\n" + HIDDEN,
        400, CLOSED),
    row("a short length and coding: TE.CL",
        POST + b"Content-Length: 4\r\n" + CHUNKED + END + chunks(HIDDEN)
        + b"0\r\n\r\n", 400, CLOSED),
    row("GET with length and coding",
        GET + b"Content-Length: 5\r\n" + CHUNKED + b"\r\n0\r\n\r\n" + HIDDEN,
        400, CLOSED),
    row("two lengths", POST + LENGTH + HIDDEN_LENGTH + END + ITEM + HIDDEN,
        400, CLOSED),
    row("the same length twice", POST + LENGTH + LENGTH + END + ITEM, 400, CLOSED),
    row("two lengths in one", POST + b"Content-Length: 52, 52\r\n\r\n" + ITEM,
        400, CLOSED),
    row("two lengths in GET",
        GET + b"Content-Length: 0\r\ncontent-length: 41\r\n\r\n" + HIDDEN, 400, CLOSED),
    row("length +52", POST + b"Content-Length: +52\r\n\r\n" + ITEM, 400, CLOSED),
    row("length -1", POST + b"Content-Length: -1\r\n\r\n" + HIDDEN, 400, CLOSED),
    row("length 0x34", POST + b"Content-Length: 0x34\r\n\r\n" + ITEM, 400, CLOSED),
    row("length 5_2", POST + b"Content-Length: 5_2\r\n\r\n" + ITEM, 400, CLOSED),
    row("length 5 2", POST + b"Content-Length: 5 2\r\n\r\n" + ITEM, 400, CLOSED),
    row("length 52.0", POST + b"Content-Length: 52.0\r\n\r\n" + ITEM, 400, CLOSED),
    row("length 52;", POST + b"Content-Length: 52;\r\n\r\n" + ITEM, 400, CLOSED),
    row("length '52'", POST + b'Content-Length: "52"\r\n\r\n' + ITEM, 400, CLOSED),
    row("length abc", POST + b"Content-Length: abc\r\n\r\n" + ITEM, 400, CLOSED),
    row("length empty", POST + b"Content-Length:\r\n\r\n" + HIDDEN, 400, CLOSED),
    row("length in wide digits",
        POST + "Content-Length: ５２\r\n\r\n".encode() + ITEM, 400, CLOSED),
    row("length superscript", POST + b"Content-Length: \xb2\r\n\r\n" + ITEM,
        400, CLOSED),
    row("length of 5,000 digits",
        POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n" + ITEM, {400, 413},
        CLOSED),
    row("length past 64 bits",
        POST + b"Content-Length: 18446744073709551668\r\n\r\n" + ITEM, {400, 413},
        CLOSED),
    row("GET of a bad length", GET + b"Content-Length: x\r\n\r\n" + HIDDEN,
        400, CLOSED),
    row("length, space, colon", POST + b"Content-Length : 52\r\n\r\n" + ITEM,
        400, CLOSED),
    row("coding, space, colon",
        POST + LENGTH + b"Transfer-Encoding : chunked\r\n\r\n" + PARTS, 400, CLOSED),
    row("coding, tab, colon", POST + b"Transfer-Encoding\t: chunked\r\n\r\n" + PARTS,
        400, CLOSED),
    row("coding twice", POST + CHUNKED + CHUNKED + END + PARTS, {400, 501}, CLOSED),
    row("coding chunked, chunked",
        POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n" + PARTS, {400, 501},
        CLOSED),
    row("coding gzip", POST + b"Transfer-Encoding: gzip\r\n\r\n" + HIDDEN, 501, CLOSED),
    row("coding gzip, chunked",
        POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + PARTS, 501, CLOSED),
    row("coding chunked, gzip",
        POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n" + PARTS, {400, 501}, CLOSED),
    row("coding chunked and gzip in two fields",
        POST + CHUNKED + b"Transfer-Encoding: gzip\r\n\r\n" + PARTS, {400, 501},
        CLOSED),
    row("coding identity", POST + b"Transfer-Encoding: identity\r\n\r\n" + HIDDEN,
        {400, 501}, CLOSED),
    row("coding identity and a length",
        POST + b"Transfer-Encoding: identity\r\n" + LENGTH + END + ITEM, {400, 501},
        CLOSED),
    row("coding unknown", POST + b"Transfer-Encoding: cow\r\n\r\n" + HIDDEN,
        501, CLOSED),
    row("coding xchunked", POST + b"Transfer-Encoding: xchunked\r\n\r\n" + PARTS,
        501, CLOSED),
    row("coding chunkedx", POST + b"Transfer-Encoding: chunkedx\r\n\r\n" + PARTS,
        501, CLOSED),
    row("coding with a parameter",
        POST + b"Transfer-Encoding: chunked;q=1\r\n\r\n" + PARTS, {400, 501}, CLOSED),
    row("coding in quotes", POST + b'Transfer-Encoding: "chunked"\r\n\r\n' + PARTS,
        {400, 501}, CLOSED),
    row("coding after a vertical tab",
        POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n" + PARTS, 400, CLOSED),
    row("coding with a NUL", POST + b"Transfer-Encoding: chunked\0\r\n\r\n" + PARTS,
        400, CLOSED),
    row("coding empty", POST + b"Transfer-Encoding:\r\n\r\n" + HIDDEN, {400, 501},
        CLOSED),
    row("coding folded", POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n" + PARTS,
        400, CLOSED),
    row("coding unknown of a GET", GET + b"Transfer-Encoding: cow\r\n\r\n" + HIDDEN,
        501, CLOSED),
    row("coding in HTTP/1.0",
        b"POST /api/user HTTP/1.0\r\nHost: localhost\r\n" + CHUNKED
        + b"Connection: keep-alive\r\n\r\n" + PARTS, {201, 400, 411, 501}, CLOSED),
    row("Transfer_Encoding is dropped", POST + b"Transfer_Encoding: chunked\r\n\r\n",
        411, EITHER),
    row("Content_Length is dropped", POST + b"Content_Length: 52\r\n\r\n", 411, EITHER),
    row("size +34", POST + CHUNKED + b"\r\n+34\r\n" + ITEM + b"\r\n0\r\n\r\n",
        400, CLOSED),
    row("size -34", POST + CHUNKED + b"\r\n-34\r\n" + ITEM + b"\r\n0\r\n\r\n",
        400, CLOSED),
    row("size -0", POST + CHUNKED + b"\r\n-0\r\n\r\n" + HIDDEN, 400, CLOSED),
    row("size 0x34", POST + CHUNKED + b"\r\n0x34\r\n" + ITEM + b"\r\n0\r\n\r\n",
        400, CLOSED),
    row("size 3_4", POST + CHUNKED + b"\r\n3_4\r\n" + ITEM + b"\r\n0\r\n\r\n",
        400, CLOSED),
    row("size after a space", POST + CHUNKED + b"\r\n 34\r\n" + ITEM + b"\r\n0\r\n\r\n",
        400, CLOSED),
    row("size before a space",
        POST + CHUNKED + b"\r\n34 \r\n" + ITEM + b"\r\n0\r\n\r\n", 400, CLOSED),
    row("size before a tab", POST + CHUNKED + b"\r\n34\t\r\n" + ITEM + b"\r\n0\r\n\r\n",
        400, CLOSED),
    row("size after a vertical tab",
        POST + CHUNKED + b"\r\n\x0b34\r\n" + ITEM + b"\r\n0\r\n\r\n", 400, CLOSED),
    row("size with a NUL", POST + CHUNKED + b"\r\n34\0\r\n" + ITEM + b"\r\n0\r\n\r\n",
        400, CLOSED),
    row("size no number", POST + CHUNKED + b"\r\nxyz\r\n" + ITEM + b"\r\n0\r\n\r\n",
        400, CLOSED),
    row("size empty", POST + CHUNKED + b"\r\n\r\n" + HIDDEN, 400, CLOSED),
    row("size in wide digits",
        POST + CHUNKED + "\r\n３４\r\n".encode() + ITEM + b"\r\n0\r\n\r\n",
        400, CLOSED),
    row("size with zeros before it",
        POST + CHUNKED + b"\r\n000034\r\n" + ITEM + b"\r\n0\r\n\r\n", {201, 400},
        EITHER),
    row("size past 64 bits",
        POST + CHUNKED + b"\r\n10000000000000034\r\n" + ITEM + b"\r\n0\r\n\r\n",
        {400, 413}, CLOSED),
    row("size of 5,000 digits",
        POST + CHUNKED + b"\r\n" + b"f" * 5000 + b"\r\n" + HIDDEN, {400, 413}, CLOSED),
    row("a chunk extension",
        POST + CHUNKED + b'\r\n34;a=b;c="d"\r\n' + ITEM + b"\r\n0\r\n\r\n", {201, 400},
        EITHER),
    row("an extension with a bare line feed",
        POST + CHUNKED + b"\r\n34;\n" + ITEM + b"\r\n0\r\n\r\n", 400, CLOSED),
    row("an extension with a bare carriage return",
        POST + CHUNKED + b"\r\n34;a\rb\r\n" + ITEM + b"\r\n0\r\n\r\n", 400, CLOSED),
    row("an extension of 20,000 bytes",
        POST + CHUNKED + b"\r\n34;" + b"a" * 20_000 + END + ITEM + b"\r\n0\r\n\r\n",
        {400, 413, 431}, CLOSED),
    row("an extension without end",
        POST + CHUNKED + b"\r\n34;" + b"a" * 20_000, {400, 413, 431}, CLOSED),
    row("a chunk ended by a line feed",
        POST + CHUNKED + b"\r\n34\r\n" + ITEM + b"\n0\r\n\r\n", 400, CLOSED),
    row("a chunk ended by a carriage return",
        POST + CHUNKED + b"\r\n34\r\n" + ITEM + b"\r0\r\n\r\n", 400, CLOSED),
    row("a chunk ended by two signs of its own",
        POST + CHUNKED + b"\r\n34\r\n" + ITEM + b"XX0\r\n\r\n", 400, CLOSED),
    row("a chunk longer than its size",
        POST + CHUNKED + b"\r\n33\r\n" + ITEM + b"\r\n0\r\n\r\n", 400, CLOSED),
    row("a chunk shorter than its size",
        POST + CHUNKED + b"\r\n36\r\n" + ITEM + b"\r\n0\r\n\r\n" + HIDDEN, 400, CLOSED),
    row("a size ended by a line feed",
        POST + CHUNKED + b"\r\n34\n" + ITEM + b"\r\n0\r\n\r\n", 400, CLOSED),
    row("a size ended by a carriage return",
        POST + CHUNKED + b"\r\n34\r" + ITEM + b"\r\n0\r\n\r\n", 400, CLOSED),
    row("the last chunk ended by line feeds",
        POST + CHUNKED + b"\r\n34\r\n" + ITEM + b"\r\n0\n\n" + HIDDEN, 400, CLOSED),
    row("a last chunk of many zeros",
        POST + CHUNKED + b"\r\n34\r\n" + ITEM + b"\r\n0000\r\n\r\n",
        {201, 400}, EITHER),
    row("a trailer",
        POST + CHUNKED + b"\r\n34\r\n" + ITEM + b"\r\n0\r\nX-A: 1\r\n\r\n", {201, 400},
        EITHER),
    row("a length in the trailer",
        POST + CHUNKED + b"\r\n34\r\n" + ITEM + b"\r\n0\r\n" + HIDDEN_LENGTH + END,
        {201, 400}, EITHER),
    row("a bad length in the trailer",
        POST + CHUNKED + b"\r\n34\r\n" + ITEM + b"\r\n0\r\nContent-Length: x\r\n\r\n",
        400, CLOSED),
    row("a coding in the trailer",
        POST + CHUNKED + b"\r\n34\r\n" + ITEM + b"\r\n0\r\ntransfer-encoding: cow"
        b"\r\n\r\n" + HIDDEN, 400, CLOSED),
    row("a request for a trailer",
        POST + CHUNKED + b"\r\n34\r\n" + ITEM + b"\r\n0\r\n" + HIDDEN, 400, CLOSED),
    row("a trailer without end",
        POST + CHUNKED + b"\r\n34\r\n" + ITEM + b"\r\n0\r\nX-A: " + b"a" * 20_000,
        {400, 413, 431}, CLOSED),
    row("no end is announced", POST + END, 411, EITHER),
    row("no end is announced by PUT",
        line(b"PUT /api/user/1 HTTP/1.1", JSON), 411, EITHER),
    row("no end is announced by PATCH",
        line(b"PATCH /api/user/1 HTTP/1.1", JSON), 411, EITHER),
    row("no end is announced in HTTP/1.0",
        b"POST /api/user HTTP/1.0\r\nHost: localhost\r\n\r\n" + ITEM, 411, CLOSED),
    row("Content-Encoding", POST + b"Content-Encoding: gzip\r\n" + LENGTH + END + ITEM,
        415, EITHER),
    row("a form's type",
        POST + b"Content-Type: application/x-www-form-urlencoded\r\n" + LENGTH + END
        + ITEM, 415, EITHER),
    row("Expect something else", POST + b"Expect: a-cow\r\n" + LENGTH + END + ITEM,
        417, EITHER),
    row("Expect something else of a GET", GET + b"Expect: a-cow\r\n\r\n", 417, EITHER),
    row("Expect more than 100-continue",
        POST + b"Expect: 100-continue, a-cow\r\n" + LENGTH + END + ITEM, 417, EITHER),
]  # fmt: skip

LIMITS = [
    row("a line of 8,400 bytes", line(b"GET /%s HTTP/1.1" % (b"a" * 8400)),
        414, CLOSED),
    row("a line that never ends", b"GET /" + b"a" * 9000, 414, CLOSED),
    row("a query of 8,400 bytes",
        line(b"GET /api/user?q=%s HTTP/1.1" % (b"a" * 8400)), 414, CLOSED),
    row("a method that never ends", b"A" * 9000, {400, 414}, CLOSED),
    row("a field of 17,000 bytes", GET + b"X-A: %s\r\n\r\n" % (b"a" * 17_000),
        431, CLOSED),
    row("a field that never ends", GET + b"X-A: " + b"a" * 17_000, 431, CLOSED),
    row("a name that never ends", GET + b"X" * 17_000, {400, 431}, CLOSED),
    row("17 fields of 1,000 bytes", GET + (b"X-A: %s\r\n" % (b"a" * 1000)) * 17 + END,
        431, CLOSED),
    row("65 fields", GET + b"".join(b"X-%d: 1\r\n" % i for i in range(64)) + END,
        431, CLOSED),
    row("65 fields of one name", GET + b"A: 1\r\n" * 64 + END, 431, CLOSED),
    row("65 fields to be dropped", GET + b"A_: 1\r\n" * 64 + END, 431, CLOSED),
    row("fields without end", GET + b"A: 1\r\n" * 3000, 431, CLOSED),
    row("a body a byte too long, not sent",
        POST + b"Content-Length: 1001\r\n\r\n", 413, CLOSED),
    row("a body a byte too long, sent",
        POST + b"Content-Length: 1001\r\n\r\n" + ITEM.ljust(1001), 413, CLOSED),
    row("a body of a terabyte",
        POST + b"Content-Length: 1099511627776\r\n\r\n" + HIDDEN,
        413, CLOSED),
    row("a body of more bytes than any machine counts",
        POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", 413, CLOSED),
    row("a body too long for a GET",
        GET + b"Content-Length: 1001\r\n\r\n" + HIDDEN.ljust(1001), 413, CLOSED),
    row("a body too long, expected",
        POST + b"Expect: 100-continue\r\nContent-Length: 1001\r\n\r\n", 413, CLOSED),
    row("one chunk too long",
        POST + CHUNKED + END + chunks(ITEM.ljust(1001)) + b"0\r\n\r\n", 413, CLOSED),
    row("a chunk too long, not sent", POST + CHUNKED + b"\r\nffffffff\r\n",
        413, CLOSED),
    row("many chunks too long",
        POST + CHUNKED + END + chunks(ITEM, *[b" " * 50] * 20) + b"0\r\n\r\n",
        413, CLOSED),
    row("chunks that never end", POST + CHUNKED + END + chunks(*[b" "] * 1002),
        413, CLOSED),
]  # fmt: skip

HEADS = [
    row("no Host", b"GET /api/user/1 HTTP/1.1\r\n\r\n", 400, CLOSED),
    row("no Host, other fields", b"GET /api/user/1 HTTP/1.1\r\nX-A: 1\r\n\r\n",
        400, CLOSED),
    row("Host with an underscore is none",
        b"GET /api/user/1 HTTP/1.1\r\nHo_st: localhost\r\n\r\n", 400, CLOSED),
    row("two Hosts", GET + b"Host: evil.example\r\n\r\n", 400, CLOSED),
    row("the same Host twice", GET + b"host: localhost\r\n\r\n", 400, CLOSED),
    row("two Hosts in HTTP/1.0", GET10 + b"Host: localhost\r\n\r\n", 400, CLOSED),
    row("two Hosts in one",
        b"GET /api/user/1 HTTP/1.1\r\nHost: localhost, localhost\r\n\r\n", {400, 403},
        EITHER),
    row("Host empty", b"GET /api/user/1 HTTP/1.1\r\nHost:\r\n\r\n", {400, 403}, EITHER),
    row("Host another's", b"GET /api/user/1 HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        403, EITHER),
    row("Host another's subdomain",
        b"GET /api/user/1 HTTP/1.1\r\nHost: localhost.evil.example\r\n\r\n", 403,
        EITHER),
    row("Host with a user", b"GET /api/user/1 HTTP/1.1\r\nHost: localhost@evil\r\n\r\n",
        {400, 403}, EITHER),
    row("Host with a path", b"GET /api/user/1 HTTP/1.1\r\nHost: localhost/a\r\n\r\n",
        {400, 403}, EITHER),
    row("Host with a space", b"GET /api/user/1 HTTP/1.1\r\nHost: local host\r\n\r\n",
        {400, 403}, EITHER),
    row("Host half in brackets", b"GET /api/user/1 HTTP/1.1\r\nHost: [::1\r\n\r\n",
        {400, 403}, EITHER),
    row("Host, space, colon", b"GET /api/user/1 HTTP/1.1\r\nHost : localhost\r\n\r\n",
        400, CLOSED),
    row("a bare line feed after the first line",
        b"GET /api/user/1 HTTP/1.1\nHost: localhost\r\n\r\n", 400, CLOSED),
    row("a bare line feed after a field", GET + b"X-A: 1\nX-B: 2\r\n\r\n", 400, CLOSED),
    row("bare line feeds all over",
        b"GET /api/user/1 HTTP/1.1\nHost: localhost\n\n", 400, CLOSED),
    row("a bare line feed for the last line", GET + b"X-A: 1\r\n\n" + HIDDEN,
        400, CLOSED),
    row("two bare line feeds in a value", GET + b"X-A: 1\n\n" + HIDDEN, 400, CLOSED),
    row("a bare carriage return in a value", GET + b"X-A: 1\rX-B: 2\r\n\r\n",
        400, CLOSED),
    row("a bare carriage return ends the first line",
        b"GET /api/user/1 HTTP/1.1\rHost: localhost\r\n\r\n", 400, CLOSED),
    row("bare carriage returns all over",
        b"GET /api/user/1 HTTP/1.1\rHost: localhost\r\r" + END, 400, CLOSED),
    row("two carriage returns", GET + b"X-A: 1\r\r\n\r\n", 400, CLOSED),
    row("a line folded by a space", GET + b"X-A: 1\r\n 2\r\n\r\n", 400, CLOSED),
    row("a line folded by a tab", GET + b"X-A: 1\r\n\t2\r\n\r\n", 400, CLOSED),
    row("a line of a space", GET + b"X-A: 1\r\n \r\n\r\n", 400, CLOSED),
    row("a space before the first field",
        b"GET /api/user/1 HTTP/1.1\r\n Host: localhost\r\n\r\n", 400, CLOSED),
    row("a space before the colon", GET + b"X-A : 1\r\n\r\n", 400, CLOSED),
    row("a tab before the colon", GET + b"X-A\t: 1\r\n\r\n", 400, CLOSED),
    row("a space within a name", GET + b"X A: 1\r\n\r\n", 400, CLOSED),
    row("a name in brackets", GET + b"(X): 1\r\n\r\n", 400, CLOSED),
    row("a name with a slash", GET + b"X/A: 1\r\n\r\n", 400, CLOSED),
    row("a name in quotes", GET + b'"X": 1\r\n\r\n', 400, CLOSED),
    row("a name with a NUL", GET + b"X\0A: 1\r\n\r\n", 400, CLOSED),
    row("a name in UTF-8", GET + "Zoë: 1\r\n\r\n".encode(), 400, CLOSED),
    row("no name", GET + b": 1\r\n\r\n", 400, CLOSED),
    row("no colon", GET + b"X-A\r\n\r\n", 400, CLOSED),
    row("no colon, then a length", POST + b"X-A\r\n" + LENGTH + END + ITEM,
        400, CLOSED),
    row("a value with a NUL", GET + b"X-A: a\0b\r\n\r\n", 400, CLOSED),
    row("a value with a bell", GET + b"X-A: a\x07b\r\n\r\n", 400, CLOSED),
    row("a value with an escape", GET + b"X-A: \x1b[31m\r\n\r\n", 400, CLOSED),
    row("a value with a vertical tab", GET + b"X-A: a\x0bb\r\n\r\n", 400, CLOSED),
    row("a value with a form feed", GET + b"X-A: a\x0cb\r\n\r\n", 400, CLOSED),
    row("a value with a DEL", GET + b"X-A: a\x7fb\r\n\r\n", 400, CLOSED),
    row("a control sign at a value's end", GET + b"X-A: a\x1f\r\n\r\n", 400, CLOSED),
    row("a control sign in a dropped field", GET + b"X_A: a\0b\r\n\r\n", 400, CLOSED),
    row("a value in UTF-8", GET + "X-A: Zoë\r\n\r\n".encode(), {200, 400}, EITHER),
    row("a value in Latin-1", GET + b"X-A: Zo\xeb\r\n\r\n", {200, 400}, EITHER),
    row("HTTP/0.9", b"GET /api/user/1\r\n", 400, CLOSED),
    row("HTTP/0.9 by a line feed", b"GET /api/user/1\n" + END, 400, CLOSED),
    row("a method alone", b"GET\r\n\r\n", 400, CLOSED),
    row("no target", line(b"GET HTTP/1.1"), 400, CLOSED),
    row("an empty target", line(b"GET  HTTP/1.1"), 400, CLOSED),
    row("an empty line in front, which h11 refuses, too", b"\r\n" + GET + END,
        400, CLOSED),
    row("two spaces before the target", line(b"GET  /api/user/1 HTTP/1.1"),
        400, CLOSED),
    row("two spaces after the target", line(b"GET /api/user/1  HTTP/1.1"), 400, CLOSED),
    row("a space after the version", line(b"GET /api/user/1 HTTP/1.1 "), 400, CLOSED),
    row("a space before the method", line(b" GET /api/user/1 HTTP/1.1"), 400, CLOSED),
    row("tabs for spaces", line(b"GET\t/api/user/1\tHTTP/1.1"), 400, CLOSED),
    row("a space in the target", line(b"GET /api/user /1 HTTP/1.1"), 400, CLOSED),
    row("http in small letters", line(b"GET /api/user/1 http/1.1"), {400, 505}, CLOSED),
    row("HTTP/1", line(b"GET /api/user/1 HTTP/1"), {400, 505}, CLOSED),
    row("HTTP/1.", line(b"GET /api/user/1 HTTP/1."), {400, 505}, CLOSED),
    row("HTTP/1.1.1", line(b"GET /api/user/1 HTTP/1.1.1"), {400, 505}, CLOSED),
    row("HTTP/1.01", line(b"GET /api/user/1 HTTP/1.01"), {400, 505}, CLOSED),
    row("HTTP/01.1", line(b"GET /api/user/1 HTTP/01.1"), {400, 505}, CLOSED),
    row("HTTP/1,1", line(b"GET /api/user/1 HTTP/1,1"), {400, 505}, CLOSED),
    row("HTTP/+1.1", line(b"GET /api/user/1 HTTP/+1.1"), {400, 505}, CLOSED),
    row("HTTP/ 1.1", line(b"GET /api/user/1 HTTP/ 1.1"), 400, CLOSED),
    row("HTTPS/1.1", line(b"GET /api/user/1 HTTPS/1.1"), {400, 505}, CLOSED),
    row("XHTTP/1.1", line(b"GET /api/user/1 XHTTP/1.1"), {400, 505}, CLOSED),
    row("HTTP in wide digits", line("GET / HTTP/１.１".encode()), {400, 505}, CLOSED),
    row("HTTP/0.9 by name", line(b"GET /api/user/1 HTTP/0.9"), {400, 505}, CLOSED),
    row("HTTP/1.2", line(b"GET /api/user/1 HTTP/1.2"), {200, 400, 505}, EITHER),
    row("HTTP/2.0", line(b"GET /api/user/1 HTTP/2.0"), 505, CLOSED),
    row("HTTP/2's preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, CLOSED),
    row("HTTP/9.9", line(b"GET /api/user/1 HTTP/9.9"), 505, CLOSED),
    row("HTTP/2.0 with a body",
        line(b"POST /api/user HTTP/2.0", HIDDEN_LENGTH) + HIDDEN,
        505, CLOSED),
    row("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\xaa" * 32 + END,
        400, CLOSED),
    row("SSH", b"SSH-2.0-OpenSSH_9.6\r\n", 400, CLOSED),
    row("an answer for a request", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        400, CLOSED),
    row("a NUL", b"\0", 400, CLOSED),
    row("a colon", b":\r\n\r\n", 400, CLOSED),
    row("another after a fault", b"GET /\r\n\r\n" + HIDDEN, 400, CLOSED),
]  # fmt: skip

TARGETS = [
    row("a method that nobody knows", line(b"BREW /api/user HTTP/1.1"), {405, 501},
        EITHER),
    row("an unknown method with a body",
        line(b"BREW /api/user HTTP/1.1", HIDDEN_LENGTH) + HIDDEN, {405, 501}, EITHER),
    row("get", line(b"get /api/user/1 HTTP/1.1"), {405, 501}, EITHER),
    row("Delete", line(b"Delete /api/user/1 HTTP/1.1"), {405, 501}, EITHER),
    row("TRACE", line(b"TRACE /api/user/1 HTTP/1.1", b"Cookie: a=b\r\n"), {405, 501},
        EITHER),
    row("CONNECT", b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost:80\r\n\r\n",
        {400, 405, 501}, EITHER),
    row("a method of odd signs", line(b"!#$%&'*+-.^_`|~ /api/user/1 HTTP/1.1"),
        {405, 501}, EITHER),
    row("a method that is no token", line(b"G@T /api/user/1 HTTP/1.1"), 400, CLOSED),
    row("a method with a NUL", line(b"GE\0T /api/user/1 HTTP/1.1"), 400, CLOSED),
    row("a method in UTF-8", line("GËT /api/user/1 HTTP/1.1".encode()), 400, CLOSED),
    row("a relative target", line(b"GET api/user/1 HTTP/1.1"), 400, CLOSED),
    row("backslashes", line(b"GET \\api\\user\\1 HTTP/1.1"), 400, CLOSED),
    row("an authority for GET", line(b"GET localhost:80 HTTP/1.1"), 400, CLOSED),
    row("an asterisk for GET", line(b"GET * HTTP/1.1"), {400, 404, 405}, EITHER),
    row("an asterisk for OPTIONS", line(b"OPTIONS * HTTP/1.1"), 204, OPEN),
    row("a target in UTF-8", line("GET /api/user?q=Zoë HTTP/1.1".encode()),
        400, CLOSED),
    row("a path in UTF-8", line("GET /api/user/１ HTTP/1.1".encode()), 400, CLOSED),
    row("a target with a NUL", line(b"GET /api/user/1\0 HTTP/1.1"), 400, CLOSED),
    row("a target with a control sign", line(b"GET /api/user/\x011 HTTP/1.1"),
        400, CLOSED),
    row("a target with a DEL", line(b"GET /api/user/1\x7f HTTP/1.1"), 400, CLOSED),
    row("a target with a line feed", line(b"GET /api/user\n/1 HTTP/1.1"), 400, CLOSED),
    row("a target with a carriage return", line(b"GET /api/user\r/1 HTTP/1.1"),
        400, CLOSED),
    row("a fragment", line(b"GET /api/user/99#1 HTTP/1.1"), {400, 404}, EITHER),
    row("%zz", line(b"GET /api/user/%zz HTTP/1.1"), {400, 404}, EITHER),
    row("%", line(b"GET /api/user/1% HTTP/1.1"), {400, 404}, EITHER),
    row("%3", line(b"GET /api/user/%3 HTTP/1.1"), {400, 404}, EITHER),
    row("%FF before an id", line(b"GET /api/user/%FF1 HTTP/1.1"), {400, 404}, EITHER),
    row("half a letter before an id", line(b"GET /api/user/%C31 HTTP/1.1"), {400, 404},
        EITHER),
    row("an overlong slash", line(b"GET /api/user%C0%AF1 HTTP/1.1"),
        {400, 404}, EITHER),
    row("a surrogate", line(b"GET /api/user/%ED%A0%80 HTTP/1.1"), {400, 404}, EITHER),
    row("%00 behind an id", line(b"GET /api/user/1%00 HTTP/1.1"), {400, 404}, EITHER),
    row("%0D%0A behind an id", line(b"GET /api/user/1%0D%0AX-A:1 HTTP/1.1"), {400, 404},
        EITHER),
    row("an id in wide digits", line(b"GET /api/user/%EF%BC%91 HTTP/1.1"), {400, 404},
        EITHER),
    row("an id in superscript", line(b"GET /api/user/%C2%B9 HTTP/1.1"), {400, 404},
        EITHER),
    row("an id with an underscore", line(b"GET /api/user/0_1 HTTP/1.1"), {400, 404},
        EITHER),
    row("an id after a space", line(b"GET /api/user/%201 HTTP/1.1"),
        {400, 404}, EITHER),
    row("an id after a plus", line(b"GET /api/user/+1 HTTP/1.1"), {400, 404}, EITHER),
    row("an id of 5,000 digits",
        line(b"GET /api/user/%s HTTP/1.1" % (b"1" * 5000)), {400, 404}, EITHER),
    row("%FF in a query", line(b"GET /api/user?q=%FF HTTP/1.1"), 400, EITHER),
    row("an unknown parameter", line(b"GET /api/user?cow=1 HTTP/1.1"), 400, EITHER),
    row("two slashes first", line(b"GET //api/user/1 HTTP/1.1"), {400, 404}, EITHER),
    row("another's host in two slashes", line(b"GET //evil.example/ HTTP/1.1"),
        {400, 404}, EITHER),
    row("two slashes within", line(b"GET /api//user/1 HTTP/1.1"), {400, 404}, EITHER),
    row("dots", line(b"GET /api/user/../user/1 HTTP/1.1"), {400, 404}, EITHER),
    row("encoded dots", line(b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1"), {400, 404},
        EITHER),
    row("another's absolute form", line(b"GET http://evil.example/api/user/1 HTTP/1.1"),
        {400, 403}, EITHER),
    row("an absolute form with a user",
        line(b"GET http://localhost@evil.example/api/user/1 HTTP/1.1"), {400, 403},
        EITHER),
    row("an absolute form half in brackets",
        line(b"GET http://[::1/api/user/1 HTTP/1.1"), {400, 403}, EITHER),
    row("an absolute form of no host", line(b"GET http:///api/user/1 HTTP/1.1"),
        {400, 403}, EITHER),
    row("an absolute form of another scheme",
        line(b"GET ftp://localhost/api/user/1 HTTP/1.1"), {400, 403, 404}, EITHER),
    row("an absolute form without Host",
        b"GET http://localhost/api/user/1 HTTP/1.1\r\n\r\n", 400, CLOSED),
    row("javascript:", line(b"GET javascript:alert(1) HTTP/1.1"), 400, CLOSED),
]  # fmt: skip

ROWS = SOUND + FRAMING + LIMITS + HEADS + TARGETS

WAYS = {
    "whole": lambda data: [data],
    "bytes": lambda data: [data[i : i + 1] for i in range(len(data))],
    "lines": lambda data: [part for part in re.split(rb"(?<=\r\n)", data) if part],
}


def test_the_table_is_large_enough_and_its_names_are_unique():
    assert len(ROWS) - len(SOUND) >= 120
    assert len({row.name for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS])
def test_each_request_gets_one_answer(small, row, way):
    """The row's own answer, then the probe's or the end: nothing between or behind."""
    with Client(small) as client:
        for part in WAYS[way](row.data):
            client.send(part)
            client.take()
        client.send(PROBE)
        answer = client.answer(row.data.split(b" ")[0].decode("latin-1"))
        assert answer, "closed without a word"
        assert answer.status in row.statuses, answer
        assert answer.interim <= (b"HTTP/1.1\r\n" in row.data and b"xpect:" in row.data)
        assert answer.status != 405 or answer.get("allow"), answer
        following = client.answer()
        assert following or row.end is not OPEN, f"closed after {answer}"
        assert not following or row.end is not CLOSED, f"went on with {following}"
        if following:
            assert following.status == 200, following
            assert following.json()["results"][0]["id"] == 1
            assert client.answer() is None
        else:
            assert answer.closes, answer


@pytest.mark.parametrize(
    "status", [400, 403, 404, 405, 411, 413, 414, 415, 417, 431, 501, 505]
)
def test_each_refusal_is_a_problem(small, status):
    """The server's own refusals look as the application's do."""
    rows = [r for r in ROWS if r.statuses == {status} and r.data[:4] != b"HEAD"]
    assert rows
    for row in rows:
        with Client(small) as client:
            client.send(row.data)
            client.send(PROBE)
            answer = client.answer()
        assert answer.status == status, row.name
        assert_problem(answer)


def test_the_page_of_a_listed_origin_may_read_the_servers_own_refusals(tmp_path):
    origin = "http://a.example"
    with Server(tmp_path, "--cors", origin) as server, Client(server) as client:
        head = POST + b"Origin: %s\r\n" % origin.encode()
        answer = client.ask(head + b"Content-Length: 9000000\r\n\r\n")
        assert answer.status == 413
        assert answer.get("access-control-allow-origin") == origin
        assert answer.get("vary") == "Accept, Origin"


# ---------------------------------------------------------------------------------
# The same question put to h11
# ---------------------------------------------------------------------------------

#: A WSGI application that says what reached it, and some that misbehave on purpose.
WORKBENCH = """
import base64, json, sys, threading
from wsgiref.validate import validator

sys.path.insert(0, sys.argv[1])
import userapi

state = {"closed": 0, "pulled": 0, "released": False}


def echo(environ, start_response):
    body = environ["wsgi.input"].read()
    seen = [environ["REQUEST_METHOD"], environ["PATH_INFO"], environ["QUERY_STRING"],
            body.decode("latin-1")]
    seen = base64.b64encode(json.dumps(seen).encode()).decode()
    start_response("200 OK", [("X-Echo", seen), ("Content-Length", "0")])
    return [b""]


def environ(environ, start_response):
    seen = {k: v for k, v in environ.items() if isinstance(v, (str, bool, tuple))}
    body = environ["wsgi.input"]
    seen["body"] = [body.read(3), body.readline(), body.readline(5), list(body)]
    seen["thread"] = threading.current_thread() is threading.main_thread()
    body = json.dumps(seen, default=lambda value: value.decode()).encode()
    start_response("200 OK", [("Content-Type", "application/json"),
                              ("Content-Length", str(len(body)))])
    return [body]


class Stream:
    def __init__(self, parts):
        self.parts = iter(parts)

    def __iter__(self):
        return self

    def __next__(self):
        state["pulled"] += 1
        return next(self.parts)

    def close(self):
        state["closed"] += 1


def wait():
    while not state["released"]:
        yield b""
    yield b"released"
    yield b""


def half():
    yield b"half"
    yield b"way"
    raise RuntimeError("half way")


def stream(parts, status="200 OK", *headers):
    def application(environ, start_response):
        start_response(status, [("Content-Type", "text/plain"), *headers])
        return Stream(parts())
    return application


def release(environ, start_response):
    state["released"] = environ["QUERY_STRING"] == "yes"
    start_response("204 No Content", [])
    return []


def report(environ, start_response):
    body = json.dumps(state).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


def unread(environ, start_response):
    start_response("200 OK", [("Content-Length", "6")])
    return [b"unread"]


def fault(environ, start_response):
    raise RuntimeError("a secret of the application")


def unsent(value, content):
    def application(environ, start_response):
        start_response("200 OK", [("X-A", value)])
        return [content]
    return application


PATHS = {
    "/environ": validator(environ),
    "/wait": stream(wait),
    "/nothing": stream(lambda: [b"", b"", b"at last", b"", b""]),
    "/half": stream(half),
    "/flood": stream(lambda: (b"x" * 100_000 for _ in range(1000))),
    "/release": release,
    "/report": report,
    "/unread": unread,
    "/fault": fault,
    "/accent": unsent("\u0142", b"x"),
    "/text": unsent("a", "x"),
    "/split": stream(lambda: [b"x"], "200 OK", ("X-A", "1\\r\\nX-Injected: 1")),
    "/status": stream(lambda: [b"x"], "200 OK\\r\\nX-Injected: 1"),
    "/short": stream(lambda: [b"short"], "200 OK", ("Content-Length", "10")),
    "/long": stream(lambda: [b"much", b"too long"], "200 OK", ("Content-Length", "4")),
}


class Workbench(userapi.UserAPI):
    def __call__(self, environ, start_response):
        application = PATHS.get(environ["PATH_INFO"], echo)
        return application(environ, start_response)


userapi.serve(Workbench(db=sys.argv[2]), port=0, log="off")
"""


@pytest.fixture(scope="module")
def workbench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workbench")
    script = folder / "workbench.py"
    script.write_text(WORKBENCH)
    argv = [script, USERAPI.parent, folder / "users.db"]
    with Server(folder, argv=argv, port=None) as server:
        server.faulty = True
        yield server


def h11_reads(data):
    """The requests that h11 reads out of `data` before its first complaint."""
    requests = []
    while data:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MIB)
        connection.receive_data(data)
        connection.receive_data(b"")
        data = b""
        with contextlib.suppress(h11.RemoteProtocolError):
            while read_one(connection, requests):
                connection.start_next_cycle()
            if requests and requests[-1].stays_open:
                data = connection.trailing_data[0]
    return requests


Read = collections.namedtuple("Read", "method target body stays_open")


def read_one(connection, requests):
    """Read a request and answer it; true if there may be another."""
    body = b""
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            break
        else:
            return False
    # h11 ends every HTTP/1.0 connection; a server may keep one alive when asked.
    asked = b",".join(v for k, v in request.headers if k == b"connection").lower()
    asked = {token.strip() for token in asked.split(b",")}
    old = request.http_version == b"1.0" and asked & {b"keep-alive", b"close"} == {
        b"keep-alive"
    }
    requests.append(Read(request.method, request.target, body, old))
    connection.send(h11.Response(status_code=404, headers=[("Content-Length", "0")]))
    connection.send(h11.EndOfMessage())
    return connection.states == {h11.CLIENT: h11.DONE, h11.SERVER: h11.DONE}


def as_wsgi(request):
    """What an application must be told of a request that h11 has read."""
    path, _, query = request.target.partition(b"?")
    path = re.sub(rb"(?i)^https?://[^/]*", b"", path) or b"/"
    parts = (request.method, unquote_to_bytes(path), query, request.body)
    return [part.decode("latin-1") for part in parts]


CORPUS = [
    b"GET /a?b=c HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n",
    b"POST /p HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello",
    b"POST /p?q HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n",
    b"PUT /x%20y HTTP/1.1\r\nhost:localhost\r\ncontent-length: 012\r\n\r\nGET / HTTP/1",
    b"DELETE /d HTTP/1.1\r\nHost: localhost\r\nX-A: 1\r\nX-B: 2\r\n\r\n"
    b"GET /second HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"PATCH /c HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    b"Content-Length: 41\r\n\r\nGET /hidden HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /old HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET /older HTTP/1.0\r\n\r\n",
    b"POST /e HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
    b"Content-Length: 3\r\n\r\nabc",
    b"POST /t HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"29\r\nGET /hidden HTTP/1.1\r\nHost: localhost\r\n\r\n\r\n0\r\nX-T: 1\r\n\r\n"
    b"GET /third HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"HEAD http://localhost/h?x=1 HTTP/1.1\r\nHost: localhost\r\n\r\n"
    b"POST /i HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n1",
]

SPICE = [
    bytes([byte]) for byte in b"\r\n\0\t\x0b\x7f\x80\xff :;,=_+-0159afxAZ/?%#*.\"'"
]
SPICE += [
    b"\r\n", b"\n\n", b"\r\n ", b"\r\n\t", b"\r\n\r\n", b" : ", b"0\r\n\r\n",
    b"HTTP/1.0", b"HTTP/1.2", b"HTTP/2.0",
    b"Content-Length: 5\r\n", b"Content-Length: 0\r\n",
    b"Content_Length: 5\r\n", b"Content-Length : 5\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: gzip\r\n", b"Transfer-Encoding:\tchunked \r\n",
    b"transfer-encoding: identity\r\n", b"Host: localhost\r\n", b"Host: evil\r\n",
    b"Connection: close\r\n", b"Connection: keep-alive\r\n",
    b"Expect: 100-continue\r\n",
    b"Upgrade: websocket\r\nConnection: upgrade\r\n", b"5;a=b", b"05", b"0x5", b"%00",
    b"%2f", b"%", b"%c3%a9", b"http://localhost", b"//", b"GET / HTTP/1.1\r\n",
]  # fmt: skip


#: What a framing fault, a limit, an Expect, a coding and a version may be answered.
KNOWN = {b"200", b"400", b"411", b"413", b"414", b"417", b"431", b"501", b"505"}


def mutate(rng):
    """A sound conversation with one to three things done to it."""
    data = rng.choice(CORPUS)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        lines = data.split(b"\r\n")
        i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
        trick = rng.randrange(8)
        if trick == 0:
            data = data[:at] + rng.choice(SPICE) + data[at:]
        elif trick == 1:
            data = data[:at] + rng.choice(SPICE) + data[at + 1 :]
        elif trick == 2:
            data = data[:at] + data[at + rng.randint(1, 4) :]
        elif trick == 3:
            data = b"\r\n".join([*lines[:i], lines[j], *lines[i:]])
        elif trick == 4:
            lines[i], lines[j] = lines[j], lines[i]
            data = b"\r\n".join(lines)
        elif trick == 5:
            data = b"\r\n".join([*lines[:i], *lines[i + 1 :]])
        elif trick == 6:
            lines[i] += rng.choice(SPICE)
            data = b"\r\n".join(lines)
        else:
            data = data + rng.choice(CORPUS)
    return data


def converse(server, conversations, rng):
    """Send each on a connection of its own; all that came back, in the same order."""
    clients = [Client(server) for _ in conversations]
    for client, data in zip(clients, conversations):
        if rng.random() < 0.3:
            at = rng.randrange(len(data) + 1)
            client.send(data[:at])
            data = data[at:]
        client.send(data)
        client.end()
    for client in clients:
        with client:
            yield client.rest()


@pytest.mark.parametrize("seed", range(6))
def test_what_is_accepted_h11_reads_the_same_way(workbench, seed):
    """1,500 mutations a seed: all that is answered, h11 reads, and in the same way."""
    rng = random.Random(seed)
    accepted = refused = 0
    for _ in range(75):
        conversations = [mutate(rng) for _ in range(20)]
        answers = converse(workbench, conversations, rng)
        for data, answer in zip(conversations, answers):
            seen = re.findall(rb"(?i)\r\nX-Echo: (\S+)\r\n", answer)
            seen = [json.loads(base64.b64decode(item)) for item in seen]
            finals = re.findall(rb"HTTP/1\.[01] ([2-5]\d\d) ", answer)
            expected = [as_wsgi(request) for request in h11_reads(data)]
            if set(finals) <= {b"200"}:
                assert seen == expected[: len(seen)], data
                # Half a line may end without a word, a whole request may not.
                bare = re.search(rb"(?<!\r)\n|\r(?!\n)", data)
                assert bare or len(seen) == len(expected), data
            else:  # some were refused without the application: the rest in order
                others = iter(expected)
                assert all(any(a == b for b in others) for a in seen), data
            assert set(finals) <= KNOWN, data
            accepted += len(seen)
            refused += len(finals) - len(seen)
    assert accepted > 300 and refused > 300


@pytest.mark.parametrize(
    "data",
    [data for data in CORPUS if b"X-T" not in data],
    ids=lambda data: data.split()[1].decode(),
)
def test_what_is_sound_is_accepted(workbench, data):
    expected = [as_wsgi(request) for request in h11_reads(data)]
    assert expected
    with Client(workbench) as client:
        for request in expected:
            client.send(data)
            data = b""
            answer = client.answer(request[0])
            assert json.loads(base64.b64decode(answer.get("x-echo"))) == request


def test_the_table_accepts_nothing_that_h11_refuses():
    """Proof of the table itself, without the server."""
    for row in ROWS:
        if max(row.statuses) < 300:
            assert h11_reads(row.data), row.name


# ---------------------------------------------------------------------------------
# Order, and how long a connection lives
# ---------------------------------------------------------------------------------


def conversation(first):
    """100 requests, each leaning on the one before it, and what they must get."""
    asked = []
    for n in range(first, first + 20):
        path, item = f"/api/user/{n}", ada(f"No {n}", id=n)
        asked += [
            (request("POST", "/api/user", item), "POST", 201, f"No {n}"),
            (request("GET", path), "GET", 200, f"No {n}"),
            (request("PATCH", path, {"name": f"New {n}"}), "PATCH", 200, f"New {n}"),
            (request("HEAD", path), "HEAD", 200, ""),
            (request("DELETE", path), "DELETE", 200, "SUCCESS"),
        ]
    return asked


def check_conversation(client, asked):
    for data, method, status, held in asked:
        answer = client.answer(method)
        assert answer and answer.status == status, (data, answer)
        assert held.encode() in answer.body, (data, answer)


def test_a_hundred_pipelined_requests_are_answered_in_order(server):
    asked = conversation(1000)
    with Client(server) as client:
        client.send(b"".join(data for data, *_ in asked))
        check_conversation(client, asked)
        assert client.ask(request("GET", "/api/user/1019")).status == 404


def test_pipelined_requests_may_come_in_any_pieces(server):
    asked = conversation(2000)
    data = b"".join(data for data, *_ in asked)
    rng = random.Random(3)
    with Client(server) as client:
        while data:
            size = rng.randint(1, 700)
            client.send(data[:size])
            data = data[size:]
            client.take()
        check_conversation(client, asked)


def test_answers_of_a_turn_leave_together(server):
    with Client(server) as client:
        client.send(5 * request("GET", "/health"))
        client.more()
        assert client.buffer.count(b'{"status": "ok"}') == 5


def test_a_connection_serves_many_requests(server):
    with Client(server) as client:
        for _ in range(500):
            assert client.ask(request("GET", "/api/user/1")).status == 200


def test_all_answers_arrive_after_the_client_has_stopped_sending(server):
    """The end of input comes with the requests: reads, writes, a refusal, a stream."""
    asked = conversation(3000)
    asked.append((request("GET", "/nowhere"), "GET", 404, "FAILURE"))
    asked.append((request("GET", "/api/user"), "GET", 200, "results"))
    with Client(server) as client:
        client.send(b"".join(data for data, *_ in asked))
        client.end()
        check_conversation(client, asked)
        assert client.answer() is None


def test_a_single_write_is_answered_after_the_client_has_stopped_sending(server):
    for _ in range(20):
        with Client(server) as client:
            client.send(request("POST", "/api/user", ada()))
            client.end()
            assert client.answer().status == 201
            assert client.answer() is None


def test_what_comes_before_a_fault_is_answered_in_full(crowded):
    """A long stream and a write are not cut short by the faulty request behind them."""
    write = request("POST", "/api/user", ada(id=200_000))
    undo = request("DELETE", "/api/user/200000")
    with Client(crowded) as client:
        client.send(request("GET", "/api/user") + write + undo + GET + b"X\r\n\r\n")
        client.send(HIDDEN)
        assert len(client.answer().json()["results"]) == 100_000
        assert client.answer().status == 201
        assert client.answer().status == 200
        assert client.answer().status == 400
        assert client.answer() is None


def test_a_long_stream_outlives_the_end_of_input(crowded):
    with Client(crowded, window=65_536) as client:
        client.send(request("GET", "/api/user") + request("GET", "/api/user/7"))
        client.end()
        assert len(client.answer().json()["results"]) == 100_000
        assert client.answer().json()["results"][0]["id"] == 7
        assert client.answer() is None


@linux
def test_a_connection_ends_when_its_last_answer_is_out(crowded):
    """Not when it has idled, wherever the kernel's buffers were full on the way."""
    page = request("GET", "/api/user?limit=200")

    def send(client, count):
        client.send(page * count)
        client.end()
        for _ in range(20):  # turns of the loop in which it gets as far as it can
            assert other.ask(request("GET", "/api/user/7")).status == 200

    with Client(crowded) as other:
        length = len(other.ask(page).body)
        with Client(crowded, window=16_384) as client:
            send(client, 200)
            full = in_the_kernel(client, crowded) // length
        for count in range(max(1, full - 8), full + 5):
            with Client(crowded, window=16_384, timeout=20) as client:
                send(client, count)
                assert len(client.rest()) > count * length


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"GET /api/us",
        b"GET /api/user HTTP/1.1\r\nHost: localhost\r\n",
        POST + JSON + b"Content-Length: 60\r\n\r\n" + ITEM,
        POST + JSON + CHUNKED + END + chunks(ITEM),
        POST + JSON + CHUNKED + END + chunks(ITEM) + b"0\r\n",
    ],
    ids=["nothing", "half a line", "half a head", "half a body", "no last chunk",
         "half a last chunk"],
)  # fmt: skip
def test_half_a_request_does_nothing(server, start):
    with Client(server) as watcher:
        before = watcher.ask(request("GET", "/api/user")).json()
        with Client(server) as client:
            client.send(start)
            client.end()
            answer = client.answer()
            assert answer is None or answer.status == 400, answer
            assert answer is None or client.answer() is None
        assert watcher.ask(request("GET", "/api/user")).json() == before


def test_a_client_that_goes_away_is_let_go(server):
    """With requests under way and half sent: no descriptor is kept, nothing is said."""
    with Client(server) as watcher:
        watcher.ask(request("GET", "/api/user/1"))
        before = server.descriptors() if sys.platform.startswith("linux") else 0
        write = request("POST", "/api/user", ada())
        for data in (b"", b"GET", request("GET", "/api/user"), write[:-5], write * 5):
            for _ in range(10):
                client = Client(server)
                client.send(data)
                # Closed with a reset, not with an orderly end.
                client.socket.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
                client.close()
        assert watcher.ask(request("GET", "/api/user/1")).status == 200
        if before:
            wait_for(lambda: server.descriptors() <= before, "closed sockets")


def test_one_that_pipelines_much_leaves_room_for_others(server):
    """20,000 requests at once: another's, one by one, are answered in between."""
    data, total = request("GET", "/api/user/1"), 20_000
    with Client(server) as client:
        client.send(data)
        client.end()
        size = len(client.rest())
    received = []

    def flood():
        with Client(server) as client:
            sender = threading.Thread(target=client.send, args=[data * total])
            sender.start()
            received.append(len(client.exactly(size)))
            received.append(len(client.exactly(size * (total - 1))))
            sender.join(60)

    thread = threading.Thread(target=flood)
    between = 0
    with Client(server) as other:
        thread.start()
        wait_for(lambda: received, "a first answer")
        while thread.is_alive():
            assert other.ask(data).status == 200
            between += 1
    assert sum(received) == size * total
    # In fair turns, it would be hundreds.
    assert between >= 20


def test_http_1_0_is_closed_unless_it_asks_otherwise(server):
    with Client(server) as client:
        answer = client.ask(request("GET", "/api/user/1", version="1.0"))
        assert answer.status == 200 and answer.closes
        assert client.answer() is None
    kept = request("GET", "/api/user/1", None, "Connection: Keep-Alive", version="1.0")
    with Client(server) as client:
        for _ in range(3):
            answer = client.ask(kept)
            assert answer.get("connection").lower() == "keep-alive"
            assert answer.get("content-length")
        answer = client.ask(request("GET", "/api/user/1", version="1.0"))
        assert answer.status == 200 and client.answer() is None


@pytest.mark.parametrize("path", ["/api/user/1", "/api/user", "/api/user/99", "/x"])
def test_head_is_get_without_its_body(server, path):
    with Client(server) as client:
        head = client.ask(request("HEAD", path))
        full = client.ask(request("GET", path))
        assert head.status == full.status and full.body
        loose = {"date", "content-length", "transfer-encoding"}
        assert {f for f in head.fields if f[0] not in loose} == {
            f for f in full.fields if f[0] not in loose
        }
        length = head.get("content-length")
        assert length in (None, str(len(full.body)))
        # One that names no length says so in the same way as its GET.
        assert length or full.chunks


def test_answers_name_their_time_and_a_server_without_versions(server):
    with Client(server) as client:
        for path in ("/api/user/1", "/nowhere"):
            answer = client.ask(request("GET", path))
            date = time.strptime(answer.get("date"), "%a, %d %b %Y %H:%M:%S GMT")
            assert date.tm_year > 2020
            assert not re.search(
                r"(?i)python|bottle|asyncio", answer.get("server") or ""
            )


# ---------------------------------------------------------------------------------
# Bodies and streams
# ---------------------------------------------------------------------------------


def test_expect_is_answered_before_the_body_comes(server):
    for framing, body in ((LENGTH, ITEM), (CHUNKED, PARTS)):
        with Client(server) as client:
            client.send(POST + JSON + framing + b"Expect: 100-continue\r\n\r\n")
            assert client.until(b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
            answer = client.ask(body, "POST")
            assert answer.status == 201 and answer.interim == 0
            assert client.ask(request("GET", "/api/user/1")).status == 200


def test_expect_waits_for_the_answers_before_it(server):
    with Client(server) as client:
        client.send(
            request("GET", "/api/user/1")
            + request("POST", "/api/user", ada())
            + POST + JSON + LENGTH + b"Expect: 100-continue\r\n\r\n"
        )  # fmt: skip
        assert client.answer().status == 200
        assert client.answer().status == 201
        assert client.until(b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
        assert client.ask(ITEM, "POST").status == 201


NOT_ASKED_FOR = [  # (the head but for what follows, the status)
    (POST + b"Content-Length: 9000000\r\n", 413),
    (POST + b"Transfer-Encoding: cow\r\n", 501),
    (POST + JSON + LENGTH + b"Origin: http://evil.example\r\n", 403),
    (POST.replace(b"localhost", b"evil.example") + JSON + LENGTH, 403),
    (POST.replace(b"user", b"nobody") + JSON + LENGTH, 404),
    (POST.replace(b"user", b"user/1") + JSON + LENGTH, 405),
    (POST.replace(b"user", b"user?what=1") + JSON + LENGTH, 400),
    (POST + b"Content-Type: text/plain\r\n" + LENGTH, 415),
]


@pytest.mark.parametrize("head,status", NOT_ASKED_FOR)
def test_a_refused_body_is_not_asked_for(server, head, status):
    with Client(server) as client:
        answer = client.ask(head + b"Expect: 100-continue\r\n\r\n")
        assert answer.status == status and answer.interim == 0
        assert client.answer() is None


def test_nobody_is_asked_for_a_body_without_a_token(tmp_path):
    head = POST + JSON + LENGTH + b"Expect: 100-continue\r\n"
    known = b"Authorization: Bearer %s\r\n" % (b"t" * 40)
    (tmp_path / "token").write_text("t" * 40)
    (tmp_path / "token").chmod(0o600)
    with Server(tmp_path, "--token-file", tmp_path / "token") as server:
        with Client(server) as client:
            answer = client.ask(head + END)
            assert answer.status == 401 and answer.interim == 0
        with Client(server) as client:
            client.send(head + known + END)
            assert client.until(b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
            assert client.ask(ITEM, "POST").status == 201


def test_a_body_may_come_in_chunks_of_any_size(server):
    rng = random.Random(5)
    item = json.dumps({"item": ada("Ä" * 200)}).encode().ljust(300_000)
    parts = []
    while item:
        size = rng.choice([1, 2, 15, 16, 17, 4095, 4096, 65_536])
        parts.append(item[:size])
        item = item[size:]
    with Client(server) as client:
        answer = client.ask(POST + CHUNKED + END + chunks(*parts) + b"0\r\n\r\n")
        assert answer.status == 201
        assert answer.json()["results"][0]["name"] == "Ä" * 200
        assert client.ask(request("GET", "/api/user/1")).status == 200


def test_a_body_behind_answers_that_wait_to_be_taken_arrives(crowded):
    """12 MB of answers lie before a body of 1 MB: reading goes on where it stopped."""
    page = request("GET", "/api/user?limit=1000")
    body = json.dumps({"item": ada(id=300_000)}).encode().ljust(MIB)
    write = POST + JSON + b"Content-Length: %d\r\n\r\n" % len(body) + body
    undo = request("DELETE", "/api/user/300000")
    with Client(crowded, window=16_384) as client:
        sender = threading.Thread(target=client.send, args=[page * 60 + write + undo])
        sender.start()
        with Client(crowded) as other:
            for _ in range(60):
                # Turns of the loop in which it gets as far as it can.
                for _ in range(5):
                    assert other.ask(request("GET", "/api/user/7")).status == 200
                assert len(client.answer().json()["results"]) == 1000
        assert client.answer().status == 201
        assert client.answer().status == 200
        sender.join(20)


def test_a_body_of_the_limit_passes_and_a_byte_more_does_not(server):
    with Client(server) as client:
        body = ITEM.ljust(8 * MIB)
        data = POST + JSON + b"Content-Length: %d\r\n\r\n" % len(body)
        assert client.ask(data + body, "POST").status == 201
        answer = client.ask(POST + b"Content-Length: %d\r\n\r\n" % (len(body) + 1))
        assert answer.status == 413
        assert client.answer() is None


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_an_early_refusal_reaches_a_client_that_sends_it_all_first(server, chunked):
    """A 9 MB POST: http.client reads no answer before it has sent everything."""
    body = b" " * 9_000_000
    for _ in range(5):
        client = http.client.HTTPConnection(server.host, server.port, timeout=30)
        pieces = (body[i : i + 65_536] for i in range(0, len(body), 65_536))
        client.request(
            "POST",
            "/api/user",
            pieces if chunked else body,
            {"Content-Type": "application/json"},
            encode_chunked=chunked,
        )
        answer = client.getresponse()
        assert answer.status == 413
        assert json.loads(answer.read())["status"] == 413
        client.close()


def test_a_refused_client_that_never_stops_sending_is_cut_off(server):
    """What is discarded after an early refusal is bounded: a second's worth."""
    with Client(server) as client:
        client.send(POST + b"Content-Length: 99999999999\r\n\r\n")
        assert client.answer().status == 413
        end = time.monotonic() + 20
        while client.send(b" " * 65_536):
            assert time.monotonic() < end, "it still reads"


def test_a_stream_is_chunked_for_1_1_and_not_for_1_0(crowded):
    with Client(crowded) as client:
        new = client.ask(request("GET", "/api/user"))
        assert new.get("transfer-encoding") == "chunked" and new.chunks > 1
        assert len(new.json()["results"]) == 100_000
        assert client.ask(request("GET", "/api/user/7")).status == 200
    for fields in ([], ["Connection: keep-alive"]):
        with Client(crowded) as client:
            old = client.ask(request("GET", "/api/user", None, *fields, version="1.0"))
            assert old.get("transfer-encoding") is None and old.closes
            assert old.body == new.body
            assert client.answer() is None


def test_a_long_head_is_no_stream(crowded):
    """HEAD of everything costs nothing and leaves the connection in step."""
    with Client(crowded) as client:
        for _ in range(20):
            client.send(request("HEAD", "/api/user"))
        client.send(request("GET", "/api/user/7"))
        for _ in range(20):
            assert client.answer("HEAD").status == 200
        assert client.answer().json()["results"][0]["id"] == 7


@linux
def test_who_asks_and_takes_no_answer_fills_no_memory(tmp_path):
    asked = request("GET", "/health") * 3000
    with Server(tmp_path) as server, contextlib.ExitStack() as stack:
        before = server.memory()
        rude = [Client(server, window=4096) for _ in range(100)]
        for client in rude:
            stack.enter_context(client).socket.setblocking(False)
        sockets, more = [client.socket for client in rude], True
        while more:  # until nobody has taken anything for a while
            more = select.select([], sockets, [], 0.5)[1]
            for each in more:
                each.send(asked)
        assert server.memory() - before < 100 * 0.3 * MIB
        with Client(server) as client:
            assert client.ask(request("GET", "/health")).status == 200


@linux
def test_slow_readers_are_waited_for_not_stored(crowded):
    """Eight clients leave 21 MB each lying: it stays in the database, not in memory."""
    with contextlib.ExitStack() as stack, Client(crowded) as other:
        assert other.ask(request("GET", "/api/user/7")).status == 200
        before = crowded.memory()
        slow = [stack.enter_context(Client(crowded, window=16_384)) for _ in range(8)]
        for client in slow:
            client.send(request("GET", "/api/user"))
            assert client.head().status == 200
        for _ in range(300):
            assert other.ask(request("GET", "/api/user/7")).status == 200
            assert crowded.memory() - before < 32 * MIB
        # And the stream is whole when it is taken at last.
        client = slow[3]
        stream = Answer(b"HTTP/1.1 200 OK")
        users = json.loads(client.chunked(stream))["results"]
        assert len(users) == 100_000 and users[-1]["id"] == 100_000
        assert crowded.memory() - before < 32 * MIB


def test_who_searches_many_users_holds_nobody_up(crowded):
    """30 searches, each of which looks through all, last longer than 50 reads."""
    searches = (f"/api/user?q=nobody{n}&count=true&limit=1" for n in range(30))
    with Client(crowded) as client, Client(crowded) as other:
        client.send(b"".join(request("GET", path) for path in searches))
        for _ in range(50):
            assert other.ask(request("GET", "/api/user/7")).status == 200
        client.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            client.buffer += client.socket.recv(MIB)
        assert client.buffer.count(b"HTTP/1.1 200") < 30
        client.socket.settimeout(60)
        for _ in range(30):
            assert client.answer().json() == {"results": [], "total": 0, "next": None}
        found = client.ask(request("GET", "/api/user?q=USER99999&count=true")).json()
        assert (found["results"][0]["id"], found["total"]) == (100_000, 1)


@linux
def test_pipelined_requests_are_worked_off_as_their_answers_are_taken(crowded):
    """300 times everything in one send: 6 GB that nobody has taken yet."""
    with Client(crowded, window=16_384) as client, Client(crowded) as other:
        assert other.ask(request("GET", "/api/user/7")).status == 200
        before = crowded.memory()
        client.send(request("GET", "/api/user") * 300)
        assert client.head().status == 200
        for _ in range(300):
            assert other.ask(request("GET", "/api/user/7")).status == 200
            assert crowded.memory() - before < 32 * MIB


@linux
def test_a_client_that_only_sends_is_not_read_for_ever(server):
    """Back-pressure the other way: requests without end, no answer ever taken."""
    data = request("GET", "/api/user/1", None, "X-A: " + "a" * 1500)
    with Client(server, window=16_384) as client:
        before = server.memory()
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
        client.socket.settimeout(2)
        sent, block = 0, data * 1000
        with contextlib.suppress(socket.timeout):
            while sent < 100 * MIB:
                sent += client.socket.send(block[sent % len(data) :])
        assert sent < 100 * MIB, "it reads on though nobody takes its answers"
        assert server.memory() - before < 32 * MIB
        client.socket.settimeout(60)
        for _ in range(sent // len(data)):
            assert client.answer().status == 200


@linux
def test_what_is_read_ahead_is_bounded(crowded):
    """Bodies of 80 MB wait behind pages that are taken one by one: in the socket."""
    page = request("GET", "/api/user?limit=1000")
    body = ITEM.ljust(8 * MIB)
    write = POST + JSON + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with Client(crowded, window=16_384) as client, Client(crowded) as other:
        sender = threading.Thread(target=client.send, args=[page * 500 + write * 10])
        sender.start()
        before = None
        for number in range(450):
            # Turns of the loop in which it gets as far as it can.
            for _ in range(2 if number else 100):
                assert other.ask(request("GET", "/api/user/7")).status == 200
            before = before or crowded.memory()
            assert client.answer().status == 200
            assert crowded.memory() - before < 12 * MIB
        client.socket.shutdown(socket.SHUT_RDWR)
        sender.join(20)


def events(client):
    """The `data` of each server-sent event, as it comes."""
    while True:
        event = client.until(b"\n\n")
        data = re.findall(rb"^data: ?(.*)$", event, re.M)
        if data:
            yield json.loads(b"\n".join(data))


def subscribe(client, *fields):
    client.send(
        request("GET", "/api/changes", None, "Accept: text/event-stream", *fields)
    )
    answer = client.head()
    assert answer.status == 200
    assert answer.get("content-type").startswith("text/event-stream")
    return events(client)


def test_a_change_reaches_a_stream_that_was_opened_before(server):
    with Client(server) as reader, Client(server) as writer:
        changes = subscribe(reader)
        assert next(changes)["seq"] == 1
        for _ in range(3):
            answer = writer.ask(request("POST", "/api/user", ada()))
            created = answer.json()["results"][0]["id"]
            change = next(c for c in changes if c["user"] == created)
            assert change["op"] == "create"


@linux
def test_a_stream_that_nobody_reads_any_more_is_ended(server):
    with Client(server) as other:
        assert other.ask(request("GET", "/api/user/1")).status == 200
        before = server.descriptors()
        for _ in range(5):
            with Client(server) as reader:
                assert next(subscribe(reader))

        def ended():  # a closed reader is noticed when there is something to send
            assert other.ask(request("POST", "/api/user", ada())).status == 201
            return server.descriptors() <= before

        wait_for(ended, "ended streams")


# ---------------------------------------------------------------------------------
# Applications
# ---------------------------------------------------------------------------------


def test_the_environment_is_wsgi(workbench):
    """Under wsgiref's validator, which raises at the first thing amiss."""
    body = b"abcline one\nline two\nthe rest\n!"
    data = (
        b"POST /environ?x=%%C3%%A9&y=1 HTTP/1.1\r\nHost: localhost:1\r\n"
        b"X-Some-Thing: a\r\nX-Some-Thing: b\r\nX_Some_Thing: evil\r\n"
        b"Content-Type: text/plain\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    with Client(workbench) as client:
        answer = client.ask(data + body, "POST")
        port = client.socket.getsockname()[1]
    assert answer.status == 200, workbench.said()
    seen = answer.json()
    assert seen["body"] == ["abc", "line one\n", "line ", ["two\n", "the rest\n", "!"]]
    assert seen["thread"] is True
    expected = {
        "REQUEST_METHOD": "POST",
        "SCRIPT_NAME": "",
        "PATH_INFO": "/environ",
        "QUERY_STRING": "x=%C3%A9&y=1",
        "CONTENT_TYPE": "text/plain",
        "CONTENT_LENGTH": str(len(body)),
        "SERVER_PROTOCOL": "HTTP/1.1",
        "SERVER_PORT": str(workbench.port),
        "REMOTE_ADDR": "127.0.0.1",
        "HTTP_HOST": "localhost:1",
        "wsgi.url_scheme": "http",
        "wsgi.version": [1, 0],
        "wsgi.multithread": False,
        "wsgi.run_once": False,
    }
    assert {name: seen.get(name) for name in expected} == expected
    assert seen["HTTP_X_SOME_THING"] in ("a,b", "a, b")
    assert seen.get("REMOTE_PORT") in (None, str(port))
    assert not {"HTTP_CONTENT_LENGTH", "HTTP_CONTENT_TYPE"} & set(seen)


def test_a_body_that_the_application_leaves_lying_is_no_request(workbench):
    with Client(workbench) as client:
        for framing, body in (
            (HIDDEN_LENGTH, HIDDEN),
            (CHUNKED, chunks(HIDDEN) + b"0\r\n\r\n"),
        ):
            data = b"POST /unread HTTP/1.1\r\nHost: localhost\r\n" + framing + END
            assert client.ask(data + body).body == b"unread"
        assert client.ask(request("GET", "/unread")).body == b"unread"


def test_an_empty_chunk_means_ask_me_again(workbench):
    """It ends nothing, blocks nobody, and needs no thread."""
    with Client(workbench) as client, Client(workbench) as other:
        assert client.ask(request("GET", "/nothing")).body == b"at last"
        assert client.ask(request("GET", "/nothing", version="1.0")).body == b"at last"
    with Client(workbench) as client, Client(workbench) as other:
        assert other.ask(request("GET", "/release?no")).status == 204
        client.send(request("GET", "/wait") + request("GET", "/unread"))
        for _ in range(100):
            assert other.ask(request("GET", "/unread")).status == 200
        client.take()
        assert b"released" not in client.buffer and b"unread" not in client.buffer
        assert other.ask(request("GET", "/release?yes")).status == 204
        assert client.answer().body == b"released"
        assert client.answer().body == b"unread"


def test_a_waiting_application_is_closed_when_its_client_goes(workbench):
    with Client(workbench) as other:
        other.ask(request("GET", "/release?no"))

        def closed():
            return other.ask(request("GET", "/report")).json()["closed"]

        before = closed()
        with Client(workbench) as client:
            client.send(request("GET", "/wait"))
            pulled = other.ask(request("GET", "/report")).json()["pulled"]
            wait_for(
                lambda: other.ask(request("GET", "/report")).json()["pulled"] > pulled,
                "a second question",
            )
            assert closed() == before
        wait_for(lambda: closed() == before + 1, "close()")


def test_an_application_is_asked_only_as_fast_as_its_answer_is_taken(workbench):
    """100 MB on offer, nothing taken: what the kernel buffers hold, and no more."""

    def report(name):
        with Client(workbench) as other:
            return other.ask(request("GET", "/report")).json()[name]

    pulled, closed = report("pulled"), report("closed")
    with Client(workbench, window=16_384) as client:
        client.send(request("GET", "/flood"))
        assert client.head().status == 200
        for _ in range(50):
            assert report("pulled") - pulled < 300
        stream = Answer(b"HTTP/1.1 200 OK")
        assert len(client.chunked(stream)) == 100_000_000
    wait_for(lambda: report("closed") == closed + 1, "close()")


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_application_that_raises_harms_itself_alone(workbench, method):
    """UserAPI never does; what wraps it might."""
    body = None if method == "GET" else ada()
    with Client(workbench) as client:
        answer = client.ask(request(method, "/fault", body))
        assert answer is None or answer.status == 500
        assert answer is None or b"secret" not in answer.body
    with Client(workbench) as client:
        assert client.ask(request("GET", "/unread")).status == 200
        assert client.ask(request("POST", "/unread", ada())).status == 200


@pytest.mark.parametrize("path", ["/accent", "/text"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_answer_that_cannot_be_sent_harms_itself_alone(workbench, method, path):
    """Writes of the same turn, for which another program has let none begin, are
    answered all the same."""
    folder = workbench.output.parent
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(workbench)) for _ in range(3)]
        with contextlib.closing(sqlite3.connect(folder / "users.db")) as other:
            other.execute("BEGIN IMMEDIATE")
            for client, where in zip(clients, ("/unread", path, "/unread")):
                client.send(request(method, where, ada() if method == "POST" else None))
            with Client(workbench) as last:  # and then they have arrived
                assert last.ask(request("GET", "/unread")).status == 200
        assert [clients[n].answer(method).status for n in (0, 2)] == [200, 200]
        broken = clients[1].answer(method)
        assert broken is None if path == "/text" else broken.status == 500
    with Client(workbench) as client:
        assert client.ask(request("POST", "/unread", ada())).status == 200


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_an_application_that_raises_half_way_is_cut_off(workbench, version):
    """No last chunk: what is missing must not look complete."""
    with Client(workbench) as client:
        client.send(request("GET", "/half", version=version) + HIDDEN)
        if version == "1.1":
            with contextlib.suppress(CutOff):
                assert client.answer().status == 500
        assert b"HTTP/1." not in client.rest()[20:]


@pytest.mark.parametrize("path", ["/split", "/status"])
def test_a_line_break_in_a_header_never_leaves(workbench, path):
    with Client(workbench) as client:
        client.send(request("GET", path))
        client.end()
        answer = client.answer()
        assert answer is None or answer.status == 500, answer
        assert answer is None or answer.get("x-injected") is None, answer


@pytest.mark.parametrize("path", ["/short", "/long"])
def test_an_answer_is_never_longer_or_shorter_than_it_says(workbench, path):
    """A wrong Content-Length ends the connection, or the next answer is misread."""
    with Client(workbench) as client:
        client.send(request("GET", path) + request("GET", "/unread"))
        head = client.head()
        if head is None or head.status == 500:
            return
        if path == "/short":
            with pytest.raises(CutOff):
                client.exactly(10)
        else:
            assert client.exactly(4) == b"much"
            following = client.answer()
            assert following is None or following.body == b"unread"


# ---------------------------------------------------------------------------------
# Limits and deadlines
# ---------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize("limit,few", [("-Sn 64", False), ("-n 64", True)])
def test_more_connections_than_files_may_be_open(tmp_path, limit, few):
    """The soft limit is raised; at the hard one others wait, which is told briefly."""
    shell = ("sh", "-c", f'ulimit {limit}; exec "$@"', "sh")
    with Server(tmp_path, prefix=shell) as server:
        server.faulty = few
        with Client(server) as first, contextlib.ExitStack() as stack:
            assert first.ask(request("POST", "/api/user", ada())).status == 201
            clients = [stack.enter_context(Client(server)) for _ in range(150)]
            if few:
                wait_for(lambda: "Too many open files" in server.said(), "the trouble")
            else:
                assert clients[-1].ask(request("GET", "/api/user")).status == 200
            assert first.ask(request("POST", "/api/user", ada())).status == 201
        with Client(server) as late:
            assert late.ask(request("GET", "/api/user")).status == 200
        assert server.said().count("Too many open files") < 10


def test_past_the_connection_limit_it_is_busy(tmp_path):
    with Server(tmp_path, "--max-connections", "4") as server:
        clients = [Client(server) for _ in range(4)]
        for client in clients:
            assert client.ask(request("GET", "/api/user")).status == 200
        for _ in range(3):
            with Client(server) as late:
                late.send(request("GET", "/api/user"))
                answer = late.answer()
                assert answer.status == 503 and answer.closes
                assert int(answer.get("retry-after")) > 0
                assert_problem(answer)
                assert late.answer() is None
        # Those inside notice nothing, and a free place is given away again.
        for client in clients:
            assert client.ask(request("GET", "/api/user")).status == 200
        clients.pop().close()

        def admitted():
            with Client(server) as late:
                return late.ask(request("GET", "/api/user")).status == 200

        wait_for(admitted, "a free place")
        for client in clients:
            client.close()


@linux
def test_all_bodies_together_are_bounded(server):
    """Four of 8 MiB are 32 MiB: the fifth is told to come back."""
    size = 8 * MIB
    head = POST + JSON + b"Content-Length: %d\r\n\r\n" % size
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(server)) for _ in range(4)]
        for client in clients:
            client.send(head + b" " * (size - 1))
        for client in clients:
            wait_for(lambda c=client: in_the_kernel(server, c) == 0, "reading")
        with Client(server) as other:
            assert other.ask(request("GET", "/api/user/1")).status == 200
        with Client(server) as late:
            late.send(head)
            late.send(b" " * size)
            answer = late.answer()
            assert answer.status == 503 and answer.closes
            assert int(answer.get("retry-after")) > 0
            assert_problem(answer)
        for client in clients:
            assert client.ask(b" ", "POST").status == 400
            client.close()
    with Client(server) as late:
        assert late.ask(head + ITEM.ljust(size), "POST").status == 201


def kernel_entry(here, there):
    """A connection's state, and its bytes to be sent and read, as Linux has them."""
    for entry in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        local, remote, state, queues = entry.split()[1:5]
        if (local[-5:], remote[-5:]) == (f":{here:04X}", f":{there:04X}"):
            sending, reading = queues.split(":")
            return state, int(sending, 16), int(reading, 16)
    return "gone", 0, 0


def in_the_kernel(reader, sender):
    """Bytes that the one has sent and the other has not read: client and server."""
    here, there = (
        end.port if isinstance(end, Server) else end.socket.getsockname()[1]
        for end in (reader, sender)
    )
    return kernel_entry(there, here)[1] + kernel_entry(here, there)[2]


def established(server, client):
    """Whether the server's side of this connection is still open."""
    return kernel_entry(server.port, client.socket.getsockname()[1])[0] == "01"


class Drip:
    """A client that sends a piece now and then, for as long as it is let."""

    def __init__(self, server, start, piece, answered=0):
        self.server, self.start, self.piece = server, start, piece
        self.answered, self.took, self.answer = answered, 0.0, None

    def run(self):
        with Client(self.server) as client:
            for _ in range(self.answered):
                assert client.ask(request("GET", "/api/user/1")).status == 200
            began = time.monotonic()
            client.send(self.start)
            # The wait for the socket is the pause between two pieces.
            client.socket.settimeout(0.4)
            while time.monotonic() - began < 70:
                try:
                    if client.more():
                        continue
                    break
                except socket.timeout:
                    client.send(self.piece)
            self.took = time.monotonic() - began
            self.answer = client.answer()


@pytest.mark.slow
def test_deadlines_hold_whatever_is_dripped(crowded, secure):
    """All at once, for their waits add up: each is cut off in its time, no later."""
    head = b"GET /api/user/1 HTTP/1.1\r\nHost: localhost\r\nX-A: "
    large = POST + b"Content-Length: %d\r\n\r\n" % (2 * MIB)
    long = b"Content-Length: 1000\r\n"
    cases = {  # who: (the client, its status, at the earliest, at the latest)
        "a head": (Drip(crowded, head, b"a"), 408, 9, 25),
        "a line": (Drip(crowded, b"GET /", b"a"), 408, 9, 25),
        "a second head": (Drip(crowded, head, b"a", answered=3), 408, 9, 25),
        # longer than what drips in until the deadline has passed and is noticed
        "a body": (Drip(crowded, POST + long + END, b" "), 408, 19, 40),
        "chunks": (Drip(crowded, POST + CHUNKED + END, b"1\r\na\r\n"), 408, 19, 40),
        "a large body": (Drip(crowded, large, b" "), 408, 27, 50),
        "an idle one": (Drip(crowded, b"", b"", answered=1), None, 29, 50),
        "a silent one": (Drip(crowded, b"", b""), None, 9, 50),
        "one silent about TLS": (Drip(secure, b"", b""), None, 9, 50),
    }  # fmt: skip
    threads = [threading.Thread(target=case[0].run) for case in cases.values()]
    for thread in threads:
        thread.start()
    with contextlib.ExitStack() as stack:
        everything = request("GET", "/api/user")
        reader = stack.enter_context(Client(crowded))
        changes = subscribe(reader)
        stuck = stack.enter_context(Client(crowded, window=16_384))
        stuck.send(everything)
        assert stuck.head().status == 200
        slow = stack.enter_context(Client(crowded, window=65_536))
        slow.send(everything + b"GET /half-a-head")
        assert slow.head().status == 200
        other = stack.enter_context(Client(crowded))
        began = time.monotonic()
        took = None
        # Meanwhile one takes its answer slowly but surely, and one does not at all.
        while time.monotonic() - began < 45 and (
            any(thread.is_alive() for thread in threads) or took is None
        ):
            assert other.ask(request("GET", "/api/user/7")).status == 200
            slow.exactly(150_000)
            # The slow reader's pace, not a wait for anything.
            time.sleep(0.5)
            if took is None and not (
                sys.platform.startswith("linux") and established(crowded, stuck)
            ):
                took = time.monotonic() - began
        if sys.platform.startswith("linux"):
            assert took and 19 < took < 45, f"one that takes nothing: {took}"
            with pytest.raises(CutOff):
                stuck.chunked(Answer(b"HTTP/1.1 200 OK"))
        assert slow.until(b"\r\n0\r\n\r\n"), "the slow but steady one was cut off"
        # The stream of changes has been idle, not stuck: it goes on.
        created = other.ask(request("POST", "/api/user", ada()))
        number = created.json()["results"][0]["id"]
        assert next(c for c in changes if c["user"] == number)
    for thread in threads:
        thread.join(80)
    for name, (drip, status, earliest, latest) in cases.items():
        found = drip.answer.status if drip.answer else None
        assert found == status, f"{name}: {drip.answer} after {drip.took:.1f} s"
        assert earliest <= drip.took <= latest, f"{name}: after {drip.took:.1f} s"
        if drip.answer:
            assert drip.answer.closes
            assert_problem(drip.answer)


@linux
def test_idle_and_dripping_clients_are_no_burden(server):
    """300 idle and 100 dripping: the others are served, and little memory is taken."""
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(Client(server))
        assert other.ask(request("GET", "/api/user/1")).status == 200
        before = server.memory()
        for _ in range(300):
            stack.enter_context(Client(server))
        dripping = [stack.enter_context(Client(server)) for _ in range(100)]
        slowest = 0.0
        for byte in request("GET", "/api/user/1", None, "X-A: 1"):
            for client in dripping:
                client.send(bytes([byte]))
            began = time.monotonic()
            assert other.ask(request("GET", "/api/user/1")).status == 200
            slowest = max(slowest, time.monotonic() - began)
        assert slowest < 5
        for client in dripping:
            assert client.answer().status == 200
        assert server.memory() - before < 16 * MIB


# ---------------------------------------------------------------------------------
# Doors: Unix socket, TLS, a socket handed over
# ---------------------------------------------------------------------------------

unix = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")


@unix
def test_a_unix_socket(tmp_path):
    path = tmp_path / "api.sock"
    for _ in range(2):  # the second time over what a killed one left behind
        server = Server(tmp_path, "--unix", path, port=None)
        try:
            server.unix = str(path)
            assert str(path) in server.said()
            asked = conversation(1000)
            with Client(server) as client:
                client.send(b"".join(data for data, *_ in asked))
                check_conversation(client, asked)
            with Client(server) as client:
                client.send(b"GET /\r\n\r\n")
                assert client.answer().status == 400
                assert client.answer() is None
        finally:
            server.kill()


@unix
def test_a_unix_socket_of_a_successor_stays(tmp_path):
    """Who finishes what was begun listens no more: another may, by the same name."""
    path = tmp_path / "api.sock"
    first = Server(tmp_path / "first", "--unix", path, port=None)
    first.unix = str(path)
    with Client(first) as client:
        whole = request("GET", "/health")
        client.send(whole + whole[:-2])
        assert client.answer().status == 200
        first.signal(signal.SIGTERM)
        wait_for(lambda: not path.exists(), "the end of listening", 4)
        second = Server(tmp_path / "second", "--unix", path, port=None)
        second.unix = str(path)
        client.send(whole[-2:])
        assert client.answer().status == 200
    assert first.process.wait(20) == 0
    with second, Client(second) as client:
        assert client.ask(whole).status == 200


def has_ipv6():
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on this host")
def test_all_addresses_are_those_of_ipv4_too(tmp_path):
    token = tmp_path / "token"
    token.write_text("sesame")
    token.chmod(0o600)
    with Server(tmp_path, "--host", "::", "--token-file", token) as server:
        for host in ("127.0.0.1", "::1"):
            with socket.create_connection((host, server.port), 10) as sock:
                sock.sendall(b"GET /health HTTP/1.0\r\n\r\n")
                assert sock.recv(1000).startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on this host")
def test_ipv6(tmp_path):
    with Server(tmp_path, "--host", "::1") as server:
        assert server.url.startswith("http://[::1]:")
        with Client(server) as client:
            assert client.ask(request("GET", "/api/user")).status == 200


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
        f" -addext subjectAltName=DNS:localhost -keyout {key} -out {cert}"
    )
    subprocess.run(command.split(), check=True, capture_output=True, timeout=60)
    return cert, key


@pytest.fixture(scope="module")
def secure(certificate, tmp_path_factory):
    folder = tmp_path_factory.mktemp("secure")
    old_database(folder / "users.db", 20_000)
    cert, key = certificate
    with Server(folder, "--cert", cert, "--key", key) as server:
        yield server


@pytest.fixture(scope="module")
def trust(certificate):
    context = ssl.create_default_context(cafile=str(certificate[0]))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def test_tls(secure, trust):
    assert secure.url.startswith("https://")
    asked = conversation(100_000)
    with Client(secure, tls=trust) as client:
        client.send(b"".join(data for data, *_ in asked))
        check_conversation(client, asked)
        answer = client.ask(request("GET", "/api/user"))
        assert len(answer.json()["results"]) == 20_000
        assert client.ask(request("POST", "/api/user", ada())).status == 201
    with Client(secure, tls=trust) as client:
        assert client.ask(request("GET", "/api/user/1", version="1.0")).status == 200
        assert client.answer() is None


def test_the_end_of_an_answer_over_tls_is_told_at_once(secure, trust):
    """Not a second later, as after a refusal."""
    began = time.monotonic()
    for _ in range(5):
        with Client(secure, tls=trust) as client:
            client.send(request("GET", "/health", None, "Connection: close"))
            assert b"200 OK" in client.rest()
    assert time.monotonic() - began < 4


def test_an_early_refusal_arrives_over_tls(secure, trust):
    for _ in range(3):
        client = http.client.HTTPSConnection(
            "localhost", secure.port, timeout=30, context=trust
        )
        client.request("POST", "/api/user", b" " * 9_000_000)
        answer = client.getresponse()
        assert answer.status == 413 and json.loads(answer.read())["code"] == 1
        client.close()


def test_a_faulty_request_over_tls_is_closed(secure, trust):
    with Client(secure, tls=trust) as client:
        client.send(POST + LENGTH + CHUNKED + END + PARTS + HIDDEN)
        assert client.answer().status == 400
        assert client.answer() is None


@linux
def test_slow_readers_over_tls_are_waited_for(secure, trust):
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(Client(secure, tls=trust))
        assert other.ask(request("GET", "/api/user/7")).status == 200
        before = secure.memory()
        slow = [
            stack.enter_context(Client(secure, window=16_384, tls=trust))
            for _ in range(4)
        ]
        for client in slow:
            client.send(request("GET", "/api/user") * 20)
            assert client.head().status == 200
        for _ in range(200):
            assert other.ask(request("GET", "/api/user/7")).status == 200
            assert secure.memory() - before < 32 * MIB


def test_who_speaks_no_tls_harms_nobody(secure, trust):
    with contextlib.ExitStack() as stack:
        for data in (b"", b"\x16\x03\x01", b"\x16\x03\x01\x02\x00" + b"\0" * 512):
            client = stack.enter_context(Client(secure))
            client.send(data)
        with Client(secure) as plain:
            plain.send(request("GET", "/api/user/1"))
            assert b"HTTP/1.1 200" not in plain.rest()
        with Client(secure, tls=trust) as client:
            assert client.ask(request("GET", "/api/user/1")).status == 200


@linux
def test_handshakes_that_do_not_end_take_bounded_room(certificate, trust, tmp_path):
    """Each takes a third of a megabyte from the first byte, and asks for no token."""
    cert, key = certificate
    few = ("--cert", cert, "--key", key, "--max-connections", "20")
    with Server(tmp_path, *few) as server, contextlib.ExitStack() as stack:
        before = server.memory()
        idle = [stack.enter_context(Client(server)) for _ in range(400)]
        assert [client.rest() for client in idle[20:]] == [b""] * 380
        assert server.memory() - before < 16 * MIB
        for client in idle:
            client.close()

        def let_in():
            with contextlib.suppress(OSError), Client(server, tls=trust) as client:
                return client.ask(request("GET", "/health")).status == 200

        wait_for(let_in, "room for others")
        for _ in range(20):
            client = stack.enter_context(Client(server, tls=trust))
            assert client.ask(request("GET", "/health")).status == 200
        with Client(server, tls=trust) as client:
            assert client.answer().status == 503


#: Become the server with descriptor 3 as systemd's protocol has it.
HAND_OVER = """
import os, sys
descriptor, pid, count, *command = sys.argv[1:]
os.dup2(int(descriptor), 3)
os.environ.update(LISTEN_FDS=count, LISTEN_PID=pid if int(pid) else str(os.getpid()))
os.execv(sys.executable, [sys.executable, *command])
"""


@linux
def test_a_socket_handed_over_is_served(tmp_path):
    """Also to those who were waiting in its queue before there was a server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fd = listener.fileno()
        argv = ["-c", HAND_OVER, fd, 0, 1, USERAPI, "--db", tmp_path / "users.db"]
        early = socket.create_connection(listener.getsockname(), timeout=30)
        early.sendall(request("GET", "/api/user", None, "Connection: close"))
        with Server(tmp_path, argv=argv, fds=(fd,), port=None) as server:
            assert server.port == listener.getsockname()[1]
            received = b"".join(iter(lambda: early.recv(65_536), b""))
            assert received.startswith(b"HTTP/1.1 200 ")
            with Client(server) as client:
                assert client.ask(request("GET", "/api/user")).status == 200
        early.close()


@linux
def test_a_unix_socket_handed_over_is_the_service_managers(tmp_path):
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        fd = listener.fileno()
        argv = ["-c", HAND_OVER, fd, 0, 1, USERAPI, "--db", tmp_path / "users.db"]
        flags = ("--unix", path)  # as it was before there was a unit for the socket
        with Server(tmp_path, *flags, argv=argv, fds=(fd,), port=None) as server:
            server.unix = str(path)
            with Client(server) as client:
                assert client.ask(request("GET", "/api/user")).status == 200
    assert path.exists()


@linux
@pytest.mark.parametrize("pid,count", [(1, 1), (0, 0), (0, ""), (0, "some")])
def test_a_socket_not_handed_to_this_process_is_left_alone(tmp_path, pid, count):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fd = listener.fileno()
        argv = ["-c", HAND_OVER, fd, pid, count, USERAPI]
        argv += ["serve", "--db", tmp_path / "users.db"]
        with Server(tmp_path, argv=argv, fds=(fd,)) as server:
            assert server.port != listener.getsockname()[1]
            with Client(server) as client:
                assert client.ask(request("GET", "/api/user")).status == 200


def test_a_port_in_use_is_refused_in_one_line(server, tmp_path):
    command = [sys.executable, USERAPI, "serve", "--db", tmp_path / "users.db"]
    found = subprocess.run(
        [*command, "--port", str(server.port)],
        capture_output=True,
        text=True,
        timeout=30,
        stdin=subprocess.DEVNULL,
    )
    assert found.returncode in (1, 2)
    assert len(found.stderr.splitlines()) == 1, found.stderr
    assert str(server.port) in found.stderr


def rude_clients(server, rng, count, tls=None):
    """Each begins a few things and leaves, politely or not, at once or later."""
    everything, one = request("GET", "/api/user"), request("GET", "/api/user/1")
    write = request("POST", "/api/user", ada())
    watch = request("GET", "/api/changes", None, "Accept: text/event-stream")
    starts = [everything, everything * 5, one, one * 50, write, write * 5, watch]
    starts += [write[:-7], write[:60], POST + CHUNKED + END + b"5\r\nab", HIDDEN[:9]]
    starts += [b"GET /\r\n\r\n", POST + LENGTH + CHUNKED + END, b"\x16\x03\x01"]
    staying = []
    for _ in range(count):
        client = Client(server, window=rng.choice([None, 4096]), tls=tls)
        for start in rng.choices(starts, k=rng.randint(0, 3)):
            client.send(start)
            if rng.random() < 0.5:
                client.take()
        if rng.random() < 0.2:
            client.end()
        staying.append(client)
        if rng.random() < 0.8:
            client = staying.pop(rng.randrange(len(staying)))
            if rng.random() < 0.5:
                linger = struct.pack("ii", 1, 0)
                client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            client.close()
    for client in staying:
        client.close()


@linux
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("door", ["plain", "tls"])
def test_rude_clients_leave_nothing_behind(crowded, secure, trust, door, seed):
    server, tls = (secure, trust) if door == "tls" else (crowded, None)
    with Client(server, tls=tls) as other:
        assert other.ask(request("GET", "/api/user/7")).status == 200
        files = server.descriptors()
        rude_clients(server, random.Random(seed), 100, tls)

        def gone():  # a closed reader is noticed when there is something to send
            created = other.ask(request("POST", "/api/user", ada())).json()["results"]
            path = f"/api/user/{created[0]['id']}"
            assert other.ask(request("DELETE", path)).status == 200
            return server.descriptors() <= files

        wait_for(gone, "their sockets", 30)
        assert "Traceback" not in server.said(), server.said()[-3000:]


# ---------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------


def refuses(server):
    """Whether new connections are turned away, or taken only to be closed."""
    try:
        with Client(server, timeout=5) as client:
            return not client.ask(request("GET", "/api/user?limit=1"))
    except OSError:
        return True


def kept_names(path):
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return collections.Counter(
            name for (name,) in db.execute("SELECT user_name FROM users")
        )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_load_loses_nothing(tmp_path, number):
    """Every acknowledged write is there, no answer is cut, and the exit is 0."""
    server = Server(tmp_path)
    acknowledged, faults = [], []

    def write(worker):
        try:
            with Client(server) as client:
                for n in itertools.count():
                    name = f"w{worker}-{n}"
                    answer = client.ask(request("POST", "/api/user", ada(name)))
                    if answer is None or answer.status == 503:
                        return
                    assert answer.status == 201, answer
                    acknowledged.append(name)
                    if answer.closes:
                        assert client.answer() is None
                        return
        except (OSError, AssertionError) as fault:
            faults.append(fault)

    workers = [threading.Thread(target=write, args=[n]) for n in range(8)]
    idle = Client(server)
    assert idle.ask(request("GET", "/api/user")).status == 200
    begun = Client(server)
    begun.send(POST + JSON + LENGTH + END + ITEM[:20])
    for worker in workers:
        worker.start()
    wait_for(lambda: len(acknowledged) > 300, "writes")
    server.signal(number)
    # What was begun is finished: this one has two thirds of its body to come.
    wait_for(lambda: refuses(server), "an end of accepting")
    begun.send(ITEM[20:])
    assert begun.answer().status == 201
    assert idle.answer() is None
    for worker in workers:
        worker.join(20)
        assert not worker.is_alive()
    assert server.process.wait(20) == 0, server.said()
    assert not faults
    assert "Traceback" not in server.said()
    wal = tmp_path / "users.db-wal"
    assert not wal.exists() or wal.stat().st_size == 0, "no checkpoint"
    kept = kept_names(tmp_path / "users.db")
    assert set(acknowledged) <= set(kept) and kept["Ada"] == 1
    assert set(kept.values()) == {1}
    # A write that was carried out but whose answer the end forestalled: one a worker.
    assert len(kept) - 1 - len(acknowledged) <= len(workers)


@pytest.mark.parametrize("again", [False, True], ids=["one signal", "two signals"])
def test_whoever_never_finishes_holds_nothing_up(tmp_path, again):
    """5 s of grace for half a body, half a head, an untaken stream and an open one."""
    old_database(tmp_path / "users.db", 50_000)
    server = Server(tmp_path)
    with contextlib.ExitStack() as stack:
        half = stack.enter_context(Client(server))
        half.send(POST + JSON + LENGTH + END + ITEM[:20])
        head = stack.enter_context(Client(server))
        head.send(b"GET /api/user HTTP/1.1\r\n")
        untaken = stack.enter_context(Client(server, window=16_384))
        untaken.send(request("GET", "/api/user"))
        assert untaken.head().status == 200
        subscriber = stack.enter_context(Client(server))
        subscribe(subscriber)
        began = time.monotonic()
        server.signal(signal.SIGTERM)
        if again:
            wait_for(lambda: refuses(server), "an end of accepting", 4)
            server.signal(signal.SIGTERM)
        code = server.process.wait(30)
        took = time.monotonic() - began
    assert "Traceback" not in server.said(), server.said()
    if again:
        assert took < 4.5
    else:
        assert code == 0 and took < 15


def test_a_stream_begun_before_the_signal_is_finished(tmp_path):
    old_database(tmp_path / "users.db", 12_000)
    server = Server(tmp_path)
    with Client(server, window=16_384) as client:
        client.send(request("GET", "/api/user"))
        answer = client.head()
        server.signal(signal.SIGTERM)
        wait_for(lambda: refuses(server), "an end of accepting")
        assert len(json.loads(client.chunked(answer))["results"]) == 12_000
        assert client.answer() is None
    assert server.process.wait(20) == 0


# ---------------------------------------------------------------------------------
# The access log
# ---------------------------------------------------------------------------------

COMBINED = re.compile(
    r'(?P<host>\S+) \S+ (?P<user>\S+) \[[^\]]+\] "(?P<line>(?:[^"\\]|\\.)*)" '
    r'(?P<status>\d{3}) (?P<size>\d+|-) "(?P<referer>(?:[^"\\]|\\.)*)" '
    r'"(?P<agent>(?:[^"\\]|\\.)*)" (?P<ms>\d+(?:\.\d+)?)(?: ?ms)?'
)

SPITEFUL = (
    GET
    + b"User-Agent: a\" 200 1 \"-\" \"b\\\t\xc2\x85\xc2\x9b31m\x9b\r\n"
    + b"Authorization: Bearer sesame\r\nReferer: \"'\\\r\n\r\n"
)  # fmt: skip


def logged(tmp_path, form, count):
    """What the log holds after a few calls, and the whole output's raw bytes."""
    with Server(tmp_path, "--log", form) as server:
        started = len(server.output.read_bytes())
        with Client(server) as client:
            created = client.ask(request("POST", "/api/user", ada(id=1)))
            assert created.status == 201
            agent = "User-Agent: tester/1.0"
            assert client.ask(request("GET", "/api/user/1", None, agent)).body
            assert client.ask(request("GET", "/no%0Awhere?a=%1b%22")).status == 404
            assert client.ask(SPITEFUL).status in (200, 400)
        with Client(server) as client:
            client.send(b"GET /\x1b[31m\x07 HTTP/1.1\r\n\r\n")
            assert client.answer().status == 400

        def lines():
            return server.output.read_bytes()[started:].split(b"\n")[:-1]

        wait_for(lambda: len(lines()) >= count, "the log's lines")
        found = [line.decode() for line in lines()]
    return found, server.output.read_bytes()[started:]


def assert_harmless(raw):
    """No sign that a terminal or a line reader takes for a command; no secret."""
    text = raw.decode()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]", text), text
    assert "sesame" not in text


def test_the_log_as_text(tmp_path):
    lines, raw = logged(tmp_path, "text", 4)
    assert_harmless(raw)
    found = [COMBINED.fullmatch(line) for line in lines]
    assert all(found), lines
    post, get, missing = found[:3]
    assert post["line"] == "POST /api/user HTTP/1.1" and post["status"] == "201"
    assert get["line"] == "GET /api/user/1 HTTP/1.1" and get["status"] == "200"
    assert get["host"] == "127.0.0.1" and get["agent"] == "tester/1.0"
    assert int(get["size"]) > 50 and float(get["ms"]) < 10_000
    assert missing["status"] == "404"


def test_the_log_as_json(tmp_path):
    lines, raw = logged(tmp_path, "json", 4)
    assert_harmless(raw)
    entries = [" ".join(map(str, json.loads(line).values())) for line in lines]
    for entry, parts in zip(
        entries,
        (
            ("POST", "/api/user", "201"),
            ("GET", "/api/user/1", "200", "127.0.0.1", "tester/1.0"),
            ("GET", "404"),
        ),
    ):
        assert all(part in entry for part in parts), entry


def test_the_log_names_who_it_was(tmp_path):
    token = tmp_path / "token"
    token.write_text("sesame")
    token.chmod(0o600)
    with Server(tmp_path, "--log", "json", "--token-file", token) as server:
        with Client(server) as client:
            assert client.ask(request("GET", "/api/user/1")).status == 401
            bearer = "Authorization: Bearer sesame"
            assert client.ask(request("GET", "/api/user/1", None, bearer)).status == 404

        def entries():
            lines = server.said().splitlines()
            return [json.loads(line) for line in lines if line.startswith("{")]

        wait_for(lambda: len(entries()) == 2, "the log's lines")
        assert [entry["actor"] for entry in entries()] == [None, "admin"]


def test_no_log(tmp_path):
    _, raw = logged(tmp_path, "off", 0)
    assert b"GET" not in raw and b"/api/user" not in raw


@linux
def test_a_log_that_nobody_reads_blocks_nobody(tmp_path):
    """A pipe that is full: requests are answered all the same, and it still ends."""
    reading, writing = os.pipe()
    launch = (
        "import os, sys; os.dup2(int(sys.argv[1]), 1); os.dup2(1, 2);"
        "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve = [USERAPI, "serve", "--db", tmp_path / "users.db", "--port", port]
    command = [sys.executable, "-c", launch, writing, *serve, "--log", "text"]
    with os.fdopen(reading, "rb", 0), os.fdopen(writing, "wb", 0):
        process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.DEVNULL, pass_fds=[writing]
        )
        try:
            wait_for(lambda: accepts(port), "the server")
            agent = "User-Agent: " + "a" * 1000
            with Client(Door("127.0.0.1", port, None), timeout=20) as client:
                for _ in range(500):  # half a megabyte of log; the pipe holds 64 KiB
                    answer = client.ask(request("GET", "/api/user", None, agent))
                    assert answer.status == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait(10)


@linux
def test_long_lines_of_the_log_fill_no_memory(tmp_path):
    """A byte of a header can be six of the log, and there are many in a second."""

    def peak(server):
        status = Path(f"/proc/{server.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 1024

    with Server(tmp_path, "--log", "text") as server, Client(server) as client:
        before = peak(server)
        asked = request("GET", "/health", None, "User-Agent: " + "\xff" * 7500)
        for _ in range(250):
            client.send(asked * 8)
            assert all(client.answer().status == 200 for _ in range(8))
        assert peak(server) - before < 30


Door = collections.namedtuple("Door", "host port unix")


def accepts(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


# ---------------------------------------------------------------------------------
# The disk: writes that are committed together
# ---------------------------------------------------------------------------------

strace = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="strace is Linux's"
)
SYNCS = "fsync,fdatasync"


def trace(tmp_path, calls, *options):
    """What goes before a command to have its system calls written to a file."""
    output = tmp_path / "trace.txt"
    command = ["strace", "-f", "-s", "1000", "-o", output, "-e", f"trace={calls}"]
    return output, [*command, *options]


def steps(output):
    """(edge, call, text) of each call's begin and end, in the order of happening."""
    found = []
    waiting = {}
    for entry in output.read_text("utf-8", "replace").splitlines():
        pid, _, text = entry.partition(" ")
        text = text.strip()
        resumed = re.match(r"<\.\.\. (\w+) resumed>", text)
        if resumed:
            found.append(("end", resumed[1], waiting.pop(pid, "") + text))
            continue
        call = re.match(r"(\w+)\(", text)
        if not call:
            continue
        found.append(("begin", call[1], text))
        if text.endswith("<unfinished ...>"):
            waiting[pid] = text
        else:
            found.append(("end", call[1], text))
    return found


RECEIVE = {"recvfrom", "recvmsg", "read", "readv"}
SEND = {"sendto", "sendmsg", "write", "writev"}
SYNC = {"fsync", "fdatasync"}
RECEIVED = {("end", call) for call in RECEIVE}
SENT = {("begin", call) for call in SEND}


def journeys(output):
    """When each marked request had arrived, when its answer left, and all syncs."""
    arrived, left, syncs, begun, asked = {}, {}, [], {}, {}
    for at, (edge, call, text) in enumerate(steps(output)):
        mark = re.search(r"mark-\d+-\d+-end", text)
        file = re.match(r"\w+\((\d*)", text)[1]
        if call in SYNC and edge == "begin":
            begun[file] = at
        elif call in SYNC:
            syncs.append((begun.pop(file), at))
        elif mark and (edge, call) in RECEIVED:
            asked[file] = mark[0]
            arrived[mark[0]] = at
        elif file in asked and (edge, call) in SENT:
            assert "HTTP/1.1 201" in text
            left[asked.pop(file)] = at
    return arrived, left, syncs


HELD = r"""
import pathlib, sys, time
sys.path.insert(0, sys.argv[1])
import userapi

userapi.GATHER = 60
folder = pathlib.Path(sys.argv[2]).parent


class Held(userapi.UserAPI):
    def __call__(self, environ, start_response):
        if environ["REQUEST_METHOD"] == "POST" and not (folder / "held").exists():
            (folder / "held").touch()
            while not (folder / "go").exists():
                time.sleep(0.001)
        return super().__call__(environ, start_response)


userapi.serve(Held(db=sys.argv[2]), port=0, log="off")
"""


def test_a_group_takes_up_what_comes_while_it_is_run(tmp_path):
    """A write that comes while another is run is of its time, as of one commit."""
    script = tmp_path / "held.py"
    script.write_text(HELD)
    argv = [script, USERAPI.parent, tmp_path / "users.db"]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server(tmp_path, argv=argv, port=None))
        first, second = (stack.enter_context(Client(server)) for _ in range(2))
        assert second.ask(request("GET", "/api/user")).status == 200
        first.send(request("POST", "/api/v2/user", ada()))
        wait_for((tmp_path / "held").exists, "the first write is run")
        second.send(request("POST", "/api/v2/user", ada()))
        wait_for(lambda: in_the_kernel(server, second), "the second has come")
        (tmp_path / "go").touch()
        answers = [client.answer().json() for client in (first, second)]
    times = [answer["results"][0]["created"] for answer in answers]
    assert times[0] == times[1], "they were committed one after the other"


@strace
def test_writers_share_syncs_and_none_is_answered_before_one(tmp_path):
    """A sync between each request's arrival and its answer's departure; 32 share it."""
    output, prefix = trace(tmp_path, ",".join(RECEIVE | SEND | SYNC))
    marks = [[f"mark-{number}-{n}-end" for n in range(32)] for number in range(8)]
    with Server(tmp_path, prefix=prefix) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(server)) for _ in range(32)]
        for client in clients:
            assert client.ask(request("GET", "/api/user")).status == 200
        for turn in marks:
            for mark, client in zip(turn, clients):
                client.send(request("POST", "/api/user", ada(mark)))
            for client in clients:
                assert client.answer().status == 201
    arrived, left, syncs = journeys(output)
    marks = {mark for turn in marks for mark in turn}
    assert marks == set(arrived) == set(left)
    for mark in marks:
        between = [s for s in syncs if arrived[mark] < s[0] and s[1] < left[mark]]
        assert between, f"{mark} was answered before it was on disk"
    first, last = min(arrived.values()), max(left.values())
    shared = [sync for sync in syncs if first < sync[1] < last]
    assert len(shared) <= len(marks) / 2, f"{len(shared)} syncs for {len(marks)} writes"


@strace
def test_reads_flow_while_a_slow_disk_syncs(tmp_path):
    """Each sync takes 200 ms longer, as on a worn SD card."""
    delay = ["-e", f"inject={SYNCS}:delay_exit=200000"]
    _, prefix = trace(tmp_path, SYNCS, "--seccomp-bpf", *delay)
    with Server(tmp_path, prefix=prefix) as server:
        with Client(server) as client:
            for n in (1, 2, 3):
                assert client.ask(request("POST", "/api/user", ada(id=n))).status == 201
        written = []

        def write():
            with Client(server) as client:
                for n in range(10):
                    answer = client.ask(request("POST", "/api/user", ada(f"w{n}")))
                    written.append(answer.status)

        writer = threading.Thread(target=write)
        reads = 0
        with Client(server) as client:
            writer.start()
            while writer.is_alive():
                assert client.ask(request("GET", "/api/user/1")).status == 200
                reads += 1
        writer.join()
        assert written == [201] * 10
        # Reads that waited for each commit would be one or two a write.
        assert reads > 100


@pytest.fixture
def failing(tmp_path):
    """A server with one user, whose disk fails at every sync, and slowly."""
    with Server(tmp_path) as server, Client(server) as client:
        assert client.ask(request("POST", "/api/user", ada(id=1))).status == 201
    fault = f"inject={SYNCS}:error=EIO:delay_exit=100000"
    _, prefix = trace(tmp_path, SYNCS, "--seccomp-bpf", "-e", fault)
    server = Server(tmp_path, prefix=prefix)
    yield server
    server.kill()


@strace
def test_if_the_commit_fails_every_writer_is_told_and_nothing_is_kept(failing):
    """Nor is any of it seen meanwhile, not even by a read on the writer's heels."""
    lost = request("POST", "/api/user", ada("Lost"))
    everyone = request("GET", "/api/user")
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(Client(failing)) for _ in range(8)]
        reader = stack.enter_context(Client(failing))
        for writer in writers:
            writer.send(lost + everyone)
        for _ in range(20):
            assert b"Lost" not in reader.ask(everyone).body
        for writer in writers:
            assert_no_room(writer.answer())
            answer = writer.answer()
            assert answer is None or answer.status in (200, 503)
            assert answer is None or b"Lost" not in answer.body
        users = reader.ask(everyone).json()["results"]
        assert [user["name"] for user in users] == ["Ada"]
        assert_no_room(reader.ask(request("PATCH", "/api/user/1", {"name": "X"})))
        assert reader.ask(request("GET", "/api/user/1")).json()["results"] == users


def assert_no_room(answer):
    assert answer.status in (503, 507), answer
    assert answer.status == 507 or answer.get("retry-after")
    assert_problem(answer)


def test_one_bad_write_among_many_fails_alone(server):
    """Sent together, committed together, each in a savepoint of its own."""
    sound = [request("POST", "/api/user", ada(id=50_000 + n)) for n in range(20)]
    taken = request("POST", "/api/user", ada(id=1))
    bad = request("POST", "/api/user", {"name": "", "mail": "x"})
    nobody = request("DELETE", "/api/user/99999")
    asked = []
    for data in sound:
        asked += [(data, 201), (taken, 409), (bad, 422), (nobody, 404)]
    random.Random(7).shuffle(asked)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(server)) for _ in asked]
        for client, (data, _) in zip(clients, asked):
            client.send(data)
        for client, (data, status) in zip(clients, asked):
            assert client.answer().status == status, data
        for n in range(20):
            answer = clients[n].ask(request("GET", f"/api/user/{50_000 + n}"))
            assert answer.status == 200
        assert clients[0].ask(request("GET", "/api/user/1")).json()["results"] == [
            {"id": 1, "name": "Ada", "mail": "ada@example.org"}
        ]


def test_two_writers_of_one_id_in_one_turn_are_told_apart(server):
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(server)) for _ in range(32)]
        for n, client in enumerate(clients):
            client.send(request("POST", "/api/user", ada(f"No {n}", id=60_000)))
        answers = [client.answer() for client in clients]
        assert sorted(a.status for a in answers) == [201] + [409] * 31
        winner = next(a for a in answers if a.status == 201).json()["results"][0]
        kept = clients[0].ask(request("GET", "/api/user/60000")).json()["results"][0]
        assert kept == winner


def test_what_is_acknowledged_is_read_by_everyone_at_once(server):
    """A read sent after a write's answer, on any connection, sees it."""
    with Client(server) as writer, Client(server) as reader:
        for n in range(100):
            name = f"Turn {n}"
            answer = writer.ask(request("PATCH", "/api/user/1", {"name": name}))
            assert answer.status == 200
            found = reader.ask(request("GET", "/api/user/1")).json()["results"][0]
            assert found["name"] == name
        assert (
            writer.ask(request("PATCH", "/api/user/1", {"name": "Ada"})).status == 200
        )
