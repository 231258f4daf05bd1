"""Changes the few modules that stop stock SGLang from running without a GPU.

This is what is done when one of them is imported:

    sglang                              `ENV_DEFAULTS` are set before its first line runs
    sgl_kernel                          `sgl_kernel_standin` takes its place: wheels need CUDA
    torchvision                         operator schemas of its CUDA extension are declared
    sglang.srt.disaggregation.prefill   its `torch` gets portable events, pageable host buffers
    sglang.srt.entrypoints.engine       with ``KAIROS_CPU_START=fork`` its children are forked
    sglang.srt.disaggregation.checksum  zlib makes KV checksums instead of a CUDA kernel
    nixl_cu13._api, nixl_cu12._api      memory that is called a GPU's is treated as the host's

Each step looks first whether it is needed. A source tree patched to be portable, or a CPU build of
a package, is left as it is.
"""

from __future__ import annotations

import functools
import glob
import os
import sys
from collections.abc import Callable, Iterable, MutableMapping
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

ENV_DEFAULTS = {
    "SGLANG_USE_CPU_ENGINE": "1",
    # Mooncake picks RDMA unless told; a machine without a GPU rarely has it.
    "MOONCAKE_PROTOCOL": "tcp",
    "MC_FORCE_TCP": "1",
    # Several servers usually share the cores; one thread each keeps them from fighting.
    "OMP_NUM_THREADS": "1",
    # The first request with, say, a logit bias would stop the scheduler for a quarter of a minute.
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}

# Forked children start at once: they inherit the imports, which cost about 10 s of CPU each.
# SGLang spawns them because of CUDA contexts, which do not exist here.
START_VARIABLE = "KAIROS_CPU_START"


def set_env_defaults(env: MutableMapping[str, str] | None = None) -> None:
    """Sets the variables of `ENV_DEFAULTS` that are not set yet."""
    for name, value in ENV_DEFAULTS.items():
        (os.environ if env is None else env).setdefault(name, value)


def adapted(name: str, spec: ModuleSpec | None) -> ModuleSpec | None:
    """Returns the spec to import `name` with. `spec`: the one found without this package."""
    if name == "sgl_kernel":
        return spec if _built_for_cpu(spec) else _standin_spec()
    if spec is not None and spec.loader is not None:
        _wrap_exec(spec.loader, _BEFORE.get(name), _AFTER.get(name))
    return spec


def adapt_loaded(names: Iterable[str]) -> None:
    """Changes modules that are imported already, as far as that is still possible."""
    for name in names:
        if name == "sglang":
            set_env_defaults()
        if after := _AFTER.get(name):
            after(sys.modules[name])


def _wrap_exec(
    loader: Any,
    before: Callable[[], None] | None,
    after: Callable[[ModuleType], None] | None,
) -> None:
    """Runs `before` and `after` around this loader's `exec_module`.

    The loader is changed, not replaced: `inspect`, `linecache` and `importlib.resources` ask it
    for source and data.
    """
    exec_module = loader.exec_module

    def exec_once(module: ModuleType) -> None:
        loader.exec_module = exec_module
        if before is not None:
            before()
        exec_module(module)
        if after is not None:
            after(module)

    loader.exec_module = exec_once


def _built_for_cpu(spec: ModuleSpec | None) -> bool:
    """Returns whether an installed `sgl_kernel` is a CPU build: CUDA wheels carry ``sm*`` folders."""
    if spec is None or spec.origin is None:
        return False
    return not glob.glob(os.path.join(glob.escape(os.path.dirname(spec.origin)), "sm[0-9]*"))


def _standin_spec() -> ModuleSpec:
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sgl_kernel_standin.py")
    spec = ModuleSpec("sgl_kernel", SourceFileLoader("sgl_kernel", path), origin=path)
    spec.has_location = True
    return spec


def _declare_torchvision_ops() -> None:
    """Declares the schemas for which torchvision registers fake kernels when it is imported.

    The wheels on the package index are built for CUDA. Their extension does not load here, and
    without these two names the import fails. An extension that loads brings the names itself.
    """
    import torch

    spec = PathFinder.find_spec("torchvision")
    folder = os.path.dirname(spec.origin) if spec is not None and spec.origin else ""
    for extension in glob.glob(os.path.join(glob.escape(folder), "_C*.so")):
        try:
            torch.ops.load_library(extension)
        except OSError:
            continue
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    # Definitions are withdrawn when their Library is collected.
    _keep_alive.append(library)


def _make_events_portable(module: ModuleType) -> None:
    """Gives `module` a `torch` whose CUDA events and pinned buffers work without CUDA."""
    torch = getattr(module, "torch", None)
    if torch is None or isinstance(torch, _Overlay) or torch.cuda.is_available():
        return

    def empty(*size: Any, pin_memory: bool = False, **options: Any) -> Any:
        """`torch.empty`, pageable: no device reads it while it is being filled."""
        return torch.empty(*size, **options)

    # A forward pass on a CPU is over when its call returns: there is nothing to wait for.
    cuda = _Overlay(torch.cuda, Event=torch.cpu.Event, current_stream=torch.cpu.current_stream)
    module.__dict__["torch"] = _Overlay(torch, cuda=cuda, empty=empty)


def _fork_children(module: ModuleType) -> None:
    """Makes `module` fork its processes, if `KAIROS_CPU_START` says so."""
    if os.environ.get(START_VARIABLE, "").strip().lower() != "fork":
        return
    multiprocessing = getattr(module, "mp", None)
    if multiprocessing is None or isinstance(multiprocessing, _Overlay):
        return

    def set_start_method(method: str | None, force: bool = False) -> None:
        multiprocessing.set_start_method("fork", force=force)

    module.__dict__["mp"] = _Overlay(multiprocessing, set_start_method=set_start_method)


def _checksum_on_host(module: ModuleType) -> None:
    """Gives `module` a KV checksum that needs no CUDA kernel, of the same bytes in the same order."""
    import torch

    from sglang_kairos.cpu import checksum

    computer = getattr(module, "KvChecksumComputer", None)
    if computer is None or torch.cuda.is_available():
        return
    computer.compute = checksum.compute


def _host_memory_only(module: ModuleType) -> None:
    """Makes NIXL treat memory named ``VRAM`` as the host's, which all memory is here.

    SGLang names every pool so, and UCX refuses host memory under that name.
    """
    agent = getattr(module, "nixl_agent", None)
    if agent is None:
        return
    init = agent.__init__

    @functools.wraps(init)
    def named_alike(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.nixl_mems = {**self.nixl_mems, "VRAM": self.nixl_mems["DRAM"]}

    agent.__init__ = named_alike


class _Overlay(ModuleType):
    """A module that answers for another one, except for the names given."""

    def __init__(self, base: ModuleType, **names: Any) -> None:
        super().__init__(base.__name__, base.__doc__)
        self.__dict__.update(names, _base=base)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_base"], name)


_keep_alive: list[Any] = []
_BEFORE: dict[str, Callable[[], None]] = {
    "sglang": set_env_defaults,
    "torchvision": _declare_torchvision_ops,
}
_AFTER: dict[str, Callable[[ModuleType], None]] = {
    "sglang.srt.disaggregation.prefill": _make_events_portable,
    "sglang.srt.entrypoints.engine": _fork_children,
    "sglang.srt.disaggregation.checksum": _checksum_on_host,
    **dict.fromkeys(("nixl_cu13._api", "nixl_cu12._api"), _host_memory_only),
}
