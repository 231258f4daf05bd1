"""Lets what happens elsewhere end what a request's task is waiting for.

A client that leaves, a server that is gone, a timeout and prefill's refusal each interrupt the task.
Each does so with an exception of its own. It is raised where the task waits inside ``async with
cancellation``; when the task waits for nothing, at the next entry.
"""

from __future__ import annotations

import asyncio
from types import TracebackType


class Cancellation:
    """Of one task: make it in the task it is for."""

    __slots__ = ("_cause", "_listening", "_task")

    def __init__(self) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("Cancellation belongs to a task")
        self._task: asyncio.Task[object] = task
        self._cause: Exception | None = None
        self._listening = False

    def interrupt(self, cause: Exception) -> None:
        """Raise `cause` in the task. Only the first counts until it has been raised."""
        if self._cause is not None:
            return
        self._cause = cause
        if self._listening and asyncio.current_task() is not self._task:
            self._task.cancel()

    def forget(self, kinds: tuple[type[Exception], ...]) -> None:
        """Drop an interruption of these kinds that has not been raised: its reason is gone."""
        if not self._listening and isinstance(self._cause, kinds):
            self._cause = None

    async def __aenter__(self) -> Cancellation:
        if self._cause is not None:
            self._raise()
        self._listening = True
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listening = False
        if self._cause is None:
            return
        # Interrupted by itself, the task was not cancelled and there is nothing to take back.
        if isinstance(error, asyncio.CancelledError):
            if self._task.uncancel() > 0:
                return  # somebody else wants the whole task to end
            self._raise()
        if error is None:
            self._raise()

    def _raise(self) -> None:
        cause, self._cause = self._cause, None
        assert cause is not None
        raise cause
