"""What is installed in this process: the plugin, its settings, its seams, those left out.

`plugin` fills it, handlers read it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os

from sglang_kairos.config import ConfigError, KairosConfig

PLUGIN_GROUP, PLUGIN_NAME = "sglang.srt.plugins", "kairos"

# How many seams are active in this process, by the way they came in.
INSTALLED = {"hooks": 0, "tree": 0}
# Seams that are left out in this process (``--kairos-strict seam``), by qualified name, and what is
# lost with each; functions whose text only the file of KAIROS_SEAMS knows.
MISSING: dict[str, str] = {}
VOUCHED_FOR: list[str] = []


@functools.cache
def active_config() -> KairosConfig:
    """Returns this process' configuration, read once from the environment."""
    return KairosConfig.from_env()


def check_loadable() -> None:
    """Raises ConfigError if SGLang would not load this plugin."""
    if not any(
        entry.name == PLUGIN_NAME for entry in importlib.metadata.entry_points(group=PLUGIN_GROUP)
    ):
        raise ConfigError(
            "sglang-kairos is not installed in this Python, so SGLang cannot find its plugin: "
            "pip install sglang-kairos (or pip install -e . in its source tree)"
        )
    allowed = os.environ.get("SGLANG_PLUGINS", "")
    if allowed.strip() and PLUGIN_NAME not in {name.strip() for name in allowed.split(",")}:
        raise ConfigError(
            f"SGLANG_PLUGINS={allowed} leaves the plugin {PLUGIN_NAME!r} out: "
            f"add it, unset the variable, or start with --kairos off"
        )
