"""Decides whether this process needs the CPU runtime, and switches it on.

This runs at the start of every Python process of an environment (see `site`), so it imports only os
and sys. `activate` installs one import hook. `adapt` does the rest when, and only if, one of the
modules in `HOOKED` is imported. `KAIROS_CPU` is auto (default: on where there is no GPU), on or
off.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # as typing's, whose import alone would cost several milliseconds
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

MODE_VARIABLE = "KAIROS_CPU"
MODES = ("auto", "on", "off")

# The modules that `adapt` knows how to change.
HOOKED = frozenset(
    {
        "nixl_cu12._api",
        "nixl_cu13._api",
        "sgl_kernel",
        "sglang",
        "sglang.srt.disaggregation.checksum",
        "sglang.srt.disaggregation.prefill",
        "sglang.srt.entrypoints.engine",
        "torchvision",
    }
)

# Device nodes are numbered, so they are found by the start of their names.
_DEVICE_PREFIXES = ("nvidia", "kfd", "dxg")  # ROCm (kfd) answers to torch.cuda too; dxg: WSL
_CUDA_FILES = (
    "proc/driver/nvidia",
    "usr/lib/x86_64-linux-gnu/libcuda.so.1",
    "usr/lib/aarch64-linux-gnu/libcuda.so.1",
    "usr/lib64/libcuda.so.1",
    "usr/lib/wsl/lib/libcuda.so.1",
)


class Decision:
    """Whether the CPU runtime applies here.

    `reason` is a sentence for people. `refused`: the runtime was asked for and cannot be had.
    """

    __slots__ = ("active", "reason", "refused")

    def __init__(self, active: bool, reason: str, refused: bool = False) -> None:
        self.active = active
        self.reason = reason
        self.refused = refused


def cuda_sign(root: str = "/") -> str | None:
    """Returns a file under `root` that shows a GPU or its driver, without torch; None: no GPU."""
    for name in _CUDA_FILES:
        path = os.path.join(root, name)
        if os.path.exists(path):
            return path
    folder = os.path.join(root, "dev")
    devices = os.listdir(folder) if os.path.isdir(folder) else []
    found = min((name for name in devices if name.startswith(_DEVICE_PREFIXES)), default=None)
    return None if found is None else os.path.join(folder, found)


def cuda_present(root: str = "/") -> bool:
    """Returns whether this machine has a CUDA (or ROCm) device or driver, in well under a millisecond."""
    return cuda_sign(root) is not None


def decide(env: Mapping[str, str] | None = None, root: str = "/") -> Decision:
    """Applies `KAIROS_CPU` to this machine.

    With a GPU the answer is always no: there a stand-in would only hide a broken installation.
    """
    asked = (os.environ if env is None else env).get(MODE_VARIABLE, "").strip().lower() or "auto"
    if asked == "off":
        return Decision(False, f"{MODE_VARIABLE}=off")
    if asked not in MODES:
        reason = f"{MODE_VARIABLE} must be one of {', '.join(MODES)}, got {asked!r}"
        return Decision(False, reason, refused=True)
    sign = cuda_sign(root)
    if sign is not None:
        return Decision(False, f"this machine has a GPU ({sign})", refused=asked == "on")
    if asked == "on":
        return Decision(True, f"{MODE_VARIABLE}=on, and no GPU was found")
    if not sys.platform.startswith("linux"):
        return Decision(False, f"{sys.platform} is not Linux; {MODE_VARIABLE}=on tries it anyway")
    return Decision(True, "no GPU was found")


def should_activate(env: Mapping[str, str] | None = None, root: str = "/") -> bool:
    """Returns `decide` as yes or no; warns on stderr if the runtime was asked for and is refused."""
    decision = decide(env, root)
    if decision.refused:
        print(f"sglang_kairos.cpu: not activated: {decision.reason}", file=sys.stderr)
    return decision.active


def activate() -> None:
    """Installs the import hook. Idempotent; modules imported earlier are changed at once.

    Raises RuntimeError on a machine with a GPU.
    """
    if is_active():
        return
    sign = cuda_sign()
    if sign is not None:
        raise RuntimeError(f"the CPU runtime must not be used on a machine with a GPU ({sign})")
    sys.meta_path.insert(0, ImportHook())
    late = HOOKED.intersection(sys.modules)
    if late:
        from sglang_kairos.cpu import adapt

        adapt.adapt_loaded(late)


def activate_if_wanted() -> None:
    """Activates the runtime where it is wanted. The `.pth` line calls this at interpreter start."""
    if should_activate():
        activate()


def is_active() -> bool:
    """Returns whether `activate` has run in this process."""
    return any(isinstance(finder, ImportHook) for finder in sys.meta_path)


class ImportHook:
    """A meta path finder that hands the modules in `HOOKED` to `adapt` and ignores all others."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns the spec of `name` with our steps around its execution; None if it is not ours."""
        if name not in HOOKED:
            return None
        from sglang_kairos.cpu import adapt

        spec = None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                break
        return adapt.adapted(name, spec)
