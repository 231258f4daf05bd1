"""Under KV pressure a real decode server reserves KV, and so prefill starts, by TTFT deadline."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pd_client import PdClient, again_if_stock_lost_one, trouble_in

from sglang_kairos.cluster.layout import ClusterSpec
from sglang_kairos.cluster.run import Cluster
from sglang_kairos.cpu.zygote import Zygote

PROMPT, KV_TOKENS = 1400, 4096
# Sent in this order while decode has room for none of them; TTFT targets in ms.
TARGETS = {"loose": 3_000_000, "middle": 300_000, "tight": 30_000}


async def first_tokens(cluster: Cluster) -> list[str]:
    """Names in the order in which decode streams their first tokens."""
    seen: list[str] = []
    rng, port = random.Random(3), cluster.bootstrap_ports[0]

    async def send(session: aiohttp.ClientSession, name: str, tokens: int, ttft_ms: float) -> None:
        body: dict[str, Any] = {
            "input_ids": [rng.randrange(10, 500) for _ in range(PROMPT)],
            "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
            "ttft_ms": ttft_ms,
            "stream": True,
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": port,
            "bootstrap_room": rng.getrandbits(62),
        }

        async def post(url: str, watch: bool) -> None:
            async with session.post(url + "/generate", json=body) as answer:
                assert answer.status == 200
                async for _ in answer.content:
                    if watch and name not in seen:
                        seen.append(name)

        await asyncio.gather(
            post(cluster.prefill_urls[0], False), post(cluster.decode_urls[0], True)
        )

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        tasks = [asyncio.create_task(send(session, f"early{i}", 900, 1000)) for i in range(2)]
        while len(seen) < 2:
            await asyncio.sleep(0.02)
        for name, ttft_ms in TARGETS.items():
            tasks.append(asyncio.create_task(send(session, name, 40, ttft_ms)))
            await asyncio.sleep(0.3)
        assert len(seen) == 2, "decode had room: no pressure, nothing is proven"
        await asyncio.gather(*tasks)
    return seen[2:]


@pytest.mark.one_of
@pytest.mark.parametrize(
    ("kairos", "order"), [(True, ["tight", "middle", "loose"]), (False, list(TARGETS))]
)
def test_kv_is_reserved_by_deadline_and_by_arrival_without_kairos(
    zygote: Zygote, tiny_model: str, out_dir: Path, kairos: bool, order: list[str]
) -> None:
    spec = ClusterSpec(
        model_path=tiny_model,
        router="none",
        kairos=kairos,
        decode_args=("--max-total-tokens", str(KV_TOKENS)),
        zygote=zygote,
        log_dir=out_dir / f"preallocation-{kairos}",
    )

    def run() -> None:
        with Cluster(spec) as cluster:
            got = asyncio.run(asyncio.wait_for(first_tokens(cluster), 120.0))
            assert got == order
            assert PdClient(cluster).settles(), "a server did not become idle"
            assert not trouble_in(cluster.logs)

    if kairos:
        run()
    else:
        again_if_stock_lost_one(spec.log_dir, run)
