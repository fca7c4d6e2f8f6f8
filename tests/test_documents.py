"""The documents: what /openapi.json, /postman.json and /docs say is what there is.

In order: the tools, the document against the module's tables, its examples against a
running server, then the programs that integrators use (a generated client, newman,
Spectral, Schemathesis), and at last a field added to the table in a scratch copy.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from html import escape
from pathlib import Path
from wsgiref.util import setup_testing_defaults

import jsonschema
import openapi_spec_validator
import pytest

import userapi

ROOT = Path(__file__).resolve().parent.parent
MODULE = ROOT / "userapi.py"
NODE = ROOT / "build" / "node" / "node_modules" / ".bin"
BIN = Path(sys.executable).parent
JSON = {"Content-Type": "application/json"}


# ---------------------------------------------------------------------------------
# Tools
# ---------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(folder, module=MODULE, **variables):
    """The URL of a server of its own on an empty database, without the last slash."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("USERAPI_")}
    flags = ["serve", "--db", str(folder / "users.db"), "--port", "0", "--log", "off"]
    told = folder / "told.txt"
    with open(told, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, str(module), *flags],
            stderr=file,
            env={**clean, **variables},
        )
    try:
        end = time.monotonic() + 60
        while not (found := re.search(r"http://[^/ ]+(?=/ )", told.read_text("utf-8"))):
            assert process.poll() is None, told.read_text("utf-8")
            assert time.monotonic() < end, "the server does not start"
            time.sleep(0.02)
        yield found[0]
    finally:
        process.terminate()
        process.wait(30)


def ask(url, method="GET", body=None, headers=None):
    """Status, headers and body of an answer, whatever the status."""
    request = urllib.request.Request(url, body, headers or {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as fault:
        with fault:
            return fault.code, fault.headers, fault.read()


def send(url, method, value):
    """Status and decoded body of the answer to a request with a JSON body."""
    status, _, body = ask(url, method, json.dumps(value).encode(), JSON)
    return status, json.loads(body)


def run(*command, seconds, **more):
    """Run a program to its end and give its output; it must succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=seconds,
        **more,
    )
    output = done.stdout.decode(errors="replace")
    assert done.returncode == 0, f"{command[0]}: {done.returncode}\n{output[-8000:]}"
    return output


def operations(document):
    """Every operation of the document as (path, METHOD, what is told of it)."""
    return [
        (path, method.upper(), told)
        for path, methods in document["paths"].items()
        for method, told in methods.items()
    ]


def follow(document, told):
    """What a reference points at, or the thing itself."""
    while "$ref" in told:
        found = document
        for name in told["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        told = found
    return told


def call(app, path, **environ):
    """Status, headers and body of a WSGI application's answer to a GET."""
    setup_testing_defaults(environ)
    environ.update(PATH_INFO=path, REMOTE_ADDR="127.0.0.1")
    got = []
    body = b"".join(app(environ, lambda status, headers: got.extend((status, headers))))
    return got[0], dict(got[1]), body.decode()


DOCUMENT = userapi.openapi()
OPERATIONS = operations(DOCUMENT)
NAMED = pytest.mark.parametrize(
    "path, method, told",
    OPERATIONS,
    ids=[told["operationId"] for *_, told in OPERATIONS],
)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("shared")) as url:
        yield url


# ---------------------------------------------------------------------------------
# The document and the tables
# ---------------------------------------------------------------------------------


def test_is_valid_openapi():
    assert DOCUMENT["openapi"].startswith("3.1")
    openapi_spec_validator.validate(DOCUMENT)
    json.dumps(DOCUMENT, allow_nan=False)


def test_every_route_is_an_operation_and_every_operation_is_a_route():
    routed = {
        (re.sub("<(.+?):id>", r"{\1}", path), method)
        for path, resource in userapi.find_resources().items()
        for method in resource.operations
    }
    assert {(path, method) for path, method, _ in OPERATIONS} == routed
    ids = [told["operationId"] for *_, told in OPERATIONS]
    assert len(set(ids)) == len(ids)
    tags = {tag["name"] for tag in DOCUMENT["tags"]}
    assert tags == {tag for *_, told in OPERATIONS for tag in told["tags"]}
    for known in userapi.OPERATIONS:
        versions = ("", "_v1", "_v2") if known.path[:5] in ("/user", "/chan") else ("",)
        assert {known.name + version for version in versions} <= set(ids)


@pytest.mark.parametrize("base", ["/api", "/api/v1", "/api/v2"])
def test_every_uri_of_the_contract_is_there_in_every_version(base):
    rows = [f"/user/{{id}}/{kind}" for kind in ("phone", "address")]
    paths = ["/user", "/user/0", "/user/{id}", "/changes", *rows]
    for path in paths + [f"{row}/{{n}}" for row in rows]:
        assert "get" in DOCUMENT["paths"][base + path]


@NAMED
def test_parameters_are_those_of_the_table(path, method, told):
    known = next(
        operation
        for operation in userapi.OPERATIONS
        if re.fullmatch(rf"{operation.name}(_v[12])?", told["operationId"])
    )
    there = {(each["in"], each["name"]) for each in told["parameters"]}
    assert {name for place, name in there if place == "query"} == set(known.params)
    assert {name for place, name in there if place == "path"} == set(
        re.findall("{(.+?)}", path)
    )
    for each in told["parameters"]:
        assert each["description"] and "schema" in each
    limit = [each for each in told["parameters"] if each["name"] == "limit"]
    assert all(e["schema"]["minimum"] == 1 for e in limit)
    assert all(e["schema"]["maximum"] == 1000 for e in limit)


@NAMED
def test_every_status_is_told(path, method, told):
    statuses = set(map(int, told["responses"]))
    assert {400, 403, 406, 500, 503} <= statuses
    if path != "/health":
        assert {401, 429} <= statuses
    if "requestBody" in told:
        assert {411, 413, 415, 422} <= statuses
        assert set(told["requestBody"]["content"]) >= {"application/json"}
    if method in ("POST", "PUT", "PATCH", "DELETE"):
        assert 507 in statuses
    if "{id}" in path:
        assert 404 in statuses
    if method in ("PUT", "PATCH", "DELETE") and "{id}" in path:
        assert 412 in statuses
    if path.endswith("/changes"):
        assert 410 in statuses
    assert (201 if method == "POST" else 200) in statuses


@pytest.mark.parametrize("status", userapi.PROBLEMS)
def test_every_problem_is_described(status):
    response = DOCUMENT["components"]["responses"][f"Problem{status}"]
    title, meaning = userapi.PROBLEMS[status][:2]
    assert title in response["description"] and meaning in response["description"]
    content = response["content"]["application/problem+json"]
    real = json.loads(userapi.Problem(status, "why").body())
    assert content["example"].keys() == real.keys()
    assert content["example"]["status"] == status
    validate(content["schema"], content["example"])


def test_every_problem_that_a_request_can_meet_is_in_an_answer():
    told = {int(status) for *_, each in OPERATIONS for status in each["responses"]}
    assert set(userapi.PROBLEMS) <= told


def test_real_problems_look_as_described(url):
    schema = DOCUMENT["components"]["schemas"]["Problem"]
    item = {"item": {"name": "", "mail": "no", "phone": [{"number": "x"}]}}
    for got, status in (
        (ask(f"{url}/api/user/77"), 404),
        (ask(f"{url}/api/user?nothing=1"), 400),
        (ask(f"{url}/api/user/0", "DELETE"), 405),
        (ask(f"{url}/api/changes", headers={"Accept": "text/css"}), 406),
        (ask(f"{url}/api/user", "POST", b"a=b", {"Content-Type": "text/css"}), 415),
        (ask(f"{url}/api/v2/user", "POST", json.dumps(item).encode(), JSON), 422),
    ):
        assert got[0] == status
        assert got[1]["Content-Type"] == "application/problem+json"
        validate(schema, json.loads(got[2]))
        described = DOCUMENT["components"]["responses"][f"Problem{status}"]
        for name in described.get("headers", ()):
            assert got[1][name]


def test_a_token_is_offered_in_both_schemes_and_none_is_needed_without_one():
    schemes = DOCUMENT["components"]["securitySchemes"].values()
    assert {scheme["scheme"] for scheme in schemes} == {"bearer", "basic"}
    assert {} in DOCUMENT["security"]


@pytest.mark.parametrize("prefix", ["", "/people", "/a/b%20c"])
def test_the_documents_honour_the_prefix(prefix):
    app = userapi.UserAPI(":memory:", open=True)
    mounted = {"SCRIPT_NAME": prefix.replace("%20", " "), "HTTP_HOST": "localhost:8080"}
    try:
        _, _, body = call(app, "/openapi.json", **mounted)
        assert json.loads(body)["servers"] == [{"url": prefix or "/"}]
        _, _, body = call(app, "/postman.json", **mounted)
        variables = {v["key"]: v["value"] for v in json.loads(body)["variable"]}
        assert variables == {"baseUrl": f"http://localhost:8080{prefix}", "token": ""}
        _, headers, body = call(app, "/docs", **mounted)
        assert headers["Content-Type"].startswith("text/html")
        assert f'data-path="{prefix}/api/v2/user"' in body
    finally:
        app.close()


@pytest.mark.parametrize("name", ["openapi", "postman"])
def test_the_command_prints_what_the_server_serves(name, url):
    printed = json.loads(run(sys.executable, MODULE, name, seconds=60))
    status, headers, body = ask(f"{url}/{name}.json")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert printed == json.loads(body.replace(url.encode(), b"http://127.0.0.1:8080"))


# ---------------------------------------------------------------------------------
# The examples and the running server
# ---------------------------------------------------------------------------------


def validate(schema, value):
    """Check a value by a schema of the document (the references are its own)."""
    schema = {**schema, "components": DOCUMENT["components"]}
    jsonschema.Draft202012Validator(schema).validate(value)


def form(value):
    """The shape of a value: its members and their types, those of a list's first."""
    if isinstance(value, dict):
        return {name: form(each) for name, each in value.items()}
    if isinstance(value, list):
        return [form(value[0])] if value else []
    return type(value)


def new_user(url):
    """The id of a new user that has one of each kind of rows."""
    rows = {"phone": [{"number": "112"}], "address": [{"city": "Kiel"}]}
    item = {"name": "Ada", "mail": "ada@example.org", **rows}
    status, body = send(f"{url}/api/v2/user", "POST", {"item": item})
    assert status == 201
    return body["results"][0]["id"]


def example_requests(url, path, method, told):
    """An operation's examples as (media, URL, body), each with a new user to change."""
    bodies = told.get("requestBody", {}).get("content", {None: {}})
    for media, content in bodies.items():
        user = new_user(url)
        target, example = url + path.format(id=user, n=1), content.get("example")
        if any(each["name"] == "id" and each["in"] == "query" and each["required"]
               for each in told["parameters"]):  # fmt: skip
            target += f"?id={1 if '{id}' in path else user}"
        if media == "application/x-ndjson":  # told in words: no tool can send it
            line = content["schema"]["description"]
            example = line[line.index("{") :] + "\n"
        if isinstance(example, dict):
            example = json.dumps(example)
        if example and "{id}" not in path:
            example = example.replace('"id": 1', f'"id": {user}')
        yield media, target, example.encode() if example else None


@NAMED
def test_examples_are_true(path, method, told, url):
    """Each example of a body is taken, and the answer is what is told, as is told."""
    status, answer = next(iter(told["responses"].items()))
    for media, target, body in example_requests(url, path, method, told):
        headers = {"Content-Type": media} if media else {}
        got, heads, text = ask(target, method, body, headers)
        assert got == int(status), text
        kind = heads["Content-Type"].partition(";")[0]
        described = answer["content"][kind]
        for name in ("ETag", "Location", "Link"):
            assert name in answer["headers"] or heads[name] is None
        if kind == "application/json":
            validate(described["schema"], json.loads(text))
        if "example" in described:
            validate(described["schema"], described["example"])
        if "example" in described and media not in ("text/csv", "application/x-ndjson"):
            assert form(json.loads(text)) == form(described["example"])


ADA = {"name": "Ada", "mail": "ada@example.org"}
BODIES = [
    ({"item": ADA}, True),
    ({"item": {**ADA, "name": "李小龍"}}, True),
    ({"item": {**ADA, "name": ""}}, False),
    ({"item": {**ADA, "nick": "A"}}, False),
    ({"item": {**ADA, "version": 7}}, True),
    ({"item": {"name": "Ada"}}, False),
    ({"items": [{**ADA, "id": 10**9}, {**ADA, "id": 10**10}, ADA]}, True),
    ({"items": []}, False),
    ({"item": ADA, "items": [ADA]}, False),
    ({}, False),
    (
        {"item": {**ADA, "phone": [{"number": "1-1-2"}, {"number": "112", "id": 4}]}},
        True,
    ),
    ({"item": {**ADA, "phone": [{"number": "11"}]}}, False),
    ({"item": {**ADA, "address": [{"city": "Kiel"}, {"street": "1"}]}}, True),
    ({"item": {**ADA, "address": [{"street": "", "postcode": "24103"}]}}, False),
]


@pytest.mark.parametrize("body, good", BODIES)
def test_the_schema_of_a_body_says_what_the_server_says(body, good, url):
    schema = DOCUMENT["components"]["schemas"]["UserV2CreateBody"]
    schema = {**schema, "components": DOCUMENT["components"]}
    assert jsonschema.Draft202012Validator(schema).is_valid(body) == good
    status, _ = send(f"{url}/api/v2/user?dry_run=true", "POST", body)
    assert status == (201 if good else 422)


@NAMED
def test_the_reference_has_every_operation(path, method, told, url):
    """People read of v2 and of what has no version; the rest are the same URIs."""
    status, headers, page = ask(f"{url}/docs")
    assert status == 200
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    page = page.decode()
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", page)
    if re.match("/api/(?!v2/)", path):
        return
    article = re.search(rf'id="{told["operationId"]}".*?</article>', page, re.DOTALL)[0]
    assert escape(told["summary"]) in article
    assert f'data-method="{method}"' in article and f'data-path="{path}"' in article
    assert f"curl -X {method} " in article
    for each in told["parameters"]:
        assert f'name="{each["name"]}"' in article
    for status in told["responses"]:
        assert re.search(rf"\b{status}\b", article)
    assert ("textarea" in article) == ("requestBody" in told)


# ---------------------------------------------------------------------------------
# What integrators use
# ---------------------------------------------------------------------------------

CLIENT = """
import sys
from client import Client
from client.api.users import create_user_v2, delete_user_v2, get_user_v2
from client.api.users import list_users_v2, merge_user_v2, replace_user_v2
from client.api.users import get_user
from client.api.phones import create_phone_v2
from client.models import ListUsersV2FieldsItem as Member
from client.models import UserV2Item, UserV2CreateBody, UserV2ReplaceBody
from client.models import UserV2Merge, UserV2MergeBody, PhoneItem, PhoneCreateBody

client = Client(base_url=sys.argv[1], raise_on_unexpected_status=True)
one = UserV2CreateBody(item=UserV2Item(name="Ada", mail="ada@example.org"))
made = create_user_v2.sync(client=client, body=one)
assert (made.code, made.message) == (0, "SUCCESS"), made
id = made.results[0].id
found = get_user_v2.sync(id, client=client).results[0]
assert (found.name, found.mail, found.version) == ("Ada", "ada@example.org", 1), found
assert found.created.tzinfo is not None
number = PhoneCreateBody(item=PhoneItem(number="112"))
create_phone_v2.sync(id, client=client, body=number)
item = UserV2Item(name="Ada L.", mail="ada@example.com")
replace_user_v2.sync(id, client=client, body=UserV2ReplaceBody(item=item))
merge = UserV2MergeBody(item=UserV2Merge(name="Ada Lovelace"))
merge_user_v2.sync(id, client=client, body=merge)
listed = list_users_v2.sync(client=client, q="LOVE", limit=10, fields=[Member.NAME])
(found,) = listed.results
assert found.name == "Ada Lovelace", found
found = get_user_v2.sync(id, client=client).results[0]
assert (found.mail, found.phone[0].number) == ("ada@example.com", "112"), found
shown = get_user.sync(id, client=client).results[0].to_dict()
assert set(shown) == {"id", "name", "mail"}, shown
assert delete_user_v2.sync(id, client=client).message == "SUCCESS"
gone = get_user_v2.sync_detailed(id, client=client)
assert gone.status_code == 404 and gone.parsed.detail, gone
"""


def test_a_generated_client_compiles_and_works_unpatched(url, tmp_path):
    (tmp_path / "openapi.json").write_text(json.dumps(DOCUMENT), "utf-8")
    where = ["--path", "openapi.json", "--meta", "none", "--output-path", "client"]
    told = run(
        BIN / "openapi-python-client", "generate", *where, seconds=120, cwd=tmp_path
    )
    skipped = re.findall(r"WARNING parsing .*?\n\n(.*)", told)
    assert all(reason.startswith("Unsupported content type") for reason in skipped), (
        told
    )
    names = {path.stem for path in (tmp_path / "client" / "api").glob("*/*.py")}
    assert {told["operationId"] for *_, told in OPERATIONS} <= names
    run(sys.executable, "-m", "compileall", "-q", "client", seconds=120, cwd=tmp_path)
    run(sys.executable, "-c", CLIENT, url, seconds=120, cwd=tmp_path)


def calls_of(items):
    """Every request of a Postman collection, those of its folders included."""
    for item in items:
        yield from calls_of(item["item"]) if "item" in item else (item,)


def test_the_collection_has_every_operation_once_and_the_tutorial_first():
    collection = userapi.postman()
    assert collection["info"]["schema"].endswith("/v2.1.0/collection.json")
    tutorial, folders = collection["item"][:5], collection["item"][5:]
    assert [
        f"{each['request']['method']} {each['request']['url']['raw']}"
        for each in tutorial
    ] == [
        "GET {{baseUrl}}/api/user/0",
        "GET {{baseUrl}}/api/user/1",
        "POST {{baseUrl}}/api/user",
        "PUT {{baseUrl}}/api/user/{{user}}",
        "DELETE {{baseUrl}}/api/user/1337",
    ]
    assert all("request" in each for each in tutorial)
    assert all(each["item"] for each in folders)
    calls = list(calls_of(collection["item"]))
    assert len(calls) == len(OPERATIONS)
    bodies = sum("body" in each["request"] for each in calls)
    assert bodies == sum("requestBody" in told for *_, told in OPERATIONS)
    for each in calls:
        assert each["request"]["description"]
        (event,) = each["event"]
        script = "\n".join(event["script"]["exec"])
        assert event["listen"] == "test" and script.count("pm.test(") == 2
    assert {each["key"] for each in collection["variable"]} == {"baseUrl", "token"}


@pytest.mark.parametrize("token", ["", "token-1"])
def test_newman_runs_the_collection_twice(token, tmp_path):
    variables = {"USERAPI_TOKEN": token} if token else {}
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with serving(tmp_path, **variables) as url:
        status, _, body = ask(f"{url}/postman.json", headers=headers)
        assert status == 200
        (tmp_path / "collection.json").write_bytes(body)
        for _ in range(2):
            run(
                *(NODE / "newman", "run", "collection.json", "--env-var"),
                *(f"token={token}", "--reporters", "json"),
                *("--reporter-json-export", "report.json"),
                seconds=120,
                cwd=tmp_path,
            )
            report = json.loads((tmp_path / "report.json").read_text("utf-8"))["run"]
            assert report["failures"] == []
            assert report["stats"]["requests"]["failed"] == 0
            assert report["stats"]["assertions"]["total"] == 2 * len(OPERATIONS)
            status, _, body = ask(f"{url}/api/user/0", headers=headers)
            assert json.loads(body) == {"results": []}


def test_spectral_finds_no_error(tmp_path):
    (tmp_path / "openapi.json").write_text(json.dumps(DOCUMENT), "utf-8")
    (tmp_path / "ruleset.yaml").write_text("extends: spectral:oas\n", "utf-8")
    run(
        *(NODE / "spectral", "lint", "openapi.json", "--ruleset", "ruleset.yaml"),
        *("--fail-severity", "error"),
        seconds=120,
        cwd=tmp_path,
    )


@pytest.mark.parametrize(
    "seed, phases, paths",
    [
        (20, "examples,coverage,fuzzing", r"^/api/v2/user(/0|/\{id\})?$"),
        (21, "fuzzing,stateful", "^/api/v2/"),
        (22, "examples,coverage", r"^/api/(v1/)?user/\{id\}$|^/[^a]|^/api/changes"),
    ],
)
def test_schemathesis_finds_nothing(seed, phases, paths, tmp_path):
    """All of its checks, bounded; other seeds are for whoever has the time."""
    with serving(tmp_path) as url:
        run(
            *(BIN / "schemathesis", "run", f"{url}/openapi.json", "--checks", "all"),
            *("--seed", seed, "--phases", phases, "--max-examples", "8"),
            *("--include-path-regex", paths, "--no-color"),
            seconds=200,
            cwd=tmp_path,
        )


# ---------------------------------------------------------------------------------
# Changing it: one line in the table
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["", ", csv=True"], ids=["plain", "csv"])
def test_a_field_added_to_the_table_is_everywhere(flag, tmp_path):
    source = MODULE.read_text("utf-8")
    readme = (ROOT / "README.md").read_text("utf-8")
    (line,) = re.findall(r"(?m)^(Field\(.+)\),$", readme)
    line = f"{line}{flag}),\n    "
    place = source.index('Field("phone", "Phone"')
    copy = tmp_path / "userapi.py"
    copy.write_text(source[:place] + line + source[place:], "utf-8")
    with serving(tmp_path, copy) as url:
        item = {"name": "Ada", "mail": "ada@example.org", "nick": "A" * 201}
        status, body = send(f"{url}/api/v2/user", "POST", {"item": item})
        assert (status, body["errors"][0]["pointer"]) == (422, "#/item/nick")
        status, body = send(
            f"{url}/api/v2/user", "POST", {"item": {**item, "nick": "Al"}}
        )
        assert (status, body["results"][0]["nick"]) == (201, "Al")
        one = f"{url}/api/v2/user/{body['results'][0]['id']}"
        status, body = send(one, "PATCH", {"item": {"nick": "Bo"}})
        assert (status, body["results"][0]["nick"]) == (200, "Bo")
        assert json.loads(ask(one)[2])["results"][0]["nick"] == "Bo"
        shown = json.loads(ask(one.replace("/v2", "/v1"))[2])["results"][0]
        assert shown.keys() == {"id", "name", "mail"}

        schemas = json.loads(ask(f"{url}/openapi.json")[2])["components"]["schemas"]
        for name in ("UserV2", "UserV2Item", "UserV2Merge"):
            assert "nick" in schemas[name]["properties"]
        assert schemas["UserV2Item"]["properties"]["nick"]["maxLength"] == 200
        assert "nick" not in schemas["UserV1Item"]["properties"]
        assert '\\"nick\\": \\"Simo\\"' in ask(f"{url}/postman.json")[2].decode()
        assert escape('"nick": "Simo"') in ask(f"{url}/docs")[2].decode()
        assert '"nick"' in ask(f"{url}/")[2].decode()

        rows = b"name,mail,nick\r\nEve,eve@example.org,E\r\n"
        csv = {"Content-Type": "text/csv"}
        status, _, _ = ask(f"{url}/api/v2/user", "POST", rows, csv)
        header = ask(f"{url}/api/v2/user?format=csv")[2].decode().split("\r\n")[0]
        assert status == (201 if flag else 422)
        assert ("nick" in header.split(",")) == bool(flag)
    openapi_spec_validator.validate(load(copy).openapi())


def load(path):
    spec = importlib.util.spec_from_file_location("userapi_copy", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["userapi_copy"] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["userapi_copy"]
    return module
