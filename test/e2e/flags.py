"""SGLang's flags that a scheduler feels, and on which of them `test_flags` compares every token.

One line a setting: a name, what both servers, prefill or decode are started with. A flag that no
setting names stands in `LEFT_OUT` with the reason; `test/unit/test_flag_matrix.py` finds those in
neither.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Setting:
    """How a pair is started. `longest`: prompt tokens that both servers can hold, output included.

    `needs`: a module that only `make test-transfers` installs.
    `pauses`, `parks`: whether random decisions must have paused prefills, parked decodes.
    """

    name: str
    both: str = ""
    prefill: str = ""
    decode: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    longest: int = 3000
    needs: str = ""
    pauses: bool = True
    parks: bool = True

    def flags(self) -> set[str]:
        """Every flag that it names."""
        words = shlex.split(f"{self.both} {self.prefill} {self.decode}")
        return {word.split("=")[0] for word in words if word.startswith("--")}


# One core each; and without the second, SGLang itself refuses half of the requests.
TWO_RANKS = {
    "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
    "SGLANG_DISAGGREGATION_FORCE_QUERY_PREFILL_DP_RANK": "1",
}
POLLING = {"SGLANG_ENABLE_DISAGG_PREFILL_CONTINUOUS_INPUT_POLLING": "1"}

SETTINGS = (
    Setting("chunks of 512"),
    Setting("no chunks", "--chunked-prefill-size -1 --disable-radix-cache", pauses=False),
    Setting("no radix cache", "--disable-radix-cache"),
    Setting("pages of 64", "--chunked-prefill-size 64 --page-size 64"),
    Setting("no overlap", "--disable-overlap-schedule"),
    Setting("mixed chunks, pages of 16", "--enable-mixed-chunk --page-size 16"),
    Setting("longest prefix first", "--schedule-policy lpm"),
    Setting("highest response ratio", "--schedule-policy hrrn"),
    Setting("random order", "--schedule-policy random"),
    Setting("heavy subtrees first", "--schedule-policy dfs-weight"),
    Setting("longest output first", "--schedule-policy lof"),
    Setting(
        "tight batches",
        prefill="--max-running-requests 4 --prefill-max-requests 2 --max-prefill-tokens 300"
        " --schedule-policy shortest-prefill-first",
        decode="--max-running-requests 4",
        parks=False,
    ),
    Setting("one at a time", prefill="--max-running-requests 1", pauses=False),
    Setting("small prefill KV", prefill="--max-total-tokens 5000"),
    Setting("small prefill KV in pages", "--page-size 16", prefill="--max-total-tokens 6000"),
    Setting(
        "retraction",
        decode="--max-total-tokens 4096 --num-reserved-decode-tokens 2"
        " --schedule-conservativeness 0.1 --disaggregation-decode-extra-slots 32",
    ),
    Setting(
        "priorities",
        "--enable-priority-scheduling",
        decode="--retraction-policy priority --max-total-tokens 6000"
        " --num-reserved-decode-tokens 2",
    ),
    Setting(
        "priorities turned round",
        "--enable-priority-scheduling --schedule-low-priority-values-first"
        " --default-priority-value 3 --disable-priority-preemption"
        " --priority-scheduling-preemption-threshold 1",
    ),
    Setting(
        "radix cache on decode",
        "--page-size 16",
        decode="--disaggregation-decode-enable-radix-cache --max-total-tokens 8192",
    ),
    Setting("least frequently used goes", "--radix-eviction-policy lfu --max-total-tokens 8192"),
    Setting(
        "optimistic prefill",
        prefill="--optimistic-prefill-attempts 3 --max-total-tokens 6000",
        decode="--max-total-tokens 5000",
    ),
    Setting(
        "decode reserves when prefill is done",
        "--disaggregation-decode-allocation-policy prefill_complete",
        prefill="--max-total-tokens 5000",
        decode="--max-total-tokens 4000",
        pauses=False,  # every prefill may be re-queued by upstream, which looks for it in the slot
    ),
    Setting("KV checksums", "--disaggregation-enable-kv-checksum"),
    Setting("Mooncake over TCP", "--disaggregation-transfer-backend mooncake_tcp"),
    Setting("NIXL", "--disaggregation-transfer-backend nixl", needs="nixl"),
    Setting("inputs polled all the time", env=POLLING),
    Setting(
        "polled every fourth time",
        "--scheduler-recv-interval 4",
        decode="--disaggregation-decode-polling-interval 4",
    ),
    Setting("events of eight tokens", "--stream-interval 8"),
    Setting("roles can be switched", "--enable-pd-role-switch"),
    Setting("slots refilled by four", "--min-free-slots-delay 4"),
    Setting("cache of sessions", "--enable-session-radix-cache"),
    Setting(
        "two data-parallel ranks",
        "--dp-size 2",
        env=TWO_RANKS,
        parks=False,
        pauses=False,
    ),
)

# Flags of SGLang's `schedule`, `disagg` and cache namespaces that no setting names, and why.
LEFT_OUT = {
    "--mem-fraction-static": "KV is given in tokens here",
    "--max-queued-requests": "ignored under PD",
    "--prefill-decode-interval": "unified serving only",
    "--prefill-decode-interval-min-bs": "unified serving only",
    "--enable-dynamic-chunking": "pipeline parallelism only, which is refused",
    "--abort-on-priority-when-disabled": "refuses requests, schedules nothing",
    "--c128-page-size": "NPU only",
    "--swa-full-tokens-ratio": "sliding-window models",
    "--swa-prefix-tails": "sliding-window models",
    "--disable-hybrid-swa-memory": "sliding-window models",
    "--prefill-only-disable-kv-cache": "embedding models",
    "--disable-chunked-prefix-cache": "DeepSeek's attention",
    "--num-continuous-decode-steps": "unified serving only",
    "--max-mamba-cache-size": "state-space models",
    "--mamba-full-memory-ratio": "state-space models",
    "--enable-hierarchical-cache": "needs pinned host memory, thus a GPU",
    "--speculative-algorithm": "its kernels run on CUDA only; packing falls back: test_engine_fallbacks",
    "--enable-lora": "test_lora",
    "--tp-size": "test_tp2",
    "--disaggregation-mode": "every pair has both",
    "--disaggregation-bootstrap-port": "chosen by the cluster",
    "--disaggregation-ib-device": "needs RDMA",
    "--disaggregation-decode-enable-offload-kvcache": "needs pinned host memory, thus a GPU",
    "--disaggregation-decode-retraction-backup": "cpu_tensor is the one that runs without a GPU",
}
LEFT_OUT["--disaggregation-decode-host-receive-threshold"] = "no transfer backend of SGLang has it"
LEFT_OUT |= dict.fromkeys(
    ("--enable-pdmux", "--pdmux-config-path", "--sm-group-num"), "splits a GPU's multiprocessors"
)
LEFT_OUT |= dict.fromkeys(
    (
        "--enable-prefill-delayer",
        "--prefill-delayer-max-delay-passes",
        "--prefill-delayer-token-usage-low-watermark",
        "--prefill-delayer-forward-passes-buckets",
        "--prefill-delayer-wait-seconds-buckets",
        "--prefill-delayer-queue-min-ratio",
        "--prefill-delayer-max-delay-ms",
    ),
    "DP attention only",
)


def named(settings: Iterable[Setting] = SETTINGS) -> set[str]:
    """Every flag that some setting names."""
    return set().union(*(setting.flags() for setting in settings))
