"""Every kind of adapter through the commands: train, ask, fuse, ask again."""

import json
import re

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_lora_command import data
from training_kit import planned_once, uncompiled

from helpers import assert_fails, max_difference, need_tiny, run_here
from mm1_mlx import load

assert data  # a fixture
pytestmark = pytest.mark.usefixtures(planned_once.__name__, uncompiled.__name__)
MODEL = "mm1-tiny"
TRAIN = [
    *("--iters", "8", "--batch-size", "4", "--warmup", "1", "--learning-rate", "3e-3"),
    *("--max-seq-length", "256", "--steps-per-eval", "100", "--rank", "4"),
]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """mm1-tiny with weights of 4 bits, made by the command."""
    need_tiny()
    folder = tmp_path_factory.mktemp("models") / "tiny-4bit"
    done = run_here("mm1_mlx.quantize", "--model", MODEL, "--mlx-path", folder)
    assert done.returncode == 0, done.stderr
    return folder


def trained(data, model, out, *more) -> str:
    """What the command told about an adapter that it has trained."""
    need_tiny()
    command = ["mm1_mlx.lora", "--model", model, "--data", data, "--adapter-path", out]
    done = run_here(*command, *TRAIN, *more)
    assert done.returncode == 0, done.stderr
    return done.stderr


def logits(data, model, adapter=None) -> mx.array:
    net, processor = load(model, adapter_path=adapter)
    inputs = processor("Say it twice.", images=[data / "0.png"])
    return net(inputs.input_ids, inputs.pixel_values)


def answer(data, model, *more) -> str:
    ask = ["--image", data / "0.png", "-p", "Say it twice.", "--temp", "0", "--quiet"]
    done = run_here("mm1_mlx.generate", "--model", model, *ask, *more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def arrays(folder) -> dict[str, mx.array]:
    return mx.load(str(folder / "model.safetensors"))  # type: ignore[return-value]


def fused(model, adapter, out, *more) -> dict:
    """What `fuse` measures between the adapter's answers and the fused model's."""
    command = ["mm1_mlx.fuse", "--model", model, "--adapter-path", adapter]
    done = run_here(*command, "--save-path", out, "--json", *more)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["damage"]


KINDS = {
    "dora": (["--fine-tune-type", "dora"], r"DoRA, rank 4, scale 4"),
    "rslora": (["--rslora"], r"LoRA, rank 4, scale 8"),
    "experts": (["--train", "experts"], r"experts +[\d,]+ +[\d,]+  LoRA"),
    "mixed": (
        [
            "--train",
            "connector=full",
            "--train",
            "head=dora:2",
            "--train",
            "norms=full",
        ],
        r"connector +([\d,]+) +\1  full",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_model_answers_as_its_base_with_the_adapter(data, tmp_path, kind):
    flags, said = KINDS[kind]
    told = trained(data, MODEL, tmp_path / "adapter", *flags)
    assert re.search(said, told), told
    damage = fused(MODEL, tmp_path / "adapter", tmp_path / "fused")
    assert damage["top1"] == 1 and damage["kl"]["mean"] < 1e-5  # float16 weights
    base, wanted, found = (
        logits(data, MODEL),
        logits(data, MODEL, tmp_path / "adapter"),
        logits(data, tmp_path / "fused"),
    )
    learned = max_difference(wanted, base)
    assert max_difference(found, wanted) < 2e-3 * learned
    assert {str(a.dtype) for a in arrays(tmp_path / "fused").values()} == {
        "mlx.core.float16"  # as mm1-tiny is stored
    }
    with_it = answer(data, MODEL, "--adapter-path", tmp_path / "adapter")
    assert answer(data, tmp_path / "fused") == with_it


def test_weights_of_4_bits(data, packed, tmp_path):
    """QLoRA: fused at 16 bits it is the same, at 4 bits what was added is rounded."""
    told = trained(data, packed, tmp_path / "adapter", "--fine-tune-type", "dora")
    assert re.search(r"attention +[\d,]+ +[\d,]+  DoRA, rank 4", told), told
    adapter, whole, again = (tmp_path / n for n in ("adapter", "whole", "again"))
    damage = fused(packed, adapter, whole, "--dequantize")
    assert damage["top1"] == 1 and damage["kl"]["mean"] < 1e-5
    rounded = fused(packed, adapter, again)
    assert damage["kl"]["mean"] < rounded["kl"]["mean"]
    wanted, base = logits(data, packed, adapter), logits(data, packed)
    learned = max_difference(wanted, base)
    assert max_difference(logits(data, whole), wanted) < 2e-3 * learned
    assert max_difference(logits(data, again), wanted) < learned
    assert answer(data, whole) == answer(data, packed, "--adapter-path", adapter)
    first, second = (arrays(folder) for folder in (whole, again))
    name = "decoder.layers.0.attn.qkv_proj.scales"
    assert name in second and name not in first


def test_packed_weights_are_not_trained_whole(data, packed, tmp_path):
    command = ["mm1_mlx.lora", "--model", packed, "--data", data]
    command += ["--adapter-path", tmp_path / "adapter", "--train", "attention=full"]
    assert_fails(run_here(*command), r"is quantized: it cannot be trained whole")


def test_the_papers_rate(data, packed, tmp_path):
    """exp(-0.4214 ln N - 0.5535): N is the decoder's, packed and adapted or not."""
    net, _ = load(MODEL)
    flat = tree_flatten(net.parameters())
    count = sum(a.size for name, a in flat if name.startswith("decoder.layers."))
    peak = np.exp(-0.4214 * np.log(count) - 0.5535)
    for number, model in enumerate((MODEL, packed)):
        out = tmp_path / str(number)
        trained(data, model, out, "--learning-rate", "mm1", "--iters", "2")
        first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
        assert first["rate"] == pytest.approx(peak, rel=1e-6)  # warm-up of one step
