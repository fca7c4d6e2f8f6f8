"""The page, driven in a real Chromium against a real server, as a person would.

Every test gets its own database, server process and browser context. What may never
happen on any page (an error in the console, a request to another host, a breach of the
Content-Security-Policy, a script out of somebody's data) is watched in all of them.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).parents[1]
NODE = ROOT / "build" / "node" / "node_modules"  # filled by .ci/run
SCREENSHOTS = ROOT / "build" / "screenshots"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
]
SIZES = {360: 740, 768: 1024, 1280: 800}
LOOKS = [(width, scheme) for width in SIZES for scheme in ("light", "dark")]
PROBE = "<img src=x onerror=hit()>\"'><script>hit()</script>"
PEOPLE = [
    ("Simone Giertz", "giertz@shittyrobots.example", "+46 8 5550101", "Stockholm"),
    ("Zoë Ångström", "zoe@example.org", "+46 8 5550102", "Uppsala"),
    ("محمد الفاسي", "mfassi@example.com", "+212 5 3755", "فاس"),
    ("Ada Lovelace", "ada@example.net", "+44 20 5550103", "London"),
    ("李小龍", "li@example.org", "+852 5550104", "香港"),
    ("Grace Hopper", "grace@example.com", "+1 (202) 555-0105", "Arlington"),
    ("Ольга Ладыженская", "olga@example.org", "+7 812 5550106", "Кологрив"),
    ("José Hernández", "jose@example.net", "+54 11 5550107", "Buenos Aires"),
    ("नलिनी मालाणी", "nalini@example.org", "+91 22 5550108", "मुंबई"),
    ("Noor Haddad", "noor@example.com", "+961 1 555109", "Beirut"),
    ("Linus Sebelius", "linus@example.net", "+358 9 5550110", "Helsinki"),
    ("Chiara Ricci", "chiara@example.org", "+39 06 5550111", "Roma"),
]

#: A host program: userapi below a prefix, a thread for each connection.
MOUNTED = """
import socketserver
import sys
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from userapi import UserAPI

class Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True

class Quiet(WSGIRequestHandler):
    def log_message(self, *args):
        pass

app, prefix = UserAPI(db=sys.argv[1], log="off"), "/our tools/users"

def host(environ, start_response):
    path = environ["PATH_INFO"]
    if not path.startswith(prefix):
        start_response("404 Not Found", [("Content-Type", "text/plain")])
        return [b"not here"]
    environ.update(SCRIPT_NAME=prefix, PATH_INFO=path[len(prefix):])
    return app(environ, start_response)

server = make_server("127.0.0.1", 0, host, Server, Quiet)
print(server.server_port, flush=True)
server.serve_forever()
"""

expect.set_options(timeout=15_000)


class Server:
    """A userapi process on a database of its own, and a client for it."""

    def __init__(self, db: Path, port: int = 0, token: str = "") -> None:
        self.token = token
        env = {k: v for k, v in os.environ.items() if not k.startswith("USERAPI_")}
        env.update({"USERAPI_TOKEN": token} if token else {})
        command = [sys.executable, "userapi.py", "serve", "--log", "off"]
        self.process = subprocess.Popen(
            [*command, "--db", str(db), "--port", str(port)],
            cwd=ROOT,
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        line = self.process.stderr.readline()
        found = re.search(r"http://[^\s]+", line)
        assert found, f"no start line but {line!r}"
        self.url = found[0]
        self.port = urllib.parse.urlsplit(self.url).port

    def stop(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)
        self.process.stderr.close()

    def call(self, method, path, body=None, **headers):
        """The parsed answer of a call that must succeed."""
        headers = {k.replace("_", "-"): v for k, v in headers.items()}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        if isinstance(body, dict):
            headers.setdefault("Content-Type", "application/json")
        url = self.url.rstrip("/") + path
        request = urllib.request.Request(url, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.loads(answer.read())

    def add(self, *users):
        return self.call("POST", "/api/v2/user", {"items": list(users)})["results"]

    def users(self, query=""):
        return self.call("GET", f"/api/v2/user{query}")["results"]

    def user(self, number):
        return self.users(f"/{number}")[0]

    def patch(self, number, **members):
        return self.call("PATCH", f"/api/v2/user/{number}", {"item": members})


def person(name, mail, number=None, city=None):
    return {
        "name": name,
        "mail": mail,
        "phone": [{"label": "work", "number": number}] if number else [],
        "address": [{"label": "home", "city": city}] if city else [],
    }


def many(count):
    return [person(f"User {n:05}", f"user{n}@example.org") for n in range(1, count + 1)]


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM, "Debian's chromium is needed: apt-get install chromium"
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def serve(tmp_path):
    servers = []

    def start(db=tmp_path / "users.db", **settings):
        servers.append(Server(db, **settings))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.stop()


@pytest.fixture
def server(serve):
    """A server with a dozen people."""
    server = serve()
    server.add(*[person(*each) for each in PEOPLE])
    return server


@pytest.fixture
def visit(browser):
    """Opens pages, and sees to it at the end that none did what none may do."""
    pages = []

    def visit(url, wait=".user", refusals=False, **settings):
        settings.setdefault("viewport", {"width": 1280, "height": 800})
        context = browser.new_context(locale="en-GB", **settings)
        page = context.new_page()
        page.faults, page.refusals = [], refusals
        pages.append(page)
        origin = "/".join(url.split("/")[:3]).split("@")[-1].removeprefix("http://")

        def on_console(message):
            failed = message.text.startswith("Failed to load resource")
            if message.type in ("error", "warning") and not (page.refusals and failed):
                page.faults.append(f"{message.type}: {message.text}")

        def on_request(request):
            parts = urllib.parse.urlsplit(request.url)
            host = parts.netloc.split("@")[-1]
            if parts.scheme not in ("data", "blob") and host != origin:
                page.faults.append(f"request to {request.url}")

        page.on("console", on_console)
        page.on("request", on_request)
        page.on("pageerror", lambda error: page.faults.append(f"thrown: {error}"))
        page.on("dialog", lambda box: page.faults.append(f"dialog: {box.message}"))
        page.add_init_script(
            "window.breaches = []; window.hit = () => breaches.push('script ran');"
            "document.addEventListener('securitypolicyviolation', (event) =>"
            " breaches.push(event.violatedDirective + ' ' + event.blockedURI));"
        )
        page.goto(url)
        if wait:
            page.wait_for_selector(wait)
        return page

    yield visit
    faults = []
    for page in pages:
        faults += page.faults + page.evaluate("window.breaches || []")
    for page in pages:
        page.context.close()
    assert faults == []


def names(page):
    return page.locator("tr.user td:nth-child(2)").all_inner_texts()


def wait_for(page, script):
    """Poll, as the page's policy forbids Playwright's own way of polling (eval)."""
    deadline = time.monotonic() + 15
    while not page.evaluate(script):
        assert time.monotonic() < deadline, f"never came true: {script}"
        page.wait_for_timeout(30)


def wait_for_names(page, wanted):
    deadline = time.monotonic() + 15
    while names(page) != wanted:
        assert time.monotonic() < deadline, f"{names(page)} is not {wanted}"
        page.wait_for_timeout(30)


def first_of(held, page):
    """The first request that a route holds back, as soon as it is there."""
    deadline = time.monotonic() + 15
    while not held:
        assert time.monotonic() < deadline, "nothing was asked"
        page.wait_for_timeout(30)
    return held[0]


def open_user(page, name):
    page.get_by_role("button", name=name, exact=True).click()
    expect(page.locator("#form")).to_be_visible()


def save(page):
    page.locator("#form").get_by_role("button", name="Save").click()


def axe(page):
    """The serious and critical findings of axe-core."""
    page.evaluate((NODE / "axe-core" / "axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        (each["id"], [node["html"][:120] for node in each["nodes"]])
        for each in found["violations"]
        if each["impact"] in ("serious", "critical")
    ]


def drop(page, name, text, kind="text/csv"):
    """Let a file fall onto the page, as from the desktop."""
    script = (
        "([name, text, kind]) => { const data = new DataTransfer();"
        " data.items.add(new File([text], name, {type: kind})); return data; }"
    )
    data = page.evaluate_handle(script, [name, text, kind])
    page.dispatch_event("body", "dragover", {"dataTransfer": data})
    expect(page.locator("#import")).to_be_visible()
    page.dispatch_event("#import", "drop", {"dataTransfer": data})


# The list


def test_the_list_shows_name_mail_phone_and_city(server, visit):
    page = visit(server.url)
    row = page.get_by_role("row").filter(has_text="Zoë Ångström")
    for text in ("zoe@example.org", "+46 8 5550102", "Uppsala"):
        expect(row.get_by_role("cell", name=text)).to_be_visible()
    expect(page.locator("#count")).to_have_text(re.compile(r"^12\b"))


def test_searching_as_one_types(server, visit):
    page = visit(server.url)
    page.get_by_role("searchbox").press_sequentially("ZOË", delay=20)
    wait_for_names(page, ["Zoë Ångström"])
    wait_for(page, "location.search.includes('q=ZO%C3%8B&')")
    page.get_by_role("searchbox").fill("@example.net")
    wait_for_names(page, ["Ada Lovelace", "José Hernández", "Linus Sebelius"])
    page.get_by_role("searchbox").fill("")
    wait_for(page, "document.querySelectorAll('tr.user').length === 12")
    assert "q=&" in page.url


def test_a_search_for_the_word_that_is_the_usual_order(server, visit):
    server.add(person("Tom Name", "tom@example.org"))
    page = visit(server.url)
    page.get_by_role("searchbox").fill("name")
    wait_for_names(page, ["Tom Name"])
    assert page.url.endswith("?q=name&sort=name")


def test_typing_is_one_request_not_one_a_letter(server, visit):
    page = visit(server.url)
    asked = []
    page.on("request", lambda r: asked.append(r.url) if "q=" in r.url else None)
    page.get_by_role("searchbox").press_sequentially("lovelace", delay=5)
    wait_for_names(page, ["Ada Lovelace"])
    assert len(asked) < 8


def test_an_older_answer_never_overwrites_a_newer(server, visit):
    page = visit(server.url)
    held = []
    page.route(re.compile(r"q=grace(&|$)"), lambda route: held.append(route))
    page.get_by_role("searchbox").fill("grace")
    wait_for(page, "location.search.includes('q=grace')")
    page.get_by_role("searchbox").fill("zoë")
    wait_for_names(page, ["Zoë Ångström"])
    assert held
    with page.expect_response(re.compile("q=grace")):
        for route in held:
            route.continue_()
    page.wait_for_timeout(300)
    assert names(page) == ["Zoë Ångström"]


def test_sorting_by_column_and_what_the_address_holds(server, visit):
    page = visit(server.url)
    first = names(page)
    assert first == sorted(first, key=str.casefold)
    mail = page.get_by_role("columnheader", name="Mail")
    mail.get_by_role("button").click()
    expect(mail).to_have_attribute("aria-sort", "ascending")
    by_mail = [each[0] for each in sorted(PEOPLE, key=lambda each: each[1])]
    wait_for_names(page, by_mail)
    mail.get_by_role("button").click()
    expect(mail).to_have_attribute("aria-sort", "descending")
    wait_for_names(page, by_mail[::-1])
    assert "sort=-mail" in page.url
    page.reload()
    wait_for_names(page, by_mail[::-1])
    page.go_back()
    wait_for_names(page, by_mail)
    page.go_back()
    wait_for_names(page, first)


def test_a_link_opens_a_search_and_back_leaves_it(server, visit):
    page = visit(server.url + "?q=example.com&sort=-name")
    wait_for_names(page, ["محمد الفاسي", "Noor Haddad", "Grace Hopper"])
    expect(page.get_by_role("searchbox")).to_have_value("example.com")
    page.get_by_role("searchbox").fill("noor")
    wait_for_names(page, ["Noor Haddad"])
    page.go_back()
    wait_for_names(page, ["محمد الفاسي", "Noor Haddad", "Grace Hopper"])
    expect(page.get_by_role("searchbox")).to_have_value("example.com")
    page.go_forward()
    wait_for_names(page, ["Noor Haddad"])


def test_the_list_scrolls_to_its_end_and_back_in_a_bounded_document(serve, visit):
    server = serve()
    server.add(*many(2500))
    page = visit(server.url)
    most, last = 0, page.get_by_role("button", name="User 02500")
    for _ in range(200):
        if last.count():
            break
        page.evaluate("scrollBy(0, innerHeight * 8)")
        page.evaluate("new Promise(requestAnimationFrame)")
        most = max(most, page.locator("tr.user").count())
    expect(last).to_be_attached()
    assert 0 < most <= 400
    assert page.locator("tr.user").count() <= 400
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    expect(last).to_be_in_viewport()
    page.evaluate("scrollTo(0, document.body.scrollHeight / 2)")
    index = "+document.querySelector('tr.user')?.getAttribute('aria-rowindex')"
    wait_for(page, f"{index} > 800 && {index} < 1400")
    middle = page.get_by_role("button", name=re.compile("User 01[123]")).first
    expect(middle).to_be_attached()
    page.evaluate("scrollTo(0, 0)")
    expect(page.get_by_role("button", name="User 00001")).to_be_in_viewport()


def test_far_down_the_count_is_right_too(serve, visit):
    server = serve()
    server.add(*many(1000))
    page = visit(server.url)
    row = "+document.querySelector('tr.user')?.getAttribute('aria-rowindex')"
    for _ in range(200):
        if page.evaluate(f"{row} > 200"):
            break
        page.evaluate("scrollBy(0, innerHeight * 2)")
        page.evaluate("new Promise(requestAnimationFrame)")
    assert page.evaluate(f"{row} > 200")
    server.call("DELETE", "/api/v2/user?id=1,2,500")
    expect(page.locator("#count")).to_have_text("997")
    expect(page.get_by_role("table")).to_have_attribute("aria-rowcount", "998")


def test_the_list_goes_on_past_what_a_browser_can_lay_out(serve, visit):
    """Some millions of pixels: what is far above is given up then."""
    server = serve()
    server.add(*many(1000))
    page = visit(server.url)
    page.evaluate("pages = Array(4003).fill(pages[0]); list(true)")
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    wait_for(page, "origin === 2000")
    last = page.get_by_role("button", name="User 01000")
    for _ in range(100):
        if last.count():
            break
        page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
        page.evaluate("new Promise(requestAnimationFrame)")
        assert page.evaluate("document.documentElement.scrollHeight") < 33e6
    expect(last).to_be_attached()
    page.evaluate("scrollTo(0, 0)")
    expect(page.get_by_role("button", name="User 00001")).to_be_in_viewport()
    wait_for(page, "origin === 0")


def test_a_million_users(serve, visit, tmp_path):
    """The first paint and the first rows come as soon as with a dozen."""
    file = tmp_path / "million.csv"
    with file.open("w", encoding="utf-8") as out:
        out.write("name,mail\n")
        out.writelines(f"User {n:07},u{n}@example.org\n" for n in range(1_000_000))
    db = tmp_path / "million.db"
    command = [sys.executable, "userapi.py", "import", str(file), "--db", str(db)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120, stderr=subprocess.PIPE)
    page = visit(serve(db).url)
    expect(page.locator("#count")).to_have_text(re.compile(r"^1,000,000"))
    paints = []
    for _ in range(3):
        page.reload()
        page.wait_for_selector(".user")
        script = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
        paints.append(page.evaluate(script))
    assert min(paints) < 1000, paints
    for _ in range(30):
        page.mouse.wheel(0, 4000)
        page.evaluate("new Promise(requestAnimationFrame)")
    script = "+document.querySelector('tr.user')?.getAttribute('aria-rowindex') > 500"
    wait_for(page, script)
    assert page.locator("tr.user").count() <= 400
    page.get_by_role("searchbox").fill("User 0777777")
    wait_for_names(page, ["User 0777777"])


def test_an_empty_database_says_what_to_do(serve, visit):
    page = visit(serve().url, wait="#state button")
    expect(page.locator("#state")).to_contain_text("No users yet")
    page.locator("#state").get_by_role("button").first.click()
    expect(page.locator("#form")).to_be_visible()


def test_a_search_without_result_says_what_to_do(server, visit):
    page = visit(server.url + "?q=nobody%20at%20all", wait="#state button")
    expect(page.locator("#state")).to_contain_text("nobody at all")
    page.locator("#state").get_by_role("button").click()
    wait_for(page, "document.querySelectorAll('tr.user').length === 12")


def test_an_error_says_what_to_do(server, visit):
    page = visit(server.url, refusals=True)
    page.route("**/api/v2/user?*", lambda route: route.abort())
    page.get_by_role("searchbox").fill("zoë")
    expect(page.locator("#state")).to_contain_text("did not answer")
    expect(page.locator("tr.user")).to_have_count(0)
    page.unroute("**/api/v2/user?*")
    page.locator("#state").get_by_role("button", name="Try again").click()
    wait_for_names(page, ["Zoë Ångström"])


def test_a_sort_that_cannot_be_is_an_error_with_a_way_out(server, visit):
    page = visit(server.url + "?sort=shoe", wait="#state button", refusals=True)
    expect(page.locator("#state")).to_contain_text("sort")
    page.get_by_role("columnheader", name="Name").get_by_role("button").click()
    wait_for(page, "document.querySelectorAll('tr.user').length === 12")


# One user


def test_adding_a_user_with_phones_and_addresses(server, visit):
    page = visit(server.url)
    page.get_by_role("button", name="New user").click()
    form = page.get_by_role("dialog", name="New user")
    form.get_by_label("Name").fill("Katalin Karikó")
    form.get_by_label("Mail").fill("kati@example.org")
    for number in ("+36 62 555010", "+1 215 5550111"):
        form.get_by_role("button", name="Add phone").click()
        form.get_by_label("Number").last.fill(number)
    form.get_by_role("button", name="Add address").click()
    form.get_by_label("City").fill("Szeged")
    form.get_by_label("Country").fill("HU")
    form.get_by_role("button", name="Add address").click()
    form.get_by_role("button", name=re.compile("Remove")).last.click()
    save(page)
    expect(form).to_be_hidden()
    expect(page.locator("#toast")).to_contain_text("Katalin Karikó")
    expect(page.get_by_role("button", name="Katalin Karikó")).to_be_visible()
    user = server.users("?mail=kati@example.org")[0]
    assert [each["number"] for each in user["phone"]] == [
        "+36 62 555010",
        "+1 215 5550111",
    ]
    assert [each["city"] for each in user["address"]] == ["Szeged"]
    assert user["address"][0]["country"] == "HU"


def test_editing_sends_if_match_and_changes_nothing_else(server, visit):
    page = visit(server.url)
    before = server.user(2)
    open_user(page, "Zoë Ångström")
    page.locator("#form").get_by_label("Mail").fill("zoe.new@example.org")
    with page.expect_request(lambda r: r.method == "PATCH") as sent:
        save(page)
    assert sent.value.headers["if-match"] == f'"{before["version"]}"'
    assert sent.value.post_data_json == {"item": {"mail": "zoe.new@example.org"}}
    expect(page.get_by_role("cell", name="zoe.new@example.org")).to_be_visible()
    after = server.user(2)
    for member in ("name", "phone", "address", "created"):
        assert after[member] == before[member], member
    (change,) = server.call("GET", "/api/changes?since=12")["results"]
    assert change["fields"] == ["mail"]


def test_editing_phones_keeps_their_numbers(server, visit):
    server.patch(1, phone=[{"number": f"+49 30 100{n}"} for n in range(3)])
    ids = [each["id"] for each in server.user(1)["phone"]]
    page = visit(server.url)
    open_user(page, "Simone Giertz")
    form = page.locator("#form")
    form.get_by_role("button", name="Remove this phone").nth(1).click()
    form.get_by_label("Number").last.fill("+49 30 2000")
    save(page)
    expect(form).to_be_hidden()
    phones = server.user(1)["phone"]
    assert [each["id"] for each in phones] == [ids[0], ids[2]]
    assert phones[1]["number"] == "+49 30 2000"


def test_the_form_comes_out_of_the_fields(server, visit):
    page = visit(server.url)
    page.keyboard.press("n")
    operation = server.call("GET", "/openapi.json")["paths"]["/api/v2/user"]["post"]
    item = operation["requestBody"]["content"]["application/json"]["example"]["item"]
    form = page.locator("#form")
    form.get_by_role("button", name="Add phone").click()
    form.get_by_role("button", name="Add address").click()
    for name in (*item, *item["phone"][0], *item["address"][0]):
        expect(form.locator(f'[name="{name}"]').first).to_be_visible()
    assert form.locator("label:visible").count() == 2 + 2 + len(item["address"][0])


def test_a_field_more_in_the_table_is_a_field_more_in_the_form(server, visit):
    """The page knows no field by name (and nor does the server know this one)."""
    page = visit(server.url, refusals=True)

    def add_field(route):
        answer = route.fetch()
        sheet = '<template id="user"><div class="item">'
        assert sheet in answer.text()
        more = '<label class="field">Age<input name="age" type="number">'
        more += '<small class="error"></small></label>'
        text = answer.text().replace(sheet, sheet + more)
        route.fulfill(response=answer, body=text)

    page.route(server.url, add_field)
    page.reload()
    page.wait_for_selector(".user")
    open_user(page, "Ada Lovelace")
    form = page.locator("#form")
    form.get_by_label("Age").fill("36")
    with page.expect_request(lambda r: r.method == "PATCH") as sent:
        save(page)
    assert sent.value.post_data_json["item"]["age"] == 36
    expect(form.get_by_label("Age")).to_have_attribute("aria-invalid", "true")
    expect(form.locator("label:has-text('Age') .error")).not_to_be_empty()


def test_each_error_stands_at_its_field_and_nothing_is_lost(server, visit):
    page = visit(server.url, refusals=True)
    page.keyboard.press("n")
    form = page.locator("#form")
    form.get_by_label("Name").fill("Nobody")
    form.get_by_label("Mail").fill("no mail address")
    for number in ("+49 30 1234567", "call me"):
        form.get_by_role("button", name="Add phone").click()
        form.get_by_label("Number").last.fill(number)
    form.get_by_role("button", name="Add address").click()
    form.get_by_label("Postcode").fill("10115")
    save(page)
    expect(form.locator("[aria-invalid=true]").first).to_be_focused()
    wrong = form.locator("[aria-invalid=true]")
    values = wrong.evaluate_all("(all) => all.map((each) => each.value)")
    assert values[:2] == ["no mail address", "call me"]
    for label in form.locator("label:has([aria-invalid=true])").all():
        assert label.locator(".error").inner_text().strip()
    item = form.locator(".item:has(label:has-text('Postcode'))")
    assert "".join(item.locator(".error").all_inner_texts()).strip()
    ok = form.locator("label:has-text('Name') .error").first
    assert ok.inner_text() == ""
    form.get_by_label("Mail").fill("nobody@example.org")
    form.get_by_label("Number").last.fill("+49 30 7654321")
    form.get_by_label("City").fill("Berlin")
    save(page)
    expect(form).to_be_hidden()
    user = server.users("?mail=nobody@example.org")[0]
    assert (user["name"], len(user["phone"])) == ("Nobody", 2)
    assert user["address"][0]["postcode"] == "10115"


def test_nothing_is_lost_while_the_server_is_away(serve, visit):
    server = serve()
    page = visit(server.url, wait="#state button", refusals=True)
    page.keyboard.press("n")
    form = page.locator("#form")
    form.get_by_label("Name").fill("Lise Meitner")
    form.get_by_label("Mail").fill("lise@example.org")
    server.stop()
    save(page)
    expect(form.get_by_role("alert")).not_to_be_empty()
    expect(form.get_by_label("Name")).to_have_value("Lise Meitner")
    server = serve(port=server.port)
    save(page)
    expect(form).to_be_hidden()
    assert [each["name"] for each in server.users()] == ["Lise Meitner"]


def test_a_second_try_adds_no_second_user(server, visit):
    """The answer to the first try is lost on its way; the user saves again."""
    page = visit(server.url, refusals=True)

    def lose(route):
        route.fetch()
        route.abort()

    page.route("**/api/v2/user", lose)
    page.keyboard.press("n")
    form = page.locator("#form")
    form.get_by_label("Name").fill("Emmy Noether")
    form.get_by_label("Mail").fill("emmy@example.org")
    save(page)
    expect(form.get_by_role("alert")).not_to_be_empty()
    page.unroute("**/api/v2/user")
    save(page)
    expect(form).to_be_hidden()
    assert len(server.users("?mail=emmy@example.org")) == 1


def test_a_second_try_that_was_changed_says_what_became_of_the_first(server, visit):
    page = visit(server.url, refusals=True)
    page.route("**/api/v2/user", lambda route: (route.fetch(), route.abort()))
    page.keyboard.press("n")
    form = page.locator("#form")
    form.get_by_label("Name").fill("Emmy Noether")
    form.get_by_label("Mail").fill("emmy@example.org")
    save(page)
    expect(form.get_by_role("alert")).to_contain_text("did not answer")
    page.unroute("**/api/v2/user")
    form.get_by_label("Mail").fill("noether@example.org")
    save(page)
    expect(form.get_by_role("alert")).to_contain_text("The first try was saved")
    assert server.users("?mail=noether@example.org") == []
    save(page)
    expect(form).to_be_hidden()
    assert len(server.users("?q=Emmy")) == 2


@pytest.mark.parametrize("fate", ["saved", "deleted", "changed"])
def test_an_answer_that_comes_late_leaves_the_next_form_alone(server, visit, fate):
    page = visit(server.url, refusals=True)
    form, held = page.locator("#form"), []

    def hold(route):
        held.append(route) if route.request.method == "PATCH" else route.continue_()

    page.route("**/api/v2/user/4", hold)
    open_user(page, "Ada Lovelace")
    form.get_by_label("Name").fill("Ada King")
    save(page)
    form.get_by_role("button", name="Cancel").click()
    if fate == "deleted":
        server.call("DELETE", "/api/v2/user/4")
    if fate == "changed":
        server.patch(4, mail="ada.new@example.net")
    open_user(page, "Grace Hopper")
    form.get_by_label("Name").fill("Grace B. Hopper")
    first_of(held, page).continue_()
    said = {"saved": "Ada King", "deleted": "no user", "changed": "someone was faster"}
    expect(page.locator("#toast")).to_contain_text(said[fate])
    expect(form.get_by_label("Name")).to_have_value("Grace B. Hopper")
    expect(page.locator("#other")).to_be_hidden()
    save(page)
    expect(form).to_be_hidden()
    assert server.user(6)["name"] == "Grace B. Hopper"
    assert len(server.users("?q=Grace")) == 1


def test_escape_throws_nothing_away_that_was_typed(server, visit):
    page = visit(server.url)
    form = page.locator("#form")
    open_user(page, "Ada Lovelace")
    form.get_by_label("Name").press_sequentially("!")
    page.keyboard.press("Escape")
    expect(form.get_by_role("alert")).to_contain_text("Not saved yet")
    expect(form.get_by_label("Name")).to_have_value("Ada Lovelace!")
    form.get_by_label("Name").press("Backspace")
    page.keyboard.press("Escape")
    expect(form).to_be_hidden()
    page.keyboard.press("n")
    page.keyboard.press("Escape")
    expect(form).to_be_hidden()


def test_a_reload_asks_where_something_was_typed(server, browser):
    context = browser.new_context()
    page, asked = context.new_page(), []
    page.on("dialog", lambda box: (asked.append(box.type), box.accept()))
    page.goto(server.url)
    open_user(page, "Ada Lovelace")
    page.reload()
    assert asked == []
    open_user(page, "Ada Lovelace")
    page.locator("#form").get_by_label("Name").press_sequentially("!")
    page.reload()
    assert asked == ["beforeunload"]
    context.close()


def test_two_people_at_once_see_both_versions_and_choose(server, visit):
    page = visit(server.url, refusals=True)
    form, yours = page.locator("#form"), page.locator("#fields")
    theirs = page.locator("#other")

    def meet(mail, number):
        """Change Grace here and there, and save what was made here."""
        open_user(page, "Grace Hopper")
        expect(theirs).to_be_hidden()
        yours.get_by_label("Mail").fill("mine@example.com")
        server.patch(6, mail=mail, phone=[{"number": number}])
        save(page)
        expect(theirs.get_by_label("Mail")).to_have_value(mail)
        expect(theirs.get_by_label("Number")).to_have_value(number)
        expect(theirs.get_by_label("Mail")).to_be_disabled()
        expect(yours.get_by_label("Mail")).to_have_value("mine@example.com")
        expect(form.get_by_role("alert")).to_contain_text("Someone else")
        assert server.user(6)["mail"] == mail

    meet("theirs@example.com", "+1 555 0100")
    form.get_by_role("button", name="Cancel").click()
    expect(form).to_be_hidden()
    assert server.user(6)["mail"] == "theirs@example.com"
    expect(page.get_by_role("cell", name="theirs@example.com")).to_be_visible()
    meet("again@example.com", "+1 555 0199")
    save(page)
    expect(form).to_be_hidden()
    user = server.user(6)
    assert user["mail"] == "mine@example.com"
    assert [each["number"] for each in user["phone"]] == ["+1 555 0100"]


def test_saving_a_user_whom_another_deleted(server, visit):
    page = visit(server.url, refusals=True)
    open_user(page, "Noor Haddad")
    form = page.locator("#form")
    form.get_by_label("Name").fill("Noor H.")
    server.call("DELETE", "/api/v2/user/10")
    save(page)
    expect(form.get_by_role("alert")).not_to_be_empty()
    expect(form.get_by_label("Name")).to_have_value("Noor H.")
    expect(form.get_by_role("button", name="Delete")).to_be_hidden()
    save(page)
    expect(form).to_be_hidden()
    again = server.users("?mail=noor@example.com")[0]
    assert (again["name"], len(again["phone"])) == ("Noor H.", 1)


def test_deleting_names_the_user_and_can_be_undone(server, visit):
    page = visit(server.url)
    before = server.user(4)
    open_user(page, "Ada Lovelace")
    page.locator("#form").get_by_role("button", name="Delete").click()
    ask = page.locator("#ask")
    expect(ask).to_contain_text("Ada Lovelace")
    ask.get_by_role("button", name="Cancel").click()
    assert server.user(4) == before
    page.locator("#form").get_by_role("button", name="Delete").click()
    with page.expect_request(lambda r: r.method == "DELETE") as sent:
        ask.get_by_role("button", name="Delete").click()
    assert sent.value.headers["if-match"] == f'"{before["version"]}"'
    expect(page.get_by_role("button", name="Ada Lovelace", exact=True)).to_have_count(0)
    expect(page.locator("#toast")).to_contain_text("Ada Lovelace")
    assert "ada@example.net" not in [each["mail"] for each in server.users()]
    page.locator("#toast").get_by_role("button", name="Undo").click()
    expect(page.get_by_role("button", name="Ada Lovelace", exact=True)).to_be_visible()
    after = server.user(4)
    for member in ("id", "name", "mail", "phone", "address", "created"):
        assert after[member] == before[member], member


def test_deleting_what_another_changed_is_refused(server, visit):
    page = visit(server.url, refusals=True)
    page.route("**/api/changes*", lambda route: route.abort())
    open_user(page, "Ada Lovelace")
    server.patch(4, mail="ada.new@example.net")
    page.locator("#form").get_by_role("button", name="Delete").click()
    page.locator("#ask").get_by_role("button", name="Delete").click()
    expect(page.locator("#toast")).to_contain_text("someone was faster")
    assert server.user(4)["mail"] == "ada.new@example.net"


# Several at once


def select(page, *which):
    for name in which:
        page.get_by_role("checkbox", name=f"Select {name}").check()


def test_several_selected_are_deleted_and_brought_back(server, visit):
    page = visit(server.url)
    before = server.users("?id=2,4,6")
    select(page, "Zoë Ångström", "Ada Lovelace", "Grace Hopper")
    bulk = page.locator("#bulk")
    expect(page.locator("#count")).to_have_text("3 selected")
    bulk.get_by_role("button", name="Delete").click()
    ask = page.locator("#ask")
    expect(ask).to_contain_text("3 users")
    ask.get_by_role("button", name="Delete").click()
    wait_for(page, "document.querySelectorAll('tr.user').length === 9")
    expect(bulk).to_be_hidden()
    assert server.users("?id=2,4,6") == []
    page.keyboard.press("u")
    wait_for(page, "document.querySelectorAll('tr.user').length === 12")
    for old, new in zip(before, server.users("?id=2,4,6")):
        assert {**old, "version": 0, "updated": 0} == {
            **new,
            "version": 0,
            "updated": 0,
        }


def test_bringing_back_can_be_tried_again(server, serve, visit):
    page = visit(server.url, refusals=True)
    select(page, "Zoë Ångström", "Ada Lovelace")
    page.locator("#bulk").get_by_role("button", name="Delete").click()
    page.locator("#ask").get_by_role("button", name="Delete").click()
    expect(page.locator("#toast")).to_contain_text("Deleted 2 users")
    server.stop()
    undo = page.locator("#toast").get_by_role("button", name="Undo")
    undo.click()
    expect(page.locator("#toast")).to_contain_text("did not answer")
    server = serve(port=server.port)
    undo.click()
    expect(page.locator("#toast")).to_contain_text("Restored 2 users")
    assert len(server.users("?id=2,4")) == 2


def test_thousands_are_deleted_at_once(serve, visit):
    server = serve()
    server.add(*many(4300))
    page = visit(server.url)
    page.evaluate("(users) => choose(users, true)", server.users())
    page.locator("#bulk").get_by_role("button", name="Delete").click()
    page.locator("#ask").get_by_role("button", name="Delete").click()
    expect(page.locator("#toast")).to_contain_text("Deleted 4300 users")
    assert server.users() == []


def test_a_deletion_under_way_is_not_taken_for_the_next(server, visit):
    page = visit(server.url)
    held = []
    page.route("**/api/v2/user/4", lambda route: held.append(route))
    open_user(page, "Ada Lovelace")
    page.locator("#form").get_by_role("button", name="Delete").click()
    page.locator("#ask").get_by_role("button", name="Delete").click()
    open_user(page, "Grace Hopper")
    page.locator("#form").get_by_role("button", name="Delete").click()
    expect(page.locator("#ask")).to_contain_text("Grace Hopper")
    first_of(held, page).continue_()
    expect(page.locator("#toast")).to_contain_text("Deleted \u2068Ada Lovelace")
    expect(page.locator("#ask")).to_be_visible()


def test_all_shown_are_selected_by_one_box(server, visit):
    page = visit(server.url)
    box = page.get_by_role("checkbox", name="Select all")
    box.check()
    expect(page.locator("#count")).to_have_text("12 selected")
    page.get_by_role("checkbox", name="Select Ada Lovelace").uncheck()
    expect(box).not_to_be_checked()
    page.keyboard.press("Escape")
    expect(page.locator("#bulk")).to_be_hidden()


def test_a_selection_outlives_a_search(server, visit):
    page = visit(server.url)
    select(page, "Ada Lovelace")
    page.get_by_role("searchbox").fill("zoë")
    wait_for_names(page, ["Zoë Ångström"])
    select(page, "Zoë Ångström")
    expect(page.locator("#count")).to_have_text("2 selected")
    page.get_by_role("searchbox").fill("")
    expect(page.get_by_role("checkbox", name="Select Ada Lovelace")).to_be_checked()


@pytest.mark.parametrize("form", ["CSV", "NDJSON"])
def test_exporting_the_selected(server, visit, form):
    page = visit(server.url)
    select(page, "Zoë Ångström", "Ada Lovelace")
    page.get_by_role("button", name="More").click()
    with page.expect_download() as download:
        page.get_by_role("link", name=form).click()
    text = Path(download.value.path()).read_text(encoding="utf-8")
    assert download.value.suggested_filename.endswith(form.lower())
    if form == "CSV":
        rows = list(csv.DictReader(io.StringIO(text)))
        assert [each["mail"] for each in rows] == ["zoe@example.org", "ada@example.net"]
    else:
        assert [json.loads(line) for line in text.splitlines()] == server.users(
            "?id=2,4"
        )


@pytest.mark.parametrize("form", ["CSV", "NDJSON"])
def test_exporting_what_the_list_shows(server, visit, form):
    page = visit(server.url + "?q=example.net")
    page.get_by_role("button", name="More").click()
    with page.expect_download() as download:
        page.get_by_role("link", name=form).click()
    text = Path(download.value.path()).read_text(encoding="utf-8")
    assert text.count("\n") == (4 if form == "CSV" else 3)
    assert "ada@example.net" in text and "zoe@example.org" not in text


def test_importing_shows_every_bad_line_and_stores_nothing(server, visit):
    page = visit(server.url, refusals=True)
    lines = ["name,mail"] + [f"Person {n},p{n}@example.org" for n in range(30)]
    lines[4], lines[9], lines[20] = "Broken,nomail", ",empty@example.org", "X,a@b@c"
    drop(page, "people.csv", "\n".join(lines) + "\n")
    report = page.locator("#report")
    expect(report).to_contain_text("3 members are not valid")
    lines = re.findall(r"Line (\d+): (\w+)", report.inner_text())
    assert lines == [("5", "mail"), ("10", "name"), ("21", "mail")]
    expect(page.locator("#upload")).to_be_disabled()
    assert len(server.users()) == 12


def test_a_long_report_is_read_by_keyboard_too(server, visit):
    page = visit(server.url, refusals=True)
    lines = "".join(f"Person {n},nomail\n" for n in range(150))
    drop(page, "people.csv", f"name,mail\n{lines}")
    report = page.locator("#report")
    expect(report).to_contain_text("150 members are not valid")
    end = (
        "innerHeight - document.getElementById('report').getBoundingClientRect().bottom"
    )
    assert page.evaluate(end) < 0
    assert axe(page) == []
    page.get_by_role("button", name="Close").focus()
    page.keyboard.press("End")
    wait_for(page, f"{end} > 0")


def test_importing_csv_after_a_dry_run(server, visit):
    page = visit(server.url)
    drop(page, "people.csv", "mail,name\nnew@example.org,New One\nb@c.de,Zwei\n")
    expect(page.locator("#report")).to_contain_text("2 new")
    assert len(server.users()) == 12
    page.locator("#upload").click()
    expect(page.locator("#import")).to_be_hidden()
    expect(page.get_by_role("button", name="New One")).to_be_visible()
    assert len(server.users()) == 14


def test_importing_ndjson_and_what_to_do_with_taken_ids(server, visit, tmp_path):
    page = visit(server.url, refusals=True)
    user = {**server.user(4), "name": "Ada King", "phone": [{"number": "12345"}]}
    new = {"name": "New One", "mail": "new@example.org"}
    file = tmp_path / "people.ndjson"
    file.write_text(f"{json.dumps(user)}\n{json.dumps(new)}\n", encoding="utf-8")
    page.keyboard.press("i")
    page.locator("#file").set_input_files(str(file))
    expect(page.locator("#report")).to_contain_text("Line 1: id is taken")
    page.get_by_label("When an id is taken").select_option("skip")
    expect(page.locator("#report")).to_contain_text("1 skipped")
    page.get_by_label("When an id is taken").select_option("replace")
    expect(page.locator("#report")).to_contain_text("1 replaced")
    assert server.user(4)["name"] == "Ada Lovelace"
    page.locator("#upload").click()
    expect(page.locator("#import")).to_be_hidden()
    assert server.user(4)["name"] == "Ada King"
    assert server.user(4)["phone"][0]["number"] == "12345"
    assert len(server.users()) == 13


def test_importing_shows_its_progress(server, visit):
    page = visit(server.url)
    held = []
    page.route("**/api/v2/user?*dry_run=false*", lambda route: held.append(route))
    drop(page, "a.csv", "name,mail\n" + "".join(f"N{n},n{n}@a.de\n" for n in range(50)))
    page.locator("#upload").click()
    expect(page.get_by_role("progressbar")).to_be_visible()
    expect(page.locator("#upload")).to_be_disabled()
    first_of(held, page).continue_()
    expect(page.locator("#import")).to_be_hidden()
    assert len(server.users()) == 62


def test_an_import_tried_again_adds_nobody_twice(server, visit):
    page = visit(server.url, refusals=True)
    drop(page, "people.csv", "mail,name\nnew@example.org,New One\nb@c.de,Zwei\n")
    expect(page.locator("#report")).to_contain_text("2 new")
    pattern = "**/api/v2/user?*dry_run=false*"
    page.route(pattern, lambda route: (route.fetch(), route.abort()))
    page.locator("#upload").click()
    expect(page.locator("#report")).to_contain_text("did not answer")
    page.unroute(pattern)
    page.locator("#upload").click()
    expect(page.locator("#toast")).to_contain_text("Imported: 2 new")
    assert len(server.users()) == 14


def test_a_file_put_away_leaves_no_report(server, visit):
    page = visit(server.url)
    held, pattern = [], "**/api/v2/user?*dry_run=true*"
    page.route(pattern, lambda route: held.append(route))
    drop(page, "people.csv", "mail,name\nnew@example.org,New One\n")
    expect(page.get_by_role("progressbar")).to_be_visible()
    page.keyboard.press("Escape")
    with page.expect_response(pattern):
        first_of(held, page).continue_()
    page.keyboard.press("i")
    expect(page.get_by_role("progressbar")).to_be_hidden()
    expect(page.locator("#report")).to_have_text("")


def test_an_import_put_away_still_says_how_it_ended(server, visit):
    page = visit(server.url, refusals=True)
    pattern = "**/api/v2/user?*dry_run=false*"
    held = []
    page.route(pattern, lambda route: held.append(route))
    drop(page, "people.csv", "mail,name\nnew@example.org,New One\n")
    expect(page.locator("#report")).to_contain_text("1 new")
    page.locator("#upload").click()
    expect(page.get_by_role("progressbar")).to_be_visible()
    page.keyboard.press("Escape")
    first_of(held, page).abort()
    expect(page.locator("#toast")).to_contain_text("did not answer")


# Others


def test_what_others_do_shows_without_a_reload(server, visit):
    page = visit(server.url)
    server.patch(4, name="Ada King")
    expect(page.get_by_role("button", name="Ada King")).to_be_visible()
    server.add(person("Marie Curie", "marie@example.org"))
    expect(page.get_by_role("button", name="Marie Curie")).to_be_visible()
    expect(page.locator("#count")).to_have_text("13")
    select(page, "Zoë Ångström")
    server.call("DELETE", "/api/v2/user/2")
    expect(page.get_by_role("button", name="Zoë Ångström")).to_have_count(0)
    expect(page.locator("#bulk")).to_be_hidden()


def test_many_numbers_leave_a_narrow_screen_room_for_the_name(server, visit):
    server.patch(1, phone=[{"number": f"+49 30 1234 5678 {n}"} for n in range(5)])
    page = visit(server.url, viewport={"width": 360, "height": 740})
    name = page.locator("#user-1 td:nth-child(2)").bounding_box()
    assert name["width"] > 120


def test_two_pages_follow_each_other(server, visit):
    one, two = visit(server.url), visit(server.url)
    open_user(one, "Chiara Ricci")
    one.locator("#form").get_by_label("Name").fill("Chiara Rossi")
    save(one)
    expect(two.get_by_role("button", name="Chiara Rossi")).to_be_visible()


def test_what_others_do_does_not_take_the_focus(server, visit):
    page = visit(server.url)
    page.get_by_role("button", name="Grace Hopper").focus()
    server.patch(4, name="Ada King")
    expect(page.get_by_role("button", name="Ada King")).to_be_visible()
    expect(page.get_by_role("button", name="Grace Hopper")).to_be_focused()
    server.patch(6, name="Grace B. Hopper")
    expect(page.get_by_role("button", name="Grace B. Hopper")).to_be_focused()


def test_the_page_follows_again_after_the_server_was_away(server, serve, visit):
    page = visit(server.url, refusals=True)
    server.stop()
    server = serve(port=server.port)
    server.patch(4, name="Ada King")
    expect(page.get_by_role("button", name="Ada King")).to_be_visible(timeout=30_000)


# For everyone


def test_everything_by_keyboard_alone(server, visit):
    page = visit(server.url)
    press = page.keyboard.press
    press("/")
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.keyboard.type("ada")
    wait_for_names(page, ["Ada Lovelace"])
    press("Control+a")
    press("Delete")
    wait_for(page, "document.querySelectorAll('tr.user').length === 12")
    press("Escape")
    press("Tab")
    press("n")
    form = page.locator("#form")
    expect(form).to_be_visible()
    page.keyboard.type("Keyboard Only")
    press("Tab")
    page.keyboard.type("keys@example.org")
    press("Enter")
    expect(form).to_be_hidden()
    assert server.users("?mail=keys@example.org")
    expect(page.get_by_role("button", name="Keyboard Only")).to_be_visible()
    first = names(page)[0]
    page.get_by_role("columnheader", name="Mail").get_by_role("button").focus()
    press("Tab")
    press("Space")
    expect(page.locator("#count")).to_have_text("1 selected")
    press("Escape")
    expect(page.locator("#bulk")).to_be_hidden()
    press("Tab")
    press("Enter")
    expect(form).to_be_visible()
    press("Escape")
    expect(form).to_be_hidden()
    assert page.evaluate("document.activeElement.innerText") == first
    press("Enter")
    form.get_by_role("button", name="Delete").focus()
    press("Enter")
    expect(page.locator("#ask")).to_contain_text(first)
    press("Tab")
    press("Enter")
    expect(page.get_by_role("button", name=first, exact=True)).to_have_count(0)
    press("u")
    expect(page.get_by_role("button", name=first, exact=True)).to_be_visible()
    press("i")
    expect(page.locator("#import")).to_be_visible()
    press("Escape")
    expect(page.locator("#import")).to_be_hidden()


def test_the_shortcuts_are_shown_and_act_where_no_text_is_typed(server, visit):
    page = visit(server.url)
    page.keyboard.press("?")
    shown = page.locator("#menu kbd").all_inner_texts()
    assert set(shown) == {"/", "n", "i", "u", "Esc", "?"}
    expect(page.locator("#menu")).to_contain_text("no text is typed")
    page.keyboard.press("Escape")
    page.keyboard.press("u")  # nothing to undo
    page.keyboard.press("/")
    page.keyboard.type("ni?u")
    expect(page.get_by_role("searchbox")).to_have_value("ni?u")
    expect(page.locator("dialog[open], :popover-open")).to_have_count(0)
    page.keyboard.press("Tab")
    page.keyboard.press("Control+n")
    expect(page.locator("dialog[open]")).to_have_count(0)


def test_focus_is_always_visible(server, visit):
    page = visit(server.url)
    script = """() => {
      const node = document.activeElement, style = getComputedStyle(node);
      const seen = parseFloat(style.outlineWidth) >= 2 && style.outlineStyle !== 'none';
      const box = node.getBoundingClientRect();
      const inside = box.top >= 0 && box.bottom <= innerHeight && box.width > 0;
      return [node.id || node.innerText, seen && inside];
    }"""
    visited = []
    for _ in range(24):
        page.keyboard.press("Tab")
        name, visible = page.evaluate(script)
        assert visible, name
        visited.append(name)
    assert {"search", "more", "new", "all"} <= set(visited)
    open_user(page, "Simone Giertz")
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement !== document.body"):
            name, visible = page.evaluate(script)
            assert visible, name


@pytest.mark.parametrize("dialog", ["form", "import", "menu"])
def test_focus_returns_after_a_dialog(server, visit, dialog):
    page = visit(server.url)
    button = page.get_by_role("button", name="Grace Hopper")
    button.focus()
    page.keyboard.press({"form": "Enter", "import": "i", "menu": "?"}[dialog])
    expect(page.locator(f"#{dialog}")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(f"#{dialog}")).to_be_hidden()
    expect(button).to_be_focused()


def test_focus_returns_to_the_menu_that_opened_a_dialog(server, visit):
    page = visit(server.url)
    more = page.get_by_role("button", name="More")
    more.focus()
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Import").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#import")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#import")).to_be_hidden()
    expect(more).to_be_focused()


def test_a_live_region_is_not_told_twice(server, visit):
    page = visit(server.url)
    page.evaluate(
        "window.told = []; new MutationObserver(() => told.push(1)).observe("
        "document.getElementById('count'), {childList: true, subtree: true})"
    )
    server.patch(4, name="Ada King")
    expect(page.get_by_role("button", name="Ada King")).to_be_visible()
    assert page.evaluate("told.length") == 0


def test_a_screen_reader_finds_a_table_and_is_told_of_changes(server, visit):
    page = visit(server.url)
    table = page.get_by_role("table", name="Users")
    expect(table.get_by_role("columnheader")).to_have_count(5)
    expect(table.get_by_role("row")).to_have_count(13)
    expect(table).to_have_attribute("aria-rowcount", "13")
    for region in ("count", "toast", "state"):
        expect(page.locator(f"#{region}")).to_have_attribute("role", "status")
    labels = page.locator("button, input, select, a").evaluate_all(
        "(all) => all.filter((each) => !(each.ariaLabel || each.innerText"
        " || each.textContent || each.labels?.length)).map((each) => each.outerHTML)"
    )
    assert labels == []


def test_right_to_left_names_run_right_to_left(server, visit):
    page = visit(server.url)
    button = page.get_by_role("button", name="محمد الفاسي")
    assert button.evaluate("(node) => getComputedStyle(node).direction") == "rtl"
    open_user(page, "محمد الفاسي")
    name = page.locator("#form").get_by_label("Name")
    assert name.evaluate("(node) => getComputedStyle(node).direction") == "rtl"


def test_reduced_motion_moves_nothing(server, visit):
    page = visit(server.url, reduced_motion="reduce")
    server.patch(4, name="Ada King")
    expect(page.get_by_role("button", name="Ada King")).to_be_visible()
    assert page.evaluate("document.getAnimations().length") == 0


def test_forced_colours_leave_every_button_a_border_and_a_text(server, visit):
    page = visit(server.url, forced_colors="active")
    shown = """(node) => {
      const { color, backgroundColor, borderTopWidth } = getComputedStyle(node);
      return color !== backgroundColor && parseFloat(borderTopWidth) > 0;
    }"""
    open_user(page, "Ada Lovelace")
    for button in page.locator(".primary").all():
        assert button.evaluate(shown), button.inner_text()


@pytest.mark.parametrize("width, letters", [(320, 16), (360, 24)])
def test_large_letters_do_not_scroll_sideways(server, visit, width, letters):
    """320 pixels are 1280 at a zoom of 400 %."""
    page = visit(server.url, viewport={"width": width, "height": 740})
    page.evaluate(f"document.documentElement.style.fontSize = '{letters}px'")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    open_user(page, "Ada Lovelace")
    dialog = page.locator("#form")
    assert dialog.evaluate("(box) => box.scrollWidth <= box.clientWidth")
    page.goto(server.url + "docs")
    page.evaluate(f"document.documentElement.style.fontSize = '{letters}px'")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_low_window_is_not_filled_by_what_sticks(server, visit):
    """1280 by 1024 pixels at 400 %, or a telephone on its side."""
    page = visit(server.url, viewport={"width": 320, "height": 256})
    page.evaluate("scrollTo(0, 400)")
    top = "document.querySelector('thead').getBoundingClientRect().bottom"
    wait_for(page, f"{top} < 0")
    page.keyboard.press("n")
    page.keyboard.type("Ada")
    page.keyboard.press("Escape")
    expect(page.locator("#error")).to_be_in_viewport()


def test_without_javascript_it_says_what_is_needed(server, browser):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(server.url)
    expect(page.locator("noscript p")).to_be_visible()
    expect(page.locator("noscript p")).to_contain_text("JavaScript")
    context.close()


@pytest.mark.parametrize("width, scheme", LOOKS)
def test_every_size_and_scheme(server, visit, width, scheme):
    """No sideways scrolling, nothing for axe to find, and pictures to look at."""
    viewport = {"width": width, "height": SIZES[width]}
    page = visit(server.url, viewport=viewport, color_scheme=scheme, refusals=True)
    thorough = (width, scheme) in ((360, "light"), (1280, "dark"))
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)

    def look(name):
        settled = (
            "document.getAnimations().every((each) => each.playState !== 'running')"
        )
        wait_for(page, settled)
        page.screenshot(path=str(SCREENSHOTS / f"{name}-{width}-{scheme}.png"))
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, (name, wide)
        for dialog in page.locator("dialog[open]").all():
            assert dialog.evaluate("(box) => box.scrollWidth <= box.clientWidth"), name
        if thorough or name in ("list", "form"):
            assert axe(page) == [], name

    server.add(person("W" * 200, "w" * 60 + "@" + "w" * 60 + ".example"))
    expect(page.get_by_role("button", name="W" * 200)).to_be_attached()
    look("list")
    select(page, "Ada Lovelace", "Grace Hopper")
    look("selected")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="More").click()
    look("menu")
    page.keyboard.press("Escape")
    open_user(page, "Ada Lovelace")
    form = page.locator("#form")
    form.get_by_role("button", name="Add phone").click()
    form.get_by_label("Number").last.fill("call me")
    form.get_by_label("Mail").fill("nomail")
    save(page)
    expect(form.locator("[aria-invalid=true]").first).to_be_focused()
    look("form")
    form.get_by_label("Mail").fill("ada.mine@example.net")
    form.get_by_label("Number").last.fill("+44 20 5550199")
    server.patch(4, mail="ada.theirs@example.net")
    save(page)
    expect(page.locator("#other")).to_be_visible()
    look("clash")
    form.get_by_role("button", name="Cancel").click()
    drop(page, "people.csv", "name,mail\nOne,one@example.org\nTwo,nomail\n,x@y.z\n")
    expect(page.locator("#report")).to_contain_text("Line 4")
    look("import")
    page.keyboard.press("Escape")
    open_user(page, "Grace Hopper")
    form.get_by_role("button", name="Delete").click()
    look("ask")
    page.locator("#ask").get_by_role("button", name="Delete").click()
    expect(page.locator("#toast")).to_contain_text("Grace Hopper")
    look("toast")
    page.get_by_role("searchbox").fill("nobody at all")
    expect(page.locator("#state")).to_contain_text("nobody at all")
    look("nobody")


# Who may not


def test_probes_in_every_field_stay_text(serve, visit):
    server = serve()
    label = PROBE[:50]
    server.add(
        {
            "name": PROBE,
            "mail": "a@b.c",
            "phone": [{"label": label, "number": "12345"}],
            "address": [{"label": label, "street": PROBE, "city": PROBE}],
        }
    )
    page = visit(server.url, refusals=True)
    assert names(page) == [PROBE]
    page.locator("tr.user button").click()
    form = page.locator("#form")
    expect(form.get_by_role("heading")).to_have_text(PROBE)
    expect(form.get_by_label("City")).to_have_value(PROBE)
    form.get_by_label("City").fill(PROBE + "!")
    server.patch(1, address=[{"city": PROBE + "?"}])
    save(page)
    expect(page.locator("#other").get_by_label("City")).to_have_value(PROBE + "?")
    save(page)
    expect(page.locator("#toast")).to_contain_text(PROBE)
    select(page, PROBE)
    page.locator("#bulk").get_by_role("button", name="Delete").click()
    expect(page.locator("#ask")).to_contain_text(PROBE)
    page.keyboard.press("Escape")
    assert page.locator("body img, body script:not([src])").count() == 1


def test_probes_in_a_search_a_file_and_an_error_stay_text(server, visit):
    query = urllib.parse.urlencode({"q": PROBE, "sort": PROBE})
    page = visit(f"{server.url}?{query}", wait="#state button", refusals=True)
    page.goto(f"{server.url}?{urllib.parse.urlencode({'q': PROBE})}")
    expect(page.locator("#state")).to_contain_text(PROBE)
    page.route(
        "**/api/v2/user?*dry_run*",
        lambda route: route.fulfill(
            status=422,
            content_type="application/problem+json",
            body=json.dumps(
                {
                    "code": 1,
                    "detail": PROBE,
                    "errors": [{"line": 2, "pointer": PROBE, "detail": PROBE}],
                }
            ),
        ),
    )
    drop(page, PROBE, f'name,mail\n"{PROBE}",{PROBE}\n')
    expect(page.locator("#report")).to_contain_text(PROBE)
    page.unroute("**/api/v2/user?*dry_run*")
    page.get_by_label("When an id is taken").select_option("skip")
    expect(page.locator("#report")).to_contain_text("Line 2")
    page.keyboard.press("Escape")
    assert page.locator("body img").count() == 0


def test_the_page_is_small_and_its_policy_strict(server):
    with urllib.request.urlopen(server.url, timeout=10) as answer:
        text, headers = answer.read(), answer.headers
    assert len(text) <= 40 * 1024
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert headers["Content-Type"].replace(" ", "").lower() == "text/html;charset=utf-8"
    assert b"innerHTML" not in text
    assert not re.search(rb"https?://(?!www\.w3\.org/2000/svg)", text)


@pytest.fixture
def mounted(tmp_path):
    """The URL of a page mounted at a path that needs quoting, under wsgiref."""
    program = tmp_path / "mounted.py"
    program.write_text(MOUNTED, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, str(program), str(tmp_path / "users.db")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    yield f"http://127.0.0.1:{int(process.stdout.readline())}/our%20tools/users/"
    process.kill()
    process.wait(10)
    process.stdout.close()


def test_under_any_prefix(mounted, visit):
    page = visit(mounted, wait="#state button")
    page.keyboard.press("n")
    form = page.locator("#form")
    form.get_by_label("Name").fill("Under Prefix")
    form.get_by_label("Mail").fill("under@example.org")
    save(page)
    expect(page.get_by_role("button", name="Under Prefix")).to_be_visible()
    request = urllib.request.Request(
        mounted + "api/v2/user/1",
        json.dumps({"item": {"name": "Changed Outside"}}).encode(),
        {"Content-Type": "application/json"},
        method="PATCH",
    )
    urllib.request.urlopen(request, timeout=10).close()
    expect(page.get_by_role("button", name="Changed Outside")).to_be_visible()
    page.get_by_role("searchbox").fill("outside")
    wait_for(page, "location.search === '?q=outside&sort=name'")
    assert page.url.startswith(mounted)


def test_a_token_by_the_browsers_own_login_and_logging_out(serve, visit):
    server = serve(token="a-token-of-the-test")
    server.add(person("Ada Lovelace", "ada@example.net"))
    url = server.url.replace("//", f"//me:{server.token}@")
    page = visit(url, refusals=True)
    open_user(page, "Ada Lovelace")
    page.locator("#form").get_by_label("Name").fill("Ada King")
    save(page)
    expect(page.get_by_role("button", name="Ada King")).to_be_visible()
    assert server.user(1)["name"] == "Ada King"
    page.get_by_role("button", name="More").click()
    page.get_by_role("button", name="Log out").click()
    deadline = time.monotonic() + 15
    while not page.url.startswith("chrome-error:"):  # nobody gives a login anew
        assert time.monotonic() < deadline, page.url
        page.wait_for_timeout(30)
    assert page.get_by_role("button", name="Ada King").count() == 0


def test_without_a_token_there_is_nothing_to_log_out_of(server, visit):
    page = visit(server.url)
    page.get_by_role("button", name="More").click()
    expect(page.get_by_role("button", name="Import")).to_be_visible()
    expect(page.get_by_role("button", name="Log out")).to_be_hidden()


def test_who_may_only_read_is_offered_nothing_to_write(serve, visit, tmp_path):
    db = tmp_path / "users.db"
    serve(db).add(person("Ada Lovelace", "ada@example.net"))
    command = [sys.executable, "userapi.py", "token", "add", "reader", "--read-only"]
    made = subprocess.run(
        [*command, "--db", str(db)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
    )
    token = re.findall(r"[\w-]{32,}", made.stdout + made.stderr)[-1]
    server = serve(db)
    server.token = token
    url = server.url.replace("//", f"//me:{token}@")
    page = visit(url, refusals=True)
    expect(page.get_by_role("button", name="New user")).to_be_hidden()
    for key in "ni":
        page.keyboard.press(key)
        expect(page.locator("dialog[open]")).to_have_count(0)
    open_user(page, "Ada Lovelace")
    for name in ("Save", "Delete", "Add phone"):
        expect(page.get_by_role("button", name=name)).to_be_hidden()
    page.get_by_role("button", name="Cancel").click()
    with contextlib.closing(sqlite3.connect(db)) as other, other:
        other.execute("DELETE FROM users")
    expect(page.locator("#state")).to_have_text("No users yet.")
    expect(page.get_by_role("button", name="New user")).to_be_hidden()


# The reference, and the judge


@pytest.mark.parametrize("width, scheme", LOOKS)
def test_the_reference(server, visit, width, scheme):
    viewport = {"width": width, "height": SIZES[width]}
    page = visit(server.url + "docs", "article", viewport=viewport, color_scheme=scheme)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(SCREENSHOTS / f"docs-{width}-{scheme}.png"))
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert axe(page) == []


def test_the_reference_tries_a_call(server, visit):
    page = visit(server.url + "docs", "article", refusals=True)
    form = page.locator("form[data-method=GET][data-path='/api/v2/user/{id}']").first
    details = form.locator("xpath=ancestor-or-self::*[self::details]")
    for each in details.all():
        each.evaluate("(node) => (node.open = true)")
    form.locator("[name=id]").fill("2")
    form.get_by_role("button").first.click()
    expect(form.locator("output")).to_contain_text("200")
    expect(form.locator("output")).to_contain_text("Zoë Ångström")


def test_the_reference_names_this_server_and_goes_to_the_operation(server, visit):
    page = visit(server.url + "docs", "article")
    curl = page.locator("article#get_user_v2 pre")
    expect(curl).to_have_text(f"curl -X GET {server.url}api/v2/user/{{id}}")
    page.locator("nav a[href='#get_user_v2']").click()
    wait_for(page, "document.querySelector(':target').getBoundingClientRect().y < 2")


@pytest.mark.parametrize("method", ["DELETE", "PUT", "PATCH"])
def test_the_reference_asks_before_it_changes_what_is_there(server, browser, method):
    context = browser.new_context()
    page, asked = context.new_page(), []
    page.on("dialog", lambda box: (asked.append(box.message), box.dismiss()))
    page.goto(server.url + "docs")
    form = page.locator(f"form[data-method={method}][data-path='/api/v2/user/{{id}}']")
    form.get_by_role("button", name="Send").click()
    expect(form.locator("output")).to_have_text("Not sent.")
    assert asked == [f"{method} {server.url}api/v2/user/1?"]
    assert (server.user(1)["version"], len(server.users())) == (1, 12)
    context.close()


def lighthouse(url, out):
    """Lighthouse's scores for a page, through its own command."""
    command = [
        shutil.which("node"),
        str(NODE / "lighthouse" / "cli" / "index.js"),
        url,
        "--only-categories=accessibility,best-practices",
        "--output=json",
        f"--output-path={out}",
        "--quiet",
        "--no-enable-error-reporting",
        f"--chrome-flags=--headless=new {' '.join(FLAGS)}",
    ]
    env = {**os.environ, "CHROME_PATH": CHROMIUM}
    subprocess.run(command, env=env, check=True, timeout=90, capture_output=True)
    found = json.loads(out.read_text(encoding="utf-8"))
    failed = [
        key
        for key, audit in found["audits"].items()
        if audit["score"] is not None and audit["score"] < 1
    ]
    scores = {key: each["score"] for key, each in found["categories"].items()}
    return scores, failed


@pytest.mark.skipif(
    not (shutil.which("node") and (NODE / "lighthouse").is_dir()),
    reason="needs Node and the npm package lighthouse under build/node",
)
def test_lighthouse_gives_full_marks(server, tmp_path):
    scores, failed = lighthouse(server.url, tmp_path / "report.json")
    assert scores == {"accessibility": 1, "best-practices": 1}, failed
