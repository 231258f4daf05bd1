"""The short Markdown of a GPU run: attainment by part, what scheduling costs, identity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from sglang_kairos.reports.report import COLUMNS

SHOWN = ("ttft_attainment", "tpot_attainment", "e2e_attainment", "goodput_rps")
SHOWN += ("decode_tokens_per_s", "ttft_p99_ms", "tpot_p99_ms", "failed")


def markdown(data: Mapping[str, Any]) -> str:
    """`data` as in report.json. Means over the rounds, with the lowest and highest where there are
    several."""
    setup = data["setup"]
    lines = [f"{setup['platform']}; shape {setup['shape']}; load {setup['load']:g}", ""]
    for part in dict.fromkeys(run["part"] for run in data["runs"]):
        some = [run for run in data["runs"] if run["part"] == part]
        heads = [COLUMNS[key][0] for key in SHOWN]
        slo = some[0]["slo"]
        lines += [f"### {part}: TTFT {slo['ttft_ms']:g} ms, TPOT {slo['tpot_ms']:.3g} ms", ""]
        heads += ["predicted off %", "scheduler CPU s"]
        lines += ["| system | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
        for system in dict.fromkeys(run["policy"] for run in some):
            rows = [run for run in some if run["policy"] == system]
            cells = [_cell([row[key] for row in rows], *COLUMNS[key][1:]) for key in SHOWN]
            cells.append(_cell([_error(row) for row in rows], 1, 100.0))
            cells.append(_cell([row["scheduler_cpu_s"] for row in rows], 2, 1.0))
            lines.append(f"| {system} | " + " | ".join(cells) + " |")
        lines.append("")
    if setup["steady"]:
        lines += ["### Nothing parked: a decode step at a constant batch", ""]
        lines += ["| system | batch | step ms | scheduler CPU ms per step |", "|---|---|---|---|"]
        keys = [(row["policy"], row["batch"]) for row in setup["steady"]]
        for system, batch in dict.fromkeys(keys):
            rows = [r for r in setup["steady"] if (r["policy"], r["batch"]) == (system, batch)]
            step = _cell([row["step_ms"] for row in rows], 3, 1.0)
            cpu = _cell([row["scheduler_cpu_ms_per_step"] for row in rows], 3, 1.0)
            lines.append(f"| {system} | {batch} | {step} | {cpu} |")
        lines.append("")
    for what, found in setup["identity"].items():
        lines.append(f"- identity, {what}: {found['equal']} of {found['requests']} requests equal")
    lines += [f"- skipped: {part}: {why}" for part, why in setup["skipped"].items()]
    return "\n".join(lines) + "\n"


def _error(run: Mapping[str, Any]) -> float | None:
    """Mean relative error of the predictor that the part is about; the decode side's in a pair."""
    for side in ("decode", "prefill"):
        found = run.get(f"kairos_{side}")
        if found is not None:
            error = found[f"{side}_error"]["mape"]
            return float(error)
    return None


def _cell(values: Sequence[float | None], digits: int, factor: float) -> str:
    known = [value * factor for value in values if value is not None]
    if not known:
        return "–"
    text = f"{mean(known):.{digits}f}"
    if len(known) > 1:
        text += f" ({min(known):.{digits}f}–{max(known):.{digits}f})"
    return text
