"""The page's files are open and hold nothing; what it shows asks for the key."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from building import KEY, application

from taichi_serve.dashboard.files import FILES

BROWSER = {"Accept": "text/html,application/xhtml+xml"}
TEXTS = {name: file.content.decode() for name, file in FILES.items()}


@pytest.fixture
async def client() -> Any:
    transport = httpx.ASGITransport(application(), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
        yield client


async def test_the_page_and_its_files_need_no_key(client: httpx.AsyncClient) -> None:
    page = await client.get("/taichi/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for name in FILES:
        answer = await client.get(f"/taichi/page/{name}")
        assert (answer.status_code, answer.content) == (200, FILES[name].content)


async def test_what_it_shows_needs_the_key(client: httpx.AsyncClient) -> None:
    for path in (
        "/taichi/events",
        "/taichi/state",
        "/taichi/requests/x",
        "/taichi/page/other.js",
        "/taichi/page/",
    ):
        assert (await client.get(path)).status_code == 401, path


async def test_no_path_leads_out_of_the_folder(client: httpx.AsyncClient) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    for name in ("..%2Ffeed.py", "%2e%2e%2f__init__.py", "index.html%00.js", "nothing.js"):
        assert (await client.get(f"/taichi/page/{name}", headers=headers)).status_code == 404


async def test_a_browser_at_the_root_is_led_to_the_page_and_nobody_else(client: httpx.AsyncClient) -> None:
    led = await client.get("/", headers=BROWSER)
    assert (led.status_code, led.headers["location"]) == (307, "taichi/")
    assert (await client.get("/taichi")).headers["location"] == "taichi/"
    assert (await client.get("/")).status_code == 401
    assert (await client.post("/", headers=BROWSER)).status_code == 401
    other = await client.get("/", headers={"Authorization": f"Bearer {KEY}"})
    assert (other.status_code, other.json()["error"]["type"]) == (404, "not_found_error")


async def test_the_browser_may_run_and_ask_nothing_from_elsewhere(client: httpx.AsyncClient) -> None:
    headers = (await client.get("/taichi/")).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert {policy[name] for name in ("script-src", "style-src", "connect-src", "img-src")} == {"'self'"}
    assert policy["frame-ancestors"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"


def test_no_file_names_another_host() -> None:
    for name, text in TEXTS.items():
        assert set(re.findall(r"https?://[^\s\"']+", text)) <= {"http://www.w3.org/2000/svg"}, name


def test_no_file_makes_markup_of_text_or_code_of_strings() -> None:
    for name, text in TEXTS.items():
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text
        ), name
        assert not re.search(r"<script>|\son\w+=|style=", text) or name != "index.html"


def test_every_file_that_is_named_is_there_and_every_file_is_named() -> None:
    named = set(re.findall(r"page/([\w.]+)", TEXTS["index.html"]))
    for text in TEXTS.values():
        named |= set(re.findall(r'from "\./([\w.]+)"', text))
    assert named | {"index.html"} == set(FILES)


def test_every_module_is_small() -> None:
    lengths = {name: len(text.splitlines()) for name, text in TEXTS.items()}
    assert {name: length for name, length in lengths.items() if length > 170} == {}


def test_every_element_that_a_module_asks_for_is_in_the_page() -> None:
    ids = set(re.findall(r'\bid="([\w-]+)"', TEXTS["index.html"]))
    for name, text in TEXTS.items():
        asked = set(re.findall(r'\$\("([\w-]+)"\)', text))
        assert asked <= ids, name
