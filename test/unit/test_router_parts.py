"""The router's parts that need no server: flags, prompt shapes, what it learns."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.fake_pd import CHAT, COMPLETIONS, GENERATE
from sglang_kairos.predict.latency_model import PrefillLatency
from sglang_kairos.router.fleet.estimators import SpeedEstimate
from sglang_kairos.router.fleet.servers import PrefillServer
from sglang_kairos.router.options import OptionError, parse_options
from sglang_kairos.router.request.body import describe, unfold_samples


def test_an_ipv6_prefill_is_named_without_brackets() -> None:
    assert PrefillServer("http://[::1]:30000", 9000).host == "::1"


def test_the_bootstrap_port_is_taken_from_the_server_when_not_given() -> None:
    server = PrefillServer("http://h:1", None)
    server.learn({"disaggregation_bootstrap_port": 9100})
    assert server.bootstrap_port == 9100
    server.learn({"disaggregation_bootstrap_port": None, "internal_states": [{"kairos": 3}, 4]})
    assert server.bootstrap_port == 9100


def test_a_kairos_server_tells_its_speed_and_anything_odd_is_ignored() -> None:
    server = PrefillServer("http://h:1", None)
    for law in ({"a_s": 1}, {"a_s": 0, "b_s": 0, "c_s": 0}, {"a_s": -1, "b_s": 1, "c_s": 0}, 5):
        server.learn({"internal_states": [{"kairos": {"prefill": law}}]})
        assert server.state(0.0).law.b_s == pytest.approx(50e-6)
    law = {"a_s": 0.5, "b_s": 0.001, "c_s": 0.0}
    server.learn({"internal_states": [{"kairos": {"prefill": law}}]})
    assert server.state(0.0).law.work_s(100) == pytest.approx(0.6)


def test_prefill_speed_is_learnt_from_completion_times() -> None:
    estimate = SpeedEstimate(PrefillLatency(a_s=0.01, b_s=50e-6, c_s=0.0), 8192)
    now = 0.0
    for index in range(200):
        batch = [500.0 + 37 * (index % 11), 900.0][: 1 + index % 2]
        sent, now = now + 5.0, now + 5.0 + 0.02 * len(batch) + 400e-6 * sum(batch)
        for tokens in batch:
            estimate.finished(tokens, sent, now)
    law = estimate.law()
    assert law.a_s == pytest.approx(0.02, rel=0.2)
    assert law.b_s == pytest.approx(400e-6, rel=0.1)


SEVERAL: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        GENERATE,
        {"text": "a", "rid": "r", "sampling_params": {"n": 2}},
        {"text": ["a", "a"], "sampling_params": {}},
    ),
    (
        GENERATE,
        {"input_ids": [1, 2], "sampling_params": {"n": 2}},
        {"input_ids": [[1, 2], [1, 2]], "sampling_params": {}},
    ),
    (
        GENERATE,
        {"text": ["a", "b"], "sampling_params": [{"n": 2, "top_k": 1}, {"n": 2}]},
        {
            "text": ["a", "a", "b", "b"],
            "sampling_params": [{"top_k": 1}, {"top_k": 1}, {}, {}],
        },
    ),
    (COMPLETIONS, {"prompt": "a", "n": 3}, {"prompt": ["a"] * 3}),
    (COMPLETIONS, {"prompt": [1, 2], "n": 2}, {"prompt": [[1, 2], [1, 2]]}),
    (COMPLETIONS, {"prompt": "a", "n": 1}, {"prompt": "a", "n": 1}),
    (COMPLETIONS, {"prompt": "a", "n": "x"}, {"prompt": "a", "n": "x"}),
    (GENERATE, {"text": "a", "sampling_params": 5}, {"text": "a", "sampling_params": 5}),
]


@pytest.mark.parametrize(("path", "body", "expected"), SEVERAL)
def test_several_samples_become_copies_of_the_prompt(
    path: str, body: dict[str, Any], expected: dict[str, Any]
) -> None:
    unfold_samples(body, path, 100)
    assert body == expected


def test_the_command_line_is_upstreams() -> None:
    words = "--pd-disaggregation --mini-lb --prefill http://a:1 9000 --prefill http://b:2 none"
    words += " --prefill http://c:3/ --decode http://[::1]:4 --policy random --port 0"
    options = parse_options(words.split())
    assert options.prefills == (("http://a:1", 9000), ("http://b:2", None), ("http://c:3", None))
    assert options.decodes == ("http://[::1]:4",)
    assert options.policy == "random"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--prefill http://a:1 --decode http://b:1", "--pd-disaggregation"),
        ("--pd-disaggregation --decode http://b:1", "--prefill"),
        ("--pd-disaggregation --prefill a:1 --decode http://b:1", "--prefill"),
        ("--pd-disaggregation --prefill http://a:1 x --decode http://b:1", "--prefill"),
        ("--pd-disaggregation --prefill http://a:1 --decode http://b:99999", "--decode"),
        ("--pd-disaggregation --prefill http://a --decode http://b --port -1", "--port"),
    ],
)
def test_a_command_line_that_cannot_be_used_names_the_flag(words: str, named: str) -> None:
    with pytest.raises(OptionError, match=named):
        parse_options(words.split())


@pytest.mark.parametrize(
    ("path", "body", "tokens", "text"),
    [
        (GENERATE, {"input_ids": [1] * 7}, 7, 0),
        (GENERATE, {"text": "abcd"}, 0, 4),
        (GENERATE, {"text": "日本"}, 0, 6),
        (GENERATE, {"input_embeds": [[0.1], [0.2]]}, 2, 0),
        (COMPLETIONS, {"prompt": [[1, 2], [3]]}, 3, 0),
        (CHAT, {"messages": [{"content": [{"type": "text", "text": "ab"}]}]}, 6, 2),
        (CHAT, {"messages": [{"content": [{"type": "image_url"}]}]}, 1006, 0),
        (CHAT, {"messages": "odd"}, 0, 0),
        (GENERATE, {"text": 5, "sampling_params": 3, "stream": "x"}, 0, 0),
        (COMPLETIONS, {"prompt": [None, 1], "max_tokens": "x", "n": "y"}, 0, 0),
    ],
)
def test_prompt_size_is_estimated_without_a_tokenizer(
    path: str, body: dict[str, Any], tokens: int, text: int
) -> None:
    prompt = describe(body, path)
    assert (prompt.tokens, prompt.text_bytes) == (tokens, text)
