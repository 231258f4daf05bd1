"""Ports each SGLang release from a table that knows only those before: docs/results/porting.md.

    PYTHONPATH=python .venv/bin/python scripts/porting_history.py

It runs the static part of ``doctor --port`` and compares the result with the table as it stands
today. Versions that are not here are skipped. Seams, layouts and callees that no version before had
are unknown to the tool, as they were then. The checks themselves were written with all versions at
hand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang_kairos.engine.fingerprints import known_texts
from sglang_kairos.engine.fingerprints.upstream_ast import SourceTree
from sglang_kairos.engine.judge import Judge, SeamVerdict, has
from sglang_kairos.engine.seams import relied
from sglang_kairos.engine.seams.table import SEAMS, SUPPORTED_VERSIONS
from sglang_kairos.versions.upstream_texts import package_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "results" / "porting.md"
OLDEST_FIRST = tuple(reversed(SUPPORTED_VERSIONS))
HEAD = """\
# Porting SGLang by machine, on history

`scripts/porting_history.py` made this page. For each release: the static part of `doctor --port`, from
a table that knows the releases before it and no other. A seam, a layout (`engine/compat.py`) or a
function relied on that none of those had is unknown to the tool. The checks (`engine/relied*.py`)
were written with all eight releases at hand: this says what they tell apart, not how they will do on
a release that nobody has seen.

Run whole, in a checkout whose table and patches ended one release before, *CPU*: for 0.5.17, 0.5.18,
0.5.20 and 0.5.23 nothing needed a person; the columns and patches written are those of this
repository byte for byte, but for one function relied on that 0.5.20 is the first to have
(`conclude_failure`). The identity test passed on 0.5.20 (98 s) and 0.5.23 (89 s).

- **as in**: the text is that of a known release.
- **harmless**: another text, everything relied on is there; **compat**: in a layout that is known.
- **another**: not wrapped, another seam serves or none is needed.
- **person**: the tool stops and says why; **causes**: how many reasons that comes down to.
- **differs**: seams that the tool would wrap and today's table does not, or the other way round.

| release | seams | as in | harmless | compat | another | person | causes | differs |
|---|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Step:
    """One release from a table of those before."""

    version: str
    verdicts: list[SeamVerdict]

    @property
    def persons(self) -> dict[str, list[str]]:
        """Seams that need a person, by what is the matter."""
        causes: dict[str, list[str]] = {}
        for verdict in self.verdicts:
            if verdict.kind == "person":
                for reason in verdict.reasons:
                    causes.setdefault(reason, []).append(verdict.seam.qualname)
        return causes

    def differs(self) -> Iterator[str]:
        """Where the tool and the table of today disagree, persons apart."""
        judged = {verdict.seam.qualname: verdict for verdict in self.verdicts}
        for seam in SEAMS:
            wrapped, verdict = self.version in seam.fingerprints, judged.get(seam.qualname)
            if verdict is None and wrapped:
                yield f"{seam.qualname}: a person wrote it for this release"
            elif verdict is not None and verdict.kind != "person" and verdict.wrapped != wrapped:
                yield f"{seam.qualname}: the tool says {verdict}, the table " + (
                    "wraps it" if wrapped else "does not"
                )


def layouts_of(versions: Sequence[str]) -> set[str]:
    """The alternatives of `relied` that serve in one of these versions."""
    known: set[str] = set()
    for version in versions:
        package = package_of(version)
        tree = SourceTree(package) if package else None
        for seam in relied.ATTRIBUTES:
            for need in relied.needs(seam) if tree else ():
                there = (c for c in need.choices if tree.has(c) or (":" not in c and has(tree, c)))
                known.update(list(there)[:1])
                if len(need.choices) == 1:
                    known.update(need.choices)
    return known


def steps() -> Iterator[Step]:
    """Every release after the first."""
    for place, version in enumerate(OLDEST_FIRST[1:], 1):
        package = package_of(version)
        if package is not None:
            before = OLDEST_FIRST[:place]
            known = layouts_of(before)
            judge = Judge(package, version, before, known.__contains__)
            yield Step(version, judge.verdicts())


def page(made: Sequence[Step]) -> str:
    """The whole page."""
    rows, notes, total = [], [], Counter[str]()
    for step in made:
        counts = Counter(verdict.kind for verdict in step.verdicts)
        total += counts
        kinds = [counts[kind] for kind in ("as in", "harmless", "compat", "another", "person")]
        differs = list(step.differs())
        cells = [step.version, len(step.verdicts), *kinds, len(step.persons), len(differs)]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
        notes += [f"\n## {step.version}\n"] if step.persons or differs else []
        for cause, names in step.persons.items():
            notes.append(f"- person: {cause}: {_few(names)}")
        notes += [f"- differs: {line}" for line in differs]
    new = total["harmless"] + total["compat"] + total["person"]
    said = (
        f"\nOf {new} changed seams the tool passed {new - total['person']} and stopped at "
        f"{total['person']}.\n"
    )
    return HEAD + "\n".join(rows) + "\n" + said + "\n".join(notes) + "\n"


def _few(names: list[str]) -> str:
    shown = ", ".join(f"`{name.split('.')[-1]}`" for name in names[:4])
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def main() -> int:
    """Writes the page."""
    assert known_texts.table()
    PAGE.write_text(page(list(steps())), encoding="utf-8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
