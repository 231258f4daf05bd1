"""Which requests an abort names.

SGLang's schedulers compare beginnings (`startswith`), so that one abort can reach all parts of a batch:
the client's id `job` became `job_0`, `job_1` and so on. It also reaches `job_10` and `job-of-another`.
Here an abort ends the request of that very id; where there is none, the parts of the batch of that id.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from sglang_kairos.engine import compat


def ids_named(asked: str, present: Iterable[str], *, batches: bool = True) -> set[str]:
    """Those of the ids `present` that an abort of `asked` ends.

    `batches`: whether parts of a batch count. With one tokenizer process they must not: it passes on
    ids that it knows only, so `asked` is a request, if one that has left, and never a batch.
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
    """Meanwhile upstream's comparison of beginnings finds those that `recv_req` names and no others.

    Whose id merely begins so goes by another one. Yields those named. `more`: requests that are in
    none of upstream's places.
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
    """Every request in the places where upstream's `abort_request` looks, some more than once."""

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
    # Results that are not processed yet: with continuous input polling upstream looks there too.
    batches += [entry[0] for entry in getattr(scheduler, "result_queue", None) or ()]
    for batch in batches:
        if batch is not None:
            yield from batch.reqs
