"""Reports on runs: a text table, JSON, a picture. It also reads other load generators' files."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from sglang_kairos.commands import parser_of
from sglang_kairos.loads.replay import Outcome, Result, is_dump, load
from sglang_kairos.reports.formats import Reading, known_tools, read_results
from sglang_kairos.reports.outcomes import Targets

# Heading, digits after the point, factor from the metric's unit to the shown one.
COLUMNS: dict[str, tuple[str, int, float]] = {
    "ttft_attainment": ("TTFT met %", 1, 100.0),
    "tpot_attainment": ("TPOT met %", 1, 100.0),
    "e2e_attainment": ("both met %", 1, 100.0),
    "goodput_rps": ("goodput req/s", 2, 1.0),
    "decode_tokens_per_s": ("tokens/s", 0, 1.0),
    "ttft_p50_ms": ("TTFT p50 s", 2, 1e-3),
    "ttft_p99_ms": ("TTFT p99 s", 2, 1e-3),
    "tpot_p99_ms": ("TPOT p99 ms", 0, 1.0),
    "longest_wait_ms": ("longest wait s", 1, 1e-3),
    "sent": ("sent", 0, 1.0),
    "failed": ("failed", 0, 1.0),
}
ATTAINMENTS = ("ttft_attainment", "tpot_attainment", "e2e_attainment")


@dataclass(frozen=True)
class Run:
    """One run of one policy."""

    policy: str
    result: Result
    facts: Mapping[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """Returns the JSON object of this run: its policy, its `Metrics`, and what else was measured."""
        return {"policy": self.policy, **asdict(self.result.metrics), **self.facts}


def by_policy(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Returns the runs grouped by policy, in order of first appearance."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.policy, []).append(run)
    return groups


def table(runs: Sequence[Run], title: str = "") -> str:
    """Returns one line per policy; with repeats the mean and, below it, the lowest and highest."""
    header = ["policy", *(heading for heading, _, _ in COLUMNS.values())]
    lines: list[list[str]] = []
    for policy, group in by_policy(runs).items():
        rows = [run.row() for run in group]
        name = policy if len(rows) == 1 else f"{policy} (mean of {len(rows)})"
        lines.append([name, *(_cell(rows, key, mean) for key in COLUMNS)])
        if len(rows) > 1:
            lines.append(["  lowest", *(_cell(rows, key, min) for key in COLUMNS)])
            lines.append(["  highest", *(_cell(rows, key, max) for key in COLUMNS)])
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]

    def laid_out(line: list[str]) -> str:
        first = line[0].ljust(widths[0])
        return "  ".join([first, *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    body = [laid_out(header), rule, *map(laid_out, lines)]
    return "\n".join([title, *body] if title else body)


def _cell(rows: Sequence[Mapping[str, Any]], key: str, reduce: Any) -> str:
    _, digits, factor = COLUMNS[key]
    values = [row[key] for row in rows if row[key] is not None]
    return f"{reduce(values) * factor:.{digits}f}" if values else "-"


def write_json(path: Path, runs: Sequence[Run], setup: Mapping[str, Any] | None = None) -> None:
    """Writes ``{"runs": [...]}``, with the setup of the runs under ``setup``."""
    report: dict[str, Any] = {"runs": [run.row() for run in runs]}
    if setup:
        report["setup"] = dict(setup)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def write_png(path: Path, runs: Sequence[Run], title: str) -> None:
    """Draws attainment per policy, the TTFT distributions, and mean waits by prompt length."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    groups = by_policy(runs)
    colours = dict(zip(groups, colours_of(list(groups)), strict=True))
    figure, (bars, curves, payers) = plt.subplots(1, 3, figsize=(17, 5.2), layout="constrained")
    figure.suptitle(title + "\n", fontsize=12)
    _draw_attainment(bars, groups, colours)
    draw_ttft(curves, groups, colours)
    draw_payers(payers, groups, colours)
    for axes in (bars, curves, payers):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    handles, labels = bars.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(groups), frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def colours_of(policies: list[str]) -> list[str]:
    """Returns one colour per policy: greys, and red for kairos."""
    greys = iter(("#9aa5b1", "#6f8fb5", "#c2a15f", "#8a7fb0", "#7fae9b", "#b08f8f") * 4)
    return ["#d1495b" if policy == "kairos" else next(greys) for policy in policies]


def _draw_attainment(axes: Any, groups: Mapping[str, list[Run]], colours: dict[str, str]) -> None:
    width = 0.82 / len(groups)
    for place, (policy, group) in enumerate(groups.items()):
        rows = [run.row() for run in group]
        heights = [100 * mean(row[key] for row in rows) for key in ATTAINMENTS]
        at = np.arange(len(ATTAINMENTS)) - 0.41 + width * (place + 0.5)
        drawn = axes.bar(at, heights, width * 0.94, color=colours[policy], label=policy)
        axes.bar_label(drawn, fmt="%.0f", padding=2, fontsize=9)
        if len(rows) > 1:
            lows = [100 * min(row[key] for row in rows) for key in ATTAINMENTS]
            highs = [100 * max(row[key] for row in rows) for key in ATTAINMENTS]
            axes.vlines(at, lows, highs, color="#333333", linewidth=1.2)
    axes.set_xticks(range(len(ATTAINMENTS)), ["TTFT", "TPOT", "both"])
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("requests that met their target, % of sent")
    axes.set_title("SLO attainment")
    axes.grid(axis="y", alpha=0.3)


def draw_ttft(axes: Any, groups: Mapping[str, list[Run]], colours: dict[str, str]) -> None:
    """Draws the share of requests answered within each TTFT, over all runs of a policy."""
    targets = {o.ttft_slo_ms for group in groups.values() for run in group for o in _all(run)}
    for policy, group in groups.items():
        outcomes = [outcome for run in group for outcome in _all(run)]
        ttfts = np.sort([outcome.ttft_ms / 1e3 for outcome in outcomes if outcome.ok])
        share = 100 * np.arange(1, len(ttfts) + 1) / max(1, len(outcomes))
        axes.step(ttfts, share, where="post", color=colours[policy], label=policy, linewidth=1.8)
    if len(targets) == 1:
        target = targets.pop() / 1e3
        axes.axvline(target, color="#333333", linestyle="--", linewidth=1)
        axes.annotate(f" target {target:g} s", (target, 3), fontsize=9)
    axes.set_xscale("log")
    plain_numbers(axes.xaxis)
    axes.set_ylim(0, 102)
    axes.set_xlabel("time to first token, s")
    axes.set_ylabel("requests answered within, % of sent")
    axes.set_title("TTFT distribution")
    axes.grid(alpha=0.3)


def draw_payers(axes: Any, groups: Mapping[str, list[Run]], colours: dict[str, str]) -> None:
    """Draws the mean wait by prompt length, a tenth of the requests each."""
    labels: list[str] = []
    for policy, group in groups.items():
        outcomes = sorted((o for run in group for o in _all(run)), key=lambda o: o.input_tokens)
        deciles = [part for part in _split(outcomes, 10) if part]
        labels = [_tokens(part[-1].input_tokens) for part in deciles]
        axes.plot(
            range(1, len(deciles) + 1),
            [mean(outcome.waited_ms for outcome in part) / 1e3 for part in deciles],
            marker="o",
            markersize=4,
            color=colours[policy],
            label=policy,
        )
    axes.set_yscale("log")
    plain_numbers(axes.yaxis)
    axes.set_xticks(range(1, len(labels) + 1), [f"≤{label}" for label in labels], fontsize=8)
    axes.set_xlabel("prompt length, tokens (a tenth of the requests each)")
    axes.set_ylabel("mean time to first token, s")
    axes.set_title("Who pays")
    axes.grid(alpha=0.3)


def plain_numbers(axis: Any) -> None:
    """Labels a logarithmic axis with 0.1, 0.2, 0.5, 1, … instead of powers."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axis.set_tick_params(which="minor", labelsize=8)


def _all(run: Run) -> list[Outcome]:
    return run.result.outcomes


def _split(items: list[Outcome], parts: int) -> list[list[Outcome]]:
    edges = [round(i * len(items) / parts) for i in range(parts + 1)]
    return [items[a:b] for a, b in itertools.pairwise(edges)]


def _tokens(count: int) -> str:
    return str(count) if count < 1000 else f"{count / 1000:.1f}k"


def main(argv: Sequence[str] | None = None) -> int:
    """Reports on files: the replayer's own, or those of another load generator."""
    given = build_parser().parse_args(argv)
    targets = Targets(given.ttft_ms, given.tpot_ms, given.short_answers)
    runs: list[Run] = []
    try:
        for file in given.files:
            reading = _read(file, targets, given.one_token == "tool")
            for note in [*reading.notes, *_without_targets(reading.results)]:
                print(f"note: {file}: {note}", file=sys.stderr)
            name = re.sub(r"^\d+-", "", file.stem)
            runs += [Run(name, result) for result in reading.results]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        said = f"no {error}" if isinstance(error, KeyError) else error
        print(f"error: {file}: {said}", file=sys.stderr)
        return 2
    print(table(runs))
    if given.json:
        write_json(given.json, runs)
    if given.png:
        write_png(given.png, runs, ", ".join(by_policy(runs)))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of ``kairos report``."""
    parser = parser_of(
        "report",
        description="Print a table of runs, one for each file.\nThe policy of a run is its file's "
        "name, without a leading number.\nThe files are those of `kairos replay`, "
        f"{', '.join(known_tools())}.",
    )
    parser.add_argument(
        "files", nargs="+", type=Path, help="results of a run, see docs/load_generators.md"
    )
    parser.add_argument(
        "--ttft-ms", type=float, help="judge TTFT by this target, not by that in the file (ms)"
    )
    parser.add_argument(
        "--tpot-ms", type=float, help="judge TPOT by this target, not by that in the file (ms)"
    )
    parser.add_argument(
        "--short-answers",
        choices=("auto", "failed", "ok"),
        default="auto",
        help="whether an answer shorter than asked for counts as cut off (auto: if the file says that "
        "end-of-sequence tokens were ignored)",
    )
    parser.add_argument(
        "--one-token",
        choices=("tool", "met"),
        default="tool",
        help="how an answer of one token, which has no TPOT, counts: as its tool counts it, or as met",
    )
    parser.add_argument("--json", type=Path, help="also write JSON to this file")
    parser.add_argument("--png", type=Path, help="also draw a picture to this file")
    return parser


def _without_targets(results: Iterable[Result]) -> list[str]:
    flags = {"--ttft-ms": "ttft_slo_ms", "--tpot-ms": "tpot_slo_ms"}
    answered = [outcome for result in results for outcome in result.outcomes if outcome.ok]
    without = [
        flag
        for flag, name in flags.items()
        if any(math.isinf(getattr(outcome, name)) for outcome in answered)
    ]
    if not without:
        return []
    return [f"it names no target; without {' and '.join(without)} every answer meets it"]


def _read(file: Path, targets: Targets, one_token_as_tool: bool) -> Reading:
    if not is_dump(file):
        return read_results(file, targets, one_token_as_tool=one_token_as_tool)
    result = load(file)
    for outcome in result.outcomes:
        outcome.ttft_slo_ms, outcome.tpot_slo_ms = targets.of(
            outcome.ttft_slo_ms, outcome.tpot_slo_ms
        )
    return Reading([result], [])


if __name__ == "__main__":
    sys.exit(main())
