"""Unpacks and installs what `pack.py` packed, without a network. Standard library only.

    python3 install.py PARTS_FOLDER INTO

Checks each part against manifest.json and unpacks it into INTO/wheels. Parts may come one at a
time. Once those of the group `base` are all there, pip installs them into INTO/site and INTO/env.sh
sets the paths. Sources run from the checkout that this file is in; without one, from the
packed tree, in INTO/tree. Nothing outside INTO is touched. Run again, it does what is left.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

# An entry point is found by its metadata; the code itself is imported from the tree.
METADATA = "Metadata-Version: 2.1\nName: sglang-kairos\nVersion: 0.1.0\n"
ENTRY_POINTS = "[sglang.srt.plugins]\nkairos = sglang_kairos.engine.plugin:install\n"


def main() -> int:
    """Returns 0 when something useful was done, 1 with a message when a part is damaged."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("parts", type=Path, help="folder with manifest.json and some parts")
    parser.add_argument("into", type=Path, help="folder to install into, outside the tree")
    parser.add_argument(
        "--tree", type=Path, help="run from this checkout (default: the one this is in)"
    )
    parser.add_argument("--no-pip", action="store_true", help="unzip the wheels instead of pip")
    given = parser.parse_args()
    try:
        manifest = json.loads((given.parts / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        print(f"error: {given.parts}/manifest.json: {error}", file=sys.stderr)
        return 1
    wheels = given.into / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    for part in manifest["parts"]:
        path = given.parts / part["file"]
        if not path.exists():
            continue
        if hashlib.sha256(path.read_bytes()).hexdigest() != part["sha256"]:
            print(f"error: {path}: damaged on the way: carry it again", file=sys.stderr)
            return 1
        with tarfile.open(path) as archive:
            archive.extractall(wheels, filter="data")
        print(f"unpacked {part['file']}", flush=True)
    missing = [part for part in manifest["parts"] if not complete(part, wheels)]
    for part in missing:
        print(f"not here yet: {part['file']} ({part['group']})")
    if any(part["group"] == "base" for part in missing):
        print("carry the rest of the base parts, then run this again")
        return 0
    install(manifest, wheels, given)
    return 0


def complete(part: dict[str, Any], wheels: Path) -> bool:
    """Whether everything of a part is unpacked."""
    return all((wheels / name).exists() for name in part["contents"])


def install(manifest: dict[str, Any], wheels: Path, given: argparse.Namespace) -> None:
    """The wheels that are there and not installed yet, the tree, and env.sh."""
    site, tree = given.into / "site", given.into / "tree"
    site.mkdir(exist_ok=True)
    record = given.into / "installed.json"
    done = json.loads(record.read_text()) if record.exists() else []
    fresh = [wheel for wheel in sorted(wheels.glob("*.whl")) if wheel.name not in done]
    if fresh and not given.no_pip:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
        command += ["--no-compile", "--no-cache-dir", "--upgrade", "--target", str(site)]
        subprocess.run([*command, *map(str, fresh)], check=True)
    elif fresh:
        for wheel in fresh:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
    record.write_text(json.dumps([*done, *(wheel.name for wheel in fresh)]))
    around = given.tree or Path(__file__).resolve().parent.parent.parent
    if (around / "python" / "sglang_kairos").is_dir():
        tree = around
    elif (wheels / "kairos-tree.tar.gz").exists():
        with tarfile.open(wheels / "kairos-tree.tar.gz") as archive:
            archive.extractall(tree, filter="data")
    info = site / "sglang_kairos-0.1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    cache = given.into.resolve() / "cache"
    site, tree = site.resolve(), tree.resolve()
    (given.into / "env.sh").write_text(
        f'cd "{tree}"\n'
        f'export PYTHONPATH="{tree}/python:{tree}:{site}"\n'
        f'export FLASHINFER_WORKSPACE_BASE="{cache}" TVM_FFI_CACHE_DIR="{cache}/tvm"\n'
        f'export TRITON_CACHE_DIR="{cache}/triton" XDG_CACHE_HOME="{cache}"\n'
        "export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false\n"
    )
    print(f"installed {len(fresh)} wheels; now: . {given.into}/env.sh")


if __name__ == "__main__":
    sys.exit(main())
