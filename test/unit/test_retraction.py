"""Retraction: those go first who lose least of their SLO."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sglang_kairos.policy.decode_step import LOST
from sglang_kairos.policy.retraction import keep_order

TPOT = 0.05
GONE = -2 * LOST * TPOT


def test_who_is_given_up_goes_before_everybody_else_and_the_largest_of_them_first() -> None:
    assert keep_order([0.3, GONE, 2 * GONE, -0.1], [TPOT] * 4, [9000, 500, 800, 10]) == [3, 0, 1, 2]


def test_among_the_hopeful_the_longest_lead_goes_first() -> None:
    assert keep_order([0.2, 0.0, 1.5], [TPOT] * 3, [100, 100, 100]) == [1, 0, 2]


def test_a_heavier_class_stays_longer_than_any_lead_tells() -> None:
    assert keep_order([0.0, 5.0], [TPOT] * 2, [100, 100], [1.0, 4.0]) == [1, 0]


def test_no_class_keeps_a_request_that_is_given_up() -> None:
    assert keep_order([0.0, GONE], [TPOT] * 2, [100, 100], [1.0, 4.0]) == [0, 1]


requests = st.lists(
    st.tuples(
        st.floats(-5, 5), st.floats(0.01, 1), st.integers(1, 9999), st.sampled_from([0.5, 1, 4])
    ),
    min_size=1,
    max_size=30,
)


@given(requests)
def test_nobody_is_lost_or_doubled_and_no_hopeful_one_goes_before_one_given_up(
    rows: list[tuple[float, float, int, float]],
) -> None:
    lead, tpot, context, weight = (np.array(column, float) for column in zip(*rows, strict=True))
    order = keep_order(lead, tpot, context, weight)
    assert sorted(order) == list(range(len(rows)))
    lost = (lead < -LOST * tpot)[order]
    assert (np.diff(lost.astype(int)) >= 0).all()
    kept = [i for i in order if lead[i] >= -LOST * tpot[i]]
    assert [weight[i] for i in kept] == sorted((weight[i] for i in kept), reverse=True)
