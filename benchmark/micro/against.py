"""Before and after: one of the micro benchmarks on this tree and on another, in alternating runs.

    git worktree add ../before COMMIT
    python -m benchmark.micro.against ../before policy_overhead --rounds 5
    python -m benchmark.micro.against ../before decode_cost --rounds 5 -- --rounds 100
    python -m benchmark.micro.against ../before router_overhead -- --only kairos --rounds 1

Each run is a process of its own with that tree's packages; this Python's site-packages serve both.
A line per figure that both report: the median of the rounds on each side, and their ratio. Below 1
this tree takes less. Then the least and the greatest ratio of a pair of runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmark.harness.arguments import parser_for
from benchmark.harness.experiment import alternated, write_json

HERE = Path(__file__).resolve().parents[2]
FLAG = {"policy_overhead": "--json", "decode_cost": "--json", "router_overhead": "--out"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs both trees in turn, prints the table and writes ``--out``. Returns the exit status."""
    parser = parser_for("benchmark.micro.against", __doc__)
    parser.add_argument("before", type=Path, help="folder of the other tree")
    parser.add_argument("benchmark", choices=sorted(FLAG), help="what to run")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each tree")
    parser.add_argument("--out", type=Path, help="write the figures here too")
    parser.epilog = "arguments after -- go to the benchmark"
    words = list(sys.argv[1:] if argv is None else argv)
    own = words.index("--") if "--" in words else len(words)
    given, rest = parser.parse_args(words[:own]), words[own + 1 :]
    if not module_in(given.before, given.benchmark):
        parser.error(f"before: {given.before} holds no benchmark/micro/{given.benchmark}.py")
    if given.rounds < 1:
        parser.error("--rounds: must be at least 1")
    sides = {"before": given.before.resolve(), "after": HERE}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number, order in enumerate(alternated(list(sides), given.rounds)):
        for name in order:
            print(f"round {number + 1}: {name}", flush=True)
            report = run(sides[name], given.benchmark, rest)
            rounds[name].append(dict(figures(report)))
    rows = compare(rounds["before"], rounds["after"])
    for name, row in rows.items():
        print(
            f"{name:<50} {row['before']:>10.4g} -> {row['after']:>10.4g}   "
            f"{row['ratio']:.2f} ({row['least']:.2f} to {row['most']:.2f})"
        )
    if given.out:
        facts = {"benchmark": given.benchmark, "rounds": given.rounds, "figures": rows}
        write_json(given.out, facts, indent=1)
    return 0


def module_in(tree: Path, benchmark: str) -> str:
    """Returns the module's name in that tree, which may be older; empty if there is none."""
    for room in ("benchmark.micro", "benchmark"):
        if (tree / room.replace(".", "/") / f"{benchmark}.py").is_file():
            return f"{room}.{benchmark}"
    return ""


def run(tree: Path, benchmark: str, rest: Sequence[str]) -> Any:
    """Returns what the benchmark of that tree reports. RuntimeError if it leaves no report."""
    env = {**os.environ, "PYTHONPATH": f"{tree / 'python'}{os.pathsep}{tree}"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", module_in(tree, benchmark), FLAG[benchmark], str(report)]
        done = subprocess.run(
            [*command, *rest], cwd=tree, env=env, capture_output=True, text=True, check=False
        )
        # The status says whether its own bounds were met, which is not the question here.
        if not report.is_file():
            raise RuntimeError(f"{' '.join(command)} in {tree} failed:\n{done.stderr[-2000:]}")
        return json.loads(report.read_text(encoding="utf-8"))


def figures(report: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yields every number of a report by its path; the rows of a list go by what is text in them."""
    if isinstance(report, bool) or report is None or isinstance(report, str):
        return
    if isinstance(report, int | float):
        yield name, float(report)
    elif isinstance(report, dict):
        for key, value in report.items():
            yield from figures(value, f"{name}.{key}" if name else str(key))
    else:
        for place, value in enumerate(report):
            yield from figures(value, f"{name}[{_row_name(value, place)}]")


def _row_name(value: Any, place: int) -> str:
    if not isinstance(value, dict) or "what" not in value:
        return str(place)
    return f"{value['what']} {value.get('running', '')}".strip()


def compare(
    before: Sequence[dict[str, float]], after: Sequence[dict[str, float]]
) -> dict[str, dict[str, float]]:
    """Returns medians and ratios of each figure that all runs report and that is above 0 in all."""
    rows = {}
    for name in before[0]:
        pairs = [(b.get(name, 0.0), a.get(name, 0.0)) for b, a in zip(before, after, strict=True)]
        if any(min(pair) <= 0.0 for pair in pairs):
            continue
        olds, news = zip(*pairs, strict=True)
        ratios = [new / old for old, new in pairs]
        rows[name] = {
            "before": median(olds),
            "after": median(news),
            "ratio": median(news) / median(olds),
            "least": min(ratios),
            "most": max(ratios),
        }
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
