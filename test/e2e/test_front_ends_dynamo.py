"""Dynamo's column of the table in docs/front_ends.md; see test_front_ends.py.

It has servers of its own: SGLang runs in Dynamo's processes. `make test-dynamo` runs this.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from helpers.dynamo import FOLDER, MODEL, SGLANG, Dynamo, dynamo
from helpers.front_ends import (
    AGE_MS,
    CLASSES,
    COMPLETIONS,
    DEFAULT_MS,
    DEFAULT_TPOT_MS,
    DYNAMO,
    NOTHING,
    PAGE,
    PRIORITY_CLASSES,
    REFUSED,
    WAYS,
    Table,
    Way,
    cell,
    renew,
    table_of,
)
from helpers.trees import sglang_folder
from sglang_kairos.local_http import open_url

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def sent(running: Dynamo, way: Way, path: str) -> int:
    """The status of a request in which something is said so."""
    body: dict[str, Any] = {"model": MODEL, "max_tokens": 1}
    if path == COMPLETIONS:
        body["prompt"] = "Once upon"
    else:
        body["messages"] = [{"role": "user", "content": "Once upon"}]
    more, headers = way.say(path)
    raw = json.dumps(body | more).encode()
    headers["content-type"] = "application/json"
    try:
        with open_url(urllib.request.Request(running.url + path, raw, headers), 60) as answer:
            answer.read()
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def cell_of(running: Dynamo, way: Way) -> str:
    statuses, arrives = [], {}
    for path in DYNAMO.paths:
        statuses.append(sent(running, way, path))
        arrives[path] = statuses[-1] == 200 and all(
            way.arrived(seen) for seen in running.last_requests()
        )
    assert set(statuses) <= {200, 400}, (way.name, statuses)
    said = cell(DYNAMO, arrives)
    return REFUSED if said == NOTHING and set(statuses) == {400} else said


def test_what_arrives_through_dynamo_is_what_the_page_says(
    tiny_model: str, out_dir: Path, tmp_path: Path
) -> None:
    if not (FOLDER / "dynamo").is_dir():
        pytest.skip(f"Dynamo is not in {FOLDER}: make test-dynamo installs it")
    classes = tmp_path / "classes.json"
    classes.write_text(json.dumps(CLASSES))
    env = {
        "KAIROS_TTFT_MS": str(DEFAULT_MS),
        "KAIROS_TPOT_MS": str(DEFAULT_TPOT_MS),
        "KAIROS_SLO_CLASSES": str(classes),
        "KAIROS_PRIORITY_CLASSES": PRIORITY_CLASSES,
        "KAIROS_AGE_HEADERS": "x-request-start,traceparent",
        "KAIROS_MAX_AGE_MS": str(2 * AGE_MS),
    }
    logs = out_dir / "front-ends-dynamo"
    with dynamo(sglang_folder(SGLANG), tiny_model, logs, env=env) as running:
        column = {way.name: cell_of(running, way) for way in WAYS}
    if os.environ.get("KAIROS_WRITE_TABLES"):
        renew(PAGE, DYNAMO.title, column)
    assert column == Table.read(table_of(PAGE.read_text("utf-8"))).cells[DYNAMO.title]
