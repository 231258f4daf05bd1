"""Collects what must travel to an air-gapped GPU machine, in parts of a bounded size.

    python -m contrib.air_gapped.pack --list   what would be packed; asks nobody
    python -m contrib.air_gapped.pack          fetch, trim, and write out/gpu-parts/

Wheels come from pip's index for the target's Python; they are cached under ``--cache``. Two are
trimmed to what serving a dense model on Hopper needs: SGLang's kernel wheel to its sm90 operators,
xgrammar without its static library. Kairos and the benchmark go along as a source archive.
Unpack and install with `install.py`, which travels in the first part.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from email.parser import BytesHeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TREE = (
    "python",
    "benchmark",
    "contrib",
    "patches",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "NOTICE",
)
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17, 12, 5)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
MOST_MIB = 56.0
# What stays in a wheel, by its name: everything else of these wheels is left behind.
TRIMMED: dict[str, Callable[[str], bool]] = {
    "sglang-kernel": lambda name: (
        not name.endswith(".so")
        or name.endswith(("sm90/common_ops.abi3.so", "spatial_ops.abi3.so"))
    ),
    "xgrammar": lambda name: not name.endswith(".a"),
    "nixl-cu13": lambda name: not name.startswith("nixl_ep"),
}


class PackError(RuntimeError):
    """What must travel cannot be collected; the text says what and why."""


@dataclass(frozen=True)
class WantedWheel:
    """A line of wheels.txt."""

    name: str
    version: str
    group: str


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m contrib.air_gapped.pack", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--list", action="store_true", help="only say what would be packed")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu-parts")
    parser.add_argument("--cache", type=Path, default=ROOT / "out" / "gpu-wheels")
    parser.add_argument("--groups", default="base,transfer", help="of base, transfer")
    parser.add_argument("--python-version", default="3.12", help="of the GPU machine")
    parser.add_argument("--most-mib", type=float, default=MOST_MIB, help="bound on a part's size")
    given = parser.parse_args(argv)
    if not given.most_mib >= 16:
        parser.error(f"--most-mib: must be at least 16, got {given.most_mib:g}")
    try:
        wanted = [one for one in read_wanted() if one.group in given.groups.split(",")]
        if given.list:
            for one in wanted:
                cut = " (trimmed)" if one.name in TRIMMED else ""
                print(f"{one.group:<9} {one.name}=={one.version}{cut}")
            return 0
        wheels = [fetch(one, given) for one in wanted]
        gaps = unmet(wheels, read_present(), given.python_version)
        for gap in gaps:
            print(f"note: {gap}", file=sys.stderr)
        write_parts(wanted, wheels, given)
    except (PackError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def read_wanted(path: Path = HERE / "wheels.txt") -> list[WantedWheel]:
    """The lines of wheels.txt; PackError naming a line that is not name==version group."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"([\w.-]+)==([\w.]+) (base|transfer)", text)
        if match is None:
            raise PackError(f"{path}:{number}: must be NAME==VERSION base|transfer, got {text!r}")
        found.append(WantedWheel(*match.groups()))
    return found


def read_present(path: Path = HERE / "present.txt") -> set[str]:
    """Names of packages that need no packing."""
    lines = (line.split("#")[0] for line in path.read_text(encoding="utf-8").splitlines())
    return {canonicalize_name(name) for line in lines for name in line.split()}


def fetch(one: WantedWheel, given: argparse.Namespace) -> Path:
    """The wheel for the target machine, from the cache or pip; trimmed where TRIMMED says so."""
    given.cache.mkdir(parents=True, exist_ok=True)
    wheel = cached(one, given.cache)
    if wheel is None:
        print(f"fetching {one.name}=={one.version}", flush=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-input"]
        command += ["--only-binary=:all:", "--implementation", "cp"]
        command += ["--python-version", given.python_version, "-d", str(given.cache)]
        command += [word for name in PLATFORMS for word in ("--platform", name)]
        done = subprocess.run(
            [*command, f"{one.name}=={one.version}"], capture_output=True, text=True, check=False
        )
        wheel = cached(one, given.cache)
        if done.returncode or wheel is None:
            last = [line for line in done.stderr.splitlines() if line.startswith("ERROR")][-1:]
            raise PackError(f"pip has no {one.name}=={one.version}: {''.join(last)[:300]}")
    keep = TRIMMED.get(one.name)
    if keep is None:
        return wheel
    smaller = given.cache / "trimmed" / wheel.name
    if not smaller.exists():
        smaller.parent.mkdir(exist_ok=True)
        trim(wheel, smaller, keep)
    return smaller


def cached(one: WantedWheel, cache: Path) -> Path | None:
    """Its wheel in the cache folder."""
    name, version = canonicalize_name(one.name), one.version
    for path in cache.glob("*.whl"):
        parts = path.name.split("-")
        if canonicalize_name(parts[0]) == name and parts[1] == version:
            return path
    return None


def trim(wheel: Path, smaller: Path, keep: Callable[[str], bool]) -> None:
    """Copies a wheel without the files that `keep` refuses, nor their lines in RECORD."""
    partial = smaller.with_suffix(".partial")
    with (
        zipfile.ZipFile(wheel) as source,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as target,
    ):
        for item in source.infolist():
            if not keep(item.filename):
                continue
            data = source.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                lines = data.decode().splitlines(keepends=True)
                data = "".join(line for line in lines if keep(line.split(",")[0])).encode()
            target.writestr(item, data, compress_type=zipfile.ZIP_DEFLATED, compresslevel=9)
    partial.replace(smaller)


def unmet(wheels: Iterable[Path], present: set[str], python_version: str) -> list[str]:
    """What the wheels require and neither they nor `present` provide, in words.

    Versions are compared among the wheels; those of `present` are not known here.
    """
    wheels = list(wheels)
    packed = {canonicalize_name(w.name.split("-")[0]): w.name.split("-")[1] for w in wheels}
    machine = {
        "python_version": python_version,
        "python_full_version": python_version + ".0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
        "os_name": "posix",
        "extra": "",
    }
    missing = set()
    for wheel in wheels:
        for text in requirements(wheel):
            need = Requirement(text)
            if need.marker is not None and not need.marker.evaluate(machine):
                continue
            name, user = canonicalize_name(need.name), wheel.name.split("-")[0]
            if name not in packed and name not in present:
                missing.add(f"{user} needs {name}: neither in wheels.txt nor in present.txt")
            elif name in packed and not need.specifier.contains(packed[name], prereleases=True):
                missing.add(f"{user} needs {name}{need.specifier}, packed is {packed[name]}")
    return sorted(missing)


def requirements(wheel: Path) -> list[str]:
    """Its Requires-Dist lines."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return BytesHeaderParser().parsebytes(archive.read(name)).get_all("Requires-Dist") or []


def write_parts(
    wanted: Sequence[WantedWheel], wheels: Sequence[Path], given: argparse.Namespace
) -> None:
    """Archives of wheels, the tree in the first, each below the bound; manifest and checksums."""
    given.out.mkdir(parents=True, exist_ok=True)
    for old in [*given.out.glob("part*.tar"), *given.out.glob("manifest.json")]:
        old.unlink()
    tree = given.out / "kairos-tree.tar.gz"
    pack_tree(tree)
    most = int(given.most_mib * 2**20)
    parts = []
    for group in dict.fromkeys(one.group for one in wanted):
        sizes = {
            wheel: wheel.stat().st_size
            for one, wheel in zip(wanted, wheels, strict=True)
            if one.group == group
        }
        if group == "base":
            sizes[tree] = tree.stat().st_size
        for files in filled(sizes, most - 2**20):
            path = given.out / f"part{len(parts) + 1}-{group}.tar"
            with tarfile.open(path, "w") as archive:
                for file in (*files, *([HERE / "install.py"] if not parts else [])):
                    archive.add(file, arcname=file.name)
            parts.append(
                {
                    "file": path.name,
                    "group": group,
                    "bytes": path.stat().st_size,
                    "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                    "contents": sorted(file.name for file in files),
                }
            )
            print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, {len(files)} files")
    tree.unlink()
    manifest = {"python": given.python_version, "parts": parts}
    text = json.dumps(manifest, indent=1) + "\n"
    (given.out / "manifest.json").write_text(text, encoding="utf-8")


def filled(sizes: Mapping[Path, int], most: int) -> list[list[Path]]:
    """Files into as few bins as first-fit decreasing finds; PackError for one that is too large."""
    bins: list[tuple[int, list[Path]]] = []
    for file in sorted(sizes, key=lambda file: -sizes[file]):
        size = sizes[file] + 2048  # a tar header and its padding
        if size > most:
            raise PackError(f"{file.name}: {size / 2**20:.1f} MiB do not fit a part; --most-mib")
        for index, (used, files) in enumerate(bins):
            if used + size <= most:
                bins[index] = (used + size, [*files, file])
                break
        else:
            bins.append((size, [file]))
    return [files for _, files in bins]


def pack_tree(path: Path) -> None:
    """The sources that run there; no caches, no outputs."""

    def clean(item: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if "__pycache__" in item.name or item.name.endswith(".egg-info") else item

    with tarfile.open(path, "w:gz") as archive:
        for name in TREE:
            archive.add(ROOT / name, arcname=name, filter=clean)


if __name__ == "__main__":
    sys.exit(main())
