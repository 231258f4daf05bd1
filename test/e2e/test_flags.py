"""SGLang's scheduling flags × Kairos' decisions: every token is stock's, and nothing stays behind.

`flags.py` is the table; ``make test-flags`` runs all of it (about a minute a cell), `make test` the
cells that a seed draws: today's date, or ``KAIROS_FLAGS_SEED``, which also makes the load.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
import os
import random
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from flags import SETTINGS, Setting
from pd_client import Counters, Job, PdClient, long_tail_jobs, stock_outputs, trouble_in

from sglang_kairos.cluster.layout import ClusterSpec
from sglang_kairos.cluster.run import Cluster
from sglang_kairos.cpu.zygote import Zygote

SEED = int(os.environ.get("KAIROS_FLAGS_SEED") or datetime.date.today().strftime("%Y%m%d"))
DRAWN = 1  # test-flags runs all
DECISIONS = ("random", "tight")
COMMON = ("--chunked-prefill-size", "512", "--max-total-tokens", "49152")
# Targets that nobody or hardly anybody meets, and no breaker: there is much to decide.
TIGHT = {"ttft_ms": 300.0, "tpot_ms": 8.0, "max_step_error": 100.0}

CELLS = [(setting, decisions) for setting in SETTINGS for decisions in DECISIONS]
# What needs a package that `make test` does not install is not drawn.
DRAWABLE = [index for index, (setting, _) in enumerate(CELLS) if not setting.needs]
SAMPLE = random.Random(SEED).sample(DRAWABLE, DRAWN)


def spec_of(setting: Setting, zygote: Zygote, model: str, log_dir: Path) -> ClusterSpec:
    return ClusterSpec(
        model_path=model,
        router="none",
        server_args=(*COMMON, *shlex.split(setting.both)),
        prefill_args=shlex.split(setting.prefill),
        decode_args=shlex.split(setting.decode),
        env=setting.env,
        zygote=zygote,
        log_dir=log_dir,
    )


def load_of(setting: Setting) -> tuple[list[Job], list[Job]]:
    """Requests whose answers are compared, and requests that are aborted beside them."""
    jobs = [
        dataclasses.replace(job, prompt=job.prompt[: setting.longest])
        for job in long_tail_jobs(60, seed=SEED)
    ]
    rng = random.Random(SEED)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(10, 500) for _ in range(length)]

    doomed = [
        Job(rng.uniform(0, 3), prompt(setting.longest), 8, rng.uniform(0.2, 3)) for _ in range(6)
    ]
    doomed += [
        Job(rng.uniform(0, 3), prompt(20), 600, rng.uniform(0.05, 0.5), decoding=True)
        for _ in range(6)
    ]
    return jobs, doomed


@pytest.mark.parametrize(
    ("setting", "decisions"),
    [
        pytest.param(
            *cell,
            id=f"{cell[0].name}-{cell[1]}-{SEED}",
            marks=() if index in SAMPLE else (pytest.mark.slow,),
        )
        for index, cell in enumerate(CELLS)
    ],
)
def test_no_flag_lets_a_decision_change_a_token(
    setting: Setting, decisions: str, zygote: Zygote, tiny_model: str, out_dir: Path
) -> None:
    if setting.needs and importlib.util.find_spec(setting.needs) is None:
        pytest.skip(f"{setting.needs} is not installed: make test-transfers does it")
    jobs, doomed = load_of(setting)
    logs = out_dir / "flags" / setting.name.replace(" ", "-")
    spec = spec_of(setting, zygote, tiny_model, logs / "stock")
    stock = stock_outputs(spec, jobs)
    kairos: dict[str, Any] = {"chaos_seed": SEED % 1000} if decisions == "random" else TIGHT

    def enough(prefill: Counters, decode: Counters) -> bool:
        if decisions != "random":
            return True
        paused = prefill["pauses"] >= 3 or not setting.pauses
        return paused and (decode["parked"] >= 20 or not setting.parks)

    with Cluster(dataclasses.replace(spec, kairos=kairos, log_dir=logs / decisions)) as cluster:
        client = PdClient(cluster)
        rounds = client.run_until([*jobs, *doomed], enough)
        settled = client.settles()
        reports = client.kairos()
        trouble = trouble_in(cluster.logs)
    assert settled, "a server did not become idle after the last request"
    assert not trouble, "\n".join(trouble)
    for answers in rounds:
        different = [index for index, want in enumerate(stock) if answers[index] != want]
        assert not different, f"{different} of {len(stock)} differ, first {answers[different[0]]}"
    counters = [Counter(report["counters"]) for report in reports]
    assert enough(*counters), counters
    assert not [name for each in counters for name in each if name.endswith("_errors")], counters
