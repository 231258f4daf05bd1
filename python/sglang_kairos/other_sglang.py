"""Another SGLang than the installed one: a folder that goes first on the Python path.

``pip install --no-deps --target FOLDER sglang==…`` makes one; scripts/bootstrap.sh makes
``.venv/sglang-0.5.16``, with what that version needs beside it. Setting ``PYTHONPATH=FOLDER`` is all
there is to it: every process then imports that SGLang, and Kairos recognises it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path


class NoSuchSglang(Exception):
    """Neither a folder with an SGLang in it nor a version that is there; the message is for users."""


def folder_of(where: str, prefix: Path | None = None) -> Path:
    """The folder that `where` means: a path, or the version of one in the environment `prefix`.

    Raises NoSuchSglang, naming the versions that are there.
    """
    prefix = Path(sys.prefix) if prefix is None else prefix
    named = prefix / f"sglang-{where.removeprefix('v')}"
    for folder in (Path(where), named):
        if (folder / "sglang" / "__init__.py").is_file():
            return folder.resolve()
    there = sorted(p.name.removeprefix("sglang-") for p in prefix.glob("sglang-*") if p.is_dir())
    known = f"versions beside the installed one: {', '.join(there) or 'none'}"
    raise NoSuchSglang(
        f"--sglang {where}: no folder with an SGLang in it, and {named} is not there; {known} "
        "(scripts/bootstrap.sh installs what is in requirements/sglang-*.txt)"
    )


def first_on_path(folder: Path, env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variable that makes child processes import the SGLang in `folder`."""
    before = (os.environ if env is None else env).get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), before)))}


def use(where: str) -> Path:
    """Makes this process, and every one it starts, import that SGLang. Before any import of it.

    Raises NoSuchSglang.
    """
    folder = folder_of(where)
    if "sglang" in sys.modules:
        raise NoSuchSglang(f"--sglang {where}: another SGLang is imported already")
    os.environ.update(first_on_path(folder))
    sys.path.insert(0, str(folder))
    return folder
