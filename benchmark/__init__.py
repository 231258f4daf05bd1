"""Benchmarks: `harness` (what they share), `experiments`, `micro` benchmarks, and `gpu`.

The names of before the split, such as ``python -m benchmark.prefill_cpu``, work for one release.
"""

from pathlib import Path

__path__ += [str(Path(__file__).with_name(room)) for room in ("experiments", "micro")]
