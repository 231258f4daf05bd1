# Copyright 2026 The Kairos authors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
# ==============================================================================
"""Named places where a scheduling plugin may step in.

`kairos_seam` marks a function. Without a handler the function runs as if it were
not marked; `install` gives a seam its handler. The handler then decides whether,
when and with what arguments the function runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

# Filled as the marked functions are imported, so that it never names one that a
# reinstalled or half-merged tree has lost.
PATCHED: set[str] = set()
_handlers: dict[str, Callable[..., Any]] = {}


def kairos_seam(target: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a function as the seam `target`, spelled ``module:qualified.name``."""

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def seam(*args: Any, **kwargs: Any) -> Any:
            handler = _handlers.get(target)
            if handler is None:
                return function(*args, **kwargs)
            return handler(function, *args, **kwargs)

        seam.__kairos_seam__ = target  # type: ignore[attr-defined]
        PATCHED.add(target)
        return seam

    return mark


def install(target: str, handler: Callable[..., Any]) -> None:
    """Let ``handler(function, *args, **kwargs)`` answer every call of `target`.

    Replaces an earlier handler. Raises LookupError unless the marked function has been
    imported: a handler that nothing calls must not go unnoticed.
    """
    if target not in PATCHED:
        raise LookupError(
            f"no seam {target!r} in this tree, or its module is not imported"
        )
    _handlers[target] = handler
