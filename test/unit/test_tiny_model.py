"""The tiny model: the same bytes each time, a usable tokenizer, and varied greedy outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

from sglang_kairos.cpu.tiny_model import (
    SPECIAL_TOKENS,
    TinyModel,
    main,
    make_tiny_model,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_arguments_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    assert content(make_tiny_model(tmp_path / "again")) == content(folder)


def test_another_seed_gives_other_weights(folder: Path, tmp_path: Path) -> None:
    other = content(make_tiny_model(tmp_path / "other", TinyModel(seed=1)))
    same = content(folder)
    assert other["model.safetensors"] != same["model.safetensors"]
    assert other["tokenizer.json"] == same["tokenizer.json"]


def test_making_it_again_writes_nothing(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert make_tiny_model(folder) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_model_of_another_shape_is_replaced(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "m")
    make_tiny_model(tmp_path / "m", TinyModel(layers=3))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["num_hidden_layers"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(FileExistsError):
        make_tiny_model(tmp_path)
    assert main([str(tmp_path)]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize("shape", [{"heads": 3}, {"hidden": 20}, {"vocab": 100}])
def test_impossible_shapes_are_refused(shape: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        TinyModel(**shape)


@pytest.mark.parametrize("vocab", [512, 1024, 4096])
def test_the_vocabulary_has_the_size_asked_for(vocab: int, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    made = make_tiny_model(tmp_path / "m", TinyModel(vocab=vocab))
    tokenizer = Tokenizer.from_file(str(made / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == vocab
    assert [tokenizer.id_to_token(vocab - 3 + i) for i in range(3)] == list(SPECIAL_TOKENS)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(str(folder))


def test_any_text_survives_the_tokenizer(tokenizer: Any) -> None:
    text = "What's the time?\n\tÜnïcode, 漢字, 🙂 and  spaces"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_chats_are_templated(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_greedy_outputs_vary_and_never_stop(folder: Path, tokenizer: Any) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32
        ).eval()
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"transformers cannot run here: {error}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        prompts = tokenizer(["a b", "c d"], return_tensors="pt")
        with torch.inference_mode():
            outputs = model.generate(**prompts, max_new_tokens=1000, do_sample=False)
    finally:
        torch.set_num_threads(threads)
    outputs = outputs[:, prompts["input_ids"].shape[1] :].tolist()
    for tokens in outputs:
        assert len(tokens) == 1000
        assert len(set(tokens)) >= 100
        assert len(set(tokens[-200:])) >= 50, "it must not settle into a loop"
        assert tokenizer.decode(tokens).isprintable()
    assert outputs[0] != outputs[1]
