"""Chooses where a server's predictors start, and saves what they learn.

A server starts from its own entry of ``--kairos-latency-model FILE``. Without one it starts from
the model that ships for its (model, GPU, TP), else from a generic one that some ten steps replace.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang_kairos.engine import compat
from sglang_kairos.engine.state.tp_sync import rank_of
from sglang_kairos.predict.learnt_file import Key, load_profile, resume, save_profile
from sglang_kairos.predict.online_decode import StepTimeModel
from sglang_kairos.predict.online_prefill import PrefillTimeModel
from sglang_kairos.predict.shipped_models import ProfileError, Seed, seed_for

logger = logging.getLogger("sglang_kairos")

SAVE_EVERY_S = 60.0
UNKNOWN = Seed("", "", 1)


class Profile:
    """The latency models of one server. `start` gives the predictors, `keep` saves them once a minute."""

    def __init__(self, scheduler: Any, path: str) -> None:
        self.key = _key(scheduler)
        self.source = "generic"
        """The origin of the predictors: generic, shipped or file."""
        self._path = Path(path) if path else None
        self._saved_s: float | None = None
        self._saving = threading.Lock()
        self.writes = self._path is not None and rank_of(scheduler) == 0
        """Whether `keep` ever does anything."""

    def start(self, captured_sizes: list[int] | None) -> tuple[PrefillTimeModel, StepTimeModel]:
        """Returns new predictors. A file that cannot be used is named in the log and left alone."""
        key = self.key
        seed = seed_for(key.model, key.gpu, key.tp)
        if seed is not None:
            self.source = "shipped"
        learnt, base = self._load(), seed or UNKNOWN
        mine = learnt or UNKNOWN
        prefill = (mine if mine.prefill else base).prefill_model()
        decode = (mine if mine.decode else base).decode_model(captured_sizes)
        if learnt is not None:
            if mine.prefill or mine.decode:
                self.source = "file"
            try:
                resume(learnt, prefill=prefill)
                resume(learnt, decode=decode)
                self.source = "file"
            except ProfileError as error:
                logger.warning("Kairos: --kairos-latency-model %s: %s: not used", self._path, error)
        return prefill, decode

    def keep(self, now_s: float, prefill: Callable[[], Any], decode: Callable[[], Any]) -> None:
        """Saves what was learnt if the last time is a minute ago. Each argument gives a snapshot or None.

        A thread of its own waits for the disk. An OSError is logged there; nothing is raised.
        """
        if not self.writes:
            return
        if self._saved_s is None:
            self._saved_s = now_s
        if now_s - self._saved_s < SAVE_EVERY_S:
            return
        self._saved_s = now_s
        parts = prefill(), decode()
        threading.Thread(target=self._save, args=parts, daemon=True).start()

    def _save(self, prefill: Any, decode: Any) -> None:
        assert self._path is not None
        with self._saving:
            try:
                save_profile(self._path, self.key, prefill_state=prefill, decode_state=decode)
            except OSError as error:
                logger.warning(
                    "Kairos: --kairos-latency-model %s cannot be written: %s", self._path, error
                )

    def _load(self) -> Seed | None:
        if self._path is None:
            return None
        try:
            return load_profile(self._path, self.key)
        except ProfileError as error:
            logger.warning("Kairos: --kairos-latency-model ignored: %s", error)
            return None


def _key(scheduler: Any) -> Key:
    gpu = "cpu"
    if scheduler.device == "cuda":
        import torch

        gpu = torch.cuda.get_device_name()
    args = getattr(scheduler, "server_args", None)
    return Key.of_server(lambda name: getattr(args, name, None), gpu, compat.tp_size(scheduler))
