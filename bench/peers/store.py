"""What the peers written in Python share: three calls on SQLite, as fast and as
durable as userapi's own: WAL, synchronous=FULL, one connection a thread, a commit
a write. Only the framework and the server differ between them."""

import os
import sqlite3
import threading

_local = threading.local()


def db():
    if not hasattr(_local, "db"):
        _local.db = sqlite3.connect(os.environ["BENCH_DB"], isolation_level=None)
        for pragma in "busy_timeout=5000", "journal_mode=WAL", "synchronous=FULL":
            _local.db.execute(f"PRAGMA {pragma}")
    return _local.db


def user(row):
    return {"id": row[0], "name": row[1], "mail": row[2]}


def get(id):
    query = "SELECT user_id, user_name, user_mail FROM users WHERE user_id = ?"
    return {"results": [user(row) for row in db().execute(query, (id,))]}


def page(limit):
    query = "SELECT user_id, user_name, user_mail FROM users ORDER BY user_id LIMIT ?"
    return {"results": [user(row) for row in db().execute(query, (limit,))]}


def add(name, mail):
    query = "INSERT INTO users (user_name, user_mail) VALUES (?, ?)"
    id = db().execute(query, (name, mail)).lastrowid
    user = {"id": id, "name": name, "mail": mail}
    return {"code": 0, "message": "SUCCESS", "results": [user]}
