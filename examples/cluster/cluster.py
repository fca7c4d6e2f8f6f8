"""Three userapi processes behind HAProxy, on PostgreSQL with a streaming standby.

    python examples/cluster/cluster.py

starts it all on loopback, in a temporary folder, out of Debian's packages (postgresql,
haproxy, and psycopg for Python), says where, and ends it with Ctrl-C. See the README
beside this file.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
USERAPI = HERE.parent.parent / "userapi.py"
CONFIG = """
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
synchronous_commit = remote_apply  # what is acknowledged can be read on the standby
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def is_open(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def wait_for(condition, what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.02)


def as_postgres(*command: object) -> list[str]:
    """The command as a user other than root, whom PostgreSQL refuses."""
    root = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    return [*root, *map(str, command)]


def program(name: str) -> str:
    """Where a program of PostgreSQL is: Debian keeps them off the PATH."""
    found = sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"))
    return found[-1] if found else name


class Postgres:
    """A PostgreSQL server in a folder of its own: a primary, or the standby of one."""

    def __init__(self, folder: Path, config: str = CONFIG) -> None:
        self.folder, self.config, self.port = folder, config, free_port()

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def run(self, name: str, *args: object) -> None:
        """One of PostgreSQL's programs on this server's folder."""
        command = as_postgres(program(name), "-D", self.folder, *args)
        subprocess.run(command, check=True, capture_output=True, cwd="/")

    def make(self) -> Postgres:
        """A new database, reached by everyone on this host."""
        self.run("initdb", "-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-sync")
        return self.start()

    def copy(self, primary: Postgres) -> Postgres:
        """A standby: a copy that follows the primary."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.run("pg_basebackup", "-d", primary.url, "-R", "-c", "fast", "--no-sync")
        return self.start()

    def start(self) -> Postgres:
        with open(self.folder / "postgresql.conf", "a") as file:
            file.write(f"{self.config}\nport = {self.port}\n")
        self.run("pg_ctl", "-w", "-l", self.folder / "log", "start")
        return self

    def promote(self) -> None:
        self.run("pg_ctl", "-w", "promote")

    def stop(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self.run("pg_ctl", "-w", "-m", "immediate", "stop")

    def kill(self) -> None:
        """As where the machine loses its power."""
        pid = (self.folder / "postmaster.pid").read_text().split()[0]
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", pid], capture_output=True, text=True
        )
        for one in (pid, *children.stdout.split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(one), signal.SIGKILL)
        wait_for(lambda: not is_open(self.port), "the end of the primary")


class Cluster:
    """All of it, in a folder; `with Cluster(folder) as cluster: …`."""

    def __init__(self, folder: Path, config: str = CONFIG) -> None:
        self.folder, self.config = folder, config
        self.port, self.ports = free_port(), [free_port() for _ in range(3)]
        self.processes: dict[int, subprocess.Popen] = {}

    def __enter__(self) -> Cluster:
        if os.geteuid() == 0:
            shutil.chown(self.folder, "postgres")
        self.stack = contextlib.ExitStack()
        with self.stack:
            self.primary = Postgres(self.folder / "a", self.config).make()
            self.stack.callback(lambda: self.primary.stop())
            self.standby = Postgres(self.folder / "b", self.config).copy(self.primary)
            self.stack.callback(lambda: self.standby.stop())
            self.db = self.shared_url()
            self.stack.callback(self.end_processes)
            for number in range(3):
                self.start_process(number)
            self.start_haproxy()
            self.stack = self.stack.pop_all()
        return self

    def __exit__(self, *fault: object) -> None:
        self.stack.close()

    def shared_url(self) -> str:
        """Both servers: whichever takes writes is meant."""
        hosts = f"127.0.0.1:{self.primary.port},127.0.0.1:{self.standby.port}"
        what = "target_session_attrs=read-write"
        return f"postgresql://postgres@{hosts}/postgres?{what}"

    def start_process(self, number: int) -> None:
        """A userapi process; what it says goes into a file."""
        port = self.ports[number]
        command = [sys.executable, str(USERAPI), "--port", str(port), "--log", "off"]
        with open(self.folder / f"userapi-{number}", "ab") as said:
            self.processes[number] = subprocess.Popen(
                [*command, "--trusted-proxy", "127.0.0.1"],
                env={**os.environ, "USERAPI_DB": self.db},
                stderr=said,
            )
        wait_for(lambda: is_open(port), "userapi")

    def start_haproxy(self) -> None:
        ports = {f"PORT_{n}": str(port) for n, port in enumerate(self.ports, 1)}
        with open(self.folder / "haproxy", "ab") as said:
            proxy = subprocess.Popen(
                ["haproxy", "-db", "-f", str(HERE / "haproxy.cfg")],
                env={**os.environ, "PORT": str(self.port), **ports},
                stderr=said,
            )
        self.stack.callback(proxy.wait)
        self.stack.callback(proxy.terminate)
        wait_for(lambda: is_open(self.port), "HAProxy")

    def end_processes(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()

    def fail_over(self) -> None:
        """The primary dies, the standby takes over, and gets a standby of its own."""
        self.primary.kill()
        self.standby.promote()
        self.primary, self.standby = self.standby, self.primary
        self.standby.copy(self.primary)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder)) as cluster:
        print(f"http://127.0.0.1:{cluster.port}/ is HAProxy, before {cluster.ports}")
        print(
            f"{cluster.primary.url} is the primary, {cluster.standby.url} its standby"
        )
        print("Enter: the primary dies, the standby is promoted. Ctrl-C: the end.")
        with contextlib.suppress(KeyboardInterrupt, EOFError):
            while True:
                input()
                cluster.fail_over()
                print(f"{cluster.primary.url} is the primary now")


if __name__ == "__main__":
    main()
