"""The peers: how each is seeded, started and asked; their programs stand beside."""

import json
import shlex
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Callable, NamedTuple

BENCH = Path(__file__).resolve().parents[1]
VENV, NODE = BENCH / ".venv", BENCH / ".node"
PYTHON = VENV / "bin" / "python"
USERAPI = BENCH.parent / "userapi.py"
JSON_SERVER = "json-server@0.17.4"
NAMES = "Ada Lovelace", "Zoë Krüger", "李小龙", "Grace Hopper", "José Álvarez"


def run(*command):
    command = [str(word) for word in command]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def users(count):
    """The same users for every peer, as (id, name, mail)."""
    return ((n, NAMES[n % 5], f"user{n}@example.org") for n in range(1, count + 1))


def seed_sqlite(folder, count):
    with closing(sqlite3.connect(folder / "users.db")) as db, db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute(
            "CREATE TABLE users (user_id INTEGER PRIMARY KEY AUTOINCREMENT,"
            " user_name TEXT NOT NULL, user_mail TEXT NOT NULL)"
        )
        db.executemany("INSERT INTO users VALUES (?, ?, ?)", users(count))


def seed_userapi(folder, count):
    lines = folder / "users.csv"
    with lines.open("w", encoding="utf-8") as file:
        file.write("id,name,mail\r\n")
        file.writelines(f"{id},{name},{mail}\r\n" for id, name, mail in users(count))
    run(PYTHON, USERAPI, "import", lines, "--db", folder / "users.db")
    lines.unlink()


def seed_pocketbase(folder, count):
    (folder / "migrations").mkdir()
    shutil.copy(BENCH / "peers/pocketbase.js", folder / "migrations/1_people.js")
    if folder.name.startswith("pocketbase-quiet"):
        shutil.copy(
            BENCH / "peers/pocketbase_quiet.js", folder / "migrations/2_quiet.js"
        )
    flags = f"--dir={folder}", f"--migrationsDir={folder}/migrations"
    run(VENV / "bin/pocketbase", "migrate", "up", *flags)
    with closing(sqlite3.connect(folder / "data.db")) as db, db:
        rows = ((f"{id:015d}", name, mail) for id, name, mail in users(count))
        db.executemany("INSERT INTO people (id, name, mail) VALUES (?, ?, ?)", rows)


def seed_json_server(folder, count):
    rows = [{"id": id, "name": name, "mail": mail} for id, name, mail in users(count)]
    (folder / "db.json").write_text(json.dumps({"users": rows}), encoding="utf-8")


class Peer(NamedTuple):
    label: str
    command: str  # as its documentation tells; {bin} and {node} hold the programs
    logs: bool  # writes a line for each request
    synced: bool = True  # the answer to a POST waits for the disk
    seed: Callable = seed_sqlite
    get: str = "/api/user/{id}"
    list: str = "/api/user?limit=20"
    post: str = "/api/user"
    body: str = '{"item": {"name": "Ada Lovelace", "mail": "user{id}@example.org"}}'


FLAT = '{"name": "Ada Lovelace", "mail": "user{id}@example.org"}'
PEOPLE = "/api/collections/people/records"
POCKETBASE = dict(
    command="{bin}/pocketbase serve --http=127.0.0.1:{port} --dir={folder}"
    " --migrationsDir={folder}/migrations",
    synced=False,
    seed=seed_pocketbase,
    get=PEOPLE + "/{id15}",
    list=PEOPLE + "?perPage=20&skipTotal=1",
    post=PEOPLE,
    body=FLAT,
)
SERVE = "{bin}/python {userapi} serve --db {db} --port {port}"
GRANIAN = "{bin}/granian falcon_app:app --interface wsgi --port {port}"
PEERS = {
    "userapi": Peer("**userapi**", SERVE, True, seed=seed_userapi),
    "userapi-quiet": Peer(
        "**userapi --log off**", SERVE + " --log off", False, seed=seed_userapi
    ),
    "pocketbase": Peer("PocketBase", logs=True, **POCKETBASE),
    "pocketbase-quiet": Peer("PocketBase, its log off", logs=False, **POCKETBASE),
    "fastapi": Peer(
        "FastAPI on uvicorn", "{bin}/uvicorn fastapi_app:app --port {port}", True
    ),
    "fastapi-async": Peer(
        "FastAPI, async def, no log",
        "{bin}/uvicorn fastapi_app:async_app --port {port} --no-access-log",
        False,
    ),
    "falcon": Peer("Falcon on granian", GRANIAN, False),
    "falcon-1": Peer(
        "Falcon on granian, 1 thread", GRANIAN + " --blocking-threads 1", False
    ),
    "flask": Peer(
        "Flask's own server", "{bin}/flask --app flask_app run --port {port}", True
    ),
    "gunicorn": Peer(
        "Flask on gunicorn (2 × 8)",
        "{bin}/gunicorn flask_app:app -b 127.0.0.1:{port} --workers 2 --threads 8",
        False,
    ),
    "datasette": Peer(
        "Datasette",
        "{bin}/datasette serve {db} --port {port} --metadata {peers}/datasette.json",
        False,
        get="/users/users/{id}.json",
        list="/users/users.json?_size=20&_nocount=1&_nofacet=1&_nosuggest=1",
        post="/users/add",
        body=FLAT,
    ),
    "json-server": Peer(
        "json-server",
        "{node}/json-server {folder}/db.json --port {port}",
        True,
        False,
        seed_json_server,
        "/users/{id}",
        "/users?_limit=20",
        "/users",
        FLAT,
    ),
    "bottle": Peer(
        "*Bottle on bjoern (C)*", "{bin}/python bottle_app.py {port}", False
    ),
    "inprocess": Peer("*SQLite + JSON in process*", "", False),
}
