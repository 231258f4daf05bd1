"""Front ends that stand before Kairos, ways to say an SLO through them, and the table of both.

The table is the one in docs/front_ends.md; test/e2e/test_front_ends.py measures its cells.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GENERATE, COMPLETIONS, CHAT = "/generate", "/v1/completions", "/v1/chat/completions"
PATHS = {GENERATE: "generate", COMPLETIONS: "completions", CHAT: "chat"}
ALL, NOTHING = "yes", "no"

DEFAULT_MS, DEFAULT_TPOT_MS = 900_000.0, 9000.0
# Each way names a target of its own, so that one that arrives is known by it. Milliseconds.
CLASSES = {
    "by-body": {"ttft_ms": 230_000, "tpot_ms": 2300},
    "by-header": {"ttft_ms": 240_000, "tpot_ms": 2400},
    "by-priority": {"ttft_ms": 250_000, "tpot_ms": 2500},
    "by-hint": {"ttft_ms": 260_000, "tpot_ms": 2600},
    "by-model": {"ttft_ms": 270_000, "tpot_ms": 2700},
}
PRIORITY_CLASSES = "7=by-priority,8=by-hint,9=default"
AGE_MS = 15_000.0  # what the ways of saying an age say; believed up to twice this
Said = tuple[dict[str, Any], dict[str, str]]


@dataclass(frozen=True, eq=False)
class Way:
    """A way to say an SLO: `say(path)` gives fields of the body and headers.

    `last_request` is what both servers then report, and at least `age_ms` as its age.
    """

    name: str
    say: Callable[[str], Said]
    last_request: Mapping[str, Any]
    age_ms: float = 0.0

    @property
    def due_ms(self) -> float:
        """When its first token is due, from now."""
        return float(self.last_request["ttft_ms"]) - self.age_ms

    def arrived(self, seen: Mapping[str, Any]) -> bool:
        """Whether this `last_request` of a server is what was said."""
        told = {key: seen.get(key) for key in self.last_request}
        return told == self.last_request and seen["age_ms"] >= self.age_ms


def _targets(ttft_ms: float, tpot_ms: float = DEFAULT_TPOT_MS, name: str = "default") -> Any:
    return {"ttft_ms": float(ttft_ms), "tpot_ms": float(tpot_ms), "name": name}


def _body(body: Mapping[str, Any]) -> Callable[[str], Said]:
    return lambda _: (dict(body), {})


def _headers(headers: Mapping[str, Any]) -> Callable[[str], Said]:
    return lambda _: ({}, {name: str(value) for name, value in headers.items()})


def _wire(path: str) -> Said:
    params = {"custom_params": {"kairos": {"ttft_ms": 150_000, "tpot_ms": 1500}}}
    return ({"sampling_params": params} if path == GENERATE else params), {}


def _started(_: str) -> Said:
    return {}, {"x-request-start": f"t={time.time() - AGE_MS / 1e3 - 1:.3f}"}


def _traced(_: str) -> Said:
    trace_id = f"{int(time.time() - AGE_MS / 1e3) - 5:08x}" + "5ca1ab1e" * 3
    return {}, {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"}


def _class(name: str) -> Any:
    return _targets(**CLASSES[name], name=name)


_HINTS = {"nvext": {"agent_hints": {"priority": 8}}}
_NVEXT = {"nvext": {"router": {"ttft_target": 120_000, "itl_target": 1200}}}

WAYS = (
    Way(
        "`ttft_ms`, `tpot_ms`",
        _body({"ttft_ms": 100_000, "tpot_ms": 1000}),
        _targets(100_000, 1000),
    ),
    Way(
        "`slo` object",
        _body({"slo": {"ttft_ms": 110_000, "tpot_ms": 1100}}),
        _targets(110_000, 1100),
    ),
    Way("`slo_class`", _body({"slo_class": "by-body"}), _class("by-body")),
    Way("`nvext.router`", _body(_NVEXT), _targets(120_000, 1200)),
    Way("`nvext.agent_hints.priority`", _body(_HINTS), _class("by-hint")),
    Way("`priority`", _body({"priority": 7}), _class("by-priority")),
    Way("`custom_params.kairos`", _wire, _targets(150_000, 1500)),
    Way(
        "`x-slo-ttft-ms`, `x-slo-tpot-ms`",
        _headers({"x-slo-ttft-ms": 160_000, "x-slo-tpot-ms": 1600}),
        _targets(160_000, 1600),
    ),
    Way("`x-slo-class`", _headers({"x-slo-class": "by-header"}), _class("by-header")),
    Way(
        "`x-llm-d-slo-ttft-ms`, `x-llm-d-slo-tpot-ms`",
        _headers({"x-llm-d-slo-ttft-ms": 170_000, "x-llm-d-slo-tpot-ms": 1700}),
        _targets(170_000, 1700),
    ),
    Way("`x-dynamo-slo-ttft-ms`", _headers({"x-dynamo-slo-ttft-ms": 180_000}), _targets(180_000)),
    Way(
        "`x-dynamo-meta-slo-ttft-ms`",
        _headers({"x-dynamo-meta-slo-ttft-ms": 190_000}),
        _targets(190_000),
    ),
    Way("nothing: the default", _body({}), _targets(DEFAULT_MS)),
    Way("age: `x-request-start`", _started, _targets(DEFAULT_MS), AGE_MS),
    Way("age: `traceparent`", _traced, _targets(DEFAULT_MS), AGE_MS + 3000.0),
)


@dataclass(frozen=True)
class FrontEnd:
    """A column of the table: its title and the endpoints it serves."""

    title: str
    paths: tuple[str, ...] = tuple(PATHS)


STRAIGHT = FrontEnd("none: straight to both servers")
ROUTER = FrontEnd("Kairos' router")
SIDECAR = FrontEnd("llm-d's sidecar (stand-in)", (COMPLETIONS, CHAT))
SGLANG_PD = FrontEnd("sglang-router 0.3.2, PD")
SGLANG_PLAIN = FrontEnd("sglang-router 0.3.2 before Kairos' router")
SMG_PD = FrontEnd("smg 1.13.0, PD")
SMG_PLAIN = FrontEnd("smg 1.13.0 before Kairos' router")
LITELLM = FrontEnd("litellm 1.108.7 before Kairos' router", (COMPLETIONS, CHAT))
DYNAMO = FrontEnd("Dynamo 1.6.1")
FRONT_ENDS = (
    *(STRAIGHT, ROUTER, SIDECAR, SGLANG_PD, SGLANG_PLAIN),
    *(SMG_PD, SMG_PLAIN, LITELLM, DYNAMO),
)

Cells = dict[str, str]  # of a column: the name of the way, and where it arrives


def cell(front_end: FrontEnd, arrives: Mapping[str, bool]) -> str:
    """What the table says of these endpoints (by path)."""
    where = [PATHS[path] for path in front_end.paths if arrives[path]]
    if len(where) == len(front_end.paths):
        return ALL
    return ", ".join(where) or NOTHING


@dataclass
class Table:
    """The table of a page: rows by way, columns by title. Unknown rows and columns are an error."""

    cells: dict[str, Cells] = field(default_factory=dict)

    @classmethod
    def read(cls, text: str) -> Table:
        """From Markdown: the first line names the columns, the second is dashes."""
        lines = [
            [word.strip() for word in line.strip().strip("|").split("|")]
            for line in text.strip().splitlines()
        ]
        titles = lines[0][1:]
        cells: dict[str, Cells] = {title: {} for title in titles}
        for name, *row in lines[2:]:
            for title, said in zip(titles, row, strict=True):
                cells[title][name] = said
        return cls(cells)

    def write(self) -> str:
        """As Markdown, with a row for each way and a column for each front end."""
        titles = [front_end.title for front_end in FRONT_ENDS]
        lines = [f"| way | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
        for way in WAYS:
            row = [self.cells.get(title, {}).get(way.name, "") for title in titles]
            lines.append(f"| {way.name} | {' | '.join(row)} |")
        return "\n".join(lines)


PAGE = Path(__file__).resolve().parents[2] / "docs" / "front_ends.md"
MARKS = "<!-- conformance: written by make test-front-ends -->\n", "<!-- end of conformance -->"


def table_of(page: str) -> str:
    """The Markdown between the marks. ValueError unless they are there once, in order."""
    before, begin, rest = page.partition(MARKS[0])
    table, end, after = rest.partition(MARKS[1])
    if not begin or not end or MARKS[0] in after or MARKS[1] in before + after:
        raise ValueError("the page has not these marks once: " + " ".join(MARKS))
    return table


def renew(path: Path, title: str, column: Cells) -> None:
    """Write a measured column into the page's table."""
    page = path.read_text("utf-8")
    old = table_of(page)
    table = Table.read(old)
    table.cells[title] = column
    path.write_text(page.replace(MARKS[0] + old, MARKS[0] + table.write() + "\n"), "utf-8")
