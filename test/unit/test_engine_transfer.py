"""A request's transfer is not lost to a race of threads, and when it fails it fails alone."""

from __future__ import annotations

import functools
import logging
import threading
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_kairos.engine.hooks.transfer import check_status, transfer_worker, update_status

pytestmark = pytest.mark.filterwarnings("ignore")
ROOM = 7


@pytest.fixture(scope="module")
def polls() -> Any:
    """SGLang's statuses of a transfer."""
    pytest.importorskip("sglang")
    from sglang.srt.disaggregation.base.conn import KVPoll

    return KVPoll


class ClearedMeanwhile(dict[int, int]):
    """As when the scheduler clears a room between upstream's two look-ups."""

    def __contains__(self, key: object) -> bool:
        return True


def test_a_room_that_was_cleared_between_two_look_ups_has_failed(polls: Any) -> None:
    from sglang.srt.disaggregation.common.conn import CommonKVManager

    stock = CommonKVManager.check_status
    manager = SimpleNamespace(request_status=ClearedMeanwhile({1: polls.Transferring}))
    assert 2 in manager.request_status
    with pytest.raises(KeyError):  # what ends upstream's transfer thread
        stock(manager, 2)
    assert check_status(stock, manager, 2) == polls.Failed
    assert check_status(stock, manager, 1) == polls.Transferring


class LookedUp(dict[int, int]):
    """Runs `then` once, right after the first look-up of a room and before its answer is used."""

    def __init__(self) -> None:
        super().__init__()
        self.then: Callable[[], None] | None = None

    def _looked(self) -> None:
        then, self.then = self.then, None
        if then is not None:
            then()

    def get(self, *key_and_default: Any) -> Any:  # v0.5.23 looks it up so
        found = super().get(*key_and_default)
        self._looked()
        return found

    def __contains__(self, key: object) -> bool:  # and v0.5.16 so
        found = super().__contains__(key)
        self._looked()
        return found


def opened_during_the_handshake(change: Callable[..., Any], polls: Any, within_s: float) -> int:
    """The status of a room whose hand-shake arrives while the scheduler opens it.

    The scheduler goes on when the hand-shake is through, or after `within_s` seconds.
    """
    statuses = LookedUp()
    manager = SimpleNamespace(
        request_status=statuses,
        _deferred_ack_targets={},
        _deferred_ack_poisoned_rooms=set(),
        _staging_outstanding={},
        deferred_bootstrap=None,
    )
    handshake = threading.Thread(target=change, args=(manager, ROOM, polls.WaitingForInput))

    def meanwhile() -> None:
        handshake.start()
        handshake.join(within_s)

    statuses.then = meanwhile
    change(manager, ROOM, polls.Bootstrapping)
    handshake.join()
    return statuses[ROOM]


def test_a_handshake_that_arrives_while_the_request_is_opened_is_not_lost(polls: Any) -> None:
    from sglang.srt.disaggregation.common.conn import CommonKVManager

    stock = CommonKVManager.update_status
    lost = opened_during_the_handshake(stock, polls, within_s=60.0)
    assert lost == polls.Bootstrapping, "upstream has mended it: the seam can go"
    ours = functools.partial(update_status, stock)  # its hand-shake waits for its turn
    assert opened_during_the_handshake(ours, polls, within_s=0.2) == polls.WaitingForInput


def test_a_status_change_may_cause_another(polls: Any) -> None:
    manager = SimpleNamespace(changed=[])

    def original(manager: Any, room: int, status: int) -> None:
        manager.changed.append((room, status))
        if room:
            update_status(original, manager, room - 1, status)

    update_status(original, manager, 2, polls.Failed)
    assert manager.changed == [(2, polls.Failed), (1, polls.Failed), (0, polls.Failed)]


class Manager:
    """What the transfer thread asks of its manager, and what it is told."""

    enable_trace = enable_deferred_decode_kv_release = enable_staging = False
    bootstrap_port = 1

    def __init__(self, request_status: dict[int, int]) -> None:
        self.request_status = request_status
        self.transfer_infos: dict[int, Any] = {}
        self.req_to_decode_prefix_len: dict[int, int] = {}
        self._staging_outstanding: defaultdict[int, int] = defaultdict(int)
        self.failed: list[int] = []

    def check_status(self, room: int) -> int:
        return self.request_status[room]

    def poison_deferred_ack_room(self, room: int) -> None:
        pass

    def conclude_failure(self, *, bootstrap_room: int, failure_reason: str) -> None:
        assert "prefill server's log" in failure_reason
        self.failed.append(bootstrap_room)


class OlderManager(Manager):
    """As of v0.5.16."""

    conclude_failure = property()  # type: ignore[assignment]

    def record_failure(self, room: int, reason: str) -> None:
        assert "prefill server's log" in reason

    def update_status(self, room: int, status: int) -> None:
        self.request_status[room] = status
        self.failed.append(room)


def raises() -> None:
    raise OSError("broken")


def chunk(room: int, synchronize: Callable[[], None] = raises) -> Any:
    """One part of a request's KV, whose sending raises unless told otherwise."""
    return SimpleNamespace(
        room=room,
        staging_counted=False,
        wait_event=None,
        indices_event=SimpleNamespace(synchronize=synchronize),
        prefill_kv_indices=[],
        is_last_chunk=True,
    )


def queue_of(*chunks: Any) -> Any:
    """SGLang's own queue; None ends the thread."""
    from sglang.srt.disaggregation.common.utils import FastQueue

    queue = FastQueue()
    for each in chunks:
        queue.put(each)
    return queue


@pytest.mark.parametrize("kind", [Manager, OlderManager])
def test_an_error_in_one_transfer_fails_that_request_and_the_thread_goes_on(
    kind: type[Manager], polls: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager

    stock = MooncakeKVManager.transfer_worker
    with pytest.raises(RuntimeError, match="Transfer thread failed because of broken"):
        stock(Manager({1: polls.WaitingForInput}), queue_of(chunk(1), None), None)

    statuses = {
        1: polls.WaitingForInput,
        2: polls.WaitingForInput,
        3: polls.Success,
        4: polls.Transferring,
    }
    manager = kind(dict(statuses))
    sent: list[int] = []
    queue = queue_of(
        chunk(1),
        chunk(2, lambda: sent.append(2)),
        chunk(3),  # over: what raised came after it
        chunk(4),
        chunk(5),  # cleared meanwhile
        None,
    )
    with caplog.at_level(logging.ERROR, logger="sglang_kairos"):
        transfer_worker(stock, manager, queue, None)
    assert sent == [2]
    assert manager.failed == [1, 4]
    assert manager.request_status[3] == polls.Success
    assert not any(manager._staging_outstanding.values()), "upstream would wait for them"
    errors = [each for each in caplog.records if each.name.startswith("sglang_kairos")]
    assert [each.args for each in errors] == [(1,), (3,), (4,), (5,)]


def test_an_error_of_the_queue_itself_is_raised(polls: Any) -> None:
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager

    class Broken:
        def get(self) -> Any:
            raise OSError("no queue")

    with pytest.raises(RuntimeError, match="no queue"):
        transfer_worker(MooncakeKVManager.transfer_worker, Manager({}), Broken(), None)


def test_a_chunk_put_back_reaches_the_queue() -> None:
    taken: list[int] = []

    def original(manager: Any, queue: Any, executor: Any, staging_buffer: Any = None) -> str:
        taken.append(queue.get().room)
        queue.put(chunk(2))
        taken.append(queue.get().room)
        return f"{executor} {staging_buffer}"

    ended = transfer_worker(original, Manager({}), queue_of(chunk(1)), "pool", staging_buffer="b")
    assert taken == [1, 2] and ended == "pool b"
