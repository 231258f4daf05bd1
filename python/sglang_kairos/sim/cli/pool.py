"""Runs tasks in a pool of processes; results come in the order of the tasks."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from types import TracebackType
from typing import Self, TypeVar

T = TypeVar("T")
Progress = Callable[[int, int], None]


def usable_cores() -> int:
    """Returns the number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Workers:
    """`jobs` processes, started when first needed. With one job everything runs in this process.

    Leaving the `with` block by an exception, Ctrl-C included, ends the processes at once. They are
    spawned, so a script that uses them needs the usual ``if __name__ == "__main__":``.
    """

    def __init__(self, jobs: int) -> None:
        if jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {jobs}")
        self.jobs = jobs
        self._pool: ProcessPoolExecutor | None = None
        self._others = frozenset(multiprocessing.active_children())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is None:
            return
        if kind is not None:
            for child in multiprocessing.active_children():
                if child not in self._others:
                    child.terminate()
        self._pool.shutdown(cancel_futures=True)

    def run(self, tasks: Sequence[Callable[[], T]], progress: Progress | None = None) -> list[T]:
        """Returns the result of each of `tasks`, in their order. `progress(done, all)` follows each end.

        Tasks and results are pickled when there is more than one job. A task's exception is raised
        here as soon as it happens.
        """
        count = len(tasks)
        if self.jobs == 1:
            results: list[T] = []
            for task in tasks:
                results.append(task())
                if progress is not None:
                    progress(len(results), count)
            return results
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.jobs, context, initializer=_die_on_interrupt)
        futures = [self._pool.submit(task) for task in tasks]
        left = set(futures)
        while left:
            ended, left = wait(left, return_when=FIRST_COMPLETED)
            for future in ended:
                future.result()
            if progress is not None:
                progress(count - len(left), count)
        return [future.result() for future in futures]


def _die_on_interrupt() -> None:
    # Ctrl-C reaches every process of the terminal, and workers shall end without a traceback each.
    # Where it is ignored (a shell's background job), it stays ignored.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
