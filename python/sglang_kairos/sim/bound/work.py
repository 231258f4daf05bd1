"""The least prefill work of every request; the docstring of `bound` says why it is the least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sglang_kairos.loads.traces import Request
from sglang_kairos.sim.core.cluster import Setup, cache_block_tokens, make_requests, too_large
from sglang_kairos.sim.hardware.times import LawTimes, StepTimes

Array = NDArray[np.float64]
Whole = NDArray[np.int64]
# Attainment is measured in floating point, so a first token this late may still count.
ROUNDING_S = 1e-6


@dataclass(frozen=True)
class Jobs:
    """Requests that could be on time, in order of arrival; seconds, (n,) each.

    `work_s` must be done between `release_s` and `deadline_s`.
    """

    release_s: Array
    deadline_s: Array
    work_s: Array

    def __len__(self) -> int:
        return len(self.work_s)


def charge(rows: Sequence[Request], setup: Setup) -> Jobs:
    """Returns what each request must pay, and when, without those that nobody could serve in time.

    A block costs what it does at the least depth that it has in any prompt. Where block names stand
    for whole prefixes, as in Mooncake's traces, that is its only depth.
    """
    system = setup.system
    requests = sorted(make_requests(rows, setup), key=lambda req: (req.arrival_s, req.index))
    size = cache_block_tokens(rows)
    depth: dict[int, int] = {}
    for req in requests:
        for place, block in enumerate(req.blocks):
            depth[block] = min(place, depth.get(block, place))
    longest = max((req.prompt for req in requests), default=1)
    a, b, c, d = floor_law(system.times, system.chunk_tokens, longest)
    token_s = system.kv_bytes / system.link_bytes_per_s
    seen: set[int] = set()
    jobs: list[tuple[float, float, float]] = []
    for req in requests:
        blocks = [block for block in dict.fromkeys(req.blocks) if block not in seen]
        seen.update(blocks)
        tail = max(0, req.prompt - len(req.blocks) * size)
        if not blocks:
            # SGLang computes at least the prompt's last token.
            tail = max(1, tail)
        tokens = len(blocks) * size + tail
        attended = sum(size * (depth[block] + 0.5) * size for block in blocks)
        attended += tail * (req.prompt - tail / 2)
        marginal_s = b * tokens + c * attended + d * req.prompt**2
        steps = -(-tokens // system.chunk_tokens)
        # The last step's tokens cross the link after it; fewer there are one more step.
        last = tokens - (steps - 1) * system.chunk_tokens
        alone_s = a * steps + marginal_s + min(last * token_s, a + token_s) + system.link_latency_s
        if too_large(req, system) or alone_s > req.ttft_s + ROUNDING_S:
            continue
        deadline_s = req.due_s - system.link_latency_s - token_s + ROUNDING_S
        jobs.append((req.arrival_s, deadline_s, marginal_s + a * tokens / system.chunk_tokens))
    table = np.array(jobs, float).reshape(-1, 3)
    return Jobs(table[:, 0], table[:, 1], table[:, 2])


def floor_law(
    times: StepTimes, chunk_tokens: int, longest: int
) -> tuple[float, float, float, float]:
    """Returns coefficients a, b, c, d >= 0 of a prefill latency model that no step is faster than.

    For a latency model that is the model itself. Let a table have the form shared(sum n) + sum_i
    own(n_i, P_i) with own(1, 0) = 0 (`sim.hardware.tables.TableTimes`). Then it is the highest that
    fits under the knots:

        a + b1 s <= shared(s)
        b2 n + c n (P + n / 2) + d (P + n)^2 <= own(n, P)

    Between knots a bilinear table lies above its corners' model, which is convex along each axis,
    so it holds there too. The knots are `prefill_knots` (new, prefix) where the times have them.
    Otherwise they are a fine grid with all powers of two. In between, the bound is then proven as
    far as the times are straight there.
    """
    if isinstance(times, LawTimes):
        law = times.prefill_law
        if min(law) < 0:
            raise ValueError(f"a bound needs coefficients of at least 0, got {law}")
        # A step of s <= chunk_tokens tokens pays e min(s, knee) >= e s min(1, knee / chunk_tokens).
        b = law.b_s + law.e_s * min(1.0, law.knee / chunk_tokens)
        return law.a_s, b, law.c_s, law.d_s
    from scipy.optimize import linprog

    new, prefix = _knots(times, chunk_tokens, longest)
    shared = np.array([times.prefill_s([1] * n, [0] * n) for n in new.tolist()])
    step = np.array([[times.prefill_s([n], [p]) for n in new.tolist()] for p in prefix.tolist()])
    n, before = (axis.ravel() for axis in np.meshgrid(new, prefix))
    attended, padded = n * (before + n / 2), (before + n) ** 2
    seconds = step.ravel()
    # Columns a, b1, b2, c, d; b2 may be negative as long as b = b1 + b2 is not.
    zero, one = np.zeros_like(n), np.ones_like(n)
    under = [
        np.column_stack([np.ones(len(new)), new, np.zeros((len(new), 3))]),
        np.column_stack([zero, zero, n, attended, padded]),
        np.array([[0.0, -1.0, -1.0, 0.0, 0.0]]),
    ]
    most = [shared, seconds - np.tile(shared, len(prefix)), np.zeros(1)]
    gain = (np.column_stack([one, n, n, attended, padded]) / seconds[:, None]).sum(axis=0)
    # Tokens count by the thousand; otherwise the coefficients are below the solver's tolerances.
    unit = np.array([1.0, 1e-3, 1e-3, 1e-6, 1e-6])
    free = [(0, None), (None, None), (None, None), (0, None), (0, None)]
    result = linprog(-gain * unit, np.vstack(under) * unit, np.concatenate(most), bounds=free)
    if result.x is None:
        raise ValueError(f"no latency model lies under these step times: {result.message}")
    a, b1, b2, c, d = (result.x * unit * (1 - 1e-6)).tolist()
    return a, max(0.0, b1 + b2), c, d


def _knots(times: StepTimes, chunk_tokens: int, longest: int) -> tuple[Whole, Whole]:
    """Returns the new tokens and prefixes to look at, whole numbers, up to the largest that occur."""
    given = getattr(times, "prefill_knots", None)
    if given is None:
        doubling = 2 ** np.arange(24)
        given = tuple(
            np.concatenate([np.linspace(0, most, 65)[1:], doubling])
            for most in (chunk_tokens, longest)
        )
    new, prefix = (np.asarray(axis).astype(np.int64) for axis in given)
    return (
        np.unique(np.append(new[(new > 0) & (new < chunk_tokens)], (1, chunk_tokens))),
        np.unique(np.append(prefix[prefix < longest], (0, longest))),
    )
