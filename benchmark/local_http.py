"""Requests to servers under test, past any proxy that the environment names."""

from __future__ import annotations

import urllib.request
from typing import Any


def open_url(request: str | urllib.request.Request, timeout: float) -> Any:
    """Like ``urllib.request.urlopen``; raises the same errors."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(request, timeout=timeout)
