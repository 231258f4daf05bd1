"""Times FlashInfer's paged prefill and decode attention, kernel by kernel. No server is needed.

Times are medians between CUDA events, after warm-up. The two wrappers are planned outside the timed
region, as SGLang plans once a step. Inputs are random, and enough of them that the second-level
cache does not hold the KV.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

WORKSPACE_BYTES = 256 << 20
WARM_UP, TIMES = 5, 30


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``--kernels``."""
    group = parser.add_argument_group("kernels (no server; needs CUDA and flashinfer)")
    group.add_argument("--kernels", action="store_true", help="time kernels instead of a server")
    group.add_argument("--heads", type=int, default=32)
    group.add_argument("--kv-heads", type=int, default=8)
    group.add_argument("--head-dim", type=int, default=128)
    group.add_argument("--page-size", type=int, default=1)
    group.add_argument("--new-tokens", type=_numbers, default="256,1024,4096", metavar="N,…")
    group.add_argument("--prefix-tokens", type=_numbers, default="0,4096,16384", metavar="N,…")
    group.add_argument("--batches", type=_numbers, default="1,8,32,128,256", metavar="N,…")
    group.add_argument("--contexts", type=_numbers, default="512,2048,8192", metavar="N,…")


def main(given: argparse.Namespace) -> int:
    """Times the grid and prints (or writes) JSON. Returns 1, with a message, where that is impossible."""
    missing = why_not()
    if missing:
        print(f"error: --kernels {missing}", file=sys.stderr)
        return 1
    for name in ("heads", "kv_heads", "head_dim", "page_size"):
        if getattr(given, name) < 1:
            flag = "--" + name.replace("_", "-")
            print(f"error: {flag}: must be at least 1", file=sys.stderr)
            return 2
    if given.heads % given.kv_heads:
        print("error: --heads: must be a multiple of --kv-heads", file=sys.stderr)
        return 2
    text = json.dumps(measure(given), indent=1) + "\n"
    if given.out:
        Path(given.out).write_text(text, encoding="utf-8")
        print(f"wrote {given.out}")
    else:
        print(text, end="")
    return 0


def why_not() -> str:
    """Returns what is missing here, in words; empty when kernels can be timed."""
    if importlib.util.find_spec("torch") is None:
        return "needs torch, which is not installed"
    import torch

    if not torch.cuda.is_available():
        return "needs a CUDA device; torch sees none here"
    if importlib.util.find_spec("flashinfer") is None:
        return "needs flashinfer-python, which is not installed"
    return ""


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Returns the whole grid; cells that do not fit into the GPU's free memory are left out."""
    import torch

    name = torch.cuda.get_device_name()
    shape = {k: getattr(given, k) for k in ("heads", "kv_heads", "head_dim", "page_size")}
    rows: list[dict[str, Any]] = []
    for prefix in given.prefix_tokens:
        for new in given.new_tokens:
            if _fits(given, prefix + new):
                rows.append(prefill_cell(given, new, prefix))
    for batch in given.batches:
        for context in given.contexts:
            if _fits(given, batch * context):
                rows.append(decode_cell(given, batch, context))
    return {"gpu": name, "torch": torch.__version__, "dtype": "bfloat16", **shape, "rows": rows}


def prefill_cell(given: argparse.Namespace, new: int, prefix: int) -> dict[str, Any]:
    """One request of `new` queries over `prefix` + `new` tokens of paged KV, causal."""
    import torch
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    pages = Pages(given, [prefix + new])
    wrapper = BatchPrefillWithPagedKVCacheWrapper(_workspace(), "NHD")
    starts = torch.tensor([0, new], dtype=torch.int32, device="cuda")
    wrapper.plan(
        starts,
        pages.indptr,
        pages.indices,
        pages.last_page_len,
        given.heads,
        given.kv_heads,
        given.head_dim,
        given.page_size,
        causal=True,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )
    query = torch.randn(new, given.heads, given.head_dim, dtype=torch.bfloat16, device="cuda")
    took = timed(lambda turn: wrapper.run(query, pages.cache[turn % len(pages.cache)]))
    return {"kernel": "prefill", "new_tokens": new, "prefix_tokens": prefix, **took}


def decode_cell(given: argparse.Namespace, batch: int, context: int) -> dict[str, Any]:
    """`batch` queries of one token, each over `context` tokens of paged KV."""
    import torch
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    pages = Pages(given, [context] * batch)
    group = given.heads // given.kv_heads
    # As SGLang: grouped queries go through the tensor cores.
    wrapper = BatchDecodeWithPagedKVCacheWrapper(_workspace(), "NHD", use_tensor_cores=group >= 4)
    wrapper.plan(
        pages.indptr,
        pages.indices,
        pages.last_page_len,
        given.heads,
        given.kv_heads,
        given.head_dim,
        given.page_size,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )
    query = torch.randn(batch, given.heads, given.head_dim, dtype=torch.bfloat16, device="cuda")
    took = timed(lambda turn: wrapper.run(query, pages.cache[turn % len(pages.cache)]))
    return {"kernel": "decode", "batch": batch, "kv_tokens": batch * context, **took}


class Pages:
    """Paged KV of some requests, in shuffled pages, in enough copies to keep it out of the L2 cache."""

    def __init__(self, given: argparse.Namespace, lengths: Sequence[int]) -> None:
        import torch

        size = given.page_size
        counts = [-(-length // size) for length in lengths]
        total = sum(counts)
        starts = torch.tensor([0, *counts]).cumsum(0)
        self.indptr = starts.to(torch.int32).cuda()
        self.indices = torch.randperm(total, dtype=torch.int32).cuda()
        last = [length - (count - 1) * size for length, count in zip(lengths, counts, strict=True)]
        self.last_page_len = torch.tensor(last, dtype=torch.int32, device="cuda")
        shape = (total, 2, size, given.kv_heads, given.head_dim)
        copies = max(1, min(8, (256 << 20) // max(1, _kv_bytes(given, sum(lengths)))))
        self.cache = [
            torch.randn(*shape, dtype=torch.bfloat16, device="cuda") for _ in range(copies)
        ]


def timed(call: Callable[[int], object]) -> dict[str, float]:
    """Returns median and lowest milliseconds of `call(turn)`, between CUDA events."""
    import torch

    for turn in range(WARM_UP):
        call(turn)
    torch.cuda.synchronize()
    pairs = []
    for turn in range(TIMES):
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        call(turn)
        pair[1].record()
        pairs.append(pair)
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in pairs]
    return {"median_ms": round(median(times), 5), "lowest_ms": round(min(times), 5)}


def _workspace() -> Any:
    import torch

    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")


def _kv_bytes(given: argparse.Namespace, tokens: int) -> int:
    return int(tokens * 2 * given.kv_heads * given.head_dim * 2)


def _fits(given: argparse.Namespace, tokens: int) -> bool:
    import torch

    free, _ = torch.cuda.mem_get_info()
    return bool(2 * _kv_bytes(given, tokens) + 2 * WORKSPACE_BYTES < free)


def _numbers(text: str) -> list[int]:
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be whole numbers with commas, got {text!r}"
        ) from None
    if not found or min(found) < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text!r}")
    return found
