"""What quantization changed: two models on the same questions, in numbers.

One model after the other is run, so that only one has to be in memory. Kept of each
are the logits of the last positions of every question and the states on the way there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mm1_mlx.config import MM1Config
from mm1_mlx.errors import MM1Error
from mm1_mlx.models.mm1 import MM1

POSITIONS = 64  # of each question, counted from its end

# Questions for any model; it need not know the answer, only keep to its own.
PROMPTS = (
    "What is in this picture?",
    "Describe the colours and the shapes that you see, from left to right.",
    "The capital of France is",
    "List three reasons why the sky looks blue at noon and red in the evening.",
)


@dataclass
class Trace:
    """What a model did with the questions.

    ids: of each question. logits: per question (positions, V) float32. states: per
    question and stage ("encoder", "connector", "decoder.0", ..., "decoder") an array
    (rows, width).
    """

    ids: list[list[int]] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    states: list[dict[str, np.ndarray]] = field(default_factory=list)


def record(
    model: MM1,
    processor: Any,
    prompts: Sequence[str] | None = None,
    images: Sequence[Any] | None = None,
    *,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> Trace:
    """Run a model on every prompt, with every image where it reads images.

    prompts: None for the built-in ones; without a tokenizer they are token ids. images:
    None for a built-in one, generated here.
    """
    trace = Trace()
    asked = questions(model.config, processor, prompts, images)
    for number, (prompt, pictures) in enumerate(asked):
        inputs = processor(prompt, images=pictures)
        states: dict[str, np.ndarray] = {}
        trace.ids.append(inputs.input_ids[0].tolist())
        trace.logits.append(_run(model, inputs, states))
        trace.states.append(states)
        progress(number + 1, len(asked))
    return trace


def questions(
    config: MM1Config,
    processor: Any,
    prompts: Sequence[str] | None,
    images: Sequence[Any] | None,
) -> list[tuple[str, list]]:
    """Every prompt with every image, or the built-in ones; see `record`."""
    texts = list(prompts or PROMPTS)
    if not processor.tokenizer.reads_text and prompts is None:
        step = max(config.text_config.vocab_size // 61, 1)
        texts = [
            " ".join(str((7 * i * step + k) % (60 * step) + 1) for i in range(24))
            for k in range(3)
        ]
    if not config.reads_images:
        return [(text, []) for text in texts]
    pictures = list(images) if images else [_picture(), None]
    return [
        (text, [] if picture is None else [picture])
        for picture in pictures
        for text in texts
    ]


def _picture() -> np.ndarray:
    """Shapes on a gradient: something to see for any encoder. (H, W, 3) uint8."""
    y, x = np.mgrid[0:256, 0:320] / 256
    picture = np.stack([x * 180, y * 200, 60 + 60 * np.sin(9 * x)], axis=-1)
    picture[(x - 0.4) ** 2 + (y - 0.5) ** 2 < 0.04] = (230, 40, 40)
    picture[(abs(x - 0.95) < 0.15) & (abs(y - 0.6) < 0.15)] = (40, 60, 220)
    return picture.astype(np.uint8)


def _run(model: MM1, inputs: Any, states: dict[str, np.ndarray]) -> np.ndarray:
    """Logits of the last positions; every stage's output goes into `states`."""

    def keep(name: str, x: mx.array) -> None:
        rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        states[name] = np.array(rows[-16 * POSITIONS :] if "." not in name else rows)

    features = None
    if inputs.pixel_values is not None:
        keep("encoder", model.vision(inputs.pixel_values))
        features = model.encode_images(inputs.pixel_values, inputs.layouts)
        keep("connector", features)
    x = model.embed(inputs.input_ids, image_features=features)
    decoder = model.decoder
    for number, layer in enumerate(decoder.layers):
        x = layer(x, "causal" if x.shape[1] > 1 else None)
        keep(f"decoder.{number}", x[:, -POSITIONS:])
        mx.eval(x)
    logits = decoder.head(decoder.norm(x[:, -POSITIONS:]))
    return np.array(logits[0].astype(mx.float32))


def compare(before: Trace, after: Trace) -> dict[str, Any]:
    """How far the second model is from the first.

    kl: mean KL divergence of the next-token distributions, in nats, and its largest
    value. top1: share of positions whose likeliest token is the same. parts: relative
    error of each stage's output, |after - before| / |before| over all questions.
    MM1Error where they are not the same model with other weights.
    """
    if before.ids != after.ids:
        raise MM1Error(
            "The two models were asked different questions: their tokenizers or chat "
            "templates are not the same. Compare a model with its own quantized copy."
        )
    divergences, same, count = [], 0, 0
    for first, second in zip(before.logits, after.logits, strict=True):
        if first.shape != second.shape:
            raise MM1Error(
                f"The models cannot be compared: one gives logits of shape "
                f"{first.shape}, the other {second.shape}."
            )
        p, q = _log_softmax(first), _log_softmax(second)
        divergences.append((np.exp(p) * (p - q)).sum(axis=-1))
        same += int((first.argmax(-1) == second.argmax(-1)).sum())
        count += len(first)
    every = np.concatenate(divergences)
    return {
        "questions": len(before.logits),
        "positions": count,
        "kl": {"mean": float(every.mean()), "max": float(every.max())},
        "top1": same / count,
        "parts": _parts(before, after),
    }


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def _parts(before: Trace, after: Trace) -> dict[str, float]:
    error: dict[str, float] = {}
    size: dict[str, float] = {}
    for first, second in zip(before.states, after.states, strict=True):
        shapes = [{n: x.shape for n, x in states.items()} for states in (first, second)]
        if shapes[0] != shapes[1]:
            name = next(iter(dict(shapes[0].items() ^ shapes[1].items())))
            found = [str(known.get(name, "nothing")) for known in shapes]
            raise MM1Error(
                f"The models cannot be compared: {name} gives {found[0]} in one and "
                f"{found[1]} in the other. Compare a model with its own quantized copy."
            )
        for name, x in first.items():
            gap = second[name].astype(np.float64) - x
            error[name] = error.get(name, 0.0) + float((gap**2).sum())
            size[name] = size.get(name, 0.0) + float((x.astype(np.float64) ** 2).sum())
    return {
        name: (error[name] / size[name]) ** 0.5 if size[name] else 0.0 for name in error
    }


def table(report: dict[str, Any]) -> str:
    """A report for people."""
    kl = report["kl"]
    lines = [
        f"damage over {report['questions']} questions, {report['positions']} positions",
        f"  {'same likeliest token':<28}{report['top1']:>9.1%}",
        f"  {'KL of the logits, mean':<28}{kl['mean']:>9.5f} nats",
        f"  {'KL of the logits, largest':<28}{kl['max']:>9.5f} nats",
        "  relative error after",
    ]
    parts = report["parts"]
    layers = [name for name in parts if name.startswith("decoder.")]
    shown = layers if len(layers) <= 8 else [*layers[:3], *layers[-3:]]
    for name in parts:
        if name in layers and name not in shown:
            continue
        label = name.replace("decoder.", "decoder layer ")
        lines.append(f"    {label:<26}{parts[name]:>9.2%}")
    return "\n".join(lines)
