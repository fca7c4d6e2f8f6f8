"""An appliance's users behind a Unix socket: no port, no token, file rights decide.

    python admin_socket.py /run/appliance/users.sock
    curl --unix-socket /run/appliance/users.sock http://localhost/api/user

After each change the list of mail addresses that the appliance's mailer reads is
written anew: whole, or not at all.
"""

from __future__ import annotations

import os
import pathlib
import sys

from userapi import UserAPI, serve


def main(socket: str) -> None:
    os.umask(0o117)  # all that is made is for the owner and the group
    folder = pathlib.Path(socket).resolve().parent
    recipients = folder / "recipients.txt"

    def write_recipients(*_: object) -> None:
        draft = recipients.with_suffix(".new")
        users = app.store.find_users()
        draft.write_text("".join(f"{user['mail']}\n" for user in users), "utf-8")
        os.replace(draft, recipients)

    app = UserAPI(db=str(folder / "users.db"), on_change=write_recipients)
    write_recipients()
    serve(app, unix=socket)


if __name__ == "__main__":
    main(sys.argv[1])
