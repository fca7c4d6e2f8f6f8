"""A real user service for the tests of a client: new for each test, gone after it.

    pytest mock_server.py

Copy the fixture into a conftest.py. The database lives in memory, the port is a free
one, and what the client under test gets is not a mock's guess but the real answers.
"""

from __future__ import annotations

import json
import threading
import urllib.request
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest

from userapi import UserAPI


class Quiet(WSGIRequestHandler):
    def log_message(self, *args: object) -> None:
        """A test's output is about the test."""


@pytest.fixture
def users_url():
    """The URL of a service with one user."""
    app = UserAPI(db=":memory:")
    app.store.create_users([{"name": "Ada", "mail": "ada@example.org"}])
    with make_server("127.0.0.1", 0, app, handler_class=Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/api/user"
        server.shutdown()
        thread.join()
    app.close()


def rename(url: str, name: str) -> dict:
    """The client under test: imagine yours here."""
    request = urllib.request.Request(
        url,
        method="PATCH",
        data=json.dumps({"item": {"name": name}}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.load(response)


def test_a_user_is_renamed(users_url):
    assert rename(f"{users_url}/1", "Augusta")["message"] == "SUCCESS"
    with urllib.request.urlopen(f"{users_url}/1", timeout=10) as response:
        assert json.load(response)["results"] == [
            {"id": 1, "name": "Augusta", "mail": "ada@example.org"}
        ]


def test_each_test_has_its_own_service(users_url):
    with urllib.request.urlopen(users_url, timeout=10) as response:
        assert [user["name"] for user in json.load(response)["results"]] == ["Ada"]
