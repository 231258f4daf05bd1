"""Requests to servers on this machine: a proxy that the environment names must not see them."""

from __future__ import annotations

import urllib.request
from typing import Any


def open_url(request: str | urllib.request.Request, timeout: float) -> Any:
    """Like ``urllib.request.urlopen``; raises the same errors."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(request, timeout=timeout)
