"""The launches that mm1_mlx/kernels/README.md promises, counted."""

import re
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from kernel_inputs import attention_inputs, experts_inputs, norm_inputs, packed, padding

from helpers import ROOT
from metal_host import host_kernels
from metal_host.pytest_glue import needs_host
from mm1_mlx.benchmarks.launches import count_launches, ours
from mm1_mlx.inputs import images
from mm1_mlx.inputs.images import ImageSettings
from mm1_mlx.inputs.shots import shot
from mm1_mlx.kernels.add_norm import add_norm
from mm1_mlx.kernels.cases import KERNELS
from mm1_mlx.kernels.fused import fused
from mm1_mlx.kernels.metal import MetalKernel, forced, watched
from mm1_mlx.kernels.photo import axis, photo
from mm1_mlx.kernels.quantized_attention import attend_quantized
from mm1_mlx.kernels.routed_experts import experts_reference, routed_experts
from mm1_mlx.kernels.router import route, route_tokens
from mm1_mlx.models import connector, layers
from mm1_mlx.presets import preset

README = " ".join((ROOT / "mm1_mlx/kernels/README.md").read_text("utf-8").split())


def said(kernel: str) -> str:
    """The README's launches of a kernel."""
    found = re.search(rf"\| `{kernel}` \|[^|]*\|([^|]*)\|", README)
    assert found, kernel
    return found[1].strip()


def counts(
    function: Callable[..., Any], x: mx.array, *sets: tuple[str, ...]
) -> list[int]:
    """Launches without kernels, and with each set of them."""
    mx.eval(x)
    found = []
    for kernels in ((), *sets):
        with forced(*kernels):
            count = count_launches(function, x)
        assert count.merges == 0
        found.append(count.launches)
    return found


def test_every_kernel_has_a_row():
    assert set(re.findall(r"\| `(\w+)` \|", README)) == set(KERNELS)


@pytest.mark.parametrize("T", [1, 8])
def test_router(T):
    """Of MM1's 3B; its weight is kept in float32, as a model keeps it."""
    x = mx.random.normal((T, 3072)).astype(mx.bfloat16)
    weight = mx.random.normal((64, 3072)).astype(mx.bfloat16)
    wide, logits = weight.astype(mx.float32), mx.random.normal((T, 64))
    mx.eval(weight, wide)
    how: dict[str, Any] = {"dtype": mx.bfloat16}
    without, with_it = counts(
        lambda x: route(x, 2, True, **how)[:2], logits, ("router",)
    )
    assert said("router") == f"{without} to {with_it}"
    without, tail, both = counts(
        lambda x: route_tokens(x, weight, 2, True, wide=wide, **how),
        x,
        ("router",),
        ("router", "router_matvec"),
    )
    promised = f"{without} to {both}, or {tail} to {both} beside `router`"
    assert said("router_matvec") == promised


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_routed_experts(bits):
    """Weights come from the router in the model's type: no cast."""
    how = None if bits == 16 else packed(bits, 64)
    given = experts_inputs(4, 128, 64, 1, 2, mx.bfloat16, up=how, down=how)
    x, up, down, weights, experts = given
    weights = weights.astype(mx.bfloat16)
    mx.eval(weights, [s.parameters() if how else s for s in (up, down)])

    def run(x: mx.array) -> mx.array:
        call = (x, up, down, weights, experts, "silu", True)
        found = routed_experts(*call)
        return experts_reference(*call) if found is None else found

    without, with_it = counts(run, x, ("routed_experts",))
    assert said("routed_experts") == f"{without} to {with_it}"


@pytest.mark.parametrize("norm", [nn.RMSNorm(64), nn.LayerNorm(64)], ids=str)
def test_add_norm(norm):
    x, delta, *_ = norm_inputs((1, 64))
    mx.eval(norm.parameters())
    without, with_it = counts(lambda x: add_norm(x, delta, norm), x, ("add_norm",))
    assert said("add_norm") == f"{without} to {with_it}"


def test_quantized_attention():
    def of(columns: int, mask: Any = None) -> list[int]:
        given = attention_inputs(1, 4, 2, 1, 64, columns, 4, 64, mx.float16, mask)
        q, *rest = given
        q = mx.contiguous(q)
        mx.eval(rest[0], rest[1])
        if mask is not None:
            mx.eval(mask)
        return counts(lambda q: attend_quantized(q, *rest), q, ("quantized_attention",))

    (without, with_it), (same, long) = of(512), of(513)
    masked, and_fused = of(512, padding(512, 0))
    assert same == without and and_fused == with_it
    promised = (
        f"{without} to {with_it}, above 512 keys to {long} (masked: from {masked})"
    )
    assert said("quantized_attention") == promised


PHOTO = "4032 x 3024 to 378 x 378"


def test_photo():
    across, down = axis(4032, 378), axis(3024, 378)
    colour, levels = mx.array([122, 116, 104]), mx.zeros((256, 3))
    picture = mx.zeros((3024, 4032, 3), mx.uint8)
    mx.eval(levels, across.weights, across.spans, down.weights, down.spans)
    without, with_it = counts(
        lambda x: photo(x, across, down, colour, levels, 378), picture, ("photo",)
    )
    assert said("photo").startswith(f"{without} to {with_it}, {PHOTO};")


@needs_host
def test_a_large_photo(monkeypatch):
    """A thousandth of a photo, and of the pixels that are read at once."""
    from PIL import Image

    monkeypatch.setattr(images, "STRIP", images.STRIP // 1000)
    with forced("photo"), host_kernels(), watched() as names:
        mx.eval(shot(Image.new("RGB", (127, 95)), ImageSettings(size=16)))
    parts = names.count("mm1_photo_across")
    assert names == ["mm1_photo_across"] * parts + ["mm1_photo_down"]
    strips = [mx.zeros((7, 16, 3), mx.uint8) for _ in range(parts)]
    join = count_launches(lambda *x: mx.concatenate([*x]), *strips)
    # The rows of a part are whole: 13 of 7 rows and a last one.
    assert (parts, join.launches) == (14, parts)
    whole = images.STRIP * 1000 // 4032
    real = -(-3024 // whole)
    assert f"{2 * real + 1} for one of 12 million" in said("photo")


def test_a_sparse_block():
    sets = [("router",), ("router", "router_matvec")]
    sets.append((*sets[1], "routed_experts"))
    x = mx.zeros((1, 1, 3072), mx.bfloat16)
    for bits in (16, 4):
        decoder, _ = ours("moe", 1, bits)
        without, router, matvec, experts = counts(decoder.layers[0].moe, x, *sets)
        promised = (
            f"A whole sparse block of a model takes {without} launches a token without "
            f"kernels, {router} with `router`, {matvec} with `router_matvec`, "
            f"{experts} with `routed_experts` as well."
        )
        assert promised in README


# On Metal mx.conv2d is one kernel for a grid like this (depthwise_conv_2D).
CONVOLUTION = MetalKernel("convolution", inputs=["x", "w"], outputs=["y"], source="")


def test_a_c_abstractors_block(monkeypatch):
    def convolution(x: mx.array, weight: mx.array) -> mx.array:
        one: Any = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1)}
        return CONVOLUTION([x, weight], shapes=[x.shape], dtypes=[x.dtype], **one)[0]

    # SiLU is compiled by MLX, of which an exported graph knows nothing.
    monkeypatch.setattr(
        connector, "activation", lambda name: fused(layers.activation(name))
    )
    monkeypatch.setattr(connector, "depthwise_conv3x3", convolution)
    model: Any = preset("mm1-3b")
    config = model.connector_config
    found = []
    for width in (config.hidden_size, model.vision_config.hidden_size):
        block = connector.BottleneckBlock(width, config)
        mx.eval(block.parameters())
        found += counts(block, mx.zeros((1, 24, 24, width)))
    assert f"{found[0]} launches a block ({found[1]} where the width changes)" in README
    blocks = 2 * config.depth
    assert f"would save 6 of the {found[0]}: {6 * blocks} launches a picture" in README
