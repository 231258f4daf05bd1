"""What handlers rely on of SGLang: declared as it is used, and missed where it is not there."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import harvest
from helpers.trees import TESTED_VERSIONS, sglang_folder
from sglang_kairos.engine import judge
from sglang_kairos.engine.fingerprints.meanings import (
    AskedBy,
    Decorated,
    Flow,
    Mentions,
    Rebinds,
    Sets,
    SourceCheck,
    Takes,
)
from sglang_kairos.engine.fingerprints.trials import BusyTime
from sglang_kairos.engine.fingerprints.upstream_ast import Signature, SourceTree
from sglang_kairos.engine.judge import Judge, SeamVerdict
from sglang_kairos.engine.seams import relied
from sglang_kairos.engine.seams.relied_meanings import MEANINGS
from sglang_kairos.engine.seams.table import SEAMS, SUPPORTED_VERSIONS, Seam

RUN_LOOP = "Scheduler.run_event_loop"
OURS = {"_kairos"}  # what Kairos keeps of a request: its own name, no layout of SGLang's


def declared(seam: str) -> set[str]:
    choices = (choice for need in relied.needs(seam) for choice in need.choices)
    return {choice.split(":")[-1].split(".")[-1] for choice in choices}


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.qualname)
def test_what_a_handler_uses_of_sglang_is_declared_and_nothing_else(seam: Seam) -> None:
    used = harvest.of_handler(seam.handler) - OURS
    of_all = set() if seam.qualname == RUN_LOOP else harvest.of_state()
    assert declared(seam.qualname) >= used - of_all, "used, and not declared"
    assert declared(seam.qualname) <= used, "declared, and not used"


def test_what_the_state_uses_is_declared_at_the_seam_that_makes_it() -> None:
    assert harvest.of_state() - OURS <= declared(RUN_LOOP)


def test_a_use_does_not_slip_through() -> None:
    with pytest.raises(harvest.Unknown, match="whose is 'somebody'"):
        harvest.uses_in("def f(somebody):\n    return somebody.secret")
    assert harvest.uses_in("def f(req):\n    return req.secret, getattr(req, 'other', 0)") == {
        "secret",
        "other",
    }


def test_every_declaration_names_a_seam_an_owner_and_a_version() -> None:
    assert set(relied.ATTRIBUTES) <= {seam.qualname for seam in SEAMS}
    needs = [need for seam in relied.ATTRIBUTES for need in relied.needs(seam)]
    owners = {c.partition(".")[0] for need in needs for c in need.choices if ":" not in c}
    assert owners == set(relied.OWNERS)
    versions = {version for need in needs for version in (need.since, need.until)}
    assert versions <= {"", *SUPPORTED_VERSIONS}


def test_a_word_of_the_table_is_read() -> None:
    assert relied.Need.parse("a.x|b.y@0.5.17-0.5.20") == relied.Need(
        ("a.x", "b.y"), "0.5.17", "0.5.20"
    )
    assert relied.Need.parse("+a.x") == relied.Need(("a.x",), ours=True)


@functools.cache
def verdicts(version: str, without: str = "") -> dict[str, SeamVerdict]:
    """Of the SGLang of a version, its own texts taken for unknown; `without`: a layout unknown too."""
    found = Judge(
        sglang_folder(version) / "sglang",
        version,
        [other for other in SUPPORTED_VERSIONS if other != version],
        lambda choice: choice != without,
    ).verdicts()
    return {verdict.seam.qualname: verdict for verdict in found}


@pytest.mark.parametrize("version", TESTED_VERSIONS)
def test_a_version_taken_out_of_the_table_is_judged_as_it_was_by_a_person(version: str) -> None:
    found = verdicts(version)
    assert {name for name, one in found.items() if one.kind == "person"} == set()
    wrapped = {name for name, one in found.items() if one.wrapped}
    known = {seam.qualname for seam in SEAMS if version in seam.fingerprints}
    assert wrapped == known & set(found)  # of a seam that one version alone has no text is known


def test_the_layout_that_0_5_21_lacks_would_have_been_missed() -> None:
    found = verdicts("0.5.21", without="parallel.tp_size")
    assert found[RUN_LOOP].kind == "person"
    assert "no scheduler.tp_size or scheduler.ps" in str(found[RUN_LOOP])


@pytest.mark.parametrize("version", ["0.5.17", "0.5.18", "0.5.19", "0.5.20"])
def test_a_counter_of_other_spans_is_not_taken_for_that_of_0_5_21(version: str) -> None:
    found = verdicts(version)
    counted = found["Scheduler._record_step_counters"]
    assert counted.kind == "another" and "run_batch, Scheduler.process_batch_result serves" in str(
        counted
    )
    assert "total_prefill_busy_us, not" in str(counted)
    assert found["Scheduler.run_batch"].wrapped and found["Scheduler.process_batch_result"].wrapped


@pytest.mark.parametrize("version", ["0.5.21", "0.5.22", "0.5.23"])
def test_a_chunk_that_another_limit_bounds_is_not_taken_for_that_of_0_5_20(version: str) -> None:
    found = verdicts(version)
    chunk = found["PrefillAdder.add_chunked_req"]
    assert chunk.kind == "another" and "shortest_prefill_chunk_limit serves" in str(chunk)
    assert "depends on self.chunked_req_limit" in str(chunk)


def tree_of(folder: Path, **modules: str) -> SourceTree:
    (folder / "sglang").mkdir()
    for name, source in modules.items():
        (folder / "sglang" / f"{name}.py").write_text(source)
    return SourceTree(folder / "sglang")


CLASS = "class A:\n"
KNOWN_APART = [
    (AskedBy("sglang.m:A.f", "sglang.m", ("g",)), "def g(self): self.f()", "def g(self): self.h()"),
    (AskedBy("sglang.m:A.f", "sglang.m", ("g",)), "def g(self): self.f()", "def h(self): self.f()"),
    (Mentions("sglang.m:A.f", ("free",)), "def f(self): self.free()", "def f(self): self.hold()"),
    (Takes("sglang.m:A.f", 2), "def f(self, a, b=1): pass", "def f(self, a, b): pass"),
    (Takes("sglang.m:A.f", 2), "def f(self, a, *, b=2): pass", "def f(self): pass"),
    (Takes("sglang.m:A.f", 1, ("a",)), "def f(self, a): pass", "def f(self, b=1): pass"),
    (
        Decorated("sglang.m:A.f", "property"),
        "@property\n    def f(self): pass",
        "def f(self): pass",
    ),
    (
        Sets("sglang.m:A.f", "slot", ("self.req",)),
        "def f(self): self.slot = self.req",
        "def f(self): self.slot = None",
    ),
    (Rebinds("sglang.m:A.f", ()), "def f(self): self.x = self.x[1:]", "def f(self): self.x[1] = 2"),
    (Rebinds("sglang.m:A.f", ()), "def f(self): self.x = None", "def f(self): self.x += 1"),
    (Rebinds("sglang.m:A.f", ()), "def f(self): self.x", "def f(self): self.x.append(1)"),
    (Rebinds("sglang.m:A.f", ()), "def f(self): self.x", "def f(self): self.x.copy_(1)"),
    (Rebinds("sglang.m:A.f", ("look",)), "def f(self): self.x.look()", "def f(self): self.x.do()"),
    (Rebinds("sglang.m:A.f", ()), "def f(self): rebind(self)", "def f(self): change(self)"),
    (Rebinds("sglang.m:A.f", ()), "def f(self): len(self)", "def f(self): unknown(self)"),
    (
        Rebinds("sglang.m:A.f", ()),
        "def f(self): self.g()\n    def g(self): self.x = 1",
        "def f(self): self.g()\n    def g(self): self.x[0] = 1",
    ),
    (
        Flow("sglang.m:A.f", "n", ("rest",)),
        "def f(self):\n        m = self.rest\n        n = min(m, 3)",
        "def f(self):\n        m = self.rest\n        m = min(m, self.limit)\n        n = m",
    ),
    (Flow("sglang.m:A.f", "n", ()), "def f(self): n = 1", "def f(self): return 1"),
]
HELPERS = "\ndef rebind(b): b.x = b.x[1:]\ndef change(b): b.x[0] = 1\n"


@pytest.mark.parametrize(("check", "good", "bad"), KNOWN_APART)
def test_a_meaning_is_told_from_another(
    check: SourceCheck, good: str, bad: str, tmp_path: Path
) -> None:
    for name, source in (("good", good), ("bad", bad)):
        folder = tmp_path / name
        folder.mkdir()
        faults = check.faults(tree_of(folder, m=f"{CLASS}    {source}\n{HELPERS}"))
        assert bool(faults) == (name == "bad"), faults


OWN_TIME = """
class A:
    def init(self):
        self.end: float | None = None
    def count(self, batch, result):
        now = time.monotonic()
        start = batch.launch_ts if self.end is None else max(batch.launch_ts, self.end)
        self.end = now
        self.busy_us += int((now - start) * 1e6)
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("", "", ""),
        ("max(batch.launch_ts, self.end)", "batch.launch_ts", "30.4 s that ends at 32 s adds 1.6"),
        ("self.busy_us += int", "int", "adds 0 s"),
        ("now - start", "self.end - batch.launch_ts - 1", "10.5 s adds -0.5 s"),
        ("self.end is None", "self.nothing", "could not be tried: AttributeError"),
    ],
)
def test_busy_time_is_tried_on_steps(old: str, new: str, said: str, tmp_path: Path) -> None:
    tree = tree_of(tmp_path, m=OWN_TIME.replace(old, new))
    faults = BusyTime("sglang.m:A.count", "busy_us").faults(tree)
    assert said in " ".join(faults) and bool(faults) == bool(said)


def test_attributes_are_found_in_bases_branches_and_functions(tmp_path: Path) -> None:
    tree = tree_of(
        tmp_path,
        m="from sglang.n import Base\nclass A(Base):\n    a: int\n    if X:\n        b = 1\n"
        "    def c(self):\n        self.d, other.e = 1, 2\n        with open() as self.f: pass\n",
        n="class Base:\n    def g(self): self.h += 1\nclass Closed:\n    __slots__ = ('x',)\n",
    )
    assert tree.members("sglang.m:A") == {"a", "b", "c", "d", "f", "g", "h"}
    assert tree.members("sglang.m:B") is None and tree.members("sglang.o:A") is None
    assert tree.members("sglang.n:*") == {"g", "h", "__slots__"}
    assert tree.assigned("sglang.m") == {"d", "e", "f"}
    assert tree.takes_new("sglang.m:A") and not tree.takes_new("sglang.n:Closed")
    assert tree.has("sglang.m:Base") and not tree.has("sglang.m:Closed")
    assert tree.origin("sglang.m", "Base") == "sglang.n:Base"


parameters = st.lists(st.sampled_from("abcdef"), unique=True, max_size=4)


def signature(names: list[str], optional: int) -> Signature:
    given = ("self", *names)
    return Signature(given, given[: max(1, len(given) - optional)], (), False)


@given(parameters, st.integers(0, 3), st.booleans())
def test_a_handler_of_the_same_parameters_fits_and_a_new_one_is_said(
    names: list[str], optional: int, takes_more: bool
) -> None:
    function = signature(names, optional)
    handler = Signature(("original", *function.names), ("original",), (), takes_more)
    assert judge._misfits(handler, function, takes_more) == []
    more = signature([*names, "new"], optional)
    assert bool(judge._misfits(handler, more, takes_more)) != takes_more
    if names:
        renamed = signature([*names[:-1], "renamed"], optional)
        assert "parameter renamed in the place of" in " ".join(
            judge._misfits(handler, renamed, takes_more)
        )


def test_every_meaning_is_of_a_function_in_the_table() -> None:
    known = {seam.target for seam in SEAMS}
    known |= {callee.target for seam in SEAMS for callee in seam.relies_on}
    assert {check.target for check in MEANINGS} <= known
