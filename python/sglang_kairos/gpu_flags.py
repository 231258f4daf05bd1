"""The server flags that Kairos prefers on a machine with an NVIDIA GPU.

Pure: arguments in, arguments out. Only what the user left open is filled in. CUDA graphs and overlap
scheduling stay as SGLang has them, which is on: Kairos packs into the captured batch sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

BACKEND = ("--attention-backend", "flashinfer")
# Any of these settles the question; so does a file of settings, which we do not read.
_SETTLED = (
    "--attention-backend",
    "--prefill-attention-backend",
    "--decode-attention-backend",
    "--config",
)


def with_gpu_flags(argv: Sequence[str], *, flashinfer: bool) -> list[str]:
    """`argv` of a server with Kairos' preferences for CUDA appended where it has none.

    `flashinfer`: whether that package can be imported; without it SGLang chooses. Abbreviations
    that SGLang's parser accepts (``--attention-b``) count as given.
    """
    given = [word.split("=", 1)[0] for word in argv if word.startswith("--")]
    settled = any(
        word in _SETTLED or (len(word) > len("--atte") and _abbreviates(word)) for word in given
    )
    if settled or not flashinfer or _device(argv) not in ("", "cuda"):
        return list(argv)
    return [*argv, *BACKEND]


def _abbreviates(word: str) -> bool:
    return any(flag.startswith(word) for flag in _SETTLED)


def _device(argv: Sequence[str]) -> str:
    device = ""
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        if word == "--device":
            device = following
        elif word.startswith("--device="):
            device = word.partition("=")[2]
    return device
