"""Checks on router and servers what a request must be before it may reach a scheduler.

SGLang answers most malformed requests with a 400 of its own; those are left to it. What is refused
here would end a scheduler, keep a request waiting for ever, or fail with 500 after both servers
worked on it. The error names the field, the entry of a list and the limit. It imports nothing of
SGLang.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sglang_kairos.slo.body import CHAT, COMPLETIONS, GENERATE

# Samples of one prompt. SGLang itself has no limit; a batch times this is bounded by its bytes.
MOST_SAMPLES = 10_000
# The size of the buffers in which prefill hands the first token's log probabilities to decode.
MOST_TOP_LOGPROBS = 128
_PROMPT_FIELDS = {GENERATE: ("text", "input_ids"), COMPLETIONS: ("prompt",)}
_MEDIA = ("image_data", "video_data", "audio_data")
# One entry per prompt where they are lists; any other length SGLang answers with 500.
_PER_PROMPT = (
    *("sampling_params", "return_logprob", "logprob_start_len", "top_logprobs_num"),
    *("lora_path", "custom_logit_processor", "extra_key", "cache_salt", "rid"),
)


class RequestError(ValueError):
    """A request that must reach no server; `field` names what is wrong with it."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What the servers can hold; None is not known and not checked.

    `vocabulary`: token ids lie below it. `context_tokens`: a prompt must be shorter. `kv_tokens`:
    of the decode server, which reserves a prompt's pages of `page_tokens` and `reserved_tokens`
    more. A server that truncates prompts has none of these. `samples`: the most that ``n`` may ask
    for. `token_ids_logprob`: whether that may be asked for.
    """

    vocabulary: int | None = None
    context_tokens: int | None = None
    kv_tokens: int | None = None
    reserved_tokens: int = 0
    page_tokens: int = 1
    samples: int = MOST_SAMPLES
    token_ids_logprob: bool = True

    @property
    def longest_prompt(self) -> int | None:
        """Returns the most prompt tokens that fit; None if that is not known."""
        most = []
        if self.context_tokens is not None:
            most.append(self.context_tokens - 1)
        if self.kv_tokens is not None:
            free = max(0, self.kv_tokens - self.reserved_tokens)
            most.append(free // self.page_tokens * self.page_tokens)
        return min(most, default=None)


NO_LIMITS = RequestLimits()


def check_request(body: Mapping[str, Any], path: str, limits: RequestLimits = NO_LIMITS) -> None:
    """Raises RequestError if a request to one of `slo.body.SLO_PATHS` must reach no scheduler."""
    _check_samples(body, path, limits.samples)
    if path == CHAT:
        _check_rid(body.get("rid"), None)
        _whole(body.get("top_logprobs"), "top_logprobs", 0, _top(limits))
        _check_stop_ids(body, "", limits)
        return
    batch = _check_prompts(body, path, limits)
    _check_rid(body.get("rid"), batch)
    if path == COMPLETIONS:
        if not isinstance(body.get("logprobs"), bool):  # which SGLang takes for 0 or 1
            _whole(body.get("logprobs"), "logprobs", 0, _top(limits))
        _check_stop_ids(body, "", limits)
        return
    params = body.get("sampling_params")
    for index, one in enumerate(params if isinstance(params, list) else [params or {}]):
        where = f"sampling_params[{index}]." if isinstance(params, list) else "sampling_params."
        if isinstance(one, dict):
            _check_stop_ids(one, where, limits)
    if batch is not None:
        for name in _PER_PROMPT:
            value = body.get(name)
            if isinstance(value, list) and len(value) != batch:
                raise RequestError(
                    name, f"must have one entry for each of the {batch} prompts, got {len(value)}"
                )
    _each(body, "top_logprobs_num", lambda one, name: _whole(one, name, 0, _top(limits)))
    _each(body, "logprob_start_len", lambda one, name: _whole(one, name, -1, 2**31 - 1))
    _check_token_ids_logprob(body.get("token_ids_logprob"), limits)


def _top(limits: RequestLimits) -> int:
    return min(MOST_TOP_LOGPROBS, limits.vocabulary or MOST_TOP_LOGPROBS)


def _check_samples(body: Mapping[str, Any], path: str, most: int) -> None:
    if path != GENERATE:
        _whole(body.get("n"), "n", 1, most)
        return
    params = body.get("sampling_params")
    if isinstance(params, dict):
        _check_n(params, "sampling_params.n", most)
    elif isinstance(params, list):
        if not params:
            raise RequestError("sampling_params", "must not be an empty list")
        for index, one in enumerate(params):
            if isinstance(one, dict):
                _check_n(one, f"sampling_params[{index}].n", most)
        if len({one.get("n") or 1 for one in params if isinstance(one, dict)}) > 1:
            raise RequestError("sampling_params", "n must be the same in all entries")


def _check_n(params: Mapping[str, Any], where: str, most: int) -> None:
    if "n" in params and params["n"] is None:
        raise RequestError(where, f"must be a whole number between 1 and {most}, got null")
    _whole(params.get("n"), where, 1, most)


def _check_prompts(body: Mapping[str, Any], path: str, limits: RequestLimits) -> int | None:
    """Checks the prompts. Returns how many there are; None for a single or an unknown one."""
    if any(body.get(name) for name in _MEDIA):
        return None  # its text may be empty, its ids may stand for media
    for name in _PROMPT_FIELDS[path]:
        prompt = body.get(name)
        if prompt is None:
            continue
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError(name, "must not be empty")
            return None
        if not isinstance(prompt, list):
            raise RequestError(name, f"must be a text or a list, got {_kind(prompt)}")
        if not prompt:
            if name == "input_ids" and _session(body):
                return None  # the session's history may be the whole prompt
            raise RequestError(name, "must not be empty")
        if not isinstance(prompt[0], str | list):
            _check_tokens(prompt, name, limits)
            return None
        for index, one in enumerate(prompt):
            where = f"{name}[{index}]"
            if not isinstance(one, type(prompt[0])):
                raise RequestError(where, "all prompts must be texts, or all lists of token ids")
            if not one:
                raise RequestError(where, "must not be empty")
            if isinstance(one, list):
                _check_tokens(one, where, limits)
        return len(prompt)
    return None


def _session(body: Mapping[str, Any]) -> bool:
    params = body.get("session_params")
    return isinstance(params, dict) and bool(params.get("id"))


def _check_tokens(ids: list[Any], name: str, limits: RequestLimits) -> None:
    """Checks token ids by C loops only: prompts of 100,000 pass here on every request."""
    if set(map(type, ids)) != {int}:
        index = next(i for i, one in enumerate(ids) if type(one) is not int)
        raise RequestError(f"{name}[{index}]", f"must be a token id, got {_kind(ids[index])}")
    most = (limits.vocabulary or 2**31) - 1
    for extreme in (min(ids), max(ids)):
        if not 0 <= extreme <= most:
            where = f"{name}[{ids.index(extreme)}]"
            raise RequestError(where, f"a token id lies between 0 and {most}, got {extreme}")
    longest = limits.longest_prompt
    if longest is not None and len(ids) > longest:
        raise RequestError(name, f"at most {longest} tokens fit on these servers, got {len(ids)}")


def _check_rid(rid: Any, batch: int | None) -> None:
    """Checks request ids. `batch`: the number of prompts, None for one."""
    if rid is None:
        return
    if isinstance(rid, list) and batch is None:
        raise RequestError("rid", "must be a text for a single prompt, got a list")
    for index, one in enumerate(rid if isinstance(rid, list) else [rid]):
        where = f"rid[{index}]" if isinstance(rid, list) else "rid"
        if not isinstance(one, str):
            raise RequestError(where, f"must be a text, got {_kind(one)}")
        if not one:  # to SGLang's abort, it is the beginning of every other
            raise RequestError(where, "must not be empty")
    if isinstance(rid, list) and len(set(rid)) < len(rid):
        raise RequestError("rid", "the requests of a batch must have ids of their own")


def _check_stop_ids(params: Mapping[str, Any], where: str, limits: RequestLimits) -> None:
    """Checks stop ids: with `min_new_tokens`, SGLang uses them as indices into the vocabulary."""
    listed = params.get("stop_token_ids")
    if params.get("min_new_tokens") and isinstance(listed, list):
        most = (limits.vocabulary or 2**31) - 1
        for index, one in enumerate(listed):
            _whole(one, f"{where}stop_token_ids[{index}]", 0, most)


def _check_token_ids_logprob(value: Any, limits: RequestLimits) -> None:
    if not isinstance(value, list) or not value:
        return
    name, most = "token_ids_logprob", (limits.vocabulary or 2**31) - 1
    if not limits.token_ids_logprob:
        raise RequestError(
            name,
            "this SGLang (before v0.5.21) does not survive all uses of it: ask for "
            "top_logprobs_num, or use a newer one",
        )
    for one in value:
        for token in one if isinstance(one, list) else [one]:
            _whole(token, name, 0, most)


def _each(body: Mapping[str, Any], name: str, check: Callable[[Any, str], None]) -> None:
    value = body.get(name)
    if isinstance(value, list):
        for index, one in enumerate(value):
            check(one, f"{name}[{index}]")
    else:
        check(value, name)


def _whole(value: Any, name: str, low: int, high: int) -> None:
    """Raises RequestError unless `value` is None or an integer in range.

    A float or text is none.
    """
    if value is None:
        return
    if type(value) is not int:
        shown = _kind(value)
    elif not low <= value <= high:
        shown = str(value) if abs(value) < 10**30 else "a larger number"
    else:
        return
    raise RequestError(name, f"must be a whole number between {low} and {high}, got {shown}")


def _kind(value: Any) -> str:
    """Returns a wrong value's kind for an error text, without repeating what it holds."""
    names = {str: "a text", bool: "true or false", float: "a fraction", dict: "an object"}
    if value is None:
        return "null"
    return names.get(type(value), "a list" if isinstance(value, list) else "a number")


def check_bootstrap(body: Mapping[str, Any]) -> None:
    """Raises RequestError if a decode server would not be told whose KV to take."""
    if body.get("bootstrap_room") is None:
        return  # SGLang refuses it
    host = body.get("bootstrap_host")
    for one in host if isinstance(host, list) else [host]:
        if not isinstance(one, str) or not one:
            text = "a decode server needs the prefill server's address; send requests to a router"
            raise RequestError("bootstrap_host", text)
