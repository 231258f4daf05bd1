"""Judges what a change of SGLang means for each seam, as far as a machine can tell.

`survey` says which texts are known; this module looks at the others. Is everything there that the
handler relies on (`engine.seams.relied`)? Does another seam of the table serve in its place? What
is left needs a person. Source is read; nothing of SGLang is imported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import sglang_kairos
from sglang_kairos.engine.fingerprints import known_texts
from sglang_kairos.engine.fingerprints.meanings import Delegates, SourceCheck
from sglang_kairos.engine.fingerprints.upstream_ast import Signature, SourceTree
from sglang_kairos.engine.seams import relied, relied_meanings
from sglang_kairos.engine.seams.callees import Callee
from sglang_kairos.engine.seams.table import SEAMS, SUPPORTED_VERSIONS, Seam
from sglang_kairos.engine.survey import Texts

Kind = Literal["as in", "harmless", "compat", "another", "person"]
GOOD: tuple[Kind, ...] = ("as in", "harmless", "compat")


@dataclass(frozen=True)
class SeamVerdict:
    """The verdict on one seam in one tree; `reasons` are in words.

    `kind` is one of:
    - *as in*: the text is that of a known version;
    - *harmless*: the text changed, and everything relied on is there;
    - *compat*: likewise, but an older layout serves for some of it;
    - *another*: it is not wrapped, since another seam serves or none is needed;
    - *person*: somebody must look.

    `text`: hash of the function's text, empty if there is none; `like`: the versions that have it.
    `callees`: functions of SGLang that the handler calls or replaces (`engine.seams.callees`), each
    with its hash and whether it is known.
    """

    seam: Seam
    kind: Kind
    reasons: tuple[str, ...] = ()
    text: str = ""
    like: tuple[str, ...] = ()
    callees: tuple[tuple[Callee, str, bool], ...] = ()

    @property
    def wrapped(self) -> bool:
        """Returns whether the seam is to be wrapped in that tree."""
        return self.kind in GOOD

    @property
    def known(self) -> bool:
        """Returns whether all its texts are known, so that Kairos starts."""
        return not self.wrapped or (bool(self.like) and all(known for *_, known in self.callees))

    def __str__(self) -> str:
        said = {
            "as in": f"as in v{self.like[0]}" if self.like else "",
            "harmless": "text changed, everything relied on is there",
            "compat": "text changed, compat serves",
            "another": "not wrapped",
            "person": "needs a person",
        }[self.kind]
        if self.kind in GOOD and self.like and not self.known:
            said = f"as in v{self.like[0]}, but not all that it calls"
        return f"{said}: {'; '.join(self.reasons)}" if self.reasons else said


class Judge:
    """Judges one SGLang. `package`: its folder. `version`: what it is, or is closest to.

    `versions`: those whose texts count as known. `layouts`: whether an alternative of
    `engine.seams.relied` counts as known. Both serve to test a table that knows less than Kairos
    does.
    """

    def __init__(
        self,
        package: Path,
        version: str,
        versions: Sequence[str] = SUPPORTED_VERSIONS,
        layouts: Callable[[str], bool] = lambda choice: True,
        seams: Iterable[Seam] = SEAMS,
    ) -> None:
        self.tree = SourceTree(package)
        self._texts = Texts(package)
        self._version = version
        self._versions = versions
        self._layouts = layouts
        self._seams = [seam for seam in seams if self._known(seam)]

    def verdicts(self) -> list[SeamVerdict]:
        """Returns one verdict for each seam of the table."""
        own = {seam.qualname: self._alone(seam) for seam in self._seams}
        return [self._among(seam, own) for seam in self._seams]

    def _among(self, seam: Seam, own: dict[str, SeamVerdict]) -> SeamVerdict:
        """Returns the verdict of the first good seam among those that stand for one another."""
        mine = own[seam.qualname]
        others = [own[name] for name in seam.instead if name in own]
        complete = len(others) == len(seam.instead) > 0
        well = complete and all(other.wrapped for other in others)
        names = ", ".join(other.seam.qualname for other in others)
        first = self._seams.index(seam)
        earlier = complete and all(self._seams.index(other.seam) < first for other in others)
        if well and (earlier or not mine.wrapped):
            reasons = (f"{names} serves", *mine.reasons)
            return SeamVerdict(seam, "another", reasons, mine.text, mine.like)
        nobody = not mine.text and not any(other.text for other in others)
        if not mine.wrapped and seam.elsewhere and nobody:
            return SeamVerdict(seam, "another", (f"as before: {seam.elsewhere}",))
        return mine

    def _alone(self, seam: Seam) -> SeamVerdict:
        text, trouble = self._texts.of(seam)
        if not text:
            return SeamVerdict(seam, "person", (trouble,))
        known = self._known(seam)
        like = tuple(version for version, print_ in known.items() if print_ == text)
        callees = tuple(self._callees(seam))
        # This is checked for a known text too: what it relies on may have moved elsewhere.
        compat, faults = self._attributes(seam)
        if not faults and like and all(is_known for *_, is_known in callees):
            return SeamVerdict(seam, "as in", (), text, like, callees)
        if not like:
            faults += self._parameters(seam) + self._meaning(seam.target)
        elif self._version not in self._versions:  # callers may have changed
            faults += self._meaning(seam.target)
        faults += [
            f"{callee.qualname}: {fault}"
            for callee, print_, is_known in callees
            if not is_known
            for fault in self._meaning(callee.target, callee)
        ]
        faults += self._gone(seam, callees)
        if faults:
            return SeamVerdict(seam, "person", tuple(faults), text, like, callees)
        kind: Kind = "compat" if compat else "harmless"
        return SeamVerdict(seam, kind, tuple(compat), text, like, callees)

    def _known(self, function: Seam | Callee) -> dict[str, str]:
        return {v: text for v, text in function.fingerprints.items() if v in self._versions}

    def _callees(self, seam: Seam) -> Iterator[tuple[Callee, str, bool]]:
        for callee in seam.relies_on:
            text, _ = self._texts.of(callee)
            known = self._known(callee)
            if text and known and not self._needless(callee, known):
                yield callee, text, text in known.values()

    def _needless(self, callee: Callee, known: dict[str, str]) -> bool:
        """Returns whether it is there although versions of this age do without it."""
        return bool(callee.elsewhere) and known_texts.order(self._version) < min(
            map(known_texts.order, known)
        )

    def _gone(self, seam: Seam, callees: tuple[tuple[Callee, str, bool], ...]) -> Iterator[str]:
        """Yields functions that the handler calls and that are gone, unless others serve."""
        there = {callee for callee, *_ in callees}
        for callee in seam.relies_on:
            if callee not in there and self._known(callee) and not callee.elsewhere:
                yield f"{callee.qualname} is gone: {callee.taken}"

    def _meaning(self, target: str, callee: Callee | None = None) -> list[str]:
        checks: list[SourceCheck] = [
            check for check in relied_meanings.MEANINGS if check.target == target
        ]
        if callee is not None and not checks:
            return [f"changed, and must be as it was: {callee.taken}"]
        known = {seam.qualname for seam in self._seams}
        checks = [
            replace(check, seams=tuple(name for name in check.seams if name in known))
            if isinstance(check, Delegates)
            else check
            for check in checks
        ]
        return [fault for check in checks for fault in check.faults(self.tree)]

    def _attributes(self, seam: Seam) -> tuple[list[str], list[str]]:
        """Returns which older layouts serve, and what is missing."""
        compat: list[str] = []
        faults: list[str] = []
        for need in relied.needs(seam.qualname):
            if not self._applies(need):
                continue
            choices = [choice for choice in need.choices if self._layouts(choice)]
            serving = next((choice for choice in choices if self._has(choice, need.ours)), None)
            if serving is None:
                faults.append(f"no {' or '.join(choices or need.choices)}")
            elif serving != choices[0]:
                compat.append(f"{serving} for {choices[0]}")
        return compat, faults

    def _applies(self, need: relied.Need) -> bool:
        here = known_texts.order(self._version)
        if need.since and here < known_texts.order(need.since):
            return False
        return not need.until or here <= known_texts.order(need.until)

    def _has(self, choice: str, ours: bool) -> bool:
        return self.tree.has(choice) if ":" in choice else has(self.tree, choice, ours)

    def _parameters(self, seam: Seam) -> list[str]:
        """Returns why upstream's callers cannot call the handler as they call the function.

        Or nothing.
        """
        function = self.tree.function(seam.target)
        handler = _ours().function(seam.handler)
        if function is None or handler is None:
            return []
        return _misfits(
            Signature.of(handler), Signature.of(function), handler.args.vararg is not None
        )


def has(tree: SourceTree, choice: str, ours: bool = False) -> bool:
    """Returns whether the owner of ``owner.attribute`` has it.

    If `ours`, whether it takes new ones.
    """
    owner, _, attribute = choice.partition(".")
    for place in relied.OWNERS[owner]:
        if place.startswith("["):
            found: bool = attribute in tree.assigned(place[1:-1])
        elif ours:
            found = tree.takes_new(place)
        else:
            found = attribute in (tree.members(place) or ())
        if found:
            return True
    return False


@functools.cache
def _ours() -> SourceTree:
    return SourceTree(Path(sglang_kairos.__file__).parent)


def _misfits(handler: Signature, function: Signature, takes_more: bool) -> list[str]:
    wanted = handler.names[1:]  # without `original`
    needed = handler.needed[1:]
    faults = [f"no parameter {name}" for name in needed[len(function.names) :]]
    renamed = [
        f"parameter {theirs} in the place of {mine}"
        for mine, theirs in zip(wanted[1:], function.names[1:], strict=False)
        if mine != theirs
    ]
    more = [*function.names[len(wanted) :], *function.keyword_only]
    if not takes_more:
        faults += [f"a new parameter {name}" for name in more]
    elif function.keyword_only and not handler.open_ended:
        faults += [f"a new parameter {name}, by name only" for name in function.keyword_only]
    return faults + renamed
