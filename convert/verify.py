"""A converted model against its original, stage by stage, on the user's own files.

The original runs in PyTorch, in float32, one block's weights in memory at a time; ours
runs in MLX the same way, so a model of any size fits. Each reads the picture itself;
from then on the original is given our pixels, so that each stage is judged alone.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mm1_mlx.config import VisionConfig
from mm1_mlx.errors import CheckpointError
from mm1_mlx.inputs.images import load_image, pixels
from mm1_mlx.inputs.processor import Inputs, Processor
from mm1_mlx.inputs.settings import ImageSettings

from .conversion import Opened, find_origin, image_settings, open_checkpoint
from .packed import settings_of
from .pipeline import prepare
from .streamed import Streamed

# Largest difference that may be, over the root mean square of the original's stage, by
# the type that our weights are stored in: rounding them moves what follows. Where they
# are those of the original and float32 is computed in, only the order of sums differs.
TOLERANCES = {"F32": 1e-3, "F16": 5e-2, "BF16": 5e-1}


@dataclass(frozen=True)
class Stage:
    """One comparison.

    difference: the largest, absolute. scale: root mean square of the original's.
    tolerance: for difference / scale; None where nothing is judged.
    """

    name: str
    difference: float
    scale: float
    tolerance: float | None

    @property
    def relative(self) -> float:
        """The difference as a part of the original's scale."""
        return self.difference / self.scale if self.scale else self.difference

    @property
    def passed(self) -> bool:
        """Whether it is within the tolerance, or nothing is judged."""
        return self.tolerance is None or self.relative <= self.tolerance


@dataclass(frozen=True)
class Verification:
    """All stages in order, and the first ids that both answer with.

    reference: whose code the original ran in. judged: False where our weights are
    quantized and the original's are not: then differences are what quantization costs,
    and only the pixels have a tolerance.
    """

    stages: list[Stage]
    ours: list[int]
    theirs: list[int]
    judged: bool = True
    reference: str = "transformers"

    @property
    def first_difference(self) -> Stage | None:
        """The first stage above its tolerance."""
        return next((stage for stage in self.stages if not stage.passed), None)

    @property
    def passed(self) -> bool:
        """Whether every stage is within its tolerance, and the answers are the same
        (where they are judged)."""
        same = self.ours == self.theirs or not self.judged
        return self.first_difference is None and same

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        first = self.first_difference
        return {
            "passed": self.passed,
            "judged": self.judged,
            "reference": self.reference,
            "first_difference": first.name if first else None,
            "stages": [
                asdict(stage) | {"passed": stage.passed} for stage in self.stages
            ],
            "ours": self.ours,
            "theirs": self.theirs,
        }


def verify(
    source: str | Path,
    model: str | Path,
    prompt: str,
    images: list[Any] | None = None,
    *,
    tokens: int = 32,
    tower: str | Path | None = None,
    tell: Callable[[Stage], None] = lambda stage: None,
) -> Verification:
    """Compare the model folder `model` with the checkpoint that it was made from.

    prompt: through the model's chat template; images: as the processor takes them.
    tokens: how many greedy tokens to compare. tell: receives each stage as it is done.
    Raises CheckpointError, PromptError, ImageError; without torch and transformers a
    CheckpointError says what to install.
    """
    _need("torch", "transformers")
    opened = open_checkpoint(find_origin(source), tower=tower, locate=find_origin)
    on_cpu = mx.default_device().type == mx.cpu
    ours = Streamed(find_origin(model), mx.float32 if on_cpu else None)
    check = _Check(opened, ours, tell)
    if isinstance(ours.config, VisionConfig):
        return check.encoder(ImageSettings.read(find_origin(model)), images or [])
    processor = Processor.from_folder(find_origin(model), ours.config)
    inputs = processor(prompt, images=images)
    check.pictures(processor, inputs, images or [])
    return check.run(inputs, tokens)


def _need(*packages: str) -> None:
    from importlib.util import find_spec

    lacking = [name for name in packages if find_spec(name) is None]
    if lacking:
        raise CheckpointError(
            f"verify runs the original in PyTorch and needs {' and '.join(lacking)}: "
            f"pip install {' '.join(lacking)}"
        )


def _copies(opened: Opened) -> bool:
    """Whether every weight of ours is one of the original's, none computed."""
    plan = prepare(opened.origin, opened.source, opened.config, "F32", dequantize=True)
    return all(w.job is not None and not w.job.rule.numeric for w in plan.weights)


class _Check:
    """Both sides of one verification."""

    def __init__(self, opened: Opened, ours: Streamed, tell: Callable[[Stage], None]):
        from .references.parts import original

        self._opened, self._ours, self._tell = opened, ours, tell
        self._original = original(opened)
        packed = getattr(ours.config, "quantization", None) is not None
        same = packed and settings_of(opened.origin.config) is not None
        kinds = {kind for kind in TOLERANCES if kind in ours.types}
        stored = {a.dtype for a in opened.origin.arrays.values()} & TOLERANCES.keys()
        if ours.in_float32 and kinds == stored and _copies(opened):
            kinds = {"F32"}  # the same numbers on both sides: nothing was rounded
        limit = max(TOLERANCES[kind] for kind in kinds)
        self._judged = same or not packed
        self._tolerance = limit if self._judged else None
        self._stages: list[Stage] = []

    def _add(
        self,
        name: str,
        found: np.ndarray,
        wanted: np.ndarray,
        tolerance: float | None = None,
    ) -> None:
        if found.size != wanted.size:
            raise CheckpointError(
                f"{name}: ours has the shape {found.shape}, the original "
                f"{wanted.shape}. The folder was not made from this checkpoint."
            )
        gap = np.abs(found.reshape(wanted.shape).astype(np.float64) - wanted)
        scale = float(np.sqrt(np.square(wanted.astype(np.float64)).mean()))
        limit = self._tolerance if tolerance is None else tolerance
        stage = Stage(name, float(gap.max()), scale, limit)
        self._stages.append(stage)
        self._tell(stage)

    def encoder(self, settings: ImageSettings, images: list) -> Verification:
        """Of an encoder alone: pixels and every layer."""
        from .references.pictures import pixels as original_pixels
        from .references.run import encode

        if not images:
            raise CheckpointError(
                "This is an image encoder alone: give it a picture to read (--image)."
            )
        loaded = [load_image(image) for image in images]
        folder = self._own_pictures()
        known = image_settings(self._opened) or settings
        theirs = [original_pixels(image, known, folder) for image in loaded]
        shots = np.stack([pixels(image, settings) for image in loaded])
        ours = shots.transpose(0, 3, 1, 2)
        self._add("pixels", ours, np.concatenate(theirs), 1e-5)
        stages: dict[str, np.ndarray] = {}
        encode(self._original, ours.copy(), (), None, stages.__setitem__)
        self._ours.encode(mx.array(shots), (), self._against(stages))
        return self._verification([], [])

    def _own_pictures(self) -> Path | None:
        """The folder with the original's own settings of pictures, if they count."""
        source, folder = self._opened.source, self._opened.origin.folder
        if source.folders:
            return folder / source.folders[0]
        return None if source.images is not None else folder

    def pictures(self, processor: Processor, inputs: Inputs, images: list) -> None:
        """Pixels: ours against the original's way of reading the same files."""
        from .references.pictures import pixels

        settings = processor.image_settings
        if not images or settings is None or inputs.pixel_values is None:
            return
        theirs = image_settings(self._opened) or settings
        own = self._own_pictures()
        tiling = getattr(self._opened.config, "tiling_config", None)
        layouts = inputs.layouts if tiling is not None else [None] * len(images)
        wanted = [
            pixels(load_image(image), theirs, own, tiling, layout)
            for image, layout in zip(images, layouts, strict=True)
        ]
        ours = np.array(inputs.pixel_values).transpose(0, 3, 1, 2)
        self._add("pixels", ours, np.concatenate(wanted), 1e-5)

    def run(self, inputs: Inputs, count: int) -> Verification:
        """All stages after the pixels, and the greedy ids."""
        from .references.run import decode, encode

        theirs: dict[str, np.ndarray] = {}
        features, tokens = None, None
        if inputs.pixel_values is not None:
            shots = np.array(inputs.pixel_values).transpose(0, 3, 1, 2)
            tiling = self._ours.config.tiling_config
            tokens = encode(
                self._original, shots, inputs.layouts, tiling, theirs.__setitem__
            )
            features = self._ours.encode(
                inputs.pixel_values, inputs.layouts, self._against(theirs)
            )
        ids: list[int] = np.array(inputs.input_ids[0]).tolist()
        slot = self._ours.config.image_token_id
        theirs.clear()
        logits = decode(self._original, ids, slot, tokens, theirs.__setitem__)
        found = self._ours.decode(
            inputs.input_ids, features, emit=self._against(theirs)
        )
        self._add("logits", np.array(found.astype(mx.float32)), logits)
        answer = self._ours.greedy(inputs.input_ids, features, count)
        # Given our ids, each of the original's next ids must be the same one: then
        # its own greedy answer is, too.
        whole = decode(self._original, ids + answer, slot, tokens, lambda *_: None)
        wanted = whole[len(ids) - 1 : -1].argmax(-1).tolist()
        return self._verification(answer, wanted)

    def _verification(self, ours: list[int], theirs: list[int]) -> Verification:
        what = self._original.what
        return Verification(self._stages, ours, theirs, self._judged, what)

    def _against(self, theirs: dict[str, np.ndarray]):
        def emit(name: str, found: np.ndarray) -> None:
            if name in theirs:
                self._add(name, found, theirs.pop(name))

        return emit


def table(result: Verification) -> str:
    """A verification for people."""
    lines = [f"reference: {result.reference}"]
    lines += [f"{'stage':<20}{'difference':>12}{'of scale':>12}{'tolerance':>12}"]
    for stage in result.stages:
        limit = "-" if stage.tolerance is None else f"{stage.tolerance:g}"
        lines.append(
            f"{stage.name:<20}{stage.difference:>12.2e}{stage.relative:>12.2e}"
            f"{limit:>12}{'' if stage.passed else '  above it'}"
        )
    pairs = zip(result.ours, result.theirs, strict=True)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(result.ours))
    if result.ours:
        count = len(result.ours)
        lines.append(f"greedy tokens: the first {same} of {count} are the same")
    if not result.judged:
        lines.append(
            "The model is quantized and the original is not, so the differences are "
            "what that costs and no tolerance is set; `mm1_mlx quantize --compare` "
            "measures them on more questions."
        )
    first = result.first_difference
    if first is not None:
        lines.append(f"first difference above its tolerance: {first.name}")
    elif same < len(result.ours) and result.judged:
        lines.append(
            f"The answers differ from token {same + 1} on, with every stage within its "
            f"tolerance: two tokens are nearly as likely there."
        )
    return "\n".join(lines)
