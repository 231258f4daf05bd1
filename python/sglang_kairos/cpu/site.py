"""Switches the CPU runtime on for every Python process of an environment.

SGLang's schedulers, detokenizers and workers are processes of their own, started by several
launchers. All of them run ``site``, which executes the ``import`` line of each ``.pth`` file in
site-packages.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

from sglang_kairos.cpu import runtime

PTH_NAME = "kairos_cpu.pth"

# A `.pth` line runs only if it starts with "import". If the package was removed, interpreters must
# start without a complaint; any other error must show.
PTH_LINE = (
    "import sys; exec("
    '"try:\\n import sglang_kairos.cpu.runtime as r\\nexcept ImportError:\\n pass\\n'
    'else:\\n r.activate_if_wanted()")\n'
)


def site_packages() -> Path:
    """Returns the site-packages folder of the running environment."""
    return Path(sysconfig.get_path("purelib"))


def install(folder: Path | None = None) -> Path:
    """Writes the `.pth` file into `folder` (this environment's site-packages). Returns its path."""
    path = (folder or site_packages()) / PTH_NAME
    path.write_text(PTH_LINE, encoding="utf-8")
    return path


def uninstall(folder: Path | None = None) -> bool:
    """Removes the `.pth` file. Returns False if there was none."""
    path = (folder or site_packages()) / PTH_NAME
    existed = path.exists()
    path.unlink(missing_ok=True)
    return existed


def status(folder: Path | None = None) -> str:
    """Returns what is active and why, in sentences for people."""
    path = (folder or site_packages()) / PTH_NAME
    decision = runtime.decide()
    if not path.exists():
        installed = f"not installed: {path} does not exist, so processes start without it"
    elif path.read_text(encoding="utf-8") != PTH_LINE:
        installed = f"installed by another version: {path} differs; run install again"
    else:
        installed = f"installed: {path}"
    wanted = "wanted" if decision.active else "not wanted"
    here = "active" if runtime.is_active() else "not active"
    return "\n".join(
        (
            f"start-up hook  {installed}",
            f"this machine   {wanted}: {decision.reason}",
            f"this process   {here}",
        )
    )
