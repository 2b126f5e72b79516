"""A dense decoder to one with experts that answers the same (sparse upcycling).

Every expert starts as a copy of the MLP that it replaces, and the router at random.
The weights of the chosen experts sum to 1, so whatever the router says, the result is
that of the MLP (Komatsuzaki et al., arXiv 2212.05055; MoE-LLaVA starts so too).
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mm1_mlx.config import EncoderConfig, MM1Config, MoEConfig
from mm1_mlx.errors import CheckpointError

from . import numbers
from .conversion import (
    find_origin,
    open_checkpoint,
    origin_of,
    processor_of,
    stored_type,
)
from .output import with_extra, write_folder
from .pipeline import Conversion, Weight, prepare


def upcycle(
    folder: Path,
    out: Path,
    *,
    num_experts: int = 8,
    every: int = 2,
    first: int | None = None,
    top_k: int = 2,
    dtype: str | None = None,
    seed: int = 0,
    provenance: dict[str, Any] | None = None,
    overwrite: bool = False,
    tell: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> MM1Config:
    """Write the model of `folder` with experts in every `every`-th layer.

    folder: a model folder or a foreign checkpoint, dense. first: the first layer with
    experts; None for 1, or 0 where every layer has them (MM1 does not say; axlearn
    starts dense). seed: of the routers. Raises CheckpointError, ConfigError.
    """
    opened = open_checkpoint(folder, locate=find_origin)
    moe = MoEConfig(
        num_local_experts=num_experts,
        num_experts_per_tok=top_k,
        sparse_step=every,
        first_sparse_layer=min(every - 1, 1) if first is None else first,
    )
    config = sparse_config(opened.config, moe, folder)
    kept = numbers.BY_NAME[dtype] if dtype else stored_type(opened)
    dense = prepare(opened.origin, opened.source, opened.config, kept)
    made = {"num_experts": num_experts, "top_k": top_k, "every": every, "seed": seed}
    made |= {"first": moe.first_sparse_layer, "parent": origin_of(opened)}
    write_folder(
        out,
        with_experts(dense, config, seed),
        with_extra(config, "upcycled", made | (provenance or {})),
        *processor_of(opened, opened, tell),
        sources=[folder],
        overwrite=overwrite,
        progress=progress,
    )
    return config


def sparse_config(
    config: MM1Config | EncoderConfig, moe: MoEConfig, folder: Path
) -> MM1Config:
    """The config with experts; CheckpointError where they cannot take the MLPs' place.

    folder: for the messages.
    """
    if not isinstance(config, MM1Config):
        raise CheckpointError(
            f"{folder} is an image encoder alone: it has no decoder to give experts."
        )
    text = config.text_config
    if text.moe_config is not None:
        raise CheckpointError(
            f"{folder} has experts already ({text.moe_config.num_local_experts}). "
            f"Only a dense decoder can be upcycled."
        )
    sparse = replace(text, moe_config=moe)
    if not any(map(sparse.is_sparse, range(text.num_hidden_layers))):
        raise CheckpointError(
            f"With experts in every {moe.sparse_step} layers from layer "
            f"{moe.first_sparse_layer} on, none of {text.num_hidden_layers} has any."
        )
    return replace(config, text_config=sparse)


def with_experts(dense: Conversion, config: MM1Config, seed: int) -> Conversion:
    """The same weights with MLPs repeated, and new routers."""
    text = config.text_config
    moe = text.moe_config
    assert moe is not None
    rng = np.random.default_rng(seed)
    weights: list[Weight] = []
    for weight in dense.weights:
        layer = _layer_of_mlp(weight.name)
        if layer is None or not text.is_sparse(layer):
            weights.append(weight)
            continue
        weights.append(_repeated(weight, moe.num_local_experts))
        if weight.name.endswith("down_proj.weight"):
            shape = (moe.num_local_experts, text.hidden_size)
            router = rng.standard_normal(shape) * text.hidden_size**-0.5
            name = f"decoder.layers.{layer}.moe.router.weight"
            given = router.astype(np.float32)
            kind = weight.dtype if weight.dtype in numbers.FLOATS else "F32"
            weights.append(Weight(name, shape, kind, given=given))
    return Conversion(weights, dense.dropped, dense.notes)


def _layer_of_mlp(name: str) -> int | None:
    parts = name.split(".")
    if parts[:2] != ["decoder", "layers"] or parts[3] != "mlp":
        return None
    return int(parts[2])


def _repeated(weight: Weight, times: int) -> Weight:
    """The weight of an MLP as that of `times` equal experts, stacked."""
    assert weight.job is not None
    name = weight.name.replace(".mlp.", ".moe.experts.").removesuffix(".weight")
    if name.endswith(".bias"):
        name = name.removesuffix(".bias") + "_bias"
    job = replace(
        weight.job,
        target=name,
        pieces=weight.job.pieces * times,
        rule=replace(weight.job.rule, stack="e"),
    )
    return replace(weight, name=name, shape=(times, *weight.shape), job=job)
