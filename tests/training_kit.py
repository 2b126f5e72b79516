"""A training run that takes a second: a recipe, a data module, a vocabulary."""

import copy
import json
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from small_tokenizers import sentencepiece_model

from helpers import ROOT, assert_equal, clean_environment, run_cli
from mm1_mlx.training import memory_plan, step_memory
from mm1_mlx.training.state import load_state
from mm1_mlx.training.step_memory import StepMemory, StepShape

RECIPE = {
    "seed": 3,
    "data": "stub_data",
    "images": {"size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    "model": {
        "vision_config": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "image_size": 16,
            "patch_size": 4,
            "hidden_act": "relu2",
            "norm_type": "rms_norm",
            "class_token": False,
            "patch_bias": True,
            "feature_norm": True,
        },
        "connector_config": {
            "type": "average_pool",
            "num_query_tokens": 4,
            "norm_output": True,
        },
        "text_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "vocab_size": 350,
            "max_position_embeddings": 256,
            "hidden_act": "relu2",
            "gated_mlp": False,
            "moe_config": {"num_local_experts": 2, "num_experts_per_tok": 1},
        },
        "image_token_id": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    },
    "stages": {
        "encoder": {
            "steps": 4,
            "batch": 4,
            "learning_rate": 0.01,
            "warmup": 2,
        },
        "joint": {
            "steps": 6,
            "batch": 3,
            "row_length": 40,
            "learning_rate": 0.01,
            "warmup": 2,
            "vision_rate": 0.5,
        },
    },
}

# The data module: one colour fills a picture, and the question asks for it.
STUB = """
from PIL import Image

from mm1_mlx.training.documents import Document, Region, Text

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def picture(rng):
    name = rng.choice(sorted(COLOURS))
    return name, Image.new("RGB", (rng.randint(8, 20), 16), COLOURS[name])


def document(rng, kind, progress=1.0):
    if kind == "text":
        return Document("text", [], [Text("<user>")], [[Text("red", True)]])
    shown = [picture(rng) for _ in range(1 if kind == "caption" else 2)]
    marks = "<image>" * len(shown)
    branches = [
        [Text(f"What colour {i}?<assistant>"), Text(name, True)]
        for i, (name, _) in enumerate(shown)
    ]
    images = [image for _, image in shown]
    regions = [[Region((0.0, 0.0, 1.0, 1.0), name)] for name, _ in shown]
    context = [Text("<user>" + marks)]
    return Document(kind, images, context, branches, regions=regions)


def region_picture(rng, progress=1.0):
    name, image = picture(rng)
    return image, [Region((0.0, 0.0, 1.0, 1.0), name)]
"""


def recipe_with(**changes) -> dict:
    """RECIPE with values replaced: recipe_with(joint={"steps": 3}, seed=1)."""
    values = copy.deepcopy(RECIPE)
    for key, value in changes.items():
        if key in ("encoder", "joint"):
            values["stages"][key] |= value
        else:
            values[key] = value
    return values


def write_run(folder: Path, **changes) -> list[str]:
    """Recipe, data module and vocabulary in a folder; the arguments of pretrain."""
    (folder / "recipe.json").write_text(json.dumps(recipe_with(**changes)))
    (folder / "stub_data.py").write_text(STUB)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    return [
        str(folder / "recipe.json"),
        "--out",
        str(folder / "run"),
        "--tokenizer",
        str(folder / "tokenizer.model"),
    ]


def environment(folder: Path, **more: str) -> dict[str, str]:
    """For a subprocess: the data module can be imported, and nothing is compiled."""
    path = f"{ROOT}:{folder}"
    return {"PYTHONPATH": path, "MLX_DISABLE_COMPILE": "1", **more}


@pytest.fixture
def uncompiled():
    """MLX's CPU back end compiles by calling a C++ compiler: seconds for each shape."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def encode(text: str, place: str = "start") -> list[int]:
    """A vocabulary for tests by hand: a letter is 97 to 122, a mark its one id."""
    ids = []
    for mark, number in (("<user>", 5), ("<assistant>", 6)):
        text = text.replace(mark, chr(number))
    for letter in text:
        ids.append(ord(letter))
    return ids


def arrays_of(path: Path) -> dict[str, mx.array]:
    """All arrays of a checkpoint by name."""
    trees, _ = load_state(path)
    return {
        f"{tree}.{name}": array
        for tree, values in trees.items()
        for name, array in tree_flatten(values)
    }


def measured(file: Path) -> list[dict]:
    """The lines of metrics.jsonl without times, and the experts' load since
    the process's last report."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    told = ("seconds", "tokens_per_second", "peak_memory", "expert_load")
    return [{k: v for k, v in line.items() if k not in told} for line in lines]


def assert_same_state(one: Path, two: Path) -> None:
    """Two checkpoints are equal in every bit."""
    first, second = arrays_of(one), arrays_of(two)
    assert first.keys() == second.keys()
    for name in first:
        assert_equal(first[name], second[name], name)
    assert load_state(one)[1] == load_state(two)[1]


def command(tmp_path, *more, **changes):
    """`python -m mm1_mlx.pretrain` on the stub run."""
    arguments = write_run(tmp_path, **changes)
    return run_cli("mm1_mlx.pretrain", *arguments, *more, env=environment(tmp_path))


def start(tmp_path, arguments, **more):
    """The command in the background."""
    return subprocess.Popen(
        [sys.executable, "-m", "mm1_mlx.pretrain", *arguments],
        cwd=ROOT,
        env=clean_environment(**environment(tmp_path, **more)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path, process, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.005)


_STEPS: dict[tuple, StepMemory] = {}
_PROBES = step_memory._PROBES


@pytest.fixture
def planned_once(monkeypatch):
    """What steps take is learned in the first run of a kind; a later run makes the
    first small step of it. On mm1-tiny that is most of a short run's time. What is
    learned from are steps of a quarter of the usual length."""
    measure = memory_plan.measure

    def known(trainer, arrays, tiles, wanted, limit):
        def kinds(parameters):
            return tuple((n, a.shape, a.dtype) for n, a in tree_flatten(parameters))

        module = trainer.module
        kind = (
            *(trainer.stage.settings.recompute, tiles),
            *(kinds(module.parameters()), kinds(module.trainable_parameters())),
        )
        if kind not in _STEPS:
            if step_memory._PROBES is _PROBES:  # else a test has chosen its own
                short = [(b, n // 4, i, m) for b, n, i, m in _PROBES]
                monkeypatch.setattr(step_memory, "_PROBES", short)
            _STEPS[kind] = measure(trainer, arrays, tiles, wanted, limit)
        else:
            trainer.peaks([arrays(StepShape(1, 64, tiles, 64))])
        return _STEPS[kind]

    monkeypatch.setattr(memory_plan, "measure", known)
