"""Single files of an installed SGLang, without the ten seconds that importing the package takes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


def upstream_goodput() -> ModuleType:
    """SGLang's own definition of goodput; skips the test where SGLang is not installed."""
    package = importlib.util.find_spec("sglang")
    if package is None or package.origin is None:
        pytest.skip("SGLang is not installed")
    path = Path(package.origin).parent / "benchmark" / "goodput.py"
    spec = importlib.util.spec_from_file_location("upstream_goodput", path)
    if spec is None or spec.loader is None or not path.exists():
        pytest.skip("this SGLang has no goodput")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def upstream_source(path: str) -> str:
    """The text of a file below the installed ``sglang``; skips the test where there is none."""
    package = importlib.util.find_spec("sglang")
    if package is None or package.origin is None:
        pytest.skip("SGLang is not installed")
    return (Path(package.origin).parent / path).read_text(encoding="utf-8")
