"""Small random models, and a processor without files, for the tests."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mm1_mlx.config import (
    ConnectorConfig,
    DecoderConfig,
    MM1Config,
    MoEConfig,
    VisionConfig,
)
from mm1_mlx.models.decoder import Decoder
from mm1_mlx.models.mm1 import MM1

IMAGE, EOS, PAD = 3, 2, 0

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VISION = VisionConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    image_size=16,
    patch_size=4,
    norm_in="all",
)
CONNECTOR = ConnectorConfig(
    type="c_abstractor", num_query_tokens=4, hidden_size=16, depth=1
)
DENSE = DecoderConfig(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    vocab_size=90,
    max_position_embeddings=512,
)
MOE = MoEConfig(num_local_experts=4, moe_intermediate_size=24)
SPARSE = replace(DENSE, moe_config=MOE)


def small_config(text: DecoderConfig = SPARSE, **settings) -> MM1Config:
    usual = {
        "vision_config": VISION,
        "connector_config": CONNECTOR,
        "image_token_id": IMAGE,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    return MM1Config(text_config=text, **(usual | settings))


def small_model(text: DecoderConfig = SPARSE, seed: int = 0, **settings) -> MM1:
    """A whole model with random weights, ready to answer."""
    mx.random.seed(seed)
    model = MM1(small_config(text, **settings))
    model.eval()
    _make_lively(model.decoder)
    return model


def small_decoder(text: DecoderConfig = DENSE, seed: int = 0) -> Decoder:
    mx.random.seed(seed)
    decoder = Decoder(text)
    decoder.eval()
    _make_lively(decoder)
    return decoder


def _make_lively(decoder: Decoder) -> None:
    """Scale the weights so that the next token depends on all that was read, and
    answers do not repeat one token, as they do at the start of training."""
    embedding = decoder.embed_tokens
    embedding.weight = 0.3 * mx.random.normal(embedding.weight.shape)
    # The image slot is never an answer in training, so never here either.
    if "lm_head" in decoder:
        decoder.lm_head.weight[IMAGE] = 0
    for layer in decoder.layers:
        layer.attn.qkv_proj.weight = layer.attn.qkv_proj.weight * 3
        layer.attn.o_proj.weight = layer.attn.o_proj.weight * 3


def random_array(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape, np.float32))


@dataclass
class Inputs:
    input_ids: mx.array
    pixel_values: mx.array | None = None
    layouts: tuple = ()


class Detokenizer:
    """Spells a token as its text in `words`, or its number and a space."""

    def __init__(self, words: dict[int, str]):
        self._words = words

    def add(self, token: int) -> str:
        return self._words.get(token, f"{token} ")

    def finish(self) -> str:
        return ""


class SmallProcessor:
    """Prompts are numbers, `<image>` is four slots, an image is an int (its seed)."""

    def __init__(self, words: dict[int, str] | None = None):
        self.words = words or {}
        self.tokenizer = SimpleNamespace(eos_token_ids=[EOS], reads_text=True)
        self.seen: list = []

    def __call__(self, prompt, images=None, *, system=None) -> Inputs:
        self.seen.append((prompt, system))
        if system is not None:
            prompt = f"{system} {prompt}"
        if not isinstance(prompt, str):
            prompt = " ".join(message["content"] for message in prompt)
        ids = [1]
        for word in prompt.split():
            ids += [IMAGE] * 4 if word == "<image>" else [int(word)]
        if not images:
            return Inputs(mx.array([ids]))
        pixels = [random_array(16, 16, 3, seed=image) for image in images]
        return Inputs(mx.array([ids]), mx.stack(pixels))

    def detokenizer(self) -> Detokenizer:
        return Detokenizer(self.words)


def step(model) -> None:
    """One step that moves whatever is trainable."""
    count = model.config.tokens_per_image
    slots = [model.config.image_token_id] * count
    ids = mx.array([[5, 9, *slots, 17, 33]])

    def loss(parameters):
        model.update(parameters)
        return mx.square(model(ids, shots)).mean()

    size = model.config.vision_config.image_size
    shots = random_array(1, size, size, 3)
    parameters = model.trainable_parameters()
    for _ in range(2):  # the first moves only lora_b, which is zero
        grads = mx.grad(loss)(parameters)
        parameters = tree_map(lambda v, g: v - 0.3 * g, parameters, grads)
    model.update(parameters)
    mx.eval(model.parameters())
