"""What handlers call of SGLang's own: known by its source, and none left out of the table."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.trees import TESTED_VERSIONS, sglang_folder
from sglang_kairos.engine.seams import callees
from sglang_kairos.engine.seams.callees import Callee
from sglang_kairos.engine.seams.table import SEAMS, SUPPORTED_VERSIONS
from sglang_kairos.engine.survey import fingerprint, survey
from sglang_kairos.versions import doctor

ENGINE = Path(callees.__file__).parents[1]
CALLEES = [value for value in vars(callees).values() if isinstance(value, Callee)]
# Names of SGLang that handlers use and that are no functions of the table, with the reason.
EXCUSED = {
    "_pending_chunked_abort_req": "an attribute: whatever touches it has a seam or is in the table",
    "_staging_outstanding": "an attribute, a dictionary of counts; looked up and popped from",
    "KVPoll": "an enumeration",
    "AddReqResult": "an enumeration",
    "HookType": "an enumeration",
    "HookRegistry": "public, and the plugin looks afterwards whether it did its work",
    "BaseGrammarObject": "a class whose `rollback` is only compared",
    "envs": "settings",
    "get_parallel": "settings",
    "app": "the FastAPI app",
    "LogitsProcessorOutput": "a class that is only asked for a method",
    "_scheduler_init_result": "what schedulers said when they came up, in Dynamo's worker",
}
OURS = ("_kairos", "__")
ANOTHER = dict.fromkeys(SUPPORTED_VERSIONS, "another")


def private_names(source: str) -> Iterator[str]:
    """Underscore attributes of objects that are not `self`, and what is imported from SGLang."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
            yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            if isinstance(node.args[1], ast.Constant):
                yield str(node.args[1].value)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang."):
            yield from (f"import {alias.name}" for alias in node.names)


def used_of_sglang() -> dict[str, str]:
    """Private names, and imported ones, with a file of engine/ that uses them."""
    return {
        name.removeprefix("import "): path.name
        for path in sorted(ENGINE.rglob("*.py"))
        for name in private_names(path.read_text("utf-8"))
        if name.startswith(("_", "import ")) and not name.startswith(OURS)
    }


def test_what_handlers_use_of_sglangs_own_is_in_the_table_or_excused() -> None:
    known = {callee.qualname.split(".")[-1] for callee in CALLEES} | set(EXCUSED)
    used = used_of_sglang()
    assert {name: file for name, file in used.items() if name not in known} == {}
    assert set(EXCUSED) <= set(used), "excused, and not used any more"


@pytest.mark.parametrize(
    "line",
    [
        "scheduler._secret()",
        "queue._secret = 1",
        "getattr(req, '_secret', None)",
        "from sglang.srt.x import _secret",
    ],
)
def test_a_private_name_does_not_slip_through(line: str) -> None:
    assert {name.removeprefix("import ") for name in private_names(line)} >= {"_secret"}
    assert "_secret" not in private_names("self._secret()")


def test_every_callee_is_relied_on_by_a_seam_and_says_what_for() -> None:
    relied_on = {callee.target for seam in SEAMS for callee in seam.relies_on}
    assert relied_on == {callee.target for callee in CALLEES}
    assert all(callee.taken for callee in CALLEES)


@pytest.mark.parametrize("callee", CALLEES, ids=lambda callee: callee.qualname)
def test_a_callee_is_known_or_absent_in_every_version(callee: Callee) -> None:
    assert callee.fingerprints
    assert set(callee.fingerprints) == set(SUPPORTED_VERSIONS) or callee.elsewhere


@pytest.mark.parametrize("version", TESTED_VERSIONS)
def test_whatever_touches_the_pending_abort_has_a_seam_or_is_in_the_table(version: str) -> None:
    path = sglang_folder(version) / "sglang" / "srt" / "managers" / "scheduler.py"
    tree = ast.parse(path.read_text("utf-8"))
    (scheduler,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Scheduler")
    touching = {
        method.name
        for method in scheduler.body
        if isinstance(method, ast.FunctionDef)
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute) and node.attr == "_pending_chunked_abort_req"
    }
    known = {
        known.qualname.split(".")[-1]
        for known in (*SEAMS, *CALLEES)
        if version in known.fingerprints
    }
    assert {name for name in touching if not name.startswith("init")} <= known | {"__init__"}


def test_a_changed_callee_is_a_problem_of_the_seam_that_relies_on_it() -> None:
    tree = sglang_folder(SUPPORTED_VERSIONS[0]) / "sglang"
    (seam,) = (seam for seam in SEAMS if callees.RETRACTION_ORDER in seam.relies_on)
    changed = replace(callees.RETRACTION_ORDER, known=ANOTHER)
    gone = replace(changed, target=changed.target + "_x")
    for callee, said in ((changed, "unknown source"), (gone, "no such function")):
        found = survey([replace(seam, relies_on=(callee,)), SEAMS[0]], tree)
        assert found.usable == [SEAMS[0]]
        (problem,) = found.problems
        assert callee.target in problem and "retract_decode" in problem and said in problem


def test_the_doctor_says_what_was_taken_for_granted() -> None:
    tree = doctor.locate(str(sglang_folder(SUPPORTED_VERSIONS[0])))
    (seam,) = (seam for seam in SEAMS if callees.RETRACTION_ORDER in seam.relies_on)
    known = dict.fromkeys(SUPPORTED_VERSIONS, "another")
    changed = replace(callees.RETRACTION_ORDER, known=known)
    check = doctor.about_callees(survey([replace(seam, relies_on=(changed,))], tree.root))
    assert not check.ok and check.headline.startswith("0 of 1")
    assert f"taken for granted: {changed.taken}" in str(check)


def test_the_upstream_of_a_seam_is_an_issue_and_what_it_is_about() -> None:
    named = [seam.upstream for seam in SEAMS if seam.upstream]
    assert named and all(re.fullmatch(r"sgl-project/sglang#\d+: \S.+", text) for text in named)


def test_a_fingerprint_of_a_property_is_that_of_its_function() -> None:
    source = "class A:\n    @property\n    def room(self):\n        return 1\n"
    assert fingerprint(source, "A.room") == fingerprint("def room(self):\n    return 1\n", "room")
