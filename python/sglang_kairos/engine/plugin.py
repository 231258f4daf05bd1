"""Entry point of SGLang's plugin framework: `install` runs early in every SGLang process.

SGLang logs and swallows whatever a plugin raises. Kairos must not serve half-installed, so every
failure here becomes `SystemExit`, which SGLang lets through.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Callable, Iterable
from typing import Any

from sglang_kairos.config import ConfigError, KairosConfig
from sglang_kairos.engine.fingerprints import known_texts
from sglang_kairos.engine.installed import INSTALLED, MISSING, VOUCHED_FOR, active_config
from sglang_kairos.engine.judge import Judge
from sglang_kairos.engine.on_import import when_imported
from sglang_kairos.engine.seams import losses
from sglang_kairos.engine.seams.table import Seam
from sglang_kairos.engine.survey import Survey, package_folder, survey, way_out

logger = logging.getLogger(__name__)

HTTP_MODULE = "sglang.srt.entrypoints.http_server"
SCHEDULER_MODULE = "sglang.srt.managers.scheduler"
MOONCAKE_MODULE = "sglang.srt.disaggregation.mooncake.conn"
DYNAMO_MODULE = "dynamo.sglang.init_llm"  # its workers have it before they make an engine


def installed_sglang() -> str:
    """Returns the version of the SGLang distribution, or a phrase if there is none."""
    try:
        return f"v{importlib.metadata.version('sglang')}"
    except importlib.metadata.PackageNotFoundError:
        return "a source tree without a version"


def install() -> None:
    """Wraps the seams that matter in this process. ``sglang.srt.plugins.load_plugins`` calls it."""
    try:
        config = active_config()
        config.slo_table()
        if config.enabled:
            known_texts.vouched()
    except (ConfigError, known_texts.TableError) as error:
        raise SystemExit(f"Kairos refuses to start: {error}") from None
    if not config.enabled:
        return
    found = survey()
    if found.problems and config.strict == "on":
        raise SystemExit(way_out(found.problems, installed_sglang()))
    kept = _kept(found)
    VOUCHED_FOR[:] = found.vouched_for
    if VOUCHED_FOR:
        named = f"{known_texts.VOUCHED_FOR}={os.environ.get(known_texts.VOUCHED_FOR)}"
        logger.warning("Kairos: texts vouched for by %s: %s", named, ", ".join(VOUCHED_FOR))
    # In the main process none of these modules is there yet. It needs the scheduler's seams only to
    # hand them to forked children; spawned ones come through here with their module loaded.
    # Mooncake's module is wrapped when SGLang imports it. It is not installed everywhere, and an
    # early import would make prometheus-client miss that there are several processes.
    modules = {"scheduler": SCHEDULER_MODULE, "http": HTTP_MODULE, "mooncake": MOONCAKE_MODULE}
    for process, module in modules.items():
        seams = [seam for seam in kept if seam.process == process]
        when_imported(module, functools.partial(_wrap, seams))
    when_imported(DYNAMO_MODULE, functools.partial(_into_dynamo, config))


def _into_dynamo(config: KairosConfig) -> None:
    from sglang_kairos.engine import dynamo

    dynamo.install(config)


def _kept(found: Survey) -> list[Seam]:
    """Returns the seams to install; notes in `MISSING` what is lost with the others."""
    MISSING.clear()
    wanted = [finding.seam for finding in found.findings]
    if not found.problems:
        return wanted
    unknown = {seam.qualname for seam in wanted} - {seam.qualname for seam in found.usable}
    reasons = list(found.problems)
    # This SGLang as a whole is unknown, so known functions may rely on others that have changed.
    package = package_folder()
    for verdict in Judge(package, found.version).verdicts() if package else ():
        if verdict.kind == "person" and verdict.seam in found.usable:
            unknown.add(verdict.seam.qualname)
            reasons.append(f"{verdict.seam.target}: {'; '.join(verdict.reasons)}")
    MISSING.update(losses.missing((seam.qualname for seam in wanted), unknown))
    if losses.START in MISSING:
        raise SystemExit(way_out(reasons, installed_sglang()))
    for reason in reasons:
        logger.warning("Kairos runs without a seam (--kairos-strict seam): %s", reason)
    for name, lost in MISSING.items():
        logger.warning("Kairos: lost without %s: %s", name, lost)
    return [seam for seam in wanted if seam.qualname not in MISSING]


def _resolve(path: str) -> Any:
    module, _, qualname = path.partition(":")
    found: Any = importlib.import_module(module)
    for name in qualname.split("."):
        found = getattr(found, name)
    return found


def _tree_seams() -> Any:
    """Returns ``sglang.srt.kairos_seams`` of a patched tree, or None on a stock wheel."""
    if importlib.util.find_spec("sglang.srt.kairos_seams") is None:
        return None
    return importlib.import_module("sglang.srt.kairos_seams")


def _wrap(seams: Iterable[Seam]) -> None:
    """Installs handlers: in a patched tree's own seams where it announces them, else by hooks."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    tree = _tree_seams()
    stock: dict[str, Any] = {}
    for seam in seams:
        handler: Callable[..., Any] = _resolve(seam.handler)
        function = _resolve(seam.target)
        # A tree's seams announce themselves when their module is imported, which has happened.
        if tree is not None and seam.target in tree.PATCHED:
            tree.install(seam.target, handler)
            INSTALLED["tree"] += 1
        else:
            stock[seam.target] = function
            HookRegistry.register(seam.target.replace(":", "."), handler, HookType.AROUND)
    HookRegistry.apply_hooks()
    missing = [
        f"{target}: SGLang's hook registry did not wrap it"
        for target, function in stock.items()
        if _resolve(target) is function
    ]
    if missing:
        raise SystemExit(way_out(missing, installed_sglang()))
    INSTALLED["hooks"] += len(stock)
