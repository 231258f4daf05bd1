"""What is left out with an unknown seam, and what is lost: closed, said, and safe."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sglang_kairos.config import KairosConfig
from sglang_kairos.engine.seams import losses
from sglang_kairos.engine.seams.table import SEAMS, SUPPORTED_VERSIONS

NAMES = [seam.qualname for seam in SEAMS]
WRAPPED = {
    version: [seam.qualname for seam in SEAMS if version in seam.fingerprints]
    for version in SUPPORTED_VERSIONS
}
versions = st.sampled_from(SUPPORTED_VERSIONS)
unknowns = st.sets(st.sampled_from(NAMES), max_size=4)


def test_every_seam_says_what_is_lost_and_needs_seams() -> None:
    assert set(losses.LOST) == set(NAMES) == {seam.qualname for seam in SEAMS if seam.lost}
    assert {name for seam in SEAMS for name in seam.needs} <= set(NAMES)
    assert set(losses.NEEDS) | {*losses.PAUSING, *losses.PARKING, losses.START} <= set(NAMES)


@given(versions, unknowns)
def test_what_depends_on_an_unknown_seam_goes_with_it_and_nothing_else(
    version: str, unknown: set[str]
) -> None:
    wrapped = WRAPPED[version]
    out = losses.missing(wrapped, unknown)
    assert set(out) >= unknown.intersection(wrapped)
    for name in wrapped:
        needs = set(losses.NEEDS.get(name, ()))
        assert (name in out) == (name in unknown or bool(needs & set(out)))
    assert all(out[name] == losses.LOST[name] for name in out)


@given(versions, unknowns)
def test_nobody_is_paused_or_parked_without_what_finds_him(version: str, unknown: set[str]) -> None:
    out = losses.missing(WRAPPED[version], unknown)
    config = losses.without(KairosConfig(), out)
    assert config.pause == (not set(out) & set(losses.PAUSING))
    assert config.park == (not set(out) & set(losses.PARKING))
    assert config.order
    assert bool(losses.cannot_pause(out)) != config.pause
    off = losses.without(KairosConfig(pause=False, park=False), out)
    assert not off.pause and not off.park


def test_a_seam_of_reports_takes_nothing_with_it() -> None:
    name = "SchedulerLoadInquirer.get_loads"
    assert list(losses.missing(NAMES, {name})) == [name]
    assert losses.without(KairosConfig(), {name}) == KairosConfig()
