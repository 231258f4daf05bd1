"""The portability fixes among the patches, as edits that fit every version that needs them.

`make.py` renders them. A fix whose first edit finds nothing to change is not needed in that version;
one of which a part only fits needs a person.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


class Unfit(Exception):
    """A fix is needed and does not fit; the message says which part."""


@dataclass(frozen=True)
class Edit:
    """One change: the first of `ways`, a regular expression and its replacement, that matches once."""

    ways: tuple[tuple[str, str], ...]

    def made(self, source: str) -> str | None:
        """`source` with the change; None where no way matches, or one does so twice."""
        for pattern, replacement in self.ways:
            if len(re.findall(pattern, source, re.M)) == 1:
                return re.sub(pattern, replacement, source, flags=re.M)
        return None


@dataclass(frozen=True)
class Fix:
    """One patch: its name, message, the file of SGLang's package it changes, and how."""

    name: str
    subject: str
    body: str
    path: str
    edits: tuple[Edit, ...]

    def made(self, source: str | None) -> str | None:
        """`source` with the fix; None where it is not needed. Raises Unfit."""
        changed = None if source is None else self.edits[0].made(source)
        for number, edit in enumerate(self.edits[1:], 2):
            if changed is None:
                break
            changed = edit.made(changed)
            if changed is None:
                raise Unfit(f"{self.name}: part {number} of {len(self.edits)} finds no place")
        return changed


def _edit(*ways: tuple[str, str]) -> Edit:
    return Edit(ways)


FIXES = (
    Fix(
        "early-send-event-without-cuda",
        "PD: create the early-send event on the scheduler's own device",
        """\
maybe_send_cached_prefix_chunk builds a torch.cuda.Event whatever the device
is. On a build without CUDA that raises "Tried to instantiate dummy base class
Event" and takes the prefill scheduler down on the first request that hits a
cached prefix under overlap scheduling, which is the default.

Take the event from self.device_module, as the overlap code of the scheduler
does. On CUDA and ROCm that is torch.cuda, so nothing changes there.""",
        "srt/disaggregation/prefill.py",
        (_edit((r"^( +ev = )torch\.cuda\.Event\(\)$", r"\1self.device_module.Event()")),),
    ),
    Fix(
        "send-kv-chunk-without-cuda",
        "PD: copy page indices to the host without assuming CUDA",
        """\
_send_kv_chunk hands page indices to Mooncake as a pinned host tensor plus an
event on the current stream. Pinned memory and torch.cuda.current_stream both
need CUDA, so a prefill server on another device dies on its first transfer.

Take stream and event from self.device_module, and pin only when the indices
come from an accelerator. On the CPU the copy is complete when copy_ returns
and the event is a no-op. On CUDA and ROCm nothing changes.""",
        "srt/disaggregation/prefill.py",
        (
            _edit(
                (
                    r"^( +)indices_event = torch\.cuda\.Event\(\)\n"
                    r" +indices_event\.record\(torch\.cuda\.current_stream\(\)\)$",
                    r"\1indices_event = self.device_module.Event()\n"
                    r"\1indices_event.record(self.device_module.current_stream())",
                )
            ),
            _edit(
                (
                    r"^( +)pin_memory=True,$",
                    r'\1pin_memory=page_indices_dev.device.type != "cpu",',
                )
            ),
        ),
    ),
    Fix(
        "decode-retraction-backup-on-cpu",
        "PD: back decode retraction up with CPU tensors on CPU servers",
        """\
A decode server that was not told otherwise chooses the host_pool backend for
retracted requests. Its host pool is pinned and copied to by CUDA kernels, so
on a CPU server the choice fails at start-up and every CPU user has to pass
--disaggregation-decode-retraction-backup cpu_tensor.

Infer cpu_tensor there, as is done for HIP. An explicit flag still wins.""",
        "srt/mem_cache/kv_cache_builder.py",
        (
            _edit(
                (
                    r"^( +)and not get_parallel\(\)\.dcp_enabled$",
                    r"\1# The pool is pinned and filled by device kernels: a CPU has neither.\n"
                    r"\1and not is_cpu()\n"
                    r"\1and not get_parallel().dcp_enabled",
                )
            ),
            _edit(
                (r"^(from sglang\.srt\.utils import (?:.*, )?)is_hip\b", r"\1is_cpu, is_hip"),
                # v0.5.18 imports nothing from there.
                (
                    r"^(from sglang\.srt\.runtime_context import \([^)]*\)\n)(?=\nif TYPE_CHECKING)",
                    r"\1from sglang.srt.utils import is_cpu\n",
                ),
            ),
        ),
    ),
)
