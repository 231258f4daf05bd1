"""Benchmarks ask servers past any proxy that the environment names."""

from __future__ import annotations

import ast
import inspect
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import aiohttp
import pytest

from sglang_kairos.local_http import open_url


class Hello(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, *_: object) -> None:
        pass


def test_a_proxy_of_the_environment_never_sees_requests_to_servers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = HTTPServer(("127.0.0.1", 0), Hello)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with open_url(f"http://127.0.0.1:{server.server_port}/", timeout=10) as answer:
            assert answer.read() == b"hello"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def asks_the_environment(source: str) -> list[str]:
    """Calls in a module that go through the proxies of the environment."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found += [name for name in names if name.split(".")[0] in ("requests", "httpx")]
        found += [name for name in names if name.startswith("urllib.request.")]
        if isinstance(node, ast.Attribute) and node.attr in OPENERS:
            found.append(node.attr)
        if isinstance(node, ast.keyword) and node.arg == "trust_env":  # aiohttp's default is not to
            found.append("trust_env")
    return found


OPENERS = ("urlopen", "urlretrieve", "build_opener", "install_opener")


def test_no_module_asks_a_server_through_the_environments_proxies() -> None:
    root = Path(__file__).parents[2]
    users = {
        str(path.relative_to(root)): found
        for folder in ("python", "benchmark", "scripts")
        for path in (root / folder).rglob("*.py")
        if (found := asks_the_environment(path.read_text("utf-8")))
    }
    assert users == {"python/sglang_kairos/local_http.py": ["build_opener"]}


@pytest.mark.parametrize(
    "source",
    [
        "import requests",
        "from httpx import get",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1')",
        "from urllib.request import urlopen as ask",
        "import aiohttp\nsession = aiohttp.ClientSession(trust_env=True)",
    ],
)
def test_every_way_through_a_proxy_is_noticed(source: str) -> None:
    assert asks_the_environment(source)


def test_aiohttp_does_not_ask_the_environment_unless_told_to() -> None:
    assert inspect.signature(aiohttp.ClientSession).parameters["trust_env"].default is False
