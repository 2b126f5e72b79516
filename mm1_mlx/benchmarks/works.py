"""What `benchmark generate` asks: models of random weights, or a user's own.

Both sides read the same numbers: ours from our folder, a peer from the hub's layout.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mm1_mlx.benchmarks.peers.side_kit import Task
from mm1_mlx.benchmarks.random_decoder import dense, pack, sparse, write_decoder
from mm1_mlx.benchmarks.random_llava import Shape, write_llava
from mm1_mlx.config import MM1Config
from mm1_mlx.errors import MM1Error

ROWS = 8  # answers that are decoded together
_MARKS = 5  # ids below are not words
_QUESTION = "What colour is the circle?"
_SECOND = "How many circles are there?"

# name: what it is
CASES = {
    "image": "a LLaVA, asked about a picture",
    "dense": "that LLaVA's decoder alone, a Llama, asked a text",
    "experts8": "like Mixtral, 2 of 8 experts in each layer, asked a text",
    "experts64": "like Mixtral, 2 of 64 experts in each layer, asked a text",
}
_TEXTS = ("dense", "experts8", "experts64")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is asked.

    tokens: of an answer. prompt: the tokens of a text. bits: of the random models'
    decoders; None is float32. image_size: of the random LLaVA.
    """

    tokens: int = 32
    prompt: int = 256
    bits: int | None = None
    image_size: int = 336


@dataclass(frozen=True, kw_only=True)
class Work:
    """A question to a model. what: both, in words. ours, theirs: its folders."""

    name: str
    what: str
    ours: str
    theirs: str
    task: Task

    def of(self, folder: str) -> Task:
        """The same for the model in another folder, without what only ours can do."""
        return replace(self.task, model=folder, rows=0, again=[])


def usual_cases(peer: str | None) -> tuple[str, ...]:
    """What is measured against a peer unless something else is asked for."""
    if peer is None:
        return ("image", "dense")
    return ("image",) if peer == "mlx-vlm" else _TEXTS


def prepare(
    name: str,
    folder: Path,
    settings: Settings,
    *,
    peer: bool,
    shapes: dict[str, Any] | None = None,
) -> Work:
    """Write the random model of a case to `folder`; peer: for another program, too.

    shapes: other sizes than the usual ones, a Shape for "image" and configs for others.
    """
    given = shapes or {}
    if name == "image":
        shape = given.get(name, Shape(image_size=settings.image_size))
        count = write_llava(folder, shape, peer=peer or settings.bits is not None)
        hub, config = folder / "mlx-vlm", shape.config()
    else:
        config = given[name] if name in given else _USUAL[name]()
        count = write_decoder(folder, config)
        hub = folder / "hub"
    ours = folder / "ours"
    if settings.bits is not None:
        plain, ours = ours, folder / "ours-packed"
        pack(plain, hub, folder / "packed", ours, settings.bits)
        hub = folder / "packed"
    bits = "float32" if settings.bits is None else f"decoder in {settings.bits} bits"
    return Work(
        name=name,
        what=f"{CASES[name]}; {count / 1e6:.0f}M random parameters, {bits}",
        ours=str(ours),
        theirs=str(hub),
        task=_task(config, folder, str(ours), settings),
    )


_USUAL: dict[str, Callable[[], MM1Config]] = {
    "dense": dense,
    "experts8": lambda: sparse(8, 1024),
    "experts64": lambda: sparse(64, 256),
}


def own_model(name: str, folder: Path, settings: Settings, *, peer: str | None) -> Work:
    """The question to a user's model: a name, a folder or a hub id.

    Where it is ours and there is a peer, it is exported into `folder`. Raises
    CheckpointError where it cannot be, MM1Error for a peer that reads no pictures.
    """
    from mm1_mlx.checkpoint.folder import is_foreign, read_config
    from mm1_mlx.convert.conversion import find_origin
    from mm1_mlx.convert.export import export
    from mm1_mlx.loading import find_model

    ours = find_model(name)
    config = read_config(ours)
    if config.reads_images and peer == "mlx-lm":
        raise MM1Error(
            f"{name} reads pictures and mlx-lm does not: compare it with mlx-vlm."
        )
    theirs = find_origin(name)
    if peer is not None and not is_foreign(theirs):
        theirs = folder / "hub"
        export(ours, theirs)
    return Work(
        name=name,
        what="asked about a picture" if config.reads_images else "asked a text",
        ours=str(ours),
        theirs=str(theirs),
        task=_task(config, folder, str(ours), settings),
    )


def _task(config: MM1Config, folder: Path, model: str, settings: Settings) -> Task:
    """About a picture where the model reads some, else a text of random words."""
    if config.reads_images:
        from mm1_mlx.benchmarks.start import draw_circle

        pictures = [folder / "circle.png", folder / "another.png"]
        for picture, colour in zip(pictures, ("#dc1e1e", "blue"), strict=True):
            draw_circle(picture, colour)
        return Task(
            model=model,
            prompt=_QUESTION,
            image=str(pictures[0]),
            tokens=settings.tokens,
            again=[str(pictures[1]), _QUESTION, _SECOND],
        )
    rng = random.Random(0)
    words = range(_MARKS, config.text_config.vocab_size)
    ids = rng.choices(words, k=settings.prompt)
    return Task(model=model, ids=ids, tokens=settings.tokens, rows=ROWS)
