"""Stock and Kairos in turn on one GPU: `run`.

`pack` and `install` are in `contrib/air_gapped`; their old names here work for one release.
"""

import sys
from pathlib import Path

__path__ += [str(Path(__file__).resolve().parents[2] / "contrib" / "air_gapped")]

if "benchmark.gpu.pack" in sys.orig_argv[1:3]:
    print("note: benchmark.gpu.pack is now contrib.air_gapped.pack", file=sys.stderr)
