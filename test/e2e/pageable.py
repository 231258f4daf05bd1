"""Preloaded into a zygote: lets SGLang's torch LoRA backend, which pins memory, run without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _pageable(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(*args: Any, pin_memory: bool = False, **options: Any) -> Any:
        return make(*args, **options)

    return made


if not torch.cuda.is_available():
    torch.Tensor.pin_memory = lambda self, *args: self  # type: ignore
    for _name in ("tensor", "zeros", "empty", "ones"):
        setattr(torch, _name, _pageable(getattr(torch, _name)))
