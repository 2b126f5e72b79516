"""benchmark generate: folders, sides, figures, goals, and refusals."""

import ast
import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from helpers import assert_fails, needs, run_cli, run_here, run_python
from mm1_mlx.benchmarks import sides, works
from mm1_mlx.benchmarks.figures import Goal, Spread, number, pair_ratios
from mm1_mlx.benchmarks.generate import (
    Against,
    Evidence,
    as_object,
    compare,
    goals_of,
    measure_work,
    result,
)
from mm1_mlx.benchmarks.generate_side import answer
from mm1_mlx.benchmarks.generate_table import as_table
from mm1_mlx.benchmarks.peers.side_kit import Answer, Task
from mm1_mlx.benchmarks.random_decoder import dense, sparse
from mm1_mlx.benchmarks.random_llava import Shape
from mm1_mlx.benchmarks.works import Settings, own_model, prepare
from mm1_mlx.cli.subjects import SUBJECTS
from mm1_mlx.config import MoEConfig
from mm1_mlx.errors import CheckpointError, MM1Error
from mm1_mlx.loading import load, load_model
from mm1_mlx.memory import count_parameters

PEERS = Path(sides.__file__).with_name("peers")
SMALL = Shape(
    image_size=28,
    vision_width=64,
    vision_layers=2,
    width=64,
    hidden=128,
    layers=2,
    head_size=32,
    vocabulary=640,
)


def alone(experts: int = 0):
    """The decoder of the small LLaVA as a model, dense or with experts."""
    config = replace(
        SMALL.config(), vision_config=None, connector_config=None, image_token_id=None
    )
    if not experts:
        return config
    moe = MoEConfig(num_local_experts=experts, sparse_step=1, first_sparse_layer=0)
    return replace(config, text_config=replace(config.text_config, moe_config=moe))


SHAPES = {"image": SMALL, "dense": alone(), "experts8": alone(4)}
QUICK = Settings(tokens=6, prompt=40)


@pytest.fixture(scope="module", params=[None, 4], ids=["float32", "4 bit"])
def found(request, tmp_path_factory):
    """Works of every small model, made once for a number of bits."""
    folder = tmp_path_factory.mktemp("works")
    settings = replace(QUICK, bits=request.param)
    return {
        name: prepare(name, folder / name, settings, peer=True, shapes=SHAPES)
        for name in SHAPES
    }


# --- what is asked ---


def total(config) -> float:
    return sum(part.total for _, part in count_parameters(config).items()) / 1e6


def test_the_usual_models_are_as_large_as_help_says():
    assert total(Shape().config()) == pytest.approx(207, abs=1)
    assert total(dense()) == pytest.approx(179, abs=1)
    for config in (sparse(8, 1024), sparse(64, 256)):
        assert config.text_config.moe_config.num_experts_per_tok == 2
        assert 100 < total(config) < 230


def test_usual_cases():
    assert works.usual_cases(None) == ("image", "dense")
    assert works.usual_cases("mlx-vlm") == ("image",)
    assert works.usual_cases("mlx-lm") == ("dense", "experts8", "experts64")
    assert set(works.usual_cases("transformers")) <= works.CASES.keys()


def test_packed_weights_are_the_same_bits_on_both_sides(tmp_path):
    settings = replace(QUICK, bits=4)
    work = prepare("dense", tmp_path, settings, peer=True, shapes=SHAPES)
    theirs = mx.load(f"{work.theirs}/model.safetensors")
    ours = dict(tree_flatten(load_model(Path(work.ours)).parameters()))
    stem = "model.layers.0.self_attn"
    for part in ("weight", "scales", "biases"):
        rows = [theirs[f"{stem}.{x}_proj.{part}"] for x in "qkv"]
        packed = ours[f"decoder.layers.0.attn.qkv_proj.{part}"]
        assert mx.array_equal(packed, mx.concatenate(rows))
    config = json.loads(Path(work.theirs, "config.json").read_text())
    assert config["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine"}


def test_routers_and_encoders_are_not_packed(tmp_path):
    settings = replace(QUICK, bits=4)
    for name, kept in (("experts8", ".gate.weight"), ("image", "vision_tower.")):
        work = prepare(name, tmp_path / name, settings, peer=True, shapes=SHAPES)
        arrays = mx.load(f"{work.theirs}/model.safetensors")
        plain = [array for key, array in arrays.items() if kept in key]
        assert plain and all(array.dtype == mx.float32 for array in plain)
        assert any(array.dtype == mx.uint32 for array in arrays.values())


def test_packed_or_not_a_prompt_is_the_same(tmp_path):
    plain = prepare("image", tmp_path / "a", QUICK, peer=True, shapes=SHAPES)
    settings = replace(QUICK, bits=8)
    packed = prepare("image", tmp_path / "b", settings, peer=True, shapes=SHAPES)
    ids = [
        load(w.ours)[1]("What? <image>", images=[w.task.image]) for w in (plain, packed)
    ]
    assert mx.array_equal(ids[0].input_ids, ids[1].input_ids)


def test_a_model_of_ones_own(tmp_path):
    tiny = own_model("mm1-tiny", tmp_path, QUICK, peer=None)
    assert tiny.name == "mm1-tiny" and tiny.task.image and not tiny.task.ids
    with pytest.raises(
        CheckpointError, match="in the hub's layout: its decoder is not"
    ):
        own_model("mm1-tiny", tmp_path, QUICK, peer="mlx-vlm")
    with pytest.raises(MM1Error, match="mm1-tiny reads pictures and mlx-lm does not"):
        own_model("mm1-tiny", tmp_path, QUICK, peer="mlx-lm")
    made = prepare("dense", tmp_path / "m", QUICK, peer=True, shapes=SHAPES)
    ours = own_model(made.ours, tmp_path / "a", QUICK, peer="mlx-lm")
    assert ours.theirs == str(tmp_path / "a" / "hub") and len(ours.task.ids) == 40
    assert Path(ours.theirs, "model.safetensors").is_file()
    foreign = own_model(made.theirs, tmp_path / "b", QUICK, peer="mlx-lm")
    assert foreign.theirs == made.theirs and foreign.ours != made.theirs


# --- sides ---


@pytest.mark.parametrize("name", SHAPES)
def test_our_side(found, name):
    task = found[name].task
    side = answer(Task(**json.loads(json.dumps(asdict(task)))))
    assert len(side.tokens) == len(side.logprobs) == 6
    assert all(value < 0 for value in side.logprobs)
    assert 0 <= side.read < side.ttft and side.after > 0
    assert side.peak > side.loaded > 0 and side.process > side.peak
    assert side.more["bytes"]["context"] == len(side.ids) + 3
    if name == "image":
        assert side.ids.count(4) == 4 and side.encode > 0 and not task.ids
        again = side.more["again"]
        assert again["same_tokens"] and min(again["first"], again["second"]) > 0
    else:
        assert side.ids == task.ids and side.encode == 0
        rows = side.more["rows"]
        assert rows["rows"] == 8 and rows["same_tokens"]
        assert min(rows["rate"], rows["one_by_one"]) > 0


def beside(work, peer: str) -> dict:
    """One round beside a peer in this environment, as JSON; the table is checked."""
    against = Against(peer, Path(sys.executable))
    done = measure_work(work, 1, against, 1e9)
    assert list(done.figures) == ["mm1_mlx", peer]
    table = as_table(done, peer)
    assert "the same prompt ids on both sides; the same 6 of 6 greedy tokens" in table
    assert "DIFFER" not in table and peer in table
    return as_object(done, peer)


@needs("mlx_lm")
@pytest.mark.parametrize(
    "found, name", [(None, "dense"), (4, "experts8")], indirect=["found"], ids=str
)
def test_beside_mlx_lm_the_answer_is_the_same(found, name):
    values = beside(found[name], "mlx-lm")
    # The same kernels on the same numbers, but sums in another order.
    assert values["evidence"]["difference"] < 1e-5 and values["evidence"]["same"]
    assert set(values["goals"]) == {"prefill", "decode"}
    assert {"mlx-lm", "mlx", "mm1_mlx"} == set(values["versions"])
    assert values["rows"] is None  # what only we can do is not timed beside others
    assert json.loads(json.dumps(values)) == values


@needs("transformers", "torch")
@pytest.mark.parametrize("name", ["dense", "image"])
def test_beside_transformers_the_answer_is_the_same(tmp_path, name):
    work = prepare(name, tmp_path / "m", QUICK, peer=True, shapes=SHAPES)
    values = beside(work, "transformers")
    assert values["evidence"]["difference"] < 1e-4 and not values["goals"]
    assert "peak" not in values["figures"]["transformers"]  # it does not count
    assert ("encode" in values["figures"]["transformers"]) == (name == "image")


def test_peers_import_their_own_program_and_nothing_of_ours():
    for file in PEERS.glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        names |= {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        roots = {str(name).split(".")[0] for name in names}
        assert "mm1_mlx" not in roots, file
        own = file.stem.rpartition("_")[0]
        known = {own, "side_kit", "mlx", "torch", "PIL"} | set(sys.stdlib_module_names)
        assert roots <= known, (file, roots - known)


@pytest.mark.parametrize("peer", sides.PEERS)
def test_every_peer_has_its_sides(peer):
    command = sides.PEERS[peer].command(Path("python"), "generate")
    assert command[0] == "python" and Path(command[1]).is_file()


def fake_python(folder: Path, body: str) -> Path:
    """A Python that has every package at version 1, and else does `body` in sh."""
    file = folder / "python"
    file.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo 1.0 && exit\n{body}\n')
    file.chmod(0o755)
    return file


def canned(**values) -> Answer:
    """An answer of four tokens after a prompt of ten."""
    usual = {
        "read": 0.5,
        "encode": 0.5,
        "ttft": 2.0,
        "after": 1.5,
        "cpu": (1.75, 0.75),
        "ids": list(range(10)),
        "tokens": [7, 8, 9, 7],
        "logprobs": [-1.0, -2.0, -3.0, -4.0],
        "loaded": 50,
        "peak": 100,
        "process": 300,
        "versions": {"mlx": "1"},
    }
    return Answer(**(usual | values))


def test_a_peer_in_another_python(found, tmp_path):
    """Its last line counts, whatever it printed before."""
    work = found["dense"]
    told = json.dumps(asdict(canned(ids=work.task.ids, versions={"mlx-lm": "9"})))
    python = fake_python(tmp_path, f"echo hello; echo '{told}'")
    done = measure_work(work, 2, Against("mlx-lm", python), None)
    assert done.figures["mlx-lm"]["decode"] == Spread(2.0, 2.0, 2.0)
    assert done.versions["mlx-lm"] == "9" and done.runs == 2
    assert done.evidence.same_prompt and not done.evidence.same
    assert "THE ANSWERS DIFFER" in as_table(done, "mlx-lm")


def test_a_peer_that_fails_says_why(found, tmp_path):
    python = fake_python(tmp_path, "echo 'no such model' >&2; exit 3")
    with pytest.raises(MM1Error, match="mlx-lm's run failed with code 3: no such mod"):
        measure_work(found["dense"], 1, Against("mlx-lm", python), None)


def test_a_process_does_not_count_the_memory_of_the_one_that_started_it():
    held = np.ones(40_000_000)  # 320 MB
    code = "import side_kit; print(side_kit.process_memory())"
    done = run_python("-c", code, env={"PYTHONPATH": str(PEERS)})
    assert held.size and 1e6 < int(done.stdout) < 1e8


def test_rounds_alternate_and_go_both_ways():
    order, said = [], []
    jobs = {
        name: lambda turn, name=name: order.append((turn, name)) or turn
        for name in ("a", "b")
    }
    done = sides.in_turn(jobs, 3, "x", said.append)
    assert order == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]
    assert done == {"a": [0, 1, 2], "b": [0, 1, 2]}
    assert said[2] == "x, round 2 of 3: b"


# --- figures ---


def test_rates_by_hand():
    one = canned()
    assert one.prefill == 1.0 and one.prefill_rate == 10.0
    assert one.decode_rate == 2.0  # three tokens after the first, in 1.5 s
    assert one.cpu_per_token == 0.25
    assert math.isnan(canned(tokens=[7]).decode_rate)
    assert math.isnan(canned(encode=1.6).prefill_rate)  # more than there was


def test_spreads_numbers_and_pairs():
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert Spread(1.25, 1.2, 1.314).text() == "1.25 (1.20-1.31)"
    assert Spread(2.0, 2.0, 2.0).text() == "2.00"
    shown = [number(x) for x in (0, 123456.7, 12.34, 0.012345, 0.0000123)]
    assert shown == ["0", "123457", "12.3", "0.0123", "0.0000123"]
    # Of pairs, not of medians: 6/2 and 6/3 and 1/1.
    assert pair_ratios([6.0, 6.0, 1.0], [2.0, 3.0, 1.0]) == Spread(2.0, 1.0, 3.0)


def test_goals():
    fast, small = Goal(0.98, 1.15), Goal(0.25, at_most=True)
    assert fast.text(1.0) == ">= 0.98 met, 1.15 MISSED"
    assert fast.text(1.15) == ">= 0.98 met, 1.15 met" and not fast.met(0.97)
    assert small.text(0.25) == "<= 0.25 met" and small.text(0.3) == "<= 0.25 MISSED"
    for peer, names in (("mlx-vlm", {"prefill", "decode"}), ("transformers", set())):
        assert set(goals_of(made([canned()], [canned()]), peer)) == names


def made(ours, theirs=None, bandwidth=None):
    """A result of answers that were given, beside mlx-vlm where theirs are."""
    work = works.Work(name="image", what="m", ours="", theirs="", task=Task(model=""))
    against = Against("mlx-vlm", Path("python")) if theirs else None
    return result(work, ours, theirs, against, bandwidth, True)


def test_ratios_are_speeds_of_pairs_and_bytes_as_they_are():
    # Prefill takes 1 and 2 s of ours, 2 and 1 s of theirs.
    ours = [canned(peak=50), canned(ttft=3.0, after=3.0, peak=50)]
    theirs = [canned(ttft=3.0), canned(encode=1.0, ttft=2.5, after=6.0)]
    done = made(ours, theirs)
    assert done.ratios["prefill"] == Spread(1.25, 0.5, 2.0)
    assert done.ratios["decode"] == Spread(1.5, 1.0, 2.0)
    assert done.ratios["encode"] == Spread(1.5, 1.0, 2.0)
    assert done.ratios["ttft"].least == pytest.approx(2.5 / 3)
    assert done.ratios["peak"] == Spread(0.5, 0.5, 0.5)
    table = as_table(done, "mlx-vlm")
    assert "1.25 (0.500-2.00)  >= 0.98 met, 1.15 met" in table
    assert "the same 4 of 4 greedy tokens, log-probabilities within 0.0e+00" in table
    values = as_object(done, "mlx-vlm")
    assert values["goals"]["decode"] == {
        "bound": 0.98,
        "wish": 1.15,
        "at_most": False,
        "met": True,
    }
    assert values["evidence"]["same"] is True
    slow = made([canned(after=9.0)], [canned()])
    assert as_object(slow, "mlx-vlm")["goals"]["decode"]["met"] is False


def test_what_both_answered_is_compared():
    other = canned(tokens=[7, 8, 1, 1], logprobs=[-1.0, -2.25, 0.0, 0.0])
    assert compare(canned(), other) == Evidence(True, 2, 4, 0.25)
    assert not compare(canned(), canned(ids=[1])).same_prompt
    assert compare(canned(), canned(tokens=[1], logprobs=[0.0])).difference == math.inf
    assert "DIFFERENT prompt ids" in as_table(
        made([canned()], [canned(ids=[1])]), "mlx-vlm"
    )


def test_what_only_we_can_do_has_goals_too():
    rows = {"rows": 8, "rate": 26.0, "one_by_one": 20.0, "same_tokens": True}
    again = {"prompt_tokens": 9, "first": 2.0, "second": 0.5, "same_tokens": False}
    done = made([canned(more={"rows": rows, "again": again})])
    goals = as_object(done, None)["goals"]
    assert goals["rows"]["met"] is True and goals["again"]["met"] is False
    table = as_table(done, None)
    assert "8 rows together: 26.0 tokens/s, one by one 20.0, the same tokens" in table
    assert "ratio 1.30, goal >= 1.3 met" in table
    assert "after 2.00 s and 0.500 s, DIFFERENT TOKENS" in table
    assert "ratio 0.250, goal <= 0.15 MISSED" in table


def test_the_limit_and_what_was_reached():
    parts = {"weights": 60, "experts": 30, "cache": 10, "context": 14}
    done = made([canned(more={"bytes": parts})], bandwidth=400.0)
    assert done.limit.rate == 4.0 and done.limit.share == 0.5  # of 2 tokens a second
    table = as_table(done, None)
    assert "bytes per token: 100 B (weights 60 B, chosen experts 30 B, keys" in table
    assert "at most 4.00 tokens/s, of which 50% was reached" in table
    assert as_object(done, None)["limit"]["bytes"]["total"] == 100


# --- commands ---


def test_the_command_prints_json(tmp_path):
    flags = ("--model", "mm1-tiny", "--runs", "1", "--tokens", "4")
    done = run_cli("benchmark", "generate", *flags, "--bandwidth", "10", "--json")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert {"machine", "settings", "bandwidth", "results"} == set(values)
    assert values["bandwidth"] == 1e10
    (one,) = values["results"]
    assert one["name"] == "mm1-tiny" and one["limit"]["measured"] is False
    figures = one["figures"]["mm1_mlx"]
    names = [
        "read",
        "encode",
        "ttft",
        "prefill",
        "decode",
        "cpu_ttft",
        "cpu_token",
        "peak",
        "process",
    ]
    ttft, *parts = (figures[name]["median"] for name in ("ttft", "read", "encode"))
    if sum(parts) >= ttft:  # disturbed: the encoder took longer when timed alone
        names.remove("prefill")
    assert list(figures) == names
    assert all(s["least"] <= s["median"] <= s["most"] for s in figures.values())
    assert one["again"]["same_tokens"] and not one["goals"]  # they are of CASES


def test_without_a_subject_it_measures_mm1_tiny(monkeypatch, capsys):
    from mm1_mlx import benchmark
    from mm1_mlx.benchmarks import start
    from mm1_mlx.cli.subjects import generate

    timing = start.Timing("answer", "python", 3.0, 1.0, 1.0, 1.0, 1.0)
    monkeypatch.setattr(start, "measure_start", lambda runs: [timing])
    asked = []
    monkeypatch.setattr(
        generate, "measure", lambda args, head: asked.append(args) or {"a": 1}
    )
    assert benchmark.main(["--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["generate"] == {"a": 1} and values["start"]["runs"] == 3
    assert asked[0].model == "mm1-tiny" and asked[0].against is None


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_subject_has_help(subject):
    done = run_here("benchmark", subject, "--help")
    assert done.returncode == 0 and f"mm1_mlx benchmark {subject}" in done.stdout
    assert "--json" in done.stdout and "--debug" in done.stdout


VLM = ("--against", "mlx-vlm", "--peer-python", sys.executable)
LM = ("--against", "mlx-lm", "--peer-python", sys.executable)
TORCH = ("--against", "transformers", "--peer-python", sys.executable)


@pytest.mark.parametrize(
    "flags, pattern",
    [
        (VLM[:2], "--against mlx-vlm and --peer-python PATH belong together"),
        (VLM[2:], "--against PEER and --peer-python PATH belong together"),
        (("--against", "mlx"), "unknown value 'mlx'; did you mean 'mlx-lm'"),
        (("--model", "a", "--case", "dense"), "give --model or --case, not both"),
        (("--model", "a", "--bits", "4"), "--bits packs the models of --case"),
        ((*TORCH, "--bits", "4"), "transformers cannot read MLX's packed weights"),
        (("--image-size", "100"), "--image-size 100 is not a multiple of 14"),
        ((*LM, "--case", "image"), "mlx-lm reads no pictures"),
        ((*VLM, "--case", "dense"), "mlx-vlm is compared at --case image"),
        (("--tokens", "2"), "--tokens: must be a whole number of 3 or more"),
        (("--bandwidth", "0"), "--bandwidth: must be a number above 0"),
    ],
    ids=str,
)
def test_misuse_is_one_line(flags, pattern):
    assert_fails(run_here("benchmark", "generate", *flags), pattern, code=2)


@pytest.mark.parametrize("subject", ["generate", "start"])
def test_a_peer_that_is_not_there(subject, tmp_path):
    lacking = tmp_path / "python"
    flags = ("benchmark", subject, "--against", "mlx-vlm", "--peer-python", lacking)
    assert_fails(run_here(*flags), "cannot be run .No such file or directory.: give")
    lacking.write_text("#!/bin/sh\nexit 1\n")
    lacking.chmod(0o755)
    assert_fails(run_here(*flags), "has no mlx-vlm. In an environment of its own: pip")
