"""What the personnel office exports every night, into the users: all of it or nothing.

    15 3 * * *  python nightly_import.py /srv/hr/people.csv /var/lib/users/users.db

Runs beside the server, on the same file. Yesterday's state is kept as a backup first;
the exit status and one line on standard error are for whoever reads cron's mail.
"""

from __future__ import annotations

import pathlib
import sys

import userapi


def main(source: str, db: str) -> int:
    steps = [
        ["check", "--db", db],
        ["backup", "--db", db, f"{db}.yesterday"],
        ["import", "--db", db, "--conflict", "replace", source],
    ]
    if not pathlib.Path(db).exists():  # the first night
        steps = steps[2:]
    # the first step that fails ends the night, and has said why
    return next((status for step in steps if (status := userapi.main(step))), 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
