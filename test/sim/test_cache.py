"""The prefix cache: never above its capacity, locked blocks stay, a prefix outlives its tail."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_kairos.sim.core.prefix_cache import PrefixCache


def test_what_was_inserted_is_found_as_far_as_it_agrees() -> None:
    cache = PrefixCache(1000, 10)
    cache.hold(35, ())
    cache.insert((1, 2, 3), 35, 5)
    assert (cache.match((1, 2, 3, 4)), cache.match((1, 9, 3)), cache.match((2,))) == (3, 1, 1)
    assert (cache.used_tokens, cache.free_tokens) == (35, 965)
    cache.release((1, 2, 3), 5)
    assert (cache.used_tokens, cache.free_tokens) == (30, 1000)


def test_the_tail_is_evicted_before_the_prefix() -> None:
    cache = PrefixCache(40, 10)
    cache.hold(30, ())
    cache.insert((1, 2, 3), 30, 0)
    cache.release((1, 2, 3), 0)
    cache.hold(20, ())
    assert cache.match((1, 2, 3)) == 2


def test_locked_blocks_count_as_taken() -> None:
    cache = PrefixCache(40, 10)
    cache.hold(20, ())
    cache.insert((1, 2), 20, 0)
    cache.release((1, 2), 0)
    assert cache.fits(40, ()) and not cache.fits(40, (1, 2)) and cache.fits(20, (1, 2))
    cache.hold(20, (1, 2))
    assert not cache.fits(1, ()) and cache.match((1, 2)) == 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 60), st.booleans()), max_size=60))
def test_capacity_holds_and_everything_comes_back(steps: list[tuple[int, int, bool]]) -> None:
    cache = PrefixCache(100, 10)
    active: list[tuple[tuple[int, ...], int]] = []
    for family, prompt, leave in steps:
        blocks = tuple(100 * family + i for i in range(prompt // 10))
        hit = cache.match(blocks)
        matched = min(10 * hit, prompt - 1)
        if cache.fits(prompt - matched, blocks[:hit]):
            cache.hold(prompt - matched, blocks[:hit])
            assert cache.used_tokens <= 100
            tail = prompt - 10 * len(blocks)
            cache.insert(blocks[hit:], prompt - matched, tail)
            active.append((blocks, tail))
        if leave and active:
            cache.release(*active.pop(0))
        assert 0 <= cache.held_tokens <= cache.used_tokens <= 100
        assert all(cache.match(blocks) == len(blocks) for blocks, _ in active)
    for entry in active:
        cache.release(*entry)
    assert cache.held_tokens == 0 and cache.free_tokens == 100
