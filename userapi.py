#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["bottle>=0.13"]
# ///
"""userapi: users over REST, out of one file.

Stores users (id, name, mail, phone numbers, addresses) in SQLite and serves them as
JSON, CSV and NDJSON, with an admin page, a reference, OpenAPI and Postman documents.

    python userapi.py                                  # http://127.0.0.1:8080/
    app = UserAPI(db="users.db")                       # any WSGI server, any prefix
    app.store.create_users([{"name": "Ada", "mail": "ada@example.org"}])

Words used throughout: a *row* comes from the database, a *user* is what is shown, an
*item* is what was sent; *rows* (lower case, of a user) are its phones and addresses; a
*view* is the members that an API version shows; a *problem* is an error as RFC 9457
has it; a *turn* is one round of the server's loop, whose writes are committed together.

It is no general database server, no user directory with passwords, and no framework.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import sys

if (
    __name__ == "__main__"
    and sys.stdout
    and sys.stderr
    and sys.executable
    and hasattr(os, "memfd_create")
    and sys._getframe().f_back is None  # by no tool, and not yet the fresh one
    and sys._getframe().f_code.co_filename.endswith(sys.argv[0])  # it is not frozen
):
    # To compile this file takes 10 MiB that the process never gives back: a fresh one
    # (of the same pid) goes on with the compiled code.
    code = marshal.dumps((sys._getframe().f_code, sys.path, sys.argv))
    flags = getattr(sys, "orig_argv", [*sys.argv, ""])[1 : -len(sys.argv)]
    with contextlib.suppress(OSError):  # it is refused, or under RLIMIT_FSIZE too short
        file = os.memfd_create("userapi", 0)
        begin = (
            "import marshal, sys; m = sys.modules['__main__'] = type(sys)('__main__');"
            f"f = open({file}, 'rb'); c, sys.path[:], sys.argv[:] = marshal.load(f);"
            "f.close(); m.__file__ = c.co_filename; exec(c, m.__dict__)"
        )
        if os.pwrite(file, code, 0) == len(code):
            os.execv(sys.executable, [sys.executable, *flags, "-c", begin, *sys.argv])

import array
import asyncio
import base64
import bisect
import collections
import datetime
import functools
import gc
import hashlib
import hmac
import html
import io
import itertools
import json
import math
import mmap
import operator
import re
import signal
import socket
import sqlite3
import stat
import threading
import time
import traceback
import unicodedata
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from email.utils import formatdate
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Union
from urllib.parse import parse_qsl, quote, unquote, urlencode

try:
    import bottle  # type: ignore[import-untyped,unused-ignore]
except ImportError:
    missing = (
        "Bottle is missing: 'pip install bottle', the package python3-bottle of your"
        " distribution, or the file bottle.py beside userapi.py"
    )
    if __name__ == "__main__":
        sys.exit(f"userapi: {missing}")
    raise ImportError(missing) from None

__all__ = ["Problem", "Store", "UserAPI", "main", "openapi", "postman", "serve"]
__version__ = "1.0.0"

Environ = dict[str, Any]
Item = dict[str, Any]
Headers = Sequence[tuple[str, str]]
Rows = list[Any]  # of tuples, as SQLite gives them
Names = tuple[str, ...]  # of members, parameters, media types …
#: what is asked whether a user of this version may be changed; raises Problem
Check = Union[Callable[[int], None], None]

# ── Settings ──────────────────────────────────────────────────────────────────────


class Setting(NamedTuple):
    """A flag, a `USERAPI_*` variable, a keyword argument and a row of the README.

    Text in it matches `rule`, where there is one; else `fault` is said.
    """

    name: str
    default: Any
    help: str
    rule: str = ""
    fault: str = ""


SETTINGS = (
    Setting("db", "users.db", "path of the SQLite file, :memory:, or postgresql://…",
        "(?s).+", "needs a path"),
    Setting("host", "127.0.0.1", "address to listen on; :: is all, IPv4's too",
        "[!-~]+", "is an address, or a name in ASCII"),
    Setting("port", 8080, "port to listen on; 0 picks a free one"),
    Setting("unix", "", "path of a Unix socket to listen on instead"),
    Setting("cert", "", "TLS certificate chain (PEM file); goes with key"),
    Setting("key", "", "TLS private key (PEM file); goes with cert"),
    Setting("token", "", "the admin token: a variable or keyword, never a flag",
        r"[\x21-\x7e]*", "may hold visible ASCII characters only"),
    Setting("token_file", "", "file that holds the admin token, for its owner alone"),
    Setting("allow_host", (), "names that the Host header may have, by commas",
        r"[a-z0-9._-]+|\[[0-9a-f:.]+\]", "takes names without ports"),
    Setting("cors", (), "origins whose pages may call the API, by commas",
        r"(?!(?:http://.*:80|https://.*:443)$)[a-z][a-z0-9+.-]*://[!-.0-~]+",
        "takes origins as browsers send them, like https://example.org"),
    Setting("trusted_proxy", (),
        "addresses or networks whose X-Forwarded-* is believed"),
    Setting("unique_mail", False, "refuse a mail address that another user has"),
    Setting("require_if_match", False, "refuse a change of one user without If-Match"),
    Setting("keep_changes", 100_000, "rows that the log of changes keeps"),
    Setting("max_body", 8 << 20, "bytes of a request's body"),
    Setting("max_items", 10_000, "items of a request"),
    Setting("max_bodies", 32 << 20, "bytes of all bodies in flight; max_body at least"),
    Setting("max_connections", 512, "connections at a time"),
    Setting("max_line", 8192, "bytes of a request line"),
    Setting("max_head", 16384, "bytes of a header section"),
    Setting("max_fields", 64, "fields of a header section"),
    Setting("head_timeout", 10, "seconds for a request's head to arrive"),
    Setting("body_timeout", 20, "seconds for its body, and one more each 256 KiB"),
    Setting("idle_timeout", 30, "seconds that a connection may idle"),
    Setting("send_timeout", 20, "seconds without progress in taking an answer"),
    Setting("log", "text", "access log: text, json or off",
        "text|json|off", "is text, json or off"),
)  # fmt: skip
STORE_SETTINGS = ("db", "unique_mail", "keep_changes")
FLAGS = tuple(setting.name for setting in SETTINGS if setting.name != "token")
POSTGRESQL = ("postgresql://", "postgres://")
TRUTH = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


class SettingError(ValueError):
    """A setting has a value that it cannot have; the text says which and why."""


class Settings:
    """The settings in force: what is given, else the `USERAPI_*` variable, else the
    default. Raises SettingError."""

    if TYPE_CHECKING:
        unique_mail: Any

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, given: dict[str, Any]) -> None:
        unknown = set(given) - {setting.name for setting in SETTINGS}
        if unknown:
            raise SettingError(f"there is no setting {', '.join(sorted(unknown))}")
        for name, default, *_ in SETTINGS:
            value = given.get(name)
            if value is None:
                value = os.environ.get(f"USERAPI_{name.upper()}") or default
            setattr(self, name, convert(name, default, value))
        beaten = given.get("token_file") and not given.get("token")
        if self.token_file and (beaten or not self.token):
            self.token: str = read_token(self.token_file)
        self._refuse_wrong()

    def _refuse_wrong(self) -> None:
        if bool(self.cert) != bool(self.key):
            raise SettingError("cert and key go together")
        for name, _, _, rule, fault in SETTINGS:
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,)
            if rule and not all(re.fullmatch(rule, value) for value in values):
                raise SettingError(f"{name} {fault}")

    def update(self, given: dict[str, Any]) -> None:
        """Take over other values. Raises SettingError."""
        old = {**vars(self), "token": None} if given.get("token_file") else vars(self)
        vars(self).update(vars(Settings({**old, **given})))


def convert(name: str, default: Any, value: Any) -> Any:
    """The value in the type of the setting's default. Raises SettingError."""
    if isinstance(default, bool):
        truth = TRUTH.get(str(value).lower())
        if truth is None:
            raise SettingError(f"{name} is not one of {', '.join(TRUTH)}")
        return truth
    if isinstance(default, int):
        low, high = (0, 65535) if name == "port" else (1, 2**40)
        if not re.fullmatch("[0-9]{1,13}", str(value)) or not low <= int(value) <= high:
            raise SettingError(f"{name} is not a whole number from {low} to {high}")
        return int(value)
    if isinstance(default, tuple):
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(part.strip().lower().rstrip("/") for part in parts if part.strip())
    return os.fsdecode(value) if isinstance(value, bytes) else str(value)


def read_token(path: str) -> str:
    """The token in a file that only its owner (and group) can read; or on a read-only
    mount, as containers get their secrets, where the mode says nothing."""
    try:
        with open(path, encoding="latin-1") as file:
            shared = os.name == "posix" and os.fstat(file.fileno()).st_mode & 0o007
            if shared and not os.fstatvfs(file.fileno()).f_flag & os.ST_RDONLY:
                raise SettingError("token_file can be read by others: chmod 600 it")
            token = file.read().strip()
    except OSError as fault:
        raise SettingError(f"token_file cannot be read: {reason(fault)}") from None
    if not token:
        raise SettingError("token_file is empty")
    return token


def is_file(db: str) -> bool:
    """Whether the setting names a file."""
    return db != ":memory:" and not db.startswith(POSTGRESQL)


def is_missing(db: str) -> bool:
    return is_file(db) and not os.path.exists(db)


def show_db(db: str) -> str:
    """The setting without what may be a password."""
    return re.sub(r"(?<=//)[^/]*@|\?.*", "", db) if db.startswith(POSTGRESQL) else db


def reason(fault: Exception) -> str:
    """Why an operation of the system failed, without the path it failed on."""
    return getattr(fault, "strerror", None) or str(fault)


# ── Problems ──────────────────────────────────────────────────────────────────────

#: status: (title of RFC 9110, when it is answered)
PROBLEMS = {
    400: ("Bad Request", "bad HTTP, JSON, UTF-8 or query"),
    401: ("Unauthorized", "no token, or a wrong one; see WWW-Authenticate"),
    403: ("Forbidden", "wrong role, cross-site, or a foreign Host"),
    404: ("Not Found", "there is nothing at this URI"),
    405: ("Method Not Allowed", "the resource does not have this method; see Allow"),
    406: ("Not Acceptable", "Accept allows none of the formats there are"),
    408: ("Request Timeout", "the request took too long to arrive"),
    409: ("Conflict", "an id or a mail address is taken"),
    410: ("Gone", "since is older than the log of changes"),
    411: ("Length Required", "the request announces no end of its body"),
    412: ("Precondition Failed", "someone was faster; read the user again"),
    413: ("Content Too Large", "the body or its number of items is over the limit"),
    414: ("URI Too Long", "the request line is over the limit"),
    415: ("Unsupported Media Type", "no media type that is taken here; see Accept"),
    417: ("Expectation Failed", "an Expect other than 100-continue"),
    422: ("Unprocessable Content", "members are not valid; errors lists them all"),
    428: ("Precondition Required", "this server wants If-Match"),
    429: ("Too Many Requests", "too many wrong tokens; see Retry-After"),
    431: ("Request Header Fields Too Large", "the header section is over the limit"),
    500: ("Internal Server Error", "an unknown fault, logged with the id given"),
    501: ("Not Implemented", "an unknown transfer coding"),
    503: ("Service Unavailable", "busy or read-only; see Retry-After"),
    505: ("HTTP Version Not Supported", "neither HTTP/1.1 nor HTTP/1.0"),
    507: ("Insufficient Storage", "no room on the disk; see Retry-After"),
}
STATUS = {200: "200 OK", 201: "201 Created", 204: "204 No Content"}
STATUS[304] = "304 Not Modified"
STATUS.update((status, f"{status} {entry[0]}") for status, entry in PROBLEMS.items())
PROBLEM_JSON = "application/problem+json"


class Problem(Exception):
    """An error as the client sees it (RFC 9457): status, detail, and every fault.

    `errors` are objects with `detail` and one of `pointer` (RFC 6901, a URI fragment),
    `parameter` or `header`; `headers` go out with the answer; `more` are further
    members of the body.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        errors: Sequence[Item] = (),
        headers: Headers = (),
        **more: Any,
    ) -> None:
        super().__init__(status, detail)  # as pickle and copy make it again
        self.status, self.detail, self.headers = status, detail, list(headers)
        self.errors, self.more = list(errors), more

    def __str__(self) -> str:
        return self.detail

    def body(self) -> bytes:
        """The problem as application/problem+json."""
        members: Item = {"code": 1, "message": "FAILURE", "type": "about:blank"}
        members.update(title=PROBLEMS[self.status][0], status=self.status)
        members["detail"] = self.detail
        if self.errors:
            members["errors"] = self.errors
        return to_json({**members, **self.more})


def busy(detail: str, seconds: int = 1) -> Problem:
    """A 503 that says when to come again."""
    return Problem(503, detail, headers=[("Retry-After", str(seconds))])


ENCODER = json.JSONEncoder(ensure_ascii=False)


def to_json(value: Any) -> bytes:
    return ENCODER.encode(value).encode()


DISK_FULL = "there is no room on the disk"
#: from the first of these in SQLite's name of the fault and its message, or in an
#: SQLSTATE, to the problem it is
DATABASE_PROBLEMS = (
    ("SQLITE_IOERR(?!.*(WRITE|SHMSIZE))", 503, "the disk does not answer"),
    ("full|53100", 507, DISK_FULL),
    ("disk I/O error", 507, "the disk does not take what is written"),
    ("locked|55P03", 503, "another program holds the database"),
    ("readonly|0A000|25006|42501", 503, "the database is read-only"),
    ("unable to open|25P0[34]", 503, "the database cannot be opened"),
    ("no such column", 503, "the database is of an old version and read-only"),
    ("42P01|XX00.", 503, "the database is damaged"),
    ("failed: users.mail_fold|23505", 409, "mail is taken, as unique_mail is set"),
    ("cannot contain NUL", 422, "PostgreSQL keeps no text with U+0000 in it"),
)
#: what SQLite raises; the second where its own text is damaged
DATABASE_FAULTS = (sqlite3.Error, UnicodeDecodeError)


def database_problem(fault: Exception) -> Problem:
    """What a fault of SQLite means to a client; its text stays here."""
    text = f"{getattr(fault, 'sqlite_errorname', '')} {fault}"
    for part, status, detail in DATABASE_PROBLEMS:
        if re.search(part, text):
            later = [("Retry-After", "5")] if status >= 500 else []
            return Problem(status, detail, headers=later)
    if isinstance(fault, (sqlite3.IntegrityError, sqlite3.ProgrammingError)):
        raise fault
    return busy("the database is damaged", 60)


# ── Fields ────────────────────────────────────────────────────────────────────────

MAX_ID = 2**53 - 1  # the largest whole number that every JSON client can hold
INVISIBLE = frozenset("\u115f\u1160\u2800\u3164\uffa0")
HIDDEN = frozenset({"Cf", "Zs", "Zl", "Zp"})
BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
#: Unicode's White_Space; str.strip() would take U+001C to U+001F as well
SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B)))
SPACE += "\u2028\u2029\u202f\u205f\u3000"
_LABEL = "[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
#: the HTML standard's rule for <input type=email>, and RFC 5321's 64 before the @
MAIL = rf"^[a-zA-Z0-9.!#$%&'*+/=?^_`{{|}}~-]{{1,64}}@{_LABEL}(?:\.{_LABEL})*$"
#: lines of cells that are stored as they are, if is_clean(); ' may guard a formula
PLAIN = {
    "id": re.compile(r"(?:[1-9][0-9]{0,14}\n)+"),
    "name": re.compile(r"(?:[^ '\n](?:[^\n]{0,198}[^ \n])?\n)+"),
    "mail": re.compile(rf"(?:(?=[^'\n][^\n]{{0,253}}\n){MAIL[1:-1]}\n)+"),
}
_ANY = r"[ ()./-]*"  # what may stand between digits
#: ^\+?[0-9(][0-9 ()./-]*( ?x[0-9]+)?$ with 3 digits, those after the x included
NUMBER = (
    rf"^\+?(?:(?:[0-9]|\({_ANY}[0-9])(?:(?:{_ANY}[0-9]){{2}}[0-9 ()./-]*(?:x[0-9]+)?"
    rf"|{_ANY}[0-9]{_ANY}x[0-9]+|{_ANY}x[0-9]{{2,}})|\({_ANY}x[0-9]{{3,}})$"
)
TIME = re.compile(
    r"(?a)\d{4}-\d\d-\d\d[Tt ](?!24)\d\d:\d\d:\d\d"  # Python 3.14 would take 24:00
    r"(?:\.(\d+))?(?:[Zz]|([+-]\d\d:[0-5]\d))"
)
#: nearly each of those that are stored, but on days that not every month has
STORED_TIME = re.compile(
    r"(?!0000)[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])"
    r"T(?:[01][0-9]|2[0-3])(?::[0-5][0-9]){2}\.[0-9]{3}Z"
)


class Field(NamedTuple):
    """One member of a user, a phone or an address: what it may hold and where it shows.

    `schema` is JSON Schema, which rule() goes by; `clean` is a rule beyond it;
    `v1` and `csv` say where it shows besides v2; `rows` names the kind of a list.
    """

    name: str
    title: str
    schema: Item
    example: Any
    fault: str = "is not valid"
    required: bool = False
    read_only: bool = False
    v1: bool = False
    csv: bool = False
    rows: str = ""
    column: str = ""
    clean: Callable[[str], str] | None = None
    input: str = "text"

    def rule(self) -> Callable[[Any], Any]:
        """A function that gives a value as it is stored, or raises ValueError."""
        if self.schema["type"] == "integer":
            return check_id
        if self.schema.get("format") == "date-time":
            return check_time
        most, clean, wrong = self.schema["maxLength"], self.clean, self.fault
        pattern = self.schema.get("pattern")
        fits = pattern and re.compile(pattern).fullmatch

        def check(value: Any) -> str:
            if not isinstance(value, str):
                raise ValueError("is not a string")
            if not value.isascii():
                value.encode()  # a lone surrogate is a ValueError, too
            text = clean(value) if clean else value
            if len(text) > most:
                raise ValueError(f"has {len(text)} characters; {most} are the most")
            if fits and not fits(text):
                raise ValueError(wrong)
            return text

        return check


def check_id(value: Any) -> int:
    """An id: a whole number from 1 to 2^53-1; 1.0 is 1, true is not."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int:
        raise ValueError("is not a whole number")
    if not 1 <= value <= MAX_ID:
        raise ValueError(f"is not between 1 and {MAX_ID}")
    return value


def clean_name(value: str) -> str:
    """A name in NFC without white space around it. Raises ValueError."""
    if value.isascii() and value.isprintable():
        value = value.strip(" ")
    else:
        value = value.strip(SPACE)
        if len(value) <= 800:  # more stay too many, and n marks take n² steps
            value = unicodedata.normalize("NFC", value)
        kinds = {character: unicodedata.category(character) for character in value}
        if not {"Cc", "Cn"}.isdisjoint(kinds.values()) or BIDI & kinds.keys():
            raise ValueError("holds a character that no name has")
        if all(kind in HIDDEN or c in INVISIBLE for c, kind in kinds.items()):
            value = ""
    if not value:
        raise ValueError("is empty or holds only invisible characters")
    return value


def check_time(value: Any) -> str:
    """A time of RFC 3339 in UTC with milliseconds. Raises ValueError."""
    try:
        if STORED_TIME.fullmatch(value):
            return str(value)
        fraction, offset = TIME.fullmatch(value).groups("")  # type: ignore[union-attr]
        when = datetime.datetime.fromisoformat(value[:19] + (offset or "+00:00"))
        utc = when.astimezone(datetime.timezone.utc)
    except (TypeError, AttributeError, ValueError, OverflowError):
        raise ValueError("is not a time (RFC 3339)") from None
    return f"{utc.isoformat()[:19]}.{fraction[:3]:0<3}Z"


ID = {"type": "integer", "minimum": 1, "maximum": MAX_ID}
TEXT = {"type": "string", "maxLength": 200}
STAMP = {"type": "string", "format": "date-time"}
NOON = "2026-01-02T12:00:00.000Z"
MAX_ROWS = 1000  # of a kind below a user
ROW_LIST = {"type": "array", "maxItems": MAX_ROWS}
ROW_ID = Field("id", "Number", ID, 1, column="id")
LABEL = Field("label", "Label", {**TEXT, "maxLength": 50}, "work", column="label")


class Shape:
    """A user, or a kind of rows below one: its names, its fields, its columns.

    `one_of` names members of which an item needs one.
    """

    def __init__(
        self, name: str, plural: str, title: str, *fields: Field, one_of: Names = ()
    ) -> None:
        self.name, self.plural, self.title = name, plural, title
        self.fields, self.one_of = fields, one_of
        self.by_name = {field.name: field for field in fields}
        self.names = tuple(self.by_name)
        self.values = operator.itemgetter(*self.names)
        #: those that a client writes, without the id; and which of them are a column
        self.written = [f for f in fields if f.name != "id" and not f.read_only]
        self.columns = tuple(field for field in self.written if field.column)


PHONE = Shape("phone", "phones", "phone number",
    ROW_ID,
    LABEL,
    Field("number", "Number", {**TEXT, "maxLength": 32, "minLength": 3,
          "pattern": NUMBER}, "+49 30 1234567", "is not a phone number",
          required=True, column="number", input="tel"),
)  # fmt: skip
ADDRESS = Shape("address", "addresses", "address",
    ROW_ID,
    LABEL,
    Field("street", "Street", TEXT, "Hauptstraße 5", column="street"),
    Field("postcode", "Postcode", TEXT, "10827", column="postcode"),
    Field("city", "City", TEXT, "Berlin", column="city"),
    Field("region", "Region", TEXT, "Berlin", column="region"),
    Field("country", "Country", {**TEXT, "maxLength": 2, "pattern": "^([A-Z]{2})?$"},
          "DE", "is not two capital letters", column="country"),
    one_of=("street", "city"),
)  # fmt: skip
SHAPES = {"phone": PHONE, "address": ADDRESS}
USER = Shape("user", "users", "user",
    Field("id", "Id", ID, 1, v1=True, csv=True, column="user_id"),
    Field("name", "Name", {"type": "string", "minLength": 1, "maxLength": 200},
          "Simone Giertz", required=True, v1=True, csv=True, column="user_name",
          clean=clean_name),
    Field("mail", "Mail", {**TEXT, "maxLength": 254, "pattern": MAIL},
          "giertz@shittyrobots.loc", "is not a mail address", required=True, v1=True,
          csv=True, column="user_mail", input="email"),
    Field("phone", "Phone", ROW_LIST, [], rows="phone"),
    Field("address", "Address", ROW_LIST, [], rows="address"),
    Field("version", "Version", ID, 1, read_only=True, column="version"),
    Field("created", "Created", STAMP, NOON, read_only=True, column="created"),
    Field("updated", "Updated", STAMP, NOON, read_only=True, column="updated"),
)  # fmt: skip
VIEWS = {"v1": tuple(field.name for field in USER.fields if field.v1), "v2": USER.names}


class BadLine(str):
    """A line of an import that is no item; the text says why."""


class Place(NamedTuple):
    """Where an item stands: its pointer and, in an import, its physical line."""

    pointer: str
    line: int = 0

    def fault(self, member: str | None, detail: str) -> Item:
        """An entry of a problem's `errors` about a member of the item, or all of it."""
        pointer = self.pointer
        if member is not None:  # RFC 6901 §6
            escaped = member.replace("~", "~0").replace("/", "~1")
            pointer += "/" + quote(escaped, safe="~!$&'()*+,;=:@")
        fault: Item = {"pointer": pointer, "detail": detail}
        return {"line": self.line, **fault} if self.line else fault


Entry = tuple[Place, Any]  # an item as it was sent, and where it stands
IMPORT_FAULTS = 100  # that are told of an import


class Faults:
    """The faults of one request: all are told, up to `most`; the worst one counts."""

    def __init__(self, most: int = 30_000) -> None:
        self.most, self.total, self.first = most, 0, ""
        self.errors: list[Item] = []
        self.statuses: set[int] = set()

    def add(self, at: Place, name: str | None, detail: str, status: int = 422) -> None:
        """Add a fault of a member of the item at a place; None is all of the item."""
        if not self.total:
            where = f"line {at.line}" if at.line else "the item"
            self.first = f"{where if name is None else name} {detail}"
        self.total += 1
        self.statuses.add(status)
        if len(self.errors) < self.most:
            self.errors.append(at.fault(name, detail))

    def raise_worst(self, *among: int) -> None:
        """Raise Problem 422, else 404, else 409, where there were faults."""
        for status in among or (422, 404, 409):
            if status in self.statuses:
                kind = "members are not valid" if self.statuses == {422} else "faults"
                detail = f"{self.total} {kind}" if self.total > 1 else self.first
                problem = Problem(status, detail, self.errors)
                if self.most == IMPORT_FAULTS or self.total > self.most:
                    problem.more["total"] = self.total
                raise problem


class Checker:
    """How the items of a shape are checked; what is wrong is added to `faults`.

    `members` are the names that may be sent (all, if there are none). By `how`, merge
    checks only what is sent, and all but create need an id, unless the item is `named`
    by the URI. `keeps` names what is kept though it is read-only (an import).
    """

    def __init__(
        self,
        shape: Shape,
        members: Names = (),
        how: str = "create",
        keeps: Names = (),
        named: bool = False,
    ) -> None:
        self.partial, self.one_of = how == "merge", shape.one_of
        #: what gives a member's value as it is stored; None for what is not stored
        self.rules: dict[str, Callable[[Any], Any] | None] = {}
        fields = [shape.by_name[name] for name in members or shape.names]
        for field in fields:
            wanted = not (field.rows or field.read_only) or field.name in keeps
            self.rules[field.name] = field.rule() if wanted else None
        self.lists = {f.name: Checker(SHAPES[f.rows]) for f in fields if f.rows}
        written = [field for field in fields if field in shape.columns]
        self.required = [f.name for f in written if f.required and not self.partial]
        self.required += ["id"] * (how != "create" and not named)
        empty: Item = {field.name: "" for field in written if not field.required}
        self.empty = {} if self.partial else empty
        #: what null stands for in a merge (RFC 7396)
        self.nulls = {**empty, **dict.fromkeys(self.lists, [])} if self.partial else {}

    def check(self, place: Place, item: Any, faults: Faults, id: int = 0) -> Item:
        """The item as it is stored; `id` is the URI's, if it names one."""
        if not isinstance(item, dict):
            detail = item if isinstance(item, BadLine) else "is not an object"
            faults.add(place, None, detail)
            return {}
        values, rules = self.empty.copy(), self.rules
        for name, value in item.items():
            rule = rules.get(name, refuse_member)
            try:
                if value is None and name in self.nulls:
                    values[name] = self.nulls[name]
                elif rule is not None:
                    values[name] = rule(value)
                elif name in self.lists:
                    values[name] = self.check_rows(place, name, value, faults)
            except ValueError as fault:
                faults.add(place, str(name), str(fault))
        for name in [name for name in self.required if name not in item]:
            faults.add(place, name, "is required")
        if id and values.setdefault("id", id) != id:
            faults.add(place, "id", "is not the URI's")
        if not self.partial:
            self.require_one(place, item, faults)
        return values

    def require_one(self, place: Place, item: Item, faults: Faults) -> None:
        """Add a fault where the item has none of the members of which it needs one."""
        given = (str(item.get(name, "")).strip() for name in self.one_of)
        if self.one_of and not any(given):
            faults.add(place, None, f"needs {' or '.join(self.one_of)}")

    def check_rows(self, place: Place, name: str, rows: Any, faults: Faults) -> Any:
        """The rows in a list as they are stored."""
        if not isinstance(rows, list):
            raise ValueError("is not a list")
        if len(rows) > MAX_ROWS:
            raise ValueError(f"has more than {MAX_ROWS} entries")
        stored: list[Item] = []
        first: dict[int, Place] = {}
        for index, item in enumerate(rows):
            at = Place(f"{place.pointer}/{name}/{index}", place.line)
            stored.append(row := self.lists[name].check(at, item, faults))
            if "id" in row and first.setdefault(row["id"], at) is not at:
                faults.add(at, "id", "stands twice")
        return stored


def refuse_member(value: Any) -> Any:
    raise ValueError("is no member that can be sent here")


#: Checker(…), which is made once for the same arguments
find_checker = functools.lru_cache(maxsize=64)(Checker)


def is_clean(text: str) -> bool:
    """Whether lines of text hold nothing that clean_name() looks at more closely."""
    normal = text.isascii() or unicodedata.is_normalized("NFC", text)
    visible = text.isascii() or INVISIBLE.isdisjoint(text)
    return normal and visible and text.replace("\n", "").isprintable()


class Columns:
    """Users of a CSV import, column by column, none of which is to clean or to refuse.

    `ids` is empty where the database counts. Iterated, they are `entries` like others.
    """

    def __init__(self, cells: Mapping[str, Any], entries: Iterator[Entry]) -> None:
        self.names, self.mails, self.entries = cells["name"], cells["mail"], entries
        self.ids = list(map(int, cells.get("id", ())))

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Entry]:
        return self.entries


def read_columns(
    header: list[str], rows: list[Any], entries: Iterator[Entry]
) -> Columns | None:
    """The users in these rows of cells, if all are plain, which is found out a column
    at a time: row by row takes six times as long."""
    if not set(header) <= PLAIN.keys() or set(map(len, rows)) != {len(header)}:
        return None
    columns = dict(zip(header, zip(*rows)))
    for name, cells in columns.items():
        text = "\n".join(cells) + "\n"
        plain = PLAIN[name].fullmatch(text) and text.count("\n") == len(rows)
        if not plain or not is_clean(text):
            return None
    return Columns(columns, entries)


def utc_now() -> str:
    """Now, as it is stored and shown: RFC 3339, UTC, milliseconds."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return now.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def fold(value: str) -> str:
    """Text as it is compared without case."""
    if value.isascii():
        return value.lower()
    return unicodedata.normalize("NFC", value).casefold()


def fold_all(values: Sequence[str]) -> Iterator[str]:
    return map(str.lower if "".join(values).isascii() else fold, values)


# ── Store ─────────────────────────────────────────────────────────────────────────

LOW = 8 << 20  # bytes free on the disk from which on each write is looked at
PLENTY = 1 << 30  # bytes from which on the log's size is not looked at each time
LOOK = 0.1  # seconds after which it is, as to ask takes a tenth of a small write
LONG = 64 << 20  # bytes of the log from which on a commit sees to it
SPARE = 1 << 20  # bytes of them that new pages never get: the log's
APPLICATION_ID = 0x75736572  # "user", in the file's header
QUICK_CHECK = 32 << 20  # bytes up to which a database is checked when it is opened
PAGE_ROWS = 500  # rows read at a time when all users are read
SORTS = {"id": "user_id", "name": "name_fold", "mail": "mail_fold"}
SORTS.update(created="created", updated="updated")
SORT_INDEXES = [(name, column) for name, column in SORTS.items() if name != "id"]
GRAVES = 100_000  # ids of deleted users whose last version is remembered
BATCH = 1000  # items of a request or an import that are looked at together
ROWS_AT_ONCE = 20  # that one statement inserts
MANY = 20_000  # users created at once from which on the indexes are made last
DAY = 24 * 60 * 60
RETRIES = 64 << 20  # bytes of answers that are kept for retries, the last ones
TABLES = {"users": USER, "user_phone": PHONE, "user_address": ADDRESS}
ORIGINAL = ["user_id", "user_name", "user_mail"]  # the first application's columns
SURROGATE = re.compile("[\ud800-\udfff]")  # what no text of UTF-8 has
BEGIN = "BEGIN IMMEDIATE"  # not to find out at the first write that it is too late
_NOW = "strftime('%Y-%m-%dT%H:%M:%fZ', 'now')"
_LAST_SEQ = "coalesce((SELECT max(seq) FROM changes), 0)"
_BOTH = """'["name", "mail"]'"""
_MOVED = " WHERE NEW.user_id <> OLD.user_id"
_COUNTED = "".join(  # ids of rows that are there already are not given again
    f", last_{name} = max(last_{name}, coalesce((SELECT max(id) FROM user_{name}"
    " WHERE user_id = NEW.user_id), 0))"
    for name in SHAPES
)
#: takes up a user that another program wrote; no version of its id comes twice
_TAKE_UP = (
    f"UPDATE users SET updated = {_NOW}, version = 1 + max(version, coalesce((SELECT"
    " max(version) FROM graves WHERE user_id IN (NEW.user_id, 0)), 0)),"
    f" name_fold = lower(user_name), mail_fold = lower(user_mail){_COUNTED}"
    " WHERE user_id = NEW.user_id;"
)


def log_sql(op: str, user: str, fields: str) -> str:
    """The statement with which a trigger logs what another program wrote."""
    return (
        "INSERT INTO changes (at, actor, op, user, fields)"
        f" SELECT {_NOW}, NULL, '{op}', {user}, {fields}"
    )


def row_trigger(shape: Shape, event: str, row: str, when: str) -> str:
    """The trigger on another program's writes to a kind of rows below a user."""
    table, fields = f"user_{shape.name}", f"""'["{shape.name}"]'"""
    return (
        f"CREATE TRIGGER {table}_{event.lower().replace(' ', '_')} AFTER {event} ON"
        f" {table} WHEN {when} AND"
        f" EXISTS (SELECT 1 FROM users WHERE user_id = {row}.user_id) BEGIN"
        f" UPDATE users SET version = version + 1, updated = {_NOW},"
        f" last_{shape.name} = max(last_{shape.name}, {row}.id)"
        f" WHERE user_id = {row}.user_id;"
        f" {log_sql('update', row + '.user_id', fields)}; END"
    )


def rows_sql(shape: Shape) -> list[str]:
    """The table of a kind of rows below a user, and the triggers on it.

    Our own writes set `stamp` to the user's new version, so that the triggers leave
    them alone; another program's leave it as it was.
    """
    declared = "".join(f" {f.column} TEXT NOT NULL DEFAULT ''," for f in shape.columns)
    return [
        f"CREATE TABLE user_{shape.name} (user_id INTEGER NOT NULL,"
        f" id INTEGER NOT NULL,{declared} stamp INTEGER NOT NULL DEFAULT 0,"
        " PRIMARY KEY (user_id, id)) WITHOUT ROWID",
        row_trigger(shape, "INSERT", "NEW", "NEW.stamp = 0"),
        row_trigger(shape, "UPDATE", "NEW", "NEW.stamp = OLD.stamp"),
        row_trigger(shape, "DELETE", "OLD", "OLD.stamp >= 0"),
    ]


#: Each step takes the schema one version further; PRAGMA user_version counts them.
#: Version 0 is the first application's, whose own INSERT goes on working.
MIGRATIONS = (
    (
        "CREATE TABLE IF NOT EXISTS users (user_id INTEGER PRIMARY KEY AUTOINCREMENT,"
        " user_name TEXT NOT NULL, user_mail TEXT NOT NULL)",
        "ALTER TABLE users ADD COLUMN version INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE users ADD COLUMN created TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE users ADD COLUMN updated TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE users ADD COLUMN name_fold TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE users ADD COLUMN mail_fold TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE users ADD COLUMN last_phone INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE users ADD COLUMN last_address INTEGER NOT NULL DEFAULT 0",
        f"UPDATE users SET version = 1, created = {_NOW}, updated = {_NOW},"
        " name_fold = fold(CAST(user_name AS BLOB)),"
        " mail_fold = fold(CAST(user_mail AS BLOB))",
        *(
            f"CREATE INDEX users_by_{name} ON users ({column})"
            for name, column in SORT_INDEXES
        ),
        "CREATE TABLE changes (seq INTEGER PRIMARY KEY, at TEXT NOT NULL, actor TEXT,"
        ' op TEXT NOT NULL, "user" INTEGER NOT NULL, fields TEXT NOT NULL)',
        "CREATE TABLE retries (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE,"
        " at INTEGER NOT NULL,"
        " digest BLOB NOT NULL, status INTEGER NOT NULL, headers TEXT NOT NULL,"
        " body BLOB NOT NULL)",
        "CREATE INDEX retries_by_at ON retries (at)",
        # the last version of each id that was deleted (of id 0: the highest of all that
        # were left out, as the table is bounded), so that no ETag ever comes twice
        "CREATE TABLE graves (user_id INTEGER PRIMARY KEY, version INTEGER NOT NULL)",
        "CREATE TABLE tokens (name TEXT PRIMARY KEY, digest BLOB NOT NULL UNIQUE,"
        " role TEXT NOT NULL, created TEXT NOT NULL, used TEXT NOT NULL DEFAULT '')",
        *rows_sql(PHONE),
        *rows_sql(ADDRESS),
        # INSERT OR REPLACE deletes without a word to the trigger on DELETE
        "CREATE TRIGGER users_replace BEFORE INSERT ON users WHEN NEW.version = 0 BEGIN"
        " INSERT OR REPLACE INTO graves SELECT user_id, version FROM users"
        " WHERE user_id = NEW.user_id; END",
        "CREATE TRIGGER users_delete AFTER DELETE ON users BEGIN"
        " DELETE FROM user_phone WHERE user_id = OLD.user_id;"
        " DELETE FROM user_address WHERE user_id = OLD.user_id;"
        " INSERT OR REPLACE INTO graves VALUES (OLD.user_id, OLD.version); "
        + log_sql("delete", "OLD.user_id", "'[]'")
        + f" WHERE NOT EXISTS (SELECT 1 FROM changes WHERE seq = {_LAST_SEQ}"
        " AND op = 'delete' AND user = OLD.user_id); END",
        f"PRAGMA application_id = {APPLICATION_ID}",
    ),
    (),  # users_update, as it was before it stood below
    (
        # before, INSERT OR REPLACE and UPDATE OR REPLACE gave ids of phones and ETags
        # twice, and who lost a phone to another user was not told
        *(
            row_trigger(
                shape,
                "UPDATE OF user_id",
                "OLD",
                "NEW.stamp = OLD.stamp AND NEW.user_id <> OLD.user_id",
            )
            for shape in SHAPES.values()
        ),
        "DROP TRIGGER IF EXISTS users_insert",
        "CREATE TRIGGER users_insert AFTER INSERT ON users WHEN NEW.version = 0 BEGIN"
        f" {log_sql('create', 'NEW.user_id', _BOTH)}; {_TAKE_UP}"
        f" UPDATE users SET created = updated WHERE user_id = NEW.user_id; END",
        # an upsert: of the statement's own OR IGNORE comes no other conflict's
        "CREATE TRIGGER users_move BEFORE UPDATE OF user_id ON users BEGIN"
        " INSERT INTO graves SELECT user_id, version FROM users WHERE user_id IN"
        " (OLD.user_id, NEW.user_id)"
        " ON CONFLICT (user_id) DO UPDATE SET version = excluded.version; UPDATE"
        " sqlite_sequence SET seq = max(seq, NEW.user_id) WHERE name = 'users'; END",
        "DROP TRIGGER IF EXISTS users_update",
        "CREATE TRIGGER users_update AFTER UPDATE OF user_id, user_name, user_mail"
        " ON users WHEN NEW.version = OLD.version BEGIN"
        " UPDATE user_phone SET user_id = NEW.user_id, stamp = stamp + 1"
        f"{_MOVED} AND user_id = OLD.user_id;"
        " UPDATE user_address SET user_id = NEW.user_id, stamp = stamp + 1"
        f"{_MOVED} AND user_id = OLD.user_id; {_TAKE_UP} "
        + log_sql("delete", "OLD.user_id", "'[]'" + _MOVED)
        + "; "
        + log_sql("create", "NEW.user_id", _BOTH + _MOVED)
        + "; "
        + log_sql(
            "update",
            "NEW.user_id",
            "'[' || substr("
            "CASE WHEN NEW.user_name <> OLD.user_name THEN ', \"name\"' ELSE '' END ||"
            " CASE WHEN NEW.user_mail <> OLD.user_mail THEN ', \"mail\"' ELSE '' END"
            ", 3) || ']' WHERE NEW.user_id = OLD.user_id",
        )
        + "; END",
    ),
    # before, another program's OR REPLACE held in our trigger, too, which under
    # unique_mail took a user who had the address away without a word
    tuple(
        f"CREATE TRIGGER users_{name}_taken BEFORE {event} ON users WHEN NEW.version ="
        f" {version} BEGIN SELECT RAISE(ABORT, 'UNIQUE constraint failed:"
        " users.mail_fold') FROM users JOIN sqlite_master ON name = 'users_unique_mail'"
        " WHERE mail_fold = lower(NEW.user_mail) AND mail_fold <> ''"
        f" AND user_id <> {row}.user_id; END"
        for name, event, version, row in (
            ("insert", "INSERT", "0", "NEW"),
            ("update", "UPDATE OF user_mail", "OLD.version", "OLD"),
        )
    ),
)


def object_sql(pairs: Iterable[tuple[str, str]]) -> str:
    """An SQL expression that is a JSON object of (member, SQL of its JSON text)."""
    parts = " || ', ' || ".join(f"""'"{name}": ' || {sql}""" for name, sql in pairs)
    return f"'{{' || {parts} || '}}'"


def text_sql(column: str) -> str:
    return f"json_quote(CAST({column} AS TEXT))"


def member_sql(field: Field) -> str:
    """The SQL of a member as JSON text."""
    if field.rows:
        shape = SHAPES[field.rows]
        row = object_sql((below.name, member_sql(below)) for below in shape.fields)
        return (
            f"coalesce((SELECT '[' || group_concat({row}, ', ' /*pg ORDER BY id*/)"
            f" || ']' FROM user_{shape.name} AS r WHERE r.user_id = users.user_id),"
            " '[]')"
        )
    if field.schema is ID:  # another program may write text there
        return f"CAST({field.column} AS bigint)"
    return text_sql(field.column)


def cell_sql(field: Field) -> str:
    """The SQL of a user's member as it stands in CSV; a list is JSON there."""
    return member_sql(field) if field.rows else f"CAST({field.column} AS TEXT)"


@functools.lru_cache(maxsize=256)
def view_sql(members: Names) -> str:
    """The SQL of a user as JSON text with just these members."""
    return object_sql((name, member_sql(USER.by_name[name])) for name in members)


@functools.lru_cache(maxsize=256)
def show_sql(members: Names) -> str:
    return f"SELECT {view_sql(members)}, version FROM users WHERE user_id = ?"


CHANGE = ("seq", "at", "actor", "op", "user", "fields")
INTO_CHANGES = 'changes (seq, at, actor, op, "user", fields)'
CHANGE_SQL = object_sql(
    (n, text_sql(n) if n in ("at", "actor", "op") else f'"{n}"') for n in CHANGE
)
NAMES_SQL = "SELECT name FROM sqlite_master"
TRIGGERS = tuple(re.findall(r"CREATE TRIGGER (\w+)", str(MIGRATIONS)))
#: the indexes of users, but those that SQLite makes for itself, and our triggers
ASIDE_SQL = (
    "SELECT type, name, sql FROM sqlite_master WHERE tbl_name = 'users'"
    f" AND (type = 'index' AND sql IS NOT NULL OR name IN {TRIGGERS})"
)
LASTS = tuple(f"last_{name}" for name in SHAPES)
LOGGED = tuple(field.name for field in USER.written)
REQUIRED = tuple(field.name for field in USER.written if field.required)
OPTIONAL = tuple(field.name for field in USER.written if not field.required)
#: columns of users, and by which names their values are known: what a write reads first
STORED = {"user_id": "id", "version": "version", **{name: name for name in LASTS}}
STORED.update({field.column: field.name for field in USER.columns})
STORED_SQL = f"SELECT {', '.join(STORED)} FROM users"
#: and what a new user has
ADDED = ("created", "updated", "name_fold", "mail_fold")
INSERTED = {**STORED, **{name: name for name in ADDED}}
INTO_USERS = f"users ({', '.join(INSERTED)})"
inserted_values = operator.itemgetter(*INSERTED.values())
BLANK: Item = {"version": 1, **dict.fromkeys(LASTS, 0)}
BLANK.update({field.name: "" for field in USER.columns})


class Query(NamedTuple):
    """Which users to read: filters, an order, and a place in it."""

    q: str | None = None
    name: str | None = None
    mail: str | None = None
    ids: Sequence[int] | None = None
    sort: str = "id"
    after: tuple[Any, int] | None = None
    limit: int | None = None

    def where(self) -> tuple[str, list[Any]]:
        """The filters as SQL, with the values to bind."""
        terms = ["TRUE"]
        values: list[Any] = []
        if self.q:
            terms.append("(instr(name_fold, ?) > 0 OR instr(mail_fold, ?) > 0)")
            values += [fold(self.q)] * 2
        if self.name is not None:
            terms.append("user_name IN (?, ?) AND name_fold IN (lower(?), lower(?), ?)")
            either = [self.name, unicodedata.normalize("NFC", self.name)]
            values += [*either, *either, fold(self.name)]
        if self.mail is not None:
            terms.append("mail_fold IN (?, lower(?))")
            values += [fold(self.mail), self.mail]
        if self.ids is not None:
            terms.append(f"user_id IN ({list_sql(self.ids)})")
        return " AND ".join(terms), values


def list_sql(ids: Iterable[int]) -> str:
    """What stands between the brackets of IN; as values there could be too many."""
    return ", ".join(map(str, ids)) or "NULL"


def sort_key(sort: str) -> str:
    return f"users.{SORTS[sort.lstrip('-')]}"


def direction(sort: str) -> tuple[str, str]:
    """What compares with later keys, and what orders by them."""
    return ("<", " DESC") if sort[0] == "-" else (">", "")


def beyond(sort: str, after: tuple[Any, int] | None) -> list[tuple[str, list[Any]]]:
    """What comes after a place, as SQL with its values: first the users of the same
    key, as SQLite would look at all of them where both are compared at once."""
    if after is None:
        return [("", [])]
    key, (more, _), value = sort_key(sort), direction(sort), exact_bytes(after[0])
    if key == "users.user_id":
        return [(f" AND {key} {more} ?", [value])]
    return [
        (f" AND {key} = CAST(? AS TEXT) AND user_id {more} ?", [value, after[1]]),
        (f" AND {key} {more} CAST(? AS TEXT)", [value]),
    ]


def place_of(row: Sequence[Any]) -> tuple[Any, int]:
    """Where a row of a page stands in its order: the key, and the id."""
    key, id = row[-2:]
    return key.decode(errors="surrogateescape") if type(key) is bytes else key, id


def exact_bytes(key: Any) -> Any:
    """A sort key as it is bound: text that another program damaged as its bytes."""
    damaged = SURROGATE.search(str(key))
    return key.encode(errors="surrogateescape") if damaged else key


class Transaction:
    """What one request (or one call) writes together; begun by its first write.

    All that is written while it is entered is kept together, or not at all. One that is
    entered within another is a part of it, as each is of a group: taken back alone
    where it fails, and kept where the whole is.
    """

    now: str  # when it began
    connection: sqlite3.Connection | None = None
    outer: Transaction | None = None  # in which it was entered
    whole: Transaction | None = None  # of which it is a part: that, or the group
    patient = True  # it waits for others that write
    logged = 0  # rows of the log that are still to be written
    frees = False  # it deletes, for which there is always room
    fault: Exception | None = None  # why nothing that was written is kept

    def __init__(
        self, store: Database, actor: str | None = None, keep: bool = True
    ) -> None:
        self.store, self.actor, self.keep = store, actor, keep
        #: what was done to which users, with which members of them
        self.log: list[tuple[Transaction, str, Sequence[int], Iterable[str]]] = []
        self.changes: list[Item] = []  # to announce

    def __enter__(self) -> Transaction:
        scope = self.store._scope
        if outer := scope.transaction:
            self.outer = self.whole = outer
            self.actor = self.actor or outer.actor
        scope.transaction = self
        return self

    def __exit__(self, kind: Any, fault: BaseException | None, trace: Any) -> None:
        scope, outer = self.store._scope, self.outer
        if scope.transaction is not self:  # of coroutines, which would mix their writes
            outer, late = None, RuntimeError("transactions of one thread overlap")
            fault = fault or late
        try:
            self.store._end(self, self.keep and fault is None)
        except DATABASE_FAULTS as late:
            fault = fault or late  # what went wrong first is told
        finally:
            scope.transaction = outer
        if isinstance(fault, DATABASE_FAULTS):
            raise database_problem(fault) from fault
        if fault:
            raise fault
        if self.keep:
            self.announce()

    def writer(self) -> sqlite3.Connection:
        """The connection to write with; the first time, the transaction begins here,
        which for a part is a savepoint."""
        if self.connection is None:
            self.connection = self.store._begin(self)
        return self.connection

    def begun(self) -> sqlite3.Connection | None:
        """The connection that what has been written so far is read with."""
        return self.connection or (self.outer.begun() if self.outer else None)

    def note(self, op: str, users: Sequence[int], fields: Iterable[str]) -> None:
        """Log that users were written, each with a JSON list of its members that were.
        The rows themselves are written just before the commit."""
        self.log.append((self, op, users, fields))
        self.logged += len(users)
        if len(self.log) > 2 * self.store.keep_changes and not self.store.on_change:
            del self.log[: -self.store.keep_changes]

    def take(self, part: Transaction) -> None:
        """Take over what a part has logged."""
        self.log += part.log
        self.logged += part.logged
        self.changes += part.changes
        part.changes = []

    def announce(self) -> None:
        """Tell the store's `on_change` of what was kept."""
        changes, self.changes = self.changes, []
        for change in changes:  # there are none without on_change
            try:
                self.store.on_change(change)  # type: ignore[misc]
            except Exception:  # the write is kept and must not seem to have failed
                traceback.print_exc()

    def rows(self, last: int) -> Iterator[tuple[Any, ...]]:
        """The rows that the log is to keep, `last` being the newest one's seq; all, if
        they are to be told."""
        end = last - sum(len(users) for _, _, users, _ in self.log)
        for tx, op, users, fields in self.log:
            first, end = end + 1, end + len(users)
            if self.store.on_change or end > last - self.store.keep_changes:
                for seq, user, names in zip(itertools.count(first), users, fields):
                    yield seq, tx.now, tx.actor, op, user, names


class Scope(threading.local):
    """The transaction that this thread is in, if it is in one."""

    transaction: Transaction | None = None


def refuse_shared_mail(db: sqlite3.Connection) -> None:
    """Raise Problem 409 where users share an address that is to be unique."""
    twice = db.execute(
        "SELECT group_concat(CAST(user_id AS TEXT), ', ') FROM users"
        " WHERE mail_fold <> ''"
        " GROUP BY mail_fold HAVING count(*) > 1 ORDER BY min(user_id) LIMIT 10"
    ).fetchall()
    if twice:
        ids = "; ".join(row[0] for row in twice)
        raise Problem(409, f"unique_mail: these users share a mail address: {ids}")


@contextlib.contextmanager
def whole_file(path: str, db: str) -> Iterator[str]:
    """The name of a file to write, which becomes `path` when it is whole, or never. The
    database that it comes from, its log or what is no file it does not replace: Problem
    409. It has the rights of the file that it replaces, if there is one, else the
    database's."""
    path, mode = os.path.realpath(path), 0o666
    if re.fullmatch(re.escape(os.path.realpath(db)) + "(-wal|-shm|-journal)?", path):
        raise Problem(409, f"{path}: is the database itself")
    if os.path.exists(path) and not os.path.isfile(path):
        raise Problem(409, f"{path}: is no file")
    for like in (db, path):
        with contextlib.suppress(OSError):
            mode = os.stat(like).st_mode & 0o666 | 0o600
    part = f"{path}.{os.getpid()}.{os.urandom(4).hex()}.part"  # nobody else's
    try:
        os.close(os.open(part, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, mode))
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(part)


class Disk:
    """The room that a database's file, and the log beside it, have to grow in."""

    low = False  # little is left: look at each write
    _short = 0.0  # when the log was last found to be so
    _identity: tuple[int, int] | None = None  # of the file that was opened

    def __init__(self, path: str) -> None:
        # as the folder may change that we are in
        self.given, self.in_file = os.path.abspath(path), is_file(path)
        # SQLite's own files stand beside that of which a link is another name
        self.path = os.path.realpath(path) if self.in_file else path

    @contextlib.contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        """Lock the file's folder (flock), or wait for it, for 5 s at most.

        SQLite does not wait where two programs make a file at once, or switch it to a
        write-ahead log, and what is half made looks like another's.
        """
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError, ImportError):
                import fcntl

                folder = os.open(os.path.dirname(self.path), os.O_RDONLY)
                stack.callback(os.close, folder)
                until = time.monotonic() + 5
                while self.in_file and time.monotonic() < until:
                    try:
                        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        time.sleep(0.002)
            yield

    def can_map(self) -> bool:
        """Whether files beside this one can be mapped as memory, without which nobody
        can open a database with a write-ahead log, though SQLite would make it one."""
        part = f"{self.path}.{os.getpid()}.{os.urandom(4).hex()}.part"
        mapped = True
        with contextlib.suppress(OSError), open(part, "xb+", 0) as file:
            file.write(b"-")
            mapped = False
            mmap.mmap(file.fileno(), 1).close()
            mapped = True
        with contextlib.suppress(OSError):
            os.remove(part)
        return mapped

    def stamp(self) -> list[tuple[str, int, int]]:
        """What differs once somebody has written to the file or beside it."""
        found = []
        for end in ("", "-wal", "-journal"):
            with contextlib.suppress(OSError):
                at = os.stat(self.path + end)
                found.append((end, at.st_size, at.st_mtime_ns))
        return found

    def room(self) -> int:
        """Bytes that the file may grow by, on the disk and by the process's limit,
        without those that are spared for the log and for deleting."""
        if not self.in_file or not hasattr(os, "statvfs"):
            return sys.maxsize
        import resource

        try:
            disk = os.statvfs(os.path.dirname(self.path))
            room, whole = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
            limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
            if limit != resource.RLIM_INFINITY:
                room = min(room, limit - os.path.getsize(self.path))
                whole = min(whole, limit)
        except OSError:  # not every file system tells; SQLite will
            return sys.maxsize
        return room - min(SPARE, whole // 3)

    def size(self) -> int:
        """The size of the database's file, which must be the one that was opened."""
        if not self.in_file:
            return 0
        try:
            found = os.stat(self.given)
        except OSError:
            raise busy("the database's file is gone", 5) from None
        if self._identity not in (None, (found.st_dev, found.st_ino)):
            raise busy("the database's file was replaced: start again", 60)
        self._identity = found.st_dev, found.st_ino
        return found.st_size

    def require_room(self, db: sqlite3.Connection, frees: bool) -> int:
        """How much room there is. Refuses new pages if a checkpoint would find no room
        for them: Problem 507.

        They stand in the log first, hence twice. What adds no page passes, so that
        deleting helps, and what it has freed can be used again.
        """
        size, room = self.size(), self.room()
        if self.in_file and not frees:
            ((pages,),) = db.execute("PRAGMA page_count")
            ((page_size,),) = db.execute("PRAGMA page_size")
            growth = pages * page_size - size
            if growth > 0 and room < 2 * growth:
                raise Problem(507, DISK_FULL, headers=[("Retry-After", "5")])
        return room

    def sizes(self) -> dict[str, int]:
        """Bytes of the database and its write-ahead log."""
        sizes = {}
        for name, end in (("database", ""), ("wal", "-wal")):
            with contextlib.suppress(OSError):
                sizes[name] = os.path.getsize(self.path + end)
        return sizes

    def make_room(self, db: sqlite3.Connection, room: int = 0) -> None:
        """Give back what the log takes, where little room is left (which is looked up
        unless there was plenty just now), or where the log, as processes write without
        a pause, is never all in the file, and would grow and grow."""
        if room < PLENTY:
            room = self.room()
        self.low = room < LOW
        now = time.monotonic()
        if room >= PLENTY and now < self._short + LOOK:
            return
        with contextlib.suppress(OSError, sqlite3.Error):  # there may be no log
            if os.stat(self.path + "-wal").st_size > min(LONG, max(room, 0) // 8):
                self.empty_log(db)
            else:
                self._short = now

    def empty_log(self, db: sqlite3.Connection) -> None:
        """Take the log into the file, and let nobody write until it is all there;
        unless a reader of an old state is in the way, who would be waited for."""
        ((_, pages, done),) = db.execute("PRAGMA wal_checkpoint")
        if pages - done < 4000:
            db.execute("PRAGMA busy_timeout = 300")
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            db.execute("PRAGMA busy_timeout = 0")


def run_when_free(db: sqlite3.Connection, sql: str, seconds: float) -> Any:
    """Run a statement, or wait for another program to end. SQLite's own waiting is to
    look again every 100 ms (without usleep, every second), which starves who waits for
    others that write without a pause; and for some locks it does not wait at all."""
    until = time.monotonic() + seconds
    while True:
        try:
            return db.execute(sql)
        except sqlite3.OperationalError as fault:
            if "locked" not in str(fault) or time.monotonic() >= until:
                raise
        time.sleep(0.001)


class Database:
    """A SQLite file: how it is opened, read, written to and kept.

    `on_change` is called with each change (a dict as /api/changes shows it) once it is
    committed. `unique_mail` may be None: as the database has it. Methods raise Problem
    and may be called from any thread.
    """

    migrations: tuple[Names, ...] = MIGRATIONS
    many = MANY
    mode, read_only, wal = "mode=rwc", False, True
    patience = 5.0  # seconds that a write waits for another to end
    impatient = 0  # the thread that is never to wait for the database
    _group: sqlite3.Connection | None = None
    #: the group is begun, open for parts, committed; the last maybe by another thread
    _group_thread, _group_state = 0, ""
    _highest: int | None = None  # id; while the database is ours to write

    def __init__(
        self,
        path: str | os.PathLike[str] = "users.db",
        unique_mail: bool | None = False,
        keep_changes: int = 100_000,
        on_change: Callable[[Item], None] | None = None,
    ) -> None:
        self.disk = Disk(path := os.fspath(path))
        self.path, self.unique_mail = self.disk.path, unique_mail
        self.keep_changes, self.on_change = keep_changes, on_change
        self.memory = path == ":memory:"
        self._lock = threading.Lock()  # of the one connection to what is in memory
        self._writing = threading.Lock()  # by one thread at a time
        self._scope = Scope()
        self._pool: list[sqlite3.Connection] = []  # that nobody uses
        self._made: set[sqlite3.Connection] = set()  # and those that are in use
        self._left: list[Any] = []  # of the parent process, after a fork
        if hasattr(os, "register_at_fork") and not self.memory:
            self._survive_forks()
        self._soon: set[tuple[str, tuple[Any, ...]]] = set()
        with self.disk.one_at_a_time():
            self._open_first()

    # Opening

    def _open_first(self) -> None:
        if self.disk.in_file:
            self._refuse_foreign()
        try:
            self._made.add(db := self._prepare())
            self._pool.append(db)
        except DATABASE_FAULTS as fault:
            raise database_problem(fault) from fault
        if not self.memory:
            self.disk.size()
            self.close()
            self.mode = self.mode.replace("rwc", "rw")  # never anew, when it has gone

    def _refuse_foreign(self) -> None:
        """Refuse what is no database of ours, before anything could change it.

        SQLite reads it even here: to close a descriptor of our own would drop the
        locks that other connections of this process hold on the file (POSIX). But it
        takes no lock, and what it finds amid another's writing counts for nothing.
        """
        until = time.monotonic() + self.patience
        while True:
            before = self.disk.stamp()
            try:
                return self._refuse_now()
            except Problem:
                if before == self.disk.stamp() or time.monotonic() > until:
                    raise

    def _refuse_now(self) -> None:
        try:
            size = os.stat(self.path).st_size
        except FileNotFoundError:
            return
        except OSError as fault:
            raise Problem(503, f"cannot be read: {reason(fault)}") from None
        beside = [e for e in ("-wal", "-journal") if os.path.exists(self.path + e)]
        if not os.path.isfile(self.path):  # a folder, a device, a pipe
            raise Problem(503, "is no file")
        if 0 < size < 512:  # of one byte SQLite would make a new one
            raise Problem(503, "is no SQLite database: too small")
        if size:
            self._examine_safely(beside, size)
        elif beside and not (beside == ["-journal"] and self._is_first_journal()):
            detail = f"empty, with a {beside[0]} file beside it"
            raise Problem(503, f"is no SQLite database: {detail}")

    def _is_first_journal(self) -> bool:
        """Whether the journal is of the very first write, which was cut off: it says
        that the file had no pages."""
        with contextlib.suppress(OSError), open(f"{self.path}-journal", "rb") as file:
            return not any(file.read(20)[16:])
        return False

    def _examine_safely(self, beside: list[str], size: int) -> None:
        try:
            self._examine(beside, size)
        except DATABASE_FAULTS as fault:
            text = str(fault)
            if "unable to open" in text or "readonly" in text:
                return  # on read-only media: _prepare finds out
            if "-journal" in beside and "malformed" in text:
                return  # a writer has to roll back first
            if "not a database" in text:
                raise Problem(503, "is no SQLite database") from None
            raise database_problem(fault) from fault

    def _examine(self, beside: list[str], size: int) -> None:
        """Raise Problem 503 where the file is another's, newer, or damaged."""
        # without a -wal the file alone is whole, and nothing need be made beside it
        mode = "mode=ro" if "-wal" in beside else "immutable=1"
        closely = "-journal" not in beside and size < QUICK_CHECK
        with contextlib.closing(self._open(mode)) as db:
            ((application,),) = db.execute("PRAGMA application_id")
            ((version,),) = db.execute("PRAGMA user_version")
            made = db.execute(f"{NAMES_SQL} WHERE type = 'table'")
            tables = {name for (name,) in made if not name.startswith("sqlite_stat")}
            columns = [row[1] for row in db.execute("PRAGMA table_info(users)")]
            check = "PRAGMA quick_check(1)" if closely else "SELECT 'ok'"
            whole = db.execute(check).fetchall() == [("ok",)]
        ours = application == APPLICATION_ID
        empty = tables <= {"sqlite_sequence"} and not columns
        original = tables == {"users", "sqlite_sequence"} and columns == ORIGINAL
        if not ours and (application or version or not (empty or original)):
            raise Problem(503, "is another program's database")
        if not 0 <= version <= len(MIGRATIONS):
            raise Problem(503, "was written by a newer userapi")
        if not whole or ours and "changes" not in tables:
            raise Problem(503, "is damaged")

    def _open(self, mode: str) -> sqlite3.Connection:
        import pathlib

        where = ":memory:"
        if not self.memory:
            where = f"{pathlib.Path(self.path).as_uri()}?{mode}"
        db = sqlite3.connect(  # whose timeout is SQLite's busy_timeout in seconds
            where, timeout=5, uri=True, isolation_level=None, check_same_thread=False
        )
        db.text_factory = functools.partial(str, encoding="utf-8", errors="replace")
        return db

    def _connect(self) -> sqlite3.Connection:
        """A connection with the pragmas that DESIGN has reasons for."""
        db = self._open(self.mode)
        if not self.read_only:
            mode = "PRAGMA journal_mode"
            (journal,) = run_when_free(db, mode, self.patience).fetchone()
            if journal not in ("wal", "memory") and self.disk.can_map():
                mode += " = WAL"
                (journal,) = run_when_free(db, mode, self.patience).fetchone()
            self.wal = journal == "wal"
            # FULL, and where there is no such log, the folder as well
            db.execute("PRAGMA synchronous = EXTRA")
            db.execute("PRAGMA journal_size_limit = 16777216")
            db.execute("PRAGMA wal_autocheckpoint = 4000")  # pages: the same 16 MiB
            # Nothing that a savepoint takes back may have reached the log: SQLite's
            # recovery ends there (seen in 3.34 to 3.46), and loses all that follows.
            db.execute("PRAGMA cache_spill = OFF")
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA trusted_schema = OFF")
        try:
            db.execute("SELECT json_quote('')")
        except sqlite3.OperationalError:  # SQLite before 3.38 may be without JSON
            db.create_function("json_quote", 1, lambda v: to_json(v).decode())
        # of bytes, as what older programs stored need not be UTF-8
        db.create_function("fold", 1, lambda b: fold(b.decode("utf-8", "replace")))
        return db

    def _prepare(self) -> sqlite3.Connection:
        """The first connection: it finds out what can be done, and migrates."""
        for self.mode in ("mode=rwc", "mode=ro", "immutable=1"):
            self.read_only = self.mode != "mode=rwc"
            try:
                db = self._connect()
                if not self.read_only:
                    self._migrate(db)
                else:
                    db.execute("SELECT version FROM users LIMIT 1").fetchall()
                break
            except sqlite3.OperationalError as fault:
                unwritable = ("readonly", "unable to open", "no such column")
                known = any(part in str(fault) for part in unwritable)
                if self.mode == "immutable=1" or not self.disk.in_file or not known:
                    raise
        return db

    def _migrate(self, db: sqlite3.Connection) -> None:
        """Take the schema to what this version wants, in one transaction."""
        if not any(self._wanted(db)):
            return
        db.execute(BEGIN)
        try:
            while statements := list(self._wanted(db)):
                for statement in statements:
                    db.execute(statement)
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    def _wanted(self, db: sqlite3.Connection) -> Iterator[str]:
        """The statements that the database lacks: migrations, the columns of fields
        that are new in the tables above, the index of unique_mail."""
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if not 0 <= version <= len(MIGRATIONS):
            detail = "its table users is of another program or of a newer userapi"
            raise Problem(503, detail)
        if version < len(MIGRATIONS):
            yield from itertools.chain(*self.migrations[version:])
            yield f"PRAGMA user_version = {len(MIGRATIONS)}"
            return
        for table, shape in TABLES.items():
            found = db.execute(f"SELECT * FROM {table} LIMIT 0")
            there = {column[0] for column in found.description}
            for field in shape.columns:
                if field.column not in there:
                    declared = f"{field.column} TEXT NOT NULL DEFAULT ''"
                    yield f"ALTER TABLE {table} ADD COLUMN {declared}"
        unique = ("users_unique_mail",) in db.execute(NAMES_SQL).fetchall()
        if self.unique_mail is None:
            self.unique_mail = unique
        if self.unique_mail and not unique:
            refuse_shared_mail(db)
            yield (
                "CREATE UNIQUE INDEX users_unique_mail ON users (mail_fold)"
                " WHERE mail_fold <> ''"
            )
        elif unique and not self.unique_mail:
            yield "DROP INDEX users_unique_mail"

    def expect_many(self) -> None:
        """Until the store is closed, write one long transaction in little memory; what
        comes into a new database straight into its file, not into the write-ahead log
        first, and make its indexes last."""
        new = not self.rows("SELECT 1 FROM users LIMIT 1")
        db = self._take()
        with contextlib.suppress(sqlite3.Error):  # another program has it open
            db.execute("PRAGMA cache_spill = ON")  # no part of it is taken back
            if new:
                self.many = BATCH  # nobody reads it before it is filled
                db.execute("PRAGMA journal_mode = DELETE")
        self._give(db)

    def close(self) -> None:
        """Close the connections that no thread uses. A file's store stays usable; what
        is in memory has gone."""
        while self._pool:
            self._made.discard(db := self._pool.pop())
            db.close()

    # A fork, which what is in memory is copied by, and no connection may cross

    def _survive_forks(self) -> None:
        hook = functools.partial(functools.partial, at_fork, weakref.ref(self))
        os.register_at_fork(
            before=hook(Database._before_fork),
            after_in_parent=hook(Database._after_fork_in_parent),
            after_in_child=hook(Database._after_fork_in_child),
        )

    def _before_fork(self) -> None:
        """Let other threads end what they do, and close what is open, or the
        child's SQLite believes that it holds the locks of the parent, which it does not
        inherit; another process would then delete the log that it writes to."""
        mine = {self.begun()} - {None}
        self._held = not mine and self._writing.acquire(timeout=self.patience)
        until = time.monotonic() + self.patience
        while self._made.difference(self._pool, mine) and time.monotonic() < until:
            time.sleep(0.001)
        if not self.disk.in_file:
            return
        self.close()
        if self._group and self._is_in_turn() and not self._group_state:
            self._group.close()
            self._group = None

    def _after_fork_in_parent(self) -> None:
        if self._held:
            self._writing.release()
        if self._is_in_turn() and not self._group:
            self.open_group()

    def _after_fork_in_child(self) -> None:
        """Leave alone what is open all the same, as to close it would drop the parent's
        locks, and what the parent writes."""
        self._left.extend((self._made, self._group))
        self._pool, self._made, self._writing = [], set(), threading.Lock()
        self._group, self._group_thread = None, 0
        own = self._scope.transaction
        while own:
            own.connection, own.log, own.logged, own.changes = None, [], 0, []
            own.whole, own = own.outer, own.outer

    # Connections and transactions

    def _take(self) -> sqlite3.Connection:
        if self.memory and not self._lock.acquire(timeout=self.patience):
            raise busy("another thread has been writing for too long")
        try:
            return self._pool.pop()
        except IndexError:
            self._made.add(db := self._connect())
            return db

    def _give(self, db: sqlite3.Connection) -> None:
        self._pool.append(db)
        if self.memory:
            self._lock.release()

    def begun(self) -> sqlite3.Connection | None:
        """The connection of this thread's transaction, once it has written."""
        own = self._scope.transaction
        return own.begun() if own else None

    def rows(self, sql: str, values: Sequence[Any] = ()) -> Rows:
        """What a SELECT finds, as this thread's transaction sees it."""
        own = self._scope.transaction  # begun() is not called for each read
        try:
            if own and (begun := own.begun()):
                return begun.execute(sql, values).fetchall()
            db = self._take()
            try:
                return db.execute(sql, values).fetchall()
            finally:
                self._give(db)
        except DATABASE_FAULTS as fault:
            raise database_problem(fault) from fault

    def transaction(self, actor: str | None = None, keep: bool = True) -> Transaction:
        """What is to be written together, by `actor`: `with store.transaction(): …`.

        `keep=False` does everything and takes it back (a dry run).
        """
        return Transaction(self, actor, keep)

    def current(self) -> Transaction:
        """The transaction that this thread is in."""
        assert self._scope.transaction
        return self._scope.transaction

    def _begin(self, tx: Transaction) -> sqlite3.Connection:
        if self.read_only:
            raise busy("the database is read-only", 60)
        state = self._group_state if self._is_in_turn() else ""
        if whole := tx.whole or (self._turn if state == "open" else None):
            return self._begin_part(tx, whole)
        # where the group waits to begin, it waits for us as well
        patience = self.patience if tx.patient and state != "begun" else 0
        if not self._writing.acquire(timeout=patience):
            raise busy("another thread has been writing for too long")
        db = None
        try:
            db = self._take()
            db.execute("PRAGMA busy_timeout = 0")
            run_when_free(db, BEGIN, patience)
        except BaseException:
            self._end_turn(db)
            raise
        self._highest, tx.now = None, utc_now()
        return db

    def _begin_part(self, tx: Transaction, whole: Transaction) -> sqlite3.Connection:
        tx.whole = whole
        whole.frees |= tx.frees
        db = whole.writer()
        if whole.fault:
            raise whole.fault
        if tx.frees or tx.outer:
            try:  # this part writes its log itself: behind what came before, as to take
                # it back must not take that back as well
                self._write_log(db, whole)
            except DATABASE_FAULTS as fault:
                whole.fault = fault
                raise
        tx.now = whole.now
        db.execute("SAVEPOINT part")
        return db

    def _end(self, tx: Transaction, keep: bool) -> None:
        """Commit or roll back; of a part only its savepoint."""
        db, tx.connection = tx.connection, None
        if db is None:
            return
        if tx.whole:
            self._end_part(db, tx, tx.whole, keep)
            return
        try:
            self._commit(db, tx, keep)
        finally:
            self._end_turn(db)

    def _end_turn(self, db: sqlite3.Connection | None) -> None:
        if db:
            db.execute("PRAGMA busy_timeout = 5000")
            self._give(db)
        self._writing.release()

    def _end_part(
        self, db: sqlite3.Connection, tx: Transaction, whole: Transaction, keep: bool
    ) -> None:
        if not db.in_transaction:  # SQLite rolled all of it back
            whole.fault = Problem(507, DISK_FULL)
            return
        kept = False
        try:
            if keep and self.disk.low:
                self.disk.require_room(db, tx.frees)
            kept = keep
        finally:
            if kept:
                whole.take(tx)
            else:
                db.execute("ROLLBACK TO part")
                self._highest = None
            db.execute("RELEASE part")

    def _commit(self, db: sqlite3.Connection, tx: Transaction, keep: bool) -> None:
        """Commit if there is room for it or it frees some, else roll back and raise."""
        room = 0
        try:
            if tx.fault:
                raise tx.fault
            if keep and db.in_transaction:
                self._write_log(db, tx)
                room = self.disk.require_room(db, tx.frees)
                # without a write-ahead log, readers are waited for
                run_when_free(db, "COMMIT", self.patience)
        except sqlite3.Error:
            self._overwrite_log(db)
            raise
        finally:
            if db.in_transaction:
                db.execute("ROLLBACK")
            self.disk.make_room(db, room)

    def _overwrite_log(self, db: sqlite3.Connection) -> None:
        """Write over what a commit whose sync failed has left in the write-ahead log:
        it may stand there whole, and would count if the process was killed now."""
        with contextlib.suppress(sqlite3.Error):
            if db.in_transaction:
                db.execute("ROLLBACK")
            db.execute("PRAGMA synchronous = OFF")
            db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        db.execute("PRAGMA synchronous = EXTRA")

    def _insert_rows(self, db: Any, into: str, rows: list[tuple[Any, ...]]) -> None:
        """Insert rows, many with one statement: that saves a third of the time."""
        for first in range(0, len(rows), ROWS_AT_ONCE):
            some = rows[first : first + ROWS_AT_ONCE]
            db.execute(insert_sql(into, len(some), len(some[0])), sum(some, ()))

    def _write_log(self, db: sqlite3.Connection, tx: Transaction) -> None:
        """Write what was logged, bound the log, and note the changes to announce."""
        if not tx.logged:
            return
        ((last,),) = db.execute(f"SELECT {_LAST_SEQ}")
        last += tx.logged
        for rows in batches(tx.rows(last)):
            self._insert_rows(db, INTO_CHANGES, rows)
            if self.on_change:
                tx.changes += map(show_change, rows)
        if last % max(1, self.keep_changes // 1000) < tx.logged:  # not each time
            bound = (last - self.keep_changes,)
            db.execute("DELETE FROM changes WHERE seq <= ?", bound)
        if last % (GRAVES // 10) < tx.logged:
            self._bound_graves(db)
        tx.log, tx.logged = [], 0

    def _bound_graves(self, db: sqlite3.Connection) -> None:
        """Keep the graves of the highest ids; of all others the highest version."""
        lower = (
            "FROM graves WHERE user_id <= (SELECT user_id FROM graves"
            " ORDER BY user_id DESC LIMIT 1 OFFSET ?)"
        )
        db.execute(
            "INSERT INTO graves (user_id, version) SELECT 0, v FROM"
            f" (SELECT max(version) AS v {lower}) AS g WHERE v IS NOT NULL"
            " ON CONFLICT (user_id) DO UPDATE SET version = excluded.version",
            (GRAVES,),
        )
        db.execute(f"DELETE {lower} AND user_id > 0", (GRAVES,))

    def sizes(self) -> dict[str, int]:
        """Bytes of the database and its write-ahead log."""
        return self.disk.sizes()

    # Writes that are committed together (the Server's turn)

    def _is_in_turn(self) -> bool:
        """Whether this is the thread whose writes are grouped."""
        return self._group_thread == threading.get_ident()

    def open_group(self) -> None:
        """From now on the transactions of this thread are parts of the group that is
        under way, if one is."""
        self._group = self._group or self._connect()
        self._group.execute("PRAGMA busy_timeout = 0")
        self._group_thread = threading.get_ident()
        self.disk.make_room(self._group)

    def begin_group(self, wait: bool = False) -> bool:
        """Begin a group; False where that is not possible now, as another program holds
        the lock. With `wait`, wait for it."""
        assert self._group is not None
        self._turn, self._group_state = Transaction(self), "begun"
        self._turn.connection = self._group
        try:
            if not self.read_only:
                run_when_free(self._group, BEGIN, self.patience if wait else 0)
                self._highest, self._turn.now = None, utc_now()
        except DATABASE_FAULTS as fault:
            if not wait:
                return False
            self._turn.fault = fault
        self._group_state = "open"
        self._write_soon(self._turn)
        return True

    def commit_group(self) -> None:
        """Commit what the group wrote; raises Problem where none of it is kept."""
        db = self._group
        assert db is not None
        self._group_state = "committed"
        try:
            self._turn.frees = self.disk.low  # then each request was asked
            self._commit(db, self._turn, keep=True)
        except DATABASE_FAULTS as fault:
            raise database_problem(fault) from fault
        finally:
            self._group_state = ""

    def announce_group(self) -> None:
        """Tell `on_change` of what the last group kept."""
        self._turn.announce()

    def close_group(self) -> None:
        """Checkpoint, so that the file alone is whole, and close."""
        if self._group:
            with contextlib.suppress(sqlite3.Error):
                self._group.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._group.close()
        self._group, self._group_thread = None, 0
        self.close()

    def write_soon(self, sql: str, values: tuple[Any, ...]) -> None:
        """Write this with the next group, or at once where writes are not grouped."""
        self._soon.add((sql, values))
        if not self._is_in_turn():
            self._write_soon()

    def _write_soon(self, whole: Transaction | None = None) -> None:
        """Write it, as a part of the whole; that it fails is nobody's affair."""
        with contextlib.suppress(Problem, sqlite3.Error), self.transaction() as tx:
            tx.whole, tx.patient = tx.whole or whole, False
            while self._soon:
                tx.writer().execute(*self._soon.pop())

    @property
    def waiting(self) -> bool:
        """Whether there is something to write with the next group."""
        return bool(self._soon)


class Store(Database):
    """The users in a database, which is a file, `:memory:`, or PostgreSQL's URL."""

    _has_tokens = False, 0.0  # and until when that is sure

    def __new__(cls, path: Any = "users.db", *_: Any, **__: Any) -> Store:
        remote = str(path).startswith(POSTGRESQL)
        return super().__new__(PostgresStore if remote else cls)

    # Reading users

    def show_user(self, id: int, members: Names) -> tuple[str, int]:
        """A user as JSON text, and its version. Raises Problem 404."""
        found = self.rows(show_sql(members), (id,))
        if not found:
            raise no_user(id)
        return found[0][0], found[0][1]

    def get_user(self, id: int, view: str = "v2") -> Item:
        """A user as a dict. Raises Problem 404."""
        if not isinstance(id, int) or abs(id) > MAX_ID:
            raise no_user(id)
        return dict(json.loads(self.show_user(id, VIEWS[view])[0]))

    def pages(self, select: str, query: Query) -> Iterator[Rows]:
        """The users that the query finds: one page with its limit, else page by page.

        `select` is SQL; a row is what it gives, and then the user's place.
        """
        after, size = query.after, query.limit or PAGE_ROWS
        while True:
            page: Rows = []
            for where, values in beyond(query.sort, after):
                if len(page) < size:
                    rest = query._replace(limit=size - len(page))
                    page += self._page(select, rest, where, values)
            yield page
            if query.limit or len(page) < size:
                return
            after = place_of(page[-1])

    def _page(self, select: str, query: Query, where: str, values: list[Any]) -> Rows:
        """At most `limit` users whose place is `where`; as SQL, with its values."""
        key, (_, down) = sort_key(query.sort), direction(query.sort)
        wanted, filters = query.where()
        shown = key if key == "users.user_id" else f"CAST({key} AS BLOB)"
        sql = (
            f"SELECT {select}, {shown}, user_id FROM users WHERE {wanted}{where}"
            f" ORDER BY {key}{down}, users.user_id{down} LIMIT {query.limit}"
        )
        return self.rows(sql, [*filters, *values])

    def find_users(self, view: str = "v2", **query: Any) -> Iterator[Item]:
        """Users as dicts; keywords are those of Query: q, name, mail, ids, sort, …

        Raises Problem 400 where one of them cannot be.
        """
        try:
            found = Query(**query)
            if found.ids is not None:  # they may come once only
                found = found._replace(ids=[*map(operator.index, found.ids)])
            "".join(text or "" for text in found[:3]).encode()  # texts, and whole ones
            well = (
                found.sort.removeprefix("-") in SORTS
                and (found.after is None or len(found.after) == 2)
                and (found.limit is None or 0 < operator.index(found.limit) < 2**63)
                and all(abs(id) < 2**63 for id in found.ids or ())
            )
        except (TypeError, AttributeError, UnicodeError):
            well = False
        if not well:
            raise Problem(400, f"users are not found by {query}")
        pages = self.pages(view_sql(VIEWS[view]), found)
        return (json.loads(row[0]) for page in pages for row in page)

    def count_users(self, query: Query | None = None) -> int:
        """How many users there are, or the query's filters find."""
        where, values = (query or Query()).where()
        return int(self.rows(f"SELECT count(*) FROM users WHERE {where}", values)[0][0])

    # Writing users

    def create_users(
        self, items: Iterable[Item], view: str = "v2", actor: str | None = None
    ) -> list[Item]:
        """Create all of the items or none; the users as they are now.

        Raises Problem 422 with every invalid member, or 409 where an id is taken.
        """
        return self._save(items, "create", view, actor)

    def replace_users(
        self, items: Iterable[Item], view: str = "v2", actor: str | None = None
    ) -> list[Item]:
        """Replace the users that the items name by `id`; else as create_users (404)."""
        return self._save(items, "replace", view, actor)

    def merge_users(
        self, items: Iterable[Item], view: str = "v2", actor: str | None = None
    ) -> list[Item]:
        """Merge the items into the users that they name (RFC 7396)."""
        return self._save(items, "merge", view, actor)

    def _save(
        self, items: Iterable[Item], how: str, view: str, actor: str | None
    ) -> list[Item]:
        entries = ((Place(f"#/items/{n}"), item) for n, item in enumerate(items))
        with self.transaction(actor):
            # two that are changed may swap their addresses, however far apart
            parts = batches(entries) if how == "create" else [entries]
            saved = Saving(self, how, VIEWS[view]).save(parts)
            return [self.get_user(id, view) for id in saved.ids]

    def _rows_by_id(self, tx: Transaction, ids: Sequence[int]) -> dict[int, Item]:
        """The users of these ids as they are stored, read within the transaction."""
        found: dict[int, Item] = {}
        for some in batches(iter(ids)):
            tx.writer()
            marks = ", ".join("?" * len(some))
            rows = self.rows(f"{STORED_SQL} WHERE user_id IN ({marks})", some)
            found.update((row[0], dict(zip(STORED.values(), row))) for row in rows)
        return found

    def _insert(
        self, tx: Transaction, new: list[Entry], highest: int
    ) -> array.array[int]:
        """Insert users; their ids. Raises Problem 409 where no id is left."""
        _, items = zip(*new)
        self._highest = number_rows(items, highest, "id")
        ids, rows, fields = array.array("q"), [], []
        owners: dict[str, list[Item]] = {}
        for item in items:
            row = {**BLANK, "created": tx.now, "updated": tx.now, **item}
            row["name_fold"], row["mail_fold"] = fold(row["name"]), fold(row["mail"])
            for name in SHAPES:
                if name in item:
                    row[f"last_{name}"] = number_rows(item[name], 0)
                    owners.setdefault(name, []).append(item)
            ids.append(item["id"])
            rows.append(inserted_values(row))
            fields.append(list_json(written_members(item)))
        self._insert_rows(tx.writer(), INTO_USERS, rows)
        for name, found in owners.items():
            below = [(item["id"], value) for item in found for value in item[name]]
            self._put_rows(tx, SHAPES[name], below, 1)
        tx.note("create", ids, fields)
        return ids

    def _insert_columns(
        self, tx: Transaction, ids: Sequence[int], users: Columns
    ) -> None:
        """Insert users that are all of the three; the ids are new, the last highest."""
        into = (
            "users (user_id, user_name, user_mail, name_fold, mail_fold, created,"
            " updated, version)"
        )
        folds = fold_all(users.names), fold_all(users.mails)
        same = map(itertools.repeat, (tx.now, tx.now, 1))
        rows = list(zip(ids, users.names, users.mails, *folds, *same))
        self._insert_rows(tx.writer(), into, rows)
        self._highest = ids[-1]
        fields = itertools.repeat(list_json(("name", "mail")))
        tx.note("create", array.array("q", ids), fields)

    def _highest_id(self, db: sqlite3.Connection) -> int:
        """The highest id that there has been, looked up once a transaction or group."""
        if self._highest is None:  # another program may give more than SQLite counted
            ((self._highest,),) = db.execute(
                "SELECT coalesce(max(n), 0) FROM (SELECT seq AS n FROM sqlite_sequence"
                " WHERE name = 'users' UNION ALL SELECT max(user_id) FROM users) AS ids"
            )
        return self._highest

    def _outlive(self, items: list[Item]) -> None:
        """Let new users go on from the versions that deleted ones of their ids had."""
        last = {0: 0}  # that of all whose own is not remembered
        for ids in batches(item["id"] for item in items):
            marks = ", ".join("?" * len(ids))
            sql = f"SELECT user_id, version FROM graves WHERE user_id IN (0, {marks})"
            last.update(self.rows(sql, ids))
        for item in items:
            before = last.get(item["id"], last[0])
            item["version"] = max(item.get("version", 1), before + 1)

    def _update(
        self, tx: Transaction, row: Item, item: Item, check: Check = None
    ) -> int:
        """Write what the item holds into the user of the row; its new version."""
        there = {n: self._load_rows(SHAPES[n], row["id"]) for n in SHAPES if n in item}
        before = {**row, **{name: [*rows.values()] for name, rows in there.items()}}
        sets = {f.column: item[f.name] for f in USER.columns if f.name in item}
        texts = {"name": row["name"], **item}  # another program's was folded otherwise
        for name in ("name", "mail"):
            if isinstance(text := texts.get(name), str):
                sets[f"{name}_fold"] = fold(text)
        for name in there:
            last = f"last_{name}"
            sets[last] = number_rows(item[name], max([row[last], *there[name]]))
            item[name].sort(key=operator.itemgetter("id"))  # as `before` is
        fields = tuple(n for n in LOGGED if n in item and before[n] != item[n])
        version = self._raise_version(tx, row, sets, fields, check)
        for name, rows in there.items():
            now = {value["id"]: value for value in item[name]}
            differ = [n for n in {**rows, **now} if rows.get(n) != now.get(n)]
            if differ:  # PostgreSQL knows no IN ()
                self._drop_rows(tx, SHAPES[name], row["id"], differ)
                below = [(row["id"], now[n]) for n in differ if n in now]
                self._put_rows(tx, SHAPES[name], below, version)
        return version

    def _raise_version(
        self, tx: Transaction, row: Item, sets: Item, fields: Names, check: Check
    ) -> int:
        """Update a user, if it still has the row's version, and log it."""
        if check:
            check(row["version"])
        columns = "".join(f"{column} = ?, " for column in sets)
        sql = (
            f"UPDATE users SET {columns}version = version + 1, updated = ?"
            " WHERE user_id = ? AND version = ?"
        )
        values = [*sets.values(), tx.now, row["id"], row["version"]]
        if tx.writer().execute(sql, values).rowcount != 1:
            raise Problem(412, "someone was faster; read the user again")
        tx.note("update", [row["id"]], [list_json(fields)])
        return int(row["version"]) + 1

    def delete_users(
        self, ids: Iterable[int], check: Check = None, actor: str | None = None
    ) -> None:
        """Delete these users with all that is below them, or none: Problem 404."""
        ids = list(ids)
        refuse_twice(ids)
        with self.transaction(actor) as tx:
            tx.frees = True
            there = self._rows_by_id(tx, [id for id in ids if abs(id) <= MAX_ID])
            refuse_missing("user", ids, there)
            for id in ids:
                if check:
                    check(there[id]["version"])
                tx.note("delete", [id], ["[]"])
                self._write_log(tx.writer(), tx)  # the trigger looks for it
                tx.writer().execute("DELETE FROM users WHERE user_id = ?", (id,))

    # Phones and addresses

    def show_rows(self, user: int, shape: Shape) -> tuple[str, int]:
        """A user's phones or addresses as a JSON list, and the user's version."""
        sql = f"SELECT {member_sql(USER.by_name[shape.name])}, version FROM users"
        found = self.rows(f"{sql} WHERE user_id = ?", (user,))
        if not found:
            raise no_user(user)
        return found[0][0], found[0][1]

    def _load_rows(self, shape: Shape, user: int) -> dict[int, Item]:
        sql = f"SELECT {', '.join(shape.names)} FROM user_{shape.name}"
        found = self.rows(f"{sql} WHERE user_id = ? ORDER BY id", (user,))
        return {row[0]: dict(zip(shape.names, row)) for row in found}

    def _put_rows(
        self,
        tx: Transaction,
        shape: Shape,
        below: Iterable[tuple[int, Item]],
        stamp: int,
    ) -> None:
        """Insert rows below users."""
        into = f"user_{shape.name} (user_id, stamp, {', '.join(shape.names)})"
        rows = [(user, stamp, *shape.values(row)) for user, row in below]
        self._insert_rows(tx.writer(), into, rows)

    def _drop_rows(
        self, tx: Transaction, shape: Shape, user: int, numbers: Sequence[int]
    ) -> None:
        """Delete some of a user's rows; `stamp` tells the trigger it is us."""
        table, db = f"user_{shape.name}", tx.writer()
        for some in batches(iter(numbers)):
            where = f"user_id = ? AND id IN ({', '.join('?' * len(some))})"
            db.execute(f"UPDATE {table} SET stamp = -1 WHERE {where}", (user, *some))
            db.execute(f"DELETE FROM {table} WHERE {where}", (user, *some))

    def save_rows(
        self,
        user: int,
        shape: Shape,
        entries: Sequence[tuple[Place, Any]],
        how: str,
        number: int | None = None,
        check: Check = None,
    ) -> tuple[list[int], int]:
        """Create, replace or merge (`how`) rows below a user, all of them or none.

        `number` is the URI's. Gives their numbers and the user's new version.
        """
        with self.transaction() as tx:
            row = self._rows_by_id(tx, [user]).get(user)
            there = self._load_rows(shape, user)
            rows, faults = check_rows(shape, there, entries, how, number)
            faults.raise_worst(422)
            if row is None:
                raise no_user(user)
            refuse_missing(shape.name, [number] if number else [], there)
            faults.raise_worst()
            if how == "create" and len(there) + len(rows) > MAX_ROWS:
                raise Problem(409, f"{MAX_ROWS} are the most that a user has")
            # another program's may stand there that nobody has counted
            number_rows(rows, max([row[f"last_{shape.name}"], *there]))
            there.update((value["id"], value) for value in rows)
            version = self._update(tx, row, {shape.name: [*there.values()]}, check)
        return [value["id"] for value in rows], version

    def delete_rows(
        self, user: int, shape: Shape, numbers: Sequence[int], check: Check = None
    ) -> None:
        """Delete these rows below a user, or none of them: Problem 404."""
        refuse_twice(numbers)
        with self.transaction() as tx:
            tx.frees = True
            row = self._rows_by_id(tx, [user]).get(user)
            if row is None:
                raise no_user(user)
            there = self._load_rows(shape, user)
            refuse_missing(shape.name, numbers, there)
            left = [value for n, value in there.items() if n not in numbers]
            self._update(tx, row, {shape.name: left}, check)

    # The log, retries, tokens

    def changes(self, since: int | None, limit: int) -> list[tuple[str, int]]:
        """Rows of the log after `since` as JSON text, with their seq.

        Raises Problem 410 where rows after `since` are no longer there.
        """
        sql = f"SELECT {CHANGE_SQL}, seq FROM changes WHERE seq > ?"
        rows = self.rows(f"{sql} ORDER BY seq LIMIT ?", (since or 0, limit))
        if since is not None and rows and rows[0][1] > since + 1:
            detail = f"the log of changes begins at {rows[0][1]}"
            raise Problem(410, detail, oldest=rows[0][1])
        return rows

    def last_seq(self) -> int:
        """The seq of the newest change; 0 where there is none yet."""
        return int(self.rows(f"SELECT {_LAST_SEQ}")[0][0])

    def find_retry(self, key: bytes) -> tuple[bytes, int, str, bytes] | None:
        """What was answered to an Idempotency-Key within the last day."""
        self.current().writer()
        sql = "SELECT digest, status, headers, body FROM retries WHERE at > ?"
        found = self.rows(f"{sql} AND key = ?", (int(time.time()) - DAY, key))
        return found[0] if found else None

    def keep_retry(
        self, key: bytes, digest: bytes, status: int, headers: Headers, body: bytes
    ) -> None:
        """Keep an answer for a day, with what it answers, while there is room.

        An id is how many bytes there have been up to its end.
        """
        db, head = self.current().writer(), json.dumps(headers)
        now = int(time.time())
        db.execute("DELETE FROM retries WHERE at <= ?", (now - DAY,))
        ((last,),) = db.execute("SELECT coalesce(max(id), 0) FROM retries")
        last += len(head) + len(body) + 200  # with the key, the digest and the rest
        db.execute(
            "INSERT INTO retries (id, key, at, digest, status, headers, body)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (last, key, now, digest, status, head, body),
        )
        db.execute("DELETE FROM retries WHERE id <= ?", (last - RETRIES,))

    def has_tokens(self) -> bool:
        """Whether any named token is in the database (looked up once in 2 ms)."""
        known, until = self._has_tokens
        now = time.monotonic()
        if until < now and threading.get_ident() != self.impatient:
            known = bool(self.rows("SELECT 1 FROM tokens LIMIT 1"))
            self._has_tokens = known, now + 0.002
        return known

    def find_token(self, digest: bytes) -> tuple[str, str, str] | None:
        """Name, role and day of last use of the token with this SHA-256."""
        sql = "SELECT name, role, used FROM tokens WHERE digest = ?"
        found = self.rows(sql, (digest,))
        return found[0] if found else None

    def touch_token(self, name: str, day: str) -> None:
        """Note the day of a token's last use."""
        self.write_soon("UPDATE tokens SET used = ? WHERE name = ?", (day, name))

    def add_token(self, name: str, role: str) -> str:
        """Make a token of 256 random bits; only its SHA-256 is stored. Problem 409."""
        import secrets

        token = secrets.token_urlsafe(32)
        with self.transaction() as tx:
            db = tx.writer()
            if db.execute("SELECT 1 FROM tokens WHERE name = ?", (name,)).fetchone():
                raise Problem(409, f"there is a token {name} already")
            db.execute(
                "INSERT INTO tokens (name, digest, role, created) VALUES (?, ?, ?, ?)",
                (name, hashlib.sha256(token.encode()).digest(), role, tx.now),
            )
        self._has_tokens = True, 0.0
        return token

    def tokens(self) -> list[tuple[str, str, str, str]]:
        """Name, role, created and day of last use of each named token."""
        sql = "SELECT name, role, created, used FROM tokens ORDER BY name"
        return self.rows(sql)

    def revoke_token(self, name: str) -> None:
        """Take a token back, in force at once in every process. Problem 404."""
        with self.transaction() as tx:
            sql = "DELETE FROM tokens WHERE name = ?"
            if tx.writer().execute(sql, (name,)).rowcount != 1:
                raise Problem(404, f"there is no token {name}")
        self._has_tokens = False, 0.0

    # Keeping

    def check(self) -> list[str]:
        """The faults of the database; an empty list where it is whole."""
        found = [row[0] for row in self.rows("PRAGMA integrity_check(20)")]
        there = {name for (name,) in self.rows(NAMES_SQL)}
        made = re.findall(
            r"""["']CREATE (?:TABLE|INDEX|TRIGGER|RULE)(?: IF NOT EXISTS)? (\w+)""",
            str(self.migrations),
        )
        found += [f"{name} is missing" for name in made if name not in there]
        for name in SHAPES:
            sql = f"SELECT count(*) FROM user_{name} WHERE user_id NOT IN"
            ((orphans,),) = self.rows(f"{sql} (SELECT user_id FROM users)")
            if orphans:
                found.append(f"{orphans} rows of user_{name} have no user")
        return [fault for fault in found if fault != "ok"]

    def backup(self, path: str, progress: Callable[[int, int], None]) -> None:
        """A consistent copy under `path`, whole or not at all, while others write."""
        for beside in ("-wal", "-journal"):
            if os.path.exists(os.path.realpath(path) + beside):
                raise Problem(409, f"{path}: a {beside} file stands beside it")
        source = self._take()
        try:
            with whole_file(path, self.path) as part, contextlib.ExitStack() as stack:
                target = sqlite3.connect(part, isolation_level=None)
                stack.callback(target.close)
                if self.wal:  # one snapshot: else each write would begin it anew
                    source.execute("BEGIN")
                    source.execute("SELECT 1 FROM users LIMIT 1").fetchall()
                source.backup(
                    target,
                    pages=1000,
                    progress=lambda _, left, total: progress(total - left, total),
                    sleep=0.01,
                )
                target.execute("PRAGMA journal_mode = DELETE")
        except DATABASE_FAULTS as fault:
            detail = database_problem(fault).detail
            raise Problem(507, f"{path}: the copy failed: {detail}") from fault
        except OSError as fault:
            raise Problem(507, f"{path}: {reason(fault)}") from None
        finally:
            if source.in_transaction:
                source.execute("ROLLBACK")
            self._give(source)


def at_fork(store: weakref.ref[Database], do: Callable[[Database], None]) -> None:
    if (found := store()) is not None:
        do(found)


Change = tuple[Place, Item, Item]  # where an item stands, its row, and itself
COUNTED = {"created": 0, "replaced": 0, "skipped": 0}  # items of an import


class Saving:
    """How users are saved: all of the items of one transaction, or none of them.

    It is made and used within that transaction. `how` is create, replace or merge; `id`
    the URI's; `check` sees the version of a user before it is changed; `conflict` says
    what is done about an id that is taken; `keeps` names what an import keeps of new
    users; it tells fewer faults. `ids` are those written, `counts` what became of all.
    """

    def __init__(
        self,
        store: Store,
        how: str,
        members: Names,
        *,
        id: int | None = None,
        check: Check = None,
        conflict: str = "fail",
        keeps: Names = (),
    ) -> None:
        self.store, self.tx, self.id, self.check = store, store.current(), id, check
        self.creates = how == "create"
        self.conflict = conflict if self.creates else "replace"
        self.faults = Faults(IMPORT_FAULTS) if keeps else Faults()
        self.ids, self.counts = array.array("q"), COUNTED.copy()
        self.seen: dict[int, int] = {}  # ids by their bits: a million take little room
        self.checker = find_checker(USER, members, how, keeps, id is not None)
        self.before = MAX_ID  # the highest id: all above it are those of new users
        self.aside: list[str] | None = None

    def save(self, batches: Iterable[Iterable[Entry]]) -> Saving:
        """Save what stands in the batches. Raises Problem with all that is wrong."""
        for batch in batches:
            if self.aside is None and self.counts["created"] >= self.store.many:
                self.aside = self.set_aside()
            if not (isinstance(batch, Columns) and self.create_columns(batch)):
                self.save_batch(batch)
        if self.id is not None and self.faults.statuses == {404}:
            raise no_user(self.id)
        self.faults.raise_worst()
        for statement in self.aside or ():
            self.tx.writer().execute(statement)
        return self

    def set_aside(self) -> list[str]:
        """Do without the indexes and triggers of users while many are created, where
        there were few before; to make the indexes at the end is far quicker. Gives the
        statements that make them again."""
        if self.store.unique_mail or self.store.count_users() >= 2 * MANY:
            return []
        made = self.store.rows(ASIDE_SQL)
        for kind, name, _ in made:
            self.tx.writer().execute(f"DROP {kind} {name}")
        return [statement for _, _, statement in made]

    def highest(self) -> int:
        """The highest id that there has been; noted, as long as no user is created."""
        found = self.store._highest_id(self.tx.writer())
        if not self.counts["created"]:
            self.before = found
        return found

    def create_columns(self, users: Columns) -> bool:
        """Create plain users if their ids are new and rise; whether it was done."""
        highest = self.highest()
        ids = users.ids or range(highest + 1, highest + 1 + len(users))
        rising = highest < ids[0] and all(map(operator.lt, ids, ids[1:]))
        well = rising and ids[-1] <= MAX_ID and not self.faults.total
        if self.store.unique_mail or not well:
            return False
        self.store._insert_columns(self.tx, ids, users)
        self.counts["created"] += len(users)
        return True

    def save_batch(self, batch: Iterable[Entry]) -> None:
        new, changed = self.sort(self.check_items(batch))
        if self.store.unique_mail:
            self.refuse_taken_mail(new, changed)
        if not self.faults.total:
            self.write(new, changed)

    def check_items(self, batch: Iterable[Entry]) -> list[Entry]:
        """The items as they are stored, without those whose id stood before."""
        check, faults, id = self.checker.check, self.faults, self.id or 0
        items = []
        for place, sent in batch:
            item = check(place, sent, faults, id)
            if "id" in item and not self.stands_once(item["id"]):
                faults.add(place, "id", "stands twice")
            else:
                items.append((place, item))
        if self.id is not None:  # of one user, what it holds is told first
            faults.raise_worst()
        return items

    def stands_once(self, id: int) -> bool:
        """Whether no earlier item had this id."""
        bit, before = 1 << (id & 1023), self.seen.get(id >> 10, 0)
        self.seen[id >> 10] = before | bit
        return not before & bit

    def find_rows(self, items: list[Entry]) -> dict[int, Item]:
        """The users that the items name, as they are stored."""
        named = [item for _, item in items if "id" in item]
        if self.creates:
            highest = self.highest()
            named = [item for item in named if item["id"] <= highest]
        there = self.store._rows_by_id(self.tx, [item["id"] for item in named])
        if self.creates and len(there) < len(named):
            self.store._outlive([item for item in named if item["id"] not in there])
        return there

    def sort(self, items: list[Entry]) -> tuple[list[Entry], list[Change]]:
        """The items that are new, and those that change a row, with that row."""
        new: list[Entry] = []
        changed: list[Change] = []
        there = self.find_rows(items) if self.seen else {}
        for place, item in items:
            row = there.get(item.get("id", 0))
            if row is None and self.creates:
                new.append((place, item))
            elif row is None:
                if "id" in item:  # else it is told as missing
                    self.faults.add(place, "id", "is nobody's", 404)
            elif row["id"] > self.before:
                self.faults.add(place, "id", "stands twice")
            elif self.conflict == "fail":
                self.faults.add(place, "id", "is taken", 409)
            elif self.conflict == "skip":
                self.counts["skipped"] += 1
            else:
                if self.check:
                    self.check(row["version"])
                changed.append((place, row, item))
        return new, changed

    def write(self, new: list[Entry], changed: list[Change]) -> None:
        if new:
            self.ids += self.store._insert(self.tx, new, self.highest())
        for _, row, item in changed:
            self.store._update(self.tx, row, item)
            self.ids.append(row["id"])
        self.counts["created"] += len(new)
        self.counts["replaced"] += len(changed)

    def refuse_taken_mail(self, new: list[Entry], changed: list[Change]) -> None:
        """Under `unique_mail`: 409 for each address that another user has or gets.

        The addresses of the users that are written are free for one another, so that
        two may swap theirs.
        """
        db, taken = self.tx.writer(), set()
        for _, row, item in changed:
            if "mail" in item:
                sql = "UPDATE users SET mail_fold = '' WHERE user_id = ?"
                db.execute(sql, (row["id"],))
        for place, item in new + [(place, item) for place, _, item in changed]:
            mail = fold(item.get("mail", ""))
            sql = "SELECT 1 FROM users WHERE mail_fold = ?"
            if mail and (mail in taken or db.execute(sql, (mail,)).fetchone()):
                if self.conflict == "skip":
                    new.remove((place, item))
                    self.counts["skipped"] += 1
                else:
                    self.faults.add(place, "mail", "is taken", 409)
            taken.add(mail)


@functools.lru_cache(maxsize=256)
def insert_sql(into: str, rows: int, width: int) -> str:
    """The statement that inserts so many rows of so many values."""
    marks = f"({', '.join('?' * width)})"
    return f"INSERT INTO {into} VALUES {', '.join([marks] * rows)}"


def written_members(item: Item) -> Names:
    """The members of a new user that the log names."""
    names = REQUIRED
    for name in OPTIONAL:
        if item.get(name):
            names += (name,)
    return names


@functools.lru_cache(maxsize=256)
def list_json(names: Names) -> str:
    return to_json(names).decode()


def show_change(row: Sequence[Any]) -> Item:
    """A row of the log as /api/changes shows it."""
    return {**dict(zip(CHANGE, row)), "fields": json.loads(row[-1])}


def batches(entries: Iterator[Any]) -> Iterator[list[Any]]:
    while batch := list(itertools.islice(entries, BATCH)):
        yield batch


def number_rows(rows: Iterable[Item], last: int, what: str = "number") -> int:
    """Give each row that has no id the next one; the last that was given out."""
    for row in rows:
        last = max(last, row.get("id", 0))
    for row in rows:
        if "id" not in row:
            last = row["id"] = last + 1
            if last > MAX_ID:
                raise Problem(409, f"there is no {what} left")
    return last


def check_rows(
    shape: Shape,
    there: dict[int, Item],
    entries: Sequence[tuple[Place, Any]],
    how: str,
    number: int | None,
) -> tuple[list[Item], Faults]:
    """The rows to be written, given those that are there, and what is wrong."""
    checker = find_checker(shape, shape.names, how, named=number is not None)
    faults, rows, seen = Faults(), [], set[int]()
    for place, item in entries:
        row = checker.check(place, item, faults, number or 0)
        found = row.get("id")
        if found in seen:
            faults.add(place, "id", "stands twice")
        elif how == "create" and found in there:
            faults.add(place, "id", "is taken", 409)
        elif how != "create" and found and found not in there and number is None:
            faults.add(place, "id", "does not exist", 404)
        elif how == "merge" and found in there:
            row = {**there[found], **row}
            checker.require_one(place, row, faults)
        rows.append(row)
        if found:
            seen.add(found)
    return rows, faults


def no_user(id: int) -> Problem:
    return Problem(404, f"there is no user {id}")


def refuse_twice(ids: Sequence[int]) -> None:
    twice = sorted(id for id, n in collections.Counter(ids).items() if n > 1)
    errors = [{"parameter": "id", "detail": f"{id} stands twice"} for id in twice]
    if errors:
        raise Problem(422, "an id stands twice", errors)


def refuse_missing(kind: str, ids: Iterable[int], there: Iterable[int]) -> None:
    """Raise Problem 404 where not all of these ids are there."""
    details = [f"there is no {kind} {id}" for id in ids if id not in there]
    errors = [{"parameter": "id", "detail": detail} for detail in details]
    if errors:
        raise Problem(404, ", ".join(details[:3]), errors)


# What PostgreSQL does otherwise

#: from SQLite's words (patterns) to PostgreSQL's; `/*pg …*/` is for the latter alone.
#: To write takes a lock: one at a time, and nobody who stands still for long.
DIALECT = (
    (BEGIN, "SET TRANSACTION READ WRITE; SET LOCAL lock_timeout = '5s';"
        " SET LOCAL idle_in_transaction_session_timeout = '30s'; SELECT"
        f" pg_advisory_xact_lock({APPLICATION_ID}, hashtext(current_schema())); BEGIN"),
    ("^COMMIT$", "SELECT 1; COMMIT"),  # the first of which fails after a fault
    (r"^PRAGMA user_version$", "SELECT coalesce(max(coalesce(substring(obj_description("
        "oid, 'pg_class'), '^userapi ([0-9]+)$')::int, -1)), 0) FROM pg_class WHERE"
        " relname = 'users' AND relnamespace = current_schema()::regnamespace"),
    (r"^PRAGMA user_version = (\d+)", r"COMMENT ON TABLE users IS 'userapi \1'"),
    (r"^PRAGMA integrity_check.*", "SELECT 'ok'"),
    (r"(?s)^(PRAGMA|(CREATE|DROP) TRIGGER|UPDATE users SET version = 1,).*", ""),
    (r"^DELETE FROM users .*", r"WITH u AS (\g<0> RETURNING user_id, version),"
        " p AS (DELETE FROM user_phone AS p USING u WHERE p.user_id = u.user_id),"
        " a AS (DELETE FROM user_address AS a USING u WHERE a.user_id = u.user_id)"
        " INSERT INTO graves SELECT * FROM u"
        " ON CONFLICT (user_id) DO UPDATE SET version = excluded.version"),
    (r"seq( AS n FROM) sqlite_sequence WHERE name = 'users'", r"max(user_id)\1 graves"),
    (r"^(CREATE INDEX users_by_\w+ ON users \(\w+)\)", r"\1, user_id)"),
    (r" AUTOINCREMENT| WITHOUT ROWID", ""),
    (r"(?<! AS) INTEGER\b", " bigint"),
    (r"(?<! AS) TEXT\b", ' text COLLATE "C"'),
    (r"(?<! AS) BLOB\b", " bytea"),
    (r"CAST\((users\.\w+) AS BLOB\)", r"\1"),
    (r"/\*pg (.*?)\*/", r"\1"),
    (r"group_concat\(", "string_agg("),
    (r"json_quote\((.*?\))\)", r"coalesce(to_json(\1), 'null')"),
    (r"instr\((\w+), \?\) > 0",
        r"\1 LIKE '%' || regexp_replace(?, '([\\\\%_])', '\\\\\\1', 'g') || '%'"),
)  # fmt: skip
POSTGRES_MADE = (
    "CREATE OR REPLACE VIEW sqlite_master AS SELECT relname AS name,"
    " CASE WHEN relname LIKE 'users_by_%' THEN 'index' END AS type,"
    " 'users' AS tbl_name, pg_get_indexdef(oid) AS sql FROM pg_class"
    " WHERE relnamespace = current_schema()::regnamespace",
    # for q; without the right to make it, or the module, all users are looked at
    "DO $$ BEGIN CREATE EXTENSION IF NOT EXISTS pg_trgm;"
    " CREATE INDEX IF NOT EXISTS users_by_text ON users USING gin"
    " (name_fold gin_trgm_ops, mail_fold gin_trgm_ops);"
    " EXCEPTION WHEN OTHERS THEN NULL; END $$",
)
#: how long to wait for a server that does not answer, where the URL does not say
PATIENCE = "connect_timeout=3 tcp_user_timeout=10000 keepalives_idle=5"
PATIENCE += " keepalives_interval=2 keepalives_count=3"


@functools.lru_cache(maxsize=512)
def translate(sql: str) -> str:
    """The text in PostgreSQL's words, with psycopg's marks where values go."""
    for pattern, words in DIALECT:
        sql = re.sub(pattern, words, sql)
    return sql.replace("%", "%%").replace("?", "%s") if "?" in sql else sql


class Outage:
    """Until when nobody need ask for a server, as none has answered just now."""

    until = 0.0


class Postgres:
    """A connection to PostgreSQL with what the Store uses of one of sqlite3's.

    It is made when it is first used, and anew where it is found broken outside of a
    transaction. Where no server takes writes, it goes for a while to one that reads.
    """

    def __init__(self, url: str, outage: Outage | None = None) -> None:
        self.outage = outage or Outage()
        try:
            import psycopg  # type: ignore[import-not-found,unused-ignore]

            given = psycopg.conninfo.conninfo_to_dict(url)
        except ImportError:
            detail = "db: PostgreSQL needs psycopg: pip install 'psycopg[binary]'"
            raise SettingError(detail) from None
        except psycopg.ProgrammingError:  # whose text may hold the password
            raise SettingError("db: that is no URL of PostgreSQL") from None
        where = psycopg.conninfo.make_conninfo(PATIENCE, **given)
        self.connect = functools.partial(psycopg.connect, where, autocommit=True)
        self.driver, self.in_transaction, self.until = psycopg, False, 0.0
        self.raw: Any = None

    def close(self) -> None:
        if self.raw:
            self.raw.close()

    def open(self) -> None:
        """Connect, or fail at once while another connection finds out whether a server
        answers again."""
        self.close()
        self.until, outage = 0.0, self.outage
        if time.monotonic() < outage.until:
            raise self.driver.OperationalError
        outage.until = math.inf if outage.until else 0.0
        try:
            self.reach()
        except BaseException:
            outage.until = time.monotonic() + 1
            raise
        outage.until = 0.0

    def reach(self) -> None:
        try:
            self.raw, self.until = self.connect(), math.inf
        except self.driver.OperationalError:
            self.raw = self.connect(target_session_attrs="any")
            self.until = time.monotonic() + 10

    def execute(self, sql: str, values: Iterable[Any] = (), again: bool = True) -> Any:
        text, begins, inside = translate(sql), sql == BEGIN, self.in_transaction
        self.in_transaction = inside and sql not in ("COMMIT", "ROLLBACK")
        if not text or inside and sql == "ROLLBACK" and self.raw.closed:
            return None  # what is SQLite's alone, or has been done by breaking
        now = math.inf if begins else time.monotonic()
        if sql.startswith("SELECT"):  # nobody has it; else it is refused
            values = [v.replace("\0", "\1") if type(v) is str else v for v in values]
        try:
            if not inside and (now > self.until or self.raw.closed):
                self.open()
            run: Any = self.copy if sql.startswith("COPY") else self.raw.execute
            found = run(text, values or None)
            self.in_transaction |= begins
            return found
        except self.driver.OperationalError as lost:
            if again and not inside and self.until and self.raw.closed:
                return self.execute(sql, values, again=False)
            raise sqlite3.OperationalError(f"unable to open {lost.sqlstate}") from lost
        except self.driver.Error as fault:
            raise sqlite3.ProgrammingError(fault.sqlstate or str(fault)) from fault

    def copy(self, text: str, rows: Iterable[Any]) -> None:
        with self.raw.cursor().copy(text) as copy:
            for row in rows:
                copy.write_row(row)


class PostgresStore(Store):
    """Users in PostgreSQL, for any number of processes that write one at a time."""

    migrations = tuple((*map(translate, s), *POSTGRES_MADE) for s in MIGRATIONS)

    @functools.cached_property
    def outage(self) -> Outage:
        return Outage()

    def _connect(self) -> Any:
        return Postgres(self.path, self.outage)

    def _insert_rows(self, db: Any, into: str, rows: list[tuple[Any, ...]]) -> None:
        if len(rows) > 1:
            db.execute(f"COPY {into} FROM STDIN", rows)
        else:
            super()._insert_rows(db, into, rows)

    def backup(self, path: str, progress: Callable[[int, int], None]) -> None:
        raise Problem(503, "backup copies a file: for PostgreSQL there is pg_dump")

    def sizes(self) -> dict[str, int]:
        sql = "SELECT 'database', pg_database_size(current_database())"
        return dict(self.rows(sql))


# ── Operations ────────────────────────────────────────────────────────────────────

JSON, NDJSON, CSV = "application/json", "application/x-ndjson", "text/csv"
MERGE, EVENTS = "application/merge-patch+json", "text/event-stream"
PROMETHEUS, HTML = "text/plain; version=0.0.4", "text/html; charset=utf-8"
ALL = (JSON, CSV, NDJSON)
KEPT = ("created", "updated")  # that an import takes over for a new user
FORMATS = {"json": JSON, "csv": CSV, "ndjson": NDJSON}
CSV_MEMBERS = tuple(field.name for field in USER.fields if field.csv)
Body = Union[bytes, Iterator[bytes]]  # an iterator is streamed
Given = tuple[str, Headers, "Iterable[bytes]"]  # an answer as WSGI has it
Handler = Callable[["Call"], "Answer"]


def members_in(media: str, view: str) -> Names:
    """The members of a user in a format: CSV has its own, whatever the view."""
    return CSV_MEMBERS if media == CSV else VIEWS[view]


class Answer(NamedTuple):
    body: Body
    headers: Headers = ()
    media: str = JSON
    status: int = 200


# Parameters


def read_cursor(value: str) -> tuple[str, Any, int]:
    """The (sort, key, id) that a cursor out of `next` holds."""
    try:
        padded = value + "=" * (-len(value) % 4)
        sort, key, id = json.loads(base64.b64decode(padded, b"-_", validate=True))
        by_id = SORTS[sort.lstrip("-")] == "user_id"
        kinds = (int if by_id else str), int
        if (type(key), type(id)) != kinds or abs(id) >= 2**63 or by_id and key != id:
            raise ValueError
        exact_bytes(key)
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        raise ValueError("is no cursor out of next") from None
    return sort, key, id


def write_cursor(sort: str, row: Sequence[Any]) -> str:
    cursor = json.dumps([sort, *place_of(row)]).encode()
    return base64.urlsafe_b64encode(cursor).decode().rstrip("=")


DIGITS = re.compile("0*([1-9][0-9]{0,15}|0)")
TRUTHS = {"true": True, "1": True, "false": False, "0": False}


def read_value(value: str, schema: Item) -> Any:
    """What a parameter's text stands for, by its schema. Raises ValueError."""
    kind = schema.get("format") or schema["type"]
    if kind == "integer":
        least, most = schema["minimum"], schema["maximum"]
        digits = DIGITS.fullmatch(value)
        if not digits or not least <= (number := int(digits[1])) <= most:
            raise ValueError(f"is not a whole number from {least} to {most}")
        return number
    if kind == "boolean":
        if value not in TRUTHS:
            raise ValueError("is not true or false")
        return TRUTHS[value]
    if kind == "array":
        return [read_value(part, schema["items"]) for part in value.split(",")]
    if kind == "cursor":
        return read_cursor(value)
    if value not in schema.get("enum", (value,)):
        raise ValueError(f"is not one of {', '.join(schema['enum'])}")
    return value


def choice(*values: str, **more: str) -> Item:
    return {"type": "string", "enum": list(values), **more}


def schema_of_parameter(name: str, members: Names) -> Item:
    """The JSON Schema of a parameter where users have these members."""
    schema = PARAMS[name][0]
    return {**schema, "items": choice(*members)} if name == "fields" else schema


STRING, BOOL = {"type": "string"}, {"type": "boolean"}
ID_LIST = {"type": "array", "items": ID, "minItems": 1}
NAME_LIST = {"type": "array", "items": STRING, "minItems": 1}
LIMIT = {"type": "integer", "minimum": 1, "maximum": 1000}
SINCE = {"type": "integer", "minimum": 0, "maximum": MAX_ID}
SORT_NAMES = [*SORTS, *(f"-{name}" for name in SORTS)]
CONFLICT = choice("fail", "skip", "replace", default="fail")
#: query parameter: (its JSON Schema, by which it is read; its purpose)
PARAMS: dict[str, tuple[Item, str]] = {
    "limit": (LIMIT, "At most so many; the answer has `next`."),
    "after": ({"type": "string", "format": "cursor"}, "The cursor out of `next`."),
    "count": (BOOL, "Add `total`, the number of all that match."),
    "q": (STRING, "Part of a name or mail, ignoring case."),
    "name": (STRING, "Exactly this name."),
    "mail": (STRING, "This mail address, ignoring case."),
    "id": (ID_LIST, "These ids, by commas."),
    "sort": (choice(*SORT_NAMES), "The order; a leading - turns it round."),
    "fields": (NAME_LIST, "Only these members, by commas."),
    "format": (choice(*FORMATS), "The format; beats Accept."),
    "conflict": (CONFLICT, "What is done about an id that is taken."),
    "dry_run": (BOOL, "Do everything but keep it."),
    "since": (SINCE, "Only changes after this seq."),
}


# Operations and calls

SAFE = ("GET", "HEAD", "OPTIONS")
HOW = {"POST": "create", "PUT": "replace", "PATCH": "merge"}
METHODS = (*SAFE, *HOW, "DELETE")
#: the media types of bodies, where the operation does not say otherwise
TAKES = {"POST": (JSON,), "PUT": (JSON,), "PATCH": (JSON, MERGE)}


class Operation:
    """A method of a path: what runs it, and what the documents tell of it.

    It is about a `shape`; `takes` are the media types of its body, `answers` those of
    its answer. A method that is not SAFE `writes`, for which the role admin is needed;
    one that is `bulk` may write many.
    """

    def __init__(
        self,
        run: Handler,
        shape: Shape,
        name: str,
        method: str,
        path: str,
        summary: str,
        params: Names = (),
        answers: Names = (JSON,),
        takes: Names = (),
    ) -> None:
        self.run, self.shape, self.name, self.method = run, shape, name, method
        self.path, self.summary = path, summary
        self.takes, self.answers = takes or TAKES.get(method, ()), answers
        self.writes = method not in SAFE
        self.params = (*params, "dry_run") if self.writes else params
        self.bulk = self.writes and not path.endswith(":id>")
        self.status = 201 if method == "POST" else 200
        many = ("item", "items") if method == "POST" else ("items",)
        self.envelopes = many if self.bulk else ("item",)


OPERATIONS: list[Operation] = []  # what there is, in the order of the handlers
ROWS, ROW = "/user/<id:id>/{0.name}", "/user/<id:id>/{0.name}/<n:id>"


def operations(
    *described: tuple[Any, ...], shapes: Iterable[Shape] = (USER,)
) -> Callable[[Handler], Handler]:
    """Have a function run these operations, once for each shape. They are described by
    the further arguments of Operation, in whose texts {0} is the shape."""

    def register(run: Handler) -> Handler:
        for shape in shapes:
            for each in described:
                texts = [text.format(shape) for text in each[:4]]
                OPERATIONS.append(Operation(run, shape, *texts, *each[4:]))
        return run

    return register


#: what a call is about until its operation has been found
NOTHING = Operation(lambda call: Answer(b""), USER, "none", "OPTIONS", "", "")


class Call:
    """One request on its way through an operation: what has been found out about it."""

    actor: str | None = None
    role = "admin"
    prefix: str  # of all paths, where the application is mounted
    path: str  # below that
    view: str
    operation = NOTHING
    args: Mapping[str, int] = {}  # ids in the path
    params: Mapping[str, Any] = {}
    media = JSON  # of the answer
    takes = JSON  # how the body is read
    body = b""

    def __init__(self, app: UserAPI, environ: Environ) -> None:
        self.app, self.store, self.environ = app, app.store, environ
        self.method: str = environ["REQUEST_METHOD"]

    def header(self, name: str) -> str | None:
        return self.environ.get(f"HTTP_{name}")

    def fields(self) -> Names:
        """The members to show: those of `fields`, else the view's, or CSV's columns."""
        names = self.params.get("fields")
        if names is None:
            return members_in(self.media, self.view)
        return tuple(name for name in VIEWS[self.view] if name in names)

    def refuse_many(self, items: int) -> None:
        """Raise Problem 413 where these are more items than a request may hold."""
        most = self.app.settings.max_items
        if items > most:
            raise Problem(413, f"{most} items are the most that a request may hold")

    def precondition(self) -> Check:
        """The check of the user's version before it is written; None if many are.

        Raises Problem 400 where If-Match makes no sense, 428 where it is needed.
        """
        match = self.header("IF_MATCH")
        if "id" not in self.args:
            if match not in (None, "*"):
                detail = "goes with a write of one user"
                raise bad_request("header", ("If-Match", detail))
            return None
        wanted = self.app.settings.require_if_match and not self.operation.bulk
        if wanted and match is None:
            raise Problem(428, "say with If-Match which version you change")
        return self.check_version

    def check_version(self, version: int) -> None:
        """Raise Problem 412 where a write was not meant for this version of a user."""
        if self.client_has(f'"{version}"'):
            raise Problem(412, "the user is there, and in this version")

    def client_has(self, tag: str) -> bool:
        """Whether the client knows what has this tag (RFC 9110 §13). Raises Problem 412
        where it asked for what has another."""
        match, none = self.header("IF_MATCH"), self.header("IF_NONE_MATCH")
        if match is not None and not has_tag(match, tag, weak=False):
            raise Problem(412, "someone was faster; read the user again")
        return none is not None and has_tag(none, tag, weak=True)

    def tagged(self, body: Body, tag: str, headers: Headers = ()) -> Answer:
        """The answer to a GET; plain JSON has a tag, and is a 304 to who has it."""
        if self.media != JSON or "fields" in self.params:
            return Answer(body, headers, self.media)
        headers = [("ETag", tag), *headers]
        if self.client_has(tag):
            return Answer(b"", headers, status=304)
        return Answer(body, headers)


def has_tag(header: str, tag: str, weak: bool) -> bool:
    """Whether If-Match or If-None-Match names the entity tag (RFC 9110 §8.8.3); to
    compare weakly is to leave the W/ out of account."""
    if header.strip() == "*":
        return True
    tags = re.findall(r'(?:^|,)\s*(W/)?("[^"]*")', header)
    if weak:
        return tag.removeprefix("W/") in [opaque for _, opaque in tags]
    return ("", tag) in tags


def query_pairs(source: str) -> list[tuple[str, str]]:
    """The pairs of a query string. Raises Problem 400."""
    if not source.isascii():
        raise Problem(400, "the query is not percent-encoded")
    return parse_qsl(source, True, errors="surrogateescape")


def bad_request(kind: str, *faults: tuple[str, str]) -> Problem:
    """The 400 for these (name, detail) of a kind, which is parameter or header."""
    errors = [{kind: name, "detail": detail} for name, detail in faults]
    one, many = " ".join(faults[0]), f"{len(faults)} {kind}s are not valid"
    return Problem(400, many if faults[1:] else one, errors)


# Reading bodies


def unique_members(pairs: list[tuple[str, Any]]) -> Item:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member stands twice")
    return members


def read_number(kind: Callable[[str], float], literal: str) -> float:
    """A number; the json module would also take NaN, Infinity, and endless digits."""
    short = len(literal) <= 30 or sum(map(str.isdigit, literal)) <= 30
    value = kind(literal) if short else math.inf
    if not math.isfinite(value):
        raise ValueError("a number is too large, has too many digits, or is none")
    return value


read_float = functools.partial(read_number, float)
DECODER = json.JSONDecoder(
    object_pairs_hook=unique_members,
    parse_int=functools.partial(read_number, int),
    parse_float=read_float,
    parse_constant=read_float,
)
PARENTHESES = bytes.maketrans(b"[{]}", b"(())")
OTHERS = bytes(set(range(256)).difference(b'[{]}"'))


def load_json(data: bytes) -> Any:
    """Strict JSON (RFC 8259, I-JSON): one value in UTF-8, no duplicate members, no
    number past a double, no lone surrogates, at most 32 deep. Raises ValueError."""
    try:
        source = data.decode()
        if data.count(b"[") + data.count(b"{") > 32:
            refuse_depth(data)
        value = DECODER.decode(source)
        if "\\u" in source:
            to_json(value)
    except UnicodeEncodeError:
        raise ValueError("it holds a lone surrogate") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    return value


def refuse_depth(data: bytes) -> None:
    """Raise ValueError where brackets outside of strings are nested deeper than 32: to
    take away the innermost pairs takes one level."""
    left = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    left = left.translate(PARENTHESES, OTHERS).replace(b'""', b"")  # strings in one
    left = b"".join(left.split(b'"')[::2])
    for _ in range(32):
        left = left.replace(b"()", b"")
    if b"()" in left or left.count(b"(") > 32:
        raise ValueError("it is deeper than 32")


ENVELOPES = {"item": '{"item": {...}}', "items": '{"items": [{...}, ...]}'}


def read_items(call: Call) -> tuple[list[Entry], bool]:
    """The items of the body with their places, and whether it is the one `item`."""
    try:
        sent = load_json(call.body)
    except ValueError as fault:
        raise Problem(400, f"the body is not valid JSON: {fault}") from None
    wanted = call.operation.envelopes
    found = [*sent] if isinstance(sent, dict) else []
    if len(found) != 1 or found[0] not in wanted:
        raise bad_envelope(f"is not {' or '.join(ENVELOPES[name] for name in wanted)}")
    if found == ["item"]:
        return [(Place("#/item"), sent["item"])], True
    items = sent["items"]
    if not isinstance(items, list) or not items:
        raise bad_envelope("items is no list of at least one item")
    call.refuse_many(len(items))
    return [(Place(f"#/items/{n}"), item) for n, item in enumerate(items)], False


def bad_envelope(detail: str) -> Problem:
    return Problem(422, "the envelope is not valid", [Place("#").fault(None, detail)])


BOM = b"\xef\xbb\xbf"
MAX_LINE = 8 << 20  # bytes of an import's line, more than any user's


def read_lines(file: Any) -> Iterator[bytes]:
    """A file's lines, without a BOM; a line that is too long comes in pieces, which are
    not valid."""
    lines = iter(functools.partial(file.readline, MAX_LINE), b"")
    return itertools.chain([next(lines, b"").removeprefix(BOM)], lines)


def ndjson_entries(file: Any) -> Iterator[Entry]:
    """The items of NDJSON with their lines; a line that is no JSON is a fault."""
    for number, line in enumerate(read_lines(file), 1):
        if line.strip():
            try:
                yield Place("#", number), load_json(line.strip(b" \t\r\n"))
            except ValueError as fault:
                yield Place("#", number), BadLine(f"is not valid JSON: {fault}")


def read_csv(file: Any) -> Iterator[Columns | list[Entry]]:
    """The items of CSV (RFC 4180) with their physical lines; the header is line 1."""
    import csv

    reader = csv.reader(map(bytes.decode, read_lines(file)), strict=True)
    while (first := take_rows(reader, 1)) == [[]]:
        pass  # a blank line
    header = check_header(first)
    line = reader.line_num + 1
    while rows := take_rows(reader, BATCH):
        entries = csv_entries(line, header, rows)
        yield read_columns(header, rows, entries) or list(entries)
        line = reader.line_num + 1


def take_rows(reader: Any, most: int) -> list[Any]:
    """The next rows of a CSV reader; the last is a BadLine if it could not be read."""
    import csv

    rows: list[Any] = []
    try:
        rows.extend(itertools.islice(reader, most))
    except csv.Error as fault:  # what came before it is in rows
        rows.append(BadLine(f"is not valid CSV: {fault}"))
    except UnicodeDecodeError:
        line = reader.line_num + 1
        errors = [Place("#", line).fault(None, "is not UTF-8")]
        raise Problem(400, f"line {line} is not UTF-8", errors, total=1) from None
    return rows


def check_header(rows: list[Any]) -> list[str]:
    """The columns of a CSV header, the first of the rows: known ones, each once, all
    that are required. Raises Problem 422."""
    broken: list[str] = [row for row in rows if isinstance(row, BadLine)]
    header: list[str] = rows[0] if rows and not broken else []
    needed = [name for name in CSV_MEMBERS if USER.by_name[name].required]
    faults = itertools.chain(  # one by one, as there may be millions
        broken,
        (f"{name} is no column" for name in header if name not in CSV_MEMBERS),
        (f"{name} stands twice" for name in CSV_MEMBERS if header.count(name) > 1),
        (f"{name} is missing" for name in needed if name not in header),
    )
    first = itertools.islice(faults, IMPORT_FAULTS)
    errors = [Place("#", 1).fault(None, fault) for fault in first]
    if errors:
        total = len(errors) + sum(1 for _ in faults)
        raise Problem(422, "the CSV header is not valid", errors, total=total)
    return header


def csv_entries(line: int, header: list[str], rows: list[Any]) -> Iterator[Entry]:
    """The items of these rows, of which the first begins at the line."""
    for cells in rows:
        text = "".join(cells)
        if len(cells) > 1 or text.strip():  # it is no blank line
            yield Place("#", line), csv_item(header, cells)
        line += 1 + text.count("\n")


def csv_item(header: list[str], cells: Any) -> Any:
    """The item that a row of cells is, or a BadLine."""
    if isinstance(cells, BadLine):
        return cells
    if len(cells) != len(header):
        return BadLine(f"has {len(cells)} cells where the header has {len(header)}")
    item: Item = dict(zip(header, map(unguard, cells)))
    if item.get("id") == "":
        del item["id"]
    elif "id" in item and (digits := DIGITS.fullmatch(item["id"])):
        item["id"] = int(digits[1])
    return item


FORMULA = re.compile(r"'*[=+\-@\t\r]")


def unguard(cell: str) -> str:
    """A CSV cell without the prefix that keeps a spreadsheet from running it."""
    return cell[1:] if cell[:1] == "'" and FORMULA.match(cell) else cell


def guard(cell: Any) -> Any:
    """A CSV cell that no spreadsheet runs as a formula."""
    return f"'{cell}" if isinstance(cell, str) and FORMULA.match(cell) else cell


def read_batches(file: Any, media: str, watch: Callable[[int], None]) -> Iterator[Any]:
    """The items of CSV or NDJSON; `watch` is told how many of them have been read."""
    count = 0
    for batch in read_csv(file) if media == CSV else batches(ndjson_entries(file)):
        count += len(batch)
        watch(count)
        yield batch


# Writing answers


def csv_lines(rows: Iterable[Sequence[Any]]) -> bytes:
    import csv

    out = io.StringIO()
    csv.writer(out).writerows([guard(cell) for cell in row] for row in rows)
    return out.getvalue().encode()


def json_chunks(pages: Iterable[Rows], _: Names, tail: str) -> Iterator[bytes]:
    """The envelope of a list; `tail` is what stands behind the results."""
    yield b'{"results": ['
    joint = ""
    for page in filter(None, pages):  # to a stream an empty chunk means: nothing yet
        yield (joint + ", ".join([row[0] for row in page])).encode()
        joint = ", "
    yield f"]{tail}}}".encode()


def csv_chunks(pages: Iterable[Rows], members: Names, _: str) -> Iterator[bytes]:
    yield csv_lines([members])
    for page in filter(None, pages):
        yield csv_lines(row[:-2] for row in page)


def ndjson_chunks(pages: Iterable[Rows], *_: Any) -> Iterator[bytes]:
    for page in filter(None, pages):
        yield "".join([f"{row[0]}\n" for row in page]).encode()


CHUNKS = {JSON: json_chunks, NDJSON: ndjson_chunks, CSV: csv_chunks}


def select_sql(media: str, names: Names) -> str:
    """What is read of a user for a format: JSON text, or a column for each member."""
    if media == CSV:
        return ", ".join(cell_sql(USER.by_name[name]) for name in names)
    return view_sql(names)


def acknowledge(call: Call, members: str = "", headers: Headers = ()) -> Answer:
    """The answer to a write; `members` are more of it, as JSON text."""
    body = f'{{"code": 0, "message": "SUCCESS"{members}}}'
    return Answer(body.encode(), headers, status=call.operation.status)


def show_saved(
    call: Call, texts: Iterable[str], version: int = 0, id: int = 0
) -> Answer:
    """The answer to a write of what is now there: of one, its version and place."""
    headers = [("ETag", f'"{version}"')] if version else []
    if id and call.method == "POST":
        headers.append(("Location", f"{call.prefix}{call.path}/{id}"))
    return acknowledge(call, f', "results": [{", ".join(texts)}]', headers)


# Users

FIND = ("q", "name", "mail", "id", "sort", "limit", "after", "count", "fields",
        "format")  # fmt: skip
LIST = "All users, or those that the parameters find; streamed if there is no limit."


@operations(
    ("list_users", "GET", "/user", LIST, FIND, ALL),
    ("list_users_of_old", "GET", "/user/0", LIST, FIND, ALL),
)
def list_users(call: Call) -> Answer:
    """Users; a short answer is kept for whoever asks the same before the next change,
    as lists are read far more often than users change."""
    seq, kept = call.store.last_seq(), call.app.kept
    if call.store.begun():  # what our transaction has written may be taken back
        kept = {}
    key = (call.prefix, call.path, call.environ.get("QUERY_STRING"), call.media)
    since, body, headers = kept.get(key, (None, b"", ()))
    if since != seq:
        body, headers = show_users(call, make_query(call))
        if isinstance(body, bytes) and len(body) < 16384:
            remember(kept, key, (seq, body, headers), 100)
    return call.tagged(body, f'W/"{seq}"', headers)


def make_query(call: Call) -> Query:
    """The query that the parameters are. Raises Problem 400."""
    get = call.params.get
    sort, after = get("sort", "id"), get("after")
    if after and after[0] != sort:
        raise bad_request("parameter", ("after", "is a cursor of another sort"))
    place, limit = after and after[1:], get("limit")
    return Query(get("q"), get("name"), get("mail"), get("id"), sort, place, limit)


def show_users(call: Call, query: Query) -> tuple[Body, Headers]:
    """What the query finds, with `next` and Link if it is limited: streamed, if not."""
    members, tail = call.fields(), ""
    headers: Headers = ()
    more = query._replace(limit=query.limit and query.limit + 1)
    pages = call.store.pages(select_sql(call.media, members), more)
    first = next(pages)
    if call.params.get("count"):
        tail = f', "total": {call.store.count_users(query)}'
    if query.limit:
        page, first = first, first[: query.limit]
        cursor = write_cursor(query.sort, first[-1]) if page != first else None
        following, headers = tell_next(call, "after", cursor)
        tail += following
    chunks = CHUNKS[call.media](itertools.chain([first], pages), members, tail)
    few = query.limit or len(first) < PAGE_ROWS
    return b"".join(chunks) if few else chunks, headers


def remember(kept: dict[Any, Any], key: Any, value: Any, most: int) -> None:
    """Add an entry; of too many the first goes, whatever other threads do."""
    kept[key] = value
    for eldest in list(kept)[:1] if len(kept) > most else ():
        kept.pop(eldest, None)


def tell_next(call: Call, name: str, place: Any) -> tuple[str, Headers]:
    """The member `next` and the header Link of a limited answer: this request with
    another `place` in the parameter `name`; null if the place is None."""
    if place is None:
        return ', "next": null', ()
    pairs = query_pairs(call.environ["QUERY_STRING"])
    query = [*(pair for pair in pairs if pair[0] != name), (name, place)]
    uri = f"{call.prefix}{call.path}?{urlencode(query, safe=',')}"
    return f', "next": {json.dumps(uri)}', [("Link", f'<{uri}>; rel="next"')]


@operations(
    ("get_user", "GET", "/user/<id:id>", "One user.", ("fields", "format"), ALL)
)
def get_user(call: Call) -> Answer:
    """A user with its ETag; in CSV and NDJSON a line of it. Raises Problem 404."""
    id, members = call.args["id"], call.fields()
    if call.media == JSON:
        user, version = call.store.show_user(id, members)
        return call.tagged(f'{{"results": [{user}]}}'.encode(), f'"{version}"')
    page = next(call.store.pages(select_sql(call.media, members), Query(ids=[id])))
    if not page:
        raise no_user(id)
    return Answer(b"".join(CHUNKS[call.media]([page], members, "")), [], call.media)


@operations(
    ("create_user", "POST", "/user", "Create a user, or many; CSV and NDJSON are"
        " imported, and their users counted.", ("conflict",), (JSON,), ALL),
    ("replace_users", "PUT", "/user",
        "Replace each of the items' users, as PUT replaces one."),
    ("merge_users", "PATCH", "/user",
        "Merge each of the items into the user that it names (RFC 7396)."),
    ("replace_user", "PUT", "/user/<id:id>",
        "Replace a user's name and mail, in v2 also the lists that are sent."),
    ("merge_user", "PATCH", "/user/<id:id>", "Merge the item into a user (RFC 7396)."),
)  # fmt: skip
def save_users(call: Call) -> Answer:
    """Save the items of the body, or all users of a CSV or NDJSON body, as the method
    says; answered with the users as they are now, or counts. Problem 404, 409, 412,
    422, 428."""
    imports = call.takes != JSON
    saving = Saving(
        call.store,
        HOW[call.method],
        members_in(call.takes, call.view),
        id=call.args.get("id"),
        check=call.precondition(),
        conflict=call.params.get("conflict", "fail"),
        keeps=KEPT if imports else (),
    )
    if imports:
        return import_body(call, saving)
    items, one = read_items(call)
    ids = saving.save([items]).ids
    users = [call.store.show_user(id, VIEWS[call.view]) for id in ids]
    texts = (text for text, _ in users)
    if one and users:
        return show_saved(call, texts, users[0][1], ids[0])
    return show_saved(call, texts)


def import_body(call: Call, saving: Saving) -> Answer:
    """Import CSV or NDJSON; the users are counted, and not shown."""
    items = read_batches(io.BytesIO(call.body), call.takes, call.refuse_many)
    counts = saving.save(items).counts.items()
    return acknowledge(call, "".join(f', "{n}": {count}' for n, count in counts))


# Phones and addresses


@operations(
    ("list_{0.plural}", "GET", ROWS, "The {0.title} list of a user."),
    ("get_{0.name}", "GET", ROW, "One {0.title} of a user."),
    shapes=SHAPES.values(),
)
def get_rows(call: Call) -> Answer:
    """A user's phones or addresses, or the one that the path names."""
    shape, n = call.operation.shape, call.args.get("n")
    rows, version = call.store.show_rows(call.args["id"], shape)
    if n is not None:
        found = [row for row in json.loads(rows) if row["id"] == n]
        refuse_missing(shape.name, [n], [row["id"] for row in found])
        rows = ENCODER.encode(found)
    return call.tagged(f'{{"results": {rows}}}'.encode(), f'"{version}"')


@operations(
    ("create_{0.name}", "POST", ROWS, "Add one {0.title} to a user, or many."),
    ("replace_{0.plural}", "PUT", ROWS,
        "Replace each {0.title} of a user that the items name."),
    ("merge_{0.plural}", "PATCH", ROWS,
        "Merge each item into the {0.title} of a user that it names (RFC 7396)."),
    ("replace_{0.name}", "PUT", ROW, "Replace one {0.title} of a user."),
    ("merge_{0.name}", "PATCH", ROW,
        "Merge the item into one {0.title} of a user (RFC 7396)."),
    shapes=SHAPES.values(),
)  # fmt: skip
def save_rows(call: Call) -> Answer:
    """Save the items of the body below a user; answered with the rows as they are now,
    and the user's new ETag. Problem 404, 409, 412, 422, 428."""
    check, shape, user = call.precondition(), call.operation.shape, call.args["id"]
    items, one = read_items(call)
    how, n = HOW[call.method], call.args.get("n")
    numbers, version = call.store.save_rows(user, shape, items, how, n, check)
    rows = {row["id"]: row for row in json.loads(call.store.show_rows(user, shape)[0])}
    texts = (ENCODER.encode(rows[number]) for number in numbers)
    return show_saved(call, texts, version, numbers[0] if one else 0)


@operations(
    ("delete_users", "DELETE", "/user", "Delete the users that the parameter id names.",
        ("id",)),
    ("delete_user", "DELETE", "/user/<id:id>",
        "Delete a user with its phone numbers and addresses."),
)  # fmt: skip
@operations(
    ("delete_{0.plural}", "DELETE", ROWS,
        "Delete each {0.title} of a user that the parameter id names.", ("id",)),
    ("delete_{0.name}", "DELETE", ROW, "Delete one {0.title} of a user."),
    shapes=SHAPES.values(),
)  # fmt: skip
def delete_items(call: Call) -> Answer:
    """Delete the user or row that the path names, or those of the parameter id.
    Problem 400, 404, 412, 422, 428."""
    check, shape, args = call.precondition(), call.operation.shape, call.args
    ids = call.params.get("id")
    if not call.operation.bulk:
        ids = [args.get("n") or args["id"]]
    if not ids:
        raise bad_request("parameter", ("id", "is required: id=1,2,3"))
    if shape is USER:
        call.store.delete_users(ids, check)
    else:
        call.store.delete_rows(args["id"], shape, ids, check)
    return acknowledge(call)


# The log, the documents, operating

TURN = 20  # seconds that an event stream keeps a thread of another server
HEARTBEAT = 15  # seconds of silence after which an event stream says that it lives


@operations(
    ("list_changes", "GET", "/changes",
        "Who changed which members of whom; as server-sent events it stays open.",
        ("since", "limit"), (JSON, EVENTS)),
)  # fmt: skip
def list_changes(call: Call) -> Answer:
    """The log after `since` as a list, or as events, for which Last-Event-ID beats it.
    Problem 410."""
    since, limit = call.params.get("since"), call.params.get("limit")
    last = call.header("LAST_EVENT_ID")
    try:
        last_seq = since if last is None else read_value(last, SINCE)
    except ValueError as fault:
        raise bad_request("header", ("Last-Event-ID", str(fault))) from None
    if call.media == EVENTS:
        call.store.changes(last_seq, 1)  # a 410 is said before the stream begins
        return Answer(events(call, last_seq), [], EVENTS)
    if limit:
        rows = call.store.changes(since, limit + 1)
        place = rows[limit - 1][1] if rows[limit:] else None
        tail, headers = tell_next(call, "since", place)
        return Answer(b"".join(json_chunks([rows[:limit]], (), tail)), headers)
    pages = change_pages(call.store, since)
    first = next(pages)
    chunks = json_chunks(itertools.chain([first], pages), (), "")
    return Answer(chunks if len(first) == PAGE_ROWS else b"".join(chunks))


def change_pages(store: Store, since: int | None) -> Iterator[Rows]:
    """The log after `since`, page by page, to what is its end now, and an empty page.
    Raises Problem 410."""
    end = store.last_seq()
    while page := [row for row in store.changes(since, PAGE_ROWS) if row[1] <= end]:
        yield page
        since = page[-1][1]
    yield []


def next_events(call: Call, since: int | None) -> tuple[int | None, bytes] | None:
    """The next events of a stream, if there are any, with the seq of the last; None
    where it has to end, as its client was left behind (which the next try is told) or
    lost its token. Many streams are equally far: what one is told is kept for others.
    """
    try:
        first, last, text = call.app.told
        if first != since:
            rows = call.store.changes(since, PAGE_ROWS)
            if not rows:
                return since, b""
            last = rows[-1][1]
            text = b"".join(b"id: %d\ndata: %b\n\n" % (n, c.encode()) for c, n in rows)
            call.app.told = since, last, text
        call.app.guard.admit(call)
        return last, text
    except Problem as problem:
        return (since, b"") if problem.status == 503 else None


def events(call: Call, since: int | None) -> Iterator[bytes]:
    """The changes after `since` as server-sent events, for as long as they are read.

    An empty chunk means: nothing yet, ask me again shortly. A server that does not
    know that would ask at once; under it the thread waits, and is given back after a
    while, as such a server does not notice either that the client has gone.
    """
    ours = "userapi.server" in call.environ
    began = silent = time.monotonic()
    yield b"retry: 1000\n\n"
    while found := next_events(call, since):
        since, text = found
        if text:
            silent = time.monotonic()
            yield text
        elif time.monotonic() - silent > HEARTBEAT:
            silent = time.monotonic()
            yield b": still here\n\n"
        else:
            yield b""
            if not ours:
                time.sleep(0.25)
        if not ours and time.monotonic() - began > TURN:
            return


@operations(("get_health", "GET", "/health", "Whether it answers; needs no token."))
def get_health(call: Call) -> Answer:
    return Answer(to_json({"status": "ok"}))


@operations(
    ("get_metrics", "GET", "/metrics", "Figures for Prometheus.", (), (PROMETHEUS,))
)
def get_metrics(call: Call) -> Answer:
    return Answer(call.app.metrics.write(call.store), (), PROMETHEUS)


# ── Application ───────────────────────────────────────────────────────────────────

LOOPBACK = re.compile(r"(?:::ffff:)?127\.\d+\.\d+\.\d+|::1")
_BYTE = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
LOCAL_HOST = re.compile(
    rf"(?:localhost|127(?:\.{_BYTE}){{3}}|\[(?:::|(?:0{{1,4}}:){{7}})0{{0,3}}1\])\.?(?::\d*)?",
    re.IGNORECASE | re.ASCII,
)
PORT = re.compile(r"\.?(?::\d*)?$")
HOP_PORT = re.compile(r"^(?:\[(.*)\](?::\d+)?|([^:]*):\d+)$")  # as Azure has it
QUOTED = re.compile(r'"(?:\\.|[^"\\])*"?')  # values of parameters other than q
BAD_ESCAPE = re.compile("%(?![0-9A-Fa-f]{2})")
LENGTH = re.compile("[0-9]{1,18}")
POLICY = "default-src 'none'; frame-ancestors 'none'"
COMMON = [
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "private, no-cache"),
]
CHALLENGE = [  # in lines of their own, Basic first, as browsers need it
    ("WWW-Authenticate", 'Basic realm="userapi", charset="UTF-8"'),
    ("WWW-Authenticate", 'Bearer realm="userapi"'),
]
EXPOSED = "ETag, Location, Link, Retry-After, Idempotency-Replayed"
#: the ports that need not be said
IMPLIED = {"http": ":80", "https": ":443"}
ASKED = "Authorization, Content-Type, Idempotency-Key, If-Match, If-None-Match"
ASKED += ", Last-Event-ID"


class Resource(NamedTuple):
    """What is at a path: its operations by method, in one API version."""

    base: str
    view: str
    operations: dict[str, Operation]

    @property
    def allow(self) -> str:
        more = ["HEAD"] if "GET" in self.operations else []
        return ", ".join([*self.operations, *more, "OPTIONS"])


@functools.lru_cache(maxsize=1)
def find_resources() -> dict[str, Resource]:
    """Every path of every version, as OPERATIONS has them, to what is there."""
    found: dict[str, Resource] = {}
    for operation in OPERATIONS:
        versioned = operation.path.startswith(("/user", "/changes"))
        versions = (("/api", "v1"), ("/api/v1", "v1"), ("/api/v2", "v2"))
        for base, view in versions if versioned else (("", "v1"),):
            path = base + operation.path
            resource = found.setdefault(path, Resource(base, view, {}))
            resource.operations[operation.method] = operation
    return found


@functools.lru_cache(maxsize=1)
def build_router() -> bottle.Router:
    router = bottle.Router()
    router.add_filter("id", lambda _: ("0*[1-9][0-9]{0,15}", int, str))
    for path, resource in find_resources().items():
        router.add(path, "GET", resource)
    return router


@functools.lru_cache(maxsize=256)
def negotiate(accept: str, offered: tuple[str, ...]) -> str | None:
    """The offered media type that Accept likes best (RFC 9110 §12.5.1), if any."""
    liked: dict[str, float] = {}
    for part in QUOTED.sub("", accept.lower()).split(","):
        match = re.search(r";\s*q=([01](?:\.\d{0,3})?)\s*(?:;|$)", part)
        liked[part.partition(";")[0].strip()] = float(match[1]) if match else 1.0
    best, most = None, 0.0
    for media in offered:
        bare = media.split(";")[0]
        ranges = (bare, f"{bare.split('/')[0]}/*", "*/*")
        weight = next((liked[r] for r in ranges if r in liked), 0.0)
        if weight > most:
            best, most = media, weight
    return best


def read_networks(addresses: Sequence[str]) -> list[Any]:
    """Addresses and networks (10.0.0.0/8) of trusted_proxy. Raises SettingError."""
    if not addresses:
        return []
    import ipaddress

    try:
        return [ipaddress.ip_network(address, strict=False) for address in addresses]
    except ValueError as fault:
        raise SettingError(f"trusted_proxy: {fault}") from None


#: they remember, as the same few clients come again
is_loopback = functools.lru_cache(maxsize=64)(LOOPBACK.fullmatch)
is_local = functools.lru_cache(maxsize=64)(LOCAL_HOST.fullmatch)


class Guard:
    """Who gets in: this host without a token, else who has one; no other site."""

    def __init__(self, settings: Settings, store: Store, open: bool) -> None:
        self.settings, self.store, self.open = settings, store, open
        token = settings.token.encode()
        self.digest = hashlib.sha256(token).digest() if token else None
        self.trusted = read_networks(settings.trusted_proxy)
        self.vary = [("Vary", "Accept, Origin" if settings.cors else "Accept")]
        self.failures: dict[str, list[float]] = {}

    @property
    def configured(self) -> bool:
        return self.digest is not None or self.store.has_tokens()

    def admit(self, call: Call) -> None:
        """Let the call pass with its actor and role, or raise Problem 401, 403, 429."""
        environ = call.environ
        if self.configured:
            if call.path != "/health" and not self.is_preflight(call):
                self.authenticate(call)
            if self.settings.allow_host and not self.is_known(call):
                raise Problem(403, "this Host is not one of allow_host")
        elif not self.open:
            if not is_loopback(environ.get("REMOTE_ADDR", "")):
                raise Problem(403, "only this host gets in until a token is set")
            if not self.is_known(call):
                raise Problem(403, "this Host is foreign: set a token, or allow_host")
        if call.method not in SAFE:
            if call.role != "admin":
                raise Problem(403, "this token may only read")
            self.refuse_cross_site(call)

    def is_known(self, call: Call) -> bool:
        """Whether Host is local, or one of allow_host."""
        host = call.header("HOST") or ""
        if is_local(host):
            return True
        return PORT.sub("", host.lower()) in self.settings.allow_host

    def is_listed(self, call: Call) -> bool:
        origin = call.header("ORIGIN")
        return origin is not None and origin.lower() in self.settings.cors

    def is_preflight(self, call: Call) -> bool:
        asks = call.header("ACCESS_CONTROL_REQUEST_METHOD") is not None
        return asks and call.method == "OPTIONS" and call.header("ORIGIN") is not None

    def authenticate(self, call: Call) -> None:
        """Find the call's actor and role by its token. Raises Problem 401, 429."""
        given = call.header("AUTHORIZATION")
        if given is None:
            raise Problem(401, "a token is needed", headers=CHALLENGE)
        scheme, _, token = given.partition(" ")
        if scheme.lower() == "basic":
            token = (bottle.parse_auth(given) or ("", ""))[1]
        elif scheme.lower() != "bearer":
            token = ""
        digest = hashlib.sha256(token.strip().encode("utf-8", "replace")).digest()
        if self.digest and hmac.compare_digest(digest, self.digest):
            call.actor = "admin"
            return
        found = self.store.find_token(digest)
        if found is None:
            raise self.failed(call.environ.get("REMOTE_ADDR", ""))
        call.actor, call.role, used = found
        today = utc_now()[:10]
        if used != today:
            self.store.touch_token(call.actor, today)

    def failed(self, address: str) -> Problem:
        """A wrong token: 401, or 429 after ten in a minute from one address."""
        now = time.monotonic()
        times = [at for at in self.failures.pop(address, ()) if now - at < 60]
        tried = len(times)
        remember(self.failures, address, times, 1000)  # at the end: the eldest is first
        if tried >= 10:
            after = [("Retry-After", str(int(61 - (now - times[0]))))]
            return Problem(429, "too many wrong tokens", headers=after)
        times.append(now)
        return Problem(401, "the token is wrong", headers=CHALLENGE)

    def refuse_cross_site(self, call: Call) -> None:
        site, origin = call.header("SEC_FETCH_SITE"), call.header("ORIGIN")
        ours = site in ("same-origin", "none")
        if site is None:
            own = f"{call.environ['wsgi.url_scheme']}://{call.header('HOST')}"
            ours = origin is None or origin_host(origin) == origin_host(own)
        if not ours and not self.is_listed(call):
            raise Problem(403, "another site's page may not write here: see cors")

    def is_trusted(self, address: str) -> bool:
        import ipaddress

        try:
            found = ipaddress.ip_address(address)
        except ValueError:
            return False
        plain = getattr(found, "ipv4_mapped", None) or found  # --host :: maps IPv4
        return any(found in at or plain in at for at in self.trusted)

    def believe_proxy(self, environ: Environ) -> None:
        """Take over what a trusted proxy says of the client (X-Forwarded-*)."""
        if not self.is_trusted(environ.get("REMOTE_ADDR", "")):
            return
        forwarded = environ.get("HTTP_X_FORWARDED_FOR") or environ["REMOTE_ADDR"]
        hops = [HOP_PORT.sub(r"\1\2", hop.strip()) for hop in forwarded.split(",")]
        strangers = (hop for hop in reversed(hops) if not self.is_trusted(hop))
        environ["REMOTE_ADDR"] = next(strangers, hops[0])  # it may be a proxy's own
        for name, variable in (
            ("HOST", "HTTP_HOST"),
            ("PROTO", "wsgi.url_scheme"),
            ("PREFIX", "SCRIPT_NAME"),
        ):
            value = environ.get(f"HTTP_X_FORWARDED_{name}")
            if value:
                environ[variable] = value
        prefix, path = environ.get("SCRIPT_NAME", ""), environ.get("PATH_INFO", "")
        environ["SCRIPT_NAME"] = prefix = f"/{prefix.strip('/')}".rstrip("/")
        if f"{path}/".startswith(f"{prefix}/"):  # a proxy that keeps it
            environ["PATH_INFO"] = path[len(prefix) :]


def origin_host(origin: str) -> str:
    """Host and port of an origin, without the port that its scheme implies."""
    scheme, _, host = origin.lower().partition("://")
    return host[: -len(end)] if host.endswith(end := IMPLIED.get(scheme, "-")) else host


class Metrics:
    """Counts of what was answered, written in the text format of Prometheus."""

    #: seconds
    bounds = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5,
              10)  # fmt: skip

    def __init__(self) -> None:
        self.requests: collections.Counter[tuple[str, int]] = collections.Counter()
        self.buckets = [0] * (len(self.bounds) + 1)
        self.seconds = 0.0
        self.connections: Callable[[], int] = lambda: 0

    def note(self, operation: str, status: int, seconds: float) -> None:
        self.requests[operation, status] += 1
        self.buckets[bisect.bisect_left(self.bounds, seconds)] += 1
        self.seconds += seconds

    def write(self, store: Store) -> bytes:
        """The figures, those of the store included."""
        lines = ["# TYPE userapi_requests_total counter"]
        for (name, status), count in sorted(self.requests.items()):
            labels = f'operation="{name}",status="{status}"'
            lines.append(f"userapi_requests_total{{{labels}}} {count}")
        lines.append("# TYPE userapi_request_seconds histogram")
        total = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.buckets):
            total += count
            lines.append(f'userapi_request_seconds_bucket{{le="{bound}"}} {total}')
        lines.append(f"userapi_request_seconds_sum {self.seconds:.6f}")
        lines.append(f"userapi_request_seconds_count {total}")
        gauges = {
            "connections": self.connections(),
            "users": store.count_users(),
            "last_change_seq": store.last_seq(),
        }
        gauges.update((f"{name}_bytes", size) for name, size in store.sizes().items())
        for name, value in gauges.items():
            lines += [f"# TYPE userapi_{name} gauge", f"userapi_{name} {value}"]
        return ("\n".join(lines) + "\n").encode()


class UserAPI:
    """The WSGI application (PEP 3333): users out of one database, under any prefix.

    `open=True` leaves it to the host program who gets in without a token. `on_change`
    is called with each change after it is committed. Further keywords are SETTINGS;
    what is not given comes from `USERAPI_*` variables. Raises SettingError and Problem.
    """

    def __init__(
        self,
        db: str | None = None,
        open: bool = False,
        on_change: Callable[[Item], None] | None = None,
        **settings: Any,
    ) -> None:
        self.settings = Settings({"db": db, **settings})
        self.store = open_store(self.settings, on_change)
        self.guard = Guard(self.settings, self.store, open)
        self.router, self.metrics = build_router(), Metrics()
        self.kept: dict[Any, tuple[int, Body, Headers]] = {}  # short lists
        #: after which seq, up to which, what an event stream was last told
        self.told: tuple[int | None, int, bytes] = -1, -1, b""

    def configure(self, given: dict[str, Any]) -> None:
        """Take over other settings, but for those of the store that was opened. Raises
        SettingError."""
        for name in STORE_SETTINGS:
            if given.get(name) is not None:
                raise SettingError(f"{name} is a keyword of UserAPI, not of serve")
        self.settings.update(given)
        self.guard = Guard(self.settings, self.store, self.guard.open)

    def close(self) -> None:
        """Close the database's connections."""
        self.store.close()

    def __call__(
        self, environ: Environ, start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        began = time.perf_counter()
        call = Call(self, environ)
        try:
            answer = self.respond(call)
        except Exception as fault:
            answer = self.refusal(environ, fault)
        if call.actor:
            environ["REMOTE_USER"] = call.actor
        took = time.perf_counter() - began
        self.metrics.note(call.operation.name, answer.status, took)
        status, headers, body = self.present(call, answer)
        start_response(status, headers)
        return body

    def present(self, call: Call, answer: Answer) -> Given:
        """An answer as WSGI has it, with the headers that all have."""
        body, headers = answer.body, [*answer.headers, *COMMON, *self.guard.vary]
        if answer.media != HTML:
            headers.append(("Content-Security-Policy", POLICY))
        if self.settings.cors and self.guard.is_listed(call):
            headers.append(("Access-Control-Allow-Origin", call.header("ORIGIN") or ""))
            headers.append(("Access-Control-Expose-Headers", EXPOSED))
        if answer.status not in (204, 304):
            headers.append(("Content-Type", answer.media))
            if isinstance(body, bytes):
                headers.append(("Content-Length", str(len(body))))
        if call.method == "HEAD":
            body = b"" if isinstance(body, bytes) else iter(())
        given = [body] if isinstance(body, bytes) else body
        return STATUS[answer.status], headers, given

    def respond(self, call: Call) -> Answer:
        """Answer what the head asks for, with the body. Raises Problem."""
        resource = self.read_head(call)
        if call.method == "OPTIONS":
            return self.show_options(call, resource)
        if call.operation.takes:
            self.read_body(call)
        return self.write(call) if call.operation.writes else call.operation.run(call)

    def examine(self, environ: Environ) -> None:
        """Raise the Problem that a request is refused for before its body is read."""
        self.read_head(Call(self, dict(environ)))

    def admit(self, call: Call) -> None:
        """Learn what a call is to, and ask the guard. Raises Problem 401, 403, 429."""
        if self.guard.trusted:
            self.guard.believe_proxy(call.environ)
        call.prefix = quote(call.environ.get("SCRIPT_NAME", ""), encoding="latin-1")
        call.path = read_path(call.environ)
        self.guard.admit(call)

    def read_head(self, call: Call) -> Resource:
        """Guard, resource, operation, parameters, media types. Raises Problem."""
        self.admit(call)
        resource, call.args = find_resource(self.router, call.path, call.method)
        _, call.view, operations = resource
        if call.method == "OPTIONS":
            return resource
        operation = operations.get("GET" if call.method == "HEAD" else call.method)
        if operation is None:
            allow = resource.allow
            raise Problem(405, f"this resource has {allow}", headers=[("Allow", allow)])
        call.operation = operation
        query = call.environ.get("QUERY_STRING")
        if query and HTML not in operation.answers:  # a page reads its own
            call.params = read_query(query, operation.params, VIEWS[call.view])
        call.media = choose_media(call, operation.answers)
        if operation.takes:
            call.takes = choose_taken(call, operation.takes)
        return resource

    def show_options(self, call: Call, resource: Resource) -> Answer:
        """What can be done with a resource, to a CORS preflight as well."""
        headers = [("Allow", resource.allow)]
        if "PATCH" in resource.operations:  # RFC 5789 §3.1
            takes = resource.operations["PATCH"].takes
            headers.append(("Accept-Patch", ", ".join(takes)))
        if self.guard.is_preflight(call) and self.guard.is_listed(call):
            headers.append(("Access-Control-Allow-Methods", resource.allow))
            headers.append(("Access-Control-Allow-Headers", ASKED))
            headers.append(("Access-Control-Max-Age", "600"))
        return Answer(b"", headers, status=204)

    def read_body(self, call: Call) -> None:
        """Read the body into the call. Raises Problem 400, 411, 413."""
        environ, most = call.environ, self.settings.max_body
        length = str(environ.get("CONTENT_LENGTH") or "")  # some give a number
        stream = environ["wsgi.input"]
        if not length:
            chunked = "chunked" in environ.get("HTTP_TRANSFER_ENCODING", "").lower()
            if not chunked or isinstance(stream, io.BufferedReader):  # wsgiref's socket
                raise Problem(411, "announce the body's length")
            call.body = stream.read(most + 1)
        elif not LENGTH.fullmatch(length):
            raise Problem(400, "Content-Length is not a number")
        elif int(length) <= most:
            call.body = stream.read(int(length))
            if len(call.body) < int(length):
                raise Problem(400, "the body ends before its length")
        if len(call.body) > most or int(length or 0) > most:
            raise Problem(413, f"{most} bytes are the most that a body may have")

    def write(self, call: Call) -> Answer:
        """Run an operation that writes: in a transaction, and once for each key."""
        dry, key = call.params.get("dry_run", False), call.header("IDEMPOTENCY_KEY")
        with self.store.transaction(call.actor, keep=not dry):
            if key is None or call.method != "POST":
                return call.operation.run(call)
            if dry or not re.fullmatch(r"[\x21-\x7e]{1,255}", key):
                detail = "is 1 to 255 visible ASCII characters, without dry_run"
                raise bad_request("header", ("Idempotency-Key", detail))
            return self.write_once(call, key)

    def write_once(self, call: Call, key: str) -> Answer:
        """What was answered to this key before, or the operation's answer, kept."""
        environ = call.environ
        place = [call.prefix, call.path, environ.get("QUERY_STRING", "")]
        whole = hashlib.sha256(to_json([call.actor, *place, key])).digest()
        content = hashlib.sha256(f"{call.takes}\n".encode() + call.body).digest()
        kept = self.store.find_retry(whole)
        if kept is None:
            answer = call.operation.run(call)
            assert isinstance(answer.body, bytes)
            self.store.keep_retry(
                whole, content, answer.status, answer.headers, answer.body
            )
            return answer
        digest, status, headers, body = kept
        if digest != content:
            raise Problem(422, "this Idempotency-Key came with another body before")
        pairs = [*map(tuple, json.loads(headers)), ("Idempotency-Replayed", "true")]
        return Answer(body, pairs, status=status)

    def refusal(self, environ: Environ, fault: BaseException) -> Answer:
        """The answer to a request that failed: its Problem, or a 500."""
        problem = fault
        if not isinstance(problem, Problem):
            problem = self.report(environ, fault)
        return Answer(problem.body(), problem.headers, PROBLEM_JSON, problem.status)

    def report(self, environ: Environ, fault: BaseException) -> Problem:
        """Log an unknown fault under an id, and name that id to the client."""
        id = os.urandom(6).hex()
        trace = traceback.format_exception(type(fault), fault, fault.__traceback__)
        text = f"userapi: fault {id}\n{''.join(trace)}"
        with contextlib.suppress(Exception):
            environ["wsgi.errors"].write(text)
            environ["wsgi.errors"].flush()
        return Problem(500, f"an unknown fault, logged as {id}", id=id)


def open_store(
    settings: Settings, on_change: Callable[[Item], None] | None = None
) -> Store:
    """The store that the settings describe; problems name its path. SettingError."""
    try:
        unique, keep = settings.unique_mail, settings.keep_changes
        return Store(settings.db, unique, keep, on_change)
    except Problem as problem:
        detail = f"{show_db(settings.db)}: {problem.detail}"
        if why := problem.__cause__ and problem.__cause__.__cause__:  # PostgreSQL's
            detail += f": {' '.join(str(why).split())}"
        raise Problem(problem.status, detail) from problem


def read_path(environ: Environ) -> str:
    """The path without a slash at its end; empty where it is not UTF-8."""
    try:
        path = environ.get("PATH_INFO", "").encode("latin-1").decode() or "/"
    except UnicodeError:
        return ""
    return path[:-1] if path[-1] == "/" and path != "/" else path


def choose_media(call: Call, offered: tuple[str, ...]) -> str:
    """The media type that `format` asks for, else Accept. Raises Problem 406."""
    accept = call.header("ACCEPT")
    if not accept or "format" in call.params:
        return FORMATS[call.params.get("format", "json")]
    media = negotiate(accept, offered)
    if media is None:
        raise Problem(406, f"there is {', '.join(offered)}")
    return media


def choose_taken(call: Call, takes: tuple[str, ...]) -> str:
    """The media type that a body is read as. Raises Problem 415."""
    media = call.environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower()
    coded = call.environ.get("HTTP_CONTENT_ENCODING")
    if coded or media and media not in takes:
        sent = f"send {' or '.join(takes)}"
        detail = "a Content-Encoding is not taken" if coded else sent
        raise Problem(415, detail, headers=[("Accept", ", ".join(takes))])
    return media if media in (CSV, NDJSON) else JSON


def find_resource(
    router: bottle.Router, path: str, method: str
) -> tuple[Resource, dict[str, int]]:
    """The resource at a path, and the path's parameters. Problem 400, 404, 405."""
    if not path:
        raise Problem(400, "the path is not UTF-8")
    if (method, path) == ("OPTIONS", "*"):  # the server as a whole: all methods
        path = "/api/user"
    try:
        if path.isprintable():
            found = router.match({"REQUEST_METHOD": "GET", "PATH_INFO": path})
            return found  # type: ignore[no-any-return]
    except bottle.HTTPError:
        pass
    if method not in METHODS:
        allow = [("Allow", ", ".join(METHODS))]
        raise Problem(405, "no resource has this method", headers=allow)
    version = re.match(r"/api/(v[0-9]+)(?:/|$)", path)
    if version and version[1] not in VIEWS:
        raise Problem(404, "there is no such version of the API; there are v1 and v2")
    raise Problem(404, "there is nothing at this URI")


@functools.lru_cache(maxsize=64)
def read_query(source: str, known: Names, members: Names) -> Item:
    """The values of a query's parameters, by name, which are not to be changed.

    Raises Problem 400 with all that is wrong.
    """
    faults = [
        (unquote(part.partition("=")[0]), "is not percent-encoded")
        for part in source.split("&")
        if BAD_ESCAPE.search(part)
    ]
    values: Item = {}
    for name, value in query_pairs(source):
        try:
            if SURROGATE.search(name + value):
                raise ValueError("is not UTF-8")
            if name not in known:
                raise ValueError("is no parameter here")
            if name in values:
                raise ValueError("stands twice")
            values[name] = read_value(value, schema_of_parameter(name, members))
        except ValueError as fault:
            faults.append((name.encode(errors="replace").decode(), str(fault)))
    if faults:
        raise bad_request("parameter", *faults)
    return values


# ── Contract ──────────────────────────────────────────────────────────────────────

#: what is shown and sent, by its name in the schemas
FORMS = {shape.name.title(): shape for shape in SHAPES.values()}
_V1 = tuple(USER.by_name[name] for name in VIEWS["v1"])
FORMS.update(UserV1=Shape("user", "users", "user", *_V1), UserV2=USER)
#: no parameter: no schema can say that a key goes with one body and without dry_run
IDEMPOTENCY_KEY = (
    " With a header Idempotency-Key (1 to 255 visible ASCII characters) a request is"
    " done once within a day; its repetition is answered as it was, with a header"
    " Idempotency-Replayed: true. Not together with dry_run."
)
#: how items are sent; of Each, many in one request, and each names its id
HOWS = ("Create", "Replace", "ReplaceEach", "Merge", "MergeEach")
NULLABLE: Item = {"type": ["string", "null"]}
COUNT: Item = {"type": "integer", "minimum": 0}
FAULT: Item = {"pointer": "", "parameter": "", "header": "", "line": 1, "detail": ""}
A_CHANGE: Item = {"seq": 1, "at": NOON, "actor": None, "op": "update", "user": 1}
A_CHANGE["fields"] = ["name"]
SAMPLES: Item = {"/health": {"status": "ok"}, "/changes": {"results": [A_CHANGE]}}
#: For Schemathesis, which makes values up, while no schema can say which cursor, ETag,
#: name or CSV is right, nor that ids differ: it may make up what `if` says. What `else`
#: says is true of all other values, but keeps it from them: a pattern of ECMA-262 that
#: Python lacks, or readOnly.
GIVEN: Item = {"type": "string", "else": {"$ref": "#/x-given"}}
#: for it, too: what it makes up in an id's place, to be refused, fits a request line
IDS = {**ID_LIST, "items": {**ID, "maxItems": 1, "maxProperties": 1}}
#: the schemas of parameters that are narrower with a method
NARROWED: dict[tuple[str, str], Item] = {
    ("GET", "after"): {**GIVEN, **NULLABLE, "minLength": 16, "if": {"type": "null"}},
    ("GET", "id"): IDS,
    ("DELETE", "id"): {**IDS, "uniqueItems": True},
    # after a DELETE that was just a try, all is still there
    ("DELETE", "dry_run"): {**GIVEN, "if": {"enum": ["false", "0"]}},
}
#: the headers that operations read
HEADERS = {
    "If-Match": ({**GIVEN, "if": {"const": "*"}}, "The user's ETag; else a 412."),
    "If-None-Match": (STRING, "The ETag that is known; then a 304."),
    "Last-Event-ID": (SINCE, "The seq of the last event had."),
}


def follows(op: Operation) -> list[Any]:
    """The headers and the statuses that follow from what an operation is."""
    users, writes = op.path.startswith("/user"), op.writes
    one_user = writes and "<id:id>" in op.path
    there: dict[tuple[Any, ...], Any] = {
        ("If-Match", 412): one_user,
        ("If-None-Match", 412): users and not writes,
        ("Last-Event-ID", 410): EVENTS in op.answers,
        ("ETag",): users and op.method != "DELETE",
        ("Location", "Idempotency-Replayed"): op.method == "POST",
        ("Link",): "limit" in op.params,
        (400, 403, 406, 408, 414, 417, 431, 500, 501, 503, 505): True,
        (401, 429): op.path != "/health",
        (404,): "<" in op.path or writes and op.method != "POST",
        (405,): writes and op.path == "/user/<id:id>",  # none of them at /user/0
        (409,): op.takes if op.shape is USER else op.method == "POST",
        (411, 413, 415): op.takes,
        (422, 507): writes,
        (428,): one_user and not op.bulk,
    }
    return [each for group, holds in there.items() if holds for each in group]


def ref(name: str, kind: str = "schemas") -> Item:
    return {"$ref": f"#/components/{kind}/{name}"}


def closed(properties: Item, required: Iterable[str], **made_up: Item) -> Item:
    """The schema of an object with just these members; for `made_up` see GIVEN."""
    schema = {"type": "object", "properties": properties, "required": list(required)}
    if made_up:
        other = dict.fromkeys(made_up, {"readOnly": True})
        schema.update({"if": {"properties": made_up}, "else": {"properties": other}})
    return {**schema, "additionalProperties": False}


def schema_of(sample: Any) -> Item:
    """The schema of what looks like this; null may also be a text."""
    if isinstance(sample, dict):
        properties = {name: schema_of(value) for name, value in sample.items()}
        fixed = {n: {"const": sample[n]} for n in ("code", "message") if n in sample}
        return closed({**properties, **fixed}, sample)
    if isinstance(sample, list):
        return {"type": "array", "items": schema_of(sample[0])}
    if isinstance(sample, int):
        return COUNT
    return {None: NULLABLE, NOON: STAMP}.get(sample, STRING)


def example_of(shape: Shape, how: str = "") -> Item:
    """An item as it is shown or, with `how`, as it is sent."""
    fields: Sequence[Field] = shape.written if how else shape.fields
    if how.startswith("Merge"):
        fields = shape.columns[-1:]
    item: Item = {"id": 1} if how.endswith("Each") else {}
    for f in fields:
        item[f.name] = [example_of(SHAPES[f.rows], how)] if f.rows else f.example
    return item


def form_schemas(form: str, shape: Shape) -> Item:
    """The schemas of a form: of an item as it is shown, sent and merged; of bodies."""
    shown, sent, merged, made_up = schema_of(example_of(shape)), Item(), Item(), Item()
    for field in shape.fields:
        name, schema = field.name, {"title": field.title, **field.schema}
        if field.read_only:
            schema["readOnly"] = True
        if field.rows:
            rows = field.rows.title()
            shown["properties"][name]["items"] = ref(rows)
            schema["items"] = ref(f"{rows}Item")
            made_up[name] = {"maxItems": 1}
        if field.clean:  # what there is beside its schema is no pattern
            made_up[name] = {"pattern": "^[!-~][ -~¡-¬®-ɏ]*$"}
        sent[name] = merged[name] = schema
        if not (field.required or field.read_only or name == "id"):
            merged[name] = {**schema, "type": [schema["type"], "null"]}
    if shape.name == "user":  # the parameter `fields` may leave out any
        shown["required"] = []
    item = closed(sent, [f.name for f in shape.fields if f.required], **made_up)
    if shape.one_of:
        item["not"] = {"properties": dict.fromkeys(shape.one_of, {"maxLength": 0})}
        # in a merge, as the other may be empty
        made_up.update(dict.fromkeys(shape.one_of, {**STRING, "minLength": 1}))
    merge = closed(merged, (), **made_up)
    bodies = {f"{form}{how}Body": body_schema(form, how) for how in HOWS}
    return {form: shown, f"{form}Item": item, f"{form}Merge": merge, **bodies}


def body_schema(form: str, how: str) -> Item:
    """What is sent in JSON: an item, a list of items, or either."""
    item = ref(form + ("Merge" if how.startswith("Merge") else "Item"))
    items = {"type": "array", "items": item, "minItems": 1}
    if how == "Create":
        either = closed({"item": item, "items": items}, (), items={"maxItems": 1})
        return {**either, "minProperties": 1, "maxProperties": 1}
    if how.endswith("Each"):
        item["required"] = ["id"]
        return closed({"items": items}, ["items"], items={"maxItems": 1})
    item["properties"] = {"id": {"readOnly": True}}  # it is the URI's
    return closed({"item": item}, ["item"])


def problem_response(status: int) -> Item:
    """What a problem looks like, with an example."""
    title, when = PROBLEMS[status]
    example = json.loads(Problem(status, when).body())
    content = {PROBLEM_JSON: {"schema": ref("Problem"), "example": example}}
    headers = {name: {"schema": STRING} for name in re.findall("; see (.+)", when)}
    return {"description": f"{title}: {when}.", "content": content, "headers": headers}


def components() -> Item:
    """What operations refer to: schemas, problems, ways to send a token."""
    problem = schema_of(json.loads(Problem(422, "", [FAULT]).body()))
    problem["properties"]["errors"]["items"]["required"] = ["detail"]
    problem["required"].remove("errors")
    schemas = {"Problem": {**problem, "additionalProperties": True}}
    for form, shape in FORMS.items():
        schemas.update(form_schemas(form, shape))
    responses = {f"Problem{status}": problem_response(status) for status in PROBLEMS}
    schemes = {name: {"type": "http", "scheme": name} for name in ("bearer", "basic")}
    return {"schemas": schemas, "responses": responses, "securitySchemes": schemes}


def body_of(op: Operation, form: str) -> Item:
    """The request body of an operation, in each media type that it takes."""
    how = HOW[op.method].title() + "Each" * ("item" not in op.envelopes)
    item, schema = example_of(FORMS[form], how), ref(f"{form}{how}Body")
    example = {"items": [item]} if how.endswith("Each") else {"item": item}
    content: Item = {m: {"schema": schema, "example": example} for m in op.takes}
    if CSV in content:
        names = [name for name in CSV_MEMBERS if name in item]
        text = csv_lines([names, [item[name] for name in names]]).decode()
        content[CSV] = {"schema": {**GIVEN, "if": {"const": text}}, "example": text}
        # without an example, as Schemathesis cannot send it
        text = f"Lines like {to_json(item).decode()}"
        content[NDJSON] = {"schema": {**STRING, "description": text}}
    return {"required": True, "content": content}


def answer_of(op: Operation, form: str) -> Item:
    """Schema and example of what an operation answers in JSON."""
    done = {"code": 0, "message": "SUCCESS"}
    sample: Item = done if op.writes else SAMPLES.get(op.path, {})
    if not sample and not op.path.startswith("/user"):
        return {"schema": {"type": "object"}}
    schema = schema_of(sample)
    members = schema["properties"]
    if op.path.startswith("/user") and op.method != "DELETE":
        sample = {**sample, "results": [example_of(FORMS[form])]}
        members["results"] = {"type": "array", "items": ref(form)}
        schema["required"].append("results")
    if "limit" in op.params:
        members["next"] = NULLABLE
    if "count" in op.params:
        members["total"] = COUNT
    if CSV in op.takes:  # an import is counted
        members.update(dict.fromkeys(COUNTED, COUNT))
        schema["required"].remove("results")
    return {"schema": schema, "example": sample}


def responses_of(op: Operation, form: str) -> Item:
    """What an operation can answer, by status."""
    due = follows(op)
    content = {media.partition(";")[0]: {"schema": STRING} for media in op.answers}
    if JSON in content:
        content[JSON] = answer_of(op, form)
    headers = {name: {"schema": STRING} for name in EXPOSED.split(", ") if name in due}
    status, _, done = STATUS[op.status].partition(" ")
    success = {"description": done, "content": content, "headers": headers}
    unchanged = {"description": "Not modified", "headers": {"ETag": {"schema": STRING}}}
    known = {"304": unchanged} if "If-None-Match" in due else {}
    problems = {str(n): ref(f"Problem{n}", "responses") for n in PROBLEMS if n in due}
    return {status: success, **known, **problems}


def parameters_of(op: Operation, path: str, form: str) -> Iterator[Item]:
    """The parameters of an operation: of its path, its query and its header."""
    id = {**ID, "minimum": 0} if op.name == "get_user" else ID  # 0 are all users
    described = [("path", n, (id, f"The {n}.")) for n in re.findall("{(.+?)}", path)]
    described += [("query", name, PARAMS[name]) for name in op.params]
    described += [("header", n, HEADERS[n]) for n in follows(op) if n in HEADERS]
    for place, name, (schema, help) in described:
        if place == "query":
            schema = schema_of_parameter(name, FORMS[form].names)
            schema = NARROWED.get((op.method, name), schema)
        yield {
            "name": name, "in": place, "description": help, "schema": schema,
            "required": place == "path" or (name == "id" and op.writes),
            **({"example": 1} if place == "path" else {"explode": False}),
        }  # fmt: skip


def describe(op: Operation, path: str, resource: Resource) -> Item:
    """The OpenAPI operation that an operation is at a resource."""
    form = op.shape.name.title() + resource.view.upper() * (op.shape is USER)
    tags = {"/user": FORMS[form].plural, "/chan": "changes"}
    return {
        "operationId": op.name + resource.base[4:].replace("/", "_"),
        "summary": op.summary,
        "description": op.summary + IDEMPOTENCY_KEY * (op.method == "POST"),
        "tags": [tags.get(op.path[:5], "service")],
        "parameters": list(parameters_of(op, path, form)),
        "responses": responses_of(op, form),
        **({"requestBody": body_of(op, form)} if op.takes else {}),
    }


def openapi(prefix: str = "") -> Item:
    """The OpenAPI 3.1 document: every operation of every version, out of the tables."""
    paths: Item = {}
    for route, resource in find_resources().items():
        path = re.sub("<(.+?):id>", r"{\1}", route)
        there = resource.operations.items()
        paths[path] = {m.lower(): describe(op, path, resource) for m, op in there}
    tags = {spec["tags"][0]: None for each in paths.values() for spec in each.values()}
    about = (__doc__ or "").split("\n\n")[1].replace("\n", " ")
    about += " Every GET also answers HEAD, and every URI OPTIONS, with Allow."
    info: Item = {"title": "userapi", "version": __version__, "description": about}
    info["license"] = {"name": "MIT", "identifier": "MIT"}
    return {
        "openapi": "3.1.0", "info": info, "servers": [{"url": prefix or "/"}],
        "security": [{}, {"bearer": []}, {"basic": []}], "paths": paths,
        "tags": [{"name": name} for name in tags], "components": components(),
        "x-given": {"description": "Given, not made up.", "pattern": r"^\p{Any}*$"},
    }  # fmt: skip


@operations(("get_openapi", "GET", "/openapi.json", "The OpenAPI document."))
def get_openapi(call: Call) -> Answer:
    return Answer(document(openapi, call.prefix))


@functools.lru_cache(maxsize=8)
def document(make: Callable[[str], Item], where: str) -> bytes:
    """A document as JSON, which is made once for each place that it speaks of."""
    return to_json(make(where))


#: the five calls of the tutorial that this application began with, and their ids
TUTORIAL = {
    "list_users_of_old": "0", "get_user": "1", "create_user": "",
    "replace_user": "{{user}}", "delete_user": "1337",
}  # fmt: skip
#: The Postman collection's own scripts: each call finds users, and leaves none behind.
SETUP = """
const header = { "Content-Type": "application/json", "If-Match": "*" };
header.Authorization = pm.variables.replaceIn("Bearer {{token}}");
const url = pm.variables.replaceIn("{{baseUrl}}/api/v2/user?conflict=skip");
const item = (id, n) => ({ ...%s, id, mail: `${n}@example.org` });
const body = JSON.stringify({ items: [1, 1337, undefined].map(item) });
pm.sendRequest({ url, method: "POST", header, body }, (fault, answer) => {
  const made = answer.json().results.map((user) => user.id);
  const found = { made, header, user: made[made.length - 1] };
  for (const name in found) pm.variables.set(name, found[name]);
});
"""
CLEANUP = """
const made = new Set(pm.variables.get("made")), header = pm.variables.get("header");
if (pm.request.method === "POST" && pm.request.url.getPath().endsWith("/user"))
  for (const user of pm.response.json().results || []) made.add(user.id);
for (const id of made) {
  const url = `${pm.variables.get("baseUrl")}/api/user/${id}`;
  pm.sendRequest({ url, method: "DELETE", header }, () => {});
}
"""
CHECKS = """
pm.test("is %s", () => pm.response.to.have.status(%s));
pm.test("has its envelope", () => {
  pm.expect(pm.response.headers.get("Content-Type")).to.include("%s");
  if (%s) pm.response.to.have.jsonSchema(%s);
});
"""


def script(event: str, text: str) -> Item:
    lines = text.strip().split("\n")
    return {"listen": event, "script": {"type": "text/javascript", "exec": lines}}


def checks_of(spec: Item) -> Item:
    """The test of a call: that it has the first of the answers that are told of it."""
    status, answer = next(iter(spec["responses"].items()))
    media, content = next(iter(answer["content"].items()))
    members = {**content["schema"].get("properties", {}), "results": {}}
    schema = json.dumps({**content["schema"], "properties": members})
    is_json = json.dumps(media == JSON)
    return script("test", CHECKS % (status, status, media, is_json, schema))


def postman_call(method: str, path: str, spec: Item, id: str = "{{user}}") -> Item:
    """The request that an operation of the OpenAPI document is in Postman."""
    at, own = path.format(id=id, n=1), "1" if "/{id}" in path else "{{user}}"
    sent: dict[str, list[Item]] = {"path": [], "query": [], "header": []}
    for each in spec["parameters"]:
        value = own if each["required"] else {"If-Match": "*"}.get(each["name"], "")
        pair = {"key": each["name"], "value": value, "disabled": not value}
        sent[each["in"]].append({**pair, "description": each["description"]})
    query, header = sent["query"], sent["header"]
    url: Item = {"host": ["{{baseUrl}}"], "path": at[1:].split("/"), "query": query}
    needed = "".join(f"?{pair['key']}={own}" for pair in query if pair["value"])
    url["raw"] = "{{baseUrl}}" + at + needed
    about = f"{spec['summary']} Answers {', '.join(spec['responses'])}."
    request = {"method": method.upper(), "url": url, "header": header}
    request["description"] = about
    if "requestBody" in spec:
        media, content = next(iter(spec["requestBody"]["content"].items()))
        header.append({"key": "Content-Type", "value": media})
        body = json.dumps(content["example"], indent=2, ensure_ascii=False)
        body = body.replace('"id": 1', f'"id": {own}')
        request["body"] = {"mode": "raw", "raw": body}
    name = f"{method.upper()} {at}"
    return {"name": name, "request": request, "event": [checks_of(spec)]}


def postman(url: str = "http://127.0.0.1:8080") -> Item:
    """The Postman 2.1 collection: the tutorial's calls, then the rest in folders."""
    paths = openapi()["paths"].items()
    specs = [(m, path, each) for path, found in paths for m, each in found.items()]
    by_id = {each["operationId"]: (method, path, each) for method, path, each in specs}
    calls = [postman_call(*by_id.pop(name), id) for name, id in TUTORIAL.items()]
    folders: dict[str, list[Item]] = {}
    for method, path, each in by_id.values():
        version = path.split("/")[2] if path.startswith("/api/v") else ""
        folder = folders.setdefault(f"{each['tags'][0]} {version}".strip(), [])
        folder.append(postman_call(method, path, each))
    token = {"key": "token", "value": "{{token}}", "type": "string"}
    schema = "https://schema.getpostman.com/json/collection/v2.1.0/collection.json"
    setup = SETUP % json.dumps(example_of(USER, "Create"))
    return {
        "info": {"name": "userapi", "version": __version__, "schema": schema},
        "item": calls + [{"name": n, "item": calls} for n, calls in folders.items()],
        "event": [script("prerequest", setup), script("test", CLEANUP)],
        "auth": {"type": "bearer", "bearer": [token]},
        "variable": [{"key": "baseUrl", "value": url}, {"key": "token", "value": ""}],
    }


@operations(("get_postman", "GET", "/postman.json", "The Postman collection."))
def get_postman(call: Call) -> Answer:
    return Answer(document(postman, base_url(call)))


def base_url(call: Call) -> str:
    scheme, host = call.environ["wsgi.url_scheme"], call.header("HOST") or "localhost"
    return f"{scheme}://{host}{call.prefix}"


# ── Page ──────────────────────────────────────────────────────────────────────────

HTML_DOCUMENT = r"""
<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<link rel="icon" href="data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg'/>">
<style>{style}</style>
<body {about}>{body}<script>{script}</script>
"""  # noqa: E501

PAGE_STYLE = r"""
:root {
  color-scheme: light dark; accent-color: var(--accent); scroll-padding: 11rem 0;
  overflow-anchor: none; background: Canvas; --side: max(1rem, 50vw - 38rem);
  --accent: light-dark(#3b56c8, #94a8ff); --red: light-dark(#b3261e, #ff8d83);
  --soft: light-dark(#62656d, #9da0a9); --edge: light-dark(#c6c7c9, #484b53);
  --line: light-dark(#ececea, #2a2b2e); --on: light-dark(#fff, #121212);
}
* { box-sizing: border-box; overflow-wrap: anywhere; }
[hidden], .reader .write, .open #leave { display: none !important; }
body { margin: 0 var(--side); font: 0.9375rem/1.5 system-ui, sans-serif; }
h1, h2 { font-size: 1.125rem; font-weight: 600; }
h1, h2, p, fieldset { margin: 0; padding: 0; border: 0; }
a { color: inherit; text-decoration: none; }
button, select, ::file-selector-button, input:not([type=checkbox]) {
  height: 2.375rem; padding: 0 0.875rem; border: 1px solid var(--edge); border-radius: 8px;
  background: Canvas; color: CanvasText; font: inherit;
}
:is(button, a):hover, .user:has(:hover, :focus, :checked) { background: var(--line); }
button:disabled { opacity: 0.5; }
.primary, .primary:hover { border-color: #0000; background: var(--accent); color: var(--on); }
.danger, .error { color: var(--red); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
header, footer, #bulk, #toast { display: flex; flex-wrap: wrap; gap: 0.5rem; align-items: center; }
@media (height > 24em) { header, thead { position: sticky; top: 0; background: Canvas; } }
header { padding: 0.8125rem 0; }
#count { flex: 1; color: var(--soft); }
table, thead, tbody { display: block; }
thead { top: 6.875rem; }
tr {
  display: grid; align-items: center; padding: 0.5rem 0; border-bottom: 1px solid var(--line);
  grid: auto / 2.5rem repeat(auto-fit, minmax(min(9rem, 44%), 4fr) minmax(min(8rem, 39%), 3fr));
}
th, td {
  overflow: hidden; padding: 0.25rem 0.5rem; color: var(--soft); font-weight: 400;
  text-align: left; text-overflow: ellipsis; white-space: nowrap;
}
tr > :first-child { grid-row: span 2; }
tr button { all: inherit; max-width: 100%; margin: 0 -2px; padding: 0 2px; }
td button { color: CanvasText; font-weight: 500; }
[aria-sort=ascending] > ::after { content: " ↑"; }
[aria-sort=descending] > ::after { content: " ↓"; }
[type=checkbox] { width: 1rem; height: 1rem; vertical-align: middle; }
tbody:empty { padding: 0 !important; }
#state { display: grid; justify-items: center; gap: 1rem; padding: 4rem 1rem; color: var(--soft); }
#toast, #menu, dialog {
  border: 1px solid var(--line); border-radius: 12px; background: Canvas;
  box-shadow: 0 8px 30px #0003;
}
#toast { position: fixed; inset: auto 0 1rem; width: fit-content; margin: auto; padding: 0.75rem; }
[role=status]:has(p:empty) { opacity: 0; pointer-events: none; }
#menu { inset: 3.5rem var(--side) auto auto; width: 16rem; margin: 0; padding: 0.375rem; }
#menu > * { display: block; width: 100%; padding: 0.5rem 0.75rem; border: 0; text-align: start; }
dialog { width: 36rem; padding: 1.5rem 1.5rem 0; }
dialog::backdrop { background: #0006; }
footer {
  justify-content: end; margin: 1.5rem -1.5rem 0; padding: 0.875rem 1.5rem;
  position: sticky; bottom: 0; border-top: 1px solid var(--line); background: Canvas;
}
#delete { margin-inline-end: auto; }
#other:empty, #other button, p:empty { display: none; }
label, label :is(input, select), progress, output, footer p { display: block; width: 100%; }
.field { margin-top: 0.5rem; color: var(--soft); font-size: 0.8125rem; line-height: 1.875; }
.field > :is(input, select) { font-size: 1rem; }
.field [aria-invalid] { border-color: var(--red); }
legend { padding: 1rem 0 0.5rem; font-weight: 600; }
[name] > .item {
  display: grid; grid: auto / repeat(auto-fit, minmax(min(11rem, 100%), 1fr)); gap: 0 0.75rem;
  position: relative; margin-bottom: 0.5rem; padding: 0 0.75rem 0.75rem;
  border: 1px solid var(--line); border-radius: 10px;
}
[name=drop] { position: absolute; right: 0; height: 2rem; border: 0; background: none; }
#versions { display: grid; grid: auto / repeat(auto-fit, minmax(min(14em, 100%), 1fr)); gap: 1rem; }
:has(+ #other:not(:empty))::before, #other::before { content: attr(aria-label); line-height: 2.5; }
.drop { padding: 2rem 1rem; border: 2px dashed var(--edge); text-align: center; }
#file { width: auto; max-width: 100%; margin: auto; padding: 0; border: 0; }
#report { margin-top: 1rem; white-space: pre-line; }
"""  # noqa: E501

PAGE_SCRIPT = r"""
"use strict";
const $ = (id) => document.getElementById(id), { base, seq } = document.body.dataset;
const home = location.origin + base, api = `${home}/api/v2/user`, SIZE = 100; // users a page
const body = $("rows"), search = $("search"), selected = new Map(); // users by id
let q, sort, pages, origin, shown, latest, stream, timer, user, key, doomed, since = seq, total = 0;
const who = (users) => users[1] ? `${users.length} users` : `\u2068${users[0].name}\u2069`;
function show(node, text) { // what stands there already is not told again
  if (node.textContent !== text) node.textContent = text;
}
function say(place, text, act, label) { // a message, and what to do about it
  const [said, button] = $(place).children;
  show(said, text);
  Object.assign(button, { textContent: label, onclick: act, hidden: !act });
}
function done(text, undo) { // a passing message
  say("toast", text, undo, "Undo");
  setTimeout(() => $("toast").firstChild.textContent === text && say("toast", ""), 15000);
  list(true);
}
async function call(method, url, body, headers) { // the answer; a problem has a status
  headers = { "Content-Type": "application/json", ...headers };
  const lost = { status: 503, detail: "The server did not answer. Try again." };
  return fetch(url, { method, headers, body }).then((got) => got.json()).catch(() => lost);
}
const change = (method, { id, version }, body) =>
  call(method, `${api}/${id}`, body, { "If-Match": `"${version}"` });
function why({ detail, errors = [] }) { // a problem with all its errors, a line each
  const place = ({ line, pointer, parameter }) => parameter ?? `Line ${line}: ${pointer.slice(2)}`;
  return [detail, ...errors.map((each) => `${place(each)} ${each.detail}`)].join("\n");
}
// The list: pages follow each other by cursor; those near the view are in the document.
const query = (more) => `${api}?${new URLSearchParams({ q, sort, ...more })}`;
function restart() { // the address holds what is searched and how it is sorted
  ({ q = "", sort = "name" } = Object.fromEntries(new URLSearchParams(location.search)));
  search.value = q;
  for (const { value, parentNode } of document.querySelectorAll("th button"))
    parentNode.ariaSort = { [value]: "ascending", [`-${value}`]: "descending" }[sort] ?? "none";
  [pages, origin] = [[query({ limit: SIZE })], 0]; // addresses; how many were dropped
  list(true);
}
function go(change) { // to another search or order; typing is one step of the history
  const step = change.sort || !history.state ? "pushState" : "replaceState";
  history[step](!change.sort, "", `?${new URLSearchParams({ q, sort, ...change })}`);
  scrollTo(0, 0);
  restart();
}
async function list(anew) { // the pages near the view
  const tall = SIZE * (body.rows[0]?.offsetHeight ?? 48), rows = [];
  const last = Math.floor((scrollY + 2 * innerHeight) / tall);
  const first = Math.max(0, Math.min(last - 2, pages.length - 1));
  if (origin && !scrollY) return restart();
  if (first * tall > 1e7) { // more may not be laid out: drop what is far above
    origin += pages.splice(0, 1000).length;
    return scrollBy(0, -1000 * tall);
  }
  if (last === shown && !anew) return;
  [latest, shown, timer] = [rows, last, null];
  let n = first;
  for (; n <= last && n < pages.length; n++) {
    const got = await call("GET", pages[n] + (anew && n === first ? "&count=true" : ""));
    if (rows !== latest) return; // the answer to an older question never wins
    if (got.status) return paint([], 0, why(got));
    rows.push(...got.results.map(row));
    total = got.total ?? total; // scrolling counts nobody anew
    if (got.next) pages[n + 1] = location.origin + got.next.replace("&count=true", "");
    else pages.length = n + 1;
  }
  body.style.paddingBlock = `${first * tall}px ${(pages.length - n) * tall}px`;
  paint(rows, (origin + first) * SIZE + 2);
}
function paint(rows, index, fault = "") {
  const active = document.activeElement;
  body.replaceChildren(...rows);
  active.focus({ preventScroll: true }); // who had it keeps it
  rows.forEach((tr, n) => (tr.ariaRowIndex = index + n));
  $("list").ariaRowCount = total + 1;
  choose([]);
  if (fault || total) say("state", fault, fault && restart, "Try again");
  else if (q) say("state", `No name or mail holds “${q}”.`, () => go({ q: "" }), "Show all");
  else if ($("new").disabled) say("state", "No users yet."); // for who only reads
  else say("state", "No users yet. Add one, or drop a file here.", acts.create, "New user");
  if (!(stream?.readyState < EventSource.CLOSED)) follow();
}
function row(user) {
  const tr = $(`user-${user.id}`) ?? $("row").content.firstElementChild.cloneNode(true);
  if (tr.user?.version === user.version) return tr;
  const texts = [user.name, user.phone[0]?.number, user.mail, user.address[0]?.city];
  tr.querySelectorAll("[dir]").forEach((cell, n) => (cell.textContent = texts[n] ?? ""));
  tr.querySelector("input").ariaLabel = `Select ${user.name}`;
  if (selected.has(user.id)) selected.set(user.id, user);
  return Object.assign(tr, { user, id: `user-${user.id}` });
}
function choose(users, on) { // select these, or unselect
  for (const one of users) selected[on ? "set" : "delete"](one.id, one);
  const some = selected.size > 0;
  const what = some ? `${api}?id=${[...selected.keys()]}` : query();
  show($("count"), some ? `${selected.size} selected` : total.toLocaleString());
  [$("bulk").hidden, $("new").hidden] = [!some, some];
  for (const tr of body.rows) tr.querySelector("input").checked = selected.has(tr.user.id);
  $("all").checked = some && !body.querySelector("input:not(:checked)");
  for (const a of document.querySelectorAll("[download]"))
    a.href = `${what}&format=${a.download.slice(6)}`;
}
function follow() { // what others change; not in hidden tabs, as connections are few
  stream = new EventSource(`${home}/api/changes?since=${since}`);
  stream.onmessage = ({ data }) => {
    const { seq, op, user } = JSON.parse(data);
    [since, timer] = [seq, timer ?? setTimeout(list, 500, true)];
    if (op === "delete") selected.delete(user);
  };
  stream.onerror = () => stream.readyState === EventSource.CLOSED && setTimeout(list, 5000, true);
}
// The form is made of the server's table of fields; errors find their place by its names.
const add = (list, item) => list.insertBefore(sheet(list.name, item), list.lastElementChild);
function sheet(shape, item = {}) {
  const node = $(shape).content.firstElementChild.cloneNode(true);
  for (const input of node.querySelectorAll("input")) input.value = item[input.name] ?? "";
  for (const list of node.querySelectorAll("fieldset"))
    item[list.name]?.forEach((each) => add(list, each));
  return node;
}
function read(node) {
  const item = {};
  for (const { name, type, value } of node.querySelectorAll(":scope > label > input"))
    item[name] = type === "number" ? +value || undefined : value;
  for (const list of node.querySelectorAll("fieldset"))
    item[list.name] = [...list.querySelectorAll(".item")].map(read);
  return item;
}
function edit(one) {
  [user, key, $("delete").hidden] = [one, Math.random(), !one];
  [$("title").textContent, $("error").textContent] = [one?.name ?? "New user", ""];
  $("fields").replaceChildren(sheet("user", one));
  $("other").replaceChildren();
  $("form").showModal();
}
const changes = (old = read(sheet("user", user))) => // the rest is not sent, need not be valid
  Object.entries(read($("fields").firstChild)).filter(
    ([name, value]) => JSON.stringify(value) !== JSON.stringify(old[name]));
async function save(event) {
  event.preventDefault();
  const content = JSON.stringify({ item: Object.fromEntries(changes()) }), mine = key;
  const got = user
    ? await change("PATCH", user, content)
    : await call("POST", api, content, { "Idempotency-Key": key });
  const theirs = got.status === 412 && (await call("GET", `${api}/${user.id}`)).results;
  const text = got.detail ?? `Saved ${who(got.results)}`;
  if (key !== mine) return done(text); // the form is another's by now
  if (got.status === 404) [user, got.detail] = [undefined, "It was deleted. Save it anew?"];
  if (theirs) { // someone was faster: what they saved is shown beside
    [user] = theirs;
    $("other").replaceChildren(sheet("user", user));
    got.detail = "Someone else saved first. Save yours, or cancel and keep theirs.";
  }
  if (got.status === 422 && !got.errors) // after an answer that was lost
    [key, got.detail] = [Math.random(), "The first try was saved. Save this as one more?"];
  if (got.status) return blame(got);
  $("form").close();
  done(text);
}
function blame({ detail, errors = [] }) { // each error stands at what its pointer names
  [$("error").textContent, $("delete").hidden] = [detail, !user];
  for (const node of $("fields").querySelectorAll(".error, input"))
    [node.textContent, node.ariaInvalid] = ["", null];
  for (const { pointer, detail } of errors) {
    let part = $("fields").firstChild;
    for (const name of pointer.split("/").slice(2))
      part = part.querySelector(`[name="${name}"]`) ?? part.querySelectorAll(".item")[name] ?? part;
    if (part.matches("input")) part.ariaInvalid = "true";
    (part.closest("label") ?? part).querySelector(":scope > .error")?.append(`${detail}. `);
  }
  $("fields").querySelector("[aria-invalid]")?.focus();
}
// Several at once: import, also of what was deleted, which keeps its ids and times.
async function restore(users) {
  say("toast", "");
  const lines = users.map((one) => JSON.stringify(one)).join("\n");
  const got = await call("POST", api, lines, { "Content-Type": "application/x-ndjson" });
  done(got.detail ?? `Restored ${who(users)}`, got.status && (() => restore(users)));
}
async function upload(dry, files = $("file").files) {
  const [file] = ($("file").files = files), url = `${api}?conflict=${$("conflict").value}`;
  if (!file) return;
  const headers = { "Content-Type": /json/i.test(file.name) ? "application/x-ndjson" : "text/csv" };
  if (!dry) headers["Idempotency-Key"] = file.key ??= Math.random(); // tried again, it adds once
  [$("progress").hidden, $("upload").disabled] = [false, true];
  const got = await call("POST", `${url}&dry_run=${dry}`, file, headers);
  const counts = `${got.created} new, ${got.replaced} replaced, ${got.skipped} skipped`;
  [$("progress").hidden, $("upload").disabled] = [true, got.status < 500];
  const here = $("file").files[0] === file; // not closed by now
  if (here) $("report").value = `${file.name}\n${got.status ? why(got) : counts}`;
  if (dry || (here && got.status)) return;
  if (here) $("import").close();
  done(got.detail ?? `Imported: ${counts}`);
}
const acts = { // of the buttons, by their names
  add: ({ parentNode }) => add(parentNode).querySelector("input").focus(),
  all: ({ checked }) => choose([...body.rows].map((tr) => tr.user), checked),
  bring: () => $("import").showModal(),
  close: () => $("form").close(),
  create: () => edit(),
  drop: ({ parentNode }) => parentNode.remove(),
  leave: () => location.assign(`${home}/`.replace("//", "//logout:@")), // by a wrong login
  sort: ({ value }) => go({ sort: sort === value ? `-${value}` : value }),
  unselect: () => choose(selected.values(), false),
  upload: () => upload(false),
  remove() { // the user of the form, or all who are selected
    doomed = $("form").open ? [user] : [...selected.values()];
    $("ask-title").textContent = `Delete ${who(doomed)}?`;
    $("ask").showModal();
  },
  async erase(_, users = doomed) {
    $("form").close();
    const some = (n) => Promise.all(users.slice(n, n + 500).map((one) => change("DELETE", one)));
    const told = []; // of portions, as a browser gives up thousands at once
    while (told.length < users.length) told.push(...(await some(told.length)));
    const gone = users.filter((_, n) => !told[n].status), fault = told.find((got) => got.status);
    const text = fault ? `Not all deleted: ${fault.detail}` : `Deleted ${who(gone)}`;
    choose(gone, false);
    done(text, gone[0] && (() => restore(gone)));
  },
};
document.onclick = ({ target }) => {
  const tr = target.closest(".user"), button = target.closest("button[name], #all");
  target.closest("#menu")?.hidePopover(); // first: the focus goes back
  if (button) acts[button.name](button);
  else if (tr && target.matches("input")) choose([tr.user], target.checked);
  else if (tr && !String(getSelection())) edit(tr.user);
};
document.onkeydown = (event) => { // keys act where no text is typed; the menu shows them
  const button = document.querySelector(`[aria-keyshortcuts="${CSS.escape(event.key)}"]`);
  const busy = event.target === search || document.querySelector(":modal, :popover-open");
  if (!button || busy || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  button.click();
};
document.ondragover = document.ondrop = (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  if (!$("import").open) acts.bring();
  if (event.type === "drop") upload(true, event.dataTransfer.files);
};
search.oninput = () => // once it has not changed for a while
  setTimeout((text) => search.value === text && q !== text && go({ q: text }), 150, search.value);
onbeforeunload = $("form").oncancel = (event) => { // Escape and a reload lose nothing typed
  if (!$("form").open || !changes().length) return;
  event.preventDefault();
  $("error").textContent = "Not saved yet. Save, or cancel.";
};
$("form").onsubmit = save;
$("import").onclose = ({ target }) => target.firstChild.reset();
$("file").onchange = $("conflict").onchange = () => upload(true);
onscroll = () => list();
onpopstate = restart;
document.onvisibilitychange = () => (document.hidden ? stream?.close() : list(true));
for (const button of document.querySelectorAll(".reader .write")) button.disabled = true;
restart();
"""  # noqa: E501

PAGE_HTML = r"""
<header><h1>Users</h1> <span id="count" role="status"></span>
  <span id="bulk" hidden><button class="danger write" name="remove">Delete…</button>
    <button name="unselect" aria-keyshortcuts="Escape" aria-label="Unselect">×</button></span>
  <button id="more" popovertarget="menu" aria-keyshortcuts="?" aria-label="More">···</button>
  <button id="new" class="primary write" name="create" aria-keyshortcuts="n">New user</button>
  <label aria-keyshortcuts="/"><input id="search" type="search"
    placeholder="Search name or mail" aria-label="Search"></label>
</header>
<nav id="menu" popover aria-label="More">
  <button class="write" name="bring" aria-keyshortcuts="i" autofocus>Import…</button>
  <a download="users.csv">Export as CSV</a> <a download="users.ndjson">Export as NDJSON</a>
  <a href="$prefix/docs">API reference</a> <button id="leave" name="leave">Log out</button>
  <p>Keys, where no text is typed: <kbd>/</kbd> search, <kbd>n</kbd> new user, <kbd>i</kbd>
    import, <kbd>u</kbd> undo, <kbd>Esc</kbd> unselect, <kbd>?</kbd> this menu</p>
</nav>
<main><noscript><p>This page needs JavaScript. The API does not.</p></noscript>
  <table id="list" aria-label="Users"><thead><tr>
    <th><input id="all" type="checkbox" name="all" aria-label="Select all">
    <th><button name="sort" value="name">Name</button><th>Phone
    <th><button name="sort" value="mail">Mail</button><th>City
  </thead><tbody id="rows"></tbody></table>
  <section id="state" role="status"><p></p><button hidden></button></section></main>
<div id="toast" role="status"><p></p><button aria-keyshortcuts="u" hidden>Undo</button></div>
<dialog id="form" aria-labelledby="title"><form novalidate><h2 id="title" dir="auto"></h2>
  <div id="versions"><fieldset id="fields" aria-label="Yours"></fieldset>
    <fieldset id="other" aria-label="Theirs" disabled></fieldset></div>
  <footer><p id="error" class="error" role="alert"></p>
    <button id="delete" type="button" class="danger write" name="remove">Delete…</button>
    <button type="button" name="close">Cancel</button>
    <button class="primary write">Save</button></footer></form></dialog>
<dialog id="import" aria-label="Import users"><form method="dialog"><h2>Import users</h2>
  <label class="field drop">Drop a CSV or NDJSON file here, or choose one
    <input id="file" type="file" accept=".csv,.ndjson,.jsonl,.json"></label>
  <label class="field">When an id is taken<select id="conflict"><option value="fail">refuse the file
    <option value="skip">keep the old user<option value="replace">take the new user</select></label>
  <progress id="progress" aria-label="Progress" hidden></progress><output id="report"></output>
  <footer><button>Close</button>
    <button id="upload" type="button" class="primary" name="upload">Import</button></footer>
</form></dialog>
<dialog id="ask" aria-labelledby="ask-title"><form method="dialog"><h2 id="ask-title"></h2>
  <footer><button>Cancel</button> <button class="danger" name="erase">Delete</button></footer>
</form></dialog>
<template id="row"><tr class="user"><td><input type="checkbox"><td><button dir="auto"></button>
  <td dir="auto"><td dir="auto"><td dir="auto"></template>$sheets
"""  # noqa: E501


def html_answer(style: str, script: str, **parts: str) -> Answer:
    """A document and its Content-Security-Policy: this style and script, no others."""
    style, script = style.strip(), script.strip()
    digests = (hashlib.sha256(text.encode()).digest() for text in (style, script))
    policy = (
        "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}';"
        " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    ).format(*(base64.b64encode(digest).decode() for digest in digests))
    text = HTML_DOCUMENT.strip().format(style=style, script=script, **parts)
    return Answer(text.encode(), [("Content-Security-Policy", policy)], HTML)


FORM_FIELD = (
    '<label class="field">{0.title}<input name="{0.name}" type="{0.input}" dir="auto"'
    ' autocomplete="off"><small class="error"></small></label>'
)
FORM_LIST = (
    '<fieldset name="{0.name}"><legend>{0.title}</legend><small class="error"></small>'
    '<button type="button" name="add" class="write">Add {0.name}</button></fieldset>'
)
FORM_ROW = (
    '<label hidden><input name="id" type="number"></label><small class="error"></small>'
    '<button type="button" name="drop" class="write" aria-label="Remove this {0.name}">'
    "×</button>"
)


def form_sheet(shape: Shape) -> str:
    """The template of a form for what has this shape."""
    parts = [(FORM_LIST if f.rows else FORM_FIELD).format(f) for f in shape.written]
    inner = "".join(parts) + FORM_ROW.format(shape) * (shape is not USER)
    return f'<template id="{shape.name}"><div class="item">{inner}</div></template>'


@operations(("get_page", "GET", "/", "The admin page.", (), (HTML,)))
def get_page(call: Call) -> Answer:
    path = html.escape(call.prefix)
    sheets = "".join(map(form_sheet, (USER, *SHAPES.values())))
    kinds = "open" * (call.actor is None) + " reader" * (call.role != "admin")
    about = f'data-base="{path}" data-seq="{call.store.last_seq()}" class="{kinds}"'
    body = PAGE_HTML.strip().replace("$prefix", path).replace("$sheets", sheets)
    return html_answer(PAGE_STYLE, PAGE_SCRIPT, title="Users", about=about, body=body)


DOCS_STYLE = r"""
:root { scroll-padding: 0; }
body { display: grid; grid-template-columns: 16rem minmax(0, 1fr); gap: 3rem; }
nav { position: sticky; top: 0; height: 100dvh; overflow: auto; padding: 2rem 0.25rem; }
nav a { display: block; font-size: 0.8125rem; }
main { padding: 2rem 0; }
article { padding: 1.5rem 0; border-top: 1px solid var(--line); }
p { margin: 0.75rem 0; }
form {
  display: grid; gap: 0 1rem;
  grid: auto / repeat(auto-fill, minmax(min(16rem, 100%), 1fr));
}
.field { align-self: end; }
form > :not(label) { grid-column: 1 / -1; justify-self: start; margin-top: 0.75rem; }
b, code, pre, output, textarea { font: 0.8125rem/1.6 ui-monospace, monospace; }
b { color: var(--accent); font-weight: 600; }
pre, output:not(:empty), textarea {
  display: block; width: 100%; margin: 0.5rem 0; padding: 0.75rem 1rem;
  border: 1px solid var(--edge); border-radius: 8px; white-space: pre-wrap;
}
@media (max-width: 60rem) {
  body { display: block; }
  nav { position: static; height: 14rem; border-bottom: 1px solid var(--line); }
}
"""

DOCS_SCRIPT = r"""
"use strict";
async function send({ dataset: { method, path }, elements }) {
  const query = new URLSearchParams(), headers = { "Content-Type": "application/json" };
  let url = location.origin + path;
  for (const { name, value, dataset: { in: place } } of elements) {
    if (place === "path") url = url.replace(`{${name}}`, encodeURIComponent(value));
    else if (place === "header" && value) headers[name] = value;
    else if (place === "query" && value) query.append(name, value);
  }
  url += `?${query}`;
  if (!/GET|POST/.test(method) && !confirm(`${method} ${url}`)) return "Not sent.";
  const body = elements.body?.value;
  const got = await fetch(url, { method, headers, body });
  const head = [...got.headers].map((pair) => pair.join(": ")).join("\n");
  const text = (await got.text()).slice(0, 20000); // a list may be long
  return `${got.status} ${got.statusText}\n${head}\n\n${text}`;
}
document.onsubmit = async (event) => {
  event.preventDefault();
  const output = event.target.querySelector("output");
  output.value = await send(event.target).catch(() => "The server did not answer.");
};
document.onclick = ({ target }) => {
  if (target.className !== "copy") return;
  getSelection().selectAllChildren(target.previousElementSibling);
  document.execCommand("copy");
};
"""

DOCS_HTML = r"""
<nav aria-label="Operations">
  <a href="{prefix}/">← Users</a>
  <a href="{prefix}/openapi.json">OpenAPI</a>
  <a href="{prefix}/postman.json">Postman</a> {links}
</nav>
<main>
  <h1>API reference</h1>
  <p>Paths under <code>/api/v2</code> are given; the same ones under
    <code>/api/v1</code>, or <code>/api</code> alone, show v1's members.</p>
  {articles}
</main>
"""
DOCS_LINK = '<a href="#{operationId}"><b>{method}</b> {path}</a>\n'
DOCS_INPUT = """<label class="field"><code>{name}</code> ({in}): {description}
<input name="{name}" data-in="{in}" value="{example}"></label>"""
DOCS_BODY = '<textarea name="body" rows="6" aria-label="Body">{}</textarea>'
DOCS_ARTICLE = """
<article id="{operationId}">
  <h2><b>{method}</b> <code>{path}</code></h2>
  <p>{summary} Answers {answers}.</p>
  <pre>{curl}</pre><button class="copy">Copy</button>
  <form data-method="{method}" data-path="{prefix}{path}">
    {inputs}{body}<button class="primary">Send</button><output></output>
  </form>
</article>
"""


@operations(("get_reference", "GET", "/docs", "The reference for people.", (), (HTML,)))
def get_reference(call: Call) -> Answer:
    return reference(call.prefix, base_url(call))


@functools.lru_cache(maxsize=8)
def reference(prefix: str, url: str) -> Answer:
    """The OpenAPI document as a page, whose examples call this URL."""
    links, articles = "", ""
    for path, methods in openapi(prefix)["paths"].items():
        for method, spec in methods.items():
            if not re.match("/api/(?!v2/)", path):
                values = operation_values(url, method.upper(), path, spec)
                values["prefix"] = html.escape(prefix)
                links += DOCS_LINK.format_map(values)
                articles += DOCS_ARTICLE.format_map(values)
    body = DOCS_HTML.format(prefix=html.escape(prefix), links=links, articles=articles)
    style, title = PAGE_STYLE + DOCS_STYLE, "API reference"
    return html_answer(style, DOCS_SCRIPT, title=title, about="", body=body)


def operation_values(url: str, method: str, path: str, spec: Item) -> Item:
    """What the article of an operation shows, by name, as HTML."""
    curl, body = f"curl -X {method} {url}{path}", ""
    if "requestBody" in spec:
        sent = spec["requestBody"]["content"][JSON]["example"]
        curl += f" -H 'Content-Type: {JSON}' -d '{to_json(sent).decode()}'"
        text = json.dumps(sent, indent=2, ensure_ascii=False)
        body = DOCS_BODY.format(html.escape(text))
    values = {**spec, "method": method, "path": path, "curl": curl}
    values["answers"] = ", ".join(spec["responses"])
    fields = [escaped({"example": "", **each}) for each in spec["parameters"]]
    inputs = "".join(map(DOCS_INPUT.format_map, fields))
    return {**escaped(values), "inputs": inputs, "body": body}


def escaped(values: Item) -> Item:
    return {name: html.escape(str(value)) for name, value in values.items()}


# ── Server ────────────────────────────────────────────────────────────────────────

_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
#: method, authority (or None), path, query (or None) and version
REQUEST_LINE = re.compile(
    rf"({_TOKEN}) (?:(?i:https?)://([!\"$-.0->@-~]+)(?=[/? ]))?"
    r"([!\"$->@-~]*)(?:\?([!\"$-~]*))? HTTP/([0-9]\.[0-9])"
)
#: the whole header section: no folding, no control bytes, no space before a colon
SECTION = re.compile(rf"(?:{_TOKEN}:[\t -~\x80-\xff]*\r\n)*".encode("latin-1"))
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})(?:;[\t\x20-\x7e\x80-\xff]*)?")
FRAMING = re.compile(rb"(?im)^(?:content-length|transfer-encoding):")
BARE = re.compile(rb"(?<!\r)\n|\r(?=[^\n])")
#: requests for which all users are looked through: a million take 0.2 s
SCAN = re.compile("[?&](?:q|count)=|/metrics")
#: what a client may wrongly put into a URI, and no log is to have
SECRET = re.compile(r"([?&][^?=&\s]*(?:token|password)=)[^&\s]*", re.IGNORECASE)
HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(?::[0-9]*)?")
#: fields that tell of a body
WITH_BODIES = frozenset(("HTTP_TRANSFER_ENCODING", "CONTENT_LENGTH", "HTTP_EXPECT"))
ALONE = frozenset(("HTTP_HOST", "CONTENT_LENGTH", "CONTENT_TYPE", "HTTP_AUTHORIZATION"))
BACKLOG = 1024  # connections that wait to be accepted
READ_SIZE = 64 * 1024  # bytes that are read at a time
BODY_RATE = 256 * 1024  # bytes of a body for which it has a second more
UNASKED = 64 * 1024  # bytes of a body that are taken before the guard is asked
SEND_SIZE = 64 * 1024  # bytes that may wait for the end of the turn
WAKE = 0.2  # seconds after which a stream that had nothing is asked again
PAUSE = 0.05  # seconds between two commits after which streams are asked
LARGE = 16 << 20  # bytes of a database from which on threads look through it
THREADS = 4  # that do so, or ask a database which is not in this process
SLOW_SYNC = 0.002  # seconds from which on a commit is given to a thread
GATHER = 0.01  # seconds for which a group takes up what comes while it is run
BURST = 32  # requests of one connection that are answered in one turn
GRACE = 5  # seconds that are left to what was begun when the server is told to stop
LOG_ROOM = 2 << 20  # characters of the access log that wait to be written
#: the members of a line of the access log in JSON
TOLD = ("at", "peer", "actor", "request", "status", "bytes", "ms", "referer", "agent")
#: a part of a line of the log, in quotes, on one line and in ASCII
quoted = json.encoder.encode_basestring_ascii
DRAIN = 1  # seconds for which the rest of a refused request is read and dropped


def refuse_unless(well: object, what: str) -> None:
    if not well:
        raise Problem(400, f"{what} is malformed")


def parse_fields(section: bytes, most: int) -> Environ:
    """A header section as WSGI variables (RFC 9112 §5). Raises Problem 400, 431."""
    refuse_unless(SECTION.fullmatch(section), "a header field")
    lines = section.decode("latin-1").split("\r\n")[:-1]
    if len(lines) > most:
        raise Problem(431, f"{most} header fields are the most")
    environ: Environ = {}
    for line in lines:
        name, _, value = line.partition(":")
        if "_" in name:  # could not be told from the same name with a hyphen
            continue
        key = name.upper().replace("-", "_")
        if key not in ("CONTENT_LENGTH", "CONTENT_TYPE"):
            key = f"HTTP_{key}"
        value = value.strip(" \t")
        if key not in environ:
            environ[key] = value
        elif key in ALONE:
            raise Problem(400, f"{name} stands twice")
        else:
            environ[key] += f",{value}"
    refuse_unless(HOST.fullmatch(environ.get("HTTP_HOST", "")), "Host")
    return environ


def without_secrets(uri: str) -> str:
    return SECRET.sub(r"\1…", uri) if "=" in uri else uri


def parse_line(line: bytes, fields: Environ) -> Environ:
    """The fields, and a request line (RFC 9112 §3) as WSGI variables, the path decoded,
    as latin-1. Raises Problem 400, 505."""
    text = line.decode("latin-1")
    match = REQUEST_LINE.fullmatch(text)
    if not match:
        raise Problem(400, "the request line is malformed")
    method, authority, path, query, version = match.groups()
    if version not in ("1.0", "1.1"):
        raise Problem(505, "speak HTTP/1.1")
    environ = fields
    if authority is not None:
        environ, path = {**fields, "HTTP_HOST": authority}, path or "/"
        refuse_unless(HOST.fullmatch(authority), "the request target")
    well = path[:1] == "/" or (method, path, query) == ("OPTIONS", "*", None)
    refuse_unless(well and not BAD_ESCAPE.search(path), "the request target")
    return {
        **environ,
        "REQUEST_METHOD": method,
        "PATH_INFO": unquote(path, "latin-1"),
        "QUERY_STRING": query or "",
        "SERVER_PROTOCOL": f"HTTP/{version}",
        "userapi.request": without_secrets(text),
        "userapi.keep": version == "1.1",  # the connection, if no field says otherwise
    }


class Parser:
    """What one client sends, taken apart into requests (RFC 9112).

    Methods raise Problem where it cannot be read any further.
    """

    def __init__(self, server: Server, peer: str) -> None:
        self.server, self.settings, self.peer = server, server.settings, peer
        self.buffer = b""  # what has arrived and has not been read
        self.section = b"\0"  # the last header section
        self.begun = False  # a part of a head has arrived
        self.environ: Environ | None = None  # the head of a request under way
        self.invites = False  # its client waits to be told to send the body
        self.body: bytearray | None = None
        self.held = 0  # bytes counted in server.bodies
        self.deadline = time.monotonic() + self.settings.idle_timeout

    def is_idle(self) -> bool:
        """Whether nothing of a request has arrived."""
        return self.environ is None and not self.buffer

    def next_request(self) -> Environ | None:
        """The environment of the next request; None while it is not all there."""
        if self.environ is None and not self.read_head() or not self.read_body():
            return None
        environ, self.environ = self.environ, None
        body, self.body = self.body, None
        if environ is not None and body is not None:
            environ["CONTENT_LENGTH"] = str(len(body))
            environ["wsgi.input"] = io.BytesIO(body)
        return environ

    def give_up(self) -> Environ:
        """What is known of the request under way, which is not read any further."""
        known, self.environ = self.environ, None
        return known or {**self.server.base, "REMOTE_ADDR": self.peer}

    def read_head(self) -> bool:
        """Take a head out of the buffer; False while it is not all there."""
        settings, buffer = self.settings, self.buffer
        end = buffer.find(b"\r\n\r\n")
        line_end = buffer.find(b"\r\n", 0, settings.max_line + 2)
        if line_end < 0 and len(buffer) > settings.max_line:
            raise Problem(414, f"{settings.max_line} bytes are the most of a line")
        # of CR LF CR LF all but the last may be there
        size = (end if end >= 0 else len(buffer) - 3) - line_end
        if size > settings.max_head and line_end >= 0:
            raise Problem(431, f"{settings.max_head} bytes are the most of a head")
        if end < 0:
            if not self.begun:
                self.begun = True
                self.deadline = time.monotonic() + settings.head_timeout
            if BARE.search(buffer):
                raise Problem(400, "a line does not end in CR LF")
            return False
        self.begun = False
        line, section = buffer[:line_end], buffer[line_end + 2 : end + 2]
        self.buffer = buffer[end + 4 :]
        if section != self.section:
            fields = parse_fields(section, settings.max_fields)
            # what it says, and what all requests here share
            self.fields = {**self.server.base, **fields, "REMOTE_ADDR": self.peer}
            self.section, self.line = section, b"\r\n"  # no line at all
        if line != self.line:
            self.head, self.line = parse_line(line, self.fields), line
        self.begin(self.head.copy())
        return True

    def begin(self, environ: Environ) -> None:
        """A head is whole: prepare for its body."""
        modern = environ["userapi.keep"]
        if modern and "HTTP_HOST" not in self.fields:
            raise Problem(400, "Host is missing")
        if value := environ.get("HTTP_CONNECTION"):
            tokens = [token.strip() for token in value.lower().split(",")]
            keep = modern or "keep-alive" in tokens
            environ["userapi.keep"] = keep and "close" not in tokens
        self.environ = environ
        if not WITH_BODIES.isdisjoint(self.fields):
            self.expect_body(environ, modern)

    def expect_body(self, environ: Environ, modern: bool) -> None:
        """Learn from the head what body is to come (RFC 9112 §6, RFC 9110 §10.1.1)."""
        coding = environ.get("HTTP_TRANSFER_ENCODING")
        length = environ.get("CONTENT_LENGTH", "0")
        if coding is not None and ("CONTENT_LENGTH" in environ or not modern):
            raise Problem(400, "Transfer-Encoding does not go with this request")
        if coding is not None and coding.lower() != "chunked":
            raise Problem(501, "chunked is the one transfer coding")
        refuse_unless(length.isascii() and length.isdigit(), "Content-Length")
        expect = environ.get("HTTP_EXPECT", "100-continue").lower()
        if modern and expect != "100-continue":
            raise Problem(417, "100-continue is the one expectation")
        size = int(length.lstrip("0")[:19] or 0)  # no digits without end
        self.hold(size)
        if coding is not None or size:
            self.body, self.chunked = bytearray(), coding is not None
            self.missing = size  # bytes of it, or of its chunk, that are to come
            seconds = self.settings.body_timeout + size / BODY_RATE
            self.deadline = time.monotonic() + seconds
            if modern and "HTTP_EXPECT" in environ and not self.buffer:
                if not self.server.remote:  # there the guard may wait for the database
                    self.server.app.examine(environ)
                self.invites = True

    def hold(self, size: int) -> None:
        """Count bytes of a body that are to be kept. Raises Problem 413, 503, and what
        the guard does, so that who is let in finds room."""
        asked = self.held > UNASKED or self.server.remote  # there it may have to wait
        self.held += size
        self.server.bodies += size
        if self.held > self.settings.max_body:
            raise Problem(413, f"{self.settings.max_body} bytes are the most of a body")
        if self.held > UNASKED and not asked:
            self.server.app.admit(Call(self.server.app, dict(self.environ or {})))
        if self.server.bodies > max(self.settings.max_bodies, self.settings.max_body):
            raise busy("too many bodies are under way")

    def release(self) -> None:
        self.server.bodies -= self.held
        self.held = 0

    def read_body(self) -> bool:
        """Take body out of the buffer; False while it is not all there."""
        if self.body is None:
            return True
        if self.chunked:
            return self.read_chunks(self.body)
        part = self.buffer[: self.missing]
        self.body += part
        self.buffer = self.buffer[len(part) :]
        self.missing -= len(part)
        return not self.missing

    def read_chunks(self, body: bytearray) -> bool:
        """Take chunks out of the buffer (RFC 9112 §7.1); False before the last."""
        buffer, at, before = self.buffer, 0, -1
        while self.chunked and at != before:
            before = at
            if self.missing:
                at = self.read_chunk(buffer, at, body)
            else:
                at = self.read_chunk_line(buffer, at)
        self.buffer = buffer[at:]
        return not self.chunked

    def read_chunk(self, buffer: bytes, at: int, body: bytearray) -> int:
        """Take what is there of a chunk, and its CR LF; where that ends."""
        part = buffer[at : at + self.missing - 2]
        body += part
        at += len(part)
        self.missing -= len(part)
        if self.missing == 2:
            end = buffer[at : at + 2]
            refuse_unless(b"\r\n".startswith(end), "a chunk")
            if len(end) == 2:
                self.missing = 0
                at += 2
        return at

    def read_chunk_line(self, buffer: bytes, at: int) -> int:
        """Take a chunk's line, behind the last one the trailers; where that ends."""
        end = buffer.find(b"\r\n", at, at + 1024)
        if end < 0:
            short = len(buffer) - at < 1024
            refuse_unless(short and not BARE.search(buffer, at), "a chunk's line")
            return at
        match = CHUNK_LINE.fullmatch(buffer, at, end)
        refuse_unless(match, "a chunk's line")
        size = int(match[1], 16)  # type: ignore[index]
        if not size:
            return self.read_trailers(buffer, at, end)
        self.hold(size)
        self.missing = size + 2
        return end + 2

    def read_trailers(self, buffer: bytes, start: int, line_end: int) -> int:
        """Where the request ends; `start`, its last chunk's, while it does not."""
        end = buffer.find(b"\r\n\r\n", line_end)
        # of CR LF CR LF all but the last may be there
        trailers = buffer[line_end + 2 : end + 2 if end >= 0 else -1]
        if len(trailers) > self.settings.max_head:
            raise Problem(431, "the trailers are over the limit")
        if end < 0:
            refuse_unless(not BARE.search(trailers), "a trailer")
            return start
        well = SECTION.fullmatch(trailers) and not FRAMING.search(trailers)
        refuse_unless(well, "a trailer")
        self.chunked = False
        return end + 4


class Connection(asyncio.Protocol):
    """One client: its requests are answered one by one, in order (RFC 9112)."""

    def __init__(self, server: Server) -> None:
        self.server, self.settings = server, server.settings
        self.outgoing = b""  # answers that leave at the end of the turn
        self.busy = False  # a request is being answered
        self.working = False  # requests are being read, or will be in the next turn
        self.closing = False  # no further request will be read
        self.refused = False  # a request was not read to its end
        self.paused = False  # the client does not take what is written
        self.ended = False  # the client will send no more
        self.full = False  # enough has been read ahead: reading is paused
        self.stream: Iterator[bytes] | None = None
        self.chunked = False  # is how the stream is sent
        self.written = self.taken = 0

    # What asyncio calls

    def connection_made(self, transport: Any) -> None:  # uvloop's is none of asyncio's
        self.transport: asyncio.Transport = transport
        with contextlib.suppress(AttributeError):  # uvloop has a size of its own
            transport.max_size = READ_SIZE
        peer = transport.get_extra_info("peername")
        known = peer[0] if isinstance(peer, tuple) else "127.0.0.1"
        self.parser = Parser(self.server, known)
        self.server.connections.add(self)
        if len(self.server.connections) > self.settings.max_connections:
            self.refuse(busy("too many connections"))

    def connection_lost(self, fault: Exception | None) -> None:
        self.server.connections.discard(self)
        self.server.sleeping.discard(self)
        self.closing = True
        self.parser.release()
        if self.stream is not None:  # the client has left it
            self.server.note(self.streamed)
        self.end_stream()

    def data_received(self, data: bytes) -> None:
        if self.closing:
            return
        parser = self.parser
        parser.buffer = parser.buffer + data if parser.buffer else data
        if self.busy or self.paused or self.working:
            self.read_no_more()
        else:
            self.work()

    def eof_received(self) -> bool:
        self.ended = True
        if not (self.busy or self.paused or self.working):
            self.work()
        return self.transport.can_write_eof()

    def pause_writing(self) -> None:
        self.paused = True
        self.read_no_more()

    def resume_writing(self) -> None:
        self.paused = False
        self.server.loop.call_soon(self.pump if self.stream else self.work)

    # Requests

    def work(self) -> None:
        """Answer the requests that have arrived, in order; many in several turns."""
        self.working = True
        for _ in range(BURST):
            if self.busy or self.closing or self.paused or not self.parser.buffer:
                break
            if not self.answer_next():
                break
        else:
            self.server.loop.call_soon(self.work)
            return
        self.working = False
        if self.ended and not self.busy and not self.paused:
            self.close()
        elif self.full and not self.busy and not self.paused:
            self.full = False
            self.resume()

    def answer_next(self) -> bool:
        """Answer the next request; False while it is not all there, or is refused."""
        try:
            environ = self.parser.next_request()
        except Problem as problem:
            self.refuse(problem)
            return False
        if environ is None:
            if self.parser.invites:
                self.parser.invites = False
                self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            return False
        self.busy = True
        server = self.server
        direct = environ["REQUEST_METHOD"] in server.direct or not server.group
        if direct or server.is_quick(environ):
            self.answer(environ, self.call(environ))
        else:
            server.enqueue(self, environ)
        return True

    # Answers

    def call(self, environ: Environ) -> Given:
        """What the application answers: status, headers, body."""
        environ["userapi.began"] = time.perf_counter()
        start: list[Any] = []

        def start_response(*given: Any) -> None:
            start[:] = given  # a failure may come after what it takes the place of

        try:
            body = self.server.app(environ, start_response)
            return start[0], start[1], body
        except Exception as fault:  # not UserAPI's, but of what is wrapped around it
            return self.server.failed(fault, environ)

    def answer(self, environ: Environ, given: Given) -> None:
        """Send an answer. If it cannot be sent, that is the affair of this connection
        alone: others wait for the answers of the same turn."""
        try:
            self.give(environ, given)
        except Exception as fault:  # of what is wrapped around the application
            self.server.app.report(environ, fault)
            self.transport.abort()

    def give(self, environ: Environ, given: Given) -> None:
        """Send an answer: at once where it is whole, else as it is taken."""
        if self.transport.is_closing():
            close_body(given[2])
            return
        status, headers, body = given
        modern = environ["SERVER_PROTOCOL"] == "HTTP/1.1"
        keep = environ["userapi.keep"] and not self.server.stopping
        whole = isinstance(body, list)
        self.room = -1 if whole else find_length(headers)
        self.chunked = not whole and modern and self.room < 0
        keep = keep and (whole or self.chunked)
        try:
            lines = head_lines(status, tuple(headers))
        except ValueError as fault:
            self.give(environ, self.server.failed(fault, environ))
            return
        if self.chunked:
            lines += b"Transfer-Encoding: chunked\r\n"
        if not keep:
            lines += b"Connection: close\r\n"
        elif not modern:
            lines += b"Connection: keep-alive\r\n"
        head = b"%b%b\r\n" % (lines, self.server.date)
        self.closing = self.closing or not keep
        content = b"".join(body) if whole else b""
        environ["userapi.status"], environ["userapi.sent"] = status[:3], len(content)
        if whole or environ["REQUEST_METHOD"] == "HEAD":
            close_body(body)
            self.send(head + content)
            self.finish(environ)
        else:
            self.stream, self.streamed = iter(body), environ
            self.send(head)
            self.pump()

    def send(self, data: bytes) -> None:
        """Have this leave with what others are sent in this turn; much at once."""
        self.written += len(data)
        if not self.outgoing:
            self.server.expect_sending(self)
        self.outgoing += data
        if len(self.outgoing) > SEND_SIZE:
            self.send_out()

    def send_out(self) -> None:
        outgoing, self.outgoing = self.outgoing, b""
        if outgoing and not self.transport.is_closing():
            self.transport.write(outgoing)

    def close(self) -> None:
        self.send_out()
        self.transport.close()

    def pump(self) -> None:
        """Send a stream's next chunk, if the client takes it."""
        if self.stream is None or self.paused:
            return
        if self.server.group and not self.server.is_quick(self.streamed):
            stream, self.stream = self.stream, None  # nobody else is to touch it
            again = functools.partial(self.pulled, stream)
            self.server.readers.run(again, next, stream, None)
        else:
            self.push(outcome(next, self.stream, None))

    def pulled(self, stream: Iterator[bytes], chunk: Any) -> None:
        """A thread has the stream's next chunk."""
        self.stream = stream
        if self.transport.is_closing():
            self.server.note(self.streamed)
            self.end_stream()
        else:
            self.push(chunk)

    def push(self, chunk: Any) -> None:
        """Send a chunk; None is the end of the stream, an exception its failure. One
        that has nothing is asked again later, but ends when the server stops."""
        if isinstance(chunk, Exception):
            self.server.app.report(self.streamed, chunk)
            self.transport.abort()  # the client must see that it is not whole
            return
        if chunk and self.room >= 0:  # never more than was announced
            chunk = chunk[: self.room - self.streamed["userapi.sent"]] or None
        if chunk:
            self.streamed["userapi.sent"] += len(chunk)
            frame = b"%x\r\n%b\r\n" % (len(chunk), chunk) if self.chunked else chunk
            self.send(frame)
            self.server.loop.call_soon(self.pump)
        elif chunk is None or self.server.stopping:
            self.end_stream()
            if self.chunked:
                self.send(b"0\r\n\r\n")
            self.finish(self.streamed)
        else:
            self.server.sleep(self)

    def end_stream(self) -> None:
        stream, self.stream = self.stream, None
        close_body(stream)

    def finish(self, environ: Environ) -> None:
        """An answer is out: note it, and go on with the connection."""
        parser = self.parser
        self.server.note(environ)
        if parser.held:
            parser.release()
        self.busy = False
        parser.deadline = time.monotonic() + self.settings.idle_timeout
        if self.closing:
            self.hang_up()
        elif self.server.stopping or self.ended and not parser.buffer:
            self.close()
        elif not self.working and (parser.buffer or self.full):
            self.server.loop.call_soon(self.work)

    def refuse(self, problem: Problem) -> None:
        """Answer a request that cannot be read further, and close."""
        self.closing = self.refused = True
        environ = self.parser.give_up()
        environ.update({"userapi.keep": False, "userapi.began": time.perf_counter()})
        self.answer(environ, self.server.failed(problem, environ))

    def hang_up(self) -> None:
        """Half-close, and drop for a moment what still comes: a reset at once would
        take the answer with it. TLS cannot do that, and waits where more may come."""
        more, self.parser.buffer = self.refused or self.parser.buffer, b""
        self.send_out()
        can_half_close = self.transport.can_write_eof()
        if self.ended or not (more or can_half_close):
            self.transport.close()
            return
        with contextlib.suppress(OSError):  # the client may have gone
            if can_half_close:
                self.transport.write_eof()
        self.resume()
        self.server.loop.call_later(DRAIN, self.transport.close)

    def read_no_more(self) -> None:
        """Leave it to the client to keep what it sends, until what it sent before is
        answered, and taken: many who take nothing would fill the memory."""
        self.full = True
        self.transport.pause_reading()

    def resume(self) -> None:
        """Read on, if there is still a client: over TLS, before Python 3.11, its
        transport has gone a moment before connection_lost() says so."""
        with contextlib.suppress(AttributeError):
            self.transport.resume_reading()

    # Deadlines

    def unsent(self) -> int:
        if not self.transport.is_closing():
            with contextlib.suppress(AttributeError):  # as in resume()
                return len(self.outgoing) + self.transport.get_write_buffer_size()
        return 0

    def sweep(self, now: float) -> None:
        """Called every second: give up where a deadline has passed."""
        if self.busy or self.unsent():
            taken = self.written - self.unsent()
            if taken != self.taken or not self.unsent():
                self.taken = taken
                self.parser.deadline = now + self.settings.send_timeout
            elif now > self.parser.deadline:
                self.transport.abort()
        elif now > self.parser.deadline and not self.closing:
            if self.parser.is_idle():
                self.transport.close()
            else:
                self.refuse(Problem(408, "the request took too long to arrive"))


def find_length(headers: Headers) -> int:
    """The Content-Length that an answer announces; -1 where it does not."""
    sizes = [value for name, value in headers if name.lower() == "content-length"]
    return int(sizes[0]) if sizes else -1


@functools.lru_cache(maxsize=1024)
def head_lines(status: str, headers: tuple[tuple[str, str], ...]) -> bytes:
    """The head of an answer as the application gave it. Raises ValueError."""
    text = "\r\n".join([f"HTTP/1.1 {status}", *map(": ".join, headers), ""])
    if text.count("\n") != len(headers) + 1 or text.count("\r") != len(headers) + 1:
        raise ValueError("a header field holds a line break")
    return text.encode("latin-1")


def outcome(work: Callable[..., Any], *given: Any) -> Any:
    """What a function returns, or the exception that it raises."""
    try:
        return work(*given)
    except Exception as fault:
        return fault


def close_body(body: Any) -> None:
    if hasattr(body, "close"):
        body.close()


Turn = tuple[Connection, Environ]


class Readers:
    """Threads that ask the database, for the loop, where that may take long."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        import queue

        self.loop = loop
        self.wanted: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.found: collections.deque[Any] = collections.deque()
        self.told = False  # the loop, that something was found
        self.threads = self.busy = 0
        with contextlib.suppress(RuntimeError):  # a limit on threads or memory
            while self.threads < THREADS:
                threading.Thread(target=self.work, daemon=True).start()
                self.threads += 1

    def run(self, then: Callable[[Any], None], *work: Any) -> None:
        """Call a function with its arguments in a thread, or here where there is none,
        and then go on in the loop with the outcome."""
        self.busy += 1
        if self.threads:
            self.wanted.put((then, *work))
        else:
            self.find(then, *work)

    def work(self) -> None:
        while True:
            self.find(*self.wanted.get())

    def find(self, then: Callable[[Any], None], *work: Any) -> None:
        self.found.append((then, outcome(*work)))
        if not self.told:  # once for many: to wake the loop is what costs
            self.told = True
            with contextlib.suppress(RuntimeError):  # it may have ended
                self.loop.call_soon_threadsafe(self.go_on)

    def go_on(self) -> None:
        self.told = False  # before looking, so that nothing is left lying
        while self.found:
            self.busy -= 1
            self.loop.call_soon(*self.found.popleft())


class Server:
    """Serves a UserAPI over one or more sockets, in one thread, but for slow reads.

    What writes waits for the end of the loop's turn; then all of it is run in one
    transaction, with what comes meanwhile, and committed; only then do the answers go
    out. Where the disk is slow a thread commits, and reads go on meanwhile over another
    connection.
    """

    def __init__(self, app: UserAPI) -> None:
        self.app, self.settings, self.store = app, app.settings, app.store
        self.group = not self.store.memory  # writes are committed together
        self.remote = isinstance(self.store, PostgresStore)  # it may be slow
        #: the methods that are answered in the loop, whatever they ask for
        self.direct: tuple[str, ...] = () if self.remote else SAFE
        self.connections: set[Connection] = set()
        self.sleeping: set[Connection] = set()
        self.sending: list[Connection] = []
        self.waiting: list[Turn] = []
        self.woken = 0.0  # when streams were last asked
        self.sync_time = 1.0  # seconds that a commit takes of late
        self.committing = self.stopping = self.logging = False
        self.bodies = self.handshakes = 0
        self.lines: list[str] = []
        self.log_room = LOG_ROOM
        self.seen: set[str] = set()
        app.metrics.connections = lambda: len(self.connections)
        self.base: Environ = {
            "REQUEST_METHOD": "-",
            "SCRIPT_NAME": "",
            "SERVER_NAME": self.settings.host,
            "SERVER_PORT": str(self.settings.port),
            "SERVER_PROTOCOL": "HTTP/1.1",
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "https" if self.settings.cert else "http",
            "wsgi.input": io.BytesIO(),
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": False,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
            "userapi.request": "- - HTTP/1.1",
            "userapi.server": True,
        }

    # Answers

    def expect_sending(self, connection: Connection) -> None:
        """Have what a connection is to be sent leave at the end of the turn, all of
        them one after the other: a client that is awake need not be woken."""
        if not self.sending:
            self.loop.call_soon(self.send_all)
        self.sending.append(connection)

    def send_all(self) -> None:
        sending, self.sending = self.sending, []
        for connection in sending:
            connection.send_out()

    # Reads that may take long, and writes

    def is_quick(self, environ: Environ) -> bool:
        """Whether a request is answered in the loop: it reads, by an index if there are
        many users, what is in this process's own file."""
        method, asked = environ["REQUEST_METHOD"], environ["userapi.request"]
        by_index = method in SAFE and not self.remote and not SCAN.search(asked)
        return method in self.direct or by_index

    @functools.cached_property
    def readers(self) -> Readers:
        return Readers(self.loop)

    def enqueue(self, connection: Connection, environ: Environ) -> None:
        """Have a request that may write run with others that come now."""
        if environ["REQUEST_METHOD"] in SAFE:
            self.read(connection, environ)
            return
        self.waiting.append((connection, environ))
        if len(self.waiting) == 1 and not self.committing:
            self.loop.call_soon(self.flush)

    def flush(self) -> None:
        """Run what waits in one transaction, and have it committed."""
        self.send_all()
        if self.committing or not (self.waiting or self.store.waiting):
            return
        self.committing = True
        if self.remote:
            self.run_group_elsewhere()
        elif self.store.begin_group():
            self.run_group([], time.monotonic() + GATHER)
        else:  # another program writes: wait for it, but not here
            begin = functools.partial(self.store.begin_group, wait=True)
            self.in_thread(lambda _: self.run_group([], 0), begin)

    def run_group(self, done: list[tuple[Turn, Any]], end: float) -> None:
        """Run what waits, and for a while what comes meanwhile; then have it committed:
        the fewer commits, the less each costs."""
        turns, self.waiting = self.waiting, []
        done.extend((turn, turn[0].call(turn[1])) for turn in turns)
        others = len(self.connections) > len(done)  # who may send something meanwhile
        if turns and others and time.monotonic() < end:
            self.loop.call_later(0, self.run_group, done, end)  # when it has been read
            return
        if self.sync_time > SLOW_SYNC:
            self.in_thread(functools.partial(self.finish, done), self.commit)
        else:
            self.finish(done, outcome(self.commit))

    def run_group_elsewhere(self) -> None:
        """Run what waits, and commit it, in a thread: a slow database is no reason not
        to answer others."""
        turns, self.waiting = self.waiting, []
        done: list[tuple[Turn, Any]] = []

        def work() -> None:
            self.store.open_group()
            self.store.begin_group(wait=True)
            done.extend((turn, turn[0].call(turn[1])) for turn in turns)
            self.commit()

        self.in_thread(functools.partial(self.finish, done), work)

    def read(self, connection: Connection, environ: Environ) -> None:
        """Answer what only reads, in a thread; whether we live needs no database."""
        answer = functools.partial(connection.answer, environ)
        if environ["PATH_INFO"] in ("/health", "/health/"):
            answer(connection.call(environ))
        else:
            self.readers.run(answer, connection.call, environ)

    def commit(self) -> None:
        """Commit, and learn how long that takes here."""
        began = time.perf_counter()
        try:
            self.store.commit_group()
        finally:
            self.sync_time += (time.perf_counter() - began - self.sync_time) / 4

    def in_thread(self, then: Callable[[Any], None], *work: Any) -> None:
        """Call a function with its arguments in a thread of its own, or here where none
        can be had, and then go on here with the outcome."""

        def run() -> None:
            result = outcome(*work)
            with contextlib.suppress(RuntimeError):  # the loop may have ended
                self.loop.call_soon_threadsafe(then, result)

        try:
            threading.Thread(target=run, daemon=True).start()
        except RuntimeError:  # a limit on threads or memory
            run()

    def finish(self, done: list[tuple[Turn, Any]], fault: BaseException | None) -> None:
        """The commit has been tried: send the answers, or what went wrong."""
        self.committing = False
        for (connection, environ), answer in done:
            if fault is not None and answer[0][0] == "2":
                close_body(answer[2])
                answer = self.failed(fault, environ)
            connection.answer(environ, answer)
        self.send_all()
        if fault is None:
            self.store.announce_group()
            self.wake_soon()
        if self.waiting:
            self.loop.call_soon(self.flush)

    def failed(self, fault: BaseException, environ: Environ) -> Given:
        """The answer where a problem came up outside of the application."""
        answer = self.app.refusal(environ, fault)
        return self.app.present(Call(self.app, environ), answer)

    # Streams that wait

    def sleep(self, connection: Connection) -> None:
        """Ask a stream that had nothing again: shortly, or after the next commit."""
        if not self.sleeping:
            self.alarm = self.loop.call_later(WAKE, self.wake)
        self.sleeping.add(connection)

    def wake_soon(self) -> None:
        """Ask them after a commit, at once if the last time was a while ago: what many
        are told takes longer than what one has written."""
        if self.sleeping:
            self.alarm.cancel()
            when = max(self.loop.time(), self.woken + PAUSE)
            self.alarm = self.loop.call_at(when, self.wake)

    def wake(self) -> None:
        self.woken = self.loop.time()
        sleeping, self.sleeping = self.sleeping, set()
        if sleeping:
            self.alarm.cancel()
        for connection in sleeping:
            connection.pump()

    # Once a second

    def sweep(self) -> None:
        self.sweeper = self.loop.call_later(1, self.sweep)
        now = time.monotonic()
        if not self.remote:
            large = self.store.sizes().get("database", 0) > LARGE
            self.direct = () if large else SAFE
        self.clock = time.strftime("%d/%b/%Y:%H:%M:%S %z")
        date = formatdate(usegmt=True).encode()
        self.date = b"Date: %b\r\nServer: userapi\r\n" % date
        self.seen.clear()
        for connection in list(self.connections):
            connection.sweep(now)
        if self.store.waiting:
            self.flush()
        self.write_log()

    # The access log

    def note(self, environ: Environ) -> None:
        """A line of the access log: the combined format and milliseconds, or JSON."""
        if self.settings.log == "off":
            return
        took = (time.perf_counter() - environ["userapi.began"]) * 1000
        peer, actor = environ["REMOTE_ADDR"], environ.get("REMOTE_USER")
        status, sent = environ["userapi.status"], environ["userapi.sent"]
        request = environ["userapi.request"]
        referer = without_secrets(environ.get("HTTP_REFERER", "-"))
        agent = environ.get("HTTP_USER_AGENT", "-")
        if self.settings.log == "json":
            entry = (utc_now(), peer, actor, request, int(status), sent, round(took, 2))
            line = json.dumps(dict(zip(TOLD, (*entry, referer, agent))))
        else:
            line = (
                f"{peer} - {actor or '-'} [{self.clock}] {quoted(request)} {status}"
                f" {sent} {quoted(referer)} {quoted(agent)} {took:.2f}"
            )
        if self.log_room > 0:  # else nobody takes them as fast as they come
            self.lines.append(line)
            self.log_room -= len(line)
            if self.log_room < LOG_ROOM // 2:
                self.write_log()

    def write_log(self) -> None:
        """Write the lines in a thread, as the one who reads them may be slow."""
        if self.lines and not self.logging:
            text = "\n".join(self.lines) + "\n"
            self.lines, self.log_room, self.logging = [], LOG_ROOM, True
            self.in_thread(self.logged, write_text, text)

    def logged(self, _: None) -> None:
        self.logging = False

    # Life

    async def run(
        self, sockets: list[socket.socket], ready: Callable[[], None]
    ) -> None:
        """Serve until SIGTERM or SIGINT; then finish what was begun."""
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(self.tell)
        self.stopped = asyncio.Event()
        if self.remote:
            self.store.impatient = threading.get_ident()
        elif self.group:
            self.store.open_group()
        self.sweep()
        self.handle_signals()
        listeners = [await self.listen(sock) for sock in sockets]
        ready()
        notify("READY=1")
        await self.stopped.wait()
        notify("STOPPING=1")
        for sock in sockets:  # else one that is accepted right now would be forgotten
            with contextlib.suppress(NotImplementedError):
                self.loop.remove_reader(sock.fileno())
        await asyncio.sleep(0)
        if is_socket(self.settings.unix) and not handed_over():
            os.unlink(self.settings.unix)  # later it might be a successor's
        for end in listeners:
            end()
        await self.drain()
        self.sweeper.cancel()
        if self.logging or self.remote and (self.readers.busy or self.committing):
            os._exit(0)  # nobody takes the log or asks us: a thread would never end
        if self.group:
            self.store.close_group()

    def tell(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Asyncio's own troubles, of a thousand alike one a second."""
        if context["message"] not in self.seen:
            self.seen.add(context["message"])
            loop.default_exception_handler(context)

    async def listen(self, sock: socket.socket) -> Callable[[], object]:
        """Accept connections, until the function that it gives is called."""
        with contextlib.suppress(AttributeError, OSError):  # a Unix socket, Windows
            # so that what a client takes is seen, bit by bit
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 1 << 17)
        if self.settings.cert:
            sock.listen(BACKLOG)
            sock.setblocking(False)
            accepting = self.accept(sock, make_tls(self.settings))
            return self.loop.create_task(accepting).cancel
        server = await self.loop.create_server(
            lambda: Connection(self), sock=sock, backlog=BACKLOG
        )
        return server.close

    async def accept(self, listener: socket.socket, tls: Any) -> None:
        """Accept connections that are to become TLS, no more of them than there may be
        afterwards: each takes a third of a megabyte from its first byte."""
        with listener:
            while True:
                await asyncio.sleep(0)  # others have their turn, however many come
                try:
                    sock, _ = await self.loop.sock_accept(listener)
                except OSError:  # as many files are open as may be
                    await asyncio.sleep(1)
                    continue
                if self.handshakes < self.settings.max_connections:
                    self.handshakes += 1
                    self.loop.create_task(self.shake_hands(sock, tls))
                else:
                    sock.close()

    async def shake_hands(self, sock: socket.socket, tls: Any) -> None:
        try:
            with contextlib.suppress(OSError):  # the client gave up, or speaks no TLS
                await self.loop.connect_accepted_socket(
                    lambda: Connection(self),
                    sock,
                    ssl=tls,
                    ssl_handshake_timeout=self.settings.head_timeout,
                )
        finally:
            self.handshakes -= 1

    def handle_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self.loop.add_signal_handler(number, self.stop)
            except (NotImplementedError, RuntimeError, ValueError):
                with contextlib.suppress(ValueError):  # not in the main thread
                    signal.signal(
                        number, lambda *_: self.loop.call_soon_threadsafe(self.stop)
                    )

    def stop(self) -> None:
        """Stop serving; a second call ends the process at once."""
        if self.stopping:
            os._exit(1)
        self.stopping = True
        self.stopped.set()

    async def drain(self) -> None:
        """Let what was begun be answered, for at most GRACE seconds."""
        end = time.monotonic() + GRACE
        self.wake()
        while time.monotonic() < end:
            await asyncio.sleep(0.01)  # for what has been sent and is not yet read
            self.write_log()
            begun = self.committing or self.logging or bool(self.waiting)
            for connection in list(self.connections):
                idle = connection.parser.is_idle() and not connection.busy
                if not idle or connection.unsent():
                    begun = True
                elif not connection.closing:
                    connection.transport.close()
            if not begun:
                break
        for connection in list(self.connections):
            connection.transport.abort()


def write_text(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.write(text)
        sys.stdout.flush()


def make_tls(settings: Settings) -> Any:
    """The context for TLS with the standard library's defaults. Raises SettingError."""
    import ssl

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(settings.cert, settings.key)
    except (OSError, ssl.SSLError) as fault:
        raise SettingError(f"cert or key cannot be used: {reason(fault)}") from None
    return context


def notify(state: str) -> None:
    """Tell the service manager, if one listens (sd_notify of systemd)."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path and hasattr(socket, "AF_UNIX"):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with sock, contextlib.suppress(OSError):
            sock.connect(path.replace("@", "\0", 1))
            sock.send(state.encode())


def allow_files() -> None:
    """Let as many files be open as this process may have: a connection is one."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


def handed_over() -> int:
    """How many sockets the service manager has opened for this process."""
    count = os.environ.get("LISTEN_FDS", "")
    ours = os.environ.get("LISTEN_PID") == str(os.getpid())
    return int(count) if ours and re.fullmatch("[1-9][0-9]?", count) else 0


def open_sockets(settings: Settings) -> list[socket.socket]:
    """The sockets to listen on: handed over, Unix, or TCP. Raises SettingError."""
    try:
        if handed := handed_over():
            return [socket.socket(fileno=3 + number) for number in range(handed)]
        if settings.unix:
            if not hasattr(socket, "AF_UNIX"):
                raise SettingError("this system has no Unix sockets")
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(settings.unix)
                raise SettingError("another process listens on the Unix socket")
            except ConnectionRefusedError:  # left behind by one that was killed
                if not is_socket(settings.unix):
                    raise SettingError("unix names a file that is no socket") from None
                os.unlink(settings.unix)
            except FileNotFoundError:
                pass
            sock.bind(settings.unix)
        else:
            family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
            both = settings.host == "::" and socket.has_dualstack_ipv6()
            where = (settings.host, settings.port)
            sock = socket.create_server(where, family=family, dualstack_ipv6=both)
        return [sock]
    except OSError as fault:
        raise SettingError(f"cannot listen: {reason(fault)}") from None


def serve(app: UserAPI, **settings: Any) -> None:
    """Serve the application until SIGTERM or SIGINT, by its settings or those given.

    Raises SettingError where it cannot listen, or must not: an address that others
    reach needs a token.
    """
    app.configure(settings)
    if not app.guard.configured:
        refuse_exposed(app.settings)
    sockets, server = open_sockets(app.settings), Server(app)
    url = server_url(app.settings, sockets[0])
    server.base["SERVER_PORT"] = url.rpartition(":")[2].rstrip("/")
    users = app.store.count_users()
    text = (
        f"userapi {__version__} on {url} · {show_db(app.settings.db)}, {users}"
        f" user{'s' * (users != 1)}{', read-only' * app.store.read_only} · "
        + ("token needed" if app.guard.configured else "no token: this host only")
    )
    ready = functools.partial(print, text, file=sys.stderr, flush=True)
    asyncio.run(server.run(sockets, ready))


def refuse_exposed(settings: Settings) -> None:
    """Raise SettingError where others could reach what has no token."""
    host = settings.host
    if not (settings.unix or host == "localhost" or is_loopback(host)):
        raise SettingError(
            f"host {host} lets others in: set USERAPI_TOKEN, --token-file, or make a"
            " token with 'userapi.py token add NAME' first"
        )


def server_url(settings: Settings, sock: socket.socket) -> str:
    name = sock.getsockname()
    if not isinstance(name, tuple):
        return f"unix:{name}"
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    return f"http{'s' * bool(settings.cert)}://{host}:{name[1]}/"


# ── Command line ──────────────────────────────────────────────────────────────────


def replace_closed() -> None:
    """Have no file that is opened taken for standard output or error, if they were
    closed: what is written to the one fails, to the other it is in vain."""
    for number, name, way in (1, "stdout", os.O_RDONLY), (2, "stderr", os.O_WRONLY):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, way)
            setattr(sys, name, os.fdopen(os.dup2(null, number), "w"))


def flush_output() -> None:
    """Write what is still to be written; else it would fail unseen at the end."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def run_serve(**given: Any) -> None:
    with contextlib.suppress(KeyboardInterrupt):  # by a signal before it listens
        settings = Settings(given)
        if not settings.token and is_missing(settings.db):
            refuse_exposed(settings)  # before a database is made
        allow_files()
        serve(UserAPI(**given))
    with contextlib.suppress(OSError):  # who reads the log may have gone
        flush_output()


def open_given(
    given: Item, makes: bool = False, keeps: bool = True
) -> contextlib.closing[Store]:
    """The store that a command works on, whose addresses stay unique if a server had
    them so. Where it is missing, it `makes` one (in memory if it keeps nothing), or it
    is a Problem 404."""
    settings = Settings(given)
    if is_missing(settings.db):
        if not makes:
            raise Problem(404, f"{settings.db}: there is no such database")
        if not keeps:
            settings.update({"db": ":memory:"})
    settings.unique_mail = settings.unique_mail or given["unique_mail"]
    return contextlib.closing(open_store(settings))


class Progress:
    """A line on a terminal that says how far a long command is; else nothing, nor amid
    what goes to the terminal itself."""

    def __init__(self, unit: str, target: str = "") -> None:
        amid = target == "-" and sys.stdout.isatty()
        self.unit, self.active = unit, sys.stderr.isatty() and not amid
        self.began = self.shown = time.monotonic()

    def show(self, count: int, share: float) -> None:
        """Tell that `count` units are done, which is this share of all."""
        now, share = time.monotonic(), min(share, 1.0)
        if not self.active or now - self.shown < 0.1:
            return
        self.shown, took = now, now - self.began
        left = took * (1 - share) / share if share else 0.0
        text = f"{count} {self.unit}, {count / took:.0f}/s, {left:.0f} s left"
        bar = f"\r[{'#' * int(share * 30):30}] {text} "
        print(bar, end="", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.active:
            sys.stderr.write("\r\x1b[K")


def open_file(path: str, mode: str) -> Any:
    """A file; for - standard input or output."""
    standard = 0 if mode == "rb" else 1
    return open(standard if path == "-" else path, mode, closefd=path != "-")


def run_import(
    file: str, format: str | None, conflict: str, dry_run: bool, **given: Any
) -> None:
    """Read users out of a file, all of them or none, with the positions of faults."""
    with open_file(file, "rb") as source:
        size = os.fstat(source.fileno()).st_size
        media = FORMATS[format or guess_format(source, file)]
        with open_given(given, True, not dry_run) as store, Progress("rows") as bar:

            def watch(count: int) -> None:
                bar.show(count, source.tell() / size if size else 0.0)

            store.expect_many()
            members = members_in(media, "v2")
            keeps = (*KEPT, "version")  # who moves a database moves its ETags
            with store.transaction(keep=not dry_run), contextlib.ExitStack() as after:
                gc.disable()  # to look for cycles, of which there are none, takes 1/8
                after.callback(gc.enable)
                how = Saving(store, "create", members, conflict=conflict, keeps=keeps)
                saved = how.save(read_batches(source, media, watch))
    print(", ".join(f"{count} {name}" for name, count in saved.counts.items()))


def guess_format(source: Any, path: str) -> str:
    """What an import's file holds, by the end of its name, else by how it begins."""
    end = path.rpartition(".")[2].lower()
    if end in ("csv", "ndjson"):
        return end
    begins = source.peek(1024).removeprefix(BOM).lstrip()
    return "ndjson" if begins.startswith(b"{") else "csv"


def run_export(file: str, format: str | None, **given: Any) -> None:
    """Write all users."""
    end = format or file.rpartition(".")[2].lower()
    if end not in FORMATS and file != "-":
        known = ", ".join(FORMATS)
        raise SettingError(f"say with --format which of {known} it is to be")
    media = FORMATS.get(end, NDJSON)
    members = members_in(media, "v2")
    with open_given(given) as store, Progress("rows", file) as bar:
        total = store.count_users()

        def watched(pages: Iterable[Rows]) -> Iterator[Rows]:
            done = 0
            for page in pages:
                done += len(page)
                bar.show(done, done / max(total, 1))
                yield page

        pages = watched(store.pages(select_sql(media, members), Query()))
        write_file(file, CHUNKS[media](pages, members, ""), store.path)


def write_file(path: str, chunks: Iterable[bytes], db: str) -> None:
    """Write to standard output (-), a pipe or a device; or a file, whole or not."""
    special = path == "-" or os.path.exists(path) and not os.path.isfile(path)
    target = contextlib.nullcontext(path) if special else whole_file(path, db)
    with target as part, open_file(part, "wb") as file:
        file.writelines(chunks)


def run_backup(file: str, **given: Any) -> None:
    if file == "-":
        raise SettingError("a backup is a file, not standard output")
    with open_given(given) as store, Progress("pages") as bar:
        store.backup(file, lambda done, total: bar.show(done, done / max(total, 1)))


def run_check(**given: Any) -> int:
    with open_given(given) as store:
        faults = store.check()
        for fault in faults:
            print(f"userapi: {fault}", file=sys.stderr)
        if not faults:
            print(f"whole: {store.count_users()} users")
    return 1 if faults else 0


def run_token(action: str, name: str, read_only: bool, **given: Any) -> None:
    """Add, list or revoke named tokens; a token is shown this once."""
    if read_only and action != "add" or name and action == "list":
        raise SettingError("it is: add NAME [--read-only], list, or revoke NAME")
    if action != "list" and not re.fullmatch(r"[A-Za-z0-9._@-]{1,64}", name):
        raise SettingError("a token's name is 1 to 64 of A-Z a-z 0-9 . _ @ -")
    if action == "add" and name == "admin":
        raise SettingError("admin is what the setting's own token is called")
    with open_given(given, makes=action == "add") as store, store.transaction():
        if action == "add":  # one that nobody sees is not kept
            role = "read-only" if read_only else "admin"
            print(store.add_token(name, role), flush=True)
        elif action == "revoke":
            store.revoke_token(name)
        else:
            for row in store.tokens():
                print("\t".join(part or "never" for part in row))


def print_document(make: Callable[[], Item], **_: Any) -> None:
    print(json.dumps(make(), indent=2))  # ASCII, as not every terminal has more


#: command: (help, what runs it, the arguments of its own); those and the settings are
#: the keywords that it is run with
COMMANDS: dict[str, tuple[str, Callable[..., int | None], Item]] = {
    "serve": ("serve users over HTTP (what is done without a command)", run_serve, {}),
    "import": ("read users from CSV or NDJSON", run_import, {
        "file": {"help": "a file, or - for standard input"},
        "--format": {"choices": ("csv", "ndjson"), "help": "else by name or beginning"},
        "--conflict": {"choices": CONFLICT["enum"], "default": "fail",
                       "help": PARAMS["conflict"][1]},
        "--dry-run": {"action": "store_true", "help": PARAMS["dry_run"][1]},
    }),
    "export": ("write users as CSV, NDJSON or JSON", run_export, {
        "file": {"nargs": "?", "default": "-", "help": "none, or -: standard output"},
        "--format": {"choices": tuple(FORMATS), "help": "else by name; ndjson for -"},
    }),
    "backup": ("make a consistent copy while the server runs", run_backup,
        {"file": {"help": "the copy"}}),
    "check": ("check the integrity of the database", run_check, {}),
    "token": ("add, list and revoke named tokens", run_token, {
        "action": {"choices": ("add", "list", "revoke")},
        "name": {"nargs": "?", "default": "", "help": "the token's"},
        "--read-only": {"action": "store_true", "help": "it may not write"},
    }),
    "openapi": ("print the OpenAPI document",
        functools.partial(print_document, openapi), {}),
    "postman": ("print the Postman collection",
        functools.partial(print_document, postman), {}),
}  # fmt: skip


def build_parser() -> Any:
    import argparse

    about = "Users over REST, out of one file."
    parser = argparse.ArgumentParser("userapi", description=about, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (help, _, arguments) in COMMANDS.items():
        sub = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        add_settings(sub, FLAGS if name == "serve" else STORE_SETTINGS)
        for argument, options in arguments.items():
            sub.add_argument(argument, **options)
    return parser


def add_settings(parser: Any, names: Names) -> None:
    import argparse

    for name, default, help, *_ in SETTINGS:
        flag = f"--{name.replace('_', '-')}"
        if name in names and isinstance(default, bool):
            # with --no-… as well: a flag beats the variable
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag, action=action, help=help)
        elif name in names:
            meaning = f"{help} ({default})" if default else help
            parser.add_argument(flag, metavar=name.upper(), help=meaning)


def run_arguments(arguments: list[str]) -> int:
    first = arguments[0] if arguments else "-"
    if first.startswith("-") and first not in ("-h", "--help", "--version"):
        arguments.insert(0, "serve")
    if any(word.partition("=")[0] == "--token" for word in arguments):
        raise SettingError("a token is no flag: set USERAPI_TOKEN or --token-file")
    try:
        given = vars(build_parser().parse_args(arguments))
        _, run, _ = COMMANDS[given.pop("command")]
        return run(**given) or 0
    except SystemExit as end:  # argparse has told what it had to
        return int(end.code or 0)
    finally:
        flush_output()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0 done, 1 failed, 2 wrong usage or a refused setting."""
    replace_closed()
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        return run_arguments(list(sys.argv[1:] if argv is None else argv))
    except BrokenPipeError:  # who reads our output has gone
        return 1
    except SettingError as fault:
        return fail(str(fault), 2)
    except Problem as problem:
        return fail("\n".join([problem.detail, *map(tell_fault, problem.errors)]))
    except KeyboardInterrupt:
        return fail("interrupted")
    except OSError as fault:
        return fail(f"{fault.filename or 'failed'}: {reason(fault)}")
    except DATABASE_FAULTS as fault:
        return fail(database_problem(fault).detail)


def fail(why: str, status: int = 1) -> int:
    """Say why; what a terminal would obey, in a file's name or header, is escaped."""
    why = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in why)
    print(f"userapi: {why}", file=sys.stderr)
    return status


def tell_fault(error: Item) -> str:
    """A line about one of a problem's errors."""
    place = f"line {error['line']}: " if "line" in error else ""
    return f"  {place}{error.get('pointer', '')} {error['detail']}"


if __name__ == "__main__":
    sys.exit(main())
