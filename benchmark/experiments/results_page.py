"""The page of simulated results: what was measured, laid out as Markdown, and its pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from sglang_kairos.reports.report import Run, colours_of

KAIROS = "kairos"
# What arXiv 2605.02329 reports against DistServe, on other traces and targets than ours.
PAPER = {"ttft": 23.9, "tpot": 27.1, "e2e": 33.8, "throughput": 19.3}


@dataclass(frozen=True)
class Sweep:
    """All policies at several rates; `half_rate` is where fcfs meets half of its TTFT targets."""

    title: str
    shape: str
    half_rate: float
    by_rate: Mapping[float, Sequence[Run]]
    command: str


@dataclass(frozen=True)
class Window:
    """All policies at the half rate of another part of the trace."""

    title: str
    start: int
    rate: float
    runs: Sequence[Run]


@dataclass(frozen=True)
class Goodput:
    """Highest rate, in requests/s, at which enough requests meet both targets."""

    title: str
    by_policy: Mapping[str, float]
    most: float | None = None
    """The same for a clairvoyant scheduler, and TTFT alone."""

    @property
    def ratio(self) -> float | None:
        """Kairos' over fcfs'; None where fcfs misses even when idle."""
        fcfs = self.by_policy["fcfs"]
        return self.by_policy[KAIROS] / fcfs if fcfs > 0 else None


@dataclass(frozen=True)
class Ablation:
    """Variants of Kairos at one rate."""

    title: str
    rate: float
    by_variant: Mapping[str, Run]


FULL_THROUGHPUT = "kairos-full-throughput"
DECODE_COLUMNS = {
    "fcfs": "stock",
    "kairos-prefill": "stock decode",
    KAIROS: "Kairos",
    FULL_THROUGHPUT: "Kairos, `--kairos-min-throughput 0.98`",
}


@dataclass(frozen=True)
class DecodeLoad:
    """Runs of the policies in `DECODE_COLUMNS`, in that order, by rate."""

    title: str
    by_rate: Mapping[float, Sequence[Run]]
    command: str


@dataclass(frozen=True)
class Measured:
    """Everything on the page. `upstream`: SGLang's own policies; `attain`: goodput's threshold."""

    system: str
    notes: Sequence[str]
    sweeps: Sequence[Sweep]
    windows: Sequence[Window]
    goodput: Sequence[Goodput]
    ablations: Sequence[Ablation]
    decode: Sequence[DecodeLoad]
    attain: float
    upstream: Sequence[str]


def write(folder: Path, measured: Measured, took: str) -> None:
    """Writes ``simulated.md`` and ``simulated-*.png`` into `folder`."""
    for old in folder.glob("simulated-*.png"):
        old.unlink()
    pictures = [_draw(folder, sweep) for sweep in measured.sweeps]
    parts = [
        _head(measured, took),
        _goals(measured),
        _paper(measured),
        _sweeps(measured, pictures),
        _windows(measured),
        _goodput(measured),
        _ablations(measured),
        _decode(measured),
    ]
    (folder / "simulated.md").write_text("\n".join(parts), encoding="utf-8")


def _head(measured: Measured, took: str) -> str:
    notes = "\n".join(f"- {note}" for note in measured.notes)
    return f"""# Simulated results

Written by `make results` ({took}); do not edit. Every figure here is *simulated*: the policies are the
servers' own functions, the step times are `{measured.system}`'s. [simulator.md](../simulator.md) says
what is modelled, what is assumed, how well it predicts real servers, and how to read this page.

{notes}

Upstream's policies are {", ".join(measured.upstream)}. fcfs with continuous batching on a PD cluster
is also how DistServe schedules. `simulated.json` holds every run shown.
"""


def _percent(run: Run, key: str) -> float:
    return 100 * float(getattr(run.result.metrics, key))


def _ttft(run: Run) -> float:
    return _percent(run, "ttft_attainment")


def _of(runs: Sequence[Run], policy: str) -> Run:
    return next(run for run in runs if run.policy == policy)


def _best(runs: Sequence[Run], policies: Sequence[str]) -> Run:
    return max((run for run in runs if run.policy in policies), key=_ttft)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _share(run: Run) -> float | None:
    share = run.facts.get("share_of_bound")
    return None if share is None else 100 * float(share)


def _half_rows(
    cells: Sequence[tuple[str, float, Sequence[Run]]], upstream: Sequence[str]
) -> tuple[list[list[str]], list[float], list[float], list[float]]:
    rows: list[list[str]] = []
    over_fcfs, over_best, shares = [], [], []
    for title, rate, runs in cells:
        ours, fcfs, best = _of(runs, KAIROS), _of(runs, "fcfs"), _best(runs, upstream)
        share = _share(ours)
        over_fcfs.append(_ttft(ours) - _ttft(fcfs))
        over_best.append(_ttft(ours) - _ttft(best))
        if share is not None:
            shares.append(share)
        rows.append(
            [
                title,
                f"{rate:.3g}",
                f"{_ttft(fcfs):.1f}",
                f"{_ttft(best):.1f} ({best.policy})",
                f"**{_ttft(ours):.1f}**",
                f"{over_fcfs[-1]:+.1f}",
                f"{over_best[-1]:+.1f}"
                + (
                    ""
                    if share is None
                    else f" of {100 * ours.facts['ttft_bound'] - _ttft(best):.1f}"
                ),
                "-" if share is None else f"{100 * ours.facts['ttft_bound']:.1f}",
                "-" if share is None else f"{share:.1f}",
            ]
        )
    return rows, over_fcfs, over_best, shares


HALF_HEADER = (
    "trace, shape, targets|req/s|fcfs|best upstream|Kairos|over fcfs|over best|bound|share of bound"
).split("|")


def _goals(measured: Measured) -> str:
    cells = [(s.title, s.half_rate, s.by_rate[s.half_rate]) for s in measured.sweeps]
    rows, over_fcfs, over_best, shares = _half_rows(cells, measured.upstream)
    ratios = [g.ratio for g in measured.goodput if g.ratio is not None]
    gains, costs = _throughputs(measured)
    goals = [
        _goal("TTFT over fcfs, points", over_fcfs, 30.0, "at the rate where fcfs meets half"),
        _goal("TTFT over the best upstream policy, points", over_best, 5.0, "same rate"),
        _goal("share of the clairvoyant bound, %", shares, 95.0, "same rate"),
        _goal("goodput over fcfs, ratio", ratios, 2.0, "highest rate with 90 % meeting both"),
    ]
    if gains:
        goals += [
            [
                "decode tokens/s over stock, best setting, %",
                "≥ +19.3",
                f"{max(gains):+.1f}",
                "met" if max(gains) >= PAPER["throughput"] else "missed",
                "while requests arrive",
            ],
            _worst("decode tokens/s over stock, worst setting, %", costs, "while requests arrive"),
        ]
    floored = [
        _cost(runs, FULL_THROUGHPUT) for load in measured.decode for runs in load.by_rate.values()
    ]
    if floored:
        name = "the same with `--kairos-min-throughput 0.98`"
        goals.append(_worst(name, floored, "decode under load"))
    return "\n".join(
        [
            "## Goals\n",
            _table(("goal", "wanted", "lowest to highest (mean)", "cells", "where"), goals),
            "TTFT attainment, %, where fcfs meets half. Over best: points above the best upstream",
            "policy, of those that the bound leaves room for.\n",
            _table(HALF_HEADER, rows),
        ]
    )


def _goal(name: str, values: Sequence[float], wanted: float, where: str) -> list[str]:
    if not values:
        return [name, f"≥ {wanted:g}", "-", "not measured", where]
    met = sum(value >= wanted for value in values)
    spread = f"{min(values):.1f} to {max(values):.1f} ({mean(values):.1f})"
    return [name, f"≥ {wanted:g}", spread, f"{met} of {len(values)} met", where]


def _worst(name: str, changes: Sequence[float], where: str) -> list[str]:
    worst = min(changes)
    return [name, "≥ -2", f"{worst:+.1f}", "met" if worst >= -2 else "missed", where]


def _arrival_rate(run: Run) -> float:
    return float(run.facts["arrival_tokens_per_s"] or 0.0)


def _faster(runs: Sequence[Run]) -> float:
    """Kairos' tokens/s over fcfs', in %."""
    fcfs = _arrival_rate(_of(runs, "fcfs"))
    return 100 * (_arrival_rate(_of(runs, KAIROS)) / fcfs - 1) if fcfs > 0 else 0.0


def _cost(runs: Sequence[Run], policy: str) -> float:
    """Tokens/s over the better of stock and stock decode, in %."""
    stock = max(_arrival_rate(_of(runs, name)) for name in ("fcfs", "kairos-prefill"))
    return 100 * (_arrival_rate(_of(runs, policy)) / stock - 1) if stock > 0 else 0.0


def _throughputs(measured: Measured) -> tuple[list[float], list[float]]:
    """Kairos' tokens/s over stock decode's and over fcfs', in %, by setting: gains and costs."""
    gains, costs = [], []
    for load in measured.decode:
        for runs in load.by_rate.values():
            gains.append(_faster(runs))
            costs.append(_cost(runs, KAIROS))
    for sweep in measured.sweeps:
        for runs in sweep.by_rate.values():
            change = _faster(runs)
            gains.append(change)
            costs.append(change)
    return gains, costs


def _paper(measured: Measured) -> str:
    candidates: dict[str, list[tuple[float, str]]] = {key: [] for key in PAPER}
    for sweep in measured.sweeps:
        for rate, runs in sweep.by_rate.items():
            ours, fcfs = _of(runs, KAIROS), _of(runs, "fcfs")
            command = _with_rate(sweep.command, rate)
            for key in ("ttft", "e2e"):
                gain = _percent(ours, f"{key}_attainment") - _percent(fcfs, f"{key}_attainment")
                candidates[key].append((gain, command))
            candidates["throughput"].append((_faster(runs), command))
    for load in measured.decode:
        for rate, runs in load.by_rate.items():
            ours, fcfs = _of(runs, KAIROS), _of(runs, "fcfs")
            command = _with_rate(load.command, rate)
            for key in ("tpot", "e2e"):
                gain = _percent(ours, f"{key}_attainment") - _percent(fcfs, f"{key}_attainment")
                candidates[key].append((gain, command))
            candidates["throughput"].append((_faster(runs), command))
    names = {
        "ttft": "TTFT attainment, points",
        "tpot": "TPOT attainment, points",
        "e2e": "both, points",
        "throughput": "decode tokens/s, %",
    }
    rows = []
    for key, name in names.items():
        if candidates[key]:
            gain, command = max(candidates[key])
            typical = sorted(value for value, _ in candidates[key])
            rows.append(
                [
                    name,
                    f"+{PAPER[key]}",
                    f"{gain:+.1f}",
                    f"{typical[len(typical) // 2]:+.1f}",
                    f"`{command}`",
                ]
            )
    return "\n".join(
        [
            "## The paper's four figures beside ours\n",
            '"Up to" figures over fcfs. The paper (arXiv 2605.02329) measured real servers on a trace',
            "and with targets that are not public: the two columns are not comparable, they only answer",
            "the same question. Ours is the largest over all settings below; the median says how",
            "typical it is.\n",
            _table(("", "paper, up to", "ours, up to", "ours, median", "made by"), rows),
        ]
    )


def _with_rate(command: str, rate: float) -> str:
    return re.sub(r"--rate \S+", f"--rate {rate:.4g}", command)


def _sweeps(measured: Measured, pictures: Sequence[str]) -> str:
    parts = ["## Attainment against request rate\n"]
    for sweep, picture in zip(measured.sweeps, pictures, strict=True):
        policies = [run.policy for run in next(iter(sweep.by_rate.values()))]
        rows = [
            [
                f"{rate:.3g}",
                *(f"{_ttft(run):.1f} / {_percent(run, 'e2e_attainment'):.1f}" for run in runs),
            ]
            for rate, runs in sweep.by_rate.items()
        ]
        runs = sweep.by_rate[sweep.half_rate]
        waits = ", ".join(
            f"{run.policy} {run.result.metrics.longest_wait_ms / 1e3:.0f}" for run in runs
        )
        parts += [
            f"### {sweep.title}\n",
            f"![attainment against rate]({picture})\n",
            "TTFT met / both met, %, by requests per second:\n",
            _table(("req/s", *policies), rows),
            f"Longest wait for a first token at {sweep.half_rate:.3g} req/s, s: {waits}.\n",
            f"`{sweep.command}`\n",
        ]
    return "\n".join(parts)


def _windows(measured: Measured) -> str:
    if not measured.windows:
        return ""
    cells = [(f"{w.title}, from row {w.start}", w.rate, w.runs) for w in measured.windows]
    rows, *_ = _half_rows(cells, measured.upstream)
    return "\n".join(
        [
            "## Other parts of the traces\n",
            "Other rows, other draws of the tiers, their own rate where fcfs meets half. TTFT met, %:\n",
            _table(HALF_HEADER, rows),
        ]
    )


def _goodput(measured: Measured) -> str:
    policies = list(measured.goodput[0].by_policy)
    rows = [
        [
            g.title,
            *(f"{g.by_policy[policy]:.3g}" for policy in policies),
            "-" if g.most is None else f"{g.most:.3g}",
            "-" if g.ratio is None else f"{g.ratio:.2f}",
            "-"
            if g.most is None or not g.by_policy["fcfs"]
            else f"{g.most / g.by_policy['fcfs']:.2f}",
        ]
        for g in measured.goodput
    ]
    return "\n".join(
        [
            f"## Goodput: the highest rate at which {100 * measured.attain:.0f} % meet both targets\n",
            _table(
                ("trace, shape, targets", *policies, "bound", "Kairos / fcfs", "bound / fcfs"), rows
            ),
            "0: fewer meet both even when the servers are nearly idle. Bound: the highest rate at which",
            "a clairvoyant scheduler could have as many meet their TTFT; where it is below twice fcfs'",
            "rate, nobody can double it.\n",
        ]
    )


def _ablations(measured: Measured) -> str:
    if not measured.ablations:
        return ""
    names = list(measured.ablations[0].by_variant)
    rows = [
        [
            f"{a.title}, {a.rate:.3g} req/s",
            *(
                f"{_ttft(a.by_variant[n]):.1f} / {_percent(a.by_variant[n], 'e2e_attainment'):.1f}"
                for n in names
            ),
        ]
        for a in measured.ablations
    ]
    turned = [[name, *(row[1 + i] for row in rows)] for i, name in enumerate(names)]
    return "\n".join(
        [
            "## Kairos taken apart\n",
            "TTFT met / both met, %, at the rate where fcfs meets half.\n",
            _table(("", *(row[0] for row in rows)), turned),
        ]
    )


def _decode(measured: Measured) -> str:
    if not measured.decode:
        return ""
    parts = [
        "## Decode under load\n",
        "Eight prefill servers before one decode server: decoding is what is short. Rates are 0.5 to 2",
        'times the one at which stock decoding meets half of its TPOT targets. "Stock" is fcfs on both',
        'sides; "stock decode" has Kairos\' prefill side before stock decoding. Per cell: TTFT met /',
        "TPOT met / both met, % (tokens per second while requests arrive; over the whole run).\n",
    ]
    for load in measured.decode:
        rows = [
            [
                f"{rate:.3g}",
                *(
                    f"{_ttft(run):.1f} / {_percent(run, 'tpot_attainment'):.1f} / "
                    f"{_percent(run, 'e2e_attainment'):.1f} ({_arrival_rate(run):.0f}; "
                    f"{run.result.metrics.decode_tokens_per_s:.0f})"
                    for run in runs
                ),
            ]
            for rate, runs in load.by_rate.items()
        ]
        parts += [
            f"### {load.title}\n",
            _table(("req/s", *DECODE_COLUMNS.values()), rows),
            f"`{load.command}`\n",
        ]
    return "\n".join(parts)


def _draw(folder: Path, sweep: Sweep) -> str:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    policies = [run.policy for run in next(iter(sweep.by_rate.values()))]
    colours = dict(zip(policies, colours_of(policies), strict=True))
    figure, panels = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    figure.suptitle(f"simulated: {sweep.title}", fontsize=11)
    wanted = (("ttft_attainment", "TTFT target met"), ("e2e_attainment", "both targets met"))
    for axes, (key, title) in zip(panels, wanted, strict=True):
        for place, policy in enumerate(policies):
            values = [_percent(runs[place], key) for runs in sweep.by_rate.values()]
            axes.plot(list(sweep.by_rate), values, "o-", ms=4, color=colours[policy], label=policy)
        if key == "ttft_attainment":
            bound = next((r.facts["ttft_bound"] for r in sweep.by_rate[sweep.half_rate]), None)
            if bound is not None:
                axes.plot([sweep.half_rate], [100 * bound], "k_", ms=16, label="bound")
        _finish(axes, title)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    name = "simulated-" + re.sub(r"[^a-z0-9]+", "-", sweep.title.lower()).strip("-") + ".png"
    figure.savefig(folder / name, dpi=80)
    plt.close(figure)
    return name


def _finish(axes: Any, title: str) -> None:
    axes.set_ylim(0, 102)
    axes.set_xlabel("requests per second")
    axes.set_ylabel("% of sent")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
