"""Finds the source of functions in known SGLang versions, to compare other versions with.

It looks in this environment, beside it, and in ``out/``. Failing that it downloads a wheel, which
is kept in the user's cache folder and never unpacked. Nothing of SGLang is imported.
"""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from sglang_kairos.engine.fingerprints.known_texts import release
from sglang_kairos.engine.survey import text_of
from sglang_kairos.other_sglang import NoSuchSglang, folder_of
from sglang_kairos.versions import patch

CONTEXT = 3


class NoText(Exception):
    """A version cannot be had; the message is for users."""


def package_of(version: str) -> Path | None:
    """Returns the package folder of a version that is here; None: it is not."""
    try:
        installed = patch.find_tree()
        if installed.version is not None and release(installed.version) == version:
            return installed.root
    except patch.PatchError:
        pass
    for where in (version, str(Path("out") / f"sglang-{version}")):
        try:
            return folder_of(where) / "sglang"
        except NoSuchSglang:
            continue
    return None


def cache_folder() -> Path:
    """Returns where downloaded wheels are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sglang-kairos"


def wheel_of(version: str, folder: Path | None = None) -> Path:
    """Returns SGLang's wheel of a version, downloaded if it is not in the cache yet. Raises NoText."""
    folder = cache_folder() if folder is None else folder
    for wheel in folder.glob(f"sglang-{version}-*.whl"):
        return wheel
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command += ["--disable-pip-version-check", "-q", "-d", made, f"sglang=={version}"]
        run = subprocess.run(command, capture_output=True, text=True)
        found = next(Path(made).glob("*.whl"), None)
        if run.returncode or found is None:
            said = [line for line in run.stderr.splitlines() if line.startswith("ERROR")]
            raise NoText(
                f"pip cannot download sglang {version}: {said[-1] if said else run.stderr}"
            )
        return found.rename(folder / found.name)


def source_of(version: str, module: str) -> str | None:
    """Returns the text of a module of a version; None if it has no such module. Raises NoText."""
    path = "/".join(module.split(".")) + ".py"
    package = package_of(version)
    if package is not None:
        file = package.parent / path
        return file.read_text("utf-8") if file.is_file() else None
    with zipfile.ZipFile(wheel_of(version)) as wheel:
        return wheel.read(path).decode() if path in wheel.namelist() else None


def diff(target: str, version: str, package: Path, name: str) -> str:
    """Returns a unified diff of one function: in a known version, and in `package` (called `name`).

    Raises NoText where the known version cannot be had.
    """
    module, _, qualname = target.partition(":")
    file = package.parent.joinpath(*module.split(".")).with_suffix(".py")
    before, now = source_of(version, module), file.read_text("utf-8") if file.is_file() else None
    texts = [text_of(source or "", qualname) or "" for source in (before, now)]
    lines = difflib.unified_diff(
        texts[0].splitlines(),
        texts[1].splitlines(),
        f"{qualname} in v{version}",
        f"{qualname} in {name}",
        lineterm="",
        n=CONTEXT,
    )
    return "\n".join(lines)
