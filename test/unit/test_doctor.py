"""The doctor on the SGLangs that are here, on damaged ones and on none."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from helpers.trees import NEWEST, OLDEST, TESTED_VERSIONS, changed_copy, sglang_folder
from sglang_kairos import other_sglang
from sglang_kairos.config import ConfigError
from sglang_kairos.engine.fingerprints import known_texts
from sglang_kairos.engine.seams.table import SEAMS
from sglang_kairos.engine.survey import Finding, Survey
from sglang_kairos.other_sglang import NoSuchSglang, first_on_path, folder_of
from sglang_kairos.versions import doctor, patch

Printed = pytest.CaptureFixture[str]
UNCHANGED = {"_version.py": ("__version__", "__version__")}


@pytest.fixture(autouse=True)
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plugin and runtime are this machine's own affair."""
    monkeypatch.setattr(doctor, "check_loadable", lambda: None)
    monkeypatch.setattr(doctor, "about_runtime", lambda: doctor.Check("runtime", True, "fine"))


@pytest.mark.parametrize("version", TESTED_VERSIONS)
def test_a_supported_sglang_is_well(version: str, capsys: Printed) -> None:
    assert doctor.main(["--sglang", str(sglang_folder(version))]) == 0
    text = capsys.readouterr().out
    count = sum(version in seam.fingerprints for seam in SEAMS)
    assert "!!" not in text
    assert f"SGLang     {version} in " in text
    assert f"{count} of {count} as Kairos knows them from v{version}" in text
    assert f"for v{version} fit, 0 applied" in text


def test_what_moved_is_named_with_where_it_may_be_now(tmp_path: Path, capsys: Printed) -> None:
    policy, batch = "srt/managers/schedule_policy.py", "srt/managers/schedule_batch.py"
    tree = changed_copy(
        tmp_path,
        "0.5.23",
        {
            policy: ("class SchedulePolicy:", "class Policy:"),
            batch: ("def prepare_for_decode(self):", "def prepare_for_decode(self, now=None):"),
        },
    )
    assert doctor.main(["--sglang", str(tree)]) == 1
    text = capsys.readouterr().out
    module = "sglang.srt.managers.schedule_policy"
    assert f"gone: {module}:SchedulePolicy.calc_priority: SGLang has no such function" in text
    assert f"same name: {module}:Policy.calc_priority" in text
    prepare = "sglang.srt.managers.schedule_batch:ScheduleBatch.prepare_for_decode"
    assert f"needs a person: changed: {prepare}: a new parameter now" in text
    known = sum("0.5.23" in seam.fingerprints for seam in SEAMS)
    assert f"!!  seams      {known - 3} of {known} as Kairos knows them from v0.5.23" in text
    assert f"needs a person: gone: {module}:SchedulePolicy.shortest_prefill_chunk_limit" in text
    assert "served in other versions by: PrefillAdder.add_chunked_req" in text
    assert "!!  patches    3 of 4 for v0.5.23 fit" in text
    assert "docs/upstream.md" in text and "--kairos off" in text


def test_a_change_that_touches_nothing_relied_on_is_said_and_shown(
    tmp_path: Path, capsys: Printed
) -> None:
    batch = "srt/managers/schedule_batch.py"
    signature = "def prepare_for_decode(self):"
    tree = changed_copy(
        tmp_path, "0.5.23", {batch: (signature, f"{signature}\n        self.more = True")}
    )
    assert doctor.main(["--sglang", str(tree), "--diff"]) == 1
    text = capsys.readouterr().out
    assert "text changed, everything relied on is there: ScheduleBatch.prepare_for_decode" in text
    assert "needs a person" not in text
    shown = text[text.index("--- ScheduleBatch.prepare_for_decode in v0.5.23") :].splitlines()
    assert "+    self.more = True" in shown and len(shown) < 12


def test_a_text_of_another_version_is_named_with_it(
    monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    """The oldest version, seen by a table that knows it no more, and one text of it as the newest's."""
    columns = {v: dict(column) for v, column in known_texts.table().items()}
    oldest = columns.pop(OLDEST)["seams"]
    taken = "sglang.srt.managers.schedule_policy:SchedulePolicy.calc_priority"
    columns[NEWEST]["seams"] = {**columns[NEWEST]["seams"], taken: oldest[taken]}
    monkeypatch.setattr(known_texts, "table", lambda: columns)
    assert doctor.main(["--sglang", str(sglang_folder(OLDEST))]) == 1
    text = capsys.readouterr().out
    assert f"as in v{NEWEST}: SchedulePolicy.calc_priority" in text
    assert "text changed, " in text and "needs a person" not in text


BUILDS = [
    ("0.5.23+cu130", "(0, 5, 23, 'cu130')", "0.5.23"),
    ("0.5.24.dev12+g1a2b3c4", "(0, 5, 24, 'dev12', 'g1a2b3c4')", None),
    ("0.5.23.post1", "(0, 5, 23, 'post1')", None),
    ("0.5.24rc1", "(0, 5, 24, 'rc1')", None),
]


@pytest.mark.parametrize(("version", "parts", "patched_as"), BUILDS)
def test_a_build_is_read_as_setuptools_scm_writes_it(
    version: str, parts: str, patched_as: str | None, tmp_path: Path, capsys: Printed
) -> None:
    """A local part is the same source; a build before or after a release need not be."""
    old = "__version__ = version = '0.5.23'\n__version_tuple__ = version_tuple = (0, 5, 23)"
    new = f"__version__ = version = '{version}'\n__version_tuple__ = version_tuple = {parts}"
    tree = changed_copy(tmp_path, "0.5.23", {"_version.py": (old, new)})
    assert patch.find_tree(tree).version == version
    assert doctor.main(["--sglang", str(tree)]) == 0
    text = capsys.readouterr().out
    assert f"SGLang     {version} in " in text
    assert ("runs as 0.5.23" in text) == (patched_as is None)
    assert patch.main(["check", "--tree", str(tree)]) == (2 if patched_as is None else 0)
    assert ("is SGLang" in capsys.readouterr().err) == (patched_as is None)


def test_versions_are_in_order() -> None:
    ordered = ["0.5.9", "0.5.24.dev2", "0.5.24.dev12", "0.5.24rc1", "0.5.24", "0.5.24.post1"]
    ordered += ["0.5.25", "v0.6.0+cu130", "1.0"]
    assert sorted(set(ordered), key=known_texts.order) == ordered
    assert known_texts.order("main") < known_texts.order("0.1")
    assert known_texts.release("v0.5.23+cu130") == "0.5.23"
    assert known_texts.release("0.5.24.dev12+gabc") == "0.5.24.dev12"


def test_an_unknown_version_with_known_functions_is_well(tmp_path: Path, capsys: Printed) -> None:
    tree = changed_copy(tmp_path, "0.5.23", {"_version.py": ("0.5.23", "0.5.99")})
    assert doctor.main(["--sglang", str(tree)]) == 0
    assert "0.5.99 in " in (text := capsys.readouterr().out) and "runs as 0.5.23" in text


def test_a_tree_without_a_version_is_judged_by_its_source(tmp_path: Path, capsys: Printed) -> None:
    tree = changed_copy(tmp_path, NEWEST, UNCHANGED)
    (tree / "sglang" / "_version.py").unlink()
    assert doctor.main(["--sglang", str(tree)]) == 0
    assert "does not say its version; taken for 0.5.23" in capsys.readouterr().out


def test_no_sglang_and_no_plugin_are_reported(
    tmp_path: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ConfigError("sglang-kairos is not installed")

    monkeypatch.setattr(doctor, "check_loadable", missing)
    assert doctor.main(["--sglang", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "!!  plugin     sglang-kairos is not installed" in text
    assert f"!!  SGLang     {tmp_path} holds no SGLang" in text


def beside(prefix: Path, version: str) -> Path:
    package = prefix / f"sglang-{version}" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    return package.parent


def test_another_sglang_is_named_by_folder_or_version(tmp_path: Path) -> None:
    folder = beside(tmp_path, "1.2.3")
    assert folder_of(str(folder)) == folder
    assert folder_of("1.2.3", tmp_path) == folder_of("v1.2.3", tmp_path) == folder
    with pytest.raises(NoSuchSglang, match=r"--sglang 1\.2\.4: .* 1\.2\.3 "):
        folder_of("1.2.4", tmp_path)
    with pytest.raises(NoSuchSglang, match="none"):
        folder_of("1.2.4", tmp_path / "empty")


def test_another_sglang_goes_first_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = beside(tmp_path, "1.2.3")
    assert first_on_path(folder, {}) == {"PYTHONPATH": str(folder)}
    assert first_on_path(folder, {"PYTHONPATH": "a:b"}) == {"PYTHONPATH": f"{folder}:a:b"}
    monkeypatch.setattr(sys, "path", ["before"])
    monkeypatch.delitem(sys.modules, "sglang", raising=False)
    monkeypatch.setenv("PYTHONPATH", "c")
    assert other_sglang.use(str(folder)) == folder
    assert sys.path == [str(folder), "before"]
    assert os.environ["PYTHONPATH"] == f"{folder}:c"
    monkeypatch.setitem(sys.modules, "sglang", ModuleType("sglang"))
    with pytest.raises(NoSuchSglang, match="imported already"):
        other_sglang.use(str(folder))


def test_texts_that_a_file_vouches_for_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.json"
    monkeypatch.setenv("KAIROS_SEAMS", str(file))
    found = Survey(NEWEST, [], [])
    broken = doctor.about_vouched(found)
    assert not broken.ok and str(file) in broken.headline
    file.write_text("{}")
    fine = doctor.about_vouched(found)
    assert (fine.ok, fine.headline) == (True, f"0 texts by KAIROS_SEAMS={file}")
    seam = SEAMS[0]
    mine = Finding(seam, "same", "", None, "0" * 16, ("0.5.99",))
    theirs = Finding(seam, "same", "", None, seam.fingerprints[NEWEST], (NEWEST,))
    assert doctor.about_vouched(Survey(NEWEST, [theirs], [])).headline.startswith("0 texts")
    named = doctor.about_vouched(Survey(NEWEST, [mine, theirs], []))
    assert named.headline.startswith("1 texts") and named.details == (seam.target,)
