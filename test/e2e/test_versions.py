"""Other SGLang versions: random decisions change no token, with the plugin and in a patched tree.

`make test` proves the oldest and one that it draws by date, each in one of the two ways;
`make test-versions` all, the newest too, in both.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from identity import JOBS, check, much_happened, run_pair, spec_of
from pd_client import doomed_jobs, stock_outputs

from helpers.trees import (
    NEWEST,
    SUPPORTED_VERSIONS,
    TESTED_VERSIONS,
    patched_copy,
    seed,
    sglang_folder,
)
from sglang_kairos.cpu.zygote import Zygote
from sglang_kairos.other_sglang import first_on_path

WAYS = ("plugin", "tree")
ALL = [(version, way) for version in TESTED_VERSIONS for way in WAYS]
# The newest has tests of its own, which make test runs.
DRAWN = [
    (version, WAYS[(seed() + place) % 2])
    for place, version in enumerate(TESTED_VERSIONS)
    if version != NEWEST
]
CASES = ALL if TESTED_VERSIONS == SUPPORTED_VERSIONS else DRAWN


@pytest.mark.parametrize(("version", "way"), CASES)
def test_random_decisions_change_no_token_of_another_sglang(
    version: str, way: str, tiny_model: str, out_dir: Path, tmp_path: Path
) -> None:
    jobs, doomed = JOBS[:120], doomed_jobs(16, 20, seed=8, span_s=5.0)
    folder = sglang_folder(version)
    if way == "tree":
        folder = patched_copy(folder, tmp_path, version)
    env = first_on_path(folder)
    logs = out_dir / f"chaos-{version}-{way}"
    with Zygote(env={**env, "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1"}) as zygote:
        stock = stock_outputs(spec_of(zygote, tiny_model, logs / "stock", env=env), jobs)
        run = run_pair(
            zygote,
            tiny_model,
            logs,
            kairos={"chaos_seed": 11},
            jobs=[*jobs, *doomed],
            enough=much_happened,
            env=env,
        )
    check(run, stock, tree=way == "tree", version=version)
