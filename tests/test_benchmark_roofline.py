"""benchmark generate's roofline: bytes of a token by hand, and the bandwidth."""

from dataclasses import replace

import mlx.core as mx

from mm1_mlx.benchmarks.roofline import TokenBytes, measure_bandwidth, token_bytes
from mm1_mlx.config import DecoderConfig, MoEConfig
from mm1_mlx.models.decoder import Decoder

TEXT = DecoderConfig(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=128,
    vocab_size=100,
)
_ATTENTION = 64 * (64 + 2 * 32) + 64 * 64  # q, k, v of 4 and 2 heads of 16; o
_MLP = 3 * 64 * 128
_HEAD = 64 * 100


def test_bytes_of_a_token_by_hand():
    found = token_bytes(Decoder(TEXT), context=10)
    numbers = 2 * (_ATTENTION + _MLP + 2 * 64) + 64 + _HEAD + 64  # a row of the table
    assert found == TokenBytes(4 * numbers, 0, 4 * 2 * 2 * 32 * 10, 10)
    assert found.total == found.weights + found.cache
    assert found.limit(2 * found.total) == 2.0


def test_bytes_of_a_token_with_experts_a_tied_head_and_16_bits():
    moe = MoEConfig(num_local_experts=8, sparse_step=2, first_sparse_layer=1)
    config = replace(TEXT, moe_config=moe, tie_word_embeddings=True)
    decoder = Decoder(config)
    decoder.set_dtype(mx.bfloat16)
    found = token_bytes(decoder, context=0)
    numbers = 2 * (_ATTENTION + 2 * 64) + _MLP + 8 * 64 + 64 + _HEAD
    assert found == TokenBytes(2 * numbers, 2 * 2 * _MLP, 0, 0)


def test_bytes_of_a_token_in_4_bits():
    from mlx.nn import quantize

    decoder = Decoder(TEXT)
    quantize(decoder, group_size=64, bits=4)
    found = token_bytes(decoder, context=3)
    matrices = 2 * (_ATTENTION + _MLP) + _HEAD + 64
    # 4 bits, and for each 64 a scale and a bias in float32
    assert found.weights == matrices // 2 + matrices // 64 * 8 + 4 * (2 * 2 * 64 + 64)
    assert found.cache == 4 * 2 * 2 * 32 * 3


def test_bandwidth_is_a_number_of_bytes_a_second(monkeypatch):
    from mm1_mlx.benchmarks import roofline

    monkeypatch.setattr(roofline, "_COPIED", 2**20)
    assert 1e6 < measure_bandwidth(rounds=3) < 1e14
