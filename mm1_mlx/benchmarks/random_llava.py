"""A LLaVA with random weights in our layout and in mlx-vlm's, and samples for it.

Both folders hold the same numbers, the same vocabulary and a chat template that writes
the same text, so that two programs can be timed at the same work.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mm1_mlx.config import ConnectorConfig, DecoderConfig, MM1Config, VisionConfig
from mm1_mlx.convert.export import export
from mm1_mlx.inputs.processor import Processor
from mm1_mlx.inputs.settings import ImageSettings
from mm1_mlx.inputs.tokenizer import load_tokenizer
from mm1_mlx.loading import save
from mm1_mlx.models.mm1 import MM1

_MARKS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
_UNK, _BOS, _EOS, _PAD, _IMAGE = range(len(_MARKS))
_TEMPLATE = "llava-hf"
# The same text from the lists of parts that mlx-vlm makes of a message.
_PEER_TEMPLATE = (
    "{% macro said(m) %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}{{ '<image>\\n' }}{% endif %}"
    "{% endfor %}{% for p in m.content %}{% if p.type == 'text' %}"
    "{{ p.text or p.content }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + said(m) + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + said(m) + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_WORDS = """
red green blue yellow purple white black small large round square bright circle triangle
star box line corner left right above below beside behind between near the a one two
three four there is are stands lies looks picture
"""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How large the model is; what is not here is as in LLaVA 1.5 (CLIP and Llama)."""

    image_size: int = 336
    vision_width: int = 512
    vision_layers: int = 8
    width: int = 1024
    hidden: int = 2752
    layers: int = 9
    head_size: int = 64
    vocabulary: int = 32064

    def config(self) -> MM1Config:
        """As a model's config."""
        return MM1Config(
            vision_config=VisionConfig(
                hidden_size=self.vision_width,
                num_hidden_layers=self.vision_layers,
                num_attention_heads=self.vision_width // self.head_size,
                intermediate_size=4 * self.vision_width,
                image_size=self.image_size,
                patch_size=14,
                norm_in="all",
                norm_out=True,
                hidden_act="quick_gelu",
                feature_layer=-2,
            ),
            connector_config=ConnectorConfig(
                type="mlp", num_query_tokens=None, mlp_depth=2, hidden_act="gelu"
            ),
            text_config=DecoderConfig(
                hidden_size=self.width,
                num_hidden_layers=self.layers,
                num_attention_heads=self.width // self.head_size,
                intermediate_size=self.hidden,
                vocab_size=self.vocabulary,
            ),
            image_token_id=_IMAGE,
            bos_token_id=_BOS,
            eos_token_id=_EOS,
            pad_token_id=_PAD,
        )


def write_llava(folder: Path, shape: Shape, *, peer: bool = True) -> int:
    """Write `folder`/ours, and with peer `folder`/mlx-vlm; the parameters they have."""
    settings = ImageSettings(size=shape.image_size, resize_mode="crop")
    hub = folder / "mlx-vlm" if peer else None
    count = write_model(folder, shape.config(), settings, hub)
    if hub is not None:
        _for_mlx_vlm(hub)
    return count


def write_model(
    folder: Path, config: MM1Config, settings: ImageSettings | None, hub: Path | None
) -> int:
    """Random weights in `folder`/ours, and in the hub's layout where `hub` says.

    Gives the number of parameters.
    """
    mx.random.seed(0)
    model = MM1(config)
    model.update(tree_map(_lively, model.parameters()))
    files = folder / "tokenizer"
    files.mkdir(parents=True)
    _write_tokenizer(files, config.text_config.vocab_size)
    processor = Processor(
        load_tokenizer(files), settings, config, chat_template=_TEMPLATE
    )
    ours = folder / "ours"
    save(model, processor, ours)
    if hub is not None:
        export(ours, hub)
    flat: Any = tree_flatten(model.parameters())
    return sum(array.size for _, array in flat)


def _lively(array: mx.array) -> mx.array:
    """Zeros (biases, the class token) become small numbers: they are compared, too."""
    if array.size and not mx.any(array).item():
        return mx.random.normal(array.shape) * 0.02
    return array


def _write_tokenizer(folder: Path, size: int) -> None:
    """A byte-level BPE of the words that the samples are made of.

    Every id up to `size` has a text: a random model says anything, and mlx-vlm fails
    at an id without one.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=_MARKS[_UNK]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(_MARKS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(0)
    tokenizer.train_from_iterator([_words(rng, 60) for _ in range(200)], trainer)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    saved = json.loads(path.read_text(encoding="utf-8"))
    words = saved["model"]["vocab"]
    words |= {f"w{number}": number for number in range(len(words), size)}
    path.write_text(json.dumps(saved), encoding="utf-8")
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": _MARKS[_UNK],
        "bos_token": _MARKS[_BOS],
        "eos_token": _MARKS[_EOS],
        "pad_token": _MARKS[_PAD],
        "extra_special_tokens": {"image_token": _MARKS[_IMAGE]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")


def _for_mlx_vlm(folder: Path) -> None:
    """Give an exported folder what mlx-vlm 0.7 reads beside the weights."""
    (folder / "chat_template.jinja").write_text(_PEER_TEMPLATE, encoding="utf-8")
    values = {
        "processor_class": "LlavaProcessor",
        "patch_size": 14,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
        "image_token": _MARKS[_IMAGE],
    }
    (folder / "processor_config.json").write_text(json.dumps(values), encoding="utf-8")


# --- samples -------------------------------------------------------------------------


def _words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(_WORDS.split(), k=count)) + "."


def write_pictures(folder: Path, count: int, side: int) -> None:
    """Questions about pictures: `count` samples of some 600 tokens at 336 pixels."""
    from PIL import Image

    rng = random.Random(1)

    def sample(number: int) -> dict:
        noise = np.random.default_rng(number).integers(0, 255, (12, 12, 3), np.uint8)
        name = f"{number}.png"
        Image.fromarray(noise).resize((side, side)).save(folder / name)
        asked, answer = _words(rng, 8), _words(rng, 16)
        return _sample(asked, answer) | {"images": [name]}

    _write(folder, count, sample)


def write_texts(folder: Path, count: int) -> None:
    """Conversations without pictures: answers of 20 to 400 words."""
    rng = random.Random(1)

    def sample(number: int) -> dict:
        return _sample(_words(rng, 8), _words(rng, round(20 * 20 ** rng.random())))

    _write(folder, count, sample)


def _sample(asked: str, answer: str) -> dict:
    return {
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answer},
        ]
    }


def _write(folder: Path, count: int, sample: Callable[[int], dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(sample(number)) + "\n" for number in range(count)]
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
