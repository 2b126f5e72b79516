"""convert.rules, the tables and the command: strict both ways, a test per message."""

import json

import mlx.core as mx
import numpy as np
import pytest

from convert.__main__ import main
from convert.rules import (
    Drop,
    Rule,
    concatenate,
    drop_cls_row,
    flatten_patches,
    flatten_patches_either,
    missing,
    oihw_to_ohwi,
    plan,
    prefixed,
    rename,
    spatial_to_rows,
    squeeze_1x1,
    squeeze_first,
    swap_last,
)
from convert.source import (
    CONNECTOR,
    DECODER,
    ENCODER,
    MODEL,
    detect,
    find_source,
    sources,
)
from convert.sources import hf_clip, llava
from helpers import (
    ROOT,
    assert_close,
    assert_equal,
    assert_fails,
    run_here,
    run_python,
)
from mm1_mlx.errors import CheckpointError

# --- Matching ----------------------------------------------------------------------


def test_placeholders():
    rules = [
        Rule("block.{i}.norm.{p}", "layers.{i}.norm.{p}"),
        Rule("net.{s}.b{b}.{rest}", "stage.{s}.{b-1}.{rest}"),
        Rule("mlp.{j}.weight", "linear.{j/2}.weight"),
        Drop("text.{rest}", why="text tower"),
    ]
    names = [
        "block.10.norm.bias",
        "net.0.b3.conv.weight",
        "mlp.4.weight",
        "text.a.b",
    ]
    found = plan(names, rules)
    assert {job.target: job.pieces for job in found.jobs} == {
        "layers.10.norm.bias": (("block.10.norm.bias",),),
        "stage.0.2.conv.weight": (("net.0.b3.conv.weight",),),
        "linear.2.weight": (("mlp.4.weight",),),
    }
    assert found.dropped == {"text.a.b": "text tower"}


@pytest.mark.parametrize(
    "name",
    ["xblock.1.w", "block.1.wx", "block.x.w", "block..w", "blockx1.w", "block.1.w\n"],
)
def test_a_pattern_matches_the_whole_name(name):
    with pytest.raises(CheckpointError, match="no rule knows"):
        plan([name], [Rule("block.{i}.w", "a.{i}")])


def test_several_sources_and_stacking():
    rules = [
        Rule(("{e}.gate", "{e}.up"), "gate_up", concatenate, stack="e"),
        Rule(("{i}.q.{p}", "{i}.k.{p}", "{i}.v.{p}"), "{i}.qkv.{p}", concatenate),
    ]
    rng = np.random.default_rng(0)
    weights = {
        f"{e}.{x}": rng.random((2, 3)) for e in range(11) for x in ("up", "gate")
    }
    weights |= {f"7.{x}.bias": rng.random(2) for x in "vkq"}
    out = rename(weights, rules)
    # Numbers are ordered as numbers: 10 comes after 9, not after 1.
    stacked = [
        np.concatenate([weights[f"{e}.gate"], weights[f"{e}.up"]]) for e in range(11)
    ]
    assert_equal(out["gate_up"], np.stack(stacked))
    assert_equal(
        out["7.qkv.bias"], np.concatenate([weights[f"7.{x}.bias"] for x in "qkv"])
    )
    assert set(out) == {"gate_up", "7.qkv.bias"}


def test_mlx_and_numpy_give_the_same():
    rules = [
        Rule("conv", "patch", flatten_patches),
        Rule("{e}.w", "experts", swap_last, stack="e"),
    ]
    arrays = {
        "conv": np.arange(2 * 3 * 4 * 4, dtype=np.float32).reshape(2, 3, 4, 4),
        "0.w": np.ones((2, 3), np.float32),
        "1.w": np.zeros((2, 3), np.float32),
    }
    ours = rename({k: mx.array(v) for k, v in arrays.items()}, rules)
    theirs = rename(arrays, rules)
    for name, array in theirs.items():
        assert isinstance(ours[name], mx.array)
        assert isinstance(array, np.ndarray)
        assert_equal(ours[name], array)


def test_arrays_are_read_one_target_at_a_time():
    """A lazy mapping is never read as a whole: the pipeline depends on it."""
    read: list[str] = []

    def get(name):
        read.append(name)
        return np.zeros(1)

    found = plan(["a.1", "a.0", "b.0"], [Rule("{rest}.{i}", "{rest}-{i}")])
    assert read == []
    for job in found.jobs:
        job.run(get)
        assert read.pop() == job.pieces[0][0]
        assert read == []


def names(count):
    return [f"w{i}" for i in range(count)]


def test_unknown_names():
    with pytest.raises(
        CheckpointError, match=r"^7 weights no rule knows: w0, w1, w2, "
    ):
        plan(names(7), [])
    with pytest.raises(CheckpointError, match=r"w4 and 2 more\. Is this another kind"):
        plan(names(7), [])
    with pytest.raises(CheckpointError, match=r"^2 weights no rule knows: w0, w1\. Is"):
        plan(names(2), [])


def test_a_name_that_two_rules_match():
    rules = [Rule("w{i}", "a.{i}"), Drop("{rest}", why="everything")]
    with pytest.raises(
        CheckpointError, match=r"^2 weights two rules use: w0, w1\. The"
    ):
        plan(names(2), rules)


def test_a_target_that_two_names_fill():
    rules = [Rule("w{i}", "target")]
    with pytest.raises(CheckpointError, match=r"two rules use: w1"):
        plan(names(2), rules)


def test_a_target_that_two_rules_fill():
    rules = [Rule("a", "target"), Rule("b", "target")]
    with pytest.raises(
        CheckpointError, match=r"more than one rule fills: target\. The"
    ):
        plan(["a", "b"], rules)


def test_a_target_with_a_part_missing():
    rules = [Rule(("{i}.q", "{i}.k"), "{i}.qk", concatenate)]
    with pytest.raises(CheckpointError, match=r"^1 weight lacking a part: 3\.qk"):
        plan(["2.q", "2.k", "3.q"], rules)


@pytest.mark.parametrize("experts", [[0, 2], [1, 2], [1]])
def test_experts_with_a_gap(experts):
    rules = [Rule("{e}.w", "experts", stack="e")]
    with pytest.raises(CheckpointError, match=r"lacking a part: experts\. Is a f"):
        plan([f"{e}.w" for e in experts], rules)


def test_prefixed():
    rules = [
        Rule(("a.{i}", "b.{i}"), "c.{i}", concatenate, stack="i"),
        Drop("d", why="unused"),
    ]
    one, two = prefixed(rules, source="x.", target="y.")
    assert one == Rule(("x.a.{i}", "x.b.{i}"), "y.c.{i}", concatenate, stack="i")
    assert two == Drop("x.d", why="unused")


def test_missing():
    import mlx.nn as nn

    model = nn.Linear(2, 3)
    assert missing(["weight"], model) == ["bias"]
    assert missing(["weight", "bias", "other"], model) == []


# --- Transforms --------------------------------------------------------------------


def test_flatten_patches_by_hand():
    """The order of our pixels: row, then column, then channel."""
    weight = np.zeros((1, 3, 2, 2))
    weight[0, 1, 0, 1] = 5  # channel 1, row 0, column 1
    assert_equal(flatten_patches(weight)[0], [0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0])


def test_flatten_patches_equals_the_convolution():
    """On real patches, through our own patchify."""
    from mm1_mlx.models.vision import patchify

    rng = np.random.default_rng(0)
    weight = mx.array(rng.standard_normal((5, 3, 4, 4)), mx.float32)
    image = mx.array(rng.standard_normal((2, 8, 12, 3)), mx.float32)
    convolved = mx.conv2d(image, oihw_to_ohwi(weight), stride=4)
    ours = patchify(image, 4) @ flatten_patches(weight).T
    assert_close(ours, convolved, atol=1e-5)  # float32 sums of 48 products


def test_channels_last_patches_are_not_turned_twice():
    weight = np.random.default_rng(0).random((5, 3, 4, 4))
    last = weight.transpose(0, 2, 3, 1)
    assert_equal(flatten_patches_either(last), flatten_patches(weight))
    assert_equal(flatten_patches_either(weight), flatten_patches(weight))


def test_position_tables():
    table = np.arange(10 * 2).reshape(1, 10, 2)
    assert_equal(drop_cls_row(table), table[0, 1:])  # 9 and the class token
    assert_equal(drop_cls_row(table[:, :9]), table[0, :9])
    assert_equal(squeeze_first(table), table[0])
    spatial = np.arange(2 * 3 * 3).reshape(2, 3, 3)
    assert_equal(spatial_to_rows(spatial)[4], spatial[:, 1, 1])  # row 1, column 1
    assert_equal(spatial_to_rows(spatial)[5], spatial[:, 1, 2])


def test_convolutions():
    weight = np.arange(4.0).reshape(2, 2, 1, 1)
    assert_equal(squeeze_1x1(weight), [[0, 1], [2, 3]])
    depthwise = np.arange(18.0).reshape(2, 1, 3, 3)
    turned = oihw_to_ohwi(depthwise)
    assert turned.shape == (2, 3, 3, 1)
    assert_equal(turned[1, :, :, 0], depthwise[1, 0])


WRONG_SHAPES = [
    (flatten_patches, (4, 3, 2, 3), r"\(4, 3, 2, 3\), but must be \(width, channels"),
    (flatten_patches_either, (4, 12), r"\(4, 12\), but must be \(width, channels, p"),
    (oihw_to_ohwi, (4, 3), r"\(4, 3\), but must be \(out, in, height, width\)"),
    (squeeze_1x1, (4, 3, 3, 3), r"must be \(out, in, 1, 1\)"),
    (squeeze_first, (2, 3), r"\(2, 3\), but must be \(1, \.\.\.\)"),
    (drop_cls_row, (1, 12, 4), r"must be a square number of positions, or one more"),
    (drop_cls_row, (9, 4), r"must be \(1, positions, width\)"),
    (spatial_to_rows, (3, 4), r"must be \(width, rows, columns\)"),
]


@pytest.mark.parametrize("transform, shape, message", WRONG_SHAPES)
def test_wrong_shapes_name_the_target(transform, shape, message):
    rules = [Rule("source", "our.name", transform)]
    with pytest.raises(CheckpointError, match=r"our\.name: the weight has shape"):
        rename({"source": np.zeros(shape)}, rules)
    with pytest.raises(CheckpointError, match=message):
        transform(np.zeros(shape))


# --- The tables as a whole ---------------------------------------------------------


@pytest.mark.parametrize("name", sources())
def test_every_source_has_a_table_and_a_reader(name):
    source = find_source(name)
    assert source.name == name and source.what
    assert source.kind in (MODEL, DECODER, ENCODER, CONNECTOR)
    assert callable(source.config) and (source.types or source.is_it)
    if callable(source.rules):
        return  # made of a config: test_convert.py
    assert source.rules
    for rule in source.rules:
        if isinstance(rule, Drop):
            assert rule.why


def test_every_module_with_an_entry_is_found():
    found = {path.stem for path in (ROOT / "convert" / "sources").glob("*.py")}
    assert len(sources()) >= 26
    assert {"tamm", "fields", "parts", "llava", "vl360"} <= found


def test_an_unknown_source():
    with pytest.raises(CheckpointError, match=r"no source named 'bert'.*open_clip_vit"):
        find_source("bert")


def test_a_config_of_nobody():
    with pytest.raises(CheckpointError, match=r"no model_type, which is not supported"):
        detect({"hidden_size": 3})


def test_a_key_too_many_is_an_error():
    """Text keys that a table does not expect must not be skipped (trap 9)."""
    with pytest.raises(CheckpointError, match=r"no rule knows: text_model2\.x"):
        plan(["text_model2.x"], hf_clip.RULES)
    with pytest.raises(CheckpointError, match=r"no rule knows: model\.image_newline"):
        plan(["model.image_newline"], llava.RULES)


# --- The command -------------------------------------------------------------------


def convert(*args):
    return run_here(*args, main=main)


def test_the_command_lists_sources_and_shows_names():
    listed = run_python("-m", "convert", "--list-sources")
    assert listed.returncode == 0, listed.stderr
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(sources())
    assert (
        json.loads(convert("--list-sources", "--json").stdout).keys()
        == sources().keys()
    )
    folder = "tests/fixtures/decoder_mixtral"
    done = convert("--hf-path", folder, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    weights = json.loads(done.stdout)["weights"]
    assert len(weights["decoder.layers.0.moe.experts.gate_up_proj"]) == 8  # 4 experts
    text = convert("--hf-path", "tests/fixtures/siglip", "--dry-run").stdout
    assert "norm_out.bias <- vision_model.post_layernorm.bias" in text
    assert "(dropped) logit_bias: contrastive loss only" in text
    assert "attn.qkv_proj.weight <- " in text and " and 2 more" in text


def test_wrong_use_of_the_command(tmp_path):
    assert_fails(convert(), r"give --hf-path, a folder or a hub id", code=2)
    mixtral = "tests/fixtures/decoder_mixtral"
    unknown = convert("--hf-path", mixtral, "--source", "lama")
    assert_fails(unknown, r"no source named 'lama'\. The sources are: aim, ")
    empty = convert("--hf-path", tmp_path)
    assert_fails(empty, r"has no config\.json .*cannot be known")
    other = convert("--hf-path", mixtral, "--source", "phi", "--dry-run")
    assert_fails(other, r"weights no rule knows: model\.layers\.0\.block_sparse_moe")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    kind = convert("--hf-path", tmp_path)
    assert_fails(kind, r"'bert', which is not supported; known are: aimv2, ")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert_fails(convert("--hf-path", tmp_path), r"has no weights: expected \*\.safe")
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 20)
    assert_fails(convert("--hf-path", tmp_path), r"its header does not fit into the fi")
    (tmp_path / "a.safetensors").write_bytes(b"\x02" + b"\0" * 7 + b"{]")
    assert_fails(convert("--hf-path", tmp_path), r"its header is not JSON")
    flags = convert("--hf-path", mixtral, "--q-bits", "4")
    assert_fails(flags, r"flags of quantization were given without -q", code=2)
    both = convert("--hf-path", mixtral, "-q", "-d")
    assert_fails(both, r"either -q or -d, not both", code=2)
    part = convert("--hf-path", mixtral, "-q", "--q-part", "brain=4")
    assert_fails(part, r"--q-part is 'brain=4', but must be PART=BITS")
