"""A stand-in for llm-d's sidecar before SGLang: body and headers go to both legs as they came.

It adds the three bootstrap fields and answers with what decode says, as it comes. One thread a request.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_HOP_BY_HOP = {"host", "content-length", "connection", "accept-encoding"}


def handler_for(prefill: str, bootstrap_port: int, decode: str) -> type[BaseHTTPRequestHandler]:
    """The request handler of a sidecar between these servers."""
    host = urlsplit(prefill).hostname

    class Sidecar(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            """Says nothing."""

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            body |= {"bootstrap_host": host, "bootstrap_port": bootstrap_port}
            raw = json.dumps(body | {"bootstrap_room": random.getrandbits(62)}).encode()
            other = threading.Thread(target=lambda: self.ask(prefill, raw)[1].read())
            other.start()
            connection, answer = self.ask(decode, raw)
            self.send_response(answer.status)
            self.send_header("content-type", answer.getheader("content-type", "text/plain"))
            self.end_headers()
            while piece := answer.read1(65536):
                self.wfile.write(piece)
                self.wfile.flush()
            connection.close()
            other.join()

        def ask(
            self, server: str, raw: bytes
        ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
            connection = http.client.HTTPConnection(urlsplit(server).netloc, timeout=120)
            headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP_BY_HOP}
            connection.request("POST", self.path, raw, headers)
            return connection, connection.getresponse()

    return Sidecar


@contextlib.contextmanager
def sidecar(prefill: str, bootstrap_port: int, decode: str) -> Iterator[str]:
    """Runs one; its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_for(prefill, bootstrap_port, decode))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
