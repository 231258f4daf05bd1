"""Loads single files and functions of an SGLang, without the ten seconds of importing the package."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest

from helpers.trees import sglang_folder


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


@functools.cache
def _compiled(version: str, file: str, qualname: str) -> CodeType:
    source = (sglang_folder(version) / "sglang" / "srt" / file).read_text(encoding="utf-8")
    found: Any = _parsed(source)
    for name in qualname.split("."):
        found = next(node for node in found.body if getattr(node, "name", None) == name)
    found.decorator_list = []
    futures = ast.parse("from __future__ import annotations").body
    return compile(ast.Module([*futures, found], []), file, "exec")


_parsed = functools.cache(ast.parse)


def upstream_function(
    version: str, file: str, qualname: str, names: dict[str, Any]
) -> Callable[..., Any]:
    """The function `qualname` of ``sglang/srt/file`` in SGLang `version`, undecorated, with `names` for
    its globals; skips the test where that version is not here."""
    scope = dict(names)
    exec(_compiled(version, file, qualname), scope)
    function: Callable[..., Any] = scope[qualname.rsplit(".", 1)[-1]]
    return function
