"""AWQ and DWQ, mlx-lm's own: better than rounding on what they were fitted to."""

import json
import sys
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from small import DENSE
from small_tokenizers import write_tiny

from helpers import assert_fails, need, need_tiny, run_python
from mm1_mlx import load
from mm1_mlx.config import MM1Config
from mm1_mlx.errors import CheckpointError, MM1Error
from mm1_mlx.inputs.processor import Processor
from mm1_mlx.inputs.tokenizer import load_tokenizer
from mm1_mlx.loading import quantize
from mm1_mlx.models.mm1 import MM1
from mm1_mlx.quantization.damage import compare, record
from mm1_mlx.quantization.modules import quantize_model
from mm1_mlx.quantization.recipes import Recipe
from mm1_mlx.training import learned_quantization
from mm1_mlx.training.learned_quantization import learn, quantize_learned

LOW = Recipe(bits=3, group_size=32)


def damage(folder) -> float:
    """KL from mm1-tiny's logits on the built-in questions."""
    traces = [record(*load(name)) for name in (need_tiny(), folder)]
    return compare(*traces)["kl"]["mean"]


def test_dwq_is_nearer_than_rounding(tmp_path):
    need("mlx_lm")
    rounded, learned = tmp_path / "rounded", tmp_path / "learned"
    quantize(need_tiny(), rounded, LOW)
    found = quantize_learned(
        need_tiny(), learned, "dwq", LOW, samples=48, length=128, learning_rate=3e-5
    )
    assert damage(learned) < 0.8 * damage(rounded)
    # As many bits, and only the scales and biases of packed weights are other ones.
    both = [json.loads((f / "config.json").read_text()) for f in (rounded, learned)]
    assert both[0]["quantization"] == both[1]["quantization"]
    assert found["bytes"] < found["bytes_before"]
    (first, _), (second, _) = load(rounded), load(learned)
    same = {
        name: bool(mx.array_equal(array, dict(flat(second))[name]))
        for name, array in flat(first)
    }
    changed = {name for name, equal in same.items() if not equal}
    assert changed
    assert all(name.endswith((".scales", ".biases")) for name in changed)
    assert any("experts" in name for name in changed)
    assert not any(name.startswith(("vision", "connector")) for name in changed)
    made = both[1]["extra"]["quantized"]
    assert made["method"] == "dwq of mlx-lm" and made["bits"] == 3


def flat(model):
    from mlx.utils import tree_flatten

    return tree_flatten(model.parameters())


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A model without experts that reads text, and texts in which one kind of feature
    is much larger than the others: what AWQ is for."""
    folder = write_tiny(tmp_path_factory.mktemp("words"))
    tokenizer = load_tokenizer(folder)
    text = replace(DENSE, vocab_size=400, hidden_size=64, intermediate_size=64)
    return MM1Config(text_config=text, eos_token_id=2, pad_token_id=3), tokenizer


def with_outliers(config):
    mx.random.seed(0)
    model = MM1(config)
    model.eval()
    for layer in model.decoder.layers:
        for norm in (layer.norm1, layer.norm2):
            scale = np.ones(norm.weight.shape, np.float32)
            scale[::16] = 12.0
            norm.weight = mx.array(scale)
    return model


def test_awq_is_nearer_than_rounding(dense, tmp_path):
    need("mlx_lm")
    recipe = Recipe(bits=3, group_size=32, parts={"embeddings": 8, "head": 8})
    config, tokenizer = dense
    model = with_outliers(config)
    processor = Processor(tokenizer, None, model.config)
    ids = mx.array([[5, 9, 17, 20, 33, 8, 40, 12]])
    wanted = model(ids)
    data = tmp_path / "texts.txt"
    data.write_text("\n\n".join(f"one two three {i} four" for i in range(40)))
    made = learn(
        with_outliers(config),
        processor,
        "awq",
        recipe,
        data=data,
        samples=32,
        length=32,
    )
    plain = with_outliers(config)
    choose = recipe.chooser(3)
    shapes = {name: array.shape for name, array in flat(plain)}
    quantize_model(
        plain,
        lambda path: choose(f"{path}.weight", shapes.get(f"{path}.weight", ())),
    )
    gaps = [float(mx.abs(m(ids) - wanted).mean()) for m in (made, plain)]
    assert gaps[0] < 0.8 * gaps[1], gaps
    kept = made.config.quantization
    assert kept["bits"] == 3 and kept["decoder.embed_tokens"]["bits"] == 8


# --- What is refused -----------------------------------------------------------------


@pytest.mark.parametrize(
    "method, recipe, settings, message",
    [
        ("awq", LOW, {}, "awq fits dense decoders only"),
        ("gptq", LOW, {}, "must be awq or dwq"),
        ("dwq", Recipe(mode="mxfp4"), {}, "fits the mode 'affine' only"),
        ("dwq", LOW, {"samples": 3}, "3 texts are too few"),
        ("dwq", LOW, {"data": "absent.txt"}, "absent.txt cannot be read"),
    ],
)
def test_what_cannot_be_learned(method, recipe, settings, message):
    need("mlx_lm")
    with pytest.raises(MM1Error, match=message):
        learn(*load(need_tiny()), method, recipe, **settings)


def test_data_that_does_not_fit(tmp_path):
    need("mlx_lm")
    few, broken = tmp_path / "few.txt", tmp_path / "broken.jsonl"
    few.write_text("one text\n\nand another")
    broken.write_text('{"text": "a"}\n{"words": "b"}\n')
    with pytest.raises(MM1Error, match="has 2 texts that can be used, but 8"):
        learn(*load(need_tiny()), "dwq", LOW, data=few)
    with pytest.raises(MM1Error, match=r"broken.jsonl, line 2: expected"):
        learn(*load(need_tiny()), "dwq", LOW, data=broken)


def test_without_mlx_lm(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    with pytest.raises(MM1Error, match=r"pip install 'mm1_mlx\[train\]'"):
        learned_quantization.require_mlx_lm("dwq")


def test_a_folder_in_use_is_refused_before_the_work(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        quantize_learned(need_tiny(), tmp_path, "dwq", LOW)


def test_the_command(tmp_path):
    need("mlx_lm")
    out = tmp_path / "out"
    args = ("--model", "mm1-tiny", "--mlx-path", out, "--method", "dwq", "--q-bits", 4)
    few = ("--num-samples", 8, "--max-seq-length", 32, "--json")
    done = run_python("-m", "mm1_mlx.quantize", *args, *few)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["damage"]["kl"]["mean"] > 0
    assert "--method dwq" in (out / "README.md").read_text()
    assert_fails(
        run_python("-m", "mm1_mlx.quantize", *args[:5], "awq", "--overwrite"),
        "awq fits dense decoders only",
    )
