"""Keeps what a server learnt about its step times in a file, across restarts.

The format is that of `shipped_models`. An entry belongs to one `Key`, so the file of another
machine, model or kernel is never used. A file is replaced as a whole: a reader sees the old or the
new one. Two servers may share a file, since each keeps the entries and parts that it does not know.
When both write in the same instant, the later one wins. The other's part is back at its next save.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_kairos.predict.online_decode import StepTimeModel
from sglang_kairos.predict.online_prefill import PrefillTimeModel
from sglang_kairos.predict.shipped_models import ProfileError, Seed, dump, parse

LARGEST_BYTES = 64 << 20
# What decides which kernels run, by SGLang's names.
KERNEL_SETTINGS = (
    "attention_backend",
    "moe_runner_backend",
    "quantization",
    "kv_cache_dtype",
    "dtype",
)


@dataclass(frozen=True)
class Key:
    """What step times depend on. `backends`: attention, MoE and quantisation kernels, as text."""

    model: str
    gpu: str
    tp: int
    backends: str = ""

    @classmethod
    def of_server(cls, setting: Callable[[str], Any], gpu: str, tp: int) -> Key:
        """Returns the key of a server. `setting` looks up an SGLang argument by name.

        None if not set.
        """

        def of(name: str) -> str:
            return str(setting(name) or "")

        model = of("served_model_name") or of("model_path") or "unknown"
        return cls(model, gpu, tp, "/".join(map(of, KERNEL_SETTINGS)))


def load_profile(path: str | Path, key: Key) -> Seed | None:
    """Returns the entry of exactly this key; None if there is no file or no such entry.

    Raises ProfileError for a file that is damaged, foreign or unreadable; the caller may go on
    without.
    """
    for seed in _read(Path(path)):
        if _key(seed) == key:
            return seed
    return None


def save_profile(
    path: str | Path,
    key: Key,
    *,
    prefill_state: Mapping[str, Any] | None = None,
    decode_state: Mapping[str, Any] | None = None,
) -> None:
    """Writes what predictors learnt, as their `snapshot`. Raises OSError if that fails.

    A part that is None keeps what the file has for it. A damaged file is replaced. This waits for
    the disk, so a scheduler's own thread must not call it.
    """
    path = Path(path)
    try:
        seeds = _read(path)
    except ProfileError:
        seeds = []
    fresh = Seed(key.model, key.gpu, key.tp, backends=key.backends, provenance="learnt in service")
    mine = next((seed for seed in seeds if _key(seed) == key), fresh)
    mine = dataclasses.replace(
        mine,
        prefill_state=prefill_state or mine.prefill_state,
        decode_state=decode_state or mine.decode_state,
    )
    _replace(path, dump([*(seed for seed in seeds if _key(seed) != key), mine]))


def resume(
    seed: Seed, prefill: PrefillTimeModel | None = None, decode: StepTimeModel | None = None
) -> None:
    """Restores predictors from the entry's states.

    Raises ProfileError naming the part that does not fit. A predictor whose part is missing or does
    not fit is left as it is.
    """
    for name, model, state in (
        ("prefill_state", prefill, seed.prefill_state),
        ("decode_state", decode, seed.decode_state),
    ):
        if model is None or state is None:
            continue
        try:
            model.restore(state)
        except ValueError as error:
            raise ProfileError(f"{name}.{error}") from None


def _key(seed: Seed) -> Key:
    return Key(seed.model, seed.gpu, seed.tp, seed.backends)


def _read(path: Path) -> list[Seed]:
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise ProfileError(f"{path}: larger than {LARGEST_BYTES} bytes: not a profile")
        return parse(path.read_bytes(), str(path))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read: {error}") from None


def _replace(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
