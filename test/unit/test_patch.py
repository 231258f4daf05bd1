"""Patching an SGLang tree: a small made-up one, and a copy of the installed one's touched files."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from helpers.trees import TESTED_VERSIONS, sglang_folder
from sglang_kairos.engine.seams.table import SEAMS, Seam
from sglang_kairos.engine.survey import fingerprint
from sglang_kairos.versions import patch

VERSION = "9.9.9"
SMALL = {
    "__init__.py": b"",
    "_version.py": b"__version__ = version = '9.9.9'\n",
    "srt/one.py": b"".join(b"line %d\n" % i for i in range(1, 31)),
    # CRLF in places, a byte that is not UTF-8, and no newline at the end.
    "srt/two.py": b"a\r\nb\nc\r\nd \xff\ne\nf\ng\nh\nlast",
}


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"kairos_test_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def make(repo_root: Path) -> ModuleType:
    return load(repo_root / "patches" / "make.py")


@pytest.fixture
def seams(repo_root: Path) -> ModuleType:
    return load(repo_root / "patches" / "kairos_seams.py")


def snapshot(root: Path) -> dict[str, tuple[bytes, int]]:
    """Every file under `root`, stray ones included."""
    files = (path for path in root.rglob("*") if path.is_file() and ".git" not in path.parts)
    return {str(p.relative_to(root)): (p.read_bytes(), p.stat().st_mode) for p in files}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout with the files of SMALL."""
    package = tmp_path / "checkout" / "python" / "sglang"
    for path, content in SMALL.items():
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).write_bytes(content)
    (package / "srt/one.py").chmod(0o640)
    return tmp_path / "checkout"


@pytest.fixture
def folder(tmp_path: Path, make: ModuleType) -> Path:
    """Two patches for SMALL that share a file and shift each other's lines."""
    one, two = SMALL["srt/one.py"], SMALL["srt/two.py"]
    first = one.replace(b"line 3\n", b"line 3\nmore\n").replace(b"line 20\n", b"line twenty\n")
    second = first.replace(b"line 28\n", b"line 28\neven more\n")
    steps = [
        ({"srt/one.py": one}, {"srt/one.py": first}),
        (
            {"srt/one.py": first, "srt/two.py": two, "srt/new.py": None},
            {
                "srt/one.py": second,
                "srt/two.py": two.replace(b"d \xff\n", b"D\xfe\r\n"),
                "srt/new.py": b"new\n\nfile\n",
            },
        ),
    ]
    target = tmp_path / "patches" / f"v{VERSION}"
    target.mkdir(parents=True)
    for number, (before, after) in enumerate(steps, 1):
        content = make.render(f"Change {number}", "Because.", before, after)
        (target / f"000{number}-change.patch").write_bytes(content)
    return target.parent


@pytest.fixture
def run(folder: Path, tree: Path) -> Callable[..., int]:
    def call(verb: str, *more: str, on: Path = tree) -> int:
        return patch.main([verb, "--patches", str(folder), "--tree", str(on), *more])

    return call


Run = Callable[..., int]


def test_apply_then_revert_restores_every_byte_and_mode(run: Run, tree: Path) -> None:
    before = snapshot(tree)
    assert run("apply") == 0
    after = snapshot(tree)
    assert after["python/sglang/srt/new.py"][0] == b"new\n\nfile\n"
    assert after["python/sglang/srt/two.py"][0].endswith(b"a\r\nb\nc\r\nD\xfe\r\ne\nf\ng\nh\nlast")
    assert b"even more\n" in after["python/sglang/srt/one.py"][0]
    assert run("revert") == 0
    assert snapshot(tree) == before


def test_applying_twice_says_so_and_changes_nothing(
    run: Run, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("apply")
    after = snapshot(tree)
    assert run("apply") == 0
    assert "already applied" in capsys.readouterr().out
    assert snapshot(tree) == after
    run("revert")
    assert run("revert") == 0
    assert "nothing to revert" in capsys.readouterr().out


@pytest.mark.parametrize("inside", [".", "python", "python/sglang"])
def test_a_tree_may_be_named_at_any_level(run: Run, tree: Path, inside: str) -> None:
    assert run("apply", on=tree / inside) == 0
    assert (tree / "python/sglang/srt/new.py").exists()


def test_the_installed_package_is_found_without_importing_it(
    tree: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / "python/sglang/__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.delitem(sys.modules, "sglang", raising=False)
    monkeypatch.syspath_prepend(str(tree / "python"))
    assert patch.main(["apply", "--patches", str(folder)]) == 0
    assert (tree / "python/sglang/srt/new.py").exists()


def test_a_series_that_someone_began_is_completed(run: Run, tree: Path, folder: Path) -> None:
    first, *_ = patch.series(folder, VERSION)
    pushed = patch.rewrite(first.changes[0], SMALL["srt/one.py"])
    assert pushed is not None
    (tree / "python/sglang/srt/one.py").write_bytes(pushed)
    begun = snapshot(tree)
    assert run("apply") == 0
    completed = snapshot(tree)
    assert run("apply") == 0
    assert run("revert") == 0
    assert snapshot(tree)["python/sglang/srt/one.py"][0] == SMALL["srt/one.py"]
    assert completed != begun


def test_a_modified_line_stops_everything(
    run: Run, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = tree / "python/sglang/srt/two.py"
    two.write_bytes(SMALL["srt/two.py"].replace(b"f\n", b"F\n"))
    before = snapshot(tree)
    assert run("check") == 1
    report = capsys.readouterr().out
    assert "0001-change.patch: not applied" in report
    assert "0002-change.patch: does not fit: python/sglang/srt/two.py: hunk 1: line 6" in report
    assert run("apply") == 1
    assert run("revert") == 1
    assert snapshot(tree) == before


def test_a_shifted_context_does_not_fit(run: Run, tree: Path) -> None:
    one = tree / "python/sglang/srt/one.py"
    one.write_bytes(b"# mine\n" + one.read_bytes())
    assert run("apply") == 1
    assert not (tree / "python/sglang/srt/new.py").exists()


@pytest.mark.parametrize("verb", ["apply", "revert"])
def test_a_half_applied_tree_is_recognised_and_mended(
    run: Run, tree: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(tree)
    run("apply")
    after = snapshot(tree)
    (tree / "python/sglang/srt/two.py").write_bytes(SMALL["srt/two.py"])
    assert run("check") == 1
    assert "0002-change.patch: partly applied: 2 of 3 files" in capsys.readouterr().out
    assert run(verb) == 0
    assert snapshot(tree) == {"apply": after, "revert": before}[verb]


def test_a_new_file_left_by_an_uninstall_is_taken_over(run: Run, tree: Path) -> None:
    left = tree / "python/sglang/srt/new.py"
    left.write_bytes(b"new\n\nfile\n")
    assert run("apply") == 0
    assert run("revert") == 0
    assert not left.exists()
    left.write_bytes(b"someone else's\n")
    assert run("apply") == 1
    assert left.read_bytes() == b"someone else's\n"


def test_a_wrong_version_is_refused_with_both_versions_named(
    run: Run, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "python/sglang/_version.py").write_text("__version__ = version = '9.9.8'\n")
    before = snapshot(tree)
    for more in ((), ("--version", VERSION)):
        assert run("apply", *more) == 2
        message = capsys.readouterr().err
        assert "9.9.8" in message
        assert VERSION in message
    assert snapshot(tree) == before


def test_a_tree_without_a_version_needs_it_stated(
    run: Run, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "python/sglang/_version.py").unlink()
    assert run("apply") == 2
    assert "--version" in capsys.readouterr().err
    assert run("apply", "--version", "9.9.8") == 2
    assert run("apply", "--version", VERSION) == 0


def test_a_wheel_tells_its_version_by_its_metadata(
    run: Run, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "python/sglang/_version.py").unlink()
    info = tree / "python" / f"sglang-{VERSION}+cu129.dist-info"
    info.mkdir()
    (info / "RECORD").write_text("")
    assert run("apply") == 0
    assert "RECORD" in capsys.readouterr().out


def test_a_folder_without_sglang_is_refused(run: Run, tmp_path: Path) -> None:
    assert run("check", on=tmp_path) == 2


@pytest.mark.parametrize("failing", range(3))
def test_a_failure_while_writing_rolls_back(
    run: Run, tree: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    before = snapshot(tree)
    replace, calls = patch.os.replace, []

    def replace_or_fail(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == failing + 1:
            raise OSError("the disk is gone")
        replace(source, target)

    monkeypatch.setattr(patch.os, "replace", replace_or_fail)
    assert run("apply") == 2
    assert len(calls) > failing
    assert snapshot(tree) == before


def test_a_full_disk_is_noticed_before_anything_changes(
    run: Run, tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(tree)
    calls: list[int] = []

    def full(_: int) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError("no space left on device")

    monkeypatch.setattr(patch.os, "fsync", full)
    assert run("apply") == 2
    assert "nothing was changed" in capsys.readouterr().err
    assert snapshot(tree) == before


def test_what_cannot_be_restored_is_named(
    run: Run, tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace, calls = patch.os.replace, []

    def replace_two(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) > 2:
            raise OSError("the disk is gone")
        replace(source, target)

    monkeypatch.setattr(patch.os, "replace", replace_two)
    assert run("apply") == 2
    message = capsys.readouterr().err
    one = tree / "python/sglang/srt/one.py"
    assert f"could not restore {one}" in message
    assert "nothing was changed" not in message
    assert not list(tree.rglob(".*.py.*"))


def test_a_read_only_file_is_an_error_that_says_so(
    run: Run, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "python/sglang/srt/two.py").chmod(0o444)
    before = snapshot(tree)
    assert run("apply") == 2
    assert "two.py is read-only" in capsys.readouterr().err
    assert snapshot(tree) == before


def test_a_hard_linked_original_is_left_alone(run: Run, tree: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache.py"
    cache.hardlink_to(tree / "python/sglang/srt/one.py")
    run("apply")
    assert cache.read_bytes() == SMALL["srt/one.py"]


HEAD = "diff --git a/python/sglang/x.py b/python/sglang/x.py\n"
NAMES = "--- a/python/sglang/x.py\n+++ b/python/sglang/x.py\n"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("Subject: words only\n", "no diff"),
        (
            HEAD + "deleted file mode 100644\n--- a/python/sglang/x.py\n+++ /dev/null\n",
            "only edits",
        ),
        (HEAD + "old mode 100644\nnew mode 100755\n" + NAMES + "@@ -1 +1 @@\n-a\n+b\n", "only"),
        (HEAD + "GIT binary patch\n", "only edits"),
        (HEAD + NAMES, "malformed"),
        (HEAD + NAMES.replace("a/python", "a/other") + "@@ -1 +1 @@\n-a\n+b\n", "renames"),
        ((HEAD + NAMES).replace("x.py", "../../x.py") + "@@ -1 +1 @@\n-a\n+b\n", "outside"),
        ((HEAD + NAMES).replace("sglang/", "other/") + "@@ -1 +1 @@\n-a\n+b\n", "outside"),
        (HEAD + NAMES + "@@ -1,2 +1 @@\n-a\n+b\n", "cannot read"),
        (HEAD + NAMES + "@@ -1 +1 @@\n-a\n-a\n+b\n", "longer"),
        (HEAD + NAMES + "@@ -1 +1 @@\n-a\n\\ No newline at end of file\n+b\n", "cannot read"),
        (HEAD + NAMES + "@@ -3,0 +4 @@\n+b\n", "without context"),
        (HEAD + NAMES + "@@ -5 +5 @@\n-a\n+b\n@@ -2 +2 @@\n-a\n+b\n", "overlap"),
        (HEAD + NAMES + "@@ -1 +1 @@\n-a\n+b\nstray\n", "stray"),
    ],
)
def test_what_cannot_be_applied_exactly_is_not_read(text: str, complaint: str) -> None:
    with pytest.raises(patch.PatchError, match=complaint):
        patch.parse("some.patch", text.encode())


def test_what_git_format_patch_writes_is_read() -> None:
    hunk = "@@ -1 +1 @@ def f():\n-a\n+b\n"
    mail = f"Subject: [PATCH 2/3] Words\n---\n x.py | 2 +-\n\n{HEAD}{NAMES}{hunk}-- \n2.39.5\n\n"
    read = patch.parse("some.patch", mail.encode())
    assert read.subject == "Words"
    assert patch.rewrite(read.changes[0], b"a\nc") == b"b\nc"


def test_the_list_names_every_patch(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert patch.main(["list", "--patches", str(folder)]) == 0
    assert "0002-change.patch: Change 2" in capsys.readouterr().out


def test_a_seam_without_a_handler_is_the_function(seams: ModuleType) -> None:
    def add(a: int, b: int = 1) -> int:
        """Adds."""
        return a + b

    marked = seams.kairos_seam("m:add")(add)
    assert marked(1, b=2) == 3
    assert marked.__wrapped__ is add
    assert marked.__kairos_seam__ == "m:add"
    assert inspect.signature(marked) == inspect.signature(add)
    assert inspect.getsource(marked) == inspect.getsource(add)
    assert (marked.__name__, marked.__doc__) == ("add", "Adds.")
    assert {"m:add"} == seams.PATCHED


def test_a_handler_gets_the_function_and_decides(seams: ModuleType) -> None:
    class Thing:
        def __init__(self, base: int) -> None:
            self.base = base

        @seams.kairos_seam("m:Thing.plus")
        def plus(self, n: int) -> int:
            return self.base + n

    seams.install("m:Thing.plus", lambda original, self, n: 10 * original(self, n))
    assert Thing(1).plus(2) == 30
    seams.install("m:Thing.plus", lambda original, self, *, n: self.base)
    assert Thing(7).plus(n=0) == 7


def test_a_handler_for_an_unknown_seam_is_refused(seams: ModuleType) -> None:
    with pytest.raises(LookupError, match="m:gone"):
        seams.install("m:gone", lambda original: None)


def seam_of(source: str, target: str) -> Seam:
    found = fingerprint(source, target.split(":")[1])
    return Seam(target, "", "", "", "", known={VERSION: found or ""})


def test_marks_go_outermost_but_under_descriptors(make: ModuleType, seams: ModuleType) -> None:
    source = (
        '"""Doc."""\n\nfrom __future__ import annotations\n\nimport a\nimport b\n'
        "from sglang.srt.a import (\n    x,\n)\nfrom sglang.srt.z import y\n\n\n"
        "class C:\n    @stage\n    def f(self):\n        return 1\n\n"
        "    @staticmethod\n    @stage\n    def g():\n        return 2\n\n\n"
        "def h_with_quite_a_long_name_so_that_the_mark_needs_more_than_one_line():\n    return 3\n"
    )
    targets = ["sglang.srt.m:C.f", "sglang.srt.m:C.g"]
    targets += [f"sglang.srt.m:{source.split('def ')[-1].split('(')[0]}"]
    marked = make.mark(source, [seam_of(source, target) for target in targets], VERSION)
    lines = marked.split("\n")
    at = lines.index("from sglang.srt.kairos_seams import kairos_seam")
    assert lines[at + 1] == "from sglang.srt.z import y"
    assert '    @kairos_seam("sglang.srt.m:C.f")\n    @stage\n    def f' in marked
    assert '    @staticmethod\n    @kairos_seam("sglang.srt.m:C.g")\n    @stage\n' in marked
    assert f'@kairos_seam(\n    "{targets[2]}"\n)\ndef h_with' in marked
    for target in targets:
        name = target.split(":")[1]
        assert fingerprint(marked, name) == fingerprint(source, name)

    def stage(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def staged(*args: Any) -> Any:
            return ("staged", function(*args))

        return staged

    body = marked[marked.index("class C") :]
    scope: dict[str, Any] = {"kairos_seam": seams.kairos_seam, "stage": stage}
    exec(compile(body, "m", "exec"), scope)
    seams.install(targets[0], lambda original, self: ("handled", original(self)))
    assert scope["C"]().f() == ("handled", ("staged", 1))
    assert scope["C"].g() == ("staged", 2)


def test_an_async_function_gets_no_mark(make: ModuleType) -> None:
    source = "import a\n\n\nasync def f():\n    pass\n"
    with pytest.raises(patch.PatchError, match="plain function"):
        make.mark(source, [seam_of(source, "sglang.m:f")], VERSION)


def test_a_changed_function_gets_no_mark(make: ModuleType) -> None:
    source = "import a\n\n\ndef f():\n    pass\n"
    seam = seam_of(source, "sglang.m:f")
    with pytest.raises(patch.PatchError, match="table of seams"):
        make.mark(source.replace("pass", "return"), [seam], VERSION)


# The committed patches, against the SGLang that is installed and those beside it.


@pytest.fixture(scope="module")
def shipped(repo_root: Path) -> Path:
    return repo_root / "patches"


@pytest.fixture(params=TESTED_VERSIONS)
def real(request: pytest.FixtureRequest, tmp_path: Path, shipped: Path) -> Path:
    """The touched files of each supported SGLang, unpatched, in a checkout of their own."""
    installed = patch.find_tree(sglang_folder(request.param))
    version = patch.supported_version(installed, None, patch.versions(shipped))
    package = tmp_path / "real" / "python" / "sglang"
    standing = patch.survey(installed, patch.series(shipped, version))
    files = {**standing.base, **installed.read(["__init__.py", "_version.py"])}
    for path, content in files.items():
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            (package / path).write_bytes(content)
    (package / "srt/kairos_seams.py").unlink(missing_ok=True)
    return tmp_path / "real"


def real_version(tree: Path) -> str:
    return (patch.find_tree(tree).version or "").split("+")[0]


def test_the_shipped_patches_apply_and_revert(real: Path) -> None:
    before = snapshot(real)
    assert patch.main(["apply", "--tree", str(real)]) == 0
    after = snapshot(real)
    assert after.keys() - before.keys() == {"python/sglang/srt/kairos_seams.py"}
    for path, (content, _) in after.items():
        ast.parse(content, path)
    assert patch.main(["apply", "--tree", str(real)]) == 0
    assert snapshot(real) == after
    assert patch.main(["revert", "--tree", str(real)]) == 0
    assert snapshot(real) == before


def test_a_patched_tree_has_every_seam_and_the_same_fingerprints(real: Path) -> None:
    assert patch.main(["apply", "--tree", str(real)]) == 0
    version = real_version(real)
    for seam in SEAMS:
        if version not in seam.fingerprints:
            continue
        path = real / "python" / (seam.module.replace(".", "/") + ".py")
        source = path.read_text(encoding="utf-8")
        assert fingerprint(source, seam.qualname) == seam.fingerprints[version]
        assert source.count(f'"{seam.target}"') == 1


def test_a_local_change_in_a_real_file_stops_everything(real: Path) -> None:
    path = real / "python/sglang/srt/managers/schedule_policy.py"
    path.write_text(path.read_text().replace("def calc_priority(", "def calc_priority (", 1))
    before = snapshot(real)
    assert patch.main(["apply", "--tree", str(real)]) == 1
    assert snapshot(real) == before


def test_the_patches_are_what_the_tables_give(real: Path, shipped: Path, make: ModuleType) -> None:
    """If this fails, run ``PYTHONPATH=python python patches/make.py``."""
    version = real_version(real)
    # From a patched tree, which must make no difference.
    assert patch.main(["apply", "--tree", str(real)]) == 0
    made = make.make(patch.find_tree(real), shipped, version)
    there = {path.name: path.read_bytes() for path in (shipped / f"v{version}").iterdir()}
    assert made == there


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_agrees_with_our_own_applier(real: Path, shipped: Path, tmp_path: Path) -> None:
    copy = tmp_path / "git"
    shutil.copytree(real, copy)
    assert patch.main(["apply", "--tree", str(real)]) == 0
    git = ["git", "-C", str(copy), "-c", "user.name=t", "-c", "user.email=t@example.invalid"]
    git += ["-c", "core.autocrlf=false", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "base"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    paths = sorted((shipped / f"v{real_version(real)}").glob("*.patch"))
    for path in paths:
        subprocess.run([*git, "apply", "--check", "-p1", str(path)], check=True)
        subprocess.run([*git, "apply", "-p1", str(path)], check=True)
    assert snapshot(copy) == snapshot(real)
    subprocess.run([*git, "checkout", "-q", "."], check=True)
    subprocess.run([*git, "clean", "-fdq"], check=True)
    subprocess.run([*git, "am", "-q", *map(str, paths)], check=True, capture_output=True)
    assert snapshot(copy) == snapshot(real)
