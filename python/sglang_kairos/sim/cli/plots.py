"""Draws a comparison: attainment against rate, latency CDFs, goodput, and waits by prompt length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from textwrap import fill
from typing import Any

import numpy as np

from sglang_kairos.reports.report import (
    ATTAINMENTS,
    Run,
    by_policy,
    colours_of,
    draw_payers,
    draw_ttft,
    plain_numbers,
)
from sglang_kairos.sim.cli.options import TargetSet

ATTAINMENT_TITLES = ("TTFT target met", "TPOT target met", "both met")
Panel = Callable[[Any, Mapping[str, list[Run]], dict[str, str]], None]


@dataclass(frozen=True)
class Group:
    """The runs, with their outcomes, of one rate and one SLO setting: every seed and policy.

    `about`: what was simulated. `asked`: the requests/s on the command line; None: the trace's own.
    `rate`: the requests/s that were sent; None: all at once. Groups of one `slo` share the pictures
    over rates.
    """

    about: str
    slo: TargetSet
    asked: float | None
    rate: float | None
    runs: Sequence[Run]

    @property
    def rate_text(self) -> str:
        return "all at once" if self.rate is None else f"{self.rate:.3g}"

    @property
    def title(self) -> str:
        rate = self.rate_text if self.rate is None else f"{self.rate_text} req/s"
        return f"simulated: {self.about}, {rate}, {self.slo}"


def draw_all(folder: Path, groups: Sequence[Group]) -> list[Path]:
    """Draws PNG files into `folder` and returns them: two per SLO setting, two per group."""
    drawn: list[Path] = []
    policies = list(by_policy(run for group in groups for run in group.runs))
    colours = dict(zip(policies, colours_of(policies), strict=True))
    by_slo: dict[TargetSet, list[Group]] = {}
    for group in groups:
        by_slo.setdefault(group.slo, []).append(group)
    for slo, some in by_slo.items():
        title = some[0].title if len(some) == 1 else f"simulated: {some[0].about}, {slo}"
        for kind, draw, panels in (
            ("attainment", _draw_attainment, 3),
            ("goodput", _draw_goodput, 1),
        ):
            path = folder / f"{kind}_{_file_part(slo)}.png"
            _picture(path, title, panels, partial(draw, groups=some, colours=colours))
            drawn.append(path)
    for group in groups:
        asked = "own_rate" if group.asked is None else f"rate{group.asked:g}"
        runs = by_policy(group.runs)
        for kind, parts in (("latency", (draw_ttft, _draw_tpot)), ("payers", (draw_payers,))):
            path = folder / f"{kind}_{asked}_{_file_part(group.slo)}.png"
            each = partial(_each, parts=parts, runs=runs, colours=colours)
            _picture(path, group.title, len(parts), each)
            drawn.append(path)
    return drawn


def _picture(path: Path, title: str, panels: int, draw: Callable[[list[Any]], None]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(
        1, panels, figsize=(3.5 + 4.5 * panels, 5.2), layout="constrained", squeeze=False
    )
    axes = list(grid[0])
    try:
        figure.suptitle(fill(title, 75 * panels) + "\n", fontsize=11)
        draw(axes)
        for one in axes:
            one.spines[["top", "right"]].set_visible(False)
            one.set_axisbelow(True)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(len(labels), 7), frameon=False
        )
        figure.savefig(path, dpi=110)
    finally:
        plt.close(figure)


def _each(
    axes: Sequence[Any],
    parts: Sequence[Panel],
    runs: Mapping[str, list[Run]],
    colours: dict[str, str],
) -> None:
    for one, part in zip(axes, parts, strict=True):
        part(one, runs, colours)


def _draw_attainment(axes: Sequence[Any], groups: Sequence[Group], colours: dict[str, str]) -> None:
    ticks, labels = _rate_axis(groups)
    for one, key, title in zip(axes, ATTAINMENTS, ATTAINMENT_TITLES, strict=True):
        for policy, colour in colours.items():
            values = [
                [100 * run.row()[key] for run in group.runs if run.policy == policy]
                for group in groups
            ]
            middle = [mean(some) for some in values]
            lows, highs = [min(some) for some in values], [max(some) for some in values]
            one.plot(ticks, middle, color=colour, label=policy, marker="o", markersize=4)
            if len(groups) > 1:
                one.fill_between(ticks, lows, highs, color=colour, alpha=0.18, linewidth=0)
            else:
                one.vlines(ticks, lows, highs, color=colour)
        one.set_xticks(ticks, labels)
        one.set_ylim(0, 102)
        one.set_xlabel("requests per second")
        one.set_title(title)
        one.grid(alpha=0.3)
    axes[0].set_ylabel("requests that met their target, % of sent")


def _rate_axis(groups: Sequence[Group]) -> tuple[list[float], list[str]]:
    rates = [group.rate for group in groups]
    known = [rate for rate in rates if rate is not None]
    ticks = known if len(known) == len(rates) else [float(i) for i in range(len(rates))]
    return ticks, [group.rate_text for group in groups]


def _draw_goodput(axes: Sequence[Any], groups: Sequence[Group], colours: dict[str, str]) -> None:
    one, width = axes[0], 0.82 / len(colours)
    for place, (policy, colour) in enumerate(colours.items()):
        values = [
            [run.result.metrics.goodput_rps for run in group.runs if run.policy == policy]
            for group in groups
        ]
        at = np.arange(len(groups)) - 0.41 + width * (place + 0.5)
        drawn = one.bar(at, [mean(v) for v in values], width * 0.94, color=colour, label=policy)
        one.bar_label(drawn, fmt="%.2g", padding=2, fontsize=7)
        if any(len(some) > 1 for some in values):
            lows, highs = [min(some) for some in values], [max(some) for some in values]
            one.vlines(at, lows, highs, color="#333333", linewidth=1)
    one.set_xticks(range(len(groups)), [group.rate_text for group in groups])
    one.set_xlabel("requests per second")
    one.set_ylabel("requests per second that met both targets")
    one.set_title("Goodput")
    one.grid(axis="y", alpha=0.3)


def _draw_tpot(axes: Any, groups: Mapping[str, list[Run]], colours: dict[str, str]) -> None:
    axes.set_xscale("log")
    target_ms = 0.0
    for policy, group in groups.items():
        outcomes = [outcome for run in group for outcome in run.result.outcomes]
        tpots = np.sort([outcome.tpot_ms for outcome in outcomes if outcome.ok])
        share = 100 * np.arange(1, len(tpots) + 1) / max(1, len(outcomes))
        # A request of one token has a TPOT of 0, which a logarithmic axis cannot show.
        shown = tpots > 0
        axes.step(
            tpots[shown], share[shown], where="post", color=colours[policy], label=policy, lw=1.8
        )
        target_ms = outcomes[0].tpot_slo_ms
    axes.axvline(target_ms, color="#333333", linestyle="--", linewidth=1)
    axes.annotate(f" target {target_ms:g} ms", (target_ms, 3), fontsize=9)
    plain_numbers(axes.xaxis)
    axes.set_ylim(0, 102)
    axes.set_xlabel("time per output token, ms")
    axes.set_ylabel("requests no slower than that, % of sent")
    axes.set_title("TPOT distribution")
    axes.grid(alpha=0.3)


def _file_part(slo: TargetSet) -> str:
    return f"ttft{'-'.join(f'{ms:g}' for ms in slo.ttft)}_tpot{slo.tpot:g}"
