"""Finds the batch sizes that a decode step runs at: those that the graph runner has captured."""

from __future__ import annotations

from typing import Any


def captured_sizes(scheduler: Any) -> list[int] | None:
    """Returns the batch sizes of the decode CUDA graphs, ascending; None: a batch runs at its own size.

    The runner itself is asked, as SGLang may capture less than the flags say (memory, largest
    number of running requests). It is an eager runner, or None, where nothing was captured. With
    padding off only exact sizes use a graph.
    """
    model_runner = getattr(scheduler.tp_worker, "model_runner", None)
    graphs = getattr(model_runner, "decode_cuda_graph_runner", None)
    if graphs is None or getattr(graphs, "disable_padding", False):
        return None
    sizes = getattr(graphs, "capture_bs", None)
    return sorted({int(size) for size in sizes}) if sizes else None
