"""Quantization that looks at data: mlx-lm's own AWQ and DWQ on our decoder.

mlx-lm's methods know its models only by their layout: `model.layers`, the names of the
linear layers, `model(ids) -> logits`. What is here shows them ours in that layout, with
pictures among the calibration questions. (mlx_lm/quant/awq.py, mlx_lm/quant/dwq.py.)

The encoder, the connector and routers are not touched.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mm1_mlx import memory
from mm1_mlx.checkpoint.folder import check_target, write_folder
from mm1_mlx.config import MM1Config
from mm1_mlx.convert.output import CARD, card, public_name, with_extra
from mm1_mlx.errors import MM1Error, PromptError
from mm1_mlx.inference.generation import generate
from mm1_mlx.inputs.processor import Inputs
from mm1_mlx.loading import load
from mm1_mlx.models.mm1 import MM1
from mm1_mlx.quantization.damage import questions
from mm1_mlx.quantization.modules import quantize_model
from mm1_mlx.quantization.recipes import Recipe, most_common, settings_for_config

METHODS = ("awq", "dwq")
MIN_SAMPLES = 8  # of which DWQ keeps an eighth to check itself


@dataclass(frozen=True)
class Sample:
    """One calibration text: its ids, and the image tokens (N, Q, D) among them."""

    ids: tuple[int, ...]
    features: mx.array | None = None


def learn(
    model: MM1,
    processor: Any,
    method: str,
    recipe: Recipe,
    *,
    samples: int = 128,
    length: int = 512,
    learning_rate: float = 1e-6,
    data: str | Path | None = None,
    seed: int = 0,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> MM1:
    """A quantized copy of a model's decoder, fitted to calibration data.

    method: "awq" (scales and clips chosen layer by layer, on text) or "dwq" (scales and
    biases trained until the logits are those of `model`, on text and pictures).
    data: a .txt file (texts apart by an empty line) or .jsonl ({"text": ..., "images":
    [...]}); None: answers of the model itself. samples, length: how many texts, and
    how many tokens of each. progress: told of texts that are ready, and of all.

    The model itself may be changed by "awq". Raises MM1Error where mlx-lm is lacking or
    the method does not fit the model.
    """
    _check(model, processor, method, recipe)
    if samples < MIN_SAMPLES:
        raise MM1Error(f"{samples} texts are too few: give {MIN_SAMPLES} or more.")
    texts = _calibration(model, processor, data, samples, length, seed, progress)
    with contextlib.redirect_stdout(sys.stderr):  # mlx-lm tells how it goes
        if method == "awq":
            return _awq(model, recipe, texts)
        return _dwq(model, recipe, texts, length, learning_rate, seed)


def quantize_learned(
    name_or_path: str | Path,
    folder: str | Path,
    method: str,
    recipe: Recipe | None = None,
    *,
    provenance: dict[str, Any] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], Any] = lambda done, total: None,
    **settings: Any,
) -> dict[str, Any]:
    """Write a model folder quantized by `learn`; what it takes, before and after.

    settings: of `learn`. The whole model is in memory, for "dwq" twice. Raises
    CheckpointError, ConfigError, MM1Error; then nothing is written.
    """
    recipe, target = recipe or Recipe(), Path(folder).expanduser()
    check_target(target, overwrite)  # before hours of work
    model, processor = load(name_or_path)
    before = _nbytes(model)
    made = learn(model, processor, method, recipe, progress=progress, **settings)
    how = {"method": f"{method} of mlx-lm", "from": public_name(name_or_path)}
    kept = {key: value for key, value in settings.items() if key != "data"}
    made_of = how | recipe.default | kept | (provenance or {})
    config = with_extra(made.config, "quantized", made_of)
    assert isinstance(config, MM1Config)
    made.config = config

    def write_more(new: Path) -> None:
        processor.save(new)
        (new / CARD).write_text(card(config), encoding="utf-8")

    write_folder(target, config, _flat(made), write_more, overwrite=overwrite)
    count = memory.count_parameters(config).all.total
    return {
        "bytes_before": before,
        "bytes": _nbytes(made),
        "bits_per_weight": 8 * _nbytes(made) / count,
        "quantized": sum(hasattr(module, "bits") for module in made.modules()),
    }


def _nbytes(model: nn.Module) -> int:
    return sum(array.nbytes for array in _flat(model).values())


def _flat(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))  # type: ignore[arg-type]


def require_mlx_lm(method: str) -> None:
    """MM1Error where mlx-lm is not installed."""
    try:
        import mlx_lm  # noqa: F401
    except ImportError:
        raise MM1Error(
            f"{method} is mlx-lm's own method: run pip install 'mm1_mlx[train]'."
        ) from None


def _check(model: MM1, processor: Any, method: str, recipe: Recipe) -> None:
    if method not in METHODS:
        raise MM1Error(f"The method is {method!r}, but must be {' or '.join(METHODS)}.")
    require_mlx_lm(method)
    if model.config.quantization is not None:
        raise MM1Error("This model is quantized already: take the one that is not.")
    if not processor.tokenizer.reads_text:
        raise MM1Error(f"{method} reads texts, but this model has no tokenizer.")
    if recipe.mode != "affine":
        raise MM1Error(f"{method} fits the mode 'affine' only, not {recipe.mode!r}.")
    if method == "awq":
        _check_awq(model, recipe)


# --- Calibration data --------------------------------------------------------------


def _calibration(
    model: MM1,
    processor: Any,
    data: str | Path | None,
    samples: int,
    length: int,
    seed: int,
    progress: Callable[[int, int], Any],
) -> list[Sample]:
    found: list[Sample] = []
    given = (
        _own_answers(model, processor, length, seed)
        if data is None
        else _read_data(Path(data), processor)
    )
    for inputs, answer in given:
        features = None
        if inputs.pixel_values is not None:
            features = model.encode_images(inputs.pixel_values, inputs.layouts)
            mx.eval(features)
        ids = [*np.array(inputs.input_ids[0]).tolist(), *answer]
        if features is not None and inputs.input_ids.shape[1] > length:
            continue  # half of a picture is none
        if len(ids) > 1:
            found.append(Sample(tuple(ids[:length]), features))
            progress(len(found), samples)
        if len(found) == samples:
            break
    if len(found) < MIN_SAMPLES:
        raise MM1Error(
            f"{data} has {len(found)} texts that can be used, but {MIN_SAMPLES} are "
            f"needed at least."
        )
    return found


def _own_answers(
    model: MM1, processor: Any, length: int, seed: int
) -> Iterator[tuple[Inputs, tuple[int, ...]]]:
    """Questions with answers that the model samples, without end."""
    asked = questions(model.config, processor, None, None)
    for number in range(sys.maxsize):
        prompt, images = asked[number % len(asked)]
        answer = generate(
            model,
            processor,
            prompt,
            images,
            temp=1.0,
            seed=seed + number,
            max_tokens=length,
            reuse=False,  # the memory is needed, and the model changes
        )
        yield processor(prompt, images), answer.token_ids


def _read_data(path: Path, processor: Any) -> Iterator[tuple[Inputs, tuple[int, ...]]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MM1Error(f"{path} cannot be read as text: {error}.") from error
    if path.suffix != ".jsonl":
        for part in text.split("\n\n"):
            if part.strip():
                yield processor(part.strip(), use_template=False), ()
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            part = str(entry["text"])
            images = [str(path.parent / name) for name in entry.get("images", [])]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PromptError(
                f'{path}, line {number}: expected {{"text": "...", "images": [...]}}.'
            ) from error
        yield processor(part, images, use_template=False), ()


# --- AWQ ---------------------------------------------------------------------------


def _check_awq(model: MM1, recipe: Recipe) -> None:
    text = model.config.text_config
    if text.moe_config is not None:
        raise MM1Error("awq fits dense decoders only; dwq takes experts, too.")
    if text.parallel_block:
        raise MM1Error("awq does not fit blocks that run side by side (Phi): use dwq.")
    others = recipe.parts.keys() - {"embeddings", "head"}
    if recipe.mixed is not None or others:
        raise MM1Error(
            "awq has one number of bits for all layers: leave out the recipe of mixed "
            "bits and parts other than embeddings and head."
        )
    bits = {recipe.parts.get(part) for part in ("embeddings", "head")} - {None}
    if len(bits) > 1:
        raise MM1Error("awq has the same bits for embeddings and head.")


class _AsMlxLm(nn.Module):
    """Our decoder under the names that mlx-lm's methods ask for."""

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.model = decoder
        if "lm_head" in decoder:
            self.lm_head = decoder.lm_head

    @property
    def layers(self) -> Any:
        return self.model.layers


def _awq(model: MM1, recipe: Recipe, texts: Sequence[Sample]) -> MM1:
    awq: Any = import_module("mlx_lm.quant.awq")
    gated = model.config.text_config.gated_mlp
    up = "gate_up_proj" if gated else "up_proj"
    # The scales that mlx-lm moves from down_proj to up_proj would have to pass an
    # activation here, or half of a fused matrix: that one is left out.
    layout = awq.AWQConfig(
        embed="embed_tokens",
        lm_head="lm_head",
        no_clip=["qkv_proj"],
        scale_configs=[
            awq.ScaleConfig(
                block="attn", prev="norm1", layers=["qkv_proj"], kwargs=["mask"]
            ),
            awq.ScaleConfig(block="mlp", prev="norm2", layers=[up]),
        ],
    )
    shown = _AsMlxLm(model.decoder)
    default = recipe.default
    ends = {recipe.parts.get(part) for part in ("embeddings", "head")} - {None}
    awq.awq_quantize(
        shown,
        _blocks_of_text(texts),
        layout,
        group_size=default["group_size"],
        bits=default["bits"],
        embed_group_size=default["group_size"],
        embed_bits=next(iter(ends), default["bits"]),
    )
    if "lm_head" in shown:
        model.decoder.lm_head = shown.lm_head  # type: ignore[assignment]
    return _with_settings(model)


def _blocks_of_text(texts: Sequence[Sample]) -> mx.array:
    """All text without pictures, in rows of equal length. (B, L) int32."""
    plain = [sample.ids for sample in texts if sample.features is None]
    ids = [i for sample in plain for i in sample]
    length = max((len(sample) for sample in plain), default=0)
    if not length:
        raise MM1Error("awq needs texts without pictures among its data.")
    rows = len(ids) // length
    return mx.array(ids[: rows * length], dtype=mx.int32).reshape(rows, length)


# --- DWQ ---------------------------------------------------------------------------


class _WithPictures(nn.Module):
    """A model that finds the pictures of the texts that it is given by their ids."""

    def __init__(self, model: MM1, texts: Sequence[Sample]):
        super().__init__()
        self.decoder = model.decoder
        self._model = [model]  # a list: its encoder is none of this module's parts
        self._by_ids = {sample.ids[:-1]: sample.features for sample in texts}

    @property
    def layers(self) -> list:
        return self.decoder.layers

    def __call__(self, ids: mx.array) -> mx.array:
        (row,) = np.array(ids).tolist()
        features = next(
            kept
            for start, kept in self._by_ids.items()
            if tuple(row[: len(start)]) == start and not any(row[len(start) + 1 :])
        )
        x = self._model[0].embed(ids, image_features=features)
        return self.decoder(None, input_embeddings=x)


def _dwq(
    model: MM1,
    recipe: Recipe,
    texts: Sequence[Sample],
    length: int,
    learning_rate: float,
    seed: int,
) -> MM1:
    import mlx.optimizers as optimizers
    from mlx_lm.quant.dwq import dwq_quantize

    student = MM1(model.config)
    student.update(model.parameters())  # the same arrays until they are packed
    choose = recipe.chooser(model.config.text_config.num_hidden_layers)
    shapes = {name: array.shape for name, array in _flat(model).items()}

    def settings_of(path: str) -> dict | None:
        name = f"{path}.weight" if f"{path}.weight" in shapes else path
        return choose(name, shapes[name]) if name in shapes else None

    quantize_model(student, settings_of)
    student.freeze()  # dwq unfreezes scales and biases of packed weights
    teacher_view = _WithPictures(model, texts)
    view = _WithPictures(student, texts)
    kept = max(len(texts) // 8, 1)
    rows = [(list(sample.ids), 0) for sample in texts]
    dtype = _flat(model)["decoder.norm.weight"].dtype
    dwq_quantize(
        view,
        lambda batch, index, split: teacher_view(batch),
        optimizers.Adam(learning_rate=learning_rate, bias_correction=True),
        rows[kept:],
        rows[:kept],
        batch_size=1,  # texts differ in length and in pictures
        max_seq_length=length + 1,
        seed=seed,
        dtype=dtype,
    )
    student.eval()
    return _with_settings(student)


def _with_settings(model: MM1) -> MM1:
    """The model with a config that says how its modules are packed."""
    chosen = {
        path: {key: getattr(module, key) for key in ("group_size", "bits", "mode")}
        for path, module in model.named_modules()
        if hasattr(module, "bits")
    }
    model.config = replace(
        model.config,
        quantization=settings_for_config(chosen, most_common(chosen.values())),
    )
    return model
