"""``python -m sglang_kairos COMMAND …``: as ``kairos COMMAND …``, where that is not installed."""

import sys

from sglang_kairos.cli import main

if __name__ == "__main__":
    sys.exit(main())
