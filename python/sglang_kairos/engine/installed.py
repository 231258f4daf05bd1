"""What is installed in this process: its settings, its seams, and those that are left out.

`plugin` fills it, handlers read it.
"""

from __future__ import annotations

import functools

from sglang_kairos.config import KairosConfig

# How many seams are active in this process, by the way they came in.
INSTALLED = {"hooks": 0, "tree": 0}
# Seams that are left out in this process (``--kairos-strict seam``), by qualified name, and what is
# lost with each; functions whose text only the file of KAIROS_SEAMS knows.
MISSING: dict[str, str] = {}
VOUCHED_FOR: list[str] = []


@functools.cache
def active_config() -> KairosConfig:
    """This process' configuration, read once from the environment."""
    return KairosConfig.from_env()
