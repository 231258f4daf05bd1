"""A request as the router sees it: read, checked, described."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from sglang_kairos.policy.placement import OUTPUT_SHARE, PlacedRequest
from sglang_kairos.router.cancellation import Attention
from sglang_kairos.router.fleet.fleet import Fleet
from sglang_kairos.router.fleet.prefix_index import Blocks
from sglang_kairos.router.fleet.servers import Server
from sglang_kairos.router.options import RouterOptions
from sglang_kairos.router.request.body import (
    Prompt,
    TooManySamples,
    Unfoldable,
    describe,
    prompt_blocks,
    unfold_samples,
    unique_id,
    written_once,
)
from sglang_kairos.router.request.headers import forwarded
from sglang_kairos.router.request.limits import Limits, TooLarge
from sglang_kairos.router.request.relay import Relayed
from sglang_kairos.router.responses import Headers, Receive, Scope
from sglang_kairos.slo.age import HeaderNotes
from sglang_kairos.slo.attainment import class_label
from sglang_kairos.slo.body import Carried, carry, dump
from sglang_kairos.slo.limits import RequestError, check_request
from sglang_kairos.slo.targets import RequestSlo, Slo, SloError, SloTable

REQUEST_ID = "x-request-id"
_AGE_STEP_S = 1e-3


class ClientLeft(Exception):
    """Nobody is waiting for the answer any more."""


class BadRequest(Exception):
    """The body cannot be used; `param` names the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(slots=True)
class Call:
    """A request the router has accepted. Times are `time.monotonic` seconds.

    `gone`: servers that could not be reached; `failed`: those of pairs that failed it otherwise.
    `carried`: its SLOs where they lie in the body. `aborted`: somebody asked for its end.
    `server_ids`: made up for the attempt under way.
    `relegated`: how to reach it while it waits here for its turn.
    """

    path: str
    headers: list[tuple[str, str]]
    request_id: str
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
    relegated: Attention | None = None
    server_ids: list[str] = field(default_factory=list)

    @property
    def own_headers(self) -> Headers:
        """What the router adds to every answer."""
        return [(REQUEST_ID.encode(), self.request_id.encode("latin-1"))]

    def placed(self, fleet: Fleet) -> PlacedRequest:
        """What placement needs to know."""
        prompt = self.prompt
        return PlacedRequest(
            tokens=prompt.tokens + prompt.text_bytes / fleet.bytes_per_token.value,
            deadline_s=self.deadline_s,
            output_tokens=OUTPUT_SHARE * prompt.output_tokens * prompt.samples,
            prompts=prompt.prompts * prompt.samples,
            handoff_s=fleet.handoff.value,
            tpot_s=self.slo.tpot_ms / 1e3,
            weight=self.slo.weight,
            now_s=time.monotonic(),
            margin_s=fleet.margin.value_s,
        )

    def payload(self) -> bytes:
        """The body to send now, its age brought up to date. BadRequest if it cannot be written."""
        now = time.monotonic()
        if now - self.aged_s > _AGE_STEP_S:
            self.carried.grow_older(1e3 * (now - self.aged_s))
            self.aged_s = now
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
) -> Call:
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
    carried = _carried(body, scope, arrived_s, table, carries, notes)
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
    now = time.monotonic()
    return Call(
        path=path,
        headers=headers,
        request_id=request_id,
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
    table: SloTable,
    carries: bool,
    notes: HeaderNotes,
) -> Carried:
    if not carries:
        return Carried(RequestSlo(table.default), changed=False)
    headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
    age_ms = 1e3 * (time.monotonic() - arrived_s)
    try:
        path = scope["path"]
        now_s = time.time()
        return carry(
            body, path, headers, table, age_ms=age_ms, now_s=now_s, always=True, notes=notes
        )
    except SloError as error:
        raise BadRequest(str(error), error.field) from None
