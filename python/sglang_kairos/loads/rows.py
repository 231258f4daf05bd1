"""A row of a trace, and its limits."""

from __future__ import annotations

from dataclasses import dataclass

MOONCAKE_BLOCK_TOKENS = 512
# Lengths and times beyond these are unit mistakes or damage, not requests.
MAX_TOKENS = 10_000_000
MAX_SECONDS = 1e9


class TraceError(ValueError):
    """A trace cannot be used; the text names file, line and column."""


@dataclass(frozen=True, slots=True)
class Request:
    """One row of a trace.

    `arrival_s`: seconds from the trace's start. Lengths are tokens. `hash_ids`: ids of the prompt's
    blocks of `block_tokens` tokens each, the last one possibly partial; None: the prompt shares
    nothing.
    """

    arrival_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] | None = None
    block_tokens: int = MOONCAKE_BLOCK_TOKENS
