"""A decoder shared by two processes gives what one process gives."""

import gc
import json
import sys
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from PIL import Image
from process_kit import free_ports, run_two
from small import DENSE, LLAMA3, small_config
from small_tokenizers import write_tiny

from helpers import assert_close, assert_equal, assert_fails, need_tiny, run_python
from mm1_mlx import load, save
from mm1_mlx.adapters.folder import adapter_config, adapter_weights, write_adapter
from mm1_mlx.adapters.layers import PairSettings
from mm1_mlx.adapters.targets import Plan, Target, adapt
from mm1_mlx.config import MoEConfig
from mm1_mlx.errors import CheckpointError, ConfigError, MM1Error
from mm1_mlx.inputs.processor import Processor
from mm1_mlx.inputs.settings import ImageSettings
from mm1_mlx.inputs.tokenizer import load_tokenizer
from mm1_mlx.loading import load_adapter, load_adapters, quantize
from mm1_mlx.models.mm1 import MM1
from mm1_mlx.models.sharding import check_shares
from mm1_mlx.quantization.recipes import Recipe

# Four heads on two key-value heads, as Llama 3; every width has two groups of 32.
LLAMA = replace(
    DENSE,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=128,
    rope_scaling=LLAMA3,
)
MIXTRAL = replace(
    LLAMA,
    moe_config=MoEConfig(num_local_experts=4, sparse_step=1, first_sparse_layer=0),
)
# What the converters' other families have: every bias, norms over all heads (OLMoE), a
# shared expert (Qwen1.5-MoE), no gate, attention beside the MLP (Phi-2), a tied head.
ODD = replace(
    LLAMA,
    qkv_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
    gated_mlp=False,
    norm_type="layer_norm",
    qk_norm="full",
    parallel_block=True,
    tie_word_embeddings=True,
    moe_config=MoEConfig(
        num_local_experts=4, num_experts_per_tok=1, shared_expert_intermediate_size=32
    ),
)
MODELS = {"llama": LLAMA, "mixtral": MIXTRAL, "odd": ODD}
LORA = PairSettings(rank=4, scale=2.0)
DORA = PairSettings(rank=4, scale=2.0, dora=True)
# name: (model, kind of pairs or None)
CASES = {
    **{name: (name, None) for name in MODELS},
    "llama-4bit": ("llama-4bit", None),
    "mixtral-4bit": ("mixtral-4bit", None),
    "llama+lora": ("llama", LORA),
    "mixtral+dora": ("mixtral", DORA),
    "odd+lora": ("odd", LORA),
    "llama-4bit+dora": ("llama-4bit", DORA),
    "mixtral-4bit+lora": ("mixtral-4bit", LORA),
}


def make_model(folder, text) -> None:
    """A whole model with random weights, none of them zero or one."""
    write_tiny(folder.parent)
    tokenizer = load_tokenizer(folder.parent)
    config = small_config(
        replace(text, vocab_size=tokenizer.vocab_size),
        image_token_id=tokenizer.token_to_id("<image>"),
        eos_token_id=2,
        pad_token_id=3,
    )
    mx.random.seed(7)
    model = MM1(config)
    stir(model, model.parameters(), 0.1)
    images = ImageSettings(size=config.vision_config.image_size)
    save(model, Processor(tokenizer, images, config, chat_template="mm1-tiny"), folder)


def stir(model, parameters, size: float) -> None:
    changed = [
        (name, array + size * mx.random.normal(array.shape))
        for name, array in tree_flatten(parameters)
    ]
    model.load_weights(changed, strict=False)
    mx.eval(model.parameters())


def make_adapter(folder, model_folder, settings) -> None:
    model, _ = load(model_folder)
    text = model.config.text_config
    parts = ["attention", "head"] if "lm_head" in model.decoder else ["attention"]
    parts += ["experts"] if text.moe_config else []
    sparse = [text.is_sparse(i) for i in range(text.num_hidden_layers)]
    parts += [] if all(sparse) else ["mlp"]
    targets = {part: Target(pairs=settings) for part in parts}
    targets["connector"] = Target(pairs=LORA)
    if model.config.quantization is None:
        targets["norms"] = Target()  # trained whole
    plan = Plan(parts=targets)
    adapt(model, plan)
    stir(model, model.trainable_parameters(), 0.05)
    write_adapter(folder, adapter_weights(model), adapter_config(plan, "x"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    Image.new("RGB", (20, 16), (200, 30, 30)).save(folder / "red.png")
    for name, text in MODELS.items():
        make_model(folder / name, text)
    for name in ("llama", "mixtral"):
        quantize(folder / name, folder / f"{name}-4bit", Recipe(bits=4, group_size=32))
    for name, (model, pairs) in CASES.items():
        if pairs is not None:
            make_adapter(folder / f"adapter-{name}", folder / model, pairs)
    return folder


# Loads each case with the group of this run and writes what it gives.
_ANSWER = """
import gc
import json
import sys
from pathlib import Path
import mlx.core as mx
from mlx.utils import tree_flatten
from mm1_mlx import batch_generate, generate, load
from mm1_mlx.processes import world

folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
group, arrays, told = world(), {}, {}
picture = folder / "red.png"
for name, (place, adapter) in cases.items():
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model, processor = load(
        folder / place, adapter_path=adapter and folder / adapter, group=group
    )
    peak = mx.get_peak_memory() - before
    layers = model.decoder.layers
    held = sum(a.nbytes for _, a in tree_flatten([x.parameters() for x in layers]))
    told[name] = {"held": held, "peak": peak}
    if name == "large":
        continue
    inputs = processor("What is <image> this?", images=[picture])
    arrays[name] = model(inputs.input_ids, inputs.pixel_values)
    mx.eval(arrays)
    ask = ("What is <image> this?", [picture])
    told[name]["greedy"] = generate(model, processor, *ask, max_tokens=5).token_ids
    if name != "mixtral":
        continue
    settings = {"max_tokens": 5}
    kept = generate(model, processor, *ask, kv_bits=8, **settings)
    drawn = generate(model, processor, *ask, temp=1.5, **settings)  # no seed
    rows = batch_generate(model, processor, ["Hi", "What is it?"], **settings)
    told[name] |= {"kv_bits": kept.token_ids, "drawn": drawn.token_ids}
    told[name]["batch"] = [row.token_ids for row in rows]
end = f"{group.rank()}-of-{group.size()}"
mx.save_safetensors(str(folder / f"{end}.safetensors"), arrays)
(folder / f"{end}.json").write_text(json.dumps(told))
"""


def answers(folder, cases: dict) -> list[tuple[dict, dict]]:
    """Logits and answers of one process, and of each of two."""
    script = ("-c", _ANSWER, folder, json.dumps(cases))
    done = run_python(*script)  # also a process: another BLAS may be loaded there
    assert done.returncode == 0, done.stderr
    for end in run_two(folder, *script):
        assert end.returncode == 0, end.stderr
    return [
        (
            dict(mx.load(str(folder / f"{name}.safetensors"))),
            json.loads((folder / f"{name}.json").read_text()),
        )
        for name in ("0-of-1", "0-of-2", "1-of-2")
    ]


@pytest.fixture(scope="module")
def found(folder):
    cases = {
        name: (model, f"adapter-{name}" if pairs else None)
        for name, (model, pairs) in CASES.items()
    }
    return answers(folder, cases)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_logits_and_tokens_of_one(found, name):
    (whole, alone), (first, one), (second, two) = found
    largest = mx.abs(whole[name]).max().item()
    assert largest > 0.5  # of float32 sums in another order; the figure
    assert_close(first[name], whole[name], atol=1e-5 * largest)
    assert_equal(first[name], second[name])
    assert one[name]["greedy"] == two[name]["greedy"] == alone[name]["greedy"]


@pytest.mark.parametrize("kind", ["kv_bits", "batch"])
def test_other_ways_to_answer_are_shared_too(found, kind):
    alone, one, two = (told["mixtral"][kind] for _, told in found)
    assert one == two == alone


def test_all_processes_take_the_tokens_that_the_first_draws(found):
    _, one, two = (told["mixtral"]["drawn"] for _, told in found)
    assert one == two  # no seed was given


def test_an_adapter_changes_the_answer(found):
    """Or its cases would say nothing."""
    logits = found[0][0]
    for name, (model, pairs) in CASES.items():
        if pairs is not None:
            assert mx.abs(logits[name] - logits[model]).max().item() > 0.01, name


@pytest.mark.parametrize("name", MODELS)
def test_each_process_holds_half_of_the_layers(found, name):
    alone, one, two = (told[name]["held"] for _, told in found)
    assert one == two and 0.5 <= one / alone < 0.54, (one, alone)  # norms and router


def test_a_process_never_has_more_than_its_share_in_memory(tmp_path):
    """One array at a time is read, then cut: never the whole model."""
    text = replace(LLAMA, hidden_size=192, intermediate_size=640, num_hidden_layers=8)
    make_model(tmp_path / "large", text)
    Image.new("RGB", (20, 16)).save(tmp_path / "red.png")
    (_, alone), (_, one), _ = answers(tmp_path, {"large": ("large", None)})
    assert alone["large"]["peak"] >= alone["large"]["held"]
    assert one["large"]["peak"] < 0.62 * alone["large"]["peak"]


# --- What cannot be shared -----------------------------------------------------------


def decoder(**changes):
    return MM1(small_config(replace(LLAMA, **changes))).decoder


@pytest.mark.parametrize(
    "processes, changes, message",
    [
        (3, {}, r"^3 .* 4 heads and its 2 key-value heads and its 64 columns of att"),
        (2, {"num_key_value_heads": 1}, r"1 key-value heads, .* by 2\. Start a single"),
        (2, {"intermediate_size": 51}, r"51 columns of MLP's down_proj, .*a single pr"),
        (
            3,
            {"hidden_size": 96, "num_key_value_heads": 4},
            r"Start 2 or 4 processes\.$",
        ),
    ],
)
def test_shares_that_do_not_divide(processes, changes, message):
    with pytest.raises(ConfigError, match=message):
        check_shares(decoder(**changes), processes)


def test_a_group_of_packed_numbers_is_never_cut(folder):
    model, _ = load(folder / "mixtral-4bit", lazy=True)
    model.decoder.config = replace(  # as if there were more heads
        model.decoder.config, num_attention_heads=4, num_key_value_heads=4
    )
    message = r"its 2 quantized groups of 32 in attention's o_proj"
    with pytest.raises(ConfigError, match=message):
        check_shares(model.decoder, 4)


class SecondOfTwo:
    """What load asks of a group, without another process."""

    def rank(self) -> int:
        return 1

    def size(self) -> int:
        return 2


def test_a_share_needs_the_memory_of_a_share(folder, monkeypatch):
    model, _ = load(folder / "llama", lazy=True)
    whole = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    monkeypatch.setattr("mm1_mlx.loading.machine_memory", lambda: 0.9 * whole)
    with pytest.raises(CheckpointError, match="of memory here"):
        load(folder / "llama")
    model, _ = load(folder / "llama", group=SecondOfTwo())  # type: ignore[arg-type]
    assert model.layers[0].attn.num_kv_heads == 1


def test_a_share_is_not_saved_or_adapted(folder):
    model, processor = load(folder / "llama", lazy=True)
    model.decoder.group = object()
    with pytest.raises(MM1Error, match="only its share of the model"):
        save(model, processor, folder / "new")
    with pytest.raises(MM1Error, match=r"give the adapter to load\(\)"):
        load_adapter(model, folder / "adapter-llama+lora")
    with pytest.raises(MM1Error, match="adapters cannot be switched on it"):
        load_adapters(model, {"one": folder / "adapter-llama+lora"})


def test_a_share_knows_its_adapter(folder):
    """What was computed with another adapter, or none, is refused."""
    path = folder / "adapter-llama+lora"
    whole, _ = load(folder / "llama", adapter_path=path)
    group: Any = SecondOfTwo()
    share, _ = load(folder / "llama", adapter_path=path, group=group)
    assert share.decoder.adapter == whole.decoder.adapter is not None
    assert load(folder / "llama", group=group)[0].decoder.adapter is None


def test_lazy_with_an_adapter(folder):
    """The adapter is put on what has not been read."""
    path = folder / "adapter-llama+lora"
    gc.collect()  # what other tests left must not be freed in the middle
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    model, _ = load(folder / "llama", adapter_path=path, lazy=True)
    total = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    assert mx.get_peak_memory() - before < 0.2 * total
    mx.eval(model.parameters())
    assert mx.get_active_memory() - before >= 0.9 * total


# --- The command ---------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path):
    """In the first of two folders that stand for two Macs."""
    for name in ("mac1", "mac2"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (60, 48), (220, 20, 20)).save(tmp_path / "mac1" / "shape.png")
    return tmp_path / "mac1" / "shape.png"


def ask(*more: object) -> list[object]:
    need_tiny()
    prompt = ("-p", "What colour is it?")
    return ["-m", "mm1_mlx.generate", "--image", "shape.png", *prompt, *more]


def test_generate_answers_once_with_the_firsts_picture(tmp_path, picture):
    macs = [picture.parent, tmp_path / "mac2"]
    done = run_python(*ask("--quiet"), cwd=macs[0])
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    first, second = run_two(tmp_path, *ask("--verbose"), cwd=macs)
    assert (first.returncode, second.returncode) == (0, 0), (first, second)
    assert first.stdout == done.stdout
    assert "mm1-tiny, shared by 2 processes, load" in first.stderr
    assert "tokens-per-sec" in first.stderr
    assert second.stdout == second.stderr == ""


def test_the_launcher_of_mlx_runs_generate(picture):
    done = run_python(*ask("--quiet"), cwd=picture.parent)
    launch = "from mlx._distributed_utils.launch import main; main()"
    command = ["-n", "2", "-p", str(free_ports(1)[0]), "--", sys.executable]
    shared = run_python(
        "-c", launch, *command, *ask("--quiet", "--json"), cwd=picture.parent
    )
    assert json.loads(shared.stdout)["text"] == done.stdout.strip(), shared.stderr
    assert shared.stderr == ""


def test_generate_refuses_a_model_that_does_not_divide(tmp_path, picture):
    make_model(tmp_path / "odd", replace(LLAMA, num_key_value_heads=1))
    macs = [picture.parent, picture.parent]
    first, second = run_two(tmp_path, *ask("--model", tmp_path / "odd"), cwd=macs)
    assert_fails(first, r"2 processes cannot share this decoder: .*1 key-value heads")
    assert (second.returncode, second.stderr) == (1, "")


@pytest.mark.parametrize(
    "more, message, code",
    [
        (["--image", "gone.png"], r"gone\.png", 1),
        (["--model", "MODEL"], r"process 2 of 2 \(.+\): .*MODEL", 1),
        (["--prompt", "-"], r"-p - cannot be read by several processes", 2),
    ],
)
def test_what_one_process_meets_ends_both(tmp_path, picture, more, message, code):
    """The model's folder is on the first Mac only."""
    macs = [picture.parent, tmp_path / "mac2"]
    if "MODEL" in more:
        make_model(macs[0] / "MODEL", LLAMA)
    first, second = run_two(tmp_path, *ask(*more), cwd=macs)
    assert_fails(first, message, code=code)
    assert second.returncode == code
