"""Our side of `benchmark generate`, in a process of its own.

`python -m mm1_mlx.benchmarks.generate_side TASK`: TASK and the last line of stdout are
JSON objects with the keys of side_kit's Task and Answer. What only we can do is
measured after the answer: rows together, and a second question about a picture.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from mm1_mlx.benchmarks.peers.side_kit import (
    Answer,
    MLXMemory,
    Task,
    measure,
    tell,
    wire_memory,
)
from mm1_mlx.benchmarks.roofline import token_bytes


class Ours(MLXMemory):
    """A model of ours, driven by mm1_mlx's generate_step."""

    def __init__(self, task: Task):
        from mm1_mlx._version import __version__
        from mm1_mlx.loading import load

        wire_memory()
        self.model, self.processor = load(task.model)
        self.versions = {"mm1_mlx": __version__, "mlx": version("mlx")}

    def read(self, task: Task) -> Any:
        """Tokens and pixels, as `python -m mm1_mlx.generate` makes them."""
        if task.ids:
            import mlx.core as mx

            return mx.array([task.ids]), None, ()
        inputs = self.processor(task.prompt, images=[task.image])
        return inputs.input_ids, inputs.pixel_values, inputs.layouts

    def ids(self, inputs: Any) -> list[int]:
        """One for each place of the picture."""
        return inputs[0].tolist()[0]

    def encode(self, inputs: Any) -> None:
        """Encoder and connector."""
        from mm1_mlx.inference.steps import encode_images

        encode_images(self.model, *inputs[1:])

    def stream(self, inputs: Any, tokens: int) -> Iterator[tuple[int, Any]]:
        """Tokens with their log-probabilities (V,)."""
        from mm1_mlx.inference.steps import generate_step

        ids, pixels, layouts = inputs
        yield from generate_step(
            self.model, ids, pixel_values=pixels, layouts=layouts, max_tokens=tokens
        )

    def settle(self) -> None:
        """Nothing is computed beyond the last token."""


def answer(task: Task) -> Answer:
    """What measure gives, with `more` of what the task asks, and the bytes of a token.

    more: "bytes" (roofline.TokenBytes, at the middle of the answer), "rows", "again".
    """
    side = Ours(task)
    found = measure(side, task)
    context = len(found.ids) + task.tokens // 2
    found.more["bytes"] = asdict(token_bytes(side.model.decoder, context))
    if task.rows:
        found.more["rows"] = _rows(side.model, task)
    if task.again:
        found.more["again"] = _again(side, task)
    return found


def _rows(model: Any, task: Task) -> dict[str, Any]:
    """Tokens a second after the first, all rows together: at once, and one by one."""
    import mlx.core as mx

    length = min(len(task.ids), 32)
    rows = [task.ids[i : i + length] for i in range(task.rows)]
    rows = [row + task.ids[: length - len(row)] for row in rows]
    _decode(model, mx.array(rows), 2)
    together, given = _decode(model, mx.array(rows), task.tokens)
    alone = [_decode(model, mx.array([row]), task.tokens) for row in rows]
    count = task.rows * (task.tokens - 1)
    return {
        "rows": task.rows,
        "rate": count / together,
        "one_by_one": count / sum(took for took, _ in alone),
        "same_tokens": given == [tokens[0] for _, tokens in alone],
    }


def _decode(model: Any, ids: Any, tokens: int) -> tuple[float, list[list[int]]]:
    """Seconds from the first token to the last, and the tokens of each row."""
    from mm1_mlx.inference.steps import Decoding

    decoding = Decoding(model, ids, max_tokens=tokens)
    given = [decoding.step()[0]]
    start = time.perf_counter()
    given += [decoding.step()[0] for _ in range(tokens - 1)]
    took = time.perf_counter() - start
    return took, [list(row) for row in zip(*given, strict=True)]


def _again(side: Ours, task: Task) -> dict[str, Any]:
    """Seconds to the first token of two questions about a picture that is new here.

    Through stream_generate, as a user asks; and whether the second answer is the one
    that a model gives that has read nothing before.
    """
    picture, *questions = task.again
    took = [_ask(side, question, picture, task.tokens) for question in questions]
    second = Task(model=task.model, prompt=questions[-1], image=picture)
    ids, pixels, layouts = side.read(second)
    fresh = [token for token, _ in side.stream((ids, pixels, layouts), task.tokens)]
    given = took[-1][1]
    return {
        "prompt_tokens": ids.size,
        "first": took[0][0],
        "second": took[-1][0],
        "same_tokens": given == fresh[: len(given)],
    }


def _ask(side: Ours, question: str, picture: str, tokens: int) -> tuple[float, list]:
    from mm1_mlx.inference.generation import stream_generate

    start = time.perf_counter()
    pieces = stream_generate(
        side.model, side.processor, question, images=[picture], max_tokens=tokens
    )
    ids = [next(pieces).token_id]
    took = time.perf_counter() - start
    return took, ids + [piece.token_id for piece in pieces]


if __name__ == "__main__":
    tell(asdict(answer(Task(**json.loads(sys.argv[1])))))
