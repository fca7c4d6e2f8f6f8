"""What reads from strangers, under made-up input: no fault but the one that is meant,
and no time that grows worse than with the length.

`USERAPI_FUZZ=60 pytest tests/test_fuzz.py` looks at sixty times as many inputs, which
takes about ten minutes a reader; each run of those has other inputs.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import userapi

TIMES = int(os.environ.get("USERAPI_FUZZ", "1"))
fuzz = settings(
    max_examples=1500 * TIMES,
    derandomize=TIMES == 1,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

#: Pieces that mean something to a reader, so that input gets past its first look.
HEAD = [
    b"Host: localhost", b"Content-Length: 5", b"Content-Length: 05", b"\r\n", b"\n",
    b"\r", b": ", b":", b" ", b"\t", b"X_Y: 1", b"X-Y: 1", b"\x00", b"\xff", b"A" * 300,
    b"Transfer-Encoding: chunked", b"Expect: 100-continue", b"Connection: close",
]  # fmt: skip
JSON = [
    b"{", b"}", b"[", b"]", b'"a"', b'"\\ud800"', b"\\u0000", b":", b",", b"1",
    b"1e400", b"-0", b"NaN", b"Infinity", b"true", b"null", b"9" * 31, b"1.5", b'"',
    b"\\", b"\xff", b" ", b'{"item": ', b'"name": "Ada"', b"[" * 40, b'{"a":' * 40,
    b"\xef\xbb\xbf",
]  # fmt: skip
CSV = [
    b"id,name,mail", b"name,mail,id", b"\r\n", b"\n", b"\r", b",", b'"', b'""', b"1",
    b"Ada", b"ada@example.org", b"'=1", b"=1", b"\x00", b"\xff", b"\xef\xbb\xbf", b" ",
    b'"a\nb"', b"x" * 300,
]  # fmt: skip


def joined(pieces: list[bytes]) -> st.SearchStrategy[bytes]:
    """Bytes out of these pieces, and some that are none."""
    piece = st.sampled_from(pieces) | st.binary(max_size=4)
    return st.lists(piece, max_size=40).map(b"".join)


@fuzz
@given(joined(HEAD))
@example(b"A: b\r\n" * 65)
def test_the_head_parser(section):
    try:
        fields = userapi.parse_fields(section, 64)
    except userapi.Problem as problem:
        assert problem.status in (400, 431)
    else:
        assert not section or section.endswith(b"\r\n")
        assert all(key.isupper() and "-" not in key for key in fields)
        assert not any(set(value) & set("\r\n\0") for value in fields.values())


@fuzz
@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=60))
@example("http://[::1/")
@example("/%")
@example("//evil.example/")
def test_the_request_line_parser(target):
    line = f"GET {target} HTTP/1.1".encode()
    try:
        environ = userapi.parse_line(line, {"HTTP_HOST": "h"})
    except userapi.Problem as problem:
        assert problem.status == 400
    else:
        assert environ["PATH_INFO"].startswith("/")
        assert not set("/?#") & set(environ["HTTP_HOST"])
        assert "#" not in environ["QUERY_STRING"]


@fuzz
@given(joined(JSON))
def test_the_json_reader(data):
    try:
        value = userapi.load_json(data)
    except ValueError as fault:
        assert str(fault)
    else:
        userapi.to_json(value)  # so it holds no lone surrogate


def read_entries(data: bytes, batch: int):
    """What the CSV reader gives, so many rows at a time; its fault at the end."""
    entries = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(userapi, "BATCH", batch)
        try:
            for found in userapi.read_csv(io.BytesIO(data)):
                entries += found
        except userapi.Problem as problem:
            assert problem.status in (400, 422)
            return entries, problem.detail
    return entries, None


@fuzz
@given(joined(CSV))
def test_the_csv_reader(data):
    entries, fault = read_entries(data, 1)
    lines = [place.line for place, _ in entries]
    assert lines == sorted(set(lines)) and all(line > 0 for line in lines)
    again, same = read_entries(data, 1000)
    assert same == fault and again == entries[: len(again)]
    assert fault or again == entries


@fuzz
@given(joined([*JSON, b"\n"]))
def test_the_ndjson_reader(data):
    for place, item in userapi.ndjson_entries(io.BytesIO(data)):
        assert place.line > 0
        assert not isinstance(item, userapi.BadLine) or str(item)


@fuzz
@given(st.text(max_size=60) | joined(JSON).map(lambda data: data.decode("latin-1")))
def test_the_cursor_reader(text):
    try:
        sort, _, id = userapi.read_cursor(text)
    except ValueError as fault:
        assert str(fault) == "is no cursor out of next"
    else:
        assert userapi.write_cursor(sort, (_, id))


@fuzz
@given(st.sampled_from(userapi.SORT_NAMES), st.text(max_size=30), st.integers(1, 2**53))
def test_a_cursor_is_read_as_it_was_written(sort, text, id):
    key = id if sort.endswith("id") else text
    assert userapi.read_cursor(userapi.write_cursor(sort, (key, id))) == (sort, key, id)


def test_the_core_suites_rules():
    """What it asks of any name, mail, JSON, query and import, ten times as often."""
    out = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "test_userapi.py", "-k", "test_any"],
        cwd=Path(userapi.__file__).parent,
        env={**os.environ, "USERAPI_FUZZ": str(20 * TIMES)},
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0 and " passed" in out.stdout, out.stdout + out.stderr


def read_line(target: bytes):
    """A request line with this target, whether it is refused or not."""
    with contextlib.suppress(userapi.Problem):
        userapi.parse_line(b"GET " + target + b" HTTP/1.1", {})


READERS = {
    "head": lambda n: userapi.parse_fields(b"X: " + b"a" * n + b"\r\n", 64),
    "no head": lambda n: userapi.BARE.search(b"a" * n),
    "target": lambda n: read_line(b"/" + b"%41" * n),
    "target, an authority": lambda n: read_line(b"http://" + b"a" * n + b" "),
    "target, its end missing": lambda n: read_line(b"/" + b"?" * n + b" "),
    "secrets": lambda n: userapi.without_secrets("?" * n + "="),
    "secrets, pairs": lambda n: userapi.without_secrets("&a?token" * n + "="),
    "json": lambda n: userapi.load_json(b"[" + b"1," * n + b"1]"),
    "json, deep": lambda n: pytest.raises(ValueError, userapi.load_json, b"[" * n),
    "json, quotes": lambda n: userapi.load_json(
        b'["' + b'\\"' * n + b'", "' + b"[" * 40 + b'"]'
    ),
    "csv": lambda n: list(
        userapi.read_csv(io.BytesIO(b"name,mail\n" + b"a,b@c\n" * n))
    ),
    "csv, a quote": lambda n: list(
        userapi.read_csv(io.BytesIO(b'name,mail\n"' + b"a\n" * min(n, 60_000)))
    ),
    "cursor": lambda n: pytest.raises(ValueError, userapi.read_cursor, "W" * n),
    "name": lambda n: pytest.raises(ValueError, userapi.clean_name, "\u200b" * n),
    "mail": lambda n: pytest.raises(
        ValueError, userapi.USER.by_name["mail"].rule(), "a@" + "a." * n
    ),
    "number": lambda n: pytest.raises(
        ValueError, userapi.PHONE.by_name["number"].rule(), "1" + " (" * n
    ),
    "accept": lambda n: userapi.negotiate("a/b;q=0.1," * n, (userapi.JSON,)),
    "accept, a quote": lambda n: userapi.negotiate('"' + '\\"' * n, (userapi.JSON,)),
    "accept, spaces": lambda n: userapi.negotiate(";" + " " * n, (userapi.JSON,)),
    "tags": lambda n: userapi.has_tag('"' * n, '"1"', weak=False),
    "tags, spaces": lambda n: userapi.has_tag("," + " " * n, '"1"', weak=False),
}


@pytest.mark.parametrize("reader", READERS)
def test_time_grows_no_worse_than_the_length(reader):
    """Eight times the length takes at most some forty times as long, not 64 or more:
    the best of several tries, as other programs take time as well."""
    read = READERS[reader]

    def best(n: int) -> float:
        took = []
        for _ in range(5):
            began = time.process_time()
            read(n)
            took.append(time.process_time() - began)
        return min(took)

    small, large = best(20_000), best(160_000)
    assert large < 40 * small + 0.05
