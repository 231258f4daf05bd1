"""A request as the router sees it: read, checked, described; and what is in flight of all."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from sglang_kairos.policy.placement import OUTPUT_SHARE, PlacedRequest
from sglang_kairos.router.cancellation import Cancellation
from sglang_kairos.router.clock import Clock
from sglang_kairos.router.errors import (
    Aborted,
    BadRequest,
    ClientLeft,
    Full,
    TooLarge,
    TooManySamples,
    Unfoldable,
)
from sglang_kairos.router.fleet.fleet import Fleet
from sglang_kairos.router.fleet.prefix_index import Blocks
from sglang_kairos.router.fleet.servers import Server
from sglang_kairos.router.options import RouterOptions
from sglang_kairos.router.request.body import (
    Prompt,
    describe,
    prompt_blocks,
    unfold_samples,
    unique_id,
    written_once,
)
from sglang_kairos.router.request.sse import Relayed
from sglang_kairos.router.responses import Headers, Receive, Scope, forwarded
from sglang_kairos.slo.age import HeaderNotes
from sglang_kairos.slo.attainment import class_label
from sglang_kairos.slo.body import Carried, carry, dump
from sglang_kairos.slo.limits import RequestError, check_request
from sglang_kairos.slo.targets import RequestSlo, Slo, SloError, SloTable

REQUEST_ID = "x-request-id"
_AGE_STEP_S = 1e-3


@dataclass(slots=True)
class RequestContext:
    """A request the router has accepted. Times are seconds of the router's clock.

    `gone`: servers that could not be reached; `failed`: those of pairs that failed it otherwise.
    `carried`: its SLOs where they lie in the body. `aborted`: somebody asked for its end.
    `own_headers`: what the router adds to every answer. `server_ids`: made up for the attempt under way.
    `relegated`: how to reach it while it waits here for its turn.
    """

    path: str
    headers: list[tuple[str, str]]
    request_id: str
    own_headers: Headers
    body: dict[str, Any]
    prompt: Prompt
    blocks: Blocks
    slo: Slo
    carried: Carried
    arrived_s: float
    deadline_s: float
    aged_s: float
    own_rid: bool
    header_notes: HeaderNotes = field(default_factory=list)
    stream_options: Any = None
    gone: set[Server] = field(default_factory=set)
    failed: set[Server] = field(default_factory=set)
    predicted_s: float = 0.0
    seen: Relayed = field(default_factory=Relayed)
    aborting: asyncio.Task[None] | None = None
    aborted: bool = False
    relegated: Cancellation | None = None
    server_ids: list[str] = field(default_factory=list)

    def placed(self, fleet: Fleet) -> PlacedRequest:
        """What placement needs to know."""
        prompt = self.prompt
        return PlacedRequest(
            tokens=prompt.tokens + prompt.text_bytes / fleet.bytes_per_token.value,
            deadline_s=self.deadline_s,
            output_tokens=OUTPUT_SHARE * prompt.output_tokens * prompt.samples,
            prompts=prompt.choices,
            handoff_s=fleet.handoff.value,
            tpot_s=self.slo.tpot_ms / 1e3,
            weight=self.slo.weight,
            now_s=fleet.clock.now_s(),
            margin_s=fleet.margin.value_s,
        )

    def payload(self, now_s: float) -> bytes:
        """The body to send now, its age brought up to date. BadRequest if it cannot be written."""
        if now_s - self.aged_s > _AGE_STEP_S:
            self.carried.grow_older(1e3 * (now_s - self.aged_s))
            self.aged_s = now_s
        try:
            return dump(self.body)
        except ValueError as error:
            raise BadRequest(str(error)) from None


async def read_body(receive: Receive, limits: Limits) -> bytes:
    """The whole body, counted by `limits`. ClientLeft, TooLarge, Full (nothing is held then)."""
    chunks: list[bytes] = []
    held = 0
    try:
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise ClientLeft
            chunk = message.get("body", b"")
            limits.hold(len(chunk), held)
            held += len(chunk)
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)
    except BaseException:
        limits.held_bytes -= held
        raise


def accept(
    raw: bytes,
    scope: Scope,
    arrived_s: float,
    fleet: Fleet,
    table: SloTable,
    options: RouterOptions,
    carries: bool,
) -> RequestContext:
    """Check a request. BadRequest, TooLarge."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"malformed JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadRequest("malformed request: the body must be a JSON object")
    path = scope["path"]
    try:
        check_request(body, path, fleet.limits)
        unfolded = unfold_samples(body, path, len(raw))
    except RequestError as error:
        raise BadRequest(str(error), error.field) from None
    except Unfoldable as error:
        raise BadRequest(str(error), "n") from None
    except TooManySamples as error:
        raise TooLarge(str(error)) from None
    notes: HeaderNotes = []
    carried = _carried(body, scope, arrived_s, fleet.clock, table, carries, notes)
    slo = carried.slo
    label = class_label(slo.slo.name, table.classes)
    prompt = describe(body, path)
    blocks = prompt_blocks(body, path, fleet.bytes_per_token.value)
    if unfolded is not None:
        written_once(body, unfolded)
    headers = forwarded(scope["headers"], drop_auth=bool(options.client_api_key))
    if options.client_api_key and options.api_key:
        headers.append(("authorization", f"Bearer {options.api_key}"))
    request_id = next((value for name, value in headers if name == REQUEST_ID), "")
    if not request_id:
        request_id = unique_id()
        headers.append((REQUEST_ID, request_id))
    now = fleet.clock.now_s()
    return RequestContext(
        path=path,
        headers=headers,
        request_id=request_id,
        own_headers=[(REQUEST_ID.encode(), request_id.encode("latin-1"))],
        body=body,
        prompt=prompt,
        blocks=blocks,
        slo=slo.slo if label == slo.slo.name else replace(slo.slo, name=label),
        carried=carried,
        arrived_s=arrived_s,
        deadline_s=now + (slo.slo.ttft_ms - slo.age_ms) / 1e3,
        aged_s=now,
        own_rid=body.get("rid") is None,
        header_notes=notes,
        stream_options=body.get("stream_options"),
    )


def _carried(
    body: dict[str, Any],
    scope: Scope,
    arrived_s: float,
    clock: Clock,
    table: SloTable,
    carries: bool,
    notes: HeaderNotes,
) -> Carried:
    if not carries:
        return Carried(RequestSlo(table.default), changed=False)
    headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
    age_ms = 1e3 * (clock.now_s() - arrived_s)
    try:
        path = scope["path"]
        now_s = clock.wall_s()
        return carry(
            body, path, headers, table, age_ms=age_ms, now_s=now_s, always=True, notes=notes
        )
    except SloError as error:
        raise BadRequest(str(error), error.field) from None


class Limits:
    """0 in flight means no limit. Take with `enter` and `hold`, give back with `leave`."""

    def __init__(self, max_in_flight: int, max_body_bytes: int, max_held_bytes: int) -> None:
        self.in_flight = 0
        self.held_bytes = 0
        self._max_in_flight = max_in_flight
        self._max_body_bytes = max_body_bytes
        self._max_held_bytes = max_held_bytes

    def enter(self) -> None:
        """One more request. Full if there is no room for it."""
        if self._max_in_flight and self.in_flight >= self._max_in_flight:
            raise Full(f"{self.in_flight} requests are in flight (--max-concurrent-requests)")
        self.in_flight += 1

    def hold(self, more: int, so_far: int) -> None:
        """`more` bytes of a body of which `so_far` are held. TooLarge or Full."""
        if so_far + more > self._max_body_bytes:
            raise TooLarge(f"a body may have {self._max_body_bytes} bytes (--max-payload-size)")
        if self.held_bytes + more > self._max_held_bytes:
            raise Full(f"{self.held_bytes} bytes of request bodies are held (--max-held-bytes)")
        self.held_bytes += more

    def leave(self, held: int) -> None:
        """A request that held so many bytes is over."""
        self.in_flight -= 1
        self.held_bytes -= held


class RequestRegistry:
    """The requests that a router is serving, by the ids they have on the servers.

    An id that a client chose must be its own while it runs. SGLang's abort ends whatever *begins*
    with the id it names; Kairos servers take it exactly. A request that somebody told us to abort
    is not tried again.
    """

    def __init__(self) -> None:
        self._by_id: dict[str, RequestContext] = {}
        self._requests: dict[int, RequestContext] = {}

    def hold(self, context: RequestContext) -> None:
        """`context` is served until `release`. BadRequest if it names an id that another one has."""
        chosen = _ids(context.body.get("rid"))
        for name in chosen:
            if name in self._by_id:
                raise BadRequest(f"rid: a request with the id {name[:128]!r} is running", "rid")
        self._by_id.update(dict.fromkeys(chosen, context))
        self._requests[id(context)] = context

    def release(self, context: RequestContext) -> None:
        """It is over."""
        del self._requests[id(context)]
        for name in context.server_ids if context.own_rid else _ids(context.body.get("rid")):
            self._by_id.pop(name, None)

    def name(self, context: RequestContext, ids: list[str]) -> None:
        """The ids of its present attempt, made up by the router."""
        for old in context.server_ids:
            if self._by_id.get(old) is context:
                del self._by_id[old]
        context.server_ids = ids
        self._by_id.update(dict.fromkeys(ids, context))

    def may_abort(self, rid: str) -> bool:
        """Whether no other request's id begins with that one."""
        return not any(other != rid and other.startswith(rid) for other in self._by_id)

    def aborted(self, rid: Any, everybody: bool) -> None:
        """Somebody told us to abort that request, or all: none of them is tried again."""
        meant = [self._by_id[name] for name in _ids(rid) if name in self._by_id]
        for context in self._requests.values() if everybody else meant:
            context.aborted = True
            if context.relegated is not None:
                context.relegated.interrupt(Aborted())


def _ids(rid: Any) -> list[str]:
    return [one for one in (rid if isinstance(rid, list) else [rid]) if isinstance(one, str)]
