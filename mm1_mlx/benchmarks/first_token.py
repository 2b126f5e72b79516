"""How long it will take to the first token: operations counted, a speed measured.

An estimate. Counted are the products of the encoder, the connector and the decoder's
prompt; the speed is that of one layer of the model's encoder with random weights, on
this machine, now. Decoding the picture's file, the tokenizer and loading are left out.
"""

import time
from dataclasses import dataclass, replace

from mm1_mlx import memory
from mm1_mlx.config import MM1Config, VisionConfig

_STEP = 2e10  # operations of the step that is measured, at most
_ROUNDS = 3


@dataclass(frozen=True)
class Operations:
    """Multiplications and additions, two for each weight and position."""

    pictures: float
    prompt: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.pictures + self.prompt


def operations(config: MM1Config, tiles: int, side: int, prompt: int) -> Operations:
    """Of `tiles` tiles of `side` pixels and a prompt of so many tokens.

    Attention's scores and sums are counted, norms and activations are not.
    """
    parts = memory.count_parameters(config)
    pictures = 0.0
    if (vision := config.vision_config) is not None:
        patches = (side // vision.patch_size) ** 2
        layers = vision.num_hidden_layers + 1 + vision.feature_layer
        scores = 4 * patches**2 * vision.num_attention_heads * vision.size_per_head
        weights = 2 * patches * (parts.vision.total + parts.connector.total)
        pictures = tiles * (weights + layers * scores)
    text = config.text_config
    width = text.num_attention_heads * text.size_per_head
    active = parts.decoder.active + parts.experts.active
    scores = 2 * prompt**2 * width * text.num_hidden_layers  # half: causal
    return Operations(pictures, 2 * prompt * active + scores)


def measure_speed(vision: VisionConfig, number: int) -> float:
    """Operations a second of one encoder layer; the best of a few.

    number: bytes of one number of the weights: 4 is float32, 2 float16.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mm1_mlx.models.vision import EncoderLayer

    layer = EncoderLayer(replace(vision, num_hidden_layers=1, feature_layer=-1))
    kind = mx.float32 if number == 4 else mx.float16
    layer.set_dtype(kind)
    weights = sum(x.size for _, x in tree_flatten(layer.parameters()))  # type: ignore[misc]
    tokens = int(min(max(_STEP / (2 * weights), 16), vision.num_patches))
    x = mx.random.normal((1, tokens, vision.hidden_size)).astype(kind)
    mx.eval(layer.parameters(), layer(x))
    width = vision.num_attention_heads * vision.size_per_head
    count = 2 * tokens * weights + 4 * tokens**2 * width
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        mx.eval(layer(x))
        seconds.append(time.perf_counter() - start)
    return count / min(seconds)
