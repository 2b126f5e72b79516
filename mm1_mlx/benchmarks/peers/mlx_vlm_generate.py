"""mlx-vlm's side of `benchmark generate --against mlx-vlm`; its own Python runs it."""

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from side_kit import MLXMemory, Task, main, wire_memory


class MlxVlm(MLXMemory):
    """A model that reads pictures, driven by mlx_vlm.generate.generate_step."""

    def __init__(self, task: Task):
        from mlx_vlm import load

        wire_memory()
        self._model, self._processor = load(task.model)
        self.versions = {name: version(name) for name in ("mlx-vlm", "mlx")}

    def read(self, task: Task) -> Any:
        """Tokens and pixels, as `python -m mlx_vlm.generate` makes them."""
        import mlx.core as mx
        from mlx_vlm.prompt_utils import apply_chat_template
        from mlx_vlm.utils import prepare_inputs

        if task.ids:
            ids = mx.array([task.ids])
            return {"input_ids": ids, "attention_mask": mx.ones_like(ids)}
        config: Any = self._model.config
        prompt = apply_chat_template(self._processor, config, task.prompt, num_images=1)
        return prepare_inputs(
            self._processor,
            images=[task.image],
            prompts=prompt,
            image_token_index=config.image_token_index,
        )

    def ids(self, inputs: Any) -> list[int]:
        """One for each place of the picture."""
        return inputs["input_ids"].tolist()[0]

    def encode(self, inputs: Any) -> None:
        """Tower and projector: what get_input_embeddings does before it merges."""
        import mlx.core as mx

        model: Any = self._model
        pixels = mx.array(inputs["pixel_values"])
        *_, states = model.vision_tower(
            pixels.transpose(0, 2, 3, 1), output_hidden_states=True
        )
        chosen = states[model.vision_feature_layer][:, 1:]
        mx.eval(model.multi_modal_projector(chosen))

    def stream(self, inputs: Any, tokens: int) -> Iterator[tuple[int, Any]]:
        """Tokens with their log-probabilities (V,)."""
        from mlx_vlm.generate import generate_step

        yield from generate_step(
            inputs["input_ids"],
            self._model,
            inputs.get("pixel_values"),
            inputs["attention_mask"],
            max_tokens=tokens,
            temperature=0.0,
        )

    def settle(self) -> None:
        """generate_step computes one token more than it gives."""
        import mlx.core as mx
        from mlx_vlm.generate.common import generation_stream

        mx.synchronize(generation_stream)


if __name__ == "__main__":
    main(MlxVlm)
