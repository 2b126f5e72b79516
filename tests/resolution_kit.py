"""Models that read pictures in tiles, their pictures and words."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from small import DENSE, small_model
from small_tokenizers import write_tiny

from mm1_mlx.config import TilingConfig
from mm1_mlx.inputs.images import ImageSettings
from mm1_mlx.inputs.processor import Processor
from mm1_mlx.inputs.tokenizer import load_tokenizer
from mm1_mlx.models.mm1 import MM1

Q = 4
DYNAMIC = TilingConfig(type="dynamic", min_tiles=1, max_tiles=6, default="native")
CLEAR = {"image_mean": (0.0,) * 3, "image_std": (1 / 255,) * 3}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


WIDE, SMALL = picture(48, 16), picture(12, 9, 1)  # 1 x 3 tiles, and one


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return load_tokenizer(write_tiny(tmp_path_factory.mktemp("tiny")))


def parts(words, tiling=DYNAMIC, context=512, **settings) -> tuple[MM1, Processor]:
    text = replace(DENSE, vocab_size=words.vocab_size, max_position_embeddings=context)
    given = {"image_token_id": words.token_to_id("<image>")}
    model = small_model(text, tiling_config=tiling, **given, **settings)
    look = ImageSettings(size=16, **CLEAR)
    return model, Processor(words, look, model.config, chat_template="mm1-tiny")


@pytest.fixture(scope="module")
def dynamic(words):
    return parts(words)
