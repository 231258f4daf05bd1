"""Old name of ``kairos doctor``."""

import sys

from sglang_kairos.tools import run_renamed

if __name__ == "__main__":
    sys.exit(run_renamed("doctor"))
