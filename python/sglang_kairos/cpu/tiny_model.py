"""Makes a tiny Qwen2 model with random weights, to serve without a GPU or a network.

``kairos tiny-model OUT_DIR`` writes config, tokenizer, chat template and
float32 weights, a few megabytes in all. The same arguments give the same bytes.

With default initialisation a random model repeats one token for ever under greedy decoding. A test
that compares outputs then proves little. Here attention is sharp and every layer adds about as much
as it receives, so the next token depends on the whole context. 1,000 greedy tokens hold about 500
different ones.

Some rows of the output head are zero: special tokens, and tokens that are not printable ASCII by
themselves. Their logit is 0 while the largest of the others is far above it. So every token is
visible text as soon as it is streamed, and greedy decoding never stops by itself. Sampling hardly
ever does: pass `ignore_eos` where the length matters.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_kairos.commands import parser_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Weights = dict[str, NDArray[np.float32]]

# Part of the stamp. Change it whenever the same arguments would give other files.
FORMAT = 2
STAMP_NAME = "kairos_tiny_model.json"

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_WORDS = """
the of and to in a is that it was for on are as with his they be at one have this from or had by
hot but some what there we can out other were all your when up use word how said an each she which
do their time if will way about many then them would write like so these her long make thing see
him two has look more day could go come did my sound no most number who over know water than call
first people may down side been now find any new work part take get place made live where after
back little only round man year came show every good me give our under name very through just form
much great think say help low line before turn cause same mean differ move right boy old too does
tell sentence set three want air well also play small end put home read hand port large spell add
even land here must big high such follow act why ask men change went light kind off need house
picture try us again animal point mother world near build self earth father head stand own page
request server model token prefill decode cache latency deadline schedule queue batch step memory
network transfer router slack budget throughput prompt answer question stream worker cluster
""".split()
_ENDINGS = ("", "", "", "s", "ed", "ing", "er", "ly", "ment", "able")


@dataclass(frozen=True)
class TinyModel:
    """The shape of a tiny model. Sizes count elements; the key/value heads halve the heads."""

    seed: int = 0
    layers: int = 2
    hidden: int = 128
    heads: int = 4
    vocab: int = 1024
    max_position: int = 32768

    def __post_init__(self) -> None:
        if self.heads % 2 or self.hidden % (2 * self.heads):
            raise ValueError("heads must be even, and hidden a multiple of twice the heads")
        if self.vocab < 512:
            raise ValueError("vocab must be at least 512: bytes and special tokens take 259")

    @property
    def kv_heads(self) -> int:
        return self.heads // 2

    @property
    def intermediate(self) -> int:
        return 2 * self.hidden


def make_tiny_model(path: str | os.PathLike[str], shape: TinyModel | None = None) -> Path:
    """Writes the model folder `path` unless it already holds this very model. Returns its path.

    Several processes may make the same model at once: each writes a folder of its own and renames
    it. Raises FileExistsError if `path` holds anything that was not made here.
    """
    shape = shape or TinyModel()
    target = Path(path)
    stamp = {"format": FORMAT, **asdict(shape)}
    if _stamp_of(target) == stamp:
        return target
    if target.exists() and _stamp_of(target) is None and any(target.iterdir()):
        raise FileExistsError(f"{target} exists and is not a tiny model; name another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        fresh.chmod(0o755)
        visible = _write_tokenizer(fresh, shape)
        _write_json(fresh / "config.json", _config(shape))
        _write_json(fresh / "generation_config.json", _generation_config(shape))
        _write_weights(fresh / "model.safetensors", shape, visible)
        _write_json(fresh / STAMP_NAME, stamp)
        _replace(fresh, target, stamp)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return target


def _replace(fresh: Path, target: Path, stamp: dict[str, int]) -> None:
    if target.exists():
        shutil.rmtree(target, ignore_errors=True)
    try:
        fresh.rename(target)
    except OSError:
        if _stamp_of(target) != stamp:
            raise


def _stamp_of(path: Path) -> dict[str, int] | None:
    try:
        stamp: dict[str, int] = json.loads((path / STAMP_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stamp


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _special_ids(shape: TinyModel) -> dict[str, int]:
    """Returns the token ids of `SPECIAL_TOKENS`: the last of the vocabulary."""
    first = shape.vocab - len(SPECIAL_TOKENS)
    return {token: first + i for i, token in enumerate(SPECIAL_TOKENS)}


def _config(shape: TinyModel) -> dict[str, Any]:
    ids = _special_ids(shape)
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "bos_token_id": ids[END_OF_TEXT],
        "eos_token_id": ids[TURN_END],
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.max_position,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.vocab,
    }


def _generation_config(shape: TinyModel) -> dict[str, Any]:
    ids = _special_ids(shape)
    return {
        "bos_token_id": ids[END_OF_TEXT],
        "eos_token_id": [ids[TURN_END], ids[END_OF_TEXT]],
        "pad_token_id": ids[END_OF_TEXT],
    }


def _write_tokenizer(folder: Path, shape: TinyModel) -> list[int]:
    """Writes a byte-level BPE trained on generated sentences, padded to exactly `shape.vocab` ids.

    Returns the ids of the tokens that are printable ASCII text.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trained = shape.vocab - len(SPECIAL_TOKENS)
    tokenizer.train_from_iterator(
        _sentences(),
        trainers.BpeTrainer(
            vocab_size=trained,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    visible = [
        token_id
        for token_id in range(tokenizer.get_vocab_size())
        if (text := tokenizer.decode([token_id])).isascii() and text.isprintable()
    ]
    # The text may support fewer ids than the vocabulary has. Unused ids keep the special ones last.
    missing = trained - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<unused{i}>" for i in range(missing)])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    if tokenizer.get_vocab_size() != shape.vocab:
        raise RuntimeError(f"the tokenizer has {tokenizer.get_vocab_size()} ids")
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "bos_token": None,
            "eos_token": TURN_END,
            "pad_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            "model_max_length": shape.max_position,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    return visible


def _sentences(count: int = 3000) -> list[str]:
    """Returns the training text: common words in random order, with random endings."""
    sentences = []
    state = 1
    for _ in range(count):
        words = []
        for _ in range(12):
            # A linear congruential generator: the same on every Python and platform.
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            word = _WORDS[(state >> 33) % len(_WORDS)]
            words.append(word + _ENDINGS[(state >> 50) % len(_ENDINGS)])
        sentences.append(" ".join(words).capitalize() + ".")
    return sentences


def _write_weights(path: Path, shape: TinyModel, visible: list[int]) -> None:
    from safetensors.numpy import save_file

    save_file(_weights(shape, visible), str(path), metadata={"format": "pt"})
    path.chmod(0o644)


def _weights(shape: TinyModel, visible: list[int]) -> Weights:
    """Returns random weights; only `visible` tokens get a logit other than 0."""
    import numpy as np

    # The legacy generator's stream is frozen, unlike default_rng's.
    random = np.random.RandomState(shape.seed)

    def matrix(rows: int, columns: int, gain: float) -> NDArray[np.float32]:
        """Maps unit-variance inputs [columns] to outputs [rows] of standard deviation `gain`."""
        values = random.standard_normal((rows, columns)) * (gain / math.sqrt(columns))
        return values.astype(np.float32)

    hidden, kv = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    ones = np.ones(hidden, dtype=np.float32)
    weights: Weights = {
        "model.embed_tokens.weight": matrix(shape.vocab, hidden, math.sqrt(hidden)),
        "model.norm.weight": ones,
        "lm_head.weight": matrix(shape.vocab, hidden, 3.0),
    }
    hidden_tokens = np.ones(shape.vocab, dtype=bool)
    hidden_tokens[visible] = False
    weights["lm_head.weight"][hidden_tokens] = 0.0
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": ones.copy(),
            prefix + "post_attention_layernorm.weight": ones.copy(),
            # Scores of standard deviation ~ 2: a query attends to a few tokens, not to all alike.
            prefix + "self_attn.q_proj.weight": matrix(hidden, hidden, 1.5),
            prefix + "self_attn.k_proj.weight": matrix(kv, hidden, 1.5),
            prefix + "self_attn.v_proj.weight": matrix(kv, hidden, 1.5),
            prefix + "self_attn.o_proj.weight": matrix(hidden, hidden, 1.5),
            prefix + "self_attn.q_proj.bias": np.zeros(hidden, dtype=np.float32),
            prefix + "self_attn.k_proj.bias": np.zeros(kv, dtype=np.float32),
            prefix + "self_attn.v_proj.bias": np.zeros(kv, dtype=np.float32),
            prefix + "mlp.gate_proj.weight": matrix(shape.intermediate, hidden, 2.0),
            prefix + "mlp.up_proj.weight": matrix(shape.intermediate, hidden, 1.0),
            prefix + "mlp.down_proj.weight": matrix(hidden, shape.intermediate, 1.5),
        }
    return weights


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``kairos tiny-model``: a folder, and the model's shape."""
    parser = parser_of("tiny-model")
    parser.add_argument("out_dir", metavar="FOLDER", help="where the model is written")
    for name, value in asdict(TinyModel()).items():
        text = f"{name.replace('_', ' ')} (default: {value})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=text)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Make the model and print its folder. Returns the exit status."""
    options = vars(build_parser().parse_args(argv))
    out_dir = options.pop("out_dir")
    try:
        print(make_tiny_model(out_dir, TinyModel(**options)))
    except (ValueError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
