"""``doctor --port``: what it writes, when it stops, and how it ends. No pair is started here."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from helpers.trees import NEWEST, changed_copy, sglang_folder
from sglang_kairos.engine.fingerprints import known_texts
from sglang_kairos.engine.judge import SeamVerdict
from sglang_kairos.engine.seams.table import SEAMS, Seam
from sglang_kairos.versions import doctor, port, upstream_texts
from sglang_kairos.versions.port import DONE, FAILED, NO_SGLANG, PERSON, Options, PortPlan

Printed = pytest.CaptureFixture[str]
NEXT = "0.5.99"
VERSION = {"_version.py": (f"'{NEWEST}'", f"'{NEXT}'")}
BATCH = "srt/managers/schedule_batch.py"
PREPARE = "sglang.srt.managers.schedule_batch:ScheduleBatch.prepare_for_decode"
HARMLESS = {
    BATCH: ("def prepare_for_decode(self):", "def prepare_for_decode(self):\n        self.new = 1")
}
HARMFUL = {BATCH: ("def prepare_for_decode(self):", "def prepare_for_decode(self, now=None):")}
SEAM = next(seam for seam in SEAMS if seam.target == PREPARE)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_version_of_harmless_changes_becomes_a_column_for_users(tmp_path: Path) -> None:
    tree = changed_copy(tmp_path / "next", NEWEST, {**VERSION, **HARMLESS})
    said: list[str] = []
    file = tmp_path / "mine.json"
    assert port.run(Options(str(tree), write=str(file)), said.append) == DONE
    text = "\n".join(said)
    assert f"SGLang {NEXT} in {tree}" in text
    assert "ScheduleBatch.prepare_for_decode: text changed, everything relied on is there" in text
    assert f"start with KAIROS_SEAMS={file}" in text
    column = known_texts.read(file)[NEXT]
    before = known_texts.read(known_texts.own_file())[NEWEST]
    changed = {t for t in before["seams"] if before["seams"][t] != column["seams"][t]}
    assert (set(column["seams"]), changed) == (set(before["seams"]), {PREPARE})
    assert column["relied_on"] == before["relied_on"]
    shown = (tmp_path / f"out/port-{NEXT}/ScheduleBatch.prepare_for_decode.diff").read_text()
    assert "+    self.new = 1" in shown and f"in v{NEWEST}" in shown


def test_what_needs_a_person_stops_the_port_until_it_is_accepted(
    tmp_path: Path, capsys: Printed
) -> None:
    tree = changed_copy(tmp_path / "next", NEWEST, {**VERSION, **HARMFUL})
    file = tmp_path / "mine.json"
    command = ["--port", str(tree), "--write", str(file)]
    assert doctor.main(command) == PERSON
    text = capsys.readouterr().out
    assert "!!  ScheduleBatch.prepare_for_decode: needs a person: a new parameter now" in text
    assert "nothing was written" in text and not file.exists()
    assert doctor.main([*command, "--accept", "ScheduleBatch.prepare_for_decode"]) == DONE
    assert PREPARE in known_texts.read(file)[NEXT]["seams"]


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    tree = changed_copy(tmp_path / "next", NEWEST, VERSION)
    own = known_texts.own_file().read_bytes()
    assert port.run(Options(str(tree), dry_run=True), lambda text: None) == DONE
    assert known_texts.own_file().read_bytes() == own
    assert [path.name for path in tmp_path.iterdir()] == ["next"]


def test_no_sglang_and_no_version_are_said(tmp_path: Path) -> None:
    said: list[str] = []
    assert port.run(Options(str(tmp_path)), said.append) == NO_SGLANG
    assert "holds no SGLang" in said[-1]
    tree = changed_copy(tmp_path / "next", NEWEST, VERSION)
    (tree / "sglang" / "_version.py").unlink()
    assert port.run(Options(str(tree)), said.append) == NO_SGLANG
    assert "state it with --version" in said[-1]


def verdict(kind: str, text: str = "0" * 16, seam: Seam = SEAM) -> SeamVerdict:
    return SeamVerdict(seam, kind, (), text)  # type: ignore[arg-type]


def test_a_column_holds_what_is_wrapped_and_what_a_person_accepted() -> None:
    other = next(seam for seam in SEAMS if not seam.relies_on)
    verdicts = [verdict("person"), verdict("another", seam=other)]
    assert PortPlan(NEXT, verdicts).column() == {"seams": {}, "relied_on": {}}
    assert PortPlan(NEXT, verdicts).open == verdicts[:1]
    accepted = PortPlan(NEXT, verdicts, ["ScheduleBatch.prepare_for_decode"])
    assert accepted.column()["seams"] == {PREPARE: "0" * 16} and accepted.open == []
    # What is not there cannot be wrapped, whoever accepts it.
    gone = PortPlan(NEXT, [verdict("person", "")], accepted.accepted)
    assert gone.open and gone.column()["seams"] == {}


def test_a_column_is_put_in_its_place(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    file.write_bytes(known_texts.own_file().read_bytes())
    port.add_column(file, PortPlan(NEXT, [verdict("harmless")]))
    table = known_texts.read(file)
    assert list(table) == [NEXT, *known_texts.read(known_texts.own_file())]
    assert table[NEXT]["seams"] == {PREPARE: "0" * 16}
    del table[NEXT]
    assert json.dumps(table, indent=1) + "\n" == known_texts.own_file().read_text()


@pytest.mark.parametrize("fails", ["", "patches", "import", "identity"])
def test_checks_run_in_order_until_one_fails(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def check(name: str, command: list[str], root: Path, say: object) -> bool:
        ran.append(name)
        return name != fails

    table = tmp_path / "table.json"
    table.write_text("{}")
    monkeypatch.setattr(port, "_ran", check)
    monkeypatch.setattr(known_texts, "own_file", lambda: table)
    monkeypatch.setattr(port, "_identity", lambda *of: [])
    tree = doctor.locate(str(sglang_folder(NEWEST)))
    options = Options(NEWEST)
    code = port._write(PortPlan(NEXT, [verdict("harmless")]), tree, options, lambda text: None)
    names = ["patches", "import", "identity"]
    assert ran == (names[: names.index(fails) + 1] if fails else names)
    assert code == (FAILED if fails else DONE)
    assert list(json.loads(table.read_text())) == [NEXT]


def test_a_known_text_is_read_from_a_wheel_where_the_version_is_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "sglang-kairos"
    folder.mkdir()
    with zipfile.ZipFile(folder / f"sglang-{NEXT}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("sglang/srt/m.py", "class A:\n    def f(self):\n        return 1\n")
    package = tmp_path / "tree" / "sglang"
    (package / "srt").mkdir(parents=True)
    (package / "srt" / "m.py").write_text("class A:\n    def f(self):\n        return 2\n")
    shown = upstream_texts.diff("sglang.srt.m:A.f", NEXT, package, "mine")
    assert shown.splitlines()[:2] == [f"--- A.f in v{NEXT}", "+++ A.f in mine"]
    assert "-    return 1" in shown and "+    return 2" in shown
    assert upstream_texts.source_of(NEXT, "sglang.srt.none") is None
