"""Benchmarks ask servers past any proxy that the environment names."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

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


def test_no_benchmark_opens_urls_through_the_environments_proxies() -> None:
    folder = Path(__file__).parents[2] / "benchmark"
    users = [path.name for path in folder.rglob("*.py") if "urlopen(" in path.read_text()]
    assert users == []
