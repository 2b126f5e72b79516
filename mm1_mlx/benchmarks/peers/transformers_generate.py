"""transformers' side of `benchmark generate --against transformers`; its own Python
runs it. On a Mac it runs on MPS, else on the CPU."""

from collections.abc import Iterator
from importlib.metadata import version
from queue import SimpleQueue
from threading import Thread
from typing import Any

from side_kit import Task, main


class Queue:
    """What `generate` calls with each token (a streamer); the prompt comes first."""

    def __init__(self) -> None:
        self.tokens: SimpleQueue = SimpleQueue()
        self._prompt = True

    def put(self, value: Any) -> None:
        """New tokens, on the CPU."""
        if not self._prompt:
            self.tokens.put(int(value.reshape(-1)[0]))
        self._prompt = False

    def end(self) -> None:
        """There are no more."""
        self.tokens.put(None)


class Transformers:
    """A model in PyTorch, driven by its own `generate`."""

    def __init__(self, task: Task):
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        kind = AutoModelForImageTextToText if task.image else AutoModelForCausalLM
        device = "mps" if torch.backends.mps.is_available() else "cpu"
        model: Any = kind.from_pretrained(task.model, dtype="auto")
        self._model = model.to(device).eval()
        self._processor: Any = None
        if task.image:
            from transformers import AutoProcessor

            self._processor = AutoProcessor.from_pretrained(task.model)
        self.versions = {name: version(name) for name in ("transformers", "torch")}

    def read(self, task: Task) -> Any:
        """Tokens and pixels as tensors."""
        import torch
        from PIL import Image

        if task.ids:
            ids = torch.tensor([task.ids])
            found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        else:
            parts = [{"type": "image"}, {"type": "text", "text": task.prompt}]
            text = self._processor.apply_chat_template(
                [{"role": "user", "content": parts}], add_generation_prompt=True
            )
            with Image.open(task.image) as picture:
                found = self._processor(
                    images=picture.convert("RGB"), text=text, return_tensors="pt"
                )
        device = self._model.device
        return {name: value.to(device) for name, value in found.items()}

    def ids(self, inputs: Any) -> list[int]:
        """One for each place of the picture."""
        return inputs["input_ids"].tolist()[0]

    def encode(self, inputs: Any) -> None:
        """Tower and projector."""
        import torch

        with torch.no_grad():
            self._model.get_image_features(pixel_values=inputs["pixel_values"])
        if self._model.device.type == "mps":
            torch.mps.synchronize()

    def stream(self, inputs: Any, tokens: int) -> Iterator[tuple[int, Any]]:
        """Tokens alone; `generate` runs in a thread and hands them over."""
        queue, failed = Queue(), []
        self._model.generation_config.eos_token_id = None  # all of `tokens`
        settings = {"max_new_tokens": tokens, "do_sample": False, "streamer": queue}

        def work() -> None:
            try:
                self._model.generate(**inputs, **settings)
            except Exception as error:
                failed.append(error)
                queue.end()

        thread = Thread(target=work)
        thread.start()
        while (token := queue.tokens.get()) is not None:
            yield token, None
        thread.join()
        if failed:
            raise failed[0]

    def logprobs(self, inputs: Any, answer: list[tuple[int, Any]]) -> list[float]:
        """From one forward pass over prompt and answer."""
        import torch

        tokens = torch.tensor([[token for token, _ in answer]])
        tokens = tokens.to(self._model.device)
        ids = torch.cat([inputs["input_ids"], tokens], dim=1)
        more = {k: v for k, v in inputs.items() if k == "pixel_values"}
        with torch.no_grad():
            logits = self._model(input_ids=ids, **more).logits[0]
        values = logits[-tokens.shape[1] - 1 : -1].float().log_softmax(-1)
        return values.gather(1, tokens[0][:, None])[:, 0].tolist()

    def memory(self, *, reset: bool = False) -> tuple[int | None, int | None]:
        """PyTorch does not count what it holds on the CPU."""
        return None, None

    def settle(self) -> None:
        """`generate` has ended."""


if __name__ == "__main__":
    main(Transformers)
