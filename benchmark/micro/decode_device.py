"""What parking adds to a decode step on the device: kernels and copies, counted, not timed.

    python -m benchmark.micro.decode_device [--json FILE]

SGLang's own `ScheduleBatch.filter_batch` and `SamplingBatchInfo` and Kairos' `SubsetView` run on
tensors of torch's meta device. Every operation with such a tensor is one that a GPU would be given.
Two steps: others are parked than before, and the same are parked again. (When everybody runs, it is
stock's own batch object: test/unit/test_engine_decode.py.) `index_copy` is two kernels, a copy and a
scatter.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmark.harness.arguments import parser_for
from benchmark.harness.experiment import write_json
from sglang_kairos.cpu import runtime
from sglang_kairos.engine.state.subset_view import SubsetView

DEVICE = "meta"
ROWS = 64


class OperationCount(TorchDispatchMode):
    """Counts operations that read or write a tensor on the device, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) and x.device.type == DEVICE for x in (*args, result)):
            self.seen[func.overloadpacket.__name__] += 1
        return result


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one line per step. Returns 0."""
    parser = parser_for("benchmark.micro.decode_device", __doc__, json=None)
    given = parser.parse_args(argv)
    rows = measure()
    for row in rows:
        listed = ", ".join(f"{count} {name}" for name, count in row["operations"].items())
        print(f"{row['step']:<30} {row['added']:>3} more than stock   {listed or 'nothing'}")
    if given.json:
        write_json(given.json, rows, indent=1)
    return 0


def measure() -> list[dict[str, Any]]:
    """Returns rows: step, operations by name (SGLang's three length increments left out), their sum."""
    batch = running_batch()
    keep = list(range(0, ROWS, 2))
    view: SubsetView

    def first() -> None:
        nonlocal view
        view = SubsetView(batch, keep)
        view.advance(lambda _: None, batch)

    def again() -> None:
        assert view.fits(batch, keep)
        view.advance(lambda _: None, batch)

    counts = {"others parked than before": counted(first), "the same parked again": counted(again)}
    return [
        {"step": step, "operations": dict(count), "added": count.total()}
        for step, count in counts.items()
    ]


def counted(act: Any) -> Counter[str]:
    """Returns device operations while `act()` runs."""
    with OperationCount() as count:
        act()
    return count.seen


def running_batch() -> Any:
    """Returns ROWS running requests, as SGLang's `filter_batch` sees them."""
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    runtime.activate()
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    def column(kind: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.ones(ROWS, dtype=kind, device=DEVICE)

    class Batch(ScheduleBatch):
        def __init__(self) -> None:
            """Nothing of SGLang's: the fields are set one by one."""

    batch = Batch()
    floats = {name: column(torch.float32) for name in ("temperatures", "top_ps", "min_ps")}
    needs = {f"need_{name}_sampling": True for name in ("top_p", "top_k", "min_p")}
    info = SamplingBatchInfo(
        **floats,
        **needs,
        top_ks=column(torch.int32),
        is_all_greedy=False,
        is_any_greedy=False,
        vocab_size=1000,
        penalizer_orchestrator=SimpleNamespace(filter=lambda rows: None),
    )
    asked = {"return_logprob": False, "grammar": None}
    req = SimpleNamespace(**asked, return_hidden_states_mode=CaptureHiddenMode.NULL)
    fields = {
        "reqs": [req] * ROWS,
        "device": DEVICE,
        "model_config": SimpleNamespace(is_encoder_decoder=False),
        "sampling_info": info,
        **dict.fromkeys(("beam_tail", "multimodal_inputs", "input_ids", "spec_info")),
        "req_pool_indices": column(),
        "req_pool_indices_cpu": torch.ones(ROWS, dtype=torch.int64),
        "seq_lens": column(),
        "orig_seq_lens": column(torch.int32),
        "seq_lens_cpu": torch.ones(ROWS, dtype=torch.int64),
        "forward_mode": None,
    }
    for name, value in fields.items():
        setattr(batch, name, value)
    return batch


if __name__ == "__main__":
    raise SystemExit(main())
