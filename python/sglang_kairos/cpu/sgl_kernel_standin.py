"""Stands in for `sgl_kernel`, whose published wheels need CUDA, on machines without a GPU.

SGLang imports names from it at module level on a CPU but, without AMX, takes its own
``forward_native`` paths; the only function that serving text really calls is implemented here.
Any other name can be imported and raises `NotImplementedError` when called.

Loaded under the name ``sgl_kernel``, so it must not import its neighbours relatively.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch

__version__ = "0.0.0+kairos.cpu"


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    stride: int,
) -> None:
    """Writes each request's new KV slots into its row of the request-to-token table, in place.

    Request i owns row ``req_pool_indices[i]``; its columns ``start_offset[i]:end_offset[i]`` take
    the next ``end_offset[i] - start_offset[i]`` entries of `out_cache_loc`. `stride`, the row
    length in tokens, is implied by `req_to_token` [rows, tokens] and only there for the signature.
    """
    taken = 0
    for row, start, end in zip(
        req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True
    ):
        length = end - start
        req_to_token[row, start:end] = out_cache_loc[taken : taken + length]
        taken += length


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def unavailable(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel.{name} is a GPU kernel; Kairos' CPU stand-in does not implement it"
        )

    unavailable.__name__ = unavailable.__qualname__ = name
    return unavailable
