"""Prefill's and decode's KV, both too small for the crowd: neither waits for the other for ever."""

from __future__ import annotations

import random
from pathlib import Path

from pd_client import Job, PdClient, trouble_in

from sglang_kairos.cluster.layout import ClusterSpec
from sglang_kairos.cluster.run import Cluster
from sglang_kairos.cpu.zygote import Zygote

COUNT, PREFILL_KV, DECODE_KV = 48, 2500, 2000


def crowd(seed: int) -> list[Job]:
    """Everybody at once, ten times what either memory holds."""
    rng = random.Random(seed)
    lengths = [rng.randint(50, 800) for _ in range(COUNT)]
    return [
        Job(0.0, [rng.randrange(10, 500) for _ in range(n)], rng.randint(2, 12)) for n in lengths
    ]


def test_all_answer_though_prefill_computes_some_that_decode_has_no_room_for(
    zygote: Zygote, tiny_model: str, out_dir: Path
) -> None:
    """Optimistic prefill in an order that is not decode's: the two serve different requests first."""
    spec = ClusterSpec(
        model_path=tiny_model,
        router="none",
        # Pausing has memory of its own to look after (test_pausing.py).
        kairos={"chaos_seed": 3, "pause": False},
        prefill_args=("--optimistic-prefill-attempts", "3", "--max-total-tokens", str(PREFILL_KV)),
        decode_args=("--max-total-tokens", str(DECODE_KV)),
        zygote=zygote,
        log_dir=out_dir / "two-memories",
    )
    with Cluster(spec) as cluster:
        client = PdClient(cluster)
        answers = client.run(crowd(1), timeout_s=60.0)
        assert [status for status, _ in answers] == [200] * COUNT
        assert client.settles(), "a server did not become idle"
        assert client.kairos()[0]["counters"]["gave_way"] > 0, (
            "nobody was in the way: nothing proven"
        )
        assert not trouble_in(cluster.logs)
