"""What the documentation says of the code, where a machine can tell."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from helpers.trees import sglang_folder
from sglang_kairos.commands import COMMANDS
from sglang_kairos.config import KairosConfig, flag_of
from sglang_kairos.engine.seams.table import SEAMS, SUPPORTED_VERSIONS
from sglang_kairos.names import new_names

ROOT = Path(__file__).resolve().parents[2]


def script(name: str) -> ModuleType:
    """A module of scripts/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


doc_tables = script("doc_tables")


@pytest.mark.parametrize("name", doc_tables.TABLES)
def test_a_table_in_the_docs_is_the_one_in_the_code(name: str) -> None:
    file, table = doc_tables.TABLES[name]
    page = (ROOT / "docs" / file).read_text("utf-8")
    assert page == doc_tables.renewed(page, name, table()), "run scripts/doc_tables.py"


def test_a_page_without_the_marks_is_not_passed_over() -> None:
    with pytest.raises(ValueError, match="features"):
        doc_tables.renewed("# A page\n", "features", "| new |")


PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "patches").rglob("*.md")),
    ROOT / "test" / "README.md",
]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
PACKAGE = ROOT / "python" / "sglang_kairos"
# Made by commands, on some machines only, or by whoever adds a version.
NOT_HERE = re.compile(r"(^|/)(out|OUT|INTO|build|shared)/|\.venv|0\.5\.24|…|^profile_export|\*")
# Of git; and one that is put together.
FLAGS_OF_OTHERS = {"zero-commit", "hard", "sigma-input", "sigma-output"}
# smg's; GuideLLM's, aiperf's and inference-perf's.
FLAGS_OF_OTHERS |= {"worker-overload-waiting-requests"}
FLAGS_OF_OTHERS |= {"constraint", "data", "output", "profile", "ui", "artifact-dir", "config-file"}
FLAGS_OF_OTHERS |= {"endpoint-type", "extra-inputs", "output-tokens-mean", "streaming"}
FLAGS_OF_OTHERS |= {"request-count", "synthetic-input-tokens-mean"}
EXTENSIONS = "py|md|json|jsonl|sh|txt|gz|png|toml|patch"


def text_of(page: Path) -> str:
    """Its text without addresses of the web."""
    return re.sub(r"https?://[^\s)`]+", "", page.read_text("utf-8"))


def code_of(text: str) -> str:
    """What stands in code spans and fences, a line each."""
    fences = re.findall(r"^```.*?\n(.*?)^```", text, re.S | re.M)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return "\n".join([*fences, *re.findall(r"`([^`\n]+)`", rest)])


def slugs(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.strip().lower()).replace(" ", "-") for head in heads}


@functools.cache
def sglang_files() -> frozenset[str]:
    """Paths of SGLang's sources, below its package and below ``srt``."""
    folder = sglang_folder(SUPPORTED_VERSIONS[0]) / "sglang"
    paths = [str(path.relative_to(folder)) for path in folder.rglob("*.py")]
    return frozenset([*paths, *(path.removeprefix("srt/") for path in paths)])


@functools.cache
def sources() -> str:
    """All Python of this tree but the tests, and the recipes."""
    folders = ("python", "benchmark", "contrib", "scripts", "patches")
    texts = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    texts += [*(ROOT / "scripts").glob("*.sh"), ROOT / "Makefile", *ROOT.glob("contrib/**/*.sh")]
    return "\n".join(path.read_text("utf-8") for path in texts)


def exists(cited: str, page: Path) -> bool:
    """Whether a cited path is a file or folder here, in the package, beside the page or SGLang's."""
    places = (ROOT, PACKAGE, ROOT / "docs", ROOT / "test", page.parent)
    if any((place / cited).exists() for place in places):
        return True
    return cited in sglang_files() or cited == "srt/kairos_seams.py"  # the latter by our patch


@each_page
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        file, _, anchor = target.partition("#")
        path = (page.parent / file) if file else page
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in slugs(path)):
            broken.append(target)
    assert broken == []


@each_page
def test_every_file_that_is_named_is_there(page: Path) -> None:
    named = re.findall(rf"(?<![\w/.:-])((?:[\w.-]+/)+[\w.-]+\.(?:{EXTENSIONS}))\b", text_of(page))
    missing = [path for path in named if not NOT_HERE.search(path) and not exists(path, page)]
    assert missing == []


@each_page
def test_every_function_that_is_named_by_its_module_is_there(page: Path) -> None:
    folders = "|".join(path.name for path in PACKAGE.iterdir() if path.is_dir())
    missing = []
    for module, name in re.findall(rf"`((?:{folders})/[\w/]+)\.(\w+)`", text_of(page)):
        path = PACKAGE / f"{module}.py"
        if name in EXTENSIONS.split("|"):
            continue
        if not path.exists() or not re.search(rf"^(def|class) {name}\b", path.read_text(), re.M):
            missing.append(f"{module}.{name}")
    assert missing == []


@each_page
def test_every_module_that_is_run_is_there(page: Path) -> None:
    text = text_of(page)
    modules = set(re.findall(r"-m,? ((?:sglang_kairos|benchmark|contrib)(?:\.\w+)*)", text))
    modules |= set(
        re.findall(r"`((?:sglang_kairos|benchmark|contrib)(?:\.[a-z]\w*)+)(?:\.[A-Z]\w*)?`", text)
    )
    missing = []
    for module in modules:
        base = (ROOT if module.startswith(("benchmark", "contrib")) else ROOT / "python") / Path(
            *module.split(".")
        )
        if not base.with_suffix(".py").exists() and not (base / "__init__.py").exists():
            missing.append(module)
    assert missing == []


@each_page
def test_every_make_target_that_is_named_is_there(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:^|\s)make ([a-z][a-z-]*)", code_of(text_of(page)), re.M))
    assert named - targets == set()


@functools.cache
def words_of_programs() -> frozenset[str]:
    """Words of our sources, SGLang's server and benchmark, and its router, as flags are spelled."""
    folder = sglang_folder(SUPPORTED_VERSIONS[0])
    files = [folder / "sglang" / "srt" / "server_args.py", folder / "sglang_router"]
    files += [folder / "sglang" / "srt" / "arg_groups", folder / "sglang" / "benchmark"]
    texts = [sources()]
    for file in files:
        found = [file] if file.is_file() else file.rglob("*.py")
        texts += [path.read_text("utf-8") for path in found]
    return frozenset(re.findall(r"[a-z][a-z0-9-]+", "\n".join(texts).replace("_", "-")))


@each_page
def test_every_flag_that_is_named_is_one(page: Path) -> None:
    code = code_of(text_of(page))
    named = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9-]*[a-z0-9])(?![\w-]*…)", code))
    ours = {flag_of(item).removeprefix("--") for item in dataclasses.fields(KairosConfig)}
    if page.name == "glossary.md":
        ours |= {old.removeprefix("--") for old in new_names("flag")}
    assert {flag for flag in named if flag.startswith("kairos-")} <= ours | {"kairos-config"}
    assert named - words_of_programs() - ours - FLAGS_OF_OTHERS == set()


def words_no_longer_used() -> set[str]:
    """From the glossary's last table."""
    _, _, table = (ROOT / "docs" / "glossary.md").read_text("utf-8").partition("no longer used\n")
    cells = re.findall(r"^\| ([a-z, ]+) \|", table, re.M)
    return {word for cell in cells for word in cell.split(", ")} - {"not"}


# The glossary names them; results are dated.
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name != "glossary.md" and page.parent.name != "results"],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_no_page_uses_a_word_that_is_no_longer_used(page: Path) -> None:
    text = re.sub(r"^```.*?^```|`[^`\n]+`", "", text_of(page), flags=re.S | re.M)
    words = set(re.findall(r"[a-z]+", text.lower()))
    gone = words_no_longer_used()
    assert len(gone) > 6
    assert words & (gone | {f"{word}s" for word in gone}) == set()


def test_the_glossary_has_a_line_for_each_term() -> None:
    text, _, _ = (ROOT / "docs" / "glossary.md").read_text("utf-8").partition("## Names")
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.*?) ?\|$", text, re.M)[1:]
    assert len(rows) >= 30 and all(len(meaning) < 160 for _, meaning, _ in rows)


@each_page
def test_every_kairos_command_that_is_named_is_one(page: Path) -> None:
    code = code_of(text_of(page))
    named = set(re.findall(r"(?:^|[;&|(] ?|/)kairos ([a-z][a-z-]*)", code, re.M))
    assert named <= set(COMMANDS)


@each_page
def test_every_counter_that_is_explained_is_counted(page: Path) -> None:
    missing = []
    for cell in re.findall(r"^\| `counters\.[^|]+", text_of(page), re.M):
        for name in re.findall(r"`(?:counters\.)?(\w+)`", cell):
            stem = re.sub(r"^steps_|_errors$", "", name)
            if f'"{name}"' not in sources() and f'"{stem}"' not in sources():
                missing.append(name)
    assert missing == []


def test_the_number_of_wrapped_functions_is_the_one_in_the_table() -> None:
    counts = {
        version: sum(version in seam.fingerprints for seam in SEAMS)
        for version in SUPPORTED_VERSIONS
    }
    readme = re.sub(r"\s+", " ", (ROOT / "README.md").read_text("utf-8"))
    said = re.findall(r"wraps (\d+) or (\d+) of its functions", readme)
    assert said == [(str(min(counts.values())), str(max(counts.values())))]
