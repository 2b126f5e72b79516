"""Decoders with random weights in our layout and in the hub's, plain or packed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mm1_mlx.benchmarks.random_llava import Shape, write_model
from mm1_mlx.config import MM1Config, MoEConfig
from mm1_mlx.convert.conversion import convert

_GROUP = 64  # weights with one scale and one bias
_KEPT = ("vision_tower.", "multi_modal_projector.")


def dense() -> MM1Config:
    """The decoder of random_llava's usual model: 180M parameters."""
    return _alone(Shape())


def sparse(experts: int, inner: int) -> MM1Config:
    """Like Mixtral: two of `experts` in each of 8 layers, `inner` wide."""
    config = _alone(Shape(width=512, hidden=inner, layers=8, vocabulary=8192))
    moe = MoEConfig(num_local_experts=experts, sparse_step=1, first_sparse_layer=0)
    text = replace(config.text_config, moe_config=moe)
    return replace(config, text_config=text)


def _alone(shape: Shape) -> MM1Config:
    whole = shape.config()
    return replace(
        whole, vision_config=None, connector_config=None, image_token_id=None
    )


def write_decoder(folder: Path, config: MM1Config) -> int:
    """Write `folder`/ours and `folder`/hub; the parameters they have."""
    return write_model(folder, config, None, folder / "hub")


def pack(plain: Path, hub: Path, packed: Path, ours: Path, bits: int) -> None:
    """The model of `plain` and `hub` (ours, and the hub's layout) in `bits` bits.

    `packed` is as mlx-lm and mlx-vlm write it: the decoder's matrices and tables are
    packed, the router, the encoder and the connector stay as they are. `ours` is made
    of `packed`, byte by byte, and reads prompts as `plain` does.
    """
    packed.mkdir(parents=True)
    _copy_small(hub, packed)
    arrays: dict[str, mx.array] = {}
    for file in sorted(hub.glob("*.safetensors")):
        loaded: Any = mx.load(str(file))
        for name, array in loaded.items():
            arrays |= _packed(name, array, bits)
    mx.save_safetensors(
        str(packed / "model.safetensors"), arrays, metadata={"format": "mlx"}
    )
    path = packed / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["quantization"] = {"group_size": _GROUP, "bits": bits, "mode": "affine"}
    path.write_text(json.dumps(values), encoding="utf-8")
    convert(packed, ours)
    config = (ours / "config.json").read_bytes()
    _copy_small(plain, ours)  # its chat template above all
    (ours / "config.json").write_bytes(config)


def _copy_small(source: Path, target: Path) -> None:
    """All files but weights and the model card."""
    for file in source.iterdir():
        if file.suffix not in (".safetensors", ".md") and "index" not in file.name:
            shutil.copy(file, target / file.name)


def _packed(name: str, array: mx.array, bits: int) -> dict[str, mx.array]:
    matrix = array.ndim == 2 and name.endswith(".weight")
    if not matrix or name.startswith(_KEPT) or name.endswith(".gate.weight"):
        return {name: array}
    stem = name.removesuffix(".weight")
    parts = mx.quantize(array, group_size=_GROUP, bits=bits)
    names = ("weight", "scales", "biases")
    return {f"{stem}.{part}": values for part, values in zip(names, parts, strict=True)}
