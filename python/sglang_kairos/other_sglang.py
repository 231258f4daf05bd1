"""Other SGLangs than the installed one: each in a folder that goes first on the Python path.

    kairos sglang 0.5.19

puts one beside the installed one: ``.venv/sglang-0.5.19``, with what that version does not share with
the rest of the environment. Setting ``PYTHONPATH`` to that folder is all there is to it: every process
then imports that SGLang, and Kairos recognises it. ``pip install --no-deps --target FOLDER`` makes one
as well.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from sglang_kairos.commands import parser_of
from sglang_kairos.versions import patch

# What runs beside the packages of requirements/constraints-cpu.txt, though it pins others, needs
# nothing here. These register model names that the locked transformers has itself.
_OLD_TRANSFORMERS = ("transformers==5.12.1", "tokenizers==0.22.2")
NEEDS: Mapping[str, tuple[str, ...]] = dict.fromkeys(
    ("0.5.16", "0.5.17", "0.5.18", "0.5.19"), _OLD_TRANSFORMERS
)


class NoSuchSglang(Exception):
    """Neither a folder with an SGLang in it nor a version that is there; the message is for users."""


def folder_of(where: str, prefix: Path | None = None) -> Path:
    """The folder that `where` means: a path, or the version of one in the environment `prefix`.

    Raises NoSuchSglang, naming the versions that are there.
    """
    prefix = Path(sys.prefix) if prefix is None else prefix
    version = where.removeprefix("v")
    named = prefix / f"sglang-{version}"
    for folder in (Path(where), named):
        if (folder / "sglang" / "__init__.py").is_file():
            return folder.resolve()
    there = sorted(p.name.removeprefix("sglang-") for p in prefix.glob("sglang-*") if p.is_dir())
    known = f"versions beside the installed one: {', '.join(there) or 'none'}"
    raise NoSuchSglang(
        f"--sglang {where}: no folder with an SGLang in it, and {named} is not there; {known} "
        f"(`kairos sglang {version}` installs one)"
    )


def importable_version() -> str:
    """The version of the SGLang that this Python would import; empty if it does not say.

    The one that comes first on the path counts, not the one that pip installed last: a patched copy
    has no metadata of its own. Raises NoSuchSglang.
    """
    try:
        return patch.find_tree().version or ""
    except patch.PatchError as error:
        raise NoSuchSglang(str(error)) from None


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


def fetch(version: str, prefix: Path | None = None) -> Path:
    """The folder of that version in the environment `prefix`, installed if it is not there yet.

    What several versions need alike lies once, in ``beside/``, and is linked to. Raises NoSuchSglang
    where pip cannot get it.
    """
    prefix = Path(sys.prefix) if prefix is None else prefix
    version = version.removeprefix("v")
    folder = prefix / f"sglang-{version}"
    if (folder / "sglang" / "__init__.py").is_file():
        return folder
    needs = NEEDS.get(version, ())
    shared = prefix / "beside" / "-".join(needs).replace("==", "-") if needs else None
    if shared is not None and not shared.is_dir():
        _install(needs, shared)
    _install([f"sglang=={version}"], folder, shared)
    return folder


def _install(packages: Sequence[str], folder: Path, shared: Path | None = None) -> None:
    """Whole or not at all: pip works in a folder of its own, which then gets its name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as made:
        target = Path(made) / "packages"
        # Byte code is written as modules are first imported: of most files that is never.
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile"]
        command += ["--disable-pip-version-check", "--target", str(target), *packages]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            said = [line for line in run.stderr.splitlines() if line.startswith("ERROR")]
            raise NoSuchSglang(
                f"pip cannot install {' '.join(packages)}: {said[-1] if said else run.stderr[-300:]}"
            )
        if shared is not None:
            for name in sorted(entry.name for entry in shared.iterdir() if entry.name != "bin"):
                (target / name).symlink_to(Path("..", "beside", shared.name, name))
        shutil.rmtree(folder, ignore_errors=True)
        target.rename(folder)


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``kairos sglang``."""
    parser = parser_of("sglang")
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="such as 0.5.19")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Install each version named. Returns 0, or 1 where a version cannot be had."""
    try:
        for version in build_parser().parse_args(argv).versions:
            print(f"SGLang {version}: {fetch(version)}")
    except NoSuchSglang as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
