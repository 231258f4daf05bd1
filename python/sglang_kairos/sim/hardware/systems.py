"""Loads a system by name, with step times from the operator database or from built-in models."""

from __future__ import annotations

from importlib.util import find_spec

from sglang_kairos.sim.hardware.tables import TableTimes
from sglang_kairos.sim.hardware.times import (
    SYSTEMS,
    System,
    built_in,
    law_note,
    law_of,
    origin,
    system_of,
)

SOURCES = ("auto", "tables", "law")


class StepTimesError(ValueError):
    """There is no such system, or its step times cannot be had that way. One line, for the user."""


def load_system(name: str, source: str = "auto") -> System:
    """Returns the system `name` of SYSTEMS. `source`: where its step times come from.

        law      the built-in fit
        tables   computed anew with aiconfigurator-core (about 3 s), which the extra `tables`
        installs auto     tables where it is installed, else law

    `System.notes` say which it was. Raises StepTimesError if there is no such system or source, or
    if the extra is missing.
    """
    if name not in SYSTEMS:
        raise StepTimesError(f"unknown system {name!r}; known: {', '.join(sorted(SYSTEMS))}")
    if source not in SOURCES:
        raise StepTimesError(
            f"unknown source {source!r} of step times; known: {', '.join(SOURCES)}"
        )
    installed = find_spec("aiconfigurator_core") is not None
    if source == "tables" and not installed:
        raise StepTimesError(
            "step times from tables need aiconfigurator-core: "
            'pip install "sglang-kairos[tables]", or take the built-in law'
        )
    return _from_tables(name) if installed and source != "law" else SYSTEMS[name]


def _from_tables(name: str) -> System:
    from sglang_kairos.sim.hardware.estimator import Estimator

    entry = built_in()[name]
    law = law_of(entry)
    try:
        estimator = Estimator.of(entry)
    except (ImportError, ValueError) as error:
        # Another version of the package may lack this database.
        reason = " ".join(str(error).split())
        raise StepTimesError(f"{entry['package']} wanted for tables of {name}: {reason}") from error
    times = TableTimes(estimator.table(law.captured_sizes or ()), law)
    computed = {**entry, "package": estimator.package}
    about = f"table of {origin(computed)}; predictors start from laws fitted to it "
    return system_of(entry, times, f"{about}({law_note(entry)})")
