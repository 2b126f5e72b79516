"""What the tests of foreign adapters share: converted models and random adapters."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from helpers import FIXTURES, assert_close
from mm1_mlx.adapters.folder import adapter_config, adapter_weights, write_adapter
from mm1_mlx.adapters.layers import PairSettings
from mm1_mlx.adapters.targets import Plan, Target, adapt
from mm1_mlx.convert.conversion import convert
from mm1_mlx.loading import load_adapter, load_model

IDS = np.arange(1, 13)[None]
LORA = Target(pairs=PairSettings(rank=4, scale=2.5))
THIN = Target(pairs=PairSettings(rank=3, scale=1.0))
DORA = Target(pairs=PairSettings(rank=4, scale=2.5, dora=True))
WHOLE = Target()
_TOWERS = {
    "moe_llava_stablelm": "moe_llava_stablelm/tower",
    "llava15/original": "llava15/tower",
}
# float32 through 3 or 4 layers, of logits whose largest is about 10
RELATIVE = 1e-5


@cache
def _made(fixture: str, place: Path) -> Path:
    folder = place / fixture.replace("/", "_")
    tower = _TOWERS.get(fixture)
    convert(
        FIXTURES / fixture,
        folder,
        dtype="float32",
        tower=None if tower is None else FIXTURES / tower,
    )
    return folder


def converted(fixture: str, tmp_path_factory: Any) -> Path:
    """A neighbour's checkpoint as a model folder of ours, float32; made once."""
    return _made(fixture, Path(tmp_path_factory.getbasetemp()) / "models")


def answers(model: Path, adapter: Path | None = None) -> np.ndarray:
    """Our logits, with an adapter of any form or without."""
    loaded = load_model(model)
    if adapter is not None:
        load_adapter(loaded, adapter)
    return np.array(loaded(mx.array(IDS)))


def trained(model: Path, folder: Path, **plan: Any) -> Path:
    """An adapter of ours with random numbers; plan: of `Plan`."""
    chosen = Plan(**plan)
    loaded = load_model(model)
    adapt(loaded, chosen)
    key = mx.random.key(7)
    arrays = []
    flat: Any = tree_flatten(loaded.trainable_parameters())
    for name, array in flat:
        key, own = mx.random.split(key)
        arrays.append((name, array + 0.05 * mx.random.normal(array.shape, key=own)))
    loaded.load_weights(arrays, strict=False)
    write_adapter(folder, adapter_weights(loaded), adapter_config(chosen, "x"))
    return folder


def arrays_of(folder: Path) -> dict[str, np.ndarray]:
    """Every array of an adapter's safetensors file."""
    (path,) = folder.glob("*.safetensors")
    return {name: np.array(array) for name, array in mx.load(str(path)).items()}


def assert_same_arrays(one: Path, two: Path) -> None:
    """The same names, and each the same bits."""
    first, second = arrays_of(one), arrays_of(two)
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert array.dtype == second[name].dtype, name
        assert np.array_equal(array, second[name]), name


def assert_answers(actual: Any, expected: Any, relative: float = RELATIVE) -> None:
    """Equal up to a part of the largest."""
    assert_close(actual, expected, atol=relative * float(np.abs(expected).max()))


def respell(folder: Path, **values: Any) -> None:
    """Change keys of an adapter_config.json; ... leaves one out."""
    path = folder / "adapter_config.json"
    found = json.loads(path.read_text()) | values
    kept = {key: value for key, value in found.items() if value is not ...}
    path.write_text(json.dumps(kept))
