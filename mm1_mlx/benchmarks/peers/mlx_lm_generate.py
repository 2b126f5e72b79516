"""mlx-lm's side of `benchmark generate --against mlx-lm`; its own Python runs it."""

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from side_kit import MLXMemory, Task, main, wire_memory


class MlxLm(MLXMemory):
    """A text model, driven by mlx_lm.generate.generate_step."""

    def __init__(self, task: Task):
        from mlx_lm.utils import load_model

        wire_memory()
        self._model, _ = load_model(Path(task.model))
        self.versions = {name: version(name) for name in ("mlx-lm", "mlx")}

    def read(self, task: Task) -> Any:
        """The prompt's tokens."""
        import mlx.core as mx

        return mx.array(task.ids)

    def ids(self, inputs: Any) -> list[int]:
        """As they were given."""
        return inputs.tolist()

    def encode(self, inputs: Any) -> None:
        """There are no pictures."""

    def stream(self, inputs: Any, tokens: int) -> Iterator[tuple[int, Any]]:
        """Tokens with their log-probabilities (V,)."""
        from mlx_lm.generate import generate_step

        steps: Any = generate_step(inputs, self._model, max_tokens=tokens)
        yield from steps

    def settle(self) -> None:
        """generate_step computes one token more than it gives."""
        import mlx.core as mx
        from mlx_lm.generate import generation_stream

        mx.synchronize(generation_stream)


if __name__ == "__main__":
    main(MlxLm)
