"""The memory of an answer, before it: what it needs, and what would fit.

Metal ends the process where memory runs out, without an error that Python could catch.
So the numbers are added up first, from the config and the prompt's length alone: no
array is made. A test holds them to what MLX allocates on a CPU: at the least, where it
finishes each operation before it starts the next, as it does when memory is short. How
far it works ahead otherwise depends on the machine; then it may be twice as much.

Refused is what exceeds the working set even at its least: the weights with all keys
and values of an answer of max_tokens, which are known to the byte, or with half of what
else is predicted, which is overrated twice at most. What lies between that and the
predicted peak may work, and the working set of a Mac is what it recommends, not where
it ends. So there is a warning, and it is tried.
"""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mm1_mlx import memory
from mm1_mlx.adapters.about import added_bytes
from mm1_mlx.checkpoint.folder import weight_files
from mm1_mlx.checkpoint.safetensors import ITEM_SIZES
from mm1_mlx.config import DecoderConfig, MM1Config, VisionConfig
from mm1_mlx.errors import MemoryPlanError, MM1Warning
from mm1_mlx.inference.memory_advice import advice
from mm1_mlx.inference.settings import Settings
from mm1_mlx.inference.steps import IMAGES_AT_ONCE, prefill_piece
from mm1_mlx.memory import bytes_text, working_set
from mm1_mlx.models.cache import KVCache
from mm1_mlx.models.mm1 import MM1

_DOUBT = 0.5  # what work takes, beside weights and cache, may be so much less
_FUSED_HEADS = (
    64,
    72,
    80,
    96,
    128,
)  # widths whose scores Metal's attention never stores
_UNCHECKED = "check_memory=False, --no-memory-check,"
_FLOATS = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is asked of a model.

    prompt: tokens of the longest row, image slots included. answer: max_tokens.
    pictures: how many go through the encoder, tiles counted. tiles: of one picture, at
    most: they go together. guesses: that are checked at a time. number: bytes of one in
    the model. piece: prompt tokens at a time. processes: that share the decoder.
    packed: whether the weights are quantized.
    """

    prompt: int
    answer: int
    rows: int = 1
    pictures: int = 0
    tiles: int = 1
    guesses: int = 0
    number: int = 2
    piece: int = 2048
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 0
    processes: int = 1
    packed: bool = False
    on_cpu: bool = False
    images: int = 0
    side: int | None = None
    dynamic: bool = False


@dataclass(frozen=True, kw_only=True)
class GenerationPlan:
    """What an answer is predicted to need, in bytes.

    weights: of the model and the draft, and what else is held. pictures: while they
    are encoded. prompt: while it is read; read: its keys and values then. cache:
    keys and values at the end. answer: what a step makes. draft: the draft's pictures,
    prompt and cache.
    """

    weights: int
    pictures: int
    prompt: int
    read: int
    cache: int
    answer: int
    draft: int
    limit: int
    config: MM1Config
    work: Work

    @property
    def peak(self) -> int:
        """The most at a time."""
        # The draft reads its prompt when its first guess is due.
        answer = self.cache + self.answer + self.draft
        return self.weights + max(self.pictures, self.prompt, answer)

    @property
    def least(self) -> int:
        """What it takes at least: weights and cache are known, the rest overrated."""
        sure = 1 - _DOUBT
        before = round(sure * max(self.pictures, self.prompt))
        drafting = self.read + round(sure * self.draft)
        return self.weights + max(before, drafting, self.cache)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the limit."""
        return self.peak <= self.limit

    @property
    def impossible(self) -> bool:
        """Whether it cannot be done: not even the least is within the limit."""
        return self.least > self.limit

    def changed(self, **changes: Any) -> "GenerationPlan":
        """The plan with other fields of Work."""
        return _plan(
            self.config, replace(self.work, **changes), self.weights, self.limit,
            self.draft,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """For JSON; bytes."""
        values = asdict(replace(self, config=None))  # type: ignore[arg-type]
        del values["config"]
        return values | {"peak": self.peak, "least": self.least, "fits": self.fits}

    def table(self) -> str:
        """For people."""
        work = self.work
        many = f"{work.rows} x " if work.rows > 1 else ""
        bits = f"{work.kv_bits} bits" if work.kv_bits else f"{8 * work.number} bits"
        rows = [
            ("weights", self.weights, ""),
            ("pictures", self.pictures, f"{work.pictures} through the encoder"),
            ("prompt", self.prompt, f"{many}{work.prompt} tokens, by {work.piece}"),
            ("keys and values", self.cache, f"+ {work.answer} tokens, {bits}"),
            ("answer", self.answer, "one token at a time"),
            ("draft", self.draft, "its prompt, keys and values"),
        ]
        verdict = "does not fit" if self.impossible else "may not fit"
        limit = f"of {bytes_text(self.limit)}: {'fits' if self.fits else verdict}"
        rows.append(("predicted peak", self.peak, limit))
        shown = [row for row in rows if row[1]]
        lines = [f"{name:<16}{bytes_text(n):>10}  {note}" for name, n, note in shown]
        return "\n".join(line.rstrip() for line in lines)

    def check(self) -> None:
        """MemoryPlanError where it is impossible: numbers, and what to change."""
        if self.impossible:
            raise MemoryPlanError(
                f"This would take {self._numbers()} ({_UNCHECKED} tries it as it is.)"
            )

    def warn(self) -> None:
        """MM1Warning where it may not fit, with the same numbers and advice."""
        if not self.fits:
            warnings.warn(
                f"This may take up to {self._numbers()} Memory may run out, which "
                f"would end the process. ({_UNCHECKED} leaves out this warning.)",
                MM1Warning,
                stacklevel=2,
            )

    def _numbers(self) -> str:
        parts = {
            "weights": self.weights,
            "pictures": self.pictures,
            "prompt": self.prompt,
            "keys and values": self.cache,
            "answer": self.answer,
            "draft": self.draft,
        }
        shown = [f"{name} {bytes_text(n)}" for name, n in parts.items() if n]
        return (
            f"{bytes_text(self.peak)} of memory, but there are "
            f"{bytes_text(self.limit)}: {', '.join(shown)}. {advice(self)}"
        )


# --- The parts ---------------------------------------------------------------------


def _cache_bytes(text: DecoderConfig, work: Work, tokens: int, bits: int | None) -> int:
    """Keys and values of so many columns, with the room that a cache keeps."""
    columns = -(-tokens // KVCache.step) * KVCache.step
    width = text.size_per_head
    per_head = float(width * work.number)
    if bits is not None:
        fitting = [g for g in (128, 64) if g <= work.kv_group_size and width % g == 0]
        group = fitting[0] if fitting else 32
        filled = -(-width // group) * group
        per_head = filled * bits / 8 + 2 * work.number * filled / group
    heads = 2 * text.num_hidden_layers * text.kv_heads / work.processes
    return round(work.rows * columns * heads * per_head)


def _kept(text: DecoderConfig, work: Work, tokens: int) -> int:
    """The most that keys and values take on the way to so many columns: those before
    quantized_kv_start lie unpacked until it is reached."""
    start = work.quantized_kv_start
    if work.kv_bits is None or start >= tokens:
        return _cache_bytes(text, work, tokens, None)
    return max(
        _cache_bytes(text, work, tokens, work.kv_bits),
        _cache_bytes(text, work, start, None),
    )


def _scores(heads: int, rows: int, queries: int, keys: int, number: int) -> int:
    """Attention that stores its scores, and the mask."""
    return number * rows * heads * queries * keys + queries * keys


def _stores_scores(head: int, work: Work) -> bool:
    return work.on_cpu or head not in _FUSED_HEADS


def _prompt(text: DecoderConfig, work: Work) -> int:
    """Reading the prompt: its embeddings and keys and values, and a piece of it."""
    piece = min(prefill_piece(text, work.rows, work.piece), work.prompt)
    step = memory.prompt_bytes(text, work.rows * piece, work.rows * piece)
    step = step * work.number // 2
    whole = work.prompt <= piece
    later = work.kv_bits is not None and work.quantized_kv_start < work.prompt
    bits = work.kv_bits if later and not whole else None
    if _stores_scores(text.size_per_head, work) or bits is not None:
        step = max(step, _attention(text, work, piece, bits))
    embeddings = work.rows * work.prompt * text.hidden_size * work.number
    kept = _cache_bytes(text, work, work.prompt, None)
    if bits is not None:
        kept = _kept(text, work, work.prompt)
    return embeddings + kept + step


def _attention(text: DecoderConfig, work: Work, piece: int, bits: int | None) -> int:
    """Attention with stored scores, of the prompt's last piece; softmax in float32."""
    heads, kv, width = (
        text.num_attention_heads // work.processes,
        text.kv_heads // work.processes,
        text.size_per_head,
    )
    copies = 1 if bits is None else 2
    scores = copies * _scores(heads, work.rows, piece, work.prompt, 4)
    # The residual; q, k and v; q and k turned; q scaled.
    row = text.hidden_size + (3 * heads + 3 * kv) * width
    return scores + work.rows * piece * row * work.number


def _answer(text: DecoderConfig, work: Work) -> int:
    """A step: logits and what is made of them, and a layer's cache as it grows."""
    tokens = work.prompt + work.answer
    layer = _cache_bytes(text, work, tokens, work.kv_bits) // text.num_hidden_layers
    rows = 4 * work.rows + 3 * work.guesses
    return 4 * rows * text.vocab_size + layer


def _pictures(vision: VisionConfig | None, config: MM1Config, work: Work) -> int:
    """Encoding: some pictures at a time, and the tokens of all of them."""
    if vision is None or not work.pictures:
        return 0
    count = min(work.pictures, IMAGES_AT_ONCE)
    if (tiling := config.tiling_config) is not None and tiling.arranges:
        count = max(count, work.tiles)
    if work.side is not None:
        vision = replace(vision, image_size=work.side)
    step = memory.image_bytes(vision, count) * work.number // 2
    if _stores_scores(vision.size_per_head, work):
        patches = vision.num_patches + 1
        scores = _scores(vision.num_attention_heads, count, patches, patches, 4)
        row = 8 * vision.hidden_size
        step = max(step, scores + count * patches * row * work.number)
    tokens = work.pictures * config.image_tokens(grid=vision.grid)
    return step + tokens * config.text_config.hidden_size * work.number


def _plan(
    config: MM1Config, work: Work, weights: int, limit: int, draft: int
) -> GenerationPlan:
    text = config.text_config
    return GenerationPlan(
        weights=weights,
        pictures=_pictures(config.vision_config, config, work),
        prompt=_prompt(text, work),
        read=_kept(text, work, work.prompt),
        cache=_kept(text, work, work.prompt + work.answer),
        answer=_answer(text, work),
        draft=draft,
        limit=limit,
        config=config,
        work=work,
    )


def _draft_bytes(config: MM1Config | None, work: Work) -> int:
    """What a draft model takes beside its weights."""
    if config is None:
        return 0
    text, work = config.text_config, replace(work, kv_bits=None)
    return max(
        _pictures(config.vision_config, config, work),
        _prompt(text, work),
        _cache_bytes(text, work, work.prompt + work.answer, None),
    )


def plan_generation(
    config: MM1Config,
    work: Work,
    *,
    weights: int,
    draft: MM1Config | None = None,
    limit: int | None = None,
) -> GenerationPlan:
    """Predict what an answer needs. limit: bytes; None is the machine's working set."""
    on_cpu = mx.default_device().type == mx.cpu
    work = replace(work, on_cpu=on_cpu)
    limit = working_set() if limit is None else limit
    return _plan(config, work, weights, limit, _draft_bytes(draft, work))


def _work(settings: Settings, **found: Any) -> Work:
    return Work(
        piece=settings.prefill_step_size,
        kv_bits=settings.kv_bits,
        kv_group_size=settings.kv_group_size,
        quantized_kv_start=settings.quantized_kv_start,
        **found,
    )


def _seen(
    config: MM1Config, settings: Settings, pictures: Sequence[int], side: int | None
) -> dict[str, Any]:
    """What Work says of pictures."""
    tiling, asked = config.tiling_config, settings.resolution
    own = tiling is not None and tiling.type == "dynamic" and asked is None
    return {
        "images": len(pictures),
        "pictures": sum(pictures),
        "tiles": max(pictures, default=1),
        "side": side,
        "dynamic": own or asked == "dynamic",
    }


def _guesses(settings: Settings, draft: Any) -> int:
    return settings.num_draft_tokens if draft or settings.lookup else 0


def plan_answers(
    model: MM1, settings: Settings, prompts: Sequence[Sequence[int]],
    pictures: Sequence[int], max_tokens: int, side: int | None = None,
) -> GenerationPlan:  # fmt: skip
    """The plan of a loaded model's answers. pictures: the tiles of each; side: of the
    largest tile, in pixels, where it is not the encoder's."""
    given = settings.draft_model
    draft = given[0] if isinstance(given, tuple) else given
    group = model.decoder.group
    work = _work(
        settings,
        prompt=max(map(len, prompts)),
        answer=max_tokens,
        rows=len(prompts),
        **_seen(model.config, settings, pictures, side),
        guesses=_guesses(settings, draft),
        number=model.decoder.norm.weight.dtype.size,  # type: ignore[union-attr]
        processes=1 if group is None else group.size(),
        packed=model.config.quantization is not None,
    )
    return plan_generation(
        model.config,
        work,
        weights=_held(model, draft),
        draft=None if draft is None else draft.config,
    )


def _held(*models: MM1 | None) -> int:
    """Bytes in use, or of the weights where these are more: lazy ones come later."""
    arrays: dict[int, int] = {}  # a model may be its own draft
    for model in models:
        weights: Any = [] if model is None else tree_flatten(model.parameters())
        arrays |= {id(array): array.nbytes for _, array in weights}
    return max(mx.get_active_memory(), sum(arrays.values()))


# --- Before the weights are read -----------------------------------------------------


def folder_weights(folder: Path, processes: int = 1) -> tuple[int, int]:
    """Bytes that a folder's weights will take here, and those of one number.

    From the headers of its files. MLX's CPU back end gets float32; see loading.load.
    """
    on_cpu = mx.default_device().type == mx.cpu
    total, number = 0, 4
    for infos in weight_files(folder).values():
        for name, info in infos.items():
            nbytes = info.stop - info.start
            if info.dtype in _FLOATS:
                size = ITEM_SIZES[info.dtype]
                nbytes = nbytes // size * 4 if on_cpu else nbytes
                number = size if name == "decoder.norm.weight" else number
            shared = processes if name.startswith("decoder.layers.") else 1
            total += nbytes // shared
    return total, 4 if on_cpu else number


def plan_folder(
    folder: Path,
    config: MM1Config,
    settings: Settings,
    *,
    prompt: int = 1,
    pictures: Sequence[int] = (),
    side: int | None = None,
    draft: tuple[Path, MM1Config] | None = None,
    adapter: str | Path | None = None,
    processes: int = 1,
) -> GenerationPlan:
    """The plan of a model that is not loaded. prompt: its tokens, where known.

    pictures, side: as of plan_answers. draft: the folder of a draft model, and its
    config. adapter: the folder of one.
    """
    weights, number = folder_weights(folder, processes)
    if draft is not None:
        weights += folder_weights(draft[0])[0]
    if adapter is not None:
        weights += added_bytes(adapter)
    context = config.text_config.max_position_embeddings
    work = _work(
        settings,
        prompt=prompt,
        answer=max(1, min(settings.max_tokens, context - prompt)),
        **_seen(config, settings, pictures, side),
        guesses=_guesses(settings, draft),
        number=number,
        processes=processes,
        packed=config.quantization is not None,
    )
    draft_config = None if draft is None else draft[1]
    return plan_generation(config, work, weights=weights, draft=draft_config)
