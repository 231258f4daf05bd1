"""The seams: known upstream sources, refusal of unknown ones, installation on small fakes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.trees import NEWEST, TESTED_VERSIONS, changed_copy, sglang_folder
from sglang_kairos.engine import plugin
from sglang_kairos.engine.fingerprints import known_texts
from sglang_kairos.engine.seams import losses
from sglang_kairos.engine.seams.table import SEAMS, SUPPORTED_VERSIONS, Seam
from sglang_kairos.engine.survey import Texts, fingerprint, namesakes, survey, way_out

SOURCE = '''
class Scheduler:
    @decorated
    def pick(self, queue):
        """Doc."""
        return queue[0]

def free(): return 1
'''

needs_sglang = pytest.mark.skipif(
    importlib.util.find_spec("sglang") is None, reason="SGLang is not installed"
)


def test_a_fingerprint_ignores_decorators_and_indentation() -> None:
    bare = SOURCE.replace("    @decorated\n", "")
    moved = "def pick(self, queue):\n" + '    """Doc."""\n    return queue[0]\n'
    want = fingerprint(SOURCE, "Scheduler.pick")
    assert want is not None
    assert fingerprint(bare, "Scheduler.pick") == want
    assert fingerprint(moved, "pick") == want


def test_a_fingerprint_sees_a_changed_body() -> None:
    changed = SOURCE.replace("queue[0]", "queue[1]")
    assert fingerprint(SOURCE, "Scheduler.pick") != fingerprint(changed, "Scheduler.pick")


@pytest.mark.parametrize("name", ["Scheduler.choose", "Scheduler", "nothing", "free.pick"])
def test_what_is_not_a_function_has_no_fingerprint(name: str) -> None:
    assert fingerprint(SOURCE, name) is None


def test_every_seam_says_why_and_has_a_handler_that_exists() -> None:
    for seam in SEAMS:
        assert seam.why and seam.how and seam.gone_when and seam.fingerprints
        assert seam.process in ("http", "scheduler", "mooncake")
        module, name = seam.handler.split(":")
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None
        assert f"\ndef {name}(" in Path(spec.origin).read_text()
    assert len({seam.target for seam in SEAMS}) == len(SEAMS)


@pytest.mark.parametrize("version", TESTED_VERSIONS)
def test_every_supported_sglang_is_one_that_kairos_knows(version: str) -> None:
    found = survey(package=sglang_folder(version) / "sglang")
    assert (found.version, found.problems) == (version, [])


def fake_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fakelang" / "srt").mkdir(parents=True)
    for folder in ("fakelang", "fakelang/srt"):
        (tmp_path / folder / "__init__.py").write_text("")
    (tmp_path / "fakelang" / "srt" / "sched.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))


def seam_on(target: str, known: str, **more: str) -> Seam:
    return Seam(target, "a:b", "why", "how", "gone", known={"0.5.23": known, **more})


def test_problems_name_the_upstream_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tree(tmp_path, monkeypatch)
    known = fingerprint(SOURCE, "Scheduler.pick") or ""
    module = "fakelang.srt.sched"
    assert survey([seam_on(f"{module}:Scheduler.pick", known)]).problems == []
    (changed,) = survey([seam_on(f"{module}:Scheduler.pick", "other")]).findings
    assert changed.state == "changed"
    assert f"{module}:Scheduler.pick: unknown source {known}" in changed.problem
    (missing,) = survey([seam_on(f"{module}:Scheduler.choose", known)]).findings
    assert missing.state == "gone"
    assert f"{module}:Scheduler.choose: SGLang has no such function" in missing.problem
    (nowhere,) = survey([seam_on("fakelang.srt.gone:f", known)]).problems
    assert "no module fakelang.srt.gone" in nowhere


def test_a_tree_is_judged_by_the_version_that_fits_it_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tree(tmp_path, monkeypatch)
    known, module = fingerprint(SOURCE, "Scheduler.pick") or "", "fakelang.srt.sched"
    pick, free = f"{module}:Scheduler.pick", f"{module}:free"
    both = [
        seam_on(pick, "other", **{"0.5.16": known}),
        seam_on(f"{module}:gone", "x"),
        seam_on(free, "y"),
    ]
    found = survey(both, tmp_path / "fakelang")
    assert (found.version, found.usable, found.problems) == ("0.5.16", both[:1], [])
    # A tie goes to the newest.
    tied = survey([seam_on(pick, "other", **{"0.5.16": "another"})])
    assert (tied.version, tied.usable, len(tied.problems)) == ("0.5.23", [], 1)


def test_namesakes_of_a_lost_function_are_found_nearest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tree(tmp_path, monkeypatch)
    package = tmp_path / "fakelang"
    (package / "far").mkdir()
    (package / "far" / "away.py").write_text("class A:\n    def pick(self): pass\n")
    (package / "srt" / "near.py").write_text(
        "async def pick(): pass\nif True:\n  def pick(): pass\n"
    )
    (package / "srt" / "broken.py").write_text("def pick(\n")
    lost = seam_on("fakelang.srt.sched:Policy.pick", "x")
    near = ["fakelang.srt.sched:Scheduler.pick", "fakelang.srt.near:pick"]
    assert namesakes(lost, package) == [*near, "fakelang.far.away:A.pick"]
    assert namesakes(lost, package, at_most=1) == near[:1]
    assert namesakes(seam_on(near[0], "x"), package)[0] == near[1]


def test_the_message_names_the_function_and_the_way_out() -> None:
    text = way_out(["x:Y.z: SGLang has no such function"], "v9.9")
    oldest_to_newest = f"{SUPPORTED_VERSIONS[-1]} to {SUPPORTED_VERSIONS[0]}"
    for part in ("x:Y.z", "v9.9", "--kairos off", "--kairos-strict seam", oldest_to_newest):
        assert part in text


POLICY = "srt/managers/schedule_policy.py"
RENAMED = {POLICY: ("def calc_priority(", "def compute_priority(")}
INSTALL = """
import logging
logging.basicConfig(format="%(message)s")
from sglang_kairos.engine.plugin import MISSING, install
install()
print(sorted(MISSING))
"""


def installing(tree: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """The plugin's own start, without SGLang's."""
    python = os.pathsep.join([str(tree), *filter(None, sys.path)])
    env = {**os.environ, "PYTHONPATH": python, "KAIROS": "on", **settings}
    command = [sys.executable, "-c", INSTALL]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@needs_sglang
def test_a_renamed_upstream_function_stops_the_start_and_is_named(tmp_path: Path) -> None:
    tree = changed_copy(tmp_path, NEWEST, RENAMED)
    run = installing(tree)
    assert run.returncode == 1
    assert "schedule_policy:SchedulePolicy.calc_priority: SGLang has no such function" in run.stderr
    assert "--kairos off" in run.stderr and "--kairos-strict seam" in run.stderr
    off = installing(tree, KAIROS="off")
    assert off.returncode == 0, off.stderr


@needs_sglang
def test_a_seam_left_out_takes_with_it_what_depends_on_it_and_says_so(tmp_path: Path) -> None:
    run = installing(changed_copy(tmp_path, NEWEST, RENAMED), KAIROS_STRICT="seam")
    assert run.returncode == 0, run.stderr
    wanted = ["PrefillAdder.add_one_req", "SchedulePolicy.calc_priority"]
    wanted += ["SchedulePolicy.shortest_prefill_chunk_limit", "Scheduler.get_new_batch_prefill"]
    assert run.stdout.strip() == str(wanted)
    assert "SchedulePolicy.calc_priority: SGLang has no such function" in run.stderr
    for name in wanted:
        assert f"Kairos: lost without {name}: {losses.LOST[name]}" in run.stderr


@needs_sglang
def test_without_the_seam_that_makes_the_state_there_is_no_start(tmp_path: Path) -> None:
    change = {"srt/managers/scheduler.py": ("def run_event_loop(", "def run_events(")}
    run = installing(changed_copy(tmp_path, NEWEST, change), KAIROS_STRICT="off")
    assert run.returncode == 1 and "refuses to start" in run.stderr
    assert "Scheduler.run_event_loop: SGLang has no such function" in run.stderr


@needs_sglang
def test_texts_that_a_user_vouches_for_are_known_and_said(tmp_path: Path) -> None:
    change = {POLICY: ("def calc_priority(\n", "def calc_priority(  # mine\n")}
    tree = changed_copy(tmp_path / "tree", NEWEST, change)
    target = "sglang.srt.managers.schedule_policy:SchedulePolicy.calc_priority"
    (seam,) = (seam for seam in SEAMS if seam.target == target)
    text, _ = Texts(tree / "sglang").of(seam)
    assert text not in seam.fingerprints.values()
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({NEWEST: {"seams": {target: text}}}))
    assert installing(tree).returncode == 1
    run = installing(tree, KAIROS_SEAMS=str(file))
    assert run.returncode == 0, run.stderr
    assert f"texts vouched for by KAIROS_SEAMS={file}: {target}" in run.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("{", "Expecting"),
        ("[]", "must be an object with a column for each SGLang version"),
        ('{"0.5.23": {"seam": {}}}', "0.5.23: must be an object with seams and relied_on"),
        ('{"0.5.23": {"seams": {"a:b": "12"}}}', "seams.a:b: must be 16 hexadecimal digits"),
    ],
)
def test_a_file_of_texts_that_is_none_stops_the_start(
    content: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.json"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("KAIROS_SEAMS", str(file))
    with pytest.raises(SystemExit, match="refuses to start: KAIROS_SEAMS=") as refused:
        plugin.install()
    assert said in str(refused.value) and str(file) in str(refused.value)
    known_texts.table.cache_clear()
    assert tuple(known_texts.table()) == SUPPORTED_VERSIONS


def test_every_seam_says_what_serves_in_a_version_that_has_none() -> None:
    by_name = {seam.qualname: seam for seam in SEAMS}
    for seam in SEAMS:
        lacking = set(SUPPORTED_VERSIONS).difference(seam.fingerprints)
        served = set(lacking).intersection(
            *(by_name[name].fingerprints for name in seam.instead or ["Scheduler.abort_request"])
        )
        # What is wrapped instead is wrapped where the seam is not; for the rest there is a reason.
        assert not lacking or seam.instead, seam.qualname
        assert served == lacking or seam.elsewhere, seam.qualname
        for name in seam.instead:
            assert not set(by_name[name].fingerprints) & set(seam.fingerprints)


def test_the_table_of_texts_names_no_function_that_kairos_does_not_use() -> None:
    wrapped = {seam.target for seam in SEAMS}
    relied_on = {callee.target for seam in SEAMS for callee in seam.relies_on}
    for version, column in known_texts.read(known_texts.own_file()).items():
        assert set(column["seams"]) <= wrapped, version
        assert set(column["relied_on"]) <= relied_on, version
