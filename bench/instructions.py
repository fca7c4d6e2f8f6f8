"""Instructions that a request takes, counted by valgrind: the same on a busy machine.

python bench/instructions.py [GIT_REVISION]
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FEW, MANY, GROUP = 4, 14, 50  # groups in two runs whose difference counts; requests
#: what is run: the application alone, in process, as the server calls it
PROGRAM = """
import io, os, sys, tempfile
sys.path.insert(0, sys.argv[1])
import userapi

method, path, query, body, count = *sys.argv[2:6], int(sys.argv[6])
app = userapi.UserAPI(db=os.path.join(tempfile.mkdtemp(), "u.db"), log="off")
users = [{"name": f"User {n:04}", "mail": f"u{n}@example.org"} for n in range(100)]
app.store.create_users(users)
base = {
    "REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query,
    "SCRIPT_NAME": "", "REMOTE_ADDR": "127.0.0.1", "HTTP_HOST": "localhost:8080",
    "wsgi.url_scheme": "http", "wsgi.errors": sys.stderr, "userapi.server": True,
}
if body:
    base.update(CONTENT_TYPE="application/json", CONTENT_LENGTH=str(len(body)))
app.store.open_group()
for _ in range(count):
    app.store.begin_group()
    for _ in range(GROUP):
        given = {**base, "wsgi.input": io.BytesIO(body.encode())}
        app(given, lambda status, headers: None)
    app.store.commit_group()
os._exit(0)
""".replace("GROUP", str(GROUP))
CALLS = {
    "GET one": ("GET", "/api/user/50", "", ""),
    "list of 20": ("GET", "/api/user", "limit=20", ""),
    "POST one": ("POST", "/api/user", "",
        '{"item": {"name": "Ada Lovelace", "mail": "ada@example.org"}}'),
}  # fmt: skip


def run(folder, call, groups):
    """Instructions of a whole run of so many groups."""
    valgrind = ("valgrind", "--tool=cachegrind", "--cache-sim=no",
        "--cachegrind-out-file=/dev/null")  # fmt: skip
    python = (sys.executable, "-c", PROGRAM, folder, *call, str(groups))
    env = {**os.environ, "PYTHONHASHSEED": "0"}
    done = subprocess.run(
        [*valgrind, *python], env=env, capture_output=True, text=True, check=True
    )
    return int(re.search(r"I\s+refs:\s+([0-9,]+)", done.stderr)[1].replace(",", ""))


def count(folder, call):
    """Instructions of one request."""
    more = run(folder, call, MANY) - run(folder, call, FEW)
    return more // ((MANY - FEW) * GROUP)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("revision", nargs="?", help="to compare with, as git knows it")
    revision = parser.parse_args().revision
    with tempfile.TemporaryDirectory() as other:
        if revision:
            source = ["git", "-C", ROOT, "show", f"{revision}:userapi.py"]
            with open(f"{other}/userapi.py", "wb") as file:
                subprocess.run(source, stdout=file, check=True)
        for name, call in CALLS.items():
            now = count(str(ROOT), call)
            told = f"{name:10} {now:8,}"
            if revision:
                before = count(other, call)
                told += f"   {revision} {before:8,}   {now / before - 1:+.1%}"
            print(told, flush=True)


if __name__ == "__main__":
    main()
