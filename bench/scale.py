"""Throughput on PostgreSQL: one userapi process, three behind HAProxy, and FastAPI.

    python bench/scale.py [SECONDS]

starts all of it on this machine (PostgreSQL, HAProxy and wrk from Debian's packages;
fastapi, uvicorn, sqlalchemy and psycopg from bench/requirements.txt), asks each in turn
over 64 connections, three times, and prints the median of requests a second.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples" / "cluster"))
import cluster as example  # noqa: E402

SECONDS = int((sys.argv[1:] or ["5"])[0])
BODY = '{"item": {"name": "Simone Giertz", "mail": "giertz@shittyrobots.loc"}}'
POST = f"""wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.body = '{BODY}'
"""


def wrk(port: int, method: str, folder: Path) -> float:
    """Requests a second that were answered with a 2xx."""
    url, more = f"http://127.0.0.1:{port}/api/user", []
    if method == "POST":
        script = folder / "post.lua"
        script.write_text(POST)
        more = ["-s", str(script)]
    else:
        url += "/1"
    command = ["wrk", "-t1", "-c64", f"-d{SECONDS}s", *more, url]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    count, took = int(re.search(r"(\d+) requests in", out)[1]), SECONDS
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)", out)
    return (count - int(bad[1] if bad else 0)) / took


def fastapi(db: str, workers: int) -> tuple[subprocess.Popen, int]:
    port = example.free_port()
    command = [sys.executable, "-m", "uvicorn", "fastapi_postgres:app", "--port"]
    command += [str(port), "--workers", str(workers), "--no-access-log"]
    env = {**os.environ, "DB": db}
    quiet = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=HERE / "peers", env=env, **quiet)
    example.wait_for(lambda: example.is_open(port), "uvicorn")
    return process, port


def main() -> None:
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        with example.Cluster(folder) as cluster:
            peers = {n: fastapi(cluster.primary.url, n) for n in (1, 3)}
            ports = {"userapi, 1 process": cluster.ports[0]}
            ports["userapi, 3 processes behind HAProxy"] = cluster.port
            ports["FastAPI, 1 worker"] = peers[1][1]
            ports["FastAPI, 3 workers"] = peers[3][1]
            rates: dict = {}
            for port in ports.values():
                wrk(port, "POST", folder)  # there is a user 1, and all is warm
            for _ in range(3):
                for name, port in ports.items():
                    for method in ("GET", "POST"):
                        rate = wrk(port, method, folder)
                        rates.setdefault((name, method), []).append(rate)
            for (name, method), found in rates.items():
                told = ", ".join(f"{rate:.0f}" for rate in found)
                print(f"{method:4} {name:38} {statistics.median(found):6.0f}  ({told})")
            print(f"load of the machine meanwhile: {os.getloadavg()[0]:.1f}")
            for process, _ in peers.values():
                process.terminate()
                process.wait()


if __name__ == "__main__":
    main()
