"""Random sequences of writes: whatever they are, the log explains each difference.

Hypothesis plays JSON, CSV, NDJSON, transactions of a host program and another program's
SQL against one database, looks at all of it after each step, and tells the shortest
sequence that goes wrong. `USERAPI_FUZZ=60` plays sixty times as many.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import sys
import tempfile
from pathlib import Path

import webtest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import userapi

TIMES = int(os.environ.get("USERAPI_FUZZ", "1"))
MEMBERS = ("name", "mail", "phone", "address")
#: what is sent, and how it is stored; few, so that they meet. The others are refused
NAMES = {"Ada": "Ada", " ada ": "ada", "Zoe\u0308": "Zoë", "=1": "=1", "b": "b"}
NAME = st.sampled_from([*NAMES] * 3 + ["a\tb"])
STORED = st.sampled_from([*NAMES.values()])
MAIL = st.sampled_from(["a@b", "A@B", "c@d", "d@e", "f@g", "g@h", "a@"])
ID = st.integers(1, 5)
USER = {"name": NAME, "mail": MAIL}
PHONE = st.fixed_dictionaries({"number": st.just("123")}, optional={"id": ID})
LISTS = {
    "phone": st.lists(PHONE, max_size=3),
    "address": st.lists(st.just({"city": "B"}), max_size=1),
}
CREATED = st.fixed_dictionaries(USER, optional={"id": ID, **LISTS})
REPLACED = st.fixed_dictionaries({"id": ID, **USER}, optional=LISTS)
MERGED = st.fixed_dictionaries({"id": ID}, optional={**USER, **LISTS})
SENT = {"POST": CREATED, "PUT": REPLACED, "PATCH": MERGED}
WRITES = st.one_of(
    st.tuples(st.just(method), st.lists(item, min_size=1, max_size=4))
    for method, item in SENT.items()
)
OUTCOME = st.sampled_from(["kept", "kept", "taken back", "failed"])
CONFLICT = st.sampled_from(["fail", "skip", "replace"])
#: what another program does
SQL = [
    "INSERT INTO users (user_name, user_mail) VALUES (:name, :mail || :far)",
    "INSERT OR REPLACE INTO users (user_id, user_name, user_mail)"
    " VALUES (:id, :name, :mail || :far)",
    "UPDATE users SET user_name = :name WHERE user_id <= :id",
    "UPDATE OR IGNORE users SET user_id = :far WHERE user_id = :id",
    "DELETE FROM users WHERE user_id = :id",
    "INSERT OR REPLACE INTO user_phone (user_id, id, number)"
    " SELECT user_id, :far, '456' FROM users WHERE user_id = :id",
    "UPDATE user_phone SET number = number || '7' WHERE user_id = :id",
    "DELETE FROM user_phone WHERE user_id = :id",
]


class Writes(RuleBasedStateMachine):
    @initialize(unique=st.booleans())
    def begin(self, unique):
        self.folder = tempfile.TemporaryDirectory()
        db, self.told, self.log = f"{self.folder.name}/users.db", [], []
        self.app = userapi.UserAPI(
            db, open=True, on_change=self.told.append, unique_mail=unique
        )
        self.client = webtest.TestApp(self.app, lint=False)
        self.other = sqlite3.connect(db, isolation_level=None)
        self.users, self.versions, self.unique = {}, {}, unique
        some = {"name": "Ada", "phone": [{"number": "123"}]}
        self.app.store.create_users([{**some, "mail": f"{n}@x"} for n in range(3)])
        self.ours = True  # whether only we have written since the last look

    def teardown(self):
        assert self.app.store.check() == []
        self.other.close()
        self.app.close()
        self.folder.cleanup()

    def read(self):
        return {user["id"]: user for user in self.app.store.find_users()}

    def ask(self, method, path, data="", media="application/json", **headers):
        """A write: its answer, and what it says. What is refused leaves nothing."""
        before = self.read()
        headers["Content-Type"] = media
        answer = self.client.request(
            f"/api/v2/user{path}", method=method, body=data.encode(), headers=headers,
            expect_errors=True,
        )  # fmt: skip
        assert answer.status_int < 500, answer.text
        if answer.status_int >= 300 or "dry_run=1" in path:
            assert self.read() == before
        return answer.json if answer.status_int < 300 else {}

    @rule(write=WRITES, dry=st.sampled_from([0, 0, 0, 1]))
    def save(self, write, dry):
        self.ask_for(*write, dry)

    def ask_for(self, method, items, dry=0):
        sent = json.dumps({"items": items})
        for user in self.ask(method, f"?dry_run={dry}", sent).get("results", ()):
            assert dry or user == self.read()[user["id"]]
            item = next((i for i in items if i.get("id") == user["id"]), {})
            assert NAMES.get(item.get("name"), user["name"]) == user["name"]
            assert item.get("mail", user["mail"]) == user["mail"]
            assert len(item.get("phone", user["phone"])) == len(user["phone"])

    @rule(item=MERGED, tag=st.integers(-1, 1))
    def save_one(self, item, tag):
        id = item["id"]
        version = self.read().get(id, {"version": 1})["version"]
        given = {"If-Match": f'"{version + tag}"'}
        sent = json.dumps({"item": item})
        found = self.ask("PATCH", f"/{id}", sent, **given).get("results")
        assert not found or (not tag and found[0]["version"] == version + 1)

    @rule(items=st.lists(CREATED, max_size=4), conflict=CONFLICT, csv=st.booleans())
    def load(self, items, conflict, csv):
        media = "text/csv" if csv else "application/x-ndjson"
        lines = [json.dumps(item) for item in items]
        if csv:
            rows = [(item.get("id", ""), item["name"], item["mail"]) for item in items]
            lines = ["id,name,mail", *(",".join(map(str, row)) for row in rows)]
        before = self.read()
        done = self.ask("POST", f"?conflict={conflict}", "\n".join(lines), media)
        counts = [done.get(name, 0) for name in ("created", "replaced", "skipped")]
        assert sum(counts) == (len(items) if done else 0)
        assert len(self.read()) == len(before) + counts[0]

    @rule(ids=st.lists(ID, min_size=1, max_size=2))
    def delete(self, ids):
        gone = self.ask("DELETE", f"?id={','.join(map(str, ids))}")
        assert not gone or not {*ids} & self.read().keys()

    @rule(id=ID, phone=PHONE)
    def add_phone(self, id, phone):
        self.ask("POST", f"/{id}/phone", json.dumps({"item": phone}))

    @rule(id=ID, n=ID)
    def delete_phone(self, id, n):
        self.ask("DELETE", f"/{id}/phone/{n}")

    @contextlib.contextmanager
    def part(self, outcome):
        """A transaction of the host program's; but for "kept" it leaves nothing."""
        before = self.read()
        whole = self.app.store.transaction(keep=outcome != "taken back")
        with contextlib.suppress(ZeroDivisionError), whole:
            yield
            assert outcome != "failed" or 1 / 0
        assert outcome == "kept" or self.read() == before

    @rule(outcome=OUTCOME, parts=st.lists(st.tuples(OUTCOME, WRITES, WRITES)))
    def whole(self, outcome, parts):
        with self.part(outcome):
            for inner, first, second in parts:
                self.ask_for(*first)
                with self.part(inner):
                    self.ask_for(*second)

    @rule(
        sql=st.sampled_from(SQL), id=ID, far=st.integers(5, 7), name=STORED, mail=MAIL
    )
    def write_elsewhere(self, sql, **values):
        given = {name: value for name, value in values.items() if f":{name}" in sql}
        with contextlib.suppress(sqlite3.IntegrityError):  # of unique_mail
            self.other.execute(sql, given)
        self.ours = False

    @invariant()
    def lists_are_complete_and_in_order(self):
        url, found = "/api/v2/user?sort=-name&limit=4", []
        while url:
            page = self.client.get(url).json
            found, url = found + page["results"], page["next"]
        order = [(user["name"].casefold(), user["id"]) for user in found]
        assert order == sorted(order, reverse=True)
        assert {user["id"]: user for user in found} == self.read()

    @invariant()
    def the_log_explains_each_difference(self):
        new = self.client.get(f"/api/changes?since={len(self.log)}").json["results"]
        before, self.users = self.users, self.read()
        self.log += new
        assert [row["seq"] for row in self.log] == [*range(1, len(self.log) + 1)]
        assert not self.ours or self.told == new
        self.told.clear()
        self.ours = True
        mails = [user["mail"].casefold() for user in self.users.values()]
        assert not self.unique or len(mails) == len(set(mails))
        for id in before.keys() | self.users.keys():
            rows = [row for row in new if row["user"] == id]
            self.explain(id, before.get(id), self.users.get(id), rows)

    def explain(self, id, old, user, rows):
        """These rows of the log are what has become of a user."""
        version = self.versions.get(id, 0)
        if not rows:
            assert user == old
        elif user is None:
            assert rows[-1]["op"] == "delete"
        elif {row["op"] for row in rows} == {"update"}:
            assert user["version"] == version + len(rows)
            differ = {name for name in MEMBERS if user[name] != old[name]}
            told = [name for row in rows for name in row["fields"]]
            assert differ == {*told} if len(rows) == 1 else differ <= {*told}
        else:
            assert rows[-1]["op"] != "delete" and user["version"] > version
        if user:
            self.versions[id] = user["version"]


Writes.TestCase.settings = settings(
    max_examples=120 * TIMES,
    stateful_step_count=30,
    derandomize=TIMES == 1,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestWrites = Writes.TestCase
