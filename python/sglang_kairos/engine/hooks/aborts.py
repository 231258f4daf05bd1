"""Finds the requests that an abort names.

SGLang's schedulers compare beginnings (`startswith`), so that one abort can reach all parts of a
batch. There the client's id `job` became `job_0`, `job_1` and so on. But it also reaches `job_10`
and `job-of-another`. Here an abort ends the request with that very id. Where there is none, it ends
the parts of the batch with that id.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from sglang_kairos.engine import compat


def ids_named(asked: str, present: Iterable[str], *, batches: bool = True) -> set[str]:
    """Returns those of the ids `present` that an abort of `asked` ends.

    `batches`: whether parts of a batch count. With one tokenizer process they must not: it passes
    on only ids that it knows. So `asked` is a request, perhaps one that has left, and never a
    batch.
    """
    ids = set(present)
    if asked in ids:
        return {asked}
    if not batches:
        return set()
    head = asked + "_"
    return {one for one in ids if one.startswith(head) and _is_index(one[len(head) :])}


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdigit() and (text == "0" or text[0] != "0")


@contextmanager
def only_the_named(scheduler: Any, recv_req: Any, more: Iterable[Any] = ()) -> Iterator[list[Any]]:
    """While it is open, SGLang's comparison of beginnings finds only the requests that `recv_req` names.

    Other requests whose ids begin alike get another id meanwhile. Yields those named. `more`:
    requests that are in none of SGLang's places.
    """
    found = list({id(req): req for req in (*_everyone(scheduler), *more)}.values())
    if recv_req.abort_all:
        yield found
        return
    asked = recv_req.rid
    batches = compat.tokenizer_workers(scheduler) != 1
    named = ids_named(asked, (req.rid for req in found), batches=batches)
    others = [(req, req.rid) for req in found if req.rid.startswith(asked) and req.rid not in named]
    for req, rid in others:
        req.rid = "\0" + rid
    try:
        yield [req for req in found if req.rid in named]
    finally:
        for req, rid in others:
            req.rid = rid


def _everyone(scheduler: Any) -> Iterator[Any]:
    """Yields every request in the places where SGLang's `abort_request` looks, some more than once."""

    def of(path: str) -> Iterable[Any]:
        found = scheduler
        for name in path.split("."):
            found = getattr(found, name, None)
        return found or ()

    if (slot_req := getattr(scheduler, "chunked_req", None)) is not None:
        yield slot_req
    for path in (
        "waiting_queue",
        "mm_receiver.waiting_list",
        "dllm_manager.waiting_queue",
        "dllm_manager.staging_queue",
        "grammar_manager.grammar_queue",
        "disagg_prefill_bootstrap_queue.queue",
        "disagg_prefill_inflight_queue",
        "disagg_decode_prealloc_queue.retracted_queue",
    ):
        yield from of(path)
    for path in ("disagg_decode_prealloc_queue.queue", "disagg_decode_transfer_queue.queue"):
        for entry in of(path):
            yield entry.req
    yield from _in_batches(scheduler)


def _in_batches(scheduler: Any) -> Iterator[Any]:
    batches = [getattr(scheduler, name, None) for name in ("running_batch", "last_batch")]
    # Results that are not processed yet. With continuous input polling SGLang looks there too.
    batches += [entry[0] for entry in getattr(scheduler, "result_queue", None) or ()]
    for batch in batches:
        if batch is not None:
            yield from batch.reqs
