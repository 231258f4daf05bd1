"""Computes SGLang's KV checksum (``--disaggregation-enable-kv-checksum``) without a CUDA kernel."""

from __future__ import annotations

import ctypes
import zlib
from typing import Any

import numpy as np


def compute(computer: Any, kv_page_indices: Any, state_indices: Any = None) -> int:
    """Replaces `KvChecksumComputer.compute`: Adler-32 of the same bytes in the same order.

    `kv_page_indices`, `state_indices`: 1-D integer tensors on the host, rows of each buffer.
    """
    parts = [
        (computer._kv_data_ptrs, computer._kv_item_lens, kv_page_indices),
        (computer._state_data_ptrs, computer._state_item_lens, state_indices),
    ]
    checksum = 1
    for addresses, lengths, indices in parts:
        for address, length in zip(addresses, lengths, strict=True):
            checksum = zlib.adler32(rows(address, length, indices.numpy()), checksum)
    return checksum


def rows(address: int, length: int, indices: Any) -> bytes:
    """Returns the bytes of rows `indices` of a table at `address` whose rows have `length` bytes."""
    if not len(indices) or not length:
        return b""
    table = (ctypes.c_uint8 * (length * (int(indices.max()) + 1))).from_address(address)
    return np.frombuffer(memoryview(table), np.uint8).reshape(-1, length)[indices].tobytes()
