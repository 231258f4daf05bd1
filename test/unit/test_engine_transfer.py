"""A transfer whose request was cleared meanwhile fails alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sglang_kairos.engine.transfer import check_status


class ClearedMeanwhile(dict[int, int]):
    """As when the scheduler clears a room between upstream's two look-ups."""

    def __contains__(self, key: object) -> bool:
        return True


@pytest.mark.filterwarnings("ignore")
def test_a_room_that_was_cleared_between_two_look_ups_has_failed() -> None:
    pytest.importorskip("sglang")
    from sglang.srt.disaggregation.base.conn import KVPoll
    from sglang.srt.disaggregation.common.conn import CommonKVManager

    stock = CommonKVManager.check_status
    manager = SimpleNamespace(request_status=ClearedMeanwhile({1: KVPoll.Transferring}))
    assert 2 in manager.request_status
    with pytest.raises(KeyError):  # what ends upstream's transfer thread
        stock(manager, 2)
    assert check_status(stock, manager, 2) == KVPoll.Failed
    assert check_status(stock, manager, 1) == KVPoll.Transferring
