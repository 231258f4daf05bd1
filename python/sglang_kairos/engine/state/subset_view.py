"""A throw-away view of SGLang's running batch that holds some of its rows, for one step or many.

Making one costs a gather per row tensor. While neither the running batch nor the choice changes,
the same view is used again, and a step costs only the write-back of the lengths.
`benchmark.micro.decode_cost` counts both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any


class SubsetView:
    """The rows `keep` (ascending) of `batch`, which itself keeps all requests and is not touched.

    `filter_batch` rebinds fields and never mutates them, so shallow copies are enough.
    """

    def __init__(self, batch: Any, keep: list[int]) -> None:
        import torch

        self._keep = keep
        self.batch = copy.copy(batch)
        self.batch.sampling_info = copy.copy(batch.sampling_info)
        self.batch.filter_batch(keep_indices=keep)
        self._rows_cpu = torch.tensor(keep, dtype=torch.int64)
        self._rows = self._rows_cpu.to(batch.seq_lens.device, non_blocking=True)
        self._sampling_info = batch.sampling_info
        self._written: Any = None

    def fits(self, batch: Any, keep: list[int]) -> bool:
        """Returns whether this view is valid: SGLang rebinds `seq_lens` when rows come, go or run."""
        return (
            batch.seq_lens is self._written
            and batch.sampling_info is self._sampling_info
            and keep == self._keep
        )

    def advance(self, prepare: Callable[[Any], None], batch: Any) -> None:
        """Prepares the view for its step. The advanced lengths go into `batch` too.

        They are new tensors, as a forward in flight may read the old ones. The next input token of
        every row, parked or not, waits in the future map.
        """
        view = self.batch
        view.input_ids = None
        prepare(view)
        batch.seq_lens = batch.seq_lens.index_copy(0, self._rows, view.seq_lens)
        batch.orig_seq_lens = batch.orig_seq_lens.index_copy(0, self._rows, view.orig_seq_lens)
        batch.seq_lens_cpu = batch.seq_lens_cpu.index_copy(0, self._rows_cpu, view.seq_lens_cpu)
        batch.seq_lens_sum = None
        batch.out_cache_loc = None
        batch.input_ids = None
        batch.forward_mode = view.forward_mode
        self._written = batch.seq_lens
