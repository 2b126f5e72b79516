"""Two processes share a run: equal weights, the mean of both gradients."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_map
from process_kit import two_processes
from training_kit import (
    arrays_of,
    encode,
    environment,
    recipe_with,
    start,
    uncompiled,
    wait_for,
    write_run,
)

from helpers import (
    ROOT,
    assert_close,
    assert_equal,
    clean_environment,
)
from mm1_mlx.errors import ConfigError
from mm1_mlx.models.mm1 import MM1
from mm1_mlx.training.model_folder import make_processor
from mm1_mlx.training.pretraining import initialize, make_trainer
from mm1_mlx.training.recipe import Recipe, read_recipe
from mm1_mlx.training.schedules import warmup_cosine
from mm1_mlx.training.trainer import _norm_of, batch_rng

pytestmark = pytest.mark.usefixtures(uncompiled.__name__)


# Runs a stage and writes what this process ends with.
_ONE_OF_TWO = """
import sys
from pathlib import Path
if sys.argv[3] == "OpenBLAS":
    from mm1_mlx.cli.backend import require_mlx
    require_mlx()
import mlx.core as mx
from mlx.utils import tree_flatten
from mm1_mlx.models.mm1 import MM1
from mm1_mlx.training import pretraining as p
from mm1_mlx.training.model_folder import make_processor
from mm1_mlx.training.recipe import read_recipe

folder, stage = Path(sys.argv[1]), sys.argv[2]
recipe = read_recipe(folder / "recipe.json")
model = MM1(recipe.model)
p.initialize(model, recipe.seed)
tokenizer = make_processor(
    recipe.model, recipe.images, folder / "tokenizer.model"
).tokenizer
trainer = p.make_trainer(recipe, stage, model, tokenizer.encode, folder / "run")
for progress in trainer.run():
    pass
rank = mx.distributed.init().rank()
assert mx.distributed.init().size() == 2
weights = dict(tree_flatten(trainer.module.parameters()))
mx.save_safetensors(str(folder / f"rank{rank}.safetensors"), weights)
"""


@pytest.mark.parametrize("stage", ["encoder", "joint"])
def test_two_processes_end_with_the_same_weights(tmp_path, stage, monkeypatch):
    """Equal, and those of steps with the mean of both gradients."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "stub_data", raising=False)
    write_run(tmp_path, encoder={"steps": 3}, joint={"steps": 3})
    # As conftest.py has it here: where a gradient is rounding, another product's steps
    # are others (on an AMD EPYC by 3e-4).
    product = "MLX" if os.environ.get("MM1_WHEEL_PRODUCT") == "1" else "OpenBLAS"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _ONE_OF_TWO, str(tmp_path), stage, product],
            cwd=ROOT,
            env=clean_environment(**environment(tmp_path, **more)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for more in two_processes(tmp_path)
    ]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    first, second = (
        mx.load(str(tmp_path / f"rank{rank}.safetensors")) for rank in (0, 1)
    )
    assert first.keys() == second.keys()
    for name in first:
        assert_equal(first[name], second[name], name)
    expected = mean_of_two(tmp_path, stage)
    for name in first:
        # float32; the order of two terms, and Adam divides by small numbers. A key's
        # bias cancels in the softmax: its gradient is rounding, its step is the rate.
        atol = 1e-2 if name.endswith("qkv_proj.bias") else 5e-5
        assert_close(first[name], expected[name], atol=atol, what=name)
    saved = arrays_of(tmp_path / "run" / f"{stage}.safetensors")
    for name in first:
        assert_equal(saved[f"parameters.{name}"], first[name], name)


def mean_of_two(folder: Path, stage: str) -> dict[str, mx.array]:
    """The weights after steps with the mean of both processes' gradients, made here."""
    recipe = read_recipe(folder / "recipe.json")
    model = MM1(recipe.model)
    initialize(model, recipe.seed)
    processor = make_processor(recipe.model, recipe.images, folder / "tokenizer.model")
    trainer = make_trainer(recipe, stage, model, processor.tokenizer.encode, folder)
    settings = recipe.stages[stage]
    parameters = trainer.module.trainable_parameters()
    update = trainer._make_update()
    trainer.module.train()
    for step in range(settings.steps):
        gradients = []
        for rank in (0, 1):
            share = settings.batch // 2 + (rank < settings.batch % 2)
            rng = batch_rng(recipe.seed, stage, step, rank)
            arrays, _ = trainer.stage.host_batch(rng, share, step / settings.steps)
            gradients.append(trainer._grad(parameters, *map(mx.array, arrays))[0])
        mean = tree_map(lambda a, b: (a + b) / 2, *gradients)
        peak, warmup = settings.learning_rate, settings.warmup
        trainer._optimizer.set_rate(
            warmup_cosine(step, settings.steps, peak, warmup, settings.floor)
        )
        parameters = update(mean, _norm_of(mean), parameters)
        trainer.module.update(parameters)
        mx.eval(trainer.module.parameters())
    return dict(tree_flatten(trainer.module.parameters()))


def test_two_processes_stop_together(tmp_path):
    """One of them gets the signal; the other would wait for it for ever."""
    arguments = write_run(tmp_path, joint={"steps": 100_000, "batch": 2})
    arguments += ["--stage", "joint", "--save-every", "1"]
    processes = [start(tmp_path, arguments, **m) for m in two_processes(tmp_path)]
    wait_for(tmp_path / "run" / "joint.safetensors", processes[0])
    processes[1].send_signal(signal.SIGINT)
    ends = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [130, 130], ends
    assert "stopped and saved" in ends[0][1] and not ends[1][1]


def test_a_batch_that_is_too_small_for_the_processes(monkeypatch, stub):
    class Three:
        def size(self):
            return 3

    stub()
    recipe = Recipe.from_dict(recipe_with(joint={"batch": 2}))
    monkeypatch.setattr("mm1_mlx.training.trainer.world", Three)
    with pytest.raises(ConfigError, match=r"batch is 2, but there are 3 processes"):
        make_trainer(recipe, "joint", MM1(recipe.model), encode, Path("/x"))
    alternates = [{"share": 0.1, "batch": 2}]
    recipe = Recipe.from_dict(recipe_with(joint={"batch": 3, "alternates": alternates}))
    with pytest.raises(ConfigError, match=r"batch is 2, but there are 3 processes"):
        make_trainer(recipe, "joint", MM1(recipe.model), encode, Path("/x"))
    assert os.environ.get("MLX_RANK") is None
