"""The page of simulated results: figures put into ``templates/simulated.md``, and its pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from string import Template
from typing import Any

from benchmark.harness.page import table
from sglang_kairos.reports.report import Run, colours_of

KAIROS, FULL_THROUGHPUT = "kairos", "kairos-full-throughput"
# What arXiv 2605.02329 reports against DistServe, on other traces and targets than ours.
PAPER = {"ttft": 23.9, "tpot": 27.1, "e2e": 33.8, "throughput": 19.3}
PAPER_NAMES = {
    "ttft": "TTFT attainment, points",
    "tpot": "TPOT attainment, points",
    "e2e": "both, points",
    "throughput": "decode tokens/s, %",
}
DECODE_COLUMNS = {
    "fcfs": "stock",
    "kairos-prefill": "stock decode",
    KAIROS: "Kairos",
    FULL_THROUGHPUT: "Kairos, `--kairos-min-throughput 0.98`",
}
HALF_HEADER = (
    "trace, shape, targets|req/s|fcfs|best upstream|Kairos|over fcfs|over best|bound|share of bound"
).split("|")


@dataclass(frozen=True)
class RateSweep:
    """All policies at several rates; `half_rate` is where stock meets half of its targets."""

    title: str
    half_rate: float
    by_rate: Mapping[float, Sequence[Run]]
    command: str

    def made_by(self, rate: float) -> str:
        return re.sub(r"--rate \S+", f"--rate {rate:.4g}", self.command)


@dataclass(frozen=True)
class GoodputRates:
    """Highest rate, in requests/s, at which enough requests meet both targets, by policy.

    `most`: the same for a clairvoyant scheduler, and TTFT alone."""

    title: str
    by_policy: Mapping[str, float]
    most: float | None = None

    def over_fcfs(self, rate: float | None) -> float | None:
        """Returns the ratio of a rate to fcfs'; None where fcfs misses even when idle."""
        fcfs = self.by_policy["fcfs"]
        return rate / fcfs if fcfs > 0 and rate is not None else None


@dataclass(frozen=True)
class SimulatedResults:
    """Everything on the page. `upstream`: SGLang's own policies; `attain`: goodput's threshold.

    `windows`: title, rate and runs; `ablations`: title with rate, and runs by variant."""

    system: str
    notes: Sequence[str]
    sweeps: Sequence[RateSweep]
    windows: Sequence[tuple[str, float, Sequence[Run]]]
    goodput: Sequence[GoodputRates]
    ablations: Mapping[str, Mapping[str, Run]]
    decode: Sequence[RateSweep]
    attain: float
    upstream: Sequence[str]


def write(folder: Path, found: SimulatedResults, took: str) -> None:
    """Writes ``simulated.md`` and ``simulated-*.png`` into `folder`."""
    for old in folder.glob("simulated-*.png"):
        old.unlink()
    path = Path(__file__).with_name("templates") / "simulated.md"
    _, *pieces = re.split(r"<!-- section: (\w+) -->\n", path.read_text(encoding="utf-8"))
    sections = dict(zip(pieces[::2], map(Template, pieces[1::2]), strict=True))

    def fill(section: str, **values: str) -> str:
        return sections[section].substitute(values)

    head = {"system": found.system, "upstream": ", ".join(found.upstream), "took": took}
    cells = [(s.title, s.half_rate, s.by_rate[s.half_rate]) for s in found.sweeps]
    half = HalfTable(cells, found.upstream)
    parts = [
        fill("head", notes="\n".join(f"- {note}" for note in found.notes), **head),
        fill("goals", goals=_goals(found, half), half=half.text()),
        fill("paper", figures=_paper(found)),
        fill("sweeps", sweeps="".join(fill("sweep", **_sweep(folder, s)) for s in found.sweeps)),
    ]
    if found.windows:
        parts.append(fill("windows", half=HalfTable(found.windows, found.upstream).text()))
    parts.append(fill("goodput", attain=f"{100 * found.attain:.0f}", rates=_goodput(found.goodput)))
    if found.ablations:
        parts.append(fill("ablations", variants=_ablations(found.ablations)))
    if found.decode:
        loads = "".join(fill("load", **_decode(load)) for load in found.decode)
        parts.append(fill("decode", loads=loads))
    text = "\n".join(part.rstrip("\n") + "\n" for part in parts)
    (folder / "simulated.md").write_text(text, encoding="utf-8")


def _percent(run: Run, key: str) -> float:
    return 100 * float(getattr(run.result.metrics, f"{key}_attainment"))


def _of(runs: Sequence[Run], policy: str) -> Run:
    return next(run for run in runs if run.policy == policy)


def _gain(runs: Sequence[Run], key: str) -> float:
    """Returns points of attainment, or % of tokens/s, of Kairos over fcfs."""
    ours, fcfs = _of(runs, KAIROS), _of(runs, "fcfs")
    if key != "throughput":
        return _percent(ours, key) - _percent(fcfs, key)
    return _more(_arrival_rate(ours), _arrival_rate(fcfs))


def _cost(runs: Sequence[Run], policy: str) -> float:
    """Returns tokens/s over the better of stock and stock decode, in %."""
    stock = max(_arrival_rate(_of(runs, name)) for name in ("fcfs", "kairos-prefill"))
    return _more(_arrival_rate(_of(runs, policy)), stock)


def _arrival_rate(run: Run) -> float:
    return float(run.facts["arrival_tokens_per_s"] or 0.0)


def _more(ours: float, stock: float) -> float:
    return 100 * (ours / stock - 1) if stock > 0 else 0.0


class HalfTable:
    """Kairos beside fcfs, the best of upstream and the bound, at the rate where fcfs meets half."""

    def __init__(
        self, cells: Sequence[tuple[str, float, Sequence[Run]]], upstream: Sequence[str]
    ) -> None:
        self.rows: list[list[str]] = []
        self.over_fcfs: list[float] = []
        self.over_best: list[float] = []
        self.shares: list[float] = []
        for title, rate, runs in cells:
            upstreams = (run for run in runs if run.policy in upstream)
            self._add(
                f"{title}|{rate:.3g}", runs, max(upstreams, key=lambda r: _percent(r, "ttft"))
            )

    def _add(self, name: str, runs: Sequence[Run], best: Run) -> None:
        ours = _of(runs, KAIROS)
        met, most = _percent(ours, "ttft"), _percent(best, "ttft")
        self.over_fcfs.append(_gain(runs, "ttft"))
        self.over_best.append(met - most)
        room, bounds = "", ["-", "-"]
        if ours.facts.get("share_of_bound") is not None:
            self.shares.append(100 * float(ours.facts["share_of_bound"]))
            bound = 100 * ours.facts["ttft_bound"]
            room, bounds = f" of {bound - most:.1f}", [f"{bound:.1f}", f"{self.shares[-1]:.1f}"]
        self.rows.append(
            [
                *name.split("|"),
                f"{_percent(_of(runs, 'fcfs'), 'ttft'):.1f}",
                f"{most:.1f} ({best.policy})",
                f"**{met:.1f}**",
                f"{self.over_fcfs[-1]:+.1f}",
                f"{self.over_best[-1]:+.1f}{room}",
                *bounds,
            ]
        )

    def text(self) -> str:
        return table(HALF_HEADER, self.rows)


def _goals(found: SimulatedResults, half: HalfTable) -> str:
    ratios = [goodput.over_fcfs(goodput.by_policy[KAIROS]) for goodput in found.goodput]
    rows = [
        _goal("TTFT over fcfs, points", half.over_fcfs, 30.0, "at the rate where fcfs meets half"),
        _goal("TTFT over the best upstream policy, points", half.over_best, 5.0, "same rate"),
        _goal("share of the clairvoyant bound, %", half.shares, 95.0, "same rate"),
        _goal(
            "goodput over fcfs, ratio",
            [ratio for ratio in ratios if ratio is not None],
            2.0,
            "highest rate with 90 % meeting both",
        ),
    ]
    swept = [_gain(runs, "throughput") for s in found.sweeps for runs in s.by_rate.values()]
    loaded = [runs for load in found.decode for runs in load.by_rate.values()]
    gains = [*(_gain(runs, "throughput") for runs in loaded), *swept]
    costs = [*(_cost(runs, KAIROS) for runs in loaded), *swept]
    if gains:
        best, wanted = max(gains), PAPER["throughput"]
        verdict = "met" if best >= wanted else "missed"
        arrive, name = "while requests arrive", "decode tokens/s over stock"
        rows.append([f"{name}, best setting, %", f"≥ +{wanted}", f"{best:+.1f}", verdict, arrive])
        rows.append(_worst(f"{name}, worst setting, %", costs, arrive))
    if loaded:
        floored = [_cost(runs, FULL_THROUGHPUT) for runs in loaded]
        name = "the same with `--kairos-min-throughput 0.98`"
        rows.append(_worst(name, floored, "decode under load"))
    return table(("goal", "wanted", "lowest to highest (mean)", "cells", "where"), rows)


def _goal(name: str, values: Sequence[float], wanted: float, where: str) -> list[str]:
    if not values:
        return [name, f"≥ {wanted:g}", "-", "not measured", where]
    met = sum(value >= wanted for value in values)
    spread = f"{min(values):.1f} to {max(values):.1f} ({mean(values):.1f})"
    return [name, f"≥ {wanted:g}", spread, f"{met} of {len(values)} met", where]


def _worst(name: str, changes: Sequence[float], where: str) -> list[str]:
    worst = min(changes)
    return [name, "≥ -2", f"{worst:+.1f}", "met" if worst >= -2 else "missed", where]


def _paper(found: SimulatedResults) -> str:
    kinds = [(found.sweeps, ("ttft", "e2e", "throughput"))]
    kinds.append((found.decode, ("tpot", "e2e", "throughput")))
    gains: dict[str, list[tuple[float, str]]] = {key: [] for key in PAPER}
    for sweeps, keys in kinds:
        for sweep in sweeps:
            for rate, runs in sweep.by_rate.items():
                for key in keys:
                    gains[key].append((_gain(runs, key), sweep.made_by(rate)))
    rows = []
    for key, name in PAPER_NAMES.items():
        if gains[key]:
            gain, command = max(gains[key])
            typical = sorted(value for value, _ in gains[key])[len(gains[key]) // 2]
            ours = [f"{gain:+.1f}", f"{typical:+.1f}", f"`{command}`"]
            rows.append([name, f"+{PAPER[key]}", *ours])
    return table(("", "paper, up to", "ours, up to", "ours, median", "made by"), rows)


def _both(run: Run) -> str:
    return f"{_percent(run, 'ttft'):.1f} / {_percent(run, 'e2e'):.1f}"


def _by_rate(sweep: RateSweep, columns: Sequence[str], cell: Any) -> str:
    rows = [[f"{rate:.3g}", *map(cell, runs)] for rate, runs in sweep.by_rate.items()]
    return table(("req/s", *columns), rows)


def _sweep(folder: Path, sweep: RateSweep) -> dict[str, str]:
    runs = sweep.by_rate[sweep.half_rate]
    waits = ((run.policy, run.result.metrics.longest_wait_ms / 1e3) for run in runs)
    return {
        "title": sweep.title,
        "picture": _draw(folder, sweep),
        "rates": _by_rate(sweep, [run.policy for run in runs], _both),
        "half_rate": f"{sweep.half_rate:.3g}",
        "waits": ", ".join(f"{policy} {wait:.0f}" for policy, wait in waits),
        "command": sweep.command,
    }


def _goodput(found: Sequence[GoodputRates]) -> str:
    policies = list(found[0].by_policy)

    def cells(one: GoodputRates) -> Iterator[str]:
        yield one.title
        yield from (f"{one.by_policy[policy]:.3g}" for policy in policies)
        yield "-" if one.most is None else f"{one.most:.3g}"
        for rate in (one.by_policy[KAIROS], one.most):
            ratio = one.over_fcfs(rate)
            yield "-" if ratio is None else f"{ratio:.2f}"

    header = ("trace, shape, targets", *policies, "bound", "Kairos / fcfs", "bound / fcfs")
    return table(header, [list(cells(one)) for one in found])


def _ablations(found: Mapping[str, Mapping[str, Run]]) -> str:
    variants = next(iter(found.values()))
    return table(
        ("", *found), [[name, *(_both(runs[name]) for runs in found.values())] for name in variants]
    )


def _decode(load: RateSweep) -> dict[str, str]:
    def cell(run: Run) -> str:
        met = " / ".join(f"{_percent(run, key):.1f}" for key in ("ttft", "tpot", "e2e"))
        return f"{met} ({_arrival_rate(run):.0f}; {run.result.metrics.decode_tokens_per_s:.0f})"

    rates = _by_rate(load, list(DECODE_COLUMNS.values()), cell)
    return {"title": load.title, "rates": rates, "command": load.command}


def _draw(folder: Path, sweep: RateSweep) -> str:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    policies = [run.policy for run in next(iter(sweep.by_rate.values()))]
    colours = dict(zip(policies, colours_of(policies), strict=True))
    figure, panels = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    figure.suptitle(f"simulated: {sweep.title}", fontsize=11)
    wanted = (("ttft", "TTFT target met"), ("e2e", "both targets met"))
    for axes, (key, title) in zip(panels, wanted, strict=True):
        for place, policy in enumerate(policies):
            values = [_percent(runs[place], key) for runs in sweep.by_rate.values()]
            axes.plot(list(sweep.by_rate), values, "o-", ms=4, color=colours[policy], label=policy)
        bound = sweep.by_rate[sweep.half_rate][0].facts["ttft_bound"] if key == "ttft" else None
        if bound is not None:
            axes.plot([sweep.half_rate], [100 * bound], "k_", ms=16, label="bound")
        axes.set(ylim=(0, 102), xlabel="requests per second", ylabel="% of sent")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    name = "simulated-" + re.sub(r"[^a-z0-9]+", "-", sweep.title.lower()).strip("-") + ".png"
    figure.savefig(folder / name, dpi=80)
    plt.close(figure)
    return name
