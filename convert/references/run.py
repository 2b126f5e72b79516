"""Runs an original on pixels and ids, and gives what comes out of every stage."""

from collections.abc import Callable
from math import isqrt

import numpy as np
import torch

from mm1_mlx.config import TilingConfig
from mm1_mlx.grids import Layout, without_padding

from .parts import Original

Emit = Callable[[str, np.ndarray], None]


@torch.no_grad()
def encode(
    original: Original,
    pixel_values: np.ndarray,
    layouts: tuple[Layout, ...],
    tiling: TilingConfig | None,
    emit: Emit,
) -> np.ndarray:
    """Image tokens (T, D) of all pictures in order; every stage goes to `emit`.

    pixel_values: (N, 3, H, W), tiles where the model reads tiles.
    """
    assert original.encoder is not None
    features = _features(original, torch.from_numpy(pixel_values), emit)
    if not original.connectors:
        return features.numpy()
    if tiling is None:
        tokens = original.connectors["overview"](features).flatten(0, 1)
    elif tiling.type == "crops":
        tokens = torch.cat(_by_picture(features, layouts, original, _crops))
    else:
        tiles = original.connectors["overview"](features)
        tokens = torch.cat(_by_picture(tiles, layouts, original, _anyres(tiling)))
    emit("connector", tokens.numpy())
    return tokens.numpy()


def _features(original: Original, pixels: torch.Tensor, emit: Emit) -> torch.Tensor:
    """What the connector reads: (N, P, Dv)."""
    encoder, states = original.encoder, []
    assert encoder is not None

    def keep(_module, _inputs, output) -> None:
        out = output[0] if isinstance(output, tuple) else output
        number = len(states)
        states.append(out)
        emit(f"encoder layer {number}", out.numpy())

    layers = _layers(encoder)
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    first = layers[0].register_forward_pre_hook(
        lambda _m, inputs, kwargs: emit(
            "patch embedding", (inputs or (kwargs["hidden_states"],))[0].numpy()
        ),
        with_kwargs=True,
    )
    try:
        encoder(pixels)
    finally:
        for hook in (*hooks, first):
            hook.remove()
    chosen = states[len(states) + original.feature_layer]
    if original.output_norm is not None:
        chosen = original.output_norm(chosen)
    return chosen[:, 1:] if original.drops_class else chosen


def _layers(encoder: torch.nn.Module) -> list[torch.nn.Module]:
    inner = getattr(encoder, "vision_model", encoder)
    return list(getattr(inner, "encoder", inner).layers)  # type: ignore[union-attr]


def _by_picture(tokens, layouts, original, arrange) -> list[torch.Tensor]:
    found, start = [], 0
    for layout in layouts:
        found.append(arrange(tokens[start : start + layout.tiles], layout, original))
        start += layout.tiles
    return found


def _map(tiles: torch.Tensor, layout: Layout) -> torch.Tensor:
    """A grid of tiles' tokens as one map (H, W, D)."""
    side = isqrt(tiles.shape[1])
    grid = tiles.reshape(layout.rows, layout.columns, side, side, -1)
    grid = grid.permute(0, 2, 1, 3, 4)
    return grid.reshape(layout.rows * side, layout.columns * side, -1)


def _crops(features: torch.Tensor, layout: Layout, original: Original) -> torch.Tensor:
    whole = _map(features[:-1], layout).flatten(0, 1)[None]
    crops = original.connectors["crops"](whole)[0]
    return torch.cat([crops, original.connectors["overview"](features[-1:])[0]])


def _anyres(tiling: TilingConfig):
    def arrange(tiles: torch.Tensor, layout: Layout, original: Original):
        assert original.newline is not None
        newline = original.newline()
        if layout.tiles == 1:
            return torch.cat([tiles[0], newline[None]])
        grid = _map(tiles[1:], layout)
        if tiling.unpad:
            rows, columns = without_padding(layout, isqrt(tiles.shape[1]))
            grid = grid[rows, columns]
            ends = newline.expand(len(grid), 1, -1)
            grid = torch.cat([grid, ends], dim=1)
        return torch.cat([tiles[0], grid.flatten(0, 1)])

    return arrange


@torch.no_grad()
def decode(
    original: Original,
    ids: list[int],
    slot: int | None,
    image_tokens: np.ndarray | None,
    emit: Emit,
) -> np.ndarray:
    """Logits (L, V) of a row of ids, with image tokens where `slot` stands."""
    decoder = original.decoder
    assert decoder is not None
    row = torch.tensor([ids])
    if slot is not None:
        row = torch.where(row == slot, 0, row)
    embeddings = decoder.get_input_embeddings()(row).clone()  # type: ignore[operator]
    if image_tokens is not None and slot is not None:
        places = [i for i, token in enumerate(ids) if token == slot]
        embeddings[0, places] = torch.from_numpy(image_tokens)
    emit("embeddings", embeddings.numpy())
    number = 0

    def keep(_module, _inputs, output) -> None:
        nonlocal number
        out = output[0] if isinstance(output, tuple) else output
        emit(f"decoder layer {number}", out.numpy())
        number += 1

    layers = getattr(decoder, "model", decoder).layers
    hooks = [layer.register_forward_hook(keep) for layer in layers]  # type: ignore
    try:
        logits = decoder(inputs_embeds=embeddings, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return logits[0].numpy()
