"""The old place of `benchmark.experiments.demo`; it works for one release."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from benchmark.experiments.demo import main

    print("note: benchmark/demo.py is now benchmark.experiments.demo", file=sys.stderr)
    sys.exit(main())
