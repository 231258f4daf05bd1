"""What the router reads out of a request body, and the pairing fields it writes into it."""

from __future__ import annotations

import math
import os
from random import Random
from typing import Any, NamedTuple

import orjson

from sglang_kairos.router.errors import TooManySamples, Unfoldable
from sglang_kairos.router.fleet.prefix_index import Blocks, blocks_of
from sglang_kairos.slo.body import COMPLETIONS, GENERATE

# A scalar room of a request with n > 1 is counted up by SGLang: stay clear of the signed maximum.
_ROOMS = 2**63 - 2**20
_IMAGE_TOKENS = 1000
_MESSAGE_TOKENS = 6
_DEFAULT_OUTPUT = {GENERATE: 128, COMPLETIONS: 16}
_UNBOUNDED_OUTPUT = 1024


class Prompt(NamedTuple):
    """The shape of one request.

    Its length is `tokens` tokens counted plus `text_bytes` bytes of text not yet tokenised. `batch`:
    number of prompts when they come as a list, None for a single one. `prompts`: how many there
    are, at least one. `choices`: answers to all of them together. `logprobs`: whether the answer
    holds log probabilities of the prompt.
    """

    batch: int | None
    tokens: int
    text_bytes: int
    output_tokens: int
    samples: int
    stream: bool
    logprobs: bool = False
    prompts: int = 1
    choices: int = 1


# Seeded by the operating system: routers started with one --seed must not share ids or rooms.
_IDS = Random()
# Nor may routers that were forked after this was imported.
os.register_at_fork(after_in_child=_IDS.seed)


def unique_id() -> str:
    """128 random bits in hexadecimal, without asking the operating system each time."""
    return f"{_IDS.getrandbits(128):032x}"


_PER_PROMPT = (
    "text",
    "input_ids",
    "input_embeds",
    "prompt",
    "sampling_params",
    "return_logprob",
    "logprob_start_len",
    "top_logprobs_num",
    "lora_path",
    "custom_logit_processor",
    "extra_key",
    "cache_salt",
)
_MEDIA = ("image_data", "video_data", "audio_data")


# A prefill answer with log probabilities of a long prompt is kept up to this size. A longer one
# cannot be joined, and the request ends with an error.
KEEP_LOGPROBS_BYTES = 32 * 1024 * 1024
# What the copies of a request's samples may come to: each of its servers parses all of it.
MOST_UNFOLDED_BYTES = 64 * 2**20


def unfold_samples(body: dict[str, Any], path: str, size: int) -> str | None:
    """Turn ``n`` samples per prompt into ``n`` copies of each prompt, in place. `size`: bytes of the
    body. The field that holds the prompts now, None if there was nothing to unfold.

    SGLang (0.5.16 to 0.5.23) gives all samples of a prompt one bootstrap room. Under PD such a
    request never ends and holds its KV on both servers. Copies answer in the same shape and order.
    The copies are references to one object. Unfoldable for chat requests and for media, which have
    no batch form that would do; TooManySamples.
    """
    params = body.get("sampling_params") if path == GENERATE else body
    listed: list[Any] = params if isinstance(params, list) else [params]
    holders = [item for item in listed if isinstance(item, dict)]
    samples = max((_samples(item) for item in holders), default=1)
    beams = any((item.get("beam_width") or 1) != 1 for item in holders)
    if samples == 1 or beams:
        return None
    key = next((k for k in ("text", "input_ids", "input_embeds", "prompt") if body.get(k)), None)
    copies = path in (GENERATE, COMPLETIONS)
    if key is None or not copies or any(body.get(name) for name in _MEDIA):
        raise Unfoldable("n: must be 1 here, SGLang cannot serve more over separate prefill")
    if samples * size > MOST_UNFOLDED_BYTES:
        raise TooManySamples(
            f"n: {samples} samples of a body of {size} bytes come to {samples * size}, "
            f"{MOST_UNFOLDED_BYTES} are passed on at most"
        )
    if _batch_of(body, path) is None:
        body[key] = [body[key]]
    for name in _PER_PROMPT:
        if isinstance(body.get(name), list):
            body[name] = [item for item in body[name] for _ in range(samples)]
    for item in holders:
        item.pop("n", None)
    body.pop("rid", None)  # SGLang makes up its own for samples, too
    return key


def written_once(body: dict[str, Any], key: str) -> None:
    """Have each prompt under `key`, which `unfold_samples` made, turned into JSON once for all its
    copies. Nothing can be read out of them any more."""
    written: dict[int, orjson.Fragment] = {}
    for prompt in body[key]:
        if id(prompt) not in written:
            written[id(prompt)] = orjson.Fragment(orjson.dumps(prompt))
    body[key] = [written[id(prompt)] for prompt in body[key]]


def _samples(params: dict[str, Any]) -> int:
    """At least one; what is no number `slo.limits` refuses."""
    n = params.get("n")
    return n if type(n) is int and n > 1 else 1


def _batch_of(body: dict[str, Any], path: str) -> int | None:
    return (_generate_prompt(body) if path == GENERATE else _measure(body.get("prompt")))[0]


def describe(body: dict[str, Any], path: str) -> Prompt:
    """Size and shape of a request; anything malformed counts as little and is left to SGLang."""
    params: Any = body
    if path == GENERATE:
        params = body.get("sampling_params")
        params = params[0] if isinstance(params, list) and params else params
        params = params if isinstance(params, dict) else {}
        batch, tokens, size = _generate_prompt(body)
        limit = params.get("max_new_tokens")
    elif path == COMPLETIONS:
        batch, tokens, size = _measure(body.get("prompt"))
        limit = body.get("max_tokens")
    else:
        batch, tokens, size = None, *_chat_prompt(body)
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
    known = isinstance(limit, int | float) and math.isfinite(limit)
    output = limit if known else _DEFAULT_OUTPUT.get(path, _UNBOUNDED_OUTPUT)
    samples, prompts = _samples(params), max(1, batch or 1)
    return Prompt(
        batch=batch,
        tokens=tokens,
        text_bytes=size,
        output_tokens=int(min(max(output, 0), 10**7)),
        samples=samples,
        stream=bool(body.get("stream")),
        logprobs=_wants_logprobs(path, body),
        prompts=prompts,
        choices=prompts * samples,
    )


def prompt_blocks(body: dict[str, Any], path: str, bytes_per_token: float) -> Blocks:
    """The prompt's blocks for `prefix_index`. Of a batch only the first prompt's: its beginning
    is what a batch has in common, if anything."""
    if path == GENERATE:
        prompt = body.get("text") if body.get("text") is not None else body.get("input_ids")
    elif path == COMPLETIONS:
        prompt = body.get("prompt")
    else:
        return blocks_of(_chat_text(body.get("messages")), bytes_per_token)
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        prompt = prompt[0]
    return blocks_of(prompt, bytes_per_token)


def _chat_text(messages: Any) -> str:
    """All text of a chat in order, roles included: what its template will spell out."""
    parts: list[str] = []
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, dict):
            continue
        parts.append(str(message.get("role"))[:64])
        content = message.get("content")
        if isinstance(content, str):
            parts.append(content)
        for part in content if isinstance(content, list) else ():
            text = part.get("text") if isinstance(part, dict) else None
            if isinstance(text, str):
                parts.append(text)
    return "\n".join(parts)


def pair_up(body: dict[str, Any], batch: int | None, host: str, port: int) -> None:
    """Write the bootstrap address of the prefill server and fresh rooms into `body`.

    A null host would kill a decode server, so the fields are always set, one per prompt of a batch.
    """
    if batch:
        body["bootstrap_host"] = [host] * batch
        body["bootstrap_port"] = [port] * batch
        body["bootstrap_room"] = [_IDS.randrange(_ROOMS) for _ in range(batch)]
    else:
        body["bootstrap_host"] = host
        body["bootstrap_port"] = port
        body["bootstrap_room"] = _IDS.randrange(_ROOMS)


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
    rids = [unique_id() for _ in range(prompt.prompts)]
    body["rid"] = rids if prompt.batch else rids[0]
    return rids


def _wants_logprobs(path: str, body: dict[str, Any]) -> bool:
    if path == COMPLETIONS:
        return bool(body.get("echo")) and bool(body.get("logprobs"))
    asked = body.get("return_logprob")
    return path == GENERATE and (any(asked) if isinstance(asked, list) else bool(asked))


def wants_prompts(path: str, body: dict[str, Any]) -> bool:
    """Of a request with log probabilities: whether it asks for more than prefill's first token."""
    start = body.get("logprob_start_len")
    starts = start if isinstance(start, list) else [start]
    return path == COMPLETIONS or any(place not in (None, -1) for place in starts)


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
