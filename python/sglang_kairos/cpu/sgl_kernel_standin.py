"""Replaces `sgl_kernel`, whose published wheels need CUDA, on machines without a GPU.

On a CPU without AMX, SGLang imports names from it at module level but runs its own
``forward_native`` paths. Serving text calls one function of it, which is implemented here.
Any other name can be imported and raises `NotImplementedError` when called. So does any operator
that SGLang's model files take from ``torch.ops.sgl_kernel`` while they are imported.

It is loaded under the name ``sgl_kernel``, so it must not import its neighbours relatively.
"""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Callable, Iterable
from types import CodeType, FrameType
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

    Request i owns row ``req_pool_indices[i]``. Its columns ``start_offset[i]:end_offset[i]`` take
    the next ``end_offset[i] - start_offset[i]`` entries of `out_cache_loc`. `stride`, the row
    length in tokens, is implied by `req_to_token` [rows, tokens]; it is only there for the
    signature.
    """
    taken = 0
    for row, start, end in zip(
        req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True
    ):
        length = end - start
        req_to_token[row, start:end] = out_cache_loc[taken : taken + length]
        taken += length


class Unavailable:
    """A kernel that can be looked up, as can its overloads, but not called."""

    def __init__(self, name: str) -> None:
        self.__name__ = self.__qualname__ = name

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel.{self.__name__} is a native kernel; Kairos' CPU stand-in does not "
            "implement it"
        )

    def __getattr__(self, name: str) -> Unavailable:
        if name.startswith("__"):
            raise AttributeError(name)
        return Unavailable(f"{self.__name__}.{name}")


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)
    return Unavailable(name)


def _is_written_out(frame: FrameType) -> bool:
    """Returns whether that module or class body names the attribute, as ``ops.sgl_kernel.name``.

    `hasattr`, `getattr` and ``try`` ask whether there is a kernel, and must learn that there is
    none. So must functions, which run later.
    """
    code, at = frame.f_code, frame.f_lasti
    if code.co_flags & inspect.CO_OPTIMIZED:
        return False
    if any(entry.start <= at < entry.end for entry in _guarded(code)):
        return False
    return dis.opname[code.co_code[at]] in ("LOAD_ATTR", "LOAD_METHOD")


def _guarded(code: CodeType) -> Iterable[Any]:
    """Returns the stretches of bytecode that stand in a ``try`` (or ``with``)."""
    return getattr(dis.Bytecode(code), "exception_entries", ())


def _answer_for_operators() -> None:
    """Makes ``torch.ops.sgl_kernel`` answer what modules take from it while they are imported."""
    import torch

    known = type(torch.ops.sgl_kernel)
    if known.__name__ == "_Operators":
        return

    class _Operators(known):  # type: ignore[misc, valid-type]
        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                if name.startswith("__") or not _is_written_out(sys._getframe(1)):
                    raise
                return Unavailable(name)

    # Others may hold this namespace already, with what it has found, so it is changed in place.
    torch.ops.sgl_kernel.__class__ = _Operators


_answer_for_operators()
