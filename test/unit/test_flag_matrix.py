"""The matrix of SGLang's flags (test/e2e/flags.py) leaves none out without a reason."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest
from flags import LEFT_OUT, SETTINGS, named

NAMESPACES = ("schedule", "disagg")


def flags_of(namespace: str) -> set[str]:
    """The flags of one namespace of SGLang's server arguments, read from its source."""
    found = importlib.util.find_spec("sglang")
    assert found is not None and found.submodule_search_locations
    folder = Path(next(iter(found.submodule_search_locations))) / "srt/arg_groups/fields"
    tree = ast.parse((folder / f"{namespace}.py").read_text())
    fields = [
        node
        for owner in ast.walk(tree)
        if isinstance(owner, ast.ClassDef)
        for node in owner.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]
    return {
        "--" + field.target.id.replace("_", "-")
        for field in fields
        if isinstance(field.target, ast.Name)
        and not field.target.id.startswith("_")
        and "no_cli=True" not in ast.unparse(field.annotation)
    }


# Other kinds of disaggregation share the namespace: encoders, and drafts of speculation.
OTHER_KINDS = ("--encoder-", "--language-", "--decoupled-spec-", "--enable-adaptive-dispatch-to-")


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_every_scheduling_flag_is_in_the_matrix_or_says_why_not(namespace: str) -> None:
    flags = {flag for flag in flags_of(namespace) if not flag.startswith(OTHER_KINDS)}
    assert len(flags) > 10
    assert flags - named() - LEFT_OUT.keys() == set()


def test_no_flag_is_both_run_and_left_out() -> None:
    assert named() & LEFT_OUT.keys() == set()


def test_every_setting_has_a_name_of_its_own() -> None:
    names = [setting.name for setting in SETTINGS]
    assert len(set(names)) == len(names)
