"""A server in a process of its own, for the tests of the wire and of the disk."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

USERAPI = Path(__file__).resolve().parent.parent / "userapi.py"
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith("USERAPI_")}


def wait_for(condition, what, seconds=30.0):
    """What `condition` returns once it is true: no test sleeps and hopes."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError(f"{what}: not within {seconds:g} s")


class Process:
    """A server process that accepts connections, and everything that it has said."""

    faulty = False  # whether it is one that may tell of faults

    def __init__(self, output, argv, prefix=(), env=None, **more):
        self.output, self.traced = Path(output), bool(prefix)
        with open(output, "wb") as said:
            self.process = subprocess.Popen(
                [str(part) for part in (*prefix, sys.executable, *argv)],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env={**CLEAN, **(env or {})},
                **more,
            )
        try:
            self.url = wait_for(self.find_url, "the start line")
        except AssertionError:
            self.kill()
            raise
        self.host, self.port = urlsplit(self.url).hostname, urlsplit(self.url).port

    def find_url(self):
        assert self.process.poll() is None, f"it did not start: {self.said()}"
        line = re.search(r"^userapi \S+ on (\S+) .*\n", self.said(), re.M)
        return line and line[1]

    def said(self):
        return self.output.read_text("utf-8", "replace")

    @property
    def pid(self):
        """The server's own process, which under strace is a child of the one begun."""
        pid = self.process.pid
        if self.traced:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            pid = int(children[0]) if children else pid
        return pid

    def memory(self):
        """Bytes that the process alone holds in memory now."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(r"RssAnon:\s*(\d+) kB", status)[1]) * 1024

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def signal(self, number):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            os.kill(self.pid, number)

    def kill(self):
        """The power cut."""
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
        self.process.wait(20)

    def stop(self):
        """End it as a service manager does; nothing may have upset it."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        try:
            code = self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        calm = self.faulty or "Traceback" not in self.said()
        assert code == 0 and calm, self.said()[-3000:]

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.stop() if kind is None else self.kill()
