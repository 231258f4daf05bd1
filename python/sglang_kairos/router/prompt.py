"""What the router reads out of a request body, and the pairing fields it writes into it."""

from __future__ import annotations

import math
import uuid
from dataclasses import dataclass
from random import Random
from typing import Any

from sglang_kairos.slo_http import GENERATE

# A scalar room of a request with n > 1 is counted up by SGLang: stay clear of the signed maximum.
_ROOMS = 2**63 - 2**20
_IMAGE_TOKENS = 1000
_MESSAGE_TOKENS = 6
_DEFAULT_OUTPUT = {GENERATE: 128, "/v1/completions": 16}
_UNBOUNDED_OUTPUT = 1024


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request. `batch`: number of prompts when they come as a list, None for a single one.

    Its length is `tokens` tokens counted plus `text_bytes` bytes of text not yet tokenised.
    """

    batch: int | None
    tokens: int
    text_bytes: int
    output_tokens: int
    samples: int
    stream: bool

    @property
    def prompts(self) -> int:
        """How many prompts the request holds, at least one."""
        return max(1, self.batch or 1)


def describe(body: dict[str, Any], path: str) -> Prompt:
    """Size and shape of a request; anything malformed counts as little and is left to SGLang."""
    params: Any = body
    if path == GENERATE:
        params = body.get("sampling_params")
        params = params[0] if isinstance(params, list) and params else params
        params = params if isinstance(params, dict) else {}
        batch, tokens, size = _generate_prompt(body)
        limit = params.get("max_new_tokens")
    elif path == "/v1/completions":
        batch, tokens, size = _measure(body.get("prompt"))
        limit = body.get("max_tokens")
    else:
        batch, tokens, size = None, *_chat_prompt(body)
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
    known = isinstance(limit, int | float) and math.isfinite(limit)
    output = limit if known else _DEFAULT_OUTPUT.get(path, _UNBOUNDED_OUTPUT)
    samples = params.get("n")
    return Prompt(
        batch=batch,
        tokens=tokens,
        text_bytes=size,
        output_tokens=int(min(max(output, 0), 10**7)),
        samples=samples if isinstance(samples, int) and 1 <= samples <= 10**4 else 1,
        stream=bool(body.get("stream")),
    )


def pair_up(body: dict[str, Any], batch: int | None, host: str, port: int, rng: Random) -> None:
    """Write the bootstrap address of the prefill server and fresh rooms into `body`.

    A null host would kill a decode server, so the fields are always set, one per prompt of a batch.
    """
    if batch:
        body["bootstrap_host"] = [host] * batch
        body["bootstrap_port"] = [port] * batch
        body["bootstrap_room"] = [rng.randrange(_ROOMS) for _ in range(batch)]
    else:
        body["bootstrap_host"] = host
        body["bootstrap_port"] = port
        body["bootstrap_room"] = rng.randrange(_ROOMS)


def name_requests(body: dict[str, Any], prompt: Prompt, ours: bool) -> list[str]:
    """Give the request an id that both servers can abort it by; the ids, or none if unknowable.

    With n > 1 SGLang makes up ids of its own; a batch's ids must be a list. `ours`: an id already
    there was written by an earlier attempt and is replaced.
    """
    rid = body.get("rid")
    if rid is not None and not ours:
        if isinstance(rid, str) and prompt.batch is None and prompt.samples == 1:
            return [rid]
        if isinstance(rid, list):
            return [item for item in rid if isinstance(item, str)]
        return []
    if prompt.samples > 1:
        return []
    rids = [uuid.uuid4().hex for _ in range(prompt.prompts)]
    body["rid"] = rids if prompt.batch else rids[0]
    return rids


def _generate_prompt(body: dict[str, Any]) -> tuple[int | None, int, int]:
    if body.get("text") is not None:
        return _measure(body["text"])
    if body.get("input_ids") is not None:
        return _measure(body["input_ids"])
    embeds = body.get("input_embeds")
    if not isinstance(embeds, list) or not embeds or not isinstance(embeds[0], list):
        return None, 0, 0
    if embeds[0] and isinstance(embeds[0][0], list):
        return len(embeds), sum(len(item) for item in embeds if isinstance(item, list)), 0
    return None, len(embeds), 0


def _measure(prompt: Any) -> tuple[int | None, int, int]:
    """(batch, tokens, bytes of text) of a string, token list, or list of either."""
    if isinstance(prompt, str):
        return None, 0, _bytes(prompt)
    if not isinstance(prompt, list) or not prompt:
        return None, 0, 0
    if isinstance(prompt[0], int):
        return None, len(prompt), 0
    tokens = sum(len(item) for item in prompt if isinstance(item, list))
    return len(prompt), tokens, sum(_bytes(item) for item in prompt if isinstance(item, str))


def _chat_prompt(body: dict[str, Any]) -> tuple[int, int]:
    tokens, size = 0, 0
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        tokens += _MESSAGE_TOKENS
        if isinstance(content, str):
            size += _bytes(content)
        for part in content if isinstance(content, list) else ():
            text = part.get("text") if isinstance(part, dict) else None
            if isinstance(text, str):
                size += _bytes(text)
            else:
                tokens += _IMAGE_TOKENS
    return tokens, size


def _bytes(text: str) -> int:
    """UTF-8 length: closer to a token count than characters are outside of ASCII."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
