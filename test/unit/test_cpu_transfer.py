"""What lets KV checksums and NIXL run without a GPU."""

from __future__ import annotations

import ctypes
import zlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_kairos.cpu import adapt, checksum, runtime

tables = st.lists(
    st.tuples(st.integers(1, 5), st.binary(min_size=1, max_size=60)), min_size=1, max_size=4
)


@given(tables, st.data())
def test_a_checksum_is_adler32_of_the_rows_in_their_order(
    made: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    kept, lengths, wanted = [], [], b""
    count = min(len(content) // length for length, content in made)
    indices = data.draw(st.lists(st.integers(0, count - 1), max_size=9)) if count else []
    for length, content in made:
        kept.append(ctypes.create_string_buffer(content, len(content)))
        lengths.append(length)
        wanted += b"".join(content[i * length : (i + 1) * length] for i in indices)
    computer = SimpleNamespace(
        _kv_data_ptrs=[ctypes.addressof(buffer) for buffer in kept],
        _kv_item_lens=lengths,
        _state_data_ptrs=[],
        _state_item_lens=[],
    )
    rows = torch.tensor(indices, dtype=torch.int64)
    assert checksum.compute(computer, rows) == zlib.adler32(wanted)


def test_the_state_of_a_request_counts_as_well() -> None:
    buffer = ctypes.create_string_buffer(bytes(range(40)), 40)
    at = ctypes.addressof(buffer)
    computer = SimpleNamespace(
        _kv_data_ptrs=[at], _kv_item_lens=[4], _state_data_ptrs=[at], _state_item_lens=[10]
    )
    found = checksum.compute(computer, torch.tensor([2, 0]), torch.tensor([3]))
    assert found == zlib.adler32(bytes([8, 9, 10, 11, 0, 1, 2, 3, *range(30, 40)]))


def test_sglangs_own_computer_gets_it_where_there_is_no_gpu() -> None:
    module: Any = SimpleNamespace(KvChecksumComputer=type("KvChecksumComputer", (), {}))
    adapt._AFTER["sglang.srt.disaggregation.checksum"](module)
    has_it = getattr(module.KvChecksumComputer, "compute", None) is checksum.compute
    assert has_it == (not torch.cuda.is_available())
    adapt._AFTER["sglang.srt.disaggregation.checksum"](SimpleNamespace())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["nixl_cu12._api", "nixl_cu13._api"])
def test_nixl_takes_what_is_called_a_gpus_memory_for_the_hosts(name: str) -> None:
    class Agent:
        def __init__(self, label: str, *, config: int = 0) -> None:
            self.label, self.config = label, config
            self.nixl_mems = {"DRAM": 1, "VRAM": 2, "FILE": 3}

    adapt._AFTER[name](SimpleNamespace(nixl_agent=Agent))  # type: ignore[arg-type]
    agent = Agent("a", config=5)
    assert (agent.label, agent.config) == ("a", 5)
    assert agent.nixl_mems == {"DRAM": 1, "VRAM": 1, "FILE": 3}
    adapt._AFTER[name](SimpleNamespace())  # type: ignore[arg-type]


def test_whatever_is_adapted_is_hooked() -> None:
    assert {*adapt._AFTER, *adapt._BEFORE, "sgl_kernel"} == set(runtime.HOOKED)
