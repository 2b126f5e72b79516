"""One run: its parts taken, `pretrain`, the measurement, its result.json.

Everything that is known about a run is in its folder; whoever finds a result.json there
does not train it again.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from examples.ablations.plan import Run, Size, as_dict
from examples.ablations.world import digest
from mm1_mlx.errors import CheckpointError, ConfigError

RESULT, RECIPE, SPENT = "result.json", "recipe.json", "spent.json"
# mm1-tiny's as it was: mm1-tiny may be trained anew, and runs stay comparable.
TOKENIZER = Path(__file__).parent / "tokenizer.model"
CURVE = 10  # steps that a point of the loss curve is a mean of


def result_of(folder: Path, run: Run, size: Size) -> dict[str, Any] | None:
    """What a finished run found, or None; ConfigError where it is of another recipe,
    vocabulary or data than today's."""
    file = folder / run.name / RESULT
    if not file.is_file():
        return None
    found = read_result(file)
    check_recipe(file, found, run, size)
    _check_same(file, found, run, {"data": digest()})
    return found


def check_recipe(file: Path, found: dict[str, Any], run: Run, size: Size) -> None:
    """ConfigError where a result.json is of another recipe or vocabulary than today's,
    which must not be compared."""
    recipe = json.loads(json.dumps(run.recipe(size)))
    _check_same(file, found, run, {"recipe": recipe, "vocabulary": vocabulary()})


def _check_same(
    file: Path, found: dict[str, Any], run: Run, today: dict[str, Any]
) -> None:
    if other := [key for key, value in today.items() if found.get(key) != value]:
        raise ConfigError(
            f"{file} is of another {' and another '.join(other)} than today's "
            f"{run.name}. Give another --out, or remove {file.parent} to train it "
            f"again."
        )


def vocabulary() -> str:
    """What tells the vocabulary, which all runs share, from another."""
    return hashlib.sha256(TOKENIZER.read_bytes()).hexdigest()[:16]


def read_result(file: Path) -> dict[str, Any]:
    """A result.json; CheckpointError for anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}). Remove it.") from error
    keys = {"name", "kind", "cell", "seed", "recipe", "vocabulary", "seconds", "size"}
    if not isinstance(found, dict) or not keys <= found.keys():
        raise CheckpointError(f"{file} is not the result of a run. Remove it.")
    return found


def do_run(
    folder: Path,
    run: Run,
    size: Size,
    *,
    progress: Callable[[float], None] = lambda share: None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Train and measure a run; its result, or None where it was stopped.

    progress: told the done share of the training's steps. CheckpointError where
    another process works on the same run.
    """
    from mm1_mlx.checkpoint.disk import locked

    own = folder / run.name
    own.mkdir(parents=True, exist_ok=True)
    with locked(own):
        return _do_run(folder, run, size, progress, stop)


def _do_run(
    folder: Path,
    run: Run,
    size: Size,
    progress: Callable[[float], None],
    stop: Callable[[], bool],
) -> dict[str, Any] | None:
    from mm1_mlx.checkpoint.folder import replacing_file
    from mm1_mlx.training.pretraining_run import pretrain

    own = folder / run.name
    recipe = run.recipe(size)
    written = own / RECIPE
    written.write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
    diary = _Diary(own / SPENT)

    def report(step: Any) -> None:
        diary.note(step)
        progress(step.step / step.steps)

    try:
        init = None
        if run.kind == "joint":
            init = _take_parts(folder, run, own, recipe)
        model = pretrain(
            written, own, TOKENIZER, init=init, save_every=100, report=report, stop=stop
        )
        if model is None:
            return None
        found = {
            "name": run.name,
            "kind": run.kind,
            "cell": as_dict(run.cell),
            "seed": run.seed,
            "recipe": recipe,
            "vocabulary": vocabulary(),
            "data": digest(),
            "size": asdict(size),
        }
        if run.kind == "joint":
            found |= _measure(model, run, size)
            shutil.rmtree(own / "start", ignore_errors=True)
    finally:
        diary.write()
    found |= diary.found()
    with replacing_file(own / RESULT) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if run.kind == "joint":  # nothing starts from it; the model folder stays
        (own / "joint.safetensors").unlink(missing_ok=True)
    return found


class _Diary:
    """What a run has cost, and its losses, over all the processes that worked on it.

    A process that is killed writes none of its own part; its checkpoints it does.
    """

    def __init__(self, file: Path):
        self._file = file
        self._seconds = {"cpu": 0.0, "wall": 0.0}
        self._documents, self._now, self._curve = 0, 0, {}
        if file.is_file():
            known = json.loads(file.read_text(encoding="utf-8"))
            self._seconds, self._documents = known["seconds"], known["documents"]
            self._curve = {int(step): loss for step, loss in known["losses"].items()}
        self._start = time.process_time(), time.monotonic()

    def note(self, step: Any) -> None:
        """A step of the trainer."""
        self._now = step.examples
        loss = step.metrics["text" if "text" in step.metrics else "loss"]
        self._curve[step.step] = round(loss, 4)  # as a process that goes on reads it

    def _spent(self) -> dict[str, float]:
        cpu, wall = self._start
        return {
            "cpu": round(self._seconds["cpu"] + time.process_time() - cpu, 1),
            "wall": round(self._seconds["wall"] + time.monotonic() - wall, 1),
        }

    def write(self) -> None:
        """Keep it for the process that goes on."""
        from mm1_mlx.checkpoint.folder import replacing_file

        known = {
            "seconds": self._spent(),
            "documents": self._documents + self._now,
            "losses": self._curve,
        }
        with replacing_file(self._file) as temporary:
            temporary.write_text(json.dumps(known) + "\n", encoding="utf-8")

    def found(self) -> dict[str, Any]:
        """What result.json holds of it; curve: (last step, mean loss) of every ten."""
        steps, curve = sorted(self._curve), []
        for i in range(0, len(steps), CURVE):
            part = [self._curve[step] for step in steps[i : i + CURVE]]
            mean = round(sum(part) / len(part), 4)
            curve.append([steps[i : i + CURVE][-1], mean])
        return {
            "seconds": self._spent(),
            "documents": self._documents + self._now,
            "curve": curve,
        }


def _take_parts(folder: Path, run: Run, own: Path, recipe: dict[str, Any]) -> Path:
    """The model folder that a joint run starts from: fresh weights of its seed, but the
    encoder and the decoder that learned before. MM1 starts so, too."""
    import mlx.core as mx

    from mm1_mlx.loading import save
    from mm1_mlx.models.mm1 import MM1
    from mm1_mlx.training.model_folder import make_processor
    from mm1_mlx.training.pretraining import initialize
    from mm1_mlx.training.pretraining_run import ENCODER_WEIGHTS
    from mm1_mlx.training.recipe import Recipe
    from mm1_mlx.training.state import load_state

    read = Recipe.from_dict(recipe)
    model = MM1(read.model)
    initialize(model, run.seed)
    for part in run.needs:
        place = folder / part.name
        if not (place / RESULT).is_file():
            raise CheckpointError(
                f"{run.name} starts from {part.name}, which has not been run. "
                f"`run` does both."
            )
        if part.kind == "encoder":
            model.load_weights(str(place / ENCODER_WEIGHTS), strict=False)
        else:
            trees, _ = load_state(place / "joint.safetensors")
            model.decoder.update(trees["parameters"]["decoder"])
    mx.eval(model.parameters())
    start = own / "start"
    save(
        model, make_processor(read.model, read.images, TOKENIZER), start, overwrite=True
    )
    return start


def _measure(model: Path, run: Run, size: Size) -> dict[str, Any]:
    """What `evaluate` finds, sizes, and how long the measurement took."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from examples.ablations.measure import measured
    from mm1_mlx import load

    start = time.process_time()
    loaded, processor = load(model, dtype=mx.float32)
    weights: Any = tree_flatten(loaded.parameters())
    evaluation = measured(loaded, processor, run.name, size.each)
    parts: dict[str, int] = {}
    for name, value in weights:
        part = name.partition(".")[0]
        parts[part] = parts.get(part, 0) + value.size
    return {
        "evaluation": evaluation,
        "weights": parts,
        "measured_seconds": round(time.process_time() - start, 1),
    }
