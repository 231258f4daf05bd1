"""Benchmarks: `harness` (what they share), `experiments`, `micro` benchmarks, and `gpu`.

Names from before the split, such as ``python -m benchmark.prefill_cpu``, work for one release.
"""

import sys
from pathlib import Path

_ROOMS = ("experiments", "micro", "harness")
__path__ += [str(Path(__file__).with_name(room)) for room in _ROOMS]

for _word in sys.orig_argv[1:3]:
    for _room in _ROOMS:
        _name = _word.removeprefix("benchmark.")
        if _name != _word and Path(__file__).with_name(_room).joinpath(f"{_name}.py").is_file():
            print(f"note: {_word} is now benchmark.{_room}.{_name}", file=sys.stderr)
