"""Adds the server flags that a machine without a GPU needs.

Pure functions: arguments in, arguments out. A flag that the user gave is never changed or repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Mode = str
MODES: tuple[Mode, ...] = ("null", "prefill", "decode")

# The first version that has the flag. Earlier ones neither have nor need it.
_RETRACTION_BACKUP_SINCE = (0, 5, 18)

_ALWAYS: dict[str, str | None] = {
    "--device": "cpu",
    "--attention-backend": "torch_native",
    "--disable-cuda-graph": None,
    # "auto" serves float32 checkpoints in half precision, which a CPU without AMX emulates.
    "--dtype": "float32",
    # A share of the host's memory, which other servers want as well.
    "--mem-fraction-static": "0.3",
    "--max-total-tokens": "65536",
    # The default of 2048 rows of the request-to-token table takes a second to clear.
    "--max-running-requests": "256",
    # An idle scheduler otherwise polls in a loop and takes a third of a core from its neighbours.
    "--sleep-on-idle": None,
}
_DISAGGREGATED: dict[str, str | None] = {"--disaggregation-transfer-backend": "mooncake"}
# The default is a pinned host pool, which asks for CUDA.
_RETRACTION_BACKUP: dict[str, str | None] = {
    "--disaggregation-decode-retraction-backup": "cpu_tensor"
}
_FAST_START: dict[str, str | None] = {"--skip-server-warmup": None}

# Other spellings that settle the same question.
_SYNONYMS = {
    "--disable-cuda-graph": ("--cuda-graph-config", "--disable-decode-cuda-graph"),
    "--attention-backend": ("--prefill-attention-backend", "--decode-attention-backend"),
}


def with_server_flags(
    argv: Sequence[str], *, version: str = "0.5.23", fast_start: bool = False
) -> list[str]:
    """Returns `argv` of a server with the flags it still lacks appended; the mode is read from `argv`.

    `version` is SGLang's. `fast_start` leaves out the warm-up request, so the first request pays
    for it. Raises ValueError for an unknown mode.
    """
    given = {argument.split("=", 1)[0] for argument in argv if argument.startswith("--")}
    wanted = _wanted(mode_of(argv), version, fast_start)
    missing = (
        (flag, value)
        for flag, value in wanted.items()
        if not given.intersection((flag, *_SYNONYMS.get(flag, ())))
    )
    return [*argv, *_flatten(missing)]


def mode_of(argv: Sequence[str]) -> Mode:
    """Returns the disaggregation mode that `argv` asks for: the last one given, else null."""
    return _value_of(argv, ("--disaggregation-mode",), "null")


def _value_of(argv: Sequence[str], names: Sequence[str], default: str) -> str:
    value = default
    for i, argument in enumerate(argv):
        name, equals, attached = argument.partition("=")
        if name in names and (equals or i + 1 < len(argv)):
            value = attached if equals else argv[i + 1]
    return value


def _wanted(mode: Mode, version: str, fast_start: bool) -> dict[str, str | None]:
    if mode not in MODES:
        raise ValueError(f"--disaggregation-mode: must be one of {', '.join(MODES)}, got {mode!r}")
    flags = dict(_ALWAYS)
    if mode != "null":
        flags |= _DISAGGREGATED
    if mode == "decode" and _numbers(version) >= _RETRACTION_BACKUP_SINCE:
        flags |= _RETRACTION_BACKUP
    if fast_start:
        flags |= _FAST_START
    return flags


def _numbers(version: str) -> tuple[int, ...]:
    """Returns the leading number of each of the first three parts: ``0.5.23.post1`` is (0, 5, 23)."""
    parts = version.lstrip("v").split(".")[:3]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)


def _flatten(flags: Iterable[tuple[str, str | None]]) -> list[str]:
    return [word for flag, value in flags for word in (flag, value) if word is not None]
