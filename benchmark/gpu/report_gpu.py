"""The short Markdown of a GPU run: attainment by part, what scheduling costs, identity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmark.harness import page
from sglang_kairos.reports.report import COLUMNS

SHOWN = ("ttft_attainment", "tpot_attainment", "e2e_attainment", "goodput_rps")
SHOWN += ("decode_tokens_per_s", "ttft_p99_ms", "tpot_p99_ms", "failed")


def markdown(data: Mapping[str, Any]) -> str:
    """Returns means over the rounds, with the lowest and highest where there are several.

    `data`: as in report.json."""
    setup = data["setup"]
    lines = [f"{setup['platform']}; shape {setup['shape']}; load {setup['load']:g}", ""]
    heads = ["system", *(COLUMNS[key][0] for key in SHOWN), "predicted off %", "scheduler CPU s"]
    for part, some in _grouped(data["runs"], "part").items():
        slo = some[0]["slo"]
        lines += [f"### {part}: TTFT {slo['ttft_ms']:g} ms, TPOT {slo['tpot_ms']:.3g} ms", ""]
        table = []
        for system, rows in _grouped(some, "policy").items():
            cells = [_cell([row[key] for row in rows], *COLUMNS[key][1:]) for key in SHOWN]
            cells.append(_cell([_error(row) for row in rows], 1, 100.0))
            cells.append(_cell([row["scheduler_cpu_s"] for row in rows], 2, 1.0))
            table.append([system, *cells])
        lines += [page.table(heads, table), ""]
    if setup["steady"]:
        lines += ["### Nothing parked: a decode step at a constant batch", ""]
        keys = ("step_ms", "scheduler_cpu_ms_per_step")
        table = [
            [system, str(batch), *(_cell([row[key] for row in rows], 3, 1.0) for key in keys)]
            for system, of_system in _grouped(setup["steady"], "policy").items()
            for batch, rows in _grouped(of_system, "batch").items()
        ]
        lines.append(page.table(("system", "batch", "step ms", "scheduler CPU ms per step"), table))
        lines.append("")
    for what, found in setup["identity"].items():
        lines.append(f"- identity, {what}: {found['equal']} of {found['requests']} requests equal")
    lines += [f"- skipped: {part}: {why}" for part, why in setup["skipped"].items()]
    return "\n".join(lines) + "\n"


def _grouped(rows: Sequence[Mapping[str, Any]], key: str) -> dict[Any, list[Mapping[str, Any]]]:
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def _error(run: Mapping[str, Any]) -> float | None:
    """Mean relative error of the predictor that the part is about; the decode side's in a pair."""
    for side in ("decode", "prefill"):
        if f"kairos_{side}" in run:
            return float(run[f"kairos_{side}"][f"{side}_error"]["mape"])
    return None


def _cell(values: Sequence[float | None], digits: int, factor: float) -> str:
    known = [value * factor for value in values if value is not None]
    return page.spread(known, digits) if known else "–"
