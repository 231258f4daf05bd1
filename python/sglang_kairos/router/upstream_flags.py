"""Flags of upstream's router (sglang_router 0.3.2) that this one does not have: one table.

A flag without effect here is accepted, so that command lines start, and warned of once. One that
would change what clients or operators get is refused, with what to use instead. A test walks
upstream's own parser: every flag of it is one of `arguments`, or here.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

_MANUAL = "there is no policy `manual` here"
_TOKENS = "the router does not tokenise"
_PARSER = "give it to the servers, which parse"
_HISTORY = "no history is kept here; put smg in front (docs/router.md)"
_KEYS = "use --admin-api-key, and --client-api-key for clients"

# Name without dashes: what there is instead.
NO_EFFECT: dict[str, str] = {
    "mini-lb": "there is only this router",
    "bucket-adjust-interval-secs": "there is no policy `bucket` here",
    "eviction-interval-secs": "a server's prefix index is as large as its KV cache",
    "max-tree-size": "a server's prefix index is as large as its KV cache",
    "max-idle-secs": _MANUAL,
    "assignment-mode": _MANUAL,
    "dp-aware": "a server spreads its requests over its own ranks",
    "worker-startup-timeout-secs": "a server gets requests from its first answer on, whenever it is",
    "worker-startup-check-interval": "--poll-interval-secs is between looks at a server",
    "queue-size": "above --max-concurrent-requests it is 429 at once; waiting is --overload relegate",
    "queue-timeout-secs": "above --max-concurrent-requests it is 429 at once",
    "retry-initial-backoff-ms": "another pair is tried at once",
    "retry-max-backoff-ms": "another pair is tried at once",
    "retry-backoff-multiplier": "another pair is tried at once",
    "retry-jitter-factor": "another pair is tried at once",
    "cb-success-threshold": "one success ends probation",
    "cb-window-duration-secs": "failures in a row count, however long they take",
    "health-check-endpoint": "probes are /server_info, which also tells roles and speeds",
    "model-path": _TOKENS,
    "tokenizer-path": _TOKENS,
    "tokenizer-cache-enable-l0": _TOKENS,
    "tokenizer-cache-l0-max-entries": _TOKENS,
    "tokenizer-cache-enable-l1": _TOKENS,
    "tokenizer-cache-l1-max-memory": _TOKENS,
    "chat-template": "give it to the servers, which apply it",
    "reasoning-parser": _PARSER,
    "tool-call-parser": _PARSER,
    "enable-trace": "traceparent is passed on; the servers trace (--enable-trace of theirs)",
    "otlp-traces-endpoint": "traceparent is passed on; the servers trace",
}
REFUSED: dict[str, str] = {
    "worker-urls": "this router serves pairs: --prefill URL PORT and --decode URL",
    "enable-igw": "one model per router: start one for each",
    "rate-limit-tokens-per-second": "use --max-concurrent-requests and --overload shed, or a rate "
    "limit in front",
    "mcp-config-path": "there are no tools here; put smg in front (docs/router.md)",
    "oracle-wallet-path": _HISTORY,
    "oracle-tns-alias": _HISTORY,
    "oracle-connect-descriptor": _HISTORY,
    "oracle-username": _HISTORY,
    "oracle-password": _HISTORY,
    "oracle-pool-min": _HISTORY,
    "oracle-pool-max": _HISTORY,
    "oracle-pool-timeout-secs": _HISTORY,
    "postgres-db-url": _HISTORY,
    "postgres-pool-max": _HISTORY,
    "redis-url": _HISTORY,
    "redis-pool-max": _HISTORY,
    "redis-retention-days": _HISTORY,
    "control-plane-api-keys": _KEYS,
    "control-plane-audit-enabled": "calls of /admin/servers are in the log",
    "jwt-issuer": _KEYS,
    "jwt-audience": _KEYS,
    "jwt-jwks-uri": _KEYS,
    "jwt-role-mapping": _KEYS,
    "selector": "with pairs: --prefill-selector and --decode-selector",
}
# One value is without effect, others are refused.
VALUES: dict[str, tuple[frozenset[str], str]] = {
    "backend": (frozenset(["sglang"]), "only SGLang servers"),
    "history-backend": (frozenset(["memory", "none"]), _HISTORY),
}


class _Other(argparse.Action):
    """Keeps what was given, for `heed`."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        namespace.others = [*(getattr(namespace, "others", None) or []), (self.dest, values)]


def add_others(parser: argparse.ArgumentParser) -> None:
    """Accept the flags of the table, with as many values as follow; ``--help`` leaves them out."""
    for name in (*NO_EFFECT, *REFUSED, *VALUES):
        parser.add_argument(
            f"--{name}", dest=name, nargs="*", action=_Other, help=argparse.SUPPRESS
        )


def heed(others: Sequence[tuple[str, Sequence[str]]]) -> tuple[list[str], list[str]]:
    """What to warn of and what to refuse, a line for each flag that was given."""
    warned, refused = [], []
    for name, values in dict(others).items():
        if name in REFUSED:
            refused.append(f"--{name}: not taken, {REFUSED[name]}")
        elif name in VALUES and not VALUES[name][0].issuperset(values):
            refused.append(f"--{name}: {' '.join(values)!r} is not taken, {VALUES[name][1]}")
        elif name in NO_EFFECT:
            warned.append(f"--{name}: no effect here, {NO_EFFECT[name]}")
    return warned, refused
